package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// gatewayConfig is the access path of a broker. A protocol that is not there is
// not served: delivery gateway is refused for its scopes.
type gatewayConfig struct {
	HTTP     *gatewayURL     `yaml:"http"`     // reverse and forward proxy; none: not served
	Postgres *gatewayAddress `yaml:"postgres"` // PostgreSQL's wire protocol; none: not served
	MCP      *gatewayURL     `yaml:"mcp"`      // MCP's streamable HTTP; none: not served

	Upstreams   map[string]string `yaml:"upstreams"`    // host:port that is dialled, by the host, or host:port, that the catalogue names; others are dialled as they are named
	CA          string            `yaml:"ca_file"`      // file, PEM: whom targets' certificates are checked against; the system's by default
	MaxSessions int               `yaml:"max_sessions"` // sessions open at once, more are refused (`rate-limited`); any number by default
	ProxyCA     string            `yaml:"proxy_ca_dir"` // directory of the forward proxy's certificate authority, which is made where it is missing; none: no forward proxy
}

// gatewayURL is a listener of HTTP, and where steps reach it.
type gatewayURL struct {
	Listen listenConfig `yaml:"listen"` // where steps connect
	URL    string       `yaml:"url"`    // what steps are told: scheme, host and port; DPoP proofs are for it
}

// gatewayAddress is a listener of another protocol, and where steps reach it.
type gatewayAddress struct {
	Listen  listenConfig `yaml:"listen"`  // where steps connect
	Address string       `yaml:"address"` // host:port that steps are told
}

func (c *gatewayConfig) check() error {
	if c.HTTP == nil && c.Postgres == nil && c.MCP == nil {
		return errors.New("gateway: set http, postgres, mcp or several of them, or leave gateway out")
	}
	for name, x := range map[string]*gatewayURL{"http": c.HTTP, "mcp": c.MCP} {
		if x == nil {
			continue
		}
		if err := x.check(); err != nil {
			return fmt.Errorf("gateway.%s: %w", name, err)
		}
	}
	if c.Postgres != nil {
		if err := c.Postgres.check(); err != nil {
			return fmt.Errorf("gateway.postgres: %w", err)
		}
	}
	if c.ProxyCA != "" && c.HTTP == nil {
		return errors.New("gateway.proxy_ca_dir: the forward proxy is part of gateway.http, which is not set")
	}
	if c.MaxSessions < 0 {
		return errors.New("gateway.max_sessions is not negative; 0 is any number")
	}
	for host, to := range c.Upstreams {
		if host == "" || strings.ContainsAny(host, "/ ") || strings.Contains(host, ":") && hostPort(host) != nil {
			return fmt.Errorf("gateway.upstreams: %q is not a host, or a host and a port, as the catalogue has it", host)
		}
		if err := hostPort(to); err != nil {
			return fmt.Errorf("gateway.upstreams.%s: %w", host, err)
		}
	}
	return nil
}

func (c *gatewayURL) check() error {
	if err := c.Listen.check(); err != nil {
		return err
	}
	if c.Listen.ClientCA != "" {
		return errors.New("listen.client_ca is the recorder's alone: steps show their session's token")
	}
	if err := secureURL(c.URL); err != nil {
		return fmt.Errorf("url: %w", err)
	}
	if u, err := url.Parse(c.URL); err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("url: %q is more than scheme, host and port", c.URL)
	}
	return nil
}

func (c *gatewayAddress) check() error {
	if err := c.Listen.check(); err != nil {
		return err
	}
	if c.Listen.ClientCA != "" {
		return errors.New("listen.client_ca is the recorder's alone: steps show their session's token")
	}
	if err := hostPort(c.Address); err != nil {
		return fmt.Errorf("address: %w", err)
	}
	return nil
}

func hostPort(s string) error {
	host, port, err := net.SplitHostPort(s)
	if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 || host == "" {
		return fmt.Errorf("%q is not host:port", s)
	}
	return nil
}

// options resolves c: what the gateway of a broker is made of, but for what it
// shares with the broker.
func (c *gatewayConfig) options(log *zap.Logger) (*gateway.Config, error) {
	o := &gateway.Config{Addresses: map[string]string{}, Upstreams: c.Upstreams, MaxSessions: c.MaxSessions}
	if c.HTTP != nil {
		o.Addresses[store.ProtocolHTTP] = strings.TrimSuffix(c.HTTP.URL, "/")
	}
	if c.Postgres != nil {
		o.Addresses[store.ProtocolPostgres] = c.Postgres.Address
	}
	if c.MCP != nil {
		o.Addresses[store.ProtocolMCP] = strings.TrimSuffix(c.MCP.URL, "/")
	}
	var err error
	if o.Targets, err = trust.Open(trust.Files{CA: c.CA}, log); err != nil {
		return nil, fmt.Errorf("gateway.ca_file: %w", err)
	}
	return o, nil
}
