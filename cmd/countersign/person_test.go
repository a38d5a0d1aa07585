package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/approvals"
)

// manyApprovers are as many people of group dba as decide at one instant.
const manyApprovers = 50

// peoplesProvider is an OpenID provider of its own for the recorder whose pages
// are at base, and the lines of record.yaml that name it.
func peoplesProvider(t *testing.T, base, catalogue string) string {
	t.Helper()
	var provider *oidcdev.Provider
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { provider.Handler().ServeHTTP(w, r) }))
	t.Cleanup(s.Close)
	users := []oidcdev.User{{Name: "ann", Groups: []string{"dba"}}, {Name: "ben", Groups: []string{"dba", "sre"}}, {Name: "cat", Groups: []string{"sre"}}}
	for i := range manyApprovers {
		users = append(users, oidcdev.User{Name: fmt.Sprintf("dba-%d", i), Groups: []string{"dba"}})
	}
	var err error
	provider, err = oidcdev.New(oidcdev.Options{
		Issuer: s.URL, ClientID: "countersign", RedirectURIs: []string{base + "/login/callback"}, Users: users,
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`
approval:
  base_url: %q
  catalogue: %q
  owners: {demo: ["user:ben"]}
  oidc: {issuer: %q, client_id: countersign}
`, base, catalogue, s.URL)
}

var formField = regexp.MustCompile(`name="([a-z_]+)" value="([^"]*)"`)

// clickThrough opens a terminal's login page as user's browser does, clicks where
// the person would, and returns where the browser is sent in the end: to the
// terminal.
func clickThrough(t *testing.T, asks, user string) *url.URL {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	var callback *url.URL
	browser := &http.Client{Jar: jar, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > 10 {
			return fmt.Errorf("redirected in a circle, at last to %s", r.URL)
		}
		if r.URL.Path == "/callback" { // where the terminal would listen
			callback = r.URL
			return http.ErrUseLastResponse
		}
		return nil
	}}
	read := func(res *http.Response, err error) (string, *url.URL) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode >= 400 {
			t.Fatalf("%s: %s %v: %.500s", res.Request.URL, res.Status, err, b)
		}
		return string(b), res.Request.URL
	}
	submit := func(to *url.URL, page string, more url.Values) (string, *url.URL) {
		t.Helper()
		form := url.Values{}
		for _, m := range formField.FindAllStringSubmatch(page, -1) {
			if m[1] != "user" {
				form.Set(m[1], m[2])
			}
		}
		for k, v := range more {
			form[k] = v
		}
		action := *to
		action.RawQuery = ""
		req, err := http.NewRequest(http.MethodPost, action.String(), strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		return read(browser.Do(req))
	}
	get := func(to string) (string, *url.URL) {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, to, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "text/html")
		return read(browser.Do(req))
	}
	page, at := get(asks)
	if strings.Contains(page, `value="`+user+`"`) { // the provider's login
		page, at = submit(at, page, url.Values{"user": {user}})
	}
	if callback == nil {
		submit(at, page, nil)
	}
	return callback
}

// logIn logs user in at the recorder as `countersign login` does, and returns the
// terminal's token.
func logIn(t *testing.T, recorder, user string) string {
	t.Helper()
	verifier := strings.Repeat("v", 43)
	sum := sha256.Sum256([]byte(verifier))
	callback := clickThrough(t, recorder+"/login/cli?port=40000&challenge="+base64.RawURLEncoding.EncodeToString(sum[:]), user)
	body, _ := json.Marshal(map[string]string{"code": callback.Query().Get("code"), "verifier": verifier})
	res, err := http.Post(recorder+"/login/cli/token", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var token struct{ Token string }
	if err := json.NewDecoder(res.Body).Decode(&token); err != nil || token.Token == "" {
		t.Fatalf("no token for %s: %s %v", user, res.Status, err)
	}
	return token.Token
}

// decide decides as the person whose token it is, and returns the status and
// where the request then stands, or the problem.
func decide(t *testing.T, recorder, token, id, decision string) (int, *approvals.Request, string) {
	t.Helper()
	body, _ := json.Marshal(map[string]string{"decision": decision, "reason": "in a test"})
	req, err := http.NewRequest(http.MethodPost, recorder+"/approvals/"+id+"/decision", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, nil, err.Error()
	}
	var r approvals.Request
	if res.StatusCode == http.StatusOK {
		if err := json.Unmarshal(b, &r); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
	}
	return res.StatusCode, &r, string(b)
}
