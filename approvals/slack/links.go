package slack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Errors of linking.
var (
	// ErrNoLink: nothing waits to be confirmed, or it is not the account named.
	ErrNoLink = errors.New("no such Slack account waits to be linked")
	// ErrTaken: the account is linked to another person.
	ErrTaken = errors.New("the Slack account is linked to another person")
)

const (
	codeLife    = 10 * time.Minute
	codeTries   = 5    // wrong codes of one Slack account within codeLife
	maxPending  = 1000 // people who are linking at one time
	loginFresh  = 24 * time.Hour
	sealedSlack = "slack" // "TEAM/USER"
)

// LinkDetails are the details of slack.linked. The entry's Person is who the
// account speaks for; name and account are sealed as "person" and "slack".
type LinkDetails struct {
	State   string   `json:"state"`   // linked or unlinked
	Account string   `json:"account"` // PrivacyKey.Digest("slack", team, user)
	Groups  []string `json:"groups"`  // of the person, as the login at the page said
}

// Account is a Slack account.
type Account struct {
	Team string `json:"team"` // ID, T…
	User string `json:"user"` // ID, U… or W…
	Name string `json:"name"` // what Slack calls the user; for people to read, it proves nothing
}

func (a Account) key() string { return a.Team + "/" + a.User }

// link is who an account speaks for. It is rebuilt from slack.linked entries.
type link struct {
	person  approvals.Person
	account Account
	login   time.Time // when the groups were said
}

// linking is a person who began to link.
type linking struct {
	person  approvals.Person
	code    string
	ends    time.Time
	account *Account // who sent the code, once somebody did
}

// loadLinks rebuilds the links from the ledger.
func (s *Slack) loadLinks(ctx context.Context) error {
	q := ledger.Query{Type: string(store.SlackLinked), Limit: 1000}
	for {
		page, err := s.c.Ledger.History(ctx, q)
		if err != nil {
			return fmt.Errorf("reading linked Slack accounts: %w", err)
		}
		for _, h := range page.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			d, err := store.DetailsAs[LinkDetails](e)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			if e.Person == nil {
				continue
			}
			s.unlinkLocked(*e.Person)
			name := h.Opened[store.SealedPerson]
			team, user, ok := strings.Cut(h.Opened[sealedSlack], "/")
			// Where the texts are erased nobody can be named: the account must be
			// linked anew.
			if d.State == "linked" && ok && name != "" && team == s.c.Team {
				s.links[team+"/"+user] = &link{person: approvals.Person{Name: name, Groups: d.Groups}, account: Account{Team: team, User: user}, login: e.Time.Time}
			}
		}
		if page.Next == "" {
			return nil
		}
		q.Cursor = page.Next
	}
}

// unlinkLocked forgets the link of the person whose pseudonym is p.
func (s *Slack) unlinkLocked(p string) {
	for k, l := range s.links {
		if s.c.PrivacyKey.Pseudonym(l.person.Name) == p {
			delete(s.links, k)
		}
	}
}

// BeginLink returns a one-time code for p, who is logged in at the page. p sends
// it to the bot from the Slack account to be linked ("Link account" on any of
// our messages). An earlier code of p is void.
func (s *Slack) BeginLink(p approvals.Person) (code string, ends time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.c.Now()
	for name, l := range s.linking {
		if !now.Before(l.ends) {
			delete(s.linking, name)
		}
	}
	if len(s.linking) >= maxPending && s.linking[p.Name] == nil {
		return "", time.Time{}, errors.New("too many people are linking a Slack account; try again in 10 minutes")
	}
	code = rand.Text()[:16] // base32: 80 bits, tried 5 times within 10 minutes
	code = code[:4] + "-" + code[4:8] + "-" + code[8:12] + "-" + code[12:]
	s.linking[p.Name] = &linking{person: p, code: code, ends: now.Add(codeLife)}
	return code, now.Add(codeLife), nil
}

// PendingLink returns the account from which p's code was sent and that waits
// for p to confirm it at the page.
func (s *Slack) PendingLink(p approvals.Person) (Account, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.linking[p.Name]
	if l == nil || l.account == nil || !s.c.Now().Before(l.ends) {
		return Account{}, false
	}
	return *l.account, true
}

// ConfirmLink links the account to p, who is logged in and has confirmed it at
// the page by POST. team and user are what the page showed: where another
// account has taken its place meanwhile, the error is ErrNoLink.
//
// A crash before the append links nothing and p begins anew; after it, the
// link is read from the ledger at the next start.
func (s *Slack) ConfirmLink(ctx context.Context, p approvals.Person, team, user string) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	l := s.linking[p.Name]
	if l == nil || l.account == nil || !s.c.Now().Before(l.ends) || l.account.Team != team || l.account.User != user {
		s.mu.Unlock()
		return ErrNoLink
	}
	account := *l.account
	if other := s.links[account.key()]; other != nil && other.person.Name != p.Name {
		s.mu.Unlock()
		return ErrTaken
	}
	delete(s.linking, p.Name) // a code counts once
	s.mu.Unlock()
	if err := s.recordLink(ctx, p, account, "linked"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unlinkLocked(s.c.PrivacyKey.Pseudonym(p.Name))
	s.links[account.key()] = &link{person: p, account: account, login: s.c.Now()}
	return nil
}

// Linked returns the account that speaks for p.
func (s *Slack) Linked(p approvals.Person) (Account, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.of(p.Name); l != nil {
		return l.account, true
	}
	return Account{}, false
}

func (s *Slack) of(person string) *link {
	for _, l := range s.links {
		if l.person.Name == person {
			return l
		}
	}
	return nil
}

// Unlink ends the link of p's account. It counts at once, and is on record when
// Unlink returns without error; after an error, or a crash before the append,
// the account is linked again at the next start.
func (s *Slack) Unlink(ctx context.Context, p approvals.Person) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	l := s.of(p.Name)
	if l != nil {
		delete(s.links, l.account.key())
	}
	s.mu.Unlock()
	if l == nil {
		return ErrNoLink
	}
	return s.recordLink(ctx, p, l.account, "unlinked")
}

// Login is to be called at each login at the page: what p decides in Slack
// counts for the groups that p's last login named. New groups count at once;
// they are on record when Login returns without error.
func (s *Slack) Login(ctx context.Context, p approvals.Person) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	l := s.of(p.Name)
	if l == nil {
		s.mu.Unlock()
		return nil
	}
	now := s.c.Now()
	known := slices.Equal(slices.Sorted(slices.Values(l.person.Groups)), slices.Sorted(slices.Values(p.Groups))) && now.Sub(l.login) < min(loginFresh, s.c.LinkFor/2)
	if !known {
		s.links[l.account.key()] = &link{person: p, account: l.account, login: now}
	}
	s.mu.Unlock()
	if known {
		return nil
	}
	return s.recordLink(ctx, p, l.account, "linked")
}

func (s *Slack) recordLink(ctx context.Context, p approvals.Person, a Account, state string) error {
	sub := s.entry(store.SlackLinked, "slack link")
	sub.Person = store.Ptr(s.c.PrivacyKey.Pseudonym(p.Name))
	sub.SetDetails(LinkDetails{State: state, Account: s.c.PrivacyKey.Digest("slack", a.Team, a.User), Groups: append([]string{}, p.Groups...)})
	sub.Seal(store.SealedPerson, p.Name)
	sub.Seal(sealedSlack, a.key())
	if err := s.c.Record(ctx, sub); err != nil {
		return fmt.Errorf("recording a Slack link: %w", err)
	}
	return nil
}

// claim takes a code sent from a Slack account. It links nothing: the person
// confirms at the page. It returns whose code it is; known is false where the
// code is nobody's, or the account has tried too often.
func (s *Slack) claim(a Account, code string) (person string, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.c.Now()
	for k, t := range s.tries {
		if now.Sub(t.since) >= codeLife {
			delete(s.tries, k)
		}
	}
	t := s.tries[a.key()]
	if t.n >= codeTries || len(s.tries) >= 10*maxPending {
		return "", false
	}
	code = strings.ToUpper(strings.TrimSpace(code))
	var found *linking
	for _, l := range s.linking {
		if now.Before(l.ends) && l.account == nil && same(l.code, code) {
			found = l
		}
	}
	if found == nil {
		if t.n == 0 {
			t.since = now
		}
		t.n++
		s.tries[a.key()] = t
		return "", false
	}
	found.account = &a
	return found.person.Name, true
}
