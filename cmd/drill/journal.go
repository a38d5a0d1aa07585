package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// window is the time from one fault to the next, and what callers met in it.
type window struct {
	fault, part   string
	began         time.Time
	calls         int
	failed        map[string]int // by problem
	stall         time.Duration  // the longest that a caller waited for a credential
	healed        time.Duration  // from the fault's end until all was well again
	credentials   int            // handed out
	lost, doubled int
	notHealed     error
}

// journal is what callers met, by window. It is safe for concurrent use.
type journal struct {
	mu      sync.Mutex
	windows []*window
}

func newJournal() *journal {
	j := &journal{}
	j.next("none", "-")
	return j
}

// next begins a window.
func (j *journal) next(fault, part string) *window {
	j.mu.Lock()
	defer j.mu.Unlock()
	w := &window{fault: fault, part: part, began: time.Now(), failed: map[string]int{}}
	j.windows = append(j.windows, w)
	return w
}

func (j *journal) current() *window {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.windows[len(j.windows)-1]
}

// call counts a call that was answered now; failed is "" if it went well.
func (j *journal) call(failed string) *window {
	j.mu.Lock()
	defer j.mu.Unlock()
	w := j.windows[len(j.windows)-1]
	if w.calls++; failed != "" {
		w.failed[failed]++
	}
	return w
}

// stall tells that a caller that asked in w waited for d.
func (j *journal) stall(w *window, d time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	w.stall = max(w.stall, d)
}

// print prints the table, a line for each fault and part: what happened to a part
// more than once is added up.
func (j *journal) print(out io.Writer) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	type key struct{ fault, part string }
	var order []key
	sum := map[key]*window{}
	add := func(k key, w *window) {
		t := sum[k]
		if t == nil {
			t = &window{failed: map[string]int{}}
			sum[k] = t
			order = append(order, k)
		}
		t.calls += w.calls
		t.credentials += w.credentials
		t.lost += w.lost
		t.doubled += w.doubled
		t.stall, t.healed = max(t.stall, w.stall), max(t.healed, w.healed)
		for p, n := range w.failed {
			t.failed[p] += n
		}
	}
	for _, w := range j.windows {
		add(key{w.fault, w.part}, w)
	}
	for _, w := range j.windows {
		add(key{"all", ""}, w)
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "fault\tpart\tcalls\tissued\tlongest stall\twell again\tlost\tdoubled\tfailed")
	for _, k := range order {
		w := sum[k]
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%.1f s\t%.1f s\t%d\t%d\t%s\n", k.fault, k.part, w.calls, w.credentials, w.stall.Seconds(), w.healed.Seconds(), w.lost, w.doubled, problems(w.failed))
	}
	return t.Flush()
}

func problems(failed map[string]int) string {
	if len(failed) == 0 {
		return "0"
	}
	names := slices.SortedFunc(maps.Keys(failed), func(a, b string) int {
		return cmp.Or(cmp.Compare(failed[b], failed[a]), strings.Compare(a, b))
	})
	var list []string
	for _, n := range names {
		list = append(list, fmt.Sprintf("%d %s", failed[n], n))
	}
	return strings.Join(list, ", ")
}

// sqlstate names how a statement failed.
func sqlstate(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return "no answer"
}
