package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
)

var asksPeople = regexp.MustCompile(`request (req_\w+) waits for approval by 1 of group dba at (http://localhost:\d+/approvals/(apr_\w+)), until `)

func TestATerminalIsToldWhomItsRequestWaitsForAndHowItEnded(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	caller := r.Orchestrators[0].Token
	ask := func(step string, more ...string) []string {
		return append([]string{"request", "--scope", "vault:demo-write", "--run", "r1", "--step", step, "--reason", "OPS-1"}, more...)
	}
	code, out, stderr := r.cli(caller, ask("s1")...)
	m := asksPeople.FindStringSubmatch(stderr)
	if code != exitPending || out != "" || m == nil || !strings.HasPrefix(m[2], r.Recorder+"/") {
		t.Fatalf("%d %s %s", code, out, stderr)
	}
	// Joined by the same command, which then waits until a person has decided.
	waiting := exec.Command("countersign", ask("s1", "--wait", "2m")...)
	waiting.Env = append(os.Environ(), "COUNTERSIGN_ADDR="+r.API, "COUNTERSIGN_TOKEN="+caller)
	told := &toldWhom{}
	waiting.Stderr = told
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says whom it waits for", func() bool { return told.match() != nil })
	if again := told.match(); again[1] != m[1] {
		t.Errorf("it waits for %s, not %s", again[1], m[1])
	}
	if status, body := r.call(r.Approvers[0].Token, "POST", r.Recorder+"/approvals/"+m[3]+"/decision", `{"decision":"deny","reason":"not today"}`); status != 200 {
		t.Fatalf("deny: %d %s", status, body)
	}
	_ = waiting.Wait()
	if code := waiting.ProcessState.ExitCode(); code != exitRefused || !strings.Contains(told.String(), "approval-denied") {
		t.Errorf("%d %s", code, told)
	}

	// A run that is stopped takes its request back.
	run := exec.Command("countersign", "run", "--scope", "vault:demo-write", "--run", "r1", "--step", "s2", "--reason", "OPS-1", "--wait", "2m", "--", "true")
	run.Env = waiting.Env
	told = &toldWhom{}
	run.Stderr = told
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says whom it waits for", func() bool { return told.match() != nil })
	if err := run.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := run.Wait(); err == nil {
		t.Error("it succeeded")
	}
	status, body := r.call(caller, "GET", r.API+"/requests/"+told.match()[1], "")
	var at struct{ Status string }
	if err := json.Unmarshal([]byte(body), &at); status != 200 || err != nil || at.Status != "withdrawn" {
		t.Errorf("%d %s %v", status, body, err)
	}
}

// toldWhom collects what a command writes to its standard error.
type toldWhom struct {
	mu sync.Mutex
	b  strings.Builder
}

func (w *toldWhom) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *toldWhom) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

func (w *toldWhom) match() []string { return asksPeople.FindStringSubmatch(w.String()) }
