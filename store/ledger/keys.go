package ledger

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
)

// The keys of sealed texts lie in a file of their own: one for each entry, so
// that each can be erased on its own. They are made ahead of need, many in one
// commit of that file, so that an append waits for one disk write and not two.
//
// A crash leaves the keys that were ready, at most keysAtOnce and what the last
// appends had taken: they open nothing, and nothing is ever encrypted under them.
const keysSchema = "CREATE TABLE IF NOT EXISTS keys (entry TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT, WITHOUT ROWID"

// How many keys are made in one commit: doubled from keysAtFirst on with each
// that was used up, so that a small ledger keeps few.
const (
	keysAtFirst = 32
	keysAtOnce  = 1024
)

// sealKey is the key of one entry's texts. Its name is a UUIDv7, so that new keys
// come to lie side by side in the file.
type sealKey struct {
	name uuid.UUID
	key  [32]byte
}

// keyStock is the keys that are on disk and used by no entry yet.
type keyStock struct {
	want chan struct{} // of capacity 1: more are to be made

	mu     sync.Mutex
	ready  []sealKey
	next   int           // how many the last commit made
	least  int           // how many somebody waits for
	filled chan struct{} // closed and replaced after each commit
	err    error         // of the last commit
}

// takeKeys takes n keys that are durable.
func (l *Ledger) takeKeys(ctx context.Context, n int) ([]sealKey, error) {
	s := &l.stock
	s.mu.Lock()
	defer s.mu.Unlock()
	for waited := false; len(s.ready) < n; waited = true {
		if waited && s.err != nil {
			return nil, fmt.Errorf("%w: keys for sealed texts: %w", store.ErrUnavailable, s.err)
		}
		s.least = max(s.least, n)
		filled := s.filled
		s.order()
		s.mu.Unlock()
		var err error
		select {
		case <-filled:
		case <-ctx.Done():
			err = fmt.Errorf("%w: %w", store.ErrUnavailable, ctx.Err())
		case <-l.ctx.Done():
			err = l.closedErr()
		}
		s.mu.Lock()
		if err != nil {
			return nil, err
		}
	}
	taken := slices.Clone(s.ready[:n])
	clear(s.ready[:n])
	s.ready = s.ready[n:]
	if len(s.ready) < s.next/2 {
		s.order()
	}
	return taken, nil
}

// order has keys made soon.
func (s *keyStock) order() {
	select {
	case s.want <- struct{}{}:
	default:
	}
}

// giveKeys takes back keys under which nothing was written.
func (l *Ledger) giveKeys(keys []sealKey) {
	l.stock.mu.Lock()
	defer l.stock.mu.Unlock()
	l.stock.ready = append(l.stock.ready, keys...)
}

// keysLoop makes keys as they are ordered, until the ledger stops.
func (l *Ledger) keysLoop() {
	defer l.tasks.Done()
	s := &l.stock
	for {
		select {
		case <-s.want:
		case <-l.ctx.Done():
			return
		}
		s.mu.Lock()
		s.next = min(max(2*s.next, keysAtFirst), keysAtOnce)
		fresh := make([]sealKey, max(s.next, s.least-len(s.ready)))
		s.least = 0
		s.mu.Unlock()
		err := l.makeKeys(fresh)
		if err != nil && l.ctx.Err() == nil {
			l.o.Log.Warn("no keys for sealed texts could be made", zap.Error(err))
		}
		s.mu.Lock()
		if s.err = err; err == nil {
			s.ready = append(s.ready, fresh...)
		}
		close(s.filled)
		s.filled = make(chan struct{})
		s.mu.Unlock()
	}
}

// makeKeys fills keys and commits them to their file.
func (l *Ledger) makeKeys(keys []sealKey) (err error) {
	ctx, cancel := l.e.patience(l.ctx)
	defer cancel()
	rows := make([]any, 0, 2*len(keys))
	for i := range keys {
		keys[i].name = uuid.Must(uuid.NewV7())
		rand.Read(keys[i].key[:]) // never fails since Go 1.24
		rows = append(rows, keys[i].name.String(), keys[i].key[:])
	}
	file, w := sqliteDB{}, &l.keyWr // the keys file is SQLite's, whatever keeps the ledger
	if err := w.exec(ctx, file.begin()); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// SQLite may have rolled back already (disk full): then this fails, as it
			// should.
			_, _ = w.conn.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
		}
	}()
	if err := file.insert(ctx, w, "keys (entry, key)", 2, rows, ""); err != nil {
		return err
	}
	return w.exec(ctx, "COMMIT")
}

// dropKeys deletes the keys that no entry took, at the end: a key that opens
// nothing is no loss, and none is left lying about.
func (l *Ledger) dropKeys(ctx context.Context) error {
	s := &l.stock
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) == 0 {
		return nil
	}
	names := make([]string, len(s.ready))
	for i, k := range s.ready {
		names[i] = k.name.String()
	}
	s.ready = nil
	_, err := l.keyWr.conn.ExecContext(ctx, "DELETE FROM keys WHERE entry IN (SELECT value FROM json_each($1))", jsonList(names))
	return err
}

// unwritten reports whether err says surely that nothing was written.
func unwritten(err error) bool {
	_, order := store.IsOrder(err)
	return order || errors.Is(err, store.ErrMalformed) || errors.Is(err, store.ErrConflict)
}
