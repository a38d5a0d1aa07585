package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Ask is the body of a request for a credential. Run and Scope are due.
type Ask struct {
	Run          string         `json:"run"`
	Scope        string         `json:"scope"`
	TTL          string         `json:"ttl,omitzero"` // as Go writes durations
	Reason       string         `json:"reason,omitzero"`
	Subject      string         `json:"subject,omitzero"`
	SubjectToken string         `json:"subject_token,omitzero"`
	Params       map[string]any `json:"params,omitzero"`
	Delivery     string         `json:"delivery,omitzero"`
	PublicKey    string         `json:"public_key,omitzero"`
	Audience     string         `json:"audience,omitzero"`
	Receipt      bool           `json:"receipt,omitzero"`
}

// Step is a step as the broker names it.
type Step struct {
	ID       string `json:"id"`
	Run      string `json:"run"`
	Identity string `json:"identity"` // SPIFFE ID
}

// Place is where an issuance is on record.
type Place struct {
	Index    int64  `json:"index"`
	LeafHash string `json:"leaf_hash"` // base64
}

// Credential is the answer to a request for a credential: the credential, or,
// where Credential is empty, where the request stands (Status).
type Credential struct {
	Request    string         `json:"request"`
	Status     string         `json:"status,omitzero"`
	Step       Step           `json:"step"`
	Scope      string         `json:"scope"`
	Target     string         `json:"target"`
	Credential jsontext.Value `json:"credential,omitzero"` // by kind; holds the secret
	IssuedAt   time.Time      `json:"issued_at,omitzero"`
	ExpiresAt  time.Time      `json:"expires_at,omitzero"`
	ExpiresIn  int64          `json:"expires_in,omitzero"` // seconds
	Approval   *Approval      `json:"approval,omitzero"`   // nil: nobody had to approve
	Ledger     Place          `json:"ledger"`
	Receipt    string         `json:"receipt,omitzero"` // C2SP tlog-proof

	// Raw is the answer as it came, for output as JSON. It holds the secret.
	Raw jsontext.Value `json:"-"`
}

// StatusPending is the status of a request that people are to decide.
const StatusPending = "pending_approval"

// Approval is, while a request waits, whom it waits for, and with a credential
// which decisions it rests on.
type Approval struct {
	ID        string    `json:"id"`
	URL       string    `json:"url,omitzero"` // where people decide
	Needs     []Need    `json:"needs,omitzero"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	Request   string    `json:"request,omitzero"`    // whose decisions they are
	DecidedBy int       `json:"decided_by,omitzero"` // how many people approved
}

// Need is how many people of a group must approve, and how many have.
type Need struct {
	Group    string `json:"group"`
	Count    int    `json:"count"`
	Approved int    `json:"approved"`
}

// Request is where a request stands.
type Request struct {
	Request  string    `json:"request"`
	Status   string    `json:"status"`
	Approval *Approval `json:"approval,omitzero"`

	Raw jsontext.Value `json:"-"` // the answer as it came
}

// Revoked is what came of a revocation.
type Revoked struct {
	Revoked int `json:"revoked"`
	Pending int `json:"pending"` // Vault has not answered for these yet
	// Irrevocable are those that cannot be called back and end by their own
	// time alone.
	Irrevocable int `json:"irrevocable,omitzero"`
}

// Result is what an orchestrator says came of a step.
type Result struct {
	Run     string `json:"run"`
	Outcome string `json:"outcome"` // succeeded, failed or skipped
	Summary string `json:"summary,omitzero"`
	Target  string `json:"target,omitzero"`
}

// Broker makes an orchestrator's calls.
type Broker struct{ conn *conn }

// NewBroker returns a client of the broker's API.
func NewBroker(c Config) (*Broker, error) {
	n, err := dial(c)
	if err != nil {
		return nil, err
	}
	return &Broker{n}, nil
}

// Credential asks for the credential of a step. key, where not empty, makes the
// call idempotent (Idempotency-Key); wait is how long the broker may take
// before it answers where the request stands (RFC 7240, in whole seconds).
func (b *Broker) Credential(ctx context.Context, step string, ask Ask, key string, wait time.Duration) (*Credential, error) {
	body, err := json.Marshal(ask, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	h := http.Header{}
	if key != "" {
		h.Set("Idempotency-Key", key)
	}
	if wait > 0 {
		h.Set("Prefer", fmt.Sprintf("wait=%d", int64((wait+time.Second-1)/time.Second)))
	}
	var c Credential
	err = b.conn.decode(ctx, call{method: http.MethodPost, path: "/steps/" + segment(step) + "/credential", header: h, body: body, contentType: "application/json"}, &raw{&c, &c.Raw})
	if err != nil {
		return nil, err
	}
	return &c, nil
}

// Get says where a request stands.
func (b *Broker) Get(ctx context.Context, request string) (*Request, error) {
	var r Request
	if err := b.conn.decode(ctx, call{method: http.MethodGet, path: "/requests/" + segment(request)}, &raw{&r, &r.Raw}); err != nil {
		return nil, err
	}
	return &r, nil
}

// Withdraw takes a pending request back.
func (b *Broker) Withdraw(ctx context.Context, request string) (*Request, error) {
	var r Request
	if err := b.conn.decode(ctx, call{method: http.MethodDelete, path: "/requests/" + segment(request)}, &raw{&r, &r.Raw}); err != nil {
		return nil, err
	}
	return &r, nil
}

// Revoke ends the live credentials of a step. It returns when Vault has done
// it.
func (b *Broker) Revoke(ctx context.Context, step, run string) (*Revoked, error) {
	var r Revoked
	k := call{method: http.MethodDelete, path: "/steps/" + segment(step) + "/credential", query: url.Values{"run": {run}}}
	if err := b.conn.decode(ctx, k, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Result closes a step and revokes what is left of its credentials.
func (b *Broker) Result(ctx context.Context, step string, res Result) (*Revoked, error) {
	body, err := json.Marshal(res, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	var r Revoked
	k := call{method: http.MethodPost, path: "/steps/" + segment(step) + "/result", body: body, contentType: "application/json"}
	if err := b.conn.decode(ctx, k, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Scopes returns what the caller may ask for, as the broker says it.
func (b *Broker) Scopes(ctx context.Context) (jsontext.Value, error) {
	var v jsontext.Value
	err := b.conn.decode(ctx, call{method: http.MethodGet, path: "/scopes"}, &v)
	return v, err
}

// raw decodes into v and keeps the bytes.
type raw struct {
	v    any
	keep *jsontext.Value
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *raw) UnmarshalJSON(b []byte) error {
	*r.keep = jsontext.Value(b).Clone()
	return json.Unmarshal(b, r.v)
}
