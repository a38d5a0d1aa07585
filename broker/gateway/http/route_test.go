package http

import (
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestAPathThatTwoServersCouldReadDifferentlyIsNone(t *testing.T) {
	for _, raw := range []string{"", "x", "//", "/a//b", "//evil.example/x", "/./a", "/a/.", "/a/..", "/../a", "/a/../b", "/a/%2e%2e/b", "/a/%2E./b", "/a/.%2e/b", "/%2e/a",
		"/a%2fb", "/a%2Fb", "/a%5cb", `/a\b`, "/a/..%5cb", "/a%252fb", "/a%25", "/a%252e%252e/b", "/a%00", "/a%0d%0aX: y", "/a%7f", "/a%", "/a%4", "/a%zz", "/a%c0%ae%c0%ae/b", "/a%ff",
		"/a/..;/b", "/a/..;x=y/b", "/a/.;/b", "/a/;/b", "/a/;x", "/a/...", "/a/..%20/b", "/a/%20/b", "/a/. /b", "/a b", "/a#b", "/a?b", "/a|b", "/a\"b", "/a<b", "/a^b", "/a`b", "/a{b}", "/é", "/a\tb", "/a\nb",
		"/" + strings.Repeat("a", maxPath), "*"} {
		if p, err := canonical(raw); err == nil {
			t.Errorf("%q is %q", raw, p)
		}
	}
	for raw, want := range map[string]string{"/": "/", "/a": "/a", "/a/": "/a/", "/a%20b": "/a b", "/%c3%a9": "/é", "/a;v=1/b": "/a;v=1/b", "/a.b/..c/d..": "/a.b/..c/d..", "/%41": "/A", "/a%3Fb": "/a?b", "/a+b@c:d": "/a+b@c:d"} {
		if p, err := canonical(raw); err != nil || p != want {
			t.Errorf("%q is %q, %v", raw, p, err)
		}
	}
}

func TestAStarIsOneSegmentAndAsTheLastAnyNumber(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/*", "/", true}, {"/*", "/a/b", true}, {"/a", "/a", true}, {"/a", "/a/", false}, {"/a/", "/a/", true}, {"/a/*", "/a", false}, {"/a/*", "/a/", true}, {"/a/*", "/a/b", true}, {"/a/*", "/a/b/c", true},
		{"/a/*/c", "/a/b/c", true}, {"/a/*/c", "/a//c", false}, {"/a/*/c", "/a/b/b/c", false}, {"/a/*/c", "/a/b", false}, {"/A", "/a", false}, {"/a*", "/ab", false}, {"/", "/", true}, {"/", "/a", false}, {"a", "a", false},
		{"/*/x", "/../x", true}, // canonical refuses such a path before
	} {
		if got := covers(c.pattern, c.path); got != c.want {
			t.Errorf("%s covers %s: %t", c.pattern, c.path, got)
		}
	}
}

func TestAQueryIsReadAsItsKeys(t *testing.T) {
	for raw, want := range map[string]string{"": "", "a=1&b": "a b", "a=1&a=2": "a", "a%20b=c": "a b", "=x": "", "&&a": "a", "a[]=1": "a[]"} {
		got, err := keys(raw)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v", raw, got, err)
		}
	}
	for _, raw := range []string{"a;b", "a=%", "a=%zz", "%=x", "a#b", "a b", "a\x00", "é=1", "%00=a", "%ff=a", strings.Repeat("a", maxQuery+1)} {
		if got, err := keys(raw); err == nil {
			t.Errorf("%q: %q", raw, got)
		}
	}
}

// FuzzCanonical holds that a path that is let through has one reading, and that
// the way it is written to the target is read as it was judged.
func FuzzCanonical(f *testing.F) {
	for _, s := range []string{"/", "/orders/1", "/a%20b/%c3%a9", "/a/..;/b", "/%2e%2e/", "/a%252f", "/a;b=c/d", "/a%3f%23"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		p, err := canonical(raw)
		if err != nil {
			if strings.Contains(err.Error(), raw) && len(raw) > 4 {
				t.Fatalf("%q is quoted: %v", raw, err)
			}
			return
		}
		if !utf8.ValidString(p) || strings.ContainsAny(p, "\\%\x00\r\n") || strings.Contains(p, "//") || p[0] != '/' {
			t.Fatalf("%q is %q", raw, p)
		}
		for s := range strings.SplitSeq(p, "/") {
			if s == "." || s == ".." {
				t.Fatalf("%q is %q", raw, p)
			}
		}
		sent := (&url.URL{Path: p}).EscapedPath()
		again, err := canonical(sent)
		if err != nil || again != p {
			t.Fatalf("%q is %q, sent as %q, read as %q, %v", raw, p, sent, again, err)
		}
		at, err := url.ParseRequestURI(sent)
		if err != nil || at.Path != p {
			t.Fatalf("%q: sent as %q, read as %q, %v", raw, sent, at, err)
		}
		if clean := at.JoinPath().Path; clean != p {
			t.Fatalf("%q is %q, and clean %q", raw, p, clean)
		}
	})
}
