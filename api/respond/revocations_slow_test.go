//go:build slow

package respond_test

import "testing"

func TestStoppingEverythingIsQuickAmongFiveThousandCredentialsAndAThousandFreezes(t *testing.T) {
	stopAmong(t, 5000, 1000)
}
