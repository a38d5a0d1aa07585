package http_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	gatewayhttp "github.com/countersign-dev/countersign/broker/gateway/http"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

// The secret that targets want. It has characters that JSON, HTML and URLs each
// write in their own way.
const outsideKey = `k3y/<&"+-real-0123456789`

// lane is a step's whole way to a target.
type lane struct {
	t     testing.TB
	rec   *gatewaytest.Recorder
	core  *gateway.Gateway
	sess  *gateway.Session
	token string
	addr  string // of the gateway
	gate  *gatewayhttp.Gateway
}

// newLane puts a gateway before target, which speaks HTTP at an address.
func newLane(t testing.TB, target string, a store.Access, change func(*gatewayhttp.Config)) *lane {
	t.Helper()
	l := &lane{t: t, rec: gatewaytest.New(t)}
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.addr = front.Addr().String()
	l.core = gateway.New(gateway.Config{Recorder: l.rec, TrustDomain: "countersign.test", Addresses: map[string]string{store.ProtocolHTTP: "http://" + l.addr},
		Upstreams: map[string]string{"target.test": target}})
	c := gatewayhttp.Config{Gateway: l.core, URL: "http://" + l.addr, CADir: t.TempDir()}
	if change != nil {
		change(&c)
	}
	if l.gate, err = gatewayhttp.New(c); err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: l.gate, Protocols: protocols, ErrorLog: log.New(complaints{t}, "", 0), ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 64 << 10}
	go func() { _ = server.Serve(front) }()
	a.Protocol = store.ProtocolHTTP
	if a.Upstream == "" {
		a.Upstream = "http://target.test"
	}
	if a.Inject == nil {
		a.Inject = &store.Inject{In: "header", Name: "X-Api-Key", Value: "{{key}}"}
	}
	if a.HTTP == nil {
		a.HTTP = &store.HTTPAccess{}
	}
	if a.HTTP.Routes == nil {
		a.HTTP.Routes = []store.HTTPRoute{{Methods: []string{"GET", "POST"}, Paths: []string{"/*"}}}
	}
	l.sess, l.token, err = l.core.Open(gateway.Params{
		Story: &store.Entry{Agent: "spiffe://countersign.test/orchestrator/demo/run/run-1/step/step-1", Orchestrator: "demo", Run: "run-1", Step: "step-1",
			Request: "req_1", Resource: "http://target.test", Action: "http:demo",
			Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:" + strings.Repeat("0", 64), Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}},
		Intent: store.NewID(), Grant: store.Grant{Scope: "http:demo", Delivery: "gateway", Access: &a},
		Secret:  &issuer.Credential{Kind: issuer.KindPath, Data: fmt.Appendf(nil, `{"data":{"key":%q},"metadata":{"version":1}}`, outsideKey)},
		Expires: time.Now().Add(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.core.Close(); _ = server.Close() })
	return l
}

// complaints are what a server logs, among which is no panic.
type complaints struct{ t testing.TB }

func (c complaints) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("panic")) {
		c.t.Errorf("the server logs: %s", p)
	}
	return len(p), nil
}

func (l *lane) request(method, path string, body io.Reader) *http.Request {
	l.t.Helper()
	r, err := http.NewRequest(method, "http://"+l.addr+path, body)
	if err != nil {
		l.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+l.token)
	return r
}

// raw sends bytes as they are on a connection of its own, and returns the
// answers to so many requests and what comes right after them.
func (l *lane) raw(text string, answers int) string {
	l.t.Helper()
	c, err := net.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, strings.ReplaceAll(text, "TOKEN", l.token)); err != nil {
		l.t.Fatal(err)
	}
	var all bytes.Buffer
	br := bufio.NewReader(io.TeeReader(c, &all))
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for range answers {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			break // closed by the other side
		}
		_, _ = io.Copy(io.Discard, res.Body)
	}
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	_, _ = io.Copy(io.Discard, br) // a deadline is how a silent one ends
	return all.String()
}

// listen serves a target that speaks by hand.
func listen(t testing.TB, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); serve(c) }()
		}
	}()
	return l.Addr().String()
}

func target(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	p := new(http.Protocols)
	p.SetHTTP1(true)
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = p
	s.Start()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return strings.TrimPrefix(s.URL, "http://")
}

// tapped is a client whose every byte from the gateway is kept.
type tapped struct {
	http.Client
	mu  sync.Mutex
	got bytes.Buffer
}

type tappedConn struct {
	net.Conn
	to *tapped
}

func (c tappedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.to.mu.Lock()
	c.to.got.Write(p[:n])
	c.to.mu.Unlock()
	return n, err
}

func newTapped(t testing.TB) *tapped {
	c := &tapped{}
	tr := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		return tappedConn{conn, c}, err
	}}
	c.Transport = tr
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c.Timeout = 20 * time.Second
	t.Cleanup(tr.CloseIdleConnections)
	return c
}

func (c *tapped) take() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.got.String()
	c.got.Reset()
	return s
}

// shows are forms in which a text would give the secret away.
func shows(secret string) []string {
	return []string{secret, url.QueryEscape(secret), url.PathEscape(secret), hex.EncodeToString([]byte(secret)),
		strings.NewReplacer("<", `\u003c`, "&", `\u0026`, `"`, `\"`).Replace(secret),
		base64.StdEncoding.EncodeToString([]byte(secret)), base64.URLEncoding.EncodeToString([]byte(secret))}
}

func TestNoByteThatAStepGetsHoldsAMaskedValueOrTheSecret(t *testing.T) {
	t.Parallel()
	const rounds = 400
	var (
		mu     sync.Mutex
		rng    = rand.New(rand.NewPCG(1, 2))
		hidden []string
	)
	upstream := target(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		email := fmt.Sprintf("user%d@example%d.com", rng.IntN(1e6), rng.IntN(1e6))
		name := fmt.Sprintf("Zyx-%d-Name", rng.IntN(1e9))
		forms := shows(outsideKey)
		shown := forms[rng.IntN(len(forms))]
		hidden = []string{email, name}
		quoted := strings.ReplaceAll(shown, `"`, `\"`)
		if strings.Contains(shown, `\`) {
			quoted = shown // escaped already
		}
		doc := fmt.Sprintf(`{"customer":{"name":%q,"NAME":[%q]},"note":"write to %s","nested":"{\"name\":\"%s\"}","echo":"%s"}`, name, name, email, name, quoted)
		var body string
		kind := []string{"application/json", "application/problem+json", "application/x-ndjson", "text/event-stream", "text/plain", "text/html", "application/octet-stream", "application/xml", ""}[rng.IntN(9)]
		switch kind {
		case "application/x-ndjson":
			body = doc + "\n" + doc + "\n"
		case "text/event-stream":
			body = "id: " + email + "\nevent: x\ndata: " + doc + "\n\n: " + shown + "\n\ndata: " + name + "\n\n"
		default:
			body = doc
		}
		h := w.Header()
		h["Content-Type"] = []string{kind}
		h.Set("X-Note", "for "+email)
		h.Set("X-Echo", shown)
		h.Set("Etag", `"`+email+`"`)
		h.Set("Set-Cookie", "session="+name)
		h.Set("Location", "/next?key="+url.QueryEscape(outsideKey)+"&mail="+url.QueryEscape(email))
		h.Set("Trailer", "X-Late")
		var z io.Writer = w
		if rng.IntN(3) == 0 {
			h.Set("Content-Encoding", []string{"gzip", "br", "gzip, gzip"}[rng.IntN(3)])
			if h.Get("Content-Encoding") == "gzip" {
				g := gzip.NewWriter(w)
				defer g.Close()
				z = g
			}
		}
		w.WriteHeader([]int{200, 201, 302, 400, 404, 500}[rng.IntN(6)])
		for len(body) > 0 { // secrets and values lie across the borders of what is written
			n := min(len(body), 1+rng.IntN(60))
			_, _ = io.WriteString(z, body[:n])
			_ = http.NewResponseController(w).Flush()
			body = body[n:]
		}
		h.Set("X-Late", email+" "+shown)
	})
	for _, rules := range [][]store.MaskRule{{{Field: "name"}, {Detector: "email"}}, {{Detector: "email"}, {Field: "echo"}, {Path: "$..name"}, {Field: "nested"}, {Field: "name"}}} {
		l := newLane(t, upstream, store.Access{Masking: store.Masking{Rules: rules}, HTTP: &store.HTTPAccess{Sample: 300, ResponseHeaders: []string{"X-Note", "X-Echo"}}}, nil)
		c := newTapped(t)
		for range rounds / 2 {
			res, err := c.Do(l.request("GET", "/customers", nil))
			if err == nil {
				_, _ = io.Copy(io.Discard, res.Body) // cut short where it could not be masked
				res.Body.Close()
			}
			got := c.take()
			mu.Lock()
			for _, v := range append(slices.Clone(hidden), shows(outsideKey)...) {
				if strings.Contains(got, v) {
					t.Fatalf("%q is in what the step got:\n%s", v, got)
				}
			}
			mu.Unlock()
		}
		gatewaytest.Until(t, "all outcomes", func() bool { return len(l.rec.Outcomes()) == rounds/2 })
		for _, s := range l.rec.Last(math.MaxInt) {
			b, _ := s.Marshal()
			if sample := s.Openings[store.SealedSample].Text; strings.Contains(string(b), outsideKey) || strings.Contains(sample, "@example") || strings.Contains(sample, "Zyx-") {
				t.Fatalf("the record holds what is to be hidden: %s", sample)
			}
		}
	}
}

func TestWithoutMaskingTheSecretIsHiddenAndAllElseArrives(t *testing.T) {
	t.Parallel()
	forms := shows(outsideKey)
	upstream := target(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Api-Key") != outsideKey {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		for i, f := range forms {
			for _, part := range []string{"before", f[:i+1], f[i+1:], "after", f[:len(f)/2]} {
				_, _ = io.WriteString(w, part)
				_ = http.NewResponseController(w).Flush()
			}
		}
	})
	l := newLane(t, upstream, store.Access{}, nil)
	c := newTapped(t)
	res, err := c.Do(l.request("GET", "/x", nil))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		t.Fatal(err, res.Status)
	}
	for _, f := range forms {
		if strings.Contains(string(b), f) {
			t.Errorf("%q is in %q", f, b)
		}
	}
	if strings.Count(string(b), "before") != len(forms) || strings.Count(string(b), "after") != len(forms) || !strings.HasSuffix(string(b), forms[len(forms)-1][:len(forms[len(forms)-1])/2]) {
		t.Errorf("what was no secret is gone: %q", b)
	}
}

func TestEveryRequestThatReachesTheTargetWasOnRecordBefore(t *testing.T) {
	t.Parallel()
	var l *lane
	var reached atomic.Int64
	upstream := listen(t, func(c net.Conn) {
		br := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, r.Body)
			if n := reached.Add(1); l.rec.Count() < int(n) {
				t.Errorf("request %d (%s) was not on record when it arrived", n, r.RequestURI)
			}
			for _, name := range []string{"Authorization", "Dpop", "Proxy-Authorization", "Cookie", "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Http-Method-Override", "Range"} {
				if v := r.Header.Get(name); v != "" {
					t.Errorf("the target got %s: %s", name, v)
				}
			}
			if got := r.Header.Values("X-Api-Key"); len(got) != 1 || got[0] != outsideKey || r.Header.Get("X_Api_Key") != "" {
				t.Errorf("the key that arrived: %q", got)
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	l = newLane(t, upstream, store.Access{HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"GET", "POST"}, Paths: []string{"/a/*"}}}}}, nil)
	head := "Host: gateway\r\nAuthorization: Bearer TOKEN\r\n"
	for _, c := range []struct {
		name, text   string
		reach, least int64 // requests that reach the target
	}{
		{"plain", "GET /a/b HTTP/1.1\r\n" + head + "\r\n", 1, 1},
		{"headers of others", "GET /a/b HTTP/1.1\r\n" + head + "Connection: X-Api-Key, close\r\nX-Api-Key: mine\r\nX_Api_Key: mine\r\nx-api-key: too\r\nCookie: a=b\r\nVia: 1.1 x\r\nForwarded: for=1.1.1.1\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-Host: evil\r\nX-HTTP-Method-Override: DELETE\r\nRange: bytes=0-1\r\nDPoP: x\r\nProxy-Authorization: Basic eDp5\r\n\r\n", 1, 1},
		{"length and chunks", "POST /a/b HTTP/1.1\r\n" + head + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /admin HTTP/1.1\r\n" + head + "\r\n", 1, 0},
		{"two lengths", "POST /a/b HTTP/1.1\r\n" + head + "Content-Length: 0\r\nContent-Length: 40\r\n\r\nGET /admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"chunked twice", "POST /a/b HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 0, 0},
		{"obscured chunked", "POST /a/b HTTP/1.1\r\n" + head + "Transfer-Encoding: xchunked\r\nContent-Length: 3\r\n\r\nabc", 0, 0},
		{"space before the colon", "POST /a/b HTTP/1.1\r\n" + head + "Content-Length : 3\r\n\r\nabc", 0, 0},
		{"folded", "GET /a/b HTTP/1.1\r\n" + head + "X-A: 1\r\n Transfer-Encoding: chunked\r\n\r\n", 1, 0},
		{"pipelined", "GET /a/1 HTTP/1.1\r\n" + head + "\r\nGET /admin HTTP/1.1\r\n" + head + "\r\nGET /a/2 HTTP/1.1\r\n" + head + "\r\n", 2, 2},
		{"two hosts", "GET /a/b HTTP/1.1\r\nHost: x\r\n" + head + "\r\n", 0, 0},
		{"two tokens", "GET /a/b HTTP/1.1\r\n" + head + "Authorization: Bearer other\r\n\r\n", 0, 0},
		{"dots", "GET /a/../admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"encoded dots", "GET /a/%2e%2e/admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"encoded slash", "GET /a/x%2f..%2fadmin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"twice encoded", "GET /a/%252e%252e HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"backslash", "GET /a/..\\admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"two slashes", "GET //admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"parameters", "GET /a/..;x/admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"overlong UTF-8", "GET /a/%c0%ae%c0%ae HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"NUL", "GET /a/b%00 HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"fragment", "GET /a/b#/../admin HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"another method", "DELETE /a/b HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"TRACE", "TRACE /a/b HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"CONNECT elsewhere", "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\nProxy-Authorization: Bearer TOKEN\r\n\r\n", 0, 0},
		{"absolute elsewhere", "GET http://evil.test/a/b HTTP/1.1\r\nHost: evil.test\r\nProxy-Authorization: Bearer TOKEN\r\n\r\n", 0, 0},
		{"metadata", "GET http://169.254.169.254/a/b HTTP/1.1\r\nHost: 169.254.169.254\r\nProxy-Authorization: Bearer TOKEN\r\n\r\n", 0, 0},
		{"absolute, to the target", "GET http://target.test/a/b HTTP/1.1\r\nHost: target.test\r\nProxy-Authorization: Bearer TOKEN\r\n\r\n", 1, 1},
		{"asterisk", "OPTIONS * HTTP/1.1\r\n" + head + "\r\n", 0, 0},
		{"WebSocket", "GET /a/b HTTP/1.1\r\n" + head + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Helper()
			before := reached.Load()
			got := l.raw(c.text, max(1, strings.Count(c.text, "/1.1\r\n")))
			if n := reached.Load() - before; n > c.reach || n < c.least {
				t.Errorf("%d requests reached the target:\n%s", n, got)
			}
			if strings.Contains(got, "k3y") {
				t.Errorf("the step got the key: %s", got)
			}
		})
	}
	if n := reached.Load(); int(n) != l.rec.Count() {
		t.Errorf("%d requests arrived, %d are on record", n, l.rec.Count())
	}
	l.rec.Down(true)
	before := reached.Load()
	if got := l.raw("GET /a/b HTTP/1.1\r\n"+head+"\r\n", 1); !strings.Contains(got, " 503 ") || !strings.Contains(got, "ledger-unavailable") || reached.Load() != before {
		t.Errorf("without a recorder: %s", got)
	}
	l.rec.Down(false) // what is still to be recorded is waited for
}

func TestATargetThatMisbehavesEndsTheRequestAndNothingElse(t *testing.T) {
	masked := store.Masking{Rules: []store.MaskRule{{Field: "name"}, {Detector: "email"}}}
	for _, c := range []struct {
		name, answer string
		hang         bool
		plainOK      bool // without masking the step may see part of it
		fine         bool // without masking nothing is wrong with it
	}{
		{name: "hangs up at once"},
		{name: "says nothing", hang: true},
		{name: "half a status line", answer: "HTTP/1.1 2", hang: true},
		{name: "no HTTP", answer: "SSH-2.0-OpenSSH_9\r\n\r\n"},
		{name: "too short", answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"name\":\"Zyx", plainOK: true},
		{name: "stops midway", answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"name\":\"Zyx", hang: true, plainOK: true},
		{name: "a broken chunk", answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"nam\r\nZZ\r\nZyx", plainOK: true},
		{name: "no gzip", answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nZyx", plainOK: true},
		{name: "two lengths", answer: "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nZyxab"},
		{name: "another protocol", answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nZyx", hang: true},
		{name: "a huge head", answer: "HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("Zyx", 64<<10) + "\r\n\r\n"},
		{name: "hints with the key", answer: "HTTP/1.1 103 Early Hints\r\nLink: <" + outsideKey + ">\r\nX-Name: Zyx\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"},
		{name: "JSON that is none", answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{\"name\": Zyx", plainOK: true, fine: true},
		{name: "redirects elsewhere", answer: "HTTP/1.1 302 Found\r\nLocation: http://evil.test/Zyx\r\nContent-Length: 0\r\n\r\n"},
		{name: "redirects by scheme", answer: "HTTP/1.1 307 No\r\nLocation: //evil.test/Zyx\r\nContent-Length: 0\r\n\r\n"},
		{name: "redirects to a port", answer: "HTTP/1.1 308 No\r\nLocation: http://target.test:81/Zyx\r\nContent-Length: 0\r\n\r\n"},
		{name: "redirects to a user", answer: "HTTP/1.1 301 No\r\nLocation: http://target.test@evil.test/Zyx\r\nContent-Length: 0\r\n\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			upstream := listen(t, func(conn net.Conn) {
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
					return
				}
				_, _ = io.WriteString(conn, c.answer)
				if c.hang {
					_, _ = io.Copy(io.Discard, conn)
				}
			})
			for _, m := range []store.Masking{{}, masked} {
				l := newLane(t, upstream, store.Access{Masking: m, HTTP: &store.HTTPAccess{Timeout: store.Duration(100 * time.Millisecond)}}, func(c *gatewayhttp.Config) { c.Idle = 100 * time.Millisecond })
				client := newTapped(t)
				res, err := client.Do(l.request("POST", "/x", strings.NewReader("body")))
				if err == nil {
					_, err = io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
				got := client.take()
				if strings.Contains(got, "k3y") || (!c.plainOK || len(m.Rules) > 0) && strings.Contains(got, "Zyx") {
					t.Errorf("the step got %q", got)
				}
				fine := c.fine && len(m.Rules) == 0
				if err == nil && res.StatusCode < 300 && !fine {
					t.Errorf("all is said to be well: %s", got)
				}
				gatewaytest.Until(t, "its outcome", func() bool { return len(l.rec.Outcomes()) == 1 })
				if o := l.rec.Uses()[0].Outcome; o.Error == "" && o.Status != "500" && !fine {
					t.Errorf("on record: %+v", o)
				}
			}
		})
	}
}

func TestAStreamMayBeSilentForLongerThanAWriteMayTake(t *testing.T) {
	upstream := target(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 2 {
			fmt.Fprintf(w, "data: {\"n\":%d}\n\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-time.After(250 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
	})
	for name, masking := range map[string]store.Masking{"plain": {}, "masked": {Rules: []store.MaskRule{{Field: "name"}}}} {
		for _, h2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, h2 %v", name, h2), func(t *testing.T) {
				t.Parallel()
				l := newLane(t, upstream, store.Access{Masking: masking}, func(c *gatewayhttp.Config) { c.Slow = 150 * time.Millisecond })
				p := new(http.Protocols)
				p.SetHTTP1(!h2)
				p.SetUnencryptedHTTP2(h2)
				tr := &http.Transport{Protocols: p}
				defer tr.CloseIdleConnections()
				res, err := tr.RoundTrip(l.request("GET", "/events", nil))
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(res.Body)
				if err != nil || strings.Count(string(b), "data:") != 2 {
					t.Errorf("%v after %q", err, b)
				}
			})
		}
	}
}

func TestTheEndOfASessionCutsWhatIsOpenWithinASecond(t *testing.T) {
	upstream := target(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/upgrade":
			c, b, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x05hello")
			_, _ = io.Copy(io.Discard, b)
		case "/flood":
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		case "/upload":
			_, _ = io.Copy(io.Discard, r.Body)
		default:
			w.WriteHeader(200)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	})
	for name, text := range map[string]string{
		"stream":  "GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer TOKEN\r\n\r\n",
		"flood":   "GET /flood HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer TOKEN\r\n\r\n",
		"upload":  "POST /upload HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\nAuthorization: Bearer TOKEN\r\n\r\nabc",
		"upgrade": "GET /upgrade HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer TOKEN\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLane(t, upstream, store.Access{HTTP: &store.HTTPAccess{Upgrade: true}}, nil)
			c, err := net.Dial("tcp", l.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, strings.ReplaceAll(text, "TOKEN", l.token))
			br := bufio.NewReader(c)
			if name == "upgrade" {
				want := "hello"
				got := make([]byte, 4096)
				n := 0
				for !strings.HasSuffix(string(got[:n]), want) {
					m, err := br.Read(got[n:])
					if err != nil {
						t.Fatal(err, string(got[:n]))
					}
					n += m
				}
			}
			gatewaytest.Until(t, "its record", func() bool { return l.rec.Count() == 1 })
			if name == "flood" { // a step that does not read
				time.Sleep(100 * time.Millisecond)
			}
			began := time.Now()
			l.sess.Close()
			gatewaytest.Until(t, "its outcome", func() bool { return len(l.rec.Outcomes()) == 1 })
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = io.Copy(io.Discard, br)
			if took := time.Since(began); took > time.Second {
				t.Errorf("cut after %v: %v", took, err)
			}
			if o := l.rec.Uses()[0].Outcome; o.Error != store.UseCut {
				t.Errorf("on record: %+v", o)
			}
		})
	}
}

func TestWhatIsLeftOfABodyIsNeverTakenForARequest(t *testing.T) {
	var reached atomic.Int64
	upstream := listen(t, func(c net.Conn) {
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			reached.Add(1)
			_ = r.Body.Close()
			_, _ = io.WriteString(c, map[bool]string{true: "HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n"}[r.URL.Path == "/early"])
			_, _ = io.Copy(io.Discard, c)
		}
	})
	for _, path := range []string{"/hangs", "/early", "/refused/../x"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			l := newLane(t, upstream, store.Access{HTTP: &store.HTTPAccess{Timeout: store.Duration(200 * time.Millisecond)}}, nil)
			inner := strings.ReplaceAll("GET /inner HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer TOKEN\r\n\r\n", "TOKEN", l.token)
			c, err := net.Dial("tcp", l.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\nabc", path, l.token, 3+len(inner))
			br := bufio.NewReader(c)
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			res, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, res.Body)
			gatewaytest.Until(t, "its outcome", func() bool { return len(l.rec.Outcomes()) == l.rec.Count() })
			time.Sleep(20 * time.Millisecond) // the server has turned to the next request, if it means to
			before := l.rec.Count()
			_, _ = io.WriteString(c, inner)
			_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if next, err := http.ReadResponse(br, nil); err == nil {
				t.Errorf("a second answer: %s", next.Status)
			}
			if n := l.rec.Count(); n != before {
				t.Errorf("%d requests are on record", n)
			}
		})
	}
}
