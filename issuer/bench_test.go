package issuer

import (
	"sync/atomic"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

// BenchmarkMint measures from a warrant to a credential, Activate included,
// beside the same number of calls made to Vault directly.
func BenchmarkMint(b *testing.B) {
	s := newBench(b, benchOptions{postgres: true})
	for _, scope := range []string{"identity:step", "vault:demo-read", "orders-db:read"} {
		b.Run(scope, func(b *testing.B) {
			warrants := make([]store.Warrant, b.N)
			for i := range warrants {
				warrants[i] = s.warrant(ask{scope: scope})
			}
			var next atomic.Int64
			b.SetParallelism(32) // per CPU
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					m, err := s.iss.Mint(b.Context(), warrants[next.Add(1)-1])
					if err != nil {
						b.Error(err)
						return
					}
					if err := s.iss.Activate(b.Context(), m); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
	b.Run("Vault alone, create and renew", func(b *testing.B) {
		c := s.vaultAs(s.brokerToken)
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				t, err := c.Logical().Write("auth/token/create/countersign-vault-demo-read", map[string]any{"ttl": "60s"})
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := c.Logical().Write("auth/token/renew-accessor", map[string]any{"accessor": t.Auth.Accessor}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}
