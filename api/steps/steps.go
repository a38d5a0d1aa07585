// Package steps is the orchestrators' API: a step's credential, its end, where
// a request stands, what may be asked for; beside it what resource servers and
// the public may read. Every answer but the one that hands a credential over
// is free of secrets.
package steps

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// MaxWait is the longest time that a call may ask to wait (Prefer: wait).
const MaxWait = 300 * time.Second

// Discovery is what is published of the keys of step identities.
type Discovery interface {
	Discovery() jsontext.Value
	JWKS() jsontext.Value
}

// Config is what the API is made of.
type Config struct {
	Broker   *broker.Broker
	Identity Discovery   // nil: nothing is published
	Guard    *auth.Guard // who may call
	// Subject checks a subject_token and returns the subject it proves. Nil:
	// the Guard's OIDC providers do; without any, subjects are claimed, never
	// proved, and a token is refused.
	Subject func(ctx context.Context, token string) (string, error)
	// Asked is told of each call for a credential: the scope as the caller wrote
	// it, empty where the call was not understood, and "issued", "pending" or the
	// slug of the problem that was answered. Nil: nobody is.
	Asked func(ctx context.Context, scope, outcome string)
	Log   *zap.Logger
}

// New returns the listener's handler.
func New(c Config) http.Handler {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.Subject == nil && c.Guard.OIDC != nil {
		c.Subject = c.Guard.OIDC.Subject
	}
	a := &handlers{Config: c}
	r := server.NewRouter(c.Log, server.MaxBody)
	r.Group(func(r chi.Router) {
		r.Use(c.Guard.Require(auth.Orchestrator))
		r.Post("/steps/{step}/credential", answer(a.credential))
		r.Delete("/steps/{step}/credential", answer(a.revoke))
		r.Post("/steps/{step}/result", answer(a.result))
		r.Get("/requests/{id}", answer(a.request))
		r.Delete("/requests/{id}", answer(a.withdraw))
		r.Get("/scopes", answer(a.scopes))
	})
	r.With(c.Guard.Require(auth.ResourceServer)).Post("/introspect", answer(a.introspect))
	if c.Identity != nil {
		r.Get("/.well-known/openid-configuration", published(c.Identity.Discovery))
		r.Get("/.well-known/jwks.json", published(c.Identity.JWKS))
	}
	r.Get("/openapi.yaml", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/yaml") // RFC 9512
		_, _ = w.Write(api.OpenAPI)
	})
	r.Get("/healthz", answer(a.alive))
	r.Get("/readyz", answer(a.ready))
	return r
}

type handlers struct{ Config }

func (a *handlers) who(r *http.Request) broker.Caller {
	p := auth.From(r.Context())
	return broker.Caller{Orchestrator: p.Name, Owners: p.Owners}
}

// answer writes what a handler could not do as the problem that it is: the one
// place where errors of the flow become problem documents.
func answer(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			problem.Write(w, r, toProblem(err))
		}
	}
}

func send(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return problem.Internal(fmt.Errorf("an answer does not marshal: %T", v)) // err could quote a secret
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
	return nil
}

// credentialBody is the body of POST /steps/{step}/credential.
type credentialBody struct {
	Run          string         `json:"run"`
	Scope        string         `json:"scope"`
	TTL          string         `json:"ttl"`
	Reason       string         `json:"reason"`
	Subject      string         `json:"subject"`
	SubjectToken string         `json:"subject_token"`
	Params       map[string]any `json:"params"`
	Delivery     string         `json:"delivery"`
	PublicKey    string         `json:"public_key"`
	Audience     string         `json:"audience"`
	Receipt      bool           `json:"receipt"`
}

// issued is the answer that hands a credential over.
type issued struct {
	Request    string             `json:"request"`
	Step       issuedStep         `json:"step"`
	Scope      string             `json:"scope"`
	Target     string             `json:"target"`
	Credential *issuer.Credential `json:"credential"`
	IssuedAt   string             `json:"issued_at"`
	ExpiresAt  string             `json:"expires_at"`
	ExpiresIn  int64              `json:"expires_in"` // seconds
	Approval   *approved          `json:"approval"`   // null: nobody had to approve
	Ledger     place              `json:"ledger"`
	Receipt    string             `json:"receipt,omitzero"`
}

// approved says which decisions a credential rests on. Who took them is the
// record's to say, to those who may read it.
type approved struct {
	ID        string `json:"id"`
	Request   string `json:"request"` // whose decisions they are: an earlier one's of the run, where that was approved for all of it
	DecidedBy int    `json:"decided_by"`
}

func approvedOf(a *broker.Approved) *approved {
	if a == nil {
		return nil
	}
	return &approved{a.ID, a.Request, a.People}
}

type issuedStep struct {
	ID       string `json:"id"`
	Run      string `json:"run"`
	Identity string `json:"identity"`
}

type place struct {
	Index    int64  `json:"index"`
	LeafHash string `json:"leaf_hash"`
}

// standing is where a request stands, in every answer that hands nothing over.
type standing struct {
	Request   string       `json:"request"`
	Status    store.Status `json:"status"`
	Run       string       `json:"run,omitzero"`
	Step      string       `json:"step,omitzero"`
	Scope     string       `json:"scope,omitzero"`
	ExpiresAt string       `json:"expires_at,omitzero"`
	Approval  *waiting     `json:"approval,omitzero"`
}

// waiting says whom a request waits for, and where they decide.
type waiting struct {
	ID        string `json:"id"`
	URL       string `json:"url,omitzero"`
	Needs     []need `json:"needs"`
	ExpiresAt string `json:"expires_at"`
}

type need struct {
	Group    string `json:"group"`
	Count    int    `json:"count"`
	Approved int    `json:"approved"`
}

func waitingOf(w *broker.Waiting) *waiting {
	if w == nil {
		return nil
	}
	out := &waiting{ID: w.ID, URL: w.URL, Needs: []need{}, ExpiresAt: stamp(w.Expires)}
	for _, n := range w.Needs {
		out.Needs = append(out.Needs, need(n))
	}
	return out
}

// readAsk reads a call for a credential, and its body, which is never nil.
func readAsk(r *http.Request) (broker.Ask, *credentialBody, error) {
	none := &credentialBody{}
	step, err := pathID(r, "step")
	if err != nil {
		return broker.Ask{}, none, err
	}
	key, err := idempotencyKey(r.Header.Values("Idempotency-Key"))
	if err != nil {
		return broker.Ask{}, none, err
	}
	raw, err := server.Body(r)
	if err != nil {
		return broker.Ask{}, none, err
	}
	body, canonical, err := decodeCredential(raw)
	if err != nil {
		return broker.Ask{}, none, err
	}
	return broker.Ask{
		Step: step, Run: body.Run, Scope: body.Scope, TTL: body.TTL, Reason: body.Reason, Subject: body.Subject,
		Params: body.Params, Delivery: body.Delivery, PublicKey: body.PublicKey, Audience: body.Audience,
		Receipt: body.Receipt, Key: key, Body: canonical, Wait: preferWait(r.Header.Values("Prefer")), Arrived: server.Arrived(r.Context()),
	}, body, nil
}

// rateHeaders says what the caller has of its rates, as
// draft-ietf-httpapi-ratelimit-headers-10 has it. The quota is the burst of a
// rate, its window the time in which all of it is refilled; times are in whole
// seconds, rounded up.
func rateHeaders(h http.Header, quotas []broker.Quota) {
	seconds := func(d time.Duration) int64 { return int64((d.Round(time.Millisecond) + time.Second - 1) / time.Second) }
	var policies, left []string
	for _, q := range quotas {
		policies = append(policies, fmt.Sprintf("%q;q=%d;w=%d", q.Of, q.Burst, seconds(q.Window)))
		left = append(left, fmt.Sprintf("%q;r=%d;t=%d", q.Of, q.Remaining, seconds(q.Reset)))
	}
	if len(quotas) > 0 {
		h.Set("RateLimit-Policy", strings.Join(policies, ", "))
		h.Set("RateLimit", strings.Join(left, ", "))
	}
}

// credential answers a call for a credential. What a limit refuses is on record
// as access.refused, folded, and as nothing else.
func (a *handlers) credential(w http.ResponseWriter, r *http.Request) error {
	var what asked
	err := a.issue(w, r, &what)
	if a.Asked != nil {
		if err != nil {
			what.outcome = problem.From(toProblem(err)).Slug()
		}
		a.Asked(r.Context(), what.scope, what.outcome)
	}
	var limited *broker.Limited
	var doc *problem.Problem
	if errors.As(err, &limited) && errors.As(toProblem(err), &doc) {
		a.Guard.Refuse(w, r, doc)
		return nil
	}
	return err
}

// asked is what Config.Asked is told.
type asked struct{ scope, outcome string }

func (a *handlers) issue(w http.ResponseWriter, r *http.Request, what *asked) error {
	ask, body, unread := readAsk(r)
	what.scope = ask.Scope
	quotas, err := a.Broker.Charge(r.Context(), a.who(r), ask.Scope)
	rateHeaders(w.Header(), quotas)
	if err != nil {
		return err
	}
	if unread != nil {
		return unread
	}
	if body.SubjectToken != "" {
		if a.Subject == nil {
			return problem.ParamsInvalid("subject_token is not accepted here: no provider of subjects is configured")
		}
		subject, err := a.Subject(r.Context(), body.SubjectToken)
		if err != nil {
			return problem.ParamsInvalid("subject_token does not verify").Because(err)
		}
		if body.Subject != "" && body.Subject != subject {
			return problem.ParamsInvalid("subject_token proves another subject than the one named")
		}
		ask.Subject, ask.Proved = subject, true
	}
	reply, err := a.Broker.Request(r.Context(), a.who(r), ask)
	if err != nil {
		return err
	}
	if reply.Credential == nil {
		what.outcome = "pending"
		w.Header().Set("Location", "/requests/"+reply.Request)
		w.Header().Set("Retry-After", "1")
		return send(w, http.StatusAccepted, standing{Request: reply.Request, Status: reply.Status, Approval: waitingOf(reply.Waiting)})
	}
	// Also where the write fails: a call that comes after it is a retry.
	defer reply.Answered()
	what.outcome = "issued"
	return send(w, http.StatusCreated, issued{
		Request: reply.Request, Step: issuedStep{ID: reply.Step, Run: reply.Run, Identity: reply.Identity},
		Scope: reply.Scope, Target: reply.Target, Credential: reply.Credential,
		IssuedAt: stamp(reply.IssuedAt), ExpiresAt: stamp(reply.Expires),
		ExpiresIn: int64(reply.Expires.Sub(reply.IssuedAt).Round(time.Second) / time.Second),
		Approval:  approvedOf(reply.Approved),
		Ledger:    place{reply.Index, reply.LeafHash}, Receipt: reply.Receipt,
	})
}

// decodeCredential reads the body of a call for a credential, and returns it
// with its canonical form (RFC 8785), by which two bodies are the same.
func decodeCredential(raw []byte) (*credentialBody, []byte, error) {
	var body credentialBody
	if err := server.Unmarshal(raw, &body); err != nil {
		return nil, nil, err
	}
	v := jsontext.Value(raw).Clone()
	if err := v.Canonicalize(); err != nil {
		return nil, nil, problem.Malformed("the body is no valid JSON")
	}
	if !store.ValidID(body.Run) {
		return nil, nil, problem.Malformed("run is due, and of the form [A-Za-z0-9][A-Za-z0-9._-]{0,127}")
	}
	if body.Scope == "" {
		return nil, nil, problem.Malformed("scope is due")
	}
	for name, s := range map[string]struct {
		text  string
		limit int
		lines bool // line breaks and tabs are part of it
	}{
		"scope": {body.Scope, 256, false}, "ttl": {body.TTL, 64, false}, "subject": {body.Subject, 512, false},
		"delivery": {body.Delivery, 32, false}, "audience": {body.Audience, 512, false},
		"reason": {body.Reason, 4096, true}, "public_key": {body.PublicKey, 16 << 10, true},
		"subject_token": {body.SubjectToken, 16 << 10, false},
	} {
		if err := plainText(name, s.text, s.limit, s.lines); err != nil {
			return nil, nil, err
		}
	}
	return &body, v, nil
}

// plainText refuses texts that are too long or hold control characters: they
// end up on pages and terminals of people.
func plainText(name, text string, limit int, lines bool) error {
	if name == "subject" && (strings.TrimSpace(text) != text || strings.ContainsFunc(text, func(c rune) bool { return unicode.Is(unicode.Cf, c) })) {
		return problem.Malformed("subject begins or ends with a space, or holds a character that is not seen")
	}
	if utf8.RuneCountInString(text) > limit {
		return problem.Malformed(fmt.Sprintf("%s is too long, at most %d characters", name, limit))
	}
	for _, c := range text {
		if unicode.IsControl(c) && !(lines && (c == '\n' || c == '\r' || c == '\t')) || reorders(c) {
			return problem.Malformed(name + " holds a control character")
		}
	}
	return nil
}

// reorders reports whether c makes text look other than it reads (Unicode UAX
// 9: embeddings, overrides and isolates), or begins a line unseen. The marks
// that right-to-left text needs are none of these.
func reorders(c rune) bool {
	return c >= 0x202a && c <= 0x202e || c >= 0x2066 && c <= 0x2069 || c == 0x2028 || c == 0x2029
}

func (a *handlers) revoke(w http.ResponseWriter, r *http.Request) error {
	step, err := pathID(r, "step")
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil || len(query["run"]) != 1 || !store.ValidID(query.Get("run")) {
		return problem.Malformed("name one run: ?run=ID")
	}
	done, err := a.Broker.RevokeStep(r.Context(), a.who(r), step, query.Get("run"))
	if err != nil {
		return err
	}
	return sendRevoked(w, done)
}

type revoked struct {
	Revoked     int `json:"revoked"`
	Pending     int `json:"pending"`
	Irrevocable int `json:"irrevocable,omitzero"` // end by their own time alone
}

// sendRevoked answers 200 when all is done, and 202 while Vault has not
// confirmed all of it: the broker goes on trying.
func sendRevoked(w http.ResponseWriter, d broker.Revoked) error {
	status := http.StatusOK
	if d.Pending > 0 {
		status = http.StatusAccepted
		w.Header().Set("Retry-After", "1")
	}
	return send(w, status, revoked{d.Revoked, d.Pending, d.Irrevocable})
}

func (a *handlers) result(w http.ResponseWriter, r *http.Request) error {
	step, err := pathID(r, "step")
	if err != nil {
		return err
	}
	var body struct {
		Run     string `json:"run"`
		Outcome string `json:"outcome"`
		Summary string `json:"summary"`
		Target  string `json:"target"`
	}
	if err := server.Decode(r, &body); err != nil {
		return err
	}
	if err := plainText("summary", body.Summary, 8192, true); err != nil {
		return err
	}
	if err := plainText("target", body.Target, 512, false); err != nil {
		return err
	}
	done, err := a.Broker.Finish(r.Context(), a.who(r), broker.Result{
		Step: step, Run: body.Run, Outcome: body.Outcome, Summary: body.Summary, Target: body.Target})
	if err != nil {
		return err
	}
	return sendRevoked(w, done)
}

func (a *handlers) request(w http.ResponseWriter, r *http.Request) error {
	id, err := url.PathUnescape(chi.URLParam(r, "id"))
	if err != nil {
		return broker.ErrNotFound
	}
	v, err := a.Broker.Get(r.Context(), a.who(r), id)
	if err != nil {
		return err
	}
	s := standing{Request: v.Request, Status: v.Status, Run: v.Run, Step: v.Step, Scope: v.Scope, Approval: waitingOf(v.Waiting)}
	if !v.Expires.IsZero() {
		s.ExpiresAt = stamp(v.Expires)
	}
	return send(w, http.StatusOK, s)
}

func (a *handlers) withdraw(w http.ResponseWriter, r *http.Request) error {
	id, err := url.PathUnescape(chi.URLParam(r, "id"))
	if err != nil {
		return broker.ErrNotFound
	}
	if err := a.Broker.Withdraw(r.Context(), a.who(r), id); err != nil {
		return err
	}
	return send(w, http.StatusOK, standing{Request: id, Status: store.StatusWithdrawn})
}

type offer struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitzero"`
	Target      string   `json:"target"`
	Sensitivity string   `json:"sensitivity"`
	Engine      string   `json:"engine"`
	MaxTTL      string   `json:"max_ttl"`
	DefaultTTL  string   `json:"default_ttl"`
	Revocable   bool     `json:"revocable"`
	Approval    bool     `json:"needs_approval"`
	Delivery    []string `json:"delivery"`
	Protocol    string   `json:"protocol,omitzero"` // of the access path, where delivery gateway is one of them
	Audience    []string `json:"audience,omitzero"`
	Params      []param  `json:"params"`
}

type param struct {
	Name        string   `json:"name"`
	Type        string   `json:"type"`
	Description string   `json:"description,omitzero"`
	Required    bool     `json:"required"`
	Default     *string  `json:"default,omitzero"`
	Pattern     string   `json:"pattern,omitzero"`
	MaxLength   int      `json:"max_length,omitzero"`
	Min         *int64   `json:"min,omitzero"`
	Max         *int64   `json:"max,omitzero"`
	Values      []string `json:"values,omitzero"`
}

func (a *handlers) scopes(w http.ResponseWriter, r *http.Request) error {
	list := []offer{}
	for _, s := range a.Broker.Offers(a.who(r)) {
		o := offer{
			Name: s.Name, Description: s.Description, Target: s.Target, Sensitivity: s.Sensitivity, Engine: string(s.Engine),
			MaxTTL: s.MaxTTL.String(), DefaultTTL: s.DefaultTTL.String(), Revocable: s.Revocable, Approval: s.Approval != nil,
			Delivery: append([]string{}, s.Delivery...), Audience: s.Audience, Params: []param{},
		}
		if s.Access != nil {
			o.Protocol = s.Access.Protocol
		}
		for _, p := range s.Params {
			q := param{Name: p.Name, Type: string(p.Type), Description: p.Description, Required: p.Required, Default: p.Default,
				Pattern: p.Pattern, MaxLength: p.MaxLength, Values: p.Values}
			if p.Type == scopes.IntParam {
				q.Min, q.Max = &p.Min, &p.Max
			}
			o.Params = append(o.Params, q)
		}
		list = append(list, o)
	}
	return send(w, http.StatusOK, struct {
		Scopes []offer `json:"scopes"`
	}{list})
}

// uses is what a resource server may say of a use: it stands in the leaf as it
// is, so it is kept to names of operations.
var uses = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9 ._:/-]{0,127}\z`)

func (a *handlers) introspect(w http.ResponseWriter, r *http.Request) error {
	if mt, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mt != "application/x-www-form-urlencoded" {
		return problem.Malformed("send a form: Content-Type: application/x-www-form-urlencoded (RFC 7662, section 2.1)")
	}
	raw, err := server.Body(r)
	if err != nil {
		return err
	}
	form, err := url.ParseQuery(string(raw))
	if err != nil || len(form["token"]) != 1 || form.Get("token") == "" || len(form["use"]) > 1 {
		return problem.Malformed("send one token, and at most one use")
	}
	use := form.Get("use")
	if use != "" && !uses.MatchString(use) {
		return problem.Malformed("use is a short name of what is done, such as \"GET /orders\"")
	}
	claims, err := a.Broker.Introspect(r.Context(), auth.From(r.Context()).Name, form.Get("token"), use)
	if err != nil {
		return err
	}
	if claims == nil {
		return send(w, http.StatusOK, struct {
			Active bool `json:"active"`
		}{})
	}
	return send(w, http.StatusOK, active(claims))
}

func active(c *issuer.Claims) any {
	out := struct {
		Active       bool     `json:"active"`
		Iss          string   `json:"iss"`
		Sub          string   `json:"sub"`
		Aud          []string `json:"aud,omitzero"`
		Exp          int64    `json:"exp,omitzero"`
		Iat          int64    `json:"iat,omitzero"`
		Jti          string   `json:"jti"`
		Scope        string   `json:"scope"`
		Orchestrator string   `json:"orchestrator"`
		Run          string   `json:"run"`
		Step         string   `json:"step"`
		Request      string   `json:"request"`
	}{true, c.Issuer, c.Subject, c.Audience, 0, 0, c.ID, c.Scope, c.Orchestrator, c.Run, c.Step, c.Request}
	if c.ExpiresAt != nil {
		out.Exp = c.ExpiresAt.Unix()
	}
	if c.IssuedAt != nil {
		out.Iat = c.IssuedAt.Unix()
	}
	return out
}

func published(doc func() jsontext.Value) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// Half of the time for which a new key is published before it signs.
		w.Header().Set("Cache-Control", "public, max-age=300")
		_, _ = w.Write(doc())
	}
}

func (a *handlers) alive(w http.ResponseWriter, _ *http.Request) error {
	return send(w, http.StatusOK, struct {
		Status string `json:"status"`
	}{"ok"})
}

func (a *handlers) ready(w http.ResponseWriter, r *http.Request) error {
	if err := a.Broker.Ready(r.Context()); err != nil {
		return err
	}
	return a.alive(w, r)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func pathID(r *http.Request, name string) (string, error) {
	id, err := url.PathUnescape(chi.URLParam(r, name))
	if err != nil || !store.ValidID(id) {
		return "", problem.Malformed(name + " is not of the form [A-Za-z0-9][A-Za-z0-9._-]{0,127}")
	}
	return id, nil
}

// idempotencyKey reads the header of that name: 1 to 255 visible ASCII
// characters, once.
func idempotencyKey(values []string) (string, error) {
	if len(values) == 0 {
		return "", nil
	}
	bad := len(values) > 1 || values[0] == "" || len(values[0]) > 255
	for _, c := range []byte(values[0]) {
		bad = bad || c < 0x21 || c > 0x7e
	}
	if bad {
		return "", problem.Malformed("Idempotency-Key is one header of 1 to 255 visible ASCII characters")
	}
	return values[0], nil
}

// preferWait reads the preference "wait" (RFC 7240, section 4.3). The first
// one counts; one that cannot be read is no preference (section 2).
func preferWait(values []string) time.Duration {
	for _, v := range values {
		for _, pref := range strings.Split(v, ",") {
			pref, _, _ = strings.Cut(pref, ";")
			name, value, _ := strings.Cut(pref, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "wait") {
				continue
			}
			n, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 31)
			if err != nil {
				return 0
			}
			return min(time.Duration(n)*time.Second, MaxWait)
		}
	}
	return 0
}
