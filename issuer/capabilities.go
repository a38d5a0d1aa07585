package issuer

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/hashicorp/vault/api"

	"github.com/countersign-dev/countersign/scopes"
)

// Missing is a capability that the login lacks.
type Missing struct {
	Scope      string // empty where every scope needs it
	Path       string
	Capability string
	Note       string // what it is for, and what to do
}

// String says what is missing, for whom, and what to do.
func (m Missing) String() string {
	who := "the broker"
	if m.Scope != "" {
		who = "scope " + m.Scope
	}
	return who + " lacks " + m.Capability + " on " + m.Path + ": " + m.Note
}

const planned = "`countersign scopes vault` prints the policy"

// capabilities are what the login needs for set: what scopes.VaultSetup grants
// it, and no more, so that a login made by the plan is never found wanting.
func capabilities(set *scopes.Set) []Missing {
	needs := []Missing{
		{"", "auth/token/lookup-self", "read", "the login is watched with it; " + planned},
		{"", "auth/token/renew-self", "update", "the login is renewed with it; " + planned},
	}
	children, leases := false, false
	for _, s := range set.Scopes() {
		if s.Engine == scopes.Identity {
			continue // asks nothing of Vault here
		}
		needs = append(needs, Missing{s.Name, "auth/token/create/" + s.VaultName(), "update", "a step's token is made with it; " + planned})
		children = true
		leases = leases || s.Revocable && s.Engine != scopes.Token && s.Engine != scopes.KV
	}
	if children {
		needs = append(needs,
			Missing{"", "auth/token/renew-accessor", "update", "a step's token is lengthened with it; " + planned},
			Missing{"", "auth/token/revoke-accessor", "update", "a step's token is revoked with it; " + planned},
		)
	}
	if leases {
		needs = append(needs, Missing{"", "sys/leases/revoke", "update", "a step's lease is revoked with it; " + planned})
	}
	return needs
}

// CheckCapabilities asks Vault what the login may do (sys/capabilities-self)
// and returns what is missing of what the catalogue in force needs.
func (i *Issuer) CheckCapabilities(ctx context.Context) ([]Missing, error) {
	if i.client == nil {
		return nil, nil
	}
	needs := capabilities(i.cfg.Scopes())
	paths := make([]string, len(needs))
	for n, m := range needs {
		paths[n] = m.Path
	}
	// POST sys/capabilities-self
	answer, err := i.client.Logical().WriteWithContext(ctx, "sys/capabilities-self", map[string]any{"paths": paths})
	var re *api.ResponseError
	if errors.As(err, &re) && re.StatusCode == http.StatusForbidden {
		i.keeper.look()
		return []Missing{{"", "sys/capabilities-self", "update", "nothing else could be checked; " + planned}}, nil
	}
	if err != nil {
		return nil, vaultError(stageAbilities, err)
	}
	var missing []Missing
	for _, m := range needs {
		var have []any
		if answer != nil {
			have, _ = answer.Data[m.Path].([]any)
		}
		if !slices.Contains(have, any(m.Capability)) && !slices.Contains(have, any("root")) {
			missing = append(missing, m)
		}
	}
	return missing, nil
}
