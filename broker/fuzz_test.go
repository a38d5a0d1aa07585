package broker

import (
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// FuzzIndex feeds the index entries of one request in any order and number,
// as a follower, an acknowledgement and a look at what is open may overlap.
func FuzzIndex(f *testing.F) {
	for _, s := range []string{"\x00\x01\x02\x03", "\x03\x02\x01\x00", "\x00\x01\x04\x00\x01\x02", "\x00\x01\x02\x03\x01\x02\x05", ""} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	types := []store.Type{store.StepRequested, store.CredentialIssuing, store.CredentialIssued, store.CredentialRevoked, store.CredentialFailed, store.CredentialExpired, store.RequestWithdrawn, store.StepFinished}
	f.Fuzz(func(t *testing.T, order []byte, keyed bool) {
		x := newIndex()
		now := time.Now()
		w := x.watch("req_1")
		defer w.stop()
		for at, c := range order {
			e := &store.Entry{Type: types[int(c)%len(types)], ID: "i", Time: store.At(now), Request: "req_1", Orchestrator: "o", Run: "r", Step: "s", Decision: &store.Decision{Outcome: store.Allow}}
			switch e.Type {
			case store.StepRequested:
				e.SetDetails(store.RequestedDetails{Join: "j", Keyed: keyed})
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
		x.merge(nil, int64(len(order)), now)
		if got, known := x.get("req_1"); known && (got.live || got.minting) {
			t.Fatal("what the recorder no longer names is still taken for open")
		}
		if n := len(x.step(stepKey{"o", "r", "s"})); n != 0 {
			t.Fatalf("%d requests of the step left", n)
		}
	})
}
