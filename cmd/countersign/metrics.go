package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/vaultaudit"
)

// serveMetrics answers GET /metrics at addr in Prometheus's text format: numbers
// alone, and labels whose values are known beforehand. It is a listener of its
// own, since it asks nobody who they are.
func serveMetrics(p *people, addr string) (stop func(), err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("metrics_addr: %w", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(auditMetrics{p})
	r := server.NewRouter(p.log.Named("metrics"), server.MaxBody)
	r.Method(http.MethodGet, "/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(ctx, l, server.Config{Handler: r, Log: p.log, Drain: time.Second}); err != nil {
			p.log.Error("metrics are served no more", zap.Error(err))
		}
	}()
	return func() { cancel(); <-done }, nil
}

// auditMetrics are what was seen in Vault's audit log since the recorder
// started.
type auditMetrics struct{ p *people }

func auditMetric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("countersign", "", name), help, labels, nil)
}

var (
	alertsTotal    = auditMetric("alerts_total", "Alerts put on record, by what they are about.", "alert")
	auditLines     = auditMetric("vault_audit_lines_total", "Lines of Vault's audit log about tokens of ours.")
	auditUses      = auditMetric("vault_audit_uses_total", "Uses seen in Vault's audit log and put on record.")
	auditMints     = auditMetric("vault_audit_mints_total", "Tokens made in Vault that an intent on record accounts for.")
	auditMalformed = auditMetric("vault_audit_malformed_total", "Lines of Vault's audit log that could not be read.")
	auditGaps      = auditMetric("vault_audit_gaps_total", "Times when lines of Vault's audit log may have been missed.")
	auditWaiting   = auditMetric("vault_audit_waiting", "Lines of Vault's audit log that wait for the record to account for them.")
)

// Describe implements prometheus.Collector.
func (m auditMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector. Without an audit log that is followed
// all are zero, so that a rule over them has something to look at.
func (m auditMetrics) Collect(ch chan<- prometheus.Metric) {
	var c vaultaudit.Counts
	if m.p.audit != nil {
		c = m.p.audit.Counts()
	}
	count := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	count(alertsTotal, c.AlertMint, store.AlertMint)
	count(alertsTotal, c.AlertUse, store.AlertUse)
	count(alertsTotal, c.AlertLateUse, store.AlertLateUse)
	count(auditLines, c.Lines)
	count(auditUses, c.Uses)
	count(auditMints, c.Mints)
	count(auditMalformed, c.Malformed)
	count(auditGaps, c.Gaps)
	ch <- prometheus.MustNewConstMetric(auditWaiting, prometheus.GaugeValue, float64(c.Waiting))
}
