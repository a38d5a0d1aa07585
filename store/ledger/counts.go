package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/RoaringBitmap/roaring/v2/roaring64"

	"github.com/countersign-dev/countersign/store"
)

// Index answers what reviewers ask about many entries at once: how many match a
// query in each of many intervals, and which do, however common each filter is
// by itself. It keeps in memory, for each filter that was asked for, the set of
// the entries that match it, read from the database's own index. The log is
// append-only, so a set never changes up to the index that it was read to: it is
// read on from there, and two filters together are the intersection of two sets.
// What it holds is at most MaxBytes large; the sets that were not asked for the
// longest are dropped, and read again when they are.
//
// It is safe for concurrent use, and of no further use once its ledger stopped.
type Index struct {
	l     *Ledger
	slots chan struct{} // how many sets are read at once

	mu      sync.Mutex
	sets    map[filter]*set
	bytes   uint64
	most    uint64
	turn    uint64           // counts uses, to say which set was used last
	borders map[string]int64 // time to the first entry at or after it, where there is one
	choices map[string]choice
}

// set is the entries that match one filter.
type set struct {
	used  uint64 // guarded by Index.mu, as is bytes
	bytes uint64

	mu      sync.Mutex
	bits    *roaring64.Bitmap
	to      int64         // entries before this index are in
	reading chan struct{} // closed when the reading under way has ended; nil: none is
	err     error         // of the last reading
}

type choice struct {
	values []string
	at     time.Time
}

const (
	// MaxBytes is how much the sets of an Index hold. A set takes at most two
	// bytes an entry, most take much less.
	MaxBytes = 128 << 20
	// patience is how long Counts waits for sets that are not read yet.
	patience = 25 * time.Millisecond
	// readRows is how many rows are read at a time.
	readRows = 8192
	// maxBorders is how many times' places are remembered.
	maxBorders = 20_000
	// maxSets bounds how many sets there are, empty ones too.
	maxSets = 20_000
	// choicesLife is how long the values of a column are taken as known.
	choicesLife = time.Minute
)

// NewIndex returns an Index of l, and begins to read, in the background, what
// reviewers ask for most.
func NewIndex(l *Ledger) *Index {
	x := &Index{l: l, slots: make(chan struct{}, 2), sets: map[filter]*set{}, most: MaxBytes, borders: map[string]int64{}, choices: map[string]choice{}}
	go x.warm()
	return x
}

// warmed are the columns that are read from the start. They have few values,
// and each value may have many entries.
var warmed = []string{"type", "outcome", "orchestrator", "scope", "target"}

// warm reads the sets of warmed, one after the other, until half of the room is
// taken.
func (x *Index) warm() {
	for _, column := range warmed {
		values, err := x.Values(x.l.ctx, column, 200)
		if err != nil {
			return // the ledger stopped, or the first who asks is told
		}
		for _, v := range values {
			x.mu.Lock()
			full := x.bytes > x.most/2
			x.mu.Unlock()
			if full {
				return
			}
			s := x.set(filter{column, v})
			if done := x.read(s, filter{column, v}, x.l.Size()); done != nil {
				select {
				case <-done:
				case <-x.l.Done():
					return
				}
			}
		}
	}
}

// Values returns the values that type, outcome, orchestrator, scope or target has
// on record, in order, at most so many. They may be a minute old.
func (x *Index) Values(ctx context.Context, column string, most int) ([]string, error) {
	if !slices.Contains(warmed, column) {
		return nil, fmt.Errorf("%w: no values of column %q", ErrQuery, column)
	}
	x.mu.Lock()
	c, ok := x.choices[column]
	x.mu.Unlock()
	if ok && time.Since(c.at) < choicesLife {
		return c.values[:min(len(c.values), most)], nil
	}
	values, last := []string{}, ""
	for len(values) < most { // from each value to the next by the index: the entries between are not read
		var next sql.NullString
		if err := x.l.r.QueryRowContext(ctx, "SELECT min("+column+") FROM entries WHERE "+column+" > $1", last).Scan(&next); err != nil {
			return nil, x.l.readErr(err)
		}
		if !next.Valid {
			break
		}
		values, last = append(values, next.String), next.String
	}
	x.mu.Lock()
	x.choices[column] = choice{values, time.Now()}
	x.mu.Unlock()
	return values, nil
}

// set returns the set of f, empty where it is new.
func (x *Index) set(f filter) *set {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.sets[f]
	if s == nil {
		s = &set{bits: roaring64.New()}
		x.sets[f] = s
	}
	x.turn++
	s.used = x.turn
	return s
}

// read sees to it that s reaches size. It returns nil where it does, or else
// what is closed when the reading has ended.
func (x *Index) read(s *set, f filter, size int64) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.to >= size {
		return nil
	}
	if s.reading == nil {
		s.reading = make(chan struct{})
		go x.readOn(s, f, s.to, size)
	}
	return s.reading
}

// readOn reads the entries [from, size) into s.
func (x *Index) readOn(s *set, f filter, from, size int64) {
	x.slots <- struct{}{}
	defer func() { <-x.slots }()
	var err error
	batch := make([]uint64, 0, readRows)
	for from < size && err == nil {
		batch = batch[:0]
		if err = each(x.l.ctx, x.l.r, func(rows *sql.Rows) error {
			var i int64
			err := rows.Scan(&i)
			batch = append(batch, uint64(i))
			return err
		}, "SELECT a.idx "+x.l.e.walk(f.column, "", "")+" LIMIT $4", f.value, from, size, readRows); err != nil {
			break
		}
		if from = size; len(batch) == readRows {
			from = int64(batch[len(batch)-1]) + 1
		}
		s.mu.Lock()
		s.bits.AddMany(batch)
		s.to = from
		s.mu.Unlock()
	}
	s.mu.Lock()
	s.err = err
	close(s.reading)
	s.reading = nil
	bytes := s.bits.GetSizeInBytes()
	s.mu.Unlock()
	x.weigh(f, s, bytes)
}

// weigh takes note of how large s, the set of f, has become, and drops what was not used for
// the longest where there is too much.
func (x *Index) weigh(f filter, s *set, bytes uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.sets[f] != s {
		return // dropped meanwhile
	}
	x.bytes += bytes - s.bytes
	s.bytes = bytes
	if x.bytes <= x.most && len(x.sets) <= maxSets {
		return
	}
	type old struct {
		f filter
		s *set
	}
	var all []old
	for f, s := range x.sets {
		all = append(all, old{f, s})
	}
	slices.SortFunc(all, func(a, b old) int { return int(int64(a.s.used) - int64(b.s.used)) })
	for _, o := range all {
		if x.bytes <= x.most*3/4 && len(x.sets) <= maxSets*3/4 {
			break
		}
		// Whoever uses it now goes on with it; it is read anew for the next.
		x.bytes -= o.s.bytes
		o.s.bytes = 0
		delete(x.sets, o.f)
	}
}

// ready returns the sets of fs up to size. ok is false where they are not read
// before ctx or patience ends; the reading goes on.
func (x *Index) ready(ctx context.Context, fs []filter, size int64) (sets []*set, ok bool, err error) {
	waits := make([]<-chan struct{}, len(fs))
	for i, f := range fs {
		s := x.set(f)
		sets = append(sets, s)
		waits[i] = x.read(s, f, size)
	}
	for i, s := range sets {
		for waits[i] != nil {
			select {
			case <-waits[i]:
			case <-x.l.Done():
				return nil, false, x.l.closedErr()
			case <-ctx.Done():
				return nil, false, nil
			}
			s.mu.Lock()
			err := s.err
			s.mu.Unlock()
			if err != nil {
				return nil, false, x.l.readErr(err)
			}
			waits[i] = x.read(s, fs[i], size) // another's reading may have had a smaller size
		}
	}
	return sets, true, nil
}

// both is the intersection of sets, which is the caller's; nil where there are
// no sets: all entries.
func both(sets []*set) *roaring64.Bitmap {
	var b *roaring64.Bitmap
	for _, s := range sets {
		s.mu.Lock()
		if b == nil {
			b = s.bits.Clone()
		} else {
			b.And(s.bits)
		}
		s.mu.Unlock()
	}
	return b
}

// below is how many of b are below index i; b nil: all are in.
func below(b *roaring64.Bitmap, i int64) int64 {
	switch {
	case i <= 0:
		return 0
	case b == nil:
		return i
	}
	return int64(b.Rank(uint64(i) - 1))
}

// Series selects, of the entries that match a query, those that are counted
// together. Empty fields select all.
type Series struct{ Type, Outcome string }

// Tally is how many entries match, by series and interval.
type Tally struct {
	// Counting says that the numbers are not known yet: ask again. Counts is nil
	// then.
	Counting bool
	Counts   [][]int64
	Borders  []int64 // index of the first entry at or after each time
}

// Counts counts the entries that match q in each interval between two of at,
// which ascend, and in each of series. Where what it needs is not read yet and
// would keep the caller waiting, it says so, and reads it. q's limit, cursor and
// times mean nothing to it. Errors are as History's.
func (x *Index) Counts(ctx context.Context, q Query, at []time.Time, series []Series) (*Tally, error) {
	ctx, err := x.l.readContext(ctx)
	if err != nil {
		return nil, err
	}
	size := x.l.Size()
	t := &Tally{}
	if t.Borders, err = x.bordersOf(ctx, at, size); err != nil {
		return nil, x.l.readErr(err)
	}
	common := q.filters(x.l.o.PrivacyKey)
	all := slices.Clone(common)
	for _, s := range series {
		all = append(all, s.filters()...)
	}
	brief, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	sets, ok, err := x.ready(brief, all, size)
	if err != nil || !ok {
		t.Counting = true
		if err == nil {
			err = ctx.Err() // the caller's own
		}
		return t, err
	}
	match, sets := both(sets[:len(common)]), sets[len(common):]
	for _, s := range series {
		n := len(s.filters())
		b := both(sets[:n])
		sets = sets[n:]
		switch {
		case b == nil:
			b = match
		case match != nil:
			b.And(match)
		}
		counts := make([]int64, max(len(at)-1, 0))
		for i := range counts {
			counts[i] = below(b, t.Borders[i+1]) - below(b, t.Borders[i])
		}
		t.Counts = append(t.Counts, counts)
	}
	return t, nil
}

func (s Series) filters() (fs []filter) {
	if s.Type != "" {
		fs = append(fs, filter{"type", s.Type})
	}
	if s.Outcome != "" {
		fs = append(fs, filter{"outcome", s.Outcome})
	}
	return fs
}

// bordersOf is the index of the first entry of [0, size) at or after each of at.
func (x *Index) bordersOf(ctx context.Context, at []time.Time, size int64) ([]int64, error) {
	out := make([]int64, len(at))
	var low int64
	for i, t := range at {
		border, err := x.border(ctx, t, low, size)
		if err != nil {
			return nil, err
		}
		out[i], low = border, border
	}
	return out, nil
}

// border is firstAt of [low, size), remembered: where there is an entry at or
// after t, which one is the first does not change any more.
func (x *Index) border(ctx context.Context, t time.Time, low, size int64) (int64, error) {
	key := t.UTC().Format(time.RFC3339Nano)
	x.mu.Lock()
	i, ok := x.borders[key]
	x.mu.Unlock()
	if ok {
		return i, nil
	}
	at := store.At(t)
	if at.Before(t.UTC()) {
		at = store.At(t.Add(time.Microsecond))
	}
	high := size
	for low < high {
		mid := low + (high-low)/2
		var s string
		if err := x.l.r.QueryRowContext(ctx, "SELECT time FROM entries WHERE idx = $1", mid).Scan(&s); err != nil {
			return 0, fmt.Errorf("reading the time of entry %d: %w", mid, err)
		}
		if s < at.String() {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low < size {
		x.mu.Lock()
		if len(x.borders) >= maxBorders {
			clear(x.borders)
		}
		x.borders[key] = low
		x.mu.Unlock()
	}
	return low, nil
}

// Found is a stretch of the entries that match a query, ascending.
type Found struct {
	Entries      []HistoryEntry
	Older, Newer bool // there are more before them, or after them
}

// Find returns the first q.Limit entries that match q with an index of
// [from, to), or the last of them where q.Newest is set: fewer where they would
// take more memory than a page may (pageBytes). q's cursor means nothing to it. It costs the same wherever the stretch lies, and however few of the
// entries that match one filter match another too. Errors are as History's.
func (x *Index) Find(ctx context.Context, q Query, from, to int64) (*Found, error) {
	ctx, err := x.l.readContext(ctx)
	if err != nil {
		return nil, err
	}
	if q.Limit <= 0 || q.Limit > maxLimit {
		return nil, fmt.Errorf("%w: limit %d, want 1 to %d", ErrQuery, q.Limit, maxLimit)
	}
	size := x.l.Size()
	first, last := int64(0), size // the query's own window
	if !q.From.IsZero() {
		if first, err = x.border(ctx, q.From, 0, size); err != nil {
			return nil, x.l.readErr(err)
		}
	}
	if !q.To.IsZero() {
		if last, err = x.border(ctx, q.To, 0, size); err != nil {
			return nil, x.l.readErr(err)
		}
	}
	from, to = max(from, first), min(to, last)
	pick, err := x.picker(ctx, q.filters(x.l.o.PrivacyKey), size)
	if err != nil {
		return nil, err
	}
	idx, err := pick(from, to, q.Newest, q.Limit)
	if err != nil {
		return nil, x.l.readErr(err)
	}
	f := &Found{}
	if len(idx) == 0 {
		return f, nil
	}
	for _, side := range []struct {
		more     *bool
		from, to int64
	}{{&f.Older, first, idx[0]}, {&f.Newer, idx[len(idx)-1] + 1, last}} {
		other, err := pick(side.from, side.to, false, 1)
		if err != nil {
			return nil, x.l.readErr(err)
		}
		*side.more = len(other) > 0
	}
	if f.Entries, err = x.load(ctx, idx, q.Newest); err != nil {
		return nil, err
	}
	if short := len(f.Entries) < len(idx); short && q.Newest {
		f.Older = true
	} else if short {
		f.Newer = true
	}
	return f, nil
}

// picker returns what finds the indexes that match fs: the first n of
// [from, to), or the last, ascending.
func (x *Index) picker(ctx context.Context, fs []filter, size int64) (func(from, to int64, newest bool, n int) ([]int64, error), error) {
	brief := ctx
	if len(fs) <= 1 { // the database's own index serves one filter as well
		b, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		brief = b
	}
	sets, ok, err := x.ready(brief, fs, size)
	switch {
	case err != nil:
		return nil, err
	case !ok && ctx.Err() != nil:
		return nil, ctx.Err()
	case !ok:
		return func(from, to int64, newest bool, n int) (idx []int64, err error) {
			order := ""
			if newest {
				order = " DESC"
			}
			err = each(ctx, x.l.r, func(rows *sql.Rows) error {
				var i int64
				err := rows.Scan(&i)
				idx = append(idx, i)
				return err
			}, "SELECT a.idx "+x.l.e.walk(fs[0].column, "", order)+" LIMIT $4", fs[0].value, from, to, n)
			slices.Sort(idx)
			return idx, err
		}, nil
	}
	match := both(sets)
	return func(from, to int64, newest bool, n int) (idx []int64, err error) {
		a, b := below(match, from), below(match, to)
		if newest {
			a = max(a, b-int64(n))
		} else {
			b = min(b, a+int64(n))
		}
		for ; a < b; a++ {
			i := uint64(a)
			if match != nil {
				if i, err = match.Select(uint64(a)); err != nil {
					return nil, err
				}
			}
			idx = append(idx, int64(i))
		}
		return idx, nil
	}, nil
}

// load reads the entries of idx with the texts behind their commitments.
func (x *Index) load(ctx context.Context, idx []int64, newest bool) ([]HistoryEntry, error) {
	var parts [][]HistoryEntry
	for size := 0; len(idx) > 0 && size <= pageBytes; {
		part := idx[:min(len(idx), loadChunk)]
		if newest {
			part = idx[max(0, len(idx)-loadChunk):]
			idx = idx[:len(idx)-len(part)]
		} else {
			idx = idx[len(part):]
		}
		out := make([]HistoryEntry, 0, len(part))
		leaves, err := x.l.leaves(ctx, part)
		if err != nil {
			return nil, err
		}
		parsed := map[int64]*store.Entry{}
		for _, p := range leaves {
			e, err := store.ParseLeaf(p.Leaf)
			if err != nil {
				return nil, x.l.readErr(fmt.Errorf("%w: entry %d: %w", ErrMismatch, p.Index, err))
			}
			if len(e.Sealed) > 0 {
				parsed[p.Index] = e
			}
		}
		opened, err := x.l.openings(ctx, x.l.r, parsed)
		if err != nil {
			return nil, x.l.readErr(err)
		}
		for _, p := range leaves {
			h := HistoryEntry{Index: p.Index, Entry: p.Leaf}
			for field, o := range opened[p.Index] {
				if h.Opened == nil {
					h.Opened = map[string]string{}
				}
				h.Opened[field] = o.Text
				size += len(o.Text)
			}
			size += len(h.Entry)
			out = append(out, h)
		}
		parts = append(parts, out)
	}
	if newest {
		slices.Reverse(parts)
	}
	return slices.Concat(parts...), nil
}

// loadChunk is how many entries are read at once: with the longest leaves, a
// quarter of pageBytes.
const loadChunk = pageBytes / 4 / store.MaxEntry

// Lookup is the index of the entry with that id. The error wraps ErrNotFound
// where there is none.
func (x *Index) Lookup(ctx context.Context, id string) (int64, error) {
	var i int64
	err := x.l.r.QueryRowContext(ctx, "SELECT idx FROM entries WHERE id = $1", id).Scan(&i)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, fmt.Errorf("%w: no entry %s", ErrNotFound, id)
	}
	return i, x.l.readErr(err)
}

// Receipt proves that an entry is in the log: under the published head, or under
// the newest where that does not reach it yet. The error wraps ErrNotFound where
// there is no such entry.
func (l *Ledger) Receipt(ctx context.Context, index int64) (*store.Receipt, error) {
	ctx, err := l.readContext(ctx)
	if err != nil {
		return nil, err
	}
	h := l.published.Load()
	if index >= h.size {
		h = l.head.Load()
	}
	if index < 0 || index >= h.size {
		return nil, fmt.Errorf("%w: entry %d", ErrNotFound, index)
	}
	leaves, err := l.leaves(ctx, []int64{index})
	if err != nil {
		return nil, err
	}
	a, err := l.prove(ctx, leaves, h)
	if err != nil {
		return nil, l.readErr(err)
	}
	r := a.Receipt(0)
	return &r, nil
}
