package ledger

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func BenchmarkAppend1(b *testing.B)   { benchmarkAppend(b, onSQLite, 1) }
func BenchmarkAppend64(b *testing.B)  { benchmarkAppend(b, onSQLite, 64) }
func BenchmarkAppend256(b *testing.B) { benchmarkAppend(b, onSQLite, 256) }

func BenchmarkPostgresAppend1(b *testing.B)   { benchmarkAppend(b, onPostgres, 1) }
func BenchmarkPostgresAppend64(b *testing.B)  { benchmarkAppend(b, onPostgres, 64) }
func BenchmarkPostgresAppend256(b *testing.B) { benchmarkAppend(b, onPostgres, 256) }

// benchmarkAppend appends leaves of 800 bytes from n goroutines, each one entry
// at a time, and reports the rate and the latencies.
func benchmarkAppend(b *testing.B, on engineName, n int) {
	f := newFixtureOn(b, on)
	f.o.Now = time.Now
	l := f.open()
	lines := make([][][]byte, b.N)
	for i := range lines {
		s := used(fmt.Sprintf("run-%d", i/40))
		s.Step, s.Request = fmt.Sprintf("step-%d", i/4), fmt.Sprintf("req_%d", i/4)
		e := s.Entry
		e.SetDetails(map[string]string{"note": ""})
		bare, _ := e.Marshal()
		s.SetDetails(map[string]string{"note": strings.Repeat("x", max(0, 800-len(bare)-len("broker-1")-27))})
		lines[i] = wire(b, s)
	}
	took := make([]time.Duration, b.N)
	var wg sync.WaitGroup
	var r0, r1 syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &r0)
	b.ResetTimer()
	for c := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := c; i < b.N; i += n {
				t := time.Now()
				if _, err := l.Append(context.Background(), broker, lines[i]); err != nil {
					b.Error(err)
					return
				}
				took[i] = time.Since(t)
			}
		}()
	}
	wg.Wait()
	b.StopTimer()
	syscall.Getrusage(syscall.RUSAGE_SELF, &r1)
	b.ReportMetric(float64(r1.Utime.Nano()+r1.Stime.Nano()-r0.Utime.Nano()-r0.Stime.Nano())/1e3/float64(b.N), "cpu-us/entry")
	slices.Sort(took)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
	var leaf []byte
	for s, err := range l.Entries(context.Background(), 0, 1) {
		if err != nil {
			b.Fatal(err)
		}
		leaf = s.Leaf
	}
	b.ReportMetric(float64(len(leaf)), "leaf-bytes")
}

// BenchmarkMillion fills a ledger with a million entries, then reports how long
// it takes to open and the slowest first page of each filter (p50 of 9). It
// needs minutes and 3 GB: run it by name.
func BenchmarkMillion(b *testing.B) {
	const n = 1_000_000
	if f := flag.Lookup("test.bench").Value.String(); !strings.Contains(f, "Million") {
		b.Skip("run by name")
	}
	f := newFixture(b)
	f.o.Now = time.Now
	l := f.open()
	for i := 0; i < n; {
		var lines [][]byte
		for ; len(lines) < 1000; i++ {
			s := used(fmt.Sprintf("run-%d", i/40))
			s.Step, s.Request, s.Orchestrator = fmt.Sprintf("step-%d", i/4), fmt.Sprintf("req_%d", i/4), fmt.Sprintf("o-%d", i%3)
			s.SetDetails(map[string]string{"note": strings.Repeat("x", 250)})
			if i%100_000 == 77 {
				s.Type = "alert.raised"
			}
			lines = append(lines, wire(b, s)...)
		}
		if _, err := l.Append(context.Background(), broker, lines); err != nil {
			b.Fatal(err)
		}
	}
	l.Close()
	t := time.Now()
	l = f.open()
	b.ReportMetric(float64(time.Since(t).Milliseconds()), "open-ms")
	for name, q := range map[string]Query{
		"none": {}, "run": {Run: "run-20000"}, "step": {Step: "step-200000"}, "orchestrator": {Orchestrator: "o-1"}, "type": {Type: "alert.raised"},
		"time": {From: time.Now().Add(-10 * time.Second)}, "absent": {Run: "none"}, "combined": {Orchestrator: "o-1", Type: "alert.raised", Outcome: "allow"},
		"last": {Orchestrator: "o-2", Cursor: "999000"}, "contradiction": {Type: "credential.used", Outcome: "deny"},
	} {
		var took []time.Duration
		for range 9 {
			t := time.Now()
			if _, err := l.History(context.Background(), q); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(t))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[4].Microseconds())/1000, name+"-ms")
	}
	t = time.Now()
	if os.Getenv("COUNTERSIGN_BENCH_RECHECK") != "" {
		if err := l.recheck(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(t).Seconds(), "recheck-s")
	}
}
