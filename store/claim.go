package store

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Verdict says whether what an orchestrator claims of a step and what was
// observed of it agree.
type Verdict string

// The verdicts. Where nothing was claimed there is none.
const (
	Agree       Verdict = "agree"
	Differ      Verdict = "differ"
	NotObserved Verdict = "not observed" // nobody but the orchestrator could see it, or did
)

// What an Account keeps at most: targets that it keeps apart, and bytes of a name,
// so that what is compared is a name's beginning.
const (
	maxPlaces = 64
	maxName   = 256
)

// Account gathers what was claimed of one step and what was seen of it, from
// its entries in the order of the log. The zero value is ready. It takes some
// 200 bytes, however many uses there were. It is not safe for concurrent use.
type Account struct {
	claimed bool
	claim   FinishedDetails // the latest
	gated   []string        // requests whose secret stays on the access path
	places  []place
	more    bool // there are targets beyond maxPlaces
	ends    int64
	audited string // the latest use that Vault's audit log told of
}

// place is a target that the step reached, or could.
type place struct {
	target        string
	gated, direct int64 // credentials issued for it, by how they were handed out
	uses          int64
	awaited       int64 // uses on the access path, of which the outcome is put on record
	ended, failed int64 // outcomes
	refused       int64 // attempts that a guard refused
	last          int64 // when the latest outcome came, of all the step's
	err           string
}

// Take adds an entry of the step; types that say nothing of claims or uses are
// passed over. Errors wrap ErrMalformed.
func (a *Account) Take(e *Entry) error {
	switch e.Type {
	case StepRequested:
		return a.Requested(e)
	case CredentialIssued:
		a.Issued(e)
	case CredentialUsed:
		d, err := DetailsAs[UsedDetails](e)
		if err != nil {
			return err
		}
		a.Used(e, d.Via)
	case UseFinished:
		d, err := DetailsAs[UseFinishedDetails](e)
		if err != nil {
			return err
		}
		a.Ended(e, d.Outcomes)
	case AccessRefused:
		d, err := DetailsAs[RefusedDetails](e)
		if err != nil {
			return err
		}
		if d.Intent != "" {
			a.Refused(e, d.Folded)
		}
	case StepFinished:
		d, err := DetailsAs[FinishedDetails](e)
		if err != nil {
			return err
		}
		a.Claimed(d)
	}
	return nil
}

// Requested takes a step.requested.
func (a *Account) Requested(e *Entry) error {
	access, err := GrantedAccess(e)
	if access != nil && len(a.gated) < maxPlaces {
		a.gated = append(a.gated, e.Request)
	}
	return err
}

// Issued takes a credential.issued.
func (a *Account) Issued(e *Entry) {
	if p := a.at(e.Resource); p != nil {
		if slices.Contains(a.gated, e.Request) {
			p.gated++
		} else {
			p.direct++
		}
	}
}

// Used takes a credential.used that was seen via one of the Via constants. What
// Vault's audit log tells of a secret that stays on the access path is the
// gateway's doing, not the step's, and is not counted.
func (a *Account) Used(e *Entry, via string) {
	if via == ViaVaultAudit && slices.Contains(a.gated, e.Request) {
		return
	}
	if p := a.at(e.Resource); p != nil {
		p.uses++
		switch via {
		case ViaGateway:
			p.awaited++
		case ViaVaultAudit: // a result follows where it failed, and only there
			a.ends++
			p.ended++
			p.last, p.err, a.audited = a.ends, "", e.ID
		}
	}
}

// Ended takes the outcomes of a use.finished.
func (a *Account) Ended(e *Entry, outcomes []UseOutcome) {
	p := a.at(e.Resource)
	if p == nil {
		return
	}
	for i := range outcomes {
		if a.audited != "" && outcomes[i].Use == a.audited {
			a.audited = ""
			if p.err = name(outcomes[i].Error); p.err != "" {
				p.failed++
			}
			continue
		}
		a.ends++
		p.ended++
		p.last, p.err = a.ends, name(outcomes[i].Error)
		if p.err != "" {
			p.failed++
		}
	}
}

// Refused takes an access.refused that names a credential, and how many like it
// are folded into it.
func (a *Account) Refused(e *Entry, folded int) {
	if p := a.at(e.Resource); p != nil {
		p.refused += 1 + int64(max(folded, 0))
	}
}

// Claimed takes what the orchestrator says came of the step. The latest claim
// is the one that counts.
func (a *Account) Claimed(d FinishedDetails) {
	a.claimed, a.claim = true, FinishedDetails{Outcome: name(d.Outcome), Target: name(d.Target)}
}

// name is as much of s as is kept; it shares no memory with a longer s.
func name(s string) string {
	if len(s) <= maxName {
		return s
	}
	return strings.ToValidUTF8(strings.Clone(s[:maxName]), "")
}

func (a *Account) at(target string) *place {
	target = name(target)
	for i := range a.places {
		if a.places[i].target == target {
			return &a.places[i]
		}
	}
	if len(a.places) == maxPlaces {
		a.more = true
		return nil
	}
	a.places = append(a.places, place{target: target})
	return &a.places[len(a.places)-1]
}

// Claim returns the claim that is judged, cut where it is long; false where nothing was claimed.
func (a *Account) Claim() (FinishedDetails, bool) { return a.claim, a.claimed }

// Verdict compares the claim with what was observed, and says why in one
// sentence. Both are empty where nothing was claimed.
//
// What is compared is the claim's outcome with the latest outcome at the claimed
// target, or at any where none is named. A use that was seen without its outcome
// (by introspection) shows that something was reached,
// and not with what result.
func (a *Account) Verdict() (Verdict, string) {
	if !a.claimed {
		return "", ""
	}
	s := place{} // of what is compared
	named := false
	for _, p := range a.places {
		if a.claim.Target != "" && a.claim.Outcome != "skipped" && p.target != a.claim.Target {
			continue
		}
		named = named || p.direct+p.gated > 0 || p.uses > 0
		s.gated, s.direct, s.uses, s.awaited = s.gated+p.gated, s.direct+p.direct, s.uses+p.uses, s.awaited+p.awaited
		s.ended, s.failed, s.refused = s.ended+p.ended, s.failed+p.failed, s.refused+p.refused
		if p.last > s.last {
			s.last, s.err = p.last, p.err
		}
	}
	is := func(v Verdict, format string, args ...any) (Verdict, string) {
		at := ""
		if a.claim.Target != "" {
			at = " at " + a.claim.Target
		}
		return v, "Claimed " + a.claim.Outcome + at + ", and " + fmt.Sprintf(format, args...) + "."
	}
	const unseen = "no use could be observed, since the secret was handed out directly"
	switch a.claim.Outcome {
	case "succeeded", "failed", "skipped":
	default:
		return is(NotObserved, "that is no outcome which could be compared")
	}
	switch skipped := a.claim.Outcome == "skipped"; {
	case a.claim.Target != "" && !skipped && !named && a.more:
		return is(NotObserved, "the step reaches more targets than are kept apart")
	case a.claim.Target != "" && !skipped && !named && a.claim.Outcome == "failed":
		return is(Agree, "no credential of the step reaches that target")
	case a.claim.Target != "" && !skipped && !named:
		return is(Differ, "no credential of the step reaches that target")
	case skipped && s.uses > 0:
		return is(Differ, "%s seen", were(s.uses, "use"))
	case skipped && s.refused > 0:
		return is(Differ, "%s refused", were(s.refused, "attempt"))
	case s.direct+s.gated+s.uses == 0 && a.claim.Outcome == "succeeded":
		return is(NotObserved, "no credential was issued to the step")
	case s.direct+s.gated+s.uses == 0:
		return is(Agree, "no credential was issued to the step")
	}
	tail := ""
	if s.refused > 0 {
		tail = fmt.Sprintf("; %s refused", were(s.refused, "attempt"))
	}
	if open := s.awaited - s.ended; s.ended > 0 && open > 0 {
		tail += "; what came of " + count(open, "use") + " is not on record"
	}
	if s.uses == 0 {
		switch {
		case a.claim.Outcome == "failed" && s.refused > 0:
			return is(Agree, "%s refused, none let through", were(s.refused, "attempt"))
		case s.refused > 0 && s.direct == 0:
			return is(Differ, "%s refused, none let through", were(s.refused, "attempt"))
		case s.direct > 0:
			return is(NotObserved, unseen)
		case a.claim.Outcome == "succeeded":
			return is(Differ, "no use was seen, though the credential works on the access path alone")
		}
		return is(Agree, "nothing was reached")
	}
	seen := were(s.uses, "use") + " seen"
	if s.ended == 0 {
		switch {
		case s.awaited > 0:
			return is(NotObserved, "%s, and what came of them is not on record%s", seen, tail)
		case a.claim.Outcome == "succeeded":
			return is(Agree, "%s%s", seen, tail)
		}
		return is(NotObserved, "%s, and not with what result%s", seen, tail)
	}
	good := a.claim.Outcome == "succeeded"
	switch {
	case s.err != "" && good:
		return is(Differ, "the last use failed (%s), %d of %d%s", s.err, s.failed, s.ended, tail)
	case s.err != "":
		return is(Agree, "the last use failed (%s), %d of %d%s", s.err, s.failed, s.ended, tail)
	case !good && s.refused > 0:
		return is(Agree, "%s%s", seen, tail)
	case !good:
		return is(Differ, "%s, the last of which succeeded%s", seen, tail)
	case s.failed > 0:
		return is(Agree, "%s, the last of which succeeded; %d failed before%s", seen, s.failed, tail)
	}
	return is(Agree, "%s, and all that ended succeeded%s", seen, tail)
}

// JudgeClaim compares claim and observation over the entries of one step, in the
// order of the log. Errors wrap ErrMalformed.
func JudgeClaim(entries []*Entry) (Verdict, string, error) {
	var a Account
	for _, e := range entries {
		if err := a.Take(e); err != nil {
			return "", "", err
		}
	}
	v, why := a.Verdict()
	return v, why, nil
}

func count(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

func were(n int64, one string) string {
	if n == 1 {
		return "1 " + one + " was"
	}
	return count(n, one) + " were"
}

// GrantedAccess is what the access path does for what e, a step.requested, asks
// for: nil where its secret does not stay there. Errors wrap ErrMalformed.
func GrantedAccess(e *Entry) (*Access, error) {
	// Reading a grant takes longer than reading the rest of an entry. Within a
	// string a quote is always escaped, so that no value can look like this.
	if e.Type != StepRequested || !bytes.Contains(e.Details, []byte(`"delivery":"gateway"`)) {
		return nil, nil
	}
	d, err := DetailsAs[struct {
		Grant struct {
			Delivery string  `json:"delivery"`
			Access   *Access `json:"access"`
		} `json:"grant"`
	}](e)
	if err != nil || d.Grant.Delivery != "gateway" {
		return nil, err
	}
	if d.Grant.Access == nil {
		return nil, fmt.Errorf("%w: a grant for the access path without access", ErrMalformed)
	}
	return d.Grant.Access, nil
}
