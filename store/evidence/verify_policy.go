package evidence

import (
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// swapLeeway is for how long after a writer put another policy on record it may
// still decide by the last one: requests under way, and brokers behind one name.
const swapLeeway = time.Minute

// inForce follows which policy each writer says is in force, and finds decisions
// by one that was not any more: what an older catalogue allowed is no defence.
// The zero value is ready. It is not safe for concurrent use.
type inForce struct {
	now  map[string]string          // by writer, a digest
	over map[loaded]store.Time      // when it was replaced
	late map[loaded]*decidedTooLate // what was decided by it all the same
}

type loaded struct{ writer, digest string }

type decidedTooLate struct{ first, n int64 }

// load takes policy.loaded.
func (f *inForce) load(e *store.Entry, digest string) {
	if f.now == nil {
		f.now, f.over, f.late = map[string]string{}, map[loaded]store.Time{}, map[loaded]*decidedTooLate{}
	}
	writer := strings.Clone(e.Writer)
	digest = strings.Clone(digest)
	if old, ok := f.now[writer]; ok && old != digest {
		f.over[loaded{writer, old}] = e.Time
	}
	delete(f.over, loaded{writer, digest})
	f.now[writer] = digest
}

// decided takes a decision that names the policy it was taken by.
func (f *inForce) decided(index int64, e *store.Entry) {
	by := loaded{e.Writer, e.Decision.Policy}
	over, ok := f.over[by]
	if !ok || e.Time.Before(over.Add(swapLeeway)) {
		return
	}
	if f.late[by] == nil {
		f.late[by] = &decidedTooLate{first: index}
	}
	f.late[by].n++
}

// tell notes what was found. It is no finding, since brokers that share a name
// may hold different policies for a while.
func (f *inForce) tell(r *Report) {
	for by, l := range f.late {
		r.note("%d requests from entry %d on were decided by the policy %.80q, which their writer %.100q had replaced before", l.n, l.first, by.digest, by.writer)
	}
}
