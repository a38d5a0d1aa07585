package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/problem"
)

func router() *chi.Mux {
	r := NewRouter(zap.NewNop(), 64)
	r.Post("/things/{id}", func(w http.ResponseWriter, r *http.Request) {
		var v struct {
			A string `json:"a"`
			B int    `json:"b"`
		}
		if err := Decode(r, &v); err != nil {
			problem.Write(w, r, err)
			return
		}
		fmt.Fprint(w, v.A)
	})
	r.Get("/panic", func(http.ResponseWriter, *http.Request) { panic("s3cret") })
	r.Get("/both", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "here") })
	r.Delete("/both", func(http.ResponseWriter, *http.Request) {})
	r.Get("/half", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "half")
		panic("s3cret")
	})
	return r
}

func TestBodiesAreDecodedStrictly(t *testing.T) {
	srv := httptest.NewServer(router())
	defer srv.Close()
	for _, c := range []struct{ name, body, slug, says string }{
		{"good", `{"a":"x"}`, "", ""},
		{"unknown member", `{"c":1}`, problem.SlugMalformed, "/c"},
		{"duplicate member", `{"a":"x","a":"y"}`, problem.SlugMalformed, "twice"},
		{"trailing data", `{"a":"x"} {}`, problem.SlugMalformed, "byte"},
		{"truncated", `{"a":"x"`, problem.SlugMalformed, "too early"},
		{"empty", ``, problem.SlugMalformed, "empty"},
		{"not an object", `[1]`, problem.SlugMalformed, ""},
		{"wrong kind", `{"a":7}`, problem.SlugMalformed, "/a"},
		{"wrong case", `{"A":"x"}`, problem.SlugMalformed, "/A"},
		{"invalid UTF-8", "{\"a\":\"\xff\"}", problem.SlugMalformed, ""},
		{"value not repeated", `{"b":"s3cret-value"}`, problem.SlugMalformed, "/b"},
		{"too large", `{"a":"` + strings.Repeat("x", 64) + `"}`, problem.SlugBodyTooLarge, "64"},
	} {
		resp, err := http.Post(srv.URL+"/things/1", "application/json", strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if c.slug == "" {
			if resp.StatusCode != 200 {
				t.Errorf("%s: %d %s", c.name, resp.StatusCode, b)
			}
			continue
		}
		p := problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b)
		if p.Slug() != c.slug || !strings.Contains(p.Detail, c.says) || strings.Contains(string(b), "s3cret") || strings.Contains(p.Detail, "Go ") {
			t.Errorf("%s: %s", c.name, b)
		}
	}
}

func TestATruncatedBodyIsMalformed(t *testing.T) {
	srv := httptest.NewServer(router())
	defer srv.Close()
	c, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "POST /things/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{\"a\":\"x\"}")
	c.(*net.TCPConn).CloseWrite()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 400 {
		t.Fatalf("status %d", resp.StatusCode)
	}
}

func TestEveryOtherAnswerIsAProblemToo(t *testing.T) {
	srv := httptest.NewServer(router())
	defer srv.Close()
	for _, c := range []struct {
		method, path, slug, allow string
	}{
		{"GET", "/nothing", problem.SlugNotFound, ""},
		{"DELETE", "/things/1", problem.SlugMethodNotAllowed, "POST"},
		{"POST", "/panic", problem.SlugMethodNotAllowed, "GET, HEAD"},
		{"POST", "/both", problem.SlugMethodNotAllowed, "GET, HEAD, DELETE"},
		{"OPTIONS", "/things/a%2Fb", problem.SlugMethodNotAllowed, "POST"},
		{"FOO", "/nothing", problem.SlugNotFound, ""},
		{"FOO", "/things/1", problem.SlugMethodNotAllowed, "POST"},
		{"GET", "/panic", problem.SlugInternal, ""},
	} {
		r, _ := http.NewRequest(c.method, srv.URL+c.path, nil)
		r.Header.Set("X-Request-Id", "trace-7")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		p := problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b)
		if p.Slug() != c.slug || p.Instance != "trace-7" || p.Detail == "" || resp.Header.Get("Allow") != c.allow || strings.Contains(string(b), "s3cret") {
			t.Errorf("%s %s: %s, Allow %q", c.method, c.path, b, resp.Header.Get("Allow"))
		}
		for _, h := range []string{"X-Content-Type-Options", "Content-Security-Policy", "Cache-Control", "Referrer-Policy"} {
			if resp.Header.Get(h) == "" {
				t.Errorf("%s %s: no %s", c.method, c.path, h)
			}
		}
	}
	if resp, err := http.Get(srv.URL + "/half"); err == nil {
		if _, err = io.ReadAll(resp.Body); err == nil {
			t.Error("half an answer looked whole")
		}
	}
}

func TestHeadIsAnsweredAsGetWithoutItsBody(t *testing.T) {
	srv := httptest.NewServer(router())
	defer srv.Close()
	for path, status := range map[string]int{"/both": 200, "/nothing": 404, "/things/1": 405} {
		resp, err := http.Head(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != status || len(b) > 0 || err != nil {
			t.Errorf("%s: %d %q %v", path, resp.StatusCode, b, err)
		}
	}
}

func TestAnInventedRequestIDIsReplaced(t *testing.T) {
	srv := httptest.NewServer(router())
	defer srv.Close()
	r, _ := http.NewRequest("GET", srv.URL+"/nothing", nil)
	r.Header.Set("X-Request-Id", `"><script>`)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if id := resp.Header.Get("X-Request-Id"); len(id) != 36 {
		t.Errorf("request ID %q", id)
	}
}

func TestServeRefusesHugeHeadersAndEndsWhenTold(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	entered, left := make(chan struct{}), make(chan struct{})
	r := router()
	r.Get("/wait", func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
		close(left)
	})
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, l, Config{Handler: r, Log: zap.NewNop(), Drain: 50 * time.Millisecond})
	}()
	url := "http://" + l.Addr().String()
	req, _ := http.NewRequest("GET", url+"/nothing", nil)
	req.Header.Set("X-Huge", strings.Repeat("x", 2*MaxHeader))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("status %d", resp.StatusCode)
	}
	go http.Get(url + "/wait")
	<-entered
	cancel()
	<-left // the drain is over, so the request's context is
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestHTTP2IsSpokenWithoutTLSWhereTheListenerIsToldTo(t *testing.T) {
	for _, two := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- Serve(ctx, l, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }), Log: zap.NewNop(), H2C: two})
		}()
		var p http.Protocols
		p.SetUnencryptedHTTP2(true)
		tr := &http.Transport{Protocols: &p}
		resp, err := (&http.Client{Transport: tr}).Get("http://" + l.Addr().String())
		if err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(b) != "HTTP/2.0" {
				t.Errorf("spoke %s", b)
			}
		}
		if (err == nil) != two {
			t.Errorf("H2C %t: %v", two, err)
		}
		tr.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

func TestARequestArrivesWithItsConnectionAndALaterOneWhenItComes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	arrivals := make(chan time.Time, 2)
	r := router()
	r.Get("/when", func(w http.ResponseWriter, r *http.Request) { arrivals <- Arrived(r.Context()) })
	go Serve(ctx, l, Config{Handler: r, Log: zap.NewNop()})
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// A request that is slow to come stands for one that is slow to be taken up.
	time.Sleep(50 * time.Millisecond)
	sent := time.Now()
	for i := range 2 {
		fmt.Fprint(c, "GET /when HTTP/1.1\r\nHost: x\r\n\r\n")
		if at := <-arrivals; at.Before(sent) != (i == 0) {
			t.Errorf("request %d: arrived %s after the first was sent", i, at.Sub(sent))
		}
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"a":"x","b":1}`))
	f.Add([]byte(`{"a":{"b":[]}}`))
	f.Add([]byte(`{"a":"x","a":1}`))
	f.Add([]byte("{\"a\":\"\\ud800\xff\"}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v struct {
			A string         `json:"a"`
			B map[string]any `json:"b"`
		}
		if err := Unmarshal(b, &v); err != nil && problem.From(err).Slug() != problem.SlugMalformed {
			t.Fatal(err)
		}
	})
}
