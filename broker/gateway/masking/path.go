package masking

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// path is a JSONPath query (RFC 9535), in the part of it that can be followed
// while a document streams by: child and descendant segments with names,
// indices counted from the start, wildcards, and several of these in one pair
// of brackets. Slices, filters, functions and indices from the end are not
// understood. Names are compared exactly, as section 2.3.1.2 has it.
type path []segment

type segment struct {
	descendant bool // ..: of the value itself and of all within it
	all        bool // *
	names      []string
	indices    []int64
}

const maxSegments = 32

func (s *segment) name(n []byte) bool {
	if s.all {
		return true
	}
	for _, want := range s.names {
		if want == string(n) {
			return true
		}
	}
	return false
}

func (s *segment) index(i int64) bool {
	if s.all {
		return true
	}
	for _, want := range s.indices {
		if want == i {
			return true
		}
	}
	return false
}

func parsePath(s string) (path, error) {
	rest, ok := strings.CutPrefix(s, "$")
	if !ok {
		return nil, errors.New("it must begin with $")
	}
	var p path
	for rest != "" {
		if len(p) == maxSegments {
			return nil, fmt.Errorf("more than %d segments", maxSegments)
		}
		var seg segment
		var err error
		switch {
		case strings.HasPrefix(rest, ".."):
			seg.descendant, rest = true, rest[2:]
			if strings.HasPrefix(rest, "[") {
				rest, err = seg.bracket(rest[1:])
			} else {
				rest, err = seg.shorthand(rest)
			}
		case rest[0] == '.':
			rest, err = seg.shorthand(rest[1:])
		case rest[0] == '[':
			rest, err = seg.bracket(rest[1:])
		default:
			err = fmt.Errorf("a segment begins with . or [, not %q", rest[0])
		}
		if err != nil {
			return nil, err
		}
		p = append(p, seg)
	}
	return p, nil
}

// shorthand reads what follows a dot (RFC 9535, section 2.5.1.1).
func (s *segment) shorthand(in string) (rest string, err error) {
	if r, ok := strings.CutPrefix(in, "*"); ok {
		s.all = true
		return r, nil
	}
	n := 0
	for n < len(in) {
		c := in[n]
		if c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c >= utf8.RuneSelf || n > 0 && isDigit(c) {
			n++
			continue
		}
		break
	}
	if n == 0 {
		return "", errors.New("a name or * must follow a dot; other names are written ['…']")
	}
	s.names = append(s.names, in[:n])
	return in[n:], nil
}

// bracket reads what follows [, up to and with ].
func (s *segment) bracket(in string) (rest string, err error) {
	for {
		in = strings.TrimLeft(in, " \t\r\n")
		switch {
		case in == "":
			return "", errors.New("[ without ]")
		case in[0] == '*':
			s.all, in = true, in[1:]
		case in[0] == '\'' || in[0] == '"':
			var name string
			if name, in, err = quoted(in); err != nil {
				return "", err
			}
			s.names = append(s.names, name)
		case isDigit(in[0]):
			n := 1
			for n < len(in) && isDigit(in[n]) {
				n++
			}
			i, err := strconv.ParseInt(in[:n], 10, 64)
			if err != nil || i >= 1<<53 || n > 1 && in[0] == '0' {
				return "", fmt.Errorf("[%s] is no index", in[:n])
			}
			s.indices, in = append(s.indices, i), in[n:]
		default:
			return "", errors.New("within [ ] there may be 'names', indices counted from the start, and *; no slices, filters or functions")
		}
		in = strings.TrimLeft(in, " \t\r\n")
		switch {
		case strings.HasPrefix(in, ","):
			in = in[1:]
		case strings.HasPrefix(in, "]"):
			return in[1:], nil
		default:
			return "", errors.New("a comma or ] must follow; slices are not understood")
		}
	}
}

// quoted reads a name in quotes (RFC 9535, section 2.3.1.1): JSON's escapes,
// and the quote it stands in.
func quoted(in string) (name, rest string, err error) {
	quote := in[0]
	var js bytes.Buffer // the same as a JSON string
	js.WriteByte('"')
	for i := 1; i < len(in); i++ {
		switch c := in[i]; {
		case c == quote:
			js.WriteByte('"')
			out, err := jsontext.AppendUnquote(nil, js.Bytes())
			if err != nil {
				return "", "", fmt.Errorf("the name %s is not well escaped", in[:i+1])
			}
			return string(out), in[i+1:], nil
		case c == '\\' && i+1 < len(in):
			i++
			switch {
			case in[i] == quote && quote == '\'':
				js.WriteByte('\'')
			case in[i] == '"' && quote == '\'':
				return "", "", errors.New(`\" within '…': write "`)
			default:
				js.WriteByte('\\')
				js.WriteByte(in[i])
			}
		case c == '"':
			js.WriteString(`\"`)
		default:
			js.WriteByte(c)
		}
	}
	return "", "", errors.New("a quote is not closed")
}

// state is how far into a path the way to a value goes.
type state struct{ path, at uint16 }

// start appends the states of a document's root.
func (m *Masker) start(dst []state) []state {
	for i := range m.paths {
		dst = append(dst, state{path: uint16(i)})
	}
	return dst
}

// step appends the states of a child of a value with the given ones, by its
// name or, where isName is false, its index.
func (m *Masker) step(dst, from []state, name []byte, isName bool, index int64) []state {
	base := len(dst)
	for _, s := range from {
		p := m.paths[s.path]
		if int(s.at) == len(p) {
			continue
		}
		seg := &p[s.at]
		if isName && seg.name(name) || !isName && seg.index(index) {
			dst = addState(dst, base, state{s.path, s.at + 1})
		}
		if seg.descendant {
			dst = addState(dst, base, s)
		}
	}
	return dst
}

// addState appends s, unless it is there from base on.
func addState(dst []state, base int, s state) []state {
	if slices.Contains(dst[base:], s) {
		return dst
	}
	return append(dst, s)
}

// ends reports whether a path ends at a value with these states.
func (m *Masker) ends(at []state) bool {
	for _, s := range at {
		if int(s.at) == len(m.paths[s.path]) {
			return true
		}
	}
	return false
}
