package scopes

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTheExamplesOfThePolicyDocumentWork(t *testing.T) {
	doc, err := os.ReadFile("../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind, begins string) string {
		_, rest, ok := strings.Cut(string(doc), "```"+kind+"\n"+begins)
		text, _, closed := strings.Cut(rest, "```")
		if !ok || !closed {
			t.Fatalf("docs/policy.md has no %s that begins with %s", kind, begins)
		}
		return begins + text
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"catalogue.yaml": string(Demo(orders)), "policy.rego": block("rego", "package"), "cases.yaml": block("yaml", "catalogue:")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	results, err := Test(context.Background(), filepath.Join(dir, "cases.yaml"), nil)
	if err != nil || len(results) != 3 {
		t.Fatal(results, err)
	}
	for _, r := range results {
		if len(r.Failures) > 0 {
			t.Errorf("%s: %q", r.Name, r.Failures)
		}
	}
	// Slack cannot ask for a passkey: the example shows the two keys, a scope has
	// one of them.
	approval := strings.NewReplacer("passkey: true", "passkey: false").Replace(block("yaml", "approval:"))
	if _, err := Parse("example.yaml", []byte(approval+string(Demo(nil))[strings.Index(string(Demo(nil)), "\nscopes:"):]), "", nil); err != nil {
		t.Errorf("the approval rule of the document: %v", err)
	}
	access, err := Parse("access.yaml", []byte(block("yaml", "scopes:")), "", nil)
	if err != nil {
		t.Fatalf("the access of the document: %v", err)
	}
	seen := map[string]bool{}
	for _, sc := range access.Scopes() {
		seen[sc.Access.Protocol] = true
	}
	if len(seen) != 3 {
		t.Errorf("its scopes have the protocols %v", seen)
	}
	// Every field of the input and every key of a scope is told.
	for key, protocols := range accessKeys {
		told := false
		for line := range strings.Lines(string(doc)) {
			told = told || strings.HasPrefix(line, "|") && strings.Contains(line, "`"+key+"`") && (strings.Contains(line, "| all |") || strings.Contains(line, "`"+protocols[0]+"`"))
		}
		if !told && key != "inject" { // it has a table of its own
			t.Errorf("the key %s of access is not told", key)
		}
	}
	for _, kinds := range maskKinds {
		for _, kind := range kinds {
			if !strings.Contains(string(doc), "`{"+kind+": ") {
				t.Errorf("the masking rule %s is not told", kind)
			}
		}
	}
	for _, d := range detectors {
		if !strings.Contains(string(doc), "`"+d+"`") {
			t.Errorf("the detector %s is not told", d)
		}
	}
	for field := range inputSchema["properties"].(map[string]any) {
		if !strings.Contains(string(doc), "`"+field+"`") {
			t.Errorf("the input's %s is not told", field)
		}
	}
}
