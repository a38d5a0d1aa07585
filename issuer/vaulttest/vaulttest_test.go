package vaulttest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestVaultAndPostgresGiveADatabaseRoleWhoseSessionEndsWithItsLease(t *testing.T) {
	dsn := Postgres(t)
	s := Vault(t)
	Orders(t, s, dsn)
	Orders(t, s, dsn) // may be repeated

	creds, err := s.Root.Logical().Read("database/creds/orders-read")
	if err != nil {
		t.Fatal(err)
	}
	user, password := creds.Data["username"].(string), creds.Data["password"].(string)
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.User, cfg.Password = user, password
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var n int
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n); err != nil || n != 3 {
		t.Fatalf("%d rows, %v", n, err)
	}
	if _, err := conn.Exec(t.Context(), "DELETE FROM orders"); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Fatalf("a reader deleted: %v", err)
	}
	if _, err := s.Root.Logical().Write("sys/leases/revoke", map[string]any{"lease_id": creds.LeaseID, "sync": true}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Fatal("the session outlived its lease")
	}
	if c, err := pgx.ConnectConfig(t.Context(), cfg); err == nil {
		c.Close(t.Context())
		t.Fatal("the role outlived its lease")
	}
}

func TestVaultStartsWithinSeconds(t *testing.T) {
	start := time.Now()
	Vault(t)
	t.Logf("started in %s", time.Since(start))
}
