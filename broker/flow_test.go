package broker_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func TestAnIssuanceIsOnRecordBeforeItIsHandedOver(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	r, err := b.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) {
		a.Reason, a.Subject, a.Receipt, a.TTL = "reconcile", "user:u-1@example.com", true, "3m"
	}))
	ok(t, err)
	got := slices.DeleteFunc(w.traced(), func(s string) bool { return strings.Contains(s, "policy.loaded") })
	want := []string{"append step.requested credential.issuing", "mint", "append credential.issued", "activate"}
	if !slices.Equal(got, want) {
		t.Fatalf("order %q, want %q", got, want)
	}
	if !alive(t, r.Credential.Token) {
		t.Fatal("the token that was handed over is not alive")
	}
	issued := w.last(store.CredentialIssued)
	leaf, err := issued.Marshal()
	ok(t, err)
	hash := store.LeafHash(leaf)
	if r.LeafHash != base64.StdEncoding.EncodeToString(hash[:]) || !strings.HasPrefix(r.Receipt, "c2sp.org/tlog-proof@v1\n") {
		t.Fatalf("leaf hash %s, receipt %q", r.LeafHash, r.Receipt)
	}
	d, err := store.DetailsAs[store.IssuedDetails](issued)
	ok(t, err)
	if d.Accessor == "" || !d.Expires.Equal(r.Expires) || r.Expires.Sub(r.IssuedAt) > 3*time.Minute {
		t.Fatalf("details %+v, reply %s to %s", d, r.IssuedAt, r.Expires)
	}
	req := w.last(store.StepRequested)
	if req.Subject == nil || req.Subject.Proved || strings.Contains(req.Subject.ID, "u-1") || req.Sealed["reason"] == "" || req.Sealed["subject"] == "" ||
		req.Agent != "spiffe://countersign.test/orchestrator/demo/run/"+run+"/step/step-1" || req.Decision.Policy != demo.Digest() {
		t.Fatalf("step.requested: %+v", req)
	}
	v, err := b.Get(t.Context(), demoCaller, r.Request)
	ok(t, err)
	if v.Status != store.StatusIssued {
		t.Fatalf("status %s", v.Status)
	}
}

func TestEveryEngineOfTheDemoCanBeMinted(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	for scope, kind := range map[string]issuer.Kind{"identity:step": issuer.KindIdentity, "pki:service": issuer.KindPKI, "vault:demo-read": issuer.KindVaultToken} {
		r, err := b.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.Scope = scope }))
		if err != nil {
			t.Fatalf("%s: %v", scope, err)
		}
		if r.Credential.Kind != kind {
			t.Errorf("%s gives %s, want %s", scope, r.Credential.Kind, kind)
		}
	}
}

func TestADenialIsOnRecordAndNothingIsMinted(t *testing.T) {
	w := newWorld(t)
	w.inForce(func(s string) string { return strings.ReplaceAll(s, `ask: ["*"]`, `ask: ["billing-*"]`) })
	b := w.start("broker-1")
	_, err := b.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.Scope, a.Reason = "vault:demo-write", "because" }))
	var denied *broker.Denied
	why := []string{"not allowed to ask for this scope"}
	if !errors.As(err, &denied) || !slices.Equal(denied.Reasons, why) {
		t.Fatalf("error %v", err)
	}
	w.wantTypes("step.requested")
	if e := w.last(store.StepRequested); e.Decision.Outcome != store.Deny || e.Request != denied.Request || !slices.Equal(e.Decision.Reasons, why) {
		t.Fatalf("on record: %+v", e)
	}
	v, err := b.Get(t.Context(), demoCaller, denied.Request)
	ok(t, err)
	if v.Status != store.StatusDenied {
		t.Fatalf("status %s", v.Status)
	}
	if b.iss.mints != 0 {
		t.Fatal("minted")
	}
}

func TestAWrongAskLeavesNothingBehind(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	for name, c := range map[string]struct {
		change func(*broker.Ask)
		want   error
	}{
		"step":     {func(a *broker.Ask) { a.Step = "../etc" }, broker.ErrMalformed},
		"run":      {func(a *broker.Ask) { a.Run = "" }, broker.ErrMalformed},
		"scope":    {func(a *broker.Ask) { a.Scope = "no:such" }, scopes.ErrUnknownScope},
		"ttl":      {func(a *broker.Ask) { a.TTL = "0s" }, scopes.ErrTTLInvalid},
		"negative": {func(a *broker.Ask) { a.TTL = "-5m" }, scopes.ErrTTLInvalid},
		"long":     {func(a *broker.Ask) { a.TTL = "240h" }, scopes.ErrTTLTooLong},
		"params":   {func(a *broker.Ask) { a.Params = map[string]any{"path": "../../sys"} }, scopes.ErrParams},
		"delivery": {func(a *broker.Ask) { a.Delivery = "pigeon" }, scopes.ErrDelivery},
		"reason":   {func(a *broker.Ask) { a.Scope = "vault:demo-write" }, scopes.ErrReasonRequired},
	} {
		_, err := b.Request(t.Context(), demoCaller, ask(run1(), c.change))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	w.wantTypes()
}

// manyAtOnce sends 50 calls under one key to all nodes and returns what they
// came to.
func manyAtOnce(t *testing.T, nodes []*node, a broker.Ask, n int) (replies []*broker.Reply, errs []error) {
	t.Helper()
	var (
		wg sync.WaitGroup
		mu sync.Mutex
		in sync.WaitGroup
	)
	in.Add(1)
	for i := range n {
		wg.Go(func() {
			in.Wait()
			a := a
			a.Arrived = time.Now()
			r, err := nodes[i%len(nodes)].Request(context.Background(), demoCaller, a)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				replies = append(replies, r)
			}
		})
	}
	in.Done()
	wg.Wait()
	return replies, errs
}

func TestFiftyCallsUnderOneKeyAtTwoBrokersMintOnce(t *testing.T) {
	lie := func(s *inflight.Store) {
		ctx := context.Background()
		_ = s.Rebuild(ctx, []inflight.Request{{ID: "req_0", Orchestrator: "demo", Run: "x", Step: "step-1", Status: "failed", Expires: time.Now()}})
	}
	for name, meddle := range map[string]func(*redistest.Server, *inflight.Store){
		"Redis well":    func(*redistest.Server, *inflight.Store) {},
		"Redis stopped": func(r *redistest.Server, _ *inflight.Store) { r.Stop() },
		"Redis emptied": func(r *redistest.Server, _ *inflight.Store) { r.Flush() },
		"Redis lying":   func(r *redistest.Server, s *inflight.Store) { r.Flush(); lie(s) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			one, two := w.start("broker-1"), w.start("broker-2")
			w.until("ready", func() bool { return one.Ready(t.Context()) == nil && two.Ready(t.Context()) == nil })
			// Meddle while the mint is under way.
			var once sync.Once
			slow := func() error {
				once.Do(func() { meddle(w.redis, one.redis) })
				time.Sleep(100 * time.Millisecond) // the time in which the others arrive
				return nil
			}
			one.iss.set(func(i *tracing) { i.mint = slow })
			two.iss.set(func(i *tracing) { i.mint = slow })
			run := run1()
			replies, errs := manyAtOnce(t, []*node{one, two}, ask(run, keyed("k-1")), 50)
			handed := 0
			for _, r := range replies {
				if r.Credential != nil {
					handed++
				}
			}
			for _, err := range errs {
				if !errors.Is(err, broker.ErrClosed) && !errors.Is(err, inflight.ErrUnavailable) {
					t.Errorf("error %v", err)
				}
			}
			if handed != 1 || one.iss.mints+two.iss.mints != 1 {
				t.Fatalf("%d handed over, %d minted", handed, one.iss.mints+two.iss.mints)
			}
			w.wantTypes("step.requested", "credential.issuing", "credential.issued")
		})
	}
}

func TestARetryUnderTheSameKeyReplacesTheFirstCredential(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := ask(run1(), keyed("k-1"))
	first, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	first.Answered()
	second, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	second.Answered()
	if second.Request != first.Request || second.Expires.After(first.Expires) || second.Credential.Token == first.Credential.Token {
		t.Fatalf("first %s until %s, second %s until %s", first.Request, first.Expires, second.Request, second.Expires)
	}
	if alive(t, first.Credential.Token) || !alive(t, second.Credential.Token) {
		t.Fatal("the first is to be dead, the second alive")
	}
	w.wantTypes("step.requested", "credential.issuing", "credential.issued", "credential.revoked", "credential.issuing", "credential.issued")
	if e := w.last(store.CredentialRevoked); e.Cause == nil || *e.Cause != broker.CauseRetry {
		t.Fatalf("cause %v", e.Cause)
	}
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
	other := a
	other.Body = []byte(`{"run":"other"}`)
	_, err = b.Request(t.Context(), demoCaller, other)
	is(t, err, broker.ErrIdempotency)
}

func TestACallThatOverlappedTheFirstAnswerIsNoRetry(t *testing.T) {
	w := newWorld(t)
	b, other := w.start("broker-1"), w.start("broker-2")
	a := ask(run1(), keyed("k-1"))
	early := a
	early.Arrived = w.clock.now()
	first, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	// Not answered yet: whoever comes now overlaps.
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
	first.Answered()
	_, err = b.Request(t.Context(), demoCaller, early)
	is(t, err, broker.ErrClosed)
	// Another broker cannot know, so it sends a call that is too close away.
	r, err := other.Request(t.Context(), demoCaller, early)
	ok(t, err)
	if r.Credential != nil || r.Request != first.Request {
		t.Fatalf("reply %+v", r)
	}
	if !alive(t, first.Credential.Token) {
		t.Fatal("the first credential was revoked")
	}
	w.clock.pass(time.Second)
	r, err = other.Request(t.Context(), demoCaller, a)
	ok(t, err)
	if r.Credential == nil || alive(t, first.Credential.Token) {
		t.Fatal("a retry at another broker does not replace the first credential")
	}
}

func TestOfTwoBrokersThatRetryAtOnceOneMints(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	a := ask(run1(), keyed("k-1"))
	first, err := one.Request(t.Context(), demoCaller, a)
	ok(t, err)
	first.Answered()
	w.clock.pass(time.Second)
	a.Arrived = w.clock.now()
	replies, errs := []*broker.Reply{}, []error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			r, err := []*node{one, two}[i%2].Request(context.Background(), demoCaller, a)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else if r.Credential != nil {
				replies = append(replies, r)
			}
		})
	}
	wg.Wait()
	if len(replies) != 1 || one.iss.mints+two.iss.mints != 2 {
		t.Fatalf("%d handed over, %d minted, %v", len(replies), one.iss.mints+two.iss.mints, errs)
	}
	for _, err := range errs {
		is(t, err, broker.ErrClosed)
	}
	if !alive(t, replies[0].Credential.Token) {
		t.Fatal("what was handed over is dead")
	}
}

func TestWhatCannotBeRetriedIsClosed(t *testing.T) {
	for name, c := range map[string]struct {
		scope string
		then  func(w *world, b *node, run string)
	}{
		"no engine calls it back": {"identity:step", func(*world, *node, string) {}},
		"the time is over":        {"vault:demo-read", func(w *world, _ *node, _ string) { w.clock.pass(store.RetryWindow + time.Second) }},
		"it was revoked on purpose": {"vault:demo-read", func(w *world, b *node, run string) {
			_, err := b.RevokeStep(w.t.Context(), demoCaller, "step-1", run)
			ok(w.t, err)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			b := w.start("broker-1")
			run := run1()
			a := ask(run, keyed("k-1"), func(a *broker.Ask) { a.Scope = c.scope })
			r, err := b.Request(t.Context(), demoCaller, a)
			ok(t, err)
			r.Answered()
			c.then(w, b, run)
			_, err = b.Request(t.Context(), demoCaller, a)
			is(t, err, broker.ErrClosed)
			if n := w.count(store.CredentialIssuing); n != 1 {
				t.Fatalf("%d intents", n)
			}
		})
	}
}

func TestAJoiningCallOpensTheRequestAnewWhenTheFirstFailed(t *testing.T) {
	w := newWorld(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	held, let := make(chan struct{}), make(chan struct{})
	one.iss.set(func(i *tracing) {
		i.mint = func() error {
			close(held)
			<-let
			return &issuer.StageError{Stage: "secret", Err: issuer.ErrVaultUnavailable}
		}
	})
	a := ask(run1())
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() { _, failed = one.Request(context.Background(), demoCaller, a) })
	<-held
	short := a
	short.Wait = time.Nanosecond
	r, err := two.Request(t.Context(), demoCaller, short)
	ok(t, err)
	if r.Credential != nil || r.Status != store.StatusApproved {
		t.Fatalf("while it is minted: %+v", r)
	}
	var joined *broker.Reply
	wg.Go(func() { joined, err = two.Request(context.Background(), demoCaller, a) })
	time.Sleep(50 * time.Millisecond) // the second call is waiting by then, or comes after the failure: both must mint
	close(let)
	wg.Wait()
	is(t, failed, issuer.ErrVaultUnavailable)
	ok(t, err)
	if joined.Credential == nil {
		t.Fatalf("joined: %+v", joined)
	}
	d, err := store.DetailsAs[store.FailedDetails](w.last(store.CredentialFailed))
	ok(t, err)
	if d.Stage != "secret" || d.Problem != "vault-unavailable" {
		t.Fatalf("failed: %+v", d)
	}
}

// gone is the recorder at one append: not reached, or reached and not heard.
func TestNothingIsHandedOverThatIsNotKnownToBeOnRecord(t *testing.T) {
	for _, at := range []store.Type{store.StepRequested, store.CredentialIssued} {
		for _, kept := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, kept %v", at, kept), func(t *testing.T) {
				w := newWorld(t)
				b := w.start("broker-1")
				run := run1()
				w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
				gone := func(subs []*store.Submission) error {
					if subs[0].Type == at {
						return fmt.Errorf("%w: connection reset", store.ErrUnavailable)
					}
					return nil
				}
				b.rec.set(func(r *recorder) {
					if kept {
						r.after = gone
					} else {
						r.before = gone
					}
				})
				r, err := b.Request(t.Context(), demoCaller, ask(run))
				if r != nil {
					t.Fatal("handed over")
				}
				is(t, err, store.ErrUnavailable)
				b.rec.set(func(r *recorder) { r.before, r.after = nil, nil })
				w.until("everything closed and nothing alive", func() bool {
					open := 0
					for _, e := range w.entries() {
						switch e.Type {
						case store.CredentialIssuing:
							open++
						case store.CredentialRevoked, store.CredentialAbandoned, store.CredentialFailed:
							open--
						}
					}
					return open == 0 && children(t, run) == 0
				})
				// The same call goes through now.
				_, err = b.Request(t.Context(), demoCaller, ask(run))
				ok(t, err)
			})
		}
	}
}

func TestWithTheRecorderDownNothingIsMinted(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
	b.rec.set(func(r *recorder) { r.down = true })
	_, err := b.Request(t.Context(), demoCaller, ask(run1()))
	is(t, err, store.ErrUnavailable)
	if b.iss.mints != 0 {
		t.Fatal("minted")
	}
	b.rec.set(func(r *recorder) { r.down = false })
	_, err = b.Request(t.Context(), demoCaller, ask(run1()))
	ok(t, err)
}

func TestWithRedisGoneNothingIsBegun(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
	w.redis.Stop()
	_, err := b.Request(t.Context(), demoCaller, ask(run1()))
	is(t, err, inflight.ErrUnavailable)
	w.wantTypes()
	w.redis.Run()
	w.until("served again", func() bool {
		_, err := b.Request(t.Context(), demoCaller, ask(run1()))
		return err == nil
	})
}

func TestACredentialThatCannotBeActivatedIsRevoked(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	b.iss.set(func(i *tracing) { i.activate = func() error { return issuer.ErrVaultUnavailable } })
	_, err := b.Request(t.Context(), demoCaller, ask(run, keyed("k-1")))
	is(t, err, issuer.ErrVaultUnavailable)
	w.until("revoked", func() bool { return w.count(store.CredentialRevoked) == 1 && children(t, run) == 0 })
	b.iss.set(func(i *tracing) { i.activate = nil })
	r, err := b.Request(t.Context(), demoCaller, ask(run, keyed("k-1")))
	ok(t, err)
	if !alive(t, r.Credential.Token) {
		t.Fatal("the retry's token is dead")
	}
}

func TestACallersLeavingEndsWhatWasMintedForIt(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	ctx, cancel := context.WithCancel(t.Context())
	b.iss.set(func(i *tracing) { i.mint = func() error { cancel(); return nil } })
	_, err := b.Request(ctx, demoCaller, ask(run, keyed("k-1")))
	is(t, err, context.Canceled)
	w.until("revoked", func() bool { return w.count(store.CredentialRevoked) == 1 && children(t, run) == 0 })
	w.wantTypes("step.requested", "credential.issuing", "credential.issued", "credential.revoked")
	if e := w.last(store.CredentialRevoked); *e.Cause != broker.CauseUndelivered {
		t.Fatalf("cause %s", *e.Cause)
	}
	b.iss.set(func(i *tracing) { i.mint = nil })
	r, err := b.Request(t.Context(), demoCaller, ask(run, keyed("k-1")))
	ok(t, err)
	if !alive(t, r.Credential.Token) {
		t.Fatal("the retry's token is dead")
	}
}

func TestADrainingBrokerEndsItsMintsAndLetsTheRestGo(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	held, let := make(chan struct{}), make(chan struct{})
	b.iss.set(func(i *tracing) { i.mint = func() error { close(held); <-let; return nil } })
	a := ask(run1())
	var wg sync.WaitGroup
	var first *broker.Reply
	var e1, e2 error
	wg.Go(func() { first, e1 = b.Request(context.Background(), demoCaller, a) })
	<-held
	wg.Go(func() { _, e2 = b.Request(context.Background(), demoCaller, a) })
	time.Sleep(30 * time.Millisecond) // let the second one join; refused at the door it gets the same
	b.Drain()
	_, err := b.Request(t.Context(), demoCaller, ask(run1()))
	is(t, err, broker.ErrShuttingDown)
	close(let)
	wg.Wait()
	ok(t, e1)
	is(t, e2, broker.ErrShuttingDown)
	if first.Credential == nil {
		t.Fatal("the mint under way was not brought to its end")
	}
	ok(t, b.Close())
}
