package main

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// machineMetrics are those of the machines' side.
type machineMetrics struct {
	*metrics
	machines atomic.Pointer[machines] // nil until all is open

	asked    *prometheus.CounterVec
	minted   *prometheus.HistogramVec
	revoked  *prometheus.HistogramVec
	appended *prometheus.HistogramVec
	vault    *prometheus.HistogramVec
	uses     *prometheus.CounterVec
	usesTook *prometheus.HistogramVec
	refused  *prometheus.CounterVec
	followed prometheus.Gauge
}

func newMachineMetrics(m *metrics) *machineMetrics {
	r := m.registry
	x := &machineMetrics{
		metrics:  m,
		asked:    newCounter(r, "credential_requests_total", "Calls for a credential, by scope and by what they came to: issued, pending, or the slug of a problem.", "scope", "outcome"),
		minted:   newHistogram(r, "mint_seconds", "How long a mint took, from the warrant to the secret.", quick, "engine", "result"),
		revoked:  newHistogram(r, "revoke_seconds", "How long Vault took to take a credential back.", quick, "result"),
		appended: newHistogram(r, "append_seconds", "How long an append took as the broker sees it, tries again included.", quick, "result"),
		vault:    newHistogram(r, "vault_request_seconds", "How long Vault took to answer one call.", quick, "operation", "code"),
		uses:     newCounter(r, "gateway_uses_total", "Uses that steps asked for on the access path and that its guards let through.", "protocol", "result"),
		usesTook: newHistogram(r, "gateway_record_seconds", "How long a use waited to be on record before it went on.", quick, "protocol"),
		refused:  newCounter(r, "gateway_refusals_total", "What the access path did not let through: by a guard, or since no valid token was shown.", "protocol", "why"),
		followed: prometheus.NewGauge(prometheus.GaugeOpts{Name: metricName("follow_lag_seconds"), Help: "How old the newest entry was when it was followed, by both clocks."}),
	}
	r.MustRegister(x.followed)
	for _, protocol := range []string{store.ProtocolHTTP, store.ProtocolPostgres, store.ProtocolMCP} {
		x.refused.WithLabelValues(protocol, "guard")
		x.refused.WithLabelValues(protocol, "unauthenticated")
		x.uses.WithLabelValues(protocol, "ok")
	}
	c := &collector{}
	live := c.desc("live_credentials", "Credentials that are out, of all brokers, by scope.", "scope")
	pending := c.desc("pending_requests", "Requests that people are to decide.")
	minting := c.desc("open_intents", "Intents to mint that have no outcome yet.")
	due := c.desc("revocations_due", "Credentials that are to be ended by now and are not yet.")
	late := c.desc("revocations_late", "Credentials that were to be ended more than a minute ago and are not yet.")
	follows := c.desc("follows_recorder", "1 while the record is followed.")
	freezes := c.desc("followed_freezes", "Freezes in force, as this broker has followed them.")
	seen := c.desc("seen_entries", "Entries in the log, as of the last checkpoint that was verified.")
	login := c.desc("vault_login", "1 while the login to Vault holds.")
	redis := c.desc("redis_errors_total", "Calls to Redis that failed.")
	sessions := c.desc("gateway_sessions", "Sessions open on the access path.", "protocol")
	lost := c.desc("gateway_lost_outcomes_total", "Outcomes of uses that will never be on record.")
	c.collect = func(send func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		m := x.machines.Load()
		if m == nil {
			return
		}
		s := m.broker.Stats()
		known := map[string]bool{}
		for _, scope := range m.o.scopes.Current().Scopes() {
			known[scope.Name] = true
			send(live, prometheus.GaugeValue, float64(s.Live[scope.Name]), scope.Name)
		}
		others := 0 // of an earlier catalogue
		for scope, n := range s.Live {
			if !known[scope] {
				others += n
			}
		}
		send(live, prometheus.GaugeValue, float64(others), unknownScope)
		send(pending, prometheus.GaugeValue, float64(s.Pending))
		send(minting, prometheus.GaugeValue, float64(s.Minting))
		send(due, prometheus.GaugeValue, float64(s.Due))
		send(late, prometheus.GaugeValue, float64(s.Late))
		send(follows, prometheus.GaugeValue, gaugeOf(s.Follows))
		send(freezes, prometheus.GaugeValue, float64(s.Freezes))
		send(seen, prometheus.GaugeValue, float64(m.o.recorder.Seen()))
		if m.o.vault.Addr != "" {
			send(login, prometheus.GaugeValue, gaugeOf(m.issuer.LoggedIn()))
		}
		send(redis, prometheus.CounterValue, float64(m.inflight.Failed()))
		if m.gateway != nil {
			open := m.gateway.Sessions()
			for protocol := range m.gateway.Addresses {
				send(sessions, prometheus.GaugeValue, float64(open[protocol]), protocol)
			}
			send(lost, prometheus.CounterValue, float64(m.gateway.Lost()))
		}
	}
	r.MustRegister(c)
	return x
}

// unknownScope stands for scopes that are not in the catalogue: a caller may
// write anything.
const unknownScope = "other"

// scope is name as a label.
func scopeLabel(set *scopes.Set, name string) string {
	if _, known := set.Scope(name); known {
		return name
	}
	return unknownScope
}

// result says in few words what err is.
func result(err error) string {
	_, refused := store.IsOrder(err)
	switch {
	case err == nil:
		return "ok"
	case refused, errors.Is(err, store.ErrMalformed), errors.Is(err, store.ErrConflict), errors.Is(err, issuer.ErrVaultRefused),
		errors.Is(err, gateway.ErrEnded), errors.Is(err, gateway.ErrTooLarge):
		return "refused"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	}
	return "failed"
}

// watchedRecorder is a recorder whose appends are measured and traced.
type watchedRecorder struct {
	broker.Recorder
	metrics *machineMetrics // nil: not measured
	tracing *tracing        // nil: not traced
}

// Append implements broker.Recorder.
func (r watchedRecorder) Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	ctx, end := r.tracing.appending(ctx, subs)
	began := time.Now()
	app, err := r.Recorder.Append(ctx, subs...)
	if r.metrics != nil {
		r.metrics.appended.WithLabelValues(result(err)).Observe(time.Since(began).Seconds())
	}
	end(err)
	return app, err
}

// Follow implements broker.Recorder.
func (r watchedRecorder) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	if r.metrics == nil {
		return r.Recorder.Follow(ctx, after, fn)
	}
	return r.Recorder.Follow(ctx, after, func(a *store.Appended) error {
		if n := len(a.Entries); n > 0 {
			if at, ok := stamped(a.Entries[n-1].Leaf); ok {
				r.metrics.followed.Set(max(0, time.Since(at).Seconds()))
			}
		}
		return fn(a)
	})
}

// stamped is the time of a leaf. Before it stand only v, id and type, none of
// which can hold a quote.
func stamped(leaf []byte) (time.Time, bool) {
	_, rest, ok := strings.Cut(string(leaf[:min(len(leaf), 256)]), `"time":"`)
	text, _, whole := strings.Cut(rest, `"`)
	at, err := time.Parse(time.RFC3339Nano, text)
	return at, ok && whole && err == nil
}

// watchedIssuer is an issuer whose revocations are measured and traced.
type watchedIssuer struct {
	broker.Issuer
	metrics *machineMetrics
	tracing *tracing
}

// Revoke implements broker.Issuer.
func (i watchedIssuer) Revoke(ctx context.Context, d store.IssuedDetails) error {
	ctx, end := i.tracing.span(ctx, "revoke")
	began := time.Now()
	err := i.Issuer.Revoke(ctx, d)
	if i.metrics != nil {
		i.metrics.revoked.WithLabelValues(result(err)).Observe(time.Since(began).Seconds())
	}
	end(err)
	return err
}

// Activate implements broker.Issuer.
func (i watchedIssuer) Activate(ctx context.Context, m *issuer.Minted) error {
	ctx, end := i.tracing.span(ctx, "activate")
	err := i.Issuer.Activate(ctx, m)
	end(err)
	return err
}

// watch has m's parts tell what they do. Both of m.o.metrics and m.o.tracing may
// be nil.
func (o *machinesOptions) watch(c *issuer.Config) {
	if o.metrics == nil && o.tracing == nil {
		return
	}
	c.Minting = func(ctx context.Context, scope *scopes.Scope, request string) (context.Context, func(error)) {
		ctx, end := o.tracing.minting(ctx, scope, request)
		began := time.Now()
		return ctx, func(err error) {
			if o.metrics != nil {
				o.metrics.minted.WithLabelValues(string(scope.Engine), result(err)).Observe(time.Since(began).Seconds())
			}
			end(err)
		}
	}
	c.Transport = func(next http.RoundTripper) http.RoundTripper {
		if o.metrics != nil {
			next = timedVault{next, o.metrics.vault}
		}
		return o.tracing.transport(next, func(r *http.Request) string { return "vault " + vaultOperation(r) })
	}
}

// timedVault measures calls to Vault.
type timedVault struct {
	next http.RoundTripper
	took *prometheus.HistogramVec
}

// RoundTrip implements http.RoundTripper.
func (t timedVault) RoundTrip(r *http.Request) (*http.Response, error) {
	began := time.Now()
	res, err := t.next.RoundTrip(r)
	code := "none" // no answer
	if err == nil {
		code = strconv.Itoa(res.StatusCode)
	}
	t.took.WithLabelValues(vaultOperation(r), code).Observe(time.Since(began).Seconds())
	return res, err
}

// vaultOperation is what a call asks of Vault, of few kinds: a path may hold
// what the operator or the caller chose.
func vaultOperation(r *http.Request) string {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	for _, known := range []string{"auth/token/create", "auth/token/renew-accessor", "auth/token/renew-self", "auth/token/revoke-accessor",
		"auth/token/lookup-self", "sys/leases/revoke", "sys/capabilities-self"} {
		if path == known || strings.HasPrefix(path, known+"/") {
			return known
		}
	}
	switch {
	case strings.HasPrefix(path, "auth/") && strings.HasSuffix(path, "/login"):
		return "login"
	case r.Method == http.MethodGet:
		return "read"
	}
	return "write"
}

// watched is next, the orchestrators' API, measured and traced.
func (o *machinesOptions) watched(next http.Handler) http.Handler {
	var m *metrics
	if o.metrics != nil {
		m = o.metrics.metrics
	}
	return watched(next, "api", m, o.tracing)
}

// recorderCall names a call to the recorder: its paths hold nothing that a caller
// chose.
func recorderCall(r *http.Request) string { return "recorder " + r.URL.Path }

// observer is told of what goes on at the gateway.
func (o *machinesOptions) observer() (v gateway.Observer) {
	if o.metrics != nil || o.tracing != nil {
		v.Using = o.using
	}
	if o.metrics != nil {
		v.Refused = func(protocol string, known bool) {
			why := "unauthenticated"
			if known {
				why = "guard"
			}
			o.metrics.refused.WithLabelValues(protocol, why).Inc()
		}
	}
	return v
}

// using is gateway.Observer.Using.
func (o *machinesOptions) using(ctx context.Context, s *gateway.Session, n int) func(error) {
	protocol := s.Grant.Access.Protocol
	end := o.tracing.using(ctx, s)
	began := time.Now()
	return func(err error) {
		if o.metrics != nil {
			o.metrics.uses.WithLabelValues(protocol, result(err)).Add(float64(n))
			o.metrics.usesTook.WithLabelValues(protocol).Observe(time.Since(began).Seconds())
		}
		end(err)
	}
}

// askedFor is steps.Config.Asked.
func (o *machinesOptions) askedFor(ctx context.Context, scope, outcome string) {
	if o.metrics == nil && o.tracing == nil {
		return
	}
	scope = scopeLabel(o.scopes.Current(), scope)
	if o.metrics != nil {
		o.metrics.asked.WithLabelValues(scope, outcome).Inc()
	}
	o.tracing.asked(ctx, scope, outcome)
}
