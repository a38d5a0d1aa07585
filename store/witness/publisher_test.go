package witness

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/mod/sumdb/note"
)

// publishing opens a ledger in dir that is published with cosignatures.
func publishing(t testing.TB, k *logKey, dir string, c PublisherConfig) *ledger.Ledger {
	t.Helper()
	c.Key, c.Every, c.Agent = k.vkey, 10*time.Millisecond, "spiffe://example.test/recorder/recorder"
	return openLedger(t, k, dir, func(ctx context.Context, l *ledger.Ledger) {
		c.Record = record(l)
		p, err := NewPublisher(c)
		if err != nil {
			t.Error(err)
			return
		}
		p.Run(ctx, l)
	})
}

// cosigners counts the witnesses whose cosignature is on a checkpoint.
func cosigners(signed string, ws ...*running) (n int) {
	for _, w := range ws {
		if _, err := note.Open([]byte(signed), note.VerifierList(w.signer.Verifier())); err == nil {
			n++
		}
	}
	return n
}

func clients(t testing.TB, k *logKey, ws ...*running) (list []*Client) {
	for _, w := range ws {
		list = append(list, w.client(t, k))
	}
	return list
}

func quorum(t testing.TB, n int, cs []*Client) torchwood.Policy {
	t.Helper()
	p, err := Quorum(n, cs)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAPublishedCheckpointCarriesEachWitnesssCosignature(t *testing.T) {
	k := newLogKey(t)
	w1, w2 := newWitness(t, "witness.example/w1", k), newWitness(t, "witness.example/w2", k)
	l := publishing(t, k, t.TempDir(), PublisherConfig{Witnesses: clients(t, k, w1, w2)})
	for range 3 {
		appendEntries(t, l, 3)
		eventually(t, "both cosignatures", func() bool {
			n, _ := store.CheckpointSize(l.Published())
			return n == l.Size() && cosigners(l.Published(), w1, w2) == 2
		})
		// It is a checkpoint of the log like any other to who does not know the witnesses.
		if c, err := k.verifier.Checkpoint(l.Published()); err != nil || c.N != l.Size() {
			t.Fatalf("%v %v", c, err)
		}
		if !strings.HasPrefix(l.Published(), l.Head()) {
			t.Fatalf("published %q, signed %q", l.Published(), l.Head())
		}
	}
	if n := strings.Count(l.Published(), "— "); n != 3 {
		t.Fatalf("%d signatures: %s", n, l.Published())
	}
}

func TestWhoeverReadsACheckpointFindsTheCosignaturesOnIt(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	l := publishing(t, k, t.TempDir(), PublisherConfig{Witnesses: clients(t, k, w), patience: time.Minute})
	appendEntries(t, l, 1)
	for size := l.Size() + 1; size < 20; size++ {
		appendEntries(t, l, 1)
		eventually(t, "published", func() bool { n, _ := store.CheckpointSize(l.Published()); return n >= size })
		if cosigners(l.Published(), w) != 1 {
			t.Fatalf("published without its cosignature: %s", l.Published())
		}
	}
}

// stuck takes connections and never answers.
func stuck(t testing.TB) *httptest.Server {
	done := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-done:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { close(done); s.Close() })
	return s
}

func TestAWitnessThatIsDownDelaysNobody(t *testing.T) {
	k := newLogKey(t)
	up := newWitness(t, "witness.example/w1", k)
	hangs, err := NewClient(stuck(t).URL, newSigner(t, "witness.example/w2").Verifier().String(), k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	refuses, err := NewClient("http://127.0.0.1:1", newSigner(t, "witness.example/w3").Verifier().String(), k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	l := publishing(t, k, t.TempDir(), PublisherConfig{Witnesses: []*Client{hangs, refuses, up.client(t, k)}})
	for range 5 {
		appendEntries(t, l, 1)
		start := time.Now()
		eventually(t, "a checkpoint with the cosignature of the witness that is up", func() bool {
			n, _ := store.CheckpointSize(l.Published())
			return n == l.Size() && cosigners(l.Published(), up) == 1
		})
		if d := time.Since(start); d > timeout/2 {
			t.Fatalf("it took %v", d)
		}
	}
}

func TestACheckpointIsWithheldUntilThePolicyIsMet(t *testing.T) {
	k := newLogKey(t)
	w1, w2 := newWitness(t, "witness.example/w1", k), newWitness(t, "witness.example/w2", k)
	var open atomic.Bool // whether the second witness can be reached
	gate := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !open.Load() {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		w2.addCheckpoint(w, r)
	}))
	t.Cleanup(gate.Close)
	second, err := NewClient(gate.URL, w2.signer.Verifier().String(), k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	cs := []*Client{w1.client(t, k), second}
	dir := t.TempDir()
	c := PublisherConfig{Witnesses: cs, Policy: quorum(t, 2, cs), Withhold: true, File: filepath.Join(dir, "published")}
	l := publishing(t, k, dir, c)
	appendEntries(t, l, 5) // no append waits for a witness
	eventually(t, "the first witness is at the head", func() bool {
		heads := get[[]Head](t, w1.url+"/logs")
		return len(heads) == 1 && heads[0].Size == 5
	})
	if l.Published() != "" {
		t.Fatalf("published under one cosignature of two: %q", l.Published())
	}
	open.Store(true)
	eventually(t, "the policy is met", func() bool { return cosigners(l.Published(), w1, w2) == 2 })

	open.Store(false)
	before := l.Published()
	appendEntries(t, l, 5)
	eventually(t, "the first witness is at the new head", func() bool { return get[[]Head](t, w1.url+"/logs")[0].Size == 10 })
	if l.Published() != before {
		t.Fatalf("published %q", l.Published())
	}
	// A restart shows what was shown before, and no more.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = publishing(t, k, dir, c)
	eventually(t, "the checkpoint before is published again", func() bool { return l.Published() == before })
	open.Store(true)
	eventually(t, "the new head is cosigned by both", func() bool {
		n, _ := store.CheckpointSize(l.Published())
		return n == 10 && cosigners(l.Published(), w1, w2) == 2
	})
}

func TestALedgerThatIsOpenedAnewIsPublishedAnew(t *testing.T) {
	for _, withhold := range []bool{false, true} {
		t.Run(fmt.Sprint("withhold ", withhold), func(t *testing.T) {
			k := newLogKey(t)
			w := newWitness(t, "witness.example/w1", k)
			var hangs atomic.Bool
			asked := make(chan struct{}, 100)
			gate := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
				if hangs.Load() {
					_, _ = io.Copy(io.Discard, r.Body) // so that the server notices when the caller goes
					asked <- struct{}{}
					<-r.Context().Done()
					return
				}
				w.addCheckpoint(out, r)
			}))
			t.Cleanup(gate.Close)
			client, err := NewClient(gate.URL, w.signer.Verifier().String(), k.verifier, nil)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			c := PublisherConfig{Key: k.vkey, Every: 10 * time.Millisecond, Agent: "spiffe://example.test/recorder/recorder", Witnesses: []*Client{client}}
			if withhold {
				c.Withhold, c.Policy, c.File = true, quorum(t, 1, c.Witnesses), filepath.Join(dir, "published")
			}
			var l *ledger.Ledger
			c.Record = func(ctx context.Context, s *store.Submission) error { return record(l)(ctx, s) }
			p, err := NewPublisher(c)
			if err != nil {
				t.Fatal(err)
			}
			again := func() {
				t.Helper()
				l = openLedger(t, k, dir, func(ctx context.Context, l *ledger.Ledger) { p.Run(ctx, l) })
			}
			cosigned := func() bool {
				n, _ := store.CheckpointSize(l.Published())
				return n == l.Size() && cosigners(l.Published(), w) == 1
			}
			again()
			appendEntries(t, l, 3)
			eventually(t, "published", cosigned)
			l.Close()
			again() // nothing is new
			eventually(t, "published again", cosigned)
			hangs.Store(true)
			appendEntries(t, l, 3)
			<-asked
			l.Close() // in the middle of an ask
			hangs.Store(false)
			again()
			eventually(t, "published after a broken-off ask", cosigned)
		})
	}
}

func TestWhatWasPublishedIsNotPublishedAgainOnceThePolicyIsStricter(t *testing.T) {
	k := newLogKey(t)
	w1, w2 := newWitness(t, "witness.example/w1", k), newWitness(t, "witness.example/w2", k)
	dir := t.TempDir()
	cs := clients(t, k, w1)
	c := PublisherConfig{Witnesses: cs, Policy: quorum(t, 1, cs), Withhold: true, File: filepath.Join(dir, "published")}
	l := publishing(t, k, dir, c)
	appendEntries(t, l, 1)
	eventually(t, "published", func() bool { return l.Published() != "" })
	l.Close()

	down, err := NewClient("http://127.0.0.1:1", w2.signer.Verifier().String(), k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.WarnLevel)
	c.Witnesses = append(cs, down)
	c.Policy, c.Log = quorum(t, 2, c.Witnesses), zap.New(core)
	l = publishing(t, k, dir, c)
	eventually(t, "the second witness was asked", func() bool { return logs.FilterMessage("no cosignature").Len() > 0 })
	if l.Published() != "" {
		t.Fatalf("published %q", l.Published())
	}
	if logs.FilterMessage("the checkpoint published last is not published again").Len() != 1 {
		t.Fatal("nothing was said of it")
	}
}

// A quorum of witnesses each slower than the log is published is met all the
// same: the candidate waits for them.
func TestSlowWitnessesCosignTheSameCheckpoint(t *testing.T) {
	k := newLogKey(t)
	w1, w2 := newWitness(t, "witness.example/w1", k), newWitness(t, "witness.example/w2", k)
	slow := func(w *running, d time.Duration) *Client {
		s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(d):
			case <-r.Context().Done():
			}
			w.addCheckpoint(rw, r)
		}))
		t.Cleanup(s.Close)
		c, err := NewClient(s.URL, w.signer.Verifier().String(), k.verifier, nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	cs := []*Client{slow(w1, 30*time.Millisecond), slow(w2, 75*time.Millisecond)}
	dir := t.TempDir()
	l := publishing(t, k, dir, PublisherConfig{Witnesses: cs, Policy: quorum(t, 2, cs), Withhold: true, File: filepath.Join(dir, "published")})
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				appendEntries(t, l, 1)
			}
		}
	}()
	sizes := map[int64]bool{}
	eventually(t, "three checkpoints under both cosignatures", func() bool {
		if signed := l.Published(); cosigners(signed, w1, w2) == 2 {
			n, _ := store.CheckpointSize(signed)
			sizes[n] = true
		}
		return len(sizes) >= 3
	})
	close(stop)
	<-ended
}

func TestACosignatureThatDoesNotVerifyIsNotAdopted(t *testing.T) {
	k := newLogKey(t)
	honest := newWitness(t, "witness.example/w1", k)
	liar := newSigner(t, "witness.example/w2")
	var asked atomic.Int32
	for name, answer := range map[string]func(signed string) string{
		"another key of the same name": func(signed string) string { return lines(t, signed, newSigner(t, "witness.example/w2")) },
		"a cosignature of another checkpoint": func(string) string {
			c := torchwood.Checkpoint{Origin: origin}
			c.N = 1
			return lines(t, c.String()+"\n", liar)
		},
		"no note":  func(string) string { return "thanks" },
		"nothing":  func(string) string { return "" },
		"too much": func(string) string { return strings.Repeat("— x AAAAAAAA\n", answerLimit/10) },
	} {
		t.Run(name, func(t *testing.T) {
			asked.Store(0)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				b := make([]byte, MaxBody)
				n := 0
				for {
					m, err := r.Body.Read(b[n:])
					if n += m; err != nil {
						break
					}
				}
				_, signed, _ := strings.Cut(string(b[:n]), "\n\n")
				fmt.Fprint(w, answer(signed))
			}))
			defer s.Close()
			c, err := NewClient(s.URL, liar.Verifier().String(), k.verifier, nil)
			if err != nil {
				t.Fatal(err)
			}
			l := publishing(t, k, t.TempDir(), PublisherConfig{Witnesses: []*Client{c, honest.client(t, k)}})
			appendEntries(t, l, 1)
			eventually(t, "the liar was asked twice, and the honest one cosigned", func() bool {
				n, _ := store.CheckpointSize(l.Published())
				return n == 1 && asked.Load() >= 2 && cosigners(l.Published(), honest) == 1
			})
			if strings.Contains(l.Published(), "witness.example/w2") {
				t.Fatalf("adopted: %s", l.Published())
			}
			if _, err := k.verifier.Checkpoint(l.Published()); err != nil {
				t.Fatal(err)
			}
			l.Close()
		})
		// Each case is a log of its own under one key, as far as the honest one is concerned.
		honest = newWitness(t, "witness.example/w1", k)
	}
}

// lines are s's signature lines over the text of signed.
func lines(t testing.TB, signed string, s note.Signer) string {
	text, _, _ := cutNote(signed + "\n")
	if i := strings.Index(signed, "\n\n"); i >= 0 {
		text = signed[:i+1]
	}
	b, err := note.Sign(&note.Note{Text: text}, s)
	if err != nil {
		t.Error(err)
		return ""
	}
	return string(b[len(text)+1:])
}

// alerts are the disputes on record in l.
func alerts(t testing.TB, l *ledger.Ledger) (list []AlertDetails) {
	t.Helper()
	page, err := l.History(context.Background(), ledger.Query{Type: string(store.AlertRaised)})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range page.Entries {
		e, err := store.ParseLeaf(h.Entry)
		if err != nil {
			t.Fatal(err)
		}
		d, err := store.DetailsAs[AlertDetails](e)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, d)
	}
	return list
}

func TestALogForkedAfterAWitnessedCheckpointIsCaughtWithBothHeads(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	one := t.TempDir()
	l := publishing(t, k, one, PublisherConfig{Witnesses: clients(t, k, w)})
	appendEntries(t, l, 10)
	eventually(t, "the common part is witnessed", func() bool { return cosigners(l.Published(), w) == 1 })
	l.Close()
	two := copyDir(t, one)

	// The same log, key and all, goes on in two places with other entries.
	first := publishing(t, k, one, PublisherConfig{Witnesses: clients(t, k, w)})
	appendEntries(t, first, 3)
	eventually(t, "the first is witnessed", func() bool {
		n, _ := store.CheckpointSize(first.Published())
		return n == 13 && cosigners(first.Published(), w) == 1
	})
	core, logs := observer.New(zap.ErrorLevel)
	second := openLedger(t, k, two, nil)
	appendEntries(t, second, 5) // in the dark, 15 entries
	second.Close()
	second = publishing(t, k, two, PublisherConfig{Witnesses: clients(t, k, w), Log: zap.New(core)})
	eventually(t, "the fork is on record", func() bool { return len(alerts(t, second)) == 1 })
	shown := second.Published()

	a := alerts(t, second)[0]
	if a.Alert != Forked || !a.Proved || a.Witness != "witness.example/w1" || a.Size != 13 {
		t.Fatalf("%+v", a)
	}
	ours, err1 := k.verifier.Checkpoint(a.Ours)
	theirs, err2 := k.verifier.Checkpoint(a.Theirs)
	if err1 != nil || err2 != nil || ours.N != 15 || theirs.N != 13 {
		t.Fatalf("%v %v %v %v", ours, theirs, err1, err2)
	}
	if root, err := first.Root(context.Background(), 13); err != nil || root != theirs.Hash {
		t.Fatal("the witness's head is not the first log's", err)
	}
	if root, err := second.Root(context.Background(), 13); err != nil || root == theirs.Hash {
		t.Fatal("the witness's head is of the second log too", err)
	}
	if logs.FilterField(zap.Bool("proved", true)).Len() == 0 {
		t.Fatal("not logged as an error")
	}
	// The witness has the two signed notes as well.
	forks := get[[]Fork](t, w.url+"/forks")
	if len(forks) == 0 || forks[0].Kept != a.Theirs || forks[0].Shown != a.Ours {
		t.Fatalf("evidence at the witness: %+v", forks)
	}
	// The second is never cosigned and publishes nothing more; the alert is raised once.
	appendEntries(t, second, 3)
	asked := logs.FilterField(zap.Bool("proved", true)).Len()
	eventually(t, "the witness was asked again", func() bool { return logs.FilterField(zap.Bool("proved", true)).Len() >= asked+2 })
	if second.Published() != shown || cosigners(second.Published(), w) != 0 {
		t.Fatalf("published %q after %q", second.Published(), shown)
	}
	if n := len(alerts(t, second)); n != 1 {
		t.Fatalf("%d alerts", n)
	}
	appendEntries(t, first, 1)
	eventually(t, "the first goes on", func() bool {
		n, _ := store.CheckpointSize(first.Published())
		return n == 14 && cosigners(first.Published(), w) == 1
	})
}

func TestARecorderRestoredFromAnOldBackupIsNoticedByTheWitness(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	dir := t.TempDir()
	l := publishing(t, k, dir, PublisherConfig{Witnesses: clients(t, k, w)})
	appendEntries(t, l, 4)
	l.Close()
	backup := copyDir(t, dir) // head file and all: the recorder itself cannot tell
	l = publishing(t, k, dir, PublisherConfig{Witnesses: clients(t, k, w)})
	appendEntries(t, l, 4)
	eventually(t, "witnessed", func() bool {
		n, _ := store.CheckpointSize(l.Published())
		return n == 8 && cosigners(l.Published(), w) == 1
	})
	witnessed := get[[]Head](t, w.url+"/logs")[0].Checkpoint
	l.Close()

	core, logs := observer.New(zap.ErrorLevel)
	l = publishing(t, k, backup, PublisherConfig{Witnesses: clients(t, k, w), Log: zap.New(core)})
	eventually(t, "the rollback is on record", func() bool { return len(alerts(t, l)) == 1 })
	a := alerts(t, l)[0]
	if a.Alert != RolledBack || !a.Proved || a.Size != 8 || a.Theirs != witnessed {
		t.Fatalf("%+v", a)
	}
	if logs.Len() == 0 {
		t.Fatal("not logged as an error")
	}
	published := l.Published()
	appendEntries(t, l, 1)
	n := logs.Len()
	eventually(t, "the witness was asked again", func() bool { return logs.Len() > n })
	if l.Published() != published || cosigners(l.Published(), w) != 0 {
		t.Fatalf("published %q", l.Published())
	}
}

func TestAPolicyThatCannotBeMetIsRefused(t *testing.T) {
	k := newLogKey(t)
	w1, w2 := newWitness(t, "witness.example/w1", k), newWitness(t, "witness.example/w2", k)
	both := clients(t, k, w1, w2)
	text := "log " + k.vkey + "\nwitness a " + w1.signer.Verifier().String() + "\nwitness b " + w2.signer.Verifier().String() + "\ngroup both all a b\nquorum both\n"
	policy, err := torchwood.ParsePolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rec := func(context.Context, *store.Submission) error { return nil }
	base := PublisherConfig{Key: k.vkey, Policy: policy, Withhold: true, File: "published", Record: rec}
	base.Witnesses = both
	if _, err := NewPublisher(base); err != nil {
		t.Fatalf("a policy that two of two meet: %v", err)
	}
	base.Witnesses = both[:1]
	if _, err := NewPublisher(base); err == nil || !strings.Contains(err.Error(), "cannot be met") {
		t.Fatalf("one of two: %v", err)
	}
	base.Witnesses = append(both[:2:2], w1.client(t, k))
	if _, err := NewPublisher(base); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Fatalf("one witness twice: %v", err)
	}
	if _, err := Quorum(3, both); err == nil {
		t.Fatal("three of two")
	}
}
