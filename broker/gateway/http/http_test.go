package http

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

func says(status int, kind, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if kind != "" {
			w.Header().Set("Content-Type", kind)
		} else {
			w.Header()["Content-Type"] = nil
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func TestAStepReachesItsTargetWithoutEverHoldingTheSecret(t *testing.T) {
	t.Parallel()
	var got *http.Request
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Clone(context.Background())
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Answer", "yes")
		_, _ = w.Write(append([]byte("you said "), b...))
	}), &store.Access{HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"POST"}, Paths: []string{"/orders/*/lines"}}},
		RequestHeaders: []string{"X-Reason"}, ResponseHeaders: []string{"X-Answer"}, Sample: 64}}, option{base: "/v2"})
	a := p.do("POST", "/orders/17/lines?limit=5&page=2&limit=6", strings.NewReader("a line"), "X-Reason", "because", "X-Api-Key", "the step's own", "Cookie", "a=b",
		"X-Forwarded-For", "10.0.0.1", "Forwarded", "for=x", "Via", "1.1 x", "X_Api_Key", "other", "X-Http-Method-Override", "DELETE", "X-Original-Url", "/admin", "Connection", "X-Api-Key, keep-alive", "Te", "trailers", "Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "Tracestate", "a=b", "Baggage", "a=b")
	if a.status != 200 || a.body != "you said a line" || a.header.Get("X-Answer") != "yes" {
		t.Fatalf("%+v", a)
	}
	if got.URL.RequestURI() != "/v2/orders/17/lines?limit=5&page=2&limit=6" || got.Host != "target.internal" {
		t.Fatalf("%s of %s", got.URL, got.Host)
	}
	if v := got.Header["X-Api-Key"]; len(v) != 1 || v[0] != apiKey {
		t.Fatalf("%q", v)
	}
	for _, name := range []string{"Authorization", "Cookie", "X-Forwarded-For", "Forwarded", "Via", "X_api_key", "X_Api_Key", "X-Http-Method-Override", "X-Original-Url", "Connection", "Traceparent", "Tracestate", "Baggage"} {
		if got.Header.Values(name) != nil {
			t.Errorf("%s reached the target", name)
		}
	}
	u := p.rec.Finished("")
	if u.Use != "POST /orders/*/lines" || u.Statement != "POST /v2/orders/17/lines?limit&page\nX-Reason: because\n\na line" || u.Objects[0] != "/orders/*/lines" {
		t.Fatalf("%+v", u)
	}
	sum := sha256.Sum256([]byte("a line"))
	if o := u.Outcome; o.Status != "200" || o.Error != "" || o.Sent != 6 || o.Received != 15 || o.Digest != "sha256:"+hex.EncodeToString(sum[:]) || u.Sample != "X-Answer: yes\n\nyou said a line" {
		t.Fatalf("%+v, sample %q", o, u.Sample)
	}
}

func TestTheSecretIsShownAsTheGrantSays(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		in   store.Inject
		good func(*http.Request) bool
	}{
		"query": {store.Inject{In: "query", Name: "api_key", Value: "{{key}}"}, func(r *http.Request) bool {
			return len(r.URL.Query()["api_key"]) == 1 && r.URL.Query().Get("api_key") == apiKey && r.URL.Query().Get("a") == "1"
		}},
		"basic": {store.Inject{In: "basic", Username: "svc", Password: "{{key}}"}, func(r *http.Request) bool {
			u, pw, _ := r.BasicAuth()
			return u == "svc" && pw == apiKey
		}},
		"bearer": {store.Inject{In: "header", Name: "Authorization", Value: "Bearer {{key}}"}, func(r *http.Request) bool {
			return len(r.Header["Authorization"]) == 1 && r.Header.Get("Authorization") == "Bearer "+apiKey
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !c.good(r) {
					w.WriteHeader(401)
				}
			}), &store.Access{Inject: &c.in}, option{})
			if a := p.get("/x?a=1&api_key=mine"); a.status != 200 {
				t.Fatalf("%+v", a)
			}
			if strings.Contains(p.rec.All(), apiKey) {
				t.Fatal("the secret is on record")
			}
		})
	}
	p := newPath(t, says(200, "", ""), &store.Access{Inject: &store.Inject{In: "query", Name: "api_key", Value: "{{key}}"}}, option{})
	for _, q := range []string{"API_KEY=x", "api.key=x", "api_key[]=x", "api_key%5B0%5D=x", "api+key=x"} {
		if a := p.get("/x?" + q); a.status != 403 {
			t.Errorf("%s: %d", q, a.status)
		}
	}
}

func TestWhoShowsNoTokenIsTurnedAwayAndOnRecord(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", ""), &store.Access{}, option{})
	p.token = "another"
	a := p.get("/x")
	if a.status != 401 || !strings.Contains(a.body, "problems/unauthenticated") || len(a.header.Values("WWW-Authenticate")) != 2 || p.reached.Load() != 0 {
		t.Fatalf("%+v", a)
	}
	gatewaytest.Until(t, "the refusal", func() bool { return len(p.rec.Refusals()) == 1 })
	if f := p.rec.Refusals()[0]; f.Route != "GET" {
		t.Fatalf("%+v", f)
	}
}

func TestASessionOfAnotherProtocolIsRefused(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", ""), &store.Access{Protocol: store.ProtocolMCP, MCP: &store.MCPAccess{}}, option{})
	if a := p.get("/x"); a.status != 403 || !p.refused("the session is for another protocol") || p.reached.Load() != 0 {
		t.Fatalf("%+v", a)
	}
}

func TestNothingIsForwardedWhileTheRecorderIsDown(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", "x"), &store.Access{HTTP: open("GET")}, option{})
	p.rec.Down(true)
	for _, method := range []string{"GET", "DELETE"} { // one would pass, one be refused
		a := p.do(method, "/x", nil)
		if a.status != 503 || !strings.Contains(a.body, "problems/ledger-unavailable") || p.reached.Load() != 0 {
			t.Fatalf("%+v", a)
		}
	}
	p.rec.Down(false)
	if a := p.get("/x"); a.status != 200 {
		t.Fatalf("%+v", a)
	}
}

func TestRoutesAllowMethodsOnPathsAndNothingElse(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", ""), &store.Access{HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{
		{Methods: []string{"GET"}, Paths: []string{"/orders", "/orders/*"}}, {Methods: []string{"POST"}, Paths: []string{"/orders/*/refund"}}}}}, option{})
	for _, c := range []struct {
		method, path string
		status       int
		use          string
	}{
		{"GET", "/orders", 200, ""}, {"HEAD", "/orders/1", 200, ""}, {"GET", "/orders/1/lines", 200, ""}, {"POST", "/orders/1/refund", 200, ""},
		{"GET", "/orders/a%20b", 200, ""}, {"GET", "/orders/%C3%A9", 200, ""},
		{"GET", "/", 403, "GET"}, {"GET", "/order", 403, "GET"}, {"GET", "/orders2", 403, "GET"}, {"DELETE", "/orders/1", 403, "DELETE /orders/*"},
		{"POST", "/orders/1", 403, "POST /orders/*"}, {"get", "/orders", 403, "another method /orders"}, {"FOO", "/orders", 403, "another method /orders"}, {"TRACE", "/orders", 403, "TRACE /orders"},
		{"POST", "/orders//refund", 403, "POST"}, {"POST", "/orders/1/2/refund", 403, "POST /orders/*"},
	} {
		a := p.do(c.method, c.path, nil)
		if a.status != c.status {
			t.Errorf("%s %s: %d %s", c.method, c.path, a.status, a.body)
		}
		if c.status == 403 {
			all := p.rec.Refusals()
			if len(all) == 0 || (c.method != "HEAD" && !strings.Contains(a.body, "problems/scope-denied")) {
				t.Fatalf("%s %s: %s", c.method, c.path, a.body)
			}
		}
	}
	routes := map[string]bool{}
	gatewaytest.Until(t, "refusals", func() bool {
		for _, f := range p.rec.Refusals() {
			routes[f.Route] = true
		}
		return routes["DELETE /orders/*"] && routes["another method /orders"]
	})
}

func TestRedirectsStayOnTheTarget(t *testing.T) {
	t.Parallel()
	var to string
	status := 302
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(status)
	})
	p := newPath(t, h, &store.Access{}, option{base: "/v2"})
	for loc, want := range map[string]string{
		"/v2/next?a=b": p.url + "/next?a=b", "http://target.internal/v2/x": p.url + "/x", "next": p.url + "/a/next", "http://TARGET.internal:80/v2/": p.url + "/", "?q=1": p.url + "/a/b?q=1",
	} {
		to = loc
		if a := p.get("/a/b"); a.status != 302 || a.header.Get("Location") != want {
			t.Errorf("%s: %d %q, want %q", loc, a.status, a.header.Get("Location"), want)
		}
	}
	for _, loc := range []string{"http://169.254.169.254/", "//evil.example/v2/", "https://target.internal/v2/", "http://target.internal:81/v2/x", "/v1/other", "/v22/x", `/v2/\evil`, "http://a@target.internal/v2/",
		"javascript:alert(1)", "/v2/%2e%2e/x", "/v2/../x", "http:evil"} {
		to = loc
		a := p.get("/a/b")
		if a.status != 502 || a.header.Get("Location") != "" || strings.Contains(a.body, "evil") {
			t.Errorf("%s: %d %q", loc, a.status, a.header.Get("Location"))
		}
	}
	if !p.refused(errElsewhere.Error()) {
		t.Error("not on record")
	}
	status, to = 201, "http://elsewhere.example/new"
	if a := p.get("/a/b"); a.status != 201 || a.header.Get("Location") != "" {
		t.Errorf("%+v", a)
	}
}

func TestAWayThatARedirectNamesHasNoSecretInItsQuery(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.String()+"&again=1", http.StatusTemporaryRedirect)
	}),
		&store.Access{Inject: &store.Inject{In: "query", Name: "key", Value: "{{key}}"}}, option{})
	a := p.get("/x?a=1")
	if a.status != 307 || a.header.Get("Location") != p.url+"/x?a=1&again=1" || strings.Contains(a.bytes(), url.QueryEscape(apiKey)) {
		t.Fatalf("%+v", a)
	}
}

func TestBodiesStreamBothWaysAtOnce(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]option{"HTTP/1.1": {}, "HTTP/2": {tls: true}} {
		t.Run(name, func(t *testing.T) {
			p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				rc := http.NewResponseController(w)
				_ = rc.EnableFullDuplex()
				w.Header().Set("Trailer", "X-Sum")
				w.WriteHeader(200)
				_ = rc.Flush()
				in := bufio.NewReader(r.Body)
				for {
					line, err := in.ReadString('\n')
					_, _ = io.WriteString(w, strings.ToUpper(line))
					_ = rc.Flush()
					if err != nil {
						break
					}
				}
				w.Header().Set("X-Sum", "42")
			}), &store.Access{}, o)
			tr := &http.Transport{}
			if o.tls { // the step's side too
				tr.Protocols = new(http.Protocols)
				tr.Protocols.SetUnencryptedHTTP2(true)
			}
			defer tr.CloseIdleConnections()
			body, say := io.Pipe()
			req, err := http.NewRequestWithContext(t.Context(), "POST", p.url+"/talk", body)
			ok(t, err)
			req.Header.Set("Authorization", "Bearer "+p.token)
			res, err := tr.RoundTrip(req)
			ok(t, err)
			in := bufio.NewReader(res.Body)
			for _, word := range []string{"one\n", "two\n"} {
				_, _ = io.WriteString(say, word)
				line, err := in.ReadString('\n')
				if err != nil || line != strings.ToUpper(word) {
					t.Fatalf("%q, %v", line, err)
				}
			}
			_ = say.Close()
			rest, err := io.ReadAll(in)
			if err != nil || len(rest) > 0 || res.Trailer.Get("X-Sum") != "42" {
				t.Fatalf("%q %v %v", rest, err, res.Trailer)
			}
			if want := map[bool]int{false: 1, true: 2}[o.tls]; res.ProtoMajor != want {
				t.Fatal(res.Proto)
			}
			if o := p.rec.Finished("").Outcome; o.Error != "" || o.Sent != 8 || o.Received != 8 {
				t.Fatalf("%+v", o)
			}
		})
	}
}

func TestASessionThatEndsCutsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	gone := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "begun")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(gone)
	})
	p := newPath(t, h, &store.Access{}, option{})
	req, err := http.NewRequestWithContext(t.Context(), "GET", p.url+"/x", nil)
	ok(t, err)
	req.Header.Set("Authorization", "Bearer "+p.token)
	res, err := p.client.Do(req)
	ok(t, err)
	defer func() { _ = res.Body.Close() }()
	_, err = io.ReadFull(res.Body, make([]byte, len("begun")))
	ok(t, err)
	start := time.Now()
	p.core.End(p.params.Intent)
	if _, err := io.ReadAll(res.Body); err == nil || time.Since(start) > time.Second {
		t.Fatalf("%v after %s", err, time.Since(start))
	}
	<-gone
	if u := p.rec.Finished(""); u.Outcome.Error != store.UseCut || u.Outcome.Status != "200" {
		t.Fatalf("%+v", u.Outcome)
	}
	if a := p.get("/x"); a.status != 401 {
		t.Fatalf("%+v", a)
	}
}

func TestATargetThatDoesNotAnswerInTimeIsLeft(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }),
		&store.Access{HTTP: &store.HTTPAccess{Routes: open().Routes, Timeout: store.Duration(50 * time.Millisecond)}}, option{})
	if a := p.get("/x"); a.status != 504 {
		t.Fatalf("%+v", a)
	}
	if o := p.rec.Finished("").Outcome; o.Error != store.UseTimeout {
		t.Fatalf("%+v", o)
	}
}

func TestATargetMayTakeLongerToAnswerThanAWriteMay(t *testing.T) {
	t.Parallel()
	for _, two := range []bool{false, true} {
		p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(150 * time.Millisecond)
			_, _ = io.WriteString(w, "late")
		}), &store.Access{}, option{config: func(c *Config) { c.Slow = 50 * time.Millisecond }})
		if two {
			tr := p.client.Transport.(*http.Transport)
			tr.Protocols = new(http.Protocols)
			tr.Protocols.SetUnencryptedHTTP2(true)
		}
		if a := p.get("/x"); a.err != nil || a.status != 200 || a.body != "late" {
			t.Fatalf("HTTP/2 %t: %+v", two, a)
		}
	}
}

func TestAnAnswerThatFallsSilentIsCut(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "begun")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}), &store.Access{}, option{config: func(c *Config) { c.Idle = 50 * time.Millisecond }})
	if a := p.get("/x"); a.status != 200 || a.err == nil {
		t.Fatalf("%+v", a)
	}
	if o := p.rec.Finished("").Outcome; o.Error != store.UseTimeout {
		t.Fatalf("%+v", o)
	}
}

func TestATargetThatIsDownIsSaidToBe(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", ""), &store.Access{}, option{})
	p.target.Close()
	if a := p.get("/x"); a.status != 502 || strings.Contains(a.body, "127.0.0.1") {
		t.Fatalf("%+v", a)
	}
	if o := p.rec.Finished("").Outcome; o.Error != store.UseUpstream {
		t.Fatalf("%+v", o)
	}
}

func TestWhatComesBackIsMasked(t *testing.T) {
	t.Parallel()
	const mail = "ada@example.com"
	for _, c := range []struct {
		name, kind, body string
		rules            store.Masking
		want             string // empty: withheld
	}{
		{"a field in JSON", "application/json", `{"id": 1, "email": "ada@example.com"}`, fields("email"), `{"id": 1, "email": "[masked]"}`},
		{"a field in an error", "application/problem+json; charset=utf-8", `{"email":"ada@example.com"}`, fields("email"), `{"email":"[masked]"}`},
		{"a detector in text", "text/plain", "write to ada@example.com!", detects("email"), "write to [masked]!"},
		{"a form", "application/x-www-form-urlencoded", "a=1&b=ada%40example.com", detects("email"), "a=1&b=%5Bmasked%5D"},
		{"markup", "text/html", "<p>ada@example.com</p>", detects("email"), "<p>[masked]</p>"},
		{"markup with references", "text/html", "<p>ada&#64;example.com</p>", detects("email"), ""},
		{"lines", "application/x-ndjson", "{\"email\":\"ada@example.com\"}\n{\"a\":1}\n", fields("email"), "{\"email\":\"[masked]\"}\n{\"a\":1}\n"},
		{"events", "text/event-stream", "event: x\ndata: {\"email\":\ndata: \"ada@example.com\"}\n\n: ada@example.com\ndata: [DONE]\n\n", fields("email"), "event: x\ndata: {\"email\":\ndata: \"[masked]\"}\n\n:\ndata: [DONE]\n\n"},
		{"events that end in CR", "text/event-stream", "data: ada@example.com\r\rdata: b\r\r", detects("email"), "data: [masked]\n\ndata: b\n\n"},
		{"an event that is no JSON", "text/event-stream", "data: ada@example.com\n\n", fields("email"), "data: [masked]\n\n"},
		{"an event without its end", "text/event-stream", "data: a\n\ndata: ada@example.com\n", detects("email"), "data: a\n\n"},
		{"text under a rule by name", "text/plain", mail, fields("email"), ""},
		{"text in UTF-16", "text/plain", "a\x00d\x00a\x00", detects("email"), ""},
		{"text that says UTF-16", "text/plain; charset=utf-16", mail, detects("email"), ""},
		{"no type", "", mail, detects("email"), ""},
		{"a picture", "image/png", mail, detects("email"), ""},
		{"parts", "multipart/form-data; boundary=x", mail, detects("email"), ""},
		{"what is no JSON", "application/json", `{"email":"ada@example.com"`, fields("email"), ""},
		{"a bare value", "application/json", `"ada@example.com"`, fields("email"), `"[masked]"`},
		{"a bare value in a line", "application/x-ndjson", "{\"a\":1}\n\"ada@example.com\"\nnull\n", fields("email"), "{\"a\":1}\n\"[masked]\"\nnull\n"},
		{"a bare value in an event", "text/event-stream", "data: \"ada@example.com\"\n\n", fields("email"), "data: \"[masked]\"\n\n"},
		{"JSON that says it is text", "text/plain", `{"a":["ada\u0040example.com"],"n":1}`, detects("email"), `{"a":["[masked]"],"n":1}`},
		{"JSON in a script", "text/javascript", `f("ada\u0040example.com")`, detects("email"), `f("[masked]")`},
		{"JSON in a string, and more", "application/json", `{"log":"{\"email\":\"ada@example.com\"} from a"}`, fields("email"), `{"log":"[masked]"}`},
		{"JSON in a string, cut short", "application/json", `{"log":"{\"email\":\"ada@example.com"}`, fields("email"), `{"log":"[masked]"}`},
		{"JSON in a string after a mark of order", "application/json", `{"log":"\ufeff{\"email\":\"ada@example.com\"}"}`, fields("email"), `{"log":"{\"email\":\"[masked]\"}"}`},
		{"a document after a mark of order", "application/json", "\xEF\xBB\xBF{\"email\":\"ada@example.com\"}", fields("email"), ""},
		{"what is not UTF-8", "application/json", "{\"\xff\":1,\"email\":\"ada@example.com\"}", fields("email"), ""},
		{"JSON that is null", "application/json", "null", fields("email"), "null"},
		{"nothing, of a type that cannot be masked", "image/png", "", fields("email"), "-"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, status := range []int{200, 500} {
				p := newPath(t, says(status, c.kind, c.body), &store.Access{Masking: c.rules, HTTP: &store.HTTPAccess{Routes: open().Routes, Sample: 1000}}, option{})
				a := p.get("/x")
				want := strings.TrimPrefix(c.want, "-")
				if strings.Contains(a.bytes(), mail) || strings.Contains(a.bytes(), "a\x00d") || c.want == "" && a.status != 502 || c.want != "" && (a.status != status || a.body != want) {
					t.Fatalf("%+v", a)
				}
				if status == 500 { // as an answer that is none, but for the time it takes to be on record
					continue
				}
				u := p.rec.Finished("")
				if strings.Contains(p.rec.All(), mail) || u.Outcome.Status != "200" {
					t.Fatalf("%+v", u.Outcome)
				}
				if c.want == "" {
					if u.Outcome.Error != store.UseWithheld {
						t.Fatalf("%+v", u.Outcome)
					}
					continue
				}
				if u.Outcome.Error != "" || u.Outcome.Masked != int64(strings.Count(c.want, "masked")) {
					t.Fatalf("%+v", u.Outcome)
				}
				if strings.TrimSpace(u.Sample) != strings.TrimSpace(want) {
					t.Fatalf("sample %q", u.Sample)
				}
			}
		})
	}
}

// Values that a detector looks for, disguised in a way that whoever shows or
// reads them takes off again.
func TestDisguisedValuesAreMasked(t *testing.T) {
	t.Parallel()
	body := "{\"a\":\"ada\u200b@exam\u00adple.com\",\"b\":\"4111\u2060111111111111\",\"c\":\"\uff14\uff11\uff11\uff11111111111111\",\"d\":\"tel:%2B49%20151%2012345678\"," +
		"\"e\":\"x DE89\u200d370400440532013000\",\"f\":41111111111111110000000000000000000000000000000000000000000000000e-49,\"g\":4111111111111110.9999999,\"h\":0.4111111111111111,\"i\":\"AKIA\\u0000IOSFODNN7EXAMPLE\"}"
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-4111111111111111", "a")
		w.Header().Set("X-Number", "4111%201111%201111%201111")
		_, _ = io.WriteString(w, body)
	}), &store.Access{Masking: detects("email", "card", "phone", "iban", "secret")}, option{})
	a := p.get("/x")
	want := `{"a":"[masked]","b":"[masked]","c":"[masked]","d":"tel:[masked]","e":"x [masked]","f":"[masked]","g":"[masked]","h":0.4111111111111111,"i":"[masked]"}`
	if a.status != 200 || a.body != want || strings.Contains(a.bytes(), "4111111111111111\":") || a.header.Get("X-Number") != "[masked]" || a.header.Get("X-4111111111111111") != "" {
		t.Errorf("%d %s %v", a.status, a.body, a.header)
	}
}

func TestARedirectDoesNotTellWhatARuleHides(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "/orders?id=7&E%6dail=ada%40example.com&x")
		w.Header().Set("X-Request-Id", `{"email":"ada@example.com"`)
		w.WriteHeader(302)
	}), &store.Access{Masking: fields("email")}, option{})
	a := p.get("/x")
	if a.status != 302 || a.header.Get("Location") != p.url+"/orders?id=7&E%6dail=%5Bmasked%5D&x" || strings.Contains(a.bytes(), "ada") {
		t.Errorf("%+v", a)
	}
}

func TestCompressedContentIsReadOrWithheld(t *testing.T) {
	t.Parallel()
	for coding, want := range map[string]int{"gzip": 200, "br": 502, "gzip, gzip": 502, "deflate": 502} {
		p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "identity" {
				t.Error(r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Encoding", coding)
			w.Header().Set("Etag", `"x"`)
			z := gzip.NewWriter(w)
			_, _ = io.WriteString(z, `{"email":"ada@example.com"}`)
			_ = z.Close()
		}), &store.Access{Masking: fields("email")}, option{})
		a := p.get("/x", "Accept-Encoding", "gzip, br")
		if a.status != want || want == 200 && (a.body != `{"email":"[masked]"}` || a.header.Get("Content-Encoding") != "" || a.header.Get("Etag") != "") {
			t.Fatalf("%s: %+v", coding, a)
		}
	}
}

func TestHeadersAndTrailersAreMasked(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Trailer", "X-Late")
		h.Set("Content-Type", "application/json")
		h.Set("Email", "ada@example.com")
		h.Set("X-Customer", "ada@example.com")
		h.Set("Link", "</x?next=ada@example.com>; rel=next")
		h.Set("Warning", `199 - "ada@example.com"`)
		h.Set("Set-Cookie", "session=real")
		h.Set("Refresh", "0; url=http://evil.example")
		h.Set("Alt-Svc", `h3="evil.example:443"`)
		for _, name := range []string{"Etag", "Content-Md5", "Digest", "Content-Digest"} {
			h.Set(name, `"c2VjcmV0"`)
		}
		h.Set(http.TrailerPrefix+"X-Sudden", "ada@example.com")
		w.WriteHeader(103)
		w.WriteHeader(200)
		_, _ = io.WriteString(w, "{}")
		h.Set("X-Late", "ada@example.com")
	}), &store.Access{Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}, {Detector: "email"}}}}, option{})
	a := p.get("/x")
	if a.status != 200 || strings.Contains(a.bytes(), "ada@") || len(a.trailer) > 0 || a.header.Get("Link") != "<[masked]>; rel=next" {
		t.Fatalf("%+v", a)
	}
	for _, name := range []string{"Set-Cookie", "Refresh", "Alt-Svc", "Etag", "Content-Md5", "Digest", "Content-Digest", "X-Customer", "Warning", "Email"} {
		if a.header.Get(name) != "" {
			t.Errorf("%s: %s", name, a.header.Get(name))
		}
	}
}

func TestAHeadOfMaskedContentDoesNotSayHowLongItWas(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", "4711")
	}), &store.Access{Masking: fields("email")}, option{})
	if a := p.do("HEAD", "/x", nil); a.status != 200 || a.header.Get("Content-Length") != "" {
		t.Fatalf("%+v", a)
	}
}

func TestPartsOfContentAreNotAskedFor(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.txt", time.Time{}, strings.NewReader("0123456789"))
	}), &store.Access{}, option{})
	if a := p.get("/x", "Range", "bytes=2-4"); a.status != 200 || a.body != "0123456789" {
		t.Fatalf("%+v", a)
	}
}

func TestContentThatIsTooLargeToMaskIsWithheld(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `["`)
		for b := make([]byte, 64<<10); ; { // without end
			for i := range b {
				b[i] = 'a'
			}
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}), &store.Access{Masking: fields("email")}, option{})
	if a := p.get("/x"); a.status != 502 {
		t.Fatalf("%+v", a)
	}
	if o := p.rec.Finished("").Outcome; o.Error != store.UseWithheld {
		t.Fatalf("%+v", o)
	}
}

func TestASecretThatATargetShowsBackNeverReachesTheStep(t *testing.T) {
	t.Parallel()
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("X-Api-Key")
		for v := range newSecrets([]string{key}).each() {
			w.Header().Add("X-Echo", "<"+v+">")
		}
		w.Header().Set("Trailer", "X-Late")
		w.Header().Set("X-"+"Name", key)
		rc := http.NewResponseController(w)
		for v := range newSecrets([]string{key}).each() {
			for i := range len(v) { // a byte at a time
				_, _ = io.WriteString(w, v[i:i+1])
				_ = rc.Flush()
			}
			_, _ = io.WriteString(w, " and ")
		}
		w.Header().Set("X-Late", "is "+key)
	}), &store.Access{HTTP: &store.HTTPAccess{Routes: open().Routes, Sample: 5000, ResponseHeaders: []string{"X-Name"}}}, option{})
	a := p.get("/x")
	if a.status != 200 || a.err != nil {
		t.Fatalf("%+v", a)
	}
	p.rec.Finished("")
	for v := range newSecrets([]string{apiKey}).each() {
		if strings.Contains(a.bytes(), v) || strings.Contains(p.rec.All(), v) {
			t.Errorf("%q got through", v)
		}
	}
	if !strings.Contains(a.body, "* and *") || a.trailer.Get("X-Late") != "is "+strings.Repeat("*", len(apiKey)) {
		t.Fatalf("%s %v", a.body, a.trailer)
	}
}

// each yields every string that is looked for.
func (s *secrets) each() func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, list := range s.byFirst {
			for _, v := range list {
				if !yield(v) {
					return
				}
			}
		}
	}
}

func TestAWebSocketPassesWhereTheGrantSaysSo(t *testing.T) {
	t.Parallel()
	ws := websocket.Server{Handler: func(c *websocket.Conn) {
		for {
			var s string
			if websocket.Message.Receive(c, &s) != nil {
				return
			}
			_ = websocket.Message.Send(c, s+" "+c.Request().Header.Get("X-Api-Key"))
		}
	}}
	a := open()
	a.Upgrade = true
	p := newPath(t, ws, &store.Access{HTTP: a}, option{})
	dial := func() (*websocket.Conn, error) {
		c, err := websocket.NewConfig("ws"+strings.TrimPrefix(p.url, "http")+"/chat", "http://step.test")
		ok(t, err)
		c.Header.Set("Authorization", "Bearer "+p.token)
		return c.DialContext(t.Context())
	}
	c, err := dial()
	ok(t, err)
	for _, word := range []string{"hello", "k", strings.Repeat("long ", 20000)} {
		ok(t, websocket.Message.Send(c, word))
		var got string
		ok(t, websocket.Message.Receive(c, &got))
		if got != word+" "+strings.Repeat("*", len(apiKey)) {
			t.Fatalf("%.80q", got)
		}
	}
	p.core.End(p.params.Intent)
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	var got string
	if err := websocket.Message.Receive(c, &got); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection outlived its session: %v", err)
	}
	if u := p.rec.Finished(""); u.Use != "GET /*" || u.Outcome.Status != "101" || u.Outcome.Error != store.UseCut || u.Outcome.Sent == 0 || u.Outcome.Received == 0 || u.Outcome.Rows != 3 {
		t.Fatalf("%+v", u.Outcome)
	}

	for name, access := range map[string]*store.Access{"not allowed": {HTTP: open()}, "masked": {HTTP: a, Masking: fields("email")}} {
		p = newPath(t, ws, access, option{})
		if _, err := dial(); err == nil || p.reached.Load() != 0 || !p.refused("the connection may not be upgraded") {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

func TestASecretInPiecesOfAWebSocketMessageIsHidden(t *testing.T) {
	t.Parallel()
	var in strings.Builder
	in.Write(frame(1, false, []byte("it is "+apiKey[:5])))
	in.Write(frame(9, true, []byte(apiKey))) // a ping in between
	in.Write(frame(0, false, []byte(apiKey[5:9])))
	in.Write(frame(0, true, []byte(apiKey[9:]+" and k")))
	x := &exchange{v: &view{secrets: newSecrets([]string{apiKey})}, watch: newWatch(time.Hour, func() {})}
	f := &frames{x: x, in: bufio.NewReader(strings.NewReader(in.String())), r: redactor{s: x.v.secrets}}
	out, _ := io.ReadAll(f)
	again := &frames{x: &exchange{v: &view{}, watch: x.watch}, in: bufio.NewReader(strings.NewReader(string(out)))}
	if _, err := io.ReadAll(again); err != nil {
		t.Fatalf("what came out is no WebSocket: %v", err)
	}
	if strings.Contains(string(out), apiKey[:5]) || strings.Contains(string(out), apiKey[9:]) || !strings.Contains(string(out), "it is ") || !strings.HasSuffix(string(out), " and k") {
		t.Fatalf("%q", out)
	}
	for _, bad := range []string{"\x91\x00", "\x81\x81abcda", "\x80\x00", "\x83\x00", "\x09\x00", "\x89\x7e\x00\x7e", "\x01\x00\x81\x00", "\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff", "\x8b\x00"} {
		f := &frames{x: x, in: bufio.NewReader(strings.NewReader(bad))}
		if _, err := io.ReadAll(f); err != errFrame {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestTheForwardProxyStandsForTheTargetAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Api-Key") != apiKey {
			w.WriteHeader(401)
		}
		if r.URL.Path == "/v2/away" {
			http.Redirect(w, r, "https://example.com/v2/home", http.StatusFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"proto":%q,"email":"ada@example.com"}`, r.Proto)
	})
	p := newPath(t, h, &store.Access{Masking: fields("email")}, option{tls: true, base: "/v2", config: func(c *Config) { c.CADir = dir }})
	pem := p.get(caPath)
	if pem.status != 200 || strings.Contains(pem.body, "PRIVATE") {
		t.Fatalf("%+v", pem)
	}
	through := func(token string, two bool) *http.Client {
		proxy, err := url.Parse(strings.Replace(p.url, "http://", "http://any:"+token+"@", 1))
		ok(t, err)
		tr := &http.Transport{Proxy: http.ProxyURL(proxy), TLSClientConfig: trusting([]byte(pem.body)), ForceAttemptHTTP2: two}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	get := func(c *http.Client, to string) (*http.Response, string, error) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", to, nil)
		ok(t, err)
		req.Header.Set("Authorization", "Bearer what-the-sdk-wanted")
		res, err := c.Do(req)
		if err != nil {
			return nil, "", err
		}
		defer func() { _ = res.Body.Close() }()
		b, err := io.ReadAll(res.Body)
		ok(t, err)
		return res, string(b), nil
	}
	for _, two := range []bool{false, true} {
		res, body, err := get(through(p.token, two), "https://example.com/v2/orders/1?a=b")
		if err != nil || res.StatusCode != 200 || body != `{"proto":"HTTP/2.0","email":"[masked]"}` || res.ProtoMajor != map[bool]int{false: 1, true: 2}[two] {
			t.Fatalf("%v %v %s", err, res, body)
		}
	}
	if u := p.rec.Finished(""); u.Use != "GET /*" || u.Statement != "GET /v2/orders/1?a" {
		t.Fatalf("%+v", u)
	}
	c := through(p.token, false)
	if res, _, err := get(c, "https://example.com/v2/away"); err != nil || res.Header.Get("Location") != "https://example.com/v2/home" {
		t.Fatalf("%v %v", err, res)
	}
	if res, _, err := get(c, "https://example.com/other"); err != nil || res.StatusCode != 403 {
		t.Fatalf("%v %v", err, res)
	}
	for _, to := range []string{"https://evil.example/v2/x", "https://example.com:444/v2/x"} {
		if _, _, err := get(c, to); err == nil {
			t.Errorf("%s was reached", to)
		}
	}
	gatewaytest.Until(t, "the refusal", func() bool { return p.refused("another host than the session's target") })
	if _, _, err := get(through("another", false), "https://example.com/v2/x"); err == nil || !strings.Contains(err.Error(), "Proxy Authentication Required") {
		t.Fatal(err)
	}

	info, err := os.Stat(dir + "/" + caFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info, err)
	}
	again, err := New(Config{Gateway: p.core, URL: p.url, CADir: dir})
	ok(t, err)
	if string(again.ca.pem) != pem.body {
		t.Fatal("the authority changed")
	}
	ok(t, os.Chmod(dir+"/"+caFile, 0o644))
	if _, err := New(Config{Gateway: p.core, URL: p.url, CADir: dir}); err == nil {
		t.Fatal("a key that others can read was taken")
	}

	// A tunnel is cut with its session.
	stuck := through(p.token, true)
	if _, _, err := get(stuck, "https://example.com/v2/x"); err != nil {
		t.Fatal(err)
	}
	p.core.End(p.params.Intent)
	if res, _, err := get(stuck, "https://example.com/v2/x"); err == nil && res.StatusCode != 401 {
		t.Fatal(res)
	}
}

func TestATunnelAnswersForNoOtherHost(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "text/plain", "x"), &store.Access{}, option{tls: true, config: func(c *Config) { c.CADir = t.TempDir() }})
	proxy, err := url.Parse(strings.Replace(p.url, "http://", "http://any:"+p.token+"@", 1))
	ok(t, err)
	tr := &http.Transport{Proxy: http.ProxyURL(proxy), TLSClientConfig: trusting(p.g.ca.pem)}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "https://example.com/x", nil)
	ok(t, err)
	req.Host = "evil.example"
	res, err := tr.RoundTrip(req)
	ok(t, err)
	_ = res.Body.Close()
	if res.StatusCode != 403 || p.reached.Load() != 0 {
		t.Fatal(res.Status)
	}
}

func TestAPlainTargetIsReachedThroughTheForwardProxy(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "text/plain", "x"), &store.Access{}, option{config: func(c *Config) { c.CADir = t.TempDir() }})
	proxy, err := url.Parse(strings.Replace(p.url, "http://", "http://any:"+p.token+"@", 1))
	ok(t, err)
	tr := &http.Transport{Proxy: http.ProxyURL(proxy)}
	defer tr.CloseIdleConnections()
	for to, want := range map[string]int{"http://target.internal/a": 200, "http://target.internal:80": 200, "http://other.internal/a": 403, "http://target.internal:81/a": 403} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", to, nil)
		ok(t, err)
		res, err := tr.RoundTrip(req)
		ok(t, err)
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %s", to, res.Status)
		}
	}
}

func TestATargetMayNotBeWhereTheGatewaysOwnHostIs(t *testing.T) {
	t.Parallel()
	for upstream, want := range map[string]int{"http://169.254.169.254": 403, "http://[fe80::1]": 403, "http://[::ffff:169.254.169.254]": 403, "http://[64:ff9b::a9fe:a9fe]": 403, "http://100.100.100.200": 403,
		"http://0.0.0.0": 403, "http://224.0.0.1": 403, "http://[fd00:ec2::254]": 403} {
		p := newPath(t, says(200, "", ""), &store.Access{Upstream: upstream}, option{})
		if a := p.get("/latest/meta-data/"); a.status != want || !p.refused(gateway.ErrAddress.Error()) {
			t.Errorf("%s: %+v", upstream, a)
		}
	}
	// What the configuration maps is dialled as it says.
	p := newPath(t, says(200, "text/plain", "mapped"), &store.Access{Upstream: "http://169.254.169.254"}, option{core: func(c *gateway.Config) {
		c.Upstreams["169.254.169.254"] = c.Upstreams["target.internal"]
	}})
	if a := p.get("/x"); a.status != 200 || a.body != "mapped" {
		t.Fatalf("%+v", a)
	}
	// A name that leads to this host.
	if ips, err := net.DefaultResolver.LookupNetIP(t.Context(), "ip", "localhost.localdomain"); err == nil && len(ips) > 0 && ips[0].IsLoopback() {
		p := newPath(t, says(200, "", ""), &store.Access{Upstream: "http://localhost.localdomain"}, option{})
		if a := p.get("/x"); a.status != 502 || !p.refused(gateway.ErrAddress.Error()) {
			t.Errorf("%+v", a)
		}
	}
}

// What a request costs beyond the same without a gateway, but for the record.
func BenchmarkRequest(b *testing.B) {
	p := newPath(b, says(200, "application/json", `{"email":"ada@example.com"}`), &store.Access{Masking: fields("email")}, option{})
	for _, c := range []struct{ name, url string }{{"direct", p.target.URL}, {"gateway", p.url}} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				req, err := http.NewRequestWithContext(b.Context(), "GET", c.url+"/orders/1", nil)
				ok(b, err)
				if c.name == "gateway" {
					req.Header.Set("Authorization", "Bearer "+p.token)
				} else {
					p.reached.Store(-1 << 30) // these are on no record
				}
				if a := p.send(req); a.status != 200 {
					b.Fatalf("%+v", a)
				}
			}
		})
	}
}
