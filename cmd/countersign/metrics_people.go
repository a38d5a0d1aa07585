package main

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/vaultaudit"
)

// peopleMetrics are those of the people's side.
type peopleMetrics struct {
	*metrics
	people atomic.Pointer[people] // nil while no ledger is open, as of one that stands by

	entries *prometheus.CounterVec
	commit  *prometheus.HistogramVec
	batch   prometheus.Histogram
	decided *prometheus.HistogramVec
}

func newPeopleMetrics(m *metrics) *peopleMetrics {
	r := m.registry
	x := &peopleMetrics{
		metrics: m,
		entries: newCounter(r, "entries_total", "Entries put on record since the start, by type.", "type"),
		commit:  newHistogram(r, "commit_seconds", "How long a commit took, of all that had queued.", quick, "result"),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricName("commit_entries"), Help: "Entries in one commit.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 11)}),
		decided: newHistogram(r, "approval_seconds", "How long requests waited for people, by how that ended.", unhurried, "status"),
	}
	r.MustRegister(x.batch, x.audited(), x.standing())
	for _, t := range store.Types() {
		x.entries.WithLabelValues(string(t)) // so that a rule over it has something to look at
	}
	return x
}

// watched is next, the recorder's API, measured and traced.
func (o *peopleOptions) watched(next http.Handler) http.Handler {
	var m *metrics
	if o.metrics != nil {
		m = o.metrics.metrics
	}
	return watched(next, "recorder", m, o.tracing)
}

// committed is ledger.Options.Committed.
func (x *peopleMetrics) committed(c ledger.Commit) {
	x.commit.WithLabelValues(result(c.Err)).Observe(c.Took.Seconds())
	if c.Err != nil {
		return
	}
	x.batch.Observe(float64(len(c.Entries)))
	for _, e := range c.Entries {
		kind := string(e.Type)
		if !e.Type.Known() {
			kind = "other"
		}
		x.entries.WithLabelValues(kind).Inc()
	}
	for _, d := range c.Decided {
		x.decided.WithLabelValues(string(d.Status)).Observe(d.Waited.Seconds())
	}
}

// standing is what stands in the ledger, and waits beside it.
func (x *peopleMetrics) standing() *collector {
	c := &collector{}
	up := c.desc("ledger_up", "1 while this recorder has its ledger open; 0 while it stands by, or waits for its database.")
	size := c.desc("ledger_entries", "Entries in the log: the size of its head.")
	published := c.desc("published_entries", "Entries under the checkpoint that was published last.")
	lag := c.desc("unpublished_seconds", "How old the oldest entry is that no published checkpoint has: how far publishing, and with it the witnesses, are behind.")
	cosigned := c.desc("witness_entries", "Entries under the checkpoint that a witness cosigned last since the start.", "witness")
	disputes := c.desc("witness_disputes", "1 while a witness knows another version of the log.", "witness")
	open := c.desc("ledger_requests", "Requests that are open on record: pending, approved, minting, or live.", "state")
	freezes := c.desc("freezes", "Freezes in force.")
	outbox := c.desc("outbox_waiting", "Deliveries to Slack and webhooks that are still to be made.", "destination")
	behind := c.desc("siem_behind_entries", "Entries that a destination of the push to a SIEM has not taken yet.", "destination")
	exports := c.desc("exports", "Evidence bundles and other exports that there are.", "state")
	free := c.desc("ledger_disk_free_bytes", "Room left to this process on the disk of the recorder's directory.")
	disk := c.desc("ledger_disk_bytes", "Size of that disk.")
	c.collect = func(send func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		gauge := func(d *prometheus.Desc, n float64, labels ...string) { send(d, prometheus.GaugeValue, n, labels...) }
		p := x.people.Load()
		if p == nil || p.ledger.Err() != nil {
			gauge(up, 0)
			return
		}
		gauge(up, 1)
		n, requests, fs := p.ledger.Standing()
		gauge(size, float64(n))
		gauge(freezes, float64(len(fs)))
		states := map[string]int{"pending": 0, "approved": 0, "minting": 0, "live": 0}
		for _, r := range requests {
			switch {
			case r.Live:
				states["live"]++
			case r.Minting:
				states["minting"]++
			case r.Status == store.StatusPending:
				states["pending"]++
			case r.Status == store.StatusApproved:
				states["approved"]++
			}
		}
		for state, n := range states {
			gauge(open, float64(n), state)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if at, age, err := unpublished(ctx, p.ledger, n); err == nil {
			gauge(published, float64(at))
			gauge(lag, age.Seconds())
		}
		if p.o.witnesses != nil {
			for _, w := range p.o.witnesses() {
				gauge(cosigned, float64(w.Size), w.Name)
				gauge(disputes, gaugeOf(w.Disputes), w.Name)
			}
		}
		if p.decisions != nil && p.decisions.outbox != nil {
			for _, name := range p.decisions.told {
				if n, err := p.decisions.outbox.Waiting(ctx, name); err == nil {
					gauge(outbox, float64(n), name)
				}
			}
		}
		if p.pusher != nil {
			for _, d := range p.pusher.Status() {
				gauge(behind, float64(d.Size-d.Next), d.Name)
			}
		}
		running, ready, failed := p.exports.Counts()
		gauge(exports, float64(running), "running")
		gauge(exports, float64(ready), "ready")
		gauge(exports, float64(failed), "failed")
		var fsys syscall.Statfs_t
		if err := syscall.Statfs(p.o.ledger.Dir, &fsys); err == nil {
			gauge(free, float64(fsys.Bavail)*float64(fsys.Bsize))
			gauge(disk, float64(fsys.Blocks)*float64(fsys.Bsize))
		}
	}
	return c
}

// unpublished says how many entries of a log of size are under its published
// checkpoint, and how old the first is that is not.
func unpublished(ctx context.Context, l *ledger.Ledger, size int64) (at int64, age time.Duration, err error) {
	if note := l.Published(); note != "" {
		if at, err = store.CheckpointSize(note); err != nil {
			return 0, 0, err
		}
	}
	if at >= size {
		return at, 0, nil
	}
	for e, err := range l.Entries(ctx, at, at+1) {
		if err != nil {
			return 0, 0, err
		}
		if t, ok := stamped(e.Leaf); ok {
			return at, max(0, time.Since(t)), nil
		}
	}
	return 0, 0, errors.New("entry " + strconv.FormatInt(at, 10) + " has no time")
}

// audited is what was seen in Vault's audit log since the recorder started: zero
// without one that is followed, so that a rule over it has something to look at.
func (x *peopleMetrics) audited() *collector {
	c := &collector{}
	alerts := c.desc("alerts_total", "Alerts put on record over Vault's audit log, by what they are about.", "alert")
	lines := c.desc("vault_audit_lines_total", "Lines of Vault's audit log about tokens of ours.")
	uses := c.desc("vault_audit_uses_total", "Uses seen in Vault's audit log and put on record.")
	mints := c.desc("vault_audit_mints_total", "Tokens made in Vault that an intent on record accounts for.")
	malformed := c.desc("vault_audit_malformed_total", "Lines of Vault's audit log that could not be read.")
	gaps := c.desc("vault_audit_gaps_total", "Times when lines of Vault's audit log may have been missed.")
	waiting := c.desc("vault_audit_waiting", "Lines of Vault's audit log that wait for the record to account for them.")
	c.collect = func(send func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		var n vaultaudit.Counts
		if p := x.people.Load(); p != nil && p.audit != nil {
			n = p.audit.Counts()
		}
		count := func(d *prometheus.Desc, n int64, labels ...string) {
			send(d, prometheus.CounterValue, float64(n), labels...)
		}
		count(alerts, n.AlertMint, store.AlertMint)
		count(alerts, n.AlertUse, store.AlertUse)
		count(alerts, n.AlertLateUse, store.AlertLateUse)
		count(lines, n.Lines)
		count(uses, n.Uses)
		count(mints, n.Mints)
		count(malformed, n.Malformed)
		count(gaps, n.Gaps)
		send(waiting, prometheus.GaugeValue, float64(n.Waiting))
	}
	return c
}
