package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/lib/pq"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

// code is the SQLSTATE of err.
func code(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return fmt.Sprint(err)
}

func TestEachModeOfPgxReadsThroughTheGatewayAndEachUseIsOnRecordWithItsOutcome(t *testing.T) {
	for _, mode := range []string{"simple_protocol", "exec", "describe_exec", "cache_describe", "cache_statement"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := serve(t, everything())
			conn := p.connect(mode)
			for range 2 { // the second time from the client's cache
				rows, err := conn.Query(t.Context(), "select id, customer, amount, paid, at, raw from orders where id <= $1 order by id", 3)
				if err != nil {
					t.Fatal(err)
				}
				n := 0
				for rows.Next() {
					v, err := rows.Values()
					if err != nil || v[0] != int32(n+1) || v[1] != fmt.Sprintf("customer %d", n+1) {
						t.Fatalf("row %v, %v", v, err)
					}
					n++
				}
				if err := rows.Err(); err != nil || n != 3 {
					t.Fatalf("%d rows, %v", n, err)
				}
			}
			if _, err := conn.Exec(t.Context(), "select 1/$1::int", 0); code(err) != "22012" {
				t.Fatalf("division by zero: %v", err)
			}
			uses := p.uses()
			if len(uses) != 3 {
				t.Fatalf("%d uses, want 3: %+v", len(uses), uses)
			}
			if mode != "simple_protocol" && !strings.Contains(uses[0].Statement, "\n-- $1 = '3'") {
				t.Errorf("recorded without its parameter: %q", uses[0].Statement)
			}
			gatewaytest.Until(t, "all outcomes", func() bool { return len(p.record.Outcomes()) == len(p.record.Uses()) })
			out := p.record.Outcomes()
			if o := out[uses[0].ID]; o.Status != "SELECT 3" || o.Rows != 3 || o.Error != "" || o.Received == 0 {
				t.Errorf("outcome %+v", o)
			}
			if o := out[uses[2].ID]; o.Error != "22012" || o.Status != "" {
				t.Errorf("outcome of an error %+v", o)
			}
		})
	}
}

func TestLibPQReadsWritesAndCopiesThroughTheGateway(t *testing.T) {
	p := serve(t, everything())
	db, err := sql.Open("postgres", p.dsn(""))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var n int
	if err := db.QueryRow("select count(*) from orders where id > $1", 5).Scan(&n); err != nil || n != 15 {
		t.Fatalf("%d, %v", n, err)
	}
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	stmt, err := tx.Prepare("insert into notes (body) values ($1) returning id")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := stmt.QueryRow(fmt.Sprintf("it's note %d", i)).Scan(&n); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if !p.recorded("'it''s note 2'") {
		t.Error("a parameter is not on record")
	}
}

func TestPsqlRunsScriptsCopiesBothWaysAndShowsErrors(t *testing.T) {
	p := serve(t, everything())
	out := p.psql(`
begin;
copy mine from stdin;
1	one
2	two
\.
savepoint s;
copy mine from stdin;
x	bad
\.
rollback;
select 'still', 1;
\copy (select id, customer from orders where id < 3 order by id) to stdout
select 1/0;
select 'more', 2; select 'same line', 3;
`)
	for _, want := range []string{"still|1", "1\tcustomer 1\n2\tcustomer 2", "division by zero", "more|2", "same line|3", "invalid input syntax for type integer"} {
		if !strings.Contains(out, want) {
			t.Errorf("psql printed no %q:\n%s", want, out)
		}
	}
	uses := p.uses()
	gatewaytest.Until(t, "all outcomes", func() bool { return len(p.record.Outcomes()) == len(uses) })
	copies := 0
	for _, u := range uses {
		o := p.record.Outcomes()[u.ID]
		if strings.Contains(u.Statement, "copy mine from stdin") && o.Error == "" {
			copies++
			if o.Rows != 2 || o.Sent < int64(len("1\tone\n2\ttwo\n")) || !strings.HasPrefix(o.Digest, "sha256:") {
				t.Errorf("COPY in: %+v", o)
			}
		}
		if strings.HasPrefix(strings.ToLower(u.Statement), "copy") && strings.Contains(u.Statement, "customer") {
			copies++
			if o.Rows != 2 || o.Received == 0 || o.Digest == "" || o.Status != "COPY 2" {
				t.Errorf("COPY out: %+v", o)
			}
		}
	}
	if copies != 2 {
		t.Errorf("%d copies on record: %+v", copies, uses)
	}
}

func TestAStatementIsOnRecordBeforeItReachesTheTarget(t *testing.T) {
	p := serve(t, everything())
	early := make(chan string, 100)
	p.tap.mu.Lock()
	p.tap.forward = func(b []byte) {
		for i := range 40 {
			mark := fmt.Sprintf("mark-%d-", i)
			if strings.Contains(string(b), mark) && !p.recorded(mark) {
				early <- mark
			}
		}
	}
	p.tap.mu.Unlock()
	for i, mode := range []string{"simple_protocol", "exec", "cache_describe"} {
		conn := p.connect(mode)
		for j := range 5 {
			var s string
			if err := conn.QueryRow(t.Context(), "select $1::text", fmt.Sprintf("mark-%d-", i*5+j)).Scan(&s); err != nil {
				t.Fatal(err)
			}
		}
	}
	conn := p.connect("cache_statement")
	var batch pgx.Batch
	for i := 15; i < 35; i++ {
		batch.Queue("select $1::text", fmt.Sprintf("mark-%d-", i))
	}
	if err := conn.SendBatch(t.Context(), &batch).Close(); err != nil {
		t.Fatal(err)
	}
	close(early)
	for mark := range early {
		t.Errorf("%s reached the target before it was on record", mark)
	}
	if !p.tap.reached("mark-34-") || len(p.uses()) != 35 {
		t.Errorf("%d uses on record, want 35", len(p.uses()))
	}
}

func TestWhileTheRecordIsDownNothingReachesTheTargetAndTheConnectionStaysUsable(t *testing.T) {
	for _, mode := range []string{"simple_protocol", "exec", "cache_statement"} {
		t.Run(mode, func(t *testing.T) {
			p := serve(t, everything())
			conn := p.connect(mode)
			p.record.Down(true)
			if _, err := conn.Exec(t.Context(), "select 'unrecorded', $1::int", 1); code(err) != "58030" {
				t.Fatalf("with the recorder down: %v", err)
			}
			if p.tap.reached("unrecorded") {
				t.Error("a statement reached the target that is not on record")
			}
			p.record.Down(false)
			var n int
			if err := conn.QueryRow(t.Context(), "select $1::int", 7).Scan(&n); err != nil || n != 7 {
				t.Fatalf("%d, %v", n, err)
			}
		})
	}
}

func TestARefusedStatementNeverReachesTheTargetAndLeavesItsTransactionFailed(t *testing.T) {
	for _, mode := range []string{"simple_protocol", "exec", "cache_statement"} {
		t.Run(mode, func(t *testing.T) {
			p := serve(t, everything())
			conn := p.connect(mode)
			if _, err := conn.Exec(t.Context(), "listen secrets"); code(err) != "42501" {
				t.Fatalf("refused with %v", err)
			}
			if s := conn.PgConn().TxStatus(); s != 'I' {
				t.Errorf("transaction status %c", s)
			}
			tx, err := conn.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec(t.Context(), "listen secrets"); code(err) != "42501" {
				t.Fatalf("refused with %v", err)
			}
			if s := conn.PgConn().TxStatus(); s != 'E' {
				t.Errorf("transaction status %c, want E", s)
			}
			if _, err := tx.Exec(t.Context(), "select 1"); code(err) != "25P02" {
				t.Errorf("in a failed transaction: %v", err)
			}
			if err := tx.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
			var n int
			if err := conn.QueryRow(t.Context(), "select $1::int", 7).Scan(&n); err != nil || n != 7 {
				t.Fatalf("%d, %v", n, err)
			}
			if p.tap.reached("secrets") {
				t.Error("what was refused reached the target")
			}
			if r := p.record.Refusals(); len(r) == 0 || r[0].Method != "postgres" || r[0].Reason == "" || r[0].Remote != "127.0.0.1" || r[0].Intent != p.session.Intent {
				t.Errorf("refusals %+v", r)
			}
		})
	}
}

func TestAfterAnErrorInABatchTheRestIsSkippedAndTheRecordSaysSo(t *testing.T) {
	p := serve(t, everything())
	conn := p.connect("exec")
	var batch pgx.Batch
	batch.Queue("select 1")
	batch.Queue("select 1/$1::int", 0)
	batch.Queue("insert into notes (body) values ('never')")
	if err := conn.SendBatch(t.Context(), &batch).Close(); code(err) != "22012" {
		t.Fatal(err)
	}
	uses := p.uses()
	gatewaytest.Until(t, "outcomes", func() bool { return len(p.record.Outcomes()) == len(uses) })
	out := p.record.Outcomes()
	if len(uses) != 3 || out[uses[0].ID].Status != "SELECT 1" || out[uses[1].ID].Error != "22012" || out[uses[2].ID].Status != "skipped" {
		t.Fatalf("%+v\n%+v", uses, out)
	}
	var n int
	if err := conn.QueryRow(t.Context(), "select count(*) from notes where body = $1", "never").Scan(&n); err != nil || n != 0 {
		t.Fatalf("%d, %v", n, err)
	}
}

func TestWrongTokensAreRefusedAndOnRecord(t *testing.T) {
	p := serve(t, everything())
	other, token := p.begin(func() store.Access {
		a := everything()
		a.Protocol, a.Upstream = store.ProtocolPostgres, "orders.internal:5432/postgres"
		return a
	}())
	other.Close()
	for _, tok := range []string{"wrong", "", token} {
		_, err := pgconn.Connect(t.Context(), fmt.Sprintf("host=%s port=%s user=x password='%s' dbname=postgres sslmode=disable", strings.Split(p.addr, ":")[0], strings.Split(p.addr, ":")[1], tok))
		if code(err) != "28P01" {
			t.Errorf("token %q: %v", tok, err)
		}
	}
	gatewaytest.Until(t, "a refusal on record", func() bool { return len(p.record.Refusals()) > 0 })
	if r := p.record.Refusals()[0]; r.Problem != "unauthenticated" || r.Remote != "127.0.0.1" {
		t.Errorf("%+v", r)
	}
	if _, err := pgconn.Connect(t.Context(), strings.Replace(p.dsn(""), "/postgres?", "/template1?", 1)); code(err) != "3D000" {
		t.Errorf("another database: %v", err)
	}
	for setting, want := range map[string]string{"search_path=evil": "0A000", "options=-c%20search_path%3Devil": "0A000", "replication=database": "0A000", "client_encoding=SJIS": "0A000", "timezone=nowhere": "22023"} {
		if _, err := pgconn.Connect(t.Context(), p.dsn("&"+setting)); code(err) != want {
			t.Errorf("%s: %v, want %s", setting, err, want)
		}
	}
	if _, err := pgconn.Connect(t.Context(), p.dsn("&application_name=mine&datestyle=German&timezone=Asia/Tokyo&extra_float_digits=3")); err != nil {
		t.Error(err)
	}
}

func TestTheEndOfASessionCutsARunningQueryWithinASecond(t *testing.T) {
	p := serve(t, everything())
	idle, busy := p.connect(""), p.connect("")
	failed := make(chan error, 1)
	go func() {
		_, err := busy.Exec(context.Background(), "select pg_sleep(60) /* cut me */")
		failed <- err
	}()
	running := func() bool {
		var n int
		admin, err := pgx.Connect(t.Context(), server.DSN)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close(context.Background())
		if err := admin.QueryRow(t.Context(), "select count(*) from pg_stat_activity where state = 'active' and query like '%cut me%' and pid <> pg_backend_pid()").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n > 0
	}
	gatewaytest.Until(t, "the query to run", running)
	began := time.Now()
	p.session.Close()
	if err := <-failed; code(err) != "57P01" {
		t.Errorf("the running one: %v", err)
	}
	if _, err := idle.Exec(t.Context(), "select 1"); code(err) != "57P01" && !idle.IsClosed() {
		t.Errorf("the idle one: %v", err)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %s", d)
	}
	gatewaytest.Until(t, "the target to stop it", func() bool { return !running() })
	gatewaytest.Until(t, "its outcome", func() bool { return len(p.record.Outcomes()) == 1 })
	if o := p.record.Outcomes()[p.uses()[0].ID]; o.Error != store.UseCut {
		t.Errorf("outcome %+v", o)
	}
}

func TestACancelRequestStopsTheStatementAndAWrongKeyDoesNot(t *testing.T) {
	p := serve(t, everything())
	conn := p.connect("")
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "select pg_sleep(30)")
		failed <- err
	}()
	gatewaytest.Until(t, "the use on record", func() bool { return len(p.uses()) == 1 })
	c := p.gw.conns[conn.PgConn().PID()]
	wrong := append([]byte(nil), c.secret...)
	wrong[0]++
	p.gw.cancel(t.Context(), c.pid, wrong, "127.0.0.1")
	p.gw.cancel(t.Context(), c.pid, nil, "127.0.0.1")
	p.gw.cancel(t.Context(), c.pid+1, c.secret, "127.0.0.1")
	select {
	case err := <-failed:
		t.Fatalf("cancelled by a wrong key: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	gatewaytest.Until(t, "the statement to be cancelled", func() bool {
		if err := conn.PgConn().CancelRequest(t.Context()); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-failed:
			if code(err) != "57014" {
				t.Fatalf("cancelled with %v", err)
			}
			return true
		case <-time.After(20 * time.Millisecond):
			return false
		}
	})
}

func TestAStatementThatNoEntryHoldsIsRefusedAndTheConnectionStaysUsable(t *testing.T) {
	p := serve(t, everything())
	for _, mode := range []string{"simple_protocol", "exec"} {
		conn := p.connect(mode)
		for _, n := range []int{49 << 10, 10 << 20, 17 << 20} {
			if _, err := conn.Exec(t.Context(), "select '"+strings.Repeat("x", n)+"'"); code(err) != "54000" {
				t.Errorf("%s, %d bytes: %v", mode, n, err)
			}
		}
		var s int
		if err := conn.QueryRow(t.Context(), "select length($1::text)", strings.Repeat("y", 1<<20)).Scan(&s); mode == "exec" && (err != nil || s != 1<<20) {
			t.Errorf("a long parameter: %d, %v", s, err)
		}
	}
	if p.tap.reached("xxxxxxxx") {
		t.Error("it reached the target")
	}
	if !p.recorded("-- $1 = (1048576 bytes, sha256:") {
		t.Errorf("a long parameter is not on record: %+v", p.uses())
	}
}

func TestWhatAllConnectionsHoldTogetherIsBounded(t *testing.T) {
	p := serve(t, everything(), func(c *Config) { c.MaxHeld = 1 << 20 })
	conn := p.connect("exec")
	for range 3 { // which would not do were it not given back
		var n int
		if err := conn.QueryRow(t.Context(), "select length($1::text)", strings.Repeat("y", 900<<10)).Scan(&n); err != nil || n != 900<<10 {
			t.Fatal(n, err)
		}
		if err := conn.QueryRow(t.Context(), "select length($1::text)", strings.Repeat("y", 2<<20)).Scan(&n); code(err) != "53200" {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), "select $1::text", strings.Repeat("y", 2<<20)); code(err) != "53200" {
		t.Fatal(err)
	}
	if n := p.gw.held.Load(); n != 0 {
		t.Errorf("%d bytes are still counted", n)
	}
}

func TestCopyOfPgxInBinaryIsOnRecordByDigest(t *testing.T) {
	p := serve(t, everything())
	conn := p.connect("")
	rows := make([][]any, 2000)
	for i := range rows {
		rows[i] = []any{int32(i), strings.Repeat("z", 50)}
	}
	n, err := conn.CopyFrom(t.Context(), pgx.Identifier{"mine"}, []string{"id", "t"}, pgx.CopyFromRows(rows))
	if err != nil || n != 2000 {
		t.Fatal(n, err)
	}
	uses := p.uses()
	gatewaytest.Until(t, "its outcome", func() bool { return p.record.Outcomes()[uses[len(uses)-1].ID].Rows == 2000 })
	if o := p.record.Outcomes()[uses[len(uses)-1].ID]; o.Sent < 2000*50 || !strings.HasPrefix(o.Digest, "sha256:") || o.Status != "COPY 2000" {
		t.Errorf("%+v", o)
	}
	if _, err := conn.Exec(t.Context(), "delete from mine where id >= 0"); err != nil {
		t.Fatal(err)
	}
}
