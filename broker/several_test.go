package broker_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// three starts brokers over one Redis and one recorder, the first with an
// access path, and waits until they follow.
func (w *world) three(g **gateway.Gateway) (a, b, c *node) {
	w.t.Helper()
	w.redis = redistest.Start(w.t)
	a, b, c = w.start("broker-a", w.behind(g)), w.start("broker-b"), w.start("broker-c")
	for _, n := range []*node{a, b, c} {
		w.until("a broker follows", func() bool { return n.Ready(w.t.Context()) == nil })
	}
	return a, b, c
}

func TestAnyBrokerTakesAnyCallOfARequest(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	a, b, c := w.three(&g)
	everywhere := func(id string, want store.Status) {
		t.Helper()
		for _, n := range []*node{a, b, c} {
			w.until(string(want)+" everywhere", func() bool {
				v, err := n.Get(t.Context(), demoCaller, id)
				return err == nil && v.Status == want
			})
		}
	}
	// Asked for at a, looked at everywhere, joined at b, collected at c.
	run := run1()
	r := w.pending(a, write(run))
	everywhere(r.Request, store.StatusPending)
	if joined := w.pending(b, write(run)); joined.Request != r.Request {
		t.Errorf("b opened another request, %s", joined.Request)
	}
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	got, err := c.Request(t.Context(), demoCaller, w.now(write(run)))
	ok(t, err)
	if got.Credential == nil || got.Request != r.Request || children(t, run) != 1 {
		t.Fatalf("collected at c: %+v", got)
	}
	everywhere(r.Request, store.StatusIssued)
	// Taken back at another than it was asked for at.
	withdrawn := w.pending(b, write(run1()))
	ok(t, c.Withdraw(t.Context(), demoCaller, withdrawn.Request))
	everywhere(withdrawn.Request, store.StatusWithdrawn)

	// A retry under a key at another broker replaces the first credential.
	first, err := a.Request(t.Context(), demoCaller, ask(run, keyed("k1"), stepped(2)))
	ok(t, err)
	first.Answered()
	w.clock.pass(time.Second) // a call this soon could have overlapped the first
	second, err := b.Request(t.Context(), demoCaller, w.now(ask(run, keyed("k1"), stepped(2))))
	ok(t, err)
	if second.Request != first.Request || alive(t, first.Credential.Token) || !alive(t, second.Credential.Token) {
		t.Error("the retry at b did not replace what a issued")
	}

	// What a issued is revoked at b, its session at a's gateway too.
	session, err := a.Request(t.Context(), demoCaller, through(run, stepped(3)))
	ok(t, err)
	s, err := g.Session(session.Credential.Token)
	ok(t, err)
	third, err := a.Request(t.Context(), demoCaller, ask(run, stepped(3)))
	ok(t, err)
	out, err := b.RevokeStep(t.Context(), demoCaller, "step-3", run)
	ok(t, err)
	cutWithin(t, s)
	if out.Revoked != 2 || out.Pending != 0 || alive(t, third.Credential.Token) {
		t.Errorf("revoked at b: %+v", out)
	}
	everywhere(third.Request, store.StatusClosed)

	// What is left ends once, whoever ends it.
	w.clock.pass(time.Hour)
	w.until("expired", func() bool { return w.count(store.CredentialExpired) == 2 })
	w.ticks(a, b, c)
	if n := w.count(store.CredentialExpired); n != 2 {
		t.Errorf("%d of 2 expired", n)
	}
}

func TestAClaimThatNobodyHoldsDelaysAnEndAndDoesNotPreventIt(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	r, err := b.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.TTL = "1m" }))
	ok(t, err)
	mine, err := b.redis.Claim(t.Context(), "end-"+r.Request, time.Hour)
	if err != nil || !mine {
		t.Fatal(mine, err)
	}
	w.clock.pass(90 * time.Second)
	w.ticks(b)
	if w.count(store.CredentialExpired) != 0 {
		t.Fatal("it was ended though another had claimed that a moment ago")
	}
	w.clock.pass(31 * time.Second) // a minute late
	w.until("it is ended all the same", func() bool { return w.count(store.CredentialExpired) == 1 })
}

// fixed is a catalogue that does not change.
type fixed struct{ *scopes.Set }

func (f fixed) Current() *scopes.Set { return f.Set }

func TestBrokersWithDifferentCataloguesMintNothingThatWasNotApproved(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	parse := func(from, to string) fixed {
		set, err := scopes.Parse("demo.yaml", []byte(rewrite("vault:demo-write", from, to)(string(scopes.Demo(nil)))), "", nil)
		ok(t, err)
		if set.Digest() == demo.Digest() {
			t.Fatal("the catalogue was not changed")
		}
		return fixed{set}
	}
	with := func(f fixed) func(*broker.Config) {
		return func(c *broker.Config) {
			iss, err := issuer.New(t.Context(), issuer.Config{Addr: vault.Addr, Login: issuer.Login{Token: login}, TrustDomain: trustDomain, Log: w.log,
				Scopes: f.Current, Identity: identity, FirstTTL: 2 * time.Second, Now: w.clock.now})
			ok(t, err)
			t.Cleanup(func() { _ = iss.Close() })
			c.Scopes, c.Issuer = f, iss
		}
	}
	old := w.start("broker-old")
	reloaded := w.start("broker-new", with(parse("default_ttl: 5m", "default_ttl: 6m")))
	// A broker whose flow has not reloaded and whose issuer has is none of ours, but
	// the issuer is the last to look.
	torn := w.start("broker-torn", with(parse("default_ttl: 5m", "default_ttl: 6m")), func(c *broker.Config) { c.Scopes = fixed{demo} })
	for _, n := range []*node{old, reloaded, torn} {
		w.until("a broker follows", func() bool { return n.Ready(t.Context()) == nil })
	}

	run := run1()
	r := w.pending(old, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	_, err := reloaded.Request(t.Context(), demoCaller, w.now(write(run)))
	ended(t, err, store.StatusVoid)

	run = run1()
	r = w.pending(old, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	got, err := torn.Request(t.Context(), demoCaller, w.now(write(run)))
	if err == nil || got != nil {
		t.Fatalf("handed over: %+v", got)
	}
	if n := w.count(store.CredentialIssued); n != 0 || children(t, run) != 0 {
		t.Errorf("%d issued, %d tokens live", n, children(t, run))
	}
	// What the old one's people approved, it still grants.
	run = run1()
	r = w.pending(old, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	got, err = old.Request(t.Context(), demoCaller, w.now(write(run)))
	if err != nil || got.Credential == nil || got.Expires.Sub(got.IssuedAt).Round(time.Minute) != 5*time.Minute {
		t.Errorf("%+v %v", got, err)
	}
}

func TestABrokerThatSleptThroughItsMintHandsNothingOver(t *testing.T) {
	for name, hold := range map[string]func(i *tracing, fn func() error){
		"before it minted":              func(i *tracing, fn func() error) { i.mint = fn },
		"with the credential on record": func(i *tracing, fn func() error) { i.activate = fn },
	} {
		for _, others := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", others awake"}[others], func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.redis = redistest.Start(t)
				slept := w.start("broker-a")
				held, let := make(chan struct{}), make(chan struct{})
				var once sync.Once
				slept.iss.set(func(i *tracing) {
					hold(i, func() error { once.Do(func() { close(held); <-let }); return nil })
				})
				run := run1()
				var err error
				var got *broker.Reply
				var wg sync.WaitGroup
				wg.Go(func() { got, err = slept.Request(context.Background(), demoCaller, ask(run, keyed("k"))) })
				<-held
				if others {
					b := w.start("broker-b")
					w.until("broker-b follows", func() bool { return b.Ready(t.Context()) == nil })
				}
				w.clock.pass(90 * time.Second)
				time.Sleep(2500 * time.Millisecond) // the child token's first TTL, by Vault's clock
				if others && name == "before it minted" {
					w.until("another broker gives the intent up", func() bool { return w.count(store.CredentialAbandoned) == 1 })
				}
				close(let)
				wg.Wait()
				if err == nil {
					t.Fatalf("handed over: %+v", got)
				}
				if n := children(t, run); n != 0 {
					t.Errorf("%d tokens live", n)
				}
				w.until("it has one outcome", func() bool {
					types := w.types()
					return slices.ContainsFunc([]store.Type{store.CredentialFailed, store.CredentialAbandoned, store.CredentialRevoked}, func(x store.Type) bool {
						return slices.Contains(types, string(x))
					})
				})
				// The same call mints anew, and one credential is live.
				w.until("it is asked for again", func() bool {
					got, err := slept.Request(t.Context(), demoCaller, w.now(ask(run, keyed("k"))))
					if err != nil && !errors.Is(err, broker.ErrClosed) {
						t.Fatal(err)
					}
					return err == nil && got.Credential != nil
				})
				if n := children(t, run); n != 1 {
					t.Errorf("%d tokens live", n)
				}
			})
		}
	}
}
