package postgres

import (
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

func TestEachTypeIsHiddenInItsOwnWayInTextAndInBinary(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Column: "orders.email"}, store.MaskRule{Column: "orders.amount"}, store.MaskRule{Column: "orders.at"}, store.MaskRule{Field: "email"}, store.MaskRule{Detector: "card"}))
	conn, err := pgconn.Connect(t.Context(), p.dsn(""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	const sql = "select id, email, amount, at, doc, card, customer from orders where id = 1"
	for _, format := range []int16{0, 1} {
		res := conn.ExecParams(t.Context(), sql, nil, nil, nil, []int16{format}).Read()
		if res.Err != nil || len(res.Rows) != 1 {
			t.Fatal(res.Err, len(res.Rows))
		}
		row := res.Rows[0]
		doc := `{"n": 1, "email": "[masked]"}`
		if format == 1 {
			doc = "\x01" + doc
		}
		if string(row[1]) != "[masked]" || row[2] != nil || row[3] != nil || string(row[4]) != doc || row[5] != nil || string(row[6]) != "customer 1" {
			t.Errorf("format %d: %q", format, row)
		}
	}
	uses := p.uses()
	gatewaytest.Until(t, "outcomes", func() bool { return len(p.record.Outcomes()) == 2 })
	if o := p.record.Outcomes()[uses[0].ID]; o.Masked != 5 || o.Rows != 1 {
		t.Errorf("%+v", o)
	}
	if uses[0].Masking == "" || uses[0].Masking != p.session.Grant.Access.Masking.Digest() {
		t.Error("the use does not name the masking rules")
	}
}

func TestACardNumberIsHiddenInEveryTypeOfNumberAndUnderEachDisguiseOfText(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Detector: "card"}, store.MaskRule{Detector: "email"}))
	conn, err := pgconn.Connect(t.Context(), p.dsn(""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	const sql = `select card, card::float8, card::numeric, card::text, '4111' || chr(8203) || '111111111111', 'ada' || chr(173) || '@example.com',
		json_build_object('a', card::float8), ('{"a":41111111111111110000000000000000000000000000000000000000000000000e-49}')::json, 1.5::float8 from orders where id = 1`
	for _, format := range []int16{0, 1} {
		res := conn.ExecParams(t.Context(), sql, nil, nil, nil, []int16{format}).Read()
		if res.Err != nil || len(res.Rows) != 1 {
			t.Fatal(res.Err, len(res.Rows))
		}
		row := res.Rows[0]
		if row[0] != nil || row[1] != nil || row[2] != nil || string(row[3]) != "[masked]" || string(row[4]) != "[masked]" || string(row[5]) != "[masked]" ||
			string(row[6]) != `{"a" : "[masked]"}` || string(row[7]) != `{"a":"[masked]"}` || row[8] == nil {
			t.Errorf("format %d: %q", format, row)
		}
	}
}

func TestFormatsAreThoseOfBindWhateverWasDescribedBefore(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Field: "email"}))
	w := p.wire()
	w.send(&pgproto3.Parse{Query: "select doc from orders where id = 1"}, &pgproto3.Bind{DestinationPortal: "b", ResultFormatCodes: []int16{1}}, &pgproto3.Describe{ObjectType: 'P', Name: "b"},
		&pgproto3.Bind{DestinationPortal: "t"}, &pgproto3.Execute{Portal: "b"}, &pgproto3.Execute{Portal: "t"}, &pgproto3.Sync{})
	const doc = `{"n": 1, "email": "[masked]"}`
	if got := w.until('Z'); got != "1 2 T 2 D\x01"+doc+" C D"+doc+" C ZI" {
		t.Errorf("%q", got)
	}
}

func TestErrorsAndNoticesOfTheTargetAreWithheldWhereTheyMayQuoteAValue(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Column: "orders.email"}))
	out := p.psql(`
insert into orders (id, email) values (1, 'new@example.com');
select 'plain words'::int;
select nothing_there from orders;
select no_function(1);
`, "-v", "VERBOSITY=verbose")
	for _, leaked := range []string{"(id)=(1)", "plain words", "orders_pkey"} {
		if strings.Contains(out, leaked) {
			t.Errorf("psql was told %q:\n%s", leaked, out)
		}
	}
	if !strings.Contains(out, "23505") || !strings.Contains(out, "22P02") {
		t.Errorf("an SQLSTATE is missing:\n%s", out)
	}
	p = serve(t, everything())
	if out := p.psql("insert into orders (id) values (1);"); !strings.Contains(out, "Key (id)=(1) already exists") {
		t.Errorf("nothing is masked, and yet the target's words are withheld:\n%s", out)
	}
}

func TestWhatIsPreparedInTheProtocolIsMaskedHoweverItIsExecuted(t *testing.T) {
	p := serve(t, masked(store.MaskRule{Column: "orders.email"}))
	w := p.wire()
	w.send(&pgproto3.Query{String: "begin"}, &pgproto3.Parse{Name: "s", Query: "select email from orders where id = 1"},
		&pgproto3.Bind{DestinationPortal: "c", PreparedStatement: "s"}, &pgproto3.Sync{})
	w.until('Z')
	w.until('Z')
	for _, sql := range []string{"execute s", "fetch 1 from c"} {
		w.send(&pgproto3.Query{String: sql})
		if got := w.until('Z'); got != "T D[masked] C ZT" {
			t.Errorf("%s: %s", sql, got)
		}
	}
	w.send(&pgproto3.Parse{Query: "execute s"}, &pgproto3.Bind{ResultFormatCodes: []int16{1}}, &pgproto3.Execute{}, &pgproto3.Sync{})
	if got := w.until('Z'); got != "1 2 D[masked] C ZT" {
		t.Error(got)
	}
}

func TestRowsThatNoLongerFitTheCatalogAreWithheldAndTheNextConnectionReadsItAgain(t *testing.T) {
	admin, err := pgconn.Connect(t.Context(), server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	run := func(sql string) {
		t.Helper()
		if _, err := admin.Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
	run("drop table if exists changing; create table changing (id int, email text); insert into changing values (1, 'canary')")
	p := serve(t, masked(store.MaskRule{Column: "changing.email"}))
	conn := p.connect("simple_protocol")
	if _, err := conn.Exec(t.Context(), "select * from changing"); err != nil {
		t.Fatal(err)
	}
	run("alter table changing add first text; update changing set first = 'canary'")
	if _, err := conn.Exec(t.Context(), "select * from changing"); code(err) != "0A000" {
		t.Fatalf("after the table was altered: %v", err)
	}
	uses := p.uses()
	gatewaytest.Until(t, "its outcome", func() bool { return p.record.Outcomes()[uses[1].ID].Error == store.UseWithheld })
	if got := p.psql("select * from changing"); got != "1|[masked]|canary\n" {
		t.Errorf("a new connection: %q", got)
	}
}

func TestAnExcerptOfTheRowsIsRecordedMasked(t *testing.T) {
	access := masked(store.MaskRule{Column: "orders.email"})
	access.Postgres.Sample = 60
	p := serve(t, access)
	p.psql("select id, email, customer from orders order by id limit 3")
	gatewaytest.Until(t, "a sample on record", func() bool {
		for _, u := range p.record.Uses() {
			if u.Sample != "" {
				return strings.HasPrefix(u.Sample, "1\t[masked]\tcustomer 1\n2\t[masked]\tcustomer 2\n3") && len(u.Sample) <= 60
			}
		}
		return false
	})
}

func TestAStatementSentRightBeforeTheFarewellStillRuns(t *testing.T) {
	p := serve(t, everything())
	for i := range 10 {
		w := p.wire()
		w.send(&pgproto3.Query{String: fmt.Sprintf("insert into notes (body) values ('farewell %d')", i)}, &pgproto3.Terminate{})
		_ = w.Close()
	}
	gatewaytest.Until(t, "all of them", func() bool {
		return p.psql("select count(*) from notes where body like 'farewell%'") == "10\n"
	})
}
