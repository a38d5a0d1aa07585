package mcp

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
)

func FuzzAMessageThatIsReadGoesOnAsWhatItWas(f *testing.F) {
	for _, s := range []string{
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","arguments":{"x":[1,"\u00e9",null]}}}`,
		`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"a"}}`,
		`{"jsonrpc":"2.0","id":"a","result":{"content":[]}}`, `{"jsonrpc":"2.0","id":null,"error":{"code":-1,"message":"m","data":[]}}`,
		`[]`, ` {"jsonrpc":"2.0","id":-0,"method":"ping"}`, `{"jsonrpc":"2.0","id":1,"ID":2,"method":"ping"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			if m != nil {
				t.Error("a message and an error")
			}
			return
		}
		out := m.encode()
		if bytes.ContainsAny(out, "\n\r") {
			t.Errorf("more than a line: %q", out)
		}
		again, err := parse(out)
		if m.ID == nil && m.Error != nil { // a response to what could not be read goes no further by itself
			return
		}
		if err != nil {
			t.Fatalf("%s became %s, which is none: %v", b, out, err)
		}
		if !bytes.Equal(again.encode(), out) {
			t.Errorf("%s became %s", out, again.encode())
		}
		if kinds := [3]bool{m.request(), m.notification(), m.response()}; fmt.Sprint(kinds) != "[true false false]" && fmt.Sprint(kinds) != "[false true false]" && fmt.Sprint(kinds) != "[false false true]" {
			t.Errorf("%s is %v", b, kinds)
		}
	})
}

// Whatever a step sends: what is let through names nothing that the rules do not
// allow, and carries no member that was not looked at.
func FuzzWhatIsLetThroughIsAllowed(f *testing.F) {
	for _, s := range []string{
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"lookup_order","arguments":{},"_meta":{"progressToken":1,"x":2}}}`,
		`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"orders://a/..%2f"}}`,
		`{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"name":"apol","Name":"x"}}`,
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{"sampling":{}},"clientInfo":{}}}`,
		`{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"resourceSubscriptions":["orders://1"]}}}`,
	} {
		f.Add([]byte(s), "2025-06-18")
	}
	a := access()
	f.Fuzz(func(t *testing.T, b []byte, version string) {
		m, err := parse(b)
		if err != nil || m.response() {
			return
		}
		q, no := judge(m, a, "s", version, func(string, string) (string, bool) { return "", false })
		if no != nil {
			return
		}
		var out struct {
			Method string                    `json:"method"`
			Params map[string]jsontext.Value `json:"params"`
		}
		if err := json.Unmarshal(q.m.encode(), &out); err != nil {
			t.Fatal(err)
		}
		for name := range out.Params {
			if name != "_meta" && !strings.Contains(fmt.Sprint(params[out.Method]), name) {
				t.Errorf("%s goes on with %q", out.Method, name)
			}
		}
		var name string
		switch out.Method {
		case "tools/call":
			_ = json.Unmarshal(out.Params["name"], &name)
			if toolOf(a, name) == nil {
				t.Errorf("tool %q", name)
			}
		case "resources/read":
			_ = json.Unmarshal(out.Params["uri"], &name)
			if !strings.HasPrefix(name, "orders://") || strings.Contains(name, "/../") {
				t.Errorf("resource %q", name)
			}
		case "initialize":
			if string(out.Params["capabilities"]) != "{}" {
				t.Errorf("capabilities %s", out.Params["capabilities"])
			}
		}
	})
}

func FuzzAStreamOfEventsIsBounded(f *testing.F) {
	f.Add([]byte("event: message\ndata: {}\nid: 1\n\n"))
	f.Add([]byte("\uFEFFdata\r\rdata: a\r\ndata: b\r\n\r\n: c\n\nretry: 99999999999\n\n"))
	f.Add([]byte("id: \x00\n\ndata:  \n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 64
		s := newEvents(bytes.NewReader(b), limit)
		for n := 0; ; n++ {
			e, err := s.next()
			if err != nil {
				return
			}
			if len(e.data) > limit || len(e.id) > limit || strings.ContainsAny(e.id, "\r\n\x00") || n > len(b) {
				t.Fatalf("%+v", e)
			}
		}
	})
}

func TestEventsAreReadAsTheStandardSays(t *testing.T) {
	s := newEvents(strings.NewReader("\uFEFF: comment\n\ndata: YHOO\ndata: +2\rdata:10\r\n\r\nevent: add\nid: 7\ndata\n\nid\n\nretry: 250\nretry: x\n\ndata: cut"), 1000)
	for _, want := range []string{
		`{name: id: data:[] retry:0}`,
		`{name: id: data:[89 72 79 79 10 43 50 10 49 48] retry:0}`,
		`{name:add id:7 data:[] retry:0}`,
		`{name: id: data:[] retry:0}`,
		`{name: id: data:[] retry:250000000}`,
	} {
		e, err := s.next()
		ok(t, err)
		if got := fmt.Sprintf("%+v", *e); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if _, err := s.next(); err != io.EOF {
		t.Errorf("%v", err)
	}
}

func TestPatternsAndPathsMeanWhatTheySay(t *testing.T) {
	for _, row := range []struct {
		pattern, s string
		want       bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"*", "", true}, {"*", "x/y", true}, {"a*", "a", true}, {"a*", "ba", false},
		{"*a", "ba", true}, {"*a", "ab", false}, {"a*a", "a", false}, {"a*a", "aa", true}, {"a*b*c", "a1b2c", true}, {"a*b*c", "acb", false}, {"a*b*b", "ab", false}, {"", "", true}, {"", "a", false},
	} {
		if got := matches(row.pattern, row.s); got != row.want {
			t.Errorf("%q matches %q: %v", row.pattern, row.s, got)
		}
	}
	for uri, want := range map[string]bool{
		"orders://1": true, "file:///a/b.txt": true, "file:///my%20file": true, "x://100%25": true, "x://a..b/c": true,
		"": false, "file:///a/../b": false, "file:///a/./b": false, "file:///a/%2E%2e/b": false, "file:///a/%252e%252e/b": false, "file:///a%2f..%2fb": false,
		`file:///a\..\b`: false, "file:///a%5c..": false, "file:///a b": false, "x://\x00": false, "x://%00": false, "x://%": false, "x://ü": false, "..": false, "x://a/..;v=1/b": false,
		"x://a/%25zz%252e%252e/": false,
	} {
		if got := straight(uri); got != want {
			t.Errorf("%q leads straight: %v", uri, got)
		}
	}
	a := &store.Access{MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "*"}, {Name: "refund_*", Scope: "ask"}, {Name: "*_now", Scope: "now"}, {Name: "refund_status"}}}}
	for name, scope := range map[string]string{"lookup": "", "refund_order": "ask", "refund_status": "", "refund_now": "ask", "pay_now": "now"} {
		if tool := toolOf(a, name); tool == nil || tool.Scope != scope {
			t.Errorf("%s demands %+v, not %q", name, tool, scope)
		}
	}
	if toolOf(&store.Access{}, "x") != nil {
		t.Error("a tool that nothing allows")
	}
}

// random is a JSON value with canaries in it: of hidden members, and such as
// detectors know.
func random(r *rand.Rand, depth int, canary func() string) string {
	switch n := r.IntN(9); {
	case n < 2 && depth > 0:
		var parts []string
		for i := range r.IntN(4) {
			name := []string{"id", "email", "E-Mail", "note", "items", "EMAIL", "text", "_meta", "isError", "type"}[r.IntN(10)]
			value := random(r, depth-1, canary)
			if strings.EqualFold(name, "email") {
				value = string(quoted(canary()))
				if r.IntN(3) == 0 {
					value = `{"x":[` + value + `]}`
				}
			}
			parts = append(parts, string(quoted(name+strings.Repeat("2", i)))+":"+value)
			if strings.EqualFold(name, "email") {
				parts[len(parts)-1] = string(quoted(name)) + ":" + value
				break
			}
		}
		return "{" + strings.Join(parts, ",") + "}"
	case n == 2 && depth > 0:
		var parts []string
		for range r.IntN(4) {
			parts = append(parts, random(r, depth-1, canary))
		}
		return "[" + strings.Join(parts, ",") + "]"
	case n == 3:
		return string(quoted("mail " + canary() + "@example.com, key " + apiKey))
	case n == 4 && depth > 0: // JSON within a string
		return string(quoted(random(r, depth-1, canary)))
	case n == 5:
		return fmt.Sprint(r.IntN(1000))
	case n == 6:
		return []string{"null", "true", "false"}[r.IntN(3)]
	}
	return string(quoted([]string{"", "plain", "é\u2028\"\\", "{", "[1"}[r.IntN(5)]))
}

// A step gets no value that a rule hides, whatever a server answers and in
// whatever place of the protocol.
func TestNoMaskedValueReachesTheStepOverRandomAnswers(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 17))
	n := 0
	canary := func() string { n++; return fmt.Sprintf("canary%dx", n) }
	var answer func(id string) string
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		m, err := parse(b)
		if err != nil || !m.request() {
			w.WriteHeader(http.StatusAccepted)
			return
		}
		body := answer(string(m.ID))
		if strings.HasPrefix(body, "{") {
			answering(body).ServeHTTP(w, req)
			return
		}
		streaming(body).ServeHTTP(w, req)
	}), access(store.MaskRule{Field: "email"}, store.MaskRule{Path: "$.items[*].note"}, store.MaskRule{Detector: "email"}))
	c := p.raw(t)
	asks := []string{
		`"method":"tools/call","params":{"name":"lookup_order","arguments":{},"_meta":{"progressToken":"t"}}`,
		`"method":"tools/call","params":{"name":"lookup_order","arguments":{},"_meta":{"progressToken":"t"}}`,
		`"method":"resources/read","params":{"uri":"orders://1"}`,
		`"method":"prompts/get","params":{"name":"apologise"}`,
		`"method":"completion/complete","params":{"ref":{"type":"ref/prompt","name":"apologise"},"argument":{"name":"a","value":"b"}}`,
		`"method":"logging/setLevel","params":{"level":"info"}`,
	}
	got, masked := 0, 0
	for i := range 400 {
		ask := i % len(asks)
		text := func() string { return string(quoted(random(r, 3, canary) + " ")) }
		answer = func(id string) string {
			block := func() string {
				return []string{
					`{"type":"text","text":` + text() + `,"annotations":{"audience":[` + text() + `]},"_meta":{"email":` + text() + `}}`,
					`{"type":"image","mimeType":"image/png","data":` + text() + `}`,
					`{"type":"resource_link","uri":` + text() + `,"name":` + text() + `}`,
					`{"type":"resource","resource":{"uri":` + text() + `,"mimeType":` + text() + `,"text":` + text() + `}}`,
					`{"type":"resource","resource":{"uri":"x","blob":` + text() + `}}`,
					`{"type":` + text() + `,"text":` + text() + `}`,
					`{"type":"text","text":` + string(quoted(`{"email":"`+canary()+`","n":1}`)) + `}`,
				}[r.IntN(7)]
			}
			result := []string{
				`{"content":[` + block() + `,` + block() + `],"structuredContent":` + random(r, 4, canary) + `,"_meta":{"x":` + text() + `},"more":` + text() + `}`,
				`{"structuredContent":{"items":[{"note":"` + canary() + `"},{"note":{"x":"` + canary() + `"}}]},"isError":true}`,
				`{"contents":[{"uri":` + text() + `,"mimeType":"text/plain","text":` + text() + `},{"uri":"orders://1","blob":` + text() + `}]}`,
				`{"description":` + text() + `,"messages":[{"role":"user","content":` + block() + `}]}`,
				`{"completion":{"values":[` + text() + `,"` + canary() + `"],"total":3,"hasMore":true,"x":` + text() + `}}`,
				`{"email":"` + canary() + `"}`,
			}[ask]
			last := `{"jsonrpc":"2.0","id":` + id + `,"result":` + result + `}`
			if r.IntN(5) == 0 {
				last = `{"jsonrpc":"2.0","id":` + id + `,"error":{"code":-1,"message":` + text() + `,"data":` + random(r, 4, canary) + `}}`
			}
			if r.IntN(2) == 0 {
				return last
			}
			return "id: " + canary() + "\nevent: message\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":\"t\",\"progress\":1,\"message\":" + text() + "}}\n\n" +
				"data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"info\",\"logger\":" + text() + ",\"data\":" + random(r, 4, canary) + "}}\n\n" +
				"data: {\"jsonrpc\":\"2.0\",\"id\":5,\"method\":\"elicitation/create\",\"params\":{\"message\":" + text() + "}}\n\n" +
				"data: " + last + "\n\n"
		}
		res := c.send(t.Context(), fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,%s}`, i+1, asks[ask]))
		if res.status != http.StatusOK || !strings.Contains(res.body, fmt.Sprintf(`"id":%d`, i+1)) {
			t.Fatalf("%d %s", res.status, res.body)
		}
		if strings.Contains(res.body, "canary") || strings.Contains(res.body, apiKey) {
			t.Fatalf("the step saw what is masked: %s", res.body)
		}
		got++
		if strings.Contains(res.body, masking.Hidden) {
			masked++
		}
	}
	if masked < got/2 {
		t.Errorf("of %d answers %d held anything masked", got, masked)
	}
	gatewaytest.Until(t, "all outcomes", func() bool {
		for _, u := range p.rec.Uses() {
			if u.Outcome == nil {
				return false
			}
		}
		return true
	})
	for _, u := range p.rec.Uses() {
		if strings.Contains(u.Sample, "canary") || strings.Contains(u.Sample, apiKey) {
			t.Errorf("the sample holds %s", u.Sample)
		}
	}
	for _, f := range p.rec.Refusals() {
		if strings.Contains(f.Statement+f.Reason, "canary") || strings.Contains(f.Statement, apiKey) {
			t.Errorf("a refusal holds %s", f.Statement)
		}
	}
}
