package http

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

func TestNoRequestIsSmuggledPastTheGuards(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var seen []string
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen = append(seen, r.Method+" "+r.RequestURI+" of "+r.Host)
		mu.Unlock()
		_, _ = io.Copy(io.Discard, r.Body)
	}), &store.Access{HTTP: &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"GET", "POST"}, Paths: []string{"/ok"}}}}}, option{})
	auth := "Authorization: Bearer " + p.token + "\r\n"
	inner := "GET /admin HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n"
	for _, raw := range []string{
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 0\r\nContent-Length: 90\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: +5\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Content-Length: 5, 5\r\n\r\nhello" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "X: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\n5;x=\r\nhello\r\n0\r\nX-Api-Key: mine\r\n\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + inner,
		"POST /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n" + inner,
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "X-Api-Key: a\rGET /admin HTTP/1.1\r\n\r\n",
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "X: a\x00b\r\n\r\n",
		"GET /ok HTTP/1.1\r\nHost: x\r\nHost: admin\r\n" + auth + "\r\n",
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Authorization: Bearer other\r\n\r\n",
		"GET /ok HTTP/1.1\nHost: x\n" + strings.ReplaceAll(auth, "\r", "") + "\n",
		"GET http://169.254.169.254/ok HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET //evil.example/ok HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /admin/../ok HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /ok/../admin HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /ok%2f..%2fadmin HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /ok#/admin HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /ok?_method=DELETE HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"CONNECT target.internal:80 HTTP/1.1\r\nHost: target.internal:80\r\nProxy-" + auth + "\r\n" + inner,
		"TRACE /ok HTTP/1.1\r\nHost: x\r\n" + auth + "\r\n",
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n",
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + inner,
		"GET /ok HTTP/0.9\r\n\r\n", "\x16\x03\x01\x02\x00", "GET\r\n\r\n", strings.Repeat("A", 100<<10),
		"GET /ok HTTP/1.1\r\nHost: x\r\n" + auth + "X: " + strings.Repeat("a", 2<<20) + "\r\n\r\n",
	} {
		c, err := net.Dial("tcp", p.front.Listener.Addr().String())
		ok(t, err)
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(c, raw)
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
	mu.Lock()
	defer mu.Unlock()
	for _, s := range seen {
		if s != "GET /ok of target.internal" && s != "POST /ok of target.internal" {
			t.Errorf("the target saw %s", s)
		}
	}
	if len(seen) == 0 || len(p.rec.Uses()) < len(seen) {
		t.Errorf("%d requests reached the target, %d are on record", len(seen), len(p.rec.Uses()))
	}
	for _, f := range p.rec.Refusals() {
		if strings.Contains(f.Reason+f.Route, "admin") || strings.Contains(f.Reason+f.Route, "evil") {
			t.Errorf("a refusal holds a value: %+v", f)
		}
	}
}

func TestAFloodOfUndecidedStreamsIsBounded(t *testing.T) {
	t.Parallel()
	// Events without end, lines without end: what is held is bounded, and none is
	// handed on.
	for name, target := range map[string]http.HandlerFunc{
		"text/event-stream": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			for {
				if _, err := io.WriteString(w, "data: "+strings.Repeat("ada@example.com ", 4096)+"\n"); err != nil {
					return
				}
			}
		},
		"application/x-ndjson": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/x-ndjson")
			for {
				if _, err := io.WriteString(w, strings.Repeat("ada@example.com ", 4096)); err != nil {
					return
				}
			}
		},
	} {
		p := newPath(t, target, &store.Access{Masking: detects("email")}, option{})
		a := p.get("/x")
		if a.err == nil || strings.Contains(a.body, "ada@") {
			t.Fatalf("%s: %.200s", name, a.body)
		}
		if o := p.rec.Finished("").Outcome; o.Error != store.UseWithheld {
			t.Fatalf("%s: %+v", name, o)
		}
	}
}

// FuzzRecords holds that whatever a target streams, however it is cut, the
// gateway neither fails nor lets a masked value through.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("data: {\"email\":\"MARK\"}\n\ndata: MARK\r\n\r\n: MARK\nid: MARK\n\n"), true)
	f.Add([]byte("{\"email\":\"MARK\"}\n[{\"email\":{\"a\":\"MARK\"}}]\r\n"), false)
	f.Add([]byte("\xEF\xBB\xBFdata:{\"email\":\rdata:\"MARK\"}\r\rretry: 1\n\n"), true)
	f.Fuzz(func(t *testing.T, in []byte, events bool) {
		if strings.ContainsAny(string(in), "\\") { // an escape could hide the mark from this test
			return
		}
		v, err := newTestView(fields("email"))
		ok(t, err)
		x := &exchange{v: v, watch: newWatch(time.Hour, func() {})}
		defer x.watch.stop()
		b := &recordBody{m: &records{x: x, in: newLines(strings.NewReader(string(in))), events: events}, Closer: io.NopCloser(nil)}
		out, _ := io.ReadAll(b)
		if !events {
			return // a line is a document: masking's own tests say what of it is masked
		}
		// What is no JSON in data is hidden whole; what is, has the member hidden.
		sc := bufio.NewScanner(strings.NewReader(string(out)))
		for sc.Scan() {
			line := sc.Text()
			if line != "" && line != ":" && !strings.HasPrefix(line, "data: ") && !strings.HasPrefix(line, "event: ") && !strings.HasPrefix(line, "id: ") && !strings.HasPrefix(line, "retry: ") {
				t.Fatalf("%q became %q", in, out)
			}
			if strings.HasPrefix(line, "data: ") && strings.Contains(line, `"email":"MARK"`) {
				t.Fatalf("%q became %q", in, out)
			}
		}
	})
}

// FuzzFrames holds that whatever a target sends as WebSocket, what comes out is
// WebSocket without the secret, or an end.
func FuzzFrames(f *testing.F) {
	f.Add(append(frame(1, false, []byte("it is "+apiKey[:4])), frame(0, true, []byte(apiKey[4:]))...))
	f.Add(append(frame(9, true, []byte(apiKey)), frame(2, true, make([]byte, 200))...))
	f.Add([]byte("\x81\x7e\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			return
		}
		pass := func(s *secrets, in []byte) (out []byte, err error) {
			x := &exchange{v: &view{secrets: s}, watch: newWatch(time.Hour, func() {})}
			defer x.watch.stop()
			return io.ReadAll(&frames{x: x, in: bufio.NewReader(strings.NewReader(string(in))), r: redactor{s: s}})
		}
		out, _ := pass(newSecrets([]string{apiKey}), in)
		again, err := pass(nil, out)
		if err == errFrame || string(again) != string(out) {
			t.Fatalf("%q became %q, and then %q, %v", in, out, again, err)
		}
		var text strings.Builder
		for rest := out; len(rest) > 1; {
			n, head := int(rest[1]), 2
			switch n {
			case 126:
				n, head = int(rest[2])<<8|int(rest[3]), 4
			case 127:
				n, head = int(rest[7])<<16|int(rest[8])<<8|int(rest[9]), 10
			}
			if rest[0]&0x0f < 8 {
				text.Write(rest[head : head+n])
				if rest[0]&0x80 != 0 {
					text.WriteByte('\n')
				}
			} else if strings.Contains(string(rest[head:head+n]), apiKey) {
				t.Fatalf("%q became %q", in, out)
			}
			rest = rest[head+n:]
		}
		if strings.Contains(text.String(), apiKey) {
			t.Fatalf("%q became %q", in, out)
		}
	})
}

func TestRequestsSideBySideAreEachOnRecordBeforeTheyGo(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "application/json", `{"email":"ada@example.com"}`), &store.Access{Masking: fields("email")}, option{})
	p.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 16
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 20 {
				a := p.get(fmt.Sprintf("/orders/%d?n=%d", i, j))
				if a.status != 200 || a.body != `{"email":"[masked]"}` {
					t.Errorf("%+v", a)
					return
				}
			}
		})
	}
	wg.Wait()
	if p.reached.Load() != 320 || p.rec.Count() != 320 {
		t.Fatalf("%d reached, %d on record", p.reached.Load(), len(p.rec.Uses()))
	}
	gatewaytest.Until(t, "outcomes", func() bool {
		for _, u := range p.rec.Uses() {
			if u.Outcome == nil || u.Outcome.Masked != 1 {
				return false
			}
		}
		return true
	})
}
