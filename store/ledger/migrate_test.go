package ledger

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
)

// earlierDir holds a ledger that the program wrote as of commit 945637a, before
// there was an access path: requests issued, revoked, approved, waiting and
// live, with texts and their keys.
const earlierDir = "testdata/schema1"

// newEarlierOn is a fixture over that ledger.
func newEarlierOn(t *testing.T, on engineName) *fixture {
	t.Helper()
	f := &fixture{t: t, on: on, now: time.Date(2026, 11, 24, 0, 30, 0, 0, time.UTC)}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(earlierDir, name))
		if err == nil && strings.HasSuffix(name, ".gz") {
			var z *gzip.Reader
			if z, err = gzip.NewReader(bytes.NewReader(b)); err == nil {
				b, err = io.ReadAll(z)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var err error
	f.o = Options{Dir: t.TempDir(), PrivacyKey: make([]byte, 32), Now: f.clock, RecheckEvery: -1, PublishEvery: 10 * time.Millisecond}
	skey := strings.TrimSpace(string(read("log.key")))
	if f.o.Signer, err = note.NewSigner(skey); err != nil {
		t.Fatal(err)
	}
	f.o.Verifier = earlierKey
	if f.verify, err = store.NewLogVerifier(earlierKey); err != nil {
		t.Fatal(err)
	}
	put := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(f.o.Dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("head", read("head"))
	put("details-keys.db", read("details-keys.db"))
	if on == onSQLite {
		put("ledger.db", read("ledger.db.gz"))
		return f
	}
	// The dump's schema takes the place of one that the owner made.
	f.o.Postgres = newSchema(t)
	schema := f.postgres().schema
	if err := query(f.superuser(), "DROP SCHEMA "+schema+" CASCADE"); err != nil {
		t.Fatal(err)
	}
	dump := regexp.MustCompile(`\bcountersign\.(entries|hashes|checkpoints|sealed|open_requests|keep)`).ReplaceAllString(string(read("ledger.sql.gz")), schema+".$1")
	dump = strings.Replace(dump, "CREATE SCHEMA countersign;", "CREATE SCHEMA "+schema+" AUTHORIZATION owner; SET ROLE owner;", 1)
	cmd := sharedServer(t).Command("psql", "-qXd", sharedServer(t).DSN, "-v", "ON_ERROR_STOP=1")
	cmd.Stdin = strings.NewReader(dump)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("psql: %v: %s", err, out)
	}
	if err := InitPostgres(t.Context(), f.owner(), "recorder"); err != nil {
		t.Fatal(err)
	}
	return f
}

const earlierKey = "countersign.demo/dev+a58abc85+AUGnBiwl/PVJ3HUQU+p4MZMjOBzS2rbddCFUpJe5kKey"

// owner is the connection string of who owns the fixture's schema.
func (f *fixture) owner() string { return dsnAs(f.o.Postgres, "owner", f.postgres().schema) }

// bodies are all entries, hashes and checkpoints as they are stored.
func (f *fixture) bodies() []string {
	f.t.Helper()
	db := f.raw()
	defer db.Close()
	var all []string
	for _, q := range []string{"SELECT idx, body FROM entries ORDER BY 1", "SELECT idx, nodes FROM hashes ORDER BY 1", "SELECT size, note FROM checkpoints ORDER BY 1"} {
		rows, err := db.Query(q)
		if err != nil {
			f.t.Fatal(err)
		}
		for rows.Next() {
			var n int64
			var b []byte
			if err := rows.Scan(&n, &b); err != nil {
				f.t.Fatal(err)
			}
			all = append(all, fmt.Sprintf("%d %x", n, b))
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			f.t.Fatal(err)
		}
	}
	return all
}

// appendOnly fails where an entry can be changed or taken away.
func (f *fixture) appendOnly() {
	f.t.Helper()
	db := f.raw()
	defer db.Close()
	for _, q := range []string{"UPDATE entries SET body = body", "DELETE FROM entries", "UPDATE checkpoints SET note = note", "DELETE FROM hashes"} {
		if _, err := db.Exec(q); err == nil || !strings.Contains(err.Error(), "only appended") {
			f.t.Errorf("%s: %v", q, err)
		}
	}
}

func TestALedgerOfAnEarlierVersionGoesOnAndVerifies(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newEarlierOn(t, on)
		before := f.bodies()
		l := f.open()
		if l.Size() != 20 {
			t.Fatalf("%d entries", l.Size())
		}
		open, err := l.OpenSet(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		f.check(open)
		types := map[store.Type]int{}
		for _, e := range open.Entries {
			x, err := store.ParseLeaf(e.Leaf)
			if err != nil {
				t.Fatal(err)
			}
			types[x.Type]++
		}
		if types[store.ApprovalRequested] != 2 || types[store.ApprovalDecided] != 1 || types[store.CredentialIssued] != 3 {
			t.Errorf("of what is open there are %v", types)
		}
		page, err := l.History(t.Context(), Query{Run: "run-1"})
		if err != nil {
			t.Fatal(err)
		}
		texts := ""
		for _, e := range page.Entries {
			texts += fmt.Sprint(e.Opened)
		}
		for _, text := range []string{"an old reason", "user:eve", "to be approved", "fine"} {
			if !strings.Contains(texts, text) {
				t.Errorf("the text %q cannot be read", text)
			}
		}
		f.append(l, used("after"))
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		after := f.bodies()
		for _, b := range before {
			if !slices.Contains(after, b) {
				t.Fatal("something of the log is not what it was")
			}
		}
		f.appendOnly()
		f.open()
	})
}

// notesMigration is one that a later version might have.
var notesMigration = migration{
	sqlite: []string{"CREATE TABLE notes (idx INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT", "CREATE INDEX entries_writer ON entries (idx) WHERE type = 'writer.added'"},
	postgres: []string{
		"CREATE TABLE {schema}.notes (idx bigint PRIMARY KEY, note text COLLATE \"C\" NOT NULL)",
		"CREATE INDEX entries_writer ON {schema}.entries (idx) WHERE type = 'writer.added'",
	},
	describes: map[string]string{
		"relation notes": "r p f f f", "column notes.idx": "bigint t ", "column notes.note": "text C t ",
		"index notes_pkey": "CREATE UNIQUE INDEX notes_pkey ON {schema}.notes USING btree (idx) t t", "constraint notes_pkey": "PRIMARY KEY (idx) t",
		"index entries_writer": `CREATE INDEX entries_writer ON {schema}.entries USING btree (idx) WHERE (type = 'writer.added'::text) t t`,
	},
}

// initOwner is `countersign ledger init` of a program with the given migrations.
func (f *fixture) initOwner(list []migration) error {
	if f.on == onSQLite {
		return nil
	}
	p, err := newPostgres(f.owner(), f.o.Log)
	if err != nil {
		return err
	}
	p.migrations = list
	return p.init(f.t.Context(), "recorder")
}

func TestAMigrationAddsBesideTheLogAndTouchesNoEntry(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newEarlierOn(t, on)
		before := f.bodies()
		f.appendOnly()
		now, later := f.o, f.o
		later.migrations = []migration{notesMigration}
		if on == onPostgres {
			if _, err := Open(t.Context(), later); !errors.Is(err, ErrOlder) || !strings.Contains(err.Error(), "countersign ledger init") {
				t.Fatalf("a role that may only append brought the schema up: %v", err)
			}
		}
		if err := f.initOwner(later.migrations); err != nil {
			t.Fatal(err)
		}
		for range 2 { // again, nothing is left to do
			f.o = later
			l := f.open()
			f.append(l, used("later"))
			if err := l.recheck(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		after := f.bodies()
		for _, b := range before {
			if !slices.Contains(after, b) {
				t.Fatal("something of the log is not what it was")
			}
		}
		f.appendOnly()
		db := f.raw()
		defer db.Close()
		if _, err := db.Exec("SELECT note FROM notes"); err != nil {
			t.Error(err)
		}

		// The program before it knows nothing of that, and says so.
		f.o = now
		if _, err := Open(t.Context(), f.o); !errors.Is(err, ErrNewer) || errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "its schema is 2, this program knows 1") {
			t.Errorf("an older program opened it: %v", err)
		}
		if got := f.bodies(); !slices.Equal(got, after) {
			t.Error("an older program changed it")
		}
		f.o = later
		f.open()
	})
}

func TestAMigrationThatFailsHalfwayLeavesTheOldSchemaWhole(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newEarlierOn(t, on)
		before := f.bodies()
		broken := notesMigration
		broken.sqlite = append(slices.Clone(broken.sqlite), "CREATE TABLE entries (x INTEGER) STRICT")
		broken.postgres = append(slices.Clone(broken.postgres), "CREATE TABLE {schema}.entries (x bigint)")
		old := f.o
		f.o.migrations = []migration{broken}
		err := f.initOwner(f.o.migrations)
		if on == onSQLite {
			_, err = Open(t.Context(), f.o)
		}
		if err == nil || !strings.Contains(err.Error(), "already exists") {
			t.Fatalf("got %v", err)
		}
		f.o = old
		l := f.open()
		f.append(l, used("as-before"))
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := f.bodies(); len(got) <= len(before) {
			t.Error("nothing was appended")
		}
		f.appendOnly()
	})
}

func TestANewLedgerHasTheNewestSchemaAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		f.o.migrations = []migration{notesMigration}
		if err := f.initOwner(f.o.migrations); err != nil {
			t.Fatal(err)
		}
		f.append(f.open(), used("r"))
		db := f.raw()
		defer db.Close()
		if _, err := db.Exec("SELECT note FROM notes"); err != nil {
			t.Error(err)
		}
	})
}

func TestAMigrationThatDoesMoreThanAddIsRefused(t *testing.T) {
	for _, s := range []string{"DROP TRIGGER entries_keep", "UPDATE entries SET body = ''", "ALTER TABLE entries ADD x text", "DELETE FROM hashes", "CREATE OR REPLACE FUNCTION keep() RETURNS trigger", "INSERT INTO entries VALUES (1)"} {
		if err := checkMigrations([]migration{{sqlite: []string{s}}}); err == nil {
			t.Errorf("%s was taken", s)
		}
		if err := checkMigrations([]migration{{postgres: []string{s}}}); err == nil {
			t.Errorf("%s was taken", s)
		}
	}
	if err := checkMigrations(migrations); err != nil {
		t.Error(err)
	}
}

func TestASchemaVersionThatNobodyWroteIsAMismatch(t *testing.T) {
	for comment, want := range map[string]int{"": 1, schemaComment + "1": 1, schemaComment + "12": 12, schemaComment: 0, schemaComment + "0": 0, "7": 0, "ours": 0} {
		got, err := commentVersion(comment)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("%q is version %d: %v", comment, got, err)
		}
	}
}
