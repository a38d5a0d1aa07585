package mcp

import (
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The secret that the server wants, and that no step may see.
const apiKey = "key-8d41c7-real"

// path is the whole way: a step's token, the gateway, and a server behind it.
type path struct {
	t      testing.TB
	rec    *gatewaytest.Recorder
	core   *gateway.Gateway
	url    string // of the gateway
	sess   *gateway.Session
	token  string
	params gateway.Params
	server *httptest.Server
}

// newPath puts the gateway before upstream, which a test may serve by the SDK
// or by hand. Only requests with the real key get through to it.
func newPath(t testing.TB, upstream http.Handler, access *store.Access, change ...func(*Config)) *path {
	t.Helper()
	p := &path{t: t, rec: gatewaytest.New(t)}
	p.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Api-Key") != apiKey || r.Header.Get("Authorization") != "" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		upstream.ServeHTTP(w, r)
	}))
	p.core = gateway.New(gateway.Config{Recorder: p.rec, TrustDomain: "countersign.test", Addresses: map[string]string{store.ProtocolMCP: "http://gateway.test", store.ProtocolHTTP: "http://gateway.test"},
		// The SDK's server answers to loopback names alone, so the catalogue's name is one.
		Upstreams: map[string]string{"localhost": strings.TrimPrefix(p.server.URL, "http://")}})
	c := Config{Gateway: p.core}
	for _, f := range change {
		f(&c)
	}
	front := httptest.NewServer(New(c))
	p.url = front.URL
	access.Protocol, access.Upstream = store.ProtocolMCP, "http://localhost:1/mcp"
	access.Inject = &store.Inject{In: "header", Name: "X-Api-Key", Value: "{{key}}"}
	p.params = gateway.Params{
		Story: &store.Entry{Agent: "spiffe://countersign.test/orchestrator/demo/run/run-1/step/step-1", Orchestrator: "demo", Run: "run-1", Step: "step-1",
			Request: "req_1", Resource: "mcp:orders", Action: "orders-mcp:read",
			Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:" + strings.Repeat("0", 64), Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}},
		Intent: store.NewID(), Grant: store.Grant{Scope: "orders-mcp:read", Delivery: "gateway", Access: access},
		Secret: &issuer.Credential{Kind: issuer.KindPath, Data: []byte(`{"key":"` + apiKey + `"}`)}, Expires: time.Now().Add(time.Hour),
	}
	p.sess, p.token = p.open(p.params)
	t.Cleanup(func() {
		p.core.Close()
		p.server.CloseClientConnections()
		front.CloseClientConnections()
		front.Close()
		p.server.Close()
	})
	return p
}

func (p *path) open(params gateway.Params) (*gateway.Session, string) {
	p.t.Helper()
	s, token, err := p.core.Open(params)
	ok(p.t, err)
	return s, token
}

func (p *path) used(use string) bool {
	return slices.ContainsFunc(p.rec.Uses(), func(u gatewaytest.Use) bool { return u.Use == use })
}

func (p *path) refused(route string) bool {
	return slices.ContainsFunc(p.rec.Refusals(), func(f gatewaytest.Refusal) bool { return f.Route == route })
}

// bearer shows a session's token on each request, and counts what comes back.
type bearer struct {
	token string
	mu    sync.Mutex
	got   []byte
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	res, err := http.DefaultTransport.RoundTrip(r)
	if err == nil {
		res.Body = &tap{ReadCloser: res.Body, b: b}
	}
	return res, err
}

// seen is all that the client was sent.
func (b *bearer) seen() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.got)
}

type tap struct {
	io.ReadCloser
	b *bearer
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	t.b.mu.Lock()
	t.b.got = append(t.b.got, p[:n]...)
	t.b.mu.Unlock()
	return n, err
}

// connect is an SDK client through the gateway.
func (p *path) connect(version string, opts *sdk.ClientOptions) (*sdk.ClientSession, *bearer) {
	p.t.Helper()
	b := &bearer{token: p.token}
	c := sdk.NewClient(&sdk.Implementation{Name: "step", Version: "1"}, opts)
	s, err := c.Connect(p.t.Context(), &sdk.StreamableClientTransport{Endpoint: p.url, HTTPClient: &http.Client{Transport: b}}, &sdk.ClientSessionOptions{ProtocolVersion: version})
	ok(p.t, err)
	p.t.Cleanup(func() { _ = s.Close() })
	return s, b
}

// text is the text of a result's first content.
func text(t testing.TB, r *sdk.CallToolResult) string {
	t.Helper()
	if len(r.Content) == 0 {
		t.Fatal("a result without content")
	}
	c, isText := r.Content[0].(*sdk.TextContent)
	if !isText {
		t.Fatalf("%T", r.Content[0])
	}
	return c.Text
}
