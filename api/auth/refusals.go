package auth

import (
	"context"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/refusal"
)

// Refusals puts refused calls on record as access.refused. A flood of them is
// folded, so that it can neither fill the ledger nor hide how many there were;
// and only what is alike, so that it cannot hide another attempt either: who,
// what and why are of few kinds. Nothing of the refused token is in an entry.
type Refusals struct {
	// PrivacyKey has people stand in entries as pseudonyms, their names sealed.
	// Without it they stand by name; it is set before the first refusal.
	PrivacyKey store.PrivacyKey

	trustDomain string
	log         *refusal.Log
}

// kindOf is what refusals must share to be folded into one.
func kindOf(s *store.Submission) string {
	return strings.Join([]string{s.Agent, s.Action, s.Decision.Reasons[0]}, "\x00")
}

// NewRefusals records through record, which appends one entry. It is called
// with a deadline of 2 s, before the caller gets its answer.
func NewRefusals(trustDomain string, log *zap.Logger, record func(context.Context, *store.Submission) error) *Refusals {
	return &Refusals{trustDomain: trustDomain, log: refusal.New(log, record, kindOf)}
}

// Add puts one refusal on record, or counts it towards the next. p is nil
// where the caller is not known. What cannot be recorded is logged and counted
// towards the next: the call is refused all the same, and with the ledger away
// nothing is issued anyhow.
func (f *Refusals) Add(ctx context.Context, p *Principal, d store.RefusedDetails) {
	_ = f.log.Add(ctx, f.entry(p, d)) // it has logged what it says
}

// entry is the record of one refusal, but for the count and the ID.
func (f *Refusals) entry(p *Principal, d store.RefusedDetails) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, Type: store.AccessRefused, WriterTime: store.At(time.Now()),
		// Who it was is not known; that it was nobody known is.
		Agent:    "spiffe://" + f.trustDomain + "/unauthenticated",
		Action:   d.Method + " " + d.Route,
		Decision: &store.Decision{Outcome: store.Deny, Reasons: []string{d.Problem}},
	}}
	if p != nil {
		s.Agent = p.Agent(f.trustDomain)
		switch {
		case p.Role == Orchestrator:
			s.Orchestrator = p.Name
		case len(f.PrivacyKey) > 0 && (p.Method == "session" || p.Role == Approver || p.Role == Responder):
			who := f.PrivacyKey.Pseudonym(p.Person())
			s.Agent, s.Person = "spiffe://"+f.trustDomain+"/person/"+who, store.Ptr(who)
			s.Seal(store.SealedPerson, p.Person())
		}
	}
	s.SetDetails(d)
	return s
}

// Close records what is still folded.
func (f *Refusals) Close() { f.log.Close() }
