package vaulttest

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// Proxy stands between a Vault and who uses it, counts what passes, and
// brings bad luck.
type Proxy struct {
	Addr string

	mu    sync.Mutex
	seen  []string
	fault Fault
}

// Fault is what becomes of the requests whose path begins with On.
type Fault struct {
	On     string // such as "auth/token/create/"; empty: none
	Status int    // answer this, without asking Vault
	Body   string // of that answer
	Hang   bool   // never answer
	Break  bool   // close the connection without an answer, Vault not asked
	Lose   bool   // let Vault do it, then close the connection without an answer
}

// NewProxy starts a proxy in front of addr.
func NewProxy(t testing.TB, addr string) *Proxy {
	t.Helper()
	to, err := url.Parse(addr)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{}
	forward := httputil.NewSingleHostReverseProxy(to)
	forward.ErrorLog = log.New(io.Discard, "", 0) // callers that give up are what a test is about
	forward.Transport = &http.Transport{MaxIdleConnsPerHost: 128}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/v1/")
		p.mu.Lock()
		p.seen = append(p.seen, r.Method+" "+path)
		f := p.fault
		p.mu.Unlock()
		if f.On == "" || !strings.HasPrefix(path, f.On) {
			forward.ServeHTTP(w, r)
			return
		}
		switch {
		case f.Hang:
			// The server notices that the caller has gone only once it has read
			// the whole request.
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		case f.Break:
			panic(http.ErrAbortHandler)
		case f.Lose:
			forward.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(f.Status)
		w.Write([]byte(f.Body))
	}))
	t.Cleanup(s.Close)
	p.Addr = s.URL
	return p
}

// Set brings f from now on; the zero Fault ends it.
func (p *Proxy) Set(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// Seen returns what came by, as "METHOD path", and forgets it.
func (p *Proxy) Seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen
	p.seen = nil
	return seen
}
