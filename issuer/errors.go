package issuer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/api"
)

// ErrVaultUnavailable is wrapped when Vault could not be reached, did not
// answer in time, is sealed, is overloaded (429) or answered 5xx. The same
// call may succeed later.
var ErrVaultUnavailable = errors.New("vault unavailable")

// ErrVaultRefused is wrapped when Vault answered and said no (400, 403, 404),
// or answered something that cannot be handed out. The operator has to change
// a policy, a role or the catalogue; trying again does not help.
var ErrVaultRefused = errors.New("vault refused")

// StageError says at which call of a mint or a revocation it failed. Its text
// holds no secret: of what Vault said, only phrases known to be harmless are
// kept.
type StageError struct {
	Stage string // such as "create-token", "secret", "renew-accessor"
	Err   error
}

func (e *StageError) Error() string { return e.Stage + ": " + e.Err.Error() }

// Unwrap returns the error below.
func (e *StageError) Unwrap() error { return e.Err }

// Stage returns the stage at which err happened, or "" when it names none.
func Stage(err error) string {
	var s *StageError
	if errors.As(err, &s) {
		return s.Stage
	}
	return ""
}

// The stages of mint, activation and revocation.
const (
	stageWarrant   = "warrant"
	stageGrant     = "grant"
	stageCreate    = "create-token"
	stageSecret    = "secret"
	stageReply     = "reply"
	stageDrop      = "revoke-child"
	stageIdentity  = "sign-identity"
	stageActivate  = "renew-accessor"
	stageLease     = "revoke-lease"
	stageAccessor  = "revoke-accessor"
	stageWrapping  = "revoke-wrapping"
	stageLogin     = "login"
	stageAbilities = "capabilities"
)

// harmless lists what Vault may be quoted with. An error text of Vault's can
// repeat what it was sent (a database plugin quotes statements), so nothing
// else of it is passed on.
var harmless = []string{
	"permission denied", "invalid token", "bad token", "Vault is sealed", "invalid accessor", "token not found", "invalid lease",
	"unknown role", "no handler for route", "unsupported path", "unsupported operation", "role not found",
	"could not be found", "rate limit quota exceeded", "local node not active", "request timed out",
	"TTL is larger than", "context deadline exceeded",
}

// vaultError sorts an error of the Vault client under ErrVaultUnavailable or
// ErrVaultRefused, at stage, with nothing in it that Vault was sent or
// answered beyond harmless phrases.
func vaultError(stage string, err error) error {
	if err == nil {
		return nil
	}
	var re *api.ResponseError
	if !errors.As(err, &re) {
		// No answer: a connection that failed, a time that ran out, or an answer
		// that was no JSON. The transport's errors name an address and no more;
		// a decoder's could quote the answer, so only the first kind is kept.
		why := "no usable answer"
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			why = "no answer in time"
		case errors.Is(err, context.Canceled):
			why = "the call was given up"
		case isNetwork(err):
			why = networkReason(err)
		}
		return &StageError{stage, fmt.Errorf("%w: %s", ErrVaultUnavailable, why)}
	}
	kind := ErrVaultRefused
	if re.StatusCode >= 500 || re.StatusCode == http.StatusTooManyRequests {
		kind = ErrVaultUnavailable
	}
	said := ""
	for _, e := range re.Errors {
		for _, h := range harmless {
			if strings.Contains(e, h) && !strings.Contains(said, h) {
				said += ", " + h
			}
		}
	}
	return &StageError{stage, fmt.Errorf("%w: HTTP %d%s", kind, re.StatusCode, said)}
}

// said reports whether Vault's answer contains one of phrases.
func said(err error, phrases ...string) bool {
	var re *api.ResponseError
	if !errors.As(err, &re) {
		return false
	}
	for _, e := range re.Errors {
		for _, p := range phrases {
			if strings.Contains(e, p) {
				return true
			}
		}
	}
	return false
}

// isNetwork reports whether err says that no connection could be had or kept.
func isNetwork(err error) bool { return networkReason(err) != "" }

// networkReason says in words of our own or of the operating system why there
// was no connection, and never what came over one.
func networkReason(err error) string {
	var verify *tls.CertificateVerificationError
	var op *net.OpError
	switch {
	case errors.As(err, &verify):
		return "Vault's certificate is not trusted: " + verify.Err.Error()
	case errors.As(err, &op) && op.Op == "dial":
		return op.Error() // the address and the operating system's reason
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection broke"
	}
	return ""
}
