package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

// admin runs a statement at the target, past the gateway.
func admin(t testing.TB, sql string, into ...any) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if len(into) == 0 {
		_, err = conn.Exec(context.Background(), sql)
	} else {
		err = conn.QueryRow(context.Background(), sql).Scan(into...)
	}
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// outcome waits for what came of the use whose statement holds part.
func (p *path) outcome(part string) store.UseOutcome {
	p.t.Helper()
	var o store.UseOutcome
	gatewaytest.Until(p.t, "the outcome of "+part, func() bool {
		for _, u := range p.uses() {
			if strings.Contains(u.Statement, part) {
				var ok bool
				o, ok = p.record.Outcomes()[u.ID]
				return ok
			}
		}
		return false
	})
	return o
}

func TestWhatFollowsAFailureToRecordInALongPipelineIsNotOnRecord(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	p.record.Down(true)
	for i := range maxBurstUses/2 + 1 {
		w.send(&pgproto3.Parse{Query: fmt.Sprintf("select 'lost-%d'", i)}, &pgproto3.Bind{}, &pgproto3.Execute{})
	}
	gatewaytest.Until(t, "the failure", func() bool { return p.tap.reached("refused by countersign") })
	p.record.Down(false)
	w.send(&pgproto3.Sync{})
	if got := w.until('Z'); got != "E58030 ZI" {
		t.Errorf("%q", got)
	}
	if n := len(p.record.Uses()); n != 0 || p.tap.reached("lost-") {
		t.Errorf("%d uses on record, of statements that were not sent", n)
	}
	w.send(&pgproto3.Query{String: "select 'after'"})
	if got := w.until('Z'); got != "T Dafter C ZI" {
		t.Errorf("afterwards: %q", got)
	}
}

func TestWhileTheRecorderStandsStillNothingGoesOnAndWhatWaitsIsDoneOrRefused(t *testing.T) {
	p := serve(t, everything())
	// One is in the middle of a statement, one in that of a pipeline, one hangs up.
	busy, piped, gone := p.wire(), p.wire(), p.wire()
	busy.send(&pgproto3.Query{String: "select pg_sleep(0.3), 'before'"})
	gatewaytest.Until(t, "the statement at the target", func() bool { return p.tap.reached("before") })
	stuck := p.record.Stand()
	piped.send(&pgproto3.Parse{Query: "select 'piped-one'"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "select 'piped-two'"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	if got := busy.until('Z'); got != "T D,before C ZI" {
		t.Errorf("what was on record before: %q", got)
	}
	busy.send(&pgproto3.Query{String: "select 'refused-one'; select 'refused-two'"})
	gone.send(&pgproto3.Query{String: "insert into lines values ('gone-one')"})
	time.Sleep(50 * time.Millisecond)
	_ = gone.Close()
	time.Sleep(50 * time.Millisecond)
	for _, mark := range []string{"piped-", "refused-", "gone-"} {
		if p.tap.reached(mark) {
			t.Errorf("%s reached the target while the recorder stood still", mark)
		}
	}
	p.record.Down(true)
	stuck(store.ErrUnavailable)
	for name, w := range map[string]*wire{"simple": busy, "pipeline": piped} {
		if got := w.until('Z'); got != "E58030 ZI" {
			t.Errorf("%s: %q", name, got)
		}
	}
	p.record.Down(false)
	for name, w := range map[string]*wire{"simple": busy, "pipeline": piped} {
		w.send(&pgproto3.Query{String: "select 'after'"})
		if got := w.until('Z'); got != "T Dafter C ZI" {
			t.Errorf("%s, afterwards: %q", name, got)
		}
	}
	for _, mark := range []string{"piped-", "refused-", "gone-"} {
		if p.tap.reached(mark) {
			t.Errorf("%s reached the target, unrecorded", mark)
		}
	}
}

func TestASessionThatEndsWhileTheRecorderStandsStillIsCutWithinASecond(t *testing.T) {
	p := serve(t, everything())
	w := p.wire()
	stuck := p.record.Stand()
	w.send(&pgproto3.Query{String: "insert into lines values ('too late')"})
	time.Sleep(50 * time.Millisecond)
	began := time.Now()
	p.session.Close()
	if got := w.until('E'); got != "E57P01" || time.Since(began) > time.Second {
		t.Errorf("%q after %s", got, time.Since(began))
	}
	stuck(nil) // it was on record after all
	if o := p.outcome("too late"); o.Error != store.UseCut {
		t.Errorf("%+v", o)
	}
	if p.tap.reached("too late") {
		t.Error("it reached the target")
	}
}

func TestATargetThatDiesInTheMiddleIsAnErrorOnRecordAndNoMaskedByteLeaks(t *testing.T) {
	access := masked(store.MaskRule{Column: "orders.email"})
	for name, sql := range map[string]string{
		"rows":     "select o.email, repeat('x', 500), i from orders o, generate_series(1, 200000) i",
		"copy out": "copy (select repeat('x', 500), i from generate_series(1, 4000000) i) to stdout",
		"copy in":  "copy lines from stdin",
		"between":  "",
	} {
		t.Run(name, func(t *testing.T) {
			p := serve(t, access)
			w := p.wire()
			mark := "/* dies " + name + " */ "
			if sql == "" {
				w.send(&pgproto3.Query{String: "begin"})
				w.until('Z')
			} else {
				w.send(&pgproto3.Query{String: mark + sql})
				for n := 0; n < 100; n++ { // in the middle, and more is on its way
					m, err := w.Receive()
					if err != nil {
						t.Fatal(err)
					}
					if _, ok := m.(*pgproto3.CopyInResponse); ok {
						break
					}
				}
			}
			if name == "copy in" {
				w.send(&pgproto3.CopyData{Data: []byte("before\n")})
				gatewaytest.Until(t, "the data at the target", func() bool { return p.tap.reached("before\n") })
			}
			admin(t, "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'step'")
			if name == "copy in" {
				_ = w.SetDeadline(time.Now().Add(5 * time.Second))
				go func() {
					for w.Flush() == nil {
						w.Send(&pgproto3.CopyData{Data: bytes.Repeat([]byte("later\n"), 1000)})
						time.Sleep(time.Millisecond)
					}
				}()
			}
			var last string
			for {
				m, err := w.Receive()
				if err != nil {
					break
				}
				b, _ := m.Encode(nil)
				if bytes.Contains(b, []byte("canary")) {
					t.Fatal("a masked byte")
				}
				if e, ok := m.(*pgproto3.ErrorResponse); ok {
					last = e.Code
				}
			}
			if last != "57P01" && last != "08006" {
				t.Errorf("the client was told %q", last)
			}
			if sql != "" {
				if o := p.outcome(mark); o.Error != store.UseUpstream && o.Error != "57P01" {
					t.Errorf("%+v", o)
				}
			}
			again := p.connect("simple_protocol")
			var n int
			if err := again.QueryRow(t.Context(), "select 7").Scan(&n); err != nil || n != 7 {
				t.Errorf("afterwards: %d, %v", n, err)
			}
		})
	}
}

func TestATargetThatHangsUpWithoutAWordIsSaidSo(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Column: "orders.email"}))
	w := p.wire()
	cut := make(chan struct{})
	p.tap.mu.Lock()
	p.tap.forward = func(b []byte) {
		if bytes.Contains(b, []byte("vanish")) {
			close(cut)
			runtime.Goexit() // with it go the connections, by serve's defers
		}
	}
	p.tap.mu.Unlock()
	w.send(&pgproto3.Query{String: "select email from orders /* vanish */"})
	<-cut
	if got := w.until('E'); got != "E08006" {
		t.Errorf("%q", got)
	}
	if o := p.outcome("vanish"); o.Error != store.UseUpstream {
		t.Errorf("%+v", o)
	}
}

func TestTheEndOfASessionCutsCopyBothWaysWithinASecond(t *testing.T) {
	for _, way := range []string{"in", "out"} {
		t.Run(way, func(t *testing.T) {
			p := serve(t, everything())
			w := p.wire()
			if way == "in" {
				w.send(&pgproto3.Query{String: "copy mine (t) from stdin"})
				w.until('G')
				w.send(&pgproto3.CopyData{Data: []byte("before the cut\n")})
				gatewaytest.Until(t, "the data at the target", func() bool { return p.tap.reached("before the cut\n") })
			} else {
				w.send(&pgproto3.Query{String: "copy (select repeat('x', 500) from generate_series(1, 4000000)) to stdout"})
				w.until('d')
			}
			began := time.Now()
			p.session.Close()
			var after atomic.Bool
			if way == "in" {
				go func() {
					for i := 0; ; i++ {
						b, _ := (&pgproto3.CopyData{Data: []byte("after the cut\n")}).Encode(nil)
						if i == 100 {
							b, _ = (&pgproto3.CopyDone{}).Encode(nil)
						}
						if time.Since(began) > 100*time.Millisecond {
							after.Store(true)
							b = bytes.ReplaceAll(b, []byte("after the cut"), []byte("late, the cut"))
						}
						if _, err := w.Write(b); err != nil || i > 1000 {
							return
						}
						time.Sleep(time.Millisecond)
					}
				}()
			}
			for {
				if _, err := w.Receive(); err != nil {
					break
				}
			}
			if d := time.Since(began); d > time.Second {
				t.Errorf("cut after %s", d)
			}
			if o := p.outcome("copy"); o.Error != store.UseCut || way == "in" && o.Sent < 15 {
				t.Errorf("%+v", o)
			}
			gatewaytest.Until(t, "the target to stop", func() bool {
				var n int
				admin(t, "select count(*) from pg_stat_activity where usename = 'step' and state = 'active'", &n)
				return n == 0
			})
			if p.tap.reached("late, the cut") {
				t.Error("data went on after the cut")
			}
			var n int
			if admin(t, "select count(*) from mine where t like '%the cut'", &n); n != 0 {
				t.Errorf("%d rows of a COPY that was cut stayed", n)
			}
		})
	}
}

func TestHalfClosedConnectionsAreLetGo(t *testing.T) {
	p := serve(t, everything())
	before := runtime.NumGoroutine()
	for _, sql := range []string{"", "select 'half'", "select pg_sleep(60)", "copy mine from stdin", "begin"} {
		w := p.wire()
		if sql != "" {
			w.send(&pgproto3.Query{String: sql})
		}
		if strings.HasPrefix(sql, "copy") {
			w.until('G')
		}
		began := time.Now()
		_ = w.Conn.(*net.TCPConn).CloseWrite()
		for {
			if _, err := w.Receive(); err != nil {
				break
			}
		}
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("%q: let go after %s", sql, d)
		}
	}
	gatewaytest.Until(t, "the target to be let go", func() bool {
		var n int
		admin(t, "select count(*) from pg_stat_activity where usename = 'step'", &n)
		return n == 0 && runtime.NumGoroutine() <= before+3
	})
}

func TestAStatementThatIsCutBeforeItBeginsDoesNotRunOn(t *testing.T) {
	p := serve(t, everything())
	var all sync.WaitGroup
	for i := range 30 {
		s, token := p.begin(*p.session.Grant.Access)
		conn, err := pgconn.Connect(t.Context(), strings.Replace(p.dsn(""), p.token, token, 1))
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			mark := fmt.Sprintf("/* runs on %d- */", i)
			go func() { _, _ = conn.Exec(context.Background(), "select pg_sleep(60) "+mark).ReadAll() }()
			for !p.tap.reached(mark) {
				runtime.Gosched()
			}
			if i%2 == 0 {
				s.Close()
			} else {
				_ = conn.Conn().Close()
			}
		})
	}
	all.Wait()
	gatewaytest.Until(t, "the target to stop all of them", func() bool {
		var n int
		admin(t, "select count(*) from pg_stat_activity where usename = 'step'", &n)
		return n == 0
	})
}

func TestACancelRequestTouchesNoOtherConnectionAndNoneThatIsOver(t *testing.T) {
	p := serve(t, everything())
	other := p.connect("simple_protocol")
	conn := p.connect("simple_protocol")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var all sync.WaitGroup
	all.Go(func() { // of one connection alone, at whatever time it is
		for ctx.Err() == nil {
			_ = conn.PgConn().CancelRequest(ctx)
		}
	})
	cancelled := 0
	for i := range 150 {
		if _, err := other.Exec(t.Context(), "select pg_sleep(0.002)"); err != nil {
			t.Fatalf("another's statement: %v", err)
		}
		var n int
		err := conn.QueryRow(t.Context(), fmt.Sprintf("select %d from pg_sleep(0.001)", i)).Scan(&n)
		switch {
		case code(err) == "57014":
			cancelled++
		case err != nil || n != i:
			t.Fatalf("statement %d: %d, %v", i, n, err)
		}
	}
	stop()
	all.Wait()
	// The keys of one that is over are nobody's.
	pid, key := conn.PgConn().PID(), conn.PgConn().SecretKey()
	_ = conn.Close(t.Context())
	gatewaytest.Until(t, "it to be forgotten", func() bool {
		p.gw.mu.Lock()
		defer p.gw.mu.Unlock()
		return p.gw.conns[pid] == nil
	})
	p.gw.cancel(t.Context(), pid, key, "127.0.0.1")
	if _, err := other.Exec(t.Context(), "select pg_sleep(0.05)"); err != nil {
		t.Errorf("another's statement: %v", err)
	}
	if cancelled == 0 {
		t.Error("nothing was cancelled")
	}
	gatewaytest.Until(t, "every outcome", func() bool { return len(p.record.Outcomes()) == p.record.Count() })
}

func TestFiveHundredConnectionsAtOnceAreServedOrRefusedAndLeaveNothingBehind(t *testing.T) {
	p := serve(t, everything(), func(c *Config) { c.MaxConns, c.MaxSessionConns = 120, 60 })
	p.connect("").Close(context.Background())
	before := runtime.NumGoroutine()
	var served, full atomic.Int64
	var all sync.WaitGroup
	for range 500 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			conn, err := pgconn.Connect(ctx, p.dsn(""))
			if err != nil {
				// Beyond twice as many as there may be, nobody is told why.
				var told *pgconn.PgError
				if errors.As(err, &told) && told.Code != "53300" || ctx.Err() != nil {
					t.Errorf("%v", err)
				}
				full.Add(1)
				return
			}
			served.Add(1)
			if _, err := conn.Exec(ctx, "select pg_sleep(0.2)").ReadAll(); err != nil {
				t.Errorf("of one that was let in: %v", err)
			}
			_ = conn.Close(ctx)
		})
	}
	all.Wait()
	if served.Load() == 0 || full.Load() == 0 {
		t.Errorf("%d served, %d refused", served.Load(), full.Load())
	}
	gatewaytest.Until(t, "all to be gone", func() bool {
		p.gw.mu.Lock()
		open, held := p.gw.open, len(p.gw.conns)
		p.gw.mu.Unlock()
		return open == 0 && held == 0 && runtime.NumGoroutine() <= before+5 && p.gw.held.Load() == 0
	})
	if _, err := p.connect("").Exec(t.Context(), "select 1"); err != nil {
		t.Error(err)
	}
}
