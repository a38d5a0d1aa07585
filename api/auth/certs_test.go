package auth_test

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

// certified is a listener of real TLS whose guard g knows callers by certificate.
type certified struct {
	srv     *httptest.Server
	ca      *trusttest.CA
	bundle  string
	now     time.Time
	refused refusals
}

func newCertified(t *testing.T, role auth.Role, certs auth.Certs, g *auth.Guard) *certified {
	if err := certs.Check(role); err != nil {
		t.Fatal(err)
	}
	c := &certified{ca: trusttest.NewCA(t), bundle: filepath.Join(t.TempDir(), "bundle.pem"), now: time.Now()}
	dir := filepath.Dir(c.bundle)
	trusttest.WriteCAs(t, c.bundle, c.ca.Cert)
	trusttest.Write(t, c.ca.Issue(t, x509.Certificate{}), dir+"/tls.pem", dir+"/tls.key")
	clock := func() time.Time { return c.now }
	tr, err := trust.Open(trust.Files{CA: c.bundle, Cert: dir + "/tls.pem", Key: dir + "/tls.key", Now: clock}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	g.Certs = &auth.ClientCerts{Trust: tr, Role: role, Certs: certs, Now: clock}
	g.Refusals = auth.NewRefusals("example.org", zap.NewNop(), c.refused.record)
	r := chi.NewRouter()
	r.With(g.Require(role)).Get("/w/{id}", func(w http.ResponseWriter, r *http.Request) {
		p := auth.From(r.Context())
		w.Header().Set("Caller", strings.Join(append([]string{string(p.Role), p.Name}, p.Owners...), " "))
	})
	c.srv = httptest.NewUnstartedServer(r)
	c.srv.EnableHTTP2 = true
	c.srv.TLS = tr.Server()
	c.srv.StartTLS()
	t.Cleanup(c.srv.Close)
	return c
}

// client shows cert whatever authorities the server names; nil: none.
func (c *certified) client(t *testing.T, cert *tls.Certificate) *http.Client {
	conf := trusttest.Trust(t, c.ca.Cert).Client()
	if cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (c *certified) get(t *testing.T, client *http.Client, token string) (int, string) {
	t.Helper()
	r, err := http.NewRequest("GET", c.srv.URL+"/w/1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.ProtoMajor != 2 {
		t.Errorf("HTTP/%d: a listener that asks for certificates speaks HTTP/2 too", res.ProtoMajor)
	}
	return res.StatusCode, res.Header.Get("Caller")
}

func (c *certified) issue(t *testing.T, cn string, uris ...string) *tls.Certificate {
	return c.ca.Issue(t, x509.Certificate{Subject: pkix.Name{CommonName: cn}, URIs: trusttest.URIs(t, uris...)})
}

func TestAWriterIsKnownByItsClientCertificate(t *testing.T) {
	c := newCertified(t, auth.Writer, auth.Certs{{Name: "broker-1", URI: "spiffe://example.org/broker-1"}, {Name: "broker-2", CommonName: "broker-2"}, {Name: "broker-3", URI: "https://broker-3.example.org/"}}, &auth.Guard{})
	for _, x := range []struct {
		name   string
		cert   *tls.Certificate
		status int
		caller string
	}{
		{"by SPIFFE ID", c.issue(t, "x", "spiffe://example.org/broker-1"), 200, "writer broker-1"},
		{"by common name", c.issue(t, "broker-2"), 200, "writer broker-2"},
		{"by another URI", c.issue(t, "x", "https://broker-3.example.org/"), 200, "writer broker-3"},
		{"another SPIFFE ID with a known common name", c.issue(t, "broker-2", "spiffe://example.org/other"), 401, ""},
		{"two SPIFFE IDs", c.issue(t, "x", "spiffe://example.org/broker-1", "spiffe://example.org/other"), 401, ""},
		{"none", nil, 401, ""},
		{"of another CA", trusttest.NewCA(t).Issue(t, x509.Certificate{Subject: pkix.Name{CommonName: "broker-2"}}), 401, ""},
	} {
		if status, caller := c.get(t, c.client(t, x.cert), ""); status != x.status || caller != x.caller {
			t.Errorf("%s: %d %q", x.name, status, caller)
		}
	}
}

func TestAnOrchestratorIsKnownByItsSPIFFEIDAlone(t *testing.T) {
	g := &auth.Guard{}
	c := newCertified(t, auth.Orchestrator, auth.Certs{{Name: "ci", URI: "spiffe://example.org/ci", Owners: []string{"user:ada"}}}, g)
	template := func(uris ...string) x509.Certificate {
		return x509.Certificate{Subject: pkix.Name{CommonName: "ci"}, URIs: trusttest.URIs(t, uris...)}
	}
	good := template("spiffe://example.org/ci")
	with := func(change func(*x509.Certificate)) *tls.Certificate {
		x := good
		change(&x)
		return c.ca.Issue(t, x)
	}
	if status, caller := c.get(t, c.client(t, c.ca.Issue(t, good)), ""); status != 200 || caller != "orchestrator ci user:ada" {
		t.Fatalf("%d %q", status, caller)
	}
	before := len(c.refused.subs)
	bad := map[string]*tls.Certificate{
		"no certificate":              nil,
		"a common name":               c.ca.Issue(t, template()),
		"another ID":                  c.ca.Issue(t, template("spiffe://example.org/ci/other")),
		"the ID in other letters":     c.ca.Issue(t, template("spiffe://example.org/CI")),
		"another trust domain":        c.ca.Issue(t, template("spiffe://example.com/ci")),
		"two IDs":                     c.ca.Issue(t, template("spiffe://example.org/ci", "spiffe://example.org/cd")),
		"an ID and another URI":       c.ca.Issue(t, template("spiffe://example.org/ci", "https://example.org/")),
		"an unknown authority":        trusttest.NewCA(t).Issue(t, good),
		"ended":                       with(func(x *x509.Certificate) { x.NotBefore, x.NotAfter = c.now.Add(-2*time.Hour), c.now.Add(-time.Hour) }),
		"not begun":                   with(func(x *x509.Certificate) { x.NotBefore, x.NotAfter = c.now.Add(time.Hour), c.now.Add(2*time.Hour) }),
		"a server's":                  with(func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }),
		"an authority's (SVID, 5.2)":  with(func(x *x509.Certificate) { x.IsCA, x.BasicConstraintsValid = true, true }),
		"one that may sign (4.3)":     with(func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageCertSign }),
		"an ID with a query (ID, 2)":  c.ca.Issue(t, template("spiffe://example.org/ci?x=1")),
		"an ID that ends in a slash":  c.ca.Issue(t, template("spiffe://example.org/ci/")),
		"an ID of another URI scheme": c.ca.Issue(t, template("https://example.org/ci")),
	}
	for name, cert := range bad {
		if status, caller := c.get(t, c.client(t, cert), ""); status != 401 || caller != "" {
			t.Errorf("%s: %d %q", name, status, caller)
		}
	}
	g.Refusals.Close() // what is folded goes on record
	folded := 0
	for _, s := range c.refused.subs[before:] {
		d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
		if err != nil || s.Type != store.AccessRefused || d.Problem != "unauthenticated" {
			t.Errorf("%+v %v", d, err)
		}
		folded += 1 + d.Folded
	}
	if folded != len(bad) {
		t.Errorf("%d refusals are on record, want %d", folded, len(bad))
	}
}

func TestTheEndOfACertificateCountsOnAnOpenConnection(t *testing.T) {
	c := newCertified(t, auth.Orchestrator, auth.Certs{{Name: "ci", URI: "spiffe://example.org/ci"}}, &auth.Guard{})
	client := c.client(t, c.ca.Issue(t, x509.Certificate{URIs: trusttest.URIs(t, "spiffe://example.org/ci"), NotBefore: c.now.Add(-time.Minute), NotAfter: c.now.Add(time.Minute)}))
	for _, x := range []struct {
		after  time.Duration
		status int
	}{{0, 200}, {59 * time.Second, 200}, {62 * time.Second, 401}} {
		start := c.now
		c.now = start.Add(x.after)
		if status, _ := c.get(t, client, ""); status != x.status {
			t.Errorf("after %s: %d, want %d", x.after, status, x.status)
		}
		c.now = start
	}
}

func TestAnAuthorityThatIsTakenAwayCountsOnAnOpenConnection(t *testing.T) {
	c := newCertified(t, auth.Orchestrator, auth.Certs{{Name: "ci", URI: "spiffe://example.org/ci"}}, &auth.Guard{})
	client := c.client(t, c.issue(t, "", "spiffe://example.org/ci"))
	if status, _ := c.get(t, client, ""); status != 200 {
		t.Fatal(status)
	}
	// Another takes up its TLS session (RFC 8446, section 2.2) on new connections.
	again := c.client(t, c.issue(t, "", "spiffe://example.org/ci"))
	tr, resumed := again.Transport.(*http.Transport), 0
	tr.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	tr.TLSClientConfig.VerifyConnection = func(s tls.ConnectionState) error {
		if s.DidResume {
			resumed++
		}
		return nil
	}
	for range 3 {
		if status, _ := c.get(t, again, ""); status != 200 {
			t.Fatal(status)
		}
		tr.CloseIdleConnections()
	}
	if resumed == 0 {
		t.Error("no TLS session was resumed")
	}
	next := trusttest.NewCA(t)
	trusttest.WriteCAs(t, c.bundle, c.ca.Cert, next.Cert)
	c.now = c.now.Add(2 * time.Second)
	renewed := c.client(t, next.Issue(t, x509.Certificate{URIs: trusttest.URIs(t, "spiffe://example.org/ci")}))
	for _, x := range []*http.Client{client, renewed} {
		if status, _ := c.get(t, x, ""); status != 200 {
			t.Errorf("%d while both authorities count", status)
		}
	}
	trusttest.WriteCAs(t, c.bundle, next.Cert)
	c.now = c.now.Add(2 * time.Second)
	for _, x := range []*http.Client{client, again} {
		if status, _ := c.get(t, x, ""); status != 401 {
			t.Errorf("%d by an authority that counts no more", status)
		}
	}
	if status, _ := c.get(t, renewed, ""); status != 200 {
		t.Errorf("%d by the authority that counts", status)
	}
}

func TestACertificateAndATokenNameOneCaller(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	same := create(t, path, auth.Token{Name: "ci", Role: auth.Orchestrator})
	other := create(t, path, auth.Token{Name: "cd", Role: auth.Orchestrator})
	server := create(t, path, auth.Token{Name: "ci", Role: auth.ResourceServer})
	tokens, err := auth.OpenTokens(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := newCertified(t, auth.Orchestrator, auth.Certs{{Name: "ci", URI: "spiffe://example.org/ci"}}, &auth.Guard{Tokens: tokens})
	mine, strange := c.issue(t, "", "spiffe://example.org/ci"), trusttest.NewCA(t).Issue(t, x509.Certificate{URIs: trusttest.URIs(t, "spiffe://example.org/ci")})
	for _, x := range []struct {
		name   string
		cert   *tls.Certificate
		token  string
		status int
	}{
		{"both of one", mine, same, 200},
		{"a token alone", nil, other, 200},
		{"a token of another", mine, other, 401},
		{"a token of another role", mine, server, 401},
		{"a token that is none", mine, same + "x", 401},
		{"a certificate that nobody vouches for beside a good token", strange, same, 401},
	} {
		if status, _ := c.get(t, c.client(t, x.cert), x.token); status != x.status {
			t.Errorf("%s: %d, want %d", x.name, status, x.status)
		}
	}
}

func TestCertificatesThatCannotNameACallerAreRefused(t *testing.T) {
	for want, x := range map[string]struct {
		role  auth.Role
		certs auth.Certs
	}{
		"not a valid ID":          {auth.Writer, auth.Certs{{Name: "a b", URI: "spiffe://a/b"}}},
		"known by uri alone":      {auth.Orchestrator, auth.Certs{{Name: "ci", CommonName: "ci"}}},
		"set either":              {auth.Writer, auth.Certs{{Name: "b", URI: "spiffe://a/b", CommonName: "b"}}},
		"mapped twice":            {auth.Writer, auth.Certs{{Name: "b", CommonName: "b"}, {Name: "c", CommonName: "b"}}},
		"owners are":              {auth.Writer, auth.Certs{{Name: "b", CommonName: "b", Owners: []string{"user:ada"}}}},
		"owners: ":                {auth.Orchestrator, auth.Certs{{Name: "b", URI: "spiffe://a/b", Owners: []string{"ada"}}}},
		"scheme is missing":       {auth.Orchestrator, auth.Certs{{Name: "b", URI: "https://a/b"}}},
		"of another trust domain": {auth.Orchestrator, auth.Certs{{Name: "b", URI: "spiffe://a/b"}, {Name: "c", URI: "spiffe://b/c"}}},
		"trust domain is missing": {auth.Writer, auth.Certs{{Name: "b", URI: "spiffe://"}}},
	} {
		if err := x.certs.Check(x.role); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
