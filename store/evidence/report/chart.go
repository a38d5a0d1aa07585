package report

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// series are the counts over time that are drawn.
type series int

const (
	issuances series = iota
	denials
	decisions
	nSeries
)

var seriesWords = [nSeries]struct{ Title, Anchor, Class string }{
	issuances: {"Credentials issued", "#reached", "issued"},
	denials:   {"Denied or refused", "#exceptions", "denied"},
	decisions: {"Decisions by people", "#approved", "decided"},
}

// maxBuckets are kept while counting, maxBars are drawn.
const (
	maxBuckets = 2_048
	maxBars    = 96
)

// widths of a bar, each a multiple of the one before. Beyond the last they
// double.
var widths = []time.Duration{
	time.Minute, 10 * time.Minute, time.Hour, 6 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 28 * 24 * time.Hour,
}

// chart counts over time. Its zero value is empty.
type chart struct {
	width   time.Duration
	buckets []bucket // ascending
}

type bucket struct {
	at int64 // begin, seconds since 1970
	n  [nSeries]int64
}

func (c *chart) count(t store.Time, s series, n int64) {
	if c.width == 0 {
		c.width = widths[0]
	}
	begin := floor(t.Unix(), c.width)
	// The record's time never decreases, so this is the last one or a new one.
	i := len(c.buckets) - 1
	if i < 0 || c.buckets[i].at != begin {
		var found bool
		if i, found = slices.BinarySearchFunc(c.buckets, begin, func(b bucket, at int64) int { return cmp.Compare(b.at, at) }); !found {
			c.buckets = slices.Insert(c.buckets, i, bucket{at: begin})
		}
	}
	c.buckets[i].n[s] += n
	for len(c.buckets) > maxBuckets {
		*c = c.coarser()
	}
}

// floor is where the bar begins that holds second t. Weeks begin on Mondays:
// 1 January 1970 was a Thursday.
func floor(t int64, width time.Duration) int64 {
	w := int64(width / time.Second)
	shift := int64(0)
	if width >= 7*24*time.Hour {
		shift = 3 * 24 * 3600
	}
	t += shift
	return t - (t%w+w)%w - shift
}

// coarser returns c with bars of the next width.
func (c *chart) coarser() chart {
	next := chart{width: 2 * c.width}
	if i := slices.Index(widths, c.width); i >= 0 && i+1 < len(widths) {
		next.width = widths[i+1]
	}
	for _, b := range c.buckets {
		begin := floor(b.at, next.width)
		if n := len(next.buckets); n == 0 || next.buckets[n-1].at != begin {
			next.buckets = append(next.buckets, bucket{at: begin})
		}
		last := &next.buckets[len(next.buckets)-1]
		for s := range b.n {
			last.n[s] += b.n[s]
		}
	}
	return next
}

// The drawing, in units of its view box.
const (
	plotWidth, plotHeight = 720, 110
)

type plot struct {
	Title, Anchor, Class, ID string
	Total, Most              int64
	Words                    string
	Bars                     []bar
}

type bar struct {
	X, Y, W, H string
	Title      string
}

type tick struct{ X, Anchor, Text string }

type drawing struct {
	Unit  string // "per day"
	Plots []plot
	Ticks []tick
	Rows  []chartRow // of the table, times with nothing left out
}

type chartRow struct {
	When string
	N    [nSeries]int64
}

// draw chooses the width of the bars and places them between from and to, the
// window's first and last time.
func (c chart) draw(from, to store.Time) *drawing {
	if len(c.buckets) == 0 {
		return nil
	}
	first, last := c.buckets[0].at, c.buckets[len(c.buckets)-1].at
	if !from.IsZero() && !to.IsZero() {
		first, last = min(first, from.Unix()), max(last, to.Unix())
	}
	bars := func() int64 { return (floor(last, c.width)-floor(first, c.width))/int64(c.width/time.Second) + 1 }
	for bars() > maxBars {
		c = c.coarser()
	}
	n, begin, step := bars(), floor(first, c.width), int64(c.width/time.Second)
	d := &drawing{Unit: map[time.Duration]string{
		time.Minute: "per minute", 10 * time.Minute: "per 10 minutes", time.Hour: "per hour", 6 * time.Hour: "per 6 hours",
		24 * time.Hour: "per day", 7 * 24 * time.Hour: "per week",
	}[c.width]}
	if d.Unit == "" {
		d.Unit = fmt.Sprintf("per %d days", c.width/(24*time.Hour))
	}
	slot := float64(plotWidth) / float64(max(n, 12))
	when := func(at int64) string {
		t := time.Unix(at, 0).UTC()
		if c.width < 24*time.Hour {
			return t.Format("2 Jan 2006, 15:04")
		}
		return t.Format("2 Jan 2006")
	}
	for s := range nSeries {
		p := plot{Title: seriesWords[s].Title, Anchor: seriesWords[s].Anchor, Class: seriesWords[s].Class, ID: fmt.Sprintf("chart-%d", s)}
		peak := int64(0)
		for _, b := range c.buckets {
			p.Total += b.n[s]
			if b.n[s] > p.Most {
				p.Most, peak = b.n[s], b.at
			}
		}
		p.Words = "none in this window"
		if p.Most > 0 {
			p.Words = fmt.Sprintf("%s in all, at most %s %s (%s)", number(p.Total), number(p.Most), d.Unit, when(peak))
		}
		for _, b := range c.buckets {
			if b.n[s] == 0 {
				continue
			}
			h := max(1.5, float64(b.n[s])/float64(p.Most)*plotHeight) // a single one among thousands is still seen
			p.Bars = append(p.Bars, bar{
				X: point(float64((b.at-begin)/step)*slot + slot*.12), W: point(slot * .76), Y: point(plotHeight - h), H: point(h),
				Title: when(b.at) + ": " + number(b.n[s]),
			})
		}
		d.Plots = append(d.Plots, p)
	}
	d.Ticks = append(d.Ticks, tick{X: "0", Anchor: "start", Text: when(begin)})
	if n > 1 {
		end := float64(n) * slot
		anchor := "end"
		if end < plotWidth/2 {
			anchor = "start"
			if end < 180 {
				end = 180
			}
		}
		d.Ticks = append(d.Ticks, tick{X: point(end), Anchor: anchor, Text: when(begin + (n-1)*step)})
	}
	for _, b := range c.buckets {
		if b.n != [nSeries]int64{} {
			d.Rows = append(d.Rows, chartRow{when(b.at), b.n})
		}
	}
	return d
}

func point(v float64) string { return fmt.Sprintf("%.2f", v) }
