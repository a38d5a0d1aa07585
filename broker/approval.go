package broker

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// CauseChanged is why a request was made void: what would be granted, or who
// must approve it, is no longer what people were asked.
const CauseChanged = "request-changed"

// ask puts a request and what people are asked on record, and waits for them as
// long as the call wants to; or draws on an approval for the whole run. Where
// another request holds the join, the error is an *store.OrderError with
// store.OrderJoined, and nothing is on record.
func (b *Broker) ask(ctx context.Context, p *plan) (*Reply, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if p.verdict.Rule.Standing != nil {
		// A decision that was answered a moment ago may not have come here yet.
		for _, id := range b.index.deciding(p.caller.Orchestrator, p.ask.Run) {
			if _, err := b.refresh(ctx, id); err != nil {
				return nil, err
			}
		}
	}
	for _, t := range b.index.standings(p.caller.Orchestrator, p.ask.Run, p.verdict.Grant.Scope, store.At(b.Now())) {
		reply, err := b.draw(ctx, p, t.story.Request)
		if reply != nil || err != nil {
			return reply, err
		}
	}
	req := b.requested(p, nil)
	asked := b.submission(store.ApprovalRequested, &req.Entry)
	asked.SetDetails(store.ApprovalRequestedDetails{
		Approval: "apr_" + strings.ReplaceAll(store.NewID(), "-", ""),
		Grant:    p.verdict.Grant, Rule: *p.verdict.Rule, Excluded: b.excluded(p), OneCall: p.ask.oneCall,
	})
	asked.Seal(store.SealedReason, p.ask.Reason)
	asked.Seal(store.SealedSubject, p.ask.Subject)
	if !b.index.joining(p.join) {
		if err := b.enter(ctx, inPending, &req.Entry); err != nil {
			return nil, err
		}
	}
	// A crash after this append leaves a request that people see and decide,
	// whether or not a broker is up. Whoever sends the same again joins it.
	if _, err := b.append(ctx, req, asked); err != nil {
		if _, refused := store.IsOrder(err); refused {
			b.leave(inPending, &req.Entry)
		}
		return nil, err
	}
	t, ok := b.index.get(req.Request)
	if !ok || t.pending == nil {
		return nil, ErrClosed // taken back and forgotten in the meantime
	}
	reply, _, err := b.attend(ctx, p, &store.Request{ID: req.Request, Status: store.StatusPending, Pending: t.pending, Grant: p.verdict.Grant.Digest()})
	return reply, err
}

// excluded are the pseudonyms of the people who own the caller, and of the
// person that a subject written otherwise may mean: "Ada" is user:ada too.
func (b *Broker) excluded(p *plan) []string {
	out := []string{}
	for _, o := range p.caller.Owners {
		out = append(out, b.PrivacyKey.Pseudonym(o))
	}
	if s := p.ask.Subject; s != "" {
		name := "user:" + strings.TrimPrefix(s, "user:")
		for _, other := range []string{name, strings.ToLower(name)} {
			if id := b.PrivacyKey.Pseudonym(other); other != s && !slices.Contains(out, id) {
				out = append(out, id)
			}
		}
	}
	return out
}

// attend is a call for a request that people decide: it waits for them as long
// as it wants to, and mints once they have approved. r is what the recorder said
// of it since the call began. again says that the call may open a new one.
func (b *Broker) attend(ctx context.Context, p *plan, r *store.Request) (reply *Reply, again bool, err error) {
	w := b.index.watch(r.ID)
	defer w.stop()
	var out <-chan time.Time
	if p.ask.Wait > 0 {
		out = time.After(p.ask.Wait)
	}
	lost := time.NewTicker(time.Second)
	defer lost.Stop()
	waited, said := false, true // said: r comes from the recorder, not from the index
	for {
		switch {
		case r.Status == store.StatusDenied, r.Status == store.StatusExpired, r.Status == store.StatusVoid:
			if !waited {
				if b.told(ctx, p, r) {
					p.after = r.ID
					return nil, true, nil
				}
			}
			return nil, false, &NotApproved{r.ID, r.Status}
		case r.Status == store.StatusApproved && !r.Minting:
			reply, next, err := b.collect(ctx, p, r.ID, waited)
			if next == nil {
				return reply, false, err
			}
			if r, said = next, true; !r.Minting {
				continue
			}
		case r.Status == store.StatusPending && said && !waited:
			if p.verdict.Grant.Digest() != r.Grant || p.verdict.Rule != nil && !r.Pending.Rule.Covers(p.verdict.Rule) {
				t, err := b.known(ctx, r.ID)
				if err != nil {
					return nil, false, err
				}
				next, err := b.void(ctx, t.story, p.ask, waited)
				if next == nil {
					return nil, false, err
				}
				r = next
				continue
			}
		case r.Status == store.StatusPending, r.Minting:
		default:
			return nil, false, ErrClosed // issued, closed or taken back
		}
		if out == nil {
			if !r.Minting {
				return b.under(r), false, nil
			}
			out = time.After(b.JoinWait) // a mint takes no longer than moments
		}
		// What the index knows may be later than what the recorder said, or
		// earlier: then what comes next wakes this call.
		if t, known := w.latest(); known && t.minting && t.condemned == store.CauseFrozen {
			return nil, false, ErrFrozen
		} else if known && said && t.after(r) {
			r, waited, said = t.request(), true, false
			continue
		} else if !known {
			if t, err := b.known(ctx, r.ID); err != nil {
				return nil, false, err
			} else if t.status != r.Status || t.minting != r.Minting {
				r, waited, said = t.request(), true, false
				continue
			}
		}
		select {
		case <-w.C:
		case <-lost.C:
			// Nobody wakes this call while the recorder is not followed.
			if !b.index.stale() {
				continue
			}
			if _, err := b.known(ctx, r.ID); err != nil {
				continue
			}
		case <-out:
			return b.under(r), false, nil
		case <-b.draining:
			return nil, false, ErrShuttingDown
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		if t, known := w.latest(); known {
			r, waited, said = t.request(), true, false
		}
	}
}

// after reports whether t is what became of r since the recorder said it.
func (t *tracked) after(r *store.Request) bool {
	return r.Status == store.StatusPending && t.status != store.StatusPending || r.Minting && t.place >= r.IntentIndex && !t.minting
}

// request is t as the ledger has it, as far as waiting calls need it.
func (t *tracked) request() *store.Request {
	return &store.Request{ID: t.story.Request, Status: t.status, Minting: t.minting, Pending: t.pending}
}

// known returns what the recorder says of a request; ErrClosed where it does not
// know it any more.
func (b *Broker) known(ctx context.Context, id string) (tracked, error) {
	found, err := b.refresh(ctx, id)
	if err != nil {
		return tracked{}, err
	}
	t, ok := b.index.get(id)
	if !found || !ok {
		return tracked{}, ErrClosed
	}
	return t, nil
}

// under is the answer to a call for a request that is under way.
func (b *Broker) under(r *store.Request) *Reply {
	reply := &Reply{Request: r.ID, Status: r.Status}
	if r.Status == store.StatusPending && r.Pending != nil {
		reply.Waiting = b.waiting(r.Pending)
	}
	return reply
}

func (b *Broker) waiting(p *store.Pending) *Waiting {
	w := &Waiting{ID: p.Approval, Needs: []Need{}, Expires: p.Expires.Time}
	if b.PeopleURL != "" {
		w.URL = strings.TrimSuffix(b.PeopleURL, "/") + "/approvals/" + p.Approval
	}
	filled, _ := p.Rule.Tally(p.Votes)
	for i, g := range p.Rule.Groups {
		w.Needs = append(w.Needs, Need{g.Group, g.Count, filled[i]})
	}
	return w
}

// told reports whether the end of r was told before to a call that began after
// it; if not, this call is the one that is told. A crash before the answer, or a
// Redis that lost the claim, costs one answer too few or too many, never a
// credential.
func (b *Broker) told(ctx context.Context, p *plan, r *store.Request) bool {
	b.note(inflight.Request{ID: r.ID, Orchestrator: p.caller.Orchestrator, Run: p.ask.Run, Step: p.ask.Step, Scope: p.ask.Scope, Status: string(r.Status)})
	if !p.ask.Arrived.After(r.Forget.Add(-store.KeyLife)) {
		return false // it was there before the end: it joined
	}
	first, err := b.tell(ctx, r.ID)
	return err == nil && !first
}

// tell claims the answer that says why a request came to its end.
func (b *Broker) tell(ctx context.Context, id string) (bool, error) {
	return b.Inflight.Claim(ctx, "told-"+id, store.KeyLife)
}

// void closes a request because what would be granted is no longer what people
// were asked, and returns the refusal; or what the request is now, where the
// ledger does not take it; ErrClosed where it does not know it.
func (b *Broker) void(ctx context.Context, story *store.Entry, ask Ask, waited bool) (next *store.Request, err error) {
	s := b.submission(store.RequestVoid, story)
	s.Cause = store.Ptr(CauseChanged)
	// A crash after this append leaves a void request, and the next who asks is
	// told.
	_, err = b.append(ctx, s)
	if oe, refused := store.IsOrder(err); refused {
		if oe.Request == nil {
			return nil, ErrClosed
		}
		return oe.Request, nil
	}
	if err != nil {
		return nil, err
	}
	if !waited {
		_, _ = b.tell(ctx, s.Request) // this call is the one that is told
	}
	b.note(inflight.Request{ID: s.Request, Orchestrator: s.Orchestrator, Run: s.Run, Step: s.Step, Scope: s.Action, Status: string(store.StatusVoid)})
	return nil, &NotApproved{s.Request, store.StatusVoid}
}

// approved is what people approved, with the proof of it. A nil one is that of
// a request that nobody had to approve.
type approved struct {
	id       string
	from     string // the request whose decisions they are
	rule     store.Rule
	terms    []termed // of those for the whole run
	people   []string // pseudonyms of who approved
	reasons  bool     // each gave a reason
	revoked  bool     // a key that signed was revoked since
	receipts store.Approval
}

// termed is when a person approved something for a whole run, and how far.
type termed struct {
	at    store.Time
	terms *store.StandingTerms
}

func (a *approved) request() string {
	if a == nil {
		return ""
	}
	return a.from
}

func (a *approved) proof() *store.Approval {
	if a == nil {
		return nil
	}
	return &a.receipts
}

func (a *approved) said() *Approved {
	if a == nil {
		return nil
	}
	return &Approved{ID: a.id, Request: a.from, People: len(a.receipts.Decisions)}
}

// changed reports whether p, decided now, is no longer what grant and a allow.
func (p *plan) changed(grant string, a *approved, excluded []string) bool {
	if p.verdict.Outcome == store.Deny || p.verdict.Grant.Digest() != grant {
		return true
	}
	if a == nil {
		return p.verdict.Outcome == store.NeedsApproval
	}
	return a.revoked || p.verdict.Rule != nil && !a.rule.Covers(p.verdict.Rule) ||
		slices.ContainsFunc(a.people, func(who string) bool { return slices.Contains(excluded, who) })
}

// rests finds, in what the recorder says of a request, its step.requested and
// the approval that it rests on, its own or one for its whole run; nil where
// there is none. scope is what is to be granted.
func (b *Broker) rests(app *store.Appended, entries []placed, id, scope string) (request *store.Receipt, a *approved) {
	from := id
	var use *store.StandingUse
	for i, e := range entries {
		if e.Type == store.StepRequested && e.Request == id {
			r := app.Receipt(i)
			request = &r
			if d, err := store.DetailsAs[store.RequestedDetails](e.Entry); err == nil && d.Standing != nil {
				from, use = d.Standing.Request, d.Standing
			}
		}
	}
	a = b.approvedIn(app, entries, from, scope, use != nil)
	if a != nil && use != nil {
		a.rule = use.Rule
	}
	return request, a
}

// approvedIn collects the decisions on a request, with their proofs. With
// standing, only those count that cover scope for the whole run.
func (b *Broker) approvedIn(app *store.Appended, entries []placed, request, scope string, standing bool) *approved {
	a := &approved{from: request, reasons: true}
	var votes []store.Vote
	keys, asked := map[string]bool{}, false
	for i, e := range entries {
		if e.Request != request {
			continue
		}
		switch {
		case e.Type == store.ApprovalRequested:
			d, err := store.DetailsAs[store.ApprovalRequestedDetails](e.Entry)
			if err != nil {
				return nil
			}
			a.id, a.rule, a.receipts.Requested, asked = d.Approval, d.Rule, app.Receipt(i), true
		case e.Type.IsDecision() && e.Person != nil:
			d, err := store.DetailsAs[store.DecidedDetails](e.Entry)
			if err != nil || d.Decision != store.Approve ||
				standing && (d.Standing == nil || !slices.Contains(d.Standing.Scopes, scope) || !d.Standing.Until.After(b.Now())) {
				continue
			}
			a.receipts.Decisions = append(a.receipts.Decisions, app.Receipt(i))
			a.people = append(a.people, *e.Person)
			a.reasons = a.reasons && e.Sealed[store.SealedReason] != ""
			votes = append(votes, store.Vote{Person: *e.Person, Groups: d.Groups})
			a.terms = append(a.terms, termed{e.Time, d.Standing})
			if d.Assertion != nil {
				keys[d.Assertion.Enrolled] = true
			}
		}
	}
	if _, met := a.rule.Tally(votes); !asked || !met {
		return nil
	}
	for i, e := range entries {
		switch e.Type {
		case store.PasskeyEnrolled:
			if keys[e.ID] {
				a.receipts.Passkeys = append(a.receipts.Passkeys, app.Receipt(i))
			}
		case store.PasskeyActivated, store.PasskeyRevoked:
			// Both name the key by the same member.
			if d, err := store.DetailsAs[store.PasskeyRevokedDetails](e.Entry); err == nil && keys[d.Enrolled] {
				a.receipts.Passkeys = append(a.receipts.Passkeys, app.Receipt(i))
				a.revoked = a.revoked || e.Type == store.PasskeyRevoked
			}
		}
	}
	return a
}

// collect mints what people approved. It decides again first, by the catalogue,
// policy and time of now: an approval is for what was shown, and nothing else.
// next is what the request is now, where another call was quicker.
func (b *Broker) collect(ctx context.Context, p *plan, id string, waited bool) (reply *Reply, next *store.Request, err error) {
	now, decided := b.plan(ctx, p.caller, p.ask)
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if decided == nil && now.verdict.Err != nil {
		return nil, nil, now.verdict.Err // nothing was decided: the approval stays
	}
	app, err := b.Recorder.Open(ctx, id)
	if err != nil {
		return nil, nil, unavailable(err)
	}
	entries, err := b.took(app)
	if err != nil {
		return nil, nil, err
	}
	t, ok := b.index.get(id)
	request, a := b.rests(app, entries, id, p.ask.Scope)
	switch {
	case !ok || request == nil:
		return nil, nil, ErrClosed // taken back
	case t.status != store.StatusApproved:
		return nil, t.request(), nil
	case a == nil:
		return nil, nil, unavailable(errors.New("the recorder names an approved request without its decisions"))
	}
	d, err := store.DetailsAs[store.RequestedDetails](entries[slices.IndexFunc(entries, func(e placed) bool {
		return e.Type == store.StepRequested && e.Request == id
	})].Entry)
	if err != nil {
		return nil, nil, unavailable(err)
	}
	if decided != nil || now.changed(d.Grant.Digest(), a, b.excluded(p)) {
		b.Log.Info("what was approved would not be granted as it was; the request is void", zap.String("request", id), zap.Error(decided))
		next, err := b.void(ctx, t.story, p.ask, waited)
		return nil, next, err
	}
	story := *t.story
	story.Decision = now.allowed()
	intent := b.submission(store.CredentialIssuing, &story)
	intent.SetDetails(store.IssuingDetails{Attempt: 1, Grant: d.Grant.Digest(), Approval: id,
		NotPast: store.At(b.Now().Add(time.Duration(d.Grant.TTL)))})
	// Where there is no place the approval stays, to be collected later.
	if err := b.enter(ctx, inLive, &story); err != nil {
		return nil, nil, err
	}
	b.calls.began(intent.ID)
	defer b.calls.ended(intent.ID)
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.MintTimeout)
	defer cancel()
	// A crash after this append leaves an intent without an outcome. It is closed
	// as abandoned, and the approval may be collected again: nobody is asked twice.
	done, err := b.append(work, intent)
	if oe, refused := store.IsOrder(err); refused {
		if r := oe.Request; r == nil || !r.Minting && r.Status != store.StatusIssued {
			b.leave(inLive, &story) // otherwise it is the place of who was quicker
		}
		switch r := oe.Request; {
		case oe.Code == store.OrderFrozen:
			return nil, nil, err
		case r == nil:
			return nil, nil, ErrClosed
		case r.Status == store.StatusApproved && !r.Minting && oe.Code == store.OrderNotOpen:
			// Approved, and not collected in time. The recorder closes it.
			return nil, nil, &NotApproved{id, store.StatusExpired}
		default:
			return nil, r, nil
		}
	}
	if err != nil {
		return nil, nil, err
	}
	b.calls.started(id, intent.ID)
	reply, err = b.mint(ctx, work, now, mint{story: &story, intent: intent.ID, attempt: 1, approved: a,
		warrant: store.Warrant{Request: *request, Intent: done.Receipt(0), Approval: a.proof()}})
	return reply, nil, err
}

// draw mints under the approval that a request of the same run was given for the
// whole of it. It returns nothing where that approval does not reach so far.
func (b *Broker) draw(ctx context.Context, p *plan, from string) (*Reply, error) {
	app, err := b.Recorder.Open(ctx, from)
	if err != nil {
		return nil, unavailable(err)
	}
	entries, err := b.took(app)
	if err != nil {
		return nil, err
	}
	excluded, rule := b.excluded(p), p.verdict.Rule
	a := b.approvedIn(app, entries, from, p.verdict.Grant.Scope, true)
	if a == nil || a.revoked || rule.Reasons.Approver && !a.reasons || rule.Passkey && !a.rule.Passkey ||
		slices.ContainsFunc(a.terms, func(t termed) bool {
			return !issuer.MayStand(rule.Standing, t.terms, t.at) || rule.Hours != nil && !rule.Hours.Contains(t.at.Time)
		}) ||
		slices.ContainsFunc(a.people, func(who string) bool {
			return slices.Contains(excluded, who) || p.ask.Subject != "" && who == b.PrivacyKey.Pseudonym(p.ask.Subject)
		}) {
		return nil, nil
	}
	req := b.requested(p, &store.StandingUse{Request: from, Rule: *rule, Excluded: excluded})
	reply, err := b.mintAtOnce(ctx, p, req, a)
	if _, refused := store.IsOrder(err, store.OrderNotOpen, store.OrderWeak); refused {
		return nil, nil // used up, over, or too few for this scope: people are asked
	}
	return reply, err
}
