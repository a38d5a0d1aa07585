package mcp

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

const (
	maxConns  = 64      // MCP sessions of one session of the gateway
	maxCalls  = 256     // requests under way in one MCP session
	maxSealed = 4 << 10 // bytes of a text that is sealed
	maxServer = 8       // requests of the server's that are being answered, in one MCP session
)

// view is what this package knows of one session of the gateway. It ends with
// that session.
type view struct {
	sess   *gateway.Session
	access *store.Access
	target *url.URL
	hide   *hider
	seal   cipher.AEAD
	nonce  atomic.Uint64

	mu    sync.Mutex
	conns map[string]*conn // by the Mcp-Session-Id that the step was told
}

// newView reads the rules of a session once. An error leaves it unusable.
func newView(sess *gateway.Session) (*view, error) {
	a := sess.Grant.Access
	target, err := url.Parse(a.Upstream)
	if err != nil || target.Scheme != "http" && target.Scheme != "https" || target.Host == "" || target.User != nil {
		return nil, errors.New("the upstream is no http or https URL")
	}
	v := &view{sess: sess, access: a, target: target, hide: &hider{}, conns: map[string]*conn{}}
	if err := v.hide.add(a, sess.Secret); err != nil {
		return nil, err
	}
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	v.seal, err = cipher.NewGCM(block)
	return v, err
}

// sealed hides a server's text that the step is to hand back (a cursor, the ID
// of an event) from the step: nothing that is masked elsewhere can be in it, and
// none is taken that this session was not told for this use.
func (v *view) sealed(use, text string) string {
	nonce := make([]byte, v.seal.NonceSize())
	for i, n := 0, v.nonce.Add(1); i < 8; i, n = i+1, n>>8 {
		nonce[i] = byte(n)
	}
	return base64.RawURLEncoding.EncodeToString(v.seal.Seal(nonce, nonce, []byte(text), []byte(use)))
}

func (v *view) opened(use, sealed string) (string, bool) {
	b, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil || len(b) < v.seal.NonceSize() {
		return "", false
	}
	text, err := v.seal.Open(nil, b[:v.seal.NonceSize()], b[v.seal.NonceSize():], []byte(use))
	return string(text), err == nil
}

// conn returns the MCP session that the step calls id; nil: it has none of that
// name.
func (v *view) conn(id string) *conn {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.conns[id]
}

// keep lets the step come back to c, and reports whether there was room.
func (v *view) keep(c *conn) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conns == nil || len(v.conns) >= maxConns { // nil: it has ended
		return false
	}
	v.conns[c.id] = c
	return true
}

// drop ends c, and says of what was under way that it ended so.
func (v *view) drop(c *conn, reason string) {
	v.mu.Lock()
	delete(v.conns, c.id)
	v.mu.Unlock()
	c.mu.Lock()
	calls := c.calls
	c.calls = nil
	c.mu.Unlock()
	for _, k := range calls {
		k.finish(store.UseOutcome{Error: reason}, "")
		k.cancel(errGone)
	}
}

// end is drop for all, when the session has ended.
func (v *view) end() {
	v.mu.Lock()
	conns := v.conns
	v.conns = nil
	v.mu.Unlock()
	for _, c := range conns {
		v.drop(c, store.UseCut)
	}
}

// conn is one MCP session, or one request to a server that has none. Its id is
// the gateway's own: the server's is never shown, so that no other step, and no
// way around the gateway, has a use for it.
type conn struct {
	v       *view
	id      string
	asking  chan struct{} // a place for each request of the server's that is being answered
	mu      sync.Mutex
	server  string            // the server's Mcp-Session-Id; empty: it has no sessions
	version string            // as agreed; empty before
	calls   map[string]*call  // under way, by the JSON of their ids; nil once the session has ended
	adopted map[string]*hider // rules and secrets of the scopes under which a call went, by scope: the latest
}

func (v *view) newConn(version string) *conn {
	return &conn{v: v, id: rand.Text(), version: version, asking: make(chan struct{}, maxServer), calls: map[string]*call{}}
}

// agreed returns the server's session and the version.
func (c *conn) agreed() (server, version string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server, c.version
}

// hiding hides what the session's own rules name, and what those of every scope
// do under which a call of c went: a notification may tell of any of them, on
// whichever stream it comes.
func (c *conn) hiding() *hider {
	h := c.v.hide.fresh()
	h.maskers, h.secrets = slices.Clip(h.maskers), slices.Clip(h.secrets)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, scope := range slices.Sorted(maps.Keys(c.adopted)) {
		a := c.adopted[scope]
		h.maskers, h.secrets, h.named = append(h.maskers, a.maskers...), append(h.secrets, a.secrets...), h.named || a.named
	}
	return h
}

// adopt notes the rules and the secret of a scope under which a call goes.
func (c *conn) adopt(scope string, h *hider) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.adopted == nil {
		c.adopted = map[string]*hider{}
	}
	c.adopted[scope] = h
}

// begin registers k, and reports whether no request of its id is under way, and
// there is room.
func (c *conn) begin(k *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls == nil || len(c.calls) >= maxCalls || c.calls[string(k.q.m.ID)] != nil {
		return false
	}
	c.calls[string(k.q.m.ID)] = k
	return true
}

func (c *conn) find(id jsontext.Value) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[string(id)]
}

func (c *conn) forget(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[string(k.q.m.ID)] == k {
		delete(c.calls, string(k.q.m.ID))
	}
}

// progresses reports whether a request with this progress token is under way.
func (c *conn) progresses(token jsontext.Value) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		if k.q.token != nil && string(k.q.token) == string(token) {
			return true
		}
	}
	return false
}

// call is a request that is under way.
type call struct {
	c      *conn
	q      *asked
	cancel context.CancelCauseFunc // of the exchange that waits for it

	mu      sync.Mutex
	sess    *gateway.Session // under which it is recorded, and whose secret is shown
	hide    *hider           // the rules in force
	use     *gateway.Pending // nil before it is on record
	sent    int64
	digest  string
	ended   bool
	revoked bool // the server was told that nobody waits any more
	// detached is set once the stream for the answer has ended without it: it may
	// come on a stream that the step resumes.
	detached bool
}

// recorded sets what the record has of k.
func (k *call) recorded(use *gateway.Pending, sent int64, digest string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.use, k.sent, k.digest = use, sent, digest
}

// forwarded reports whether the server may have k.
func (k *call) forwarded() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.use != nil
}

// comesBack reports whether the answer may come on another stream than its own.
func (k *call) comesBack() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.detached
}

// finish says once what came of k, and forgets it.
func (k *call) finish(o store.UseOutcome, sample string) {
	k.c.forget(k)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.use == nil || k.ended {
		return
	}
	k.ended = true
	o.Sent, o.Digest = k.sent, k.digest
	k.use.Finish(o, sample)
}

// outcome is what the record says of a response as the step got it.
func outcome(out *message, rows, received, masked int64) store.UseOutcome {
	o := store.UseOutcome{Status: "ok", Rows: rows, Received: received, Masked: masked}
	switch {
	case out.Error != nil:
		o.Status, o.Error = "error", strconv.FormatInt(out.Error.Code, 10)
	case strings.Contains(string(out.Result), `"isError"`):
		if r, _ := membersOf(out.Result); r.get("isError").Kind() == 't' {
			o.Status, o.Error = "isError", "isError"
		}
	}
	return o
}
