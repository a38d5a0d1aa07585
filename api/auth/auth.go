// Package auth says who is calling: API tokens kept as hashes, OIDC tokens of
// orchestrators, client certificates of writers, and people who log in. It also
// puts on record who was refused.
package auth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// Role is what a caller is to this program. Every token has exactly one; a
// person who is logged in may have several.
type Role string

// The roles.
const (
	Orchestrator   Role = "orchestrator"    // asks for credentials
	Writer         Role = "writer"          // a broker or gateway, at the recorder
	Reviewer       Role = "reviewer"        // reads the record
	Responder      Role = "responder"       // holds the kill switch
	Approver       Role = "approver"        // decides
	ResourceServer Role = "resource-server" // introspects tokens
)

// Roles lists all roles.
var Roles = []Role{Orchestrator, Writer, Reviewer, Responder, Approver, ResourceServer}

// Valid reports whether r is a role.
func (r Role) Valid() bool { return slices.Contains(Roles, r) }

// Principal is an authenticated caller.
type Principal struct {
	Name   string
	Role   Role     // behind Require: the one that let the caller through
	Roles  []Role   // all roles of a person who is logged in; nil: Role alone
	Method string   // token, oidc, mtls or session
	Groups []string // of an approver or responder
	Owners []string // people who own an orchestrator, as "user:NAME"
}

// personPrefix is before the name of a person where others might stand.
const personPrefix = "user:"

// Person is p as entries and rules name a person: "user:NAME".
func (p *Principal) Person() string { return personPrefix + p.Name }

// Has reports whether p has role.
func (p *Principal) Has(role Role) bool {
	return p.Role == role || slices.Contains(p.Roles, role)
}

// Agent is p as an entry names who acted: a SPIFFE ID in trustDomain.
func (p *Principal) Agent(trustDomain string) string {
	return "spiffe://" + trustDomain + "/" + string(p.Role) + "/" + p.Name
}

// ErrUnauthenticated is wrapped by every reason not to know a caller. The
// reason is for the log; the caller is told nothing of it.
var ErrUnauthenticated = errors.New("unauthenticated")

func unauthenticated(format string, a ...any) error {
	return fmt.Errorf("%w: %w", ErrUnauthenticated, fmt.Errorf(format, a...))
}

// Guard stands before the routes of one listener.
type Guard struct {
	Tokens   *Tokens      // nil: no API tokens
	OIDC     *Issuers     // nil: no OIDC tokens
	Certs    *ClientCerts // nil: no client certificates
	People   *People      // nil: nobody logs in here
	Refusals *Refusals    // nil: refusals are logged alone
	Log      *zap.Logger  // nil: the request's logger
}

type principalKey struct{}

// From returns the caller that Require let through, or nil.
func From(ctx context.Context) *Principal {
	p, _ := ctx.Value(principalKey{}).(*Principal)
	return p
}

// NewContext returns ctx with p as its caller.
func NewContext(ctx context.Context, p *Principal) context.Context {
	return context.WithValue(ctx, principalKey{}, p)
}

// Authenticate says who sent r. The error wraps ErrUnauthenticated, or
// ErrForgery beside whose session it was, unless what is needed to tell could
// not be read.
func (g *Guard) Authenticate(r *http.Request) (*Principal, error) {
	if g.Certs == nil || r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return g.byToken(r)
	}
	// A certificate counts beside a token, too: who shows both is one caller.
	c, err := g.Certs.principal(r.TLS.PeerCertificates)
	if err != nil {
		return nil, err
	}
	p, err := g.byToken(r)
	switch {
	case errors.Is(err, errNoCredential):
		return c, nil
	case err == nil && (p.Name != c.Name || !p.Has(c.Role)):
		return nil, unauthenticated("the certificate is %s %q's, the token %s %q's", c.Role, c.Name, p.Role, p.Name)
	}
	return p, err
}

// errNoCredential is why a caller without token and session is not known.
var errNoCredential = errors.New("no credential")

// byToken is Authenticate by token or session alone.
func (g *Guard) byToken(r *http.Request) (*Principal, error) {
	token, err := bearer(r.Header)
	if err != nil {
		return nil, err
	}
	if token == "" && g.People != nil {
		if p, err := g.People.byCookie(r); p != nil {
			return p, err
		}
	}
	switch {
	case token == "":
		return nil, unauthenticated("%w", errNoCredential)
	case strings.HasPrefix(token, tokenPrefix):
		if g.Tokens == nil {
			return nil, unauthenticated("this listener takes no API tokens")
		}
		return g.Tokens.Authenticate(token)
	case g.People != nil && strings.HasPrefix(token, sessionPrefix):
		return g.People.byToken(token)
	case g.OIDC != nil:
		return g.OIDC.Authenticate(r.Context(), token)
	}
	return nil, unauthenticated("the token is of no known form")
}

// bearer returns the token of h's Authorization header (RFC 6750, section 2.1),
// or "" where there is no such header.
func bearer(h http.Header) (string, error) {
	values := h.Values("Authorization")
	switch len(values) {
	case 0:
		return "", nil
	case 1:
	default:
		return "", unauthenticated("%d Authorization headers", len(values))
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") || !isToken68(token) {
		return "", unauthenticated("the Authorization header is not a bearer token")
	}
	return token, nil
}

// isToken68 checks s against b64token of RFC 6750.
func isToken68(s string) bool {
	body := strings.TrimRight(s, "=")
	return body != "" && strings.Trim(body, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/") == ""
}

// Require lets through callers who have one of roles. Others get 401 or 403,
// and the attempt goes on record first.
func (g *Guard) Require(roles ...Role) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p, err := g.Authenticate(r)
			switch {
			case errors.Is(err, ErrUnauthenticated):
				g.refuse(w, r, nil, problem.Unauthenticated().Because(err))
				return
			case errors.Is(err, ErrForgery):
				g.refuse(w, r, p, problem.RoleForbidden(ErrForgery.Error()).Because(err))
				return
			case err != nil:
				problem.Write(w, r, problem.StateUnavailable().Because(fmt.Errorf("authenticating: %w", err)))
				return
			}
			i := slices.IndexFunc(roles, p.Has)
			if i < 0 {
				g.refuse(w, r, p, problem.RoleForbidden("this call is not for the role "+string(p.Role)))
				return
			}
			p.Role = roles[i]
			next.ServeHTTP(w, r.WithContext(NewContext(r.Context(), p)))
		})
	}
}

// Refuse answers r, whose caller Require let through, with doc and puts the
// attempt on record: for refusals that depend on more than the role.
func (g *Guard) Refuse(w http.ResponseWriter, r *http.Request, doc *problem.Problem) {
	g.refuse(w, r, From(r.Context()), doc)
}

func (g *Guard) refuse(w http.ResponseWriter, r *http.Request, p *Principal, doc *problem.Problem) {
	log := g.Log
	if log == nil {
		log = problem.Logger(r.Context())
	}
	d := store.RefusedDetails{Method: method(r.Method), Route: route(r), Problem: doc.Slug(), Remote: remote(r)}
	name := ""
	if p != nil {
		d.Role, name = string(p.Role), p.Name
	}
	log.Info("refused", zap.String("method", d.Method), zap.String("route", d.Route), zap.String("problem", d.Problem),
		zap.String("role", d.Role), zap.String("name", name), zap.String("remote", d.Remote), zap.NamedError("because", doc.Unwrap()))
	if g.Refusals != nil {
		g.Refusals.Add(r.Context(), p, d)
	}
	if g.People != nil && wantsPage(r) {
		writeErrorPage(w, r, doc)
		return
	}
	problem.Write(w, r, doc)
}

// method keeps what a caller may invent as a method out of the record.
func method(m string) string {
	switch m {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return m
	}
	return "OTHER"
}

// route is the pattern that r matched: the path itself may hold anything.
func route(r *http.Request) string {
	if c := chi.RouteContext(r.Context()); c != nil {
		if p := c.RoutePattern(); p != "" {
			return p
		}
	}
	return "unknown"
}

func remote(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	return host
}

// clock is the current time, injected by tests.
type clock func() time.Time

func (c clock) now() time.Time {
	if c == nil {
		return time.Now()
	}
	return c()
}
