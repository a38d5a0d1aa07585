//lint:file-ignore SA1019 What the SDK deprecates is served, and so tested.

package mcp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/store"
)

// orders is an MCP server of the SDK's with something of everything.
type orders struct {
	*sdk.Server
	rec     func() *gatewaytest.Recorder
	reached atomic.Int64 // calls of tools
	cancels chan string  // tools whose context ended
	hold    chan struct{}
	free    func() // lets go of what waits for hold
}

type lookup struct {
	ID string `json:"id"`
}

type customer struct {
	ID    string `json:"id"`
	Email string `json:"email"`
}

func newOrders(t testing.TB, rec func() *gatewaytest.Recorder) *orders {
	o := &orders{rec: rec, cancels: make(chan string, 16), hold: make(chan struct{})}
	o.free = sync.OnceFunc(func() { close(o.hold) })
	o.Server = sdk.NewServer(&sdk.Implementation{Name: "orders", Version: "1"}, &sdk.ServerOptions{PageSize: 2,
		Instructions: "Orders and refunds.",
		CompletionHandler: func(context.Context, *sdk.CompleteRequest) (*sdk.CompleteResult, error) {
			return &sdk.CompleteResult{Completion: sdk.CompletionResultDetails{Values: []string{"a@example.com", "b"}}}, nil
		},
		SubscribeHandler:   func(context.Context, *sdk.SubscribeRequest) error { return nil },
		UnsubscribeHandler: func(context.Context, *sdk.UnsubscribeRequest) error { return nil },
	})
	// Whatever reaches this server is on record by then.
	on := func(use, statement string) {
		o.reached.Add(1)
		for _, u := range o.rec().Uses() {
			if u.Use == use && u.Statement == statement {
				return
			}
		}
		t.Errorf("%s %s reached the server and is not on record", use, statement)
	}
	sdk.AddTool(o.Server, &sdk.Tool{Name: "lookup_order"}, func(_ context.Context, _ *sdk.CallToolRequest, in lookup) (*sdk.CallToolResult, customer, error) {
		on("tools/call lookup_order", `{"id":"`+in.ID+`"}`)
		return nil, customer{in.ID, in.ID + "@example.com"}, nil
	})
	o.AddTool(&sdk.Tool{Name: "lookup_region", InputSchema: json.RawMessage(`{"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"}}}`)}, func(_ context.Context, req *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: fmt.Sprint(string(req.Params.Arguments), req.Extra.Header["Mcp-Param-Region"])}}}, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "refund_order"}, func(_ context.Context, _ *sdk.CallToolRequest, in lookup) (*sdk.CallToolResult, any, error) {
		on("tools/call refund_order", `{"id":"`+in.ID+`"}`)
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: "refunded"}}}, nil, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "drop_orders"}, func(context.Context, *sdk.CallToolRequest, struct{}) (*sdk.CallToolResult, any, error) {
		t.Error("a tool that no rule allows was called")
		return nil, nil, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "fail"}, func(context.Context, *sdk.CallToolRequest, struct{}) (*sdk.CallToolResult, any, error) {
		return nil, nil, errors.New("no such customer: c@example.com, key " + apiKey)
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "count"}, func(ctx context.Context, req *sdk.CallToolRequest, _ struct{}) (*sdk.CallToolResult, any, error) {
		for i := range 3 {
			_ = req.Session.NotifyProgress(ctx, &sdk.ProgressNotificationParams{ProgressToken: req.Params.GetProgressToken(), Progress: float64(i + 1), Total: 3, Message: "d@example.com"})
		}
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: "3"}}}, nil, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "hang"}, func(ctx context.Context, req *sdk.CallToolRequest, _ struct{}) (*sdk.CallToolResult, any, error) {
		o.reached.Add(1)
		select {
		case <-ctx.Done():
			o.cancels <- "hang"
			return nil, nil, ctx.Err()
		case <-o.hold:
			return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: "held"}}}, nil, nil
		}
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "elicit"}, func(ctx context.Context, req *sdk.CallToolRequest, _ struct{}) (*sdk.CallToolResult, any, error) {
		_, err := req.Session.ListRoots(ctx, nil)
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: fmt.Sprint("roots: ", err)}}}, nil, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "picture"}, func(context.Context, *sdk.CallToolRequest, struct{}) (*sdk.CallToolResult, any, error) {
		return &sdk.CallToolResult{Content: []sdk.Content{
			&sdk.ImageContent{MIMEType: "image/png", Data: []byte("e@example.com")},
			&sdk.ResourceLink{URI: "orders://f@example.com", Name: "link"},
			&sdk.EmbeddedResource{Resource: &sdk.ResourceContents{URI: "orders://1", MIMEType: "text/plain", Text: "g@example.com"}},
			&sdk.EmbeddedResource{Resource: &sdk.ResourceContents{URI: "orders://1", Blob: []byte("h@example.com")}},
		}}, nil, nil
	})
	sdk.AddTool(o.Server, &sdk.Tool{Name: "resume"}, func(ctx context.Context, req *sdk.CallToolRequest, _ struct{}) (*sdk.CallToolResult, any, error) {
		req.Extra.CloseSSEStream(sdk.CloseSSEStreamArgs{RetryAfter: 150 * time.Millisecond})
		<-o.hold
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: "after all"}}}, nil, nil
	})
	read := func(_ context.Context, req *sdk.ReadResourceRequest) (*sdk.ReadResourceResult, error) {
		return &sdk.ReadResourceResult{Contents: []*sdk.ResourceContents{{URI: req.Params.URI, MIMEType: "application/json", Text: `{"email":"i@example.com","n":1}`}}}, nil
	}
	o.AddResource(&sdk.Resource{URI: "orders://1", Name: "order 1"}, read)
	o.AddResource(&sdk.Resource{URI: "secrets://1", Name: "secret"}, read)
	o.AddResourceTemplate(&sdk.ResourceTemplate{URITemplate: "orders://{id}", Name: "an order"}, read)
	o.AddResourceTemplate(&sdk.ResourceTemplate{URITemplate: "secrets://{id}", Name: "a secret"}, read)
	prompt := func(_ context.Context, req *sdk.GetPromptRequest) (*sdk.GetPromptResult, error) {
		return &sdk.GetPromptResult{Messages: []*sdk.PromptMessage{{Role: "user", Content: &sdk.TextContent{Text: "write to j@example.com about " + req.Params.Arguments["order"]}}}}, nil
	}
	o.AddPrompt(&sdk.Prompt{Name: "apologise"}, prompt)
	o.AddPrompt(&sdk.Prompt{Name: "threaten"}, prompt)
	return o
}

func (o *orders) handler(opts *sdk.StreamableHTTPOptions) http.Handler {
	return sdk.NewStreamableHTTPHandler(func(*http.Request) *sdk.Server { return o.Server }, opts)
}

func access(rules ...store.MaskRule) *store.Access {
	return &store.Access{
		MCP: &store.MCPAccess{
			Tools: []store.MCPTool{{Name: "lookup_*"}, {Name: "refund_order", Scope: "orders-mcp:refund"}, {Name: "fail"}, {Name: "count"}, {Name: "hang"},
				{Name: "elicit"}, {Name: "picture"}, {Name: "resume"}},
			Resources: []string{"orders://*"}, Prompts: []string{"apol*"}, Sample: 200,
		},
		Masking: store.Masking{Rules: rules},
	}
}

// setups are the ways in which a server of the SDK speaks.
var setups = map[string]struct {
	version string
	opts    *sdk.StreamableHTTPOptions
}{
	"2025-06-18, streams":          {"2025-06-18", nil},
	"2025-11-25, JSON":             {"2025-11-25", &sdk.StreamableHTTPOptions{JSONResponse: true}},
	"2026-07-28, streams":          {"", &sdk.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true}},
	"the newest meets a stateful":  {"", nil},
	"2025-06-18, without sessions": {"2025-06-18", &sdk.StreamableHTTPOptions{Stateless: true}},
}

func newOrdersPath(t testing.TB, opts *sdk.StreamableHTTPOptions, a *store.Access, change ...func(*Config)) (*path, *orders) {
	var p *path
	o := newOrders(t, func() *gatewaytest.Recorder { return p.rec })
	p = newPath(t, o.handler(opts), a, change...)
	t.Cleanup(o.free)
	return p, o
}

func TestAClientAndAServerOfTheSDKWorkThroughTheGateway(t *testing.T) {
	for name, setup := range setups {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, _ := newOrdersPath(t, setup.opts, access(store.MaskRule{Field: "email"}))
			s, b := p.connect(setup.version, nil)
			ctx := t.Context()

			var tools []string
			for tool, err := range s.Tools(ctx, nil) {
				ok(t, err)
				tools = append(tools, tool.Name)
			}
			slices.Sort(tools)
			if want := []string{"count", "elicit", "fail", "hang", "lookup_order", "lookup_region", "picture", "refund_order", "resume"}; !slices.Equal(tools, want) {
				t.Errorf("tools %q, want %q", tools, want)
			}
			res, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "lookup_order", Arguments: lookup{"17"}})
			ok(t, err)
			if got := text(t, res); got != `{"email":"[masked]","id":"17"}` && got != `{"id":"17","email":"[masked]"}` {
				t.Errorf("text %s", got)
			}
			if got := fmt.Sprint(res.StructuredContent); got != "map[email:[masked] id:17]" {
				t.Errorf("structured content %s", got)
			}
			_, err = s.CallTool(ctx, &sdk.CallToolParams{Name: "drop_orders"})
			var rpc *jsonrpc.Error
			if !errors.As(err, &rpc) || rpc.Code != codeParams || !strings.Contains(rpc.Message, "orders-mcp:read allows no such tool") {
				t.Errorf("another tool: %v", err)
			}
			if !p.refused("tools/call drop_orders") {
				t.Error("the refusal is not on record")
			}

			var uris []string
			for r, err := range s.Resources(ctx, nil) {
				ok(t, err)
				uris = append(uris, r.URI)
			}
			for r, err := range s.ResourceTemplates(ctx, nil) {
				ok(t, err)
				uris = append(uris, r.URITemplate)
			}
			if !slices.Equal(uris, []string{"orders://1", "orders://{id}"}) {
				t.Errorf("resources %q", uris)
			}
			content, err := s.ReadResource(ctx, &sdk.ReadResourceParams{URI: "orders://1"})
			ok(t, err)
			if c := content.Contents[0]; c.URI != "orders://1" || c.Text != `{"email":"[masked]","n":1}` {
				t.Errorf("%+v", c)
			}
			if _, err := s.ReadResource(ctx, &sdk.ReadResourceParams{URI: "secrets://1"}); err == nil {
				t.Error("a resource that no rule allows was read")
			}
			var prompts []string
			for r, err := range s.Prompts(ctx, nil) {
				ok(t, err)
				prompts = append(prompts, r.Name)
			}
			if !slices.Equal(prompts, []string{"apologise"}) {
				t.Errorf("prompts %q", prompts)
			}
			got, err := s.GetPrompt(ctx, &sdk.GetPromptParams{Name: "apologise", Arguments: map[string]string{"order": "17"}})
			ok(t, err)
			if c := got.Messages[0].Content.(*sdk.TextContent); c.Text != "[masked]" {
				t.Errorf("text that no rule by name can judge: %q", c.Text)
			}
			if _, err := s.GetPrompt(ctx, &sdk.GetPromptParams{Name: "threaten"}); err == nil {
				t.Error("a prompt that no rule allows was got")
			}
			done, err := s.Complete(ctx, &sdk.CompleteParams{Ref: &sdk.CompleteReference{Type: "ref/prompt", Name: "apologise"}, Argument: sdk.CompleteParamsArgument{Name: "order", Value: "a"}})
			ok(t, err)
			if !slices.Equal(done.Completion.Values, []string{"[masked]", "[masked]"}) {
				t.Errorf("%q", done.Completion.Values)
			}
			failed, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "fail"})
			ok(t, err)
			if !failed.IsError {
				t.Error("a tool's error is none")
			}
			picture, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "picture"})
			ok(t, err)
			if len(picture.Content) != 4 {
				t.Errorf("%d blocks of content", len(picture.Content))
			}
			if seen := b.seen(); strings.Contains(seen, "@example.com") || strings.Contains(seen, apiKey) {
				t.Errorf("the step saw what is masked: %s", seen)
			}

			u := p.rec.Finished("tools/call lookup_order")
			if u.Statement != `{"id":"17"}` || !slices.Equal(u.Objects, []string{"lookup_order"}) || u.Outcome.Status != "ok" || u.Outcome.Error != "" ||
				u.Outcome.Rows != 1 || u.Outcome.Masked != 2 || u.Outcome.Sent == 0 || u.Outcome.Received == 0 || !strings.Contains(u.Sample, "[masked]") || strings.Contains(u.Sample, "@example.com") {
				t.Errorf("on record: %+v %+v", u, u.Outcome)
			}
			if u := p.rec.Finished("tools/call fail"); u.Outcome.Status != "isError" || u.Outcome.Error != "isError" {
				t.Errorf("on record: %+v", u.Outcome)
			}
			if u := p.rec.Finished("resources/read orders://*"); u.Statement != "orders://1" || u.Outcome.Masked != 1 {
				t.Errorf("on record: %+v %+v", u, u.Outcome)
			}
			if u := p.rec.Finished("prompts/get apologise"); u.Statement != `{"order":"17"}` {
				t.Errorf("on record: %+v", u)
			}
			for _, use := range []string{"tools/list", "resources/list", "resources/templates/list", "prompts/list", "completion/complete"} {
				p.rec.Finished(use)
			}
		})
	}
}

func TestWithoutMaskingAllComesThroughButTheSecret(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	s, b := p.connect("2025-06-18", nil)
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "picture"})
	ok(t, err)
	if img := res.Content[0].(*sdk.ImageContent); string(img.Data) != "e@example.com" {
		t.Errorf("%q", img.Data)
	}
	res, err = s.CallTool(t.Context(), &sdk.CallToolParams{Name: "fail"})
	ok(t, err)
	if got := text(t, res); got != "no such customer: c@example.com, key [masked]" {
		t.Errorf("%q", got)
	}
	if strings.Contains(b.seen(), apiKey) {
		t.Error("the step saw the server's secret")
	}
}

func TestDetectorsMaskTextProgressAndErrors(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access(store.MaskRule{Detector: "email"}))
	progress := make(chan string, 8)
	s, b := p.connect("2025-06-18", &sdk.ClientOptions{ProgressNotificationHandler: func(_ context.Context, r *sdk.ProgressNotificationClientRequest) {
		progress <- fmt.Sprint(r.Params.Progress, r.Params.Message)
	}})
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "fail"})
	ok(t, err)
	if got := text(t, res); got != "no such customer: [masked], key [masked]" {
		t.Errorf("%q", got)
	}
	params := &sdk.CallToolParams{Name: "count"}
	params.SetProgressToken("token-1")
	res, err = s.CallTool(t.Context(), params)
	ok(t, err)
	if text(t, res) != "3" {
		t.Errorf("%q", text(t, res))
	}
	for i := range 3 {
		select {
		case got := <-progress:
			if want := fmt.Sprintf("%d[masked]", i+1); got != want {
				t.Errorf("progress %q, want %q", got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("no progress: %s", b.seen())
		}
	}
	_, err = s.CallTool(t.Context(), &sdk.CallToolParams{Name: "picture"})
	ok(t, err)
	if strings.Contains(b.seen(), "@example.com") || strings.Contains(b.seen(), apiKey) {
		t.Errorf("the step saw what is masked: %s", b.seen())
	}
	if u := p.rec.Finished("tools/call fail"); u.Outcome.Masked != 2 {
		t.Errorf("%+v", u.Outcome)
	}
}

func TestAnArgumentThatIsRepeatedInAHeaderArrives(t *testing.T) {
	p, _ := newOrdersPath(t, &sdk.StreamableHTTPOptions{Stateless: true}, access())
	s, _ := p.connect("", nil)
	for _, err := range s.Tools(t.Context(), nil) { // the client learns which arguments
		ok(t, err)
	}
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "lookup_region", Arguments: map[string]string{"region": "Süd"}})
	ok(t, err)
	if got := text(t, res); !strings.HasPrefix(got, `{"region":"Süd"}[=?base64?`) {
		t.Errorf("%s", got)
	}
}

func TestAClientWithoutASessionListensToChanges(t *testing.T) {
	p, o := newOrdersPath(t, &sdk.StreamableHTTPOptions{Stateless: true}, access())
	changed := make(chan struct{}, 8)
	s, _ := p.connect("", &sdk.ClientOptions{ToolListChangedHandler: func(context.Context, *sdk.ToolListChangedRequest) { changed <- struct{}{} }})
	gatewaytest.Until(t, "the client listens", func() bool { return p.used("subscriptions/listen") })
	// The server knows of the subscription some time after it is on record.
	within := time.After(10 * time.Second)
	for n, every := 0, time.NewTicker(50*time.Millisecond); ; n++ {
		select {
		case <-changed:
			ok(t, s.Close())
			p.core.End(p.params.Intent)
			if u := p.rec.Finished("subscriptions/listen"); u.Outcome.Error == "" {
				t.Errorf("%+v", u.Outcome)
			}
			return
		case <-every.C:
			sdk.AddTool(o.Server, &sdk.Tool{Name: fmt.Sprint("lookup_more", n)}, func(context.Context, *sdk.CallToolRequest, struct{}) (*sdk.CallToolResult, any, error) {
				return nil, nil, nil
			})
		case <-within:
			t.Fatal("no change was told")
		}
	}
}

func TestACancelledCallIsCancelledAtTheServer(t *testing.T) {
	for name, setup := range setups {
		if strings.Contains(name, "without sessions") {
			continue // its server cannot tell whose call is meant (SDK, stateless mode)
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, o := newOrdersPath(t, setup.opts, access())
			s, _ := p.connect(setup.version, nil)
			ctx, cancel := context.WithCancel(t.Context())
			errs := make(chan error, 1)
			go func() {
				_, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "hang"})
				errs <- err
			}()
			gatewaytest.Until(t, "the call reaches the server", func() bool { return o.reached.Load() == 1 })
			cancel()
			if err := <-errs; !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
			select {
			case <-o.cancels:
			case <-time.After(5 * time.Second):
				t.Fatal("the server goes on")
			}
			if u := p.rec.Finished("tools/call hang"); u.Outcome.Error != store.UseClient && u.Outcome.Error != "0" && u.Outcome.Status == "" {
				t.Errorf("%+v", u.Outcome)
			}
		})
	}
}

func TestAClientThatHangsUpCancelsItsCall(t *testing.T) {
	p, o := newOrdersPath(t, &sdk.StreamableHTTPOptions{JSONResponse: true}, access())
	raw := p.raw(t)
	raw.initialize("2025-06-18")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		gatewaytest.Until(t, "the call reaches the server", func() bool { return o.reached.Load() == 1 })
		cancel()
	}()
	raw.send(ctx, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"hang","arguments":{}}}`)
	select {
	case <-o.cancels:
	case <-time.After(5 * time.Second):
		t.Fatal("the server goes on")
	}
	if u := p.rec.Finished("tools/call hang"); u.Outcome.Error != store.UseClient {
		t.Errorf("%+v", u.Outcome)
	}
	if u := p.rec.Finished("notifications/cancelled"); !strings.Contains(u.Statement, `"requestId":7`) {
		t.Errorf("%+v", u)
	}
}

func TestTheEndOfTheSessionCutsCallsAndStreamsWithinASecond(t *testing.T) {
	for name, setup := range setups {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, o := newOrdersPath(t, setup.opts, access())
			s, _ := p.connect(setup.version, nil)
			errs := make(chan error, 1)
			go func() {
				_, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "hang"})
				errs <- err
			}()
			gatewaytest.Until(t, "the call reaches the server", func() bool { return o.reached.Load() == 1 })
			began := time.Now()
			p.core.End(p.params.Intent)
			select {
			case err := <-errs:
				if err == nil || !strings.Contains(err.Error(), "the session has ended") {
					t.Errorf("%v", err)
				}
			case <-time.After(3 * time.Second):
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("cut after %v", took)
			}
			if u := p.rec.Finished("tools/call hang"); u.Outcome.Error != store.UseCut {
				t.Errorf("%+v", u.Outcome)
			}
			if _, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "fail"}); err == nil {
				t.Error("a call after the end")
			}
		})
	}
}

func TestAnInterruptedStreamIsResumedAndRecordedOnce(t *testing.T) {
	p, o := newOrdersPath(t, &sdk.StreamableHTTPOptions{EventStore: sdk.NewMemoryEventStore(nil)}, access())
	s, _ := p.connect("2025-11-25", nil)
	go func() {
		gatewaytest.Until(t, "the client comes back", func() bool { return p.used("stream resume") })
		o.free()
	}()
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "resume"})
	ok(t, err)
	if text(t, res) != "after all" {
		t.Errorf("%q", text(t, res))
	}
	if u := p.rec.Finished("tools/call resume"); u.Outcome.Status != "ok" || u.Outcome.Error != "" || u.Outcome.Rows != 1 {
		t.Errorf("%+v", u.Outcome)
	}
}

func TestWhatAServerAsksOfTheStepIsRefusedAndOnRecord(t *testing.T) {
	p, _ := newOrdersPath(t, nil, access())
	s, b := p.connect("2025-06-18", nil)
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "elicit"})
	ok(t, err)
	if got := text(t, res); !strings.HasPrefix(got, "roots: ") || strings.HasSuffix(got, "<nil>") {
		t.Errorf("%q", got)
	}
	if strings.Contains(b.seen(), `"method":"roots/list"`) {
		t.Error("the step heard of it")
	}
}

func TestAToolWithAScopeOfItsOwnIsCalledUnderTheSessionThatPeopleApproved(t *testing.T) {
	p, o := newOrdersPath(t, nil, access(), func(c *Config) { c.ApprovalWait, c.KeepAlive = 300*time.Millisecond, 20*time.Millisecond })
	approved := p.params
	approved.Intent = store.NewID()
	approved.Grant.Scope = "orders-mcp:refund"
	a := store.Access{MCP: &store.MCPAccess{Tools: []store.MCPTool{{Name: "refund_order"}}}}
	a.Protocol, a.Upstream, a.Inject = p.params.Grant.Access.Protocol, p.params.Grant.Access.Upstream, p.params.Grant.Access.Inject
	approved.Grant.Access = &a
	var asked []string
	decide := make(chan struct{})
	p.core.OnAsk(func(ctx context.Context, s *gateway.Session, scope, reason string) (*gateway.Session, error) {
		asked = append(asked, scope+": "+reason)
		select {
		case <-ctx.Done():
			return nil, &gateway.Waiting{Request: "req_2", URL: "http://recorder.test/approvals/apr_1"}
		case <-decide:
			two, _ := p.open(approved)
			return two, nil
		}
	})
	s, _ := p.connect("2025-06-18", nil)
	call := &sdk.CallToolParams{Name: "refund_order", Arguments: lookup{"17"}}

	res, err := s.CallTool(t.Context(), call)
	ok(t, err)
	if got := text(t, res); !res.IsError || !strings.Contains(got, "http://recorder.test/approvals/apr_1") || !strings.Contains(got, "req_2") {
		t.Errorf("%q", got)
	}
	if o.reached.Load() != 0 || p.used("tools/call refund_order") {
		t.Error("called before it was approved")
	}
	close(decide)
	res, err = s.CallTool(t.Context(), call)
	ok(t, err)
	if text(t, res) != "refunded" || asked[1] != `orders-mcp:refund: MCP tools/call refund_order {"id":"17"}` {
		t.Errorf("%q %q", text(t, res), asked)
	}
	if u := p.rec.Finished("tools/call refund_order"); u.Intent != approved.Intent || u.Outcome.Status != "ok" {
		t.Errorf("%+v", u)
	}
	gatewaytest.Until(t, "the session of the approval ends", func() bool { return !p.core.Has(approved.Intent) })

	elsewhere, again := a, a
	elsewhere.Upstream = "http://elsewhere.internal"
	again.MCP = access().MCP
	for want, other := range map[string]*store.Access{"is not for this MCP server": &elsewhere, "does not allow the tool": &again} {
		approved.Intent, approved.Grant.Access = store.NewID(), other
		if _, err := s.CallTool(t.Context(), call); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("an approval that %s: %v", want, err)
		}
		if o.reached.Load() != 1 || p.core.Has(approved.Intent) {
			t.Errorf("an approval that %s was used, or its session lives on", want)
		}
	}
	p.core.OnAsk(func(context.Context, *gateway.Session, string, string) (*gateway.Session, error) {
		return nil, fmt.Errorf("%w: no", gateway.ErrDenied)
	})
	res, err = s.CallTool(t.Context(), call)
	ok(t, err)
	if got := text(t, res); !res.IsError || !strings.Contains(got, "was denied") || o.reached.Load() != 1 {
		t.Errorf("%q", got)
	}
}

func TestACallThatWaitsForPeopleCanBeCancelled(t *testing.T) {
	p, o := newOrdersPath(t, nil, access(), func(c *Config) { c.KeepAlive = 10 * time.Millisecond })
	waits, gone := make(chan struct{}), make(chan struct{})
	p.core.OnAsk(func(ctx context.Context, s *gateway.Session, scope, reason string) (*gateway.Session, error) {
		close(waits)
		<-ctx.Done()
		close(gone)
		return nil, ctx.Err()
	})
	s, _ := p.connect("2025-06-18", nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-waits
		cancel()
	}()
	if _, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "refund_order", Arguments: lookup{"17"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Fatal("people are still asked")
	}
	if o.reached.Load() != 0 {
		t.Error("it was called")
	}
}

func TestWithTheRecorderDownNothingReachesTheServer(t *testing.T) {
	p, o := newOrdersPath(t, nil, access())
	s, _ := p.connect("2025-06-18", nil)
	before := o.reached.Load()
	p.rec.Down(true)
	if _, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "lookup_order", Arguments: lookup{"1"}}); err == nil || !strings.Contains(err.Error(), "cannot be recorded") {
		t.Errorf("%v", err)
	}
	if _, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "drop_orders"}); err == nil {
		t.Error("not refused")
	}
	p.rec.Down(false)
	if o.reached.Load() != before {
		t.Error("it reached the server")
	}
	_, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "lookup_order", Arguments: lookup{"1"}})
	ok(t, err)
}

func TestNotificationsOfAServerReachTheClient(t *testing.T) {
	p, o := newOrdersPath(t, nil, access(store.MaskRule{Detector: "email"}))
	changed, updated, logged := make(chan struct{}, 8), make(chan string, 8), make(chan any, 8)
	s, _ := p.connect("2025-06-18", &sdk.ClientOptions{
		ToolListChangedHandler: func(context.Context, *sdk.ToolListChangedRequest) { changed <- struct{}{} },
		ResourceUpdatedHandler: func(_ context.Context, r *sdk.ResourceUpdatedNotificationRequest) { updated <- r.Params.URI },
		LoggingMessageHandler:  func(_ context.Context, r *sdk.LoggingMessageRequest) { logged <- r.Params.Data },
	})
	ok(t, s.SetLoggingLevel(t.Context(), &sdk.SetLoggingLevelParams{Level: "info"}))
	ok(t, s.Subscribe(t.Context(), &sdk.SubscribeParams{URI: "orders://1"}))
	if err := s.Subscribe(t.Context(), &sdk.SubscribeParams{URI: "secrets://1"}); err == nil {
		t.Error("subscribed to what may not be read")
	}
	sdk.AddTool(o.Server, &sdk.Tool{Name: "lookup_more"}, func(context.Context, *sdk.CallToolRequest, struct{}) (*sdk.CallToolResult, any, error) {
		return nil, nil, nil
	})
	ok(t, o.ResourceUpdated(t.Context(), &sdk.ResourceUpdatedNotificationParams{URI: "orders://1"}))
	for ss := range o.Sessions() {
		ok(t, ss.Log(t.Context(), &sdk.LoggingMessageParams{Level: "error", Data: "k@example.com failed"}))
	}
	within := time.After(10 * time.Second)
	for range 3 {
		select {
		case <-changed:
		case uri := <-updated:
			if uri != "orders://1" {
				t.Errorf("%q", uri)
			}
		case data := <-logged:
			if data != "[masked] failed" {
				t.Errorf("%q", data)
			}
		case <-within:
			t.Fatal("a notification is missing")
		}
	}
	ok(t, s.Close())
	if u := p.rec.Finished("stream"); u.Outcome.Status != "200" || u.Outcome.Rows < 3 || u.Outcome.Masked < 1 {
		t.Errorf("%+v", u.Outcome)
	}
	p.rec.Finished("session end")
}
