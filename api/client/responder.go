package client

import (
	"context"
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
