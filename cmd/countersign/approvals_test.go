package main

import (
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/scopes"
)

func TestATerminalIsShownAllThatTheGatewayLetsThroughAndHides(t *testing.T) {
	set, err := scopes.Parse("demo.yaml", scopes.Demo(&scopes.Connection{Host: "127.0.0.1", Port: 5432, Database: "orders"}), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, wants := range map[string][]string{
		"http:demo":       {"gateway goes to  http://demo.internal\n", "in: header\n", "value: Bearer {{key}}\n", "GET /customers/*\n", "email, in any object or table\n", "Content-Type\n", "first 1024 bytes of each body, masked\n"},
		"orders-db:write": {"127.0.0.1:5432/orders\n", "off: without TLS", "statements       select, insert, update, delete\n", "tables           orders\n", "the column orders.email\n"},
		"mcp:demo":        {"http://mcp.demo.internal\n", "lookup_order\n", "refund_order, where mcp:demo-refund is granted for the call\n", "what looks like an e-mail address (email)\n"},
	} {
		g, err := set.Resolve(name, time.Minute, nil, scopes.Gateway, "", "")
		if err != nil {
			t.Fatal(err)
		}
		// As the recorder's API tells it.
		body, err := json.Marshal(&approvals.Request{Grant: g})
		if err != nil {
			t.Fatal(err)
		}
		var r approvals.Request
		if err := json.Unmarshal(body, &r); err != nil || r.Grant.Digest() != g.Digest() {
			t.Fatalf("%s: read from JSON it is another grant: %v", name, err)
		}
		var b strings.Builder
		if err := printApproval(&b, &r); err != nil {
			t.Fatal(err)
		}
		for _, want := range append(wants, g.Access.Digest()) {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%s: it is not told %q:\n%s", name, want, b.String())
			}
		}
		// A text that tries to pass for a row of its own does not.
		g.Access.Upstream = "http://x\ndelivery         direct\x1b[2J"
		b.Reset()
		if err := printApproval(&b, &approvals.Request{Grant: g}); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(b.String(), "\ndelivery         direct") || strings.Contains(b.String(), "\x1b") {
			t.Errorf("%s: the text breaks out:\n%s", name, b.String())
		}
	}
}
