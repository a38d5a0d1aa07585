package issuer

import (
	"errors"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func TestATokenOfOneSecondIsMintedAndLivesNoLongerThanWasGranted(t *testing.T) {
	b := newBench(t, benchOptions{})
	for _, ttl := range []time.Duration{time.Second, 3 * time.Second} {
		m := b.mint(ask{scope: "vault:demo-read", ttl: ttl})
		if err := b.iss.Activate(t.Context(), m); err != nil {
			t.Fatalf("%s: %v", ttl, err)
		}
		got, err := b.root.Auth().Token().LookupAccessor(m.Issued.Accessor)
		if err != nil {
			t.Fatalf("%s: %v", ttl, err)
		}
		most, err := got.Data["explicit_max_ttl"].(interface{ Int64() (int64, error) }).Int64()
		if err != nil || time.Duration(most)*time.Second != ttl {
			t.Errorf("granted %s, Vault lets it live for %d s, %v", ttl, most, err)
		}
	}
}

func TestWithoutAVaultNothingIsSaidToBeRevokedBeforeItsTTLIsOver(t *testing.T) {
	now := time.Now()
	i := &Issuer{cfg: Config{Now: func() time.Time { return now }}}
	d := store.IssuedDetails{Kind: string(KindVaultToken), Revocable: true, Accessor: "a", Expires: store.At(now.Add(time.Minute))}
	if err := i.Revoke(t.Context(), d); !errors.Is(err, ErrVaultUnavailable) {
		t.Errorf("a live token: %v", err)
	}
	if err := i.Revoke(t.Context(), store.IssuedDetails{Kind: string(KindIdentity), Expires: d.Expires}); err != nil {
		t.Errorf("what Vault has no part in: %v", err)
	}
	now = now.Add(time.Minute)
	if err := i.Revoke(t.Context(), d); err != nil {
		t.Errorf("what its own TTL has ended: %v", err)
	}
}
