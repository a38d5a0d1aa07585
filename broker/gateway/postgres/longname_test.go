package postgres

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/countersign-dev/countersign/store"
)

func TestNamesThatPostgreSQLWouldClipAreRefused(t *testing.T) {
	w := serve(t, masked(store.MaskRule{Column: "orders.email"})).wire()
	long := strings.Repeat("n", 63)
	w.send(&pgproto3.Parse{Name: long + "a", Query: "select 'x'::text"}, &pgproto3.Sync{})
	got := w.until('Z')
	w.send(&pgproto3.Close{ObjectType: 'S', Name: long + "b"}, &pgproto3.Parse{Name: long + "b", Query: "select 'x' || email from orders"}, &pgproto3.Sync{})
	got += w.until('Z')
	w.send(&pgproto3.Bind{PreparedStatement: long + "a"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	got += w.until('Z')
	if strings.Contains(got, "canary") || !strings.Contains(got, "42622") {
		t.Errorf("two names that PostgreSQL takes for one: %s", got)
	}
}
