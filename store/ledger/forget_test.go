package ledger

import (
	"context"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func TestARefusedAppendForgetsNothingOnItsOwn(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		// an old keyed request, closed
		old := f.story("req_old", true)
		oi := old.issuing(1)
		f.append(l, old.requested(), oi)
		iss := old.issued(oi, 1)
		f.append(l, iss)
		f.append(l, old.closed(store.CredentialRevoked, oi, 1))
		// a pending one that others join
		f.advance(10 * time.Second)
		b := f.story("req_b", true)
		bi := b.issuing(1)
		f.append(l, b.requested(), bi)
		f.append(l, b.issued(bi, 1))
		f.advance(25 * time.Hour)
		// first append after the sweep is due is a refused one: a join
		jr := b.requested()
		jr.Request = "req_b2"
		jr.ID = store.NewID()
		if _, err := l.Append(context.Background(), broker, wire(t, jr)); !isOrder(err, store.OrderJoined) {
			t.Fatalf("want joined: %v", err)
		}
		// the same POST as old, anew
		n := f.story("req_old", true)
		nr := n.requested()
		nr.Request = "req_new"
		ni := n.issuing(1)
		ni.Request = "req_new"
		f.append(l, nr, ni)
		l.Close()
		twice := 0
		for k := 0; k < 20; k++ {
			l = f.open()
			again := n.requested()
			again.Request = store.NewID()
			again.ID = store.NewID()
			_, err := l.Append(context.Background(), broker, wire(t, again))
			if err == nil {
				twice++
				break
			}
			if !isOrder(err, store.OrderJoined) {
				t.Fatal(err)
			}
			if err := l.recheck(context.Background()); err != nil {
				t.Fatal(err)
			}
			l.Close()
		}
		if twice > 0 {
			t.Error("join held twice")
		}
	})
}
