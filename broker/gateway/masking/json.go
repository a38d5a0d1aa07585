package masking

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// maxNested is how many times a document may stand within a string of another
// ("double encoding") and still be looked into. What is wrapped deeper is
// hidden as it is.
const maxNested = 4

// JSON hides, in a whole JSON document, the members that field rules name and
// the values that path rules lead to, of whatever kind, and what the detectors
// match in strings, names of members and numbers. null stays null. Strings that
// hold JSON themselves are looked into as if it stood there in their place.
// Members of one name are all hidden. Everything else stays as it is, byte for
// byte; b itself is returned where nothing is hidden, and never written to.
//
// masked counts what was hidden. The error is ErrNotJSON or ErrTooLarge, and
// then nothing of b may be handed on. Where no rule concerns JSON, b is not
// looked at.
func (m *Masker) JSON(b []byte) (out []byte, masked int64, err error) {
	if m == nil || len(m.fields) == 0 && len(m.paths) == 0 && len(m.detectors) == 0 {
		return b, 0, nil
	}
	if len(b) > MaxDocument {
		return nil, 0, ErrTooLarge
	}
	out, masked, err = m.document(b, m.start(nil), 0)
	if err != nil {
		return nil, 0, err
	}
	return out, masked, nil
}

// frame is an object or array that is being read.
type frame struct {
	object  bool
	hide    bool  // the member whose name was just read
	index   int64 // of the next element
	renamed int64 // names that were hidden
	states  int   // where those of its children begin
}

// document is JSON for a document whose root has the given states, nested in
// that many strings. Nested ones may be several values one after the other, and
// need not be free of lone surrogates. Beside an error, masked is how much a rule
// by name or place was to hide by then.
func (m *Masker) document(b []byte, root []state, nested int) (out []byte, masked int64, err error) {
	dec := jsontext.NewDecoder(bytes.NewBuffer(b), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(nested > 0))
	var (
		at     int // all of b before it is in out
		stack  []frame
		states = append(make([]state, 0, 4*len(root)+4), root...) // those of root, then of each frame's current child
		values int
		buf    []byte // for names with escapes
		ruled  int64  // members and values that a rule by name or place hides
	)
	replace := func(end, length int, with []byte) {
		if out == nil {
			out = make([]byte, 0, len(b)+len(with))
		}
		out = append(append(out, b[at:end-length]...), with...)
		at = end
		masked++
	}
	for {
		kind := dec.PeekKind()
		if kind == jsontext.KindInvalid {
			_, err := dec.ReadToken()
			if err == io.EOF && values > 0 && len(stack) == 0 {
				break
			}
			if len(stack) > 0 && stack[len(stack)-1].hide {
				ruled++ // what was to follow a hidden name
			}
			return nil, ruled, notJSON(dec)
		}
		var top *frame
		if len(stack) > 0 {
			top = &stack[len(stack)-1]
		}
		if kind == '}' || kind == ']' {
			if _, err := dec.ReadToken(); err != nil {
				return nil, ruled, notJSON(dec)
			}
			states = states[:top.states]
			stack = stack[:len(stack)-1]
			continue
		}
		if _, length := dec.StackIndex(dec.StackDepth()); top != nil && top.object && length%2 == 0 {
			raw, err := dec.ReadValue()
			if err != nil {
				return nil, ruled, notJSON(dec)
			}
			name, err := unquote(raw, &buf)
			if err != nil && nested == 0 {
				return nil, ruled, notJSON(dec)
			}
			top.hide = m.field(name)
			parent := m.parent(stack, states, len(root))
			states = m.step(states[:top.states], parent, name, true, 0)
			if left, same, n := m.detect(name); !same {
				// A second hidden name of an object is told apart, so that it does
				// not replace the first where the reader keeps one of each name. No
				// detector matches across #.
				if top.renamed++; top.renamed > 1 {
					left = strconv.AppendInt(append(left, '#'), top.renamed, 10)
				}
				replace(int(dec.InputOffset()), len(raw), quote(left))
				masked += n - 1
			}
			continue
		}

		// A value: of a member, an element, or on its own.
		hide := false
		here := root
		if top != nil {
			if !top.object {
				states = m.step(states[:top.states], m.parent(stack, states, len(root)), nil, false, top.index)
				top.index++
			}
			hide, here = top.hide, states[top.states:]
		} else {
			if values++; values > 1 && nested == 0 {
				return nil, ruled, notJSON(dec)
			}
		}
		if hide || m.ends(here) {
			raw, err := dec.ReadValue()
			if err != nil {
				return nil, ruled + 1, notJSON(dec)
			}
			if kind != 'n' && !isHidden(raw) {
				ruled++
				replace(int(dec.InputOffset()), len(raw), hidden)
			}
			continue
		}
		switch kind {
		case '{', '[':
			if _, err := dec.ReadToken(); err != nil {
				return nil, ruled, notJSON(dec)
			}
			if len(stack) == MaxDepth {
				return nil, ruled, ErrTooLarge
			}
			stack = append(stack, frame{object: kind == '{', states: len(states)})
		default:
			raw, err := dec.ReadValue()
			if err != nil {
				return nil, ruled, notJSON(dec)
			}
			switch kind {
			case '"':
				text, err := unquote(raw, new([]byte))
				if err != nil && nested == 0 {
					return nil, ruled, notJSON(dec)
				}
				if left, same, n := m.value(text, here, nested); !same {
					replace(int(dec.InputOffset()), len(raw), quote(left))
					masked += n - 1
				}
			case '0':
				if m.Number(raw) {
					replace(int(dec.InputOffset()), len(raw), hidden)
				}
			}
		}
	}
	if out == nil {
		return b, 0, nil
	}
	return append(out, b[at:]...), masked, nil
}

// parent returns the states of the frame on top of the stack itself.
func (m *Masker) parent(stack []frame, states []state, root int) []state {
	if len(stack) == 1 {
		return states[:root]
	}
	return states[stack[len(stack)-2].states:stack[len(stack)-1].states]
}

// value hides what is in a string, given the states of its place.
func (m *Masker) value(text []byte, here []state, nested int) (out []byte, same bool, masked int64) {
	out, same = text, true
	for range rounds {
		changed := false
		if holdsJSON(out) {
			if nested == maxNested {
				if jsontext.Value(bytes.TrimPrefix(out, bom)).IsValid(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) {
					return []byte(Hidden), false, masked + 1
				}
			} else if left, n, err := m.document(bytes.TrimPrefix(out, bom), here, nested+1); errors.Is(err, ErrTooLarge) || err != nil && n > 0 {
				// Too large, or cut short or gone on with as no JSON is: a reader may
				// still take from it what a rule hides.
				return []byte(Hidden), false, masked + 1
			} else if n > 0 {
				out, same, changed = left, false, true
				masked += n
			}
		}
		if left, unchanged, n := m.detect(out); !unchanged {
			out, same, changed = left, false, true
			masked += n
		}
		if !changed {
			return out, same, masked
		}
	}
	return []byte(Hidden), false, masked + 1
}

// holdsJSON reports whether a string looks like JSON with something in it: a
// number, true or "plain words" do not.
func holdsJSON(text []byte) bool {
	t := bytes.TrimLeft(bytes.TrimPrefix(text, bom), " \t\r\n")
	return len(t) > 1 && (t[0] == '{' || t[0] == '[' || t[0] == '"')
}

// bom may stand before a document, and readers may ignore it (RFC 8259, section
// 8.1).
var bom = []byte("\xEF\xBB\xBF")

func (m *Masker) field(name []byte) bool {
	if len(m.fields) == 0 {
		return false
	}
	var buf [64]byte
	return m.fields[string(appendFold(buf[:0], name))]
}

// unquote returns the text of a JSON string: a part of raw where it has no
// escapes, else *buf, which it writes anew. The text is usable in spite of an
// error, which tells of a lone surrogate or of what is not UTF-8.
func unquote(raw []byte, buf *[]byte) (text []byte, err error) {
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw[1 : len(raw)-1], nil
	}
	*buf, err = jsontext.AppendUnquote((*buf)[:0], raw)
	return *buf, err
}

var hidden = []byte(`"` + Hidden + `"`)

func quote(text []byte) []byte {
	// Replaces what is not UTF-8, and says so: only a string with lone
	// surrogates, within another string, can hold any.
	out, _ := jsontext.AppendQuote(nil, text)
	return out
}

func isHidden(raw []byte) bool {
	if raw[0] != '"' {
		return false
	}
	text, err := unquote(raw, new([]byte))
	return err == nil && string(text) == Hidden
}

// plain writes a number as its readers may: its whole part without point and
// exponent, so that 4.111111111111111e15 is seen for what it is, and what is left
// of it in binary64, which is how most read JSON (RFC 8259, section 6). Numbers of
// fewer than 8 digits before the point, or more than 40, are none that a detector
// looks for.
func plain(raw []byte) (out [][]byte) {
	if len(raw) < 9 && !bytes.ContainsAny(raw, "eE") || !bytes.ContainsAny(raw, ".eE") {
		return nil
	}
	number, exponent, _ := strings.Cut(strings.ToLower(strings.TrimPrefix(string(raw), "-")), "e")
	exp := 0
	if exponent != "" {
		var err error
		if exp, err = strconv.Atoi(exponent); err != nil || exp < -MaxDocument || exp > MaxDocument {
			return nil // no document has digits enough to make up for it
		}
	}
	whole, fraction, _ := strings.Cut(number, ".")
	all := strings.TrimLeft(whole+fraction, "0")
	// How many of all stand before the point; zeros follow them where it is more.
	if n := len(all) - len(fraction) + exp; n >= 8 && n <= 40 {
		out = append(out, []byte((all + strings.Repeat("0", max(0, n-len(all))))[:n]))
		if f, err := strconv.ParseFloat(string(raw), 64); err == nil {
			out = append(out, strconv.AppendFloat(nil, math.Abs(f), 'f', 0, 64))
		}
	}
	return out
}

func notJSON(dec *jsontext.Decoder) error {
	return fmt.Errorf("%w: at byte %d", ErrNotJSON, dec.InputOffset())
}
