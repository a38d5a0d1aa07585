package scopes

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/countersign-dev/countersign/store"
)

// reached is a catalogue with all that an access may hold.
const reached = `
  - name: api:orders
    target: https://api.example.com
    sensitivity: low
    max_ttl: 5m
    ask: ["*"]
    engine: kv
    vault: {path: api}
    delivery: [gateway]
    access:
      protocol: http
      upstream: https://api.example.com:8443/v2
      inject: {in: basic, username: countersign, password: "{{password}}"}
      routes:
        - {methods: [GET, HEAD], paths: [/, "/orders/*", "/orders/*/lines/", "/docs/@me"]}
        - {methods: [POST, PROPFIND], paths: [/orders]}
      request_headers: [accept, x-trace]
      response_headers: [content-type]
      sample: 2048
      timeout: 90s
    masking:
      - email
      - {field: phone}
      - {path: "$.customers[*].address"}
      - {path: "$..lines[0]['unit price'].*"}
      - {detector: card}
  - name: api:live
    target: https://live.example.com
    sensitivity: low
    max_ttl: 5m
    ask: ["*"]
    engine: path
    vault: {path: aws/sts/live}
    revocable: false
    delivery: [direct, gateway]
    access:
      protocol: http
      upstream: https://live.example.com
      inject: {in: sigv4, region: eu-central-1, service: execute-api}
      routes: [{methods: [GET], paths: ["/*"]}]
      upgrade: true
  - name: db:sales
    target: postgres://sales
    sensitivity: low
    max_ttl: 5m
    ask: ["*"]
    engine: database
    vault: {role: sales}
    connection: {host: "2001:db8::1", database: sales}
    delivery: [gateway]
    access:
      protocol: postgres
      tls: off
      statements: [select, update, copy]
      tables: [orders, "sales.*", Übersicht]
      functions: [sales.total]
      everywhere: true
    masking: [email, {column: orders.email}, {column: sales.orders.phone}, {type: double precision}, {detector: iban}]
  - name: db:plain
    target: postgres://plain
    sensitivity: low
    max_ttl: 5m
    ask: ["*"]
    engine: database
    vault: {role: plain}
    connection: {host: db.internal, port: 6432, database: plain}
    delivery: [direct, gateway]
  - name: tools
    target: mcp://tools
    sensitivity: low
    max_ttl: 5m
    ask: ["*"]
    engine: kv
    vault: {path: tools}
    delivery: [gateway]
    access:
      protocol: mcp
      upstream: http://tools.internal/mcp
      inject: {in: query, name: key, value: "{{api-key}}"}
      tools: [lookup, {name: "read_*"}, {name: refund_one, scope: tools:refund}]
      resources: ["file:///docs/*"]
      prompts: [summarise]
      sample: 64
  - name: tools:refund
    target: mcp://tools
    sensitivity: sensitive
    max_ttl: 5m
    ask: ["*"]
    engine: kv
    vault: {path: tools}
    delivery: [gateway]
    access:
      protocol: mcp
      upstream: http://tools.internal/mcp
      inject: {in: header, name: x-key, value: "{{api-key}}"}
      tools: ["refund_*"]
`

func TestAnAccessIsReadWholeIntoTheGrant(t *testing.T) {
	s := set(t, reached)
	for name, want := range map[string]*store.Access{
		"api:orders": {
			Protocol: "http", Upstream: "https://api.example.com:8443/v2", Inject: &store.Inject{In: "basic", Username: "countersign", Password: "{{password}}"},
			HTTP: &store.HTTPAccess{
				Routes: []store.HTTPRoute{
					{Methods: []string{"GET", "HEAD"}, Paths: []string{"/", "/orders/*", "/orders/*/lines/", "/docs/@me"}},
					{Methods: []string{"POST", "PROPFIND"}, Paths: []string{"/orders"}},
				},
				RequestHeaders: []string{"Accept", "X-Trace"}, ResponseHeaders: []string{"Content-Type"}, Sample: 2048, Timeout: store.Duration(90 * time.Second),
			},
			Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}, {Field: "phone"}, {Path: "$.customers[*].address"}, {Path: "$..lines[0]['unit price'].*"}, {Detector: "card"}}},
		},
		"api:live": {
			Protocol: "http", Upstream: "https://live.example.com", Inject: &store.Inject{In: "sigv4", Region: "eu-central-1", Service: "execute-api"},
			HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"GET"}, Paths: []string{"/*"}}}, Upgrade: true},
		},
		"db:sales": {
			Protocol: "postgres", Upstream: "[2001:db8::1]:5432/sales", TLS: "off",
			Postgres: &store.PostgresAccess{Statements: []string{"select", "update", "copy"}, Tables: []string{"orders", "sales.*", "Übersicht"}, Functions: []string{"sales.total"}, Everywhere: true},
			Masking:  store.Masking{Rules: []store.MaskRule{{Field: "email"}, {Column: "orders.email"}, {Column: "sales.orders.phone"}, {Type: "double precision"}, {Detector: "iban"}}},
		},
		"db:plain": {
			Protocol: "postgres", Upstream: "db.internal:6432/plain", TLS: "verify",
			Postgres: &store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}},
		},
		"tools": {
			Protocol: "mcp", Upstream: "http://tools.internal/mcp", Inject: &store.Inject{In: "query", Name: "key", Value: "{{api-key}}"},
			MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "lookup"}, {Name: "read_*"}, {Name: "refund_one", Scope: "tools:refund"}}, Resources: []string{"file:///docs/*"}, Prompts: []string{"summarise"}, Sample: 64},
		},
		"tools:refund": {
			Protocol: "mcp", Upstream: "http://tools.internal/mcp", Inject: &store.Inject{In: "header", Name: "X-Key", Value: "{{api-key}}"},
			MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "refund_*"}}},
		},
	} {
		a := ask(name)
		a.Delivery = Gateway
		v := decide(t, s, a)
		if !reflect.DeepEqual(v.Grant.Access, want) {
			t.Errorf("%s:\ngot  %s\nwant %s", name, dump(v.Grant.Access), dump(want))
		}
		if sc, _ := s.Scope(name); !reflect.DeepEqual(sc.Masking, want.Masking) {
			t.Errorf("%s: its scope masks %+v", name, sc.Masking)
		}
	}
	// What is handed out directly has none of it; a session can be ended, whether
	// or not Vault could call the secret back.
	for _, delivery := range []string{Direct, Gateway} {
		a := ask("api:live")
		a.Delivery = delivery
		if v := decide(t, s, a); (v.Grant.Access != nil) != (delivery == Gateway) || v.Grant.Revocable != (delivery == Gateway) {
			t.Errorf("delivered %s: revocable %v, access %+v", delivery, v.Grant.Revocable, v.Grant.Access)
		}
	}
}

func dump(a *store.Access) string {
	g := store.Grant{Access: a}
	e := store.Entry{}
	e.SetDetails(g)
	return string(e.Details)
}

// What stands in an access is part of the grant, and an approval is for its
// digest alone.
func TestAnyChangeOfAnAccessMakesAnotherGrant(t *testing.T) {
	scope := func(name string) string {
		_, rest, _ := strings.Cut(reached, "  - name: "+name+"\n")
		text, _, _ := strings.Cut(rest, "\n  - name: ")
		return "\n  - name: " + name + "\n" + text + "\n"
	}
	resolve := func(t *testing.T, name, text string) string {
		t.Helper()
		s, err := Parse("c.yaml", []byte("scopes:"+text), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		g, err := s.Resolve(name, time.Minute, nil, Gateway, "", "")
		if err != nil {
			t.Fatal(err)
		}
		return g.Digest()
	}
	for _, c := range []struct{ scope, from, to string }{
		{"api:orders", "https://api.example.com:8443/v2", "https://api.example.com/v2"},
		{"api:orders", "protocol: http", "protocol: http # said twice"},
		{"api:orders", "{{password}}", "{{pass}}"},
		{"api:orders", "GET, HEAD", "GET, HEAD, DELETE"},
		{"api:orders", `"/orders/*"`, `"/*"`},
		{"api:orders", "accept, x-trace", "accept"},
		{"api:orders", "sample: 2048", "sample: 2047"},
		{"api:orders", "timeout: 90s", "timeout: 91s"},
		{"api:orders", "      - email\n", ""},
		{"api:orders", "detector: card", "detector: phone"},
		{"api:live", "upgrade: true", "upgrade: false"},
		{"api:live", "eu-central-1", "eu-central-2"},
		{"db:sales", "tls: off", "tls: verify"},
		{"db:sales", "select, update, copy", "select, update"},
		{"db:sales", "everywhere: true", "everywhere: false"},
		{"db:sales", "[sales.total]", "[sales.totals]"},
		{"db:sales", "2001:db8::1", "2001:db8::2"},
		{"tools:refund", `["refund_*"]`, `["refund_one"]`},
		{"tools:refund", "name: x-key", "name: x-keys"},
	} {
		text := scope(c.scope)
		changed := strings.Replace(text, c.from, c.to, 1)
		if changed == text {
			t.Fatalf("%s has no %q", c.scope, c.from)
		}
		first, again := resolve(t, c.scope, text), resolve(t, c.scope, changed)
		if differs := !strings.Contains(c.to, "#"); (first != again) != differs {
			t.Errorf("%s: %q to %q: the grant differs: %v", c.scope, c.from, c.to, first != again)
		}
	}
}

// Keys of RFC 7517, appendix A.1, and RFC 8037, appendix A.2, as they are
// granted.
const (
	jwkP256    = `{"crv":"P-256","kty":"EC","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}`
	jwkEd25519 = `{"crv":"Ed25519","kty":"OKP","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
)

func TestASessionIsBoundToAPublicKeyAndToNothingElse(t *testing.T) {
	s := demoSet(t, "")
	for name, scope := range map[string]string{"http": "http:demo", "mcp": "mcp:demo"} {
		for given, want := range map[string]string{
			jwkP256: jwkP256, jwkEd25519: jwkEd25519,
			` { "y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM", "kid":"1","use":"sig","ext":true,"key_ops":["verify"],
				"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4"} `: jwkP256,
		} {
			a := ask(scope)
			a.PublicKey = given
			v := decide(t, s, a)
			if v.Grant.PublicKey != want {
				t.Errorf("%s: %s is granted as %s", name, given, v.Grant.PublicKey)
			}
			again, err := s.Resolve(scope, 5*time.Minute, nil, Gateway, v.Grant.PublicKey, "")
			if err != nil || again.Digest() != v.Grant.Digest() {
				t.Errorf("%s: derived again it is another grant: %+v, %v", name, again, err)
			}
		}
	}
	private := func(key any) string {
		b, err := jose.JSONWebKey{Key: key}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wide, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	modulus, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ scope, key, says string }{
		"a private EC key":            {"http:demo", private(ec), "private part"},
		"a private Ed25519 key":       {"http:demo", private(ed), "private part"},
		"a private RSA key":           {"http:demo", private(modulus), "private part"},
		"a symmetric key":             {"http:demo", private([]byte("secret of both")), "private part"},
		"another curve":               {"http:demo", private(&wide.PublicKey), "P-256"},
		"an RSA key":                  {"http:demo", private(&modulus.PublicKey), "P-256"},
		"a point off the curve":       {"http:demo", strings.Replace(jwkP256, `"x":"MK`, `"x":"MM`, 1), "P-256"},
		"half a key":                  {"http:demo", `{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4"}`, "P-256"},
		"a key to encrypt with":       {"http:demo", strings.Replace(jwkP256, "{", `{"use":"enc",`, 1), "P-256"},
		"a member that stands twice":  {"http:demo", strings.Replace(jwkP256, "{", `{"kty":"OKP",`, 1), "P-256"},
		"two keys":                    {"http:demo", jwkP256 + jwkEd25519, "P-256"},
		"a set of keys":               {"http:demo", `{"keys":[` + jwkP256 + `]}`, "P-256"},
		"an SSH key":                  {"mcp:demo", newSSHKey(t), "JWK"},
		"a key for PostgreSQL":        {"orders-db:read", jwkP256, "PostgreSQL"},
		"a key that is not certified": {"vault:demo-read", jwkP256, "certifies no key"},
	} {
		a := ask(c.scope)
		if a.PublicKey = c.key; c.scope == "orders-db:read" {
			a.Delivery = Gateway
		}
		if _, err := s.Decide(context.Background(), a); !errors.Is(err, ErrPublicKey) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "AQAB") || strings.Contains(err.Error(), "MKBC") {
			t.Errorf("%s: the error quotes it: %v", name, err)
		}
	}
}

func TestTheDemosDatabaseIsReachedWithTLSUnlessItIsOnThisMachine(t *testing.T) {
	for host, want := range map[string]string{"127.0.0.1": "off", "localhost": "off", "db.internal": "verify", "10.0.0.1": "verify"} {
		s, err := Parse("demo.yaml", Demo(&Connection{Host: host, Port: 5432, Database: "orders"}), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"orders-db:read", "orders-db:write"} {
			if sc, _ := s.Scope(name); sc.Access.TLS != want {
				t.Errorf("%s at %s: tls %s, want %s", name, host, sc.Access.TLS, want)
			}
		}
	}
}
