package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// behind gives a broker an access path, which g is set to.
func (w *world) behind(g **gateway.Gateway, change ...func(*gateway.Config)) func(*broker.Config) {
	return func(c *broker.Config) {
		gc := gateway.Config{Recorder: c.Recorder, TrustDomain: trustDomain, Now: w.clock.now, Log: c.Log,
			Addresses: map[string]string{store.ProtocolHTTP: "http://gateway.test:8789", store.ProtocolMCP: "http://gateway.test:8791/mcp"}}
		for _, f := range change {
			f(&gc)
		}
		*g = gateway.New(gc)
		w.t.Cleanup((*g).Close)
		c.Gateway = *g
	}
}

// through is a call for the demo's HTTP service.
func through(run string, change ...func(*broker.Ask)) broker.Ask {
	return ask(run, append([]func(*broker.Ask){func(a *broker.Ask) {
		a.Scope, a.Body = "http:demo", []byte(`{"run":"`+run+`","scope":"http:demo"}`)
	}}, change...)...)
}

// cutWithin fails the test where s does not end within a second.
func cutWithin(t testing.TB, s *gateway.Session) {
	t.Helper()
	select {
	case <-s.Context().Done():
	case <-time.After(time.Second):
		t.Error("the session is not cut a second later")
	}
}

// httpKey is the secret that the demo's HTTP service asks for.
func httpKey(t testing.TB) string {
	t.Helper()
	s, err := root.Logical().Read("secret/data/http-demo")
	ok(t, err)
	return s.Data["data"].(map[string]any)["key"].(string)
}

func TestAStepGetsASessionAndNeverTheSecret(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	r, err := n.Request(t.Context(), demoCaller, through(run))
	ok(t, err)
	c := r.Credential
	if c.Kind != issuer.KindGateway || !c.Revocable || c.Protocol != "http" || c.Address != "http://gateway.test:8789" || len(c.Token) < 40 {
		t.Fatalf("%+v", *c)
	}
	reply, err := json.Marshal(c)
	ok(t, err)
	if want := fmt.Sprintf(`{"kind":"gateway","revocable":true,"token":%q,"protocol":"http","address":"http://gateway.test:8789"}`, c.Token); string(reply) != want {
		t.Errorf("the step is told %s", strings.ReplaceAll(string(reply), c.Token, "TOKEN"))
	}
	d, err := store.DetailsAs[store.IssuedDetails](w.last(store.CredentialIssued))
	ok(t, err)
	if d.Kind != "gateway" || !d.Revocable || d.Accessor == "" || children(t, run) != 1 {
		t.Errorf("on record: %+v; %d child tokens", d, children(t, run))
	}
	s, err := g.Session(c.Token)
	ok(t, err)
	if s.Intent != d.Intent || !strings.Contains(string(s.Secret.Data), httpKey(t)) || s.Grant.Access.Digest() == "" {
		t.Errorf("the gateway holds no secret for %s", s.Intent)
	}
	uses, err := s.Use(t.Context(), gateway.Use{Use: "GET /", Conn: "c1", Statement: "GET /?q=1 HTTP/1.1"})
	ok(t, err)
	uses[0].Finish(store.UseOutcome{Status: "200", Received: 12}, "")
	e := w.last(store.CredentialUsed)
	used, err := store.DetailsAs[store.UsedDetails](e)
	ok(t, err)
	if used.Intent != d.Intent || used.Via != store.ViaGateway || used.Access != s.Grant.Access.Digest() || used.Masking != s.Grant.Access.Masking.Digest() || used.Masking == "" ||
		e.Run != run || e.Request != r.Request || e.Agent != r.Identity || e.Sealed[store.SealedStatement] == "" {
		t.Errorf("the use on record: %+v %+v", e, used)
	}
	w.until("the outcome is on record", func() bool { return w.count(store.UseFinished) == 1 })
	out, err := n.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	if out.Revoked != 1 || children(t, run) != 0 {
		t.Errorf("%+v, and %d child tokens are left", out, children(t, run))
	}
	w.wantTypes("step.requested", "credential.issuing", "credential.issued", "credential.used", "use.finished", "credential.revoked")
	for _, secret := range []string{httpKey(t), c.Token} {
		if strings.Contains(w.logs.String(), secret) {
			t.Error("a secret is in the log")
		}
		for _, e := range w.entries() {
			if b, _ := e.Marshal(); strings.Contains(string(b), secret) {
				t.Errorf("a secret is in %s", e.Type)
			}
		}
	}
}

func TestAGatewayThatHasNotHeardOfTheEndPutsNothingMoreOnRecord(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	a, b := w.start("broker-1", w.behind(&g)), w.start("broker-2") // each with a Redis of its own
	run := run1()
	r, err := a.Request(t.Context(), demoCaller, through(run))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	a.rec.set(func(r *recorder) { r.deaf = true })
	w.until("it is revoked elsewhere", func() bool {
		out, err := b.RevokeStep(t.Context(), demoCaller, "step-1", run)
		return err == nil && out.Revoked == 1
	})
	_, err = s.Use(t.Context(), gateway.Use{Use: "GET /", Statement: "GET /"})
	is(t, err, gateway.ErrEnded)
	cutWithin(t, s)
	if n := w.count(store.CredentialUsed); n != 0 {
		t.Errorf("%d uses on record after the end", n)
	}
}

func TestARevocationCutsTheSessionBeforeVaultIsTold(t *testing.T) {
	for name, end := range map[string]func(w *world, n *node, run string){
		"revoked": func(w *world, n *node, run string) {
			_, err := n.RevokeStep(w.t.Context(), demoCaller, "step-1", run)
			ok(w.t, err)
		},
		"finished": func(w *world, n *node, run string) {
			_, err := n.Finish(w.t.Context(), demoCaller, broker.Result{Step: "step-1", Run: run, Outcome: "succeeded"})
			ok(w.t, err)
		},
		"expired": func(w *world, n *node, run string) {
			w.clock.pass(time.Hour)
			w.until("it is closed", func() bool { return w.count(store.CredentialExpired) == 1 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var g *gateway.Gateway
			n := w.start("broker-1", w.behind(&g))
			run := run1()
			r, err := n.Request(t.Context(), demoCaller, through(run))
			ok(t, err)
			s, err := g.Session(r.Credential.Token)
			ok(t, err)
			var first atomic.Bool // Vault was told first; the keeper may tell it too
			n.iss.set(func(i *tracing) {
				i.revoke = func() error {
					if s.Context().Err() == nil {
						first.Store(true)
					}
					return nil
				}
			})
			end(w, n, run)
			if first.Load() {
				t.Error("Vault was told first")
			}
			if _, err := g.Session(r.Credential.Token); !errors.Is(err, gateway.ErrNoSession) {
				t.Errorf("the token is still taken: %v", err)
			}
			if _, err := s.Use(t.Context(), gateway.Use{Use: "GET /"}); !errors.Is(err, gateway.ErrEnded) {
				t.Errorf("the session is still used: %v", err)
			}
		})
	}
}

func TestARevocationCutsTheSessionThoughVaultAndTheRecorderAreDown(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	r, err := n.Request(t.Context(), demoCaller, through("run-d"))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	n.rec.set(func(r *recorder) { r.down = true })
	n.iss.set(func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } })
	_, _ = n.RevokeStep(t.Context(), demoCaller, "step-1", "run-d")
	cutWithin(t, s)
	n.rec.set(func(r *recorder) { r.down = false })
	n.iss.set(func(i *tracing) { i.revoke = nil })
	w.until("it is revoked", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if c := w.last(store.CredentialRevoked).Cause; c == nil || *c != broker.CauseRequested {
		t.Errorf("cause %v", c)
	}
}

func TestAnotherBrokersRevocationCutsTheSessionWithinASecond(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	var g *gateway.Gateway
	one := w.start("broker-1", w.behind(&g))
	two := w.start("broker-2")
	run := run1()
	r, err := one.Request(t.Context(), demoCaller, through(run))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	if _, err := two.Request(t.Context(), demoCaller, through(run1())); !errors.Is(err, scopes.ErrDelivery) {
		t.Errorf("a broker without a gateway: %v", err)
	}
	if n := w.count(store.StepRequested); n != 1 {
		t.Errorf("%d requests are on record", n)
	}
	out, err := two.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	if out.Revoked != 1 {
		t.Errorf("%+v", out)
	}
	cutWithin(t, s)
	if children(t, run) != 0 {
		t.Error("the child token lives")
	}
}

func TestAnotherBrokersRevocationCutsTheSessionThoughVaultIsDown(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	var g *gateway.Gateway
	one := w.start("broker-1", w.behind(&g))
	two := w.start("broker-2")
	r, err := one.Request(t.Context(), demoCaller, through("run-v"))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	for _, n := range []*node{one, two} {
		n.iss.set(func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } })
	}
	out, err := two.RevokeStep(t.Context(), demoCaller, "step-1", "run-v")
	ok(t, err)
	if out.Pending != 1 {
		t.Errorf("%+v", out)
	}
	cutWithin(t, s)
	if _, err := g.Session(r.Credential.Token); !errors.Is(err, gateway.ErrNoSession) {
		t.Errorf("the token is still taken: %v", err)
	}
	one.iss.set(func(i *tracing) { i.revoke = nil }) // its own broker comes first
	w.until("it is revoked", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if c := w.last(store.CredentialRevoked).Cause; c == nil || *c != broker.CauseRequested {
		t.Errorf("cause %v", c)
	}
}

func TestWhatABrokerHeldNoSessionForAfterARestartIsRevokedAndMayBeRetried(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	other := w.start("broker-2")
	run := run1()
	first, err := n.Request(t.Context(), demoCaller, through(run, keyed("k1")))
	ok(t, err)
	first.Answered()
	// It dies in the middle of a use: nothing more gets out of it.
	s, err := g.Session(first.Credential.Token)
	ok(t, err)
	_, err = s.Use(t.Context(), gateway.Use{Use: "GET /", Statement: "GET /"})
	ok(t, err)
	n.rec.set(func(r *recorder) { r.down = true })
	ok(t, n.Close())
	g.Close()
	if w.count(store.CredentialRevoked) != 0 {
		t.Fatal("it was revoked before the restart")
	}
	w.ticks(other) // which has no part in it
	if w.count(store.CredentialRevoked) != 0 {
		t.Fatal("another broker revoked it")
	}
	n = w.start("broker-1", w.behind(&g))
	w.until("the lost session's credential is revoked", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if c := w.last(store.CredentialRevoked).Cause; c == nil || *c != broker.CauseLost || children(t, run) != 0 {
		t.Errorf("cause %v, %d child tokens", c, children(t, run))
	}
	if _, err := g.Session(first.Credential.Token); !errors.Is(err, gateway.ErrNoSession) {
		t.Errorf("%v", err)
	}
	w.clock.pass(time.Second) // a call this soon could have overlapped the first
	second, err := n.Request(t.Context(), demoCaller, through(run, keyed("k1")))
	ok(t, err)
	if second.Request != first.Request || second.Expires.After(first.Expires) {
		t.Errorf("the retry is %s until %s", second.Request, second.Expires)
	}
	if _, err := g.Session(second.Credential.Token); err != nil {
		t.Error(err)
	}
	if w.count(store.CredentialUsed) != 1 || w.count(store.UseFinished) != 0 {
		t.Errorf("of the use that was under way the record says %v", w.types())
	}
}

func TestARetryUnderAKeyOpensANewSessionAndEndsTheOldOne(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	first, err := n.Request(t.Context(), demoCaller, through(run, keyed("k1")))
	ok(t, err)
	first.Answered()
	old, err := g.Session(first.Credential.Token)
	ok(t, err)
	second, err := n.Request(t.Context(), demoCaller, w.now(through(run, keyed("k1"))))
	ok(t, err)
	cutWithin(t, old)
	s, err := g.Session(second.Credential.Token)
	ok(t, err)
	if first.Credential.Token == second.Credential.Token || s.Intent == old.Intent || children(t, run) != 1 {
		t.Errorf("intents %s and %s, %d child tokens", old.Intent, s.Intent, children(t, run))
	}
	w.ticks(n)
	if _, err := g.Session(second.Credential.Token); err != nil {
		t.Errorf("the new session: %v", err)
	}
}

func TestASlowRevocationDoesNotTakeARetrysOldSessionForLost(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	first, err := n.Request(t.Context(), demoCaller, through(run, keyed("k1")))
	ok(t, err)
	first.Answered()
	var slow sync.Once
	n.iss.set(func(i *tracing) {
		i.revoke = func() error {
			slow.Do(func() { w.ticks(n) })
			return nil
		}
	})
	_, err = n.Request(t.Context(), demoCaller, w.now(through(run, keyed("k1"))))
	ok(t, err)
	if c := w.last(store.CredentialRevoked).Cause; c == nil || *c != broker.CauseRetry {
		t.Errorf("cause %v", c)
	}
}

func TestAFullGatewayRefusesBeforeAnythingIsOnRecord(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g, func(c *gateway.Config) { c.MaxSessions = 1 }))
	r, err := n.Request(t.Context(), demoCaller, through(run1()))
	ok(t, err)
	before := len(w.entries())
	_, err = n.Request(t.Context(), demoCaller, through(run1()))
	is(t, err, gateway.ErrFull)
	if len(w.entries()) != before {
		t.Errorf("on record: %v", w.types())
	}
	_, err = n.RevokeStep(t.Context(), demoCaller, r.Step, r.Run)
	ok(t, err)
	_, err = n.Request(t.Context(), demoCaller, through(run1()))
	ok(t, err)
}

func TestAStepThatEndsDuringItsMintGetsNoSession(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	n.iss.set(func(i *tracing) {
		i.activate = func() error {
			_, err := n.RevokeStep(context.Background(), demoCaller, "step-1", run)
			return err
		}
	})
	_, err := n.Request(t.Context(), demoCaller, through(run))
	if err == nil {
		t.Fatal("it was handed over")
	}
	w.until("it is revoked", func() bool { return w.count(store.CredentialRevoked) == 1 && children(t, run) == 0 })
	if g.Has(w.last(store.CredentialIssuing).ID) {
		t.Error("its session is open")
	}
}

// refund is what a step that holds a session of the demo's MCP server asks for
// at one call.
const refund = "mcp:demo-refund"

func TestACallThroughTheGatewayWaitsForPeopleAndItsCredentialEndsWithIt(t *testing.T) {
	w := newWorld(t)
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	caller := broker.Caller{Orchestrator: "demo", Owners: []string{"user:owner"}}
	r, err := n.Request(t.Context(), caller, ask(run, func(a *broker.Ask) { a.Scope, a.Subject = "mcp:demo", "user:ada" }))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	// waiting asks with little time, and again with more where it was too little
	// for people to be asked at all: the same call joins.
	waiting := func(reason string) (err error) {
		var w *gateway.Waiting
		for d := 100 * time.Millisecond; d < time.Minute && !errors.As(err, &w); d *= 2 {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			_, err = s.Ask(ctx, refund, reason)
			cancel()
		}
		return err
	}
	err = waiting("refund order 7, 12.00 EUR")
	var waits *gateway.Waiting
	if !errors.As(err, &waits) || waits.Request == "" || !strings.HasPrefix(waits.URL, "https://people.test/approvals/apr_") {
		t.Fatalf("%v %+v", err, waits)
	}
	story, _, d := w.asked(waits.Request)
	if story.Run != run || story.Step != "step-1" || story.Orchestrator != "demo" || story.Subject == nil || len(d.Excluded) != 1 {
		t.Errorf("people are asked %+v, of whom %v may not decide", story, d.Excluded)
	}
	if !d.OneCall {
		t.Error("people are not told that it is for one call")
	}
	// Whoever writes the gateway's words as a reason asks for a session all the same.
	like, err := n.Request(t.Context(), caller, ask(run, func(a *broker.Ask) { a.Scope, a.Reason = refund, "refund order 7, 12.00 EUR" }))
	ok(t, err)
	if _, _, d := w.asked(like.Request); like.Request == waits.Request || d.OneCall {
		t.Errorf("an orchestrator asks for one call: %+v", d)
	}
	// Another call is another request; the same one joins.
	err = waiting("refund order 8, 12.00 EUR")
	var other *gateway.Waiting
	if !errors.As(err, &other) || other.Request == waits.Request {
		t.Fatalf("another call: %v", err)
	}
	got := make(chan *gateway.Session, 1)
	go func() {
		asked, err := s.Ask(t.Context(), refund, "refund order 7, 12.00 EUR")
		if err != nil {
			t.Error(err)
		}
		got <- asked
	}()
	ok(t, w.decide(waits.Request, "bob", "dba", store.Approve))
	asked := <-got
	if asked == nil {
		t.FailNow()
	}
	if asked.Grant.Scope != refund || asked.Story.Request != waits.Request || asked.Story.Step != "step-1" || len(asked.Secret.Data) == 0 {
		t.Errorf("%+v", asked.Story)
	}
	w.ticks(n)
	if asked.Context().Err() != nil {
		t.Fatal("it ended during the call")
	}
	asked.Close()
	w.until("it is revoked", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if e := w.last(store.CredentialRevoked); e.Request != waits.Request || e.Cause == nil || *e.Cause != broker.CauseCall {
		t.Errorf("revoked %s, cause %v", e.Request, e.Cause)
	}
	if s.Context().Err() != nil {
		t.Error("the step's own session ended with it")
	}
	ok(t, w.decide(other.Request, "bob", "dba", store.Refuse))
	if _, err := s.Ask(t.Context(), refund, "refund order 8, 12.00 EUR"); !errors.Is(err, gateway.ErrDenied) {
		t.Errorf("a denied call: %v", err)
	}
}

func TestEndingAStepEndsWhatItsCallsAskedFor(t *testing.T) {
	w := newWorld(t)
	w.inForce(rewrite("mcp:demo-refund", "    approval:\n      groups:\n        - {group: dba, count: 1}\n      reasons: {requester: true, approver: true}\n", ""))
	var g *gateway.Gateway
	n := w.start("broker-1", w.behind(&g))
	run := run1()
	r, err := n.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Scope = "mcp:demo" }))
	ok(t, err)
	s, err := g.Session(r.Credential.Token)
	ok(t, err)
	asked, err := s.Ask(t.Context(), refund, "refund order 7")
	ok(t, err)
	out, err := n.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	if out.Revoked != 2 || out.Pending != 0 || children(t, run) != 0 {
		t.Errorf("%+v", out)
	}
	cutWithin(t, s)
	cutWithin(t, asked)
	if w.count(store.CredentialRevoked) != 2 {
		t.Errorf("%v", w.types())
	}
}
