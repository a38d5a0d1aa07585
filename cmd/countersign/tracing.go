package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// tracingConfig says where traces are sent.
type tracingConfig struct {
	Endpoint string   `yaml:"otlp_endpoint"` // URL that takes OTLP over HTTP, such as https://collector.example.com:4318/v1/traces
	Headers  string   `yaml:"headers_file"`  // file of headers, NAME: VALUE one a line, as a collector's token; none by default
	Sample   *float64 `yaml:"sample_ratio"`  // of the calls that bring no traceparent (one that comes says for itself), 0 to 1; 1 by default
	CA       string   `yaml:"ca"`            // file, PEM: whom the collector's certificate is checked against; the system's by default
}

func (c *tracingConfig) check() error {
	if c == nil {
		return nil
	}
	if err := secureURL(c.Endpoint); err != nil {
		return fmt.Errorf("tracing.otlp_endpoint: %w", err)
	}
	if u, err := url.Parse(c.Endpoint); err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("tracing.otlp_endpoint is more than scheme, host, port and path; a secret belongs in headers_file")
	}
	if c.Sample != nil && !(*c.Sample >= 0 && *c.Sample <= 1) {
		return errors.New("tracing.sample_ratio is not between 0 and 1")
	}
	return nil
}

// tracing makes the spans of one process. All of its methods may be called on
// nil, and then cost nothing. What a span says is written here and nowhere else:
// names, routes, IDs, types and slugs; never a reason, a subject, a statement, a
// path or an error's text.
type tracing struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// traceparent is the W3C header alone: tracestate and baggage hold what callers
// like, and are neither taken nor passed on.
var traceparent = propagation.TraceContext{}

// open returns nil where c is.
func (c *tracingConfig) open(ctx context.Context, process, instance string, log *zap.Logger) (*tracing, error) {
	if c == nil {
		return nil, nil
	}
	// Set one by one, so that nothing of it is taken from OTEL_* variables.
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("tracing.otlp_endpoint: %w", err)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces" // OTLP 1.5, "OTLP/HTTP Request"
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	roots, err := trust.Open(trust.Files{CA: c.CA}, log)
	if err != nil {
		return nil, fmt.Errorf("tracing.ca: %w", err)
	}
	headers := map[string]string{}
	if c.Headers != "" {
		if headers, err = readHeaders(c.Headers); err != nil {
			return nil, fmt.Errorf("tracing.headers_file: %w", err)
		}
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(u.String()), otlptracehttp.WithHeaders(headers),
		otlptracehttp.WithHTTPClient(&http.Client{
			Transport: roots.Transport(transport), Timeout: 10 * time.Second,
			// A redirect would carry the collector's token elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}))
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	ratio := 1.0
	if c.Sample != nil {
		ratio = *c.Sample
	}
	// The library tells of what it could not send by this alone.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("spans were not sent", zap.Error(err)) }))
	return newTracing(process, instance, ratio, sdktrace.WithBatcher(exporter)), nil
}

func newTracing(process, instance string, ratio float64, export sdktrace.TracerProviderOption) *tracing {
	p := sdktrace.NewTracerProvider(export,
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", "countersign-"+process),
			attribute.String("service.instance.id", instance), attribute.String("service.version", buildVersion()))))
	return &tracing{provider: p, tracer: p.Tracer("github.com/countersign-dev/countersign")}
}

// readHeaders reads NAME: VALUE, one a line.
func readHeaders(path string) (map[string]string, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	headers := map[string]string{}
	for i, line := range strings.Split(text, "\n") {
		name, value, ok := strings.Cut(line, ":")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || name == "" || value == "" || strings.ContainsAny(name, " \t") {
			return nil, fmt.Errorf("%s:%d is not NAME: VALUE", path, i+1)
		}
		headers[name] = value
	}
	return headers, nil
}

// close sends what is left, for 5 s at most.
func (t *tracing) close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // it was logged
}

// nothing ends no span.
func nothing(error) {}

// span begins a span, which the function that it returns ends.
func (t *tracing) span(ctx context.Context, name string, attributes ...attribute.KeyValue) (context.Context, func(error)) {
	if t == nil {
		return ctx, nothing
	}
	ctx, span := t.tracer.Start(ctx, name, trace.WithAttributes(attributes...))
	return ctx, func(err error) { endSpan(span, err) }
}

func endSpan(span trace.Span, err error) {
	if err != nil {
		// Its text may quote what must not be here.
		span.SetStatus(codes.Error, result(err))
	}
	span.End()
}

// appending is the span of an append.
func (t *tracing) appending(ctx context.Context, subs []*store.Submission) (context.Context, func(error)) {
	if t == nil {
		return ctx, nothing
	}
	var types []string
	for _, s := range subs {
		if !slices.Contains(types, string(s.Type)) {
			types = append(types, string(s.Type))
		}
	}
	return t.span(ctx, "append", attribute.Int("countersign.entries", len(subs)), attribute.StringSlice("countersign.types", types))
}

// minting is the span of a mint.
func (t *tracing) minting(ctx context.Context, scope *scopes.Scope, request string) (context.Context, func(error)) {
	if t == nil {
		return ctx, nothing
	}
	return t.span(ctx, "mint", attribute.String("countersign.scope", scope.Name), attribute.String("countersign.engine", string(scope.Engine)),
		attribute.String("countersign.request", request))
}

// using is the span of a use on the access path. It belongs to the trace that the
// step brought, or else to that of the call which opened the session.
func (t *tracing) using(ctx context.Context, s *gateway.Session) func(error) {
	if t == nil {
		return nothing
	}
	var opened trace.SpanContext
	if s.Opened != nil {
		opened = trace.SpanContextFromContext(s.Opened)
	}
	var links []trace.Link
	switch here := trace.SpanContextFromContext(ctx); {
	case !here.IsValid():
		ctx = trace.ContextWithSpanContext(ctx, opened)
	case opened.IsValid():
		links = append(links, trace.Link{SpanContext: opened})
	}
	_, span := t.tracer.Start(ctx, "use", trace.WithLinks(links...), trace.WithAttributes(
		attribute.String("countersign.protocol", s.Grant.Access.Protocol), attribute.String("countersign.scope", s.Grant.Scope),
		attribute.String("countersign.request", s.Story.Request)))
	return func(err error) { endSpan(span, err) }
}

// asked says on the span of a call for a credential what it came to.
func (t *tracing) asked(ctx context.Context, scope, outcome string) {
	if t == nil {
		return
	}
	trace.SpanFromContext(ctx).SetAttributes(attribute.String("countersign.scope", scope), attribute.String("countersign.outcome", outcome))
}

// transport is next with a span for each call, whose traceparent goes with it.
func (t *tracing) transport(next http.RoundTripper, name func(*http.Request) string) http.RoundTripper {
	if t == nil {
		return next
	}
	return tracedTransport{next, t, name}
}

type tracedTransport struct {
	next http.RoundTripper
	t    *tracing
	name func(*http.Request) string
}

// RoundTrip implements http.RoundTripper.
func (x tracedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, span := x.t.tracer.Start(r.Context(), x.name(r), trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("http.request.method", r.Method)))
	r = r.Clone(ctx) // a RoundTripper may not change its request
	traceparent.Inject(ctx, propagation.HeaderCarrier(r.Header))
	r.Header.Del("Tracestate")
	res, err := x.next.RoundTrip(r)
	if err == nil {
		span.SetAttributes(attribute.Int("http.response.status_code", res.StatusCode))
	}
	// A stream's span ends where its answer begins.
	endSpan(span, err)
	return res, err
}

// extract takes the caller's traceparent into ctx.
func extract(ctx context.Context, h http.Header) context.Context {
	ctx = traceparent.Extract(ctx, propagation.HeaderCarrier(h))
	if caller := trace.SpanContextFromContext(ctx); caller.TraceState().Len() > 0 {
		ctx = trace.ContextWithRemoteSpanContext(ctx, caller.WithTraceState(trace.TraceState{}))
	}
	return ctx
}

// watched is next, the handler of a listener whose requests a router of
// api/server answers, measured and traced. m and t may be nil.
func watched(next http.Handler, listener string, m *metrics, t *tracing) http.Handler {
	if m == nil && t == nil {
		return next
	}
	seen := func(ctx context.Context, c server.Call) { t.answered(ctx, c) }
	if m != nil {
		count := m.observer(listener)
		seen = func(ctx context.Context, c server.Call) { count(ctx, c); t.answered(ctx, c) }
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := server.Observe(r.Context(), seen)
		if t != nil && !unseen(r.URL.Path) {
			var span trace.Span
			ctx, span = t.tracer.Start(extract(ctx, r.Header), spanMethod(r.Method), trace.WithSpanKind(trace.SpanKindServer))
			defer span.End()
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// spanMethod keeps what a caller may invent as a method out of spans, in
// OpenTelemetry's word for it (semantic conventions, http.request.method).
func spanMethod(m string) string {
	switch m {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return m
	}
	return "_OTHER"
}

// unseen are paths that load balancers ask for all the time.
func unseen(path string) bool { return path == "/healthz" || path == "/readyz" }

// answered says on a call's span what it was and came to.
func (t *tracing) answered(ctx context.Context, c server.Call) {
	if t == nil {
		return
	}
	span := trace.SpanFromContext(ctx)
	if c.Route != "" {
		span.SetName(spanMethod(c.Method) + " " + c.Route)
	}
	span.SetAttributes(attribute.String("http.request.method", spanMethod(c.Method)), attribute.String("http.route", c.Route),
		attribute.Int("http.response.status_code", c.Status), attribute.String("countersign.request_id", c.RequestID))
	if c.Problem != "" {
		span.SetAttributes(attribute.String("countersign.problem", c.Problem))
	}
	if c.Status >= http.StatusInternalServerError {
		span.SetStatus(codes.Error, c.Problem)
	}
}

// stepped is the handler of an access path whose steps' traceparent is taken,
// for the spans of their uses. Nothing of it goes on to a target.
func (t *tracing) stepped(next http.Handler) http.Handler {
	if t == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(extract(r.Context(), r.Header)))
	})
}
