package broker_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func limits(l broker.Limits) func(*broker.Config) {
	return func(c *broker.Config) { c.Limits = l }
}

// used gives w a Redis that was rebuilt long ago: rates in it are what they are.
func (w *world) used() {
	w.t.Helper()
	w.redis = redistest.Start(w.t)
	c := redis.NewClient(&redis.Options{Addr: w.redis.Addr()})
	defer func() { _ = c.Close() }()
	ok(w.t, c.Set(w.t.Context(), "countersign:generation", "1", 0).Err())
}

// flood makes n calls at once, alternating between brokers, and returns how many
// got on. Any error but a *Limited that says what and of is the test's end.
func (w *world) flood(n int, what, of string, scope string, nodes ...*node) (got int) {
	w.t.Helper()
	var done atomic.Int64
	var all sync.WaitGroup
	run := run1()
	for i := range n {
		all.Go(func() {
			_, err := nodes[i%len(nodes)].Request(w.t.Context(), demoCaller, ask(run, func(a *broker.Ask) {
				a.Step, a.Scope, a.Reason = fmt.Sprintf("step-%d", i), scope, "because"
			}))
			var limited *broker.Limited
			switch {
			case err == nil:
				done.Add(1)
			case !errors.As(err, &limited) || limited.What != what || limited.Of != of || limited.After <= 0:
				w.t.Errorf("call %d: %v", i, err)
			}
		})
	}
	all.Wait()
	return int(done.Load())
}

func TestFiftyCallsAtTwoBrokersGetAsManyCredentialsAsTheLimitSays(t *testing.T) {
	for _, c := range []struct {
		name, of string
		limits   broker.Limits
	}{
		{"each orchestrator", "orchestrator", broker.Limits{Each: broker.Limit{Live: 10}}},
		{"within a scope", "scope", broker.Limits{Each: broker.Limit{Live: 40}, EachScope: broker.Limit{Live: 3}, Exceptions: []broker.Exception{{Scope: "vault:demo-read", Limit: broker.Limit{Live: 10}}}}},
		{"all together", "all", broker.Limits{All: broker.Limit{Live: 10}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			a, b := w.start("broker-1", limits(c.limits)), w.start("broker-2", limits(c.limits))
			if got := w.flood(50, "live", c.of, "vault:demo-read", a, b); got != 10 {
				t.Fatalf("%d of 50 calls got a credential, the limit is 10", got)
			}
			if n := w.count(store.StepRequested); n != 10 {
				t.Errorf("%d requests on record: what is refused is not put there", n)
			}
		})
	}
}

func TestASingleBrokerKeepsLimitsInItsOwnRedis(t *testing.T) {
	w := newWorld(t)
	n := w.start("broker-1", limits(broker.Limits{Each: broker.Limit{Live: 4}}))
	if got := w.flood(20, "live", "orchestrator", "vault:demo-read", n); got != 4 {
		t.Errorf("%d of 20 calls got a credential, the limit is 4", got)
	}
}

func TestAPlaceIsFreeAsSoonAsItsCredentialHasEnded(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	l := limits(broker.Limits{Each: broker.Limit{Live: 1}})
	a, b := w.start("broker-1", l), w.start("broker-2", l)
	run := run1()
	for i := range 5 {
		at, other := a, b
		if i%2 == 1 {
			at, other = b, a
		}
		_, err := at.Request(t.Context(), demoCaller, ask(run, keyed(fmt.Sprint("k", i))))
		ok(t, err)
		var limited *broker.Limited
		if _, err := other.Request(t.Context(), demoCaller, ask(run, func(a *broker.Ask) { a.Step = "other" })); !errors.As(err, &limited) {
			t.Fatalf("a second one: %v", err)
		}
		// Sent again it joins, and is told as ever: a retry needs no place of its own.
		if _, err := at.Request(t.Context(), demoCaller, ask(run, keyed(fmt.Sprint("k", i)))); errors.As(err, &limited) {
			t.Fatalf("the same again: %v", err)
		}
		// At the broker that did not issue it too.
		w.until("the other broker knows", func() bool {
			done, err := other.RevokeStep(t.Context(), demoCaller, "step-1", run)
			ok(t, err)
			return done.Revoked == 1
		})
	}
}

func TestWhoWaitsForPeopleIsBoundedAndJoiningIsNot(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	l := limits(broker.Limits{Each: broker.Limit{Pending: 3}})
	a, b := w.start("broker-1", l), w.start("broker-2", l)
	if got := w.flood(20, "pending", "orchestrator", "vault:demo-write", a, b); got != 3 {
		t.Fatalf("%d of 20 calls wait for people, the limit is 3", got)
	}
	if n := w.count(store.ApprovalRequested); n != 3 {
		t.Errorf("people were asked %d times", n)
	}
	asked := w.last(store.ApprovalRequested)
	again := ask(asked.Run, func(a *broker.Ask) { a.Step, a.Scope, a.Reason = asked.Step, "vault:demo-write", "because" })
	w.until("both brokers know", func() bool {
		r1, err1 := a.Request(t.Context(), demoCaller, again)
		r2, err2 := b.Request(t.Context(), demoCaller, again)
		return err1 == nil && err2 == nil && r1.Request == asked.Request && r2.Request == asked.Request
	})
	// What is taken back makes room.
	ok(t, a.Withdraw(t.Context(), demoCaller, asked.Request))
	if got := w.flood(5, "pending", "orchestrator", "vault:demo-write", a); got != 1 {
		t.Errorf("%d of 5 calls found the one free place", got)
	}
}

func TestAfterRedisWasEmptiedWhatIsLiveIsCountedFromTheRecord(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	l := limits(broker.Limits{Each: broker.Limit{Live: 3, Pending: 1}})
	a, b := w.start("broker-1", l), w.start("broker-2", l)
	if got := w.flood(3, "live", "orchestrator", "vault:demo-read", a); got != 3 {
		t.Fatalf("%d", got)
	}
	if got := w.flood(1, "pending", "orchestrator", "vault:demo-write", a); got != 1 {
		t.Fatalf("%d", got)
	}
	w.until("the other broker knows", func() bool {
		return b.Ready(t.Context()) == nil && w.seen(b, 3)
	})
	w.redis.Flush()
	if got := w.flood(4, "live", "orchestrator", "vault:demo-read", b); got != 0 {
		t.Errorf("%d more than the limit, because Redis was emptied", got)
	}
	if got := w.flood(4, "pending", "orchestrator", "vault:demo-write", b); got != 0 {
		t.Errorf("%d more wait for people than the limit, because Redis was emptied", got)
	}
}

// seen reports whether n knows that many requests with a live credential.
func (w *world) seen(n *node, live int) bool {
	w.t.Helper()
	for _, e := range w.entries() {
		if e.Type == store.CredentialIssued {
			if v, err := n.Get(w.t.Context(), demoCaller, e.Request); err == nil && v.Status == store.StatusIssued && !v.Expires.IsZero() {
				live--
			}
		}
	}
	return live == 0
}

func TestWithoutRedisNothingIsIssuedUnderALimit(t *testing.T) {
	w := newWorld(t)
	w.used()
	n := w.start("broker-1", limits(broker.Limits{Each: broker.Limit{Live: 3, Rate: 10}}))
	_, err := n.Charge(t.Context(), demoCaller, "vault:demo-read")
	ok(t, err)
	w.redis.Stop()
	if _, err := n.Charge(t.Context(), demoCaller, "vault:demo-read"); err == nil || !strings.Contains(err.Error(), "state unavailable") {
		t.Errorf("charge: %v", err)
	}
	if _, err := n.Request(t.Context(), demoCaller, ask(run1())); err == nil || !strings.Contains(err.Error(), "state unavailable") {
		t.Errorf("request: %v", err)
	}
	if len(w.entries()) != 0 {
		t.Errorf("on record: %v", w.types())
	}
}

func TestOneFloodingCallerUsesUpNothingOfAnothers(t *testing.T) {
	w := newWorld(t)
	w.used()
	l := limits(broker.Limits{
		All: broker.Limit{Rate: 10, Per: time.Hour}, Each: broker.Limit{Rate: 5, Per: time.Hour}, EachScope: broker.Limit{Rate: 4, Per: time.Hour},
		Exceptions: []broker.Exception{{Orchestrator: "busy", Limit: broker.Limit{Rate: 100, Per: time.Hour}}, {Orchestrator: "busy", Scope: "vault:demo-read", Limit: broker.Limit{Rate: -1}}},
	})
	a, b := w.start("broker-1", l), w.start("broker-2", l)
	calls := func(name, scope string, n int) (through int, by string) {
		for i := range n {
			at := a
			if i%2 == 1 {
				at = b
			}
			quotas, err := at.Charge(t.Context(), broker.Caller{Orchestrator: name}, scope)
			var limited *broker.Limited
			switch {
			case errors.As(err, &limited) && limited.What == "rate" && limited.After > 0:
				by = limited.Of
			case err != nil:
				t.Fatal(err)
			default:
				through++
			}
			if len(quotas) == 0 || quotas[0].Of != "scope" && name != "busy" || quotas[0].Remaining < 0 {
				t.Fatalf("quotas %+v", quotas)
			}
		}
		return through, by
	}
	if n, by := calls("flooding", "vault:demo-read", 50); n != 4 || by != "scope" {
		t.Errorf("%d calls got through, refused by %s", n, by)
	}
	// What its scope's rate refused used up nothing of its own, nor of all's.
	if n, by := calls("flooding", "vault:demo-write", 3); n != 1 || by != "orchestrator" {
		t.Errorf("%d calls got through, refused by %s", n, by)
	}
	if n, by := calls("quiet", "vault:demo-read", 4); n != 4 || by != "" {
		t.Errorf("%d of 4 calls got through, refused by %s", n, by)
	}
	if n, by := calls("busy", "vault:demo-read", 5); n != 1 || by != "all" {
		t.Errorf("%d calls got through, refused by %s: all have 10 together", n, by)
	}
	if n := len(w.entries()); n != 0 {
		t.Errorf("%d entries on record", n)
	}
}

func TestLimitsThatCannotBeMeantAreRefused(t *testing.T) {
	for want, l := range map[string]broker.Limits{
		"-1 is no bound":        {Each: broker.Limit{Live: -1}},
		"-2 is no bound":        {Exceptions: []broker.Exception{{Scope: "x", Limit: broker.Limit{Live: -2}}}},
		"go with rate":          {All: broker.Limit{Burst: 3}},
		"per is at most 24h":    {All: broker.Limit{Rate: 3, Per: 25 * time.Hour}},
		"set orchestrator":      {Exceptions: []broker.Exception{{}}},
		"not the name":          {Exceptions: []broker.Exception{{Orchestrator: "a:b"}}},
		"there is one":          {Exceptions: []broker.Exception{{Scope: "x"}, {Scope: "x"}}},
		"exceptions[0]: per is": {Exceptions: []broker.Exception{{Scope: "x", Limit: broker.Limit{Rate: 1, Per: -1}}}},
	} {
		if err := l.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", l, err, want)
		}
	}
}
