package evidence

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store"
)

// maskings gathers which masking rules a bundle is about: those of the grants in
// its window, and those that uses in it name. It is not safe for concurrent use.
type maskings struct {
	byDigest map[string]*maskingRules
}

// maskingRules are one set of rules.
type maskingRules struct {
	file   bool // its text was seen in a grant
	window bool // a grant or a use of the window has it
	uses   int64
	scopes map[string]bool
}

// maskingLine is a member of masking/index.json.
type maskingLine struct {
	Digest string   `json:"digest"`
	Scopes []string `json:"scopes"`
	Uses   int64    `json:"uses"` // in the window
}

func (m *maskings) at(digest string) *maskingRules {
	r := m.byDigest[digest]
	if r == nil {
		if m.byDigest == nil {
			m.byDigest = map[string]*maskingRules{}
		}
		r = &maskingRules{scopes: map[string]bool{}}
		m.byDigest[digest] = r
	}
	return r
}

// take takes an entry. text, where it is not nil, is given the rules of each
// grant, once. What cannot be read is passed over: it is for the verifier to name.
func (m *maskings) take(e *store.Entry, window bool, text func(name string, b []byte) error) error {
	switch e.Type {
	case store.StepRequested:
		a, err := store.GrantedAccess(e)
		if err != nil || a == nil || a.Masking.IsZero() {
			return nil
		}
		b := a.Masking.Text()
		sum := sha256.Sum256(b)
		name := hex.EncodeToString(sum[:])
		r := m.at("sha256:" + name)
		if window {
			r.window, r.scopes[e.Action] = true, true
		}
		if r.file {
			return nil
		}
		r.file = true
		if text != nil {
			return text(name, b)
		}
	case store.CredentialUsed:
		if !window {
			return nil
		}
		d, err := store.DetailsAs[store.UsedDetails](e)
		if err == nil && d.Masking != "" {
			r := m.at(d.Masking)
			r.window, r.scopes[e.Action] = true, true
			r.uses++
		}
	}
	return nil
}

// files are the names, without directory and ".json", of the rules to be in the
// bundle, ascending.
func (m *maskings) files() (names []string) {
	for _, digest := range slices.Sorted(maps.Keys(m.byDigest)) {
		if r := m.byDigest[digest]; r.file && r.window {
			names = append(names, strings.TrimPrefix(digest, "sha256:"))
		}
	}
	return names
}

// index is masking/index.json.
func (m *maskings) index() []byte {
	x := struct {
		Rules []maskingLine `json:"rules"`
	}{[]maskingLine{}}
	for _, digest := range slices.Sorted(maps.Keys(m.byDigest)) {
		if r := m.byDigest[digest]; r.window {
			x.Rules = append(x.Rules, maskingLine{digest, slices.Sorted(maps.Keys(r.scopes)), r.uses})
		}
	}
	b, err := json.Marshal(&x, json.Deterministic(true))
	if err != nil {
		panic(err) // strings of an entry that was read always marshal
	}
	return append(b, '\n')
}
