package approve

import (
	"context"
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	xhtml "golang.org/x/net/html"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

var (
	noon  = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	alice = approvals.Person{Name: "user:alice", Groups: []string{"dba", "sre"}}
)

// What the pages are given where they run.
var (
	_ Pages         = (*HTML)(nil)
	_ Judge         = (*approvals.Approvals)(nil)
	_ SlackAccounts = (*slack.Slack)(nil)
)

const csrfToken = "csrf-of-this-session"

// judge answers what the pages ask, from fixed data.
type judge struct {
	approve, deny error
	past          *approvals.Context
	pastErr       error
	keys          []approvals.Passkey
	keysErr       error
}

func (j *judge) May(_ *approvals.Request, _ approvals.Person, d approvals.Decision) error {
	if d.Decision == store.Approve {
		return j.approve
	}
	return j.deny
}

func (j *judge) Before(context.Context, *approvals.Request) (*approvals.Context, error) {
	return j.past, j.pastErr
}

func (j *judge) Passkeys(_ context.Context, of *approvals.Person) ([]approvals.Passkey, error) {
	if of == nil {
		return j.keys, j.keysErr
	}
	var own []approvals.Passkey
	for _, k := range j.keys {
		if k.Person == of.Name {
			own = append(own, k)
		}
	}
	return own, j.keysErr
}

// catalogue is one that is in force.
type catalogue struct{ set *scopes.Set }

func (c catalogue) Current() *scopes.Set { return c.set }

// full is a request in which no field is empty.
func full() *approvals.Request {
	return &approvals.Request{
		ID: "apr_0192f1c29d9b7c55a1b2c3d4e5f60718", Request: "req_0192f1c29d9b7c55a1b2c3d4e5f60719", Status: store.StatusPending,
		Orchestrator: "nightly-billing", Run: "run-4711", Step: "reconcile-refunds", Scope: "vault:demo-admin",
		Target: "vault://secret/*", Agent: "spiffe://countersign.test/orchestrator/nightly-billing/run/run-4711/step/reconcile-refunds",
		Sensitivity: "critical",
		Grant: store.Grant{
			Scope: "vault:demo-admin", Target: "vault://secret/*", Engine: "token", Role: "countersign-demo-admin",
			Policies: []string{"countersign-demo-admin", "countersign-demo-audit"}, Method: "write", Path: "ssh/sign/deploy/of-the-request",
			Data:   map[string]string{"valid_principals": "deploy-principal", "cert_type": "user-certificate"},
			Params: map[string]string{"customer": "c-90210", "region": "eu-central-7"}, TTL: store.Duration(12*time.Minute + 34*time.Second), Delivery: "wrapped",
			PublicKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG" + strings.Repeat("k3y", 200) + " step@run-4711", Audience: "https://audience.example.com/vault", Revocable: true,
			Access: access(),
		},
		Rule: store.Rule{
			Groups: []store.RuleGroup{{Group: "dba", Count: 2}, {Group: "security-officers", Count: 3}}, Expires: store.Duration(47 * time.Minute), Collect: store.Duration(11 * time.Minute),
			Hours:   &store.Hours{From: "07:45", To: "21:15", Days: []time.Weekday{time.Monday, time.Saturday}, Zone: "Europe/Vienna"},
			Reasons: store.RuleReasons{Requester: true, Approver: true}, Passkey: true, Slack: true,
			Standing: &store.StandingLimit{Uses: 17, For: store.Duration(3 * time.Hour)},
		},
		PolicyReasons: []string{"writes outside the change window", "touches every customer"},
		Policy:        "sha256:" + strings.Repeat("5a", 32), Subject: "user:u-1024@example.com",
		Reason: "Reconcile refunds, OPS-1234.\nThe nightly job found 14 that do not match.", Asked: noon.Add(-5 * time.Minute), Expires: noon.Add(42 * time.Minute),
		Needs: []approvals.Need{{Group: "dba", Count: 2, Approved: 1}, {Group: "security-officers", Count: 3}},
		Decisions: []approvals.Decided{{Person: "user:bob", Groups: []string{"dba", "oncall"}, Decision: store.Approve, Reason: "Checked with finance.\nLooks right.", Via: "token",
			At: noon.Add(-time.Minute), Signed: true, Index: 90817, Standing: &store.StandingTerms{Scopes: []string{"vault:demo-admin", "vault:demo-write"}, Uses: 9, Until: store.At(noon.Add(95 * time.Minute))}}},
		Refused: []approvals.Refused{{Person: "user:mallory", Problem: "self-approval", Detail: "the person is on the requester's side", At: noon.Add(-2 * time.Minute), Folded: 41, Index: 90816}},
		Index:   90801, LeafHash: "bGVhZiBoYXNoIG9mIHRoaXMgdmVyeSByZXF1ZXN0IQ==", URL: "http://localhost:8788/approvals/apr_0192f1c29d9b7c55a1b2c3d4e5f60718",
	}
}

// access is one in which no field is empty, whatever its protocol has a use for.
func access() *store.Access {
	return &store.Access{
		Protocol: "http", Upstream: "https://api.internal:8443/v2", TLS: "verify",
		Inject: &store.Inject{In: "basic", Name: "X-Api-Key", Value: "Token {{api-key}}", Username: "{{user}}", Password: "{{pass}}", Region: "eu-central-1", Service: "execute-api"},
		HTTP: &store.HTTPAccess{
			Routes:         []store.HTTPRoute{{Methods: []string{"GET", "PROPFIND"}, Paths: []string{"/orders/*", "/customers"}}, {Methods: []string{"DELETE"}, Paths: []string{"/carts/*/lines"}}},
			RequestHeaders: []string{"X-Trace"}, ResponseHeaders: []string{"Content-Type"}, Sample: 2049, Upgrade: true, Timeout: store.Duration(93 * time.Second),
		},
		Postgres: &store.PostgresAccess{Statements: []string{"select", "update"}, Tables: []string{"orders", "sales.*", "*"}, Functions: []string{"sales.total"}, Everywhere: true, Sample: 2050},
		MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "lookup_order"}, {Name: "refund_order", Scope: "mcp:demo-refund"}},
			Resources: []string{"file:///docs/*"}, Prompts: []string{"summarise"}, Sample: 2051},
		Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}, {Path: "$.customers[*].phone"}, {Column: "orders.address"}, {Type: "jsonb"}, {Detector: "iban"}}},
	}
}

func past() *approvals.Context {
	return &approvals.Context{
		Run: approvals.Past{Requested: 3, Approved: 1, Issued: 2, Latest: []approvals.Happened{
			{At: noon.Add(-30 * time.Minute), Type: store.StepRequested, Step: "load", Scope: "vault:demo-read", Outcome: "allow", Request: "req_1", Index: 90700},
			{At: noon.Add(-29 * time.Minute), Type: store.CredentialIssued, Step: "load", Scope: "vault:demo-read", Request: "req_1", Index: 90701},
		}},
		Orchestrator: approvals.Past{Requested: 81, Approved: 72, Denied: 6, Issued: 70, Refused: 3, More: true, Latest: []approvals.Happened{
			{At: noon.Add(-26 * time.Hour), Type: store.ApprovalDecided, Step: "reconcile", Scope: "vault:demo-write", Outcome: "deny", Request: "req_0", Index: 80001},
		}},
	}
}

func own(active bool) approvals.Passkey {
	k := approvals.Passkey{ID: "0192f1c2-aaaa-7000-8000-000000000001", Credential: "credential-of-alice", Person: alice.Name, Label: "work laptop", Enrolled: noon.Add(-48 * time.Hour), Index: 71}
	if active {
		k.Active, k.Activated = true, noon.Add(-47*time.Hour)
	}
	return k
}

// pages serves fixed data through the Pages interface, as the API does.
type pages struct {
	*HTML
	list []approvals.Request
	next string
	req  *approvals.Request
	err  error // of a decision
	keys []approvals.Passkey
	got  url.Values
}

func (p *pages) handler() http.Handler {
	r := chi.NewRouter()
	r.Use(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			who := &auth.Principal{Name: strings.TrimPrefix(alice.Name, "user:"), Role: auth.Approver, Groups: alice.Groups, Method: "session"}
			next.ServeHTTP(w, r.WithContext(auth.NewContext(r.Context(), who)))
		})
	})
	p.Routes(r)
	r.Get("/approvals", func(w http.ResponseWriter, r *http.Request) {
		p.Inbox(w, r, alice, approvals.Filter{State: r.FormValue("state"), Before: r.FormValue("cursor"), Person: &alice}, p.list, p.next)
	})
	r.Get("/approvals/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, ": nothing yet\n\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	r.Get("/approvals/{id}", func(w http.ResponseWriter, r *http.Request) { p.Show(w, r, alice, p.req) })
	r.Post("/approvals/{id}/decision", func(w http.ResponseWriter, r *http.Request) {
		p.got = form(r)
		p.Decided(w, r, alice, p.req, approvals.Decision{Decision: r.PostFormValue("decision"), Reason: r.PostFormValue("reason"), Via: "page"}, p.err)
	})
	r.Get("/passkeys", func(w http.ResponseWriter, r *http.Request) { p.Passkeys(w, r, alice, p.keys) })
	r.NotFound(func(w http.ResponseWriter, r *http.Request) { p.Problem(w, r, alice, problemOf(approvals.ErrNotFound)) })
	return r
}

func form(r *http.Request) url.Values {
	_ = r.ParseForm()
	return r.PostForm
}

func newPages(t *testing.T, j *judge, more ...func(*HTMLConfig)) *pages {
	t.Helper()
	c := HTMLConfig{Judge: j, CSRF: func(*http.Request) string { return csrfToken }, Now: func() time.Time { return noon }, Enrol: true}
	for _, f := range more {
		f(&c)
	}
	h, err := NewHTML(c)
	if err != nil {
		t.Fatal(err)
	}
	return &pages{HTML: h, req: full()}
}

// answer is what a page said.
type answer struct {
	*http.Response
	body string
	doc  *xhtml.Node
}

func (p *pages) do(t *testing.T, method, target string, form url.Values) *answer {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, target, strings.NewReader(form.Encode()))
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Header.Set("Accept", "text/html")
	p.handler().ServeHTTP(w, r)
	doc, err := xhtml.Parse(strings.NewReader(w.Body.String()))
	if err != nil {
		t.Fatal(err)
	}
	return &answer{w.Result(), w.Body.String(), doc}
}

func (p *pages) get(t *testing.T, target string) *answer {
	t.Helper()
	return p.do(t, http.MethodGet, target, nil)
}

// find returns the elements of that name.
func (a *answer) find(name string) (list []*xhtml.Node) {
	for n := range a.doc.Descendants() {
		if n.Type == xhtml.ElementNode && n.Data == name {
			list = append(list, n)
		}
	}
	return list
}

// text is what a reader of the page reads: without what is hidden from sight by
// the parser, such as scripts.
func (a *answer) text() string {
	var b strings.Builder
	for n := range a.doc.Descendants() {
		if n.Type == xhtml.TextNode && n.Parent.Data != "script" && n.Parent.Data != "style" && n.Parent.Data != "title" {
			b.WriteString(n.Data)
		}
	}
	return b.String()
}

func attr(n *xhtml.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

func has(n *xhtml.Node, name string) bool {
	return slices.ContainsFunc(n.Attr, func(a xhtml.Attribute) bool { return a.Key == name })
}

// values calls f with every value in v, and where it stands.
func values(path string, v reflect.Value, f func(path, want string)) {
	switch x := v.Interface().(type) {
	case store.Duration:
		f(path, time.Duration(x).String())
		return
	case store.Time:
		f(path, x.UTC().Format("2 Jan 2006, 15:04:05 UTC"))
		return
	case time.Time:
		f(path, x.UTC().Format("2 Jan 2006, 15:04:05 UTC"))
		return
	case time.Weekday:
		f(path, x.String())
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if t := v.Type().Field(i); t.IsExported() {
				values(path+"."+t.Name, v.Field(i), f)
			}
		}
	case reflect.Pointer:
		if !v.IsNil() {
			values(path, v.Elem(), f)
		}
	case reflect.Slice:
		for i := range v.Len() {
			values(fmt.Sprintf("%s[%d]", path, i), v.Index(i), f)
		}
	case reflect.Map:
		for it := v.MapRange(); it.Next(); {
			f(path, it.Key().String())
			values(path+"."+it.Key().String(), it.Value(), f)
		}
	case reflect.String:
		f(path, v.String())
	case reflect.Int, reflect.Int64:
		f(path, strconv.FormatInt(v.Int(), 10))
	case reflect.Bool: // said in words, which have tests of their own
	default:
		f(path, "a kind of value that this test does not know: "+v.Kind().String())
	}
}

// empty names the fields of v that have no value: a test that walks them would
// miss them.
func empty(path string, v reflect.Value) (list []string) {
	if v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct {
		return nil
	}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.IsExported() && f.Type.Kind() != reflect.Bool && v.Field(i).IsZero() {
			list = append(list, path+"."+f.Name)
		}
	}
	return list
}

func TestThePageShowsNoLessThanIsGranted(t *testing.T) {
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}})
	list := append(empty("Request", reflect.ValueOf(p.req)), empty("Grant", reflect.ValueOf(p.req.Grant))...)
	for _, part := range []any{p.req.Grant.Access, p.req.Grant.Access.Inject, p.req.Grant.Access.HTTP, p.req.Grant.Access.Postgres, p.req.Grant.Access.MCP} {
		list = append(list, empty(fmt.Sprintf("%T", part), reflect.ValueOf(part))...)
	}
	if len(list) > 0 {
		t.Fatalf("the test's request leaves %v empty", list)
	}
	page := p.get(t, "/approvals/"+p.req.ID).text()
	values("Grant", reflect.ValueOf(p.req.Grant), func(path, want string) {
		if !strings.Contains(page, want) {
			t.Errorf("%s: the page does not show %q", path, want)
		}
	})
}

func TestWhatTheGatewayLetsThroughAndHidesIsSaidInWords(t *testing.T) {
	p := newPages(t, &judge{past: past()})
	a := p.get(t, "/approvals/"+p.req.ID)
	for _, want := range []string{
		"a connection may be upgraded", "UPDATE and DELETE may go without one", "* (every table)", "refund_order, where mcp:demo-refund is granted for the call",
		"email, in any object or table", "$.customers[*].phone, in JSON", "the column orders.address", "values of the type jsonb", "what looks like an IBAN (iban)",
		"Good forany number of uses until it ends", "the first 2049 bytes of each body, masked", "GET, PROPFIND /orders/*", "GET, PROPFIND /customers", "password: {{pass}}", "whose certificate can be verified", p.req.Grant.Access.Digest(),
	} {
		if !strings.Contains(a.text(), want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	p.req.Grant.Access.Masking, p.req.Grant.Access.TLS, p.req.Grant.Access.MCP.Resources = store.Masking{}, "off", nil
	p.req.Grant.Access.HTTP.Upgrade, p.req.Grant.Access.Postgres.Everywhere = false, false
	text := p.get(t, "/approvals/"+p.req.ID).text()
	for want, is := range map[string]bool{"Hidden from itnothing": true, "what passes can be read on the way": true, "Resourcesnone": true, "upgraded": false, "may go without": false} {
		if strings.Contains(text, want) != is {
			t.Errorf("the page says %q: %v", want, !is)
		}
	}
	p.req.OneCall = true
	if text := p.get(t, "/approvals/"+p.req.ID).text(); !strings.Contains(text, "Good forone call") || strings.Contains(text, "any number of uses") {
		t.Error("the page does not say that it is for one call")
	}
	p.req.Grant.Access, p.req.OneCall = nil, false
	if text := p.get(t, "/approvals/"+p.req.ID).text(); strings.Contains(text, "the gateway lets through") {
		t.Error("a grant without access is shown one")
	}
}

func TestThePageShowsAllOfTheRequestAndItsRule(t *testing.T) {
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}})
	r := *p.req
	page := p.get(t, "/approvals/"+r.ID).text()
	said := map[string]string{ // what stands on the page in words of its own
		"Request.Status": "waiting", "Request.Decisions[0].Decision": "approved", "Request.Refused[0].Problem": "is on the requester’s side",
		"Request.Rule.Expires": "47 minutes", "Request.Rule.Collect": "11 minutes", "Request.Rule.Standing.For": "3 hours", "Request.Rule.Standing.Uses": "17 uses",
		"Request.URL": "", // the page itself
	}
	values("Request", reflect.ValueOf(r), func(path, want string) {
		if words, ok := said[path]; ok {
			want = words
		}
		if !strings.Contains(page, want) {
			t.Errorf("%s: the page does not show %q", path, want)
		}
	})
	for _, want := range []string{
		"2 people of group dba", "3 people of group security-officers", "from 07:45 to 21:15, Europe/Vienna, on Monday, Saturday",
		"Due from the requester and from whoever decides", "Each approval must be signed with one", "It may be decided in Slack too",
		"signed with a passkey", "for the whole run", "only claimed", "nothing proves it", "42 min left",
		"81 asked", "a person denied", "handed out", "and more than was counted",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

func TestWhatIsNotDueIsSaidToo(t *testing.T) {
	p := newPages(t, &judge{past: &approvals.Context{}})
	p.req.Rule = store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(time.Minute)}
	p.req.Grant.Revocable, p.req.SubjectProved, p.req.Decisions, p.req.Refused, p.req.Grant.Params = false, true, nil, nil, nil
	page := p.get(t, "/approvals/"+p.req.ID).text()
	for _, want := range []string{
		"1 person of group dba", "At any hour", "Due from nobody", "Not due. A decision may be signed", "not in Slack", "for this one credential",
		"it works until its time is over", "proved", "Nobody has decided yet",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

func TestTheRequestersTextDoesNotBreakOutAndIsWhole(t *testing.T) {
	long := strings.Repeat("W", 4096)
	for name, c := range map[string]struct{ text, read string }{
		"a script":         {`<script>alert(1)</script>`, `<script>alert(1)</script>`},
		"a closed quote":   {`"><img src=x onerror=alert(1)>' `, `"><img src=x onerror=alert(1)>' `},
		"a closed block":   {`</blockquote></dd></dl><h1>Approved</h1>`, `</blockquote></dd></dl><h1>Approved</h1>`},
		"a template":       {`{{.CSRF}} ${document.cookie}`, `{{.CSRF}} ${document.cookie}`},
		"an entity":        {`&lt;b&gt; &amp;amp;`, `&lt;b&gt; &amp;amp;`},
		"bidi overrides":   {"read \u202egnihtyreve eteled\u202c only", "read U+202Egnihtyreve eteledU+202C only"},
		"isolates":         {"a\u2066b\u2069c", "aU+2066bU+2069c"},
		"hidden text":      {"ok\u200b\u2060\ufeff\U000E0041\u3164", "okU+200BU+2060U+FEFFU+E0041U+3164"},
		"controls":         {"a\x1b[2Jb\x00c\rd", "aU+001B[2JbU+0000cU+000Dd"},
		"no UTF-8":         {"a\xffb", "abyte FFb"},
		"a separator":      {"a\u2028b", "aU+2028b"},
		"joined emoji":     {"👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"},
		"a long word":      {long, long},
		"4,096 characters": {strings.Repeat("wörd <b> & ", 373)[:4096], strings.Repeat("wörd <b> & ", 373)[:4096]},
		"line breaks":      {"one\n\n\ntwo\r\nthree", "one\n\n\ntwo\nthree"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPages(t, &judge{past: &approvals.Context{}})
			p.req.Reason, p.req.Subject, p.req.PolicyReasons = c.text, c.text, []string{c.text}
			p.req.Grant.Params = map[string]string{"name": c.text}
			p.req.Decisions[0].Reason = c.text
			a := p.get(t, "/approvals/"+p.req.ID)
			if got := strings.Count(a.text(), c.read); got < 6 { // reason, subject twice, policy, param, decision
				t.Errorf("the text stands %d times on the page, want 6", got)
			}
			if n := len(a.find("script")); n != 1 {
				t.Errorf("%d scripts on the page, want ours alone", n)
			}
			if len(a.find("img")) > 0 || len(a.find("h1")) != 1 {
				t.Error("the text became elements of the page")
			}
			for n := range a.doc.Descendants() {
				if n.Type == xhtml.TextNode && c.read != "" && strings.Contains(n.Data, c.read) && n.Parent.Data != "bdi" && n.Parent.Data != "title" {
					t.Errorf("the text stands in <%s>, not isolated in <bdi>", n.Parent.Data)
				}
			}
			p.list = []approvals.Request{*p.req}
			if a := p.get(t, "/approvals"); len(a.find("script")) != 1 || len(a.find("img")) > 0 || len(a.find("h1")) != 1 {
				t.Error("the text became elements of the inbox")
			}
		})
	}
}

func TestTheInboxSaysHowMuchOfAReasonItLeavesOut(t *testing.T) {
	p := newPages(t, &judge{})
	p.req.Reason = strings.Repeat("ä", maxSaid) + "<i>" + strings.Repeat("ö", 100)
	p.list = []approvals.Request{*p.req}
	page := p.get(t, "/approvals").text()
	if !strings.Contains(page, strings.Repeat("ä", maxSaid)) || strings.Contains(page, "ö") || !strings.Contains(page, "103 more characters on its page") {
		t.Errorf("the reason is not cut where it says:\n%s", page)
	}
}

func TestTheInboxShowsWhatARequestIs(t *testing.T) {
	p := newPages(t, &judge{})
	p.list, p.next = []approvals.Request{*p.req}, "90801"
	a := p.get(t, "/approvals?state=mine")
	page := a.text()
	for _, want := range []string{p.req.Scope, p.req.Target, p.req.Orchestrator, p.req.Subject, "only claimed", p.req.Run, p.req.Step, "OPS-1234", "1 of 2 dba", "0 of 3 security-officers", "42 min left", "critical", "For me"} {
		if !strings.Contains(page, want) {
			t.Errorf("the inbox does not show %q", want)
		}
	}
	links := map[string]bool{}
	for _, n := range a.find("a") {
		links[attr(n, "href")] = true
	}
	for _, want := range []string{"/approvals/" + p.req.ID, "/approvals?state=mine&cursor=90801", "/approvals?state=decided", "/approvals?state=all"} {
		if !links[want] {
			t.Errorf("no link to %s", want)
		}
	}
	p.list, p.next = nil, ""
	for _, tab := range tabs {
		if page := p.get(t, "/approvals?state="+tab.state).text(); !strings.Contains(page, tab.empty) || !strings.Contains(page, tab.text) {
			t.Errorf("the empty list of %q does not say so", tab.state)
		}
	}
}

func TestEveryPageForbidsWhatItDoesNotNeed(t *testing.T) {
	p := newPages(t, &judge{past: past()}, func(c *HTMLConfig) { c.Slack = &accounts{} })
	for _, target := range []string{"/approvals", "/approvals/" + p.req.ID, "/passkeys", "/slack/link", "/nowhere"} {
		a := p.get(t, target)
		csp := a.Header.Get("Content-Security-Policy")
		directives := map[string]string{}
		for d := range strings.SplitSeq(csp, ";") {
			name, value, _ := strings.Cut(strings.TrimSpace(d), " ")
			directives[name] = value
		}
		if strings.Contains(csp, "unsafe") || strings.Contains(csp, "*") || strings.Contains(csp, "http") {
			t.Errorf("%s: the policy allows too much: %s", target, csp)
		}
		for name, want := range map[string]string{"default-src": "'none'", "style-src": "'self'", "script-src": "'self'", "connect-src": "'self'", "img-src": "'self'",
			"form-action": "'self'", "base-uri": "'none'", "frame-ancestors": "'none'"} {
			if directives[name] != want {
				t.Errorf("%s: %s is %q, want %q", target, name, directives[name], want)
			}
		}
		for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "same-origin", "X-Frame-Options": "DENY",
			"Cross-Origin-Opener-Policy": "same-origin", "Content-Type": "text/html; charset=utf-8"} {
			if got := a.Header.Get(name); got != want {
				t.Errorf("%s: %s is %q, want %q", target, name, got, want)
			}
		}
		for n := range a.doc.Descendants() {
			if n.Type != xhtml.ElementNode {
				continue
			}
			for _, at := range n.Attr {
				if at.Key == "style" || strings.HasPrefix(at.Key, "on") {
					t.Errorf("%s: <%s> has an inline %s", target, n.Data, at.Key)
				}
				if (at.Key == "src" || at.Key == "href" || at.Key == "action") && !strings.HasPrefix(at.Val, "/") && !strings.HasPrefix(at.Val, "#") {
					t.Errorf("%s: <%s> leads elsewhere: %s", target, n.Data, at.Val)
				}
			}
			if n.Data == "style" || n.Data == "script" && n.FirstChild != nil {
				t.Errorf("%s: an inline <%s>", target, n.Data)
			}
		}
	}
}

func TestEveryFormPostsItsSessionsToken(t *testing.T) {
	waiting := own(false)
	waiting.Person, waiting.ID = "user:bob", "0192f1c2-bbbb-7000-8000-000000000001"
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}}, func(c *HTMLConfig) {
		c.Slack = &accounts{pending: &slack.Account{Team: "T1", User: "U1"}, linked: &slack.Account{Team: "T1", User: "U2"}}
	})
	p.keys = []approvals.Passkey{own(true), waiting}
	for target, want := range map[string]int{"/approvals": 1, "/approvals/" + p.req.ID: 2, "/passkeys": 5, "/slack/link": 4} {
		forms := p.get(t, target).find("form")
		if len(forms) != want {
			t.Errorf("%s has %d forms, want %d", target, len(forms), want)
		}
		for _, f := range forms {
			token := false
			for n := range f.Descendants() {
				if n.Data == "input" && attr(n, "name") == "csrf" && attr(n, "value") == csrfToken {
					token = true
				}
			}
			if !token || attr(f, "method") != "post" {
				t.Errorf("%s: the form to %s: method %q, token %v", target, attr(f, "action"), attr(f, "method"), token)
			}
		}
	}
}

// submit makes of a form what a browser without scripts sends when its button
// with that value is pressed.
func submit(t *testing.T, a *answer, action, button string) url.Values {
	t.Helper()
	for _, f := range a.find("form") {
		if attr(f, "action") != action {
			continue
		}
		sent := url.Values{}
		pressed := false
		for n := range f.Descendants() {
			name := attr(n, "name")
			switch {
			case n.Type != xhtml.ElementNode || has(n, "disabled"):
			case n.Data == "button" && attr(n, "value") == button:
				pressed = true
				sent.Add(name, button)
			case n.Data == "input" && (attr(n, "type") != "checkbox" || has(n, "checked")) && name != "":
				sent.Add(name, attr(n, "value"))
			case n.Data == "textarea":
				text := ""
				if n.FirstChild != nil {
					text = n.FirstChild.Data
				}
				sent.Add(name, text)
			}
		}
		if pressed {
			return sent
		}
	}
	t.Fatalf("no form to %s with a button %q that can be pressed", action, button)
	return nil
}

func TestWithoutAScriptTheFormDecides(t *testing.T) {
	for _, decision := range []string{"approve", "deny"} {
		p := newPages(t, &judge{past: past()})
		p.req.Rule.Passkey, p.req.Rule.Standing = false, nil
		page := "/approvals/" + p.req.ID
		sent := submit(t, p.get(t, page), page+"/decision", decision)
		sent.Set("reason", "Checked.")
		a := p.do(t, http.MethodPost, page+"/decision", sent)
		if want := (url.Values{"csrf": {csrfToken}, "decision": {decision}, "reason": {"Checked."}}); !reflect.DeepEqual(p.got, want) {
			t.Errorf("the form sent %v, want %v", p.got, want)
		}
		if a.StatusCode != http.StatusSeeOther || a.Header.Get("Location") != page+"?decided" {
			t.Errorf("answered %d to %q", a.StatusCode, a.Header.Get("Location"))
		}
	}
}

func TestTheNoticeOfADecisionIsReadFromTheRecord(t *testing.T) {
	p := newPages(t, &judge{past: past()})
	target := "/approvals/" + p.req.ID + "?decided"
	if page := p.get(t, target).text(); strings.Contains(page, "is on record, as entry") {
		t.Error("a link makes the page say that something was decided")
	}
	p.req.Decisions = append(p.req.Decisions, approvals.Decided{Person: alice.Name, Decision: store.Refuse, At: noon, Via: "page", Index: 90900})
	if page := p.get(t, target).text(); !strings.Contains(page, "Your denial is on record, as entry 90900.") {
		t.Error("the page does not say that the denial is on record")
	}
}

func TestADecisionThatDoesNotCountIsExplainedAndItsReasonKept(t *testing.T) {
	for code, c := range map[store.OrderCode]struct {
		status int
		say    string
	}{
		store.OrderSelf:     {403, "You are on the requester’s side"},
		store.OrderApprover: {403, "in none of the groups"},
		store.OrderDecided:  {409, "Each person counts once"},
		store.OrderHours:    {403, "not taken at this hour"},
		store.OrderPasskey:  {403, "must be signed with your passkey"},
		store.OrderReason:   {422, "a reason is due"},
		store.OrderNotOpen:  {409, "not open any more"},
	} {
		p := newPages(t, &judge{past: past()})
		p.err = &store.OrderError{Code: code, Message: "m"}
		a := p.do(t, http.MethodPost, "/approvals/"+p.req.ID+"/decision", url.Values{"decision": {"approve"}, "reason": {"What I <typed>"}})
		if page := a.text(); a.StatusCode != c.status || !strings.Contains(page, "This did not count.") || !strings.Contains(page, c.say) || !strings.Contains(page, "What I <typed>") {
			t.Errorf("%s: answered %d:\n%s", code, a.StatusCode, page)
		}
	}
	p := newPages(t, &judge{past: past()})
	p.err = fmt.Errorf("%w: key 3 is unknown", approvals.ErrSignature)
	if a := p.do(t, http.MethodPost, "/approvals/x/decision", url.Values{}); a.StatusCode != 403 || !strings.Contains(a.text(), "signature does not count") {
		t.Errorf("a bad signature: %d", a.StatusCode)
	}
	p.err = fmt.Errorf("appending: %w", store.ErrUnavailable)
	if a := p.do(t, http.MethodPost, "/approvals/x/decision", url.Values{}); a.StatusCode != 503 || !strings.Contains(a.text(), "The ledger does not answer") {
		t.Errorf("no ledger: %d", a.StatusCode)
	}
	p.err, p.req = approvals.ErrNotFound, nil
	if a := p.do(t, http.MethodPost, "/approvals/x/decision", url.Values{}); a.StatusCode != 404 || !strings.Contains(a.text(), "There is no such approval or passkey.") {
		t.Errorf("no request: %d", a.StatusCode)
	}
}

func TestWhoMayNotDecideIsToldWhy(t *testing.T) {
	order := func(c store.OrderCode) error { return &store.OrderError{Code: c, Message: "m"} }
	for name, c := range map[string]struct {
		status        store.Status
		approve, deny error
		buttons       string
		say           string
	}{
		"may":                {store.StatusPending, nil, nil, "approve deny", "Your decision"},
		"own request":        {store.StatusPending, order(store.OrderSelf), order(store.OrderSelf), "", "You are on the requester’s side"},
		"in no group":        {store.StatusPending, order(store.OrderApprover), order(store.OrderApprover), "", "in none of the groups"},
		"approved already":   {store.StatusPending, order(store.OrderDecided), nil, "deny", "You have approved this already. Each person counts once. You may still deny it."},
		"at another hour":    {store.StatusPending, order(store.OrderHours), nil, "deny", "from 07:45 to 21:15, Europe/Vienna, on Monday, Saturday. You may still deny it."},
		"expired":            {store.StatusExpired, order(store.OrderNotOpen), order(store.OrderNotOpen), "", "Its time is over"},
		"denied":             {store.StatusDenied, order(store.OrderNotOpen), order(store.OrderNotOpen), "", "it was denied"},
		"issued":             {store.StatusIssued, order(store.OrderNotOpen), order(store.OrderNotOpen), "", "enough people have approved"},
		"withdrawn":          {store.StatusWithdrawn, order(store.OrderNotOpen), order(store.OrderNotOpen), "", "has taken it back"},
		"void":               {store.StatusVoid, order(store.OrderNotOpen), order(store.OrderNotOpen), "", "so it is void"},
		"an unknown refusal": {store.StatusPending, errors.New("x"), errors.New("x"), "", "It cannot be decided now"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPages(t, &judge{approve: c.approve, deny: c.deny, past: past(), keys: []approvals.Passkey{own(true)}})
			p.req.Status = c.status
			a := p.get(t, "/approvals/"+p.req.ID)
			var buttons []string
			for _, b := range a.find("button") {
				if attr(b, "name") == "decision" {
					buttons = append(buttons, attr(b, "value"))
				}
			}
			if got := strings.Join(buttons, " "); got != c.buttons {
				t.Errorf("buttons %q, want %q", got, c.buttons)
			}
			if !strings.Contains(a.text(), c.say) {
				t.Errorf("the page does not say %q", c.say)
			}
		})
	}
}

func TestWhereAPasskeyIsDueNobodyApprovesWithoutOne(t *testing.T) {
	revoked := own(true)
	revoked.Revoked = noon.Add(-time.Hour)
	for name, c := range map[string]struct {
		keys []approvals.Passkey
		can  bool
	}{"none": {nil, false}, "one that waits": {[]approvals.Passkey{own(false)}, false}, "a revoked one": {[]approvals.Passkey{revoked}, false}, "an active one": {[]approvals.Passkey{own(true)}, true}} {
		p := newPages(t, &judge{past: past(), keys: c.keys})
		a := p.get(t, "/approvals/"+p.req.ID)
		for _, b := range a.find("button") {
			if attr(b, "value") == "approve" && has(b, "disabled") == c.can {
				t.Errorf("%s: Approve disabled: %v", name, has(b, "disabled"))
			}
			if attr(b, "value") == "deny" && has(b, "disabled") {
				t.Errorf("%s: a denial is hindered", name)
			}
		}
		if say := strings.Contains(a.text(), "you have none that is active"); say == c.can {
			t.Errorf("%s: says that there is none: %v", name, say)
		}
	}
}

func TestAnApprovalForTheWholeRunIsOfferedWithinItsLimits(t *testing.T) {
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}})
	a := p.get(t, "/approvals/"+p.req.ID)
	ends := 0
	for _, o := range a.find("option") {
		end, err := time.Parse(time.RFC3339, attr(o, "value"))
		if err != nil || !end.After(noon) || end.After(noon.Add(time.Duration(p.req.Rule.Standing.For))) {
			t.Errorf("offers the end %q: %v", attr(o, "value"), err)
		}
		ends++
	}
	if ends == 0 {
		t.Error("offers no end")
	}
	for _, n := range a.find("input") {
		switch attr(n, "name") {
		case "standing_uses":
			if attr(n, "max") != "17" {
				t.Errorf("offers %s uses", attr(n, "max"))
			}
		case "standing":
			if has(n, "checked") {
				t.Error("an approval for the whole run is the default")
			}
		}
	}
	p.req.Rule.Standing = nil
	if strings.Contains(p.get(t, "/approvals/"+p.req.ID).body, "standing") {
		t.Error("offers what the rule does not allow")
	}
}

func TestWhatCannotBeReadIsNotPassedOffAsNothing(t *testing.T) {
	p := newPages(t, &judge{pastErr: errors.New("down")})
	if a := p.get(t, "/approvals/"+p.req.ID); a.StatusCode != 200 || !strings.Contains(a.text(), "cannot be read right now") {
		t.Errorf("what came before: %d", a.StatusCode)
	}
	p = newPages(t, &judge{past: past(), keysErr: store.ErrUnavailable})
	if a := p.get(t, "/approvals/"+p.req.ID); a.StatusCode != 503 {
		t.Errorf("without the passkeys the page answers %d", a.StatusCode)
	}
}

func TestThePasskeyPageNamesWhoseKeyWaitsForASecondPerson(t *testing.T) {
	waiting, revoked := own(false), own(true)
	waiting.Person, waiting.ID, waiting.Credential, waiting.Label = "user:bob", "0192f1c2-bbbb-7000-8000-000000000002", "credential-of-bob", "Bob’s phone"
	waiting.ActiveFrom = noon.Add(20 * time.Hour)
	revoked.Revoked, revoked.ID = noon.Add(-time.Hour), "0192f1c2-cccc-7000-8000-000000000003"
	p := newPages(t, &judge{keys: []approvals.Passkey{own(true), waiting, revoked}}, func(c *HTMLConfig) { c.ActivateAfter = 24 * time.Hour })
	p.keys = []approvals.Passkey{own(true), waiting, revoked}
	a := p.get(t, "/passkeys")
	page := a.text()
	for _, want := range []string{"bob", "Bob’s phone", "credential-of-bob", "21 Nov 2026, 12:00:00 UTC", "waiting for a second person", "24 Nov 2026, 08:00:00 UTC", "active", "revoked", "1 day after it was enrolled"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	actions := map[string]bool{}
	for _, f := range a.find("form") {
		actions[attr(f, "action")] = true
	}
	for action, want := range map[string]bool{
		"/passkeys/" + own(true).ID + "/revoke": true, "/passkeys/" + waiting.ID + "/activate": true, "/passkeys/" + own(true).ID + "/activate": false,
		"/passkeys/" + revoked.ID + "/revoke": false, "/passkeys/" + revoked.ID + "/activate": false,
	} {
		if actions[action] != want {
			t.Errorf("a form to %s: %v, want %v", action, actions[action], want)
		}
	}
	for groups, want := range map[string][2]bool{"dba": {true, true}, "hr": {false, false}} {
		p := newPages(t, &judge{keys: []approvals.Passkey{waiting}}, func(c *HTMLConfig) { c.PasskeyAdmins = []string{groups} })
		p.keys = []approvals.Passkey{waiting}
		body := p.get(t, "/passkeys").body
		if got := [2]bool{strings.Contains(body, waiting.ID+"/activate"), strings.Contains(body, waiting.ID+"/revoke")}; got != want {
			t.Errorf("where %s looks after passkeys, activate and revoke are offered: %v, want %v", groups, got, want)
		}
	}
	w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/passkeys/x/activate", nil)
	p.PasskeyChanged(w, r, alice, approvals.ErrPasskeyPerson)
	if w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), "This passkey is not yours to activate") {
		t.Errorf("somebody who may not activate it gets %d", w.Code)
	}
}

// accounts is a person's Slack account.
type accounts struct {
	pending, linked *slack.Account
	did             []string
	err             error
}

func (a *accounts) BeginLink(approvals.Person) (string, time.Time, error) {
	return "ABCD-EFGH-IJKL-MNOP", noon.Add(10 * time.Minute), a.err
}

func (a *accounts) PendingLink(approvals.Person) (slack.Account, bool) {
	if a.pending == nil {
		return slack.Account{}, false
	}
	return *a.pending, true
}

func (a *accounts) ConfirmLink(_ context.Context, p approvals.Person, team, user string) error {
	a.did = append(a.did, "confirm "+p.Name+" "+team+"/"+user)
	return a.err
}

func (a *accounts) Linked(approvals.Person) (slack.Account, bool) {
	if a.linked == nil {
		return slack.Account{}, false
	}
	return *a.linked, true
}

func (a *accounts) Unlink(_ context.Context, p approvals.Person) error {
	a.did = append(a.did, "unlink "+p.Name)
	return a.err
}

func TestASlackAccountIsLinkedByConfirmingWhoseItIsAndByNoLink(t *testing.T) {
	acc := &accounts{pending: &slack.Account{Team: "T0COUNTER", User: "U0ALICE", Name: "alice <b>"}}
	p := newPages(t, &judge{}, func(c *HTMLConfig) { c.Slack = acc })
	a := p.get(t, "/slack/link?team=T0COUNTER&user=U0ALICE&do=confirm")
	if len(acc.did) > 0 {
		t.Fatalf("following a link did %v", acc.did)
	}
	for _, want := range []string{"T0COUNTER", "U0ALICE", "alice <b>", "Is this you?"} {
		if !strings.Contains(a.text(), want) {
			t.Errorf("the page does not name %q", want)
		}
	}
	if a := p.do(t, http.MethodPost, "/slack/link?do=confirm&team=T1&user=U1", url.Values{"csrf": {csrfToken}}); a.StatusCode != 400 || len(acc.did) > 0 {
		t.Errorf("a query stood in for the form: %d, %v", a.StatusCode, acc.did)
	}
	p.do(t, http.MethodPost, "/slack/link", submit(t, a, "/slack/link", "confirm"))
	if want := []string{"confirm user:alice T0COUNTER/U0ALICE"}; !reflect.DeepEqual(acc.did, want) {
		t.Errorf("did %v, want %v", acc.did, want)
	}
	acc.err = slack.ErrTaken
	if a := p.do(t, http.MethodPost, "/slack/link", submit(t, a, "/slack/link", "confirm")); a.StatusCode != 409 || !strings.Contains(a.text(), "speaks for another person") {
		t.Errorf("another's account: %d", a.StatusCode)
	}
	acc.err, acc.pending = nil, nil
	a = p.get(t, "/slack/link")
	if a := p.do(t, http.MethodPost, "/slack/link", submit(t, a, "/slack/link", "begin")); !strings.Contains(a.text(), "ABCD-EFGH-IJKL-MNOP") {
		t.Error("the code is not shown")
	}
	without := newPages(t, &judge{})
	if strings.Contains(without.get(t, "/approvals").body, "/slack/link") || without.get(t, "/slack/link").StatusCode != 404 {
		t.Error("without Slack there is something to link")
	}
}

func TestOnlyAnHTTPSAddressLeadsBackToSlack(t *testing.T) {
	for address, want := range map[string]bool{"https://example.slack.com/archives/C1/p2": true, "javascript:alert(1)": false, "http://example.slack.com/": false, "": false} {
		p := newPages(t, &judge{past: past()}, func(c *HTMLConfig) {
			c.Message = func(context.Context, string) string { return address }
		})
		if got := strings.Contains(p.get(t, "/approvals/"+p.req.ID).body, "Back to the message"); got != want {
			t.Errorf("%q: a link: %v, want %v", address, got, want)
		}
	}
}

func TestAPageIsReadableByScreenReaderAndKeyboard(t *testing.T) {
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}}, func(c *HTMLConfig) { c.Slack = &accounts{} })
	p.list, p.keys = []approvals.Request{*p.req}, []approvals.Passkey{own(true)}
	for _, target := range []string{"/approvals", "/approvals/" + p.req.ID, "/passkeys", "/slack/link", "/nowhere"} {
		a := p.get(t, target)
		ids := map[string]int{}
		labels := map[string]bool{}
		for n := range a.doc.Descendants() {
			if n.Type == xhtml.ElementNode {
				if id := attr(n, "id"); id != "" {
					ids[id]++
				}
				if n.Data == "label" {
					labels[attr(n, "for")] = true
				}
			}
		}
		for id, n := range ids {
			if n > 1 {
				t.Errorf("%s: id %s stands %d times", target, id, n)
			}
		}
		for _, landmark := range []string{"header", "main", "footer"} {
			if len(a.find(landmark)) != 1 {
				t.Errorf("%s: not one <%s>", target, landmark)
			}
		}
		if h := a.find("html"); attr(h[0], "lang") != "en" {
			t.Errorf("%s: no language", target)
		}
		if first := a.find("a"); attr(first[0], "href") != "#main" {
			t.Errorf("%s: the first link does not skip to the content", target)
		}
		for n := range a.doc.Descendants() {
			if n.Type != xhtml.ElementNode {
				continue
			}
			for _, key := range []string{"aria-labelledby", "aria-describedby"} {
				for _, id := range strings.Fields(attr(n, key)) {
					if ids[id] == 0 {
						t.Errorf("%s: %s=%q names nothing", target, key, id)
					}
				}
			}
			switch n.Data {
			case "textarea", "input", "select":
				wrapped := n.Parent.Data == "label"
				if attr(n, "type") != "hidden" && !wrapped && !labels[attr(n, "id")] {
					t.Errorf("%s: field %s has no label", target, attr(n, "name"))
				}
			case "table":
				if n.FirstChild == nil || !strings.Contains(render(n), "<caption") {
					t.Errorf("%s: a table without caption", target)
				}
			case "nav":
				if attr(n, "aria-label") == "" {
					t.Errorf("%s: a navigation without a name", target)
				}
			}
		}
	}
}

func render(n *xhtml.Node) string {
	var b strings.Builder
	_ = xhtml.Render(&b, n)
	return b.String()
}

// Contrast by WCAG 2.2, 1.4.3: 4.5 for text; 1.4.11: 3 for edges of fields and
// the focus.
func TestColoursContrastInLightAndDark(t *testing.T) {
	css, err := os.ReadFile("../page/static/page.css")
	if err != nil {
		t.Fatal(err)
	}
	light, dark, ok := strings.Cut(string(css), "@media (prefers-color-scheme: dark)")
	if !ok {
		t.Fatal("no dark colours")
	}
	dark, _, _ = strings.Cut(dark, "\n}\n")
	colour := regexp.MustCompile(`--([a-z-]+): #([0-9a-f]{6});`)
	for name, block := range map[string]string{"light": light, "dark": dark} {
		c := map[string]float64{}
		for _, m := range colour.FindAllStringSubmatch(block, -1) {
			c[m[1]] = luminance(t, m[2])
		}
		for _, pair := range []struct {
			front, back string
			least       float64
		}{
			{"text", "ground", 4.5}, {"text", "surface", 4.5}, {"text", "sunken", 4.5}, {"quiet", "ground", 4.5}, {"quiet", "surface", 4.5}, {"quiet", "sunken", 4.5},
			{"accent", "ground", 4.5}, {"accent", "surface", 4.5}, {"accent", "accent-soft", 4.5}, {"accent-strong", "surface", 4.5},
			{"on-accent", "accent", 4.5}, {"on-accent", "accent-strong", 4.5}, {"danger", "surface", 4.5}, {"danger", "danger-soft", 4.5}, {"on-danger", "danger", 4.5},
			{"warn", "warn-soft", 4.5}, {"good", "good-soft", 4.5}, {"text", "accent-soft", 4.5}, {"text", "danger-soft", 4.5}, {"text", "warn-soft", 4.5}, {"text", "good-soft", 4.5},
			{"edge", "surface", 3}, {"edge", "sunken", 3}, {"focus", "ground", 3}, {"focus", "surface", 3}, {"good", "surface", 3}, {"warn", "surface", 3}, {"danger", "ground", 3},
		} {
			a, okA := c[pair.front]
			b, okB := c[pair.back]
			if !okA || !okB {
				t.Errorf("%s: no colour %s or %s", name, pair.front, pair.back)
				continue
			}
			if ratio := (math.Max(a, b) + .05) / (math.Min(a, b) + .05); ratio < pair.least {
				t.Errorf("%s: %s on %s has contrast %.2f, want %.1f", name, pair.front, pair.back, ratio, pair.least)
			}
		}
	}
}

func luminance(t *testing.T, hex string) float64 {
	t.Helper()
	n, err := strconv.ParseUint(hex, 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	part := func(shift uint) float64 {
		x := float64(n>>shift&0xff) / 255
		if x <= .04045 {
			return x / 12.92
		}
		return math.Pow((x+.055)/1.055, 2.4)
	}
	return .2126*part(16) + .7152*part(8) + .0722*part(0)
}

func TestTheTimeLeftIsSaidWithoutAScript(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "time is over", 0: "time is over", 59 * time.Second: "59 s left", 5*time.Minute + 7*time.Second: "5 min 7 s left",
		14 * time.Minute: "14 min left", 3*time.Hour + 5*time.Minute: "3 h 5 min left", 50 * time.Hour: "2 d 2 h left",
	} {
		if got := left(d); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}

func TestStaticFilesAreAskedForByTheirContent(t *testing.T) {
	p := newPages(t, &judge{})
	for name, media := range map[string]string{"page.css": "text/css; charset=utf-8", "approve.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"} {
		a := p.get(t, "/approvals/static/"+name)
		if a.StatusCode != 200 || a.Header.Get("Content-Type") != media || a.Header.Get("ETag") == "" {
			t.Errorf("%s: %d %s, ETag %s", name, a.StatusCode, a.Header.Get("Content-Type"), a.Header.Get("ETag"))
		}
		w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/approvals/static/"+name, nil)
		r.Header.Set("If-None-Match", a.Header.Get("ETag"))
		p.handler().ServeHTTP(w, r)
		if w.Code != http.StatusNotModified {
			t.Errorf("%s: asked for by its ETag: %d", name, w.Code)
		}
	}
	if a := p.get(t, "/approvals/static/page.go"); a.StatusCode != 404 {
		t.Errorf("a file that is not served: %d", a.StatusCode)
	}
}

func TestWhatTheScopeIsForComesFromTheCatalogueInForce(t *testing.T) {
	set, err := scopes.Parse("demo.yaml", scopes.Demo(nil), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	p := newPages(t, &judge{past: past()}, func(c *HTMLConfig) { c.Scopes = catalogue{set} })
	scope, ok := set.Scope(p.req.Scope)
	if !ok || scope.Description == "" {
		t.Fatalf("the demo catalogue has no description of %s", p.req.Scope)
	}
	if !strings.Contains(p.get(t, "/approvals/"+p.req.ID).text(), scope.Description) {
		t.Error("the page does not show it")
	}
}

// FuzzText checks that no text becomes an element or an entity, that nothing of
// it is lost, and that nothing unseen is left in it.
func FuzzText(f *testing.F) {
	for _, s := range []string{"", "plain", "<script>", `"'&`, "\u202e", "a\xff\xfeb", "\ufffd", "\r\n\r", "\U000E0041", strings.Repeat("x", 5000)} {
		f.Add(s)
	}
	mark := regexp.MustCompile(`<span class="unseen">(?:U\+([0-9A-F]{4,6})|byte ([0-9A-F]{2}))</span>`)
	f.Fuzz(func(t *testing.T, s string) {
		got := string(page.Text(s))
		back := mark.ReplaceAllStringFunc(got, func(m string) string {
			parts := mark.FindStringSubmatch(m)
			if parts[2] != "" {
				n, _ := strconv.ParseUint(parts[2], 16, 8)
				return string([]byte{byte(n)})
			}
			n, _ := strconv.ParseUint(parts[1], 16, 32)
			return string(rune(n))
		})
		rest := mark.ReplaceAllString(got, "")
		if strings.ContainsAny(rest, "<>\"'") {
			t.Errorf("%q has markup left: %q", s, got)
		}
		for _, r := range rest {
			if page.Unseen(r) {
				t.Errorf("%q has %U left", s, r)
			}
		}
		if want := strings.ReplaceAll(s, "\r\n", "\n"); html.UnescapeString(back) != want {
			t.Errorf("%q is read as %q", want, html.UnescapeString(back))
		}
	})
}

func TestManyRequestsOfOneRunForOneScopeAreFoldedAndEachHasItsPage(t *testing.T) {
	p := newPages(t, &judge{})
	for i := range 40 {
		r := *p.req
		r.ID = fmt.Sprintf("apr_many_%d", i)
		switch i {
		case 20:
			r.Run = "run-of-its-own"
		case 21:
			r.Status = store.StatusDenied // decided: not among those that wait
		}
		p.list = append(p.list, r)
	}
	a := p.get(t, "/approvals?state=all")
	if folded := a.find("details"); len(folded) != 1 || !strings.Contains(a.text(), "38 requests for") {
		t.Errorf("%d folds:\n%s", len(folded), a.text())
	}
	inside := 0
	links := map[string]bool{}
	for _, n := range a.find("a") {
		href := attr(n, "href")
		links[href] = true
		for up := n.Parent; up != nil; up = up.Parent {
			if up.Data == "details" && strings.HasPrefix(href, "/approvals/apr_many_") {
				inside++
			}
		}
	}
	if inside != 38 {
		t.Errorf("%d requests are folded", inside)
	}
	for i := range 40 {
		if !links[fmt.Sprintf("/approvals/apr_many_%d", i)] {
			t.Errorf("request %d has no link", i)
		}
	}
	for _, form := range a.find("form") {
		if strings.Contains(attr(form, "action"), "decision") {
			t.Error("something is decided without being looked at")
		}
	}
	// Few stand one by one.
	p.list = p.list[:5]
	if a := p.get(t, "/approvals?state=all"); len(a.find("details")) != 0 {
		t.Error("five are folded")
	}
}
