package vaultaudit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store/durable"
)

// place is how far the file was read: a file is known by its beginning, since
// rotation gives it another name.
type place struct {
	Log   string `json:"log"`   // the ledger's name
	First string `json:"first"` // SHA-256 of its first line, at most firstBytes of it; empty before it has one
	Next  int64  `json:"next"`  // offset of the first line that is not known to be dealt with
}

// firstBytes is how much of a file's first line tells it from others: Vault's
// lines begin with time or token and hold the ID of the request.
const firstBytes = 4096

// cursor keeps a place in a file of its own beside the ledger.
type cursor struct {
	path string
	log  string
}

// read returns the place to go on at; the zero place where there is none. A
// file that cannot be used is an error: to begin anew is the operator's to say,
// though it does no harm: what is on record already is not recorded again.
func (c *cursor) read() (place, error) {
	b, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return place{}, nil
	}
	if err != nil {
		return place{}, err
	}
	var p place
	if err := json.Unmarshal(b, &p, json.RejectUnknownMembers(true)); err != nil || p.Next < 0 || p.Log != c.log {
		return place{}, fmt.Errorf("%s is no cursor of this log; remove it to read the audit log from its start", c.path)
	}
	return p, nil
}

// write keeps p. A crash before it reads lines again from the older place: they
// give the entries that are on record already.
func (c *cursor) write(p place) error {
	p.Log = c.log
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return durable.WriteFile(c.path, append(b, '\n'))
}

// tail reads a file that grows, through renaming and truncation.
type tail struct {
	path string
	poll time.Duration
	lost func(why string) // lines may have been missed

	f       *os.File
	first   string
	at      int64  // offset of what comes next in buf
	read    int64  // offset of what is read next of the file
	buf     []byte // read and not given out
	skip    bool   // within a line that is too long
	left    []string
	skipped func()
}

// open begins at p: in the file that it names, wherever rotation put it, then
// in those that came after it, and at last in the one at path. What does not
// exist yet is waited for by next.
func (t *tail) open(p place) error {
	if p.First == "" {
		return nil
	}
	older, err := t.older()
	if err != nil {
		return err
	}
	for i, name := range append(older, t.path) {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		if size, ok := sizeOf(f); ok && fingerprint(f) == p.First && size >= p.Next {
			t.use(f, p.First, p.Next)
			if i < len(older) {
				t.left = older[i+1:]
			}
			return nil
		}
		f.Close()
	}
	t.lost("the file that was read last is gone or was cut")
	return nil
}

// older returns the rotated files beside path, the oldest first. Compressed
// ones cannot be read on.
func (t *tail) older() ([]string, error) {
	names, err := filepath.Glob(escapeGlob(t.path) + `[.\-]*`)
	if err != nil {
		return nil, err
	}
	type aged struct {
		name string
		at   time.Time
	}
	var all []aged
	for _, n := range names {
		if info, err := os.Stat(n); err == nil && info.Mode().IsRegular() && !slices.Contains([]string{".gz", ".zst", ".xz", ".bz2"}, filepath.Ext(n)) {
			all = append(all, aged{n, info.ModTime()})
		}
	}
	slices.SortStableFunc(all, func(a, b aged) int { return a.at.Compare(b.at) })
	out := make([]string, len(all))
	for i, a := range all {
		out[i] = a.name
	}
	return out, nil
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

func sizeOf(f *os.File) (int64, bool) {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0, false
	}
	return info.Size(), true
}

// fingerprint is place.First of f, empty while its first line is not whole.
func fingerprint(f *os.File) string {
	b := make([]byte, firstBytes)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return ""
	}
	b = b[:n]
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		b = b[:i]
	} else if n < firstBytes {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (t *tail) use(f *os.File, first string, at int64) {
	if t.f != nil {
		t.f.Close()
	}
	t.f, t.first, t.at, t.read, t.buf, t.skip = f, first, at, at, t.buf[:0], false
}

func (t *tail) close() {
	if t.f != nil {
		t.f.Close()
	}
}

// lineAt is a line and where it begins and ends.
type lineAt struct {
	text  []byte // without its end; valid until the next call
	first string // of its file
	from  int64
	next  int64
}

// lines returns the whole lines that are there, at most some hundreds, and none
// once it has waited for poll.
func (t *tail) lines(ctx context.Context) ([]lineAt, error) {
	for range 2 {
		out, err := t.take()
		if err != nil || len(out) > 0 {
			return out, err
		}
		if moved, err := t.turn(); err != nil {
			return nil, err
		} else if !moved {
			break
		}
	}
	select {
	case <-time.After(t.poll):
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

const (
	readBytes = 1 << 20 // read at a time
	takeLines = 256
)

// take returns whole lines of the file that is open.
func (t *tail) take() (out []lineAt, err error) {
	if t.f == nil {
		return nil, nil
	}
	if t.first == "" {
		if t.first = fingerprint(t.f); t.first == "" {
			return nil, nil // no line yet
		}
	}
	for {
		used := 0
		for len(out) < takeLines {
			i := bytes.IndexByte(t.buf[used:], '\n')
			if i < 0 {
				break
			}
			l := lineAt{text: t.buf[used : used+i], first: t.first, from: t.at, next: t.at + int64(i) + 1}
			used += i + 1
			t.at = l.next
			if t.skip {
				t.skip = false
				continue
			}
			out = append(out, l)
		}
		if len(out) > 0 {
			t.buf = t.buf[used:]
			return out, nil
		}
		t.buf = append([]byte(nil), t.buf[used:]...)
		if len(t.buf) > maxLine {
			if !t.skip {
				t.skipped()
			}
			t.skip, t.at, t.buf = true, t.at+int64(len(t.buf)), nil
		}
		if fingerprint(t.f) != t.first {
			return nil, nil // cut, and written to since: turn sees it
		}
		chunk := make([]byte, readBytes)
		n, err := t.f.ReadAt(chunk, t.read)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("reading Vault's audit log: %w", err)
		}
		if n == 0 {
			return nil, nil
		}
		t.read += int64(n)
		t.buf = append(t.buf, chunk[:n]...)
	}
}

// turn goes on to another file, or to the start of one that was cut, where
// nothing is left of this one. moved is whether there may be lines now.
func (t *tail) turn() (moved bool, err error) {
	if t.f != nil {
		size, ok := sizeOf(t.f)
		if ok && (size < t.read || t.first != "" && fingerprint(t.f) != t.first) {
			// Copied away and cut (logrotate's copytruncate).
			if len(t.buf) > 0 {
				t.lost("the file was cut within a line")
			}
			f := t.f
			t.f = nil
			t.use(f, "", 0)
			return true, nil
		}
		if ok && size > t.read {
			return true, nil
		}
	}
	if len(t.left) > 0 {
		name := t.left[0]
		t.left = t.left[1:]
		f, err := os.Open(name)
		if err != nil {
			t.lost("a rotated file could not be read")
			return true, nil
		}
		t.use(f, "", 0)
		return true, nil
	}
	f, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening Vault's audit log: %w", err)
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return false, fmt.Errorf("%s is no regular file", t.path)
	}
	if t.f != nil {
		// Vault writes to the renamed file until it is told to open another: a new
		// one counts once something is in it.
		have, err := t.f.Stat()
		if err != nil || os.SameFile(have, info) || info.Size() == 0 {
			f.Close()
			return false, err
		}
		if size, _ := sizeOf(t.f); size > t.read {
			f.Close()
			return true, nil
		}
	}
	t.use(f, "", 0)
	return info.Size() > 0, nil
}
