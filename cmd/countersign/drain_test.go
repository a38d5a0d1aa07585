package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/store"
)

// doorkeeper stands before Vault, and holds the calls that make tokens while it
// is shut.
type doorkeeper struct {
	url string

	mu   sync.Mutex
	shut chan struct{} // nil: open
	held chan struct{} // receives for each call that is held
}

func newDoorkeeper(t *testing.T, target string) *doorkeeper {
	u, err := url.Parse(target)
	must(t, err)
	d := &doorkeeper{held: make(chan struct{}, 16)}
	rp := httputil.NewSingleHostReverseProxy(u)
	rp.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		shut := d.shut
		d.mu.Unlock()
		if shut != nil && strings.HasPrefix(r.URL.Path, "/v1/auth/token/create") {
			d.held <- struct{}{}
			select {
			case <-shut:
			case <-r.Context().Done():
				panic(http.ErrAbortHandler)
			}
		}
		rp.ServeHTTP(w, r)
	}))
	d.url = server.URL
	t.Cleanup(func() { d.open(); server.CloseClientConnections(); server.Close() })
	return d
}

func (d *doorkeeper) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shut = make(chan struct{})
}

func (d *doorkeeper) open() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut != nil {
		close(d.shut)
		d.shut = nil
	}
}

// reply is an answer to a call.
type reply struct {
	status     int
	retryAfter string
	body       string
}

// post asks for a credential.
func (h *house) post(step, body string, prefer string) reply {
	req, err := http.NewRequest("POST", h.broker.url+"/steps/"+step+"/credential", strings.NewReader(body))
	if err != nil {
		return reply{body: err.Error()}
	}
	req.Header.Set("Authorization", "Bearer "+h.caller)
	if prefer != "" {
		req.Header.Set("Prefer", prefer)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return reply{body: err.Error()}
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header.Get("Retry-After"), string(b)}
}

func TestABrokerThatIsToldToEndFinishesWhatIsUnderWay(t *testing.T) {
	h := newHouse(t)
	h.broker.term()
	door := newDoorkeeper(t, h.vault.Addr)
	gate := freeAddr(t)
	const drain = 3 * time.Second
	config := filepath.Join(h.dir, "serve.yaml")
	text, err := os.ReadFile(config)
	must(t, err)
	changed := regexp.MustCompile(`vault: \{addr: "[^"]*"`).ReplaceAllString(string(text), fmt.Sprintf("vault: {addr: %q", door.url))
	changed += fmt.Sprintf("drain: %s\ngateway: {postgres: {listen: {addr: %q}, address: %q}}\n", drain, gate, gate)
	must(t, os.WriteFile(config, []byte(changed), 0o600))
	h.broker.start()

	// A session with an open connection.
	got := h.post("through", `{"run":"drain","scope":"orders-db:read","delivery":"gateway"}`, "")
	var session struct {
		Request    string
		Credential struct{ Token, Username, Database string }
	}
	if err := json.Unmarshal([]byte(got.body), &session); err != nil || got.status != 201 {
		t.Fatalf("%d %s", got.status, got.body)
	}
	dsn := fmt.Sprintf("postgres://step:%s@%s/%s?sslmode=disable", session.Credential.Token, gate, session.Credential.Database)
	conn, err := pgx.Connect(t.Context(), dsn)
	must(t, err)
	defer conn.Close(context.Background())
	count := func() error { var n int; return conn.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n) }
	must(t, count())

	// A call that waits for people, and a mint under way.
	waiting, minting := make(chan reply, 1), make(chan reply, 1)
	go func() {
		waiting <- h.post("waits", `{"run":"drain","scope":"vault:demo-write","reason":"OPS-1"}`, "wait=60")
	}()
	eventually(t, "people are asked", func() bool {
		for _, e := range h.history() {
			if e.Type == store.ApprovalRequested {
				return true
			}
		}
		return false
	})
	door.close()
	go func() { minting <- h.post("mints", `{"run":"drain","scope":"vault:demo-read"}`, "") }()
	<-door.held

	must(t, h.broker.cmd.Process.Signal(syscall.SIGTERM))
	told := time.Now()
	refused := func(what string, r reply) {
		t.Helper()
		if r.status != 503 || !strings.Contains(r.body, "problems/shutting-down") || r.retryAfter == "" {
			t.Errorf("%s: %d, Retry-After %q: %s", what, r.status, r.retryAfter, r.body)
		}
	}
	select {
	case r := <-waiting:
		refused("a call that waits", r)
	case <-time.After(drain / 2):
		t.Error("a call that waits is not let go")
	}
	refused("a new call", h.post("new", `{"run":"drain","scope":"vault:demo-read"}`, ""))
	res, err := http.Get(h.broker.url + "/readyz")
	must(t, err)
	b, _ := io.ReadAll(res.Body)
	res.Body.Close()
	refused("/readyz", reply{res.StatusCode, res.Header.Get("Retry-After"), string(b)})
	if c, err := pgx.Connect(t.Context(), dsn); err == nil {
		t.Error("the gateway takes new connections")
		c.Close(t.Context())
	}
	if err := count(); err != nil {
		t.Errorf("an open connection, while the gateway drains: %v", err)
	}
	door.open()
	if r := <-minting; r.status != 201 {
		t.Errorf("the mint under way: %d %s", r.status, r.body)
	}
	if took := time.Since(told); took > drain {
		t.Fatalf("this machine took %s, more than the drain, for what is done in it", took)
	}
	if h.broker.ready() {
		t.Error("it is ready")
	}
	// The open connection is told why it is cut.
	_, err = conn.PgConn().ReceiveMessage(t.Context())
	var pg *pgconn.PgError
	if err == nil {
		_, err = conn.PgConn().ReceiveMessage(t.Context())
	}
	if took := time.Since(told); took < drain || took > drain+2*time.Second {
		t.Errorf("it was cut after %s, want %s", took, drain)
	}
	if !errors.As(err, &pg) || pg.Code != "57P01" {
		t.Errorf("it was cut with %v", err)
	}
	if code := h.broker.ends(nil); code != 0 {
		t.Errorf("exit status %d", code)
	}
	for _, e := range h.history() {
		switch {
		case e.Type != store.CredentialRevoked:
		case e.Request != session.Request || *e.Cause != "session lost":
			t.Errorf("%s was revoked, cause %s", e.Step, *e.Cause)
		default:
			session.Request = ""
		}
	}
	if session.Request != "" {
		t.Error("the credential of a session that is gone is not recorded as revoked")
	}

	// The second signal waits for nothing.
	h.broker.start()
	door.close()
	go func() { minting <- h.post("again", `{"run":"drain","scope":"vault:demo-read"}`, "") }()
	<-door.held
	told = time.Now()
	h.broker.ends(func(p *os.Process) {
		_ = p.Signal(syscall.SIGTERM)
		time.Sleep(200 * time.Millisecond) // until the first is taken
		_ = p.Signal(syscall.SIGTERM)
	})
	if took := time.Since(told); took > 2*time.Second {
		t.Errorf("it took %s to end by a second signal", took)
	}
}
