package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// cutting breaks answers off after so many bytes, while it is more than none.
type cutting struct {
	http.ResponseWriter
	left *atomic.Int64
}

func (c *cutting) Write(p []byte) (int, error) {
	if c.left.Load() > 0 && c.left.Add(-int64(len(p))) <= 0 {
		_, _ = c.ResponseWriter.Write(p[:len(p)/2])
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(p)
}

func (c *cutting) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// exportDesk is a recorder's exports over a ledger of a few entries. cut breaks
// the next answers off; gone answers nothing.
func exportDesk(t *testing.T) (r *client.Reviewer, vkey string, cut *atomic.Int64, gone *atomic.Bool, size func() int64) {
	t.Helper()
	skey, vkey, err := note.GenerateKey(nil, "export.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := &peopleOptions{trustDomain: "export.example", log: zap.NewNop(), ledger: ledger.Options{
		Dir: filepath.Join(dir, "log"), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1, PublishEvery: 5 * time.Millisecond}}
	l, err := ledger.Open(t.Context(), o.ledger)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.AlertRaised, WriterTime: store.At(time.Now()), Agent: "spiffe://export.example/x"}}
	s.SetDetails(map[string]string{"what": "a test"})
	b, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), ledger.Author{Name: "broker-1"}, [][]byte{b}); err != nil {
		t.Fatal(err)
	}
	x, err := openExports(exportConfig{}, o, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.Close)
	file := filepath.Join(dir, "tokens")
	token, err := auth.CreateToken(file, auth.Token{Name: "reviewer-a", Role: auth.Reviewer}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.OpenTokens(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	cut, gone = &atomic.Int64{}, &atomic.Bool{}
	mux := server.NewRouter(zap.NewNop(), 1<<10)
	mux.Group(func(g chi.Router) {
		g.Use(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if gone.Load() {
					panic(http.ErrAbortHandler)
				}
				next.ServeHTTP(&cutting{w, cut}, r)
			})
		})
		x.Routes(g, &auth.Guard{Tokens: tokens})
	})
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	if r, err = client.NewReviewer(client.Config{URL: srv.URL, Token: client.Token(token)}); err != nil {
		t.Fatal(err)
	}
	return r, vkey, cut, gone, l.Size
}

func TestADownloadThatBreaksOffGoesOnByItselfOrWithTheNextRun(t *testing.T) {
	r, vkey, cut, gone, size := exportDesk(t)
	file := filepath.Join(t.TempDir(), "q3.zip")
	d := func() *download {
		return &download{reviewer: r, query: url.Values{"format": {"bundle"}}, file: file, log: io.Discard}
	}
	cut.Store(1000)
	if err := d().save(t.Context()); err != nil {
		t.Fatal(err)
	}
	if size() != 2 {
		t.Errorf("one export put %d entries on record", size()-1)
	}
	key, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	report, err := evidence.VerifyBundle(t.Context(), file, evidence.Options{Log: key})
	if err != nil || !report.OK() {
		t.Fatalf("%+v, %v", report, err)
	}

	// The recorder goes away altogether, and the next run finds it again.
	e, err := r.Export(t.Context(), url.Values{"format": {"bundle"}})
	if err != nil {
		t.Fatal(err)
	}
	whole, err := io.ReadAll(e.Body)
	e.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".part", whole[:700], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".part.json", []byte(`{"id":"`+e.ID+`","query":{"format":["bundle"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	gone.Store(true)
	if err := d().save(t.Context()); err == nil {
		t.Fatal("it succeeds with no recorder")
	}
	gone.Store(false)
	before := size()
	if err := d().save(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, whole) || size() != before {
		t.Errorf("%d bytes, want %d, %v; %d entries, before %d", len(got), len(whole), err, size(), before)
	}
	if left, _ := filepath.Glob(file + ".*"); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
}

func TestAPartThatIsNotOfTheRecordersFileIsNotPutInPlace(t *testing.T) {
	r, _, _, _, _ := exportDesk(t)
	file := filepath.Join(t.TempDir(), "q3.zip")
	d := &download{reviewer: r, query: url.Values{"format": {"csv"}}, file: file, log: io.Discard}
	e, err := r.Export(t.Context(), d.query)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, e.Body)
	e.Body.Close()
	if err := os.WriteFile(file+".part", []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".part.json", []byte(`{"id":"`+e.ID+`","query":{"format":["csv"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.save(t.Context()); err == nil || !strings.Contains(err.Error(), "SHA-256") {
		t.Fatalf("%v", err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Error("it was put in place")
	}
	if err := d.save(t.Context()); err != nil { // anew
		t.Fatal(err)
	}
}

func TestAnotherQuestionBeginsAnew(t *testing.T) {
	r, _, _, _, size := exportDesk(t)
	file := filepath.Join(t.TempDir(), "x.csv")
	if err := os.WriteFile(file+".part", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, noted := range []string{`{"id":"01a20980-70cc-7aad-8672-2a1c9cf2aad0","query":{"format":["csv"]}}`, `{"id":"x","query":{"format":["bundle"]}}`, "no json"} {
		if err := os.WriteFile(file+".part.json", []byte(noted), 0o600); err != nil {
			t.Fatal(err)
		}
		before := size()
		d := &download{reviewer: r, query: url.Values{"format": {"csv"}}, file: file, log: io.Discard}
		if err := d.save(t.Context()); err != nil || size() != before+1 {
			t.Errorf("%s: %v, %d entries after %d", noted, err, size(), before)
		}
		if b, _ := os.ReadFile(file); !bytes.HasPrefix(b, []byte("index,")) {
			t.Errorf("%s: %q", noted, b)
		}
	}
	var out bytes.Buffer
	d := &download{reviewer: r, query: url.Values{"format": {"ocsf"}}, log: io.Discard}
	if err := d.stream(t.Context(), &out); err != nil || !bytes.Contains(out.Bytes(), []byte(`"class_uid"`)) {
		t.Errorf("%v\n%s", err, &out)
	}
}
