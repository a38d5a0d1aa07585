// Package slack shows approvals in Slack, and takes decisions there where the
// scope allows it.
//
// Slack is a screen and a keyboard, nothing more. What is shown is the request
// on record; what is decided goes through approvals.Decide like any other
// decision. A Slack account speaks for a person only after that person, logged
// in at the page, confirmed it there. Whoever holds the Slack workspace can act
// as every linked account: which is why a scope must allow it, and why a scope
// that wants a passkey cannot be approved here.
package slack

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	slackgo "github.com/slack-go/slack"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/refusal"
)

// Approvals is what decides: *approvals.Approvals.
type Approvals interface {
	Get(ctx context.Context, id string) (*approvals.Request, error)
	Decide(ctx context.Context, p approvals.Person, id string, d approvals.Decision) (*approvals.Request, error)
}

// History is where links are read from: *ledger.Ledger.
type History interface {
	History(ctx context.Context, q ledger.Query) (*ledger.Page, error)
}

// Config is what Slack needs. All fields without a remark must be set.
type Config struct {
	// Token is the bot's (xoxb-…), with the scopes chat:write, users:read, and
	// channels:history or, for a private channel, groups:history.
	Token         string
	SigningSecret string // of the app; checks what Slack sends
	Team          string // ID of the one workspace, T…; callbacks of any other are refused
	Channel       string // ID of the channel, C… or G…; the bot must be a member
	APIURL        string // https://slack.com/api/ where empty

	Approvals Approvals
	Ledger    History
	// Record appends one entry in the recorder's own name: access.refused and
	// slack.linked.
	Record      func(context.Context, *store.Submission) error
	PrivacyKey  store.PrivacyKey
	TrustDomain string
	Name        string // the recorder's

	// LinkFor is how long after a login at the page a linked account may decide,
	// for the groups of that login; 30 days where zero.
	LinkFor time.Duration
	Now     func() time.Time // time.Now where nil
	Log     *zap.Logger      // none where nil
}

// Slack is a destination of the outbox, and takes Slack's callbacks.
type Slack struct {
	c       Config
	api     *slackgo.Client
	started time.Time
	tasks   sync.WaitGroup
	cancel  context.CancelFunc
	ctx     context.Context
	refused *refusal.Log

	write     sync.Mutex // held while a link changes, so that the record and links agree on the order
	mu        sync.Mutex
	links     map[string]*link    // by Account.key
	linking   map[string]*linking // by person
	tries     map[string]tries    // wrong codes, by Account.key
	seen      map[[32]byte]time.Time
	bot       string // the bot's ID, B…, once it is known
	workspace string // its address, likewise

	sweepMu sync.Mutex
	sweep   sweep
}

type tries struct {
	n     int
	since time.Time
}

// sweep is what a look at the channel found.
type sweep struct {
	from, at time.Time           // messages since from, looked for at at
	found    map[string][]string // by approval, timestamps of our messages, oldest first
}

// New reads the links from the ledger. It does not turn to Slack: Slack being
// down keeps nobody from starting.
func New(ctx context.Context, c Config) (*Slack, error) {
	switch {
	case c.Token == "" || c.SigningSecret == "":
		return nil, errors.New("slack: the bot's token and the signing secret must be set")
	case !ids.MatchString(c.Team) || !ids.MatchString(c.Channel):
		return nil, errors.New("slack: team and channel must be IDs, such as T0123ABCD and C0123ABCD")
	case c.Approvals == nil || c.Ledger == nil || c.Record == nil || len(c.PrivacyKey) < 32 || c.TrustDomain == "" || c.Name == "":
		return nil, errors.New("slack: approvals, ledger, record, privacy key, trust domain and name must be set")
	}
	if c.APIURL == "" {
		c.APIURL = slackgo.APIURL
	}
	if err := outbox.CheckURL(c.APIURL); err != nil {
		return nil, fmt.Errorf("slack: api url: %w", err)
	}
	if !strings.HasSuffix(c.APIURL, "/") {
		c.APIURL += "/"
	}
	if c.LinkFor <= 0 {
		c.LinkFor = 30 * 24 * time.Hour
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	client := &http.Client{
		Timeout: 10 * time.Second,
		// The token goes to the API and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	s := &Slack{
		c: c, api: slackgo.New(c.Token, slackgo.OptionAPIURL(c.APIURL), slackgo.OptionHTTPClient(client)), started: c.Now(),
		links: map[string]*link{}, linking: map[string]*linking{}, tries: map[string]tries{}, seen: map[[32]byte]time.Time{},
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	// By why they were refused: whoever floods the address hides no other attempt.
	s.refused = refusal.New(c.Log, c.Record, func(s *store.Submission) string { return s.Decision.Reasons[1] })
	if err := s.loadLinks(ctx); err != nil {
		s.cancel()
		return nil, err
	}
	return s, nil
}

// Close waits for answers under way, and puts on record what refusals are still
// folded. Close the outbox first.
func (s *Slack) Close() error {
	s.cancel()
	s.tasks.Wait()
	s.refused.Close()
	return nil
}

// Name implements outbox.Sender.
func (s *Slack) Name() string { return "slack" }

// Send implements outbox.Sender: one message per request, or for many that came
// at once, changed in place; and one to a passkey's owner for each state of it.
func (s *Slack) Send(ctx context.Context, d outbox.Delivery) (string, error) {
	if d.Passkey != nil {
		return "", s.tellOwner(ctx, d.Passkey, d.Version)
	}
	about := ""
	var blocks []slackgo.Block
	var text string
	if d.Flood != nil {
		about, blocks, text = d.Flood.ID, flood(d.Flood), floodline(d.Flood)
	} else {
		about, text = d.Request.ID, headline(d.Request)
		blocks, _ = message(d.Request)
	}
	channel, ts, ok := strings.Cut(d.Place, " ")
	if !ok && d.Doubt != nil {
		found, err := s.find(ctx, about, d.Doubt)
		if err != nil {
			// Looking leaves nothing behind.
			var f *outbox.Failure
			if errors.As(err, &f) {
				return "", err
			}
			return "", &outbox.Failure{Err: fmt.Errorf("looking for a message sent before: %w", err), Down: true}
		}
		if len(found) > 0 {
			channel, ts, ok = s.c.Channel, found[0], true
		}
		for _, double := range found[min(1, len(found)):] {
			if _, _, err := s.api.DeleteMessageContext(ctx, s.c.Channel, double); err != nil && !isSlack(err, "message_not_found") {
				return "", &outbox.Failure{Err: fmt.Errorf("removing a second message: %w", err)}
			}
		}
	}
	options := []slackgo.MsgOption{
		slackgo.MsgOptionBlocks(blocks...),
		slackgo.MsgOptionText(text, false), // escaped already; shown in notifications
		slackgo.MsgOptionDisableMarkdown(), slackgo.MsgOptionDisableLinkUnfurl(), slackgo.MsgOptionDisableMediaUnfurl(),
		slackgo.MsgOptionMetadata(slackgo.SlackMetadata{EventType: eventType, EventPayload: map[string]any{"id": about}}),
	}
	var err error
	if ok {
		_, _, _, err = s.api.UpdateMessageContext(ctx, channel, ts, options...)
		if isSlack(err, "message_not_found", "cant_update_message") {
			s.forgetSweep()
			return "", fmt.Errorf("%w: %w", outbox.ErrGone, err)
		}
	} else {
		channel, ts, err = s.api.PostMessageContext(ctx, s.c.Channel, options...)
		if err == nil && (channel == "" || ts == "") {
			return "", errors.New("slack answered without saying where the message is")
		}
	}
	if err != nil {
		return "", classify(err)
	}
	return channel + " " + ts, nil
}

// classify says whether err leaves open what Slack did. An error of the API is
// certain, but for those that Slack says may come after the work was done.
func classify(err error) error {
	var limited *slackgo.RateLimitedError
	var status slackgo.StatusCodeError
	var api slackgo.SlackErrorResponse
	var network *net.OpError
	switch {
	case errors.As(err, &limited):
		return &outbox.Failure{Err: err, After: limited.RetryAfter, Down: true}
	case errors.As(err, &status) && status.Code < 500:
		return &outbox.Failure{Err: err, Down: true}
	case errors.As(err, &api):
		switch api.Err {
		case "fatal_error", "internal_error", "request_timeout", "service_unavailable":
			return err
		case "invalid_blocks", "invalid_blocks_format", "msg_too_long", "msg_blocks_too_long", "no_text", "restricted_action", "edit_window_closed":
			return &outbox.Failure{Err: err} // this message alone
		}
		return &outbox.Failure{Err: err, Down: true} // token, channel, scopes: every message
	case errors.As(err, &network) && network.Op == "dial":
		return &outbox.Failure{Err: err, Down: true}
	}
	return err
}

func isSlack(err error, codes ...string) bool {
	var api slackgo.SlackErrorResponse
	return errors.As(err, &api) && slices.Contains(codes, api.Err)
}

// clockSkew is how far Slack's clock and ours may be apart.
const clockSkew = 5 * time.Minute

// find returns the timestamps of our messages about the approval id, oldest
// first. One look at the channel serves all that are in doubt since the start.
func (s *Slack) find(ctx context.Context, id string, d *outbox.Doubt) ([]string, error) {
	bot, err := s.botID(ctx)
	if err != nil {
		return nil, classify(err)
	}
	s.sweepMu.Lock()
	defer s.sweepMu.Unlock()
	from := d.First.Add(-clockSkew)
	if s.sweep.found == nil || s.sweep.from.After(from) || s.sweep.at.Before(d.Settled) {
		next := sweep{from: from, at: s.c.Now(), found: map[string][]string{}}
		p := slackgo.GetConversationHistoryParameters{ChannelID: s.c.Channel, Limit: 200, IncludeAllMetadata: true, Oldest: fmt.Sprintf("%d.000000", from.Unix())}
		for {
			page, err := s.api.GetConversationHistoryContext(ctx, &p)
			if err != nil {
				return nil, classify(err)
			}
			for _, m := range page.Messages {
				// Other apps may send the same metadata; their messages are not ours.
				if about, _ := m.Metadata.EventPayload["id"].(string); m.BotID == bot && m.Metadata.EventType == eventType && about != "" {
					next.found[about] = append(next.found[about], m.Timestamp)
				}
			}
			if p.Cursor = page.ResponseMetaData.NextCursor; p.Cursor == "" {
				break
			}
		}
		for _, list := range next.found {
			slices.Sort(list) // fixed width: seconds, a dot, six digits
		}
		s.sweep = next
	}
	return s.sweep.found[id], nil
}

func (s *Slack) forgetSweep() {
	s.sweepMu.Lock()
	defer s.sweepMu.Unlock()
	s.sweep = sweep{}
}

func (s *Slack) botID(ctx context.Context) (string, error) {
	s.mu.Lock()
	bot := s.bot
	s.mu.Unlock()
	if bot != "" {
		return bot, nil
	}
	a, err := s.api.AuthTestContext(ctx)
	switch {
	case err != nil:
		return "", err
	case a.TeamID != s.c.Team:
		return "", &outbox.Failure{Err: fmt.Errorf("the bot belongs to team %q, the configuration names %q", a.TeamID, s.c.Team), Down: true}
	case a.BotID == "":
		return "", &outbox.Failure{Err: errors.New("the token is not a bot's"), Down: true}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bot, s.workspace = a.BotID, a.URL
	return s.bot, nil
}

// Permalink is the address of the message at a place that Send returned, as
// chat.getPermalink gives it; empty while Slack has not been reached.
func (s *Slack) Permalink(place string) string {
	channel, ts, ok := strings.Cut(place, " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	if !ok || s.workspace == "" {
		return ""
	}
	return strings.TrimRight(s.workspace, "/") + "/archives/" + url.PathEscape(channel) + "/p" + url.PathEscape(strings.ReplaceAll(ts, ".", ""))
}

// Check asks Slack whether the token is good and of the right team, as an
// operator wants to know at start.
func (s *Slack) Check(ctx context.Context) error {
	if _, err := s.botID(ctx); err != nil {
		return fmt.Errorf("slack: %w", err)
	}
	return nil
}

// tellOwner tells a person in the linked account what happened to a passkey in
// their name, so that one which they did not enrol themselves is noticed. Where
// they have linked none, there is nobody to tell. After an answer that was lost
// it is told a second time: better than never.
func (s *Slack) tellOwner(ctx context.Context, k *approvals.Passkey, is string) error {
	a, ok := s.Linked(approvals.Person{Name: k.Person})
	if !ok {
		return nil
	}
	text, _ := join(escape(fmt.Sprintf("A passkey in your name was %s at the approval page: %q. If that was not you, revoke it there and tell your security team.", is, k.Label)), maxField)
	_, _, err := s.api.PostMessageContext(ctx, a.User, slackgo.MsgOptionText(text, false),
		slackgo.MsgOptionBlocks(slackgo.NewSectionBlock(plain(text), nil, nil)), slackgo.MsgOptionDisableMarkdown())
	switch {
	case err == nil:
		return nil
	case isSlack(err, "channel_not_found", "user_not_found", "user_disabled", "user_not_visible", "messages_tab_disabled", "cannot_dm_bot"):
		// This person alone; requests are shown in the channel all the same.
		return &outbox.Failure{Err: fmt.Errorf("telling %s: %w", k.Person, err)}
	}
	return classify(err)
}

// entry begins an entry in the recorder's own name.
func (s *Slack) entry(t store.Type, action string) *store.Submission {
	return &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(s.c.Now()),
		Agent: "spiffe://" + s.c.TrustDomain + "/recorder/" + s.c.Name, Action: action,
	}}
}

// same compares secrets in constant time.
func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
