//go:build slow

package evidence

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
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
		h := newHouse(t)
		h.fill(n)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		w := bufio.NewWriterSize(f, 1<<20)
		if err := Export(t.Context(), h.l, w, h.exported(ledger.Query{}, nil)); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		f.Close()
		h.l.Close()
		if err := os.WriteFile(path+".pub", []byte(h.vkey), 0o600); err != nil {
			t.Fatal(err)
		}
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
	r, err := VerifyBundle(t.Context(), path, Options{Log: key})
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
