package steps

import (
	"errors"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// toProblem says which problem an error of the flow is.
func toProblem(err error) error {
	var (
		p      *problem.Problem
		denied *broker.Denied
	)
	if errors.As(err, &p) {
		return p
	}
	if errors.As(err, &denied) {
		return problem.ScopeDenied(strings.Join(denied.Reasons, "; "), denied.Reasons...).With("request", denied.Request)
	}
	var limited *broker.Limited
	if errors.As(err, &limited) {
		return problem.RateLimited(limited.Error(), limited.After).With("limit", limited.Of+"."+limited.What).Because(err)
	}
	var ended *broker.NotApproved
	if errors.As(err, &ended) {
		make, detail := problem.RequestChanged, "what would be granted, or who must approve it, is no longer what was asked; ask again"
		switch ended.Status {
		case store.StatusDenied:
			make, detail = problem.ApprovalDenied, "a person denied it"
		case store.StatusExpired:
			make, detail = problem.ApprovalExpired, "it was not approved, or not collected, in time"
		}
		return make(detail).With("request", ended.Request)
	}
	if _, weak := store.IsOrder(err, store.OrderWeak); weak {
		return problem.ScopeDenied("the recorder's catalogue or owners differ from this broker's; its operator finds in the log how").Because(err)
	}
	if _, refused := store.IsOrder(err); refused {
		// The ledger's own words name other requests.
		return problem.RequestClosed("the ledger does not take this now").Because(err)
	}
	for _, k := range []struct {
		is   error
		make func(error) *problem.Problem
	}{
		{scopes.ErrPolicy, func(error) *problem.Problem { return problem.ScopeDenied("the policy could not be evaluated") }},
		{broker.ErrMalformed, func(err error) *problem.Problem { return problem.Malformed(err.Error()) }},
		{broker.ErrClosed, func(error) *problem.Problem {
			return problem.RequestClosed("it was answered, ended or taken back, or another call is taking what it came to")
		}},
		{broker.ErrFrozen, func(error) *problem.Problem {
			return problem.Frozen("a freeze covers this, or did while it was under way; ask again once the freeze is lifted")
		}},
		{broker.ErrIdempotency, func(error) *problem.Problem {
			return problem.IdempotencyConflict("this Idempotency-Key was sent with another body")
		}},
		{broker.ErrNotFound, func(error) *problem.Problem { return problem.NotFound("this caller has no such request") }},
		{broker.ErrShuttingDown, func(error) *problem.Problem { return problem.ShuttingDown() }},
		{scopes.ErrUnknownScope, func(err error) *problem.Problem { return problem.UnknownScope(err.Error()) }},
		{scopes.ErrTTLTooLong, func(err error) *problem.Problem { return problem.TTLTooLong(err.Error()) }},
		{scopes.ErrTTLInvalid, func(err error) *problem.Problem { return problem.TTLInvalid(err.Error()) }},
		{scopes.ErrParams, func(err error) *problem.Problem { return problem.ParamsInvalid(err.Error()) }},
		{scopes.ErrPublicKey, func(err error) *problem.Problem { return problem.ParamsInvalid(err.Error()) }},
		{scopes.ErrDelivery, func(err error) *problem.Problem { return problem.DeliveryUnsupported(err.Error()) }},
		{gateway.ErrFull, func(error) *problem.Problem {
			return problem.RateLimited("the gateway holds as many sessions as it may; end steps that are over", 5*time.Second)
		}},
		{scopes.ErrReasonRequired, func(err error) *problem.Problem { return problem.ReasonRequired(err.Error()) }},
		{issuer.ErrVaultUnavailable, func(error) *problem.Problem { return problem.VaultUnavailable() }},
		{issuer.ErrVaultRefused, func(error) *problem.Problem { return problem.VaultUnavailable() }},
		{inflight.ErrUnavailable, func(error) *problem.Problem { return problem.StateUnavailable() }},
	} {
		if errors.Is(err, k.is) {
			return k.make(err).Because(err)
		}
	}
	return err // what is left is the ledger's, or our own mistake: problem.From knows
}
