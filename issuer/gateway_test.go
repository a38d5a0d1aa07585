package issuer

import (
	"fmt"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// reports is a path scope of the gateway: Vault gives no lease for it.
const reports = `
  - name: reports:read
    target: http://reports
    sensitivity: low
    max_ttl: 15m
    ask: ["*"]
    engine: path
    vault: {path: secret/data/demo}
    delivery: [gateway]
    access:
      protocol: http
      upstream: http://demo.internal
      inject: {in: header, name: X-Key, value: "{{greeting}}"}
      routes: [{methods: [GET], paths: [/]}]
`

func TestWhatTheGatewayHoldsHangsOnAChildTokenWhateverEngineItIsFrom(t *testing.T) {
	b := newBench(t, benchOptions{postgres: true, catalogueOf: func(c *scopes.Connection) string {
		return withoutApprovals(string(scopes.Demo(c))) + reports
	}})
	for scope, field := range map[string]string{"orders-db:read": "", "http:demo": "key", "reports:read": "greeting"} {
		t.Run(scope, func(t *testing.T) {
			m := b.mint(ask{scope: scope, delivery: scopes.Gateway})
			d := m.Issued
			if d.Kind != "gateway" || !d.Revocable || d.Accessor == "" || (d.LeaseID != "") != (scope == "orders-db:read") {
				t.Fatalf("issued %+v", d)
			}
			if err := b.iss.Activate(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			secret := m.Credential.Password
			if field != "" {
				s := string(m.Credential.Data)
				_, rest, _ := strings.Cut(s, `"`+field+`":"`)
				secret, _, _ = strings.Cut(rest, `"`)
			}
			if len(secret) < 8 {
				t.Fatal("the gateway was given no secret")
			}
			if said := fmt.Sprintf("%v %+v %#v %s", m, m.Issued, m.Credential, m); strings.Contains(said, secret) {
				t.Error("it prints the secret")
			}
			if field == "" {
				conn, err := b.database(m.Credential)
				if err != nil {
					t.Fatal(err)
				}
				conn.Close(t.Context())
			}
			if _, err := b.root.Auth().Token().LookupAccessor(d.Accessor); err != nil {
				t.Fatalf("the child token is gone: %v", err)
			}
			if err := b.iss.Revoke(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			if _, err := b.root.Auth().Token().LookupAccessor(d.Accessor); err == nil {
				t.Error("the child token outlived its revocation")
			}
			if field == "" {
				if conn, err := b.database(m.Credential); err == nil {
					conn.Close(t.Context())
					t.Error("the role outlived its revocation")
				}
			}
		})
	}

	t.Run("other rules than the catalogue's", func(t *testing.T) {
		for name, change := range map[string]func(g *store.Grant){
			"none":  func(g *store.Grant) { g.Access = nil },
			"wider": func(g *store.Grant) { a := *g.Access; a.Masking = store.Masking{}; g.Access = &a },
		} {
			_, err := b.iss.Mint(t.Context(), b.warrant(ask{scope: "http:demo", delivery: scopes.Gateway,
				change: func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
					change(&d.Grant)
					i.Grant = d.Grant.Digest()
				}}))
			if err == nil || Stage(err) != stageGrant {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}
