//go:build slow

package postgres

import "testing"

func TestNoHiddenValueReachesTheClientIn10000Queries(t *testing.T) {
	for seed := range uint64(10) {
		canaries(t, 1000, 100+seed)
	}
}
