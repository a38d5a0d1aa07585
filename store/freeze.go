package store

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
)

// CauseFrozen is the Cause of entries that a freeze brought about: of
// request.void, which the recorder appends, and of credential.revoked.
const CauseFrozen = "frozen"

// scopeNames is what a freeze may name as a scope: what a catalogue may, and
// somewhat more.
var scopeNames = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\z`)

// FreezeDetails are the details of freeze.set, which the recorder alone writes,
// and only for a responder: what is stopped. Those given hold together: a run and
// a scope cover what is of that run and of that scope. The reason is sealed.
type FreezeDetails struct {
	All          bool   `json:"all,omitzero"` // everything; stands alone
	Orchestrator string `json:"orchestrator,omitzero"`
	Run          string `json:"run,omitzero"`
	Step         string `json:"step,omitzero"`
	Scope        string `json:"scope,omitzero"`
}

// Covers reports whether f covers a request of these.
func (f FreezeDetails) Covers(orchestrator, run, step, scope string) bool {
	if f.All {
		return true
	}
	return f != (FreezeDetails{}) &&
		(f.Orchestrator == "" || f.Orchestrator == orchestrator) && (f.Run == "" || f.Run == run) &&
		(f.Step == "" || f.Step == step) && (f.Scope == "" || f.Scope == scope)
}

// Check says what is wrong with f as something to stop. The error is for the
// person who asked.
func (f FreezeDetails) Check() error {
	named := f
	named.All = false
	switch {
	case f.All && named != (FreezeDetails{}):
		return errors.New(`"all" stands alone`)
	case f == (FreezeDetails{}):
		return errors.New("say what to stop: a run, a step, an orchestrator, a scope, or all")
	}
	for _, v := range []struct{ name, value string }{{"orchestrator", f.Orchestrator}, {"run", f.Run}, {"step", f.Step}} {
		if v.value != "" && !ValidID(v.value) {
			return fmt.Errorf("%s: want an ID of letters, digits, '.', '_' and '-'", v.name)
		}
	}
	if f.Scope != "" && !scopeNames.MatchString(f.Scope) {
		return errors.New("scope: want the name of a scope, such as orders-db:read")
	}
	return nil
}

// String is f in words, such as "run run-42, scope orders-db:read" or
// "everything".
func (f FreezeDetails) String() string {
	if f.All {
		return "everything"
	}
	out := ""
	for _, v := range []struct{ name, value string }{{"orchestrator", f.Orchestrator}, {"run", f.Run}, {"step", f.Step}, {"scope", f.Scope}} {
		if v.value != "" {
			out += ", " + v.name + " " + v.value
		}
	}
	if out == "" {
		return "nothing"
	}
	return out[2:]
}

// FreezeLiftedDetails are the details of freeze.lifted. Its Person is another
// than the one who set the freeze.
type FreezeLiftedDetails struct {
	Freeze string `json:"freeze"` // entry ID of freeze.set
}

// FrozenDetails are the details of a request.void that a freeze brought about.
type FrozenDetails struct {
	Freeze string `json:"freeze"` // entry ID of freeze.set
}

// Freeze is a freeze, in force or lifted.
type Freeze struct {
	ID    string // entry ID of freeze.set, by which people name it
	Index int64  // of freeze.set
	FreezeDetails
	Time   Time   // since when
	Person string // pseudonym of who set it
	Lifted int64  // index of freeze.lifted; 0 while in force
}

// Freezes returns the freezes in force, oldest first.
func (s *State) Freezes() []Freeze {
	out := make([]Freeze, 0, len(s.freezes))
	for _, f := range s.freezes {
		out = append(out, *f)
	}
	slices.SortFunc(out, func(a, b Freeze) int { return cmp.Compare(a.Index, b.Index) })
	return out
}

// Lifted returns the freezes that were lifted, in the order in which they were:
// what they condemned is to be revoked all the same.
func (s *State) Lifted() []Freeze { return slices.Clone(s.lifted) }

// Condemns reports whether r has a credential, or is about to have one, that f
// covered when it was set.
func (f *Freeze) Condemns(r *Request) bool {
	return (r.Live || r.Minting) && r.IntentIndex < f.Index && f.Covers(r.Orchestrator, r.Run, r.Step, r.Scope)
}

// Frozen returns a freeze in force that covers a request of these, the oldest
// one; nil where there is none.
func (s *State) Frozen(orchestrator, run, step, scope string) *Freeze {
	return (&Batch{s: s}).Frozen(orchestrator, run, step, scope)
}

// Frozen is State.Frozen with what the batch changes.
func (b *Batch) Frozen(orchestrator, run, step, scope string) *Freeze {
	var first *Freeze
	covers := func(f *Freeze) {
		if f != nil && f.Covers(orchestrator, run, step, scope) && (first == nil || f.Index < first.Index) {
			first = f
		}
	}
	for id, f := range b.s.freezes {
		if _, changed := b.freezes[id]; !changed {
			covers(f)
		}
	}
	for _, f := range b.freezes {
		covers(f)
	}
	if first == nil {
		return nil
	}
	c := *first
	return &c
}

// refuseFrozen refuses e where a freeze covers it.
func (b *Batch) refuseFrozen(e *Entry, r *Request) error {
	if f := b.Frozen(e.Orchestrator, e.Run, e.Step, e.Action); f != nil {
		return &OrderError{Code: OrderFrozen, Message: fmt.Sprintf("freeze %s, in force since %s, stops %s", f.ID, f.Time, f.FreezeDetails), Request: r}
	}
	return nil
}

// freeze returns the freeze in force with id, or nil.
func (b *Batch) freeze(id string) *Freeze {
	if f, changed := b.freezes[id]; changed {
		return f
	}
	return b.s.freezes[id]
}

// setFreeze takes freeze.set.
func (b *Batch) setFreeze(e *Entry, index int64) error {
	d, err := DetailsAs[FreezeDetails](e)
	if err != nil {
		return err
	}
	if e.Person == nil || *e.Person == "" {
		return fmt.Errorf("%w: freeze.set must name a person", ErrMalformed)
	}
	if err := d.Check(); err != nil {
		return fmt.Errorf("%w: freeze.set: %w", ErrMalformed, err)
	}
	b.changeFreeze(e.ID, &Freeze{ID: e.ID, Index: index, FreezeDetails: d, Time: e.Time, Person: *e.Person})
	return nil
}

// liftFreeze takes freeze.lifted.
func (b *Batch) liftFreeze(e *Entry, index int64) error {
	d, err := DetailsAs[FreezeLiftedDetails](e)
	if err != nil {
		return err
	}
	if e.Person == nil || *e.Person == "" {
		return fmt.Errorf("%w: freeze.lifted must name a person", ErrMalformed)
	}
	f := b.freeze(d.Freeze)
	switch {
	case f == nil:
		return &OrderError{Code: OrderNotFrozen, Message: fmt.Sprintf("freeze %.100q is not in force", d.Freeze)}
	case f.Person == *e.Person:
		return &OrderError{Code: OrderLifter, Message: "a freeze is lifted by another person than the one who set it"}
	}
	lifted := *f
	lifted.Lifted = index
	b.lifted = append(b.lifted, lifted)
	b.changeFreeze(d.Freeze, nil)
	return nil
}

// changeFreeze sets a freeze, or lifts it where f is nil.
func (b *Batch) changeFreeze(id string, f *Freeze) {
	if b.freezes == nil {
		b.freezes = map[string]*Freeze{}
	}
	b.freezes[id] = f
}

// commitFreezes makes the batch's freezes those of the State.
func (b *Batch) commitFreezes() {
	b.s.lifted = append(b.s.lifted, b.lifted...)
	for id, f := range b.freezes {
		if f == nil {
			delete(b.s.freezes, id)
		} else {
			b.s.freezes[id] = f
		}
	}
}

// FreezesChanged reports whether the batch sets or lifts a freeze.
func (b *Batch) FreezesChanged() bool { return len(b.freezes) > 0 }

// LoadFreeze takes an entry of what set or lifted a freeze that is on record, so
// that a State read from its requests alone knows what is in force. They must
// come in the order of the log. Other types change nothing.
func (s *State) LoadFreeze(e *Entry, index int64) error {
	b := s.Begin()
	var err error
	switch e.Type {
	case FreezeSet:
		err = b.setFreeze(e, index)
	case FreezeLifted:
		err = b.liftFreeze(e, index)
	}
	if err == nil {
		b.commitFreezes()
	}
	return err
}

// Stopped returns the requests that a freeze covers and that could still be
// minted, now or once people have decided, in the order of their step.requested:
// the recorder closes them in the append that brought it about. Those whose
// intent has no outcome yet are not among them.
func (b *Batch) Stopped() []*Request {
	stopped := map[string]*Request{}
	look := func(r *Request) {
		if r != nil && !r.Minting && (r.Status == StatusPending || r.Status == StatusApproved) && b.Frozen(r.Orchestrator, r.Run, r.Step, r.Scope) != nil {
			stopped[r.ID] = r
		}
	}
	if len(b.freezes) > 0 {
		for id, r := range b.s.requests {
			if _, touched := b.touched[id]; !touched {
				look(r)
			}
		}
	}
	if len(b.freezes)+len(b.s.freezes) > 0 {
		for _, r := range b.touched {
			look(r)
		}
	}
	out := make([]*Request, 0, len(stopped))
	for _, r := range stopped {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *Request) int { return cmp.Compare(a.Requested, b.Requested) })
	return out
}
