package auth

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/countersign-dev/countersign/store"
)

// How many refusals go on record one by one: so many at once, then one in each
// interval. Of those in between each kind has one entry an interval, with how
// many it stands for.
const (
	refusalBurst    = 50
	refusalInterval = time.Second
)

// Refusals puts refused calls on record as access.refused. A flood of them is
// folded, so that it can neither fill the ledger nor hide how many there were;
// and only what is alike, so that it cannot hide another attempt either: who,
// what and why are of few kinds. Nothing of the refused token is in an entry.
type Refusals struct {
	// PrivacyKey has people stand in entries as pseudonyms, their names sealed.
	// Without it they stand by name; it is set before the first refusal.
	PrivacyKey store.PrivacyKey

	trustDomain string
	record      func(context.Context, *store.Submission) error
	log         *zap.Logger
	limit       *rate.Limiter

	mu     sync.Mutex
	folded map[kind]*fold // refusals not on record yet
	timer  *time.Timer
	closed bool
}

// kind is what refusals must share to be folded into one.
type kind struct{ agent, action, problem string }

type fold struct {
	n    int
	last *store.Submission
}

func kindOf(s *store.Submission) kind {
	k := kind{agent: s.Agent, action: s.Action}
	if s.Decision != nil && len(s.Decision.Reasons) > 0 {
		k.problem = s.Decision.Reasons[0]
	}
	return k
}

// NewRefusals records through record, which appends one entry. It is called
// with a deadline of 2 s, before the caller gets its answer.
func NewRefusals(trustDomain string, log *zap.Logger, record func(context.Context, *store.Submission) error) *Refusals {
	return &Refusals{trustDomain: trustDomain, record: record, log: log, folded: map[kind]*fold{},
		limit: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst)}
}

// Add puts one refusal on record, or counts it towards the next. p is nil
// where the caller is not known. What cannot be recorded is logged and counted
// towards the next: the call is refused all the same, and with the ledger away
// nothing is issued anyhow.
func (f *Refusals) Add(ctx context.Context, p *Principal, d store.RefusedDetails) {
	s := f.entry(p, d)
	f.mu.Lock()
	if !f.limit.Allow() {
		f.fold(s, 1)
		f.mu.Unlock()
		return
	}
	folded := 0
	if before := f.folded[kindOf(s)]; before != nil {
		folded = before.n
		delete(f.folded, kindOf(s))
	}
	f.mu.Unlock()
	f.write(ctx, s, folded)
}

// entry is the record of one refusal, but for the count and the ID.
func (f *Refusals) entry(p *Principal, d store.RefusedDetails) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, Type: store.AccessRefused, WriterTime: store.At(time.Now()),
		// Who it was is not known; that it was nobody known is.
		Agent:    "spiffe://" + f.trustDomain + "/unauthenticated",
		Action:   d.Method + " " + d.Route,
		Decision: &store.Decision{Outcome: store.Deny, Reasons: []string{d.Problem}},
	}}
	if p != nil {
		s.Agent = p.Agent(f.trustDomain)
		switch {
		case p.Role == Orchestrator:
			s.Orchestrator = p.Name
		case len(f.PrivacyKey) > 0 && (p.Method == "session" || p.Role == Approver || p.Role == Responder):
			who := f.PrivacyKey.Pseudonym(p.Person())
			s.Agent, s.Person = "spiffe://"+f.trustDomain+"/person/"+who, store.Ptr(who)
			s.Seal(store.SealedPerson, p.Person())
		}
	}
	s.SetDetails(d)
	return s
}

// fold counts n refusals, of which s is the latest, and sees to it that they
// are on record soon, also when no further one comes.
func (f *Refusals) fold(s *store.Submission, n int) {
	k := kindOf(s)
	if f.folded[k] == nil {
		f.folded[k] = &fold{}
	}
	f.folded[k].n += n
	f.folded[k].last = s
	if f.timer == nil && !f.closed {
		f.timer = time.AfterFunc(refusalInterval, f.flush)
	}
}

// flush records what was folded: of each kind the latest refusal, with the
// others as count.
func (f *Refusals) flush() {
	f.mu.Lock()
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	folded := f.folded
	f.folded = map[kind]*fold{}
	f.mu.Unlock()
	for _, x := range folded {
		f.write(context.Background(), x.last, x.n-1)
	}
}

func (f *Refusals) write(ctx context.Context, s *store.Submission, folded int) {
	s.ID = store.NewID()
	if folded > 0 {
		d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
		if err == nil {
			d.Folded = folded
			s.SetDetails(d)
		}
	}
	// The caller may hang up at once; its attempt is on record all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := f.record(ctx, s); err != nil {
		f.log.Warn("a refusal could not be recorded yet", zap.Int("refusals", folded+1), zap.Error(err))
		f.mu.Lock()
		f.fold(s, folded+1)
		f.mu.Unlock()
	}
}

// Close records what is still folded.
func (f *Refusals) Close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.flush()
}
