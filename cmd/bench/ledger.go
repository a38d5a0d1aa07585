package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// scratch is a directory on the working directory's own disk: /tmp may be
// memory, where a sync costs nothing.
func scratch() (string, func(), error) {
	dir, err := os.MkdirTemp(".", ".bench-*")
	if err != nil {
		return "", nil, err
	}
	dir, err = filepath.Abs(dir)
	return dir, func() { os.RemoveAll(dir) }, err
}

// disk measures what every durable write stands on.
func disk(ctx context.Context, t *table) error {
	dir, clean, err := scratch()
	if err != nil {
		return err
	}
	defer clean()
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return err
	}
	defer f.Close()
	block := bytes.Repeat([]byte{1}, 512)
	_, err = t.measure(ctx, "write 512 bytes, fdatasync", "the disk", 1, func(context.Context, int, int) error {
		if _, err := f.Write(block); err != nil {
			return err
		}
		return syscall.Fdatasync(int(f.Fd()))
	})
	return err
}

// line is a submission of about 800 bytes.
func line() ([]byte, error) {
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()),
		Agent: "spiffe://bench.example/orchestrator/bench/run/run-1/step/step-1", Orchestrator: "bench",
		Run: "run-1", Step: "step-1", Resource: "postgres://orders", Action: "orders-db:read",
		Risk: &store.Risk{Sensitivity: "low"},
	}}
	s.SetDetails(map[string]string{"statement": rand.Text()})
	b, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	s.SetDetails(map[string]string{"statement": rand.Text() + string(bytes.Repeat([]byte{'x'}, max(0, 800-len(b))))})
	return s.Marshal()
}

func ledgerRows(ctx context.Context, t *table) error {
	dir, clean, err := scratch()
	if err != nil {
		return err
	}
	defer clean()
	const what = "append 800 bytes, durable, signed"
	skey, vkey, err := note.GenerateKey(rand.Reader, "bench.example/log")
	if err != nil {
		return err
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		return err
	}
	l, err := ledger.Open(ctx, ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32)})
	if err != nil {
		return err
	}
	defer l.Close()
	ours := map[int]figure{}
	for _, c := range []int{1, 64, 256} {
		ours[c], err = t.measure(ctx, what, "countersign", c, func(ctx context.Context, _, _ int) error {
			b, err := line()
			if err != nil {
				return err
			}
			_, err = l.Append(ctx, ledger.Author{Name: "bench"}, [][]byte{b})
			return err
		})
		if err != nil {
			return err
		}
	}
	// Tessera goes on publishing until its context ends, and logs to stderr.
	klog.SetOutput(io.Discard)
	klog.LogToStderr(false)
	tctx, end := context.WithCancel(ctx)
	defer end()
	driver, err := posix.New(tctx, posix.Config{Path: filepath.Join(dir, "tessera")})
	if err != nil {
		return err
	}
	appender, shutdown, _, err := tessera.NewAppender(tctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).WithBatching(256, 5*time.Millisecond).WithPushback(4096).WithCheckpointInterval(time.Second))
	if err != nil {
		return err
	}
	theirs := map[int]figure{}
	for _, c := range []int{1, 64, 256} {
		theirs[c], err = t.measure(ctx, what, "Tessera POSIX (256 / 5 ms)", c, func(ctx context.Context, _, _ int) error {
			b, err := line()
			if err != nil {
				return err
			}
			_, err = appender.Add(ctx, tessera.NewEntry(b))()
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := shutdown(ctx); err != nil {
		return err
	}
	t.floor("append p50 at 1", "at most 1 ms", ms(ours[1].p50)+" ms", ours[1].p50 <= time.Millisecond)
	t.floor("append rate at 256", "at least 20,000/s", fmt.Sprintf("%.0f/s", ours[256].rate), ours[256].rate >= 20000)
	t.floor("append p50 at 1, of Tessera's", "at most 1/8", fmt.Sprintf("1/%.1f", float64(theirs[1].p50)/float64(ours[1].p50)), ours[1].p50*8 <= theirs[1].p50)
	t.floor("append rate at 256, of Tessera's", "at least 1", fmt.Sprintf("%.2f", ours[256].rate/theirs[256].rate), ours[256].rate >= theirs[256].rate)
	return nil
}
