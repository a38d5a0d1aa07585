// Package gateway is the access path: a step holds a session token, the gateway
// holds the secret, and each use is on record before the target is reached. The
// protocols are in the folders below; this package keeps the sessions and
// writes the record for all of them.
//
// A session lives in the memory of the process that minted its credential, and
// nowhere else: it ends with its credential, or with that process.
package gateway

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/refusal"
	"github.com/countersign-dev/countersign/store/trust"
)

// Errors of the access path. store.ErrUnavailable is wrapped where the recorder
// did not answer: then nothing may reach the target.
var (
	ErrNoSession = errors.New("no such session")            // unknown, ended, or not shown to be its holder's
	ErrProof     = errors.New("not a good DPoP proof")      // wrapped beside ErrNoSession
	ErrEnded     = errors.New("the session has ended")      // while it was in use
	ErrNoGateway = errors.New("no such gateway protocol")   // this gateway does not serve it
	ErrFull      = errors.New("too many sessions are open") // Config.MaxSessions
	ErrTooLarge  = errors.New("too large to be on record")  // MaxStatement, MaxUses
	ErrDenied    = errors.New("not approved")               // Ask: policy or people said no
)

// Recorder is where uses are put on record, as broker.Recorder.
type Recorder interface {
	Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error)
}

// Ask opens a request for scope in the name of the step of s, waits for people
// as long as ctx allows, and returns the session of what was minted. The caller
// ends it, by Close. reason is what people read: it says what the call is, its
// arguments included, since calls of one step with the same reason are one
// request until its credential is collected. The error is a *Waiting where
// people have not decided in time, and wraps ErrDenied where it was decided
// against.
type Ask func(ctx context.Context, s *Session, scope, reason string) (*Session, error)

// Waiting says that people are to decide, and where.
type Waiting struct {
	Request string
	URL     string // where people decide; empty where the broker was not told
}

func (e *Waiting) Error() string { return "request " + e.Request + " waits for approval" }

// Config is what a Gateway is made of.
type Config struct {
	Recorder    Recorder
	TrustDomain string            // of the SPIFFE ID under which those stand who show no token
	Addresses   map[string]string // what steps are told, by protocol: postgres host:port, http and mcp a URL
	Upstreams   map[string]string // host:port that is dialled, by the host, or host:port, that a catalogue names; others are dialled as named
	Targets     *trust.Trust      // whom targets' certificates are checked against; nil: the system's
	MaxSessions int               // open at once; 0: any number
	Now         func() time.Time  // time.Now by default
	Log         *zap.Logger       // none by default
	Observer    Observer          // who is told what goes on
}

// Observer is told what goes on at a gateway, by functions that may be nil and
// are to be quick.
type Observer struct {
	// Using is told that n uses of s are about to go on record; done is called
	// with what came of it.
	Using func(ctx context.Context, s *Session, n int) (done func(error))
	// Refused is told of what was not let through: of who showed no valid token
	// (known is false), or of a session by a guard.
	Refused func(protocol string, known bool)
}

// Gateway holds the sessions of one process. It is safe for concurrent use.
type Gateway struct {
	Config
	ask    Ask
	record *recording
	dialer net.Dialer

	strangers *refusal.Log // who shows no token

	mu       sync.Mutex
	closed   bool
	byToken  map[[32]byte]*Session // by SHA-256 of the token
	byIntent map[string]*Session
}

// New returns a Gateway without sessions. It is to be closed.
func New(c Config) *Gateway {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	upstreams := map[string]string{}
	for host, to := range c.Upstreams {
		upstreams[strings.ToLower(host)] = to
	}
	c.Upstreams = upstreams
	g := &Gateway{Config: c, record: newRecording(c), dialer: net.Dialer{Timeout: dialWithin},
		byToken: map[[32]byte]*Session{}, byIntent: map[string]*Session{}}
	g.strangers = refusal.New(c.Log, g.record.refused, func(s *store.Submission) string { return s.Action })
	return g
}

// Close ends all sessions and puts on record what is still to be; what the
// recorder does not take within 5 s is lost, and logged by number. Nothing can
// be opened or used afterwards.
func (g *Gateway) Close() {
	g.mu.Lock()
	g.closed = true
	open := make([]*Session, 0, len(g.byIntent))
	for _, s := range g.byIntent {
		open = append(open, s)
	}
	g.mu.Unlock()
	for _, s := range open {
		s.Close()
	}
	g.strangers.Close()
	g.record.close()
}

// Serves says why a session for access could not be opened now, or nil:
// ErrNoGateway or ErrFull.
func (g *Gateway) Serves(access *store.Access) error {
	if access == nil || g.Addresses[access.Protocol] == "" {
		return ErrNoGateway
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.MaxSessions > 0 && len(g.byIntent) >= g.MaxSessions {
		return ErrFull
	}
	return nil
}

// Params are what a session is made of.
type Params struct {
	Story   *store.Entry // what its entries repeat: step.requested without details
	Owners  []string     // of the orchestrator, as broker.Caller has them
	Subject string       // on whose behalf, as the orchestrator named it
	Proved  bool         // the subject was proved by a token
	Intent  string       // entry ID of the intent behind the credential
	Grant   store.Grant  // with Access
	Secret  *issuer.Credential
	Expires time.Time
	// Opened is the context of the call that opens it, nil for none: for an
	// Observer, who is to take nothing of it but values.
	Opened context.Context
}

// Session is one credential's access. It is safe for concurrent use.
type Session struct {
	Params
	g       *Gateway
	token   [32]byte
	proof   *proof          // nil: the token alone is enough
	ctx     context.Context // ends with the session
	cancel  context.CancelCauseFunc
	timer   *time.Timer // its end
	access  string      // Access.Digest
	masking string      // Masking.Digest
	base    int         // bytes of an entry of its that says nothing of its own

	mu       sync.Mutex
	refusals *refusal.Log       // nil before the first
	outcomes []store.UseOutcome // not on their way to the record yet
	samples  []string           // beside outcomes, nil where there are none
	sampled  int                // bytes of samples at most, as they are submitted
}

// Open begins a session and returns it with its token, which is not kept. A
// grant with a public key is for whoever proves to hold the key (RFC 9449); it
// must be a JWK of P-256 or Ed25519, and of a protocol over HTTP. Errors are
// ErrNoGateway and ErrFull, or say what is wrong with the key.
func (g *Gateway) Open(p Params) (*Session, string, error) {
	if p.Grant.Access == nil || g.Addresses[p.Grant.Access.Protocol] == "" {
		return nil, "", ErrNoGateway
	}
	raw := make([]byte, 32)
	_, _ = rand.Read(raw) // never fails (crypto/rand)
	token := base64.RawURLEncoding.EncodeToString(raw)
	s := &Session{Params: p, g: g, token: sha256.Sum256([]byte(token)),
		access: p.Grant.Access.Digest(), masking: p.Grant.Access.Masking.Digest()}
	if p.Grant.PublicKey != "" {
		if p.Grant.Access.Protocol == store.ProtocolPostgres {
			return nil, "", errors.New("a PostgreSQL session cannot be bound to a key")
		}
		var err error
		if s.proof, err = newProof(p.Grant.PublicKey, token); err != nil {
			return nil, "", fmt.Errorf("public_key: %w", err)
		}
	}
	b, err := s.used(Use{Statement: "x"}).Marshal()
	if err != nil {
		return nil, "", fmt.Errorf("%w: %v", store.ErrMalformed, err)
	}
	s.base = len(b)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.closed:
		return nil, "", ErrNoGateway
	case g.MaxSessions > 0 && len(g.byIntent) >= g.MaxSessions:
		return nil, "", ErrFull
	}
	g.byToken[s.token], g.byIntent[p.Intent] = s, s
	s.timer = time.AfterFunc(p.Expires.Sub(g.Now()), s.Close)
	return s, token, nil
}

// Close ends the session: its connections are cut at once. What came of its
// uses goes on record in the background.
func (s *Session) Close() {
	s.g.mu.Lock()
	delete(s.g.byToken, s.token)
	if s.g.byIntent[s.Intent] == s {
		delete(s.g.byIntent, s.Intent)
	}
	s.g.mu.Unlock()
	s.timer.Stop()
	s.cancel(ErrEnded)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flush()
	if s.refusals != nil {
		s.g.record.background(s.refusals.Close)
		s.refusals = nil
	}
}

// End ends the session of an intent, where there is one: its connections are
// cut at once.
func (g *Gateway) End(intent string) {
	g.mu.Lock()
	s := g.byIntent[intent]
	g.mu.Unlock()
	if s != nil {
		s.Close()
	}
}

// Has reports whether the intent has a session.
func (g *Gateway) Has(intent string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.byIntent[intent] != nil
}

// Sessions are how many sessions are open, by protocol.
func (g *Gateway) Sessions() map[string]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := map[string]int{}
	for _, s := range g.byIntent {
		n[s.Grant.Access.Protocol]++
	}
	return n
}

// Session returns the session of a token, where the token alone is enough.
// Tokens are looked up by digest, so that the time it takes tells nothing of
// them. The error is ErrNoSession.
func (g *Gateway) Session(token string) (*Session, error) {
	if s := g.holder(token); s != nil && s.proof == nil {
		return s, nil
	}
	return nil, ErrNoSession
}

func (g *Gateway) holder(token string) *Session {
	digest := sha256.Sum256([]byte(token))
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.byToken[digest]; s != nil && s.ctx.Err() == nil {
		return s
	}
	return nil
}

// Context ends when the session does: what is open for it must be cut then.
func (s *Session) Context() context.Context { return s.ctx }

// Ask is g's Ask, on behalf of s. Nothing can be asked for before OnAsk.
func (s *Session) Ask(ctx context.Context, scope, reason string) (*Session, error) {
	if s.g.ask == nil {
		return nil, ErrNoGateway
	}
	return s.g.ask(ctx, s, scope, reason)
}

// OnAsk sets what Session.Ask calls. It must be called before the first Open.
func (g *Gateway) OnAsk(ask Ask) { g.ask = ask }
