package issuer

import (
	"errors"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/golang-jwt/jwt/v5"
)

// Algorithm is a JWS algorithm (RFC 7518, RFC 8037) that identity tokens may
// be signed with.
type Algorithm string

// The algorithms.
const (
	ES256 Algorithm = "ES256"
	RS256 Algorithm = "RS256" // 2048 bits at least
	EdDSA Algorithm = "EdDSA" // Ed25519
)

// IdentityConfig says as whom identity tokens are signed.
type IdentityConfig struct {
	Issuer      string        // URL: iss, and where discovery is served
	TrustDomain string        // of the SPIFFE IDs
	KeyFile     string        // private JWK set, or one PEM private key; made when missing
	Algorithm   Algorithm     // of keys made from now on; ES256 by default
	MaxTTL      time.Duration // the longest life of a token; 1 h by default
	Lead        time.Duration // how long a new key is published before it signs; 10 min by default
	Now         func() time.Time
}

// Identity signs and checks step identity tokens. It is safe for concurrent
// use.
type Identity struct{ cfg IdentityConfig }

// OpenIdentity reads the key file, or makes one with a first key.
func OpenIdentity(cfg IdentityConfig) (*Identity, error) { return nil, errors.New("not built") }

// Claims of a step identity token.
type Claims struct {
	jwt.RegisteredClaims
	Orchestrator string `json:"orchestrator"`
	Run          string `json:"run"`
	Step         string `json:"step"`
	Request      string `json:"request"`
	Scope        string `json:"scope"`
}

// ErrToken is wrapped by every reason why an identity token does not verify.
var ErrToken = errors.New("identity token does not verify")

// Sign signs claims: issuer, subject, issue and start are set here.
func (i *Identity) Sign(c Claims) (string, error) { return "", nil }

// Verify checks an identity token of ours. An empty audience accepts any.
func (i *Identity) Verify(token, audience string) (*Claims, error) { return nil, ErrToken }

// Rotate adds a new signing key.
func (i *Identity) Rotate() (kid string, err error) { return "", nil }

// Reload reads the key file again.
func (i *Identity) Reload() error { return nil }

// Issuer is the URL that tokens carry as iss.
func (i *Identity) Issuer() string { return i.cfg.Issuer }

// JWKS is the public key set, as served at /.well-known/jwks.json.
func (i *Identity) JWKS() jsontext.Value { return nil }

// Discovery is the OpenID discovery document, as served at
// /.well-known/openid-configuration.
func (i *Identity) Discovery() jsontext.Value { return nil }

// SPIFFEID names a step: spiffe://<trust domain>/orchestrator/<o>/run/<r>/step/<s>.
// The contract's IDs need no escaping in it.
func SPIFFEID(trustDomain, orchestrator, run, step string) string {
	return "spiffe://" + trustDomain + "/orchestrator/" + orchestrator + "/run/" + run + "/step/" + step
}

// ValidTrustDomain reports whether s may be a SPIFFE trust domain.
func ValidTrustDomain(s string) bool { return s != "" }
