package oidcdev_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-chi/chi/v5"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/oauth2"

	"github.com/countersign-dev/countersign/api/auth/oidcdev"
)

const back = "http://localhost:1/login/callback"

// serve starts a provider at path of a listener of its own.
func serve(t *testing.T, path string, change func(*oidcdev.Options)) (*oidcdev.Provider, string) {
	t.Helper()
	r := chi.NewRouter()
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	o := oidcdev.Options{Issuer: s.URL + path, ClientID: "recorder", RedirectURIs: []string{back},
		Users: []oidcdev.User{{Name: "ann", Groups: []string{"dba"}, Email: "ann@example.com"}, {Name: "bob"}}}
	if change != nil {
		change(&o)
	}
	p, err := oidcdev.New(o)
	if err != nil {
		t.Fatal(err)
	}
	r.Mount(path+"/", p.Handler())
	return p, o.Issuer
}

var client = &http.Client{Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

func get(t *testing.T, to string) (*http.Response, string) {
	t.Helper()
	resp, err := client.Get(to)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func post(t *testing.T, to string, form url.Values) (*http.Response, string) {
	t.Helper()
	resp, err := client.PostForm(to, form)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

var loginID = regexp.MustCompile(`name="id" value="([A-Z2-7]+)"`)

// code logs user in at the authorize URL to and returns the code.
func code(t *testing.T, issuer, to, user string) string {
	t.Helper()
	resp, _ := get(t, to)
	resp, body := get(t, resp.Header.Get("Location"))
	m := loginID.FindStringSubmatch(body)
	if resp.StatusCode != 200 || m == nil {
		t.Fatalf("HTTP %d %s", resp.StatusCode, body)
	}
	if strings.Contains(body, "<script") || !strings.Contains(resp.Header.Get("Content-Security-Policy"), "form-action 'self' http://localhost:1") {
		t.Fatalf("%v %s", resp.Header, body)
	}
	form := url.Values{"id": {m[1]}, "user": {user}}
	resp, body = post(t, issuer+"/login", form)
	if resp.StatusCode != 303 {
		t.Fatalf("HTTP %d %s", resp.StatusCode, body)
	}
	done := resp.Header.Get("Location")
	if resp, _ := post(t, issuer+"/login", url.Values{"id": {m[1]}, "user": {"bob"}}); resp.StatusCode != 404 {
		t.Fatalf("a second click: HTTP %d", resp.StatusCode)
	}
	resp, body = get(t, done)
	u, err := resp.Location()
	if err != nil || !strings.HasPrefix(u.String(), back+"?") || u.Query().Get("state") != "st" {
		t.Fatalf("HTTP %d %s %v", resp.StatusCode, body, u)
	}
	if resp, _ := get(t, done); resp.StatusCode == 302 && strings.Contains(resp.Header.Get("Location"), "code=") {
		t.Fatal("one click gave two codes")
	}
	return u.Query().Get("code")
}

func TestAUserLogsInWithOneClickAndTheIDTokenSaysWhoItIs(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*oidcdev.Options){
		"ES256, a public client": func(*oidcdev.Options) {},
		"RS256, with a secret":   func(o *oidcdev.Options) { o.Key, o.ClientSecret = rsaKey, "s3cret" },
	} {
		t.Run(name, func(t *testing.T) {
			var o oidcdev.Options
			p, issuer := serve(t, "/dev/oidc", func(x *oidcdev.Options) { change(x); o = *x })
			provider, err := oidc.NewProvider(t.Context(), issuer)
			if err != nil {
				t.Fatal(err)
			}
			c := oauth2.Config{ClientID: "recorder", ClientSecret: o.ClientSecret, Endpoint: provider.Endpoint(), RedirectURL: back, Scopes: []string{"openid", "profile", "email", "groups"}}
			c.Endpoint.AuthStyle = oauth2.AuthStyleInParams
			verifier := oauth2.GenerateVerifier()
			before := time.Now().Truncate(time.Second)
			once := code(t, issuer, c.AuthCodeURL("st", oidc.Nonce("nnn"), oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("prompt", "login"), oauth2.SetAuthURLParam("max_age", "0")), "ann")
			tok, err := c.Exchange(t.Context(), once, oauth2.VerifierOption(verifier))
			if err != nil {
				t.Fatal(err)
			}
			raw := tok.Extra("id_token").(string)
			id, err := provider.Verifier(&oidc.Config{ClientID: "recorder"}).Verify(t.Context(), raw)
			if err != nil {
				t.Fatal(err)
			}
			var claims struct {
				Name     string   `json:"preferred_username"`
				Groups   []string `json:"groups"`
				Email    string   `json:"email"`
				Verified bool     `json:"email_verified"`
				AuthTime int64    `json:"auth_time"`
				AZP      string   `json:"azp"`
			}
			if err := id.Claims(&claims); err != nil {
				t.Fatal(err)
			}
			if claims.Name != "ann" || !slices.Equal(claims.Groups, []string{"dba"}) || claims.Email != "ann@example.com" || !claims.Verified || claims.AZP != "recorder" || id.Nonce != "nnn" || id.Subject != "dev|ann" ||
				time.Unix(claims.AuthTime, 0).Before(before) {
				t.Fatalf("%+v %+v", claims, id)
			}
			// What JWKS gives out verifies it, and holds no private key.
			var set jose.JSONWebKeySet
			if err := json.Unmarshal(p.JWKS(), &set); err != nil || len(set.Keys) != 1 || !set.Keys[0].IsPublic() {
				t.Fatalf("%v %s", err, p.JWKS())
			}
			jws, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := jws.Verify(&set.Keys[0]); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Exchange(t.Context(), once, oauth2.VerifierOption(verifier)); err == nil {
				t.Fatal("the code worked twice")
			}
			info, err := provider.UserInfo(t.Context(), oauth2.StaticTokenSource(tok))
			if err != nil || info.Subject != "dev|ann" {
				t.Fatal(info, err)
			}
		})
	}
}

func TestACodeIsForItsVerifierAndTheClientsSecret(t *testing.T) {
	_, issuer := serve(t, "", func(o *oidcdev.Options) { o.ClientSecret = "s3cret" })
	provider, err := oidc.NewProvider(t.Context(), issuer)
	if err != nil {
		t.Fatal(err)
	}
	good := oauth2.Config{ClientID: "recorder", ClientSecret: "s3cret", Endpoint: provider.Endpoint(), RedirectURL: back, Scopes: []string{"openid"}}
	good.Endpoint.AuthStyle = oauth2.AuthStyleInHeader
	for name, change := range map[string]func(*oauth2.Config) string{ // returns the verifier's suffix
		"good":                 func(*oauth2.Config) string { return "" },
		"another verifier":     func(*oauth2.Config) string { return "x" },
		"another secret":       func(c *oauth2.Config) string { c.ClientSecret = "other"; return "" },
		"no secret":            func(c *oauth2.Config) string { c.ClientSecret = ""; return "" },
		"another redirect URI": func(c *oauth2.Config) string { c.RedirectURL = back + "/"; return "" },
	} {
		verifier := oauth2.GenerateVerifier()
		once := code(t, issuer, good.AuthCodeURL("st", oauth2.S256ChallengeOption(verifier)), "ann")
		c := good
		suffix := change(&c)
		_, err := c.Exchange(t.Context(), once, oauth2.VerifierOption(verifier+suffix))
		if (err == nil) != (name == "good") {
			t.Errorf("%s: %v", name, err)
		}
		if name != "good" {
			if _, err := good.Exchange(t.Context(), once, oauth2.VerifierOption(verifier)); err == nil {
				t.Errorf("%s: the code worked after a failed exchange", name)
			}
		}
	}
}

func TestALoginThatIsNotAskedForProperlyIsNotBegun(t *testing.T) {
	_, issuer := serve(t, "/dev/oidc", nil)
	challenge := "&code_challenge=" + strings.Repeat("A", 43)
	ok := "client_id=recorder&response_type=code&scope=openid&state=st&redirect_uri=" + url.QueryEscape(back)
	if resp, body := get(t, issuer+"/authorize?"+ok+challenge+"&code_challenge_method=S256"); resp.StatusCode != 302 || !strings.HasPrefix(resp.Header.Get("Location"), issuer+"/login?id=") {
		t.Fatalf("HTTP %d %s", resp.StatusCode, body)
	}
	for name, query := range map[string]string{
		"no PKCE":                ok,
		"plain PKCE":             ok + challenge + "&code_challenge_method=plain",
		"PKCE by default plain":  ok + challenge,
		"nobody may be asked":    ok + challenge + "&code_challenge_method=S256&prompt=none",
		"the implicit flow":      strings.Replace(ok, "=code&", "=id_token&", 1) + challenge + "&code_challenge_method=S256",
		"another redirect URI":   strings.Replace(ok, "callback", "callbacks", 1) + challenge + "&code_challenge_method=S256",
		"a redirect URI further": strings.Replace(ok, "callback", "callback%2Fx", 1) + challenge + "&code_challenge_method=S256",
		"another client":         strings.Replace(ok, "=recorder&", "=other&", 1) + challenge + "&code_challenge_method=S256",
	} {
		resp, body := get(t, issuer+"/authorize?"+query)
		to := resp.Header.Get("Location")
		if resp.StatusCode != 400 && !(resp.StatusCode == 302 && strings.HasPrefix(to, back) && strings.Contains(to, "error=")) {
			t.Errorf("%s: HTTP %d to %s: %s", name, resp.StatusCode, to, body)
		}
	}
}

func TestOnlyTheProvidersOwnPageClicks(t *testing.T) {
	_, issuer := serve(t, "/dev/oidc", nil)
	try := func(change func(*http.Request)) int {
		resp, _ := get(t, issuer+"/authorize?client_id=recorder&response_type=code&scope=openid&code_challenge_method=S256&code_challenge="+strings.Repeat("A", 43)+"&redirect_uri="+url.QueryEscape(back))
		u, err := resp.Location()
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequest(http.MethodPost, issuer+"/login", strings.NewReader(url.Values{"id": {u.Query().Get("id")}, "user": {"ann"}}.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		change(req)
		resp, err = client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for name, c := range map[string]struct {
		change func(*http.Request)
		want   int
	}{
		"own page":       {func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "same-origin") }, 303},
		"another site's": {func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 403},
		"another origin": {func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, 403},
		"another name":   {func(r *http.Request) { r.Host = "evil.example" }, 421},
		"another user":   {func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("id=x&user=eve")); r.ContentLength = 13 }, 404},
		"a form too large": {func(r *http.Request) {
			r.Body = io.NopCloser(strings.NewReader("x=" + strings.Repeat("a", 5000)))
			r.ContentLength = 5002
		}, 400},
		"another method": {func(r *http.Request) { r.Method = http.MethodPut }, 405},
	} {
		if got := try(c.change); got != c.want {
			t.Errorf("%s: HTTP %d, want %d", name, got, c.want)
		}
	}
	for _, path := range []string{"/device_authorization", "/oauth/introspect", "/revoke", "/end_session", "/healthz", "/login?id=", "/login?id=AAAA", "", "/"} {
		if resp, _ := get(t, issuer+path); resp.StatusCode != 404 {
			t.Errorf("%s: HTTP %d", path, resp.StatusCode)
		}
	}
}

func TestOptionsThatMakeNoProviderAreRefused(t *testing.T) {
	good := oidcdev.Options{Issuer: "http://localhost:1", ClientID: "c", RedirectURIs: []string{back}, Users: []oidcdev.User{{Name: "ann"}}}
	if _, err := oidcdev.New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*oidcdev.Options){
		"no issuer":        func(o *oidcdev.Options) { o.Issuer = "" },
		"slash at the end": func(o *oidcdev.Options) { o.Issuer += "/" },
		"no client":        func(o *oidcdev.Options) { o.ClientID = "" },
		"no redirect":      func(o *oidcdev.Options) { o.RedirectURIs = nil },
		"redirect a path":  func(o *oidcdev.Options) { o.RedirectURIs = []string{"/login/callback"} },
		"a user twice":     func(o *oidcdev.Options) { o.Users = append(slices.Clone(o.Users), o.Users[0]) },
		"a user unnamed":   func(o *oidcdev.Options) { o.Users = []oidcdev.User{{}} },
	} {
		o := good
		change(&o)
		if _, err := oidcdev.New(o); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
