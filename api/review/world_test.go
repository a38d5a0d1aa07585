package review

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-webauthn/webauthn/protocol"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/apitest"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals/passkeytest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const origin = "log.example.test/ledger"

var (
	key  = store.PrivacyKey("a-privacy-key-of-at-least-32-bytes!!")
	noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is the reviewers' side over a real ledger, with tokens and an OpenID
// provider.
type world struct {
	t      testing.TB
	url    string
	ledger *ledger.Ledger
	server *Server
	verify *store.LogVerifier
	tokens map[auth.Role]string
	seen   *apitest.Seen // checks answers against openapi.yaml
	n      int

	mu  sync.Mutex
	now time.Time
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func newWorld(t testing.TB) *world {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	w := &world{t: t, now: noon, tokens: map[auth.Role]string{}}
	w.verify, err = store.NewLogVerifier(vkey)
	ok(t, err)
	w.seen, err = apitest.Load()
	ok(t, err)
	dir := t.TempDir()
	w.ledger, err = ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: key,
		RecheckEvery: -1, Now: w.clock})
	ok(t, err)
	t.Cleanup(func() { w.ledger.Close() })
	file := filepath.Join(dir, "tokens.json")
	ok(t, os.WriteFile(file, []byte(`{"version":1,"tokens":[]}`), 0o600))
	for _, role := range auth.Roles {
		w.tokens[role], err = auth.CreateToken(file, auth.Token{Name: "the-" + string(role), Role: role, Groups: map[auth.Role][]string{auth.Approver: {"dba"}, auth.Responder: {"dba"}}[role]}, time.Now())
		ok(t, err)
	}
	tokens, err := auth.OpenTokens(file, nil)
	ok(t, err)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	w.url = fmt.Sprintf("http://localhost:%d", listener.Addr().(*net.TCPAddr).Port)
	r := server.NewRouter(zap.NewNop(), server.MaxBody)
	op, err := oidcdev.New(oidcdev.Options{Issuer: w.url + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret", RedirectURIs: []string{w.url + "/login/callback"},
		Users: []oidcdev.User{{Name: "rita", Groups: []string{"audit"}}, {Name: "alice", Groups: []string{"dba"}}}})
	ok(t, err)
	r.Handle("/dev/oidc/*", op.Handler())
	self := record.Self{Ledger: w.ledger, Name: "recorder", TrustDomain: "example.test"}
	refusals := auth.NewRefusals("example.test", zap.NewNop(), self.Record)
	refusals.PrivacyKey = key
	t.Cleanup(refusals.Close)
	people, err := auth.NewPeople(auth.PeopleConfig{Issuer: w.url + "/dev/oidc", ClientID: "recorder", ClientSecret: "s3cret", BaseURL: w.url,
		Roles: map[auth.Role][]string{auth.Reviewer: {"audit"}}, Refusals: refusals})
	ok(t, err)
	people.Routes(r)
	w.server = New(w.ledger, &auth.Guard{Tokens: tokens, People: people, Refusals: refusals}, false)
	w.server.now = w.clock
	w.server.Routes(r)
	s := httptest.NewUnstartedServer(r)
	s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
	return w
}

// get asks with a role's token; accept is what for.
func (w *world) get(role auth.Role, accept, path string) (*http.Response, string) {
	w.t.Helper()
	req, err := http.NewRequest(http.MethodGet, w.url+path, nil)
	ok(w.t, err)
	if role != "" {
		req.Header.Set("Authorization", "Bearer "+w.tokens[role])
	}
	req.Header.Set("Accept", accept)
	transport := http.DefaultTransport
	if accept == "application/json" && !strings.HasPrefix(path, "/history/static/") {
		transport = w.seen.Transport(w.t, transport)
	}
	resp, err := transport.RoundTrip(req)
	ok(w.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	ok(w.t, err)
	return resp, string(b)
}

// page is a page as a reviewer's token gets it.
func (w *world) page(path string) string {
	w.t.Helper()
	resp, body := w.get(auth.Reviewer, "text/html", path)
	if resp.StatusCode != http.StatusOK {
		w.t.Fatalf("%s: %s\n%s", path, resp.Status, body)
	}
	if strings.Contains(body, "Counting…") || strings.Contains(body, "Being counted") {
		time.Sleep(20 * time.Millisecond) // read in the background; the page asks to be loaded again
		return w.page(path)
	}
	return body
}

// login returns a browser in which a person is logged in.
func (w *world) login(name string) *http.Client {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	ok(w.t, err)
	c := &http.Client{Jar: jar}
	req, err := http.NewRequest(http.MethodGet, w.url+"/history", nil)
	ok(w.t, err)
	req.Header.Set("Accept", "text/html")
	resp, err := c.Do(req)
	ok(w.t, err)
	body, err := io.ReadAll(resp.Body)
	ok(w.t, err)
	resp.Body.Close()
	// The provider asks who it is: a form with one button per user.
	at := resp.Request.URL
	form := at.Query()
	for _, piece := range strings.Split(string(body), "<input")[1:] {
		piece, _, _ = strings.Cut(piece, ">")
		n, v := attr(piece, "name"), attr(piece, "value")
		if n != "" {
			form.Set(n, v)
		}
	}
	for _, piece := range strings.Split(string(body), "<button")[1:] {
		piece, _, _ = strings.Cut(piece, ">")
		if attr(piece, "value") == name || strings.Contains(attr(piece, "value"), name) {
			form.Set(attr(piece, "name"), attr(piece, "value"))
		}
	}
	action := at
	if _, rest, found := strings.Cut(string(body), "<form"); found {
		if a := attr(strings.SplitN(rest, ">", 2)[0], "action"); a != "" {
			action, err = at.Parse(a)
			ok(w.t, err)
		}
	}
	resp, err = c.PostForm(action.String(), form)
	ok(w.t, err)
	resp.Body.Close()
	return c
}

func attr(tag, name string) string {
	_, rest, found := strings.Cut(tag, name+`="`)
	if !found {
		return ""
	}
	v, _, _ := strings.Cut(rest, `"`)
	return strings.NewReplacer("&amp;", "&", "&#34;", `"`, "&#39;", "'", "&lt;", "<", "&gt;", ">").Replace(v)
}

// flow is one request of a step, entry by entry.
type flow struct {
	w            *world
	orchestrator string
	run, step    string
	scope        string
	target       string
	request      string
	grant        store.Grant
	reason       string
	subject      string
	intent       string
}

func (w *world) flow(run, step, scope, target string) *flow {
	w.n++
	return &flow{w: w, orchestrator: "nightly-billing", run: run, step: step, scope: scope, target: target, request: fmt.Sprintf("req_%06d", w.n),
		grant: store.Grant{Scope: scope, Target: target, Engine: "database", Role: "orders-ro", Policies: []string{"countersign-orders"}, Method: "read", Path: "database/creds/orders",
			Params: map[string]string{}, TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}}
}

func (f *flow) entry(t store.Type, outcome store.Outcome, details any) *store.Submission {
	s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: t, WriterTime: store.At(f.w.clock()),
		Agent:        "spiffe://example.test/orchestrator/" + f.orchestrator + "/run/" + f.run + "/step/" + f.step,
		Orchestrator: f.orchestrator, Run: f.run, Step: f.step, Request: f.request, Resource: f.target, Action: f.scope,
		Risk: &store.Risk{Sensitivity: "sensitive"}, Decision: &store.Decision{Outcome: outcome, Policy: "sha256:00", Reasons: []string{}}}}
	if f.subject != "" {
		s.Subject = &store.Subject{ID: key.Pseudonym(f.subject)}
	}
	s.SetDetails(details)
	return s
}

func (w *world) append(by ledger.Author, subs ...*store.Submission) []store.Proven {
	w.t.Helper()
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		ok(w.t, err)
		lines = append(lines, b)
	}
	a, err := w.ledger.Append(context.Background(), by, lines)
	ok(w.t, err)
	return a.Entries
}

var (
	broker   = ledger.Author{Name: "broker-1"}
	recorder = ledger.Author{Name: "recorder", Recorder: true}
)

// asked is the request and what policy said.
func (f *flow) asked(outcome store.Outcome, reasons ...string) *store.Submission {
	d := store.RequestedDetails{Grant: f.grant, Join: "join-" + f.request, Body: "body"}
	if outcome == store.Deny {
		d.Join = ""
	}
	s := f.entry(store.StepRequested, outcome, d)
	s.Decision.Reasons = append(s.Decision.Reasons, reasons...)
	s.Seal(store.SealedReason, f.reason)
	s.Seal(store.SealedSubject, f.subject)
	return s
}

// issue appends intent and credential, after what else there is to append.
func (f *flow) issue(approval string, before ...*store.Submission) {
	end := store.At(f.w.clock().Add(5 * time.Minute))
	intent := f.entry(store.CredentialIssuing, store.Allow, store.IssuingDetails{Attempt: 1, Grant: f.grant.Digest(), NotPast: end, Approval: approval})
	f.intent = intent.ID
	f.w.append(broker, append(before, intent,
		f.entry(store.CredentialIssued, store.Allow, store.IssuedDetails{Intent: f.intent, Attempt: 1, Kind: "database", Revocable: true, Accessor: "acc-" + f.request, Expires: end}))...)
}

func (f *flow) use(what string) {
	f.w.append(broker, f.entry(store.CredentialUsed, store.Allow, store.UsedDetails{Intent: f.intent, Via: "introspection", By: "orders-api", Use: what}))
}

// path is a request whose credential stays on the access path.
func (w *world) path(run, step string) *flow {
	f := w.flow(run, step, "orders-db:read", "postgres://orders")
	f.reason, f.subject = "Reconcile refunds, OPS-1200", "user:u-1024@example.com"
	f.grant.Delivery, f.grant.Access = "gateway", &store.Access{Protocol: store.ProtocolPostgres, Upstream: "db.internal:5432/orders", Postgres: &store.PostgresAccess{},
		Masking: store.Masking{Rules: []store.MaskRule{{Column: "orders.email"}}}}
	w.append(broker, f.asked(store.Allow))
	f.issue("")
	return f
}

// pass puts uses on the access path on record.
func (f *flow) pass(statements ...string) (uses []*store.Submission) {
	for _, s := range statements {
		use, _, _ := strings.Cut(s, " ")
		u := f.entry(store.CredentialUsed, store.Allow, store.UsedDetails{Intent: f.intent, Via: store.ViaGateway, By: "gateway", Use: use + " orders", Protocol: store.ProtocolPostgres,
			Conn: "c1", Objects: []string{"orders"}, Access: f.grant.Access.Digest(), Masking: f.grant.Access.Masking.Digest()})
		u.Seal(store.SealedStatement, s)
		uses = append(uses, u)
	}
	f.w.append(broker, uses...)
	return uses
}

func (f *flow) revoke(cause string) { f.w.append(broker, f.revoked(cause)) }

func (f *flow) revoked(cause string) *store.Submission {
	s := f.entry(store.CredentialRevoked, store.Allow, store.ClosedDetails{Intent: f.intent, Attempt: 1})
	s.Cause = store.Ptr(cause)
	return s
}

func (f *flow) finish(outcome, summary string) { f.w.append(broker, f.finished(outcome, summary)) }

func (f *flow) finished(outcome, summary string) *store.Submission {
	s := f.entry(store.StepFinished, store.Allow, store.FinishedDetails{Outcome: outcome, Target: f.target})
	s.Seal(store.SealedSummary, summary)
	return s
}

// passkey enrols and activates a key of a person.
func (w *world) passkey(name string) (*passkeytest.Key, string) {
	w.t.Helper()
	k := passkeytest.New("localhost", "http://localhost:8788")
	c, err := protocol.ParseCredentialCreationResponseBytes(k.Create([]byte("challenge")))
	ok(w.t, err)
	f := &flow{w: w}
	s := f.entry(store.PasskeyEnrolled, store.Allow, store.EnrolledDetails{Credential: k.ID(), Key: c.Response.AttestationObject.AuthData.AttData.CredentialPublicKey,
		RPID: "localhost", Origin: "http://localhost:8788", Salt: make([]byte, 32), ProviderKey: []byte("{}")})
	s.Agent, s.Person, s.Decision, s.Risk = "spiffe://example.test/recorder", store.Ptr(key.Pseudonym(name)), nil, nil
	s.Seal(store.SealedPerson, name)
	a := f.entry(store.PasskeyActivated, store.Allow, store.ActivatedDetails{Enrolled: s.ID, By: key.Pseudonym("user:second")})
	a.Agent, a.Person, a.Decision, a.Risk = s.Agent, s.Person, nil, nil
	w.append(recorder, s, a)
	return k, s.ID
}

// approval is what people are asked, after its request.
func (f *flow) ask(groups ...store.RuleGroup) string {
	p := f.w.append(broker, f.asked(store.NeedsApproval, "writes outside the change window"), f.askPeople(groups))
	return store.HashText(store.LeafHash(p[1].Leaf))
}

func (f *flow) askPeople(groups []store.RuleGroup) *store.Submission {
	s := f.entry(store.ApprovalRequested, store.NeedsApproval, store.ApprovalRequestedDetails{Approval: "apr_" + f.request, Grant: f.grant, Excluded: []string{},
		Rule: store.Rule{Groups: groups, Expires: store.Duration(time.Hour), Collect: store.Duration(time.Hour), Reasons: store.RuleReasons{Requester: true, Approver: true}}})
	s.Seal(store.SealedReason, f.reason)
	s.Seal(store.SealedSubject, f.subject)
	return s
}

// decide is a person's decision on what has the leaf hash requested, signed
// where there is a key. spoil changes the entry after it was signed.
func (f *flow) decide(requested, person, decision, reason string, k *passkeytest.Key, enrolled string, spoil func(*store.DecidedDetails)) {
	d := store.DecidedDetails{Approval: "apr_" + f.request, Requested: requested, Decision: decision, Groups: []string{"dba"}, Via: "page"}
	s := f.entry(store.ApprovalDecided, store.Allow, d)
	s.Agent, s.Person = "spiffe://example.test/recorder", store.Ptr(key.Pseudonym(person))
	s.Seal(store.SealedReason, reason)
	s.Seal(store.SealedPerson, person)
	if k != nil {
		digest := store.DecisionDigest(origin, &s.Entry, &d)
		a := &store.Assertion{Enrolled: enrolled}
		a.AuthenticatorData, a.ClientData, a.Signature = k.Sign(digest[:])
		d.Assertion = a
	}
	if spoil != nil {
		spoil(&d)
	}
	s.SetDetails(d)
	f.w.append(recorder, s)
}

// busy fills the record with a working day: runs of a few steps, a denial, a
// failure, refusals and one sensitive step that people approve.
func (w *world) busy() (sensitive *flow) {
	k, enrolled := w.passkey("user:alice")
	for i := range 40 {
		run := fmt.Sprintf("run-%d", 4600+i)
		for j, step := range []string{"load-orders", "reconcile-refunds", "report"} {
			f := w.flow(run, step, []string{"orders-db:read", "vault:demo-read", "identity:step"}[j], []string{"postgres://orders", "vault://secret/data/demo", "identity"}[j])
			f.orchestrator = []string{"nightly-billing", "release-train", "support-bot"}[i%3]
			f.reason, f.subject = fmt.Sprintf("Reconcile refunds, OPS-%d", 1200+i), "user:u-1024@example.com"
			switch {
			case i%9 == 4 && j == 1:
				w.append(broker, f.asked(store.Deny, "the change window is closed"))
			default:
				f.issue("", f.asked(store.Allow)) // a commit for each would take most of the tests' time
				w.advance(20 * time.Second)
				for range i % 4 {
					f.use("SELECT on orders")
				}
				w.advance(40 * time.Second)
				w.append(broker, f.revoked("step finished"), f.finished("succeeded", "14 refunds reconciled"))
			}
			w.advance(11 * time.Minute)
		}
	}
	sensitive = w.flow("run-4711", "reconcile-refunds", "vault:demo-write", "vault://secret/data/demo")
	sensitive.reason, sensitive.subject = "Rotate the demo key, OPS-1234.\nThe nightly job found that it is too old.", "user:u-1024@example.com"
	requested := sensitive.ask(store.RuleGroup{Group: "dba", Count: 2})
	w.advance(4 * time.Minute)
	sensitive.decide(requested, "user:alice", store.Approve, "Checked with finance. Looks right.", k, enrolled, nil)
	w.advance(time.Minute)
	sensitive.decide(requested, "user:bob", store.Approve, "Fine.", nil, "", nil)
	sensitive.issue(sensitive.request)
	w.advance(30 * time.Second)
	sensitive.use("write secret/data/demo")
	w.advance(30 * time.Second)
	sensitive.revoke("step finished")
	sensitive.finish("succeeded", "The key is rotated.")
	w.advance(time.Minute)
	return sensitive
}
