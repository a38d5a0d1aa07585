package ledger

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// counted waits for a tally's numbers.
func counted(t testing.TB, x *Index, q Query, at []time.Time, series []Series) *Tally {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		tally, err := x.Counts(t.Context(), q, at, series)
		if err != nil {
			t.Fatalf("%+v: %v", q, err)
		}
		if !tally.Counting {
			return tally
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v is counted for ever", q)
		}
	}
}

// crowd appends n entries of many kinds, a second apart in batches of ten.
func crowd(f *fixture, l *Ledger, r *rand.Rand, n int) (all []store.Entry) {
	f.t.Helper()
	for len(all) < n {
		f.advance(time.Second)
		var subs []*store.Submission
		for range 10 {
			s := used(fmt.Sprint("run-", r.IntN(40)))
			s.Step, s.Orchestrator = fmt.Sprint("step-", r.IntN(7)), fmt.Sprint("o", r.IntN(3))
			s.Type = []store.Type{store.CredentialUsed, store.AlertRaised, store.StepFinished}[r.IntN(3)]
			s.Decision.Outcome = []store.Outcome{store.Allow, store.Deny, store.NeedsApproval}[r.IntN(3)]
			s.Action, s.Resource = fmt.Sprint("scope:", r.IntN(5)), fmt.Sprint("postgres://", r.IntN(5))
			if r.IntN(4) == 0 {
				s.Person = store.Ptr(f.o.PrivacyKey.Pseudonym(fmt.Sprint("user:p", r.IntN(5))))
				s.Seal(store.SealedReason, fmt.Sprint("because ", len(all)))
			}
			subs = append(subs, s)
		}
		for _, a := range f.append(l, subs...).Entries {
			e, err := store.ParseLeaf(a.Leaf)
			if err != nil {
				f.t.Fatal(err)
			}
			all = append(all, *e)
		}
	}
	return all
}

// matches says by itself whether q, without its window of time, selects e.
func matches(k store.PrivacyKey, q *Query, e *store.Entry) bool {
	is := func(want, got string) bool { return want == "" || want == got }
	person := ""
	if e.Person != nil {
		person = *e.Person
	}
	return is(q.Run, e.Run) && is(q.Step, e.Step) && is(q.Orchestrator, e.Orchestrator) && is(q.Scope, e.Action) && is(q.Target, e.Resource) &&
		is(q.Type, string(e.Type)) && is(q.Outcome, string(e.Decision.Outcome)) && is(q.Request, e.Request) && is(pseudonym(k, q.Person), person)
}

func someQuery(r *rand.Rand) (q Query) {
	maybe := func(to *string, value string) {
		if r.IntN(5) == 0 {
			*to = value
		}
	}
	maybe(&q.Run, fmt.Sprint("run-", r.IntN(41)))
	maybe(&q.Step, fmt.Sprint("step-", r.IntN(8)))
	maybe(&q.Orchestrator, fmt.Sprint("o", r.IntN(4)))
	maybe(&q.Scope, fmt.Sprint("scope:", r.IntN(6)))
	maybe(&q.Target, fmt.Sprint("postgres://", r.IntN(6)))
	maybe(&q.Type, string([]store.Type{store.CredentialUsed, store.AlertRaised, store.FreezeSet}[r.IntN(3)]))
	maybe(&q.Outcome, string([]store.Outcome{store.Allow, store.Deny}[r.IntN(2)]))
	maybe(&q.Person, fmt.Sprint("user:p", r.IntN(6)))
	return q
}

func TestCountsAndFindsAreWhatIsOnRecordHoweverMuchIsForgottenInBetween(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		x := NewIndex(l)
		r := rand.New(rand.NewPCG(1, 2))
		var all []store.Entry
		series := []Series{{}, {Type: "credential.used"}, {Outcome: "deny"}, {Type: "alert.raised", Outcome: "allow"}, {Type: "freeze.set"}}
		for round := range 4 {
			all = append(all, crowd(f, l, r, 600)...)
			if round == 2 {
				x.mu.Lock()
				x.most = 24_000 // bytes: what one query needs, and little else
				x.mu.Unlock()
			}
			base := all[0].Time.Time
			for range 50 {
				q := someQuery(r)
				at := []time.Time{base.Add(-time.Hour)}
				for range r.IntN(6) {
					at = append(at, base.Add(time.Duration(r.IntN(300_000))*time.Millisecond))
				}
				at = append(at, base.Add(time.Hour))
				slices.SortFunc(at, time.Time.Compare)
				tally := counted(t, x, q, at, series)
				for i, s := range series {
					want := make([]int64, len(at)-1)
					for _, e := range all {
						if matches(f.o.PrivacyKey, &q, &e) && matches(f.o.PrivacyKey, &Query{Type: s.Type, Outcome: s.Outcome}, &e) {
							for j := range want {
								if !e.Time.Before(at[j]) && e.Time.Before(at[j+1]) {
									want[j]++
								}
							}
						}
					}
					if !slices.Equal(tally.Counts[i], want) {
						t.Fatalf("%+v, %+v over %v:\ngot  %v\nwant %v", q, s, at, tally.Counts[i], want)
					}
				}

				q.Limit, q.Newest = 1+r.IntN(20), r.IntN(2) == 0
				if r.IntN(2) == 0 {
					q.From, q.To = at[0], at[len(at)/2]
				}
				from, to := int64(r.IntN(len(all))), int64(r.IntN(len(all)+10))
				var match, want []int64
				for i, e := range all {
					if matches(f.o.PrivacyKey, &q, &e) && (q.From.IsZero() || !e.Time.Before(q.From)) && (q.To.IsZero() || e.Time.Before(q.To)) {
						match = append(match, int64(i))
						if int64(i) >= from && int64(i) < to {
							want = append(want, int64(i))
						}
					}
				}
				if q.Newest {
					want = want[max(0, len(want)-q.Limit):]
				} else {
					want = want[:min(len(want), q.Limit)]
				}
				got, err := x.Find(t.Context(), q, from, to)
				if err != nil {
					t.Fatal(err)
				}
				var idx []int64
				for _, e := range got.Entries {
					idx = append(idx, e.Index)
					p, _ := store.ParseLeaf(e.Entry)
					if p.ID != all[e.Index].ID || len(p.Sealed) != len(e.Opened) {
						t.Fatalf("entry %d is another, or not opened", e.Index)
					}
				}
				if !slices.Equal(idx, want) {
					t.Fatalf("%+v in [%d, %d):\ngot  %v\nwant %v", q, from, to, idx, want)
				}
				if len(want) > 0 && (got.Older != (match[0] < want[0]) || got.Newer != (match[len(match)-1] > want[len(want)-1])) {
					t.Fatalf("%+v: older %t, newer %t around %v of %v", q, got.Older, got.Newer, want, match)
				}
			}
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.bytes > 50_000 {
			t.Errorf("%d bytes are held", x.bytes)
		}
		sum := uint64(0)
		for _, s := range x.sets {
			sum += s.bytes
		}
		if sum != x.bytes {
			t.Errorf("%d bytes are held, and %d accounted for", sum, x.bytes)
		}
	})
}

func TestWhatIsNotReadYetIsSaidToBeCountedAndSoonIs(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		crowd(f, l, rand.New(rand.NewPCG(3, 4)), 200)
		x := &Index{l: l, slots: make(chan struct{}, 1), sets: map[filter]*set{}, most: MaxBytes, borders: map[string]int64{}, choices: map[string]choice{}}
		x.slots <- struct{}{} // nothing can be read
		q, at := Query{Run: "run-1"}, []time.Time{{}, f.now.Add(time.Hour)}
		tally, err := x.Counts(t.Context(), q, at, []Series{{}})
		if err != nil || !tally.Counting || tally.Counts != nil {
			t.Fatalf("%+v, %v", tally, err)
		}
		// One filter is served by the database meanwhile.
		q.Limit = 100
		found, err := x.Find(t.Context(), q, 0, l.Size())
		if err != nil || len(found.Entries) == 0 {
			t.Fatal(found, err)
		}
		<-x.slots
		if tally := counted(t, x, q, at, []Series{{}}); tally.Counts[0][0] != int64(len(found.Entries)) {
			t.Fatalf("%v counted, %d found", tally.Counts, len(found.Entries))
		}
	})
}

func TestWhatIsFoundIsBoundedInBytesAndLeadsOn(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	var want []int64
	for i := range 400 {
		s := used("r")
		s.SetDetails(map[string]string{"note": strings.Repeat("x", 60_000)})
		f.append(l, s)
		want = append(want, int64(i))
	}
	x := NewIndex(l)
	for _, newest := range []bool{false, true} {
		var got []int64
		pages, from, to := 0, int64(0), l.Size()
		for more := true; more; pages++ {
			found, err := x.Find(t.Context(), Query{Run: "r", Limit: maxLimit, Newest: newest}, from, to)
			if err != nil || len(found.Entries) == 0 {
				t.Fatalf("%d entries: %v", len(found.Entries), err)
			}
			size := 0
			var page []int64
			for _, e := range found.Entries {
				size += len(e.Entry)
				page = append(page, e.Index)
			}
			if size > pageBytes+pageBytes/4 {
				t.Errorf("%d bytes at once", size)
			}
			if more = found.Newer; newest {
				got, to, more = append(page, got...), page[0], found.Older
			} else {
				got, from = append(got, page...), page[len(page)-1]+1
			}
		}
		if pages != 2 || !slices.Equal(got, want) {
			t.Errorf("newest %t: %d entries on %d pages", newest, len(got), pages)
		}
	}
}

func TestAStoppedLedgerIsNotCounted(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		x := NewIndex(l)
		crowd(f, l, rand.New(rand.NewPCG(5, 6)), 100)
		if _, err := x.Find(t.Context(), Query{Limit: 0}, 0, 1); !errors.Is(err, ErrQuery) {
			t.Error(err)
		}
		l.Close()
		if _, err := x.Counts(t.Context(), Query{Run: "run-1"}, []time.Time{{}, f.now}, []Series{{}}); !errors.Is(err, store.ErrUnavailable) {
			t.Error(err)
		}
		if _, err := x.Find(t.Context(), Query{Run: "run-1", Step: "step-1", Limit: 1}, 0, 100); !errors.Is(err, store.ErrUnavailable) {
			t.Error(err)
		}
		if _, err := l.Receipt(t.Context(), 0); !errors.Is(err, store.ErrUnavailable) {
			t.Error(err)
		}
	})
}

func TestTheIndexReadsByTheDatabasesOwnIndexes(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	crowd(f, l, rand.New(rand.NewPCG(7, 8)), 50)
	for _, q := range []string{
		"SELECT idx FROM entries WHERE step = ? AND idx >= 0 AND idx < 9 ORDER BY idx LIMIT 5",
		"SELECT idx FROM entries WHERE step = ? AND idx >= 0 AND idx < 9 ORDER BY idx DESC LIMIT 5",
		"SELECT min(step) FROM entries WHERE step > ?",
		"SELECT idx FROM entries WHERE id = ?",
	} {
		var a, b, c int
		var plan string
		if err := l.r.QueryRow("EXPLAIN QUERY PLAN "+q, "x").Scan(&a, &b, &c, &plan); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(plan, "USING INDEX entries_") {
			t.Errorf("%s: %s", q, plan)
		}
	}
}

func TestAReceiptProvesAnyEntryToSomebodyElse(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		onBoth(t, func(t *testing.T, on engineName) {
			f := newFixtureOn(t, on)
			l := f.open()
			all := crowd(f, l, rand.New(rand.NewPCG(9, 10)), 300)
			x := NewIndex(l)
			for _, i := range []int64{0, 1, 255, 256, 299} {
				r, err := l.Receipt(t.Context(), i)
				if err != nil {
					t.Fatal(err)
				}
				e, err := f.verify.Check(*r)
				if err != nil || e.ID != all[i].ID {
					t.Fatalf("entry %d: %v", i, err)
				}
				if at, err := x.Lookup(t.Context(), e.ID); err != nil || at != i {
					t.Fatalf("looked up at %d: %v", at, err)
				}
			}
			for _, i := range []int64{-1, 300} {
				if _, err := l.Receipt(t.Context(), i); !errors.Is(err, ErrNotFound) {
					t.Errorf("entry %d: %v", i, err)
				}
			}
			if _, err := x.Lookup(t.Context(), "nothing"); !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
			if v, err := x.Values(t.Context(), "scope", 3); err != nil || !slices.Equal(v, []string{"scope:0", "scope:1", "scope:2"}) {
				t.Error(v, err)
			}
			if _, err := x.Values(t.Context(), "body", 3); !errors.Is(err, ErrQuery) {
				t.Error(err)
			}
		})
	})
}
