package witness

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"database/sql"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// buildLitewitness builds the witness of filippo.io/torchwood from the module
// in litewitness, which pins it, or finds the one built before.
func buildLitewitness(t *testing.T) string {
	t.Helper()
	run := func(args ...string) string {
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = "litewitness"
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("litewitness cannot be built: go %s: %v: %s", strings.Join(args, " "), err, stderr.String())
		}
		return strings.TrimSpace(string(out))
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = t.TempDir()
	}
	path := filepath.Join(cache, "countersign", "litewitness-"+run("list", "-m", "-f", "{{.Version}}", "filippo.io/torchwood"))
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		return path
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(path), ".build-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	built := filepath.Join(tmp, "litewitness")
	run("build", "-trimpath", "-o", built, "filippo.io/torchwood/cmd/litewitness")
	if err := os.Rename(built, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// litewitness runs one that knows the log, and returns its URL and verifier key.
func litewitness(t *testing.T, k *logKey) (url, vkey string) {
	t.Helper()
	bin := buildLitewitness(t)
	dir, err := os.MkdirTemp("", "lw") // a socket's path has to be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	// It takes its key from an SSH agent.
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "agent")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(ring, c)
		}
	}()
	pub, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}

	db := filepath.Join(dir, "lw.db")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	cmd := exec.Command(bin, "-name", "litewitness.example/w", "-db", db, "-ssh-agent", sock, "-listen", addr, "-key", ssh.FingerprintSHA256(pub))
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if _, rest, ok := strings.Cut(lines.Text(), "vkey="); ok {
			vkey = strings.Trim(strings.Fields(rest)[0], `"`)
			break
		}
	}
	if vkey == "" {
		t.Fatal("litewitness did not start")
	}
	go func() {
		for lines.Scan() { // so that it never waits for its log to be read
		}
	}()
	// What witnessctl add-log and add-key do.
	conn, err := sql.Open("sqlite", "file:"+db+"?_busy_timeout=10000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Exec("INSERT INTO log (origin, tree_size, tree_hash) VALUES (?, 0, ?)", origin, emptyRoot.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec("INSERT INTO key (origin, key) VALUES (?, ?)", origin, k.vkey); err != nil {
		t.Fatal(err)
	}
	eventually(t, "litewitness listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return "http://" + addr, vkey
}

func TestLitewitnessCosignsALedgerAndRefusesItsFork(t *testing.T) {
	k := newLogKey(t)
	url, vkey := litewitness(t, k)
	client, err := NewClient(url, vkey, k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	own := newWitness(t, "witness.example/w1", k)
	cs := []*Client{client, own.client(t, k)}
	dir := t.TempDir()
	c := PublisherConfig{Witnesses: cs, Policy: quorum(t, 2, cs), Withhold: true, File: filepath.Join(dir, "published")}
	l := publishing(t, k, dir, c)
	for i := range 4 {
		appendEntries(t, l, 1+i*7)
		eventually(t, "litewitness and our own cosign", func() bool {
			n, _ := store.CheckpointSize(l.Published())
			return n == l.Size() && cosigners(l.Published(), own) == 1 && strings.Contains(l.Published(), "— litewitness.example/w ")
		})
	}
	l.Close()
	fork := copyDir(t, dir)

	l = publishing(t, k, dir, c)
	appendEntries(t, l, 2)
	eventually(t, "the log goes on", func() bool { n, _ := store.CheckpointSize(l.Published()); return n == l.Size() })

	core, logs := observer.New(zap.ErrorLevel)
	second := openLedger(t, k, fork, nil)
	appendEntries(t, second, 3)
	second.Close()
	second = publishing(t, k, fork, PublisherConfig{Witnesses: cs[:1], Log: zap.New(core)})
	eventually(t, "the refusal is on record", func() bool { return len(alerts(t, second)) == 1 })
	// Litewitness shows no signed checkpoint: it is its word.
	if a := alerts(t, second)[0]; a.Alert != Forked || a.Proved || a.Theirs != "" || a.Size != l.Size() || a.Witness != "litewitness.example/w" {
		t.Fatalf("%+v", a)
	}
	if strings.Contains(second.Published(), "litewitness") || logs.Len() == 0 {
		t.Fatalf("published %q", second.Published())
	}
}
