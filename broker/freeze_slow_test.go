//go:build slow

package broker_test

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func TestFiveThousandLiveTokensAreGoneAfterAFreezeOfEverything(t *testing.T) {
	for _, brokers := range []int{1, 3} {
		t.Run(fmt.Sprint(brokers, " brokers"), func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			var nodes []*node
			for i := range brokers {
				nodes = append(nodes, w.start(fmt.Sprintf("broker-%d", i+1)))
			}
			run := run1()
			const many = 5000
			tokens := make([]string, many)
			var asking errgroup.Group
			asking.SetLimit(8)
			for i := range many {
				asking.Go(func() error {
					r, err := nodes[i%brokers].Request(t.Context(), demoCaller, ask(run, stepped(i), func(a *broker.Ask) { a.TTL = "15m" }))
					if err == nil {
						tokens[i] = r.Credential.Token
					}
					return err
				})
			}
			ok(t, asking.Wait())
			size := w.ledger.Size()
			began := time.Now()
			w.freeze(store.FreezeDetails{All: true})
			// Vault has ended each before it is on record.
			for w.ledger.Size() < size+1+many && time.Since(began) < time.Minute {
				time.Sleep(10 * time.Millisecond)
			}
			took := time.Since(began)
			for _, token := range tokens {
				if alive(t, token) {
					t.Fatal("Vault takes a token")
				}
			}
			if n := w.revokedAs(store.CauseFrozen); n != many {
				t.Fatalf("%d of %d on record", n, many)
			}
			t.Logf("%s, in %d appends", took, w.appends(store.CredentialRevoked)) // how fast it is `make bench` says
		})
	}
}
