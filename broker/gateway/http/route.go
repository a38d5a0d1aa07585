package http

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/store"
)

const (
	maxPath  = 8 << 10  // bytes of a path as it is sent
	maxQuery = 16 << 10 // of a query
)

// canonical decodes a path once. A path that two servers could read differently
// is an error, whose text holds nothing of it: what is judged here must be what
// the target sees.
func canonical(raw string) (string, error) {
	if len(raw) > maxPath {
		return "", errors.New("the path is too long")
	}
	if !strings.HasPrefix(raw, "/") {
		return "", errors.New("the path does not begin with /")
	}
	for i := range len(raw) {
		// RFC 3986, section 3.3: all else comes as %XX.
		if c := raw[i]; c <= ' ' || c > '~' || strings.IndexByte("\"#<>?[\\]^`{|}", c) >= 0 {
			return "", errors.New("the path has a character that must be encoded")
		}
	}
	path, err := url.PathUnescape(raw)
	if err != nil {
		return "", errors.New("the path has a broken escape")
	}
	if strings.Count(path, "/") != strings.Count(raw, "/") {
		return "", errors.New("the path has an encoded slash")
	}
	if !utf8.ValidString(path) {
		return "", errors.New("the path is not UTF-8")
	}
	for i := range len(path) {
		switch c := path[i]; {
		case c < ' ' || c == 0x7f:
			return "", errors.New("the path has a control character")
		case c == '\\':
			return "", errors.New("the path has a backslash")
		case c == '%':
			return "", errors.New("the path is encoded twice")
		}
	}
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		// Servlet containers cut a segment at ; and Windows takes dots and spaces
		// off its end: what is left must be no dot segment either.
		name, _, cut := strings.Cut(s, ";")
		switch trimmed := strings.Trim(name, ". "); {
		case trimmed == "" && name != "":
			return "", errors.New("the path has a dot segment")
		case name == "" && (cut || i < len(segments)-1):
			return "", errors.New("the path has an empty segment")
		}
	}
	return path, nil
}

// keys returns the names in a query, in order, each once. A query that two
// servers could read differently is an error.
func keys(raw string) ([]string, error) {
	if len(raw) > maxQuery {
		return nil, errors.New("the query is too long")
	}
	for i := range len(raw) {
		if c := raw[i]; c <= ' ' || c > '~' || c == '#' || c == ';' {
			return nil, errors.New("the query has a character that must be encoded")
		}
	}
	var out []string
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		k, v, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(k)
		_, errValue := url.QueryUnescape(v)
		if err != nil || errValue != nil || !utf8.ValidString(name) || strings.IndexByte(name, 0) >= 0 {
			return nil, errors.New("the query has a broken escape")
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out, nil
}

// plainKey is a query's key as targets may take it: PHP reads a.b, a+b and
// a[b] as a_b and a, ASP.NET knows no case.
func plainKey(k string) string {
	k, _, _ = strings.Cut(strings.TrimLeft(k, " "), "[")
	return strings.NewReplacer(".", "_", " ", "_").Replace(strings.ToLower(k))
}

// match finds the pattern that lets method reach path. allowed says whether it
// does; where it does not, pattern is one that other methods may reach it by, or
// empty.
func match(routes []store.HTTPRoute, method, path string) (pattern string, allowed bool) {
	for _, r := range routes {
		for _, p := range r.Paths {
			if !covers(p, path) {
				continue
			}
			if slices.Contains(r.Methods, method) || method == http.MethodHead && slices.Contains(r.Methods, http.MethodGet) {
				return p, true
			}
			if pattern == "" {
				pattern = p
			}
		}
	}
	return pattern, false
}

// covers reports whether a route's path covers a path that is canonical. * is
// one segment, and as the last one any number from one on, of which the last
// may be empty: /orders/* covers /orders/ and not /orders.
func covers(pattern, path string) bool {
	if !strings.HasPrefix(pattern, "/") {
		return false
	}
	want, got := strings.Split(pattern[1:], "/"), strings.Split(path[1:], "/")
	for i, s := range want {
		switch {
		case i >= len(got):
			return false
		case s == "*" && i == len(want)-1:
			return true
		case s == "*" && got[i] != "", s == got[i]:
		default:
			return false
		}
	}
	return len(want) == len(got)
}
