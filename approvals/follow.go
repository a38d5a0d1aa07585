package approvals

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// remembered is for how long a closed request stands in lists. The record
	// itself has it for good, and so has Get.
	remembered = 30 * 24 * time.Hour
	// subscriberBuffer is how many events a subscriber may be behind.
	subscriberBuffer = 256
	// retryAfter is the pause after the ledger did not answer.
	retryAfter = time.Second
)

// asked is a request that people were asked about, as far as a list needs it.
type asked struct {
	index             int64 // of approval.requested
	at                int64 // its time, in seconds
	approval, request string
}

// load rebuilds the state from the ledger: all that is open, and what people
// were asked in the last days.
func (a *Approvals) load(ctx context.Context) error {
	open, err := a.c.Ledger.OpenSet(ctx, "")
	if err != nil {
		return err
	}
	size, err := store.CheckpointSize(open.Checkpoint)
	if err != nil {
		return err
	}
	for _, p := range open.Entries {
		if !a.concerns(p.Leaf) {
			continue
		}
		e, err := store.ParseLeaf(p.Leaf)
		if err != nil {
			return fmt.Errorf("entry %d: %w", p.Index, err)
		}
		if err := a.apply(e, p.Leaf, p.Index); err != nil {
			// A standing approval that is over may be missing from what is open:
			// what drew on it is not ours to judge any more.
			a.c.Log.Debug("an open entry is not taken", zap.Int64("index", p.Index), zap.Error(err))
		}
	}
	q := ledger.Query{Type: string(store.ApprovalRequested), From: a.c.Now().Add(-remembered), Limit: 10_000}
	for {
		page, err := a.c.Ledger.History(ctx, q)
		if err != nil {
			return err
		}
		for _, h := range page.Entries {
			if h.Index >= size {
				continue // comes again with what is followed
			}
			e, err := store.ParseLeaf(h.Entry)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			a.remember(e, h.Index)
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			break
		}
	}
	slices.SortFunc(a.asked, func(x, y asked) int { return int(x.index - y.index) })
	a.next = size
	return nil
}

// remember keeps what a list needs of an approval.requested.
func (a *Approvals) remember(e *store.Entry, index int64) {
	d, err := store.DetailsAs[store.ApprovalRequestedDetails](e)
	if err != nil || a.byID[d.Approval] != "" {
		return
	}
	a.byID[d.Approval] = e.Request
	a.asked = append(a.asked, asked{index: index, at: e.Time.Unix(), approval: d.Approval, request: e.Request})
}

// concerns reports whether a leaf may change what people are asked, without
// parsing it: most entries of a busy log do not. Members are written in the
// order of store.Entry, and no quote inside a text is without its backslash.
func (a *Approvals) concerns(leaf []byte) bool {
	t := store.Type(member(leaf, `,"type":"`))
	switch {
	case t == store.StepRequested:
		return bytes.Contains(leaf, []byte(`"outcome":"`+store.NeedsApproval+`"`))
	case strings.HasPrefix(string(t), "approval."), strings.HasPrefix(string(t), "passkey."):
		return true
	case strings.HasPrefix(string(t), "credential."), strings.HasPrefix(string(t), "request."):
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.state.Request(member(leaf, `,"request":"`)) != nil
	}
	return false
}

// member is the text after name, up to the next quote.
func member(leaf []byte, name string) string {
	_, rest, ok := bytes.Cut(leaf, []byte(name))
	if !ok {
		return ""
	}
	text, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(text)
}

// apply takes one entry into the state.
func (a *Approvals) apply(e *store.Entry, leaf []byte, index int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.state.Begin()
	if err := b.Admit(e, leaf, index, true); err != nil {
		return err
	}
	b.Commit()
	if e.Type == store.ApprovalRequested {
		a.remember(e, index)
	}
	a.due = time.Time{}
	return nil
}

// followLoop takes what comes to be on record, until the ledger or a ends.
func (a *Approvals) followLoop() {
	defer a.tasks.Done()
	for a.ctx.Err() == nil {
		err := a.c.Ledger.FollowLeaves(a.ctx, a.next-1, func(news []store.Proven) error {
			for _, p := range news {
				if a.concerns(p.Leaf) {
					if err := a.take(p); err != nil {
						return err
					}
				}
				a.mu.Lock()
				a.next = p.Index + 1
				close(a.moved)
				a.moved = make(chan struct{})
				a.mu.Unlock()
			}
			return nil
		})
		select {
		case <-a.ctx.Done():
		case <-a.c.Ledger.Done():
			return
		case <-time.After(retryAfter):
			a.c.Log.Warn("following the ledger broke off, and begins again", zap.Error(err))
		}
	}
}

// until waits until entry index is known here, so that a list that is asked for
// after an answer was given has what the answer said. It gives up after a
// second: a list that is late is no reason to have none.
func (a *Approvals) until(ctx context.Context, index int64) {
	late := time.NewTimer(time.Second)
	defer late.Stop()
	for {
		a.mu.Lock()
		next, moved := a.next, a.moved
		a.mu.Unlock()
		if next > index {
			return
		}
		select {
		case <-moved:
		case <-late.C:
			return
		case <-ctx.Done():
			return
		case <-a.ctx.Done():
			return
		}
	}
}

// take applies an entry and tells subscribers. An error means that the ledger
// could not be read: the entry is then taken again.
func (a *Approvals) take(p store.Proven) error {
	e, err := store.ParseLeaf(p.Leaf)
	if err != nil {
		return fmt.Errorf("entry %d: %w", p.Index, err)
	}
	switch e.Type {
	case store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked:
		return a.tellPasskey(e)
	}
	if err := a.apply(e, p.Leaf, p.Index); err != nil {
		// What is held here has come apart from the record, which is right.
		if err := a.reload(e.Request); err != nil {
			return err
		}
	}
	a.mu.Lock()
	r := a.state.Request(e.Request)
	listened := len(a.subs) > 0
	a.mu.Unlock()
	kind := eventOf(e, r)
	if kind == "" || !listened {
		return nil
	}
	v, err := a.view(a.ctx, e.Request)
	switch {
	case err == ErrNotFound: // a request that drew on a standing approval
		return nil
	case err != nil:
		return err
	}
	a.tell(Event{Kind: kind, Approval: v.ID, Request: v})
	return nil
}

// eventOf is the kind of event that e is, r being its request afterwards.
func eventOf(e *store.Entry, r *store.Request) string {
	switch e.Type {
	case store.ApprovalRequested:
		return EventRequested
	case store.ApprovalDecided, store.ApprovalStanding:
		switch {
		case r == nil:
			return ""
		case r.Status == store.StatusApproved:
			return EventApproved
		case r.Status == store.StatusDenied:
			return EventDenied
		}
		return EventDecided
	case store.ApprovalExpired:
		return EventExpired
	case store.RequestWithdrawn:
		return EventWithdrawn
	case store.RequestVoid:
		return EventVoid
	case store.CredentialIssued:
		return EventIssued
	}
	return ""
}

// reload reads what the record says of one request.
func (a *Approvals) reload(request string) error {
	v, err := a.view(a.ctx, request)
	if err == ErrNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if v.state != nil {
		a.state.Load(v.state)
	}
	a.due = time.Time{}
	return nil
}

// subscriber gets events.
type subscriber struct {
	c    chan Event
	lost bool // events were lost since the last EventResync was sent
}

// Subscribe returns the events from now on, and what ends them. Whoever falls
// behind loses events and gets an EventResync in their place.
func (a *Approvals) Subscribe() (<-chan Event, func()) {
	s := &subscriber{c: make(chan Event, subscriberBuffer)}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ctx.Err() != nil {
		close(s.c)
		return s.c, func() {}
	}
	a.subs[s] = true
	return s.c, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.subs[s] {
			delete(a.subs, s)
			close(s.c)
		}
	}
}

// tell sends e to all who subscribed. The last place of a buffer is for
// EventResync: it stands behind all that was sent, so whoever comes to it has
// missed nothing but what it tells them to read.
func (a *Approvals) tell(e Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for s := range a.subs {
		switch {
		case len(s.c) < cap(s.c)-1:
			s.c <- e
			s.lost = false
		case !s.lost:
			s.c <- Event{Kind: EventResync}
			s.lost = true
		}
	}
}

// cursor writes an index as the ledger's History takes it.
func cursor(index int64) string { return strconv.FormatInt(index, 10) }
