package main

import (
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
)

func TestASecondDevInTheSameDirectoryLeavesTheFirstAlone(t *testing.T) {
	dir := t.TempDir()
	first := startDev(t, dir, "--vault", "none")
	out, err := exec.Command("countersign", "dev", "--dir", dir, "--addr", "127.0.0.1:0", "--vault", "none").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another `countersign dev` runs in") {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "dev.json")); err != nil {
		t.Errorf("the first one's ready file: %v", err)
	}
	if status, body := first.ask("identity:step", "s1"); status != 201 {
		t.Errorf("%d %s", status, body)
	}
}

func TestDevShowReadsTheReadyFileThatIsNamed(t *testing.T) {
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "there.json")
	if err := (&ready{API: "http://127.0.0.1:1"}).write(file); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("countersign", "dev", "show", "--dir", dir, "--ready-file", file, "api").CombinedOutput()
	if err != nil || string(out) != "http://127.0.0.1:1\n" {
		t.Errorf("%v: %s", err, out)
	}
}

// A Vault in memory forgets its leases when it ends, and what is on record as
// ended must have ended at its target.
func TestNoDatabaseRoleOutlivesTheVaultThatDevStarted(t *testing.T) {
	dir, dsn := t.TempDir(), vaulttest.Postgres(t)
	login := func(r *running, step string) string {
		t.Helper()
		status, body := r.ask("orders-db:read", step)
		var c struct {
			Credential struct{ Username, Password string }
		}
		if err := json.Unmarshal([]byte(body), &c); err != nil || status != 201 {
			t.Fatalf("%d %s", status, body)
		}
		cfg, err := pgx.ParseConfig(dsn)
		if err != nil {
			t.Fatal(err)
		}
		cfg.User, cfg.Password = c.Credential.Username, c.Credential.Password
		conn, err := pgx.ConnectConfig(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close(t.Context())
		return c.Credential.Username
	}
	exists := func(role string) (found bool) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if err := conn.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role).Scan(&found); err != nil {
			t.Fatal(err)
		}
		return found
	}

	stopped := startDev(t, dir, "--postgres", dsn)
	role := login(stopped, "s1")
	if code := stopped.interrupt(); code != 0 || exists(role) {
		t.Fatalf("after SIGINT (exit status %d) the role lives: %t", code, exists(role))
	}

	killed := startDev(t, dir, "--postgres", dsn)
	role = login(killed, "s2")
	other := startDev(t, t.TempDir(), "--postgres", dsn)
	others := login(other, "s1")
	killed.kill()
	again := startDev(t, dir, "--postgres", dsn)
	if exists(role) {
		t.Error("the role of a Vault that was killed lives on")
	}
	if !exists(others) {
		t.Error("the role of another directory's dev was dropped")
	}
	status, body := again.call(again.Orchestrators[0].Token, "DELETE", again.API+"/steps/s2/credential?run=run-1", "")
	if status != 200 || !strings.Contains(body, `"revoked":1`) {
		t.Errorf("ending it on record: %d %s", status, body)
	}
}

func TestDevTakesADSNThatLeavesTLSToTheServer(t *testing.T) {
	u, err := url.Parse(vaulttest.Postgres(t))
	if err != nil {
		t.Fatal(err)
	}
	u.RawQuery = "" // sslmode=prefer, and the test's server has no TLS
	r := startDev(t, t.TempDir(), "--postgres", u.String())
	if status, body := r.ask("orders-db:read", "s1"); status != 201 {
		t.Errorf("%d %s", status, body)
	}
}
