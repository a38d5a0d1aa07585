package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"filippo.io/torchwood"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
)

// ErrHead is wrapped by what a Recorder returns once the recorder has
// contradicted a head that it had signed before: its log was rewritten, forked,
// or put back to an older state. Nothing more is accepted from it. It wraps
// store.ErrUnavailable, so that nothing is issued.
var ErrHead = fmt.Errorf("the recorder's log contradicts the last head seen from it: %w", store.ErrUnavailable)

// heads keeps the last head seen of a log and accepts further ones only with
// proof that they are of the same log. It is safe for concurrent use.
type heads struct {
	log   *store.LogVerifier
	file  string
	zap   *zap.Logger
	prove func(ctx context.Context, from, to int64) (tlog.TreeProof, error)

	gate chan struct{} // holds one token: the right to link a new head to the last

	mu     sync.Mutex
	last   tlog.Tree
	note   string              // the signed checkpoint of last
	known  map[int64]tlog.Hash // heads of this log, by size
	broken error               // set once, kept

	dirty  chan struct{} // last is not in the file yet
	closed chan struct{}
	once   sync.Once
	wrote  chan struct{}
}

// ErrNoProof is wrapped when the recorder says that its log does not
// reach so far.
var ErrNoProof = errors.New("the recorder's log does not reach so far")

// maxKnown bounds the memory of heads. Only those of acknowledgements under way
// are asked for again.
const maxKnown = 4096

// newHeads reads the last head from file. A missing file is a first start: the
// first head seen is believed. With file empty, heads are kept in memory alone.
func newHeads(log *store.LogVerifier, file string, l *zap.Logger) (*heads, error) {
	h := &heads{log: log, file: file, zap: l, gate: make(chan struct{}, 1), known: map[int64]tlog.Hash{},
		dirty: make(chan struct{}, 1), closed: make(chan struct{}), wrote: make(chan struct{})}
	if file == "" {
		close(h.wrote)
		return h, nil
	}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("head file: %w", err)
	default:
		c, err := log.Checkpoint(string(b))
		if err != nil {
			return nil, fmt.Errorf("head file %s holds no checkpoint of the log %s; compare it with the recorder's before you remove it: %w", file, log.Origin(), err)
		}
		h.set(c, string(b))
	}
	go h.keep()
	return h, nil
}

// set makes c the last head. It must be linked already.
func (h *heads) set(c torchwood.Checkpoint, note string) {
	h.last, h.note = c.Tree, note
	if len(h.known) >= maxKnown {
		clear(h.known)
	}
	h.known[c.N] = c.Hash
}

// size is that of the last head, for the header Countersign-Seen.
func (h *heads) size() (int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last.N, h.broken
}

// see accepts the signed checkpoint note. proof, where not nil, is said to lead
// from the head of size from to it. All acknowledgements of a batch share one
// checkpoint: the first links it, the others find it known.
func (h *heads) see(ctx context.Context, note string, from int64, proof tlog.TreeProof) error {
	c, err := h.log.Checkpoint(note)
	if err != nil {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	if done, err := h.isKnown(c); done {
		return err
	}
	select {
	case h.gate <- struct{}{}:
		defer func() { <-h.gate }()
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", store.ErrUnavailable, ctx.Err())
	}
	if done, err := h.isKnown(c); done {
		return err
	}
	// Only the holder of the gate changes last.
	h.mu.Lock()
	last := h.last
	h.mu.Unlock()
	if last.N > 0 {
		if err := h.link(ctx, last, c.Tree, from, proof); err != nil {
			return err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.N > last.N {
		h.set(c, note)
		select {
		case h.dirty <- struct{}{}:
		default: // the write that is due will take this one
		}
	} else if c.N > 0 {
		h.known[c.N] = c.Hash
	}
	return nil
}

func (h *heads) isKnown(c torchwood.Checkpoint) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.broken != nil {
		return true, h.broken
	}
	if hash, ok := h.known[c.N]; ok {
		if hash != c.Hash {
			h.breakOff(fmt.Errorf("two heads of %d entries", c.N))
			return true, h.broken
		}
		return true, nil
	}
	return false, nil
}

// link proves that last and c are heads of one log, the smaller a prefix of the
// larger. A smaller one is no contradiction by itself: acknowledgements
// overtake each other.
func (h *heads) link(ctx context.Context, last, c tlog.Tree, from int64, proof tlog.TreeProof) error {
	older, newer := last, c
	if c.N < last.N {
		older, newer = c, last
	}
	if older.N == 0 {
		// The empty log is a prefix of every log; that the recorder still has
		// what it showed before is what is to be proved.
		older.N = 1
	}
	if from != last.N || proof == nil || newer.N != c.N {
		var err error
		if proof, err = h.prove(ctx, older.N, newer.N); errors.Is(err, ErrNoProof) {
			return h.contradiction(fmt.Errorf("it showed a head of %d entries, and now has fewer", newer.N))
		} else if err != nil {
			return err
		}
		if c.N == 0 {
			return nil
		}
	}
	if older.N == newer.N && older.Hash == newer.Hash {
		return nil
	}
	if err := tlog.CheckTree(proof, newer.N, newer.Hash, older.N, older.Hash); err != nil {
		return h.contradiction(fmt.Errorf("its head of %d entries does not continue that of %d", newer.N, older.N))
	}
	return nil
}

func (h *heads) contradiction(err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.breakOff(err)
	return h.broken
}

// breakOff is for good: also after a restart, since the file keeps the head
// that is contradicted.
func (h *heads) breakOff(err error) {
	if h.broken == nil {
		h.broken = fmt.Errorf("%w (%w; the last head seen is in %s)", ErrHead, err, h.file)
		h.zap.Error("recorder refused for good", zap.Error(h.broken))
	}
}

// headPause is the least time between two writes of the head file, so that a
// busy broker's fsyncs do not compete with the ledger's.
const headPause = 200 * time.Millisecond

// keep writes the last head to the file, off the path of the requests.
//
// A crash before the rename leaves the file with an older head of the same log.
// The heads seen since are forgotten: a recorder put back to a state between
// the two, within the pause, goes unnoticed by this client.
func (h *heads) keep() {
	defer close(h.wrote)
	for {
		select {
		case <-h.dirty:
		case <-h.closed:
			select {
			case <-h.dirty:
				h.write()
			default:
			}
			return
		}
		h.write()
		select {
		case <-time.After(headPause):
		case <-h.closed:
		}
	}
}

func (h *heads) write() {
	h.mu.Lock()
	note := h.note
	h.mu.Unlock()
	if err := durable.WriteFile(h.file, []byte(note)); err != nil {
		// Not fatal: what is in memory guards this process, and the write is tried again.
		h.zap.Error("head file not written", zap.String("file", h.file), zap.Error(err))
		select {
		case h.dirty <- struct{}{}:
		default:
		}
	}
}

func (h *heads) close() {
	h.once.Do(func() { close(h.closed) })
	<-h.wrote
}
