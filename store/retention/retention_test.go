package retention_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/retention"
)

var by = ledger.Eraser{Name: "recorder", Agent: "spiffe://retention.example/recorder/recorder"}

// house is a ledger with a clock.
type house struct {
	t   *testing.T
	o   ledger.Options
	l   *ledger.Ledger
	now atomic.Int64 // seconds
}

func newHouse(t *testing.T) *house {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "retention.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t}
	h.now.Store(1_800_000_000)
	h.o = ledger.Options{Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1, Now: h.clock}
	h.open()
	t.Cleanup(func() { h.l.Close() })
	return h
}

func (h *house) open() {
	h.t.Helper()
	var err error
	if h.l, err = ledger.Open(context.Background(), h.o); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) clock() time.Time        { return time.Unix(h.now.Load(), 0) }
func (h *house) advance(d time.Duration) { h.now.Add(int64(d / time.Second)) }

func (h *house) file() string { return filepath.Join(h.o.Dir, "retention") }

func (h *house) retention(kept map[string]time.Duration) *retention.Retention {
	h.t.Helper()
	if err := retention.Announce(h.t.Context(), h.l, by, h.clock(), retention.Loaded{Kept: kept}); err != nil {
		h.t.Fatal(err)
	}
	r, err := retention.Open(h.t.Context(), retention.Config{Ledger: h.l, By: by, File: h.file(), Every: time.Hour})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { r.Close() })
	return r
}

func (h *house) append(author ledger.Author, subs ...*store.Submission) []int64 {
	h.t.Helper()
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			h.t.Fatal(err)
		}
		lines = append(lines, b)
	}
	a, err := h.l.Append(h.t.Context(), author, lines)
	if err != nil {
		h.t.Fatal(err)
	}
	var out []int64
	for _, p := range a.Entries {
		out = append(out, p.Index)
	}
	return out
}

func entry(class, scope, text string) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()),
		Agent: "spiffe://retention.example/orchestrator/demo/run/r/step/s", Orchestrator: "demo", Run: "r", Step: "s", Action: scope,
	}}
	if class != "" {
		s.Risk = &store.Risk{Sensitivity: class}
	}
	s.SetDetails(map[string]string{})
	s.Seal(store.SealedReason, text)
	return s
}

// texts are all that can be read, in order.
func (h *house) texts() (out []string) {
	h.t.Helper()
	q := ledger.Query{}
	for {
		p, err := h.l.History(h.t.Context(), q)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range p.Entries {
			if s := e.Opened[store.SealedReason]; s != "" {
				out = append(out, s)
			}
		}
		if q.Cursor = p.Next; q.Cursor == "" {
			return out
		}
	}
}

func (h *house) sweep(r *retention.Retention, want int) {
	h.t.Helper()
	if n, err := r.Sweep(h.t.Context()); err != nil || n != want {
		h.t.Fatalf("%d erased, want %d: %v", n, want, err)
	}
}

func TestEachSensitivityIsKeptItsOwnTimeAndTheTreeStillVerifies(t *testing.T) {
	h := newHouse(t)
	r := h.retention(map[string]time.Duration{"": 4 * time.Hour, "low": time.Hour, "sensitive": 3 * time.Hour, ledger.OfScope + "pay:read": 2 * time.Hour})
	h.append(ledger.Author{Name: "broker-1"}, entry("low", "a:read", "low"), entry("low", "pay:read", "of a scope"), entry("sensitive", "b:read", "sensitive"), entry("critical", "c:read", "critical"), entry("", "", "none"))
	for _, step := range []struct {
		after  time.Duration
		erased int
		left   string
	}{
		{59 * time.Minute, 0, "[low of a scope sensitive critical none]"},
		{61 * time.Minute, 1, "[of a scope sensitive critical none]"},
		{2*time.Hour + time.Minute, 1, "[sensitive critical none]"},
		{3*time.Hour + time.Minute, 1, "[critical none]"},
		{4*time.Hour + time.Minute, 1, "[critical]"},
		{10_000 * time.Hour, 0, "[critical]"},
	} {
		h.now.Store(1_800_000_000 + int64(step.after/time.Second))
		h.sweep(r, step.erased)
		if got := fmt.Sprint(h.texts()); got != step.left {
			t.Fatalf("after %s: %s, want %s", step.after, got, step.left)
		}
		h.sweep(r, 0)
	}
	if err := h.l.Close(); err != nil {
		t.Fatal(err)
	}
	key, err := store.NewLogVerifier(h.o.Verifier)
	if err != nil {
		t.Fatal(err)
	}
	db, err := evidence.OpenDatabase(h.o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	report, err := evidence.Verify(t.Context(), db, evidence.Options{Log: key})
	if err != nil || !report.OK() {
		t.Fatalf("%v %+v", err, report)
	}
}

func TestMoreThanOneBatchIsErasedInOneLook(t *testing.T) {
	h := newHouse(t)
	r := h.retention(map[string]time.Duration{"low": time.Hour})
	const n = store.MaxErased + 700
	for i := 0; i < n; i += 300 {
		var subs []*store.Submission
		for range 300 {
			subs = append(subs, entry("low", "a:read", "text"))
		}
		h.append(ledger.Author{Name: "broker-1"}, subs...)
	}
	h.advance(2 * time.Hour)
	h.sweep(r, n)
	if left := len(h.texts()); left != 0 {
		t.Fatalf("%d texts are left", left)
	}
	p, err := h.l.History(t.Context(), ledger.Query{Type: string(store.DetailsErased)})
	if err != nil || len(p.Entries) != 2 {
		t.Fatalf("%d erasures on record: %v", len(p.Entries), err)
	}
}

func TestWhatIsKeptIsOnRecordOnceAndAgainWhenItChanges(t *testing.T) {
	h := newHouse(t)
	loaded := func() (out []store.PolicyDetails) {
		p, err := h.l.History(t.Context(), ledger.Query{Type: string(store.PolicyLoaded)})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range p.Entries {
			e, err := store.ParseLeaf(x.Entry)
			if err != nil {
				t.Fatal(err)
			}
			d, err := store.DetailsAs[store.PolicyDetails](e)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, d)
		}
		return out
	}
	say := func(x retention.Loaded) {
		t.Helper()
		if err := retention.Announce(t.Context(), h.l, by, h.clock(), x); err != nil {
			t.Fatal(err)
		}
	}
	say(retention.Loaded{})
	if n := len(loaded()); n != 0 {
		t.Fatalf("%d of nothing", n)
	}
	first := retention.Loaded{Digest: "sha256:1", CatalogueDigest: "sha256:c", Catalogue: "scopes: []", Kept: map[string]time.Duration{"low": time.Hour}}
	say(first)
	say(first)
	// A broker's own is another's: it changes nothing.
	b := entry("", "policy.loaded", "")
	b.Type = store.PolicyLoaded
	b.SetDetails(store.PolicyDetails{Digest: "sha256:b"})
	h.append(ledger.Author{Name: "broker-1"}, b)
	say(first)
	second := first
	second.Digest, second.Kept = "sha256:2", map[string]time.Duration{"low": 2 * time.Hour}
	say(second)
	second.Kept = nil
	say(second)
	got := loaded()
	if len(got) != 4 || got[2].Previous != "sha256:1" || time.Duration(got[2].Retention["low"]) != 2*time.Hour || got[3].Retention != nil {
		t.Fatalf("%+v", got)
	}
	p, err := h.l.History(t.Context(), ledger.Query{Type: string(store.PolicyLoaded), Limit: 1})
	if err != nil || p.Entries[0].Opened[store.SealedCatalogue] != "scopes: []" {
		t.Fatalf("the catalogue's text: %v %v", p, err)
	}
}

func TestALiftedHoldIsCaughtUpWithAlsoAfterARestart(t *testing.T) {
	h := newHouse(t)
	kept := map[string]time.Duration{"low": time.Hour}
	r := h.retention(kept)
	h.append(ledger.Author{Name: "broker-1"}, entry("low", "a:read", "held"))
	hold := entry("", "hold.placed", "because")
	hold.Type = store.HoldPlaced
	hold.SetDetails(store.HoldDetails{Run: "r"})
	recorder := ledger.Author{Name: by.Name, Recorder: true}
	h.append(recorder, hold)
	h.advance(2 * time.Hour)
	h.sweep(r, 0)
	later := entry("low", "a:read", "later")
	later.Run = "other"
	h.append(ledger.Author{Name: "broker-1"}, later)
	h.advance(2 * time.Hour)
	h.sweep(r, 1)
	if got := fmt.Sprint(h.texts()); got != "[held because]" {
		t.Fatal(got)
	}
	lift := entry("", "hold.lifted", "over")
	lift.Type = store.HoldLifted
	lift.SetDetails(store.HoldLiftedDetails{Hold: hold.ID})
	h.append(recorder, lift)
	r.Close()
	h.l.Close()
	h.open()
	if _, err := h.retention(kept).Sweep(t.Context()); err != nil { // the loop's own first look may come before
		t.Fatal(err)
	}
	if got := fmt.Sprint(h.texts()); got != "[because over]" {
		t.Fatal(got)
	}
}

func TestAChangeOnRecordCountsAtOnceAlsoForWhatWasOfAnotherClass(t *testing.T) {
	h := newHouse(t)
	kept := map[string]time.Duration{"low": time.Hour, ledger.OfScope + "pay:read": 1000 * time.Hour}
	r := h.retention(kept)
	h.append(ledger.Author{Name: "broker-1"}, entry("low", "pay:read", "of a scope"), entry("low", "a:read", "low"), entry("sensitive", "b:read", "sensitive"))
	h.advance(2 * time.Hour)
	h.sweep(r, 1)
	if got := fmt.Sprint(h.texts()); got != "[of a scope sensitive]" {
		t.Fatal(got)
	}
	// As after a change of the catalogue: the running recorder announces it.
	if err := retention.Announce(t.Context(), h.l, by, h.clock(), retention.Loaded{Kept: map[string]time.Duration{"low": time.Hour, "sensitive": time.Hour}}); err != nil {
		t.Fatal(err)
	}
	h.sweep(r, 2)
	if got := h.texts(); len(got) != 0 {
		t.Fatalf("%q is left", got)
	}
	if err := retention.Announce(t.Context(), h.l, by, h.clock(), retention.Loaded{}); err != nil {
		t.Fatal(err)
	}
	h.append(ledger.Author{Name: "broker-1"}, entry("low", "a:read", "kept for good"))
	h.advance(10_000 * time.Hour)
	h.sweep(r, 0)
}

func TestTheFileOfProgressMayBeLostDamagedOrAnothers(t *testing.T) {
	kept := map[string]time.Duration{"low": time.Hour}
	for name, content := range map[string]string{
		"lost": "", "damaged": "{", "another log's": `{"log":"other","finished":1,"lifted":1,"marks":{"low":2}}`,
		"ahead of the log": `{"log":"retention.example/log","finished":1,"lifted":1,"marks":{"low":99}}`,
		"negative":         `{"log":"retention.example/log","finished":1,"lifted":1,"marks":{"low":-1}}`,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			if content != "" {
				if err := os.WriteFile(h.file(), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			h.append(ledger.Author{Name: "broker-1"}, entry("low", "a:read", "text"))
			r := h.retention(kept)
			h.advance(2 * time.Hour)
			if _, err := r.Sweep(t.Context()); err != nil { // the loop's own first look may come before
				t.Fatal(err)
			}
			if got := h.texts(); len(got) != 0 {
				t.Fatalf("%q is left", got)
			}
			var p struct {
				Log   string
				Marks map[string]int64
			}
			b, err := os.ReadFile(h.file())
			if err != nil || json.Unmarshal(b, &p) != nil || p.Log != "retention.example/log" || p.Marks["low"] == 0 {
				t.Fatalf("%s %v", b, err)
			}
		})
	}
}
