package broker

import (
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func TestAStepIsAsSensitiveAsTheMostSensitiveOfItsLiveCredentials(t *testing.T) {
	x := newIndex()
	k := stepKey{"demo", "run", "step"}
	at := int64(0)
	take := func(typ store.Type, request, step, sensitivity string, details any) {
		t.Helper()
		s := store.Submission{Entry: store.Entry{
			ID: store.NewID(), Type: typ, Time: store.At(time.Now()), Orchestrator: k.orchestrator, Run: k.run, Step: step, Request: request,
			Decision: &store.Decision{Outcome: store.Allow}, Risk: &store.Risk{Sensitivity: sensitivity},
		}}
		s.SetDetails(details)
		x.apply(placed{&s.Entry, at})
		at++
	}
	mint := func(request, step, sensitivity string) {
		take(store.StepRequested, request, step, sensitivity, store.RequestedDetails{Join: request})
		take(store.CredentialIssuing, request, step, sensitivity, store.IssuingDetails{Attempt: 1})
		take(store.CredentialIssued, request, step, sensitivity, store.IssuedDetails{Attempt: 1})
	}
	is := func(want string) {
		t.Helper()
		got := ""
		if r := x.risk(k); r != nil {
			got = r.Sensitivity
		}
		if got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	is("")
	mint("r1", "step", "sensitive")
	is("sensitive")
	mint("r2", "step", "low")
	mint("r3", "other", "critical")
	is("sensitive")
	mint("r4", "step", "critical")
	is("critical")
	for _, end := range []struct{ request, left string }{{"r4", "sensitive"}, {"r1", "low"}, {"r2", ""}} {
		take(store.CredentialRevoked, end.request, "step", "", store.ClosedDetails{Attempt: 1})
		is(end.left)
	}
}
