package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var shellBlock = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")

func TestEveryCommandOfTheREADMERuns(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	for _, block := range shellBlock.FindAllStringSubmatch(string(text), -1) {
		script.WriteString(block[1])
	}
	if strings.Count(script.String(), "countersign") < 5 {
		t.Fatalf("the README holds hardly any commands:\n%s", script.String())
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	self, err := exec.LookPath("countersign") // TestMain put this test's own on PATH
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, d := range []string{"bin", "shims"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(self, filepath.Join(dir, "bin", "countersign")); err != nil {
		t.Fatal(err)
	}
	// The program under test is this one, so make only says what it would do:
	// that the targets exist is what is checked.
	shim := "#!/bin/sh\nexec /usr/bin/env PATH=\"$REAL_PATH\" make -n -C '" + root + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "shims", "make"), []byte(shim), 0o755); err != nil {
		t.Fatal(err)
	}
	commands := strings.ReplaceAll(script.String(), "127.0.0.1:8787", "127.0.0.1:0")
	cmd := exec.CommandContext(t.Context(), "sh", "-eux", "-c", commands)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "REAL_PATH="+os.Getenv("PATH"), "PATH="+filepath.Join(dir, "shims")+":"+os.Getenv("PATH"))
	// What the shell starts in the background must not outlive the test.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`"kind":"vault_token"`, "a Vault token of ", "credential.issued", "approval.decided", "verified: "} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the README's commands did not print %q:\n%s", want, out)
		}
	}
}
