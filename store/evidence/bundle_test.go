package evidence

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// members reads a bundle whole, and checks each member against the manifest.
func members(t *testing.T, raw []byte) (names []string, files map[string][]byte, m manifest) {
	t.Helper()
	z, err := zip.NewReader(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	files = map[string][]byte{}
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
		names, files[f.Name] = append(names, f.Name), b
	}
	if err := json.Unmarshal(files["manifest.json"], &m); err != nil {
		t.Fatal(err)
	}
	if len(m.Files) != len(files)-1 {
		t.Errorf("the manifest names %d members of %d", len(m.Files), len(files)-1)
	}
	for name, want := range m.Files {
		if sum := sha256.Sum256(files[name]); hex.EncodeToString(sum[:]) != want.SHA256 || int64(len(files[name])) != want.Bytes {
			t.Errorf("%s is not what the manifest says", name)
		}
	}
	return names, files, m
}

// export makes a bundle.
func (h *house) export(o ExportOptions) []byte {
	h.t.Helper()
	var b bytes.Buffer
	if err := Export(h.t.Context(), h.l, &b, o); err != nil {
		h.t.Fatal(err)
	}
	if left, _ := os.ReadDir(o.Dir); len(left) > 0 {
		h.t.Errorf("%d files are left beside the export", len(left))
	}
	return b.Bytes()
}

// verifies runs the verifier over a bundle, which finds what is named and
// nothing else.
func (h *house) verifies(raw []byte, want ...Finding) {
	h.t.Helper()
	path := filepath.Join(h.t.TempDir(), "bundle.zip")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		h.t.Fatal(err)
	}
	key, err := store.NewLogVerifier(h.vkey)
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := VerifyBundle(h.t.Context(), path, Options{Log: key})
	if err != nil {
		h.t.Fatal(err)
	}
	found := []Finding{}
	for _, f := range r.Findings {
		found = append(found, Finding{Kind: f.Kind, Index: f.Index})
	}
	if !slices.Equal(found, want) {
		h.t.Errorf("findings %v, want %v", r.Findings, want)
	}
}

// leaf is an entry as it is stored.
func (h *house) leaf(i int64) string {
	h.t.Helper()
	for e, err := range h.l.Entries(h.t.Context(), i, i+1) {
		if err != nil {
			h.t.Fatal(err)
		}
		return string(e.Leaf)
	}
	return ""
}

// lines are the lines of entries, as a bundle has them.
func (h *house) lines(indexes ...int64) (leaves, index string) {
	for _, i := range indexes {
		leaves += h.leaf(i) + "\n"
		index += strconv.FormatInt(i, 10) + "\n"
	}
	return leaves, index
}

// tell writes a log in which requests begin, are decided and end before, in and
// after the hour from 9 to 10. It returns the indexes by name.
func tell(h *house) map[string]int64 {
	at := map[string]int64{}
	put := func(name string, recorder bool, subs ...*store.Submission) int64 {
		at[name] = h.append(recorder, subs...)
		return at[name]
	}
	put("policy old", true, h.policy("scopes: [] # old\n"))
	put("policy", true, h.policy("scopes: [] # in force\n"))
	early := h.tale("1", "run-1", "orders:write", store.NeedsApproval)
	put("1 requested", false, early.requested("=refund 1"), early.asked("=refund 1"))
	put("1 decided", true, early.decided(at["1 requested"]+1, store.Approve, "user:alice", "fine"))
	gone := h.tale("2", "run-1", "orders:read", store.Allow)
	intent := gone.issuing()
	put("2 requested", false, gone.requested("read"), intent, gone.issued(intent), gone.revoked(intent)) // over before the window
	h.now = h.now.Add(time.Hour)                                                                         // 9:00
	intent1 := early.issuing()
	put("1 issuing", false, intent1, early.issued(intent1))
	put("1 used", false, early.used(intent1, "PUT /orders/1"))
	put("1 finished", false, early.finished("succeeded"))
	put("policy new", true, h.policy("scopes: [] # new\n"))
	late := h.tale("3", "run-2", "orders:read", store.Allow)
	intent3 := late.issuing()
	put("3 requested", false, late.requested("read more"), intent3, late.issued(intent3))
	denied := h.tale("4", "run-2", "orders:admin", store.Deny)
	put("4 denied", false, denied.requested("everything"))
	h.now = h.now.Add(time.Hour) // 10:00
	put("1 revoked", false, early.revoked(intent1))
	put("1 used late", false, early.used(intent1, "PUT /orders/2"))
	put("3 revoked", false, late.revoked(intent3))
	after := h.tale("5", "run-3", "orders:read", store.Allow)
	intent5 := after.issuing()
	put("5 requested", false, after.requested("later"), intent5, after.issued(intent5))
	return at
}

var hour = ledger.Query{From: time.Date(2026, 7, 1, 9, 0, 0, 0, time.UTC), To: time.Date(2026, 7, 1, 10, 0, 0, 0, time.UTC)}

func TestABundleHoldsItsWindowAndAllThatItIsJudgedBy(t *testing.T) {
	h := newHouse(t)
	at := tell(h)
	o := h.exported(hour, nil)
	raw := h.export(o)
	names, files, m := members(t, raw)

	if o.From != at["1 issuing"] || o.To != at["1 revoked"] || m.Window.From != o.From || m.Window.To != o.To {
		t.Fatalf("the window is %d to %d, in the manifest %+v", o.From, o.To, m.Window)
	}
	order := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return strings.Contains(n, "/") })
	want := []string{"checkpoint", "entries.jsonl", "context.jsonl", "context.index", "sealed.jsonl", "steps.csv", "approvals.csv", "uses.csv", "REPORT.html", "VERIFY.md", "manifest.json"}
	if !slices.Equal(order, want) {
		t.Errorf("members %q", order)
	}
	var window []int64
	for i := o.From; i < o.To; i++ {
		window = append(window, i)
	}
	if leaves, _ := h.lines(window...); string(files["entries.jsonl"]) != leaves {
		t.Error("entries.jsonl does not hold the leaves of the window as they are")
	}
	gone := at["2 requested"] // whose last entry is the one before the window
	context := []int64{at["policy"], at["1 requested"], at["1 requested"] + 1, at["1 decided"], gone, gone + 1, gone + 2, gone + 3, at["1 revoked"], at["1 used late"], at["3 revoked"], o.Index}
	leaves, index := h.lines(context...)
	if string(files["context.index"]) != index || string(files["context.jsonl"]) != leaves {
		t.Errorf("the context is\n%swant\n%s", files["context.index"], index)
	}
	for _, text := range []string{"scopes: [] # in force\n", "scopes: [] # new\n"} {
		if string(files["policies/"+hexSum(text)+".yaml"]) != text {
			t.Errorf("the policy %q is missing", text)
		}
	}
	if m.Size != h.l.Size() || m.Export.Index != o.Index || !m.Complete || m.Counts.Entries != int64(len(window)) || m.Counts.Context != int64(len(context)) ||
		m.Counts.Types[store.CredentialIssued] != 2 || m.Counts.Steps != 2 || m.Counts.Approvals != 0 || m.Counts.Uses != 1 {
		t.Errorf("manifest %+v", m)
	}
	if !bytes.Contains(files["sealed.jsonl"], []byte(`"field":"reason"`)) || bytes.Contains(files["sealed.jsonl"], []byte("later")) {
		t.Errorf("sealed.jsonl\n%s", files["sealed.jsonl"])
	}
	h.verifies(raw, Finding{Kind: KindUse, Index: at["1 used late"]})
}

func TestABundleOfTheWholeLogVerifiesAndProvesTheTree(t *testing.T) {
	h := newHouse(t)
	for i := range 120 { // over more than a tile, so that one is covered whole
		s := h.tale("w"+strconv.Itoa(i), "run", "orders:read", store.Allow)
		in := s.issuing()
		h.append(false, s.requested("why"), in, s.issued(in), s.used(in, "GET /"), s.revoked(in))
	}
	o := h.exported(ledger.Query{}, nil)
	o.Since = 300
	raw := h.export(o)
	_, files, m := members(t, raw)
	var tiles []string
	for name := range files {
		if strings.HasPrefix(name, "tiles/") {
			tiles = append(tiles, name)
		}
	}
	slices.Sort(tiles)
	// Of 601 entries, all but the last are in the window: two tiles are made up by
	// leaves.
	if want := []string{"tiles/0/002.p/89", "tiles/1/000.p/2"}; !slices.Equal(tiles, want) {
		t.Errorf("tiles %q, want %q", tiles, want)
	}
	if m.Counts.Steps != 120 || m.Counts.Uses != 120 || string(files["context.index"]) != "600\n" {
		t.Errorf("%+v", m.Counts)
	}
	h.verifies(raw)
}

func TestAFilteredBundleNamesItsEntriesAndHoldsTheRestOfTheirRequests(t *testing.T) {
	for _, all := range []bool{false, true} { // by a query per request, and by reading all
		t.Run(fmt.Sprint(all), func(t *testing.T) {
			h := newHouse(t)
			at := tell(h)
			q := hour
			q.Scope = "orders:write"
			if !all {
				for range 400 {
					e := h.policy("x")
					e.Type, e.Action = store.AccessRefused, "GET /"
					e.SetDetails(store.RefusedDetails{Method: "GET", Route: "/", Problem: "role-forbidden", Remote: "::1"})
					h.append(true, e)
				}
			}
			o := h.exported(q, map[string]string{"scope": "orders:write"})
			raw := h.export(o)
			_, files, m := members(t, raw)
			leaves, index := h.lines(at["1 issuing"], at["1 issuing"]+1, at["1 used"])
			if string(files["entries.index"]) != index || string(files["entries.jsonl"]) != leaves || m.Complete || m.Filters["scope"] != "orders:write" {
				t.Errorf("entries.index\n%s%+v", files["entries.index"], m)
			}
			_, index = h.lines(at["policy"], at["1 requested"], at["1 requested"]+1, at["1 decided"], at["policy new"], at["1 revoked"], at["1 used late"], o.Index)
			if string(files["context.index"]) != index {
				t.Errorf("context.index\n%swant\n%s", files["context.index"], index)
			}
			h.verifies(raw, Finding{Kind: KindUse, Index: at["1 used late"]})
		})
	}
}

// A window whose tail is far longer than it is looked up by name.
func TestTheContextIsTheSameHoweverItIsLookedFor(t *testing.T) {
	h := newHouse(t)
	tell(h)
	o := h.exported(hour, nil)
	find := func(from, to, size int64) []int64 {
		s := &selection{l: h.l, from: from, to: to, size: size}
		if err := s.around(t.Context(), o.Index); err != nil {
			t.Fatal(err)
		}
		return s.context
	}
	var requests []string
	for i := range h.l.Size() {
		requests = append(requests, memberOf([]byte(h.leaf(i)), "request"))
	}
	for from := int64(0); from < h.l.Size(); from++ {
		for to := from; to < h.l.Size(); to++ {
			got := find(from, to, h.l.Size())
			seen := map[string]bool{}
			for i := max(from-1, 0); i <= to; i++ { // with the entries on both sides
				seen[requests[i]] = true
			}
			for i := range h.l.Size() {
				_, in := slices.BinarySearch(got, i)
				if outside := i < from || i >= to; requests[i] != "" && in != (outside && seen[requests[i]]) {
					t.Fatalf("[%d,%d): entry %d of %s in the context: %v", from, to, i, requests[i], in)
				}
			}
		}
	}
}

func TestTwoExportsOfOneEntryAreTheSameBytes(t *testing.T) {
	h := newHouse(t)
	tell(h)
	o := h.exported(hour, nil)
	results := make(chan []byte)
	for range 2 {
		go func() {
			var b bytes.Buffer
			if err := Export(t.Context(), h.l, &b, o); err != nil {
				t.Error(err)
			}
			results <- b.Bytes()
		}()
	}
	if a, b := <-results, <-results; !bytes.Equal(a, b) {
		t.Fatal("two exports differ")
	}
}

// erase puts a retention on record under which texts go after a minute, and
// erases those of entries, each by an erasure of its own. It returns the indexes
// of the erasures.
func (h *house) erase(indexes ...int64) (of []int64) {
	h.t.Helper()
	e := h.policy("scopes: [] # forgets\n")
	d, err := store.DetailsAs[store.PolicyDetails](&e.Entry)
	if err != nil {
		h.t.Fatal(err)
	}
	d.Retention = map[string]store.Duration{"low": store.Duration(time.Minute)}
	e.SetDetails(d)
	h.append(true, e)
	h.now = h.now.Add(5 * time.Hour)
	for _, i := range indexes {
		by := ledger.Eraser{Name: "recorder", Agent: "spiffe://evidence.example/recorder/recorder"}
		if err := h.l.Erase(h.t.Context(), by, []int64{i}, "low", time.Minute); err != nil {
			h.t.Fatal(err)
		}
		of = append(of, h.l.Size()-1)
	}
	return of
}

func TestAnErasedTextIsInNoMemberAndItsErasureIs(t *testing.T) {
	h := newHouse(t)
	at := tell(h)
	of := h.erase(at["2 requested"], at["1 requested"], at["1 requested"]+1, at["1 decided"], at["3 requested"])
	o := h.exported(hour, nil)
	raw := h.export(o)
	_, files, _ := members(t, raw)
	gone := at["2 requested"] // whose last entry is the one before the window
	_, index := h.lines(at["policy"], at["1 requested"], at["1 requested"]+1, at["1 decided"], gone, gone+1, gone+2, gone+3,
		at["1 revoked"], at["1 used late"], at["3 revoked"], of[0]-1, of[0], of[1], of[2], of[3], of[4], o.Index) // the retention, and the erasures
	if string(files["context.index"]) != index {
		t.Errorf("the context is\n%swant\n%s", files["context.index"], index)
	}
	h.verifies(raw, Finding{Kind: KindUse, Index: at["1 used late"]})

	_, files, _ = members(t, h.export(h.exported(ledger.Query{}, nil)))
	rows, err := csv.NewReader(bytes.NewReader(files["approvals.csv"])).ReadAll()
	if err != nil || len(rows) != 2 {
		t.Fatalf("%v, %d rows", err, len(rows))
	}
	if r := rows[1]; r[6] != h.o.PrivacyKey.Pseudonym("user:alice") || r[8] != Erased || r[9] != Erased {
		t.Errorf("%q", r)
	}
	for name, b := range files {
		if bytes.Contains(b, []byte("refund 1")) || bytes.Contains(b, []byte("user:alice")) || bytes.Contains(b, []byte("read more")) {
			t.Errorf("%s holds an erased text", name)
		}
	}
}

func TestNothingIsErasedUnderAnExport(t *testing.T) {
	h := newHouse(t)
	at := tell(h)
	h.erase(at["2 requested"])
	o := h.exported(ledger.Query{}, nil)
	done := make(chan error)
	once := false
	o.Progress = func(int64, int64) {
		if once {
			return
		}
		once = true
		go func() {
			by := ledger.Eraser{Name: "recorder", Agent: "spiffe://evidence.example/recorder/recorder"}
			done <- h.l.Erase(t.Context(), by, []int64{at["3 requested"]}, "low", time.Minute)
		}()
		select {
		case err := <-done:
			t.Errorf("it was erased in the middle of an export: %v", err)
		case <-time.After(50 * time.Millisecond): // long enough to be done, were it let
		}
	}
	raw := h.export(o)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	h.verifies(raw, Finding{Kind: KindUse, Index: at["1 used late"]})
}

// broken is a client that goes after n bytes.
type broken struct{ n int }

var errGone = errors.New("the client is gone")

func (b *broken) Write(p []byte) (int, error) {
	if b.n -= len(p); b.n < 0 {
		return 0, errGone
	}
	return len(p), nil
}

func TestAnExportEndsWithItsReader(t *testing.T) {
	h := newHouse(t)
	tell(h)
	for name, format := range map[string]Format{"bundle": Export, "csv": ExportCSV, "jsonl": ExportLines(JSONLine)} {
		o := h.exported(ledger.Query{}, nil)
		if err := format(t.Context(), h.l, &broken{100}, o); !errors.Is(err, errGone) {
			t.Errorf("%s: %v", name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := format(ctx, h.l, io.Discard, o); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(o.Dir); len(left) > 0 {
			t.Errorf("%s leaves %d files", name, len(left))
		}
	}
}

func TestFlatFormatsHoldTheSelectionAlone(t *testing.T) {
	h := newHouse(t)
	at := tell(h)
	q := ledger.Query{Request: "req_1", Type: string(store.ApprovalDecided)}
	o := h.exported(q, map[string]string{"request": "req_1"})
	var lines, table bytes.Buffer
	if err := ExportLines(JSONLine)(t.Context(), h.l, &lines, o); err != nil {
		t.Fatal(err)
	}
	i := at["1 decided"]
	if want := fmt.Sprintf(`{"index":%d,"entry":%s,"opened":{"person":"user:alice","reason":"fine"}}`+"\n", i, h.leaf(i)); lines.String() != want {
		t.Errorf("%s\nwant %s", &lines, want)
	}
	if err := ExportCSV(t.Context(), h.l, &table, o); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%s\n%d,2026-07-01T08:00:00.000000Z,approval.decided,demo,run-1,s1,orders:write,needs-approval,req_1,\"person \"\"user:alice\"\"; reason \"\"fine\"\"\"\n",
		strings.Join(HistoryColumns, ","), i); table.String() != want {
		t.Errorf("%s\nwant %s", &table, want)
	}
}

func TestTheContextHoldsWhatAStandingApprovalRestsOn(t *testing.T) {
	h := newHouse(t)
	rule := store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(3 * time.Hour),
		Standing: &store.StandingLimit{Uses: 3, For: store.Duration(4 * time.Hour)}}
	first := h.tale("1", "run-1", "orders:write", store.NeedsApproval)
	asked := first.asked("for the run")
	asked.SetDetails(store.ApprovalRequestedDetails{Approval: "apr_1", Grant: first.grant, Excluded: []string{}, Rule: rule})
	at := h.append(false, first.requested("for the run"), asked)
	approved := first.decided(at+1, store.Approve, "user:alice", "fine")
	d, err := store.DetailsAs[store.DecidedDetails](&approved.Entry)
	if err != nil {
		t.Fatal(err)
	}
	d.Standing = &store.StandingTerms{Scopes: []string{"orders:write"}, Uses: 3, Until: store.At(h.now.Add(3 * time.Hour))}
	approved.Type = store.ApprovalStanding
	approved.SetDetails(d)
	decided := h.append(true, approved)
	intent := first.issuing()
	issuing := h.append(false, intent, first.issued(intent))
	unrelated := h.tale("0", "run-0", "orders:read", store.Allow)
	in := unrelated.issuing()
	other := h.append(false, unrelated.requested("other"), in, unrelated.issued(in))

	h.now = h.now.Add(time.Hour) // 9:00
	second := h.tale("2", "run-1", "orders:write", store.NeedsApproval)
	requested := second.requested("again")
	requested.SetDetails(store.RequestedDetails{Grant: second.grant, Body: "b", Join: "join-2", Standing: &store.StandingUse{Request: "req_1", Rule: rule, Excluded: []string{}}})
	h.append(false, requested)
	h.now = h.now.Add(time.Hour) // 10:00
	for name, q := range map[string]ledger.Query{"by time": hour, "by step": {Step: "s2"}} {
		o := h.exported(q, map[string]string{})
		if q.Step != "" {
			o.Filters = map[string]string{"step": q.Step}
		}
		_, files, _ := members(t, h.export(o))
		want := []int64{at, at + 1, decided, issuing, issuing + 1}
		if q.Step == "" {
			want = append(want, other, other+1, other+2, o.To) // the entries on both sides of the window
		}
		_, index := h.lines(slices.Compact(append(want, o.Index))...)
		if string(files["context.index"]) != index {
			t.Errorf("%s: the context is\n%swant\n%s", name, files["context.index"], index)
		}
	}
}

func TestABundleHoldsTheMaskingRulesOfItsGrantsAndUses(t *testing.T) {
	h := newHouse(t)
	mail := store.Masking{Rules: []store.MaskRule{{Field: "email"}}}
	a, b, c := h.tale("1", "r-1", "orders:read", store.Allow).through(mail), h.tale("2", "r-2", "orders:read", store.Allow).through(store.Masking{}),
		h.tale("3", "r-3", "orders:list", store.Allow).through(store.Masking{Rules: []store.MaskRule{{Detector: "card"}}})
	inA, inC := a.issuing(), c.issuing()
	h.append(false, a.requested("why"), inA, a.issued(inA), c.requested("why"), inC, c.issued(inC))
	h.now = h.now.Add(time.Hour)
	from, inB := h.now, b.issuing()
	one, two, three := a.passed(inA, "GET /orders/*", "GET /orders/1"), a.passed(inA, "GET /orders/*", "GET /orders/2"), b.passed(inB, "GET /", "GET /?x=1")
	h.append(false, b.requested("why"), inB, b.issued(inB), one, two, three)
	h.now = h.now.Add(time.Hour)
	to := h.now
	h.append(false, a.result("200", one, two), a.revoked(inA))
	digest := strings.TrimPrefix(mail.Digest(), "sha256:")

	o := h.exported(ledger.Query{}, nil)
	raw := h.export(o)
	_, files, _ := members(t, raw)
	if got := string(files["masking/"+digest+".json"]); got != `{"rules":[{"field":"email"}]}` {
		t.Errorf("the rules are %q", got)
	}
	card := c.grant.Access.Masking.Digest()
	want := []string{`{"digest":"` + mail.Digest() + `","scopes":["orders:read"],"uses":2}`, `{"digest":"` + card + `","scopes":["orders:list"],"uses":0}`}
	slices.Sort(want)
	if got := string(files[memberMasking]); got != `{"rules":[`+strings.Join(want, ",")+"]}\n" {
		t.Errorf("the index is %s", got)
	}
	h.verifies(raw)

	// Of a window within the log, the grant of a use lies before it and the result
	// behind it.
	raw = h.export(h.exported(ledger.Query{From: from, To: to}, nil))
	_, files, m := members(t, raw)
	if got := string(files[memberMasking]); got != `{"rules":[`+want[slices.IndexFunc(want, func(s string) bool { return strings.Contains(s, digest) })]+"]}\n" {
		t.Errorf("the window's index is %s", got)
	}
	if files["masking/"+digest+".json"] == nil || files["masking/"+strings.TrimPrefix(card, "sha256:")+".json"] != nil {
		t.Error("the window's rules are others than its uses name")
	}
	if status := cellsOf(t, string(files[memberUses]), UsesColumns, "status"); m.Counts.Uses != 3 || !slices.Equal(status, []string{"200", "200", ""}) {
		t.Errorf("%d uses, with the results %q", m.Counts.Uses, status)
	}
	h.verifies(raw)
}
