package scopes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPolicyCasesOfAFileAreRun(t *testing.T) {
	results, err := Test(context.Background(), "testdata/cases.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, r := range results {
		verdict := "ok  "
		if len(r.Failures) > 0 {
			verdict = "FAIL"
		}
		fmt.Fprintf(&b, "%s %d %s\n", verdict, r.Line, r.Name)
		for _, f := range r.Failures {
			fmt.Fprintf(&b, "     %s\n", f)
		}
		if want := strings.HasPrefix(r.Name, "fails: "); want != (len(r.Failures) > 0) {
			t.Errorf("%s: %q", r.Name, r.Failures)
		}
	}
	golden(t, "cases.txt", b.String())
	// The caller's own set takes the place of the file's.
	if results, err = Test(context.Background(), "testdata/cases.yaml", demoSet(t, "")); err != nil || len(results) == 0 {
		t.Error(err)
	}
}

func TestAFileOfCasesWithAMistakeIsToldWithItsPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cases.yaml")
	for text, want := range map[string]string{
		"":                     "cases.yaml:1:1: the file is empty",
		"catalogue: x\n":       "cases.yaml:1:1: there are no cases",
		"cases: []\n":          "cases.yaml:1:8: cases is an empty list",
		"cases: [{name: a}]\n": "cases.yaml:1:10: a case has no ask",
		"cases: [{name: a, ask: {scope: s}, expect: {outcome: allow}}]\n":                                      "ask has no orchestrator",
		"cases: [{name: a, ask: {scope: s, orchestrator: o}, expect: {outcome: perhaps}}]\n":                   "outcome is \"perhaps\"",
		"cases: [{name: a, ask: {scope: s, orchestrator: o, time: noon}, expect: {outcome: allow}}]\n":         "time is \"noon\"",
		"cases: [{name: a, ask: {scope: s, orchestrator: o, user: x}, expect: {outcome: allow}}]\n":            "ask has no key \"user\"",
		"cases: [{name: a, ask: {scope: s, orchestrator: o}, expect: {error: oops}}]\n":                        "error is \"oops\"",
		"cases: [{name: a, ask: {scope: s, orchestrator: o}, expect: {error: ttl-invalid, outcome: deny}}]\n":  "an error and something else",
		"cases: [{name: a, ask: {scope: s, orchestrator: o}, expect: {outcome: allow}}]\n":                     "the cases name no catalogue",
		"catalogue: no.yaml\ncases: [{name: a, ask: {scope: s, orchestrator: o}, expect: {outcome: allow}}]\n": "no.yaml: no such file",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Test(context.Background(), path, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q gives %v, want %q", text, err, want)
		}
	}
	if _, err := Test(context.Background(), path+".gone", nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestLintLooksAtCataloguesAndPolicies(t *testing.T) {
	if got := Lint("demo.yaml", "testdata/cases.rego"); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	got := Lint("testdata/cases.yaml", "testdata/cases.txt", "gone.yaml", "gone.rego")
	files := map[string]bool{}
	for _, p := range got {
		files[p.File] = true
	}
	if len(files) != 4 {
		t.Errorf("got %v", got)
	}
}

func FuzzCatalogue(f *testing.F) {
	f.Add(Demo(orders))
	f.Add([]byte("scopes:" + wide))
	f.Add([]byte("scopes:" + every))
	f.Add([]byte("scopes:" + reached))
	for _, s := range []string{"", "scopes: [", "- a", "&a [*a]", "a: &a {b: *a}", "? a\n: b", "!!binary x", "scopes:\n- name: |\n    x\n", "{{{{", "[[[[", "---\n---\n", "\xff", "a: 'b", "scopes: [{<<: {}}]", "%YAML 1.2\n---\nscopes: []"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse("c.yaml", b, "", nil)
		if err != nil {
			var problems Problems
			if !errors.As(err, &problems) || len(problems) == 0 || len(problems) > maxProblems {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		// What loads can be asked for, planned and printed.
		p := VaultSetup(s, VaultOptions{})
		var out strings.Builder
		if err := p.Format(&out); err != nil {
			t.Fatal(err)
		}
		for _, sc := range s.Scopes() {
			if sc.MaxTTL <= 0 || sc.DefaultTTL <= 0 || sc.DefaultTTL > sc.MaxTTL || len(sc.Delivery) == 0 || sc.Target == "" || sc.Sensitivity == "" {
				t.Fatalf("%+v", sc)
			}
			if through := slices.Contains(sc.Delivery, Gateway); through != (sc.Access != nil) || through != (sc.Access != nil && sc.Access.Upstream != "") {
				t.Fatalf("delivered %q with access %+v", sc.Delivery, sc.Access)
			}
			for _, delivery := range sc.Delivery {
				a := ask(sc.Name)
				a.Delivery = delivery
				for _, who := range sc.Ask {
					a.Orchestrator = strings.ReplaceAll(who, "*", "")
				}
				v, err := s.Decide(context.Background(), a)
				if err == nil && len(v.Reasons) > 0 && v.Reasons[0] == reasonMayNotAsk {
					t.Fatalf("nobody may ask for %+v", sc)
				}
				if err == nil && (v.Grant.Access != nil) != (delivery == Gateway) {
					t.Fatalf("delivered %s with access %+v", delivery, v.Grant.Access)
				}
			}
		}
	})
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte("package countersign\ndeny contains \"x\" if input.run == \"x\"\n"))
	f.Add([]byte("package countersign\nshorten contains {\"ttl\": \"1m\", \"reason\": \"x\"} if true\n"))
	f.Add([]byte("package countersign\nimport data.x\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse("demo.yaml", Demo(nil), "p.rego", b)
		if err != nil {
			return
		}
		if v, err := s.Decide(context.Background(), ask("vault:demo-read")); err != nil || v.Err != nil && v.Outcome != "deny" {
			t.Fatalf("%+v, %v", v, err)
		}
	})
}

func FuzzCases(f *testing.F) {
	b, err := os.ReadFile("testdata/cases.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("cases: [{name: a, ask: {scope: s, orchestrator: o, params: {a: [1]}}, expect: {outcome: allow}}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &reader{file: "cases.yaml"}
		r.cases(b)
	})
}
