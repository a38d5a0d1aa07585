package mcp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/store"
)

// newClient reaches servers: through the gateway's Dial, never through a proxy
// of the environment, and to no other place that an answer names.
func newClient(g *gateway.Gateway) *http.Client {
	return &http.Client{
		Transport: g.Targets.Transport(&http.Transport{
			DialContext:            g.Dial,
			ForceAttemptHTTP2:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: 64 << 10,
			MaxIdleConnsPerHost:    16,
			IdleConnTimeout:        90 * time.Second,
		}),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// outgoing is one HTTP request to a server. All of it is the gateway's own
// making: no header of the step's goes on.
type outgoing struct {
	method  string
	body    []byte // nil: none
	sess    *gateway.Session
	c       *conn
	version string // where c has none yet
	last    string // Last-Event-ID
	q       *asked // whose method and name go into headers (2026-07-28)
}

// send sends o and waits for the answer's head until ctx ends, or for
// Config.Timeout. The caller closes the body, and calls stop once the body is
// to have no such deadline, or is read.
func (g *Gateway) send(ctx context.Context, cancel context.CancelCauseFunc, o outgoing) (res *http.Response, stop func(), err error) {
	a := o.sess.Grant.Access
	var body io.Reader
	if o.body != nil {
		body = bytes.NewReader(o.body)
	}
	req, err := http.NewRequestWithContext(ctx, o.method, a.Upstream, body)
	if err != nil {
		return nil, nil, err
	}
	server, version := o.c.agreed()
	if version == "" {
		version = o.version
	}
	h := req.Header
	h.Set("User-Agent", "countersign")
	h.Set("Accept-Encoding", "identity")
	switch o.method {
	case http.MethodPost:
		h.Set("Content-Type", "application/json")
		h.Set("Accept", "application/json, text/event-stream")
	case http.MethodGet:
		h.Set("Accept", "text/event-stream")
	}
	for name, v := range map[string]string{"Mcp-Session-Id": server, "Mcp-Protocol-Version": version, "Last-Event-ID": o.last} {
		if v != "" {
			h.Set(name, v)
		}
	}
	if o.q != nil && version == stateless {
		h.Set("Mcp-Method", o.q.m.Method)
		if o.q.name != "" {
			h.Set("Mcp-Name", o.q.name)
		}
		for i := 0; i < len(o.q.params); i += 2 {
			h.Set(o.q.params[i], o.q.params[i+1])
		}
	}
	if err := inject.Apply(req, a.Inject, o.sess.Secret); err != nil {
		return nil, nil, err
	}
	timer := time.AfterFunc(g.cfg.Timeout, func() { cancel(errTimeout) })
	res, err = g.client.Do(req)
	if err != nil {
		timer.Stop()
		var at *url.Error
		if errors.As(err, &at) { // its text has the URL, and so what was put into the query
			err = at.Err
		}
		return nil, nil, err
	}
	if e := res.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		timer.Stop()
		_ = res.Body.Close()
		return nil, nil, fmt.Errorf("%w: it is compressed, which nobody asked for", errAnswer)
	}
	return res, func() { timer.Stop() }, nil
}

// media is the media type of an answer.
func media(res *http.Response) string {
	t, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

// use puts q on record under sess, and returns its outcome's digest where the
// record cannot hold all of the statement: it has the start then, and the digest
// of the whole.
func (x *exchange) use(ctx context.Context, sess *gateway.Session, c *conn, q *asked) (*gateway.Pending, string, error) {
	u := gateway.Use{Use: q.use, Conn: "mcp " + c.id[:12], Objects: q.objects, Statement: q.statement}
	p, err := sess.Use(ctx, u)
	digest := ""
	if errors.Is(err, gateway.ErrTooLarge) {
		digest = digestOf(q.statement)
		u.Statement = cut(q.statement, maxCut)
		p, err = sess.Use(ctx, u)
	}
	if err != nil {
		return nil, "", err
	}
	return p[0], digest, nil
}

func digestOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// maxCut is how much is recorded of a statement that is too large, in bytes.
const maxCut = 16 << 10

// cut is s, or its start and the digest of the whole.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return fmt.Sprintf("%s… (cut, of %d bytes, %s)", start(s, n), len(s), digestOf(s))
}

// start is at most n bytes of s, in whole characters.
func start(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// call hands a request on and brings its answer back.
func (x *exchange) call(c *conn, q *asked) {
	k := &call{c: c, q: q, cancel: x.cancel, sess: x.v.sess, hide: x.v.hide}
	if !c.begin(k) {
		x.refuse(http.StatusBadRequest, q.m, q.statement, &refused{codeInvalid, q.use, "a request of this id is under way, or too many are"})
		return
	}
	defer func() {
		if !k.forwarded() {
			c.forget(k)
		}
	}()
	if q.scope != "" && len(q.statement) > maxReason {
		x.refuse(http.StatusOK, q.m, q.statement, &refused{codeParams, q.use, "the arguments are longer than people can be asked to approve (12 KiB)"})
		return
	}
	if q.scope != "" && !x.ask(k) {
		return
	}
	if k.sess != x.v.sess {
		// What the approval was for has been done once this call has.
		defer x.g.cfg.Gateway.End(k.sess.Intent)
		defer context.AfterFunc(k.sess.Context(), func() { x.cancel(gateway.ErrEnded) })()
	}
	if !x.recorded(k) {
		return
	}
	x.exchange(k)
}

// recorded puts k on record, or tells the step why that was not possible.
func (x *exchange) recorded(k *call) bool {
	body := k.q.m.encode()
	use, digest, err := x.use(x.ctx, k.sess, k.c, k.q)
	switch {
	case err == nil:
		k.recorded(use, int64(len(body)), digest)
		return true
	case x.ctx.Err() != nil || errors.Is(err, gateway.ErrEnded):
		x.fail(k, store.UseCut)
	default:
		x.g.cfg.Log.Warn("a use is not on record, and went no further", zap.Error(err))
		_, _ = x.answer(http.StatusOK, failed(k, "it cannot be recorded now, and so was not handed on"))
	}
	return false
}

// failed is an answer of the gateway's own.
func failed(k *call, what string) *message {
	return &message{ID: k.q.m.ID, Error: &rpcError{Code: codeInternal, Message: "gateway: " + what}}
}

// said is what the step is told of a use that came to nothing, by its reason.
var said = map[string]string{
	store.UseUpstream: "the MCP server could not be reached, hung up, or broke the protocol",
	store.UseTimeout:  "the MCP server took too long",
	store.UseCut:      "the session has ended",
	store.UseWithheld: "what the MCP server answered was withheld",
	store.UseClient:   "it was cancelled",
}

// fail ends k for a reason of the gateway's, and tells the step.
func (x *exchange) fail(k *call, reason string) {
	k.finish(store.UseOutcome{Error: reason}, "")
	_, _ = x.answer(http.StatusOK, failed(k, said[reason])) // who has hung up is not told
}

// reason is why the exchange ended, where err is what became of the connection
// to the server.
func (x *exchange) reason(err error) string {
	switch cause := context.Cause(x.ctx); {
	case cause == nil:
		if errors.Is(err, errWrite) {
			return store.UseClient
		}
		return store.UseUpstream
	case errors.Is(cause, gateway.ErrEnded):
		return store.UseCut
	case errors.Is(cause, errTimeout):
		return store.UseTimeout
	default: // the step hung up, ended its MCP session, or cancelled
		if x.v.sess.Context().Err() != nil {
			return store.UseCut
		}
		return store.UseClient
	}
}

// errWrite says that the step does not read.
var errWrite = errors.New("the step does not read")

// exchange sends k, which is on record, and hands on what comes back.
func (x *exchange) exchange(k *call) {
	_, version := k.c.agreed()
	res, stop, err := x.g.send(x.ctx, x.cancel, outgoing{method: http.MethodPost, body: k.q.m.encode(), sess: k.sess, c: k.c, version: version, q: k.q})
	if err != nil {
		x.lost(k, err, false)
		return
	}
	defer func() { _ = res.Body.Close() }()
	defer stop()
	server, _ := k.c.agreed()
	switch {
	case res.StatusCode == http.StatusNotFound && server != "":
		k.finish(store.UseOutcome{Status: "404", Error: store.UseUpstream}, "")
		x.v.drop(k.c, store.UseUpstream)
		if x.out != nil {
			_, _ = x.answer(http.StatusOK, failed(k, "the MCP server has ended its session: initialize a new one"))
			return
		}
		x.problem(http.StatusNotFound, "not-found", "the MCP server has ended its session: initialize a new one")
	case media(res) == "application/json" && (res.StatusCode == http.StatusOK || res.StatusCode >= 400):
		x.whole(k, res)
	case media(res) == "text/event-stream" && res.StatusCode == http.StatusOK:
		stop()
		x.begun(k, res)
		if err := x.stream(); err != nil {
			x.lost(k, errWrite, false)
			return
		}
		x.events(k, res)
	default:
		k.finish(store.UseOutcome{Status: strconv.Itoa(res.StatusCode), Error: store.UseUpstream}, "")
		_, _ = x.answer(http.StatusOK, failed(k, fmt.Sprintf("the MCP server answered %d", res.StatusCode)))
	}
}

// begun takes the server's session from the answer to initialize, and tells the
// step the gateway's name for it.
func (x *exchange) begun(k *call, res *http.Response) {
	id := res.Header.Get("Mcp-Session-Id")
	if k.q.m.Method != "initialize" || id == "" || len(id) > 1024 || !printable(id) {
		return
	}
	k.c.mu.Lock()
	k.c.server = id
	k.c.mu.Unlock()
	if x.v.keep(k.c) {
		x.w.Header().Set("Mcp-Session-Id", k.c.id)
	}
}

// whole hands on an answer that is one JSON document.
func (x *exchange) whole(k *call, res *http.Response) {
	b, err := io.ReadAll(io.LimitReader(res.Body, MaxMessage+1))
	if err != nil {
		x.lost(k, err, false)
		return
	}
	m, err := parse(b)
	if len(b) > MaxMessage || err != nil || !m.response() || (string(m.ID) != string(k.q.m.ID) && (m.ID != nil || res.StatusCode < 400)) {
		k.finish(store.UseOutcome{Status: strconv.Itoa(res.StatusCode), Error: store.UseUpstream}, "")
		_, _ = x.answer(http.StatusOK, failed(k, said[store.UseUpstream]))
		return
	}
	if m.Error == nil {
		x.begun(k, res)
	}
	status := http.StatusOK
	if m.Error != nil && (res.StatusCode == http.StatusBadRequest || res.StatusCode == http.StatusNotFound) {
		status = res.StatusCode // version 2026-07-28 tells errors of the protocol by them, too
	}
	x.deliver(k, m, status, "")
}

// deliver masks the answer to k, hands it on and says on record what it was.
// eventID is that of the event it came in.
func (x *exchange) deliver(k *call, m *message, status int, eventID string) error {
	h := k.hide.fresh()
	out, rows, err := h.answer(k.sess.Grant.Access, k.q, m, x.v.sealed)
	if errors.Is(err, errInput) {
		x.record(gateway.Refusal{Use: "server input_required", Conn: "mcp " + k.c.id[:12], Reason: "what a server asks for is not handed on to the step"})
	}
	if err != nil {
		k.finish(store.UseOutcome{Status: "ok", Error: store.UseWithheld}, "")
		out = failed(k, said[store.UseWithheld]+": "+err.Error())
	}
	if k.q.m.Method == "initialize" && out.Error == nil {
		r, _ := membersOf(out.Result)
		k.c.mu.Lock()
		k.c.version, _ = r.text("protocolVersion")
		k.c.mu.Unlock()
	}
	var n int64
	if x.out == nil {
		n, err = x.answer(status, out)
	} else {
		b := out.encode()
		n, err = int64(len(b)), x.out.send(&event{id: x.eventID(k.c, eventID), data: b})
	}
	o := outcome(out, rows, n, h.n)
	if err != nil {
		o.Error, err = store.UseClient, errWrite
	}
	k.finish(o, sample(k.sess.Grant.Access, k.q, out))
	return err
}

// sample is an excerpt of what the step got of its target. What only describes
// the target is none.
func sample(a *store.Access, q *asked, out *message) string {
	if a.MCP == nil || a.MCP.Sample <= 0 || q.objects == nil {
		return ""
	}
	n := min(a.MCP.Sample, maxCut)
	if out.Error != nil {
		return start(out.Error.Message, n)
	}
	return start(string(out.Result), n)
}

// lost ends k where no answer came. The connection to the server is cut by
// then; a server that has sessions is told that nobody waits any more, unless
// the step may come back for the answer.
func (x *exchange) lost(k *call, err error, resumable bool) {
	reason := x.reason(err)
	if resumable && (reason == store.UseClient || reason == store.UseUpstream) && k.c.find(k.q.m.ID) == k {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.detached = true
		return
	}
	switch {
	case reason == store.UseClient && !errors.Is(context.Cause(x.ctx), errGone):
		x.g.revoke(k)
	case reason == store.UseUpstream:
		x.g.cfg.Log.Info("an MCP server failed", zap.String("scope", k.sess.Grant.Scope), zap.String("why", why(err)))
	}
	x.fail(k, reason)
}

// why is what the log may say of err: how a connection failed, and of an answer
// only that it was none, since net/http quotes it.
func why(err error) string {
	var conn *net.OpError
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &conn):
		return conn.Error()
	case errors.As(err, &cert):
		return cert.Error()
	}
	return "it hung up, or its answer breaks the protocol"
}

// revoke tells the server that nobody waits for k any more: closing a stream
// alone does not (MCP 2025-06-18, transports).
func (g *Gateway) revoke(k *call) {
	server, version := k.c.agreed()
	k.mu.Lock()
	told := k.revoked || server == ""
	k.revoked = true
	k.mu.Unlock()
	if told {
		return
	}
	go func() {
		ctx, cancel := context.WithCancelCause(k.sess.Context())
		defer cancel(nil)
		deadline, stop := context.WithTimeout(ctx, noticeWithin)
		defer stop()
		m := &message{Method: "notifications/cancelled", Params: object{{"requestId", k.q.m.ID}, {"reason", quoted("the client hung up")}}.value()}
		q := &asked{m: m, use: m.Method, statement: string(m.Params)}
		use, err := k.sess.Use(deadline, gateway.Use{Use: q.use, Conn: "mcp " + k.c.id[:12], Statement: q.statement})
		if err != nil {
			return // not on record, not sent
		}
		body := m.encode()
		use[0].Finish(g.notice(deadline, cancel, outgoing{method: http.MethodPost, body: body, sess: k.sess, c: k.c, version: version, q: q}), "")
	}()
}

// noticeWithin bounds what the gateway says to a server of its own.
const noticeWithin = 5 * time.Second

// notice sends what has no answer, and returns what came of it.
func (g *Gateway) notice(ctx context.Context, cancel context.CancelCauseFunc, o outgoing) store.UseOutcome {
	out := store.UseOutcome{Sent: int64(len(o.body))}
	res, stop, err := g.send(ctx, cancel, o)
	if err != nil {
		out.Error = store.UseUpstream
		switch {
		case o.sess.Context().Err() != nil:
			out.Error = store.UseCut
		case errors.Is(context.Cause(ctx), errTimeout):
			out.Error = store.UseTimeout
		case ctx.Err() != nil:
			out.Error = store.UseClient
		}
		return out
	}
	defer stop()
	_ = res.Body.Close()
	out.Status = strconv.Itoa(res.StatusCode)
	if res.StatusCode >= 300 {
		out.Error = store.UseUpstream
	}
	return out
}

// notify hands a notification on. A cancellation goes to the server where it has
// the request, and ends the wait for an approval where it has not.
func (x *exchange) notify(c *conn, q *asked) {
	if q.m.Method == "notifications/cancelled" {
		p, _ := membersOf(q.m.Params)
		id, _ := identifier(p.get("requestId"))
		k := c.find(id)
		if k == nil || !k.forwarded() {
			if k != nil {
				k.cancel(errCancel)
			}
			x.w.WriteHeader(http.StatusAccepted)
			return
		}
		k.mu.Lock()
		told := k.revoked
		k.revoked = true
		k.mu.Unlock()
		if told {
			x.w.WriteHeader(http.StatusAccepted)
			return
		}
	}
	use, digest, err := x.use(x.ctx, x.v.sess, c, q)
	if err != nil {
		x.g.cfg.Log.Warn("a use is not on record, and went no further", zap.Error(err))
		x.problem(http.StatusServiceUnavailable, "ledger-unavailable", "it cannot be recorded now, and so was not handed on")
		return
	}
	_, version := c.agreed()
	if version == "" {
		version = x.r.Header.Get("Mcp-Protocol-Version")
	}
	o := x.g.notice(x.ctx, x.cancel, outgoing{method: http.MethodPost, body: q.m.encode(), sess: x.v.sess, c: c, version: version, q: q})
	o.Digest = digest
	use.Finish(o, "")
	switch {
	case o.Error == "":
		x.w.WriteHeader(http.StatusAccepted)
	case o.Status == "404" && x.v.conn(c.id) != nil:
		x.v.drop(c, store.UseUpstream)
		x.problem(http.StatusNotFound, "not-found", "the MCP server has ended its session: initialize a new one")
	default:
		x.problem(http.StatusBadGateway, "internal", said[o.Error])
	}
}

// get opens the stream of what a server says unasked, or resumes one.
func (x *exchange) get() {
	if !accepts(x.r.Header, "text/event-stream") {
		x.turnAway(http.StatusNotAcceptable, "malformed", "Accept must name text/event-stream (MCP, transports)")
		return
	}
	id := x.r.Header.Get("Mcp-Session-Id")
	if id == "" { // without sessions there is nothing to listen to
		x.w.Header().Set("Allow", "POST")
		x.problem(http.StatusMethodNotAllowed, "method-not-allowed", "without an Mcp-Session-Id there is no stream to open")
		return
	}
	c := x.conn(id)
	if c == nil {
		return
	}
	q := &asked{m: &message{Method: "GET"}, use: "stream"}
	last := ""
	if sealed := x.r.Header.Get("Last-Event-ID"); sealed != "" {
		var ok bool
		if last, ok = x.v.opened("event "+c.id, sealed); !ok {
			x.refuse(http.StatusBadRequest, nil, sealed, &refused{codeInvalid, "stream resume", "the event is none of this MCP session"})
			return
		}
		q.use, q.statement = "stream resume", last
	}
	use, _, err := x.use(x.ctx, x.v.sess, c, q)
	if err != nil {
		x.problem(http.StatusServiceUnavailable, "ledger-unavailable", "it cannot be recorded now, and so was not handed on")
		return
	}
	res, stop, err := x.g.send(x.ctx, x.cancel, outgoing{method: http.MethodGet, sess: x.v.sess, c: c, last: last})
	if err != nil {
		reason := x.reason(err)
		use.Finish(store.UseOutcome{Error: reason}, "")
		x.problem(http.StatusBadGateway, "internal", said[reason])
		return
	}
	stop()
	defer func() { _ = res.Body.Close() }()
	status := strconv.Itoa(res.StatusCode)
	if res.StatusCode != http.StatusOK || media(res) != "text/event-stream" {
		use.Finish(store.UseOutcome{Status: status, Error: store.UseUpstream}, "")
		switch res.StatusCode {
		case http.StatusNotFound:
			x.v.drop(c, store.UseUpstream)
			x.problem(http.StatusNotFound, "not-found", "the MCP server has ended its session: initialize a new one")
		case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			x.problem(http.StatusBadGateway, "internal", "the MCP server answered "+status)
		default: // as a server without such a stream says it (MCP, transports)
			x.w.Header().Set("Allow", "POST, DELETE")
			x.problem(http.StatusMethodNotAllowed, "method-not-allowed", "the MCP server offers no such stream")
		}
		return
	}
	if x.stream() != nil {
		use.Finish(store.UseOutcome{Status: status, Error: store.UseClient}, "")
		return
	}
	rows, masked, err := x.pump(c, nil, res.Body)
	o := store.UseOutcome{Status: status, Rows: rows, Masked: masked, Received: x.out.sent}
	if reason := x.reason(err); reason == store.UseCut || reason == store.UseUpstream && !errors.Is(err, io.EOF) {
		o.Error = reason
	}
	use.Finish(o, "")
}

// delete ends an MCP session.
func (x *exchange) delete() {
	id := x.r.Header.Get("Mcp-Session-Id")
	if id == "" {
		x.problem(http.StatusBadRequest, "malformed", "which MCP session? Send Mcp-Session-Id")
		return
	}
	c := x.conn(id)
	if c == nil {
		return
	}
	use, _, err := x.use(x.ctx, x.v.sess, c, &asked{use: "session end"})
	if err != nil {
		x.problem(http.StatusServiceUnavailable, "ledger-unavailable", "it cannot be recorded now, and so was not handed on")
		return
	}
	o := x.g.notice(x.ctx, x.cancel, outgoing{method: http.MethodDelete, sess: x.v.sess, c: c})
	use.Finish(o, "")
	// To the step it is over, whatever the server makes of it.
	x.v.drop(c, store.UseClient)
	x.w.WriteHeader(http.StatusNoContent)
}

// events hands on the stream in which a server answers k.
func (x *exchange) events(k *call, res *http.Response) {
	_, _, err := x.pump(k.c, k, res.Body)
	if err == nil {
		return
	}
	server, version := k.c.agreed()
	resumable := x.out.resumable && server != "" && version != stateless
	x.lost(k, err, resumable && !errors.Is(err, errAnswer))
}

// pump hands on a server's events until the answer to k has come, which is nil
// on the stream of a session, or the stream ends. It returns how many messages
// the step got, and how many values were hidden in notifications.
func (x *exchange) pump(c *conn, k *call, body io.Reader) (rows, masked int64, err error) {
	in := newEvents(body, MaxMessage+(4<<10))
	for {
		e, err := in.next()
		if err != nil {
			return rows, masked, err
		}
		if len(e.id) > maxSealed {
			return rows, masked, errAnswer
		}
		out := &event{id: x.eventID(c, e.id), retry: min(max(e.retry, 0), time.Minute)}
		if e.retry > 0 {
			out.retry = max(out.retry, 100*time.Millisecond)
		}
		if e.data != nil && (e.name == "" || e.name == "message") {
			m, err := parse(e.data)
			switch {
			case err != nil:
				return rows, masked, fmt.Errorf("%w: %w", errAnswer, err)
			case m.request():
				x.asked(c, k, m)
			case m.notification():
				h, id := c.hiding(), []byte(nil)
				if k != nil {
					id = k.q.m.ID
				}
				if n := h.notice(x.v.access, m, id, c.progresses); n != nil {
					out.data = n.encode()
				}
				masked += h.n
			default:
				of := k
				if k == nil || string(m.ID) != string(k.q.m.ID) {
					of = c.find(m.ID) // on a stream that was resumed
					if of == nil || !of.comesBack() {
						break // it answers nothing that is waited for here
					}
				}
				if err := x.deliver(of, m, http.StatusOK, e.id); err != nil {
					return rows, masked, err
				}
				rows++
				if of == k {
					return rows, masked, nil
				}
				continue
			}
		}
		if out.comment() && !e.comment() {
			continue
		}
		if x.out.send(out) != nil {
			return rows, masked, errWrite
		}
		if out.data != nil {
			rows++
		}
	}
}

// eventID is how the step gets the ID of a server's event.
func (x *exchange) eventID(c *conn, id string) string {
	if id == "" {
		return ""
	}
	if x.out != nil {
		x.out.resumable = true
	}
	return x.v.sealed("event "+c.id, id)
}

// asked answers what a server asks of the step, which never hears of it:
// sampling, elicitation and roots would hand the server's words to the step's
// model, and the step's files and people to the server. A ping is answered.
func (x *exchange) asked(c *conn, k *call, m *message) {
	sess, h := x.v.sess, x.v.hide
	if k != nil {
		sess, h = k.sess, k.hide
	}
	answer := &message{ID: m.ID, Result: []byte("{}")}
	if m.Method != "ping" {
		answer = &message{ID: m.ID, Error: &rpcError{Code: codeMethod, Message: "refused by the gateway: nothing may be asked of this client"}}
		use := "server request"
		if strings.HasPrefix(m.Method, "sampling/") || strings.HasPrefix(m.Method, "elicitation/") || strings.HasPrefix(m.Method, "roots/") {
			use = "server " + m.Method
		}
		statement := ""
		if m.Params != nil {
			statement = string(h.fresh().document(m.Params))
		}
		x.record(gateway.Refusal{Use: use, Conn: "mcp " + c.id[:12], Statement: statement, Reason: "what a server asks for is not handed on to the step"})
	}
	select {
	case c.asking <- struct{}{}:
	default:
		return // it asks faster than it takes answers
	}
	go func() {
		defer func() { <-c.asking }()
		ctx, cancel := context.WithCancelCause(sess.Context())
		defer cancel(nil)
		deadline, stop := context.WithTimeout(ctx, noticeWithin)
		defer stop()
		x.g.notice(deadline, cancel, outgoing{method: http.MethodPost, body: answer.encode(), sess: sess, c: c})
	}()
}
