package scopes

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/countersign-dev/countersign/store"
)

// Lint checks files, each by itself: a name ending in .rego is a policy, any
// other a catalogue.
func Lint(paths ...string) []Problem {
	var out Problems
	for _, path := range paths {
		b, err := readFile(path)
		var found Problems
		switch {
		case err != nil:
			found = Problems{{File: path, Message: err.Error()}}
		case strings.HasSuffix(path, ".rego"):
			_, found = readPolicy(path, b)
		default:
			_, _, found = readCatalogue(path, b)
		}
		out = append(out, found.sorted()...)
	}
	return out
}

// CaseResult is what one policy case gave.
type CaseResult struct {
	Name     string
	Line     int      // of the case in its file
	Failures []string // what differs, each with what was wanted and what came; empty: passed
}

// sentinels are the errors that a case may expect, named like the slugs of
// their problem documents.
var sentinels = map[string]error{
	"unknown-scope":        ErrUnknownScope,
	"ttl-invalid":          ErrTTLInvalid,
	"ttl-too-long":         ErrTTLTooLong,
	"params-invalid":       ErrParams,
	"public-key-invalid":   ErrPublicKey,
	"delivery-unsupported": ErrDelivery,
	"reason-required":      ErrReasonRequired,
}

// Test runs the policy cases of a file. Where set is nil, the file's own keys
// `catalogue` and `policy` name what to load, relative to the file. The error
// is about the file itself: Problems where it could be read.
func Test(ctx context.Context, casesFile string, set *Set) ([]CaseResult, error) {
	b, err := readFile(casesFile)
	if err != nil {
		return nil, fmt.Errorf("read the cases: %w", err)
	}
	r := &reader{file: casesFile}
	top, cases := r.cases(b)
	if err := r.problems.sorted().err(); err != nil {
		return nil, err
	}
	if set == nil {
		relative := func(p string) string {
			if p == "" || filepath.IsAbs(p) {
				return p
			}
			return filepath.Join(filepath.Dir(casesFile), p)
		}
		if top.catalogue == "" {
			return nil, Problems{{casesFile, 1, 1, "the cases name no catalogue", "write `catalogue: FILE`, relative to this file"}}
		}
		if set, err = Load(relative(top.catalogue), relative(top.policy)); err != nil {
			return nil, err
		}
	}
	out := make([]CaseResult, 0, len(cases))
	for _, c := range cases {
		v, err := set.Decide(ctx, c.ask)
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		out = append(out, CaseResult{Name: c.name, Line: c.line, Failures: c.failures(v, err)})
	}
	return out, nil
}

type policyCase struct {
	name string
	line int
	ask  Ask

	outcome store.Outcome
	reasons []string
	ttl     time.Duration // 0: any
	err     string        // a key of sentinels; empty: none
}

func (c *policyCase) failures(v *Verdict, err error) []string {
	if c.err != "" {
		switch {
		case err == nil:
			return []string{fmt.Sprintf("want error %s, got outcome %s %q", c.err, v.Outcome, v.Reasons)}
		case !errors.Is(err, sentinels[c.err]):
			return []string{fmt.Sprintf("want error %s, got: %v", c.err, err)}
		}
		return nil
	}
	if err != nil {
		return []string{fmt.Sprintf("want outcome %s, got error: %v", c.outcome, err)}
	}
	var out []string
	if v.Err != nil {
		out = append(out, v.Err.Error())
	}
	if v.Outcome != c.outcome {
		out = append(out, fmt.Sprintf("want outcome %s, got %s %q", c.outcome, v.Outcome, v.Reasons))
	}
	for _, want := range c.reasons {
		if !slices.ContainsFunc(v.Reasons, func(got string) bool { return strings.Contains(got, want) }) {
			out = append(out, fmt.Sprintf("want a reason with %q, got %q", want, v.Reasons))
		}
	}
	if got := time.Duration(v.Grant.TTL); c.ttl != 0 && got != c.ttl {
		out = append(out, fmt.Sprintf("want ttl %s, got %s", short(c.ttl), short(got)))
	}
	return out
}

type casesTop struct{ catalogue, policy string }

func (r *reader) cases(b []byte) (top casesTop, out []policyCase) {
	body := r.document(b)
	if body == nil {
		return top, nil
	}
	f, ok := r.mapping(body, "a file of cases", "catalogue", "policy", "cases")
	if !ok {
		return top, nil
	}
	if v := f.get("catalogue"); v != nil {
		top.catalogue, _ = r.text(v, "catalogue", 1024)
	}
	if v := f.get("policy"); v != nil {
		top.policy, _ = r.text(v, "policy", 1024)
	}
	list := f.get("cases")
	if list == nil {
		r.bad(body, "there are no cases", "write `cases:` and a list of name, ask and expect")
		return top, nil
	}
	for _, n := range r.sequence(list, "cases", 1000) {
		m, ok := r.mapping(n, "a case", "name", "ask", "expect")
		if !ok {
			continue
		}
		c := policyCase{line: where(n).line}
		if v := m.get("name"); v != nil {
			c.name, _ = r.text(v, "name", 256)
		} else {
			r.bad(n, "a case has no name", "write `name: what it shows`")
		}
		if v := m.get("ask"); v != nil {
			r.ask(v, &c.ask)
		} else {
			r.bad(n, "a case has no ask", "write `ask: {scope: orders-db:read, orchestrator: ci}`")
		}
		if v := m.get("expect"); v != nil {
			r.expect(v, &c)
		} else {
			r.bad(n, "a case has no expect", "write `expect: {outcome: allow}`")
		}
		out = append(out, c)
	}
	return top, out
}

func (r *reader) ask(n ast.Node, a *Ask) {
	texts := map[string]*string{
		"agent": &a.Agent, "orchestrator": &a.Orchestrator, "run": &a.Run, "step": &a.Step, "scope": &a.Scope, "ttl": &a.TTL,
		"delivery": &a.Delivery, "public_key": &a.PublicKey, "audience": &a.Audience, "subject": &a.Subject, "reason": &a.Reason,
	}
	f, ok := r.mapping(n, "ask", "scope", "orchestrator", "run", "step", "agent", "ttl", "params", "delivery",
		"public_key", "audience", "subject", "subject_proved", "reason", "time")
	if !ok {
		return
	}
	// A case that names no run or step is about none of them.
	a.Run, a.Step = "run", "step"
	a.Time = time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC) // a Monday noon, where the case names no time
	for key, to := range texts {
		if v := f.get(key); v != nil {
			if l, ok := v.(*ast.LiteralNode); ok && key == "public_key" {
				*to = l.Value.Value // a PEM has lines
				continue
			}
			*to, _ = r.text(v, key, maxKey)
		}
	}
	for _, key := range []string{"scope", "orchestrator"} {
		if f.get(key) == nil {
			r.bad(n, "ask has no "+key, fmt.Sprintf("write `%s: ...`", key))
		}
	}
	if a.Agent == "" {
		a.Agent = "spiffe://example.org/orchestrator/" + a.Orchestrator + "/run/" + a.Run + "/step/" + a.Step
	}
	if v := f.get("subject_proved"); v != nil {
		a.SubjectProved = r.boolean(v, "subject_proved")
	}
	if v := f.get("time"); v != nil {
		if s, ok := r.text(v, "time", 64); ok {
			t, err := time.Parse(time.RFC3339, s)
			if err != nil {
				r.bad(v, fmt.Sprintf("time is %q", clip(s)), `write RFC 3339 in quotes: "2026-01-05T12:00:00Z"`)
			}
			a.Time = t
		}
	}
	if v := f.get("params"); v != nil {
		m, ok := r.mapping(v, "params")
		if !ok {
			return
		}
		a.Params = map[string]any{}
		for key, v := range m.values {
			switch x := v.(type) {
			case *ast.BoolNode:
				a.Params[key] = x.Value
			case *ast.IntegerNode:
				a.Params[key], _ = r.integer(v, key, -1<<53, 1<<53)
			default:
				a.Params[key], _ = r.text(v, key, maxFile)
			}
		}
	}
}

func (r *reader) expect(n ast.Node, c *policyCase) {
	f, ok := r.mapping(n, "expect", "outcome", "reasons", "ttl", "error")
	if !ok {
		return
	}
	if v := f.get("error"); v != nil {
		names := []string{"unknown-scope", "ttl-invalid", "ttl-too-long", "params-invalid", "public-key-invalid", "delivery-unsupported", "reason-required"}
		c.err = r.oneOf(v, "error", names...)
		if len(f.values) > 1 {
			r.bad(v, "expect has an error and something else", "an ask in error has no outcome: keep the error alone")
		}
		return
	}
	if v := f.get("outcome"); v != nil {
		c.outcome = store.Outcome(r.oneOf(v, "outcome", string(store.Allow), string(store.Deny), string(store.NeedsApproval)))
	} else {
		r.bad(n, "expect has no outcome", "write `outcome:` allow, deny or needs-approval, or `error:`")
	}
	if v := f.get("reasons"); v != nil {
		c.reasons = r.texts(v, "reasons", maxReasons, func(ast.Node, string) {})
	}
	if v := f.get("ttl"); v != nil {
		c.ttl = r.duration(v, "ttl", time.Second, ceiling)
	}
}
