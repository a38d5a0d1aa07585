package guard

import (
	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// assign judges a value that is written to a column: what is masked may go only
// where it is masked just as well. A view's masks are a guess on the safe side,
// and no promise about the table behind it.
func (a *analysis) assign(to *source, name string, t taint) {
	if t == clean {
		return
	}
	c, ok := to.column(name)
	if !ok || c.taint < t || to.relation == nil || to.relation.isView() || to.relation.kind == 'f' {
		a.refuse(stateForbidden, "a masked value would be written where it is not masked")
	}
}

// returning analyses what a write returns. It reads the table.
func (a *analysis) returning(sc *scope, list []*pgquery.Node, to *source, from []item) *result {
	if len(list) == 0 {
		return &result{}
	}
	if !a.may("select") {
		a.refuse(stateForbidden, "RETURNING is let through together with SELECT")
	}
	r := a.targets(sc, list, append([]item{to.item()}, from...))
	r.cond = max(r.cond, sc.cond).used()
	return r
}

func (a *analysis) insert(up *scope, s *pgquery.InsertStmt) *result {
	sc := &scope{up: up}
	a.with(sc, s.WithClause)
	to := a.target(s.Relation, "insert")
	if to == nil {
		return &result{}
	}
	var names []string
	for _, n := range s.Cols {
		t := n.GetResTarget()
		a.exprs(sc, subscripts(t.GetIndirection()))
		names = append(names, t.GetName())
	}
	if len(s.Cols) == 0 {
		for _, c := range a.relationSource(to.relation, nil).columns {
			names = append(names, c.name)
		}
	}
	base := a.relationSource(to.relation, nil)
	if s.SelectStmt != nil {
		r := a.query(sc, s.SelectStmt).inner()
		sc.cond = max(sc.cond, r.cond)
		if len(r.columns) > len(names) {
			a.refuse("42601", "more values than columns")
			return &result{}
		}
		for i, c := range r.columns {
			a.assign(base, names[i], c.taint)
		}
		if r.loose && r.any() != clean {
			a.refuse(stateForbidden, "a masked value would be written where it is not known")
		}
	}
	sc.sources = append(sc.sources, to)
	if c := s.OnConflictClause; c != nil {
		if c.Infer != nil {
			a.exprs(sc, c.Infer.IndexElems)
			a.expr(sc, c.Infer.WhereClause)
		}
		if len(c.TargetList) > 0 {
			a.reach(to.relation, "update")
			excluded := a.relationSource(to.relation, nil)
			excluded.alias, excluded.schema = "excluded", ""
			both := &scope{up: sc, sources: []*source{excluded}}
			a.assignments(both, c.TargetList, base)
			a.expr(both, c.WhereClause)
		}
	}
	return a.returning(sc, s.ReturningList, to, nil)
}

// assignments judges a list of SET.
func (a *analysis) assignments(sc *scope, list []*pgquery.Node, base *source) {
	for _, n := range list {
		t := n.GetResTarget()
		if t == nil {
			a.refuse(stateUnsupported, "an assignment that is not understood")
			return
		}
		v := max(a.expr(sc, t.Val), a.exprs(sc, subscripts(t.Indirection)))
		if t.Val.GetColumnRef() == nil || len(t.Indirection) > 0 {
			v = v.used()
		}
		a.assign(base, t.Name, v)
	}
}

// subscripts are the expressions of what stands behind a column that is
// assigned to; fields have none.
func subscripts(list []*pgquery.Node) (out []*pgquery.Node) {
	for _, n := range list {
		if i := n.GetAIndices(); i != nil {
			out = append(out, i.Lidx, i.Uidx)
		}
	}
	return out
}

func (a *analysis) update(up *scope, s *pgquery.UpdateStmt) *result {
	sc := &scope{up: up}
	a.with(sc, s.WithClause)
	to := a.target(s.Relation, "update")
	if to == nil {
		return &result{}
	}
	sc.sources = append(sc.sources, to)
	var from []item
	for _, f := range s.FromClause {
		from = append(from, a.from(sc, f))
	}
	a.assignments(sc, s.TargetList, a.relationSource(to.relation, nil))
	sc.cond = max(sc.cond, a.expr(sc, s.WhereClause))
	a.narrowed("UPDATE", s.WhereClause, to)
	return a.returning(sc, s.ReturningList, to, from)
}

func (a *analysis) delete(up *scope, s *pgquery.DeleteStmt) *result {
	sc := &scope{up: up}
	a.with(sc, s.WithClause)
	to := a.target(s.Relation, "delete")
	if to == nil {
		return &result{}
	}
	sc.sources = append(sc.sources, to)
	var from []item
	for _, f := range s.UsingClause {
		from = append(from, a.from(sc, f))
	}
	sc.cond = max(sc.cond, a.expr(sc, s.WhereClause))
	a.narrowed("DELETE", s.WhereClause, to)
	return a.returning(sc, s.ReturningList, to, from)
}

func (a *analysis) merge(up *scope, s *pgquery.MergeStmt) *result {
	sc := &scope{up: up}
	a.with(sc, s.WithClause)
	r := a.lookup(s.Relation)
	if r == nil {
		return &result{}
	}
	to, base := a.relationSource(r, s.Relation.Alias), a.relationSource(r, nil)
	if len(s.ReturningList) > 0 {
		a.refuse(stateUnsupported, "RETURNING of MERGE is not supported")
	}
	sc.sources = append(sc.sources, to)
	a.from(sc, s.SourceRelation)
	sc.cond = max(sc.cond, a.expr(sc, s.JoinCondition))
	for _, n := range s.MergeWhenClauses {
		w := n.GetMergeWhenClause()
		if w == nil {
			a.refuse(stateUnsupported, "an action of MERGE that is not understood")
			return &result{}
		}
		a.expr(sc, w.Condition)
		switch w.CommandType {
		case pgquery.CmdType_CMD_INSERT:
			a.reach(r, "insert")
			names := make([]string, 0, len(base.columns))
			for _, t := range w.TargetList {
				a.exprs(sc, subscripts(t.GetResTarget().GetIndirection()))
				names = append(names, t.GetResTarget().GetName())
			}
			if len(names) == 0 {
				for _, c := range base.columns {
					names = append(names, c.name)
				}
			}
			for i, v := range w.Values {
				t := a.expr(sc, v).used()
				if i >= len(names) {
					a.refuse("42601", "more values than columns")
					return &result{}
				}
				a.assign(base, names[i], t)
			}
		case pgquery.CmdType_CMD_UPDATE:
			a.reach(r, "update")
			a.assignments(sc, w.TargetList, base)
			a.mergeNarrowed("UPDATE", s, w, to)
		case pgquery.CmdType_CMD_DELETE:
			a.reach(r, "delete")
			a.mergeNarrowed("DELETE", s, w, to)
		case pgquery.CmdType_CMD_NOTHING:
			a.reach(r, "select")
		default:
			a.refuse(stateUnsupported, "an action of MERGE that is not understood")
		}
	}
	return &result{}
}

func (a *analysis) mergeNarrowed(kind string, s *pgquery.MergeStmt, w *pgquery.MergeWhenClause, to *source) {
	if w.MatchKind == pgquery.MergeMatchKind_MERGE_WHEN_NOT_MATCHED_BY_SOURCE {
		a.narrowed(kind, w.Condition, to)
		return
	}
	if !narrows(s.JoinCondition, to) {
		a.narrowed(kind, w.Condition, to)
	}
}

// narrowed refuses a write to every row of a table.
func (a *analysis) narrowed(kind string, where *pgquery.Node, to *source) {
	if a.g.access.Everywhere || a.trusted || narrows(where, to) {
		return
	}
	a.refuse(stateForbidden, kind+" without a WHERE that names a column of its table (in a sub-select: with the table's name before it) is not let through")
}

// narrows reports whether a condition can tell rows of to apart: whether it
// names a column other than to compare it with itself. What it does not see
// through (id IS NOT NULL, amount > -1) is said in docs/access-postgres.md.
func narrows(n *pgquery.Node, to *source) bool {
	switch e := n.GetNode().(type) {
	case nil:
		return false
	case *pgquery.Node_BoolExpr:
		switch e.BoolExpr.Boolop {
		case pgquery.BoolExprType_AND_EXPR:
			for _, arg := range e.BoolExpr.Args {
				if narrows(arg, to) {
					return true
				}
			}
			return false
		default:
			for _, arg := range e.BoolExpr.Args {
				if !narrows(arg, to) {
					return false
				}
			}
			return true
		}
	case *pgquery.Node_AExpr:
		if same(e.AExpr.Lexpr, e.AExpr.Rexpr) {
			return false
		}
	}
	return names(n, to, false)
}

// same reports whether two expressions are the same but for where they stand.
func same(x, y *pgquery.Node) bool {
	if x == nil || y == nil {
		return false
	}
	x, y = proto.Clone(x).(*pgquery.Node), proto.Clone(y).(*pgquery.Node)
	for _, n := range []*pgquery.Node{x, y} {
		each(n.ProtoReflect(), func(m protoreflect.Message) bool {
			if f := m.Descriptor().Fields().ByName("location"); f != nil {
				m.Clear(f)
			}
			return true
		})
	}
	return proto.Equal(x, y)
}

// names reports whether a column of to stands in n, with the table before it
// where it has to be qualified. Within a sub-select it has to be, since a bare
// name may be that of a column there, and nothing there may bear the table's name.
func names(n *pgquery.Node, to *source, qualified bool) (found bool) {
	each(n.ProtoReflect(), func(m protoreflect.Message) bool {
		switch e := m.Interface().(type) {
		case *pgquery.SubLink:
			if qualified {
				return true
			}
			found = found || names(e.Testexpr, to, false) || !bears(e.Subselect, to.alias) && names(e.Subselect, to, true)
			return false
		case *pgquery.ColumnRef:
			found = found || columnOf(e, to, qualified)
		}
		return true
	})
	return found
}

// columnOf reports whether ref names a column of to.
func columnOf(ref *pgquery.ColumnRef, to *source, qualified bool) bool {
	if len(ref.Fields) == 0 {
		return false
	}
	schema, table := qualifiedName(ref.Fields[:len(ref.Fields)-1])
	if table == "" && qualified || table != "" && table != to.alias || schema != "" && schema != to.schema {
		return false
	}
	_, ok := to.column(ref.Fields[len(ref.Fields)-1].GetString_().GetSval())
	return ok
}

// bears reports whether an entry of a FROM within n may have that name.
func bears(n *pgquery.Node, name string) (found bool) {
	each(n.ProtoReflect(), func(m protoreflect.Message) bool {
		switch e := m.Interface().(type) {
		case *pgquery.RangeVar:
			found = found || e.Alias == nil && e.Relname == name
		case *pgquery.Alias:
			found = found || e.Aliasname == name
		case *pgquery.RangeFunction:
			each(m, func(m protoreflect.Message) bool {
				if call, ok := m.Interface().(*pgquery.FuncCall); ok {
					_, f := qualifiedName(call.Funcname)
					found = found || f == name
				}
				return true
			})
		}
		return true
	})
	return found
}

// each calls f with m and every message below it, but for those below one for
// which f returns false.
func each(m protoreflect.Message, f func(protoreflect.Message) bool) {
	if !f(m) {
		return
	}
	m.Range(func(d protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case d.Message() == nil:
		case d.IsList():
			for i := range v.List().Len() {
				each(v.List().Get(i).Message(), f)
			}
		default:
			each(v.Message(), f)
		}
		return true
	})
}
