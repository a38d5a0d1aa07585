package approve_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/apitest"
	"github.com/countersign-dev/countersign/api/approve"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/passkeytest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const catalogue = `
scopes:
  - name: app:write
    target: app://a
    sensitivity: sensitive
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/a, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], reasons: {approver: true}, expires: 10m, standing: {uses: 2, for: 1h}}
  - name: app:admin
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/*, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 2}], expires: 10m}
  - name: app:night
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/n, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], expires: 10m, hours: {from: "@FROM@", to: "@TO@", zone: UTC}}
  - name: app:signed
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/s, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], passkey: true}
`

var (
	key  = store.PrivacyKey("a-privacy-key-of-at-least-32-bytes!!")
	seen *apitest.Seen
)

func TestMain(m *testing.M) {
	var err error
	if seen, err = apitest.Load(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a recorder's people's side over a real ledger, with API tokens and
// an OpenID provider.
type world struct {
	t      testing.TB
	url    string
	set    *scopes.Set
	ledger *ledger.Ledger
	server *approve.Server
	tokens map[string]string
	n      int
}

func newWorld(t testing.TB) *world {
	t.Helper()
	begins := time.Now().UTC().Add(2 * time.Hour)
	text := strings.NewReplacer("@FROM@", begins.Format("15:04"), "@TO@", begins.Add(time.Hour).Format("15:04")).Replace(catalogue)
	set, err := scopes.Parse("catalogue.yaml", []byte(text), "", nil)
	ok(t, err)
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.example.test/ledger")
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	w := &world{t: t, set: set, tokens: map[string]string{}}
	dir := t.TempDir()
	w.ledger, err = ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: key,
		RecheckEvery: -1, Gate: approvals.Gate(scopes.Static(set), nil, key)})
	ok(t, err)
	t.Cleanup(func() { w.ledger.Close() })

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	w.url = fmt.Sprintf("http://localhost:%d", listener.Addr().(*net.TCPAddr).Port)
	a, err := approvals.New(t.Context(), approvals.Config{Ledger: w.ledger, Name: "recorder-1", TrustDomain: "example.test",
		Scopes: scopes.Static(set), PrivacyKey: key, Origin: "log.example.test/ledger", BaseURL: w.url})
	ok(t, err)
	t.Cleanup(func() { a.Close() })

	file := filepath.Join(dir, "tokens.json")
	ok(t, os.WriteFile(file, []byte(`{"version":1,"tokens":[]}`), 0o600))
	for _, x := range []auth.Token{
		{Name: "alice", Role: auth.Approver, Groups: []string{"dba"}}, {Name: "bob", Role: auth.Approver, Groups: []string{"dba", "sre"}},
		{Name: "carol", Role: auth.Approver, Groups: []string{"sre"}}, {Name: "rev", Role: auth.Reviewer}, {Name: "demo", Role: auth.Orchestrator},
		{Name: "broker-1", Role: auth.Writer}, {Name: "resp", Role: auth.Responder, Groups: []string{"dba"}},
	} {
		w.tokens[x.Name], err = auth.CreateToken(file, x, time.Now())
		ok(t, err)
	}
	tokens, err := auth.OpenTokens(file, nil)
	ok(t, err)

	r := server.NewRouter(zap.NewNop(), server.MaxBody)
	op, err := oidcdev.New(oidcdev.Options{Issuer: w.url + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret",
		RedirectURIs: []string{w.url + "/login/callback"}, Users: []oidcdev.User{{Name: "alice", Groups: []string{"dba"}}}})
	ok(t, err)
	r.Handle("/dev/oidc/*", op.Handler())
	people, err := auth.NewPeople(auth.PeopleConfig{Issuer: w.url + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret", BaseURL: w.url})
	ok(t, err)
	people.Routes(r)
	w.server = approve.New(approve.Config{Approvals: a, Guard: &auth.Guard{Tokens: tokens, People: people}, People: people})
	w.server.Routes(r)
	r.Get("/csrf", func(rw http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(rw, people.CSRF(r)) })
	s := httptest.NewUnstartedServer(r)
	s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
	t.Cleanup(w.server.Drain)
	return w
}

// ask has people asked, for the subject where one is named.
func (w *world) ask(scope, subject string) string {
	w.t.Helper()
	w.n++
	grant, err := w.set.Resolve(scope, 5*time.Minute, map[string]string{}, "", "", "")
	ok(w.t, err)
	sc, _ := w.set.Scope(scope)
	id := fmt.Sprintf("req_%d", w.n)
	var lines [][]byte
	for typ, details := range map[store.Type]any{
		store.StepRequested:     store.RequestedDetails{Grant: grant, Join: "join-" + id, Body: "body"},
		store.ApprovalRequested: store.ApprovalRequestedDetails{Approval: "apr_" + id, Grant: grant, Rule: *sc.Approval, Excluded: []string{}},
	} {
		s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: typ, WriterTime: store.At(time.Now()),
			Agent: "spiffe://example.test/orchestrator/demo/run/run-1/step/s", Orchestrator: "demo", Run: "run-1", Step: "s",
			Request: id, Resource: grant.Target, Action: scope, Risk: &store.Risk{Sensitivity: sc.Sensitivity},
			Decision: &store.Decision{Outcome: store.NeedsApproval, Policy: w.set.Digest(), Reasons: []string{"needs approval"}}}}
		if subject != "" {
			s.Subject = &store.Subject{ID: key.Pseudonym(subject)}
			s.Seal(store.SealedSubject, subject)
		}
		s.SetDetails(details)
		line, err := s.Marshal()
		ok(w.t, err)
		if typ == store.StepRequested {
			lines = append([][]byte{line}, lines...)
		} else {
			lines = append(lines, line)
		}
	}
	_, err = w.ledger.Append(context.Background(), ledger.Author{Name: "broker-1"}, lines)
	ok(w.t, err)
	return "apr_" + id
}

type answer struct {
	t      testing.TB
	status int
	raw    []byte
	body   struct {
		approvals.Request
		Approvals []approvals.Request `json:"approvals"`
		Next      string              `json:"next"`
		Passkeys  []approvals.Passkey `json:"passkeys"`
		Location  string              `json:"location"`
		PublicKey struct {
			Challenge string `json:"challenge"`
		} `json:"publicKey"`
	}
	problem struct {
		Type   string         `json:"type"`
		Detail string         `json:"detail"`
		Order  jsontext.Value `json:"order"`
	}
}

// call sends as who, whose exchanges are compared with openapi.yaml.
func (w *world) call(who, method, path, body string) *answer {
	w.t.Helper()
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	ok(w.t, err)
	if who != "" {
		req.Header.Set("Authorization", "Bearer "+w.tokens[who])
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return send(w.t, &http.Client{Transport: seen.Transport(w.t, http.DefaultTransport)}, req)
}

func send(t testing.TB, c *http.Client, req *http.Request) *answer {
	t.Helper()
	resp, err := c.Do(req)
	ok(t, err)
	defer resp.Body.Close()
	a := &answer{t: t, status: resp.StatusCode}
	a.raw, err = io.ReadAll(resp.Body)
	ok(t, err)
	switch resp.Header.Get("Content-Type") {
	case "application/json":
		ok(t, json.Unmarshal(a.raw, &a.body))
	case "application/problem+json":
		ok(t, json.Unmarshal(a.raw, &a.problem))
	}
	return a
}

func (a *answer) want(status int, slug string) *answer {
	a.t.Helper()
	if a.status != status || slug != "" && !strings.HasSuffix(a.problem.Type, "/"+slug) {
		a.t.Fatalf("HTTP %d, want %d %s: %s", a.status, status, slug, a.raw)
	}
	return a
}

func TestDecisionsAreAnsweredWithTheRequestAsItThenStands(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:admin", "")
	a := w.call("alice", "POST", "/approvals/"+id+"/decision", `{"decision":"approve","reason":"fine"}`).want(200, "")
	if a.body.ID != id || a.body.Status != store.StatusPending || a.body.Needs[0] != (approvals.Need{Group: "dba", Count: 2, Approved: 1}) || a.body.Decisions[0].Via != "token" {
		t.Fatalf("%s", a.raw)
	}
	// The same person again changes nothing, and is told how it stands.
	a = w.call("alice", "POST", "/approvals/"+id+"/decision", `{"decision":"approve"}`).want(200, "")
	if a.body.Status != store.StatusPending || a.body.Needs[0].Approved != 1 || len(a.body.Refused) != 1 {
		t.Fatalf("%s", a.raw)
	}
	a = w.call("bob", "POST", "/approvals/"+id+"/decision", `{"decision":"approve"}`).want(200, "")
	if a.body.Status != store.StatusApproved {
		t.Fatalf("%s", a.raw)
	}
	a = w.call("bob", "POST", "/approvals/"+id+"/decision", `{"decision":"deny"}`).want(409, "request-closed")
	if a.problem.Order != nil {
		t.Fatalf("a person is told what is a writer's: %s", a.raw)
	}
	if a := w.call("rev", "GET", "/approvals/"+id, "").want(200, ""); a.body.Status != store.StatusApproved || len(a.body.Decisions) != 2 {
		t.Fatalf("%s", a.raw)
	}
}

func TestEachReasonNotToCountHasItsProblem(t *testing.T) {
	w := newWorld(t)
	mine, write, night, signed := w.ask("app:write", "user:alice"), w.ask("app:write", ""), w.ask("app:night", ""), w.ask("app:signed", "")
	yes := `{"decision":"approve","reason":"fine"}`
	w.call("alice", "POST", "/approvals/"+mine+"/decision", yes).want(403, "self-approval")
	w.call("carol", "POST", "/approvals/"+write+"/decision", yes).want(403, "not-an-approver")
	w.call("alice", "POST", "/approvals/"+write+"/decision", `{"decision":"approve"}`).want(422, "reason-required")
	w.call("alice", "POST", "/approvals/"+signed+"/decision", yes).want(403, "passkey-required")
	if a := w.call("alice", "POST", "/approvals/"+night+"/decision", yes).want(403, "not-an-approver"); !strings.Contains(a.problem.Detail, " UTC") || !strings.Contains(a.problem.Detail, "approvals are taken") {
		t.Fatalf("%s", a.raw)
	}
	w.call("alice", "POST", "/approvals/apr_none/decision", yes).want(404, "not-found")
	w.call("alice", "GET", "/approvals/apr_none", "").want(404, "not-found")
	for _, body := range []string{``, `[]`, `{}`, `{"decision":"maybe"}`, `{"decision":"approve","person":"user:bob"}`, `{"decision":"approve","decision":"deny"}`,
		yes + `{}`, `{"decision":"approve","reason":7}`, `{"decision":"approve","assertion":{}}`, `{"decision":"approve","assertion":"x"}`,
		`{"decision":"approve","standing":{"scopes":[],"uses":1,"until":"2099-01-01T00:00:00Z"}}`} {
		w.call("alice", "POST", "/approvals/"+write+"/decision", body).want(400, "malformed")
	}
	w.call("alice", "POST", "/approvals/"+write+"/decision", `{"decision":"approve","reason":"`+strings.Repeat("x", server.MaxBody)+`"}`).want(413, "body-too-large")
	w.call("alice", "POST", "/approvals/"+write+"/challenge", `{"decision":"approve","reason":"fine"}`).want(403, "passkey-required")
	if a := w.call("alice", "GET", "/approvals/"+write, "").want(200, ""); a.body.Status != store.StatusPending {
		t.Fatalf("%s", a.raw)
	}
}

func TestOnlyPeopleWhoApproveDecideAndReviewersReadAlone(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write", "")
	for _, route := range []string{"GET /approvals", "GET /approvals/" + id, "GET /passkeys", "GET /approvals/events", "POST /approvals/" + id + "/decision", "POST /approvals/" + id + "/challenge",
		"POST /passkeys", "POST /passkeys/options", "POST /passkeys/x/activate", "POST /passkeys/x/revoke", "DELETE /passkeys/x"} {
		method, path, _ := strings.Cut(route, " ")
		body := ""
		if method == "POST" {
			body = `{"decision":"approve","reason":"fine"}`
		}
		w.call("", method, path, body).want(401, "unauthenticated")
		for _, who := range []string{"demo", "broker-1", "resp"} {
			w.call(who, method, path, body).want(403, "role-forbidden")
		}
		if method != "GET" {
			w.call("rev", method, path, body).want(403, "role-forbidden")
		}
	}
	w.call("rev", "GET", "/approvals", "").want(200, "")
	w.call("rev", "GET", "/passkeys", "").want(200, "")
}

func TestListsAreFilteredAndPaged(t *testing.T) {
	w := newWorld(t)
	var ids []string
	for range 5 {
		ids = append(ids, w.ask("app:write", ""))
	}
	w.call("alice", "POST", "/approvals/"+ids[0]+"/decision", `{"decision":"deny","reason":"no"}`).want(200, "")
	w.settle(ids[0])
	a := w.call("bob", "GET", "/approvals?limit=3", "").want(200, "")
	if len(a.body.Approvals) != 3 || a.body.Approvals[0].ID != ids[4] || a.body.Next == "" {
		t.Fatalf("%s", a.raw)
	}
	a = w.call("bob", "GET", "/approvals?limit=3&cursor="+a.body.Next, "").want(200, "")
	if len(a.body.Approvals) != 1 || a.body.Approvals[0].ID != ids[1] || a.body.Next != "" {
		t.Fatalf("%s", a.raw)
	}
	if a := w.call("carol", "GET", "/approvals?state=mine", "").want(200, ""); len(a.body.Approvals) != 0 {
		t.Fatalf("%s", a.raw)
	}
	if a := w.call("alice", "GET", "/approvals?state=decided", "").want(200, ""); len(a.body.Approvals) != 1 || a.body.Approvals[0].Status != store.StatusDenied {
		t.Fatalf("%s", a.raw)
	}
	for _, q := range []string{"state=none", "limit=0", "limit=x", "cursor=x", "sort=up", "state=mine&state=all"} {
		w.call("alice", "GET", "/approvals?"+q, "").want(400, "malformed")
	}
}

// settle waits until lists have what was decided.
func (w *world) settle(id string) {
	w.t.Helper()
	for range 1000 {
		a := w.call("bob", "GET", "/approvals?state=decided", "")
		for _, r := range a.body.Approvals {
			if r.ID == id {
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.t.Fatal("the list does not have " + id)
}

func TestWhatHappensIsStreamed(t *testing.T) {
	w := newWorld(t)
	req, err := http.NewRequest("GET", w.url+"/approvals/events", nil)
	ok(t, err)
	req.Header.Set("Authorization", "Bearer "+w.tokens["alice"])
	resp, err := http.DefaultClient.Do(req)
	ok(t, err)
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatal(resp.Header)
	}
	lines := bufio.NewScanner(resp.Body)
	next := func() (kind, data string) {
		for lines.Scan() {
			if k, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
				kind = k
			}
			if d, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				return kind, d
			}
		}
		t.Fatalf("the stream ended: %v", lines.Err())
		return "", ""
	}
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), ":") {
		t.Fatal("nothing is said at the start")
	}
	id := w.ask("app:write", "")
	if kind, data := next(); kind != "requested" || data != `{"kind":"requested","approval":"`+id+`","status":"pending_approval"}` {
		t.Fatal(kind, data)
	}
	w.call("alice", "POST", "/approvals/"+id+"/decision", `{"decision":"approve","reason":"fine"}`).want(200, "")
	if kind, data := next(); kind != "approved" || data != `{"kind":"approved","approval":"`+id+`","status":"approved"}` {
		t.Fatal(kind, data)
	}
	w.server.Drain()
	for lines.Scan() {
	}
	ok(t, lines.Err())
}

// browser is alice's browser, logged in.
type browser struct {
	w    *world
	c    *http.Client
	csrf string
}

var hidden = regexp.MustCompile(`name="([a-z_]+)" value="([^"]*)"`)

func (b *browser) get(to string) (*http.Response, string) {
	b.w.t.Helper()
	req, err := http.NewRequest("GET", to, nil)
	ok(b.w.t, err)
	req.Header.Set("Accept", "text/html")
	return b.do(req)
}

func (b *browser) do(req *http.Request) (*http.Response, string) {
	b.w.t.Helper()
	resp, err := b.c.Do(req)
	ok(b.w.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	ok(b.w.t, err)
	return resp, string(body)
}

// through goes from the provider's address to as alice and back.
func (b *browser) through(to string) *http.Response {
	b.w.t.Helper()
	resp, _ := b.get(to)
	login := resp.Header.Get("Location")
	_, form := b.get(login)
	m := hidden.FindStringSubmatch(form)
	if m == nil {
		b.w.t.Fatalf("no login: %s", form)
	}
	req, err := http.NewRequest("POST", login[:strings.Index(login, "?")], strings.NewReader(url.Values{m[1]: {m[2]}, "user": {"alice"}}.Encode()))
	ok(b.w.t, err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, _ = b.do(req)
	resp, _ = b.get(resp.Header.Get("Location"))
	resp, body := b.get(resp.Header.Get("Location"))
	if resp.StatusCode != http.StatusSeeOther {
		b.w.t.Fatalf("HTTP %d: %s", resp.StatusCode, body)
	}
	return resp
}

func (w *world) browser() *browser {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	ok(w.t, err)
	b := &browser{w: w, c: &http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	resp, _ := b.get(w.url + "/login?next=/approvals")
	b.through(resp.Header.Get("Location"))
	_, b.csrf = b.get(w.url + "/csrf")
	return b
}

// post sends JSON as the page's script does.
func (b *browser) post(path string, body any) *answer {
	b.w.t.Helper()
	raw, err := json.Marshal(body)
	ok(b.w.t, err)
	req, err := http.NewRequest("POST", b.w.url+path, bytes.NewReader(raw))
	ok(b.w.t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	req.Header.Set("X-CSRF-Token", b.csrf)
	c := *b.c
	c.Transport = seen.Transport(b.w.t, http.DefaultTransport)
	return send(b.w.t, &c, req)
}

func challengeOf(t testing.TB, a *answer) []byte {
	t.Helper()
	c, err := base64.RawURLEncoding.DecodeString(a.body.PublicKey.Challenge)
	ok(t, err)
	return c
}

func TestAPasskeyIsEnrolledWithAFreshLoginAndSignsADecision(t *testing.T) {
	w := newWorld(t)
	b := w.browser()
	k := passkeytest.New("localhost", w.url)
	begun := b.post("/passkeys/options", map[string]any{"label": "laptop"}).want(200, "")
	made := map[string]any{"label": "laptop", "credential": jsontext.Value(k.Create(challengeOf(t, begun)))}
	to := b.post("/passkeys", made).want(200, "")
	if resp := b.through(to.body.Location); resp.Header.Get("Location") != "/passkeys" {
		t.Fatal(resp.Header)
	}
	b.post("/passkeys", made).want(409, "request-closed") // the enrolment is over
	keys := w.call("bob", "GET", "/passkeys", "").want(200, "").body.Passkeys
	if len(keys) != 1 || keys[0].Person != "user:alice" || keys[0].Label != "laptop" || keys[0].Active {
		t.Fatalf("%+v", keys)
	}
	b.post("/passkeys/"+keys[0].ID+"/activate", nil).want(403, "role-forbidden") // one's own
	w.call("carol", "POST", "/passkeys/"+keys[0].ID+"/activate", "").want(200, "")
	w.call("carol", "POST", "/passkeys/"+keys[0].ID+"/activate", "").want(409, "request-closed")
	w.call("carol", "POST", "/passkeys/none/activate", "").want(404, "not-found")

	id := w.ask("app:signed", "")
	say := map[string]any{"decision": "approve", "reason": "checked"}
	c := b.post("/approvals/"+id+"/challenge", say).want(200, "")
	say["assertion"] = jsontext.Value(k.Get(make([]byte, 32)))
	b.post("/approvals/"+id+"/decision", say).want(403, "passkey-required")
	b.post("/approvals/"+id+"/challenge", say).want(400, "malformed")
	say["assertion"] = jsontext.Value(k.Get(challengeOf(t, c)))
	a := b.post("/approvals/"+id+"/decision", say).want(200, "")
	if a.body.Status != store.StatusApproved || !a.body.Decisions[0].Signed || a.body.Decisions[0].Via != "page" {
		t.Fatalf("%s", a.raw)
	}
	w.call("carol", "DELETE", "/passkeys/"+keys[0].ID, "").want(403, "role-forbidden")
	b.post("/passkeys/"+keys[0].ID+"/revoke", nil).want(200, "")
	w.call("alice", "DELETE", "/passkeys/"+keys[0].ID, "").want(409, "request-closed")
}

func TestATokenEnrolsNoPasskey(t *testing.T) {
	w := newWorld(t)
	k := passkeytest.New("localhost", w.url)
	begun := w.call("alice", "POST", "/passkeys/options", `{"label":""}`).want(200, "")
	body, err := json.Marshal(map[string]any{"credential": jsontext.Value(k.Create(challengeOf(t, begun)))})
	ok(t, err)
	w.call("alice", "POST", "/passkeys", string(body)).want(401, "unauthenticated")
	w.call("alice", "POST", "/passkeys", `{"credential":{}}`).want(400, "malformed")
	w.call("alice", "POST", "/passkeys/options", `{"label":"`+strings.Repeat("x", 101)+`"}`).want(400, "malformed")
}

func TestAPagesFormDecidesForTheWholeRunToo(t *testing.T) {
	w := newWorld(t)
	b := w.browser()
	id := w.ask("app:write", "")
	form := url.Values{"csrf": {b.csrf}, "decision": {"approve"}, "reason": {"for the run"}, "standing": {"on"}, "standing_scope": {"app:write"},
		"standing_uses": {"2"}, "standing_until": {store.At(time.Now().Add(30 * time.Minute)).String()}}
	post := func(f url.Values) *answer {
		req, err := http.NewRequest("POST", w.url+"/approvals/"+id+"/decision", strings.NewReader(f.Encode()))
		ok(t, err)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		return send(t, b.c, req)
	}
	forged := url.Values{"decision": {"approve"}, "reason": {"x"}}
	post(forged).want(403, "role-forbidden") // no CSRF token
	a := post(form).want(200, "")
	if a.body.Status != store.StatusApproved || a.body.Decisions[0].Standing == nil || a.body.Decisions[0].Standing.Uses != 2 {
		t.Fatalf("%s", a.raw)
	}
	form.Set("standing_until", "tomorrow")
	post(form).want(400, "malformed")
}

func TestFiftyPeopleAtTheSameInstantMakeOneApproval(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:admin", "")
	var mu sync.Mutex
	got := map[int]int{}
	var wg sync.WaitGroup
	for i := range 50 {
		who := []string{"alice", "bob"}[i%2]
		wg.Go(func() {
			a := w.call(who, "POST", "/approvals/"+id+"/decision", `{"decision":"approve"}`)
			mu.Lock()
			defer mu.Unlock()
			got[a.status]++
		})
	}
	wg.Wait()
	if got[200]+got[409] != 50 || got[200] < 2 {
		t.Fatalf("%v", got)
	}
	if a := w.call("alice", "GET", "/approvals/"+id, ""); a.body.Status != store.StatusApproved || len(a.body.Decisions) != 2 {
		t.Fatalf("%s", a.raw)
	}
}

func FuzzADecisionsBodyIsReadOrRefused(f *testing.F) {
	w := newWorld(f)
	id := w.ask("app:admin", "")
	f.Add(`{"decision":"approve","reason":"fine"}`)
	f.Add(`{"decision":"deny","standing":{"scopes":["app:write"],"uses":1,"until":"2099-01-01T00:00:00Z"}}`)
	f.Add(`{"decision":"approve","assertion":` + string(passkeytest.New("localhost", w.url).Get(nil)) + `}`)
	f.Add("\x00")
	f.Fuzz(func(t *testing.T, body string) {
		// Carol decides nothing, whatever she sends.
		req, err := http.NewRequest("POST", w.url+"/approvals/"+id+"/decision", strings.NewReader(body))
		ok(t, err)
		req.Header.Set("Authorization", "Bearer "+w.tokens["carol"])
		a := send(t, http.DefaultClient, req)
		switch a.status {
		case 400, 403, 413:
		default:
			t.Fatalf("HTTP %d: %s", a.status, a.raw)
		}
	})
}
