package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	namedTest   = regexp.MustCompile("`([a-z0-9/]+)\\.((?:Test|Fuzz)[A-Za-z0-9]+)`")
	writtenTest = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9_]+)\(`)
)

// A line of the threat model that says what an attacker can or cannot do names
// the tests that show it, and each of them is there.
func TestEveryLineOfTheThreatModelNamesTestsThatExist(t *testing.T) {
	doc, err := os.ReadFile("../../docs/threat-model.md")
	must(t, err)
	written := map[string]map[string]bool{} // by package
	tests := func(pkg string) map[string]bool {
		if written[pkg] == nil {
			written[pkg] = map[string]bool{}
			files, err := filepath.Glob(filepath.Join("../..", pkg, "*_test.go"))
			must(t, err)
			for _, file := range files {
				b, err := os.ReadFile(file)
				must(t, err)
				for _, m := range writtenTest.FindAllSubmatch(b, -1) {
					written[pkg][string(m[1])] = true
				}
			}
		}
		return written[pkg]
	}
	shown, lines := false, 0 // shown: within a table whose last column names tests
	for line := range strings.SplitSeq(string(doc), "\n") {
		named := namedTest.FindAllStringSubmatch(line, -1)
		for _, m := range named {
			if !tests(m[1])[m[2]] {
				t.Errorf("there is no test %s in %s: %s", m[2], m[1], line)
			}
		}
		switch {
		case !strings.HasPrefix(line, "|"):
			shown = false
		case strings.HasSuffix(line, "| shown by |"):
			shown = true
		case shown && !strings.HasPrefix(line, "|---"):
			lines++
			if len(named) == 0 && !strings.Contains(line, "no test shows it") {
				t.Errorf("nothing shows it, and the line does not say so: %s", line)
			}
		}
	}
	if lines < 60 {
		t.Errorf("the threat model has %d lines with tests", lines)
	}
}

func TestTheRecordersPackagesCannotMint(t *testing.T) {
	const module = "github.com/countersign-dev/countersign/"
	packages := []string{"api/record", "api/approve", "api/review", "api/respond", "approvals/...", "store/..."}
	args := []string{"list", "-deps", "-f", "{{.ImportPath}}"}
	for _, p := range packages {
		args = append(args, module+p)
	}
	out, err := exec.Command("go", args...).Output()
	must(t, err)
	list := strings.Fields(string(out))
	if len(list) < 100 {
		t.Fatalf("%d packages", len(list))
	}
	for _, p := range list {
		rest, ours := strings.CutPrefix(p, module)
		if ours && (rest == "broker" || strings.HasPrefix(rest, "broker/") || rest == "issuer" || strings.HasPrefix(rest, "issuer/")) {
			t.Errorf("the recorder's side imports %s", p)
		}
	}
}
