package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

// database is what Copy takes.
func (f *fixture) database() string {
	if f.on == onPostgres {
		return f.o.Postgres
	}
	return f.o.Dir
}

// besideOn is an empty database on an engine, for the same recorder.
func (f *fixture) besideOn(on engineName) *fixture {
	g := f.beside()
	g.on, g.o.Dir, g.o.Postgres = on, f.t.TempDir(), ""
	if on == onPostgres {
		g.o.Postgres = newSchema(f.t)
	}
	return g
}

func TestALedgerIsCopiedFromEngineToEngineAndGoesOnThere(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		other := map[engineName]engineName{onSQLite: onPostgres, onPostgres: onSQLite}[on]
		g := f.besideOn(other)
		var done, total int64
		note, err := Copy(t.Context(), f.database(), g.database(), f.verify, func(d, of int64) {
			if d < done {
				t.Errorf("%d steps done after %d", d, done)
			}
			done, total = d, of
		})
		if err != nil {
			t.Fatal(err)
		}
		if done != 2*tamperEntries || total != done {
			t.Errorf("progress ended at %d of %d", done, total)
		}
		// Head and keys go along as files.
		for _, name := range []string{"head", "details-keys.db"} {
			copyFile(t, filepath.Join(f.o.Dir, name), filepath.Join(g.o.Dir, name))
		}
		l := g.open()
		if l.Head() != note {
			t.Fatal("the copy has another head")
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		p, err := l.History(t.Context(), Query{Type: string(store.CredentialIssued), Limit: 1})
		if err != nil || p.Entries[0].Opened["reason"] != "because 0" {
			t.Fatalf("sealed texts: %v, %v", p, err)
		}
		g.append(l, used("after"))
		g.continues(l, note)
		l.Close()
		// And back again, byte for byte.
		back := f.besideOn(on)
		if _, err := Copy(t.Context(), g.database(), back.database(), f.verify, nil); err != nil {
			t.Fatal(err)
		}
		if on == onPostgres {
			copyFile(t, filepath.Join(g.o.Dir, "head"), filepath.Join(back.o.Dir, "head"))
		}
		copyFile(t, filepath.Join(g.o.Dir, "details-keys.db"), filepath.Join(back.o.Dir, "details-keys.db"))
		if l = back.open(); l.Size() != tamperEntries+1 {
			t.Fatalf("%d entries after the way back", l.Size())
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.Close()
		if _, err := Copy(t.Context(), f.database(), back.database(), f.verify, nil); !errors.Is(err, ErrNotEmpty) {
			t.Fatalf("over a ledger: %v", err)
		}
	})
}

func TestLongTextsAreCopiedWithoutHoldingThemAll(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		for range 12 {
			s := used("r")
			s.Type = store.PolicyLoaded
			s.SetDetails(store.PolicyDetails{})
			s.Seal(store.SealedCatalogue, strings.Repeat("x", 1<<20))
			f.append(l, s, used("r"))
		}
		l.Close()
		to := f.besideOn(onSQLite)
		// It compares every row of the copy with what was copied.
		if _, err := Copy(t.Context(), f.database(), to.database(), f.verify, nil); err != nil {
			t.Fatal(err)
		}
	})
}

func TestALedgerThatARecorderHasOpenIsNotCopied(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		f.open()
		if _, err := Copy(t.Context(), f.database(), f.besideOn(onSQLite).database(), f.verify, nil); !errors.Is(err, ErrLocked) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestAnAlteredLedgerIsNotCopiedAsIfItWereWhole(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		f.tamper(func(e func(string, ...any)) {
			e("UPDATE entries SET body = replace(body, '\"demo\"', '\"dema\"') WHERE idx = 9")
		})
		g := f.besideOn(on)
		if _, err := Copy(t.Context(), f.database(), g.database(), f.verify, nil); !errors.Is(err, ErrMismatch) {
			t.Fatalf("got %v", err)
		}
		if _, err := os.Stat(filepath.Join(g.o.Dir, "head")); !errors.Is(err, os.ErrNotExist) {
			t.Error("the copy was given a head")
		}
		other := newFixture(t)
		if _, err := Copy(t.Context(), f.database(), f.besideOn(on).database(), other.verify, nil); !errors.Is(err, ErrMismatch) {
			t.Fatalf("under another key: %v", err)
		}
	})
}

func TestACopyThatWasBrokenOffIsRefusedAndDoneAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixture(t)
		l := f.open()
		for range 3 {
			var subs []*store.Submission
			for range copyRows / 2 {
				subs = append(subs, used("r"))
			}
			f.append(l, subs...)
		}
		l.Close()
		g := f.besideOn(on)
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := Copy(ctx, f.database(), g.database(), f.verify, func(done, _ int64) { cancel() }); !errors.Is(err, context.Canceled) {
			t.Fatalf("broken off: %v", err)
		}
		copyFile(t, filepath.Join(f.o.Dir, "head"), filepath.Join(g.o.Dir, "head"))
		g.refuses()
		os.Remove(filepath.Join(g.o.Dir, "head"))
		g.refuses() // also without the head: entries and no checkpoint of all of them
		if _, err := Copy(t.Context(), f.database(), g.database(), f.verify, nil); !errors.Is(err, ErrNotEmpty) {
			t.Fatalf("over it: %v", err)
		}
		if on == onPostgres {
			if err := query(g.superuser(), "DROP SCHEMA "+g.postgres().schema+" CASCADE"); err != nil {
				t.Fatal(err)
			}
			if err := InitPostgres(t.Context(), dsnAs(g.o.Postgres, "owner", g.postgres().schema), "recorder"); err != nil {
				t.Fatal(err)
			}
		} else {
			for _, suffix := range []string{"", "-wal", "-shm"} {
				os.Remove(g.path() + suffix)
			}
		}
		if _, err := Copy(t.Context(), f.database(), g.database(), f.verify, nil); err != nil {
			t.Fatal(err)
		}
	})
}
