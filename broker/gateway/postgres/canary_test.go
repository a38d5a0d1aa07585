package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/store"
)

// people is a table whose values are known: mails and pins are hidden by column,
// a member of documents by field, and an address within a memo by detector.
const people = `
	drop table if exists people cascade;
	create table people (id int primary key check (id > 0), name text, email text unique, pin int, doc jsonb, memo text, ref json);
	insert into people select i, 'name ' || i, 'canary-mail-' || i, 77007700 + i,
		jsonb_build_object('email', 'canary-doc-' || i, 'n', i, 'in', jsonb_build_array(jsonb_build_object('email', 'canary-deep-' || i))),
		'write to canary-memo-' || i || '@example.net now', json_build_object('email', 'canary-ref-' || i) from generate_series(1, 5) i;
	create view everybody as select id, name as called, email as contact, pin as code, doc, memo from people;
	create or replace function tell() returns trigger language plpgsql as $$ begin raise notice 'it was %', new.email using detail = new.email; return new; end $$;
	create trigger tell before update on people for each row execute function tell();`

var peopleRules = []store.MaskRule{{Column: "people.email"}, {Column: "people.pin"}, {Field: "email"}, {Detector: "email"}}

// leaks says what of the hidden values stands in what a client got.
func leaks(got []byte) string {
	low := bytes.ToLower(got)
	for _, part := range []string{"canary-mail", "canary-doc", "canary-deep", "canary-ref", "liam-yranac", hex.EncodeToString([]byte("canary-mail")), "770077"} {
		if bytes.Contains(low, []byte(part)) {
			return part
		}
	}
	if m := memo.Find(low); m != nil {
		return string(m)
	}
	for i := range uint32(5) {
		if bytes.Contains(got, binary.BigEndian.AppendUint32(nil, 77007701+i)) {
			return "a pin in binary"
		}
	}
	return ""
}

var memo = regexp.MustCompile(`canary-memo-\d@example\.net`)

// asking makes up queries over people, with something hidden in most.
type asking struct{ *rand.Rand }

func (r asking) one(of ...string) string { return of[r.IntN(len(of))] }

func (r asking) column() string {
	return r.one("p.email", "p.pin", "p.email", "p.pin", "p.name", "p.id", "p.doc", "p.memo", "p.ref", "p.*", "p")
}

func (r asking) expr(depth int) string {
	if depth <= 0 {
		return r.column()
	}
	e := r.expr(depth - 1)
	if strings.HasSuffix(e, "*") && r.IntN(8) > 0 {
		e = "p.email"
	}
	return strings.ReplaceAll(r.one("%", "%::text", "%::text || 'x'", "coalesce(%::text, '-')", "concat('a', %, 'b')", "format('%s', %)", "upper(%::text)", "reverse(%::text)",
		"left(%::text, 12)", "substr(%::text, 2)", "row_to_json(p)", "to_jsonb(p)", "to_json(%)", "p::text", "row(%, 1)", "row(%)::text", "array[%]", "array[%::text]", "(array[%])[1]",
		"case when p.id > 0 then % end", "(select %)", "length(%::text)", "%::int", "%::text::json", "encode(%::text::bytea, 'hex')", "%::text::bytea", "json_build_object('k', %)",
		"jsonb_build_object('email', %)", "jsonb_build_array(%)", "jsonb_set(p.doc, '{n}', to_jsonb(%))", "p.doc->>'email'", "p.doc->'email'", "p.doc #>> '{in,0,email}'", "p.doc - 'n'", "p.doc::text", "(p).email",
		"quote_literal(%)", "nullif(%::text, 'q')", "greatest(%::text, 'a')", "1 / (length(%::text) - 13)", "regexp_replace(%::text, 'x', 'y')", "split_part(%::text, '-', 2)", "md5(%::text)",
		"(select string_agg(x::text, ',') from (select % as x) s)", "(select max(x) from (values (%::text)) v(x))", "to_char(p.pin, 'FM99999999')", "p.pin + 0", "p.pin::bigint", "p.pin::numeric", "-p.pin", "%::varchar(20)",
		"'~'::text"), "%", e)
}

func (r asking) from() string {
	return r.one("people p", "people p", "people p", "(select * from people) p", "(select * from people where id < 4) as p", "only people p", "people as p(id, name, email, pin, doc, memo, ref)",
		"(select id, name, email as name2, name as email, pin, doc, memo, ref from people) p", "(select p.id, p.email as name, p.name as email, p.pin, p.doc, p.memo, p.ref from people p) p",
		"people p join orders o on o.id = p.id", "people p cross join lateral (select p.email as l) l", "(select * from people union all select * from people) p", "(table people) p",
		"(select id, called as name, contact as email, code as pin, doc, memo, doc as ref from everybody) p")
}

func (r asking) query() string {
	var cols []string
	for range 1 + r.IntN(3) {
		e := r.expr(r.IntN(4))
		if r.IntN(3) == 0 && !strings.HasSuffix(e, "*") {
			e += r.one(" as name", " as id", " as email", ` as "strange Name"`, " as x")
		}
		cols = append(cols, e)
	}
	list := strings.Join(cols, ", ")
	sel := "select " + r.one("", "", "distinct ") + list + " from " + r.from() + r.one("", " where p.id < 3", " where p.email like 'c%'", " order by 1", " limit 2", " where p.pin > 5 order by p.id")
	switch r.IntN(20) {
	case 0:
		return "with p as (select * from people) " + strings.Replace(sel, "from people p", "from p", 1)
	case 1:
		return "with w as (" + sel + ") select * from w"
	case 2:
		return sel + " " + r.one("union all", "union", "except", "intersect") + " " + sel
	case 3:
		return "update people p set name = " + r.one("name", "'n'", "email", "email::int", "p.doc->>'email'") + " where id = 1 returning " + list
	case 4:
		return "insert into people (id, email, name) select " + r.one("id", "-id", "id + 100") + ", " + r.one("email", "name") + ", name from people p returning id"
	case 5:
		return "delete from people p where p.email::int = 1 returning " + list
	case 6:
		return "copy (" + sel + ") to stdout"
	case 7:
		return r.one("copy people to stdout", "copy people (id, name) to stdout", "copy people (email) to stdout with (format csv)", "copy people from stdin", "copy (select * from everybody) to stdout with binary")
	case 8:
		return r.one("explain ", "explain verbose ", "explain analyze ") + sel
	case 9:
		return "prepare s as " + sel
	case 10:
		return r.one("execute s", "fetch all from c", "deallocate all", "close all", "discard all")
	case 11:
		return "declare c cursor with hold for " + sel
	case 12:
		return "select * from (" + sel + ") s"
	case 13:
		return r.one("select set_config('application_name', email, false) from people", "set application_name = 'x'", "show application_name", "do $$ begin raise notice '%', (select email from people limit 1); end $$",
			"table people", "select * from everybody", "select everybody from everybody", "values ((select email from people limit 1))", "select query_to_xml('select * from people', true, true, '')", "select * from people, jsonb_each(doc)",
			"select * from people natural join everybody", "select json_agg(p) from people p", "select array_agg(p) from people p", "select jsonb_path_query(doc, '$.email') from people", "select * from jsonb_to_recordset((select jsonb_agg(p) from people p)) as x(email text)",
			"select (x).* from (select p as x from people p) s", "select attmissingval from pg_attribute", "select most_common_vals from pg_stats where tablename = 'people'", "select doc['email'] from people", "select name from people group by name having max(email) > 'a'",
			"select count(email), min(pin), avg(pin) from people", "select email from people for update", "select string_agg(email, ',' order by id) over () from people", "lock table people", "select people.email from people people(email, x)")
	case 14:
		return "begin; " + sel + "; " + r.one("commit", "rollback")
	case 15:
		return sel + "; " + sel
	}
	return sel
}

func TestNoHiddenValueReachesTheClientWhateverIsAskedAndEveryStatementIsOnRecord(t *testing.T) {
	canaries(t, 1000, 1)
}

// canaries asks n random queries in text and binary, and looks for what is
// hidden in every byte that the client got.
func canaries(t *testing.T, n int, seed uint64) {
	admin, err := pgconn.Connect(t.Context(), server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	if _, err := admin.Exec(t.Context(), people).ReadAll(); err != nil {
		t.Fatal(err)
	}
	p := serve(t, masked(peopleRules...))
	r := asking{rand.New(rand.NewPCG(seed, 0))}
	var got bytes.Buffer
	var conn *pgconn.PgConn
	answered, refused, failed, rows, binaries := 0, 0, 0, 0, 0
	asked := make([]string, n)
	for i := range n {
		if conn == nil || conn.IsClosed() || i%50 == 0 {
			if conn != nil {
				_ = conn.Close(t.Context())
			}
			cfg, err := pgconn.ParseConfig(p.dsn(""))
			if err != nil {
				t.Fatal(err)
			}
			cfg.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) { return heard{c, &got}, nil }
			if conn, err = pgconn.ConnectConfig(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
		}
		sql := fmt.Sprintf("%s /* q%d. */", r.query(), i)
		got.Reset()
		asked[i] = sql
		mode := r.IntN(4)
		var err error
		switch {
		case strings.HasPrefix(sql, "copy"):
			if strings.Contains(sql, "from stdin") {
				_, err = conn.CopyFrom(t.Context(), strings.NewReader("canary\n"), sql)
			} else {
				_, err = conn.CopyTo(t.Context(), io.Discard, sql)
			}
		case mode == 0 || strings.Contains(sql, ";"):
			var results []*pgconn.Result
			results, err = conn.Exec(t.Context(), sql).ReadAll()
			for _, r := range results {
				rows += len(r.Rows)
			}
		default:
			formats := []int16(nil)
			if mode > 1 {
				formats = []int16{1}
				binaries++
			}
			res := conn.ExecParams(t.Context(), sql, nil, nil, nil, formats).Read()
			rows, err = rows+len(res.Rows), res.Err
		}
		var pg *pgconn.PgError
		switch {
		case err == nil:
			answered++
		case !errors.As(err, &pg):
			t.Fatalf("%s: %v", sql, err)
		case p.tap.reached(fmt.Sprintf("q%d.", i)):
			failed++
		default:
			refused++
		}
		if pg != nil && pg.Severity == "FATAL" {
			t.Errorf("%s: the guard did not see what its answer is: %v", sql, err)
		}
		if part := leaks(got.Bytes()); part != "" {
			t.Errorf("%s leaked %s (mode %d): %q", sql, part, mode, got.Bytes()[:min(got.Len(), 600)])
		}
		if conn.TxStatus() != 'I' {
			_, _ = conn.Exec(t.Context(), "rollback").ReadAll()
		}
	}
	t.Logf("%d answered with %d rows (%d asked in binary), %d failed at the target, %d refused", answered, rows, binaries, failed, refused)
	if answered < n/5 || rows < n/5 || failed == 0 || refused == 0 {
		t.Error("too few queries of some kind: this test shows too little")
	}
	if leaks(p.tap.answered.Bytes()) == "" {
		t.Error("nothing hidden ever left the target: this test shows nothing")
	}
	last := -1
	recorded := map[int]bool{}
	for _, u := range p.record.Uses() {
		if m := marker.FindStringSubmatch(u.Statement); m != nil {
			var i int
			_, _ = fmt.Sscan(m[1], &i)
			if i < last {
				t.Errorf("q%d is on record after q%d", i, last)
			}
			last, recorded[i] = i, true
		}
	}
	for i := range n {
		if reached := p.tap.reached(fmt.Sprintf("q%d.", i)); reached != recorded[i] && reached {
			t.Errorf("q%d reached the target and is not on record: %s", i, asked[i])
		}
	}
}

var marker = regexp.MustCompile(`q(\d+)\. \*/`)

// heard keeps what a connection reads.
type heard struct {
	net.Conn
	to *bytes.Buffer
}

func (h heard) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	h.to.Write(b[:n])
	return n, err
}
