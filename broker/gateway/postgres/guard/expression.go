package guard

import (
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// expr judges an expression and returns what it can carry: the taint of all
// that stands in it. It refuses nodes that it does not know.
func (a *analysis) expr(sc *scope, n *pgquery.Node) taint {
	if n.GetNode() == nil || a.step() {
		return clean
	}
	switch e := n.Node.(type) {
	case *pgquery.Node_ColumnRef:
		return a.columnRef(sc, e.ColumnRef)
	case *pgquery.Node_AConst, *pgquery.Node_ParamRef, *pgquery.Node_SetToDefault, *pgquery.Node_SqlvalueFunction, *pgquery.Node_AStar:
		return clean
	case *pgquery.Node_AExpr:
		a.operator(e.AExpr.Name, e.AExpr.Kind)
		return max(a.expr(sc, e.AExpr.Lexpr), a.expr(sc, e.AExpr.Rexpr)).used()
	case *pgquery.Node_BoolExpr:
		return a.exprs(sc, e.BoolExpr.Args)
	case *pgquery.Node_NullTest:
		return a.expr(sc, e.NullTest.Arg).used()
	case *pgquery.Node_BooleanTest:
		return a.expr(sc, e.BooleanTest.Arg).used()
	case *pgquery.Node_CaseExpr:
		return max(a.expr(sc, e.CaseExpr.Arg), a.exprs(sc, e.CaseExpr.Args), a.expr(sc, e.CaseExpr.Defresult)).used()
	case *pgquery.Node_CaseWhen:
		return max(a.expr(sc, e.CaseWhen.Expr), a.expr(sc, e.CaseWhen.Result)).used()
	case *pgquery.Node_CoalesceExpr:
		return a.exprs(sc, e.CoalesceExpr.Args)
	case *pgquery.Node_MinMaxExpr:
		return a.exprs(sc, e.MinMaxExpr.Args)
	case *pgquery.Node_RowExpr:
		return a.exprs(sc, e.RowExpr.Args)
	case *pgquery.Node_AArrayExpr:
		return a.exprs(sc, e.AArrayExpr.Elements)
	case *pgquery.Node_List:
		return a.exprs(sc, e.List.Items)
	case *pgquery.Node_CollateClause:
		return a.expr(sc, e.CollateClause.Arg)
	case *pgquery.Node_NamedArgExpr:
		return a.expr(sc, e.NamedArgExpr.Arg)
	case *pgquery.Node_GroupingFunc:
		return a.exprs(sc, e.GroupingFunc.Args)
	case *pgquery.Node_GroupingSet:
		return a.exprs(sc, e.GroupingSet.Content)
	case *pgquery.Node_SortBy:
		if len(e.SortBy.UseOp) > 0 {
			a.operator(e.SortBy.UseOp, pgquery.A_Expr_Kind_AEXPR_OP)
		}
		return a.expr(sc, e.SortBy.Node).used()
	case *pgquery.Node_TypeCast:
		return max(a.typeName(e.TypeCast.TypeName), a.expr(sc, e.TypeCast.Arg).used())
	case *pgquery.Node_AIndirection:
		return a.indirection(sc, e.AIndirection)
	case *pgquery.Node_SubLink:
		s := e.SubLink
		if len(s.OperName) > 0 {
			a.operator(s.OperName, pgquery.A_Expr_Kind_AEXPR_OP)
		}
		return max(a.expr(sc, s.Testexpr).used(), a.query(sc, s.Subselect).all())
	case *pgquery.Node_FuncCall:
		return a.call(sc, e.FuncCall)
	case *pgquery.Node_MultiAssignRef:
		return a.expr(sc, e.MultiAssignRef.Source)
	case *pgquery.Node_IndexElem:
		return a.expr(sc, e.IndexElem.Expr)
	}
	a.refuse(stateUnsupported, "an expression that is not understood: "+kindOf(n))
	return hidden
}

func (a *analysis) exprs(sc *scope, list []*pgquery.Node) (t taint) {
	for _, n := range list {
		t = max(t, a.expr(sc, n))
	}
	return t.used()
}

// operator judges an operator's name. Those of PostgreSQL have no effect; those
// of an extension that overload them are taken to have none either.
func (a *analysis) operator(list []*pgquery.Node, kind pgquery.A_Expr_Kind) {
	schema, name := qualifiedName(list)
	switch {
	case kind == pgquery.A_Expr_Kind_AEXPR_BETWEEN, kind == pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN,
		kind == pgquery.A_Expr_Kind_AEXPR_BETWEEN_SYM, kind == pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN_SYM:
		for _, name := range []string{"<", ">", "<=", ">="} {
			if a.g.catalog.operators[name] {
				a.refuse(stateForbidden, "an operator of the target's own")
			}
		}
	case schema != "" && schema != "pg_catalog":
		a.refuse(stateForbidden, "an operator of another schema")
	case schema == "" && a.g.catalog.operators[name]:
		a.refuse(stateForbidden, "an operator of the target's own")
	}
}

// typeName judges the type of a cast, and says what it hides.
func (a *analysis) typeName(t *pgquery.TypeName) taint {
	schema, name := qualifiedName(t.GetNames())
	known := a.g.catalog.dataType(schema, name)
	switch {
	case t == nil || t.PctType || name == "":
		a.refuse(stateUnsupported, "a type that is not understood")
	case known == nil:
		a.refuse("42704", quoted("type", name)+" is not known")
	case known.schema == "pg_catalog" && !plainTypes[strings.TrimPrefix(known.name, "_")]:
		// A row of the system's own can be cast to, and psql does not.
		a.refuse(stateForbidden, quoted("type", name)+" is not let through")
	case known.schema == "information_schema":
	default:
		return a.g.typeTaint(known)
	}
	return clean
}

// indirection is (x).field, x[i] and their like.
func (a *analysis) indirection(sc *scope, i *pgquery.A_Indirection) taint {
	t := a.expr(sc, i.Arg).used()
	for at, n := range i.Indirection {
		switch e := n.GetNode().(type) {
		case *pgquery.Node_AIndices:
			t = max(t, a.expr(sc, e.AIndices.Lidx), a.expr(sc, e.AIndices.Uidx)).used()
		case *pgquery.Node_String_:
			name := e.String_.Sval
			ref := i.Arg.GetColumnRef()
			if ref != nil && at == 0 {
				if s, others := a.alias(sc, ref.Fields); s != nil && !(len(ref.Fields) == 1 && a.isColumn(sc, ref.Fields[0].GetString_().GetSval())) {
					c, ok := a.field(s, name)
					if !ok {
						a.refuse("42703", quoted("column", name)+" is not known")
					}
					t = max(c.taint, others).used()
					continue
				}
			}
			// (x).f calls the function f where x has no such field.
			if !a.g.catalog.attrs[name] {
				a.refuse(stateForbidden, "a field that may be a function")
			}
		default:
			a.refuse(stateUnsupported, "a field that is not understood")
		}
	}
	return t
}

// call judges a function call.
func (a *analysis) call(sc *scope, f *pgquery.FuncCall) taint {
	t := max(a.exprs(sc, f.Args), a.exprs(sc, f.AggOrder), a.expr(sc, f.AggFilter))
	if f.Over != nil {
		t = max(t, sc.windows, a.window(sc, f.Over))
	}
	t = t.used()
	schema, name := qualifiedName(f.Funcname)
	c := a.g.catalog
	// The target's own functions of that name, where PostgreSQL would look: it may
	// prefer them to its own, by their arguments' types.
	own := false
	for in, fn := range c.functions[name] {
		if schema != "" && schema != in || schema == "" && !slices.Contains(c.path, in) {
			continue
		}
		if pureFunctions[name] && fn.extension && (schema == "" || in == "pg_catalog") {
			continue // an extension's variant of what PostgreSQL has
		}
		own = true
		if !a.g.named[in+"."+name] {
			a.refuse(stateForbidden, quoted("function", name)+" is not among those that are let through")
			return hidden
		}
		if !fn.pure && a.g.active {
			// It may read what is masked, and say so in its errors.
			a.near, t = true, hidden
		}
	}
	switch {
	case own:
		return t
	case schema == "information_schema" && schemaFunctions[schema+"."+name]:
		return t
	case schema != "" && schema != "pg_catalog":
	case name == "current_setting" && len(f.Args) > 0:
		setting := strings.ToLower(f.Args[0].GetAConst().GetSval().GetSval())
		if _, ok := settings[setting]; ok || shown[setting] {
			return t
		}
		a.refuse(stateForbidden, "this setting may not be shown")
		return hidden
	case name == "pg_get_partition_constraintdef" && a.g.active:
		a.near = true // as relpartbound, see mask
		return hidden
	case pureFunctions[name]:
		return t
	case a.g.named["pg_catalog."+name]:
		if !effectOnly[name] && a.g.active {
			a.near, t = true, hidden
		}
		return t
	}
	if a.trusted && effectOnly[name] {
		return t
	}
	a.refuse(stateForbidden, quoted("function", name)+" is not among those that are let through")
	return hidden
}

// window is the taint of what orders and frames a window.
func (a *analysis) window(sc *scope, w *pgquery.WindowDef) taint {
	if w == nil {
		return clean
	}
	return max(a.exprs(sc, w.PartitionClause), a.exprs(sc, w.OrderClause), a.expr(sc, w.StartOffset), a.expr(sc, w.EndOffset)).used()
}

// typeTaint is what a type hides: a masked type anywhere in it, or a document
// in which members are.
func (g *Guard) typeTaint(t *dataType) taint { return g.typeTaintIn(t, 0) }

func (g *Guard) typeTaintIn(t *dataType, depth int) taint {
	if t == nil || g.masker == nil {
		return clean
	}
	if depth > 16 || g.masker.Column("", "", "", t.name) {
		return hidden
	}
	out := clean
	if (t.name == "json" || t.name == "jsonb") && g.masker.Members() {
		out = document
	}
	if t.name == "hstore" && g.masker.Members() {
		return hidden
	}
	for _, oid := range []string{t.base, t.elem, t.span} {
		if in := g.catalog.types[oid]; in != nil {
			// Only a document by itself is known as one on the way out.
			out = max(out, g.typeTaintIn(in, depth+1).used())
		}
	}
	if r := g.catalog.byOID[t.of]; r != nil && t.kind == 'c' {
		for _, c := range r.columns {
			if g.masker.Column(r.schema, r.name, c.name, "") {
				return hidden
			}
			out = max(out, g.typeTaintIn(c.typ, depth+1).used())
		}
	}
	return out
}

// mask finds the columns that can carry what is masked: by the rules, through
// inheritance, generated columns and views.
func (g *Guard) mask() {
	if g.masker == nil {
		return
	}
	relations := make([]*relation, 0, len(g.catalog.byOID))
	for _, r := range g.catalog.byOID {
		if r.system {
			continue
		}
		relations = append(relations, r)
		masks := make([]taint, len(r.columns))
		for i, c := range r.columns {
			masks[i] = g.typeTaint(c.typ)
			if g.masker.Column(r.schema, r.name, c.name, "") {
				masks[i] = hidden
			}
			g.active = g.active || masks[i] != clean
		}
		g.masks[r] = masks
	}
	if !g.active {
		return
	}
	// The bounds of partitions quote values of the columns that they go by.
	if r := g.catalog.relation("pg_catalog", "pg_class"); r != nil {
		g.masks[r] = make([]taint, len(r.columns))
		for i, c := range r.columns {
			if c.name == "relpartbound" {
				g.masks[r][i] = hidden
			}
		}
	}
	defs := map[*relation]*pgquery.Node{}
	for _, r := range relations {
		if r.isView() {
			if stmts, why := parse(r.def); why == nil && len(stmts) == 1 {
				defs[r] = stmts[0]
			}
		}
	}
	for changed := true; changed; {
		changed = false
		raise := func(r *relation, i int, t taint) {
			if g.masks[r][i] < t {
				g.masks[r][i], changed = t, true
			}
		}
		come := func(r *relation) {
			if !g.near[r] {
				g.near[r], changed = true, true
			}
		}
		for _, r := range relations {
			for i, t := range g.masks[r] {
				if t != clean {
					come(r)
				}
				for _, heir := range r.heirs {
					for j, c := range heir.columns {
						if c.name == r.columns[i].name && g.masks[heir] != nil {
							raise(heir, j, t)
							raise(r, i, g.masks[heir][j])
						}
					}
				}
				if e := r.columns[i].generated; e != "" {
					raise(r, i, g.generated(r, e))
				}
			}
			if r.isView() {
				a := &analysis{g: g, trusted: true}
				out := &result{}
				if defs[r] != nil {
					out = a.query(nil, defs[r])
				}
				unsure := a.refusal != nil || out.loose || len(out.columns) != len(r.columns)
				if unsure || a.near {
					come(r)
				}
				for i := range r.columns {
					if unsure {
						raise(r, i, hidden)
					} else {
						raise(r, i, out.columns[i].taint)
					}
				}
			}
		}
	}
}

// generated is the taint of a generated column's expression.
func (g *Guard) generated(r *relation, expression string) taint {
	stmts, why := parse("SELECT " + expression)
	if why != nil || len(stmts) != 1 || len(stmts[0].GetSelectStmt().GetTargetList()) != 1 {
		return hidden
	}
	a := &analysis{g: g, trusted: true}
	sc := &scope{sources: []*source{a.relationSource(r, nil)}}
	t := a.expr(sc, stmts[0].GetSelectStmt().TargetList[0].GetResTarget().Val).used()
	if a.refusal != nil {
		return hidden
	}
	return t
}
