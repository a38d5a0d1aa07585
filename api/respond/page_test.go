package respond_test

import (
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/api/respond"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
)

var hidden = regexp.MustCompile(`name="([a-z_]+)" value="([^"]*)"`)

// surfer is somebody's browser that follows no redirect by itself.
type surfer struct {
	t *testing.T
	c *http.Client
}

func (s *surfer) do(method, to string, form url.Values, site string) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequest(method, to, strings.NewReader(form.Encode()))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Accept", "text/html")
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if site != "" {
		req.Header.Set("Sec-Fetch-Site", site)
	}
	resp, err := s.c.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(b)
}

// login goes through the provider as who, on the way to the freezes.
func login(t *testing.T, base, who string) *surfer {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &surfer{t, &http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	resp, body := s.do("GET", base+"/revocations", nil, "")
	for range 12 {
		to := resp.Header.Get("Location")
		switch {
		case strings.HasPrefix(to, "/"):
			to = base + to
			fallthrough
		case to != "":
			resp, body = s.do("GET", to, nil, "")
		case strings.Contains(body, `name="user"`) || strings.Contains(body, "name=\"id\""):
			m := hidden.FindStringSubmatch(body)
			if m == nil {
				t.Fatalf("no login: %s", body)
			}
			at := *resp.Request.URL
			at.RawQuery = ""
			resp, body = s.do("POST", at.String(), url.Values{m[1]: {m[2]}, "user": {who}}, "")
		case resp.StatusCode == http.StatusOK && strings.Contains(body, `aria-current="true">Freezes`):
			return s
		default:
			t.Fatalf("%s: HTTP %d: %s", resp.Request.URL, resp.StatusCode, body)
		}
	}
	t.Fatalf("no way to the freezes: HTTP %d: %s", resp.StatusCode, body)
	return nil
}

func TestRespondersStopAndLiftInABrowserAndOnlyFromOurOwnPages(t *testing.T) {
	h := newHouse(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	base := "http://localhost:" + port
	r := server.NewRouter(zap.NewNop(), server.MaxBody)
	op, err := oidcdev.New(oidcdev.Options{Issuer: base + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret", RedirectURIs: []string{base + "/login/callback"},
		Users: []oidcdev.User{{Name: "ana", Groups: []string{"oncall"}}, {Name: "ben", Groups: []string{"oncall"}}, {Name: "rita", Groups: []string{"audit"}}}})
	if err != nil {
		t.Fatal(err)
	}
	r.Handle("/dev/oidc/*", op.Handler())
	people, err := auth.NewPeople(auth.PeopleConfig{Issuer: base + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret", BaseURL: base,
		Roles: map[auth.Role][]string{auth.Responder: {"oncall"}, auth.Reviewer: {"audit"}}})
	if err != nil {
		t.Fatal(err)
	}
	people.Routes(r)
	respond.New(respond.Config{Ledger: h.ledger, Guard: &auth.Guard{People: people, Refusals: h.refusals}, Name: "recorder", TrustDomain: "respond.example", PrivacyKey: make(store.PrivacyKey, 32)}).Routes(r)
	s := httptest.NewUnstartedServer(r)
	s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
	h.must(h.asked(1))

	csrf := func(s *surfer, path string) string {
		t.Helper()
		_, body := s.do("GET", base+path, nil, "")
		m := regexp.MustCompile(`name="csrf" value="([^"]+)"`).FindStringSubmatch(body)
		if m == nil {
			t.Fatalf("%s has no form: %s", path, body)
		}
		return m[1]
	}
	ana, ben, rita := login(t, base, "ana"), login(t, base, "ben"), login(t, base, "rita")
	token := csrf(ana, "/revocations")
	good := url.Values{"csrf": {token}, "what": {"run"}, "name": {" run-1 "}, "reason": {"a leak"}}
	with := func(key, value string) url.Values {
		v := url.Values{}
		for k, x := range good {
			v[k] = x
		}
		v.Set(key, value)
		return v
	}
	for name, x := range map[string]struct {
		form   url.Values
		site   string
		status int
		says   string
	}{
		"without the token":           {with("csrf", ""), "same-origin", 403, ""},
		"with another's token":        {with("csrf", csrf(ben, "/revocations")), "same-origin", 403, ""},
		"from another site":           {good, "cross-site", 403, ""},
		"without a reason":            {with("reason", " "), "same-origin", 422, "Say why"},
		"of nothing":                  {with("what", ""), "same-origin", 400, "Choose what to stop"},
		"of a run without a name":     {with("name", ""), "same-origin", 400, "Name the run to stop"},
		"of everything, with a name":  {with("what", "all"), "same-origin", 400, "leave it empty"},
		"of a run that is no name":    {with("name", "<b>x</b>"), "same-origin", 400, "&lt;b&gt;x"},
		"of a word that is no choice": {with("what", "person"), "same-origin", 400, "Choose what to stop"},
	} {
		resp, body := ana.do("POST", base+"/revocations", x.form, x.site)
		if resp.StatusCode != x.status || !strings.Contains(body, x.says) || strings.Contains(body, "<b>x") {
			t.Errorf("%s: HTTP %d: %s", name, resp.StatusCode, body)
		}
	}
	if resp, body := rita.do("POST", base+"/revocations", with("csrf", csrf(rita, "/revocations")), "same-origin"); resp.StatusCode != 403 {
		t.Errorf("a reviewer stops a run: HTTP %d: %s", resp.StatusCode, body)
	}
	if n := len(h.entries(store.FreezeSet)); n != 0 {
		t.Fatalf("%d freezes are on record", n)
	}
	resp, body := ana.do("POST", base+"/revocations", good, "same-origin")
	at := resp.Header.Get("Location")
	if resp.StatusCode != 303 || !strings.HasPrefix(at, "/revocations/") {
		t.Fatalf("HTTP %d: %s", resp.StatusCode, body)
	}
	if _, body = ana.do("GET", base+at, nil, ""); !strings.Contains(body, "1 request closed") || !strings.Contains(body, "a leak") || !strings.Contains(body, "You set it") || strings.Contains(body, "covers nothing") {
		t.Fatalf("its page: %s", body)
	}
	if resp, body = ana.do("POST", base+at+"/lift", url.Values{"csrf": {token}, "reason": {"mine"}}, "same-origin"); resp.StatusCode != 403 {
		t.Fatalf("lifted by who set it: HTTP %d: %s", resp.StatusCode, body)
	}
	if resp, body = ben.do("POST", base+at+"/lift", url.Values{"csrf": {token}, "reason": {"forged"}}, "same-origin"); resp.StatusCode != 403 {
		t.Fatalf("lifted with another's token: HTTP %d: %s", resp.StatusCode, body)
	}
	if resp, body = ben.do("POST", base+at+"/lift", url.Values{"csrf": {csrf(ben, at)}, "reason": {""}}, "same-origin"); resp.StatusCode != 422 {
		t.Fatalf("lifted without a reason: HTTP %d: %s", resp.StatusCode, body)
	}
	if resp, body = ben.do("POST", base+at+"/lift", url.Values{"csrf": {csrf(ben, at)}, "reason": {"explained"}}, "same-origin"); resp.StatusCode != 303 {
		t.Fatalf("HTTP %d: %s", resp.StatusCode, body)
	}
	if _, body = rita.do("GET", base+at, nil, ""); !strings.Contains(body, "user:ben") || !strings.Contains(body, "explained") || strings.Contains(body, "Lift the freeze") {
		t.Fatalf("a reviewer reads: %s", body)
	}
	if resp, body = ana.do("POST", base+"/revocations", url.Values{"csrf": {token}, "what": {"scope"}, "name": {"orders-db:raed"}, "reason": {"a leak"}}, "same-origin"); resp.StatusCode != 303 {
		t.Fatalf("HTTP %d: %s", resp.StatusCode, body)
	}
	if _, body = ana.do("GET", base+resp.Header.Get("Location"), nil, ""); !strings.Contains(body, "covers nothing yet") || !strings.Contains(body, "scope orders-db:raed is not known") {
		t.Fatalf("of a misspelt scope: %s", body)
	}
	if resp, body = ana.do("GET", base+"/revocations/static/respond.js", nil, ""); resp.StatusCode != 200 || !strings.Contains(body, "refresh") {
		t.Fatalf("its script: HTTP %d", resp.StatusCode)
	}
}
