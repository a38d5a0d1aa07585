package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// Limit bounds how much of something there may be. A bound that is zero is
// none; in an exception it is the one that holds otherwise, and -1 is none.
type Limit struct {
	Rate    int           `yaml:"rate"`    // calls for a credential in each per, on the whole; no bound by default
	Per     time.Duration `yaml:"per"`     // what rate is counted by; 1s by default
	Burst   int           `yaml:"burst"`   // calls at once; rate by default
	Live    int           `yaml:"live"`    // live credentials, with those that are being minted; no bound by default
	Pending int           `yaml:"pending"` // requests that people are to decide; no bound by default
}

// Exception is a limit for one orchestrator, for each of them within one scope,
// or for one within one.
type Exception struct {
	Orchestrator string `yaml:"orchestrator"` // for this one; each by default
	Scope        string `yaml:"scope"`        // within this scope; not within one by default
	Limit        `yaml:",inline"`
}

// Limits are what callers may use of a deployment. All brokers of one have the
// same. None is set by default.
type Limits struct {
	All        Limit       `yaml:"all"`        // all orchestrators together
	Each       Limit       `yaml:"each"`       // each orchestrator
	EachScope  Limit       `yaml:"each_scope"` // each orchestrator within each scope
	Exceptions []Exception `yaml:"exceptions"` // instead of each and each_scope, bound by bound; who names orchestrator and scope goes before who names the scope
}

// Check says what cannot be meant.
func (l *Limits) Check() error {
	if err := errors.Join(l.All.check("all", 0), l.Each.check("each", 0), l.EachScope.check("each_scope", 0)); err != nil {
		return err
	}
	seen := map[[2]string]bool{}
	for i, e := range l.Exceptions {
		key := [2]string{e.Orchestrator, e.Scope}
		switch {
		case e.Orchestrator == "" && e.Scope == "":
			return fmt.Errorf("exceptions[%d]: set orchestrator, scope or both", i)
		case e.Orchestrator != "" && !store.ValidID(e.Orchestrator):
			return fmt.Errorf("exceptions[%d]: %q is not the name of an orchestrator", i, e.Orchestrator)
		case seen[key]:
			return fmt.Errorf("exceptions[%d]: there is one for orchestrator %q and scope %q already", i, e.Orchestrator, e.Scope)
		}
		seen[key] = true
		if err := e.check(fmt.Sprintf("exceptions[%d]", i), -1); err != nil {
			return err
		}
	}
	return nil
}

func (l *Limit) check(where string, least int) error {
	for _, n := range []int{l.Rate, l.Burst, l.Live, l.Pending} {
		if n < least {
			return fmt.Errorf("%s: %d is no bound", where, n)
		}
	}
	switch {
	case l.Per < 0 || l.Per > 24*time.Hour:
		return fmt.Errorf("%s: per is at most 24h", where)
	case least == 0 && l.Rate == 0 && (l.Per != 0 || l.Burst != 0):
		return fmt.Errorf("%s: per and burst go with rate", where)
	}
	return nil
}

// over puts the bounds that e sets in the place of l's.
func (l Limit) over(e Limit) Limit {
	if e.Rate != 0 {
		l.Rate, l.Burst, l.Per = e.Rate, e.Burst, e.Per
	}
	if e.Live != 0 {
		l.Live = e.Live
	}
	if e.Pending != 0 {
		l.Pending = e.Pending
	}
	return l
}

// level is one of the limits that a call is under.
type level struct {
	of  string // as Limited.Of
	key string // which of them, in Redis
	Limit
}

// levels are the limits of what orchestrator asks for within scope, the
// narrower ones before those that others share: what they refuse uses up
// nothing of anybody else's.
func (l *Limits) levels(orchestrator, scope string) []level {
	each, within := l.Each, l.EachScope
	for _, pass := range []bool{false, true} { // both named: last
		for _, e := range l.Exceptions {
			switch {
			case pass != (e.Orchestrator != "" && e.Scope != ""):
			case e.Scope == "" && e.Orchestrator == orchestrator:
				each = each.over(e.Limit)
			case e.Scope == scope && scope != "" && (e.Orchestrator == "" || e.Orchestrator == orchestrator):
				within = within.over(e.Limit)
			}
		}
	}
	var out []level
	if scope != "" {
		out = append(out, level{"scope", "scope:" + orchestrator + ":" + scope, within})
	}
	return append(out, level{"orchestrator", "orchestrator:" + orchestrator, each}, level{"all", "all", l.All})
}

func (l *Limit) rate() (inflight.Rate, bool) {
	if l.Rate <= 0 {
		return inflight.Rate{}, false
	}
	r := inflight.Rate{N: l.Rate, Burst: l.Burst, Per: l.Per}
	if r.Burst <= 0 {
		r.Burst = r.N
	}
	if r.Per <= 0 {
		r.Per = time.Second
	}
	return r, true
}

// Quota is what a caller has of one rate, after a call.
type Quota struct {
	Of        string // orchestrator, scope or all
	Burst     int
	Window    time.Duration // in which a whole burst is refilled
	Remaining int           // calls that it could make at once
	Reset     time.Duration // until all of the burst is there again
}

// Limited says that a call is refused by a limit. Nothing was put on record.
type Limited struct {
	What  string        // rate, live or pending
	Of    string        // orchestrator, scope or all
	Most  int           // the bound
	After time.Duration // when it may be tried again
}

func (e *Limited) Error() string {
	of := map[string]string{"orchestrator": "this orchestrator", "scope": "this orchestrator within this scope", "all": "all orchestrators together"}[e.Of]
	switch e.What {
	case inLive:
		return fmt.Sprintf("%s may have %d live credentials, and has them; end steps that are over", of, e.Most)
	case inPending:
		return fmt.Sprintf("%s may have %d requests that wait for people, and has them", of, e.Most)
	}
	return "too many calls of " + of
}

// The kinds of places that a request may hold.
const (
	inLive    = "live"
	inPending = "pending"
)

const (
	placeLease = time.Minute      // how long a place is held by what the record says; it is held anew before
	placeHeld  = 10 * time.Second // how often it is
	placeRetry = 5 * time.Second  // when somebody who found no place may look again
)

// Charge counts one call for a credential of scope against the caller's rates,
// and says what is left of them. The error is a *Limited where one is used up;
// then what the wider ones have is left alone. A scope that is in no catalogue
// counts as none.
func (b *Broker) Charge(ctx context.Context, c Caller, scope string) ([]Quota, error) {
	if _, known := b.Scopes.Current().Scope(scope); !known {
		scope = ""
	}
	var (
		quotas []Quota
		since  time.Time
	)
	for _, l := range b.Limits.levels(c.Orchestrator, scope) {
		rate, ok := l.rate()
		if !ok {
			continue
		}
		if since.IsZero() {
			if !store.ValidID(c.Orchestrator) {
				return nil, fmt.Errorf("%w: orchestrator %.140q is not a valid ID", ErrMalformed, c.Orchestrator)
			}
			var err error
			if since, err = b.state(ctx); err != nil {
				return nil, err
			}
		}
		got, err := b.Inflight.Charge(ctx, l.key, rate, since)
		if err != nil {
			return quotas, err
		}
		quotas = append(quotas, Quota{Of: l.of, Burst: rate.Burst, Window: rate.Per * time.Duration(rate.Burst) / time.Duration(rate.N), Remaining: got.Remaining, Reset: got.Reset})
		if !got.Allowed {
			return quotas, &Limited{What: "rate", Of: l.of, Most: rate.N, After: got.Retry}
		}
	}
	return quotas, nil
}

// places are the places that live credentials and pending requests hold, in
// Redis, where all brokers see them at once. What holds one is said by the
// record: each place is a lease, which every broker renews while the record says
// that its request is live or pending. A crash leaks none for longer than the
// lease.
type places struct {
	mu    sync.Mutex // held while Redis is told, so that what is freed is not held again by what was read before
	freed chan struct{}
}

// places of a request, by set.
func (b *Broker) placesOf(kind, orchestrator, scope string) (list []level) {
	for _, l := range b.Limits.levels(orchestrator, scope) {
		if kind == inLive && l.Live > 0 || kind == inPending && l.Pending > 0 {
			l.key = kind + ":" + l.key
			list = append(list, l)
		}
	}
	return list
}

// enter takes a place of kind for a request that is about to be put on record.
// The error is a *Limited where there is none. A crash after it leaves a place
// that nobody uses until its lease is over.
func (b *Broker) enter(ctx context.Context, kind string, story *store.Entry) error {
	for _, l := range b.placesOf(kind, story.Orchestrator, story.Action) {
		most := l.Live
		if kind == inPending {
			most = l.Pending
		}
		ok, err := b.Inflight.Take(ctx, l.key, story.Request, most, b.MintTimeout+10*time.Second)
		if err == nil && ok {
			continue
		}
		b.leave(kind, story)
		if err != nil {
			return err
		}
		return &Limited{What: kind, Of: l.of, Most: most, After: placeRetry}
	}
	return nil
}

// leave gives a place back. Where Redis does not answer, its lease ends.
func (b *Broker) leave(kind string, story *store.Entry) {
	free := map[string][]string{}
	for _, l := range b.placesOf(kind, story.Orchestrator, story.Action) {
		free[l.key] = append(free[l.key], story.Request)
	}
	if err := b.Inflight.Free(b.ctx, free); err != nil {
		b.Log.Warn("a place under a limit is given back late", zap.String("request", story.Request), zap.Error(err))
	}
}

// limited reports whether there are places at all.
func (l *Limits) limited() bool {
	for _, x := range append([]Exception{{Limit: l.All}, {Limit: l.Each}, {Limit: l.EachScope}}, l.Exceptions...) {
		if x.Live > 0 || x.Pending > 0 {
			return true
		}
	}
	return false
}

// flush gives back the places of requests that are no longer live, or no longer
// pending, by the record.
func (b *Broker) flush() {
	if !b.index.places {
		return
	}
	b.places.mu.Lock()
	defer b.places.mu.Unlock()
	free := map[string][]string{}
	for _, p := range b.index.takeFreed() {
		for _, l := range b.placesOf(p.kind, p.story.Orchestrator, p.story.Action) {
			free[l.key] = append(free[l.key], p.story.Request)
		}
	}
	if err := b.Inflight.Free(b.ctx, free); err != nil {
		b.Log.Warn("places under a limit are given back late", zap.Error(err))
	}
}

// hold has every request that is live or pending by the record hold its places.
// While the record is not followed, what should have ended by now is taken to
// have.
func (b *Broker) hold(ctx context.Context) error {
	if !b.index.places {
		return nil
	}
	b.places.mu.Lock()
	defer b.places.mu.Unlock()
	held := map[string][]string{}
	stale, now := b.index.stale(), b.Now()
	b.index.pick(func(id string, t *tracked) bool {
		kind := t.holds()
		if kind == "" || stale && t.over(now) {
			return false
		}
		for _, l := range b.placesOf(kind, t.story.Orchestrator, t.story.Action) {
			held[l.key] = append(held[l.key], id)
		}
		return false
	})
	for set, members := range held {
		if err := b.Inflight.Hold(ctx, set, members, placeLease); err != nil {
			return err
		}
	}
	return nil
}

// keepPlaces renews the places of what is open, and gives back what the record
// ended, until the broker stops.
func (b *Broker) keepPlaces() {
	renew := time.NewTicker(placeHeld)
	defer renew.Stop()
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-b.places.freed:
			b.flush()
		case <-renew.C:
			if err := b.hold(b.ctx); err != nil {
				b.Log.Warn("places under limits are not renewed", zap.Error(err))
			}
		}
	}
}
