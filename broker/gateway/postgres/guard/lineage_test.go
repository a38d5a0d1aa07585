package guard

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

// generator writes random queries that PostgreSQL mostly accepts.
type generator struct {
	*rand.Rand
	names   int
	windows bool // may stand here
}

type kind int

const (
	text kind = iota
	number
	doc
	boolean
	kinds
)

// field is a column in sight.
type field struct {
	table, name string
	kind        kind
}

func (g *generator) pick(list ...string) string { return list[g.IntN(len(list))] }

func (g *generator) fresh() string { g.names++; return fmt.Sprintf("n%d", g.names) }

var tables = map[string][]field{
	"orders": {{"", "id", number}, {"", "customer_id", number}, {"", "email", text}, {"", "amount", number}, {"", "note", text}, {"", "customer", doc},
		{"", "host", text}, {"", "size", number}},
	"customers":   {{"", "id", number}, {"", "name", text}, {"", "city", text}, {"", "pin", number}, {"", "token", text}},
	"notes":       {{"", "id", number}, {"", "note", text}, {"", "email", text}},
	"order_mails": {{"", "id", number}, {"", "mail", text}, {"", "note", text}},
	"order_rows":  {{"", "id", number}, {"", "doc", doc}},
	"totals":      {{"", "customer_id", number}, {"", "total", number}},
	"hidden_read": {{"", "id", number}, {"", "r", text}},
	"events":      {{"", "id", number}, {"", "email", text}, {"", "kind", text}},
	"sales.deals": {{"", "id", number}, {"", "email", text}},
}

// expr is an expression of a kind over what is in sight.
func (g *generator) expr(in []field, k kind, depth int) string {
	if depth <= 0 || g.IntN(4) == 0 {
		var of []field
		for _, f := range in {
			if f.kind == k {
				of = append(of, f)
			}
		}
		if len(of) > 0 && g.IntN(6) > 0 {
			f := of[g.IntN(len(of))]
			if f.table == "" || g.IntN(5) == 0 {
				return f.name
			}
			return f.table + "." + f.name
		}
		switch k {
		case text:
			return g.pick("'abc'", "'x'::text", "current_user::text", "NULL::text")
		case number:
			return g.pick("1", "2.5", "NULL::int")
		case doc:
			return g.pick(`'{"a": 1}'::jsonb`, "'[1]'::jsonb")
		}
		return g.pick("true", "false")
	}
	e := func(k kind) string { return g.expr(in, k, depth-1) }
	rows := g.sources(in)
	switch k {
	case text:
		switch g.IntN(22) {
		case 0:
			return "(" + e(text) + " || " + e(text) + ")"
		case 1:
			return g.pick("lower", "upper", "reverse", "btrim", "md5", "quote_literal") + "(" + e(text) + ")"
		case 2:
			return "left(" + e(text) + ", 8)"
		case 3:
			return "substring(" + e(text) + " FROM 2 FOR 8)"
		case 4:
			return "coalesce(" + e(text) + ", " + e(text) + ")"
		case 5:
			return "CASE WHEN " + e(boolean) + " THEN " + e(text) + " ELSE " + e(text) + " END"
		case 6:
			return "(" + e(doc) + ")::text"
		case 7:
			return "(" + e(doc) + " ->> 'plan')"
		case 8:
			return "jsonb_extract_path_text(" + e(doc) + ", 'ssn')"
		case 9:
			return "(SELECT " + g.pick("max", "min") + "(" + g.expr(nil, text, 0) + ")" + ")"
		case 10:
			q, cols := g.query(in, depth-2, []kind{text})
			if len(cols) == 1 {
				return "(" + q + " LIMIT 1)"
			}
			return "'q'"
		case 11:
			return "format('%s-%s', " + e(text) + ", " + e(number) + ")"
		case 12:
			return "concat_ws(',', " + e(text) + ", " + e(number) + ", " + e(text) + ")"
		case 13:
			if len(rows) > 0 {
				return "(" + g.pick(rows...) + ")::text"
			}
			return "'r'"
		case 14:
			return "array_to_string(ARRAY[" + e(text) + ", " + e(text) + "], '+')"
		case 15:
			return "regexp_replace(" + e(text) + ", '[0-9]', '', 'g')"
		case 16:
			return "encode(convert_to(" + e(text) + ", 'UTF8'), " + g.pick("'hex'", "'base64'", "'escape'") + ")"
		case 17:
			return "(" + e(number) + ")::text"
		case 18:
			return "nullif(" + e(text) + ", " + e(text) + ")"
		case 19:
			return "greatest(" + e(text) + ", " + e(text) + ")"
		case 20:
			if !g.windows {
				return "'w'"
			}
			return "(array_agg(" + e(text) + ") OVER (PARTITION BY " + e(number) + "))[1]"
		}
		return "translate(" + e(text) + ", 'x', 'y')"
	case number:
		switch g.IntN(8) {
		case 0:
			return "(" + e(number) + " + " + e(number) + ")"
		case 1:
			return "length(" + e(text) + ")"
		case 2:
			return "coalesce(" + e(number) + ", 0)"
		case 3:
			q, cols := g.query(in, depth-2, []kind{number})
			if len(cols) == 1 {
				return "(" + q + " LIMIT 1)"
			}
			return "7"
		case 4:
			return "abs(" + e(number) + ")"
		case 5:
			if !g.windows {
				return "9"
			}
			return "row_number() OVER (ORDER BY " + e(text) + ")"
		case 6:
			return "CASE WHEN " + e(boolean) + " THEN " + e(number) + " END"
		}
		return "round(" + e(number) + ")"
	case doc:
		switch g.IntN(7) {
		case 0:
			if len(rows) > 0 {
				return "to_jsonb(" + g.pick(rows...) + ")"
			}
			return "to_jsonb(" + e(text) + ")"
		case 1:
			return "jsonb_build_object('k', " + e(text) + ", 'n', " + e(number) + ")"
		case 2:
			return "to_jsonb(" + e(text) + ")"
		case 3:
			return "(" + e(doc) + " -> " + g.pick("'ssn'", "'plan'", "'k'") + ")"
		case 4:
			return "(" + e(doc) + " || " + e(doc) + ")"
		case 5:
			if len(rows) > 0 {
				return "row_to_json(" + g.pick(rows...) + ")::jsonb"
			}
			return "to_jsonb(ROW(" + e(text) + ", " + e(number) + "))"
		}
		return "jsonb_strip_nulls(" + e(doc) + ")"
	}
	switch g.IntN(7) {
	case 0:
		return "(" + e(text) + " < " + e(text) + ")"
	case 1:
		return "(" + e(number) + " > " + e(number) + ")"
	case 2:
		return "(" + e(text) + " LIKE '%a%')"
	case 3:
		return "(" + e(boolean) + g.pick(" AND ", " OR ") + e(boolean) + ")"
	case 4:
		q, _ := g.query(in, depth-2, nil)
		return "EXISTS (" + q + ")"
	case 5:
		q, cols := g.query(in, depth-2, []kind{text})
		if len(cols) == 1 {
			return e(text) + " IN (" + q + ")"
		}
		return "true"
	}
	return "(" + e(text) + " IS NOT NULL)"
}

// sources are the tables in sight, for whole rows.
func (g *generator) sources(in []field) (out []string) {
	seen := map[string]bool{}
	for _, f := range in {
		if f.table != "" && !seen[f.table] {
			seen[f.table] = true
			out = append(out, f.table)
		}
	}
	return out
}

func named(alias string, fields []field) []field {
	out := make([]field, len(fields))
	for i, f := range fields {
		out[i] = field{alias, f.name, f.kind}
	}
	return out
}

// from is an entry of FROM and what it brings into sight.
func (g *generator) from(outer []field, ctes map[string][]field, depth int) (string, []field) {
	alias := g.fresh()
	if g.IntN(12) == 0 {
		alias = g.pick("note", "email", "o") // a name that is a column's too
	}
	switch n := g.IntN(16); {
	case n < 2 && len(ctes) > 0:
		for name, fields := range ctes {
			return name + " AS " + alias, named(alias, fields)
		}
	case n < 5 && depth > 0:
		q, fields := g.query(outer, depth-1, nil)
		if len(fields) > 0 && g.IntN(3) == 0 {
			list := make([]string, len(fields))
			for i := range fields {
				fields[i].name = g.fresh()
				list[i] = fields[i].name
			}
			return g.pick("", "LATERAL ") + "(" + q + ") AS " + alias + "(" + strings.Join(list, ", ") + ")", named(alias, fields)
		}
		return g.pick("", "LATERAL ") + "(" + q + ") AS " + alias, named(alias, fields)
	case n == 5:
		return "jsonb_each_text(jsonb_build_object('k', " + g.expr(outer, doc, 1) + ")) AS " + alias, []field{{alias, "key", text}, {alias, "value", text}}
	case n == 6:
		return "unnest(ARRAY[" + g.expr(outer, text, 1) + "], ARRAY[" + g.expr(outer, number, 1) + "]) AS " + alias + "(u, v)", []field{{alias, "u", text}, {alias, "v", number}}
	case n == 7:
		return "(VALUES (" + g.expr(nil, text, 1) + ", 1), ('v', 2)) AS " + alias, []field{{alias, "column1", text}, {alias, "column2", number}}
	case n == 8 && g.IntN(4) == 0:
		return "unnest(ARRAY(SELECT orders FROM orders)) AS " + alias, []field{{alias, "email", text}, {alias, "note", text}, {alias, "id", number}}
	}
	names := []string{"orders", "customers", "notes", "order_mails", "order_rows", "totals", "hidden_read", "events", "sales.deals"}
	name := names[g.IntN(len(names))]
	return name + " AS " + alias, named(alias, tables[name])
}

// query is a query that returns columns of the kinds wanted, or any.
func (g *generator) query(outer []field, depth int, want []kind) (string, []field) {
	sql, ctes := "", map[string][]field{}
	defer func(was bool) { g.windows = was }(g.windows)
	g.windows = false
	if depth > 1 && g.IntN(4) == 0 {
		name := g.fresh()
		if g.IntN(3) == 0 {
			name = "orders" // shadows the table
		}
		if g.IntN(3) == 0 {
			q, fields := g.query(nil, 0, []kind{number, text})
			if len(fields) == 2 {
				sql = "WITH RECURSIVE " + name + "(a, b) AS (SELECT q.a::numeric, q.b::text FROM (" + q + ") AS q(a, b) UNION SELECT t.a::numeric, " + g.expr([]field{{"t", "b", text}, {"o2", "note", text}, {"o2", "email", text}}, text, 2) + " FROM " + name + " t, public.orders o2 WHERE o2.id = 3) "
				ctes[name] = []field{{"", "a", number}, {"", "b", text}}
			}
		} else {
			q, fields := g.query(nil, depth-1, nil)
			sql = "WITH " + name + " AS (" + q + ") "
			ctes[name] = fields
		}
	}
	first, in := g.from(outer, ctes, depth)
	from, all, star := first, append([]field{}, in...), true
	for range g.IntN(3) {
		entry, more := g.from(append(append([]field{}, outer...), all...), ctes, depth-1)
		switch g.IntN(4) {
		case 0:
			from += ", " + entry
		case 1:
			from += " LEFT JOIN " + entry + " ON " + g.expr(more, boolean, 1)
		case 2:
			if has(all, "id") == 1 && has(more, "id") == 1 {
				from += " JOIN " + entry + " USING (id)"
			} else {
				from += " CROSS JOIN " + entry
			}
		default:
			from += g.pick(" CROSS JOIN ", " CROSS JOIN ", " CROSS JOIN ", " NATURAL JOIN ") + entry
		}
		all = append(all, more...)
	}
	see := append(append([]field{}, all...), outer...)
	var list []string
	var fields []field
	if want == nil && star && g.IntN(4) == 0 {
		list = append(list, "*")
		if !strings.Contains(from, " USING ") && !strings.Contains(from, " NATURAL ") {
			fields = named("", all)
		}
	}
	if want == nil && len(list) == 0 {
		for range 1 + g.IntN(3) {
			want = append(want, kind(g.IntN(int(kinds))))
		}
	}
	group := g.IntN(6) == 0 && len(list) == 0
	for _, k := range want {
		g.windows = !group
		e := g.expr(see, k, depth)
		g.windows = false
		if group {
			switch k {
			case text:
				e = g.pick("max(", "min(", "string_agg(DISTINCT ") + e
				if strings.HasPrefix(e, "string") {
					e += ", ','"
				}
				e += ")"
			case number:
				e = g.pick("sum(", "max(", "count(") + e + ")"
			case doc:
				e = "jsonb_agg(" + e + ")"
			case boolean:
				e = "bool_or(" + e + ")"
			}
		}
		name := g.fresh()
		if g.IntN(5) == 0 {
			name = g.pick("email", "note", "id")
		}
		list, fields = append(list, e+" AS "+name), append(fields, field{"", name, k})
	}
	sql += "SELECT " + g.pick("", "", "", "ALL ") + strings.Join(list, ", ") + " FROM " + from
	if g.IntN(3) == 0 {
		sql += " WHERE " + g.expr(see, boolean, 2)
	}
	if depth > 0 && len(fields) > 0 && list[0] != "*" && g.IntN(6) == 0 {
		var of []kind
		for _, f := range fields {
			of = append(of, f.kind)
		}
		if more, other := g.query(outer, depth-1, of); len(other) == len(fields) {
			sql = "(" + sql + " LIMIT 50) " + g.pick("UNION", "UNION ALL", "INTERSECT", "EXCEPT") + " (" + more + " LIMIT 50)"
		}
	}
	return sql, fields
}

func has(fields []field, name string) (n int) {
	for _, f := range fields {
		if f.name == name {
			n++
		}
	}
	return n
}

// A column that is not said to be hidden holds no part of what is masked,
// whatever the query makes of it.
func TestNothingMaskedStandsInWhatIsNotHidden(t *testing.T) {
	conn, canaries := connect(t)
	m, l := newMasker(t), newLeaks(canaries)
	g := New(&store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*", "sales.*"}}, m, loadCatalog(t, conn))
	ctx := context.Background()
	if err := conn.Exec(ctx, "SET statement_timeout = '100ms'; SET work_mem = '16MB'").Close(); err != nil {
		t.Fatal(err)
	}
	var refused, failed, withheld, shown, columns, rows int
	why, wrong := map[string]int{}, map[string]int{}
	for seed := range uint64(queries) {
		gen := &generator{Rand: rand.New(rand.NewPCG(seed, 5))}
		sql, _ := gen.query(nil, 1+gen.IntN(3), nil)
		sql += " LIMIT 40"
		v := g.Check(sql)
		if v.Refused != "" {
			refused++
			why[v.Refused]++
			continue
		}
		results, err := conn.Exec(ctx, sql).ReadAll()
		if err != nil {
			failed++
			wrong[err.Error()]++
			if conn.IsClosed() {
				t.Fatalf("seed %d: %v\n%s", seed, err, sql)
			}
			continue
		}
		leak, held := l.visible(m, &v.Statements[0], results[0])
		if leak != "" {
			t.Fatalf("seed %d: %s\n%s\n%v", seed, leak, sql, v.Statements[0].Columns)
		}
		if held {
			withheld++
			continue
		}
		rows += len(results[0].Rows)
		columns += len(results[0].FieldDescriptions)
		shown += len(results[0].FieldDescriptions)
		for _, h := range v.Statements[0].Columns {
			if h {
				shown--
			}
		}
	}
	t.Logf("%d queries: %d refused, %d in error, %d withheld; %d of %d columns shown, %d rows", queries, refused, failed, withheld, shown, columns, rows)
	if testing.Verbose() {
		t.Log(why)
		t.Log(wrong)
	}
	if refused+failed > queries*6/10 || withheld > queries/50 || shown*10 < columns || rows == 0 {
		t.Error("too few queries were looked at, or too little was shown, for this to say something")
	}
}
