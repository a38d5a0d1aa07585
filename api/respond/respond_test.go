package respond_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/respond"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Further responders: another one, and the first under another spelling.
const (
	other    auth.Role = "another responder"
	shouting auth.Role = "the first responder, shouting"
)

// house is a recorder with the responders' API.
type house struct {
	t        testing.TB
	ledger   *ledger.Ledger
	refusals *auth.Refusals
	server   *httptest.Server
	tokens   map[auth.Role]string
	now      time.Time
}

func newHouse(t testing.TB) *house {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "respond.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, tokens: map[auth.Role]string{}, now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	key := make(store.PrivacyKey, 32)
	dir := t.TempDir()
	if h.ledger, err = ledger.Open(t.Context(), ledger.Options{
		Dir: dir, Signer: signer, Verifier: vkey, PrivacyKey: key, RecheckEvery: -1, Now: func() time.Time { return h.now },
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.ledger.Close() })
	file := filepath.Join(dir, "tokens")
	for _, role := range auth.Roles {
		if h.tokens[role], err = auth.CreateToken(file, auth.Token{Role: role, Name: string(role) + "-a"}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	for role, name := range map[auth.Role]string{other: "responder-b", shouting: "RESPONDER-A"} {
		if h.tokens[role], err = auth.CreateToken(file, auth.Token{Role: auth.Responder, Name: name}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	tokens, err := auth.OpenTokens(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	h.refusals = auth.NewRefusals("respond.example", zap.NewNop(), record.Self{Ledger: h.ledger, Name: "recorder", TrustDomain: "respond.example"}.Record)
	h.refusals.PrivacyKey = key
	catalogue, err := scopes.Parse("catalogue.yaml", []byte("scopes: [{name: \"billing:read\", target: billing, sensitivity: low, max_ttl: 5m, ask: [ci, \"worker-*\"], engine: identity, audience: [billing]}]"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	respond.New(respond.Config{
		Ledger: h.ledger, Guard: &auth.Guard{Tokens: tokens, Refusals: h.refusals},
		Name: "recorder", TrustDomain: "respond.example", PrivacyKey: key, Catalogue: func() *scopes.Set { return catalogue },
	}).Routes(r)
	h.server = httptest.NewServer(r)
	t.Cleanup(h.server.Close)
	return h
}

func (h *house) as(role auth.Role) *client.Responder {
	h.t.Helper()
	c, err := client.NewResponder(client.Config{URL: h.server.URL, Token: client.Token(h.tokens[role])})
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// call sends a body as the responder, and returns status and answer.
func (h *house) call(method, path, body string) (int, string) {
	h.t.Helper()
	r, err := http.NewRequest(method, h.server.URL+path, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.tokens[auth.Responder])
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (h *house) entries(t store.Type) (out []ledger.HistoryEntry) {
	h.t.Helper()
	p, err := h.ledger.History(h.t.Context(), ledger.Query{Type: string(t)})
	if err != nil {
		h.t.Fatal(err)
	}
	return p.Entries
}

func slug(err error) string {
	var p *problem.Problem
	if errors.As(err, &p) {
		return p.Slug()
	}
	return fmt.Sprint(err)
}

func TestAResponderPlacesAndLiftsHoldsUnderTheirOwnName(t *testing.T) {
	h := newHouse(t)
	c := h.as(auth.Responder)
	from := h.now.Add(-time.Hour)
	run, err := c.PlaceHold(t.Context(), "run-1", time.Time{}, time.Time{}, " OPS-1, secret matter ")
	if err != nil {
		t.Fatal(err)
	}
	window, err := c.PlaceHold(t.Context(), "", from, h.now, "audit")
	if err != nil {
		t.Fatal(err)
	}
	if run.Run != "run-1" || run.State != client.HoldInForce || run.Reason != "OPS-1, secret matter" || run.PlacedBy != "user:responder-a" || !window.From.Equal(from) || !window.To.Equal(h.now) {
		t.Fatalf("%+v %+v", run, window)
	}
	placed := h.entries(store.HoldPlaced)
	if len(placed) != 2 || placed[0].Opened[store.SealedReason] != "OPS-1, secret matter" || strings.Contains(string(placed[0].Entry), "secret matter") || strings.Contains(string(placed[0].Entry), "responder-a") {
		t.Fatalf("%s", placed[0].Entry)
	}
	lifted, err := c.LiftHold(t.Context(), run.ID, "it is over")
	if err != nil || lifted.State != client.HoldLifted || lifted.LiftedReason != "it is over" || lifted.LiftedBy != "user:responder-a" {
		t.Fatalf("%+v %v", lifted, err)
	}
	if _, err := c.LiftHold(t.Context(), run.ID, "again"); slug(err) != problem.SlugRequestClosed {
		t.Fatalf("lifted twice: %v", err)
	}
	if _, err := c.LiftHold(t.Context(), store.NewID(), "another"); slug(err) != problem.SlugNotFound {
		t.Fatalf("one that there is not: %v", err)
	}
	for _, role := range []auth.Role{auth.Responder, auth.Reviewer} {
		holds, err := h.as(role).Holds(t.Context())
		if err != nil || len(holds) != 2 || holds[0].State != client.HoldLifted || holds[1].State != client.HoldInForce {
			t.Fatalf("as %s: %+v %v", role, holds, err)
		}
	}
}

func TestNobodyButAResponderHoldsAndTheAttemptIsOnRecord(t *testing.T) {
	h := newHouse(t)
	hold, err := h.as(auth.Responder).PlaceHold(t.Context(), "run-1", time.Time{}, time.Time{}, "because")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, role := range auth.Roles {
		if role == auth.Responder {
			continue
		}
		c := h.as(role)
		if _, err := c.PlaceHold(t.Context(), "run-2", time.Time{}, time.Time{}, "because"); slug(err) != problem.SlugRoleForbidden {
			t.Errorf("%s places a hold: %v", role, err)
		}
		if _, err := c.LiftHold(t.Context(), hold.ID, "because"); slug(err) != problem.SlugRoleForbidden {
			t.Errorf("%s lifts a hold: %v", role, err)
		}
		n += 2
		if role != auth.Reviewer {
			if _, err := c.Holds(t.Context()); slug(err) != problem.SlugRoleForbidden {
				t.Errorf("%s lists holds: %v", role, err)
			}
			n++
		}
	}
	h.tokens[auth.Responder] = "cs_responder_nobody"
	if _, err := h.as(auth.Responder).Holds(t.Context()); slug(err) != problem.SlugUnauthenticated {
		t.Errorf("nobody lists holds: %v", err)
	}
	h.refusals.Close()
	if got := len(h.entries(store.AccessRefused)); got != n+1 {
		t.Errorf("%d attempts on record, want %d", got, n+1)
	}
	if len(h.entries(store.HoldPlaced)) != 1 || len(h.entries(store.HoldLifted)) != 0 {
		t.Error("a refused call is on record as a hold")
	}
}

func TestAHoldThatMakesNoSenseIsRefused(t *testing.T) {
	h := newHouse(t)
	for name, c := range map[string]struct {
		method, path, body string
		status             int
		slug               string
	}{
		"neither run nor window":  {"POST", "/holds", `{"reason":"r"}`, 400, "malformed"},
		"both":                    {"POST", "/holds", `{"run":"a","from":"2026-01-01T00:00:00Z","reason":"r"}`, 400, "malformed"},
		"an end without a begin":  {"POST", "/holds", `{"to":"2026-01-01T00:00:00Z","reason":"r"}`, 400, "malformed"},
		"an end before the begin": {"POST", "/holds", `{"from":"2026-01-02T00:00:00Z","to":"2026-01-01T00:00:00Z","reason":"r"}`, 400, "malformed"},
		"no reason":               {"POST", "/holds", `{"run":"a"}`, 422, "reason-required"},
		"a blank reason":          {"POST", "/holds", `{"run":"a","reason":" \n"}`, 422, "reason-required"},
		"a long reason":           {"POST", "/holds", `{"run":"a","reason":"` + strings.Repeat("x", 8001) + `"}`, 400, "malformed"},
		"a run that is no ID":     {"POST", "/holds", `{"run":"a b","reason":"r"}`, 400, "malformed"},
		"an unknown member":       {"POST", "/holds", `{"run":"a","reason":"r","step":"s"}`, 400, "malformed"},
		"a member twice":          {"POST", "/holds", `{"run":"a","run":"b","reason":"r"}`, 400, "malformed"},
		"no body":                 {"POST", "/holds", ``, 400, "malformed"},
		"a body too large":        {"POST", "/holds", `{"run":"a","reason":"` + strings.Repeat("x", 40_000) + `"}`, 413, "body-too-large"},
		"an unknown parameter":    {"GET", "/holds?state=x", ``, 400, "malformed"},
		"lifting without reason":  {"DELETE", "/holds/" + store.NewID(), ``, 422, "reason-required"},
	} {
		if status, body := h.call(c.method, c.path, c.body); status != c.status || !strings.Contains(body, "/problems/"+c.slug+`"`) {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	if n := h.ledger.Size(); n != 0 {
		t.Errorf("%d entries on record", n)
	}
}

func TestTwoWhoLiftAHoldAtOnceLiftItOnce(t *testing.T) {
	h := newHouse(t)
	c := h.as(auth.Responder)
	hold, err := c.PlaceHold(t.Context(), "run-1", time.Time{}, time.Time{}, "because")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[string]int{}
	for range 8 {
		wg.Go(func() {
			_, err := c.LiftHold(t.Context(), hold.ID, "over")
			mu.Lock()
			defer mu.Unlock()
			got[slug(err)]++
		})
	}
	wg.Wait()
	if got["<nil>"] != 1 || got[problem.SlugRequestClosed] != 7 || len(h.entries(store.HoldLifted)) != 1 {
		t.Fatalf("%v", got)
	}
}

func TestAHoldStopsAnErasureAndLiftedNoMore(t *testing.T) {
	h := newHouse(t)
	recorder := ledger.Author{Name: "recorder", Recorder: true}
	by := ledger.Eraser{Name: "recorder", Agent: "spiffe://respond.example/recorder/recorder"}
	add := func(s *store.Submission) int64 {
		t.Helper()
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		a, err := h.ledger.Append(t.Context(), recorder, [][]byte{b})
		if err != nil {
			t.Fatal(err)
		}
		return a.Entries[0].Index
	}
	entry := func(typ store.Type, d any) *store.Submission {
		s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: typ, WriterTime: store.At(h.now), Agent: by.Agent, Run: "run-1"}}
		s.SetDetails(d)
		return s
	}
	add(entry(store.PolicyLoaded, store.PolicyDetails{Retention: map[string]store.Duration{"": store.Duration(time.Hour)}}))
	alert := entry(store.AlertRaised, struct{}{})
	alert.Seal(store.SealedReason, "text")
	i := add(alert)
	hold, err := h.as(auth.Responder).PlaceHold(t.Context(), "run-1", time.Time{}, time.Time{}, "because")
	if err != nil {
		t.Fatal(err)
	}
	h.now = h.now.Add(2 * time.Hour)
	var refused *ledger.ErasureError
	if err := h.ledger.Erase(t.Context(), by, []int64{i}, "", time.Hour); !errors.As(err, &refused) || refused.Code != ledger.ErasureHeld {
		t.Fatalf("held: %v", err)
	}
	if _, err := h.as(auth.Responder).LiftHold(t.Context(), hold.ID, "over"); err != nil {
		t.Fatal(err)
	}
	if err := h.ledger.Erase(t.Context(), by, []int64{i}, "", time.Hour); err != nil {
		t.Fatal(err)
	}
}

func FuzzAnyBodyIsAnsweredAndOnlyAHoldIsOnRecord(f *testing.F) {
	for _, s := range []string{`{"run":"a","reason":"r"}`, `{"from":"2026-01-01T00:00:00Z","reason":"r"}`, `{"from":"9999-12-31T23:59:59.999999999Z","to":"0001-01-01T00:00:00Z","reason":"r"}`, `[]`, `{"run":"\u0000","reason":"\ud800"}`, ``} {
		f.Add(s)
	}
	h := newHouse(f)
	f.Fuzz(func(t *testing.T, body string) {
		h.t = t
		before := h.ledger.Size()
		status, answer := h.call("POST", "/holds", body)
		grown := h.ledger.Size() - before
		switch {
		case status == 201 && grown == 1:
		case status >= 400 && status < 500 && grown == 0 && strings.Contains(answer, "/problems/"):
		default:
			t.Fatalf("%d, %d entries: %s", status, grown, answer)
		}
	})
}
