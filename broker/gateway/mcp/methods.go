package mcp

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

// The versions of MCP that are served, newest first: those whose transport is
// streamable HTTP.
var versions = []string{stateless, "2025-11-25", "2025-06-18", "2025-03-26"}

// stateless is the version that has no sessions: each request says its version
// and what its client can, and repeats method and name in headers (SEP-2575,
// SEP-2243).
const stateless = "2026-07-28"

// Keys of _meta (2026-07-28).
const (
	metaVersion      = "io.modelcontextprotocol/protocolVersion"
	metaCapabilities = "io.modelcontextprotocol/clientCapabilities"
	metaClient       = "io.modelcontextprotocol/clientInfo"
	metaLogLevel     = "io.modelcontextprotocol/logLevel"
	metaServer       = "io.modelcontextprotocol/serverInfo"
	metaSubscription = "io.modelcontextprotocol/subscriptionId"
)

// asked is what a step asks, judged and in the form in which it goes on.
type asked struct {
	m         *message // as forwarded
	use       string   // "tools/call refund_order"
	objects   []string
	statement string
	name      string         // for Mcp-Name; empty where the method has none
	scope     string         // that is to be asked for first
	token     jsontext.Value // progress token; nil: none
	params    []string       // Mcp-Param-… headers, name and value
}

// refused says why something is not let through.
type refused struct {
	code   int64
	use    string
	reason string // in words that hold no value
}

func (r *refused) Error() string { return "refused by the gateway: " + r.reason }

// params is which members each request may carry. What a server may read and
// this does not name is refused: among it tasks (2025-11-25), and the answers
// to what a server asks for (2026-07-28), since none is handed on.
var params = map[string][]string{
	"initialize":               {"protocolVersion", "capabilities", "clientInfo"},
	"server/discover":          {},
	"tools/list":               {"cursor"},
	"tools/call":               {"name", "arguments"},
	"resources/list":           {"cursor"},
	"resources/templates/list": {"cursor"},
	"resources/read":           {"uri"},
	"resources/subscribe":      {"uri"},
	"resources/unsubscribe":    {"uri"},
	"prompts/list":             {"cursor"},
	"prompts/get":              {"name", "arguments"},
	"completion/complete":      {"ref", "argument", "context"},
	"logging/setLevel":         {"level"},
	"subscriptions/listen":     {"notifications"},

	"notifications/initialized": {},
	"notifications/cancelled":   {"requestId", "reason"},
}

// levels of logging (RFC 5424, section 6.2.1).
var levels = []string{"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"}

// names of tools: those that MCP 2025-11-25 has, and what is in use beside them.
var names = regexp.MustCompile(`^[A-Za-z0-9_./:-]{1,128}$`)

const maxURI = 2048 // bytes

// judge decides on a request or a notification from the step. open opens what
// the gateway sealed for it, such as a cursor. version is that of the header.
func judge(m *message, a *store.Access, scope, version string, open func(use, sealed string) (string, bool)) (*asked, *refused) {
	out := &asked{use: m.Method}
	no := func(code int64, format string, v ...any) (*asked, *refused) {
		return nil, &refused{code, out.use, fmt.Sprintf(format, v...)}
	}
	allowed, known := params[m.Method]
	if !known || strings.HasPrefix(m.Method, "notifications/") != m.notification() {
		out.use = "unknown method"
		if names.MatchString(m.Method) {
			out.use = m.Method
		}
		return no(codeMethod, "the gateway hands on no such method")
	}
	p, err := membersOf(m.Params)
	if err != nil {
		return no(codeParams, "the params cannot be read")
	}
	var meta object
	kept := object{}
	for _, e := range p {
		switch {
		case e.name == "_meta":
			if meta, err = membersOf(e.value); err != nil {
				return no(codeParams, "_meta is no object")
			}
		case slices.Contains(allowed, e.name):
			kept = append(kept, e)
		default:
			return no(codeParams, "the params hold a member that this method does not have")
		}
	}
	out.statement = string(kept.value())

	switch m.Method {
	case "initialize":
		v, _ := kept.text("protocolVersion")
		if v == "" || len(v) > 32 || version == stateless {
			return no(codeParams, "no protocol version")
		}
		if kept.get("clientInfo").Kind() != '{' || kept.get("capabilities").Kind() != '{' {
			return no(codeParams, "clientInfo or capabilities is missing")
		}
		// What servers ask of clients is refused, so no client can do any of it.
		kept.set("capabilities", jsontext.Value("{}"))
		out.statement = string(kept.value())
	case "tools/list", "resources/list", "resources/templates/list", "prompts/list":
		if kept.get("cursor") != nil {
			sealed, _ := kept.text("cursor")
			cursor, ok := open(m.Method, sealed)
			if !ok {
				return no(codeParams, "the cursor is none of the gateway's")
			}
			kept.set("cursor", quoted(cursor))
			out.statement = string(kept.value())
		}
	case "tools/call":
		name, _ := kept.text("name")
		if !names.MatchString(name) {
			return no(codeParams, "the tool's name is none")
		}
		out.use, out.objects, out.name = "tools/call "+name, []string{name}, name
		args := kept.get("arguments")
		if args != nil && args.Kind() != '{' {
			return no(codeParams, "the arguments are no object")
		}
		tool := toolOf(a, name)
		if tool == nil {
			return no(codeParams, "scope %s allows no such tool (allowed: %s)", scope, toolNames(a))
		}
		out.scope = tool.Scope
		if out.statement = string(args); args == nil {
			out.statement = "{}"
		}
	case "resources/read", "resources/subscribe", "resources/unsubscribe":
		uri, _ := kept.text("uri")
		pattern, ok := resourceOf(a, uri)
		if !ok {
			return no(codeParams, "scope %s allows no such resource (allowed: %s)", scope, listed(resources(a)))
		}
		out.use, out.objects, out.statement = m.Method+" "+pattern, []string{pattern}, uri
		if m.Method == "resources/read" {
			out.name = uri
		}
	case "prompts/get":
		name, _ := kept.text("name")
		if !promptAllowed(a, name) {
			return no(codeParams, "scope %s allows no such prompt (allowed: %s)", scope, listed(prompts(a)))
		}
		out.use, out.objects, out.name = "prompts/get "+name, []string{name}, name
		args, err := membersOf(kept.get("arguments"))
		for _, e := range args {
			if e.value.Kind() != '"' {
				err = errMessage
			}
		}
		if err != nil {
			return no(codeParams, "the arguments are no object of strings")
		}
		if out.statement = string(kept.get("arguments")); args == nil {
			out.statement = "{}"
		}
	case "completion/complete":
		ref, err := membersOf(kept.get("ref"))
		kind, _ := ref.text("type")
		name, _ := ref.text("name")
		uri, _ := ref.text("uri")
		switch {
		case err == nil && kind == "ref/prompt" && uri == "" && only(ref, "type", "name", "title") && promptAllowed(a, name):
			out.objects = []string{name}
		case err == nil && kind == "ref/resource" && name == "" && only(ref, "type", "uri") && templateAllowed(a, uri):
			out.objects = []string{"resource"}
		default:
			return no(codeParams, "scope %s allows no such prompt or resource", scope)
		}
		argument, err := membersOf(kept.get("argument"))
		if err != nil || !only(argument, "name", "value") {
			return no(codeParams, "the argument is none")
		}
	case "logging/setLevel":
		if l, _ := kept.text("level"); !slices.Contains(levels, l) {
			return no(codeParams, "the level is none")
		}
	case "subscriptions/listen":
		n, err := membersOf(kept.get("notifications"))
		if err != nil || !only(n, "toolsListChanged", "promptsListChanged", "resourcesListChanged", "resourceSubscriptions") {
			return no(codeParams, "the notifications cannot be read")
		}
		var uris []string
		if v := n.get("resourceSubscriptions"); v != nil && json.Unmarshal(v, &uris) != nil {
			return no(codeParams, "the notifications cannot be read")
		}
		for _, uri := range uris {
			if _, ok := resourceOf(a, uri); !ok {
				return no(codeParams, "scope %s allows no such resource (allowed: %s)", scope, listed(resources(a)))
			}
		}
	case "notifications/cancelled":
		if _, ok := identifier(kept.get("requestId")); !ok {
			return no(codeParams, "the request's id is none")
		}
	}

	// Of _meta goes on what the protocol needs and the gateway understands; the
	// rest would pass the record by.
	var keep object
	if v := meta.get("progressToken"); v != nil && m.request() {
		token, ok := identifier(v)
		if !ok {
			return no(codeParams, "the progress token is none")
		}
		keep, out.token = append(keep, member{"progressToken", token}), token
	}
	if version == stateless && m.request() {
		if v, _ := meta.text(metaVersion); v != version {
			return no(codeHeaderMismatch, "_meta names another protocol version than the header")
		}
		keep = append(keep, member{metaVersion, quoted(version)}, member{metaCapabilities, jsontext.Value("{}")})
		if l, _ := meta.text(metaLogLevel); slices.Contains(levels, l) {
			keep = append(keep, member{metaLogLevel, quoted(l)})
		}
	} else if meta.get(metaVersion) != nil {
		return no(codeHeaderMismatch, "_meta names another protocol version than the header")
	}
	if keep != nil {
		kept = append(kept, member{"_meta", keep.value()})
	}
	out.m = &message{ID: m.ID, Method: m.Method}
	if len(kept) > 0 || m.Params != nil {
		out.m.Params = kept.value()
	}
	return out, nil
}

func only(o object, names ...string) bool {
	for _, m := range o {
		if !slices.Contains(names, m.name) {
			return false
		}
	}
	return true
}

// headers checks the headers that repeat a request of version 2026-07-28, so
// that nothing stands in them that the body, and so the record, does not have.
func (a *asked) headers(h http.Header) *refused {
	no := func(reason string) *refused { return &refused{codeHeaderMismatch, a.use, reason} }
	if h.Get("Mcp-Method") != a.m.Method {
		return no("Mcp-Method is not the method of the body")
	}
	if name, ok := decoded(h.Get("Mcp-Name")); !ok || a.name != "" && name != a.name {
		return no("Mcp-Name is not the name in the body")
	}
	var values map[string]bool
	var names []string
	for name, vs := range h {
		if !strings.HasPrefix(name, "Mcp-Param-") {
			continue
		}
		if values == nil {
			values = map[string]bool{}
			if a.m.Method == "tools/call" {
				leaves(jsontext.Value(a.statement), values)
			}
		}
		v, ok := decoded(vs[0])
		if len(vs) != 1 || !ok || !values[v] || len(a.params) >= 64 || len(name) > maxParam {
			return no("an Mcp-Param header is not an argument of the body")
		}
		a.params = append(a.params, name, vs[0])
		names = append(names, name)
	}
	// The values stand in the body; what they are called stands nowhere else.
	slices.Sort(names)
	for _, name := range names {
		a.statement += "\n" + name
	}
	return nil
}

// maxParam is how long the name of an Mcp-Param header may be, in bytes.
const maxParam = 128

// decoded is the value of a header of SEP-2243.
func decoded(s string) (string, bool) {
	in, ok := strings.CutPrefix(s, "=?base64?")
	if in, found := strings.CutSuffix(in, "?="); ok && found {
		b, err := base64.StdEncoding.DecodeString(in)
		return string(b), err == nil
	}
	return s, true
}

// leaves collects the strings, numbers and booleans of v, as headers write them.
func leaves(v jsontext.Value, into map[string]bool) {
	switch v.Kind() {
	case '{':
		o, _ := membersOf(v)
		for _, m := range o {
			leaves(m.value, into)
		}
	case '[':
		vs, _ := elementsOf(v)
		for _, e := range vs {
			leaves(e, into)
		}
	case '"':
		var s string
		if json.Unmarshal(v, &s) == nil {
			into[s] = true
		}
	case '0', 't', 'f':
		into[string(v)] = true
	}
}

// toolOf is the rule for a tool; nil: it is not allowed. Its own name counts
// before any pattern, and of patterns one that demands a scope, then the longest:
// what an approval is due for is not got by a wider rule beside it.
func toolOf(a *store.Access, name string) *store.MCPTool {
	if a.MCP == nil {
		return nil
	}
	var best *store.MCPTool
	for i := range a.MCP.Tools {
		t := &a.MCP.Tools[i]
		switch {
		case !matches(t.Name, name):
		case t.Name == name:
			if best == nil || best.Name != name || t.Scope != "" {
				best = t
			}
		case best == nil, best.Name != name && (best.Scope == "" && t.Scope != "" || (best.Scope == "") == (t.Scope == "") && len(t.Name) > len(best.Name)):
			best = t
		}
	}
	return best
}

func toolNames(a *store.Access) string {
	var out []string
	if a.MCP != nil {
		for _, t := range a.MCP.Tools {
			out = append(out, t.Name)
		}
	}
	return listed(out)
}

// listed is the start of ss, for people.
func listed(ss []string) string {
	if len(ss) == 0 {
		return "none"
	}
	if len(ss) > 20 {
		return strings.Join(ss[:20], ", ") + ", …"
	}
	return strings.Join(ss, ", ")
}

func resources(a *store.Access) []string {
	if a.MCP == nil {
		return nil
	}
	return a.MCP.Resources
}

func prompts(a *store.Access) []string {
	if a.MCP == nil {
		return nil
	}
	return a.MCP.Prompts
}

func promptAllowed(a *store.Access, name string) bool {
	return name != "" && len(name) <= 128 && printable(name) && slices.ContainsFunc(prompts(a), func(p string) bool { return matches(p, name) })
}

// resourceOf returns the first pattern that allows uri.
func resourceOf(a *store.Access, uri string) (string, bool) {
	if !straight(uri) {
		return "", false
	}
	for _, p := range resources(a) {
		if matches(p, uri) {
			return p, true
		}
	}
	return "", false
}

// expressions are the places of a URI template (RFC 6570).
var expressions = regexp.MustCompile(`\{[^{}]*\}`)

// templateAllowed reports whether what a URI template stands for is allowed
// with some value in its places.
func templateAllowed(a *store.Access, template string) bool {
	uri := expressions.ReplaceAllString(template, "x")
	_, ok := resourceOf(a, uri)
	return ok
}

// straight reports whether uri says where it leads: a server that resolves
// "..", a backslash or another layer of percent signs would come out elsewhere
// than the pattern that allowed it.
func straight(uri string) bool {
	if uri == "" || len(uri) > maxURI || !printable(uri) {
		return false
	}
	for round := range 4 {
		if strings.ContainsFunc(uri, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
			return false
		}
		for segment := range strings.FieldsFuncSeq(uri, func(r rune) bool { return r == '/' || r == '?' || r == '#' || r == ';' }) {
			if segment == "." || segment == ".." {
				return false
			}
		}
		next, err := url.PathUnescape(uri)
		if err != nil { // a percent sign that was encoded is one; not so where more could be decoded around it
			return round > 0 && !encoded.MatchString(uri)
		}
		if next == uri {
			return true
		}
		uri = next
	}
	return false
}

// encoded are a dot, a slash and a backslash.
var encoded = regexp.MustCompile(`(?i)%(2e|2f|5c|25)`)

// printable reports whether s is ASCII without spaces and controls.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// matches reports whether s is what pattern stands for: * is any characters.
func matches(pattern, s string) bool {
	first, rest, wild := strings.Cut(pattern, "*")
	if !wild {
		return pattern == s
	}
	if !strings.HasPrefix(s, first) {
		return false
	}
	s = s[len(first):]
	for {
		part, after, more := strings.Cut(rest, "*")
		if !more {
			return strings.HasSuffix(s, part)
		}
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s, rest = s[i+len(part):], after
	}
}
