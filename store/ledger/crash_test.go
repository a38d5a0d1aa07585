package ledger

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"
)

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestMain becomes, when asked by TestEveryAcknowledgedEntrySurvivesKill9, the
// process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("COUNTERSIGN_TEST_APPEND"); dir != "" {
		appendForever(dir)
	}
	if dir := os.Getenv("COUNTERSIGN_TEST_ERASE"); dir != "" {
		eraseAndDie(dir, os.Getenv("COUNTERSIGN_TEST_STAGE"))
	}
	flag.Parse()
	f := flag.Lookup("rapid.checks")
	fewChecks = f.Value.String() == f.DefValue
	code := m.Run()
	stopServer()
	os.Exit(code)
}

// fewChecks is set where nobody said how many histories a test of a property is
// to try.
var fewChecks bool

// checkSome sets it for the next test: each history writes a ledger to disk, or
// has a schema made.
func checkSome(on engineName) {
	if fewChecks {
		flag.Set("rapid.checks", map[engineName]string{onSQLite: "20", onPostgres: "5"}[on])
	}
}

// acked is one line of the child's output: an append that was answered.
type acked struct {
	ID    string
	Index int64
	Head  string
}

func appendForever(dir string) {
	key, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil {
		panic(err)
	}
	skey, vkey, _ := strings.Cut(string(key), "\n")
	signer, err := note.NewSigner(skey)
	if err != nil {
		panic(err)
	}
	dsn := os.Getenv("COUNTERSIGN_TEST_POSTGRES")
	l, err := Open(context.Background(), Options{Dir: dir, Postgres: dsn, Standby: dsn != "", Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	for range 8 {
		go func() {
			for {
				s := used("crash")
				s.Seal("reason", "because")
				b, _ := s.Marshal()
				a, err := l.Append(context.Background(), broker, [][]byte{b})
				if err != nil {
					panic(err)
				}
				mu.Lock()
				out.Encode(acked{s.ID, a.Entries[0].Index, a.Checkpoint})
				mu.Unlock()
			}
		}()
	}
	select {}
}

func TestEveryAcknowledgedEntrySurvivesKill9(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		skey := f.withKey()
		f.o.Now = time.Now
		if err := os.WriteFile(filepath.Join(f.o.Dir, "key"), []byte(skey+"\n"+f.o.Verifier), 0o600); err != nil {
			t.Fatal(err)
		}
		rounds := 5
		if testing.Short() {
			rounds = 2
		}
		var all []acked
		for round := range rounds {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "COUNTERSIGN_TEST_APPEND="+f.o.Dir, "COUNTERSIGN_TEST_POSTGRES="+f.o.Postgres)
			cmd.Stderr = os.Stderr
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			n, in := 0, bufio.NewScanner(out)
			for in.Scan() {
				var a acked
				if json.Unmarshal(in.Bytes(), &a) != nil {
					break // cut by the kill
				}
				all = append(all, a)
				if n++; n == 40+37*round {
					cmd.Process.Kill()
				}
			}
			cmd.Wait()
			if n < 40 {
				t.Fatalf("only %d appends before the kill", n)
			}
		}
		f.o.Standby = on == onPostgres // the server may take a moment to see that the client is gone
		l := f.open()
		// What was committed and not acknowledged stays: its author would ask again.
		others := int(l.Size()) - len(all)
		if others < 0 || others > 8*rounds {
			t.Fatalf("%d entries, %d were acknowledged", l.Size(), len(all))
		}
		f.holds(l, all, others)
	})
}

func TestAFullDiskRefusesAppendsWholeAndPassesWhenThereIsSpace(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	s := f.story("req_1", false)
	f.append(l, s.requested())
	var pages int64
	if err := l.wr.conn.QueryRowContext(t.Context(), "PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	limit := func(n int64) {
		if _, err := l.wr.conn.ExecContext(t.Context(), fmt.Sprintf("PRAGMA max_page_count = %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	limit(pages + 2)
	full := false
	var refused [][]byte
	for i := 0; i < 100 && !full; i++ {
		size := l.Size()
		x := used("big")
		x.SetDetails(map[string]string{"note": strings.Repeat("x", 9000)})
		refused = wire(t, s.issuing(1), x)
		if i > 0 {
			refused = wire(t, x)
		}
		_, err := l.Append(t.Context(), broker, refused)
		if full = err != nil; full {
			if !errors.Is(err, store.ErrUnavailable) {
				t.Fatalf("disk full: %v", err)
			}
			if l.Size() != size {
				t.Fatal("a refused append is counted")
			}
		}
	}
	if !full {
		t.Fatal("the disk never filled")
	}
	if l.Err() != nil {
		t.Fatalf("stopped: %v", l.Err())
	}
	if _, err := l.Append(t.Context(), broker, refused); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("still full: %v", err)
	}
	limit(1 << 30)
	a, err := l.Append(t.Context(), broker, refused)
	if err != nil {
		t.Fatalf("with space again: %v", err)
	}
	f.check(a)
	if err := l.recheck(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.Close()
	f.open()
}

func TestAppendsAreRefusedWhileTheHeadFileCannotBeWritten(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		f.append(l, used("r"))
		// A directory where the new head is to be written: not even root gets past it.
		inTheWay := l.headFile.path + ".new"
		for os.Mkdir(inTheWay, 0o700) != nil {
			runtime.Gosched() // a write under way has its file there
		}
		// The write runs beside the appends, so that a few more of them get through.
		until := func(refused bool) {
			t.Helper()
			for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
				_, err := l.Append(t.Context(), broker, wire(t, used("r")))
				if err != nil && !errors.Is(err, store.ErrUnavailable) {
					t.Fatal(err)
				}
				if (err != nil) == refused {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("refused is never %t", refused)
				}
			}
		}
		until(true)
		if err := os.Remove(inTheWay); err != nil {
			t.Fatal(err)
		}
		until(false)
	})
}

func TestManyWritersAndReadersAtOnceHaveOneLog(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		ctx, cancel := context.WithCancel(t.Context())
		var wg, readers sync.WaitGroup
		for r := range 3 {
			readers.Go(func() {
				for ctx.Err() == nil {
					switch r {
					case 0:
						a, err := l.OpenSet(ctx, "")
						if err == nil {
							for i := range a.Entries {
								if _, err := f.verify.Check(a.Receipt(i)); err != nil {
									t.Error(err)
								}
							}
						}
					case 1:
						if _, err := l.History(ctx, Query{Orchestrator: "demo", Limit: 20}); err != nil && ctx.Err() == nil {
							t.Error(err)
						}
					case 2:
						if err := l.recheck(ctx); err != nil && ctx.Err() == nil {
							t.Error(err)
						}
					}
				}
			})
		}
		const writers, each = 16, 20
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					s := f.story(fmt.Sprintf("req_%d_%d", w, i), i%2 == 0)
					intent := s.issuing(1)
					for _, step := range [][]*store.Submission{{s.requested(), intent}, {s.issued(intent, 1)}, {s.closed(store.CredentialRevoked, intent, 1)}} {
						a, err := l.Append(ctx, broker, wire(t, step...))
						if err != nil {
							t.Error(err)
							return
						}
						for i := range a.Entries {
							if _, err := f.verify.Check(a.Receipt(i)); err != nil {
								t.Error(err)
							}
						}
					}
				}
			})
		}
		wg.Wait()
		cancel()
		readers.Wait()
		if l.Size() != writers*each*4 {
			t.Fatalf("size %d", l.Size())
		}
		if err := l.recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestOfFiftyRacersForOneJoinOneWins(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		f := newFixtureOn(t, on)
		l := f.open()
		var wg sync.WaitGroup
		results := make(chan error, 50)
		for i := range 50 {
			wg.Go(func() {
				s := f.story(fmt.Sprint("req_", i), true)
				r := s.requested()
				r.SetDetails(store.RequestedDetails{Grant: s.grant, Join: "one", Keyed: true})
				_, err := l.Append(t.Context(), Author{Name: fmt.Sprint("broker-", i%2)}, wire(t, r, s.issuing(1)))
				results <- err
			})
		}
		wg.Wait()
		close(results)
		won := 0
		for err := range results {
			if err == nil {
				won++
			} else if !isOrder(err, store.OrderJoined) {
				t.Error(err)
			}
		}
		if won != 1 || l.Size() != 2 {
			t.Fatalf("%d won, %d entries", won, l.Size())
		}
	})
}

func TestWhateverIsAppendedTheLogHoldsWhatWasAcknowledgedInOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, on engineName) {
		checkSome(on)
		rapid.Check(t, func(rt *rapid.T) {
			f := newFixtureOn(t, on)
			l := f.open()
			defer func() { l.Close() }()
			type req struct {
				s      *story
				intent *store.Submission
				n      int
			}
			reqs := []*req{}
			count := int64(0)
			var lastHead string
			rt.Repeat(map[string]func(*rapid.T){
				"append": func(rt *rapid.T) {
					if len(reqs) == 0 || rapid.Bool().Draw(rt, "new") {
						reqs = append(reqs, &req{s: f.story(fmt.Sprint("req_", len(reqs)), rapid.Bool().Draw(rt, "keyed"))})
					}
					r := rapid.SampledFrom(reqs).Draw(rt, "request")
					var group []*store.Submission
					for range rapid.IntRange(1, 3).Draw(rt, "entries") {
						switch rapid.IntRange(0, 6).Draw(rt, "kind") {
						case 0:
							group = append(group, r.s.requested())
						case 1:
							r.n = rapid.IntRange(1, 3).Draw(rt, "attempt")
							r.intent = r.s.issuing(r.n)
							group = append(group, r.intent)
						case 2, 3, 4:
							if r.intent == nil {
								r.intent = r.s.issuing(1)
							}
							n := max(r.n, 1)
							group = append(group, rapid.SampledFrom([]*store.Submission{r.s.issued(r.intent, n), r.s.closed(store.CredentialRevoked, r.intent, n), r.s.closed(store.CredentialAbandoned, r.intent, n)}).Draw(rt, "outcome"))
						default:
							group = append(group, used("r"))
						}
					}
					a, err := l.Append(t.Context(), Author{Name: rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "writer")}, wire(t, group...))
					if err != nil {
						if _, ok := store.IsOrder(err); !ok {
							rt.Fatal(err)
						}
						if l.Size() != count {
							rt.Fatal("a refused append left something")
						}
						return
					}
					for i, p := range a.Entries {
						if p.Index != count {
							rt.Fatalf("index %d, want %d", p.Index, count)
						}
						count++
						if _, err := f.verify.Check(a.Receipt(i)); err != nil {
							rt.Fatal(err)
						}
					}
					if lastHead != "" {
						was, _ := f.verify.Checkpoint(lastHead)
						is, _ := f.verify.Checkpoint(a.Checkpoint)
						p, err := l.Consistency(t.Context(), was.N, is.N)
						if err != nil {
							rt.Fatal(err)
						}
						if err := tlog.CheckTree(p, is.N, is.Hash, was.N, was.Hash); err != nil {
							rt.Fatal(err)
						}
					}
					lastHead = a.Checkpoint
				},
				"wait": func(rt *rapid.T) {
					f.advance(time.Duration(rapid.Int64Range(-1e9, 200e9).Draw(rt, "time")))
				},
				"restart": func(rt *rapid.T) {
					if err := l.Close(); err != nil {
						rt.Fatal(err)
					}
					l = f.open()
				},
				"": func(rt *rapid.T) {
					if l.Size() != count {
						rt.Fatalf("size %d, want %d", l.Size(), count)
					}
				},
			})
			if err := l.recheck(t.Context()); err != nil {
				rt.Fatal(err)
			}
		})
	})
}

func TestTheFrontierAgreesWithTlog(t *testing.T) {
	var f frontier
	var stored []tlog.Hash
	r := tlog.HashReaderFunc(func(ix []int64) (out []tlog.Hash, err error) {
		for _, i := range ix {
			out = append(out, stored[i])
		}
		return out, nil
	})
	for n := range int64(600) {
		leaf := tlog.RecordHash(fmt.Append(nil, n))
		want, err := tlog.StoredHashesForRecordHash(n, leaf, r)
		if err != nil {
			t.Fatal(err)
		}
		got := f.add(nil, leaf)
		for i, h := range want {
			if tlog.Hash(got[i*32:][:32]) != h || len(got) != len(want)*32 {
				t.Fatalf("nodes of leaf %d", n)
			}
		}
		stored = append(stored, want...)
		root, err := tlog.TreeHash(n+1, r)
		if err != nil || f.root() != root {
			t.Fatalf("root of %d: %v", n+1, err)
		}
	}
}
