package issuer

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// dropWithin bounds the clean-up after a failed mint. It is not the caller's
// time that runs: the caller may have gone.
const dropWithin = 5 * time.Second

// Mint makes the credential that w warrants. Nothing is handed out yet: the
// caller records what Minted.Issued says, then calls Activate, and only then
// replies. Errors wrap store.ErrWarrant (Vault was not turned to),
// ErrVaultUnavailable or ErrVaultRefused, and a *StageError names where.
//
// A crash in here leaves at most a child token, with what hangs on it, that
// nobody holds: it dies by FirstTTL, and the intent is closed as abandoned.
func (i *Issuer) Mint(ctx context.Context, w store.Warrant) (_ *Minted, err error) {
	j, err := i.warranted(w)
	if err != nil {
		return nil, err
	}
	if i.cfg.Minting != nil {
		var done func(error)
		ctx, done = i.cfg.Minting(ctx, j.scope, j.Intent.Request)
		defer func() { done(err) }()
	}
	if j.scope.Engine == scopes.Identity {
		return i.mintIdentity(j)
	}
	if i.client == nil {
		return nil, &StageError{stageCreate, fmt.Errorf("%w: no Vault is configured", ErrVaultRefused)}
	}
	if j.scope.Engine == scopes.Token {
		return i.mintToken(ctx, j)
	}
	return i.mintSecret(ctx, j)
}

// errEnded is what a mint comes to that was too slow for the TTL asked for.
var errEnded = fmt.Errorf("%w: what was granted ended before it could be minted", ErrVaultUnavailable)

// job is a mint that was found to be warranted.
type job struct {
	*store.Warranted
	scope *scopes.Scope
	now   time.Time
	end   store.Time // of the credential: the intent's NotPast, or a full TTL from now, whichever is earlier
}

// left is how long the credential may still live, in whole seconds: Vault
// knows no smaller unit.
func (j *job) left(now time.Time) time.Duration { return j.end.Sub(now).Truncate(time.Second) }

// life is how long Vault lets the step's token live: left, rounded up, so that
// it does not end up to a second before its holder was told, and a TTL of one
// second is one. It is never longer than the TTL granted; what it is longer
// than the end on record, the broker cuts off by revoking it there.
func (j *job) life(now time.Time) time.Duration {
	return min(wholeSeconds(j.end.Sub(now)), time.Duration(j.Grant.TTL).Truncate(time.Second))
}

func wholeSeconds(d time.Duration) time.Duration {
	return (d + time.Second - 1).Truncate(time.Second)
}

// warranted checks everything that must hold before Vault is turned to. It
// spends the intent: whatever becomes of the mint, there is no second one.
func (i *Issuer) warranted(w store.Warrant) (*job, error) {
	now := i.cfg.Now()
	refuse := func(stage, format string, a ...any) (*job, error) {
		return nil, &StageError{stage, fmt.Errorf("%w: %w", store.ErrWarrant, fmt.Errorf(format, a...))}
	}
	v, err := w.Verify(i.cfg.Log, now)
	if err != nil {
		return nil, &StageError{stageWarrant, err}
	}
	set := i.cfg.Scopes()
	scope, known := set.Scope(v.Grant.Scope)
	switch {
	case v.Intent.Decision.Policy != set.Digest():
		return refuse(stageWarrant, "the intent was decided under %s, in force is %s", v.Intent.Decision.Policy, set.Digest())
	case v.Grant.Scope != v.Intent.Action:
		return refuse(stageWarrant, "the grant is of scope %q, the intent of %q", v.Grant.Scope, v.Intent.Action)
	case !known:
		return refuse(stageGrant, "scope %q is not in the issuer's catalogue", v.Grant.Scope)
	case !scope.MayAsk(v.Intent.Orchestrator):
		return refuse(stageGrant, "orchestrator %s may not ask for %s", v.Intent.Orchestrator, scope.Name)
	case scope.Approval != nil && (v.Rule == nil || !v.Rule.Covers(scope.Approval)):
		return refuse(stageGrant, "%s needs more approval in the issuer's catalogue than was given", scope.Name)
	case v.Issuing.Approval != "" && v.Issuing.Approval != v.Intent.Request && !stands(w.Approval, scope.Approval):
		return refuse(stageGrant, "%s may not be approved for a whole run as it was, in the issuer's catalogue", scope.Name)
	case v.Grant.Delivery != scopes.Direct && v.Grant.Delivery != scopes.Wrapped && v.Grant.Delivery != scopes.Gateway:
		return refuse(stageGrant, "delivery %q is not minted", v.Grant.Delivery)
	}
	for _, id := range []string{v.Intent.Orchestrator, v.Intent.Run, v.Intent.Step, v.Intent.Request} {
		if !store.ValidID(id) {
			return refuse(stageWarrant, "%q is not a valid ID", id)
		}
	}
	own, err := set.Resolve(v.Grant.Scope, time.Duration(v.Grant.TTL), v.Grant.Params, v.Grant.Delivery, v.Grant.PublicKey, v.Grant.Audience)
	switch {
	case err != nil:
		return refuse(stageGrant, "the issuer's catalogue does not give this grant: %w", err)
	case own.Digest() != v.Grant.Digest():
		return refuse(stageGrant, "the issuer's catalogue gives another grant for %s than the one on record", scope.Name)
	case (own.Access == nil) == (own.Delivery == scopes.Gateway):
		return refuse(stageGrant, "what the access path lets through stands in a grant for it, and in no other")
	case own.Path != "" && path.Clean("/"+own.Path) != "/"+own.Path:
		return refuse(stageGrant, "Vault path %q is not in its shortest form", own.Path)
	// The broker's clock set NotPast and the recorder's the time. What they may
	// differ by lengthens nothing: a full TTL from now is the other bound.
	case v.Issuing.NotPast.After(v.Intent.Time.Add(time.Duration(own.TTL) + store.MaxIntentAge)):
		return refuse(stageWarrant, "%w: the intent ends %s after it was made, the grant after %s: compare the clocks of recorder and broker", store.ErrUnavailable, v.Issuing.NotPast.Sub(v.Intent.Time.Time), time.Duration(own.TTL))
	case !v.Issuing.NotPast.After(now):
		return refuse(stageWarrant, "%w", errEnded)
	case v.Intent.Time.Before(store.At(i.started).Time):
		// What was spent before the start is not remembered, so nothing from
		// before it is minted. The caller closes it as abandoned.
		return refuse(stageWarrant, "the intent is older than this issuer")
	case !i.spent.claim(v.Intent.ID, v.Intent.Time.Add(store.MaxIntentAge), now):
		return refuse(stageWarrant, "the intent was spent before")
	}
	end := v.Issuing.NotPast
	if full := now.Add(time.Duration(own.TTL)); full.Before(end.Time) {
		end = store.At(full)
	}
	return &job{Warranted: v, scope: scope, now: now, end: end}, nil
}

// stands reports whether the limits of an approval for a whole run, whose proofs
// were checked, are within those of rule: the people who set them decided under
// another scope's. A nil rule is that of a policy, which the catalogue does not
// know.
func stands(a *store.Approval, rule *store.Rule) bool {
	if rule == nil {
		return true
	}
	for _, r := range a.Decisions {
		e, err := store.ParseLeaf(r.Leaf)
		if err != nil {
			return false
		}
		d, err := store.DetailsAs[store.DecidedDetails](e)
		if err != nil || !MayStand(rule.Standing, d.Standing, e.Time) {
			return false
		}
	}
	return true
}

// MayStand reports whether an approval for a whole run, given at a time, is
// within what a rule allows of one; nothing is where it allows none.
func MayStand(limit *store.StandingLimit, terms *store.StandingTerms, at store.Time) bool {
	return limit != nil && terms != nil && terms.Uses <= limit.Uses && !terms.Until.After(at.Add(time.Duration(limit.For)))
}

// issued is what the record is to say of every credential of j.
func (j *job) issued(kind Kind, revocable bool) store.IssuedDetails {
	return store.IssuedDetails{
		Intent: j.Intent.ID, Attempt: j.Issuing.Attempt, Kind: string(kind), Revocable: revocable, Expires: j.end,
	}
}

func (i *Issuer) mintIdentity(j *job) (*Minted, error) {
	token, expires, err := i.cfg.Identity.sign(j)
	if err != nil {
		return nil, &StageError{stageIdentity, err}
	}
	d := j.issued(KindIdentity, false)
	d.Serial, d.Expires = j.Intent.ID, store.At(expires)
	return &Minted{&Credential{Kind: KindIdentity, Token: token}, d}, nil
}

// mintToken mints a scope whose credential is the child token itself.
func (i *Issuer) mintToken(ctx context.Context, j *job) (*Minted, error) {
	wrap := i.wrapTTL(j)
	c, err := i.child(ctx, j, wrap)
	if err != nil {
		return nil, err
	}
	d := j.issued(KindVaultToken, true)
	d.Accessor, d.WrappingAccessor = c.accessor, c.wrapping.accessor
	if wrap > 0 {
		d.Kind = string(KindWrapped)
		return &Minted{&Credential{Kind: KindWrapped, Revocable: true, WrappingToken: c.wrapping.token, Addr: i.cfg.PublicAddr}, d}, nil
	}
	return &Minted{&Credential{Kind: KindVaultToken, Revocable: true, Token: c.token, Addr: i.cfg.PublicAddr}, d}, nil
}

// mintSecret mints a scope whose credential the child token fetches. The
// login's own token never does: what the child fetched hangs on the child and
// dies with it.
func (i *Issuer) mintSecret(ctx context.Context, j *job) (*Minted, error) {
	c, err := i.child(ctx, j, 0)
	if err != nil {
		return nil, err
	}
	m, err := i.fetch(ctx, j, c)
	if err != nil {
		// m holds what is known of what came back, so that it can be revoked.
		m.Accessor = c.accessor
		i.drop(ctx, m, err)
		return nil, err
	}
	return m.minted()
}

// drop revokes, as far as it can, what a failed mint left. What it cannot
// revoke dies by the first TTL.
func (i *Issuer) drop(ctx context.Context, d fetched, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropWithin)
	defer cancel()
	if err := i.Revoke(ctx, d.IssuedDetails); err != nil {
		i.log.Warn("a failed mint could not be cleaned up; it ends by itself",
			zap.String("intent", d.Intent), zap.Duration("within", i.cfg.FirstTTL), zap.NamedError("mint", cause), zap.Error(err))
	}
}

// child is a token for one step.
type child struct {
	token, accessor string
	wrapping        struct{ token, accessor string }
}

// child creates the step's own token under the scope's role: orphan, narrow,
// with an end that no renewal passes, and at first shorter than the grace.
func (i *Issuer) child(ctx context.Context, j *job, wrap time.Duration) (*child, error) {
	life := j.life(i.cfg.Now())
	first := min(i.cfg.FirstTTL, life).Truncate(time.Second)
	if first <= 0 {
		return nil, &StageError{stageWarrant, fmt.Errorf("%w: %w", store.ErrWarrant, errEnded)}
	}
	// POST auth/token/create/:role_name
	s, err := i.wrapped(wrap).WriteWithContext(ctx, "auth/token/create/"+j.Grant.Role, map[string]any{
		"policies":          j.Grant.Policies,
		"no_default_policy": true,
		"ttl":               seconds(first),
		"explicit_max_ttl":  seconds(life),
		"renewable":         true,
		"num_uses":          0,
		"display_name":      "countersign-" + j.Intent.Step,
		"meta": map[string]string{
			"request": j.Intent.Request, "step": j.Intent.Step, "run": j.Intent.Run,
			"orchestrator": j.Intent.Orchestrator, "intent": j.Intent.ID,
		},
	})
	if err != nil {
		return nil, i.failed(stageCreate, err)
	}
	var c child
	if wrap > 0 {
		if s == nil || s.WrapInfo == nil || s.WrapInfo.Token == "" || s.WrapInfo.WrappedAccessor == "" {
			return nil, &StageError{stageCreate, fmt.Errorf("%w: the answer was not wrapped", ErrVaultRefused)}
		}
		c.accessor = s.WrapInfo.WrappedAccessor
		c.wrapping.token, c.wrapping.accessor = s.WrapInfo.Token, s.WrapInfo.Accessor
		return &c, nil
	}
	if s == nil || s.Auth == nil || s.Auth.ClientToken == "" {
		return nil, &StageError{stageCreate, fmt.Errorf("%w: no token came back: does auth/token/roles/%s exist? `countersign scopes vault` prints it", ErrVaultRefused, j.Grant.Role)}
	}
	c.token, c.accessor = s.Auth.ClientToken, s.Auth.Accessor
	if err := checkChild(s.Auth, j, first); err != nil {
		err = &StageError{stageCreate, fmt.Errorf("%w: token role %s: %w; `countersign scopes vault` prints it as it should be", ErrVaultRefused, j.Grant.Role, err)}
		i.drop(ctx, fetched{IssuedDetails: store.IssuedDetails{Intent: j.Intent.ID, Accessor: c.accessor}}, err)
		return nil, err
	}
	return &c, nil
}

// checkChild refuses a token that is wider than what was granted, however the
// role came to give it.
func checkChild(a *api.SecretAuth, j *job, first time.Duration) error {
	got, want := slices.Sorted(slices.Values(a.Policies)), slices.Sorted(slices.Values(j.Grant.Policies))
	switch {
	case a.Accessor == "":
		return errors.New("it makes tokens without accessor, which cannot be revoked: token_type must be service")
	case !slices.Equal(got, want):
		return fmt.Errorf("it gave policies %q where %q were granted", got, want)
	case !a.Orphan:
		return errors.New("it must make orphans: the step's token would die with the broker's login")
	case !a.Renewable:
		return errors.New("it must make renewable tokens")
	case time.Duration(a.LeaseDuration)*time.Second > first:
		return fmt.Errorf("it gave a TTL of %d s where %s was asked for: it must have no token_period", a.LeaseDuration, first)
	}
	return nil
}

// wrapTTL is how long a wrapping token lives: like everything that is not on
// record yet, no longer than the first TTL. Vault does not renew them, so a
// step unwraps within that time.
func (i *Issuer) wrapTTL(j *job) time.Duration {
	if j.Grant.Delivery != scopes.Wrapped {
		return 0
	}
	return max(time.Second, min(i.cfg.FirstTTL, j.left(i.cfg.Now())).Truncate(time.Second))
}

// Activate lengthens a minted credential from the first TTL to its full one.
// It is called once credential.issued is on record.
func (i *Issuer) Activate(ctx context.Context, m *Minted) error {
	if m.Issued.Accessor == "" {
		return nil // nothing of Vault's is to be kept alive
	}
	increment := wholeSeconds(m.Issued.Expires.Sub(i.cfg.Now())) // its explicit max TTL bounds it
	if increment <= 0 {
		return &StageError{stageActivate, fmt.Errorf("%w: it was so slow that the credential has ended", ErrVaultUnavailable)}
	}
	// POST auth/token/renew-accessor
	s, err := i.client.Logical().WriteWithContext(ctx, "auth/token/renew-accessor", map[string]any{
		"accessor": m.Issued.Accessor, "increment": seconds(increment),
	})
	switch {
	case err != nil:
		return i.failed(stageActivate, err)
	case s == nil || s.Auth == nil:
		return &StageError{stageActivate, fmt.Errorf("%w: the answer names no token", ErrVaultRefused)}
	// Two seconds to spare: Vault cuts to whole seconds, and time passes.
	case time.Duration(s.Auth.LeaseDuration+2)*time.Second < increment:
		return &StageError{stageActivate, fmt.Errorf("%w: renewed for %d s where %s was asked for: a max TTL of the token role or of auth/token is lower than the scope's", ErrVaultRefused, s.Auth.LeaseDuration, increment)}
	}
	return nil
}

// Discard revokes what a mint left whose issuance could not be recorded, or
// that could not be activated. It goes on when ctx has been cancelled, since
// the caller may have gone. What it cannot revoke dies by the first TTL.
func (i *Issuer) Discard(ctx context.Context, m *Minted) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropWithin)
	defer cancel()
	return i.Revoke(ctx, m.Issued)
}

// seconds writes a duration as Vault reads it.
func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) + "s" }

// spent remembers the intents that were minted on, for as long as their
// receipts would be accepted.
type spent struct {
	mu    sync.Mutex
	until map[string]time.Time
	swept time.Time
}

// claim reports whether id was not claimed before.
func (s *spent) claim(id string, until, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until == nil {
		s.until = map[string]time.Time{}
	}
	if now.Sub(s.swept) > store.MaxIntentAge {
		for id, t := range s.until {
			// A little longer than it is accepted: clocks are set back, too.
			if now.Sub(t) > store.MaxIntentAge {
				delete(s.until, id)
			}
		}
		s.swept = now
	}
	if _, ok := s.until[id]; ok {
		return false
	}
	s.until[id] = until
	return true
}
