package scopes

import (
	"fmt"
	"strings"
	"testing"
)

func TestEveryMistakeOfACatalogueIsToldWithItsPlaceAndItsRemedy(t *testing.T) {
	head := "scopes:\n  - name: a:b\n    target: t://x\n    sensitivity: low\n    max_ttl: 5m\n    ask: [ci]\n"
	token := head + "    engine: token\n    vault:\n      policies: [{path: secret/data/x, capabilities: [read]}]\n"
	path := head + "    engine: path\n    vault:\n"
	params := func(s string) string {
		return path + "      path: aws/creds/{{role}}\n    params:\n      - name: role\n" + s
	}
	kv := head + "    engine: kv\n    vault: {path: x}\n    delivery: [gateway]\n"
	base := "protocol: http, upstream: \"http://t.internal\", inject: {in: header, name: X-Api-Key, value: \"{{key}}\"}"
	http := func(s string) string { return kv + "    access: {" + base + ", " + s + "}\n" }
	db := func(s string) string {
		return head + "    engine: database\n    vault: {role: x}\n    connection: {host: h, database: d}\n    delivery: [gateway]\n    access: {" + s + "}\n"
	}
	mcp := func(s string) string {
		return kv + "    access: {" + strings.Replace(base, "http", "mcp", 1) + ", " + s + "}\n"
	}
	inject := func(s string) string {
		return kv + "    access: {protocol: http, upstream: \"http://t.internal\", routes: [{methods: [GET], paths: [/]}], inject: " + s + "}\n"
	}
	var b strings.Builder
	for _, c := range []struct{ name, catalogue string }{
		{"an empty file", ""},
		{"a comment alone", "# nothing\n"},
		{"not YAML", "scopes: [a\n"},
		{"a tab", "scopes:\n\t- name: a\n"},
		{"a list", "- a\n"},
		{"no scopes", "{}\n"},
		{"another key", "scope:\n  - name: a\n"},
		{"scopes empty", "scopes:\n"},
		{"scopes as an empty list", "scopes: []\n"},
		{"two documents", token + "---\nscopes: []\n"},
		{"a scope that is a word", "scopes: [a]\n"},
		{"a scope that is empty", "scopes:\n  -\n"},
		{"a scope without anything", "scopes:\n  - {}\n"},
		{"a scope with a name alone", "scopes:\n  - name: a\n"},
		{"everything wrong at once", `scopes:
  - name: Orders DB
    description: 7
    target: postgres orders
    sensitivity: high
    max_ttl: 5
    default_ttl: soon
    ask: ci-*
    engine: postgres
    vault: {}
    delivery: direct
    audiences: [x]
    retention: 90d
    approval: yes
`},
		{"duplicate keys", token + "    sensitivity: critical\n    ask: [nightly]\n"},
		{"a duplicate key in a flow mapping", head + "    engine: token\n    vault: {policies: [{path: secret/a, path: secret/b, capabilities: [read]}]}\n"},
		{"two scopes of one name", token + strings.TrimPrefix(token, "scopes:\n")},
		{"two scopes of one Vault name", token + strings.Replace(strings.TrimPrefix(token, "scopes:\n"), "a:b", "a.b", 1)},
		{"the broker's own Vault name", strings.Replace(token, "a:b", "broker", 1)},
		{"an anchor and an alias", strings.Replace(token, "[ci]", "&who [ci]", 1) + "    delivery: *who\n"},
		{"a merge key", token + "    <<: {delivery: [direct]}\n"},
		{"a tag", strings.Replace(token, "max_ttl: 5m", "max_ttl: !!str 5m", 1)},
		{"a directive", "%YAML 1.2\n---\n" + token},
		{"a complex key", token + "    ? retention\n    : 24h\n"},
		{"brackets without end", "scopes: " + strings.Repeat("[", 100)},
		{"lists without end", "scopes:\n" + strings.Repeat("- ", 100)},
		{"mappings without end", func() string {
			s := ""
			for i := range 100 {
				s += strings.Repeat(" ", i) + "a:\n"
			}
			return s
		}()},
		{"TTLs", strings.Replace(token, "max_ttl: 5m", "max_ttl: 25h", 1) + "    default_ttl: 1m\n"},
		{"a TTL of zero", strings.Replace(token, "max_ttl: 5m", "max_ttl: 0s", 1)},
		{"a default above the maximum", token + "    default_ttl: 6m\n"},
		{"a fraction of a second", token + "    default_ttl: 1500ms\n"},
		{"an identity that lives too long", "scopes:\n  - {name: a, target: t, sensitivity: low, max_ttl: 61m, ask: [ci], engine: identity, audience: [x]}\n"},
		{"an identity without audience", "scopes:\n  - {name: a, target: t, sensitivity: low, max_ttl: 1m, ask: [ci], engine: identity}\n"},
		{"an identity with an audience for all", "scopes:\n  - {name: a, target: t, sensitivity: low, max_ttl: 1m, ask: [ci], engine: identity, audience: [\"*\"]}\n"},
		{"an identity from Vault", "scopes:\n  - {name: a, target: t, sensitivity: low, max_ttl: 1m, ask: [ci], engine: identity, audience: [x], vault: {role: x}, delivery: [wrapped]}\n"},
		{"a path that cannot be revoked and lives too long", strings.Replace(path, "5m", "2h", 1) + "      path: aws/sts/x\n    revocable: false\n"},
		{"revocable elsewhere", token + "    revocable: false\n"},
		{"an ask that is a pattern", strings.Replace(token, "[ci]", `["ci-(a|b)", "", 7]`, 1)},
		{"a token with params", token + "    params: [{name: x, type: bool, default: true}]\n"},
		{"a token with a template", strings.Replace(token, "secret/data/x", "secret/data/{{x}}", 1)},
		{"a token over Vault itself", head + "    engine: token\n    vault:\n      policies:\n        - {path: sys/policies/acl/x, capabilities: [read]}\n        - {path: auth/token/create, capabilities: [update]}\n        - {path: \"*\", capabilities: [read]}\n        - {path: \"+/data\", capabilities: [read]}\n        - {path: \"sy*\", capabilities: [read]}\n        - {path: identity/*, capabilities: [read]}\n        - {path: secret/../sys/x, capabilities: [read]}\n        - {path: /secret/x, capabilities: [read]}\n        - {path: \"secret/x\\\" {}\", capabilities: [read]}\n        - {path: secret/*/x, capabilities: [read]}\n        - {path: secret/x, capabilities: [sudo, root, read, read]}\n        - {path: secret/x, capabilities: []}\n        - {path: secret/y}\n        - {capabilities: [read]}\n"},
		{"a path over Vault itself", path + "      path: sys/leases/lookup\n"},
		{"a mount over Vault itself", head + "    engine: database\n    vault: {mount: auth/token, role: x}\n    connection: {host: h, database: d}\n"},
		{"paths that are not plain", path + "      path: aws//creds/../{{x}}/\n"},
		{"a path whose mount is a param", path + "      path: \"{{m}}/creds/x\"\n    params: [{name: m, type: enum, values: [a, b], required: true}]\n"},
		{"a mount that is a param", head + "    engine: database\n    vault: {mount: \"{{m}}\", role: x}\n    connection: {host: h, database: d}\n"},
		{"templates that are none", path + "      path: aws/creds/{{ role }}\n"},
		{"a brace that does not close", path + "      path: aws/creds/{{role\n"},
		{"a brace that does not open", path + "      path: aws/creds/role}}\n"},
		{"a template without param", path + "      path: aws/creds/{{rolle}}\n    params: [{name: role, type: bool, default: true}]\n"},
		{"a built-in name outside data", path + "      path: aws/creds/{{ttl}}\n"},
		{"a param that may be missing", params("        type: string\n")},
		{"a param without type", params("        required: true\n")},
		{"a param that is required and has a default", params("        type: string\n        required: true\n        default: x\n")},
		{"a pattern that breaks out of its anchors", params("        type: string\n        required: true\n        pattern: \"a)|(.*\"\n")},
		{"a pattern that is none", params("        type: string\n        required: true\n        pattern: \"[a\"\n")},
		{"bounds of another type", params("        type: string\n        required: true\n        min: 1\n        values: [a]\n")},
		{"an int without bounds", params("        type: int\n        required: true\n")},
		{"an int with its bounds exchanged", params("        type: int\n        required: true\n        min: 5\n        max: 1\n")},
		{"an enum without values", params("        type: enum\n        required: true\n")},
		{"an enum with values that are no path", params("        type: enum\n        required: true\n        values: [a, ../b, \"x/y\"]\n")},
		{"a default that the param refuses", params("        type: string\n        pattern: \"[a-z]+\"\n        default: A\n")},
		{"a default that is no path", params("        type: string\n        default: ..\n")},
		{"a default of another type", params("        type: int\n        min: 1\n        max: 2\n        default: x\n")},
		{"a param named like a built-in", params("        type: string\n        required: true\n      - {name: ttl, type: bool}\n      - {name: Role, type: bool}\n      - {name: role, type: bool}\n")},
		{"data with method read", path + "      path: aws/creds/x\n      data: {a: b}\n"},
		{"a database without anything", head + "    engine: database\n    vault: {}\n"},
		{"a connection that is none", head + "    engine: database\n    vault: {role: x}\n    connection: {host: \"http://x\", port: 99999, database: 5}\n"},
		{"a certificate without a name", head + "    engine: pki\n    vault: {role: x, data: {ttl: 5m, alt_names: x}}\n"},
		{"an SSH certificate without principals", head + "    engine: ssh\n    vault: {role: x}\n"},
		{"a static secret handed out", head + "    engine: kv\n    vault: {path: x}\n    delivery: [direct]\n"},
		{"a static secret without delivery", head + "    engine: kv\n    vault: {path: x}\n"},
		{"masks without a gateway", token + "    masking: [email]\n"},
		{"an access without a gateway", token + "    access: {protocol: http}\n"},
		{"a gateway without an access", kv},
		{"an access that is a word", kv + "    access: http\n"},
		{"an access that says nothing", kv + "    access: {}\n"},
		{"an access of another protocol than its engine's", kv + "    access: {protocol: postgres}\n"},
		{"a database over HTTP", db("protocol: http")},
		{"an access with a protocol alone", kv + "    access: {protocol: http}\n"},
		{"an MCP access with a protocol alone", kv + "    access: {protocol: mcp}\n"},
		{"keys of another protocol", db("upstream: \"http://x\", inject: {}, routes: [], tools: [], statement: [select]")},
		{"upstreams that are none", strings.Join([]string{
			"scopes:",
			"  - {name: a, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "postgres://t", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: b, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://user:pass@t", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: c, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://t/?a=b#c", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: d, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://{{host}}", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: e, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://T.internal/", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: f, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://t/a/../b", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: g, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http://t:0", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
			"  - {name: h, target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {" + strings.Replace(base, "http://t.internal", "http:///x", 1) + ", routes: [{methods: [GET], paths: [/]}]}}",
		}, "\n")},
		{"a secret that goes nowhere", inject("{}")},
		{"a secret that goes in the body", inject("{in: body, name: x, value: \"{{key}}\"}")},
		{"a secret in a header of the gateway's own", inject("{in: header, name: host, value: \"{{key}}\"}")},
		{"a header with a line break in its name", inject("{in: header, name: \"X: y\", value: \"{{key}}\"}")},
		{"an inject without a secret", inject("{in: header, name: X-Api-Key, value: key}")},
		{"templates of a secret that are none", inject("{in: basic, username: \"{{ user }}\", password: \"{{key\"}")},
		{"a user name that ends early, and braces too many", inject("{in: basic, username: \"a:b\", password: \"{{{key}}}\"}")},
		{"an inject with the keys of another", inject("{in: query, name: \"a&b\", username: \"{{key}}\"}")},
		{"a signature for nobody", inject("{in: sigv4, region: \"EU Central\"}")},
		{"a signature towards an MCP server", kv + "    access: {protocol: mcp, upstream: \"http://t.internal\", tools: [x], inject: {in: sigv4, region: eu-central-1, service: x}}\n"},
		{"routes that are none", http(`routes: [{}, {methods: [get, CONNECT, "*"], paths: [orders, /a?b, "/a/../b", "/a//b", "/a*", "/%2e", /**]}, 7]`)},
		{"headers on record that hold secrets", http(`routes: [{methods: [GET], paths: [/]}], request_headers: [authorization, x-api-key, "a b", Accept, accept], response_headers: [Set-Cookie]`)},
		{"numbers out of bounds", http(`routes: [{methods: [GET], paths: [/]}], sample: 1000000, timeout: 1h, upgrade: 1`)},
		{"masks over an upgraded connection", http(`routes: [{methods: [GET], paths: [/]}], upgrade: true`) + "    masking: [email]\n"},
		{"statements, tables and functions that are none", db(`tls: disable, statements: [drop, SELECT], tables: ["orders; drop", "*.orders", a.b.c, ""], functions: ["*", "sales.*"], everywhere: true, sample: 0`)},
		{"tools that are none", mcp(`tools: [lookup, lookup, "a b", {scope: x}, {name: y, scope: "a:b"}, {name: "{{x}}"}, 7], resources: ["{{x}}"], prompts: []`)},
		{"tools whose scope does not do", mcp(`tools: [{name: t1, scope: "no:such"}, {name: t2, scope: "vault:x"}, {name: t3, scope: "other:upstream"}, {name: t4, scope: "other:tools"}, {name: t5, scope: "other:tools"}, {name: t6, scope: "other:tools"}, {name: "t*", scope: "other:tools"}, {name: t7, scope: "other:tools"}, {name: t8, scope: "other:tools"}]`) + `
  - {name: "vault:x", target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: token, vault: {policies: [{path: secret/x, capabilities: [read]}]}}
  - {name: "other:upstream", target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {protocol: mcp, upstream: "http://other.internal", inject: {in: query, name: key, value: "{{key}}"}, tools: ["*"]}}
  - {name: "other:tools", target: t, sensitivity: low, max_ttl: 5m, ask: [ci], engine: kv, vault: {path: x}, delivery: [gateway], access: {protocol: mcp, upstream: "http://t.internal", inject: {in: query, name: key, value: "{{key}}"}, tools: ["t5*", {name: t6, scope: "no:such"}, "t7*", {name: "t7", scope: "vault:x"}, {name: "*8", scope: "vault:x"}, "t8*", t6x]}}
`},
		{"masks that are none", http("routes: [{methods: [GET], paths: [/]}]") + `    masking:
      - "a b"
      - email
      - field: email
      - {field: "*"}
      - {field: a, detector: email}
      - {}
      - {member: a}
      - {path: "$"}
      - {path: "$.a[-1]"}
      - {path: "$.a[?@.b]"}
      - {path: "$.a-b"}
      - {path: "$.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a"}
      - {path: "customers[*].email"}
      - {detector: passport}
      - {column: orders.email}
      - {type: text}
      - 7
`},
		{"masks that a database cannot keep", db("tables: [orders]") + "    masking: [{path: $.a}, {column: email}, {column: a.b.c.d}, {type: \"Double Precision\"}]\n"},
		{"an approval rule without groups", token + "    approval: {expires: 1h}\n"},
		{"an approval rule with everything wrong", token + `    approval:
      groups: [{group: "d b a", count: 0}, {group: sre}, {group: sre}, {count: 1}]
      expires: 1s
      hours: {from: "8:00", to: 18, days: [mon, Funday], zone: Mars/Olympus}
      reasons: {requester: "yes", reviewer: true}
      passkey: 1
`},
		{"hours that never come", token + "    approval: {groups: [{group: sre}], hours: {from: \"08:00\", to: \"08:00\"}}\n"},
		{"a control character", strings.Replace(token, "t://x", `"t://x\u0007"`, 1)},
		{"a file too large", token + strings.Repeat("#\n", maxFile/2)},
		{"more mistakes than are told", "scopes:\n" + strings.Repeat("  - 1\n", 300)},
	} {
		_, err := Parse("catalogue.yaml", []byte(c.catalogue), "", nil)
		if err == nil {
			t.Errorf("%s: it loads", c.name)
			continue
		}
		text := err.Error()
		if n := strings.Count(text, "\n"); n > 20 {
			text = strings.Join(strings.SplitN(text, "\n", 3)[:2], "\n") + fmt.Sprintf("\n... and %d more", n-1)
		}
		fmt.Fprintf(&b, "# %s\n%s\n\n", c.name, text)
	}
	golden(t, "catalogue-errors.txt", b.String())
}
