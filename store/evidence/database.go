package evidence

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store/ledger"
)

// Database is a log as it lies in a ledger's database: for when its recorder
// refuses to run, or is not to be asked.
type Database struct{ r *ledger.Reader }

// OpenDatabase opens the ledger at path for reading: a database file, the
// directory of one, a PostgreSQL connection string, as ledger.IsPostgres knows
// one, or a file that holds such a string.
func OpenDatabase(path string) (*Database, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "ledger.db")
	} else if err == nil && info.Size() < maxDSN {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnchecked, err)
		}
		if ledger.IsPostgres(string(text)) {
			path = strings.TrimRight(string(text), "\r\n")
		}
	}
	r, err := ledger.ReadOnly(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnchecked, err)
	}
	return &Database{r}, nil
}

// maxDSN bounds a file that holds a connection string, in bytes. A database is
// larger.
const maxDSN = 4096

// Close closes the database.
func (d *Database) Close() error { return d.r.Close() }

// Checkpoint implements Source. A database without one has lost it, or is
// none: that is for the signature check to say.
func (d *Database) Checkpoint(ctx context.Context) (string, error) { return d.r.Checkpoint(ctx) }

// Tile implements Source. A hash that is not there is read as zero, so that
// the others are still compared.
func (d *Database) Tile(ctx context.Context, t tlog.Tile) ([]byte, error) {
	data := make([]byte, 0, t.W*tlog.HashSize)
	level, first := t.L*torchwood.TileHeight, t.N*torchwood.TileWidth
	indexes := make([]int64, t.W)
	for i := range indexes {
		indexes[i] = tlog.StoredHashIndex(level, first+int64(i))
	}
	hashes, err := d.r.ReadHashes(indexes)
	if err == nil {
		for _, h := range hashes {
			data = append(data, h[:]...)
		}
		return data, nil
	}
	for _, x := range indexes {
		var h tlog.Hash
		if one, err := d.r.ReadHashes([]int64{x}); err == nil {
			h = one[0]
		}
		data = append(data, h[:]...)
	}
	return data, ctx.Err()
}

// Entries implements Source. An entry that is not there is nil.
func (d *Database) Entries(ctx context.Context, t tlog.Tile) ([][]byte, error) {
	leaves := make([][]byte, t.W)
	first := t.N * torchwood.TileWidth
	for next := first; next < first+int64(t.W); {
		for s, err := range d.r.Entries(ctx, next, first+int64(t.W)) {
			if err != nil {
				break
			}
			leaves[s.Index-first] = s.Leaf
			next = s.Index + 1
		}
		next++ // past the one that is missing or cannot be read
	}
	return leaves, ctx.Err()
}
