package postgres

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

// wire is a client that speaks the protocol message by message.
type wire struct {
	net.Conn
	*pgproto3.Frontend
	t testing.TB
}

func (p *path) wire() *wire {
	p.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	w := &wire{c, pgproto3.NewFrontend(c, c), p.t}
	w.send(&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion30, Parameters: map[string]string{"user": "x", "database": "postgres"}}, &pgproto3.PasswordMessage{Password: p.token})
	w.until('Z')
	return w
}

func (w *wire) send(msgs ...pgproto3.FrontendMessage) {
	w.t.Helper()
	for _, m := range msgs {
		w.Send(m)
	}
	if err := w.Flush(); err != nil {
		w.t.Fatal(err)
	}
}

// until reads up to a message of the type, and tells what came: types, and
// SQLSTATEs of errors.
func (w *wire) until(typ byte) string {
	w.t.Helper()
	var got []string
	for {
		m, err := w.Receive()
		if err != nil {
			w.t.Fatalf("after %v: %v", got, err)
		}
		b, err := m.Encode(nil)
		if err != nil {
			w.t.Fatal(err)
		}
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			got = append(got, "E"+m.Code)
		case *pgproto3.ReadyForQuery:
			got = append(got, "Z"+string(m.TxStatus))
		case *pgproto3.ParameterStatus:
		case *pgproto3.DataRow:
			got = append(got, "D"+string(bytes.Join(m.Values, []byte(","))))
		default:
			got = append(got, string(b[0]))
		}
		if b[0] == typ {
			return strings.Join(got, " ")
		}
	}
}

func TestANameIsWhatTheTargetHasUnderItWhateverWasSkippedAfterAnError(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	run := func(name string) []pgproto3.FrontendMessage {
		return []pgproto3.FrontendMessage{&pgproto3.Bind{PreparedStatement: name}, &pgproto3.Execute{}}
	}
	for _, name := range []string{"s", ""} {
		w.send(&pgproto3.Parse{Name: name, Query: "select 'first'"}, &pgproto3.Sync{})
		if got := w.until('Z'); got != "1 ZI" {
			t.Fatal(got)
		}
		// The target skips what follows the error: s is still the first.
		w.send(append(append([]pgproto3.FrontendMessage{&pgproto3.Parse{Name: "bad", Query: "select nothing_there"},
			&pgproto3.Close{ObjectType: 'S', Name: name}, &pgproto3.Parse{Name: name, Query: "select 'second'"}}, run(name)...), &pgproto3.Sync{})...)
		if got := w.until('Z'); got != "E42703 ZI" {
			t.Fatal(got)
		}
		w.send(append(run(name), &pgproto3.Sync{})...)
		if got := w.until('Z'); got != "2 Dfirst C ZI" {
			t.Fatal(got)
		}
		if uses := p.uses(); !strings.Contains(uses[len(uses)-1].Statement, "first") {
			t.Errorf("what ran is %q by the record", uses[len(uses)-1].Statement)
		}
	}
	w.send(&pgproto3.Bind{PreparedStatement: "nobody's"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	if got := w.until('Z'); got != "E26000 ZI" {
		t.Error(got)
	}
	w.send(&pgproto3.Execute{Portal: "nobody's"}, &pgproto3.Sync{})
	if got := w.until('Z'); got != "E34000 ZI" {
		t.Error(got)
	}
}

func TestPortalsAreResumedAndEachExecuteIsAUse(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	w.send(&pgproto3.Parse{Query: "select id from orders order by id limit 3"}, &pgproto3.Bind{DestinationPortal: "p"},
		&pgproto3.Execute{Portal: "p", MaxRows: 2}, &pgproto3.Flush{})
	if got := w.until('s'); got != "1 2 D1 D2 s" {
		t.Fatal(got)
	}
	w.send(&pgproto3.Execute{Portal: "p"}, &pgproto3.Sync{})
	if got := w.until('Z'); got != "D3 C ZI" {
		t.Fatal(got)
	}
	uses := p.uses()
	gatewaytest.Until(t, "outcomes", func() bool { return len(p.record.Outcomes()) == 2 })
	if len(uses) != 2 || p.record.Outcomes()[uses[0].ID].Status != "suspended" || p.record.Outcomes()[uses[1].ID].Rows != 1 {
		t.Errorf("%+v %+v", uses, p.record.Outcomes())
	}
}

func TestAPipelineOfThousandsOfMessagesIsBoundedAndAnsweredInOrder(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	const n = 8000
	go func() {
		for i := range n {
			w.Send(&pgproto3.Parse{Query: fmt.Sprintf("select %d", i)})
			w.Send(&pgproto3.Bind{})
			w.Send(&pgproto3.Execute{})
			if i%500 == 0 {
				_ = w.Flush()
			}
		}
		w.Send(&pgproto3.Sync{})
		_ = w.Flush()
	}()
	got := strings.Fields(w.until('Z'))
	if len(got) != 4*n+1 {
		t.Fatalf("%d answers", len(got))
	}
	for i := range n {
		if got[4*i+2] != fmt.Sprintf("D%d", i) {
			t.Fatalf("answer %d is %s", i, got[4*i+2])
		}
	}
	if uses := p.uses(); len(uses) != n || uses[n-1].Statement != fmt.Sprintf("select %d", n-1) {
		t.Errorf("%d uses", len(uses))
	}
}

func TestCopyInTheExtendedProtocolIgnoresTheSyncBeforeItsData(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	for range 2 {
		w.send(&pgproto3.Parse{Query: "copy lines from stdin"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
		if got := w.until('G'); got != "1 2 G" {
			t.Fatal(got)
		}
		w.send(&pgproto3.CopyData{Data: []byte("a\nb")}, &pgproto3.CopyData{Data: []byte("c\n")}, &pgproto3.CopyDone{}, &pgproto3.Sync{})
		if got := w.until('Z'); got != "C ZI" {
			t.Fatal(got)
		}
	}
	w.send(&pgproto3.Query{String: "copy lines from stdin"})
	w.until('G')
	w.send(&pgproto3.CopyFail{Message: "never mind"})
	if got := w.until('Z'); got != "E57014 ZI" {
		t.Fatal(got)
	}
	w.send(&pgproto3.CopyData{Data: []byte("stray")}, &pgproto3.CopyDone{}, &pgproto3.Query{String: "select count(*) from lines"})
	if got := w.until('Z'); got != "T D4 C ZI" {
		t.Fatal(got)
	}
}

func TestFunctionCallsAreRefusedAndTheConnectionStaysUsable(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	w.send(&pgproto3.FunctionCall{Function: 1598})
	if got := w.until('Z'); got != "E0A000 ZI" {
		t.Fatal(got)
	}
	w.send(&pgproto3.Query{String: "select 1"})
	if got := w.until('Z'); got != "T D1 C ZI" {
		t.Fatal(got)
	}
}

func TestANewerProtocolIsNegotiatedDown(t *testing.T) {
	p := serve(t, everything())
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := pgproto3.NewFrontend(c, c)
	f.Send(&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion32, Parameters: map[string]string{"user": "x", "_pq_.fancy": "on"}})
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	m, err := f.Receive()
	if v, ok := m.(*pgproto3.NegotiateProtocolVersion); err != nil || !ok || v.NewestMinorProtocol != 0 || fmt.Sprint(v.UnrecognizedOptions) != "[_pq_.fancy]" {
		t.Fatalf("%#v, %v", m, err)
	}
}

func TestWhatIsNoProtocolIsCutBeforeAndAfterLogIn(t *testing.T) {
	p := serve(t, everything(), func(c *Config) { c.Handshake = 300 * time.Millisecond })
	for name, sent := range map[string]string{
		"nothing at all":      "",
		"HTTP":                "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"a length of zero":    "\x00\x00\x00\x00",
		"a huge startup":      "\x7f\xff\xff\xff\x00\x03\x00\x00",
		"version 2":           "\x00\x00\x00\x09\x00\x02\x00\x00\x00",
		"half a startup":      "\x00\x00\x00\x20\x00\x03\x00\x00user\x00",
		"no end":              "\x00\x00\x00\x10\x00\x03\x00\x00user\x00xyz",
		"a huge password":     startupBytes() + "p\x00\x10\x00\x00",
		"no password":         startupBytes() + "Q\x00\x00\x00\x0eselect 1;\x00",
		"encryption twice":    "\x00\x00\x00\x08\x04\xd2\x16\x2f\x00\x00\x00\x08\x04\xd2\x16\x2f",
		"a short cancel":      "\x00\x00\x00\x0a\x04\xd2\x16\x2e\x00\x00",
		"a cancel of nothing": "\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01\x00\x00\x00\x01",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.WriteString(c, sent); err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(c)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatalf("it is not cut: %q", b)
			}
			if bytes.Contains(b, []byte("R\x00\x00\x00\x08\x00\x00\x00\x00")) {
				t.Errorf("let in: %q", b)
			}
		})
	}
	t.Run("after log-in", func(t *testing.T) {
		p := serve(t, everything())
		for name, sent := range map[string]string{
			"an unknown message":         "?\x00\x00\x00\x04",
			"a length below its own":     "Q\x00\x00\x00\x03",
			"a length beyond all":        "Q\xff\xff\xff\xff",
			"a query without end":        "Q\x00\x00\x00\x08abcd",
			"two texts in one query":     "Q\x00\x00\x00\x08a\x00b\x00",
			"a bind without parameters":  "B\x00\x00\x00\x06\x00\x00",
			"a describe of nothing":      "D\x00\x00\x00\x06X\x00",
			"an execute without count":   "E\x00\x00\x00\x05\x00",
			"a close without name":       "C\x00\x00\x00\x05S",
			"a query within a pipeline":  "P\x00\x00\x00\x08\x00\x00\x00\x00Q\x00\x00\x00\x05\x00",
			"a password out of turn":     "p\x00\x00\x00\x05\x00",
			"17 MiB that is not a query": "E\x01\x10\x00\x04" + strings.Repeat("\x00", 17<<20),
		} {
			w := p.wire()
			go func() { _, _ = io.WriteString(w.Conn, sent) }()
			m, err := w.Receive()
			if e, ok := m.(*pgproto3.ErrorResponse); err != nil || !ok || e.Code != "08P01" {
				t.Errorf("%s: %#v, %v", name, m, err)
			}
			if _, err := w.Receive(); err == nil {
				t.Errorf("%s: not cut", name)
			}
		}
	})
}

func startupBytes() string {
	b, _ := (&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion30, Parameters: map[string]string{"user": "x"}}).Encode(nil)
	return string(b)
}

func TestAClientThatHangsUpEndsItsQueryAtTheTarget(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	w.send(&pgproto3.Query{String: "select pg_sleep(60)"})
	gatewaytest.Until(t, "the use on record", func() bool { return len(p.uses()) == 1 })
	_ = w.Close()
	gatewaytest.Until(t, "its outcome", func() bool { return len(p.record.Outcomes()) == 1 })
	if o := p.record.Outcomes()[p.uses()[0].ID]; o.Error != store.UseClient {
		t.Errorf("%+v", o)
	}
}

func TestASlowClientIsHeldUpAndCutWithItsSession(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	w.send(&pgproto3.Query{String: "select repeat('x', 1000) from generate_series(1, 100000)"}) // 100 MB that it does not read
	gatewaytest.Until(t, "the use on record", func() bool { return len(p.uses()) == 1 })
	p.tap.mu.Lock()
	p.tap.answered.Reset()
	p.tap.mu.Unlock()
	last := -1
	gatewaytest.Until(t, "the target to be held up", func() bool {
		p.tap.mu.Lock()
		defer p.tap.mu.Unlock()
		n := p.tap.answered.Len()
		defer func() { last = n }()
		return n == last
	})
	if last > 64<<20 {
		t.Errorf("%d bytes were taken from the target for a client that reads none", last)
	}
	began := time.Now()
	p.session.Close()
	gatewaytest.Until(t, "its outcome", func() bool { return len(p.record.Outcomes()) == 1 })
	if d := time.Since(began); d > time.Second {
		t.Errorf("cut after %s", d)
	}
}

// script is a target that logs everybody in and then answers as it is told.
func script(t testing.TB, answer func(c net.Conn, typ byte, body []byte) bool) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := readStartup(c); err != nil {
					return
				}
				hello := encode(nil, &pgproto3.AuthenticationOk{})
				hello = encode(hello, &pgproto3.ParameterStatus{Name: "client_encoding", Value: "UTF8"})
				hello = encode(hello, &pgproto3.BackendKeyData{ProcessID: 1, SecretKey: []byte{1, 2, 3, 4}})
				hello = encode(hello, &pgproto3.ReadyForQuery{TxStatus: 'I'})
				if _, err := c.Write(hello); err != nil {
					return
				}
				for {
					var h [5]byte
					if _, err := io.ReadFull(c, h[:]); err != nil {
						return
					}
					body := make([]byte, binary.BigEndian.Uint32(h[1:])-4)
					if _, err := io.ReadFull(c, body); err != nil || !answer(c, h[0], body) {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// judged gives the session the rules of the real target, so that a scripted one
// need not tell of its catalog.
func (p *path) judged() *rules {
	p.t.Helper()
	pg, err := pgconn.Connect(context.Background(), server.DSN)
	if err != nil {
		p.t.Fatal(err)
	}
	defer pg.Close(context.Background())
	r := &rules{}
	if err := r.load(context.Background(), p.session, querier{pg}); err != nil {
		p.t.Fatal(err)
	}
	p.gw.mu.Lock()
	p.gw.rules[p.session] = r
	p.gw.mu.Unlock()
	return r
}

func TestTheLogQuotesNothingOfATargetThatRefuses(t *testing.T) {
	const canary = "canary@example.com"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	said := make(chan pgproto3.ErrorResponse, 2)
	said <- pgproto3.ErrorResponse{Severity: "FATAL", Code: "28000", Message: canary, Detail: canary, Hint: canary}
	said <- pgproto3.ErrorResponse{Severity: "FATAL", Code: canary, Message: "no"}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := readStartup(c); err == nil {
				e := <-said
				_, _ = c.Write(encode(nil, &e))
			}
			_ = c.Close()
		}
	}()
	core, logs := observer.New(zap.DebugLevel)
	p := serveTo(t, everything(), l.Addr().String(), func(c *Config) { c.Log = zap.New(core) })
	for _, want := range []string{"28000", "unknown"} {
		_, err := pgconn.Connect(t.Context(), p.dsn(""))
		if err == nil || strings.Contains(err.Error(), "canary") || !strings.Contains(err.Error(), want) {
			t.Errorf("the client is told %v", err)
		}
	}
	if logs.FilterMessage("a target could not be logged in at").Len() != 2 {
		t.Errorf("logged: %v", logs.All())
	}
	for _, line := range logs.All() {
		if strings.Contains(fmt.Sprint(line.Message, line.ContextMap()), "canary") {
			t.Errorf("logged: %s %v", line.Message, line.ContextMap())
		}
	}
}

func TestATargetThatLiesIsCutAndNothingOfItsAnswerPassesUnmasked(t *testing.T) {
	const canary = "canary@example.com"
	describe := encode(nil, &pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("id"), DataTypeOID: 23}, {Name: []byte("email"), DataTypeOID: 25}}})
	row := func(values ...string) []byte {
		d := &pgproto3.DataRow{}
		for _, v := range values {
			d.Values = append(d.Values, []byte(v))
		}
		return encode(nil, d)
	}
	tag := encode(nil, &pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
	ready := encode(nil, &pgproto3.ReadyForQuery{TxStatus: 'I'})
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	short := row("1", canary)
	binary.BigEndian.PutUint32(short[1:], uint32(len(short)-1-10)) // the row ends within a value
	long := row("1", canary)
	binary.BigEndian.PutUint32(long[1:], 1<<31)
	tiny := row("1", canary)
	binary.BigEndian.PutUint32(tiny[1:], 3)
	for name, answer := range map[string][]byte{
		"a row without description": join(row("1", canary), tag, ready),
		"more values than columns":  join(describe, row("1", "x", canary), tag, ready),
		"fewer values than columns": join(describe, row(canary), tag, ready),
		"a description of one more": join(encode(nil, &pgproto3.RowDescription{Fields: make([]pgproto3.FieldDescription, 3)}), row("1", "2", canary), tag, ready),
		"a second description":      join(describe, encode(nil, &pgproto3.RowDescription{Fields: make([]pgproto3.FieldDescription, 2)}), row(canary, canary), tag, ready),
		"a row cut short":           join(describe, short, tag, ready),
		"a row of 2 GiB":            join(describe, long),
		"a row of 3 bytes":          join(describe, tiny),
		"a row that never ends":     join(describe, row("1", canary)[:20]),
		"COPY instead of rows":      join([]byte("H\x00\x00\x00\x07\x00\x00\x00d\x00\x00\x00\x16"), []byte(canary)),
		"a second result":           join(describe, row("1", "x"), tag, describe, row(canary, canary), tag, ready),
		"ready before the result":   join(ready, describe, row(canary, canary), tag, ready),
		"a row after all":           join(describe, row("1", canary), tag, ready, row("1", canary)),
		"copy both":                 []byte("W\x00\x00\x00\x07\x00\x00\x00"),
		"an error without end":      []byte("E\x00\x00\x00\x0aSERROR"),
		"another encoding":          encode(nil, &pgproto3.ParameterStatus{Name: "client_encoding", Value: "SJIS"}),
		"other strings":             encode(nil, &pgproto3.ParameterStatus{Name: "standard_conforming_strings", Value: "off"}),
		"an authentication":         encode(nil, &pgproto3.AuthenticationCleartextPassword{}),
		"fatal words":               join(describe, row("1", canary), encode(nil, &pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P01", Message: canary, Detail: canary})),
		"a notice":                  join(encode(nil, &pgproto3.NoticeResponse{Severity: "NOTICE", Code: "00000", Message: canary, Hint: canary}), []byte("?\x00\x00\x00\x04")),
		"a payload":                 join(encode(nil, &pgproto3.NotificationResponse{PID: 1, Channel: canary, Payload: canary}), []byte("?\x00\x00\x00\x04")),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := script(t, func(c net.Conn, typ byte, _ []byte) bool {
				if typ == 'Q' {
					_, _ = c.Write(answer)
					if name == "a row that never ends" {
						return false
					}
				}
				return true
			})
			p := serveTo(t, masked(store.MaskRule{Column: "orders.email"}), addr)
			p.judged()
			w := p.wire()
			w.send(&pgproto3.Query{String: "select id, email from orders"})
			got, err := io.ReadAll(w.Conn)
			if err != nil {
				t.Fatalf("not cut: %v, %q", err, got)
			}
			if bytes.Contains(got, []byte("canary")) {
				t.Errorf("it leaked: %q", got)
			}
			gatewaytest.Until(t, "an outcome", func() bool { return len(p.record.Outcomes()) == 1 })
		})
	}
}

func TestATargetThatIsDownIsSaidSo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	p := serveTo(t, everything(), addr)
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "08001" {
		t.Errorf("down: %v", err)
	}
	p = serve(t, everything())
	p.session.Secret.Username = "nobody"
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "08001" || strings.Contains(err.Error(), "nobody") {
		t.Errorf("a refused log-in: %v", err)
	}
	p = serve(t, everything())
	conn := p.connect("")
	admin, err := pgx.Connect(t.Context(), server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 1000 {
			tag, err := admin.Exec(context.Background(), "select pg_terminate_backend(pid) from pg_stat_activity where query like 'select pg_sleep(31)%'")
			if err != nil || tag.RowsAffected() > 0 {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	defer func() { <-ended }()
	if _, err := conn.Exec(t.Context(), "select pg_sleep(31)"); code(err) != "57P01" {
		t.Errorf("ended by the target: %v", err)
	}
}

func TestTooManyConnectionsAreRefused(t *testing.T) {
	p := serve(t, everything(), func(c *Config) { c.MaxSessionConns = 1 })
	first := p.connect("")
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "53300" {
		t.Errorf("a second: %v", err)
	}
	_ = first.Close(t.Context())
	gatewaytest.Until(t, "room for another", func() bool {
		c, err := pgconn.Connect(t.Context(), p.dsn(""))
		if err == nil {
			_ = c.Close(t.Context())
		}
		return err == nil
	})
	p = serve(t, everything(), func(c *Config) { c.MaxConns = 1 })
	p.connect("")
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "53300" {
		t.Errorf("a second of all: %v", err)
	}
}

func TestThePasswordIsNotShownToATargetInTheClear(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan []byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = readStartup(c)
		_, _ = c.Write(encode(nil, &pgproto3.AuthenticationCleartextPassword{}))
		b, _ := io.ReadAll(c)
		got <- b
	}()
	p := serveTo(t, everything(), l.Addr().String())
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "08001" {
		t.Errorf("%v", err)
	}
	if b := <-got; bytes.Contains(b, []byte("secret")) {
		t.Errorf("the target was sent %q", b)
	}
}

func TestTheTargetsCertificateIsVerified(t *testing.T) {
	access := everything()
	access.TLS = ""
	p := serve(t, access)
	if _, err := pgconn.Connect(t.Context(), p.dsn("")); code(err) != "08001" {
		t.Errorf("a certificate that nobody vouches for: %v", err)
	}
	if p.tap.reached("step") {
		t.Error("the log-in went on without TLS")
	}
	p.sess.Targets = trusttest.Trust(t, targetRoots)
	conn := p.connect("")
	var on bool
	if err := conn.QueryRow(t.Context(), "select $1::bool", true).Scan(&on); err != nil || !on {
		t.Fatal(on, err)
	}
	if p.tap.reached("select") {
		t.Error("a statement went to the target in the clear")
	}
	go func() { _ = conn.PgConn().CancelRequest(context.Background()) }()
	if _, err := conn.Exec(t.Context(), "select pg_sleep(0.2)"); err != nil && code(err) != "57014" {
		t.Error(err)
	}
}

func TestClientsUseTLSAndTheTokenIsNotTakenInTheClearFromElsewhere(t *testing.T) {
	cert, ca, err := authority("gateway.test")
	if err != nil {
		t.Fatal(err)
	}
	p := serve(t, everything(), func(c *Config) { c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}} })
	cfg, err := pgx.ParseConfig(p.dsn(""))
	if err != nil {
		t.Fatal(err)
	}
	cfg.TLSConfig = trusttest.Trust(t, ca).Client()
	cfg.TLSConfig.ServerName = "gateway.test"
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var n int
	if err := conn.QueryRow(t.Context(), "select 7").Scan(&n); err != nil || n != 7 {
		t.Fatal(n, err)
	}
	p.session.Close()
	if _, err := conn.Exec(t.Context(), "select 1"); code(err) != "57P01" && !conn.IsClosed() {
		t.Error(err)
	}

	// From an address that is not this machine's.
	here, there := net.Pipe()
	go func() { _, _ = p.gw.welcome(t.Context(), elsewhere{here}, false); _ = here.Close() }()
	_, _ = io.WriteString(there, startupBytes())
	f := pgproto3.NewFrontend(there, there)
	m, err := f.Receive()
	if e, ok := m.(*pgproto3.ErrorResponse); err != nil || !ok || e.Code != "28000" {
		t.Errorf("%#v, %v", m, err)
	}
}

type elsewhere struct{ net.Conn }

func (elsewhere) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

func FuzzClient(f *testing.F) {
	messages := func(m ...pgproto3.FrontendMessage) (b []byte) {
		for _, m := range m {
			b = encode(b, m)
		}
		return b
	}
	f.Add(messages(&pgproto3.Query{String: "select 1; select 2"}, &pgproto3.Query{String: ""}))
	f.Add(messages(&pgproto3.Parse{Name: "s", Query: "select $1"}, &pgproto3.Describe{ObjectType: 'S', Name: "s"}, &pgproto3.Bind{PreparedStatement: "s", Parameters: [][]byte{[]byte("x")}}, &pgproto3.Execute{}, &pgproto3.Sync{}))
	f.Add(messages(&pgproto3.Query{String: "copy notes from stdin"}, &pgproto3.CopyData{Data: []byte("x")}, &pgproto3.CopyDone{}, &pgproto3.Sync{}))
	f.Add(messages(&pgproto3.Parse{Query: "listen x"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Flush{}, &pgproto3.Close{ObjectType: 'P'}, &pgproto3.Sync{}, &pgproto3.FunctionCall{}))
	f.Add([]byte("Q\x00\x00\x00\x00"))
	f.Add([]byte("d\x7f\xff\xff\xff"))
	ran := make(chan string, 1<<16)
	addr := script(f, func(c net.Conn, typ byte, body []byte) bool {
		var out []byte
		switch typ {
		case 'Q':
			ran <- string(bytes.TrimRight(body, "\x00"))
			out = encode(out, &pgproto3.ErrorResponse{Severity: "ERROR", Code: "XX000"})
			out = encode(out, &pgproto3.ReadyForQuery{TxStatus: 'I'})
		case 'P':
			out = encode(out, &pgproto3.ParseComplete{})
		case 'B':
			if bytes.Contains(body, []byte("refused by countersign")) {
				out = encode(out, &pgproto3.ErrorResponse{Severity: "ERROR", Code: "26000"})
			} else {
				out = encode(out, &pgproto3.BindComplete{})
			}
		case 'D':
			if body[0] == 'S' {
				out = encode(out, &pgproto3.ParameterDescription{})
			}
			out = encode(out, &pgproto3.NoData{})
		case 'E':
			ran <- ""
			out = encode(out, &pgproto3.CommandComplete{CommandTag: []byte("SELECT 0")})
		case 'C':
			out = encode(out, &pgproto3.CloseComplete{})
		case 'S':
			out = encode(out, &pgproto3.ReadyForQuery{TxStatus: 'I'})
		case 'X':
			return false
		}
		_, err := c.Write(out)
		return err == nil
	})
	p := serveTo(f, everything(), addr)
	p.judged()
	reached := 0
	f.Fuzz(func(t *testing.T, stream []byte) {
		p.t = t
		w := p.wire()
		if _, err := w.Conn.Write(stream); err != nil {
			t.Skip() // cut before all was sent
		}
		_ = w.Conn.(*net.TCPConn).CloseWrite()
		if _, err := io.Copy(io.Discard, w.Conn); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatal("the connection hangs")
			}
		}
		// What reached the target of earlier streams may be seen now.
		for len(ran) > 0 {
			sql := <-ran
			if reached++; sql != "" && !slices.ContainsFunc(p.record.Last(100), func(s *store.Submission) bool { return s.Openings[store.SealedStatement].Text == sql }) {
				t.Fatalf("%q ran and is not on record", sql)
			}
		}
		if n := p.record.Count(); reached > n {
			t.Fatalf("%d statements reached the target, %d are on record", reached, n)
		}
	})
}

func FuzzStartup(f *testing.F) {
	f.Add([]byte(startupBytes())[4:])
	f.Add([]byte("\x00\x03\x00\x02user\x00x\x00_pq_.a\x00b\x00\x00"))
	f.Add([]byte("\x00\x03\x00\x00user\x00x\x00options\x00-c search_path=evil\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4 {
			return
		}
		st, err := parseStartup(b)
		if err != nil || st.refused != nil {
			return
		}
		for name, value := range st.settings {
			if !startupParameters[name] || name == "client_encoding" && value != "UTF8" || strings.ContainsRune(value, 0) {
				t.Errorf("%s=%q passes", name, value)
			}
		}
	})
}

func FuzzTarget(f *testing.F) {
	f.Add([]byte("T\x00\x00\x00\x06\x00\x00C\x00\x00\x00\x0dSELECT 1\x00Z\x00\x00\x00\x05I"))
	f.Add([]byte("E\x00\x00\x00\x05\x00"))
	f.Add([]byte("H\x00\x00\x00\x07\x00\x00\x00d\x00\x00\x00\x05x"))
	var answer []byte
	addr := script(f, func(c net.Conn, typ byte, _ []byte) bool {
		if typ == 'Q' {
			_, _ = c.Write(answer)
		}
		return false
	})
	p := serveTo(f, masked(store.MaskRule{Column: "orders.email"}), addr)
	r := p.judged()
	f.Fuzz(func(t *testing.T, b []byte) {
		p.t, answer = t, b
		p.gw.mu.Lock()
		r.conns = 0
		p.gw.rules[p.session] = r // which an answer of another shape drops
		p.gw.mu.Unlock()
		w := p.wire()
		w.send(&pgproto3.Query{String: "select id, email from orders"})
		_, err := io.Copy(io.Discard, w.Conn)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Fatal("the connection hangs")
		}
	})
}
