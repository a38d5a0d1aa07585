package evidence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
)

// Recorder is a log served by a recorder: C2SP tlog-tiles over HTTP. It is
// safe for concurrent use.
type Recorder struct {
	base  string
	token string
	http  *http.Client
}

// NewRecorder reads the log at rawURL. The token is a reviewer's; without one
// the entries stay hidden and the tree is checked from its hashes.
func NewRecorder(rawURL, token string) (*Recorder, error) {
	u, err := url.Parse(rawURL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("%w: %q is not the URL of a recorder", ErrUnchecked, rawURL)
	}
	return &Recorder{
		base:  strings.TrimSuffix(u.String(), "/"),
		token: token,
		http: &http.Client{
			Timeout: 30 * time.Second,
			// A redirect would carry the token, and the verdict, elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Checkpoint implements Source.
func (r *Recorder) Checkpoint(ctx context.Context) (string, error) {
	b, _, err := r.get(ctx, "/checkpoint", 16<<10)
	return string(b), err
}

// Tile implements Source.
func (r *Recorder) Tile(ctx context.Context, t tlog.Tile) ([]byte, error) {
	b, _, err := r.get(ctx, "/"+torchwood.TilePath(t), torchwood.TileWidth*tlog.HashSize)
	return b, err
}

// Entries implements Source.
func (r *Recorder) Entries(ctx context.Context, t tlog.Tile) ([][]byte, error) {
	if r.token == "" {
		return nil, ErrNoEntries
	}
	b, status, err := r.get(ctx, "/"+torchwood.TilePath(t), torchwood.TileWidth*(2+65535))
	if status == http.StatusUnauthorized || status == http.StatusForbidden {
		return nil, fmt.Errorf("%w: the recorder answers %d to this token: use a reviewer's", ErrUnchecked, status)
	}
	if err != nil {
		return nil, err
	}
	return splitBundle(b)
}

func splitBundle(b []byte) ([][]byte, error) {
	var leaves [][]byte
	for len(b) > 0 {
		leaf, rest, err := torchwood.ReadTileEntry(b)
		if err != nil {
			return nil, fmt.Errorf("entry bundle: %w", err)
		}
		leaves, b = append(leaves, leaf), rest
	}
	return leaves, nil
}

// get reads one resource. No connection means no verdict (ErrUnchecked); an
// answer that is not 200 is the log's own failure to show what it signed.
func (r *Recorder) get(ctx context.Context, path string, limit int64) ([]byte, int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+path, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %v", ErrUnchecked, err)
	}
	if r.token != "" && strings.HasPrefix(path, "/tile/entries/") {
		req.Header.Set("Authorization", "Bearer "+r.token)
	}
	res, err := r.http.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %v", ErrUnchecked, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	switch {
	case err != nil:
		return nil, 0, fmt.Errorf("%w: %s: %v", ErrUnchecked, path, err)
	case res.StatusCode != http.StatusOK:
		return nil, res.StatusCode, fmt.Errorf("%s: the recorder answers %s", path, res.Status)
	case int64(len(b)) > limit:
		return nil, res.StatusCode, errors.New(path + ": longer than it may be")
	}
	return b, res.StatusCode, nil
}
