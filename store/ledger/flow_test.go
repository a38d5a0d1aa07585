package ledger

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// story makes the entries of one request in the order a broker writes them.
type story struct {
	now   func() time.Time
	id    string
	keyed bool
	grant store.Grant
	end   store.Time
}

func (f *fixture) story(id string, keyed bool) *story {
	return &story{now: f.clock, id: id, keyed: keyed, grant: store.Grant{
		Scope: "orders-db:read", Target: "postgres://orders", Engine: "database", TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true,
	}}
}

func (s *story) entry(t store.Type, details any) *store.Submission {
	sub := &store.Submission{Entry: store.Entry{
		V: 1, ID: store.NewID(), Type: t, WriterTime: store.At(s.now()), Agent: "spiffe://example.test/" + s.id,
		Orchestrator: "demo", Run: "run-" + s.id, Step: "step-" + s.id, Request: s.id,
		Resource: "postgres://orders", Action: "orders-db:read", Risk: &store.Risk{Sensitivity: "low"},
		Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:00", Reasons: []string{}},
	}}
	sub.SetDetails(details)
	return sub
}

func (s *story) requested() *store.Submission {
	return s.entry(store.StepRequested, store.RequestedDetails{Grant: s.grant, Join: "join-" + s.id, Body: "body", Keyed: s.keyed})
}

func (s *story) issuing(attempt int) *store.Submission {
	if s.end.IsZero() {
		s.end = store.At(s.now().Add(5 * time.Minute))
	}
	return s.entry(store.CredentialIssuing, store.IssuingDetails{Attempt: attempt, Grant: s.grant.Digest(), NotPast: s.end})
}

func (s *story) issued(intent *store.Submission, attempt int) *store.Submission {
	return s.entry(store.CredentialIssued, store.IssuedDetails{Intent: intent.ID, Attempt: attempt, Kind: "database", Revocable: true, Accessor: "acc", Expires: s.end})
}

func (s *story) closed(t store.Type, intent *store.Submission, attempt int) *store.Submission {
	return s.entry(t, store.ClosedDetails{Intent: intent.ID, Attempt: attempt})
}

func indexes(a *store.Appended) (out []int64) {
	for _, e := range a.Entries {
		out = append(out, e.Index)
	}
	return out
}

func TestARefusedGroupLeavesNothingAndDoesNotSpoilTheBatch(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := f.story("req_1", false)
		good, bad := used("r1"), s.issuing(1) // an intent without a request
		// Both in one batch: handed to the writing goroutine's own function.
		groups := []*group{}
		for _, subs := range [][]*store.Submission{{used("r0"), bad}, {good}} {
			g := &group{ctx: t.Context(), by: broker, done: make(chan struct{})}
			for _, b := range wire(t, subs...) {
				var ln line
				if err := ln.parse(b, broker.Name); err != nil {
					t.Fatal(err)
				}
				g.lines = append(g.lines, ln)
			}
			groups = append(groups, g)
		}
		l.queue <- groups[0]
		l.queue <- groups[1]
		<-groups[0].done
		<-groups[1].done
		if _, ok := store.IsOrder(groups[0].err, store.OrderNotOpen); !ok {
			t.Fatalf("an intent without a request: %v", groups[0].err)
		}
		if groups[1].err != nil || groups[1].lines[0].index != 0 || l.Size() != 1 {
			t.Fatalf("its neighbour: %v, index %d of %d", groups[1].err, groups[1].lines[0].index, l.Size())
		}
	})
}

func TestARetryIsAnsweredAlsoAfterItsRequestWasClosed(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := f.story("req_1", false)
		req, intent := s.requested(), s.issuing(1)
		first := f.append(l, req, intent)
		issued := s.issued(intent, 1)
		f.append(l, issued)
		revoked := s.closed(store.CredentialRevoked, intent, 1)
		last := f.append(l, revoked)
		if len(l.open) != 0 {
			t.Fatalf("%d requests open", len(l.open))
		}
		again := f.append(l, req, intent)
		if fmt.Sprint(indexes(again)) != fmt.Sprint(indexes(first)) {
			t.Fatalf("indexes %v, first %v", indexes(again), indexes(first))
		}
		if again := f.append(l, revoked); again.Entries[0].Index != last.Entries[0].Index {
			t.Fatal("the closing entry has another place")
		}
		second := s.closed(store.CredentialRevoked, intent, 1)
		if _, err := l.Append(t.Context(), broker, wire(t, second)); !isOrder(err, store.OrderNotOpen) {
			t.Fatalf("a second closing: %v", err)
		}
	})
}

func isOrder(err error, c store.OrderCode) bool { _, ok := store.IsOrder(err, c); return ok }

func TestTheRecordersTypesAreRefusedToWritersAndAllowedToItself(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := f.story("", false).entry(store.WriterAdded, store.WriterDetails{Name: "broker-2", Method: "token"})
		if _, err := l.Append(t.Context(), broker, wire(t, s)); !isOrder(err, store.OrderForbidden) {
			t.Fatalf("a writer: %v", err)
		}
		if _, err := l.Append(t.Context(), Author{Name: "recorder", Recorder: true}, wire(t, s)); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWhatIsOpenHasItsEntriesAndWhatIsClosedHasNot(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		live, pending, closed, keyed, denied := f.story("req_live", false), f.story("req_pending", false), f.story("req_closed", false), f.story("req_keyed", true), f.story("req_denied", false)
		i1 := live.issuing(1)
		f.append(l, live.requested(), i1)
		f.append(l, used("noise"))
		f.append(l, live.issued(i1, 1))
		i2 := pending.issuing(1)
		f.append(l, pending.requested(), i2)
		i3 := closed.issuing(1)
		f.append(l, closed.requested(), i3)
		f.append(l, closed.issued(i3, 1))
		f.append(l, closed.closed(store.CredentialRevoked, i3, 1))
		i4 := keyed.issuing(1)
		f.append(l, keyed.requested(), i4)
		f.append(l, keyed.issued(i4, 1))
		f.append(l, keyed.closed(store.CredentialRevoked, i4, 1))
		no := denied.requested()
		no.Decision.Outcome = store.Deny
		f.append(l, no)

		for range 2 { // and again after a restart
			a, err := l.OpenSet(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			f.check(a)
			if got := fmt.Sprint(indexes(a)); got != "[0 1 3 4 5]" {
				t.Fatalf("open: %s", got)
			}
			for id, want := range map[string]string{"req_live": "[0 1 3]", "req_keyed": "[10 11 12 13]", "req_closed": "[]", "req_denied": "[]", "req_none": "[]"} {
				a, err := l.OpenSet(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				f.check(a)
				if got := fmt.Sprint(indexes(a)); got != want {
					t.Errorf("open of %s: %s, want %s", id, got, want)
				}
			}
			// What a broker builds from it is what the recorder holds.
			s := store.NewState()
			for _, p := range a.Entries {
				e, err := store.ParseLeaf(p.Leaf)
				if err != nil {
					t.Fatal(err)
				}
				b := s.Begin()
				if err := b.Admit(e, p.Leaf, p.Index, true); err != nil {
					t.Fatal(err)
				}
				b.Commit()
			}
			for _, r := range s.Requests() {
				if encodeRequest(r) != encodeRequest(l.open[r.ID]) {
					t.Fatalf("rebuilt %s\nheld %s", encodeRequest(r), encodeRequest(l.open[r.ID]))
				}
			}
			l.Close()
			l = f.open()
		}
		f.advance(store.KeyLife + time.Hour)
		f.append(l, used("r"))
		if a, err := l.OpenSet(t.Context(), "req_keyed"); err != nil || len(a.Entries) != 0 {
			t.Fatalf("a forgotten key: %v, %v", a, err)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAFollowerSeesWhatConcernsItOnceAndInOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		const n = 700
		write := func(from, to int) {
			for i := from; i < to; i++ {
				s := f.story(fmt.Sprint("req_", i), false)
				f.append(l, used("noise"), s.requested(), used("noise"))
			}
		}
		write(0, n/2)
		l.Close()
		l = f.open() // what follows reads the first half from the database
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		got := make(chan int64, 2*n)
		ended := make(chan error, 1)
		go func() {
			ended <- l.Follow(ctx, 1, func(a *store.Appended) error {
				for i, p := range a.Entries {
					if _, err := f.verify.Check(a.Receipt(i)); err != nil {
						return err
					}
					got <- p.Index
				}
				return nil
			})
		}()
		write(n/2, n)
		for i := 1; i < n; i++ {
			select {
			case x := <-got:
				if x != int64(3*i+1) {
					t.Fatalf("entry %d, want %d", x, 3*i+1)
				}
			case err := <-ended:
				t.Fatal(err)
			}
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		go func() { ended <- l.Follow(t.Context(), l.Size(), func(*store.Appended) error { return nil }) }()
		l.Close()
		if err := <-ended; !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("after Close: %v", err)
		}
	})
}

func TestTimeNeverDecreasesAlsoAcrossARestart(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.append(l, used("r1"))
		f.advance(-time.Hour)
		f.append(l, used("r2"))
		l.Close()
		l = f.open()
		f.append(l, used("r3"))
		var last store.Time
		for s, err := range l.Entries(t.Context(), 0, l.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			e, err := store.ParseLeaf(s.Leaf)
			if err != nil {
				t.Fatal(err)
			}
			if e.Time.Before(last.Time) {
				t.Fatalf("entry %d at %s after %s", s.Index, e.Time, last)
			}
			last = e.Time
		}
	})
}
