package issuer

import (
	"crypto"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/golang-jwt/jwt/v5"

	"github.com/countersign-dev/countersign/store"
)

// IdentityConfig says as whom identity tokens are signed.
type IdentityConfig struct {
	Issuer      string           // URL: iss, and where discovery is served
	TrustDomain string           // of the SPIFFE IDs
	KeyFile     string           // see keyFile; made when missing
	Algorithm   Algorithm        // of keys made from now on; ES256 by default
	MaxTTL      time.Duration    // the longest life of a token, and so how long a retired key stays published; 1 h by default
	Lead        time.Duration    // how long a new key is published before it signs; 10 min by default
	Now         func() time.Time // time.Now by default
}

// Identity signs and checks step identity tokens. It is safe for concurrent
// use.
type Identity struct {
	cfg  IdentityConfig
	keys atomic.Pointer[[]signingKey]
	file fileLock
}

// OpenIdentity reads the key file, or makes one with a first key, which signs
// at once.
func OpenIdentity(cfg IdentityConfig) (*Identity, error) {
	u, err := url.Parse(cfg.Issuer)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("identity issuer %q is not a URL without query and fragment", cfg.Issuer)
	}
	if !ValidTrustDomain(cfg.TrustDomain) {
		return nil, fmt.Errorf("trust domain %q is not one: lower-case letters, digits, dots, dashes and underscores (SPIFFE-ID, section 2.1)", cfg.TrustDomain)
	}
	cfg.Issuer = strings.TrimSuffix(cfg.Issuer, "/")
	if cfg.Algorithm == "" {
		cfg.Algorithm = ES256
	}
	if !cfg.Algorithm.valid() {
		return nil, fmt.Errorf("algorithm %q is not one of ES256, RS256 and EdDSA", cfg.Algorithm)
	}
	if cfg.MaxTTL == 0 {
		cfg.MaxTTL = time.Hour
	}
	if cfg.Lead == 0 {
		cfg.Lead = 10 * time.Minute
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	i := &Identity{cfg: cfg}
	if err := i.open(); err != nil {
		return nil, err
	}
	return i, nil
}

// Claims of a step identity token. The ID (jti) is the intent's.
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

// maxToken is the longest identity token in bytes that is looked at. Ours are
// below 2,000 with the longest IDs.
const maxToken = 8 << 10

// sign makes the identity token of a warranted mint.
func (i *Identity) sign(j *job) (token string, expires time.Time, err error) {
	return i.Sign(Claims{
		RegisteredClaims: jwt.RegisteredClaims{
			ID: j.Intent.ID, Audience: jwt.ClaimStrings{j.Grant.Audience}, ExpiresAt: jwt.NewNumericDate(j.end.Time),
		},
		Orchestrator: j.Intent.Orchestrator, Run: j.Intent.Run, Step: j.Intent.Step, Request: j.Intent.Request, Scope: j.Grant.Scope,
	})
}

// Sign signs claims. It sets issuer, subject, issue and start; the caller
// gives the ID, one audience or more, the end, and what step it is. It returns
// when the token ends, which is the whole second at or before the asked end.
func (i *Identity) Sign(c Claims) (token string, expires time.Time, err error) {
	now := i.cfg.Now()
	switch {
	case len(c.Audience) == 0 || slices.Contains(c.Audience, ""):
		return "", expires, errors.New("an identity token needs an audience")
	case c.ExpiresAt == nil || !c.ExpiresAt.After(now):
		return "", expires, errors.New("an identity token needs an end in the future")
	case c.ExpiresAt.Sub(now) > i.cfg.MaxTTL+time.Second:
		// A retired key stays published for MaxTTL and no longer.
		return "", expires, fmt.Errorf("an identity token may live for %s at most", i.cfg.MaxTTL)
	}
	k, err := i.signing(now)
	if err != nil {
		return "", expires, err
	}
	expires = c.ExpiresAt.Truncate(time.Second)
	c.Issuer, c.Subject = i.cfg.Issuer, SPIFFEID(i.cfg.TrustDomain, c.Orchestrator, c.Run, c.Step)
	c.IssuedAt, c.NotBefore, c.ExpiresAt = jwt.NewNumericDate(now), jwt.NewNumericDate(now), jwt.NewNumericDate(expires)
	t := jwt.NewWithClaims(k.alg.method(), c)
	t.Header["kid"] = k.kid
	token, err = t.SignedString(k.private)
	if err != nil {
		return "", expires, fmt.Errorf("signing an identity token: %w", err)
	}
	return token, expires, nil
}

// Verify checks an identity token of ours: signed by a key that is published,
// with that key's own algorithm and no other, ours by issuer and trust domain,
// and in its time. An empty audience accepts any. Errors wrap ErrToken and
// quote nothing of the token.
func (i *Identity) Verify(token, audience string) (*Claims, error) {
	if len(token) > maxToken {
		return nil, fmt.Errorf("%w: too long", ErrToken)
	}
	opts := []jwt.ParserOption{
		jwt.WithValidMethods([]string{string(ES256), string(RS256), string(EdDSA)}),
		jwt.WithIssuer(i.cfg.Issuer), jwt.WithExpirationRequired(), jwt.WithIssuedAt(),
		jwt.WithTimeFunc(i.cfg.Now), jwt.WithStrictDecoding(),
	}
	if audience != "" {
		opts = append(opts, jwt.WithAudience(audience))
	}
	var c Claims
	_, err := jwt.NewParser(opts...).ParseWithClaims(token, &c, func(t *jwt.Token) (any, error) {
		kid, _ := t.Header["kid"].(string)
		for _, k := range i.published(i.cfg.Now()) {
			if k.kid == kid {
				// An attacker's choice of algorithm must not choose what the key means.
				if t.Method.Alg() != string(k.alg) {
					return nil, errors.New("algorithm is not the key's")
				}
				return k.private.Public(), nil
			}
		}
		return nil, errors.New("kid is unknown")
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrToken, tokenProblem(err))
	}
	for _, id := range []string{c.Orchestrator, c.Run, c.Step} {
		if !store.ValidID(id) {
			return nil, fmt.Errorf("%w: it names no step", ErrToken)
		}
	}
	if c.Subject != SPIFFEID(i.cfg.TrustDomain, c.Orchestrator, c.Run, c.Step) {
		return nil, fmt.Errorf("%w: subject and step do not agree", ErrToken)
	}
	return &c, nil
}

func tokenProblem(err error) string {
	for _, known := range []struct {
		err error
		say string
	}{
		{jwt.ErrTokenMalformed, "not a signed JWT"},
		{jwt.ErrTokenUnverifiable, "key or algorithm is not ours"},
		{jwt.ErrTokenSignatureInvalid, "signature is not ours"},
		{jwt.ErrTokenExpired, "expired"},
		{jwt.ErrTokenNotValidYet, "not yet valid"},
		{jwt.ErrTokenUsedBeforeIssued, "issued in the future"},
		{jwt.ErrTokenInvalidAudience, "for another audience"},
		{jwt.ErrTokenInvalidIssuer, "of another issuer"},
	} {
		if errors.Is(err, known.err) {
			return known.say
		}
	}
	return "claims are not valid"
}

// Issuer is the URL that tokens carry as iss.
func (i *Identity) Issuer() string { return i.cfg.Issuer }

// TrustDomain is the SPIFFE trust domain of the tokens' subjects.
func (i *Identity) TrustDomain() string { return i.cfg.TrustDomain }

// JWKS is the public key set (RFC 7517), as served at /.well-known/jwks.json:
// the key that signs, the one that is about to, and those whose tokens may
// still live.
func (i *Identity) JWKS() jsontext.Value {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range i.published(i.cfg.Now()) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.private.Public(), KeyID: k.kid, Algorithm: string(k.alg), Use: "sig"})
	}
	return mustJSON(set)
}

// Discovery is the OpenID discovery document, as served at
// /.well-known/openid-configuration. It has what a relying party needs to
// check a token; there is no endpoint at which a person could log in.
func (i *Identity) Discovery() jsontext.Value {
	var algs []string
	for _, k := range i.published(i.cfg.Now()) {
		if !slices.Contains(algs, string(k.alg)) {
			algs = append(algs, string(k.alg))
		}
	}
	slices.Sort(algs)
	return mustJSON(struct {
		Issuer   string   `json:"issuer"`
		JWKS     string   `json:"jwks_uri"`
		Response []string `json:"response_types_supported"`
		Subject  []string `json:"subject_types_supported"`
		Algs     []string `json:"id_token_signing_alg_values_supported"`
		Claims   []string `json:"claims_supported"`
	}{
		i.cfg.Issuer, i.cfg.Issuer + "/.well-known/jwks.json", []string{"id_token"}, []string{"public"}, algs,
		[]string{"iss", "sub", "aud", "iat", "nbf", "exp", "jti", "orchestrator", "run", "step", "request", "scope"},
	})
}

func mustJSON(v any) jsontext.Value {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		panic(err) // public keys and strings always marshal
	}
	return b
}

// SPIFFEID names a step: spiffe://<trust domain>/orchestrator/<o>/run/<r>/step/<s>.
// The contract's IDs are path segments of a SPIFFE ID as they are, without
// escaping (SPIFFE-ID, section 2.2).
func SPIFFEID(trustDomain, orchestrator, run, step string) string {
	return "spiffe://" + trustDomain + "/orchestrator/" + orchestrator + "/run/" + run + "/step/" + step
}

var trustDomains = regexp.MustCompile(`\A[a-z0-9._-]{1,255}\z`)

// ValidTrustDomain reports whether s may be a SPIFFE trust domain.
func ValidTrustDomain(s string) bool { return trustDomains.MatchString(s) }

// signing is the key that signs at now: of those whose time has come, the
// latest.
func (i *Identity) signing(now time.Time) (*signingKey, error) {
	keys := *i.keys.Load()
	for n := len(keys) - 1; n >= 0; n-- {
		if !keys[n].from.After(now) {
			return &keys[n], nil
		}
	}
	return nil, errors.New("no identity key signs yet: look at the clock")
}

// published returns the keys of the JWKS at now. A key leaves it when the
// last token that it can have signed has ended.
func (i *Identity) published(now time.Time) []signingKey {
	keys := *i.keys.Load()
	for n := len(keys) - 1; n > 0; n-- {
		if now.After(keys[n].from.Add(i.cfg.MaxTTL + slack)) {
			return keys[n:]
		}
	}
	return keys
}

// slack is added to the overlap of keys, for clocks that differ.
const slack = time.Minute

// signingKey is a private key and when it begins to sign.
type signingKey struct {
	kid     string
	alg     Algorithm
	from    time.Time
	private crypto.Signer
}
