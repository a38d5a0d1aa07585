package broker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// apart sets the clocks of brokers that are started from now on off the
// recorder's.
func (w *world) apart(off time.Duration) { w.clock = &clock{off: off} }

func TestClocksTooFarApartAreToldAsALedgerThatCannotBeUsedAndNamed(t *testing.T) {
	for _, off := range []time.Duration{45 * time.Second, -45 * time.Second, 3 * time.Minute} {
		t.Run(off.String(), func(t *testing.T) {
			w := newWorld(t)
			w.apart(off)
			b := w.start("broker-1")
			run := run1()
			for _, a := range []broker.Ask{ask(run), ask(run, stepped(2), keyed("k"))} {
				_, err := b.Request(t.Context(), demoCaller, a)
				is(t, err, store.ErrUnavailable)
				if _, order := store.IsOrder(err); order || !strings.Contains(err.Error(), "compare the clocks") {
					t.Errorf("it is told as %v", err)
				}
			}
			// What people approved stays, and nobody goes round in circles.
			r := w.pending(b, write(run))
			ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
			_, err := b.Request(t.Context(), demoCaller, w.now(write(run)))
			is(t, err, store.ErrUnavailable)
			if b.iss.mints != 0 || children(t, run) != 0 {
				t.Error("Vault was turned to")
			}
			if v, err := b.Get(t.Context(), demoCaller, r.Request); err != nil || v.Status != store.StatusApproved {
				t.Errorf("what was approved is %v %v", v.Status, err)
			}
		})
	}
}

func TestARetryAtAnotherBrokerIsOneThoughTheRecordersClockWasFast(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	w.apart(-20 * time.Second)
	one, two := w.start("broker-1"), w.start("broker-2")
	run := run1()
	a := ask(run, keyed("k-1"))
	first, err := one.Request(t.Context(), demoCaller, a)
	ok(t, err)
	first.Answered()
	w.until("heard of", func() bool {
		v, err := two.Get(t.Context(), demoCaller, first.Request)
		return err == nil && v.Status == store.StatusIssued
	})
	// At once it may have been sent before the first was answered.
	a.Wait = 10 * time.Second
	began := time.Now()
	r, err := two.Request(t.Context(), demoCaller, a)
	ok(t, err)
	if took := time.Since(began); r.Credential != nil || r.Status != store.StatusApproved || took < 200*time.Millisecond {
		t.Fatalf("at once, after %s: %+v", took, r)
	}
	second, err := two.Request(t.Context(), demoCaller, a)
	ok(t, err)
	if second.Credential == nil || alive(t, first.Credential.Token) || !alive(t, second.Credential.Token) {
		t.Fatalf("the retry: %+v", second)
	}
}
