package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"
)

// The states of a hold.
const (
	HoldInForce = "in force"
	HoldLifted  = "lifted"
)

// Hold keeps texts from being erased: those of a run, or of a window of the
// recorder's time.
type Hold struct {
	ID           string    `json:"id"`    // entry ID of hold.placed
	Index        int64     `json:"index"` // of hold.placed
	State        string    `json:"state"`
	Run          string    `json:"run,omitzero"`
	From         time.Time `json:"from,omitzero"` // inclusive
	To           time.Time `json:"to,omitzero"`   // exclusive; zero: without end
	Reason       string    `json:"reason"`
	PlacedAt     time.Time `json:"placed_at"`
	PlacedBy     string    `json:"placed_by"` // "user:NAME", or the pseudonym where the name is erased
	LiftedAt     time.Time `json:"lifted_at,omitzero"`
	LiftedBy     string    `json:"lifted_by,omitzero"`
	LiftedReason string    `json:"lifted_reason,omitzero"`
}

// Holds is the answer of GET /holds: all there ever were, oldest first.
type Holds struct {
	Holds []Hold `json:"holds"`
}

// Responder acts at the recorder when something is wrong.
type Responder struct{ conn *conn }

// NewResponder returns a client of the people's side.
func NewResponder(c Config) (*Responder, error) {
	n, err := dial(c)
	if err != nil {
		return nil, err
	}
	return &Responder{n}, nil
}

// PlaceHold holds the texts of run, or, where run is empty, of [from, to); a
// zero to is without end.
func (r *Responder) PlaceHold(ctx context.Context, run string, from, to time.Time, reason string) (*Hold, error) {
	b, err := json.Marshal(struct {
		Run    string    `json:"run,omitzero"`
		From   time.Time `json:"from,omitzero"`
		To     time.Time `json:"to,omitzero"`
		Reason string    `json:"reason"`
	}{run, from, to, reason})
	if err != nil {
		return nil, err
	}
	var h Hold
	if err := r.conn.decode(ctx, call{method: http.MethodPost, path: "/holds", body: b, contentType: "application/json"}, &h); err != nil {
		return nil, err
	}
	return &h, nil
}

// Holds returns all holds, oldest first.
func (r *Responder) Holds(ctx context.Context) ([]Hold, error) {
	var h Holds
	if err := r.conn.decode(ctx, call{method: http.MethodGet, path: "/holds"}, &h); err != nil {
		return nil, err
	}
	return h.Holds, nil
}

// LiftHold ends a hold. Texts whose time is over are erased then.
func (r *Responder) LiftHold(ctx context.Context, id, reason string) (*Hold, error) {
	var h Hold
	if err := r.conn.decode(ctx, call{method: http.MethodDelete, path: "/holds/" + segment(id), query: url.Values{"reason": {reason}}}, &h); err != nil {
		return nil, err
	}
	return &h, nil
}

// The states of a freeze.
const (
	FreezeInForce = "in force"
	FreezeLifted  = "lifted"
)

// Stop is what a freeze covers: those given hold together, and All stands alone.
type Stop struct {
	All          bool   `json:"all,omitzero"`
	Orchestrator string `json:"orchestrator,omitzero"`
	Run          string `json:"run,omitzero"`
	Step         string `json:"step,omitzero"`
	Scope        string `json:"scope,omitzero"`
}

// Revocation is a freeze, and how far the revocation of what it covers is.
// Until it is lifted, the counts are those of now; then those of that moment.
type Revocation struct {
	ID    string `json:"id"`    // entry ID of freeze.set
	Index int64  `json:"index"` // of freeze.set
	State string `json:"state"`
	Stop
	Reason       string    `json:"reason"`
	SetAt        time.Time `json:"set_at"`
	SetBy        string    `json:"set_by"` // "user:NAME", or the pseudonym where the name is erased
	LiftedAt     time.Time `json:"lifted_at,omitzero"`
	LiftedBy     string    `json:"lifted_by,omitzero"`
	LiftedReason string    `json:"lifted_reason,omitzero"`

	Closed      int64 `json:"closed"`      // requests that it closed
	Revoked     int64 `json:"revoked"`     // credentials that were revoked since
	Expired     int64 `json:"expired"`     // credentials whose time ran out since
	Minting     int64 `json:"minting"`     // credentials that were being made, and are revoked once that is known
	Pending     int64 `json:"pending"`     // credentials that are still live and to be revoked
	Irrevocable int64 `json:"irrevocable"` // credentials that cannot be called back, and are live until their end

	// Unknown is which of its names ("orchestrator", "scope") no request on record
	// and no catalogue of the recorder's has, where it covered nothing yet. It is in
	// the answer about one freeze in force.
	Unknown []string `json:"unknown,omitzero"`

	// The lists are in the answer about one freeze alone. More says that they are
	// cut: the counts are whole.
	PendingCredentials     []Covered `json:"pending_credentials,omitzero"`
	IrrevocableCredentials []Covered `json:"irrevocable_credentials,omitzero"`
	More                   bool      `json:"more,omitzero"`
}

// Left is how many credentials are not revoked yet that can be.
func (r *Revocation) Left() int64 { return r.Pending + r.Minting }

// Reached is how many requests and credentials it covered so far.
func (r *Revocation) Reached() int64 {
	return r.Closed + r.Revoked + r.Expired + r.Minting + r.Pending + r.Irrevocable
}

// Doubts says, for who set it, what may be wrong with a freeze that is in force:
// one of a misspelt name stands, and stops nothing of what was meant.
func (r *Revocation) Doubts() (out []string) {
	if r.State != FreezeInForce || r.Reached() > 0 {
		return nil
	}
	out = append(out, "It covers nothing yet: no request waited under it, and no credential was live.")
	for _, what := range r.Unknown {
		name := r.Orchestrator
		if what == "scope" {
			name = r.Scope
		}
		out = append(out, fmt.Sprintf("The %s %s is not known: no request on record and no catalogue of the recorder names it. See how it is spelt. The freeze stands all the same.", what, name))
	}
	return out
}

// Covered is a live credential under a freeze.
type Covered struct {
	Intent       string    `json:"intent"`
	Kind         string    `json:"kind"`
	Orchestrator string    `json:"orchestrator"`
	Run          string    `json:"run"`
	Step         string    `json:"step"`
	Request      string    `json:"request"`
	Scope        string    `json:"scope"`
	Expires      time.Time `json:"expires"`
	Why          string    `json:"why,omitzero"` // why it could not be revoked yet, where a broker said so
}

// Revocations is the answer of GET /revocations, newest first: all that are in
// force, and the newest of those that were lifted. More says that older ones are
// left out.
type Revocations struct {
	Revocations []Revocation `json:"revocations"`
	More        bool         `json:"more,omitzero"`
}

// SetFreeze stops what s covers. The same person doing so again, while it holds,
// gets the freeze that is there.
func (r *Responder) SetFreeze(ctx context.Context, s Stop, reason string) (*Revocation, error) {
	b, err := json.Marshal(struct {
		Stop   `json:",inline"`
		Reason string `json:"reason"`
	}{s, reason})
	if err != nil {
		return nil, err
	}
	var v Revocation
	if err := r.conn.decode(ctx, call{method: http.MethodPost, path: "/revocations", body: b, contentType: "application/json"}, &v); err != nil {
		return nil, err
	}
	return &v, nil
}

// Freezes returns the freezes in force and the newest of those that were lifted.
func (r *Responder) Freezes(ctx context.Context) (*Revocations, error) {
	var v Revocations
	if err := r.conn.decode(ctx, call{method: http.MethodGet, path: "/revocations"}, &v); err != nil {
		return nil, err
	}
	return &v, nil
}

// Freeze returns one freeze with the credentials that are still live under it.
func (r *Responder) Freeze(ctx context.Context, id string) (*Revocation, error) {
	var v Revocation
	if err := r.conn.decode(ctx, call{method: http.MethodGet, path: "/revocations/" + segment(id)}, &v); err != nil {
		return nil, err
	}
	return &v, nil
}

// LiftFreeze ends a freeze that another person set.
func (r *Responder) LiftFreeze(ctx context.Context, id, reason string) (*Revocation, error) {
	var v Revocation
	if err := r.conn.decode(ctx, call{method: http.MethodDelete, path: "/revocations/" + segment(id), query: url.Values{"reason": {reason}}}, &v); err != nil {
		return nil, err
	}
	return &v, nil
}
