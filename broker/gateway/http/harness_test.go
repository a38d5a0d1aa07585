package http

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

// recorder keeps what it is given, as the recorder would take it.
type recorder struct {
	t    testing.TB
	mu   sync.Mutex
	subs []*store.Submission
	n    int64 // of credential.used
	down bool
}

func (r *recorder) Append(_ context.Context, subs ...*store.Submission) (*store.Appended, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		return nil, fmt.Errorf("%w: connection refused", store.ErrUnavailable)
	}
	for _, s := range subs {
		b, err := s.Marshal()
		if err == nil {
			_, err = store.ParseSubmission(b)
		}
		if err != nil {
			r.t.Errorf("what the recorder refuses: %v", err)
			return nil, fmt.Errorf("%w: %v", store.ErrMalformed, err)
		}
	}
	r.subs = append(r.subs, subs...)
	for _, s := range subs {
		if s.Type == store.CredentialUsed {
			r.n++
		}
	}
	return &store.Appended{}, nil
}

func (r *recorder) stop(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
}

// recorded is how many uses are on record.
func (r *recorder) recorded() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

// used is one use with what came of it.
type used struct {
	use, statement, sample string
	objects                []string
	outcome                *store.UseOutcome
}

func (r *recorder) uses() (out []*used) {
	r.mu.Lock()
	defer r.mu.Unlock()
	byID := map[string]*used{}
	for _, s := range r.subs {
		switch s.Type {
		case store.CredentialUsed:
			d, err := store.DetailsAs[store.UsedDetails](&s.Entry)
			if err != nil {
				r.t.Error(err)
			}
			u := &used{use: d.Use, objects: d.Objects, statement: s.Openings[store.SealedStatement].Text}
			byID[s.ID], out = u, append(out, u)
		case store.UseFinished:
			d, err := store.DetailsAs[store.UseFinishedDetails](&s.Entry)
			if err != nil {
				r.t.Error(err)
			}
			for _, o := range d.Outcomes {
				u := byID[o.Use]
				if u == nil || u.outcome != nil {
					r.t.Errorf("an outcome of no use, or a second one: %+v", o)
					continue
				}
				u.outcome, u.sample = &o, s.Openings[store.SealedSample].Text
			}
		}
	}
	return out
}

// finished waits for the outcome of the newest use.
func (r *recorder) finished() *used {
	r.t.Helper()
	var last *used
	r.until("an outcome", func() bool {
		all := r.uses()
		if len(all) > 0 {
			last = all[len(all)-1]
		}
		return last != nil && last.outcome != nil
	})
	return last
}

type refusal struct{ route, reason, statement string }

func (r *recorder) refusals() (out []refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.subs {
		if s.Type == store.AccessRefused {
			d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
			if err != nil {
				r.t.Error(err)
			}
			out = append(out, refusal{d.Route, d.Reason, s.Openings[store.SealedStatement].Text})
		}
	}
	return out
}

// all is every byte that went on record, texts that are sealed included.
func (r *recorder) all() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, s := range r.subs {
		raw, _ := s.Marshal() // Append has marshalled it
		b.Write(raw)
		for _, o := range s.Openings {
			b.WriteString(o.Text)
		}
	}
	return b.String()
}

func (r *recorder) until(what string, fn func() bool) {
	r.t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("never: %s", what)
		}
	}
}

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
	rec     *recorder
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
	p := &path{t: t, rec: &recorder{t: t}}
	p.target = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := p.reached.Add(1)
		if got := p.rec.recorded(); got < n {
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
	return slices.ContainsFunc(p.rec.refusals(), func(f refusal) bool { return f.reason == reason })
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
