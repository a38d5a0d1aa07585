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
	// Every field of the input and every key of a scope is told.
	for field := range inputSchema["properties"].(map[string]any) {
		if !strings.Contains(string(doc), "`"+field+"`") {
			t.Errorf("the input's %s is not told", field)
		}
	}
}
