package postgres

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/countersign-dev/countersign/store"
)

func TestAPortalOfExecuteGoesOnWithWhatItBeganWithThoughTheNameMeansAnotherNow(t *testing.T) {
	w := serve(t, masked(store.MaskRule{Column: "orders.email"})).wire()
	w.send(&pgproto3.Query{String: "begin"})
	w.until('Z')
	w.send(&pgproto3.Parse{Name: "a", Query: "select 'x' || email from orders"}, &pgproto3.Parse{Name: "e", Query: "execute a"},
		&pgproto3.Bind{PreparedStatement: "e", DestinationPortal: "p"}, &pgproto3.Execute{Portal: "p", MaxRows: 1}, &pgproto3.Sync{})
	got := w.until('Z')
	w.send(&pgproto3.Close{ObjectType: 'S', Name: "a"}, &pgproto3.Parse{Name: "a", Query: "select customer from orders"}, &pgproto3.Sync{})
	got += w.until('Z')
	w.send(&pgproto3.Execute{Portal: "p"}, &pgproto3.Sync{})
	if got += w.until('Z'); strings.Contains(got, "canary") || !strings.Contains(got, "55000") {
		t.Errorf("the rest of a masked statement's rows: %s", got)
	}
}

func TestAPortalOfFetchGoesOnWithWhatItBeganWithThoughTheNameMeansAnotherNow(t *testing.T) {
	w := serve(t, masked(store.MaskRule{Column: "orders.email"})).wire()
	w.send(&pgproto3.Query{String: "begin"})
	w.until('Z')
	w.send(&pgproto3.Parse{Query: "select 'x' || email from orders"}, &pgproto3.Bind{DestinationPortal: "c"},
		&pgproto3.Parse{Name: "f", Query: "fetch all from c"}, &pgproto3.Bind{PreparedStatement: "f", DestinationPortal: "p"}, &pgproto3.Execute{Portal: "p", MaxRows: 1}, &pgproto3.Sync{})
	got := w.until('Z')
	w.send(&pgproto3.Query{String: "close c; declare c cursor for select body from notes"})
	got += w.until('Z')
	w.send(&pgproto3.Execute{Portal: "p"}, &pgproto3.Sync{})
	if got += w.until('Z'); strings.Contains(got, "canary") || !strings.Contains(got, "55000") {
		t.Errorf("the rest of a masked cursor's rows: %s", got)
	}
}

func TestAPreparedExecuteIsMaskedByTheTypesOfWhatItsNameMeansNow(t *testing.T) {
	for _, format := range []int16{0, 1} {
		w := serve(t, masked(store.MaskRule{Field: "email"})).wire()
		for _, was := range []string{"select 1", "select 'x'::text"} {
			w.send(&pgproto3.Parse{Name: "a", Query: was}, &pgproto3.Parse{Name: "e", Query: "execute a"}, &pgproto3.Sync{})
			got := w.until('Z')
			w.send(&pgproto3.Close{ObjectType: 'S', Name: "a"}, &pgproto3.Parse{Name: "a", Query: "select doc from orders"}, &pgproto3.Sync{})
			got += w.until('Z')
			w.send(&pgproto3.Bind{PreparedStatement: "e", ResultFormatCodes: []int16{format}}, &pgproto3.Execute{}, &pgproto3.Sync{})
			if got += w.until('Z'); strings.Contains(got, "canary") || !strings.Contains(got, "[masked]") {
				t.Errorf("documents after %s, format %d: %s", was, format, got)
			}
			w.send(&pgproto3.Close{ObjectType: 'S', Name: "a"}, &pgproto3.Close{ObjectType: 'S', Name: "e"}, &pgproto3.Sync{})
			w.until('Z')
		}
	}
}
