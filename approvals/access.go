package approvals

import (
	"fmt"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// Told is one thing that people are told of a grant, a line for each part.
type Told struct {
	Name  string // at most 16 bytes
	Lines []string
}

// AccessInWords says all that a lets through, hides and puts on record; nothing
// where a is nil. Whatever is set in a is told, whether or not the protocol has
// a use for it, since it is granted. The lines are as the catalogue wrote them:
// whoever shows them escapes them.
func AccessInWords(a *store.Access) []Told {
	if a == nil {
		return nil
	}
	var out []Told
	tell := func(name string, lines ...string) { out = append(out, Told{name, lines}) }

	tell("Gateway goes to", a.Upstream, "by the protocol "+a.Protocol)
	switch a.TLS {
	case "":
	case "verify":
		tell("TLS", "verify: with TLS, to a server whose certificate can be verified")
	case "off":
		tell("TLS", "off: without TLS, so that what passes can be read on the way")
	default:
		tell("TLS", a.TLS)
	}
	if in := a.Inject; in != nil {
		lines := []string{"in: " + in.In}
		for _, m := range []struct{ name, value string }{{"name", in.Name}, {"value", in.Value}, {"username", in.Username}, {"password", in.Password}, {"AWS region", in.Region}, {"AWS service", in.Service}} {
			if m.value != "" {
				lines = append(lines, m.name+": "+m.value)
			}
		}
		tell("Secret is shown", append(lines, "{{…}} stands for a field of the secret; the step sees neither")...)
	}
	recorded := []string{"each use, before the target is reached"}
	if h := a.HTTP; h != nil {
		var routes []string
		for _, r := range h.Routes {
			for _, path := range r.Paths {
				routes = append(routes, strings.Join(r.Methods, ", ")+" "+path)
			}
		}
		tell("May be asked for", append(routes, "GET allows HEAD too; * is one segment, and any number of them at the end")...)
		if h.Upgrade {
			tell("WebSocket", "a connection may be upgraded: what passes then is not looked into")
		}
		if h.Timeout != 0 {
			tell("Answers begin", "within "+time.Duration(h.Timeout).String())
		}
		recorded = headers(recorded, "request", h.RequestHeaders)
		recorded = headers(recorded, "answer", h.ResponseHeaders)
		recorded = sample(recorded, h.Sample, "body")
	}
	if p := a.Postgres; p != nil {
		tell("Statements", strings.Join(p.Statements, ", "))
		if p.Everywhere {
			tell("Without WHERE", "UPDATE and DELETE may go without one, and change every row")
		}
		tell("Tables", named(p.Tables, "every table")...)
		tell("Functions", append([]string{"PostgreSQL’s own that have no effect and read nothing"}, p.Functions...)...)
		recorded = sample(recorded, p.Sample, "result")
	}
	if m := a.MCP; m != nil {
		var tools []string
		for _, t := range m.Tools {
			s := t.Name
			if t.Scope != "" {
				s += ", where " + t.Scope + " is granted for the call"
			}
			tools = append(tools, s)
		}
		tell("Tools", orNone(tools)...)
		tell("Resources", orNone(m.Resources)...)
		tell("Prompts", orNone(m.Prompts)...)
		recorded = sample(recorded, m.Sample, "result")
	}
	tell("Hidden from it", hidden(a.Masking)...)
	tell("On record", recorded...)
	return out
}

func headers(lines []string, of string, names []string) []string {
	if len(names) == 0 {
		return lines
	}
	return append(lines, "headers of each "+of+", with their values: "+strings.Join(names, ", "))
}

func sample(lines []string, n int, of string) []string {
	if n == 0 {
		return lines
	}
	return append(lines, fmt.Sprintf("the first %d bytes of each %s, masked", n, of))
}

// named is a list in which * is said in words.
func named(list []string, all string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		if out[i] = s; s == "*" {
			out[i] = "* (" + all + ")"
		}
	}
	return orNone(out)
}

func orNone(list []string) []string {
	if len(list) == 0 {
		return []string{"none"}
	}
	return list
}

// looks says what a detector finds.
var looks = map[string]string{
	"email": "an e-mail address", "card": "a card number", "iban": "an IBAN", "phone": "a phone number", "secret": "a key or a password", "entropy": "a random text, as keys are",
}

func hidden(m store.Masking) []string {
	if m.IsZero() {
		return []string{"nothing"}
	}
	var out []string
	for _, r := range m.Rules {
		var parts []string
		add := func(before, s, after string) {
			if s != "" {
				parts = append(parts, before+s+after)
			}
		}
		add("", r.Field, ", in any object or table")
		add("", r.Path, ", in JSON")
		add("the column ", r.Column, "")
		add("values of the type ", r.Type, "")
		if r.Detector != "" {
			what := looks[r.Detector]
			if what == "" {
				what = "what it finds"
			}
			add("what looks like "+what+" (", r.Detector, ")")
		}
		out = append(out, strings.Join(parts, "; "))
	}
	return out
}
