package witness

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

// schema: one row per log is the latest checkpoint cosigned of it. That it only
// moves forward is refused by the database too, whatever the code above it does.
const schema = `
CREATE TABLE IF NOT EXISTS heads (
	origin TEXT PRIMARY KEY,
	size   INTEGER NOT NULL,
	root   TEXT NOT NULL,
	note   TEXT NOT NULL,
	at     TEXT NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS heads_only_forward BEFORE UPDATE ON heads
WHEN NEW.origin <> OLD.origin OR NEW.size < OLD.size OR (NEW.size = OLD.size AND NEW.root <> OLD.root)
BEGIN SELECT RAISE(ABORT, 'a witness does not go back'); END;
CREATE TRIGGER IF NOT EXISTS heads_stay BEFORE DELETE ON heads
BEGIN SELECT RAISE(ABORT, 'a witness does not forget'); END;
CREATE TABLE IF NOT EXISTS forks (
	id     INTEGER PRIMARY KEY,
	origin TEXT NOT NULL,
	kind   TEXT NOT NULL,
	seen   TEXT NOT NULL,
	size   INTEGER NOT NULL, -- of shown
	root   TEXT NOT NULL,
	kept   TEXT NOT NULL,
	shown  TEXT NOT NULL,
	UNIQUE (origin, size, root, kept)
) STRICT;`

// maxForks is how many pieces of evidence are kept per log and kind, the first
// ones: whoever can sign for a log could otherwise fill the disk with them.
const maxForks = 64

// state is what a witness keeps on disk. It is safe for concurrent use, also by
// several processes.
type state struct{ db *sql.DB }

func openState(dir string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "witness.db")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) // before SQLite makes it with the umask's mode
	if err != nil {
		return nil, err
	}
	f.Close()
	// One connection: every transaction is serial within the process, and
	// BEGIN IMMEDIATE makes it so across processes.
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+
		"?_busy_timeout=10000&_journal_mode=WAL&_synchronous=FULL&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	if _, err := db.Exec(schema); err != nil {
		db.Close()
		return nil, fmt.Errorf("witness state %s: %w", path, err)
	}
	return &state{db}, nil
}

func (s *state) close() error { return s.db.Close() }

// Head is the latest checkpoint that a witness cosigned of a log.
type Head struct {
	Origin     string    `json:"origin"`
	Size       int64     `json:"size"`
	Root       string    `json:"root"`       // base64
	Checkpoint string    `json:"checkpoint"` // the note as the log signed it
	At         time.Time `json:"at"`         // of the latest change
}

// Kinds of evidence.
const (
	// ForkTwoHeads: the log signed two trees of one size. The two notes prove it
	// to anyone who has the log's key.
	ForkTwoHeads = "two-heads"
	// ForkUnproved: a checkpoint that the log signed came with a proof that does
	// not lead to it from the one kept. The sender may have erred, since a
	// checkpoint is public; what settles it is a proof from the log.
	ForkUnproved = "unproved"
)

// Fork is evidence: two checkpoints, both signed by the log, of which no proof
// says that they are of one tree.
type Fork struct {
	Origin string    `json:"origin"`
	Kind   string    `json:"kind"`
	Seen   time.Time `json:"seen"`
	Kept   string    `json:"kept"`  // the checkpoint that was cosigned
	Shown  string    `json:"shown"` // the one that was refused
}

// conflict is the answer where the old size is not that of the checkpoint
// cosigned last, or the log has another tree of that size, which is a fork.
type conflict struct {
	size int64
	fork bool
}

func (c *conflict) Error() string {
	return fmt.Sprintf("the checkpoint cosigned last is of %d entries", c.size)
}

var errProof = errors.New("the consistency proof does not lead from the checkpoint cosigned last to this one")

// advance makes r the latest checkpoint of its log where it continues the one
// before, in one transaction: two requests at one time are taken one after the
// other. r's signature must be verified. Once it returns nil the change is on
// disk. A crash before that leaves the head before; a crash after it, before
// the cosignature is answered, leaves a head that nobody holds a cosignature
// of: the log asks again from its size and gets one.
func (s *state) advance(ctx context.Context, r *request, now time.Time) (err error) {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreDone(tx.Rollback()))
		}
	}()
	c := r.checkpoint
	kept, err := head(ctx, tx, c.Origin)
	if err != nil {
		return err
	}
	root := c.Hash.String()
	refuse := func(kind string, cause error) error {
		if err := evidence(ctx, tx, &Fork{Origin: c.Origin, Kind: kind, Seen: now, Kept: kept.Checkpoint, Shown: r.note}, c); err != nil {
			return err
		}
		if err := tx.Commit(); err != nil {
			return err
		}
		return cause
	}
	if kept.Checkpoint != "" && c.N == kept.Size && root != kept.Root {
		return refuse(ForkTwoHeads, &conflict{size: kept.Size, fork: true})
	}
	if r.old != kept.Size {
		return &conflict{size: kept.Size}
	}
	if r.old == 0 {
		// Every tree begins with the empty one, which has one root alone.
		if len(r.proof) != 0 || c.N == 0 && c.Hash != emptyRoot {
			return errProof
		}
	} else {
		old, err := tlog.ParseHash(kept.Root)
		if err != nil {
			return fmt.Errorf("witness state: %w", err)
		}
		if tlog.CheckTree(r.proof, c.N, c.Hash, r.old, old) != nil {
			return refuse(ForkUnproved, errProof)
		}
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO heads (origin, size, root, note, at) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (origin) DO UPDATE SET size = excluded.size, root = excluded.root, note = excluded.note, at = excluded.at`,
		c.Origin, c.N, root, r.note, now.UTC().Format(time.RFC3339)); err != nil {
		return err
	}
	// What came with a bad proof before, and now is proved, was no fork.
	if _, err := tx.ExecContext(ctx, "DELETE FROM forks WHERE origin = ? AND kind = ? AND size = ? AND root = ?", c.Origin, ForkUnproved, c.N, root); err != nil {
		return err
	}
	return tx.Commit()
}

// ignoreDone is err, but for the one that says that a refusal was committed.
func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

// emptyRoot is the root of the tree without leaves (RFC 6962, section 2.1).
var emptyRoot = func() tlog.Hash {
	h, err := tlog.TreeHash(0, tlog.HashReaderFunc(func([]int64) ([]tlog.Hash, error) { return nil, nil }))
	if err != nil {
		panic(err) // reads nothing
	}
	return h
}()

type rower interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// head is the latest checkpoint of a log, the zero Head where there is none.
func head(ctx context.Context, q rower, origin string) (Head, error) {
	h, at := Head{Origin: origin}, ""
	err := q.QueryRowContext(ctx, "SELECT size, root, note, at FROM heads WHERE origin = ?", origin).Scan(&h.Size, &h.Root, &h.Checkpoint, &at)
	if errors.Is(err, sql.ErrNoRows) {
		return h, nil
	}
	if err == nil {
		h.At, err = time.Parse(time.RFC3339, at)
	}
	return h, err
}

func evidence(ctx context.Context, tx *sql.Tx, f *Fork, shown torchwood.Checkpoint) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO forks (origin, kind, seen, size, root, kept, shown)
		SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE (SELECT count(*) FROM forks WHERE origin = ?1 AND kind = ?2) < ?8
		ON CONFLICT DO NOTHING`,
		f.Origin, f.Kind, f.Seen.UTC().Format(time.RFC3339), shown.N, shown.Hash.String(), f.Kept, f.Shown, maxForks)
	return err
}

// heads are the latest checkpoints of all logs, forks the evidence of all.
func (s *state) heads(ctx context.Context) ([]Head, error) {
	rows, err := s.db.QueryContext(ctx, "SELECT origin, size, root, note, at FROM heads ORDER BY origin")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	list := []Head{}
	for rows.Next() {
		var h Head
		var at string
		if err := rows.Scan(&h.Origin, &h.Size, &h.Root, &h.Checkpoint, &at); err != nil {
			return nil, err
		}
		if h.At, err = time.Parse(time.RFC3339, at); err != nil {
			return nil, err
		}
		list = append(list, h)
	}
	return list, rows.Err()
}

func (s *state) forks(ctx context.Context) ([]Fork, error) {
	rows, err := s.db.QueryContext(ctx, "SELECT origin, kind, seen, kept, shown FROM forks ORDER BY id")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	list := []Fork{}
	for rows.Next() {
		var f Fork
		var at string
		if err := rows.Scan(&f.Origin, &f.Kind, &at, &f.Kept, &f.Shown); err != nil {
			return nil, err
		}
		if f.Seen, err = time.Parse(time.RFC3339, at); err != nil {
			return nil, err
		}
		list = append(list, f)
	}
	return list, rows.Err()
}
