// Package gatewaytest is a recorder in memory, for the tests of the gateways.
package gatewaytest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// Recorder keeps what it is given, where the recorder would take it.
type Recorder struct {
	t     testing.TB
	mu    sync.Mutex
	subs  []*store.Submission
	count int
	down  bool
	wait  chan struct{} // while it stands still; nil: it does not
	then  error         // what Append returns that stood still
}

// New returns a recorder for t, which fails by what the real one would refuse.
func New(t testing.TB) *Recorder { return &Recorder{t: t} }

// Append implements gateway.Recorder.
func (r *Recorder) Append(_ context.Context, subs ...*store.Submission) (*store.Appended, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		return nil, fmt.Errorf("%w: connection refused", store.ErrUnavailable)
	}
	if wait := r.wait; wait != nil {
		r.mu.Unlock()
		<-wait
		r.mu.Lock()
		if r.then != nil {
			return nil, r.then
		}
	}
	for _, s := range subs {
		b, err := s.Marshal()
		if err == nil {
			_, err = store.ParseSubmission(b)
		}
		if err != nil {
			r.t.Errorf("what the recorder refuses: %v", err)
			return nil, fmt.Errorf("%w: %v", store.ErrMalformed, err)
		}
	}
	for _, s := range subs {
		if s.Type == store.CredentialUsed {
			r.count++
		}
	}
	r.subs = append(r.subs, subs...)
	return &store.Appended{}, nil
}

// Down takes the recorder down, or up again.
func (r *Recorder) Down(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
}

// Stand has the recorder stand still until the function is called that it
// returns; what waits for it then is answered with its argument.
func (r *Recorder) Stand() func(error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait := make(chan struct{})
	r.wait = wait
	return func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.wait, r.then = nil, err
		close(wait)
	}
}

// Count is how many uses are on record.
func (r *Recorder) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count
}

// Last returns the newest n entries, or all where there are fewer.
func (r *Recorder) Last(n int) []*store.Submission {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.subs[max(0, len(r.subs)-n):])
}

// Use is what the record has of one.
type Use struct {
	store.UsedDetails
	ID, Statement, Sample string
	Outcome               *store.UseOutcome // nil: it is not on record
}

// Uses are all on record, in order.
func (r *Recorder) Uses() (out []Use) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := map[string]int{} // by ID
	for _, s := range r.subs {
		switch s.Type {
		case store.CredentialUsed:
			at[s.ID] = len(out)
			out = append(out, Use{UsedDetails: details[store.UsedDetails](r, s), ID: s.ID, Statement: s.Openings[store.SealedStatement].Text})
		case store.UseFinished:
			outcomes := details[store.UseFinishedDetails](r, s).Outcomes
			samples := store.SplitSamples(s.Openings[store.SealedSample].Text, len(outcomes))
			for i, o := range outcomes {
				n, ok := at[o.Use]
				if !ok || out[n].Outcome != nil {
					r.t.Errorf("an outcome of no use, or a second one: %+v", o)
					continue
				}
				if out[n].Outcome = &o; samples != nil {
					out[n].Sample = samples[i]
				}
			}
		}
	}
	return out
}

// Outcomes are what came of the uses, by their IDs.
func (r *Recorder) Outcomes() map[string]store.UseOutcome {
	out := map[string]store.UseOutcome{}
	for _, u := range r.Uses() {
		if u.Outcome != nil {
			out[u.ID] = *u.Outcome
		}
	}
	return out
}

// Finished waits for the outcome of the newest use of that name, or of any
// where it is empty.
func (r *Recorder) Finished(use string) (last Use) {
	r.t.Helper()
	Until(r.t, "the outcome of a use "+use, func() bool {
		last = Use{}
		for _, u := range r.Uses() {
			if use == "" || u.Use == use {
				last = u
			}
		}
		return last.Outcome != nil
	})
	return last
}

// Refusal is what the record has of one.
type Refusal struct {
	store.RefusedDetails
	Statement string
}

// Refusals are all on record, in order.
func (r *Recorder) Refusals() (out []Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.subs {
		if s.Type == store.AccessRefused {
			out = append(out, Refusal{details[store.RefusedDetails](r, s), s.Openings[store.SealedStatement].Text})
		}
	}
	return out
}

// All is every byte that went on record, texts that are sealed included.
func (r *Recorder) All() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, s := range r.subs {
		raw, _ := s.Marshal() // Append has marshalled it
		b.Write(raw)
		for _, o := range s.Openings {
			b.WriteString(o.Text)
		}
	}
	return b.String()
}

func details[T any](r *Recorder, s *store.Submission) T {
	d, err := store.DetailsAs[T](&s.Entry)
	if err != nil {
		r.t.Error(err)
	}
	return d
}

// Until waits for what another goroutine does, and fails where it does not.
func Until(t testing.TB, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}
