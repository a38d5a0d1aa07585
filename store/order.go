package store

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Limits of the order in which entries may follow each other.
const (
	RetryWindow = 2 * time.Minute // how long after credential.issued a keyed retry may mint anew
	KeyLife     = 24 * time.Hour  // how long an idempotency key is remembered after its request closed
	MaxAttempts = 2
)

// Status of an open request, as GET /requests/{id} reports it.
type Status string

// The statuses a request can have. Held in State are pending, approved and
// issued requests, and closed ones that are remembered: for their idempotency
// key, for what the next caller is to be told, for a standing approval.
const (
	StatusPending   Status = "pending_approval"
	StatusApproved  Status = "approved" // an intent may be, or is being, written
	StatusDenied    Status = "denied"
	StatusExpired   Status = "expired"
	StatusVoid      Status = "void"
	StatusWithdrawn Status = "withdrawn"
	StatusIssued    Status = "issued"
	StatusFailed    Status = "failed"
	StatusClosed    Status = "closed"
)

// Request is what the record says of one request that is still open, holds a
// live credential, or whose idempotency key is remembered. It is JSON, since
// the recorder keeps one row per request beside the log.
type Request struct {
	ID           string   `json:"id"`
	Join         string   `json:"join"`
	Body         string   `json:"body"`
	Keyed        bool     `json:"keyed"`
	Orchestrator string   `json:"orchestrator"`
	Run          string   `json:"run"`
	Step         string   `json:"step"`
	Scope        string   `json:"scope"`
	Grant        string   `json:"grant"` // digest
	TTL          Duration `json:"ttl"`
	Revocable    bool     `json:"revocable"`
	Status       Status   `json:"status"`
	Attempt      int      `json:"attempt"`      // of the latest intent
	Requested    int64    `json:"requested"`    // index of step.requested
	Intent       string   `json:"intent"`       // entry ID of the intent without an outcome, or of the live credential
	IntentIndex  int64    `json:"intent_index"` //
	IntentTime   Time     `json:"intent_time"`
	IntentWriter string   `json:"intent_writer"`
	Minting      bool     `json:"minting"` // the intent has no outcome yet
	NotPast      Time     `json:"not_past"`
	Live         bool     `json:"live"`         // a credential is out
	IssuedIndex  int64    `json:"issued_index"` // index of the latest credential.issued
	IssuedAt     Time     `json:"issued_at"`    // recorder's time of the first credential.issued
	Expires      Time     `json:"expires"`
	Forget       Time     `json:"forget"` // when a closed request is forgotten whose join is still held

	// Pending is what people were asked, nil where they were not.
	Pending *Pending `json:"pending,omitzero"`
	// Standing is the request whose standing approval this one draws on.
	Standing string `json:"standing,omitzero"`
}

// Pending is what the record says of a request that people decide.
type Pending struct {
	Approval  string   `json:"approval"`
	Index     int64    `json:"index"`     // of approval.requested
	Requested string   `json:"requested"` // its leaf hash, base64
	Rule      Rule     `json:"rule"`
	Excluded  []string `json:"excluded"` // pseudonyms of the requester's side, the subject among them
	Expires   Time     `json:"expires"`  // when it stops waiting: for people, or, once approved, to be collected
	Votes     []Vote   `json:"votes"`
	Used      int      `json:"used"` // how often requests of the run drew on it
}

// Terms returns what p's approvals allow for the whole run in scope at now, and
// the votes that allow it: nil where they do not, or not any more.
func (p *Pending) Terms(scope string, now Time) (terms *StandingTerms, votes []Vote) {
	for _, v := range p.Votes {
		if v.Standing == nil || !slices.Contains(v.Standing.Scopes, scope) || now.After(v.Standing.Until.Time) || p.Used >= v.Standing.Uses {
			continue
		}
		votes = append(votes, v)
		if terms == nil || v.Standing.Uses < terms.Uses {
			terms = v.Standing
		}
	}
	if _, met := p.Rule.Tally(votes); !met {
		return nil, nil
	}
	return terms, votes
}

// Open reports whether r is still under way or has a live credential: what a
// writer may read.
func (r *Request) Open() bool {
	return r.Minting || r.Live || r.Status == StatusApproved || r.Status == StatusPending || r.Stands()
}

// Stands reports whether requests of the same run may still draw on r's
// approval, as far as the time does not forbid it.
func (r *Request) Stands() bool {
	return r.Pending != nil && slices.ContainsFunc(r.Pending.Votes, func(v Vote) bool { return v.Standing != nil && r.Pending.Used < v.Standing.Uses }) &&
		(r.Status == StatusApproved || r.Status == StatusIssued)
}

// refused reports whether r came to an end that the next caller is told of.
func (r *Request) refused() bool {
	return r.Status == StatusDenied || r.Status == StatusExpired || r.Status == StatusVoid
}

// OrderCode says which rule of order an append would have broken.
type OrderCode string

// The rules of order.
const (
	OrderForbidden OrderCode = "type-forbidden" // this type is not a writer's to append
	OrderJoined    OrderCode = "joined"         // another request holds the same join
	OrderReused    OrderCode = "request-reused" // the request ID was used before
	OrderNotOpen   OrderCode = "not-open"       // the request is unknown, closed or denied
	OrderIntent    OrderCode = "intent-open"    // an intent without an outcome stands
	OrderAttempt   OrderCode = "attempt"        // not the next attempt, or a retry out of its window
	OrderOutcome   OrderCode = "outcome"        // the intent has an outcome, or is another's
	OrderNotLive   OrderCode = "not-live"       // the credential is closed or was never issued
	OrderMismatch  OrderCode = "mismatch"       // the entry contradicts the request it names
	OrderClock     OrderCode = "clock"          // the writer's clock and the recorder's are too far apart
	OrderWeak      OrderCode = "rule-weaker"    // the catalogue of the recorder asks for more people than the entry
	OrderSelf      OrderCode = "self-approval"  // the person is on the requester's side
	OrderApprover  OrderCode = "not-approver"   // the person is in no group of the rule
	OrderDecided   OrderCode = "decided"        // the person has approved already
	OrderHours     OrderCode = "hours"          // outside the hours of the rule
	OrderPasskey   OrderCode = "passkey-due"    // the rule wants a passkey's signature
	OrderReason    OrderCode = "reason-due"     // the rule wants a reason
	OrderFrozen    OrderCode = "frozen"         // a freeze in force covers it
	OrderNotFrozen OrderCode = "not-frozen"     // the freeze is unknown or was lifted
	OrderLifter    OrderCode = "lifter"         // who set a freeze does not lift it
)

// OrderError refuses an append that would break the order of the record.
type OrderError struct {
	Code    OrderCode `json:"code"`
	Message string    `json:"message"`
	// Request is the state of the request that stands in the way, where one
	// does: for OrderJoined, the request to join.
	Request *Request `json:"request,omitzero"`
}

func (e *OrderError) Error() string { return "order: " + string(e.Code) + ": " + e.Message }

// IsOrder reports whether err is an OrderError with one of codes (any code
// when none is given), and returns it.
func IsOrder(err error, codes ...OrderCode) (*OrderError, bool) {
	var oe *OrderError
	if !errors.As(err, &oe) {
		return nil, false
	}
	return oe, len(codes) == 0 || slices.Contains(codes, oe.Code)
}

// State is what the record says is open. The recorder admits entries against
// it, a broker rebuilds its own from /open, and the verifier replays a whole
// log through it. It is not safe for concurrent use.
type State struct {
	// Grace is how old another writer's intent must be before anyone may
	// close it as abandoned. Zero means 60 s.
	Grace time.Duration

	requests map[string]*Request
	joins    map[string]string // join to request ID
	freezes  map[string]*Freeze
	lifted   []Freeze
}

// NewState returns a State in which nothing is open.
func NewState() *State {
	return &State{requests: map[string]*Request{}, joins: map[string]string{}, freezes: map[string]*Freeze{}}
}

// NewReplay returns a State for entries that are on record already: it takes any
// grace for abandoned intents, since how long a recorder waits is its
// configuration and not on record.
func NewReplay() *State {
	s := NewState()
	s.Grace = 1
	return s
}

// Load adds a request as the recorder stored it.
func (s *State) Load(r *Request) {
	s.requests[r.ID] = r
	// One that is closed and remembered gives way to one that is open.
	if held := s.requests[s.joins[r.Join]]; r.Join != "" && (held == nil || r.Forget.IsZero()) {
		s.joins[r.Join] = r.ID
	}
}

// Request returns the request with id, or nil. The caller must not change it.
func (s *State) Request(id string) *Request { return s.requests[id] }

// Joined returns the request that holds join, or nil.
func (s *State) Joined(join string) *Request { return s.requests[s.joins[join]] }

// Requests returns all requests held, in the order of their step.requested.
func (s *State) Requests() []*Request {
	return slices.SortedFunc(maps.Values(s.requests), func(a, b *Request) int {
		return int(a.Requested - b.Requested)
	})
}

// Batch is a set of appends that is taken whole or not at all.
type Batch struct {
	s       *State
	touched map[string]*Request // nil: forgotten
	joins   map[string]string   // empty: freed
	freezes map[string]*Freeze  // nil: lifted
	lifted  []Freeze
}

// Begin starts a batch against s. Nothing in s changes before Commit.
func (s *State) Begin() *Batch {
	return &Batch{s: s, touched: map[string]*Request{}, joins: map[string]string{}}
}

// Commit makes the batch's changes those of the State and returns them: for
// each request touched its new state, nil where it is forgotten.
func (b *Batch) Commit() map[string]*Request {
	for id, r := range b.touched {
		if r == nil {
			delete(b.s.requests, id)
		} else {
			b.s.requests[id] = r
		}
	}
	for j, id := range b.joins {
		if id == "" {
			delete(b.s.joins, j)
		} else {
			b.s.joins[j] = id
		}
	}
	b.commitFreezes()
	return b.touched
}

// get returns a copy of the request that the batch may change.
func (b *Batch) get(id string) *Request {
	if r, ok := b.touched[id]; ok {
		return r
	}
	r := b.s.requests[id]
	if r == nil {
		return nil
	}
	c := *r
	b.touched[id] = &c
	return &c
}

func (b *Batch) joined(join string, now Time) *Request {
	id, ok := b.joins[join]
	if !ok {
		id = b.s.joins[join]
	}
	if id == "" {
		return nil
	}
	r := b.get(id)
	if r != nil && !r.Forget.IsZero() && now.After(r.Forget.Time) {
		b.forget(r)
		return nil
	}
	return r
}

func (b *Batch) forget(r *Request) {
	b.touched[r.ID] = nil
	holder, ok := b.joins[r.Join]
	if !ok {
		holder = b.s.joins[r.Join]
	}
	if r.Join != "" && holder == r.ID {
		b.joins[r.Join] = ""
	}
}

// Forget drops closed requests whose idempotency key is due to be forgotten
// at now. The recorder calls it from time to time.
func (b *Batch) Forget(now Time) {
	for _, r := range b.s.requests {
		if !r.Forget.IsZero() && now.After(r.Forget.Time) {
			b.forget(r)
		}
	}
}

// Admit checks e, appended by e.Writer at e.Time to be entry index, against
// the order of the record and takes it into the batch. byRecorder says that
// the recorder itself writes it. The error is an *OrderError, or wraps
// ErrMalformed where the details do not decode; after an error the batch is
// of no use.
//
// leaf is e's stored bytes.
func (b *Batch) Admit(e *Entry, leaf []byte, index int64, byRecorder bool) error {
	if !byRecorder && e.Type.Known() && !e.Type.Writable() {
		return &OrderError{Code: OrderForbidden, Message: fmt.Sprintf("no writer may append %s", e.Type)}
	}
	switch e.Type {
	case StepRequested:
		return b.requested(e, index)
	case ApprovalRequested:
		return b.asked(e, leaf, index)
	case ApprovalDecided, ApprovalStanding:
		return b.decided(e, index)
	case ApprovalExpired:
		return b.expired(e)
	case RequestWithdrawn, RequestVoid:
		return b.closeRequest(e)
	case CredentialIssuing:
		return b.issuing(e, index)
	case CredentialIssued:
		return b.issued(e, index)
	case CredentialFailed, CredentialAbandoned:
		return b.failed(e)
	case CredentialRevoked, CredentialExpired:
		return b.ended(e)
	case CredentialUsed:
		if !byRecorder {
			return b.used(e)
		}
	case FreezeSet:
		return b.setFreeze(e, index)
	case FreezeLifted:
		return b.liftFreeze(e, index)
	}
	return nil
}

func (b *Batch) requested(e *Entry, index int64) error {
	d, err := DetailsAs[RequestedDetails](e)
	if err != nil {
		return err
	}
	if e.Request == "" || e.Orchestrator == "" || e.Run == "" || e.Step == "" || e.Decision == nil || e.Risk == nil || e.Action != d.Grant.Scope {
		return fmt.Errorf("%w: step.requested must name request, orchestrator, run, step, scope, risk and decision", ErrMalformed)
	}
	if r := b.get(e.Request); r != nil {
		return &OrderError{Code: OrderReused, Message: "request " + e.Request + " is on record already", Request: r}
	}
	switch e.Decision.Outcome {
	case Allow, NeedsApproval:
	default:
		return nil // a denial opens nothing
	}
	if err := b.refuseFrozen(e, nil); err != nil {
		return err
	}
	if d.Join == "" || d.Grant.TTL <= 0 || d.Standing != nil && e.Decision.Outcome != NeedsApproval {
		return fmt.Errorf("%w: step.requested without join or ttl, or with an approval that nobody asked for", ErrMalformed)
	}
	if r := b.joined(d.Join, e.Time); r != nil {
		if !r.refused() || d.After != r.ID {
			return &OrderError{Code: OrderJoined, Message: "request " + r.ID + " is the same request", Request: r}
		}
		b.forget(r)
	}
	r := &Request{
		ID: e.Request, Join: d.Join, Body: d.Body, Keyed: d.Keyed,
		Orchestrator: e.Orchestrator, Run: e.Run, Step: e.Step, Scope: e.Action,
		Grant: d.Grant.Digest(), TTL: d.Grant.TTL, Revocable: d.Grant.Revocable,
		Status: StatusApproved, Requested: index,
	}
	if e.Decision.Outcome == NeedsApproval {
		r.Status = StatusPending
		if d.Standing != nil {
			if err := b.draw(e, r, d.Standing); err != nil {
				return err
			}
		}
	}
	b.touched[e.Request] = r
	b.joins[d.Join] = e.Request
	return nil
}

// draw takes one use of a standing approval for r.
func (b *Batch) draw(e *Entry, r *Request, use *StandingUse) error {
	from := b.get(use.Request)
	refuse := func(m string) error { return &OrderError{Code: OrderNotOpen, Message: m, Request: from} }
	if err := use.Rule.Valid(); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if from == nil || from.Pending == nil || !from.Stands() {
		return refuse("request " + use.Request + " carries no standing approval")
	}
	terms, votes := from.Pending.Terms(r.Scope, e.Time)
	switch {
	case from.Orchestrator != r.Orchestrator || from.Run != r.Run:
		return refuse("the standing approval is of another run")
	case terms == nil:
		return refuse("the standing approval does not cover " + r.Scope + ", is used up or over")
	case use.Rule.Passkey && !from.Pending.Rule.Passkey:
		return refuse("the standing approval was not signed with a passkey")
	}
	if use.Rule.Standing == nil || use.Rule.Reasons.Approver && !from.Pending.Rule.Reasons.Approver {
		return refuse("the rule takes no standing approval such as this")
	}
	for _, v := range votes {
		if l := use.Rule.Standing; v.Standing.Uses > l.Uses || v.Standing.Until.After(v.Time.Add(time.Duration(l.For))) {
			return refuse("the standing approval goes further than the rule allows")
		}
		if use.Rule.Hours != nil && !use.Rule.Hours.Contains(v.Time.Time) {
			return refuse("the standing approval was given outside " + use.Rule.Hours.String())
		}
		if slices.Contains(use.Excluded, v.Person) || e.Subject != nil && e.Subject.ID == v.Person {
			return refuse("the standing approval is by a person on the requester's side")
		}
	}
	if _, met := use.Rule.Tally(votes); !met {
		return refuse("the standing approval does not meet the rule")
	}
	from.Pending = from.Pending.clone()
	from.Pending.Used++
	r.Status, r.Standing = StatusApproved, from.ID
	return nil
}

// clone copies what a batch may change: requests in State share nothing with
// those in a batch.
func (p *Pending) clone() *Pending {
	c := *p
	c.Votes = slices.Clone(p.Votes)
	return &c
}

// Complete is asked after the last entry of an append: a request that waits for
// people must say in the same append what they are asked.
func (b *Batch) Complete() error {
	for _, r := range b.touched {
		if r != nil && r.Status == StatusPending && r.Pending == nil {
			return &OrderError{Code: OrderMismatch, Message: "request " + r.ID + " needs approval, and approval.requested is not in the same append", Request: r}
		}
	}
	return nil
}

// asked takes approval.requested.
func (b *Batch) asked(e *Entry, leaf []byte, index int64) error {
	d, err := DetailsAs[ApprovalRequestedDetails](e)
	if err != nil {
		return err
	}
	if err := d.Rule.Valid(); err != nil {
		return fmt.Errorf("%w: approval.requested: %w", ErrMalformed, err)
	}
	if !ValidID(d.Approval) {
		return fmt.Errorf("%w: approval.requested: %.140q is not a valid ID", ErrMalformed, d.Approval)
	}
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if err := b.refuseFrozen(e, r); err != nil {
		return err
	}
	switch {
	case r.Status != StatusPending || r.Pending != nil:
		return &OrderError{Code: OrderNotOpen, Message: "request " + r.ID + " waits for nobody", Request: r}
	case d.Grant.Digest() != r.Grant:
		return &OrderError{Code: OrderMismatch, Message: "people are asked for something other than what was requested", Request: r}
	case d.Rule.Reasons.Requester && e.Sealed[SealedReason] == "":
		return &OrderError{Code: OrderReason, Message: "the rule wants the requester's reason", Request: r}
	}
	r.Pending = &Pending{
		Approval: d.Approval, Index: index, Requested: HashText(LeafHash(leaf)), Rule: d.Rule,
		Excluded: append([]string{}, d.Excluded...), Expires: At(e.Time.Add(time.Duration(d.Rule.Expires))), Votes: []Vote{},
	}
	if e.Subject != nil {
		r.Pending.Excluded = append(r.Pending.Excluded, e.Subject.ID)
	}
	return nil
}

// May says whether person, in groups, may decide r at now. reason and passkey
// say that a reason and a passkey's signature are given. The error is an
// *OrderError.
func (r *Request) May(decision, person string, groups []string, reason, passkey bool, now Time) error {
	refuse := func(c OrderCode, m string) error { return &OrderError{Code: c, Message: m, Request: r} }
	p := r.Pending
	switch {
	case p == nil || r.Status != StatusPending:
		return refuse(OrderNotOpen, "request "+r.ID+" is "+string(r.Status))
	case !now.Before(p.Expires.Time):
		return refuse(OrderNotOpen, "request "+r.ID+" has expired")
	case slices.Contains(p.Excluded, person):
		return refuse(OrderSelf, "the person is on the requester's side")
	case !p.Rule.Has(groups):
		return refuse(OrderApprover, "the person is in no group that may decide")
	case p.Rule.Reasons.Approver && !reason:
		return refuse(OrderReason, "the rule wants a reason")
	case decision == Refuse:
		return nil // at any hour, signed or not
	case slices.ContainsFunc(p.Votes, func(v Vote) bool { return v.Person == person }):
		return refuse(OrderDecided, "the person has approved already")
	case len(p.Votes) >= maxVotes:
		return refuse(OrderDecided, "as many people have approved as a warrant holds")
	case p.Rule.Hours != nil && !p.Rule.Hours.Contains(now.Time):
		return refuse(OrderHours, "approvals are taken "+p.Rule.Hours.String())
	case p.Rule.Passkey && !passkey:
		return refuse(OrderPasskey, "the rule wants a passkey's signature")
	}
	return nil
}

// decided takes a person's decision.
func (b *Batch) decided(e *Entry, index int64) error {
	d, err := DetailsAs[DecidedDetails](e)
	if err != nil {
		return err
	}
	if e.Person == nil || *e.Person == "" || d.Decision != Approve && d.Decision != Refuse || (e.Type == ApprovalStanding) != (d.Standing != nil) ||
		d.Standing != nil && d.Decision != Approve {
		return fmt.Errorf("%w: %s must name a person and a decision", ErrMalformed, e.Type)
	}
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if err := r.May(d.Decision, *e.Person, d.Groups, e.Sealed[SealedReason] != "", d.Assertion != nil, e.Time); err != nil {
		return err
	}
	if d.Approval != r.Pending.Approval || d.Requested != r.Pending.Requested {
		return &OrderError{Code: OrderMismatch, Message: "the decision is on something other than what was asked", Request: r}
	}
	if s := d.Standing; s != nil {
		l := r.Pending.Rule.Standing
		if l == nil || s.Uses < 1 || s.Uses > l.Uses || len(s.Scopes) == 0 || s.Until.After(e.Time.Add(time.Duration(l.For))) {
			return &OrderError{Code: OrderMismatch, Message: "the rule does not allow such a standing approval", Request: r}
		}
	}
	if d.Decision == Refuse {
		b.hold(r, StatusDenied, e.Time)
		return nil
	}
	r.Pending = r.Pending.clone()
	r.Pending.Votes = append(r.Pending.Votes, Vote{Person: *e.Person, Groups: d.Groups, Time: e.Time, Index: index, Standing: d.Standing})
	if _, met := r.Pending.Rule.Tally(r.Pending.Votes); met {
		r.Status, r.Pending.Expires = StatusApproved, At(e.Time.Add(time.Duration(r.Pending.Rule.Collect)))
	}
	return nil
}

// expired takes approval.expired.
func (b *Batch) expired(e *Entry) error {
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if r.Pending == nil || r.Minting || r.Status != StatusPending && r.Status != StatusApproved || e.Time.Before(r.Pending.Expires.Time) {
		return &OrderError{Code: OrderNotOpen, Message: "request " + r.ID + " does not expire now", Request: r}
	}
	b.hold(r, StatusExpired, e.Time)
	return nil
}

// hold closes r, and keeps its join until the next caller was told why, or a
// day has passed.
func (b *Batch) hold(r *Request, s Status, now Time) {
	r.Status, r.Forget = s, At(now.Add(KeyLife))
}

// of returns the request that e names, when e does not contradict it.
func (b *Batch) of(e *Entry) (*Request, error) {
	r := b.get(e.Request)
	if r == nil {
		return nil, &OrderError{Code: OrderNotOpen, Message: "request " + e.Request + " is not open"}
	}
	if e.Orchestrator != r.Orchestrator || e.Run != r.Run || e.Step != r.Step || e.Action != r.Scope {
		return nil, &OrderError{Code: OrderMismatch, Message: string(e.Type) + " names another orchestrator, run, step or scope than its request", Request: r}
	}
	return r, nil
}

func (b *Batch) closeRequest(e *Entry) error {
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if r.Minting || r.Status != StatusApproved && r.Status != StatusPending {
		return &OrderError{Code: OrderNotOpen, Message: "request " + r.ID + " is past the point where it can be taken back", Request: r}
	}
	if e.Type == RequestVoid {
		b.hold(r, StatusVoid, e.Time)
		return nil
	}
	r.Status = StatusWithdrawn
	b.forget(r)
	return nil
}

func (b *Batch) issuing(e *Entry, index int64) error {
	d, err := DetailsAs[IssuingDetails](e)
	if err != nil {
		return err
	}
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if err := b.refuseFrozen(e, r); err != nil {
		return err
	}
	fail := func(c OrderCode, m string) error { return &OrderError{Code: c, Message: m, Request: r} }
	switch {
	case r.Minting:
		return fail(OrderIntent, "an intent of request "+r.ID+" has no outcome yet")
	case d.Grant != r.Grant:
		return fail(OrderMismatch, "the intent grants something other than what was requested")
	case d.Attempt != r.Attempt+1:
		return fail(OrderAttempt, fmt.Sprintf("attempt %d does not follow attempt %d", d.Attempt, r.Attempt))
	case d.NotPast.IsZero():
		return fail(OrderMismatch, "the intent has no end")
	case d.NotPast.After(e.Time.Add(time.Duration(r.TTL) + time.Minute)):
		return fail(OrderClock, fmt.Sprintf("the intent ends %s later than what was requested: compare the clocks of recorder and broker", d.NotPast.Sub(e.Time.Add(time.Duration(r.TTL))).Round(time.Second)))
	case r.Attempt == 0 && r.Status != StatusApproved:
		return fail(OrderNotOpen, "request "+r.ID+" is "+string(r.Status))
	case r.Attempt == 0 && r.Pending != nil && !e.Time.Before(r.Pending.Expires.Time):
		return fail(OrderNotOpen, "the approval of request "+r.ID+" was not collected in time")
	case d.Approval != r.approval():
		return fail(OrderMismatch, "the intent does not point at the approval that it rests on")
	case r.Attempt > 0 && (r.Status != StatusIssued || !r.Keyed || !r.Revocable || r.Live || r.Attempt >= MaxAttempts):
		return fail(OrderAttempt, "request "+r.ID+" may not be minted again")
	case r.Attempt > 0 && e.Time.Sub(r.IssuedAt.Time) > RetryWindow:
		return fail(OrderAttempt, "the time for a retry is over")
	case r.Attempt > 0 && d.NotPast.After(r.NotPast.Time):
		return fail(OrderMismatch, "a retry ends no later than what it replaces")
	}
	r.Attempt, r.Minting, r.Forget = d.Attempt, true, Time{}
	r.Intent, r.IntentIndex, r.IntentTime, r.IntentWriter, r.NotPast = e.ID, index, e.Time, e.Writer, d.NotPast
	return nil
}

// approval is the request whose decisions r rests on, empty where nobody had to
// approve.
func (r *Request) approval() string {
	if r.Pending != nil {
		return r.ID
	}
	return r.Standing
}

// outcome returns the request whose open intent e closes.
func (b *Batch) outcome(e *Entry, intent string, attempt int) (*Request, error) {
	r, err := b.of(e)
	if err != nil {
		return nil, err
	}
	if !r.Minting || r.Intent != intent || r.Attempt != attempt {
		return nil, &OrderError{Code: OrderOutcome, Message: "intent " + intent + " is not open", Request: r}
	}
	return r, nil
}

func (b *Batch) issued(e *Entry, index int64) error {
	d, err := DetailsAs[IssuedDetails](e)
	if err != nil {
		return err
	}
	r, err := b.outcome(e, d.Intent, d.Attempt)
	if err != nil {
		return err
	}
	switch {
	case e.Writer != r.IntentWriter:
		return &OrderError{Code: OrderOutcome, Message: "the intent is another writer's", Request: r}
	case d.Expires.IsZero() || d.Expires.After(r.NotPast.Time):
		return &OrderError{Code: OrderMismatch, Message: "the credential outlives what the intent allowed", Request: r}
	case d.Revocable && d.Accessor == "" && d.LeaseID == "":
		return fmt.Errorf("%w: a revocable credential without accessor or lease", ErrMalformed)
	}
	r.Minting, r.Live, r.Status, r.Expires, r.IssuedIndex, r.Revocable = false, true, StatusIssued, d.Expires, index, d.Revocable
	if r.IssuedAt.IsZero() {
		r.IssuedAt = e.Time
	}
	b.release(r)
	return nil
}

// release frees the join of a request that was collected, so that the next
// same POST opens a new one. A key stays taken.
func (b *Batch) release(r *Request) {
	if r.Keyed {
		r.Forget = Time{}
		return
	}
	if r.Join != "" {
		b.joins[r.Join] = ""
		r.Join = ""
	}
}

func (b *Batch) failed(e *Entry) error {
	d, err := DetailsAs[ClosedDetails](e)
	if err != nil {
		return err
	}
	r, err := b.outcome(e, d.Intent, d.Attempt)
	if err != nil {
		return err
	}
	grace := b.s.Grace
	if grace == 0 {
		grace = time.Minute
	}
	if e.Writer != r.IntentWriter {
		if e.Type == CredentialFailed {
			return &OrderError{Code: OrderOutcome, Message: "the intent is another writer's", Request: r}
		}
		if e.Time.Sub(r.IntentTime.Time) < grace {
			return &OrderError{Code: OrderOutcome, Message: "another writer's intent is younger than the grace", Request: r}
		}
	}
	r.Minting = false
	// What cannot be called back may be out where nobody heard the outcome: it is
	// minted once, and people are asked again.
	if r.Attempt == 1 && r.Pending != nil && (r.Revocable || e.Type == CredentialFailed) {
		r.Attempt = 0 // what people approved may be tried again, as long as it may be collected
		return nil
	}
	if r.Attempt == 1 {
		if from := b.get(r.Standing); from != nil && from.Pending != nil && from.Pending.Used > 0 {
			from.Pending = from.Pending.clone()
			from.Pending.Used-- // nothing came of it
		}
		// Nothing was handed out, so the same request may be made anew, also
		// under the same key.
		r.Status = StatusFailed
		b.forget(r)
		return nil
	}
	b.closed(r, e.Time)
	return nil
}

func (b *Batch) ended(e *Entry) error {
	d, err := DetailsAs[ClosedDetails](e)
	if err != nil {
		return err
	}
	r, err := b.of(e)
	if err != nil {
		return err
	}
	if !r.Live || r.Intent != d.Intent || r.Attempt != d.Attempt {
		return &OrderError{Code: OrderNotLive, Message: "the credential of intent " + d.Intent + " is not live", Request: r}
	}
	r.Live = false
	b.closed(r, e.Time)
	return nil
}

// used refuses a use on the access path once its credential has ended, whatever
// the gateway knows of it: what is not on record is not forwarded. Uses seen
// elsewhere are taken at any time, since those have happened.
func (b *Batch) used(e *Entry) error {
	d, err := DetailsAs[UsedDetails](e)
	if err != nil || d.Via != ViaGateway {
		return err
	}
	r, ok := b.touched[e.Request]
	if !ok {
		r = b.s.requests[e.Request]
	}
	if r == nil || !r.Live || r.Intent != d.Intent || !e.Time.Before(r.Expires.Time) {
		return &OrderError{Code: OrderNotLive, Message: "the credential of intent " + d.Intent + " is not live", Request: r}
	}
	return nil
}

// closed drops a request that nothing hangs on any more, or, where it has an
// idempotency key, marks when it will be forgotten.
func (b *Batch) closed(r *Request, now Time) {
	stands := Time{}
	if r.Pending != nil {
		for _, v := range r.Pending.Votes {
			if v.Standing != nil && v.Standing.Until.After(stands.Time) {
				stands = v.Standing.Until
			}
		}
	}
	switch {
	case r.Keyed:
		r.Forget = At(now.Add(KeyLife))
	case stands.After(now.Time):
		r.Forget = stands
	default:
		b.forget(r)
		return
	}
	if stands.After(r.Forget.Time) {
		r.Forget = stands
	}
}
