package scopes

import (
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// safe is what a string may hold that stands in a path, a role, a target, or
// in a list that Vault splits at commas: nothing that separates, escapes or
// globs anywhere. The param's own pattern may narrow it and cannot widen it.
var safe = regexp.MustCompile(`\A[A-Za-z0-9._-]+\z`)

func isSafe(s string) bool { return s != "." && s != ".." && safe.MatchString(s) }

// check turns v, as decoded from JSON, into the text that fills the templates.
// strict asks for a safe text whatever the pattern says. The error says what
// is wrong without quoting the value: it is echoed to the caller and logged.
func (p *Param) check(v any, strict bool) (string, error) {
	switch p.Type {
	case IntParam:
		n, ok := integer(v)
		if !ok {
			return "", fmt.Errorf("%s must be a whole number", p.Name)
		}
		return p.checkText(strconv.FormatInt(n, 10), strict)
	case BoolParam:
		b, ok := v.(bool)
		if !ok {
			return "", fmt.Errorf("%s must be true or false", p.Name)
		}
		return strconv.FormatBool(b), nil
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("%s must be a string", p.Name)
	}
	return p.checkText(s, strict)
}

// checkText is check for a value that is text already: a default, or what a
// grant on record holds.
func (p *Param) checkText(s string, strict bool) (string, error) {
	switch p.Type {
	case IntParam:
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || strconv.FormatInt(n, 10) != s {
			return "", fmt.Errorf("%s must be a whole number", p.Name)
		}
		if n < p.Min || n > p.Max {
			return "", fmt.Errorf("%s must be from %d to %d", p.Name, p.Min, p.Max)
		}
	case BoolParam:
		if s != "true" && s != "false" {
			return "", fmt.Errorf("%s must be true or false", p.Name)
		}
	case EnumParam:
		if !slices.Contains(p.Values, s) {
			return "", fmt.Errorf("%s must be one of %s", p.Name, strings.Join(p.Values, ", "))
		}
	default:
		switch {
		case s == "":
			return "", fmt.Errorf("%s is empty", p.Name)
		case len(s) > p.MaxLength:
			return "", fmt.Errorf("%s has %d bytes, at most %d are allowed", p.Name, len(s), p.MaxLength)
		case !printable(s):
			return "", fmt.Errorf("%s holds a control character", p.Name)
		case strings.Contains(s, "{{") || strings.Contains(s, "}}"):
			return "", fmt.Errorf("%s must not hold {{ or }}", p.Name)
		case strict && !isSafe(s):
			return "", fmt.Errorf("%s may hold letters, digits, '.', '_' and '-' only, and not be . or ..", p.Name)
		case p.pattern != nil && !p.pattern.MatchString(s):
			return "", fmt.Errorf("%s does not match %s", p.Name, p.Pattern)
		}
	}
	return s, nil
}

// integer reads a whole number as JSON decoders give them. A float is taken
// where it is exact: below 2^53.
func integer(v any) (int64, bool) {
	switch n := v.(type) {
	case int:
		return int64(n), true
	case int64:
		return n, true
	case uint64:
		return int64(n), n <= math.MaxInt64
	case float64:
		return int64(n), n == math.Trunc(n) && math.Abs(n) < 1<<53
	case json.Number:
		i, err := strconv.ParseInt(n.String(), 10, 64)
		return i, err == nil
	}
	return 0, false
}

// values checks what a caller sent, and adds the defaults.
func (sc *Scope) values(params map[string]any) (map[string]string, error) {
	out := map[string]string{}
	for name, v := range params {
		i, ok := sc.byParam[name]
		if !ok {
			return nil, fmt.Errorf("%w: %s has no param %q", ErrParams, sc.Name, clip(name))
		}
		s, err := sc.Params[i].check(v, sc.strict[name])
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrParams, err)
		}
		out[name] = s
	}
	return out, sc.complete(out)
}

// texts checks values that are text already, as a grant on record holds them.
func (sc *Scope) texts(params map[string]string) (map[string]string, error) {
	out := map[string]string{}
	for name, v := range params {
		i, ok := sc.byParam[name]
		if !ok {
			return nil, fmt.Errorf("%w: %s has no param %q", ErrParams, sc.Name, clip(name))
		}
		s, err := sc.Params[i].checkText(v, sc.strict[name])
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrParams, err)
		}
		out[name] = s
	}
	return out, sc.complete(out)
}

// complete adds defaults and asks for what is required.
func (sc *Scope) complete(out map[string]string) error {
	for i := range sc.Params {
		p := &sc.Params[i]
		if _, ok := out[p.Name]; ok {
			continue
		}
		if p.Default == nil && !p.Required {
			continue // the policy alone looks at it; lint sees to that
		}
		if p.Default == nil {
			return fmt.Errorf("%w: %s is missing", ErrParams, p.Name)
		}
		out[p.Name] = *p.Default
	}
	return nil
}

// template is a text with places for params, cut into its parts.
type template []part

type part struct {
	literal string
	param   string // empty: the literal is meant
}

// parseTemplate cuts s at {{name}}. It is no template language: a name in
// double braces, without spaces, is all there is.
func parseTemplate(s string) (template, error) {
	var t template
	for s != "" {
		open := strings.Index(s, "{{")
		if shut := strings.Index(s, "}}"); shut >= 0 && (open < 0 || shut < open) {
			return nil, fmt.Errorf("}} without {{ before it")
		}
		if open < 0 {
			return append(t, part{literal: s}), nil
		}
		if open > 0 {
			t = append(t, part{literal: s[:open]})
		}
		name, rest, ok := strings.Cut(s[open+2:], "}}")
		if !ok {
			return nil, fmt.Errorf("{{ without }} after it")
		}
		if !paramName.MatchString(name) {
			return nil, fmt.Errorf("{{%s}} does not hold the name of a param", clip(name))
		}
		t = append(t, part{param: name})
		s = rest
	}
	return t, nil
}

// params lists the names in t.
func (t template) params() []string {
	var out []string
	for _, p := range t {
		if p.param != "" {
			out = append(out, p.param)
		}
	}
	return out
}

// fill puts values in. Values are never scanned again, so that a value cannot
// name another.
func (t template) fill(values map[string]string) string {
	var b strings.Builder
	for _, p := range t {
		if p.param != "" {
			b.WriteString(values[p.param])
		} else {
			b.WriteString(p.literal)
		}
	}
	return b.String()
}

// checkPath looks at a path once more when it is whole: two values side by
// side may together be "..".
func checkPath(path string) error {
	for segment := range strings.SplitSeq(path, "/") {
		if !isSafe(segment) {
			return fmt.Errorf("%w: the path that they give is not a plain one", ErrParams)
		}
	}
	return nil
}
