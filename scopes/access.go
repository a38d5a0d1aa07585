package scopes

import (
	"fmt"
	"maps"
	"net"
	"net/textproto"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/countersign-dev/countersign/store"
)

// Bounds of what an access may hold.
const (
	maxSample  = 16 << 10 // bytes of each body or result that are recorded
	maxTimeout = 10 * time.Minute
)

var (
	methodName  = regexp.MustCompile(`\A[A-Z][A-Z-]{0,31}\z`)
	headerName  = regexp.MustCompile("\\A[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}\\z") // a token of RFC 9110, section 5.6.2
	routePath   = regexp.MustCompile(`\A/[A-Za-z0-9._~!$&'()*+,;=:@/-]*\z`)     // RFC 3986, section 3.3, without escapes
	queryKey    = regexp.MustCompile(`\A[A-Za-z0-9._~-]{1,128}\z`)
	awsName     = regexp.MustCompile(`\A[a-z0-9-]{1,64}\z`)
	secretField = regexp.MustCompile(`\{\{([^{}]*)\}\}`)
	tableName   = regexp.MustCompile(`\A(\*|[\pL_][\pL\pN_$]{0,62}(\.(\*|[\pL_][\pL\pN_$]{0,62}))?)\z`)
	columnName  = regexp.MustCompile(`\A([\pL_][\pL\pN_$]{0,62}\.){1,2}[\pL_][\pL\pN_$]{0,62}\z`)
	typeName    = regexp.MustCompile(`\A[a-z_][a-z0-9_]{0,62}( [a-z]{1,16}){0,4}\z`)
	toolName    = regexp.MustCompile(`\A[A-Za-z0-9._*/:-]{1,128}\z`)
	jsonSegment = regexp.MustCompile(`\A(\.\.?([A-Za-z_][A-Za-z0-9_]*|\*)|(\.\.)?\[(\*|0|[1-9][0-9]{0,8}|'[^'\\]{1,64}')\])`) // of a JSONPath (RFC 9535), as far as the gateway follows one
)

// accessKeys are the keys of access beside protocol, each with the protocols
// that have it.
var accessKeys = map[string][]string{
	"upstream": {store.ProtocolHTTP, store.ProtocolMCP}, "inject": {store.ProtocolHTTP, store.ProtocolMCP},
	"sample": {store.ProtocolHTTP, store.ProtocolPostgres, store.ProtocolMCP},
	"routes": {store.ProtocolHTTP}, "request_headers": {store.ProtocolHTTP}, "response_headers": {store.ProtocolHTTP},
	"upgrade": {store.ProtocolHTTP}, "timeout": {store.ProtocolHTTP},
	"tls": {store.ProtocolPostgres}, "statements": {store.ProtocolPostgres}, "tables": {store.ProtocolPostgres},
	"functions": {store.ProtocolPostgres}, "everywhere": {store.ProtocolPostgres},
	"tools": {store.ProtocolMCP}, "resources": {store.ProtocolMCP}, "prompts": {store.ProtocolMCP},
}

// maskKinds are the kinds of masking rules that each protocol can keep. A rule
// without effect would look like a mask that holds.
var maskKinds = map[string][]string{
	store.ProtocolHTTP:     {"field", "path", "detector"},
	store.ProtocolMCP:      {"field", "path", "detector"},
	store.ProtocolPostgres: {"field", "column", "type", "detector"},
}

// access reads what the gateway does for sc. It comes after delivery and
// connection.
func (r *reader) access(sc *Scope, f fields, what string) {
	v := f.get("access")
	switch {
	case !slices.Contains(sc.Delivery, Gateway):
		if v != nil && len(sc.Delivery) > 0 {
			r.bad(v, "access has no effect on what is handed out directly", "add gateway to `delivery`, or take access out")
		}
		return
	case !slices.Contains(deliveries[sc.Engine], Gateway):
		return // told of delivery already
	case v == nil && sc.Engine != Database:
		r.bad(f.node, what+" is delivered by the gateway and has no access", "say where the gateway goes and what it lets through: `access: {protocol: http, upstream: ..., inject: ..., routes: ...}`")
		return
	}
	var m fields
	if v != nil {
		var ok bool
		if m, ok = r.mapping(v, "access", append([]string{"protocol"}, slices.Sorted(maps.Keys(accessKeys))...)...); !ok {
			return
		}
	}
	a := &store.Access{}
	if sc.Engine == Database {
		a.Protocol = store.ProtocolPostgres
		if n := m.get("protocol"); n != nil {
			r.oneOf(n, "protocol of engine database", store.ProtocolPostgres)
		}
	} else if n := m.get("protocol"); n == nil {
		r.bad(v, "access has no protocol", "write `protocol:` http or mcp")
		return
	} else if a.Protocol = r.oneOf(n, "protocol of engine "+string(sc.Engine), store.ProtocolHTTP, store.ProtocolMCP); a.Protocol == "" {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(accessKeys)) {
		if n := m.get(key); n != nil && !slices.Contains(accessKeys[key], a.Protocol) {
			fix := "take it out; it is for " + strings.Join(accessKeys[key], " and ")
			if key == "upstream" {
				fix = "take it out: the gateway goes where `connection` says"
			}
			r.bad(n, key+" has no effect with protocol "+a.Protocol, fix)
			delete(m.values, key)
		}
	}
	sample := 0
	if n := m.get("sample"); n != nil {
		s, _ := r.integer(n, "sample", 1, maxSample)
		sample = int(s)
	}
	switch a.Protocol {
	case store.ProtocolPostgres:
		a.TLS, a.Postgres = "verify", r.postgres(m, sample)
		if n := m.get("tls"); n != nil {
			a.TLS = r.oneOf(n, "tls", "verify", "off")
		}
		if c := sc.Connection; c != nil {
			a.Upstream = net.JoinHostPort(c.Host, strconv.Itoa(c.Port)) + "/" + c.Database
		}
	case store.ProtocolHTTP:
		a.Upstream, a.Inject = r.upstream(v, m), r.inject(v, m, "header", "query", "basic", "sigv4")
		a.HTTP = r.http(v, m, sample, a.Inject)
	case store.ProtocolMCP:
		a.Upstream, a.Inject = r.upstream(v, m), r.inject(v, m, "header", "query", "basic")
		a.MCP = r.mcp(sc, v, m, sample)
	}
	sc.Access = a
}

// upstream reads a base URL. Of the ways to write one a single one is taken, so
// that two scopes of one target are seen to be that.
func (r *reader) upstream(at ast.Node, m fields) string {
	n := m.get("upstream")
	if n == nil {
		r.bad(at, "access has no upstream", "write the target's base URL: `upstream: https://api.example.com`")
		return ""
	}
	s, ok := r.text(n, "upstream", 512)
	if !ok {
		return ""
	}
	u, err := url.Parse(s)
	if err != nil || !baseURL(u, s) {
		said := fmt.Sprintf("%q", clip(s))
		if strings.Contains(s, "@") {
			said = "that is given" // a password may stand in it
		}
		r.bad(n, "the upstream "+said+" is not a base URL", "write http:// or https://, a host in lower case, its port where it is not the usual one, and perhaps a path without a / at its end; no user, no ?, no # and no params")
		return ""
	}
	return s
}

// baseURL reports whether s, parsed as u, names a target and nothing else.
func baseURL(u *url.URL, s string) bool {
	port, err := strconv.Atoi(u.Port())
	switch {
	case u.Scheme != "http" && u.Scheme != "https", u.User != nil, strings.ContainsAny(s, "?#{}%\\ "), u.String() != s:
		return false
	case u.Host != strings.ToLower(u.Host), !hostName.MatchString(u.Hostname()) && net.ParseIP(u.Hostname()) == nil:
		return false
	case strings.HasSuffix(u.Host, ":"), u.Port() != "" && (err != nil || port < 1 || port > 65535):
		return false
	}
	return u.Path == "" || routePath.MatchString(u.Path) && plainSegments(u.Path) && !strings.HasSuffix(u.Path, "/") && !strings.Contains(u.Path, "*")
}

// plainSegments reports whether a path has no segment that a server would take
// away: "." and "..", and an empty one that is not the last.
func plainSegments(path string) bool {
	list := strings.Split(path[1:], "/")
	for i, s := range list {
		if s == "." || s == ".." || s == "" && i < len(list)-1 {
			return false
		}
	}
	return true
}

// ownHeaders are set by the gateway or by HTTP itself, so that no secret goes
// there.
var ownHeaders = []string{"Host", "Connection", "Content-Length", "Content-Type", "Content-Encoding", "Expect", "Transfer-Encoding", "Te", "Trailer", "Upgrade", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Dpop"}

// secretHeaders hold what no record may: the session's token, the target's
// secrets.
var secretHeaders = []string{"Authorization", "Proxy-Authorization", "Cookie", "Set-Cookie", "Dpop"}

func (r *reader) inject(at ast.Node, m fields, ways ...string) *store.Inject {
	n := m.get("inject")
	if n == nil {
		r.bad(at, "access has no inject", "say how the target is shown the secret: `inject: {in: header, name: Authorization, value: \"Bearer {{key}}\"}`")
		return nil
	}
	f, ok := r.mapping(n, "inject", "in", "name", "value", "username", "password", "region", "service")
	if !ok {
		return nil
	}
	in := &store.Inject{}
	v := f.get("in")
	if v == nil {
		r.bad(n, "inject has no in", "write `in:` "+strings.Join(ways, ", "))
		return nil
	}
	if in.In = r.oneOf(v, "in", ways...); in.In == "" {
		return nil
	}
	due := map[string][]string{"header": {"name", "value"}, "query": {"name", "value"}, "basic": {"username", "password"}, "sigv4": {"region", "service"}}[in.In]
	for _, key := range slices.Sorted(maps.Keys(f.values)) {
		if key != "in" && !slices.Contains(due, key) {
			r.bad(f.get(key), fmt.Sprintf("%s has no effect where the secret goes in %s", key, in.In), "take it out; write "+strings.Join(due, " and "))
		}
	}
	read := func(key string, max int) (ast.Node, string) {
		v := f.get(key)
		if v == nil {
			r.bad(n, "inject has no "+key, fmt.Sprintf("write `in: %s` with %s", in.In, strings.Join(due, " and ")))
			return nil, ""
		}
		s, ok := r.text(v, key, max)
		if !ok {
			return nil, ""
		}
		return v, s
	}
	switch in.In {
	case "header":
		if v, s := read("name", 128); v != nil {
			in.Name = textproto.CanonicalMIMEHeaderKey(s)
			if !headerName.MatchString(s) || slices.Contains(ownHeaders, in.Name) {
				r.bad(v, fmt.Sprintf("no secret can go in the header %q", clip(s)), "write a header of the target's own, like Authorization or X-Api-Key")
			}
		}
	case "query":
		if v, s := read("name", 128); v != nil {
			if !queryKey.MatchString(s) {
				r.bad(v, fmt.Sprintf("%q cannot be a query's key", clip(s)), "write letters, digits, '.', '_', '~' and '-'")
			}
			in.Name = s
		}
	case "sigv4":
		for key, to := range map[string]*string{"region": &in.Region, "service": &in.Service} {
			if v, s := read(key, 64); v != nil {
				if !awsName.MatchString(s) {
					r.bad(v, fmt.Sprintf("%s is %q", key, s), "write it as AWS does, like eu-central-1 and execute-api")
				}
				*to = s
			}
		}
	}
	fields := 0
	for _, key := range due {
		to := map[string]*string{"value": &in.Value, "username": &in.Username, "password": &in.Password}[key]
		if to == nil {
			continue
		}
		v, s := read(key, 1024)
		if v == nil {
			fields++ // told already
			continue
		}
		*to = s
		for _, m := range secretField.FindAllStringSubmatch(s, -1) {
			fields++
			if !fieldName.MatchString(m[1]) {
				r.bad(v, fmt.Sprintf("{{%s}} is not the name of a field of the secret", clip(m[1])), "write it as Vault has it, without spaces: {{key}}")
			}
		}
		switch rest := secretField.ReplaceAllString(s, ""); {
		case strings.ContainsAny(rest, "{}"):
			r.bad(v, key+" holds a brace that is of no {{name}}", "write {{name}} where a field of the secret is due, and no other brace")
		case key == "username" && strings.Contains(rest, ":"):
			r.bad(v, "username holds a colon, which ends it", "take it out (RFC 7617, section 2)")
		}
	}
	if fields == 0 && in.In != "sigv4" {
		r.bad(n, "inject names no field of the secret", "write {{name}} where one is due: `value: \"Bearer {{key}}\"`")
	}
	return in
}

func (r *reader) http(at ast.Node, m fields, sample int, in *store.Inject) *store.HTTPAccess {
	a := &store.HTTPAccess{Sample: sample}
	if n := m.get("routes"); n == nil {
		r.bad(at, "access has no routes", "say what may be asked for: `routes: [{methods: [GET], paths: [/orders/*]}]`")
	} else {
		for _, item := range r.sequence(n, "routes", maxList) {
			a.Routes = append(a.Routes, r.route(item))
		}
	}
	headers := func(key string) []string {
		n := m.get(key)
		if n == nil {
			return nil
		}
		var out []string
		r.texts(n, key, 32, func(item ast.Node, s string) {
			name := textproto.CanonicalMIMEHeaderKey(s)
			switch {
			case !headerName.MatchString(s):
				r.bad(item, fmt.Sprintf("%q is not the name of a header", clip(s)), "write one like Content-Type")
			case slices.Contains(secretHeaders, name) || in != nil && in.In == "header" && in.Name == name:
				r.bad(item, fmt.Sprintf("the header %s holds a secret", name), "take it out: no secret goes on record")
			case slices.Contains(out, name):
				r.bad(item, fmt.Sprintf("%q stands twice in %s", name, key), "keep one")
			default:
				out = append(out, name)
			}
		})
		return out
	}
	a.RequestHeaders, a.ResponseHeaders = headers("request_headers"), headers("response_headers")
	if n := m.get("upgrade"); n != nil {
		a.Upgrade = r.boolean(n, "upgrade")
	}
	if n := m.get("timeout"); n != nil {
		a.Timeout = store.Duration(r.duration(n, "timeout", time.Second, maxTimeout))
	}
	return a
}

func (r *reader) route(n ast.Node) (out store.HTTPRoute) {
	f, ok := r.mapping(n, "a route", "methods", "paths")
	if !ok {
		return out
	}
	if v := f.get("methods"); v == nil {
		r.bad(n, "a route has no methods", "write `methods: [GET]`")
	} else {
		out.Methods = r.texts(v, "methods", 16, func(item ast.Node, s string) {
			if !methodName.MatchString(s) || s == "CONNECT" || s == "TRACE" {
				r.bad(item, fmt.Sprintf("%q cannot be allowed as a method", clip(s)), "write one in capitals, like GET or POST; CONNECT and TRACE never pass")
			}
		})
	}
	if v := f.get("paths"); v == nil {
		r.bad(n, "a route has no paths", "write `paths: [/orders, /orders/*]`")
	} else {
		out.Paths = r.texts(v, "paths", maxList, func(item ast.Node, s string) {
			if !routePath.MatchString(s) || !plainSegments(s) || !wholeStars(s) {
				r.bad(item, fmt.Sprintf("%q is not a path", clip(s)), "begin it with a /, and write * for one whole segment, or for any number as the last; no ?, # or %")
			}
		})
	}
	return out
}

// wholeStars reports whether each * of a path is a segment of its own.
func wholeStars(path string) bool {
	for s := range strings.SplitSeq(path, "/") {
		if s != "*" && strings.Contains(s, "*") {
			return false
		}
	}
	return true
}

// postgres reads what may be asked of a database: by default, to read.
func (r *reader) postgres(m fields, sample int) *store.PostgresAccess {
	a := &store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}, Sample: sample}
	if n := m.get("statements"); n != nil {
		a.Statements = r.texts(n, "statements", 5, func(item ast.Node, s string) {
			if kinds := []string{"select", "insert", "update", "delete", "copy"}; !slices.Contains(kinds, s) {
				r.bad(item, fmt.Sprintf("%q is no statement that a step may send", clip(s)), "write one of "+strings.Join(kinds, ", "))
			}
		})
	}
	if n := m.get("tables"); n != nil {
		a.Tables = r.texts(n, "tables", maxList, func(item ast.Node, s string) {
			if !tableName.MatchString(s) {
				r.bad(item, fmt.Sprintf("%q is not the name of a table", clip(s)), `write orders (of the schema public), sales.orders, "sales.*" or "*"`)
			}
		})
	}
	if n := m.get("functions"); n != nil {
		a.Functions = r.texts(n, "functions", maxList, func(item ast.Node, s string) {
			if !tableName.MatchString(s) || strings.Contains(s, "*") {
				r.bad(item, fmt.Sprintf("%q is not the name of a function", clip(s)), "write refund_total (of the schema public) or sales.refund_total; no * stands for one")
			}
		})
	}
	if n := m.get("everywhere"); n != nil {
		a.Everywhere = r.boolean(n, "everywhere")
		if a.Everywhere && !slices.Contains(a.Statements, "update") && !slices.Contains(a.Statements, "delete") {
			r.bad(n, "everywhere is for UPDATE and DELETE, and neither is allowed", "take it out, or add update or delete to statements")
		}
	}
	return a
}

func (r *reader) mcp(sc *Scope, at ast.Node, m fields, sample int) *store.MCPAccess {
	a := &store.MCPAccess{Tools: []store.MCPTool{}, Sample: sample}
	if m.get("tools") == nil && m.get("resources") == nil && m.get("prompts") == nil {
		r.bad(at, "access lets nothing through", "say which tools may be called: `tools: [lookup_order]`")
	}
	if n := m.get("tools"); n != nil {
		for _, item := range r.sequence(n, "tools", maxList) {
			tool, ok := r.tool(sc, item)
			if !ok {
				continue
			}
			if slices.ContainsFunc(a.Tools, func(t store.MCPTool) bool { return t.Name == tool.Name }) {
				r.bad(item, fmt.Sprintf("the tool %q stands twice", tool.Name), "keep one")
				continue
			}
			a.Tools, sc.tools = append(a.Tools, tool), append(sc.tools, where(item))
		}
	}
	list := func(key, example string) []string {
		n := m.get(key)
		if n == nil {
			return nil
		}
		return r.texts(n, key, maxList, func(item ast.Node, s string) {
			if strings.ContainsAny(s, " {}") {
				r.bad(item, fmt.Sprintf("%q cannot be one of the %s", clip(s), key), "write it as the server does, * standing for any characters, like "+example)
			}
		})
	}
	a.Resources, a.Prompts = list("resources", `"file:///docs/*"`), list("prompts", "summarise")
	return a
}

// tool reads a tool: its name, or a mapping with the scope that each call needs.
func (r *reader) tool(sc *Scope, n ast.Node) (t store.MCPTool, ok bool) {
	at := n
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		f, ok := r.mapping(n, "a tool", "name", "scope")
		if !ok {
			return t, false
		}
		if v := f.get("scope"); v != nil {
			if t.Scope, ok = r.text(v, "scope", 128); ok && t.Scope == sc.Name {
				r.bad(v, "a tool asks for the scope that it stands in", "take scope out, or name another scope that allows the tool")
			}
		}
		if at = f.get("name"); at == nil {
			r.bad(n, "a tool has no name", "write `name: lookup_order`")
			return t, false
		}
	}
	s, ok := r.text(at, "the name of a tool", 128)
	if ok && !toolName.MatchString(s) {
		r.bad(at, fmt.Sprintf("%q is not the name of a tool", clip(s)), "write letters, digits, '.', '_', '-', '/' and ':', and * for any characters")
		return t, false
	}
	t.Name = s
	return t, ok
}

// toolScopes checks, once all scopes are read, that each call which needs a
// scope of its own can be made under it.
func (r *reader) toolScopes(list []*Scope) {
	byName := make(map[string]*Scope, len(list))
	for _, sc := range list {
		byName[sc.Name] = sc
	}
	for _, sc := range list {
		if sc.Access == nil || sc.Access.MCP == nil {
			continue
		}
		for i, tool := range sc.Access.MCP.Tools {
			if tool.Scope == "" || tool.Scope == sc.Name {
				continue
			}
			bad := func(message, fix string) {
				r.at(sc.tools[i], fmt.Sprintf("the tool %s needs the scope %s, %s", tool.Name, clip(tool.Scope), message), fix)
			}
			other := byName[tool.Scope]
			switch {
			case other == nil:
				bad("which is not there", "add that scope, with `delivery: [gateway]`, or name another")
			case other.Access == nil || other.Access.MCP == nil || !slices.Contains(other.Delivery, Gateway):
				bad("which is not one of the gateway's MCP scopes", "give it `delivery: [gateway]` and `access: {protocol: mcp, ...}`")
			case other.Access.Upstream != sc.Access.Upstream:
				bad("which has another upstream", "write the same upstream in both")
			case !lets(other.Access.MCP, tool.Name):
				bad("which does not let it be called", "add the tool, without a scope, to the tools there")
			}
		}
	}
}

// lets reports whether a lets a tool be called without a further scope. As at
// the gateway, its own name counts before any pattern, and of patterns one with a
// scope.
func lets(a *store.MCPAccess, tool string) bool {
	free, due := false, false
	for _, t := range a.Tools {
		switch {
		case t.Name == tool:
			return t.Scope == ""
		case glob(t.Name).MatchString(tool):
			free, due = free || t.Scope == "", due || t.Scope != ""
		}
	}
	return free && !due
}

// masking reads what the gateway hides. It comes after access.
func (r *reader) masking(sc *Scope, f fields) {
	v := f.get("masking")
	if v == nil {
		return
	}
	if len(sc.Delivery) > 0 && !slices.Contains(sc.Delivery, Gateway) {
		r.bad(v, "masking has no effect on what is handed out directly", "add gateway to `delivery`, or take masking out")
	}
	for _, item := range r.sequence(v, "masking", maxList) {
		kind, rule := r.maskRule(item)
		if kind == "" {
			continue
		}
		if a := sc.Access; a != nil && !slices.Contains(maskKinds[a.Protocol], kind) {
			r.bad(item, fmt.Sprintf("a %s cannot be masked with protocol %s", kind, a.Protocol), "write one of "+strings.Join(maskKinds[a.Protocol], ", "))
			continue
		}
		if slices.Contains(sc.Masking.Rules, rule) {
			r.bad(item, "a rule stands twice in masking", "keep one")
			continue
		}
		sc.Masking.Rules = append(sc.Masking.Rules, rule)
	}
	if a := sc.Access; a != nil {
		a.Masking = sc.Masking
		if a.HTTP != nil && a.HTTP.Upgrade {
			r.bad(v, "what goes through an upgraded connection cannot be masked", "take masking out, or upgrade")
		}
	}
}

// maxSegments bounds a JSONPath.
const maxSegments = 32

// jsonPath reports whether s is a JSONPath that masking can follow.
func jsonPath(s string) bool {
	rest, ok := strings.CutPrefix(s, "$")
	for range maxSegments {
		if !ok || rest == "" {
			break
		}
		segment := jsonSegment.FindString(rest)
		rest, ok = rest[len(segment):], segment != ""
	}
	return ok && rest == "" && s != "$"
}

// detectors are what is found by how it looks.
var detectors = []string{"email", "card", "iban", "phone", "secret", "entropy"}

func (r *reader) maskRule(n ast.Node) (kind string, rule store.MaskRule) {
	field := func(n ast.Node) (string, store.MaskRule) {
		s, ok := r.text(n, "an item of masking", 512)
		if !ok {
			return "", rule
		}
		if !fieldName.MatchString(s) {
			r.bad(n, fmt.Sprintf("%q is not the name of a field", clip(s)), "write a column or a JSON member, like email")
			return "", rule
		}
		return "field", store.MaskRule{Field: s}
	}
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
	default:
		return field(n)
	}
	kinds := []string{"field", "path", "column", "type", "detector"}
	before := len(r.problems)
	f, ok := r.mapping(n, "an item of masking", kinds...)
	switch {
	case !ok || len(r.problems) > before:
		return "", rule
	case len(f.values) != 1:
		r.bad(n, fmt.Sprintf("an item of masking has %d keys, not one", len(f.values)), "write an item for each, with one of "+strings.Join(kinds, ", "))
		return "", rule
	}
	for key, v := range f.values {
		if key == "field" {
			return field(v)
		}
		s, ok := r.text(v, key, 512)
		if !ok {
			return "", rule
		}
		good, fix := false, ""
		switch key {
		case "path":
			rule.Path, good, fix = s, jsonPath(s), `write JSONPath with names, * and places in lists, like "$.customers[*].email" or "$..email"`
		case "column":
			rule.Column, good, fix = s, columnName.MatchString(s), "write orders.email (of the schema public) or sales.orders.email"
		case "type":
			rule.Type, good, fix = s, typeName.MatchString(s), "write the name of a PostgreSQL type, like jsonb"
		case "detector":
			rule.Detector, good, fix = s, slices.Contains(detectors, s), "write one of "+strings.Join(detectors, ", ")
		}
		if !good {
			r.bad(v, fmt.Sprintf("%s is %q", key, clip(s)), fix)
			return "", rule
		}
		return key, rule
	}
	return "", rule
}
