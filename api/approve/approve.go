// Package approve is the recorder's API for people who decide: what waits for
// them, their decisions and their passkeys. What a person decides is put on
// record by the recorder itself and never passes through a broker.
package approve

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/go-webauthn/webauthn/protocol"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

const (
	// heartbeat is how often a stream of events says that it is alive, and looks
	// whether its reader's session still is.
	heartbeat = 15 * time.Second
	// maxStreams is how many streams of events are open at once.
	maxStreams = 1000
	// maxStreamsEach is how many of them one person may hold.
	maxStreamsEach = 20
)

// Pages render for a browser what the API answers in JSON. The caller of each
// has passed the guard; person is who it is.
type Pages interface {
	// Inbox shows a list of requests. f is what was asked for, next leads on to
	// older ones where it is not empty.
	Inbox(w http.ResponseWriter, r *http.Request, person approvals.Person, f approvals.Filter, list []approvals.Request, next string)
	// Show shows one request.
	Show(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request)
	// Decided answers a form's decision: err is why it did not count, nil where
	// it did. req is nil where it cannot be read.
	Decided(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request, d approvals.Decision, err error)
	// Passkeys shows all keys.
	Passkeys(w http.ResponseWriter, r *http.Request, person approvals.Person, keys []approvals.Passkey)
	// PasskeyChanged answers a form that activates or revokes a key: err is why
	// it did not, nil where it did.
	PasskeyChanged(w http.ResponseWriter, r *http.Request, person approvals.Person, err error)
	// Problem shows what went wrong.
	Problem(w http.ResponseWriter, r *http.Request, person approvals.Person, doc *problem.Problem)
	// Routes adds what is theirs alone: style, scripts, further forms.
	Routes(r chi.Router)
}

// Config is what a Server needs.
type Config struct {
	Approvals *approvals.Approvals
	Guard     *auth.Guard
	Pages     Pages        // nil: JSON alone
	People    *auth.People // for the fresh login of an enrolment; nil: nobody enrols here
}

// Server answers people who decide.
type Server struct {
	c     Config
	drain context.Context
	stop  context.CancelFunc

	mu      sync.Mutex
	streams map[string]int // open streams of events, by person
}

// New returns the API of c.Approvals. Where there are People, their fresh
// logins are its enrolments.
func New(c Config) *Server {
	s := &Server{c: c, streams: map[string]int{}}
	s.drain, s.stop = context.WithCancel(context.Background())
	if c.People != nil {
		c.People.OnFresh = s.enrolled
	}
	return s
}

// Drain ends what streams, so that a listener can shut down.
func (s *Server) Drain() { s.stop() }

// Routes adds the routes to r, whose limit of a body is server.MaxBody.
func (s *Server) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		if s.c.People != nil && s.c.Pages != nil {
			r.Use(s.c.People.ToLogin)
		}
		r.Use(s.c.Guard.Require(auth.Approver, auth.Reviewer))
		r.Get("/approvals", s.list)
		r.Get("/approvals/{id}", s.show)
		r.Get("/approvals/events", s.events)
		r.Get("/passkeys", s.passkeys)
	})
	r.Group(func(r chi.Router) {
		r.Use(s.c.Guard.Require(auth.Approver))
		r.Post("/approvals/{id}/challenge", s.challenge)
		r.Post("/approvals/{id}/decision", s.decide)
		r.Post("/passkeys/options", s.begin)
		r.Post("/passkeys", s.register)
		r.Post("/passkeys/{id}/activate", s.change((*approvals.Approvals).ActivatePasskey))
		r.Post("/passkeys/{id}/revoke", s.change((*approvals.Approvals).RevokePasskey))
		r.Delete("/passkeys/{id}", s.change((*approvals.Approvals).RevokePasskey))
		if s.c.Pages != nil {
			s.c.Pages.Routes(r)
		}
	})
}

// personOf is who calls, as approvals know people.
func personOf(r *http.Request) approvals.Person {
	p := auth.From(r.Context())
	return approvals.Person{Name: p.Person(), Groups: p.Groups}
}

// asPage reports whether the answer is a page.
func (s *Server) asPage(r *http.Request) bool {
	return s.c.Pages != nil && page.Wanted(r)
}

// isForm reports whether r carries a form of a page.
func isForm(r *http.Request) bool {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(media), "application/x-www-form-urlencoded")
}

// fail answers with the problem that err is.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	err = refusal(err)
	if s.asPage(r) {
		s.c.Pages.Problem(w, r, personOf(r), problem.From(err))
		return
	}
	problem.Write(w, r, err)
}

// answer sends v as JSON.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, v any) {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(b, '\n'))
}

// refusal says which problem an error of the approvals is.
func refusal(err error) error {
	var order *store.OrderError
	switch {
	case errors.As(err, &order):
		switch order.Code {
		case store.OrderSelf:
			return problem.SelfApproval("you are on the requester's side: its subject, or an owner of the orchestrator").Because(err)
		case store.OrderApprover:
			return problem.NotAnApprover("you are in none of the groups that decide this").Because(err)
		case store.OrderHours:
			return problem.NotAnApprover(order.Message + "; a denial is taken at any time").Because(err)
		case store.OrderPasskey:
			return problem.PasskeyRequired("an approval must be signed with a passkey of yours that is active").Because(err)
		case store.OrderReason:
			return problem.ReasonRequired("say why").Because(err)
		}
		// The whole refusal is a writer's to see, not a person's.
		return problem.RequestClosed(order.Message).Because(err)
	case errors.Is(err, approvals.ErrNotFound):
		return problem.NotFound("there is no such approval or passkey").Because(err)
	case errors.Is(err, approvals.ErrSignature):
		return problem.PasskeyRequired("the passkey's signature does not count: sign again, with a key of yours that is active").Because(err)
	case errors.Is(err, approvals.ErrPasskeyPerson):
		return problem.RoleForbidden("this passkey is not yours to activate or revoke").Because(err)
	case errors.Is(err, approvals.ErrPasskeyClosed):
		return problem.RequestClosed("the passkey is active or revoked already").Because(err)
	case errors.Is(err, approvals.ErrEnrolment):
		return problem.RequestClosed(err.Error()).Because(err)
	case errors.Is(err, approvals.ErrMalformed):
		return problem.Malformed(err.Error()).Because(err)
	}
	return err
}

// inbox is the answer of GET /approvals.
type inbox struct {
	Approvals []approvals.Request `json:"approvals"`
	Next      string              `json:"next,omitzero"`
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	person := personOf(r)
	f := approvals.Filter{Person: &person}
	for name, values := range r.URL.Query() {
		if len(values) != 1 {
			s.fail(w, r, problem.Malformed(fmt.Sprintf("%.50q is given %d times", name, len(values))))
			return
		}
		switch value := values[0]; name {
		case "state":
			f.State = value
		case "cursor":
			f.Before = value
		case "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				s.fail(w, r, problem.Malformed("limit: want a number from 1 on"))
				return
			}
			f.Limit = n
		default:
			s.fail(w, r, problem.Malformed(fmt.Sprintf("there is no filter %.50q", name)))
			return
		}
	}
	if f.State == "" && s.asPage(r) {
		f.State = approvals.StateMine // what a person opens the page for
	}
	list, next, err := s.c.Approvals.List(r.Context(), f)
	switch {
	case err != nil:
		s.fail(w, r, err)
	case s.asPage(r):
		s.c.Pages.Inbox(w, r, person, f, list, next)
	default:
		s.answer(w, r, inbox{list, next})
	}
}

func (s *Server) show(w http.ResponseWriter, r *http.Request) {
	req, err := s.c.Approvals.Get(r.Context(), chi.URLParam(r, "id"))
	switch {
	case err != nil:
		s.fail(w, r, err)
	case s.asPage(r):
		s.c.Pages.Show(w, r, personOf(r), req)
	default:
		s.answer(w, r, req)
	}
}

// decision is the body of a decision, and of a challenge, which has no
// assertion.
type decision struct {
	Decision  string         `json:"decision"`
	Reason    string         `json:"reason"`
	Standing  *standing      `json:"standing"`
	Assertion jsontext.Value `json:"assertion"`
}

type standing struct {
	Scopes []string  `json:"scopes"`
	Uses   int       `json:"uses"`
	Until  time.Time `json:"until"`
}

// read takes what a person decides from a body of JSON or of a page's form.
func (s *Server) read(r *http.Request) (approvals.Decision, error) {
	d := approvals.Decision{Via: "page"}
	if r.Header.Get("Authorization") != "" {
		d.Via = "token"
	}
	var in decision
	if isForm(r) {
		if err := r.ParseForm(); err != nil {
			return d, problem.Malformed("the form cannot be read").Because(err)
		}
		f := r.PostForm
		in.Decision, in.Reason = f.Get("decision"), f.Get("reason")
		if f.Get("standing") != "" && in.Decision == store.Approve {
			uses, err1 := strconv.Atoi(f.Get("standing_uses"))
			until, err2 := time.Parse(time.RFC3339, f.Get("standing_until"))
			if err := errors.Join(err1, err2); err != nil {
				return d, problem.Malformed("standing: want a number of uses and an end").Because(err)
			}
			in.Standing = &standing{Scopes: f["standing_scope"], Uses: uses, Until: until}
		}
	} else if err := server.Decode(r, &in); err != nil {
		return d, err
	}
	d.Decision, d.Reason = in.Decision, in.Reason
	if in.Standing != nil {
		d.Standing = &store.StandingTerms{Scopes: in.Standing.Scopes, Uses: in.Standing.Uses, Until: store.At(in.Standing.Until)}
	}
	if len(in.Assertion) > 0 && in.Assertion.Kind() != 'n' {
		a, err := protocol.ParseCredentialRequestResponseBytes(in.Assertion)
		if err != nil {
			return d, problem.Malformed("assertion: want the PublicKeyCredential that the browser gave (W3C WebAuthn, section 5.1)").Because(err)
		}
		d.Assertion = &approvals.Signed{
			Credential:        base64.RawURLEncoding.EncodeToString(a.RawID),
			AuthenticatorData: a.Raw.AssertionResponse.AuthenticatorData,
			ClientData:        a.Raw.AssertionResponse.ClientDataJSON,
			Signature:         a.Raw.AssertionResponse.Signature,
		}
	}
	return d, nil
}

func (s *Server) decide(w http.ResponseWriter, r *http.Request) {
	id, person := chi.URLParam(r, "id"), personOf(r)
	d, err := s.read(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	req, err := s.c.Approvals.Decide(r.Context(), person, id, d)
	if _, again := store.IsOrder(err, store.OrderDecided); again {
		// The first one counts, and this may be the repetition of a call whose
		// answer was lost: the state is the answer to both.
		req, err = s.c.Approvals.Get(r.Context(), id)
	}
	if isForm(r) && s.asPage(r) {
		if req == nil {
			req, _ = s.c.Approvals.Get(r.Context(), id) // where it cannot be read, the page says so
		}
		s.c.Pages.Decided(w, r, person, req, d, err)
		return
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, req)
}

// options is what a browser's script hands to navigator.credentials, but for
// the encoding of bytes: base64url, as in PublicKeyCredential.toJSON.
type options[T any] struct {
	PublicKey T `json:"publicKey"`
}

type descriptor struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

func descriptors(ids []string) []descriptor {
	out := make([]descriptor, len(ids))
	for i, id := range ids {
		out[i] = descriptor{"public-key", id}
	}
	return out
}

// requestOptions are those of W3C WebAuthn, section 5.5.
type requestOptions struct {
	Challenge        string       `json:"challenge"`
	RPID             string       `json:"rpId"`
	Timeout          int64        `json:"timeout"` // in milliseconds
	AllowCredentials []descriptor `json:"allowCredentials"`
	UserVerification string       `json:"userVerification"`
}

func (s *Server) challenge(w http.ResponseWriter, r *http.Request) {
	d, err := s.read(r)
	if err == nil && d.Assertion != nil {
		err = problem.Malformed("a challenge is asked for before there is an assertion")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	c, err := s.c.Approvals.Challenge(r.Context(), personOf(r), chi.URLParam(r, "id"), d)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, options[requestOptions]{requestOptions{
		Challenge: base64.RawURLEncoding.EncodeToString(c.Challenge), RPID: c.RPID, Timeout: approvals.ChallengeLife.Milliseconds(),
		AllowCredentials: descriptors(c.Credentials), UserVerification: "required",
	}})
}

func (s *Server) passkeys(w http.ResponseWriter, r *http.Request) {
	keys, err := s.c.Approvals.Passkeys(r.Context(), nil)
	switch {
	case err != nil:
		s.fail(w, r, err)
	case s.asPage(r):
		s.c.Pages.Passkeys(w, r, personOf(r), keys)
	default:
		s.answer(w, r, map[string]any{"passkeys": keys})
	}
}

// creationOptions are those of W3C WebAuthn, section 5.4.
type creationOptions struct {
	Challenge string `json:"challenge"`
	RP        struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	} `json:"rp"`
	User struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		DisplayName string `json:"displayName"`
	} `json:"user"`
	Params    []parameter  `json:"pubKeyCredParams"`
	Timeout   int64        `json:"timeout"` // in milliseconds
	Exclude   []descriptor `json:"excludeCredentials"`
	Selection struct {
		UserVerification string `json:"userVerification"`
		ResidentKey      string `json:"residentKey"`
	} `json:"authenticatorSelection"`
	Attestation string `json:"attestation"`
}

type parameter struct {
	Type string `json:"type"`
	Alg  int    `json:"alg"` // COSE algorithm
}

func (s *Server) begin(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Label string `json:"label"`
	}
	if err := server.Decode(r, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	e, err := s.c.Approvals.BeginEnrolment(r.Context(), personOf(r), in.Label)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	o := creationOptions{Challenge: e.ID, Timeout: approvals.EnrolmentLife.Milliseconds(), Exclude: descriptors(e.Exclude), Attestation: "none"}
	o.RP.ID, o.RP.Name = e.RPID, "Countersign"
	o.User.ID, o.User.Name, o.User.DisplayName = base64.RawURLEncoding.EncodeToString(e.UserID), e.User, e.User
	o.Selection.UserVerification, o.Selection.ResidentKey = "required", "preferred"
	for _, alg := range e.Algorithms {
		o.Params = append(o.Params, parameter{"public-key", alg})
	}
	s.answer(w, r, options[creationOptions]{o})
}

// register takes the passkey that a browser made, and sends the person to the
// provider for the fresh login that vouches for it.
func (s *Server) register(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Label      string         `json:"label"` // as given to options, which counts
		Credential jsontext.Value `json:"credential"`
	}
	err := server.Decode(r, &in)
	if err == nil && s.c.People == nil {
		err = problem.RoleForbidden("nobody logs in here, so nobody enrols a passkey here")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	id, nonce, err := s.c.Approvals.Register(r.Context(), personOf(r), in.Credential)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.c.People.Fresh(w, r, nonce, "/passkeys", id)
}

// enrolled takes a fresh login. A crash before it leaves a passkey in the
// browser alone; the person begins again.
func (s *Server) enrolled(ctx context.Context, f auth.Fresh) (string, error) {
	id, ok := f.Data.(string)
	if !ok {
		return "", problem.Internal(fmt.Errorf("a fresh login for a %T, which is no enrolment", f.Data))
	}
	_, err := s.c.Approvals.FinishEnrolment(ctx, approvals.Person{Name: f.Name, Groups: f.Groups}, id,
		approvals.Anchor{IDToken: f.IDToken, JWK: f.JWK, Issuer: f.Issuer, ClientID: f.ClientID})
	return "/passkeys", refusal(err)
}

// change is a call that activates or revokes a key.
func (s *Server) change(do func(*approvals.Approvals, context.Context, approvals.Person, string) (*approvals.Passkey, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		k, err := do(s.c.Approvals, r.Context(), personOf(r), chi.URLParam(r, "id"))
		switch {
		case s.asPage(r):
			s.c.Pages.PasskeyChanged(w, r, personOf(r), err)
		case err != nil:
			s.fail(w, r, err)
		default:
			s.answer(w, r, k)
		}
	}
}

// notice is the data of one event: what has changed, to be read anew by who
// wants more.
type notice struct {
	Kind     string       `json:"kind"`
	Approval string       `json:"approval,omitzero"`
	Status   store.Status `json:"status,omitzero"`
	Passkey  string       `json:"passkey,omitzero"`
}

// enter counts a stream of person in, unless there are too many.
func (s *Server) enter(person string) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := 0
	for _, n := range s.streams {
		all += n
	}
	if all >= maxStreams || s.streams[person] >= maxStreamsEach {
		return nil, false
	}
	s.streams[person]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.streams[person]--; s.streams[person] == 0 {
			delete(s.streams, person)
		}
	}, true
}

// events streams what happens (HTML, section 9.2, server-sent events) until the
// reader goes, its session ends, or the server drains.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	leave, ok := s.enter(personOf(r).Name)
	if !ok {
		problem.Write(w, r, problem.RateLimited("too many streams of events are open", heartbeat))
		return
	}
	defer leave()
	news, end := s.c.Approvals.Subscribe()
	defer end()
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no") // a proxy in between hands each event on at once
	rc := http.NewResponseController(w)
	send := func(text string) bool {
		server.Extend(w, 3*heartbeat)
		if _, err := w.Write([]byte(text)); err != nil {
			return false
		}
		return rc.Flush() == nil
	}
	if !send(": countersign\n\n") {
		return
	}
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		text := ": still here\n\n"
		select {
		case <-r.Context().Done():
			return
		case <-s.drain.Done():
			return
		case <-tick.C:
			if !s.alive(r) {
				return
			}
		case e, ok := <-news:
			if !ok {
				return
			}
			x := notice{Kind: e.Kind, Approval: e.Approval}
			if e.Request != nil {
				x.Status = e.Request.Status
			}
			if e.Passkey != nil {
				x.Passkey = e.Passkey.ID
			}
			b, err := json.Marshal(x)
			if err != nil {
				return
			}
			text = "event: " + e.Kind + "\ndata: " + string(b) + "\n\n"
		}
		if !send(text) {
			return
		}
	}
}

// alive reports whether whoever r let in is still let in.
func (s *Server) alive(r *http.Request) bool {
	if auth.From(r.Context()).Method == "session" && s.c.People != nil {
		return s.c.People.Live(r)
	}
	_, err := s.c.Guard.Authenticate(r)
	return err == nil
}
