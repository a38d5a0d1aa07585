package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/server"
	gatewayhttp "github.com/countersign-dev/countersign/broker/gateway/http"
	"github.com/countersign-dev/countersign/broker/gateway/mcp"
	"github.com/countersign-dev/countersign/broker/gateway/postgres"
	"github.com/countersign-dev/countersign/store"
)

// accessListener is where one protocol of the access path is served.
type accessListener struct {
	l   net.Listener
	tls *tls.Config // nil: none
}

// listen opens the listeners that c names.
func (c *gatewayConfig) listen(log *zap.Logger) (_ map[string]accessListener, err error) {
	out := map[string]accessListener{}
	defer func() {
		if err != nil {
			for _, x := range out {
				x.l.Close()
			}
		}
	}()
	at := map[string]*listenConfig{}
	if c.HTTP != nil {
		at[store.ProtocolHTTP] = &c.HTTP.Listen
	}
	if c.Postgres != nil {
		at[store.ProtocolPostgres] = &c.Postgres.Listen
	}
	if c.MCP != nil {
		at[store.ProtocolMCP] = &c.MCP.Listen
	}
	for protocol, listen := range at {
		_, t, err := listen.open(log)
		if err != nil {
			return out, fmt.Errorf("gateway.%s: %w", protocol, err)
		}
		l, err := net.Listen("tcp", listen.Addr)
		if err != nil {
			return out, fmt.Errorf("gateway.%s.listen.addr: %w", protocol, err)
		}
		out[protocol] = accessListener{l, t}
	}
	return out, nil
}

// serveAccess answers steps on each listener, by its protocol, until ctx ends.
// What a session has under way then is given drain to end. The error says what
// is wrong with the configuration.
func (m *machines) serveAccess(ctx context.Context, at map[string]accessListener, drain time.Duration, run func(func() error)) error {
	log := m.o.log.Named("gateway")
	drain = cmp.Or(drain, drainDefault)
	gate := func(fn func() error) {
		m.gates.Add(1)
		run(func() error { defer m.gates.Done(); return fn() })
	}
	serve := func(x accessListener, h http.Handler, rest func(context.Context)) {
		gate(func() error {
			return server.Serve(ctx, x.l, server.Config{Handler: h, TLS: x.tls, Log: log, Drain: drain, Rest: rest, Streams: true, H2C: true})
		})
	}
	for protocol, x := range at {
		switch protocol {
		case store.ProtocolHTTP:
			g, err := gatewayhttp.New(gatewayhttp.Config{Gateway: m.gateway, URL: m.gateway.Addresses[protocol], CADir: m.o.proxyCA, Log: log})
			if err != nil {
				return err
			}
			serve(x, m.o.tracing.stepped(g), g.Drain)
		case store.ProtocolPostgres:
			g := postgres.New(postgres.Config{Gateway: m.gateway, TLS: x.tls, Drain: drain, Log: log})
			gate(func() error { return g.Serve(ctx, x.l) })
		case store.ProtocolMCP:
			serve(x, m.o.tracing.stepped(mcp.New(mcp.Config{Gateway: m.gateway, Log: log})), nil)
		}
	}
	return nil
}
