// Package issuer turns to Vault: it mints what the record warrants, keeps its
// own login alive, revokes, and signs step identity tokens. It mints against
// receipts alone, so that no caller's mistake makes a credential that is not
// on record.
package issuer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// Config says which Vault to use, as whom, and what a mint is checked against.
// Nothing is taken from the environment. Addr and Login may be empty: then
// only identity tokens are minted, and everything else is refused.
type Config struct {
	Addr       string // such as https://vault.example.com:8200
	PublicAddr string // the address that steps are told; Addr by default
	Namespace  string // Vault Enterprise namespace; empty for none
	CA         string // PEM file of the CAs that Vault's certificate may come from; the system's by default
	Login      Login

	TrustDomain string             // of the SPIFFE IDs; must be Identity's
	Log         *store.LogVerifier // the recorder's log key
	Scopes      func() *scopes.Set // the catalogue in force
	Identity    *Identity          // signs step identity tokens
	FirstTTL    time.Duration      // of a child token until its issuance is on record; 60 s by default
	CallTimeout time.Duration      // of one call to Vault; 10 s by default
	Now         func() time.Time   // time.Now by default
	Logger      *zap.Logger        // nothing is logged by default

	// Transport, where set, gives what carries calls to Vault, made of what would
	// carry them without it.
	Transport func(http.RoundTripper) http.RoundTripper
	// Minting, where set, is told when a mint that is warranted begins, of which
	// scope and for which request. The mint goes on in the context that it returns,
	// and calls done, which may be told a nil error, at its end.
	Minting func(ctx context.Context, scope *scopes.Scope, request string) (_ context.Context, done func(error))
}

// Issuer mints and revokes. It is safe for concurrent use, and takes no lock
// around a call to Vault.
type Issuer struct {
	cfg     Config
	log     *zap.Logger
	client  *api.Client // nil without a Vault
	started time.Time
	spent   spent
	keeper  *keeper // nil without a Vault
}

// New logs in to Vault and keeps the login alive until Close. ctx bounds the
// login alone.
func New(ctx context.Context, cfg Config) (*Issuer, error) {
	switch {
	case cfg.Log == nil:
		return nil, errors.New("issuer: the recorder's log key is missing")
	case cfg.Scopes == nil || cfg.Scopes() == nil:
		return nil, errors.New("issuer: the catalogue is missing")
	case cfg.Identity == nil:
		return nil, errors.New("issuer: the step identity key is missing")
	case cfg.TrustDomain != cfg.Identity.cfg.TrustDomain:
		return nil, fmt.Errorf("issuer: trust domain %q is not the one of the identity tokens, %q", cfg.TrustDomain, cfg.Identity.cfg.TrustDomain)
	}
	for _, s := range cfg.Scopes().Scopes() {
		if s.Engine == scopes.Identity && s.MaxTTL > cfg.Identity.cfg.MaxTTL {
			return nil, fmt.Errorf("issuer: scope %s allows %s, identity tokens live for %s at most: lower max_ttl, or raise the identity's", s.Name, s.MaxTTL, cfg.Identity.cfg.MaxTTL)
		}
	}
	if cfg.FirstTTL == 0 {
		cfg.FirstTTL = time.Minute
	}
	if cfg.FirstTTL < time.Second || cfg.FirstTTL > time.Minute {
		return nil, fmt.Errorf("issuer: first TTL is %s, want 1s to 60s: what is not on record must not live longer", cfg.FirstTTL)
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = 10 * time.Second
	}
	if cfg.PublicAddr == "" {
		cfg.PublicAddr = cfg.Addr
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	i := &Issuer{cfg: cfg, log: cfg.Logger, started: cfg.Now()}
	if cfg.Addr == "" {
		return i, nil
	}
	var err error
	if i.client, err = newClient(cfg); err != nil {
		return nil, err
	}
	if i.keeper, err = keepLogin(ctx, i.client, cfg.Login, i.log); err != nil {
		return nil, err
	}
	return i, nil
}

// newClient makes a Vault client that takes nothing from the environment. The
// library reads VAULT_* variables in its constructor, whatever it is given;
// what it took is set again here.
func newClient(cfg Config) (*api.Client, error) {
	u, err := url.Parse(cfg.Addr)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") || u.User != nil {
		return nil, fmt.Errorf("the Vault address %q is not a URL such as https://vault.example.com:8200", cfg.Addr)
	}
	roots, err := trust.Open(trust.Files{CA: cfg.CA}, cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("the CA of Vault: %w", err)
	}
	var transport http.RoundTripper = roots.Transport(&http.Transport{
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true,
		// 64 steps at a time keep their connections; more open new ones.
		MaxIdleConns: 128, MaxIdleConnsPerHost: 128, IdleConnTimeout: 90 * time.Second,
	})
	if cfg.Transport != nil {
		transport = cfg.Transport(transport)
	}
	client, err := api.NewClient(&api.Config{
		Address:    cfg.Addr,
		Timeout:    cfg.CallTimeout,
		MaxRetries: 0, // a repeated create would leave a second child behind
		HttpClient: &http.Client{
			Transport: transport,
			// The library follows one redirect itself (standby to active), and
			// checks that it does not leave TLS.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	})
	if err != nil {
		return nil, fmt.Errorf("making the Vault client: %w", err)
	}
	h := http.Header{api.RequestHeaderName: {"true"}}
	if cfg.Namespace != "" {
		h.Set(api.NamespaceHeaderName, cfg.Namespace)
	}
	client.SetHeaders(h)
	client.ClearToken()
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	return client, nil
}

// as returns the client acting with token, and asking for the answer wrapped
// where wrap is not zero.
func (i *Issuer) as(token string, wrap time.Duration) *api.Logical {
	return i.client.WithRequestCallbacks(func(r *api.Request) {
		r.ClientToken = token
		if wrap > 0 {
			r.WrapTTL = seconds(wrap)
		}
	}).Logical()
}

// wrapped returns the client asking for the answer wrapped, with the login.
func (i *Issuer) wrapped(wrap time.Duration) *api.Logical {
	if wrap == 0 {
		return i.client.Logical()
	}
	return i.client.WithRequestCallbacks(func(r *api.Request) { r.WrapTTL = seconds(wrap) }).Logical()
}

// Close ends the renewal of the login. It revokes nothing: children are
// orphans and outlive it.
func (i *Issuer) Close() error {
	if i.keeper != nil {
		i.keeper.stop()
	}
	return nil
}

// LoggedIn reports whether the login to Vault holds, as far as is known without
// asking; without a Vault it is false.
func (i *Issuer) LoggedIn() bool { return i.keeper != nil && i.keeper.held.Load() }

// Ping reports whether Vault is unsealed and the login holds. Errors wrap
// ErrVaultUnavailable or ErrVaultRefused.
func (i *Issuer) Ping(ctx context.Context) error {
	if i.client == nil {
		return nil
	}
	_, err := i.client.Logical().ReadWithContext(ctx, "auth/token/lookup-self")
	return i.failed(stageLogin, err)
}

// failed sorts an error of a call made with the login, and has the login
// looked at where Vault no longer accepts it.
func (i *Issuer) failed(stage string, err error) error {
	if err == nil {
		return nil
	}
	var re *api.ResponseError
	if errors.As(err, &re) && re.StatusCode == http.StatusForbidden {
		i.keeper.look()
	}
	return vaultError(stage, err)
}
