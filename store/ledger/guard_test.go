package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// logIn connects as user, past the ledger.
func (f *fixture) logIn(user string) *pgx.Conn {
	f.t.Helper()
	c, err := pgx.Connect(context.Background(), dsnAs(f.o.Postgres, user, f.postgres().schema))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// contents is all of the log, to compare.
func contents(t *testing.T, c *pgx.Conn) (s string) {
	t.Helper()
	if err := c.QueryRow(t.Context(), "SELECT (SELECT string_agg(idx || body || id, ',' ORDER BY idx) FROM entries) || (SELECT string_agg(idx || encode(nodes, 'hex'), ',' ORDER BY idx) FROM hashes) || (SELECT string_agg(size || note, ',' ORDER BY size) FROM checkpoints)").Scan(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

// rewrites are statements that change what is on record, or add what is no
// append.
var rewrites = []string{
	"UPDATE entries SET body = body",
	"UPDATE entries SET idx = idx + 10 WHERE false",
	"UPDATE hashes SET nodes = nodes",
	"UPDATE checkpoints SET note = note",
	"DELETE FROM entries", "DELETE FROM entries WHERE idx = 2", "DELETE FROM hashes", "DELETE FROM checkpoints",
	"TRUNCATE entries", "TRUNCATE hashes", "TRUNCATE checkpoints", "TRUNCATE entries, hashes, checkpoints",
	"INSERT INTO entries (idx, body) SELECT idx, body FROM entries ON CONFLICT (idx) DO UPDATE SET body = '{}'",
	"INSERT INTO entries (idx, body) SELECT 3, body FROM entries WHERE idx = 1 ON CONFLICT (id) DO UPDATE SET body = '{}'",
	"INSERT INTO hashes SELECT idx, nodes FROM hashes ON CONFLICT (idx) DO UPDATE SET nodes = excluded.nodes",
	"INSERT INTO checkpoints SELECT size, note FROM checkpoints ON CONFLICT (size) DO UPDATE SET note = 'x'",
	"MERGE INTO entries e USING (SELECT 2 AS idx) x ON e.idx = x.idx WHEN MATCHED THEN DELETE",
	"MERGE INTO entries e USING (SELECT 2 AS idx) x ON e.idx = x.idx WHEN MATCHED THEN UPDATE SET body = '{}'",
	"INSERT INTO entries (idx, body) SELECT 3, body FROM entries WHERE idx = 1",                                // an id twice
	"INSERT INTO entries (idx, body) SELECT 4, replace(body, '\"id\":\"0', '\"id\":\"1') FROM entries LIMIT 1", // a gap
	"INSERT INTO entries (idx, body) SELECT -1, replace(body, '\"id\":\"0', '\"id\":\"1') FROM entries LIMIT 1",
	"INSERT INTO entries (idx, body) VALUES (3, '{}')",
	"INSERT INTO entries (idx, body, run) VALUES (3, '{\"id\":\"x\"}', 'other')",
	"INSERT INTO entries (idx, body, run) OVERRIDING SYSTEM VALUE VALUES (3, '{\"id\":\"x\"}', 'other')",
	"INSERT INTO hashes SELECT 4, nodes FROM hashes WHERE idx = 1",
	"INSERT INTO hashes VALUES (3, '\\x00')",
	"INSERT INTO checkpoints VALUES (2, 'x')",
	"INSERT INTO checkpoints VALUES (-1, 'x')",
	// Tables of one's own in front of the ledger's.
	"CREATE TEMP TABLE hashes (idx bigint); CREATE TEMP TABLE entries (idx bigint); SET search_path = pg_temp; INSERT INTO SCHEMA.entries (idx, body) SELECT 4, replace(body, '\"id\":\"0', '\"id\":\"1') FROM SCHEMA.entries LIMIT 1",
}

func TestTheRecordersRoleCanOnlyAppendToTheLogInPostgreSQL(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	l := f.open()
	f.append(l, used("r1"), used("r2"))
	f.append(l, used("r3"))
	l.Close()
	for user, statements := range map[string][]string{
		"recorder": append([]string{
			"ALTER TABLE entries DISABLE TRIGGER ALL", "ALTER TABLE entries DISABLE TRIGGER entries_keep", "DROP TRIGGER entries_keep ON entries",
			"CREATE TRIGGER mine BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
			"DROP TABLE checkpoints", "DROP SCHEMA SCHEMA CASCADE", "ALTER TABLE entries OWNER TO recorder", "ALTER TABLE entries RENAME TO old",
			"ALTER TABLE entries ALTER COLUMN run DROP EXPRESSION", "DROP INDEX entries_run", "CREATE TABLE more (x int)", "ALTER TABLE entries SET UNLOGGED",
			"CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'", "DROP FUNCTION keep CASCADE",
			"SET session_replication_role = replica", "SET ROLE owner", "GRANT UPDATE ON entries TO recorder; UPDATE entries SET body = body", "CREATE RULE mine AS ON INSERT TO entries DO INSTEAD NOTHING",
			"ALTER TABLE entries ENABLE ROW LEVEL SECURITY", "UPDATE sealed SET box = ''", "TRUNCATE sealed", "TRUNCATE open_requests", "COMMENT ON TABLE entries IS 'mine'",
			"COPY entries TO PROGRAM 'true'", "LOCK TABLE entries IN ACCESS EXCLUSIVE MODE",
		}, rewrites...),
		// The triggers hold for who could take them away, too.
		"owner":    rewrites,
		"postgres": append([]string{"SET session_replication_role = replica; DELETE FROM entries", "SET session_replication_role = replica; UPDATE entries SET body = body"}, rewrites...),
	} {
		t.Run(user, func(t *testing.T) {
			before := contents(t, f.logIn("postgres"))
			for _, q := range statements {
				c := f.logIn(user)
				if _, err := c.PgConn().Exec(t.Context(), strings.ReplaceAll(q, "SCHEMA.", f.postgres().schema+".")).ReadAll(); err == nil {
					t.Errorf("%s was not refused", q)
				}
				c.Close(t.Context())
				if contents(t, f.logIn("postgres")) != before {
					t.Fatalf("%s changed the log", q)
				}
			}
		})
	}
	l = f.open()
	f.append(l, used("after"))
	if err := l.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestAnAlteredSchemaInPostgreSQLStopsTheStartAndTheRunningLedger(t *testing.T) {
	for name, alter := range map[string]string{
		"a trigger dropped":             "DROP TRIGGER entries_keep ON entries",
		"an append trigger dropped":     "DROP TRIGGER checkpoints_append ON checkpoints",
		"a trigger disabled":            "ALTER TABLE hashes DISABLE TRIGGER hashes_keep",
		"a trigger for origin alone":    "ALTER TABLE hashes ENABLE TRIGGER hashes_keep",
		"a trigger for some statements": "DROP TRIGGER entries_keep ON entries; CREATE TRIGGER entries_keep BEFORE UPDATE OR DELETE ON entries FOR EACH STATEMENT EXECUTE FUNCTION keep(); ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_keep",
		"a condition on a trigger":      "DROP TRIGGER entries_keep ON entries; CREATE TRIGGER entries_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON entries FOR EACH STATEMENT WHEN (current_user <> 'postgres') EXECUTE FUNCTION keep(); ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_keep",
		"a function that lets pass":     "CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
		"a setting on a function":       "ALTER FUNCTION keep() SET search_path = public",
		"a trigger of one's own":        "CREATE TRIGGER mine BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
		"a rule":                        "CREATE RULE mine AS ON INSERT TO checkpoints DO ALSO NOTHING",
		"row level security":            "ALTER TABLE entries ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON entries USING (run <> 'x')",
		"a column that stays as it is":  "ALTER TABLE entries ALTER COLUMN run DROP EXPRESSION",
		"a further column":              "ALTER TABLE entries ADD COLUMN x int",
		"an index dropped":              "DROP INDEX entries_run",
		"an index on other rows":        "DROP INDEX entries_run; CREATE INDEX entries_run ON entries (run, idx) WHERE run <> 'run-x'",
		"the primary key dropped":       "ALTER TABLE checkpoints DROP CONSTRAINT checkpoints_pkey",
		"a check dropped":               "ALTER TABLE hashes DROP CONSTRAINT hashes_nodes_check",
		"a table without WAL":           "ALTER TABLE sealed SET UNLOGGED",
		"a child table":                 "CREATE TABLE child () INHERITS (checkpoints)",
		"a view in place of a table":    "ALTER TABLE sealed RENAME TO hidden; CREATE VIEW sealed AS SELECT * FROM hidden; GRANT ALL ON sealed TO recorder",
		"a table of one's own":          "CREATE TABLE more (x int)",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixtureOn(t, onPostgres)
			l := f.open()
			f.append(l, used("r"))
			if err := query(f.superuser(), alter); err != nil {
				t.Fatal(err)
			}
			if err := l.e.class(l.recheck(t.Context())); !errors.Is(err, ErrMismatch) {
				t.Errorf("the background check of the running ledger: %v", err)
			}
			l.Close()
			f.refuses()
		})
	}
}

func TestAnIndexThatHidesAnEntryInPostgreSQLIsFound(t *testing.T) {
	f := filled(t, onPostgres)
	// A row that one index is not told of.
	if err := query(f.superuser(), `UPDATE pg_index SET indisready = false WHERE indexrelid = 'entries_run'::regclass;
		INSERT INTO entries (idx, body) SELECT 120, replace(body, '"id":"0', '"id":"1') FROM entries WHERE idx = 119;
		UPDATE pg_index SET indisready = true WHERE indexrelid = 'entries_run'::regclass`); err != nil {
		t.Fatal(err)
	}
	p := f.postgres()
	db := f.raw()
	defer db.Close()
	c, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := p.checkPages(t.Context(), c); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "entries_run") {
		t.Fatalf("got %v", err)
	}
}

func TestAColumnThatDisagreesWithItsBodyInPostgreSQLIsFound(t *testing.T) {
	f := filled(t, onPostgres)
	f.tamper(func(e func(string, ...any)) {
		// The expression taken off, as if a superuser had put it back in the catalogue.
		e("ALTER TABLE entries ALTER COLUMN run DROP EXPRESSION")
		e("UPDATE entries SET run = 'other' WHERE idx = 9")
	})
	db := f.raw()
	defer db.Close()
	if err := f.postgres().checkColumns(t.Context(), db, 0, tamperEntries); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "entry 9") {
		t.Fatalf("got %v", err)
	}
}

func TestAServerThatWouldLoseAcknowledgedEntriesIsRefused(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	dsn := f.o.Postgres
	f.o.Postgres = dsn + "&synchronous_commit=off"
	if _, err := Open(t.Context(), f.o); err == nil || !strings.Contains(err.Error(), "synchronous_commit") {
		t.Fatalf("synchronous_commit off: %v", err)
	}
	// What the role's own defaults say does not count: the session sets it.
	if err := query(f.superuser(), "ALTER ROLE recorder SET synchronous_commit = off"); err != nil {
		t.Fatal(err)
	}
	defer query(f.superuser(), "ALTER ROLE recorder RESET synchronous_commit")
	f.o.Postgres = dsn
	f.open().Close()
	for _, setting := range []string{"fsync=off", "full_page_writes=off"} {
		s, err := postgrestest.Start(setting)
		if err != nil {
			t.Fatal(err)
		}
		f.o.Postgres = s.DSN
		if _, err := Open(t.Context(), f.o); err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(setting, "=off")) {
			t.Errorf("%s: %v", setting, err)
		}
		s.Remove()
	}
}

func TestARoleThatMayNotMakeTheSchemaIsToldWhoMay(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	f.o.Postgres = dsnAs(f.o.Postgres, "recorder", "nowhere")
	if _, err := Open(t.Context(), f.o); err == nil || !strings.Contains(err.Error(), "countersign ledger init") {
		t.Fatalf("got %v", err)
	}
	// Who may make it does, and is told what that means.
	core, log := observer.New(zap.WarnLevel)
	f.o.Postgres, f.o.Log = dsnAs(f.o.Postgres, "owner", "made_at_once"), zap.New(core)
	l := f.open()
	f.append(l, used("r"))
	l.Close()
	f.open()
	if log.FilterMessageSnippet("could take their triggers away").Len() != 1 {
		t.Errorf("said: %v", log.All())
	}
}

func TestALedgerPutBackToAnOlderDumpIsNoticedAndANewerOneGoesOn(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	l := f.open()
	s := used("r1")
	s.Seal("reason", "because")
	f.append(l, s)
	f.append(l, used("r2"))
	old := f.dump()
	f.append(l, used("r3"))
	head := filepath.Join(t.TempDir(), "head")
	l.Close()
	now := f.dump()
	copyFile(t, filepath.Join(f.o.Dir, "head"), head)
	f.restore(old)
	f.refuses()
	// What pg_dump wrote is the ledger, to the schema's last letter.
	f.restore(now)
	l = f.open()
	if err := l.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.append(l, used("r4"))
	p, err := l.History(t.Context(), Query{Run: "r1"})
	if err != nil || p.Entries[0].Opened["reason"] != "because" {
		t.Fatalf("sealed texts: %v, %v", p, err)
	}
}

func TestABaseBackupTakenUnderLoadIsAWholePrefixAndOlderThanTheHead(t *testing.T) {
	f := newFixtureOn(t, onPostgres)
	f.o.Now = time.Now
	l := f.open()
	w := startLoad(t, l)
	w.more(50)
	b, err := sharedServer(t).Backup()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Remove()
	w.more(50)
	w.end()
	head := l.Head()
	l.Close()
	g := f.beside()
	g.o.Postgres = dsnAs(b.DSN, "recorder", f.postgres().schema)
	g.refuses() // by the head file, which signs more
	// On its own, with the checkpoint that it ends with, it is a whole log.
	r, err := ReadOnly(g.o.Postgres)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	note, err := r.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.o.Dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(g.o.Dir, "head"), []byte(note), 0o600); err != nil {
		t.Fatal(err)
	}
	copyFile(t, filepath.Join(f.o.Dir, "details-keys.db"), filepath.Join(g.o.Dir, "details-keys.db"))
	restored := g.open()
	if err := restored.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := restored.Size(); n < 50 || n >= int64(len(w.acked)) {
		t.Fatalf("%d entries in the backup, %d in all", n, len(w.acked))
	}
	// And the log that went on continues it.
	f.continues(f.open(), note)
	if c, err := f.verify.Checkpoint(head); err != nil || c.N != int64(len(w.acked)) {
		t.Fatal(c, err)
	}
}

func TestACopyByVacuumIntoIsALedgerAndOneTakenEarlierIsRefused(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.append(l, used("r1"))
	vacuum := func() string {
		to := filepath.Join(t.TempDir(), "backup.db")
		db := f.raw()
		defer db.Close()
		if _, err := db.Exec("VACUUM INTO ?", to); err != nil {
			t.Fatal(err)
		}
		return to
	}
	old := vacuum() // while the recorder runs
	f.append(l, used("r2"))
	now := vacuum()
	l.Close()
	copyFile(t, old, f.path())
	f.refuses()
	copyFile(t, now, f.path())
	l = f.open()
	if err := l.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.append(l, used("r3"))
}

func TestAnEntryThatTheDatabaseRefusesSpoilsNoOther(t *testing.T) {
	f := newFixture(t) // SQLite's JSON goes 1,000 levels deep
	commits, proceed := make(chan struct{}), make(chan struct{})
	first := true
	f.o.Now = func() time.Time {
		if first { // asked by the writing goroutine
			first = false
			close(commits)
			<-proceed
		}
		return f.clock()
	}
	opened := f.opening()
	// Open asks for the time too: it is let pass.
	<-commits
	close(proceed)
	l := f.opened(opened)
	// The door refuses such an entry by itself: it is put in the queue behind it.
	deep := &group{ctx: t.Context(), by: broker, lines: make([]line, 1), done: make(chan struct{})}
	if err := deep.lines[0].parse(wire(t, used("deep"))[0], broker.Name); err != nil {
		t.Fatal(err)
	}
	deep.lines[0].sub.Details = jsontext.Value(`{"a":` + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + "}")
	var err error
	if deep.lines[0].leaf, err = deep.lines[0].sub.Stamp(broker.Name, stampTime); err != nil {
		t.Fatal(err)
	}
	commits, proceed, first = make(chan struct{}), make(chan struct{}), true
	results := make(chan error, 4)
	send := func(s *store.Submission) {
		lines := wire(t, s)
		go func() {
			_, err := l.Append(context.Background(), broker, lines)
			results <- err
		}()
	}
	send(used("first"))
	<-commits // the next ones are one batch
	send(used("a"))
	go func() {
		l.queue <- deep
		<-deep.done
		results <- deep.err
	}()
	send(used("b"))
	for len(l.queue) < 3 {
		time.Sleep(time.Millisecond)
	}
	close(proceed)
	refused := 0
	for range 4 {
		if err := <-results; errors.Is(err, store.ErrMalformed) {
			refused++
		} else if err != nil {
			t.Error(err)
		}
	}
	if refused != 1 || l.Size() != 3 {
		t.Fatalf("%d refused, %d entries", refused, l.Size())
	}
	if err := l.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
}
