package approvals

import (
	"context"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func TestAnErasedReasonIsSaidToBeErasedAndItsPersonStandsByPseudonym(t *testing.T) {
	w := newWorld(t)
	by := ledger.Eraser{Name: "recorder-1", Agent: "spiffe://example.test/recorder/recorder-1"}
	loaded := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.PolicyLoaded, WriterTime: store.At(w.clock()), Agent: by.Agent}}
	loaded.SetDetails(store.PolicyDetails{Retention: map[string]store.Duration{"sensitive": store.Duration(time.Hour)}})
	ok(t, w.append(ledger.Author{Name: by.Name, Recorder: true}, loaded))
	x := w.asking("app:write")
	ok(t, w.send(x))
	id := x.ad.Approval
	_, err := w.a.Decide(t.Context(), alice, id, Decision{Decision: store.Refuse, Reason: "not today", Via: viaPage})
	ok(t, err)
	before := w.get(id)
	if before.Decisions[0].Reason != "not today" || before.Decisions[0].Person != alice.Name {
		t.Fatalf("%+v", before.Decisions)
	}
	w.advance(2 * time.Hour)
	due, _, err := w.ledger.Due(t.Context(), by, ledger.Class{Sensitivity: "sensitive"}, time.Hour, 0, store.MaxErased)
	ok(t, err)
	ok(t, w.ledger.Erase(context.Background(), by, due, "sensitive", time.Hour))
	r := w.get(id)
	d := r.Decisions[0]
	if d.Reason != Erased || d.Person != key.Pseudonym(alice.Name) || r.Status != store.StatusDenied {
		t.Fatalf("%+v", r)
	}
	if before.Reason != "OPS-req_1" || r.Reason != Erased {
		t.Fatalf("the requester's reason %q is %q", before.Reason, r.Reason)
	}
	list, _, err := w.a.List(t.Context(), Filter{State: StateAll})
	ok(t, err)
	if len(list) != 1 || list[0].Decisions[0].Reason != Erased {
		t.Fatalf("%+v", list)
	}
}
