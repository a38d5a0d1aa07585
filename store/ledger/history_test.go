package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"golang.org/x/mod/sumdb/tlog"
)

func TestAPageIsBoundedInBytesAndNothingIsLeftOutForIt(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	var want []string
	for i := range 60 {
		s := used("r")
		switch {
		case i%3 == 0:
			s.Type = store.PolicyLoaded
			s.SetDetails(store.PolicyDetails{Digest: fmt.Sprint(i)})
			s.Seal(store.SealedCatalogue, strings.Repeat("x", 1<<20)+fmt.Sprint(i))
		case i%3 == 1:
			s.SetDetails(map[string]string{"note": strings.Repeat("x", 60_000)})
		}
		want = append(want, s.ID)
		f.append(l, s)
	}
	for _, limit := range []int{0, 7, 1} {
		q, pages := Query{Limit: limit}, 0
		var got []string
		for {
			p, err := l.History(t.Context(), q)
			if err != nil || len(p.Entries) == 0 {
				t.Fatalf("%d entries: %v", len(p.Entries), err)
			}
			pages++
			size := 0
			for _, h := range p.Entries {
				e, err := store.ParseLeaf(h.Entry)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e.ID)
				size += len(h.Entry)
				if text := h.Opened[store.SealedCatalogue]; e.Type == store.PolicyLoaded && !strings.HasSuffix(text, fmt.Sprint("x", h.Index)) {
					t.Fatalf("entry %d has the text %.20q…", h.Index, text)
				}
				for _, text := range h.Opened {
					size += len(text)
				}
			}
			if size > pageBytes+store.MaxSubmission {
				t.Fatalf("a page of %d bytes", size)
			}
			if q.Cursor = p.Next; q.Cursor == "" {
				break
			}
		}
		if !slices.Equal(got, want) || limit == 0 && pages != 2 {
			t.Fatalf("limit %d: %d entries on %d pages", limit, len(got), pages)
		}
	}
	i := 0
	for s, err := range l.Export(t.Context(), 0, l.Size()) {
		if err != nil || s.Index != int64(i) || (s.Sealed[store.SealedCatalogue].Text != "") != (i%3 == 0) {
			t.Fatalf("entry %d: %v", s.Index, err)
		}
		i++
	}
	if err := l.recheck(t.Context()); err != nil || i != len(want) {
		t.Fatalf("%d exported: %v", i, err)
	}
}

func TestHistoryFiltersAlikeHoweverItIsPaged(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		type mark struct {
			e   store.Entry
			idx int64
		}
		var all []mark
		for i := range 120 {
			f.advance(time.Second)
			s := used(fmt.Sprint("run-", i%7))
			s.Step, s.Request, s.Orchestrator = fmt.Sprint("step-", i%11), "", fmt.Sprint("o", i%2)
			if i%3 == 0 {
				s.Type, s.Request = store.AlertRaised, fmt.Sprint("req_", i%13)
			}
			if i%5 == 0 {
				s.Decision.Outcome = store.Deny
			}
			s.Action, s.Resource = fmt.Sprint("scope:", i%4), fmt.Sprint("postgres://", i%6)
			s.Person = store.Ptr(f.o.PrivacyKey.Pseudonym(fmt.Sprint("user:p", i%9)))
			if i%2 == 0 {
				s.Subject = &store.Subject{ID: f.o.PrivacyKey.Pseudonym(fmt.Sprint("user:s", i%8))}
			}
			a := f.append(l, s)
			e, err := store.ParseLeaf(a.Entries[0].Leaf)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, mark{*e, a.Entries[0].Index})
		}
		base := all[0].e.Time.Time
		pk := f.o.PrivacyKey
		for _, q := range []Query{
			{}, {Run: "run-3"}, {Step: "step-4"}, {Orchestrator: "o1"}, {Scope: "scope:2"}, {Target: "postgres://5"}, {Type: "alert.raised"},
			{Outcome: "deny"}, {Request: "req_3"}, {Person: "user:p4"}, {Person: pk.Pseudonym("user:p4")}, {Subject: "user:s4"},
			{Run: "run-3", Outcome: "allow"}, {Orchestrator: "o0", Type: "credential.used", Outcome: "deny"}, {Run: "none"}, {Run: "run-1", Step: "none"},
			{From: base.Add(10 * time.Second), To: base.Add(20 * time.Second)}, {From: base.Add(119*time.Second + 1)}, {To: base}, {To: base.Add(time.Nanosecond)},
			{From: base.Add(time.Hour)}, {From: base.Add(30 * time.Second), Orchestrator: "o1", Scope: "scope:3"},
		} {
			var want []int64
			for _, m := range all {
				is := func(want, got string) bool { return want == "" || want == got }
				subject := ""
				if m.e.Subject != nil {
					subject = m.e.Subject.ID
				}
				if is(q.Run, m.e.Run) && is(q.Step, m.e.Step) && is(q.Orchestrator, m.e.Orchestrator) && is(q.Scope, m.e.Action) && is(q.Target, m.e.Resource) &&
					is(q.Type, string(m.e.Type)) && is(q.Outcome, string(m.e.Decision.Outcome)) && is(q.Request, m.e.Request) &&
					is(pseudonym(pk, q.Person), *m.e.Person) && is(pseudonym(pk, q.Subject), subject) &&
					(q.From.IsZero() || !m.e.Time.Before(q.From)) && (q.To.IsZero() || m.e.Time.Before(q.To)) {
					want = append(want, m.idx)
				}
			}
			for _, limit := range []int{0, 1, 7} {
				q.Limit, q.Cursor = limit, ""
				var got []int64
				for {
					p, err := l.History(t.Context(), q)
					if err != nil {
						t.Fatalf("%+v: %v", q, err)
					}
					for _, e := range p.Entries {
						got = append(got, e.Index)
					}
					if q.Cursor = p.Next; p.Next == "" {
						break
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("%+v:\ngot  %v\nwant %v", q, got, want)
				}
			}
		}
		for _, q := range []Query{{Limit: -1}, {Limit: 10_001}, {Cursor: "x"}, {Cursor: "-1"}, {Cursor: "+1"}, {Cursor: "01"}} {
			if _, err := l.History(t.Context(), q); !errors.Is(err, ErrQuery) {
				t.Errorf("%+v: %v", q, err)
			}
		}
	})
}

func TestSealedTextsAreOpenedForReviewersAndNotInTheFile(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := used("r1")
		s.Seal(store.SealedReason, "because of OPS-1234-planted")
		s.Seal(store.SealedSubject, "user:planted@example.test")
		f.append(l, used("r0"), s)
		p, err := l.History(t.Context(), Query{Run: "r1"})
		if err != nil || len(p.Entries) != 1 {
			t.Fatal(p, err)
		}
		if got := p.Entries[0].Opened; got["reason"] != "because of OPS-1234-planted" || got["subject"] != "user:planted@example.test" {
			t.Fatalf("opened %v", got)
		}
		for e, err := range l.Export(t.Context(), 0, l.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			for field, o := range e.Sealed {
				if !o.Opens(field, s.Sealed[field]) {
					t.Fatalf("the exported opening of %s does not open it", field)
				}
			}
			if e.Index == 1 && len(e.Sealed) != 2 {
				t.Fatalf("%d openings exported", len(e.Sealed))
			}
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := l.keys.Exec("DELETE FROM keys WHERE entry = ?", keyName(t, l, 1)); err != nil {
			t.Fatal(err)
		}
		if p, err = l.History(t.Context(), Query{Run: "r1"}); err != nil || p.Entries[0].Opened != nil {
			t.Fatalf("without its key: %v, %v", p, err)
		}
		l.Close()
		files, err := filepath.Glob(f.o.Dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		if on == onPostgres {
			files = append(files, f.dump())
		}
		for _, name := range files {
			if b := readFile(t, name); bytes.Contains(b, []byte("planted")) {
				t.Errorf("%s holds a sealed text in the clear", name)
			}
		}
	})
}

// tiles serves a ledger's tiles to other people's client.
type tiles struct {
	torchwood.TileReader
	l *Ledger
}

func (s tiles) ReadTiles(ctx context.Context, ts []tlog.Tile) (out [][]byte, err error) {
	for _, t := range ts {
		b, err := s.l.Tile(ctx, t)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

func (s tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func TestSomebodyElsesClientReadsTheTilesUpToThePublishedSize(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		const n = 700
		var subs []*store.Submission
		for i := range n {
			subs = append(subs, used(fmt.Sprint("r", i)))
		}
		f.append(l, subs...)
		for deadline := time.Now().Add(10 * time.Second); l.published.Load().size < n; {
			if time.Now().After(deadline) {
				t.Fatal("not published")
			}
			time.Sleep(time.Millisecond)
		}
		c, err := f.verify.Checkpoint(l.Published())
		if err != nil {
			t.Fatal(err)
		}
		client, err := torchwood.NewClient(tiles{l: l})
		if err != nil {
			t.Fatal(err)
		}
		count := int64(0)
		for i, leaf := range client.AllEntries(t.Context(), c.Tree, 0) {
			if e, err := store.ParseLeaf(leaf); err != nil || e.ID != subs[i].ID {
				t.Fatalf("entry %d: %v", i, err)
			}
			count++
		}
		if err := client.Err(); err != nil || count != n {
			t.Fatalf("%d entries: %v", count, err)
		}
		for _, bad := range []tlog.Tile{
			{H: 8, L: 0, N: 2, W: 189}, {H: 8, L: 0, N: 2, W: 256}, {H: 8, L: 0, N: 3, W: 1}, {H: 8, L: 1, N: 0, W: 3}, {H: 8, L: -1, N: 2, W: 189},
			{H: 7, L: 0, N: 0, W: 1}, {H: 8, L: -2, N: 0, W: 1}, {H: 8, L: 0, N: -1, W: 1}, {H: 8, L: 0, N: 0, W: 0}, {H: 8, L: 0, N: 0, W: 257}, {H: 8, L: 63, N: 0, W: 1},
		} {
			if _, err := l.Tile(t.Context(), bad); !errors.Is(err, ErrNotFound) {
				t.Errorf("tile %+v: %v", bad, err)
			}
		}
		l.o.PublishEvery = time.Hour // too late for this one, but the tree has grown
		before := l.Published()
		if !strings.HasPrefix(before, origin+"\n700\n") {
			t.Fatalf("published %q", before)
		}
	})
}

func FuzzTile(f *testing.F) {
	fx := newFixture(f)
	l := fx.open()
	var subs []*store.Submission
	for range 300 {
		subs = append(subs, used("r"))
	}
	fx.append(l, subs...)
	l.published.Store(l.head.Load())
	for _, p := range []string{"tile/0/000", "tile/entries/000", "tile/0/001.p/44", "tile/1/000.p/1", "tile/0/x001/000", "tile/entries/001.p/45"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, path string) {
		tile, err := torchwood.ParseTilePath(path)
		if err != nil {
			return
		}
		b, err := l.Tile(context.Background(), tile)
		if err != nil {
			if !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			return
		}
		if tile.L >= 0 && len(b) != tile.W*tlog.HashSize {
			t.Fatalf("%s: %d bytes", path, len(b))
		}
	})
}

func FuzzCursor(f *testing.F) {
	for _, s := range []string{"", "0", "17", "-1", "9223372036854775807", "9223372036854775808", "1e3", " 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseCursor(s)
		if err == nil && s != "" && fmt.Sprint(n) != s {
			t.Fatalf("%q read as %d", s, n)
		}
		if err == nil && n < 0 {
			t.Fatalf("%q is negative", s)
		}
	})
}

func TestTheNewestThatMatchAreOnePage(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		var want []int64
		for i := range 30 {
			x := used(fmt.Sprint("r", i%3))
			f.append(l, x)
			if i%3 == 1 && i >= 15 {
				want = append(want, int64(i))
			}
		}
		for _, q := range []Query{{Run: "r1", Newest: true, Limit: len(want)}, {Run: "r1", Orchestrator: "demo", Newest: true, Limit: len(want)}} {
			p, err := l.History(t.Context(), q)
			if err != nil || p.Next != "" {
				t.Fatal(p, err)
			}
			var got []int64
			for _, e := range p.Entries {
				got = append(got, e.Index)
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		}
		if p, err := l.History(t.Context(), Query{Newest: true, Limit: 2}); err != nil || len(p.Entries) != 2 || p.Entries[1].Index != 29 {
			t.Error(p, err)
		}
	})
}
