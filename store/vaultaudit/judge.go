package vaultaudit

import (
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// grace is how long a line may be ahead of the record: an intent comes on
	// record before its token is made, and its outcome within a minute of it, but
	// this recorder may itself be behind.
	grace = 2 * time.Minute
	// skew is what Vault's clock and the recorder's may differ by, and more than
	// the second by which Vault rounds a token's end up.
	skew = 5 * time.Second
	// maxCached is how many credentials are kept in memory.
	maxCached = 10_000
	// maxIntents is how many intents of one time a wrapped token is looked for
	// among.
	maxIntents = 20_000

	// createPath is where tokens are made, and the role follows.
	createPath = "auth/token/create/"
)

// credential is what the record says of an intent and of what came of it.
type credential struct {
	intent string
	grant  store.Grant
	began  time.Time           // the intent's; zero: it is not on record
	issued *store.Entry        // nil: it was not issued, or not yet
	detail store.IssuedDetails //
	hashed string              // its accessor, as Vault's audit log has it; empty where it has none
	failed bool                // failed or abandoned
	end    time.Time           // when the record says that it ended, or has to; zero: neither
	asOf   time.Time
}

// entry is one entry to append. Folded ones are on record once an hour, for a
// credential that is used again and again.
type entry struct {
	*store.Submission
	folded bool
	count  func(*Counts) // what to count, once it is on record
}

// judge says what goes on record for e. wait is true where the record may still
// come to say what this is.
func (f *Follower) judge(ctx context.Context, e *event) (out []entry, wait bool, err error) {
	overdue := f.o.Now().Sub(e.at) >= grace
	if e.created != nil {
		o, w, err := f.made(ctx, e, overdue)
		if err != nil || w {
			return nil, w, err
		}
		out = append(out, o...)
	}
	if e.by != nil {
		o, w, err := f.used(ctx, e, overdue)
		if err != nil || w {
			return nil, w, err
		}
		out = append(out, o...)
	}
	return out, false, nil
}

// made judges the making of a token under one of our roles: an intent on record
// must account for it, and if that intent was issued, it must be the one issued.
func (f *Follower) made(ctx context.Context, e *event, overdue bool) ([]entry, bool, error) {
	t := e.created
	alert := func(why string) ([]entry, bool, error) {
		return []entry{f.alert(store.AlertMint, e, nil, "", e.what+": "+why, e.id)}, false, nil
	}
	if t.intent == "" && t.hashed != "" {
		if err := f.find(ctx, t, e.at, overdue); err != nil {
			return nil, false, err
		}
		if t.intent == "" && !overdue {
			return nil, true, nil
		}
	}
	if t.intent == "" {
		return alert("it names no intent that is on record")
	}
	c, err := f.credential(ctx, t, e.at)
	if err != nil {
		return nil, false, err
	}
	switch {
	case c.began.IsZero() && !overdue:
		return nil, true, nil
	case c.began.IsZero():
		return alert("its intent is not on record")
	case e.path != createPath+c.grant.Role:
		return alert("its intent is for another role")
	case c.issued != nil && c.is(t):
		return f.accounted()
	case c.issued != nil && c.hashed != "":
		return alert("for its intent another token is on record")
	case c.issued != nil && e.at.After(c.issued.Time.Add(skew)), e.at.Sub(c.began) > grace:
		return alert("its intent was over")
	case c.issued == nil && !overdue && !c.failed:
		return nil, true, nil
	}
	// The child ended with the mint: once it had fetched a secret that does not
	// hang on it, or because the mint failed or was abandoned.
	return f.accounted()
}

func (f *Follower) accounted() ([]entry, bool, error) {
	f.count(func(c *Counts) { c.Mints++ })
	return nil, false, nil
}

// find looks for the intent of a wrapped token, whose metadata is HMAC'd: among
// those whose tokens came wrapped at that time, and, when it is overdue, among
// all of that time, since a mint may have failed.
func (f *Follower) find(ctx context.Context, t *token, at time.Time, overdue bool) error {
	match := func(typ store.Type, from, to time.Time, intent func(*store.Entry) (string, error)) error {
		q := ledger.Query{Type: string(typ), From: from, To: to}
		for n := 0; n < maxIntents; {
			page, err := f.o.Ledger.History(ctx, q)
			if err != nil {
				return err
			}
			for _, h := range page.Entries {
				e, err := store.ParseLeaf(h.Entry)
				if err != nil {
					return fmt.Errorf("entry %d: %w", h.Index, err)
				}
				id, err := intent(e)
				if err != nil {
					return fmt.Errorf("entry %d: %w", h.Index, err)
				}
				if id == "" {
					continue
				}
				sum, err := f.hash(ctx, id)
				if err != nil {
					return err
				}
				if sum == t.hashed || id == t.hashed {
					t.intent, t.request = id, e.Request
					return nil
				}
			}
			n += len(page.Entries)
			if page.Next == "" {
				break
			}
			q.Cursor = page.Next
		}
		return nil
	}
	err := match(store.CredentialIssued, at.Add(-skew), at.Add(grace), func(e *store.Entry) (string, error) {
		d, err := store.DetailsAs[store.IssuedDetails](e)
		if d.WrappingAccessor == "" {
			return "", err
		}
		return d.Intent, err
	})
	if err != nil || t.intent != "" || !overdue {
		return err
	}
	return match(store.CredentialIssuing, at.Add(-store.MaxIntentAge-skew), at.Add(skew), func(e *store.Entry) (string, error) { return e.ID, nil })
}

// used judges a request that was made with a token which says that it is ours.
func (f *Follower) used(ctx context.Context, e *event, overdue bool) ([]entry, bool, error) {
	t := e.by
	unmatched := func(why string) ([]entry, bool, error) {
		return []entry{f.alert(store.AlertUse, e, nil, "", e.what+": "+why, t.accessor)}, false, nil
	}
	if t.intent == "" {
		return unmatched("the token names no intent as the issuer does")
	}
	c, err := f.credential(ctx, t, e.at)
	if err != nil {
		return nil, false, err
	}
	switch {
	case c.issued == nil && c.own(e) && e.at.Sub(c.began) <= grace:
		return nil, !overdue && !c.failed, nil // the mint's own call
	case c.issued == nil && !overdue && !c.failed:
		return nil, true, nil
	case c.issued == nil:
		return unmatched("no credential is on record for the intent that its token names")
	// What the mint itself does with the child comes before credential.issued; a
	// child of which no accessor is on record ended with the mint.
	case c.own(e) && (c.hashed == "" || c.is(t)) && !e.at.After(c.issued.Time.Add(skew)):
		return nil, false, nil
	case c.hashed == "" || !c.is(t):
		return unmatched("for the intent that its token names another token is on record")
	}
	use := f.submission(store.CredentialUsed, c.issued, e, "used", e.id, e.at)
	use.SetDetails(store.UsedDetails{Intent: c.intent, Via: store.ViaVaultAudit, By: "vault", Use: e.what})
	out := []entry{{Submission: use, count: func(c *Counts) { c.Uses++ }}}
	if e.failed != "" {
		end := f.submission(store.UseFinished, c.issued, e, "finished", e.id, e.at)
		end.SetDetails(store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: use.ID, Error: e.failed}}})
		out = append(out, entry{Submission: end})
	}
	if !c.end.IsZero() && e.at.After(c.end.Add(skew)) {
		out = append(out, f.alert(store.AlertLateUse, e, c.issued, c.intent, e.what+": after the credential's end", t.accessor))
	}
	return out, false, nil
}

// is reports whether t is the token that was issued.
func (c *credential) is(t *token) bool {
	return t.accessor != "" && (t.accessor == c.hashed || t.accessor == c.detail.Accessor) // a device may be told not to HMAC accessors
}

// own reports whether e is the call by which the mint fetches the secret.
func (c *credential) own(e *event) bool {
	if c.grant.Path == "" || e.path != c.grant.Path {
		return false
	}
	if c.grant.Method == "write" {
		return e.op == "update" || e.op == "create"
	}
	return e.op == "read"
}

// credential reads what the record says of the intent that t names. What is
// known of one that was issued is read anew only where its end may since have
// come on record.
func (f *Follower) credential(ctx context.Context, t *token, at time.Time) (*credential, error) {
	if c := f.known[t.intent]; c != nil && (c.failed || c.issued != nil && !at.After(c.asOf.Add(skew))) {
		return c, nil
	}
	c := &credential{intent: t.intent, asOf: f.o.Now()}
	// One type at a time: a request may have any number of uses.
	for _, typ := range []store.Type{store.StepRequested, store.CredentialIssuing, store.CredentialIssued, store.CredentialFailed, store.CredentialAbandoned, store.CredentialRevoked, store.CredentialExpired} {
		if typ == store.CredentialRevoked && c.issued == nil {
			break
		}
		page, err := f.o.Ledger.History(ctx, ledger.Query{Request: t.request, Type: string(typ)})
		if err != nil {
			return nil, err
		}
		for _, h := range page.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err == nil {
				err = c.take(e)
			}
			if err != nil {
				return nil, fmt.Errorf("entry %d: %w", h.Index, err)
			}
		}
	}
	if c.detail.Accessor != "" {
		var err error
		if c.hashed, err = f.hash(ctx, c.detail.Accessor); err != nil {
			return nil, err
		}
	}
	if len(f.known) >= maxCached {
		clear(f.known)
	}
	f.known[t.intent] = c
	return c, nil
}

// take takes from e what it says of c.
func (c *credential) take(e *store.Entry) error {
	switch e.Type {
	case store.StepRequested:
		d, err := store.DetailsAs[store.RequestedDetails](e)
		c.grant = d.Grant
		return err
	case store.CredentialIssuing:
		if e.ID == c.intent {
			c.began = e.Time.Time
		}
	case store.CredentialIssued:
		d, err := store.DetailsAs[store.IssuedDetails](e)
		if err != nil {
			return err
		}
		if d.Intent == c.intent {
			c.issued, c.detail, c.end = e, d, d.Expires.Time
		}
	default:
		d, err := store.DetailsAs[store.ClosedDetails](e) // of credential.failed too
		if err != nil || d.Intent != c.intent {
			return err
		}
		if e.Type == store.CredentialFailed || e.Type == store.CredentialAbandoned {
			c.failed = true
		} else if e.Time.Before(c.end) {
			c.end = e.Time.Time
		}
	}
	return nil
}

// alert is an alert.raised about e. Alerts of one kind about one thing are on
// record once an hour, of a mint each.
func (f *Follower) alert(kind string, e *event, story *store.Entry, intent, what, about string) entry {
	at, folded := e.at, kind != store.AlertMint
	if folded {
		at = e.at.Truncate(time.Hour)
	}
	sub := f.submission(store.AlertRaised, story, e, kind, about, at)
	sub.SetDetails(store.AlertDetails{Alert: kind, Source: store.ViaVaultAudit, Ref: e.id, Intent: intent, What: clean(what, 700)})
	return entry{Submission: sub, folded: folded, count: func(c *Counts) {
		switch kind {
		case store.AlertMint:
			c.AlertMint++
		case store.AlertUse:
			c.AlertUse++
		case store.AlertLateUse:
			c.AlertLateUse++
		}
	}}
}

// submission is an entry of the story of a credential.issued, or of no story.
// Its ID follows from kind, about and at, and all else from e, so that a line
// that is read again gives the same bytes.
func (f *Follower) submission(t store.Type, story *store.Entry, e *event, kind, about string, at time.Time) *store.Submission {
	sub := &store.Submission{Entry: store.Entry{V: store.Version, ID: entryID(at, kind, about), Type: t, WriterTime: store.At(e.at)}}
	if story == nil {
		sub.Agent, sub.Action = f.o.Agent, store.ViaVaultAudit
		return sub
	}
	sub.Agent, sub.Subject, sub.Orchestrator, sub.Run, sub.Step, sub.Request = story.Agent, story.Subject, story.Orchestrator, story.Run, story.Step, story.Request
	sub.Resource, sub.Action, sub.Decision, sub.Risk = story.Resource, story.Action, story.Decision, story.Risk
	return sub
}

// entryID is a UUIDv7 (RFC 9562, section 5.7) whose random bits follow from
// parts.
func entryID(at time.Time, parts ...string) string {
	sum := sha256.Sum256([]byte("countersign/vault-audit/v1\x00" + strings.Join(parts, "\x00") + "\x00" + at.UTC().Format(time.RFC3339Nano)))
	var id uuid.UUID
	copy(id[6:], sum[:])
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (8 * (5 - i)))
	}
	id[6] = id[6]&0x0F | 0x70
	id[8] = id[8]&0x3F | 0x80
	return id.String()
}
