// Package record is the recorder's API for writers, the brokers and gateways:
// they append, read what is open, and follow it. Who writes and when is the
// recorder's to say: it stamps both from the authenticated caller.
package record

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Limits of one append.
const (
	MaxBody  = 4 << 20 // bytes
	MaxLines = 1000
	// maxUnderWay is how many bytes of appends one writer may have under way; more
	// wait. In memory an append is several times its size, so that a writer who
	// sends as much as there can be would otherwise take the recorder down for all.
	maxUnderWay = 8 * MaxBody
)

// Server answers writers from one ledger.
type Server struct {
	ledger *ledger.Ledger
	guard  *auth.Guard
	drain  context.Context
	stop   context.CancelFunc

	mu       sync.Mutex
	underWay map[string]*semaphore.Weighted // by writer
}

// New returns the writers' API of l.
func New(l *ledger.Ledger, g *auth.Guard) *Server {
	s := &Server{ledger: l, guard: g, underWay: map[string]*semaphore.Weighted{}}
	s.drain, s.stop = context.WithCancel(context.Background())
	return s
}

// Drain ends what streams, so that a listener can shut down.
func (s *Server) Drain() { s.stop() }

// Routes adds the writers' routes to r. Their bodies are larger than others':
// the router's own limit must be MaxBody.
func (s *Server) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(s.guard.Require(auth.Writer))
		r.Post("/append", s.append)
		r.Get("/open", s.open)
		r.Get("/follow", s.follow)
		r.Get("/consistency", s.consistency)
	})
}

func (s *Server) append(w http.ResponseWriter, r *http.Request) {
	seen, err := size(r.Header.Get(client.HeaderSeen), client.HeaderSeen)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	writer := auth.From(r.Context()).Name
	free, err := s.admit(r.Context(), writer, r.ContentLength)
	if err != nil {
		return // the caller is gone
	}
	defer free()
	body, err := server.Body(r)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	lines, err := split(body)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	a, err := s.ledger.Append(r.Context(), ledger.Author{Name: writer}, lines)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	s.answer(w, r, a, seen)
}

// admit waits until writer may have size bytes more under way (-1: unknown),
// which free gives back. The error is ctx's.
func (s *Server) admit(ctx context.Context, writer string, size int64) (free func(), err error) {
	s.mu.Lock()
	sem := s.underWay[writer]
	if sem == nil { // a writer is authenticated: there are few
		sem = semaphore.NewWeighted(maxUnderWay)
		s.underWay[writer] = sem
	}
	s.mu.Unlock()
	if size < 0 || size > MaxBody {
		size = MaxBody
	}
	return func() { sem.Release(size) }, sem.Acquire(ctx, size)
}

// split cuts an NDJSON body into its lines. The last newline may be missing;
// an empty line is refused, since it is no entry.
func split(body []byte) ([][]byte, error) {
	body = bytes.TrimSuffix(body, []byte("\n"))
	if len(body) == 0 {
		return nil, problem.Malformed("the body has no entries, want one JSON object per line")
	}
	if n := bytes.Count(body, []byte("\n")) + 1; n > MaxLines {
		return nil, problem.Malformed(fmt.Sprintf("%d entries in one append, at most %d", n, MaxLines))
	}
	lines := bytes.Split(body, []byte("\n"))
	for i, l := range lines {
		if len(bytes.TrimSpace(l)) == 0 {
			return nil, problem.Malformed(fmt.Sprintf("line %d is empty", i+1))
		}
	}
	return lines, nil
}

func (s *Server) open(w http.ResponseWriter, r *http.Request) {
	seen, err := size(r.Header.Get(client.HeaderSeen), client.HeaderSeen)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	request := r.URL.Query().Get("request")
	if request != "" && !store.ValidID(request) {
		problem.Write(w, r, problem.Malformed("request is not a valid ID"))
		return
	}
	a, err := s.ledger.OpenSet(r.Context(), request)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	s.answer(w, r, a, seen)
}

// answer sends a with the proof that its head continues the one of size seen.
// A seen size beyond the head gets no proof: the writer has seen a longer log
// than this one, and finds that out by itself.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, a *store.Appended, seen int64) {
	ack, err := acknowledge(r.Context(), s.ledger, a, seen)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	b, err := json.Marshal(ack)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

func acknowledge(ctx context.Context, l *ledger.Ledger, a *store.Appended, seen int64) (*client.Ack, error) {
	ack := &client.Ack{Appended: *a}
	if seen > 0 {
		n, err := headSize(a.Checkpoint)
		if err == nil && seen < n {
			ack.Consistency, err = l.Consistency(ctx, seen, n)
		}
		if err != nil {
			return nil, fmt.Errorf("proof of consistency: %w", err)
		}
	}
	return ack, nil
}

// headSize reads the tree size of a checkpoint that the ledger itself signed.
func headSize(checkpoint string) (int64, error) {
	text, _, _ := cutNote(checkpoint)
	c, err := torchwood.ParseCheckpoint(text)
	return c.N, err
}

// cutNote splits a signed note into text and signatures (C2SP signed-note).
func cutNote(signed string) (text, sigs string, ok bool) {
	i := bytes.LastIndex([]byte(signed), []byte("\n\n"))
	if i < 0 {
		return signed, "", false
	}
	return signed[:i+1], signed[i+2:], true
}

func (s *Server) consistency(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	from, err1 := size(q.Get("from"), "from")
	to, err2 := size(q.Get("to"), "to")
	if err := errors.Join(err1, err2); err != nil {
		problem.Write(w, r, err)
		return
	}
	switch {
	case from < 1 || to < from:
		problem.Write(w, r, problem.Malformed("want from and to with 1 <= from <= to"))
		return
	case to > s.ledger.Size():
		problem.Write(w, r, problem.NotFound(fmt.Sprintf("the log has %d entries", s.ledger.Size())))
		return
	}
	c := client.Consistency{From: from, To: to}
	if from < to {
		var err error
		if c.Proof, err = s.ledger.Consistency(r.Context(), from, to); err != nil {
			problem.Write(w, r, err)
			return
		}
	}
	b, err := json.Marshal(&c)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

// follow streams what comes to be on record and is a writer's to know, one Ack
// a line, from the entry after the given index on. It ends when the writer
// goes, or the server drains.
func (s *Server) follow(w http.ResponseWriter, r *http.Request) {
	after := int64(-1)
	if v := r.URL.Query().Get("after"); v != "" && v != "-1" {
		n, err := size(v, "after")
		if err != nil {
			problem.Write(w, r, err)
			return
		}
		after = n
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.drain, cancel)()

	out := &stream{w: w, rc: http.NewResponseController(w)}
	w.Header().Set("Content-Type", client.NDJSON)
	if out.line(nil) != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(client.Heartbeat)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if out.line(nil) != nil {
					cancel()
					return
				}
			}
		}
	}()
	err := s.ledger.Follow(ctx, after, func(a *store.Appended) error {
		b, err := json.Marshal(&client.Ack{Appended: *a})
		if err != nil {
			return err
		}
		return out.line(b)
	})
	cancel()
	<-done // nothing may write after the handler has returned
	if err != nil && r.Context().Err() == nil && s.drain.Err() == nil {
		problem.Logger(r.Context()).Warn("a follower was cut off", zap.Error(err))
	}
}

// stream writes whole lines from two goroutines, entries and heartbeats.
type stream struct {
	mu sync.Mutex
	w  http.ResponseWriter
	rc *http.ResponseController
}

func (s *stream) line(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	server.Extend(s.w, 3*client.Heartbeat)
	if _, err := s.w.Write(append(b, '\n')); err != nil {
		return err
	}
	return s.rc.Flush()
}

// size parses a tree size or index; an absent one is 0.
func size(s, name string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, problem.Malformed(name + " is not a number of entries")
	}
	return n, nil
}
