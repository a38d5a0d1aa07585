package main

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The demo stops at the first thing that is not as it tells.
func TestTheDemoTellsNothingThatIsNotSo(t *testing.T) {
	self, err := exec.LookPath("countersign") // TestMain put this test's own on PATH
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "go", "run", "../demo", self)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"A step that never holds a secret", "used: tools/call lookup_order", "claimed and observed: agree", "== Done"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("it does not tell of %q", want)
		}
	}
}
