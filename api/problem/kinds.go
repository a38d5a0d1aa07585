package problem

import (
	"fmt"
	"net/http"
	"time"
)

// The slugs of the problems this program sends.
const (
	SlugMalformed           = "malformed"
	SlugUnauthenticated     = "unauthenticated"
	SlugRoleForbidden       = "role-forbidden"
	SlugScopeDenied         = "scope-denied"
	SlugApprovalDenied      = "approval-denied"
	SlugApprovalExpired     = "approval-expired"
	SlugRequestChanged      = "request-changed"
	SlugSelfApproval        = "self-approval"
	SlugNotAnApprover       = "not-an-approver"
	SlugFrozen              = "frozen"
	SlugPasskeyRequired     = "passkey-required"
	SlugNotFound            = "not-found"
	SlugMethodNotAllowed    = "method-not-allowed"
	SlugIdempotencyConflict = "idempotency-conflict"
	SlugRequestClosed       = "request-closed"
	SlugBodyTooLarge        = "body-too-large"
	SlugUnknownScope        = "unknown-scope"
	SlugTTLTooLong          = "ttl-too-long"
	SlugTTLInvalid          = "ttl-invalid"
	SlugReasonRequired      = "reason-required"
	SlugParamsInvalid       = "params-invalid"
	SlugDeliveryUnsupported = "delivery-unsupported"
	SlugRateLimited         = "rate-limited"
	SlugInternal            = "internal"
	SlugVaultUnavailable    = "vault-unavailable"
	SlugLedgerUnavailable   = "ledger-unavailable"
	SlugStateUnavailable    = "state-unavailable"
	SlugShuttingDown        = "shutting-down"
)

// kinds has status and title of every slug.
var kinds = map[string]struct {
	status int
	title  string
}{
	SlugMalformed:           {http.StatusBadRequest, "The request is malformed"},
	SlugUnauthenticated:     {http.StatusUnauthorized, "The caller is not known"},
	SlugRoleForbidden:       {http.StatusForbidden, "This caller may not make this call"},
	SlugScopeDenied:         {http.StatusForbidden, "Policy denies this scope"},
	SlugApprovalDenied:      {http.StatusForbidden, "A person denied the request"},
	SlugApprovalExpired:     {http.StatusForbidden, "Nobody decided in time"},
	SlugRequestChanged:      {http.StatusForbidden, "What would be granted has changed since it was approved"},
	SlugSelfApproval:        {http.StatusForbidden, "Nobody approves their own request"},
	SlugNotAnApprover:       {http.StatusForbidden, "This person is not among those who approve this"},
	SlugFrozen:              {http.StatusForbidden, "A freeze covers this request"},
	SlugPasskeyRequired:     {http.StatusForbidden, "The decision must be signed with a passkey"},
	SlugNotFound:            {http.StatusNotFound, "There is nothing here"},
	SlugMethodNotAllowed:    {http.StatusMethodNotAllowed, "The method is not allowed here"},
	SlugIdempotencyConflict: {http.StatusConflict, "The idempotency key was used for something else"},
	SlugRequestClosed:       {http.StatusConflict, "The request is not open to this"},
	SlugBodyTooLarge:        {http.StatusRequestEntityTooLarge, "The body is too large"},
	SlugUnknownScope:        {http.StatusUnprocessableEntity, "The scope is not in the catalogue"},
	SlugTTLTooLong:          {http.StatusUnprocessableEntity, "The TTL is longer than the scope allows"},
	SlugTTLInvalid:          {http.StatusUnprocessableEntity, "The TTL is not valid"},
	SlugReasonRequired:      {http.StatusUnprocessableEntity, "A reason is required"},
	SlugParamsInvalid:       {http.StatusUnprocessableEntity, "The params are not valid for the scope"},
	SlugDeliveryUnsupported: {http.StatusUnprocessableEntity, "The scope does not offer this delivery"},
	SlugRateLimited:         {http.StatusTooManyRequests, "Too many requests"},
	SlugInternal:            {http.StatusInternalServerError, "An internal error"},
	SlugVaultUnavailable:    {http.StatusServiceUnavailable, "Vault does not answer"},
	SlugLedgerUnavailable:   {http.StatusServiceUnavailable, "The ledger does not answer"},
	SlugStateUnavailable:    {http.StatusServiceUnavailable, "The state of what is under way is not available"},
	SlugShuttingDown:        {http.StatusServiceUnavailable, "The server is shutting down"},
}

// Slugs returns every slug with its status.
func Slugs() map[string]int {
	m := make(map[string]int, len(kinds))
	for s, k := range kinds {
		m[s] = k.status
	}
	return m
}

func of(slug, detail string) *Problem {
	k := kinds[slug]
	return &Problem{Type: base + slug, Title: k.title, Status: k.status, Detail: detail}
}

// retry is when a caller may try again after the failure of something that is
// usually back within seconds.
const retry = 2 * time.Second

// Malformed: the request cannot be read. 400.
func Malformed(detail string) *Problem { return of(SlugMalformed, detail) }

// Unauthenticated: no credential, or none that is known. 401. Which of the two
// and why is logged, not told.
func Unauthenticated() *Problem {
	return of(SlugUnauthenticated, "send a valid credential as Authorization: Bearer TOKEN")
}

// RoleForbidden: the caller is known, and this call is not for its role. 403.
func RoleForbidden(detail string) *Problem { return of(SlugRoleForbidden, detail) }

// ScopeDenied: policy said no. The reasons are the policy's. 403.
func ScopeDenied(detail string, reasons ...string) *Problem {
	p := of(SlugScopeDenied, detail)
	if len(reasons) > 0 {
		p.With("reasons", reasons)
	}
	return p
}

// ApprovalDenied: a person said no. 403.
func ApprovalDenied(detail string) *Problem { return of(SlugApprovalDenied, detail) }

// ApprovalExpired: nobody decided in time. 403.
func ApprovalExpired(detail string) *Problem { return of(SlugApprovalExpired, detail) }

// RequestChanged: what would be granted is no longer what was approved. 403.
func RequestChanged(detail string) *Problem { return of(SlugRequestChanged, detail) }

// SelfApproval: the person is on the requester's side. 403.
func SelfApproval(detail string) *Problem { return of(SlugSelfApproval, detail) }

// NotAnApprover: the person is in none of the rule's groups. 403.
func NotAnApprover(detail string) *Problem { return of(SlugNotAnApprover, detail) }

// Frozen: a freeze covers what was asked for. 403.
func Frozen(detail string) *Problem { return of(SlugFrozen, detail) }

// PasskeyRequired: the rule asks for a signed decision. 403.
func PasskeyRequired(detail string) *Problem { return of(SlugPasskeyRequired, detail) }

// NotFound: there is no such thing, or it is another's. 404.
func NotFound(detail string) *Problem { return of(SlugNotFound, detail) }

// MethodNotAllowed: the path exists, the method on it does not. 405.
func MethodNotAllowed(method string) *Problem {
	return of(SlugMethodNotAllowed, fmt.Sprintf("%.16q is not a method of this path", method))
}

// IdempotencyConflict: the key, or the ID, stands for another body. 409.
func IdempotencyConflict(detail string) *Problem { return of(SlugIdempotencyConflict, detail) }

// RequestClosed: the request is not in a state that allows this. 409.
func RequestClosed(detail string) *Problem { return of(SlugRequestClosed, detail) }

// BodyTooLarge: more than limit bytes. 413.
func BodyTooLarge(limit int64) *Problem {
	return of(SlugBodyTooLarge, fmt.Sprintf("the body may have at most %d bytes", limit))
}

// UnknownScope: the catalogue has no such scope for this caller. 422.
func UnknownScope(detail string) *Problem { return of(SlugUnknownScope, detail) }

// TTLTooLong: longer than the scope's ceiling. 422.
func TTLTooLong(detail string) *Problem { return of(SlugTTLTooLong, detail) }

// TTLInvalid: zero, negative or no duration. 422.
func TTLInvalid(detail string) *Problem { return of(SlugTTLInvalid, detail) }

// ReasonRequired: the scope wants a reason. 422.
func ReasonRequired(detail string) *Problem { return of(SlugReasonRequired, detail) }

// ParamsInvalid: params, public key or audience do not fit the scope. 422.
func ParamsInvalid(detail string) *Problem { return of(SlugParamsInvalid, detail) }

// DeliveryUnsupported: the scope is not delivered that way. 422.
func DeliveryUnsupported(detail string) *Problem { return of(SlugDeliveryUnsupported, detail) }

// RateLimited: too much, try again after. 429.
func RateLimited(detail string, after time.Duration) *Problem {
	return of(SlugRateLimited, detail).Retry(max(after, time.Second))
}

// Internal: our own mistake. err is logged under the request's ID; the caller
// gets the ID and nothing of err. 500.
func Internal(err error) *Problem {
	return of(SlugInternal, "the cause is in the server's log under this document's instance").Because(err)
}

// VaultUnavailable: Vault is sealed, down, slow or refuses us. 503.
func VaultUnavailable() *Problem {
	return of(SlugVaultUnavailable, "no credential was issued").Retry(retry)
}

// LedgerUnavailable: what must be on record first cannot be recorded. 503.
func LedgerUnavailable() *Problem {
	return of(SlugLedgerUnavailable, "nothing is issued that is not on record first").Retry(retry)
}

// StateUnavailable: what is under way cannot be known. 503.
func StateUnavailable() *Problem {
	return of(SlugStateUnavailable, "what is under way cannot be known now, so nothing is begun").Retry(retry)
}

// ShuttingDown: ask another instance, or this one when it is back. 503.
func ShuttingDown() *Problem {
	return of(SlugShuttingDown, "ask another instance, or this one when it is back").Retry(retry)
}
