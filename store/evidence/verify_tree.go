package evidence

import (
	"errors"
	"fmt"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
)

// tree is the tree of hashes in a bundle: every tile from level 1 up, and those
// of level 0 that its leaves do not give themselves. It is not safe for
// concurrent use.
type tree struct {
	b     *bundle
	size  int64
	root  tlog.Hash
	whole bool // from level 1 to the root, nothing is missing or contradicts
	cache map[int]cachedTile

	// Leaves come in ascending order; those of one group of 256 are gathered.
	group int64
	have  [bundleWidth]bool
	hash  [bundleWidth]tlog.Hash
	edge  []tlog.Hash // hashes of the last, partial group, from its tile or its leaves
	since int64       // size at which a root is wanted; 0 for none
	stub  []tlog.Hash // hashes of the group in which that size lies
}

type cachedTile struct {
	n      int64
	hashes []tlog.Hash
}

var errNoTile = errors.New("the tile is not in the bundle")

// treeRoot is the RFC 6962 root over hashes, at least one.
func treeRoot(hashes []tlog.Hash) tlog.Hash {
	if len(hashes) == 1 {
		return hashes[0]
	}
	k := 1
	for 2*k < len(hashes) {
		k *= 2
	}
	return tlog.NodeHash(treeRoot(hashes[:k]), treeRoot(hashes[k:]))
}

// width is how many hashes tile n of level l has in the tree.
func (t *tree) width(l int, n int64) int {
	return int(min(bundleWidth, t.size>>(8*l)-n*bundleWidth))
}

// tile reads a tile, nil where it is not there or not as long as it must be.
func (t *tree) tile(l int, n int64) []tlog.Hash {
	if c, ok := t.cache[l]; ok && c.n == n {
		return c.hashes
	}
	w := t.width(l, n)
	if w <= 0 {
		return nil
	}
	f := t.b.members[tileName(tlog.Tile{H: torchwood.TileHeight, L: l, N: n, W: w})]
	if f == nil {
		return nil
	}
	raw, err := readAll(f, bundleWidth*tlog.HashSize)
	if err != nil || len(raw) != w*tlog.HashSize {
		return nil // its digest or size is a finding
	}
	hashes := make([]tlog.Hash, w)
	for i := range hashes {
		hashes[i] = tlog.Hash(raw[i*tlog.HashSize:])
	}
	t.cache[l] = cachedTile{n, hashes}
	return hashes
}

// over is the hash of the group's 256 leaves that the tree of tiles gives.
func (t *tree) over(group int64) (tlog.Hash, bool) {
	hs := t.tile(1, group/bundleWidth)
	if hs == nil || group%bundleWidth >= int64(len(hs)) {
		return tlog.Hash{}, false
	}
	return hs[group%bundleWidth], true
}

// newTree checks the tiles of b against each other. The root is checked by
// finish, since the last leaves may have to come from the entries.
func newTree(b *bundle, size int64, root tlog.Hash) *tree {
	t := &tree{b: b, size: size, root: root, whole: true, cache: map[int]cachedTile{}, group: -1}
	var due int64
	for l := 1; size>>(8*l) > 0; l++ {
		due += (size>>(8*l) + bundleWidth - 1) / bundleWidth
	}
	if due > int64(len(b.names)) {
		b.r.add(NoIndex, KindMissing, "a tree of %d entries has %d tiles above its leaves, and the bundle holds %d members in all", size, due, len(b.names))
		t.whole = false
		return t
	}
	for l := 1; size>>(8*l) > 0; l++ {
		for n := int64(0); n*bundleWidth < size>>(8*l); n++ {
			hs := t.tile(l, n)
			if hs == nil {
				t.whole = false
				b.r.add(NoIndex, KindMissing, "%s", tileName(tlog.Tile{H: torchwood.TileHeight, L: l, N: n, W: t.width(l, n)}))
				continue
			}
			if len(hs) == bundleWidth {
				t.below(l, n, hs)
			}
		}
	}
	for _, name := range b.names {
		tile, ok := tileOf(name)
		if !ok {
			continue
		}
		switch {
		case tile.N > size/bundleWidth || tile.W != t.width(tile.L, tile.N):
			b.r.add(NoIndex, KindMember, "%s is no tile of a tree of %d entries", name, size)
		case tile.L == 0:
			if hs := t.tile(0, tile.N); len(hs) == bundleWidth {
				t.below(0, tile.N, hs)
			} else if hs != nil {
				t.edge = hs
			}
		}
		b.digest(name)
	}
	return t
}

// below compares tile n of level l, which is full, with the hash above it.
func (t *tree) below(l int, n int64, hs []tlog.Hash) {
	above := t.tile(l+1, n/bundleWidth)
	if above == nil {
		return // missing, which is a finding
	}
	if above[n%bundleWidth] != treeRoot(hs) {
		t.whole = false
		first := n * bundleWidth << (8 * l)
		t.b.r.add(NoIndex, KindTile, "%s, over entries %d to %d, does not give the hash above it",
			tileName(tlog.Tile{H: torchwood.TileHeight, L: l, N: n, W: bundleWidth}), first, first+bundleWidth<<(8*l)-1)
	}
}

// digest checks a member's digest that is read elsewhere.
func (b *bundle) digest(name string) {
	m := b.open(name)
	m.close()
}

// take adds the hash of a leaf. Indexes ascend.
func (t *tree) take(index int64, h tlog.Hash) {
	if g := index / bundleWidth; g != t.group {
		t.flush()
		t.group, t.have = g, [bundleWidth]bool{}
	}
	t.have[index%bundleWidth], t.hash[index%bundleWidth] = true, h
}

// flush proves the leaves gathered.
func (t *tree) flush() {
	g := t.group
	if g < 0 || g*bundleWidth >= t.size {
		return
	}
	r, first, width := t.b.r, g*bundleWidth, t.width(0, g)
	if t.since > 0 && t.since/bundleWidth == g {
		t.stub = nil
		for i := int64(0); i < t.since%bundleWidth && t.have[i]; i++ {
			t.stub = append(t.stub, t.hash[i])
		}
	}
	if tile := t.tile(0, g); tile != nil {
		for i, h := range tile {
			if t.have[i] && t.hash[i] != h {
				r.add(first+int64(i), KindLeaf, "its bytes hash to %s, the tree holds %s", t.hash[i], h)
			}
		}
		return
	}
	for i := range width {
		if !t.have[i] {
			r.add(first+int64(i), KindMissing, "entries %d to %d cannot be proved: the bundle has neither all of them nor %s",
				first, first+int64(width)-1, tileName(tlog.Tile{H: torchwood.TileHeight, L: 0, N: g, W: width}))
			return
		}
	}
	if width < bundleWidth {
		t.edge = append([]tlog.Hash{}, t.hash[:width]...)
		return
	}
	if above, ok := t.over(g); ok && treeRoot(t.hash[:]) != above {
		r.add(first, KindLeaf, "entries %d to %d do not hash to what the tree holds: one of them was changed, moved, or put in or left out before them", first, first+bundleWidth-1)
	}
}

// finish proves the last leaves and the root.
func (t *tree) finish() bool {
	t.flush()
	if t.size == 0 || !t.whole {
		return false // contradicted or incomplete already
	}
	root, err := t.at(t.size)
	switch {
	case err != nil:
		t.b.r.add(NoIndex, KindMissing, "the root cannot be worked out: %v", err)
	case root != t.root:
		t.b.r.add(NoIndex, KindRoot, "the tree gives root %s, but %s is signed for size %d", root, t.root, t.size)
	default:
		return true
	}
	return false
}

// at is the root of the tree of the first size entries.
func (t *tree) at(size int64) (tlog.Hash, error) {
	return tlog.TreeHash(size, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			level, n := tlog.SplitStoredHashIndex(x)
			l, k := level/8, level%8
			first := n << k
			tile, from := t.tile(l, first/bundleWidth), int(first%bundleWidth)
			if l == 0 && tile == nil {
				switch g := first / bundleWidth; {
				case g == t.size/bundleWidth && t.edge != nil:
					tile = t.edge
				case t.since > 0 && g == t.since/bundleWidth:
					tile = t.stub
				}
			}
			if from+1<<k > len(tile) {
				return nil, fmt.Errorf("%w: level %d, number %d", errNoTile, l, first/bundleWidth)
			}
			out[i] = treeRoot(tile[from : from+1<<k])
		}
		return out, nil
	}))
}
