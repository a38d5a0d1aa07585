package scopes

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// wide is a scope whose own pattern lets anything through: what still holds is
// the package's.
const wide = `
  - name: aws:deploy
    target: aws://{{role}}
    sensitivity: sensitive
    max_ttl: 1h
    ask: ["*"]
    engine: path
    vault:
      path: aws/creds/{{team}}/{{role}}{{suffix}}
      method: write
      data: {note: "for {{note}}", ttl: "{{ttl}}", count: "{{count}}", dry: "{{dry}}"}
    params:
      - {name: role, type: string, pattern: "(?s).*", max_length: 1000, required: true}
      - {name: suffix, type: string, pattern: "(?s).*", default: x}
      - {name: team, type: enum, values: [red, blue], default: red}
      - {name: note, type: string, default: none, max_length: 20}
      - {name: count, type: int, min: -5, max: 5, default: 1}
      - {name: dry, type: bool, default: false}
      - {name: ticket, type: string, pattern: "[A-Z]+-[0-9]+"}
`

func TestParamsFillTheTemplates(t *testing.T) {
	s := set(t, wide)
	a := ask("aws:deploy")
	a.TTL = "90s"
	a.Params = map[string]any{"role": "deploy", "suffix": "-2", "team": "blue", "note": "a: b/c {d}", "count": json.Number("-5"), "dry": true}
	g := decide(t, s, a).Grant
	if g.Path != "aws/creds/blue/deploy-2" || g.Target != "aws://deploy" || g.Data["note"] != "for a: b/c {d}" || g.Data["ttl"] != "90s" || g.Data["count"] != "-5" || g.Data["dry"] != "true" || len(g.Params) != 6 {
		t.Errorf("got %+v", g)
	}
	a.Params = map[string]any{"role": "deploy"}
	g = decide(t, s, a).Grant
	if g.Path != "aws/creds/red/deployx" || g.Data["note"] != "for none" || g.Data["count"] != "1" || g.Data["dry"] != "false" {
		t.Errorf("without the optional ones: %+v", g)
	}
}

func TestNoParamEscapesItsPlace(t *testing.T) {
	s := set(t, wide)
	for _, value := range []any{
		"", ".", "..", "../../sys/seal", "a/b", "/", "//", "a/", "%2e%2e", "..%2f", `..\..`, "a b", "a\tb", "a\n", "a\r\nb", "a\x00", "\u202e", "ä", "*", "+", "a*", "a?b", "a#b", "a;b", "a&b=c",
		"{{team}}", "{{", "}}", "${x}", "$(id)", "`id`", `a"b`, "a'b", "a:b", "a@b", "a,b", "a\xffb", strings.Repeat("a", 1001),
		nil, 1, 1.5, true, []any{"a"}, map[string]any{"a": "b"}, json.Number("1"),
	} {
		a := ask("aws:deploy")
		a.Params = map[string]any{"role": value}
		v, err := s.Decide(context.Background(), a)
		if !errors.Is(err, ErrParams) {
			t.Errorf("%q gives %+v, %v", value, v, err)
		}
		if text, ok := value.(string); ok && len(text) > 3 && err != nil && strings.Contains(err.Error(), text) {
			t.Errorf("the error repeats the value: %v", err)
		}
	}
	// Two values that are each allowed, and together are not.
	for _, c := range []map[string]any{
		{"role": "..", "suffix": "."}, {"role": "a", "suffix": ".."}, {"role": "a", "suffix": "/.."},
		{"role": "a", "note": "a\nb"}, {"role": "a", "note": "a\u202eb"}, {"role": "a", "note": "a\u00a0b"}, {"role": "a", "note": "a\xff"}, {"role": "a", "note": "{{ttl}}"}, {"role": "a", "note": strings.Repeat("a", 21)},
		{"role": "a", "team": "green"}, {"role": "a", "team": 1}, {"role": "a", "team": ""},
		{"role": "a", "count": 6}, {"role": "a", "count": -6}, {"role": "a", "count": 1.5}, {"role": "a", "count": "1"}, {"role": "a", "count": math.NaN()}, {"role": "a", "count": math.Inf(1)}, {"role": "a", "count": 1e300},
		{"role": "a", "count": json.Number("99999999999999999999")}, {"role": "a", "count": uint64(math.MaxUint64)},
		{"role": "a", "dry": "true"}, {"role": "a", "dry": 1},
		{"role": "a", "ticket": "ops-1"}, {"role": "a", "ticket": "OPS-1\n"}, {"role": "a", "ticket": "xOPS-1"},
		{"role": "a", "ttl": "9h"}, {"role": "a", "Role": "b"}, {}, nil,
	} {
		a := ask("aws:deploy")
		a.Params = c
		if v, err := s.Decide(context.Background(), a); !errors.Is(err, ErrParams) {
			t.Errorf("%v gives %+v, %v", c, v, err)
		}
	}
}

func TestTwoValuesSideBySideDoNotMakeAParentSegment(t *testing.T) {
	// A single dot is refused by itself; so that the last check is seen to
	// work, it is asked directly.
	for path, ok := range map[string]bool{"a/b": true, "a/..": false, "a/./b": false, "a//b": false, "/a": false, "a/": false, "": false, "a/b c": false, "a/...": true} {
		if err := checkPath(path); (err == nil) != ok {
			t.Errorf("%q: %v", path, err)
		}
	}
}

func TestAListThatVaultSplitsAtCommasTakesNoCommaFromAParam(t *testing.T) {
	s := set(t, `
  - name: ssh:user
    target: ssh://x
    sensitivity: low
    max_ttl: 1h
    ask: ["*"]
    engine: ssh
    vault: {role: user, data: {valid_principals: "{{user}}"}}
    params: [{name: user, type: string, pattern: ".*", required: true}]
`)
	a := ask("ssh:user")
	a.PublicKey = newSSHKey(t)
	for value, ok := range map[string]bool{"deploy": true, "deploy,root": false, "*": false, "a b": false} {
		a.Params = map[string]any{"user": value}
		if _, err := s.Decide(context.Background(), a); (err == nil) != ok {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func FuzzParams(f *testing.F) {
	s := set(f, wide)
	for _, seed := range []string{"deploy", "..", "../x", "{{team}}", "a\nb", "", "a/b", "%2e", "é"} {
		f.Add(seed, seed, int64(1), seed)
	}
	f.Fuzz(func(t *testing.T, role, suffix string, count int64, note string) {
		a := ask("aws:deploy")
		a.Params = map[string]any{"role": role, "suffix": suffix, "count": count, "note": note}
		v, err := s.Decide(context.Background(), a)
		if err != nil {
			if !errors.Is(err, ErrParams) {
				t.Fatal(err)
			}
			return
		}
		g := v.Grant
		if g.Path != "aws/creds/red/"+role+suffix || strings.Count(g.Path, "/") != 3 || strings.Contains(g.Path, "/..") && g.Path[len("aws/creds/red/"):] == ".." || strings.ContainsAny(g.Path, "%\\?#*+ \n\x00") {
			t.Fatalf("path %q", g.Path)
		}
		if g.Data["note"] != "for "+note || strings.ContainsAny(note, "\n\r\x00") {
			t.Fatalf("note %q", g.Data["note"])
		}
		again, err := s.Resolve(g.Scope, time.Duration(g.TTL), g.Params, g.Delivery, g.PublicKey, g.Audience)
		if err != nil || again.Digest() != g.Digest() {
			t.Fatalf("derived again: %+v, %v", again, err)
		}
	})
}

func FuzzTTL(f *testing.F) {
	s := demoSet(f, "")
	for _, seed := range []string{"", "5m", "0", "-1s", "1h", "1500ms", "9223372036854775807ns", "1e3s", "٣s", "15m0.000000001s", "+5m", "infs"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, ttl string) {
		a := ask("vault:demo-read")
		a.TTL = ttl
		v, err := s.Decide(context.Background(), a)
		switch {
		case err != nil && !errors.Is(err, ErrTTLInvalid) && !errors.Is(err, ErrTTLTooLong):
			t.Fatal(err)
		case err == nil && (v.Grant.TTL < store.Duration(time.Second) || v.Grant.TTL > store.Duration(15*time.Minute) || time.Duration(v.Grant.TTL)%time.Second != 0):
			t.Fatalf("%q gives %s", ttl, time.Duration(v.Grant.TTL))
		}
	})
}

func FuzzPublicKey(f *testing.F) {
	s := demoSet(f, "")
	f.Add("ssh:deploy", newSSHKey(f)+" me@here")
	f.Add("ssh:deploy", "command=\"x\" ssh-ed25519 AAAA")
	f.Add("pki:service", "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n")
	for _, s := range []string{jwkP256, jwkEd25519, `{"kty":"EC"}`, `{"kty":"OKP","crv":"Ed25519","x":"AA"}`, `{"kty":"oct","k":"AAAA"}`, `{"kty":"EC","kty":"EC"}`} {
		f.Add("http:demo", s)
	}
	f.Fuzz(func(t *testing.T, scope, key string) {
		if scope != "ssh:deploy" && scope != "http:demo" {
			scope = "pki:service"
		}
		a := ask(scope)
		a.PublicKey = key
		v, err := s.Decide(context.Background(), a)
		if err != nil {
			if !errors.Is(err, ErrPublicKey) {
				t.Fatal(err)
			}
			return
		}
		if strings.Contains(v.Grant.PublicKey, `"d"`) {
			t.Fatalf("a private key is granted: %q", v.Grant.PublicKey)
		}
		a.PublicKey = v.Grant.PublicKey
		if again := decide(t, s, a); again.Grant.Digest() != v.Grant.Digest() {
			t.Fatalf("read again it is another key: %q", again.Grant.PublicKey)
		}
	})
}
