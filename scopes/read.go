package scopes

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxFile is the size in bytes of the largest catalogue, policy or file of
// cases.
const maxFile = 256 << 10

// maxNesting is how deep a file may nest. The parser recurses, and a Go stack
// that overflows ends the process.
const maxNesting = 32

// maxProblems is how many problems of one file are told; a file that is not a
// catalogue at all would otherwise give one a line.
const maxProblems = 100

// Problem is one thing wrong with a file, and what to write instead.
type Problem struct {
	File    string
	Line    int // from 1; 0 where the whole file is meant
	Column  int // from 1
	Message string
	Fix     string // what to write instead; may be empty
}

// String is "file:line:column: message: what to write instead", on one line.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": " + p.Message)
	if p.Fix != "" {
		b.WriteString("; " + p.Fix)
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, b.String())
}

// Problems is every problem of a catalogue and its policy, as an error.
type Problems []Problem

// Error implements error, one problem a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, x := range p {
		lines[i] = x.String()
	}
	return strings.Join(lines, "\n")
}

// err is p as an error: nil where there is none.
func (p Problems) err() error {
	if len(p) == 0 {
		return nil
	}
	return p
}

// sorted orders p by place. The catalogue's problems come before the
// policy's, as they were found.
func (p Problems) sorted() Problems {
	slices.SortStableFunc(p, func(a, b Problem) int {
		if a.File != b.File {
			return 0
		}
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return p
}

// position is a place in a file, from 1.
type position struct{ line, column int }

// reader reads one YAML file and collects what is wrong with it. YAML is read
// from its syntax tree and not into structs, since each problem is to name its
// line, and since anchors, tags and merge keys, which let a line mean what it
// does not say, are refused.
type reader struct {
	file     string
	problems Problems
}

func (r *reader) at(p position, message, fix string) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, Problem{r.file, p.line, p.column, message, fix})
	}
}

func (r *reader) bad(n ast.Node, message, fix string) { r.at(where(n), message, fix) }

// where is the place of a node: of its first key where it is a mapping, since
// the parser names the colon after it.
func where(n ast.Node) position {
	switch v := n.(type) {
	case nil:
		return position{}
	case *ast.MappingNode:
		if len(v.Values) > 0 {
			return where(v.Values[0])
		}
	case *ast.MappingValueNode:
		if v.Key != nil {
			n = v.Key
		}
	}
	t := n.GetToken()
	if t == nil || t.Position == nil {
		return position{}
	}
	return position{t.Position.Line, t.Position.Column}
}

// document parses b and returns its one document, or nil.
func (r *reader) document(b []byte) (body ast.Node) {
	if len(b) > maxFile {
		r.at(position{}, fmt.Sprintf("the file has %d bytes, at most %d are read", len(b), maxFile), "split it")
		return nil
	}
	// A panic of the parser over a file that is being reloaded would take a
	// running broker down; it is a problem of the file instead.
	defer func() {
		if p := recover(); p != nil {
			r.at(position{}, "the file is not YAML that can be read", "")
			body = nil
		}
	}()
	tokens := lexer.Tokenize(string(b))
	before := len(r.problems)
	r.tokens(tokens)
	if len(r.problems) > before {
		return nil
	}
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var syntax *yaml.SyntaxError
		if errors.As(err, &syntax) && syntax.Token != nil && syntax.Token.Position != nil {
			p, fix := position{syntax.Token.Position.Line, syntax.Token.Position.Column}, ""
			if lines := strings.Split(string(b), "\n"); p.line <= len(lines) && strings.Contains(lines[p.line-1], "{{") {
				fix = "put a value that holds {{ in quotes"
			}
			r.at(p, "not YAML: "+syntax.Message, fix)
		} else {
			r.at(position{}, "not YAML: "+err.Error(), "")
		}
		return nil
	}
	switch {
	case len(f.Docs) == 0 || f.Docs[0].Body == nil:
		r.at(position{1, 1}, "the file is empty", "")
		return nil
	case len(f.Docs) > 1:
		r.bad(f.Docs[1].Body, "a second document in one file", "put all of it in one document, without ---")
		return nil
	}
	return f.Docs[0].Body
}

// tokens refuses what a catalogue has no use for before it is parsed.
func (r *reader) tokens(tokens token.Tokens) {
	flow := 0
	var columns []int // of the block collections that are open
	for _, t := range tokens {
		if t.Position == nil {
			continue
		}
		at := position{t.Position.Line, t.Position.Column}
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			r.at(at, "anchors, aliases and merge keys are not read", "write the value out, or quote it")
		case token.TagType:
			r.at(at, "tags are not read", "take the tag away, or quote the value")
		case token.DirectiveType:
			r.at(at, "directives are not read", "take the line out")
		case token.MappingKeyType:
			r.at(at, "keys with ? are not read", "write `key: value`")
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.MappingValueType:
			if flow > 0 {
				continue
			}
			column := t.Position.Column
			if t.Type == token.MappingValueType && t.Prev != nil && t.Prev.Position != nil && t.Prev.Position.Line == t.Position.Line {
				column = t.Prev.Position.Column
			}
			for len(columns) > 0 && columns[len(columns)-1] >= column {
				columns = columns[:len(columns)-1]
			}
			columns = append(columns, column)
		}
		if flow+len(columns) > maxNesting {
			r.at(at, fmt.Sprintf("nested deeper than %d", maxNesting), "write it flat")
			return
		}
	}
}

// fields is a mapping's values by key.
type fields struct {
	node   ast.Node // the mapping itself
	values map[string]ast.Node
}

func (f fields) get(key string) ast.Node { return f.values[key] }

// mapping reads n as a mapping that may have these keys and no other, each
// once.
func (r *reader) mapping(n ast.Node, what string, keys ...string) (fields, bool) {
	f := fields{node: n, values: map[string]ast.Node{}}
	var values []*ast.MappingValueNode
	switch v := n.(type) {
	case *ast.MappingNode:
		values = v.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{v}
	default:
		r.bad(n, what+" is "+kind(n)+", not a mapping", "write it with the keys "+strings.Join(keys, ", "))
		return f, false
	}
	seen := map[string]position{}
	for _, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			r.bad(v, "a key of "+what+" is not a plain word", "write one of "+strings.Join(keys, ", "))
			continue
		}
		if first, dup := seen[key.Value]; dup {
			r.bad(key, fmt.Sprintf("the key %q of %s stands twice", key.Value, what), fmt.Sprintf("keep one; the other is in line %d", first.line))
			continue
		}
		seen[key.Value] = where(key)
		if keys != nil && !slices.Contains(keys, key.Value) {
			r.bad(key, fmt.Sprintf("%s has no key %q", what, key.Value), "write one of "+strings.Join(keys, ", "))
			continue
		}
		if _, null := v.Value.(*ast.NullNode); null || v.Value == nil {
			r.bad(key, fmt.Sprintf("%q has no value", key.Value), "give it one or take the line out")
			continue
		}
		f.values[key.Value] = v.Value
	}
	return f, true
}

// sequence reads n as a list of at most max items, at least one.
func (r *reader) sequence(n ast.Node, what string, max int) []ast.Node {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		r.bad(n, what+" is "+kind(n)+", not a list", "write it as a list: [a, b], or one `- item` a line")
		return nil
	}
	if len(s.Values) == 0 {
		r.bad(n, what+" is an empty list", "name at least one, or take the key out")
	}
	if len(s.Values) > max {
		r.bad(n, fmt.Sprintf("%s has %d items", what, len(s.Values)), fmt.Sprintf("write at most %d", max))
		return nil
	}
	return s.Values
}

// text reads n as a string of at most max bytes without control characters.
func (r *reader) text(n ast.Node, what string, max int) (string, bool) {
	var s string
	switch v := n.(type) {
	case *ast.StringNode:
		s = v.Value
	case *ast.LiteralNode:
		s = v.Value.Value
	default:
		fix := "write a string"
		switch n.(type) {
		case *ast.IntegerNode, *ast.BoolNode, *ast.FloatNode, *ast.NullNode, *ast.InfinityNode, *ast.NanNode:
			fix = fmt.Sprintf("quote it: %q", n.GetToken().Value)
		case *ast.MappingNode, *ast.MappingValueNode:
			fix = "write a string, in quotes where it holds { or : "
		}
		r.bad(n, what+" is "+kind(n)+", not a string", strings.TrimSpace(fix))
		return "", false
	}
	switch {
	case s == "":
		r.bad(n, what+" is empty", "give it a value or take the key out")
		return "", false
	case len(s) > max:
		r.bad(n, fmt.Sprintf("%s has %d bytes", what, len(s)), fmt.Sprintf("write at most %d", max))
		return "", false
	case !printable(strings.TrimRight(s, "\n")) && what != "description":
		r.bad(n, what+" holds a control character", "take it out")
		return "", false
	}
	return s, true
}

// texts reads n as a list of distinct strings.
func (r *reader) texts(n ast.Node, what string, max int, check func(item ast.Node, s string)) []string {
	var out []string
	for _, item := range r.sequence(n, what, max) {
		s, ok := r.text(item, "an item of "+what, 512)
		if !ok {
			continue
		}
		if slices.Contains(out, s) {
			r.bad(item, fmt.Sprintf("%q stands twice in %s", s, what), "keep one")
			continue
		}
		check(item, s)
		out = append(out, s)
	}
	return out
}

// oneOf reads n as one of these words.
func (r *reader) oneOf(n ast.Node, what string, words ...string) string {
	s, ok := r.text(n, what, 512)
	if ok && !slices.Contains(words, s) {
		r.bad(n, fmt.Sprintf("%s is %q", what, s), "write one of "+strings.Join(words, ", "))
		return ""
	}
	return s
}

// integer reads n as a whole number between min and max.
func (r *reader) integer(n ast.Node, what string, min, max int64) (int64, bool) {
	var v int64
	node, ok := n.(*ast.IntegerNode)
	if ok {
		switch x := node.Value.(type) {
		case int64:
			v = x
		case uint64:
			if ok = x <= math.MaxInt64; ok {
				v = int64(x)
			}
		default:
			ok = false
		}
	}
	if !ok {
		r.bad(n, what+" is not a whole number", fmt.Sprintf("write one from %d to %d, without quotes", min, max))
		return 0, false
	}
	if v < min || v > max {
		r.bad(n, what+" is "+strconv.FormatInt(v, 10), fmt.Sprintf("write a number from %d to %d", min, max))
		return 0, false
	}
	return v, true
}

// boolean reads n as true or false.
func (r *reader) boolean(n ast.Node, what string) bool {
	b, ok := n.(*ast.BoolNode)
	if !ok {
		r.bad(n, what+" is "+kind(n)+", not a boolean", "write true or false, without quotes")
		return false
	}
	return b.Value
}

// duration reads n as a Go duration of whole seconds between min and max.
func (r *reader) duration(n ast.Node, what string, min, max time.Duration) time.Duration {
	example := "90s, 15m or 1h30m"
	if min >= 24*time.Hour {
		example = "720h for 30 days"
	}
	bounds := fmt.Sprintf("write a duration from %s to %s, like %s", short(min), short(max), example)
	var s string
	switch v := n.(type) {
	case *ast.StringNode:
		s = v.Value
	default:
		r.bad(n, what+" is "+kind(n)+", not a duration", bounds)
		return 0
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		r.bad(n, fmt.Sprintf("%s is %q, which is not a duration", what, clip(s)), bounds)
		return 0
	case d < min || d > max:
		r.bad(n, fmt.Sprintf("%s is %s", what, s), bounds)
		return 0
	case d%time.Second != 0:
		r.bad(n, fmt.Sprintf("%s is %s", what, s), "write whole seconds, as Vault counts them")
		return 0
	}
	return d
}

// kind names what a node is, for a person.
func kind(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.StringNode, *ast.LiteralNode:
		return "a string"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "a boolean"
	case *ast.NullNode, nil:
		return "empty"
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		return "an anchor or alias"
	case *ast.TagNode:
		return "a tagged value"
	}
	return "something else"
}

// printable reports whether s is text on one line that looks like what it is:
// no control characters, none that turn the direction of writing, no spaces
// but the plain one.
func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) < 0
}

// clip shortens what a message quotes.
func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}

// short writes a duration without the zero parts that Go adds: 15m, not
// 15m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
