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

// The statuses a request can have. Only approved, issuing and issued requests
// are held in State, and closed ones whose idempotency key is remembered.
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
	Forget       Time     `json:"forget"` // when a closed, keyed request is forgotten
}

// Open reports whether r is still under way or has a live credential: what a
// writer may read.
func (r *Request) Open() bool { return r.Minting || r.Live || r.Status == StatusApproved }

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
}

// NewState returns a State in which nothing is open.
func NewState() *State {
	return &State{requests: map[string]*Request{}, joins: map[string]string{}}
}

// Load adds a request as the recorder stored it.
func (s *State) Load(r *Request) {
	s.requests[r.ID] = r
	if r.Join != "" {
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
	if r.Join != "" {
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
func (b *Batch) Admit(e *Entry, index int64, byRecorder bool) error {
	if !byRecorder && e.Type.Known() && !e.Type.Writable() {
		return &OrderError{Code: OrderForbidden, Message: fmt.Sprintf("no writer may append %s", e.Type)}
	}
	switch e.Type {
	case StepRequested:
		return b.requested(e, index)
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
	if e.Decision.Outcome != Allow {
		return nil // a denial opens nothing
	}
	if d.Join == "" || d.Grant.TTL <= 0 {
		return fmt.Errorf("%w: step.requested without join or ttl", ErrMalformed)
	}
	if r := b.joined(d.Join, e.Time); r != nil {
		return &OrderError{Code: OrderJoined, Message: "request " + r.ID + " is the same request", Request: r}
	}
	b.touched[e.Request] = &Request{
		ID: e.Request, Join: d.Join, Body: d.Body, Keyed: d.Keyed,
		Orchestrator: e.Orchestrator, Run: e.Run, Step: e.Step, Scope: e.Action,
		Grant: d.Grant.Digest(), TTL: d.Grant.TTL, Revocable: d.Grant.Revocable,
		Status: StatusApproved, Requested: index,
	}
	b.joins[d.Join] = e.Request
	return nil
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
	if r.Minting || r.Status != StatusApproved {
		return &OrderError{Code: OrderNotOpen, Message: "request " + r.ID + " is past the point where it can be taken back", Request: r}
	}
	r.Status = StatusWithdrawn
	if e.Type == RequestVoid {
		r.Status = StatusVoid
	}
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
	fail := func(c OrderCode, m string) error { return &OrderError{Code: c, Message: m, Request: r} }
	switch {
	case r.Minting:
		return fail(OrderIntent, "an intent of request "+r.ID+" has no outcome yet")
	case d.Grant != r.Grant:
		return fail(OrderMismatch, "the intent grants something other than what was requested")
	case d.Attempt != r.Attempt+1:
		return fail(OrderAttempt, fmt.Sprintf("attempt %d does not follow attempt %d", d.Attempt, r.Attempt))
	case d.NotPast.IsZero() || d.NotPast.After(e.Time.Add(time.Duration(r.TTL)+time.Minute)):
		return fail(OrderMismatch, "the intent ends later than what was requested")
	case r.Attempt == 0 && r.Status != StatusApproved:
		return fail(OrderNotOpen, "request "+r.ID+" is "+string(r.Status))
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
	if r.Attempt == 1 {
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

// closed drops a request that nothing hangs on any more, or, where it has an
// idempotency key, marks when it will be forgotten.
func (b *Batch) closed(r *Request, now Time) {
	if !r.Keyed {
		b.forget(r)
		return
	}
	r.Forget = At(now.Add(KeyLife))
}
