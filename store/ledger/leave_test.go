package ledger

import (
	"context"
	"database/sql"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

// broken answers every query with a row that cannot be read, as a caller who
// goes between a row's arrival and its reading makes it.
type broken struct{ querier }

func (b broken) QueryContext(ctx context.Context, _ string, _ ...any) (*sql.Rows, error) {
	return b.querier.QueryContext(ctx, "SELECT 'no index', 'reason', 'no box'")
}

func TestARowThatCannotBeReadEndsTheReadWithAnError(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.say(l, "r", "low", "why")
	const i = 7 // not the zero of a number that was not read
	e := &store.Entry{ID: store.NewID(), Sealed: map[string]string{store.SealedReason: "x"}}
	if _, err := l.openings(t.Context(), broken{l.r}, map[int64]*store.Entry{i: e}); err == nil {
		t.Error("no error")
	}
}
