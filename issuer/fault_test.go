package issuer

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
)

const planted = "hvs.PLANTED-SECRET"

// faults are what can go wrong with a call.
var faults = []struct {
	name  string
	fault vaulttest.Fault
	want  error
}{
	{"answers 403", vaulttest.Fault{Status: http.StatusForbidden, Body: `{"errors":["1 error occurred: permission denied ` + planted + `"]}`}, ErrVaultRefused},
	{"answers 400", vaulttest.Fault{Status: http.StatusBadRequest, Body: `{"errors":["` + planted + `"]}`}, ErrVaultRefused},
	{"answers 404", vaulttest.Fault{Status: http.StatusNotFound, Body: `{"errors":[]}`}, ErrVaultRefused},
	{"answers 500", vaulttest.Fault{Status: http.StatusInternalServerError, Body: `{"errors":["internal error ` + planted + `"]}`}, ErrVaultUnavailable},
	{"is sealed", vaulttest.Fault{Status: http.StatusServiceUnavailable, Body: `{"errors":["Vault is sealed"]}`}, ErrVaultUnavailable},
	{"is overloaded", vaulttest.Fault{Status: http.StatusTooManyRequests, Body: `{"errors":["rate limit quota exceeded"]}`}, ErrVaultUnavailable},
	{"answers no JSON", vaulttest.Fault{Status: http.StatusOK, Body: "<" + planted + ">"}, ErrVaultUnavailable},
	{"answers an empty object", vaulttest.Fault{Status: http.StatusOK, Body: "{}"}, ErrVaultRefused},
	{"does not answer", vaulttest.Fault{Hang: true}, ErrVaultUnavailable},
	{"closes the connection", vaulttest.Fault{Break: true}, ErrVaultUnavailable},
	{"does it, and its answer is lost", vaulttest.Fault{Lose: true}, ErrVaultUnavailable},
}

const moreScopes = `
  - name: orders-db:wrapped
    target: postgres://orders
    sensitivity: low
    max_ttl: 15m
    ask: ["*"]
    engine: database
    vault: {mount: database, role: orders-read}
    connection: {host: localhost, port: 5432, database: postgres}
    delivery: [wrapped]
  - name: any:path
    target: database
    sensitivity: low
    max_ttl: 15m
    ask: ["*"]
    engine: path
    vault: {path: database/creds/orders-read, method: read}
`

func TestWhateverFailsWithinAMintLeavesNoLiveTokenBeyondTheFirstTTL(t *testing.T) {
	t.Parallel()
	var proxy *vaulttest.Proxy
	b := newBench(t, benchOptions{postgres: true, change: func(c *Config) {
		proxy = vaulttest.NewProxy(t, c.Addr)
		c.Addr, c.FirstTTL, c.CallTimeout = proxy.Addr, 2*time.Second, time.Second
	}})
	for _, call := range []struct {
		name, on, stage string
		ask             ask
	}{
		{"the child of a token scope", "auth/token/create/", stageCreate, ask{scope: "vault:demo-read"}},
		{"the child of a wrapped token scope", "auth/token/create/", stageCreate, ask{scope: "vault:demo-read", delivery: "wrapped"}},
		{"the child of a database scope", "auth/token/create/", stageCreate, ask{scope: "orders-db:read"}},
		{"the database role", "database/creds/", stageSecret, ask{scope: "orders-db:read"}},
		{"the certificate", "pki/issue/", stageSecret, ask{scope: "pki:service"}},
		{"the wrapped certificate", "pki/issue/", stageSecret, ask{scope: "pki:service", delivery: "wrapped"}},
		{"the signature", "ssh/sign/", stageSecret, ask{scope: "ssh:deploy", publicKey: sshKey(t)}},
		{"the end of the child", "auth/token/revoke-accessor", stageDrop, ask{scope: "pki:service"}},
	} {
		for _, f := range faults {
			if call.stage == stageDrop && (f.fault.Status == http.StatusOK || f.fault.Lose) {
				continue // the child has been ended, or Vault says so
			}
			t.Run(call.name+" when Vault "+f.name, func(t *testing.T) {
				w := b.warrant(call.ask)
				fault := f.fault
				fault.On = call.on
				proxy.Set(fault)
				m, err := b.iss.Mint(t.Context(), w)
				proxy.Set(vaulttest.Fault{})
				want := f.want
				if call.stage == stageDrop && f.fault.Status == http.StatusNotFound {
					want = nil
				}
				if want != nil && (m != nil || !errors.Is(err, want)) {
					t.Fatalf("got %v, %v; want %v", m, err, want)
				}
				if want == nil {
					return
				}
				if s := Stage(err); s != call.stage && s != stageReply {
					t.Errorf("stage %q, want %q", s, call.stage)
				}
				if strings.Contains(err.Error(), planted) || strings.Contains(err.Error(), b.brokerToken) {
					t.Errorf("the error quotes Vault: %v", err)
				}
			})
		}
	}
	// The bounds are the first TTL and a little for Vault's own clock work.
	until(t, 6*time.Second, "no live child, no database role", func() bool { return len(b.live()) == 0 && len(b.roles(t)) == 0 })
}

// roles returns the database roles that Vault made.
func (b *bench) roles(t testing.TB) []string {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), b.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(context.Background(), `SELECT rolname::text FROM pg_roles WHERE rolname LIKE 'v-%'`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestACredentialThatIsNeverActivatedDiesWithItsDatabaseRole(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{postgres: true, change: func(c *Config) { c.FirstTTL = 3 * time.Second }})
	m := b.mint(ask{scope: "orders-db:read", ttl: 10 * time.Minute})
	kept := b.mint(ask{scope: "orders-db:read", ttl: 10 * time.Minute})
	if err := b.iss.Activate(t.Context(), kept); err != nil {
		t.Fatal(err)
	}
	conn, err := b.database(m.Credential)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	// As after a crash: nobody calls Activate, Discard or Revoke.
	until(t, 8*time.Second, "the child and its role are gone, the other's stay", func() bool {
		return len(b.live()) == 1 && len(b.roles(t)) == 1
	})
	if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("the session outlived its role")
	}
	if c, err := b.database(kept.Credential); err != nil {
		t.Errorf("the activated credential does not work: %v", err)
	} else {
		c.Close(t.Context())
	}
}

func TestRevocationSaysWhenItDidNotHappen(t *testing.T) {
	t.Parallel()
	var proxy *vaulttest.Proxy
	b := newBench(t, benchOptions{change: func(c *Config) {
		proxy = vaulttest.NewProxy(t, c.Addr)
		c.Addr, c.CallTimeout = proxy.Addr, time.Second
	}})
	m := b.mint(ask{scope: "vault:demo-read"})
	for _, f := range faults {
		if f.fault.Status == http.StatusOK || f.fault.Status == http.StatusNotFound || f.fault.Lose {
			continue
		}
		for _, on := range []string{"auth/token/renew-accessor", "auth/token/revoke-accessor"} {
			fault := f.fault
			fault.On = on
			proxy.Set(fault)
			err := b.iss.Revoke(t.Context(), m.Issued)
			if on == "auth/token/renew-accessor" {
				err = b.iss.Activate(t.Context(), m)
			}
			if !errors.Is(err, f.want) || strings.Contains(err.Error(), planted) || Stage(err) == "" {
				t.Errorf("%s %s: %v, want %v", on, f.name, err, f.want)
			}
			proxy.Set(vaulttest.Fault{})
			m = b.mint(ask{scope: "vault:demo-read"})
		}
	}
	if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
		t.Fatal(err)
	}
	if err := b.iss.Activate(t.Context(), m); !errors.Is(err, ErrVaultRefused) {
		t.Errorf("a revoked credential was renewed: %v", err)
	}
}

func TestATokenThatOthersAreRevokingCountsAsRevoked(t *testing.T) {
	t.Parallel()
	var proxy *vaulttest.Proxy
	b := newBench(t, benchOptions{change: func(c *Config) {
		proxy = vaulttest.NewProxy(t, c.Addr)
		c.Addr = proxy.Addr
	}})
	for range 20 {
		m := b.mint(ask{scope: "vault:demo-read"})
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	if live := b.live(); len(live) != 0 {
		t.Errorf("alive after it: %q", live)
	}
	// What Vault answers while another call is at it, however the calls above fell.
	m := b.mint(ask{scope: "vault:demo-read"})
	proxy.Set(vaulttest.Fault{On: "auth/token/revoke-accessor", Status: http.StatusBadRequest, Body: `{"errors":["1 error occurred:\n\t* token not found\n\n"]}`})
	if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
		t.Error(err)
	}
}

func TestALeaseThatItsTargetCannotEndIsNotCalledEnded(t *testing.T) {
	b := newBench(t, benchOptions{postgres: true})
	m := b.mint(ask{scope: "orders-db:read"})
	admin, err := pgx.Connect(t.Context(), b.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	owner := func(role string) {
		t.Helper()
		if _, err := admin.Exec(t.Context(), `ALTER TABLE orders OWNER TO `+pgx.Identifier{role}.Sanitize()); err != nil {
			t.Fatal(err)
		}
	}
	owner(m.Credential.Username) // a role that owns a table cannot be dropped
	if err := b.iss.Revoke(t.Context(), m.Issued); !errors.Is(err, ErrVaultUnavailable) || Stage(err) != stageLease {
		t.Fatal(err)
	}
	if live := b.live(); len(live) != 0 {
		t.Errorf("the token is left: %q", live)
	}
	owner("postgres")
	if err := b.iss.Revoke(t.Context(), m.Issued); err != nil || len(b.roles(t)) != 0 {
		t.Errorf("%v, left %q", err, b.roles(t))
	}
}

func TestASealedOrStoppedVaultIsUnavailable(t *testing.T) {
	b := newBench(t, benchOptions{})
	m := b.mint(ask{scope: "vault:demo-read"})
	check := func(state string) {
		_, mint := b.iss.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"}))
		_, capabilities := b.iss.CheckCapabilities(t.Context())
		for call, err := range map[string]error{
			"mint": mint, "activate": b.iss.Activate(t.Context(), m), "revoke": b.iss.Revoke(t.Context(), m.Issued),
			"ping": b.iss.Ping(t.Context()), "capabilities": capabilities,
		} {
			if !errors.Is(err, ErrVaultUnavailable) || Stage(err) == "" {
				t.Errorf("%s of a %s Vault: %v", call, state, err)
			}
		}
	}
	if err := b.root.Sys().Seal(); err != nil {
		t.Fatal(err)
	}
	check("sealed")
	b.vlt.Stop()
	check("stopped")
	if m, err := b.iss.Mint(t.Context(), b.warrant(ask{scope: "identity:step"})); err != nil || m.Credential.Token == "" {
		t.Errorf("an identity token needs no Vault: %v", err)
	}
}

func TestAWrappedSecretIsUnwrappedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{postgres: true, catalogue: withoutApprovals(string(scopes.Demo(nil))) + moreScopes, change: func(c *Config) { c.FirstTTL = 5 * time.Second }})
	for _, tt := range []struct {
		ask       ask
		revocable bool
		check     func(t *testing.T, data map[string]any, token string)
	}{
		{ask{scope: "vault:demo-read", delivery: "wrapped"}, true, func(t *testing.T, _ map[string]any, token string) {
			if _, err := b.vaultAs(token).Logical().Read("secret/data/demo"); err != nil {
				t.Error(err)
			}
		}},
		{ask{scope: "orders-db:wrapped", delivery: "wrapped"}, true, func(t *testing.T, data map[string]any, _ string) {
			if data["username"] == nil || len(b.roles(t)) != 1 {
				t.Errorf("no role: %d, %q", len(data), b.roles(t))
			}
		}},
		{ask{scope: "pki:service", delivery: "wrapped"}, false, func(t *testing.T, data map[string]any, _ string) {
			parseCert(t, data["certificate"].(string))
		}},
	} {
		t.Run(tt.ask.scope, func(t *testing.T) {
			m := b.mint(tt.ask)
			if err := b.iss.Activate(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			c := m.Credential
			if c.Kind != KindWrapped || m.Issued.Kind != "wrapped" || c.Revocable != tt.revocable || m.Issued.WrappingAccessor == "" || c.Token+c.Password+c.PrivateKey != "" {
				t.Fatalf("issued %+v", m.Issued)
			}
			s, err := b.vaultAs("").Logical().Unwrap(c.WrappingToken)
			if err != nil {
				t.Fatal(err)
			}
			token := ""
			if s.Auth != nil {
				token = s.Auth.ClientToken
			}
			tt.check(t, s.Data, token)
			if _, err := b.vaultAs("").Logical().Unwrap(c.WrappingToken); err == nil {
				t.Error("unwrapped twice")
			}
			if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
				t.Error(err)
			}
			// The lease of a wrapped secret is Vault's to end, just after its token.
			until(t, 5*time.Second, "nothing is left", func() bool { return len(b.live()) == 0 && len(b.roles(t)) == 0 })
		})
	}
	t.Run("revoked before it is unwrapped", func(t *testing.T) {
		m := b.mint(ask{scope: "vault:demo-read", delivery: "wrapped"})
		if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
			t.Fatal(err)
		}
		if _, err := b.vaultAs("").Logical().Unwrap(m.Credential.WrappingToken); err == nil {
			t.Error("unwrapped after its revocation")
		}
	})
	t.Run("any path", func(t *testing.T) {
		m := b.mint(ask{scope: "any:path"})
		if m.Issued.LeaseID == "" || !strings.Contains(string(m.Credential.Data), `"password"`) {
			t.Errorf("issued %+v", m.Issued)
		}
		if err := b.iss.Revoke(t.Context(), m.Issued); err != nil || len(b.roles(t)) != 0 {
			t.Errorf("%v, %q", err, b.roles(t))
		}
	})
}
