package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/countersign-dev/countersign/api/problem"
)

// ExportProgress says how far an export is.
type ExportProgress struct {
	ID     string `json:"id"`    // of its entry export.created
	Index  int64  `json:"index"` // likewise
	Format string `json:"format"`
	Name   string `json:"name"`  // that its file may be given
	State  string `json:"state"` // running, ready or failed
	Done   int64  `json:"done"`  // entries
	Of     int64  `json:"of"`
	Bytes  int64  `json:"bytes"`           // written by now
	SHA256 string `json:"sha256,omitzero"` // hexadecimal, of the whole file, once it is ready
}

// Exporting is an export on its way. Body must be closed.
type Exporting struct {
	ID   string // by which it is fetched again
	Body io.ReadCloser
}

// Export asks for an export: format, since, and the filters of History but for
// limit and cursor. It is put on record before anything is read.
func (r *Reviewer) Export(ctx context.Context, query url.Values) (*Exporting, error) {
	resp, err := r.open(ctx, call{method: http.MethodGet, path: "/history/export", query: query}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	id := strings.TrimSuffix(strings.TrimPrefix(resp.Header.Get("Content-Location"), "/history/export/"), "/file")
	if id == "" || strings.Contains(id, "/") {
		resp.Body.Close()
		return nil, fmt.Errorf("GET /history/export: the answer is not what this client knows")
	}
	return &Exporting{id, resp.Body}, nil
}

// ExportFrom fetches an export from an offset on. It waits until the export is
// ready.
func (r *Reviewer) ExportFrom(ctx context.Context, id string, offset int64) (io.ReadCloser, error) {
	k := call{method: http.MethodGet, path: "/history/export/" + segment(id) + "/file"}
	want := http.StatusOK
	if offset > 0 {
		k.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-", offset)}}
		want = http.StatusPartialContent
	}
	resp, err := r.open(ctx, k, want)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// ExportProgress says how far an export is.
func (r *Reviewer) ExportProgress(ctx context.Context, id string) (*ExportProgress, error) {
	var p ExportProgress
	if err := r.conn.decode(ctx, call{method: http.MethodGet, path: "/history/export/" + segment(id)}, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// open makes a call whose answer is read by the caller.
func (r *Reviewer) open(ctx context.Context, k call, want int) (*http.Response, error) {
	resp, err := r.conn.send(ctx, k)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == want {
		return resp, nil
	}
	defer resp.Body.Close()
	b, err := readAll(resp)
	if err != nil {
		return nil, err
	}
	return nil, problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b)
}
