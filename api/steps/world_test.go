package steps_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/apitest"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/api/steps"
	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	trustDomain = "countersign.test"
	key         = "a-privacy-key-of-at-least-32-bytes!!"
)

// One Vault serves all tests of the package.
var (
	vault    *vaultdev.Server
	login    string
	demo     *scopes.Set
	identity *issuer.Identity
	seen     *apitest.Seen
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	fail := func(err error) int { fmt.Fprintln(os.Stderr, err); return 1 }
	var err error
	if seen, err = apitest.Load(); err != nil {
		return fail(err)
	}
	binary, err := vaultdev.Find()
	if err != nil {
		return fail(err)
	}
	if vault, err = vaultdev.Start(context.Background(), binary); err != nil {
		return fail(err)
	}
	defer vault.Stop()
	root, err := vault.Client()
	if err != nil {
		return fail(err)
	}
	if demo, err = scopes.Parse("demo.yaml", scopes.Demo(nil), "", nil); err != nil {
		return fail(err)
	}
	prepared, err := vaultdev.Prepare(context.Background(), root, vaultdev.Options{Scopes: demo})
	if err != nil {
		return fail(err)
	}
	login = prepared.BrokerToken
	dir, err := os.MkdirTemp("", "steps")
	if err != nil {
		return fail(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if identity, err = issuer.OpenIdentity(issuer.IdentityConfig{Issuer: "https://countersign.test", TrustDomain: trustDomain, KeyFile: filepath.Join(dir, "keys.json")}); err != nil {
		return fail(err)
	}
	return m.Run()
}

// world is one broker and one recorder behind their listeners.
type world struct {
	t      testing.TB
	dir    string
	ledger *ledger.Ledger
	broker *broker.Broker
	redis  *redistest.Server
	url    string // of the broker
	record string // of the recorder
	tokens map[string]string
	logs   *syncBuffer
	http   *http.Client

	mu        sync.Mutex
	down      bool         // the recorder does not answer
	catalogue *scopes.Set  // in force; nil: demo
	mint      func() error // before each mint
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) Sync() error { return nil }

func newWorld(t testing.TB, change ...func(*broker.Config)) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), tokens: map[string]string{}, logs: &syncBuffer{}, redis: redistest.Start(t)}
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), w.logs, zap.DebugLevel))
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.countersign.test")
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	verifier, err := store.NewLogVerifier(vkey)
	ok(t, err)
	w.ledger, err = ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(w.dir, "ledger"), Signer: signer, Verifier: vkey,
		PrivacyKey: store.PrivacyKey(key), Grace: 2 * time.Second, RecheckEvery: -1, PublishEvery: 20 * time.Millisecond})
	ok(t, err)
	t.Cleanup(func() { _ = w.ledger.Close() })
	iss, err := issuer.New(t.Context(), issuer.Config{Addr: vault.Addr, Login: issuer.Login{Token: login}, TrustDomain: trustDomain, Log: verifier,
		Scopes: w.Current, Identity: identity, FirstTTL: 2 * time.Second})
	ok(t, err)
	state, err := inflight.Open(inflight.Options{URL: w.redis.URL(), Timeout: 300 * time.Millisecond})
	ok(t, err)
	// Room for one session of HTTP, and no other protocol.
	g := gateway.New(gateway.Config{Recorder: (*recorder)(w), TrustDomain: trustDomain, MaxSessions: 1, Log: log,
		Addresses: map[string]string{store.ProtocolHTTP: "https://gateway.test:8789"}})
	cfg := broker.Config{Writer: "broker-1", Gateway: g, TrustDomain: trustDomain, Recorder: (*recorder)(w), Issuer: minting{iss, w},
		Scopes: w, PeopleURL: "https://people.test", Inflight: state, Identity: identity, PrivacyKey: store.PrivacyKey(key), Grace: 2 * time.Second, Tick: 20 * time.Millisecond, Log: log}
	for _, c := range change {
		c(&cfg)
	}
	w.broker, err = broker.New(cfg)
	ok(t, err)
	t.Cleanup(func() { _ = w.broker.Close(); g.Close(); _ = state.Close(); _ = iss.Close() })

	file := filepath.Join(w.dir, "tokens.json")
	for name, role := range map[string]auth.Role{"demo": auth.Orchestrator, "other": auth.Orchestrator, "orders": auth.ResourceServer,
		"reviewer-a": auth.Reviewer, "broker-1": auth.Writer, "approver-a": auth.Approver, "responder-a": auth.Responder} {
		token := auth.Token{Name: name, Role: role}
		if name == "demo" {
			token.Owners = []string{"user:owner"}
		}
		w.tokens[name], err = auth.CreateToken(file, token, time.Now())
		ok(t, err)
	}
	tokens, err := auth.OpenTokens(file, time.Now)
	ok(t, err)
	refusals := auth.NewRefusals(trustDomain, log, w.broker.Record)
	t.Cleanup(refusals.Close)
	guard := &auth.Guard{Tokens: tokens, Refusals: refusals}
	srv := httptest.NewServer(steps.New(steps.Config{Broker: w.broker, Identity: identity, Guard: guard, Log: log,
		Subject: func(_ context.Context, token string) (string, error) {
			if token != "a.good.token" {
				return "", auth.ErrUnauthenticated
			}
			return "user:u-9", nil
		}}))
	t.Cleanup(srv.Close)
	w.url = srv.URL

	r := server.NewRouter(log, record.MaxBody)
	writers := record.New(w.ledger, guard)
	writers.Routes(r)
	review.New(w.ledger, guard, true).Routes(r)
	rec := httptest.NewServer(r)
	t.Cleanup(func() { writers.Drain(); rec.Close() })
	w.record = rec.URL
	w.http = &http.Client{Transport: seen.Transport(t, &http.Transport{DisableKeepAlives: true}), Timeout: 20 * time.Second}
	w.until("ready", func() bool { return w.broker.Ready(t.Context()) == nil })
	return w
}

// Current is the catalogue in force.
func (w *world) Current() *scopes.Set {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.catalogue == nil {
		return demo
	}
	return w.catalogue
}

// inForce puts the demo catalogue in force with one text replaced everywhere.
func (w *world) inForce(from, to string) {
	w.t.Helper()
	set, err := scopes.Parse("demo.yaml", bytes.ReplaceAll(scopes.Demo(nil), []byte(from), []byte(to)), "", nil)
	ok(w.t, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catalogue = set
}

// recorded appends, as the recorder itself does, an entry about what people were
// asked.
func (w *world) recorded(typ store.Type, request, person string, details func(leaf string, d store.ApprovalRequestedDetails) any) {
	w.t.Helper()
	for p, err := range w.ledger.Entries(context.Background(), 0, w.ledger.Size()) {
		ok(w.t, err)
		e, err := store.ParseLeaf(p.Leaf)
		ok(w.t, err)
		if e.Type != store.ApprovalRequested || e.Request != request {
			continue
		}
		d, err := store.DetailsAs[store.ApprovalRequestedDetails](e)
		ok(w.t, err)
		s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: typ, WriterTime: store.At(time.Now()), Agent: "spiffe://countersign.test/recorder",
			Orchestrator: e.Orchestrator, Run: e.Run, Step: e.Step, Request: e.Request, Resource: e.Resource, Action: e.Action}}
		if person != "" {
			s.Person = store.Ptr(store.PrivacyKey(key).Pseudonym("user:" + person))
			s.Seal(store.SealedReason, "looked at it")
		}
		s.SetDetails(details(store.HashText(store.LeafHash(p.Leaf)), d))
		line, err := s.Marshal()
		ok(w.t, err)
		_, err = w.ledger.Append(context.Background(), ledger.Author{Name: "recorder", Recorder: true}, [][]byte{line})
		ok(w.t, err)
		return
	}
	w.t.Fatalf("nobody was asked about %s", request)
}

// decide is a decision of one of dba.
func (w *world) decide(request, person, decision string) {
	w.t.Helper()
	w.recorded(store.ApprovalDecided, request, person, func(leaf string, d store.ApprovalRequestedDetails) any {
		return store.DecidedDetails{Approval: d.Approval, Requested: leaf, Decision: decision, Groups: []string{"dba"}, Via: "page"}
	})
}

// recorder hands entries to the ledger in this process, unless it is down.
type recorder world

func (r *recorder) gone() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		return fmt.Errorf("%w: connection refused", store.ErrUnavailable)
	}
	return nil
}

func (r *recorder) Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	if err := r.gone(); err != nil {
		return nil, err
	}
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			return nil, err
		}
		lines = append(lines, b)
	}
	return r.ledger.Append(ctx, ledger.Author{Name: "broker-1"}, lines)
}

func (r *recorder) Open(ctx context.Context, request string) (*store.Appended, error) {
	if err := r.gone(); err != nil {
		return nil, err
	}
	return r.ledger.OpenSet(ctx, request)
}

func (r *recorder) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	return r.ledger.Follow(ctx, after, fn)
}

// minting is the real issuer, which fails or waits where a test wants it to.
type minting struct {
	*issuer.Issuer
	w *world
}

func (m minting) Mint(ctx context.Context, warrant store.Warrant) (*issuer.Minted, error) {
	m.w.mu.Lock()
	fn := m.w.mint
	m.w.mu.Unlock()
	if fn != nil {
		if err := fn(); err != nil {
			return nil, err
		}
	}
	return m.Issuer.Mint(ctx, warrant)
}

func (w *world) set(fn func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn()
}

func (w *world) until(what string, fn func() bool) {
	w.t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("never: %s\n%s", what, w.logs.b.String())
		}
	}
}

// answer is a response, read to its end.
type answer struct {
	status int
	header http.Header
	raw    []byte
	body   map[string]any
}

func (a *answer) slug() string {
	t, _ := a.body["type"].(string)
	return strings.TrimPrefix(t, "https://countersign.dev/problems/")
}

// token digs a member out of the credential.
func (a *answer) secret(name string) string {
	c, _ := a.body["credential"].(map[string]any)
	s, _ := c[name].(string)
	return s
}

// call sends one request; header is name, value, name, value…
func (w *world) call(who, method, url, body string, header ...string) *answer {
	w.t.Helper()
	a, err := w.try(w.t.Context(), who, method, url, body, header...)
	ok(w.t, err)
	return a
}

func (w *world) try(ctx context.Context, who, method, url, body string, header ...string) (*answer, error) {
	if strings.HasPrefix(url, "/") {
		url = w.url + url
	}
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(ctx, method, url, in)
	if err != nil {
		return nil, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if who != "" {
		token := w.tokens[who]
		if token == "" {
			token = who
		}
		r.Header.Set("Authorization", "Bearer "+token)
	}
	if len(header) > 1 && header[0] == "Content-Type" {
		r.Header.Del("Content-Type")
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	resp, err := w.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	a := &answer{status: resp.StatusCode, header: resp.Header}
	if a.raw, err = io.ReadAll(resp.Body); err != nil {
		return nil, err
	}
	if strings.Contains(resp.Header.Get("Content-Type"), "json") {
		if err := json.Unmarshal(a.raw, &a.body); err != nil {
			return nil, errors.Join(err, fmt.Errorf("%s", a.raw))
		}
	}
	return a, nil
}

// want checks status and problem slug ("" where none).
func (a *answer) want(t testing.TB, status int, slug string) *answer {
	t.Helper()
	if a.status != status || a.status >= 400 && a.slug() != slug {
		t.Fatalf("%d %s, want %d %s\n%s", a.status, a.slug(), status, slug, a.raw)
	}
	return a
}

// types lists what is on record of a request's or anybody's, but for
// policy.loaded.
func (w *world) types() []string {
	w.t.Helper()
	var out []string
	for s, err := range w.ledger.Entries(context.Background(), 0, w.ledger.Size()) {
		ok(w.t, err)
		e, err := store.ParseLeaf(s.Leaf)
		ok(w.t, err)
		if e.Type != store.PolicyLoaded {
			out = append(out, string(e.Type))
		}
	}
	return out
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
