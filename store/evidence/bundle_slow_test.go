//go:build slow

package evidence

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// fill writes n entries: stories of five and, for one in fifty, of seven entries
// that a person decided.
func (h *house) fill(n int) {
	h.t.Helper()
	h.append(true, h.policy("scopes: []\n"))
	var batch []*store.Submission
	flush := func() {
		if len(batch) > 0 {
			h.now = h.now.Add(time.Second)
			h.append(false, batch...)
			batch = batch[:0]
		}
	}
	for i := 0; int(h.l.Size())+len(batch) < n; i++ {
		s := h.tale(strconv.Itoa(i), "run-"+strconv.Itoa(i/50), "orders:read", store.Allow)
		var before []*store.Submission
		if i%50 == 49 {
			s.outcome, s.scope, s.grant.Scope = store.NeedsApproval, "orders:write", "orders:write"
			flush()
			asked := h.append(false, s.requested(fmt.Sprintf("Reconcile refunds of week %d, OPS-%d", i%52, i)), s.asked("Reconcile refunds")) + 1
			h.append(true, s.decided(asked, store.Approve, "user:alice-"+strconv.Itoa(i%7), "seen it"))
		} else {
			before = append(before, s.requested(fmt.Sprintf("Reconcile refunds of week %d, OPS-%d", i%52, i)))
		}
		intent := s.issuing()
		batch = append(batch, append(before, intent, s.issued(intent), s.used(intent, fmt.Sprintf("GET /orders/%d", i)), s.revoked(intent))...)
		if len(batch) > 1000 {
			flush()
		}
	}
	flush()
}

// highest keeps the most memory in use that it saw.
func highest(stop chan struct{}) *atomic.Uint64 {
	var most atomic.Uint64
	go func() {
		for {
			b, _ := os.ReadFile("/proc/self/statm")
			var size, resident uint64
			fmt.Sscan(string(b), &size, &resident)
			resident *= uint64(os.Getpagesize())
			if resident > most.Load() {
				most.Store(resident)
			}
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	return &most
}

// counter is a writer that keeps nothing.
type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

func TestAMillionEntriesAreExportedInThirtySecondsAndLittleMemory(t *testing.T) {
	n := 1_000_000
	if s := os.Getenv("COUNTERSIGN_EXPORT_ENTRIES"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	h := newHouse(t)
	if dir := os.Getenv("COUNTERSIGN_EXPORT_DIR"); dir != "" {
		h.o.Dir = dir
		h.l.Close()
		h.open()
	}
	if h.l.Size() < int64(n) {
		begin := time.Now()
		h.fill(n)
		t.Logf("filled with %d entries in %s", h.l.Size(), time.Since(begin))
	}
	h.l.Close()
	h.open() // with nothing of the filling in memory
	runtime.GC()
	for name, format := range map[string]Format{"bundle": Export, "csv": ExportCSV, "jsonl": ExportLines(JSONLine)} {
		o := h.exported(ledger.Query{}, nil)
		stop := make(chan struct{})
		most := highest(stop)
		out := &counter{}
		begin := time.Now()
		if err := format(t.Context(), h.l, out, o); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begin)
		close(stop)
		t.Logf("%s: %d entries in %s, %d MB, at most %d MiB resident", name, o.To-o.From, took, out.n/1e6, most.Load()>>20)
		if name == "bundle" && (took > 30*time.Second || most.Load() > 300<<20) {
			t.Errorf("%s: %s, %d MiB; want 30s, 300 MiB", name, took, most.Load()>>20)
		}
	}
}
