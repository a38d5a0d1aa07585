package ledger

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"fmt"
	"math/bits"
	"sync"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"golang.org/x/mod/sumdb/tlog"
)

// frontier is all that it takes to append to a tree: its size and the roots of
// its complete subtrees, one per bit of the size (RFC 6962, section 2.1). It is
// a value: a copy is a savepoint.
type frontier struct {
	size int64
	edge [48]tlog.Hash // edge[l]: root of the complete subtree of 2^l leaves, where bit l of size is set
}

// add appends a leaf and returns dst with the nodes that this completes, the
// leaf hash first: what tlog.StoredHashes returns.
func (f *frontier) add(dst []byte, leaf tlog.Hash) []byte {
	h, l := leaf, 0
	dst = append(dst, h[:]...)
	for ; f.size>>l&1 == 1; l++ {
		h = tlog.NodeHash(f.edge[l], h)
		dst = append(dst, h[:]...)
	}
	f.edge[l] = h
	f.size++
	return dst
}

// root is the tree's hash.
func (f *frontier) root() tlog.Hash {
	if f.size == 0 {
		return sha256.Sum256(nil)
	}
	l := bits.TrailingZeros64(uint64(f.size))
	h := f.edge[l]
	for l++; f.size>>l != 0; l++ {
		if f.size>>l&1 == 1 {
			h = tlog.NodeHash(f.edge[l], h)
		}
	}
	return h
}

// node names a node of the tree: the n'th at level, where leaves are level 0.
type node struct {
	level int
	n     int64
}

// row is the entry that completes the node, under which it is stored.
func (n node) row() int64 { return (n.n+1)<<n.level - 1 }

// edgeNodes are the nodes of a frontier of size.
func edgeNodes(size int64) []node {
	var ns []node
	for l := 0; size>>l != 0; l++ {
		if size>>l&1 == 1 {
			ns = append(ns, node{l, size>>l - 1})
		}
	}
	return ns
}

// keepNodes is how many nodes per level stay in memory, halved at each level
// but never under minNodes. An inclusion proof of an entry that was appended in
// the newest batches needs no others, so that appends read no hashes from SQL.
const (
	keepNodes = 8 * maxBatch
	minNodes  = 8
)

// recentNodes are the newest nodes of each level. The zero value is empty.
type recentNodes struct {
	mu     sync.RWMutex
	levels [48]struct {
		from int64 // number of the first of nodes
		h    []tlog.Hash
	}
}

// add takes the nodes stored in row.
func (r *recentNodes) add(row int64, nodes []byte) {
	for l := 0; len(nodes) >= tlog.HashSize; l, nodes = l+1, nodes[tlog.HashSize:] {
		r.put(node{l, (row+1)>>l - 1}, tlog.Hash(nodes[:tlog.HashSize]))
	}
}

// put adds one node, which must be the next at its level or begins it anew. The
// caller holds mu.
func (r *recentNodes) put(n node, h tlog.Hash) {
	v := &r.levels[n.level]
	if v.from+int64(len(v.h)) != n.n {
		v.from, v.h = n.n, v.h[:0]
	}
	v.h = append(v.h, h)
	if keep := max(keepNodes>>n.level, minNodes); len(v.h) >= 2*keep {
		v.from += int64(len(v.h) - keep)
		v.h = append(v.h[:0], v.h[len(v.h)-keep:]...)
	}
}

// get returns a node. The caller holds mu.
func (r *recentNodes) get(n node) (tlog.Hash, bool) {
	v := &r.levels[n.level]
	if i := n.n - v.from; i >= 0 && i < int64(len(v.h)) {
		return v.h[i], true
	}
	return tlog.Hash{}, false
}

// querier is a *sql.DB, *sql.Conn or *sql.Tx.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// readNodes reads nodes from the database. A missing one is a mismatch.
func readNodes(ctx context.Context, e engine, q querier, ns []node) ([]tlog.Hash, error) {
	if len(ns) == 0 {
		return nil, nil
	}
	want := make(map[int64][]int, len(ns)) // row to indexes into ns
	list := make([]int64, 0, len(ns))
	for i, n := range ns {
		if want[n.row()] == nil {
			list = append(list, n.row())
		}
		want[n.row()] = append(want[n.row()], i)
	}
	arg, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	rows, err := q.QueryContext(ctx, "SELECT h.idx, h.nodes FROM "+e.list("bigint")+" CROSS JOIN hashes h WHERE h.idx = j.value", string(arg))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out, found := make([]tlog.Hash, len(ns)), 0
	for rows.Next() {
		var row int64
		var b sql.RawBytes
		if err := rows.Scan(&row, &b); err != nil {
			return nil, err
		}
		for _, i := range want[row] {
			at := ns[i].level * tlog.HashSize
			if len(b) < at+tlog.HashSize {
				return nil, fmt.Errorf("%w: hashes of entry %d are cut short", ErrMismatch, row)
			}
			out[i] = tlog.Hash(b[at : at+tlog.HashSize])
			found++
		}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if found != len(ns) {
		return nil, fmt.Errorf("%w: %d of %d tree hashes are missing", ErrMismatch, len(ns)-found, len(ns))
	}
	return out, nil
}

// readHashes is readNodes by tlog's numbers.
func readHashes(ctx context.Context, e engine, q querier, indexes []int64) ([]tlog.Hash, error) {
	ns := make([]node, len(indexes))
	for i, x := range indexes {
		ns[i].level, ns[i].n = tlog.SplitStoredHashIndex(x)
	}
	return readNodes(ctx, e, q, ns)
}

// hashReader reads from memory what is there, the rest from the database.
func (l *Ledger) hashReader(ctx context.Context) tlog.HashReaderFunc {
	return func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		var missing []node
		var at []int
		l.nodes.mu.RLock()
		for i, x := range indexes {
			lv, n := tlog.SplitStoredHashIndex(x)
			h, ok := l.nodes.get(node{lv, n})
			if !ok {
				missing, at = append(missing, node{lv, n}), append(at, i)
			}
			out[i] = h
		}
		l.nodes.mu.RUnlock()
		hs, err := readNodes(ctx, l.e, l.r, missing)
		if err != nil {
			return nil, l.readErr(err)
		}
		for i, h := range hs {
			out[at[i]] = h
		}
		return out, nil
	}
}

// prove fills in the proofs of entries under the head h.
func (l *Ledger) prove(ctx context.Context, entries []store.Proven, h *head) (*store.Appended, error) {
	r := l.hashReader(ctx)
	for i := range entries {
		p, err := tlog.ProveRecord(h.size, entries[i].Index, r)
		if err != nil {
			return nil, err
		}
		entries[i].Proof = p
	}
	return &store.Appended{Entries: entries, Checkpoint: h.note}, nil
}

// Consistency proves that the tree of size from is a prefix of the tree of size
// to (RFC 6962, section 2.1.2). Both must be at most Size. Every tree begins
// with the empty one: from 0 has an empty proof.
func (l *Ledger) Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error) {
	if from < 0 || from > to || to > l.Size() {
		return nil, fmt.Errorf("%w: from %d to %d of %d", ErrQuery, from, to, l.Size())
	}
	if from == 0 {
		return tlog.TreeProof{}, nil
	}
	return tlog.ProveTree(to, from, l.hashReader(ctx))
}

// Tile returns a C2SP tlog-tiles tile of the published tree: hashes for t.L >= 0,
// an entry bundle for t.L -1. A tile, or partial tile, that lies outside the
// published tree is ErrNotFound, so that nothing is served that the published
// checkpoint does not cover.
func (l *Ledger) Tile(ctx context.Context, t tlog.Tile) ([]byte, error) {
	if t.H != torchwood.TileHeight || t.L < -1 || t.L > 5 || t.N < 0 || t.N > 1<<40 || t.W < 1 || t.W > torchwood.TileWidth {
		return nil, fmt.Errorf("tile %+v: %w", t, ErrNotFound)
	}
	first, last := t.N*torchwood.TileWidth, t.N*torchwood.TileWidth+int64(t.W) // [first, last) at the tile's level
	level := max(t.L, 0) * torchwood.TileHeight
	if last > l.published.Load().size>>level {
		return nil, fmt.Errorf("tile %s: %w", torchwood.TilePath(t), ErrNotFound)
	}
	if t.L < 0 {
		var out []byte
		for s, err := range l.Entries(ctx, first, last) {
			if err != nil {
				return nil, err
			}
			if out, err = torchwood.AppendTileEntry(out, s.Leaf); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	ns := make([]node, 0, t.W)
	for n := first; n < last; n++ {
		ns = append(ns, node{level, n})
	}
	hs, err := readNodes(ctx, l.e, l.r, ns)
	if err != nil {
		return nil, l.readErr(err)
	}
	out := make([]byte, 0, len(hs)*tlog.HashSize)
	for _, h := range hs {
		out = append(out, h[:]...)
	}
	return out, nil
}
