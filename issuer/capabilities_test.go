package issuer

import (
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl"

	"github.com/countersign-dev/countersign/scopes"
)

func TestTheBrokerIsAskedForWhatThePlanGrantsAndNoMore(t *testing.T) {
	demo := string(scopes.Demo(&scopes.Connection{Host: "127.0.0.1", Port: 5432, Database: "demo"}))
	all := strings.Split(demo, "\n  - name: ")
	// only is the demo catalogue with the scopes of names alone.
	only := func(names ...string) *scopes.Set {
		text := "scopes:"
		for _, s := range all[1:] {
			if name, _, _ := strings.Cut(s, "\n"); slices.Contains(names, name) {
				text += "\n  - name: " + s
			}
		}
		set, err := scopes.Parse("c.yaml", []byte(text), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(set.Scopes()) != len(names) {
			t.Fatalf("of %q there are %d", names, len(set.Scopes()))
		}
		return set
	}
	whole, err := scopes.Parse("c.yaml", []byte(demo), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		set              *scopes.Set
		children, leases bool
	}{
		"identities alone":     {only("identity:step"), false, false},
		"the gateway's alone":  {only("http:demo"), true, false},
		"tokens without lease": {only("vault:demo-read"), true, false},
		"certificates":         {only("pki:service", "ssh:deploy"), true, false},
		"database roles":       {only("orders-db:read", "identity:step"), true, true},
		"everything":           {whole, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			plan := scopes.VaultSetup(c.set, scopes.VaultOptions{})
			var policy struct {
				Path map[string]struct {
					Capabilities []string `hcl:"capabilities"`
				} `hcl:"path"`
			}
			if err := hcl.Decode(&policy, plan.Policies[len(plan.Policies)-1].HCL); err != nil {
				t.Fatal(err)
			}
			asked := map[string]bool{"sys/capabilities-self": true} // with which the others are asked for
			for _, m := range capabilities(c.set) {
				asked[m.Path] = true
				if !slices.Contains(policy.Path[m.Path].Capabilities, m.Capability) {
					t.Errorf("it is asked for what the plan does not grant: %s", m)
				}
			}
			for path := range policy.Path {
				if !asked[path] {
					t.Errorf("the plan grants %s, which is not asked for", path)
				}
			}
			if asked["auth/token/revoke-accessor"] != c.children || asked["auth/token/renew-accessor"] != c.children || asked["sys/leases/revoke"] != c.leases {
				t.Errorf("asked for %v", asked)
			}
		})
	}
}
