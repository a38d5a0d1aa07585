// Package guard decides what a step may send to a PostgreSQL target, and which
// columns of the answer can carry what is to be hidden. It parses with
// PostgreSQL's own grammar and lets through what it knows: every other
// statement, expression, function, type and relation is refused.
package guard

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"github.com/pganalyze/pg_query_go/v6/parser"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
)

// Bounds of what is parsed. The parser builds and writes trees by recursion on
// a C stack of perhaps 2 MiB, so that what is beyond maxPath would end the
// process.
const (
	maxStatement = 256 << 10 // bytes
	maxPath      = 2000      // tokens that can nest within each other
	unscanned    = 1000      // bytes that hold fewer tokens than maxPath
	large        = 16 << 10  // bytes of what is parsed one at a time
	maxStrings   = 100       // statements in one string
	maxSteps     = 500_000   // nodes looked at for one string
	maxName      = 63        // bytes of an identifier (NAMEDATALEN - 1)
)

// SQLSTATEs of refusals.
const (
	stateForbidden   = "42501" // insufficient_privilege
	stateUnsupported = "0A000" // feature_not_supported
	stateSyntax      = "42601"
	stateTooComplex  = "54001" // statement_too_complex
)

// Verdict is what the guard makes of one string of statements. Verdicts are
// shared: they must not be changed.
type Verdict struct {
	Statements []Statement
	Refused    string // why, in words that hold no value; empty where it is let through
	SQLState   string // for Refused
}

// Statement is one statement of a Verdict. Of one that is refused, Kind, Use and
// Tables say what was understood before.
type Statement struct {
	Kind    string   // SELECT, INSERT, BEGIN, SET, ...
	Use     string   // one line without values, such as "SELECT orders"
	Tables  []string // in the order in which they stand there
	Tainted bool     // it comes near something masked: its errors and notices can hold values
	// Columns says which columns of the answer are hidden. It is nil where none
	// can be, and of another length than the answer has where the guard did not
	// see what they are: then no row may be handed on.
	Columns []bool
	Copy    string // in, out, or empty

	// The names of what SQL itself prepares and declares. What comes near
	// something masked is refused there (0A000). Statements and portals of the
	// extended protocol bear names of the same kind, and they can come near it:
	// Columns and Tainted of an EXECUTE or a FETCH are those of what its name
	// means in the connection.

	Prepare, Execute, Deallocate, Declare, Fetch, CloseCursor string // "*" stands for all
}

// Guard holds the rules of one grant against one target. It is safe for
// concurrent use.
type Guard struct {
	access  *store.PostgresAccess
	masker  *masking.Masker
	catalog *Catalog
	masks   map[*relation][]taint
	near    map[*relation]bool // reads or holds something masked
	active  bool               // something is masked

	named map[string]bool // access.Functions, qualified

	mu     sync.Mutex
	cache  map[string]*Verdict // by text
	shapes map[string]*Verdict // by shape, see there
}

// The caches hold what clients send again and again: short texts.
const (
	cached     = 256  // verdicts in each
	cachedText = 2048 // bytes of the longest text
)

// New returns the guard of a on the target that c describes, hiding what m does.
func New(a *store.PostgresAccess, m *masking.Masker, c *Catalog) *Guard {
	g := &Guard{access: a, masker: m, catalog: c, masks: map[*relation][]taint{}, near: map[*relation]bool{}, named: map[string]bool{}, cache: map[string]*Verdict{}, shapes: map[string]*Verdict{}}
	for _, f := range a.Functions {
		if !strings.Contains(f, ".") {
			f = "public." + f
		}
		g.named[f] = true
	}
	g.mask()
	return g
}

// TypeHidden reports whether values of the type with this OID (pg_type.oid, as
// the RowDescription has it) are hidden wherever they come from.
func (g *Guard) TypeHidden(oid uint32) bool {
	t := g.catalog.types[fmt.Sprint(oid)]
	return t != nil && g.typeTaint(t) == hidden
}

// Check judges a string of statements: all of them pass, or none. It never
// returns nil.
func (g *Guard) Check(sql string) *Verdict {
	if len(sql) > cachedText {
		return g.check(sql)
	}
	form := shape(make([]byte, 0, 256), sql)
	g.mu.Lock()
	v := g.cache[sql]
	if v == nil && form != nil {
		v = g.shapes[string(form)]
	}
	g.mu.Unlock()
	if v != nil {
		return v
	}
	v = g.check(sql)
	g.mu.Lock()
	defer g.mu.Unlock()
	if form != nil && v.shaped() {
		keep(g.shapes, string(form), v)
	} else {
		keep(g.cache, strings.Clone(sql), v)
	}
	return v
}

// keep puts v in cache, in the place of any other where it is full.
func keep(cache map[string]*Verdict, key string, v *Verdict) {
	if len(cache) >= cached {
		for k := range cache {
			delete(cache, k)
			break
		}
	}
	cache[key] = v
}

func (g *Guard) check(sql string) *Verdict {
	stmts, why := parse(sql)
	if why != nil {
		return &Verdict{Refused: why.reason, SQLState: why.state}
	}
	v := &Verdict{Statements: make([]Statement, 0, len(stmts))}
	steps := 0
	for _, s := range stmts {
		a := &analysis{g: g, steps: steps}
		st := a.statement(s)
		steps = a.steps
		v.Statements = append(v.Statements, st)
		if a.refusal != nil {
			v.Refused, v.SQLState = a.refusal.reason, a.refusal.state
			// The first is what a refusal is recorded as.
			v.Statements = []Statement{st}
			return v
		}
	}
	return v
}

// refusal is why something is not let through.
type refusal struct{ state, reason string }

// big lets one large text be parsed at a time: it takes some 500 times its
// size in memory while it is a tree.
var big sync.Mutex

// parse returns the statements of sql, within the bounds.
func parse(sql string) ([]*pgquery.Node, *refusal) {
	switch {
	case len(sql) > maxStatement:
		return nil, &refusal{stateTooComplex, fmt.Sprintf("a statement of more than %d bytes", maxStatement)}
	case !utf8.ValidString(sql):
		return nil, &refusal{"22021", "the statement is not UTF-8"}
	case strings.IndexByte(sql, 0) >= 0:
		return nil, &refusal{"22021", "the statement holds a zero byte"}
	}
	if len(sql) > large {
		big.Lock()
		defer big.Unlock()
	}
	if len(sql) > unscanned || longWord(sql) {
		if r := scan(sql); r != nil {
			return nil, r
		}
	}
	tree, err := pgquery.Parse(sql)
	if err != nil {
		var at *parser.Error
		if errors.As(err, &at) {
			return nil, &refusal{stateSyntax, fmt.Sprintf("syntax error at character %d", at.Cursorpos)}
		}
		return nil, &refusal{stateTooComplex, "the statement is too deep"}
	}
	if len(tree.Stmts) > maxStrings {
		return nil, &refusal{stateTooComplex, fmt.Sprintf("more than %d statements in one string", maxStrings)}
	}
	out := make([]*pgquery.Node, len(tree.Stmts))
	for i, s := range tree.Stmts {
		out[i] = s.Stmt
	}
	return out, nil
}

// longWord reports whether sql may hold an identifier of more than maxName
// bytes. It tells without a lexer, and takes all that has quotes to hold one.
func longWord(sql string) bool {
	if len(sql) <= maxName {
		return false
	}
	for i, since := 0, 0; i < len(sql); i++ {
		switch c := sql[i]; {
		case c == '"':
			return true
		case word(c), c == '$', c >= utf8.RuneSelf:
			if since++; since > maxName {
				return true
			}
		default:
			since = 0
		}
	}
	return false
}

// scan bounds how deep the tree of sql can be: no deeper than there are tokens
// in its list items and those around them. A comma begins another item, on the
// same level. It refuses identifiers that PostgreSQL would clip: the parser need
// not clip them at the same character. As they stand there they are no shorter
// than what they mean.
func scan(sql string) *refusal {
	r, err := pgquery.Scan(sql)
	if err != nil {
		return &refusal{stateSyntax, "syntax error"}
	}
	path, since := 0, []int{0}
	for _, t := range r.Tokens {
		switch t.Token {
		case pgquery.Token_IDENT, pgquery.Token_UIDENT:
			name := sql[t.Start:t.End]
			if _, quoted, ok := strings.Cut(name, `"`); ok {
				name = strings.TrimSuffix(quoted, `"`)
			}
			if len(name) > maxName {
				return &refusal{"42622", fmt.Sprintf("an identifier of more than %d bytes", maxName)}
			}
			path++
			since[len(since)-1]++
		case pgquery.Token_SQL_COMMENT, pgquery.Token_C_COMMENT:
			continue
		case pgquery.Token_ASCII_40, pgquery.Token_ASCII_91: // ( [
			path++
			since[len(since)-1]++
			since = append(since, 0)
		case pgquery.Token_ASCII_41, pgquery.Token_ASCII_93: // ) ]
			if len(since) > 1 {
				path -= since[len(since)-1]
				since = since[:len(since)-1]
			}
		case pgquery.Token_ASCII_44, pgquery.Token_ASCII_59: // , ;
			path -= since[len(since)-1]
			since[len(since)-1] = 0
		default:
			path++
			since[len(since)-1]++
		}
		if path > maxPath {
			return &refusal{stateTooComplex, "the statement is too deep"}
		}
	}
	return nil
}

// statement judges one statement.
func (a *analysis) statement(n *pgquery.Node) (st Statement) {
	switch s := n.Node.(type) {
	case *pgquery.Node_SelectStmt, *pgquery.Node_InsertStmt, *pgquery.Node_UpdateStmt, *pgquery.Node_DeleteStmt, *pgquery.Node_MergeStmt:
		st.Kind = kindOf(n)
		st.Columns = a.query(nil, n).hidden()
	case *pgquery.Node_CopyStmt:
		st.Kind = "COPY"
		st.Copy = a.copy(s.CopyStmt)
	case *pgquery.Node_ExplainStmt:
		st.Kind = "EXPLAIN"
		a.explain(s.ExplainStmt)
	case *pgquery.Node_TransactionStmt:
		st.Kind = a.transaction(s.TransactionStmt)
	case *pgquery.Node_VariableSetStmt:
		st.Kind = a.set(s.VariableSetStmt)
	case *pgquery.Node_VariableShowStmt:
		st.Kind = "SHOW"
		name := strings.ToLower(s.VariableShowStmt.Name)
		if _, ok := settings[name]; !ok && !shown[name] {
			a.refuse(stateForbidden, "this setting may not be shown")
		}
	case *pgquery.Node_DiscardStmt:
		st.Kind = "DISCARD"
		if t := s.DiscardStmt.Target; t == pgquery.DiscardMode_DISCARD_ALL {
			st.Deallocate, st.CloseCursor = "*", "*"
		}
	case *pgquery.Node_PrepareStmt:
		st.Kind, st.Prepare = "PREPARE", s.PrepareStmt.Name
		for _, t := range s.PrepareStmt.Argtypes {
			a.typeName(t.GetTypeName())
		}
		a.prepared(s.PrepareStmt.Query)
	case *pgquery.Node_DeclareCursorStmt:
		st.Kind, st.Declare = "DECLARE", s.DeclareCursorStmt.Portalname
		if s.DeclareCursorStmt.Query.GetSelectStmt() == nil {
			a.refuse(stateUnsupported, "a cursor over something other than SELECT")
		}
		a.prepared(s.DeclareCursorStmt.Query)
	case *pgquery.Node_ExecuteStmt:
		st.Kind, st.Execute = "EXECUTE", s.ExecuteStmt.Name
		a.execute(s.ExecuteStmt)
	case *pgquery.Node_FetchStmt:
		st.Kind, st.Fetch = "FETCH", s.FetchStmt.Portalname
		if s.FetchStmt.Ismove {
			st.Kind = "MOVE"
		}
	case *pgquery.Node_ClosePortalStmt:
		st.Kind, st.CloseCursor = "CLOSE", s.ClosePortalStmt.Portalname
		if st.CloseCursor == "" {
			st.CloseCursor = "*"
		}
	case *pgquery.Node_DeallocateStmt:
		st.Kind, st.Deallocate = "DEALLOCATE", s.DeallocateStmt.Name
		if st.Deallocate == "" {
			st.Deallocate = "*"
		}
	default:
		st.Kind = kindOf(n)
		a.refuse(stateForbidden, st.Kind+" is not let through")
	}
	if a.refusal != nil {
		st.Columns, st.Copy = nil, ""
	}
	st.Tainted = a.near
	for _, r := range a.tables {
		st.Tables = append(st.Tables, r.qualified())
	}
	st.Use = st.Kind
	if more := slices.DeleteFunc(slices.Clone(a.writes), func(k string) bool { return k == st.Kind }); len(more) > 0 {
		st.Use += " with " + strings.Join(slices.Compact(more), ", ")
	}
	if len(st.Tables) > 0 {
		st.Use += " " + strings.Join(st.Tables[:min(len(st.Tables), 8)], ", ")
	}
	return st
}

// kindOf names a kind of statement by the parser's name of its node.
func kindOf(n *pgquery.Node) string {
	name := strings.TrimPrefix(fmt.Sprintf("%T", n.GetNode()), "*pg_query.Node_")
	var b strings.Builder
	for i, c := range strings.TrimSuffix(name, "Stmt") {
		if i > 0 && 'A' <= c && c <= 'Z' {
			b.WriteByte(' ')
		}
		b.WriteRune(c)
	}
	return strings.ToUpper(b.String())
}

// prepared judges what is executed later under a name.
func (a *analysis) prepared(n *pgquery.Node) {
	switch n.GetNode().(type) {
	case *pgquery.Node_SelectStmt, *pgquery.Node_InsertStmt, *pgquery.Node_UpdateStmt, *pgquery.Node_DeleteStmt, *pgquery.Node_MergeStmt:
	default:
		a.refuse(stateUnsupported, "PREPARE of "+kindOf(n)+" is not let through")
		return
	}
	a.query(nil, n)
	if a.near {
		a.refuse(stateUnsupported, "PREPARE and DECLARE are not let through where something is masked; use the extended protocol")
	}
}

func (a *analysis) execute(s *pgquery.ExecuteStmt) {
	sc := &scope{}
	for _, p := range s.Params {
		if a.expr(sc, p) != clean {
			a.refuse(stateForbidden, "a masked value as a parameter of EXECUTE is not let through")
		}
	}
}

// explainOptions are those of EXPLAIN that change only what it says.
var explainOptions = set("analyze verbose costs settings generic_plan buffers wal timing summary format memory")

func (a *analysis) explain(s *pgquery.ExplainStmt) {
	analyze := false
	for _, o := range s.Options {
		d := o.GetDefElem()
		if d == nil || !explainOptions[d.Defname] {
			a.refuse(stateUnsupported, "an option of EXPLAIN that is not known")
			return
		}
		// Whatever it is set to: off is the same as leaving it out.
		analyze = analyze || d.Defname == "analyze"
	}
	switch q := s.Query.GetNode().(type) {
	case *pgquery.Node_SelectStmt, *pgquery.Node_InsertStmt, *pgquery.Node_UpdateStmt, *pgquery.Node_DeleteStmt, *pgquery.Node_MergeStmt:
		a.query(nil, s.Query)
	case *pgquery.Node_ExecuteStmt:
		a.execute(q.ExecuteStmt)
		a.near = a.near || a.g.active // whatever the name means
	default:
		a.refuse(stateForbidden, "EXPLAIN of "+kindOf(s.Query)+" is not let through")
	}
	if analyze && a.near {
		a.refuse(stateForbidden, "EXPLAIN ANALYZE counts rows of something masked")
	}
}

func (a *analysis) transaction(s *pgquery.TransactionStmt) string {
	switch s.Kind {
	case pgquery.TransactionStmtKind_TRANS_STMT_BEGIN, pgquery.TransactionStmtKind_TRANS_STMT_START:
		for _, o := range s.Options {
			switch o.GetDefElem().GetDefname() {
			case "transaction_isolation", "transaction_read_only", "transaction_deferrable":
			default:
				a.refuse(stateUnsupported, "an option of BEGIN that is not known")
			}
		}
		return "BEGIN"
	case pgquery.TransactionStmtKind_TRANS_STMT_COMMIT:
		return "COMMIT"
	case pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK:
		return "ROLLBACK"
	case pgquery.TransactionStmtKind_TRANS_STMT_SAVEPOINT:
		return "SAVEPOINT"
	case pgquery.TransactionStmtKind_TRANS_STMT_RELEASE:
		return "RELEASE"
	case pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK_TO:
		return "ROLLBACK TO"
	}
	a.refuse(stateForbidden, "two-phase commit is not let through")
	return "PREPARE TRANSACTION"
}

func (a *analysis) set(s *pgquery.VariableSetStmt) string {
	name := strings.ToLower(s.Name)
	switch s.Kind {
	case pgquery.VariableSetKind_VAR_RESET_ALL:
		return "RESET"
	case pgquery.VariableSetKind_VAR_SET_MULTI:
		// SET TRANSACTION and SET SESSION CHARACTERISTICS; the third is a snapshot.
		if name != "transaction" && name != "session characteristics" {
			a.refuse(stateForbidden, "this setting may not be set")
		}
		for _, o := range s.Args {
			switch o.GetDefElem().GetDefname() {
			case "transaction_isolation", "transaction_read_only", "transaction_deferrable":
			default:
				a.refuse(stateUnsupported, "an option of SET TRANSACTION that is not known")
			}
		}
		return "SET"
	case pgquery.VariableSetKind_VAR_SET_VALUE, pgquery.VariableSetKind_VAR_SET_DEFAULT, pgquery.VariableSetKind_VAR_RESET:
	default:
		a.refuse(stateForbidden, "this form of SET is not let through")
		return "SET"
	}
	kind := "SET"
	if s.Kind == pgquery.VariableSetKind_VAR_RESET {
		kind = "RESET"
	}
	values, ok := settings[name]
	if !ok {
		a.refuse(stateForbidden, "this setting may not be set")
		return kind
	}
	if values != nil && s.Kind == pgquery.VariableSetKind_VAR_SET_VALUE {
		if len(s.Args) != 1 || !values[strings.ToLower(s.Args[0].GetAConst().GetSval().GetSval())] {
			a.refuse(stateForbidden, "this setting may not be set to that value")
		}
	}
	return kind
}

// copyOptions are those of COPY that do not change where rows come from or go.
var copyOptions = set("format delimiter null header quote escape force_quote force_not_null force_null default encoding")

func (a *analysis) copy(s *pgquery.CopyStmt) (direction string) {
	switch {
	case s.IsProgram:
		a.refuse(stateForbidden, "COPY of a program is not let through")
	case s.Filename != "":
		a.refuse(stateForbidden, "COPY of a file is not let through")
	case !a.may("copy"):
		a.refuse(stateForbidden, "COPY is not among the statements that are let through")
	}
	for _, o := range s.Options {
		d := o.GetDefElem()
		switch {
		case d == nil || !copyOptions[d.Defname]:
			a.refuse(stateUnsupported, "an option of COPY that is not known")
		case d.Defname == "encoding" && !settings["client_encoding"][strings.ToLower(d.Arg.GetString_().GetSval())]:
			a.refuse(stateForbidden, "COPY in an encoding other than UTF8")
		}
	}
	sc := &scope{}
	if s.Query != nil {
		q := a.query(nil, s.Query)
		if q.any() != clean {
			a.refuse(stateForbidden, "COPY of something masked is not let through")
		}
		return "out"
	}
	kind, direction := "select", "out"
	if s.IsFrom {
		kind, direction = "insert", "in"
	}
	src := a.target(s.Relation, kind)
	if src == nil {
		return direction
	}
	sc.sources = []*source{src}
	listed := src.columns
	if len(s.Attlist) == 0 {
		a.bare(listed)
	} else {
		listed = nil
		for _, n := range s.Attlist {
			c, ok := src.column(n.GetString_().GetSval())
			if !ok {
				a.refuse("42703", "a column that is not known")
			}
			listed = append(listed, c)
		}
	}
	a.expr(sc, s.WhereClause)
	if s.IsFrom {
		return direction
	}
	for _, c := range listed {
		if c.taint != clean {
			a.refuse(stateForbidden, "COPY of something masked is not let through")
			break
		}
	}
	return direction
}
