package evidence

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	_ "modernc.org/sqlite"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// entriesInTests fill two bundles and part of a third, and two tile levels.
const entriesInTests = 600

// stock makes a ledger of entriesInTests entries. It returns its options, the
// log's key, and a checkpoint signed at half of them.
func stock(t *testing.T) (ledger.Options, *store.LogVerifier, string) {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "evidence.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	key, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	o := ledger.Options{Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1}
	l, err := ledger.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var half string
	for i := 0; i < entriesInTests; i += 50 {
		var lines [][]byte
		for j := range 50 {
			s := &store.Submission{Entry: store.Entry{
				V: store.Version, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()),
				Agent: "spiffe://evidence.example/orchestrator/demo/run/r/step/s", Orchestrator: "demo", Run: "r", Step: fmt.Sprintf("s-%d", i+j),
			}}
			s.SetDetails(map[string]string{"rows": "one"})
			b, err := s.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			lines = append(lines, b)
		}
		if _, err := l.Append(t.Context(), ledger.Author{Name: "broker-1"}, lines); err != nil {
			t.Fatal(err)
		}
		if i == entriesInTests/2 {
			half = l.Head()
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return o, key, half
}

// check verifies the database in dir.
func check(t *testing.T, dir string, key *store.LogVerifier, since string) *Report {
	t.Helper()
	db, err := OpenDatabase(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	r, err := Verify(t.Context(), db, Options{Log: key, Since: since})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// alter changes a ledger's database as someone with write access to its file
// would: without its triggers.
func alter(t *testing.T, dir string, statements ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query(`SELECT name FROM sqlite_master WHERE type = 'trigger'`)
	if err != nil {
		t.Fatal(err)
	}
	var drop []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		drop = append(drop, `DROP TRIGGER "`+name+`"`)
	}
	for _, s := range append(drop, statements...) {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func TestAnUntouchedLogVerifiesAndContinuesAnEarlierCheckpoint(t *testing.T) {
	o, key, half := stock(t)
	r := check(t, o.Dir, key, half)
	if !r.OK() || r.Size != entriesInTests || r.Leaves != entriesInTests || r.Since == 0 {
		t.Fatalf("%+v", r)
	}
}

func TestTamperingWithTheDatabaseIsFoundAndNamed(t *testing.T) {
	o, key, half := stock(t)
	for _, tt := range []struct {
		name   string
		change []string
		kind   string
		index  int64
	}{
		{"a byte of an entry changed", []string{`UPDATE entries SET body = replace(body, '"rows":"one"', '"rows":"two"') WHERE idx = 17`}, KindLeaf, 17},
		{"a byte of the last entry changed", []string{`UPDATE entries SET body = replace(body, '"rows":"one"', '"rows":"two"') WHERE idx = 599`}, KindLeaf, 599},
		{"a row removed", []string{`DELETE FROM entries WHERE idx = 300`}, KindMissing, 300},
		{"a row removed with its hashes", []string{`DELETE FROM entries WHERE idx = 300`, `DELETE FROM hashes WHERE idx = 300`}, KindMissing, 300},
		{"two rows swapped", []string{
			`CREATE TEMP TABLE two AS SELECT idx, body FROM entries WHERE idx IN (40, 41)`,
			`UPDATE entries SET body = json_set(body, '$.id', 'x' || idx) WHERE idx IN (40, 41)`,
			`UPDATE entries SET body = (SELECT body FROM two WHERE two.idx = 81 - entries.idx) WHERE idx IN (40, 41)`}, KindLeaf, 40},
		{"the tail cut off, checkpoints and all", []string{`DELETE FROM entries WHERE idx >= 200`, `DELETE FROM hashes WHERE idx >= 200`, `DELETE FROM checkpoints WHERE size > 200`}, KindRollback, NoIndex},
		{"the tail cut off under the last checkpoint", []string{`DELETE FROM entries WHERE idx >= 590`, `DELETE FROM hashes WHERE idx >= 590`}, KindMissing, 590},
		{"a byte of a hash changed", []string{`UPDATE hashes SET nodes = zeroblob(length(nodes)) WHERE idx = 100`}, KindLeaf, 100},
		{"the checkpoint's signature changed", []string{`UPDATE checkpoints SET note = substr(note, 1, length(note) - 6) || 'AAAA=' || char(10) WHERE size = 600`}, KindCheckpoint, NoIndex},
		{"all checkpoints removed", []string{`DELETE FROM checkpoints`}, KindCheckpoint, NoIndex},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(o.Dir)); err != nil {
				t.Fatal(err)
			}
			alter(t, dir, tt.change...)
			r := check(t, dir, key, half)
			for _, f := range r.Findings {
				if f.Kind == tt.kind && f.Index == tt.index {
					return
				}
			}
			t.Fatalf("no finding %s at %d among %v", tt.kind, tt.index, r.Findings)
		})
	}
}

// rebuild writes a database anew around changed entries, hashes and all, and
// signs it with signer.
func rebuild(t *testing.T, o ledger.Options, signer note.Signer, vkey string, change func(leaf []byte) []byte) string {
	t.Helper()
	db, err := OpenDatabase(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(o.Dir)); err != nil {
		t.Fatal(err)
	}
	var update []string
	for s, err := range db.r.Entries(t.Context(), 0, entriesInTests) {
		if err != nil {
			t.Fatal(err)
		}
		if leaf := change(s.Leaf); !bytes.Equal(leaf, s.Leaf) {
			update = append(update, fmt.Sprintf(`UPDATE entries SET body = '%s' WHERE idx = %d`, strings.ReplaceAll(string(leaf), "'", "''"), s.Index))
		}
	}
	// The tree over the changed leaves, as its maker would compute it.
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(ix []int64) ([]tlog.Hash, error) {
		var hs []tlog.Hash
		for _, x := range ix {
			hs = append(hs, stored[x])
		}
		return hs, nil
	})
	for s, err := range db.r.Entries(t.Context(), 0, entriesInTests) {
		if err != nil {
			t.Fatal(err)
		}
		hs, err := tlog.StoredHashes(s.Index, change(s.Leaf), read)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hs...)
		var nodes []byte
		for _, h := range hs {
			nodes = append(nodes, h[:]...)
		}
		update = append(update, fmt.Sprintf(`UPDATE hashes SET nodes = x'%x' WHERE idx = %d`, nodes, s.Index))
	}
	root, err := tlog.TreeHash(entriesInTests, read)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", signer.Name(), entriesInTests, root)}, signer)
	if err != nil {
		t.Fatal(err)
	}
	alter(t, dir, append(update, fmt.Sprintf(`UPDATE checkpoints SET note = '%s' WHERE size = %d`, signed, entriesInTests))...)
	return dir
}

func forge(leaf []byte) []byte {
	return bytes.Replace(leaf, []byte(`"step":"s-17"`), []byte(`"step":"s-99"`), 1)
}

func TestATreeRebuiltWithoutTheLogKeyIsFoundOut(t *testing.T) {
	o, key, half := stock(t)
	skey, vkey, _ := note.GenerateKey(rand.Reader, o.Signer.Name())
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	r := check(t, rebuild(t, o, signer, vkey, forge), key, half)
	if r.OK() || r.Findings[0].Kind != KindCheckpoint {
		t.Fatalf("findings %v", r.Findings)
	}
}

func TestATreeRebuiltWithTheLogKeyContradictsAnEarlierCheckpoint(t *testing.T) {
	o, key, half := stock(t)
	dir := rebuild(t, o, o.Signer, o.Verifier, forge)
	if r := check(t, dir, key, ""); !r.OK() {
		t.Fatalf("whoever holds the key can rewrite what nobody saw, but: %v", r.Findings)
	}
	r := check(t, dir, key, half)
	if r.OK() || r.Findings[0].Kind != KindFork {
		t.Fatalf("findings %v", r.Findings)
	}
}

func TestAnySingleByteChangedInTheRecordIsFound(t *testing.T) {
	o, key, half := stock(t)
	src, err := OpenDatabase(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	bent := &bend{Source: src}
	for index := int64(0); index < entriesInTests; index += 97 {
		for k := range 24 {
			at := 17*k + int(index)%17
			bent.index, bent.at, bent.bent = index, at, false
			r, err := Verify(t.Context(), bent, Options{Log: key, Since: half})
			if err != nil {
				t.Fatal(err)
			}
			if bent.bent && r.OK() {
				t.Fatalf("byte %d of entry %d changed unseen", at, index)
			}
		}
	}
}

// bend changes one byte of one entry.
type bend struct {
	Source
	index int64
	at    int
	bent  bool
}

func (b *bend) Entries(ctx context.Context, t tlog.Tile) ([][]byte, error) {
	leaves, err := b.Source.Entries(ctx, t)
	if i := b.index - t.N*256; err == nil && i >= 0 && i < int64(len(leaves)) && b.at < len(leaves[i]) {
		leaves[i] = bytes.Clone(leaves[i])
		leaves[i][b.at] ^= 1
		b.bent = true
	}
	return leaves, err
}
