package ledger

import (
	"crypto/x509"
	"database/sql"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

func TestTheConnectionStringsCertificatesAreReadAnewForEachSession(t *testing.T) {
	sharedServer(t) // or the test is skipped
	s, err := postgrestest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	data, err := os.Stat(s.Data())
	if err != nil {
		t.Fatal(err)
	}
	owner := data.Sys().(*syscall.Stat_t)
	admin, err := sql.Open("pgx", s.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	admin.SetMaxOpenConns(1) // it stays, whatever the server asks of others
	present := func(ca *trusttest.CA) {
		t.Helper()
		crt, key := filepath.Join(s.Data(), "server.crt"), filepath.Join(s.Data(), "server.key")
		trusttest.Write(t, ca.Issue(t, x509.Certificate{}), crt, key)
		for _, f := range []string{crt, key} {
			if err := os.Chown(f, int(owner.Uid), int(owner.Gid)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := admin.Exec("alter system set ssl = on"); err != nil {
			t.Fatal(err)
		}
		if _, err := admin.Exec("select pg_reload_conf()"); err != nil {
			t.Fatal(err)
		}
	}
	first, next := trusttest.NewCA(t), trusttest.NewCA(t)
	present(first)
	roots := filepath.Join(t.TempDir(), "roots.pem")
	trusttest.WriteCAs(t, roots, first.Cert)
	dsn, err := url.Parse(s.DSN)
	if err != nil {
		t.Fatal(err)
	}
	q := dsn.Query()
	q.Set("sslmode", "verify-full")
	q.Set("sslrootcert", roots)
	dsn.RawQuery, dsn.Host = q.Encode(), "localhost:"+dsn.Port()
	p, err := newPostgres(dsn.String(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	db := p.openReader(1)
	defer db.Close()
	db.SetMaxIdleConns(-1)                       // each ping is a session of its own
	until := func(what string, fn func() bool) { // the server reads its files a moment after it is told to
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	until("no session by the first certificate", func() bool { return db.Ping() == nil })
	trusttest.Replace(t, roots, []byte("-----BEGIN CERTIFICATE-----")) // half-written
	if err := db.Ping(); err != nil {
		t.Errorf("a file that cannot be read took the old out of force: %v", err)
	}
	present(next)
	until("the old authority still counts", func() bool { return db.Ping() != nil })
	trusttest.WriteCAs(t, roots, next.Cert)
	if err := db.Ping(); err != nil {
		t.Error(err)
	}
}
