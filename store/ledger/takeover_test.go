package ledger

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// load appends to whichever ledger is active, as brokers do: the same bytes
// again until they are acknowledged.
type load struct {
	t      *testing.T
	active atomic.Pointer[Ledger]
	stop   atomic.Bool
	wg     sync.WaitGroup
	mu     sync.Mutex
	acked  []acked
}

func startLoad(t *testing.T, l *Ledger) *load {
	w := &load{t: t}
	w.active.Store(l)
	for range 8 {
		w.wg.Go(func() {
			for !w.stop.Load() {
				s := used("load")
				s.Seal("reason", "because")
				b, err := s.Marshal()
				if err != nil {
					t.Error(err)
					return
				}
				for {
					a, err := w.active.Load().Append(context.Background(), broker, [][]byte{b})
					if err == nil {
						w.mu.Lock()
						w.acked = append(w.acked, acked{s.ID, a.Entries[0].Index, a.Checkpoint})
						w.mu.Unlock()
						break
					}
					if t.Failed() {
						return
					}
					if !errors.Is(err, store.ErrUnavailable) {
						t.Error(err)
						return
					}
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	t.Cleanup(w.end)
	return w
}

// end waits until everything is acknowledged.
func (w *load) end() {
	w.stop.Store(true)
	w.wg.Wait()
}

func (w *load) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// more waits for n further acknowledgements.
func (w *load) more(n int) {
	w.t.Helper()
	for was, end := w.count(), time.Now().Add(time.Minute); w.count() < was+n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%d more appends were not acknowledged", n)
		}
	}
}

// holds wants every acknowledged entry in the log once, at its index, under a
// head that continues the acknowledged ones, and nothing else.
func (f *fixture) holds(l *Ledger, all []acked, others int) {
	f.t.Helper()
	if l.Size() != int64(len(all)+others) {
		f.t.Errorf("%d entries, %d were acknowledged", l.Size(), len(all))
	}
	at := map[string]int64{}
	for s, err := range l.Entries(f.t.Context(), 0, l.Size()) {
		if err != nil {
			f.t.Fatal(err)
		}
		e, err := store.ParseLeaf(s.Leaf)
		if err != nil {
			f.t.Fatal(err)
		}
		if was, ok := at[e.ID]; ok {
			f.t.Fatalf("entry %s is on record at %d and at %d", e.ID, was, s.Index)
		}
		at[e.ID] = s.Index
	}
	for i, a := range all {
		if n, ok := at[a.ID]; !ok || n != a.Index {
			f.t.Fatalf("acknowledged entry %s at %d: found %t at %d", a.ID, a.Index, ok, n)
		}
		if i%20 == 0 {
			f.continues(l, a.Head)
		}
	}
	if err := l.recheck(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// lost waits until the ledger has stopped itself for want of its connection.
func (f *fixture) lost(l *Ledger) {
	f.t.Helper()
	select {
	case <-l.Done():
	case <-time.After(time.Minute):
		f.t.Fatal("it did not notice that its connection is gone")
	}
	if !errors.Is(l.Err(), ErrLost) || errors.Is(l.Err(), ErrMismatch) {
		f.t.Fatalf("stopped by %v", l.Err())
	}
	l.Close()
}

func TestAKilledPostgreSQLLosesAndDoublesNothingThatWasAcknowledged(t *testing.T) {
	sharedServer(t) // skips where there is none
	s, err := postgrestest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Remove()
	if err := query(s.DSN, "CREATE ROLE recorder LOGIN; CREATE ROLE owner LOGIN; GRANT CREATE ON DATABASE postgres TO owner"); err != nil {
		t.Fatal(err)
	}
	f := newFixture(t)
	f.on, f.o.Postgres, f.o.Now = onPostgres, newSchemaIn(t, s), time.Now
	l := f.open()
	w := startLoad(t, l)
	for range 3 {
		w.more(100)
		s.Kill()
		f.lost(l)
		if _, err := Open(t.Context(), f.o); !errors.Is(err, ErrLost) {
			t.Fatalf("opened while the server is down: %v", err)
		}
		f.o.Standby = true // waits for the server, too
		opened := f.opening()
		if err := s.Restart(); err != nil {
			t.Fatal(err)
		}
		l = f.opened(opened)
		f.o.Standby = false
		w.active.Store(l)
	}
	w.more(100)
	w.end()
	f.holds(l, w.acked, 0)
}

func TestARecorderThatStandsByTakesOverWhenTheActiveOneLosesItsSession(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	f.o.Now, f.o.KeysFile = time.Now, filepath.Join(t.TempDir(), "keys.db")
	l := f.open()
	f.append(l, used("first"))
	w := startLoad(t, l)
	for range 4 {
		other := f.beside()
		other.o.Dir, other.o.Standby = t.TempDir(), true
		copyFile(t, filepath.Join(f.o.Dir, "head"), filepath.Join(other.o.Dir, "head"))
		opened := other.opening()
		// It stands by with a head file of its own that follows.
		before := l.Size()
		w.more(50)
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			c, err := (&headFile{path: filepath.Join(other.o.Dir, "head")}).read(f.verify)
			if err == nil && c.N > before {
				break
			}
			if err != nil || time.Now().After(end) {
				t.Fatalf("the head file does not follow: %v", err)
			}
		}
		select {
		case o := <-opened:
			t.Fatalf("opened beside the active one: %v", o.err)
		default:
		}
		if err := query(f.superuser(), "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = hashtext('"+f.postgres().schema+"')::oid"); err != nil {
			t.Fatal(err)
		}
		f.lost(l)
		l = f.opened(opened)
		w.active.Store(l)
		f.o = other.o
		w.more(50)
	}
	w.end()
	f.holds(l, w.acked, 1)
}

func TestARecorderThatStandsByTakesOverFromAKilledProcess(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	skey := f.withKey()
	f.o.Now = time.Now
	first := f.o
	f.open().Close() // so that both have the log's first head
	if err := os.WriteFile(filepath.Join(first.Dir, "key"), []byte(skey+"\n"+f.o.Verifier), 0o600); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "COUNTERSIGN_TEST_APPEND="+first.Dir, "COUNTERSIGN_TEST_POSTGRES="+first.Postgres)
	child.Stderr = os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	f.o.Dir, f.o.KeysFile, f.o.Standby = t.TempDir(), filepath.Join(first.Dir, "details-keys.db"), true
	copyFile(t, filepath.Join(first.Dir, "head"), filepath.Join(f.o.Dir, "head"))
	var opened <-chan opening
	var all []acked
	in := bufio.NewScanner(out)
	for in.Scan() {
		var a acked
		if json.Unmarshal(in.Bytes(), &a) != nil {
			break // cut by the kill
		}
		if all = append(all, a); len(all) == 1 {
			opened = f.opening()
		}
		if len(all) == 300 {
			child.Process.Kill()
		}
	}
	child.Wait()
	if len(all) < 300 {
		t.Fatalf("only %d appends before the kill", len(all))
	}
	l := f.opened(opened)
	// What was committed and not acknowledged stays: its author would ask again.
	others := int(l.Size()) - len(all)
	if others < 0 || others > 8 {
		t.Fatalf("%d entries, %d were acknowledged", l.Size(), len(all))
	}
	f.holds(l, all, others)
	f.append(l, used("after"))
	e, err := l.History(t.Context(), Query{Run: "crash", Limit: 1})
	if err != nil || e.Entries[0].Opened["reason"] != "because" {
		t.Fatalf("the sealed texts do not open after the takeover: %v, %v", e, err)
	}
}

func TestARecorderThatStandsByRefusesALogThatDoesNotContinueItsHead(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	l := f.open()
	f.append(l, used("r1"), used("r2"))
	other := f.beside()
	other.o.Standby = true
	stands := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		l, err := Open(ctx, other.o)
		if err == nil {
			l.Close()
		}
		return err
	}
	other.o.Dir = t.TempDir()
	if err := stands(); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "is missing") {
		t.Fatalf("without a head file: %v", err)
	}
	// The same key signed another log, of the same size and of a larger one.
	for _, subs := range [][]*store.Submission{{used("x1")}, {used("x1"), used("x2")}, {used("x1"), used("x2"), used("x3")}} {
		g := newFixture(t)
		g.o.Signer, g.o.Verifier, g.verify = f.o.Signer, f.o.Verifier, f.verify
		fork := g.open()
		g.append(fork, subs...)
		fork.Close()
		other.o.Dir = t.TempDir()
		copyFile(t, filepath.Join(g.o.Dir, "head"), filepath.Join(other.o.Dir, "head"))
		if err := stands(); !errors.Is(err, ErrMismatch) {
			t.Fatalf("a fork of %d entries: %v", len(subs), err)
		}
	}
}

// opening is what Open in the background came to.
type opening struct {
	l   *Ledger
	err error
}

func (f *fixture) opening() <-chan opening {
	c := make(chan opening, 1)
	o := f.o
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		l, err := Open(ctx, o)
		c <- opening{l, err}
	}()
	return c
}

func (f *fixture) opened(c <-chan opening) *Ledger {
	f.t.Helper()
	o := <-c
	if o.err != nil {
		f.t.Fatal(o.err)
	}
	f.t.Cleanup(func() { o.l.Close() })
	return o.l
}

// continues wants the log of l to continue the checkpoint that was seen.
func (f *fixture) continues(l *Ledger, seen string) {
	f.t.Helper()
	was, err := f.verify.Checkpoint(seen)
	if err != nil {
		f.t.Fatal(err)
	}
	is, err := f.verify.Checkpoint(l.Head())
	if err != nil {
		f.t.Fatal(err)
	}
	p, err := l.Consistency(f.t.Context(), was.N, is.N)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := tlog.CheckTree(p, is.N, is.Hash, was.N, was.Hash); err != nil {
		f.t.Fatalf("the tree of %d is not part of the log: %v", was.N, err)
	}
}

// withKey gives f a key whose secret the test knows.
func (f *fixture) withKey() string {
	skey, vkey, err := note.GenerateKey(nil, origin)
	if err != nil {
		f.t.Fatal(err)
	}
	if f.o.Signer, err = note.NewSigner(skey); err != nil {
		f.t.Fatal(err)
	}
	f.o.Verifier = vkey
	if f.verify, err = store.NewLogVerifier(vkey); err != nil {
		f.t.Fatal(err)
	}
	return skey
}

// beside is another recorder of the same ledger.
func (f *fixture) beside() *fixture {
	return &fixture{t: f.t, on: f.on, o: f.o, verify: f.verify, now: f.clock()}
}
