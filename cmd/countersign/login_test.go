package main

import (
	"bufio"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestAPersonLogsInATerminalAndDecidesThere(t *testing.T) {
	dir := t.TempDir()
	dev := startDev(t, filepath.Join(dir, "dev"), "--vault", "none")
	env := append(os.Environ(), "XDG_CONFIG_HOME="+dir, "HOME="+dir, "COUNTERSIGN_RECORDER="+dev.Recorder, "COUNTERSIGN_TOKEN=")
	run := func(args ...string) (string, error) {
		cmd := exec.Command("countersign", args...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("approvals", "list"); err == nil || !strings.Contains(out, "countersign login") {
		t.Fatalf("without a login: %v %s", err, out)
	}

	cmd := exec.Command("countersign", "login", "--no-browser")
	cmd.Env = env
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	page := ""
	for lines := bufio.NewScanner(said); page == "" && lines.Scan(); {
		if line := strings.TrimSpace(lines.Text()); strings.HasPrefix(line, dev.Recorder) {
			page = line
		}
	}
	res, err := http.Get(clickThrough(t, page, "approver-a").String())
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("the terminal does not take the code: %v", err)
	}
	res.Body.Close()
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "logged in as user:approver-a") {
		t.Fatalf("%v: %s", err, out.String())
	}
	kept := filepath.Join(dir, "countersign", "login.json")
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s is kept as %v, %v", kept, info.Mode(), err)
	}

	if status, body := dev.call(dev.Orchestrators[0].Token, "POST", dev.API+"/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-write","reason":"line one\nline two\u200b"}`); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, body)
	}
	list, err := run("approvals", "list")
	if err != nil || !strings.Contains(list, "vault:demo-write") || !strings.Contains(list, "line one line two?") {
		t.Fatalf("%v: %s", err, list)
	}
	id := strings.Fields(strings.Split(list, "\n")[1])[0]
	if shown, err := run("approvals", "show", id); err != nil || !strings.Contains(shown, "reason           line one\n                 line two?") {
		t.Errorf("%v: %s", err, shown)
	}
	if out, err := run("approvals", "deny", id); err == nil || !strings.Contains(out, "reason-required") {
		t.Errorf("without a reason: %v %s", err, out)
	}
	if out, err := run("approvals", "deny", id, "--reason", "not now"); err != nil || !strings.Contains(out, "denied") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := run("approvals", "approve", id, "--reason", "after all"); err == nil || !strings.Contains(out, "request-closed") {
		t.Errorf("an approval after the denial: %v %s", err, out)
	}
	if status, body := dev.call(dev.Orchestrators[0].Token, "POST", dev.API+"/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-write","reason":"line one\nline two\u200b"}`); status != http.StatusForbidden || !strings.Contains(body, "approval-denied") {
		t.Errorf("%d %s", status, body)
	}
}
