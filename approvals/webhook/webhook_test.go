package webhook

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/store"
)

var (
	secret = "whsec_" + base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	older  = "whsec_" + base64.StdEncoding.EncodeToString([]byte("fedcba9876543210fedcba9876543210"))
)

// endpoint is an operator's server that keeps what it takes.
type endpoint struct {
	*httptest.Server
	mu     sync.Mutex
	status []int // of the next answers; 204 afterwards
	header http.Header
	got    []Message
	raw    []string
	ids    []string
	failed []error
}

func newEndpoint(t *testing.T, status ...int) *endpoint {
	e := &endpoint{status: status, header: http.Header{}}
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, s := range []string{secret, older} {
			wh, err := standardwebhooks.NewWebhook(s)
			e.failed = append(e.failed, errors.Join(err, wh.Verify(body, r.Header)))
		}
		var m Message
		e.failed = append(e.failed, json.Unmarshal(body, &m))
		e.got, e.raw, e.ids = append(e.got, m), append(e.raw, string(body)), append(e.ids, r.Header.Get("webhook-id"))
		status := http.StatusNoContent
		if len(e.status) > 0 {
			status, e.status = e.status[0], e.status[1:]
		}
		for k, v := range e.header {
			w.Header()[k] = v
		}
		w.WriteHeader(status)
	}))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) check(t *testing.T) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := errors.Join(e.failed...); err != nil {
		t.Fatal(err)
	}
}

func request(status store.Status) *approvals.Request {
	return &approvals.Request{ID: "apr_1", Request: "req_1", Status: status, Scope: "vault:demo-write", Reason: "because", Asked: time.Now(), LeafHash: "x", URL: "http://localhost/approvals/apr_1"}
}

func newHook(t *testing.T, url string) *Endpoint {
	t.Helper()
	h, err := New(Config{Name: "ops", URL: url, Secrets: []string{secret, older}})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func send(t *testing.T, h *Endpoint, r *approvals.Request) error {
	_, err := h.Send(t.Context(), outbox.Delivery{Request: r, Version: outbox.Version(r)})
	return err
}

func TestAMessageIsSignedWithEachSecretAndNamedByItsState(t *testing.T) {
	e := newEndpoint(t)
	h := newHook(t, e.URL)
	voted := request(store.StatusPending)
	voted.Decisions = []approvals.Decided{{Person: "user:ana", Decision: store.Approve}}
	for _, r := range []*approvals.Request{request(store.StatusPending), request(store.StatusPending), voted, request(store.StatusApproved), request(store.StatusDenied), request(store.StatusExpired), request(store.StatusIssued)} {
		if err := send(t, h, r); err != nil {
			t.Fatal(err)
		}
	}
	e.check(t)
	want := []string{"requested", "requested", "decided", "approved", "denied", "expired", "issued"}
	for i, m := range e.got {
		if m.Type != "approval."+want[i] || m.Data.Approval.ID != "apr_1" || m.Data.Approval.Reason != "because" {
			t.Errorf("%d: %s", i, e.raw[i])
		}
		if same := e.ids[i] == e.ids[0]; same != (i < 2) || strings.Contains(e.ids[i], ".") {
			t.Errorf("%d: webhook-id %q", i, e.ids[i])
		}
	}
}

func TestAnotherAnswerThan2xxIsAFailureAndNoRedirectIsFollowed(t *testing.T) {
	other := newEndpoint(t)
	for _, status := range []int{301, 307, 400, 401, 410, 422, 429, 500, 503} {
		e := newEndpoint(t, status)
		e.header.Set("Location", other.URL)
		e.header.Set("Retry-After", "7")
		err := send(t, newHook(t, e.URL), request(store.StatusPending))
		var f *outbox.Failure
		if !errors.As(err, &f) || f.Down && f.After != 7*time.Second || f.Down == (status == 400 || status == 422) {
			t.Errorf("%d: %+v", status, err)
		}
	}
	if len(other.got) != 0 {
		t.Fatal("a redirect was followed")
	}
}

func TestAnErrorNamesNoAddress(t *testing.T) {
	e := newEndpoint(t)
	url := e.URL + "/a-secret-path"
	e.Close()
	if err := send(t, newHook(t, url), request(store.StatusPending)); err == nil || strings.Contains(err.Error(), "a-secret-path") {
		t.Fatal(err)
	}
}

func TestPasskeysAreToldWithTypesOfTheirOwn(t *testing.T) {
	e := newEndpoint(t)
	h := newHook(t, e.URL)
	k := &approvals.Passkey{ID: "0190a6e0-0000-7000-8000-000000000001", Person: "user:ana", Label: "laptop", Enrolled: time.Now()}
	for _, change := range []func(){func() {}, func() { k.Active, k.Activated = true, time.Now() }, func() { k.Revoked = time.Now() }} {
		change()
		if _, err := h.Send(t.Context(), outbox.Delivery{Passkey: k, Version: outbox.PasskeyVersion(k)}); err != nil {
			t.Fatal(err)
		}
	}
	e.check(t)
	for i, want := range []string{"enrolled", "activated", "revoked"} {
		m := e.got[i]
		if m.Type != "passkey."+want || m.Data.Passkey == nil || m.Data.Passkey.Person != "user:ana" || m.Data.Approval != nil || e.ids[i] != k.ID+"-"+want {
			t.Errorf("%s: %s under %q", want, e.raw[i], e.ids[i])
		}
	}
}

// room has one request.
type room struct{ r *approvals.Request }

func (r room) Get(context.Context, string) (*approvals.Request, error) { return r.r, nil }
func (r room) List(context.Context, approvals.Filter) ([]approvals.Request, string, error) {
	return []approvals.Request{*r.r}, "", nil
}
func (r room) Passkeys(context.Context, *approvals.Person) ([]approvals.Passkey, error) {
	return nil, nil
}
func (r room) Subscribe() (<-chan approvals.Event, func()) {
	return make(chan approvals.Event), func() {}
}

func TestTheOutboxTellsEveryEndpointUntilItHasIt(t *testing.T) {
	a, b := newEndpoint(t, 500, 503), newEndpoint(t)
	hooks := []outbox.Sender{newHook(t, a.URL)}
	second, err := New(Config{Name: "second", URL: b.URL, Secrets: []string{secret, older}})
	if err != nil {
		t.Fatal(err)
	}
	o, err := outbox.Open(t.Context(), outbox.Config{File: filepath.Join(t.TempDir(), "outbox.db"), Source: room{request(store.StatusPending)}, Senders: append(hooks, second),
		MinWait: time.Millisecond, MaxWait: time.Millisecond, Settle: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		n, err1 := o.Waiting(t.Context(), "webhook:ops")
		m, err2 := o.Waiting(t.Context(), "webhook:second")
		a.mu.Lock()
		b.mu.Lock()
		done := err1 == nil && err2 == nil && n == 0 && m == 0 && len(a.ids) == 3 && len(b.ids) == 1
		a.mu.Unlock()
		b.mu.Unlock()
		if done {
			break
		}
		if time.Now().After(end) {
			t.Fatal("not told")
		}
	}
	a.check(t)
	b.check(t)
	if a.ids[0] != a.ids[2] || a.ids[0] != b.ids[0] {
		t.Fatalf("ids %q, %q", a.ids, b.ids)
	}
}

func TestAnEndpointThatCannotBeMeantIsRefused(t *testing.T) {
	for name, c := range map[string]Config{
		"in the clear":       {Name: "x", URL: "http://hooks.example.com/", Secrets: []string{secret}},
		"no secret":          {Name: "x", URL: "https://hooks.example.com/"},
		"short secret":       {Name: "x", URL: "https://hooks.example.com/", Secrets: []string{"whsec_c2hvcnQ="}},
		"secret of no form":  {Name: "x", URL: "https://hooks.example.com/", Secrets: []string{strings.TrimPrefix(secret, "whsec_")}},
		"name with a space":  {Name: "x y", URL: "https://hooks.example.com/", Secrets: []string{secret}},
		"one of two is none": {Name: "x", URL: "https://hooks.example.com/", Secrets: []string{secret, "whsec_"}},
	} {
		if _, err := New(c); err == nil || strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "7", "-1", "99999999999", "Wed, 21 Oct 2099 07:28:00 GMT", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d := retryAfter(s, time.Unix(0, 0)); d < 0 || d > time.Hour {
			t.Fatalf("%q: %v", s, d)
		}
	})
}

func TestAFloodIsToldWithItsCounts(t *testing.T) {
	e := newEndpoint(t)
	h := newHook(t, e.URL)
	f := &outbox.Flood{ID: "flood:apr_6", Orchestrator: "demo", Scope: "vault:demo-write", Runs: []string{"run-1"}, RunCount: 1}
	for i := range 3 {
		f.Requests, f.Waiting = 10*(i+1), 10*(i+1)
		if _, err := h.Send(t.Context(), outbox.Delivery{Flood: f, Version: f.Version()}); err != nil {
			t.Fatal(err)
		}
	}
	e.check(t)
	for i, m := range e.got {
		if m.Type != "approval.flood" || m.Data.Flood == nil || m.Data.Flood.Waiting != 10*(i+1) || m.Data.Approval != nil || m.Data.Passkey != nil {
			t.Errorf("%d: %s", i, e.raw[i])
		}
		if i > 0 && e.ids[i] == e.ids[i-1] || strings.Contains(e.ids[i], ".") {
			t.Errorf("%d: webhook-id %q", i, e.ids[i])
		}
	}
}
