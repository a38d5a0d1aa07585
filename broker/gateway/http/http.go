// Package http is the access path over HTTP: a gateway between a step's HTTP
// client and one HTTP target. It reads each request, judges it by the routes of
// the grant, puts it on record, shows the target the real secret, and masks what
// comes back. A step reaches it in two ways: as if it were the target (a reverse
// proxy, one base URL for all sessions: the token names the target), or as a
// forward proxy (RFC 9110, section 3.7), TLS to the target included, which ends
// here under a certificate authority of the gateway's own.
package http

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// MaxMasked is how long a body may be that is masked as a whole, in bytes.
// What is longer is withheld.
const MaxMasked = 8 << 20

// Config is what a Gateway is made of.
type Config struct {
	Gateway *gateway.Gateway
	URL     string           // what steps are told; redirects within a target are rewritten to it
	CADir   string           // where the forward proxy's authority is kept, and made where it is missing; empty: no forward proxy
	Timeout time.Duration    // until a target begins to answer, where the grant does not say; 30 s by default
	Idle    time.Duration    // how long a body or an upgraded connection may be silent; 5 min by default
	Slow    time.Duration    // for one write to a step, and for one read of its body; 30 s by default
	Now     func() time.Time // of signatures and certificates; time.Now by default
	Log     *zap.Logger      // none by default
}

// Gateway is an http.Handler for all HTTP sessions of a gateway.Gateway. It is
// safe for concurrent use.
type Gateway struct {
	cfg       Config
	self      *url.URL // Config.URL
	transport *trust.Transport
	ca        *authority   // nil: no forward proxy
	inner     *http.Server // of tunnels

	mu    sync.Mutex
	views map[*gateway.Session]*view
	under sync.WaitGroup // requests under way, upgraded connections among them
}

// Drain takes no more requests through tunnels, and waits until what goes on
// beside its listener, tunnels and upgraded connections, has ended or ctx has.
// The listener must be closed.
func (g *Gateway) Drain(ctx context.Context) {
	if g.inner != nil {
		_ = g.inner.Shutdown(ctx) // where ctx ends first, sessions cut what is left
	}
	done := make(chan struct{})
	go func() { g.under.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// New returns a Gateway without HTTP sessions. The error says what is wrong with
// the configuration, or with the authority in CADir.
func New(c Config) (*Gateway, error) {
	for d, v := range map[*time.Duration]time.Duration{&c.Timeout: 30 * time.Second, &c.Idle: 5 * time.Minute, &c.Slow: 30 * time.Second} {
		if *d <= 0 {
			*d = v
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	self, err := url.Parse(strings.TrimSuffix(c.URL, "/"))
	if err != nil || self.Host == "" || self.Scheme != "http" && self.Scheme != "https" || self.Path != "" {
		return nil, errors.New("the address that steps are told must be http://host or https://host, perhaps with a port")
	}
	g := &Gateway{cfg: c, self: self, views: map[*gateway.Session]*view{}}
	g.transport = g.newTransport()
	if c.CADir != "" {
		if g.ca, err = openAuthority(c.CADir, c.Now); err != nil {
			return nil, fmt.Errorf("the forward proxy's authority: %w", err)
		}
		g.inner = g.newInner()
	}
	return g, nil
}

// caPath is where anybody may fetch the certificate of the forward proxy's
// authority, which is public.
const caPath = "/.countersign/ca.pem"

// ServeHTTP implements http.Handler. Its listener may have no write timeout:
// each write has a deadline of its own.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// A deadline of the request before on this connection may still stand.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	closing(w, r)
	switch {
	case r.Method == http.MethodConnect:
		g.connect(w, r)
	case r.URL.Host != "" && !sameHost(r.URL, g.self):
		g.forward(w, r)
	case r.URL.Path == caPath && (r.Method == http.MethodGet || r.Method == http.MethodHead) && g.ca != nil:
		w.Header().Set("Content-Type", "application/x-pem-file")
		_, _ = w.Write(g.ca.pem) // who has hung up asks again
	default:
		sess, err := g.cfg.Gateway.Authenticate(r)
		if err != nil {
			g.unknown(w, r, http.StatusUnauthorized)
			return
		}
		g.serve(w, r, sess, reverse)
	}
}

// closing has the connection of a request with a body closed after the answer.
// What is left of a body must not be taken for the next request, and net/http
// waits for it without end before it answers. Once the body is read, the
// connection may stay.
func closing(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		w.Header().Set("Connection", "close")
	}
}

// way is how a step reached the gateway.
type way int

const (
	reverse way = iota // as if it were the target
	forward            // as a proxy before it
)

// unknown turns away who shows no valid token.
func (g *Gateway) unknown(w http.ResponseWriter, r *http.Request, status int) {
	g.cfg.Gateway.Refused(r.Context(), store.ProtocolHTTP, remote(r), methodName(r.Method))
	if status == http.StatusProxyAuthRequired {
		w.Header().Set("Proxy-Authenticate", `Basic realm="countersign"`)
	} else {
		w.Header().Add("WWW-Authenticate", "Bearer")
		w.Header().Add("WWW-Authenticate", `DPoP algs="ES256 EdDSA"`)
	}
	g.problem(w, status, "unauthenticated", "no session has this token: it is wrong, or its credential has ended")
}

// serve answers a request of sess.
func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, sess *gateway.Session, by way) {
	if sess.Grant.Access.Protocol != store.ProtocolHTTP {
		g.deny(w, r, sess, gateway.Refusal{Use: methodName(r.Method), Reason: "the session is for another protocol"})
		return
	}
	v, err := g.view(sess)
	if err != nil {
		g.cfg.Log.Error("a session's rules cannot be read", zap.String("scope", sess.Grant.Scope), zap.Error(err))
		g.problem(w, http.StatusInternalServerError, "internal", "the rules of this session cannot be read")
		return
	}
	g.under.Add(1)
	defer g.under.Done()
	x := &exchange{g: g, v: v, w: w, r: r, rc: http.NewResponseController(w), by: by}
	x.serve()
}

// deny puts a refusal on record, and then tells the step.
func (g *Gateway) deny(w http.ResponseWriter, r *http.Request, sess *gateway.Session, no gateway.Refusal) {
	if !g.record(r, sess, no) {
		g.problem(w, http.StatusServiceUnavailable, "ledger-unavailable", "refused, and that cannot be recorded now")
		return
	}
	g.problem(w, http.StatusForbidden, "scope-denied", no.Reason)
}

func (g *Gateway) record(r *http.Request, sess *gateway.Session, no gateway.Refusal) bool {
	no.Remote = remote(r)
	// The step may have gone; the refusal is on record all the same.
	ctx, stop := context.WithTimeout(context.WithoutCancel(r.Context()), 5*time.Second)
	defer stop()
	if err := sess.Refuse(ctx, no); err != nil {
		g.cfg.Log.Warn("a refusal is not on record", zap.Error(err))
		return false
	}
	return true
}

// methodName is a method as the record has it: of few kinds, since a step
// chooses it.
func methodName(m string) string {
	switch m {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE":
		return m
	}
	return "another method"
}

// remote is the step's address without port.
func remote(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// hostPort is host:port of a URL of HTTP, in lower case.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

func sameHost(a, b *url.URL) bool { return a.Scheme == b.Scheme && hostPort(a) == hostPort(b) }

// problem answers within Config.Slow.
func (g *Gateway) problem(w http.ResponseWriter, status int, slug, detail string) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(g.cfg.Slow))
	gateway.Problem(w, status, slug, detail)
}
