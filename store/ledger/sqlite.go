package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"modernc.org/sqlite" // the engine, pure Go
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteDB is the embedded engine: the file ledger.db in dir. Generated columns
// are virtual: the table holds the body alone, their values lie in the indexes.
// The lock beside the file is the claim on it.
type sqliteDB struct {
	dir        string
	migrations []migration
}

func (s *sqliteDB) open() (w, r *sql.DB, err error) {
	path := filepath.Join(s.dir, "ledger.db")
	if err := touch(path); err != nil {
		return nil, nil, err
	}
	if w, err = openDB(path, 1, "_journal_mode=WAL", "_synchronous=FULL", "_pragma=cache_size(-65536)", "_pragma=page_size(4096)", "_pragma=wal_autocheckpoint(8000)"); err != nil {
		return nil, nil, err
	}
	// Each of these has a cache of its own, which takes twice its size in memory (a
	// page with its head, 4.3 KiB, lies in a block of 8), and what is read lies in
	// the operating system's cache too: 2 MB, as SQLite has it by itself, make pages
	// of history no slower than 8.
	r, err = openDB(path, 8, "_query_only=1", "_pragma=cache_size(-2000)")
	return w, r, err
}

func (*sqliteDB) claim(context.Context, *sql.Conn) error { return nil }

func (*sqliteDB) release(context.Context, *sql.Conn) error { return nil }

func (*sqliteDB) begin() string { return "BEGIN IMMEDIATE" }

// insert uses few statements: up to 16 rows go with one, since a batch of that
// size costs less to write than to hand over in pieces. OR ROLLBACK, since the whole
// transaction is given up anyway: SQLite then keeps no journal of the statement.
func (*sqliteDB) insert(ctx context.Context, w *writer, into string, width int, args []any, suffix string) error {
	row := ",(?" + strings.Repeat(",?", width-1) + ")"
	for len(args) > 0 {
		n := len(args) / width
		for _, most := range []int{128, 32, 16} {
			if n >= most {
				n = most
				break
			}
		}
		if err := w.exec(ctx, "INSERT OR ROLLBACK INTO "+into+" VALUES "+strings.Repeat(row, n)[1:]+suffix, args[:n*width]...); err != nil {
			return err
		}
		args = args[n*width:]
	}
	return nil
}

func (*sqliteDB) list(string) string { return "json_each($1) j" }

func (*sqliteDB) by(index string) string { return " INDEXED BY " + index }

func (*sqliteDB) walk(column, and, order string) string {
	return fmt.Sprintf("FROM entries a INDEXED BY entries_%s WHERE a.%[1]s = $1 AND a.idx >= $2 AND a.idx < $3%s ORDER BY a.idx%s", column, and, order)
}

// also seeks (value, idx) in the column's own index: the column itself would be
// parsed out of the body.
func (*sqliteDB) also(column string, n int) string {
	return fmt.Sprintf(" AND EXISTS (SELECT 1 FROM entries b INDEXED BY entries_%s WHERE b.%[1]s = $%d AND b.idx = a.idx)", column, n)
}

func (*sqliteDB) sealedFields(body string) string {
	return "(SELECT count(*) FROM json_each(" + body + ", '$.sealed'))"
}

func (*sqliteDB) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	return ctx, func() {}
}

func (*sqliteDB) heartbeat() time.Duration { return 0 }

// class makes a mismatch of what SQLite itself calls corrupt.
func (*sqliteDB) class(err error) error {
	var se *sqlite.Error
	if errors.As(err, &se) && !errors.Is(err, ErrMismatch) {
		switch se.Code() & 0xff {
		case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
			return fmt.Errorf("%w: the database file is damaged: %w", ErrMismatch, err)
		case sqlite3.SQLITE_ERROR:
			// What json_extract makes of a body that it cannot read: it is nested
			// deeper than 1,000 levels.
			if strings.Contains(se.Error(), "malformed JSON") {
				return fmt.Errorf("%w: %w", errRefused, err)
			}
		}
	}
	return err
}

// sqliteSchema returns the statements that make an empty ledger. Open compares
// them with what the database says of itself, so that a trigger that was taken
// away is noticed.
//
// The refusal of REPLACE: an insert that replaces deletes the old row without
// firing a DELETE trigger (recursive_triggers is off by default, and any other
// program opening the file chooses for itself). So inserts are checked too. On
// hashes and checkpoints the check is BEFORE INSERT. On entries it is AFTER
// INSERT, since a BEFORE trigger would have every virtual column computed twice
// (measured: 20,200 against 29,400 entries/s); ABORT takes back the whole
// statement, the replaced row included. There idx is the only unique key:
// entries_id is not declared UNIQUE, as REPLACE would then delete by it; that
// no id comes twice is what the trigger checks. The hash row of an entry follows
// the entry in its transaction, so that an entry which has one is not new.
func sqliteSchema() []string {
	var table strings.Builder
	table.WriteString("CREATE TABLE entries (idx INTEGER PRIMARY KEY, body TEXT NOT NULL")
	for _, c := range columns {
		fmt.Fprintf(&table, ", %s TEXT GENERATED ALWAYS AS (nullif(json_extract(body, '$.%s'), '')) VIRTUAL", c.name, strings.Join(c.path, "."))
	}
	table.WriteString(") STRICT")
	s := []string{table.String()}
	for _, c := range columns {
		if c.indexed {
			s = append(s, fmt.Sprintf("CREATE INDEX entries_%s ON entries (%[1]s) WHERE %[1]s IS NOT NULL", c.name))
		}
	}
	s = append(s,
		// nodes: what entry idx adds to the tree, the leaf hash first, then each
		// interior node that it completes, going up: tlog.StoredHashes in one row.
		"CREATE TABLE hashes (idx INTEGER PRIMARY KEY, nodes BLOB NOT NULL CHECK (length(nodes) > 0 AND length(nodes) % 32 = 0)) STRICT",
		// note: the signed checkpoint of each commit, by tree size.
		"CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT",
		// Beside the log, and mutable: what is open (a store.Request as JSON), and
		// the texts behind commitments, encrypted under keys that are kept elsewhere.
		"CREATE TABLE open_requests (request TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT, WITHOUT ROWID",
		"CREATE TABLE sealed (idx INTEGER NOT NULL, field TEXT NOT NULL, box BLOB NOT NULL, PRIMARY KEY (idx, field)) STRICT, WITHOUT ROWID",

		`CREATE TRIGGER entries_append AFTER INSERT ON entries WHEN NEW.idx <> (SELECT max(idx) FROM entries) OR EXISTS (SELECT 1 FROM hashes WHERE idx >= NEW.idx) OR (NEW.idx > 0 AND NOT EXISTS (SELECT 1 FROM entries WHERE idx = NEW.idx - 1)) BEGIN SELECT RAISE(ROLLBACK, 'entries are only appended'); END`,
		`CREATE TRIGGER entries_once AFTER INSERT ON entries WHEN NEW.id IS NULL OR EXISTS (SELECT 1 FROM entries WHERE id = NEW.id AND idx <> NEW.idx) BEGIN SELECT RAISE(ROLLBACK, 'an entry id is appended once'); END`,
		`CREATE TRIGGER hashes_append BEFORE INSERT ON hashes WHEN NEW.idx IS NOT (SELECT coalesce(max(idx) + 1, 0) FROM hashes) BEGIN SELECT RAISE(ROLLBACK, 'hashes are only appended'); END`,
		`CREATE TRIGGER checkpoints_append BEFORE INSERT ON checkpoints WHEN NEW.size <= (SELECT max(size) FROM checkpoints) BEGIN SELECT RAISE(ROLLBACK, 'checkpoints are only appended'); END`,
	)
	for _, t := range []string{"entries", "hashes", "checkpoints"} {
		for _, op := range []string{"UPDATE", "DELETE"} {
			s = append(s, fmt.Sprintf("CREATE TRIGGER %s_no_%s BEFORE %s ON %[1]s BEGIN SELECT RAISE(ROLLBACK, '%[1]s are only appended'); END", t, strings.ToLower(op), op))
		}
	}
	return s
}

// applicationID marks the file as a Countersign ledger (PRAGMA
// application_id), "CSLG".
const applicationID = 0x43534c47

// schemaAt returns the statements that make a ledger of a version of the schema.
func (s *sqliteDB) schemaAt(version int) []string {
	out := sqliteSchema()
	for _, m := range s.migrations[:version-1] {
		out = append(out, m.sqlite...)
	}
	return out
}

// ensureSchema makes the schema, or brings an older one up, in one transaction:
// a crash leaves an empty database, or the old schema whole. The version is
// PRAGMA user_version, which is part of the transaction; 0 is version 1, from
// before there were others.
func (s *sqliteDB) ensureSchema(ctx context.Context, c *sql.Conn) error {
	if err := checkMigrations(s.migrations); err != nil {
		return err
	}
	last := newest(s.migrations)
	var version int
	if err := c.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if version = max(version, 1); version > last {
		return newer(version, last)
	}
	empty, err := s.compare(ctx, c, s.schemaAt(version))
	if err != nil {
		return err
	}
	var stmts []string
	switch {
	case empty:
		stmts = append([]string{fmt.Sprintf("PRAGMA application_id = %d", applicationID)}, s.schemaAt(last)...)
	case version == last:
		return nil
	default:
		for _, m := range s.migrations[version-1:] {
			stmts = append(stmts, m.sqlite...)
		}
	}
	stmts = append(append([]string{"BEGIN IMMEDIATE"}, stmts...), fmt.Sprintf("PRAGMA user_version = %d", last), "COMMIT")
	for _, x := range stmts {
		if _, err := c.ExecContext(ctx, x); err != nil {
			_, _ = c.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
			return fmt.Errorf("making the ledger's schema: %w", err)
		}
	}
	_, err = s.compare(ctx, c, s.schemaAt(last))
	return err
}

// compare compares what the database says of itself with want, and reports
// whether there is nothing yet.
func (*sqliteDB) compare(ctx context.Context, c *sql.Conn, want []string) (empty bool, err error) {
	rows, err := c.QueryContext(ctx, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
	if err != nil {
		return false, err
	}
	defer rows.Close()
	found := map[string]string{}
	for rows.Next() {
		var name, stmt string
		if err := rows.Scan(&name, &stmt); err != nil {
			return false, err
		}
		found[stmt] = name
	}
	if err := rows.Err(); err != nil {
		return false, err
	}
	if len(found) == 0 {
		return true, nil
	}
	for _, s := range want {
		if _, ok := found[s]; !ok {
			return false, alteredSchema("missing %q", statementName(s))
		}
		delete(found, s)
	}
	for _, name := range found {
		return false, alteredSchema("%q is not part of it", name)
	}
	return false, nil
}

// dsn names the database file at path for the driver.
func dsn(path string, params ...string) string {
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + strings.Join(params, "&")
}

// openDB opens the file at path with at most conns connections. synchronous=FULL
// makes every COMMIT in WAL mode wait for the disk; temp_store=memory keeps
// statement journals out of files.
func openDB(path string, conns int, params ...string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", dsn(path, append([]string{"_busy_timeout=10000", "_pragma=temp_store(memory)"}, params...)...))
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// checkColumns has nothing to compare: virtual columns are what their body says.
func (*sqliteDB) checkColumns(context.Context, querier, int64, int64) error { return nil }

// checkPages has SQLite compare the indexes with the table, page by page.
func (*sqliteDB) checkPages(ctx context.Context, c *sql.Conn) error {
	var found []string
	if err := each(ctx, c, func(rows *sql.Rows) error {
		var s string
		err := rows.Scan(&s)
		found = append(found, s)
		return err
	}, "PRAGMA integrity_check(5)"); err != nil {
		return err
	}
	if len(found) != 1 || found[0] != "ok" {
		return fmt.Errorf("%w: the database's pages: %s", ErrMismatch, strings.Join(found, "; "))
	}
	return nil
}
