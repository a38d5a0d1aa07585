package store

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/base64"
	"strings"
)

// Opening is the text behind a commitment. With salt and text both erased,
// the commitment in the leaf says nothing about either.
type Opening struct {
	Salt []byte `json:"salt"` // 32 random bytes
	Text string `json:"text"`
}

// Commit binds field to text: HMAC-SHA256 keyed with a fresh random salt over
// the field's name, a zero byte and the text, in base64. It returns the
// commitment and its opening.
func Commit(field, text string) (string, Opening) {
	o := Opening{Salt: make([]byte, 32), Text: text}
	rand.Read(o.Salt) // never fails since Go 1.24
	return o.commitment(field), o
}

func (o Opening) commitment(field string) string {
	m := hmac.New(sha256.New, o.Salt)
	m.Write([]byte(field))
	m.Write([]byte{0})
	m.Write([]byte(o.Text))
	return base64.StdEncoding.EncodeToString(m.Sum(nil))
}

// Opens reports whether o is the opening of commitment for field. A salt that
// is not 32 bytes long opens nothing.
func (o Opening) Opens(field, commitment string) bool {
	return len(o.Salt) == 32 && subtle.ConstantTimeCompare([]byte(o.commitment(field)), []byte(commitment)) == 1
}

// Seal adds text to s as an erasable field. Empty texts are left out.
func (s *Submission) Seal(field, text string) {
	if text == "" {
		return
	}
	c, o := Commit(field, text)
	if s.Sealed == nil {
		s.Sealed, s.Openings = map[string]string{}, map[string]Opening{}
	}
	s.Sealed[field], s.Openings[field] = c, o
}

// The names under which texts are sealed.
const (
	SealedReason  = "reason"  // why the step asks, or the person decided
	SealedSubject = "subject" // the subject as the orchestrator named it
	SealedSummary = "summary" // what the orchestrator says came of the step

	SealedStatement = "statement" // what a use asked of the target, in full: SQL and its parameters, an HTTP request's head, a tool's arguments
	SealedSample    = "sample"    // of use.finished: excerpts of what came back, masked, where the scope wants them, see JoinSamples

	SealedCatalogue = "catalogue" // of policy.loaded: the catalogue's text, whose digest the details name
	SealedPolicy    = "policy"    // of policy.loaded: the Rego policy's, likewise
)

// PrivacyKey keys every value in a leaf that is derived from something
// erasable: pseudonyms and the digests of request bodies. Brokers and recorder
// share it; it is never in the ledger, so that a leaf alone cannot be searched
// for a known name or reason. At least 32 bytes.
type PrivacyKey []byte

// Pseudonym stands for a person or subject in a leaf: stable under one key,
// and not to be inverted without it.
func (k PrivacyKey) Pseudonym(id string) string {
	if id == "" {
		return ""
	}
	sum := k.mac("pseudonym", id)
	return "p-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:16]))
}

// Digest returns "hmac-sha256:<base64url>" over parts under purpose. Parts
// are length-prefixed, so that no two lists of parts collide.
func (k PrivacyKey) Digest(purpose string, parts ...string) string {
	return "hmac-sha256:" + base64.RawURLEncoding.EncodeToString(k.mac(purpose, parts...))
}

func (k PrivacyKey) mac(purpose string, parts ...string) []byte {
	m := hmac.New(sha256.New, k)
	for _, p := range append([]string{"countersign/" + purpose + "/v1"}, parts...) {
		var n [8]byte
		for i, l := 0, uint64(len(p)); i < 8; i, l = i+1, l>>8 {
			n[i] = byte(l)
		}
		m.Write(n[:])
		m.Write([]byte(p))
	}
	return m.Sum(nil)
}
