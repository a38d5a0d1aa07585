package scopes

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/countersign-dev/countersign/store"
)

// Ceilings of max_ttl. A credential that can be called back may live a
// working day and more; one that cannot must be short, since its TTL is the
// only end it has. A certificate may live a day, because its serial can stand
// in a revocation list.
const (
	ceiling           = 24 * time.Hour
	ceilingIdentity   = time.Hour
	ceilingSSH        = time.Hour
	ceilingPKI        = 24 * time.Hour
	ceilingNotRevoked = time.Hour // of a path with revocable: false
)

// Bounds of what one catalogue may hold.
const (
	maxScopes    = 500
	maxParams    = 16
	maxList      = 100
	maxParamText = 1024 // bytes
)

var (
	scopeName = regexp.MustCompile(`\A[a-z0-9][a-z0-9._:-]{0,99}\z`)
	paramName = regexp.MustCompile(`\A[a-z][a-z0-9_]{0,31}\z`)
	askGlob   = regexp.MustCompile(`\A[A-Za-z0-9._*-]{1,128}\z`)
	fieldName = regexp.MustCompile(`\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\z`)
	hostName  = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9.:-]{0,252}\z`)
	clock     = regexp.MustCompile(`\A([01][0-9]|2[0-3]):[0-5][0-9]\z`)
	policyPat = regexp.MustCompile(`\A[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9._+-]+)*(/?\*|/)?\z`)
)

// reserved are the first segments of paths that administer Vault itself. A
// credential over them could make tokens that outlive the step or write
// itself a wider policy, so that no scope reaches them.
var reserved = []string{"sys", "auth", "cubbyhole", "identity"}

// deliveries says how each engine's credential may reach the step. What
// Countersign signs itself Vault cannot wrap, and the gateway speaks for
// databases and for what is kept in Vault.
var deliveries = map[Engine][]string{
	Identity: {Direct},
	Token:    {Direct, Wrapped},
	Database: {Direct, Wrapped, Gateway},
	PKI:      {Direct, Wrapped},
	SSH:      {Direct, Wrapped},
	Path:     {Direct, Wrapped, Gateway},
	KV:       {Gateway},
}

// ttlName is the one built-in name in a template: the granted TTL in whole
// seconds ("300s"), for the data of a path scope. Run, step and orchestrator
// are no such names: the caller chooses them, and would choose what it gets.
const ttlName = "ttl"

// readCatalogue reads all scopes of a catalogue, and the rule by which people
// decide what the policy alone wants approved.
func readCatalogue(name string, b []byte) (out []*Scope, approval *store.Rule, _ Problems) {
	r := &reader{file: name}
	body := r.document(b)
	if body == nil {
		return nil, nil, r.problems
	}
	top, ok := r.mapping(body, "the catalogue", "scopes", "approval")
	if !ok {
		return nil, nil, r.problems
	}
	if v := top.get("approval"); v != nil {
		approval = r.approval(v)
	}
	list := top.get("scopes")
	if list == nil {
		if len(r.problems) == 0 {
			r.bad(body, "the catalogue has no scopes", "write `scopes:` and a list below it")
		}
		return nil, nil, r.problems
	}
	names, slugs := map[string]position{}, map[string]*Scope{"broker": nil}
	for _, n := range r.sequence(list, "scopes", maxScopes) {
		sc := r.scope(n)
		if sc == nil || sc.Name == "" {
			continue
		}
		if first, dup := names[sc.Name]; dup {
			r.at(sc.position, fmt.Sprintf("the scope %q stands twice", sc.Name), fmt.Sprintf("rename one; the other is in line %d", first.line))
			continue
		}
		names[sc.Name] = sc.position
		if other, taken := slugs[sc.slug]; taken {
			of := "the broker's own policy"
			if other != nil {
				of = fmt.Sprintf("%q", other.Name)
			}
			r.at(sc.position, fmt.Sprintf("%q would share its Vault name %s with %s", sc.Name, sc.VaultName(), of), "rename it: two names must differ in more than punctuation")
			continue
		}
		slugs[sc.slug] = sc
		out = append(out, sc)
	}
	r.toolScopes(out)
	return out, approval, r.problems
}

// slug makes a name that Vault's policies and roles can carry.
func slug(name string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, name)
}

func (r *reader) scope(n ast.Node) *Scope {
	f, ok := r.mapping(n, "a scope", "name", "description", "target", "sensitivity", "max_ttl", "default_ttl", "ask",
		"engine", "vault", "delivery", "params", "audience", "revocable", "connection", "access", "masking", "retention", "approval")
	if !ok {
		return nil
	}
	sc := &Scope{position: where(n), byParam: map[string]int{}, strict: map[string]bool{}, Revocable: true}
	what := "the scope"
	if v := f.get("name"); v == nil {
		r.bad(n, "a scope has no name", "write `name: system:verb`, like orders-db:read")
	} else if s, ok := r.text(v, "name", 512); ok {
		if !scopeName.MatchString(s) {
			r.bad(v, fmt.Sprintf("the name %q cannot be used", clip(s)), "write lower-case letters, digits, '.', '_', ':' and '-', at most 100, like orders-db:read")
		} else {
			sc.Name, sc.slug, what = s, slug(s), s
			sc.position = where(v)
		}
	}
	missing := func(key, fix string) { r.bad(n, what+" has no "+key, fix) }

	if v := f.get("description"); v != nil {
		sc.Description, _ = r.text(v, "description", 2000)
		sc.Description = strings.TrimSpace(sc.Description)
	}
	if v := f.get("sensitivity"); v != nil {
		sc.Sensitivity = r.oneOf(v, "sensitivity", Sensitivities...)
	} else {
		missing("sensitivity", "write `sensitivity:` low, sensitive or critical")
	}
	if v := f.get("ask"); v != nil {
		sc.Ask = r.texts(v, "ask", maxList, func(item ast.Node, s string) {
			if !askGlob.MatchString(s) {
				r.bad(item, fmt.Sprintf("%q cannot match an orchestrator's name", clip(s)), `write a name, in which * stands for any characters: "ci-*"`)
				return
			}
			sc.ask = append(sc.ask, glob(s))
		})
	} else {
		missing("ask", "name the orchestrators that may ask for it: `ask: [ci-*]`; without it nobody could")
	}
	if v := f.get("engine"); v != nil {
		sc.Engine = Engine(r.oneOf(v, "engine", "identity", "token", "database", "pki", "ssh", "path", "kv"))
	} else {
		missing("engine", "write `engine:` identity, token, database, pki, ssh, path or kv")
	}
	if v := f.get("params"); v != nil {
		r.params(sc, v)
	}
	r.vault(sc, f, what)
	r.delivery(sc, f)
	r.audience(sc, f, what)
	r.revocable(sc, f)
	r.ttls(sc, f, missing)
	r.target(sc, f, missing)
	r.connection(sc, f, what)
	r.access(sc, f, what)
	r.masking(sc, f)
	if v := f.get("retention"); v != nil {
		sc.Retention = r.duration(v, "retention", 24*time.Hour, 10*365*24*time.Hour)
	}
	if v := f.get("approval"); v != nil {
		sc.Approval = r.approval(v)
	}
	r.fills(sc, f)
	return sc
}

// glob compiles an ask glob, anchored at both ends: "ci" must not let
// "ci-fork" ask.
func glob(s string) *regexp.Regexp {
	return regexp.MustCompile(`\A` + strings.ReplaceAll(regexp.QuoteMeta(s), `\*`, `.*`) + `\z`)
}

// ttls comes after revocable, since the ceiling depends on it.
func (r *reader) ttls(sc *Scope, f fields, missing func(key, fix string)) {
	max := ceiling
	switch {
	case sc.Engine == Identity:
		max = ceilingIdentity
	case sc.Engine == SSH:
		max = ceilingSSH
	case sc.Engine == PKI:
		max = ceilingPKI
	case !sc.Revocable:
		max = ceilingNotRevoked
	}
	if v := f.get("max_ttl"); v != nil {
		before := len(r.problems)
		sc.MaxTTL = r.duration(v, "max_ttl", time.Second, max)
		if len(r.problems) > before && !sc.Revocable && len(r.problems) <= maxProblems {
			last := &r.problems[len(r.problems)-1]
			last.Fix += " (what Vault cannot call back must be short)"
		}
	} else {
		missing("max_ttl", "write the longest life that its credential may have, like `max_ttl: 15m`")
	}
	sc.DefaultTTL = sc.MaxTTL
	if v := f.get("default_ttl"); v != nil {
		if sc.MaxTTL > 0 {
			max = sc.MaxTTL
		}
		sc.DefaultTTL = r.duration(v, "default_ttl", time.Second, max)
	}
}

func (r *reader) target(sc *Scope, f fields, missing func(key, fix string)) {
	v := f.get("target")
	if v == nil {
		missing("target", "name what is reached, as the record is to show it, like `target: postgres://orders`")
		return
	}
	s, ok := r.text(v, "target", 256)
	if !ok {
		return
	}
	if strings.ContainsAny(s, " \t\n") {
		r.bad(v, "target holds a space", "write it as a URI, like postgres://orders")
		return
	}
	sc.Target = s
	sc.target = r.template(v, "target", s)
}

func (r *reader) template(n ast.Node, what, s string) template {
	t, err := parseTemplate(s)
	if err != nil {
		r.bad(n, what+" holds "+err.Error(), "write {{name}} where a param's value is due")
		return nil
	}
	return t
}

func (r *reader) delivery(sc *Scope, f fields) {
	may := deliveries[sc.Engine]
	v := f.get("delivery")
	if v == nil {
		if sc.Engine == KV {
			r.bad(f.node, "a kv scope has no delivery", "write `delivery: [gateway]`: a static secret is never handed out")
			return
		}
		sc.Delivery = []string{Direct}
		return
	}
	sc.Delivery = r.texts(v, "delivery", 3, func(item ast.Node, s string) {
		if len(may) > 0 && !slices.Contains(may, s) {
			r.bad(item, fmt.Sprintf("delivery %q cannot be used with engine %s", clip(s), sc.Engine), "write one of "+strings.Join(may, ", "))
		}
	})
}

func (r *reader) audience(sc *Scope, f fields, what string) {
	v := f.get("audience")
	switch {
	case v == nil && sc.Engine == Identity:
		r.bad(f.node, what+" has no audience", "name who may be shown its tokens, the default first: `audience: [https://vault.example.com]`")
	case v != nil && sc.Engine != Identity && sc.Engine != "":
		r.bad(v, "audience belongs to engine identity", "take it out")
	case v != nil:
		sc.Audience = r.texts(v, "audience", maxList, func(item ast.Node, s string) {
			if strings.ContainsAny(s, " \t*") || len(s) > 256 {
				r.bad(item, "an audience is compared whole", "write a name or a URL without spaces and without *")
			}
		})
	}
}

func (r *reader) revocable(sc *Scope, f fields) {
	switch sc.Engine {
	case Identity, PKI, SSH:
		sc.Revocable = false
	}
	if v := f.get("revocable"); v != nil {
		b := r.boolean(v, "revocable")
		if sc.Engine != Path && sc.Engine != "" {
			r.bad(v, fmt.Sprintf("whether it can be revoked follows from engine %s", sc.Engine), "take revocable out; it is for engine path")
			return
		}
		sc.Revocable = b
	}
}

func (r *reader) connection(sc *Scope, f fields, what string) {
	v := f.get("connection")
	switch {
	case v == nil && sc.Engine == Database:
		r.bad(f.node, what+" has no connection", "say where its user name is good: `connection: {host: db.internal, port: 5432, database: orders}`")
		return
	case v == nil:
		return
	case sc.Engine != Database && sc.Engine != "":
		r.bad(v, "connection belongs to engine database", "take it out")
		return
	}
	c, ok := r.mapping(v, "connection", "host", "port", "database")
	if !ok {
		return
	}
	sc.Connection = &Connection{Port: 5432}
	if n := c.get("host"); n == nil {
		r.bad(v, "connection has no host", "write `host: db.internal`")
	} else if s, ok := r.text(n, "host", 253); ok {
		if !hostName.MatchString(s) {
			r.bad(n, fmt.Sprintf("host %q is neither a name nor an address", clip(s)), "write one without scheme and port")
		}
		sc.Connection.Host = s
	}
	if n := c.get("port"); n != nil {
		p, _ := r.integer(n, "port", 1, 65535)
		sc.Connection.Port = int(p)
	}
	if n := c.get("database"); n == nil {
		r.bad(v, "connection has no database", "write `database: orders`")
	} else {
		sc.Connection.Database, _ = r.text(n, "database", 63)
	}
}

// vault reads what each engine needs, and refuses what it does not: a key
// without effect would look like a bound that holds.
func (r *reader) vault(sc *Scope, f fields, what string) {
	v := f.get("vault")
	keys := map[Engine][]string{
		Token:    {"policies"},
		Database: {"mount", "role"},
		PKI:      {"mount", "role", "data"},
		SSH:      {"mount", "role", "data"},
		Path:     {"path", "method", "data"},
		KV:       {"mount", "path"},
	}[sc.Engine]
	switch {
	case sc.Engine == "":
		return
	case sc.Engine == Identity && v != nil:
		r.bad(v, "engine identity takes nothing from Vault", "take vault out")
		return
	case sc.Engine == Identity:
		return
	case v == nil:
		r.bad(f.node, what+" has no vault", fmt.Sprintf("write `vault:` with %s, as engine %s needs", strings.Join(keys, ", "), sc.Engine))
		return
	}
	m, ok := r.mapping(v, "vault of engine "+string(sc.Engine), keys...)
	if !ok {
		return
	}
	switch sc.Engine {
	case Token:
		r.policies(sc, m)
		return
	case Database:
		sc.Vault.Mount = r.mount(m, "database")
		r.role(sc, m, "/creds/", "orders-read")
		sc.Vault.Method = "read"
	case PKI:
		sc.Vault.Mount = r.mount(m, "pki")
		r.role(sc, m, "/issue/", "service")
		sc.Vault.Method = "write"
		r.data(sc, m, "common_name", "common_name", "alt_names", "ip_sans", "uri_sans")
	case SSH:
		sc.Vault.Mount = r.mount(m, "ssh")
		r.role(sc, m, "/sign/", "deploy")
		sc.Vault.Method = "write"
		r.data(sc, m, "valid_principals", "valid_principals")
	case Path:
		sc.Vault.Method = "read"
		if n := m.get("method"); n != nil {
			sc.Vault.Method = r.oneOf(n, "method", "read", "write")
		}
		r.path(sc, m, "")
		if n := m.get("data"); n != nil && sc.Vault.Method == "read" {
			r.bad(n, "data is sent with method write only", "write `method: write`, or take data out")
		} else {
			r.data(sc, m, "")
		}
	case KV:
		sc.Vault.Mount = r.mount(m, "secret")
		sc.Vault.Method = "read"
		r.path(sc, m, sc.Vault.Mount+"/data/")
	}
}

func (r *reader) mount(m fields, otherwise string) string {
	n := m.get("mount")
	if n == nil {
		return otherwise
	}
	s, ok := r.text(n, "mount", 128)
	if !ok {
		return ""
	}
	if strings.Contains(s, "{{") {
		r.bad(n, "a mount takes no params", "write the mount's path as it is; give role or path the param")
		return ""
	}
	r.plainPath(n, "mount", s)
	return s
}

// plainPath checks a path as the catalogue writes it, templates replaced by a
// letter.
func (r *reader) plainPath(n ast.Node, what, s string) bool {
	first, _, _ := strings.Cut(s, "/")
	for segment := range strings.SplitSeq(s, "/") {
		if !isSafe(segment) {
			r.bad(n, fmt.Sprintf("%s %q is not a plain path", what, clip(s)), "write segments of letters, digits, '.', '_' and '-' with one / between them, and none at the ends")
			return false
		}
	}
	if slices.Contains(reserved, first) {
		r.bad(n, fmt.Sprintf("%s lies in %s/, which administers Vault itself", what, first), "no scope may reach "+strings.Join(reserved, "/, ")+"/")
		return false
	}
	return true
}

// literal is t with every place for a value filled by a letter, to look at
// what stands around them.
func literal(t template) string {
	var b strings.Builder
	for _, p := range t {
		if p.param != "" {
			b.WriteString("x")
		}
		b.WriteString(p.literal)
	}
	return b.String()
}

func (r *reader) role(sc *Scope, m fields, between, example string) {
	n := m.get("role")
	if n == nil {
		r.bad(m.node, "vault has no role", fmt.Sprintf("name the role of the mount %s: `role: %s`", sc.Vault.Mount, example))
		return
	}
	s, ok := r.text(n, "role", 256)
	if !ok {
		return
	}
	t := r.template(n, "role", s)
	if t == nil {
		return
	}
	if !isSafe(literal(t)) {
		r.bad(n, fmt.Sprintf("role %q is not a plain name", clip(s)), "write letters, digits, '.', '_' and '-', and {{name}} where a param's value is due")
		return
	}
	sc.Vault.Role = s
	sc.path = append(template{{literal: sc.Vault.Mount + between}}, t...)
}

func (r *reader) path(sc *Scope, m fields, prefix string) {
	n := m.get("path")
	if n == nil {
		r.bad(m.node, "vault has no path", "write the path of the secret, like `path: aws/sts/deploy`")
		return
	}
	s, ok := r.text(n, "path", 512)
	if !ok {
		return
	}
	t := r.template(n, "path", s)
	if t == nil || !r.plainPath(n, "path", literal(t)) {
		return
	}
	if prefix == "" && !strings.Contains(t[0].literal, "/") {
		r.bad(n, "the mount in path is not fixed", "begin the path with the mount's own name and a /, without a param")
		return
	}
	sc.Vault.Path = s
	if prefix != "" {
		sc.path = append(template{{literal: prefix}}, t...)
	} else {
		sc.path = t
	}
}

// data reads the body of a write. With keys given, no other may stand; due is
// the one that must.
func (r *reader) data(sc *Scope, m fields, due string, keys ...string) {
	n := m.get("data")
	if n == nil {
		if due != "" {
			r.bad(m.node, "vault has no data", fmt.Sprintf("write `data:` with %s", strings.Join(keys, ", ")))
		}
		return
	}
	d, ok := r.mapping(n, "data", keys...)
	if !ok {
		return
	}
	if due != "" && d.get(due) == nil {
		r.bad(n, "data has no "+due, fmt.Sprintf("write `%s:` and what the credential is to say", due))
	}
	sc.Vault.Data, sc.data = map[string]string{}, map[string]template{}
	for _, key := range slices.Sorted(maps.Keys(d.values)) {
		v := d.get(key)
		if !fieldName.MatchString(key) {
			r.bad(v, fmt.Sprintf("the key %q cannot be sent to Vault", clip(key)), "write letters, digits, '_' and '-'")
			continue
		}
		s, ok := r.text(v, key, 2048)
		if !ok {
			continue
		}
		sc.Vault.Data[key] = s
		sc.data[key] = r.template(v, key, s)
	}
}

// policies reads what a Vault token may do.
func (r *reader) policies(sc *Scope, m fields) {
	n := m.get("policies")
	if n == nil {
		r.bad(m.node, "vault has no policies", "say what the token may do: `policies: [{path: secret/data/demo, capabilities: [read]}]`")
		return
	}
	seen := map[string]bool{}
	for _, item := range r.sequence(n, "policies", maxList) {
		f, ok := r.mapping(item, "an item of policies", "path", "capabilities")
		if !ok {
			continue
		}
		var p PolicyPath
		if v := f.get("path"); v == nil {
			r.bad(item, "an item of policies has no path", "write `path: secret/data/demo`")
		} else if s, ok := r.text(v, "path", 512); ok {
			first, _, _ := strings.Cut(s, "/")
			switch {
			case strings.Contains(s, "{{"):
				r.bad(v, "the policy of a Vault token is written once, by the operator, and takes no params", "write the path as it is, or a scope for each value")
			case !policyPat.MatchString(s) || slices.ContainsFunc(strings.Split(s, "/"), func(x string) bool { return x == "." || x == ".." }):
				r.bad(v, fmt.Sprintf("path %q cannot stand in a policy", clip(s)), "begin it with the mount's own name; + may stand for a segment and * at the end")
			case slices.Contains(reserved, strings.TrimSuffix(first, "*")):
				r.bad(v, fmt.Sprintf("path lies in %s/, which administers Vault itself", first), "no scope may reach "+strings.Join(reserved, "/, ")+"/")
			case !strings.Contains(s, "/"):
				r.bad(v, fmt.Sprintf("path %q reaches more than one mount or none", clip(s)), "write the mount, a / and what lies under it, like secret/data/demo or secret/*")
			case seen[s]:
				r.bad(v, fmt.Sprintf("path %q stands twice", clip(s)), "put its capabilities in one item")
			}
			seen[s] = true
			p.Path = s
		}
		if v := f.get("capabilities"); v == nil {
			r.bad(item, "an item of policies has no capabilities", "write `capabilities: [read]`")
		} else {
			p.Capabilities = r.texts(v, "capabilities", 7, func(item ast.Node, s string) {
				if !slices.Contains([]string{"create", "read", "update", "patch", "delete", "list", "deny"}, s) {
					r.bad(item, fmt.Sprintf("%q is no capability that a step may have", clip(s)), "write create, read, update, patch, delete, list or deny")
				}
			})
		}
		sc.Vault.Policies = append(sc.Vault.Policies, p)
	}
}

func (r *reader) params(sc *Scope, n ast.Node) {
	if sc.Engine == Token {
		r.bad(n, "a token scope takes no params, since its policy is written once, by the operator", "write a scope for each value")
		return
	}
	for _, item := range r.sequence(n, "params", maxParams) {
		// A param with a mistake is kept, so that the templates that it
		// fills are not told as mistakes too.
		before := len(r.problems)
		p := r.param(item)
		p.flawed = len(r.problems) > before
		if p.Name == "" {
			continue
		}
		if _, dup := sc.byParam[p.Name]; dup {
			r.bad(item, fmt.Sprintf("the param %q stands twice", p.Name), "keep one")
			continue
		}
		sc.byParam[p.Name] = len(sc.Params)
		sc.Params = append(sc.Params, p)
	}
}

func (r *reader) param(n ast.Node) Param {
	p := Param{MaxLength: 64}
	f, ok := r.mapping(n, "a param", "name", "type", "description", "required", "default", "pattern", "max_length", "min", "max", "values")
	if !ok {
		return p
	}
	before := len(r.problems)
	if v := f.get("name"); v == nil {
		r.bad(n, "a param has no name", "write `name: table`")
	} else if s, ok := r.text(v, "name", 64); ok {
		switch {
		case !paramName.MatchString(s):
			r.bad(v, fmt.Sprintf("the param's name %q cannot be used", s), "write lower-case letters, digits and '_', a letter first, at most 32")
		case s == ttlName:
			r.bad(v, "{{ttl}} is the granted TTL already", "choose another name")
		}
		p.Name = s
	}
	if v := f.get("type"); v == nil {
		r.bad(n, "a param has no type", "write `type:` string, int, enum or bool")
	} else {
		p.Type = ParamType(r.oneOf(v, "type", "string", "int", "enum", "bool"))
	}
	if v := f.get("description"); v != nil {
		p.Description, _ = r.text(v, "description", 2000)
	}
	if v := f.get("required"); v != nil {
		p.Required = r.boolean(v, "required")
	}
	only := func(key string, t ParamType) ast.Node {
		v := f.get(key)
		if v != nil && p.Type != t && p.Type != "" {
			r.bad(v, fmt.Sprintf("%s belongs to type %s", key, t), "take it out")
			return nil
		}
		return v
	}
	if v := only("pattern", StringParam); v != nil {
		if s, ok := r.text(v, "pattern", 512); ok {
			// The anchors go around a group, so that no alternative of
			// the pattern escapes them.
			// A pattern that would close the group is refused alone.
			_, err := regexp.Compile(s)
			if err == nil {
				p.pattern, err = regexp.Compile(`\A(?:` + s + `)\z`)
			}
			if err != nil {
				r.bad(v, "pattern is not a regular expression: "+err.Error(), "write RE2 syntax; it is anchored at both ends")
			}
			p.Pattern = s
		}
	}
	if v := only("max_length", StringParam); v != nil {
		m, _ := r.integer(v, "max_length", 1, maxParamText)
		p.MaxLength = int(m)
	}
	lo, hi := only("min", IntParam), only("max", IntParam)
	if p.Type == IntParam && (lo == nil || hi == nil) {
		r.bad(n, "an int param has no bounds", "write both `min:` and `max:`")
	}
	if lo != nil {
		p.Min, _ = r.integer(lo, "min", -1<<53, 1<<53)
	}
	if hi != nil {
		p.Max, _ = r.integer(hi, "max", -1<<53, 1<<53)
	}
	if lo != nil && hi != nil && p.Min > p.Max {
		r.bad(lo, fmt.Sprintf("min %d is above max %d", p.Min, p.Max), "exchange them")
	}
	if v := only("values", EnumParam); v != nil {
		p.Values = r.texts(v, "values", maxList, func(item ast.Node, s string) {
			if strings.Contains(s, "{{") || strings.Contains(s, "}}") {
				r.bad(item, "a value holds {{ or }}", "values are not templates: write it without")
			}
		})
	} else if p.Type == EnumParam {
		r.bad(n, "an enum param has no values", "write `values: [a, b]`")
	}
	if v := f.get("default"); v != nil {
		if p.Required {
			r.bad(v, "a required param has a default", "take one of the two out")
		}
		if len(r.problems) == before {
			p.Default = r.defaultValue(v, &p)
		}
	}
	return p
}

func (r *reader) defaultValue(n ast.Node, p *Param) *string {
	var v any
	switch x := n.(type) {
	case *ast.IntegerNode:
		i, ok := r.integer(n, "default", -1<<53, 1<<53)
		if !ok {
			return nil
		}
		v = i
	case *ast.BoolNode:
		v = x.Value
	default:
		s, ok := r.text(n, "default", maxParamText)
		if !ok {
			return nil
		}
		v = s
	}
	s, err := p.check(v, false)
	if err != nil {
		r.bad(n, "the default is no value of the param: "+err.Error(), "write one that the param itself would take")
		return nil
	}
	return &s
}

// fills checks that every place in a template has a param that always has a
// value, and marks the params that must be safe.
func (r *reader) fills(sc *Scope, f fields) {
	vault, _ := f.get("vault").(*ast.MappingNode)
	node := func(key string) ast.Node {
		if vault != nil {
			for _, v := range vault.Values {
				if k, ok := v.Key.(*ast.StringNode); ok && k.Value == key {
					return v.Value
				}
			}
		}
		return f.node
	}
	check := func(t template, n ast.Node, what string, strict, ttl bool) {
		for _, name := range t.params() {
			if name == ttlName {
				if !ttl {
					r.bad(n, what+" holds {{ttl}}", "{{ttl}} is for the data of a path scope")
				}
				continue
			}
			i, ok := sc.byParam[name]
			if !ok {
				fix := "add it to params"
				if len(sc.Params) > 0 {
					fix += " or write one of " + strings.Join(slices.Sorted(maps.Keys(sc.byParam)), ", ")
				}
				if sc.Engine == Token {
					fix = "write a scope for each value: a token scope takes no params"
				}
				r.bad(n, fmt.Sprintf("%s holds {{%s}}, which is no param", what, name), fix)
				continue
			}
			p := &sc.Params[i]
			if !p.Required && p.Default == nil && !p.flawed {
				r.bad(n, fmt.Sprintf("%s holds {{%s}}, which may be missing", what, name), "give the param `required: true` or a default")
			}
			sc.strict[name] = sc.strict[name] || strict
		}
	}
	check(sc.path, node(map[bool]string{true: "path", false: "role"}[sc.Vault.Path != ""]), "the path", true, false)
	check(sc.target, f.get("target"), "target", true, false)
	for _, key := range slices.Sorted(maps.Keys(sc.data)) {
		check(sc.data[key], node("data"), key, sc.Engine != Path, sc.Engine == Path)
	}
	for i := range sc.Params {
		p := &sc.Params[i]
		if !sc.strict[p.Name] {
			continue
		}
		fixed := p.Values
		if p.Default != nil && p.Type == StringParam {
			fixed = append(slices.Clone(fixed), *p.Default)
		}
		for _, s := range fixed {
			if !isSafe(s) {
				r.bad(f.get("params"), fmt.Sprintf("the value %q of the param %s cannot stand in a path", clip(s), p.Name), "write letters, digits, '.', '_' and '-'")
			}
		}
	}
}

// Bounds of an approval rule.
const (
	defaultExpires  = time.Hour
	defaultCollect  = 10 * time.Minute
	maxApprovalLife = 7 * 24 * time.Hour
	maxStandingUses = 1000
)

func (r *reader) approval(n ast.Node) *store.Rule {
	f, ok := r.mapping(n, "approval", "groups", "expires", "collect", "hours", "reasons", "passkey", "slack", "standing")
	if !ok {
		return nil
	}
	a := &store.Rule{Expires: store.Duration(defaultExpires), Collect: store.Duration(defaultCollect)}
	if v := f.get("groups"); v == nil {
		r.bad(n, "approval has no groups", "say who approves: `groups: [{group: dba, count: 1}]`")
	} else {
		for _, item := range r.sequence(v, "groups", 10) {
			g, ok := r.mapping(item, "a group", "group", "count")
			if !ok {
				continue
			}
			group := store.RuleGroup{Count: 1}
			if v := g.get("group"); v == nil {
				r.bad(item, "a group has no name", "write `group: dba`")
			} else if s, ok := r.text(v, "group", 128); ok {
				if !store.ValidID(s) {
					r.bad(v, fmt.Sprintf("group %q cannot be used", clip(s)), "write letters, digits, '.', '_' and '-'")
				}
				if slices.ContainsFunc(a.Groups, func(g store.RuleGroup) bool { return g.Group == s }) {
					r.bad(v, fmt.Sprintf("the group %q stands twice", clip(s)), "raise its count instead")
				}
				group.Group = s
			}
			if v := g.get("count"); v != nil {
				c, _ := r.integer(v, "count", 1, 20)
				group.Count = int(c)
			}
			a.Groups = append(a.Groups, group)
		}
	}
	if v := f.get("expires"); v != nil {
		a.Expires = store.Duration(r.duration(v, "expires", time.Second, maxApprovalLife))
	}
	if v := f.get("collect"); v != nil {
		a.Collect = store.Duration(r.duration(v, "collect", time.Second, maxApprovalLife))
	}
	if v := f.get("slack"); v != nil {
		if m, ok := r.mapping(v, "slack", "decide"); ok {
			if v := m.get("decide"); v != nil {
				a.Slack = r.boolean(v, "decide")
			}
		}
	}
	if v := f.get("standing"); v != nil {
		if m, ok := r.mapping(v, "standing", "uses", "for"); ok {
			a.Standing = &store.StandingLimit{}
			for _, key := range []string{"uses", "for"} {
				switch v := m.get(key); {
				case v == nil:
					r.bad(n, "standing has no "+key, "bound an approval for a whole run: `standing: {uses: 10, for: 4h}`")
				case key == "uses":
					u, _ := r.integer(v, key, 1, maxStandingUses)
					a.Standing.Uses = int(u)
				default:
					a.Standing.For = store.Duration(r.duration(v, key, time.Minute, maxApprovalLife))
				}
			}
		}
	}
	if v := f.get("reasons"); v != nil {
		if m, ok := r.mapping(v, "reasons", "requester", "approver"); ok {
			if v := m.get("requester"); v != nil {
				a.Reasons.Requester = r.boolean(v, "requester")
			}
			if v := m.get("approver"); v != nil {
				a.Reasons.Approver = r.boolean(v, "approver")
			}
		}
	}
	if v := f.get("passkey"); v != nil {
		a.Passkey = r.boolean(v, "passkey")
	}
	if v := f.get("hours"); v != nil {
		a.Hours = r.hours(v)
	}
	if a.Passkey && a.Slack {
		r.bad(n, "Slack cannot ask for a passkey", "take out slack, or passkey")
	}
	return a
}

// weekdays in the order of time.Weekday.
var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

func (r *reader) hours(n ast.Node) *store.Hours {
	f, ok := r.mapping(n, "hours", "from", "to", "days", "zone")
	if !ok {
		return nil
	}
	h := &store.Hours{Zone: "UTC"}
	for _, key := range []string{"from", "to"} {
		to := &h.From
		if key == "to" {
			to = &h.To
		}
		v := f.get(key)
		if v == nil {
			r.bad(n, "hours has no "+key, fmt.Sprintf("write `%s: \"08:00\"`", key))
			continue
		}
		if s, ok := r.text(v, key, 16); ok {
			if !clock.MatchString(s) {
				r.bad(v, fmt.Sprintf("%s is %q", key, s), `write hours and minutes in quotes: "08:00"`)
			}
			*to = s
		}
	}
	if h.From != "" && h.From == h.To {
		r.bad(n, "hours begin when they end", "write a later `to`, or take hours out")
	}
	if v := f.get("days"); v != nil {
		for _, s := range r.texts(v, "days", 7, func(item ast.Node, s string) {
			if !slices.Contains(weekdays, s) {
				r.bad(item, fmt.Sprintf("%q is no day", clip(s)), "write "+strings.Join(weekdays, ", "))
			}
		}) {
			h.Days = append(h.Days, time.Weekday(slices.Index(weekdays, s)))
		}
	}
	if v := f.get("zone"); v != nil {
		if s, ok := r.text(v, "zone", 64); ok {
			if _, err := time.LoadLocation(s); err != nil || s == "Local" {
				r.bad(v, fmt.Sprintf("there is no time zone %q", s), "write its IANA name, like Europe/Berlin")
			}
			h.Zone = s
		}
	}
	return h
}
