// Package masking hides values in what a target answers. A Masker is made of
// the rules of a grant and does the same to the same bytes wherever it runs:
// the protocol gateways decide what to show it.
//
// What is hidden becomes the string "[masked]". Masking what was masked changes
// nothing.
package masking

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/store"
)

// Hidden stands where a value was hidden.
const Hidden = "[masked]"

// Limits of what is masked at all. Beyond them JSON returns an error, and what
// came back must be withheld.
const (
	MaxDocument = 16 << 20 // bytes of a JSON document
	MaxDepth    = 512      // objects and arrays within each other
	MaxRules    = 256      // rules of one Masker
)

// Errors of JSON. Their texts hold no part of the document.
var (
	ErrNotJSON  = errors.New("not a JSON document")               // or not UTF-8
	ErrTooLarge = errors.New("a JSON document too large to mask") // MaxDocument or MaxDepth
)

// A Masker hides what its rules match. It is safe for concurrent use. A nil
// *Masker hides nothing.
type Masker struct {
	fields    map[string]bool // folded names
	paths     []path
	columns   []column
	types     map[string]bool // canonical names
	detectors []detector
}

// column is a column rule, folded.
type column struct{ schema, table, name string }

// New compiles the rules of m. It returns a nil Masker where m hides nothing,
// and an error that names the rule where one cannot be understood.
func New(m store.Masking) (*Masker, error) {
	if m.IsZero() {
		return nil, nil
	}
	if len(m.Rules) > MaxRules {
		return nil, fmt.Errorf("%d masking rules: at most %d", len(m.Rules), MaxRules)
	}
	out := &Masker{fields: map[string]bool{}, types: map[string]bool{}}
	for i, r := range m.Rules {
		if err := out.add(r); err != nil {
			return nil, fmt.Errorf("masking rule %d: %w", i+1, err)
		}
	}
	return out, nil
}

func (m *Masker) add(r store.MaskRule) error {
	set := 0
	for _, s := range []string{r.Field, r.Path, r.Column, r.Type, r.Detector} {
		if s != "" {
			set++
		}
		if !utf8.ValidString(s) {
			return errors.New("not UTF-8")
		}
	}
	if set != 1 {
		return errors.New("exactly one of field, path, column, type and detector must be set")
	}
	switch {
	case r.Field != "":
		m.fields[string(appendFold(nil, []byte(r.Field)))] = true
	case r.Path != "":
		p, err := parsePath(r.Path)
		if err != nil {
			return fmt.Errorf("path %q: %w", r.Path, err)
		}
		m.paths = append(m.paths, p)
	case r.Column != "":
		parts := strings.Split(string(appendFold(nil, []byte(r.Column))), ".")
		if len(parts) == 2 {
			parts = append([]string{"PUBLIC"}, parts...)
		}
		if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
			return fmt.Errorf("column %q: write table.column or schema.table.column", r.Column)
		}
		m.columns = append(m.columns, column{parts[0], parts[1], parts[2]})
	case r.Type != "":
		m.types[canonicalType(r.Type)] = true
	case r.Detector != "":
		d, ok := detectors[r.Detector]
		if !ok {
			return fmt.Errorf("no detector %q: there are email, card, iban, phone, secret and entropy", r.Detector)
		}
		m.detectors = append(m.detectors, d)
	}
	return nil
}

// Detects reports whether there are detectors, so that texts have to be shown
// to m too.
func (m *Masker) Detects() bool { return m != nil && len(m.detectors) > 0 }

// Column reports whether a column is hidden by its name or its type. An empty
// schema or table is one that is not known, and matches any. A field rule hides
// a column of that name in every table; names are compared without regard to
// case. typ is a type's name as PostgreSQL has it or SQL spells it, with or
// without length, array brackets and schema pg_catalog; an array is hidden
// where its elements are.
func (m *Masker) Column(schema, table, column, typ string) bool {
	if m == nil {
		return false
	}
	if len(m.types) > 0 && typ != "" && m.types[canonicalType(typ)] {
		return true
	}
	var buf [64]byte
	name := appendFold(buf[:0], []byte(column))
	if m.fields[string(name)] {
		return true
	}
	for _, c := range m.columns {
		if c.name == string(name) && (table == "" || foldEqual(c.table, table)) && (schema == "" || foldEqual(c.schema, schema)) {
			return true
		}
	}
	return false
}

// Text hides what the detectors match in b, and returns how many matches that
// were. It returns b itself where nothing is hidden, and never writes to it. It
// takes time in proportion to b.
func (m *Masker) Text(b []byte) (out []byte, masked int64) {
	if !m.Detects() {
		return b, 0
	}
	out, _, masked = m.detect(b)
	return out, masked
}

// rounds bounds how often a text is looked at again after something in it was
// hidden. What still matches then is hidden whole; no text is known that does.
const rounds = 4

// detect returns what is left of b, and whether that is b.
func (m *Masker) detect(b []byte) (out []byte, same bool, masked int64) {
	out, same = b, true
	for range rounds {
		spans := m.find(out)
		if len(spans) == 0 {
			return out, same, masked
		}
		spans = spans.merge()
		masked += int64(len(spans))
		out, same = spans.replace(out), false
	}
	return []byte(Hidden), false, masked + 1
}

// matches reports whether any detector finds something in b.
func (m *Masker) matches(b []byte) bool {
	return len(m.find(b)) > 0
}

// Number reports whether the detectors find anything in a number, however it is
// written (RFC 8259, section 6).
func (m *Masker) Number(b []byte) bool {
	return m.Detects() && (m.matches(b) || slices.ContainsFunc(plain(b), m.matches))
}

// find returns what the detectors match in b, as it stands and without disguise.
func (m *Masker) find(b []byte) (found spans) {
	for _, d := range m.detectors {
		found = d(b, found)
	}
	plain, at := undisguised(b)
	if plain == nil {
		return found
	}
	known := len(found)
	for _, d := range m.detectors {
		found = d(plain, found)
	}
	for i := range found[known:] {
		s := &found[known+i]
		s.from, s.to = at[s.from], at[s.to]
	}
	return found
}

// appendFold appends name to dst with every character as the least of those
// that it equals without regard to case (Unicode simple folding), so that two
// names are equal without regard to case where these are the same.
func appendFold(dst, name []byte) []byte {
	for i := 0; i < len(name); {
		if c := name[i]; c < utf8.RuneSelf {
			if 'a' <= c && c <= 'z' {
				c -= 'a' - 'A'
			}
			dst = append(dst, c)
			i++
			continue
		}
		r, n := utf8.DecodeRune(name[i:])
		for next := unicode.SimpleFold(r); ; next = unicode.SimpleFold(r) {
			if next <= r {
				r = next
				break
			}
			r = next
		}
		dst = utf8.AppendRune(dst, r)
		i += n
	}
	return dst
}

func foldEqual(folded, name string) bool {
	var buf [64]byte
	return string(appendFold(buf[:0], []byte(name))) == folded
}

// aliases are the SQL spellings of PostgreSQL's own types (its documentation,
// table 8.1), by what canonicalType makes of them.
var aliases = map[string]string{
	"bigint": "int8", "int": "int4", "integer": "int4", "smallint": "int2",
	"real": "float4", "double precision": "float8", "float": "float8", "decimal": "numeric",
	"boolean": "bool", "bit varying": "varbit",
	"character varying": "varchar", "char varying": "varchar", "national character varying": "varchar",
	"character": "bpchar", "char": "bpchar", "national character": "bpchar", "nchar": "bpchar",
	"timestamp without time zone": "timestamp", "timestamp with time zone": "timestamptz",
	"time without time zone": "time", "time with time zone": "timetz",
}

// canonicalType is the one name that m's rules and PostgreSQL's catalogue have
// in common for a type: lower case, without length, array marks and pg_catalog.
func canonicalType(s string) string {
	s = strings.ToLower(strings.Join(strings.Fields(s), " "))
	for {
		open := strings.IndexByte(s, '(')
		if open < 0 {
			break
		}
		shut := strings.IndexByte(s[open:], ')')
		if shut < 0 {
			break
		}
		s = strings.TrimRight(s[:open], " ") + s[open+shut+1:]
	}
	for {
		t := strings.TrimSpace(strings.TrimSuffix(s, "]"))
		if t == s {
			break
		}
		s = strings.TrimSpace(strings.TrimRight(t, "[0123456789"))
	}
	s = strings.TrimSuffix(s, " array")
	s = strings.TrimPrefix(s, "pg_catalog.")
	s = strings.TrimPrefix(s, "_") // PostgreSQL's own name of an array type
	if s == `"char"` {
		return s
	}
	s = strings.ReplaceAll(s, `"`, "")
	if a, ok := aliases[s]; ok {
		return a
	}
	return s
}

// span is the part of a text from its first byte to one past its last.
type span struct{ from, to int }

type spans []span

// merge orders ss, and joins those that overlap or touch.
func (ss spans) merge() spans {
	slices.SortFunc(ss, func(a, b span) int { return a.from - b.from })
	out := ss[:1]
	for _, s := range ss[1:] {
		if last := &out[len(out)-1]; s.from <= last.to {
			last.to = max(last.to, s.to)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// replace returns b with Hidden in the place of each of ss, which are ordered
// and do not overlap.
func (ss spans) replace(b []byte) []byte {
	out := bytes.NewBuffer(make([]byte, 0, len(b)+len(ss)*len(Hidden)))
	at := 0
	for _, s := range ss {
		out.Write(b[at:s.from])
		out.WriteString(Hidden)
		at = s.to
	}
	out.Write(b[at:])
	return out.Bytes()
}
