//go:build slow

package evidence

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// COUNTERSIGN_EXPORT_ENTRIES is how many entries, a million by default;
// COUNTERSIGN_BUNDLE keeps the bundle under that name, with the log's key beside
// it, for another run.
func TestABundleOfAMillionEntriesIsVerifiedInTenSeconds(t *testing.T) {
	n := 1_000_000
	if s := os.Getenv("COUNTERSIGN_EXPORT_ENTRIES"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	path := os.Getenv("COUNTERSIGN_BUNDLE")
	if path == "" {
		path = filepath.Join(t.TempDir(), "bundle.zip")
	}
	if _, err := os.Stat(path); err != nil {
		w := newScribe(t)
		w.policy("policy", "broker-1", nil)
		for i := 0; len(w.leaves) < n; i++ {
			w.low(strconv.Itoa(i), "run-"+strconv.Itoa(i/50))
		}
		for _, f := range []struct {
			name string
			data []byte
		}{{path, w.export(view{}).zip()}, {path + ".pub", []byte(w.vkey)}} {
			if err := os.WriteFile(f.name, f.data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		runtime.GC()
	}
	vkey, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	key, err := store.NewLogVerifier(string(vkey))
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	most := highest(stop)
	var before, after syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	begin := time.Now()
	r, err := VerifyBundle(t.Context(), path, Options{Log: key, Rules: testRules})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	close(stop)
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	t.Logf("%d entries in %s, %s of processor, at most %d MiB resident; findings %.3v", r.Leaves, took, cpu, most.Load()>>20, r.Findings)
	if r.Leaves < int64(n) || took > 10*time.Second {
		t.Errorf("%d entries in %s; want %d in 10s", r.Leaves, took, n)
	}
}
