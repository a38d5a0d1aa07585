package ledger

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
)

// ErasureCode says why texts are not erased.
type ErasureCode string

// Why Erase refuses.
const (
	ErasureMalformed   ErasureCode = "malformed"   // no list of 1 to store.MaxErased entries, ascending
	ErasureUnknown     ErasureCode = "unknown"     // no such entry, or it has no texts
	ErasureDone        ErasureCode = "done"        // its texts are erased
	ErasureUnerasable  ErasureCode = "unerasable"  // texts of its type are needed as long as the record is
	ErasureSensitivity ErasureCode = "sensitivity" // it is of another sensitivity
	ErasureRetention   ErasureCode = "retention"   // the policy on record keeps such texts longer, or for good
	ErasureEarly       ErasureCode = "early"       // it is not old enough
	ErasureHeld        ErasureCode = "held"        // a hold covers it
	ErasureNeeded      ErasureCode = "needed"      // its request is still open, or its credential live
)

// ErasureError is why an erasure is refused. Nothing of it is erased.
type ErasureError struct {
	Code    ErasureCode
	Index   int64 // the first entry it is about; -1 where it is about none
	Message string
}

func (e *ErasureError) Error() string {
	if e.Index < 0 {
		return "not erased: " + e.Message
	}
	return fmt.Sprintf("not erased: entry %d: %s", e.Index, e.Message)
}

// Eraser is in whose name texts are erased: the recorder.
type Eraser struct {
	Name  string // stamped as the writer; the policy.loaded of this writer says how long texts are kept
	Agent string // SPIFFE ID
}

// OfScope before a scope's name is a key of PolicyDetails.Retention: texts about
// that scope are kept so long where that is longer than their sensitivity says.
const OfScope = "scope:"

// Class is texts that are kept equally long.
type Class struct {
	Sensitivity string // empty: about no scope
	Scope       string // empty: all but those that have a retention of their own
}

// erasing is what the record says of erasures, read from it as it grows. Its
// mutex is held while an erasure is judged and put on record, and while a hold
// or a retention is: each sees the other, or comes after it on record.
type erasing struct {
	one  sync.RWMutex // held by an erasure from its record to its end; read-held by KeepTexts
	jobs chan func()  // for the writing goroutine

	mu     sync.Mutex
	upTo   int64                          // the log is known below it
	loaded map[string]store.PolicyDetails // the last of each writer
	holds  map[string]store.HoldDetails   // by entry ID, those not lifted
	erased bitset                         // by index
	broke  func(stage string) error       // test only: what breaks off between stages
}

// bitset is a set of indexes: an eighth of a byte for each entry of the log.
type bitset []uint64

func (b *bitset) add(i int64) {
	if n := int(i/64) + 1; n > len(*b) {
		*b = append(*b, make([]uint64, n-len(*b))...)
	}
	(*b)[i/64] |= 1 << (i % 64)
}

func (b bitset) has(i int64) bool { return i >= 0 && int(i/64) < len(b) && b[i/64]&(1<<(i%64)) != 0 }

// guard keeps apart, in Append, what must not cross an erasure. Nobody but Erase
// writes details.erased, and no writer says how long texts are kept. A hold or a
// retention is waited for to its end, whatever becomes of the caller: until then
// nothing is erased. free is to be called once the append is over.
func (l *Ledger) guard(ctx context.Context, by Author, g *group) (_ context.Context, free func(), err error) {
	free = func() {}
	if by.erases {
		g.ctx = context.WithoutCancel(ctx)
		return g.ctx, free, nil
	}
	locks := false
	for i := range g.lines {
		e := &g.lines[i].sub.Entry
		switch e.Type {
		case store.DetailsErased:
			return nil, nil, fmt.Errorf("%w: details.erased is written by the recorder's own erasures alone", store.ErrMalformed)
		case store.HoldPlaced:
			locks = locks || by.Recorder // a writer's is refused, and waits for nobody before
		case store.PolicyLoaded:
			d, err := store.DetailsAs[store.PolicyDetails](e)
			if err != nil {
				return nil, nil, err
			}
			if d.Retention != nil && !by.Recorder {
				return nil, nil, fmt.Errorf("%w: how long texts are kept is the recorder's to say", store.ErrMalformed)
			}
			locks = locks || by.Recorder
		}
	}
	if !locks {
		return ctx, free, nil
	}
	l.erasing.mu.Lock()
	g.ctx = context.WithoutCancel(ctx)
	return g.ctx, l.erasing.mu.Unlock, nil
}

// learn reads what came on record since it last did. mu is held.
func (l *Ledger) learn(ctx context.Context) error {
	s := &l.erasing
	if s.loaded == nil {
		s.loaded, s.holds = map[string]store.PolicyDetails{}, map[string]store.HoldDetails{}
	}
	size := l.Size()
	if size == s.upTo {
		return nil
	}
	// By type, so that the index serves it. A hold is placed before it is lifted;
	// of the other types each stands for itself.
	for _, t := range []store.Type{store.PolicyLoaded, store.HoldPlaced, store.HoldLifted, store.DetailsErased} {
		if err := l.eachOf(ctx, t, s.upTo, size, func(index int64, e *store.Entry) error {
			var err error
			switch t {
			case store.PolicyLoaded:
				s.loaded[e.Writer], err = store.DetailsAs[store.PolicyDetails](e)
			case store.HoldPlaced:
				s.holds[e.ID], err = store.DetailsAs[store.HoldDetails](e)
			case store.HoldLifted:
				var d store.HoldLiftedDetails
				d, err = store.DetailsAs[store.HoldLiftedDetails](e)
				delete(s.holds, d.Hold)
			case store.DetailsErased:
				var d store.ErasedDetails
				d, err = store.DetailsAs[store.ErasedDetails](e)
				for _, i := range d.Entries {
					if i >= 0 && i < index {
						s.erased.add(i)
					}
				}
			}
			return err
		}); err != nil {
			return err
		}
	}
	s.upTo = size
	return nil
}

// eachOf calls fn for the entries of one type in [from, to), ascending.
func (l *Ledger) eachOf(ctx context.Context, t store.Type, from, to int64, fn func(int64, *store.Entry) error) error {
	return l.readErr(eachEntry(ctx, l.r, fn, "SELECT a.idx, a.body "+l.e.walk("type", "", ""), string(t), from, to))
}

// sensitivity is that of what e is about, empty where it is about no scope.
func sensitivity(e *store.Entry) string {
	if e.Risk == nil {
		return ""
	}
	return e.Risk.Sensitivity
}

// judge says why the texts of entry i may not be erased at now: nil where they
// may. mu is held.
func (l *Ledger) judge(i int64, e *store.Entry, by Eraser, kept time.Duration, now store.Time) *ErasureError {
	kept = max(kept, time.Duration(l.erasing.loaded[by.Name].Retention[OfScope+e.Action]))
	refuse := func(c ErasureCode, m string) *ErasureError { return &ErasureError{Code: c, Index: i, Message: m} }
	switch {
	case len(e.Sealed) == 0:
		return refuse(ErasureUnknown, "it has no texts")
	case l.erasing.erased.has(i):
		return refuse(ErasureDone, "its texts are erased")
	case !e.Type.Erasable():
		return refuse(ErasureUnerasable, "texts of "+string(e.Type)+" are needed as long as the record is")
	case now.Sub(e.Time.Time) <= kept:
		return refuse(ErasureEarly, fmt.Sprintf("its texts are kept until %s", e.Time.Add(kept).Format(time.RFC3339)))
	case l.needed(e.Request, now):
		return refuse(ErasureNeeded, "its request is still open, or its credential live")
	}
	for id, h := range l.erasing.holds {
		if h.Covers(e) {
			return refuse(ErasureHeld, "hold "+id+" covers it")
		}
	}
	return nil
}

// needed reports whether a request is still under way at now: it waits, is
// approved, is being minted for, has a live credential, or others of its run may
// still draw on its approval.
func (l *Ledger) needed(request string, now store.Time) bool {
	if request == "" {
		return false
	}
	l.mu.RLock()
	r := l.open[request]
	l.mu.RUnlock()
	switch {
	case r == nil:
		return false
	case r.Minting, r.Live, r.Status == store.StatusPending, r.Status == store.StatusApproved:
		return true
	}
	return r.Stands() && slices.ContainsFunc(r.Pending.Votes, func(v store.Vote) bool {
		return v.Standing != nil && v.Standing.Until.After(now.Time)
	})
}

// Erase erases the texts of the entries with the given indexes, ascending and at
// most store.MaxErased, all of one sensitivity, which had to be kept for kept.
// When it returns without error neither text nor key is in the ledger's files
// any more; the leaves stay, and so does the tree.
//
// It refuses the whole list with an *ErasureError where a text is not to be
// erased yet: by the retention that by's last policy.loaded has on record, by
// age, by a hold, or as its request is under way. Other errors wrap
// store.ErrUnavailable; the erasure may then be on record without being done,
// and FinishErasures does it.
//
// The order, and what a crash leaves:
//
//  1. details.erased comes on record. A crash before leaves nothing of it, a
//     crash after it texts that are still there: FinishErasures erases them.
//  2. The keys are deleted and their file's WAL is emptied. A crash before leaves
//     the same, a crash after it boxes that nothing opens any more.
//  3. The boxes are deleted.
func (l *Ledger) Erase(ctx context.Context, by Eraser, indexes []int64, sensitivity string, kept time.Duration) error {
	s := &l.erasing
	s.one.Lock()
	defer s.one.Unlock()
	ids, err := l.recordErasure(ctx, by, indexes, sensitivity, kept)
	if err != nil {
		return err
	}
	if err := s.reached("on record"); err != nil {
		return err
	}
	return l.wipe(ctx, indexes, ids)
}

// KeepTexts keeps any erasure from beginning until release is called: for who
// reads many texts that are to be as the log of one size has them, as an export
// does. It waits for an erasure under way. A hold is not needed for it, and is
// no substitute: this ends with the process.
func (l *Ledger) KeepTexts() (release func()) {
	l.erasing.one.RLock()
	return sync.OnceFunc(l.erasing.one.RUnlock)
}

// recordErasure judges an erasure and puts it on record. It returns the IDs of
// the entries.
func (l *Ledger) recordErasure(ctx context.Context, by Eraser, indexes []int64, class string, kept time.Duration) ([]string, error) {
	s := &l.erasing
	if n := len(indexes); n == 0 || n > store.MaxErased || !slices.IsSorted(indexes) || len(slices.Compact(slices.Clone(indexes))) != n {
		return nil, &ErasureError{ErasureMalformed, -1, fmt.Sprintf("want 1 to %d entries, ascending", store.MaxErased)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := l.learn(ctx); err != nil {
		return nil, err
	}
	if i := indexes[0]; i < 0 {
		return nil, &ErasureError{ErasureUnknown, i, "there is no such entry"}
	}
	if i := indexes[len(indexes)-1]; i >= l.Size() {
		return nil, &ErasureError{ErasureUnknown, i, "there is no such entry"}
	}
	least, named := s.loaded[by.Name].Retention[class]
	if !named || least <= 0 || kept < time.Duration(least) {
		return nil, &ErasureError{ErasureRetention, -1, fmt.Sprintf("the policy on record does not let texts of sensitivity %q go after %s", class, kept)}
	}
	now := store.At(l.o.Now())
	leaves, err := l.leaves(ctx, indexes)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(leaves))
	for k, p := range leaves {
		e, err := store.ParseLeaf(p.Leaf)
		if err != nil {
			return nil, l.readErr(fmt.Errorf("%w: entry %d: %w", ErrMismatch, p.Index, err))
		}
		if c := sensitivity(e); c != class {
			return nil, &ErasureError{ErasureSensitivity, p.Index, fmt.Sprintf("it is of sensitivity %q, not %q", c, class)}
		}
		if why := l.judge(p.Index, e, by, kept, now); why != nil {
			return nil, why
		}
		ids[k] = e.ID
	}
	sub := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.DetailsErased, WriterTime: now,
		Agent: by.Agent, Action: string(store.DetailsErased), Cause: store.Ptr("retention"),
	}}
	sub.SetDetails(store.ErasedDetails{Entries: indexes, Sensitivity: class, Kept: store.Duration(kept)})
	line, err := sub.Marshal()
	if err != nil {
		return nil, err
	}
	if _, err := l.Append(ctx, Author{Name: by.Name, Recorder: true, erases: true}, [][]byte{line}); err != nil {
		return nil, fmt.Errorf("recording an erasure: %w", err)
	}
	return ids, nil
}

func (s *erasing) reached(stage string) error {
	if s.broke == nil {
		return nil
	}
	return s.broke(stage)
}

// FinishErasures erases what the details.erased from index from on name and a
// crash left. It returns the size of the log up to which all is done; from there
// the next call may go on. Boxes go last: of an erasure without any left all is
// done, and it is passed over.
func (l *Ledger) FinishErasures(ctx context.Context, from int64) (int64, error) {
	s := &l.erasing
	s.one.Lock()
	defer s.one.Unlock()
	size := l.Size()
	var undone [][]int64
	err := l.eachOf(ctx, store.DetailsErased, from, size, func(index int64, e *store.Entry) error {
		d, err := store.DetailsAs[store.ErasedDetails](e)
		if err != nil {
			return err
		}
		// What is not before it is not its to erase.
		indexes := slices.DeleteFunc(d.Entries, func(i int64) bool { return i < 0 || i >= index })
		if left, err := l.boxesLeft(ctx, indexes); err != nil || !left {
			return err
		}
		leaves, err := l.leaves(ctx, indexes)
		if err != nil {
			return err
		}
		ids := make([]string, len(leaves))
		for k, p := range leaves {
			if ids[k] = leafID(p.Leaf); ids[k] == "" {
				return fmt.Errorf("%w: entry %d is no entry", ErrMismatch, p.Index)
			}
		}
		undone = append(undone, indexes)
		_, err = l.deleteKeys(ctx, indexes, ids)
		return err
	})
	if err != nil {
		return from, err
	}
	if len(undone) == 0 {
		return size, nil
	}
	// Which keys an earlier attempt deleted, and did not look whether they are
	// gone, is not known: the file is written anew, once for all of them.
	if _, err := l.keys.ExecContext(ctx, "VACUUM"); err != nil {
		return from, fmt.Errorf("%w: erasing keys: %w", store.ErrUnavailable, err)
	}
	if err := l.emptyKeysWAL(ctx); err != nil {
		return from, fmt.Errorf("%w: erasing keys: %w", store.ErrUnavailable, err)
	}
	if err := s.reached("keys gone"); err != nil {
		return from, err
	}
	for _, indexes := range undone {
		if err := l.deleteBoxes(ctx, indexes); err != nil {
			return from, fmt.Errorf("%w: erasing texts: %w", store.ErrUnavailable, err)
		}
	}
	return size, s.reached("boxes deleted")
}

// boxesLeft reports whether a box of the entries with the given indexes is there.
func (l *Ledger) boxesLeft(ctx context.Context, indexes []int64) (left bool, err error) {
	err = l.r.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM "+l.e.list("bigint")+" CROSS JOIN sealed s WHERE s.idx = j.value)", jsonList(indexes)).Scan(&left)
	return left, l.readErr(err)
}

// leafID is the ID of a stored entry.
func leafID(leaf []byte) string {
	e, err := store.ParseLeaf(leaf)
	if err != nil {
		return ""
	}
	return e.ID
}

// wipe deletes keys and boxes, so that neither is left in a file of the ledger.
func (l *Ledger) wipe(ctx context.Context, indexes []int64, ids []string) error {
	keys, err := l.deleteKeys(ctx, indexes, ids)
	if err != nil {
		return err
	}
	if err := l.erasing.reached("keys deleted"); err != nil {
		return err
	}
	if err := l.scrubKeys(ctx, keys); err != nil {
		return fmt.Errorf("%w: erasing keys: %w", store.ErrUnavailable, err)
	}
	if err := l.erasing.reached("keys gone"); err != nil {
		return err
	}
	if err := l.deleteBoxes(ctx, indexes); err != nil {
		return fmt.Errorf("%w: erasing texts: %w", store.ErrUnavailable, err)
	}
	return l.erasing.reached("boxes deleted")
}

// deleteKeys deletes the keys of the entries with the given indexes and IDs, and
// returns them.
func (l *Ledger) deleteKeys(ctx context.Context, indexes []int64, ids []string) (keys [][]byte, err error) {
	names := slices.Clone(ids) // of ledgers whose boxes name no key
	if err := each(ctx, l.r, func(rows *sql.Rows) error {
		var box []byte
		err := rows.Scan(&box)
		names = append(names, keyNames(box, "")[0])
		return err
	}, "SELECT s.box FROM "+l.e.list("bigint")+" CROSS JOIN sealed s WHERE s.idx = j.value", jsonList(indexes)); err != nil {
		return nil, l.readErr(err)
	}
	known, err := l.loadKeys(ctx, names)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	for _, key := range known {
		keys = append(keys, key)
	}
	if _, err := l.keys.ExecContext(ctx, "DELETE FROM keys WHERE entry IN (SELECT value FROM json_each($1))", jsonList(names)); err != nil {
		return nil, fmt.Errorf("%w: erasing keys: %w", store.ErrUnavailable, err)
	}
	return keys, nil
}

// scrubKeys sees to it that deleted keys are in the keys file no more. SQLite
// overwrites what it deletes (secure_delete) and the emptied WAL holds no older
// state of a page. What may be left is a copy that splitting a page left in its
// unused part, which SQLite does not know of any more: so the pages are searched
// for the keys, and written anew where one is found.
func (l *Ledger) scrubKeys(ctx context.Context, keys [][]byte) error {
	if err := l.emptyKeysWAL(ctx); err != nil {
		return err
	}
	left, err := l.keysLeft(ctx, keys)
	if err != nil || !left {
		return err
	}
	if _, err := l.keys.ExecContext(ctx, "VACUUM"); err != nil {
		return err
	}
	if err := l.emptyKeysWAL(ctx); err != nil {
		return err
	}
	if left, err = l.keysLeft(ctx, keys); err == nil && left {
		err = errors.New("an erased key is still in the keys file")
	}
	return err
}

// emptyKeysWAL copies the keys file's WAL into it and cuts it to nothing.
func (l *Ledger) emptyKeysWAL(ctx context.Context) error {
	for {
		var busy, log, done int
		// A reader in the middle of the WAL is waited for (busy_timeout), and
		// asked for again: reads of keys are short.
		if err := l.keys.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &log, &done); err != nil {
			return err
		}
		if busy == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.ctx.Done():
			return l.closedErr()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// piece is how many bytes of a key are looked for at a time. What is left of a
// key and holds no aligned piece is at most 14 bytes long: 18 are unknown then.
const piece = 8

// keysLeft searches all pages of the keys file for pieces of keys.
func (l *Ledger) keysLeft(ctx context.Context, keys [][]byte) (bool, error) {
	if len(keys) == 0 {
		return false, nil
	}
	// Two bytes tell most places apart from a piece; the map tells the rest.
	var first [1 << 16]bool
	pieces := map[uint64]bool{}
	for _, k := range keys {
		for ; len(k) >= piece; k = k[piece:] {
			first[binary.LittleEndian.Uint16(k)] = true
			pieces[binary.LittleEndian.Uint64(k)] = true
		}
	}
	found := false
	errFound := errors.New("found")
	err := each(ctx, l.keys, func(rows *sql.Rows) error {
		var page sql.RawBytes
		if err := rows.Scan(&page); err != nil {
			return err
		}
		for i := 0; i+piece <= len(page); i++ {
			if first[uint16(page[i])|uint16(page[i+1])<<8] && pieces[binary.LittleEndian.Uint64(page[i:])] {
				found = true
				return errFound
			}
		}
		return nil
	}, "SELECT data FROM sqlite_dbpage")
	if found {
		err = nil
	}
	return found, err
}

// boxesAtOnce is how many entries' boxes are deleted at once: appends wait for
// it.
const boxesAtOnce = 256

// deleteBoxes deletes encrypted texts, between two commits of the writing
// goroutine. Nothing opens a box without its key, so what the database's free
// pages and WAL still hold of it says nothing.
func (l *Ledger) deleteBoxes(ctx context.Context, indexes []int64) error {
	for part := range slices.Chunk(indexes, boxesAtOnce) {
		done := make(chan error, 1)
		job := func() {
			// Not under the caller's context: to give up would end the connection.
			ctx, cancel := l.e.patience(context.WithoutCancel(ctx))
			defer cancel()
			_, err := l.wr.conn.ExecContext(ctx, "DELETE FROM sealed WHERE idx IN (SELECT j.value FROM "+l.e.list("bigint")+")", jsonList(part))
			done <- err
		}
		select {
		case l.erasing.jobs <- job:
		case <-ctx.Done():
			return ctx.Err()
		case <-l.ctx.Done():
			return l.closedErr()
		}
		if err := <-done; err != nil {
			return err
		}
	}
	return nil
}

// Due returns entries of one class, from index from on, whose texts by may erase
// after kept: the first limit of them. next is where the next call may begin:
// below it is nothing more of that class to erase once these are, but what a
// hold covers (see Lifted) or a type that is never erased.
func (l *Ledger) Due(ctx context.Context, by Eraser, class Class, kept time.Duration, from int64, limit int) (due []int64, next int64, err error) {
	now := store.At(l.o.Now())
	end, err := l.firstAt(ctx, now.Add(-kept), l.Size())
	if err != nil {
		return nil, from, l.readErr(err)
	}
	l.erasing.mu.Lock()
	err = l.learn(ctx)
	kinds := l.erasing.loaded[by.Name].Retention // replaced by a change, never written to
	l.erasing.mu.Unlock()
	if err != nil {
		return nil, from, err
	}
	pinned := int64(-1) // the first that is needed for now
	next = from
	for next < end && len(due) < limit {
		idx := []int64{}
		if err := each(ctx, l.r, func(rows *sql.Rows) error {
			var i int64
			err := rows.Scan(&i)
			idx = append(idx, i)
			return err
		}, "SELECT DISTINCT idx FROM sealed WHERE idx >= $1 AND idx < $2 ORDER BY idx LIMIT $3", next, end, chunk); err != nil {
			return nil, from, l.readErr(err)
		}
		leaves, err := l.leaves(ctx, idx)
		if err != nil {
			return nil, from, err
		}
		l.erasing.mu.Lock() // per stretch, so that a hold does not wait for all of it
		for _, p := range leaves {
			e, err := store.ParseLeaf(p.Leaf)
			if err != nil {
				l.erasing.mu.Unlock()
				return nil, from, l.readErr(fmt.Errorf("%w: entry %d: %w", ErrMismatch, p.Index, err))
			}
			next = p.Index + 1
			_, own := kinds[OfScope+e.Action]
			if sensitivity(e) != class.Sensitivity || own != (class.Scope != "") || own && e.Action != class.Scope {
				continue
			}
			why := l.judge(p.Index, e, by, kept, now)
			if why == nil {
				if due = append(due, p.Index); len(due) == limit {
					break
				}
			} else if (why.Code == ErasureNeeded || why.Code == ErasureEarly) && pinned < 0 {
				pinned = p.Index
			}
		}
		l.erasing.mu.Unlock()
		if len(due) < limit && len(idx) < chunk {
			next = end
		}
	}
	if pinned >= 0 {
		next = pinned
	}
	return due, max(from, next), nil
}

// Lifted returns the index of the first entry that a hold covered which was
// lifted at index since or later, and the size of the log that it looked at:
// -1 where there is none.
func (l *Ledger) Lifted(ctx context.Context, since int64) (first, size int64, err error) {
	first, size = -1, l.Size()
	lifted := map[string]bool{}
	if err := l.eachOf(ctx, store.HoldLifted, since, size, func(_ int64, e *store.Entry) error {
		d, err := store.DetailsAs[store.HoldLiftedDetails](e)
		lifted[d.Hold] = true
		return err
	}); err != nil || len(lifted) == 0 {
		return first, size, err
	}
	err = l.eachOf(ctx, store.HoldPlaced, 0, size, func(_ int64, e *store.Entry) error {
		if !lifted[e.ID] {
			return nil
		}
		d, err := store.DetailsAs[store.HoldDetails](e)
		if err != nil {
			return err
		}
		var from int64
		if d.Run != "" {
			err = l.r.QueryRowContext(ctx, "SELECT coalesce((SELECT a.idx "+l.e.walk("run", "", "")+" LIMIT 1), $3)", d.Run, 0, size).Scan(&from)
		} else {
			from, err = l.firstAt(ctx, d.From.Time, size)
		}
		if err == nil && (first < 0 || from < first) {
			first = from
		}
		return err
	})
	return first, size, l.readErr(err)
}

// checkMissing reports texts of entries [from, to) that are gone, box or key,
// without their erasure on record. unkeyed are those whose key is missing. The
// tree does not depend on texts, so it is a finding in the log and for `verify`,
// and nothing stops.
func (l *Ledger) checkMissing(ctx context.Context, q querier, from, to int64, unkeyed map[int64]bool) error {
	gone := map[int64]bool{}
	for i := range unkeyed {
		gone[i] = true
	}
	if err := eachEntry(ctx, q, func(i int64, e *store.Entry) error {
		if len(e.Sealed) > 0 {
			gone[i] = true
		}
		return nil
	}, `SELECT e.idx, e.body FROM entries e WHERE e.idx >= $1 AND e.idx < $2 AND e.body NOT LIKE '%"sealed":{}}'`+
		" AND (SELECT count(*) FROM sealed s WHERE s.idx = e.idx) < "+l.e.sealedFields("e.body"), from, to); err != nil {
		return err
	}
	if len(gone) == 0 {
		return nil
	}
	// After it was read what is gone: an erasure is on record before.
	l.erasing.mu.Lock()
	defer l.erasing.mu.Unlock()
	if err := l.learn(ctx); err != nil {
		return err
	}
	for i := range gone {
		if !l.erasing.erased.has(i) {
			l.o.Log.Error("a sealed text is gone without its erasure on record", zap.Int64("entry", i))
		}
	}
	return nil
}

// Loaded returns the last policy.loaded of the writer named, whose Retention must
// not be changed: nil where there is none. It is safe for concurrent use.
func (l *Ledger) Loaded(ctx context.Context, writer string) (*store.PolicyDetails, error) {
	l.erasing.mu.Lock()
	defer l.erasing.mu.Unlock()
	if err := l.learn(ctx); err != nil {
		return nil, err
	}
	d, ok := l.erasing.loaded[writer]
	if !ok {
		return nil, nil
	}
	return &d, nil
}
