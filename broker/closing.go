package broker

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/countersign-dev/countersign/store"
)

const (
	maxClosings   = 256              // in one append; the recorder takes 1,000
	closingWithin = 10 * time.Second // for one append
)

// closings gathers the last entries of credentials and intents: while one append
// is under way, those that come are gathered into the next. It has no timer, and
// a lone one waits for nobody.
type closings struct {
	append func(context.Context, ...*store.Submission) (*store.Appended, error)
	ctx    context.Context // of the broker's life
	work   sync.WaitGroup

	mu      sync.Mutex
	queue   []*closing
	running bool // somebody empties the queue
}

type closing struct {
	s    *store.Submission
	done chan error // buffered
}

// put puts s on record. Where ctx is done first it may be on record all the
// same, a moment later. The error is that of s alone, not of those that went
// with it.
func (c *closings) put(ctx context.Context, s *store.Submission) error {
	q := &closing{s: s, done: make(chan error, 1)}
	c.mu.Lock()
	c.queue = append(c.queue, q)
	if !c.running {
		c.running = true
		c.work.Go(c.empty)
	}
	c.mu.Unlock()
	select {
	case err := <-q.done:
		return err
	case <-ctx.Done():
		return unavailable(ctx.Err())
	}
}

func (c *closings) empty() {
	for {
		c.mu.Lock()
		n := min(len(c.queue), maxClosings)
		batch := c.queue[:n:n]
		c.queue = c.queue[n:]
		c.running = n > 0
		c.mu.Unlock()
		if n == 0 {
			return
		}
		c.record(batch)
	}
}

// record appends a batch. One that the recorder refuses is halved until it is
// known whose entry it refuses: the others are no worse for it.
func (c *closings) record(batch []*closing) {
	subs := make([]*store.Submission, len(batch))
	for i, q := range batch {
		subs[i] = q.s
	}
	ctx, cancel := context.WithTimeout(c.ctx, closingWithin)
	defer cancel()
	_, err := c.append(ctx, subs...)
	_, refused := store.IsOrder(err)
	if len(batch) > 1 && (refused || errors.Is(err, store.ErrMalformed) || errors.Is(err, store.ErrConflict)) {
		c.record(batch[:len(batch)/2])
		c.record(batch[len(batch)/2:])
		return
	}
	for _, q := range batch {
		q.done <- err
	}
}
