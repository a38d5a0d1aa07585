package http

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log"
	"mime"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/store"
)

// Errors that end an exchange.
var (
	errTimeout = errors.New("the target took too long")
	errClient  = errors.New("the step hung up")
)

// withheld says why an answer is not handed on. It holds nothing of it.
type withheld string

func (e withheld) Error() string { return "the answer was withheld: " + string(e) }

// errElsewhere says that the target sent the step to another place.
var errElsewhere = errors.New("the target redirects to another place, which this session does not reach")

// endWithin is how long a step may take to be told of the end of its session.
const endWithin = 500 * time.Millisecond

// exchange is one request of a step's.
type exchange struct {
	g  *Gateway
	v  *view
	w  http.ResponseWriter
	r  *http.Request
	rc *http.ResponseController
	by way

	ctx     context.Context // ends with the request, the session, or what took too long
	cancel  context.CancelCauseFunc
	use     string // as gateway.Use.Use
	query   []string
	path    string // canonical, below the target's base
	upgrade bool   // WebSocket is asked for

	pending *gateway.Pending
	watch   *watch // of silence
	began   bool   // a line of a stream was read

	reading sync.Mutex  // held while the step's body is read
	over    atomic.Bool // it is to be read no more
	arrived atomic.Bool // all of it was read
	had     int64       // how much of it was read; under reading

	mu   sync.Mutex // the rest, which several goroutines write
	err  error      // the first that ended it
	out  store.UseOutcome
	sum  hash.Hash // of the request's body
	told []byte    // the beginning of what the step got
	head string    // of the sample
	conn net.Conn  // once it is hijacked

	handed bool // the answer was handed on to its end
	given  bool // the handler is about to return
}

func (x *exchange) serve() {
	no := x.judge()
	if no != nil {
		no.Statement = x.statement("")
		x.g.deny(x.w, x.r, x.v.sess, *no)
		return
	}
	x.ctx, x.cancel = context.WithCancelCause(x.r.Context())
	defer x.cancel(nil)
	defer x.answered()
	defer context.AfterFunc(x.v.sess.Context(), func() { x.cut(gateway.ErrEnded) })()
	defer x.leave()
	first, excerpt, err := x.excerpt()
	if err != nil {
		x.problem(http.StatusBadRequest, "malformed", "the body did not arrive")
		return
	}
	if !x.recorded(excerpt) {
		return
	}
	defer x.finish()
	x.send(first)
}

// leave sees to it that nobody reads the step's body when the server has its
// connection back: net/http does not stand two readers.
func (x *exchange) leave() {
	if x.r.ContentLength == 0 || x.arrived.Load() {
		return
	}
	x.mu.Lock()
	x.over.Store(true)
	_ = x.rc.SetReadDeadline(time.Now())
	x.mu.Unlock()
	x.reading.Lock() // until a read that is under way has seen it
	defer x.reading.Unlock()
}

// answered ends the use of rc: over HTTP/2, net/http panics where it is used
// once the handler has returned, and a cut may come just then.
func (x *exchange) answered() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.given = true
}

// judge says why a request may not pass, or nil.
func (x *exchange) judge() *gateway.Refusal {
	r := x.r
	method := methodName(r.Method)
	no := func(reason string) *gateway.Refusal { return &gateway.Refusal{Use: x.use, Reason: reason} }
	x.use = method
	raw := r.URL.RawPath // what was sent, where it is not how net/url writes it
	if raw == "" {
		raw = r.URL.EscapedPath()
	}
	if x.by == forward {
		if r.URL.Host != "" && !sameHost(r.URL, x.v.base) || r.Host != "" && !strings.EqualFold(authorityOf(r.Host, x.v.base.Scheme), hostPort(x.v.base)) {
			return no("another host than the session's target")
		}
		if raw == "" {
			raw = "/"
		}
	}
	path, err := canonical(raw)
	if err != nil {
		return no(err.Error())
	}
	if x.by == forward && x.v.base.Path != "" {
		rest, below := strings.CutPrefix(path, x.v.base.Path)
		if below && rest == "" {
			rest = "/"
		}
		if !below || rest[0] != '/' {
			return no("no route allows this path")
		}
		path = rest
	}
	x.path = path
	if x.query, err = keys(r.URL.RawQuery); err != nil {
		return no(err.Error())
	}
	pattern, allowed := match(x.v.access.HTTP.Routes, r.Method, path)
	if pattern != "" {
		x.use = method + " " + pattern
	}
	switch {
	case r.Method == http.MethodConnect || r.Method == http.MethodTrace:
		return no("CONNECT and TRACE are not let through")
	case pattern == "":
		return no("no route allows this path")
	case !allowed:
		return no("no route allows this method here")
	case x.v.key != "" && slices.ContainsFunc(x.query, func(k string) bool { return k != x.v.key && plainKey(k) == plainKey(x.v.key) }):
		return no("the query names the key in which the target is shown the secret")
	case slices.ContainsFunc(x.query, func(k string) bool { return plainKey(k) == "_method" }):
		return no("the query would have the target take another method")
	}
	x.use = r.Method + " " + pattern
	if err := x.g.cfg.Gateway.Reachable(x.v.base.Host); err != nil {
		return no(err.Error())
	}
	if up := r.Header.Values("Upgrade"); len(up) > 0 && hasToken(r.Header.Values("Connection"), "upgrade") {
		websocket := len(up) == 1 && strings.EqualFold(up[0], "websocket")
		switch {
		case websocket && (!x.v.access.HTTP.Upgrade || x.v.masker != nil || !x.v.access.Masking.IsZero()):
			return no("the connection may not be upgraded")
		case websocket && (r.Method != http.MethodGet || r.ProtoMajor != 1):
			return no("a WebSocket begins with GET over HTTP/1.1")
		}
		x.upgrade = websocket // others may be ignored (RFC 9110, section 7.8)
	}
	return nil
}

// authorityOf is a Host header as host:port.
func authorityOf(host, scheme string) string {
	return hostPort(&url.URL{Scheme: scheme, Host: host})
}

// statement is all that was asked, but for values in the query.
func (x *exchange) statement(excerpt string) string {
	var b strings.Builder
	path := x.path
	if path == "" {
		path = strings.ToValidUTF8(x.r.URL.EscapedPath(), "\uFFFD")
	}
	if x.by == reverse || x.path != "" {
		path = x.v.base.EscapedPath() + (&url.URL{Path: path}).EscapedPath()
	}
	b.WriteString(x.r.Method + " " + start(path, maxPath))
	for i, k := range x.query {
		b.WriteString(map[bool]string{true: "?", false: "&"}[i == 0] + url.QueryEscape(k))
	}
	x.headers(&b, x.r.Header, x.v.access.HTTP.RequestHeaders)
	if excerpt != "" {
		b.WriteString("\n\n" + excerpt)
	}
	return b.String()
}

// maxHeaders bounds what is recorded of headers, in bytes.
const maxHeaders = 8 << 10

// headers writes those that the grant names, masked.
func (x *exchange) headers(b *strings.Builder, h http.Header, names []string) {
	left := maxHeaders
	for _, name := range names {
		for _, v := range h.Values(name) {
			v, _ = x.v.header(name, strings.ToValidUTF8(v, "\uFFFD"))
			if left -= len(name) + len(v) + 3; left < 0 {
				b.WriteString("\n(more headers, not recorded)")
				return
			}
			b.WriteString("\n" + name + ": " + v)
		}
	}
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

// maxExcerpt bounds what is recorded of a body, in bytes, whatever the grant
// says: it must fit in an entry with all else.
const maxExcerpt = 16 << 10

// excerpt reads the beginning of the body, and returns it with what the record
// says of it.
func (x *exchange) excerpt() (first []byte, text string, err error) {
	n := min(x.v.access.HTTP.Sample, maxExcerpt)
	if n <= 0 || x.r.Body == nil || x.r.ContentLength == 0 {
		return nil, "", nil
	}
	in := &sending{x: x, from: x.r.Body}
	buf := make([]byte, n+1)
	var got int
	if x.r.ContentLength > 0 {
		got, err = io.ReadFull(in, buf[:min(int64(len(buf)), x.r.ContentLength)])
	} else { // it may be a stream of which more comes later
		got, err = in.Read(buf)
	}
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, "", err
	}
	if err == io.ErrUnexpectedEOF {
		return nil, "", err
	}
	first = buf[:got]
	whole := x.r.ContentLength == int64(got) || err == io.EOF
	return first, x.v.sample(first, whole, n, x.r.Header), nil
}

// recorded puts the request on record, or tells the step why that was not
// possible. A crash after it leaves a use without an outcome.
func (x *exchange) recorded(excerpt string) bool {
	u := gateway.Use{Use: x.use, Conn: "http " + x.r.RemoteAddr, Objects: []string{strings.TrimPrefix(x.use, x.r.Method+" ")}, Statement: x.statement(excerpt)}
	p, err := x.v.sess.Use(x.ctx, u)
	if errors.Is(err, gateway.ErrTooLarge) && excerpt != "" {
		u.Statement = x.statement("(a body that the record cannot hold)")
		p, err = x.v.sess.Use(x.ctx, u)
	}
	switch {
	case err == nil:
		x.pending = p[0]
		return true
	case errors.Is(err, gateway.ErrEnded) || x.v.sess.Context().Err() != nil:
		x.problem(http.StatusUnauthorized, "unauthenticated", "the session has ended")
	case errors.Is(err, gateway.ErrTooLarge) || errors.Is(err, store.ErrMalformed):
		x.g.deny(x.w, x.r, x.v.sess, gateway.Refusal{Use: x.use, Reason: "the request is too large to be on record"})
	default:
		x.g.cfg.Log.Warn("a use is not on record, and went no further", zap.Error(err))
		x.problem(http.StatusServiceUnavailable, "ledger-unavailable", "it cannot be recorded now, and so was not handed on")
	}
	return false
}

// send hands the request on, and brings its answer back.
func (x *exchange) send(first []byte) {
	timeout := time.Duration(x.v.access.HTTP.Timeout)
	if timeout <= 0 {
		timeout = x.g.cfg.Timeout
	}
	x.watch = newWatch(timeout, func() { x.cut(errTimeout) })
	defer x.watch.stop()
	_ = x.rc.EnableFullDuplex() // of HTTP/1 alone; others are
	r := x.r.Clone(x.ctx)
	r.URL = &url.URL{Scheme: x.v.base.Scheme, Host: x.v.base.Host, Path: x.v.base.Path + x.path, RawQuery: x.r.URL.RawQuery}
	r.Host, r.RequestURI, r.Form, r.PostForm = x.v.base.Host, "", nil, nil
	// A trailer of the step's could stand for a header where a target merges them.
	r.Trailer = nil
	x.scrub(r.Header)
	if r.Body != nil && r.ContentLength != 0 {
		x.sum = sha256.New()
		r.Body = &sending{x: x, first: first, from: x.r.Body, count: true}
	}
	p := &httputil.ReverseProxy{
		Rewrite:        func(*httputil.ProxyRequest) {}, // all is set by now; this strips what proxies add
		Transport:      x,
		FlushInterval:  -1,
		ErrorLog:       log.New(io.Discard, "", 0), // its errors quote targets; finish tells what came of it
		ModifyResponse: x.answer,
		ErrorHandler:   x.failed,
	}
	p.ServeHTTP(&writer{x: x}, r) // panics where an answer breaks off
	x.mu.Lock()
	defer x.mu.Unlock()
	x.handed = x.err == nil
}

// RoundTrip shows the target the secret, as the last thing before the wire.
func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	in := x.v.access.Inject
	if in != nil && in.In == inject.InSigV4 {
		if err := x.sign(req); err != nil {
			return nil, err
		}
	} else if err := inject.Apply(req, in, x.v.sess.Secret); err != nil {
		return nil, err
	}
	return x.g.transport.RoundTrip(req)
}

// theirs are headers of the step's that do not go on: they tell a target of
// somebody else, or have it take another method or path than was judged.
var theirs = []string{
	"Authorization", "Proxy-Authorization", "Dpop", "Cookie", "Proxy-Connection",
	"Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip", "X-Cluster-Client-Ip", "X-Host", "X-Proxyuser-Ip",
	"X-Http-Method-Override", "X-Http-Method", "X-Method-Override", "X-Http-Host-Override",
	// Parts of a body cannot be masked, and parts of a secret not be found.
	"Range", "If-Range",
	"Expect", // the gateway has answered it
	"Sec-Websocket-Extensions",
	// Of the house's own traces, which are no business of a target's (W3C Trace
	// Context and Baggage).
	"Traceparent", "Tracestate", "Baggage",
	"X-Request-Target", "Max-Forwards", "Http2-Settings", "X-Amz-Security-Token", "X-Amz-Date", "X-Amz-Content-Sha256",
}

// families are the beginnings of more such names, in lower case.
var families = []string{"x-forwarded", "x-original-", "x-rewrite-"}

// scrub takes out of a step's headers what is not its to say.
func (x *exchange) scrub(h http.Header) {
	for name := range h {
		lower := strings.ToLower(name)
		// CGI and WSGI take _ for -: X_Api_Key would stand beside X-Api-Key.
		if strings.Contains(name, "_") || lower == x.v.shown || slices.ContainsFunc(families, func(f string) bool { return strings.HasPrefix(lower, f) }) {
			delete(h, name)
		}
	}
	for _, name := range theirs {
		h.Del(name)
	}
	if !x.upgrade {
		h.Del("Upgrade")
	}
	h.Set("Accept-Encoding", "identity")
}

// failed tells the step why there is no answer.
func (x *exchange) failed(_ http.ResponseWriter, _ *http.Request, err error) {
	x.note(err)
	why := x.why()
	var hidden withheld
	switch {
	case why == store.UseCut:
		x.problem(http.StatusUnauthorized, "unauthenticated", "the session has ended")
	case why == store.UseTimeout:
		x.problem(http.StatusGatewayTimeout, "internal", "the target took too long")
	case errors.As(err, &hidden):
		x.problem(http.StatusBadGateway, "internal", err.Error())
	case errors.Is(err, errElsewhere):
		x.problem(http.StatusBadGateway, "internal", err.Error())
	case errors.Is(err, gateway.ErrAddress):
		x.g.record(x.r, x.v.sess, gateway.Refusal{Use: x.use, Reason: gateway.ErrAddress.Error()})
		x.problem(http.StatusBadGateway, "internal", "the target's name leads to "+gateway.ErrAddress.Error())
	case errors.Is(err, errLarge):
		x.problem(http.StatusRequestEntityTooLarge, "body-too-large", err.Error())
	default:
		x.problem(http.StatusBadGateway, "internal", "the target could not be reached, hung up, or broke the protocol")
	}
}

// note keeps the first error that ends the exchange.
func (x *exchange) note(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.err == nil {
		x.err = err
	}
}

// why is the reason on record for what ended the exchange, or empty.
func (x *exchange) why() string {
	x.mu.Lock()
	err, changed, handed := x.err, x.conn != nil, x.handed
	x.mu.Unlock()
	cause := context.Cause(x.ctx)
	var hidden withheld
	switch {
	case handed && !changed: // a step that has its answer may hang up
		return ""
	case errors.Is(cause, gateway.ErrEnded):
		return store.UseCut
	case errors.As(err, &hidden):
		return store.UseWithheld
	case errors.Is(cause, errTimeout):
		return store.UseTimeout
	case err == nil && (changed || cause == nil): // either side may end a WebSocket
		return ""
	case cause != nil, errors.Is(err, errClient):
		return store.UseClient
	}
	return store.UseUpstream
}

// finish says on record what came of the request.
func (x *exchange) finish() {
	why := x.why()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.sum != nil && x.out.Sent > 0 {
		x.out.Digest = "sha256:" + hex.EncodeToString(x.sum.Sum(nil))
	}
	if x.out.Error = why; why != "" && x.err != nil {
		x.g.cfg.Log.Info("a request to a target came to nothing", zap.String("scope", x.v.sess.Grant.Scope), zap.String("reason", why))
	}
	sample := x.head
	if len(x.told) > 0 {
		sample += "\n\n" + x.v.quote(x.told, x.v.access.HTTP.Sample)
	}
	x.pending.Finish(x.out, strings.TrimLeft(sample, "\n"))
}

// cut ends the exchange. A step that does not send or read is not waited for;
// one that does is told.
func (x *exchange) cut(cause error) {
	x.cancel(cause)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		_ = x.conn.Close()
		return
	}
	if x.given {
		return
	}
	_ = x.rc.SetReadDeadline(time.Now())
	if errors.Is(cause, gateway.ErrEnded) {
		_ = x.rc.SetWriteDeadline(time.Now().Add(endWithin))
	}
}

// deadline gives the next write to the step its time.
func (x *exchange) deadline() {
	x.mu.Lock()
	defer x.mu.Unlock()
	d := x.g.cfg.Slow
	if x.v.sess.Context().Err() != nil {
		d = endWithin
	}
	_ = x.rc.SetWriteDeadline(time.Now().Add(d))
}

// written takes the deadline off: HTTP/2 ends a stream when it is over, though
// nothing is being written.
func (x *exchange) written() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.v.sess.Context().Err() == nil {
		_ = x.rc.SetWriteDeadline(time.Time{})
	}
}

func (x *exchange) problem(status int, slug, detail string) {
	x.deadline()
	gateway.Problem(x.w, status, slug, detail)
}

// watch calls back when nothing was touched for a while.
type watch struct {
	mu   sync.Mutex
	t    *time.Timer
	d    time.Duration
	over bool
}

func newWatch(d time.Duration, f func()) *watch { return &watch{t: time.AfterFunc(d, f), d: d} }

// touch begins the time anew.
func (w *watch) touch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.t.Reset(w.d)
	}
}

// set begins another time.
func (w *watch) set(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.d = d; !w.over {
		w.t.Reset(d)
	}
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	w.t.Stop()
}

// sending is the body on its way to the target.
type sending struct {
	x     *exchange
	first []byte // read already
	from  io.ReadCloser
	count bool
}

func (s *sending) Read(p []byte) (n int, err error) {
	if len(s.first) > 0 {
		n = copy(p, s.first)
		s.first = s.first[n:]
	} else {
		n, err = s.read(p)
		x := s.x
		if err != nil && err != io.EOF {
			x.note(errClient)
		}
	}
	if s.count {
		s.x.watch.touch()
		s.x.mu.Lock()
		s.x.out.Sent += int64(n)
		s.x.sum.Write(p[:n])
		s.x.mu.Unlock()
	}
	return n, err
}

func (s *sending) read(p []byte) (int, error) {
	x := s.x
	x.reading.Lock()
	defer x.reading.Unlock()
	x.mu.Lock()
	if x.ctx.Err() == nil && !x.over.Load() {
		_ = x.rc.SetReadDeadline(time.Now().Add(x.g.cfg.Slow))
	}
	x.mu.Unlock()
	if x.over.Load() {
		return 0, errClient
	}
	n, err := s.from.Read(p)
	x.had += int64(n)
	if err == io.EOF || x.r.ContentLength > 0 && x.had == x.r.ContentLength {
		x.arrived.Store(true)
	}
	x.mu.Lock()
	if x.ctx.Err() == nil && !x.over.Load() {
		_ = x.rc.SetReadDeadline(time.Time{})
	}
	x.mu.Unlock()
	return n, err
}

// Close leaves the step's own body to the server, which would otherwise wait
// for the rest of it here.
func (s *sending) Close() error {
	s.x.leave()
	return nil
}

// writer is the answer on its way to the step.
type writer struct{ x *exchange }

func (w *writer) Header() http.Header { return w.x.w.Header() }

// WriteHeader hands a status on, but for those that only inform (RFC 9110,
// section 15.2): their headers were not looked at.
func (w *writer) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		w.x.deadline()
		if w.x.r.ProtoMajor == 1 && w.x.r.ContentLength != 0 {
			if w.x.arrived.Load() {
				w.x.w.Header().Del("Connection")
			} else {
				w.x.w.Header().Set("Connection", "close") // see closing
			}
		}
		w.x.w.WriteHeader(status)
	}
}

func (w *writer) Write(p []byte) (int, error) {
	w.x.deadline()
	n, err := w.x.w.Write(p)
	w.x.written()
	w.x.got(p[:n])
	if err != nil {
		w.x.note(errClient)
	}
	return n, err
}

func (w *writer) FlushError() error {
	w.x.deadline()
	err := w.x.rc.Flush()
	w.x.written()
	return err
}

// Hijack hands the connection over to an upgrade.
func (w *writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	x := w.x
	c, brw, err := x.rc.Hijack()
	if err != nil {
		return nil, nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	_ = c.SetDeadline(time.Time{})
	x.conn = &upgraded{Conn: c, x: x}
	if x.ctx.Err() != nil {
		_ = c.Close()
	}
	return x.conn, brw, nil
}

// got counts what the step got, and keeps the beginning where it is recorded.
func (x *exchange) got(p []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.Received += int64(len(p))
	if n := min(x.v.access.HTTP.Sample, maxExcerpt) - len(x.told); n > 0 && !x.upgrade {
		x.told = append(x.told, p[:min(n, len(p))]...)
	}
}

// hasToken reports whether a list of a header holds a token (RFC 9110, section
// 5.6.1).
func hasToken(values []string, token string) bool {
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

// sample is what the record says of the beginning of a body of the step's.
func (v *view) sample(first []byte, whole bool, n int, h http.Header) string {
	cut := len(first) > n
	if v.masker != nil {
		t, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
		switch {
		case whole && isJSON(t):
			out, _, err := v.masker.JSON(first)
			if err != nil {
				return "(a body that cannot be masked)"
			}
			first = out
		case v.named:
			return "(a body that cannot be masked)"
		default:
			first, _ = v.masker.Text(first)
		}
	}
	s := v.quote(first, n)
	if cut || !whole {
		s += "…"
	}
	return s
}

// quote is at most n bytes of b, as the record can hold them.
func (v *view) quote(b []byte, n int) string {
	n = min(n, maxExcerpt)
	if bytes.IndexByte(b, 0) >= 0 || !utf8.Valid(b[:whole(b)]) {
		return fmt.Sprintf("(%s bytes that are no text)", strconv.Itoa(len(b)))
	}
	s, _ := v.secrets.text(string(b[:whole(b)]))
	return start(s, n)
}

// whole is the length of b without a character that is cut off.
func whole(b []byte) int {
	for i := len(b) - 1; i >= 0 && i >= len(b)-utf8.UTFMax; i-- {
		if utf8.RuneStart(b[i]) {
			if !utf8.FullRune(b[i:]) {
				return i
			}
			break
		}
	}
	return len(b)
}
