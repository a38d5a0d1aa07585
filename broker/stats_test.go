package broker_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

func TestWhatIsBeingMintedLiveDueAndLateIsCounted(t *testing.T) {
	w := newWorld(t)
	n := w.start("broker-1")
	var minting int
	n.iss.set(func(i *tracing) {
		i.mint = func() error {
			// What is on record comes to the broker beside this.
			w.until("the intent is counted", func() bool { minting = n.Stats().Minting; return minting > 0 })
			return nil
		}
		i.revoke = func() error {
			return &issuer.StageError{Stage: "revoke-accessor", Err: fmt.Errorf("%w: Vault is sealed", issuer.ErrVaultUnavailable)}
		}
	})
	_, err := n.Request(t.Context(), demoCaller, ask(run1()))
	ok(t, err)
	counts := func(what string, live, due, late int) {
		t.Helper()
		w.until(what, func() bool {
			s := n.Stats()
			return s.Follows && s.Minting == 0 && s.Live["vault:demo-read"] == live && s.Due == due && s.Late == late && s.Freezes == due
		})
	}
	if minting != 1 {
		t.Errorf("%d intents were counted, want 1", minting)
	}
	counts("it is live", 1, 0, 0)
	w.freeze(store.FreezeDetails{All: true})
	counts("it is due", 1, 1, 0)
	w.clock.pass(61 * time.Second)
	counts("it is late", 1, 1, 1)
	n.iss.set(func(i *tracing) { i.revoke = nil })
	w.until("it is revoked", func() bool { return w.revokedAs(store.CauseFrozen) == 1 })
	w.until("nothing is due", func() bool {
		s := n.Stats()
		return s.Live["vault:demo-read"]+s.Due+s.Late == 0
	})
}
