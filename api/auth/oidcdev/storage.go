package oidcdev

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

const (
	requestLife = 10 * time.Minute // from authorize to token
	tokenLife   = 5 * time.Minute  // of ID and access tokens
	maxRequests = 1000             // under way; then the oldest goes
)

// key signs ID tokens. It is the library's op.SigningKey and, without its
// private half, op.Key.
type key struct {
	id     string
	alg    jose.SignatureAlgorithm
	signer crypto.Signer
}

func (k key) ID() string                                  { return k.id }
func (k key) SignatureAlgorithm() jose.SignatureAlgorithm { return k.alg }
func (k key) Key() any                                    { return k.signer }

func (k key) public() jose.JSONWebKey {
	return jose.JSONWebKey{KeyID: k.id, Algorithm: string(k.alg), Use: "sig", Key: k.signer.Public()}
}

type publicKey struct{ key }

func (k publicKey) Algorithm() jose.SignatureAlgorithm { return k.alg }
func (k publicKey) Use() string                        { return "sig" }
func (k publicKey) Key() any                           { return k.signer.Public() }

// request is one login under way: the library's op.AuthRequest.
type request struct {
	*oidc.AuthRequest
	id    string
	begun time.Time
	user  *User // nil until the click
	at    time.Time
}

func (r request) GetID() string                      { return r.id }
func (r request) GetACR() string                     { return "" }
func (r request) GetAMR() []string                   { return nil }
func (r request) GetAudience() []string              { return []string{r.ClientID} }
func (r request) GetAuthTime() time.Time             { return r.at }
func (r request) GetClientID() string                { return r.ClientID }
func (r request) GetNonce() string                   { return r.Nonce }
func (r request) GetRedirectURI() string             { return r.RedirectURI }
func (r request) GetScopes() []string                { return r.Scopes }
func (r request) GetState() string                   { return r.State }
func (r request) Done() bool                         { return r.user != nil }
func (r request) GetSubject() string                 { return subject(r.user) }
func (r request) GetResponseMode() oidc.ResponseMode { return r.ResponseMode }
func (r request) GetResponseType() oidc.ResponseType { return r.ResponseType }
func (r request) GetCodeChallenge() *oidc.CodeChallenge {
	return &oidc.CodeChallenge{Challenge: r.CodeChallenge, Method: r.CodeChallengeMethod}
}

func subject(u *User) string {
	if u == nil {
		return ""
	}
	return "dev|" + u.Name
}

// client is the one client: the library's op.Client.
type client struct{ o *Options }

func (c client) GetID() string                       { return c.o.ClientID }
func (c client) RedirectURIs() []string              { return c.o.RedirectURIs }
func (c client) PostLogoutRedirectURIs() []string    { return nil }
func (c client) ApplicationType() op.ApplicationType { return op.ApplicationTypeWeb }
func (c client) ResponseTypes() []oidc.ResponseType {
	return []oidc.ResponseType{oidc.ResponseTypeCode}
}
func (c client) GrantTypes() []oidc.GrantType         { return []oidc.GrantType{oidc.GrantTypeCode} }
func (c client) AccessTokenType() op.AccessTokenType  { return op.AccessTokenTypeBearer }
func (c client) IDTokenLifetime() time.Duration       { return tokenLife }
func (c client) DevMode() bool                        { return false }
func (c client) IsScopeAllowed(scope string) bool     { return scope == "groups" }
func (c client) IDTokenUserinfoClaimsAssertion() bool { return true } // no second call for the claims
func (c client) ClockSkew() time.Duration             { return 0 }
func (c client) LoginURL(id string) string            { return c.o.Issuer + "/login?id=" + id }

func (c client) AuthMethod() oidc.AuthMethod {
	if c.o.ClientSecret == "" {
		return oidc.AuthMethodNone
	}
	return oidc.AuthMethodBasic
}

func (c client) RestrictAdditionalIdTokenScopes() func([]string) []string {
	return func(scopes []string) []string { return scopes }
}

func (c client) RestrictAdditionalAccessTokenScopes() func([]string) []string {
	return func(scopes []string) []string { return scopes }
}

// storage is the library's op.Storage, in memory.
type storage struct {
	o   *Options
	key key

	mu       sync.Mutex
	requests map[string]*request // by ID
	codes    map[string]string   // ID by code
	tokens   map[string]*access  // by ID of the access token
}

// access is what an access token gives access to: the user's claims.
type access struct {
	subject string
	scopes  []string
	end     time.Time
}

func newStorage(o Options, k key) *storage {
	return &storage{o: &o, key: k, requests: map[string]*request{}, codes: map[string]string{}, tokens: map[string]*access{}}
}

var errNone = errors.New("there is none")

// tidy forgets what is over, and the oldest login when there are too many. The
// caller holds mu.
func (s *storage) tidy(now time.Time) {
	var oldest *request
	for id, r := range s.requests {
		if now.Sub(r.begun) > requestLife {
			delete(s.requests, id)
		} else if oldest == nil || r.begun.Before(oldest.begun) {
			oldest = r
		}
	}
	if len(s.requests) >= maxRequests {
		delete(s.requests, oldest.id)
	}
	for code, id := range s.codes {
		if s.requests[id] == nil {
			delete(s.codes, code)
		}
	}
	for id, t := range s.tokens {
		if now.After(t.end) {
			delete(s.tokens, id)
		}
	}
}

// CreateAuthRequest takes a login that asks for PKCE with S256, and no other.
// Nobody is logged in here already: every login is a click, so prompt=login
// and max_age are always met, and prompt=none never is.
func (s *storage) CreateAuthRequest(_ context.Context, a *oidc.AuthRequest, _ string) (op.AuthRequest, error) {
	switch {
	case a.CodeChallenge == "" || a.CodeChallengeMethod != oidc.CodeChallengeMethodS256:
		return nil, oidc.ErrInvalidRequest().WithDescription("code_challenge with method S256 is required")
	case slices.Contains(a.Prompt, oidc.PromptNone):
		return nil, oidc.ErrLoginRequired()
	case len(a.State) > 4096 || len(a.Nonce) > 4096 || len(a.CodeChallenge) > 128:
		return nil, oidc.ErrInvalidRequest().WithDescription("a parameter is too long")
	}
	kept := *a
	r := &request{AuthRequest: &kept, id: rand.Text(), begun: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tidy(r.begun)
	s.requests[r.id] = r
	return *r, nil
}

// waiting reports whether the login is there and waits for its click.
func (s *storage) waiting(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests[id]
	return r != nil && r.user == nil && time.Since(r.begun) <= requestLife
}

// complete says who logged in, once.
func (s *storage) complete(id, user string, now time.Time) bool {
	i := slices.IndexFunc(s.o.Users, func(u User) bool { return u.Name == user })
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests[id]
	if i < 0 || r == nil || r.user != nil || now.Sub(r.begun) > requestLife {
		return false
	}
	r.user, r.at = &s.o.Users[i], now
	return true
}

func (s *storage) AuthRequestByID(_ context.Context, id string) (op.AuthRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests[id]
	if r == nil || time.Since(r.begun) > requestLife {
		return nil, errNone
	}
	return *r, nil
}

// AuthRequestByCode uses the code up, also where the exchange then fails
// (RFC 6749, section 4.1.2).
func (s *storage) AuthRequestByCode(ctx context.Context, code string) (op.AuthRequest, error) {
	s.mu.Lock()
	id, ok := s.codes[code]
	delete(s.codes, code)
	s.mu.Unlock()
	if !ok {
		return nil, errNone
	}
	return s.AuthRequestByID(ctx, id)
}

func (s *storage) SaveAuthCode(_ context.Context, id, code string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.codes {
		if other == id {
			return errors.New("this login has its code") // one click, one code
		}
	}
	s.codes[code] = id
	return nil
}

func (s *storage) DeleteAuthRequest(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.requests, id)
	return nil
}

func (s *storage) CreateAccessToken(_ context.Context, r op.TokenRequest) (string, time.Time, error) {
	id, end := rand.Text(), time.Now().Add(tokenLife)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[id] = &access{subject: r.GetSubject(), scopes: r.GetScopes(), end: end}
	return id, end, nil
}

func (s *storage) SetUserinfoFromScopes(context.Context, *oidc.UserInfo, string, string, []string) error {
	return nil // the library's older way; SetUserinfoFromRequest does it
}

// SetUserinfoFromRequest puts the user's claims into the ID token.
func (s *storage) SetUserinfoFromRequest(_ context.Context, info *oidc.UserInfo, r op.IDTokenRequest, scopes []string) error {
	return s.claims(info, r.GetSubject(), scopes)
}

// SetUserinfoFromToken answers the userinfo endpoint.
func (s *storage) SetUserinfoFromToken(_ context.Context, info *oidc.UserInfo, id, subject, _ string) error {
	s.mu.Lock()
	t := s.tokens[id]
	s.mu.Unlock()
	if t == nil || t.subject != subject || time.Now().After(t.end) {
		return errNone
	}
	return s.claims(info, subject, t.scopes)
}

func (s *storage) claims(info *oidc.UserInfo, sub string, scopes []string) error {
	i := slices.IndexFunc(s.o.Users, func(u User) bool { return subject(&u) == sub })
	if i < 0 {
		return errNone
	}
	u := s.o.Users[i]
	info.Subject = sub
	for _, scope := range scopes {
		switch scope {
		case oidc.ScopeProfile:
			info.PreferredUsername, info.Name = u.Name, u.Name
		case oidc.ScopeEmail:
			if u.Email != "" {
				info.Email, info.EmailVerified = u.Email, true
			}
		case "groups":
			info.AppendClaims("groups", append([]string{}, u.Groups...))
		}
	}
	return nil
}

func (s *storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if id != s.o.ClientID {
		return nil, errNone
	}
	return client{s.o}, nil
}

func (s *storage) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	if id != s.o.ClientID || subtle.ConstantTimeCompare([]byte(secret), []byte(s.o.ClientSecret)) != 1 {
		return errors.New("the client ID or its secret is wrong")
	}
	return nil
}

func (s *storage) SigningKey(context.Context) (op.SigningKey, error) { return s.key, nil }
func (s *storage) KeySet(context.Context) ([]op.Key, error)          { return []op.Key{publicKey{s.key}}, nil }
func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{s.key.alg}, nil
}
func (s *storage) Health(context.Context) error { return nil }

// What follows is of flows that this provider does not offer: refresh tokens,
// revocation, introspection, JWT grants. Handler serves none of their endpoints.

var errNotOffered = errors.New("this provider does not offer that")

func (s *storage) CreateAccessAndRefreshTokens(context.Context, op.TokenRequest, string) (string, string, time.Time, error) {
	return "", "", time.Time{}, errNotOffered
}

func (s *storage) TokenRequestByRefreshToken(context.Context, string) (op.RefreshTokenRequest, error) {
	return nil, errNotOffered
}

func (s *storage) TerminateSession(context.Context, string, string) error { return errNotOffered }

func (s *storage) RevokeToken(context.Context, string, string, string) *oidc.Error {
	return oidc.ErrInvalidRequest().WithDescription("%s", errNotOffered)
}

func (s *storage) GetRefreshTokenInfo(context.Context, string, string) (string, string, error) {
	return "", "", op.ErrInvalidRefreshToken
}

func (s *storage) SetIntrospectionFromToken(context.Context, *oidc.IntrospectionResponse, string, string, string) error {
	return errNotOffered
}

func (s *storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, errNotOffered
}

func (s *storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, errNotOffered
}

func (s *storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, errNotOffered
}
