package mcp

import (
	"errors"
	"math"
	"regexp"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

var (
	errAnswer = errors.New("the server's answer breaks the protocol")
	errInput  = errors.New("the server asks the step for something") // SEP-2322: instead of an answer
)

// sealer seals a text that the step is to hand back, such as a cursor.
type sealer func(use, text string) string

// answer is what the step gets for m, the server's response to q. rows are the
// items in it. It is made anew: what the gateway does not know is left out
// where anything is masked. Errors are errAnswer and errInput.
func (h *hider) answer(a *store.Access, q *asked, m *message, seal sealer) (out *message, rows int64, err error) {
	out = &message{ID: q.m.ID}
	if m.Error != nil {
		out.Error = h.failure(m.Error)
		return out, 0, nil
	}
	in, err := membersOf(m.Result)
	if err != nil {
		return nil, 0, errAnswer
	}
	if t := in.get("resultType"); t != nil && string(t) != `"complete"` {
		if string(t) == `"input_required"` {
			return nil, 0, errInput
		}
		return nil, 0, errAnswer
	}
	if in.get("inputRequests") != nil {
		return nil, 0, errInput
	}
	result := object{}
	for _, e := range in {
		v, n, err := h.part(a, q, e.name, e.value, seal)
		if err != nil {
			return nil, 0, errAnswer
		}
		if v != nil {
			result, rows = append(result, member{e.name, v}), rows+n
		}
	}
	out.Result = result.value()
	return out, rows, nil
}

// failure masks an error.
func (h *hider) failure(e *rpcError) *rpcError {
	out := &rpcError{Code: e.Code, Message: h.text(e.Message)}
	if e.Code < math.MinInt32 || e.Code > math.MaxInt32 { // a number of that size may be data
		out.Code = codeInternal
	}
	if e.Data != nil {
		out.Data = h.document(e.Data)
	}
	return out
}

// part is one member of a result. nil: it is left out.
func (h *hider) part(a *store.Access, q *asked, name string, v jsontext.Value, seal sealer) (jsontext.Value, int64, error) {
	switch name {
	case "_meta":
		return h.meta(v, q.m.ID), 0, nil
	case "resultType":
		return v, 0, nil
	case "ttlMs":
		if !integers.Match(v) {
			return jsontext.Value("0"), 0, nil
		}
		return v, 0, nil
	case "cacheScope": // what a scope lets one step see is nobody else's
		return jsontext.Value(`"private"`), 0, nil
	case "nextCursor":
		if v.Kind() == 'n' {
			return nil, 0, nil
		}
		var s string
		if json.Unmarshal(v, &s) != nil || len(s) > maxSealed {
			return nil, 0, errAnswer
		}
		if s == "" {
			return nil, 0, nil
		}
		return quoted(seal(q.m.Method, s)), 0, nil
	}
	switch q.m.Method + " " + name {
	case "initialize protocolVersion":
		var version string
		if json.Unmarshal(v, &version) != nil || version == stateless || !slices.Contains(versions, version) {
			return nil, 0, errAnswer
		}
		return v, 0, nil
	case "server/discover supportedVersions":
		var theirs []string
		if json.Unmarshal(v, &theirs) != nil {
			return nil, 0, errAnswer
		}
		var both []jsontext.Value
		for _, version := range versions {
			if slices.Contains(theirs, version) {
				both = append(both, quoted(version))
			}
		}
		return list(both), 0, nil
	case "initialize capabilities", "server/discover capabilities":
		return h.capabilities(a, v)
	case "initialize serverInfo", "server/discover serverInfo":
		return h.definition(v), 0, nil
	case "initialize instructions", "server/discover instructions":
		return h.definition(v), 0, nil
	case "tools/list tools":
		return h.listed(v, func(o *object) bool {
			name, _ := o.text("name")
			if h.active() { // what is masked may not be of the shape that it says
				*o = slices.DeleteFunc(*o, func(m member) bool { return m.name == "outputSchema" })
			}
			return names.MatchString(name) && toolOf(a, name) != nil
		})
	case "resources/list resources":
		return h.listed(v, func(o *object) bool {
			uri, _ := o.text("uri")
			_, ok := resourceOf(a, uri)
			return ok
		})
	case "resources/templates/list resourceTemplates":
		return h.listed(v, func(o *object) bool {
			template, _ := o.text("uriTemplate")
			return templateAllowed(a, template)
		})
	case "prompts/list prompts":
		return h.listed(v, func(o *object) bool {
			name, _ := o.text("name")
			return promptAllowed(a, name)
		})
	case "tools/call content":
		return each(v, h.content)
	case "tools/call structuredContent":
		return h.document(v), 0, nil
	case "tools/call isError":
		if v.Kind() != 't' && v.Kind() != 'f' {
			return nil, 0, errAnswer
		}
		return v, 0, nil
	case "resources/read contents":
		return each(v, func(v jsontext.Value) (jsontext.Value, error) { return h.contents(v, q.statement) })
	case "prompts/get description":
		return h.scalar(v), 0, nil
	case "prompts/get messages":
		return each(v, func(v jsontext.Value) (jsontext.Value, error) {
			o, err := membersOf(v)
			role, _ := o.text("role")
			content := o.get("content")
			if err != nil || role != "user" && role != "assistant" {
				return nil, errAnswer
			}
			if content, err = h.content(content); err != nil {
				return nil, err
			}
			return object{{"role", quoted(role)}, {"content", content}}.value(), nil
		})
	case "completion/complete completion":
		return h.completion(v)
	}
	if h.active() {
		h.n++
		return nil, 0, nil
	}
	return h.definition(v), 0, nil
}

// each applies f to the items of an array.
func each(v jsontext.Value, f func(jsontext.Value) (jsontext.Value, error)) (jsontext.Value, int64, error) {
	if v.Kind() == 'n' { // some servers write an empty list so
		return jsontext.Value("[]"), 0, nil
	}
	in, err := elementsOf(v)
	if err != nil {
		return nil, 0, errAnswer
	}
	out := make([]jsontext.Value, len(in))
	for i := range in {
		if out[i], err = f(in[i]); err != nil {
			return nil, 0, err
		}
	}
	return list(out), int64(len(out)), nil
}

// listed keeps of a list what may be seen.
func (h *hider) listed(v jsontext.Value, may func(*object) bool) (jsontext.Value, int64, error) {
	if v.Kind() == 'n' {
		return jsontext.Value("[]"), 0, nil
	}
	in, err := elementsOf(v)
	if err != nil {
		return nil, 0, errAnswer
	}
	var out []jsontext.Value
	for _, e := range in {
		o, err := membersOf(e)
		if err != nil {
			return nil, 0, errAnswer
		}
		if may(&o) {
			out = append(out, h.definition(o.value()))
		}
	}
	return list(out), int64(len(out)), nil
}

// capabilities leaves what the gateway hands on.
func (h *hider) capabilities(a *store.Access, v jsontext.Value) (jsontext.Value, int64, error) {
	o, err := membersOf(v)
	if err != nil {
		return nil, 0, errAnswer
	}
	out := object{}
	for _, m := range o {
		switch {
		case m.name == "tools" || m.name == "logging" || m.name == "completions",
			m.name == "resources" && len(resources(a)) > 0,
			m.name == "prompts" && len(prompts(a)) > 0:
			flags, err := membersOf(m.value)
			if err != nil {
				return nil, 0, errAnswer
			}
			kept := object{}
			for _, f := range flags {
				if (f.name == "listChanged" || f.name == "subscribe") && (f.value.Kind() == 't' || f.value.Kind() == 'f') {
					kept = append(kept, f)
				}
			}
			out = append(out, member{m.name, kept.value()})
		}
	}
	return out.value(), 0, nil
}

// withheld stands for content that cannot be masked: there are no rules for
// what is in a picture.
var withheld = object{{"type", quoted("text")}, {"text", hidden}}.value()

// content masks one block of content.
func (h *hider) content(v jsontext.Value) (jsontext.Value, error) {
	o, err := membersOf(v)
	if err != nil {
		return nil, errAnswer
	}
	kind, _ := o.text("type")
	text, isText := o.text("text")
	switch {
	case kind == "text" && isText:
		if !h.active() {
			o.set("text", quoted(h.text(text)))
			return h.definition(o.value()), nil
		}
		return object{{"type", quoted("text")}, {"text", quoted(h.text(text))}}.value(), nil
	case !h.active():
		return h.definition(v), nil
	case kind == "resource":
		r, err := h.contents(o.get("resource"), "")
		if err != nil {
			return nil, err
		}
		return object{{"type", quoted("resource")}, {"resource", r}}.value(), nil
	case kind == "resource_link" && !h.named:
		return h.definition(v), nil
	}
	h.n++
	return withheld, nil
}

// contents masks what was read of a resource. uri is the one that the step
// asked for, and so knows.
func (h *hider) contents(v jsontext.Value, uri string) (jsontext.Value, error) {
	o, err := membersOf(v)
	if err != nil {
		return nil, errAnswer
	}
	if !h.active() {
		if text, ok := o.text("text"); ok {
			o.set("text", quoted(h.text(text)))
		}
		return h.definition(o.value()), nil
	}
	var out object
	if s, _ := o.text("uri"); s == uri {
		out = append(out, member{"uri", quoted(uri)})
	} else {
		out = append(out, member{"uri", quoted(h.text(s))})
	}
	if t, _ := o.text("mimeType"); mimeTypes.MatchString(t) {
		out = append(out, member{"mimeType", quoted(h.words(t))})
	}
	text, ok := o.text("text")
	if !ok { // a blob
		h.n++
		return append(out, member{"text", hidden}).value(), nil
	}
	return append(out, member{"text", quoted(h.text(text))}).value(), nil
}

var mimeTypes = regexp.MustCompile(`^[a-z]{1,16}/[A-Za-z0-9.+-]{1,64}(; ?charset=[A-Za-z0-9-]{1,16})?$`)

// completion masks what a completion suggests: bare values, which no rule by
// name can judge.
func (h *hider) completion(v jsontext.Value) (jsontext.Value, int64, error) {
	o, err := membersOf(v)
	if err != nil {
		return nil, 0, errAnswer
	}
	values, n, err := each(o.get("values"), func(v jsontext.Value) (jsontext.Value, error) {
		if v.Kind() != '"' {
			return nil, errAnswer
		}
		return h.scalar(v), nil
	})
	if err != nil {
		return nil, 0, err
	}
	out := object{{"values", values}}
	if v := o.get("total"); integers.Match(v) && len(v) <= 6 {
		out = append(out, member{"total", v})
	}
	if v := o.get("hasMore"); v.Kind() == 't' || v.Kind() == 'f' {
		out = append(out, member{"hasMore", v})
	}
	return out.value(), n, nil
}

// meta keeps of _meta who the server is and which request is meant, and the
// rest where nothing is masked. nil: nothing is left.
func (h *hider) meta(v jsontext.Value, id jsontext.Value) jsontext.Value {
	o, err := membersOf(v)
	if err != nil {
		return nil
	}
	out := object{}
	for _, m := range o {
		switch {
		case m.name == metaSubscription && id != nil && (string(m.value) == string(id) || string(m.value) == string(quoted(string(id)))):
			out = append(out, m)
		case m.name == metaSubscription:
		case m.name == metaServer || !h.active():
			out = append(out, member{m.name, h.definition(m.value)})
		default:
			h.n++
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out.value()
}

// notice is a notification as the step gets it; nil: it does not get it. known
// tells progress tokens of requests that are under way; id is of the request
// whose stream it is on, nil on the stream of a session.
func (h *hider) notice(a *store.Access, m *message, id jsontext.Value, known func(token jsontext.Value) bool) *message {
	in, err := membersOf(m.Params)
	if err != nil {
		return nil
	}
	out := object{}
	switch m.Method {
	case "notifications/progress":
		token, ok := identifier(in.get("progressToken"))
		if !ok || !known(token) {
			return nil
		}
		out = append(out, member{"progressToken", token})
		for _, name := range []string{"progress", "total"} {
			v := in.get(name)
			if v == nil && name == "total" {
				continue
			}
			if v.Kind() != '0' || h.words(string(v)) != string(v) {
				return nil
			}
			out = append(out, member{name, v})
		}
		if s, ok := in.text("message"); ok {
			out = append(out, member{"message", quoted(h.text(s))})
		}
	case "notifications/message":
		level, _ := in.text("level")
		if !slices.Contains(levels, level) {
			return nil
		}
		out = append(out, member{"level", quoted(level)})
		if s, ok := in.text("logger"); ok {
			out = append(out, member{"logger", quoted(h.text(s))})
		}
		data := in.get("data")
		if data == nil {
			data = jsontext.Value("null")
		}
		out = append(out, member{"data", h.document(data)})
	case "notifications/tools/list_changed", "notifications/resources/list_changed", "notifications/prompts/list_changed":
	case "notifications/resources/updated":
		uri, _ := in.text("uri")
		if _, ok := resourceOf(a, uri); !ok || h.words(uri) != uri {
			return nil
		}
		out = append(out, member{"uri", quoted(uri)})
	case "notifications/subscriptions/acknowledged":
		n, err := membersOf(in.get("notifications"))
		if err != nil {
			return nil
		}
		honoured := object{}
		for _, f := range n {
			switch {
			case slices.Contains([]string{"toolsListChanged", "promptsListChanged", "resourcesListChanged"}, f.name) && (f.value.Kind() == 't' || f.value.Kind() == 'f'):
				honoured = append(honoured, f)
			case f.name == "resourceSubscriptions":
				var uris []string
				_ = json.Unmarshal(f.value, &uris) // what is no list of strings is none
				var kept []jsontext.Value
				for _, uri := range uris {
					if _, ok := resourceOf(a, uri); ok && h.words(uri) == uri {
						kept = append(kept, quoted(uri))
					}
				}
				honoured = append(honoured, member{f.name, list(kept)})
			}
		}
		out = append(out, member{"notifications", honoured.value()})
	default:
		return nil
	}
	if meta := in.get("_meta"); meta != nil {
		if v := h.meta(meta, id); v != nil {
			out = append(out, member{"_meta", v})
		}
	}
	msg := &message{Method: m.Method}
	if len(out) > 0 {
		msg.Params = out.value()
	}
	return msg
}
