package store

import "errors"

// ErrUnavailable is wrapped by every failure to reach or to use the ledger.
// Whoever meets it issues nothing.
var ErrUnavailable = errors.New("ledger unavailable")

// ErrConflict refuses an entry whose ID is on record with other bytes.
var ErrConflict = errors.New("entry id is on record with other bytes")
