package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/api/problem"
)

// remote is the Service of a recorder in another process.
type remote struct{ conn *conn }

// Append implements Service.
func (r remote) Append(ctx context.Context, lines [][]byte, seen int64) (*Ack, error) {
	body := append(bytes.Join(lines, []byte("\n")), '\n')
	return r.ack(ctx, call{method: http.MethodPost, path: "/append", body: body, contentType: NDJSON}, seen)
}

// Open implements Service.
func (r remote) Open(ctx context.Context, request string, seen int64) (*Ack, error) {
	q := url.Values{}
	if request != "" {
		q.Set("request", request)
	}
	return r.ack(ctx, call{method: http.MethodGet, path: "/open", query: q}, seen)
}

func (r remote) ack(ctx context.Context, k call, seen int64) (*Ack, error) {
	if seen > 0 {
		k.header = http.Header{HeaderSeen: {strconv.FormatInt(seen, 10)}}
	}
	_, b, err := r.conn.do(ctx, k)
	if err != nil {
		return nil, err
	}
	ack := &Ack{}
	if err := json.Unmarshal(b, ack); err != nil {
		return nil, fmt.Errorf("%w: the acknowledgement does not decode", errAnswer)
	}
	return ack, nil
}

// Consistency implements Service.
func (r remote) Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error) {
	q := url.Values{"from": {strconv.FormatInt(from, 10)}, "to": {strconv.FormatInt(to, 10)}}
	_, b, err := r.conn.do(ctx, call{method: http.MethodGet, path: "/consistency", query: q})
	if p, ok := problem.IsSlug(err, problem.SlugNotFound); ok {
		return nil, fmt.Errorf("%w: %w", ErrNoProof, p)
	}
	if err != nil {
		return nil, err
	}
	var c Consistency
	if json.Unmarshal(b, &c) != nil {
		return nil, errAnswer
	}
	return c.Proof, nil
}

// Follow implements Service.
func (r remote) Follow(ctx context.Context, after int64, fn func(*Ack) error) error {
	resp, err := r.conn.send(ctx, call{method: http.MethodGet, path: "/follow", query: url.Values{"after": {strconv.FormatInt(after, 10)}}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := readAll(resp)
		return problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b)
	}
	lines := bufio.NewReaderSize(resp.Body, 64<<10)
	for {
		line, err := readLine(lines, maxAnswer)
		if err != nil {
			return err
		}
		var ack *Ack
		if len(line) > 0 {
			ack = &Ack{}
			if err := json.Unmarshal(line, ack); err != nil {
				return errAnswer
			}
		}
		if err := fn(ack); err != nil {
			return err
		}
	}
}

// readLine returns the next line without its newline, at most limit bytes. A
// line without newline is one that broke off.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, errors.New("a line is too long")
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}
