package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
)

// inProcess returns a transport that calls h in this process, without a
// socket. The whole protocol is spoken, and
// answers stream: a flush makes what was written so far readable. As behind a
// socket, h sees when its caller goes, and nothing else of the caller's
// context: not the route, nor the principal, of the call that this one is part
// of.
func inProcess(h http.Handler) http.RoundTripper { return handlerTransport{h} }

type handlerTransport struct{ h http.Handler }

func (t handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(valueless{r.Context()})
	in := r.Clone(ctx)
	in.RequestURI = in.URL.RequestURI()
	in.RemoteAddr = "127.0.0.1:0"
	if in.Host == "" {
		in.Host = in.URL.Host
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	w := &answer{header: http.Header{}, ready: make(chan struct{}), cancel: cancel}
	w.grown = sync.NewCond(&w.mu)
	context.AfterFunc(ctx, func() { w.end(ctx.Err()) }) // wakes a reader whose caller has given up
	go func() {
		defer in.Body.Close()
		defer func() {
			if v := recover(); v != nil {
				w.end(fmt.Errorf("the handler broke off: %T", v))
			} else {
				w.end(io.EOF)
			}
			cancel()
		}()
		t.h.ServeHTTP(w, in)
	}()
	select {
	case <-w.ready:
	case <-ctx.Done():
		cancel()
		// The handler may have been done at the same moment.
		select {
		case <-w.ready:
		default:
			return nil, ctx.Err()
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil && w.err != io.EOF && w.buf.Len() == 0 {
		cancel()
		return nil, w.err
	}
	resp := &http.Response{
		Status: strconv.Itoa(w.status) + " " + http.StatusText(w.status), StatusCode: w.status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.sent, Body: w, ContentLength: -1, Request: r,
	}
	if w.err == io.EOF {
		resp.ContentLength = int64(w.buf.Len())
	}
	return resp, nil
}

// valueless is a context that ends with its parent and holds nothing.
type valueless struct{ context.Context }

// Value implements context.Context.
func (valueless) Value(any) any { return nil }

// maxUnread is how many bytes of a streamed answer wait for their reader
// before the handler does.
const maxUnread = 1 << 20

// answer is a response as its handler writes it and its caller reads it.
type answer struct {
	header http.Header
	ready  chan struct{} // closed when there is a header to read
	cancel context.CancelFunc

	mu       sync.Mutex
	grown    *sync.Cond // buf, err or flushed changed
	buf      bytes.Buffer
	status   int
	sent     http.Header // header as it was when the status was set
	flushed  bool
	err      error // io.EOF: the handler is done
	signaled bool
}

// Header implements http.ResponseWriter.
func (w *answer) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *answer) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(status)
}

func (w *answer) writeHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.status, w.sent = status, w.header.Clone()
	}
}

// Write implements http.ResponseWriter.
func (w *answer) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	for w.flushed && w.err == nil && w.buf.Len() > maxUnread {
		w.grown.Wait()
	}
	if w.err != nil {
		return 0, errGone
	}
	w.buf.Write(b)
	if w.flushed {
		w.grown.Broadcast()
	}
	return len(b), nil
}

var errGone = errors.New("the caller is gone")

// FlushError lets the caller read what was written so far; see
// http.ResponseController.
func (w *answer) FlushError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	if w.err != nil {
		return errGone
	}
	w.flushed = true
	w.signal()
	w.grown.Broadcast()
	return nil
}

// Flush implements http.Flusher.
func (w *answer) Flush() { _ = w.FlushError() }

func (w *answer) signal() {
	if !w.signaled {
		w.signaled = true
		close(w.ready)
	}
}

func (w *answer) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		if err == io.EOF {
			w.writeHeader(http.StatusOK)
		}
		w.err = err
		w.signal()
		w.grown.Broadcast()
	}
}

// Read implements io.Reader for the response's body.
func (w *answer) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.buf.Len() == 0 && w.err == nil {
		w.grown.Wait()
	}
	if w.buf.Len() == 0 {
		return 0, w.err
	}
	n, _ := w.buf.Read(p)
	w.grown.Broadcast()
	return n, nil
}

// Close ends the call for both sides.
func (w *answer) Close() error {
	w.cancel()
	w.end(errGone)
	return nil
}
