package evidence

import (
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// A recorder that was taken over writes what it likes; a passkey's signature it
// cannot write.
func TestADecisionThatNoPasskeySignedIsFoundInTheLogAlone(t *testing.T) {
	o, key, _ := stock(t)
	l, err := ledger.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	entry := func(typ store.Type, details any) *store.Submission {
		s := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: typ, WriterTime: store.At(time.Now()), Agent: "spiffe://evidence.example/orchestrator/demo/run/r/step/s",
			Orchestrator: "demo", Run: "r", Step: "s", Request: "req_1", Resource: "vault://x", Action: "vault:x",
			Decision: &store.Decision{Outcome: store.NeedsApproval, Policy: "sha256:00", Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "critical"},
		}}
		s.SetDetails(details)
		return s
	}
	put := func(recorder bool, subs ...*store.Submission) *store.Appended {
		t.Helper()
		var lines [][]byte
		for _, s := range subs {
			b, err := s.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			lines = append(lines, b)
		}
		a, err := l.Append(t.Context(), ledger.Author{Name: "writer", Recorder: recorder}, lines)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	grant := store.Grant{Scope: "vault:x", Target: "vault://x", Engine: "token", Policies: []string{"x"}, Params: map[string]string{}, TTL: store.Duration(time.Minute), Delivery: "direct"}
	rule := store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(time.Hour), Passkey: true}
	a := put(false, entry(store.StepRequested, store.RequestedDetails{Grant: grant, Join: "j", Body: "b"}),
		entry(store.ApprovalRequested, store.ApprovalRequestedDetails{Approval: "apr_1", Grant: grant, Rule: rule, Excluded: []string{}}))
	enrolled := entry(store.PasskeyEnrolled, store.EnrolledDetails{Credential: "c", Key: []byte("no key"), RPID: "localhost", Origin: "http://localhost", ProviderKey: []byte("{}")})
	enrolled.Person = store.Ptr("p-alice")
	active := entry(store.PasskeyActivated, store.ActivatedDetails{Enrolled: enrolled.ID, By: "p-bob"})
	active.Person = store.Ptr("p-alice")
	put(true, enrolled, active)
	forged := entry(store.ApprovalDecided, store.DecidedDetails{
		Approval: "apr_1", Requested: store.HashText(store.LeafHash(a.Entries[1].Leaf)), Decision: store.Approve, Groups: []string{"dba"}, Via: "page",
		Assertion: &store.Assertion{Enrolled: enrolled.ID, AuthenticatorData: make([]byte, 37), ClientData: []byte("{}"), Signature: []byte("nothing")},
	})
	forged.Person = store.Ptr("p-alice")
	at := put(true, forged).Entries[0].Index
	self := entry(store.PasskeyActivated, store.ActivatedDetails{Enrolled: enrolled.ID, By: "p-alice"})
	self.Person = store.Ptr("p-alice")
	own := put(true, self).Entries[0].Index
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	found := map[int64]bool{}
	for _, f := range check(t, o.Dir, key, "").Findings {
		if f.Kind != KindSignature {
			t.Errorf("%s", f)
		}
		found[f.Index] = true
	}
	if len(found) != 2 || !found[at] || !found[own] {
		t.Errorf("found %v, want a forged decision at %d and an activation by the owner at %d", found, at, own)
	}
}
