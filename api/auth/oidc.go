package auth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/time/rate"

	"github.com/countersign-dev/countersign/store"
)

// IssuerConfig trusts one OpenID provider.
type IssuerConfig struct {
	Issuer   string `yaml:"issuer"`   // the exact `iss`
	Audience string `yaml:"audience"` // must be among `aud`
	JWKS     string `yaml:"jwks"`     // URL of the provider's keys, taken at first use; what its discovery document names by default
	// which orchestrator a token is; the first rule counts that matches, and a
	// token that none matches is refused
	Orchestrators []ClaimRule `yaml:"orchestrators"`
	// of a subject_token: the claim that names people as at the recorder, or nobody
	// is kept from approving for themselves; sub by default
	SubjectClaim  string `yaml:"subject_claim"`
	SubjectPrefix string `yaml:"subject_prefix"` // put before that claim, such as "user:"
	// Client fetches discovery document and keys; nil: a client with a
	// timeout of 5 s.
	Client *http.Client `yaml:"-"`
}

// ClaimRule names the orchestrator of tokens whose claims all match.
type ClaimRule struct {
	// claim to a regular expression (RE2) over its whole value: it is anchored at
	// both ends, so that repo:acme/x does not let repo:acme/x-evil in; only string
	// claims match
	Match        map[string]string `yaml:"match"`
	Orchestrator string            `yaml:"orchestrator"` // whose tokens these are
	Owners       []string          `yaml:"owners"`       // people who own it, user:NAME
}

// signing are the algorithms a token may be signed with. They are all
// asymmetric: with HS256 among them, a provider's public key would be a
// shared secret that everybody knows.
var signing = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.EdDSA}

const (
	// maxJWT is the largest token in bytes.
	maxJWT = 16 << 10
	// leeway is how far the clocks of provider and broker may differ where a
	// token is not yet valid. There is none past its end.
	leeway = 30 * time.Second
)

// Issuers verifies tokens of one or several OpenID providers.
type Issuers struct {
	byName map[string]*issuer
}

type issuer struct {
	c     IssuerConfig
	rules []rule
	now   clock
	ctx   context.Context // carries the HTTP client

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
}

type rule struct {
	claims map[string]*regexp.Regexp
	name   string
	owners []string
}

// NewIssuers checks the configuration. No provider is contacted before its
// first token comes. now may be nil.
func NewIssuers(configs []IssuerConfig, now func() time.Time) (*Issuers, error) {
	is := &Issuers{byName: map[string]*issuer{}}
	for _, c := range configs {
		if c.Issuer == "" || c.Audience == "" {
			return nil, errors.New("an OIDC issuer needs issuer and audience")
		}
		if is.byName[c.Issuer] != nil {
			return nil, fmt.Errorf("OIDC issuer %s is configured twice", c.Issuer)
		}
		i := &issuer{c: c, now: now}
		for n, r := range c.Orchestrators {
			if !store.ValidID(r.Orchestrator) {
				return nil, fmt.Errorf("OIDC issuer %s: orchestrators[%d]: name %q is not a valid ID", c.Issuer, n, r.Orchestrator)
			}
			if len(r.Match) == 0 {
				return nil, fmt.Errorf("OIDC issuer %s: orchestrators[%d] matches every token: give it a claim to match", c.Issuer, n)
			}
			for _, o := range r.Owners {
				if err := ValidPerson(o); err != nil {
					return nil, fmt.Errorf("OIDC issuer %s: orchestrators[%d]: owners: %w", c.Issuer, n, err)
				}
			}
			compiled := rule{claims: map[string]*regexp.Regexp{}, name: r.Orchestrator, owners: r.Owners}
			for claim, pattern := range r.Match {
				// Compiled alone first: "a)|(b" is an error, not a way out of the anchors.
				if _, err := regexp.Compile(pattern); err != nil {
					return nil, fmt.Errorf("OIDC issuer %s: orchestrators[%d]: claim %s: %w", c.Issuer, n, claim, err)
				}
				compiled.claims[claim] = regexp.MustCompile(`\A(?:` + pattern + `)\z`)
			}
			i.rules = append(i.rules, compiled)
		}
		client := c.Client
		if client == nil {
			client = &http.Client{Timeout: 5 * time.Second}
		}
		throttled := *client
		throttled.Transport = &throttle{next: client.Transport, limit: rate.NewLimiter(rate.Every(5*time.Second), 10)}
		i.ctx = oidc.ClientContext(context.Background(), &throttled)
		is.byName[c.Issuer] = i
	}
	return is, nil
}

// throttle bounds how often a provider's keys are fetched: the library fetches
// them for every token whose "kid" it does not know, and anyone can send those.
type throttle struct {
	next  http.RoundTripper
	limit *rate.Limiter
}

func (t *throttle) RoundTrip(r *http.Request) (*http.Response, error) {
	if !t.limit.Allow() {
		return nil, errors.New("the provider's keys were fetched too often just now")
	}
	next := t.next
	if next == nil {
		next = http.DefaultTransport
	}
	return next.RoundTrip(r)
}

// Authenticate verifies an orchestrator's token. The error wraps
// ErrUnauthenticated.
func (is *Issuers) Authenticate(ctx context.Context, raw string) (*Principal, error) {
	i, claims, err := is.verify(ctx, raw)
	if err != nil {
		return nil, err
	}
	for _, r := range i.rules {
		if r.matches(claims) {
			return &Principal{Name: r.name, Role: Orchestrator, Method: "oidc", Owners: r.owners}, nil
		}
	}
	return nil, unauthenticated("no rule maps this token of %s to an orchestrator", i.c.Issuer)
}

func (r *rule) matches(claims map[string]jsontext.Value) bool {
	for claim, pattern := range r.claims {
		s, ok := text(claims[claim])
		if !ok || !pattern.MatchString(s) {
			return false
		}
	}
	return true
}

// Subject verifies a subject_token and returns the subject that it proves. The
// error wraps ErrUnauthenticated.
func (is *Issuers) Subject(ctx context.Context, raw string) (string, error) {
	i, claims, err := is.verify(ctx, raw)
	if err != nil {
		return "", err
	}
	name := i.c.SubjectClaim
	if name == "" {
		name = "sub"
	}
	s, ok := text(claims[name])
	if !ok || s == "" {
		return "", unauthenticated("the subject token has no claim %q", name)
	}
	return i.c.SubjectPrefix + s, nil
}

// text is v as a string, when it is one.
func text(v jsontext.Value) (string, bool) {
	if v.Kind() != '"' {
		return "", false
	}
	var s string
	return s, json.Unmarshal(v, &s) == nil
}

// verify checks signature, issuer, audience and times of a JWT in compact form.
func (is *Issuers) verify(ctx context.Context, raw string) (*issuer, map[string]jsontext.Value, error) {
	// The library takes JWS in JSON form too; a bearer token has one form.
	if len(raw) > maxJWT || strings.Count(raw, ".") != 2 {
		return nil, nil, unauthenticated("the token is not a compact JWT of at most %d bytes", maxJWT)
	}
	name, err := unverifiedIssuer(raw)
	if err != nil {
		return nil, nil, unauthenticated("%w", err)
	}
	i := is.byName[name]
	if i == nil {
		return nil, nil, unauthenticated("the token's issuer is not trusted")
	}
	v, err := i.get(ctx)
	if err != nil {
		return nil, nil, unauthenticated("asking %s for its keys: %w", i.c.Issuer, err)
	}
	token, err := v.Verify(ctx, raw)
	if err != nil {
		return nil, nil, unauthenticated("%w", err)
	}
	var claims map[string]jsontext.Value
	var payload jsontext.Value
	if err := token.Claims(&payload); err != nil {
		return nil, nil, unauthenticated("%w", err)
	}
	// Strict: a claim that stands twice means one thing here and another elsewhere.
	if err := json.Unmarshal(payload, &claims); err != nil {
		return nil, nil, unauthenticated("claims: %w", err)
	}
	now := i.now.now()
	for _, claim := range []string{"nbf", "iat"} {
		b, ok := claims[claim]
		if !ok {
			continue
		}
		var sec float64 // NumericDate, RFC 7519 section 2
		if err := json.Unmarshal(b, &sec); err != nil {
			return nil, nil, unauthenticated("claim %s is not a number", claim)
		}
		if sec > float64(now.Add(leeway).Unix()) {
			return nil, nil, unauthenticated("the token's %s lies in the future", claim)
		}
	}
	return i, claims, nil
}

// get returns the verifier, after discovery where that is due.
func (i *issuer) get(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.verifier != nil {
		return i.verifier, nil
	}
	conf := &oidc.Config{ClientID: i.c.Audience, SupportedSigningAlgs: signing, Now: i.now.now}
	if i.c.JWKS != "" {
		i.verifier = oidc.NewVerifier(i.c.Issuer, oidc.NewRemoteKeySet(i.ctx, i.c.JWKS), conf)
		return i.verifier, nil
	}
	p, err := oidc.NewProvider(i.ctx, i.c.Issuer)
	if err != nil {
		return nil, err
	}
	i.verifier = p.Verifier(conf)
	return i.verifier, nil
}
