package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"os"
	"strings"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/tlog"
)

// Stored is one entry as it is stored.
type Stored struct {
	Index  int64
	Leaf   []byte                   // the exact stored bytes
	Nodes  []byte                   // the stored tree hashes of this row, leaf hash first; Reader alone sets it
	Sealed map[string]store.Opening // the texts that are not erased; Export alone sets it
	Entry  *store.Entry             // what the leaf says; Export alone sets it
}

// chunk is how many rows are read at a time where many are: a short read
// transaction each, so that the WAL can be reset in between.
const chunk = 512

// Entries iterates over the stored entries [from, to) in order. It stops at the
// first error; a missing entry is one.
func (l *Ledger) Entries(ctx context.Context, from, to int64) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		for s, err := range entries(ctx, l.r, from, to, false) {
			if err != nil {
				yield(Stored{}, l.readErr(err))
				return
			}
			if !yield(s, nil) {
				return
			}
		}
	}
}

// Export is Entries with the texts behind commitments, as an evidence bundle
// needs them.
func (l *Ledger) Export(ctx context.Context, from, to int64) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		for ; from < to; from += chunk {
			var batch []Stored
			parsed := map[int64]*store.Entry{}
			for s, err := range l.Entries(ctx, from, min(from+chunk, to)) {
				if err != nil {
					yield(Stored{}, err)
					return
				}
				e, err := store.ParseLeaf(s.Leaf)
				if err != nil {
					yield(Stored{}, l.readErr(fmt.Errorf("%w: entry %d: %w", ErrMismatch, s.Index, err)))
					return
				}
				parsed[s.Index] = e
				batch = append(batch, s)
			}
			for len(batch) > 0 {
				n := together(len(batch), func(i int) *store.Entry { return parsed[batch[i].Index] })
				part := map[int64]*store.Entry{}
				for _, s := range batch[:n] {
					part[s.Index] = parsed[s.Index]
				}
				opened, err := l.openings(ctx, l.r, part)
				if err != nil {
					yield(Stored{}, l.readErr(err))
					return
				}
				for _, s := range batch[:n] {
					s.Sealed, s.Entry = opened[s.Index], parsed[s.Index]
					if !yield(s, nil) {
						return
					}
				}
				batch = batch[n:]
			}
		}
	}
}

// together is how many of n entries have their texts read at once: those of a
// policy are long (store.MaxSubmission), so that it is read alone.
func together(n int, entry func(int) *store.Entry) int {
	for i := range n {
		if e := entry(i); e != nil && e.Type == store.PolicyLoaded {
			return max(i, 1)
		}
	}
	return n
}

// entries reads [from, to) in chunks, with the stored nodes on demand.
func entries(ctx context.Context, q querier, from, to int64, nodes bool) iter.Seq2[Stored, error] {
	query := "SELECT idx, body, NULL FROM entries WHERE idx >= $1 AND idx < $2 ORDER BY idx"
	if nodes {
		query = "SELECT e.idx, e.body, h.nodes FROM entries e LEFT JOIN hashes h ON h.idx = e.idx WHERE e.idx >= $1 AND e.idx < $2 ORDER BY e.idx"
	}
	return func(yield func(Stored, error) bool) {
		next := from
		for next < to {
			end := min(next+chunk, to)
			more := true
			err := each(ctx, q, func(rows *sql.Rows) error {
				var s Stored
				if err := rows.Scan(&s.Index, &s.Leaf, &s.Nodes); err != nil {
					return err
				}
				if s.Index != next {
					return fmt.Errorf("%w: entry %d is missing", ErrMismatch, next)
				}
				next++
				if more = yield(s, nil); !more {
					return errStop
				}
				return nil
			}, query, next, end)
			if err == nil && next != end {
				err = fmt.Errorf("%w: entry %d is missing", ErrMismatch, next)
			}
			if !more {
				return
			}
			if err != nil {
				yield(Stored{}, err)
				return
			}
		}
	}
}

// errStop ends a query whose rows nobody wants any more.
var errStop = errors.New("stop")

// Reader reads a ledger's database without a key and without believing any of
// it: what offline verification starts from.
type Reader struct {
	db *sql.DB
	e  engine
}

// ReadOnly opens the ledger's database for reading: a PostgreSQL connection
// string, as IsPostgres knows one, or the path of a database file. A recorder
// may have it open; a file may be a copy without its -wal file.
func ReadOnly(from string) (*Reader, error) {
	if !IsPostgres(from) {
		return readDatabase(from)
	}
	p, err := newPostgres(from, zap.NewNop())
	if err != nil {
		return nil, err
	}
	db := p.openReader(2)
	if err := db.Ping(); err != nil {
		db.Close()
		return nil, p.class(err)
	}
	return &Reader{db, p}, nil
}

// IsPostgres reports whether a ledger named s lies in PostgreSQL: s is a
// postgres:// or postgresql:// URL.
func IsPostgres(s string) bool {
	return strings.HasPrefix(s, "postgres://") || strings.HasPrefix(s, "postgresql://")
}

func readDatabase(path string) (*Reader, error) {
	e := &sqliteDB{}
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	db, err := openDB(path, 2, "mode=ro", "_query_only=1")
	if err != nil {
		return nil, err
	}
	_, err = db.Exec("SELECT 1 FROM sqlite_master")
	if wal, werr := os.Stat(path + "-wal"); err != nil && (werr != nil || wal.Size() == 0) {
		// On a read-only medium SQLite cannot make the -shm file that a WAL
		// database wants. Without a -wal file there is nothing in it to miss.
		db.Close()
		if db, err = openDB(path, 2, "immutable=1", "mode=ro", "_query_only=1"); err != nil {
			return nil, err
		}
		_, err = db.Exec("SELECT 1 FROM sqlite_master")
	}
	if err != nil {
		db.Close()
		return nil, e.class(fmt.Errorf("opening %s: %w", path, err))
	}
	return &Reader{db, e}, nil
}

// Close closes the database.
func (r *Reader) Close() error { return r.db.Close() }

// Size is one more than the highest index of an entry.
func (r *Reader) Size(ctx context.Context) (n int64, err error) {
	err = r.db.QueryRowContext(ctx, "SELECT coalesce(max(idx) + 1, 0) FROM entries").Scan(&n)
	return n, r.e.class(err)
}

// Entries iterates over [from, to) in order, with the stored hashes. It stops at
// the first error; a missing entry is one, and wraps ErrMismatch.
func (r *Reader) Entries(ctx context.Context, from, to int64) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		for s, err := range entries(ctx, r.db, from, to, true) {
			if !yield(s, r.e.class(err)) {
				return
			}
		}
	}
}

// ReadHashes implements tlog.HashReader over the stored hashes.
func (r *Reader) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	hs, err := readHashes(context.Background(), r.e, r.db, indexes)
	return hs, r.e.class(err)
}

// Checkpoints iterates over the stored signed checkpoints by tree size.
func (r *Reader) Checkpoints(ctx context.Context) iter.Seq2[int64, string] {
	return func(yield func(int64, string) bool) {
		_ = each(ctx, r.db, func(rows *sql.Rows) error {
			var size int64
			var n string
			if err := rows.Scan(&size, &n); err != nil {
				return err
			}
			if !yield(size, n) {
				return errStop
			}
			return nil
		}, "SELECT size, note FROM checkpoints ORDER BY size")
	}
}

// Checkpoint is the newest stored signed checkpoint, empty where there is none.
func (r *Reader) Checkpoint(ctx context.Context) (string, error) {
	var n string
	err := r.db.QueryRowContext(ctx, "SELECT note FROM checkpoints ORDER BY size DESC LIMIT 1").Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return n, r.e.class(err)
}

// concerning is the list of types that writers may follow, for SQL.
var concerning = func() string {
	var in []string
	for _, t := range []store.Type{
		store.StepRequested, store.StepFinished, store.RequestWithdrawn, store.RequestVoid,
		store.ApprovalRequested, store.ApprovalDecided, store.ApprovalExpired, store.ApprovalStanding,
		store.CredentialIssuing, store.CredentialIssued, store.CredentialFailed, store.CredentialAbandoned,
		store.CredentialUsed, store.CredentialRevoked, store.CredentialExpired, store.AccessRefused, store.AlertRaised,
		store.FreezeSet, store.FreezeLifted, store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked,
		store.SlackLinked, store.PolicyLoaded, store.WriterAdded, store.ExportCreated, store.DetailsErased,
		store.HoldPlaced, store.HoldLifted,
	} {
		if t.Concerns() {
			in = append(in, "'"+string(t)+"'")
		}
	}
	return "(" + strings.Join(in, ", ") + ")"
}()
