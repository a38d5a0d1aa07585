package slack

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/countersign-dev/countersign/store"
)

// How many refusals go on record one by one: so many at once, then one in each
// interval. Those in between are folded by why they were refused, so that
// whoever floods the address can neither fill the ledger nor hide another
// attempt, nor how many there were.
const (
	refusalBurst    = 50
	refusalInterval = time.Second
)

type refusals struct {
	record func(context.Context, *store.Submission) error
	log    *zap.Logger
	limit  *rate.Limiter

	mu     sync.Mutex
	folded map[string]*fold // by reason
	timer  *time.Timer
	closed bool
}

type fold struct {
	n    int // beside last
	last *store.Submission
}

func (f *refusals) init(record func(context.Context, *store.Submission) error, log *zap.Logger) {
	f.record, f.log, f.folded = record, log, map[string]*fold{}
	f.limit = rate.NewLimiter(rate.Every(refusalInterval), refusalBurst)
}

func (f *refusals) add(ctx context.Context, s *store.Submission) {
	if !f.limit.Allow() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.fold(s, 0)
		return
	}
	f.write(ctx, s, 0)
}

// fold keeps s, which stands for n others too, until the next flush.
func (f *refusals) fold(s *store.Submission, n int) {
	k := s.Decision.Reasons[1]
	if x := f.folded[k]; x != nil {
		n += x.n + 1
	}
	f.folded[k] = &fold{n: n, last: s}
	if f.timer == nil && !f.closed {
		f.timer = time.AfterFunc(refusalInterval, f.flush)
	}
}

func (f *refusals) flush() {
	f.mu.Lock()
	f.timer = nil
	folded := f.folded
	f.folded = map[string]*fold{}
	f.mu.Unlock()
	for _, x := range folded {
		f.write(context.Background(), x.last, x.n)
	}
}

// write records s. The caller may hang up: the attempt is on record all the
// same. What cannot be recorded now is tried again with the next flush.
func (f *refusals) write(ctx context.Context, s *store.Submission, others int) {
	d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
	if err == nil && others > 0 {
		d.Folded = others
		s.SetDetails(d)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := f.record(ctx, s); err != nil {
		f.log.Warn("a refused Slack callback could not be recorded yet", zap.Int("refusals", others+1), zap.Error(err))
		f.mu.Lock()
		defer f.mu.Unlock()
		f.fold(s, others)
	}
}

func (f *refusals) close() {
	f.mu.Lock()
	f.closed = true
	if f.timer != nil {
		f.timer.Stop()
	}
	f.mu.Unlock()
	f.flush()
}
