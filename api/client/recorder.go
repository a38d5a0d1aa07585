package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// HeaderSeen names the size of the last head that a writer has verified. The
// acknowledgement then carries the proof that its head continues that one.
const HeaderSeen = "Countersign-Seen"

// NDJSON is the media type of an append and of /follow.
const NDJSON = "application/x-ndjson"

// Heartbeat is how often /follow sends an empty line when nothing happens, so
// that a follower notices a recorder that is gone.
const Heartbeat = 10 * time.Second

// Ack is the answer to an append and to /open, and one line of /follow.
type Ack struct {
	store.Appended
	// Consistency proves that the checkpoint continues the head of the size
	// given in Countersign-Seen (RFC 6962, section 2.1.2). Empty where none
	// was given, or nothing is to be proved.
	Consistency tlog.TreeProof `json:"consistency,omitzero"`
}

// Consistency is the answer to GET /consistency.
type Consistency struct {
	From  int64          `json:"from"`
	To    int64          `json:"to"`
	Proof tlog.TreeProof `json:"proof"`
}

// RecorderConfig says how a writer reaches its recorder, and by which key it
// believes it.
type RecorderConfig struct {
	Config
	Local    Service            // the recorder, where it is in this process; then Config is of no use
	Log      *store.LogVerifier // the log's key, configured beforehand
	HeadFile string             // keeps the last head seen; empty: in memory alone, for tests
	Writer   string             // the name this writer is on record by; empty: not checked
	// Deadline is how long a call is tried before the recorder counts as
	// unavailable. Zero: 3 s.
	Deadline time.Duration
	Logger   *zap.Logger
}

// Service is the recorder as its writers reach it: over HTTP, or in one
// process. Each call is one attempt, and nothing that it returns is believed.
// seen is the size of the last head seen, from which on the answer's checkpoint
// is to be proved, 0 for none.
type Service interface {
	Append(ctx context.Context, lines [][]byte, seen int64) (*Ack, error)
	Open(ctx context.Context, request string, seen int64) (*Ack, error)
	// Consistency fails with ErrNoProof where the log does not reach so far.
	Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error)
	// Follow calls fn with what comes after the entry with the given index, and
	// with nil now and then when nothing does.
	Follow(ctx context.Context, after int64, fn func(*Ack) error) error
}

// Recorder is a writer's access to the record. It believes no answer: it checks
// the log's signature, that every entry is in the log and is what was
// submitted, and that the log continues the one it has seen before. It is safe
// for concurrent use.
type Recorder struct {
	service  Service
	log      *store.LogVerifier
	heads    *heads
	writer   string
	deadline time.Duration
	zap      *zap.Logger
}

// NewRecorder reads the head file; the recorder is not contacted.
func NewRecorder(c RecorderConfig) (*Recorder, error) {
	service := c.Local
	if service == nil {
		n, err := dial(c.Config)
		if err != nil {
			return nil, fmt.Errorf("recorder: %w", err)
		}
		service = remote{n}
	}
	if c.Log == nil {
		return nil, errors.New("recorder: the log's key is not set")
	}
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	h, err := newHeads(c.Log, c.HeadFile, c.Logger)
	if err != nil {
		return nil, err
	}
	r := &Recorder{service: service, log: c.Log, heads: h, writer: c.Writer, deadline: c.Deadline, zap: c.Logger}
	if r.deadline == 0 {
		r.deadline = 3 * time.Second
	}
	h.prove = r.consistency
	return r, nil
}

// Seen is the size of the last head that was verified.
func (r *Recorder) Seen() int64 {
	n, _ := r.heads.size()
	return n
}

// Close writes the last head and ends what runs in the background.
func (r *Recorder) Close() error {
	r.heads.close()
	return nil
}

// Append puts subs on record, all or none, and returns them as they are there.
// It sends the same bytes again when an answer is lost, which the recorder
// takes once. Errors are *store.OrderError, or wrap store.ErrConflict or
// store.ErrMalformed where the recorder refused; all others wrap
// store.ErrUnavailable: then it is not known whether the entries are on record.
func (r *Recorder) Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	lines := make([][]byte, len(subs))
	for i, s := range subs {
		var err error
		if lines[i], err = s.Marshal(); err != nil {
			return nil, fmt.Errorf("%w: %v", store.ErrMalformed, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, r.deadline)
	defer cancel()
	once := func(ctx context.Context, seen int64) (*Ack, error) { return r.service.Append(ctx, lines, seen) }
	return r.entries(ctx, once, func(a *store.Appended) error {
		if len(a.Entries) != len(subs) {
			return fmt.Errorf("%d entries acknowledged, %d submitted", len(a.Entries), len(subs))
		}
		for i, s := range subs {
			if err := r.same(s, lines[i], a.Entries[i].Leaf); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
		}
		return nil
	})
}

// same reports whether leaf is s with the recorder's stamps, and sets them.
func (r *Recorder) same(s *store.Submission, line, leaf []byte) error {
	if err := s.Accept(line, leaf); err != nil {
		return err
	}
	if r.writer != "" && s.Writer != r.writer {
		return fmt.Errorf("stamped with writer %q", s.Writer)
	}
	return nil
}

// Open returns the entries of what is open, or, where request is not empty, of
// that request alone.
func (r *Recorder) Open(ctx context.Context, request string) (*store.Appended, error) {
	ctx, cancel := context.WithTimeout(ctx, max(r.deadline, 30*time.Second))
	defer cancel()
	once := func(ctx context.Context, seen int64) (*Ack, error) { return r.service.Open(ctx, request, seen) }
	return r.entries(ctx, once, func(*store.Appended) error { return nil })
}

// entries makes a call that answers with entries, and verifies all of it.
func (r *Recorder) entries(ctx context.Context, once func(context.Context, int64) (*Ack, error), check func(*store.Appended) error) (*store.Appended, error) {
	var (
		ack  *Ack
		seen int64
	)
	err := r.try(ctx, func(ctx context.Context) (err error) {
		if seen, err = r.heads.size(); err == nil {
			ack, err = once(ctx, seen)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := r.verify(ctx, ack, seen); err != nil {
		return nil, err
	}
	if err := check(&ack.Appended); err != nil {
		return nil, fmt.Errorf("%w: the acknowledgement is false: %w", store.ErrUnavailable, err)
	}
	return &ack.Appended, nil
}

func (r *Recorder) verify(ctx context.Context, a *Ack, seen int64) error {
	c, err := r.log.Checkpoint(a.Checkpoint)
	if err != nil {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	for i := range a.Entries {
		e := &a.Entries[i]
		if e.Index < 0 || e.Index >= c.N {
			return fmt.Errorf("%w: %w: index %d outside a tree of %d", store.ErrUnavailable, store.ErrReceipt, e.Index, c.N)
		}
		if err := tlog.CheckRecord(e.Proof, c.N, c.Hash, e.Index, store.LeafHash(e.Leaf)); err != nil {
			return fmt.Errorf("%w: %w: entry %d: %v", store.ErrUnavailable, store.ErrReceipt, e.Index, err)
		}
	}
	return r.heads.see(ctx, a.Checkpoint, seen, a.Consistency)
}

// consistency fetches the proof between two heads.
func (r *Recorder) consistency(ctx context.Context, from, to int64) (proof tlog.TreeProof, err error) {
	err = r.try(ctx, func(ctx context.Context) (err error) {
		proof, err = r.service.Consistency(ctx, from, to)
		return err
	})
	return proof, err
}

// errAnswer is an answer that is cut off or garbled: as good as lost.
var errAnswer = errors.New("the recorder's answer is not whole")

// try calls fn until it is answered, or ctx is done. Whatever is left open then
// wraps store.ErrUnavailable.
func (r *Recorder) try(ctx context.Context, fn func(context.Context) error) error {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		err := fn(ctx)
		if err == nil {
			return nil
		}
		if refused, final := refusal(err); final {
			return refused
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w: %v", store.ErrUnavailable, ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

// ErrRefused says that the recorder does not take this writer: a matter of its
// token, its certificate, or of which server answers.
var ErrRefused = errors.New("the recorder refused this writer")

// refusal translates what the recorder said, and reports whether saying it
// again would change nothing. The recorder's problem documents are quoted, not
// wrapped: they are about the writer, and must not reach the writer's callers
// as if they were about them.
func refusal(err error) (error, bool) {
	if errors.Is(err, ErrHead) || errors.Is(err, ErrNoProof) || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrMalformed) {
		return err, true
	}
	if oe, ok := store.IsOrder(err); ok {
		return oe, true
	}
	var p *problem.Problem
	if !errors.As(err, &p) {
		return err, false // the connection, or an answer that is not whole
	}
	var order store.OrderError
	switch {
	case p.Extension("order", &order) && order.Code != "":
		return &order, true
	case p.Slug() == problem.SlugIdempotencyConflict:
		return fmt.Errorf("%w: %v", store.ErrConflict, p), true
	case p.Slug() == problem.SlugMalformed, p.Slug() == problem.SlugBodyTooLarge:
		return fmt.Errorf("%w: %v", store.ErrMalformed, p), true
	case p.Status >= http.StatusInternalServerError:
		return p, false
	}
	// Not our recorder, or not our writer's token: a matter of configuration.
	return fmt.Errorf("%w: %w: %v", store.ErrUnavailable, ErrRefused, p), true
}

// Follow calls fn with what comes to be on record after the entry with the
// given index and is a writer's to know, in order. It ends when ctx is done, fn
// returns an error, the recorder has contradicted itself, or the connection is
// lost: whoever follows must know that it no longer does, and the error then
// wraps store.ErrUnavailable.
func (r *Recorder) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	err := r.follow(ctx, &after, fn)
	var stop stopped
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &stop):
		return stop.error
	case errors.Is(err, ErrHead):
		return err
	}
	return fmt.Errorf("%w: the recorder is not followed any more: %v", store.ErrUnavailable, err)
}

// stopped is what fn returned, told apart from what the connection did.
type stopped struct{ error }

func (r *Recorder) follow(ctx context.Context, after *int64, fn func(*store.Appended) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Three heartbeats missed: the recorder, or the way to it, is gone.
	silence := time.AfterFunc(3*Heartbeat, cancel)
	defer silence.Stop()
	// A contradiction that another call met ends this one too.
	contradicted := func() error { _, err := r.heads.size(); return err }
	if err := contradicted(); err != nil {
		return err
	}
	return r.service.Follow(ctx, *after, func(ack *Ack) error {
		silence.Reset(3 * Heartbeat)
		if ack == nil {
			return contradicted()
		}
		checked, cancel := context.WithTimeout(ctx, r.deadline)
		err := r.verify(checked, ack, 0)
		cancel()
		if err != nil {
			return err
		}
		for _, e := range ack.Entries {
			if e.Index <= *after {
				return fmt.Errorf("entry %d came after entry %d", e.Index, *after)
			}
			*after = e.Index
		}
		silence.Stop() // what fn does with it is not the recorder's silence
		if err := fn(&ack.Appended); err != nil {
			return stopped{err}
		}
		silence.Reset(3 * Heartbeat)
		return contradicted()
	})
}
