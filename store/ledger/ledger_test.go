package ledger

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const origin = "log.example.test/ledger"

// fixture is a ledger with its keys and a clock.
type fixture struct {
	t      testing.TB
	on     engineName
	o      Options
	verify *store.LogVerifier
	mu     sync.Mutex
	now    time.Time
}

func newFixtureOn(t testing.TB, on engineName) *fixture {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, on: on, verify: v, now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	f.o = Options{
		Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32),
		Now: f.clock, RecheckEvery: -1, PublishEvery: 10 * time.Millisecond,
	}
	if on == onPostgres {
		f.o.Postgres = newSchema(t)
	}
	return f
}

func (f *fixture) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fixture) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

func (f *fixture) open() *Ledger {
	f.t.Helper()
	l, err := Open(context.Background(), f.o)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { l.Close() })
	return l
}

func (f *fixture) path() string { return filepath.Join(f.o.Dir, "ledger.db") }

var broker = Author{Name: "broker-1"}

// used is an entry that no order rule speaks of.
func used(run string) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: 1, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Unix(1_800_000_000, 0)),
		Agent: "spiffe://example.test/orchestrator/demo/run/" + run, Orchestrator: "demo", Run: run, Step: "s1", Request: "req_" + run,
		Resource: "postgres://orders", Action: "orders-db:read", Risk: &store.Risk{Sensitivity: "low"},
		Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:00", Reasons: []string{}},
	}}
	s.SetDetails(map[string]string{"note": "used"})
	return s
}

func wire(t testing.TB, subs ...*store.Submission) [][]byte {
	t.Helper()
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, b)
	}
	return lines
}

func (f *fixture) append(l *Ledger, subs ...*store.Submission) *store.Appended {
	f.t.Helper()
	a, err := l.Append(context.Background(), broker, wire(f.t, subs...))
	if err != nil {
		f.t.Fatal(err)
	}
	f.check(a)
	return a
}

// check verifies every receipt of a.
func (f *fixture) check(a *store.Appended) {
	f.t.Helper()
	for i := range a.Entries {
		if _, err := f.verify.Check(a.Receipt(i)); err != nil {
			f.t.Fatalf("entry %d: %v", a.Entries[i].Index, err)
		}
	}
}

func TestAppendedEntriesAreProvedAndSurviveARestart(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		var old *store.Appended
		for i := range 40 {
			f.advance(time.Second)
			a := f.append(l, used(fmt.Sprint("r", i)), used(fmt.Sprint("r", i)))
			if a.Entries[0].Index != int64(2*i) || a.Entries[1].Index != int64(2*i+1) {
				t.Fatalf("indexes %d and %d", a.Entries[0].Index, a.Entries[1].Index)
			}
			if i == 7 {
				old = a
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = f.open()
		if l.Size() != 80 {
			t.Fatalf("size %d after a restart", l.Size())
		}
		a := f.append(l, used("after"))
		if a.Entries[0].Index != 80 {
			t.Fatalf("index %d after a restart", a.Entries[0].Index)
		}
		was, err := f.verify.Checkpoint(old.Checkpoint)
		if err != nil {
			t.Fatal(err)
		}
		is, err := f.verify.Checkpoint(l.Head())
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.Consistency(t.Context(), was.N, is.N)
		if err != nil {
			t.Fatal(err)
		}
		if err := tlog.CheckTree(p, is.N, is.Hash, was.N, was.Hash); err != nil {
			t.Fatal(err)
		}
		n := int64(0)
		for s, err := range l.Entries(t.Context(), 0, l.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if s.Index != n {
				t.Fatalf("entry %d at %d", s.Index, n)
			}
			n++
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTheSameBytesAgainHaveTheSameIndexAndOtherBytesAreRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := used("r1")
		first := f.append(l, s)
		f.advance(time.Minute)
		f.append(l, used("r2"))
		again := f.append(l, s)
		if again.Entries[0].Index != first.Entries[0].Index || string(again.Entries[0].Leaf) != string(first.Entries[0].Leaf) {
			t.Fatal("the same bytes have another place")
		}
		if l.Size() != 2 {
			t.Fatalf("size %d", l.Size())
		}
		twice := used("r3")
		a := f.append(l, twice, twice)
		if a.Entries[0].Index != a.Entries[1].Index || l.Size() != 3 {
			t.Fatal("one entry twice in one append is not one entry")
		}
		other := *s
		other.Run = "other"
		fresh := used("r4")
		if _, err := l.Append(t.Context(), broker, wire(t, fresh, &other)); !errors.Is(err, store.ErrConflict) {
			t.Fatalf("other bytes under the same id: %v", err)
		}
		if _, err := l.Append(t.Context(), Author{Name: "broker-2"}, wire(t, s)); !errors.Is(err, store.ErrConflict) {
			t.Fatalf("another writer's id: %v", err)
		}
		if l.Size() != 3 {
			t.Fatal("part of a refused append is on record")
		}
	})
}

func TestOnlyOneRecorderOpensALedger(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		if _, err := Open(t.Context(), f.o); !errors.Is(err, ErrLocked) {
			t.Fatalf("a second one: %v", err)
		}
		l.Close()
		f.open()
	})
}

func TestFilesAreReadableByTheirOwnerAlone(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := used("r1")
		s.Seal("reason", "because")
		f.append(l, s)
		l.Close()
		files, err := os.ReadDir(f.o.Dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range files {
			i, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if i.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s has mode %v", e.Name(), i.Mode())
			}
		}
	})
}

// newFixture is one over SQLite.
func newFixture(t testing.TB) *fixture { return newFixtureOn(t, onSQLite) }
