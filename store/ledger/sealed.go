package ledger

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/countersign-dev/countersign/store"
)

// saltSize is the length of an opening's salt, see store.Commit.
const saltSize = 32

// sealedText is one encrypted opening: the 16-byte name of its key, a 12-byte
// nonce, and AES-256-GCM over salt and text, bound to the key's name, the
// entry's id and the field.
type sealedText struct {
	field string
	box   []byte
}

// sealTexts encrypts the openings of s under k, the entry's own key.
func sealTexts(s *store.Submission, k sealKey) (boxes []sealedText) {
	aead := newAEAD(k.key[:])
	for field, o := range s.Openings {
		plain := append(append(make([]byte, 0, saltSize+len(o.Text)), o.Salt...), o.Text...)
		box := make([]byte, len(k.name)+aead.NonceSize(), len(k.name)+aead.NonceSize()+len(plain)+aead.Overhead())
		copy(box, k.name[:])
		nonce := box[len(k.name):]
		rand.Read(nonce) // never fails since Go 1.24
		boxes = append(boxes, sealedText{field, aead.Seal(box, nonce, plain, boxContext(k.name.String(), s.ID, field))})
	}
	return boxes
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

// boxContext binds a box to where it belongs.
func boxContext(key, id, field string) []byte {
	return []byte("countersign/sealed/v2\x00" + key + "\x00" + id + "\x00" + field)
}

// keyNames are the names under which the key of box, of the entry with id, may
// lie in the keys file: its own, or the entry's, as it was while boxes named no
// key.
func keyNames(box []byte, id string) []string {
	if len(box) < len(uuid.UUID{}) {
		return []string{id}
	}
	return []string{uuid.UUID(box[:len(uuid.UUID{})]).String(), id}
}

// openBox decrypts one opening with its key, which is among keys by keyNames.
// keyed is false where it is not.
func openBox(keys map[string][]byte, box []byte, id, field string) (o store.Opening, keyed bool, err error) {
	context := []byte("countersign/sealed/v1\x00" + id + "\x00" + field)
	key := keys[id]
	if names := keyNames(box, id); key == nil && keys[names[0]] != nil {
		key, context, box = keys[names[0]], boxContext(names[0], id, field), box[len(uuid.UUID{}):]
	}
	if key == nil {
		return o, false, nil
	}
	if len(key) != len(sealKey{}.key) {
		return o, true, errors.New("not a key")
	}
	aead := newAEAD(key)
	if len(box) < aead.NonceSize() {
		return o, true, errors.New("sealed text is cut short")
	}
	plain, err := aead.Open(nil, box[:aead.NonceSize()], box[aead.NonceSize():], context)
	if err != nil || len(plain) < saltSize {
		return o, true, errors.New("sealed text does not decrypt")
	}
	return store.Opening{Salt: plain[:saltSize], Text: string(plain[saltSize:])}, true, nil
}

// loadKeys reads the keys with names from the keys file, as far as they are
// there.
func (l *Ledger) loadKeys(ctx context.Context, names []string) (map[string][]byte, error) {
	keys := map[string][]byte{}
	err := each(ctx, l.keys, func(rows *sql.Rows) error {
		var name string
		var key []byte
		err := rows.Scan(&name, &key)
		keys[name] = key
		return err
	}, "SELECT k.entry, k.key FROM json_each($1) j CROSS JOIN keys k ON k.entry = j.value", jsonList(names))
	if err != nil {
		return nil, fmt.Errorf("reading the keys of sealed texts: %w", err)
	}
	return keys, nil
}

// openings returns the openings that are not erased of entries, given by index
// with their ids. A text that does not decrypt, or is not what its leaf commits
// to, is left out; the background pass reports it.
func (l *Ledger) openings(ctx context.Context, q querier, entries map[int64]*store.Entry) (map[int64]map[string]store.Opening, error) {
	idx := []int64{}
	for i, e := range entries {
		if len(e.Sealed) > 0 {
			idx = append(idx, i)
		}
	}
	if len(idx) == 0 {
		return nil, nil
	}
	type text struct {
		index int64
		field string
		box   []byte
	}
	var texts []text
	var names []string
	if err := each(ctx, q, func(rows *sql.Rows) error {
		var t text
		if err := rows.Scan(&t.index, &t.field, &t.box); err != nil { // the caller has gone, as a rule
			return err
		}
		texts, names = append(texts, t), append(names, keyNames(t.box, entries[t.index].ID)...)
		return nil
	}, "SELECT s.idx, s.field, s.box FROM "+l.e.list("bigint")+" CROSS JOIN sealed s WHERE s.idx = j.value", jsonList(idx)); err != nil {
		return nil, err
	}
	keys, err := l.loadKeys(ctx, names)
	if err != nil {
		return nil, err
	}
	out := map[int64]map[string]store.Opening{}
	for _, t := range texts {
		e := entries[t.index]
		o, keyed, err := openBox(keys, t.box, e.ID, t.field)
		if !keyed || err != nil || !o.Opens(t.field, e.Sealed[t.field]) {
			continue
		}
		if out[t.index] == nil {
			out[t.index] = map[string]store.Opening{}
		}
		out[t.index][t.field] = o
	}
	return out, nil
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

// eachEntry calls fn for every row of a query for index and body. A body that is
// no entry is a mismatch.
func eachEntry(ctx context.Context, q querier, fn func(index int64, e *store.Entry) error, query string, args ...any) error {
	return each(ctx, q, func(rows *sql.Rows) error {
		var i int64
		var body []byte
		if err := rows.Scan(&i, &body); err != nil {
			return err
		}
		e, err := store.ParseLeaf(body)
		if err != nil {
			return fmt.Errorf("%w: entry %d: %w", ErrMismatch, i, err)
		}
		return fn(i, e)
	}, query, args...)
}
