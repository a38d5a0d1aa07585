// Package respond is the recorder's API for responders: the people who act when
// something is wrong. What they do is on record under their own name.
package respond

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"golang.org/x/sync/singleflight"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// maxReason is the longest reason in bytes: 2,000 characters in any script.
	maxReason = 8000
	// maxHolds is how many holds may be in force: each text that is due is held
	// against all of them.
	maxHolds = 1000
	// within is how long an entry may take to be on record.
	within = 10 * time.Second
)

// Config is what a Server needs. All fields without a remark must be set.
type Config struct {
	Ledger      *ledger.Ledger
	Guard       *auth.Guard
	Name        string // the recorder's, stamped as writer on what it appends
	TrustDomain string // of its SPIFFE ID
	PrivacyKey  store.PrivacyKey
	Now         func() time.Time // the ledger's clock; time.Now where nil
	// Catalogue is the recorder's own, as it is now. It may return nil, and be nil.
	Catalogue func() *scopes.Set
}

// Server answers responders.
type Server struct {
	c  Config
	mu sync.Mutex // a hold is placed or lifted by one call at a time

	setting singleflight.Group // by person and what is stopped
	counted counted
}

// New returns the responders' API.
func New(c Config) *Server {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Catalogue == nil {
		c.Catalogue = func() *scopes.Set { return nil }
	}
	return &Server{c: c, counted: counted{at: map[string]*progress{}}}
}

// Routes adds the routes to r.
func (s *Server) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(server.Limit(server.MaxBody))
		s.revocationRoutes(r)
		r.With(s.c.Guard.Require(auth.Responder, auth.Reviewer)).Get("/holds", s.list)
		r.Group(func(r chi.Router) {
			r.Use(s.c.Guard.Require(auth.Responder))
			r.Post("/holds", s.place)
			r.Delete("/holds/{id}", s.lift)
		})
	})
}

// answer sends v as JSON.
func answer(w http.ResponseWriter, r *http.Request, status int, v any) {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	if err := only(r); err != nil {
		problem.Write(w, r, err)
		return
	}
	holds, err := s.holds(r.Context())
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	answer(w, r, http.StatusOK, client.Holds{Holds: holds})
}

// only refuses query parameters other than names.
func only(r *http.Request, names ...string) error {
	for name, values := range r.URL.Query() {
		if !slices.Contains(names, name) || len(values) != 1 {
			return problem.Malformed(fmt.Sprintf("the parameter %.50q does not belong here, or not %d times", name, len(values)))
		}
	}
	return nil
}

// place is POST /holds.
func (s *Server) place(w http.ResponseWriter, r *http.Request) {
	h, err := s.placed(r)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	answer(w, r, http.StatusCreated, h)
}

func (s *Server) placed(r *http.Request) (*client.Hold, error) {
	if err := only(r); err != nil {
		return nil, err
	}
	var in struct {
		Run    string     `json:"run"`
		From   *time.Time `json:"from"`
		To     *time.Time `json:"to"`
		Reason string     `json:"reason"`
	}
	if err := server.Decode(r, &in); err != nil {
		return nil, err
	}
	d := store.HoldDetails{Run: in.Run}
	switch {
	case in.Run != "" && (in.From != nil || in.To != nil):
		return nil, problem.Malformed("a hold covers a run, or a window of time: not both")
	case in.Run != "" && !store.ValidID(in.Run):
		return nil, problem.Malformed("run: want an ID of letters, digits, '.', '_' and '-'")
	case in.Run == "" && (in.From == nil || in.From.IsZero()):
		return nil, problem.Malformed("a hold covers a run, or a window of time: name the run, or from (and to)")
	case in.Run == "":
		d.From = store.At(*in.From)
		if in.To != nil {
			// The end is exclusive: what lies within its last microsecond is covered.
			d.To = store.At(in.To.Add(time.Microsecond - time.Nanosecond))
			if !d.To.After(d.From.Time) {
				return nil, problem.Malformed("to: want a time after from")
			}
		}
	}
	reason, err := said(in.Reason, "why the texts are held")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	holds, err := s.holds(r.Context())
	if err != nil {
		return nil, err
	}
	inForce := 0
	for _, h := range holds {
		if h.State == client.HoldInForce {
			inForce++
		}
	}
	if inForce >= maxHolds {
		return nil, problem.RequestClosed(fmt.Sprintf("%d holds are in force, which is as many as there may be: lift one that is over", inForce))
	}
	sub := s.entry(r, store.HoldPlaced, d.Run, reason)
	sub.SetDetails(d)
	return s.record(r.Context(), sub, sub.ID)
}

// lift is DELETE /holds/{id}.
func (s *Server) lift(w http.ResponseWriter, r *http.Request) {
	h, err := s.lifted(r)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	answer(w, r, http.StatusOK, h)
}

func (s *Server) lifted(r *http.Request) (*client.Hold, error) {
	if err := only(r, "reason"); err != nil {
		return nil, err
	}
	reason, err := said(r.URL.Query().Get("reason"), "why the hold is lifted: texts whose time is over are erased then")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	holds, err := s.holds(r.Context())
	if err != nil {
		return nil, err
	}
	id := chi.URLParam(r, "id")
	i := slices.IndexFunc(holds, func(h client.Hold) bool { return h.ID == id })
	switch {
	case i < 0:
		return nil, problem.NotFound("there is no such hold")
	case holds[i].State == client.HoldLifted:
		return nil, problem.RequestClosed("the hold was lifted already")
	}
	sub := s.entry(r, store.HoldLifted, holds[i].Run, reason)
	sub.SetDetails(store.HoldLiftedDetails{Hold: id})
	return s.record(r.Context(), sub, id)
}

// said is a reason as it goes on record.
func said(reason, why string) (string, error) {
	reason = strings.TrimFunc(reason, func(c rune) bool { return unicode.IsSpace(c) || unicode.Is(unicode.C, c) })
	switch {
	case reason == "":
		return "", problem.ReasonRequired("say " + why)
	case len(reason) > maxReason || !utf8.ValidString(reason) || strings.ContainsRune(reason, 0):
		return "", problem.Malformed(fmt.Sprintf("reason: want at most %d bytes of text", maxReason))
	}
	return reason, nil
}

// entry begins an entry about what the caller does. Who it is stands in it by
// pseudonym, name and reason are sealed.
func (s *Server) entry(r *http.Request, t store.Type, run, reason string) *store.Submission {
	who := auth.From(r.Context()).Person()
	sub := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(s.c.Now()),
		Agent: "spiffe://" + s.c.TrustDomain + "/recorder/" + s.c.Name, Run: run, Action: string(t),
		Person: store.Ptr(s.c.PrivacyKey.Pseudonym(who)),
	}}
	sub.Seal(store.SealedReason, reason)
	sub.Seal(store.SealedPerson, who)
	return sub
}

// record appends sub and returns the hold as it is then. A caller who is told
// that the ledger does not answer looks whether the hold is there: it may be.
func (s *Server) record(ctx context.Context, sub *store.Submission, hold string) (*client.Hold, error) {
	if err := s.append(ctx, sub); err != nil {
		return nil, err
	}
	holds, err := s.holds(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(holds, func(h client.Hold) bool { return h.ID == hold })
	if i < 0 {
		return nil, errors.New("a hold that was recorded is not on record")
	}
	return &holds[i], nil
}

// append puts sub on record. After ErrUnavailable it may be there or not.
func (s *Server) append(ctx context.Context, sub *store.Submission) error {
	line, err := sub.Marshal()
	if err != nil {
		return err
	}
	// A hold is waited for to its end, so the wait has an end of its own here.
	done := make(chan error, 1)
	go func() {
		_, err := s.c.Ledger.Append(context.WithoutCancel(ctx), ledger.Author{Name: s.c.Name, Recorder: true}, [][]byte{line})
		done <- err
	}()
	late := time.NewTimer(within)
	defer late.Stop()
	select {
	case err = <-done:
	case <-late.C:
		err = fmt.Errorf("%w: %s took longer than %s", store.ErrUnavailable, sub.Type, within)
	}
	if err != nil {
		return fmt.Errorf("recording %s: %w", sub.Type, err)
	}
	return nil
}

// holds reads all holds from the record, oldest first.
func (s *Server) holds(ctx context.Context) ([]client.Hold, error) {
	out := []client.Hold{}
	at := map[string]int{}
	if err := s.each(ctx, store.HoldPlaced, func(e *store.Entry, h ledger.HistoryEntry) error {
		d, err := store.DetailsAs[store.HoldDetails](e)
		if err != nil {
			return err
		}
		at[e.ID] = len(out)
		out = append(out, client.Hold{
			ID: e.ID, Index: h.Index, State: client.HoldInForce, Run: d.Run, From: d.From.Time, To: d.To.Time,
			Reason: opened(e, h, store.SealedReason), PlacedAt: e.Time.Time, PlacedBy: person(e, h),
		})
		return nil
	}); err != nil {
		return nil, err
	}
	return out, s.each(ctx, store.HoldLifted, func(e *store.Entry, h ledger.HistoryEntry) error {
		d, err := store.DetailsAs[store.HoldLiftedDetails](e)
		if err != nil {
			return err
		}
		i, ok := at[d.Hold]
		if !ok || out[i].State == client.HoldLifted {
			return nil
		}
		out[i].State, out[i].LiftedAt, out[i].LiftedBy, out[i].LiftedReason = client.HoldLifted, e.Time.Time, person(e, h), opened(e, h, store.SealedReason)
		return nil
	})
}

// each calls fn for the entries of one type, ascending.
func (s *Server) each(ctx context.Context, t store.Type, fn func(*store.Entry, ledger.HistoryEntry) error) error {
	return s.eachFrom(ctx, t, 0, fn)
}

// eachFrom is each from entry from on.
func (s *Server) eachFrom(ctx context.Context, t store.Type, from int64, fn func(*store.Entry, ledger.HistoryEntry) error) error {
	q := ledger.Query{Type: string(t), Cursor: strconv.FormatInt(from, 10)}
	for {
		p, err := s.c.Ledger.History(ctx, q)
		if err != nil {
			return err
		}
		for _, h := range p.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err == nil {
				err = fn(e, h)
			}
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
		}
		if q.Cursor = p.Next; q.Cursor == "" {
			return nil
		}
	}
}

// opened is a sealed text of e, or that it is erased.
func opened(e *store.Entry, h ledger.HistoryEntry, field string) string {
	if text, ok := h.Opened[field]; ok || e.Sealed[field] == "" {
		return text
	}
	return approvals.Erased
}

// person is who acted: by name, or by the pseudonym where the name is erased.
func person(e *store.Entry, h ledger.HistoryEntry) string {
	if name := h.Opened[store.SealedPerson]; name != "" || e.Person == nil {
		return name
	}
	return *e.Person
}
