// Command bench measures Countersign beside what it stands on, in one run on
// one machine: the ledger beside Tessera and the disk, issuance beside Vault's
// own calls, the gateway beside pgbouncer. It prints the table of docs/benchmarks.md. It is a module of its
// own, so that Tessera does not become a dependency of the product.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"
)

func main() {
	binary := flag.String("countersign", "bin/countersign", "the program to measure")
	postgres := flag.String("postgres", "", "DSN of a PostgreSQL whose role may create roles; without it the database rows are left out")
	each := flag.Duration("each", 5*time.Second, "how long each figure is measured")
	only := flag.String("only", "", "measure only groups whose name contains this: disk, ledger, postgres-ledger, million, identity, token, database, approval, gateway, switch")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *binary, *postgres, *each, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures every group and prints one table. A floor that is missed makes
// it fail at the end, after everything was measured.
func run(ctx context.Context, binary, postgres string, each time.Duration, only string) error {
	t := &table{each: each}
	groups := []struct {
		name string
		run  func(context.Context, *table) error
	}{
		{"disk", disk},
		{"ledger", ledgerRows},
		{"postgres-ledger", postgresLedgerRows},
		{"million", func(ctx context.Context, t *table) error { return millionRows(ctx, t, binary) }},
	}
	wants := func(name string) bool { return strings.Contains(name, only) }
	for _, g := range groups {
		if wants(g.name) {
			if err := g.run(ctx, t); err != nil {
				return fmt.Errorf("%s: %w", g.name, err)
			}
		}
	}
	if wants("identity") || wants("token") || wants("database") || wants("approval") || wants("gateway") || wants("switch") {
		d, err := startDev(ctx, binary, postgres)
		if err != nil {
			return err
		}
		defer d.stop()
		for _, g := range []struct {
			name string
			run  func(context.Context, *table) error
		}{
			{"identity", d.identity},
			{"token", d.token},
			{"database", d.database},
			{"approval", d.approval},
			{"switch", func(ctx context.Context, t *table) error { return d.stopEverything(ctx, t, postgres) }},
			{"gateway", func(ctx context.Context, t *table) error { return d.gateway(ctx, t, postgres) }},
		} {
			if wants(g.name) {
				if err := g.run(ctx, t); err != nil {
					return fmt.Errorf("%s: %w", g.name, err)
				}
			}
		}
	}
	t.print(os.Stdout)
	if n := t.missed(); n > 0 {
		return fmt.Errorf("%d floors missed", n)
	}
	return nil
}
