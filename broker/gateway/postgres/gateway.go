// Package postgres is the access path's PostgreSQL side: it speaks the wire
// protocol (version 3.0, simple and extended) with a step that shows its session
// token as the password, and with the target as the user that was minted for
// the step. Every statement is checked by package guard and on record before it
// is forwarded; rows are masked as they stream.
//
// A connection is two goroutines. One reads the client: it checks, records and
// forwards, and tells the other by a queue what answers to expect. The other
// reads the target, takes the queue's items off as they are answered, and is
// the only one that writes to the client. What is refused is an item too: in
// its place the target gets a message that always fails, so that transactions
// and pipelines end up in the state in which PostgreSQL leaves them after an
// error, and the client gets the refusal instead of the target's error.
package postgres

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/broker/gateway/postgres/guard"
	"github.com/countersign-dev/countersign/store"
)

// Config is what a Gateway is made of.
type Config struct {
	Gateway *gateway.Gateway // sessions, the record, and the way to targets
	TLS     *tls.Config      // towards clients; nil: none, and then tokens are taken on loopback alone
	Log     *zap.Logger      // none by default

	Handshake       time.Duration // until a client is let in, the target's log-in included; 20 s by default
	MaxMessage      int           // bytes of one message from a client, COPY's data aside; 16 MiB by default
	MaxHeld         int           // bytes of messages over 64 KiB that all connections hold at once; 256 MiB by default
	MaxConns        int           // connections at once; 2,000 by default
	MaxSessionConns int           // connections at once of one session; 100 by default
	Drain           time.Duration // how long connections go on once Serve is to end; none by default
}

// Gateway serves PostgreSQL clients. It is safe for concurrent use.
type Gateway struct {
	Config
	held atomic.Int64 // as MaxHeld

	mu    sync.Mutex
	conns map[uint32]*conn // by the process ID that its client was told
	open  int              // connections, those not let in yet included
	rules map[*gateway.Session]*rules
}

// New returns a Gateway that serves nobody yet.
func New(c Config) *Gateway {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.Handshake <= 0 {
		c.Handshake = 20 * time.Second
	}
	if c.MaxMessage <= 0 {
		c.MaxMessage = 16 << 20
	}
	if c.MaxHeld <= 0 {
		c.MaxHeld = 256 << 20
	}
	if c.MaxConns <= 0 {
		c.MaxConns = 2000
	}
	if c.MaxSessionConns <= 0 {
		c.MaxSessionConns = 100
	}
	return &Gateway{Config: c, conns: map[uint32]*conn{}, rules: map[*gateway.Session]*rules{}}
}

// Serve serves l's clients until ctx ends or l fails, and closes l. Connections
// that are open when ctx ends go on for Drain and are then cut. It returns when
// all are gone: nil where ctx ended.
func (g *Gateway) Serve(ctx context.Context, l net.Listener) error {
	serving, cut := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cut()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		client, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				defer time.AfterFunc(g.Drain, cut).Stop()
				wg.Wait()
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of file descriptors, most likely: some will be free again.
			g.Log.Warn("a connection could not be accepted", zap.Error(err))
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		wg.Go(func() {
			defer client.Close()
			g.serve(serving, client)
		})
	}
}

func (g *Gateway) serve(ctx context.Context, client net.Conn) {
	g.mu.Lock()
	g.open++
	full, flood := g.open > g.MaxConns, g.open > 2*g.MaxConns
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.open--
		g.mu.Unlock()
	}()
	if flood { // not even told why
		return
	}
	// Whoever does not log in is cut, however slowly it writes.
	_ = client.SetDeadline(time.Now().Add(g.Handshake))
	stop := context.AfterFunc(ctx, func() { _ = client.SetDeadline(time.Unix(1, 0)) })
	c, err := g.welcome(ctx, client, full)
	stop()
	if err != nil || c == nil {
		g.Log.Debug("a client was not let in", zap.String("remote", address(client)), zap.Error(err))
		return
	}
	defer g.forget(c)
	_ = client.SetDeadline(time.Time{})
	c.run(ctx)
}

// rules are what guards and masks one session's connections.
type rules struct {
	loading sync.Mutex // held while the catalog is read
	conns   int        // of the session; guarded by Gateway.mu

	guard  *guard.Guard
	masker *masking.Masker // nil: nothing is hidden
	rows   bool            // rules that look into values, which COPY's data has no place for
	hidden map[origin]bool // columns, by what a RowDescription says of them
	texts  map[uint32]bool // types that are text, beside PostgreSQL's own
}

// rulesOf counts a connection of s in, and returns the session's rules, which
// may not be loaded yet. They are dropped with the session. It returns nil where
// s has too many connections.
func (g *Gateway) rulesOf(s *gateway.Session) *rules {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.rules[s]
	if r == nil {
		r = &rules{}
		g.rules[s] = r
		context.AfterFunc(s.Context(), func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			delete(g.rules, s)
		})
	}
	if r.conns >= g.MaxSessionConns {
		return nil
	}
	r.conns++
	return r
}

// stale makes the next connection of s read the target's catalog again.
func (g *Gateway) stale(s *gateway.Session, r *rules) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.rules[s] == r {
		g.rules[s] = &rules{conns: r.conns}
	}
}

func (g *Gateway) release(s *gateway.Session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r := g.rules[s]; r != nil {
		r.conns--
	}
}

// load makes the rules where they are not yet, from the catalog that q reads.
func (r *rules) load(ctx context.Context, s *gateway.Session, q guard.Querier) error {
	r.loading.Lock()
	defer r.loading.Unlock()
	if r.guard != nil {
		return nil
	}
	access := s.Grant.Access
	var masker *masking.Masker
	if !access.Masking.IsZero() {
		m, err := masking.New(access.Masking)
		if err != nil {
			return err
		}
		masker = m
	}
	catalog, err := guard.LoadCatalog(ctx, q)
	if err != nil {
		return err
	}
	if masker != nil {
		if r.hidden, r.texts, err = originsOf(ctx, masker, q); err != nil {
			return err
		}
	}
	for _, m := range access.Masking.Rules {
		r.rows = r.rows || m.Field != "" || m.Path != "" || m.Detector != ""
	}
	r.masker, r.guard = masker, guard.New(access.Postgres, masker, catalog)
	return nil
}

// register gives c the key by which its client may cancel.
func (g *Gateway) register(c *conn) {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	c.secret = b[4:8]
	c.id = hex.EncodeToString(b[8:])
	g.mu.Lock()
	defer g.mu.Unlock()
	c.pid = binary.BigEndian.Uint32(b[:4]) >> 1 // a pid is positive
	for g.conns[c.pid] != nil {
		c.pid = (c.pid + 1) & 0x7fffffff
	}
	g.conns[c.pid] = c
}

func (g *Gateway) forget(c *conn) {
	g.mu.Lock()
	delete(g.conns, c.pid)
	g.mu.Unlock()
	g.release(c.session)
}

// cancel passes a cancel request on to the target of the connection whose key
// was shown. As with PostgreSQL, nobody is told whether there was one.
func (g *Gateway) cancel(ctx context.Context, pid uint32, secret []byte, remote string) {
	g.mu.Lock()
	c := g.conns[pid]
	g.mu.Unlock()
	if c == nil || subtle.ConstantTimeCompare(c.secret, secret) != 1 {
		g.Gateway.Refused(ctx, store.ProtocolPostgres, remote, "cancel with a wrong key")
		return
	}
	if c.session.Context().Err() == nil {
		c.target.cancel(ctx)
	}
}

// address is the remote IP address of c, without port.
func address(c net.Conn) string {
	host, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err != nil {
		return c.RemoteAddr().String()
	}
	return host
}
