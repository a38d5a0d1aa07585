package broker_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

func TestAnApprovalForARunKeepsToTheHoursOfTheScopeDrawnOn(t *testing.T) {
	w := newWorld(t)
	now := w.clock.now().UTC()
	h := now.Hour()
	w.inForce(func(s string) string {
		s = standing(s)
		return rewrite("vault:demo-admin", "standing: {uses: 3, for: 1h}", fmt.Sprintf("standing: {uses: 3, for: 1h}\n      hours: {from: \"%02d:00\", to: \"%02d:00\", zone: UTC}", (h+3)%24, (h+5)%24))(rewrite("vault:demo-admin", "count: 2", "count: 1")(s))
	})
	b := w.start("broker-1")
	run := run1()
	r := w.pending(b, write(run))
	terms := store.StandingTerms{Scopes: []string{"vault:demo-write", "vault:demo-admin"}, Uses: 2, Until: store.At(w.clock.now().Add(30 * time.Minute))}
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve, terms))
	got, err := b.Request(t.Context(), demoCaller, w.now(write(run, admin, func(a *broker.Ask) { a.Step = "step-9" })))
	ok(t, err)
	if got.Credential != nil {
		t.Error("vault:demo-admin minted outside its hours on an approval given outside its hours")
	}
}

func TestAPolicyThatFailsVoidsNothing(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	r := w.pending(b, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	w.mu.Lock()
	was := w.set
	set, err := scopes.Parse("demo.yaml", scopes.Demo(nil), "p.rego", []byte("package countersign\n\ndeny contains x if { x := count(numbers.range(1, 100000000)) }\n"))
	if err != nil {
		w.mu.Unlock()
		t.Fatal(err)
	}
	w.set = set
	w.mu.Unlock()
	if _, err = b.Request(t.Context(), demoCaller, w.now(write(run))); err == nil {
		t.Error("what no policy allowed was handed over")
	}
	w.mu.Lock()
	w.set = was
	w.mu.Unlock()
	_, err = b.Request(t.Context(), demoCaller, w.now(write(run)))
	var na *broker.NotApproved
	if errors.As(err, &na) {
		t.Errorf("what alice approved is lost: %v", err)
	}
}
