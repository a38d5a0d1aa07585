package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// probeWithin bounds one look at a server.
const probeWithin = 5 * time.Second

// serve looks at the configuration of a broker.
func (d *doctor) serve(ctx context.Context, c *serveConfig) {
	d.listener("listen", &c.Listen, hostOf(c.PublicURL))
	d.secret("privacy_key", c.PrivacyKey)
	d.secret("identity_key", c.IdentityKey)
	d.secret("recorder.token_file", c.Recorder.Token)
	d.secret("recorder.key", c.Recorder.Key)
	d.secret("vault.token_file", c.Vault.Token)
	if c.Vault.AppRole != nil {
		d.secret("vault.approle.secret_id_file", c.Vault.AppRole.SecretID)
	}
	d.secret("redis.url_file", c.Redis.URL)
	d.secret("redis.password_file", c.Redis.Password)
	d.secret("redis.sentinel_password_file", c.Redis.SentinelPassword)
	if c.Redis.TLS != nil {
		d.secret("redis.tls.key", c.Redis.TLS.Key)
	}
	head := filepath.Dir(c.Recorder.HeadFile)
	d.writable("head-file", "recorder.head_file", head, false)
	d.disk("recorder.head_file", head)

	id := d.identity(c)
	d.publicURL(ctx, c, id)
	set := d.catalogue("catalogue", c.Catalogue, c.Policy)
	d.orchestrators(ctx, c, set)
	d.recorder(ctx, &c.Recorder)
	if id != nil && set != nil {
		d.vault(ctx, c, set, id)
	}
	d.redis(ctx, c)
	d.gateway(ctx, c, set)
	d.seeing(c.Metrics, c.Tracing)
}

// seeing looks at where metrics and traces go.
func (d *doctor) seeing(metrics string, t *tracingConfig) {
	if metrics != "" && !loopback(metrics) {
		d.warn("metrics-open", "metrics_addr "+metrics, "can be reached from elsewhere, and asks nobody who they are")
	}
	if t != nil {
		d.secret("tracing.headers_file", t.Headers)
	}
}

func hostOf(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// listener looks at a listener that is reached by the name host.
func (d *doctor) listener(key string, l *listenConfig, host string) {
	d.secret(key+".key", l.Key)
	d.certificate(key, l, host)
	if l.Cert == "" && !loopback(l.Addr) {
		d.warn("listen-plain", key+" "+l.Addr, "is reached from elsewhere without TLS")
	}
	x, err := net.Listen("tcp", l.Addr)
	switch {
	case err == nil:
		x.Close()
		d.ok("listen-address", key+" "+l.Addr, "free")
	case errors.Is(err, syscall.EADDRINUSE):
		d.ok("listen-address", key+" "+l.Addr, "in use, as by the process that is configured here")
	default:
		d.fault("listen-address", key+" "+l.Addr, "%v", err)
	}
}

// endsSoon is how long before its end a certificate is spoken of.
const endsSoon = 30 * 24 * time.Hour

func (d *doctor) certificate(key string, l *listenConfig, host string) {
	if l.Cert == "" {
		return
	}
	what := key + ".cert " + l.Cert
	t, _, err := l.open(zap.NewNop())
	if !d.look("certificate", what, err, "") {
		return
	}
	leaf := t.Current().Certificate.Leaf
	d.ends("certificate-ends", what, leaf)
	if host == "" {
		return
	}
	if err := leaf.VerifyHostname(host); err != nil {
		d.fault("certificate-name", what, "is for %s, and the listener is reached as %s", strings.Join(certificateNames(leaf), ", "), host)
		return
	}
	d.ok("certificate-name", what, host)
}

func certificateNames(c *x509.Certificate) []string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return []string{"no name"}
	}
	return names
}

func (d *doctor) ends(check, what string, c *x509.Certificate) {
	switch left := c.NotAfter.Sub(d.now()); {
	case left <= 0:
		d.fault(check, what, "ended at %s", c.NotAfter.UTC().Format(time.RFC3339))
	case left < endsSoon:
		d.warn(check, what, "ends at %s", c.NotAfter.UTC().Format(time.RFC3339))
	default:
		d.ok(check, what, "until "+c.NotAfter.UTC().Format(time.DateOnly))
	}
}

// identity opens the keys of step identity; nil where they cannot be had.
// OpenIdentity would make a key that is missing, so that it is not asked then.
func (d *doctor) identity(c *serveConfig) *issuer.Identity {
	if _, err := os.Stat(c.IdentityKey); err != nil {
		return nil // said by secret
	}
	id, err := issuer.OpenIdentity(issuer.IdentityConfig{
		Issuer: strings.TrimSuffix(c.PublicURL, "/"), TrustDomain: c.TrustDomain, KeyFile: c.IdentityKey, Lead: c.IdentityLead,
	})
	if !d.look("identity-key", "identity_key "+c.IdentityKey, err, "") {
		return nil
	}
	return id
}

func (d *doctor) publicURL(ctx context.Context, c *serveConfig, id *issuer.Identity) {
	base := strings.TrimSuffix(c.PublicURL, "/")
	what := "public_url " + base
	if err := secureURL(base); err != nil {
		d.warn("public-url", what, "%v", err)
	} else {
		d.ok("public-url", what, "")
	}
	if id == nil {
		return
	}
	var doc struct {
		Issuer string `json:"issuer"`
		JWKS   string `json:"jwks_uri"`
	}
	if err := getJSON(ctx, base+"/.well-known/openid-configuration", &doc); err != nil {
		d.warn("discovery", what, "%v", err)
		return
	}
	if doc.Issuer != base {
		d.fault("discovery", what, "the document there is of the issuer %q", doc.Issuer)
		return
	}
	type keys struct {
		Keys []struct {
			ID string `json:"kid"`
		} `json:"keys"`
	}
	var theirs, ours keys
	if err := getJSON(ctx, doc.JWKS, &theirs); err != nil {
		d.warn("discovery", what, "%v", err)
		return
	}
	_ = json.Unmarshal(id.JWKS(), &ours) // our own
	for _, k := range ours.Keys {
		if !slices.Contains(theirs.Keys, k) {
			d.fault("discovery", what, "the keys published there are not those of identity_key")
			return
		}
	}
	d.ok("discovery", what, "")
}

// getJSON reads a small JSON document by the system's roots.
func getJSON(ctx context.Context, from string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", from, res.Status)
	}
	if err := json.UnmarshalRead(http.MaxBytesReader(nil, res.Body, 1<<20), into); err != nil {
		return fmt.Errorf("GET %s: not the JSON that is expected", from)
	}
	return nil
}

// catalogue compiles a catalogue and its policy; nil where that fails.
func (d *doctor) catalogue(key, file, policy string) *scopes.Set {
	in, err := scopes.Open(file, policy)
	if err != nil {
		d.fault("catalogue", key+" "+file, "%v", err)
		return nil
	}
	d.ok("catalogue", key+" "+file, fmt.Sprintf("%d scopes, %s", len(in.Current().Scopes()), in.Current().Digest()))
	return in.Current()
}

// orchestrators looks at who may ask, and for what.
func (d *doctor) orchestrators(ctx context.Context, c *serveConfig, set *scopes.Set) {
	var names []string
	if f := c.Orchestrators.Tokens; f != "" {
		tokens, err := auth.ListTokens(f)
		if !d.look("secret-file", "orchestrators.tokens "+f, err, "") {
			return
		}
		for _, t := range tokens {
			if t.Role == auth.Orchestrator {
				names = append(names, t.Name)
			}
		}
	}
	for _, o := range c.Orchestrators.OIDC {
		for _, r := range o.Orchestrators {
			names = append(names, r.Orchestrator)
		}
		d.provider(ctx, "orchestrators", o.Issuer, o.JWKS)
	}
	if len(names) == 0 {
		d.warn("nobody-can-ask", "orchestrators", "there is no token of an orchestrator, and no rule that makes one of an OpenID provider's")
		return
	}
	if set == nil {
		return
	}
	for _, s := range set.Scopes() {
		if !slices.ContainsFunc(names, s.MayAsk) {
			d.warn("nobody-can-ask", s.Name, "none of the orchestrators %s may ask for it", strings.Join(slices.Compact(slices.Sorted(slices.Values(names))), ", "))
		}
	}
}

// openIDProvider is what is read of a provider's discovery document.
type openIDProvider struct {
	Issuer        string   `json:"issuer"`
	Authorization string   `json:"authorization_endpoint"`
	JWKS          string   `json:"jwks_uri"`
	Claims        []string `json:"claims_supported"`
}

// provider looks at an OpenID provider; nil where it does not answer as issuer.
// jwks stands in for its discovery document where that is not used.
func (d *doctor) provider(ctx context.Context, check, issuer, jwks string) *openIDProvider {
	p := openIDProvider{JWKS: jwks}
	if jwks == "" {
		if err := getJSON(ctx, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration", &p); err != nil {
			d.fault(check, issuer, "%v", err)
			return nil
		}
		if p.Issuer != issuer {
			d.fault(check, issuer, "the provider there calls itself %q, which has to be the same to the letter", p.Issuer)
			return nil
		}
	}
	var keys struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := getJSON(ctx, p.JWKS, &keys); err != nil {
		d.fault(check, issuer, "%v", err)
		return nil
	}
	d.ok(check, issuer, fmt.Sprintf("%d keys", len(keys.Keys)))
	return &p
}

// recorder looks at the recorder as this broker reaches it. What it sees of the
// log is not what the broker has seen: the head file stays as it is.
func (d *doctor) recorder(ctx context.Context, c *recorderConfig) {
	one := *c
	one.HeadFile = ""
	key, err := store.NewLogVerifier(c.LogKey)
	if !d.look("log-key", "recorder.log_key", err, "") {
		return
	}
	r, err := one.client(key, zap.NewNop(), nil)
	if err != nil {
		return // a file of its, said by secret
	}
	defer r.Close()
	before := d.now()
	date, err := dateOf(ctx, &one)
	if err != nil {
		d.fault("recorder", "recorder.url "+c.URL, "%v", err)
		return
	}
	if !date.IsZero() {
		d.clock("recorder", before, date, time.Second)
	}
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	a, err := r.Open(ctx, "")
	switch {
	case err == nil:
		d.ok("recorder", "recorder.url "+c.URL, "answers")
		d.ok("recorder-login", "recorder.writer "+c.Writer, fmt.Sprintf("%d entries are open", len(a.Entries)))
		d.ok("log-key", "recorder.log_key", key.Origin())
	case errors.Is(err, client.ErrRefused):
		d.fault("recorder-login", "recorder.writer "+c.Writer, "%v", err)
	case errors.Is(err, store.ErrReceipt):
		d.fault("log-key", "recorder.log_key", "%v", err)
	default:
		d.fault("recorder", "recorder.url "+c.URL, "%v", err)
	}
}

// dateOf asks the recorder whether it is up, and what time it has: zero where it
// does not say.
func dateOf(ctx context.Context, c *recorderConfig) (time.Time, error) {
	t, err := c.transport(zap.NewNop())
	if err != nil {
		return time.Time{}, err
	}
	defer t.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.URL, "/")+"/readyz", nil)
	if err != nil {
		return time.Time{}, err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return time.Time{}, err
	}
	res.Body.Close()
	date, _ := http.ParseTime(res.Header.Get("Date"))
	if res.StatusCode != http.StatusOK {
		return date, fmt.Errorf("GET /readyz: %s", res.Status)
	}
	return date, nil
}

func (d *doctor) redis(ctx context.Context, c *serveConfig) {
	if c.Redis.Embedded {
		d.skip("redis", "redis", "embedded")
		return
	}
	const what = "redis"
	o, err := c.Redis.options(zap.NewNop())
	if err != nil {
		d.fault("redis", what, "%v", err)
		return
	}
	encrypted, password := o.TLS != nil, c.Redis.Password != ""
	addrs := o.Addrs
	if u, err := url.Parse(o.URL); err == nil && o.URL != "" {
		addrs = []string{u.Host}
		_, password = u.User.Password()
		encrypted = u.Scheme == "rediss"
	}
	for _, a := range addrs {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			host = a
		}
		if !local(host) && !(encrypted && password) {
			d.warn("redis-plain", what, "%s is reached over a network: TLS %t, password %t", host, encrypted, password)
		}
	}
	s, err := inflight.Open(o)
	if err != nil {
		d.fault("redis", what, "%v", err)
		return
	}
	defer s.Close()
	h, err := s.Examine(ctx)
	if !d.look("redis", what, err, "answers") {
		return
	}
	if len(h.Refused) > 0 {
		d.fault("redis-command", what, "the user may not use %s on the broker's keys", strings.Join(h.Refused, ", "))
	} else {
		d.ok("redis-command", what, "all that the broker uses")
	}
	if h.Unknown {
		d.skip("redis-eviction", what, "the user may not use INFO: ask CONFIG GET maxmemory-policy as an administrator")
		return
	}
	if h.Eviction != "noeviction" {
		d.fault("redis-eviction", what, "maxmemory-policy is %s", h.Eviction)
	} else {
		d.ok("redis-eviction", what, h.Eviction)
	}
	switch {
	case h.MaxMemory == 0:
		d.warn("redis-memory", what, "maxmemory is not set: it grows until the machine ends it")
	case h.Used > h.MaxMemory/10*8:
		d.warn("redis-memory", what, "%d of %d MiB are used", h.Used>>20, h.MaxMemory>>20)
	default:
		d.ok("redis-memory", what, fmt.Sprintf("%d of %d MiB", h.Used>>20, h.MaxMemory>>20))
	}
}

// local reports whether host is this machine.
func local(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// gateway looks at the access path and where it leads.
func (d *doctor) gateway(ctx context.Context, c *serveConfig, set *scopes.Set) {
	g := c.Gateway
	served := map[string]bool{}
	if g != nil {
		if g.HTTP != nil {
			served[store.ProtocolHTTP] = true
			d.listener("gateway.http.listen", &g.HTTP.Listen, hostOf(g.HTTP.URL))
		}
		if g.Postgres != nil {
			served[store.ProtocolPostgres] = true
			host, _, _ := net.SplitHostPort(g.Postgres.Address)
			d.listener("gateway.postgres.listen", &g.Postgres.Listen, host)
		}
		if g.MCP != nil {
			served[store.ProtocolMCP] = true
			d.listener("gateway.mcp.listen", &g.MCP.Listen, hostOf(g.MCP.URL))
		}
		d.proxyCA(g.ProxyCA)
	}
	if set == nil {
		return
	}
	for _, s := range set.Scopes() {
		if s.Access == nil {
			continue
		}
		if !served[s.Access.Protocol] {
			if len(s.Delivery) == 1 {
				d.warn("gateway-missing", s.Name, "is delivered by the gateway alone, and gateway.%s is not set", s.Access.Protocol)
			} else {
				d.skip("gateway-missing", s.Name, "gateway."+s.Access.Protocol+" is not set; it is delivered otherwise")
			}
			continue
		}
		if at, ok := upstreamOf(s.Access); ok {
			host, _, _ := net.SplitHostPort(at)
			to := cmp.Or(g.Upstreams[at], g.Upstreams[host], at)
			conn, err := (&net.Dialer{Timeout: probeWithin}).DialContext(ctx, "tcp", to)
			if err != nil {
				d.warn("upstream", s.Name, "%s: %v", at, err)
				continue
			}
			conn.Close()
			d.ok("upstream", s.Name, at)
		}
	}
}

// upstreamOf is the host:port that a scope leads to, where it is the same for
// every request.
func upstreamOf(a *store.Access) (string, bool) {
	at := a.Upstream
	if a.Protocol == store.ProtocolPostgres {
		at, _, _ = strings.Cut(at, "/")
	} else {
		u, err := url.Parse(at)
		if err != nil || u.Host == "" {
			return "", false
		}
		at = u.Host
		if u.Port() == "" {
			port := "80"
			if u.Scheme == "https" {
				port = "443"
			}
			at = net.JoinHostPort(u.Hostname(), port)
		}
	}
	return at, !strings.Contains(at, "{{") && hostPort(at) == nil
}

func (d *doctor) proxyCA(dir string) {
	if dir == "" {
		return
	}
	what := "gateway.proxy_ca_dir " + dir
	b, err := os.ReadFile(filepath.Join(dir, "forward-proxy.pem"))
	if errors.Is(err, fs.ErrNotExist) {
		d.skip("proxy-ca", what, "made at the first start")
		return
	}
	if err != nil {
		d.fault("proxy-ca", what, "%v", err)
		return
	}
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			d.fault("proxy-ca", what, "forward-proxy.pem holds no certificate")
			return
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err == nil {
			_, err = tls.X509KeyPair(b, b)
		}
		if err != nil {
			d.fault("proxy-ca", what, "%v", err)
			return
		}
		d.ends("proxy-ca", what, leaf)
		return
	}
}

// together is what several files configure.
type together struct {
	serve  []*serveConfig
	record []*recordConfig
}

// together looks at how processes go together.
func (d *doctor) together(all *together) {
	d.sameFile("privacy_key", "key-differs", func(yield func(string, string) bool) {
		for _, c := range all.serve {
			if !yield(c.Recorder.Writer, c.PrivacyKey) {
				return
			}
		}
		for _, c := range all.record {
			if !yield(recorderName, c.PrivacyKey) {
				return
			}
		}
	})
	writers, heads := map[string]bool{}, map[string]bool{}
	for i, c := range all.serve {
		if writers[c.Recorder.Writer] {
			d.fault("writer-twice", "recorder.writer "+c.Recorder.Writer, "is the name of two brokers")
		}
		if heads[c.Recorder.HeadFile] {
			d.fault("writer-twice", "recorder.head_file "+c.Recorder.HeadFile, "is the file of two brokers")
		}
		writers[c.Recorder.Writer], heads[c.Recorder.HeadFile] = true, true
		for _, other := range all.serve[:i] {
			d.brokers(other, c)
		}
		for _, r := range all.record {
			d.brokerAndRecorder(c, r)
		}
	}
}

// sameFile holds the files of one secret against each other.
func (d *doctor) sameFile(key, check string, files func(func(of, path string) bool)) {
	var first []byte
	var whose string
	for of, path := range files {
		b, err := os.ReadFile(path)
		switch {
		case err != nil: // said by secret
		case first == nil:
			first, whose = bytes.TrimSpace(b), of
		case !bytes.Equal(first, bytes.TrimSpace(b)):
			d.fault(check, key, "%s and %s do not have the same", whose, of)
		default:
			d.ok(check, key, whose+" and "+of)
		}
	}
}

func (d *doctor) brokers(a, b *serveConfig) {
	pair := a.Recorder.Writer + " and " + b.Recorder.Writer
	if a.PublicURL == b.PublicURL {
		d.sameFile("identity_key", "key-differs", func(yield func(string, string) bool) {
			_ = yield(a.Recorder.Writer, a.IdentityKey) && yield(b.Recorder.Writer, b.IdentityKey)
		})
	}
	d.catalogues(pair, a.Catalogue, a.Policy, b.Catalogue, b.Policy)
	if a.Redis.Embedded || b.Redis.Embedded {
		d.fault("redis-alone", pair, "one of them has its Redis embedded")
		return
	}
	x, xerr := redisPlace(&a.Redis)
	y, yerr := redisPlace(&b.Redis)
	if xerr != nil || yerr != nil {
		return // said by redis
	}
	if x != y {
		d.fault("redis-alone", pair, "one has %s, the other %s", x, y)
		return
	}
	d.ok("redis-alone", pair, x)
}

// redisPlace names a Redis and what of it is used, without user or password.
func redisPlace(c *redisConfig) (string, error) {
	o, err := c.options(zap.NewNop())
	if err != nil {
		return "", err
	}
	db := "/" + strconv.Itoa(o.DB)
	addrs := slices.Sorted(slices.Values(o.Addrs))
	if o.URL != "" {
		u, err := url.Parse(o.URL)
		if err != nil {
			return "", err
		}
		addrs, db = []string{u.Host}, cmp.Or(u.Path, db)
	}
	return strings.TrimSpace(o.SentinelMaster + " " + strings.Join(addrs, ",") + db + " " + cmp.Or(o.Prefix, inflight.DefaultPrefix)), nil
}

// catalogues compares what two processes decide by.
func (d *doctor) catalogues(pair, catalogue, policy, other, otherPolicy string) {
	a, err := scopes.Open(catalogue, policy)
	if err != nil {
		return // said by catalogue
	}
	b, err := scopes.Open(other, otherPolicy)
	if err != nil {
		return
	}
	if x, y := a.Current().Digest(), b.Current().Digest(); x != y {
		d.fault("catalogue-differs", pair, "%s and %s", x, y)
		return
	}
	d.ok("catalogue-differs", pair, a.Current().Digest())
}

func (d *doctor) brokerAndRecorder(s *serveConfig, r *recordConfig) {
	pair := s.Recorder.Writer + " and the recorder"
	if _, verifier, err := readLogKey(r.LogKey); err == nil {
		if strings.TrimSpace(s.Recorder.LogKey) != strings.TrimSpace(verifier) {
			d.fault("key-differs", "recorder.log_key of "+s.Recorder.Writer, "is not that of the recorder's log_key")
		} else {
			d.ok("key-differs", "recorder.log_key of "+s.Recorder.Writer, "")
		}
	}
	d.knownWriter(s, r)
	set, err := scopes.Open(s.Catalogue, s.Policy)
	if err != nil {
		return // said by catalogue
	}
	if r.Approval != nil {
		d.catalogues(pair, s.Catalogue, s.Policy, r.Approval.Catalogue, r.Approval.Policy)
		return
	}
	for _, x := range set.Current().Scopes() {
		if x.Approval != nil {
			d.fault("nobody-can-approve", x.Name, "needs people, and the recorder has no approval")
		}
	}
}

// knownWriter checks that the recorder knows s by the name that s has for itself.
func (d *doctor) knownWriter(s *serveConfig, r *recordConfig) {
	what := "recorder.writer " + s.Recorder.Writer
	if s.Recorder.Token == "" {
		if !slices.ContainsFunc(r.Certs, func(c auth.Cert) bool { return c.Name == s.Recorder.Writer }) {
			d.fault("writer-unknown", what, "no certificate at the recorder has this name")
			return
		}
		d.ok("writer-unknown", what, "by certificate")
		return
	}
	token, err := readSecret(s.Recorder.Token)
	if err != nil {
		return // said by secret
	}
	tokens, err := auth.OpenTokens(r.Tokens, nil)
	if err != nil {
		return
	}
	switch p, err := tokens.Authenticate(token); {
	case err != nil:
		d.fault("writer-unknown", what, "the recorder does not know its token")
	case p.Role != auth.Writer:
		d.fault("writer-unknown", what, "its token at the recorder is of a %s", p.Role)
	case p.Name != s.Recorder.Writer:
		d.fault("writer-unknown", what, "its token at the recorder is %s's", p.Name)
	default:
		d.ok("writer-unknown", what, "by token")
	}
}
