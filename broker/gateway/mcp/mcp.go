// Package mcp is the access path of the Model Context Protocol: a gateway
// between a step's MCP client and an MCP server, over streamable HTTP
// (modelcontextprotocol.io, versions 2025-03-26 to 2026-07-28). It reads each
// JSON-RPC message, judges it, puts it on record and hands it on; what comes
// back is masked message by message. See docs/decisions/0016.
package mcp

import (
	"context"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// MaxMessage is how long a message may be in bytes, either way.
const MaxMessage = 4 << 20

// Config is what a Gateway is made of.
type Config struct {
	Gateway *gateway.Gateway
	// ApprovalWait is how long a call of a tool that has a scope of its own waits
	// for people; 60 s by default.
	ApprovalWait time.Duration
	KeepAlive    time.Duration // between signs of life while people decide; 10 s by default
	Timeout      time.Duration // until a server begins to answer, and for an answer that is no stream; 2 min by default
	Slow         time.Duration // for one write to a step, and for reading its message; 30 s by default
	Log          *zap.Logger   // none by default
}

// Gateway is an http.Handler for all MCP sessions of a gateway.Gateway: the
// token names the server. It is safe for concurrent use.
type Gateway struct {
	cfg    Config
	client *http.Client

	mu    sync.Mutex
	views map[*gateway.Session]*view
}

// New returns a Gateway without MCP sessions.
func New(c Config) *Gateway {
	for d, v := range map[*time.Duration]time.Duration{
		&c.ApprovalWait: 60 * time.Second, &c.KeepAlive: 10 * time.Second, &c.Timeout: 2 * time.Minute, &c.Slow: 30 * time.Second,
	} {
		if *d <= 0 {
			*d = v
		}
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return &Gateway{cfg: c, client: newClient(c.Gateway), views: map[*gateway.Session]*view{}}
}

// Errors that end an exchange.
var (
	errTimeout = errors.New("the server took too long")
	errGone    = errors.New("the MCP session has ended")
	errCancel  = errors.New("the step cancelled it")
)

// exchange is one HTTP request of a step's.
type exchange struct {
	g      *Gateway
	w      http.ResponseWriter
	r      *http.Request
	rc     *http.ResponseController
	v      *view
	ctx    context.Context // ends with the request, with the session, or by cancel
	cancel context.CancelCauseFunc
	out    *writer // set once the answer is a stream
}

// ServeHTTP implements http.Handler. The MCP endpoint is / and /mcp.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	x := &exchange{g: g, w: w, r: r, rc: http.NewResponseController(w)}
	// Who is told nothing but a problem must read it; what streams sets its own.
	_ = x.rc.SetWriteDeadline(time.Now().Add(g.cfg.Slow))
	// This is no proxy: a DPoP proof that was made for another host, which the step
	// called, would be good here under that host's name.
	if r.URL.Host != "" || r.URL.Path != "/" && r.URL.Path != "/mcp" {
		gateway.Problem(w, http.StatusNotFound, "not-found", "the MCP endpoint is /")
		return
	}
	// Browsers alone send these (Fetch standard), and no step is one: a page that
	// reaches this address by DNS rebinding is turned away before its token counts.
	if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
		g.cfg.Gateway.Refused(r.Context(), store.ProtocolMCP, remote(r), "browser")
		gateway.Problem(w, http.StatusForbidden, "role-forbidden", "browsers are not served here")
		return
	}
	sess, err := g.cfg.Gateway.Authenticate(r)
	if err != nil {
		g.cfg.Gateway.Refused(r.Context(), store.ProtocolMCP, remote(r), methodName(r.Method))
		w.Header().Set("WWW-Authenticate", "Bearer")
		if errors.Is(err, gateway.ErrProof) { // RFC 9449, section 7.1
			w.Header().Set("WWW-Authenticate", `DPoP error="invalid_dpop_proof"`)
		}
		gateway.Problem(w, http.StatusUnauthorized, "unauthenticated", "no session has this token: it is wrong, or its credential has ended")
		return
	}
	if sess.Grant.Access.Protocol != store.ProtocolMCP {
		if err := sess.Refuse(r.Context(), gateway.Refusal{Use: "mcp", Reason: "the session is for another protocol", Remote: remote(r)}); err != nil {
			g.cfg.Log.Warn("a refusal is not on record", zap.Error(err))
		}
		gateway.Problem(w, http.StatusForbidden, "scope-denied", "this session is for "+sess.Grant.Access.Protocol)
		return
	}
	if x.v, err = g.view(sess); err != nil {
		g.cfg.Log.Error("a session's rules cannot be read", zap.String("scope", sess.Grant.Scope), zap.Error(err))
		gateway.Problem(w, http.StatusInternalServerError, "internal", "the rules of this session cannot be read")
		return
	}
	_ = x.rc.SetWriteDeadline(time.Time{})
	x.ctx, x.cancel = context.WithCancelCause(r.Context())
	defer x.cancel(nil)
	told := make(chan struct{})
	stop := context.AfterFunc(sess.Context(), func() {
		defer close(told)
		x.cancel(gateway.ErrEnded)
		// A step that does not send or read is not waited for; one that does is told.
		_ = x.rc.SetReadDeadline(time.Now())
		_ = x.rc.SetWriteDeadline(time.Now().Add(endWithin))
	})
	defer func() {
		if !stop() {
			<-told // after ServeHTTP, net/http panics where x.rc is used (HTTP/2)
		}
	}()
	switch r.Method {
	case http.MethodPost:
		x.post()
	case http.MethodGet:
		x.get()
	case http.MethodDelete:
		x.delete()
	default:
		w.Header().Set("Allow", "GET, POST, DELETE")
		x.turnAway(http.StatusMethodNotAllowed, "method-not-allowed", "MCP has GET, POST and DELETE")
	}
}

// endWithin is how long a step may take to be told of the end of its session.
const endWithin = 500 * time.Millisecond

// methodName is a method as the record has it: of few kinds.
func methodName(m string) string {
	switch m {
	case http.MethodPost, http.MethodGet, http.MethodDelete:
		return m
	}
	return "another method"
}

// view returns what is known of sess, and learns it the first time.
func (g *Gateway) view(sess *gateway.Session) (*view, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v := g.views[sess]; v != nil {
		return v, nil
	}
	v, err := newView(sess)
	if err != nil {
		return nil, err
	}
	g.views[sess] = v
	context.AfterFunc(sess.Context(), func() {
		g.mu.Lock()
		delete(g.views, sess)
		g.mu.Unlock()
		v.end()
	})
	return v, nil
}

// post takes one message.
func (x *exchange) post() {
	h := x.r.Header
	if t, _, err := mime.ParseMediaType(h.Get("Content-Type")); err != nil || t != "application/json" || h.Get("Content-Encoding") != "" {
		x.turnAway(http.StatusUnsupportedMediaType, "malformed", "the content must be application/json, not compressed")
		return
	}
	if !accepts(h, "application/json") || !accepts(h, "text/event-stream") {
		x.turnAway(http.StatusNotAcceptable, "malformed", "Accept must name application/json and text/event-stream (MCP, transports)")
		return
	}
	_ = x.rc.SetReadDeadline(time.Now().Add(x.g.cfg.Slow))
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, MaxMessage))
	if err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			x.refuse(http.StatusRequestEntityTooLarge, nil, "", &refused{codeInvalid, "message", "the message is larger than 4 MiB"})
			return
		}
		x.problem(http.StatusBadRequest, "malformed", "the message did not arrive")
		return
	}
	_ = x.rc.SetReadDeadline(time.Time{})
	m, err := parse(body)
	if err != nil {
		x.refuse(http.StatusBadRequest, nil, string(body), &refused{codeParse, "message", err.Error()})
		return
	}
	version := h.Get("Mcp-Protocol-Version")
	if version != "" && !known(version) {
		data, _ := json.Marshal(map[string]any{"supported": versions}, json.Deterministic(true)) // strings always marshal
		x.record(gateway.Refusal{Use: "message", Statement: string(body), Reason: "an unknown protocol version"})
		_, _ = x.answerJSON(http.StatusBadRequest, &message{ID: idOf(m), Error: &rpcError{codeVersion, "refused by the gateway: it does not know this protocol version", data}})
		return
	}
	if m.response() {
		x.refuse(http.StatusBadRequest, nil, string(body), &refused{codeInvalid, "response", "nothing was asked of the step"})
		return
	}
	var c *conn
	switch id := h.Get("Mcp-Session-Id"); {
	case id == "" || version == stateless:
		c = x.v.newConn(version)
	case m.Method == "initialize":
		x.refuse(http.StatusBadRequest, m, string(body), &refused{codeInvalid, "initialize", "the MCP session is initialized already"})
		return
	default:
		if c = x.conn(id); c == nil {
			return
		}
		_, agreed := c.agreed()
		if version != "" && version != agreed {
			x.refuse(http.StatusBadRequest, m, string(body), &refused{codeInvalid, m.Method, "another protocol version than was agreed"})
			return
		}
		version = agreed
	}
	if m.Method == "ping" && m.request() {
		// The gateway is the peer; the server learns nothing, so nothing is recorded.
		_, _ = x.answerJSON(http.StatusOK, &message{ID: m.ID, Result: []byte("{}")})
		return
	}
	q, no := judge(m, x.v.access, x.v.sess.Grant.Scope, version, x.v.opened)
	if no == nil && version == stateless && m.request() {
		no = q.headers(h)
	}
	if no != nil {
		status := http.StatusOK
		if m.notification() || no.code == codeHeaderMismatch {
			status = http.StatusBadRequest
		}
		x.refuse(status, m, statement(m), no)
		return
	}
	if m.notification() {
		x.notify(c, q)
		return
	}
	x.call(c, q)
}

// statement is what the record keeps of a message that is refused.
func statement(m *message) string {
	if m.Params == nil {
		return ""
	}
	return string(m.Params)
}

func known(version string) bool {
	for _, v := range versions {
		if v == version {
			return true
		}
	}
	return false
}

// conn finds an MCP session by the name that the step was told, or answers 404,
// upon which clients begin a new one (MCP, transports, session management).
func (x *exchange) conn(id string) *conn {
	if c := x.v.conn(id); c != nil {
		return c
	}
	reason := "no such MCP session"
	if x.g.others(x.v, id) {
		reason = "the MCP session of another step"
	}
	x.record(gateway.Refusal{Use: "Mcp-Session-Id", Reason: reason})
	x.problem(http.StatusNotFound, "not-found", "no such MCP session: initialize a new one")
	return nil
}

// others reports whether id is an MCP session of another gateway session.
func (g *Gateway) others(v *view, id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, o := range g.views {
		if o != v && o.conn(id) != nil {
			return true
		}
	}
	return false
}

// record puts a refusal on record.
func (x *exchange) record(r gateway.Refusal) bool {
	r.Remote = remote(x.r)
	// The step may have gone; the refusal is on record all the same.
	ctx, stop := context.WithTimeout(context.WithoutCancel(x.r.Context()), 5*time.Second)
	defer stop()
	if err := x.v.sess.Refuse(ctx, r); err != nil {
		x.g.cfg.Log.Warn("a refusal is not on record", zap.Error(err))
		return false
	}
	return true
}

// refuse puts on record that something was not let through, and then says so.
// m is nil where it could not be read.
func (x *exchange) refuse(status int, m *message, statement string, no *refused) {
	on := x.record(gateway.Refusal{Use: no.use, Statement: cut(statement, maxKept), Reason: no.reason})
	e := &rpcError{Code: no.code, Message: no.Error()}
	if !on {
		e = &rpcError{Code: codeInternal, Message: "refused by the gateway, which cannot record now"}
	}
	_, _ = x.answer(status, &message{ID: idOf(m), Error: e}) // who has hung up is not told
}

// turnAway puts on record that a request of the session's is none of MCP, and
// then says so.
func (x *exchange) turnAway(status int, slug, reason string) {
	if !x.record(gateway.Refusal{Use: methodName(x.r.Method), Reason: reason}) {
		status, slug, reason = http.StatusServiceUnavailable, "ledger-unavailable", "refused, and that cannot be recorded now"
	}
	x.problem(status, slug, reason)
}

// maxKept is how much is recorded of what is refused, in bytes.
const maxKept = 32 << 10

// idOf is the id that an answer to m has: null where m has none, or is nil.
func idOf(m *message) []byte {
	if m == nil || m.ID == nil {
		return []byte("null")
	}
	return m.ID
}

// answer sends m, as an event where the answer is a stream by now. It returns
// its length.
func (x *exchange) answer(status int, m *message) (int64, error) {
	if x.out == nil {
		return x.answerJSON(status, m)
	}
	b := m.encode()
	return int64(len(b)), x.out.send(&event{data: b})
}

func (x *exchange) answerJSON(status int, m *message) (int64, error) {
	b := m.encode()
	_ = x.rc.SetWriteDeadline(x.deadline())
	x.w.Header().Set("Content-Type", "application/json")
	x.w.WriteHeader(status)
	_, err := x.w.Write(b)
	return int64(len(b)), err
}

// deadline is when a write to the step is to be done.
func (x *exchange) deadline() time.Time {
	if x.v.sess.Context().Err() != nil {
		return time.Now().Add(endWithin)
	}
	return time.Now().Add(x.g.cfg.Slow)
}

// quiet takes the deadline of a write off: HTTP/2 ends a stream when it is over,
// though nothing is being written.
func (x *exchange) quiet() {
	_ = x.rc.SetWriteDeadline(time.Time{})
	if x.v.sess.Context().Err() != nil { // it may have ended just now
		_ = x.rc.SetWriteDeadline(x.deadline())
	}
}

// stream makes the answer a stream of events.
func (x *exchange) stream() error {
	if x.out != nil {
		return nil
	}
	x.out = &writer{w: x.w, rc: x.rc, deadline: x.deadline, quiet: x.quiet}
	return x.out.open()
}

// accepts reports whether Accept names a media type (RFC 9110, section 12.5.1).
func accepts(h http.Header, want string) bool {
	for _, v := range h.Values("Accept") {
		for part := range strings.SplitSeq(v, ",") {
			t, p, err := mime.ParseMediaType(strings.TrimSpace(part))
			if err == nil && p["q"] != "0" && (t == want || t == "*/*" || t == strings.SplitN(want, "/", 2)[0]+"/*") {
				return true
			}
		}
	}
	return false
}

// remote is the step's address without port.
func remote(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

func (x *exchange) problem(status int, slug, detail string) {
	_ = x.rc.SetWriteDeadline(x.deadline())
	gateway.Problem(x.w, status, slug, detail)
}
