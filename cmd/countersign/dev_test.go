package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
)

// running is a `countersign dev` under test.
type running struct {
	ready
	t      *testing.T
	cmd    *exec.Cmd
	done   <-chan struct{}
	stderr *bytes.Buffer
}

// startDev starts `countersign dev` in dir and waits for its ready file.
func startDev(t *testing.T, dir string, args ...string) *running {
	t.Helper()
	file := filepath.Join(dir, "dev.json")
	if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
		t.Fatal(err) // one that a killed dev left behind
	}
	r := &running{t: t, stderr: &bytes.Buffer{}}
	r.cmd = exec.Command("countersign", append([]string{"dev", "--dir", dir, "--addr", "127.0.0.1:0"}, args...)...)
	r.cmd.Stderr = r.stderr
	var err error
	if r.done, err = vaultdev.Run(r.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.kill)
	eventually(t, "dev is ready", func() bool {
		select {
		case <-r.done:
			t.Fatalf("dev ended: %s", r.stderr)
		default:
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		if err := json.Unmarshal(b, &r.ready); err != nil {
			t.Fatalf("the ready file is not whole: %v\n%s", err, b)
		}
		return true
	})
	return r
}

func (r *running) kill() {
	_ = r.cmd.Process.Kill()
	<-r.done
}

// interrupt sends SIGINT and returns the exit status.
func (r *running) interrupt() int {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	select {
	case <-r.done:
	case <-time.After(30 * time.Second):
		r.t.Fatal("dev did not end within 30 s of SIGINT")
	}
	return r.cmd.ProcessState.ExitCode()
}

// call makes a call with token and returns status and body.
func (r *running) call(token, method, url, body string) (int, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func (r *running) ask(scope, step string) (int, string) {
	r.t.Helper()
	return r.call(r.Orchestrators[0].Token, "POST", r.API+"/steps/"+step+"/credential", `{"run":"run-1","scope":"`+scope+`"}`)
}

func refused(addr string) bool {
	c, err := net.DialTimeout("tcp", strings.TrimPrefix(addr, "http://"), time.Second)
	if err == nil {
		c.Close()
	}
	return err != nil
}

func TestDevGoesOnWithTheSameLogAndTokensWhenStartedAgain(t *testing.T) {
	dir := t.TempDir()
	first := startDev(t, dir, "--vault", "none")
	if status, body := first.ask("identity:step", "s1"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	if code := first.interrupt(); code != 0 {
		t.Fatalf("exit status %d after SIGINT: %s", code, first.stderr)
	}
	second := startDev(t, dir, "--vault", "none")
	if first.LogKey != second.LogKey {
		t.Errorf("the log key was %s and is %s", first.LogKey, second.LogKey)
	}
	for i, o := range first.Orchestrators {
		if second.Orchestrators[i].Token != o.Token {
			t.Errorf("the token of %s has changed", o.Name)
		}
	}
	status, body := second.call(second.Reviewers[0].Token, "GET", second.Recorder+"/history?run=run-1&type=credential.issued", "")
	if status != 200 || strings.Count(body, `"index"`) != 1 {
		t.Errorf("the issuance of the first run is not on record: %d %s", status, body)
	}
	for _, role := range [][]devCaller{second.Orchestrators, second.Approvers, second.Reviewers, second.Responders} {
		for _, c := range role {
			if c.Token == "" {
				t.Errorf("%s has no token", c.Name)
			}
		}
	}
}

func TestDevRefusesAnAlteredLedger(t *testing.T) {
	dir := t.TempDir()
	r := startDev(t, dir, "--vault", "none")
	if status, body := r.ask("identity:step", "s1"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	r.interrupt()
	path := filepath.Join(dir, "ledger", "ledger.db")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	altered := bytes.ReplaceAll(b, []byte(`"run":"run-1"`), []byte(`"run":"run-2"`))
	if bytes.Equal(altered, b) {
		t.Fatal("the entry is not in the database file")
	}
	if err := os.WriteFile(path, altered, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("countersign", "dev", "--dir", dir, "--addr", "127.0.0.1:0", "--vault", "none").CombinedOutput()
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != 1 || !strings.Contains(string(out), "ledger mismatch") {
		t.Errorf("want exit status 1 and \"ledger mismatch\", got %v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "dev.json")); err == nil {
		t.Error("there is a ready file all the same")
	}
}

func TestAVaultThatDevStartedDiesWithIt(t *testing.T) {
	killed := startDev(t, t.TempDir())
	killed.kill()
	eventually(t, "Vault is gone after SIGKILL", func() bool { return refused(killed.Vault.Addr) })

	stopped := startDev(t, t.TempDir())
	if code := stopped.interrupt(); code != 0 {
		t.Errorf("exit status %d after SIGINT: %s", code, stopped.stderr)
	}
	for _, addr := range []string{stopped.Vault.Addr, stopped.API, stopped.Recorder, stopped.Gateway.HTTP, stopped.Gateway.Postgres, stopped.Gateway.MCP} {
		if !refused(addr) {
			t.Errorf("%s still answers after dev has ended", addr)
		}
	}
}

func TestDevUsesAVaultThatIsNamed(t *testing.T) {
	vault := vaulttest.Vault(t)
	r := startDev(t, t.TempDir(), "--vault", vault.Addr, "--vault-token", vault.RootToken)
	if r.Vault.Addr != vault.Addr {
		t.Errorf("the ready file names %s, want %s", r.Vault.Addr, vault.Addr)
	}
	if status, body := r.ask("vault:demo-read", "s1"); status != 201 || !strings.Contains(body, vault.Addr) {
		t.Errorf("vault:demo-read: %d %s", status, body)
	}
	if code := r.interrupt(); code != 0 {
		t.Errorf("exit status %d after SIGINT: %s", code, r.stderr)
	}
	if refused(vault.Addr) {
		t.Error("dev stopped a Vault that it did not start")
	}

	// One that the environment points at is not touched.
	for _, args := range [][]string{{"--vault", vault.Addr}, {"--vault", "127.0.0.1:1"}, {"--addr", "0.0.0.0:0"}} {
		cmd := exec.Command("countersign", append([]string{"dev", "--dir", t.TempDir(), "--addr", "127.0.0.1:0"}, args...)...)
		cmd.Env = append(os.Environ(), "VAULT_ADDR="+vault.Addr, "VAULT_TOKEN="+vault.RootToken)
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("dev %v started: %s", args, out)
		}
	}
}

func TestDevWithoutVaultIssuesIdentitiesAlone(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	if r.Vault.Addr != "" || r.Vault.Token != "" {
		t.Errorf("the ready file names a Vault: %+v", r.Vault)
	}
	if status, body := r.ask("identity:step", "s1"); status != 201 {
		t.Errorf("identity:step: %d %s", status, body)
	}
	if status, body := r.ask("vault:demo-read", "s2"); status != 503 || !strings.Contains(body, "problems/vault-unavailable") {
		t.Errorf("vault:demo-read: %d %s", status, body)
	}
}

func TestAResourceServerIntrospectsATokenUntilItsStepEnds(t *testing.T) {
	dir := t.TempDir()
	r := startDev(t, dir, "--vault", "none")
	code, server, stderr := r.cli("", "token", "create", "--file", filepath.Join(dir, "tokens"), "--role", "resource-server", "--name", "orders")
	if code != 0 {
		t.Fatal(stderr)
	}
	server = strings.TrimSpace(server)
	status, body := r.ask("identity:step", "s1")
	var c held
	if err := json.Unmarshal([]byte(body), &c); err != nil || status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	introspect := func(form string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "POST", r.API+"/introspect", strings.NewReader("token="+c.Credential.Token+form))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+server)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%s %v %s", res.Status, err, b)
		}
		return string(b)
	}
	if said := introspect("&use=read-orders"); !strings.Contains(said, `"active":true`) || !strings.Contains(said, "spiffe://countersign.demo/orchestrator/demo/run/run-1/step/s1") {
		t.Errorf("a live token: %s", said)
	}
	if status, body := r.call(r.Reviewers[0].Token, "GET", r.Recorder+"/history?type=credential.used&step=s1", ""); status != 200 || !strings.Contains(body, `"use":"read-orders"`) {
		t.Errorf("its use is not on record: %d %s", status, body)
	}
	if status, body := r.call(r.Orchestrators[0].Token, "POST", r.API+"/steps/s1/result", `{"run":"run-1","outcome":"succeeded"}`); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	if said := strings.TrimSpace(introspect("")); said != `{"active":false}` {
		t.Errorf("after the step's end: %s", said)
	}
}

func TestWhoShowsNoSessionsTokenReachesNothingThroughTheGateway(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	for _, u := range []string{r.Gateway.HTTP + "/any/path", r.Gateway.MCP} {
		if status, body := r.call("x", "POST", u, "{}"); status != 401 || !strings.Contains(body, "problems/unauthenticated") {
			t.Errorf("%s: %d %s", u, status, body)
		}
	}
	_, err := pgconn.Connect(t.Context(), "postgres://any:token@"+r.Gateway.Postgres+"/orders?sslmode=disable")
	var refused *pgconn.PgError
	if !errors.As(err, &refused) || refused.Code != "28P01" {
		t.Errorf("postgres: %v", err)
	}
}

func TestRunEndsTheCredentialWhenItIsStopped(t *testing.T) {
	r := startDev(t, t.TempDir())
	marker := filepath.Join(t.TempDir(), "token")
	// The command ignores nothing: it ends by the signal that run passes on.
	cmd := exec.Command("countersign", "run", "--scope", "vault:demo-read", "--run", "run-1", "--step", "s1", "--",
		"sh", "-c", `test -z "$COUNTERSIGN_TOKEN" && printf %s "$VAULT_TOKEN" > "$0.tmp" && mv "$0.tmp" "$0" && exec sleep 60`, marker)
	cmd.Env = append(os.Environ(), "COUNTERSIGN_ADDR="+r.API, "COUNTERSIGN_TOKEN="+r.Orchestrators[0].Token)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	done, err := vaultdev.Run(cmd)
	if err != nil {
		t.Fatal(err)
	}
	var token []byte
	eventually(t, "the command has its token", func() bool {
		token, err = os.ReadFile(marker)
		return err == nil
	})
	lookup := func() int {
		req, err := http.NewRequest("GET", r.Vault.Addr+"/v1/secret/data/demo", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Vault-Token", string(token))
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	if status := lookup(); status != 200 {
		t.Fatalf("the command's token answers %d", status)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-done
	if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGTERM) {
		t.Errorf("exit status %d, want 143: %s", code, &stderr)
	}
	if status := lookup(); status != 403 {
		t.Errorf("the token answers %d after run has ended, want 403", status)
	}
	status, body := r.call(r.Reviewers[0].Token, "GET", r.Recorder+"/history?step=s1&type=step.finished", "")
	if status != 200 || !strings.Contains(body, `"outcome":"failed"`) {
		t.Errorf("the result is not on record: %d %s", status, body)
	}
}
