package broker

import (
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// FuzzIndex feeds the index entries of one request in any order and number,
// as a follower, an acknowledgement and a look at what is open may overlap.
func FuzzIndex(f *testing.F) {
	for _, s := range []string{"\x00\x01\x02\x03", "\x03\x02\x01\x00", "\x00\x01\x04\x00\x01\x02", "\x00\x01\x02\x03\x01\x02\x05", "Z", "ZF\x01\x07\x08\x09", "ZF\x02\x07\x08\x09", "ZFG", "ZF\x03", ""} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	types := []store.Type{store.ApprovalRequested, store.ApprovalDecided, store.ApprovalStanding, store.ApprovalExpired, store.RequestVoid, store.CredentialAbandoned, store.StepRequested, store.CredentialIssuing, store.CredentialIssued, store.CredentialRevoked, store.CredentialFailed, store.CredentialExpired, store.RequestWithdrawn, store.StepFinished}
	f.Fuzz(func(t *testing.T, order []byte, keyed bool) {
		x := newIndex()
		now := time.Now()
		w := x.watch("req_1")
		defer w.stop()
		for at, c := range order {
			e := &store.Entry{Type: types[int(c)%len(types)], ID: "i", Time: store.At(now), Request: "req_1", Orchestrator: "o", Run: "r", Step: "s", Person: store.Ptr("p-1"), Decision: &store.Decision{Outcome: store.Allow}}
			if c&64 != 0 {
				e.Decision.Outcome = store.NeedsApproval
			}
			switch e.Type {
			case store.StepRequested:
				e.SetDetails(store.RequestedDetails{Join: "j", Keyed: keyed})
			case store.ApprovalRequested:
				e.SetDetails(store.ApprovalRequestedDetails{Rule: store.Rule{Groups: []store.RuleGroup{{Group: "g", Count: 1}}}})
			case store.ApprovalDecided:
				e.SetDetails(store.DecidedDetails{Decision: []string{store.Approve, store.Refuse}[c>>5&1], Groups: []string{"g"}})
			case store.ApprovalStanding:
				e.SetDetails(store.DecidedDetails{Decision: store.Approve, Groups: []string{"g"}, Standing: &store.StandingTerms{Uses: 1, Until: store.At(now.Add(time.Hour))}})
			case store.CredentialIssuing:
				e.SetDetails(store.IssuingDetails{Attempt: 1})
			case store.CredentialIssued:
				e.SetDetails(store.IssuedDetails{Intent: "i", Attempt: 1, Serial: "jti", Revocable: true, Expires: store.At(now)})
			}
			x.apply(placed{e, int64(at)})
			x.apply(placed{e, int64(at)}) // twice is once
			if c > 128 {
				x.passed(int64(at))
			}
		}
		got, known := x.get("req_1")
		if len(x.step(stepKey{"o", "r", "s"})) > 1 || len(x.waiting) != 1 {
			t.Fatal("one request stands in the index more than once")
		}
		if _, ok := x.serial("jti"); ok && (!known || !got.live) {
			t.Fatal("a token that is not live is known as live")
		}
		for _, id := range x.merge(nil, int64(len(order)), now) {
			x.vanish(id, now)
		}
		if got, known := x.get("req_1"); known && (got.live || got.minting) {
			t.Fatal("what the recorder no longer names is still taken for open")
		}
		x.forget(now.Add(48 * time.Hour))
		x.passed(int64(len(order)))
		if len(x.requests)+len(x.joins)+len(x.standing) != 0 {
			t.Fatalf("after two days there are still %d requests, %d joins, %d standing approvals", len(x.requests), len(x.joins), len(x.standing))
		}
		if n := len(x.step(stepKey{"o", "r", "s"})); n != 0 {
			t.Fatalf("%d requests of the step left", n)
		}
	})
}
