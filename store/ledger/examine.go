package ledger

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
)

// PostgresFacts is what a PostgreSQL server, and the role that a recorder is to
// run as, are like.
type PostgresFacts struct {
	Role      string
	Superuser bool
	Owner     bool     // of the schema or its tables, also by membership
	May       []string // what the role may do to the log beyond reading and appending: "UPDATE on entries"
	Now       time.Time
	Version   string
	Encoding  string
	Volatile  []string // settings under which an acknowledged commit may be lost: "fsync off"
	Schema    error    // nil: there and as it should be; ErrNoSchema, ErrOlder, or what Open would say
}

// ErrNoSchema says that there is no ledger in a database.
var ErrNoSchema = errors.New("there is no ledger's schema")

// ExaminePostgres reads the facts of the server and role of a recorder's
// connection string. It changes nothing, takes no lock, and fails where the
// server does not let it in.
func ExaminePostgres(ctx context.Context, dsn string) (*PostgresFacts, error) {
	p, err := newPostgres(dsn, zap.NewNop())
	if err != nil {
		return nil, err
	}
	db := p.connect(p.config)
	defer db.Close()
	f := &PostgresFacts{}
	var fsync, pages, commit string
	if err := db.QueryRowContext(ctx, `SELECT current_user, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), clock_timestamp(),
		current_setting('server_version'), current_setting('server_encoding'), current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')`).
		Scan(&f.Role, &f.Superuser, &f.Now, &f.Version, &f.Encoding, &fsync, &pages, &commit); err != nil {
		return nil, p.class(err)
	}
	if fsync != "on" {
		f.Volatile = append(f.Volatile, "fsync "+fsync)
	}
	if pages != "on" {
		f.Volatile = append(f.Volatile, "full_page_writes "+pages)
	}
	if commit != "on" && commit != "remote_apply" {
		f.Volatile = append(f.Volatile, "synchronous_commit "+commit)
	}
	c, err := db.Conn(ctx)
	if err != nil {
		return nil, p.class(err)
	}
	defer c.Close()
	version, err := p.version(ctx, c)
	switch {
	case errors.Is(err, ErrMismatch) || errors.Is(err, ErrNewer):
		f.Schema = err
	case err != nil:
		return nil, p.class(err)
	case version == 0:
		f.Schema = ErrNoSchema
	case version < newest(p.migrations):
		f.Schema = fmt.Errorf("%w: its schema is %d, this program's %d", ErrOlder, version, newest(p.migrations))
	}
	for _, t := range appendOnly {
		var there bool
		if err := c.QueryRowContext(ctx, "SELECT to_regclass($1) IS NOT NULL", p.schema+"."+t).Scan(&there); err != nil {
			return nil, p.class(err)
		}
		if !there {
			continue
		}
		table := p.schema + "." + t
		var owns, update, del, truncate bool
		if err := c.QueryRowContext(ctx, `SELECT pg_has_role((SELECT relowner FROM pg_class WHERE oid = to_regclass($1)), 'USAGE'),
			has_table_privilege($1, 'UPDATE'), has_table_privilege($1, 'DELETE'), has_table_privilege($1, 'TRUNCATE')`, table).Scan(&owns, &update, &del, &truncate); err != nil {
			return nil, p.class(err)
		}
		f.Owner = f.Owner || owns
		var may []string
		for _, x := range []struct {
			may  bool
			name string
		}{{update, "UPDATE"}, {del, "DELETE"}, {truncate, "TRUNCATE"}} {
			if x.may {
				may = append(may, x.name)
			}
		}
		if may != nil {
			f.May = append(f.May, strings.Join(may, ", ")+" on "+t)
		}
	}
	return f, nil
}
