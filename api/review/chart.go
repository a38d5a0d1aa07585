package review

import (
	"fmt"
	"net/url"
	"time"

	"github.com/countersign-dev/countersign/store/ledger"
)

// maxBars is how many bars a chart has at most, but for what calendar years
// need.
const maxBars = 62

// spans are the lengths that a bar may stand for. Those of a day and more begin
// at midnight UTC, weeks on Monday.
var spans = []struct {
	length time.Duration
	name   string
}{
	{time.Second, "second"}, {10 * time.Second, "10 seconds"}, {time.Minute, "minute"}, {5 * time.Minute, "5 minutes"}, {15 * time.Minute, "15 minutes"},
	{time.Hour, "hour"}, {3 * time.Hour, "3 hours"}, {6 * time.Hour, "6 hours"},
	{24 * time.Hour, "day"}, {7 * 24 * time.Hour, "week"},
}

// bars cuts [from, to) into intervals of one length that are not too many. It
// returns their borders, at least two, and what the length is called.
func bars(from, to time.Time) (at []time.Time, name string) {
	from, to = from.UTC(), to.UTC()
	if !to.After(from) {
		to = from.Add(time.Second)
	}
	next := func(t time.Time) time.Time { // calendar months, or more of them
		return time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, time.UTC)
	}
	begin, name := time.Date(from.Year(), from.Month(), 1, 0, 0, 0, 0, time.UTC), "month"
	if years := to.Year() - from.Year(); years > 5 {
		step := 1 + years/maxBars
		begin, name = time.Date(from.Year(), 1, 1, 0, 0, 0, 0, time.UTC), "year"
		if step > 1 {
			name = fmt.Sprintf("%d years", step)
		}
		next = func(t time.Time) time.Time { return time.Date(t.Year()+step, 1, 1, 0, 0, 0, 0, time.UTC) }
	}
	for _, s := range spans {
		if to.Sub(from)/s.length < maxBars-1 {
			// The zero Time, from which Truncate counts, is a Monday's midnight.
			begin, name = from.Truncate(s.length), s.name
			next = func(t time.Time) time.Time { return t.Add(s.length) }
			break
		}
	}
	for t := begin; t.Before(to); t = next(t) {
		at = append(at, t)
	}
	at = append(at, to)
	at[0] = from
	return at, name
}

// bar is one bar of a chart: a link to the entries that it counts.
type bar struct {
	X, Y, W, H float64
	URL, Says  string
	Tone       string
}

// chart is counts over time, drawn.
type chart struct {
	Name, Tone string
	Total      int64
	URL        string // all that it counts
	Most       int64  // the highest bar
	Bars       []bar
	Parts      []part // what its bars are made of, where there is more than one
}

type part struct {
	Name, Tone, URL string
	Total           int64
}

// The room in which bars are drawn, in units of the drawing.
const (
	chartWidth  = 620.0
	chartHeight = 100.0
)

// draw draws one chart: bars of parts on top of each other. counts are by part
// and interval; links says where an interval of a part leads.
func draw(name, tone string, at []time.Time, parts []part, counts [][]int64, link func(part, interval int) string) *chart {
	c := &chart{Name: name, Tone: tone}
	n := len(at) - 1
	for i := range n {
		var sum int64
		for p := range parts {
			sum += counts[p][i]
		}
		c.Total += sum
		c.Most = max(c.Most, sum)
	}
	if c.Most == 0 {
		return c
	}
	step := chartWidth / float64(n)
	gap := min(step*0.15, 3)
	for i := range n {
		y := chartHeight
		for p := range parts {
			count := counts[p][i]
			if parts[p].Total += count; count == 0 {
				continue
			}
			h := max(float64(count)/float64(c.Most)*chartHeight, 1.5) // one of a million is still seen
			y -= h
			tone := parts[p].Tone
			if tone == "" {
				tone = "plain"
			}
			says := fmt.Sprintf("%s to %s: %s", shortly(at[i]), shortly(at[i+1]), thousands(count))
			if parts[p].Name != "" {
				says += " " + parts[p].Name
			}
			c.Bars = append(c.Bars, bar{X: float64(i)*step + gap/2, Y: max(y, 0), W: step - gap, H: h, URL: link(p, i), Says: says, Tone: tone})
		}
	}
	if len(parts) > 1 {
		c.Parts = parts
	}
	return c
}

func shortly(t time.Time) string {
	if t.Truncate(24 * time.Hour).Equal(t) {
		return t.Format("2 Jan 2006")
	}
	if t.Second() != 0 {
		return t.Format("2 Jan 2006, 15:04:05")
	}
	return t.Format("2 Jan 2006, 15:04")
}

// thousands writes n in groups of three digits.
func thousands(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// filled is a query's filters as parameters of GET /history.
func filled(q *ledger.Query) url.Values {
	v := url.Values{}
	for _, p := range parameters(q) {
		if *p.value != "" {
			v.Set(p.name, *p.value)
		}
	}
	for name, t := range map[string]time.Time{"from": q.From, "to": q.To} {
		if !t.IsZero() {
			v.Set(name, t.UTC().Format(time.RFC3339Nano))
		}
	}
	return v
}

// with is the address of what q selects, with some filters set otherwise: pairs
// of name and value, an empty value for none.
func with(q *ledger.Query, pairs ...string) string {
	v := filled(q)
	for i := 0; i < len(pairs); i += 2 {
		if v.Del(pairs[i]); pairs[i+1] != "" {
			v.Set(pairs[i], pairs[i+1])
		}
	}
	if len(v) == 0 {
		return "/history"
	}
	return "/history?" + v.Encode()
}
