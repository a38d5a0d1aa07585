package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"strings"

	_ "modernc.org/sqlite" // the engine, pure Go
)

// column is a column of entries that the database generates from the stored
// body, so that it cannot disagree with the leaf.
type column struct {
	name, path string
	indexed    bool
}

// columns are what History filters by. They are virtual: the table holds the
// body alone, their values lie in the indexes. An empty string counts as NULL,
// and the indexes leave NULL out. An index on a column is in effect one on
// (column, idx), so that a filter is served in the order of idx. time needs no
// index: it never decreases with idx, and is found by bisection.
var columns = []column{
	{"id", "$.id", true},
	{"time", "$.time", false},
	{"type", "$.type", true},
	{"request", "$.request", true},
	{"step", "$.step", true},
	{"run", "$.run", true},
	{"orchestrator", "$.orchestrator", true},
	{"scope", "$.action", true},
	{"target", "$.resource", true},
	{"person", "$.person", true},
	{"subject", "$.subject.id", true},
	{"outcome", "$.decision.outcome", true},
}

// schema returns the statements that make an empty ledger. Open compares them
// with what the database says of itself, so that a trigger that was taken away
// is noticed.
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
func schema() []string {
	var table strings.Builder
	table.WriteString("CREATE TABLE entries (idx INTEGER PRIMARY KEY, body TEXT NOT NULL")
	for _, c := range columns {
		fmt.Fprintf(&table, ", %s TEXT GENERATED ALWAYS AS (nullif(json_extract(body, '%s'), '')) VIRTUAL", c.name, c.path)
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

// ensureSchema makes the schema in an empty database and compares it in any
// other. All of it is one transaction: a crash leaves an empty database.
func ensureSchema(ctx context.Context, c *sql.Conn) error {
	rows, err := c.QueryContext(ctx, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
	if err != nil {
		return err
	}
	defer rows.Close()
	found := map[string]string{}
	for rows.Next() {
		var name, stmt string
		if err := rows.Scan(&name, &stmt); err != nil {
			return err
		}
		found[stmt] = name
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if len(found) > 0 {
		for _, s := range schema() {
			if _, ok := found[s]; !ok {
				return fmt.Errorf("%w: the database's schema was altered: missing %q", ErrMismatch, strings.SplitN(s, "(", 2)[0])
			}
			delete(found, s)
		}
		for _, name := range found {
			return fmt.Errorf("%w: the database's schema was altered: %q is not part of it", ErrMismatch, name)
		}
		return nil
	}
	stmts := append([]string{"BEGIN IMMEDIATE", fmt.Sprintf("PRAGMA application_id = %d", applicationID)}, schema()...)
	for _, s := range append(stmts, "COMMIT") {
		if _, err := c.ExecContext(ctx, s); err != nil {
			return fmt.Errorf("making the ledger's schema: %w", err)
		}
	}
	return nil
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
