package approvals

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store"
)

const (
	// ChallengeLife is how long a person may take to touch the passkey.
	ChallengeLife = 5 * time.Minute
	// maxReason is the longest reason in bytes: 2,000 characters in any script.
	maxReason = 8 << 10
	// maxScopes is how many scopes an approval for a whole run may have.
	maxScopes = 20
	// maxPending is how many challenges or enrolments one person has under way;
	// the oldest goes.
	maxPending = 16
)

// The actions under which refused attempts are on record.
const (
	actionDecide   = "approval.decide"
	actionActivate = "passkey.activate"
	actionRevoke   = "passkey.revoke"
)

// Decide puts p's decision on the approval id on record and returns where the
// request stands then. An attempt that does not count is on record as
// access.refused before Decide returns why: a *store.OrderError, as
// store.Request.May says it, or ErrSignature. Other errors are ErrNotFound,
// ErrMalformed and store.ErrUnavailable; after the last, the decision may or
// may not be on record, and is sent again.
func (a *Approvals) Decide(ctx context.Context, p Person, id string, d Decision) (*Request, error) {
	if err := a.check(&d); err != nil {
		return nil, err
	}
	request, err := a.find(ctx, id)
	if err != nil {
		return nil, err
	}
	v, err := a.view(ctx, request)
	if err != nil {
		return nil, err
	}
	if d.Assertion != nil {
		// No key is revoked between the look at it and the decision's entry.
		a.keys.RLock()
		defer a.keys.RUnlock()
	}
	groups := a.groups(v, p)
	if err := a.may(v, p, groups, d); err != nil {
		if _, over := store.IsOrder(err, store.OrderNotOpen); over && v.decidedBy(p, d) {
			return v, nil // said again by who has said so
		}
		return nil, a.refuse(ctx, p, v, actionDecide, err)
	}
	s := a.decision(p, v, groups, &d)
	if d.Assertion != nil {
		if err := a.sign(ctx, p, v, s, &d); err != nil {
			if errors.Is(err, ErrSignature) {
				err = a.refuse(ctx, p, v, actionDecide, err)
			}
			return nil, err
		}
	}
	// The ledger takes decisions one after the other, and so decides which of
	// many that come at once still count. A crash before it leaves nothing; a
	// crash after it leaves a decision that counts and whose person was not told
	// so, who is told that it counts when they decide again.
	done, err := a.append(ctx, s)
	if err != nil {
		if _, refused := store.IsOrder(err); refused {
			if v, verr := a.view(ctx, request); verr == nil {
				return nil, a.refuse(ctx, p, v, actionDecide, err)
			}
			return nil, a.refuse(ctx, p, v, actionDecide, err)
		}
		return nil, err
	}
	a.until(ctx, done.Entries[0].Index)
	return a.view(ctx, request)
}

// May says whether p's decision would count now, as Decide would judge it but
// for the signature: a *store.OrderError, or nil. Nothing goes on record. It is
// for a page that shows what a person can do.
func (a *Approvals) May(r *Request, p Person, d Decision) error {
	return a.may(r, p, a.groups(r, p), d)
}

func (a *Approvals) may(r *Request, p Person, groups []string, d Decision) error {
	if r.state == nil {
		return &store.OrderError{Code: store.OrderNotOpen, Message: "request " + r.Request + " is " + string(r.Status)}
	}
	own := slices.ContainsFunc(a.c.Owners[r.Orchestrator], func(o string) bool { return same(o, p.Name) })
	if r.Status == store.StatusPending && !own && same(r.Subject, p.Name) {
		return &store.OrderError{Code: store.OrderSelf, Message: "the request is for the person", Request: r.state}
	}
	if r.Status == store.StatusPending && own {
		return &store.OrderError{Code: store.OrderSelf, Message: "the person owns the orchestrator", Request: r.state}
	}
	if d.Via == viaSlack && !r.Rule.Slack {
		return &store.OrderError{Code: store.OrderMismatch, Message: "the rule takes no decisions in Slack", Request: r.state}
	}
	return r.state.May(d.Decision, a.pseudonym(p), groups, d.Reason != "", d.Assertion != nil, store.At(a.c.Now()))
}

// The ways in which a decision comes.
const (
	viaPage  = "page"
	viaToken = "token"
	viaSlack = "slack"
)

// check brings d into the form in which it is signed and recorded.
func (a *Approvals) check(d *Decision) error {
	bad := func(m string) error { return fmt.Errorf("%w: %s", ErrMalformed, m) }
	d.Reason = strings.TrimFunc(d.Reason, func(c rune) bool { return unicode.IsSpace(c) || unicode.Is(unicode.C, c) })
	switch {
	case d.Decision != store.Approve && d.Decision != store.Refuse:
		return bad("decision: want approve or deny")
	case d.Via != viaPage && d.Via != viaToken && d.Via != viaSlack:
		return bad("via: want page, token or slack")
	case len(d.Reason) > maxReason || !utf8.ValidString(d.Reason) || strings.ContainsRune(d.Reason, 0):
		return bad(fmt.Sprintf("reason: want at most %d bytes of text", maxReason))
	}
	if d.Standing == nil {
		return nil
	}
	s := *d.Standing
	s.Scopes = slices.Compact(slices.Sorted(slices.Values(s.Scopes)))
	switch {
	case d.Decision != store.Approve:
		return bad("standing: a denial stands for one request")
	case len(s.Scopes) == 0 || len(s.Scopes) > maxScopes || s.Uses < 1 || !s.Until.After(a.c.Now()):
		return bad(fmt.Sprintf("standing: want 1 to %d scopes, uses, and an end", maxScopes))
	}
	set := a.c.Scopes.Current()
	for _, name := range s.Scopes {
		if _, ok := set.Scope(name); !ok {
			return bad(fmt.Sprintf("standing: there is no scope %.128q", name))
		}
	}
	d.Standing = &s
	return nil
}

// groups are those of p that a rule may ask for: the request's own, and, for
// what an approval of the whole run may cover, the catalogue's. What else a
// person belongs to is not for the record.
func (a *Approvals) groups(r *Request, p Person) []string {
	named := map[string]bool{}
	for _, g := range r.Rule.Groups {
		named[g.Group] = true
	}
	for _, sc := range a.c.Scopes.Current().Scopes() {
		if sc.Approval != nil {
			for _, g := range sc.Approval.Groups {
				named[g.Group] = true
			}
		}
	}
	out := []string{}
	for _, g := range p.Groups {
		if named[g] {
			out = append(out, g)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// about begins an entry about a request.
func (a *Approvals) about(t store.Type, action string, r *Request) *store.Submission {
	s := a.entry(t, action)
	s.Orchestrator, s.Run, s.Step, s.Request, s.Resource = r.Orchestrator, r.Run, r.Step, r.Request, r.Target
	s.Risk = &store.Risk{Sensitivity: r.Sensitivity}
	return s
}

// decision makes the entry of d, not signed yet.
func (a *Approvals) decision(p Person, r *Request, groups []string, d *Decision) *store.Submission {
	t, outcome := store.ApprovalDecided, store.Allow
	if d.Standing != nil {
		t = store.ApprovalStanding
	}
	if d.Decision == store.Refuse {
		outcome = store.Deny
	}
	s := a.about(t, r.Scope, r)
	s.Person = store.Ptr(a.pseudonym(p))
	s.Decision = &store.Decision{Outcome: outcome, Policy: r.Policy, Reasons: []string{}}
	s.SetDetails(store.DecidedDetails{
		Approval: r.ID, Requested: r.LeafHash, Decision: d.Decision, Groups: groups, Via: d.Via, Standing: d.Standing,
	})
	s.Seal(store.SealedReason, d.Reason)
	s.Seal(store.SealedPerson, p.Name)
	return s
}

// challenge is a decision that a passkey was asked to sign. The commitment to
// the reason is salted at random and is part of what is signed, so the decision
// must be recorded with this one.
type challenge struct {
	approval   string
	decision   Decision
	commitment string
	opening    store.Opening
}

// Challenge returns what p's passkey is to sign so that Decide takes d with its
// Assertion. The errors are those of Decide; nothing goes on record.
func (a *Approvals) Challenge(ctx context.Context, p Person, id string, d Decision) (*Challenge, error) {
	d.Assertion = nil
	if err := a.check(&d); err != nil {
		return nil, err
	}
	r, err := a.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	asSigned := d
	asSigned.Assertion = &Signed{}
	if err := a.May(r, p, asSigned); err != nil {
		return nil, err
	}
	keys, err := a.keysOf(ctx, a.pseudonym(p))
	if err != nil {
		return nil, err
	}
	out := &Challenge{RPID: a.rpID, Credentials: []string{}, Expires: a.c.Now().Add(ChallengeLife)}
	for _, k := range keys {
		if k.signs() {
			out.Credentials = append(out.Credentials, k.Credential)
		}
	}
	if len(out.Credentials) == 0 {
		return nil, &store.OrderError{Code: store.OrderPasskey, Message: "the person has no active passkey", Request: r.state}
	}
	c := challenge{approval: id, decision: d}
	if d.Reason != "" {
		c.commitment, c.opening = store.Commit(store.SealedReason, d.Reason)
	}
	digest := store.ApprovalDigest(a.c.Origin, r.LeafHash, d.Decision, a.pseudonym(p), c.commitment, d.Standing)
	a.challenges.put(a.c.Now(), p.Name, string(digest[:]), c)
	out.Challenge = digest[:]
	return out, nil
}

// sign checks d's assertion and puts it into s. Errors that are the signer's
// wrap ErrSignature.
func (a *Approvals) sign(ctx context.Context, p Person, r *Request, s *store.Submission, d *Decision) error {
	refuse := func(format string, x ...any) error {
		return fmt.Errorf("%w: %w", ErrSignature, fmt.Errorf(format, x...))
	}
	var client struct {
		Challenge string `json:"challenge"`
	}
	if len(d.Assertion.ClientData) > 4<<10 || json.Unmarshal(d.Assertion.ClientData, &client) != nil {
		return refuse("the client data cannot be read")
	}
	digest, err := base64.RawURLEncoding.DecodeString(client.Challenge)
	if err != nil || len(digest) != sha256.Size {
		return refuse("the challenge cannot be read")
	}
	c, ok := a.challenges.take(a.c.Now(), p.Name, string(digest))
	switch {
	case !ok:
		return refuse("nothing was to be signed under this challenge, or it is over; begin again")
	case c.approval != r.ID || c.decision.Decision != d.Decision || c.decision.Reason != d.Reason || !sameTerms(c.decision.Standing, d.Standing):
		return refuse("another decision was to be signed")
	}
	if c.commitment != "" {
		s.Sealed[store.SealedReason], s.Openings[store.SealedReason] = c.commitment, c.opening
	}
	details, err := store.DetailsAs[store.DecidedDetails](&s.Entry)
	if err != nil {
		return err
	}
	keys, err := a.keysOf(ctx, *s.Person)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(keys, func(k Passkey) bool { return k.Credential == d.Assertion.Credential })
	switch {
	case i < 0:
		return refuse("the passkey is not enrolled for this person")
	case !keys[i].signs():
		return refuse("the passkey is not active")
	}
	details.Assertion = &store.Assertion{
		Enrolled: keys[i].ID, AuthenticatorData: d.Assertion.AuthenticatorData,
		ClientData: d.Assertion.ClientData, Signature: d.Assertion.Signature,
	}
	if err := details.Assertion.Verify(&keys[i].details, store.DecisionDigest(a.c.Origin, &s.Entry, &details)); err != nil {
		return refuse("%w", err)
	}
	s.SetDetails(details)
	return nil
}

func sameTerms(x, y *store.StandingTerms) bool {
	if x == nil || y == nil {
		return x == y
	}
	return x.Uses == y.Uses && x.Until.Equal(y.Until.Time) && slices.Equal(x.Scopes, y.Scopes)
}

// refuse puts an attempt that does not count on record and returns why it does
// not. r is nil where the attempt is about no request. Where the attempt cannot
// be recorded, the error is store.ErrUnavailable: it is made again.
func (a *Approvals) refuse(ctx context.Context, p Person, r *Request, action string, why error) error {
	problem, detail := problemOf(why)
	s := a.entry(store.AccessRefused, action)
	if r != nil {
		s = a.about(store.AccessRefused, action, r)
	}
	s.Person, s.Cause = store.Ptr(a.pseudonym(p)), store.Ptr(detail)
	s.Decision = &store.Decision{Outcome: store.Deny, Reasons: []string{problem}}
	s.SetDetails(store.RefusedDetails{Role: "approver", Problem: problem})
	s.Seal(store.SealedPerson, p.Name)
	if err := a.refused.Add(ctx, s); err != nil {
		return err
	}
	return why
}

// kindOf is what refused attempts must share to be folded into one entry.
func kindOf(s *store.Submission) string {
	return strings.Join([]string{*s.Person, s.Action, s.Request, s.Decision.Reasons[0]}, "\x00")
}

// problemOf names why an attempt did not count: by the slug of the problem
// that the caller is sent, where there is one.
func problemOf(err error) (problem, detail string) {
	var order *store.OrderError
	switch {
	case errors.As(err, &order):
		detail = order.Message
		switch order.Code {
		case store.OrderSelf:
			return "self-approval", detail
		case store.OrderApprover, store.OrderHours:
			return "not-an-approver", detail
		case store.OrderNotOpen:
			return "request-closed", detail
		case store.OrderPasskey:
			return "passkey-required", detail
		case store.OrderReason:
			return "reason-required", detail
		}
		return string(order.Code), detail
	case errors.Is(err, ErrSignature):
		return "passkey-required", cut(err.Error())
	case errors.Is(err, ErrPasskeyPerson):
		return "role-forbidden", cut(err.Error())
	}
	return "request-closed", cut(err.Error())
}

// cut shortens a text that may repeat what a browser sent.
func cut(s string) string {
	if len(s) > 500 {
		s = strings.ToValidUTF8(s[:500], "") + "…"
	}
	return s
}

// pending is what people began and did not finish: kept for a while, in memory
// alone, and taken once. A restart ends it, and the person begins again.
type pending[T any] struct {
	life time.Duration
	mu   sync.Mutex
	of   map[string][]begun[T] // by person, the oldest first
}

type begun[T any] struct {
	key  string
	end  time.Time
	what T
}

func (b *pending[T]) put(now time.Time, person, key string, what T) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of == nil {
		b.of = map[string][]begun[T]{}
	}
	for p, list := range b.of {
		if list = slices.DeleteFunc(list, func(x begun[T]) bool { return !now.Before(x.end) }); len(list) == 0 {
			delete(b.of, p)
		} else {
			b.of[p] = list
		}
	}
	list := append(b.of[person], begun[T]{key, now.Add(b.life), what})
	b.of[person] = list[max(0, len(list)-maxPending):]
}

func (b *pending[T]) take(now time.Time, person, key string) (T, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.of[person]
	i := slices.IndexFunc(list, func(x begun[T]) bool { return x.key == key && now.Before(x.end) })
	if i < 0 {
		var none T
		return none, false
	}
	x := list[i]
	b.of[person] = slices.Delete(list, i, i+1)
	return x.what, true
}

// same reports whether two names may be one person's: letter case, the prefix
// "user:", the domain of an e-mail address, and characters that are not seen tell
// nobody apart. It excludes rather one too many than one too few.
func same(a, b string) bool {
	bare := func(s string) string {
		s = strings.Map(func(c rune) rune {
			switch {
			case unicode.IsSpace(c), unicode.Is(unicode.C, c):
				return -1
			case unicode.Is(unicode.Pd, c):
				return '-'
			}
			return unicode.ToLower(c)
		}, s)
		s, _, _ = strings.Cut(strings.TrimPrefix(s, "user:"), "@")
		return s
	}
	x := bare(a)
	return x != "" && x == bare(b)
}

// decidedBy reports whether p has decided r so, for the same reason.
func (r *Request) decidedBy(p Person, said Decision) bool {
	return slices.ContainsFunc(r.Decisions, func(d Decided) bool {
		return d.Person == p.Name && d.Decision == said.Decision && d.Reason == said.Reason
	})
}
