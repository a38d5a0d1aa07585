// Package approvals is the people's side of a request: it shows what is asked,
// takes decisions, and sees to it that a request ends when its time is over.
// Nothing of it is kept but what the ledger holds: what is open is rebuilt from
// entries, and whether a decision counts is the ledger's to say, which takes
// them one after the other.
package approvals

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/refusal"
)

// Catalogue is the recorder's own copy of the catalogue, see scopes.InForce.
type Catalogue interface{ Current() *scopes.Set }

// Config is what Approvals needs. All fields without a remark must be set.
type Config struct {
	Ledger      *ledger.Ledger
	Name        string // the recorder's, stamped as writer on what it appends
	TrustDomain string // of its SPIFFE ID
	Scopes      Catalogue
	// Owners are those of each orchestrator, as "user:NAME". They do not decide
	// on its requests, whatever a broker says of them.
	Owners     map[string][]string
	PrivacyKey store.PrivacyKey
	Origin     string // the log's name, in what people sign
	BaseURL    string // of the page, such as http://localhost:8788
	// ActivateAfter is when a passkey that nobody revoked is active by itself.
	// Zero: only a second person activates it.
	ActivateAfter time.Duration
	// PasskeyAdmins are the groups whose members may revoke others' passkeys.
	// Where there are any, only they activate those of others.
	PasskeyAdmins []string
	NameClaim     string           // of ID tokens, names the person; "preferred_username" where empty
	Now           func() time.Time // the ledger's clock; time.Now where nil
	Log           *zap.Logger      // none where nil
}

// Person is who is logged in.
type Person struct {
	Name   string   `json:"name"` // "user:NAME"
	Groups []string `json:"groups"`
}

// Errors of this package. Refusals by a rule are *store.OrderError, and a
// ledger that does not answer is store.ErrUnavailable.
var (
	// ErrNotFound: there is no such approval or passkey.
	ErrNotFound = errors.New("no such approval or passkey")
	// ErrSignature is wrapped by every reason why a passkey's signature does not
	// count: it does not verify, or the key is unknown, not active or revoked.
	ErrSignature = errors.New("the signature does not count")
	// ErrMalformed is wrapped by errors about input that makes no sense.
	ErrMalformed = errors.New("malformed")
	// ErrEnrolment is wrapped by every reason why a passkey is not enrolled.
	ErrEnrolment = errors.New("the passkey cannot be enrolled")
	// ErrPasskeyPerson refuses a person to whom a passkey is not to activate or
	// revoke.
	ErrPasskeyPerson = errors.New("the passkey is not this person's to activate or revoke")
	// ErrPasskeyClosed refuses to activate a key that is active or revoked, and
	// to revoke one that is revoked.
	ErrPasskeyClosed = errors.New("the passkey is not in a state that allows this")
)

// Approvals takes decisions of people on requests. It is safe for concurrent
// use.
type Approvals struct {
	c      Config
	rpID   string // relying party: the host of BaseURL
	web    string // origin of BaseURL
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu      sync.Mutex
	state   *store.State      // requests that people were asked about, and are not forgotten
	asked   []asked           // by index; those of the last days, and all that are open
	byID    map[string]string // approval to request, of asked
	next    int64             // entries below it are known
	moved   chan struct{}     // closed and replaced when next grows
	due     time.Time         // nothing expires before; zero: unknown
	subs    map[*subscriber]bool
	tidied  time.Time
	keyDue  time.Time // no key is active by itself before; zero: unknown
	refused *refusal.Log

	challenges pending[challenge]
	enrolments pending[enrolment]
	keys       sync.RWMutex // held to read while a signature counts, to write while a key changes
}

// New rebuilds what is open from the ledger, and begins to follow it and to end
// what is over.
func New(ctx context.Context, c Config) (*Approvals, error) {
	u, err := url.Parse(c.BaseURL)
	switch {
	case c.Ledger == nil || c.Name == "" || c.TrustDomain == "" || c.Scopes == nil || len(c.PrivacyKey) < 32 || c.Origin == "":
		return nil, errors.New("approvals need a ledger, the recorder's name and trust domain, a catalogue, a privacy key and the log's name")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil:
		return nil, fmt.Errorf("approvals: base URL %q: want https://HOST, or http://localhost:PORT", c.BaseURL)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.NameClaim == "" {
		c.NameClaim = "preferred_username"
	}
	a := &Approvals{
		c: c, rpID: u.Hostname(), web: u.Scheme + "://" + u.Host,
		moved: make(chan struct{}), state: store.NewReplay(), byID: map[string]string{}, subs: map[*subscriber]bool{},
		challenges: pending[challenge]{life: ChallengeLife}, enrolments: pending[enrolment]{life: EnrolmentLife},
	}
	a.c.BaseURL = a.web
	a.refused = refusal.New(c.Log, func(ctx context.Context, s *store.Submission) error { _, err := a.append(ctx, s); return err }, kindOf)
	if err := a.load(ctx); err != nil {
		return nil, fmt.Errorf("rebuilding the approvals: %w", err)
	}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.tasks.Add(2)
	go a.followLoop()
	go a.clockLoop()
	return a, nil
}

// Close ends what New began, and puts on record what refusals are still folded.
// Subscribers' channels are closed.
func (a *Approvals) Close() error {
	a.cancel()
	a.tasks.Wait()
	a.refused.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for s := range a.subs {
		close(s.c)
	}
	clear(a.subs)
	return nil
}

// pseudonym is how p stands in leaves.
func (a *Approvals) pseudonym(p Person) string { return a.c.PrivacyKey.Pseudonym(p.Name) }

// entry begins an entry that the recorder writes in its own name.
func (a *Approvals) entry(t store.Type, action string) *store.Submission {
	return &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(a.c.Now()),
		Agent: "spiffe://" + a.c.TrustDomain + "/recorder/" + a.c.Name, Action: action,
	}}
}

// appendWithin is how long an entry may take to be on record.
const appendWithin = 10 * time.Second

// append puts s on record as the recorder.
func (a *Approvals) append(ctx context.Context, s *store.Submission) (*store.Appended, error) {
	line, err := s.Marshal()
	if err != nil {
		return nil, fmt.Errorf("recording %s: %w", s.Type, err)
	}
	// A ledger that hangs must not keep a person waiting for ever: what becomes of
	// the entry then is on record, or is not, and they look again.
	ctx, cancel := context.WithTimeout(ctx, appendWithin)
	defer cancel()
	out, err := a.c.Ledger.Append(ctx, ledger.Author{Name: a.c.Name, Recorder: true}, [][]byte{line})
	if err != nil {
		return nil, fmt.Errorf("recording %s: %w", s.Type, err)
	}
	return out, nil
}
