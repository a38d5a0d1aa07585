package issuer

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// appRole enables AppRole and returns a login whose tokens live for ttl, and
// with renewal for most at most.
func (b *bench) appRole(ttl, most time.Duration) Login {
	b.t.Helper()
	if err := b.root.Sys().EnableAuth("approle", "approle", ""); err != nil {
		b.t.Fatal(err)
	}
	v := b.root.Logical()
	if _, err := v.Write("auth/approle/role/countersign", map[string]any{
		"token_policies": "countersign-broker", "token_no_default_policy": true, "token_ttl": ttl.String(), "token_max_ttl": most.String(),
	}); err != nil {
		b.t.Fatal(err)
	}
	role, err := v.Read("auth/approle/role/countersign/role-id")
	if err != nil {
		b.t.Fatal(err)
	}
	secret, err := v.Write("auth/approle/role/countersign/secret-id", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return Login{AppRole: &AppRole{RoleID: role.Data["role_id"].(string), SecretID: secret.Data["secret_id"].(string)}}
}

func TestAnAppRoleLoginIsRenewedAndThenMadeAnew(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{})
	cfg := b.cfg
	cfg.Login = b.appRole(2*time.Second, 5*time.Second)
	core, logs := observer.New(zap.InfoLevel)
	cfg.Logger = zap.New(core)
	i := b.issuer(cfg)
	first := i.client.Token()
	lookup := func(token string) error { _, err := b.vaultAs(token).Auth().Token().LookupSelf(); return err }

	until(t, 20*time.Second, "another login", func() bool { return i.client.Token() != first })
	if missing, err := i.CheckCapabilities(t.Context()); err != nil || len(missing) > 0 {
		t.Errorf("missing %v, %v", missing, err)
	}
	until(t, 10*time.Second, "the first token is gone", func() bool { return lookup(first) != nil })
	m, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"}))
	if err != nil {
		t.Fatal(err)
	}
	// What was minted under the first login outlives it, being an orphan.
	if err := i.Activate(t.Context(), m); err != nil {
		t.Error(err)
	}
	for _, e := range logs.All() {
		if line := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(line, cfg.Login.AppRole.SecretID) || strings.Contains(line, first) {
			t.Errorf("logged a secret: %s", e.Message)
		}
	}
}

func TestALoginThatVaultHasForgottenIsMadeAnewAtTheNextRefusal(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{})
	cfg := b.cfg
	cfg.Login = b.appRole(time.Hour, time.Hour)
	i := b.issuer(cfg)
	if err := b.root.Auth().Token().RevokeTree(i.client.Token()); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"})); !errors.Is(err, ErrVaultRefused) || Stage(err) != stageCreate {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "minting again", func() bool {
		_, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"}))
		return err == nil
	})
}

func TestATokenFileIsReadAgainWhenItsTokenIsRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{})
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(b.brokerToken)
	cfg := b.cfg
	cfg.Login = Login{TokenFile: file}
	i := b.issuer(cfg)
	if err := b.root.Auth().Token().RevokeTree(b.brokerToken); err != nil {
		t.Fatal(err)
	}
	write(b.root.Token())
	until(t, 10*time.Second, "the new token is taken up", func() bool { return i.Ping(t.Context()) == nil })
}

func TestALoginThatFailsSaysWhyAndNothingSecret(t *testing.T) {
	b := newBench(t, benchOptions{})
	good := b.appRole(time.Hour, time.Hour)
	for name, tt := range map[string]struct {
		login Login
		addr  string
		want  string
		is    error
	}{
		"none":             {Login{}, "", "exactly one", nil},
		"two":              {Login{Token: planted, TokenFile: "x"}, "", "exactly one", nil},
		"a wrong token":    {Login{Token: planted}, "", "permission denied", ErrVaultRefused},
		"a wrong secret":   {Login{AppRole: &AppRole{RoleID: good.AppRole.RoleID, SecretID: planted}}, "", "secret ID", ErrVaultRefused},
		"a wrong mount":    {Login{AppRole: &AppRole{RoleID: planted, SecretID: planted, Mount: "elsewhere"}}, "", "", ErrVaultRefused},
		"a missing file":   {Login{TokenFile: filepath.Join(t.TempDir(), "none")}, "", "no such file", nil},
		"nobody listening": {Login{Token: planted}, "http://127.0.0.1:1", "refused", ErrVaultUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := b.cfg
			cfg.Login = tt.login
			if tt.addr != "" {
				cfg.Addr = tt.addr
			}
			_, err := New(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), planted) || (tt.is != nil && !errors.Is(err, tt.is)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if s := fmt.Sprintf("%v %+v %#v %s %d", good, good, good, good, good); strings.Contains(s, good.AppRole.SecretID) {
		t.Error("a login prints its secret")
	}
}

func TestNothingIsTakenFromTheEnvironment(t *testing.T) {
	b := newBench(t, benchOptions{})
	for k, v := range map[string]string{
		"VAULT_ADDR": "http://127.0.0.1:1", "VAULT_AGENT_ADDR": "http://127.0.0.1:1", "VAULT_TOKEN": planted, "VAULT_NAMESPACE": "other",
		"VAULT_HEADERS": `{"X-Planted":"` + planted + `"}`, "VAULT_WRAP_TTL": "60s", "VAULT_MAX_RETRIES": "9",
		"VAULT_HTTP_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1",
	} {
		t.Setenv(k, v)
	}
	cfg := b.cfg
	i := b.issuer(cfg)
	if i.client.Headers().Get("X-Planted") != "" || i.client.Namespace() != "" || i.client.MaxRetries() != 0 {
		t.Errorf("headers %v, namespace %q", i.client.Headers(), i.client.Namespace())
	}
	m, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"}))
	if err != nil || m.Credential.Kind != KindVaultToken {
		t.Fatal(err)
	}
}

func TestAMissingCapabilityIsNamedWithItsPathAndScope(t *testing.T) {
	b := newBench(t, benchOptions{})
	if err := b.root.Sys().PutPolicy("less", `
path "auth/token/create/countersign-pki-service" { capabilities = ["update"] }
path "auth/token/renew-accessor" { capabilities = ["update"] }
path "sys/leases/revoke" { capabilities = ["update"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "sys/capabilities-self" { capabilities = ["update"] }`); err != nil {
		t.Fatal(err)
	}
	s, err := b.root.Logical().Write("auth/token/create-orphan", map[string]any{"policies": []string{"less"}, "no_default_policy": true})
	if err != nil {
		t.Fatal(err)
	}
	cfg := b.cfg
	cfg.Login = Login{Token: s.Auth.ClientToken}
	i := b.issuer(cfg)
	missing, err := i.CheckCapabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, m := range missing {
		said = append(said, m.Scope+" "+m.Capability+" "+m.Path)
	}
	got := strings.Join(said, "\n")
	for _, want := range []string{" update auth/token/revoke-accessor", "vault:demo-read update auth/token/create/countersign-vault-demo-read"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing from\n%s", want, got)
		}
	}
	if strings.Contains(got, "pki:service") || strings.Contains(got, "renew-accessor") {
		t.Errorf("named what is there:\n%s", got)
	}
}

func TestATokenRoleThatIsWiderThanPlannedIsNotMintedUnder(t *testing.T) {
	b := newBench(t, benchOptions{})
	role := "auth/token/roles/countersign-vault-demo-read"
	good := map[string]any{"allowed_policies": "countersign-vault-demo-read", "orphan": true, "renewable": true, "token_no_default_policy": true, "token_type": "service", "token_period": 0, "token_explicit_max_ttl": 0}
	for name, tt := range map[string]struct {
		key   string
		value any
		want  string
	}{
		"not orphan":    {"orphan", false, "orphan"},
		"not renewable": {"renewable", false, "renewable"},
		"periodic":      {"token_period", "1h", "token_period"},
	} {
		t.Run(name, func(t *testing.T) {
			fields := map[string]any{}
			for k, v := range good {
				fields[k] = v
			}
			fields[tt.key] = tt.value
			if _, err := b.root.Logical().Write(role, fields); err != nil {
				t.Fatal(err)
			}
			_, err := b.iss.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read", ttl: 10 * time.Minute}))
			if !errors.Is(err, ErrVaultRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if live := b.live(); len(live) != 0 {
				t.Errorf("live: %q", live)
			}
		})
	}
	t.Run("with a lower ceiling", func(t *testing.T) {
		good["token_explicit_max_ttl"] = "30s"
		if _, err := b.root.Logical().Write(role, good); err != nil {
			t.Fatal(err)
		}
		m := b.mint(ask{scope: "vault:demo-read", ttl: 10 * time.Minute})
		if err := b.iss.Activate(t.Context(), m); !errors.Is(err, ErrVaultRefused) || !strings.Contains(err.Error(), "max TTL") {
			t.Error(err)
		}
		if err := b.iss.Discard(t.Context(), m); err != nil || len(b.live()) != 0 {
			t.Errorf("%v, live %q", err, b.live())
		}
	})
	t.Run("gone", func(t *testing.T) {
		if _, err := b.root.Logical().Delete(role); err != nil {
			t.Fatal(err)
		}
		if _, err := b.iss.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"})); !errors.Is(err, ErrVaultRefused) || !strings.Contains(err.Error(), "unknown role") {
			t.Error(err)
		}
	})
}

func TestAnIssuerThatCouldNotMintIsNotMade(t *testing.T) {
	b := newBench(t, benchOptions{})
	for want, change := range map[string]func(*Config){
		"log key":              func(c *Config) { c.Log = nil },
		"catalogue is missing": func(c *Config) { c.Scopes = nil },
		"identity key":         func(c *Config) { c.Identity = nil },
		"trust domain":         func(c *Config) { c.TrustDomain = "other.test" },
		"first TTL":            func(c *Config) { c.FirstTTL = time.Hour },
		"not a URL":            func(c *Config) { c.Addr = "vault:8200" },
		"no such file":         func(c *Config) { c.CA = filepath.Join(t.TempDir(), "ca.pem") },
		"identity tokens live": func(c *Config) {
			c.Identity = &Identity{cfg: IdentityConfig{TrustDomain: trustDomain, MaxTTL: time.Minute}}
		},
	} {
		cfg := b.cfg
		change(&cfg)
		if _, err := New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	cfg := b.cfg
	cfg.Addr, cfg.Login = "", Login{}
	i := b.issuer(cfg)
	if _, err := i.Mint(t.Context(), b.warrant(ask{scope: "identity:step"})); err != nil {
		t.Error(err)
	}
	if _, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"})); !errors.Is(err, ErrVaultRefused) {
		t.Error(err)
	}
}

func TestVaultIsReachedOverTLSByTheConfiguredCAAlone(t *testing.T) {
	b := newBench(t, benchOptions{})
	to, err := url.Parse(b.vlt.Addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewTLSServer(httputil.NewSingleHostReverseProxy(to))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer srv.Close()
	cfg := b.cfg
	cfg.Addr = srv.URL
	if _, err := New(t.Context(), cfg); !errors.Is(err, ErrVaultUnavailable) || !strings.Contains(err.Error(), "not trusted") {
		t.Errorf("without the CA: %v", err)
	}
	cfg.CA = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(cfg.CA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	i := b.issuer(cfg)
	if _, err := i.Mint(t.Context(), b.warrant(ask{scope: "vault:demo-read"})); err != nil {
		t.Error(err)
	}
}
