package guard

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
)

// scopes are the grants of testdata/guard.txt.
var scopes = map[string]struct {
	access store.PostgresAccess
	masked bool
	reads  bool // nothing may be written
}{
	"read":   {store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, true, true},
	"plain":  {store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, false, true},
	"write":  {store.PostgresAccess{Statements: []string{"select", "insert", "update", "delete"}, Tables: []string{"orders", "notes", "public.customers", "sales.orders"}}, true, false},
	"insert": {store.PostgresAccess{Statements: []string{"insert"}, Tables: []string{"notes"}}, true, false},
	"copy":   {store.PostgresAccess{Statements: []string{"select", "insert", "copy"}, Tables: []string{"*"}}, true, false},
	"all":    {store.PostgresAccess{Statements: []string{"select", "insert", "update", "delete", "copy"}, Tables: []string{"*"}, Everywhere: true}, false, false},
	"named": {store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"},
		Functions: []string{"reads", "twice", "sales.nothing", "pg_catalog.nextval"}}, true, true},
}

var row = regexp.MustCompile(`\A([-+!]) ([a-z]+) (?:\[([.#]*)\]|\((.*?)\)) (.+)\z`)

// fingerprint changes with anything that is written.
const fingerprint = `SELECT md5(string_agg(x, ',' ORDER BY x)) FROM (
	SELECT o::text FROM orders o UNION ALL SELECT n::text FROM notes n UNION ALL SELECT c::text FROM customers c UNION ALL SELECT v::text FROM vault v
	UNION ALL SELECT e::text FROM events e UNION ALL SELECT p::text FROM parent p UNION ALL SELECT r::text FROM ruled r UNION ALL SELECT d::text FROM sales.deals d
	UNION ALL SELECT last_value::text || is_called FROM counter UNION ALL SELECT 'class ' || oid || relname FROM pg_class WHERE oid > 16384 UNION ALL SELECT 'proc ' || proname FROM pg_proc
	UNION ALL SELECT 'role ' || rolname || rolsuper FROM pg_authid UNION ALL SELECT 'file ' || count(*) FROM pg_ls_dir('/tmp') f WHERE f = 'evil') AS all_of_it(x)`

func TestEachStatementIsLetThroughOrRefusedAsItsRowSaysBeforeASuperuser(t *testing.T) {
	conn, canaries := connect(t)
	catalog, m, l := loadCatalog(t, conn), newMasker(t), newLeaks(canaries)
	guards := map[string]*Guard{}
	for name, s := range scopes {
		var masker *masking.Masker
		if s.masked {
			masker = m
		}
		guards[name] = New(&s.access, masker, catalog)
	}
	ctx := context.Background()
	state := func() string {
		rows, err := querier{conn}.Query(ctx, fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		return rows[0][0]
	}
	text, err := os.ReadFile("testdata/guard.txt")
	if err != nil {
		t.Fatal(err)
	}
	before, rows, hostile := state(), 0, 0
	for i, line := range strings.Split(string(text), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		p := row.FindStringSubmatch(line)
		if p == nil || guards[p[2]] == nil {
			t.Fatalf("line %d is not understood: %s", i+1, line)
		}
		rows++
		at, sql := fmt.Sprintf("line %d: %s", i+1, p[5]), p[5]
		v := guards[p[2]].Check(sql)
		if p[1] == "-" {
			hostile++
			switch {
			case v.Refused == "":
				t.Errorf("%s\nis let through", at)
			case !strings.Contains(v.Refused, p[4]) || p[4] == "":
				t.Errorf("%s\nis refused because %q", at, v.Refused)
			case len(v.SQLState) != 5:
				t.Errorf("%s\nis refused with SQLSTATE %q", at, v.SQLState)
			}
			continue
		}
		if v.Refused != "" {
			t.Errorf("%s\nis refused because %q", at, v.Refused)
			continue
		}
		last := v.Statements[len(v.Statements)-1]
		got := ""
		for _, h := range last.Columns {
			got += map[bool]string{true: "#", false: "."}[h]
		}
		if want := p[3]; strings.Contains(want, "#") && got != want || !strings.Contains(want, "#") && got != "" {
			t.Errorf("%s\nhides [%s]", at, got)
		}
		s := scopes[p[2]]
		if !s.reads {
			_, _ = querier{conn}.Query(ctx, "BEGIN")
		}
		var results []*pgconn.Result
		if last.Copy == "out" {
			var out bytes.Buffer
			_, err = conn.CopyTo(ctx, &out, sql)
			if part := l.in(out.String()); s.masked && part != "" {
				t.Errorf("%s\ncopies %q", at, part)
			}
		} else {
			results, err = conn.Exec(ctx, sql).ReadAll()
		}
		if (err != nil) != (p[1] == "!") {
			t.Errorf("%s\nPostgreSQL: %v", at, err)
		}
		_, _ = querier{conn}.Query(ctx, "ROLLBACK")
		if s.masked && err == nil {
			// Where there are as many results as statements, each is judged by its own.
			for n, r := range results {
				st := &last
				if len(results) == len(v.Statements) {
					st = &v.Statements[n]
				}
				if leak, withheld := l.visible(m, st, r); leak != "" || withheld && !strings.Contains(sql, "unnest") {
					t.Errorf("%s\nleaks %s (withheld: %v)", at, leak, withheld)
				}
			}
		}
		if now := state(); now != before {
			t.Errorf("%s\nleft something written", at)
			before = now
		}
	}
	if rows < 200 || hostile < 150 {
		t.Errorf("%d rows, %d of them refused: too few", rows, hostile)
	}
}

func TestAnEmptyStatementIsLetThroughAndHasNothingInIt(t *testing.T) {
	g := New(&store.PostgresAccess{}, nil, &Catalog{})
	for _, sql := range []string{"", " ;; ", "-- nothing\n", "/* nothing */"} {
		if v := g.Check(sql); v.Refused != "" || len(v.Statements) != 0 {
			t.Errorf("%q: %+v", sql, v)
		}
	}
}

func TestWhatIsTooLongTooManyOrNotTextIsRefused(t *testing.T) {
	g := New(&store.PostgresAccess{Statements: []string{"select"}}, nil, &Catalog{path: []string{"pg_catalog"}})
	for what, sql := range map[string]string{
		"too long": "SELECT '" + strings.Repeat("x", maxStatement) + "'", "too many": strings.Repeat("SELECT 1;", maxStrings+1),
		"not UTF-8": "SELECT '\xff'", "zero byte": "SELECT 1\x00; DROP TABLE orders",
	} {
		if v := g.Check(sql); v.Refused == "" {
			t.Errorf("%s is let through", what)
		}
	}
	if v := g.Check("SELECT '" + strings.Repeat("(", maxStatement/2) + "'"); v.Refused != "" {
		t.Errorf("a long text is refused: %s", v.Refused)
	}
}

func TestAStatementWithANameThatPostgreSQLWouldClipIsRefused(t *testing.T) {
	g := New(&store.PostgresAccess{Statements: []string{"select"}}, nil, &Catalog{path: []string{"pg_catalog"}})
	for _, name := range []string{
		strings.Repeat("a", 64), strings.Repeat("u", 64), strings.Repeat("ä", 32), "a" + strings.Repeat("ä", 32), strings.Repeat("a", 32) + "$" + strings.Repeat("1", 31),
		`"` + strings.Repeat("a", 64) + `"`, `"` + strings.Repeat("a ", 32) + `"`, `"` + strings.Repeat("ä", 32) + `"`, `"` + strings.Repeat(`a""`, 32) + `"`,
		`U&"` + strings.Repeat(`\00e4`, 32) + `"`, `u&"` + strings.Repeat(`!4e2d`, 22) + `" UESCAPE '!'`, `"` + strings.Repeat("中", 21) + `	"`,
	} {
		for _, sql := range []string{"SELECT 1 AS " + name, "SELECT " + name + "()", "SELECT 1 FROM x AS " + name, "/* " + strings.Repeat("x", unscanned) + " */ SELECT 1 AS " + name} {
			if v := g.Check(sql); v.SQLState != "42622" {
				t.Errorf("%s: %q (%s)", sql, v.Refused, v.SQLState)
			}
		}
	}
	for _, sql := range []string{
		"SELECT 1 AS " + strings.Repeat("a", 63), `SELECT 1 AS "` + strings.Repeat("ä", 31) + `b"`, `SELECT 1 AS U&"` + strings.Repeat("a", 63) + `"`, "SELECT 1 AS u" + strings.Repeat("ä", 31),
		"SELECT '" + strings.Repeat("a", 64) + `', '"` + strings.Repeat("a", 64) + `"', $$"` + strings.Repeat("a", 64) + `"$$ /* "` + strings.Repeat("a", 64) + `" */ -- "` + strings.Repeat("a", 64) + `"`,
	} {
		if v := g.Check(sql); v.Refused != "" {
			t.Errorf("%s is refused: %s", sql, v.Refused)
		}
	}
}

func TestADatabaseInAnotherEncodingThanUTF8IsRefused(t *testing.T) {
	conn, _ := connect(t)
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		name := "in_" + strings.ToLower(encoding)
		if err := conn.Exec(t.Context(), "CREATE DATABASE "+name+" ENCODING '"+encoding+"' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").Close(); err != nil {
			t.Fatal(err)
		}
		other, err := pgconn.Connect(t.Context(), strings.Replace(server.DSN, "/postgres?", "/"+name+"?", 1)+"&search_path=public&client_encoding=UTF8")
		if err != nil {
			t.Fatal(err)
		}
		_, err = LoadCatalog(t.Context(), querier{other})
		_ = other.Close(context.Background())
		if err == nil || !strings.Contains(err.Error(), encoding) {
			t.Errorf("%s: %v", encoding, err)
		}
	}
}

func TestARefusalHoldsNoValueOfTheStatement(t *testing.T) {
	conn, _ := connect(t)
	g := New(&store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, newMasker(t), loadCatalog(t, conn))
	for _, sql := range []string{
		"SELECT '4111-1111' FROM", "SELECT 4111.1111 FROM x WHERE", `SELECT "4111-1111" FROM orders`, `SELECT "4111-1111"('x')`, `SELECT * FROM "4111-1111"`,
		`SELECT '1'::"4111-1111"`, `SET "4111-1111" = 1`, "DELETE FROM orders WHERE email = '4111-1111'", `SELECT "4111-1111".id FROM orders`,
	} {
		v := g.Check(sql)
		use := ""
		for _, s := range v.Statements {
			use += s.Use + strings.Join(s.Tables, "")
		}
		if v.Refused == "" || strings.Contains(v.Refused+use, "4111") {
			t.Errorf("%s: %q, %q", sql, v.Refused, use)
		}
	}
}

func TestAUseIsOneLineWithKindsAndTables(t *testing.T) {
	conn, _ := connect(t)
	a := scopes["all"].access
	g := New(&a, newMasker(t), loadCatalog(t, conn))
	for sql, want := range map[string]string{
		"SELECT * FROM orders o JOIN sales.deals d ON d.id = o.id WHERE note = 'x'": "SELECT orders, sales.deals",
		"WITH x AS (DELETE FROM notes RETURNING 1) SELECT * FROM x":                 "SELECT with DELETE notes",
		"INSERT INTO notes (id) SELECT id FROM orders":                              "INSERT notes, orders",
		"COPY notes FROM STDIN":           "COPY with INSERT notes",
		"START TRANSACTION":               "BEGIN",
		"SET application_name = 'secret'": "SET",
		"SELECT 1":                        "SELECT",
	} {
		if v := g.Check(sql); v.Refused != "" || v.Statements[0].Use != want {
			t.Errorf("%s: %q (%s)", sql, v.Statements[0].Use, v.Refused)
		}
	}
}

func TestWhatComesNearSomethingMaskedIsTainted(t *testing.T) {
	conn, _ := connect(t)
	a := scopes["all"].access
	g, plain := New(&a, newMasker(t), loadCatalog(t, conn)), New(&a, nil, loadCatalog(t, conn))
	for sql, want := range map[string]bool{
		"SELECT id FROM orders": true, "SELECT id FROM order_mails": true, "SELECT id FROM parent": true, "SELECT 1": false, "SELECT note FROM notes": false,
		"UPDATE notes SET note = 'x'": true, "SELECT 1 FROM notes WHERE id IN (SELECT id FROM orders)": true, "EXPLAIN SELECT 1 FROM orders": true,
		"COPY notes FROM STDIN": true, "BEGIN": false,
		"SELECT relname FROM pg_class": false, "SELECT relpartbound::text::int FROM pg_class": true, "SELECT b::text::int FROM (SELECT * FROM pg_class) s(b)": true,
		"SELECT pg_get_partition_constraintdef(oid)::int FROM pg_class": true, "SELECT c::text::int FROM pg_class c": true,
	} {
		if v := g.Check(sql); v.Refused != "" || v.Statements[0].Tainted != want {
			t.Errorf("%s: tainted %v (%s)", sql, v.Statements[0].Tainted, v.Refused)
		}
		if v := plain.Check(sql); v.Refused != "" || v.Statements[0].Tainted {
			t.Errorf("%s: tainted where nothing is masked (%s)", sql, v.Refused)
		}
	}
}

func TestOneGuardJudgesForManyAtOnce(t *testing.T) {
	conn, _ := connect(t)
	g := New(&store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, newMasker(t), loadCatalog(t, conn))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for n := range 100 {
				if v := g.Check(fmt.Sprintf("SELECT email, %d FROM orders", n*i)); v.Refused != "" || len(v.Statements[0].Columns) != 2 || !v.Statements[0].Columns[0] {
					t.Errorf("%+v", v)
					return
				}
			}
		})
	}
	all.Wait()
}

func TestEveryNameThatIsLetThroughIsOneOfPostgreSQLsOwn(t *testing.T) {
	conn, _ := connect(t)
	q := querier{conn}
	ctx := context.Background()
	rows, err := q.Query(ctx, `SELECT proname, bool_or(provolatile = 'v') FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND oid < 16384 GROUP BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	// Volatile, and yet without effect: they read the clock, chance, or sizes.
	harmless := set(`random current_query pg_tablespace_size clock_timestamp timeofday gen_random_uuid pg_table_size pg_total_relation_size pg_relation_size pg_indexes_size
		pg_database_size pg_is_in_recovery array_shuffle array_sample pg_partition_tree pg_partition_ancestors pg_postmaster_start_time json_populate_recordset`)
	for _, r := range rows {
		known[r[0]] = true
		if pureFunctions[r[0]] && r[1] == "t" && !harmless[r[0]] {
			t.Errorf("%s is volatile", r[0])
		}
	}
	// Later than 15, or written otherwise there.
	later := set("any_value erf erfc random_normal array_shuffle array_sample pg_basetype pg_input_is_valid date_add date_subtract")
	keywords := set("current_catalog user")
	for name := range pureFunctions {
		if !known[name] && !later[name] && !keywords[name] {
			t.Errorf("there is no function %s", name)
		}
	}
	for what, names := range map[string]map[string]bool{"SELECT n.nspname || '.' || relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace": systemRelations,
		"SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace": plainTypes} {
		rows, err := q.Query(ctx, what)
		if err != nil {
			t.Fatal(err)
		}
		known := map[string]bool{}
		for _, r := range rows {
			known[r[0]] = true
		}
		for name := range names {
			if !known[name] {
				t.Errorf("there is no %s", name)
			}
		}
	}
}

func FuzzCheckNeverPanics(f *testing.F) {
	text, err := os.ReadFile("testdata/guard.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, line := range strings.Split(string(text), "\n") {
		if p := row.FindStringSubmatch(line); p != nil {
			f.Add(p[5])
		}
	}
	conn, _ := connect(f)
	catalog, err := LoadCatalog(context.Background(), querier{conn})
	if err != nil {
		f.Fatal(err)
	}
	a := store.PostgresAccess{Statements: []string{"select", "insert", "update", "delete", "copy"}, Tables: []string{"*"}, Everywhere: true}
	g := New(&a, newMasker(f), catalog)
	f.Fuzz(func(t *testing.T, sql string) {
		v := g.Check(sql)
		if (v.Refused == "") != (v.SQLState == "") {
			t.Fatalf("refused %q with %q", v.Refused, v.SQLState)
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	conn, _ := connect(b)
	catalog, err := LoadCatalog(context.Background(), querier{conn})
	if err != nil {
		b.Fatal(err)
	}
	g := New(&store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, newMasker(b), catalog)
	b.Run("one", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if v := g.Check(fmt.Sprintf("SELECT note FROM orders WHERE id = %d", i)); v.Refused != "" {
				b.Fatal(v.Refused)
			}
		}
	})
	b.Run("again", func(b *testing.B) {
		for b.Loop() {
			g.Check("SELECT note FROM orders WHERE id = $1")
		}
	})
	b.Run("2KB", func(b *testing.B) {
		sql := "SELECT note FROM orders WHERE id IN (1" + strings.Repeat(", 12345", 280) + ")"
		for i := 0; b.Loop(); i++ {
			if v := g.Check(fmt.Sprintf("%s AND amount > %d", sql, i)); v.Refused != "" {
				b.Fatal(v.Refused)
			}
		}
	})
}
