package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	_ "modernc.org/sqlite"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	stockEntries = 300 // more than one tile
	stockEarlier = 200 // size of the earlier, validly signed copy
	stockNewest  = 50  // what a recorder with check_newest set hashes again at start
)

// stock is a ledger that its owner has seen: a checkpoint of it lies elsewhere.
type stock struct {
	t                        *testing.T
	dir, pub, seen, earlier  string
	logKey, privacyKey, toks string
	leaves                   [][]byte
}

func newStock(t *testing.T) *stock {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	s := &stock{t: t, dir: file("ledger"), pub: file("log.pub"), seen: file("seen"), earlier: file("earlier.db"),
		logKey: file("log.key"), privacyKey: file("privacy.key"), toks: file("tokens")}
	for _, args := range [][]string{
		{"key", "generate", "log", "--name", "tamper.example/log", "--out", s.logKey},
		{"key", "generate", "privacy", "--out", s.privacyKey},
		{"token", "create", "--file", s.toks, "--role", "writer", "--name", "broker-1"},
	} {
		out, err := countersign(t, args...).Output()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		if args[2] == "log" {
			must(t, os.WriteFile(s.pub, out, 0o600))
		}
	}
	s.fill(s.dir, s.logKey, "one", stockEarlier)
	b, err := os.ReadFile(filepath.Join(s.dir, "ledger.db"))
	must(t, err)
	must(t, os.WriteFile(s.earlier, b, 0o600))
	s.fill(s.dir, s.logKey, "one", stockEntries-stockEarlier)
	if code, out := s.verify(s.dir, "--save", s.seen); code != 0 {
		t.Fatalf("an untouched ledger: exit status %d: %s", code, out)
	}
	r, err := ledger.ReadOnly(filepath.Join(s.dir, "ledger.db"))
	must(t, err)
	defer r.Close()
	for e, err := range r.Entries(t.Context(), 0, stockEntries) {
		must(t, err)
		s.leaves = append(s.leaves, e.Leaf)
	}
	return s
}

// fill appends n entries that say word to the ledger in dir.
func (s *stock) fill(dir, logKey, word string, n int) {
	s.t.Helper()
	o := ledger.Options{Dir: dir, RecheckEvery: -1}
	var err error
	o.Signer, o.Verifier, err = readLogKey(logKey)
	must(s.t, err)
	o.PrivacyKey, err = readPrivacyKey(s.privacyKey)
	must(s.t, err)
	l, err := ledger.Open(s.t.Context(), o)
	must(s.t, err)
	var lines [][]byte
	for i := range n {
		e := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()),
			Agent: "spiffe://tamper.example/orchestrator/demo/run/r/step/s", Orchestrator: "demo", Run: "r", Step: fmt.Sprintf("s-%d", i),
		}}
		e.SetDetails(map[string]string{"rows": word})
		line, err := e.Marshal()
		must(s.t, err)
		lines = append(lines, line)
	}
	for batch := range slices.Chunk(lines, 50) {
		_, err = l.Append(s.t.Context(), ledger.Author{Name: "broker-1"}, batch)
		must(s.t, err)
	}
	must(s.t, l.Close())
}

// copy returns a copy of the ledger's directory.
func (s *stock) copy(t *testing.T) string {
	dir := filepath.Join(t.TempDir(), "ledger")
	must(t, os.CopyFS(dir, os.DirFS(s.dir)))
	return dir
}

func (s *stock) verify(at string, args ...string) (int, string) {
	s.t.Helper()
	cmd := countersign(s.t, append([]string{"verify", at, "--key", s.pub}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// recorder is a recorder under test, as a process.
type recorder struct {
	cmd  *exec.Cmd
	done <-chan struct{}
	log  string // file
}

// said is what it has said on stderr.
func (r *recorder) said(t *testing.T) string {
	b, err := os.ReadFile(r.log)
	must(t, err)
	return string(b)
}

func (r *recorder) runs(t *testing.T) {
	t.Helper()
	eventually(t, "the recorder runs", func() bool { return strings.Contains(r.said(t), `"recording"`) })
}

// ends waits for its end and returns its exit status.
func (r *recorder) ends(t *testing.T) int {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("the recorder still runs: %s", r.said(t))
	}
	return r.cmd.ProcessState.ExitCode()
}

// record starts a recorder over dir. It ends with the test.
func (s *stock) record(t *testing.T, dir, more string) *recorder {
	t.Helper()
	config := filepath.Join(t.TempDir(), "record.yaml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, "listen: {addr: \"127.0.0.1:0\"}\ndir: %q\nlog_key: %q\nprivacy_key: %q\ntokens: %q\n%s", dir, s.logKey, s.privacyKey, s.toks, more), 0o600))
	r := &recorder{cmd: countersign(t, "record", "--config", config), log: config + ".log"}
	log, err := os.Create(r.log)
	must(t, err)
	defer log.Close()
	r.cmd.Stderr = log
	r.done, err = vaultdev.Run(r.cmd)
	must(t, err)
	t.Cleanup(func() {
		_ = r.cmd.Process.Kill()
		<-r.done
	})
	return r
}

// refuses checks that no recorder starts over dir.
func (s *stock) refuses(t *testing.T, dir string) {
	t.Helper()
	r := s.record(t, dir, "")
	code := r.ends(t)
	if said := r.said(t); code != 1 || !strings.Contains(said, "countersign: ledger mismatch") || strings.Contains(said, `"recording"`) {
		t.Errorf("record: exit status %d: %s", code, said)
	}
}

// alter changes a ledger's database as someone with write access to its file
// would: without its triggers, which are put back when it is done.
func alter(t *testing.T, dir string, fn func(exec func(q string, args ...any))) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "ledger.db")+"?_pragma=busy_timeout(10000)")
	must(t, err)
	defer db.Close()
	db.SetMaxOpenConns(1) // for temporary tables
	exec := func(q string, args ...any) {
		t.Helper()
		if _, err := db.Exec(q, args...); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
	rows, err := db.Query(`SELECT name, sql FROM sqlite_master WHERE type = 'trigger'`)
	must(t, err)
	triggers := map[string]string{}
	for rows.Next() {
		var name, text string
		must(t, rows.Scan(&name, &text))
		triggers[name] = text
	}
	must(t, rows.Err())
	rows.Close()
	for name := range triggers {
		exec("DROP TRIGGER " + name)
	}
	fn(exec)
	for _, text := range triggers {
		exec(text)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryTamperingIsNamedByVerifyAndStopsTheRecorder(t *testing.T) {
	s := newStock(t)
	type exec = func(q string, args ...any)
	database := func(fn func(exec)) func(*testing.T, string) {
		return func(t *testing.T, dir string) { alter(t, dir, fn) }
	}
	type tampering struct {
		do   func(t *testing.T, dir string)
		want string // in what verify says
	}
	all := map[string]tampering{
		"a row removed":                 {database(func(e exec) { e("DELETE FROM entries WHERE idx = 17") }), "problem: missing: entry 17:"},
		"a row removed with its hashes": {database(func(e exec) { e("DELETE FROM entries WHERE idx = 17"); e("DELETE FROM hashes WHERE idx = 17") }), "problem: missing: entry 17:"},
		"the tail cut, with checkpoints": {database(func(e exec) {
			e("DELETE FROM entries WHERE idx >= 200")
			e("DELETE FROM hashes WHERE idx >= 200")
			e("DELETE FROM checkpoints WHERE size > 200")
		}), "problem: rollback: the log has 200 entries, but an earlier checkpoint signed 300"},
		"the tail cut under its checkpoint": {database(func(e exec) { e("DELETE FROM entries WHERE idx = 299"); e("DELETE FROM hashes WHERE idx = 299") }), "problem: missing: entry 299:"},
		"two rows swapped": {database(func(e exec) {
			e("UPDATE entries SET idx = -1 WHERE idx = 40")
			e("UPDATE entries SET idx = 40 WHERE idx = 41")
			e("UPDATE entries SET idx = 41 WHERE idx = -1")
		}), "problem: leaf-mismatch: entry 40:"},
		"two rows swapped with their leaf hashes": {database(func(e exec) {
			e("UPDATE entries SET idx = -1 WHERE idx = 40")
			e("UPDATE entries SET idx = 40 WHERE idx = 41")
			e("UPDATE entries SET idx = 41 WHERE idx = -1")
			e("CREATE TEMP TABLE leaf AS SELECT idx, substr(nodes, 1, 32) AS h FROM hashes WHERE idx IN (40, 41)")
			e("UPDATE hashes SET nodes = CAST((SELECT h FROM leaf WHERE leaf.idx = 81 - hashes.idx) || substr(nodes, 33) AS BLOB) WHERE idx IN (40, 41)")
		}), "problem: root-mismatch:"},
		"an entry changed and the tree rebuilt over it": {func(t *testing.T, dir string) {
			leaves := slices.Clone(s.leaves)
			leaves[17] = bytes.Replace(leaves[17], []byte(`"rows":"one"`), []byte(`"rows":"two"`), 1)
			alter(t, dir, func(e exec) {
				e("UPDATE entries SET body = ? WHERE idx = 17", string(leaves[17]))
				for i, nodes := range tree(t, leaves) {
					e("UPDATE hashes SET nodes = ? WHERE idx = ?", nodes, i)
				}
			})
		}, "problem: root-mismatch:"},
		"the whole log rebuilt under another key": {func(t *testing.T, dir string) {
			key := filepath.Join(t.TempDir(), "key")
			text, _, err := note.GenerateKey(nil, "tamper.example/log")
			must(t, err)
			must(t, os.WriteFile(key, []byte(text), 0o600))
			must(t, os.RemoveAll(dir))
			s.fill(dir, key, "two", stockEntries)
		}, "problem: checkpoint: not signed by the key of tamper.example/log"},
		"an older, validly signed copy put back": {func(t *testing.T, dir string) {
			b, err := os.ReadFile(s.earlier)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "ledger.db"), b, 0o600))
		}, "problem: rollback: the log has 200 entries, but an earlier checkpoint signed 300"},
		"a file that is no database any more": {func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "ledger.db"), []byte("not a database at all"), 0o600))
		}, "ledger mismatch: the database file is damaged"},
	}
	// Bytes of an entry, straight in the file.
	const entry = 217
	whole, err := os.ReadFile(filepath.Join(s.dir, "ledger.db"))
	must(t, err)
	at := bytes.Index(whole, s.leaves[entry])
	if at < 0 {
		t.Fatal("the entry is not whole in the file")
	}
	for i := 0; i < len(s.leaves[entry]); i += 29 {
		all[fmt.Sprintf("byte %d of an entry, %q", i, s.leaves[entry][i])] = tampering{func(t *testing.T, dir string) {
			b := bytes.Clone(whole)
			b[at+i] ^= 1
			must(t, os.WriteFile(filepath.Join(dir, "ledger.db"), b, 0o600))
		}, fmt.Sprintf("problem: leaf-mismatch: entry %d:", entry)}
	}

	for name, x := range all {
		t.Run(name, func(t *testing.T) {
			dir := s.copy(t)
			x.do(t, dir)
			if code, out := s.verify(dir, "--since", s.seen); code != exitProblem || !strings.Contains(out, x.want) || !strings.Contains(out, "countersign: ") {
				t.Errorf("verify: exit status %d, want 1 and %q: %s", code, x.want, out)
			}
			s.refuses(t, dir)
		})
	}
}

// tree returns the stored hashes of leaves, by row.
func tree(t *testing.T, leaves [][]byte) (rows [][]byte) {
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var hs []tlog.Hash
		for _, i := range indexes {
			hs = append(hs, stored[i])
		}
		return hs, nil
	})
	for i, leaf := range leaves {
		hs, err := tlog.StoredHashes(int64(i), leaf, read)
		must(t, err)
		stored = append(stored, hs...)
		var row []byte
		for _, h := range hs {
			row = append(row, h[:]...)
		}
		rows = append(rows, row)
	}
	return rows
}

func TestAnUntouchedLedgerStartsAndVerifiesWhileItsRecorderRunsAndAfterAKill(t *testing.T) {
	s := newStock(t)
	r := s.record(t, s.dir, "")
	r.runs(t)
	verifies := func(when string) {
		t.Helper()
		for _, at := range []string{s.dir, filepath.Join(s.dir, "ledger.db")} {
			if code, out := s.verify(at, "--since", s.seen); code != 0 || !strings.Contains(out, "continues the earlier checkpoint of size 300") {
				t.Errorf("%s, %s: exit status %d: %s", when, at, code, out)
			}
		}
	}
	verifies("while it runs")
	must(t, r.cmd.Process.Signal(syscall.SIGKILL))
	r.ends(t)
	verifies("after a kill")
	r = s.record(t, s.dir, "")
	r.runs(t)
	must(t, r.cmd.Process.Signal(syscall.SIGTERM))
	if code := r.ends(t); code != 0 || strings.Contains(r.said(t), "mismatch") {
		t.Errorf("exit status %d: %s", code, r.said(t))
	}
	verifies("after its end")

	if code, out := s.verify(filepath.Join(s.dir, "nothing")); code != exitUnchecked {
		t.Errorf("a path where nothing is: exit status %d: %s", code, out)
	}
}

func TestARunningRecorderStopsWhenAnOldRowIsAltered(t *testing.T) {
	s := newStock(t)
	change := func(e func(string, ...any)) {
		e(`UPDATE entries SET body = replace(body, '"rows":"one"', '"rows":"two"') WHERE idx = 17`)
	}
	stops := func(t *testing.T, r *recorder) {
		t.Helper()
		code := r.ends(t)
		last := strings.TrimSpace(r.said(t))
		last = last[strings.LastIndexByte(last, '\n')+1:]
		if code != 1 || !strings.HasPrefix(last, "countersign: ") || !strings.Contains(last, "ledger mismatch: entry 17 ") {
			t.Errorf("exit status %d: %s", code, r.said(t))
		}
	}
	t.Run("while it runs", func(t *testing.T) {
		dir := s.copy(t)
		r := s.record(t, dir, fmt.Sprintf("check_newest: %d\nrecheck: 100ms\n", stockNewest))
		r.runs(t)
		eventually(t, "a first pass found nothing", func() bool { return strings.Contains(r.said(t), "the whole ledger was checked") })
		alter(t, dir, change)
		stops(t, r)
	})
	t.Run("before it starts, further back than it looks", func(t *testing.T) {
		dir := s.copy(t)
		alter(t, dir, change)
		stops(t, s.record(t, dir, fmt.Sprintf("check_newest: %d\n", stockNewest)))
	})
}
