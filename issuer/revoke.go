package issuer

import (
	"context"
	"errors"
	"fmt"

	"github.com/countersign-dev/countersign/store"
)

// Revoke ends a credential, synchronously: when it returns nil, Vault has
// ended it. What Vault no longer knows counts as ended, so that Revoke may be
// repeated. It goes on after a failure, to end as much as it can, and returns
// all of them.
//
// The lease goes first: revoking the token only queues the leases that hang
// on it. A secret that was delivered wrapped keeps its lease to itself; Vault
// ends that one just after its token.
func (i *Issuer) Revoke(ctx context.Context, d store.IssuedDetails) error {
	if i.client == nil {
		// Minted when there was a Vault. Nobody can say that it is revoked; that
		// its own TTL has ended it, the clock can.
		if d.Accessor == "" && d.LeaseID == "" && d.WrappingAccessor == "" || !i.cfg.Now().Before(d.Expires.Time) {
			return nil
		}
		return &StageError{stageAccessor, fmt.Errorf("%w: none is configured, so it ends by its own TTL alone", ErrVaultUnavailable)}
	}
	var errs []error
	if d.LeaseID != "" {
		// POST sys/leases/revoke
		_, err := i.client.Logical().WriteWithContext(ctx, "sys/leases/revoke", map[string]any{"lease_id": d.LeaseID, "sync": true})
		switch {
		case said(err, "invalid lease", "lease not found"):
		case said(err, "failed to revoke entry"):
			// HTTP 400, though it is the target that failed. Vault keeps the lease.
			errs = append(errs, &StageError{stageLease, fmt.Errorf("%w: it could not end the lease at its target; try again when the target answers", ErrVaultUnavailable)})
		default:
			errs = append(errs, i.failed(stageLease, err))
		}
	}
	if d.Accessor != "" {
		errs = append(errs, i.revokeAccessor(ctx, stageAccessor, d.Accessor))
	}
	if d.WrappingAccessor != "" {
		errs = append(errs, i.revokeAccessor(ctx, stageWrapping, d.WrappingAccessor))
	}
	return errors.Join(errs...)
}

func (i *Issuer) revokeAccessor(ctx context.Context, stage, accessor string) error {
	// POST auth/token/revoke-accessor
	_, err := i.client.Logical().WriteWithContext(ctx, "auth/token/revoke-accessor", map[string]any{"accessor": accessor})
	// "token not found": the accessor is still there, and the token under it is
	// being revoked by another call. Vault refuses it from the moment that begins.
	if err != nil && said(err, "invalid accessor", "token not found") {
		return nil
	}
	return i.failed(stage, err)
}
