package store

import (
	"errors"
	"fmt"
	"time"
)

// MaxIntentAge is how old an intent may be, by the recorder's time, when the
// issuer turns to Vault.
const MaxIntentAge = 30 * time.Second

// ErrWarrant is wrapped by every reason not to mint.
var ErrWarrant = errors.New("no warrant to mint")

// Warrant is what the issuer must be shown before it mints: proof that the
// request, the decisions on it, and the intent to mint are on record.
type Warrant struct {
	Request   Receipt   // of step.requested
	Decisions []Receipt // of approval.decided, where people had to decide
	Intent    Receipt   // of credential.issuing
}

// Warranted is what a valid warrant allows.
type Warranted struct {
	Request *Entry
	Intent  *Entry
	Grant   Grant
	Issuing IssuingDetails
}

// Verify checks the proofs of w against the log's key and its entries against
// each other, at now. Errors wrap ErrWarrant. It does not know the catalogue:
// whether the grant is what the scope gives is the issuer's to check, and so is
// that no intent is used twice.
func (w *Warrant) Verify(log *LogVerifier, now time.Time) (*Warranted, error) {
	refuse := func(format string, a ...any) (*Warranted, error) {
		return nil, fmt.Errorf("%w: %w", ErrWarrant, fmt.Errorf(format, a...))
	}
	req, err := log.Check(w.Request)
	if err != nil {
		return refuse("request: %w", err)
	}
	intent, err := log.Check(w.Intent)
	if err != nil {
		return refuse("intent: %w", err)
	}
	switch {
	case req.Type != StepRequested:
		return refuse("entry %d is %s, not step.requested", w.Request.Index, req.Type)
	case intent.Type != CredentialIssuing:
		return refuse("entry %d is %s, not credential.issuing", w.Intent.Index, intent.Type)
	case intent.Request != req.Request || intent.Orchestrator != req.Orchestrator || intent.Run != req.Run || intent.Step != req.Step || intent.Action != req.Action || intent.Agent != req.Agent:
		return refuse("the intent is of another request")
	case w.Intent.Index <= w.Request.Index:
		return refuse("the intent precedes its request")
	case req.Decision == nil || req.Decision.Outcome != Allow:
		return refuse("the request was not allowed")
	case intent.Decision == nil || intent.Decision.Outcome != Allow:
		return refuse("the intent carries no decision that allows it")
	}
	rd, err := DetailsAs[RequestedDetails](req)
	if err != nil {
		return refuse("%w", err)
	}
	id, err := DetailsAs[IssuingDetails](intent)
	if err != nil {
		return refuse("%w", err)
	}
	switch age := now.Sub(intent.Time.Time); {
	case id.Grant != rd.Grant.Digest():
		return refuse("the intent grants something other than what was requested")
	case age > MaxIntentAge:
		return refuse("the intent is %s old, at most %s", age.Round(time.Millisecond), MaxIntentAge)
	case age < -MaxIntentAge:
		return refuse("the intent lies %s in the future: compare the clocks of recorder and broker", (-age).Round(time.Millisecond))
	case !id.NotPast.After(now):
		return refuse("the credential would have ended already")
	}
	return &Warranted{Request: req, Intent: intent, Grant: rd.Grant, Issuing: id}, nil
}
