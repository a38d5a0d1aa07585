package ledger

import (
	"crypto/rand"
	"database/sql"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func keysIn(t *testing.T, l *Ledger) (n int) {
	t.Helper()
	if err := l.keys.QueryRow("SELECT count(*) FROM keys").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestARefusedAppendUsesUpNoKey(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	for range 3 * keysAtOnce {
		s := f.story("req_none", false)
		issued := s.issued(s.issuing(1), 1) // of a request that nobody made
		issued.Seal(store.SealedReason, "text")
		if _, err := l.Append(t.Context(), broker, wire(t, issued)); err == nil {
			t.Fatal("taken")
		}
	}
	if n := keysIn(t, l); n != keysAtFirst {
		t.Errorf("%d keys lie ready, want %d", n, keysAtFirst)
	}
}

func TestKeysThatNoEntryTookAreGoneAtTheEnd(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.say(l, "r", "low", "first")
		again := used("r")
		again.Seal(store.SealedReason, "second")
		f.append(l, again)
		f.append(l, again) // on record already: under the first key
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		f.o.Standby = on == onPostgres
		l = f.open()
		if n := keysIn(t, l); n != 2 {
			t.Errorf("%d keys for 2 texts", n)
		}
		if got := f.text(l, 1); got != "second" {
			t.Errorf("the text says %q", got)
		}
	})
}

func TestManyTextsInOneAppendHaveAKeyEach(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	var subs []*store.Submission
	for range maxBatch {
		s := used("r")
		s.Seal(store.SealedReason, "text")
		subs = append(subs, s)
	}
	f.append(l, subs...)
	var names int
	if err := l.r.QueryRow("SELECT count(DISTINCT substr(box, 1, 16)) FROM sealed").Scan(&names); err != nil {
		t.Fatal(err)
	}
	if names != maxBatch || f.text(l, maxBatch-1) != "text" {
		t.Errorf("%d keys for %d texts", names, maxBatch)
	}
}

func TestATextIsNotTakenWhileNoKeyCanBeKept(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	db, err := sql.Open("sqlite", filepath.Join(f.o.Dir, "details-keys.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec("CREATE TRIGGER none BEFORE INSERT ON keys BEGIN SELECT RAISE(ABORT, 'none'); END"); err != nil {
		t.Fatal(err)
	}
	s := used("r")
	s.Seal(store.SealedReason, "text")
	if _, err := l.Append(t.Context(), broker, wire(t, s)); err == nil || l.Size() != 0 {
		t.Fatalf("taken without a key that is kept: %v, %d entries", err, l.Size())
	}
	f.append(l, used("r")) // without a text it needs none
	if _, err := db.Exec("DROP TRIGGER none"); err != nil {
		t.Fatal(err)
	}
	f.append(l, s)
	if got := f.text(l, 1); got != "text" {
		t.Errorf("the text says %q", got)
	}
}

// Keys used to lie under the entry's ID, and boxes to name none.
func TestATextWhoseBoxNamesNoKeyIsOpenedAndErased(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.keep(l, map[string]time.Duration{"low": time.Hour})
		i := f.say(l, "r", "low", "an old text")
		p, err := l.leaves(t.Context(), []int64{i})
		if err != nil {
			t.Fatal(err)
		}
		e, err := store.ParseLeaf(p[0].Leaf)
		if err != nil {
			t.Fatal(err)
		}
		texts, err := l.openings(t.Context(), l.r, map[int64]*store.Entry{i: e})
		if err != nil {
			t.Fatal(err)
		}
		o := texts[i][store.SealedReason]
		var key [32]byte
		rand.Read(key[:])
		aead := newAEAD(key[:])
		nonce := make([]byte, aead.NonceSize())
		rand.Read(nonce)
		box := aead.Seal(nonce, nonce, append(o.Salt[:saltSize:saltSize], o.Text...), []byte("countersign/sealed/v1\x00"+e.ID+"\x00"+store.SealedReason))
		if _, err := l.keys.Exec("DELETE FROM keys WHERE entry = ?", keyName(t, l, i)); err != nil {
			t.Fatal(err)
		}
		if _, err := l.keys.Exec("INSERT INTO keys VALUES (?, ?)", e.ID, key[:]); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		f.tamper(func(exec func(string, ...any)) {
			exec("UPDATE sealed SET box = ? WHERE idx = ? AND field = ?", box, i, store.SealedReason)
		})
		f.o.Standby = on == onPostgres
		l = f.open()
		if got := f.text(l, i); got != "an old text" {
			t.Fatalf("the text says %q", got)
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.advance(2 * time.Hour)
		if err := l.Erase(t.Context(), eraser, []int64{i}, "low", time.Hour); err != nil {
			t.Fatal(err)
		}
		if f.text(l, i) != "" || len(lies(t, f.o.Dir, key[:])) != 0 {
			t.Error("an erased text or its key is still there")
		}
	})
}
