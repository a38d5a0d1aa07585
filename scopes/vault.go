package scopes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	vaultapi "github.com/hashicorp/vault/api"
)

// roleSlack is how much longer than max_ttl a child token may live by its
// role, so that a mint that takes a moment is not cut short: the child starts
// with a short TTL and is renewed once it is on record. What ends a child is
// the explicit max TTL that the issuer gives it; the role's is there for a
// mistake of the issuer.
const roleSlack = time.Minute

// maxPaths bounds how many paths of one scope are written out where enum
// params stand in it.
const maxPaths = 100

// VaultOptions are the operator's choices for a VaultPlan.
type VaultOptions struct {
	BrokerPolicy string // name of the broker's own policy; "countersign-broker" by default
}

// VaultPlan is what a catalogue needs in Vault, and no more.
type VaultPlan struct {
	Policies []VaultPolicy // one per scope, and the broker's last
	Roles    []TokenRole   // one per scope
	Broker   string        // name of the broker's policy, the last of Policies
}

// VaultPolicy is an ACL policy.
type VaultPolicy struct {
	Name string
	HCL  string
}

// TokenRole is a role of auth/token/roles.
type TokenRole struct {
	Name   string
	Fields map[string]any // strings, bools and []string
}

// rule is one path of a policy.
type rule struct {
	comment      string
	path         string
	capabilities []string
	parameters   map[string][]string // allowed_parameters
}

// VaultSetup derives from a catalogue the policies and token roles that it
// needs. Each scope gets a policy and a token role of one name: the broker may
// make tokens under the roles and nothing else, and what a token can reach is
// fixed by the policy, which the broker cannot write. What the gateway delivers
// is read by a child token as well: the session dies with it.
func VaultSetup(set *Set, opts VaultOptions) *VaultPlan {
	p := &VaultPlan{Broker: opts.BrokerPolicy}
	if p.Broker == "" {
		p.Broker = "countersign-broker"
	}
	var create []rule
	var leases []string
	for _, sc := range set.Scopes() {
		if sc.Engine == Identity {
			continue
		}
		name := sc.VaultName()
		rules := sc.vaultRules()
		p.Policies = append(p.Policies, VaultPolicy{name, acl("What a step granted "+sc.Name+" may do.", rules)})
		p.Roles = append(p.Roles, TokenRole{name, map[string]any{
			"allowed_policies":        []string{name},
			"orphan":                  true, // outlives the broker's own token, and dies by its own TTL
			"renewable":               true, // the child is renewed once, when it is on record
			"token_no_default_policy": true,
			"token_type":              "service",
			"token_explicit_max_ttl":  strconv.Itoa(int((sc.MaxTTL+roleSlack)/time.Second)) + "s",
		}})
		create = append(create, rule{path: "auth/token/create/" + name, capabilities: []string{"update"}})
		if sc.Revocable && sc.Engine != Token && sc.Engine != KV { // neither has a lease of its own
			for _, r := range rules {
				// A lease is named after the path that gave it. A glob may
				// stand at the end alone, so that a lease ID is held to what
				// comes before the first segment that a param fills.
				prefix, _, _ := strings.Cut(r.path+"/", "+")
				if prefix = prefix + "*"; !slices.Contains(leases, prefix) {
					leases = append(leases, prefix)
				}
			}
		}
	}
	broker := slices.Clone(create)
	if len(create) > 0 {
		broker[0].comment = "Make a child token for one step, under the role of its scope."
		broker = append(broker,
			rule{"Extend a child once it is on record, and end it, by its accessor.", "auth/token/renew-accessor", []string{"update"}, nil},
			rule{"", "auth/token/revoke-accessor", []string{"update"}, nil},
		)
	}
	if len(leases) > 0 {
		slices.Sort(leases)
		broker = append(broker, rule{"End the leases of children at once, and no other lease.", "sys/leases/revoke", []string{"update"},
			map[string][]string{"lease_id": leases, "sync": nil}})
	}
	broker = append(broker,
		rule{"Keep the broker's own login alive, and see what it may do.", "auth/token/renew-self", []string{"update"}, nil},
		rule{"", "auth/token/lookup-self", []string{"read"}, nil},
		rule{"", "sys/capabilities-self", []string{"update"}, nil},
	)
	p.Policies = append(p.Policies, VaultPolicy{p.Broker, acl("What Countersign's broker may do.", broker)})
	return p
}

// vaultRules are what sc's child token may do.
func (sc *Scope) vaultRules() []rule {
	if sc.Engine == Token {
		var out []rule
		for _, p := range sc.Vault.Policies {
			out = append(out, rule{path: p.Path, capabilities: p.Capabilities})
		}
		return out
	}
	capabilities := []string{"read"}
	if sc.Vault.Method == "write" {
		capabilities = []string{"create", "update"}
	}
	var out []rule
	for _, path := range sc.policyPaths() {
		out = append(out, rule{path: path, capabilities: capabilities})
		if sc.Engine == PKI {
			role := strings.TrimPrefix(path, sc.Vault.Mount+"/issue/")
			out = append(out, rule{path: sc.Vault.Mount + "/sign/" + role, capabilities: capabilities})
		}
	}
	return out
}

// policyPaths are the paths that sc's template can give: each value of an enum
// written out, and + for a segment that holds another param, since the policy
// is written before any value is known.
func (sc *Scope) policyPaths() []string {
	paths := []template{sc.path}
	for _, p := range sc.Params {
		if p.Type != EnumParam || !slices.Contains(sc.path.params(), p.Name) || len(paths)*len(p.Values) > maxPaths {
			continue
		}
		var next []template
		for _, t := range paths {
			for _, v := range p.Values {
				filled := slices.Clone(t)
				for i := range filled {
					if filled[i].param == p.Name {
						filled[i] = part{literal: v}
					}
				}
				next = append(next, filled)
			}
		}
		paths = next
	}
	var out []string
	for _, t := range paths {
		marked := ""
		for _, part := range t {
			if part.param != "" {
				marked += "+"
			} else {
				marked += part.literal
			}
		}
		segments := strings.Split(marked, "/")
		for i, s := range segments {
			if strings.Contains(s, "+") {
				segments[i] = "+"
			}
		}
		if path := strings.Join(segments, "/"); !slices.Contains(out, path) {
			out = append(out, path)
		}
	}
	return out
}

// acl writes a policy. Every string in it was checked by the catalogue to hold
// nothing that HCL or Vault's policy templates would read; the quoting is
// there so that this does not rest on the check alone.
func acl(title string, rules []rule) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n", title)
	for _, r := range rules {
		b.WriteString("\n")
		if r.comment != "" {
			fmt.Fprintf(&b, "# %s\n", r.comment)
		}
		fmt.Fprintf(&b, "path %q {\n  capabilities = [%s]\n", r.path, quoted(r.capabilities))
		if len(r.parameters) > 0 {
			b.WriteString("  allowed_parameters = {\n")
			for _, name := range slices.Sorted(maps.Keys(r.parameters)) {
				fmt.Fprintf(&b, "    %q = [%s]\n", name, quoted(r.parameters[name]))
			}
			b.WriteString("  }\n")
		}
		b.WriteString("}\n")
	}
	return b.String()
}

func quoted(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = strconv.Quote(s)
	}
	return strings.Join(out, ", ")
}

// Format writes p as vault commands that can be pasted into a POSIX shell.
func (p *VaultPlan) Format(w io.Writer) error {
	var b strings.Builder
	b.WriteString("# What this catalogue needs in Vault. Paste it into a shell whose VAULT_ADDR and\n" +
		"# VAULT_TOKEN are those of an operator who may write policies and token roles.\n" +
		"# The secret engines' mounts and roles are yours to set up.\n")
	for _, x := range p.Policies {
		fmt.Fprintf(&b, "\nvault policy write %s - <<'EOF'\n%sEOF\n", shell(x.Name), x.HCL)
	}
	for _, x := range p.Roles {
		fmt.Fprintf(&b, "\nvault write %s", shell("auth/token/roles/"+x.Name))
		for _, key := range slices.Sorted(maps.Keys(x.Fields)) {
			value := fmt.Sprint(x.Fields[key])
			if list, ok := x.Fields[key].([]string); ok {
				value = strings.Join(list, ",")
			}
			fmt.Fprintf(&b, " \\\n    %s", shell(key+"="+value))
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "\n# Give the broker's login this policy and no other, for an AppRole:\n#   vault write auth/approle/role/countersign token_policies=%s token_no_default_policy=true\n", shell(p.Broker))
	_, err := io.WriteString(w, b.String())
	return err
}

// shell quotes s for a POSIX shell where it needs it.
func shell(s string) string {
	if s != "" && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./=,:") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Apply writes p to Vault with the rights of client: an operator's, never the
// broker's. It can be done again.
func (p *VaultPlan) Apply(ctx context.Context, client *vaultapi.Client) error {
	if client == nil {
		return errors.New("apply the Vault plan: no client")
	}
	for _, x := range p.Policies {
		if err := client.Sys().PutPolicyWithContext(ctx, x.Name, x.HCL); err != nil {
			return fmt.Errorf("write the Vault policy %s: %w", x.Name, err)
		}
	}
	for _, x := range p.Roles {
		if _, err := client.Logical().WriteWithContext(ctx, "auth/token/roles/"+x.Name, x.Fields); err != nil {
			return fmt.Errorf("write the Vault token role %s: %w", x.Name, err)
		}
	}
	return nil
}
