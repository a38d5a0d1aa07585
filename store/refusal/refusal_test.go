package refusal

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
)

// record is a ledger that may be away.
type record struct {
	mu   sync.Mutex
	down bool
	ids  map[string]bool
	of   map[string]int // refusals by action, folded ones included
	n    int            // entries
}

func (r *record) append(_ context.Context, s *store.Submission) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ids == nil {
		r.ids, r.of = map[string]bool{}, map[string]int{}
	}
	// An ID that was seen is refused, also where the answer was lost.
	if r.ids[s.ID] {
		return fmt.Errorf("the ID %s again", s.ID)
	}
	r.ids[s.ID] = true
	if r.down {
		return store.ErrUnavailable
	}
	d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
	if err != nil {
		return err
	}
	r.of[s.Action] += 1 + d.Folded
	r.n++
	return nil
}

func attempt(action string) *store.Submission {
	s := &store.Submission{Entry: store.Entry{V: 1, Type: store.AccessRefused, Action: action}}
	s.SetDetails(store.RefusedDetails{Problem: "unauthenticated"})
	return s
}

func byAction(s *store.Submission) string { return s.Action }

func TestAFloodIsFoldedByKindAndEachIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		l := New(zap.NewNop(), r.append, byAction)
		for range 10 {
			for range 1000 {
				if err := l.Add(t.Context(), attempt("flood")); err != nil {
					t.Fatal(err)
				}
			}
			l.Add(t.Context(), attempt("quiet"))
			time.Sleep(2 * Interval)
		}
		l.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.of["flood"] != 10_000 || r.of["quiet"] != 10 || r.n > Burst+40 {
			t.Errorf("%v in %d entries", r.of, r.n)
		}
	})
}

func TestWhatIsFoldedIsOnRecordWhenItCloses(t *testing.T) {
	var r record
	l := New(zap.NewNop(), r.append, byAction)
	for range 500 {
		l.Add(t.Context(), attempt("flood"))
	}
	l.Close()
	if r.of["flood"] != 500 {
		t.Errorf("%d of 500 are on record", r.of["flood"])
	}
	l.Add(t.Context(), attempt("late"))
	if r.of["late"] != 1 {
		t.Error("one that came after the close is not on record")
	}
}

func TestWhileTheLedgerIsAwayRefusalsAreKeptAndSaidToBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := record{down: true}
		l := New(zap.NewNop(), r.append, byAction)
		for range 3 {
			if err := l.Add(t.Context(), attempt("x")); err == nil {
				t.Error("one that is not on record was said to be")
			}
		}
		time.Sleep(10 * Interval)
		r.mu.Lock()
		r.down = false
		r.mu.Unlock()
		time.Sleep(2 * Interval)
		l.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.of["x"] != 3 {
			t.Errorf("%d of 3 are on record", r.of["x"])
		}
	})
}

func TestClosingWaitsForAFlushThatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		l := New(zap.NewNop(), func(ctx context.Context, s *store.Submission) error {
			time.Sleep(Interval / 2) // a slow ledger
			return r.append(ctx, s)
		}, byAction)
		for range Burst {
			go l.Add(t.Context(), attempt("x"))
		}
		synctest.Wait()
		l.Add(t.Context(), attempt("x")) // folded: the burst is used up
		time.Sleep(Interval + Interval/4)
		l.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.of["x"] != Burst+1 {
			t.Errorf("%d of %d are on record after the close", r.of["x"], Burst+1)
		}
	})
}

func TestACallerThatHangsUpIsOnRecordAllTheSame(t *testing.T) {
	var r record
	l := New(zap.NewNop(), func(ctx context.Context, s *store.Submission) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return r.append(ctx, s)
	}, byAction)
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Add(ctx, attempt("x")); err != nil || r.of["x"] != 1 {
		t.Errorf("%v, %d on record", err, r.of["x"])
	}
}
