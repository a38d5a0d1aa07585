package evidence

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// pageSize is how many entries of history are held at a time.
const pageSize = 512

// Window is the range of indexes that q's From and To select in l as it is now:
// from included, to not. Errors are those of ledger.History.
func Window(ctx context.Context, l *ledger.Ledger, q ledger.Query) (from, to int64, err error) {
	to = l.Size()
	first := func(t time.Time) (int64, error) {
		p, err := l.History(ctx, ledger.Query{From: t, Limit: 1})
		if err != nil || len(p.Entries) == 0 || p.Entries[0].Index > to {
			return to, err
		}
		return p.Entries[0].Index, nil
	}
	if !q.From.IsZero() {
		if from, err = first(q.From); err != nil {
			return 0, 0, err
		}
	}
	if !q.To.IsZero() {
		if to, err = first(q.To); err != nil {
			return 0, 0, err
		}
	}
	return from, max(from, to), nil
}

// selection is what an export holds: the entries of its window, or of those
// the ones that its filters pick, and the context to judge them by.
type selection struct {
	l        *ledger.Ledger
	query    ledger.Query // the filters alone
	from, to int64        // the window
	size     int64        // of the tree
	filtered bool
	picked   []int64 // where filtered: ascending
	context  []int64 // ascending
	policies []policyAt
}

// policyAt is a policy.loaded.
type policyAt struct {
	index  int64
	writer string
}

// filtered reports whether q selects by more than its time.
func filtered(q ledger.Query) bool {
	q.From, q.To, q.Limit, q.Cursor, q.Newest = time.Time{}, time.Time{}, 0, "", false
	return q != ledger.Query{}
}

// newSelection finds what the filters of q pick in [from, to).
func newSelection(ctx context.Context, l *ledger.Ledger, q ledger.Query, from, to, size int64) (*selection, error) {
	s := &selection{l: l, query: q, from: from, to: to, size: size, filtered: filtered(q)}
	s.query.From, s.query.To, s.query.Newest = time.Time{}, time.Time{}, false
	if !s.filtered {
		return s, nil
	}
	err := s.history(ctx, s.query, from, func(h *ledger.HistoryEntry) error {
		if h.Index < to {
			s.picked = append(s.picked, h.Index)
			return nil
		}
		return errPast
	})
	return s, err
}

// errPast ends a walk through history.
var errPast = fmt.Errorf("past the end")

// history calls fn for the entries of q from an index on, until errPast.
func (s *selection) history(ctx context.Context, q ledger.Query, from int64, fn func(*ledger.HistoryEntry) error) error {
	q.Limit, q.Cursor = pageSize, strconv.FormatInt(from, 10)
	for {
		p, err := s.l.History(ctx, q)
		if err != nil {
			return err
		}
		for i := range p.Entries {
			if p.Entries[i].Index >= s.size {
				return nil
			}
			if err := fn(&p.Entries[i]); err == errPast {
				return nil
			} else if err != nil {
				return err
			}
		}
		if p.Next == "" {
			return nil
		}
		q.Cursor = p.Next
	}
}

// count is how many entries the selection holds, without its context.
func (s *selection) count() int64 {
	if s.filtered {
		return int64(len(s.picked))
	}
	return s.to - s.from
}

// holds reports whether index is of the selection itself.
func (s *selection) holds(index int64) bool {
	if !s.filtered {
		return index >= s.from && index < s.to
	}
	_, ok := slices.BinarySearch(s.picked, index)
	return ok
}

// memberOf returns the value of a member of an entry that stands before its
// details, by its bytes alone: within a string a quote is always escaped, so
// that what is found is the member. The values of IDs need no unescaping.
func memberOf(leaf []byte, name string) string {
	_, rest, ok := bytes.Cut(leaf, []byte(`,"`+name+`":"`))
	if !ok {
		return ""
	}
	value, _, ok := bytes.Cut(rest, []byte(`"`))
	if !ok {
		return ""
	}
	return string(value)
}

// requestNames collects requests. Only their hashes are kept where only membership is
// asked for: a false hit adds an entry to the context that is not needed.
type requestNames struct {
	hashes map[uint64]struct{}
	list   map[string]struct{}
}

func (n *requestNames) add(request string) { n.hashes[hashOf(request)] = struct{}{} }

func (n *requestNames) has(request string) bool {
	_, ok := n.hashes[hashOf(request)]
	return ok
}

func hashOf(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	return h.Sum64()
}

// perQuery is how many entries are read in the time of one query for the
// entries of a request.
const perQuery = 30

// around finds the context. export is the index of export.created.
func (s *selection) around(ctx context.Context, export int64) error {
	found := map[int64]struct{}{}
	add := func(i int64) {
		if i < s.size && !s.holds(i) {
			found[i] = struct{}{}
		}
	}
	add(export)
	n := &requestNames{map[uint64]struct{}{}, map[string]struct{}{}}
	drawn := map[string]struct{}{} // requests whose standing approval is drawn on
	look := func(leaf []byte) error {
		if !bytes.Contains(leaf, []byte(`"standing":{"request":"`)) {
			return nil
		}
		e, err := store.ParseLeaf(leaf)
		if err != nil {
			return err
		}
		if e.Type != store.StepRequested {
			return nil
		}
		d, err := store.DetailsAs[store.RequestedDetails](e)
		if err == nil && d.Standing != nil {
			drawn[d.Standing.Request] = struct{}{}
		}
		return err
	}
	if err := s.requests(ctx, n, look, add); err != nil {
		return err
	}
	if err := s.edges(ctx, look, add); err != nil {
		return err
	}
	// What an approval for a whole run rests on. It is a request like others, and
	// rests on none itself.
	for _, r := range slices.Sorted(maps.Keys(drawn)) {
		if err := s.ofRequest(ctx, r, 0, add, nil); err != nil {
			return err
		}
	}
	if err := s.standing(ctx, add); err != nil {
		return err
	}
	s.context = slices.Sorted(maps.Keys(found))
	return s.erasures(ctx)
}

// edges adds the entries before and after a window that is not filtered, with
// those of their requests to judge them by: their times show which time the
// window is whole for, so that nobody can begin it late or end it early unseen.
func (s *selection) edges(ctx context.Context, look func([]byte) error, add func(int64)) error {
	if s.filtered {
		return nil
	}
	for _, i := range []int64{s.from - 1, s.to} {
		if i < 0 || i >= s.size {
			continue
		}
		request := ""
		if err := s.scan(ctx, i, i+1, func(_ int64, leaf []byte) error {
			request = memberOf(leaf, "request")
			return nil
		}); err != nil {
			return err
		}
		add(i)
		if request == "" {
			continue
		}
		if err := s.ofRequest(ctx, request, 0, add, look); err != nil {
			return err
		}
	}
	return nil
}

// requests adds the other entries of every request that has one in the
// selection. A request begins with step.requested (store.Batch sees to it), so
// that one which begins in the window has nothing before it.
func (s *selection) requests(ctx context.Context, n *requestNames, look func([]byte) error, add func(int64)) error {
	tail := s.size - s.to
	if s.filtered {
		if err := s.picks(ctx, func(leaf []byte) error {
			if r := memberOf(leaf, "request"); r != "" {
				n.list[r] = struct{}{}
			}
			return look(leaf)
		}); err != nil {
			return err
		}
		if int64(len(n.list)) > s.size/perQuery {
			for r := range n.list {
				n.add(r)
			}
			return s.scan(ctx, 0, s.size, func(i int64, leaf []byte) error {
				if r := memberOf(leaf, "request"); r != "" && n.has(r) {
					add(i)
					return look(leaf)
				}
				return nil
			})
		}
		for _, r := range slices.Sorted(maps.Keys(n.list)) {
			if err := s.ofRequest(ctx, r, 0, add, look); err != nil {
				return err
			}
		}
		return nil
	}
	byName := tail > 4*perQuery*(s.to-s.from)+100_000 // the tail is too long to be read
	if s.from > 0 || byName {
		began := map[uint64]struct{}{}
		if err := s.scan(ctx, s.from, s.to, func(_ int64, leaf []byte) error {
			r := memberOf(leaf, "request")
			if r == "" {
				return nil
			}
			h := hashOf(r)
			n.hashes[h] = struct{}{}
			if _, ok := began[h]; !ok && memberOf(leaf, "type") != string(store.StepRequested) || byName {
				n.list[r] = struct{}{}
			}
			began[h] = struct{}{}
			return look(leaf)
		}); err != nil {
			return err
		}
		for _, r := range slices.Sorted(maps.Keys(n.list)) {
			if err := s.ofRequest(ctx, r, 0, add, look); err != nil {
				return err
			}
		}
	}
	if byName {
		return nil
	}
	began := map[uint64]struct{}{} // in the tail
	return s.scan(ctx, s.to, s.size, func(i int64, leaf []byte) error {
		r := memberOf(leaf, "request")
		if r == "" {
			return nil
		}
		if s.from == 0 {
			// All that did not begin in the tail began in the window.
			if memberOf(leaf, "type") == string(store.StepRequested) {
				began[hashOf(r)] = struct{}{}
			} else if _, ok := began[hashOf(r)]; !ok {
				add(i)
			}
			return nil
		}
		if n.has(r) {
			add(i)
		}
		return nil
	})
}

// ofRequest adds the entries of one request from an index on.
func (s *selection) ofRequest(ctx context.Context, request string, from int64, add func(int64), look func([]byte) error) error {
	return s.history(ctx, ledger.Query{Request: request}, from, func(h *ledger.HistoryEntry) error {
		add(h.Index)
		if look == nil {
			return nil
		}
		return look(h.Entry)
	})
}

// picks calls fn for the entries that the filters picked.
func (s *selection) picks(ctx context.Context, fn func(leaf []byte) error) error {
	return s.history(ctx, s.query, s.from, func(h *ledger.HistoryEntry) error {
		if h.Index >= s.to {
			return errPast
		}
		return fn(h.Entry)
	})
}

// scan calls fn for all entries of [from, to).
func (s *selection) scan(ctx context.Context, from, to int64, fn func(int64, []byte) error) error {
	for e, err := range s.l.Entries(ctx, from, to) {
		if err != nil {
			return err
		}
		if err := fn(e.Index, e.Leaf); err != nil {
			return fmt.Errorf("entry %d: %w", e.Index, err)
		}
	}
	return nil
}

// standing adds what was in force: whose passkeys and Slack accounts may decide,
// the policy, the holds and the freezes. Of these the later ones too, since they
// judge what of the window's requests is later.
func (s *selection) standing(ctx context.Context, add func(int64)) error {
	for _, t := range []store.Type{store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked, store.SlackLinked, store.HoldPlaced, store.HoldLifted, store.FreezeSet, store.FreezeLifted} {
		if err := s.history(ctx, ledger.Query{Type: string(t)}, 0, func(h *ledger.HistoryEntry) error {
			later := t == store.HoldPlaced || t == store.HoldLifted || t == store.FreezeSet || t == store.FreezeLifted
			if !later && h.Index >= s.to {
				return errPast
			}
			add(h.Index)
			return nil
		}); err != nil {
			return err
		}
	}
	inForce := map[string]int64{} // by writer: recorder and brokers each have a policy of their own
	if err := s.history(ctx, ledger.Query{Type: string(store.PolicyLoaded)}, 0, func(h *ledger.HistoryEntry) error {
		writer := memberOf(h.Entry, "writer")
		s.policies = append(s.policies, policyAt{h.Index, writer})
		switch {
		case h.Index >= s.to:
		case h.Index >= s.from:
			add(h.Index)
		default:
			inForce[writer] = h.Index
		}
		return nil
	}); err != nil {
		return err
	}
	for _, i := range inForce {
		add(i)
	}
	return nil
}

// erasures adds each details.erased that names an entry of selection or
// context, and the policy that said how long it had to be kept.
func (s *selection) erasures(ctx context.Context) error {
	var more []int64
	err := s.history(ctx, ledger.Query{Type: string(store.DetailsErased)}, 0, func(h *ledger.HistoryEntry) error {
		e, err := store.ParseLeaf(h.Entry)
		if err != nil {
			return fmt.Errorf("entry %d: %w", h.Index, err)
		}
		d, err := store.DetailsAs[store.ErasedDetails](e)
		if err != nil {
			return fmt.Errorf("entry %d: %w", h.Index, err)
		}
		if !s.holds(h.Index) && slices.ContainsFunc(d.Entries, func(i int64) bool {
			_, ok := slices.BinarySearch(s.context, i)
			return ok || s.holds(i)
		}) {
			more = append(more, h.Index)
			for _, p := range slices.Backward(s.policies) {
				if p.index < h.Index && p.writer == e.Writer {
					if !s.holds(p.index) {
						more = append(more, p.index)
					}
					break
				}
			}
		}
		return nil
	})
	s.context = slices.Compact(slices.Sorted(slices.Values(append(s.context, more...))))
	return err
}

// gap is up to how many entries that are not wanted are read, so as to read
// those on both sides at once.
const gap = 64

// ranges are the ranges of indexes to read, ascending.
func (s *selection) ranges() iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) {
		var from, to int64 // what is held back
		next := func(a, b int64) bool {
			if a-to <= gap && to > from {
				to = max(to, b)
				return true
			}
			ok := to <= from || yield(from, to)
			from, to = a, b
			return ok
		}
		picked, context := s.picked, s.context
		whole := !s.filtered && s.to > s.from
		for whole || len(picked) > 0 || len(context) > 0 {
			var ok bool
			switch {
			case whole && (len(context) == 0 || s.from < context[0]):
				ok, whole = next(s.from, s.to), false
			case len(picked) > 0 && (len(context) == 0 || picked[0] < context[0]):
				ok, picked = next(picked[0], picked[0]+1), picked[1:]
			default:
				ok, context = next(context[0], context[0]+1), context[1:]
			}
			if !ok {
				return
			}
		}
		if to > from {
			yield(from, to)
		}
	}
}

// exported is an entry on its way into an export.
type exported struct {
	ledger.Stored
	window bool
}

// opened are the texts of it by field.
func (it *exported) opened() map[string]string {
	if len(it.Sealed) == 0 {
		return nil
	}
	m := make(map[string]string, len(it.Sealed))
	for field, o := range it.Sealed {
		m[field] = o.Text
	}
	return m
}

// items reads selection and context, ascending. It reads ahead in a goroutine of
// its own, by two parts of at most partBytes, so that what takes the items can
// compress them meanwhile.
func (s *selection) items(ctx context.Context) iter.Seq2[*exported, error] {
	return func(yield func(*exported, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		type part struct {
			items []exported
			err   error
		}
		parts := make(chan part, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer close(parts)
			var p part
			size := 0
			send := func() bool {
				select {
				case parts <- p:
				case <-ctx.Done():
					return false
				}
				p, size = part{items: make([]exported, 0, pageSize)}, 0
				return true
			}
			context := s.context
			for from, to := range s.ranges() {
				for e, err := range s.l.Export(ctx, from, to) {
					if err != nil {
						p.err = err
						send()
						return
					}
					window := s.holds(e.Index)
					if !window {
						if len(context) == 0 || context[0] != e.Index {
							continue
						}
						context = context[1:]
					}
					p.items = append(p.items, exported{e, window})
					if size += len(e.Leaf); len(p.items) == pageSize || size > partBytes {
						if !send() {
							return
						}
					}
				}
			}
			send()
		}()
		defer func() { cancel(); <-done }()
		for p := range parts {
			for i := range p.items {
				if !yield(&p.items[i], nil) {
					return
				}
			}
			if p.err != nil {
				yield(nil, p.err)
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(nil, err)
		}
	}
}

const partBytes = 4 << 20
