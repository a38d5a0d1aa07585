package vaultdev

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/scopes"
)

// Options say what to prepare.
type Options struct {
	Scopes   *scopes.Set
	Postgres string // DSN of a role that may create roles; empty: no database engine
	// Owner is for a Vault that forgets its leases when it ends: roles of steps
	// carry it in a comment, and those that an earlier Vault left behind are
	// dropped. It is of the form [a-z0-9_]{1,32}.
	Owner string
}

// Prepared is what Prepare made.
type Prepared struct {
	BrokerToken string // periodic, orphan, with the broker's policy alone
}

// Prepare fills a Vault for the demo catalogue: engines, roles, secrets, what
// scopes.VaultSetup plans, and a token for the broker. client needs the
// rights of root. It may be repeated; each time it makes another token.
func Prepare(ctx context.Context, client *api.Client, opts Options) (*Prepared, error) {
	p := preparer{client.Logical(), client.Sys()}
	if err := p.secret(ctx); err != nil {
		return nil, err
	}
	if err := p.pki(ctx); err != nil {
		return nil, err
	}
	if err := p.ssh(ctx); err != nil {
		return nil, err
	}
	if opts.Postgres != "" {
		if err := orders(ctx, client, opts.Postgres, longest(opts.Scopes), opts.Owner); err != nil {
			return nil, err
		}
	}
	if opts.Scopes == nil {
		return &Prepared{}, nil
	}
	plan := scopes.VaultSetup(opts.Scopes, scopes.VaultOptions{})
	if err := plan.Apply(ctx, client); err != nil {
		return nil, fmt.Errorf("applying the catalogue's policies and roles: %w", err)
	}
	token, err := client.Auth().Token().CreateOrphanWithContext(ctx, &api.TokenCreateRequest{
		Policies: []string{plan.Broker}, NoDefaultPolicy: true, Period: "24h", DisplayName: "countersign-broker",
	})
	if err != nil {
		return nil, fmt.Errorf("making the broker's token: %w", err)
	}
	return &Prepared{BrokerToken: token.Auth.ClientToken}, nil
}

// longest is the largest max_ttl of set's database scopes: a database role's
// default_ttl must not be below it, since database/creds takes no TTL. It is no
// higher either: PostgreSQL itself refuses the password from then on, also
// where Vault is gone.
func longest(set *scopes.Set) time.Duration {
	d := time.Minute
	if set != nil {
		for _, s := range set.Scopes() {
			if s.Engine == scopes.Database && s.MaxTTL > d {
				d = s.MaxTTL
			}
		}
	}
	return d
}

type preparer struct {
	v   *api.Logical
	sys *api.Sys
}

func (p preparer) write(ctx context.Context, path string, data map[string]any) error {
	if _, err := p.v.WriteWithContext(ctx, path, data); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// mount enables an engine where it is missing.
func (p preparer) mount(ctx context.Context, path string, in *api.MountInput) error {
	mounts, err := p.sys.ListMountsWithContext(ctx)
	if err != nil {
		return fmt.Errorf("listing mounts: %w", err)
	}
	if m := mounts[path+"/"]; m != nil {
		if m.Type != in.Type {
			return fmt.Errorf("%s/ is mounted as %s, not %s: unmount it or use another Vault", path, m.Type, in.Type)
		}
		return nil
	}
	if err := p.sys.MountWithContext(ctx, path, in); err != nil {
		return fmt.Errorf("enabling %s at %s/: %w", in.Type, path, err)
	}
	return nil
}

func (p preparer) secret(ctx context.Context) error {
	if err := p.mount(ctx, "secret", &api.MountInput{Type: "kv", Options: map[string]string{"version": "2"}}); err != nil {
		return err
	}
	if err := p.missing(ctx, "secret/data/demo", map[string]any{"greeting": "hello from Vault"}); err != nil {
		return err
	}
	// What the demo's HTTP and MCP targets ask for. The gateway alone reads it.
	for _, path := range []string{"secret/data/http-demo", "secret/data/mcp-demo"} {
		if err := p.missing(ctx, path, map[string]any{"key": rand.Text()}); err != nil {
			return err
		}
	}
	return nil
}

// missing writes a secret where there is none.
func (p preparer) missing(ctx context.Context, path string, data map[string]any) error {
	// A KV v2 mount upgrades itself for a moment after it is enabled and
	// answers 400 until then.
	var err error
	for range 50 {
		var have *api.Secret
		if have, err = p.v.ReadWithContext(ctx, path); err == nil && have != nil {
			return nil
		}
		if err == nil {
			// cas 0 writes only where there is nothing, so that two that prepare at
			// once agree on one key.
			err = p.write(ctx, path, map[string]any{"data": data, "options": map[string]any{"cas": 0}})
		} else {
			err = fmt.Errorf("reading %s: %w", path, err)
		}
		if err == nil || !strings.Contains(err.Error(), "Upgrading") {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return err
}

func (p preparer) pki(ctx context.Context) error {
	if err := p.mount(ctx, "pki", &api.MountInput{Type: "pki", Config: api.MountConfigInput{MaxLeaseTTL: "87600h"}}); err != nil {
		return err
	}
	issuers, err := p.v.ListWithContext(ctx, "pki/issuers")
	if err != nil {
		return fmt.Errorf("listing pki/issuers: %w", err)
	}
	if issuers == nil {
		if err := p.write(ctx, "pki/root/generate/internal", map[string]any{
			"common_name": "Countersign demo root", "ttl": "8760h", "key_type": "ec", "key_bits": 256,
		}); err != nil {
			return err
		}
	}
	return p.write(ctx, "pki/roles/service", map[string]any{
		"allowed_domains": "demo.internal", "allow_subdomains": true, "allow_bare_domains": false,
		"allow_wildcard_certificates": false, "allow_ip_sans": false, "key_type": "ec", "key_bits": 256, "max_ttl": "24h",
		// With a lease the certificate would be revoked together with the child
		// token that asked for it.
		"generate_lease": false,
	})
}

func (p preparer) ssh(ctx context.Context) error {
	if err := p.mount(ctx, "ssh", &api.MountInput{Type: "ssh"}); err != nil {
		return err
	}
	// Without a CA the read answers 400 "keys haven't been configured yet".
	if s, err := p.v.ReadWithContext(ctx, "ssh/config/ca"); err != nil || s == nil {
		if err := p.write(ctx, "ssh/config/ca", map[string]any{"generate_signing_key": true, "key_type": "ed25519"}); err != nil {
			return err
		}
	}
	return p.write(ctx, "ssh/roles/deploy", map[string]any{
		"key_type": "ca", "allow_user_certificates": true, "allowed_users": "deploy", "default_user": "deploy",
		"default_extensions": map[string]string{"permit-pty": ""}, "allowed_extensions": "permit-pty", "max_ttl": "24h",
	})
}

// ordersSQL makes what orders-db:read and orders-db:write reach. The rights
// hang on two group roles, so that a step's own role can be dropped without
// looking for what it was granted.
const ordersSQL = `
DO $$ BEGIN
	IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'orders_read') THEN CREATE ROLE orders_read NOLOGIN; END IF;
	IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'orders_write') THEN CREATE ROLE orders_write NOLOGIN; END IF;
	IF to_regclass('orders') IS NULL THEN
		CREATE TABLE orders (
			id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
			customer text NOT NULL, email text NOT NULL, amount_cents int NOT NULL, status text NOT NULL);
		INSERT INTO orders (customer, email, amount_cents, status) VALUES
			('Ada', 'ada@example.com', 1200, 'paid'),
			('Grace', 'grace@example.com', 5400, 'paid'),
			('Alan', 'alan@example.com', 800, 'refund due');
	END IF;
	GRANT SELECT ON orders TO orders_read;
	GRANT SELECT, INSERT, UPDATE, DELETE ON orders TO orders_write;
END $$`

// dropRole ends a step's sessions and drops its role. It does nothing where
// the role is gone already, so that Vault can repeat it; and it takes the
// login away first, so that no session opens between the two.
const dropRole = `DO $$ DECLARE victim text := '{{name}}'; BEGIN
	IF EXISTS (SELECT FROM pg_roles WHERE rolname = victim) THEN
		EXECUTE format('ALTER ROLE %I NOLOGIN', victim);
		EXECUTE format('GRANT %I TO CURRENT_USER', victim);
		PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = victim;
		EXECUTE format('DROP ROLE %I', victim);
	END IF;
END $$`

// leftSQL drops the roles whose comment is %[1]s.
const leftSQL = `
DO $$ DECLARE victim text; BEGIN
	FOR victim IN SELECT rolname FROM pg_roles WHERE shobj_description(oid, 'pg_authid') = '%[1]s' LOOP
		EXECUTE format('ALTER ROLE %%I NOLOGIN', victim);
		EXECUTE format('GRANT %%I TO CURRENT_USER', victim);
		PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = victim;
		EXECUTE format('DROP ROLE %%I', victim);
	END LOOP;
END $$`

// owners are the forms of Options.Owner, which stands in SQL as it is.
var owners = regexp.MustCompile(`\A[a-z0-9_]{1,32}\z`)

// Orders makes the orders table where dsn points and the Vault database roles
// orders-read and orders-write over it, whose credentials live for at most
// ttl.
func Orders(ctx context.Context, client *api.Client, dsn string, ttl time.Duration) error {
	return orders(ctx, client, dsn, ttl, "")
}

func orders(ctx context.Context, client *api.Client, dsn string, ttl time.Duration, owner string) error {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return errors.New("the PostgreSQL DSN does not parse") // the error would quote it, password and all
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return fmt.Errorf("connecting to PostgreSQL at %s: %w", cfg.Host, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, ordersSQL); err != nil {
		return fmt.Errorf("making the orders table (the DSN's role must be able to create roles, and own the table): %w", err)
	}
	var mark []string
	if owner != "" {
		if !owners.MatchString(owner) {
			return fmt.Errorf("owner %q is not of the form %s", owner, owners)
		}
		comment := "step of countersign dev " + owner
		if _, err := conn.Exec(ctx, fmt.Sprintf(leftSQL, comment)); err != nil {
			return fmt.Errorf("dropping the roles that an earlier Vault left in PostgreSQL: %w", err)
		}
		mark = []string{`COMMENT ON ROLE "{{name}}" IS '` + comment + `'`}
	}
	p := preparer{client.Logical(), client.Sys()}
	if err := p.mount(ctx, "database", &api.MountInput{Type: "database"}); err != nil {
		return err
	}
	// As this connection came about: a DSN may leave it to the server whether
	// there is TLS (sslmode=prefer, the default), and Vault's driver would insist.
	mode := "disable"
	if _, encrypted := conn.PgConn().Conn().(*tls.Conn); encrypted {
		mode = "require"
		if cfg.TLSConfig != nil && !cfg.TLSConfig.InsecureSkipVerify {
			mode = "verify-full"
		}
	}
	at := url.URL{Scheme: "postgresql", Host: net.JoinHostPort(cfg.Host, strconv.Itoa(int(cfg.Port))), Path: "/" + cfg.Database}
	where := strings.Replace(at.String(), "postgresql://", "postgresql://{{username}}:{{password}}@", 1) + "?sslmode=" + mode
	if strings.HasPrefix(cfg.Host, "/") { // a socket's directory cannot stand in a URL's host
		where = fmt.Sprintf("host=%s port=%d dbname=%s user={{username}} password={{password}}", cfg.Host, cfg.Port, cfg.Database)
	}
	if err := p.write(ctx, "database/config/orders", map[string]any{
		"plugin_name": "postgresql-database-plugin", "connection_url": where,
		"username": cfg.User, "password": cfg.Password, "allowed_roles": "orders-read,orders-write",
		// Vault hashes the password itself, so that PostgreSQL's statement log
		// never holds it.
		"password_authentication": "scram-sha-256",
	}); err != nil {
		return err
	}
	// Statements are cut at semicolons unless they come as a JSON list.
	drop, err := json.Marshal([]string{dropRole})
	if err != nil {
		return err
	}
	for role, group := range map[string]string{"orders-read": "orders_read", "orders-write": "orders_write"} {
		if err := p.write(ctx, "database/roles/"+role, map[string]any{
			"db_name": "orders", "default_ttl": ttl.String(), "max_ttl": ttl.String(),
			"creation_statements":   append([]string{`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE ` + group}, mark...),
			"revocation_statements": []string{string(drop)},
		}); err != nil {
			return err
		}
	}
	return nil
}
