package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"
	"golang.org/x/oauth2"
)

// PeopleConfig is how people log in at the recorder.
type PeopleConfig struct {
	// Issuer is the OpenID provider. Plain http is for a provider on loopback.
	Issuer   string
	ClientID string
	// ClientSecret is empty for a public client, which PKCE alone protects.
	ClientSecret string
	// BaseURL is where people reach the recorder: scheme, host and port
	// without a path. BaseURL + "/login/callback" is registered at the provider.
	BaseURL string
	// NameClaim names the person, "preferred_username" where empty. It has to
	// be one that people cannot choose or hand on at the provider (OpenID
	// Connect Core, section 5.7). "email" counts only with email_verified.
	NameClaim string
	// GroupsClaim holds the person's groups, "groups" where empty.
	GroupsClaim string
	// Scopes are asked for beside openid and profile, and beside groups where
	// the provider says that it knows that scope.
	Scopes []string
	// Roles are the groups that make a person a reviewer or a responder.
	// Everyone who logs in is an approver; what they may decide is a matter of
	// groups.
	Roles map[Role][]string
	// SessionLife ends a session for good (8 h where zero), IdleLife when
	// nothing was asked for so long (30 min where zero).
	SessionLife, IdleLife time.Duration

	Now        func() time.Time // nil: the system's clock
	Log        *zap.Logger      // nil: silent
	Refusals   *Refusals        // puts refused logins on record; nil: they are logged alone
	HTTPClient *http.Client     // nil: one with a timeout of 5 s
}

// Person is who logged in.
type Person struct {
	Name     string    // "user:NAME"
	Groups   []string  // sorted
	AuthTime time.Time // when they proved to the provider who they are; zero where it does not say
	Roles    []Role    // Approver, and what their groups make of them
}

// Fresh is a person's fresh login for one purpose. The nonce of its ID token is
// the one that was given to People.Fresh, so the token is the provider's
// signature under what that nonce commits to.
type Fresh struct {
	Person
	Nonce   string
	IDToken string // as the provider signed it, compact
	JWK     []byte // the provider's key that verified it, JSON (RFC 7517)
	Issuer  string
	// ClientID is the token's audience.
	ClientID string
	Data     any // what was given to People.Fresh
}

// People lets people log in with OpenID Connect: the code flow with PKCE, state
// and nonce (OpenID Connect Core, section 3.1; RFC 9700).
type People struct {
	// Sessions are who is logged in.
	Sessions *Sessions
	// OnFresh takes a fresh login and says where the browser goes next: a path
	// of this recorder, or empty for the one given to Fresh. It is set before
	// the first request.
	OnFresh func(context.Context, Fresh) (redirect string, err error)
	// OnLogin is told of each login that began a session, before the browser goes
	// on. It is set before the first request; nil: nobody is told.
	OnLogin func(context.Context, Person)

	c       PeopleConfig
	now     clock
	base    *url.URL
	secure  bool // BaseURL is https
	origins *http.CrossOriginProtection
	client  *http.Client
	ctx     context.Context // carries client
	log     *zap.Logger

	pending expiring[*login]   // by hash of state
	codes   expiring[*cliCode] // by hash of code

	mu     sync.Mutex
	op     *provider
	failed error // of the last discovery
	retry  time.Time
}

// provider is what discovery said of the OpenID provider.
type provider struct {
	verifier *oidc.IDTokenVerifier
	oauth    oauth2.Config
	algs     []string
	jwks     string
}

const (
	// maxIDToken is the largest ID token in bytes. One with a thousand groups fits.
	maxIDToken = 64 << 10
	// maxAnswer is the largest answer of the provider in bytes.
	maxAnswer = 1 << 20
	// freshLife is how long ago a fresh login may have been.
	freshLife = 5 * time.Minute
	// maxGroups is more than any person has in groups that mean something here.
	maxGroups = 1000
	// maxNext is the longest path in bytes to go on to after a login.
	maxNext = 2 << 10
)

// People's names and groups stand in entries, pages and messages.
var (
	personNames = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._@-]{0,127}\z`)
	groupNames  = regexp.MustCompile(`\A[A-Za-z0-9/][A-Za-z0-9._@:/-]{0,127}\z`)
)

// ValidPerson says what is wrong with the name of a person in a configuration,
// or nil: a misspelt owner would exclude nobody without a word.
func ValidPerson(name string) error {
	bare, ok := strings.CutPrefix(name, personPrefix)
	if !ok || !personNames.MatchString(bare) {
		return fmt.Errorf("person %q: write %sNAME as the provider names them, such as %sada", name, personPrefix, personPrefix)
	}
	return nil
}

// NewPeople checks the configuration. The provider is asked at the first login,
// so that the recorder starts while it is down.
func NewPeople(c PeopleConfig) (*People, error) {
	if c.ClientID == "" {
		return nil, errors.New("people's login needs the client ID that the provider knows this recorder by")
	}
	base, err := url.Parse(c.BaseURL)
	if err != nil || base.Host == "" || strings.Trim(base.Path, "/") != "" || base.RawQuery != "" || base.User != nil || base.Fragment != "" || !webURL(base) {
		return nil, fmt.Errorf("people's login: base URL %q: want https://HOST, or http://localhost:PORT", c.BaseURL)
	}
	base.Path = ""
	issuer, err := url.Parse(c.Issuer)
	if err != nil || issuer.RawQuery != "" || issuer.Fragment != "" || !webURL(issuer) {
		return nil, fmt.Errorf("people's login: issuer %q: want an https URL, or http on loopback", c.Issuer)
	}
	for role := range c.Roles {
		if role != Reviewer && role != Responder {
			return nil, fmt.Errorf("people's login: groups make a person %s or %s, not %q", Reviewer, Responder, role)
		}
	}
	if c.NameClaim == "" {
		c.NameClaim = "preferred_username"
	}
	if c.GroupsClaim == "" {
		c.GroupsClaim = "groups"
	}
	if c.SessionLife <= 0 {
		c.SessionLife = 8 * time.Hour
	}
	if c.IdleLife <= 0 {
		c.IdleLife = 30 * time.Minute
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	client := http.Client{Timeout: 5 * time.Second}
	if c.HTTPClient != nil {
		client = *c.HTTPClient
	}
	client.Transport = &bounded{next: client.Transport}
	// Its endpoints were checked when it named them; one that sends on would have
	// code and secret, or the keys that are trusted, go by one that was not.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	p := &People{
		Sessions: newSessions(c.Now, c.SessionLife, c.IdleLife),
		c:        c, now: c.Now, base: base, secure: base.Scheme == "https", log: c.Log,
		origins: http.NewCrossOriginProtection(),
		client:  &client,
		ctx:     oidc.ClientContext(context.Background(), &client),
		pending: expiring[*login]{now: c.Now, life: 10 * time.Minute, most: 10_000},
		codes:   expiring[*cliCode]{now: c.Now, life: time.Minute, most: 1_000},
	}
	if err := p.origins.AddTrustedOrigin(base.String()); err != nil {
		return nil, fmt.Errorf("people's login: base URL: %w", err)
	}
	return p, nil
}

// webURL reports whether what is sent to u stays between its two ends.
func webURL(u *url.URL) bool {
	return u.Scheme == "https" && u.Host != "" || u.Scheme == "http" && loopback(u.Hostname())
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// bounded cuts off answers that no provider sends.
type bounded struct{ next http.RoundTripper }

func (b *bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	next := b.next
	if next == nil {
		next = http.DefaultTransport
	}
	resp, err := next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// Routes adds the pages and calls of the login.
func (p *People) Routes(r chi.Router) {
	r.Get("/login", p.begin)
	r.Get("/login/callback", p.callback)
	r.Get("/login/style.css", style)
	r.Get("/login/cli", p.cliPage)
	r.Post("/login/cli", p.cliConfirm)
	r.Post("/login/cli/token", p.cliToken)
	r.Post("/logout", p.logout)
}

// discover returns the provider, which is asked until it answered once; after a
// failure at most once a second, however many people knock.
func (p *People) discover() (*provider, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.op != nil {
		return p.op, nil
	}
	if p.failed != nil && p.now.now().Before(p.retry) {
		return nil, p.failed
	}
	op, err := p.ask()
	if err != nil {
		p.failed, p.retry = fmt.Errorf("asking the OpenID provider %s: %w", p.c.Issuer, err), p.now.now().Add(time.Second)
		return nil, p.failed
	}
	p.op, p.failed = op, nil
	return op, nil
}

func (p *People) ask() (*provider, error) {
	d, err := oidc.NewProvider(p.ctx, p.c.Issuer) // compares the issuer
	if err != nil {
		return nil, err
	}
	var doc struct {
		JWKS    string   `json:"jwks_uri"`
		Algs    []string `json:"id_token_signing_alg_values_supported"`
		Methods []string `json:"token_endpoint_auth_methods_supported"`
		Scopes  []string `json:"scopes_supported"`
	}
	if err := d.Claims(&doc); err != nil {
		return nil, err
	}
	for _, s := range []string{d.Endpoint().AuthURL, d.Endpoint().TokenURL, doc.JWKS} {
		if u, err := url.Parse(s); err != nil || !webURL(u) || u.Scheme == "http" && !strings.HasPrefix(p.c.Issuer, "http://") {
			return nil, fmt.Errorf("its endpoint %q is not an https URL", s)
		}
	}
	op := &provider{jwks: doc.JWKS}
	for _, alg := range doc.Algs {
		if slices.Contains(signing, alg) {
			op.algs = append(op.algs, alg)
		}
	}
	if len(op.algs) == 0 {
		return nil, fmt.Errorf("it signs with none of %v", signing)
	}
	scopes := []string{oidc.ScopeOpenID, "profile"}
	if slices.Contains(doc.Scopes, "groups") {
		scopes = append(scopes, "groups")
	}
	if p.c.NameClaim == "email" {
		scopes = append(scopes, "email")
	}
	for _, s := range p.c.Scopes {
		if !slices.Contains(scopes, s) {
			scopes = append(scopes, s)
		}
	}
	op.oauth = oauth2.Config{ClientID: p.c.ClientID, ClientSecret: p.c.ClientSecret, Endpoint: d.Endpoint(),
		RedirectURL: p.base.String() + "/login/callback", Scopes: scopes}
	// Said, not tried out: trying sends the code a second time. The default is
	// client_secret_basic (OpenID Connect Discovery, section 3).
	op.oauth.Endpoint.AuthStyle = oauth2.AuthStyleInHeader
	if p.c.ClientSecret == "" || len(doc.Methods) > 0 && !slices.Contains(doc.Methods, "client_secret_basic") {
		op.oauth.Endpoint.AuthStyle = oauth2.AuthStyleInParams
	}
	op.verifier = d.Verifier(&oidc.Config{ClientID: p.c.ClientID, SupportedSigningAlgs: op.algs, Now: p.now.now})
	return op, nil
}

// secret returns 256 random bits in base64url, 43 characters.
func secret() string {
	b := make([]byte, 32)
	rand.Read(b) // never fails since Go 1.24
	return base64.RawURLEncoding.EncodeToString(b)
}

// secretForm is the form of what secret returns.
var secretForm = regexp.MustCompile(`\A[A-Za-z0-9_-]{43}\z`)

type hash = [sha256.Size]byte

func hashOf(s string) hash { return sha256.Sum256([]byte(s)) }

// expiring keeps values that are taken once, and for a while. It is full at
// most: then the oldest goes, so that a flood has to outrun those who log in.
type expiring[T any] struct {
	now  clock
	life time.Duration
	most int

	mu    sync.Mutex
	m     map[hash]T
	order []due // as they were put, and so as they end
}

type due struct {
	key hash
	end time.Time
}

// put keeps v and returns the secret that takes it.
func (e *expiring[T]) put(v T) string {
	s := secret()
	now := e.now.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.m == nil {
		e.m = map[hash]T{}
	}
	for len(e.order) > 0 && (len(e.order) >= e.most || !now.Before(e.order[0].end)) {
		delete(e.m, e.order[0].key)
		e.order = e.order[1:]
	}
	e.m[hashOf(s)] = v
	e.order = append(e.order, due{hashOf(s), now.Add(e.life)})
	return s
}

// take returns what s stands for, this once. The lookup is by hash: how long it
// takes says nothing about a secret.
func (e *expiring[T]) take(s string) (T, bool) {
	key := hashOf(s)
	e.mu.Lock()
	defer e.mu.Unlock()
	v, ok := e.m[key]
	if !ok {
		return v, false
	}
	delete(e.m, key)
	i := slices.IndexFunc(e.order, func(d due) bool { return d.key == key })
	end := e.order[i].end
	e.order = slices.Delete(e.order, i, i+1)
	return v, e.now.now().Before(end)
}

// localPath reports whether s is a path of this recorder that a browser cannot
// read as another host's: "//host", "/\host" and control characters, which
// browsers drop, are how others' redirects were opened.
func localPath(s string) bool {
	if len(s) > maxNext || !strings.HasPrefix(s, "/") || strings.Contains(s, `\`) {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	u, err := url.Parse(s)
	return err == nil && u.Scheme == "" && u.Host == "" && u.User == nil && !strings.Contains(u.Path, "//") && !strings.Contains(u.Path, `\`)
}
