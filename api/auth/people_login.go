package auth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"
	"golang.org/x/oauth2"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// login is one login under way, between the way to the provider and the way
// back. It is known by its state, and bound to the browser that began it.
type login struct {
	browser  hash // of the cookie
	nonce    string
	verifier string // PKCE, RFC 7636
	next     string
	fresh    *freshLogin // nil: an ordinary login
}

// freshLogin is what makes a login a fresh one, which begins no session.
type freshLogin struct {
	session hash // whose it is
	data    any
}

// errProvider is wrapped by errors that are the provider's, not the person's.
var errProvider = errors.New("the identity provider does not answer")

// ToLogin sends people who ask for a page and are not logged in to the login,
// and from there back to the page. Everyone else goes on to next, which still
// has to say who may see it.
func (p *People) ToLogin(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if (r.Method == http.MethodGet || r.Method == http.MethodHead) && wantsPage(r) && r.Header.Get("Authorization") == "" {
			if _, ok := p.session(r, false); !ok {
				p.goLogin(w, r)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// goLogin sends the browser to the login and back here.
func (p *People) goLogin(w http.ResponseWriter, r *http.Request) {
	to := "/login"
	if here := r.URL.RequestURI(); localPath(here) {
		to += "?next=" + url.QueryEscape(here)
	}
	redirect(w, r, p.base.String()+to)
}

// redirect sends the browser on with a GET.
func redirect(w http.ResponseWriter, r *http.Request, to string) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// home sends a browser that came by another name of this computer (127.0.0.1
// for localhost) to the one that cookies and the provider know. With https a
// proxy may have changed the name on the way, and there is one name.
func (p *People) home(w http.ResponseWriter, r *http.Request) bool {
	if p.secure || r.Host == p.base.Host {
		return true
	}
	redirect(w, r, p.base.String()+r.URL.RequestURI())
	return false
}

// begin sends the browser to the provider.
func (p *People) begin(w http.ResponseWriter, r *http.Request) {
	if !p.home(w, r) {
		return
	}
	next := "/"
	if r.URL.Query().Has("next") {
		next = r.URL.Query().Get("next")
	}
	if !localPath(next) {
		p.refuse(w, r, problem.Malformed("next is not a path of this recorder"))
		return
	}
	if _, ok := p.session(r, true); ok {
		redirect(w, r, next)
		return
	}
	to, err := p.start(w, r, &login{nonce: secret(), next: next})
	if err != nil {
		p.refuse(w, r, because(err))
		return
	}
	redirect(w, r, to)
}

// start keeps l and returns where the browser goes for it.
func (p *People) start(w http.ResponseWriter, r *http.Request, l *login) (string, error) {
	op, err := p.discover()
	if err != nil {
		return "", fmt.Errorf("%w: %w", errProvider, err)
	}
	// One cookie for all tabs of a browser: what tells logins apart is the state.
	browser := p.cookieValue(r, "login")
	if browser == "" {
		browser = secret()
	}
	p.setCookie(w, "login", browser, int(p.pending.life/time.Second))
	l.browser, l.verifier = hashOf(browser), oauth2.GenerateVerifier()
	opts := []oauth2.AuthCodeOption{oidc.Nonce(l.nonce), oauth2.S256ChallengeOption(l.verifier)}
	if l.fresh != nil {
		// OpenID Connect Core, section 3.1.2.1. A provider that ignores both is
		// found out by auth_time.
		opts = append(opts, oauth2.SetAuthURLParam("prompt", "login"), oauth2.SetAuthURLParam("max_age", "0"))
	}
	return op.oauth.AuthCodeURL(p.pending.put(l), opts...), nil
}

// Fresh has the person who is logged in with r log in once more, in a login
// whose ID token carries nonce. OnFresh gets it; then the browser goes on to
// next, a path of this recorder. A browser gets a page that leads on (a
// redirect would fall under the form-action of the page that sent the form),
// a script {"location":"..."}.
//
// It is called from a handler behind Guard.Require, by POST: the session's
// CSRF token has been checked there.
func (p *People) Fresh(w http.ResponseWriter, r *http.Request, nonce, next string, data any) {
	s, ok := p.session(r, true)
	switch {
	case !ok:
		p.refuse(w, r, problem.Unauthenticated().Because(errors.New("a fresh login needs a browser's session")))
		return
	case len(nonce) < 32 || len(nonce) > 256 || !isToken68(nonce):
		problem.Write(w, r, problem.Internal(fmt.Errorf("a fresh login's nonce of %d bytes: want 32 to 256 of base64url", len(nonce))))
		return
	case !localPath(next):
		p.refuse(w, r, problem.Malformed("next is not a path of this recorder"))
		return
	}
	to, err := p.start(w, r, &login{nonce: nonce, next: next, fresh: &freshLogin{session: s.key, data: data}})
	if err != nil {
		p.refuse(w, r, because(err))
		return
	}
	if wantsPage(r) {
		writePage(w, r, http.StatusOK, page{Title: "Log in again", Text: "Your identity provider will ask you to log in once more.", Link: to, Label: "Continue", Refresh: true})
		return
	}
	writeJSON(w, map[string]string{"location": to})
}

// callback is where the provider sends the browser back to.
func (p *People) callback(w http.ResponseWriter, r *http.Request) {
	to, err := p.finish(w, r)
	if err != nil {
		p.refuse(w, r, because(err))
		return
	}
	redirect(w, r, to)
}

// because is the problem that err is to whoever logs in: what is wrong with a
// login is for the log.
func because(err error) *problem.Problem {
	var doc *problem.Problem
	switch {
	case errors.As(err, &doc):
		return doc
	case errors.Is(err, errProvider):
		doc = problem.StateUnavailable()
		doc.Detail = errProvider.Error() + ": try again in a moment"
	default:
		doc = problem.Unauthenticated()
		doc.Detail = "the login was not completed: begin it again"
	}
	return doc.Because(err)
}

func (p *People) finish(w http.ResponseWriter, r *http.Request) (string, error) {
	q := r.URL.Query()
	for _, name := range []string{"state", "code", "iss", "error"} {
		if len(q[name]) > 1 {
			return "", fmt.Errorf("%s stands %d times", name, len(q[name]))
		}
	}
	l, ok := p.pending.take(q.Get("state")) // used up, whatever comes of it
	if !ok {
		return "", errors.New("no login with this state is under way: it never was, is over, or took too long")
	}
	if browser := p.cookieValue(r, "login"); browser == "" || hashOf(browser) != l.browser {
		return "", errors.New("the login was begun in another browser")
	}
	// RFC 9207: an answer that names its issuer names ours.
	if q.Has("iss") && q.Get("iss") != p.c.Issuer {
		return "", errors.New("the answer is another issuer's")
	}
	if q.Has("error") {
		return "", fmt.Errorf("the provider answered %.64q", q.Get("error"))
	}
	if q.Get("code") == "" || len(q.Get("code")) > maxNext {
		return "", errors.New("the answer has no code")
	}
	op, err := p.discover()
	if err != nil {
		return "", fmt.Errorf("%w: %w", errProvider, err)
	}
	ctx, cancel := context.WithTimeout(oidc.ClientContext(r.Context(), p.client), 10*time.Second)
	defer cancel()
	tokens, err := op.oauth.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(l.verifier))
	if err != nil {
		var answer *oauth2.RetrieveError
		if !errors.As(err, &answer) {
			return "", fmt.Errorf("%w: exchanging the code: %w", errProvider, err)
		}
		// Its text holds the whole answer, which is not for the log.
		return "", fmt.Errorf("the provider refused the code: HTTP %d, %.64q", answer.Response.StatusCode, answer.ErrorCode)
	}
	raw, ok := tokens.Extra("id_token").(string)
	if !ok {
		return "", errors.New("the provider gave no ID token")
	}
	person, subject, issued, err := p.identify(ctx, op, raw, l.nonce)
	if err != nil {
		return "", err
	}
	if l.fresh != nil {
		return p.finishFresh(ctx, r, op, l, raw, person, subject, issued)
	}
	// A new session has a new ID, whatever the browser sent: one that somebody
	// else knew beforehand stays theirs, and empty. The one there was is over.
	if old, ok := p.session(r, false); ok {
		p.Sessions.revoke(old.key)
	}
	opener, _ := p.Sessions.begin("", session{person: person, subject: subject, csrf: secret()}, time.Time{})
	p.setCookie(w, "session", opener, 0)
	p.log.Info("logged in", zap.String("person", person.Name), zap.Strings("groups", person.Groups))
	if p.OnLogin != nil {
		p.OnLogin(ctx, person)
	}
	return l.next, nil
}

// identify verifies the ID token (OpenID Connect Core, section 3.1.3.7) and
// says whose it is, by which subject, and when it was issued.
func (p *People) identify(ctx context.Context, op *provider, raw, nonce string) (_ Person, subject string, issued time.Time, err error) {
	fail := func(format string, a ...any) (Person, string, time.Time, error) {
		return Person{}, "", time.Time{}, fmt.Errorf("ID token: "+format, a...)
	}
	if len(raw) > maxIDToken {
		return fail("%d bytes, at most %d", len(raw), maxIDToken)
	}
	token, err := op.verifier.Verify(ctx, raw)
	if err != nil {
		return fail("%w", err)
	}
	var payload jsontext.Value
	if err := token.Claims(&payload); err != nil {
		return fail("%w", err)
	}
	// Strict: a claim that stands twice means one thing here and another elsewhere.
	var claims map[string]jsontext.Value
	if err := json.Unmarshal(payload, &claims); err != nil {
		return fail("%w", err)
	}
	now := p.now.now()
	azp, hasAZP := text(claims["azp"])
	switch {
	case token.Issuer != p.c.Issuer: // the library takes two spellings of one provider's
		return fail("the issuer is not %s", p.c.Issuer)
	case token.Nonce == "" || token.Nonce != nonce:
		return fail("the nonce is another login's")
	case !now.Before(token.Expiry):
		return fail("it has expired")
	case claims["azp"] != nil && (!hasAZP || azp != p.c.ClientID):
		return fail("it was issued to another client (azp)")
	case len(token.Audience) > 1 && !hasAZP:
		return fail("it has several audiences and does not say for which it was issued (azp)")
	case token.Subject == "" || len(token.Subject) > 255:
		return fail("the subject is empty or longer than 255")
	case token.IssuedAt.Unix() <= 0:
		return fail("it does not say when it was issued")
	case token.IssuedAt.After(now.Add(leeway)):
		return fail("it was issued in the future")
	}
	if b, ok := claims["nbf"]; ok {
		nbf, err := numericDate(b)
		if err != nil || nbf.After(now.Add(leeway)) {
			return fail("it is not valid yet")
		}
	}
	who, err := p.person(claims)
	if err != nil {
		return fail("%w", err)
	}
	return who, token.Subject, token.IssuedAt, nil
}

// person reads who it is from an ID token's verified claims.
func (p *People) person(claims map[string]jsontext.Value) (Person, error) {
	name, ok := text(claims[p.c.NameClaim])
	if !ok || !personNames.MatchString(name) {
		return Person{}, fmt.Errorf("claim %q does not name a person: want letters, digits, '.', '_', '-' and '@', at most 128, the first a letter or digit", p.c.NameClaim)
	}
	if p.c.NameClaim == "email" && string(claims["email_verified"]) != "true" {
		return Person{}, errors.New("the provider has not verified the email")
	}
	who := Person{Name: personPrefix + name, Roles: []Role{Approver}}
	if b, ok := claims["auth_time"]; ok {
		at, err := numericDate(b)
		if err != nil {
			return Person{}, fmt.Errorf("claim auth_time: %w", err)
		}
		who.AuthTime = at
	}
	var groups []string
	if one, ok := text(claims[p.c.GroupsClaim]); ok {
		groups = []string{one}
	} else if b, ok := claims[p.c.GroupsClaim]; ok {
		if err := json.Unmarshal(b, &groups); err != nil {
			return Person{}, fmt.Errorf("claim %q is not a list of names", p.c.GroupsClaim)
		}
	}
	if len(groups) > maxGroups {
		return Person{}, fmt.Errorf("%d groups, at most %d", len(groups), maxGroups)
	}
	// No rule names a group of another form, so such a one is nothing lost.
	groups = slices.DeleteFunc(groups, func(g string) bool { return !groupNames.MatchString(g) })
	slices.Sort(groups)
	who.Groups = slices.Compact(groups)
	for _, role := range []Role{Reviewer, Responder} {
		if slices.ContainsFunc(p.c.Roles[role], func(g string) bool { return slices.Contains(who.Groups, g) }) {
			who.Roles = append(who.Roles, role)
		}
	}
	return who, nil
}

// numericDate reads a NumericDate (RFC 7519, section 2).
func numericDate(b jsontext.Value) (time.Time, error) {
	var sec float64
	if err := json.Unmarshal(b, &sec); err != nil || sec < 0 || sec > 1<<40 {
		return time.Time{}, errors.New("not a time in seconds")
	}
	return time.Unix(int64(sec), 0).UTC(), nil
}

// finishFresh hands a fresh login to OnFresh.
func (p *People) finishFresh(ctx context.Context, r *http.Request, op *provider, l *login, raw string, person Person, subject string, issued time.Time) (string, error) {
	now := p.now.now()
	s, ok := p.session(r, true)
	switch {
	case !ok || s.key != l.fresh.session:
		return "", errors.New("the session that asked for the fresh login is over")
	case s.person.Name != person.Name || s.subject != subject:
		return "", problem.RoleForbidden("you logged in again as somebody else").Because(fmt.Errorf("%s for %s", person.Name, s.person.Name))
	case person.AuthTime.IsZero():
		return "", errors.New("the provider does not say when the person logged in (auth_time)")
	case now.Sub(person.AuthTime) > freshLife || person.AuthTime.After(now.Add(leeway)):
		return "", errors.New("the login is not a fresh one (auth_time)")
	case now.Sub(issued) > freshLife:
		return "", errors.New("the ID token is not a fresh one (iat)")
	case p.OnFresh == nil:
		return "", problem.Internal(errors.New("a fresh login that nobody takes"))
	}
	key, err := p.verifiedBy(ctx, op, raw)
	if err != nil {
		return "", err
	}
	to, err := p.OnFresh(r.Context(), Fresh{Person: person, Nonce: l.nonce, IDToken: raw, JWK: key, Issuer: p.c.Issuer, ClientID: p.c.ClientID, Data: l.fresh.data})
	if err != nil {
		return "", problem.From(err)
	}
	if to == "" {
		to = l.next
	}
	if !localPath(to) {
		return "", problem.Internal(errors.New("a fresh login was to lead to another host"))
	}
	return to, nil
}

// verifiedBy returns which of the provider's keys verifies raw, as JSON. The
// library, which verified it, does not say.
func (p *People) verifiedBy(ctx context.Context, op *provider, raw string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, op.jwks, nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: its keys: %w", errProvider, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: its keys: HTTP %d", errProvider, resp.StatusCode)
	}
	b, err := io.ReadAll(resp.Body) // bounded by the client
	if err != nil {
		return nil, fmt.Errorf("%w: its keys: %w", errProvider, err)
	}
	return keyOf(b, raw, op.algs)
}

// keyOf returns which key of a JWK set verifies a compact JWT, as JSON.
func keyOf(set []byte, raw string, algs []string) ([]byte, error) {
	var keys struct {
		Keys []jsontext.Value `json:"keys"` // one of a kind we do not know is no reason to know none
	}
	if err := json.Unmarshal(set, &keys); err != nil {
		return nil, errors.New("the provider's keys are not a JWK set (RFC 7517)")
	}
	allowed := make([]jose.SignatureAlgorithm, len(algs))
	for i, a := range algs {
		allowed[i] = jose.SignatureAlgorithm(a)
	}
	jws, err := jose.ParseSignedCompact(raw, allowed)
	if err != nil {
		return nil, fmt.Errorf("ID token: %w", err)
	}
	header := jws.Signatures[0].Header
	for _, b := range keys.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(b) != nil || !k.Valid() || header.KeyID != "" && k.KeyID != header.KeyID {
			continue
		}
		k = k.Public() // not valid for a symmetric key
		if !k.Valid() {
			continue
		}
		if _, err := jws.Verify(&k); err == nil {
			return k.MarshalJSON()
		}
	}
	return nil, errors.New("none of the provider's keys verifies the ID token any more")
}

// logout ends the session that r came with, or, with everywhere=true, every
// session of its person: what somebody does whose laptop is gone.
func (p *People) logout(w http.ResponseWriter, r *http.Request) {
	if token, err := bearer(r.Header); err == nil && token != "" {
		s, ok := p.Sessions.get(token, false)
		if !ok || !s.terminal {
			p.refuse(w, r, problem.Unauthenticated())
			return
		}
		p.end(r, s)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	s, ok := p.session(r, false)
	if ok {
		if err := p.genuine(r, s); err != nil {
			p.refuse(w, r, problem.RoleForbidden(ErrForgery.Error()).Because(err))
			return
		}
		p.end(r, s)
	}
	p.setCookie(w, "session", "", -1)
	if wantsPage(r) {
		writePage(w, r, http.StatusOK, page{Title: "You are logged out", Link: "/login", Label: "Log in again"})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (p *People) end(r *http.Request, s session) {
	if r.FormValue("everywhere") == "true" {
		n := p.Sessions.RevokePerson(s.person.Name)
		p.log.Info("logged out everywhere", zap.String("person", s.person.Name), zap.Int("sessions", n))
		return
	}
	p.Sessions.revoke(s.key)
}

// refuse answers r with doc, as a page where the caller shows pages, and puts
// the attempt on record where it says something about who made it.
func (p *People) refuse(w http.ResponseWriter, r *http.Request, doc *problem.Problem) {
	d := store.RefusedDetails{Method: method(r.Method), Route: route(r), Problem: doc.Slug(), Remote: remote(r)}
	p.log.Info("refused", zap.String("route", d.Route), zap.String("problem", d.Problem), zap.String("remote", d.Remote),
		zap.NamedError("because", doc.Unwrap()))
	if p.c.Refusals != nil && (doc.Status == http.StatusUnauthorized || doc.Status == http.StatusForbidden) {
		who := (*Principal)(nil)
		if s, ok := p.session(r, false); ok {
			who = s.principal()
			d.Role = string(who.Role)
		}
		p.c.Refusals.Add(r.Context(), who, d)
	}
	if wantsPage(r) {
		writeErrorPage(w, r, doc)
		return
	}
	problem.Write(w, r, doc)
}
