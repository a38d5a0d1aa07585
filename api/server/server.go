// Package server has what every HTTP listener of this program shares: the
// router's outer layers, limits against slow and oversized requests, strict
// decoding of bodies, and a clean end.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// Limits of every listener.
const (
	// MaxBody is the largest body in bytes of an orchestrator's call.
	MaxBody = 32 << 10
	// MaxHeader is the largest header in bytes. A JWT with many claims fits.
	MaxHeader = 32 << 10
	// BodyTime is how long a body may take to arrive.
	BodyTime = 30 * time.Second

	headerTime = 10 * time.Second
	idleTime   = 2 * time.Minute
	// writeTime is longer than the longest wait of the contract (Prefer:
	// wait=300). A handler that streams moves its own deadline (Extend).
	writeTime = 6 * time.Minute
	// stallTime is how long one write may wait for a peer that does not read: of
	// HTTP/2, whose frames a slow stream shares with all others, and of what a
	// handler with Streams writes before it sets a deadline of its own.
	stallTime = 30 * time.Second
	// pingAfter is how long an HTTP/2 connection may be silent before it is asked
	// whether it is still there (RFC 9113, section 6.7), and pingTime how long the
	// answer may take.
	pingAfter = time.Minute
	pingTime  = 15 * time.Second
)

// NewRouter returns a router whose every answer carries a request ID and
// security headers, and whose panics, unknown paths and unknown methods are
// problem documents. Bodies are cut off after maxBody bytes.
func NewRouter(log *zap.Logger, maxBody int64) *chi.Mux {
	r := chi.NewRouter()
	// HEAD is GET without its body (RFC 9110, section 9.3.2); net/http drops it.
	r.Use(arrive, identify(log), secure, recoverPanic, Limit(maxBody), middleware.GetHead)
	notFound := func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, r, problem.NotFound("no such path"))
	}
	r.NotFound(notFound)
	r.MethodNotAllowed(func(w http.ResponseWriter, req *http.Request) {
		path := req.URL.RawPath // what chi routes by, where it is set
		if path == "" {
			path = req.URL.Path
		}
		var allow []string
		for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
			if r.Match(chi.NewRouteContext(), m, path) {
				allow = append(allow, m)
				if m == http.MethodGet {
					allow = append(allow, http.MethodHead)
				}
			}
		}
		if len(allow) == 0 { // chi answers so to a method it does not know, on any path
			notFound(w, req)
			return
		}
		w.Header().Set("Allow", strings.Join(allow, ", "))
		problem.Write(w, req, problem.MethodNotAllowed(req.Method))
	})
	return r
}

// connection is what is kept of one: when it was accepted, and whether a request
// has come over it.
type connection struct {
	accepted time.Time
	used     atomic.Bool
}

type (
	connectionKey struct{}
	arrivalKey    struct{}
)

// fresh is how long after its connection was accepted a first request is taken
// to have come with it. A client that connects ahead of need waits longer, as a
// rule.
const fresh = time.Second

// arrive notes when a request arrived. Under load a request waits for its turn
// after it was sent, long enough to be overtaken by another's answer; when its
// connection was accepted is closer to the truth than when its turn came.
func arrive(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := time.Now()
		if c, ok := r.Context().Value(connectionKey{}).(*connection); ok && !c.used.Swap(true) && at.Sub(c.accepted) < fresh {
			at = c.accepted
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), arrivalKey{}, at)))
	})
}

// Arrived says when the request that ctx belongs to arrived.
func Arrived(ctx context.Context) time.Time {
	if at, ok := ctx.Value(arrivalKey{}).(time.Time); ok {
		return at
	}
	return time.Now()
}

// identify gives each request an ID: the caller's X-Request-Id where it has the
// form of one, so that a trace can be followed through, or else a fresh UUID.
func identify(log *zap.Logger) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id := r.Header.Get("X-Request-Id")
			if !store.ValidID(id) {
				id = store.NewID()
			}
			w.Header().Set("X-Request-Id", id)
			log := log
			if span := trace.SpanContextFromContext(r.Context()); span.HasTraceID() {
				log = log.With(zap.Stringer("trace_id", span.TraceID()))
			}
			r = r.WithContext(problem.NewContext(r.Context(), id, log))
			seen, _ := r.Context().Value(observerKey{}).(Observer)
			if seen == nil {
				next.ServeHTTP(w, r)
				return
			}
			began := time.Now()
			ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
			defer func() { // also where the answer was broken off
				c := Call{Method: r.Method, Status: ww.Status(), Problem: problem.Sent(r.Context()), RequestID: id, Took: time.Since(began)}
				if route := chi.RouteContext(r.Context()); route != nil {
					c.Route = route.RoutePattern()
				}
				seen(r.Context(), c)
			}()
			next.ServeHTTP(ww, r)
		})
	}
}

// Call is one request that was answered.
type Call struct {
	Method    string
	Route     string // the pattern that it matched, such as /requests/{id}; of few kinds. Empty: none
	Status    int    // 0: no answer was sent
	Problem   string // slug of the problem that it was answered with; empty: none
	RequestID string
	Took      time.Duration
}

// Observer is told of each request of a router once it is answered. ctx is the
// request's.
type Observer func(ctx context.Context, c Call)

type observerKey struct{}

// Observe returns a context whose requests are told to fn by the router that
// answers them.
func Observe(ctx context.Context, fn Observer) context.Context {
	return context.WithValue(ctx, observerKey{}, fn)
}

// secure sets the headers of an API that is no page. A handler that serves one
// sets its own Content-Security-Policy.
func secure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		if r.TLS != nil {
			h.Set("Strict-Transport-Security", "max-age=31536000") // one year in seconds, RFC 6797
		}
		next.ServeHTTP(w, r)
	})
}

// recoverPanic answers a panic as an internal error and logs where it was.
// What the panic said is logged too, unless an error value said it: those may
// quote what they were handling.
func recoverPanic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(v) // net/http's own way to break off an answer
			}
			problem.Logger(r.Context()).Error("panic", zap.String("panic", fmt.Sprintf("%T", v)), zap.ByteString("stack", debug.Stack()))
			if ww.Status() != 0 {
				panic(http.ErrAbortHandler) // half an answer is out; do not let it look whole
			}
			problem.Write(ww, r, problem.Internal(fmt.Errorf("panic: %T", v)))
		}()
		next.ServeHTTP(ww, r)
	})
}

// Extend moves the write deadline of the answer under way to d from now. Where
// the transport has none it does nothing.
func Extend(w http.ResponseWriter, d time.Duration) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d))
}

// Config of one listener.
type Config struct {
	Handler http.Handler
	TLS     *tls.Config // nil: plain HTTP, for loopback and behind a TLS terminator
	Log     *zap.Logger
	// Drain is how long requests under way may take to end once ctx is done.
	// Zero means 10 s.
	Drain time.Duration
	// Rest, where it is set, waits for what goes on beside the listener's own
	// connections, such as upgraded ones, until it has ended or its context has.
	Rest func(context.Context)
	// Streams says that the handler bounds by itself how long it reads a body and
	// writes an answer, which may have no end.
	Streams bool
	// H2C says that HTTP/2 is spoken without TLS, too, to who begins with it (RFC
	// 9113, section 3.3).
	H2C bool
}

// bounded gives what comes before and after next's own deadlines one: what is
// answered at once, the flush of the last bytes, and the rest of a body that
// next did not want, which net/http reads before it goes on. Whoever reads a
// body or streams sets its own.
func bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		if r.ProtoMajor == 1 { // HTTP/2 ends a stream when it is over, though nothing is being written
			_ = rc.SetWriteDeadline(time.Now().Add(stallTime))
		}
		if r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0 {
			_ = rc.SetReadDeadline(time.Now().Add(BodyTime))
		}
		if r.Method != http.MethodConnect { // whose connection may have become a tunnel
			defer func() { _ = rc.SetWriteDeadline(time.Now().Add(stallTime)) }()
		}
		next.ServeHTTP(w, r)
	})
}

// Serve answers on l until ctx is done, then lets what is under way end. The
// context of every request is done when its caller is gone or the drain is
// over, whichever is first. Serve closes l.
func Serve(ctx context.Context, l net.Listener, c Config) error {
	drain := c.Drain
	if drain == 0 {
		drain = 10 * time.Second
	}
	requests, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	s := &http.Server{
		Handler:           c.Handler,
		TLSConfig:         c.TLS,
		ReadHeaderTimeout: headerTime,
		WriteTimeout:      writeTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    MaxHeader,
		ErrorLog:          zap.NewStdLog(c.Log.WithOptions(zap.IncreaseLevel(zap.WarnLevel))),
		BaseContext:       func(net.Listener) context.Context { return requests },
		HTTP2: &http.HTTP2Config{
			WriteByteTimeout: stallTime, SendPingTimeout: pingAfter, PingTimeout: pingTime,
			// No table of sent headers. net/http changes it upon a peer's SETTINGS while
			// another goroutine may write headers by it (seen with Go 1.26), and two at
			// its maps at once end the process. An empty one is never written.
			MaxEncoderHeaderTableSize: 1,
		},
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connectionKey{}, &connection{accepted: time.Now()})
		},
	}
	if c.Streams {
		s.WriteTimeout = 0
		s.Handler = bounded(c.Handler)
	}
	if c.H2C {
		s.Protocols = new(http.Protocols)
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetHTTP2(true)
		s.Protocols.SetUnencryptedHTTP2(true)
	}
	failed := make(chan error, 1)
	go func() {
		if c.TLS != nil {
			failed <- s.ServeTLS(l, "", "")
		} else {
			failed <- s.Serve(l)
		}
	}()
	select {
	case err := <-failed:
		return fmt.Errorf("serving %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	late, stop := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer stop()
	err := s.Shutdown(late)
	if err == nil {
		if c.Rest != nil {
			c.Rest(late)
		}
		return nil
	}
	cancel()
	if err := s.Close(); err != nil {
		return fmt.Errorf("closing %s: %w", l.Addr(), err)
	}
	c.Log.Warn("requests were cut off at shutdown", zap.Stringer("addr", l.Addr()), zap.Duration("drain", drain))
	return nil
}
