package broker

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

const (
	stopping    = 64               // revocations under way at once of what a freeze covers
	freezeClaim = 10 * time.Second // how long one broker is left to revoke what it has claimed
	alertPause  = 30 * time.Second // between two alerts of one broker about what it could not revoke
	alertAfter  = time.Second      // in which the first failures are collected into one alert
)

// ErrFrozen is the answer to what a freeze in force covers, or covered while it
// was under way.
var ErrFrozen = errors.New("a freeze covers the request")

// freeze takes freeze.set: what it covers is condemned, and sessions at the
// gateway are cut before anybody is told.
func (x *index) freeze(e *store.Entry, at int64) {
	d, err := store.DetailsAs[store.FreezeDetails](e)
	if err != nil {
		return
	}
	f := &store.Freeze{ID: e.ID, Index: at, FreezeDetails: d, Time: e.Time}
	if _, known := x.freezes[e.ID]; !known {
		x.freezes[e.ID] = f
	}
	// Also where it is known, in force or lifted: what the recorder said of one
	// request may have told of it before others came that it covers.
	for _, t := range x.requests {
		if t.place < at && t.condemned != store.CauseFrozen {
			x.stop(t, f)
		}
	}
}

// stop condemns a credential that f covers, live or being minted.
func (x *index) stop(t *tracked, f *store.Freeze) {
	if !t.minting && !(t.live && !irrevocable(t)) || !f.Covers(t.story.Orchestrator, t.story.Run, t.story.Step, t.story.Action) {
		return
	}
	t.condemned, t.condemnedAt = store.CauseFrozen, x.now()
	x.ended(t.intent)
	if t.live && !t.issued.Revocable {
		// An identity token: who asks is told that it is not active, and for all who
		// do not ask the record says that it is out until its end.
		t.stays = true
		return
	}
	t.frozen = true
	x.stopped(t.story.Request)
	x.wake(t.story.Request)
}

// stopped puts a request among those whose credential a freeze condemned.
func (x *index) stopped(id string) {
	x.frozen[id] = true
	select {
	case x.froze <- struct{}{}:
	default:
	}
}

// thaw takes freeze.lifted. What was condemned stays so.
func (x *index) thaw(e *store.Entry) {
	if d, err := store.DetailsAs[store.FreezeLiftedDetails](e); err == nil {
		x.freezes[d.Freeze] = nil
	}
}

// lifted takes the whole of what is open in a log of size entries: freezes
// that it does not name were lifted while nobody looked.
func (x *index) lifted(open []placed, size int64) {
	inForce := map[string]bool{}
	for _, p := range open {
		if p.Type == store.FreezeSet {
			inForce[p.ID] = true
		}
	}
	for id, f := range x.freezes {
		if f != nil && f.Index < size && !inForce[id] {
			x.freezes[id] = nil
		}
	}
}

// covered reports whether a freeze in force covers a request of these, as far
// as is known here.
func (x *index) covered(orchestrator, run, step, scope string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, f := range x.freezes {
		if f != nil && f.Covers(orchestrator, run, step, scope) {
			return true
		}
	}
	return false
}

// held returns the request that holds a join, where a freeze closed it.
func (x *index) held(join string) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	id := x.joins[join]
	if t := x.requests[id]; t != nil && t.stoppedByFreeze() {
		return id
	}
	return ""
}

// stoppedByFreeze reports whether a freeze ended t, or is about to.
func (t *tracked) stoppedByFreeze() bool {
	return t.condemned == store.CauseFrozen || (t.status == store.StatusVoid || t.status == store.StatusClosed) && t.cause == store.CauseFrozen
}

// irrevocable reports whether nothing can call t's credential back. Of an
// identity token those are told who ask.
func irrevocable(t *tracked) bool {
	return !t.issued.Revocable && t.issued.Kind != string(issuer.KindIdentity)
}

// toRevoke returns the live credentials that a freeze condemned.
func (x *index) toRevoke() []tracked {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []tracked
	for id := range x.frozen {
		switch t := x.requests[id]; {
		case t == nil || !t.frozen || !t.live && !t.minting:
			delete(x.frozen, id)
		case t.live && !t.issued.Revocable:
			// It was handed over elsewhere before its broker knew of the freeze. Where
			// it was not, that broker ends it.
			delete(x.frozen, id)
		case t.live:
			out = append(out, *t)
		}
	}
	return out
}

// frozen puts on record that p was refused because of a freeze, and returns
// the refusal.
func (b *Broker) frozen(ctx context.Context, p *plan) error {
	v := *p.verdict
	v.Outcome, v.Reasons = store.Deny, []string{"a freeze covers it"}
	refused := *p
	refused.verdict = &v
	if id := b.index.held(p.join); id != "" {
		_, _ = b.tell(ctx, id) // this call is the one that is told why it ended
	}
	var denied *Denied
	if err := b.deny(ctx, &refused); !errors.As(err, &denied) {
		return err
	}
	return ErrFrozen
}

// stopped makes of an error that a freeze brought about what the caller is
// told. A refusal by the recorder is put on record; what was under way has its
// entries already.
func (b *Broker) stopped(ctx context.Context, p *plan, request string, err error) error {
	if _, refused := store.IsOrder(err, store.OrderFrozen); refused {
		return b.frozen(ctx, p)
	}
	var ended *NotApproved
	if errors.As(err, &ended) {
		request = ended.Request
	} else if !errors.Is(err, ErrClosed) {
		return err
	}
	if t, ok := b.index.get(request); ok && t.stoppedByFreeze() ||
		b.index.covered(p.caller.Orchestrator, p.ask.Run, p.ask.Step, p.ask.Scope) {
		return ErrFrozen
	}
	return err
}

// sweep revokes what a freeze condemned, as fast as Vault takes it, until the
// broker stops. What fails is tried again, later each time, and never given up.
func (b *Broker) sweep() {
	tick := time.NewTicker(b.Tick)
	defer tick.Stop()
	slots := make(chan struct{}, stopping)
	var jobs sync.WaitGroup
	defer jobs.Wait()
	for {
		select {
		case <-b.index.froze:
		case <-tick.C:
		case <-b.ctx.Done():
			return
		}
		all := b.index.toRevoke()
		b.unrevoked.keep(all)
		// Each broker begins elsewhere, so that claims seldom meet.
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for part := range slices.Chunk(all, stopping) {
			for _, t := range b.mine(part) {
				select {
				case slots <- struct{}{}:
				case <-b.ctx.Done():
					return
				}
				jobs.Go(func() {
					defer func() { <-slots }()
					b.stop(t)
				})
			}
			if len(b.index.froze) > 0 {
				break // another freeze need not wait for the end of this one
			}
		}
	}
}

// stop revokes t, which a freeze condemned.
func (b *Broker) stop(t tracked) {
	ctx, cancel := context.WithTimeout(b.ctx, claimLife)
	defer cancel()
	id := t.story.Request
	err := b.end(ctx, id, store.CredentialRevoked, store.CauseFrozen)
	if err != nil && b.ctx.Err() == nil {
		b.Log.Warn("what a freeze covers is not revoked yet; trying again", zap.String("request", id), zap.Error(err))
		if !errors.Is(err, store.ErrUnavailable) { // else nothing can be put on record
			b.unrevoked.add(t.intent, err.Error())
		}
	}
	b.give(id, err)
}

// mine takes those of part that this broker is to revoke now. Which of several
// brokers it is, claims say: each asks for one once, and from then on tries by
// itself, whatever Redis holds.
func (b *Broker) mine(part []tracked) []tracked {
	now := b.Now()
	var own []tracked
	var names []string
	var asked []tracked
	for _, t := range part {
		id := t.story.Request
		if b.calls.workingOn(t.intent) { // its call ends it
			continue
		}
		b.gate.Lock()
		r := b.tries[id]
		if r.busy || now.Before(r.next) && r.frozen == t.intent {
			b.gate.Unlock()
			continue
		}
		first := r.frozen != t.intent
		r.busy, r.frozen = true, t.intent
		if first {
			r.pause = 0 // what another cause had failed at before is no reason to wait
		}
		b.tries[id] = r
		b.gate.Unlock()
		if first {
			asked, names = append(asked, t), append(names, "freeze-"+t.intent)
		} else {
			own = append(own, t)
		}
	}
	if len(asked) == 0 {
		return own
	}
	got, err := b.Inflight.Claims(b.ctx, names, freezeClaim)
	for i, t := range asked {
		if err != nil || got[i] {
			own = append(own, t)
			continue
		}
		b.gate.Lock()
		r := b.tries[t.story.Request]
		r.busy, r.next = false, now.Add(freezeClaim)
		b.tries[t.story.Request] = r
		b.gate.Unlock()
	}
	return own
}

// unrevoked folds what could not be revoked into alerts.
type unrevoked struct {
	mu   sync.Mutex
	told map[string]string   // intents to why, as the last alert that named them had it
	new  map[string][]string // why to intents that no alert named so
	due  time.Time           // when the next alert is raised; zero: nothing new has failed
	last time.Time
}

func newUnrevoked() *unrevoked {
	return &unrevoked{told: map[string]string{}, new: map[string][]string{}}
}

func (u *unrevoked) add(intent, why string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.told[intent] == why {
		return
	}
	u.told[intent] = why
	u.new[why] = append(u.new[why], intent)
}

// keep forgets all but what is still to be revoked.
func (u *unrevoked) keep(left []tracked) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.told) == 0 {
		return
	}
	intents := make(map[string]bool, len(left))
	for _, t := range left {
		intents[t.intent] = true
	}
	for intent := range u.told {
		if !intents[intent] {
			delete(u.told, intent)
		}
	}
}

// take returns what an alert is to say at now: by reason, the intents that
// still have it.
func (u *unrevoked) take(now time.Time) map[string][]string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.new) == 0 {
		return nil
	}
	if u.due.IsZero() {
		u.due = now.Add(alertAfter)
		if next := u.last.Add(alertPause); next.After(u.due) {
			u.due = next
		}
	}
	if now.Before(u.due) {
		return nil
	}
	out := map[string][]string{}
	for why, intents := range u.new {
		for _, i := range intents {
			if u.told[i] == why {
				out[why] = append(out[why], i)
			}
		}
	}
	u.new, u.due, u.last = map[string][]string{}, time.Time{}, now
	return out
}

// alert puts on record what could not be revoked, and why, until the broker
// stops. A crash before it costs an alert, and no revocation: another is raised
// at the next failure.
func (b *Broker) alert() {
	tick := time.NewTicker(b.Tick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-b.ctx.Done():
			return
		}
		for why, intents := range b.unrevoked.take(b.Now()) {
			for part := range slices.Chunk(intents, store.MaxIntents) {
				s := b.submission(store.AlertRaised, &store.Entry{Agent: b.agent(), Action: store.AlertRevoke})
				s.SetDetails(store.AlertDetails{Alert: store.AlertRevoke, Source: b.Writer, Intents: part, What: why})
				ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
				_, err := b.append(ctx, s)
				cancel()
				if err != nil {
					b.Log.Warn("an alert is not on record", zap.Int("credentials", len(part)), zap.Error(err))
					b.unrevoked.again(part)
				}
			}
		}
	}
}

// again has the next failure of these named anew.
func (u *unrevoked) again(intents []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, i := range intents {
		delete(u.told, i)
	}
}
