package witness

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/go-chi/chi/v5"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const origin = "log.example.test/ledger"

// logKey is the key of a log under test.
type logKey struct {
	signer   note.Signer
	vkey     string
	verifier *store.LogVerifier
}

func newLogKey(t testing.TB) *logKey {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	s, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return &logKey{s, vkey, v}
}

// tree is a log of hashes alone.
type tree struct{ hashes []tlog.Hash }

func (t *tree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = t.hashes[x]
	}
	return out, nil
}

func (t *tree) size() int64 {
	n := int64(0)
	for tlog.StoredHashCount(n) < int64(len(t.hashes)) {
		n++
	}
	return n
}

func (t *tree) add(leaves ...string) *tree {
	for _, leaf := range leaves {
		hs, err := tlog.StoredHashes(t.size(), []byte(leaf), t)
		if err != nil {
			panic(err)
		}
		t.hashes = append(t.hashes, hs...)
	}
	return t
}

func (t *tree) root(n int64) tlog.Hash {
	h, err := tlog.TreeHash(n, t)
	if err != nil {
		panic(err)
	}
	return h
}

func (t *tree) proof(old, n int64) tlog.TreeProof {
	if old == 0 || old == n {
		return nil
	}
	p, err := tlog.ProveTree(n, old, t)
	if err != nil {
		panic(err)
	}
	return p
}

func (k *logKey) sign(t testing.TB, n int64, root tlog.Hash) string {
	t.Helper()
	c := torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: n, Hash: root}}
	b, err := note.Sign(&note.Note{Text: c.String()}, k.signer)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ask is the request that submits tr's first n leaves after its first old.
func (k *logKey) ask(t testing.TB, tr *tree, old, n int64) *request {
	return &request{old: old, proof: tr.proof(old, n), note: k.sign(t, n, tr.root(n))}
}

// running is a witness that listens.
type running struct {
	*Server
	url    string
	signer *torchwood.CosignatureSigner
	dir    string
}

func newSigner(t testing.TB, name string) *torchwood.CosignatureSigner {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := torchwood.NewCosignatureSigner(name, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newWitness(t testing.TB, name string, k *logKey) *running {
	t.Helper()
	w := &running{signer: newSigner(t, name), dir: t.TempDir()}
	s, err := NewServer(ServerConfig{Signer: w.signer, Dir: w.dir, Logs: []Log{{Key: k.vkey}}})
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	s.Routes(r)
	srv := httptest.NewServer(r)
	t.Cleanup(func() { srv.Close(); s.Close() })
	w.Server, w.url = s, srv.URL
	return w
}

func (w *running) client(t testing.TB, k *logKey) *Client {
	t.Helper()
	c, err := NewClient(w.url, w.signer.Verifier().String(), k.verifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func post(t testing.TB, url string, body []byte) (int, string, http.Header) {
	t.Helper()
	res, err := http.Post(url+"/add-checkpoint", "text/plain", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b), res.Header
}

func get[T any](t testing.TB, url string) (v T) {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d", url, res.StatusCode)
	}
	if err := json.NewDecoder(res.Body).Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestAWitnessCosignsWhatContinuesTheCheckpointBefore(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	tr := (&tree{}).add("a", "b", "c", "d", "e", "f", "g")
	for _, step := range []struct{ old, n int64 }{{0, 3}, {3, 3}, {3, 4}, {4, 7}} {
		r := k.ask(t, tr, step.old, step.n)
		code, lines, _ := post(t, w.url, r.marshal())
		if code != http.StatusOK {
			t.Fatalf("%v: %d %s", step, code, lines)
		}
		n, err := note.Open([]byte(r.note+lines), note.VerifierList(w.signer.Verifier()))
		if err != nil {
			t.Fatal(err)
		}
		at, err := torchwood.CosignatureTimestamp(n.Sigs[0])
		if d := time.Since(time.Unix(at, 0)); err != nil || d < -time.Second || d > time.Minute {
			t.Fatalf("cosigned at %d: %v", at, err)
		}
		// With the line added, it is still a checkpoint of the log to all who check it.
		if c, err := k.verifier.Checkpoint(r.note + lines); err != nil || c.N != step.n {
			t.Fatalf("the log's own key: %v", err)
		}
		if heads := get[[]Head](t, w.url+"/logs"); len(heads) != 1 || heads[0].Size != step.n || heads[0].Checkpoint != r.note {
			t.Fatalf("GET /logs: %+v", heads)
		}
	}
	if forks := get[[]Fork](t, w.url+"/forks"); len(forks) != 0 {
		t.Fatalf("evidence of no fork: %+v", forks)
	}
}

func TestAWitnessRefusesAsC2SPSays(t *testing.T) {
	k, other := newLogKey(t), newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	tr := (&tree{}).add("a", "b", "c", "d", "e", "f", "g")
	if code, body, _ := post(t, w.url, k.ask(t, tr, 0, 4).marshal()); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	edit := func(r *request, f func(*request)) []byte { f(r); return r.marshal() }
	unknown := torchwood.Checkpoint{Origin: "other.example/log", Tree: tlog.Tree{N: 5, Hash: tr.root(5)}}
	skey, _, err := note.GenerateKey(rand.Reader, "other.example/log")
	if err != nil {
		t.Fatal(err)
	}
	s, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := note.Sign(&note.Note{Text: unknown.String()}, s)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		body []byte
		code int
		text string
	}{
		"unknown log":          {edit(k.ask(t, tr, 4, 5), func(r *request) { r.note = string(foreign) }), 404, ""},
		"another key":          {other.ask(t, tr, 4, 5).marshal(), 403, ""},
		"forged root":          {edit(k.ask(t, tr, 4, 5), func(r *request) { r.note = strings.Replace(r.note, tr.root(5).String(), tr.root(6).String(), 1) }), 403, ""},
		"old over new":         {edit(k.ask(t, tr, 4, 4), func(r *request) { r.old = 5 }), 400, ""},
		"old size unknown":     {k.ask(t, tr, 0, 7).marshal(), 409, "4\n"},
		"old size behind":      {k.ask(t, tr, 3, 7).marshal(), 409, "4\n"},
		"older checkpoint":     {k.ask(t, tr, 2, 3).marshal(), 409, "4\n"},
		"no proof":             {edit(k.ask(t, tr, 4, 7), func(r *request) { r.proof = nil }), 422, ""},
		"proof of another":     {edit(k.ask(t, tr, 4, 7), func(r *request) { r.proof[0][0] ^= 1 }), 422, ""},
		"proof where none is":  {edit(k.ask(t, tr, 4, 4), func(r *request) { r.proof = tr.proof(4, 7) }), 422, ""},
		"no empty line":        {[]byte("old 4\n"), 400, ""},
		"leading zero":         {bytes.Replace(k.ask(t, tr, 4, 5).marshal(), []byte("old 4"), []byte("old 04"), 1), 400, ""},
		"negative":             {bytes.Replace(k.ask(t, tr, 4, 5).marshal(), []byte("old 4"), []byte("old -4"), 1), 400, ""},
		"too many proof lines": {edit(k.ask(t, tr, 4, 5), func(r *request) { r.proof = make(tlog.TreeProof, 64) }), 400, ""},
		"too large":            {append(k.ask(t, tr, 4, 5).marshal(), make([]byte, MaxBody)...), 413, ""},
	} {
		code, body, h := post(t, w.url, c.body)
		if code != c.code || c.text != "" && body != c.text {
			t.Errorf("%s: %d %q, want %d %q", name, code, body, c.code, c.text)
		}
		if code == http.StatusConflict && h.Get("Content-Type") != "text/x.tlog.size" {
			t.Errorf("%s: content type %q", name, h.Get("Content-Type"))
		}
		if strings.Contains(body, "— ") {
			t.Errorf("%s: a cosignature beside a refusal: %q", name, body)
		}
	}
	if heads := get[[]Head](t, w.url+"/logs"); heads[0].Size != 4 {
		t.Fatalf("a refusal moved the witness: %+v", heads)
	}
	if code, body, _ := post(t, w.url, k.ask(t, tr, 4, 7).marshal()); code != http.StatusOK {
		t.Fatalf("after the refusals: %d %s", code, body)
	}
}

func TestAWitnessNeverSignsTheEmptyTreeUnderAnotherRoot(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	r := &request{note: k.sign(t, 0, tlog.Hash{1})}
	if code, body, _ := post(t, w.url, r.marshal()); code != http.StatusUnprocessableEntity {
		t.Fatalf("%d %s", code, body)
	}
	if code, body, _ := post(t, w.url, k.ask(t, &tree{}, 0, 0).marshal()); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
}

func TestTwoHeadsOfOneSizeAreKeptAsEvidenceAndOneIsCosigned(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	a := (&tree{}).add("a", "b", "c")
	b := (&tree{}).add("a", "b", "x")
	first, second := k.ask(t, a, 0, 3), k.ask(t, b, 0, 3)
	if code, _, _ := post(t, w.url, first.marshal()); code != 200 {
		t.Fatal(code)
	}
	for _, old := range []int64{0, 2, 3} {
		second.old = old
		if code, body, _ := post(t, w.url, second.marshal()); code != 409 || body != "3\n" {
			t.Fatalf("%d %q", code, body)
		}
	}
	forks := get[[]Fork](t, w.url+"/forks")
	if len(forks) != 1 || forks[0].Kind != ForkTwoHeads || forks[0].Kept != first.note || forks[0].Shown != second.note {
		t.Fatalf("evidence: %+v", forks)
	}
	// The evidence stands by itself: both notes verify with the log's key.
	x, err1 := k.verifier.Checkpoint(forks[0].Kept)
	y, err2 := k.verifier.Checkpoint(forks[0].Shown)
	if err1 != nil || err2 != nil || x.N != y.N || x.Hash == y.Hash {
		t.Fatalf("%v %v %v %v", x, y, err1, err2)
	}
}

func TestEvidenceThatWasABadProofGoesOnceTheCheckpointIsProved(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	tr := (&tree{}).add("a", "b", "c", "d", "e")
	post(t, w.url, k.ask(t, tr, 0, 3).marshal())
	bad := k.ask(t, tr, 3, 5)
	bad.proof[0] = tlog.Hash{}
	if code, _, _ := post(t, w.url, bad.marshal()); code != 422 {
		t.Fatal(code)
	}
	if forks := get[[]Fork](t, w.url+"/forks"); len(forks) != 1 || forks[0].Kind != ForkUnproved || forks[0].Shown != bad.note {
		t.Fatalf("evidence: %+v", forks)
	}
	if code, _, _ := post(t, w.url, k.ask(t, tr, 3, 5).marshal()); code != 200 {
		t.Fatal(code)
	}
	if forks := get[[]Fork](t, w.url+"/forks"); len(forks) != 0 {
		t.Fatalf("evidence: %+v", forks)
	}
}

func TestEvidenceIsBounded(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	post(t, w.url, k.ask(t, (&tree{}).add("a"), 0, 1).marshal())
	for i := range maxForks + 5 {
		tr := (&tree{}).add(fmt.Sprint("x", i))
		if code, _, _ := post(t, w.url, k.ask(t, tr, 1, 1).marshal()); code != 409 {
			t.Fatal(code)
		}
	}
	if forks := get[[]Fork](t, w.url+"/forks"); len(forks) != maxForks {
		t.Fatalf("%d pieces of evidence", len(forks))
	}
}

// Two of a log's recorders, one key, all at once: of every size at most one
// root is cosigned, and all that are cosigned are of one tree.
func TestTwoRecordersWithOneKeyAreNeverBothCosigned(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	const n = 60
	mine, yours := (&tree{}).add("a", "b"), (&tree{}).add("a", "b")
	for i := range n {
		mine.add(fmt.Sprint("mine", i))
		yours.add(fmt.Sprint("yours", i))
	}
	var mu sync.Mutex
	cosigned := map[int64]map[tlog.Hash]bool{}
	var wg sync.WaitGroup
	for _, tr := range []*tree{mine, yours, mine, yours} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for size := int64(3); size <= n; size++ {
				old := int64(0)
				for range 3 {
					r := k.ask(t, tr, old, size)
					code, body, _ := post(t, w.url, r.marshal())
					if code == 200 {
						mu.Lock()
						if cosigned[size] == nil {
							cosigned[size] = map[tlog.Hash]bool{}
						}
						cosigned[size][tr.root(size)] = true
						mu.Unlock()
					}
					known, ok := parseSize(strings.TrimSuffix(body, "\n"))
					if code != 409 || !ok || known > size {
						break
					}
					old = known
				}
			}
		}()
	}
	wg.Wait()
	if len(cosigned) == 0 {
		t.Fatal("nothing was cosigned")
	}
	ours, theirs := 0, 0
	for size, roots := range cosigned {
		if len(roots) != 1 {
			t.Fatalf("%d roots of size %d were cosigned", len(roots), size)
		}
		if roots[mine.root(size)] {
			ours++
		} else {
			theirs++
		}
	}
	if ours > 0 && theirs > 0 {
		t.Fatalf("both recorders were cosigned: %d and %d", ours, theirs)
	}
	if forks := get[[]Fork](t, w.url+"/forks"); len(forks) == 0 {
		t.Fatal("no evidence of the fork")
	}
}

func TestTheDatabaseItselfRefusesToGoBack(t *testing.T) {
	k := newLogKey(t)
	w := newWitness(t, "witness.example/w1", k)
	post(t, w.url, k.ask(t, (&tree{}).add("a", "b"), 0, 2).marshal())
	for _, stmt := range []string{
		"UPDATE heads SET size = 1", "UPDATE heads SET root = 'x'", "UPDATE heads SET origin = 'y'", "DELETE FROM heads",
	} {
		if _, err := w.state.db.Exec(stmt); err == nil {
			t.Errorf("%s was done", stmt)
		}
	}
}

func FuzzAddCheckpoint(f *testing.F) {
	k := newLogKey(f)
	tr := (&tree{}).add("a", "b", "c", "d", "e")
	s, err := NewServer(ServerConfig{Signer: newSigner(f, "witness.example/w1"), Dir: f.TempDir(), Logs: []Log{{Key: k.vkey}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	first := k.ask(f, tr, 0, 3)
	if _, err := s.cosign(context.Background(), first.marshal()); err != nil {
		f.Fatal(err)
	}
	valid := k.ask(f, tr, 3, 5)
	f.Add(first.marshal())
	f.Add(valid.marshal())
	f.Add([]byte("old 0\n\n" + origin + "\n1\n" + tr.root(1).String() + "\n\n— " + origin + " AAAA\n"))
	f.Add([]byte("old 20852014\nPlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=\n\nexample.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"))
	signed := map[string]bool{first.note: true, valid.note: true}
	f.Fuzz(func(t *testing.T, body []byte) {
		if r, err := parseRequest(body); err == nil && !bytes.Equal(r.marshal(), body) {
			t.Fatalf("a body that was taken has another form: %q", body)
		} else if err != nil && !errors.Is(err, errMalformed) {
			t.Fatal(err)
		}
		lines, err := s.cosign(context.Background(), body)
		if err != nil {
			return
		}
		_, n, _ := bytes.Cut(body, []byte("\n\n"))
		text, _, ok := cutNote(string(n))
		if !ok || !strings.HasPrefix(string(lines), "— ") {
			t.Fatalf("cosigned %q", body)
		}
		for s := range signed {
			if strings.HasPrefix(s, text+"\n") {
				return
			}
		}
		t.Fatalf("cosigned what the log never signed: %q", body)
	})
}

// openLedger opens a ledger in dir with the log's key.
func openLedger(t testing.TB, k *logKey, dir string, publish func(context.Context, *ledger.Ledger)) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(context.Background(), ledger.Options{
		Dir: dir, Signer: k.signer, Verifier: k.vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1, Publish: publish,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func appendEntries(t testing.TB, l *ledger.Ledger, n int) {
	t.Helper()
	for range n {
		s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.AccessRefused,
			WriterTime: store.At(time.Now()), Agent: "spiffe://example.test/recorder/recorder"}}
		s.SetDetails(map[string]string{"route": "/x"})
		if err := record(l)(context.Background(), s); err != nil {
			t.Fatal(err)
		}
	}
}

// record appends in the recorder's own name.
func record(l *ledger.Ledger) func(context.Context, *store.Submission) error {
	return func(ctx context.Context, s *store.Submission) error {
		b, err := s.Marshal()
		if err == nil {
			_, err = l.Append(ctx, ledger.Author{Name: "recorder", Recorder: true}, [][]byte{b})
		}
		return err
	}
}

// copyDir copies a ledger that no process has open.
func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := t.TempDir()
	files, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(from, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, f.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
