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
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

// Errors of the access path. store.ErrUnavailable is wrapped where the recorder
// did not answer: then nothing may reach the target.
var (
	ErrNoSession = errors.New("no such session")          // unknown, ended, or not shown to be its holder's
	ErrEnded     = errors.New("the session has ended")    // while it was in use
	ErrNoGateway = errors.New("no such gateway protocol") // this gateway does not serve it
)

// Recorder is where uses are put on record, as broker.Recorder.
type Recorder interface {
	Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error)
}

// Ask opens a request for scope in the name of the step of s, waits for people
// as long as ctx allows, and returns the session of what was minted. The caller
// ends it. The error is a *Waiting where people have not decided in time.
type Ask func(ctx context.Context, s *Session, scope, reason string) (*Session, error)

// Waiting says that people are to decide, and where.
type Waiting struct {
	Request string
	URL     string // where people decide; empty where the broker was not told
}

func (e *Waiting) Error() string { return "request " + e.Request + " waits for approval" }

// Config is what a Gateway is made of.
type Config struct {
	Recorder  Recorder
	Addresses map[string]string // what steps are told, by protocol: postgres host:port, http and mcp a URL
	Now       func() time.Time  // time.Now by default
	Log       *zap.Logger       // none by default
}

// Gateway holds the sessions of one process. It is safe for concurrent use.
type Gateway struct {
	Config
	ask Ask

	mu       sync.Mutex
	byToken  map[[32]byte]*Session // by SHA-256 of the token
	byIntent map[string]*Session
}

// New returns a Gateway without sessions.
func New(c Config) *Gateway {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return &Gateway{Config: c, byToken: map[[32]byte]*Session{}, byIntent: map[string]*Session{}}
}

// Params are what a session is made of.
type Params struct {
	Story   *store.Entry // what its entries repeat: step.requested without details
	Owners  []string     // of the orchestrator, as broker.Caller has them
	Intent  string       // entry ID of the intent behind the credential
	Grant   store.Grant  // with Access
	Secret  *issuer.Credential
	Expires time.Time
}

// Session is one credential's access. It is safe for concurrent use.
type Session struct {
	Params
	g      *Gateway
	token  [32]byte
	ctx    context.Context // ends with the session
	cancel context.CancelCauseFunc
}

// Open begins a session and returns it with its token, which is not kept.
func (g *Gateway) Open(p Params) (*Session, string, error) {
	if p.Grant.Access == nil || g.Addresses[p.Grant.Access.Protocol] == "" {
		return nil, "", ErrNoGateway
	}
	raw := make([]byte, 32)
	_, _ = rand.Read(raw) // never fails (crypto/rand)
	token := base64.RawURLEncoding.EncodeToString(raw)
	s := &Session{Params: p, g: g, token: sha256.Sum256([]byte(token))}
	due, stop := context.WithDeadlineCause(context.Background(), p.Expires, ErrEnded)
	s.ctx, s.cancel = context.WithCancelCause(due)
	context.AfterFunc(s.ctx, func() { stop(); g.forget(s) })
	g.mu.Lock()
	defer g.mu.Unlock()
	g.byToken[s.token], g.byIntent[p.Intent] = s, s
	return s, token, nil
}

func (g *Gateway) forget(s *Session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.byToken, s.token)
	if g.byIntent[s.Intent] == s {
		delete(g.byIntent, s.Intent)
	}
}

// End ends the session of an intent, where there is one: its connections are
// cut at once.
func (g *Gateway) End(intent string) {
	g.mu.Lock()
	s := g.byIntent[intent]
	g.mu.Unlock()
	if s != nil {
		s.cancel(ErrEnded)
	}
}

// Session returns the session of a token. Tokens are looked up by digest, so
// that the time it takes tells nothing of them. The error is ErrNoSession.
func (g *Gateway) Session(token string) (*Session, error) {
	g.mu.Lock()
	s := g.byToken[sha256.Sum256([]byte(token))]
	g.mu.Unlock()
	if s == nil || s.ctx.Err() != nil {
		return nil, ErrNoSession
	}
	return s, nil
}

// Context ends when the session does: what is open for it must be cut then.
func (s *Session) Context() context.Context { return s.ctx }

// Use is one thing that a step asks of its target.
type Use struct {
	Use       string   // one line without values, as store.UsedDetails.Use
	Conn      string   // names the connection
	Objects   []string // as store.UsedDetails.Objects
	Statement string   // all that was asked; sealed
}

// Pending is a use that is on record and has no outcome yet.
type Pending struct {
	s     *Session
	id    string
	began time.Time
}

// Use puts uses on record, in order, all or none; what they ask for may reach
// the target only afterwards. The error wraps store.ErrUnavailable, or is
// ErrEnded.
//
// A crash after it leaves uses without an outcome, which may or may not have
// reached the target.
func (s *Session) Use(ctx context.Context, uses ...Use) ([]*Pending, error) {
	if s.ctx.Err() != nil {
		return nil, ErrEnded
	}
	subs := make([]*store.Submission, len(uses))
	for i, u := range uses {
		sub := s.submission(store.CredentialUsed)
		sub.SetDetails(store.UsedDetails{Intent: s.Intent, Via: store.ViaGateway, By: "gateway", Use: u.Use, Protocol: s.Grant.Access.Protocol,
			Conn: u.Conn, Objects: u.Objects, Access: s.Grant.Access.Digest(), Masking: s.Grant.Access.Masking.Digest()})
		sub.Seal(store.SealedStatement, u.Statement)
		subs[i] = sub
	}
	if _, err := s.g.Recorder.Append(ctx, subs...); err != nil {
		return nil, fmt.Errorf("record a use: %w", err)
	}
	out := make([]*Pending, len(uses))
	for i, sub := range subs {
		out[i] = &Pending{s: s, id: sub.ID, began: s.g.Now()}
	}
	return out, nil
}

// Finish says what came of a use, once; Use and Took of o are set here. sample
// is an excerpt of what came back, masked. It is put on record soon, and by
// Close at the latest.
func (p *Pending) Finish(o store.UseOutcome, sample string) {
	o.Use, o.Took = p.id, store.Duration(p.s.g.Now().Sub(p.began))
	sub := p.s.submission(store.UseFinished)
	sub.SetDetails(store.UseFinishedDetails{Outcomes: []store.UseOutcome{o}})
	sub.Seal(store.SealedSample, sample)
	if _, err := p.s.g.Recorder.Append(context.Background(), sub); err != nil {
		p.s.g.Log.Warn("an outcome could not be recorded", zap.Error(err))
	}
}

// Refusal is what a guard did not let through.
type Refusal struct {
	Use       string // as Use.Use
	Conn      string
	Statement string // all that was asked; sealed
	Reason    string // which guard, in words that hold no value
	Remote    string // IP address of the step, without port
}

// Refuse puts a refusal on record, before the step is told of it. Floods are
// folded, as store/refusal does.
func (s *Session) Refuse(ctx context.Context, r Refusal) error {
	sub := s.submission(store.AccessRefused)
	sub.SetDetails(store.RefusedDetails{Method: s.Grant.Access.Protocol, Route: r.Use, Problem: "scope-denied", Remote: r.Remote, Intent: s.Intent, Reason: r.Reason})
	sub.Seal(store.SealedStatement, r.Statement)
	_, err := s.g.Recorder.Append(ctx, sub)
	return err
}

func (s *Session) submission(t store.Type) *store.Submission {
	e := *s.Story
	e.V, e.ID, e.Type, e.WriterTime, e.Time, e.Writer, e.Sealed, e.Details = store.Version, store.NewID(), t, store.At(s.g.Now()), store.Time{}, "", nil, nil
	return &store.Submission{Entry: e}
}

// Ask is g's Ask, on behalf of s. Nothing can be asked for before OnAsk.
func (s *Session) Ask(ctx context.Context, scope, reason string) (*Session, error) {
	if s.g.ask == nil {
		return nil, ErrNoGateway
	}
	return s.g.ask(ctx, s, scope, reason)
}

// OnAsk sets what Session.Ask calls. It must be called before the first Open.
func (g *Gateway) OnAsk(ask Ask) { g.ask = ask }
