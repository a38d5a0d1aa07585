package client

import (
	"context"
	"net/http"
	"net/url"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/approvals"
)

// Approvals is a page of GET /approvals.
type Approvals struct {
	Approvals []approvals.Request `json:"approvals"`
	Next      string              `json:"next,omitzero"` // cursor of the next page; empty on the last
}

// Approver takes decisions at the recorder. A decision that a passkey must sign
// is taken on the page, where there is a browser.
type Approver struct{ conn *conn }

// NewApprover returns a client of the people's side.
func NewApprover(c Config) (*Approver, error) {
	n, err := dial(c)
	if err != nil {
		return nil, err
	}
	return &Approver{n}, nil
}

// asJSON asks for JSON where a browser would get a page.
var asJSON = http.Header{"Accept": {"application/json"}}

// List returns a page of approvals in state (pending, mine, decided, all).
func (a *Approver) List(ctx context.Context, state, cursor string) (*Approvals, error) {
	q := url.Values{"state": {state}}
	if cursor != "" {
		q.Set("cursor", cursor)
	}
	var p Approvals
	if err := a.conn.decode(ctx, call{method: http.MethodGet, path: "/approvals", query: q, header: asJSON.Clone()}, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// Show returns one approval.
func (a *Approver) Show(ctx context.Context, id string) (*approvals.Request, error) {
	var r approvals.Request
	if err := a.conn.decode(ctx, call{method: http.MethodGet, path: "/approvals/" + segment(id), header: asJSON.Clone()}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Decide approves (store.Approve) or denies (store.Refuse), and returns where
// the request stands then.
func (a *Approver) Decide(ctx context.Context, id, decision, reason string) (*approvals.Request, error) {
	b, err := json.Marshal(map[string]string{"decision": decision, "reason": reason})
	if err != nil {
		return nil, err
	}
	var r approvals.Request
	if err := a.conn.decode(ctx, call{
		method: http.MethodPost, path: "/approvals/" + segment(id) + "/decision", header: asJSON.Clone(),
		body: b, contentType: "application/json",
	}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// TerminalLogin exchanges the code that a browser brought to a terminal for a
// session token.
func TerminalLogin(ctx context.Context, c Config, code, verifier string) (*auth.TerminalToken, error) {
	n, err := dial(c)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(map[string]string{"code": code, "verifier": verifier})
	if err != nil {
		return nil, err
	}
	var t auth.TerminalToken
	err = n.decode(ctx, call{method: http.MethodPost, path: "/login/cli/token", body: b, contentType: "application/json"}, &t)
	return &t, err
}
