package siem

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Source is the record: *ledger.Ledger.
type Source interface {
	Size() int64
	Entries(ctx context.Context, from, to int64) iter.Seq2[ledger.Stored, error]
	Export(ctx context.Context, from, to int64) iter.Seq2[ledger.Stored, error]
	Done() <-chan struct{}
}

// Options say how a Pusher runs. Dir, Log and Product must be set; of Product,
// IncludeTexts and MaxBytes are each destination's own.
type Options struct {
	Dir     string      // of the cursors; made where it is missing
	Product Product     //
	Log     *zap.Logger //

	// Poll is how often the log's size is looked at, which costs no read of the
	// database; 200 ms by default. An event is late by that at most.
	Poll    time.Duration
	MinWait time.Duration // before the second attempt, doubled from then on; 1 s by default
	MaxWait time.Duration // the longest pause between attempts, where a destination asks for no longer one; 1 min by default
	Timeout time.Duration // of one attempt; 30 s by default
	// Confirm is for how long syslog messages stay unconfirmed at most while the
	// receiver is well; 5 s by default.
	Confirm time.Duration

	// confirmed is called between a delivery and the writing of its cursor; tests
	// kill the process there.
	confirmed func(next int64)
}

const (
	batchEntries = 500     // of one batch
	batchBytes   = 1 << 20 // of a batch's events: what a batch may have, and one event more
	scanEntries  = 4096    // read for one batch where few are of the types that are asked for
	syslogWindow = 2000    // entries that may be sent and not confirmed
	maxAfter     = time.Hour
)

// Status is how a destination stands.
type Status struct {
	Name  string
	Next  int64     // index of the first entry that is not known to be delivered
	Size  int64     // of the log
	Error string    // why the last attempt failed; empty: it did not
	Since time.Time // of when the first failure in a row was; zero where Error is empty
}

// Pusher delivers events to each destination on its own, in the log's order and
// at least once: what a destination is not known to have taken is sent again,
// after a crash too. It is safe for concurrent use.
type Pusher struct {
	lines  []*line
	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

// sender hands events to a receiver.
type sender interface {
	// send hands over events. An error leaves open which of them arrived.
	send(ctx context.Context, events []sent) error
	// confirm returns nil once the receiver has taken all that was sent since the
	// last confirm.
	confirm(ctx context.Context) error
	// window is how many entries may be sent before confirm is called.
	window() int64
	// drop forgets what is sent and not confirmed.
	drop()
}

// sent is one event on its way.
type sent struct {
	entry    *store.Entry
	index    int64
	leaf     []byte
	event    []byte
	severity int                    // severity_id
	cut      func() ([]byte, error) // the event without details
}

// refusal is an answer that is no delivery.
type refusal struct {
	err   error
	after time.Duration // the receiver's own wish; 0: none
}

func (r *refusal) Error() string { return r.err.Error() }

// Unwrap returns the cause.
func (r *refusal) Unwrap() error { return r.err }

// Open begins to deliver what c says. A new destination begins at the log's end
// or start, as it says, and others where they stopped. It returns without having
// reached any; none that is away holds up another, or whoever appends.
func Open(_ context.Context, c Config, src Source, o Options) (*Pusher, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{{&o.Poll, 200 * time.Millisecond}, {&o.MinWait, time.Second}, {&o.MaxWait, time.Minute}, {&o.Timeout, 30 * time.Second}, {&o.Confirm, 5 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.d
		}
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Product.Log == "" || o.Dir == "" {
		return nil, errors.New("siem: the log's name and a directory are due")
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	p := &Pusher{}
	for _, d := range c {
		l := &line{d: d, src: src, o: o, product: o.Product, cursor: cursor{filepath.Join(o.Dir, d.Name+".cursor"), o.Product.Log},
			log: o.Log.With(zap.String("siem", d.Name))}
		l.product.IncludeTexts = d.Texts
		var err error
		if d.HTTP != nil {
			l.to, err = newHTTP(d.HTTP, o.Log)
		} else {
			l.product.MaxBytes = d.Syslog.maxBytes()
			l.to, err = newSyslog(d.Syslog, o.Log)
		}
		if err == nil {
			err = l.start()
		}
		if err != nil {
			return nil, fmt.Errorf("siem.%s: %w", d.Name, err)
		}
		p.lines = append(p.lines, l)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	for _, l := range p.lines {
		p.tasks.Add(1)
		go func() {
			defer p.tasks.Done()
			l.run(ctx)
		}()
	}
	return p, nil
}

// Status says how each destination stands, in the order of the configuration.
func (p *Pusher) Status() []Status {
	list := make([]Status, 0, len(p.lines))
	for _, l := range p.lines {
		l.mu.Lock()
		s := l.status
		l.mu.Unlock()
		s.Size = l.src.Size()
		list = append(list, s)
	}
	return list
}

// Close stops. What was sent to syslog and not confirmed is given 2 s to be;
// what is not is sent again after the next start.
func (p *Pusher) Close() error {
	p.cancel()
	p.tasks.Wait()
	return nil
}

// line is the way to one destination. Its goroutine alone uses what is not
// behind mu.
type line struct {
	d       Destination
	to      sender
	src     Source
	o       Options
	product Product
	cursor  cursor
	log     *zap.Logger

	done    int64     // written in the cursor: all before it is delivered
	next    int64     // all before it is sent
	pending bool      // something was sent that is not confirmed
	since   time.Time // of the oldest such

	mu     sync.Mutex
	status Status
}

func (l *line) start() error {
	size := l.src.Size()
	next, ok, err := l.cursor.read(size)
	if err == nil && !ok {
		// Written before anything happens: after a crash, a destination that was to
		// begin now does not begin later and leave out what came between.
		if l.d.Since != "start" {
			next = size
		}
		err = l.cursor.write(next)
	}
	l.done, l.next = next, next
	l.status = Status{Name: l.d.Name, Next: next}
	return err
}

// run delivers until ctx or the ledger ends.
func (l *line) run(ctx context.Context) {
	defer l.to.drop()
	for failed := 0; ; {
		err := l.step(ctx)
		switch {
		case ctx.Err() != nil:
			l.last()
			return
		case err != nil:
			failed++
			l.to.drop()
			l.next, l.pending = l.done, false
			wait := l.backoff(failed)
			var r *refusal
			if errors.As(err, &r) {
				wait = max(wait, r.after)
			}
			l.report(err)
			l.log.Warn("events were not delivered; trying again", zap.Int64("next", l.done), zap.Duration("in", wait), zap.Error(err))
			l.pause(ctx, wait)
		default:
			if failed > 0 {
				failed = 0
				l.log.Info("events are delivered again", zap.Int64("next", l.done))
			}
			l.report(nil)
			if l.next >= l.src.Size() {
				l.pause(ctx, l.o.Poll)
			}
		}
		select {
		case <-l.src.Done():
			l.last()
			return
		default:
		}
	}
}

// step sends what has come since and confirms what is due.
func (l *line) step(ctx context.Context) error {
	for l.next < l.src.Size() && (!l.pending || l.next-l.done < l.to.window()) {
		batch, end, err := l.read(ctx)
		if err != nil {
			return err
		}
		if len(batch) > 0 {
			ctx, cancel := context.WithTimeout(ctx, l.o.Timeout)
			err := l.to.send(ctx, batch)
			cancel()
			if err != nil {
				return err
			}
			if !l.pending {
				l.pending, l.since = true, time.Now()
			}
		}
		l.next = end
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	switch w := l.to.window(); {
	case l.pending && (l.next-l.done >= w || time.Since(l.since) >= l.o.Confirm):
		return l.confirm(ctx)
	case !l.pending && l.next-l.done >= scanEntries:
		// Nothing of what lies between was to be sent.
		return l.advance()
	}
	return nil
}

func (l *line) confirm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, l.o.Timeout)
	defer cancel()
	if err := l.to.confirm(ctx); err != nil {
		return err
	}
	l.pending = false
	return l.advance()
}

// advance makes it last that all before next is delivered. A crash before it
// leaves the older cursor: what was delivered since is sent again, and known by
// its metadata.uid.
func (l *line) advance() error {
	if l.o.confirmed != nil {
		l.o.confirmed(l.next)
	}
	if err := l.cursor.write(l.next); err != nil {
		return fmt.Errorf("the cursor: %w", err)
	}
	l.done = l.next
	l.mu.Lock()
	l.status.Next = l.done
	l.mu.Unlock()
	return nil
}

// last confirms, at the end, what is sent.
func (l *line) last() {
	if l.pending {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := l.confirm(ctx); err != nil {
			l.log.Info("events may be sent again after the next start", zap.Int64("next", l.done), zap.Error(err))
		}
	} else if l.next > l.done {
		if err := l.advance(); err != nil {
			l.log.Error("the cursor cannot be written", zap.Error(err))
		}
	}
}

// read makes events of the entries from next on, and returns where they end.
func (l *line) read(ctx context.Context) (batch []sent, end int64, err error) {
	limit := min(l.src.Size(), l.next+scanEntries)
	all := l.src.Entries
	if l.product.IncludeTexts {
		all = l.src.Export
	}
	end = l.next
	size := 0
	for s, err := range all(ctx, l.next, limit) {
		if err != nil {
			return nil, 0, err
		}
		e, err := store.ParseLeaf(s.Leaf)
		if err != nil {
			return nil, 0, fmt.Errorf("entry %d: %w", s.Index, err)
		}
		end = s.Index + 1
		if matches(l.d.Types, e.Type) {
			opened := map[string]string{}
			for field, o := range s.Sealed {
				opened[field] = o.Text
			}
			b, severity, err := render(s.Index, s.Leaf, e, opened, l.product)
			if err != nil {
				return nil, 0, err
			}
			cut := l.product
			cut.MaxBytes = 1
			batch = append(batch, sent{e, s.Index, s.Leaf, b, severity, func() ([]byte, error) { return Event(s.Index, s.Leaf, e, nil, cut) }})
			if size += len(b); len(batch) == batchEntries || size >= batchBytes {
				break
			}
		}
	}
	return batch, end, nil
}

// backoff is the pause after so many failures in a row, up to a fifth shorter,
// so that destinations that failed together do not come back together.
func (l *line) backoff(failed int) time.Duration {
	d := min(l.o.MaxWait, l.o.MinWait<<min(failed-1, 20))
	return d - time.Duration(rand.Int64N(int64(d)/5+1))
}

func (l *line) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-l.src.Done():
	}
}

func (l *line) report(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.status.Error, l.status.Since = "", time.Time{}
		return
	}
	if l.status.Error == "" {
		l.status.Since = time.Now()
	}
	l.status.Error = err.Error()
}
