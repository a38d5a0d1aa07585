package siem

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"go.uber.org/zap"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/countersign-dev/countersign/store/trust"
)

// httpSender POSTs JSON lines. A status of 2xx is what takes a batch.
type httpSender struct {
	c      *HTTPConfig
	client *http.Client
}

func newHTTP(c *HTTPConfig, log *zap.Logger) (*httpSender, error) {
	s := &httpSender{c: c}
	t, err := trust.Open(trust.Files{CA: c.CA}, log)
	if err != nil {
		return nil, err
	}
	s.client = &http.Client{
		Transport: t.Transport(http.DefaultTransport.(*http.Transport).Clone()),
		// A redirect would carry events where the configuration does not say.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if _, err := s.headers(); err != nil {
		return nil, err // at start rather than with the first event
	}
	return s, nil
}

// headers reads the secrets anew, so that one is replaced without a restart.
func (s *httpSender) headers() (http.Header, error) {
	h := http.Header{}
	set := func(name, prefix, file string) error {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		v := strings.TrimSpace(string(b))
		if v == "" || !httpguts.ValidHeaderFieldValue(v) {
			return fmt.Errorf("%s does not hold one line that may stand in a header", file)
		}
		h.Set(name, prefix+v)
		return nil
	}
	if s.c.Token != "" {
		if err := set("Authorization", "Bearer ", s.c.Token); err != nil {
			return nil, fmt.Errorf("token_file: %w", err)
		}
	}
	for name, file := range s.c.Headers {
		if err := set(name, "", file); err != nil {
			return nil, fmt.Errorf("headers.%s: %w", name, err)
		}
	}
	return h, nil
}

// errBatch is wrapped where the receiver refuses this batch and may take
// another.
var errBatch = errors.New("the batch is refused")

// send implements sender. A batch that is refused for what it holds is halved,
// and where one event is refused alone it is sent without its details. Where
// that is refused too, it is tried again and again: nothing is left out in
// silence.
func (s *httpSender) send(ctx context.Context, events []sent) error {
	err := s.post(ctx, events)
	if !errors.Is(err, errBatch) {
		return err
	}
	if half := len(events) / 2; half > 0 {
		if err := s.send(ctx, events[:half]); err != nil {
			return err
		}
		return s.send(ctx, events[half:])
	}
	one := events[0]
	b, cutErr := one.cut()
	if cutErr != nil || bytes.Equal(b, one.event) {
		return fmt.Errorf("entry %d: %w", one.index, err)
	}
	one.event = b
	if err := s.post(ctx, []sent{one}); err != nil {
		return fmt.Errorf("entry %d: %w", one.index, err)
	}
	return nil
}

func (s *httpSender) post(ctx context.Context, events []sent) error {
	var body bytes.Buffer
	var w io.Writer = &body
	var z *gzip.Writer
	if !s.c.Plain {
		z, _ = gzip.NewWriterLevel(&body, gzip.BestSpeed) // the level is valid
		w = z
	}
	for _, e := range events {
		w.Write(e.event)
		w.Write([]byte{'\n'})
	}
	if z != nil {
		z.Close()
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.c.URL, &body)
	if err != nil {
		return errors.New("the URL cannot be used")
	}
	if r.Header, err = s.headers(); err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/x-ndjson")
	r.Header.Set("User-Agent", "countersign")
	if z != nil {
		r.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := s.client.Do(r)
	if err != nil {
		var u interface{ Unwrap() error }
		if errors.As(err, &u) && u.Unwrap() != nil {
			err = u.Unwrap() // without the URL, whose path may be a secret
		}
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode/100 == 2 {
		return nil
	}
	err = fmt.Errorf("answered %s", resp.Status)
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return fmt.Errorf("%w: %w", errBatch, err)
	}
	return &refusal{err: err, after: retryAfter(resp.Header.Get("Retry-After"), time.Now())}
}

// confirm implements sender: an answer has confirmed already.
func (s *httpSender) confirm(context.Context) error { return nil }

func (s *httpSender) window() int64 { return 1 }

func (s *httpSender) drop() { s.client.CloseIdleConnections() }

// retryAfter reads the header (RFC 9110, section 10.2.3), at most an hour.
func retryAfter(h string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.ParseUint(h, 10, 31); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(h); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxAfter)
}
