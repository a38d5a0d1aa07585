package ledger

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/tlog"
)

// maxBatch is the most entries in one append, and the size from which on a
// batch takes no further append.
const maxBatch = 1024

// line is one submitted entry.
type line struct {
	sub   *store.Submission
	leaf  []byte       // stamped; the writing goroutine puts the time in
	time  int          // where in leaf the time stands
	boxes []sealedText // encrypted openings
	key   *sealKey     // under which they are encrypted; nil where there are none
	index int64        // set by the writing goroutine
	fresh bool         // likewise: it was not on record before
	gate  error        // why it is not to come on record; what is there already stays
}

// group is one append: taken whole or not at all.
type group struct {
	ctx   context.Context
	by    Author
	lines []line
	done  chan struct{} // closed when head or err is set
	head  *head
	err   error
}

// stampTime is put in leaves until the writing goroutine knows the time: times
// have a fixed width, so that it is then written over in place.
var stampTime = store.At(time.Unix(1, 0))

// Append adds lines, each a store.Submission in JSON, as entries by one author:
// all of them or none. When it returns without error they are on disk under a
// signed checkpoint. An entry that is on record already, from the same author
// and with the same content, is answered with its place there, whatever has
// happened to its request since.
//
// Errors wrap store.ErrMalformed, store.ErrConflict (an id is on record with
// other content), *store.OrderError or store.ErrUnavailable. After
// ErrUnavailable the entries may or may not be on record: send the same bytes
// again.
func (l *Ledger) Append(ctx context.Context, by Author, lines [][]byte) (*store.Appended, error) {
	if len(lines) == 0 || len(lines) > maxBatch {
		return nil, fmt.Errorf("%w: %d entries in one append, want 1 to %d", store.ErrMalformed, len(lines), maxBatch)
	}
	if by.Name == "" {
		return nil, fmt.Errorf("%w: no author", store.ErrMalformed)
	}
	g := &group{ctx: ctx, by: by, lines: make([]line, len(lines)), done: make(chan struct{})}
	for i, b := range lines {
		if err := g.lines[i].parse(b, by.Name); err != nil {
			return nil, fmt.Errorf("entry %d of %d: %w", i+1, len(lines), err)
		}
		if l.o.Gate != nil && !by.Recorder {
			g.lines[i].gate = l.o.Gate(g.lines[i].sub)
		}
	}
	ctx, free, err := l.guard(ctx, by, g)
	if err != nil {
		return nil, err
	}
	defer free()
	if l.ctx.Err() != nil {
		return nil, l.closedErr()
	}
	if err := l.seal(ctx, g); err != nil {
		return nil, err
	}
	select {
	case l.queue <- g:
	case <-l.ctx.Done():
		return nil, l.closedErr()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, ctx.Err())
	}
	select {
	case <-g.done:
	case <-l.written:
		select {
		case <-g.done:
		default:
			return nil, l.closedErr()
		}
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, ctx.Err())
	}
	l.unseal(g)
	if g.err != nil {
		return nil, g.err
	}
	entries := make([]store.Proven, len(g.lines))
	for i, ln := range g.lines {
		entries[i] = store.Proven{Index: ln.index, Leaf: ln.leaf}
	}
	a, err := l.prove(ctx, entries, g.head)
	if err != nil {
		return nil, l.readErr(err)
	}
	return a, nil
}

func (ln *line) parse(b []byte, writer string) (err error) {
	if ln.sub, err = store.ParseSubmission(b); err != nil {
		return err
	}
	if ln.leaf, err = ln.sub.Stamp(writer, stampTime); err != nil {
		return err
	}
	// Before it stand only v, id and type, none of which can hold a quote.
	const member = `"time":"`
	ln.time = bytes.Index(ln.leaf, []byte(member)) + len(member)
	return nil
}

// seal encrypts the texts of g.
func (l *Ledger) seal(ctx context.Context, g *group) error {
	var sealed []*line
	for i := range g.lines {
		if len(g.lines[i].sub.Openings) > 0 {
			sealed = append(sealed, &g.lines[i])
		}
	}
	if len(sealed) == 0 {
		return nil
	}
	keys, err := l.takeKeys(ctx, len(sealed))
	if err != nil {
		return err
	}
	for i, ln := range sealed {
		ln.key, ln.boxes = &keys[i], sealTexts(ln.sub, keys[i])
	}
	return nil
}

// unseal gives back the keys under which nothing of g, which is settled, was
// written: of what is refused, and of what was on record already.
func (l *Ledger) unseal(g *group) {
	var unused []sealKey
	for i := range g.lines {
		if ln := &g.lines[i]; ln.key != nil && (unwritten(g.err) || g.err == nil && !ln.fresh) {
			unused = append(unused, *ln.key)
		}
	}
	if unused != nil {
		l.giveKeys(unused)
	}
}

// stamp sets the entry's time in its leaf.
func (ln *line) stamp(now store.Time) {
	ln.sub.Entry.Time = now
	copy(ln.leaf[ln.time:], now.String())
}

// same reports whether leaf, on record, is ln with another time.
func (ln *line) same(leaf []byte) bool {
	e, err := store.ParseLeaf(leaf)
	if err != nil {
		return false
	}
	mine := ln.sub.Entry
	mine.Time = e.Time
	a, err1 := mine.Marshal()
	b, err2 := e.Marshal()
	return err1 == nil && err2 == nil && bytes.Equal(a, b)
}

// writer is what the writing goroutine holds.
type writer struct {
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
	state *store.State // nil: must be read again, since the last transaction failed
	front frontier
	last  store.Time // of the newest entry
	swept store.Time // when closed requests were last forgotten
}

// exec runs a prepared statement.
func (w *writer) exec(ctx context.Context, q string, args ...any) error {
	s, err := w.stmt(ctx, q)
	if err != nil {
		return err
	}
	_, err = s.ExecContext(ctx, args...)
	return err
}

func (w *writer) stmt(ctx context.Context, q string) (*sql.Stmt, error) {
	if s := w.stmts[q]; s != nil {
		return s, nil
	}
	s, err := w.conn.PrepareContext(ctx, q)
	if err == nil {
		w.stmts[q] = s
	}
	return s, err
}

// writeLoop commits batches: whatever queued while the last commit ran is the
// next one. There is no timer, so a lone append waits for nobody.
func (l *Ledger) writeLoop() {
	defer l.tasks.Done()
	defer close(l.written)
	batch := make([]*group, 0, maxBatch)
	last := 0 // how many appends the last batch took
	var beat <-chan time.Time
	if every := l.e.heartbeat(); every > 0 {
		t := time.NewTicker(every)
		defer t.Stop()
		beat = t.C
	}
	for {
		batch = batch[:0]
		select {
		case g := <-l.queue:
			batch = append(batch, g)
		case job := <-l.erasing.jobs:
			job()
			continue
		case <-beat:
			l.tryConnection()
			continue
		case <-l.ctx.Done():
			return // Append looks after what is still queued
		}
		// Under load, whoever is ready to run goes first and may join this batch:
		// a commit for few costs nearly as much as one for many. A lone append
		// waits for nobody.
		for queued := -1; last > 1 && queued < len(l.queue) && queued < maxBatch; {
			queued = len(l.queue)
			runtime.Gosched()
		}
		n := len(batch[0].lines)
	drain:
		for n < maxBatch {
			select {
			case g := <-l.queue:
				batch = append(batch, g)
				n += len(g.lines)
			default:
				break drain
			}
		}
		l.commit(batch)
		for _, g := range batch {
			close(g.done)
		}
		last = len(batch)
	}
}

// tryConnection stops the ledger where the connection that writes is lost.
func (l *Ledger) tryConnection() {
	ctx, cancel := l.e.patience(context.Background())
	defer cancel()
	if err := l.wr.conn.PingContext(ctx); err != nil {
		l.stop(fmt.Errorf("%w: %w", ErrLost, err))
	}
}

// pending is a batch on its way into the database.
type pending struct {
	now     store.Time
	lines   []*line
	ids     map[string]*line
	changes map[string]*store.Request // to open_requests; nil: forgotten
	freezes bool                      // one is set or lifted
}

// Commit is one commit, or an attempt at one.
type Commit struct {
	Entries []*store.Entry // on record now; none where it failed
	Took    time.Duration
	Decided []Decided // requests that people had been asked about and that wait no longer
	Err     error     // why nothing was written; nil where it was
}

// Decided is the end of a request's wait for people.
type Decided struct {
	Status store.Status  // approved, denied, expired, void or withdrawn
	Waited time.Duration // since they were asked, by the recorder's clock
}

// tell tells Options.Committed of p. It is to be called before readers know of p.
func (l *Ledger) tell(p *pending, began time.Time, err error) {
	if l.o.Committed == nil {
		return
	}
	c := Commit{Took: time.Since(began), Err: err}
	if err == nil {
		c.Entries = make([]*store.Entry, len(p.lines))
		for i, ln := range p.lines {
			c.Entries[i] = &ln.sub.Entry
		}
		for id, r := range p.changes {
			was := l.open[id] // written by this goroutine alone
			if r == nil || was == nil || was.Pending == nil || was.Status != store.StatusPending || r.Status == store.StatusPending {
				continue
			}
			asked := was.Pending.Expires.Add(-time.Duration(was.Pending.Rule.Expires))
			c.Decided = append(c.Decided, Decided{r.Status, p.now.Sub(asked)})
		}
	}
	l.o.Committed(c)
}

// commit settles every group of the batch: err or head is set when it returns.
func (l *Ledger) commit(batch []*group) {
	w := &l.wr
	fail := func(err error) {
		for _, g := range batch {
			if g.err == nil {
				g.err = err
			}
		}
	}
	if l.ctx.Err() != nil {
		fail(l.closedErr())
		return
	}
	if l.headFile.failed.Load() {
		fail(fmt.Errorf("%w: the head file cannot be written", store.ErrUnavailable))
		return
	}
	// The batch is not tied to a caller's context: who gave up waiting must not
	// spoil it for the others.
	ctx, cancel := l.e.patience(context.Background())
	defer cancel()
	if w.state == nil {
		rs, err := readOpen(ctx, w.conn)
		if err == nil {
			w.state, err = l.readState(ctx, w.conn, rs)
		}
		if err != nil {
			fail(l.writeErr(err))
			return
		}
	}
	known, err := l.lookUp(ctx, batch)
	if err != nil {
		fail(l.writeErr(err))
		return
	}
	p := &pending{now: store.At(l.o.Now()), ids: map[string]*line{}, changes: map[string]*store.Request{}}
	if p.now.Before(w.last.Time) {
		p.now = w.last // the record's time never decreases
	}
	for _, g := range batch {
		if g.ctx.Err() != nil {
			g.err = fmt.Errorf("%w: %w", store.ErrUnavailable, g.ctx.Err())
			continue
		}
		g.err = l.admit(ctx, g, p, known)
	}
	h := l.head.Load()
	if len(p.lines) > 0 {
		// Only with something to write: what is forgotten in memory alone would be
		// there again after the next start, beside what took its place.
		if p.now.Sub(w.swept.Time) > time.Minute {
			b := w.state.Begin()
			b.Forget(p.now)
			maps.Copy(p.changes, b.Commit())
			w.swept = p.now
		}
		began := time.Now()
		if h, err = l.write(ctx, p, began); err != nil {
			l.tell(p, began, err)
			w.state = nil
			err = l.e.class(err)
			switch {
			case !errors.Is(err, errRefused):
				fail(l.writeErr(err))
			case len(batch) == 1:
				fail(fmt.Errorf("%w: %w", store.ErrMalformed, err))
			default: // one of them must not spoil it for the others
				for i := range batch {
					batch[i].err = nil
					l.commit(batch[i : i+1])
				}
			}
			return
		}
	}
	for _, g := range batch {
		g.head = h
	}
}

// writeErr is what the authors are told of err.
func (l *Ledger) writeErr(err error) error {
	if err = l.e.class(err); errors.Is(err, ErrLost) {
		l.stop(err)
	}
	err = l.readErr(err)
	l.o.Log.Warn("append failed", zap.Error(err))
	return err
}

// recorded is an entry found on record.
type recorded struct {
	index int64
	leaf  []byte
}

// lookUp finds which ids of the batch are on record.
func (l *Ledger) lookUp(ctx context.Context, batch []*group) (map[string]recorded, error) {
	var arg strings.Builder
	for _, g := range batch {
		for i := range g.lines {
			arg.WriteString(`,"` + g.lines[i].sub.ID + `"`) // UUIDs need no escaping
		}
	}
	s, err := l.wr.stmt(ctx, "SELECT e.id, e.idx, e.body FROM "+l.e.list("text")+" CROSS JOIN entries e"+l.e.by("entries_id")+" WHERE e.id = j.value")
	if err != nil {
		return nil, err
	}
	rows, err := s.QueryContext(ctx, "["+arg.String()[1:]+"]")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found := map[string]recorded{}
	for rows.Next() {
		var id string
		var r recorded
		if err := rows.Scan(&id, &r.index, &r.leaf); err != nil {
			return nil, err
		}
		found[id] = r
	}
	return found, rows.Err()
}

// admit takes g into p, or says why not. What is on record already is answered
// before the order of the record is asked, which may long have moved on.
func (l *Ledger) admit(ctx context.Context, g *group, p *pending, known map[string]recorded) error {
	b := l.wr.state.Begin()
	size := l.wr.front.size + int64(len(p.lines))
	var fresh []*line
	mine := map[string]*line{}
	for i := range g.lines {
		ln := &g.lines[i]
		ln.stamp(p.now)
		ln.fresh = false
		conflict := fmt.Errorf("entry %d of %d: %w: %s", i+1, len(g.lines), store.ErrConflict, ln.sub.ID)
		if r, ok := known[ln.sub.ID]; ok {
			if !ln.same(r.leaf) {
				return conflict
			}
			ln.index, ln.leaf = r.index, r.leaf
			continue
		}
		twin := p.ids[ln.sub.ID]
		if twin == nil {
			twin = mine[ln.sub.ID]
		}
		if twin != nil {
			if !bytes.Equal(twin.leaf, ln.leaf) {
				return conflict
			}
			ln.index = twin.index
			continue
		}
		if ln.gate != nil {
			return fmt.Errorf("entry %d of %d: %w", i+1, len(g.lines), ln.gate)
		}
		ln.index = size + int64(len(fresh))
		if err := b.Admit(&ln.sub.Entry, ln.leaf, ln.index, g.by.Recorder); err != nil {
			return fmt.Errorf("entry %d of %d: %w", i+1, len(g.lines), err)
		}
		ln.fresh = true
		mine[ln.sub.ID] = ln
		fresh = append(fresh, ln)
	}
	if len(fresh) == 0 {
		return nil
	}
	if err := b.Complete(); err != nil {
		return err
	}
	voids, err := l.voids(ctx, b, p, fresh)
	if err != nil {
		return err
	}
	fresh = append(fresh, voids...)
	p.freezes = p.freezes || b.FreezesChanged()
	maps.Copy(p.changes, b.Commit())
	maps.Copy(p.ids, mine)
	p.lines = append(p.lines, fresh...)
	return nil
}

// write makes p durable and the head. The order, and what a crash leaves:
//
//  1. The keys of sealed texts are durable before: see keyStock.
//  2. Entries, tree nodes, checkpoint, sealed texts and open requests are
//     committed in one transaction. A crash before leaves nothing of them; a
//     crash after leaves them on record unanswered, and the author's retry with
//     the same bytes finds them.
//  3. The head file follows on its own, see headFile.
func (l *Ledger) write(ctx context.Context, p *pending, began time.Time) (_ *head, err error) {
	w := &l.wr
	front := w.front
	n := len(p.lines)
	entries, hashes := make([]any, 0, 2*n), make([]any, 0, 2*n)
	var sealed []any
	all := make([]byte, 0, 2*n*tlog.HashSize+48*tlog.HashSize)
	nodes := make([][]byte, n)
	for i, ln := range p.lines {
		from := len(all)
		all = front.add(all, store.LeafHash(ln.leaf))
		nodes[i] = all[from:len(all):len(all)]
		entries = append(entries, ln.index, string(ln.leaf))
		hashes = append(hashes, ln.index, nodes[i])
		for _, box := range ln.boxes {
			sealed = append(sealed, ln.index, box.field, box.box)
		}
	}
	if err := w.exec(ctx, l.e.begin()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// SQLite may have rolled back already (disk full), or PostgreSQL be gone:
			// then this fails, as it should.
			_, _ = w.conn.ExecContext(ctx, "ROLLBACK")
		}
	}()
	if err := l.e.insert(ctx, w, "entries (idx, body)", 2, entries, ""); err != nil {
		return nil, err
	}
	if err := l.e.insert(ctx, w, "hashes (idx, nodes)", 2, hashes, ""); err != nil {
		return nil, err
	}
	if err := l.e.insert(ctx, w, "sealed (idx, field, box)", 3, sealed, ""); err != nil {
		return nil, err
	}
	var open []any
	for id, r := range p.changes {
		if r != nil {
			open = append(open, id, encodeRequest(r))
		} else if err := w.exec(ctx, "DELETE FROM open_requests WHERE request = $1", id); err != nil {
			return nil, err
		}
	}
	if err := l.e.insert(ctx, w, "open_requests (request, state)", 2, open, " ON CONFLICT (request) DO UPDATE SET state = excluded.state"); err != nil {
		return nil, err
	}
	h, err := sign(l.o.Signer, &front)
	if err != nil {
		return nil, err
	}
	if err := l.e.insert(ctx, w, "checkpoints (size, note)", 2, []any{h.size, h.note}, ""); err != nil {
		return nil, err
	}
	if err := w.exec(ctx, "COMMIT"); err != nil {
		return nil, err
	}
	w.front, w.last = front, p.now
	l.tell(p, began, nil)
	l.committed(p, nodes, h)
	return h, nil
}

// committed makes a commit known to readers.
func (l *Ledger) committed(p *pending, nodes [][]byte, h *head) {
	l.nodes.mu.Lock()
	for i, ln := range p.lines {
		l.nodes.add(ln.index, nodes[i])
	}
	l.nodes.mu.Unlock()

	l.mu.Lock()
	for id, r := range p.changes {
		if r == nil {
			delete(l.open, id)
		} else {
			l.open[id] = r
		}
	}
	for _, ln := range p.lines {
		if ln.sub.Type.Concerns() {
			l.recent = append(l.recent, store.Proven{Index: ln.index, Leaf: ln.leaf})
		}
	}
	if len(l.recent) >= 2*keepRecent {
		l.recentN = l.recent[len(l.recent)-keepRecent-1].Index + 1
		l.recent = append([]store.Proven(nil), l.recent[len(l.recent)-keepRecent:]...)
	}
	if p.freezes {
		l.freezes, l.lifted = l.wr.state.Freezes(), l.wr.state.Lifted()
	}
	l.head.Store(h)
	close(l.grown)
	l.grown = make(chan struct{})
	l.mu.Unlock()

	select {
	case l.headFile.due <- struct{}{}:
	default:
	}
}

// encodeRequest is how a request is stored: compared byte for byte with what a
// replay of the log gives.
func encodeRequest(r *store.Request) string {
	b, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		panic(err) // strings, numbers and times always marshal
	}
	return string(b)
}

// readOpen reads the open requests.
func readOpen(ctx context.Context, q querier) ([]*store.Request, error) {
	rows, err := q.QueryContext(ctx, "SELECT request, state FROM open_requests")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var rs []*store.Request
	for rows.Next() {
		var id string
		var state []byte
		if err := rows.Scan(&id, &state); err != nil {
			return nil, err
		}
		r := &store.Request{}
		if err := json.Unmarshal(state, r, json.RejectUnknownMembers(true)); err != nil || r.ID != id {
			return nil, fmt.Errorf("%w: open request %q is not what was stored", ErrMismatch, id)
		}
		rs = append(rs, r)
	}
	return rs, rows.Err()
}

// readState is the state of the record whose open requests are rs. Freezes in
// force are read from the entries that set and lifted them: they are few, and
// nothing beside the log can disagree with it.
func (l *Ledger) readState(ctx context.Context, q querier, rs []*store.Request) (*store.State, error) {
	type placed struct {
		index int64
		entry *store.Entry
	}
	var es []placed
	for _, t := range []store.Type{store.FreezeSet, store.FreezeLifted} {
		if err := eachEntry(ctx, q, func(i int64, e *store.Entry) error {
			es = append(es, placed{i, e})
			return nil
		}, "SELECT a.idx, a.body "+l.e.walk("type", "", ""), string(t), int64(0), int64(math.MaxInt64)); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(es, func(a, b placed) int { return cmp.Compare(a.index, b.index) })
	s := newState(l.o.Grace, rs)
	for _, e := range es {
		if err := s.LoadFreeze(e.entry, e.index); err != nil {
			return nil, fmt.Errorf("%w: entry %d: %w", ErrMismatch, e.index, err)
		}
	}
	return s, nil
}

// voids are the request.void, admitted to b, of what b's freezes stop: the
// recorder writes them in the append that brings it about, so that nothing slips
// in between. What they repeat of their request stands in its step.requested, and
// who writes in the freeze.set. fresh are the entries of b.
func (l *Ledger) voids(ctx context.Context, b *store.Batch, p *pending, fresh []*line) ([]*line, error) {
	stopped := b.Stopped()
	if len(stopped) == 0 {
		return nil, nil
	}
	stories := map[int64]*store.Entry{} // by index; nil: not read yet
	freezes := make([]*store.Freeze, len(stopped))
	for i, r := range stopped {
		freezes[i] = b.Frozen(r.Orchestrator, r.Run, r.Step, r.Scope)
		stories[r.Requested], stories[freezes[i].Index] = nil, nil
	}
	for _, lines := range [][]*line{p.lines, fresh} {
		for _, ln := range lines {
			if _, wanted := stories[ln.index]; wanted {
				stories[ln.index] = &ln.sub.Entry
			}
		}
	}
	var idx []int64
	for i, e := range stories {
		if e == nil {
			idx = append(idx, i)
		}
	}
	slices.Sort(idx)
	for part := range slices.Chunk(idx, chunk) {
		if err := each(ctx, l.wr.conn, func(rows *sql.Rows) error {
			var i int64
			var body []byte
			if err := rows.Scan(&i, &body); err != nil {
				return err
			}
			e, err := store.ParseLeaf(body)
			stories[i] = e
			return err
		}, "SELECT e.idx, e.body FROM "+l.e.list("bigint")+" CROSS JOIN entries e WHERE e.idx = j.value ORDER BY j.key", jsonList(part)); err != nil {
			return nil, l.writeErr(err)
		}
	}
	size := l.wr.front.size + int64(len(p.lines)+len(fresh))
	out := make([]*line, 0, len(stopped))
	for i, r := range stopped {
		story, freeze := stories[r.Requested], stories[freezes[i].Index]
		if story == nil || freeze == nil {
			return nil, l.writeErr(fmt.Errorf("%w: the step.requested of open request %q, or the freeze.set of what stops it, is not there", ErrMismatch, r.ID))
		}
		sub := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: store.RequestVoid, WriterTime: p.now, Agent: freeze.Agent,
			Subject: story.Subject, Orchestrator: r.Orchestrator, Run: r.Run, Step: r.Step, Request: r.ID,
			Resource: story.Resource, Action: r.Scope, Decision: story.Decision, Risk: story.Risk, Cause: store.Ptr(store.CauseFrozen),
		}}
		sub.SetDetails(store.FrozenDetails{Freeze: freezes[i].ID})
		raw, err := sub.Marshal()
		if err != nil {
			return nil, err
		}
		ln := &line{index: size + int64(i)}
		if err := ln.parse(raw, freeze.Writer); err != nil {
			return nil, err
		}
		ln.stamp(p.now)
		if err := b.Admit(&ln.sub.Entry, ln.leaf, ln.index, true); err != nil {
			return nil, err
		}
		out = append(out, ln)
	}
	return out, nil
}

func newState(grace time.Duration, rs []*store.Request) *store.State {
	s := store.NewState()
	s.Grace = grace
	for _, r := range rs {
		s.Load(r)
	}
	return s
}
