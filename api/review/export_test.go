package review

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/apitest"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// desk is a recorder with a ledger and exports alone, at a clock of its own.
type desk struct {
	t      *testing.T
	l      *ledger.Ledger
	x      *Exports
	c      ExportsConfig
	url    string
	tokens map[string]string
	seen   *apitest.Seen
	mu     sync.Mutex
	now    time.Time
}

func (d *desk) clock() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

func (d *desk) advance(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = d.now.Add(by)
}

// slow is a format that waits to be told each time before it writes on.
type slow struct{ step chan struct{} }

func (s *slow) write(ctx context.Context, _ *ledger.Ledger, w io.Writer, _ evidence.ExportOptions) error {
	for i := range 4 {
		select {
		case <-s.step:
		case <-ctx.Done():
			return ctx.Err()
		}
		if _, err := fmt.Fprintf(w, "part %d\n", i); err != nil {
			return err
		}
	}
	return nil
}

func newDesk(t *testing.T, change func(*ExportsConfig)) *desk {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "review.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{t: t, now: time.Date(2026, 7, 1, 8, 0, 0, 0, time.UTC), tokens: map[string]string{}}
	dir := t.TempDir()
	d.l, err = ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(dir, "log"), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1, PublishEvery: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.l.Close() })
	for i := range 20 {
		s := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()), Agent: "spiffe://review.example/x",
			Orchestrator: "demo", Run: fmt.Sprint("r", i%2), Step: "s", Request: "req_1", Action: "orders:read",
		}}
		s.SetDetails(store.UsedDetails{Via: "introspection", By: "orders", Use: "GET /"})
		d.put(false, s)
	}
	d.c = ExportsConfig{Ledger: d.l, Dir: filepath.Join(dir, "exports"), Name: "recorder", TrustDomain: "review.example", PrivacyKey: make(store.PrivacyKey, 32), Now: d.clock}
	if change != nil {
		change(&d.c)
	}
	if d.x, err = NewExports(d.c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.x.Close)
	file := filepath.Join(dir, "tokens")
	for _, who := range []auth.Token{{Name: "reviewer-a", Role: auth.Reviewer}, {Name: "reviewer-b", Role: auth.Reviewer}, {Name: "broker-1", Role: auth.Writer}} {
		if d.tokens[who.Name], err = auth.CreateToken(file, who, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	tokens, err := auth.OpenTokens(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := server.NewRouter(zap.NewNop(), 1<<10)
	d.x.Routes(r, &auth.Guard{Tokens: tokens})
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	d.url = s.URL
	if d.seen, err = apitest.Load(); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *desk) put(recorder bool, s *store.Submission) int64 {
	d.t.Helper()
	b, err := s.Marshal()
	if err != nil {
		d.t.Fatal(err)
	}
	a, err := d.l.Append(d.t.Context(), ledger.Author{Name: "broker-1", Recorder: recorder}, [][]byte{b})
	if err != nil {
		d.t.Fatal(err)
	}
	return a.Entries[0].Index
}

// as is a client that checks every exchange against openapi.yaml.
func (d *desk) as(who string) *client.Reviewer {
	d.t.Helper()
	r, err := client.NewReviewer(client.Config{URL: d.url, Token: client.Token(d.tokens[who]), Transport: d.seen.Transport(d.t, http.DefaultTransport)})
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

// streaming is a client that reads answers while they come.
func (d *desk) streaming(who string) *client.Reviewer {
	d.t.Helper()
	r, err := client.NewReviewer(client.Config{URL: d.url, Token: client.Token(d.tokens[who])})
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

// get fetches an export whole.
func (d *desk) get(who string, q url.Values) (string, []byte) {
	d.t.Helper()
	e, err := d.as(who).Export(d.t.Context(), q)
	if err != nil {
		d.t.Fatal(err)
	}
	defer e.Body.Close()
	b, err := io.ReadAll(e.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return e.ID, b
}

// until waits for a state of an export.
func (d *desk) until(id, state string) *client.ExportProgress {
	d.t.Helper()
	for {
		p, err := d.as("reviewer-a").ExportProgress(d.t.Context(), id)
		if err != nil {
			d.t.Fatal(err)
		}
		if p.State == state {
			return p
		}
		if d.t.Context().Err() != nil {
			d.t.Fatalf("the export is %s", p.State)
		}
	}
}

// last is the newest entry of a type.
func (d *desk) last(t store.Type) (*store.Entry, store.ExportDetails) {
	d.t.Helper()
	p, err := d.l.History(d.t.Context(), ledger.Query{Type: string(t), Newest: true, Limit: 1})
	if err != nil || len(p.Entries) == 0 {
		d.t.Fatalf("no %s: %v", t, err)
	}
	e, err := store.ParseLeaf(p.Entries[0].Entry)
	if err != nil {
		d.t.Fatal(err)
	}
	x, err := store.DetailsAs[store.ExportDetails](e)
	if err != nil {
		d.t.Fatal(err)
	}
	return e, x
}

func slug(t *testing.T, err error) string {
	t.Helper()
	var p *problem.Problem
	if !errors.As(err, &p) {
		t.Fatalf("%v is no problem", err)
	}
	return p.Slug()
}

func TestAnExportIsOnRecordAndComesWholeOrInPart(t *testing.T) {
	d := newDesk(t, nil)
	id, whole := d.get("reviewer-a", url.Values{"run": {"r1"}, "person": {"user:alice"}, "from": {"2026-01-01T00:00:00Z"}})
	if _, err := zip.NewReader(bytes.NewReader(whole), int64(len(whole))); err != nil {
		t.Fatal(err)
	}
	e, x := d.last(store.ExportCreated)
	if e.ID != id || e.Agent != "spiffe://review.example/reviewer/reviewer-a" || e.Writer != "recorder" || e.Person != nil || x.Format != "bundle" || x.From != 0 || x.To != 20 ||
		len(x.Filters) != 2 || x.Filters["run"] != "r1" || x.Filters["person"] != d.c.PrivacyKey.Pseudonym("user:alice") {
		t.Errorf("on record: %+v, %+v", e, x)
	}
	p := d.until(id, "ready")
	if sum := sha256.Sum256(whole); p.SHA256 != hex.EncodeToString(sum[:]) || p.Bytes != int64(len(whole)) || p.Name != "countersign-0-20.zip" || p.Index != 20 {
		t.Errorf("progress %+v", p)
	}
	for _, from := range []int64{0, 1, int64(len(whole)) / 2, int64(len(whole)) - 1} {
		r, err := d.as("reviewer-a").ExportFrom(t.Context(), id, from)
		if err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(rest, whole[from:]) {
			t.Errorf("from %d: %d bytes of %d, %v", from, len(rest), int64(len(whole))-from, err)
		}
	}
	if n := d.l.Size(); n != 21 {
		t.Errorf("%d entries: fetching an export again put something on record", n)
	}
}

func TestAFormatsOwnContentIsSent(t *testing.T) {
	d := newDesk(t, nil)
	_, lines := d.get("reviewer-a", url.Values{"format": {"jsonl"}, "run": {"r1"}})
	if n := bytes.Count(lines, []byte("\n")); n != 10 || !bytes.HasPrefix(lines, []byte(`{"index":1,"entry":{"v":1,`)) {
		t.Errorf("%d lines:\n%s", n, lines)
	}
	_, table := d.get("reviewer-a", url.Values{"format": {"csv"}, "run": {""}})
	if rows := strings.Split(string(table), "\n"); rows[0] != strings.Join(evidence.HistoryColumns, ",") || len(rows) != 23 { // 20, the export before, the head, the end
		t.Errorf("%d rows:\n%s", len(rows), table)
	}
}

func TestAnExportIsSentWhileItIsWrittenAndFetchedAgainAfterABreak(t *testing.T) {
	s := &slow{make(chan struct{})}
	d := newDesk(t, func(c *ExportsConfig) {
		c.Formats = map[string]ExportFormat{"ocsf": {s.write, "application/x-ndjson", ".jsonl"}}
	})
	ctx, hangUp := context.WithCancel(t.Context())
	go func() { s.step <- struct{}{} }()
	e, err := d.streaming("reviewer-a").Export(ctx, url.Values{"format": {"ocsf"}})
	if err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 7)
	if _, err := io.ReadFull(e.Body, first); err != nil || string(first) != "part 0\n" { // three parts are yet to be written
		t.Fatalf("%q, %v", first, err)
	}
	hangUp()
	e.Body.Close()
	rest := make(chan string)
	go func() {
		r, err := d.streaming("reviewer-a").ExportFrom(t.Context(), e.ID, 7)
		if err != nil {
			t.Error(err)
			close(rest)
			return
		}
		defer r.Close()
		b, _ := io.ReadAll(r)
		rest <- string(b)
	}()
	for range 3 {
		s.step <- struct{}{}
	}
	if got := <-rest; got != "part 1\npart 2\npart 3\n" {
		t.Errorf("the rest is %q", got)
	}
}

func TestAnExportThatNobodyWaitsForEnds(t *testing.T) {
	s := &slow{make(chan struct{})}
	d := newDesk(t, func(c *ExportsConfig) {
		c.Formats = map[string]ExportFormat{"ocsf": {s.write, "application/x-ndjson", ".jsonl"}}
	})
	ctx, hangUp := context.WithCancel(t.Context())
	go func() { s.step <- struct{}{} }()
	e, err := d.streaming("reviewer-a").Export(ctx, url.Values{"format": {"ocsf"}})
	if err != nil {
		t.Fatal(err)
	}
	hangUp()
	e.Body.Close()
	for { // until the server has seen it
		d.x.mu.Lock()
		left := d.x.exports[e.ID].readers == 0
		d.x.mu.Unlock()
		if left || t.Context().Err() != nil {
			break
		}
	}
	d.advance(exportAbandon)
	d.x.sweep()
	d.until(e.ID, "failed")
	if left, _ := os.ReadDir(d.c.Dir); len(left) > 0 {
		t.Errorf("%d files are left", len(left))
	}
	if _, err := d.as("reviewer-a").ExportFrom(t.Context(), e.ID, 0); slug(t, err) != problem.SlugNotFound {
		t.Error(err)
	}
}

func TestFilesAreKeptForAnHourInTheirOwnersHands(t *testing.T) {
	d := newDesk(t, nil)
	id, _ := d.get("reviewer-a", nil)
	d.until(id, "ready")
	for name, mode := range map[string]os.FileMode{d.c.Dir: 0o700, d.x.exports[id].path: 0o600} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if _, err := d.as("reviewer-b").ExportFrom(t.Context(), id, 0); slug(t, err) != problem.SlugNotFound {
		t.Error("another reviewer takes an export that is on record as somebody else's")
	}
	d.advance(exportKeep - time.Second)
	if _, err := d.as("reviewer-a").ExportProgress(t.Context(), id); err != nil {
		t.Error(err)
	}
	d.advance(time.Second)
	if _, err := d.as("reviewer-a").ExportProgress(t.Context(), id); slug(t, err) != problem.SlugNotFound {
		t.Error(err)
	}
	if left, _ := os.ReadDir(d.c.Dir); len(left) > 0 {
		t.Errorf("%d files are left", len(left))
	}
}

func TestACrashedRunsFilesAreRemovedAtTheNextStart(t *testing.T) {
	d := newDesk(t, nil)
	stale := filepath.Join(d.c.Dir, "export-123")
	if err := os.Mkdir(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stale, "sealed.jsonl"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	x, err := NewExports(d.c)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if left, _ := os.ReadDir(d.c.Dir); len(left) > 0 {
		t.Errorf("%d files are left", len(left))
	}
}

func TestExportsStayWithinTheirSpaceAndNumber(t *testing.T) {
	s := &slow{make(chan struct{})}
	d := newDesk(t, func(c *ExportsConfig) {
		c.Formats = map[string]ExportFormat{"ocsf": {s.write, "application/x-ndjson", ".jsonl"}}
		c.Files, c.Running = 2, 1
	})
	var ids []string
	for range 3 {
		id, _ := d.get("reviewer-a", url.Values{"format": {"csv"}})
		d.until(id, "ready")
		ids = append(ids, id)
		d.advance(time.Second)
	}
	if got := d.x.IDs(); len(got) != 2 || strings.Join(got, " ") != strings.Join(ids[1:], " ") {
		t.Errorf("%q are kept, want the last two of %q", got, ids)
	}
	go func() { s.step <- struct{}{} }()
	e, err := d.streaming("reviewer-a").Export(t.Context(), url.Values{"format": {"ocsf"}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Body.Close()
	size := d.l.Size()
	if _, err := d.as("reviewer-b").Export(t.Context(), nil); slug(t, err) != problem.SlugRateLimited || d.l.Size() != size {
		t.Errorf("a second at once: %v, %d entries, before %d", err, d.l.Size(), size)
	}

	d = newDesk(t, func(c *ExportsConfig) { c.Bytes = 100 })
	if _, err := d.as("reviewer-a").Export(t.Context(), nil); slug(t, err) != problem.SlugStateUnavailable {
		t.Errorf("more than the space: %v", err)
	}
}

func TestTwoExportsAtOnceDoNotDisturbEachOther(t *testing.T) {
	d := newDesk(t, nil)
	var all sync.WaitGroup
	for _, who := range []string{"reviewer-a", "reviewer-b"} {
		all.Go(func() {
			e, err := d.streaming(who).Export(t.Context(), nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer e.Body.Close()
			b, err := io.ReadAll(e.Body)
			if err != nil {
				t.Error(err)
				return
			}
			z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				t.Error(err)
				return
			}
			f, err := z.Open("manifest.json")
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			var m struct {
				Export struct {
					ID string `json:"id"`
				} `json:"export"`
			}
			if err := json.UnmarshalRead(f, &m); err != nil || m.Export.ID != e.ID {
				t.Errorf("the bundle of %s is that of %s, %v", e.ID, m.Export.ID, err)
			}
		})
	}
	all.Wait()
}

func TestHostileQueriesAreRefusedAndNothingIsOnRecord(t *testing.T) {
	d := newDesk(t, nil)
	for raw, want := range map[string]string{
		"format=exe": problem.SlugMalformed, "format=csv&format=csv": problem.SlugMalformed, "limit=1": problem.SlugMalformed, "cursor=1": problem.SlugMalformed,
		"since=-1": problem.SlugMalformed, "since=99": problem.SlugMalformed, "since=x": problem.SlugMalformed, "run=../../etc": problem.SlugMalformed,
		"nofilter=1": problem.SlugMalformed, "from=yesterday": problem.SlugMalformed, "type=no.such": problem.SlugMalformed, "run=a&run=b": problem.SlugMalformed,
		"scope=" + strings.Repeat("x", 2000): problem.SlugMalformed, "scope=%00": problem.SlugMalformed,
	} {
		q, err := url.ParseQuery(raw)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.streaming("reviewer-a").Export(t.Context(), q); slug(t, err) != want {
			t.Errorf("%.40s: %v", raw, err)
		}
	}
	if _, err := d.as("broker-1").Export(t.Context(), nil); slug(t, err) != problem.SlugRoleForbidden {
		t.Errorf("a writer exports: %v", err)
	}
	if _, err := d.as("nobody").Export(t.Context(), nil); slug(t, err) != problem.SlugUnauthenticated {
		t.Errorf("nobody exports: %v", err)
	}
	r, err := http.NewRequest(http.MethodHead, d.url+"/history/export", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+d.tokens["reviewer-a"])
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("HEAD: %s", resp.Status)
	}
	for _, site := range []string{"cross-site", "same-site"} {
		r, err := http.NewRequest(http.MethodGet, d.url+"/history/export", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+d.tokens["reviewer-a"])
		r.Header.Set("Sec-Fetch-Site", site)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("from a %s page: %s", site, resp.Status)
		}
	}
	if d.l.Size() != 20 {
		t.Errorf("%d entries", d.l.Size())
	}
	d.l.Close()
	if _, err := d.as("reviewer-a").Export(t.Context(), nil); slug(t, err) != problem.SlugLedgerUnavailable {
		t.Errorf("with the ledger away: %v", err)
	}
}

func FuzzExportQuery(f *testing.F) {
	for _, s := range []string{"", "format=csv", "format=bundle&since=12&run=r1", "person=user:alice", "person=p-x&from=2026-01-01T00:00:00Z", "since=-1", "limit=3"} {
		f.Add(s)
	}
	x := &Exports{c: ExportsConfig{PrivacyKey: make(store.PrivacyKey, 32), Formats: map[string]ExportFormat{"bundle": {}, "csv": {}}}}
	f.Fuzz(func(t *testing.T, raw string) {
		v, err := url.ParseQuery(raw)
		if err != nil {
			return
		}
		format, since, q, filters, err := x.exportQuery(v)
		if err != nil {
			return
		}
		if since < 0 || q == nil || format != "bundle" && format != "csv" || strings.Contains(filters["person"], ":") {
			t.Fatalf("%q: %s, %d, %+v, %q", raw, format, since, q, filters)
		}
	})
}
