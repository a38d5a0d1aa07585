package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
)

const (
	maxEntries = 512      // in one append; the recorder takes 1,000
	maxBytes   = 3 << 20  // in one append; the recorder takes 4 MiB
	maxWaiting = 64 << 20 // bytes of entries that wait for the append under way
	maxHeld    = 32 << 20 // bytes of outcomes that are kept while the recorder is away

	appendWithin = 5 * time.Second        // one append
	gather       = 200 * time.Microsecond // how long, under load, those of the last append are waited for
	soon         = 200 * time.Millisecond // how long outcomes are collected, and the first pause before they are tried again
	maxPause     = 5 * time.Second        // between tries
	closeWithin  = 5 * time.Second        // for what is still to be on record
)

// queued are entries that go on record together or not at all.
type queued struct {
	s    *Session // whose uses they are; nil: they are no uses
	subs []*store.Submission
	size int        // bytes at most, as submitted
	done chan error // of what somebody waits for; buffered

	outcomes int // of a use.finished, how many it holds: nobody waits, and it is tried again

	// Guarded by recording.mu.
	left    bool // nobody waits any more
	settled bool
}

// recording is the way of all entries of a gateway to the record. While one
// append is under way, all that comes in is collected into the next, which waits
// a moment for as many as the last one held: the busier it is, the more uses share
// a commit. The order in which entries come in is the order in which they go on
// record, but for outcomes that the recorder did not take at first.
type recording struct {
	rec Recorder
	log *zap.Logger

	mu      sync.Mutex
	queue   []*queued
	waiting int  // bytes in queue
	running bool // somebody empties the queue
	closed  bool // no uses are taken any more
	over    bool // no outcomes either

	held     []*queued // outcomes that wait for the recorder to be back
	holding  int       // bytes in held
	pause    time.Duration
	retry    *time.Timer
	owed     int // entries of outcomes that are not on record yet
	lost     int // outcomes that never will be
	idle     chan struct{}
	dirty    map[*Session]bool // with outcomes to be flushed soon
	flushing *time.Timer

	work sync.WaitGroup
}

func newRecording(c Config) *recording {
	return &recording{rec: c.Recorder, log: c.Log, pause: soon, dirty: map[*Session]bool{}, idle: make(chan struct{}, 1)}
}

// wait puts q on record, and returns when it is there.
func (r *recording) wait(ctx context.Context, q *queued) error {
	ended := context.Background()
	if q.s != nil {
		ended = q.s.ctx
	}
	r.mu.Lock()
	switch {
	case r.closed && q.s != nil:
		r.mu.Unlock()
		return ErrEnded
	case r.waiting+q.size > maxWaiting:
		r.mu.Unlock()
		return fmt.Errorf("%w: too much waits to be recorded", store.ErrUnavailable)
	}
	r.push(q)
	r.mu.Unlock()
	var why error
	select {
	case err := <-q.done:
		return err
	case <-ctx.Done():
		why = ctx.Err()
	case <-ended.Done():
		why = ErrEnded
	}
	r.mu.Lock()
	left := !q.settled
	q.left = left
	r.mu.Unlock()
	if left {
		return why
	}
	if err := <-q.done; err != nil {
		return err
	}
	if q.s != nil {
		cut(q)
	}
	return why
}

// refused puts a refusal on record: what store/refusal is given.
func (r *recording) refused(ctx context.Context, s *store.Submission) error {
	b, err := s.Marshal()
	if err != nil {
		return fmt.Errorf("%w: %v", store.ErrMalformed, err)
	}
	return r.wait(ctx, &queued{subs: []*store.Submission{s}, size: len(b), done: make(chan error, 1)})
}

// put takes outcomes. They are on record soon.
func (r *recording) put(q *queued) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		r.lost += q.outcomes
		return
	}
	r.owed++
	r.push(q)
}

// push queues q. r.mu must be held.
func (r *recording) push(q *queued) {
	r.queue, r.waiting = append(r.queue, q), r.waiting+q.size
	if !r.running {
		r.running = true
		go r.empty()
	}
}

// empty appends what is queued, batch by batch, until nothing is.
func (r *recording) empty() {
	for last := 0; ; {
		// Under load, those whose uses the last append held are about to ask again: an
		// append for few costs nearly as much as one for many. A lone use waits for
		// nobody.
		if last > 1 && r.queued() < last {
			time.Sleep(gather)
		}
		batch := r.take()
		if batch == nil {
			return
		}
		r.append(batch)
		last = len(batch)
	}
}

func (r *recording) queued() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.queue)
}

// take takes the next batch from the queue; nil where there is none.
func (r *recording) take() (batch []*queued) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, size, taken := 0, 0, 0
	for _, q := range r.queue {
		if len(batch) > 0 && (n+len(q.subs) > maxEntries || size+q.size > maxBytes) {
			break
		}
		taken++
		r.waiting -= q.size
		if q.left {
			continue
		}
		if q.outcomes == 0 && q.s != nil && q.s.ctx.Err() != nil {
			q.settled = true
			q.done <- ErrEnded
			continue
		}
		batch, n, size = append(batch, q), n+len(q.subs), size+q.size
	}
	clear(r.queue[:taken])
	r.queue = r.queue[taken:]
	if len(r.queue) == 0 {
		r.queue = nil
	}
	r.running = batch != nil
	return batch
}

// append appends a batch, and says to each in it what came of it. One that the
// recorder refuses is halved until it is known whose entries it refuses: the
// others are no worse for it.
func (r *recording) append(batch []*queued) {
	var subs []*store.Submission
	for _, q := range batch {
		subs = append(subs, q.subs...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), appendWithin)
	defer cancel()
	// A crash after it leaves uses that nobody was told of: they reached no target.
	_, err := r.rec.Append(ctx, subs...)
	_, order := store.IsOrder(err)
	_, over := store.IsOrder(err, store.OrderNotLive)
	refused := order || errors.Is(err, store.ErrMalformed) || errors.Is(err, store.ErrConflict)
	switch {
	case refused && len(batch) > 1:
		r.append(batch[:len(batch)/2])
		r.append(batch[len(batch)/2:])
		return
	case over && batch[0].s != nil:
		// Another broker ended its credential, and this one has not heard of it yet.
		batch[0].s.Close()
		err = ErrEnded
	case err != nil && !refused && !errors.Is(err, store.ErrUnavailable):
		err = fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	for _, q := range batch {
		if q.outcomes > 0 {
			r.told(q, err)
			continue
		}
		r.mu.Lock()
		q.settled = true
		left := q.left
		r.mu.Unlock()
		if left && err == nil && q.s != nil {
			cut(q)
		}
		q.done <- err
	}
}

// told is what came of an attempt to put outcomes on record.
func (r *recording) told(q *queued, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.pause = soon
	case errors.Is(err, store.ErrUnavailable) && !r.over && r.holding+q.size <= maxHeld:
		r.held, r.holding = append(r.held, q), r.holding+q.size
		if r.retry == nil {
			r.retry = time.AfterFunc(r.pause, r.again)
			r.pause = min(2*r.pause, maxPause)
		}
		return
	default:
		r.lost += q.outcomes
		r.log.Error("outcomes of uses are not on record, and never will be", zap.Int("outcomes", q.outcomes), zap.Int("lost", r.lost), zap.Error(err))
	}
	if r.owed--; r.owed == 0 {
		select {
		case r.idle <- struct{}{}:
		default:
		}
	}
}

// again tries what was held.
func (r *recording) again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	held := r.held
	r.held, r.holding, r.retry = nil, 0, nil
	for _, q := range held {
		r.push(q)
	}
}

// soon has the outcomes of s flushed. It must not wait for s.mu, which its
// caller holds.
func (r *recording) soon(s *Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirty[s] = true
	if r.flushing == nil {
		r.flushing = time.AfterFunc(soon, r.flush)
	}
}

func (r *recording) flush() {
	r.mu.Lock()
	dirty := r.dirty
	r.dirty, r.flushing = map[*Session]bool{}, nil
	r.mu.Unlock()
	for s := range dirty {
		s.mu.Lock()
		s.flush()
		s.mu.Unlock()
	}
}

// background runs fn; close waits for what began before it.
func (r *recording) background(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		go fn()
		return
	}
	r.work.Go(fn)
}

// close takes no more uses, and returns when all outcomes are on record, or
// after closeWithin.
func (r *recording) close() {
	end := time.NewTimer(closeWithin)
	defer end.Stop()
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.flush()
	r.work.Wait() // each of them has a time limit of its own
	for {
		r.mu.Lock()
		owed := r.owed
		if r.retry != nil && r.retry.Stop() {
			r.retry = time.AfterFunc(soon, r.again) // not as late as it was
		}
		r.mu.Unlock()
		if owed == 0 {
			break
		}
		select {
		case <-r.idle:
			continue
		case <-end.C:
		}
		break
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	for _, q := range r.held {
		r.lost += q.outcomes
	}
	r.held, r.holding = nil, 0
	if r.lost > 0 || r.owed > 0 {
		r.log.Error("outcomes of uses were not put on record", zap.Int("lost", r.lost), zap.Int("entries", r.owed))
	}
}

// Lost is how many outcomes of uses could not be put on record, and never will
// be: the recorder was away for too long, or refused them.
func (g *Gateway) Lost() int {
	g.record.mu.Lock()
	defer g.record.mu.Unlock()
	return g.record.lost
}
