package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/hashicorp/vault/api"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/server"
)

// The names under which the demo catalogue knows dev's own services. Their
// ports change with each start, what is granted does not.
const (
	demoHTTPHost = "demo.internal"
	demoMCPHost  = "mcp.demo.internal"
)

// devServices are a small HTTP service and an MCP server for the gateway to
// stand before: each wants an API key that Vault keeps and no step ever holds.
type devServices struct {
	http, mcp           net.Listener
	httpKey, mcpKey     string
	httpHandler, mcpAPI http.Handler
}

// openDevServices listens on free ports of this machine. Without a Vault nobody
// has the keys, and every call is refused.
func openDevServices(ctx context.Context, vault *api.Client) (_ *devServices, err error) {
	s := &devServices{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, x := range []struct {
		l         *net.Listener
		key       *string
		path      string
		protected *http.Handler
		inner     http.Handler
	}{
		{&s.http, &s.httpKey, "secret/data/http-demo", &s.httpHandler, demoHTTP()},
		{&s.mcp, &s.mcpKey, "secret/data/mcp-demo", &s.mcpAPI, demoMCP()},
	} {
		if *x.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return nil, err
		}
		if vault != nil {
			if *x.key, err = demoKey(ctx, vault, x.path); err != nil {
				return nil, err
			}
		}
		*x.protected = keyed(*x.key, x.inner)
	}
	return s, nil
}

// demoKey reads the field key of a KV secret.
func demoKey(ctx context.Context, vault *api.Client, path string) (string, error) {
	s, err := vault.Logical().ReadWithContext(ctx, path)
	if err != nil || s == nil {
		return "", fmt.Errorf("reading %s from Vault: %w", path, errors.Join(err, errors.New("nothing usable is there")))
	}
	data, _ := s.Data["data"].(map[string]any)
	key, _ := data["key"].(string)
	if key == "" {
		return "", fmt.Errorf("%s in Vault has no field key", path)
	}
	return key, nil
}

// keyed answers 401 to whoever does not show key as a bearer token.
func keyed(key string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || key == "" || subtle.ConstantTimeCompare([]byte(got), []byte(key)) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "the API key is missing or wrong", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// serve answers until ctx ends.
func (s *devServices) serve(ctx context.Context, log *zap.Logger, run func(func() error)) {
	for l, h := range map[net.Listener]http.Handler{s.http: s.httpHandler, s.mcp: s.mcpAPI} {
		run(func() error {
			return server.Serve(ctx, l, server.Config{Handler: h, Log: log, Drain: devDrain})
		})
	}
}

// upstreams says where the catalogue's names are.
func (s *devServices) upstreams() map[string]string {
	return map[string]string{demoHTTPHost: s.http.Addr().String(), demoMCPHost: s.mcp.Addr().String()}
}

func (s *devServices) close() {
	for _, l := range []net.Listener{s.http, s.mcp} {
		if l != nil {
			l.Close()
		}
	}
}

type demoCustomer struct {
	ID    int    `json:"id"`
	Name  string `json:"name"`
	Email string `json:"email"`
	City  string `json:"city"`
}

var demoCustomers = []demoCustomer{
	{1, "Ada Byron", "ada@example.com", "London"},
	{2, "Grace Murray", "grace@example.com", "New York"},
	{3, "Katherine Coleman", "katherine@example.com", "Hampton"},
}

// demoHTTP is the demo's HTTP service.
func demoHTTP() http.Handler {
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.MarshalWrite(w, v)
	}
	r := chi.NewRouter()
	r.Get("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{"service": "demo", "owner": map[string]string{"name": "Ada Byron", "email": "ada@example.com"}})
	})
	r.Get("/customers", func(w http.ResponseWriter, r *http.Request) { answer(w, map[string]any{"customers": demoCustomers}) })
	r.Get("/customers/{id}", func(w http.ResponseWriter, r *http.Request) {
		i := slices.IndexFunc(demoCustomers, func(c demoCustomer) bool { return fmt.Sprint(c.ID) == chi.URLParam(r, "id") })
		if i < 0 {
			http.NotFound(w, r)
			return
		}
		answer(w, demoCustomers[i])
	})
	r.Delete("/customers/{id}", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	return r
}

type orderAsked struct {
	ID int `json:"id" jsonschema:"the order's number"`
}

type orderFound struct {
	ID          int    `json:"id"`
	Customer    string `json:"customer"`
	Email       string `json:"email"`
	AmountCents int    `json:"amount_cents"`
}

// demoMCP is the demo's MCP server.
func demoMCP() http.Handler {
	s := mcp.NewServer(&mcp.Implementation{Name: "countersign-demo-orders", Version: "1"}, nil)
	mcp.AddTool(s, &mcp.Tool{Name: "lookup_order", Description: "Looks up one order."},
		func(_ context.Context, _ *mcp.CallToolRequest, in orderAsked) (*mcp.CallToolResult, orderFound, error) {
			if in.ID < 1 || in.ID > len(demoCustomers) {
				return nil, orderFound{}, fmt.Errorf("there is no order %d", in.ID)
			}
			c := demoCustomers[in.ID-1]
			return nil, orderFound{in.ID, c.Name, c.Email, 1000 * in.ID}, nil
		})
	mcp.AddTool(s, &mcp.Tool{Name: "refund_order", Description: "Refunds one order."},
		func(_ context.Context, _ *mcp.CallToolRequest, in orderAsked) (*mcp.CallToolResult, map[string]any, error) {
			return nil, map[string]any{"id": in.ID, "refunded": true}, nil
		})
	mcp.AddTool(s, &mcp.Tool{Name: "delete_order", Description: "Deletes one order. The demo's scopes do not allow it."},
		func(_ context.Context, _ *mcp.CallToolRequest, in orderAsked) (*mcp.CallToolResult, map[string]any, error) {
			return nil, map[string]any{"id": in.ID, "deleted": true}, nil
		})
	return mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s }, &mcp.StreamableHTTPOptions{
		Logger:                     slog.New(slog.DiscardHandler),
		DisableLocalhostProtection: true, // the gateway comes by the name in the catalogue, with a key that no browser has
	})
}
