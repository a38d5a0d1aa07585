package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
	"github.com/jackc/pgx/v5"
)

// engineName is which engine a test runs over.
type engineName string

const (
	onSQLite   engineName = "sqlite"
	onPostgres engineName = "postgres"
)

// onBoth runs fn over each engine.
func onBoth(t *testing.T, fn func(t *testing.T, on engineName)) {
	for _, on := range []engineName{onSQLite, onPostgres} {
		t.Run(string(on), func(t *testing.T) { fn(t, on) })
	}
}

// server is the one that the tests share, each with a schema of its own.
var server = sync.OnceValues(func() (*postgrestest.Server, error) {
	s, err := postgrestest.Start("max_connections=200")
	if err == nil {
		err = query(s.DSN, "CREATE ROLE recorder LOGIN; CREATE ROLE owner LOGIN; GRANT CREATE ON DATABASE postgres TO owner")
		started.Store(s)
	}
	return s, err
})

var (
	started atomic.Pointer[postgrestest.Server]
	schemas atomic.Int64
)

func stopServer() {
	if filledFirst != nil {
		os.RemoveAll(filledFirst.o.Dir)
	}
	if s := started.Load(); s != nil {
		s.Remove()
	}
}

// newSchema has the owner make a ledger's schema and returns the connection
// string of a recorder that may only do what the owner let it.
func newSchema(t testing.TB) string {
	t.Helper()
	return newSchemaIn(t, sharedServer(t))
}

func sharedServer(t testing.TB) *postgrestest.Server {
	t.Helper()
	s, err := server()
	if errors.Is(err, postgrestest.ErrNotInstalled) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newSchemaIn(t testing.TB, s *postgrestest.Server) string {
	t.Helper()
	schema := fmt.Sprintf("ledger_%d", schemas.Add(1))
	if err := InitPostgres(context.Background(), dsnAs(s.DSN, "owner", schema), "recorder"); err != nil {
		t.Fatal(err)
	}
	return dsnAs(s.DSN, "recorder", schema)
}

// dsnAs is dsn for another user and schema.
func dsnAs(dsn, user, schema string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err)
	}
	u.User = url.User(user)
	q := u.Query()
	q.Set("search_path", schema)
	u.RawQuery = q.Encode()
	return u.String()
}

// superuser is the connection string of somebody who may do anything to the
// fixture's database.
func (f *fixture) superuser() string {
	p, err := newPostgres(f.o.Postgres, nil)
	if err != nil {
		panic(err)
	}
	return dsnAs(f.o.Postgres, "postgres", p.schema)
}

// query runs statements by the simple protocol.
func query(dsn, statements string) error {
	c, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		return err
	}
	defer c.Close(context.Background())
	_, err = c.PgConn().Exec(context.Background(), statements).ReadAll()
	return err
}

func (f *fixture) postgres() *postgres {
	p, err := newPostgres(f.o.Postgres, nil)
	if err != nil {
		panic(err)
	}
	return p
}

// dump writes the fixture's schema to a file, as pg_dump does for a backup.
func (f *fixture) dump() string {
	f.t.Helper()
	s := sharedServer(f.t)
	out, err := s.Command("pg_dump", "-d", s.DSN, "-n", f.postgres().schema).Output()
	if err != nil {
		f.t.Fatal(err)
	}
	path := filepath.Join(f.t.TempDir(), "dump.sql")
	if err := os.WriteFile(path, out, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// restore puts a dump in the place of the fixture's schema.
func (f *fixture) restore(dump string) {
	f.t.Helper()
	if err := query(f.superuser(), "DROP SCHEMA "+f.postgres().schema+" CASCADE"); err != nil {
		f.t.Fatal(err)
	}
	cmd := sharedServer(f.t).Command("psql", "-qXd", sharedServer(f.t).DSN, "-v", "ON_ERROR_STOP=1")
	cmd.Stdin = bytes.NewReader(readFile(f.t, dump))
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
}

var (
	filledOnce  sync.Once
	filledFirst *fixture
)

// cloneFilled is a copy of one ledger that is filled for all tests, since to
// fill one takes a while.
func cloneFilled(t *testing.T) *fixture {
	sharedServer(t)
	filledOnce.Do(func() {
		dir, err := os.MkdirTemp("", "filled")
		if err != nil {
			t.Fatal(err)
		}
		f := newFixtureOn(t, onPostgres)
		f.o.Dir = dir
		filledFirst = fill(t, f)
	})
	if filledFirst == nil {
		t.Fatal("the ledger to copy was not filled")
	}
	f := &fixture{t: t, on: onPostgres, o: filledFirst.o, verify: filledFirst.verify, now: filledFirst.now}
	f.o.Dir, f.o.Postgres, f.o.Now = t.TempDir(), newSchema(t), f.clock
	for _, name := range []string{"head", "details-keys.db"} {
		copyFile(t, filepath.Join(filledFirst.o.Dir, name), filepath.Join(f.o.Dir, name))
	}
	from, to := filledFirst.postgres().schema, f.postgres().schema
	for _, table := range []string{"entries (idx, body)", "hashes (idx, nodes)", "checkpoints (size, note)", "open_requests (request, state)", "sealed (idx, field, box)"} {
		name, columns, _ := strings.Cut(table, " ")
		columns = strings.Trim(columns, "()")
		if err := query(f.superuser(), "INSERT INTO "+to+"."+table+" SELECT "+columns+" FROM "+from+"."+name+" ORDER BY 1"); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// where is what ReadOnly takes.
func (f *fixture) where() string {
	if f.on == onPostgres {
		return f.o.Postgres
	}
	return f.path()
}

// serverFiles is a directory with all files of a server, its WAL too, as they
// are on disk.
func serverFiles(t *testing.T, s *postgrestest.Server) string {
	t.Helper()
	to, n, wal := t.TempDir(), 0, 0
	if err := filepath.WalkDir(s.Data(), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // gone meanwhile
		}
		if filepath.Base(filepath.Dir(path)) == "pg_wal" {
			wal++
		}
		n++
		return os.Symlink(path, filepath.Join(to, fmt.Sprintf("%d-%s", n, d.Name())))
	}); err != nil {
		t.Fatal(err)
	}
	if wal == 0 {
		t.Fatal("the server has no WAL")
	}
	return to
}

// A file of a bare password in the place of one with a connection string is soon
// mistaken, and its refusal is logged.
func TestARefusedConnectionStringIsNotRepeated(t *testing.T) {
	for _, dsn := range []string{
		"planted", "password = planted host=db sslmode=bogus", "password=a planted host=db", "postgres://user:planted@db:1x/l", "postgres://user:planted%zz@db/l", "user=`: planted password=x sslmode=bogus",
	} {
		if p, err := newPostgres(dsn, zap.NewNop()); err == nil {
			t.Errorf("%q is taken: %v", dsn, p.schema)
		} else if strings.Contains(err.Error(), "planted") {
			t.Errorf("%q: %v", dsn, err)
		}
	}
}
