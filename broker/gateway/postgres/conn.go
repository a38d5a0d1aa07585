package postgres

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"hash"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// Why a connection ends.
var (
	errEnded    = errors.New("the session has ended")
	errShutdown = errors.New("the gateway shuts down")
	errClient   = errors.New("the client hung up")
	errTarget   = errors.New("the target hung up")
	errWithheld = errors.New("rows could not be masked surely")
)

// farewell bounds the last words to a client, so that a slow one is cut within
// a second all the same.
const farewell = 200 * time.Millisecond

// maxQueue is how many answers may be awaited before the client is made to wait.
const maxQueue = 4096

// conn is a client's connection, and the one at the target that is its own.
type conn struct {
	g       *Gateway
	session *gateway.Session
	rules   *rules
	client  net.Conn
	target  *target
	pid     uint32 // told to the client, with secret: our own
	secret  []byte
	id      string // names the connection in the record

	// Of the goroutine that reads the client (requests.go).
	requests

	// Of the goroutine that reads the target (answers.go).
	answers

	ctx  context.Context // ends with the connection
	stop context.CancelFunc

	mu      sync.Mutex
	changed sync.Cond // whenever what follows has changed
	queue   []*item   // answers that are due, in order
	first   int       // index in queue of the next
	copying *item     // takes COPY's data from the client
	tx      byte      // of the last ReadyForQuery: I, T or E
	cause   error     // why the connection ends; nil: it does not
}

func newConn(g *Gateway, s *gateway.Session, r *rules, client net.Conn, t *target) *conn {
	c := &conn{g: g, session: s, rules: r, client: client, target: t, tx: 'I'}
	c.changed.L = &c.mu
	c.requests = newRequests(client)
	c.answers = answers{w: bufio.NewWriterSize(client, 16<<10)}
	c.ctx, c.stop = context.WithCancel(s.Context())
	return c
}

// item is an answer that the target owes: to one message, or to one statement
// of a simple query.
type item struct {
	kind     kind
	silent   bool // asked for by us: the client is not told of it
	extended bool
	st       *statement
	formats  []int16 // that Bind asked the result in
	columns  []bool  // which are hidden; nil: none
	tainted  bool
	copies   bool                    // COPY FROM STDIN
	copiesTo bool                    // COPY TO STDOUT
	fail     *pgproto3.ErrorResponse // of failing: what the client is told
	use      *gateway.Pending        // of what is on record

	done bool // it succeeded; guarded by conn.mu

	// What came of it.
	fields   []field // that its rows have
	plan     *plan   // how they are masked; nil: not known yet
	rows     int64
	received int64
	masked   int64
	sample   []byte
	digest   hash.Hash // of COPY's data; guarded by conn.mu
	sent     int64     // bytes of it; guarded by conn.mu
}

// kind says which answers an item may have.
type kind byte

const (
	parsing    kind = iota // ParseComplete
	binding                // BindComplete
	closing                // CloseComplete
	describing             // ParameterDescription, RowDescription, NoData
	executing              // rows or COPY's data, and how it ended
	running                // the same for a statement of a simple query, with RowDescription
	syncing                // ReadyForQuery
	failing                // an error, in whose place the client is told fail
)

// run serves the client until either side or the session ends.
func (c *conn) run(ctx context.Context) {
	defer context.AfterFunc(c.session.Context(), func() { c.end(errEnded) })()
	defer context.AfterFunc(ctx, func() { c.end(errShutdown) })()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		c.end(c.answer())
	}()
	c.end(c.read())
	<-answered
	c.letGo()
	c.farewell()
}

// end cuts the connection; the first cause stands.
func (c *conn) end(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return
	}
	if cause == nil {
		cause = errClient
	}
	if c.session.Context().Err() != nil {
		cause = errEnded
	}
	c.cause = cause
	c.changed.Broadcast()
	c.stop()
	_ = c.target.SetDeadline(time.Unix(1, 0)) // farewell closes it
	_ = c.client.SetReadDeadline(time.Unix(1, 0))
	_ = c.client.SetWriteDeadline(time.Now().Add(farewell))
}

// farewell gives what is under way its outcome, tells the client why it is cut,
// and stops what still runs at the target. Both goroutines are gone.
func (c *conn) farewell() {
	reason, last := store.UseUpstream, (*pgproto3.ErrorResponse)(nil)
	switch {
	case errors.Is(c.cause, errEnded), errors.Is(c.cause, gateway.ErrEnded):
		reason, last = store.UseCut, refusal("FATAL", "57P01", "terminating connection: the session has ended")
	case errors.Is(c.cause, errShutdown):
		reason, last = store.UseCut, refusal("FATAL", "57P01", "terminating connection: the gateway shuts down")
	case errors.Is(c.cause, errWithheld):
		reason, last = store.UseWithheld, refusal("FATAL", "0A000", "rows that could not be masked surely were withheld")
	case errors.Is(c.cause, errBroken):
		reason, last = store.UseClient, refusal("FATAL", "08P01", "terminating connection: the client broke the protocol")
	case errors.Is(c.cause, errClient):
		reason = store.UseClient
	case !c.told:
		last = refusal("FATAL", "08006", "terminating connection: the target hung up")
	}
	if last != nil && !c.partial {
		_, _ = c.w.Write(encode(nil, last))
	}
	if !c.partial && c.w.Flush() == nil {
		if t, ok := c.client.(*tls.Conn); ok {
			_ = t.CloseWrite()
		}
	}
	if t, ok := c.client.(*tls.Conn); ok {
		_ = t.NetConn().Close() // Close itself would wait for a slow client
	} else {
		_ = c.client.Close()
	}
	defer c.target.close()
	busy := false
	for _, it := range c.queue[c.first:] {
		busy = busy || it.kind == executing || it.kind == running
		c.finish(it, "", reason)
	}
	if busy {
		c.target.halt()
	}
}

// finish records what came of an item, where it is a use.
func (c *conn) finish(it *item, status, problem string) {
	if it.use == nil {
		return
	}
	o := store.UseOutcome{Status: status, Error: problem, Rows: it.rows, Received: it.received, Masked: it.masked}
	c.mu.Lock()
	o.Sent = it.sent
	if it.digest != nil {
		o.Digest = "sha256:" + hex.EncodeToString(it.digest.Sum(nil))
	}
	c.mu.Unlock()
	it.use.Finish(o, string(it.sample))
	it.use = nil
}

// expect appends to the queue. What is in it may be sent afterwards.
func (c *conn) expect(items []*item) (waiting int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == len(c.queue) {
		c.queue, c.first = c.queue[:0], 0
	} else if c.first > maxQueue {
		c.queue, c.first = append(c.queue[:0], c.queue[c.first:]...), 0
	}
	c.queue = append(c.queue, items...)
	return len(c.queue) - c.first
}

// next is the item whose answer comes next, or nil.
func (c *conn) next() *item {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == len(c.queue) {
		return nil
	}
	return c.queue[c.first]
}

// pop takes it, the next item, off the queue.
func (c *conn) pop(it *item, succeeded bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue[c.first] = nil
	c.first++
	it.done = succeeded
	if c.copying == it {
		c.copying = nil
	}
	c.changed.Broadcast()
}

// copied counts data of COPY that went either way.
func (c *conn) copied(it *item, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if it.digest == nil {
		it.digest = sha256.New()
	}
	it.digest.Write(b)
	if it.copies {
		it.sent += int64(len(b))
	}
}
