package auth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
)

// office is a recorder's people's side: login, two guarded routes and an
// OpenID provider under /dev/oidc of the same listener.
type office struct {
	url     string
	people  *auth.People
	offset  atomic.Int64 // of the recorder's clock, in ns
	fresh   atomic.Pointer[auth.Fresh]
	freshTo atomic.Value // error that OnFresh answers, if any
	posted  atomic.Int64 // POST /act that came through
	logged  *observer.ObservedLogs

	mu      sync.Mutex
	refused []*store.Submission
}

var users = []oidcdev.User{
	{Name: "ann", Groups: []string{"dba", "readers"}, Email: "ann@example.com"},
	{Name: "bob", Groups: []string{"sre"}},
}

func (o *office) now() time.Time          { return time.Now().Add(time.Duration(o.offset.Load())) }
func (o *office) advance(d time.Duration) { o.offset.Add(int64(d)) }

// open starts an office at http://localhost:PORT. With an issuer it uses that
// provider, else its own.
func open(t *testing.T, issuer string, change func(*auth.PeopleConfig)) *office {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := &office{url: fmt.Sprintf("http://localhost:%d", l.Addr().(*net.TCPAddr).Port)}
	r := server.NewRouter(zap.NewNop(), 1<<20)
	if issuer == "" {
		issuer = o.url + "/dev/oidc"
		op, err := oidcdev.New(oidcdev.Options{Issuer: issuer, ClientID: "recorder", ClientSecret: "s3cret", RedirectURIs: []string{o.url + "/login/callback"}, Users: users})
		if err != nil {
			t.Fatal(err)
		}
		r.Handle("/dev/oidc/*", op.Handler())
	}
	refusals := auth.NewRefusals("example.org", zap.NewNop(), func(_ context.Context, s *store.Submission) error {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.refused = append(o.refused, s)
		return nil
	})
	t.Cleanup(refusals.Close)
	core, logged := observer.New(zap.InfoLevel)
	o.logged = logged
	c := auth.PeopleConfig{Issuer: issuer, ClientID: "recorder", ClientSecret: "s3cret", BaseURL: o.url, Now: o.now, Refusals: refusals, Log: zap.New(core),
		Roles: map[auth.Role][]string{auth.Reviewer: {"readers"}}}
	if change != nil {
		change(&c)
	}
	o.people, err = auth.NewPeople(c)
	if err != nil {
		t.Fatal(err)
	}
	o.people.OnFresh = func(_ context.Context, f auth.Fresh) (string, error) {
		if err, ok := o.freshTo.Load().(error); ok {
			return "", err
		}
		o.fresh.Store(&f)
		return "", nil
	}
	guard := &auth.Guard{People: o.people, Refusals: refusals}
	o.people.Routes(r)
	who := func(w http.ResponseWriter, r *http.Request) {
		p := auth.From(r.Context())
		json.NewEncoder(w).Encode(map[string]any{"person": p.Person(), "role": p.Role, "roles": p.Roles, "groups": p.Groups, "method": p.Method, "csrf": o.people.CSRF(r)})
	}
	r.With(o.people.ToLogin, guard.Require(auth.Approver)).Get("/who", who)
	r.With(o.people.ToLogin, guard.Require(auth.Reviewer)).Get("/history", who)
	r.With(guard.Require(auth.Responder)).Get("/switch", who)
	r.With(guard.Require(auth.Approver)).Post("/act", func(w http.ResponseWriter, r *http.Request) { o.posted.Add(1) })
	r.Get("/live", func(w http.ResponseWriter, r *http.Request) {
		p, ok := o.people.Person(r)
		fmt.Fprintf(w, "%t %t %s", o.people.Live(r), ok, p.Name)
	})
	r.With(guard.Require(auth.Approver)).Get("/form", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; form-action 'self'")
		fmt.Fprintf(w, `<form method="post" action="/enrol"><input name="csrf" value="%s"><input name="nonce" value="%s"><button>go</button></form>`, o.people.CSRF(r), html.EscapeString(r.FormValue("nonce")))
	})
	r.With(guard.Require(auth.Approver)).Post("/enrol", func(w http.ResponseWriter, r *http.Request) {
		o.people.Fresh(w, r, r.FormValue("nonce"), "/who", "the key")
	})
	s := httptest.NewUnstartedServer(r)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return o
}

// because is why the last refusal was one, as the log has it.
func (o *office) because() string {
	all := o.logged.FilterMessage("refused").All()
	if len(all) == 0 {
		return ""
	}
	s, _ := all[len(all)-1].ContextMap()["because"].(string)
	return s
}

// browser is a person's browser.
type browser struct {
	t *testing.T
	o *office
	c *http.Client
}

func (o *office) browser(t *testing.T) *browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &browser{t: t, o: o, c: &http.Client{Jar: jar, Timeout: 10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

type answer struct {
	*http.Response
	body string
}

func (b *browser) do(req *http.Request) answer {
	b.t.Helper()
	resp, err := b.c.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return answer{resp, string(body)}
}

// get asks as a browser does, and follows nothing.
func (b *browser) get(to string) answer {
	b.t.Helper()
	if strings.HasPrefix(to, "/") {
		to = b.o.url + to
	}
	req, err := http.NewRequest(http.MethodGet, to, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Accept", "text/html,application/xhtml+xml;q=0.9")
	return b.do(req)
}

func (b *browser) post(to string, form url.Values, headers ...string) answer {
	b.t.Helper()
	if strings.HasPrefix(to, "/") {
		to = b.o.url + to
	}
	req, err := http.NewRequest(http.MethodPost, to, strings.NewReader(form.Encode()))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	return b.do(req)
}

func (a answer) location(t *testing.T) *url.URL {
	t.Helper()
	u, err := a.Location()
	if err != nil {
		t.Fatalf("HTTP %d without a Location: %.300s", a.StatusCode, a.body)
	}
	return u
}

var hidden = regexp.MustCompile(`name="([a-z_]+)" value="([^"]*)"`)

// click goes through the development login's page at to as user, and returns
// the callback's URL, not yet followed.
func (b *browser) click(to, user string) *url.URL {
	b.t.Helper()
	login := b.get(to).location(b.t).String()
	form := b.get(login)
	m := hidden.FindStringSubmatch(form.body)
	if form.StatusCode != 200 || m == nil || !strings.Contains(form.body, `value="`+user+`"`) {
		b.t.Fatalf("HTTP %d: %s", form.StatusCode, form.body)
	}
	action := login[:strings.Index(login, "?")]
	done := b.post(action, url.Values{m[1]: {m[2]}, "user": {user}}).location(b.t)
	return b.get(done.String()).location(b.t)
}

// login logs user in and returns the answer of the callback.
func (b *browser) login(user string) answer {
	b.t.Helper()
	back := b.click(b.get("/login?next=/who").location(b.t).String(), user)
	a := b.get(back.String())
	if a.StatusCode != http.StatusSeeOther {
		b.t.Fatalf("HTTP %d: %s", a.StatusCode, a.body)
	}
	return a
}

type me struct {
	Person, Method, CSRF string
	Role                 auth.Role
	Roles                []auth.Role
	Groups               []string
}

// who says who the browser is logged in as; empty where it is not.
func (b *browser) who() (m me) {
	b.t.Helper()
	req, _ := http.NewRequest(http.MethodGet, b.o.url+"/who", nil)
	a := b.do(req)
	if a.StatusCode == http.StatusUnauthorized {
		return me{}
	}
	if err := json.Unmarshal([]byte(a.body), &m); err != nil || a.StatusCode != 200 {
		b.t.Fatalf("HTTP %d: %s", a.StatusCode, a.body)
	}
	return m
}

func (b *browser) cookies() map[string]string {
	u, _ := url.Parse(b.o.url)
	m := map[string]string{}
	for _, c := range b.c.Jar.Cookies(u) {
		m[c.Name] = c.Value
	}
	return m
}

func (b *browser) plant(name, value string) {
	u, _ := url.Parse(b.o.url)
	b.c.Jar.SetCookies(u, []*http.Cookie{{Name: name, Value: value, Path: "/"}})
}

func (o *office) port() string { return o.url[strings.LastIndex(o.url, ":")+1:] }

func TestAPersonLogsInAndComesBackToThePageTheyAskedFor(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	first := b.get("/who?x=1").location(t)
	if first.Path != "/login" || first.Query().Get("next") != "/who?x=1" {
		t.Fatal(first)
	}
	authorize := b.get(first.String()).location(t)
	q := authorize.Query()
	if q.Get("code_challenge_method") != "S256" || q.Get("code_challenge") == "" || q.Get("nonce") == "" || q.Get("state") == "" || q.Get("response_type") != "code" {
		t.Fatal(authorize)
	}
	a := b.get(b.click(authorize.String(), "ann").String())
	if a.location(t).RequestURI() != "/who?x=1" {
		t.Fatal(a.Header)
	}
	for _, c := range a.Cookies() {
		if !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Domain != "" || c.Secure {
			t.Errorf("cookie %s", c)
		}
	}
	m := b.who()
	if m.Person != "user:ann" || m.Method != "session" || m.Role != auth.Approver || !slices.Equal(m.Groups, []string{"dba", "readers"}) || !slices.Equal(m.Roles, []auth.Role{auth.Approver, auth.Reviewer}) || m.CSRF == "" {
		t.Fatalf("%+v", m)
	}
	if a := b.get("/history"); a.StatusCode != 200 || !strings.Contains(a.body, `"role":"reviewer"`) {
		t.Fatalf("HTTP %d %s", a.StatusCode, a.body)
	}
	if a := b.get("/switch"); a.StatusCode != 403 || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") {
		t.Fatalf("a responder's page: HTTP %d", a.StatusCode)
	}
	// Logged in already: straight on.
	if to := b.get("/login?next=/history").location(t).RequestURI(); to != "/history" {
		t.Fatal(to)
	}
	bob := o.browser(t)
	bob.login("bob")
	if a := bob.get("/history"); a.StatusCode != 403 {
		t.Fatalf("bob reviews: HTTP %d", a.StatusCode)
	}
}

func TestTheSessionCookieOfAnHTTPSRecorderIsBoundToItsHost(t *testing.T) {
	o := open(t, "", nil)
	p, err := auth.NewPeople(auth.PeopleConfig{Issuer: o.url + "/dev/oidc", ClientID: "recorder", BaseURL: "https://record.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	p.Routes(r)
	w := httptest.NewRecorder()
	r.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "https://record.example.org/login", nil))
	c := w.Result().Cookies()
	if w.Code != 303 || len(c) != 1 || c[0].Name != "__Host-countersign-login" || !c[0].Secure || !c[0].HttpOnly || c[0].Path != "/" || c[0].Domain != "" {
		t.Fatal(w.Code, c)
	}
}

func TestALoginThatIsNotThisBrowsersOwnIsRefused(t *testing.T) {
	o := open(t, "", nil)
	name := "countersign-login-" + o.port()
	// begin returns a browser and its callback, not yet followed.
	begin := func() (*browser, *url.URL) {
		b := o.browser(t)
		return b, b.click(b.get("/login").location(t).String(), "ann")
	}
	with := func(u *url.URL, key, value string) string {
		c := *u
		q := c.Query()
		q.Set(key, value)
		c.RawQuery = q.Encode()
		return c.String()
	}
	for title, attempt := range map[[2]string]func() (*browser, string){ // what is tried, why it is refused
		{"forged state", "no login with this state"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "state", strings.Repeat("A", 43))
		},
		{"no state", "no login with this state"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "state", "")
		},
		{"another login's state", "in another browser"}: func() (*browser, string) {
			_, other := begin()
			b, back := begin()
			return b, with(back, "state", other.Query().Get("state"))
		},
		{"a state twice", "state stands 2 times"}: func() (*browser, string) {
			b, back := begin()
			return b, back.String() + "&state=" + back.Query().Get("state")
		},
		{"no cookie", "in another browser"}: func() (*browser, string) {
			_, back := begin()
			return o.browser(t), back.String()
		},
		{"another browser's cookie", "in another browser"}: func() (*browser, string) {
			_, back := begin()
			b, _ := begin()
			return b, back.String()
		},
		{"a made-up cookie", "in another browser"}: func() (*browser, string) {
			b, back := begin()
			b.plant(name, strings.Repeat("A", 43))
			return b, back.String()
		},
		{"another person's code", "invalid_grant"}: func() (*browser, string) { // PKCE and nonce are of another login
			_, other := begin()
			b, back := begin()
			return b, with(back, "code", other.Query().Get("code"))
		},
		{"a made-up code", "invalid_grant"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "code", "abc")
		},
		{"no code", "no code"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "code", "")
		},
		{"another issuer", "another issuer's"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "iss", "https://evil.example")
		},
		{"the provider's refusal", "access_denied"}: func() (*browser, string) {
			b, back := begin()
			return b, with(back, "error", "access_denied")
		},
		{"too late", "no login with this state"}: func() (*browser, string) {
			b, back := begin()
			o.advance(10 * time.Minute)
			t.Cleanup(func() { o.advance(-10 * time.Minute) })
			return b, back.String()
		},
	} {
		t.Run(title[0], func(t *testing.T) {
			b, back := attempt()
			a := b.get(back)
			if a.StatusCode != http.StatusUnauthorized {
				t.Fatalf("HTTP %d %s", a.StatusCode, a.body)
			}
			if !strings.Contains(o.because(), title[1]) {
				t.Fatalf("refused because %q, want %q", o.because(), title[1])
			}
			for _, c := range a.Cookies() {
				if strings.Contains(c.Name, "session") {
					t.Fatalf("set %s", c)
				}
			}
			if m := b.who(); m.Person != "" {
				t.Fatalf("%+v", m)
			}
		})
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.refused) == 0 || o.refused[0].Action != "GET /login/callback" {
		t.Fatalf("%d refusals on record", len(o.refused))
	}
}

func TestAStateAndACodeAreUsedOnce(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	back := b.click(b.get("/login").location(t).String(), "ann")
	if a := b.get(back.String()); a.StatusCode != 303 {
		t.Fatalf("HTTP %d", a.StatusCode)
	}
	if a := b.get(back.String()); a.StatusCode != 401 {
		t.Fatalf("the same answer again: HTTP %d", a.StatusCode)
	}
	// One that came from the wrong browser is used up for the right one too.
	late := o.browser(t)
	seen := late.click(late.get("/login").location(t).String(), "ann")
	if a := o.browser(t).get(seen.String()); a.StatusCode != 401 {
		t.Fatalf("another browser: HTTP %d", a.StatusCode)
	}
	if a := late.get(seen.String()); a.StatusCode != 401 {
		t.Fatalf("the right one after it: HTTP %d", a.StatusCode)
	}
	// The code with a new state.
	other := o.browser(t)
	fresh := other.get("/login").location(t).Query().Get("state")
	if a := other.get("/login/callback?code=" + url.QueryEscape(back.Query().Get("code")) + "&state=" + fresh); a.StatusCode != 401 {
		t.Fatalf("the code again: HTTP %d", a.StatusCode)
	}
	if other.who().Person != "" {
		t.Fatal("logged in with a replayed code")
	}
}

func TestFiftyCallbacksAtOnceWithOneStateBeginOneSession(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	back := b.click(b.get("/login").location(t).String(), "ann").String()
	var in atomic.Int64
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			req, _ := http.NewRequest(http.MethodGet, back, nil)
			resp, err := b.c.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode == 303 {
				in.Add(1)
			}
		})
	}
	wg.Wait()
	if in.Load() != 1 {
		t.Fatalf("%d sessions", in.Load())
	}
}

func TestASessionIDKnownBeforehandIsWorthNothing(t *testing.T) {
	o := open(t, "", nil)
	name := "countersign-session-" + o.port()
	b := o.browser(t)
	planted := strings.Repeat("B", 43)
	b.plant(name, planted)
	b.login("ann")
	if b.cookies()[name] == planted {
		t.Fatal("the planted ID became a session")
	}
	evil := o.browser(t)
	evil.plant(name, planted)
	if evil.who().Person != "" {
		t.Fatal("the planted ID opens a session")
	}
	// One that was a session is over once somebody logs in on top of it.
	bob := o.browser(t)
	back := bob.click(bob.get("/login").location(t).String(), "bob")
	bob.plant(name, b.cookies()[name])
	if a := bob.get(back.String()); a.StatusCode != 303 {
		t.Fatal(a.StatusCode)
	}
	if bob.who().Person != "user:bob" || b.who().Person != "" {
		t.Fatalf("%+v %+v", bob.who(), b.who())
	}
}

func TestNextLeadsNowhereElse(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	for _, next := range []string{"https://evil.example/", "//evil.example", `/\evil.example`, `\\evil.example`, "/\t/evil.example", "/\n/evil.example", "javascript:alert(1)",
		"/a//evil.example", "/%2f/evil.example", "/%5cevil.example", "evil", "", "http:evil.example", "/" + strings.Repeat("a", 3000), "/é"} {
		if a := b.get("/login?next=" + url.QueryEscape(next)); a.StatusCode != 400 {
			t.Errorf("%q: HTTP %d to %s", next, a.StatusCode, a.Header.Get("Location"))
		}
	}
	b.login("ann")
	if a := b.get("/login?next=//evil.example"); a.StatusCode != 400 {
		t.Errorf("logged in: HTTP %d", a.StatusCode)
	}
}

func TestASessionEndsWhenIdleAndForGood(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	b.login("ann")
	for range 15 { // 7.25 h, never idle for 30 min
		o.advance(29 * time.Minute)
		if b.who().Person == "" {
			t.Fatal("ended while used")
		}
	}
	o.advance(29 * time.Minute)
	if b.who().Person == "" {
		t.Fatal("ended before 8 h")
	}
	o.advance(20 * time.Minute)
	if b.who().Person != "" {
		t.Fatal("outlived 8 h")
	}
	o.offset.Store(0)
	if b.who().Person != "" {
		t.Fatal("a session that ended came back")
	}
	b.login("ann")
	o.advance(30 * time.Minute)
	if b.who().Person != "" {
		t.Fatal("outlived 30 idle minutes")
	}
	if a := b.get("/who"); a.StatusCode != 303 || a.location(t).Path != "/login" {
		t.Fatalf("HTTP %d", a.StatusCode)
	}
}

func TestLogoutAndRevocationEndSessionsAtOnce(t *testing.T) {
	o := open(t, "", nil)
	a, b, c := o.browser(t), o.browser(t), o.browser(t)
	a.login("ann")
	b.login("ann")
	c.login("bob")
	stolen := a.cookies()
	if r := a.post("/logout", url.Values{}); r.StatusCode != 403 || a.who().Person == "" {
		t.Fatalf("logged out without a CSRF token: HTTP %d", r.StatusCode)
	}
	if r := a.post("/logout", url.Values{"csrf": {a.who().CSRF}}, "Accept", "text/html"); r.StatusCode != 200 || !strings.Contains(r.body, "logged out") {
		t.Fatalf("HTTP %d %s", r.StatusCode, r.body)
	}
	thief := o.browser(t)
	for k, v := range stolen {
		thief.plant(k, v)
	}
	if thief.who().Person != "" {
		t.Fatal("the cookie works after logout")
	}
	a.login("ann")
	if r := a.post("/logout", url.Values{"csrf": {a.who().CSRF}, "everywhere": {"true"}}); r.StatusCode != 204 {
		t.Fatalf("HTTP %d %s", r.StatusCode, r.body)
	}
	if a.who().Person != "" || b.who().Person != "" || c.who().Person != "user:bob" {
		t.Fatal("revocation hit the wrong ones")
	}
}

func TestAPersonHasTwentySessionsAndTheOldestGoes(t *testing.T) {
	o := open(t, "", nil)
	var bs []*browser
	for range 21 {
		b := o.browser(t)
		b.login("ann")
		o.advance(time.Second)
		bs = append(bs, b)
	}
	if bs[0].who().Person != "" || bs[1].who().Person == "" || bs[20].who().Person == "" {
		t.Fatal("not the oldest one ended")
	}
}

func TestAFormWithoutThisSessionsTokenDoesNothing(t *testing.T) {
	o := open(t, "", nil)
	b, other := o.browser(t), o.browser(t)
	b.login("ann")
	other.login("bob")
	token := b.who().CSRF
	for name, a := range map[string]answer{
		"no token":            b.post("/act", nil),
		"a wrong one":         b.post("/act", url.Values{"csrf": {token[:42] + "!"}}),
		"an empty one":        b.post("/act", url.Values{"csrf": {""}}),
		"another session's":   b.post("/act", url.Values{"csrf": {other.who().CSRF}}),
		"in the query":        b.post("/act?csrf="+token, nil),
		"another site's page": b.post("/act", url.Values{"csrf": {token}}, "Sec-Fetch-Site", "cross-site"),
		"a neighbour's page":  b.post("/act", url.Values{"csrf": {token}}, "Sec-Fetch-Site", "same-site"),
		"another origin":      b.post("/act", url.Values{"csrf": {token}}, "Sec-Fetch-Site", "", "Origin", "http://evil.example"),
		"a sandboxed page":    b.post("/act", url.Values{"csrf": {token}}, "Sec-Fetch-Site", "", "Origin", "null"),
		"header, other site":  b.post("/act", nil, "X-CSRF-Token", token, "Sec-Fetch-Site", "cross-site"),
	} {
		if a.StatusCode != 403 {
			t.Errorf("%s: HTTP %d", name, a.StatusCode)
		}
	}
	if o.posted.Load() != 0 {
		t.Fatalf("%d forged requests came through", o.posted.Load())
	}
	for name, a := range map[string]answer{
		"form":   b.post("/act", url.Values{"csrf": {token}}),
		"header": b.post("/act", nil, "X-CSRF-Token", token),
		"origin": b.post("/act", url.Values{"csrf": {token}}, "Sec-Fetch-Site", "", "Origin", o.url),
	} {
		if a.StatusCode != 200 {
			t.Errorf("%s: HTTP %d %s", name, a.StatusCode, a.body)
		}
	}
	if o.posted.Load() != 3 {
		t.Fatalf("%d came through", o.posted.Load())
	}
}

func nonceFor(key string) string {
	sum := sha256.Sum256([]byte(key))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// enrol begins a fresh login and returns where it leads.
func (b *browser) enrol(nonce string) string {
	b.t.Helper()
	a := b.post("/enrol", url.Values{"csrf": {b.who().CSRF}, "nonce": {nonce}}, "Accept", "application/json")
	var to struct{ Location string }
	if err := json.Unmarshal([]byte(a.body), &to); err != nil || a.StatusCode != 200 {
		b.t.Fatalf("HTTP %d %s", a.StatusCode, a.body)
	}
	return to.Location
}

func TestAFreshLoginCarriesTheNonceUnderTheProvidersSignature(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	b.login("ann")
	nonce, session := nonceFor("key"), b.cookies()["countersign-session-"+o.port()]
	to, err := url.Parse(b.enrol(nonce))
	if err != nil {
		t.Fatal(err)
	}
	if q := to.Query(); q.Get("prompt") != "login" || q.Get("max_age") != "0" || q.Get("nonce") != nonce {
		t.Fatal(to)
	}
	if a := b.get(b.click(to.String(), "ann").String()); a.location(t).RequestURI() != "/who" {
		t.Fatal(a.StatusCode, a.body)
	}
	f := o.fresh.Load()
	if f == nil || f.Name != "user:ann" || f.Data != "the key" || f.Issuer != o.url+"/dev/oidc" || f.ClientID != "recorder" || f.Nonce != nonce || time.Since(f.AuthTime) > time.Minute {
		t.Fatalf("%+v", f)
	}
	if b.cookies()["countersign-session-"+o.port()] != session {
		t.Fatal("a fresh login began a session")
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(f.JWK); err != nil || !key.IsPublic() {
		t.Fatalf("%v %s", err, f.JWK)
	}
	jws, err := jose.ParseSignedCompact(f.IDToken, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(&key)
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Nonce, Iss string
		AuthTime   int64 `json:"auth_time"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil || claims.Nonce != nonce || claims.Iss != f.Issuer || claims.AuthTime != f.AuthTime.Unix() {
		t.Fatalf("%v %s", err, payload)
	}
	// For a browser it is a page that leads on, since a redirect would fall
	// under the form-action of the page before it.
	page := b.post("/enrol", url.Values{"csrf": {b.who().CSRF}, "nonce": {nonce}}, "Accept", "text/html")
	if page.StatusCode != 200 || !strings.Contains(page.body, `http-equiv="refresh" content="0;url=`+o.url+"/dev/oidc/authorize?") {
		t.Fatalf("HTTP %d %s", page.StatusCode, page.body)
	}
	// What its taker says is what the person is told.
	o.freshTo.Store(fmt.Errorf("%w: already known", store.ErrConflict))
	if a := b.get(b.click(b.enrol(nonceFor("other")), "ann").String()); a.StatusCode != 409 {
		t.Fatalf("HTTP %d", a.StatusCode)
	}
}

func TestAFreshLoginIsTheSessionsOwnPersonsAndNobodyElses(t *testing.T) {
	o := open(t, "", nil)
	ann, bob := o.browser(t), o.browser(t)
	ann.login("ann")
	bob.login("bob")
	if a := ann.get(ann.click(ann.enrol(nonceFor("1")), "bob").String()); a.StatusCode != 403 {
		t.Errorf("bob in ann's fresh login: HTTP %d", a.StatusCode)
	}
	// Begun in ann's session, ended in bob's.
	back := ann.click(ann.enrol(nonceFor("2")), "ann")
	login := "countersign-login-" + o.port()
	bob.plant(login, ann.cookies()[login])
	if a := bob.get(back.String()); a.StatusCode != 401 {
		t.Errorf("in another session: HTTP %d", a.StatusCode)
	}
	// Ended without a session, or in a later one of the same person.
	back = ann.click(ann.enrol(nonceFor("3")), "ann")
	o.people.Sessions.RevokePerson("user:ann")
	if a := ann.get(back.String()); a.StatusCode != 401 {
		t.Errorf("without the session: HTTP %d", a.StatusCode)
	}
	if ann.who().Person != "" {
		t.Error("a fresh login began a session")
	}
	ann.login("ann")
	back = ann.click(ann.enrol(nonceFor("4")), "ann")
	ann.post("/logout", url.Values{"csrf": {ann.who().CSRF}})
	ann.login("ann")
	if a := ann.get(back.String()); a.StatusCode != 401 {
		t.Errorf("in a later session: HTTP %d", a.StatusCode)
	}
	if f := o.fresh.Load(); f != nil {
		t.Fatalf("%+v", f)
	}
	for _, bad := range []string{"", "short", strings.Repeat("x", 257), strings.Repeat("x", 40) + "&prompt=none"} {
		if a := ann.post("/enrol", url.Values{"csrf": {ann.who().CSRF}, "nonce": {bad}}); a.StatusCode != 500 {
			t.Errorf("nonce %q: HTTP %d", bad, a.StatusCode)
		}
	}
}

func TestAnOrdinaryLoginNeverEndsAsAFreshOneNorAFreshOneAsAnOrdinary(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	b.login("ann")
	// Both under way in one browser; each one's code under the other's state.
	// (An ordinary login of somebody logged in is begun from a second tab
	// before the first was done: hence the planted cookie.)
	tab := o.browser(t)
	ordinary := tab.click(tab.get("/login").location(t).String(), "ann")
	login, session := "countersign-login-"+o.port(), "countersign-session-"+o.port()
	b.plant(login, tab.cookies()[login])
	fresh := b.click(b.enrol(nonceFor("k")), "ann")
	if b.cookies()[login] != tab.cookies()[login] {
		t.Fatal("the two logins are not one browser's")
	}
	before := b.cookies()[session]
	cross := func(code, state *url.URL) string {
		return "/login/callback?code=" + url.QueryEscape(code.Query().Get("code")) + "&state=" + state.Query().Get("state")
	}
	if a := b.get(cross(ordinary, fresh)); a.StatusCode != 401 {
		t.Errorf("an ordinary login's code as a fresh one: HTTP %d", a.StatusCode)
	}
	if a := b.get(cross(fresh, ordinary)); a.StatusCode != 401 {
		t.Errorf("a fresh login's code as an ordinary one: HTTP %d", a.StatusCode)
	}
	if o.fresh.Load() != nil || b.cookies()[session] != before {
		t.Fatal("it was taken")
	}
	// And whole: an ordinary login reaches no hook.
	tab.get(tab.click(tab.get("/login").location(t).String(), "ann").String())
	if tab.who().Person == "" || o.fresh.Load() != nil {
		t.Fatal("an ordinary login was taken for a fresh one")
	}
}

// terminal is what countersign login sends.
func (o *office) exchange(t *testing.T, code, verifier string) (auth.TerminalToken, int) {
	t.Helper()
	body, _ := json.Marshal(map[string]string{"code": code, "verifier": verifier})
	resp, err := http.Post(o.url+"/login/cli/token", "application/json", strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var tok auth.TerminalToken
	if resp.StatusCode == 200 {
		if err := json.NewDecoder(resp.Body).Decode(&tok); err != nil {
			t.Fatal(err)
		}
	}
	return tok, resp.StatusCode
}

// confirm lets b's person log a terminal in, and returns its code and verifier.
func (b *browser) confirm() (code, verifier string) {
	b.t.Helper()
	verifier = rand.Text() + rand.Text()
	a := b.get("/login/cli?port=43210&challenge=" + nonceFor(verifier))
	form := url.Values{}
	for _, m := range hidden.FindAllStringSubmatch(a.body, -1) {
		form.Set(m[1], m[2])
	}
	if a.StatusCode != 200 || !strings.Contains(a.body, "43210") || !strings.Contains(a.body, "user:ann") ||
		!strings.Contains(a.Header.Get("Content-Security-Policy"), "form-action 'self' http://127.0.0.1:43210") {
		b.t.Fatalf("HTTP %d %v %s", a.StatusCode, a.Header, a.body)
	}
	to := b.post("/login/cli", form).location(b.t)
	if to.Host != "127.0.0.1:43210" || to.Path != "/callback" {
		b.t.Fatal(to)
	}
	return to.Query().Get("code"), verifier
}

func (o *office) as(t *testing.T, token, method, path string) int {
	t.Helper()
	req, _ := http.NewRequest(method, o.url+path, nil)
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestATerminalGetsASessionOfItsOwnOnceThePersonConfirms(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	// Not logged in: by way of the login, and back.
	to := b.get("/login/cli?port=43210&challenge=" + nonceFor("v")).location(t)
	if to.Path != "/login" || !strings.HasPrefix(to.Query().Get("next"), "/login/cli?port=43210&challenge=") {
		t.Fatal(to)
	}
	b.login("ann")
	code, verifier := b.confirm()
	tok, status := o.exchange(t, code, verifier)
	if status != 200 || !strings.HasPrefix(tok.Token, "css_") || tok.Person != "user:ann" || tok.Expires.After(o.now().Add(8*time.Hour)) || tok.Expires.Before(o.now().Add(7*time.Hour)) {
		t.Fatalf("HTTP %d %+v", status, tok)
	}
	if s := o.as(t, tok.Token, "GET", "/who"); s != 200 {
		t.Fatalf("HTTP %d", s)
	}
	if s := o.as(t, tok.Token, "POST", "/act"); s != 200 { // no ambient credential, no CSRF token
		t.Fatalf("HTTP %d", s)
	}
	if s := o.as(t, tok.Token, "GET", "/switch"); s != 403 {
		t.Fatalf("HTTP %d", s)
	}
	if s := o.as(t, tok.Token, "POST", "/enrol"); s != 401 {
		t.Fatalf("a terminal began a fresh login: HTTP %d", s)
	}
	if s := o.as(t, tok.Token[:len(tok.Token)-1], "GET", "/who"); s != 401 {
		t.Fatalf("HTTP %d", s)
	}
	cookie := b.cookies()["countersign-session-"+o.port()]
	if s := o.as(t, cookie, "GET", "/who"); s != 401 {
		t.Fatalf("a cookie as a bearer token: HTTP %d", s)
	}
	if _, status := o.exchange(t, code, verifier); status != 401 {
		t.Fatalf("the code again: HTTP %d", status)
	}
	if s := o.as(t, tok.Token, "POST", "/logout"); s != 204 {
		t.Fatalf("HTTP %d", s)
	}
	if s := o.as(t, tok.Token, "GET", "/who"); s != 401 {
		t.Fatalf("after logout: HTTP %d", s)
	}
	if b.who().Person == "" {
		t.Fatal("the terminal's logout ended the browser's session")
	}
	// The other way round the terminal's ends with the browser's.
	code, verifier = b.confirm()
	tok, _ = o.exchange(t, code, verifier)
	if s := o.as(t, tok.Token, "GET", "/who"); s != 200 {
		t.Fatalf("HTTP %d", s)
	}
	if a := b.post("/logout", url.Values{"csrf": {b.who().CSRF}}); a.StatusCode >= 400 {
		t.Fatalf("HTTP %d", a.StatusCode)
	}
	if s := o.as(t, tok.Token, "GET", "/who"); s != 401 {
		t.Fatalf("a terminal outlives the browser's logout: HTTP %d", s)
	}
}

func TestATerminalsCodeIsOfNoUseToAnybodyElse(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	b.login("ann")
	code, verifier := b.confirm()
	if _, s := o.exchange(t, code, rand.Text()+rand.Text()); s != 401 {
		t.Errorf("another verifier: HTTP %d", s)
	}
	if _, s := o.exchange(t, code, verifier); s != 401 {
		t.Errorf("the right one after it: HTTP %d", s)
	}
	code, verifier = b.confirm()
	o.advance(time.Minute)
	if _, s := o.exchange(t, code, verifier); s != 401 {
		t.Errorf("after a minute: HTTP %d", s)
	}
	code, verifier = b.confirm()
	o.people.Sessions.RevokePerson("user:ann")
	if _, s := o.exchange(t, code, verifier); s != 401 {
		t.Errorf("after a revocation: HTTP %d", s)
	}
	b.login("ann")
	if a := b.post("/login/cli", url.Values{"port": {"43210"}, "challenge": {nonceFor("v")}}); a.StatusCode != 403 {
		t.Errorf("without the CSRF token: HTTP %d", a.StatusCode)
	}
	for _, q := range []string{"", "port=80&challenge=" + nonceFor("v"), "port=43210", "port=43210&challenge=x", "port=43210@evil.example&challenge=" + nonceFor("v"), "port=070000&challenge=" + nonceFor("v")} {
		if a := b.get("/login/cli?" + q); a.StatusCode != 400 {
			t.Errorf("%s: HTTP %d", q, a.StatusCode)
		}
	}
	code, verifier = b.confirm()
	tok, s := o.exchange(t, code, verifier)
	if s != 200 {
		t.Fatal(s)
	}
	o.advance(2 * time.Hour) // no idle end
	if s := o.as(t, tok.Token, "GET", "/who"); s != 200 {
		t.Errorf("HTTP %d", s)
	}
	o.advance(6 * time.Hour)
	if s := o.as(t, tok.Token, "GET", "/who"); s != 401 {
		t.Errorf("after 8 h: HTTP %d", s)
	}
}

func TestPagesOfTheLoginRunAndFetchNothing(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	a := b.get("/login/callback?state=%3Cscript%3E&error=%3Cscript%3Ealert(1)%3C/script%3E")
	csp := a.Header.Get("Content-Security-Policy")
	if a.StatusCode != 401 || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") || strings.Contains(a.body, "<script") || strings.Contains(a.body, "alert") ||
		!strings.HasPrefix(csp, "default-src 'none'; style-src 'self';") || !strings.Contains(csp, "frame-ancestors 'none'") {
		t.Fatalf("HTTP %d %q %s", a.StatusCode, csp, a.body)
	}
	if c := b.get("/login/style.css"); c.StatusCode != 200 || !strings.HasPrefix(c.Header.Get("Content-Type"), "text/css") {
		t.Fatalf("HTTP %d", c.StatusCode)
	}
	req, _ := http.NewRequest(http.MethodGet, o.url+"/login/callback", nil)
	if a := b.do(req); a.StatusCode != 401 || a.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("a program: HTTP %d %s", a.StatusCode, a.Header.Get("Content-Type"))
	}
}

func TestABrowserThatCameByAnotherNameIsSentToTheRightOne(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	to := b.get("http://127.0.0.1:" + o.port() + "/login?next=/who").location(t).String()
	if to != o.url+"/login?next=/who" {
		t.Fatal(to)
	}
}

// apart starts an office whose provider is another site, http://127.0.0.1:PORT,
// and is down until up is called.
func apart(t *testing.T) (o *office, up func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // nobody listens there now
	o = open(t, "http://"+addr, nil)
	return o, func() {
		t.Helper()
		op, err := oidcdev.New(oidcdev.Options{Issuer: "http://" + addr, ClientID: "recorder", ClientSecret: "s3cret", RedirectURIs: []string{o.url + "/login/callback"}, Users: users})
		if err != nil {
			t.Fatal(err)
		}
		if l, err = net.Listen("tcp", addr); err != nil {
			t.Skip("the port was taken meanwhile:", err)
		}
		s := &http.Server{Handler: op.Handler()}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
	}
}

func TestARecorderStartsWhileItsProviderIsDown(t *testing.T) {
	o, up := apart(t)
	b := o.browser(t)
	if a := b.get("/login"); a.StatusCode != 503 || a.Header.Get("Retry-After") == "" || !strings.Contains(a.body, "identity provider") {
		t.Fatalf("HTTP %d %s", a.StatusCode, a.body)
	}
	up()
	o.advance(time.Second) // it is not asked more often
	b.login("ann")
	if b.who().Person != "user:ann" {
		t.Fatal("not logged in")
	}
}

// hostile is an OpenID provider that answers what it is told.
type hostile struct {
	*httptest.Server
	key   *ecdsa.PrivateKey
	other *ecdsa.PrivateKey // not in its key set

	mu        sync.Mutex
	token     func(claims map[string]any) string
	secrets   int // token calls
	sendsOn   int // status by which token calls are sent to elsewhere; 0: they are answered
	elsewhere string
	discover  map[string]any
}

func newHostile(t *testing.T) *hostile {
	t.Helper()
	h := &hostile{}
	var err1, err2 error
	h.key, err1 = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.other, err2 = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	nonces := map[string]string{}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		d := map[string]any{"issuer": h.URL, "authorization_endpoint": h.URL + "/auth", "token_endpoint": h.URL + "/token", "jwks_uri": h.URL + "/keys",
			"id_token_signing_alg_values_supported": []string{"none", "HS256", "ES256"}}
		h.mu.Lock()
		maps.Copy(d, h.discover)
		h.mu.Unlock()
		json.NewEncoder(w).Encode(d)
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{KeyID: "k", Key: h.key.Public()}}})
	})
	mux.HandleFunc("/auth", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		code := rand.Text()
		h.mu.Lock()
		nonces[code] = q.Get("nonce")
		h.mu.Unlock()
		http.Redirect(w, r, q.Get("redirect_uri")+"?code="+code+"&state="+url.QueryEscape(q.Get("state")), http.StatusFound)
	})
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.secrets++
		if h.sendsOn != 0 {
			http.Redirect(w, r, h.elsewhere, h.sendsOn)
			return
		}
		now := time.Now()
		claims := map[string]any{"iss": h.URL, "aud": "recorder", "sub": "1", "exp": now.Add(time.Minute).Unix(), "iat": now.Unix(), "auth_time": now.Unix(),
			"nonce": nonces[r.FormValue("code")], "preferred_username": "ann", "groups": []string{"dba"}}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{"access_token": "x", "token_type": "Bearer", "id_token": h.token(claims)})
	})
	h.Server = httptest.NewServer(mux)
	t.Cleanup(h.Close)
	return h
}

func (h *hostile) sign(claims map[string]any, key any, alg jose.SignatureAlgorithm, kid string) string {
	b, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	return h.signBytes(b, key, alg, kid)
}

func (h *hostile) signBytes(payload []byte, key any, alg jose.SignatureAlgorithm, kid string) string {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		panic(err)
	}
	jws, err := s.Sign(payload)
	if err != nil {
		panic(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return raw
}

func (h *hostile) says(f func(map[string]any) string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.token = f
}

// whyNot has what the log says of each ID token that is refused, so that each
// is refused for what is wrong with it.
var whyNot = map[string]string{
	"another login's nonce":            "the nonce is another login's",
	"no nonce":                         "the nonce is another login's",
	"an empty nonce":                   "the nonce is another login's",
	"another issuer":                   "issued by a different provider",
	"no issuer":                        "issued by a different provider",
	"another audience":                 "expected audience",
	"no audience":                      "expected audience",
	"several audiences, no azp":        "several audiences",
	"issued to another client":         "another client (azp)",
	"an azp that is no name":           "another client (azp)",
	"expired":                          "token is expired",
	"no end":                           "token is expired",
	"issued tomorrow":                  "in the future",
	"never issued":                     "when it was issued",
	"not valid yet":                    "not valid yet",
	"no subject":                       "the subject",
	"no name":                          "does not name a person",
	"a name that is a list":            "does not name a person",
	"a name with a colon":              "does not name a person",
	"a name with a space":              "does not name a person",
	"a name with markup":               "does not name a person",
	"a name over two lines":            "does not name a person",
	"a name in look-alikes":            "does not name a person",
	"a name too long":                  "does not name a person",
	"groups that are no list":          "not a list of names",
	"groups that are no names":         "not a list of names",
	"too many groups":                  "1001 groups",
	"auth_time that is no time":        "auth_time: not a time",
	"alg none":                         `unexpected signature algorithm "none"`,
	"the public key as a secret":       `unexpected signature algorithm "HS256"`,
	"an algorithm it did not announce": `unexpected signature algorithm "RS256"`,
	"an unknown key":                   "failed to verify signature",
	"another key by the same name":     "failed to verify signature",
	"a changed payload":                "failed to verify signature",
	"a claim twice":                    "duplicate object member",
	"no token":                         "malformed jwt",
	"not a token":                      "malformed jwt",
	"a token too long":                 "at most 65536",
}

func TestAnIDTokenThatIsNotThisLoginsIsRefused(t *testing.T) {
	h := newHostile(t)
	o := open(t, h.URL, nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := func(c map[string]any) string { return h.sign(c, h.key, jose.ES256, "k") }
	set := func(k string, v any) func(map[string]any) string {
		return func(c map[string]any) string {
			if v == nil {
				delete(c, k)
			} else {
				c[k] = v
			}
			return good(c)
		}
	}
	now := time.Now().Unix()
	try := func(f func(map[string]any) string) (answer, me) {
		h.says(f)
		b := o.browser(t)
		back := b.get(b.get("/login?next=/who").location(t).String()).location(t)
		return b.get(back.String()), b.who()
	}
	if a, m := try(good); a.StatusCode != 303 || m.Person != "user:ann" {
		t.Fatalf("a good one: HTTP %d %s", a.StatusCode, a.body)
	}
	for name, f := range map[string]func(map[string]any) string{
		"another login's nonce":     set("nonce", nonceFor("x")),
		"no nonce":                  set("nonce", nil),
		"an empty nonce":            set("nonce", ""),
		"another issuer":            set("iss", "https://evil.example"),
		"no issuer":                 set("iss", nil),
		"another audience":          set("aud", "somebody"),
		"no audience":               set("aud", nil),
		"several audiences, no azp": set("aud", []string{"recorder", "somebody"}),
		"issued to another client":  set("azp", "somebody"),
		"an azp that is no name":    set("azp", []string{"recorder"}),
		"expired":                   set("exp", now-1),
		"no end":                    set("exp", nil),
		"issued tomorrow":           set("iat", now+86400),
		"never issued":              set("iat", nil),
		"not valid yet":             set("nbf", now+120),
		"no subject":                set("sub", nil),
		"no name":                   set("preferred_username", nil),
		"a name that is a list":     set("preferred_username", []string{"ann"}),
		"a name with a colon":       set("preferred_username", "user:ann"),
		"a name with a space":       set("preferred_username", "ann ann"),
		"a name with markup":        set("preferred_username", "<b>ann"),
		"a name over two lines":     set("preferred_username", "ann\n"),
		"a name in look-alikes":     set("preferred_username", "аnn"),
		"a name too long":           set("preferred_username", strings.Repeat("a", 129)),
		"groups that are no list":   set("groups", map[string]string{"dba": "yes"}),
		"groups that are no names":  set("groups", []int{1}),
		"too many groups":           set("groups", slices.Repeat([]string{"g"}, 1001)),
		"auth_time that is no time": set("auth_time", "now"),
		"alg none": func(c map[string]any) string {
			b, _ := json.Marshal(c)
			e := base64.RawURLEncoding.EncodeToString
			return e([]byte(`{"alg":"none"}`)) + "." + e(b) + "."
		},
		"the public key as a secret": func(c map[string]any) string {
			b, _ := h.key.PublicKey.Bytes()
			return h.sign(c, b, jose.HS256, "k")
		},
		"an algorithm it did not announce": func(c map[string]any) string { return h.sign(c, rsaKey, jose.RS256, "k") },
		"an unknown key":                   func(c map[string]any) string { return h.sign(c, h.other, jose.ES256, "elsewhere") },
		"another key by the same name":     func(c map[string]any) string { return h.sign(c, h.other, jose.ES256, "k") },
		"a changed payload": func(c map[string]any) string {
			parts := strings.Split(good(c), ".")
			c["preferred_username"] = "bob"
			b, _ := json.Marshal(c)
			return parts[0] + "." + base64.RawURLEncoding.EncodeToString(b) + "." + parts[2]
		},
		"a claim twice": func(c map[string]any) string {
			b, _ := json.Marshal(c)
			return h.signBytes([]byte(`{"preferred_username":"bob",`+string(b[1:])), h.key, jose.ES256, "k")
		},
		"no token":         func(map[string]any) string { return "" },
		"not a token":      func(map[string]any) string { return "a.b.c" },
		"a token too long": set("x", strings.Repeat("x", 70<<10)),
	} {
		t.Run(name, func(t *testing.T) {
			a, m := try(f)
			if a.StatusCode != 401 || m.Person != "" {
				t.Fatalf("HTTP %d, %+v", a.StatusCode, m)
			}
			if why := whyNot[name]; why == "" || !strings.Contains(o.because(), why) {
				t.Fatalf("refused because %q, want %q", o.because(), why)
			}
		})
	}
	for name, f := range map[string]func(map[string]any) string{
		"several audiences with azp": func(c map[string]any) string {
			c["aud"], c["azp"] = []string{"recorder", "somebody"}, "recorder"
			return good(c)
		},
		"a mail address as name": set("preferred_username", "ann@example.com"),
		"one group as a text":    set("groups", "dba"),
		"no groups":              set("groups", nil),
		"groups of odd names":    set("groups", []string{"a b", "dba", "<b>", ""}),
	} {
		if a, m := try(f); a.StatusCode != 303 || m.Person == "" || slices.ContainsFunc(m.Groups, func(g string) bool { return g != "dba" }) {
			t.Errorf("%s: HTTP %d %+v", name, a.StatusCode, m)
		}
	}
}

func TestAFreshLoginThatIsNotFreshIsRefused(t *testing.T) {
	h := newHostile(t)
	o := open(t, h.URL, nil)
	good := func(c map[string]any) string { return h.sign(c, h.key, jose.ES256, "k") }
	h.says(good)
	b := o.browser(t)
	login := func(to string) answer { return b.get(b.get(to).location(t).String()) }
	if a := login(b.get("/login").location(t).String()); a.StatusCode != 303 {
		t.Fatal(a.StatusCode, a.body)
	}
	now := time.Now().Unix()
	for name, change := range map[[2]string]func(map[string]any){
		{"an old login (max_age ignored)", "fresh one (auth_time)"}: func(c map[string]any) { c["auth_time"] = now - 301 },
		{"a login to come", "fresh one (auth_time)"}:                func(c map[string]any) { c["auth_time"] = now + 3600 },
		{"no auth_time", "when the person logged in"}:               func(c map[string]any) { delete(c, "auth_time") },
		{"an old token", "fresh one (iat)"}:                         func(c map[string]any) { c["iat"] = now - 301 },
		{"another nonce", "the nonce is another login's"}:           func(c map[string]any) { c["nonce"] = nonceFor("other") },
		{"the name of another account", "user:ann for user:ann"}:    func(c map[string]any) { c["sub"] = "2" },
	} {
		h.says(func(c map[string]any) string { change(c); return good(c) })
		if a := login(b.enrol(nonceFor("k"))); a.StatusCode != 401 && a.StatusCode != 403 || !strings.Contains(o.because(), name[1]) {
			t.Errorf("%s: HTTP %d because %q", name[0], a.StatusCode, o.because())
		}
	}
	if o.fresh.Load() != nil {
		t.Fatal("it was taken")
	}
	h.says(good)
	if a := login(b.enrol(nonceFor("k"))); a.StatusCode != 303 || o.fresh.Load() == nil {
		t.Fatalf("a fresh one: HTTP %d %s", a.StatusCode, a.body)
	}
}

func TestAProviderThatLeadsElsewhereOrSignsWithSecretsIsNotUsed(t *testing.T) {
	for name, d := range map[string]map[string]any{
		"another issuer":          {"issuer": "https://evil.example"},
		"plain http elsewhere":    {"token_endpoint": "http://evil.example/token"},
		"no token endpoint":       {"token_endpoint": ""},
		"a login that is no page": {"authorization_endpoint": "javascript:alert(1)"},
		"symmetric alone":         {"id_token_signing_alg_values_supported": []string{"HS256", "none"}},
		"no algorithms":           {"id_token_signing_alg_values_supported": nil},
	} {
		h := newHostile(t)
		h.discover = d
		o := open(t, h.URL, nil)
		if a := o.browser(t).get("/login"); a.StatusCode != 503 {
			t.Errorf("%s: HTTP %d to %s", name, a.StatusCode, a.Header.Get("Location"))
		}
	}
}

func TestARefusedCodeIsSentOnce(t *testing.T) {
	h := newHostile(t)
	o := open(t, h.URL, nil)
	h.says(func(map[string]any) string { return "no" })
	b := o.browser(t)
	b.get(b.get(b.get("/login").location(t).String()).location(t).String())
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.secrets != 1 {
		t.Fatalf("%d calls", h.secrets)
	}
}

func TestACodeIsNotSentOnToWhereTheProviderLeads(t *testing.T) {
	h := newHostile(t)
	var asked atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.Redirect(w, r, h.URL+"/token", http.StatusTemporaryRedirect)
	}))
	t.Cleanup(other.Close)
	h.elsewhere = other.URL
	h.says(func(claims map[string]any) string { return h.sign(claims, h.key, jose.ES256, "k") })
	o := open(t, h.URL, nil)
	login := func() int {
		b := o.browser(t)
		return b.get(b.get(b.get("/login").location(t).String()).location(t).String()).StatusCode
	}
	if status := login(); status != http.StatusSeeOther {
		t.Fatalf("HTTP %d by a provider that answers", status)
	}
	for _, h.sendsOn = range []int{301, 302, 303, 307, 308} {
		if status := login(); status < 400 || !strings.Contains(o.because(), fmt.Sprintf("HTTP %d", h.sendsOn)) {
			t.Errorf("%d: HTTP %d, because %q", h.sendsOn, status, o.because())
		}
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("%d calls elsewhere", n)
	}
}

func TestAnEmailNamesAPersonOnlyWhenItIsVerified(t *testing.T) {
	h := newHostile(t)
	o := open(t, h.URL, func(c *auth.PeopleConfig) { c.NameClaim = "email" })
	for verified, want := range map[any]string{true: "user:ann@example.com", false: "", "true": "", nil: ""} {
		h.says(func(c map[string]any) string {
			c["email"] = "ann@example.com"
			if verified != nil {
				c["email_verified"] = verified
			}
			return h.sign(c, h.key, jose.ES256, "k")
		})
		b := o.browser(t)
		b.get(b.get(b.get("/login").location(t).String()).location(t).String())
		if got := b.who().Person; got != want {
			t.Errorf("verified %v: %q", verified, got)
		}
	}
}

func TestAConfigurationThatWouldNotBeSafeIsRefused(t *testing.T) {
	for name, change := range map[string]func(*auth.PeopleConfig){
		"no client":               func(c *auth.PeopleConfig) { c.ClientID = "" },
		"issuer over plain http":  func(c *auth.PeopleConfig) { c.Issuer = "http://id.example.org" },
		"recorder over plain":     func(c *auth.PeopleConfig) { c.BaseURL = "http://record.example.org" },
		"recorder under a path":   func(c *auth.PeopleConfig) { c.BaseURL = "https://example.org/record" },
		"recorder without scheme": func(c *auth.PeopleConfig) { c.BaseURL = "record.example.org" },
		"a role for machines":     func(c *auth.PeopleConfig) { c.Roles = map[auth.Role][]string{auth.Writer: {"dba"}} },
	} {
		c := auth.PeopleConfig{Issuer: "https://id.example.org", ClientID: "recorder", BaseURL: "https://record.example.org"}
		if _, err := auth.NewPeople(c); err != nil {
			t.Fatal(err)
		}
		change(&c)
		if _, err := auth.NewPeople(c); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestAskingWhetherASessionLivesDoesNotKeepItAlive(t *testing.T) {
	o := open(t, "", nil)
	b := o.browser(t)
	if a := b.get("/live"); a.body != "false false " {
		t.Fatal(a.body)
	}
	b.login("ann")
	for range 2 {
		o.advance(14 * time.Minute)
		if a := b.get("/live"); a.body != "true true user:ann" {
			t.Fatal(a.body)
		}
	}
	o.advance(2 * time.Minute)
	if a := b.get("/live"); a.body != "false false " {
		t.Fatal(a.body)
	}
	o.offset.Store(0) // the provider's clock
	b.login("ann")
	code, verifier := b.confirm()
	tok, _ := o.exchange(t, code, verifier)
	req, _ := http.NewRequest(http.MethodGet, o.url+"/live", nil)
	req.Header.Set("Authorization", "Bearer "+tok.Token)
	if a := b.do(req); a.body != "true false " {
		t.Fatal(a.body)
	}
	o.people.Sessions.RevokePerson("user:ann")
	if a := b.do(req); a.body != "false false " {
		t.Fatal(a.body)
	}
}

func TestATerminalsExchangeIsReadStrictly(t *testing.T) {
	o := open(t, "", nil)
	for body, media := range map[string]string{
		`{"code":"a","verifier":"b","x":1}`:            "application/json",
		`{"code":"a"`:                                  "application/json",
		`{"code":"` + strings.Repeat("a", 5000) + `"}`: "application/json",
		`{"code":"a","verifier":"b"}`:                  "text/plain",
	} {
		resp, err := http.Post(o.url+"/login/cli/token", media, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("%.40s: HTTP %d", body, resp.StatusCode)
		}
	}
}
