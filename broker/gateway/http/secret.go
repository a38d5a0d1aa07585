package http

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"html"
	"net/url"
	"slices"
	"strings"

	"github.com/countersign-dev/countersign/broker/gateway/inject"
)

// secrets are the strings that show the secret to who reads them. A nil
// *secrets is none.
type secrets struct {
	byFirst [256][]string   // the longest first
	pairs   [1 << 10]uint64 // a bit for each two bytes that begin one
	longest int
}

func (s *secrets) begins(a, b byte) bool {
	at := uint16(a)<<8 | uint16(b)
	return s.pairs[at>>6]&(1<<(at&63)) != 0
}

// newSecrets takes each value as it is, and as targets write what they were
// sent: in URLs, JSON and HTML, in hexadecimal, and in base64 (RFC 4648) at each
// of the three places that a byte can have in a group.
func newSecrets(values []string) *secrets {
	s := &secrets{}
	add := func(v string) {
		if len(v) >= inject.MinValue && !slices.Contains(s.byFirst[v[0]], v) {
			s.byFirst[v[0]] = append(s.byFirst[v[0]], v)
			at := uint16(v[0])<<8 | uint16(v[1])
			s.pairs[at>>6] |= 1 << (at & 63)
			s.longest = max(s.longest, len(v))
		}
	}
	for _, v := range values {
		if len(v) < inject.MinValue {
			continue
		}
		quoted, _ := json.Marshal(v) // a string always marshals
		escaped := strings.Trim(string(quoted), `"`)
		for _, w := range []string{v, url.QueryEscape(v), url.PathEscape(v), escaped, strings.ReplaceAll(v, "/", `\/`), html.EscapeString(v),
			hex.EncodeToString([]byte(v)), strings.ToUpper(hex.EncodeToString([]byte(v)))} {
			add(w)
			add(lowerEscapes(w))
		}
		for before := range 3 {
			b := append(make([]byte, before), v...)
			from, to := (before*8+5)/6, len(b)*8/6 // characters that are v's alone
			for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				add(enc.EncodeToString(b)[from:to])
			}
		}
	}
	if s.longest == 0 {
		return nil
	}
	for _, list := range s.byFirst {
		slices.SortStableFunc(list, func(a, b string) int { return len(b) - len(a) })
	}
	return s
}

// lowerEscapes writes %2F as %2f.
func lowerEscapes(s string) string {
	b := []byte(s)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], strings.ToLower(s[i+1:i+3]))
		}
	}
	return string(b)
}

// redactor puts as many asterisks for each secret in a stream as it has bytes,
// so that lengths that were told stay true. What could be the beginning of one
// is held back until it is known.
type redactor struct {
	s    *secrets
	buf  []byte
	held []byte
	due  int // of held, how many bytes are of a secret already
	n    int64
}

// add takes p and returns what is known by now, which is valid until the next
// add.
func (r *redactor) add(p []byte) []byte {
	if r.s == nil {
		return p
	}
	r.buf = append(append(r.buf[:0], r.held...), p...)
	return r.scan(r.buf, false)
}

// end returns what was held back.
func (r *redactor) end() []byte { return r.scan(slices.Clone(r.held), true) }

// scan hides in place: a byte is looked at as the first of a secret before it is
// overwritten as part of another.
func (r *redactor) scan(data []byte, last bool) []byte {
	until, i := r.due, 0
scan:
	for ; i < len(data); i++ {
		if i+1 == len(data) || r.s.begins(data[i], data[i+1]) {
			rest := data[i:]
			for _, v := range r.s.byFirst[data[i]] {
				switch {
				case len(rest) < len(v):
					if !last && strings.HasPrefix(v, string(rest)) {
						break scan
					}
				case string(rest[:len(v)]) == v && i+len(v) > until:
					until = i + len(v)
					r.n++
				}
			}
		}
		if i < until {
			data[i] = '*'
		}
	}
	r.held, r.due = append(r.held[:0], data[i:]...), max(0, until-i)
	return data[:i]
}

// text hides the secrets in a text that is whole.
func (s *secrets) text(t string) (string, int64) {
	if s == nil {
		return t, 0
	}
	r := redactor{s: s}
	out := string(r.add([]byte(t)))
	return out + string(r.end()), r.n
}
