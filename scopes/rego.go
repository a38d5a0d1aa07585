package scopes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"

	"github.com/countersign-dev/countersign/store"
)

// evalTime bounds one evaluation, in wall time. A policy that needs longer
// denies.
const evalTime = 250 * time.Millisecond

// maxReasons and maxReason bound what a policy adds to the record: 16 reasons
// of 256 bytes.
const (
	maxReasons = 16
	maxReason  = 256
)

// rules are what a policy may say, each a partial set (`rule contains x if`).
var rules = []string{"approval", "deny", "shorten"}

// policy is a compiled Rego policy.
type policy struct{ query rego.PreparedEvalQuery }

// said is what a policy answered, each list sorted.
type said struct {
	deny, approval []string
	groups         []store.RuleGroup // who must approve, where the policy says so
	shorten        []shortening
}

type shortening struct {
	ttl    time.Duration
	reason string
}

// inputSchema is the input document, as JSON Schema. The compiler checks each
// reference against it: a misspelt field would be undefined, its rule would
// never hold, and a denial would be lost without a word.
var inputSchema = map[string]any{
	"type":                 "object",
	"additionalProperties": false,
	"properties": map[string]any{
		"agent": text, "orchestrator": text, "run": text, "step": text,
		"scope": text, "target": text, "sensitivity": text, "engine": text,
		"params": map[string]any{"type": "object", "additionalProperties": map[string]any{"type": "string"}},
		"subject": map[string]any{"type": "object", "additionalProperties": false, "properties": map[string]any{
			"id": text, "proved": map[string]any{"type": "boolean"},
		}},
		"ttl_seconds": map[string]any{"type": "integer"},
		"delivery":    text,
		"time":        text,
	},
}

var text = map[string]any{"type": "string"}

// capabilities are the built-in functions a policy may call: those whose
// answer follows from their arguments. Nothing reaches the network, the
// process or a clock; the time is in the input, so that a decision can be
// made again from the record.
func capabilities() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.AllowNet = []string{} // no host, for schemas either
	c.Builtins = slices.DeleteFunc(c.Builtins, func(b *ast.Builtin) bool {
		if b.Nondeterministic {
			return true
		}
		switch b.Name {
		case "http.send", "net.lookup_ip_addr", "opa.runtime", "rego.parse_module", "rego.metadata.chain", "rego.metadata.rule",
			"providers.aws.sign_req", "time.now_ns", "rand.intn", "uuid.rfc4122", "trace", "print":
			return true
		}
		return false
	})
	return c
}

// readPolicy compiles a policy.
func readPolicy(name string, b []byte) (*policy, Problems) {
	if len(b) > maxFile {
		return nil, Problems{{name, 0, 0, fmt.Sprintf("the file has %d bytes or more, at most %d are read", len(b), maxFile), "split it"}}
	}
	caps := capabilities()
	module, err := ast.ParseModuleWithOpts(name, string(b), ast.ParserOptions{Capabilities: caps, RegoVersion: ast.RegoV1})
	if err != nil {
		return nil, regoProblems(name, err)
	}
	if module == nil {
		return nil, Problems{{name, 1, 1, "the policy is empty", "begin it with `package countersign`"}}
	}
	var problems Problems
	bad := func(l *ast.Location, message, fix string) {
		p := Problem{File: name, Message: message, Fix: fix}
		if l != nil {
			p.Line, p.Column = l.Row, l.Col
		}
		problems = append(problems, p)
	}
	if got := module.Package.Path.String(); got != "data.countersign" {
		bad(module.Package.Location, "the package is "+got[len("data."):], "write `package countersign`")
	}
	found := map[string]bool{}
	for _, rule := range module.Rules {
		word := string(rule.Head.Name)
		if ref := rule.Head.Ref(); len(ref) > 0 {
			if v, ok := ref[0].Value.(ast.Var); ok {
				word = string(v)
			}
		}
		if !slices.Contains(rules, word) {
			continue
		}
		found[word] = true
		if rule.Head.RuleKind() != ast.MultiValue || len(rule.Head.Ref()) != 1 || rule.Default {
			want := word + " contains \"why\" if { ... }"
			if word == "shorten" {
				want = `shorten contains {"ttl": "5m", "reason": "why"} if { ... }`
			}
			bad(rule.Head.Location, word+" is not a set of what the policy says", "write `"+want+"`")
		}
	}
	if len(found) == 0 && len(problems) == 0 {
		bad(module.Package.Location, "the policy says nothing", "write a rule named deny, approval or shorten")
	}
	if len(problems) > 0 {
		return nil, problems
	}
	schemas := ast.NewSchemaSet()
	schemas.Put(ast.SchemaRootRef, inputSchema)
	compiler := ast.NewCompiler().
		WithCapabilities(caps).
		WithStrict(true).
		WithSchemas(schemas).
		WithUseTypeCheckAnnotations(false).
		WithDefaultRegoVersion(ast.RegoV1)
	if compiler.Compile(map[string]*ast.Module{name: module}); compiler.Failed() {
		return nil, regoProblems(name, compiler.Errors)
	}
	// There is no data but the policy's own rules. A reference to any other
	// would be undefined, and its rule would never hold.
	ast.WalkRefs(compiler.Modules[name], func(ref ast.Ref) bool {
		if ref.HasPrefix(ast.DefaultRootRef) && len(compiler.GetRules(ref)) == 0 {
			bad(ref[0].Location, "undefined ref: "+ref.String(), "there is no data but this policy's own rules; write the values into it")
		}
		return false
	})
	if len(problems) > 0 {
		return nil, problems
	}
	// Only the rules that stand in the policy are asked for: one that is not
	// there is undefined, and would make the whole query so.
	query := ""
	for _, word := range rules {
		if found[word] {
			query += word + " = data.countersign." + word + "; "
		}
	}
	prepared, err := rego.New(
		rego.Query(query[:len(query)-2]),
		rego.Compiler(compiler),
		rego.Capabilities(caps),
		rego.StrictBuiltinErrors(true),
	).PrepareForEval(context.Background())
	if err != nil {
		return nil, regoProblems(name, err)
	}
	return &policy{prepared}, nil
}

func regoProblems(name string, err error) Problems {
	var list ast.Errors
	var one *ast.Error
	switch {
	case errors.As(err, &list):
	case errors.As(err, &one):
		list = ast.Errors{one}
	default:
		return Problems{{File: name, Message: err.Error()}}
	}
	var out Problems
	for _, e := range list {
		p := Problem{File: name, Line: 1, Column: 1, Message: e.Message}
		switch e.Code {
		case ast.TypeErr:
			p.Fix = "the input's fields and the functions allowed stand in docs/policy.md"
		case ast.ParseErr:
			p.Fix = "write Rego v1"
		}
		if e.Location != nil {
			p.Line, p.Column = e.Location.Row, e.Location.Col
		}
		out = append(out, p)
		if len(out) == maxProblems {
			break
		}
	}
	return out
}

// eval asks the policy. Any error means that nothing is allowed.
func (p *policy) eval(ctx context.Context, sc *Scope, ask Ask, g store.Grant) (*said, error) {
	ctx, cancel := context.WithTimeout(ctx, evalTime)
	defer cancel()
	results, err := p.query.Eval(ctx, rego.EvalParsedInput(input(sc, ask, g)))
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("it took longer than %s", evalTime)
		}
		return nil, err
	}
	if len(results) != 1 {
		return nil, fmt.Errorf("it gave %d results, not one", len(results))
	}
	out := &said{}
	for _, word := range rules {
		list, ok := results[0].Bindings[word]
		if !ok {
			continue
		}
		items, ok := list.([]any)
		if !ok {
			return nil, fmt.Errorf("%s is not a set", word)
		}
		if len(items) > maxReasons {
			return nil, fmt.Errorf("%s has %d items, at most %d are taken", word, len(items), maxReasons)
		}
		for _, item := range items {
			if err := out.add(word, item); err != nil {
				return nil, err
			}
		}
	}
	slices.Sort(out.deny)
	slices.Sort(out.approval)
	slices.SortFunc(out.shorten, func(a, b shortening) int { return int(a.ttl - b.ttl) })
	return out, nil
}

func (s *said) add(word string, item any) error {
	switch word {
	case "deny", "approval":
		if m, ok := item.(map[string]any); ok && word == "approval" {
			var err error
			if item, err = s.demand(m); err != nil {
				return fmt.Errorf("%s: %w", word, err)
			}
		}
		msg, err := reason(item)
		if err != nil {
			return fmt.Errorf("%s: %w", word, err)
		}
		if word == "deny" {
			s.deny = append(s.deny, msg)
		} else {
			s.approval = append(s.approval, msg)
		}
		return nil
	}
	m, ok := item.(map[string]any)
	if !ok || len(m) != 2 {
		return errors.New(`shorten: an item is not {"ttl": "5m", "reason": "why"}`)
	}
	msg, err := reason(m["reason"])
	if err != nil {
		return fmt.Errorf("shorten: %w", err)
	}
	t, ok := m["ttl"].(string)
	if !ok {
		return errors.New("shorten: ttl is not a string")
	}
	d, err := time.ParseDuration(t)
	if err != nil || d < time.Second || d%time.Second != 0 {
		return errors.New("shorten: ttl is not a duration of whole seconds")
	}
	s.shorten = append(s.shorten, shortening{d, msg})
	return nil
}

// demand reads {"reason": …, "groups": {"dba": 2}} and returns the reason.
func (s *said) demand(m map[string]any) (reason any, err error) {
	groups, ok := m["groups"].(map[string]any)
	if !ok || len(m) != 2 || len(groups) == 0 {
		return nil, errors.New(`an item is neither a reason nor {"reason": "why", "groups": {"dba": 1}}`)
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		n, ok := groups[name].(json.Number)
		count, err := n.Int64()
		if !ok || err != nil || count < 1 || count > 20 || !store.ValidID(name) {
			return nil, fmt.Errorf("group %q: a name, and 1 to 20 people", clip(name))
		}
		if i := slices.IndexFunc(s.groups, func(g store.RuleGroup) bool { return g.Group == name }); i >= 0 {
			s.groups[i].Count = max(s.groups[i].Count, int(count))
		} else {
			s.groups = append(s.groups, store.RuleGroup{Group: name, Count: int(count)})
		}
	}
	if len(s.groups) > 10 {
		return nil, errors.New("more than 10 groups")
	}
	return m["reason"], nil
}

func reason(v any) (string, error) {
	s, ok := v.(string)
	switch {
	case !ok || s == "":
		return "", errors.New("a reason is not a string")
	case len(s) > maxReason || !printable(s):
		return "", fmt.Errorf("a reason is longer than %d bytes or not one line", maxReason)
	}
	return s, nil
}

// input is the document that the policy judges. It is built as a Rego value
// at once: going over JSON would take longer than the evaluation.
func input(sc *Scope, ask Ask, g store.Grant) ast.Value {
	params := ast.NewObject()
	for k, v := range g.Params {
		params.Insert(ast.StringTerm(k), ast.StringTerm(v))
	}
	field := func(name, value string) [2]*ast.Term {
		return [2]*ast.Term{ast.StringTerm(name), ast.StringTerm(value)}
	}
	return ast.NewObject(
		field("agent", ask.Agent),
		field("orchestrator", ask.Orchestrator),
		field("run", ask.Run),
		field("step", ask.Step),
		field("scope", sc.Name),
		field("target", g.Target),
		field("sensitivity", sc.Sensitivity),
		field("engine", string(sc.Engine)),
		[2]*ast.Term{ast.StringTerm("params"), ast.NewTerm(params)},
		[2]*ast.Term{ast.StringTerm("subject"), ast.NewTerm(ast.NewObject(
			field("id", ask.Subject),
			[2]*ast.Term{ast.StringTerm("proved"), ast.BooleanTerm(ask.SubjectProved)},
		))},
		[2]*ast.Term{ast.StringTerm("ttl_seconds"), ast.NumberTerm(json.Number(strconv.FormatInt(int64(time.Duration(g.TTL)/time.Second), 10)))},
		field("delivery", g.Delivery),
		field("time", ask.Time.UTC().Format(time.RFC3339)),
	)
}
