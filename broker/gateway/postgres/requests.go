package postgres

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/postgres/guard"
	"github.com/countersign-dev/countersign/store"
)

// errBroken is wrapped where the client broke the protocol.
var errBroken = fmt.Errorf("client: %w", errProtocol)

// Bounds of what is held back until it is on record.
const (
	maxBurst     = 256 << 10 // bytes
	maxBurstUses = 100
	maxName      = 63       // bytes of one: PostgreSQL keeps no more (NAMEDATALEN - 1), and takes names that begin alike for one
	maxNames     = 10000    // prepared statements, and portals, of a connection
	smallMessage = 64 << 10 // bytes of what is not counted in Gateway.held
)

// requests is what the goroutine that reads the client keeps. What a client
// sends up to a Sync, or a simple query, is a segment; one begins when the one
// before is answered, so that it is known which of its names are in force.
type requests struct {
	in       *reader
	open     bool // a segment has begun
	failed   bool // it is refused up to its Sync
	prepared map[string]*statement
	portals  map[string]*portal
	changes  []change // to prepared and portals, in this segment
	missing  string   // a statement that nobody has prepared: to bind it fails

	// The burst: what waits to be put on record together, and then sent.
	burst  []byte
	items  []*item
	uses   []gateway.Use
	bytes  int     // of uses
	usesOf []*item // beside uses
	number int     // of the burst
	held   int     // bytes of large messages in it
}

func newRequests(client net.Conn) requests {
	return requests{in: newReader(client, 16<<10), number: 1, prepared: map[string]*statement{}, portals: map[string]*portal{}, missing: "refused by countersign " + store.NewID()}
}

// statement is a prepared one, or one of a simple query.
type statement struct {
	sql   string
	v     guard.Statement
	empty bool     // there is nothing in it
	burst int      // the last burst in which it is executed
	types []uint32 // of its parameters, as far as known; guarded by conn.mu

	// Of the goroutine that reads the target.
	fields []field // of its rows, once described
	last   struct {
		plan    *plan // how they were masked last, for these formats and columns
		formats []int16
		columns []bool
	}
}

// portal is a statement with its parameters, or a cursor.
type portal struct {
	st      *statement
	formats []int16
	values  string // of the parameters, as they are recorded
	cursor  bool
	means   *statement // what the name in an EXECUTE or a FETCH meant when it was bound
}

// change is undone where the target did not do its item.
type change struct {
	it   *item
	undo func()
}

// read serves the client's messages until it hangs up, which is nil.
func (c *conn) read() error {
	for {
		typ, n, err := c.in.header()
		if err != nil {
			if errors.Is(err, errProtocol) {
				return fmt.Errorf("%w: %v", errBroken, err)
			}
			return nil
		}
		if err := c.request(typ, n); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}

// request serves one message. io.EOF is the client's farewell.
func (c *conn) request(typ byte, n int) error {
	switch typ {
	case 'd':
		return c.copyData(n)
	case 'X':
		c.leave()
		return io.EOF
	}
	code, most := "", 0
	switch {
	case n > c.g.MaxMessage:
		code, most = "54000", c.g.MaxMessage
	case n > smallMessage && !c.hold(n):
		code, most = "53200", smallMessage
	}
	if code != "" {
		if err := c.in.skip(n); err != nil {
			return io.EOF
		}
		return c.tooLarge(typ, code, most)
	}
	body, err := c.in.body(n)
	if err != nil {
		return io.EOF
	}
	switch typ {
	case 'c', 'f':
		return c.copyEnd(typ, body)
	case 'S', 'H':
		if c.copies() {
			return nil // PostgreSQL ignores them while COPY takes data
		}
	default:
		if c.copies() {
			return fmt.Errorf("%w: message %q while COPY takes data", errBroken, typ)
		}
	}
	if typ == 'Q' && c.open {
		return fmt.Errorf("%w: a query before Sync", errBroken)
	}
	if typ != 'H' {
		if err := c.begin(); err != nil {
			return err
		}
	}
	if !c.failed && (len(c.uses) >= maxBurstUses || c.bytes > maxBurst || len(c.burst) > maxBurst || len(c.items) >= 1000) { // messages without an end
		if err := c.send(); err != nil {
			return err
		}
	}
	if c.failed && typ != 'S' {
		return nil // as PostgreSQL does until Sync
	}
	switch typ {
	case 'Q':
		return c.query(body)
	case 'P':
		return c.parse(body)
	case 'B':
		return c.bind(body)
	case 'D':
		return c.describe(body)
	case 'E':
		return c.execute(body)
	case 'C':
		return c.closeName(body)
	case 'H':
		c.burst = appendMessage(c.burst, 'H', nil)
		return c.send()
	case 'S':
		return c.sync()
	case 'F':
		return c.refuse("function call", "", "0A000", "the protocol's function call is not supported", true)
	}
	return fmt.Errorf("%w: message %q", errBroken, typ)
}

// leave lets what was sent to its end, as PostgreSQL does for a client that says
// farewell, and says it to the target.
func (c *conn) leave() {
	c.mu.Lock()
	for c.first < len(c.queue) && c.copying == nil && c.cause == nil && !c.open {
		c.changed.Wait()
	}
	c.mu.Unlock()
	_, _ = c.target.Write(appendMessage(nil, 'X', nil))
}

// begin waits until all that came before this segment is answered, and then
// makes the names what the target has.
func (c *conn) begin() error {
	if c.open {
		return nil
	}
	c.mu.Lock()
	for c.first < len(c.queue) && c.cause == nil {
		c.changed.Wait()
	}
	cause, tx := c.cause, c.tx
	c.mu.Unlock()
	if cause != nil {
		return cause
	}
	for i := len(c.changes) - 1; i >= 0; i-- {
		if !c.changes[i].it.done {
			c.changes[i].undo()
		}
	}
	clear(c.changes)
	c.changes = c.changes[:0]
	if tx == 'I' { // portals end with their transaction, but for some cursors
		for name, p := range c.portals {
			if !p.cursor {
				delete(c.portals, name)
			}
		}
	}
	c.open = true
	return nil
}

// query serves a simple query.
func (c *conn) query(body []byte) error {
	sql, rest, ok := cstring(body)
	if !ok || len(rest) > 0 {
		return fmt.Errorf("%w: a query without end", errBroken)
	}
	v, err := c.check(sql, true)
	if v == nil {
		return err
	}
	if len(v.Statements) == 0 {
		it := &item{kind: running, st: &statement{sql: sql, empty: true}}
		c.use(it, sql)
	}
	for i := range v.Statements {
		st := &statement{sql: sql, v: v.Statements[i]}
		it := &item{kind: running, st: st}
		if code, reason := c.resolve(it, st); code != "" {
			c.drop()
			return c.refuse(st.v.Use, sql, code, reason, true)
		}
		text := sql
		if i > 0 { // the whole is sealed with the first
			text = fmt.Sprintf("-- statement %d of %d of the query before", i+1, len(v.Statements))
		}
		c.use(it, text)
		c.effects(it, st)
	}
	if err := c.record(); err != nil {
		return err
	}
	if !c.failed {
		c.burst = appendMessage(c.burst, 'Q', body)
		c.items = append(c.items, &item{kind: syncing})
		return c.ended()
	}
	return c.sync()
}

// check asks the guard. A nil verdict is refused already.
func (c *conn) check(sql string, simple bool) (*guard.Verdict, error) {
	switch {
	case len(sql) > gateway.MaxStatement:
		return nil, c.refuse("a statement that is too long", sql, "54000", fmt.Sprintf("a statement of more than %d bytes cannot be put on record", gateway.MaxStatement), simple)
	case !utf8.ValidString(sql):
		return nil, c.refuse("a statement that is not UTF-8", sql, "22021", "the statement is not UTF-8", simple)
	}
	v := c.rules.guard.Check(sql)
	if v.Refused != "" {
		use := "a statement that was not understood"
		if len(v.Statements) > 0 {
			use = v.Statements[0].Use
		}
		code := v.SQLState
		if code == "" {
			code = "42501"
		}
		return nil, c.refuse(use, sql, code, v.Refused, simple)
	}
	for _, st := range v.Statements {
		// COPY sends rows as text: what looks into values has no place in it.
		if st.Copy == "out" && c.rules.rows {
			return nil, c.refuse(st.Use, sql, "0A000", "COPY TO is not supported where values are looked into", simple)
		}
	}
	return v, nil
}

// resolve says which columns of it are hidden, where that depends on another
// statement's name. Whatever the guard made of a name, what it stands for in
// this connection decides.
func (c *conn) resolve(it *item, st *statement) (code, reason string) {
	v := &st.v
	it.columns, it.tainted, it.copies, it.copiesTo = v.Columns, v.Tainted, v.Copy == "in", v.Copy == "out"
	switch {
	case v.Execute != "":
		p := c.prepared[v.Execute]
		if p == nil {
			return "26000", "no statement of that name was prepared in this connection"
		}
		if p.v.Execute != "" || p.v.Fetch != "" {
			return "0A000", "a prepared EXECUTE or FETCH is not executed by name"
		}
		it.columns, it.tainted = p.v.Columns, p.v.Tainted
	case v.Fetch != "":
		p := c.portals[v.Fetch]
		if p == nil {
			return "34000", "no cursor of that name was declared in this connection"
		}
		if p.st.v.Execute != "" || p.st.v.Fetch != "" {
			return "0A000", "a portal of EXECUTE or FETCH is not fetched from by name"
		}
		it.columns, it.tainted = p.st.v.Columns, p.st.v.Tainted
	case v.Prepare != "", v.Declare != "":
		it.columns = nil // it returns no rows itself
	}
	if (v.Prepare != "" || v.Declare != "") && len(c.prepared)+len(c.portals) >= maxNames {
		return "54000", "too many prepared statements and cursors"
	}
	return "", ""
}

// meaning is what the name in an EXECUTE or a FETCH stands for now, nil where
// that is nothing, or st is neither.
func (c *conn) meaning(st *statement) *statement {
	switch {
	case st.v.Execute != "":
		return c.prepared[st.v.Execute]
	case st.v.Fetch != "":
		if p := c.portals[st.v.Fetch]; p != nil {
			return p.st
		}
	}
	return nil
}

// effects changes the names as st will.
func (c *conn) effects(it *item, st *statement) {
	v := &st.v
	if v.Prepare != "" {
		inner := &statement{sql: st.sql, v: *v}
		inner.v.Prepare = ""
		set(c, it, c.prepared, v.Prepare, inner)
	}
	if v.Declare != "" {
		inner := &statement{sql: st.sql, v: *v}
		inner.v.Declare = ""
		set(c, it, c.portals, v.Declare, &portal{st: inner, cursor: true})
	}
	if v.Deallocate != "" {
		remove(c, it, c.prepared, v.Deallocate)
	}
	if v.CloseCursor != "" {
		remove(c, it, c.portals, v.CloseCursor)
	}
}

// set and remove change a name, for good once the target did.
func set[T any](c *conn, it *item, m map[string]*T, name string, to *T) {
	was := m[name]
	m[name] = to
	c.changes = append(c.changes, change{it, func() {
		if was == nil {
			delete(m, name)
		} else {
			m[name] = was
		}
	}})
}

func remove[T any](c *conn, it *item, m map[string]*T, name string) {
	if name != "*" {
		removeOne(c, it, m, name)
		return
	}
	for each := range m {
		if each != "" { // which SQL does not see
			removeOne(c, it, m, each)
		}
	}
}

func (c *conn) parse(body []byte) error {
	var msg pgproto3.Parse
	if err := msg.Decode(body); err != nil {
		return fmt.Errorf("%w: %v", errBroken, err)
	}
	v, err := c.check(msg.Query, false)
	if v == nil {
		return err
	}
	if len(v.Statements) > 1 {
		return c.refuse(v.Statements[0].Use, msg.Query, "42601", "several statements in one prepared statement", false)
	}
	if len(msg.Name) > maxName {
		return c.fail("42622", "a name of more than 63 bytes", false)
	}
	if len(c.prepared) >= maxNames && c.prepared[msg.Name] == nil {
		return c.fail("54000", "too many prepared statements", false)
	}
	st := &statement{sql: msg.Query, empty: len(v.Statements) == 0, types: msg.ParameterOIDs}
	if !st.empty {
		st.v = v.Statements[0]
	}
	it := &item{kind: parsing, extended: true, st: st, tainted: st.v.Tainted}
	c.use(it, st.sql)
	c.burst = appendMessage(c.burst, 'P', body)
	set(c, it, c.prepared, msg.Name, st)
	if c.rules.masker != nil || hidesAny(st.v.Columns) || st.v.Execute != "" || st.v.Fetch != "" {
		// Rows are masked by the types of their columns, whether the client asks for
		// them or not.
		c.forward('D', append(append([]byte{'S'}, msg.Name...), 0), &item{kind: describing, extended: true, silent: true, st: st, tainted: st.v.Tainted})
	}
	return nil
}

func hidesAny(columns []bool) bool { return slices.Contains(columns, true) }

func (c *conn) bind(body []byte) error {
	var msg pgproto3.Bind
	if err := msg.Decode(body); err != nil {
		return fmt.Errorf("%w: %v", errBroken, err)
	}
	st := c.prepared[msg.PreparedStatement]
	if st == nil {
		return c.fail("26000", "no such prepared statement", false)
	}
	if len(msg.DestinationPortal) > maxName {
		return c.fail("42622", "a name of more than 63 bytes", false)
	}
	if len(c.portals) >= maxNames && c.portals[msg.DestinationPortal] == nil {
		return c.fail("54000", "too many portals", false)
	}
	c.mu.Lock()
	types := st.types
	c.mu.Unlock()
	values, ok := recordedValues(&msg, types)
	if !ok {
		return fmt.Errorf("%w: parameter formats", errBroken)
	}
	for _, f := range msg.ResultFormatCodes {
		if f != 0 && f != 1 {
			return fmt.Errorf("%w: a result format", errBroken)
		}
	}
	it := &item{kind: binding, extended: true, st: st, tainted: st.v.Tainted}
	c.forward('B', body, it)
	set(c, it, c.portals, msg.DestinationPortal, &portal{st: st, formats: msg.ResultFormatCodes, values: values, means: c.meaning(st)})
	return nil
}

func (c *conn) describe(body []byte) error {
	what, name, err := named(body)
	if err != nil {
		return err
	}
	var st *statement
	if what == 'S' {
		st = c.prepared[name]
	} else if p := c.portals[name]; p != nil {
		st = p.st
	}
	if st == nil {
		return c.fail(unknown(what))
	}
	c.forward('D', body, &item{kind: describing, extended: true, st: st, tainted: st.v.Tainted})
	return nil
}

func (c *conn) execute(body []byte) error {
	name, rest, ok := cstring(body)
	if !ok || len(rest) != 4 {
		return fmt.Errorf("%w: Execute", errBroken)
	}
	p := c.portals[name]
	if p == nil {
		return c.fail(unknown('P'))
	}
	it := &item{kind: executing, extended: true, st: p.st, formats: p.formats}
	if code, reason := c.resolve(it, p.st); code != "" {
		return c.refuse(p.st.v.Use, p.st.sql+p.values, code, reason, false)
	}
	if c.meaning(p.st) != p.means {
		// The target may have begun with the other, and go on with its rows.
		return c.refuse(p.st.v.Use, p.st.sql+p.values, "55000", "the name means another statement since it was bound", false)
	}
	if p.means != nil {
		// The types are those of what the name meant at Bind, which may be others than
		// when this was prepared.
		c.forward('D', append(append([]byte{'P'}, name...), 0), &item{kind: describing, extended: true, silent: true, st: p.st, tainted: it.tainted})
	}
	if text := p.st.sql + p.values; len(text) <= gateway.MaxStatement {
		c.use(it, text)
	} else {
		return c.refuse("a statement that is too long", text, "54000", fmt.Sprintf("a statement and parameters of more than %d bytes cannot be put on record", gateway.MaxStatement), false)
	}
	c.burst = appendMessage(c.burst, 'E', body)
	c.effects(it, p.st)
	if it.copies {
		return c.send() // it takes data before any Sync
	}
	return nil
}

func (c *conn) closeName(body []byte) error {
	what, name, err := named(body)
	if err != nil {
		return err
	}
	if len(name) > maxName {
		return c.fail("42622", "a name of more than 63 bytes", false)
	}
	it := &item{kind: closing, extended: true}
	c.forward('C', body, it)
	if what == 'S' {
		removeOne(c, it, c.prepared, name)
	} else {
		removeOne(c, it, c.portals, name)
	}
	return nil
}

// removeOne is remove for a name that is none of SQL's: "*" is a name too.
func removeOne[T any](c *conn, it *item, m map[string]*T, name string) {
	if was := m[name]; was != nil {
		delete(m, name)
		c.changes = append(c.changes, change{it, func() { m[name] = was }})
	}
}

// named reads the body of Describe and Close: S or P, and a name.
func named(body []byte) (what byte, name string, err error) {
	if len(body) < 2 || body[0] != 'S' && body[0] != 'P' {
		return 0, "", fmt.Errorf("%w: neither statement nor portal", errBroken)
	}
	name, rest, ok := cstring(body[1:])
	if !ok || len(rest) > 0 {
		return 0, "", fmt.Errorf("%w: a name without end", errBroken)
	}
	return body[0], name, nil
}

func unknown(what byte) (code, message string, simple bool) {
	if what == 'S' {
		return "26000", "no such prepared statement", false
	}
	return "34000", "no such portal", false
}

func (c *conn) sync() error {
	if err := c.record(); err != nil {
		return err
	}
	c.burst = appendMessage(c.burst, 'S', nil)
	c.items = append(c.items, &item{kind: syncing, extended: true})
	return c.ended()
}

// ended sends the segment's rest.
func (c *conn) ended() error {
	c.open, c.failed = false, false
	return c.flush()
}

// forward holds a message back with the answer that it will have.
func (c *conn) forward(typ byte, body []byte, it *item) {
	c.burst = appendMessage(c.burst, typ, body)
	c.items = append(c.items, it)
}

// use has it put on record, as text, before it is sent.
func (c *conn) use(it *item, text string) {
	line := it.st.v.Use
	if line == "" {
		line = "an empty statement"
	}
	if it.kind == parsing {
		line = "prepare " + line
	} else {
		it.st.burst = c.number
	}
	c.uses = append(c.uses, gateway.Use{Use: line, Conn: c.id, Objects: it.st.v.Tables, Statement: text})
	c.usesOf = append(c.usesOf, it)
	c.items = append(c.items, it)
	c.bytes += len(text)
}

// record puts the burst's uses on record. Where that cannot be, the burst is
// dropped, and the client is told why.
func (c *conn) record() error {
	// What is prepared and executed in one burst is one use. A statement that is
	// only prepared reaches the target too.
	n := 0
	for i, it := range c.usesOf {
		if it.kind != parsing || it.st.burst != c.number {
			c.uses[n], c.usesOf[n] = c.uses[i], it
			n++
		}
	}
	c.uses, c.usesOf = c.uses[:n], c.usesOf[:n]
	if n == 0 {
		c.recorded()
		return nil
	}
	pending, err := c.session.Use(c.ctx, c.uses...)
	if err == nil {
		for i, it := range c.usesOf {
			it.use = pending[i]
		}
		c.recorded()
		return nil
	}
	c.drop()
	switch {
	case errors.Is(err, gateway.ErrEnded):
		return errEnded
	case errors.Is(err, gateway.ErrTooLarge):
		return c.fail("54000", "the statement is too long to be put on record; nothing was sent to the target", false)
	case errors.Is(err, store.ErrMalformed):
		return c.fail("22021", "the statement cannot be put on record: it is not UTF-8, or holds U+0000; nothing was sent to the target", false)
	}
	c.g.Log.Warn("a use could not be recorded", zap.String("request", c.session.Story.Request), zap.Error(err))
	return c.fail("58030", "the record cannot be written; nothing was sent to the target", false)
}

// drop forgets the burst, which the target never sees.
func (c *conn) drop() {
	c.burst, c.items = c.burst[:0], c.items[:0]
	c.recorded()
}

func (c *conn) recorded() {
	clear(c.uses)
	clear(c.usesOf)
	c.uses, c.usesOf, c.bytes, c.number = c.uses[:0], c.usesOf[:0], 0, c.number+1
}

// send puts the burst on record and sends it.
func (c *conn) send() error {
	if err := c.record(); err != nil {
		return err
	}
	return c.flush()
}

// flush sends what is on record.
func (c *conn) flush() error {
	waiting := c.expect(c.items)
	if len(c.changes) > 2*maxNames {
		c.mu.Lock()
		c.changes = slices.DeleteFunc(c.changes, func(ch change) bool { return ch.it.done })
		c.mu.Unlock()
	}
	clear(c.items)
	c.items = c.items[:0]
	if waiting > maxQueue && c.open {
		c.burst = appendMessage(c.burst, 'H', nil) // so that answers come
	}
	_, err := c.target.Write(c.burst)
	if cap(c.burst) > maxBurst {
		c.burst = nil
	}
	c.burst = c.burst[:0]
	c.letGo()
	if err != nil {
		return errTarget
	}
	if waiting > maxQueue && c.open {
		c.mu.Lock()
		defer c.mu.Unlock()
		for len(c.queue)-c.first > maxQueue/2 && c.cause == nil {
			c.changed.Wait()
		}
	}
	return nil
}

// fail makes the segment fail, from here to its end: at the target by a message
// that always does, and with these words for the client.
func (c *conn) fail(code, message string, simple bool) error {
	msg := &pgproto3.Bind{PreparedStatement: c.missing}
	c.burst = encode(c.burst, msg)
	c.items = append(c.items, &item{kind: failing, extended: true, fail: refusal("ERROR", code, message)})
	c.failed = true
	if simple {
		return c.sync()
	}
	return nil
}

// refuse puts on record what the guard did not let through, and then fails.
func (c *conn) refuse(use, text, code, reason string, simple bool) error {
	if err := c.record(); err != nil {
		return err
	}
	if c.failed { // what came before it could not be recorded: it is skipped
		if simple {
			return c.sync()
		}
		return nil
	}
	err := c.session.Refuse(c.ctx, gateway.Refusal{Use: use, Conn: c.id, Statement: text, Reason: reason, Remote: address(c.client)})
	if err != nil {
		if c.session.Context().Err() != nil {
			return errEnded
		}
		c.g.Log.Warn("a refusal could not be recorded", zap.String("request", c.session.Story.Request), zap.Error(err))
		return c.fail("58030", "refused, and the record cannot be written", simple)
	}
	return c.fail(code, reason, simple)
}

// tooLarge answers a message that was not even read.
func (c *conn) tooLarge(typ byte, code string, most int) error {
	if c.copies() {
		return fmt.Errorf("%w: message %q while COPY takes data", errBroken, typ)
	}
	if typ == 'Q' && c.open {
		return fmt.Errorf("%w: a query before Sync", errBroken)
	}
	if err := c.begin(); err != nil {
		return err
	}
	if c.failed {
		return nil
	}
	text := fmt.Sprintf("a message of more than %d bytes", most)
	switch typ {
	case 'Q':
		return c.refuse("a message that is too long", text, code, text+" is not taken now", true)
	case 'P', 'B':
		return c.refuse("a message that is too long", text, code, text+" is not taken now", false)
	}
	return fmt.Errorf("%w: message %q of more than %d bytes", errBroken, typ, most)
}

// hold counts a large message among those that all connections hold together,
// where there is room for it.
func (c *conn) hold(n int) bool {
	if c.g.held.Add(int64(n)) > int64(c.g.MaxHeld) {
		c.g.held.Add(-int64(n))
		return false
	}
	c.held += n
	return true
}

// letGo gives back what the messages that were sent or dropped took.
func (c *conn) letGo() {
	c.g.held.Add(-int64(c.held))
	c.held = 0
}

// copies reports whether a COPY takes the client's data.
func (c *conn) copies() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.copying != nil
}

// copier is the COPY that takes the client's data. It waits for one that is on
// its way to the target, and returns nil where there is none.
func (c *conn) copier() *item {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.copying == nil && c.cause == nil {
		due := false
		for _, it := range c.queue[c.first:] {
			due = due || it.copies
		}
		if !due {
			break
		}
		c.changed.Wait()
	}
	return c.copying
}

// copyData passes COPY's data on as it arrives, in messages of any size.
func (c *conn) copyData(n int) error {
	it := c.copier()
	if it == nil { // PostgreSQL ignores it, such as after an error
		if c.in.skip(n) != nil {
			return io.EOF
		}
		return nil
	}
	for n > 0 {
		if c.in.Buffered() == 0 {
			if err := c.flushCopy(); err != nil {
				return err
			}
			if _, err := c.in.Peek(1); err != nil {
				return io.EOF
			}
		}
		b, _ := c.in.Peek(min(n, c.in.Buffered()))
		c.copied(it, b)
		c.burst = appendMessage(c.burst, 'd', b)
		n -= len(b)
		_, _ = c.in.Discard(len(b))
		if len(c.burst) > 32<<10 {
			if err := c.flushCopy(); err != nil {
				return err
			}
		}
	}
	if c.in.Buffered() == 0 {
		return c.flushCopy()
	}
	return nil
}

func (c *conn) flushCopy() error {
	if len(c.burst) == 0 {
		return nil
	}
	_, err := c.target.Write(c.burst)
	c.burst = c.burst[:0]
	if err != nil {
		return errTarget
	}
	return nil
}

// copyEnd passes CopyDone and CopyFail on.
func (c *conn) copyEnd(typ byte, body []byte) error {
	it := c.copier()
	if it == nil {
		return nil
	}
	c.mu.Lock()
	if c.copying == it {
		c.copying = nil
	}
	c.mu.Unlock()
	c.open = c.open || it.extended // the target ignored the Sync that ended it
	c.burst = appendMessage(c.burst, typ, body)
	return c.flushCopy()
}
