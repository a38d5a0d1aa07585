package scopes

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl"
)

// every is a catalogue with what the demo's has not: paths with params, and
// several of everything.
const every = `
  - name: aws:deploy
    target: aws://deploy
    sensitivity: sensitive
    max_ttl: 1h
    ask: ["*"]
    engine: path
    vault: {path: "aws/creds/{{stage}}/{{account}}-deploy"}
    params:
      - {name: stage, type: enum, values: [test, live], required: true}
      - {name: account, type: int, min: 1, max: 9, required: true}
  - name: aws:session
    target: aws://session
    sensitivity: sensitive
    max_ttl: 1h
    ask: ["*"]
    engine: path
    revocable: false
    vault: {path: "aws/sts/{{role}}", method: write, data: {ttl: "{{ttl}}"}}
    params:
      - {name: role, type: string, required: true}
  - name: secret:many
    target: vault://secret
    sensitivity: critical
    max_ttl: 24h
    ask: ["*"]
    engine: token
    vault:
      policies:
        - {path: secret/data/team/+/config, capabilities: [read, list]}
        - {path: secret/metadata/team/*, capabilities: [list]}
        - {path: secret/data/team/private/config, capabilities: [deny]}
  - name: cert
    target: pki://x
    sensitivity: low
    max_ttl: 24h
    ask: ["*"]
    engine: pki
    vault: {mount: team/pki, role: "{{role}}", data: {common_name: "a.example.com"}}
    params:
      - {name: role, type: enum, values: [server, client], required: true}
`

func TestTheVaultPlanIsTheLeastThatTheCatalogueNeeds(t *testing.T) {
	for name, s := range map[string]*Set{"vault-demo.sh": demoSet(t, ""), "vault-every.sh": set(t, every)} {
		var b bytes.Buffer
		p := VaultSetup(s, VaultOptions{})
		if err := p.Format(&b); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.String())
		for _, x := range p.Policies {
			if _, err := hcl.Parse(x.HCL); err != nil {
				t.Errorf("%s: %v", x.Name, err)
			}
		}
		if p.Policies[len(p.Policies)-1].Name != p.Broker || len(p.Policies) != len(p.Roles)+1 {
			t.Error("the broker's policy is not the last")
		}
	}
}

func TestTheBrokersPolicyReachesNothingButItsOwnWork(t *testing.T) {
	p := VaultSetup(demoSet(t, ""), VaultOptions{BrokerPolicy: "our-broker"})
	broker := p.Policies[len(p.Policies)-1]
	if broker.Name != "our-broker" {
		t.Errorf("its name is %s", broker.Name)
	}
	for _, word := range []string{"sudo", "root", `"*"`, "policies", "auth/token/roles", "auth/token/create\"", "secret/", "\"database/creds/orders-read\"", "delete", "list"} {
		if strings.Contains(broker.HCL, word) {
			t.Errorf("it holds %s:\n%s", word, broker.HCL)
		}
	}
	// A catalogue of identities alone needs no more of Vault than a login.
	s := set(t, "\n  - {name: a, target: t, sensitivity: low, max_ttl: 1m, ask: [x], engine: identity, audience: [x]}\n")
	only := VaultSetup(s, VaultOptions{})
	if len(only.Roles) != 0 || len(only.Policies) != 1 || strings.Contains(only.Policies[0].HCL, "create") || strings.Contains(only.Policies[0].HCL, "revoke") {
		t.Errorf("got %+v", only)
	}
}

func TestTheCommandsOfTheVaultPlanAreSafeInAShell(t *testing.T) {
	var b bytes.Buffer
	p := VaultSetup(demoSet(t, ""), VaultOptions{BrokerPolicy: "it's; touch /tmp/x $(id)"})
	if err := p.Format(&b); err != nil {
		t.Fatal(err)
	}
	// A shell reads the commands with a vault that prints its arguments.
	cmd := exec.Command("sh", "-eu")
	cmd.Stdin = strings.NewReader("vault() { for a in \"$@\"; do printf '<%s>' \"$a\"; done; echo; if [ \"$1\" = policy ]; then cat >/dev/null; fi; }\n" + b.String())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != len(p.Policies)+len(p.Roles) {
		t.Errorf("%d commands ran:\n%s", len(lines), out)
	}
	if !slices.Contains(lines, "<policy><write><it's; touch /tmp/x $(id)><->") {
		t.Errorf("the name was read by the shell:\n%s", out)
	}
}
