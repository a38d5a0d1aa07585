package ledger

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// Published is the C2SP signed checkpoint published last, with the cosignatures
// that Publish was given; empty where nothing is published yet. Tile serves the
// tree it signs.
func (l *Ledger) Published() string { return l.published.Load().note }

// publishLoop publishes the head every PublishEvery, where it has changed, or
// leaves it to Options.Publish.
func (l *Ledger) publishLoop() {
	defer l.tasks.Done()
	if l.o.Publish != nil {
		l.o.Publish(l.ctx, l)
		return
	}
	t := time.NewTicker(l.o.PublishEvery)
	defer t.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-t.C:
			if h := l.head.Load(); h.size != l.published.Load().size {
				l.published.Store(h)
			}
		}
	}
}

// Publish publishes note: a checkpoint that this ledger signed, which may carry
// further signatures (C2SP tlog-cosignature). One of fewer entries than are
// published is refused, and one that is not of this log's own tree, validly
// signed as it may be. It is safe for concurrent use.
func (l *Ledger) Publish(ctx context.Context, note string) error {
	c, err := l.verifier.Checkpoint(note)
	if err != nil {
		return fmt.Errorf("publishing: %w", err)
	}
	if size := l.Size(); c.N > size {
		return fmt.Errorf("publishing: the checkpoint is of %d entries, the ledger has %d", c.N, size)
	}
	root, err := l.Root(ctx, c.N)
	if err != nil {
		return fmt.Errorf("publishing: %w", err)
	}
	if root != c.Hash {
		return fmt.Errorf("publishing: a checkpoint of %d entries is not of this ledger's tree", c.N)
	}
	next := &head{size: c.N, root: c.Hash, note: note}
	for {
		old := l.published.Load()
		if next.size < old.size {
			return fmt.Errorf("publishing: %d entries, after %d were", next.size, old.size)
		}
		if l.published.CompareAndSwap(old, next) {
			return nil
		}
	}
}

// Root is the root hash of the tree of the first size entries; size is at most
// Size.
func (l *Ledger) Root(ctx context.Context, size int64) (tlog.Hash, error) {
	if h := l.head.Load(); h.size == size {
		return h.root, nil
	}
	if size < 0 || size > l.Size() {
		return tlog.Hash{}, fmt.Errorf("%w: the root of %d entries of %d", ErrQuery, size, l.Size())
	}
	return tlog.TreeHash(size, l.hashReader(ctx))
}
