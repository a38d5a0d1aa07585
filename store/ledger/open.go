package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/countersign-dev/countersign/store"
)

// keepRecent is how many of the newest entries that writers may follow stay in
// memory, so that following reads nothing from the database.
const keepRecent = 4096

// followAtMost is how many entries one call of a follower gets.
const followAtMost = 256

// OpenSet returns the entries of what is open, ascending, with proofs under one
// head: of each open request its step.requested, what people were asked and their
// decisions, its intents and their outcomes; of those who decided, their passkeys;
// the freezes in force, and those lifted that condemned a credential which is not
// ended yet, each with its end.
// With a request named it returns that one alone, with the freezes that concern
// it, also where it is closed and only its idempotency key is remembered; none
// where it is neither.
func (l *Ledger) OpenSet(ctx context.Context, request string) (*store.Appended, error) {
	var h *head
	var rs []*store.Request
	var idx []int64
	var freezes, lifted []store.Freeze
	if request == "" {
		h, rs, freezes, lifted = l.snapshot()
	} else {
		h, rs, freezes, lifted = l.snapshotOf(request)
	}
	for _, f := range freezes {
		if request == "" || slices.ContainsFunc(rs, func(r *store.Request) bool { return r.Open() && f.Covers(r.Orchestrator, r.Run, r.Step, r.Scope) }) {
			idx = append(idx, f.Index)
		}
	}
	idx = append(idx, unfinished(lifted, rs)...)
	var people []string
	for _, r := range rs {
		if request == "" && !r.Open() {
			continue
		}
		if r.Pending != nil {
			idx = append(idx, r.Pending.Index)
			for _, v := range r.Pending.Votes {
				people = append(people, v.Person)
				idx = append(idx, v.Index)
			}
		}
		switch {
		case r.Attempt <= 1 && (r.Attempt == 0 && (r.Status == store.StatusPending || r.Status == store.StatusApproved) || r.Minting || r.Live):
			idx = append(idx, r.Requested)
			if r.Attempt == 1 {
				idx = append(idx, r.IntentIndex)
			}
			if r.Live {
				idx = append(idx, r.IssuedIndex)
			}
		default: // a first attempt is over: take all there is of the request
			if err := each(ctx, l.r, func(rows *sql.Rows) error {
				var i int64
				err := rows.Scan(&i)
				idx = append(idx, i)
				return err
			}, "SELECT idx FROM entries"+l.e.by("entries_request")+" WHERE request = $1 AND idx >= $2 AND idx < $3 AND type IN "+concerning, r.ID, r.Requested, h.size); err != nil {
				return nil, l.readErr(err)
			}
		}
	}
	slices.Sort(people)
	for _, p := range slices.Compact(people) {
		if err := each(ctx, l.r, func(rows *sql.Rows) error {
			var i int64
			err := rows.Scan(&i)
			idx = append(idx, i)
			return err
		}, "SELECT idx FROM entries"+l.e.by("entries_person")+" WHERE person = $1 AND idx < $2 AND type IN ('passkey.enrolled', 'passkey.activated', 'passkey.revoked')", p, h.size); err != nil {
			return nil, l.readErr(err)
		}
	}
	slices.Sort(idx)
	idx = slices.Compact(idx)
	out, err := l.Leaves(ctx, idx)
	if err != nil {
		return nil, err
	}
	a, err := l.prove(ctx, out, h)
	if err != nil {
		return nil, l.readErr(err)
	}
	return a, nil
}

// unfinished are the indexes of what set and lifted those of lifted that
// condemned a credential of rs.
func unfinished(lifted []store.Freeze, rs []*store.Request) (idx []int64) {
	var live []*store.Request
	oldest := int64(math.MaxInt64) // intent
	for _, r := range rs {
		if r.Live || r.Minting {
			live, oldest = append(live, r), min(oldest, r.IntentIndex)
		}
	}
	for i := range lifted {
		f := &lifted[i]
		if f.Index > oldest && slices.ContainsFunc(live, f.Condemns) {
			idx = append(idx, f.Index, f.Lifted)
		}
	}
	return idx
}

// Leaves reads the entries with the given indexes, ascending and each once.
func (l *Ledger) Leaves(ctx context.Context, idx []int64) ([]store.Proven, error) {
	out := make([]store.Proven, 0, len(idx))
	for part := range slices.Chunk(idx, chunk) {
		ps, err := l.leaves(ctx, part)
		if err != nil {
			return nil, err
		}
		out = append(out, ps...)
	}
	return out, nil
}

// leaves reads the entries with the given indexes, ascending.
func (l *Ledger) leaves(ctx context.Context, idx []int64) ([]store.Proven, error) {
	ps := make([]store.Proven, 0, len(idx))
	err := each(ctx, l.r, func(rows *sql.Rows) error {
		var p store.Proven
		err := rows.Scan(&p.Index, &p.Leaf)
		ps = append(ps, p)
		return err
	}, "SELECT e.idx, e.body FROM "+l.e.list("bigint")+" CROSS JOIN entries e WHERE e.idx = j.value ORDER BY j.key", jsonList(idx))
	if err == nil && len(ps) != len(idx) {
		err = fmt.Errorf("%w: %d of %d open entries are missing", ErrMismatch, len(idx)-len(ps), len(idx))
	}
	if err != nil {
		return nil, l.readErr(err)
	}
	return ps, nil
}

// Follow calls fn with the entries after index after (-1: all) that concern what
// is open (store.Type.Concerns), in order, those on record and then each commit's
// as it happens, until ctx ends, fn fails, or the ledger stops; it returns why.
// Entries of one commit may come in several calls where they are many.
func (l *Ledger) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	return l.follow(ctx, after, func(ps []store.Proven, h *head) error {
		a, err := l.prove(ctx, ps, h)
		if err != nil {
			return l.readErr(err)
		}
		return fn(a)
	})
}

// FollowLeaves is Follow without proofs, for who is in this process and needs
// none.
func (l *Ledger) FollowLeaves(ctx context.Context, after int64, fn func([]store.Proven) error) error {
	return l.follow(ctx, after, func(ps []store.Proven, _ *head) error { return fn(ps) })
}

func (l *Ledger) follow(ctx context.Context, after int64, fn func([]store.Proven, *head) error) error {
	next := max(after+1, 0)
	for {
		l.mu.RLock()
		h, grown, recentN := l.head.Load(), l.grown, l.recentN
		var ps []store.Proven
		if next >= recentN {
			from := sort.Search(len(l.recent), func(i int) bool { return l.recent[i].Index >= next })
			ps = slices.Clone(l.recent[from:min(from+followAtMost, len(l.recent))])
		}
		l.mu.RUnlock()
		end := h.size
		if next < recentN {
			// Older than what is in memory: read on from the database, a stretch at
			// a time, since entries that concern nobody may lie between.
			end = min(h.size, recentN, next+16*chunk)
			err := each(ctx, l.r, func(rows *sql.Rows) error {
				var p store.Proven
				err := rows.Scan(&p.Index, &p.Leaf)
				ps = append(ps, p)
				return err
			}, "SELECT idx, body FROM entries WHERE idx >= $1 AND idx < $2 AND coalesce(type, '') IN "+concerning+" ORDER BY idx LIMIT $3", next, end, followAtMost)
			if err != nil {
				return l.readErr(err)
			}
		}
		if len(ps) == followAtMost {
			end = ps[len(ps)-1].Index + 1
		}
		if len(ps) > 0 {
			if err := fn(ps, h); err != nil {
				return err
			}
		}
		if next = max(next, end); next < h.size {
			continue
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		case <-l.done:
			return l.closedErr()
		}
	}
}
