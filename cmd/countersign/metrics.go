package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/server"
)

// metrics are what one process tells Prometheus. Every label's values are few
// and known beforehand: routes, slugs, types, engines, names in the catalogue
// and in the configuration. docs/metrics.md has all of them.
type metrics struct {
	registry registry
	calls    *prometheus.CounterVec
	problems *prometheus.CounterVec
	took     *prometheus.HistogramVec
}

// Buckets of histograms, in seconds.
var (
	quick     = prometheus.ExponentialBucketsRange(0.0005, 10, 14) // what a machine does
	unhurried = prometheus.ExponentialBucketsRange(5, 86400, 14)   // what people do
)

func metricName(name string) string { return prometheus.BuildFQName("countersign", "", name) }

func newCounter(r prometheus.Registerer, name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricName(name), Help: help}, labels)
	r.MustRegister(c)
	return c
}

func newHistogram(r prometheus.Registerer, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricName(name), Help: help, Buckets: buckets}, labels)
	r.MustRegister(h)
	return h
}

// registry is a *prometheus.Registry.
type registry interface {
	prometheus.Registerer
	prometheus.Gatherer
}

func newMetrics(r registry) *metrics {
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: metricName("build_info"), Help: "1, for what is running."}, []string{"version", "goversion"})
	build.WithLabelValues(buildVersion(), runtime.Version()).Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &metrics{
		registry: r,
		calls:    newCounter(r, "http_requests_total", "Calls that were answered.", "listener", "method", "route", "code"),
		problems: newCounter(r, "problems_total", "Calls that were answered with a problem document, by its slug.", "listener", "problem"),
		took:     newHistogram(r, "http_request_seconds", "How long calls took, waiting for people included.", quick, "listener", "route"),
	}
}

// observer counts the calls of a listener.
func (m *metrics) observer(listener string) server.Observer {
	return func(_ context.Context, c server.Call) {
		method, route := c.Method, c.Route
		if route == "" || c.Status == http.StatusMethodNotAllowed {
			method, route = "other", "other" // a caller may send any
		}
		status := c.Status
		if status == 0 {
			status = http.StatusOK // nothing was written, which is an answer too (net/http)
		}
		m.calls.WithLabelValues(listener, method, route, strconv.Itoa(status)).Inc()
		m.took.WithLabelValues(listener, route).Observe(c.Took.Seconds())
		if c.Problem != "" {
			m.problems.WithLabelValues(listener, c.Problem).Inc()
		}
	}
}

// serve answers GET /metrics at addr, which is a listener of its own, since it
// asks nobody who they are.
func (m *metrics) serve(addr string, log *zap.Logger) (stop func(), err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("metrics_addr: %w", err)
	}
	r := server.NewRouter(log.Named("metrics"), server.MaxBody)
	// One scrape at a time looks at everything that is open; two are a second
	// Prometheus beside the first.
	r.Method(http.MethodGet, "/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2, Timeout: 10 * time.Second}))
	r.Get("/healthz", ok)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(ctx, l, server.Config{Handler: r, Log: log, Drain: time.Second}); err != nil {
			log.Error("metrics are served no more", zap.Error(err))
		}
	}()
	return func() { cancel(); <-done }, nil
}

// collector is a prometheus.Collector that reads its numbers when it is asked.
type collector struct {
	descs   []*prometheus.Desc
	collect func(send func(d *prometheus.Desc, kind prometheus.ValueType, n float64, labels ...string))
}

func (c *collector) desc(name, help string, labels ...string) *prometheus.Desc {
	d := prometheus.NewDesc(metricName(name), help, labels, nil)
	c.descs = append(c.descs, d)
	return d
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.collect(func(d *prometheus.Desc, kind prometheus.ValueType, n float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, n, labels...)
	})
}

func gaugeOf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
