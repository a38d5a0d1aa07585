// Package review is the recorder's API for reviewers: the history, and the log
// itself as C2SP tlog-tiles, which other people's tools verify. Checkpoint and
// hash tiles say nothing about entries, so that witnesses and auditors without
// a token may have them.
package review

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// How many entries one page of history has by default, and at most.
const (
	DefaultLimit = 1000
	MaxLimit     = 10_000
)

// Server answers reviewers from one ledger.
type Server struct {
	ledger *ledger.Ledger
	index  *ledger.Index
	guard  *auth.Guard
	public bool
	origin string // the log's name
	t      *template.Template
	files  *page.Files
	now    func() time.Time
}

// New returns the reviewers' API of l, and its pages: where people log in, g's
// People are set before. public serves checkpoint and hash tiles to anyone;
// otherwise to reviewers and writers. It reads on in the background until l is
// closed.
func New(l *ledger.Ledger, g *auth.Guard, public bool) *Server {
	origin, _, _ := strings.Cut(l.Head(), "\n") // C2SP tlog-checkpoint: the first line
	return &Server{ledger: l, index: ledger.NewIndex(l), guard: g, public: public, origin: origin, t: templates, files: files, now: time.Now}
}

// Routes adds the reviewers' routes to r.
func (s *Server) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		if s.guard.People != nil {
			r.Use(s.guard.People.ToLogin)
		}
		r.Use(s.guard.Require(auth.Reviewer))
		r.Get("/history", s.history)
		r.Get("/history/{index:[0-9]+}", s.entry)
		r.Get("/history/steps/{run}/{step}", s.step)
		r.Get("/history/people/{person}", s.person)
		r.Get("/history/credentials/{intent}", s.credential)
		r.Get("/history/static/{file}", s.file)
		r.Get("/tile/entries/*", s.bundle)
	})
	r.Group(func(r chi.Router) {
		if !s.public {
			r.Use(s.guard.Require(auth.Reviewer, auth.Writer))
		}
		r.Get("/checkpoint", s.checkpoint)
		r.Get("/tile/{level:[0-9]+}/*", s.hashes)
	})
}

// parameter is a filter of GET /history that is a text.
type parameter struct {
	name  string
	value *string
	id    bool // it is an ID, not any text
}

// parameters are q's filters but for its times.
func parameters(q *ledger.Query) []parameter {
	return []parameter{
		{"run", &q.Run, true}, {"step", &q.Step, true}, {"orchestrator", &q.Orchestrator, true}, {"scope", &q.Scope, false},
		{"target", &q.Target, false}, {"person", &q.Person, false}, {"type", &q.Type, false}, {"outcome", &q.Outcome, false},
		{"request", &q.Request, true},
	}
}

// ask is what a reviewer asks for.
type ask struct {
	ledger.Query
	format string // json, csv or html; empty: whatever Accept says
	cursor int64  // entries from this index on
	before int64  // entries before this index, the newest of them; 0: not asked
	plain  bool   // nothing is asked for but a format
	claim  *claim // of the step that is asked about, where one was made
}

// layouts are how a time may be written. Those without a zone are UTC, as a
// form sends them.
var layouts = []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"}

// query reads filters alone, without what is about pages and formats.
func query(v map[string][]string) (*ledger.Query, error) {
	for _, name := range []string{"cursor", "before", "format"} {
		if _, ok := v[name]; ok {
			return nil, problem.Malformed(fmt.Sprintf("there is no filter %q here", name))
		}
	}
	a, err := asked(v)
	if err != nil {
		return nil, err
	}
	return &a.Query, nil
}

// asked reads the parameters of GET /history. An unknown or repeated one is
// refused: a misspelt filter would show a reviewer something other than what
// they asked for.
func asked(v map[string][]string) (*ask, error) {
	a := &ask{plain: true}
	q := &a.Query
	texts := map[string]parameter{}
	for _, p := range parameters(q) {
		texts[p.name] = p
	}
	times := map[string]*time.Time{"from": &q.From, "to": &q.To}
	numbers := map[string]*int64{"cursor": &a.cursor, "before": &a.before}
	for name, values := range v {
		if len(values) != 1 {
			return nil, problem.Malformed(fmt.Sprintf("filter %.50q is given %d times", name, len(values)))
		}
		value := values[0]
		text, isText := texts[name]
		known := isText || times[name] != nil || numbers[name] != nil || name == "limit" || name == "format"
		if !known {
			return nil, problem.Malformed(fmt.Sprintf("there is no filter %.50q", name))
		}
		if value == "" {
			continue // as a form sends what was not filled in
		}
		bad := func(want string) error {
			return problem.Malformed(fmt.Sprintf("filter %s: want %s", name, want))
		}
		a.plain = a.plain && name == "format"
		switch {
		case name == "type" && !store.Type(value).Known():
			return nil, bad("a type of entry, such as credential.issued")
		case name == "outcome" && !slices.Contains([]store.Outcome{store.Allow, store.Deny, store.NeedsApproval}, store.Outcome(value)):
			return nil, bad("allow, deny or needs-approval")
		case text.id && !store.ValidID(value):
			return nil, bad("an ID of letters, digits, '.', '_' and '-'")
		case isText:
			if len(value) > 1024 || strings.ContainsRune(value, 0) || !utf8.ValidString(value) {
				return nil, bad("at most 1024 characters")
			}
			*text.value = value
		case times[name] != nil:
			var err error
			for _, layout := range layouts {
				if *times[name], err = time.Parse(layout, value); err == nil {
					break
				}
			}
			if err != nil || times[name].IsZero() {
				return nil, bad("a time as in RFC 3339, such as 2026-01-31T08:00:00Z")
			}
		case numbers[name] != nil:
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil || n < 0 || strconv.FormatInt(n, 10) != value {
				return nil, bad("an index, as a page's \"next\" has it")
			}
			*numbers[name] = n
		case name == "format":
			if value != "json" && value != "csv" && value != "html" {
				return nil, bad("json, csv or html")
			}
			a.format = value
		case name == "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				return nil, bad("a number from 1 on")
			}
			q.Limit = min(n, MaxLimit) // next leads on
		}
	}
	if a.before > 0 && a.cursor > 0 {
		return nil, problem.Malformed("cursor and before are two directions: give one")
	}
	q.Newest = a.before > 0
	return a, nil
}

// formatOf is how r is answered: as ?format says, or else as Accept does.
func (a *ask) formatOf(r *http.Request) string {
	if a.format != "" {
		return a.format
	}
	if page.Wanted(r) {
		return "html"
	}
	for part := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		if media, _, _ := strings.Cut(part, ";"); strings.EqualFold(strings.TrimSpace(media), "text/csv") {
			return "csv"
		}
	}
	return "json"
}

func (s *Server) history(w http.ResponseWriter, r *http.Request) {
	a, err := asked(r.URL.Query())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if a.formatOf(r) == "html" {
		s.timeline(w, r, a)
		return
	}
	s.answer(w, r, a)
}

// find reads what a asks for.
func (s *Server) find(r *http.Request, a *ask, limit int) (*ledger.Found, error) {
	q := a.Query
	if q.Limit == 0 {
		q.Limit = limit
	}
	to := int64(math.MaxInt64)
	if a.before > 0 {
		to = a.before
	}
	f, err := s.index.Find(r.Context(), q, a.cursor, to)
	if errors.Is(err, ledger.ErrQuery) {
		err = problem.Malformed(err.Error())
	}
	return f, err
}

// answer sends what a asks for to a program: JSON or CSV, ascending.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, a *ask) {
	f, err := s.find(r, a, DefaultLimit)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := client.HistoryPage{Entries: make([]client.HistoryEntry, len(f.Entries))}
	for i, e := range f.Entries {
		out.Entries[i] = client.HistoryEntry(e)
	}
	// The next page of what goes backwards is further back.
	if n := len(f.Entries); n > 0 && a.before > 0 && f.Older {
		out.Next = strconv.FormatInt(f.Entries[0].Index, 10)
	} else if n > 0 && a.before == 0 && f.Newer {
		out.Next = strconv.FormatInt(f.Entries[n-1].Index+1, 10)
	}
	w.Header().Set("Cache-Control", "no-store")
	if a.formatOf(r) == "csv" {
		s.csv(w, r, a, &out)
		return
	}
	b, err := json.Marshal(&struct {
		client.HistoryPage
		Claim *claim `json:"claim,omitzero"`
	}{out, a.claim}, json.Deterministic(true))
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(b, '\n'))
}

// csv sends a page as CSV (RFC 4180). Where more follow, the header Link names
// the next page (RFC 8288), since CSV has no place for it.
func (s *Server) csv(w http.ResponseWriter, r *http.Request, a *ask, p *client.HistoryPage) {
	var b bytes.Buffer
	out := csv.NewWriter(&b)
	err := out.Write(evidence.HistoryColumns)
	for _, e := range p.Entries {
		row, rerr := Row(e)
		err = errors.Join(err, rerr, out.Write(Cells(row)))
	}
	out.Flush()
	if err = errors.Join(err, out.Error()); err != nil {
		problem.Write(w, r, problem.Internal(err))
		return
	}
	if p.Next != "" {
		next := *r.URL
		v := next.Query()
		v.Set(map[bool]string{true: "before", false: "cursor"}[a.before > 0], p.Next)
		next.RawQuery = v.Encode()
		w.Header().Set("Link", "<"+next.RequestURI()+`>; rel="next"`)
	}
	w.Header().Set("Content-Type", "text/csv; charset=utf-8; header=present")
	w.Header().Set("Content-Disposition", `attachment; filename="history.csv"`)
	_, _ = b.WriteTo(w)
}

// checkpoint serves the published head (C2SP tlog-tiles, "Checkpoints").
func (s *Server) checkpoint(w http.ResponseWriter, r *http.Request) {
	c := s.ledger.Published()
	if c == "" {
		problem.Write(w, r, problem.NotFound("nothing is published yet"))
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte(c))
}

// bundle serves entries, hashes the hashes over them. What is public of the one
// and not of the other hangs on this difference, so that each takes its own
// paths alone: the parser knows "tile/data/" for entries too.
func (s *Server) bundle(w http.ResponseWriter, r *http.Request) {
	s.tile(w, r, func(t tlog.Tile) bool { return t.L == -1 })
}

func (s *Server) hashes(w http.ResponseWriter, r *http.Request) {
	s.tile(w, r, func(t tlog.Tile) bool { return t.L >= 0 })
}

// parse reads a tile's path. Only its one canonical form is accepted.
func parse(path string) (tlog.Tile, bool) {
	path = strings.TrimPrefix(path, "/")
	t, err := torchwood.ParseTilePath(path)
	return t, err == nil && torchwood.TilePath(t) == path
}

// tile serves tiles up to the published size: what is not under a published
// checkpoint is nobody's to rely on yet.
func (s *Server) tile(w http.ResponseWriter, r *http.Request, mine func(tlog.Tile) bool) {
	t, ok := parse(r.URL.Path)
	if !ok || !mine(t) {
		problem.Write(w, r, problem.NotFound("no tile has this path (C2SP tlog-tiles)"))
		return
	}
	size, err := publishedSize(s.ledger.Published())
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	if !within(t, size) {
		problem.Write(w, r, problem.NotFound("the published log does not reach this tile"))
		return
	}
	b, err := s.ledger.Tile(r.Context(), t)
	if errors.Is(err, ledger.ErrNotFound) {
		problem.Write(w, r, problem.NotFound("the published log does not reach this tile"))
		return
	}
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	// A tile never changes, a partial one neither: what grows is its width,
	// which is in its path.
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	if t.L < 0 {
		h.Set("Cache-Control", "private, max-age=31536000, immutable") // for reviewers alone
	} else {
		h.Set("Cache-Control", "public, max-age=31536000, immutable") // one year in seconds
	}
	if r.Method != http.MethodHead {
		_, _ = w.Write(b)
	}
}

// within reports whether a log of size entries has tile t.
func within(t tlog.Tile, size int64) bool {
	level := max(t.L, 0) // an entry bundle has the place of a tile of level 0
	shift := uint(level) * torchwood.TileHeight
	if shift >= 63 {
		return false
	}
	have := size >> shift // hashes of this level in the tree
	// N*256 cannot overflow: compare by division.
	return t.N >= 0 && t.W >= 1 && t.N <= have/torchwood.TileWidth && t.N*torchwood.TileWidth+int64(t.W) <= have
}

func publishedSize(checkpoint string) (int64, error) {
	if checkpoint == "" {
		return 0, nil
	}
	i := strings.LastIndex(checkpoint, "\n\n")
	if i < 0 {
		return 0, fmt.Errorf("published checkpoint is no signed note")
	}
	c, err := torchwood.ParseCheckpoint(checkpoint[:i+1])
	if err != nil {
		return 0, fmt.Errorf("published checkpoint: %w", err)
	}
	return c.N, nil
}
