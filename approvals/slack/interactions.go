package slack

import (
	"context"
	"crypto/sha256"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	slackgo "github.com/slack-go/slack"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

const (
	maxCallback = 256 << 10       // bytes
	window      = 5 * time.Minute // how old a callback may be (Slack, "Verifying requests")
	maxSeen     = 100_000         // callbacks remembered; more in one window are refused
	answerIn    = 2500 * time.Millisecond
	route       = "/slack/interactions"
)

// ids is what Slack's IDs look like.
var ids = regexp.MustCompile(`\A[A-Z][A-Z0-9]{1,31}\z`)

// callback is what is read of Slack's interaction payload. Slack adds members
// at will, so unknown ones are accepted; none of them is believed.
type callback struct {
	Type string `json:"type"`
	Team struct {
		ID string `json:"id"`
	} `json:"team"`
	User struct {
		ID       string `json:"id"`
		Username string `json:"username"`
		TeamID   string `json:"team_id"`
	} `json:"user"`
	TriggerID string `json:"trigger_id"`
	Channel   struct {
		ID string `json:"id"`
	} `json:"channel"`
	Actions []struct {
		ID    string `json:"action_id"`
		Value string `json:"value"`
	} `json:"actions"`
	View struct {
		CallbackID string `json:"callback_id"`
		Metadata   string `json:"private_metadata"`
		State      struct {
			Values map[string]map[string]struct {
				Value string `json:"value"`
			} `json:"values"`
		} `json:"state"`
	} `json:"view"`
}

// parseCallback reads the form that Slack posts.
func parseCallback(contentType string, body []byte) (*callback, error) {
	if t, _, err := mime.ParseMediaType(contentType); err != nil || t != "application/x-www-form-urlencoded" {
		return nil, errors.New("the body is not a form")
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, errors.New("the form cannot be read")
	}
	if len(form["payload"]) != 1 {
		return nil, errors.New("the form has no payload, or several")
	}
	var c callback
	if err := json.Unmarshal([]byte(form["payload"][0]), &c); err != nil {
		return nil, errors.New("the payload cannot be read") // err would repeat what others wrote
	}
	switch {
	case !ids.MatchString(c.User.ID) || !ids.MatchString(c.Team.ID):
		return nil, errors.New("the payload names no team or user")
	case c.User.TeamID != "" && !ids.MatchString(c.User.TeamID), c.Channel.ID != "" && !ids.MatchString(c.Channel.ID):
		return nil, errors.New("the payload names a team or channel that is none")
	case c.Type == "block_actions" && len(c.Actions) != 1:
		return nil, errors.New("the payload has no action, or several")
	}
	return &c, nil
}

// parseValue reads what a button carries, see value.
func parseValue(s string) (id, leaf string, err error) {
	id, leaf, ok := strings.Cut(s, " ")
	if !ok || !strings.HasPrefix(id, "apr_") || !store.ValidID(id) || len(leaf) != 44 {
		return "", "", errors.New("the action names no approval")
	}
	return id, leaf, nil
}

// Interactions takes Slack's callbacks: POST /slack/interactions.
//
// A callback that is not proved to be Slack's, or not new, gets 401 and nothing
// else. Where Slack is proved, the person behind it is told in Slack, for which
// Slack wants a 200. Each refusal is on record.
func (s *Slack) Interactions() http.Handler { return http.HandlerFunc(s.interact) }

func (s *Slack) interact(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, problem, why string, c *callback) {
		s.refuse(r, c, problem, why, "")
		http.Error(w, http.StatusText(status), status)
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		refuse(http.StatusMethodNotAllowed, "method-not-allowed", "only POST", nil)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxCallback))
	if err != nil {
		var tooLong *http.MaxBytesError
		if errors.As(err, &tooLong) {
			refuse(http.StatusRequestEntityTooLarge, "body-too-large", "the callback is too long", nil)
		} else {
			http.Error(w, "Bad Request", http.StatusBadRequest)
		}
		return
	}
	if why := s.authentic(r.Header, body); why != "" {
		refuse(http.StatusUnauthorized, "unauthenticated", why, nil)
		return
	}
	c, err := parseCallback(r.Header.Get("Content-Type"), body)
	switch {
	case err != nil:
		refuse(http.StatusBadRequest, "malformed", err.Error(), nil)
		return
	case c.Team.ID != s.c.Team || c.User.TeamID != "" && c.User.TeamID != s.c.Team:
		refuse(http.StatusForbidden, "unauthenticated", "another Slack team", c)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerIn)
	defer cancel()
	r = r.WithContext(ctx)
	switch c.Type {
	case "block_actions":
		s.action(w, r, c)
	case "view_submission":
		s.submission(w, r, c)
	default:
		w.WriteHeader(http.StatusOK) // a modal was closed, or what we do not offer: nothing happens
	}
}

// authentic says why a callback is not Slack's or not new; empty where it is.
func (s *Slack) authentic(h http.Header, body []byte) (why string) {
	v, err := slackgo.NewSecretsVerifier(h, s.c.SigningSecret)
	switch {
	case errors.Is(err, slackgo.ErrExpiredTimestamp):
		return "the callback is older than five minutes"
	case err != nil:
		return "the callback is not signed"
	}
	v.Write(body)
	if err := v.Ensure(); err != nil { // constant time
		return "the signature is not Slack's"
	}
	stamp := h.Get("X-Slack-Request-Timestamp")
	sec, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil {
		return "the callback is not signed"
	}
	// What came before the start is not remembered, so nothing that may have
	// been taken then is taken again. Stamps are whole seconds.
	sent := time.Unix(sec, 0)
	if sent.Before(s.started) {
		return "the callback is older than this process"
	}
	now := s.c.Now()
	// The signature is over stamp and body alone: together they are the callback,
	// however the signature is written.
	sum := sha256.Sum256(append([]byte(stamp+":"), body...))
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.seen[sum]; ok {
		return "the callback was taken before"
	}
	if len(s.seen) >= maxSeen {
		for k, until := range s.seen {
			if now.After(until) {
				delete(s.seen, k)
			}
		}
		if len(s.seen) >= maxSeen {
			return "too many callbacks"
		}
	}
	s.seen[sum] = sent.Add(window + time.Second) // after which its stamp is too old
	return ""
}

// action takes a click.
func (s *Slack) action(w http.ResponseWriter, r *http.Request, c *callback) {
	var decision string
	switch a := c.Actions[0]; a.ID {
	case actionApprove:
		decision = store.Approve
	case actionDeny:
		decision = store.Refuse
	case actionLink:
		s.open(c, linkModal())
		w.WriteHeader(http.StatusOK)
		return
	default: // the link to the page, or a button of nobody
		w.WriteHeader(http.StatusOK)
		return
	}
	_, req, no := s.may(r, c, decision, c.Actions[0].Value)
	if no != "" {
		s.whisper(c, no)
	} else {
		s.open(c, modal(req, decision))
	}
	w.WriteHeader(http.StatusOK)
}

// may says whether the account behind c may take decision on what value names.
// no is what the person is told where not; the refusal is then on record.
func (s *Slack) may(r *http.Request, c *callback, decision, value string) (p approvals.Person, req *approvals.Request, no string) {
	s.mu.Lock()
	l := s.links[Account{Team: c.Team.ID, User: c.User.ID}.key()]
	s.mu.Unlock()
	id, leaf, err := parseValue(value)
	switch {
	case l == nil:
		s.refuse(r, c, "not-an-approver", "the Slack account is not linked", "")
		return p, nil, "This Slack account is not linked to anybody. Log in at the approval page and link it there."
	case !s.c.Now().Before(l.login.Add(s.c.LinkFor)):
		s.refuse(r, c, "not-an-approver", "the last login at the page is too long ago", "")
		return p, nil, "Your last login at the approval page is too long ago. Log in there, then decide."
	case err != nil:
		s.refuse(r, c, "malformed", err.Error(), "")
		return p, nil, "This button was altered. Nothing was decided."
	}
	p = l.person
	req, err = s.c.Approvals.Get(r.Context(), id)
	switch {
	case errors.Is(err, approvals.ErrNotFound):
		s.refuse(r, c, "not-found", "there is no such approval", "")
		return p, nil, "There is no such request. Nothing was decided."
	case err != nil:
		s.c.Log.Warn("a Slack callback could not be answered", zap.Error(err))
		return p, nil, "The recorder does not answer. Nothing was decided: try again, or use the page."
	case !same(leaf, req.LeafHash):
		s.refuse(r, c, "malformed", "the action is about something other than what is on record", req.Request)
		return p, nil, "This button was altered: it is about something other than what is on record. Nothing was decided."
	case !req.Rule.Slack:
		s.refuse(r, c, "not-an-approver", "the scope is not decided in Slack", req.Request)
		return p, nil, "This scope is not decided in Slack. Decide on the page: " + req.URL
	}
	if _, whole := message(req); decision == store.Approve && !whole {
		s.refuse(r, c, "not-an-approver", "not all of the request could be shown in Slack", req.Request)
		return p, nil, "Not all of this request fits into Slack. Read it and approve it on the page: " + req.URL
	}
	return p, req, ""
}

// submission takes a filled modal.
func (s *Slack) submission(w http.ResponseWriter, r *http.Request, c *callback) {
	input := func(name string) string { return c.View.State.Values[name][name].Value }
	switch c.View.CallbackID {
	case viewLink:
		account := Account{Team: c.Team.ID, User: c.User.ID, Name: s.userName(r.Context(), c)}
		person, ok := s.claim(account, input(inputCode))
		if !ok {
			s.refuse(r, c, "unauthenticated", "a code to link a Slack account that is nobody's", "")
			answer(w, map[string]any{"response_action": "errors", "errors": map[string]string{inputCode: "No such code. Begin again at the page; after 5 wrong codes wait 10 minutes."}})
			return
		}
		answer(w, map[string]any{"response_action": "update", "view": said("Almost linked", "This Slack account will speak for "+person+" once "+person+" confirms it at the approval page. Is that not you? Then tell "+person+" not to.")})
	case viewDecide:
		decision, value, _ := strings.Cut(c.View.Metadata, " ")
		if decision != store.Approve && decision != store.Refuse {
			s.refuse(r, c, "malformed", "the modal names no decision", "")
			answer(w, map[string]any{"response_action": "update", "view": said("Not decided", "This form was altered. Nothing was decided.")})
			return
		}
		p, req, no := s.may(r, c, decision, value)
		if no == "" {
			reason := strings.TrimSpace(input(inputReason))
			if units(reason) > maxReason {
				answer(w, map[string]any{"response_action": "errors", "errors": map[string]string{inputReason: fmt.Sprintf("At most %d characters.", maxReason)}})
				return
			}
			no = s.decide(r.Context(), p, req, approvals.Decision{Decision: decision, Reason: reason, Via: "slack"})
		}
		if no != "" {
			answer(w, map[string]any{"response_action": "update", "view": said("Not decided", no)})
			return
		}
		w.WriteHeader(http.StatusOK) // the modal closes, the message changes
	default:
		w.WriteHeader(http.StatusOK)
	}
}

// decide takes p's decision. no is what p is told where it does not count;
// approvals has put the refusal on record.
func (s *Slack) decide(ctx context.Context, p approvals.Person, req *approvals.Request, d approvals.Decision) (no string) {
	_, err := s.c.Approvals.Decide(ctx, p, req.ID, d)
	if err == nil {
		return ""
	}
	refusal, ok := store.IsOrder(err)
	if !ok {
		s.c.Log.Warn("a decision in Slack was not taken", zap.String("approval", req.ID), zap.Error(err))
		return "It is not certain that your decision is on record. Look at the page: " + req.URL
	}
	switch refusal.Code {
	case store.OrderSelf:
		return "You are on the requester's side: your decision does not count. It is on record that you tried."
	case store.OrderApprover:
		return "You are in no group that decides this. It is on record that you tried."
	case store.OrderDecided:
		return "You have approved this already."
	case store.OrderReason:
		return "A reason is due."
	case store.OrderPasskey:
		return "An approval must be signed with your passkey. Approve on the page: " + req.URL
	}
	return "Your decision does not count: " + refusal.Message
}

// answer writes what Slack is to do with the modal.
func answer(w http.ResponseWriter, v map[string]any) {
	b, err := stdjson.Marshal(v) // for which slack-go's types are made
	if err != nil {
		panic(err) // texts, and blocks of our own making
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(b)
}

// userName is what Slack calls the user, for people to recognize.
func (s *Slack) userName(ctx context.Context, c *callback) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	name := c.User.Username
	if u, err := s.api.GetUserInfoContext(ctx, c.User.ID); err == nil {
		name = strings.TrimSpace(u.RealName + " @" + u.Name)
	}
	text, _ := join(escape(name), maxHeader)
	return html.UnescapeString(text) // the page escapes it in its own way
}

// open shows a modal, after the callback is answered: Slack takes the trigger
// for three seconds.
func (s *Slack) open(c *callback, view slackgo.ModalViewRequest) {
	s.later(func(ctx context.Context) error {
		_, err := s.api.OpenViewContext(ctx, c.TriggerID, view)
		return err
	})
}

// whisper tells the person behind c something that nobody else sees.
func (s *Slack) whisper(c *callback, text string) {
	if c.Channel.ID == "" {
		return
	}
	text, _ = join(escape(text), maxField)
	s.later(func(ctx context.Context) error {
		_, err := s.api.PostEphemeralContext(ctx, c.Channel.ID, c.User.ID, slackgo.MsgOptionText(text, false),
			slackgo.MsgOptionBlocks(slackgo.NewSectionBlock(plain(text), nil, nil)), slackgo.MsgOptionDisableMarkdown())
		return err
	})
}

func (s *Slack) later(do func(context.Context) error) {
	s.tasks.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, answerIn)
		defer cancel()
		if err := do(ctx); err != nil && s.ctx.Err() == nil {
			s.c.Log.Warn("a person could not be answered in Slack", zap.Error(err))
		}
	})
}

// refuse puts a refused callback on record. c is nil where Slack is not proved:
// then nothing of what it says is kept.
func (s *Slack) refuse(r *http.Request, c *callback, problem, why, request string) {
	sub := s.entry(store.AccessRefused, "POST "+route)
	sub.Agent = "spiffe://" + s.c.TrustDomain + "/unauthenticated"
	sub.Request = request
	sub.Decision = &store.Decision{Outcome: store.Deny, Reasons: []string{problem, "slack: " + why}}
	if c != nil {
		account := Account{Team: c.Team.ID, User: c.User.ID}
		s.mu.Lock()
		if l := s.links[account.key()]; l != nil {
			sub.Person = store.Ptr(s.c.PrivacyKey.Pseudonym(l.person.Name))
		}
		s.mu.Unlock()
		sub.Seal(sealedSlack, account.key())
	}
	remote, _, _ := net.SplitHostPort(r.RemoteAddr)
	sub.SetDetails(store.RefusedDetails{Method: r.Method, Route: route, Problem: problem, Remote: remote})
	s.c.Log.Info("a Slack callback was refused", zap.String("problem", problem), zap.String("why", why), zap.String("remote", remote))
	_ = s.refused.Add(r.Context(), sub) // it has logged what it says
}
