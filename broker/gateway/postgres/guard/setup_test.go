package guard

import (
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

// schema is what the tests' superuser sees. %s stand for canaries: values that
// are masked, and whose parts stand nowhere else.
const schema = `
CREATE DOMAIN secret_text AS text;
CREATE TABLE customers (id int PRIMARY KEY, name text, city text, pin bigint, token secret_text);
CREATE TABLE orders (id int PRIMARY KEY, customer_id int REFERENCES customers, email text, amount numeric, note text, customer jsonb, tags text[], at timestamptz DEFAULT '2026-01-01',
	host text GENERATED ALWAYS AS (split_part(email, '@', 2)) STORED, size int GENERATED ALWAYS AS (length(note)) STORED);
CREATE TABLE notes (id int PRIMARY KEY, note text, email text);
CREATE TABLE vault (id int, secret text);
CREATE TABLE events (id int, email text, kind text) PARTITION BY LIST (kind);
CREATE TABLE events_a PARTITION OF events FOR VALUES IN ('a');
CREATE TABLE parent (id int, mail text);
CREATE TABLE child (extra text) INHERITS (parent);
CREATE TABLE ruled (id int);
CREATE RULE r AS ON INSERT TO ruled DO ALSO DELETE FROM vault;
CREATE TABLE letters (id int, email text) PARTITION BY LIST (email);
CREATE SCHEMA sales;
CREATE TABLE sales.deals (id int, email text);
CREATE TABLE sales.orders (id int);
CREATE VIEW order_mails AS SELECT id, lower(email) AS mail, note FROM orders;
CREATE VIEW order_rows AS SELECT id, to_jsonb(o) AS doc FROM orders o;
CREATE VIEW order_view_view AS SELECT mail AS m, id FROM order_mails;
CREATE VIEW totals AS SELECT customer_id, sum(amount) AS total FROM orders GROUP BY 1;
CREATE FUNCTION reads(i int) RETURNS text LANGUAGE sql STABLE AS 'SELECT email FROM orders WHERE id = i';
CREATE FUNCTION twice(i int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * i';
CREATE FUNCTION wipe() RETURNS int LANGUAGE sql AS 'DELETE FROM vault; SELECT 1';
CREATE FUNCTION public.initcap(i int) RETURNS int LANGUAGE sql AS 'DELETE FROM vault; SELECT 1';
CREATE FUNCTION wipes(a int, b int) RETURNS bool LANGUAGE sql AS 'DELETE FROM vault; SELECT true';
CREATE OPERATOR === (LEFTARG = int, RIGHTARG = int, FUNCTION = wipes);
CREATE VIEW hidden_read AS SELECT id, reads(id) AS r FROM customers;
CREATE VIEW bounds AS SELECT relname, pg_get_expr(relpartbound, oid) AS bound, pg_get_partition_constraintdef(oid) AS def FROM pg_class;
CREATE SEQUENCE counter;
CREATE TYPE secret_span AS RANGE (SUBTYPE = secret_text, COLLATION = "C", MULTIRANGE_TYPE_NAME = secret_spans);
CREATE DOMAIN own_span AS secret_span;
CREATE TABLE spans (id int, one secret_span, many secret_spans, list secret_span[], own own_span);
INSERT INTO vault VALUES (1, 'unreached');
INSERT INTO notes VALUES (1, 'first', 'public'), (2, 'second', 'public too');
`

// server is the PostgreSQL of all tests of this package.
var server *postgrestest.Server

func TestMain(m *testing.M) {
	s, err := postgrestest.Start("fsync=off")
	if err != nil && !errors.Is(err, postgrestest.ErrNotInstalled) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	server = s
	code := m.Run()
	if server != nil {
		_ = server.Remove()
	}
	os.Exit(code)
}

// canary returns n letters that no hexadecimal digit is among.
func canary(r *rand.Rand, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = "ghijkmpqrvwxyz"[r.IntN(14)]
	}
	return string(b)
}

// connect returns a superuser's connection to a database of its own with schema
// in it, and the canaries.
func connect(t testing.TB) (conn *pgconn.PgConn, canaries []string) {
	t.Helper()
	if server == nil {
		t.Fatal(postgrestest.ErrNotInstalled)
	}
	ctx := context.Background()
	admin, err := pgconn.Connect(ctx, server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(ctx)
	name := fmt.Sprintf("guard%d", rand.Uint64())
	if err := admin.Exec(ctx, "CREATE DATABASE "+name).Close(); err != nil {
		t.Fatal(err)
	}
	dsn := strings.Replace(server.DSN, "/postgres?", "/"+name+"?", 1) + "&search_path=public&client_encoding=UTF8"
	if conn, err = pgconn.Connect(ctx, dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(ctx) })
	r := rand.New(rand.NewPCG(1, 2))
	sql := schema
	for i := 1; i <= 6; i++ {
		pin := fmt.Sprintf("%d", 730_000_000_000+r.Int64N(9_000_000_000))
		token, mail, host, ssn := canary(r, 14), canary(r, 12), canary(r, 10), canary(r, 12)
		canaries = append(canaries, pin, token, mail, host, ssn)
		sql += fmt.Sprintf("INSERT INTO customers VALUES (%d, 'name %d', 'city %d', %s, '%s');\n", i, i, i%3, pin, token)
		sql += fmt.Sprintf("INSERT INTO orders VALUES (%d, %d, '%s@%s', %d.5, 'note %d', '{\"plan\": \"p%d\", \"ssn\": \"%s\", \"list\": [%d]}', '{a,b%d}');\n", i, i, mail, host, i, i, i, ssn, i, i)
		sql += fmt.Sprintf("INSERT INTO events VALUES (%d, '%s', 'a'); INSERT INTO parent VALUES (%d, '%s'); INSERT INTO child VALUES (%d, '%s', 'x'); INSERT INTO sales.deals VALUES (%d, '%s');\n",
			i, mail, i, mail, i, mail, i, mail)
		sql += fmt.Sprintf("CREATE TABLE letters_%d PARTITION OF letters FOR VALUES IN ('%s');\n", i, mail)
		sql += fmt.Sprintf("INSERT INTO spans VALUES (%d, '[%s,%s]', '{[%s,%s]}', '{\"[%s,%s]\"}', '[%s,%s]');\n", i, token, token, token, token, token, token, token, token)
	}
	if err := conn.Exec(ctx, sql).Close(); err != nil {
		t.Fatal(err)
	}
	return conn, canaries
}

// querier is a Querier over a connection.
type querier struct{ *pgconn.PgConn }

func (q querier) Query(ctx context.Context, sql string) ([][]string, error) {
	results, err := q.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for _, r := range results {
		for _, row := range r.Rows {
			texts := make([]string, len(row))
			for i, v := range row {
				texts[i] = string(v)
			}
			rows = append(rows, texts)
		}
	}
	return rows, nil
}

// masks hides all canaries.
var masks = store.Masking{Rules: []store.MaskRule{{Column: "orders.email"}, {Column: "events_a.email"}, {Column: "letters.email"}, {Column: "parent.mail"}, {Column: "sales.deals.email"},
	{Column: "customers.pin"}, {Type: "secret_text"}, {Field: "ssn"}}}

func newMasker(t testing.TB) *masking.Masker {
	t.Helper()
	m, err := masking.New(masks)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func loadCatalog(t testing.TB, conn *pgconn.PgConn) *Catalog {
	t.Helper()
	c, err := LoadCatalog(context.Background(), querier{conn})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// leaks is what to look for in what is not hidden: runs of six characters of
// each canary, forwards and backwards, in lower case, and likewise of its usual
// encodings.
type leaks map[string]bool

const run = 6

func newLeaks(canaries []string) leaks {
	l := leaks{}
	for _, c := range canaries {
		b := []byte(c)
		for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
			b[i], b[j] = b[j], b[i]
		}
		for _, s := range []string{c, string(b), encodings(c)[0], encodings(c)[1], encodings(c)[2]} {
			s = strings.ToLower(s)
			for i := 0; i+run <= len(s); i++ {
				l[s[i:i+run]] = true
			}
		}
	}
	return l
}

// in returns a part of a canary that stands in s.
func (l leaks) in(s string) string {
	s = strings.ToLower(s)
	for i := 0; i+run <= len(s); i++ {
		if l[s[i:i+run]] {
			return s[i : i+run]
		}
	}
	return ""
}

// visible checks that no canary stands in what is handed on of a result, masked
// as the gateway masks it; withheld says that nothing is.
func (l leaks) visible(m *masking.Masker, st *Statement, r *pgconn.Result) (leak string, withheld bool) {
	if len(r.Rows) == 0 {
		return "", false
	}
	if st.Columns != nil && len(st.Columns) != len(r.FieldDescriptions) {
		return "", true
	}
	for _, row := range r.Rows {
		for i, v := range row {
			if st.Columns != nil && st.Columns[i] {
				continue
			}
			if oid := r.FieldDescriptions[i].DataTypeOID; (oid == 114 || oid == 3802) && v != nil {
				out, _, err := m.JSON(v)
				if err != nil {
					return "not JSON: " + string(v), false
				}
				v = out
			}
			if part := l.in(string(v)); part != "" {
				return fmt.Sprintf("column %d (%s): %q stands in %q", i+1, r.FieldDescriptions[i].Name, part, v), false
			}
		}
	}
	return "", false
}

func encodings(c string) [3]string {
	sum := md5.Sum([]byte(c))
	return [3]string{hex.EncodeToString(sum[:]), hex.EncodeToString([]byte(c)), base64.StdEncoding.EncodeToString([]byte(c))[:len(c)]}
}
