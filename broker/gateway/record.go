package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/refusal"
)

const (
	// MaxStatement is how long a use's statement may be in bytes, so that it fits
	// in an entry together with all else. What JSON lengthens (quotes, control
	// characters) may be refused below it.
	MaxStatement = 48 << 10
	// MaxUses is how many uses one call of Use may put on record.
	MaxUses = 256
)

// Use is one thing that a step asks of its target.
type Use struct {
	Use       string   // one line without values, as store.UsedDetails.Use
	Conn      string   // names the connection
	Objects   []string // as store.UsedDetails.Objects
	Statement string   // all that was asked; sealed. UTF-8 without U+0000
}

// Pending is a use that is on record and has no outcome yet.
type Pending struct {
	s     *Session
	id    string
	began time.Time
	done  atomic.Bool
}

// Use puts uses on record, in order, all or none; what they ask for may reach
// the target only afterwards. The error wraps store.ErrUnavailable where it is
// not known whether they are on record, ErrTooLarge or store.ErrMalformed where
// they cannot be, and is ErrEnded, or ctx's, where it is too late.
//
// A crash after it leaves uses without an outcome, which may or may not have
// reached the target. Uses that went on record though Use returned an error did
// not reach it: where that is known, their outcome is store.UseCut.
func (s *Session) Use(ctx context.Context, uses ...Use) (_ []*Pending, err error) {
	if s.ctx.Err() != nil {
		return nil, ErrEnded
	}
	if len(uses) == 0 {
		return nil, nil
	}
	if using := s.g.Observer.Using; using != nil {
		done := using(ctx, s, len(uses))
		defer func() { done(err) }()
	}
	if len(uses) > MaxUses {
		return nil, fmt.Errorf("%w: %d uses at once, at most %d", ErrTooLarge, len(uses), MaxUses)
	}
	q := &queued{s: s, subs: make([]*store.Submission, len(uses)), done: make(chan error, 1)}
	for i, u := range uses {
		n, err := s.size(u)
		if err != nil {
			return nil, err
		}
		q.subs[i], q.size = s.used(u), q.size+n
	}
	if q.size > maxBytes {
		return nil, fmt.Errorf("%w: %d uses of %d bytes together", ErrTooLarge, len(uses), q.size)
	}
	if err := s.g.record.wait(ctx, q); err != nil {
		return nil, fmt.Errorf("record a use: %w", err)
	}
	out := pending(q)
	if s.ctx.Err() != nil {
		cut(q)
		return nil, ErrEnded
	}
	return out, nil
}

// pending are the uses of q, now that they are on record.
func pending(q *queued) []*Pending {
	now := q.s.g.Now()
	out := make([]*Pending, len(q.subs))
	for i, sub := range q.subs {
		out[i] = &Pending{s: q.s, id: sub.ID, began: now}
	}
	return out
}

// cut gives uses that are on record, and go no further, their outcome.
func cut(q *queued) {
	for _, p := range pending(q) {
		p.Finish(store.UseOutcome{Error: store.UseCut}, "")
	}
}

// used is the entry of a use.
func (s *Session) used(u Use) *store.Submission {
	sub := s.submission(store.CredentialUsed)
	sub.SetDetails(store.UsedDetails{Intent: s.Intent, Via: store.ViaGateway, By: "gateway", Use: u.Use, Protocol: s.Grant.Access.Protocol,
		Conn: u.Conn, Objects: u.Objects, Access: s.access, Masking: s.masking})
	sub.Seal(store.SealedStatement, u.Statement)
	return sub
}

// size is how many bytes the entry of u has at most as it is submitted. What
// cannot be on record is an error, so that it spoils no batch.
func (s *Session) size(u Use) (int, error) {
	n := s.base + lengthened(u.Use) + lengthened(u.Conn) + lengthened(u.Statement)
	for _, o := range u.Objects {
		n += lengthened(o) + len(`"",`)
	}
	for _, text := range append([]string{u.Use, u.Conn, u.Statement}, u.Objects...) {
		if !utf8.ValidString(text) || strings.IndexByte(text, 0) >= 0 {
			return 0, fmt.Errorf("%w: a use that is not UTF-8, or holds U+0000", store.ErrMalformed)
		}
	}
	if n > store.MaxEntry {
		return 0, fmt.Errorf("%w: %d bytes in an entry, at most %d", ErrTooLarge, n, store.MaxEntry)
	}
	return n, nil
}

// lengthened is how many bytes s has at most as a JSON string, without the
// quotes.
func lengthened(s string) int {
	n := 0
	for i := range len(s) {
		n += length(s[i])
	}
	return n
}

// length is that of one byte.
func length(c byte) int {
	switch {
	case c == '"', c == '\\', c == '\n', c == '\r', c == '\t':
		return 2
	case c < ' ':
		return len(`\u0000`)
	}
	return 1
}

// Finish says what came of a use, the first time it is called; Use and Took of o
// are set here. sample is an excerpt of what came back, masked; it is cut where
// it does not fit in an entry. It goes on record soon, several outcomes in one
// entry, while the session lasts or after it.
//
// A crash before it is on record leaves a use without an outcome.
func (p *Pending) Finish(o store.UseOutcome, sample string) {
	if p.done.Swap(true) {
		return
	}
	s := p.s
	o.Use, o.Took = p.id, store.Duration(max(0, s.g.Now().Sub(p.began)))
	// Bounded, and nothing that JSON lengthens, so that store.MaxOutcomes fit in an
	// entry whatever a target says.
	o.Status, o.Error, o.Digest = plain(o.Status, 64), plain(o.Error, 32), plain(o.Digest, 80)
	s.mu.Lock()
	defer s.mu.Unlock()
	if sample != "" {
		room := store.MaxEntry - s.base - store.MaxOutcomes*maxOutcome
		n := room + 1
		if len(sample) <= room {
			sample = fitting(sample, room)
			n = lengthenedTwice(sample)
		}
		switch {
		case n > room: // it has an entry to itself, and is cut to it
			s.flush()
			s.finished([]store.UseOutcome{o}, sample)
			return
		case s.sampled+n > room:
			s.flush()
		}
		for len(s.samples) < len(s.outcomes) {
			s.samples = append(s.samples, "")
		}
		s.samples, s.sampled = append(s.samples, sample), s.sampled+n
	}
	s.outcomes = append(s.outcomes, o)
	switch {
	case len(s.outcomes) >= store.MaxOutcomes || s.ctx.Err() != nil:
		s.flush()
	case len(s.outcomes) == 1:
		s.g.record.soon(s)
	}
}

// maxOutcome is how many bytes an outcome takes at most in its entry: 406, where
// every member is as long as Finish lets it be, and 5 of an excerpt that is empty.
const maxOutcome = 411

// lengthenedTwice is how many bytes s has at most as one of several samples: as
// a JSON string within a JSON string, with its own quotes and comma.
func lengthenedTwice(s string) int {
	n := len(`\"\",`)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"', c == '\\':
			n += len(`\\\"`)
		case c < ' ':
			n += len(`\\u0000`)
		default:
			n++
		}
	}
	return n
}

// plain is s in at most n printable ASCII characters that JSON does not escape.
func plain(s string, n int) string {
	s = s[:min(n, len(s))]
	if strings.IndexFunc(s, unprintable) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		if unprintable(r) {
			return '?'
		}
		return r
	}, s)
}

func unprintable(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }

// flush sends the outcomes of s towards the record. s.mu must be held.
func (s *Session) flush() {
	if len(s.outcomes) == 0 {
		return
	}
	for s.samples != nil && len(s.samples) < len(s.outcomes) {
		s.samples = append(s.samples, "")
	}
	s.finished(s.outcomes, store.JoinSamples(s.samples))
	s.outcomes, s.samples, s.sampled = nil, nil, 0
}

func (s *Session) finished(o []store.UseOutcome, sample string) {
	sub := s.submission(store.UseFinished)
	sub.SetDetails(store.UseFinishedDetails{Outcomes: o})
	n := s.base + len(sub.Details)
	text := fitting(sample, store.MaxEntry-n)
	sub.Seal(store.SealedSample, text)
	s.g.record.put(&queued{s: s, subs: []*store.Submission{sub}, size: n + lengthened(text), outcomes: len(o)})
}

// fitting is text as an entry can hold it, cut so that it has at most n bytes as
// a JSON string. What was cut says so.
func fitting(text string, n int) string {
	size, n := len(text), max(n, 64)
	out := strings.ReplaceAll(strings.ToValidUTF8(text[:min(size, n+utf8.UTFMax)], "\uFFFD"), "\x00", "\uFFFD")
	if size <= n && lengthened(out) <= n {
		return out
	}
	end := fmt.Sprintf("… (cut, of %d bytes)", size)
	n -= len(end)
	for i, r := range out {
		if r < utf8.RuneSelf {
			n -= length(byte(r))
		} else {
			n -= utf8.RuneLen(r)
		}
		if n < 0 {
			return out[:i] + end
		}
	}
	return out + end
}

// Refusal is what a guard did not let through.
type Refusal struct {
	Use       string // as Use.Use
	Conn      string
	Statement string // all that was asked; sealed. It is cut where it does not fit in an entry
	Reason    string // which guard, in words that hold no value
	Remote    string // IP address of the step, without port
}

// maxRefused bounds the texts of a refusal that are not sealed, in bytes.
const maxRefused = 1 << 10

// Refuse puts a refusal on record, before the step is told of it. Floods of one
// session are folded, as store/refusal does: such a refusal is on record within
// a second, by number. The error wraps store.ErrUnavailable.
func (s *Session) Refuse(ctx context.Context, r Refusal) error {
	if s.g.Observer.Refused != nil {
		s.g.Observer.Refused(s.Grant.Access.Protocol, true)
	}
	sub := s.submission(store.AccessRefused)
	reason := fitting(r.Reason, maxRefused)
	deny := store.Decision{Outcome: store.Deny, Reasons: []string{reason}}
	if d := s.Story.Decision; d != nil {
		deny.Policy = d.Policy
	}
	sub.Decision = &deny
	sub.SetDetails(store.RefusedDetails{Method: s.Grant.Access.Protocol, Route: fitting(r.Use, maxRefused), Problem: "scope-denied",
		Remote: fitting(r.Remote, 64), Intent: s.Intent, Reason: reason})
	sub.Seal(store.SealedStatement, fitting(r.Statement, min(MaxStatement, store.MaxEntry-s.base-3*maxRefused-128)))
	s.mu.Lock()
	if s.refusals == nil {
		kind := func(sub *store.Submission) string {
			d, _ := store.DetailsAs[store.RefusedDetails](&sub.Entry)
			return d.Reason
		}
		s.refusals = refusal.New(s.g.Log, s.g.record.refused, kind)
		if s.ctx.Err() != nil { // it ended meanwhile, and nobody will close it
			s.refusals.Close()
		}
	}
	log := s.refusals
	s.mu.Unlock()
	return log.Add(ctx, sub)
}

// Refused puts on record that somebody at remote, an IP address without port,
// showed no valid token. what is what was asked, in one line without values, of
// few kinds: floods are folded by it. What cannot be recorded is logged: the
// caller is refused all the same.
func (g *Gateway) Refused(ctx context.Context, protocol, remote, what string) {
	if g.Observer.Refused != nil {
		g.Observer.Refused(protocol, false)
	}
	what = fitting(what, maxRefused)
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, Type: store.AccessRefused, WriterTime: store.At(g.Now()),
		// Who it was is not known; that it was nobody known is.
		Agent:    "spiffe://" + g.TrustDomain + "/unauthenticated",
		Action:   protocol + " " + what,
		Decision: &store.Decision{Outcome: store.Deny, Reasons: []string{"unauthenticated"}},
	}}
	s.SetDetails(store.RefusedDetails{Method: protocol, Route: what, Problem: "unauthenticated", Remote: fitting(remote, 64)})
	if err := g.strangers.Add(ctx, s); err != nil {
		g.Log.Warn("a refusal is not on record yet", zap.String("protocol", protocol), zap.Error(err))
	}
}

func (s *Session) submission(t store.Type) *store.Submission {
	e := *s.Story
	e.V, e.ID, e.Type, e.WriterTime, e.Time, e.Writer, e.Sealed, e.Details = store.Version, store.NewID(), t, store.At(s.g.Now()), store.Time{}, "", nil, nil
	return &store.Submission{Entry: e}
}
