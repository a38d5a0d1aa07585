// Package oidcdev is an OpenID provider for development and tests, where a
// person logs in by saying who they are. It is a real one (github.com/zitadel/oidc):
// discovery, the code flow with PKCE, signed ID tokens, keys. Whoever reaches
// it can be any of its users, so it belongs on loopback.
package oidcdev

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// User is somebody who can log in.
type User struct {
	Name   string // preferred_username, and with a prefix the subject
	Groups []string
	Email  string // empty: no such claim
}

// Options of a provider.
type Options struct {
	// Issuer is the URL at which Handler answers, with its path where it has
	// one: http://localhost:8788/dev/oidc.
	Issuer       string
	ClientID     string
	ClientSecret string   // empty: a public client
	RedirectURIs []string // compared as they are
	Users        []User
	// Key signs ID tokens: *rsa.PrivateKey (RS256) or *ecdsa.PrivateKey on
	// P-256 (ES256). nil: a new ES256 key.
	Key crypto.Signer
}

// Provider is an OpenID provider. It keeps everything in memory.
type Provider struct {
	o       Options
	issuer  *url.URL
	storage *storage
	op      *op.Provider
	origins *http.CrossOriginProtection
	csp     string
}

// New returns a provider for one client.
func New(o Options) (*Provider, error) {
	issuer, err := url.Parse(o.Issuer)
	if err != nil || issuer.Host == "" || strings.HasSuffix(o.Issuer, "/") {
		return nil, fmt.Errorf("issuer %q: want a URL without a slash at its end", o.Issuer)
	}
	if o.ClientID == "" || len(o.RedirectURIs) == 0 || len(o.Users) == 0 {
		return nil, errors.New("a provider needs a client, a redirect URI and a user")
	}
	for i, u := range o.Users {
		if u.Name == "" || slices.ContainsFunc(o.Users[:i], func(v User) bool { return v.Name == u.Name }) {
			return nil, fmt.Errorf("users[%d]: the name %q is empty or stands twice", i, u.Name)
		}
	}
	if o.Key == nil {
		if o.Key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, err
		}
	}
	k := key{signer: o.Key}
	switch pub := o.Key.Public().(type) {
	case *rsa.PublicKey:
		k.alg = jose.RS256
	case *ecdsa.PublicKey:
		if pub.Curve != elliptic.P256() {
			return nil, errors.New("an ES256 key is on P-256")
		}
		k.alg = jose.ES256
	default:
		return nil, fmt.Errorf("a key of type %T: want RSA or ECDSA", pub)
	}
	thumb, err := (&jose.JSONWebKey{Key: o.Key.Public()}).Thumbprint(crypto.SHA256) // RFC 7638
	if err != nil {
		return nil, err
	}
	k.id = fmt.Sprintf("%x", thumb[:8])

	p := &Provider{o: o, issuer: issuer, origins: http.NewCrossOriginProtection()}
	p.storage = newStorage(o, k)
	c := &op.Config{CodeMethodS256: true, AuthMethodPost: true,
		SupportedScopes: []string{"openid", "profile", "email", "groups"},
		SupportedClaims: []string{"sub", "iss", "aud", "exp", "iat", "auth_time", "nonce", "azp", "preferred_username", "name", "email", "email_verified", "groups"}}
	rand.Read(c.CryptoKey[:])
	p.op, err = op.NewProvider(c, p.storage, op.StaticIssuer(o.Issuer), op.WithAllowInsecure(), op.WithCORSOptions(nil))
	if err != nil {
		return nil, err
	}
	// Browsers hold form-action against where the answer to a form leads.
	p.csp = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
	for _, s := range o.RedirectURIs {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("redirect URI %q is no absolute URL", s)
		}
		p.csp += " " + u.Scheme + "://" + u.Host
	}
	return p, nil
}

// JWKS returns the provider's public keys, for who verifies its tokens offline.
func (p *Provider) JWKS() []byte {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{p.storage.key.public()}})
	if err != nil {
		panic(err) // a key that New took always marshals
	}
	return b
}

// served are the endpoints that a login needs. The library has more.
var served = []string{"/.well-known/openid-configuration", "/authorize", "/authorize/callback", "/oauth/token", "/keys", "/userinfo"}

// Handler answers under the issuer's path, wherever it is mounted.
func (p *Provider) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Another name for this address is a web page's that had its own name
		// resolve to it, to click here for the person (DNS rebinding).
		if r.Host != p.issuer.Host {
			http.Error(w, "this provider is "+p.o.Issuer, http.StatusMisdirectedRequest)
			return
		}
		path, ok := strings.CutPrefix(r.URL.Path, p.issuer.Path)
		w.Header().Set("Cache-Control", "no-store")
		switch {
		case ok && path == "/login":
			p.login(w, r)
		case ok && slices.Contains(served, path):
			inner := r.Clone(context.WithValue(r.Context(), chi.RouteCtxKey, (*chi.Context)(nil))) // the routes of an outer chi are not its
			inner.URL.Path, inner.URL.RawPath = path, ""
			p.op.ServeHTTP(w, inner)
		default:
			http.NotFound(w, r)
		}
	})
}

var loginPage = template.Must(template.New("login").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Development login</title>
<style>
:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;margin:0}
main{max-width:34rem;margin:12vh auto;padding:0 1.25rem}
button{font:inherit;width:100%;min-height:2.75rem;margin:.25rem 0;padding:.5rem 1rem;text-align:left}
</style>
</head>
<body>
<main>
<h1>Who are you?</h1>
<p>This is the development login: no password, one click. It stands where your identity provider would.</p>
<form method="post" action="{{.Action}}">
<input type="hidden" name="id" value="{{.ID}}">
{{range .Users}}<button type="submit" name="user" value="{{.Name}}">{{.Name}}{{range $i, $g := .Groups}}{{if $i}}, {{else}} · {{end}}{{$g}}{{end}}</button>
{{end}}</form>
</main>
</body>
</html>
`))

// login shows the users (GET), or takes the one that was clicked (POST).
func (p *Provider) login(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", p.csp)
	h.Set("X-Content-Type-Options", "nosniff")
	// Not no-referrer: under that a browser sends a form with Origin: null.
	h.Set("Referrer-Policy", "same-origin")
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		id := r.URL.Query().Get("id")
		if !p.storage.waiting(id) {
			http.Error(w, "no such login: begin it again at the recorder", http.StatusNotFound)
			return
		}
		var b bytes.Buffer
		if err := loginPage.Execute(&b, map[string]any{"Action": p.issuer.Path + "/login", "ID": id, "Users": p.o.Users}); err != nil {
			http.Error(w, "the page could not be made", http.StatusInternalServerError)
			return
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		_, _ = b.WriteTo(w)
	case http.MethodPost:
		if err := p.origins.Check(r); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
		if err := r.ParseForm(); err != nil {
			http.Error(w, "not a form", http.StatusBadRequest)
			return
		}
		id := r.PostForm.Get("id")
		if !p.storage.complete(id, r.PostForm.Get("user"), time.Now()) {
			http.Error(w, "no such login or no such user: begin it again at the recorder", http.StatusNotFound)
			return
		}
		http.Redirect(w, r, p.o.Issuer+"/authorize/callback?id="+url.QueryEscape(id), http.StatusSeeOther)
	default:
		h.Set("Allow", "GET, HEAD, POST")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}
}
