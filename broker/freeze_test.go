package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// freeze sets a freeze as the recorder does for a responder, and returns its ID.
func (w *world) freeze(d store.FreezeDetails) string {
	w.t.Helper()
	s := w.about(store.FreezeSet, &store.Entry{})
	s.Person = store.Ptr(store.PrivacyKey(key).Pseudonym("user:responder-a"))
	s.SetDetails(d)
	s.Seal(store.SealedReason, "a leak")
	ok(w.t, w.recorded(s))
	return s.ID
}

func (w *world) lift(freeze string) {
	w.t.Helper()
	s := w.about(store.FreezeLifted, &store.Entry{})
	s.Person = store.Ptr(store.PrivacyKey(key).Pseudonym("user:responder-b"))
	s.SetDetails(store.FreezeLiftedDetails{Freeze: freeze})
	ok(w.t, w.recorded(s))
}

// revokedAs counts the credentials revoked with a cause.
func (w *world) revokedAs(cause string) int {
	n := 0
	for _, e := range w.entries() {
		if e.Type == store.CredentialRevoked && e.Cause != nil && *e.Cause == cause {
			n++
		}
	}
	return n
}

// appends counts the appends that held an entry of a type.
func (w *world) appends(t store.Type) int {
	n := 0
	for _, s := range w.traced() {
		if strings.HasPrefix(s, "append ") && strings.Contains(s, string(t)) {
			n++
		}
	}
	return n
}

func stepped(n int) func(*broker.Ask) {
	return func(a *broker.Ask) { a.Step = fmt.Sprintf("step-%d", n) }
}

func TestAFreezeEndsWhatItCoversAtEveryBrokerAndNothingElse(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	var g *gateway.Gateway
	one, two := w.start("broker-1", w.behind(&g)), w.start("broker-2")
	run, other := run1(), run1()
	const many = 60
	tokens := make([]string, many)
	var asking errgroup.Group
	asking.SetLimit(4)
	for i := range many {
		asking.Go(func() error {
			n := []*node{one, two}[i%2]
			r, err := n.Request(t.Context(), demoCaller, ask(run, stepped(i)))
			if err == nil {
				tokens[i] = r.Credential.Token
			}
			return err
		})
	}
	ok(t, asking.Wait())
	through, err := one.Request(t.Context(), demoCaller, through(run))
	ok(t, err)
	session, err := g.Session(through.Credential.Token)
	ok(t, err)
	id, err := two.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "identity:step" }))
	ok(t, err)
	cert, err := one.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "pki:service" }))
	ok(t, err)
	spared, err := two.Request(t.Context(), demoCaller, ask(other))
	ok(t, err)

	freeze := w.freeze(store.FreezeDetails{Run: run})
	cutWithin(t, session)
	w.until("all that can be revoked is", func() bool { return w.revokedAs(store.CauseFrozen) == many+1 })
	for _, token := range tokens {
		if alive(t, token) {
			t.Fatal("Vault still takes a token that the freeze covers")
		}
	}
	if n := children(t, run); n != 0 {
		t.Errorf("%d child tokens are left", n)
	}
	if !alive(t, spared.Credential.Token) {
		t.Error("a token of another run was revoked")
	}
	if n := w.appends(store.CredentialRevoked); n > many/2 {
		t.Errorf("%d appends for %d revocations: they are not gathered", n, many+1)
	}
	for _, n := range []*node{one, two} {
		claims, err := n.Introspect(t.Context(), "orders", id.Credential.Token, "")
		if err != nil || claims != nil {
			t.Errorf("introspection under a freeze: %v %v", claims, err)
		}
		for _, again := range []broker.Ask{ask(run), ask(run, stepped(3), keyed("k")), write(run)} {
			before := w.count(store.StepRequested)
			if r, err := n.Request(t.Context(), demoCaller, again); !errors.Is(err, broker.ErrFrozen) {
				t.Errorf("asked for under a freeze: %+v %v", r, err)
			}
			if e := w.last(store.StepRequested); w.count(store.StepRequested) != before+1 || e.Decision.Outcome != store.Deny || len(e.Decision.Reasons) != 1 {
				t.Errorf("the refusal is not on record: %+v", e.Decision)
			}
		}
		if _, err := n.Request(t.Context(), demoCaller, ask(other, stepped(50))); err != nil {
			t.Errorf("another run: %v", err)
		}
	}
	for _, r := range []string{cert.Request, id.Request} {
		if v, err := two.Get(t.Context(), demoCaller, r); err != nil || v.Status != store.StatusIssued {
			t.Errorf("what nothing can call back is %v %v", v.Status, err)
		}
	}

	w.lift(freeze)
	for _, n := range []*node{one, two} {
		w.until("a lifted freeze covers nothing", func() bool {
			_, err := n.Request(t.Context(), demoCaller, ask(run, stepped(77)))
			if err != nil && !errors.Is(err, broker.ErrFrozen) {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	for _, n := range []*node{one, two, w.start("broker-3")} {
		if claims, err := n.Introspect(t.Context(), "orders", id.Credential.Token, ""); err != nil || claims != nil {
			t.Errorf("an identity token that a lifted freeze had covered is active again: %v %v", claims, err)
		}
	}
	if n := w.revokedAs(store.CauseFrozen); n != many+1 {
		t.Errorf("%d revocations, want %d", n, many+1)
	}
}

func TestAWaitingCallIsToldOfAFreezeAtOnceAndAfterItMayAskAgain(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	run := run1()
	told := make(chan error, 2)
	for _, n := range []*node{one, two} {
		go func() {
			_, err := n.Request(t.Context(), demoCaller, write(run, func(a *broker.Ask) { a.Wait = time.Minute }))
			told <- err
		}()
	}
	w.until("people are asked", func() bool { return w.count(store.ApprovalRequested) == 1 })
	freeze := w.freeze(store.FreezeDetails{All: true})
	for range 2 {
		select {
		case err := <-told:
			is(t, err, broker.ErrFrozen)
		case <-time.After(5 * time.Second):
			t.Fatal("a waiting call is not told")
		}
	}
	if _, err := two.Request(t.Context(), demoCaller, write(run)); !errors.Is(err, broker.ErrFrozen) {
		t.Errorf("%v", err)
	}
	w.lift(freeze)
	// Who was told need not be told again.
	w.until("people are asked anew", func() bool {
		r, err := one.Request(t.Context(), demoCaller, write(run))
		if err != nil && !errors.Is(err, broker.ErrFrozen) {
			t.Fatal(err)
		}
		return err == nil && r.Status == store.StatusPending
	})
}

func TestWhatIsBeingMintedWhenAFreezeComesIsNotHandedOver(t *testing.T) {
	for _, scope := range []string{"vault:demo-read", "pki:service", "identity:step"} {
		t.Run(scope, func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			one, two := w.start("broker-1"), w.start("broker-2")
			w.until("broker-2 follows", func() bool { return two.Ready(t.Context()) == nil })
			run := run1()
			one.iss.set(func(i *tracing) {
				i.mint = func() error {
					w.freeze(store.FreezeDetails{Scope: scope, Run: run})
					time.Sleep(100 * time.Millisecond) // both brokers learn of it
					return nil
				}
			})
			r, err := one.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Scope = scope }))
			if !errors.Is(err, broker.ErrFrozen) {
				t.Fatalf("%+v %v", r, err)
			}
			w.until("it is closed", func() bool { return w.revokedAs(store.CauseFrozen) == 1 })
			if scope == "vault:demo-read" && children(t, run) != 0 {
				t.Error("its token lives")
			}
			w.ticks(one, two)
			w.wantTypes("step.requested", "credential.issuing", "freeze.set", "credential.issued", "credential.revoked")
		})
	}
}

func TestWhatVaultDoesNotRevokeUnderAFreezeIsReportedAndTriedUntilItIsGone(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	run := run1()
	const many = 20
	var intents []string
	for i := range many {
		_, err := one.Request(t.Context(), demoCaller, ask(run, stepped(i)))
		ok(t, err)
		d, err := store.DetailsAs[store.IssuedDetails](w.last(store.CredentialIssued))
		ok(t, err)
		intents = append(intents, d.Intent)
	}
	why := &issuer.StageError{Stage: "revoke-accessor", Err: fmt.Errorf("%w: Vault is sealed", issuer.ErrVaultUnavailable)}
	var mu sync.Mutex
	tries := 0
	for _, n := range []*node{one, two} {
		n.iss.set(func(i *tracing) { i.revoke = func() error { mu.Lock(); tries++; mu.Unlock(); return why } })
	}
	w.freeze(store.FreezeDetails{All: true})
	w.until("each is tried again", func() bool { mu.Lock(); defer mu.Unlock(); return tries > 3*many })
	w.clock.pass(2 * time.Second)
	named := map[string]bool{}
	w.until("it is on record what is not revoked", func() bool {
		for _, e := range w.entries() {
			if e.Type != store.AlertRaised {
				continue
			}
			d, err := store.DetailsAs[store.AlertDetails](e)
			ok(t, err)
			if d.Alert != store.AlertRevoke || d.What != why.Error() || d.Source != e.Writer {
				t.Fatalf("%+v", d)
			}
			for _, i := range d.Intents {
				named[i] = true
			}
		}
		return len(named) == many
	})
	for _, i := range intents {
		if !named[i] {
			t.Errorf("intent %s is not named", i)
		}
	}
	if n := w.count(store.AlertRaised); n > 2 {
		t.Errorf("%d alerts of two brokers about one cause", n)
	}
	for _, n := range []*node{one, two} {
		n.iss.set(func(i *tracing) { i.revoke = nil })
	}
	w.clock.pass(20 * time.Second) // past the longest pause
	w.until("all are revoked", func() bool { return w.revokedAs(store.CauseFrozen) == many })
	if n := children(t, run); n != 0 {
		t.Errorf("%d tokens live", n)
	}
}

func TestOneBrokerAloneRevokesWhatAFreezeCoversThoughRedisSaysThatOthersDo(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	one := w.start("broker-1")
	run := run1()
	var names []string
	for i := range 5 {
		_, err := one.Request(t.Context(), demoCaller, ask(run, stepped(i)))
		ok(t, err)
		d, err := store.DetailsAs[store.IssuedDetails](w.last(store.CredentialIssued))
		ok(t, err)
		names = append(names, "freeze-"+d.Intent)
	}
	// Another broker took them and died, or Redis lies.
	got, err := one.redis.Claims(t.Context(), names, time.Hour)
	ok(t, err)
	for i := range got {
		if !got[i] {
			t.Fatalf("claim %d was held", i)
		}
	}
	w.freeze(store.FreezeDetails{Orchestrator: "demo"})
	w.ticks(one)
	if n := w.count(store.CredentialRevoked); n != 0 {
		t.Fatalf("%d revoked, though others had claimed them a moment ago", n)
	}
	w.clock.pass(11 * time.Second)
	w.until("it does the work itself", func() bool { return w.revokedAs(store.CauseFrozen) == 5 })
	// Without Redis, too, and at once.
	w.start("broker-2")
	w.until("lifted", func() bool {
		_, err := one.Request(t.Context(), broker.Caller{Orchestrator: "other"}, ask(run))
		return err == nil
	})
	w.redis.Stop()
	w.freeze(store.FreezeDetails{Orchestrator: "other"})
	w.until("without Redis", func() bool { return w.revokedAs(store.CauseFrozen) == 6 })
}

func TestABrokerThatStartsUnderAFreezeRevokesWhatItCovers(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	old := w.start("broker-1")
	run := run1()
	_, err := old.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	ok(t, old.Close())
	w.freeze(store.FreezeDetails{Run: run})
	b := w.start("broker-2")
	w.until("revoked", func() bool { return w.revokedAs(store.CauseFrozen) == 1 })
	_, err = b.Request(t.Context(), demoCaller, ask(run))
	is(t, err, broker.ErrFrozen)
	// The recorder refuses it though this broker knows of no freeze yet.
	b.rec.set(func(r *recorder) {
		r.before = func(subs []*store.Submission) error {
			r.set(func(r *recorder) { r.before = nil })
			w.freeze(store.FreezeDetails{Step: "step-9"})
			return nil
		}
	})
	_, err = b.Request(context.Background(), demoCaller, ask(run1(), stepped(9)))
	is(t, err, broker.ErrFrozen)
	if b.iss.mints != 0 {
		t.Error("it was minted")
	}
}

func TestWhatAFreezeCondemnedIsRevokedThoughItWasLiftedWhileNobodyLooked(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	old := w.start("broker-1")
	run := run1()
	first, err := old.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	ok(t, old.Close())
	w.lift(w.freeze(store.FreezeDetails{Run: run}))
	b := w.start("broker-2")
	w.until("revoked", func() bool { return w.revokedAs(store.CauseFrozen) == 1 })
	if alive(t, first.Credential.Token) {
		t.Error("it is alive")
	}
	// What is asked for after the end of the freeze is none of its business.
	again, err := b.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	ok(t, b.Close())
	c := w.start("broker-3")
	if _, err = c.Request(t.Context(), demoCaller, ask(run, stepped(2))); err != nil {
		t.Fatal(err)
	}
	if !alive(t, again.Credential.Token) || w.revokedAs(store.CauseFrozen) != 1 {
		t.Error("what came after the freeze was revoked")
	}
}

func TestWhatCannotBeCalledBackIsNotRecordedAsRevokedByABrokerThatStartsAgain(t *testing.T) {
	w := newWorld(t)
	one := w.start("broker-1")
	run := run1()
	// The freeze comes between intent and issuance, and the broker hears of it
	// only after it has handed the certificate over.
	one.rec.set(func(r *recorder) { r.deaf = true })
	one.iss.set(func(i *tracing) {
		i.mint = func() error {
			w.freeze(store.FreezeDetails{Run: run})
			return nil
		}
	})
	r, err := one.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "pki:service" }))
	ok(t, err)
	if r.Credential == nil {
		t.Fatalf("%+v", r)
	}
	ok(t, one.Close())
	again := w.start("broker-1")
	w.ticks(again)
	if n := w.count(store.CredentialRevoked); n != 0 {
		t.Errorf("%d certificates that are out are on record as revoked", n)
	}
	_, err = again.Request(t.Context(), demoCaller, ask(run))
	is(t, err, broker.ErrFrozen)
}
