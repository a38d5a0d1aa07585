package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
)

// start reads the stored log, checks it as Open says, and readies the writer.
func (l *Ledger) start(ctx context.Context) error {
	w := &l.wr
	if err := l.e.ensureSchema(ctx, w.conn); err != nil {
		return err
	}
	if _, err := l.keys.ExecContext(ctx, keysSchema); err != nil {
		return fmt.Errorf("opening the keys file %s: %w", l.o.KeysFile, err)
	}
	outside, err := l.headFile.read(l.verifier)
	if err != nil {
		return err
	}
	h, err := l.newestCheckpoint(ctx, w.conn)
	if err != nil {
		return err
	}
	if outside != nil && (h == nil || outside.N > h.size) {
		size := int64(0)
		if h != nil {
			size = h.size
		}
		return l.headAhead(outside.N, size)
	}
	if h == nil { // a new ledger, or a crash before its first checkpoint
		if h, err = sign(l.o.Signer, &frontier{}); err != nil {
			return err
		}
		if err := w.exec(ctx, "INSERT INTO checkpoints (size, note) VALUES ($1, $2)", h.size, h.note); err != nil {
			return err
		}
	}
	if outside == nil && h.size > 0 {
		return l.headMissing()
	}
	if outside != nil {
		f, err := l.frontierAt(ctx, w.conn, outside.N)
		if err != nil {
			return err
		}
		if f.root() != outside.Hash {
			return fmt.Errorf("%w: the stored tree does not begin with the %d entries that the head file %s signs", ErrMismatch, outside.N, l.o.HeadFile)
		}
	}

	// The newest entries hashed again, on top of what is stored of the others:
	// what comes out must be the signed head.
	from := max(0, h.size-l.o.CheckNewest)
	p, err := l.newPass(ctx, w.conn, from)
	if err != nil {
		return err
	}
	if err := p.scan(ctx, w.conn, h.size); err != nil {
		return err
	}
	if p.front.root() != h.root {
		return fmt.Errorf("%w: the stored hashes do not add up to the signed checkpoint of %d entries", ErrMismatch, h.size)
	}
	if err := l.checkNote(&p.front, h.note); err != nil {
		return err
	}
	rs, err := readOpen(ctx, w.conn)
	if err != nil {
		return err
	}
	if p.state != nil {
		if err := p.compareOpen(rs, store.At(l.o.Now())); err != nil {
			return err
		}
	}
	if w.state, err = l.readState(ctx, w.conn, rs); err != nil {
		return err
	}
	w.front, w.last, l.freezes, l.lifted = p.front, p.last, w.state.Freezes(), w.state.Lifted()
	for _, r := range rs {
		l.open[r.ID] = r
	}
	l.recentN = h.size
	for lv := 0; h.size>>lv != 0; lv++ {
		count := h.size >> lv
		var ns []node
		for n := max(0, count-max(min(keepNodes, l.o.CheckNewest)>>lv, minNodes)); n < count; n++ {
			ns = append(ns, node{lv, n})
		}
		hs, err := readNodes(ctx, l.e, w.conn, ns)
		if err != nil {
			return err
		}
		for i, n := range ns {
			l.nodes.put(n, hs[i])
		}
	}
	l.head.Store(h)
	l.published.Store(h)
	// Before the first append: so that a head file that is missing later was
	// taken away. A crash before this leaves an empty ledger without one.
	if err := l.headFile.write(h); err != nil {
		return fmt.Errorf("writing the head file: %w", err)
	}
	return nil
}

func (l *Ledger) headAhead(outside, stored int64) error {
	return fmt.Errorf("%w: the head file %s signs a tree of %d entries, the database holds %d: it was cut or put back to an older state", ErrMismatch, l.o.HeadFile, outside, stored)
}

func (l *Ledger) headMissing() error {
	return fmt.Errorf("%w: the head file %s is missing: put it back, or put there the newest checkpoint of this log that you trust", ErrMismatch, l.o.HeadFile)
}

// newestCheckpoint returns the newest stored head, verified, and checks that
// entries and hashes end where it does. It is nil in a database with nothing in
// it.
func (l *Ledger) newestCheckpoint(ctx context.Context, q querier) (*head, error) {
	var entries, hashes int64
	if err := q.QueryRowContext(ctx, "SELECT (SELECT coalesce(max(idx) + 1, 0) FROM entries), (SELECT coalesce(max(idx) + 1, 0) FROM hashes)").Scan(&entries, &hashes); err != nil {
		return nil, err
	}
	h := &head{}
	err := q.QueryRowContext(ctx, "SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1").Scan(&h.size, &h.note)
	switch {
	case errors.Is(err, sql.ErrNoRows) && entries == 0 && hashes == 0:
		return nil, nil
	case errors.Is(err, sql.ErrNoRows):
		return nil, fmt.Errorf("%w: %d entries and no checkpoint", ErrMismatch, entries)
	case err != nil:
		return nil, err
	}
	c, err := l.verifier.Checkpoint(h.note)
	if err != nil {
		return nil, fmt.Errorf("%w: the checkpoint of %d entries: %w", ErrMismatch, h.size, err)
	}
	if c.N != h.size || c.N != entries || c.N != hashes {
		return nil, fmt.Errorf("%w: the newest checkpoint signs %d entries, the database holds %d entries and hashes of %d", ErrMismatch, c.N, entries, hashes)
	}
	h.root = c.Hash
	return h, nil
}

// frontierAt reads the frontier of the tree of size from the stored hashes.
func (l *Ledger) frontierAt(ctx context.Context, q querier, size int64) (frontier, error) {
	f := frontier{size: size}
	ns := edgeNodes(size)
	hs, err := readNodes(ctx, l.e, q, ns)
	for i, h := range hs {
		f.edge[ns[i].level] = h
	}
	return f, err
}

// pass goes over the stored log and compares everything that can be derived
// from the entries with what is stored.
type pass struct {
	l     *Ledger
	front frontier
	last  store.Time
	state *store.State // nil where the pass does not begin at entry 0
}

// newPass begins at entry from, on the stored hashes of what precedes it.
func (l *Ledger) newPass(ctx context.Context, q querier, from int64) (*pass, error) {
	f, err := l.frontierAt(ctx, q, from)
	p := &pass{l: l, front: f}
	if from == 0 {
		// Any grace passed when an entry was admitted, whatever it was then: the
		// least that State knows.
		p.state = newState(1, nil)
	}
	return p, err
}

// scan goes on to entry to: each entry must be there, be an entry, hash to the
// stored nodes and checkpoint, not precede the one before it in time, and follow the order of
// the record.
func (p *pass) scan(ctx context.Context, q querier, to int64) error {
	notes, err := readNotes(ctx, q, p.front.size, to)
	if err != nil {
		return err
	}
	if p.front.size == 0 && notes[0] == "" {
		return fmt.Errorf("%w: the first checkpoint is missing", ErrMismatch)
	}
	if n, ok := notes[p.front.size]; ok {
		if err := p.l.checkNote(&p.front, n); err != nil {
			return err
		}
	}
	var buf []byte
	for s, err := range entries(ctx, q, p.front.size, to, true) {
		if err != nil {
			return err
		}
		e, err := store.ParseLeaf(s.Leaf)
		if err != nil {
			return fmt.Errorf("%w: entry %d: %w", ErrMismatch, s.Index, err)
		}
		buf = p.front.add(buf[:0], store.LeafHash(s.Leaf))
		if !bytes.Equal(buf, s.Nodes) {
			return fmt.Errorf("%w: entry %d does not have the stored hashes", ErrMismatch, s.Index)
		}
		if n, ok := notes[p.front.size]; ok {
			if err := p.l.checkNote(&p.front, n); err != nil {
				return err
			}
		}
		if e.Time.Before(p.last.Time) {
			return fmt.Errorf("%w: entry %d is older than the one before it", ErrMismatch, s.Index)
		}
		p.last = e.Time
		if p.state != nil {
			if err := p.replay(e, s.Leaf, s.Index); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pass) replay(e *store.Entry, leaf []byte, index int64) error {
	b := p.state.Begin()
	if e.Type == store.StepRequested && p.state.Request(e.Request) != nil {
		b.Forget(e.Time) // as the recorder did from time to time
		b.Commit()
		b = p.state.Begin()
	}
	if err := b.Admit(e, leaf, index, true); err != nil {
		return fmt.Errorf("%w: entry %d breaks the order of the record: %w", ErrMismatch, index, err)
	}
	b.Commit()
	return nil
}

// compareOpen compares what the entries leave open with what is stored as open,
// at now.
func (p *pass) compareOpen(stored []*store.Request, now store.Time) error {
	if now.Before(p.last.Time) {
		now = p.last
	}
	// When a closed request is forgotten is not on record; that it may be is.
	forgotten := func(r *store.Request) bool { return !r.Forget.IsZero() && !now.Before(r.Forget.Time) }
	want := map[string]string{}
	for _, r := range p.state.Requests() {
		if !forgotten(r) {
			want[r.ID] = encodeRequest(r)
		}
	}
	for _, r := range stored {
		if forgotten(r) {
			continue
		}
		if want[r.ID] != encodeRequest(r) {
			return fmt.Errorf("%w: open request %q is stored otherwise than the entries leave it", ErrMismatch, r.ID)
		}
		delete(want, r.ID)
	}
	for id := range want {
		return fmt.Errorf("%w: request %q is open by the entries and not stored as open", ErrMismatch, id)
	}
	return nil
}

// recheckLoop goes over the whole log at start and then every RecheckEvery.
func (l *Ledger) recheckLoop() {
	defer l.tasks.Done()
	for {
		began := time.Now()
		err := l.e.class(l.recheck(l.ctx))
		switch {
		case l.ctx.Err() != nil:
			return
		case errors.Is(err, ErrMismatch):
			l.stop(err)
			return
		case err != nil: // disk trouble: the next pass may see more
			l.o.Log.Error("the background check of the ledger did not finish", zap.Error(err))
		default:
			l.o.Log.Info("the whole ledger was checked", zap.Int64("entries", l.Size()), zap.Duration("took", time.Since(began)))
		}
		select {
		case <-l.ctx.Done():
			return
		case <-time.After(l.o.RecheckEvery):
		}
	}
}

// rest is how many times as long as it worked the background pass sleeps, so
// that it takes at most a quarter of one core.
const rest = 3

// recheck is one pass over the whole log.
func (l *Ledger) recheck(ctx context.Context) error {
	p, err := l.newPass(ctx, l.r, 0)
	if err != nil {
		return err
	}
	// Up to the head as it now is, in short reads that hold up no checkpoint of
	// the WAL.
	for p.front.size+chunk <= l.Size() {
		began := time.Now()
		from := p.front.size
		if err := p.scan(ctx, l.r, p.front.size+chunk); err != nil {
			return err
		}
		if err := l.checkBeside(ctx, l.r, from, p.front.size); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rest * time.Since(began)):
		}
	}
	// The end in one read transaction, so that entries, head and what is open
	// belong together.
	conn, err := l.r.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	tx, err := conn.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	h, err := l.newestCheckpoint(ctx, tx)
	if err != nil {
		return err
	}
	if h == nil {
		return fmt.Errorf("%w: the log is gone", ErrMismatch)
	}
	from := p.front.size
	if err := p.scan(ctx, tx, h.size); err != nil {
		return err
	}
	if p.front.root() != h.root {
		return fmt.Errorf("%w: the entries do not add up to the signed checkpoint of %d entries", ErrMismatch, h.size)
	}
	if err := l.checkBeside(ctx, tx, from, h.size); err != nil {
		return err
	}
	rs, err := readOpen(ctx, tx)
	if err != nil {
		return err
	}
	if err := p.compareOpen(rs, store.At(l.o.Now())); err != nil {
		return err
	}
	if err := tx.Rollback(); err != nil {
		return err
	}
	return l.e.checkPages(ctx, conn)
}

// readNotes reads the stored checkpoints of sizes in [from, to], by size.
func readNotes(ctx context.Context, q querier, from, to int64) (map[int64]string, error) {
	notes := map[int64]string{}
	err := each(ctx, q, func(rows *sql.Rows) error {
		var size int64
		var n string
		err := rows.Scan(&size, &n)
		notes[size] = n
		return err
	}, "SELECT size, note FROM checkpoints WHERE size >= $1 AND size <= $2", from, to)
	return notes, err
}

// checkNote compares a stored checkpoint with the tree f.
func (l *Ledger) checkNote(f *frontier, stored string) error {
	// Ed25519 signatures are deterministic (RFC 8032): signing again gives the
	// same bytes, and is cheaper than verifying.
	want, err := sign(l.o.Signer, f)
	if err != nil {
		return err
	}
	if want.note != stored {
		return fmt.Errorf("%w: the checkpoint of %d entries is not the one that was signed", ErrMismatch, f.size)
	}
	return nil
}

// checkBeside compares what hangs on entries [from, to) with them.
func (l *Ledger) checkBeside(ctx context.Context, q querier, from, to int64) error {
	if err := l.e.checkColumns(ctx, q, from, to); err != nil {
		return err
	}
	return l.checkSealed(ctx, q, from, to)
}

// checkSealed opens the sealed texts of entries [from, to). What is stored must
// open its commitment; a text that is gone without its erasure on record is
// logged as a finding, as the tree does not depend on it.
func (l *Ledger) checkSealed(ctx context.Context, q querier, from, to int64) error {
	unkeyed := map[int64]bool{}
	// One by one: the texts of policies are long.
	if err := each(ctx, q, func(rows *sql.Rows) error {
		var i int64
		var field string
		var box, body []byte
		if err := rows.Scan(&i, &field, &box, &body); err != nil {
			return err
		}
		e, err := store.ParseLeaf(body)
		if err != nil {
			return fmt.Errorf("%w: sealed text %q of entry %d without its entry", ErrMismatch, field, i)
		}
		keys, err := l.loadKeys(ctx, keyNames(box, e.ID))
		if err != nil {
			return err
		}
		o, keyed, err := openBox(keys, box, e.ID, field)
		if !keyed {
			unkeyed[i] = true
			return nil
		}
		if err != nil || !o.Opens(field, e.Sealed[field]) {
			return fmt.Errorf("%w: the sealed text %q of entry %d is not what the entry commits to", ErrMismatch, field, i)
		}
		return nil
	}, "SELECT s.idx, s.field, s.box, e.body FROM sealed s LEFT JOIN entries e ON e.idx = s.idx WHERE s.idx >= $1 AND s.idx < $2", from, to); err != nil {
		return err
	}
	return l.checkMissing(ctx, q, from, to, unkeyed)
}
