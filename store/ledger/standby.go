package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/tlog"
)

// standbyEvery is how often a recorder that stands by asks for the lock.
const standbyEvery = 500 * time.Millisecond

// claim makes this the recorder that writes, at once or, standing by, when the
// other one is gone.
func (l *Ledger) claim(ctx context.Context) error {
	for said := false; ; said = true {
		err := l.e.class(l.tryClaim(ctx))
		if err == nil || !l.o.Standby || ctx.Err() != nil || !errors.Is(err, ErrLocked) && !errors.Is(err, ErrLost) {
			return err
		}
		if !said {
			l.o.Log.Info("standing by", zap.Error(err))
		}
		if errors.Is(err, ErrLocked) {
			if err := l.e.class(l.shadow(ctx)); errors.Is(err, ErrMismatch) {
				return err
			} else if err != nil {
				l.o.Log.Warn("standing by, the other recorder's checkpoint cannot be followed", zap.Error(err))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(standbyEvery):
		}
	}
}

// tryClaim tries once. The connection is kept where it may be tried on again.
func (l *Ledger) tryClaim(ctx context.Context) error {
	w := &l.wr
	if w.conn == nil {
		c, err := l.w.Conn(ctx)
		if err != nil {
			return err
		}
		w.conn, w.stmts = c, map[string]*sql.Stmt{}
	}
	err := l.e.claim(ctx, w.conn)
	if err != nil && !errors.Is(err, ErrLocked) {
		_ = w.conn.Close()
		w.conn = nil
	}
	return err
}

// shadow brings the head file of a recorder that stands by up to the newest
// stored checkpoint, once that is proved to continue the one it holds: so that
// whoever takes over knows what the log must hold, also where the database was
// put back to an older state in between.
func (l *Ledger) shadow(ctx context.Context) error {
	var there bool
	if err := l.wr.conn.QueryRowContext(ctx, "SELECT to_regclass('checkpoints') IS NOT NULL").Scan(&there); err != nil || !there {
		return err // the other one is about to make it
	}
	h := &head{}
	err := l.wr.conn.QueryRowContext(ctx, "SELECT note FROM checkpoints ORDER BY size DESC LIMIT 1").Scan(&h.note)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	c, err := l.verifier.Checkpoint(h.note)
	if err != nil {
		return fmt.Errorf("%w: the newest checkpoint: %w", ErrMismatch, err)
	}
	h.size, h.root = c.N, c.Hash
	was, err := l.headFile.read(l.verifier)
	if err != nil {
		return err
	}
	switch {
	case was == nil && c.N > 0:
		return l.headMissing()
	case was != nil && was.N > c.N:
		return l.headAhead(was.N, c.N)
	case was != nil && was.N == c.N && was.Hash == c.Hash:
		return nil
	case was != nil && was.N > 0:
		var p tlog.TreeProof
		if was.N < c.N {
			if p, err = tlog.ProveTree(c.N, was.N, l.storedHashes(ctx, l.wr.conn)); err != nil {
				return err
			}
		}
		if err := tlog.CheckTree(p, c.N, c.Hash, was.N, was.Hash); err != nil {
			return fmt.Errorf("%w: the checkpoint of %d entries does not continue the one of %d that the head file %s holds", ErrMismatch, c.N, was.N, l.o.HeadFile)
		}
	}
	return l.headFile.write(h)
}

// storedHashes reads tree hashes from the database alone.
func (l *Ledger) storedHashes(ctx context.Context, q querier) tlog.HashReaderFunc {
	return func(indexes []int64) ([]tlog.Hash, error) { return readHashes(ctx, l.e, q, indexes) }
}
