package broker

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

// Identity checks step identity tokens.
type Identity interface {
	Verify(token, audience string) (*issuer.Claims, error)
}

// Introspect returns the claims of a step identity token whose credential is
// live, and nil for any other token (RFC 7662, section 2.2: no reason is
// given). With use, the resource server says what the token is used for, and
// it is told that the token is good only when the use is on record.
func (b *Broker) Introspect(ctx context.Context, server, token, use string) (*issuer.Claims, error) {
	if !b.begin() {
		return nil, ErrShuttingDown
	}
	defer b.work.Done()
	if b.Identity == nil {
		return nil, nil
	}
	claims, err := b.Identity.Verify(token, "")
	if err != nil || claims.ID == "" || !store.ValidID(claims.Request) {
		b.Log.Debug("token introspected and not known", zap.String("by", server))
		return nil, nil
	}
	t, live := b.index.serial(claims.ID)
	if !live || b.index.stale() {
		// Another broker may have issued it a moment ago, or ended it while this
		// one did not follow.
		found, err := b.refresh(ctx, claims.Request)
		if err != nil {
			return nil, fmt.Errorf("introspect: %w", err)
		}
		if t, live = b.index.serial(claims.ID); !live || !found {
			return nil, nil
		}
	}
	if t.condemned != "" || b.index.covered(t.story.Orchestrator, t.story.Run, t.story.Step, t.story.Action) || !b.Now().Before(t.issued.Expires.Time) {
		return nil, nil
	}
	if use != "" {
		s := b.submission(store.CredentialUsed, t.story)
		s.SetDetails(store.UsedDetails{Intent: t.intent, Via: "introspection", By: server, Use: use})
		// A crash after this append leaves a use on record that the resource
		// server did not go on with.
		if _, err := b.append(ctx, s); err != nil {
			return nil, err
		}
	}
	return claims, nil
}

// Record puts one entry on record that is no part of the flow: what
// auth.NewRefusals is to be given.
func (b *Broker) Record(ctx context.Context, s *store.Submission) error {
	_, err := b.append(ctx, s)
	return err
}
