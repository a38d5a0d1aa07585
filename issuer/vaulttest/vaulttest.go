// Package vaulttest gives tests a real Vault and a real PostgreSQL. Both
// listen on 127.0.0.1 alone and die with the test, or with its process.
package vaulttest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
)

// Server is a Vault for one test.
type Server struct {
	*vaultdev.Server
	Root *api.Client // with the root token
}

// Vault starts an empty Vault (`vault server -dev`: KV v2 at secret/ and
// nothing else) that is gone when the test ends.
func Vault(t testing.TB) *Server {
	t.Helper()
	binary, err := vaultdev.Find()
	if err != nil {
		t.Fatal(err)
	}
	s, err := vaultdev.Start(context.Background(), binary)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	root, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	return &Server{s, root}
}

// Prepared starts a Vault and prepares it for set as `countersign dev` does;
// dsn may be empty.
func Prepared(t testing.TB, set *scopes.Set, dsn string) (*Server, *vaultdev.Prepared) {
	t.Helper()
	s := Vault(t)
	p, err := vaultdev.Prepare(t.Context(), s.Root, vaultdev.Options{Scopes: set, Postgres: dsn})
	if err != nil {
		t.Fatal(err)
	}
	return s, p
}

// Orders makes the orders table at dsn and the database roles over it.
func Orders(t testing.TB, s *Server, dsn string) {
	t.Helper()
	if err := vaultdev.Orders(t.Context(), s.Root, dsn, time.Hour); err != nil {
		t.Fatal(err)
	}
}

// Postgres starts an empty PostgreSQL that is gone when the test ends, and
// returns the DSN of its superuser. Nothing in it survives a crash: fsync is
// off.
func Postgres(t testing.TB) string {
	t.Helper()
	bin := postgresBin(t)
	dir, err := os.MkdirTemp("", "countersign-pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })                  // last, when PostgreSQL is gone
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT} // SIGQUIT: immediate shutdown
	if os.Getuid() == 0 {
		attr.Credential = asPostgres(t, dir)
	}
	password := rand.Text()
	pwfile := filepath.Join(dir, "pw")
	if err := os.WriteFile(pwfile, []byte(password), 0o600); err != nil {
		t.Fatal(err)
	}
	if attr.Credential != nil {
		if err := os.Chown(pwfile, int(attr.Credential.Uid), int(attr.Credential.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	run := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, name), args...)
		cmd.Dir, cmd.SysProcAttr = dir, attr
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
		return cmd
	}
	if out, err := run("initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile="+pwfile,
		"--no-sync", "--no-instructions", "-E", "UTF8", "--locale=C").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	var last error
	for range 3 { // a free port can be taken before PostgreSQL binds it
		port := freePort(t)
		log, err := os.Create(filepath.Join(dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		cmd := run("postgres", "-D", data, "-p", strconv.Itoa(port), "-k", dir, "-c", "listen_addresses=127.0.0.1",
			"-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off", "-c", "max_connections=200")
		cmd.Stdout, cmd.Stderr = log, log
		done, err := vaultdev.Run(cmd)
		log.Close()
		if err != nil {
			t.Fatalf("starting postgres: %v", err)
		}
		dsn := fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/postgres?sslmode=disable", password, port)
		if last = answers(t.Context(), dsn, done); last == nil {
			t.Cleanup(func() {
				_ = cmd.Process.Signal(syscall.SIGQUIT)
				<-done
			})
			return dsn
		}
		_ = cmd.Process.Kill()
		<-done
	}
	out, _ := os.ReadFile(filepath.Join(dir, "log"))
	t.Fatalf("postgres did not start: %v\n%s", last, out)
	return ""
}

// answers waits until PostgreSQL accepts a login.
func answers(ctx context.Context, dsn string, done <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, dsn)
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-done:
			return fmt.Errorf("postgres ended at once")
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// postgresBin finds the directory of initdb and postgres: beside the initdb on
// PATH, or where Debian keeps them.
func postgresBin(t testing.TB) string {
	t.Helper()
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(p)
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Fatal("no PostgreSQL found: `make test` installs it (apt-get install postgresql)")
	}
	slices.Sort(found)
	return filepath.Dir(found[len(found)-1])
}

// asPostgres gives dir to the user postgres, since PostgreSQL refuses to run
// as root.
func asPostgres(t testing.TB, dir string) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatalf("PostgreSQL refuses to run as root, and there is no user postgres: %v", err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
