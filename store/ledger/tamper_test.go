package ledger

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"golang.org/x/mod/sumdb/note"
)

// tamperer is somebody with write access to the database file and any SQL tool.
// They drop the triggers first, and put them back when done.
func (f *fixture) tamper(fn func(exec func(q string, args ...any))) {
	f.t.Helper()
	db, make := f.raw(), sqliteSchema()
	defer db.Close()
	if f.on == onPostgres {
		make = f.postgres().statements()
	}
	exec := func(q string, args ...any) {
		f.t.Helper()
		r, err := db.Exec(f.dialect(q), args...)
		if err != nil {
			f.t.Fatalf("%s: %v", q, err)
		}
		if n, _ := r.RowsAffected(); n == 0 && !strings.HasPrefix(q, "DROP") && !strings.HasPrefix(q, "CREATE") && !strings.HasPrefix(q, "ALTER") {
			f.t.Fatalf("%s: changed nothing", q)
		}
	}
	for _, s := range make {
		if strings.HasPrefix(s, "CREATE TRIGGER") {
			exec(f.dropTrigger(s))
		}
	}
	fn(exec)
	for _, s := range make {
		if strings.HasPrefix(s, "CREATE TRIGGER") || strings.HasPrefix(s, "ALTER") {
			exec(s)
		}
	}
}

// raw is the database without the ledger before it.
func (f *fixture) raw() *sql.DB {
	f.t.Helper()
	db, err := openDB(f.path(), 1)
	if f.on == onPostgres {
		db, err = sql.Open("pgx", f.superuser())
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return db
}

// dropTrigger undoes the statement that made a trigger.
func (f *fixture) dropTrigger(made string) string {
	drop := "DROP TRIGGER " + strings.Fields(made)[2]
	if f.on == onPostgres {
		_, on, _ := strings.Cut(made, " ON ")
		drop += " ON " + strings.Fields(on)[0]
	}
	return drop
}

// dialect has a statement written for SQLite understood.
func (f *fixture) dialect(q string) string {
	if f.on != onPostgres {
		return q
	}
	for n := 1; strings.Contains(q, "?"); n++ {
		q = strings.Replace(q, "?", fmt.Sprintf("$%d", n), 1)
	}
	return strings.NewReplacer("substr(note, -4)", "right(note, 4)").Replace(q)
}

// flip changes one byte of column of the row with key.
func (f *fixture) flip(table, key, column string, row, at int) (string, []any) {
	if f.on == onPostgres {
		to := fmt.Sprintf("overlay(%s placing CASE WHEN substr(%[1]s, %d, 1) = 'A' THEN 'B' ELSE 'A' END from %[2]d for 1)", column, at+1)
		if column == "nodes" {
			to = fmt.Sprintf("set_byte(nodes, %d, get_byte(nodes, %[1]d) # 1)", at)
		}
		return fmt.Sprintf("UPDATE %s SET %s = %s WHERE %s = ?", table, column, to, key), []any{row}
	}
	return fmt.Sprintf(`UPDATE %s SET %s = CAST(substr(CAST(%[2]s AS BLOB), 1, ?1) || CASE WHEN substr(CAST(%[2]s AS BLOB), ?1 + 1, 1) = x'41' THEN x'42' ELSE x'41' END || substr(CAST(%[2]s AS BLOB), ?1 + 2) AS %[4]s) WHERE %[3]s = ?2`,
		table, column, key, map[string]string{"body": "TEXT", "note": "TEXT", "nodes": "BLOB"}[column]), []any{at, row}
}

const (
	tamperEntries = 120 // in all
	tamperNewest  = 40  // hashed again at start
)

// filled makes a ledger of tamperEntries in which requests are open, and closes
// it.
func filled(t *testing.T, on engineName) *fixture {
	if on == onPostgres {
		return cloneFilled(t)
	}
	return fill(t, newFixtureOn(t, on))
}

func fill(t testing.TB, f *fixture) *fixture {
	f.o.CheckNewest = tamperNewest
	l := f.open()
	for i := 0; i < tamperEntries; i += 4 {
		f.advance(time.Second)
		s := f.story(fmt.Sprint("req_", i), i%8 == 0)
		intent := s.issuing(1)
		f.append(l, s.requested(), intent)
		issued := s.issued(intent, 1)
		issued.Seal("reason", fmt.Sprint("because ", i))
		f.append(l, issued)
		if i%16 == 0 {
			f.append(l, s.closed(store.CredentialRevoked, intent, 1))
		} else {
			f.append(l, used("r"))
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return f
}

// refuses opens the altered ledger and wants it refused.
func (f *fixture) refuses() {
	f.t.Helper()
	l, err := Open(f.t.Context(), f.o)
	if err == nil {
		l.Close()
		f.t.Fatal("an altered ledger was opened")
	}
	if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "ledger mismatch") {
		f.t.Fatalf("not a mismatch: %v", err)
	}
}

// stops opens the altered ledger, with the background pass on, and wants it to
// stop by itself.
func (f *fixture) stops() {
	f.t.Helper()
	f.o.RecheckEvery = time.Hour
	l, err := Open(f.t.Context(), f.o)
	if err != nil {
		f.t.Fatalf("did not start: %v", err)
	}
	defer l.Close()
	select {
	case <-l.Done():
	case <-time.After(10 * time.Second):
		f.t.Fatal("the background pass did not find it")
	}
	if !errors.Is(l.Err(), ErrMismatch) {
		f.t.Fatalf("not a mismatch: %v", l.Err())
	}
	if _, err := l.Append(f.t.Context(), broker, wire(f.t, used("after"))); !errors.Is(err, store.ErrUnavailable) || !errors.Is(err, ErrMismatch) {
		f.t.Fatalf("an append after it: %v", err)
	}
	if _, err := l.History(f.t.Context(), Query{}); !errors.Is(err, store.ErrUnavailable) {
		f.t.Fatalf("a query after it: %v", err)
	}
}

func TestAnUntouchedLedgerStartsAndPassesTheBackgroundCheck(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		f.tamper(func(func(string, ...any)) {}) // triggers dropped and put back: nothing altered
		l := f.open()
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.append(l, used("after"))
	})
}

func TestTamperingIsFound(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		type exec = func(q string, args ...any)
		renumber := func(e exec, from int) { // move everything from on down by one
			e("UPDATE entries SET idx = -idx - 1 WHERE idx > ?", from)
			e("UPDATE entries SET idx = -idx - 2 WHERE idx < 0")
		}
		newest, older := tamperEntries-7, 9 // row numbers; 9 also lies on the path of no edge node's row
		var f *fixture                      // the one under the subtest's hands
		both := map[string]func(e exec, row int){
			"a byte of a body": func(e exec, row int) {
				q, a := f.flip("entries", "idx", "body", row, 200)
				e(q, a...)
			},
			"a value in a body": func(e exec, row int) {
				e("UPDATE entries SET body = replace(body, '\"demo\"', '\"dema\"') WHERE idx = ?", row)
			},
			"a byte of a leaf hash": func(e exec, row int) {
				q, a := f.flip("hashes", "idx", "nodes", row, 3)
				e(q, a...)
			},
			"a byte of an interior hash": func(e exec, row int) {
				q, a := f.flip("hashes", "idx", "nodes", row|1, 40)
				e(q, a...)
			},
			"a hash row removed": func(e exec, row int) { e("DELETE FROM hashes WHERE idx = ?", row) },
			"an entry removed":   func(e exec, row int) { e("DELETE FROM entries WHERE idx = ?", row) },
			"an entry and its hash gone": func(e exec, row int) {
				e("DELETE FROM entries WHERE idx = ?", row)
				e("DELETE FROM hashes WHERE idx = ?", row)
			},
			"two rows swapped": func(e exec, row int) {
				e("UPDATE entries SET idx = -1 WHERE idx = ?", row)
				e("UPDATE entries SET idx = ? WHERE idx = ?", row, row+1)
				e("UPDATE entries SET idx = ? WHERE idx = -1", row+1)
			},
			"two rows swapped with their leaf hashes": func(e exec, row int) {
				row &^= 1
				e("UPDATE entries SET idx = -1 WHERE idx = ?", row)
				e("UPDATE entries SET idx = ? WHERE idx = ?", row, row+1)
				e("UPDATE entries SET idx = ? WHERE idx = -1", row+1)
				e("UPDATE hashes SET nodes = (SELECT substr(nodes, 1, 32) FROM hashes WHERE idx = ?) WHERE idx = ?", row+1, row)
			},
		}
		for name, alter := range both {
			t.Run(name+" among the newest stops the start", func(t *testing.T) {
				f = filled(t, on)
				f.tamper(func(e exec) { alter(e, newest) })
				f.refuses()
			})
			t.Run(name+" further back stops the running ledger", func(t *testing.T) {
				f = filled(t, on)
				f.tamper(func(e exec) { alter(e, older) })
				f.stops()
			})
		}
		for name, alter := range map[string]func(e exec){
			"the tail cut off, checkpoints too": func(e exec) {
				for _, q := range []string{"DELETE FROM entries WHERE idx >= 100", "DELETE FROM hashes WHERE idx >= 100", "DELETE FROM checkpoints WHERE size > 100"} {
					e(q)
				}
			},
			"the last entry cut off": func(e exec) {
				e("DELETE FROM entries WHERE idx = 119")
				e("DELETE FROM hashes WHERE idx = 119")
				e("DELETE FROM checkpoints WHERE size = 120")
			},
			"the last entry cut off, its checkpoint kept": func(e exec) {
				e("DELETE FROM entries WHERE idx = 119")
				e("DELETE FROM hashes WHERE idx = 119")
			},
			"everything removed": func(e exec) {
				for _, table := range []string{"entries", "hashes", "checkpoints", "open_requests", "sealed"} {
					e("DELETE FROM " + table)
				}
			},
			"all entries removed": func(e exec) { e("DELETE FROM entries") },
			"the newest checkpoint altered": func(e exec) {
				q, a := f.flip("checkpoints", "size", "note", tamperEntries, 30)
				e(q, a...)
			},
			"the newest checkpoint's signature altered": func(e exec) {
				e("UPDATE checkpoints SET note = substr(note, 1, length(note) - 8) || 'AAAA' || substr(note, -4) WHERE size = ?", tamperEntries)
			},
			"the newest checkpoint removed": func(e exec) { e("DELETE FROM checkpoints WHERE size = ?", tamperEntries) },
			"all checkpoints removed":       func(e exec) { e("DELETE FROM checkpoints") },
			"an entry added": func(e exec) {
				e("INSERT INTO entries (idx, body) SELECT 120, replace(body, '\"id\":\"0', '\"id\":\"1') FROM entries WHERE idx = 119")
				e("INSERT INTO hashes (idx, nodes) SELECT 120, substr(nodes, 1, 32) FROM hashes WHERE idx = 119")
			},
			"an entry removed, the rest moved up": func(e exec) {
				e("DELETE FROM entries WHERE idx = 9")
				renumber(e, 9)
			},
			"an open request that is no JSON": func(e exec) { e("UPDATE open_requests SET state = '{}' WHERE request = 'req_4'") },
			"a trigger of somebody's own": func(e exec) {
				e(map[engineName]string{
					onSQLite:   "CREATE TRIGGER mine AFTER INSERT ON entries BEGIN SELECT 1; END",
					onPostgres: "CREATE TRIGGER mine BEFORE UPDATE ON entries FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
				}[on])
			},
			"an index gone": func(e exec) { e("DROP INDEX entries_run") },
		} {
			t.Run(name+" stops the start", func(t *testing.T) {
				f = filled(t, on)
				f.tamper(alter)
				f.refuses()
			})
		}
		for name, alter := range map[string]func(e exec){
			"an open request edited": func(e exec) {
				e("UPDATE open_requests SET state = replace(state, '\"attempt\":1', '\"attempt\":0') WHERE request = 'req_4'")
			},
			"an open request removed": func(e exec) { e("DELETE FROM open_requests WHERE request = 'req_4'") },
			"an open request made up": func(e exec) {
				e("INSERT INTO open_requests SELECT 'req_x', replace(state, 'req_4', 'req_x') FROM open_requests WHERE request = 'req_4'")
			},
			"an older checkpoint altered": func(e exec) {
				q, a := f.flip("checkpoints", "size", "note", 44, 30)
				e(q, a...)
			},
			"the first checkpoint removed": func(e exec) { e("DELETE FROM checkpoints WHERE size = 0") },
			"a sealed text altered":        func(e exec) { e("UPDATE sealed SET box = (SELECT box FROM sealed WHERE idx = 10) WHERE idx = 6") },
		} {
			t.Run(name+" stops the running ledger", func(t *testing.T) {
				f = filled(t, on)
				f.tamper(alter)
				f.stops()
			})
		}
	})
}

func TestAnEditedOpenRequestStopsTheStartOfALedgerThatIsHashedWhole(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		f.o.CheckNewest = tamperEntries
		f.tamper(func(e func(string, ...any)) { e("DELETE FROM open_requests WHERE request = 'req_4'") })
		f.refuses()
	})
}

func TestATriggerTakenAwayStopsTheStart(t *testing.T) {
	for _, s := range sqliteSchema() {
		if !strings.HasPrefix(s, "CREATE TRIGGER") {
			continue
		}
		name := strings.Fields(s)[2]
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.open().Close()
			db, err := openDB(f.path(), 1)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.Exec("DROP TRIGGER " + name); err != nil {
				t.Fatal(err)
			}
			db.Close()
			f.refuses()
		})
	}
}

func TestATreeRebuiltWithoutTheLogKeyIsRefused(t *testing.T) {
	f := filled(t, onSQLite)
	// Everything consistent with everything else, under a key of one's own.
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	mine, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	g := newFixture(t)
	g.o.Signer, g.o.Verifier = mine, vkey
	l := g.open()
	if g.verify, err = store.NewLogVerifier(vkey); err != nil {
		t.Fatal(err)
	}
	for range tamperEntries {
		g.append(l, used("forged"))
	}
	l.Close()
	copyFile(t, g.path(), f.path())
	f.refuses()
	copyFile(t, g.o.Dir+"/head", f.o.Dir+"/head")
	f.refuses()
}

func TestAnOlderDatabasePutBackIsNoticed(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.append(l, used("r1"), used("r2"))
	l.Close()
	old := t.TempDir() + "/old.db"
	copyFile(t, f.path(), old)
	l = f.open()
	f.append(l, used("r3"))
	l.Close()
	copyFile(t, old, f.path())
	f.refuses()
}

func TestAForkOfTheSameLengthIsNoticed(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.append(l, used("r1"))
	l.Close()
	old, head := t.TempDir()+"/old.db", t.TempDir()+"/head"
	copyFile(t, f.path(), old)
	copyFile(t, f.o.Dir+"/head", head)
	l = f.open()
	f.append(l, used("seen"))
	l.Close()
	copyFile(t, f.o.Dir+"/head", head+".seen")
	// The same key signs another second entry, and a third.
	copyFile(t, old, f.path())
	copyFile(t, head, f.o.Dir+"/head")
	l = f.open()
	f.append(l, used("other"), used("more"))
	l.Close()
	copyFile(t, head+".seen", f.o.Dir+"/head")
	f.refuses()
}

func TestAMissingOrAlteredHeadFileIsNoticed(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := filled(t, on)
		head := f.o.Dir + "/head"
		b, err := os.ReadFile(head)
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			c := append([]byte(nil), b...)
			c[i] ^= 1
			if err := os.WriteFile(head, c, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := f.verify.Checkpoint(string(c)); err == nil {
				continue // the bits of base64 that stand for nothing
			}
			if i%16 == 0 || i < 40 {
				f.refuses()
			}
		}
		if err := os.Remove(head); err != nil {
			t.Fatal(err)
		}
		f.refuses()
		// An older checkpoint of the same log is what a recorder may be given back.
		r, err := ReadOnly(f.where())
		if err != nil {
			t.Fatal(err)
		}
		for size, n := range r.Checkpoints(t.Context()) {
			if size > 50 {
				if err := os.WriteFile(head, []byte(n), 0o600); err != nil {
					t.Fatal(err)
				}
				break
			}
		}
		r.Close()
		f.open()
	})
}

func TestAnAlteredIndexIsFound(t *testing.T) {
	f := filled(t, onSQLite)
	// Straight in the file: the pages of an index hold its values in the clear.
	b, err := os.ReadFile(f.path())
	if err != nil {
		t.Fatal(err)
	}
	var root, size int
	db, err := openDB(f.path(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.QueryRow("SELECT rootpage FROM sqlite_master WHERE name = 'entries_run'").Scan(&root); err != nil {
		t.Fatal(err)
	}
	if err := db.QueryRow("PRAGMA page_size").Scan(&size); err != nil {
		t.Fatal(err)
	}
	db.Close()
	page := b[(root-1)*size : root*size]
	at := strings.Index(string(page), "run-req_20")
	if at < 0 {
		t.Fatal("the index is not where it was looked for")
	}
	page[at+len("run-req_2")] = '1'
	if err := os.WriteFile(f.path(), b, 0o600); err != nil {
		t.Fatal(err)
	}
	f.stops()
}

func TestAByteOfTheLogChangedInTheFileIsFound(t *testing.T) {
	f := filled(t, onSQLite)
	whole, err := os.ReadFile(f.path())
	if err != nil {
		t.Fatal(err)
	}
	r, err := ReadOnly(f.where())
	if err != nil {
		t.Fatal(err)
	}
	var places [][]byte // as they stand in the file, where not cut by a page's end
	for s, err := range r.Entries(t.Context(), 0, tamperEntries) {
		if err != nil {
			t.Fatal(err)
		}
		places = append(places, s.Leaf, s.Nodes)
	}
	for _, n := range r.Checkpoints(t.Context()) {
		places = append(places, []byte(n))
	}
	r.Close()
	head, err := os.ReadFile(f.o.Dir + "/head")
	if err != nil {
		t.Fatal(err)
	}
	f.o.RecheckEvery = time.Hour
	tried := 0
	for i, p := range places {
		if i%7 != 0 && i < len(places)-1 {
			continue
		}
		at := bytes.Index(whole, p)
		if at < 0 || bytes.Count(whole, p) > 1 {
			continue // cut in two, or with a stale copy on a free page
		}
		tried++
		at += (i * 131) % len(p)
		b := bytes.Clone(whole)
		b[at] ^= 1
		if err := os.WriteFile(f.path(), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f.o.Dir+"/head", head, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(t.Context(), f.o)
		if err == nil {
			select {
			case <-l.Done():
				err = l.Err()
			case <-time.After(10 * time.Second):
			}
			l.Close()
		}
		if !errors.Is(err, ErrMismatch) {
			t.Errorf("byte %d of the file, in %q: %v", at, p[:min(len(p), 40)], err)
		}
	}
	if tried < 20 {
		t.Fatalf("only %d places tried", tried)
	}
}

func TestADamagedFileIsAMismatch(t *testing.T) {
	f := filled(t, onSQLite)
	b, err := os.ReadFile(f.path())
	if err != nil {
		t.Fatal(err)
	}
	copy(b, "not a database at all")
	if err := os.WriteFile(f.path(), b, 0o600); err != nil {
		t.Fatal(err)
	}
	f.refuses()
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		os.Remove(to + suffix)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheDatabaseItselfRefusesUpdateDeleteAndReplace(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	subs := []*store.Submission{used("r1"), used("r2"), used("r3")}
	f.append(l, subs...)
	l.Close()
	count := func(q interface {
		QueryRow(string, ...any) *sql.Row
	}) (s string) {
		if err := q.QueryRow("SELECT (SELECT group_concat(idx || body) FROM entries) || (SELECT group_concat(idx || hex(nodes)) FROM hashes) || (SELECT group_concat(size || note) FROM checkpoints)").Scan(&s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, recursive := range []string{"OFF", "ON"} {
		db, err := openDB(f.path(), 1, "_pragma=recursive_triggers("+recursive+")")
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		before := count(db)
		for _, q := range []string{
			"UPDATE entries SET body = body",
			"UPDATE entries SET idx = idx + 10",
			"UPDATE OR REPLACE entries SET idx = 0 WHERE idx = 2",
			"UPDATE hashes SET nodes = nodes",
			"UPDATE OR REPLACE hashes SET idx = 0 WHERE idx = 2",
			"UPDATE checkpoints SET note = note",
			"UPDATE OR REPLACE checkpoints SET size = 0 WHERE size = 3",
			"DELETE FROM entries", "DELETE FROM entries WHERE idx = 2", "DELETE FROM hashes", "DELETE FROM checkpoints",
			"REPLACE INTO entries (idx, body) SELECT idx, body FROM entries",
			"REPLACE INTO entries (idx, body) SELECT idx, json_set(body, '$.id', 'x') FROM entries WHERE idx = 2",
			"INSERT OR REPLACE INTO entries (idx, body) SELECT 0, json_set(body, '$.id', 'x') FROM entries WHERE idx = 2",
			"INSERT OR REPLACE INTO entries (idx, body) SELECT 3, body FROM entries WHERE idx = 1", // the same id further on
			"INSERT INTO entries (idx, body) SELECT 3, body FROM entries WHERE idx = 1",
			"INSERT OR IGNORE INTO entries (idx, body) SELECT 3, body FROM entries WHERE idx = 1",
			"INSERT INTO entries (idx, body) SELECT 4, json_set(body, '$.id', 'y') FROM entries WHERE idx = 1", // a gap
			"INSERT INTO entries (idx, body) SELECT -1, json_set(body, '$.id', 'y') FROM entries WHERE idx = 1",
			"INSERT INTO entries (idx, body) VALUES (3, '{}')",
			"INSERT INTO entries (idx, body) SELECT idx, body FROM entries WHERE true ON CONFLICT (idx) DO UPDATE SET body = '{}'",
			"REPLACE INTO hashes SELECT idx, nodes FROM hashes",
			"REPLACE INTO hashes SELECT 2, nodes FROM hashes WHERE idx = 1",
			"INSERT INTO hashes SELECT 4, nodes FROM hashes WHERE idx = 1",
			"INSERT INTO hashes VALUES (3, x'00')",
			"REPLACE INTO checkpoints SELECT size, note FROM checkpoints",
			"REPLACE INTO checkpoints VALUES (0, 'x')",
			"INSERT INTO checkpoints VALUES (2, 'x')",
		} {
			if _, err := db.Exec(q); err == nil {
				t.Errorf("recursive triggers %s: %s was not refused", recursive, q)
			}
			if count(db) != before {
				t.Fatalf("recursive triggers %s: %s changed the log", recursive, q)
			}
		}
	}
	l = f.open()
	if err := l.recheck(context.Background()); err != nil {
		t.Fatal(err)
	}
}
