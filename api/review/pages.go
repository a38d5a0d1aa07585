package review

import (
	"embed"
	"errors"
	"fmt"
	"html/template"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

//go:embed templates/*.html
var templateFiles embed.FS

//go:embed static
var staticFiles embed.FS

var (
	templates = page.Templates(templateFiles, template.FuncMap{
		"thousands": thousands,
		"story":     storyURL, "person": personURL, "credential": credentialURL, "entry": entryURL,
		"num": func(f float64) string { return strconv.FormatFloat(f, 'f', 2, 64) },
	})
	files = page.NewFiles(staticFiles)
)

const (
	// pageRows is how many entries a page shows where nothing else is asked for.
	pageRows = 50
	// maxPageRows is how many it shows at most.
	maxPageRows = 500
	// startWindow is how far back the first page looks.
	startWindow = 7 * 24 * time.Hour
	// maxSaid is how many characters of a text a list shows.
	maxSaid = 280
)

func storyURL(run, step string) string {
	return "/history/steps/" + url.PathEscape(run) + "/" + url.PathEscape(step)
}
func personURL(name string) string       { return "/history/people/" + url.PathEscape(name) }
func credentialURL(intent string) string { return "/history/credentials/" + url.PathEscape(intent) }
func entryURL(index int64) string        { return fmt.Sprintf("/history/%d", index) }

func (s *Server) frame(r *http.Request, title string) page.Frame {
	unseen := func(c rune) rune { // a title takes no markup to show them by
		if page.Unseen(c) {
			return '\uFFFD'
		}
		return c
	}
	f := page.Frame{Title: strings.Map(unseen, title), Home: "/history", Section: "/history", Style: "history.css", Now: s.now()}
	if p := auth.From(r.Context()); p != nil && s.guard.People != nil && p.Method == "session" {
		f.Person, f.CSRF = p.Name, s.guard.People.CSRF(r)
	}
	f.Links = page.Links(r, f.Person)
	return f
}

// fail answers with the problem that err is, to a browser as a page.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, ledger.ErrNotFound) {
		err = problem.NotFound("nothing on record has this address").Because(err)
	}
	if !page.Wanted(r) {
		problem.Write(w, r, err)
		return
	}
	page.WriteProblem(w, r, s.t, s.frame(r, ""), problem.From(err), "To the history", "")
}

func (s *Server) file(w http.ResponseWriter, r *http.Request) {
	s.files.Serve(w, r, chi.URLParam(r, "file"))
}

// item is an entry on a page.
type item struct {
	*store.Entry
	told
	Index   int64
	Opened  map[string]string
	Name    string // of its person, where it can be read
	Who     string // the pseudonym
	Said    string // the reason or summary, or its beginning
	Cut     int    // how many characters of it are left out
	Missing []string
	Sign    *signature        // of a decision
	Asked   string            // another request that this one draws on
	Intent  string            // of the credential
	Outcome *store.UseOutcome // of a use, where it is at hand
}

// read makes an item of an entry. Whole texts are for a story, beginnings for a
// list.
func read(e *ledger.HistoryEntry, whole bool) (*item, error) {
	x, err := store.ParseLeaf(e.Entry)
	if err != nil {
		return nil, fmt.Errorf("entry %d: %w", e.Index, err)
	}
	it := &item{Entry: x, told: *tell(x), Index: e.Index, Opened: e.Opened, Name: e.Opened[store.SealedPerson]}
	if x.Person != nil {
		it.Who = *x.Person
	}
	it.Said = e.Opened[store.SealedReason]
	if it.Said == "" {
		it.Said = e.Opened[store.SealedSummary]
	}
	most := math.MaxInt
	for _, field := range []string{store.SealedStatement, store.SealedSample} {
		text := e.Opened[field]
		if field == store.SealedSample && text != "" {
			excerpts := store.SplitSamples(text, len(details[store.UseFinishedDetails](x).Outcomes))
			text = strings.Join(slices.DeleteFunc(excerpts, func(s string) bool { return s == "" }), "\n")
		}
		if it.Said == "" && text != "" {
			it.Said, most = text, maxStatement
		}
	}
	if !whole {
		most = maxSaid
	}
	if len(it.Said) > most {
		it.Said, it.Cut = page.Begin(it.Said, most)
	}
	for _, field := range slices.Sorted(maps.Keys(x.Sealed)) {
		if _, ok := e.Opened[field]; !ok {
			it.Missing = append(it.Missing, field)
		}
	}
	switch x.Type {
	case store.CredentialIssuing:
		it.Intent = x.ID
	case store.CredentialIssued, store.CredentialUsed, store.CredentialRevoked, store.CredentialExpired, store.CredentialFailed, store.CredentialAbandoned:
		it.Intent = details[store.ClosedDetails](x).Intent // all of them have it
	case store.AccessRefused:
		it.Intent = details[store.RefusedDetails](x).Intent
	case store.AlertRaised:
		it.Intent = details[store.AlertDetails](x).Intent
	case store.StepRequested:
		if use := details[store.RequestedDetails](x).Standing; use != nil {
			it.Asked = use.Request
		}
	}
	return it, nil
}

func readAll(entries []ledger.HistoryEntry, whole bool) ([]*item, error) {
	items := make([]*item, 0, len(entries))
	for i := range entries {
		it, err := read(&entries[i], whole)
		if err != nil {
			return nil, err
		}
		items = append(items, it)
	}
	return items, nil
}

// choice is one that a form offers.
type choice struct {
	Value, Name string
	Current     bool
}

// field is a text field of the form of filters.
type field struct {
	Name, Label, Value string
	List               []string // what there is on record
}

// quick is a window of time to jump to.
type quick struct {
	Name, URL string
	Current   bool
}

// timelinePage is the page of GET /history.
type timelinePage struct {
	page.Frame
	Start       bool // nothing was asked for
	From, To    string
	Fields      []field
	Types       []choice
	Outcomes    []choice
	Filters     []quick // those that are set; the link takes each away
	Quick       []quick
	Items       []*item // newest first
	Newer       string
	Older       string
	CSV, JSON   string
	Export      string
	Reload      string
	Counting    bool
	Total       int64
	Unit        string
	Begins      time.Time
	Ends        time.Time
	Main        *chart
	Each        []*chart
	NothingEver bool
}

// timeline answers a browser: entries, newest first, and what there is of each
// kind over time.
func (s *Server) timeline(w http.ResponseWriter, r *http.Request, a *ask) {
	now := s.now().UTC()
	p := &timelinePage{Frame: s.frame(r, "History"), Start: a.plain, Reload: r.URL.RequestURI()}
	if a.plain {
		a.From = now.Add(-startWindow).Truncate(time.Hour)
	}
	q := a.Query
	if a.cursor == 0 {
		a.Newest = true
	}
	a.Limit = min(a.Limit, maxPageRows)
	f, err := s.find(r, a, pageRows)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	items, err := readAll(f.Entries, false)
	if err != nil {
		s.fail(w, r, problem.Internal(err))
		return
	}
	slices.Reverse(items)
	p.Items = items
	if n := len(f.Entries); n > 0 {
		limit := ""
		if a.Limit > 0 {
			limit = strconv.Itoa(a.Limit)
		}
		if f.Older {
			p.Older = with(&q, "before", strconv.FormatInt(f.Entries[0].Index, 10), "limit", limit)
		}
		if f.Newer {
			p.Newer = with(&q, "cursor", strconv.FormatInt(f.Entries[n-1].Index+1, 10), "limit", limit)
		}
	}
	p.CSV, p.JSON = with(&q, "format", "csv"), with(&q, "format", "json")
	if c := chi.RouteContext(r.Context()); c != nil && c.Routes != nil && c.Routes.Match(chi.NewRouteContext(), http.MethodGet, "/history/export") {
		p.Export = strings.Replace(with(&q), "/history", "/history/export", 1)
	}
	if err := s.count(r, p, &q, now); err != nil {
		s.fail(w, r, err)
		return
	}
	if err := s.form(r, p, &q, now); err != nil {
		s.fail(w, r, err)
		return
	}
	p.NothingEver = s.ledger.Size() == 0
	page.Write(w, r, http.StatusOK, s.t, "timeline", p)
}

// count draws the charts of what q selects.
func (s *Server) count(r *http.Request, p *timelinePage, q *ledger.Query, now time.Time) error {
	from, to := q.From, q.To
	if to.IsZero() {
		to = now.Truncate(time.Second).Add(time.Second)
	}
	first := func(q ledger.Query) (time.Time, error) {
		q.Limit, q.Newest = 1, false
		f, err := s.index.Find(r.Context(), q, 0, s.ledger.Size())
		if err != nil || len(f.Entries) == 0 {
			return to.Add(-time.Hour), err
		}
		e, err := store.ParseLeaf(f.Entries[0].Entry)
		if err != nil {
			return to, problem.Internal(err)
		}
		return e.Time.Truncate(time.Second), nil
	}
	// A chart begins where it was asked to, but with the log at the earliest;
	// where it was not asked to, with the first that matches.
	since, err := first(ledger.Query{})
	if from.IsZero() && err == nil {
		since, err = first(*q)
	}
	if err != nil {
		return err
	}
	if from.Before(since) {
		from = since
	}
	if !to.After(from) {
		p.Begins, p.Ends = from, to
		return nil
	}
	at, unit := bars(from, to)
	p.Unit, p.Begins, p.Ends = unit, from, to
	series := []ledger.Series{{}}
	for _, o := range outcomes {
		series = append(series, ledger.Series{Type: string(store.StepRequested), Outcome: string(o.Outcome)})
	}
	for _, k := range kinds {
		series = append(series, ledger.Series{Type: string(k.Type)})
	}
	t, err := s.index.Counts(r.Context(), *q, at, series)
	if err != nil {
		return err
	}
	if p.Counting = t.Counting; p.Counting {
		return nil
	}
	for _, n := range t.Counts[0] {
		p.Total += n
	}
	window := func(i int) (string, string) {
		return at[i].Format(time.RFC3339Nano), at[i+1].Format(time.RFC3339Nano)
	}
	begins, ends := at[0].Format(time.RFC3339Nano), at[len(at)-1].Format(time.RFC3339Nano)
	requested := string(store.StepRequested)
	var parts []part
	for _, o := range outcomes {
		parts = append(parts, part{Name: o.Name, Tone: o.Tone, URL: with(q, "from", begins, "to", ends, "type", requested, "outcome", string(o.Outcome))})
	}
	p.Main = draw("What was asked for, and what policy said", "", at, parts, t.Counts[1:1+len(outcomes)], func(part, i int) string {
		from, to := window(i)
		return with(q, "from", from, "to", to, "type", requested, "outcome", string(outcomes[part].Outcome))
	})
	p.Main.URL = with(q, "from", begins, "to", ends, "type", requested)
	for k, kind := range kinds {
		c := draw(kind.Name, kind.Tone, at, []part{{Tone: kind.Tone}}, t.Counts[1+len(outcomes)+k:][:1], func(_, i int) string {
			from, to := window(i)
			return with(q, "from", from, "to", to, "type", string(kind.Type))
		})
		if c.Total > 0 {
			c.URL = with(q, "from", begins, "to", ends, "type", string(kind.Type))
			p.Each = append(p.Each, c)
		}
	}
	return nil
}

// form fills the filters in.
func (s *Server) form(r *http.Request, p *timelinePage, q *ledger.Query, now time.Time) error {
	labels := map[string]string{"run": "Run", "step": "Step", "orchestrator": "Orchestrator", "scope": "Scope", "target": "Target", "person": "Person", "request": "Request"}
	for _, f := range parameters(q) {
		if label := labels[f.name]; label != "" {
			x := field{Name: f.name, Label: label, Value: *f.value}
			if f.name == "orchestrator" || f.name == "scope" || f.name == "target" {
				values, err := s.index.Values(r.Context(), f.name, 200)
				if err != nil {
					return err
				}
				x.List = slices.DeleteFunc(slices.Clone(values), func(v string) bool { return strings.ContainsFunc(v, page.Unseen) })
			}
			p.Fields = append(p.Fields, x)
		}
		if *f.value != "" {
			p.Filters = append(p.Filters, quick{Name: f.name + " " + *f.value, URL: with(q, f.name, "")})
		}
	}
	for _, k := range kinds {
		p.Types = append(p.Types, choice{string(k.Type), k.Name, q.Type == string(k.Type)})
	}
	for _, o := range outcomes {
		p.Outcomes = append(p.Outcomes, choice{string(o.Outcome), o.Name, q.Outcome == string(o.Outcome)})
	}
	for _, t := range []struct {
		to *string
		at time.Time
	}{{&p.From, q.From}, {&p.To, q.To}} {
		if !t.at.IsZero() {
			*t.to = t.at.UTC().Format("2006-01-02T15:04:05")
		}
	}
	end := now.Truncate(time.Minute).Add(time.Minute)
	for _, k := range []struct {
		name string
		back time.Duration
	}{{"24 hours", 24 * time.Hour}, {"7 days", 7 * 24 * time.Hour}, {"30 days", 30 * 24 * time.Hour}, {"90 days", 90 * 24 * time.Hour}, {"A year", 365 * 24 * time.Hour}} {
		from := end.Add(-k.back)
		p.Quick = append(p.Quick, quick{Name: k.name, URL: with(q, "from", from.Format(time.RFC3339), "to", ""), Current: q.To.IsZero() && q.From.Sub(from).Abs() <= time.Hour && !q.From.IsZero()})
	}
	p.Quick = append(p.Quick, quick{Name: "All", URL: with(q, "from", "1970-01-01T00:00:00Z", "to", ""), Current: q.From.Year() == 1970 && q.To.IsZero()})
	return nil
}

// one is the answer of GET /history/{index} to a program.
type one struct {
	client.HistoryEntry
	LeafHash string `json:"leaf_hash"` // RFC 6962, base64
	Receipt  string `json:"receipt"`   // C2SP tlog-proof
}

// entry answers with one entry, verbatim, and the proof that it is in the log.
func (s *Server) entry(w http.ResponseWriter, r *http.Request) {
	a, err := asked(r.URL.Query())
	if err == nil && (!a.plain || a.format == "csv") {
		err = problem.Malformed("an entry takes no filter, and is JSON or a page")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	index, err := strconv.ParseInt(chi.URLParam(r, "index"), 10, 64)
	if err != nil || strconv.FormatInt(index, 10) != chi.URLParam(r, "index") {
		s.fail(w, r, fmt.Errorf("%w: entry %s", ledger.ErrNotFound, chi.URLParam(r, "index")))
		return
	}
	receipt, err := s.ledger.Receipt(r.Context(), index)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	f, err := s.index.Find(r.Context(), ledger.Query{Limit: 1}, index, index+1)
	if err == nil && len(f.Entries) != 1 {
		err = fmt.Errorf("%w: entry %d", ledger.ErrNotFound, index)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	hash := store.HashText(store.LeafHash(receipt.Leaf))
	if a.formatOf(r) == "json" {
		b, err := json.Marshal(&one{client.HistoryEntry(f.Entries[0]), hash, receipt.TlogProof()}, json.Deterministic(true))
		if err != nil {
			s.fail(w, r, problem.Internal(err))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_, _ = w.Write(append(b, '\n'))
		return
	}
	it, err := read(&f.Entries[0], true)
	if err != nil {
		s.fail(w, r, problem.Internal(err))
		return
	}
	if err := s.sign(r, []*item{it}); err != nil {
		s.fail(w, r, err)
		return
	}
	pretty := jsontext.Value(slices.Clone(f.Entries[0].Entry))
	if err := pretty.Indent(jsontext.WithIndent("  ")); err != nil {
		s.fail(w, r, problem.Internal(err))
		return
	}
	type text struct{ Name, Text, Commitment string }
	x := struct {
		page.Frame
		It          *item
		Leaf, Raw   string
		Texts       []text
		Hash        string
		Proof       string
		Prev, After string
		JSON        string
	}{Frame: s.frame(r, fmt.Sprintf("Entry %d", index)), It: it, Leaf: string(pretty), Raw: string(receipt.Leaf), Hash: hash, Proof: receipt.TlogProof(), JSON: entryURL(index) + "?format=json"}
	for _, name := range slices.Sorted(maps.Keys(it.Sealed)) {
		if opened, ok := it.Opened[name]; ok {
			x.Texts = append(x.Texts, text{name, opened, it.Sealed[name]})
		}
	}
	if index > 0 {
		x.Prev = entryURL(index - 1)
	}
	if index+1 < s.ledger.Size() {
		x.After = entryURL(index + 1)
	}
	page.Write(w, r, http.StatusOK, s.t, "entry", x)
}
