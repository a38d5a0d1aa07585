// Package refusal puts refused attempts on record as access.refused, and folds
// a flood of them, so that whoever makes it can neither fill the ledger nor hide
// how many there were.
package refusal

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/countersign-dev/countersign/store"
)

// How many attempts go on record one by one: Burst at once, then one in each
// Interval. Of those in between each kind has one entry an Interval, with how
// many it stands for (store.RefusedDetails.Folded).
const (
	Burst    = 50
	Interval = time.Second
)

// recordWithin is how long one entry may take to be on record. Callers wait for
// it.
const recordWithin = 2 * time.Second

// Log puts refusals on record. It is safe for concurrent use.
type Log struct {
	record func(context.Context, *store.Submission) error
	kind   func(*store.Submission) string
	log    *zap.Logger
	limit  *rate.Limiter

	flushing chan struct{} // full until what a flush took is on record, so that Close waits for it

	mu     sync.Mutex
	folded map[string]*fold // by kind: not on record yet
	timer  *time.Timer
	closed bool
}

// fold is n refusals of a kind, the latest of them with what is known of it.
type fold struct {
	n    int
	last *store.Submission
}

// New records through record, which appends one entry and gets a deadline of
// 2 s. Only refusals of one kind are folded, so that a flood hides no other
// attempt; kind is to have few values, since each may have an entry a second.
func New(log *zap.Logger, record func(context.Context, *store.Submission) error, kind func(*store.Submission) string) *Log {
	return &Log{record: record, kind: kind, log: log, folded: map[string]*fold{}, flushing: make(chan struct{}, 1), limit: rate.NewLimiter(rate.Every(Interval), Burst)}
}

// Add puts s on record, or counts it towards the next of its kind. s must be an
// access.refused with its details; Add gives it its ID. The error says that it
// could not be recorded: it is counted towards the next all the same.
func (l *Log) Add(ctx context.Context, s *store.Submission) error {
	l.mu.Lock()
	n := 1
	if !l.limit.Allow() && !l.closed {
		l.fold(s, n)
		l.mu.Unlock()
		return nil
	}
	if before := l.folded[l.kind(s)]; before != nil {
		n += before.n
		delete(l.folded, l.kind(s))
	}
	l.mu.Unlock()
	return l.write(ctx, s, n)
}

// fold counts n refusals, of which s is the latest, and sees to it that they
// are on record soon, also when no further one comes.
func (l *Log) fold(s *store.Submission, n int) {
	k := l.kind(s)
	if l.folded[k] == nil {
		l.folded[k] = &fold{}
	}
	l.folded[k].n += n
	l.folded[k].last = s
	if l.timer == nil && !l.closed {
		l.timer = time.AfterFunc(Interval, func() { l.flush() })
	}
}

// flush records what was folded: of each kind the latest, with the others as
// count.
func (l *Log) flush() {
	l.flushing <- struct{}{}
	defer func() { <-l.flushing }()
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	folded := l.folded
	l.folded = map[string]*fold{}
	l.mu.Unlock()
	for _, x := range folded {
		_ = l.write(context.Background(), x.last, x.n) // logged, and folded again
	}
}

// write records s, which stands for n refusals. The caller may hang up at once;
// the attempt is on record all the same. A crash before the append leaves
// attempts that had no effect and are not on record.
func (l *Log) write(ctx context.Context, s *store.Submission, n int) error {
	// A new ID each time: after a failure that left open what happened, the same
	// ID with another count would be refused for good.
	s.ID = store.NewID()
	d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
	if err != nil {
		return err
	}
	d.Folded = n - 1
	s.SetDetails(d)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordWithin)
	defer cancel()
	if err := l.record(ctx, s); err != nil {
		l.log.Warn("a refusal could not be recorded yet", zap.String("action", s.Action), zap.Int("refusals", n), zap.Error(err))
		l.mu.Lock()
		l.fold(s, n)
		l.mu.Unlock()
		return err
	}
	return nil
}

// Close records what is still folded. What is added afterwards has an entry at
// once.
func (l *Log) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.flush()
}
