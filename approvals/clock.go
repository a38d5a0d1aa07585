package approvals

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// tickEvery is how exact the clock is by which requests end.
	tickEvery = time.Second
	// tidyEvery is between clean-ups of what is held in memory.
	tidyEvery = time.Minute
	// expireAtOnce is how many requests expire in one append.
	expireAtOnce = 100
)

// clockLoop ends what is over, first what ended while nothing ran.
func (a *Approvals) clockLoop() {
	defer a.tasks.Done()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	var failed bool
	for {
		err := errors.Join(a.expire(a.ctx), a.activateDue(a.ctx))
		if err != nil && !failed && a.ctx.Err() == nil {
			a.c.Log.Warn("what is over cannot be put on record yet, and is tried again", zap.Error(err))
		}
		failed = err != nil
		a.tidy()
		select {
		case <-a.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// overdue lists the requests whose time is over at now.
func (a *Approvals) overdue(now store.Time) []*store.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.due.IsZero() && now.Before(a.due) {
		return nil
	}
	var over []*store.Request
	next := now.Add(time.Hour)
	for _, r := range a.state.Requests() {
		if r.Pending == nil || r.Minting || r.Status != store.StatusPending && r.Status != store.StatusApproved {
			continue
		}
		if !now.Before(r.Pending.Expires.Time) {
			over = append(over, r)
		}
		if r.Pending.Expires.Before(next) {
			next = r.Pending.Expires.Time
		}
	}
	a.due = next
	return over
}

// expire appends approval.expired for what is over. A crash before the append
// leaves a request that is over and not said to be: the next start says it. A
// crash after it leaves nothing to do; a second append for the same request is
// refused by the order of the record.
func (a *Approvals) expire(ctx context.Context) error {
	over := a.overdue(store.At(a.c.Now()))
	for len(over) > 0 {
		n := min(len(over), expireAtOnce)
		err := a.appendExpired(ctx, over[:n])
		if _, refused := store.IsOrder(err); refused && n > 1 {
			// One of them was decided or collected meanwhile; the others expire.
			err = nil
			for _, r := range over[:n] {
				one := a.appendExpired(ctx, []*store.Request{r})
				if _, refused := store.IsOrder(one); one != nil && !refused {
					err = one
					break
				}
			}
		} else if refused {
			err = nil
		}
		if err != nil {
			return err
		}
		over = over[n:]
	}
	return nil
}

func (a *Approvals) appendExpired(ctx context.Context, over []*store.Request) error {
	lines := make([][]byte, 0, len(over))
	for _, r := range over {
		s := a.entry(store.ApprovalExpired, r.Scope)
		s.Orchestrator, s.Run, s.Step, s.Request = r.Orchestrator, r.Run, r.Step, r.ID
		s.Cause = store.Ptr("nobody decided in time")
		if r.Status == store.StatusApproved {
			s.Cause = store.Ptr("nobody collected it in time")
		}
		s.SetDetails(store.ExpiredDetails{Approval: r.Pending.Approval, Approved: r.Status == store.StatusApproved})
		line, err := s.Marshal()
		if err != nil {
			return err
		}
		lines = append(lines, line)
	}
	_, err := a.c.Ledger.Append(ctx, ledger.Author{Name: a.c.Name, Recorder: true}, lines)
	return err
}

// tidy forgets what is neither open nor in a list any more.
func (a *Approvals) tidy() {
	now := a.c.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if now.Sub(a.tidied) < tidyEvery {
		return
	}
	a.tidied = now
	b := a.state.Begin()
	b.Forget(store.At(now))
	b.Commit()
	old := now.Add(-remembered).Unix()
	kept := a.asked[:0]
	for _, x := range a.asked {
		if x.at < old && a.state.Request(x.request) == nil {
			delete(a.byID, x.approval)
			continue
		}
		kept = append(kept, x)
	}
	clear(a.asked[len(kept):])
	a.asked = kept
}
