//go:build slow

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestTheProgramIsTheSameBytesWhereverItIsBuilt(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	var first []byte
	for _, dir := range []string{"a", "another/place"} {
		clone := filepath.Join(t.TempDir(), dir)
		if out, err := exec.Command("git", "clone", "--quiet", root, clone).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		cmd := exec.Command("make", "-s", "static", "BIN="+filepath.Join(clone, "built"))
		cmd.Dir = clone
		cmd.Env = append(os.Environ(), "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(filepath.Join(clone, "built"))
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		} else if !bytes.Equal(first, b) {
			t.Errorf("two builds differ: %d and %d bytes", len(first), len(b))
		}
		if bytes.Contains(b, []byte(clone)) {
			t.Error("the program holds the path it was built at")
		}
	}
}
