package broker_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func TestACredentialIsClosedWhenItsTimeIsOver(t *testing.T) {
	for _, scope := range []string{"vault:demo-read", "identity:step"} {
		t.Run(scope, func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			one, two := w.start("broker-1"), w.start("broker-2")
			r, err := one.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.TTL, a.Scope = "1m", scope }))
			ok(t, err)
			w.until("followed", func() bool {
				v, err := two.Get(t.Context(), demoCaller, r.Request)
				return err == nil && !v.Expires.IsZero()
			})
			w.clock.pass(40 * time.Second)
			w.ticks(one, two) // in which nothing may happen
			if n := w.count(store.CredentialExpired); n != 0 {
				t.Fatal("expired before its time")
			}
			w.clock.pass(21 * time.Second)
			w.until("expired", func() bool { return w.count(store.CredentialExpired) == 1 })
			w.ticks(one, two)
			if n := w.count(store.CredentialExpired); n != 1 {
				t.Fatalf("expired %d times", n)
			}
			if e := w.last(store.CredentialExpired); *e.Cause != broker.CauseTTL {
				t.Fatalf("cause %s", *e.Cause)
			}
			if r.Credential.Kind == issuer.KindVaultToken && alive(t, r.Credential.Token) {
				t.Fatal("the token outlives its record")
			}
			w.until("closed", func() bool {
				v, err := two.Get(t.Context(), demoCaller, r.Request)
				return err == nil && v.Status == store.StatusClosed
			})
		})
	}
}

func TestADueCredentialIsTriedAgainUntilVaultAndTheRecorderAnswer(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	_, err := b.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.TTL = "1m" }))
	ok(t, err)
	var mu sync.Mutex
	tries := 0
	b.iss.set(func(i *tracing) {
		i.revoke = func() error { mu.Lock(); tries++; mu.Unlock(); return issuer.ErrVaultUnavailable }
	})
	w.clock.pass(61 * time.Second)
	w.until("tried", func() bool { mu.Lock(); defer mu.Unlock(); return tries >= 2 })
	b.rec.set(func(r *recorder) { r.down = true })
	w.redis.Stop()
	b.iss.set(func(i *tracing) { i.revoke = nil })
	w.until("revoked", func() bool { return strings.Contains(strings.Join(w.traced(), " "), "revoke") })
	b.rec.set(func(r *recorder) { r.down = false })
	w.until("expired", func() bool { return w.count(store.CredentialExpired) == 1 })
}

func TestALieInRedisEndsNothingElse(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	r, err := b.Request(t.Context(), demoCaller, ask(run1()))
	ok(t, err)
	// Redis says that it ended long ago, and is of another step.
	for _, id := range []string{r.Request, "req_never"} {
		ok(t, b.redis.Put(t.Context(), inflight.Request{ID: id, Orchestrator: "demo", Run: "other", Step: "step-1", Status: "issued", Expires: time.Now().Add(-time.Hour)}))
	}
	revoked, err := b.RevokeStep(t.Context(), demoCaller, "step-1", "other")
	ok(t, err)
	if revoked.Revoked != 0 || !alive(t, r.Credential.Token) || w.count(store.CredentialExpired) != 0 {
		t.Fatalf("ended before its time: %+v", revoked)
	}
}

func TestARestartedBrokerClosesItsIntentsAndKeepsItsLeases(t *testing.T) {
	w := newWorld(t)
	old := w.start("broker-1")
	live, err := old.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.TTL = "1m" }))
	ok(t, err)
	// The old process is gone for good in the middle of a mint: it writes no
	// more, and does not look after what it wrote.
	run := run1()
	held, let := make(chan struct{}), make(chan struct{})
	old.iss.set(func(i *tracing) { i.mint = func() error { close(held); <-let; return issuer.ErrVaultUnavailable } })
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = old.Request(context.Background(), demoCaller, ask(run)) })
	<-held
	old.rec.set(func(r *recorder) { r.down = true })
	defer wg.Wait()
	defer close(let)

	other := w.start("broker-2")
	w.until("broker-2 follows", func() bool { return other.Ready(t.Context()) == nil })
	w.ticks(other)
	if n := w.count(store.CredentialAbandoned); n != 0 {
		t.Fatal("another broker's live intent was closed within the grace")
	}
	b := w.start("broker-1")
	w.until("abandoned", func() bool { return w.count(store.CredentialAbandoned) == 1 })
	_, err = b.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	v, err := b.Get(t.Context(), demoCaller, live.Request)
	ok(t, err)
	if v.Status != store.StatusIssued {
		t.Fatalf("status %s", v.Status)
	}
	w.clock.pass(61 * time.Second)
	w.until("expired", func() bool { return w.count(store.CredentialExpired) >= 1 })
}

func TestAnotherBrokersIntentIsClosedAfterTheGrace(t *testing.T) {
	w := newWorld(t)
	old := w.start("broker-1")
	held, let := make(chan struct{}), make(chan struct{})
	old.iss.set(func(i *tracing) { i.mint = func() error { close(held); <-let; return nil } })
	run := run1()
	var wg sync.WaitGroup
	var late error
	wg.Go(func() { _, late = old.Request(context.Background(), demoCaller, ask(run)) })
	<-held
	w.start("broker-2")
	w.clock.pass(3 * time.Second)
	w.until("abandoned", func() bool { return w.count(store.CredentialAbandoned) == 1 })
	// The old one was not dead but slow: what it mints now is not recorded, and
	// so not handed over.
	close(let)
	wg.Wait()
	if late == nil {
		t.Fatal("handed over after its intent was given up")
	}
	if n := children(t, run); n != 0 {
		t.Fatalf("%d tokens left", n)
	}
	if n := w.count(store.CredentialIssued); n != 0 {
		t.Fatalf("%d issued", n)
	}
}

func TestRevokingAStepEndsItsCredentialsAndNobodyElses(t *testing.T) {
	for _, redis := range []string{"well", "stopped"} {
		t.Run("Redis "+redis, func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			one, two := w.start("broker-1"), w.start("broker-2")
			run := run1()
			issue := func(n *node, c broker.Caller, a broker.Ask) *broker.Reply {
				r, err := n.Request(t.Context(), c, a)
				ok(t, err)
				return r
			}
			a := issue(one, demoCaller, ask(run, keyed("a")))
			b := issue(two, demoCaller, ask(run, keyed("b")))
			id := issue(one, demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "identity:step" }))
			issue(one, demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "pki:service" }))
			elsewhere := issue(one, demoCaller, ask(run, func(a *broker.Ask) { a.Step = "step-2" }))
			theirs := issue(one, broker.Caller{Orchestrator: "other"}, ask(run))
			if redis == "stopped" {
				w.redis.Stop()
			}
			// The second broker has issued one of them, and may not have heard of
			// the rest.
			got, err := two.RevokeStep(t.Context(), demoCaller, "step-1", run)
			ok(t, err)
			if got != (broker.Revoked{Revoked: 3, Irrevocable: 1}) {
				t.Fatalf("revoked %+v", got)
			}
			if alive(t, a.Credential.Token) || alive(t, b.Credential.Token) {
				t.Fatal("alive after the answer")
			}
			if !alive(t, elsewhere.Credential.Token) || !alive(t, theirs.Credential.Token) {
				t.Fatal("more was revoked than asked for")
			}
			if c, err := two.Introspect(t.Context(), "orders", id.Credential.Token, ""); err != nil || c != nil {
				t.Fatalf("the identity token of a revoked step: %v, %v", c, err)
			}
			if n := w.count(store.CredentialRevoked); n != 3 {
				t.Fatalf("%d revocations on record", n)
			}
			again, err := one.RevokeStep(t.Context(), demoCaller, "step-1", run)
			ok(t, err)
			if again.Revoked != 0 || again.Pending != 0 {
				t.Fatalf("again: %+v", again)
			}
		})
	}
}

func TestARevocationThatVaultDoesNotConfirmIsPendingUntilItDoes(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	r, err := b.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	b.iss.set(func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } })
	got, err := b.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	if got.Revoked != 0 || got.Pending != 1 {
		t.Fatalf("revoked %+v", got)
	}
	b.iss.set(func(i *tracing) { i.revoke = nil })
	w.until("revoked", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if alive(t, r.Credential.Token) {
		t.Fatal("alive")
	}
}

func TestAStepThatEndsDuringItsMintGetsNothing(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	held, let := make(chan struct{}), make(chan struct{})
	b.iss.set(func(i *tracing) { i.mint = func() error { close(held); <-let; return nil } })
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { _, err = b.Request(context.Background(), demoCaller, ask(run)) })
	<-held
	got, e := b.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, e)
	if got.Pending != 1 {
		t.Fatalf("revoked %+v", got)
	}
	close(let)
	wg.Wait()
	is(t, err, broker.ErrClosed)
	w.until("revoked", func() bool { return w.count(store.CredentialRevoked) == 1 && children(t, run) == 0 })
}

func TestFinishingAStepRecordsWhatCameOfItAndRevokesTheRest(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	r, err := b.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	got, err := b.Finish(t.Context(), demoCaller, broker.Result{Step: "step-1", Run: run, Outcome: "succeeded", Summary: "3 refunds", Target: "vault"})
	ok(t, err)
	if got.Revoked != 1 || alive(t, r.Credential.Token) {
		t.Fatalf("revoked %+v", got)
	}
	e := w.last(store.StepFinished)
	if e.Sealed["summary"] == "" || strings.Contains(string(e.Details), "refunds") || e.Risk == nil || e.Risk.Sensitivity != "low" {
		t.Fatalf("step.finished: %+v", e)
	}
	if e := w.last(store.CredentialRevoked); *e.Cause != broker.CauseFinished {
		t.Fatalf("cause %s", *e.Cause)
	}
	_, err = b.Finish(t.Context(), demoCaller, broker.Result{Step: "step-1", Run: run, Outcome: "splendid"})
	is(t, err, broker.ErrMalformed)
	b.rec.set(func(r *recorder) { r.down = true })
	_, err = b.Finish(t.Context(), demoCaller, broker.Result{Step: "step-1", Run: run, Outcome: "failed"})
	is(t, err, store.ErrUnavailable)
}

func TestARequestOfAnotherOrchestratorIsNotFound(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	r, err := b.Request(t.Context(), demoCaller, ask(run1()))
	ok(t, err)
	_, err = b.Get(t.Context(), broker.Caller{Orchestrator: "other"}, r.Request)
	is(t, err, broker.ErrNotFound)
	is(t, b.Withdraw(t.Context(), broker.Caller{Orchestrator: "other"}, r.Request), broker.ErrNotFound)
	is(t, b.Withdraw(t.Context(), demoCaller, r.Request), broker.ErrClosed)
	_, err = b.Get(t.Context(), demoCaller, "req_none")
	is(t, err, broker.ErrNotFound)
	_, err = b.Get(t.Context(), demoCaller, "../../etc/passwd")
	is(t, err, broker.ErrNotFound)
}

func TestAnIdentityTokenIsActiveUntilItsCredentialEndsAndItsUseIsOnRecord(t *testing.T) {
	w := newWorld(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	r, err := one.Request(t.Context(), demoCaller, ask(run1(), func(a *broker.Ask) { a.Scope = "identity:step" }))
	ok(t, err)
	for _, b := range []*node{one, two} {
		c, err := b.Introspect(t.Context(), "orders", r.Credential.Token, "GET /orders")
		ok(t, err)
		if c == nil || c.Request != r.Request || c.Subject != r.Identity {
			t.Fatalf("claims %+v", c)
		}
	}
	if n := w.count(store.CredentialUsed); n != 2 {
		t.Fatalf("%d uses on record", n)
	}
	forged := r.Credential.Token[:len(r.Credential.Token)-6] + "AAAAAA"
	for _, token := range []string{"", "x", forged, "eyJhbGciOiJub25lIn0.e30."} {
		if c, err := one.Introspect(t.Context(), "orders", token, "GET /orders"); c != nil || err != nil {
			t.Fatalf("%q: %v, %v", token, c, err)
		}
	}
	one.rec.set(func(r *recorder) { r.down = true })
	_, err = one.Introspect(t.Context(), "orders", r.Credential.Token, "GET /orders")
	is(t, err, store.ErrUnavailable)
}

func TestThePolicyInForceIsOnRecord(t *testing.T) {
	w := newWorld(t)
	w.start("broker-1")
	w.until("policy.loaded", func() bool {
		for s, err := range w.ledger.Entries(context.Background(), 0, w.ledger.Size()) {
			ok(t, err)
			e, err := store.ParseLeaf(s.Leaf)
			ok(t, err)
			if e.Type == store.PolicyLoaded {
				d, err := store.DetailsAs[store.PolicyDetails](e)
				ok(t, err)
				return d.Digest == demo.Digest()
			}
		}
		return false
	})
}

func TestABrokerThatLosesTheRecorderFindsItAgain(t *testing.T) {
	w := newWorld(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	w.until("ready", func() bool { return one.Ready(t.Context()) == nil && two.Ready(t.Context()) == nil })
	two.rec.set(func(r *recorder) { r.down = true })
	run := run1()
	r, err := one.Request(t.Context(), demoCaller, ask(run)) // ends two's follower, which sees it is down
	ok(t, err)
	w.until("not ready", func() bool { return two.Ready(t.Context()) != nil })
	_, err = one.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	two.rec.set(func(r *recorder) { r.down = false })
	w.until("ready again", func() bool { return two.Ready(t.Context()) == nil })
	if v, err := two.Get(t.Context(), demoCaller, r.Request); err == nil && v.Status == store.StatusIssued {
		t.Fatal("still thought to be live")
	}
}

func TestNoSecretIsInTheLedgerTheLogsTheErrorsOrRedis(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	run := run1()
	secrets := []string{"planted-reason-7f3a", "planted-subject-7f3a", "planted-summary-7f3a"}
	var errs strings.Builder
	for i, scope := range []string{"vault:demo-read", "vault:demo-read", "identity:step", "pki:service"} {
		r, err := b.Request(t.Context(), demoCaller, ask(run, keyed(fmt.Sprint(i)), func(a *broker.Ask) {
			a.Scope, a.Reason, a.Subject, a.Receipt = scope, "planted-reason-7f3a", "user:planted-subject-7f3a", true
			if i == 1 {
				a.Delivery = "wrapped"
			}
		}))
		ok(t, err)
		c := r.Credential
		for _, s := range []string{c.Token, c.WrappingToken, c.Password, c.PrivateKey} {
			if s != "" {
				secrets = append(secrets, s)
			}
		}
		fmt.Fprintf(&errs, "%v %+v %#v", c, c, c)
	}
	for _, hook := range []func(*tracing){
		func(i *tracing) { i.activate = func() error { return issuer.ErrVaultUnavailable } },
		func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } },
	} {
		b.iss.set(hook)
		_, err := b.Request(t.Context(), demoCaller, ask(run, keyed("e"), func(a *broker.Ask) { a.Reason = "planted-reason-7f3a" }))
		fmt.Fprintln(&errs, err)
	}
	b.iss.set(func(i *tracing) { i.activate, i.revoke = nil, nil })
	dump := w.redis.Dump() // before the credentials are closed
	_, err := b.Finish(t.Context(), demoCaller, broker.Result{Step: "step-1", Run: run, Outcome: "failed", Summary: "planted-summary-7f3a"})
	ok(t, err)
	places := map[string][]byte{"Redis": append(dump, w.redis.Dump()...), "the logs": []byte(w.logs.String()), "errors": []byte(errs.String())}
	if len(secrets) < 6 || !bytes.Contains(dump, []byte(run)) {
		t.Fatalf("the search would find nothing: %d secrets, %d bytes", len(secrets), len(dump))
	}
	ok(t, filepath.WalkDir(w.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		places[filepath.Base(path)] = b
		return err
	}))
	for place, b := range places {
		for _, s := range secrets {
			if bytes.Contains(b, []byte(s)) {
				t.Errorf("%.20s… stands in %s", s, place)
			}
		}
	}
}
