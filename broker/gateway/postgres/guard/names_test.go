package guard

import (
	"testing"
)

// A column that the guard names otherwise than PostgreSQL could be taken for
// another of that name.
func TestColumnsHaveTheNamesThatPostgreSQLGivesThem(t *testing.T) {
	conn, _ := connect(t)
	sure := 0
	for _, e := range []string{
		"1", "'a'", "NULL", "true", "1 + 1", "note", "o.note", "(o).note", "o", "note::varchar", "1::int", "'1'::pg_catalog.int8", "'a'::varchar::text", "int '1'", "interval '1 day'",
		"(note || 'a')::text", "lower(note)", "pg_catalog.lower(note)", "lower(note)::varchar", "count(*) OVER ()", "note COLLATE \"C\"", "note AT TIME ZONE 'UTC'", "at AT TIME ZONE 'UTC'",
		"extract(year FROM at)", "substring(note FROM 1 FOR 2)", "trim(note)", "trim(leading 'x' from note)", "position('a' in note)", "overlay(note placing 'x' from 1)",
		"coalesce(note, 'a')", "nullif(note, 'a')", "greatest(1, 2)", "least(1, 2)", "ARRAY[1]", "ROW(1, 2)", "(1, 2)", "CASE WHEN true THEN note END", "CASE WHEN true THEN 1 ELSE id END",
		"CASE WHEN true THEN 1 ELSE 2 END", "CASE WHEN true THEN 1 ELSE lower(note)::text END", "CASE WHEN true THEN 1 ELSE 2::int END", "(SELECT note)", "(SELECT 1 AS one)", "(SELECT lower(note))", "(SELECT 1)", "(VALUES (1))",
		"EXISTS (SELECT 1)", "ARRAY(SELECT 1)", "1 IN (SELECT 1)", "1 = ANY (SELECT 1)", "1 IN (1, 2)", "id BETWEEN 1 AND 2", "note LIKE 'a'", "note IS NULL", "true AND false", "NOT true", "(true) IS TRUE", "id IS DISTINCT FROM 1",
		"tags[1]", "(tags)[1:2]", "(ARRAY[1, 2])[1]", "current_date", "current_timestamp", "current_user", "session_user", "localtime(2)", "current_schema", "now()", "- id", "customer -> 'a'",
		"make_date(year => 2020, month => 1, day => 1)", "(customer -> 'a')::text", "CAST(note AS char(3))", "note::char(3)[]", "id::double precision", "at::timestamp with time zone", "note IS NORMALIZED", "normalize(note)",
		"(SELECT x.a FROM (SELECT 1 AS a) x)", "(WITH w AS (SELECT 1 AS a) SELECT a FROM w)", "(SELECT note UNION SELECT 'a')", "collation for (note)", "(at, at) OVERLAPS (at, at)",
	} {
		sql := "SELECT " + e + " FROM orders o"
		stmts, why := parse(sql)
		if why != nil {
			t.Fatalf("%s: %s", e, why.reason)
		}
		got := figure(stmts[0].GetSelectStmt().TargetList[0].GetResTarget().Val)
		if got == "" {
			continue // not known, and so any
		}
		results, err := conn.Exec(t.Context(), sql).ReadAll()
		if err != nil {
			t.Logf("%s: %v", e, err)
			continue
		}
		sure++
		if want := results[0].FieldDescriptions[0].Name; got != want {
			t.Errorf("%s is named %q, and by PostgreSQL %q", e, got, want)
		}
	}
	if sure < 70 {
		t.Errorf("%d names were compared: too few", sure)
	}
}
