package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"filippo.io/torchwood"
	"github.com/go-json-experiment/json/jsontext"
)

// HistoryEntry is one entry of a page of history.
type HistoryEntry struct {
	Index  int64             `json:"index"`
	Entry  jsontext.Value    `json:"entry"`           // the leaf as it is stored
	Opened map[string]string `json:"opened,omitzero"` // sealed texts, where not erased
}

// HistoryPage is the answer to GET /history.
type HistoryPage struct {
	Entries []HistoryEntry `json:"entries"`
	Next    string         `json:"next,omitzero"` // cursor of the next page; empty on the last
}

// Reviewer reads the record. It verifies nothing by itself: Checkpoint and
// Tiles are what a verifier takes.
type Reviewer struct{ conn *conn }

// NewReviewer returns a client of the recorder's reading side.
func NewReviewer(c Config) (*Reviewer, error) {
	n, err := dial(c)
	if err != nil {
		return nil, err
	}
	return &Reviewer{n}, nil
}

// History returns one page. The filters are those of the contract: from, to,
// run, step, orchestrator, scope, target, person, type, outcome, request,
// limit, cursor.
func (r *Reviewer) History(ctx context.Context, filters url.Values) (*HistoryPage, error) {
	var p HistoryPage
	if err := r.conn.decode(ctx, call{method: http.MethodGet, path: "/history", query: filters}, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// Checkpoint returns the published signed checkpoint.
func (r *Reviewer) Checkpoint(ctx context.Context) (string, error) {
	_, b, err := r.conn.do(ctx, call{method: http.MethodGet, path: "/checkpoint"})
	return string(b), err
}

// Tiles reads the log's tiles, entry bundles included where the token is a
// reviewer's.
func (r *Reviewer) Tiles() (*torchwood.TileFetcher, error) {
	return torchwood.NewTileFetcher(r.conn.base.String(), torchwood.WithHTTPClient(&http.Client{
		Transport:     bearer{r.conn},
		CheckRedirect: r.conn.http.CheckRedirect,
		Timeout:       time.Minute,
	}))
}

// bearer adds the token of its connection.
type bearer struct{ conn *conn }

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.conn.token != nil {
		token, err := b.conn.token()
		if err != nil {
			return nil, err
		}
		if token != "" {
			r = r.Clone(r.Context())
			r.Header.Set("Authorization", "Bearer "+token)
		}
	}
	next := b.conn.http.Transport
	if next == nil {
		next = http.DefaultTransport
	}
	return next.RoundTrip(r)
}
