package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
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
	Request Receipt // of step.requested
	Intent  Receipt // of credential.issuing
	// Approval proves what people approved, nil where nobody had to.
	Approval *Approval
}

// Approval is the proof that people approved. Requested and Decisions are of the
// request itself, or of the one whose standing approval it draws on.
type Approval struct {
	Requested Receipt   // of approval.requested
	Decisions []Receipt // of the approvals that fill the rule's seats
	Passkeys  []Receipt // passkey.enrolled, .activated and .revoked of those who decided, in the log's order
}

// Warranted is what a valid warrant allows.
type Warranted struct {
	Request *Entry
	Intent  *Entry
	Grant   Grant
	Issuing IssuingDetails
	// Rule is the rule that was met; nil where nobody had to approve.
	Rule *Rule
}

// Verify checks the proofs of w against the log's key and its entries against
// each other, at now. Errors wrap ErrWarrant, and ErrUnavailable too where the
// intent is not of now: by the clocks nobody can say what it allows. It does not know the catalogue:
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
	case req.Decision == nil || req.Decision.Outcome != Allow && req.Decision.Outcome != NeedsApproval:
		return refuse("the request was not allowed")
	case (req.Decision.Outcome == NeedsApproval) != (w.Approval != nil):
		return refuse("the request needs approval and none is shown, or the other way round")
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
		return refuse("%w: the intent is %s old, at most %s: compare the clocks of recorder and broker", ErrUnavailable, age.Round(time.Millisecond), MaxIntentAge)
	case age < -MaxIntentAge:
		return refuse("%w: the intent lies %s in the future, at most %s: compare the clocks of recorder and broker", ErrUnavailable, (-age).Round(time.Millisecond), MaxIntentAge)
	case !id.NotPast.After(now):
		return refuse("the credential would have ended already")
	}
	out := &Warranted{Request: req, Intent: intent, Grant: rd.Grant, Issuing: id}
	if w.Approval != nil {
		if out.Rule, err = w.Approval.verify(log, req, &rd, intent, &id, w.Intent.Index); err != nil {
			return refuse("approval: %w", err)
		}
	}
	return out, nil
}

// verify checks that people approved what intent would mint, and returns the
// rule they met.
func (a *Approval) verify(log *LogVerifier, req *Entry, rd *RequestedDetails, intent *Entry, id *IssuingDetails, before int64) (*Rule, error) {
	if len(a.Decisions) > maxVotes || len(a.Passkeys) > 2*maxVotes {
		return nil, errors.New("too many decisions")
	}
	asked, err := log.Check(a.Requested)
	if err != nil {
		return nil, err
	}
	if asked.Type != ApprovalRequested {
		return nil, fmt.Errorf("entry %d is %s, not approval.requested", a.Requested.Index, asked.Type)
	}
	ad, err := DetailsAs[ApprovalRequestedDetails](asked)
	if err != nil {
		return nil, err
	}
	rule, excluded := ad.Rule, ad.Excluded
	standing := rd.Standing != nil
	switch {
	case standing && (rd.Standing.Request != asked.Request || asked.Orchestrator != req.Orchestrator || asked.Run != req.Run):
		return nil, errors.New("the standing approval is of another run")
	case !standing && (asked.Request != req.Request || asked.Orchestrator != req.Orchestrator || asked.Run != req.Run || asked.Step != req.Step || asked.Action != req.Action || asked.Agent != req.Agent):
		return nil, errors.New("the approval is of another request")
	case !standing && ad.Grant.Digest() != rd.Grant.Digest():
		return nil, errors.New("people were shown something other than what would be granted")
	case id.Approval != asked.Request:
		return nil, errors.New("the intent points at another approval")
	case rule.Valid() != nil:
		return nil, rule.Valid()
	}
	if standing {
		rule, excluded = rd.Standing.Rule, append(slices.Clone(excluded), rd.Standing.Excluded...)
		if rule.Valid() != nil {
			return nil, rule.Valid()
		}
		if rule.Passkey && !ad.Rule.Passkey {
			return nil, errors.New("the standing approval was not signed with passkeys")
		}
	}
	for _, e := range []*Entry{asked, req} {
		if e.Subject != nil {
			excluded = append(excluded, e.Subject.ID)
		}
	}
	keys, err := a.signed(log)
	if err != nil {
		return nil, err
	}
	requested := HashText(LeafHash(a.Requested.Leaf))
	var votes []Vote
	var latest Time
	for _, r := range a.Decisions {
		e, err := log.Check(r)
		if err != nil {
			return nil, err
		}
		d, err := DetailsAs[DecidedDetails](e)
		if err != nil {
			return nil, err
		}
		switch {
		case !e.Type.IsDecision() || e.Person == nil || *e.Person == "":
			return nil, fmt.Errorf("entry %d is no decision", r.Index)
		case d.Decision != Approve:
			return nil, fmt.Errorf("decision %d is a denial", r.Index)
		case d.Requested != requested || d.Approval != ad.Approval:
			return nil, fmt.Errorf("decision %d is on something else", r.Index)
		case r.Index <= a.Requested.Index || r.Index >= before:
			return nil, fmt.Errorf("decision %d does not lie between what was asked and the intent", r.Index)
		case !e.Time.Before(asked.Time.Add(time.Duration(ad.Rule.Expires))):
			return nil, fmt.Errorf("decision %d came after the request had expired", r.Index)
		case slices.Contains(excluded, *e.Person):
			return nil, fmt.Errorf("decision %d is by a person on the requester's side", r.Index)
		case ad.Rule.Hours != nil && !ad.Rule.Hours.Contains(e.Time.Time):
			return nil, fmt.Errorf("decision %d was taken outside %s", r.Index, ad.Rule.Hours)
		case rule.Hours != nil && !rule.Hours.Contains(e.Time.Time):
			return nil, fmt.Errorf("decision %d was taken outside %s", r.Index, rule.Hours)
		case rule.Reasons.Approver && e.Sealed[SealedReason] == "":
			return nil, fmt.Errorf("decision %d gives no reason", r.Index)
		case standing && (d.Standing == nil || !slices.Contains(d.Standing.Scopes, req.Action) || intent.Time.After(d.Standing.Until.Time)):
			return nil, fmt.Errorf("decision %d does not stand for %s at that time", r.Index, req.Action)
		case standing && (rule.Standing == nil || d.Standing.Uses > rule.Standing.Uses ||
			d.Standing.Until.After(e.Time.Add(time.Duration(rule.Standing.For)))):
			return nil, fmt.Errorf("decision %d approves for a whole run, and further than the rule allows", r.Index)
		}
		switch {
		case d.Assertion == nil && ad.Rule.Passkey:
			return nil, fmt.Errorf("decision %d is not signed", r.Index)
		case d.Assertion != nil && !keys.active(d.Assertion.Enrolled):
			return nil, fmt.Errorf("decision %d is signed with a key that was revoked since", r.Index)
		}
		votes = append(votes, Vote{Person: *e.Person, Groups: d.Groups})
		if e.Time.After(latest.Time) {
			latest = e.Time
		}
	}
	if _, met := rule.Tally(votes); !met {
		return nil, errors.New("the rule is not met")
	}
	if !standing && !intent.Time.Before(latest.Add(time.Duration(ad.Rule.Collect))) {
		return nil, errors.New("the approval was not collected in time")
	}
	return &rule, nil
}

// signed checks the signatures of a's decisions, each by a key that was active
// then, and returns the keys as they are now.
func (a *Approval) signed(log *LogVerifier) (*Passkeys, error) {
	all := slices.Concat(a.Passkeys, a.Decisions)
	slices.SortFunc(all, func(x, y Receipt) int { return cmp.Compare(x.Index, y.Index) })
	keys := NewPasskeys(log.Origin())
	for _, r := range all {
		e, err := log.Check(r)
		if err != nil {
			return nil, err
		}
		if err := keys.Take(e); err != nil {
			return nil, fmt.Errorf("entry %d: %w", r.Index, err)
		}
	}
	return keys, nil
}
