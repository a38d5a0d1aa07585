package steps_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/steps"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

const demoRead = `{"run":"run-1","scope":"vault:demo-read"}`

func TestAStepIsGivenItsCredentialAndLosesItWhenItEnds(t *testing.T) {
	w := newWorld(t)
	a := w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-read","ttl":"5m","reason":"OPS-1","subject":"user:u-1","receipt":true,"params":{},"delivery":"direct"}`).want(t, 201, "")
	step, _ := a.body["step"].(map[string]any)
	if step["identity"] != "spiffe://countersign.test/orchestrator/demo/run/run-1/step/s1" || a.body["expires_in"] != 300.0 || a.body["approval"] != nil {
		t.Fatalf("%s", bytes.ReplaceAll(a.raw, []byte(a.secret("token")), nil))
	}
	if a.header.Get("Cache-Control") != "no-store" {
		t.Fatal("an answer with a secret may be kept")
	}
	id, _ := a.body["request"].(string)
	g := w.call("demo", "GET", "/requests/"+id, "").want(t, 200, "")
	if g.body["status"] != "issued" || bytes.Contains(g.raw, []byte(a.secret("token"))) {
		t.Fatalf("%s", g.raw)
	}
	w.call("other", "GET", "/requests/"+id, "").want(t, 404, "not-found")
	w.call("other", "DELETE", "/requests/"+id, "").want(t, 404, "not-found")
	w.call("demo", "DELETE", "/requests/"+id, "").want(t, 409, "request-closed")
	if a := w.call("other", "DELETE", "/steps/s1/credential?run=run-1", "").want(t, 200, ""); a.body["revoked"] != 0.0 {
		t.Fatal("another orchestrator revoked it")
	}
	if a := w.call("demo", "DELETE", "/steps/s1/credential?run=run-1", "").want(t, 200, ""); a.body["revoked"] != 1.0 || a.body["pending"] != 0.0 {
		t.Fatalf("%s", a.raw)
	}
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"pki:service","params":{"service":"billing"}}`).want(t, 201, "")
	if a := w.call("demo", "POST", "/steps/s1/result", `{"run":"run-1","outcome":"succeeded","summary":"3 refunds","target":"orders"}`).want(t, 200, ""); a.body["irrevocable"] != 1.0 {
		t.Fatalf("%s", a.raw)
	}
	if a := w.call("demo", "GET", "/scopes", "").want(t, 200, ""); !bytes.Contains(a.raw, []byte(`"vault:demo-read"`)) || !bytes.Contains(a.raw, []byte(`"delivery":["gateway"],"protocol":"mcp"`)) {
		t.Fatalf("%s", a.raw)
	}
}

func TestThroughTheGatewayAStepIsGivenASessionAlone(t *testing.T) {
	w := newWorld(t)
	const body = `{"run":"run-1","scope":"http:demo"}`
	const key = `{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU\",\"y\":\"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0\"}` // RFC 7515, appendix A.3
	a := w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"http:demo","delivery":"gateway","public_key":"`+key+`"}`).want(t, 201, "")
	c, _ := a.body["credential"].(map[string]any)
	if len(c) != 5 || c["kind"] != "gateway" || c["revocable"] != true || c["protocol"] != "http" || c["address"] != "https://gateway.test:8789" || c["token"] == "" {
		t.Fatalf("%d members of kind %v", len(c), c["kind"])
	}
	before := len(w.types())
	full := w.call("demo", "POST", "/steps/s2/credential", body).want(t, 429, "rate-limited")
	if full.header.Get("Retry-After") == "" {
		t.Error("it does not say when to try again")
	}
	w.call("demo", "POST", "/steps/s2/credential", `{"run":"run-1","scope":"mcp:demo"}`).want(t, 422, "delivery-unsupported")
	w.call("demo", "POST", "/steps/s2/credential", `{"run":"run-1","scope":"http:demo","public_key":"ssh-ed25519 AAAA"}`).want(t, 422, "params-invalid")
	if got := w.types(); len(got) != before {
		t.Errorf("on record: %v", got[before:])
	}
	if a := w.call("demo", "DELETE", "/steps/s1/credential?run=run-1", "").want(t, 200, ""); a.body["revoked"] != 1.0 {
		t.Fatalf("%s", a.raw)
	}
	w.call("demo", "POST", "/steps/s2/credential", body).want(t, 201, "")
}

func TestWhatIsPublicIsServedToAnyone(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/.well-known/openid-configuration", "/.well-known/jwks.json", "/openapi.yaml", "/healthz", "/readyz"} {
		w.call("", "GET", path, "").want(t, 200, "")
	}
}

func TestARequestThatCannotBeTakenLeavesNothingBehind(t *testing.T) {
	w := newWorld(t)
	post := func(body string, header ...string) *answer {
		return w.call("demo", "POST", "/steps/s1/credential", body, header...)
	}
	for name, c := range map[string]struct {
		got    *answer
		status int
		slug   string
	}{
		"empty":                               {post(""), 400, "malformed"},
		"text that reads other than it looks": {post(`{"run":"r","scope":"vault:demo-read","reason":"a\u202eb"}`), 400, "malformed"},
		"no JSON":                             {post(`{"run":`), 400, "malformed"},
		"not an object":                       {post(`[]`), 400, "malformed"},
		"null":                                {post(`null`), 400, "malformed"},
		"trailing":                            {post(demoRead + demoRead), 400, "malformed"},
		"unknown member":                      {post(`{"run":"r","scope":"vault:demo-read","scoop":"x"}`), 400, "malformed"},
		"other case":                          {post(`{"Run":"r","scope":"vault:demo-read"}`), 400, "malformed"},
		"duplicate member":                    {post(`{"run":"r","run":"q","scope":"vault:demo-read"}`), 400, "malformed"},
		"duplicate param":                     {post(`{"run":"r","scope":"pki:service","params":{"service":"a","service":"b"}}`), 400, "malformed"},
		"wrong kind":                          {post(`{"run":1,"scope":"vault:demo-read"}`), 400, "malformed"},
		"no run":                              {post(`{"scope":"vault:demo-read"}`), 400, "malformed"},
		"bad run":                             {post(`{"run":"../x","scope":"vault:demo-read"}`), 400, "malformed"},
		"no scope":                            {post(`{"run":"r"}`), 400, "malformed"},
		"control character":                   {post(`{"run":"r","scope":"vault:demo-read","subject":"a\u0007b"}`), 400, "malformed"},
		"reversed text":                       {post(`{"run":"r","scope":"vault:demo-read","reason":"a\u202eb"}`), 400, "malformed"},
		"NUL":                                 {post(`{"run":"r","scope":"vault:demo-read","reason":"a\u0000b"}`), 400, "malformed"},
		"NUL in a param":                      {post(`{"run":"r","scope":"pki:service","params":{"service":"a\u0000b"}}`), 422, "params-invalid"},
		"no UTF-8":                            {post("{\"run\":\"r\",\"scope\":\"vault:demo-read\",\"reason\":\"\xff\"}"), 400, "malformed"},
		"bad step":                            {w.call("demo", "POST", "/steps/a%2Fb/credential", demoRead), 400, "malformed"},
		"dots for a step":                     {w.call("demo", "POST", "/steps/%2e%2e/credential", demoRead), 400, "malformed"},
		"empty key":                           {post(demoRead, "Idempotency-Key", ""), 400, "malformed"},
		"two keys":                            {post(demoRead, "Idempotency-Key", "a", "Idempotency-Key", "b"), 400, "malformed"},
		"long key":                            {post(demoRead, "Idempotency-Key", strings.Repeat("k", 256)), 400, "malformed"},
		"blank key":                           {post(demoRead, "Idempotency-Key", "a b"), 400, "malformed"},
		"too large":                           {post(`{"run":"r","scope":"vault:demo-read","reason":"` + strings.Repeat("x", 33<<10) + `"}`), 413, "body-too-large"},
		"unknown scope":                       {post(`{"run":"r","scope":"no:such"}`), 422, "unknown-scope"},
		"ttl of zero":                         {post(`{"run":"r","scope":"vault:demo-read","ttl":"0s"}`), 422, "ttl-invalid"},
		"negative ttl":                        {post(`{"run":"r","scope":"vault:demo-read","ttl":"-5m"}`), 422, "ttl-invalid"},
		"no duration":                         {post(`{"run":"r","scope":"vault:demo-read","ttl":"soon"}`), 422, "ttl-invalid"},
		"ttl too long":                        {post(`{"run":"r","scope":"vault:demo-read","ttl":"100h"}`), 422, "ttl-too-long"},
		"no reason":                           {post(`{"run":"r","scope":"vault:demo-write"}`), 422, "reason-required"},
		"traversal":                           {post(`{"run":"r","scope":"pki:service","params":{"service":"../../sys/seal"}}`), 422, "params-invalid"},
		"template":                            {post(`{"run":"r","scope":"pki:service","params":{"service":"{{identity.entity.id}}"}}`), 422, "params-invalid"},
		"unknown param":                       {post(`{"run":"r","scope":"vault:demo-read","params":{"path":"x"}}`), 422, "params-invalid"},
		"delivery":                            {post(`{"run":"r","scope":"vault:demo-read","delivery":"pigeon"}`), 422, "delivery-unsupported"},
		"subject token":                       {post(`{"run":"r","scope":"vault:demo-read","subject_token":"a.b.c"}`), 422, "params-invalid"},
		"no run to revoke":                    {w.call("demo", "DELETE", "/steps/s1/credential", ""), 400, "malformed"},
		"two runs":                            {w.call("demo", "DELETE", "/steps/s1/credential?run=a&run=b", ""), 400, "malformed"},
		"bad outcome":                         {w.call("demo", "POST", "/steps/s1/result", `{"run":"r","outcome":"splendid"}`), 400, "malformed"},
		"no form":                             {w.call("orders", "POST", "/introspect", `{"token":"x"}`), 400, "malformed"},
		"no such path":                        {w.call("demo", "GET", "/nothing", ""), 404, "not-found"},
		"no such request":                     {w.call("demo", "GET", "/requests/req_x", ""), 404, "not-found"},
		"wrong method":                        {w.call("demo", "PUT", "/scopes", ""), 405, "method-not-allowed"},
	} {
		if c.got.status != c.status || c.got.slug() != c.slug {
			t.Errorf("%s: %d %s, want %d %s\n%s", name, c.got.status, c.got.slug(), c.status, c.slug, c.got.raw)
		}
		if c.got.body["instance"] == "" || c.got.body["instance"] != c.got.header.Get("X-Request-Id") {
			t.Errorf("%s: instance %v, X-Request-Id %s", name, c.got.body["instance"], c.got.header.Get("X-Request-Id"))
		}
	}
	if got := w.types(); len(got) != 0 {
		t.Fatalf("on record: %v", got)
	}
	// A body that breaks off.
	pr := &broken{}
	r, err := http.NewRequestWithContext(t.Context(), "POST", w.url+"/steps/s1/credential", pr)
	ok(t, err)
	r.ContentLength = 100
	r.Header.Set("Authorization", "Bearer "+w.tokens["demo"])
	if resp, err := http.DefaultTransport.RoundTrip(r); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Fatalf("a truncated body: %d", resp.StatusCode)
		}
	}
	if got := w.types(); len(got) != 0 {
		t.Fatalf("on record: %v", got)
	}
}

type broken struct{ sent bool }

func (b *broken) Read(p []byte) (int, error) {
	if b.sent {
		return 0, errors.New("gone")
	}
	b.sent = true
	return copy(p, `{"run":"r",`), nil
}

func TestASubjectIsProvedByItsTokenAlone(t *testing.T) {
	w := newWorld(t)
	proved := func() bool {
		var p bool
		for s, err := range w.ledger.Entries(t.Context(), 0, w.ledger.Size()) {
			ok(t, err)
			e, err := store.ParseLeaf(s.Leaf)
			ok(t, err)
			if e.Type == store.StepRequested {
				p = e.Subject != nil && e.Subject.Proved
			}
		}
		return p
	}
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"r","scope":"identity:step","subject":"user:u-9"}`).want(t, 201, "")
	if proved() {
		t.Fatal("a claim counts as proof")
	}
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"r","scope":"identity:step","subject_token":"a.good.token"}`).want(t, 201, "")
	if !proved() {
		t.Fatal("a proof does not count")
	}
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"r","scope":"identity:step","subject":"user:u-1","subject_token":"a.good.token"}`).want(t, 422, "params-invalid")
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"r","scope":"identity:step","subject_token":"a.bad.token"}`).want(t, 422, "params-invalid")
}

func TestADeniedScopeSaysWhyAndIsOnRecord(t *testing.T) {
	w := newWorld(t)
	w.inForce(`ask: ["*"]`, `ask: ["billing-*"]`)
	a := w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-write","reason":"OPS-1"}`).want(t, 403, "scope-denied")
	if d, _ := a.body["detail"].(string); d != "not allowed to ask for this scope" {
		t.Fatalf("%s", a.raw)
	}
	if got := w.types(); !slices.Equal(got, []string{"step.requested"}) {
		t.Fatalf("on record: %v", got)
	}
	id, _ := a.body["request"].(string)
	if g := w.call("demo", "GET", "/requests/"+id, "").want(t, 200, ""); g.body["status"] != "denied" {
		t.Fatalf("%s", g.raw)
	}
}

func TestACallerOfNoOrAnotherRoleIsRefusedOnRecord(t *testing.T) {
	w := newWorld(t)
	routes := []string{"POST /steps/s1/credential", "DELETE /steps/s1/credential?run=r", "POST /steps/s1/result", "GET /requests/req_x",
		"DELETE /requests/req_x", "GET /scopes", "POST /introspect"}
	n := 0
	for _, route := range routes {
		method, path, _ := strings.Cut(route, " ")
		for _, who := range []string{"", "cs_orchestrator_nosuchtoken", "reviewer-a", "broker-1", "approver-a", "responder-a", "orders", "demo"} {
			if (who == "demo") != (path == "/introspect") && who == "demo" || who == "orders" && path == "/introspect" {
				continue
			}
			status, slug := 403, "role-forbidden"
			if who == "" || strings.HasPrefix(who, "cs_") {
				status, slug = 401, "unauthenticated"
			}
			w.call(who, method, path, "").want(t, status, slug)
			n++
		}
	}
	got := w.types()
	if len(got) == 0 || slices.ContainsFunc(got, func(s string) bool { return s != "access.refused" }) {
		t.Fatalf("after %d refusals on record: %v", n, got)
	}
}

func TestAnOrchestratorsTokenReachesNothingOfTheRecorder(t *testing.T) {
	w := newWorld(t)
	w.call("demo", "POST", "/steps/s1/credential", demoRead).want(t, 201, "")
	before := w.types()
	for _, route := range []string{"POST /append", "GET /open", "GET /follow?after=-1", "GET /consistency?from=1&to=2", "GET /history", "GET /tile/entries/000"} {
		method, path, _ := strings.Cut(route, " ")
		body := ""
		if method == "POST" {
			body = "{}"
		}
		w.call("demo", method, w.record+path, body).want(t, 403, "role-forbidden")
	}
	for _, e := range w.types()[len(before):] {
		if e != "access.refused" {
			t.Fatalf("on record: %s", e)
		}
	}
}

func TestEveryRouteIsInTheDescription(t *testing.T) {
	described := seen.Operations()
	h := steps.New(steps.Config{Guard: &auth.Guard{}, Identity: identity})
	ok(t, chi.Walk(h.(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if !slices.Contains(described, method+" "+route) {
			t.Errorf("%s %s is not in openapi.yaml", method, route)
		}
		return nil
	}))
	for slug, status := range problem.Slugs() {
		if status == 0 {
			t.Errorf("%s has no status", slug)
		}
	}
}

func TestManyCallsUnderOneKeyMintOnceAndALaterOneReplacesIt(t *testing.T) {
	w := newWorld(t)
	held, let := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.set(func() { w.mint = func() error { once.Do(func() { close(held) }); <-let; return nil } })
	var mu sync.Mutex
	got := map[int][]*answer{}
	var wg sync.WaitGroup
	send := func(header ...string) {
		wg.Go(func() {
			a, err := w.try(context.Background(), "demo", "POST", "/steps/s1/credential", demoRead, append([]string{"Idempotency-Key", "k-1"}, header...)...)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			got[a.status] = append(got[a.status], a)
		})
	}
	for range 25 {
		send()
	}
	<-held
	a := w.call("demo", "POST", "/steps/s1/credential", demoRead, "Idempotency-Key", "k-1", "Prefer", "wait=1").want(t, 202, "")
	if a.header.Get("Retry-After") != "1" || a.header.Get("Location") != "/requests/"+a.body["request"].(string) || a.body["status"] != "approved" {
		t.Fatalf("%v %s", a.header, a.raw)
	}
	w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-read","ttl":"1m"}`, "Idempotency-Key", "k-1").want(t, 409, "idempotency-conflict")
	close(let)
	wg.Wait()
	if len(got[201]) != 1 || len(got[409])+len(got[202]) != 24 {
		t.Fatalf("%d of 201, %d of 409, %d of 202", len(got[201]), len(got[409]), len(got[202]))
	}
	// Members in another order and with blanks are the same body.
	again := w.call("demo", "POST", "/steps/s1/credential", `{ "scope":"vault:demo-read", "run":"run-1" }`, "Idempotency-Key", "k-1").want(t, 201, "")
	if again.body["request"] != got[201][0].body["request"] {
		t.Fatal("a retry opened another request")
	}
	w.call("demo", "POST", "/steps/s1/credential", demoRead, "Idempotency-Key", "k-1").want(t, 409, "request-closed")
}

func TestAnIdentityTokenIsIntrospected(t *testing.T) {
	w := newWorld(t)
	a := w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"identity:step"}`).want(t, 201, "")
	form := func(token, use string) *answer {
		return w.call("orders", "POST", "/introspect", url.Values{"token": {token}, "use": {use}}.Encode(), "Content-Type", "application/x-www-form-urlencoded")
	}
	if got := form(a.secret("token"), "GET /orders"); !bytes.Contains(got.raw, []byte(`"active":true`)) || !bytes.Contains(got.raw, []byte(`"step":"s1"`)) {
		t.Fatalf("%s", got.raw)
	}
	if got := form("x.y.z", ""); string(bytes.TrimSpace(got.raw)) != `{"active":false}` {
		t.Fatalf("%s", got.raw)
	}
	if got := w.types(); got[len(got)-1] != "credential.used" {
		t.Fatalf("on record: %v", got)
	}
	if got := form(a.secret("token"), "\x00"); got.status != 400 {
		t.Fatalf("%s", got.raw)
	}
	w.call("demo", "POST", "/steps/s1/result", `{"run":"run-1","outcome":"failed"}`).want(t, 200, "")
	if got := form(a.secret("token"), ""); string(bytes.TrimSpace(got.raw)) != `{"active":false}` {
		t.Fatalf("after the end: %s", got.raw)
	}
}

func TestEachThingThatIsGoneHasItsProblem(t *testing.T) {
	w := newWorld(t)
	post := func() *answer {
		return w.call("demo", "POST", "/steps/s1/credential", `{"run":"`+"run-"+strconv.FormatInt(time.Now().UnixNano(), 10)+`","scope":"vault:demo-read"}`)
	}
	for _, err := range []error{issuer.ErrVaultUnavailable, issuer.ErrVaultRefused} {
		w.set(func() {
			w.mint = func() error { return &issuer.StageError{Stage: "create-token", Err: fmt.Errorf("%w: HTTP 403", err)} }
		})
		post().want(t, 503, "vault-unavailable")
	}
	w.set(func() { w.mint = func() error { return store.ErrWarrant } })
	post().want(t, 500, "internal")
	if got := w.types(); len(got) != 9 || got[8] != "credential.failed" {
		t.Fatalf("on record: %v", got)
	}
	w.set(func() { w.mint = nil; w.down = true })
	post().want(t, 503, "ledger-unavailable")
	w.call("demo", "POST", "/steps/s1/result", `{"run":"r","outcome":"failed"}`).want(t, 503, "ledger-unavailable")
	w.set(func() { w.down = false })
	w.redis.Stop()
	a := post().want(t, 503, "state-unavailable")
	if a.header.Get("Retry-After") == "" {
		t.Fatal("no Retry-After")
	}
	w.call("", "GET", "/readyz", "").want(t, 503, "state-unavailable")
	w.redis.Run()
	w.until("served again", func() bool { return post().status == 201 })
	w.broker.Drain()
	post().want(t, 503, "shutting-down")
	w.call("", "GET", "/readyz", "").want(t, 503, "shutting-down")
	w.call("", "GET", "/healthz", "").want(t, 200, "")
}

func TestTheRecordersCallsAreAsDescribed(t *testing.T) {
	w := newWorld(t)
	w.call("demo", "POST", "/steps/s1/credential", demoRead).want(t, 201, "")
	s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.AlertRaised, WriterTime: store.At(time.Now()), Agent: "spiffe://countersign.test/broker/broker-1"}}
	s.SetDetails(struct{}{})
	line, err := s.Marshal()
	ok(t, err)
	post := func(body string) *answer {
		return w.call("broker-1", "POST", w.record+"/append", body, "Content-Type", "application/x-ndjson")
	}
	post(string(line)).want(t, 200, "")
	post("{}").want(t, 400, "malformed")
	w.call("broker-1", "GET", w.record+"/open", "", "Countersign-Seen", "2").want(t, 200, "")
	w.call("broker-1", "GET", w.record+"/consistency?from=1&to=3", "").want(t, 200, "")
	w.call("reviewer-a", "GET", w.record+"/history?limit=2", "").want(t, 200, "")
	w.until("published", func() bool { return w.call("", "GET", w.record+"/checkpoint", "").status == 200 })
	w.until("a tile", func() bool { return w.call("", "GET", w.record+"/tile/0/000.p/4", "").status == 200 })
	w.call("reviewer-a", "GET", w.record+"/tile/entries/000.p/4", "").want(t, 200, "")
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "GET", w.record+"/follow?after=0", nil)
	ok(t, err)
	r.Header.Set("Authorization", "Bearer "+w.tokens["broker-1"])
	resp, err := w.http.Do(r)
	ok(t, err)
	if resp.StatusCode != 200 {
		t.Fatalf("follow: %d", resp.StatusCode)
	}
	cancel()
	_ = resp.Body.Close()
}

func TestNoSecretIsWrittenAnywhere(t *testing.T) {
	w := newWorld(t)
	secrets := []string{"planted-reason-91ab", "planted-subject-91ab", "planted-bearer-91ab", "planted-subject-token-91ab", "planted-param-91ab", "planted-member-91ab"}
	for _, t := range w.tokens {
		secrets = append(secrets, t)
	}
	for i, scope := range []string{"vault:demo-read", "identity:step", "pki:service"} {
		a := w.call("demo", "POST", "/steps/s1/credential", fmt.Sprintf(`{"run":"run-1","scope":%q,"reason":"planted-reason-91ab","subject":"planted-subject-91ab"}`, scope),
			"Idempotency-Key", strconv.Itoa(i)).want(t, 201, "")
		for _, m := range []string{"token", "private_key"} {
			if s := a.secret(m); s != "" {
				secrets = append(secrets, s)
			}
		}
	}
	var answers bytes.Buffer
	for _, a := range []*answer{
		w.call("planted-bearer-91ab", "GET", "/scopes", ""),
		w.call("cs_orchestrator_planted-bearer-91ab", "GET", "/scopes", ""),
		w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-read","subject_token":"planted-subject-token-91ab"}`),
		w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"pki:service","params":{"service":"../planted-param-91ab"}}`),
		w.call("demo", "POST", "/steps/s1/credential", `{"run":"run-1","scope":"vault:demo-read","ttl":5,"reason":"planted-reason-91ab"}`),
		w.call("orders", "POST", "/introspect", "token=planted-bearer-91ab", "Content-Type", "application/x-www-form-urlencoded"),
		w.call("demo", "DELETE", "/steps/s1/credential?run=run-1", ""),
	} {
		answers.Write(a.raw)
	}
	places := map[string][]byte{"answers": answers.Bytes(), "logs": w.logs.b.Bytes(), "Redis": w.redis.Dump()}
	ok(t, filepath.WalkDir(filepath.Join(w.dir, "ledger"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		places[filepath.Base(path)] = b
		return err
	}))
	for place, b := range places {
		for _, s := range secrets {
			if bytes.Contains(b, []byte(s)) {
				t.Errorf("%.24s… stands in %s", s, place)
			}
		}
	}
}

// TestZEverythingDescribedWasSeen runs last: files and tests run in order.
func TestZEverythingDescribedWasSeen(t *testing.T) {
	for _, f := range []string{"test.run", "test.skip", "test.fuzz"} {
		if flag.Lookup(f).Value.String() != "" {
			t.Skip("only some tests run")
		}
	}
	for _, m := range seen.Missing("steps", "public", "writers", "reviewers", "log") {
		t.Errorf("never exercised: %s", m)
	}
}
