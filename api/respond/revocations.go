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

	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// maxFreezes is how many freezes may be in force: each request is held against
	// all of them. One of everything is taken beyond that.
	maxFreezes = 1000
	// keepLifted is how many freezes that were lifted are listed.
	keepLifted = 100
	// maxCovered is how many credentials of each kind the answer about one freeze
	// lists, and maxShown how many its page does.
	maxCovered = 10_000
	maxShown   = 200
	// maxAlerts is how many of the newest alerts are read for why something could
	// not be revoked.
	maxAlerts = 1000
)

// revocationRoutes adds the switch.
func (s *Server) revocationRoutes(r chi.Router) {
	r.Group(func(r chi.Router) {
		if s.c.Guard.People != nil {
			r.Use(s.c.Guard.People.ToLogin)
		}
		r.Use(s.c.Guard.Require(auth.Responder, auth.Reviewer))
		r.Get("/revocations", s.revocations)
		r.Get("/revocations/{id}", s.revocation)
		r.Get("/revocations/static/{file}", s.file)
	})
	r.Group(func(r chi.Router) {
		r.Use(s.c.Guard.Require(auth.Responder))
		r.Post("/revocations", s.stop)
		r.Delete("/revocations/{id}", s.release)
		r.Post("/revocations/{id}/lift", s.release) // of a page's form, which knows no DELETE
	})
}

// stopping is the body of POST /revocations.
type stopping struct {
	client.Stop `json:",inline"`
	Reason      string `json:"reason"`
}

// stop is POST /revocations.
func (s *Server) stop(w http.ResponseWriter, r *http.Request) {
	form := isForm(r)
	in, v, err := s.stopped(r, form)
	switch {
	case form && err != nil && problem.From(err).Status < http.StatusInternalServerError:
		s.listPage(w, r, problem.From(err).Status, in, err)
	case err != nil:
		s.fail(w, r, err)
	case form:
		http.Redirect(w, r, "/revocations/"+v.ID, http.StatusSeeOther)
	default:
		w.Header().Set("Location", "/revocations/"+v.ID)
		answer(w, r, http.StatusAccepted, v)
	}
}

func (s *Server) stopped(r *http.Request, form bool) (in stopping, _ *client.Revocation, err error) {
	if err := only(r); err != nil {
		return in, nil, err
	}
	if !form {
		err = server.Decode(r, &in)
	} else if err = r.ParseForm(); err != nil {
		err = problem.Malformed("the form cannot be read").Because(err)
	} else {
		in, err = fromForm(r)
	}
	if err != nil {
		return in, nil, err
	}
	d := store.FreezeDetails(in.Stop)
	if err := d.Check(); err != nil {
		return in, nil, problem.Malformed(err.Error())
	}
	reason, err := said(in.Reason, "why: it goes on record")
	if err != nil {
		return in, nil, err
	}
	sub := s.entry(r, store.FreezeSet, d.Run, reason)
	sub.Orchestrator, sub.Step = d.Orchestrator, d.Step
	sub.SetDetails(d)
	// Of the same call several times at once one is taken; its repetition, once it
	// is on record, finds it there.
	done, err, _ := s.setting.Do(fmt.Sprintf("%s %v", *sub.Person, d), func() (any, error) {
		_, _, freezes := s.c.Ledger.Standing()
		if i := slices.IndexFunc(freezes, func(f store.Freeze) bool { return f.Person == *sub.Person && f.FreezeDetails == d }); i >= 0 {
			return freezes[i].ID, nil
		}
		if len(freezes) >= maxFreezes && !d.All {
			return "", problem.RequestClosed(fmt.Sprintf("%d freezes are in force, which is as many as there may be: stop everything, or lift one that is over", len(freezes)))
		}
		return sub.ID, s.append(r.Context(), sub)
	})
	if err != nil {
		return in, nil, err
	}
	v, err := s.one(context.WithoutCancel(r.Context()), done.(string), 0)
	return in, v, err
}

// release is DELETE /revocations/{id}, and what a page's form sends instead.
func (s *Server) release(w http.ResponseWriter, r *http.Request) {
	form := r.Method == http.MethodPost
	v, err := s.released(r, form)
	var self *lifter
	switch {
	case errors.As(err, &self):
		s.c.Guard.Refuse(w, r, problem.SelfApproval(self.Error()))
	case err != nil:
		s.fail(w, r, err)
	case form:
		http.Redirect(w, r, "/revocations/"+v.ID, http.StatusSeeOther)
	default:
		answer(w, r, http.StatusOK, v)
	}
}

// lifter refuses a person who would lift their own freeze.
type lifter struct{}

func (*lifter) Error() string {
	return "a freeze is lifted by another responder than the one who set it"
}

func (s *Server) released(r *http.Request, form bool) (*client.Revocation, error) {
	text, due := "", form
	if form {
		if err := r.ParseForm(); err != nil {
			return nil, problem.Malformed("the form cannot be read").Because(err)
		}
		text = r.PostForm.Get("reason")
	} else {
		if err := only(r, "reason"); err != nil {
			return nil, err
		}
		text, due = r.URL.Query().Get("reason"), r.URL.Query().Has("reason")
	}
	reason := ""
	if due {
		var err error
		if reason, err = said(text, "why the freeze is lifted: it goes on record"); err != nil {
			return nil, err
		}
	}
	id := chi.URLParam(r, "id")
	v, err := s.one(r.Context(), id, 0)
	if err != nil {
		return nil, err
	}
	who := auth.From(r.Context()).Person()
	switch {
	case v.State == client.FreezeLifted:
		return nil, problem.RequestClosed("the freeze was lifted already")
	// Names differ by case alone where one person has two: a token and a login.
	case strings.EqualFold(v.SetBy, who), v.SetBy == s.c.PrivacyKey.Pseudonym(who):
		return nil, &lifter{}
	}
	sub := s.entry(r, store.FreezeLifted, v.Run, reason)
	sub.Orchestrator, sub.Step = v.Orchestrator, v.Step
	sub.SetDetails(store.FreezeLiftedDetails{Freeze: id})
	// A crash after the append leaves a lifted freeze whose responder was not told:
	// their next call is answered that it is lifted.
	err = s.append(r.Context(), sub)
	if _, own := store.IsOrder(err, store.OrderLifter); own {
		return nil, &lifter{}
	}
	if _, gone := store.IsOrder(err, store.OrderNotFrozen); gone {
		return nil, problem.RequestClosed("the freeze was lifted already")
	}
	if err != nil {
		return nil, err
	}
	return s.one(context.WithoutCancel(r.Context()), id, 0)
}

// revocations is GET /revocations.
func (s *Server) revocations(w http.ResponseWriter, r *http.Request) {
	if err := only(r); err != nil {
		s.fail(w, r, err)
		return
	}
	if page.Wanted(r) {
		s.listPage(w, r, http.StatusOK, stopping{}, nil)
		return
	}
	list, err := s.all(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	answer(w, r, http.StatusOK, list)
}

// revocation is GET /revocations/{id}.
func (s *Server) revocation(w http.ResponseWriter, r *http.Request) {
	if err := only(r); err != nil {
		s.fail(w, r, err)
		return
	}
	most := maxCovered
	if page.Wanted(r) {
		most = maxShown
	}
	v, err := s.one(r.Context(), chi.URLParam(r, "id"), most)
	switch {
	case err != nil:
		s.fail(w, r, err)
	case page.Wanted(r):
		s.onePage(w, r, v)
	default:
		answer(w, r, http.StatusOK, v)
	}
}

// counted is which freezes there are, and how far what they cover is. It holds
// no text, and is read on from where it was: the log only grows.
type counted struct {
	mu   sync.Mutex
	upTo int64 // entries before it were read
	list []*progress
	at   map[string]*progress
}

// progress is of one freeze.
type progress struct {
	id                       string
	index                    int64
	store.FreezeDetails            //
	lifted                   int64 // index of freeze.lifted; 0: in force
	upTo                     int64 // entries before it are counted
	closed, revoked, expired int64
}

// learn reads what was set and lifted before entry size. mu is held.
func (s *Server) learn(ctx context.Context, size int64) error {
	c := &s.counted
	if c.upTo >= size {
		return nil
	}
	// All is read before any of it is taken: what breaks off is read again.
	type change struct {
		index int64
		e     *store.Entry
	}
	var changes []change
	for _, t := range []store.Type{store.FreezeSet, store.FreezeLifted} {
		if err := s.eachFrom(ctx, t, c.upTo, func(e *store.Entry, h ledger.HistoryEntry) error {
			if h.Index < size {
				changes = append(changes, change{h.Index, e})
			}
			return nil
		}); err != nil {
			return err
		}
	}
	slices.SortFunc(changes, func(a, b change) int { return int(a.index - b.index) })
	for _, x := range changes {
		if x.e.Type == store.FreezeSet {
			d, err := store.DetailsAs[store.FreezeDetails](x.e)
			if err != nil {
				return err
			}
			p := &progress{id: x.e.ID, index: x.index, FreezeDetails: d, upTo: x.index + 1}
			c.at[p.id], c.list = p, append(c.list, p)
			continue
		}
		d, err := store.DetailsAs[store.FreezeLiftedDetails](x.e)
		if err != nil {
			return err
		}
		if p := c.at[d.Freeze]; p != nil && p.lifted == 0 {
			p.lifted = x.index
		}
	}
	c.upTo = size
	return nil
}

// count goes on counting for p, up to entry size or its end. mu is held.
func (s *Server) count(ctx context.Context, p *progress, size int64) error {
	if p.lifted > 0 {
		size = p.lifted
	}
	if p.upTo >= size {
		return nil
	}
	q := ledger.Query{Orchestrator: p.Orchestrator, Run: p.Run, Step: p.Step, Scope: p.Scope}
	var n [3]int64
	for i, t := range []store.Type{store.RequestVoid, store.CredentialRevoked, store.CredentialExpired} {
		q.Type = string(t)
		var err error
		if n[i], err = s.c.Ledger.Count(ctx, q, p.upTo, size); err != nil {
			return err
		}
	}
	p.closed, p.revoked, p.expired, p.upTo = p.closed+n[0], p.revoked+n[1], p.expired+n[2], size
	return nil
}

// all are the freezes in force and the newest that were lifted, newest first.
func (s *Server) all(ctx context.Context) (*client.Revocations, error) {
	size, requests, _ := s.c.Ledger.Standing()
	chosen, more, err := s.choose(ctx, size)
	if err != nil {
		return nil, err
	}
	out := &client.Revocations{Revocations: []client.Revocation{}, More: more}
	if len(chosen) == 0 {
		return out, nil
	}
	first := chosen[len(chosen)-1].index
	at := map[string]*client.Revocation{}
	for _, p := range chosen {
		out.Revocations = append(out.Revocations, client.Revocation{ID: p.id, Index: p.index})
	}
	for i, p := range chosen {
		v := &out.Revocations[i]
		p.fill(v)
		at[v.ID] = v
	}
	for _, t := range []store.Type{store.FreezeSet, store.FreezeLifted} {
		if err := s.eachFrom(ctx, t, first, func(e *store.Entry, h ledger.HistoryEntry) error { return tell(at, e, h) }); err != nil {
			return nil, err
		}
	}
	for _, r := range requests {
		for i := range chosen {
			chosen[i].live(r, &out.Revocations[i])
		}
	}
	return out, nil
}

// choose is which freezes are listed, newest first; they are copies, counted up
// to size.
func (s *Server) choose(ctx context.Context, size int64) (chosen []progress, more bool, err error) {
	c := &s.counted
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.learn(ctx, size); err != nil {
		return nil, false, err
	}
	lifted := 0
	for _, p := range slices.Backward(c.list) {
		if p.lifted > 0 {
			if lifted++; lifted > keepLifted {
				more = true
				continue
			}
		}
		if err := s.count(ctx, p, size); err != nil {
			return nil, false, err
		}
		chosen = append(chosen, *p)
	}
	return chosen, more, nil
}

// one is a freeze, with at most so many of the credentials of each kind under it.
func (s *Server) one(ctx context.Context, id string, most int) (*client.Revocation, error) {
	size, requests, _ := s.c.Ledger.Standing()
	p, err := s.find(ctx, id, size)
	if err != nil {
		return nil, err
	}
	v := &client.Revocation{ID: p.id, Index: p.index}
	p.fill(v)
	at := map[string]*client.Revocation{id: v}
	if err := s.at(ctx, p.index, at); err != nil {
		return nil, err
	}
	if p.lifted > 0 {
		if err := s.at(ctx, p.lifted, at); err != nil {
			return nil, err
		}
	}
	var listed []*store.Request
	for _, r := range requests {
		if p.live(r, v) && (r.Revocable && v.Pending <= int64(most) || !r.Revocable && v.Irrevocable <= int64(most)) {
			listed = append(listed, r)
		}
	}
	if p.lifted == 0 && v.Reached() == 0 {
		if v.Unknown, err = s.unknown(ctx, p.FreezeDetails); err != nil {
			return nil, err
		}
	}
	if most == 0 {
		return v, nil
	}
	v.More = v.Pending > int64(most) || v.Irrevocable > int64(most)
	return v, s.cover(ctx, v, listed)
}

// unknown is which names of f nobody ever asked by or for, and the catalogue does
// not have either. What a pattern of the catalogue lets ask is not known by that.
func (s *Server) unknown(ctx context.Context, f store.FreezeDetails) (names []string, err error) {
	var catalogue []*scopes.Scope
	if set := s.c.Catalogue(); set != nil {
		catalogue = set.Scopes()
	}
	for _, x := range []struct {
		name, value string
		q           ledger.Query
		has         func(*scopes.Scope) bool
	}{
		{"orchestrator", f.Orchestrator, ledger.Query{Orchestrator: f.Orchestrator}, func(sc *scopes.Scope) bool { return slices.Contains(sc.Ask, f.Orchestrator) }},
		{"scope", f.Scope, ledger.Query{Scope: f.Scope}, func(sc *scopes.Scope) bool { return sc.Name == f.Scope }},
	} {
		if x.value == "" || slices.ContainsFunc(catalogue, x.has) {
			continue
		}
		// Not any entry: freeze.set itself has the name.
		x.q.Type, x.q.Limit = string(store.StepRequested), 1
		asked, err := s.c.Ledger.History(ctx, x.q)
		if err != nil {
			return nil, err
		}
		if len(asked.Entries) == 0 {
			names = append(names, x.name)
		}
	}
	return names, nil
}

func (s *Server) find(ctx context.Context, id string, size int64) (progress, error) {
	c := &s.counted
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.learn(ctx, size); err != nil {
		return progress{}, err
	}
	p := c.at[id]
	if p == nil {
		return progress{}, problem.NotFound("there is no such freeze")
	}
	if err := s.count(ctx, p, size); err != nil {
		return progress{}, err
	}
	return *p, nil
}

// at tells of the entry index in the freezes of at.
func (s *Server) at(ctx context.Context, index int64, at map[string]*client.Revocation) error {
	p, err := s.c.Ledger.History(ctx, ledger.Query{Cursor: strconv.FormatInt(index, 10), Limit: 1})
	if err != nil {
		return err
	}
	if len(p.Entries) == 0 {
		return fmt.Errorf("entry %d is not there", index)
	}
	e, err := store.ParseLeaf(p.Entries[0].Entry)
	if err != nil {
		return fmt.Errorf("entry %d: %w", index, err)
	}
	return tell(at, e, p.Entries[0])
}

// tell puts who set or lifted a freeze, and why, into those of at.
func tell(at map[string]*client.Revocation, e *store.Entry, h ledger.HistoryEntry) error {
	if e.Type == store.FreezeSet {
		if v := at[e.ID]; v != nil {
			v.Reason, v.SetAt, v.SetBy = opened(e, h, store.SealedReason), e.Time.Time, person(e, h)
		}
		return nil
	}
	d, err := store.DetailsAs[store.FreezeLiftedDetails](e)
	if err != nil {
		return err
	}
	if v := at[d.Freeze]; v != nil && v.State == client.FreezeLifted {
		v.LiftedAt, v.LiftedBy, v.LiftedReason = e.Time.Time, person(e, h), opened(e, h, store.SealedReason)
	}
	return nil
}

// fill puts what is counted into v.
func (p *progress) fill(v *client.Revocation) {
	v.Stop, v.State, v.Closed, v.Revoked, v.Expired = client.Stop(p.FreezeDetails), client.FreezeInForce, p.closed, p.revoked, p.expired
	if p.lifted > 0 {
		v.State = client.FreezeLifted
	}
}

// live counts r in v where it has a credential, or is about to have one, that p
// covers and that was begun before p was lifted. It reports whether it has one.
func (p *progress) live(r *store.Request, v *client.Revocation) bool {
	if !r.Live && !r.Minting || p.lifted > 0 && r.IntentIndex > p.lifted || !p.Covers(r.Orchestrator, r.Run, r.Step, r.Scope) {
		return false
	}
	switch {
	case r.Minting:
		v.Minting++
		return false
	case r.Revocable:
		v.Pending++
	default:
		v.Irrevocable++
	}
	return true
}

// cover lists the credentials of requests in v.
func (s *Server) cover(ctx context.Context, v *client.Revocation, requests []*store.Request) error {
	if len(requests) == 0 {
		return nil
	}
	why := map[string]string{}
	if v.Pending > 0 {
		alerts, err := s.c.Ledger.History(ctx, ledger.Query{Type: string(store.AlertRaised), Cursor: strconv.FormatInt(v.Index, 10), Newest: true, Limit: maxAlerts})
		if err != nil {
			return err
		}
		for _, h := range alerts.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			// What a writer put there that is none is for the offline verifier to find.
			if d, err := store.DetailsAs[store.AlertDetails](e); err == nil && d.Alert == store.AlertRevoke {
				for _, intent := range append(d.Intents, d.Intent) {
					why[intent] = d.What
				}
			}
		}
	}
	idx := make([]int64, len(requests))
	for i, r := range requests {
		idx[i] = r.IssuedIndex
	}
	slices.Sort(idx)
	leaves, err := s.c.Ledger.Leaves(ctx, slices.Compact(idx))
	if err != nil {
		return err
	}
	kinds := make(map[int64]string, len(leaves))
	for _, l := range leaves {
		e, err := store.ParseLeaf(l.Leaf)
		if err != nil {
			return fmt.Errorf("entry %d: %w", l.Index, err)
		}
		d, err := store.DetailsAs[store.IssuedDetails](e)
		if err != nil {
			return fmt.Errorf("entry %d: %w", l.Index, err)
		}
		kinds[l.Index] = d.Kind
	}
	for _, r := range requests {
		c := client.Covered{Intent: r.Intent, Kind: kinds[r.IssuedIndex], Orchestrator: r.Orchestrator, Run: r.Run, Step: r.Step,
			Request: r.ID, Scope: r.Scope, Expires: r.Expires.Time}
		if !r.Revocable {
			v.IrrevocableCredentials = append(v.IrrevocableCredentials, c)
			continue
		}
		c.Why = why[r.Intent]
		v.PendingCredentials = append(v.PendingCredentials, c)
	}
	return nil
}
