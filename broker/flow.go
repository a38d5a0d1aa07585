package broker

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// Why a credential was undone, as the record's cause.
const (
	CauseTTL         = "ttl"
	CauseRequested   = "requested"
	CauseFinished    = "step finished"
	CauseRetry       = "retry"
	CauseUndelivered = "not delivered" // it was issued, and nobody was given it
	CauseAbandoned   = "no outcome"    // of an intent
	CauseLost        = "session lost"  // the broker that held its session at the gateway ended, or started again
	CauseCall        = "call finished" // it was for one call through the gateway, which is over
)

// otherBroker is how long after a credential was issued by another broker a
// call under the same key is taken to have overlapped the first one's answer.
const otherBroker = 250 * time.Millisecond

// Request is the life of one call for a credential (docs: the life of one
// request). It returns a Reply with a credential only when request, intent and
// issuance are on record.
func (b *Broker) Request(ctx context.Context, c Caller, ask Ask) (*Reply, error) {
	if ask.Arrived.IsZero() {
		ask.Arrived = b.Now()
	}
	if !b.begin() {
		return nil, ErrShuttingDown
	}
	defer b.work.Done()
	for name, v := range map[string]string{"step": ask.Step, "run": ask.Run, "orchestrator": c.Orchestrator} {
		if !store.ValidID(v) {
			return nil, fmt.Errorf("%w: %s %.140q is not a valid ID", ErrMalformed, name, v)
		}
	}
	if _, err := b.state(ctx); err != nil {
		return nil, err
	}
	p, err := b.plan(ctx, c, ask)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err == nil {
		// What another broker's gateway can reach stays as it was decided.
		if err := b.reaches(p.verdict.Grant); err != nil {
			return nil, err
		}
		if b.index.covered(c.Orchestrator, ask.Run, ask.Step, ask.Scope) {
			return nil, b.frozen(ctx, p)
		}
	}
	if err == nil && p.verdict.Err != nil {
		if t, waits := b.index.joined(p.join); waits && t.body == p.body {
			return nil, p.verdict.Err // nothing was decided: what people are asked, or have approved, stays
		}
	}
	if err != nil || p.verdict.Outcome == store.Deny {
		// What people were asked about, or have approved, is given no more.
		if t, waits := b.index.joined(p.join); waits && t.body == p.body {
			if _, refusal := b.void(ctx, t.story, ask, false); refusal != nil && !errors.Is(refusal, ErrClosed) {
				return nil, refusal
			}
		}
		if err != nil {
			return nil, err
		}
		return nil, b.deny(ctx, p)
	}
	for range 8 { // each turn needs another call to have failed in between
		var reply *Reply
		if p.verdict.Outcome == store.Allow {
			reply, err = b.open(ctx, p)
		} else {
			reply, err = b.ask(ctx, p)
		}
		oe, joined := store.IsOrder(err, store.OrderJoined)
		if !joined || oe.Request == nil {
			return reply, b.stopped(ctx, p, "", err)
		}
		reply, again, err := b.join(ctx, p, oe.Request)
		if !again {
			return reply, b.stopped(ctx, p, oe.Request.ID, err)
		}
	}
	return nil, ErrClosed
}

// plan is one call, decided.
type plan struct {
	caller  Caller
	ask     Ask
	verdict *scopes.Verdict
	policy  string // digest
	join    string
	body    string
	agent   string
	after   string // the request before it under the same join, whose end the caller was told
}

// plan decides ask by the catalogue, policy and time of now. Where it fails the
// plan still says which request it is.
func (b *Broker) plan(ctx context.Context, c Caller, ask Ask) (*plan, error) {
	set := b.Scopes.Current()
	p := &plan{caller: c, ask: ask, policy: set.Digest(), agent: issuer.SPIFFEID(b.TrustDomain, c.Orchestrator, ask.Run, ask.Step)}
	p.body = b.PrivacyKey.Digest("body", string(ask.Body))
	if ask.Key != "" {
		p.join = b.PrivacyKey.Digest("join", c.Orchestrator, ask.Step, "key", ask.Key)
	} else {
		p.join = b.PrivacyKey.Digest("join", c.Orchestrator, ask.Step, "body", p.body)
	}
	v, err := set.Decide(ctx, scopes.Ask{
		Agent: p.agent, Orchestrator: c.Orchestrator, Run: ask.Run, Step: ask.Step, Scope: ask.Scope, TTL: ask.TTL,
		Params: ask.Params, Delivery: ask.Delivery, PublicKey: ask.PublicKey, Audience: ask.Audience,
		Subject: ask.Subject, SubjectProved: ask.Proved, Reason: ask.Reason, Time: b.Now(),
	})
	if err != nil {
		return p, err
	}
	if v.Err != nil {
		b.Log.Error("policy could not be evaluated; the request is denied", zap.String("scope", ask.Scope), zap.Error(v.Err))
	}
	p.verdict = v
	return p, nil
}

// requested is the entry step.requested of p. standing is the approval for its
// whole run that it draws on, nil where it draws on none.
func (b *Broker) requested(p *plan, standing *store.StandingUse) *store.Submission {
	s := b.submission(store.StepRequested, &store.Entry{
		Agent: p.agent, Orchestrator: p.caller.Orchestrator, Run: p.ask.Run, Step: p.ask.Step,
		Request: newRequestID(), Resource: p.verdict.Grant.Target, Action: p.verdict.Grant.Scope,
		Decision: &store.Decision{Outcome: p.verdict.Outcome, Policy: p.policy, Reasons: append([]string{}, p.verdict.Reasons...)},
		Risk:     &store.Risk{Sensitivity: p.verdict.Scope.Sensitivity},
	})
	if p.ask.Subject != "" {
		s.Subject = &store.Subject{ID: b.PrivacyKey.Pseudonym(p.ask.Subject), Proved: p.ask.Proved}
	}
	d := store.RequestedDetails{Grant: p.verdict.Grant, Body: p.body, Keyed: p.ask.Key != "", Standing: standing}
	if p.verdict.Outcome != store.Deny {
		d.Join, d.After = p.join, p.after
	}
	s.SetDetails(d)
	s.Seal(store.SealedReason, p.ask.Reason)
	s.Seal(store.SealedSubject, p.ask.Subject)
	return s
}

// deny puts a refusal on record, and returns it.
func (b *Broker) deny(ctx context.Context, p *plan) error {
	s := b.requested(p, nil)
	// A crash after this append leaves a denial that nobody was told; the next
	// call is decided anew.
	if _, err := b.append(ctx, s); err != nil {
		return err
	}
	b.note(inflight.Request{ID: s.Request, Orchestrator: s.Orchestrator, Run: s.Run, Step: s.Step, Scope: s.Action, Status: string(store.StatusDenied)})
	return &Denied{Request: s.Request, Reasons: p.verdict.Reasons}
}

// open puts request and intent on record in one append, and mints. Where
// another request holds the join, the error is an *store.OrderError with
// store.OrderJoined, and nothing is on record.
func (b *Broker) open(ctx context.Context, p *plan) (*Reply, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return b.mintAtOnce(ctx, p, b.requested(p, nil), nil)
}

// mintAtOnce puts req and an intent on record in one append, and mints. a are the
// decisions that it rests on, nil where nobody has to approve.
func (b *Broker) mintAtOnce(ctx context.Context, p *plan, req *store.Submission, a *approved) (*Reply, error) {
	story := req.Entry
	story.Decision = p.allowed()
	intent := b.submission(store.CredentialIssuing, &story)
	intent.SetDetails(store.IssuingDetails{Attempt: 1, Grant: p.verdict.Grant.Digest(), Approval: a.request(),
		NotPast: store.At(b.Now().Add(time.Duration(p.verdict.Grant.TTL)))})

	// Who joins takes no place; where the index is wrong, it takes that of the
	// one which has ended since.
	if !b.index.joining(p.join) {
		if err := b.enter(ctx, inLive, &story); err != nil {
			return nil, err
		}
	}
	b.calls.started(req.Request, intent.ID)
	defer b.calls.ended(intent.ID)
	// From the intent on the caller may go: what was begun is brought to its
	// end, and its outcome put on record.
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.MintTimeout)
	defer cancel()
	// A crash after this append leaves an intent without an outcome. It is
	// closed as abandoned, by this broker when it is back or by any other once
	// it is older than the grace.
	app, err := b.append(work, req, intent)
	if err != nil {
		b.calls.forget(req.Request)
		if _, refused := store.IsOrder(err); refused {
			b.leave(inLive, &story)
		}
		return nil, err
	}
	return b.mint(ctx, work, p, mint{story: &story, intent: intent.ID, attempt: 1, approved: a,
		warrant: store.Warrant{Request: app.Receipt(0), Intent: app.Receipt(1), Approval: a.proof()}})
}

// allowed is the decision that an intent carries.
func (p *plan) allowed() *store.Decision {
	return &store.Decision{Outcome: store.Allow, Policy: p.policy, Reasons: append([]string{}, p.verdict.Reasons...)}
}

// mint is one intent on record that is to become a credential.
type mint struct {
	story    *store.Entry
	intent   string
	attempt  int
	approved *approved // nil where nobody had to approve
	warrant  store.Warrant
}

// mint turns an intent on record into a credential that is on record, and
// only then returns it. Every way out puts an outcome on record, or leaves it
// to the keeper where the recorder does not answer.
// caller is the call's own context, ctx the one in which the work is done.
func (b *Broker) mint(caller, ctx context.Context, p *plan, m mint) (reply *Reply, err error) {
	request := m.story.Request
	defer func() {
		if err == nil {
			return
		}
		b.calls.answered(request, b.Now())
		// Another broker may have revoked it before this one was through.
		if t, ok := b.index.get(request); ok && t.stoppedByFreeze() || b.index.covered(m.story.Orchestrator, m.story.Run, m.story.Step, m.story.Action) {
			err = ErrFrozen
		}
	}()
	// A crash in Mint or after it leaves a secret that nobody holds. It dies by
	// its first TTL; the intent is closed as abandoned.
	minted, err := b.Issuer.Mint(ctx, m.warrant)
	if err != nil {
		b.discard(request, minted)
		return nil, b.failed(p, m, err)
	}
	minted.Issued.Intent, minted.Issued.Attempt = m.intent, m.attempt
	s := b.submission(store.CredentialIssued, m.story)
	s.SetDetails(minted.Issued)
	// Noted beside the append, not after it: where the append fails the keeper
	// finds that the ledger does not know the credential, and forgets the note.
	var noted sync.WaitGroup
	noted.Go(func() {
		b.note(inflight.Request{ID: request, Orchestrator: m.story.Orchestrator, Run: m.story.Run, Step: m.story.Step,
			Scope: m.story.Action, Status: string(store.StatusIssued), Expires: minted.Issued.Expires.Time})
	})
	// A crash after this append leaves a live credential whose holder never got
	// it: a retry under the same key revokes it, or it ends by its first TTL
	// and is closed when it is due.
	app, err := b.append(ctx, s)
	if err != nil {
		noted.Wait()
		// Whether it is on record is not known, so it must not be handed over.
		// Where the recorder has it after all, the keeper finds it condemned.
		b.index.condemn(request, CauseUndelivered)
		b.discard(request, minted)
		if _, refused := store.IsOrder(err); refused || errors.Is(err, store.ErrMalformed) {
			return nil, b.failed(p, m, err)
		}
		return nil, fmt.Errorf("record the credential of request %s: %w", request, unavailable(err))
	}
	// A crash between Activate and the reply leaves the same, with its full
	// TTL.
	if err := b.Issuer.Activate(ctx, minted); err != nil {
		b.undelivered(request, m.intent)
		return nil, vaultError(err)
	}
	if err := caller.Err(); err != nil {
		b.index.condemn(request, CauseUndelivered)
	}
	given := minted.Credential
	if p.verdict.Grant.Delivery == scopes.Gateway {
		// A crash from here on takes the session with it; the credential is revoked
		// when this broker is back.
		if given, err = b.session(ctx, p, m, minted); err != nil {
			b.undelivered(request, m.intent)
			return nil, err
		}
	}
	if t, ok := b.index.get(request); !ok || !t.live || t.intent != m.intent || t.condemned != "" {
		// The caller is gone, or the step was ended while this was under way.
		if b.Gateway != nil {
			b.Gateway.End(m.intent)
		}
		b.undelivered(request, m.intent)
		if err := caller.Err(); err != nil {
			return nil, err
		}
		return nil, ErrClosed
	}
	noted.Wait()
	hash := store.LeafHash(app.Entries[0].Leaf)
	reply = &Reply{
		Request: request, Step: m.story.Step, Run: m.story.Run, Identity: m.story.Agent, Scope: m.story.Action, Target: m.story.Resource,
		Credential: given, IssuedAt: s.Time.Time, Expires: minted.Issued.Expires.Time,
		Index: app.Entries[0].Index, LeafHash: base64.StdEncoding.EncodeToString(hash[:]), Approved: m.approved.said(),
		Answered: func() { b.calls.answered(request, b.Now()) },
	}
	if p.ask.Receipt {
		r := app.Receipt(0)
		reply.Receipt = r.TlogProof()
	}
	return reply, nil
}

// undelivered ends what was issued and is not handed over, as far as it can
// now; the keeper goes on. Where the step was ended meanwhile, that is why.
// Where another intent has taken its place, it is ended already.
func (b *Broker) undelivered(request, intent string) {
	if t, ok := b.index.get(request); !ok || t.intent != intent {
		return
	}
	b.index.condemn(request, CauseUndelivered)
	t, _ := b.index.get(request)
	b.finally(func(ctx context.Context) error {
		return b.end(ctx, request, store.CredentialRevoked, t.condemned)
	})
}

// failed puts on record that an intent came to nothing, and returns what the
// caller is told.
func (b *Broker) failed(p *plan, m mint, cause error) error {
	told, slug := vaultError(cause), "internal"
	switch {
	case errors.Is(told, issuer.ErrVaultUnavailable), errors.Is(told, issuer.ErrVaultRefused):
		slug = "vault-unavailable"
	case errors.Is(told, store.ErrUnavailable):
		slug = "ledger-unavailable"
	}
	stage := issuer.Stage(cause)
	if stage == "" {
		stage = "mint"
		if _, refused := store.IsOrder(cause); refused {
			stage = "record"
		}
	}
	s := b.submission(store.CredentialFailed, m.story)
	s.SetDetails(store.FailedDetails{Intent: m.intent, Attempt: m.attempt, Problem: slug, Stage: stage})
	b.Log.Warn("credential not minted", zap.String("request", m.story.Request), zap.String("stage", stage), zap.Error(cause))
	err := b.finally(func(ctx context.Context) error {
		_, err := b.append(ctx, s)
		return err
	})
	if err != nil && !errors.Is(err, store.ErrUnavailable) {
		b.Log.Warn("failure not recorded", zap.String("request", m.story.Request), zap.Error(err))
	}
	if m.approved.request() == m.story.Request && m.attempt == 1 {
		return told // the approval stays usable
	}
	b.note(inflight.Request{ID: m.story.Request, Orchestrator: m.story.Orchestrator, Run: m.story.Run, Step: m.story.Step,
		Scope: m.story.Action, Status: string(store.StatusFailed)})
	return told
}

// discard revokes, as far as it can, what must not be handed over.
func (b *Broker) discard(request string, m *issuer.Minted) {
	if m == nil {
		return
	}
	if err := b.finally(func(ctx context.Context) error { return b.Issuer.Discard(ctx, m) }); err != nil {
		b.Log.Warn("credential not discarded; it dies by its first TTL", zap.String("request", request), zap.Error(err))
	}
}

// finally runs fn with a time of its own, since what led to it may have been
// that time had run out.
func (b *Broker) finally(fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
	defer cancel()
	return fn(ctx)
}

// join is a call that finds its request under way or answered. again says
// that the request came to nothing, and the call may open a new one.
func (b *Broker) join(ctx context.Context, p *plan, r *store.Request) (reply *Reply, again bool, err error) {
	if p.ask.Key != "" && r.Body != p.body {
		return nil, false, ErrIdempotency
	}
	if !r.Minting && r.Status == store.StatusIssued {
		reply, err := b.retry(ctx, p, r)
		return reply, false, err
	}
	if r.Pending != nil {
		return b.attend(ctx, p, r)
	}
	wait := b.JoinWait
	if p.ask.Wait > 0 {
		wait = p.ask.Wait
	}
	out := time.NewTimer(wait)
	defer out.Stop()
	poll := time.NewTicker(time.Second)
	defer poll.Stop()
	w := b.index.watch(r.ID)
	defer w.stop()
	for {
		t, known := w.latest()
		switch {
		case known && t.condemned == store.CauseFrozen:
			return nil, false, ErrFrozen
		case known && (t.minting || t.status == store.StatusApproved):
		case known && t.status == store.StatusFailed && t.attempt <= 1:
			return nil, true, nil
		case known:
			return nil, false, ErrClosed
		}
		look := !known
		if !look {
			select {
			case <-w.C:
				continue
			case <-poll.C:
				look = true
			case <-out.C:
				return &Reply{Request: r.ID, Status: store.StatusApproved}, false, nil
			case <-b.draining:
				return nil, false, ErrShuttingDown
			case <-ctx.Done():
				return nil, false, ctx.Err()
			}
		}
		if look {
			found, err := b.refresh(ctx, r.ID)
			if err != nil {
				return nil, false, err
			}
			if t, known := w.latest(); !known || !found && t.minting {
				// It was closed and is no longer remembered. A key would be, had
				// there been a credential; without a key nobody can tell.
				if p.ask.Key != "" {
					return nil, true, nil
				}
				return nil, false, ErrClosed
			}
		}
	}
}

// retry is a call under a key whose request was answered: once, soon after,
// and where the credential can be called back, it replaces what was issued.
func (b *Broker) retry(ctx context.Context, p *plan, r *store.Request) (*Reply, error) {
	if !r.Keyed || !r.Revocable || r.Attempt != 1 || b.Now().Sub(r.IssuedAt.Time) > store.RetryWindow || !r.NotPast.After(b.Now()) {
		return nil, ErrClosed
	}
	// A call that was there before the first was answered is no retry: its
	// sender holds, or will hold, what the first got.
	if at, here := b.calls.answer(r.ID); here {
		if at.IsZero() || !p.ask.Arrived.After(at) {
			return nil, ErrClosed
		}
	} else if !b.cameAfter(p.ask.Arrived, r) {
		// The next call comes after it.
		select {
		case <-time.After(min(p.ask.Wait, otherBroker)):
		case <-b.draining:
			return nil, ErrShuttingDown
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return &Reply{Request: r.ID, Status: store.StatusApproved}, nil
	}
	app, err := b.Recorder.Open(ctx, r.ID)
	if err != nil {
		return nil, unavailable(err)
	}
	entries, err := b.took(app)
	if err != nil {
		return nil, err
	}
	t, ok := b.index.get(r.ID)
	cause := t.cause
	if t.live {
		cause = t.condemned // it is to end, and Vault has not confirmed it yet
	}
	if r.Pending != nil && !r.Pending.Expires.After(b.Now()) {
		return nil, ErrClosed // too late for what people approved to be collected again
	}
	if !ok || t.attempt != 1 || t.minting || cause != CauseUndelivered && cause != CauseLost && (!t.live || cause != "") {
		return nil, ErrClosed // ended on purpose, or another call was quicker
	}
	request, rests := b.rests(app, entries, r.ID, p.verdict.Grant.Scope)
	if request == nil || p.changed(r.Grant, rests, b.excluded(p)) || (rests == nil) != (t.pending == nil && t.drawn == "") {
		return nil, ErrClosed // what would be granted has changed
	}
	// What is live already has its place.
	if err := b.enter(ctx, inLive, t.story); err != nil {
		return nil, err
	}
	subs := []*store.Submission{}
	if t.live {
		// A crash after Revoke leaves a credential that is dead in Vault and live
		// on record: another retry, or the keeper when it is due, revokes it
		// again, which Vault takes as done, and closes it.
		b.calls.began(t.intent) // so that the keeper does not take it for lost meanwhile
		defer b.calls.ended(t.intent)
		if b.Gateway != nil {
			b.Gateway.End(t.intent)
		}
		if err := b.Issuer.Revoke(ctx, t.issued); err != nil {
			return nil, vaultError(err)
		}
		revoked := b.submission(store.CredentialRevoked, t.story)
		revoked.Cause = store.Ptr(CauseRetry)
		revoked.SetDetails(store.ClosedDetails{Intent: t.intent, Attempt: t.attempt})
		subs = append(subs, revoked)
	}
	intent := b.submission(store.CredentialIssuing, t.story)
	intent.Decision = p.allowed()
	intent.SetDetails(store.IssuingDetails{Attempt: 2, Grant: r.Grant, NotPast: r.NotPast, Approval: rests.request()})
	subs = append(subs, intent)

	b.calls.started(r.ID, intent.ID)
	defer b.calls.ended(intent.ID)
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.MintTimeout)
	defer cancel()
	// A crash after this append leaves an intent without an outcome, as after
	// the first.
	done, err := b.append(work, subs...)
	if err != nil {
		b.calls.answered(r.ID, b.Now()) // another try may follow
	}
	if _, frozen := store.IsOrder(err, store.OrderFrozen); frozen {
		return nil, err
	}
	if _, refused := store.IsOrder(err); refused {
		return nil, ErrClosed // another broker's retry was quicker
	}
	if err != nil {
		return nil, err
	}
	return b.mint(ctx, work, p, mint{story: t.story, intent: intent.ID, attempt: 2, approved: rests,
		warrant: store.Warrant{Request: *request, Intent: done.Receipt(len(subs) - 1), Approval: rests.proof()}})
}

// cameAfter reports whether a call that arrived then came after r, which another
// broker answered, was issued: by the recorder's clock, or, which may have been
// fast, by when this broker heard of it, which was no earlier than it was issued.
func (b *Broker) cameAfter(arrived time.Time, r *store.Request) bool {
	if arrived.After(r.IssuedAt.Add(otherBroker)) {
		return true
	}
	t, ok := b.index.get(r.ID)
	return ok && t.intent == r.Intent && !t.heard.IsZero() && arrived.After(t.heard.Add(otherBroker))
}

// submission starts an entry of type t that repeats the story of its request.
func (b *Broker) submission(t store.Type, story *store.Entry) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(b.Now()),
		Agent: story.Agent, Subject: story.Subject, Orchestrator: story.Orchestrator, Run: story.Run, Step: story.Step,
		Request: story.Request, Resource: story.Resource, Action: story.Action, Decision: story.Decision, Risk: story.Risk,
	}}
	s.SetDetails(struct{}{})
	return s
}

// append puts entries on record and takes what the recorder answered into the
// index.
func (b *Broker) append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	app, err := b.Recorder.Append(ctx, subs...)
	if weak, ok := store.IsOrder(err, store.OrderWeak); ok {
		b.Log.Warn("the recorder's catalogue or owners differ from this broker's", zap.String("scope", subs[0].Action), zap.String("recorder", weak.Message))
	}
	if apart, ok := store.IsOrder(err, store.OrderClock); ok {
		// Nothing is wrong with the request, and it can be made again.
		return nil, fmt.Errorf("%w: %s", store.ErrUnavailable, apart.Message)
	}
	if err != nil {
		return nil, unavailable(err)
	}
	if len(app.Entries) != len(subs) {
		return nil, fmt.Errorf("%w: the recorder answered %d entries for %d", store.ErrUnavailable, len(app.Entries), len(subs))
	}
	entries := make([]placed, len(subs))
	for i, s := range subs {
		e := &s.Entry
		if e.Time.IsZero() { // a Recorder need not stamp what it was given
			if e, err = store.ParseLeaf(app.Entries[i].Leaf); err != nil {
				return nil, unavailable(err)
			}
			s.Entry = *e
		}
		entries[i] = placed{e, app.Entries[i].Index}
	}
	b.index.acknowledged(entries...)
	if b.index.hasFreed() {
		b.flush() // now, so that who ended something can use its place at once
	}
	return app, nil
}

// refresh takes what the recorder says is open of one request into the index,
// and reports whether it is.
func (b *Broker) refresh(ctx context.Context, id string) (bool, error) {
	app, err := b.Recorder.Open(ctx, id)
	if err != nil {
		return false, unavailable(err)
	}
	entries, err := b.took(app)
	return slices.ContainsFunc(entries, func(p placed) bool { return p.Request == id }), err
}

// took takes what the recorder said of one request into the index.
func (b *Broker) took(app *store.Appended) ([]placed, error) {
	entries, err := parse(app)
	if err != nil {
		return nil, unavailable(err)
	}
	size, err := store.CheckpointSize(app.Checkpoint)
	if err != nil {
		return nil, unavailable(err)
	}
	b.index.looked(entries, size)
	return entries, nil
}

// unavailable marks every error of the recorder that is not a refusal as one
// after which the outcome is not known.
func unavailable(err error) error {
	if _, refused := store.IsOrder(err); refused || err == nil ||
		errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrMalformed) || errors.Is(err, store.ErrConflict) {
		return err
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// vaultError marks errors of the issuer that name no kind.
func vaultError(err error) error {
	if err == nil || errors.Is(err, issuer.ErrVaultUnavailable) || errors.Is(err, issuer.ErrVaultRefused) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrMint, err)
}

// state makes sure that what is under way can be known: Redis answers, and
// holds what was written to it, since when state returns.
func (b *Broker) state(ctx context.Context) (time.Time, error) {
	select {
	case <-b.index.ready:
	default:
		t := time.NewTimer(2 * time.Second)
		defer t.Stop()
		select {
		case <-b.index.ready:
		case <-t.C:
			return time.Time{}, fmt.Errorf("%w: what is open was not read yet", store.ErrUnavailable)
		case <-b.draining:
			return time.Time{}, ErrShuttingDown
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		}
	}
	since, err := b.Inflight.Since(ctx)
	if err != nil || !since.IsZero() {
		return since, err
	}
	if err := b.rebuild(ctx); err != nil {
		return time.Time{}, err
	}
	return b.Inflight.Since(ctx)
}

// note tells the other brokers where a request stands. Redis is no more than
// quick: where it does not answer, they learn it from the ledger.
func (b *Broker) note(r inflight.Request) {
	if err := b.Inflight.Put(b.ctx, r); err != nil {
		b.Log.Warn("state not noted", zap.String("request", r.ID), zap.Error(err))
	}
}

// newRequestID returns a fresh name for a request. It begins with the time, so
// that the ledger's indexes grow at their ends.
func newRequestID() string { return "req_" + strings.ReplaceAll(store.NewID(), "-", "") }
