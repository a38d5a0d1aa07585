package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// figure is one measurement: latencies of single calls and calls per second.
type figure struct {
	p50, p99 time.Duration
	rate     float64
}

// table collects rows and floors.
type table struct {
	each   time.Duration
	rows   [][]string
	floors [][]string
	misses int
}

// measure runs fn from c goroutines for t.each, after a warm-up of a fifth of
// it, and adds a row. The first error ends it.
func (t *table) measure(ctx context.Context, what, who string, c int, fn func(ctx context.Context, worker, i int) error) (figure, error) {
	fmt.Fprintf(os.Stderr, "measuring %s, %s, at %d\n", what, who, c)
	if _, _, err := load(ctx, c, t.each/5, fn); err != nil {
		return figure{}, err
	}
	lat, took, err := load(ctx, c, t.each, fn)
	if err != nil {
		return figure{}, err
	}
	return t.add(what, who, c, lat, float64(len(lat))/took.Seconds()), nil
}

// timed is measure, one at a time, of something that says itself how long it
// took.
func (t *table) timed(ctx context.Context, what, who string, fn func(ctx context.Context, worker, i int) (time.Duration, error)) (figure, error) {
	fmt.Fprintf(os.Stderr, "measuring %s, %s\n", what, who)
	var lat []time.Duration
	for start := time.Now(); time.Since(start) < t.each; {
		took, err := fn(ctx, 0, int(serial.Add(1)))
		if err != nil {
			return figure{}, err
		}
		lat = append(lat, took)
	}
	return t.add(what, who, 1, lat, 0), nil
}

// add adds a row; without a rate it has none.
func (t *table) add(what, who string, c int, lat []time.Duration, rate float64) figure {
	slices.Sort(lat)
	f := figure{p50: lat[len(lat)/2], p99: lat[len(lat)*99/100], rate: rate}
	per := ""
	if rate > 0 {
		per = fmt.Sprintf("%.0f", rate)
	}
	t.rows = append(t.rows, []string{what, who, fmt.Sprint(c), ms(f.p50), ms(f.p99), per})
	return f
}

var serial atomic.Int64 // makes every call's names unique in a run

func load(ctx context.Context, c int, d time.Duration, fn func(context.Context, int, int) error) ([]time.Duration, time.Duration, error) {
	var wg sync.WaitGroup
	per := make([][]time.Duration, c)
	var failed atomic.Pointer[error]
	start := time.Now()
	for w := range c {
		wg.Go(func() {
			for time.Since(start) < d && failed.Load() == nil && ctx.Err() == nil {
				i := int(serial.Add(1))
				t0 := time.Now()
				if err := fn(ctx, w, i); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				per[w] = append(per[w], time.Since(t0))
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	if e := failed.Load(); e != nil {
		return nil, 0, *e
	}
	all := slices.Concat(per...)
	if len(all) == 0 {
		return nil, 0, fmt.Errorf("no call ended within %s", d)
	}
	return all, took, ctx.Err()
}

// floor adds a line saying whether a requirement held.
func (t *table) floor(what, must, is string, holds bool) {
	verdict := "holds"
	if !holds {
		verdict, t.misses = "MISSED", t.misses+1
	}
	t.floors = append(t.floors, []string{what, must, is, verdict})
}

func (t *table) missed() int { return t.misses }

func (t *table) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	write := func(head []string, rows [][]string) {
		for _, r := range append([][]string{head}, rows...) {
			for _, cell := range r {
				fmt.Fprint(tw, cell, "\t")
			}
			fmt.Fprintln(tw)
		}
		tw.Flush()
		fmt.Fprintln(w)
	}
	write([]string{"work", "who", "at", "p50 ms", "p99 ms", "per second"}, t.rows)
	write([]string{"floor", "must", "is", ""}, t.floors)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond)) }
