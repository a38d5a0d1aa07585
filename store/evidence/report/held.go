package report

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// key names parts in 16 bytes. Names in a record are chosen by whoever writes
// it: it is cut from a SHA-256 so that no two can be made to look like one.
func key(parts ...string) [16]byte {
	var room [256]byte
	b := room[:0]
	for _, p := range parts {
		b = binary.AppendUvarint(b, uint64(len(p)))
		b = append(b, p...)
	}
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16])
}

// recent remembers the latest most to 2*most keys that were put, maxCached where
// most is 0. The zero value is empty.
type recent[V any] struct {
	young, old map[[16]byte]V
	most       int
}

func (r *recent[V]) get(k [16]byte) (V, bool) {
	if v, ok := r.young[k]; ok {
		return v, true
	}
	v, ok := r.old[k]
	return v, ok
}

// put remembers v, and returns what is forgotten for it, in no order.
func (r *recent[V]) put(k [16]byte, v V) (lost []V) {
	if r.young == nil {
		r.young = map[[16]byte]V{}
	}
	if _, ok := r.young[k]; !ok && len(r.young) >= cmp.Or(r.most, maxCached) {
		for k, v := range r.old {
			if _, newer := r.young[k]; !newer {
				lost = append(lost, v)
			}
		}
		r.old, r.young = r.young, map[[16]byte]V{}
	}
	r.young[k] = v
	return lost
}

// each calls f with all that is remembered, in no order.
func (r *recent[V]) each(f func(V)) {
	for _, v := range r.young {
		f(v)
	}
	for k, v := range r.old {
		if _, newer := r.young[k]; !newer {
			f(v)
		}
	}
}

// list is the first maxRows of n rows.
type list[T any] struct {
	rows []T
	n    int64
}

func (l *list[T]) room() bool { return len(l.rows) < maxRows }

func (l *list[T]) add(row T) {
	l.n++
	if l.room() {
		l.rows = append(l.rows, row)
	}
}

// tally sums up by key, and what comes after maxGroups keys as one rest.
type tally[K comparable, V any] struct {
	sums map[K]*V
	rest V
	over bool // something was summed in rest
}

// at returns the sum for k.
func (t *tally[K, V]) at(k K) *V {
	v := t.sums[k]
	switch {
	case v != nil:
		return v
	case len(t.sums) >= maxGroups:
		t.over = true
		return &t.rest
	case t.sums == nil:
		t.sums = map[K]*V{}
	}
	v = new(V)
	t.sums[k] = v
	return v
}

// find returns the sum for k, the rest where k is in it, or nil.
func (t *tally[K, V]) find(k K) *V {
	if v := t.sums[k]; v != nil || !t.over {
		return v
	}
	return &t.rest
}

// sorted returns the keys, the greatest by weight first, equal ones by order.
func (t *tally[K, V]) sorted(weight func(*V) int64, order func(a, b K) int) []K {
	return slices.SortedFunc(maps.Keys(t.sums), func(a, b K) int {
		return cmp.Or(cmp.Compare(weight(t.sums[b]), weight(t.sums[a])), order(a, b))
	})
}

// missing are the entries of the window whose texts are not all there. It takes
// 8 bytes for each.
type missing struct {
	at      []int64 // ascending
	erased  map[int64]bool
	covered int64 // of at, those that an erasure on record names
}

func (m *missing) add(index int64) { m.at = append(m.at, index) }

// explain says that the texts of entry index were erased on record. An erasure
// names only entries before it.
func (m *missing) explain(index int64) bool {
	i, found := slices.BinarySearch(m.at, index)
	if !found || m.erased[int64(i)] {
		return false
	}
	if m.erased == nil {
		m.erased = map[int64]bool{}
	}
	m.erased[int64(i)] = true
	m.covered++
	return true
}

// unexplained returns the first max entries whose texts are gone without an
// erasure on record.
func (m *missing) unexplained(max int) (out []int64) {
	for i, index := range m.at {
		if len(out) == max {
			break
		}
		if !m.erased[int64(i)] {
			out = append(out, index)
		}
	}
	return out
}
