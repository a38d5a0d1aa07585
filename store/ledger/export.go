package ledger

import (
	"context"

	"golang.org/x/mod/sumdb/tlog"
)

// Hashes reads the stored hashes of the whole log, up to Head: what an export
// needs where the newest checkpoint is not published yet. Errors wrap
// store.ErrUnavailable. It is safe for concurrent use.
func (l *Ledger) Hashes(ctx context.Context) tlog.HashReader { return l.hashReader(ctx) }
