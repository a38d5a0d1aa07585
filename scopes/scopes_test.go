package scopes

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/countersign-dev/countersign/store"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares got with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", path, got)
	}
}

var orders = &Connection{Host: "db.internal", Port: 5432, Database: "orders"}

// demoSet is the demo catalogue with a policy, where one is given.
func demoSet(t testing.TB, policy string) *Set {
	t.Helper()
	name := ""
	if policy != "" {
		name = "policy.rego"
	}
	s, err := Parse("demo.yaml", Demo(orders), name, []byte(policy))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// set is a catalogue of one scope, given by its lines.
func set(t testing.TB, scope string) *Set {
	t.Helper()
	s, err := Parse("catalogue.yaml", []byte("scopes:\n"+scope), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ask(scope string) Ask {
	return Ask{Agent: "spiffe://demo/orchestrator/demo/run/run-1/step/step-1", Orchestrator: "demo", Run: "run-1", Step: "step-1",
		Scope: scope, Time: time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC)}
}

func decide(t testing.TB, s *Set, a Ask) *Verdict {
	t.Helper()
	v, err := s.Decide(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTheDemoCatalogueHoldsTheScopesOfTheContract(t *testing.T) {
	s := demoSet(t, "")
	var names []string
	for _, sc := range s.Scopes() {
		names = append(names, sc.Name)
	}
	want := []string{"identity:step", "vault:demo-read", "vault:demo-write", "vault:demo-admin", "pki:service", "ssh:deploy", "http:demo", "mcp:demo", "mcp:demo-refund", "orders-db:read", "orders-db:write"}
	if !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
	if len(s.For("anyone")) != len(want) {
		t.Error("not every orchestrator may ask for all of it")
	}
	if read, _ := s.Scope("vault:demo-read"); read.MaxTTL != 15*time.Minute {
		t.Errorf("vault:demo-read may live %s", read.MaxTTL)
	}
	without, err := Parse("demo.yaml", Demo(nil), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := without.Scope("orders-db:read"); ok {
		t.Error("the orders database is there without PostgreSQL")
	}
}

func TestAGrantHoldsAllThatTheIssuerAsksOfVault(t *testing.T) {
	s := demoSet(t, "")
	key := newSSHKey(t)
	csr := newCSR(t, pkix.Name{}, nil)
	long := store.Duration(5 * time.Minute)
	for _, c := range []struct {
		name    string
		ask     func(*Ask)
		scope   string
		outcome store.Outcome
		want    store.Grant
	}{
		{"identity", nil, "identity:step", store.Allow, store.Grant{Target: "spiffe://countersign.demo", Engine: "identity", Policies: []string{}, TTL: long, Audience: "countersign-demo"}},
		{"identity for another audience", func(a *Ask) { a.Audience = "vault" }, "identity:step", store.Allow, store.Grant{Target: "spiffe://countersign.demo", Engine: "identity", Policies: []string{}, TTL: long, Audience: "vault"}},
		{"token", nil, "vault:demo-read", store.Allow, store.Grant{Target: "vault://secret/data/demo", Engine: "token", Role: "countersign-vault-demo-read", Policies: []string{"countersign-vault-demo-read"}, TTL: long, Revocable: true}},
		{"token, wrapped", func(a *Ask) { a.Delivery = "wrapped"; a.TTL = "15m" }, "vault:demo-read", store.Allow, store.Grant{Target: "vault://secret/data/demo", Engine: "token", Role: "countersign-vault-demo-read", Policies: []string{"countersign-vault-demo-read"}, TTL: 3 * long, Delivery: "wrapped", Revocable: true}},
		{"database through the gateway", func(a *Ask) { a.Delivery = "gateway" }, "orders-db:read", store.Allow, store.Grant{Target: "postgres://orders", Engine: "database", Role: "countersign-orders-db-read", Policies: []string{"countersign-orders-db-read"}, Method: "read", Path: "database/creds/orders-read", TTL: long, Delivery: "gateway", Revocable: true,
			Access: &store.Access{Protocol: "postgres", Upstream: "db.internal:5432/orders", TLS: "verify", Postgres: &store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"orders"}, Sample: 1024}, Masking: store.Masking{Rules: []store.MaskRule{{Column: "orders.email"}}}}}},
		{"a static secret, through the gateway", nil, "http:demo", store.Allow, store.Grant{Target: "http://demo.internal", Engine: "kv", Role: "countersign-http-demo", Policies: []string{"countersign-http-demo"}, Method: "read", Path: "secret/data/http-demo", TTL: long, Delivery: "gateway", Revocable: true,
			Access: &store.Access{Protocol: "http", Upstream: "http://demo.internal", Inject: &store.Inject{In: "header", Name: "Authorization", Value: "Bearer {{key}}"}, Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}}},
				HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"GET"}, Paths: []string{"/", "/customers", "/customers/*"}}}, ResponseHeaders: []string{"Content-Type"}, Sample: 1024}}}},
		{"one call of a tool", func(a *Ask) { a.Reason = "OPS-1" }, "mcp:demo-refund", store.NeedsApproval, store.Grant{Target: "mcp://demo.internal/refund_order", Engine: "kv", Role: "countersign-mcp-demo-refund", Policies: []string{"countersign-mcp-demo-refund"}, Method: "read", Path: "secret/data/mcp-demo", TTL: long, Delivery: "gateway", Revocable: true,
			Access: &store.Access{Protocol: "mcp", Upstream: "http://mcp.demo.internal", Inject: &store.Inject{In: "header", Name: "Authorization", Value: "Bearer {{key}}"}, Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}, {Detector: "email"}}},
				MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "refund_order"}}, Sample: 1024}}}},
		{"database", nil, "orders-db:read", store.Allow, store.Grant{Target: "postgres://orders", Engine: "database", Role: "countersign-orders-db-read", Policies: []string{"countersign-orders-db-read"}, Method: "read", Path: "database/creds/orders-read", TTL: long, Revocable: true}},
		{"pki", func(a *Ask) { a.Params = map[string]any{"service": "billing"} }, "pki:service", store.Allow, store.Grant{Target: "pki://demo.internal/billing", Engine: "pki", Role: "countersign-pki-service", Policies: []string{"countersign-pki-service"}, Method: "write", Path: "pki/issue/service", Params: map[string]string{"service": "billing"}, Data: map[string]string{"common_name": "billing.demo.internal", "ttl": "900s"}, TTL: 3 * long}},
		{"pki for the step's own key", func(a *Ask) { a.PublicKey = csr; a.TTL = "1m" }, "pki:service", store.Allow, store.Grant{Target: "pki://demo.internal/step", Engine: "pki", Role: "countersign-pki-service", Policies: []string{"countersign-pki-service"}, Method: "write", Path: "pki/sign/service", Params: map[string]string{"service": "step"}, Data: map[string]string{"common_name": "step.demo.internal", "ttl": "60s", "csr": strings.TrimSpace(csr)}, PublicKey: strings.TrimSpace(csr), TTL: long / 5}},
		{"ssh", func(a *Ask) { a.PublicKey = key + " someone@somewhere\n" }, "ssh:deploy", store.NeedsApproval, store.Grant{Target: "ssh://deploy@demo.internal", Engine: "ssh", Role: "countersign-ssh-deploy", Policies: []string{"countersign-ssh-deploy"}, Method: "write", Path: "ssh/sign/deploy", Data: map[string]string{"public_key": key, "valid_principals": "deploy", "ttl": "600s", "cert_type": "user"}, PublicKey: key, TTL: 2 * long}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := ask(c.scope)
			if c.ask != nil {
				c.ask(&a)
			}
			v := decide(t, s, a)
			want := c.want
			want.Scope = c.scope
			if want.Delivery == "" {
				want.Delivery = "direct"
			}
			if want.Params == nil {
				want.Params = map[string]string{}
			}
			if v.Outcome != c.outcome || !reflect.DeepEqual(v.Grant, want) {
				t.Errorf("got %s %+v\nwant %s %+v", v.Outcome, v.Grant, c.outcome, want)
			}
			g := v.Grant
			again, err := s.Resolve(g.Scope, time.Duration(g.TTL), g.Params, g.Delivery, g.PublicKey, g.Audience)
			if err != nil {
				t.Fatal(err)
			}
			if again.Digest() != g.Digest() {
				t.Errorf("derived again it is another grant: %+v", again)
			}
		})
	}
}

func TestAnAskOutOfBoundsIsRefusedWithItsOwnError(t *testing.T) {
	s := demoSet(t, "")
	key := newSSHKey(t)
	weakRSA := "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQDCl1LQ6wsJQ7cYlm3WmcWmXwQf9bWs8oZbJ0m4l2l0Zr8cE0Zb2oQ3xJ7m5yq0yVb1Yl0yq6mB1Vw=="
	for _, c := range []struct {
		name string
		want error
		ask  Ask
	}{
		{"no such scope", ErrUnknownScope, Ask{Scope: "vault:nothing"}},
		{"the empty scope", ErrUnknownScope, Ask{}},
		{"a TTL that is no duration", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "soon"}},
		{"a TTL without unit", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "300"}},
		{"a TTL of zero", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "0s"}},
		{"a negative TTL", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "-5m"}},
		{"a TTL below a second", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "1500ms"}},
		{"a TTL that overflows", ErrTTLInvalid, Ask{Scope: "vault:demo-read", TTL: "9999999999999h"}},
		{"a TTL over the ceiling", ErrTTLTooLong, Ask{Scope: "vault:demo-read", TTL: "15m1s"}},
		{"an unknown param", ErrParams, Ask{Scope: "pki:service", Params: map[string]any{"role": "admin"}}},
		{"params where there are none", ErrParams, Ask{Scope: "vault:demo-read", Params: map[string]any{"path": "x"}}},
		{"a param of another type", ErrParams, Ask{Scope: "pki:service", Params: map[string]any{"service": 7}}},
		{"a list for a param", ErrParams, Ask{Scope: "pki:service", Params: map[string]any{"service": []any{"a"}}}},
		{"null for a param", ErrParams, Ask{Scope: "pki:service", Params: map[string]any{"service": nil}}},
		{"a delivery that the scope has not", ErrDelivery, Ask{Scope: "orders-db:read", Delivery: "wrapped"}},
		{"an unknown delivery", ErrDelivery, Ask{Scope: "orders-db:read", Delivery: "pigeon"}},
		{"the gateway", ErrDelivery, Ask{Scope: "vault:demo-read", Delivery: "gateway"}},
		{"a static secret, directly", ErrDelivery, Ask{Scope: "http:demo", Delivery: "direct"}},
		{"no reason where one is due", ErrReasonRequired, Ask{Scope: "vault:demo-write", Reason: " \n"}},
		{"an audience that is not allowed", ErrParams, Ask{Scope: "identity:step", Audience: "evil"}},
		{"an audience elsewhere", ErrParams, Ask{Scope: "vault:demo-read", Audience: "vault"}},
		{"no key to sign", ErrPublicKey, Ask{Scope: "ssh:deploy"}},
		{"a key that is none", ErrPublicKey, Ask{Scope: "ssh:deploy", PublicKey: "ssh-ed25519 AAAA"}},
		{"two keys", ErrPublicKey, Ask{Scope: "ssh:deploy", PublicKey: key + "\n" + newSSHKey(t)}},
		{"a key with options", ErrPublicKey, Ask{Scope: "ssh:deploy", PublicKey: `command="sh" ` + key}},
		{"a weak key", ErrPublicKey, Ask{Scope: "ssh:deploy", PublicKey: weakRSA}},
		{"a key too large", ErrPublicKey, Ask{Scope: "ssh:deploy", PublicKey: strings.Repeat("A", maxKey+1)}},
		{"a key where none is certified", ErrPublicKey, Ask{Scope: "vault:demo-read", PublicKey: key}},
		{"an SSH key for a certificate", ErrPublicKey, Ask{Scope: "pki:service", PublicKey: key}},
		{"a request that names somebody", ErrPublicKey, Ask{Scope: "pki:service", PublicKey: newCSR(t, pkix.Name{CommonName: "root.demo.internal"}, nil)}},
		{"a request that names hosts", ErrPublicKey, Ask{Scope: "pki:service", PublicKey: newCSR(t, pkix.Name{}, []string{"root.demo.internal"})}},
		{"a request that is cut", ErrPublicKey, Ask{Scope: "pki:service", PublicKey: newCSR(t, pkix.Name{}, nil)[:200]}},
		{"a certificate chain for a request", ErrPublicKey, Ask{Scope: "pki:service", PublicKey: newCSR(t, pkix.Name{}, nil) + newCSR(t, pkix.Name{}, nil)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.ask.Orchestrator = "demo"
			v, err := s.Decide(context.Background(), c.ask)
			if !errors.Is(err, c.want) || v != nil {
				t.Errorf("got %+v, %v; want %v", v, err, c.want)
			}
		})
	}
}

func TestOnlyTheOrchestratorsNamedMayAsk(t *testing.T) {
	s := set(t, `
  - {name: a, target: t, sensitivity: low, max_ttl: 1m, ask: ["ci-*", nightly, "*.team"], engine: identity, audience: [x]}`)
	for name, want := range map[string]bool{
		"ci-1": true, "ci-": true, "nightly": true, "a.team": true,
		"ci": false, "xci-1": false, "nightly2": false, "xnightly": false, "ateam": false, "a.team2": false, "": false, "ci\n": false, "nightly\n": false,
	} {
		a := ask("a")
		a.Orchestrator = name
		// What is wrong with the ask is not told to whom may not ask.
		if !want {
			a.TTL = "nonsense"
		}
		v := decide(t, s, a)
		if got := v.Outcome == store.Allow; got != want {
			t.Errorf("%q: %s", name, v.Outcome)
		}
		if !want && !slices.Equal(v.Reasons, []string{"not allowed to ask for this scope"}) {
			t.Errorf("%q is told %q", name, v.Reasons)
		}
		if got := len(s.For(name)) == 1; got != want {
			t.Errorf("%q sees %d scopes", name, len(s.For(name)))
		}
	}
}

func TestAScopeWithAnApprovalRuleNeedsApproval(t *testing.T) {
	s := demoSet(t, "")
	a := ask("vault:demo-admin")
	a.Reason = "OPS-1"
	v := decide(t, s, a)
	if v.Outcome != store.NeedsApproval || !slices.Equal(v.Reasons, []string{"needs approval"}) {
		t.Errorf("got %s %q", v.Outcome, v.Reasons)
	}
	if v.Scope.Approval.Groups[0] != (store.RuleGroup{Group: "dba", Count: 2}) || !v.Scope.Approval.Reasons.Approver || v.Scope.Approval.Expires != store.Duration(time.Hour) {
		t.Errorf("the rule is %+v", v.Scope.Approval)
	}
	if v.Grant.Role == "" {
		t.Error("what would be granted is not told")
	}
}

func TestTheDigestCoversCatalogueAndPolicyEachWithItsLength(t *testing.T) {
	c := string(Demo(nil))
	policy := "package countersign\ndeny contains \"no\" if input.run == \"x\"\n"
	parse := func(c, p string) *Set {
		t.Helper()
		name := "p.rego"
		if p == "" {
			name = ""
		}
		s, err := Parse("c.yaml", []byte(c), name, []byte(p))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	seen := map[string]bool{}
	for _, s := range []*Set{parse(c, ""), parse(c, policy), parse(c+"\n", policy), parse(c, policy+"\n"), parse(c+"#", "#\n"+policy), parse(c+"##\n", policy)} {
		if seen[s.Digest()] || !strings.HasPrefix(s.Digest(), "sha256:") || len(s.Digest()) != 71 {
			t.Errorf("digest %s", s.Digest())
		}
		seen[s.Digest()] = true
	}
	if first, again := parse(c, policy), parse(c, policy); first.Digest() != again.Digest() {
		t.Error("the digest is not steady")
	}
	if parse(c, "").PolicyDigest() != "" || parse(c, policy).CatalogueDigest() != parse(c, "").CatalogueDigest() {
		t.Error("the parts' digests are wrong")
	}
}

func TestTheIssuerRefusesToDeriveWhatTheCatalogueDoesNotAllow(t *testing.T) {
	s := demoSet(t, "")
	for _, c := range []struct {
		name, scope string
		ttl         time.Duration
		params      map[string]string
		delivery    string
		want        error
	}{
		{"unknown scope", "x", time.Minute, nil, "direct", ErrUnknownScope},
		{"no TTL", "vault:demo-read", 0, nil, "direct", ErrTTLInvalid},
		{"too long", "vault:demo-read", time.Hour, nil, "direct", ErrTTLTooLong},
		{"traversal", "pki:service", time.Minute, map[string]string{"service": "../x"}, "direct", ErrParams},
		{"gateway", "vault:demo-read", time.Minute, nil, "gateway", ErrDelivery},
	} {
		if _, err := s.Resolve(c.scope, c.ttl, c.params, c.delivery, "", ""); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestReloadKeepsTheOldSetWhereTheNewOneIsBad(t *testing.T) {
	dir := t.TempDir()
	catalogue, policy := filepath.Join(dir, "c.yaml"), filepath.Join(dir, "p.rego")
	write := func(path, s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(catalogue, string(Demo(nil)))
	write(policy, "package countersign\ndeny contains \"no\" if input.run == \"x\"\n")
	f, err := Open(catalogue, policy)
	if err != nil {
		t.Fatal(err)
	}
	var changes []string
	fail := error(nil)
	f.OnChange(func(old, new *Set) error {
		changes = append(changes, old.Digest()+new.Digest())
		return fail
	})
	first := f.Current()
	if err := f.Reload(); err != nil || f.Current() != first || len(changes) != 0 {
		t.Errorf("an unchanged file is a change: %v", err)
	}
	write(catalogue, "scopes: [")
	if err := f.Reload(); err == nil || f.Current() != first || len(changes) != 0 {
		t.Errorf("a bad catalogue took force: %v", err)
	}
	write(catalogue, string(Demo(nil)))
	write(policy, "package countersign\ndeny contains 1 if input.rum == 1\n")
	if err := f.Reload(); err == nil || f.Current() != first {
		t.Errorf("a bad policy took force: %v", err)
	}
	write(policy, "package countersign\ndeny contains \"yes\" if input.run == \"x\"\n")
	fail = errors.New("ledger unavailable")
	if err := f.Reload(); !errors.Is(err, fail) || f.Current() != first {
		t.Errorf("what could not be recorded took force: %v", err)
	}
	fail = nil
	if err := f.Reload(); err != nil || f.Current() == first || len(changes) != 2 || changes[1] != first.Digest()+f.Current().Digest() {
		t.Errorf("a good change did not take force: %v", err)
	}
	os.Remove(catalogue)
	if err := f.Reload(); err == nil {
		t.Error("a file that is gone is no error")
	}
	if s := Static(first); s.Reload() != nil || s.Current() != first {
		t.Error("a static set changed")
	}
}

func newSSHKey(t testing.TB) string {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func newCSR(t testing.TB, name pkix.Name, hosts []string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: name, DNSNames: hosts}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
