package ledger

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func freeze(person string, d store.FreezeDetails) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: 1, ID: store.NewID(), Type: store.FreezeSet, WriterTime: store.At(time.Unix(1_800_000_000, 0)),
		Agent: "spiffe://example.test/recorder/recorder", Action: string(store.FreezeSet), Person: store.Ptr(person),
	}}
	s.SetDetails(d)
	return s
}

func lift(person, id string) *store.Submission {
	s := freeze(person, store.FreezeDetails{})
	s.Type, s.Action = store.FreezeLifted, string(store.FreezeLifted)
	s.SetDetails(store.FreezeLiftedDetails{Freeze: id})
	return s
}

func (f *fixture) record(l *Ledger, subs ...*store.Submission) {
	f.t.Helper()
	a, err := l.Append(context.Background(), recorder, wire(f.t, subs...))
	if err != nil {
		f.t.Fatal(err)
	}
	f.check(a)
}

// all reads the whole log.
func all(t *testing.T, l *Ledger) (out []*store.Entry) {
	t.Helper()
	for s, err := range l.Entries(context.Background(), 0, l.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		e, err := store.ParseLeaf(s.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

func TestAFreezeClosesWhatItCoversInItsOwnAppendAndOutlivesARestart(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		waiting, other, under := f.story("req_1", true), f.story("req_2", true), f.story("req_3", false)
		f.append(l, waiting.requested())
		f.append(l, other.requested())
		intent := under.issuing(1)
		f.append(l, under.requested(), intent)

		run := freeze("p-ana", store.FreezeDetails{Run: "run-req_1"})
		f.record(l, run)
		if got := all(t, l); len(got) != 6 || got[5].Type != store.RequestVoid || got[5].Request != "req_1" || got[5].Writer != "recorder" ||
			*got[5].Cause != store.CauseFrozen || got[5].Resource != "postgres://orders" || got[5].Agent != run.Agent || got[5].Time != got[4].Time {
			t.Fatalf("after the freeze the log holds %d entries, the last %+v", len(got), got[len(got)-1])
		}
		f.record(l, run) // a retry of the same bytes
		if l.Size() != 6 {
			t.Fatalf("a retry grew the log to %d entries", l.Size())
		}
		orchestrator := freeze("p-ana", store.FreezeDetails{Orchestrator: "demo"})
		f.record(l, orchestrator)
		if got := all(t, l); len(got) != 8 || got[7].Request != "req_2" {
			t.Fatalf("the wider freeze closed %+v", got[len(got)-1])
		}
		for range 2 {
			for _, subs := range [][]*store.Submission{{f.story("req_9", false).requested(), f.story("req_9", false).issuing(1)}, {f.story("req_9", true).requested()}} {
				if _, err := l.Append(t.Context(), broker, wire(t, subs...)); !isOrder(err, store.OrderFrozen) {
					t.Fatalf("a request under the freeze: %v", err)
				}
			}
			if _, _, freezes := l.Standing(); len(freezes) != 2 || freezes[0].ID != run.ID || freezes[1].ID != orchestrator.ID || freezes[1].Person != "p-ana" {
				t.Fatalf("in force are %+v", freezes)
			}
			open, err := l.OpenSet(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			f.check(open)
			if got := fmt.Sprint(indexes(open)); got != "[2 3 4 6]" { // req_3 and both freezes
				t.Fatalf("writers see %s as open", got)
			}
			if one, err := l.OpenSet(t.Context(), "req_3"); err != nil || fmt.Sprint(indexes(one)) != "[2 3 6]" {
				t.Fatalf("one request alone: %v, %v", one, err)
			}
			l.Close()
			l = f.open()
		}
		// What was being minted is put on record.
		f.append(l, under.issued(intent, 1))
		f.append(l, under.closed(store.CredentialRevoked, intent, 1))
		if _, err := l.Append(t.Context(), recorder, wire(t, lift("p-ana", run.ID))); !isOrder(err, store.OrderLifter) {
			t.Fatalf("lifted by who set it: %v", err)
		}
		f.record(l, lift("p-ben", run.ID), lift("p-ben", orchestrator.ID))
		if _, err := l.Append(t.Context(), recorder, wire(t, lift("p-cem", run.ID))); !isOrder(err, store.OrderNotFrozen) {
			t.Fatalf("lifted twice: %v", err)
		}
		l.Close()
		l = f.open()
		again := f.story("req_9", false)
		f.append(l, again.requested(), again.issuing(1))
		if err := l.recheck(t.Context()); err != nil {
			t.Fatalf("checking the whole log: %v", err)
		}
	})
}

func TestWhatFailsUnderAFreezeIsClosedAndNotOpenAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		s := f.story("req_1", false)
		asked := s.requested()
		asked.Decision = &store.Decision{Outcome: store.NeedsApproval, Policy: "sha256:00", Reasons: []string{}}
		rule := store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(10 * time.Minute)}
		people := s.entry(store.ApprovalRequested, store.ApprovalRequestedDetails{Approval: "apr_1", Grant: s.grant, Rule: rule})
		a := f.append(l, asked, people)
		decided := s.entry(store.ApprovalDecided, store.DecidedDetails{Approval: "apr_1", Requested: store.HashText(store.LeafHash(a.Entries[1].Leaf)), Decision: store.Approve, Groups: []string{"dba"}})
		decided.Person = store.Ptr("p-cem")
		f.record(l, decided)
		intent := s.entry(store.CredentialIssuing, store.IssuingDetails{Attempt: 1, Grant: s.grant.Digest(), NotPast: store.At(f.clock().Add(time.Minute)), Approval: "req_1"})
		f.append(l, intent)
		f.record(l, freeze("p-ana", store.FreezeDetails{All: true}))
		if l.Size() != 5 {
			t.Fatalf("a mint that was under way was closed: %d entries", l.Size())
		}
		f.append(l, s.entry(store.CredentialFailed, store.FailedDetails{Intent: intent.ID, Attempt: 1, Problem: "vault-unavailable", Stage: "token"}))
		got := all(t, l)
		if last := got[len(got)-1]; len(got) != 7 || last.Type != store.RequestVoid || last.Request != "req_1" || last.Writer != "recorder" {
			t.Fatalf("after the failure the last of %d entries is %+v", len(got), last)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestRequestsAndFreezesAtOnceLeaveNothingOpenThatIsFrozen(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		const n = 150
		var wg sync.WaitGroup
		var mu sync.Mutex
		refused := 0
		start := make(chan struct{})
		for i := range n {
			wg.Go(func() {
				<-start
				_, err := l.Append(context.Background(), broker, wire(t, f.story(fmt.Sprintf("req_%d", i), true).requested()))
				if isOrder(err, store.OrderFrozen) {
					mu.Lock()
					refused++
					mu.Unlock()
				} else if err != nil {
					t.Error(err)
				}
			})
			if i%3 == 0 {
				wg.Go(func() {
					<-start
					d := store.FreezeDetails{Run: fmt.Sprintf("run-req_%d", i)}
					if i == n/2 {
						d = store.FreezeDetails{All: true}
					}
					if _, err := l.Append(context.Background(), recorder, wire(t, freeze("p-ana", d))); err != nil {
						t.Error(err)
					}
				})
			}
		}
		close(start)
		wg.Wait()
		_, rs, freezes := l.Standing()
		if len(freezes) != n/3 {
			t.Fatalf("%d freezes in force, set %d", len(freezes), n/3)
		}
		voided := 0
		for _, r := range rs {
			if r.Status != store.StatusVoid {
				t.Errorf("%s is %s", r.ID, r.Status)
			}
			voided++
		}
		if voided+refused != n {
			t.Errorf("%d closed, %d refused, of %d", voided, refused, n)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAFreezeTakenOutOfTheLogStopsTheLedger(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		for name, alter := range map[string]func(e func(string, ...any)){
			"a freeze that covers something else": func(e func(string, ...any)) {
				e("UPDATE entries SET body = replace(body, '\"run\":\"run-x\"', '\"run\":\"run-y\"') WHERE idx = 0")
			},
			"a freeze that looks lifted": func(e func(string, ...any)) {
				e("UPDATE entries SET body = replace(body, 'credential.used', 'freeze.lifted') WHERE idx = 1")
			},
		} {
			t.Run(name, func(t *testing.T) {
				f := newFixtureOn(t, on)
				l := f.open()
				f.record(l, freeze("p-ana", store.FreezeDetails{Run: "run-x"}))
				f.append(l, used("r1"))
				l.Close()
				f.tamper(alter)
				f.refuses()
			})
		}
	})
}

func TestARecorderThatTakesOverHoldsToTheFreezesInForceAndNamesThoseThatAreNotDoneYet(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	f.o.Now = time.Now
	l := f.open()
	ended, live, later := f.story("req_1", false), f.story("req_2", false), f.story("req_3", false)
	intents := map[string]*store.Submission{}
	hand := func(l *Ledger, s *story) {
		t.Helper()
		intent := s.issuing(1)
		f.append(l, s.requested(), intent)
		f.append(l, s.issued(intent, 1))
		intents[s.id] = intent
	}
	hand(l, ended)
	hand(l, live)
	over, done := freeze("p-ana", store.FreezeDetails{Run: "run-req_2"}), freeze("p-ana", store.FreezeDetails{Run: "run-req_1"})
	f.record(l, over)                                                       // 6
	f.record(l, done)                                                       // 7
	f.record(l, lift("p-ben", over.ID))                                     // 8
	f.record(l, lift("p-ben", done.ID))                                     // 9
	f.append(l, ended.closed(store.CredentialRevoked, intents["req_1"], 1)) // 10
	hand(l, later)                                                          // 11 to 13
	holds := freeze("p-ana", store.FreezeDetails{Step: "step-req_4"})
	f.record(l, holds) // 14

	other := f.beside()
	other.o.Dir, other.o.Standby = t.TempDir(), true
	copyFile(t, filepath.Join(f.o.Dir, "head"), filepath.Join(other.o.Dir, "head"))
	check := func(l *Ledger, want string) {
		t.Helper()
		open, err := l.OpenSet(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		f.check(open)
		if got := fmt.Sprint(indexes(open)); got != want {
			t.Fatalf("writers see %s as open, want %s", got, want)
		}
	}
	check(l, "[3 4 5 6 8 11 12 13 14]")
	opened := other.opening()
	if err := query(f.superuser(), "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = hashtext('"+f.postgres().schema+"')::oid"); err != nil {
		t.Fatal(err)
	}
	f.lost(l)
	l = f.opened(opened)
	check(l, "[3 4 5 6 8 11 12 13 14]")
	under := f.story("req_4", false)
	if _, err := l.Append(t.Context(), broker, wire(t, under.requested(), under.issuing(1))); !isOrder(err, store.OrderFrozen) {
		t.Fatalf("a request under the freeze: %v", err)
	}
	if _, err := l.Append(t.Context(), recorder, wire(t, lift("p-ana", holds.ID))); !isOrder(err, store.OrderLifter) {
		t.Fatalf("lifted by who set it: %v", err)
	}
	f.append(l, live.closed(store.CredentialRevoked, intents["req_2"], 1))
	check(l, "[11 12 13 14]")
	f.record(l, lift("p-ben", holds.ID))
	check(l, "[11 12 13]")
}
