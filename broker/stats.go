package broker

import "github.com/countersign-dev/countersign/store"

// Stats is what is under way, as far as this broker knows: all brokers' requests
// and credentials, not its own alone.
type Stats struct {
	Live    map[string]int // credentials that are out, by scope
	Pending int            // requests that people are to decide
	Minting int            // intents without an outcome
	Due     int            // credentials that are to be ended by now and are not yet
	Late    int            // of these, those that were to be ended more than a minute ago
	Freezes int            // in force, as they were followed
	Follows bool           // the record is followed, so that all of this is as of a moment ago
}

// Stats says what is under way.
func (b *Broker) Stats() Stats {
	now := b.Now()
	s := Stats{Live: map[string]int{}}
	b.index.pick(func(_ string, t *tracked) bool {
		switch {
		case t.live:
			s.Live[t.story.Action]++
			due := t.issued.Expires.Time
			if t.condemned != "" && t.condemnedAt.Before(due) {
				due = t.condemnedAt
			}
			if !now.Before(due) {
				s.Due++
			}
			if now.Sub(due) > overdue {
				s.Late++
			}
		case t.minting:
			s.Minting++
		case t.status == store.StatusPending:
			s.Pending++
		}
		return false
	})
	b.index.mu.Lock()
	defer b.index.mu.Unlock()
	for _, f := range b.index.freezes {
		if f != nil {
			s.Freezes++
		}
	}
	s.Follows = b.index.following
	return s
}
