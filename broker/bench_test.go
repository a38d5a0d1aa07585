package broker_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/countersign-dev/countersign/broker"
)

// BenchmarkIdentity is the whole flow without HTTP: two durable appends and a
// signed token.
func BenchmarkIdentity(b *testing.B) {
	for _, callers := range []int{1, 32} {
		b.Run(fmt.Sprintf("%d callers", callers), func(b *testing.B) {
			w := newWorld(b)
			n := w.start("broker-1")
			run := run1()
			var i atomic.Int64
			b.SetParallelism(callers)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					id := i.Add(1)
					if _, err := n.Request(b.Context(), demoCaller, ask(run, func(a *broker.Ask) {
						a.Scope, a.Step, a.Body = "identity:step", fmt.Sprintf("s%d", id), []byte(`{}`)
					})); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
