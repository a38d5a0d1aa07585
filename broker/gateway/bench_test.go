package gateway_test

import (
	"testing"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// BenchmarkUse is a use put on record in a ledger of this process, with its
// outcome: alone, and with 16 sessions at once.
func BenchmarkUse(b *testing.B) {
	use := gateway.Use{Use: "SELECT pgbench_accounts", Conn: "c1", Objects: []string{"public.pgbench_accounts"},
		Statement: "SELECT abalance FROM pgbench_accounts WHERE aid = 12345;"}
	for _, c := range []struct {
		name     string
		sessions int
	}{{"1", 1}, {"16", 16}, {"64", 64}} {
		b.Run(c.name, func(b *testing.B) {
			r := newRecorder(b)
			g := newGateway(b, r)
			work := make(chan struct{}, 1024)
			done := make(chan struct{})
			for range c.sessions {
				s, _ := open(b, g)
				go func() {
					defer func() { done <- struct{}{} }()
					for range work {
						p, err := s.Use(b.Context(), use)
						if err != nil {
							b.Error(err)
							return
						}
						p[0].Finish(store.UseOutcome{Status: "SELECT 1", Rows: 1, Received: 60}, "")
					}
				}()
			}
			b.ResetTimer()
			for range b.N {
				work <- struct{}{}
			}
			close(work)
			for range c.sessions {
				<-done
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/float64(r.n.Load()), "uses/append")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "uses/s")
		})
	}
}
