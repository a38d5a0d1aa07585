// Package client is the Go client of both processes: Recorder for writers,
// Reviewer for who reads the record, Broker for orchestrators. It holds the
// shapes that only HTTP needs, which the servers use too. What a server sends
// as a problem document is returned as a *problem.Problem.
package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api/problem"
)

// Config says where a server is and who is calling.
type Config struct {
	URL string // base, such as https://recorder.internal:8788
	// Token returns the bearer token of a call; nil: none, as with mTLS. It
	// is asked anew each time, so that a rotated one is used at once.
	Token func() (string, error)
	// Transport carries the calls, with a client certificate for mTLS. Nil:
	// http.DefaultTransport.
	Transport http.RoundTripper
}

// Token returns a function for Config.Token that always gives token.
func Token(token string) func() (string, error) {
	return func() (string, error) { return token, nil }
}

// maxAnswer is the largest answer read, in bytes. The largest there is, a page
// of history of a thousand entries, is 64 MiB and their openings.
const maxAnswer = 128 << 20

// conn makes calls to one server.
type conn struct {
	base  *url.URL
	token func() (string, error)
	http  *http.Client
}

func dial(c Config) (*conn, error) {
	u, err := url.Parse(c.URL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("address %q: want http://HOST:PORT or https://HOST:PORT", c.URL)
	}
	return &conn{base: u, token: c.Token, http: &http.Client{
		Transport: c.Transport,
		// A redirect would carry the token elsewhere; no server of ours sends one.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// call is one request.
type call struct {
	method, path string
	query        url.Values
	header       http.Header
	body         []byte
	contentType  string
}

func (c *conn) send(ctx context.Context, k call) (*http.Response, error) {
	u := c.base.JoinPath(k.path)
	u.RawQuery = k.query.Encode()
	var body io.Reader
	if k.body != nil {
		body = bytes.NewReader(k.body)
	}
	r, err := http.NewRequestWithContext(ctx, k.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	for name, values := range k.header {
		r.Header[name] = values
	}
	if k.contentType != "" {
		r.Header.Set("Content-Type", k.contentType)
	}
	if c.token != nil {
		token, err := c.token()
		if err != nil {
			return nil, fmt.Errorf("reading the token: %w", err)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
	}
	return c.http.Do(r)
}

// do makes the call and reads its whole answer. A status of 400 and more is
// returned as *problem.Problem.
func (c *conn) do(ctx context.Context, k call) (*http.Response, []byte, error) {
	resp, err := c.send(ctx, k)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := readAll(resp)
	if err != nil {
		return nil, nil, fmt.Errorf("%s %s: reading the answer: %w", k.method, k.path, err)
	}
	if resp.StatusCode >= 300 {
		return resp, b, problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b)
	}
	return resp, b, nil
}

func readAll(resp *http.Response) ([]byte, error) {
	var buf bytes.Buffer
	if n := resp.ContentLength; n > 0 && n <= maxAnswer {
		buf.Grow(int(n) + bytes.MinRead)
	}
	if _, err := buf.ReadFrom(io.LimitReader(resp.Body, maxAnswer+1)); err != nil {
		return nil, err
	}
	if buf.Len() > maxAnswer {
		return nil, errors.New("the answer is too large")
	}
	return buf.Bytes(), nil
}

// decode makes the call and decodes its answer into v.
func (c *conn) decode(ctx context.Context, k call, v any) error {
	_, b, err := c.do(ctx, k)
	if err != nil {
		return err
	}
	if v == nil || len(b) == 0 {
		return nil
	}
	if err := json.Unmarshal(b, v); err != nil {
		// The answer may hold a credential: its text is not repeated.
		return fmt.Errorf("%s %s: the answer is not what this client knows", k.method, k.path)
	}
	return nil
}

// segment escapes s as one segment of a path.
func segment(s string) string { return strings.ReplaceAll(url.PathEscape(s), "..", "%2E%2E") }
