package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"
)

// engine is what the databases that keep a ledger do not do alike. Every other
// statement is the same SQL in all of them, with placeholders $1, $2, ...
type engine interface {
	// open connects: a pool of one connection, which writes, and one that reads.
	open() (w, r *sql.DB, err error)
	// claim makes c, the connection that writes, the only one that does, or
	// returns an error that wraps ErrLocked. The claim lasts as long as c.
	claim(ctx context.Context, c *sql.Conn) error
	// release gives the claim up at once, not only when the server notices that c
	// is closed.
	release(ctx context.Context, c *sql.Conn) error
	// ensureSchema makes the schema in an empty database, brings an older one up,
	// and compares it in any other: what was altered is an error that wraps
	// ErrMismatch, what a newer program made one that wraps ErrNewer.
	ensureSchema(ctx context.Context, c *sql.Conn) error
	// begin opens a transaction that writes.
	begin() string
	// insert adds rows of width values each, row by row in args, with suffix
	// after them.
	insert(ctx context.Context, w *writer, into string, width int, args []any, suffix string) error
	// list is a FROM item j(value, key) of the elements, of SQL type elem, of the
	// JSON list that $1 is, in the order of key.
	list(elem string) string
	// by follows a table's name and has the named index used, where the engine
	// has to be told.
	by(index string) string
	// walk is the rest of a statement, from FROM on, over entries a whose column
	// is $1 and whose idx lies in [$2, $3), in the order of idx (order is "" or
	// " DESC"), read from that column's index alone; and is a further condition.
	walk(column, and, order string) string
	// also is a condition for walk: that a further column of a is the n'th
	// argument.
	also(column string, n int) string
	// sealedFields is an expression: how many sealed fields a body names.
	sealedFields(body string) string
	// checkColumns compares the generated columns of entries [from, to) with their
	// bodies, where the engine stores them.
	checkColumns(ctx context.Context, q querier, from, to int64) error
	// checkPages compares the indexes with the table: an altered index would
	// otherwise hide entries from History.
	checkPages(ctx context.Context, c *sql.Conn) error
	// class wraps ErrMismatch, ErrLost or errRefused around err where that is what
	// the database's own error means.
	class(err error) error
	// patience bounds one use of the connection that writes.
	patience(ctx context.Context) (context.Context, context.CancelFunc)
	// heartbeat is how often the connection that writes is tried while nobody
	// appends, 0: never.
	heartbeat() time.Duration
}

// newEngine returns the engine that o asks for.
func newEngine(o *Options) (engine, error) {
	if o.Postgres != "" {
		p, err := newPostgres(o.Postgres, o.Log)
		if err == nil && o.migrations != nil {
			p.migrations = o.migrations
		}
		return p, err
	}
	s := &sqliteDB{dir: o.Dir, migrations: migrations}
	if o.migrations != nil {
		s.migrations = o.migrations
	}
	return s, nil
}

// column is a column of entries that the database generates from the stored
// body, so that it cannot disagree with the leaf.
type column struct {
	name    string
	path    []string // of the member in the body
	indexed bool
}

// columns are what History filters by. An empty string counts as NULL, and the
// indexes leave NULL out. An index on a column is in effect one on (column,
// idx), so that a filter is served in the order of idx. time needs no index: it
// never decreases with idx, and is found by bisection.
var columns = []column{
	{"id", []string{"id"}, true},
	{"time", []string{"time"}, false},
	{"type", []string{"type"}, true},
	{"request", []string{"request"}, true},
	{"step", []string{"step"}, true},
	{"run", []string{"run"}, true},
	{"orchestrator", []string{"orchestrator"}, true},
	{"scope", []string{"action"}, true},
	{"target", []string{"resource"}, true},
	{"person", []string{"person"}, true},
	{"subject", []string{"subject", "id"}, true},
	{"outcome", []string{"decision", "outcome"}, true},
}

// alteredSchema is what Open says of a schema that is not the one it made.
func alteredSchema(what string, args ...any) error {
	return fmt.Errorf("%w: the database's schema was altered: %s", ErrMismatch, fmt.Sprintf(what, args...))
}

// statementName is how a statement that makes something begins, for messages.
func statementName(s string) string { return strings.TrimSpace(strings.SplitN(s, "(", 2)[0]) }
