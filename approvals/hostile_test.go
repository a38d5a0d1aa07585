package approvals

import (
	"context"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func TestAnApprovalExpiresWhateverGraceTheLedgerHas(t *testing.T) {
	w := newWorld(t)
	w.stop()
	w.o.Grace = 2 * time.Second
	w.start()
	id := w.ask("app:write")
	_, err := w.a.Decide(t.Context(), Person{Name: "user:zed", Groups: []string{"dba"}}, id, approve("ok"))
	ok(t, err)
	r := w.get(id)
	in := w.issuing(r)
	ok(t, w.append(ledger.Author{Name: "broker-1"}, in))
	w.advance(3 * time.Second)
	ab := w.a.about(store.CredentialAbandoned, r.Scope, r)
	ab.SetDetails(store.ClosedDetails{Intent: in.ID, Attempt: 1})
	ok(t, w.append(ledger.Author{Name: "broker-2"}, ab))
	w.advance(2 * time.Hour)
	for end := time.Now().Add(30 * time.Second); w.get(id).Status != store.StatusExpired; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never expires: %s", w.get(id).Status)
		}
	}
}

func TestWhatStandsBesideTheGrantIsWhatTheCatalogueSays(t *testing.T) {
	w := newWorld(t)
	x := w.asking("app:admin")
	x.asked.Resource = "app://harmless"
	x.asked.Risk = &store.Risk{Sensitivity: "low"}
	x.asked.Agent = "spiffe://example.test/orchestrator/demo/run/other/step/other"
	if err := w.send(x); err == nil {
		r := w.get(x.ad.Approval)
		t.Errorf("taken; the page says target %s (grant %s), sensitivity %s, agent %s", r.Target, r.Grant.Target, r.Sensitivity, r.Agent)
	}
}

func TestWhatIsOnRecordIsAnsweredAfterTheCatalogueChanged(t *testing.T) {
	w := newWorld(t)
	x := w.asking("app:write")
	ok(t, w.send(x))
	// catalogue changes, the answer was lost, same bytes again
	gate := Gate(scopes.Static(func() *scopes.Set {
		s, err := scopes.Parse("c.yaml", []byte(`
scopes:
  - {name: "app:read", target: "app://a", sensitivity: low, max_ttl: 15m, ask: ["*"], engine: token, vault: {policies: [{path: app/a, capabilities: [read]}]}}
`), "", nil)
		ok(t, err)
		return s
	}()), nil, key)
	w.stop()
	w.o.Gate = gate
	var err error
	w.ledger, err = ledger.Open(context.Background(), w.o)
	ok(t, err)
	w.people()
	if err := w.send(x); err != nil {
		t.Error("on record, and the same bytes again are refused:", err)
	}
}

func TestNobodyDecidesForThemselvesInAnotherSpelling(t *testing.T) {
	for _, subject := range []string{"user:ada", "ada", "User:Ada", "USER:ADA", " user: ada", "user:ada@example.com", "user:ada\u200b", "ada\u00a0"} {
		if !same(subject, "user:ada") {
			t.Errorf("%q is not taken for user:ada", subject)
		}
	}
	if !same("user:anne\u2010marie", "user:anne-marie") {
		t.Error("another hyphen makes another person")
	}
	for _, subject := range []string{"", "user:", "user:adam", "user:ad", "@example.com"} {
		if same(subject, "user:ada") {
			t.Errorf("%q is taken for user:ada", subject)
		}
	}
	w := newWorld(t)
	x := w.asking("app:write")
	x.asked.Subject = &store.Subject{ID: key.Pseudonym("Zed@Example.com")}
	x.asked.Seal(store.SealedSubject, "Zed@Example.com")
	ok(t, w.send(x))
	_, err := w.a.Decide(t.Context(), Person{Name: "user:zed", Groups: []string{"dba"}}, x.ad.Approval, approve("mine"))
	if _, self := store.IsOrder(err, store.OrderSelf); !self {
		t.Fatalf("a person approves what is for them: %v", err)
	}
}
