package guard

import (
	"context"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

func TestOnlyIntegersBehindAnEqualsSignInPlainTextAreLeftOutOfAShape(t *testing.T) {
	for sql, want := range map[string]string{
		"SELECT abalance FROM pgbench_accounts WHERE aid = 12345;": "SELECT abalance FROM pgbench_accounts WHERE aid = 0;",
		"SELECT 5 FROM t WHERE a=7 and (b) =\n 8 ORDER BY 2":       "SELECT 5 FROM t WHERE a=0 and (b) =\n 0 ORDER BY 2",
		"SELECT a FROM t WHERE (a = 7) LIMIT 3":                    "SELECT a FROM t WHERE (a = 0) LIMIT 3",
		"SELECT a FROM t WHERE a = 1234567890":                     "SELECT a FROM t WHERE a = 1234567890",
		"SELECT a FROM t WHERE a = 7.5":                            "SELECT a FROM t WHERE a = 7.5",
		"SELECT a FROM t WHERE a = 0x1F":                           "SELECT a FROM t WHERE a = 0x1F",
		"SELECT a FROM t WHERE a = 1_000":                          "SELECT a FROM t WHERE a = 1_000",
		"SELECT a FROM t WHERE a = 1e5":                            "SELECT a FROM t WHERE a = 1e5",
		"SELECT a FROM t WHERE a = 7b":                             "SELECT a FROM t WHERE a = 7b",
		"SELECT a FROM t WHERE a *= 7":                             "SELECT a FROM t WHERE a *= 7",
		"SELECT a FROM t WHERE a == 7":                             "SELECT a FROM t WHERE a == 7",
		"SELECT f(a = 7, 8)":                                       "SELECT f(a = 7, 8)",
		"SELECT a FROM t WHERE a = 'x'":                            "",
		"SELECT a FROM t WHERE a = 7::text":                        "",
		"SELECT a FROM t -- a = 7":                                 "",
		"SELECT a FROM t /* a = 7 */":                              "",
		"SELECT a FROM t WHERE a >= 7":                             "",
		"SELECT a FROM t WHERE a = $1":                             "",
		"SELECT ä FROM t WHERE a = 7":                              "",
		"SELECT \"a\" FROM t WHERE a = 7":                          "",
		"SELECT a FROM t WHERE a = 7 " + strings.Repeat(" ", 1000): "",
	} {
		if got := string(shape(nil, sql)); got != want {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
}

// FuzzAShapeHasOneVerdict compares the verdict on a text with that on its shape.
func FuzzAShapeHasOneVerdict(f *testing.F) {
	text, err := os.ReadFile("testdata/guard.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, line := range strings.Split(string(text), "\n") {
		if p := row.FindStringSubmatch(line); p != nil {
			f.Add(p[5])
			f.Add("SELECT email, id = 42 FROM (" + strings.TrimSuffix(p[5], ";") + ") q WHERE id = 17")
		}
	}
	for _, sql := range []string{
		"SELECT id FROM orders WHERE id = 7 GROUP BY 1 ORDER BY id = 3", "SET statement_timeout = 7", "SELECT set_config(a = 7)",
		"SELECT count(*) FROM orders WHERE id=5 AND id = 6;", "SELECT id FROM orders WHERE id = 7; SELECT id = 8", "UPDATE orders SET id = 7 WHERE id = 8",
		"WITH x AS (DELETE FROM orders WHERE id = 7 RETURNING id) SELECT id = 8 FROM x", "SELECT id = 7 id FROM orders LIMIT 3",
	} {
		f.Add(sql)
	}
	conn, _ := connect(f)
	catalog, err := LoadCatalog(context.Background(), querier{conn})
	if err != nil {
		f.Fatal(err)
	}
	var guards []*Guard
	for _, a := range []store.PostgresAccess{
		{Statements: []string{"select"}, Tables: []string{"*"}},
		{Statements: []string{"select", "insert", "update", "delete", "copy"}, Tables: []string{"*"}, Everywhere: true},
	} {
		guards = append(guards, New(&a, nil, catalog), New(&a, newMasker(f), catalog))
	}
	f.Fuzz(func(t *testing.T, sql string) {
		form := string(shape(nil, sql))
		if form == "" {
			return
		}
		for _, g := range guards {
			v, w := g.check(sql), g.check(form)
			if v.shaped() != w.shaped() || v.shaped() && !reflect.DeepEqual(v, w) {
				t.Fatalf("%q: %+v, and of its shape %q: %+v", sql, v, form, w)
			}
			if got := g.Check(sql); v.shaped() && !reflect.DeepEqual(got, v) || got.Refused != v.Refused {
				t.Fatalf("%q: %+v from the cache, want %+v", sql, got, v)
			}
		}
	})
}
