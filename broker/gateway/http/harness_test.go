package http

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The secret that targets want, and that no step may see.
const apiKey = "key/8d41c7+real&more"

// path is the whole way: a step's token, the gateway, and a target behind it.
type path struct {
	t       testing.TB
	rec     *gatewaytest.Recorder
	core    *gateway.Gateway
	g       *Gateway
	url     string // of the gateway
	front   *httptest.Server
	target  *httptest.Server
	sess    *gateway.Session
	token   string
	params  gateway.Params
	reached atomic.Int64
	client  *http.Client
}

type option struct {
	tls    bool // of the target, with HTTP/2
	config func(*Config)
	core   func(*gateway.Config)
	base   string // path of the upstream
	secret string // JSON
}

func open(methods ...string) *store.HTTPAccess {
	if len(methods) == 0 {
		methods = []string{"GET", "POST", "PUT", "DELETE"}
	}
	return &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: methods, Paths: []string{"/*"}}}}
}

func fields(names ...string) (m store.Masking) {
	for _, n := range names {
		m.Rules = append(m.Rules, store.MaskRule{Field: n})
	}
	return m
}

func detects(names ...string) (m store.Masking) {
	for _, n := range names {
		m.Rules = append(m.Rules, store.MaskRule{Detector: n})
	}
	return m
}

// newPath puts the gateway before a target. Each request that reaches it must
// be on record by then, and must show the real key and nothing of the step's.
func newPath(t testing.TB, target http.Handler, access *store.Access, o option) *path {
	t.Helper()
	p := &path{t: t, rec: gatewaytest.New(t)}
	p.target = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := p.reached.Add(1)
		if got := p.rec.Count(); got < int(n) {
			t.Errorf("request %d reached the target with %d uses on record", n, got)
		}
		for name, values := range r.Header {
			if v := strings.Join(values, " "); strings.Contains(v, p.token) || name == "Dpop" || name == "Proxy-Authorization" {
				t.Errorf("the target was shown %s", name)
			}
		}
		target.ServeHTTP(w, r)
	}))
	name := "http://target.internal"
	var targets *trust.Trust
	if o.tls {
		p.target.EnableHTTP2 = true
		p.target.StartTLS()
		targets = trusttest.Trust(t, p.target.Certificate())
		name = "https://example.com" // what httptest's certificate is for
	} else {
		p.target.Start()
	}
	host := name[strings.LastIndexByte(name, '/')+1:]
	p.front = httptest.NewUnstartedServer(nil)
	p.url = "http://" + p.front.Listener.Addr().String()
	cc := gateway.Config{Recorder: p.rec, TrustDomain: "countersign.test", Addresses: map[string]string{store.ProtocolHTTP: p.url, store.ProtocolMCP: p.url},
		Upstreams: map[string]string{host: p.target.Listener.Addr().String()}, Targets: targets}
	if o.core != nil {
		o.core(&cc)
	}
	p.core = gateway.New(cc)
	c := Config{Gateway: p.core, URL: p.url}
	if o.config != nil {
		o.config(&c)
	}
	g, err := New(c)
	ok(t, err)
	p.g = g
	p.front.Config.Handler = g
	p.front.Config.Protocols = new(http.Protocols)
	p.front.Config.Protocols.SetHTTP1(true)
	p.front.Config.Protocols.SetUnencryptedHTTP2(true)
	p.front.Start()
	if access.Protocol == "" {
		access.Protocol = store.ProtocolHTTP
	}
	if access.Upstream == "" {
		access.Upstream = name + o.base
	}
	if access.HTTP == nil {
		access.HTTP = open()
	}
	if access.Inject == nil {
		access.Inject = &store.Inject{In: "header", Name: "X-Api-Key", Value: "{{key}}"}
	}
	if o.secret == "" {
		o.secret = `{"key":"` + apiKey + `"}`
	}
	p.params = gateway.Params{
		Story: &store.Entry{Agent: "spiffe://countersign.test/orchestrator/demo/run/run-1/step/step-1", Orchestrator: "demo", Run: "run-1", Step: "step-1",
			Request: "req_1", Resource: "http://target.internal", Action: "orders-http:read",
			Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:" + strings.Repeat("0", 64), Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}},
		Intent: store.NewID(), Grant: store.Grant{Scope: "orders-http:read", Delivery: "gateway", Access: access},
		Secret: &issuer.Credential{Kind: issuer.KindPath, Data: []byte(o.secret)}, Expires: time.Now().Add(time.Hour),
	}
	p.sess, p.token, err = p.core.Open(p.params)
	ok(t, err)
	transport := &http.Transport{DisableCompression: true}
	p.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		p.core.Close()
		transport.CloseIdleConnections()
		p.g.transport.CloseIdleConnections()
		p.target.CloseClientConnections()
		p.front.CloseClientConnections()
		p.front.Close()
		p.target.Close()
	})
	return p
}

// answer is all that a client got.
type answer struct {
	status  int
	header  http.Header
	trailer http.Header
	body    string
	err     error
}

// bytes is every byte of it.
func (a *answer) bytes() string {
	var b bytes.Buffer
	_ = a.header.Write(&b)
	_ = a.trailer.Write(&b)
	b.WriteString(a.body)
	return b.String()
}

func (p *path) do(method, target string, body io.Reader, headers ...string) *answer {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, p.url+target, body)
	ok(p.t, err)
	req.Header.Set("Authorization", "Bearer "+p.token)
	for i := 0; i < len(headers); i += 2 {
		req.Header[headers[i]] = append(req.Header[headers[i]], headers[i+1])
	}
	return p.send(req)
}

func (p *path) send(req *http.Request) *answer {
	p.t.Helper()
	res, err := p.client.Do(req)
	if err != nil {
		return &answer{err: err}
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return &answer{status: res.StatusCode, header: res.Header, trailer: res.Trailer, body: string(b), err: err}
}

func (p *path) get(target string, headers ...string) *answer {
	p.t.Helper()
	return p.do("GET", target, nil, headers...)
}

func (p *path) refused(reason string) bool {
	return slices.ContainsFunc(p.rec.Refusals(), func(f gatewaytest.Refusal) bool { return f.Reason == reason })
}

// trusting is a client that goes through the forward proxy.
func trusting(pem []byte) *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// newTestView is a view of rules alone.
func newTestView(m store.Masking) (*view, error) {
	masker, err := masking.New(m)
	v := &view{masker: masker, access: &store.Access{HTTP: &store.HTTPAccess{}}}
	for _, r := range m.Rules {
		v.named = v.named || r.Detector == ""
	}
	return v, err
}
