package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// access tells of a step that never holds a secret: it reaches a database, an
// HTTP service and an MCP server with session tokens, and each use is on record.
func (d *demo) access(ctx context.Context) error {
	chapter("A step that never holds a secret")
	const step = "investigate"
	for _, part := range []func(context.Context, string) error{d.throughPostgres, d.throughHTTP, d.throughMCP} {
		if err := part(ctx, step); err != nil {
			return err
		}
	}
	if err := d.dev.call(ctx, "POST", "/steps/"+step+"/result",
		`{"run":"`+runID+`","outcome":"succeeded","summary":"order 1 looked up","target":"postgres://orders"}`, nil); err != nil {
		return err
	}
	say("The step says that it succeeded. What the record says of it:")
	env := []string{"COUNTERSIGN_RECORDER=" + d.dev.Recorder, "COUNTERSIGN_TOKEN=" + d.dev.Reviewers[0].Token}
	out, err := command(ctx, env, d.binary, "history", "--run", runID, "--step", step, "-o", "story")
	if err != nil {
		return err
	}
	for _, want := range []string{"SELECT orders", "DELETE orders", "GET /customers", "tools/call lookup_order", "agree"} {
		if !strings.Contains(out, want) {
			return fmt.Errorf("the story does not tell of %q: %s", want, out)
		}
	}
	if strings.Contains(out, "@example.com") {
		return errors.New("the story quotes what was masked: " + out)
	}
	show("$ countersign history --run "+runID+" --step "+step+" -o story", "")
	show("", out)
	return nil
}

// session asks for a session of scope.
func (d *demo) session(ctx context.Context, step, scope string) (*issued, error) {
	c, err := d.ask(ctx, step, `{"run":"`+runID+`","scope":"`+scope+`","ttl":"5m","delivery":"gateway"}`)
	if err != nil {
		return nil, err
	}
	if err := expect(c, "gateway", true); err != nil {
		return nil, err
	}
	say("a session at %s, good for %s alone", c.Credential.Address, scope)
	return c, nil
}

func (d *demo) throughPostgres(ctx context.Context, step string) error {
	c, err := d.session(ctx, step, "orders-db:read")
	if err != nil {
		return err
	}
	dsn := fmt.Sprintf("postgres://step:%s@%s/%s?sslmode=disable", c.Credential.Token, c.Credential.Address, c.Credential.Database)
	query := "SELECT id, customer, email, amount_cents FROM orders ORDER BY id"
	rows, err := command(ctx, nil, "psql", "-X", "-v", "VERBOSITY=terse", dsn, "-c", query)
	if err != nil {
		return fmt.Errorf("psql through the gateway: %w", err)
	}
	if strings.Contains(rows, "@") || !strings.Contains(rows, "[masked]") {
		return errors.New("the column email must be masked: " + rows)
	}
	show("psql", rows)
	for _, hostile := range []string{"DELETE FROM orders", "SELECT email || '' AS note FROM orders LIMIT 1", "SELECT pg_read_file('/etc/passwd')"} {
		out, err := command(ctx, nil, "psql", "-X", "-At", "-v", "VERBOSITY=terse", dsn, "-c", hostile)
		if err != nil {
			out = err.Error()
		}
		if strings.Contains(out, "@") || strings.Contains(out, "root:") || err == nil && strings.HasPrefix(hostile, "DELETE") {
			return fmt.Errorf("%s must be refused or masked: %s", hostile, out)
		}
		show("psql", hostile+"  ->  "+strings.TrimSpace(out))
	}
	return nil
}

func (d *demo) throughHTTP(ctx context.Context, step string) error {
	c, err := d.session(ctx, step, "http:demo")
	if err != nil {
		return err
	}
	get := func(method, path string) (int, string, error) {
		req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.Credential.Address, "/")+path, nil)
		if err != nil {
			return 0, "", err
		}
		req.Header.Set("Authorization", "Bearer "+c.Credential.Token)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
		return res.StatusCode, strings.TrimSpace(string(body)), err
	}
	status, body, err := get("GET", "/customers/1")
	if err != nil {
		return err
	}
	if status != 200 || strings.Contains(body, "@") || !strings.Contains(body, "[masked]") {
		return fmt.Errorf("GET /customers/1 answers %d %s; want 200 with the address masked", status, body)
	}
	show("http", fmt.Sprintf("GET /customers/1     %d %s", status, body))
	status, body, err = get("DELETE", "/customers/1")
	if err != nil {
		return err
	}
	if status != 403 {
		return fmt.Errorf("DELETE /customers/1 answers %d %s; want 403", status, body)
	}
	var p problem
	if err := json.Unmarshal([]byte(body), &p); err != nil {
		return fmt.Errorf("a refusal that is no problem document: %s", body)
	}
	show("http", fmt.Sprintf("DELETE /customers/1  %d %s", status, p.slug()))
	return nil
}

func (d *demo) throughMCP(ctx context.Context, step string) error {
	c, err := d.session(ctx, step, "mcp:demo")
	if err != nil {
		return err
	}
	client := mcp.NewClient(&mcp.Implementation{Name: "demo-agent", Version: "1"}, nil)
	s, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: c.Credential.Address, HTTPClient: &http.Client{Transport: bearer(c.Credential.Token)}}, nil)
	if err != nil {
		return fmt.Errorf("an MCP client through the gateway: %w", err)
	}
	defer s.Close()
	tools, err := s.ListTools(ctx, nil)
	if err != nil {
		return err
	}
	var names []string
	for _, t := range tools.Tools {
		names = append(names, t.Name)
	}
	show("mcp", "tools/list                 "+strings.Join(names, ", "))
	res, err := s.CallTool(ctx, &mcp.CallToolParams{Name: "lookup_order", Arguments: map[string]any{"id": 1}})
	if err != nil {
		return err
	}
	b, err := json.Marshal(res.StructuredContent)
	if err != nil {
		return err
	}
	if res.IsError || strings.Contains(string(b), "@") || !strings.Contains(string(b), "[masked]") {
		return fmt.Errorf("lookup_order answers %s; want the address masked", b)
	}
	show("mcp", "tools/call lookup_order    "+string(b))
	res, err = s.CallTool(ctx, &mcp.CallToolParams{Name: "delete_order", Arguments: map[string]any{"id": 1}})
	if err == nil && !res.IsError {
		return errors.New("the tool delete_order must be refused")
	}
	show("mcp", "tools/call delete_order    refused")
	return nil
}

// bearer sends a token with each request.
type bearer string

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(b))
	return http.DefaultTransport.RoundTrip(r)
}
