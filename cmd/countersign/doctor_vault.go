package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// vault looks at Vault: as the broker, and, where an operator's token was given,
// at what the broker may not read.
func (d *doctor) vault(ctx context.Context, c *serveConfig, set *scopes.Set, id *issuer.Identity) {
	what := "vault.addr " + c.Vault.Addr
	v, err := vaultClient(c.Vault.Addr, c.Vault.Namespace, c.Vault.CA, zap.NewNop())
	if err != nil {
		d.fault("vault", what, "%v", err)
		return
	}
	before := d.now()
	health, err := v.Sys().HealthWithContext(ctx)
	if !d.look("vault", what, quiet(err), "answers") {
		return
	}
	if health.Sealed || !health.Initialized {
		d.fault("vault-sealed", what, "is sealed: %t, initialised: %t", health.Sealed, health.Initialized)
		return
	}
	d.ok("vault-sealed", what, "unsealed, "+health.Version)
	d.clock("vault", before, time.Unix(health.ServerTimeUTC, 0), time.Second)

	token, err := c.Vault.login(ctx, v)
	if err != nil {
		d.fault("vault-login", what, "%v", quiet(err))
		return
	}
	v.SetToken(token)
	if !d.vaultToken(ctx, v, c.Vault.AppRole != nil) {
		return
	}
	d.capabilities(ctx, c, set, id, token)
	d.broad(ctx, v)
	if d.operator == "" {
		for _, check := range []string{"vault-role", "vault-policy", "vault-ttl", "database-role", "vault-audit"} {
			d.skip(check, what, "the broker may not look: give --vault-token-file with an operator's token")
		}
		return
	}
	op, err := v.Clone()
	if err != nil {
		d.unchecked("vault-role", what, err)
		return
	}
	op.SetHeaders(v.Headers())
	op.SetToken(d.operator)
	d.asOperator(ctx, op, set)
}

// quiet leaves out of an error of the Vault client all but the status: its texts
// may repeat what was sent.
func quiet(err error) error {
	var re *api.ResponseError
	if errors.As(err, &re) {
		return fmt.Errorf("Vault answered %d %s", re.StatusCode, http.StatusText(re.StatusCode))
	}
	return err
}

// login is the broker's token: the one in its file, or one by AppRole.
func (c *vaultConfig) login(ctx context.Context, v *api.Client) (string, error) {
	if c.AppRole == nil {
		return readSecret(c.Token)
	}
	secret, err := readSecret(c.AppRole.SecretID)
	if err != nil {
		return "", err
	}
	mount := c.AppRole.Mount
	if mount == "" {
		mount = "approle"
	}
	s, err := v.Logical().WriteWithContext(ctx, "auth/"+mount+"/login", map[string]any{"role_id": c.AppRole.RoleID, "secret_id": secret})
	if err != nil {
		return "", err
	}
	if s == nil || s.Auth == nil {
		return "", fmt.Errorf("auth/%s gave no token", mount)
	}
	return s.Auth.ClientToken, nil
}

// vaultToken looks at the broker's own token, and renews it.
func (d *doctor) vaultToken(ctx context.Context, v *api.Client, again bool) bool {
	s, err := v.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		d.fault("vault-login", "vault", "%v", quiet(err))
		return false
	}
	policies, _ := s.TokenPolicies()
	d.ok("vault-login", "vault", "policies "+strings.Join(policies, ", "))
	if slices.Contains(policies, "root") {
		d.warn("vault-broad", "vault", "its login is a root token")
		return true
	}
	ttl, _ := s.TokenTTL()
	renewable, _ := s.TokenIsRenewable()
	switch {
	case again: // logs in anew when its token ends
		d.ok("vault-renew", "vault", "by AppRole")
	case !renewable:
		d.fault("vault-renew", "vault", "its token ends in %s and cannot be renewed", ttl.Round(time.Second))
	default:
		if _, err := v.Auth().Token().RenewSelfWithContext(ctx, 0); err != nil {
			d.fault("vault-renew", "vault", "%v", quiet(err))
			break
		}
		if number(s.Data["period"]) == 0 {
			d.warn("vault-renew", "vault", "its token is not periodic, and ends for good at Vault's max_lease_ttl")
			break
		}
		d.ok("vault-renew", "vault", "periodic")
	}
	return true
}

// number is a number as Vault sends it: in seconds where it is a time.
func number(v any) int64 {
	n, ok := v.(json.Number)
	if !ok {
		return 0
	}
	i, _ := n.Int64()
	return i
}

// capabilities asks Vault what the login may do of what the catalogue needs.
func (d *doctor) capabilities(ctx context.Context, c *serveConfig, set *scopes.Set, id *issuer.Identity, token string) {
	log, err := store.NewLogVerifier(c.Recorder.LogKey)
	if err != nil {
		return // said by recorder
	}
	i, err := issuer.New(ctx, issuer.Config{
		Addr: c.Vault.Addr, Namespace: c.Vault.Namespace, CA: c.Vault.CA, Login: issuer.Login{Token: token},
		TrustDomain: c.TrustDomain, Log: log, Scopes: func() *scopes.Set { return set }, Identity: id, FirstTTL: c.FirstTTL,
	})
	if err != nil {
		d.fault("vault-capability", "vault", "%v", err)
		return
	}
	defer i.Close()
	missing, err := i.CheckCapabilities(ctx)
	if err != nil {
		d.unchecked("vault-capability", "vault", err)
		return
	}
	for _, m := range missing {
		what := m.Scope
		if what == "" {
			what = "every scope"
		}
		d.fault("vault-capability", what, "%s on %s is missing: %s", m.Capability, m.Path, m.Note)
	}
	if len(missing) == 0 {
		d.ok("vault-capability", "vault", "all that the catalogue needs")
	}
}

// broad asks whether the login may do what no broker needs: with it, whoever
// takes the broker over has more than its scopes.
func (d *doctor) broad(ctx context.Context, v *api.Client) {
	paths := []string{"sys/policies/acl/countersign", "auth/token/roles/countersign", "auth/token/create", "sys/mounts/countersign", "sys/audit/countersign"}
	s, err := v.Logical().WriteWithContext(ctx, "sys/capabilities-self", map[string]any{"paths": paths})
	if err != nil || s == nil {
		return // said by capabilities
	}
	var may []string
	for _, p := range paths {
		have, _ := s.Data[p].([]any)
		if slices.ContainsFunc(have, func(c any) bool { return c == "root" || c == "create" || c == "update" || c == "sudo" }) {
			may = append(may, p)
		}
	}
	if len(may) > 0 {
		d.warn("vault-broad", "vault", "it may write %s", strings.Join(may, ", "))
	} else {
		d.ok("vault-broad", "vault", "")
	}
}

// asOperator looks at roles, ceilings and audit devices.
func (d *doctor) asOperator(ctx context.Context, v *api.Client, set *scopes.Set) {
	plan := scopes.VaultSetup(set, scopes.VaultOptions{})
	policies := map[string]string{}
	for _, p := range plan.Policies {
		policies[p.Name] = p.HCL
	}
	read := func(check, what, path string) (map[string]any, bool) {
		s, err := v.Logical().ReadWithContext(ctx, path)
		if err != nil {
			d.unchecked(check, what, fmt.Errorf("reading %s: %w", path, quiet(err)))
			return nil, false
		}
		if s == nil {
			return nil, true
		}
		return s.Data, true
	}
	ceilings := map[string]time.Duration{} // by mount
	ceiling := func(what, mount string) time.Duration {
		if _, ok := ceilings[mount]; !ok {
			if data, ok := read("vault-ttl", what, "sys/mounts/"+mount+"/tune"); ok {
				ceilings[mount] = time.Duration(number(data["max_lease_ttl"])) * time.Second
			}
		}
		return ceilings[mount]
	}
	for _, s := range set.Scopes() {
		if s.Engine == scopes.Identity {
			continue
		}
		name := s.VaultName()
		if role, ok := read("vault-role", s.Name, "auth/token/roles/"+name); ok {
			if wrong := roleFaults(s, name, role); len(wrong) > 0 {
				d.fault("vault-role", s.Name, "auth/token/roles/%s %s", name, strings.Join(wrong, ", "))
			} else {
				d.ok("vault-role", s.Name, name)
			}
		}
		if data, ok := read("vault-policy", s.Name, "sys/policies/acl/"+name); ok {
			switch text, _ := data["policy"].(string); {
			case data == nil:
				d.fault("vault-policy", s.Name, "the policy %s is missing", name)
			case strings.TrimSpace(text) != strings.TrimSpace(policies[name]):
				d.warn("vault-policy", s.Name, "the policy %s is not what the catalogue asks for", name)
			default:
				d.ok("vault-policy", s.Name, name)
			}
		}
		mounts := []string{"auth/token"}
		if s.Vault.Mount != "" && s.Engine != scopes.KV {
			mounts = append(mounts, s.Vault.Mount)
		}
		for _, m := range mounts {
			if max := ceiling(s.Name, m); max > 0 && max < s.MaxTTL {
				d.fault("vault-ttl", s.Name, "max_lease_ttl of %s is %s, the scope's max_ttl %s", m, max, s.MaxTTL)
			} else if max > 0 {
				d.ok("vault-ttl", s.Name, m+" "+max.String())
			}
		}
		if s.Engine == scopes.Database && !strings.Contains(s.Vault.Role, "{{") {
			d.databaseRole(s, read)
		}
	}
	devices, err := v.Sys().ListAuditWithContext(ctx)
	switch {
	case err != nil:
		d.unchecked("vault-audit", "vault", fmt.Errorf("reading sys/audit: %w", quiet(err)))
	case len(devices) == 0:
		d.warn("vault-audit", "vault", "no audit device is enabled: what was done with a minted token leaves no trace")
	default:
		d.ok("vault-audit", "vault", fmt.Sprintf("%d", len(devices)))
	}
}

// roleFaults is what is wrong with the token role of s.
func roleFaults(s *scopes.Scope, name string, role map[string]any) (wrong []string) {
	if role == nil {
		return []string{"is missing"}
	}
	for _, x := range []struct{ field, why string }{
		{"orphan", "steps' tokens would end with the broker's own"},
		{"renewable", "a step's token would end after first_ttl"},
		{"token_no_default_policy", "steps' tokens could do what the default policy lets them"},
	} {
		if role[x.field] != true {
			wrong = append(wrong, fmt.Sprintf("has %s=%v (%s)", x.field, role[x.field], x.why))
		}
	}
	if allowed, _ := role["allowed_policies"].([]any); len(allowed) != 1 || allowed[0] != name {
		wrong = append(wrong, fmt.Sprintf("allows the policies %v, not %s alone", role["allowed_policies"], name))
	}
	if max := time.Duration(number(role["token_explicit_max_ttl"])) * time.Second; max > 0 && max < s.MaxTTL {
		wrong = append(wrong, fmt.Sprintf("has token_explicit_max_ttl=%s, and the scope's max_ttl is %s", max, s.MaxTTL))
	}
	if number(role["token_period"]) > 0 {
		wrong = append(wrong, "has token_period set: a step's token would never end")
	}
	if role["token_type"] == "batch" {
		wrong = append(wrong, "has token_type=batch: a step's token could not be revoked")
	}
	return wrong
}

func (d *doctor) databaseRole(s *scopes.Scope, read func(check, what, path string) (map[string]any, bool)) {
	path := s.Vault.Mount + "/roles/" + s.Vault.Role
	role, ok := read("database-role", s.Name, path)
	if !ok {
		return
	}
	if role == nil {
		d.fault("database-role", s.Name, "%s is missing", path)
		return
	}
	d.ok("database-role", s.Name, path)
	def, max := time.Duration(number(role["default_ttl"]))*time.Second, time.Duration(number(role["max_ttl"]))*time.Second
	if def > 0 && def < s.MaxTTL || max > 0 && max < s.MaxTTL {
		d.fault("database-ttl", s.Name, "%s has default_ttl=%s and max_ttl=%s, and the scope's max_ttl is %s: the credential would end before its step does", path, def, max, s.MaxTTL)
	} else {
		d.ok("database-ttl", s.Name, "")
	}
	db, _ := role["db_name"].(string)
	conf, ok := read("database-sessions", s.Name, s.Vault.Mount+"/config/"+db)
	if plugin, _ := conf["plugin_name"].(string); !ok || !strings.Contains(plugin, "postgresql") {
		return
	}
	statements, _ := role["revocation_statements"].([]any)
	if !strings.Contains(fmt.Sprint(statements...), "pg_terminate_backend") {
		d.warn("database-sessions", s.Name, "%s has revocation_statements that leave open sessions as they are", path)
	} else {
		d.ok("database-sessions", s.Name, "")
	}
}
