package approvals

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	defaultLimit = 50
	maxLimit     = 200
	// maxRefused is how many refused attempts a Request carries, the latest.
	maxRefused = 50
	// maxLatest is how much of what came before is shown.
	maxLatest = 10
	// maxPast bounds what is read of what came before.
	maxPast = 2_000
)

// List returns requests, the newest first, and where the next page begins:
// empty on the last. It reads the record for those that it returns alone.
func (a *Approvals) List(ctx context.Context, f Filter) ([]Request, string, error) {
	before := int64(1<<63 - 1)
	if f.Before != "" {
		n, err := strconv.ParseInt(f.Before, 10, 64)
		if err != nil || n < 0 {
			return nil, "", fmt.Errorf("%w: cursor %.40q is not one of a list's", ErrMalformed, f.Before)
		}
		before = n
	}
	switch {
	case f.Limit == 0:
		f.Limit = defaultLimit
	case f.Limit < 0:
		return nil, "", fmt.Errorf("%w: limit: want 1 to %d", ErrMalformed, maxLimit)
	}
	f.Limit = min(f.Limit, maxLimit)
	selects, err := a.selects(f)
	if err != nil {
		return nil, "", err
	}
	a.mu.Lock()
	known := a.next
	a.mu.Unlock()
	news, err := a.c.Ledger.History(ctx, ledger.Query{Type: string(store.ApprovalRequested), Cursor: cursor(known)})
	if err != nil {
		return nil, "", err
	}
	if n := len(news.Entries); n > 0 {
		a.until(ctx, news.Entries[n-1].Index)
	}
	a.mu.Lock()
	var page []asked
	next := ""
	for i := sort.Search(len(a.asked), func(i int) bool { return a.asked[i].index >= before }) - 1; i >= 0; i-- {
		if !selects(a.state.Request(a.asked[i].request)) {
			continue
		}
		if len(page) == f.Limit {
			next = cursor(page[len(page)-1].index)
			break
		}
		page = append(page, a.asked[i])
	}
	a.mu.Unlock()
	list := make([]Request, 0, len(page))
	for _, x := range page {
		r, err := a.view(ctx, x.request)
		if err != nil {
			return nil, "", err
		}
		list = append(list, *r)
	}
	return list, next, nil
}

// selects says which requests f is about: nil is one that is closed and
// forgotten.
func (a *Approvals) selects(f Filter) (func(*store.Request) bool, error) {
	waits := func(r *store.Request) bool { return r != nil && r.Status == store.StatusPending }
	switch f.State {
	case "", StatePending:
		return waits, nil
	case StateDecided:
		return func(r *store.Request) bool { return !waits(r) }, nil
	case StateAll:
		return func(*store.Request) bool { return true }, nil
	case StateMine:
		if f.Person == nil {
			return nil, fmt.Errorf("%w: state mine wants a person", ErrMalformed)
		}
		person, groups, now := a.pseudonym(*f.Person), f.Person.Groups, store.At(a.c.Now())
		return func(r *store.Request) bool {
			if !waits(r) || slices.Contains(a.c.Owners[r.Orchestrator], f.Person.Name) {
				return false
			}
			err := r.May(store.Approve, person, groups, true, true, now)
			_, later := store.IsOrder(err, store.OrderHours) // theirs, at another hour
			return err == nil || later
		}, nil
	}
	return nil, fmt.Errorf("%w: state: want pending, mine, decided or all", ErrMalformed)
}

// Get returns the request with the given approval ID, or ErrNotFound.
func (a *Approvals) Get(ctx context.Context, id string) (*Request, error) {
	request, err := a.find(ctx, id)
	if err != nil {
		return nil, err
	}
	return a.view(ctx, request)
}

// find returns the request that an approval ID belongs to. One that is not in
// memory is looked for in the record: among the newest entries, which may not
// have been followed yet, and among those older than lists go back.
func (a *Approvals) find(ctx context.Context, id string) (string, error) {
	if !store.ValidID(id) {
		return "", ErrNotFound
	}
	a.mu.Lock()
	request, next := a.byID[id], a.next
	a.mu.Unlock()
	if request != "" {
		return request, nil
	}
	asked := string(store.ApprovalRequested)
	for _, q := range []ledger.Query{
		{Type: asked, Cursor: cursor(next)},
		{Type: asked, To: a.c.Now().Add(-remembered + tidyEvery), Limit: 10_000},
	} {
		for {
			page, err := a.c.Ledger.History(ctx, q)
			if err != nil {
				return "", err
			}
			for _, h := range page.Entries {
				e, err := store.ParseLeaf(h.Entry)
				if err != nil {
					return "", fmt.Errorf("entry %d: %w", h.Index, err)
				}
				if d, err := store.DetailsAs[store.ApprovalRequestedDetails](e); err == nil && d.Approval == id {
					return e.Request, nil
				}
			}
			if q.Cursor = page.Next; q.Cursor == "" {
				break
			}
		}
	}
	return "", ErrNotFound
}

// view reads one request from the record, as it stands now: its entries, played
// through the order of the record.
func (a *Approvals) view(ctx context.Context, request string) (*Request, error) {
	v := viewing{key: a.c.PrivacyKey, state: store.NewReplay(), request: request}
	q := ledger.Query{Request: request}
	for {
		page, err := a.c.Ledger.History(ctx, q)
		if err != nil {
			return nil, err
		}
		for _, h := range page.Entries {
			if err := v.entry(h); err != nil {
				return nil, fmt.Errorf("entry %d: %w", h.Index, err)
			}
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			break
		}
	}
	if v.out.ID == "" {
		return nil, ErrNotFound
	}
	v.out.URL = a.c.BaseURL + "/approvals/" + v.out.ID
	return v.finish(), nil
}

// Erased stands in place of a text whose time is over. Names are then shown by
// pseudonym.
const Erased = "(erased)"

// reason is the one sealed with e.
func reason(e *store.Entry, h ledger.HistoryEntry) string {
	text, ok := h.Opened[store.SealedReason]
	if !ok && e.Sealed[store.SealedReason] != "" {
		return Erased
	}
	return text
}

// viewing makes a Request of its entries.
type viewing struct {
	key     store.PrivacyKey
	request string
	state   *store.State
	last    *store.Request // as it was last known to the state
	out     Request
}

func (v *viewing) entry(h ledger.HistoryEntry) error {
	e, err := store.ParseLeaf(h.Entry)
	if err != nil {
		return err
	}
	b := v.state.Begin()
	if err := b.Admit(e, h.Entry, h.Index, true); err == nil {
		b.Commit()
	}
	if r := v.state.Request(v.request); r != nil {
		v.last = r
		v.out.Status = r.Status
	}
	name := func() string { // of the entry's person, or what stands for it
		if n := h.Opened[store.SealedPerson]; n != "" {
			return n
		}
		if e.Person != nil {
			return *e.Person
		}
		return ""
	}
	switch e.Type {
	case store.ApprovalRequested:
		d, err := store.DetailsAs[store.ApprovalRequestedDetails](e)
		if err != nil {
			return err
		}
		o := &v.out
		o.ID, o.Request, o.Orchestrator, o.Run, o.Step = d.Approval, e.Request, e.Orchestrator, e.Run, e.Step
		o.Scope, o.Target, o.Agent, o.Grant, o.Rule, o.OneCall = e.Action, e.Resource, e.Agent, d.Grant, d.Rule, d.OneCall
		o.Asked, o.Index, o.LeafHash, o.Reason = e.Time.Time, h.Index, store.HashText(store.LeafHash(h.Entry)), reason(e, h)
		if e.Risk != nil {
			o.Sensitivity = e.Risk.Sensitivity
		}
		if e.Decision != nil {
			o.Policy, o.PolicyReasons = e.Decision.Policy, e.Decision.Reasons
		}
		if e.Subject != nil {
			o.Subject, o.SubjectProved = e.Subject.ID, e.Subject.Proved
			if s := h.Opened[store.SealedSubject]; s != "" {
				o.Subject = s
			}
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		d, err := store.DetailsAs[store.DecidedDetails](e)
		if err != nil {
			return err
		}
		v.out.Decisions = append(v.out.Decisions, Decided{
			Person: name(), Groups: d.Groups, Decision: d.Decision, Reason: reason(e, h), Via: d.Via,
			At: e.Time.Time, Signed: d.Assertion != nil, Index: h.Index, Standing: d.Standing,
		})
	case store.AccessRefused:
		if e.Action != actionDecide {
			break
		}
		d, err := store.DetailsAs[store.RefusedDetails](e)
		if err != nil {
			return err
		}
		r := Refused{Person: name(), Problem: d.Problem, At: e.Time.Time, Folded: d.Folded, Index: h.Index}
		if e.Cause != nil {
			r.Detail = *e.Cause
		}
		if v.out.Refused = append(v.out.Refused, r); len(v.out.Refused) > maxRefused {
			v.out.Refused = v.out.Refused[1:]
		}
	case store.RequestWithdrawn:
		v.out.Status = store.StatusWithdrawn
	case store.CredentialRevoked, store.CredentialExpired:
		v.out.Status = store.StatusClosed
	}
	return nil
}

func (v *viewing) finish() *Request {
	o := &v.out
	o.state = v.state.Request(v.request)
	var votes []store.Vote
	o.Expires = o.Asked.Add(time.Duration(o.Rule.Expires))
	if v.last != nil && v.last.Pending != nil {
		votes, o.Expires = v.last.Pending.Votes, v.last.Pending.Expires.Time
	}
	filled, _ := o.Rule.Tally(votes)
	o.Needs = make([]Need, len(o.Rule.Groups))
	for i, g := range o.Rule.Groups {
		o.Needs[i] = Need{Group: g.Group, Count: g.Count, Approved: filled[i]}
	}
	o.PolicyReasons = append([]string{}, o.PolicyReasons...)
	o.Decisions, o.Refused = append([]Decided{}, o.Decisions...), append([]Refused{}, o.Refused...)
	return o
}

// Before returns what the request's run and its orchestrator did before it.
func (a *Approvals) Before(ctx context.Context, r *Request) (*Context, error) {
	run, err1 := a.past(ctx, r, ledger.Query{Orchestrator: r.Orchestrator, Run: r.Run})
	var err2 error
	whole := Past{Latest: []Happened{}}
	for _, t := range []store.Type{store.ApprovalRequested, store.ApprovalDecided, store.ApprovalStanding} {
		p, err := a.past(ctx, r, ledger.Query{Orchestrator: r.Orchestrator, Type: string(t), From: r.Asked.Add(-remembered)})
		if err != nil {
			err2 = err
			break
		}
		whole.add(p)
	}
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	return &Context{Run: *run, Orchestrator: whole}, nil
}

// past counts the newest entries of q before r was asked.
func (a *Approvals) past(ctx context.Context, r *Request, q ledger.Query) (*Past, error) {
	p := &Past{Latest: []Happened{}}
	q.To, q.Newest, q.Limit = r.Asked.Add(time.Microsecond), true, maxPast
	page, err := a.c.Ledger.History(ctx, q)
	if err != nil {
		return nil, err
	}
	p.More = len(page.Entries) == maxPast
	for _, h := range page.Entries {
		e, err := store.ParseLeaf(h.Entry)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", h.Index, err)
		}
		if e.Request != r.Request {
			p.count(e, h.Index)
		}
	}
	return p, nil
}

func (p *Past) count(e *store.Entry, index int64) {
	h := Happened{At: e.Time.Time, Type: e.Type, Step: e.Step, Scope: e.Action, Request: e.Request, Index: index}
	if e.Decision != nil {
		h.Outcome = string(e.Decision.Outcome)
	}
	denied := e.Decision != nil && e.Decision.Outcome == store.Deny
	switch e.Type {
	case store.StepRequested, store.ApprovalRequested:
		if e.Type == store.ApprovalRequested && e.Step != "" && len(p.Latest) > 0 && p.Latest[len(p.Latest)-1].Request == e.Request {
			break // counted with its step.requested
		}
		p.Requested++
		if denied {
			p.Denied++
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		if denied {
			p.Denied++
		} else {
			p.Approved++
		}
	case store.CredentialIssued:
		p.Issued++
	case store.AccessRefused:
		p.Refused++
	default:
		return
	}
	if p.Latest = append(p.Latest, h); len(p.Latest) > maxLatest {
		p.Latest = p.Latest[1:]
	}
}

func (p *Past) add(o *Past) {
	p.Requested, p.Approved, p.Denied = p.Requested+o.Requested, p.Approved+o.Approved, p.Denied+o.Denied
	p.Issued, p.Refused, p.More = p.Issued+o.Issued, p.Refused+o.Refused, p.More || o.More
	p.Latest = append(p.Latest, o.Latest...)
	slices.SortFunc(p.Latest, func(x, y Happened) int { return int(x.Index - y.Index) })
	if n := len(p.Latest); n > maxLatest {
		p.Latest = p.Latest[n-maxLatest:]
	}
}
