// Package webhook tells endpoints of the operator's about approvals and people's
// passkeys, signed as
// Standard Webhooks has it (https://www.standardwebhooks.com), for everything
// that is not Slack.
//
// An endpoint is told states, not edges: each message holds the whole request
// as it now is, with all decisions, and where an endpoint was away it gets the
// newest state alone. The webhook-id names approval and state, so that a
// message sent twice (at least once is what is promised) is known by it.
//
// A body names people and their reasons. It goes where the operator's
// configuration says and nowhere else: redirects are not followed. Whether that
// address lies in a private network is the operator's matter; no address here
// ever comes from a request.
package webhook

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/store"
)

// Config is one endpoint. All fields without a remark must be set.
type Config struct {
	Name string // tells endpoints apart; keep it when the URL changes
	URL  string // https, or http to localhost
	// Secrets sign: "whsec_" and base64 of 24 to 64 bytes. Several at once while
	// one is replaced: each message then carries a signature of each.
	Secrets []string
	Timeout time.Duration    // of one attempt; 10 s where zero
	Now     func() time.Time // time.Now where nil
}

// Endpoint is a destination of the outbox.
type Endpoint struct {
	c      Config
	keys   []*standardwebhooks.Webhook
	client *http.Client
}

// New checks c. It does not turn to the endpoint.
func New(c Config) (*Endpoint, error) {
	if !store.ValidID(c.Name) {
		return nil, fmt.Errorf("webhook %q: the name must be letters, digits, '.', '_' and '-'", c.Name)
	}
	if err := outbox.CheckURL(c.URL); err != nil {
		return nil, fmt.Errorf("webhook %s: %w", c.Name, err)
	}
	if len(c.Secrets) == 0 {
		return nil, fmt.Errorf("webhook %s: a secret is due", c.Name)
	}
	e := &Endpoint{c: c}
	for _, s := range c.Secrets {
		text, ok := strings.CutPrefix(s, "whsec_")
		key, err := base64.StdEncoding.DecodeString(text)
		if !ok || err != nil || len(key) < 24 || len(key) > 64 {
			return nil, fmt.Errorf("webhook %s: a secret is whsec_ and the base64 of 24 to 64 bytes", c.Name)
		}
		wh, err := standardwebhooks.NewWebhookRaw(key)
		if err != nil {
			return nil, fmt.Errorf("webhook %s: %w", c.Name, err)
		}
		e.keys = append(e.keys, wh)
	}
	if e.c.Timeout <= 0 {
		e.c.Timeout = 10 * time.Second
	}
	if e.c.Now == nil {
		e.c.Now = time.Now
	}
	e.client = &http.Client{Timeout: e.c.Timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return e, nil
}

// Name implements outbox.Sender.
func (e *Endpoint) Name() string { return "webhook:" + e.c.Name }

// Message is the body of a webhook.
type Message struct {
	Type      string    `json:"type"`      // approval.requested, .decided, .approved, .denied, .expired, .withdrawn, .void, .issued, .failed, .closed, .flood; passkey.enrolled, .activated, .revoked
	Timestamp time.Time `json:"timestamp"` // of this attempt
	Data      Data      `json:"data"`
}

// Data is what a message is about: one of these.
type Data struct {
	Approval *approvals.Request `json:"approval,omitzero"` // as GET /approvals/{id} gives it
	Flood    *outbox.Flood      `json:"flood,omitzero"`    // many that came at once, and are told together
	Passkey  *approvals.Passkey `json:"passkey,omitzero"`  // as GET /passkeys gives it
}

// kind is the message's type.
func kind(d outbox.Delivery) string {
	r := d.Request
	switch {
	case d.Flood != nil:
		return "approval.flood"
	case r == nil:
		return "passkey." + d.Version
	case r.Status == store.StatusPending && len(r.Decisions) == 0:
		return "approval.requested"
	case r.Status == store.StatusPending:
		return "approval.decided"
	}
	return "approval." + string(r.Status)
}

// Send implements outbox.Sender. A message sent twice has one webhook-id, so
// that no failure leaves more behind than the endpoint can tell.
func (e *Endpoint) Send(ctx context.Context, d outbox.Delivery) (string, error) {
	fail := func(err error, after time.Duration) (string, error) {
		return "", &outbox.Failure{Err: err, After: after, Down: true}
	}
	now := e.c.Now()
	body, err := json.Marshal(Message{Type: kind(d), Timestamp: now.UTC(), Data: Data{Approval: d.Request, Flood: d.Flood, Passkey: d.Passkey}}, json.Deterministic(true))
	if err != nil {
		return "", &outbox.Failure{Err: fmt.Errorf("webhook %s: %w", e.c.Name, err)}
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, e.c.URL, bytes.NewReader(body))
	if err != nil {
		return fail(fmt.Errorf("webhook %s: the address cannot be used", e.c.Name), 0)
	}
	var about string
	switch {
	case d.Request != nil:
		about = d.Request.ID
	case d.Flood != nil:
		about = d.Flood.ID
	default:
		about = d.Passkey.ID
	}
	id := about + "-" + strings.ReplaceAll(d.Version, "/", "-") // no dot: dots part what is signed
	var signatures []string
	for _, k := range e.keys {
		s, err := k.Sign(id, now, body)
		if err != nil {
			return fail(fmt.Errorf("webhook %s: signing: %w", e.c.Name, err), 0)
		}
		signatures = append(signatures, s)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "countersign")
	r.Header.Set(standardwebhooks.HeaderWebhookID, id)
	r.Header.Set(standardwebhooks.HeaderWebhookTimestamp, strconv.FormatInt(now.Unix(), 10))
	r.Header.Set(standardwebhooks.HeaderWebhookSignature, strings.Join(signatures, " "))
	resp, err := e.client.Do(r)
	if err != nil {
		var u interface{ Unwrap() error }
		if errors.As(err, &u) && u.Unwrap() != nil {
			err = u.Unwrap() // without the URL, whose path may be a secret
		}
		return fail(fmt.Errorf("webhook %s: %w", e.c.Name, err), 0)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode/100 == 2 {
		return id, nil
	}
	err = fmt.Errorf("webhook %s: answered %s", e.c.Name, resp.Status)
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return "", &outbox.Failure{Err: err} // this message; others may be taken
	}
	return fail(err, retryAfter(resp.Header.Get("Retry-After"), now))
}

// retryAfter reads the header (RFC 9110, section 10.2.3), at most an hour.
func retryAfter(h string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.ParseUint(h, 10, 32); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(h); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}
