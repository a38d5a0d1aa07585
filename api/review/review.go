// Package review is the recorder's API for reviewers: the history, and the log
// itself as C2SP tlog-tiles, which other people's tools verify. Checkpoint and
// hash tiles say nothing about entries, so that witnesses and auditors without
// a token may have them.
package review

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
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
	guard  *auth.Guard
	public bool
}

// New returns the reviewers' API of l. public serves checkpoint and hash tiles
// to anyone; otherwise to reviewers and writers.
func New(l *ledger.Ledger, g *auth.Guard, public bool) *Server {
	return &Server{ledger: l, guard: g, public: public}
}

// Routes adds the reviewers' routes to r.
func (s *Server) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(s.guard.Require(auth.Reviewer))
		r.Get("/history", s.history)
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

func (s *Server) history(w http.ResponseWriter, r *http.Request) {
	q, err := query(r.URL.Query())
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	p, err := s.ledger.History(r.Context(), *q)
	if errors.Is(err, ledger.ErrQuery) {
		problem.Write(w, r, problem.Malformed(err.Error()))
		return
	}
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	out := client.HistoryPage{Entries: make([]client.HistoryEntry, len(p.Entries)), Next: p.Next}
	for i, e := range p.Entries {
		out.Entries[i] = client.HistoryEntry{Index: e.Index, Entry: e.Entry, Opened: e.Opened}
	}
	b, err := json.Marshal(&out, json.Deterministic(true))
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(b, '\n'))
}

// query reads the filters. An unknown or repeated one is refused: a misspelt
// filter would show a reviewer something other than what they asked for.
func query(v map[string][]string) (*ledger.Query, error) {
	q := &ledger.Query{Limit: DefaultLimit}
	ids := map[string]*string{"run": &q.Run, "step": &q.Step, "orchestrator": &q.Orchestrator, "request": &q.Request}
	texts := map[string]*string{"scope": &q.Scope, "target": &q.Target, "person": &q.Person, "cursor": &q.Cursor}
	times := map[string]*time.Time{"from": &q.From, "to": &q.To}
	for name, values := range v {
		if len(values) != 1 {
			return nil, problem.Malformed(fmt.Sprintf("filter %.50q is given %d times", name, len(values)))
		}
		value := values[0]
		if value == "" && (ids[name] != nil || texts[name] != nil || times[name] != nil || name == "type" || name == "outcome" || name == "limit") {
			continue // as a form sends what was not filled in
		}
		bad := func(want string) error {
			return problem.Malformed(fmt.Sprintf("filter %s: want %s", name, want))
		}
		switch {
		case ids[name] != nil:
			if !store.ValidID(value) {
				return nil, bad("an ID of letters, digits, '.', '_' and '-'")
			}
			*ids[name] = value
		case texts[name] != nil:
			if len(value) > 1024 || strings.ContainsRune(value, 0) {
				return nil, bad("at most 1024 characters")
			}
			*texts[name] = value
		case times[name] != nil:
			t, err := time.Parse(time.RFC3339Nano, value)
			if err != nil {
				return nil, bad("a time as in RFC 3339, such as 2026-01-31T08:00:00Z")
			}
			*times[name] = t
		case name == "type":
			if !store.Type(value).Known() {
				return nil, bad("a type of entry, such as credential.issued")
			}
			q.Type = value
		case name == "outcome":
			switch store.Outcome(value) {
			case store.Allow, store.Deny, store.NeedsApproval:
			default:
				return nil, bad("allow, deny or needs-approval")
			}
			q.Outcome = value
		case name == "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				return nil, bad("a number from 1 on")
			}
			q.Limit = min(n, MaxLimit) // next leads on
		default:
			return nil, problem.Malformed(fmt.Sprintf("there is no filter %.50q", name))
		}
	}
	return q, nil
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
