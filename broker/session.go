package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// reaches says why a grant for the access path could not be delivered by this
// broker: scopes.ErrDelivery where it has no such gateway, gateway.ErrFull where
// that is full.
func (b *Broker) reaches(g store.Grant) error {
	if g.Delivery != scopes.Gateway {
		return nil
	}
	err := gateway.ErrNoGateway
	if b.Gateway != nil {
		err = b.Gateway.Serves(g.Access)
	}
	if errors.Is(err, gateway.ErrNoGateway) {
		return fmt.Errorf("%w: %s is reached through the gateway, and this broker has none for it", scopes.ErrDelivery, g.Scope)
	}
	return err
}

// session opens the session of what was minted, and returns what the step is
// told instead of the secret.
func (b *Broker) session(ctx context.Context, p *plan, m mint, minted *issuer.Minted) (*issuer.Credential, error) {
	if b.Gateway == nil {
		return nil, fmt.Errorf("%w: %w", ErrMint, gateway.ErrNoGateway)
	}
	grant := p.verdict.Grant
	story := *m.story
	story.Details, story.Sealed = nil, nil
	_, token, err := b.Gateway.Open(gateway.Params{
		Story: &story, Owners: p.caller.Owners, Subject: p.ask.Subject, Proved: p.ask.Proved,
		Intent: m.intent, Grant: grant, Secret: minted.Credential, Expires: minted.Issued.Expires.Time,
		Opened: context.WithoutCancel(ctx),
	})
	if errors.Is(err, gateway.ErrFull) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMint, err)
	}
	c := &issuer.Credential{Kind: issuer.KindGateway, Revocable: true, Protocol: grant.Access.Protocol,
		Address: b.Gateway.Addresses[grant.Access.Protocol], Token: token}
	if c.Protocol == store.ProtocolPostgres {
		// Any user name will do; clients want one.
		c.Username = "step"
		if _, database, ok := strings.Cut(grant.Access.Upstream, "/"); ok {
			c.Database = database
		}
	}
	return c, nil
}

// lost reports whether t is this broker's, for the access path, and has no
// session any more: the process that held it has ended. What is about to end by
// its own time is left to.
func (b *Broker) lost(t *tracked, now time.Time) bool {
	return t.issued.Kind == string(issuer.KindGateway) && t.writer == b.Writer && !b.calls.workingOn(t.intent) &&
		t.issued.Expires.Sub(now) > b.Tick && (b.Gateway == nil || !b.Gateway.Has(t.intent))
}

// endSessions revokes the credentials of the sessions that this process holds:
// nobody can use them once it has ended. What is not done within closingWithin,
// and what a crash leaves behind, is revoked when this broker is back, and ends
// by its own time where it does not come back: then another closes it.
func (b *Broker) endSessions() {
	if b.Gateway == nil {
		return
	}
	ctx, cancel := context.WithTimeout(b.ctx, closingWithin)
	defer cancel()
	var work errgroup.Group
	work.SetLimit(stopping)
	for _, id := range b.index.pick(func(_ string, t *tracked) bool { return t.live && b.Gateway.Has(t.intent) }) {
		b.index.condemn(id, CauseLost)
		work.Go(func() error {
			if ctx.Err() != nil {
				return nil
			}
			if err := b.end(ctx, id, store.CredentialRevoked, CauseLost); err != nil {
				b.Log.Warn("a session's credential is not revoked; this broker does it when it is back", zap.String("request", id), zap.Error(err))
			}
			return nil
		})
	}
	_ = work.Wait() // what failed was logged
}

// cuts ends the sessions that other brokers were told to end, until the broker
// stops. What Redis loses the record brings a moment later.
func (b *Broker) cuts() {
	tick := time.NewTicker(b.Tick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-b.ctx.Done():
			return
		}
		told, err := b.Inflight.Cuts(b.ctx)
		if err != nil {
			continue // who asks for a credential is told
		}
		for _, what := range told {
			id, rest, _ := strings.Cut(what, " ")
			intent, cause, _ := strings.Cut(rest, " ")
			if cause != CauseFinished {
				cause = CauseRequested
			}
			if t, ok := b.index.get(id); ok && t.intent == intent {
				b.index.condemn(id, cause) // or it would be taken for lost
			}
			b.Gateway.End(intent)
		}
	}
}

// maxReason is the longest reason in bytes that a gateway may ask with: it has to
// fit in an entry.
const maxReason = 16 << 10

// maxAsk is how long a call through the gateway waits for people at most, as a
// call for a credential does.
const maxAsk = 5 * time.Minute

// askFor is gateway.Ask: it asks for scope in the name of the step that s is of,
// by whom s was asked for. The session that comes back is for one call: when it
// is closed, its credential is revoked.
func (b *Broker) askFor(ctx context.Context, s *gateway.Session, scope, reason string) (*gateway.Session, error) {
	if len(reason) > maxReason {
		return nil, fmt.Errorf("%w: a reason of %d bytes, at most %d", gateway.ErrTooLarge, len(reason), maxReason)
	}
	wait := maxAsk
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)-time.Second) // a second for the mint
	}
	ask := Ask{Step: s.Story.Step, Run: s.Story.Run, Scope: scope, Reason: reason, Subject: s.Subject, Proved: s.Proved,
		Delivery: scopes.Gateway, Wait: max(wait, time.Millisecond), oneCall: true}
	// No caller can send such a body, so that nobody joins what is asked for here
	// but another such call.
	var err error
	if ask.Body, err = json.Marshal([]string{"gateway", ask.Run, scope, reason}); err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrMalformed, err)
	}
	caller := Caller{Orchestrator: s.Story.Orchestrator, Owners: s.Owners}
	if _, err := b.Charge(ctx, caller, scope); err != nil {
		return nil, err
	}
	reply, err := b.Request(ctx, caller, ask)
	var denied *Denied
	var closed *NotApproved
	switch {
	case errors.As(err, &denied), errors.As(err, &closed), errors.Is(err, ErrFrozen):
		return nil, fmt.Errorf("%w: %w", gateway.ErrDenied, err)
	case err != nil:
		return nil, err
	}
	if reply.Credential == nil {
		w := &gateway.Waiting{Request: reply.Request}
		if reply.Waiting != nil {
			w.URL = reply.Waiting.URL
		}
		return nil, w
	}
	reply.Answered()
	asked, err := b.Gateway.Session(reply.Credential.Token)
	if err != nil {
		return nil, err // it ended at once
	}
	// Until it is closed the keeper leaves it alone, and then it finds it
	// condemned. A crash before that leaves what any lost session leaves.
	b.calls.began(asked.Intent)
	context.AfterFunc(asked.Context(), func() {
		b.index.condemn(reply.Request, CauseCall)
		b.calls.ended(asked.Intent)
	})
	return asked, nil
}
