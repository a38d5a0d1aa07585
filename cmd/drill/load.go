package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
)

// How long a caller waits for one answer, and for a credential in all, asking
// again under its key.
const (
	callTimeout = 5 * time.Second
	giveUp      = 2 * time.Minute
	retryAfter  = 200 * time.Millisecond
)

// kinds are what steps ask for, each as often as it stands here.
var kinds = []struct{ scope, delivery string }{
	{"identity:step", ""}, {"identity:step", ""},
	{"vault:demo-read", ""}, {"vault:demo-read", ""},
	{"orders-db:read", ""},
	{"vault:demo-write", ""}, {"vault:demo-write", ""},
	{"orders-db:read", "gateway"}, {"http:demo", "gateway"},
}

// issued is what a caller was given, and told to be on record.
type issued struct {
	window       *window
	at           time.Time
	broker       int // who gave it
	orchestrator string
	run, step    string
	*client.Credential
	secret struct { // of the credential; by kind
		Kind, Token, Username, Password, Host, Database, Address string
		Port                                                     int
		Revocable                                                bool
	}
	again *issued // the one that the same key brought before, which this one replaces

	// Uses by the access path.
	sent, answered int
}

// load is the orchestrators and their steps.
type load struct {
	h        *house
	j        *journal
	eye      *eye
	callers  map[string]*client.Broker // by orchestrator and broker
	steps    *http.Client              // as steps call the HTTP gateway and Vault
	serial   atomic.Int64
	mu       sync.Mutex
	issued   []*issued
	findings []string
}

func newLoad(h *house, j *journal, e *eye) (*load, error) {
	l := &load{h: h, j: j, eye: e, callers: map[string]*client.Broker{},
		steps: &http.Client{Timeout: callTimeout, Transport: &http.Transport{DialContext: h.net.nodes["steps"].dial, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 4, IdleConnTimeout: 10 * time.Second}}}
	transport := &http.Transport{DialContext: h.net.nodes["orchestrator"].dial, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16, IdleConnTimeout: 10 * time.Second}
	for _, o := range h.orchestrators {
		for i := range brokers {
			b, err := client.NewBroker(client.Config{URL: h.brokerURL(i + 1), Token: client.Token(o.token), Transport: transport})
			if err != nil {
				return nil, err
			}
			l.callers[fmt.Sprintf("%s/%d", o.name, i+1)] = b
		}
	}
	return l, nil
}

// finding is something that must not be, seen while the drill went on.
func (l *load) finding(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.findings = append(l.findings, fmt.Sprintf(format, args...))
}

// run makes one step after the other until ctx ends; the last is brought to its
// end.
func (l *load) run(ctx context.Context, worker int) {
	for ctx.Err() == nil {
		l.step(worker)
		select {
		case <-time.After(300*time.Millisecond + random(400*time.Millisecond)):
		case <-ctx.Done():
		}
	}
}

// step is one step of a run: a credential, its uses, its end.
func (l *load) step(worker int) {
	n := l.serial.Add(1)
	kind := kinds[int(random(time.Duration(len(kinds))))]
	o := l.h.orchestrators[int(n)%len(l.h.orchestrators)].name
	among := brokers
	if kind.delivery == "gateway" {
		among = gateways
	}
	ask := client.Ask{Run: fmt.Sprintf("run-%d", worker), Scope: kind.scope, TTL: askTTL.String(), Reason: "a drill", Delivery: kind.delivery}
	step, key := fmt.Sprintf("step-%d", n), fmt.Sprintf("key-%d", n)
	c := l.ask(o, step, key, ask, among)
	if c == nil {
		return
	}
	if c.secret.Revocable && random(6) == 0 { // the answer did not reach the orchestrator, it thinks
		again := l.ask(o, step, key, ask, among)
		if again == nil {
			return
		}
		again.again = c
		l.dead(c, "it was asked for again, and the new one was handed out")
		c = again
	}
	l.use(c)
	switch random(3) {
	case 0:
		ended := l.end(o, step, "DELETE credential", func(ctx context.Context, b *client.Broker) (*client.Revoked, error) {
			return b.Revoke(ctx, step, ask.Run)
		})
		if ended && c.secret.Revocable {
			l.dead(c, "it was said to be revoked")
		}
	case 1:
		ended := l.end(o, step, "POST result", func(ctx context.Context, b *client.Broker) (*client.Revoked, error) {
			return b.Result(ctx, step, client.Result{Run: ask.Run, Outcome: "succeeded", Summary: "a drill"})
		})
		if ended && c.secret.Revocable {
			l.dead(c, "its step was said to have ended")
		}
	} // else it ends by its time
}

// ask asks for a credential until it is answered for good, at one broker after
// the other. It returns nil where none was given.
func (l *load) ask(orchestrator, step, key string, ask client.Ask, among int) *issued {
	began, w := time.Now(), l.j.current()
	broker := int(random(time.Duration(among)))
	defer func() { l.j.stall(w, time.Since(began)) }()
	for time.Since(began) < giveUp {
		b := l.callers[fmt.Sprintf("%s/%d", orchestrator, broker+1)]
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		asked := time.Now()
		c, err := b.Credential(ctx, step, ask, key, 3*time.Second)
		cancel()
		now := l.j.call(slug(err))
		switch {
		case err == nil && len(c.Credential) > 0:
			i := &issued{window: now, at: time.Now(), broker: broker + 1, orchestrator: orchestrator, run: ask.Run, step: step, Credential: c}
			if err := json.Unmarshal(c.Credential, &i.secret); err != nil {
				l.finding("%s: the credential does not parse: %v", c.Request, err)
				return nil
			}
			l.mu.Lock()
			l.issued = append(l.issued, i)
			l.mu.Unlock()
			return i
		case err == nil: // people are asked, or another call's mint is under way
			time.Sleep(time.Until(asked.Add(time.Second)))
			continue
		case !again(err):
			return nil
		}
		broker = (broker + 1) % among
		time.Sleep(retryAfter)
	}
	l.j.call("gave up")
	return nil
}

// end ends a step until somebody answers that it is ended.
func (l *load) end(orchestrator, step, what string, end func(context.Context, *client.Broker) (*client.Revoked, error)) bool {
	broker := int(random(brokers))
	for began := time.Now(); time.Since(began) < giveUp; time.Sleep(retryAfter) {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		r, err := end(ctx, l.callers[fmt.Sprintf("%s/%d", orchestrator, broker+1)])
		cancel()
		l.j.call(slug(err))
		switch {
		case err == nil && r.Pending == 0:
			return true
		case err != nil && !again(err):
			return false
		}
		broker = (broker + 1) % brokers
	}
	l.j.call("gave up")
	return false
}

// since says which broker has handed out nothing since t.
func (l *load) since(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := map[int]bool{}
	for _, i := range slices.Backward(l.issued) {
		if i.at.Before(t) {
			break
		}
		seen[i.broker] = true
	}
	for b := range brokers {
		if !seen[b+1] {
			return fmt.Errorf("broker-%d has handed out nothing since", b+1)
		}
	}
	return nil
}

// slug names how a call failed; "" if it did not.
func slug(err error) string {
	var p *problem.Problem
	switch {
	case err == nil:
		return ""
	case errors.As(err, &p):
		s := p.Type[strings.LastIndex(p.Type, "/")+1:]
		if s == "approval-denied" { // what people said, and no failure
			return ""
		}
		return s
	}
	return "no answer"
}

// again says whether a failed call is to be made again.
func again(err error) bool {
	var p *problem.Problem
	return !errors.As(err, &p) || p.Status >= 500 || p.Status == http.StatusTooManyRequests
}

// use uses what was given.
func (l *load) use(c *issued) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*callTimeout)
	defer cancel()
	switch s := &c.secret; {
	case s.Kind == "vault_token":
		if r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.h.net.nodes["vault"].host()+":8200/v1/secret/data/demo", nil); err == nil {
			r.Header.Set("X-Vault-Token", s.Token)
			if res, err := l.steps.Do(r); err == nil {
				res.Body.Close()
			}
		}
	case s.Kind == "database":
		if conn, err := l.connect(ctx, net.JoinHostPort(s.Host, fmt.Sprint(s.Port)), s.Username, s.Password, s.Database); err == nil {
			_, _ = conn.Exec(ctx, "SELECT count(*) FROM orders")
			conn.Close(ctx)
		}
	case s.Kind == "gateway" && c.Scope == "http:demo":
		for n := range 3 {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/customers/%d", strings.TrimSuffix(s.Address, "/"), n), nil)
			if err != nil {
				return
			}
			r.Header.Set("Authorization", "Bearer "+s.Token)
			c.sent++
			res, err := l.steps.Do(r)
			if err != nil {
				l.j.call("http: no answer")
				return
			}
			b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
			res.Body.Close()
			switch {
			case err != nil:
				l.j.call("http: no answer")
				return
			case res.StatusCode != http.StatusOK:
				l.j.call("http: " + slug(problem.Read(res.StatusCode, res.Header.Get("Content-Type"), b)))
				return
			}
			l.j.call("")
			c.answered++
		}
	case s.Kind == "gateway":
		conn, err := l.connect(ctx, s.Address, "step", s.Token, "postgres")
		if err != nil {
			l.j.call("postgres: " + sqlstate(err))
			return
		}
		defer conn.Close(context.WithoutCancel(ctx))
		for n := range 3 {
			c.sent++
			_, err := conn.Exec(ctx, fmt.Sprintf("SELECT id, amount_cents FROM orders WHERE id = %d", n), pgx.QueryExecModeSimpleProtocol)
			if err != nil {
				l.j.call("postgres: " + sqlstate(err))
				return
			}
			l.j.call("")
			c.answered++
		}
	}
}

// connect connects to a PostgreSQL, or the gateway before it, from where steps
// run.
func (l *load) connect(ctx context.Context, addr, user, password, database string) (*pgx.Conn, error) {
	return l.h.net.nodes["steps"].connect(ctx, addr, user, password, database)
}

// connect connects from n to a PostgreSQL, over TLS.
func (n *node) connect(ctx context.Context, addr, user, password, database string) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("postgres://" + addr + "/" + database + "?sslmode=verify-full&connect_timeout=5")
	if err != nil {
		return nil, err
	}
	c.User, c.Password = user, password
	c.DialFunc = n.dial
	c.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil } // dial looks it up
	return pgx.ConnectConfig(ctx, c)
}

// random is a random number below n.
func random(n time.Duration) time.Duration {
	r, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		panic(err)
	}
	return time.Duration(r.Int64())
}
