package client_test

import (
	"context"
	"crypto/rand"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// recorder is a real recorder: ledger, roles, both APIs.
type recorder struct {
	dir    string
	skey   string
	vkey   string
	log    *store.LogVerifier
	key    store.PrivacyKey
	tokens map[auth.Role]string
	guard  *auth.Guard
	file   *auth.Tokens

	ledger  *ledger.Ledger
	record  *record.Server
	handler chi.Router
	current atomic.Pointer[http.Handler] // handler, for clients that outlive a restart
}

// ServeHTTP answers as the recorder that runs at the moment.
func (r *recorder) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	(*r.current.Load()).ServeHTTP(w, q)
}

func newRecorder(t testing.TB) *recorder {
	t.Helper()
	r := &recorder{dir: t.TempDir(), key: make(store.PrivacyKey, 32), tokens: map[auth.Role]string{}}
	var err error
	if r.skey, r.vkey, err = note.GenerateKey(rand.Reader, "log.example.org"); err != nil {
		t.Fatal(err)
	}
	if r.log, err = store.NewLogVerifier(r.vkey); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "tokens.json")
	for _, role := range auth.Roles {
		if r.tokens[role], err = auth.CreateToken(path, auth.Token{Name: string(role) + "-1", Role: role}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if r.file, err = auth.OpenTokens(path, nil); err != nil {
		t.Fatal(err)
	}
	r.start(t, filepath.Join(r.dir, "ledger"))
	return r
}

// start serves the ledger in dir.
func (r *recorder) start(t testing.TB, dir string) {
	t.Helper()
	signer, err := note.NewSigner(r.skey)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.Open(context.Background(), ledger.Options{Dir: dir, Signer: signer, Verifier: r.vkey, PrivacyKey: r.key, PublishEvery: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	self := record.Self{Ledger: l, Name: "recorder", TrustDomain: "example.org"}
	refusals := auth.NewRefusals("example.org", zap.NewNop(), self.Record)
	t.Cleanup(refusals.Close)
	r.ledger, r.guard = l, &auth.Guard{Tokens: r.file, Refusals: refusals}
	r.record = record.New(l, r.guard)
	r.handler = server.NewRouter(zap.NewNop(), record.MaxBody)
	r.record.Routes(r.handler)
	review.New(l, r.guard, true).Routes(r.handler)
	h := http.Handler(r.handler)
	r.current.Store(&h)
}

// serve puts the recorder behind a real listener.
func (r *recorder) serve(t testing.TB) string {
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	t.Cleanup(func() { r.record.Drain() })
	return srv.URL
}

func (r *recorder) writer(t testing.TB, c client.RecorderConfig) *client.Recorder {
	t.Helper()
	if c.URL == "" {
		c.URL = "http://recorder.internal"
		if c.Transport == nil {
			c.Transport = inProcess(r)
		}
	}
	c.Token, c.Log = client.Token(r.tokens[auth.Writer]), r.log
	w, err := client.NewRecorder(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func (r *recorder) reviewer(t testing.TB, url string) *client.Reviewer {
	t.Helper()
	v, err := client.NewReviewer(client.Config{URL: url, Token: client.Token(r.tokens[auth.Reviewer])})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// alert is an entry that opens nothing.
func alert(text string) *store.Submission {
	s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: store.AlertRaised, WriterTime: store.At(time.Now()),
		Agent: "spiffe://example.org/broker", Action: "test"}}
	s.SetDetails(map[string]string{"text": text})
	s.Seal(store.SealedReason, "because "+text)
	return s
}

// request is an allowed step.requested and its intent.
func request(id, join string) (req, intent *store.Submission) {
	g := store.Grant{Scope: "demo:read", Target: "demo", Engine: "token", Policies: []string{"p"}, Params: map[string]string{}, TTL: store.Duration(time.Minute), Delivery: "direct", Revocable: true}
	e := store.Entry{V: 1, Type: store.StepRequested, WriterTime: store.At(time.Now()), Agent: "spiffe://example.org/orchestrator/demo/run/r/step/s",
		Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: id, Resource: "demo", Action: "demo:read",
		Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:00", Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}}
	req, intent = &store.Submission{Entry: e}, &store.Submission{Entry: e}
	req.ID, intent.ID, intent.Type = store.NewID(), store.NewID(), store.CredentialIssuing
	req.SetDetails(store.RequestedDetails{Grant: g, Join: join, Body: "b"})
	intent.SetDetails(store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(time.Now().Add(time.Minute))})
	return req, intent
}

func announce(r *recorder, ws []auth.Principal) error {
	return record.Self{Ledger: r.ledger, Name: "recorder", TrustDomain: "example.org"}.Announce(context.Background(), ws)
}
