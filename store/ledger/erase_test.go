package ledger

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/mod/sumdb/note"
	"pgregory.net/rapid"
)

var eraser = Eraser{Name: "recorder", Agent: "spiffe://example.test/recorder/recorder"}

var recorder = Author{Name: eraser.Name, Recorder: true}

// own is an entry that the recorder writes.
func (f *fixture) own(l *Ledger, t store.Type, details any) *store.Submission {
	f.t.Helper()
	s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: t, WriterTime: store.At(f.clock()), Agent: eraser.Agent, Action: string(t)}}
	s.SetDetails(details)
	if _, err := l.Append(context.Background(), recorder, wire(f.t, s)); err != nil {
		f.t.Fatal(err)
	}
	return s
}

// keep puts on record how long texts are kept.
func (f *fixture) keep(l *Ledger, kept map[string]time.Duration) {
	f.t.Helper()
	d := store.PolicyDetails{Retention: map[string]store.Duration{}}
	for class, k := range kept {
		d.Retention[class] = store.Duration(k)
	}
	f.own(l, store.PolicyLoaded, d)
}

// say appends an entry of run with a text, and returns its index.
func (f *fixture) say(l *Ledger, run, class, text string) int64 {
	f.t.Helper()
	s := used(run)
	s.Risk = nil
	if class != "" {
		s.Risk = &store.Risk{Sensitivity: class}
	}
	s.Seal(store.SealedReason, text)
	return f.append(l, s).Entries[0].Index
}

// text is what is sealed with the entry, empty where it cannot be read.
func (f *fixture) text(l *Ledger, index int64) string {
	f.t.Helper()
	p, err := l.History(context.Background(), Query{Cursor: fmt.Sprint(index), Limit: 1})
	if err != nil {
		f.t.Fatal(err)
	}
	return p.Entries[0].Opened[store.SealedReason]
}

func refused(err error) ErasureCode {
	var e *ErasureError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestATextIsErasedWhenItsTimeIsOverAndNotBefore(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour, "sensitive": 2 * time.Hour, "": 3 * time.Hour})
		low, sensitive, none, kept := f.say(l, "r", "low", "low text"), f.say(l, "r", "sensitive", "sensitive text"), f.say(l, "r", "", "text of no scope"), f.say(l, "r", "critical", "critical text")
		dull := f.append(l, used("r")).Entries[0].Index
		link := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: store.SlackLinked, WriterTime: store.At(f.clock()), Agent: eraser.Agent}}
		link.SetDetails(map[string]string{})
		link.Seal(store.SealedPerson, "user:ada")
		a, err := l.Append(t.Context(), recorder, wire(t, link))
		if err != nil {
			t.Fatal(err)
		}
		linked := a.Entries[0].Index

		for name, c := range map[string]struct {
			indexes []int64
			class   string
			kept    time.Duration
			age     time.Duration
			want    ErasureCode
		}{
			"as old as it must be, not older":     {[]int64{low}, "low", time.Hour, time.Hour, ErasureEarly},
			"shorter than the policy on record":   {[]int64{low}, "low", time.Minute, time.Hour, ErasureRetention},
			"what the policy keeps for good":      {[]int64{kept}, "critical", time.Hour, time.Hour, ErasureRetention},
			"of another sensitivity":              {[]int64{sensitive}, "low", time.Hour, 9 * time.Hour, ErasureSensitivity},
			"one that may and one that may not":   {[]int64{low, sensitive}, "low", time.Hour, 9 * time.Hour, ErasureSensitivity},
			"an entry without a text":             {[]int64{dull}, "low", time.Hour, 9 * time.Hour, ErasureUnknown},
			"a type that is needed for good":      {[]int64{linked}, "", 3 * time.Hour, 9 * time.Hour, ErasureUnerasable},
			"an entry that there is not":          {[]int64{l.Size()}, "low", time.Hour, 9 * time.Hour, ErasureUnknown},
			"an entry of a negative index":        {[]int64{-1}, "low", time.Hour, 9 * time.Hour, ErasureUnknown},
			"nothing":                             {nil, "low", time.Hour, 9 * time.Hour, ErasureMalformed},
			"one twice":                           {[]int64{low, low}, "low", time.Hour, 9 * time.Hour, ErasureMalformed},
			"not in order":                        {[]int64{sensitive, low}, "low", time.Hour, 9 * time.Hour, ErasureMalformed},
			"in the name of one without a policy": {[]int64{low}, "low", time.Hour, 9 * time.Hour, ErasureRetention},
		} {
			t.Run(name, func(t *testing.T) {
				was := f.clock()
				f.advance(c.age)
				defer func() { f.mu.Lock(); f.now = was; f.mu.Unlock() }()
				by, size := eraser, l.Size()
				if strings.HasPrefix(name, "in the name") {
					by.Name = "another"
				}
				if err := l.Erase(t.Context(), by, c.indexes, c.class, c.kept); refused(err) != c.want {
					t.Fatalf("want %s: %v", c.want, err)
				}
				if l.Size() != size {
					t.Fatal("a refused erasure is on record")
				}
			})
		}

		f.advance(time.Hour + time.Microsecond)
		if err := l.Erase(t.Context(), eraser, []int64{low}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
		if got := []string{f.text(l, low), f.text(l, sensitive), f.text(l, none), f.text(l, kept)}; fmt.Sprint(got) != "[ sensitive text text of no scope critical text]" {
			t.Fatalf("texts after it: %q", got)
		}
		if err := l.Erase(t.Context(), eraser, []int64{low}, "low", time.Hour); refused(err) != ErasureDone {
			t.Fatalf("a second time: %v", err)
		}
		p, err := l.History(t.Context(), Query{Type: string(store.DetailsErased)})
		if err != nil || len(p.Entries) != 1 || p.Entries[0].Index != l.Size()-1 {
			t.Fatalf("erasures on record: %v %v", p, err)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatalf("the log after it: %v", err)
		}
	})
}

func TestNobodyButTheRecorderSaysHowLongTextsAreKeptOrThatTheyAreErased(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		i := f.say(l, "r", "low", "text")
		f.advance(time.Hour)
		s := used("r")
		s.Type = store.PolicyLoaded
		s.SetDetails(store.PolicyDetails{Retention: map[string]store.Duration{"low": 1}})
		if _, err := l.Append(t.Context(), Author{Name: eraser.Name}, wire(t, s)); !errors.Is(err, store.ErrMalformed) {
			t.Fatalf("a retention from a writer: %v", err)
		}
		s = used("r")
		s.Type = store.DetailsErased
		s.SetDetails(store.ErasedDetails{Entries: []int64{i}, Sensitivity: "low", Kept: 1})
		for _, by := range []Author{broker, recorder} {
			if _, err := l.Append(t.Context(), by, wire(t, s)); !errors.Is(err, store.ErrMalformed) {
				t.Fatalf("an erasure appended by %+v: %v", by, err)
			}
		}
		if f.text(l, i) != "text" {
			t.Fatal("it is erased")
		}
	})
}

func TestAScopeKeepsItsTextsLongerThanItsSensitivitySays(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour, OfScope + "pay:read": 3 * time.Hour})
		plain := f.say(l, "r", "low", "plain")
		s := used("r")
		s.Action = "pay:read"
		s.Seal(store.SealedReason, "longer")
		own := f.append(l, s).Entries[0].Index
		f.advance(2 * time.Hour)
		if err := l.Erase(t.Context(), eraser, []int64{own}, "low", time.Hour); refused(err) != ErasureEarly {
			t.Fatalf("the scope keeps it: %v", err)
		}
		if due, next, err := l.Due(t.Context(), eraser, Class{Sensitivity: "low"}, time.Hour, 0, 9); err != nil || fmt.Sprint(due) != fmt.Sprint([]int64{plain}) || next != l.Size() {
			t.Fatalf("due %v next %d: %v", due, next, err)
		}
		f.advance(2 * time.Hour)
		due, _, err := l.Due(t.Context(), eraser, Class{Sensitivity: "low", Scope: "pay:read"}, 3*time.Hour, 0, 9)
		if err != nil || fmt.Sprint(due) != fmt.Sprint([]int64{own}) {
			t.Fatalf("due %v: %v", due, err)
		}
		if err := l.Erase(t.Context(), eraser, due, "low", 3*time.Hour); err != nil {
			t.Fatal(err)
		}
	})
}

func TestNothingIsErasedWhileAnExportKeepsTheTexts(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		i := f.say(l, "r", "low", "text")
		f.advance(2 * time.Hour)
		release := l.KeepTexts()
		done := make(chan error, 1)
		go func() { done <- l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour) }()
		for range 20 { // appends, and holds, do not wait for the export
			f.say(l, "other", "low", "more")
		}
		f.own(l, store.HoldPlaced, store.HoldDetails{Run: "other"})
		select {
		case err := <-done:
			t.Fatalf("erased meanwhile: %v", err)
		default:
		}
		if p, err := l.History(t.Context(), Query{Type: string(store.DetailsErased)}); err != nil || len(p.Entries) != 0 || f.text(l, i) != "text" {
			t.Fatalf("on record %v, text %q: %v", p, f.text(l, i), err)
		}
		release()
		release()
		if err := <-done; err != nil || f.text(l, i) != "" {
			t.Fatalf("after it: %v, text %q", err, f.text(l, i))
		}
	})
}

func TestAHoldKeepsARunOrAWindowUntilItIsLifted(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		a := f.say(l, "run-a", "low", "a")
		f.advance(time.Minute)
		from := store.At(f.clock())
		b := f.say(l, "run-b", "low", "b")
		f.advance(time.Minute)
		to := store.At(f.clock())
		c := f.say(l, "run-c", "low", "c")
		run := f.own(l, store.HoldPlaced, store.HoldDetails{Run: "run-a"})
		window := f.own(l, store.HoldPlaced, store.HoldDetails{From: from, To: to})
		f.advance(2 * time.Hour)
		for _, i := range []int64{a, b} {
			if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); refused(err) != ErasureHeld {
				t.Fatalf("entry %d is held: %v", i, err)
			}
		}
		if due, next, err := l.Due(t.Context(), eraser, Class{Sensitivity: "low"}, time.Hour, 0, 10); err != nil || fmt.Sprint(due) != fmt.Sprint([]int64{c}) || next <= c {
			t.Fatalf("due %v next %d: %v", due, next, err)
		}
		seen := l.Size()
		f.own(l, store.HoldLifted, store.HoldLiftedDetails{Hold: window.ID})
		if first, size, err := l.Lifted(t.Context(), seen); err != nil || first != b || size != seen+1 {
			t.Fatalf("lifted: first %d size %d: %v", first, size, err)
		}
		if err := l.Erase(t.Context(), eraser, []int64{b, c}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
		f.own(l, store.HoldLifted, store.HoldLiftedDetails{Hold: run.ID})
		if first, _, err := l.Lifted(t.Context(), seen+1); err != nil || first != a {
			t.Fatalf("lifted: first %d: %v", first, err)
		}
		if err := l.Erase(t.Context(), eraser, []int64{a}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWhatIsUnderWayKeepsItsTexts(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		s := f.story("req_1", false)
		s.grant.TTL, s.end = store.Duration(5*time.Hour), store.At(f.clock().Add(5*time.Hour))
		req, intent := s.requested(), s.issuing(1)
		req.Seal(store.SealedReason, "because")
		i := f.append(l, req, intent).Entries[0].Index
		f.append(l, s.issued(intent, 1))
		f.advance(2 * time.Hour)
		if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); refused(err) != ErasureNeeded {
			t.Fatalf("its credential is live: %v", err)
		}
		if due, next, err := l.Due(t.Context(), eraser, Class{Sensitivity: "low"}, time.Hour, 0, 10); err != nil || len(due) != 0 || next != i {
			t.Fatalf("due %v next %d: %v", due, next, err)
		}
		f.append(l, s.closed(store.CredentialRevoked, intent, 1))
		if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
	})
}

// forms are how a secret may lie in a file.
func forms(secret []byte) map[string][]byte {
	wide := func(order bool) []byte {
		var b []byte
		for _, u := range utf16.Encode([]rune(string(secret))) {
			if order {
				b = append(b, byte(u>>8), byte(u))
			} else {
				b = append(b, byte(u), byte(u>>8))
			}
		}
		return b
	}
	return map[string][]byte{
		"raw": secret, "base64": []byte(base64.RawStdEncoding.EncodeToString(secret)), "base64url": []byte(base64.RawURLEncoding.EncodeToString(secret)),
		"hex": []byte(hex.EncodeToString(secret)), "UTF-16LE": wide(false), "UTF-16BE": wide(true),
	}
}

// lies reads all files under dir, and returns in which secret lies. Another
// process reads: closing a file of SQLite's here would drop the locks on it.
func lies(t testing.TB, dir string, secret []byte) (where []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("nothing in %s: %v", dir, err)
	}
	for _, path := range files {
		b, err := exec.Command("cat", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		for form, s := range forms(secret) {
			if bytes.Contains(b, s) {
				where = append(where, filepath.Base(path)+" ("+form+")")
			}
		}
	}
	return where
}

// snapshot copies the files of the ledger as they lie there.
func snapshot(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	// The head file is put in place by rename, so that its new one may be gone
	// between the listing and the copy.
	if out, err := exec.Command("sh", "-c", `for f in "$0"/*; do case "$f" in *.new) ;; *) cp "$f" "$1"/ || exit 1;; esac; done`, dir, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return to
}

// eachPlace calls fn where first has the three bytes that stand there, and 13
// more follow. Nobody else has b: the race detector would take most of the time.
//
//go:norace
func eachPlace(b []byte, first []bool, fn func([]byte)) {
	for i := 0; i+16 <= len(b); i++ {
		if first[int(b[i])<<16|int(b[i+1])<<8|int(b[i+2])] {
			fn(b[i:])
		}
	}
}

func TestAfterAnErasureNeitherTextNorKeyNorSaltIsInAnyFile(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		f.o.Grace = time.Minute
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour, "": time.Hour})
		// Ids that come in no order split pages everywhere, as writers with clocks of
		// their own do; a third is kept.
		const n = 1200
		secret := func(i int) string { return fmt.Sprintf("planted secret of somebody %06d", i) }
		var due []int64
		salts := map[int64][]byte{}
		texts := map[int64]string{}
		for i := 0; i < n; i += 100 {
			var subs []*store.Submission
			for j := range 100 {
				s := used("r")
				s.ID = s.ID[:13] + "-7" + s.ID[15:]
				if i/100%2 == 1 {
					s.ID = fmt.Sprintf("%08x", (i+j)*2654435761%(1<<32)) + s.ID[8:]
				}
				if (i+j)%3 == 0 {
					s.Risk = &store.Risk{Sensitivity: "critical"}
				}
				s.Seal(store.SealedReason, secret(i+j))
				subs = append(subs, s)
			}
			a := f.append(l, subs...)
			for j, s := range subs {
				index := a.Entries[j].Index
				if (i+j)%3 != 0 {
					due = append(due, index)
					salts[index], texts[index] = s.Openings[store.SealedReason].Salt, secret(i+j)
				}
			}
		}
		keys := map[int64][]byte{}
		for _, i := range due {
			var key []byte
			if err := l.keys.QueryRow("SELECT key FROM keys WHERE entry = ?", keyName(t, l, i)).Scan(&key); err != nil {
				t.Fatal(err)
			}
			keys[i] = key
		}
		if len(lies(t, f.o.Dir, keys[due[0]])) == 0 {
			t.Fatal("the test does not see a key that is there")
		}
		f.advance(2 * time.Hour)
		if err := l.Erase(t.Context(), eraser, due, "low", time.Hour); err != nil {
			t.Fatal(err)
		}

		check := func(what, dir string) {
			t.Helper()
			files := map[string][]byte{}
			paths, err := filepath.Glob(filepath.Join(dir, "*"))
			if err != nil || len(paths) < 2 {
				t.Fatalf("%s: %v %v", what, paths, err)
			}
			for _, p := range paths {
				files[p] = readFile(t, p)
			}
			// By the first 8 bytes of each form, in one go over each file; the first
			// three say at once that most places hold none.
			type needle struct {
				what string
				is   []byte
			}
			first := make([]bool, 1<<24)
			needles := map[uint64]needle{}
			for _, i := range due {
				for kind, s := range map[string][]byte{"text": []byte(texts[i]), "salt": salts[i], "key": keys[i], "half of the key": keys[i][16:]} {
					for form, x := range forms(s) {
						if x = x[:16]; kind == "text" {
							x = forms(s)[form][len(forms(s)[form])-16:] // what differs stands at the end
						}
						first[int(x[0])<<16|int(x[1])<<8|int(x[2])] = true
						needles[binary.LittleEndian.Uint64(x)] = needle{fmt.Sprintf("the %s of entry %d (%s)", kind, i, form), x}
					}
				}
			}
			for path, b := range files {
				eachPlace(b, first, func(b []byte) {
					if n, ok := needles[binary.LittleEndian.Uint64(b)]; ok && bytes.HasPrefix(b, n.is) {
						t.Fatalf("%s: %s lies in %s", what, n.what, filepath.Base(path))
					}
				})
			}
		}
		check("while it runs", snapshot(t, f.o.Dir))

		backup := t.TempDir()
		files := map[string]string{"ledger.db": f.path(), "details-keys.db": l.o.KeysFile}
		if on == onPostgres {
			delete(files, "ledger.db")
			if err := os.Rename(f.dump(), filepath.Join(backup, "dump.sql")); err != nil {
				t.Fatal(err)
			}
			server := sharedServer(t)
			if err := query(server.DSN, "CHECKPOINT"); err != nil {
				t.Fatal(err)
			}
			check("the server's files", serverFiles(t, server))
			copied, err := server.Backup()
			if err != nil {
				t.Fatal(err)
			}
			defer copied.Remove()
			copied.Kill()
			check("a base backup whose server was killed", serverFiles(t, copied))
			if err := copied.Restart(); err != nil {
				t.Fatal(err)
			}
			copied.Stop()
			check("a base backup whose server was stopped", serverFiles(t, copied))
		}
		for db, file := range files {
			c, err := openDB(file, 1)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Exec("VACUUM INTO ?", filepath.Join(backup, db)); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		check("a backup", backup)

		for s, err := range l.Export(t.Context(), 0, l.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if _, erased := texts[s.Index]; erased && len(s.Sealed) > 0 {
				t.Fatalf("entry %d is exported with its text", s.Index)
			}
			if i := int(s.Index) - 1; i >= 0 && i < n && i%3 == 0 && s.Sealed[store.SealedReason].Text != secret(i) {
				t.Fatalf("entry %d lost its text", s.Index)
			}
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		check("closed", f.o.Dir)
		f.open()
	})
}

func TestACopyOfAKeyThatSplittingAPageLeftIsFoundAndOverwritten(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.keep(l, map[string]time.Duration{"low": time.Hour})
	i := f.say(l, "r", "low", "text")
	f.advance(2 * time.Hour)
	// A piece of the key in a page that SQLite has no row for: the label of a row
	// deleted without being overwritten.
	var key []byte
	if err := l.keys.QueryRow("SELECT key FROM keys").Scan(&key); err != nil {
		t.Fatal(err)
	}
	c, err := l.keys.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range []string{"PRAGMA secure_delete = 0", "INSERT INTO keys VALUES ('stale', x'" + hex.EncodeToString(append(key[8:24:24], bytes.Repeat([]byte{'.'}, 60)...)) + "')", "DELETE FROM keys WHERE entry = 'stale'", "PRAGMA secure_delete = 1", "PRAGMA wal_checkpoint(TRUNCATE)"} {
		if _, err := c.ExecContext(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	if w := lies(t, f.o.Dir, key[8:24]); len(w) != 1 {
		t.Fatalf("lies in %v", w)
	}
	if left, err := l.keysLeft(t.Context(), [][]byte{key}); err != nil || !left {
		t.Fatalf("not found: %v", err)
	}
	if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); err != nil {
		t.Fatal(err)
	}
	if w := lies(t, f.o.Dir, key[8:24]); len(w) != 0 {
		t.Fatalf("a piece of the key lies in %v", w)
	}
}

// eraseAndDie is the process that is killed at a stage of an erasure.
func eraseAndDie(dir, stage string) {
	key, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil {
		panic(err)
	}
	skey, vkey, _ := strings.Cut(string(key), "\n")
	signer, err := note.NewSigner(skey)
	if err != nil {
		panic(err)
	}
	l, err := Open(context.Background(), Options{Dir: dir, Postgres: os.Getenv("COUNTERSIGN_TEST_POSTGRES"), Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1})
	if err != nil {
		panic(err)
	}
	l.erasing.broke = func(at string) error {
		if at == stage {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	var due []int64
	for i := int64(1); i < l.Size(); i++ {
		due = append(due, i)
	}
	err = l.Erase(context.Background(), eraser, due, "low", time.Hour)
	fmt.Fprintln(os.Stderr, "not killed:", err)
	os.Exit(1)
}

func TestAnErasureThatWasKilledIsFinishedAtTheNextStart(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		for _, stage := range []string{"on record", "keys deleted", "keys gone", "boxes deleted"} {
			t.Run(stage, func(t *testing.T) {
				f := newFixtureOn(t, on)
				skey, vkey, err := note.GenerateKey(nil, origin)
				if err != nil {
					t.Fatal(err)
				}
				if f.o.Signer, err = note.NewSigner(skey); err != nil {
					t.Fatal(err)
				}
				f.o.Verifier = vkey
				if f.verify, err = store.NewLogVerifier(vkey); err != nil {
					t.Fatal(err)
				}
				f.now = time.Now().Add(-2 * time.Hour)
				l := f.open()
				f.keep(l, map[string]time.Duration{"low": time.Hour})
				var keys [][]byte
				for i := range 40 {
					f.say(l, "r", "low", fmt.Sprint("planted secret ", i))
				}
				rows, err := l.keys.Query("SELECT key FROM keys")
				if err != nil {
					t.Fatal(err)
				}
				for rows.Next() {
					var k []byte
					if err := rows.Scan(&k); err != nil {
						t.Fatal(err)
					}
					keys = append(keys, k)
				}
				rows.Close()
				l.Close()
				if err := os.WriteFile(filepath.Join(f.o.Dir, "key"), []byte(skey+"\n"+vkey), 0o600); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "COUNTERSIGN_TEST_ERASE="+f.o.Dir, "COUNTERSIGN_TEST_POSTGRES="+f.o.Postgres, "COUNTERSIGN_TEST_STAGE="+stage)
				var out bytes.Buffer
				cmd.Stderr = &out
				if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Fatalf("%v: %s", err, out.String())
				}

				f.now, f.o.Standby = time.Now(), on == onPostgres
				l = f.open()
				size := l.Size()
				if size != 42 {
					t.Fatalf("%d entries: its erasure is not on record", size)
				}
				if upTo, err := l.FinishErasures(t.Context(), 0); err != nil || upTo != size {
					t.Fatalf("up to %d: %v", upTo, err)
				}
				for i := int64(1); i <= 40; i++ {
					if got := f.text(l, i); got != "" {
						t.Fatalf("entry %d still says %q", i, got)
					}
				}
				var boxes, left int
				if err := l.r.QueryRow("SELECT count(*) FROM sealed").Scan(&boxes); err != nil {
					t.Fatal(err)
				}
				if err := l.keys.QueryRow("SELECT count(*) FROM keys").Scan(&left); err != nil {
					t.Fatal(err)
				}
				if boxes != 0 || left != 0 {
					t.Fatalf("%d boxes and %d keys are left", boxes, left)
				}
				for _, k := range keys {
					if w := lies(t, f.o.Dir, k); len(w) > 0 {
						t.Fatalf("a key lies in %v", w)
					}
				}
				l.erasing.broke = func(at string) error { return fmt.Errorf("what is done is done again: %s", at) }
				if _, err := l.FinishErasures(t.Context(), 0); err != nil {
					t.Fatal(err)
				}
				if err := l.recheck(t.Context()); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
}

func TestATextThatIsGoneIsAFindingUnlessItsErasureIsOnRecord(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		core, logs := observer.New(zap.ErrorLevel)
		f := newFixtureOn(t, on)
		f.o.Log = zap.New(core)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		erased, boxless, keyless, there := f.say(l, "r", "low", "a"), f.say(l, "r", "low", "b"), f.say(l, "r", "low", "c"), f.say(l, "r", "low", "d")
		f.advance(2 * time.Hour)
		if err := l.Erase(t.Context(), eraser, []int64{erased}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
		if err := l.recheck(t.Context()); err != nil || logs.Len() != 0 {
			t.Fatalf("an erasure on record is a finding: %v %v", err, logs.All())
		}
		if err := l.deleteBoxes(t.Context(), []int64{boxless}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.keys.Exec("DELETE FROM keys WHERE entry = ?", keyName(t, l, keyless)); err != nil {
			t.Fatal(err)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		found := map[int64]bool{}
		for _, e := range logs.TakeAll() {
			found[e.ContextMap()["entry"].(int64)] = true
		}
		if len(found) != 2 || !found[boxless] || !found[keyless] || found[there] {
			t.Fatalf("findings at %v", found)
		}
	})
}

// A hold placed while texts are being erased: what comes after it on record is
// not erased.
func TestAHoldPlacedWhileTextsAreErasedHoldsWhatComesAfterIt(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		const n = 60
		var all []int64
		for i := range n {
			all = append(all, f.say(l, "held", "low", fmt.Sprint("text ", i)))
		}
		f.advance(2 * time.Hour)
		var wg sync.WaitGroup
		var hold *store.Submission
		started := make(chan struct{})
		wg.Go(func() {
			for k, i := range all {
				if k == n/4 {
					close(started)
				}
				if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); err != nil && refused(err) != ErasureHeld {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			<-started
			// The caller is gone at once: the hold counts all the same, or is not there.
			ctx, cancel := context.WithCancel(t.Context())
			s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: store.HoldPlaced, WriterTime: store.At(f.clock()), Agent: eraser.Agent}}
			s.SetDetails(store.HoldDetails{Run: "held"})
			time.AfterFunc(time.Millisecond/2, cancel)
			if _, err := l.Append(ctx, recorder, wire(t, s)); err != nil {
				t.Error(err)
			}
			hold = s
		})
		wg.Wait()
		placed := int64(-1)
		gone := map[int64]bool{}
		for s, err := range l.Entries(t.Context(), 0, l.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			e, err := store.ParseLeaf(s.Leaf)
			if err != nil {
				t.Fatal(err)
			}
			switch e.Type {
			case store.HoldPlaced:
				if e.ID != hold.ID {
					t.Fatal("another hold")
				}
				placed = s.Index
			case store.DetailsErased:
				if placed >= 0 {
					t.Fatalf("entry %d erases after the hold of entry %d", s.Index, placed)
				}
				d, err := store.DetailsAs[store.ErasedDetails](e)
				if err != nil {
					t.Fatal(err)
				}
				for _, i := range d.Entries {
					gone[i] = true
				}
			}
		}
		for k, i := range all {
			if want := fmt.Sprint("text ", k); gone[i] == (f.text(l, i) == want) {
				t.Fatalf("entry %d: erased on record %v, and it says %q", i, gone[i], f.text(l, i))
			}
		}
		if len(gone) < n/4 {
			t.Fatalf("only %d were erased before the hold", len(gone))
		}
	})
}

func TestNoTextIsErasedEarlyOrHeldAndEachIsGoneInTheEnd(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		classes := []string{"", "low", "sensitive", "critical"}
		retention := map[string]time.Duration{"": 2 * time.Hour, "low": time.Hour, "sensitive": 5 * time.Hour} // critical: for good
		checkSome(on)
		rapid.Check(t, func(rt *rapid.T) {
			f := newFixtureOn(t, on)
			l, err := Open(context.Background(), f.o)
			if err != nil {
				rt.Fatal(err)
			}
			defer l.Close()
			f.keep(l, retention)
			type said struct {
				class string
				entry *store.Entry
				gone  bool
			}
			texts := map[int64]*said{}
			holds := map[string]store.HoldDetails{}
			marks := map[string]int64{}
			seen := l.Size()
			sweep := func() {
				first, size, err := l.Lifted(context.Background(), seen)
				if err != nil {
					rt.Fatal(err)
				}
				if seen = size; first >= 0 {
					for c := range marks {
						marks[c] = min(marks[c], first)
					}
				}
				for c, kept := range retention {
					for {
						due, next, err := l.Due(context.Background(), eraser, Class{Sensitivity: c}, kept, marks[c], 3)
						if err != nil {
							rt.Fatal(err)
						}
						if len(due) > 0 {
							if err := l.Erase(context.Background(), eraser, due, c, kept); err != nil {
								rt.Fatal(err)
							}
						}
						if marks[c] = next; len(due) < 3 {
							break
						}
					}
				}
			}
			check := func() {
				now := f.clock()
				for i, s := range texts {
					held := false
					for _, h := range holds {
						held = held || h.Covers(s.entry)
					}
					kept, named := retention[s.class]
					there := f.text(l, i) != ""
					due := named && now.Sub(s.entry.Time.Time) > kept
					switch {
					case s.gone && there:
						rt.Fatalf("entry %d is back", i)
					case s.gone:
					case !there && (!due || held):
						rt.Fatalf("entry %d is erased: due %v, held %v", i, due, held)
					case there && due && !held:
						rt.Fatalf("entry %d is due and not erased", i)
					case !there:
						s.gone = true
					}
				}
			}
			for range rapid.IntRange(5, 40).Draw(rt, "steps") {
				switch rapid.IntRange(0, 5).Draw(rt, "what") {
				case 0, 1:
					class := rapid.SampledFrom(classes).Draw(rt, "class")
					i := f.say(l, fmt.Sprint("run-", rapid.IntRange(0, 2).Draw(rt, "run")), class, "text")
					p, err := l.leaves(context.Background(), []int64{i})
					if err != nil {
						rt.Fatal(err)
					}
					e, err := store.ParseLeaf(p[0].Leaf)
					if err != nil {
						rt.Fatal(err)
					}
					texts[i] = &said{class: class, entry: e}
				case 2:
					f.advance(time.Duration(rapid.IntRange(1, 200).Draw(rt, "minutes")) * time.Minute)
				case 3:
					h := store.HoldDetails{Run: fmt.Sprint("run-", rapid.IntRange(0, 2).Draw(rt, "held run"))}
					if rapid.Bool().Draw(rt, "window") {
						at := f.clock().Add(-time.Duration(rapid.IntRange(0, 400).Draw(rt, "from")) * time.Minute)
						h = store.HoldDetails{From: store.At(at), To: store.At(at.Add(time.Duration(rapid.IntRange(1, 300).Draw(rt, "long")) * time.Minute))}
					}
					holds[f.own(l, store.HoldPlaced, h).ID] = h
				case 4:
					for id := range holds {
						f.own(l, store.HoldLifted, store.HoldLiftedDetails{Hold: id})
						delete(holds, id)
						break
					}
				case 5:
					sweep()
					check()
				}
			}
			for id := range holds {
				f.own(l, store.HoldLifted, store.HoldLiftedDetails{Hold: id})
				delete(holds, id)
			}
			f.advance(24 * time.Hour)
			sweep()
			check()
		})
	})
}

// keyName is the name of the key under which entry i's texts are encrypted.
func keyName(t *testing.T, l *Ledger, i int64) string {
	t.Helper()
	var box []byte
	if err := l.r.QueryRow("SELECT box FROM sealed WHERE idx = $1 LIMIT 1", i).Scan(&box); err != nil {
		t.Fatal(err)
	}
	return keyNames(box, "")[0]
}
