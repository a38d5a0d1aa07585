package issuer

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

func TestWithoutAWarrantNothingReachesVault(t *testing.T) {
	// The demo as it is: with scopes that need approval.
	var proxy *vaulttest.Proxy
	b := newBench(t, benchOptions{catalogue: string(scopes.Demo(nil)), change: func(c *Config) {
		proxy = vaulttest.NewProxy(t, c.Addr)
		c.Addr = proxy.Addr
	}})
	other := newTestLog(t)
	good := func() store.Warrant { return b.warrant(ask{scope: "vault:demo-read"}) }
	changed := func(f func(req, intent *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails)) func() store.Warrant {
		return func() store.Warrant { return b.warrant(ask{scope: "vault:demo-read", change: f}) }
	}

	tests := []struct {
		name    string
		warrant func() store.Warrant
		want    string
	}{
		{"none at all", func() store.Warrant { return store.Warrant{} }, "receipt"},
		{"an intent that is not on record", func() store.Warrant {
			w := good()
			w.Intent = store.Receipt{}
			return w
		}, "receipt"},
		{"a receipt of another log", func() store.Warrant {
			a := other.append(b.entries(ask{scope: "vault:demo-read"}))
			return store.Warrant{Request: a.Receipt(0), Intent: a.Receipt(1)}
		}, "checkpoint"},
		{"a forged leaf", func() store.Warrant {
			w := good()
			w.Intent.Leaf = []byte(strings.Replace(string(w.Intent.Leaf), "step-1", "step-2", 1))
			return w
		}, "does not verify"},
		{"a proof of another leaf", func() store.Warrant {
			w := good()
			w.Intent.Proof = w.Request.Proof
			return w
		}, "does not verify"},
		{"a checkpoint with another head", func() store.Warrant {
			w := good()
			w.Intent.Checkpoint = strings.Replace(w.Intent.Checkpoint, "\n", "\n1", 1)
			return w
		}, "checkpoint"},
		{"the intent of another request", func() store.Warrant {
			w := good()
			w.Intent = good().Intent
			return w
		}, "another request"},
		{"a request in the place of the intent", func() store.Warrant {
			w := good()
			w.Intent = w.Request
			return w
		}, "not credential.issuing"},
		{"an intent ahead of its request", func() store.Warrant {
			request, intent := b.entries(ask{scope: "vault:demo-read"})
			a := b.log.append(intent, request)
			return store.Warrant{Request: a.Receipt(1), Intent: a.Receipt(0)}
		}, "precedes"},
		{"a denial", changed(func(req, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			req.Decision = &store.Decision{Outcome: store.Deny, Policy: req.Decision.Policy}
		}), "not allowed"},
		{"an intent without a decision", changed(func(_, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			intent.Decision = nil
		}), "no decision"},
		{"an old intent", changed(func(req, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			req.Time, intent.Time = store.At(time.Now().Add(-time.Minute)), store.At(time.Now().Add(-time.Minute))
		}), "old"},
		{"an intent from before the start", changed(func(req, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			at := store.At(b.iss.started.Add(-time.Millisecond))
			req.Time, intent.Time = at, at
		}), "older than this issuer"},
		{"an intent from the future", changed(func(req, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			req.Time, intent.Time = store.At(time.Now().Add(time.Minute)), store.At(time.Now().Add(time.Minute))
		}), "future"},
		{"another policy", changed(func(_, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			intent.Decision = &store.Decision{Outcome: store.Allow, Policy: "sha256:00"}
		}), "in force is"},
		{"another grant than was requested", changed(func(_, _ *store.Entry, _ *store.RequestedDetails, i *store.IssuingDetails) {
			i.Grant = "sha256:00"
		}), "other than what was requested"},
		{"a grant with a wider policy", changed(func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			d.Grant.Policies = []string{"countersign-vault-demo-admin"}
			i.Grant = d.Grant.Digest()
		}), "another grant"},
		{"a grant of another role", changed(func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			d.Grant.Role = "../create-orphan"
			i.Grant = d.Grant.Digest()
		}), "another grant"},
		{"a grant with a path it has no need of", changed(func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			d.Grant.Path, d.Grant.Method = "secret/data/other", "read"
			i.Grant = d.Grant.Digest()
		}), "another grant"},
		{"a grant longer than the scope's ceiling", changed(func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			d.Grant.TTL = store.Duration(24 * time.Hour)
			i.Grant = d.Grant.Digest()
		}), "does not give this grant"},
		{"an end later than the grant's", changed(func(_, _ *store.Entry, _ *store.RequestedDetails, i *store.IssuingDetails) {
			i.NotPast = store.At(i.NotPast.Add(time.Hour))
		}), "compare the clocks"},
		{"an end that has passed", changed(func(_, _ *store.Entry, _ *store.RequestedDetails, i *store.IssuingDetails) {
			i.NotPast = store.At(time.Now().Add(-time.Second))
		}), "ended already"},
		{"a scope that is not in the catalogue", changed(func(req, intent *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			req.Action, intent.Action, d.Grant.Scope = "vault:other", "vault:other", "vault:other"
			i.Grant = d.Grant.Digest()
		}), "not in the issuer's catalogue"},
		{"a grant of another scope than the entries name", changed(func(_, _ *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails) {
			d.Grant.Scope = "vault:demo-admin"
			i.Grant = d.Grant.Digest()
		}), "the grant is of scope"},
		{"a step with a path in its name", changed(func(req, intent *store.Entry, _ *store.RequestedDetails, _ *store.IssuingDetails) {
			req.Step, intent.Step = "../admin", "../admin"
		}), "not a valid ID"},
		{"a scope that needs approval", func() store.Warrant { return b.warrant(ask{scope: "vault:demo-admin"}) }, "needs more approval"},
	}
	proxy.Seen() // the login
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := b.iss.Mint(t.Context(), tt.warrant())
			if m != nil || !errors.Is(err, store.ErrWarrant) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, %v; want an error that says %q", m, err, tt.want)
			}
			if Stage(err) == "" {
				t.Error("the error names no stage")
			}
		})
	}
	for _, seen := range proxy.Seen() {
		if !strings.HasSuffix(seen, "auth/token/renew-self") { // the login's own, on its own time
			t.Fatalf("reached Vault: %q", seen)
		}
	}
	// And the good one does, so that the silence above means something.
	if _, err := b.iss.Mint(t.Context(), good()); err != nil {
		t.Fatal(err)
	}
	if seen := proxy.Seen(); len(seen) != 1 {
		t.Fatalf("reached Vault: %q", seen)
	}
}

func TestAnOrchestratorThatMayNotAskIsNotMintedFor(t *testing.T) {
	b := newBench(t, benchOptions{catalogue: strings.ReplaceAll(string(scopes.Demo(nil)), `ask: ["*"]`, `ask: ["billing-*"]`)})
	_, err := b.iss.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"}))
	if !errors.Is(err, store.ErrWarrant) || !strings.Contains(err.Error(), "may not ask") {
		t.Fatal(err)
	}
}

func TestAnIntentIsMintedOnceHoweverOftenItIsShown(t *testing.T) {
	b := newBench(t, benchOptions{})
	w := b.warrant(ask{scope: "vault:demo-read"})
	var minted, refused atomic.Int32
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			_, err := b.iss.Mint(t.Context(), w)
			switch {
			case err == nil:
				minted.Add(1)
			case errors.Is(err, store.ErrWarrant) && strings.Contains(err.Error(), "spent"):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if minted.Load() != 1 || refused.Load() != 63 || len(b.live()) != 1 {
		t.Fatalf("%d minted, %d refused, live %q", minted.Load(), refused.Load(), b.live())
	}
}

func TestClocksThatDifferLengthenNothing(t *testing.T) {
	b := newBench(t, benchOptions{})
	m := b.mint(ask{scope: "vault:demo-read", ttl: 5 * time.Minute, change: func(_, _ *store.Entry, _ *store.RequestedDetails, i *store.IssuingDetails) {
		i.NotPast = store.At(i.NotPast.Add(10 * time.Second)) // by a broker whose clock is ahead
	}})
	if m.Issued.Expires.After(time.Now().Add(5 * time.Minute)) {
		t.Errorf("ends %s from now", time.Until(m.Issued.Expires.Time))
	}
	// A retry has the end of what it replaces.
	short := b.mint(ask{scope: "vault:demo-read", ttl: 5 * time.Minute, change: func(_, _ *store.Entry, _ *store.RequestedDetails, i *store.IssuingDetails) {
		i.Attempt, i.NotPast = 2, store.At(time.Now().Add(20*time.Second))
	}})
	if err := b.iss.Activate(t.Context(), short); err != nil {
		t.Fatal(err)
	}
	got, err := b.root.Auth().Token().LookupAccessor(short.Issued.Accessor)
	if err != nil {
		t.Fatal(err)
	}
	if ttl, err := got.TokenTTL(); err != nil || ttl > 20*time.Second || ttl < 15*time.Second {
		t.Errorf("lives for %s, %v", ttl, err)
	}
}

func TestACallerThatHasGoneLeavesNothing(t *testing.T) {
	b := newBench(t, benchOptions{})
	m := b.mint(ask{scope: "vault:demo-read"})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.iss.Discard(gone, m); err != nil {
		t.Error(err)
	}
	if _, err := b.iss.Mint(gone, b.warrant(ask{scope: "pki:service"})); !errors.Is(err, ErrVaultUnavailable) {
		t.Error(err)
	}
	if live := b.live(); len(live) != 0 {
		t.Errorf("live: %q", live)
	}
}

func TestSpentIntentsAreForgottenOnlyWhenTheirReceiptsAreTooOld(t *testing.T) {
	var s spent
	now := time.Now()
	if !s.claim("a", now.Add(store.MaxIntentAge), now) || s.claim("a", now.Add(store.MaxIntentAge), now.Add(store.MaxIntentAge)) {
		t.Fatal("claimed twice within its age")
	}
	s.claim("b", now.Add(10*store.MaxIntentAge), now.Add(10*store.MaxIntentAge))
	if len(s.until) != 1 {
		t.Fatalf("%d kept", len(s.until))
	}
}
