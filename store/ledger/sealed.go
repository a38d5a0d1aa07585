package ledger

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/countersign-dev/countersign/store"
)

// saltSize is the length of an opening's salt, see store.Commit.
const saltSize = 32

// sealedText is one encrypted opening: a 12-byte nonce and AES-256-GCM over
// salt and text, bound to the entry's id and the field.
type sealedText struct {
	field string
	box   []byte
}

// sealTexts encrypts the openings of s under one fresh key for the entry.
func sealTexts(s *store.Submission) (key []byte, boxes []sealedText) {
	if len(s.Openings) == 0 {
		return nil, nil
	}
	key = make([]byte, 32)
	rand.Read(key) // never fails since Go 1.24
	aead := newAEAD(key)
	for field, o := range s.Openings {
		nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+saltSize+len(o.Text)+aead.Overhead())
		rand.Read(nonce)
		plain := append(append(make([]byte, 0, saltSize+len(o.Text)), o.Salt...), o.Text...)
		boxes = append(boxes, sealedText{field, aead.Seal(nonce, nonce, plain, boxContext(s.ID, field))})
	}
	return key, boxes
}

func newAEAD(key []byte) cipher.AEAD {
	b, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the key is 32 bytes long
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic(err) // AES has the block size that GCM needs
	}
	return a
}

func boxContext(id, field string) []byte {
	return []byte("countersign/sealed/v1\x00" + id + "\x00" + field)
}

// openBox decrypts one opening.
func openBox(key, box []byte, id, field string) (store.Opening, error) {
	if len(key) != 32 {
		return store.Opening{}, errors.New("not a key")
	}
	aead := newAEAD(key)
	if len(box) < aead.NonceSize() {
		return store.Opening{}, errors.New("sealed text is cut short")
	}
	plain, err := aead.Open(nil, box[:aead.NonceSize()], box[aead.NonceSize():], boxContext(id, field))
	if err != nil || len(plain) < saltSize {
		return store.Opening{}, errors.New("sealed text does not decrypt")
	}
	return store.Opening{Salt: plain[:saltSize], Text: string(plain[saltSize:])}, nil
}

const keysSchema = "CREATE TABLE IF NOT EXISTS keys (entry TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT, WITHOUT ROWID"

// putKeys commits the keys of a batch, pairs of entry id and key, to their own
// file. One key per entry, so that each can be erased on its own.
func (l *Ledger) putKeys(ctx context.Context, keys []any) (err error) {
	file, w := sqliteDB{}, &l.keyWr // the keys file is SQLite's, whatever keeps the ledger
	if err := w.exec(ctx, file.begin()); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// SQLite may have rolled back already (disk full): then this fails, as it
			// should.
			_, _ = w.conn.ExecContext(ctx, "ROLLBACK")
		}
	}()
	// Replaced: the key that a crash before the ledger's own commit left.
	if err := file.insert(ctx, w, "keys (entry, key)", 2, keys, " ON CONFLICT (entry) DO UPDATE SET key = excluded.key"); err != nil {
		return err
	}
	return w.exec(ctx, "COMMIT")
}

// openings returns the openings that are not erased of entries, given by index
// with their ids. A text that does not decrypt, or is not what its leaf commits
// to, is left out; the background pass reports it.
func (l *Ledger) openings(ctx context.Context, q querier, entries map[int64]*store.Entry) (map[int64]map[string]store.Opening, error) {
	idx, ids := []int64{}, []string{}
	for i, e := range entries {
		if len(e.Sealed) > 0 {
			idx, ids = append(idx, i), append(ids, e.ID)
		}
	}
	if len(idx) == 0 {
		return nil, nil
	}
	keys := map[string][]byte{}
	arg, _ := json.Marshal(ids)
	if err := each(ctx, l.keys, func(rows *sql.Rows) error {
		var id string
		var key []byte
		err := rows.Scan(&id, &key)
		keys[id] = key
		return err
	}, "SELECT k.entry, k.key FROM json_each($1) j CROSS JOIN keys k ON k.entry = j.value", string(arg)); err != nil {
		return nil, fmt.Errorf("reading the keys of sealed texts: %w", err)
	}
	out := map[int64]map[string]store.Opening{}
	arg, _ = json.Marshal(idx)
	err := each(ctx, q, func(rows *sql.Rows) error {
		var i int64
		var field string
		var box []byte
		if err := rows.Scan(&i, &field, &box); err != nil {
			return err
		}
		e := entries[i]
		key, ok := keys[e.ID]
		if !ok {
			return nil
		}
		o, err := openBox(key, box, e.ID, field)
		if err != nil || !o.Opens(field, e.Sealed[field]) {
			return nil
		}
		if out[i] == nil {
			out[i] = map[string]store.Opening{}
		}
		out[i][field] = o
		return nil
	}, "SELECT s.idx, s.field, s.box FROM "+l.e.list("bigint")+" CROSS JOIN sealed s WHERE s.idx = j.value", string(arg))
	return out, err
}

// each calls fn for every row of a query.
func each(ctx context.Context, q querier, fn func(*sql.Rows) error, query string, args ...any) error {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := fn(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
