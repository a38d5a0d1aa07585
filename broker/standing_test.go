package broker_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store"
)

func TestADecisionForTheRunIsSeenThoughTheFollowerWasAway(t *testing.T) {
	w := newWorld(t)
	w.inForce(standing)
	b := w.start("broker-1")
	run := run1()
	r := w.pending(b, write(run))
	b.rec.set(func(r *recorder) { r.down = true })
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve, store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 3, Until: store.At(w.clock.now().Add(30 * time.Minute))}))
	time.Sleep(50 * time.Millisecond)
	b.rec.set(func(r *recorder) { r.down = false })
	got, err := b.Request(t.Context(), demoCaller, w.now(write(run, func(a *broker.Ask) { a.Step = "step-2" })))
	ok(t, err)
	if got.Credential == nil {
		t.Errorf("decision was answered, and people are asked again: %s", got.Status)
	}
	w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
	got, err = b.Request(t.Context(), demoCaller, w.now(write(run, func(a *broker.Ask) { a.Step = "step-2" })))
	ok(t, err)
	if got.Credential == nil {
		t.Errorf("and also once it follows again: %s", got.Status)
	}
}

func TestADecisionForTheRunIsSeenByTheVeryNextCall(t *testing.T) {
	w := newWorld(t)
	w.inForce(standing)
	b := w.start("broker-1")
	bad := 0
	for i := range 30 {
		run := run1()
		r := w.pending(b, write(run))
		ok(t, w.decide(r.Request, "alice", "dba", store.Approve, store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 3, Until: store.At(w.clock.now().Add(30 * time.Minute))}))
		a := write(run, func(a *broker.Ask) { a.Step = fmt.Sprint("s", i) })
		a.Arrived = w.clock.now()
		got, err := b.Request(t.Context(), demoCaller, a)
		ok(t, err)
		if got.Credential == nil {
			bad++
		}
	}
	if bad > 0 {
		t.Errorf("%d of 30 asked people again", bad)
	}
}
