package guard

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Querier runs one query on the target and returns its rows as text, with "" for
// NULL. The error is the target's.
type Querier interface {
	Query(ctx context.Context, sql string) ([][]string, error)
}

// Catalog is what the guard knows of a target: what names mean there, and what
// can carry what. It does not change. What is created after it was read is not
// known, and refused.
type Catalog struct {
	path      []string // schemas in the order in which names are looked up
	relations map[string]map[string]*relation
	byOID     map[string]*relation
	types     map[string]*dataType            // by OID
	typeNames map[string]map[string]*dataType // by schema and name
	functions map[string]map[string]function  // by name and schema, without PostgreSQL's own
	operators map[string]bool                 // names of operators that neither PostgreSQL nor an extension made
	attrs     map[string]bool                 // names of columns and fields that no function bears
}

type relation struct {
	schema, name string
	kind         byte // pg_class.relkind
	system       bool // pg_catalog or information_schema
	columns      []column
	rules        bool   // has rules that rewrite what is written to it
	def          string // SQL, of views
	heirs        []*relation
}

type column struct {
	name      string
	typ       *dataType
	generated string // the expression, of generated columns
}

type dataType struct {
	schema, name   string
	kind           byte // pg_type.typtype
	elem, base, of string
	span           string // OID of what a range is over, and of the range of a multirange
}

// function is all functions of one name in one schema.
type function struct {
	pure      bool // none reads the database (IMMUTABLE)
	extension bool // an extension made all of them
}

// qualified is r's name as the rules of a grant write it.
func (r *relation) qualified() string {
	if r.schema == "public" {
		return r.name
	}
	return r.schema + "." + r.name
}

// isView reports whether r has a definition that reads other relations.
func (r *relation) isView() bool { return r.kind == 'v' || r.kind == 'm' }

// systemSchemas are those whose relations are refused but for systemRelations.
var systemSchemas = []string{"pg_catalog", "information_schema"}

// LoadCatalog reads what the target holds. It refuses a target whose settings
// make it read SQL otherwise than the guard does. q's connection must have the
// search_path and encoding that clients will have.
func LoadCatalog(ctx context.Context, q Querier) (*Catalog, error) {
	c := &Catalog{relations: map[string]map[string]*relation{}, byOID: map[string]*relation{}, types: map[string]*dataType{},
		typeNames: map[string]map[string]*dataType{}, functions: map[string]map[string]function{}, operators: map[string]bool{}, attrs: map[string]bool{}}
	var failed error
	each := func(columns int, sql string, row func(v []string)) {
		if failed != nil {
			return
		}
		rows, err := q.Query(ctx, sql)
		if err != nil {
			failed = fmt.Errorf("read the target's catalog: %w", err)
			return
		}
		for _, v := range rows {
			if len(v) != columns {
				failed = errors.New("read the target's catalog: an answer of another shape")
				return
			}
			row(v)
		}
	}
	settings := map[string]string{}
	each(2, `SELECT n, pg_catalog.current_setting(n) FROM (VALUES ('standard_conforming_strings'), ('client_encoding'), ('server_encoding')) AS s(n)`,
		func(v []string) { settings[v[0]] = v[1] })
	if failed == nil && (settings["standard_conforming_strings"] != "on" || settings["client_encoding"] != "UTF8") {
		return nil, errors.New("the target must have standard_conforming_strings on and client_encoding UTF8")
	}
	// Elsewhere PostgreSQL may fold letters beyond ASCII in names, as the parser does not.
	if e := settings["server_encoding"]; failed == nil && e != "UTF8" {
		return nil, fmt.Errorf("the target's database must have the encoding UTF8, and has %q", e)
	}
	each(1, `SELECT s FROM pg_catalog.unnest(pg_catalog.current_schemas(true)) WITH ORDINALITY AS p(s, n) ORDER BY n`,
		func(v []string) { c.path = append(c.path, v[0]) })
	each(7, `SELECT t.oid, n.nspname, t.typname, t.typtype, CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE 0 END, t.typbasetype, t.typrelid
		FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname !~ '^pg_(toast|temp)'`,
		func(v []string) {
			t := &dataType{schema: v[1], name: v[2], kind: v[3][0], elem: v[4], base: v[5], of: v[6]}
			c.types[v[0]] = t
			if c.typeNames[t.schema] == nil {
				c.typeNames[t.schema] = map[string]*dataType{}
			}
			c.typeNames[t.schema][t.name] = t
		})
	// rngmultitypid is there from PostgreSQL 14 on: to_jsonb asks for no name.
	each(2, `SELECT rngtypid::pg_catalog.text, rngsubtype::pg_catalog.text FROM pg_catalog.pg_range
		UNION ALL SELECT pg_catalog.to_jsonb(r) ->> 'rngmultitypid', rngtypid::pg_catalog.text FROM pg_catalog.pg_range r`,
		func(v []string) {
			if t := c.types[v[0]]; t != nil {
				t.span = v[1]
			}
		})
	each(7, `SELECT c.oid, n.nspname, c.relname, c.relkind, COALESCE(a.attname, ''), COALESCE(a.atttypid, 0), CASE WHEN a.attgenerated <> '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) ELSE '' END
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
		LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
		WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c') AND n.nspname !~ '^pg_(toast|temp)'
		AND (n.nspname NOT IN ('pg_catalog', 'information_schema') OR n.nspname || '.' || c.relname IN ('`+strings.Join(slices.Sorted(keys(systemRelations)), "', '")+`'))
		ORDER BY c.oid, a.attnum`,
		func(v []string) {
			r := c.byOID[v[0]]
			if r == nil {
				r = &relation{schema: v[1], name: v[2], kind: v[3][0], system: slices.Contains(systemSchemas, v[1])}
				c.byOID[v[0]] = r
				if c.relations[r.schema] == nil {
					c.relations[r.schema] = map[string]*relation{}
				}
				c.relations[r.schema][r.name] = r
			}
			if v[4] != "" {
				r.columns = append(r.columns, column{name: v[4], typ: c.types[v[5]], generated: v[6]})
			}
		})
	each(2, `SELECT inhrelid, inhparent FROM pg_catalog.pg_inherits`, func(v []string) {
		if child, parent := c.byOID[v[0]], c.byOID[v[1]]; child != nil && parent != nil {
			parent.heirs = append(parent.heirs, child)
		}
	})
	each(2, `SELECT c.oid, pg_catalog.pg_get_viewdef(c.oid) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('v', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema')`,
		func(v []string) {
			if r := c.byOID[v[0]]; r != nil {
				r.def = v[1]
			}
		})
	each(1, `SELECT DISTINCT ev_class FROM pg_catalog.pg_rewrite WHERE ev_type <> '1'`, func(v []string) {
		if r := c.byOID[v[0]]; r != nil {
			r.rules = true
		}
	})
	// 16384 is FirstNormalObjectId: what initdb made is below it.
	each(4, `SELECT p.proname, n.nspname, pg_catalog.bool_and(p.provolatile = 'i'),
		pg_catalog.bool_and(EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid = p.oid AND d.deptype = 'e'))
		FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE p.oid >= 16384 GROUP BY 1, 2`,
		func(v []string) {
			if c.functions[v[0]] == nil {
				c.functions[v[0]] = map[string]function{}
			}
			c.functions[v[0]][v[1]] = function{pure: v[2] == "t", extension: v[3] == "t"}
		})
	each(1, `SELECT DISTINCT o.oprname FROM pg_catalog.pg_operator o WHERE o.oid >= 16384
		AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_operator'::pg_catalog.regclass AND d.objid = o.oid AND d.deptype = 'e')`,
		func(v []string) { c.operators[v[0]] = true })
	// x and n are what JDBC takes from information_schema._pg_expandarray.
	each(1, `SELECT f.name FROM (SELECT a.attname FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
			JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
			WHERE a.attnum > 0 AND NOT a.attisdropped AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
			UNION VALUES ('x'), ('n')) AS f(name)
		WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.proname = f.name)`,
		func(v []string) { c.attrs[v[0]] = true })
	if failed != nil {
		return nil, failed
	}
	return c, nil
}

func keys[V any](m map[string]V) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// relation returns what a name means, as PostgreSQL looks it up, and nil where
// nothing known bears it.
func (c *Catalog) relation(schema, name string) *relation {
	if schema != "" {
		return c.relations[schema][name]
	}
	for _, s := range c.path {
		if r := c.relations[s][name]; r != nil {
			return r
		}
	}
	return nil
}

// dataType returns the type of a name, likewise.
func (c *Catalog) dataType(schema, name string) *dataType {
	if schema != "" {
		return c.typeNames[schema][name]
	}
	for _, s := range c.path {
		if t := c.typeNames[s][name]; t != nil {
			return t
		}
	}
	return nil
}
