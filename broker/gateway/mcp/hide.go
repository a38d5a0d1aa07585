package mcp

import (
	"bytes"
	"io"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

// hider hides, in what a server says, what the rules in force name and the
// secrets that were shown to it. It counts what it hid, and is for one message.
type hider struct {
	maskers []*masking.Masker
	// named is set where a rule goes by a value's name or place. Text that is no
	// JSON has neither, and is withheld then: no detector can stand in for it.
	named   bool
	secrets []string
	n       int64
}

// active reports whether anything is masked at all.
func (h *hider) active() bool { return len(h.maskers) > 0 }

// add takes in the rules of access and the secret behind it.
func (h *hider) add(access *store.Access, secret *issuer.Credential) error {
	m, err := masking.New(access.Masking)
	if err != nil {
		return err
	}
	if m != nil {
		h.maskers = append(h.maskers, m)
	}
	for _, r := range access.Masking.Rules {
		h.named = h.named || r.Detector == ""
	}
	h.secrets = append(h.secrets, inject.Values(access.Inject, secret)...)
	return nil
}

// fresh is h with nothing counted.
func (h *hider) fresh() *hider {
	return &hider{maskers: h.maskers, named: h.named, secrets: h.secrets}
}

// hidden is what stands for a value that is withheld whole.
var hidden = quoted(masking.Hidden)

// document masks a JSON document. What cannot be masked becomes hidden.
func (h *hider) document(v jsontext.Value) jsontext.Value {
	if v.Kind() != '{' && v.Kind() != '[' {
		return h.scalar(v)
	}
	for _, m := range h.maskers {
		out, n, err := m.JSON(v)
		if err != nil {
			h.n++
			return hidden
		}
		v, h.n = out, h.n+n
	}
	return h.walk(v, false)
}

// scalar masks a JSON value that has no name: under a rule by name it is not
// known to be something else.
func (h *hider) scalar(v jsontext.Value) jsontext.Value {
	switch v.Kind() {
	case '"':
		var s string
		if json.Unmarshal(v, &s) != nil {
			h.n++
			return hidden
		}
		return quoted(h.text(s))
	case '0':
		if s := h.text(string(v)); s != string(v) {
			return quoted(s)
		}
	}
	return v
}

// text masks a text that a server wrote: as JSON where it is a JSON object or
// array, else by detectors, or whole where rules go by name.
func (h *hider) text(s string) string {
	if s == "" {
		return s
	}
	if t := strings.TrimLeft(s, " \t\r\n"); len(h.maskers) > 0 && t != "" && (t[0] == '{' || t[0] == '[') {
		if v := jsontext.Value(s); v.IsValid() {
			before := h.n
			out := h.document(v)
			if h.n == before {
				return s
			}
			if out.Kind() == '"' {
				return masking.Hidden
			}
			return string(out)
		}
	}
	if h.named {
		h.n++
		return masking.Hidden
	}
	return h.words(s)
}

// words masks text by detectors alone.
func (h *hider) words(s string) string {
	for _, m := range h.maskers {
		out, n := m.Text([]byte(s))
		if n > 0 {
			s, h.n = string(out), h.n+n
		}
	}
	return h.unsecret(s)
}

// unsecret takes the secrets out of s.
func (h *hider) unsecret(s string) string {
	for _, secret := range h.secrets {
		if n := strings.Count(s, secret); n > 0 {
			s, h.n = strings.ReplaceAll(s, secret, masking.Hidden), h.n+int64(n)
		}
	}
	return s
}

// definition masks what describes the server: tools, their schemas, resources,
// prompts. Rules by name are for data, and would make a schema unreadable:
// here detectors look at the strings.
func (h *hider) definition(v jsontext.Value) jsontext.Value { return h.walk(v, true) }

// walk takes the secrets out of every string of v, names included, and with
// detect shows the values to the detectors.
func (h *hider) walk(v jsontext.Value, detect bool) jsontext.Value {
	if len(h.secrets) == 0 && !(detect && h.active()) {
		return v
	}
	// Two names may become one, by what is hidden in them.
	d := jsontext.NewDecoder(bytes.NewReader(v), jsontext.AllowDuplicateNames(true))
	var out bytes.Buffer
	e := jsontext.NewEncoder(&out, jsontext.AllowDuplicateNames(true))
	for {
		k := d.PeekKind()
		if k == '0' {
			n, err := d.ReadValue()
			if err != nil {
				h.n++
				return hidden
			}
			if s := h.unsecret(string(n)); s != string(n) {
				n = quoted(s)
			}
			if e.WriteValue(n) != nil {
				h.n++
				return hidden
			}
			continue
		}
		t, err := d.ReadToken()
		if err == io.EOF {
			return bytes.TrimRight(out.Bytes(), "\n")
		}
		if err != nil {
			h.n++
			return hidden
		}
		if k == '"' {
			s := t.String()
			kind, n := d.StackIndex(d.StackDepth())
			if name := kind == '{' && n%2 == 1; detect && !name {
				s = h.words(s)
			} else {
				s = h.unsecret(s)
			}
			t = jsontext.String(s)
		}
		if e.WriteToken(t) != nil {
			h.n++
			return hidden
		}
	}
}
