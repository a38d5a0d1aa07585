// Package issuer turns to Vault: it mints what the record warrants, keeps its
// own login alive, revokes, and signs step identity tokens. It mints against
// receipts alone, so that no caller's mistake makes a credential that is not
// on record.
package issuer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// Config says which Vault to use, as whom, and what a mint is checked against.
// Nothing is taken from the environment.
type Config struct {
	Addr       string // such as https://vault.example.com:8200
	PublicAddr string // the address steps are told; Addr by default
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
	transport   http.RoundTripper  // tests
}

// Login is how the issuer authenticates to Vault: a token, or AppRole.
type Login struct {
	Token     string   // a periodic, orphan token of the operator's
	TokenFile string   // or the file it is in, read again at each login
	AppRole   *AppRole // or AppRole
}

// AppRole is a login by role ID and secret ID.
type AppRole struct {
	Mount        string // "approle" by default
	RoleID       string
	SecretID     string
	SecretIDFile string // or the file it is in, read again at each login
}

// Issuer mints and revokes. It is safe for concurrent use, and takes no lock
// around a call to Vault.
type Issuer struct {
	cfg     Config
	client  *api.Client
	started time.Time
	spent   spent
	keeper  *keeper
}

// New logs in to Vault and keeps the login alive until Close. ctx bounds the
// login alone.
func New(ctx context.Context, cfg Config) (*Issuer, error) {
	return nil, errors.New("not built")
}

// Close ends the renewal of the login. It revokes nothing.
func (i *Issuer) Close() error { return nil }

// Ping reports whether Vault is unsealed and the login holds. Errors wrap
// ErrVaultUnavailable or ErrVaultRefused.
func (i *Issuer) Ping(ctx context.Context) error { return nil }

// Mint makes the credential that w warrants. Nothing is handed out yet: the
// caller records what Minted.Issued says, then calls Activate, and only then
// replies. Errors wrap store.ErrWarrant (Vault was not turned to),
// ErrVaultUnavailable or ErrVaultRefused, and a *StageError names where.
func (i *Issuer) Mint(ctx context.Context, w store.Warrant) (*Minted, error) { return nil, nil }

// Activate lengthens a minted credential from the first TTL to its full one.
// It is called once credential.issued is on record.
func (i *Issuer) Activate(ctx context.Context, m *Minted) error { return nil }

// Discard revokes, as far as it can, what a mint left whose issuance could
// not be recorded. What it cannot revoke dies by the first TTL.
func (i *Issuer) Discard(ctx context.Context, m *Minted) error { return nil }

// Revoke ends a credential, synchronously: when it returns nil, Vault has
// ended it. What Vault no longer knows counts as ended, so that Revoke may be
// repeated.
func (i *Issuer) Revoke(ctx context.Context, d store.IssuedDetails) error { return nil }

// Missing is a capability that the login lacks.
type Missing struct {
	Scope      string // empty where every scope needs it
	Path       string
	Capability string
	Note       string // what to do
}

// CheckCapabilities asks Vault what the login may do (sys/capabilities-self)
// and returns what is missing of what the catalogue in force needs.
func (i *Issuer) CheckCapabilities(ctx context.Context) ([]Missing, error) { return nil, nil }

var _ = fmt.Sprint
var _ = net.Listen
var _ = url.Parse
var _ = os.Open
var _ tls.Config
var _ x509.Certificate

type spent struct{}
type keeper struct{}

func isNetwork(error) bool       { return false }
func networkReason(error) string { return "" }
