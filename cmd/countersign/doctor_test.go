package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

const doctorsCatalogue = `
scopes:
  - name: kv:read
    description: A Vault token that reads one secret.
    target: vault://secret/demo
    sensitivity: low
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: secret/data/demo, capabilities: [read]}]}
  - name: orders:read
    description: A PostgreSQL role that reads the orders.
    target: postgres://orders
    sensitivity: sensitive
    max_ttl: 15m
    ask: [ci]
    engine: database
    vault: {mount: database, role: orders-read}
    connection: {host: @HOST@, port: @PORT@, database: postgres}
    delivery: [gateway]
    access: {tls: "off", statements: [select], tables: [orders]}
    approval: {groups: [{group: dba, count: 1}]}
`

// clinic is a house in order: a broker's, a recorder's and a witness's
// configuration, and every server that they name.
type clinic struct {
	t      *testing.T
	dir    string
	vault  *vaulttest.Server
	redis  *redis.Client
	vkey   string
	roleID string
	dsn    string // of the ledger's server, as its superuser
	config map[string]string
}

func (c *clinic) file(name string) string { return filepath.Join(c.dir, name) }

func (c *clinic) write(name, text string) string {
	must(c.t, os.WriteFile(c.file(name), []byte(text), 0o600))
	return c.file(name)
}

func (c *clinic) cli(args ...string) string {
	c.t.Helper()
	out, err := countersign(c.t, args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("countersign %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// serveTest answers until the test ends.
func serveTest(t *testing.T, h http.HandlerFunc) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// certify makes a certificate of its own for the names, that ends at end.
func (c *clinic) certify(name string, end time.Time, names ...string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(c.t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: end, DNSNames: names, IsCA: true, BasicConstraintsValid: true}
	if len(names) == 0 {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(c.t, err)
	b, err := x509.MarshalPKCS8PrivateKey(key)
	must(c.t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b})
	c.write(name+".pem", string(cert))
	c.write(name+".key", string(private))
	must(c.t, os.MkdirAll(c.file(name+"-ca"), 0o700))
	c.write(name+"-ca/forward-proxy.pem", string(private)+string(cert))
}

func (c *clinic) sql(dsn string, statements ...string) {
	c.t.Helper()
	conn, err := pgx.Connect(context.Background(), dsn)
	must(c.t, err)
	defer conn.Close(context.Background())
	for _, s := range statements {
		_, err := conn.Exec(context.Background(), s)
		must(c.t, err)
	}
}

func (c *clinic) as(user, database string) string {
	u, err := url.Parse(c.dsn)
	must(c.t, err)
	u.User, u.Path = url.User(user), "/"+database
	return u.String()
}

func newClinic(t *testing.T) *clinic {
	c := &clinic{t: t, dir: t.TempDir(), config: map[string]string{}}
	server, err := postgrestest.Start()
	if errors.Is(err, postgrestest.ErrNotInstalled) {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() { _ = server.Remove() })
	c.dsn = server.DSN
	c.sql(c.dsn, "CREATE ROLE owner LOGIN", "CREATE ROLE recorder LOGIN", "CREATE DATABASE ledger ENCODING 'UTF8' TEMPLATE template0 OWNER owner", "CREATE DATABASE empty ENCODING 'UTF8' TEMPLATE template0",
		"CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
	must(t, ledger.InitPostgres(t.Context(), c.as("owner", "ledger"), "recorder"))
	c.write("ledger.dsn", c.as("recorder", "ledger"))
	c.write("owner.dsn", c.as("owner", "ledger"))
	c.write("super.dsn", c.as("postgres", "ledger"))
	c.write("empty.dsn", c.as("recorder", "empty"))
	c.write("latin.dsn", c.as("recorder", "latin"))
	c.write("away.dsn", "postgres://recorder:pg-password-of-nobody@127.0.0.1:1/ledger")

	at, err := url.Parse(c.dsn)
	must(t, err)
	catalogue := strings.NewReplacer("@HOST@", at.Hostname(), "@PORT@", at.Port()).Replace(doctorsCatalogue)
	c.write("catalogue.yaml", catalogue)
	c.write("lonely.yaml", strings.Replace(catalogue, "[ci]", "[another]", 1))
	c.write("long.yaml", strings.Replace(catalogue, "max_ttl: 15m", "max_ttl: 16m", 2))
	c.write("renamed.yaml", strings.Replace(catalogue, "role: orders-read", "role: orders-nowhere", 1))
	c.write("away.yaml", strings.Replace(catalogue, "port: "+at.Port(), "port: 1", 1))
	c.write("wrong.yaml", "scopes: [{name: x}]")
	set, err := scopes.Parse("catalogue.yaml", []byte(catalogue), "", nil)
	must(t, err)
	vault, prepared := vaulttest.Prepared(t, set, "")
	c.vault = vault
	must(t, vault.Root.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": c.write("audit.log", ""), "mode": "0644"}}))
	vaulttest.Orders(t, vault, c.dsn)
	c.write("vault-token", prepared.BrokerToken)
	c.write("root-token", vault.Root.Token())
	must(t, vault.Root.Sys().PutPolicy("hash", `path "sys/audit-hash/file" { capabilities = ["update"] }`))
	c.write("hash-token", c.token(&api.TokenCreateRequest{Policies: []string{"hash"}}))
	must(t, vault.Root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	c.vaultWrite("auth/approle/role/broker", map[string]any{"token_policies": "countersign-broker", "token_no_default_policy": true})
	role, err := vault.Root.Logical().Read("auth/approle/role/broker/role-id")
	must(t, err)
	secret, err := vault.Root.Logical().Write("auth/approle/role/broker/secret-id", nil)
	must(t, err)
	c.roleID = role.Data["role_id"].(string)
	c.write("secret-id", secret.Data["secret_id"].(string))

	rs := redistest.Start(t)
	options, err := redis.ParseURL(rs.URL())
	must(t, err)
	c.redis = redis.NewClient(options)
	t.Cleanup(func() { _ = c.redis.Close() })
	must(t, c.redis.ConfigSet(t.Context(), "maxmemory", "100mb").Err())
	c.write("redis-url", rs.URL())
	must(t, c.redis.Do(t.Context(), "ACL", "SETUSER", "half", "on", ">redis-password-of-half", "~countersign:*", "+@all", "-zadd").Err())
	c.write("redis-far", "redis://redis.invalid:6379")
	c.write("redis-half", "redis://half:redis-password-of-half@"+options.Addr)

	c.vkey = c.cli("key", "generate", "log", "--name", "clinic.example/log", "--out", c.file("log.key"))
	c.cli("key", "generate", "log", "--name", "clinic.example/log", "--out", c.file("other-log.key"))
	c.cli("key", "generate", "identity", "--out", c.file("identity.key"))
	c.cli("key", "generate", "identity", "--out", c.file("other-identity.key"))
	c.cli("key", "generate", "privacy", "--out", c.file("privacy.key"))
	c.cli("key", "generate", "privacy", "--out", c.file("other-privacy.key"))
	c.cli("key", "generate", "witness", "--name", "witness.example/w", "--out", c.file("witness.key"))
	c.write("writer-token", c.cli("token", "create", "--file", c.file("tokens"), "--role", "writer", "--name", "broker-1"))
	c.write("reviewer-token", c.cli("token", "create", "--file", c.file("tokens"), "--role", "reviewer", "--name", "rev"))
	c.cli("token", "create", "--file", c.file("reviewers"), "--role", "reviewer", "--name", "rev")
	c.cli("token", "create", "--file", c.file("orchestrators"), "--role", "orchestrator", "--name", "ci")
	c.write("nobody", `{"tokens":[]}`)
	c.write("slack-token", "xoxb-planted-slack-token")
	c.write("slack-secret", "0123456789abcdef0123456789abcdef")
	c.write("slack-bad", "planted-client-secret")
	c.certify("tls", time.Now().Add(365*24*time.Hour))
	c.certify("other", time.Now().Add(365*24*time.Hour), "elsewhere.example")
	c.certify("soon", time.Now().Add(24*time.Hour))
	c.certify("ended", time.Now().Add(-time.Hour))

	recorder := c.recorder()
	var identity *issuer.Identity
	public := serveTest(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			_, _ = w.Write(identity.Discovery())
		case "/.well-known/jwks.json":
			_, _ = w.Write(identity.JWKS())
		default:
			http.NotFound(w, r)
		}
	})
	identity, err = issuer.OpenIdentity(issuer.IdentityConfig{Issuer: public, TrustDomain: "clinic.example", KeyFile: c.file("identity.key")})
	must(t, err)
	slack := serveTest(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"ok":true,"team":"clinic","team_id":"T0123456789"}`))
	})
	witness := serveTest(t, func(http.ResponseWriter, *http.Request) {})
	people := "http://localhost:8788"
	c.config["serve"] = fmt.Sprintf(`
listen: {addr: "127.0.0.1:0", cert: DIR/tls.pem, key: DIR/tls.key}
public_url: %s
trust_domain: clinic.example
identity_key: DIR/identity.key
privacy_key: DIR/privacy.key
catalogue: DIR/catalogue.yaml
recorder: {url: %q, writer: broker-1, token_file: DIR/writer-token, log_key: %q, head_file: DIR/head}
vault: {addr: %q, token_file: DIR/vault-token}
redis: {url_file: DIR/redis-url}
orchestrators: {tokens: DIR/orchestrators}
gateway:
  postgres: {listen: {addr: "127.0.0.1:0"}, address: "127.0.0.1:8790"}
  http: {listen: {addr: "127.0.0.1:0"}, url: "http://127.0.0.1:8789"}
  proxy_ca_dir: DIR/tls-ca
`, public, recorder, c.vkey, vault.Addr)
	c.config["record"] = `
listen: {addr: "127.0.0.1:0"}
dir: DIR/recorder
postgres_file: DIR/ledger.dsn
keys_file: DIR/keys/details-keys.db
log_key: DIR/log.key
privacy_key: DIR/privacy.key
tokens: DIR/tokens
witnesses: {servers: [{url: "` + witness + `", key: x}]}
vault_audit: {file: DIR/audit.log, addr: "` + vault.Addr + `", token_file: DIR/hash-token}
` + peoplesProvider(t, people, c.file("catalogue.yaml")) + `
  slack: {token_file: DIR/slack-token, signing_secret_file: DIR/slack-secret, team: T0123456789, channel: C0123456789, api_url: "` + slack + `"}
`
	c.config["witness"] = `
listen: {addr: "127.0.0.1:0"}
key: DIR/witness.key
dir: DIR/witness
logs: [{key: "` + c.vkey + `"}]
`
	return c
}

func (c *clinic) vaultWrite(path string, data map[string]any) {
	c.t.Helper()
	_, err := c.vault.Root.Logical().Write(path, data)
	must(c.t, err)
}

func (c *clinic) token(r *api.TokenCreateRequest) string {
	c.t.Helper()
	s, err := c.vault.Root.Auth().Token().CreateOrphan(r)
	must(c.t, err)
	return s.Auth.ClientToken
}

// recorder runs a recorder of the house's keys and tokens.
func (c *clinic) recorder() string {
	conf := recordConfig{Dir: c.file("running"), LogKey: c.file("log.key"), PrivacyKey: c.file("privacy.key"), Tokens: c.file("tokens"), Listen: listenConfig{Addr: "127.0.0.1:0"}}
	o, err := conf.options(zap.NewNop())
	must(c.t, err)
	p, err := openPeople(c.t.Context(), o)
	must(c.t, err)
	c.t.Cleanup(p.close)
	s := httptest.NewServer(p.handler)
	c.t.Cleanup(func() { p.drain(); s.Close() })
	return s.URL
}

// examined is what doctor finds in the named configurations, after old was
// replaced by new in them, pair by pair.
func (c *clinic) examined(t *testing.T, d *doctor, names string, pairs ...string) *doctor {
	t.Helper()
	var files []string
	used := make([]bool, len(pairs))
	for i, name := range strings.Fields(names) {
		kind, _, _ := strings.Cut(name, "-") // serve-2 is another of serve
		text := c.config[kind]
		for j := 0; j < len(pairs); j += 2 {
			old, only, ok := strings.Cut(pairs[j], "@")
			if ok && only != name {
				continue
			}
			if strings.Contains(text, old) {
				used[j] = true
				text = strings.Replace(text, old, pairs[j+1], 1)
			}
		}
		files = append(files, filepath.Join(t.TempDir(), fmt.Sprintf("%d.yaml", i)))
		must(t, os.WriteFile(files[i], []byte(strings.ReplaceAll(text, "DIR", c.dir)), 0o600))
	}
	for j := 0; j < len(pairs); j += 2 {
		if !used[j] {
			t.Fatalf("%q is in no configuration", pairs[j])
		}
	}
	must(t, d.examine(t.Context(), files))
	return d
}

// planted are secrets that no finding may show.
func (c *clinic) planted(t *testing.T) (list []string) {
	for _, f := range []string{"vault-token", "root-token", "hash-token", "writer-token", "slack-token", "slack-secret", "slack-bad", "secret-id", "privacy.key", "log.key"} {
		b, err := os.ReadFile(c.file(f))
		must(t, err)
		list = append(list, strings.TrimSpace(string(b)))
	}
	return append(list, "pg-password-of-nobody", "redis-password-of-half")
}

func TestDoctorFindsEachMisconfigurationAndIsSilentWhereThereIsNone(t *testing.T) {
	c := newClinic(t)
	operator := func(d *doctor) { d.operator = c.vault.Root.Token() }
	provoked := map[string]bool{}
	planted := c.planted(t)
	check := func(t *testing.T, d *doctor) {
		t.Helper()
		for _, f := range d.findings {
			for _, secret := range planted {
				if strings.Contains(f.What+f.Message+f.Mend, secret) {
					t.Errorf("%s shows a secret: %s %s", f.Check, f.What, f.Message)
				}
			}
		}
	}
	// silent fails where doctor finds something to say of a house in order.
	silent := func(t *testing.T, pairs ...string) {
		t.Helper()
		d := newDoctor()
		operator(d)
		c.examined(t, d, "serve record witness", pairs...)
		check(t, d)
		for _, f := range d.findings {
			if f.Level != levelOK && f.Level != levelSkipped {
				t.Errorf("%s %s: %s: %s", f.Level, f.Check, f.What, f.Message)
			}
		}
		if err := d.verdict(); err != nil {
			t.Error(err)
		}
		if len(d.findings) < 50 {
			t.Errorf("%d things were looked at", len(d.findings))
		}
	}
	t.Run("a house in order", func(t *testing.T) { silent(t) })
	t.Run("a house in order, by AppRole", func(t *testing.T) {
		silent(t, "token_file: DIR/vault-token", "approle: {role_id: "+c.roleID+", secret_id_file: DIR/secret-id}")
	})

	root := c.vault.Root
	lookup := func(path string) map[string]any {
		s, err := root.Logical().Read(path)
		must(t, err)
		return s.Data
	}
	// changed writes to Vault, and puts back what was there when the test ends.
	changed := func(path string, data map[string]any) func(*testing.T, *doctor) {
		return func(t *testing.T, _ *doctor) {
			old := lookup(path)
			c.vaultWrite(path, data)
			t.Cleanup(func() { c.vaultWrite(path, old) })
		}
	}
	mode := func(name string, m os.FileMode) func(*testing.T, *doctor) {
		return func(t *testing.T, _ *doctor) {
			must(t, os.Chmod(c.file(name), m))
			t.Cleanup(func() { must(t, os.Chmod(c.file(name), 0o600)) })
		}
	}
	tokenFile := func(r *api.TokenCreateRequest) string {
		name := "token-" + rand.Text()[:6]
		c.write(name, c.token(r))
		return "DIR/" + name
	}
	late := func(_ *testing.T, d *doctor) {
		d.now = func() time.Time { return time.Now().Add(time.Minute) }
	}
	answer := func(status int, body string) string {
		return serveTest(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); _, _ = w.Write([]byte(body)) })
	}
	sealed := answer(200, `{"initialized":true,"sealed":true,"server_time_utc":1}`)
	falseIssuer := answer(200, `{"issuer":"https://other.example","jwks_uri":"x"}`)
	vaultAddr, recorderURL := c.vault.Addr, regexp.MustCompile(`recorder: \{url: "([^"]*)"`).FindStringSubmatch(c.config["serve"])[1]
	publicURL := regexp.MustCompile(`public_url: (\S*)`).FindStringSubmatch(c.config["serve"])[1]
	issuerURL := regexp.MustCompile(`issuer: "([^"]*)"`).FindStringSubmatch(c.config["record"])[1]
	fsyncOff := vaulttest.Postgres(t)
	c.write("volatile.dsn", fsyncOff)

	for _, x := range []struct {
		check string
		level level
		files string
		pairs []string
		do    func(*testing.T, *doctor)
	}{
		{"secret-file", levelFault, "serve", []string{"DIR/identity.key", "DIR/none"}, nil},
		{"secret-open", levelFault, "serve", nil, mode("vault-token", 0o644)},
		{"disk", levelFault, "serve", nil, func(_ *testing.T, d *doctor) { d.free = func(string) (uint64, error) { return 1 << 20, nil } }},
		{"disk", levelWarning, "record", nil, func(_ *testing.T, d *doctor) { d.free = func(string) (uint64, error) { return 500 << 20, nil } }},
		{"disk", levelUnchecked, "witness", nil, func(_ *testing.T, d *doctor) {
			d.free = func(string) (uint64, error) { return 0, errors.New("no such disk") }
		}},
		{"clock", levelFault, "serve", nil, late},
		{"clock", levelFault, "record", nil, late},
		{"certificate", levelFault, "serve", []string{"DIR/tls.key", "DIR/other.key"}, nil},
		{"certificate-ends", levelWarning, "serve", []string{"DIR/tls.pem, key: DIR/tls.key", "DIR/soon.pem, key: DIR/soon.key"}, nil},
		{"certificate-ends", levelFault, "serve", []string{"DIR/tls.pem, key: DIR/tls.key", "DIR/ended.pem, key: DIR/ended.key"}, nil},
		{"certificate-name", levelFault, "serve", []string{"DIR/tls.pem, key: DIR/tls.key", "DIR/other.pem, key: DIR/other.key"}, nil},
		{"listen-address", levelFault, "record", []string{`"127.0.0.1:0"`, `"192.0.2.1:8788", insecure_listen: true`}, nil},
		{"listen-plain", levelWarning, "record", []string{`"127.0.0.1:0"`, `"0.0.0.0:0", insecure_listen: true`}, nil},

		{"public-url", levelWarning, "serve", []string{publicURL, "http://countersign.invalid"}, nil},
		{"discovery", levelWarning, "serve", []string{publicURL, "http://127.0.0.1:1"}, nil},
		{"discovery", levelFault, "serve", []string{publicURL, falseIssuer}, nil},
		{"discovery", levelFault, "serve", []string{"DIR/identity.key", "DIR/other-identity.key"}, nil},
		{"identity-key", levelFault, "serve", []string{"DIR/identity.key", "DIR/privacy.key"}, nil},
		{"catalogue", levelFault, "serve", []string{"DIR/catalogue.yaml", "DIR/wrong.yaml"}, nil},
		{"nobody-can-ask", levelWarning, "serve", []string{"DIR/catalogue.yaml", "DIR/lonely.yaml"}, nil},
		{"nobody-can-ask", levelWarning, "serve", []string{"DIR/orchestrators", "DIR/reviewers"}, nil},
		{"orchestrators", levelFault, "serve", []string{"tokens: DIR/orchestrators", `oidc: [{issuer: "http://127.0.0.1:1", audience: a, orchestrators: [{match: {a: b}, orchestrator: ci}]}]`}, nil},
		{"log-key", levelFault, "serve", []string{c.vkey, c.cli("key", "show", c.file("other-log.key"))}, nil},
		{"recorder", levelFault, "serve", []string{recorderURL, "http://127.0.0.1:1"}, nil},
		{"recorder-login", levelFault, "serve", []string{"DIR/writer-token", "DIR/reviewer-token"}, nil},
		{"head-file", levelFault, "serve", []string{"DIR/head", "DIR/nowhere/head"}, nil},

		{"vault", levelFault, "serve", []string{vaultAddr, "http://127.0.0.1:1"}, nil},
		{"vault-sealed", levelFault, "serve", []string{vaultAddr, sealed}, nil},
		{"vault-login", levelFault, "serve", []string{"DIR/vault-token", "DIR/slack-token"}, nil},
		{"vault-login", levelFault, "serve", []string{"token_file: DIR/vault-token", "approle: {role_id: none, secret_id_file: DIR/secret-id}"}, nil},
		{"vault-renew", levelFault, "serve", []string{"DIR/vault-token", tokenFile(&api.TokenCreateRequest{Policies: []string{"countersign-broker"}, Renewable: new(bool), TTL: "1h"})}, nil},
		{"vault-renew", levelWarning, "serve", []string{"DIR/vault-token", tokenFile(&api.TokenCreateRequest{Policies: []string{"countersign-broker"}, TTL: "1h"})}, nil},
		{"vault-broad", levelWarning, "serve", []string{"DIR/vault-token", "DIR/root-token"}, nil},
		{"vault-capability", levelFault, "serve", []string{"DIR/vault-token", tokenFile(&api.TokenCreateRequest{Policies: []string{"hash"}, Period: "1h"})}, nil},
		{"vault-role", levelFault, "serve", nil, changed("auth/token/roles/countersign-kv-read", map[string]any{"orphan": false})},
		{"vault-policy", levelWarning, "serve", nil, changed("sys/policies/acl/countersign-kv-read", map[string]any{"policy": `path "secret/*" { capabilities = ["read"] }`})},
		{"vault-ttl", levelFault, "serve", nil, func(t *testing.T, _ *doctor) {
			c.vaultWrite("sys/mounts/database/tune", map[string]any{"max_lease_ttl": "60s"})
			t.Cleanup(func() { c.vaultWrite("sys/mounts/database/tune", map[string]any{"max_lease_ttl": "768h"}) })
		}},
		{"database-role", levelFault, "serve", []string{"DIR/catalogue.yaml", "DIR/renamed.yaml"}, nil},
		{"database-ttl", levelFault, "serve", nil, changed("database/roles/orders-read", map[string]any{"default_ttl": "60s"})},
		{"database-sessions", levelWarning, "serve", nil, changed("database/roles/orders-read", map[string]any{"revocation_statements": []string{"DROP ROLE \"{{name}}\""}})},
		{"vault-audit", levelWarning, "serve", nil, func(t *testing.T, _ *doctor) {
			must(t, root.Sys().DisableAudit("file"))
			t.Cleanup(func() {
				must(t, root.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": c.file("audit.log"), "mode": "0644"}}))
			})
		}},
		{"vault-audit", levelUnchecked, "serve", nil, func(_ *testing.T, d *doctor) { d.operator = "nobody's token" }},
		{"vault-audit", levelSkipped, "serve", nil, func(_ *testing.T, d *doctor) { d.operator = "" }},

		{"redis", levelFault, "serve", []string{"DIR/redis-url", "DIR/slack-token"}, nil},
		{"redis-command", levelFault, "serve", []string{"DIR/redis-url", "DIR/redis-half"}, nil},
		{"redis-eviction", levelFault, "serve", nil, c.redisSet("maxmemory-policy", "allkeys-lru", "noeviction")},
		{"redis-memory", levelWarning, "serve", nil, c.redisSet("maxmemory", "0", "100mb")},
		{"redis-plain", levelWarning, "serve", []string{"DIR/redis-url", "DIR/redis-far"}, nil},

		{"gateway-missing", levelWarning, "serve", []string{`  postgres: {listen: {addr: "127.0.0.1:0"}, address: "127.0.0.1:8790"}`, ""}, nil},
		{"upstream", levelWarning, "serve", []string{"DIR/catalogue.yaml", "DIR/away.yaml"}, nil},
		{"proxy-ca", levelWarning, "serve", []string{"DIR/tls-ca", "DIR/soon-ca"}, nil},

		{"dir", levelFault, "record", []string{"dir: DIR/recorder", "dir: DIR/log.key"}, nil},
		{"head-beside", levelWarning, "record", []string{"postgres_file: DIR/ledger.dsn", ""}, nil},
		{"keys-beside", levelWarning, "record", []string{"postgres_file: DIR/ledger.dsn", "", "DIR/keys/", "DIR/recorder/keys/"}, nil},
		{"head-file", levelFault, "record", []string{"keys_file:", "head_file: DIR/log.key/head\nkeys_file:"}, nil},
		{"writers", levelFault, "record", []string{"DIR/tokens", "DIR/reviewers"}, nil},
		{"recorder-key", levelFault, "record", []string{"DIR/log.key", "DIR/slack-token"}, nil},
		{"approval-off", levelWarning, "record", []string{c.config["record"][strings.Index(c.config["record"], "approval:"):], ""}, nil},
		{"groups-claim", levelWarning, "record", []string{"client_id: countersign", "client_id: countersign, groups_claim: teams"}, nil},
		{"people-login", levelFault, "record", []string{issuerURL, "http://127.0.0.1:1"}, nil},
		{"people-login", levelFault, "record", []string{issuerURL, falseIssuer}, nil},
		{"people-redirect", levelFault, "record", []string{"http://localhost:8788", "http://localhost:8799"}, nil},
		{"people-redirect", levelFault, "record", []string{"client_id: countersign", "client_id: nobody"}, nil},
		{"slack-token", levelFault, "record", []string{"T0123456789", "T9999999999"}, nil},
		{"slack-secret", levelWarning, "record", []string{"DIR/slack-secret", "DIR/slack-bad"}, nil},
		{"unwitnessed", levelWarning, "record", []string{regexp.MustCompile(`witnesses: .*`).FindString(c.config["record"]), ""}, nil},
		{"witness-away", levelWarning, "record", []string{regexp.MustCompile(`servers: \[\{url: "([^"]*)"`).FindStringSubmatch(c.config["record"])[1], "http://127.0.0.1:1"}, nil},
		{"vault-audit-log", levelFault, "record", []string{"DIR/audit.log", "DIR/nowhere.log"}, nil},
		{"vault-audit-log", levelFault, "record", []string{"DIR/hash-token", "DIR/vault-token"}, nil},
		{"metrics-open", levelWarning, "record", []string{"log_key:", "metrics_addr: 0.0.0.0:9091\nlog_key:"}, nil},
		{"metrics-open", levelWarning, "serve", []string{"trust_domain:", "metrics_addr: 0.0.0.0:9090\ntrust_domain:"}, nil},
		{"secret-file", levelFault, "serve", []string{"trust_domain:", "tracing: {otlp_endpoint: \"https://collector.example\", headers_file: DIR/nowhere}\ntrust_domain:"}, nil},

		{"postgres", levelFault, "record", []string{"DIR/ledger.dsn", "DIR/away.dsn"}, nil},
		{"postgres-durable", levelFault, "record", []string{"DIR/ledger.dsn", "DIR/volatile.dsn"}, nil},
		{"postgres-role", levelWarning, "record", []string{"DIR/ledger.dsn", "DIR/owner.dsn"}, nil},
		{"postgres-role", levelWarning, "record", []string{"DIR/ledger.dsn", "DIR/super.dsn"}, nil},
		{"postgres-role", levelWarning, "record", nil, func(t *testing.T, _ *doctor) {
			c.sql(c.as("owner", "ledger"), "GRANT DELETE ON countersign.entries TO recorder")
			t.Cleanup(func() { c.sql(c.as("owner", "ledger"), "REVOKE DELETE ON countersign.entries FROM recorder") })
		}},
		{"postgres-encoding", levelFault, "record", []string{"DIR/ledger.dsn", "DIR/latin.dsn"}, nil},
		{"ledger", levelFault, "record", []string{"DIR/ledger.dsn", "DIR/empty.dsn"}, nil},
		{"ledger", levelFault, "record", nil, func(t *testing.T, _ *doctor) {
			c.sql(c.as("owner", "ledger"), "ALTER TABLE countersign.entries DISABLE TRIGGER entries_keep")
			t.Cleanup(func() {
				c.sql(c.as("owner", "ledger"), "ALTER TABLE countersign.entries ENABLE ALWAYS TRIGGER entries_keep")
			})
		}},

		{"witness-log", levelFault, "witness", []string{c.vkey, "no key"}, nil},
		{"secret-file", levelFault, "witness", []string{"DIR/witness.key", "DIR/privacy.key"}, nil},

		{"catalogue-differs", levelFault, "serve record", []string{"DIR/catalogue.yaml", "DIR/long.yaml"}, nil},
		{"key-differs", levelFault, "serve record", []string{"DIR/privacy.key@record", "DIR/other-privacy.key"}, nil},
		{"key-differs", levelFault, "serve record", []string{"DIR/log.key@record", "DIR/other-log.key"}, nil},
		{"key-differs", levelFault, "serve serve-2", []string{"DIR/identity.key@serve-2", "DIR/other-identity.key"}, nil},
		{"writer-twice", levelFault, "serve serve-2", nil, nil},
		{"writer-unknown", levelFault, "serve record", []string{"writer: broker-1", "writer: broker-2"}, nil},
		{"writer-unknown", levelFault, "serve record", []string{"DIR/tokens", "DIR/reviewers"}, nil},
		{"redis-alone", levelFault, "serve serve-2", []string{"url_file: DIR/redis-url@serve-2", "embedded: true"}, nil},
		{"nobody-can-approve", levelFault, "serve record", []string{c.config["record"][strings.Index(c.config["record"], "approval:"):], ""}, nil},
	} {
		t.Run(fmt.Sprintf("%s %s", x.check, x.level), func(t *testing.T) {
			d := newDoctor()
			operator(d)
			if x.do != nil {
				x.do(t, d)
			}
			c.examined(t, d, x.files, x.pairs...)
			check(t, d)
			for _, f := range d.findings {
				if f.Check == x.check && f.Level == x.level {
					provoked[x.check] = true
					if (f.Mend != "") != (x.level == levelFault || x.level == levelWarning) || f.Message == "" {
						t.Errorf("it says %q, and to mend it %q", f.Message, f.Mend)
					}
					return
				}
			}
			for _, f := range d.findings {
				if f.Level != levelOK {
					t.Logf("%s %s: %s: %s", f.Level, f.Check, f.What, f.Message)
				}
			}
			t.Errorf("no %s of %s", x.level, x.check)
		})
	}
	for _, k := range checks {
		if !provoked[k.code] {
			t.Errorf("nothing here provokes %s", k.code)
		}
	}
	t.Run("a house put in order again", func(t *testing.T) { silent(t) })
}

func (c *clinic) redisSet(key, value, after string) func(*testing.T, *doctor) {
	return func(t *testing.T, _ *doctor) {
		must(t, c.redis.ConfigSet(context.Background(), key, value).Err())
		t.Cleanup(func() { must(t, c.redis.ConfigSet(context.Background(), key, after).Err()) })
	}
}

func TestDoctorFollowsNoRedirectWithAToken(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 1)
	elsewhere := serveTest(t, func(w http.ResponseWriter, r *http.Request) { asked <- r.URL.Path })
	slack := serveTest(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere+"/taken", http.StatusTemporaryRedirect)
	})
	c := &clinic{t: t, dir: t.TempDir()}
	d := newDoctor()
	d.slack(t.Context(), &slackConfig{Token: c.write("token", "xoxb-1"), SigningSecret: c.write("secret", "x"), APIURL: slack, Team: "T1"})
	if f := d.findings[len(d.findings)-1]; f.Check != "slack-token" || f.Level != levelFault {
		t.Errorf("%+v", f)
	}
	select {
	case path := <-asked:
		t.Errorf("the token went on to %s", path)
	default:
	}
}

// A recorder that is up and does not answer takes its own time, and not that of
// the checks after it.
func TestDoctorWaitsForNoServerForLong(t *testing.T) {
	t.Parallel()
	url := serveTest(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			<-r.Context().Done()
		}
	})
	c := &clinic{t: t, dir: t.TempDir()}
	_, vkey, err := note.GenerateKey(rand.Reader, "ledger.example/log")
	must(t, err)
	d, began := newDoctor(), time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 8*probeWithin)
	defer cancel()
	d.recorder(ctx, &recorderConfig{URL: url, Writer: "broker-1", Token: c.write("token", "x"), LogKey: vkey})
	if took := time.Since(began); took > 2*probeWithin {
		t.Errorf("it took %s", took)
	}
	if f := d.findings[len(d.findings)-1]; f.Check != "recorder" || f.Level != levelFault {
		t.Errorf("%+v", f)
	}
}

func TestASecretIsForItsOwnerAndForWhomRootGaveItTo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("files of other owners are made by root alone")
	}
	for _, x := range []struct {
		uid  int
		mode os.FileMode
		open bool
	}{{0, 0o400, false}, {0, 0o440, false}, {0, 0o460, true}, {0, 0o444, true}, {65532, 0o400, false}, {65532, 0o440, true}} {
		file := filepath.Join(t.TempDir(), "key")
		must(t, os.WriteFile(file, []byte("x"), 0o600))
		must(t, errors.Join(os.Chown(file, x.uid, 65532), os.Chmod(file, x.mode)))
		d := newDoctor()
		d.secret("key", file)
		if last := d.findings[len(d.findings)-1]; (last.Check == "secret-open") != x.open {
			t.Errorf("of %d, mode %04o: %+v", x.uid, x.mode, last)
		}
	}
}
