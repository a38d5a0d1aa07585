package evidence

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

func TestALedgerInPostgreSQLVerifiesAndTamperingWithItIsNamed(t *testing.T) {
	s, err := postgrestest.Start()
	if errors.Is(err, postgrestest.ErrNotInstalled) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer s.Remove()
	o, key, half := stock(t)
	u, err := url.Parse(s.DSN)
	if err != nil {
		t.Fatal(err)
	}
	u.RawQuery += "&search_path=evidence"
	if _, err := ledger.Copy(t.Context(), o.Dir, u.String(), key, nil); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ledger.dsn")
	if err := os.WriteFile(file, []byte(u.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, place := range []string{u.String(), file} {
		if r := check(t, place, key, half); !r.OK() || r.Size != entriesInTests || r.Leaves != entriesInTests || r.Since == 0 {
			t.Fatalf("%+v", r)
		}
	}
	c, err := pgx.Connect(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	for _, q := range []string{
		"DROP TRIGGER entries_keep ON entries",
		`UPDATE entries SET body = replace(body, '"rows":"one"', '"rows":"two"') WHERE idx = 17`,
	} {
		if _, err := c.Exec(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	r := check(t, u.String(), key, half)
	if !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Kind == KindLeaf && f.Index == 17 }) {
		t.Fatalf("%+v", r.Findings)
	}
}
