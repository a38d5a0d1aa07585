package main

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
)

// The catalogue checks rules by itself, since it stands below the gateway: what
// it takes must be what the gateway understands, or a session would be refused
// that people approved.
func TestWhatTheCatalogueTakesTheGatewayUnderstands(t *testing.T) {
	const head = `scopes:
  - {name: "x:y", target: t, sensitivity: low, max_ttl: 5m, ask: [ci], `
	const http1 = head + `engine: kv, vault: {path: x}, delivery: [gateway], access: {protocol: http, upstream: "http://t.internal", routes: [{methods: [GET], paths: [/]}], `
	taken := 0
	parse := func(text string) *scopes.Scope {
		set, err := scopes.Parse("c.yaml", []byte(text), "", nil)
		if err != nil {
			return nil
		}
		taken++
		return set.Scopes()[0]
	}
	mask := func(engine, rule string) {
		text := http1 + `inject: {in: header, name: X-Key, value: "{{key}}"}}`
		if engine == "database" {
			text = head + `engine: database, vault: {role: x}, connection: {host: h, database: d}, delivery: [gateway]`
		}
		sc := parse(text + ", masking: [" + rule + "]}\n")
		if sc == nil {
			return
		}
		if _, err := masking.New(sc.Masking); err != nil {
			t.Errorf("the catalogue takes %s, the gateway does not: %v", rule, err)
		}
	}
	for _, path := range []string{
		"$", "$.a", "$.a.b", "$..a", "$..*", "$.*", "$[*]", "$[0]", "$[00]", "$[01]", "$[-1]", "$[999999999]", "$[9999999999]", "$.a[*].b", "$..[0]", "$..['a']", "$['a b']",
		"$['']", `$['a\'b']`, `$['a\nb']`, `$["a"]`, "$['a','b']", "$[0,1]", "$[1:2]", "$[?@.a]", "$.a-b", "$.1a", "$.é", "$['é']", "$[' ]']", "$.a ", " $.a", "a", "$a", "$...a", "$..", "$.", "$[", "$[]", "$[*",
		"$" + strings.Repeat(".a", 32), "$" + strings.Repeat(".a", 33), "$" + strings.Repeat("[*]", 33), "$['" + strings.Repeat("n", 64) + "']",
	} {
		mask("kv", fmt.Sprintf("{path: %q}", path))
	}
	for _, s := range []string{"a", "a.b", "a.b.c", "a.b.c.d", ".a.b", "a..b", "Ä.ö", "a.b$", "a b.c", "A.B", "*", "jsonb", "text[]", "varchar(10)", "double precision", "timestamp with time zone", "_text", "pg_catalog.text", "email", "card", "iban", "phone", "secret", "entropy", "e-mail", "x.y-z"} {
		for _, kind := range []string{"field", "column", "type", "detector"} {
			mask("kv", fmt.Sprintf("{%s: %q}", kind, s))
			mask("database", fmt.Sprintf("{%s: %q}", kind, s))
		}
	}
	secret := &issuer.Credential{Data: jsontext.Value(`{"data":{"key":"s3cr3t-value","api-key":"s3cr3t-value","a.b":"s3cr3t-value","KEY_1":"s3cr3t-value"},"metadata":{}}`)}
	for _, name := range []string{"Authorization", "x-api-key", "Cookie", "Host", "Content-Length", "content-encoding", "Expect", "TE", "Upgrade", "X Y", "X:Y", "X\u00e9"} {
		for _, value := range []string{"{{key}}", "Bearer {{api-key}}", "{{a.b}}:{{KEY_1}}", "{{ key }}", "{{key}", "}}{{key}}", "{{{key}}}", "{{}}", "key"} {
			for _, way := range []string{"in: header, name: %q, value: %q", "in: query, name: %q, value: %q", "in: basic, username: %q, password: %q"} {
				sc := parse(http1 + "inject: {" + fmt.Sprintf(way, name, value) + "}}}\n")
				if sc == nil {
					continue
				}
				req, err := http.NewRequestWithContext(t.Context(), "GET", "http://t.internal/?a=b", nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := inject.Apply(req, sc.Access.Inject, secret); err != nil {
					t.Errorf("the catalogue takes %s %q %q, the gateway does not: %v", way, name, value, err)
				}
			}
		}
	}
	if taken < 60 {
		t.Errorf("the catalogue took %d of them", taken)
	}
	// The catalogues that people begin with.
	doc, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "```yaml\nscopes:")
	example, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("docs/policy.md has no catalogue")
	}
	for _, text := range []string{string(scopes.Demo(&scopes.Connection{Host: "h", Port: 5432, Database: "d"})), "scopes:" + example} {
		set, err := scopes.Parse("c.yaml", []byte(text), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, sc := range set.Scopes() {
			if _, err := masking.New(sc.Masking); err != nil {
				t.Errorf("%s: %v", sc.Name, err)
			}
		}
	}
}
