package guard

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// taint is what an expression can carry of what is masked. It only ever grows:
// where PostgreSQL could resolve a name in two ways, it is that of both.
type taint uint8

const (
	clean    taint = iota
	document       // a JSON document as it is stored, in which members are hidden on the way out
	hidden
)

// used is the taint of something made of what has taint t.
func (t taint) used() taint {
	if t != clean {
		return hidden
	}
	return clean
}

// output is one column of a query.
type output struct {
	name  string // empty where the guard does not know it
	taint taint
}

// result is what a query returns.
type result struct {
	columns []output
	cond    taint // of what decides which rows there are
	loose   bool  // there may be more columns than these, between them
}

func (r *result) any() (t taint) {
	for _, c := range r.columns {
		t = max(t, c.taint)
	}
	return t
}

// all is what an expression around the query can learn of it.
func (r *result) all() taint { return max(r.any(), r.cond).used() }

// hidden returns Statement.Columns.
func (r *result) hidden() []bool {
	if r.any() != hidden {
		return nil
	}
	out := make([]bool, len(r.columns))
	for i, c := range r.columns {
		out[i] = c.taint == hidden
	}
	return out
}

// inner is r as part of another query: of columns that may have shifted, each
// is all.
func (r *result) inner() *result {
	if r.loose {
		t := r.any().used()
		for i := range r.columns {
			r.columns[i].taint = t
		}
	}
	return r
}

// source is one item that names refer to: an entry of FROM, the target of a
// write, or the output columns in ORDER BY.
type source struct {
	schema, alias string // schema: of a relation without alias
	columns       []output
	isOpen        bool      // there may be columns that are not known
	open          taint     // theirs; no more than that of columns where isOpen is not set
	relation      *relation // has system columns
}

func (s *source) column(name string) (output, bool) {
	for _, c := range s.columns {
		if c.name == name || c.name == "" {
			t := c.taint
			// Two columns of one name, or one without: any of them.
			for _, d := range s.columns {
				if d.name == name || d.name == "" {
					t = max(t, d.taint)
				}
			}
			return output{name, t}, true
		}
	}
	switch {
	case s.isOpen:
		return output{name, s.open}, true
	case s.relation != nil && systemColumns[name]:
		return output{name, clean}, true
	}
	return output{}, false
}

// field is column where the source's name stands before it. PostgreSQL would
// take a name that is no column's as a function's, and call it with the row,
// which for a function in FROM may be a plain value: what is not surely a column
// must be a name that no function bears.
func (a *analysis) field(s *source, name string) (output, bool) {
	sure := slices.ContainsFunc(s.columns, func(c output) bool { return c.name == name }) || s.relation != nil && systemColumns[name]
	if !sure && !a.g.catalog.attrs[name] {
		return output{}, false
	}
	return s.column(name)
}

func (s *source) whole() taint {
	t := s.open
	for _, c := range s.columns {
		t = max(t, c.taint)
	}
	return t.used()
}

// secret is the name of secretColumns: no statement can write it.
const secret = "\x00"

// bare reports whether columns may be named all at once.
func (a *analysis) bare(columns []output) {
	if slices.ContainsFunc(columns, func(c output) bool { return c.name == secret }) {
		a.refuse(stateForbidden, "this relation of the catalog is let through by single columns alone")
	}
}

var systemColumns = set("ctid tableoid xmin xmax cmin cmax")

// scope is one level of a query. Sources to the left are visible to subqueries
// in FROM whether or not they are LATERAL: that finds more than PostgreSQL does,
// never less.
type scope struct {
	up      *scope
	sources []*source
	ctes    []*cte
	cond    taint
	windows taint
}

type cte struct {
	name    string
	columns []output
	loose   bool
	ready   bool
}

// analysis is the judgement of one statement.
type analysis struct {
	g       *Guard
	trusted bool // a definition of the target's own: what it may do is not asked
	refusal *refusal
	tables  []*relation
	writes  []string // kinds of writes
	near    bool
	steps   int
}

func (a *analysis) refuse(state, reason string) {
	if a.refusal == nil {
		a.refusal = &refusal{state, reason}
	}
}

var plainName = regexp.MustCompile(`\A[a-z_][a-z0-9_]{0,62}\z`)

// quoted is name where it cannot be a value.
func quoted(what, name string) string {
	if plainName.MatchString(name) {
		return what + " " + name
	}
	return "a " + what + " of that name"
}

// may reports whether statements of a kind are let through.
func (a *analysis) may(kind string) bool {
	return a.trusted || slices.Contains(a.g.access.Statements, kind)
}

// reach judges an access to r.
func (a *analysis) reach(r *relation, kind string) {
	if !slices.Contains(a.tables, r) {
		a.tables = append(a.tables, r)
	}
	if a.g.near[r] || kind != "select" && a.g.active {
		// What a write sets off elsewhere can speak of anything in its errors.
		a.near = true
	}
	if kind != "select" && !slices.Contains(a.writes, strings.ToUpper(kind)) {
		a.writes = append(a.writes, strings.ToUpper(kind))
	}
	switch {
	case a.trusted:
	case !a.may(kind):
		a.refuse(stateForbidden, strings.ToUpper(kind)+" is not among the statements that are let through")
	case r.system:
		if kind != "select" {
			a.refuse(stateForbidden, "writing to the system catalog is not let through")
		}
	case kind != "select" && r.rules:
		a.refuse(stateForbidden, "writing to a relation with rules is not let through")
	case kind != "select" && r.kind != 'r' && r.kind != 'p' && r.kind != 'v' && r.kind != 'f':
		a.refuse(stateForbidden, "writing to something that is no table is not let through")
	case !a.g.allows(r):
		a.refuse(stateForbidden, quoted("table", r.name)+" is not among those that are let through")
	}
}

// allows reports whether a grant names r. A foreign table reaches beyond the
// target, so that it has to be named itself.
func (g *Guard) allows(r *relation) bool {
	for _, t := range g.access.Tables {
		schema, name, ok := strings.Cut(t, ".")
		if !ok {
			schema, name = "public", t
		}
		switch {
		case t == "*", name == "*" && schema == r.schema:
			if r.kind != 'f' {
				return true
			}
		case schema == r.schema && name == r.name:
			return true
		}
	}
	return false
}

// lookup finds what a RangeVar means among relations.
func (a *analysis) lookup(v *pgquery.RangeVar) *relation {
	if v.Catalogname != "" || v.Relpersistence == "t" {
		a.refuse(stateForbidden, "tables of other databases and temporary tables are not let through")
		return nil
	}
	r := a.g.catalog.relation(v.Schemaname, v.Relname)
	if r == nil || r.kind == 'c' {
		a.refuse("42P01", quoted("relation", v.Relname)+" is not known, or not let through")
		return nil
	}
	return r
}

// relationSource is r in FROM.
func (a *analysis) relationSource(r *relation, alias *pgquery.Alias) *source {
	masks := a.g.masks[r]
	s := &source{alias: r.name, schema: r.schema, relation: r, columns: make([]output, len(r.columns))}
	for i, c := range r.columns {
		if s.columns[i].name = c.name; r.system && secretColumns[r.name+"."+c.name] {
			s.columns[i].name = secret
		}
		if masks != nil {
			s.columns[i].taint = masks[i]
		}
	}
	a.rename(s, alias)
	return s
}

// target is the table that a statement writes to, or that COPY reads.
func (a *analysis) target(v *pgquery.RangeVar, kind string) *source {
	r := a.lookup(v)
	if r == nil {
		return nil
	}
	a.reach(r, kind)
	return a.relationSource(r, v.Alias)
}

// rename gives s the names of an alias.
func (a *analysis) rename(s *source, alias *pgquery.Alias) {
	if alias == nil {
		return
	}
	s.alias, s.schema = alias.Aliasname, ""
	if len(alias.Colnames) > 0 {
		a.bare(s.columns)
	}
	for i, n := range alias.Colnames {
		name := n.GetString_().GetSval()
		switch {
		case i < len(s.columns):
			s.columns[i].name = name
		case s.isOpen:
			s.columns = append(s.columns, output{name, s.open})
		default:
			a.refuse("42P10", "an alias with more columns than there are")
			return
		}
	}
}

// query analyses a SELECT, or a write with what it returns.
func (a *analysis) query(up *scope, n *pgquery.Node) *result {
	if a.step() {
		return &result{}
	}
	switch s := n.GetNode().(type) {
	case *pgquery.Node_SelectStmt:
		return a.sel(up, s.SelectStmt)
	case *pgquery.Node_InsertStmt:
		return a.insert(up, s.InsertStmt)
	case *pgquery.Node_UpdateStmt:
		return a.update(up, s.UpdateStmt)
	case *pgquery.Node_DeleteStmt:
		return a.delete(up, s.DeleteStmt)
	case *pgquery.Node_MergeStmt:
		return a.merge(up, s.MergeStmt)
	}
	a.refuse(stateForbidden, kindOf(n)+" is not let through")
	return &result{}
}

// step counts, and reports whether to stop.
func (a *analysis) step() bool {
	if a.steps++; a.steps > maxSteps {
		a.refuse(stateTooComplex, "the statement is too complex")
	}
	return a.refusal != nil
}

// with makes the common table expressions of a statement visible in sc.
func (a *analysis) with(sc *scope, w *pgquery.WithClause) {
	if w == nil {
		return
	}
	own := make([]*cte, len(w.Ctes))
	for i, n := range w.Ctes {
		own[i] = &cte{name: n.GetCommonTableExpr().GetCtename()}
	}
	if w.Recursive {
		sc.ctes = append(sc.ctes, own...)
	}
	for i, n := range w.Ctes {
		c := n.GetCommonTableExpr()
		if c == nil || c.SearchClause != nil || c.CycleClause != nil {
			a.refuse(stateUnsupported, "SEARCH and CYCLE are not supported")
			return
		}
		name := func(r *result) {
			r.inner()
			s := &source{columns: r.columns, isOpen: r.loose, open: r.any()}
			if len(c.Aliascolnames) > 0 {
				a.rename(s, &pgquery.Alias{Colnames: c.Aliascolnames})
			}
			own[i].columns, own[i].loose, own[i].ready = s.columns, r.loose, true
		}
		if sel := c.Ctequery.GetSelectStmt(); w.Recursive && sel != nil && sel.Op != pgquery.SetOperation_SETOP_NONE && sel.Op != 0 {
			// A fixpoint: taints only grow.
			first := &scope{up: sc}
			a.with(first, sel.WithClause)
			name(a.sel(first, sel.Larg))
			for round := 0; a.refusal == nil; round++ {
				before := slices.Clone(own[i].columns)
				r := a.query(sc, c.Ctequery)
				name(r)
				grown := len(before) != len(own[i].columns)
				for j := 0; !grown && j < len(before); j++ {
					grown = own[i].columns[j].taint > before[j].taint
					own[i].columns[j].taint = max(own[i].columns[j].taint, before[j].taint)
				}
				if !grown {
					break
				}
				if round == 10 {
					for j := range own[i].columns {
						own[i].columns[j].taint = hidden
					}
					break
				}
			}
		} else {
			name(a.query(sc, c.Ctequery))
		}
		if !w.Recursive {
			sc.ctes = append(sc.ctes, own[i])
		}
	}
}

func (a *analysis) sel(up *scope, s *pgquery.SelectStmt) *result {
	if a.step() || s == nil {
		return &result{}
	}
	if s.IntoClause != nil {
		a.refuse(stateForbidden, "SELECT INTO is not let through")
	}
	sc := &scope{up: up}
	a.with(sc, s.WithClause)
	var r *result
	switch {
	case s.Op != pgquery.SetOperation_SETOP_NONE && s.Op != 0:
		l, right := a.sel(sc, s.Larg).inner(), a.sel(sc, s.Rarg).inner()
		if len(l.columns) != len(right.columns) && !l.loose && !right.loose {
			a.refuse("42601", "a set operation of queries with different numbers of columns")
			return &result{}
		}
		r = &result{columns: slices.Clone(l.columns), cond: max(l.cond, right.cond), loose: l.loose || right.loose}
		all := max(l.any(), right.any())
		for i := range r.columns {
			if r.loose {
				r.columns[i].taint = all.used()
			} else {
				r.columns[i].taint = max(r.columns[i].taint, right.columns[i].taint)
			}
		}
	case len(s.ValuesLists) > 0:
		r = &result{}
		for _, row := range s.ValuesLists {
			for i, v := range row.GetList().GetItems() {
				if i == len(r.columns) {
					r.columns = append(r.columns, output{name: fmt.Sprintf("column%d", i+1)})
				}
				r.columns[i].taint = max(r.columns[i].taint, a.expr(sc, v).used())
			}
		}
	default:
		var stars []item
		for _, f := range s.FromClause {
			stars = append(stars, a.from(sc, f))
		}
		for _, w := range s.WindowClause {
			sc.windows = max(sc.windows, a.window(sc, w.GetWindowDef()))
		}
		r = a.targets(sc, s.TargetList, stars)
		sc.cond = max(sc.cond, a.expr(sc, s.WhereClause), a.expr(sc, s.HavingClause), sc.windows)
	}
	// ORDER BY and GROUP BY see the output's names too.
	sc.sources = append(sc.sources, &source{columns: r.columns, isOpen: r.loose, open: r.any()})
	for _, list := range [][]*pgquery.Node{s.GroupClause, s.SortClause, s.DistinctClause, {s.LimitCount}, {s.LimitOffset}} {
		for _, n := range list {
			if n.GetNode() != nil { // DISTINCT is a list of nothing
				sc.cond = max(sc.cond, a.expr(sc, n))
			}
		}
	}
	if len(s.LockingClause) > 0 && !a.may("update") {
		a.refuse(stateForbidden, "locking rows is let through together with UPDATE")
	}
	r.cond = max(r.cond, sc.cond).used()
	// What is masked need not be of a relation that is near it: a catalog's is not.
	a.near = a.near || r.all() != clean
	return r
}

// item is an entry of FROM as * sees it.
type item struct {
	columns []output
	loose   bool
}

func (s *source) item() item { return item{s.columns, s.isOpen} }

// from adds an entry of FROM to sc.
func (a *analysis) from(sc *scope, n *pgquery.Node) item {
	if a.step() {
		return item{}
	}
	switch f := n.GetNode().(type) {
	case *pgquery.Node_RangeVar:
		return a.rangeVar(sc, f.RangeVar)
	case *pgquery.Node_RangeSubselect:
		r := a.query(sc, f.RangeSubselect.Subquery).inner()
		sc.cond = max(sc.cond, r.cond)
		s := &source{columns: slices.Clone(r.columns), isOpen: r.loose}
		if r.loose {
			s.open = r.any()
		}
		a.rename(s, f.RangeSubselect.Alias)
		sc.sources = append(sc.sources, s)
		return s.item()
	case *pgquery.Node_RangeFunction:
		s := a.rangeFunction(sc, f.RangeFunction)
		sc.sources = append(sc.sources, s)
		return s.item()
	case *pgquery.Node_RangeTableSample:
		t := f.RangeTableSample
		if schema, name := qualifiedName(t.Method); schema != "" && schema != "pg_catalog" || name != "system" && name != "bernoulli" {
			a.refuse(stateForbidden, "a sampling method that is not known")
		}
		for _, arg := range append(slices.Clone(t.Args), t.Repeatable) {
			if a.expr(sc, arg) != clean {
				a.refuse(stateForbidden, "TABLESAMPLE by something masked")
			}
		}
		return a.from(sc, t.Relation)
	case *pgquery.Node_JoinExpr:
		return a.join(sc, f.JoinExpr)
	}
	a.refuse(stateUnsupported, "an entry of FROM that is not understood")
	return item{}
}

func (a *analysis) rangeVar(sc *scope, v *pgquery.RangeVar) item {
	if v.Schemaname == "" && v.Catalogname == "" {
		for up := sc; up != nil; up = up.up {
			for _, c := range slices.Backward(up.ctes) {
				if c.name != v.Relname {
					continue
				}
				if !c.ready {
					a.refuse(stateUnsupported, "a common table expression that is used before it is known")
					return item{}
				}
				s := &source{alias: c.name, columns: slices.Clone(c.columns), isOpen: c.loose}
				if c.loose {
					for _, o := range c.columns {
						s.open = max(s.open, o.taint)
					}
				}
				a.rename(s, v.Alias)
				sc.sources = append(sc.sources, s)
				return s.item()
			}
		}
	}
	r := a.lookup(v)
	if r == nil {
		return item{}
	}
	a.reach(r, "select")
	s := a.relationSource(r, v.Alias)
	sc.sources = append(sc.sources, s)
	return s.item()
}

func (a *analysis) rangeFunction(sc *scope, f *pgquery.RangeFunction) *source {
	s := &source{}
	define := func(list []*pgquery.Node, t taint) {
		for _, d := range list {
			def := d.GetColumnDef()
			if def == nil {
				a.refuse(stateUnsupported, "a column definition that is not understood")
				return
			}
			s.columns = append(s.columns, output{def.Colname, max(t, a.typeName(def.TypeName))})
		}
	}
	for _, n := range f.Functions {
		items := n.GetList().GetItems()
		if len(items) == 0 {
			a.refuse(stateUnsupported, "a function in FROM that is not understood")
			return s
		}
		call := items[0].GetFuncCall()
		if call == nil {
			a.refuse(stateUnsupported, "a function in FROM that is not understood")
			return s
		}
		t := a.expr(sc, items[0]).used()
		sc.cond = max(sc.cond, t) // how many rows there are
		schema, name := qualifiedName(call.Funcname)
		defs := f.Coldeflist
		if len(items) > 1 && items[1].GetList() != nil {
			defs = items[1].GetList().Items
		}
		_, users := a.g.catalog.functions[name]
		switch {
		case len(defs) > 0:
			define(defs, t)
		case rowFunctions[name] != nil && !users:
			for _, c := range rowFunctions[name] {
				s.columns = append(s.columns, output{c, t})
			}
		case name == "unnest" && len(call.Args) > 1:
			for range call.Args {
				s.columns = append(s.columns, output{name, t})
			}
		default:
			column := name
			if f.Alias != nil && len(f.Functions) == 1 {
				column = f.Alias.Aliasname
			}
			s.columns = append(s.columns, output{column, t})
		}
		if len(defs) == 0 && (rowFunctions[name] == nil || users) && (openFunctions[name] || users || t != clean || schema != "" && schema != "pg_catalog") {
			s.isOpen, s.open = true, max(s.open, t)
		}
		s.alias = name
	}
	if f.Ordinality {
		s.columns = append(s.columns, output{"ordinality", clean})
	}
	if s.isOpen {
		// What is not known may stand before what is.
		for i := range s.columns {
			s.columns[i].taint = max(s.columns[i].taint, s.open)
		}
	}
	a.rename(s, f.Alias)
	return s
}

func (a *analysis) join(sc *scope, j *pgquery.JoinExpr) item {
	first := len(sc.sources)
	l := a.from(sc, j.Larg)
	r := a.from(sc, j.Rarg)
	if a.refusal != nil {
		return item{}
	}
	var using []string
	for _, n := range j.UsingClause {
		using = append(using, n.GetString_().GetSval())
	}
	if j.IsNatural {
		for _, c := range l.columns {
			if slices.ContainsFunc(r.columns, func(d output) bool { return d.name == c.name }) {
				using = append(using, c.name)
			}
		}
	}
	out := item{loose: l.loose || r.loose}
	unnamed := func(c output) bool { return c.name == "" }
	if len(using) > 0 || j.IsNatural {
		if out.loose || slices.ContainsFunc(l.columns, unnamed) || slices.ContainsFunc(r.columns, unnamed) {
			a.refuse(stateUnsupported, "USING and NATURAL over columns that are not known")
			return item{}
		}
	}
	for _, name := range using {
		merged := output{name: name}
		found := 0
		for _, side := range [][]output{l.columns, r.columns} {
			for _, c := range side {
				if c.name == name {
					found++
					merged.taint = max(merged.taint, c.taint)
				}
			}
		}
		if found != 2 {
			a.refuse("42703", "USING of a column that is not on both sides once")
			return item{}
		}
		sc.cond = max(sc.cond, merged.taint.used())
		out.columns = append(out.columns, merged)
	}
	for _, side := range [][]output{l.columns, r.columns} {
		for _, c := range side {
			if !slices.Contains(using, c.name) {
				out.columns = append(out.columns, c)
			}
		}
	}
	sc.cond = max(sc.cond, a.expr(sc, j.Quals))
	if j.JoinUsingAlias != nil {
		sc.sources = append(sc.sources, &source{alias: j.JoinUsingAlias.Aliasname, columns: out.columns[:len(using):len(using)]})
	}
	if j.Alias != nil {
		s := &source{columns: slices.Clone(out.columns), isOpen: out.loose}
		if out.loose {
			for _, c := range out.columns {
				s.open = max(s.open, c.taint)
			}
		}
		a.rename(s, j.Alias)
		// The names within are no longer seen; left where they are they only add.
		sc.sources = append(sc.sources[:first:first], s)
		return s.item()
	}
	return out
}

// targets analyses a list of output columns.
func (a *analysis) targets(sc *scope, list []*pgquery.Node, from []item) *result {
	r := &result{}
	for _, n := range list {
		t := n.GetResTarget()
		if t == nil {
			a.refuse(stateUnsupported, "an output column that is not understood")
			return r
		}
		if ref := t.Val.GetColumnRef(); ref != nil && len(ref.Fields) > 0 && ref.Fields[len(ref.Fields)-1].GetAStar() != nil {
			if len(ref.Fields) == 1 {
				for _, i := range from {
					a.bare(i.columns)
					r.columns, r.loose = append(r.columns, i.columns...), r.loose || i.loose
				}
				continue
			}
			s, others := a.alias(sc, ref.Fields[:len(ref.Fields)-1])
			if s == nil {
				a.refuse("42P01", "a table of a .* that is not known")
				return r
			}
			a.bare(s.columns)
			for _, c := range s.columns {
				r.columns = append(r.columns, output{c.name, max(c.taint, others)})
			}
			r.loose = r.loose || s.isOpen
			continue
		}
		if ind := t.Val.GetAIndirection(); ind != nil && ind.Indirection[len(ind.Indirection)-1].GetAStar() != nil {
			ref := ind.Arg.GetColumnRef()
			if ref == nil || len(ind.Indirection) > 1 {
				a.refuse(stateUnsupported, "a .* of something that is no table")
				return r
			}
			s, others := a.alias(sc, ref.Fields)
			if s == nil || len(ref.Fields) == 1 && a.isColumn(sc, ref.Fields[0].GetString_().GetSval()) {
				a.refuse(stateUnsupported, "a .* of something that is no table")
				return r
			}
			a.bare(s.columns)
			for _, c := range s.columns {
				r.columns = append(r.columns, output{c.name, max(c.taint, others)})
			}
			r.loose = r.loose || s.isOpen
			continue
		}
		o := output{name: t.Name, taint: a.expr(sc, t.Val)}
		if o.taint == document && t.Val.GetColumnRef() == nil {
			o.taint = hidden
		}
		if o.name == "" {
			o.name = figure(t.Val)
		}
		r.columns = append(r.columns, o)
	}
	return r
}

// isColumn reports whether a column of that name is in sight.
func (a *analysis) isColumn(sc *scope, name string) bool {
	for ; sc != nil; sc = sc.up {
		for _, s := range sc.sources {
			if _, ok := s.column(name); ok {
				return true
			}
		}
	}
	return false
}

// alias finds the source that a name, or a schema and a name, means: the
// nearest, and what any other of that name holds. Where PostgreSQL might mean
// one of the others, with other columns, what is returned has columns that are
// not known.
func (a *analysis) alias(sc *scope, fields []*pgquery.Node) (found *source, others taint) {
	schema, name := qualifiedName(fields)
	if len(fields) > 2 || name == "" {
		return nil, clean
	}
	for ; sc != nil; sc = sc.up {
		for _, s := range slices.Backward(sc.sources) {
			if s.alias != name || schema != "" && s.schema != schema {
				continue
			}
			if found == nil {
				found = s
				continue
			}
			others = max(others, s.whole())
			if len(s.columns) != len(found.columns) {
				found = &source{schema: found.schema, alias: found.alias, columns: found.columns, relation: found.relation, isOpen: true, open: max(found.whole(), others)}
			}
		}
	}
	return found, others
}

// columnRef is the taint of a name: of everything in sight that bears it.
func (a *analysis) columnRef(sc *scope, ref *pgquery.ColumnRef) taint {
	fields := ref.Fields
	last := fields[len(fields)-1]
	if last.GetAStar() != nil {
		if len(fields) == 1 {
			a.refuse(stateUnsupported, "a * within an expression")
			return hidden
		}
		s, others := a.alias(sc, fields[:len(fields)-1])
		if s == nil {
			a.refuse("42P01", "a table of a .* that is not known")
			return hidden
		}
		a.bare(s.columns)
		return max(s.whole(), others)
	}
	name := last.GetString_().GetSval()
	t, found := clean, false
	if len(fields) == 1 {
		for at := sc; at != nil; at = at.up {
			for _, s := range at.sources {
				if c, ok := s.column(name); ok {
					t, found = max(t, c.taint), true
				}
				if s.alias == name {
					a.bare(s.columns)
					t, found = max(t, s.whole()), true
				}
			}
		}
		if !found {
			a.refuse("42703", quoted("column", name)+" is not known")
			return hidden
		}
		return t
	}
	schema, table := qualifiedName(fields[:len(fields)-1])
	if len(fields) > 3 {
		a.refuse(stateUnsupported, "a name of more than three parts")
		return hidden
	}
	for at := sc; at != nil; at = at.up {
		for _, s := range at.sources {
			if s.alias != table || schema != "" && s.schema != schema {
				continue
			}
			c, ok := a.field(s, name)
			if !ok {
				a.refuse("42703", quoted("column", name)+" is not known")
				return hidden
			}
			t, found = max(t, c.taint), true
		}
	}
	if !found {
		a.refuse("42P01", quoted("table", table)+" is not among those of the query")
		return hidden
	}
	return t
}

// qualifiedName splits a list of strings into schema and name; more than two
// parts have a schema that nothing bears.
func qualifiedName(list []*pgquery.Node) (schema, name string) {
	switch len(list) {
	case 0:
		return "", ""
	case 1:
		return "", list[0].GetString_().GetSval()
	case 2:
		return list[0].GetString_().GetSval(), list[1].GetString_().GetSval()
	}
	return "\x00", list[len(list)-1].GetString_().GetSval()
}

// figure is the name that PostgreSQL gives a column (FigureColname in
// parse_target.c), and empty where the guard is not sure of it.
func figure(n *pgquery.Node) string {
	name, strength := figureInternal(n)
	switch {
	case strength < 0:
		return ""
	case strength == 0:
		return "?column?"
	}
	return name
}

func figureInternal(n *pgquery.Node) (string, int) {
	switch e := n.GetNode().(type) {
	case *pgquery.Node_ColumnRef:
		_, name := qualifiedName(e.ColumnRef.Fields)
		return name, 2
	case *pgquery.Node_FuncCall:
		_, name := qualifiedName(e.FuncCall.Funcname)
		return name, 2
	case *pgquery.Node_TypeCast:
		name, strength := figureInternal(e.TypeCast.Arg)
		if strength == 0 || strength == 1 {
			_, name = qualifiedName(e.TypeCast.TypeName.GetNames())
			return name, 1
		}
		return name, strength
	case *pgquery.Node_CollateClause:
		return figureInternal(e.CollateClause.Arg)
	case *pgquery.Node_AConst, *pgquery.Node_ParamRef, *pgquery.Node_BoolExpr, *pgquery.Node_NullTest, *pgquery.Node_BooleanTest:
		return "", 0
	case *pgquery.Node_AExpr:
		if e.AExpr.Kind == pgquery.A_Expr_Kind_AEXPR_NULLIF {
			return "nullif", 2
		}
		return "", 0
	case *pgquery.Node_CoalesceExpr:
		return "coalesce", 2
	case *pgquery.Node_MinMaxExpr:
		if e.MinMaxExpr.Op == pgquery.MinMaxOp_IS_GREATEST {
			return "greatest", 2
		}
		return "least", 2
	case *pgquery.Node_AArrayExpr:
		return "array", 2
	case *pgquery.Node_RowExpr:
		return "row", 2
	case *pgquery.Node_GroupingFunc:
		return "grouping", 2
	case *pgquery.Node_CaseExpr:
		if name, strength := figureInternal(e.CaseExpr.Defresult); strength == 2 {
			return name, 2
		} else if strength < 0 && e.CaseExpr.Defresult != nil {
			return "", -1
		}
		return "case", 1
	case *pgquery.Node_SubLink:
		switch e.SubLink.SubLinkType {
		case pgquery.SubLinkType_EXISTS_SUBLINK:
			return "exists", 2
		case pgquery.SubLinkType_ARRAY_SUBLINK:
			return "array", 2
		case pgquery.SubLinkType_ANY_SUBLINK, pgquery.SubLinkType_ALL_SUBLINK:
			return "", 0
		}
		if list := e.SubLink.Subselect.GetSelectStmt().GetTargetList(); len(list) > 0 {
			if name := list[0].GetResTarget().GetName(); name != "" {
				return name, 2
			}
			if ref := list[0].GetResTarget().GetVal().GetColumnRef(); ref == nil || ref.Fields[len(ref.Fields)-1].GetAStar() == nil {
				return figureInternal(list[0].GetResTarget().GetVal())
			}
		}
	case *pgquery.Node_AIndirection:
		list := e.AIndirection.Indirection
		for _, n := range slices.Backward(list) {
			if name := n.GetString_().GetSval(); name != "" {
				return name, 2
			}
		}
		return figureInternal(e.AIndirection.Arg)
	}
	return "", -1
}
