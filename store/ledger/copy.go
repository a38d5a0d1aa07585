package ledger

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
)

// ErrNotEmpty is wrapped where a ledger is to be copied to where there is one.
var ErrNotEmpty = errors.New("there is a ledger already")

// copyRows is how many entries are copied in one transaction.
const copyRows = maxBatch

// besideTable is a table that hangs on the entries.
type besideTable struct {
	name, columns string
	by            string // the column of numbers that its rows are read by; empty: all at once
}

var (
	checkpointTable = besideTable{"checkpoints", "size, note", "size"}
	sealedTable     = besideTable{"sealed", "idx, field, box", "idx"}
	openTable       = besideTable{"open_requests", "request, state", ""}
)

func (b besideTable) selects() string { return "SELECT " + b.columns + " FROM " + b.name }

// Copy copies the ledger's database at from to to and compares the copy with
// it; both are the directory of a recorder or a PostgreSQL connection string, as
// IsPostgres knows one. Then it hashes the copy whole and holds it against the
// newest checkpoint, which v verifies, and which it returns. Memory is constant.
// progress, where it is set, is told of the steps done, of the total; an entry
// is one step when it is copied and one when it is verified.
//
// No recorder may have from open (ErrLocked), and to must be empty (ErrNotEmpty).
// An error that wraps ErrMismatch says that from, and so the copy, is not whole.
// Head file and keys file are not part of the database: they stay where they
// are, or are copied as files. A directory that has no head file yet is given
// one, once everything is verified.
//
// The newest checkpoint is copied last. A crash before leaves entries without
// it: Open refuses that as a mismatch, Copy as not empty. Drop the schema, or
// remove ledger.db, and copy again.
func Copy(ctx context.Context, from, to string, v *store.LogVerifier, progress func(done, total int64)) (checkpoint string, err error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	source, err := openCopy(ctx, from, true)
	if err != nil {
		return "", fmt.Errorf("the ledger to copy: %w", err)
	}
	defer func() { err = errors.Join(err, source.release()) }()
	target, err := openCopy(ctx, to, false)
	if err != nil {
		return "", fmt.Errorf("where to copy it: %w", err)
	}
	defer func() { err = errors.Join(err, target.release()) }()
	target.verifier, source.verifier = v, v

	h, err := source.newestCheckpoint(ctx, source.wr.conn)
	if err != nil {
		return "", fmt.Errorf("the ledger to copy: %w", source.e.class(err))
	}
	if h == nil {
		return "", fmt.Errorf("%w: there is nothing to copy", ErrMismatch)
	}
	if err := target.copyFrom(ctx, source, h, func(n int64) { progress(n, 2*h.size) }); err != nil {
		return "", target.e.class(source.e.class(err))
	}
	if err := target.verifyCopy(ctx, source, h, func(n int64) { progress(h.size+n, 2*h.size) }); err != nil {
		return "", target.e.class(source.e.class(err))
	}
	if target.headFile.path != "" {
		if _, err := os.Stat(target.headFile.path); errors.Is(err, os.ErrNotExist) {
			if err := target.headFile.write(h); err != nil {
				return "", fmt.Errorf("writing the head file: %w", err)
			}
		}
	}
	return h.note, nil
}

// openCopy claims the database at where, and no more of a Ledger.
func openCopy(ctx context.Context, where string, there bool) (l *Ledger, err error) {
	l = &Ledger{o: Options{Log: zap.NewNop()}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.release())
		}
	}()
	if IsPostgres(where) {
		l.o.Postgres = where
	} else {
		l.o.Dir = where
		if _, err := os.Stat(filepath.Join(where, "ledger.db")); err != nil && there {
			return l, err
		}
		if err := os.MkdirAll(where, 0o700); err != nil {
			return l, err
		}
		if l.lock, err = lockDir(filepath.Join(where, "lock")); err != nil {
			return l, err
		}
		l.headFile.path = filepath.Join(where, "head")
	}
	if l.e, err = newEngine(&l.o); err != nil {
		return l, err
	}
	if l.w, l.r, err = l.e.open(); err != nil {
		return l, err
	}
	if err = l.claim(ctx); err == nil && !there {
		err = l.e.ensureSchema(ctx, l.wr.conn)
	}
	return l, l.e.class(err)
}

// copyFrom copies everything that source holds, whose head is h.
func (l *Ledger) copyFrom(ctx context.Context, source *Ledger, h *head, progress func(int64)) error {
	for _, table := range []string{"entries", "hashes", "checkpoints", "sealed", "open_requests"} {
		var some bool
		if err := l.wr.conn.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM "+table+")").Scan(&some); err != nil {
			return err
		}
		if some {
			return fmt.Errorf("%w: table %s holds rows", ErrNotEmpty, table)
		}
	}
	signed := int64(0) // checkpoints below this size are copied
	for next := int64(0); next < h.size; {
		end := min(next+copyRows, h.size)
		var es, hashes []any
		for s, err := range entries(ctx, source.wr.conn, next, end, true) {
			if err != nil {
				return err
			}
			es, hashes = append(es, s.Index, string(s.Leaf)), append(hashes, s.Index, s.Nodes)
		}
		if err := l.inTransaction(ctx, func() error {
			if err := l.e.insert(ctx, &l.wr, "entries (idx, body)", 2, es, ""); err != nil {
				return err
			}
			if err := l.e.insert(ctx, &l.wr, "hashes (idx, nodes)", 2, hashes, ""); err != nil {
				return err
			}
			if err := l.copyRows(ctx, source, sealedTable, " WHERE idx >= $1 AND idx < $2 ORDER BY idx", next, end); err != nil {
				return err
			}
			// Below what is now held: so that no checkpoint signs all of a copy that
			// is not whole.
			err := l.copyRows(ctx, source, checkpointTable, " WHERE size >= $1 AND size < $2 ORDER BY size", signed, end)
			signed = end
			return err
		}); err != nil {
			return err
		}
		next = end
		progress(next)
	}
	return l.inTransaction(ctx, func() error {
		if err := l.copyRows(ctx, source, openTable, ""); err != nil {
			return err
		}
		return l.copyRows(ctx, source, checkpointTable, " WHERE size >= $1 ORDER BY size", signed)
	})
}

// inTransaction commits what fn writes.
func (l *Ledger) inTransaction(ctx context.Context, fn func() error) error {
	if err := l.wr.exec(ctx, l.e.begin()); err != nil {
		return err
	}
	err := fn()
	if err == nil {
		err = l.wr.exec(ctx, "COMMIT")
	}
	if err != nil {
		_, _ = l.wr.conn.ExecContext(context.WithoutCancel(ctx), "ROLLBACK") // fails where it is rolled back already
	}
	return err
}

// copyBytes is how many bytes of rows are held before they are written: the texts
// of policies are long.
const copyBytes = 8 << 20

// copyRows copies rows of one of the tables beside.
func (l *Ledger) copyRows(ctx context.Context, source *Ledger, b besideTable, where string, args ...any) error {
	var values []any
	size := 0
	write := func() error {
		err := l.e.insert(ctx, &l.wr, b.name+" ("+b.columns+")", strings.Count(b.columns, ",")+1, values, "")
		values, size = nil, 0
		return err
	}
	if err := each(ctx, source.wr.conn, func(rows *sql.Rows) error {
		row, err := scanRow(rows)
		if err != nil {
			return err
		}
		values = append(values, row...)
		for _, v := range row {
			switch v := v.(type) {
			case []byte:
				size += len(v)
			case string:
				size += len(v)
			}
		}
		if size < copyBytes {
			return nil
		}
		return write()
	}, b.selects()+where, args...); err != nil {
		return err
	}
	return write()
}

// scanRow reads a row of columns that are int64, string or []byte.
func scanRow(rows *sql.Rows) ([]any, error) {
	names, err := rows.Columns()
	if err != nil {
		return nil, err
	}
	row, into := make([]any, len(names)), make([]any, len(names))
	for i := range row {
		into[i] = &row[i]
	}
	if err := rows.Scan(into...); err != nil {
		return nil, err
	}
	return row, nil
}

// verifyCopy compares everything with source and hashes it whole.
func (l *Ledger) verifyCopy(ctx context.Context, source *Ledger, h *head, progress func(int64)) error {
	var f frontier
	var buf []byte
	for s, err := range entries(ctx, l.wr.conn, 0, h.size, true) {
		if err != nil {
			return err
		}
		if buf = f.add(buf[:0], store.LeafHash(s.Leaf)); !bytes.Equal(buf, s.Nodes) {
			return fmt.Errorf("%w: entry %d does not have the stored hashes", ErrMismatch, s.Index)
		}
		if f.size%copyRows == 0 {
			progress(f.size)
		}
	}
	if f.root() != h.root {
		return fmt.Errorf("%w: the entries do not add up to the signed checkpoint of %d entries", ErrMismatch, h.size)
	}
	copied, err := l.newestCheckpoint(ctx, l.wr.conn)
	if err != nil {
		return err
	}
	if copied == nil || copied.note != h.note {
		return fmt.Errorf("%w: the copy's newest checkpoint is not the one that was copied", ErrMismatch)
	}
	for _, b := range []besideTable{checkpointTable, sealedTable, openTable} {
		want, err := source.digest(ctx, b, h.size)
		if err != nil {
			return err
		}
		got, err := l.digest(ctx, b, h.size)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%w: table %s of the copy is not what was copied", ErrMismatch, b.name)
		}
	}
	progress(h.size)
	return nil
}

// digest is over all rows of one of the tables beside, in their order.
func (l *Ledger) digest(ctx context.Context, b besideTable, size int64) (sum [sha256.Size]byte, err error) {
	d := sha256.New()
	take := func(rows *sql.Rows) error {
		row, err := scanRow(rows)
		for _, v := range row {
			text := fmt.Appendf(nil, "%s", v)
			if n, ok := v.(int64); ok {
				text = strconv.AppendInt(nil, n, 10)
			}
			d.Write(binary.BigEndian.AppendUint64(nil, uint64(len(text))))
			d.Write(text)
		}
		return err
	}
	if b.by == "" {
		err = each(ctx, l.wr.conn, take, b.selects()+" ORDER BY 1")
	}
	for next := int64(0); b.by != "" && next <= size && err == nil; next += copyRows {
		err = each(ctx, l.wr.conn, take, b.selects()+" WHERE "+b.by+" >= $1 AND "+b.by+" < $2 ORDER BY 1, 2", next, next+copyRows)
	}
	return [sha256.Size]byte(d.Sum(nil)), err
}
