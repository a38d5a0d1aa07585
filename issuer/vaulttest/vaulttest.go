// Package vaulttest gives tests a real Vault and a real PostgreSQL.
package vaulttest

import (
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
)

// Server is a Vault for one test.
type Server struct {
	*vaultdev.Server
	Root *api.Client // with the root token
}

// Vault starts an empty Vault (`vault server -dev`: KV v2 at secret/ and
// nothing else) that is gone when the test ends.
func Vault(t testing.TB) *Server { return nil }

// Postgres starts an empty PostgreSQL that is gone when the test ends, and
// returns the DSN of its superuser.
func Postgres(t testing.TB) string { return "" }

// Prepared starts a Vault and prepares it for set; dsn may be empty.
func Prepared(t testing.TB, set *scopes.Set, dsn string) (*Server, *vaultdev.Prepared) {
	return nil, nil
}
