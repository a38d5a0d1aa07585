package http

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// authenticate returns the session that a request to the forward proxy shows:
// in Proxy-Authorization, as the password of any user or as a bearer token, or,
// as elsewhere, in Authorization.
func (g *Gateway) authenticate(r *http.Request) (*gateway.Session, error) {
	values := r.Header.Values("Proxy-Authorization")
	if len(values) == 0 && r.Method != http.MethodConnect {
		return g.cfg.Gateway.Authenticate(r)
	}
	if len(values) != 1 {
		return nil, gateway.ErrNoSession
	}
	scheme, rest, _ := strings.Cut(values[0], " ")
	rest = strings.TrimSpace(rest)
	switch strings.ToLower(scheme) {
	case "bearer":
		return g.cfg.Gateway.Session(rest)
	case "basic":
		b, err := base64.StdEncoding.DecodeString(rest)
		if err != nil {
			return nil, gateway.ErrNoSession
		}
		if _, token, ok := strings.Cut(string(b), ":"); ok {
			return g.cfg.Gateway.Session(token)
		}
	}
	return nil, gateway.ErrNoSession
}

// forward answers a request to a proxy (RFC 9112, section 3.2.2).
func (g *Gateway) forward(w http.ResponseWriter, r *http.Request) {
	if g.ca == nil {
		g.problem(w, http.StatusNotFound, "not-found", "there is no forward proxy here")
		return
	}
	sess, err := g.authenticate(r)
	if err != nil {
		g.unknown(w, r, http.StatusProxyAuthRequired)
		return
	}
	g.serve(w, r, sess, forward)
}

// connect answers CONNECT (RFC 9110, section 9.3.6): with TLS that ends here,
// under a certificate for the session's target, and for no other.
func (g *Gateway) connect(w http.ResponseWriter, r *http.Request) {
	if g.ca == nil {
		g.problem(w, http.StatusMethodNotAllowed, "method-not-allowed", "there is no forward proxy here")
		return
	}
	sess, err := g.authenticate(r)
	if err != nil {
		g.unknown(w, r, http.StatusProxyAuthRequired)
		return
	}
	no := func(reason string) {
		g.deny(w, r, sess, gateway.Refusal{Use: "CONNECT", Statement: "CONNECT " + strings.ToValidUTF8(start(r.Host, 300), "?"), Reason: reason})
	}
	if sess.Grant.Access.Protocol != store.ProtocolHTTP {
		no("the session is for another protocol")
		return
	}
	v, err := g.view(sess)
	if err != nil {
		g.cfg.Log.Error("a session's rules cannot be read", zap.String("scope", sess.Grant.Scope), zap.Error(err))
		g.problem(w, http.StatusInternalServerError, "internal", "the rules of this session cannot be read")
		return
	}
	switch {
	case v.base.Scheme != "https":
		no("the session's target is reached without TLS: no tunnel is needed")
		return
	case !strings.EqualFold(r.RequestURI, r.Host) && r.ProtoMajor == 1, !strings.EqualFold(authorityOf(r.Host, "https"), hostPort(v.base)):
		no("another host than the session's target")
		return
	case r.ProtoMajor != 1:
		no("a tunnel is asked for over HTTP/1.1")
		return
	}
	leaf, err := g.ca.leaf(v.base.Hostname())
	if err != nil {
		g.cfg.Log.Error("no certificate for a tunnel", zap.Error(err))
		g.problem(w, http.StatusInternalServerError, "internal", "there is no certificate for this tunnel")
		return
	}
	conn, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		g.problem(w, http.StatusInternalServerError, "internal", "this connection cannot become a tunnel")
		return
	}
	_ = conn.SetDeadline(time.Now().Add(g.cfg.Slow))
	if brw.Reader.Buffered() > 0 { // nothing is due before the answer
		_ = conn.Close()
		return
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		_ = conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Time{})
	t := &tunnel{Conn: conn, sess: sess, leaf: leaf}
	t.stop = context.AfterFunc(sess.Context(), func() {
		// What is under way is told of the end first.
		time.AfterFunc(endWithin, func() { _ = conn.Close() })
	})
	// Serve returns once it has taken the one connection, which goes on.
	_ = g.inner.ServeTLS(&once{conn: t}, "", "")
}

// tunnel is the connection of a session that asked for one.
type tunnel struct {
	net.Conn
	sess *gateway.Session
	leaf *tls.Certificate
	stop func() bool
}

func (t *tunnel) Close() error {
	t.stop()
	return t.Conn.Close()
}

// once is a listener that accepts one connection.
type once struct {
	mu   sync.Mutex
	conn net.Conn
}

func (o *once) Accept() (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.conn
	if c == nil {
		return nil, io.EOF
	}
	o.conn = nil
	return c, nil
}

func (*once) Close() error   { return nil }
func (*once) Addr() net.Addr { return &net.TCPAddr{} }

type tunnelKey struct{}

// newInner answers what comes through tunnels, over HTTP/1.1 and HTTP/2.
func (g *Gateway) newInner() *http.Server {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	return &http.Server{
		Protocols: &p,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
			closing(w, r)
			t := r.Context().Value(tunnelKey{}).(*tunnel) // ConnContext below sets it
			if t.sess.Context().Err() != nil {
				g.problem(w, http.StatusUnauthorized, "unauthenticated", "the session has ended")
				return
			}
			g.serve(w, r, t.sess, forward)
		}),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return h.Conn.(*tunnel).leaf, nil // Accept returns nothing else
		}},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, tunnelKey{}, c.(*tls.Conn).NetConn())
		},
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		// As server.Serve has it, for the same reasons.
		HTTP2:    &http.HTTP2Config{WriteByteTimeout: g.cfg.Slow, MaxEncoderHeaderTableSize: 1},
		ErrorLog: stdlog.New(io.Discard, "", 0), // of handshakes that steps break off
	}
}
