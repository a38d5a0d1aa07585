package mcp

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

// raw is a client that sends what it is told to.
type raw struct {
	t       testing.TB
	p       *path
	token   string
	id      string // Mcp-Session-Id
	version string
	header  http.Header // beside the usual; an empty value removes one
}

func (p *path) raw(t testing.TB) *raw {
	return &raw{t: t, p: p, token: p.token, header: http.Header{}}
}

type reply struct {
	status int
	header http.Header
	body   string
}

func (c *raw) do(ctx context.Context, method, path, body string) reply {
	c.t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, c.p.url+path, strings.NewReader(body))
	ok(c.t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	req.Header.Set("Authorization", "Bearer "+c.token)
	if c.id != "" {
		req.Header.Set("Mcp-Session-Id", c.id)
	}
	if c.version != "" {
		req.Header.Set("Mcp-Protocol-Version", c.version)
	}
	for k, v := range c.header {
		if req.Header[k] = v; v[0] == "" {
			delete(req.Header, k)
		}
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return reply{body: err.Error()}
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return reply{res.StatusCode, res.Header, string(b) + " cut: " + err.Error()}
	}
	return reply{res.StatusCode, res.Header, string(b)}
}

func (c *raw) send(ctx context.Context, body string) reply {
	return c.do(ctx, http.MethodPost, "", body)
}

func (c *raw) initialize(version string) {
	c.t.Helper()
	r := c.send(c.t.Context(), `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"`+version+`","capabilities":{"roots":{},"sampling":{}},"clientInfo":{"name":"raw","version":"1"}}}`)
	if r.status != http.StatusOK || !strings.Contains(r.body, `"result"`) {
		c.t.Fatalf("initialize: %d %s", r.status, r.body)
	}
	c.id, c.version = r.header.Get("Mcp-Session-Id"), version
	if r := c.send(c.t.Context(), `{"jsonrpc":"2.0","method":"notifications/initialized"}`); r.status != http.StatusAccepted {
		c.t.Fatalf("initialized: %d %s", r.status, r.body)
	}
}

func TestHostileMessagesAreRefusedAndReachNoServer(t *testing.T) {
	p, o := newOrdersPath(t, nil, access())
	c := p.raw(t)
	c.initialize("2025-06-18")
	uses := len(p.rec.Uses())
	big := strings.Repeat("x", MaxMessage)
	for name, row := range map[string]struct {
		body   string
		status int
		says   string
	}{
		"no JSON":                      {`{"jsonrpc":`, 400, "-32700"},
		"nothing":                      {``, 400, "-32700"},
		"a batch":                      {`[{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"drop_orders"}}]`, 400, "batch"},
		"a batch after space":          {" \n[]", 400, "batch"},
		"two names":                    {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","name":"drop_orders"}}`, 400, "-32700"},
		"two methods":                  {`{"jsonrpc":"2.0","id":2,"method":"ping","method":"tools/call","params":{"name":"drop_orders"}}`, 400, "-32700"},
		"a name in other letters":      {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","Name":"drop_orders"}}`, 200, "-32602"},
		"a method in other letters":    {`{"jsonrpc":"2.0","id":2,"method":"ping","METHOD":"tools/call","params":{"name":"drop_orders"}}`, 400, "-32700"},
		"params with a long s":         {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail"},"param\u017f":{"name":"drop_orders"}}`, 400, "-32700"},
		"two messages":                 {`{"jsonrpc":"2.0","id":2,"method":"ping"}{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"drop_orders"}}`, 400, "-32700"},
		"a null id":                    {`{"jsonrpc":"2.0","id":null,"method":"tools/call","params":{"name":"drop_orders"}}`, 400, "-32700"},
		"a fraction as id":             {`{"jsonrpc":"2.0","id":1.5,"method":"tools/list"}`, 400, "-32700"},
		"an exponent as id":            {`{"jsonrpc":"2.0","id":1e3,"method":"tools/list"}`, 400, "-32700"},
		"an object as id":              {`{"jsonrpc":"2.0","id":{},"method":"tools/list"}`, 400, "-32700"},
		"an id of a kilobyte":          {`{"jsonrpc":"2.0","id":"` + big[:1024] + `","method":"tools/list"}`, 400, "-32700"},
		"not UTF-8":                    {"{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/call\",\"params\":{\"name\":\"fail\xff\"}}", 400, "-32700"},
		"half a surrogate":             {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","arguments":{"a":"\ud800"}}}`, 400, "-32700"},
		"version 1":                    {`{"jsonrpc":"1.0","id":2,"method":"tools/list"}`, 400, "-32700"},
		"params as a list":             {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":["drop_orders"]}`, 400, "-32700"},
		"a response":                   {`{"jsonrpc":"2.0","id":2,"result":{}}`, 400, "-32600"},
		"an error":                     {`{"jsonrpc":"2.0","id":2,"error":{"code":1,"message":"m"}}`, 400, "-32600"},
		"a request and a response":     {`{"jsonrpc":"2.0","id":2,"method":"tools/list","result":{}}`, 400, "-32700"},
		"neither":                      {`{"jsonrpc":"2.0","id":2}`, 400, "-32700"},
		"too large":                    {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","arguments":{"a":"` + big + `"}}}`, 413, "4 MiB"},
		"an unknown method":            {`{"jsonrpc":"2.0","id":2,"method":"admin/shutdown"}`, 200, "-32601"},
		"tasks":                        {`{"jsonrpc":"2.0","id":2,"method":"tasks/list"}`, 200, "-32601"},
		"a method of servers":          {`{"jsonrpc":"2.0","id":2,"method":"sampling/createMessage","params":{}}`, 200, "-32601"},
		"a call as a notification":     {`{"jsonrpc":"2.0","method":"tools/call","params":{"name":"lookup_order"}}`, 400, "-32601"},
		"a notification as a call":     {`{"jsonrpc":"2.0","id":2,"method":"notifications/initialized"}`, 200, "-32601"},
		"roots have changed":           {`{"jsonrpc":"2.0","method":"notifications/roots/list_changed"}`, 400, "-32601"},
		"another tool":                 {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"drop_orders"}}`, 200, "allows no such tool"},
		"a tool with a line break":     {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_\n"}}`, 200, "-32602"},
		"a tool by number":             {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":1}}`, 200, "-32602"},
		"arguments as text":            {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","arguments":"x"}}`, 200, "-32602"},
		"a task":                       {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","task":{"ttl":1}}}`, 200, "-32602"},
		"answers that nobody asked":    {`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"fail","inputResponses":{},"requestState":"x"}}`, 200, "-32602"},
		"another resource":             {`{"jsonrpc":"2.0","id":2,"method":"resources/read","params":{"uri":"secrets://1"}}`, 200, "-32602"},
		"a way out":                    {`{"jsonrpc":"2.0","id":2,"method":"resources/read","params":{"uri":"orders://a/../../secrets"}}`, 200, "-32602"},
		"a way out, encoded":           {`{"jsonrpc":"2.0","id":2,"method":"resources/read","params":{"uri":"orders://a/%2e%2e/secrets"}}`, 200, "-32602"},
		"a way out, encoded twice":     {`{"jsonrpc":"2.0","id":2,"method":"resources/read","params":{"uri":"orders://a/%252e%252e/secrets"}}`, 200, "-32602"},
		"a way out by backslash":       {`{"jsonrpc":"2.0","id":2,"method":"resources/read","params":{"uri":"orders://a\\..\\secrets"}}`, 200, "-32602"},
		"another prompt":               {`{"jsonrpc":"2.0","id":2,"method":"prompts/get","params":{"name":"threaten"}}`, 200, "-32602"},
		"a prompt's argument as list":  {`{"jsonrpc":"2.0","id":2,"method":"prompts/get","params":{"name":"apologise","arguments":{"a":[]}}}`, 200, "-32602"},
		"completion of another prompt": {`{"jsonrpc":"2.0","id":2,"method":"completion/complete","params":{"ref":{"type":"ref/prompt","name":"threaten"},"argument":{"name":"a","value":"b"}}}`, 200, "-32602"},
		"completion by a second name":  {`{"jsonrpc":"2.0","id":2,"method":"completion/complete","params":{"ref":{"type":"ref/prompt","name":"apologise","Name":"threaten"},"argument":{"name":"a","value":"b"}}}`, 200, "-32602"},
		"a cursor of its own":          {`{"jsonrpc":"2.0","id":2,"method":"tools/list","params":{"cursor":"abc"}}`, 200, "cursor"},
		"a level that is none":         {`{"jsonrpc":"2.0","id":2,"method":"logging/setLevel","params":{"level":"all"}}`, 200, "-32602"},
		"a second initialize":          {`{"jsonrpc":"2.0","id":2,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`, 400, "-32600"},
		"a version in _meta":           {`{"jsonrpc":"2.0","id":2,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`, 400, "-32020"},
		"a progress token as list":     {`{"jsonrpc":"2.0","id":2,"method":"tools/list","params":{"_meta":{"progressToken":[1]}}}`, 200, "-32602"},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(p.rec.Refusals())
			r := c.send(t.Context(), row.body)
			if r.status != row.status || !strings.Contains(r.body, row.says) || !strings.Contains(r.body, `"error"`) {
				t.Errorf("%d %s", r.status, r.body)
			}
			// Of a flood the rest is on record within a second, by number.
			gatewaytest.Until(t, "the refusal is on record", func() bool { return len(p.rec.Refusals()) > before })
		})
	}
	if o.reached.Load() != 0 || len(p.rec.Uses()) != uses {
		t.Errorf("%d calls, uses %d then %d", o.reached.Load(), uses, len(p.rec.Uses()))
	}
}

func TestHostileRequestsAreTurnedAway(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	const list = `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`
	call := `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"count","arguments":{"n":"17"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`
	for name, row := range map[string]struct {
		method, path, body string
		header             http.Header
		status             int
	}{
		"no token":                {"POST", "", list, http.Header{"Authorization": {""}}, 401},
		"another token":           {"POST", "", list, http.Header{"Authorization": {"Bearer x"}}, 401},
		"two tokens":              {"POST", "", list, http.Header{"Authorization": {"Bearer x", "Bearer " + p.token}}, 401},
		"a page elsewhere":        {"POST", "", list, http.Header{"Origin": {"http://evil.test"}}, 403},
		"a page by rebinding":     {"POST", "", list, http.Header{"Origin": {p.url}}, 403},
		"a page without origin":   {"GET", "", "", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403},
		"another path":            {"POST", "/admin", list, nil, 404},
		"text":                    {"POST", "", list, http.Header{"Content-Type": {"text/plain"}}, 415},
		"compressed":              {"POST", "", list, http.Header{"Content-Encoding": {"gzip"}}, 415},
		"no streams":              {"POST", "", list, http.Header{"Accept": {"application/json"}}, 406},
		"streams alone":           {"POST", "", list, http.Header{"Accept": {"text/event-stream"}}, 406},
		"streams refused":         {"POST", "", list, http.Header{"Accept": {"application/json, text/event-stream;q=0"}}, 406},
		"JSON alone for a stream": {"GET", "", "", http.Header{"Accept": {"application/json"}}, 406},
		"an unknown version":      {"POST", "", list, http.Header{"Mcp-Protocol-Version": {"2024-11-05"}}, 400},
		"an unknown MCP session":  {"POST", "", list, http.Header{"Mcp-Session-Id": {"x"}}, 404},
		"another's agreement":     {"POST", "", list, http.Header{"Mcp-Protocol-Version": {"2025-11-25"}}, 400},
		"a stream of none":        {"GET", "", "", http.Header{"Mcp-Session-Id": {""}}, 405},
		"an event of its own":     {"GET", "", "", http.Header{"Last-Event-Id": {"1_1"}}, 400},
		"the end of none":         {"DELETE", "", "", http.Header{"Mcp-Session-Id": {""}}, 400},
		"another method":          {"PUT", "", list, nil, 405},
		"a method's header lies":  {"POST", "", call, http.Header{"Mcp-Protocol-Version": {stateless}, "Mcp-Method": {"tools/list"}, "Mcp-Name": {"count"}}, 400},
		"a name's header lies":    {"POST", "", call, http.Header{"Mcp-Protocol-Version": {stateless}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"drop_orders"}}, 400},
		"a param's header lies":   {"POST", "", call, http.Header{"Mcp-Protocol-Version": {stateless}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"count"}, "Mcp-Param-N": {"18"}}, 400},
		"a version is missing":    {"POST", "", list, http.Header{"Mcp-Protocol-Version": {stateless}, "Mcp-Method": {"tools/list"}}, 400},
	} {
		t.Run(name, func(t *testing.T) {
			c := p.raw(t)
			c.initialize("2025-06-18")
			uses, refusals := len(p.rec.Uses()), len(p.rec.Refusals())
			c.header = row.header
			if r := c.do(t.Context(), row.method, row.path, row.body); r.status != row.status {
				t.Errorf("%d %s", r.status, r.body)
			}
			if len(p.rec.Uses()) != uses {
				t.Error("it went further")
			}
			if row.status == 415 || row.status == 406 || row.method == "PUT" { // of a flood the rest is there within a second, by number
				gatewaytest.Until(t, "it is on record", func() bool { return len(p.rec.Refusals()) > refusals })
			}
		})
	}
}

func TestAHeaderThatRepeatsAnArgumentIsOnRecordByItsName(t *testing.T) {
	q := &asked{m: &message{Method: "tools/call"}, use: "tools/call count", statement: `{"n":"17","m":"x"}`}
	h := http.Header{"Mcp-Method": {"tools/call"}, "Mcp-Param-Region": {"17"}, "Mcp-Param-An-Order": {"x"}}
	if no := q.headers(h); no != nil || q.statement != `{"n":"17","m":"x"}`+"\nMcp-Param-An-Order\nMcp-Param-Region" {
		t.Errorf("%v %q", no, q.statement)
	}
	h["Mcp-Param-"+strings.Repeat("A", 200)] = []string{"17"}
	if no := q.headers(h); no == nil {
		t.Error("a name as long as that went through")
	}
}

func TestANotificationIsMaskedByTheRulesOfEveryScopeThatACallWentUnder(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	approved := p.params
	approved.Intent = store.NewID()
	approved.Grant.Scope = "orders-mcp:refund"
	a := store.Access{MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "refund_order"}}}, Masking: store.Masking{Rules: []store.MaskRule{{Field: "iban"}}}}
	a.Protocol, a.Upstream, a.Inject = p.params.Grant.Access.Protocol, p.params.Grant.Access.Upstream, p.params.Grant.Access.Inject
	approved.Grant.Access = &a
	own, _ := p.open(p.params)
	two, _ := p.open(approved)
	v, err := newView(own)
	ok(t, err)
	c := v.newConn("2025-06-18")
	notice := func() string {
		m := &message{Method: "notifications/message", Params: []byte(`{"level":"info","data":{"iban":"DE02120300000000202051"}}`)}
		return string(c.hiding().notice(v.access, m, nil, c.progresses).encode())
	}
	if before := notice(); !strings.Contains(before, "DE02") {
		t.Errorf("the session's own rules hide it already: %s", before)
	}
	x := &exchange{v: v}
	if no := x.adopt(&call{c: c, q: &asked{name: "refund_order", scope: "orders-mcp:refund"}}, two); no != "" {
		t.Fatal(no)
	}
	if after := notice(); strings.Contains(after, "DE02") {
		t.Errorf("it is shown: %s", after)
	}
}

func TestAnMCPSessionIsOfNoUseToAnotherStepAndTheServersOwnIsNotShown(t *testing.T) {
	var server atomic.Value
	p, _ := newOrdersPath(t, nil, access())
	inner := p.server.Config.Handler
	p.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if id := r.Header.Get("Mcp-Session-Id"); id != "" {
			server.Store(id)
		}
		inner.ServeHTTP(w, r)
	})
	c := p.raw(t)
	c.initialize("2025-06-18")
	if c.id == "" || c.id == server.Load() {
		t.Errorf("the step was told %q, the server's is %q", c.id, server.Load())
	}
	other := p.params
	other.Intent = store.NewID()
	_, token := p.open(other)
	d := p.raw(t)
	d.token = token
	d.initialize("2025-06-18")
	for _, id := range []string{c.id, server.Load().(string)} {
		d.id = id
		for _, method := range []string{"POST", "GET", "DELETE"} {
			if r := d.do(t.Context(), method, "", `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); r.status != http.StatusNotFound {
				t.Errorf("%s with another's session: %d %s", method, r.status, r.body)
			}
		}
	}
	if !strings.Contains(fmt.Sprint(p.rec.Refusals()), "the MCP session of another step") {
		t.Error("it is not on record")
	}
	if r := c.send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); r.status != http.StatusOK || !strings.Contains(r.body, `"name":"count"`) {
		t.Errorf("its own step: %d %s", r.status, r.body)
	}
	if r := c.do(t.Context(), "DELETE", "", ""); r.status != http.StatusNoContent {
		t.Errorf("%d %s", r.status, r.body)
	}
	if r := c.send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); r.status != http.StatusNotFound {
		t.Errorf("after its end: %d %s", r.status, r.body)
	}
}

func TestASessionForAnotherProtocolIsTurnedAway(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	other := p.params
	a := *other.Grant.Access
	a.Protocol = store.ProtocolHTTP
	other.Intent, other.Grant.Access = store.NewID(), &a
	c := p.raw(t)
	_, c.token = p.open(other)
	if r := c.send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); r.status != http.StatusForbidden {
		t.Errorf("%d %s", r.status, r.body)
	}
}

func TestACursorIsSealedForItsListAndItsSession(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	v, err := newView(p.sess)
	ok(t, err)
	sealed := v.sealed("tools/list", "k@example.com")
	if got, good := v.opened("tools/list", sealed); !good || got != "k@example.com" {
		t.Errorf("%q", got)
	}
	other, err := newView(p.sess)
	ok(t, err)
	for name, open := range map[string]func() (string, bool){
		"another list":    func() (string, bool) { return v.opened("prompts/list", sealed) },
		"another session": func() (string, bool) { return other.opened("tools/list", sealed) },
		"changed":         func() (string, bool) { return v.opened("tools/list", "A"+sealed[1:]+"A") },
		"empty":           func() (string, bool) { return v.opened("tools/list", "") },
	} {
		if got, good := open(); good {
			t.Errorf("%s: %q", name, got)
		}
	}
	if one, two := v.sealed("tools/list", "x"), v.sealed("tools/list", "x"); one == two {
		t.Error("a nonce was used twice")
	}
}

// A statement of 300 KB is on record by its start and the digest of all.
func TestArgumentsThatNoEntryHoldsAreOnRecordByTheirDigest(t *testing.T) {
	p := newPath(t, answering(`{"jsonrpc":"2.0","id":2,"result":{"content":[]}}`), access())
	args := `{"id":"` + strings.Repeat(`\"x`, 100_000) + `"}`
	r := p.raw(t).send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order","arguments":`+args+`}}`)
	if r.status != http.StatusOK || !strings.Contains(r.body, `"content":[]`) {
		t.Fatalf("%d %.200s", r.status, r.body)
	}
	u := p.rec.Finished("tools/call lookup_order")
	if want := digestOf(args); !strings.HasPrefix(u.Statement, `{"id":"\"x`) || !strings.HasSuffix(u.Statement, want+")") || u.Outcome.Digest != want {
		t.Errorf("…%s %+v", u.Statement[len(u.Statement)-200:], u.Outcome)
	}
}

// answering is a server that answers each POST with a document.
func answering(body string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, body)
	})
}

// streaming is a server that answers each POST with a stream.
func streaming(body string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, body)
	})
}

func TestServersThatLieOrFailGetTheStepACleanError(t *testing.T) {
	const fine = `{"jsonrpc":"2.0","id":2,"result":{"content":[]}}`
	head := func(status int, k, v, body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(k, v)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		})
	}
	for name, row := range map[string]struct {
		server http.Handler
		err    string // on record
	}{
		"not JSON":               {answering(`<html>`), store.UseUpstream},
		"a batch":                {answering(`[` + fine + `]`), store.UseUpstream},
		"another's answer":       {answering(`{"jsonrpc":"2.0","id":3,"result":{"content":[]}}`), store.UseUpstream},
		"an id as text":          {answering(`{"jsonrpc":"2.0","id":"2","result":{"content":[]}}`), store.UseUpstream},
		"a request instead":      {answering(`{"jsonrpc":"2.0","id":2,"method":"roots/list"}`), store.UseUpstream},
		"two results":            {answering(`{"jsonrpc":"2.0","id":2,"result":{},"result":{}}`), store.UseUpstream},
		"a list as result":       {answering(`{"jsonrpc":"2.0","id":2,"result":[]}`), store.UseUpstream},
		"content that is none":   {answering(`{"jsonrpc":"2.0","id":2,"result":{"content":"x"}}`), store.UseWithheld},
		"a block that is none":   {answering(`{"jsonrpc":"2.0","id":2,"result":{"content":["x"]}}`), store.UseWithheld},
		"asking for input":       {answering(`{"jsonrpc":"2.0","id":2,"result":{"resultType":"input_required","inputRequests":{"1":{"method":"elicitation/create"}}}}`), store.UseWithheld},
		"an unknown kind":        {answering(`{"jsonrpc":"2.0","id":2,"result":{"resultType":"task"}}`), store.UseWithheld},
		"without end":            {answering(`{"jsonrpc":"2.0","id":2,"result":{"content":[{"type":"text","text":"` + strings.Repeat("x", MaxMessage) + `"}]}}`), store.UseUpstream},
		"an event without end":   {streaming("data: " + strings.Repeat("x", MaxMessage+8<<10)), store.UseUpstream},
		"a stream of noise":      {streaming("data: {\n\n"), store.UseUpstream},
		"a stream that is cut":   {streaming("data: " + fine), store.UseUpstream},
		"a stream of nothing":    {streaming(""), store.UseUpstream},
		"another's in a stream":  {streaming("data: {\"jsonrpc\":\"2.0\",\"id\":9,\"result\":{}}\n\n"), store.UseUpstream},
		"compressed":             {head(200, "Content-Encoding", "gzip", fine), store.UseUpstream},
		"elsewhere":              {head(307, "Location", "http://evil.test/", ""), store.UseUpstream},
		"accepted, no answer":    {head(202, "Content-Type", "application/json", ""), store.UseUpstream},
		"text":                   {head(200, "Content-Type", "text/plain", fine), store.UseUpstream},
		"an error of its own":    {head(500, "Content-Type", "text/plain", "panic: k@example.com"), store.UseUpstream},
		"a key that it refuses":  {head(401, "Content-Type", "text/plain", ""), store.UseUpstream},
		"a length that it holds": {head(200, "Content-Length", "4000", fine), store.UseUpstream},
		"hanging up": {http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, _, _ := w.(http.Hijacker).Hijack()
			_ = c.Close()
		}), store.UseUpstream},
		"hanging": {http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }), store.UseTimeout},
		"hanging within": {http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"jsonrpc":`)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}), store.UseTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPath(t, drained(row.server), access(), func(c *Config) {
				if row.err == store.UseTimeout {
					c.Timeout = 300 * time.Millisecond
				}
			})
			r := p.raw(t).send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order","arguments":{}}}`)
			if r.status != http.StatusOK || !strings.Contains(r.body, `"id":2`) || !strings.Contains(r.body, `"error"`) || strings.Contains(r.body, "example.com") {
				t.Errorf("%d %.300s", r.status, r.body)
			}
			if u := p.rec.Finished("tools/call lookup_order"); u.Outcome.Error != row.err {
				t.Errorf("%+v", u.Outcome)
			}
			if name == "asking for input" && !p.refused("server input_required") {
				t.Error("what the server asked for is not on record")
			}
		})
	}
	t.Run("down", func(t *testing.T) {
		p := newPath(t, nil, access())
		p.server.Close()
		r := p.raw(t).send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order"}}`)
		if u := p.rec.Finished("tools/call lookup_order"); u.Outcome.Error != store.UseUpstream || !strings.Contains(r.body, "could not be reached") {
			t.Errorf("%d %s %+v", r.status, r.body, u.Outcome)
		}
	})
}

// drained reads a request before it answers, as a server does whose end of the
// connection is to be seen.
func drained(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		h.ServeHTTP(w, r)
	})
}

func TestOfAStreamTheStepGetsWhatIsItsOwn(t *testing.T) {
	answers := make(chan string, 8)
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if !strings.Contains(string(b), "tools/call") {
			answers <- string(b)
			w.WriteHeader(http.StatusAccepted)
			return
		}
		streaming(strings.Join([]string{
			"\uFEFF: hello",
			"event: message\r\nid: k@example.com\r\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\r\ndata: \"params\":{\"progressToken\":\"t\",\"progress\":1,\"message\":\"k@example.com\"}}\r\n",
			"data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":\"k@example.com\",\"progress\":1}}\n",
			"data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/secret\",\"params\":{\"k\":\"k@example.com\"}}\n",
			"event: k@example.com\ndata: k@example.com\n",
			"data: {\"jsonrpc\":\"2.0\",\"id\":77,\"method\":\"sampling/createMessage\",\"params\":{\"k\":\"k@example.com\"}}\n",
			"data: {\"jsonrpc\":\"2.0\",\"id\":78,\"method\":\"ping\"}\n",
			"data: {\"jsonrpc\":\"2.0\",\"id\":2,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"k@example.com\"}]}}\n",
			"data: {\"jsonrpc\":\"2.0\",\"id\":2,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"again\"}]}}\n\n",
		}, "\n")).ServeHTTP(w, r)
	}), access(store.MaskRule{Detector: "email"}))
	r := p.raw(t).send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order","arguments":{},"_meta":{"progressToken":"t"}}}`)
	var data []string
	for line := range strings.SplitSeq(r.body, "\n") {
		if d, is := strings.CutPrefix(line, "data: "); is {
			data = append(data, d)
		}
	}
	want := []string{
		`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"t","progress":1,"message":"[masked]"}}`,
		`{"jsonrpc":"2.0","id":2,"result":{"content":[{"type":"text","text":"[masked]"}]}}`,
	}
	if strings.Join(data, "\n") != strings.Join(want, "\n") || strings.Contains(r.body, "example.com") {
		t.Errorf("%s", r.body)
	}
	for range 2 {
		select {
		case a := <-answers:
			if !strings.Contains(a, `"id":77,"error":{"code":-32601`) && a != `{"jsonrpc":"2.0","id":78,"result":{}}` {
				t.Errorf("the server was told %s", a)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("the server was not answered")
		}
	}
	if !p.refused("server sampling/createMessage") {
		t.Error("what the server asked for is not on record")
	}
}

func TestAStepThatDoesNotReadOrSendHoldsNothingUp(t *testing.T) {
	big := streaming(strings.Repeat("data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"info\",\"data\":\""+strings.Repeat("x", 1<<20)+"\"}}\n\n", 32))
	p := newPath(t, big, access(), func(c *Config) { c.Slow = 200 * time.Millisecond })
	head := "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\nAuthorization: Bearer " + p.token + "\r\n"

	c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	ok(t, err)
	defer func() { _ = c.Close() }()
	body := `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order"}}`
	_, err = fmt.Fprintf(c, "%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
	ok(t, err)
	if u := p.rec.Finished("tools/call lookup_order"); u.Outcome.Error != store.UseClient {
		t.Errorf("%+v", u.Outcome)
	}

	d, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	ok(t, err)
	defer func() { _ = d.Close() }()
	_, err = fmt.Fprintf(d, "%sContent-Length: 100\r\n\r\n{", head)
	ok(t, err)
	ok(t, d.SetReadDeadline(time.Now().Add(5*time.Second)))
	if line, err := bufio.NewReader(d).ReadString('\n'); err != nil || !strings.Contains(line, " 400 ") {
		t.Errorf("%q %v", line, err)
	}
}

func TestASecretInTheQueryIsNotTold(t *testing.T) {
	p := newPath(t, nil, access())
	a := *p.params.Grant.Access
	a.Inject = &store.Inject{In: "query", Name: "key", Value: "{{key}}"}
	a.Upstream = "http://127.0.0.1:1/"
	other := p.params
	other.Intent, other.Grant.Access = store.NewID(), &a
	c := p.raw(t)
	_, c.token = p.open(other)
	if r := c.send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); strings.Contains(r.body, apiKey) || !strings.Contains(r.body, "could not be reached") {
		t.Errorf("%s", r.body)
	}
}
