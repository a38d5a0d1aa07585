package broker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

const (
	claimLife = 30 * time.Second // how long one broker is left to end a credential
	overdue   = time.Minute      // from then on claims are not looked at: Redis may lie
	parallel  = 8                // revocations under way at once
	cutKnown  = time.Minute      // how long brokers are told of a session to be cut: each looks every Tick
)

// New starts a broker: it reads what is open, follows it, ends credentials
// that are due and closes intents that came to nothing, until Close.
func New(cfg Config) (*Broker, error) {
	switch {
	case cfg.Recorder == nil || cfg.Issuer == nil || cfg.Scopes == nil || cfg.Inflight == nil:
		return nil, errors.New("broker: recorder, issuer, scopes and inflight are due")
	case !store.ValidID(cfg.Writer):
		return nil, fmt.Errorf("broker: writer %q is not a valid ID", cfg.Writer)
	case len(cfg.PrivacyKey) < 32:
		return nil, errors.New("broker: the privacy key must have 32 bytes or more")
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.Grace, time.Minute)
	def(&cfg.MintTimeout, 20*time.Second)
	def(&cfg.JoinWait, 5*time.Second)
	def(&cfg.Tick, 250*time.Millisecond)
	if err := cfg.Limits.Check(); err != nil {
		return nil, fmt.Errorf("broker: limits: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	b := &Broker{Config: cfg, index: newIndex(), calls: newCalls(), draining: make(chan struct{}), tries: map[string]try{}, unrevoked: newUnrevoked()}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.closings.append, b.closings.ctx = b.append, b.ctx
	b.index.now = cfg.Now
	if cfg.Gateway != nil {
		b.index.ended = cfg.Gateway.End
		cfg.Gateway.OnAsk(b.askFor)
	}
	if b.index.places = cfg.Limits.limited(); b.index.places {
		b.places.freed = make(chan struct{}, 1)
		b.loops.Go(b.keepPlaces)
	}
	b.loops.Go(b.follow)
	b.loops.Go(b.keep)
	b.loops.Go(b.sweep)
	b.loops.Go(b.alert)
	if cfg.Gateway != nil {
		b.loops.Go(b.cuts)
	}
	return b, nil
}

// begin counts a call in, unless the broker drains.
func (b *Broker) begin() bool {
	b.gate.Lock()
	defer b.gate.Unlock()
	select {
	case <-b.draining:
		return false
	default:
		b.work.Add(1)
		return true
	}
}

// Drain refuses new calls and lets those that wait go. Mints under way are
// brought to their end.
func (b *Broker) Drain() {
	b.gate.Lock()
	defer b.gate.Unlock()
	select {
	case <-b.draining:
	default:
		close(b.draining)
	}
}

// Settle waits until what was under way when the broker was drained is done, or
// ctx is.
func (b *Broker) Settle(ctx context.Context) {
	done := make(chan struct{})
	go func() { b.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// Close drains and stops the broker. Credentials that are out stay out, but for
// those whose sessions at the gateway end with this process.
func (b *Broker) Close() error {
	b.Drain()
	b.work.Wait()
	b.endSessions()
	b.cancel()
	b.loops.Wait()
	b.closings.work.Wait()
	return nil
}

// Ready says why no credential could be issued now, or nil.
func (b *Broker) Ready(ctx context.Context) error {
	select {
	case <-b.draining:
		return ErrShuttingDown
	default:
	}
	if b.index.stale() {
		return fmt.Errorf("%w: what is open is not followed", store.ErrUnavailable)
	}
	if err := b.Inflight.Ping(ctx); err != nil {
		return err
	}
	return b.Issuer.Ping(ctx)
}

// follow keeps the index up to date until the broker stops.
func (b *Broker) follow() {
	pause := 100 * time.Millisecond
	for b.ctx.Err() == nil {
		began := time.Now()
		err := b.followOnce()
		b.index.lost()
		if b.ctx.Err() != nil {
			return
		}
		if time.Since(began) > 10*time.Second {
			pause = 100 * time.Millisecond
		}
		b.Log.Warn("the recorder is not followed; trying again", zap.Duration("in", pause), zap.Error(err))
		select {
		case <-time.After(pause):
		case <-b.ctx.Done():
		}
		pause = min(2*pause, 5*time.Second)
	}
}

func (b *Broker) followOnce() error {
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	app, err := b.Recorder.Open(ctx, "")
	if err != nil {
		return err
	}
	size, err := store.CheckpointSize(app.Checkpoint)
	if err != nil {
		return err
	}
	entries, err := parse(app)
	if err != nil {
		return err
	}
	for _, id := range b.index.merge(entries, size, b.Now()) {
		found, err := b.refresh(ctx, id)
		if err != nil {
			return err
		}
		if !found {
			b.index.vanish(id, b.Now())
		}
	}
	if err := b.rebuild(b.ctx); err != nil {
		b.Log.Warn("state not rebuilt; the next call tries again", zap.Error(err))
	}
	if !b.announced.Load() {
		if err := b.PolicyLoaded(b.ctx, nil, b.Scopes.Current()); err != nil {
			return err
		}
		b.announced.Store(true)
	}
	return b.Recorder.Follow(b.ctx, size-1, func(a *store.Appended) error {
		entries, err := parse(b.index.news(a))
		if err != nil {
			return err
		}
		b.index.apply(entries...)
		if n := len(a.Entries); n > 0 {
			b.index.passed(a.Entries[n-1].Index)
		}
		if b.index.hasFreed() {
			select {
			case b.places.freed <- struct{}{}:
			default:
			}
		}
		return nil
	})
}

// rebuild writes what is open to Redis.
func (b *Broker) rebuild(ctx context.Context) error {
	// Places first: nobody begins anything before the marker that comes last.
	if err := b.hold(ctx); err != nil {
		return err
	}
	var open []inflight.Request
	b.index.pick(func(id string, t *tracked) bool {
		if t.live || t.minting {
			r := inflight.Request{ID: id, Orchestrator: t.story.Orchestrator, Run: t.story.Run, Step: t.story.Step, Scope: t.story.Action, Status: string(t.status)}
			if t.live {
				r.Expires = t.issued.Expires.Time
			}
			open = append(open, r)
		}
		return false
	})
	return b.Inflight.Rebuild(ctx, open)
}

// PolicyLoaded puts on record which catalogue and policy are in force. old is
// nil at start. It is what scopes.InForce.OnChange is to be given: where it
// fails, the old ones stay in force.
func (b *Broker) PolicyLoaded(ctx context.Context, old, set *scopes.Set) error {
	s := b.submission(store.PolicyLoaded, &store.Entry{Agent: b.agent(), Action: string(store.PolicyLoaded)})
	d := store.PolicyDetails{Digest: set.Digest(), Catalogue: set.CatalogueDigest(), Policy: set.PolicyDigest()}
	if old != nil {
		d.Previous = old.Digest()
	}
	s.SetDetails(d)
	s.Seal(store.SealedCatalogue, set.Text().Catalogue)
	s.Seal(store.SealedPolicy, set.Text().Policy)
	_, err := b.append(ctx, s)
	return err
}

// agent is the broker's own SPIFFE ID.
func (b *Broker) agent() string { return "spiffe://" + b.TrustDomain + "/broker/" + b.Writer }

// try is what the keeper remembers of a request it is busy with.
type try struct {
	busy  bool
	next  time.Time // not before
	pause time.Duration

	frozen string // the intent whose credential a freeze condemned, once it was claimed or another broker had
}

// keep ends what is due, until the broker stops.
func (b *Broker) keep() {
	tick := time.NewTicker(b.Tick)
	defer tick.Stop()
	slots := make(chan struct{}, parallel)
	var jobs sync.WaitGroup
	defer jobs.Wait()
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-b.ctx.Done():
			return
		}
		now := b.Now()
		if n%240 == 0 {
			b.index.forget(now)
			b.forgetTries()
			b.calls.prune(now.Add(-2 * store.RetryWindow))
		}
		for id, job := range b.due(now) {
			if !b.take(id, now) {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-b.ctx.Done():
				return
			}
			jobs.Go(func() {
				defer func() { <-slots }()
				ctx, cancel := context.WithTimeout(b.ctx, claimLife)
				defer cancel()
				err := job(ctx)
				if err != nil && b.ctx.Err() == nil {
					b.Log.Warn("not closed yet; trying again", zap.String("request", id), zap.Error(err))
				}
				b.give(id, err)
			})
		}
	}
}

// forgetTries drops what is remembered of requests that another broker ended.
func (b *Broker) forgetTries() {
	open := map[string]bool{}
	for _, id := range b.index.pick(func(_ string, t *tracked) bool { return t.live || t.minting }) {
		open[id] = true
	}
	b.gate.Lock()
	defer b.gate.Unlock()
	maps.DeleteFunc(b.tries, func(id string, t try) bool { return !t.busy && !open[id] })
}

func (b *Broker) take(id string, now time.Time) bool {
	b.gate.Lock()
	defer b.gate.Unlock()
	t := b.tries[id]
	if t.busy || now.Before(t.next) {
		return false
	}
	t.busy = true
	b.tries[id] = t
	return true
}

func (b *Broker) give(id string, err error) {
	b.gate.Lock()
	defer b.gate.Unlock()
	if err == nil {
		delete(b.tries, id)
		return
	}
	t := b.tries[id]
	t.busy, t.pause = false, min(max(2*t.pause, b.Tick), 15*time.Second)
	t.next = b.Now().Add(t.pause)
	b.tries[id] = t
}

// due says what there is to do at now, by request. Every broker follows what
// all of them issue, so that each can end what another left.
func (b *Broker) due(now time.Time) map[string]func(context.Context) error {
	jobs := map[string]func(context.Context) error{}
	b.index.pick(func(id string, t *tracked) bool {
		// What was handed over and nothing can call back goes on.
		condemned := t.condemned != "" && !t.stays && (t.issued.Revocable || !t.frozen && !irrevocable(t) || b.kept(t))
		switch {
		case t.live && condemned && t.frozen && t.issued.Revocable: // sweep's
		case t.live && condemned && !b.calls.workingOn(t.intent):
			cause := t.condemned
			jobs[id] = func(ctx context.Context) error { return b.end(ctx, id, store.CredentialRevoked, cause) }
		case t.live && !now.Before(t.issued.Expires.Time):
			late := now.Sub(t.issued.Expires.Time) > overdue
			jobs[id] = func(ctx context.Context) error { return b.expire(ctx, id, late) }
		case t.live && b.lost(t, now):
			jobs[id] = func(ctx context.Context) error { return b.end(ctx, id, store.CredentialRevoked, CauseLost) }
		case t.minting && !b.calls.workingOn(t.intent) && (t.writer == b.Writer || now.Sub(t.intentAt) > b.Grace):
			jobs[id] = func(ctx context.Context) error { return b.abandon(ctx, id) }
		}
		return false
	})
	return jobs
}

// kept reports whether t's credential was condemned in this process, which
// issued it, before it was handed over. One that another process issued, under
// whatever name, may have been.
func (b *Broker) kept(t *tracked) bool {
	_, here := b.calls.answer(t.story.Request)
	return here && t.writer == b.Writer
}

// expire closes a credential that has reached its end. Brokers share the work
// by claims; where a claim is stale or a lie, the ledger takes the first and
// refuses the rest.
func (b *Broker) expire(ctx context.Context, id string, late bool) error {
	if !late {
		if mine, err := b.Inflight.Claim(ctx, "end-"+id, claimLife); err == nil && !mine {
			return nil
		}
	}
	err := b.end(ctx, id, store.CredentialExpired, CauseTTL)
	if err != nil {
		_ = b.Inflight.Release(ctx, "end-"+id)
	}
	return err
}

// end takes a live credential back and puts it on record. What is closed
// already is no error.
func (b *Broker) end(ctx context.Context, id string, as store.Type, cause string) error {
	t, ok := b.index.get(id)
	if !ok || !t.live {
		return nil
	}
	if b.Gateway != nil {
		b.Gateway.End(t.intent) // before Vault is told: what is open is cut at once
	}
	// A crash after Revoke leaves a credential that is dead in Vault and live on
	// record. Whoever looks next revokes it again, which Vault takes as done,
	// and closes it.
	if t.issued.Revocable {
		if err := b.Issuer.Revoke(ctx, t.issued); err != nil {
			return vaultError(err)
		}
	}
	s := b.submission(as, t.story)
	s.Cause = store.Ptr(cause)
	s.SetDetails(store.ClosedDetails{Intent: t.intent, Attempt: t.attempt})
	return b.closing(ctx, id, s)
}

// abandon closes an intent that came to nothing: whatever it made dies by its
// first TTL.
func (b *Broker) abandon(ctx context.Context, id string) error {
	t, ok := b.index.get(id)
	if !ok || !t.minting || b.calls.workingOn(t.intent) {
		return nil
	}
	s := b.submission(store.CredentialAbandoned, t.story)
	s.Cause = store.Ptr(CauseAbandoned)
	s.SetDetails(store.ClosedDetails{Intent: t.intent, Attempt: t.attempt})
	return b.closing(ctx, id, s)
}

// closing appends the last entry of a credential or an intent. A refusal means
// that it is closed already, or in another state than this broker thought.
func (b *Broker) closing(ctx context.Context, id string, s *store.Submission) error {
	err := b.closings.put(ctx, s)
	if _, refused := store.IsOrder(err); refused {
		found, err := b.refresh(ctx, id)
		if err != nil {
			return err
		}
		if !found {
			b.index.vanish(id, b.Now())
		}
		t, ok := b.index.get(id)
		switch {
		case !ok || !t.live && !t.minting:
			err = nil
		case s.Type == store.CredentialAbandoned && t.live:
			// It had an outcome after all: nobody holds what was issued.
			if t.writer == b.Writer {
				b.index.condemn(id, CauseUndelivered)
			}
			err = nil
		default:
			err = fmt.Errorf("%s of request %s is not taken yet", s.Type, id)
		}
		b.noteTracked(id, s)
		return err
	}
	if err == nil {
		b.noteTracked(id, s)
	}
	return err
}

// noteTracked tells the other brokers what the index says of a request, which
// closed was about to close. What the index holds no more is closed: the
// follower may have dropped it already.
func (b *Broker) noteTracked(id string, closed *store.Submission) {
	r := inflight.Request{ID: id, Orchestrator: closed.Orchestrator, Run: closed.Run, Step: closed.Step, Scope: closed.Action, Status: string(store.StatusClosed)}
	if closed.Type == store.CredentialAbandoned {
		r.Status = string(store.StatusFailed)
	}
	if t, ok := b.index.get(id); ok {
		r.Status = string(t.status)
		if t.live {
			r.Expires = t.issued.Expires.Time
		}
	}
	b.note(r)
}

// RevokeStep ends a step's live credentials, and returns when Vault has done
// it and it is on record.
func (b *Broker) RevokeStep(ctx context.Context, c Caller, step, run string) (Revoked, error) {
	if !store.ValidID(step) || !store.ValidID(run) {
		return Revoked{}, fmt.Errorf("%w: step and run must be valid IDs", ErrMalformed)
	}
	if !b.begin() {
		return Revoked{}, ErrShuttingDown
	}
	defer b.work.Done()
	return b.revokeStep(ctx, stepKey{c.Orchestrator, run, step}, CauseRequested)
}

func (b *Broker) revokeStep(ctx context.Context, k stepKey, cause string) (Revoked, error) {
	// Connections are cut first, whatever the recorder and Vault do.
	for _, id := range b.index.step(k) {
		if t, ok := b.index.get(id); ok && t.live && t.issued.Kind == string(issuer.KindGateway) {
			b.index.condemn(id, cause)
		}
	}
	// What another broker issued a moment ago may not be in the index yet.
	others, err := b.Inflight.Step(ctx, k.orchestrator, k.run, k.step)
	if err != nil || b.index.stale() {
		app, err := b.Recorder.Open(ctx, "")
		if err != nil {
			return Revoked{}, unavailable(err)
		}
		entries, err := parse(app)
		if err != nil {
			return Revoked{}, unavailable(err)
		}
		b.index.apply(entries...)
	}
	for _, id := range others {
		if _, known := b.index.get(id); !known {
			if _, err := b.refresh(ctx, id); err != nil {
				return Revoked{}, err
			}
		}
	}
	var (
		out  Revoked
		mu   sync.Mutex
		work errgroup.Group
	)
	work.SetLimit(parallel)
	// Once begun it is brought to its end, whether or not the caller waits.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.MintTimeout)
	defer cancel()
	for _, id := range b.index.step(k) {
		t, ok := b.index.get(id)
		if !ok {
			continue
		}
		if t.live && irrevocable(&t) {
			// Nothing can call it back, so the record must not say that it was.
			out.Irrevocable++
			continue
		}
		b.index.condemn(id, cause)
		if !t.live {
			out.Pending++ // being minted: it ends before it is handed over
			continue
		}
		work.Go(func() error {
			if t.issued.Kind == string(issuer.KindGateway) && t.writer != b.Writer {
				// Its broker need not wait until Vault has done it and it is on record.
				if err := b.Inflight.Cut(ctx, id+" "+t.intent+" "+cause, b.Now().Add(cutKnown)); err != nil {
					b.Log.Warn("another broker's session is cut once it is on record", zap.String("request", id), zap.Error(err))
				}
			}
			err := b.end(ctx, id, store.CredentialRevoked, cause)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				out.Revoked++
				return nil
			}
			b.Log.Warn("credential not revoked yet; trying again", zap.String("request", id), zap.Error(err))
			out.Pending++
			if errors.Is(err, store.ErrUnavailable) {
				return err // dead in Vault, and not on record yet
			}
			return nil
		})
	}
	return out, work.Wait()
}

// Finish puts on record what the orchestrator says came of a step, and revokes
// what is left of its credentials.
func (b *Broker) Finish(ctx context.Context, c Caller, r Result) (Revoked, error) {
	if !store.ValidID(r.Step) || !store.ValidID(r.Run) {
		return Revoked{}, fmt.Errorf("%w: step and run must be valid IDs", ErrMalformed)
	}
	if !slices.Contains([]string{"succeeded", "failed", "skipped"}, r.Outcome) {
		return Revoked{}, fmt.Errorf("%w: outcome is one of succeeded, failed, skipped", ErrMalformed)
	}
	if !b.begin() {
		return Revoked{}, ErrShuttingDown
	}
	defer b.work.Done()
	k := stepKey{c.Orchestrator, r.Run, r.Step}
	// The summary is kept as long as what is said of the step's credentials; of a
	// step that has none left, as long as what is about no scope.
	s := b.submission(store.StepFinished, &store.Entry{
		Agent: issuer.SPIFFEID(b.TrustDomain, c.Orchestrator, r.Run, r.Step), Orchestrator: c.Orchestrator, Run: r.Run, Step: r.Step, Risk: b.index.risk(k),
	})
	s.SetDetails(store.FinishedDetails{Outcome: r.Outcome, Target: r.Target})
	s.Seal(store.SealedSummary, r.Summary)
	// A crash after this append leaves credentials of a step that is over: the
	// caller repeats the call, or they end by their TTL.
	if _, err := b.append(ctx, s); err != nil {
		return Revoked{}, err
	}
	return b.revokeStep(ctx, k, CauseFinished)
}

// Withdraw takes a pending request back.
func (b *Broker) Withdraw(ctx context.Context, c Caller, id string) error {
	if !b.begin() {
		return ErrShuttingDown
	}
	defer b.work.Done()
	v, err := b.Get(ctx, c, id)
	if err != nil {
		return err
	}
	t, ok := b.index.get(id)
	if !ok || t.minting || v.Status != store.StatusApproved && v.Status != store.StatusPending {
		return ErrClosed
	}
	s := b.submission(store.RequestWithdrawn, t.story)
	s.Cause = store.Ptr(CauseRequested)
	_, err = b.append(ctx, s)
	if _, refused := store.IsOrder(err); refused {
		return ErrClosed
	}
	if err == nil {
		b.note(inflight.Request{ID: id, Orchestrator: c.Orchestrator, Run: v.Run, Step: v.Step, Scope: v.Scope, Status: string(store.StatusWithdrawn)})
	}
	return err
}

// Get says where a request of the caller's own stands. Another's is not found.
func (b *Broker) Get(ctx context.Context, c Caller, id string) (View, error) {
	if !store.ValidID(id) {
		return View{}, ErrNotFound
	}
	t, ok := b.index.get(id)
	var unread error
	// The index is a moment late: whoever asks after a person has decided is to
	// see the decision.
	if !ok || t.waits() {
		found := false
		if found, unread = b.refresh(ctx, id); unread == nil {
			if !found && ok {
				b.index.vanish(id, b.Now())
			}
			t, ok = b.index.get(id)
		}
	}
	if ok {
		if t.story.Orchestrator != c.Orchestrator {
			return View{}, ErrNotFound
		}
		v := View{Request: id, Status: t.status, Run: t.story.Run, Step: t.story.Step, Scope: t.story.Action}
		if t.live {
			v.Expires = t.issued.Expires.Time
		}
		if t.pending != nil && t.waits() && !t.minting {
			v.Waiting = b.waiting(t.pending)
		}
		return v, nil
	}
	// The ledger names to a broker only what is open. What is over is kept in
	// Redis for a while.
	r, err := b.Inflight.Request(ctx, id)
	switch {
	case err != nil:
		return View{}, err
	case r == nil && unread != nil:
		return View{}, unread
	case r == nil || r.Orchestrator != c.Orchestrator:
		return View{}, ErrNotFound
	}
	return View{Request: id, Status: store.Status(r.Status), Run: r.Run, Step: r.Step, Scope: r.Scope}, nil
}

// Offers returns the scopes that the caller may ask for.
func (b *Broker) Offers(c Caller) []*scopes.Scope { return b.Scopes.Current().For(c.Orchestrator) }
