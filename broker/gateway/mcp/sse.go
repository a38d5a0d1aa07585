package mcp

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"
)

// event is one of a stream of server-sent events (HTML living standard, section
// 9.2). A comment is an event without anything.
type event struct {
	name  string
	id    string // empty: none
	data  []byte // nil: none
	retry time.Duration
}

func (e *event) comment() bool { return e.id == "" && e.data == nil && e.retry == 0 }

var errEventSize = errors.New("an event is too large")

// events reads a stream of events, of bounded size.
type events struct {
	r     *bufio.Reader
	limit int  // bytes of one event, names included
	cr    bool // the last line ended in CR: a LF that follows is part of its end
	first bool // nothing was read yet: a byte order mark may come
}

func newEvents(r io.Reader, limit int) *events {
	return &events{r: bufio.NewReaderSize(r, 16<<10), limit: limit, first: true}
}

// next returns the next event, or the comment that came instead. An event that
// the stream's end cuts is dropped, as the standard says: the error is io.EOF.
func (s *events) next() (*event, error) {
	var e event
	var data []byte
	hasData, started, left := false, false, s.limit
	for {
		line, err := s.line(&left)
		if err != nil {
			return nil, err
		}
		if s.first {
			s.first = false
			line = bytes.TrimPrefix(line, []byte("\uFEFF"))
		}
		if len(line) == 0 {
			if !started {
				continue
			}
			if hasData && len(data) > 0 {
				e.data = data
			}
			return &e, nil
		}
		field, value, _ := bytes.Cut(line, []byte(":"))
		if len(field) == 0 { // a comment
			if !started {
				return &event{}, nil
			}
			continue
		}
		started = true
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(field) {
		case "event":
			e.name = string(value)
		case "data":
			if hasData {
				data = append(data, '\n')
			}
			data, hasData = append(data, value...), true
		case "id":
			if bytes.IndexByte(value, 0) < 0 {
				e.id = string(value)
			}
		case "retry":
			if n, err := strconv.ParseUint(string(value), 10, 31); err == nil {
				e.retry = time.Duration(n) * time.Millisecond
			}
		}
	}
}

// line reads up to CR, LF or CRLF, and takes its length from left.
func (s *events) line(left *int) ([]byte, error) {
	var line []byte
	for {
		if _, err := s.r.Peek(1); err != nil {
			return nil, err
		}
		b, _ := s.r.Peek(s.r.Buffered())
		if s.cr {
			s.cr = false
			if b[0] == '\n' {
				_, _ = s.r.Discard(1) // it was buffered
				continue
			}
		}
		end := bytes.IndexAny(b, "\r\n")
		n := end
		if end < 0 {
			n = len(b)
		}
		if *left -= n; *left < 0 {
			return nil, errEventSize
		}
		line = append(line, b[:n]...)
		if end < 0 {
			_, _ = s.r.Discard(n)
			continue
		}
		s.cr = b[end] == '\r'
		_, _ = s.r.Discard(n + 1)
		return line, nil
	}
}

// writer writes events to the step. Each write has a deadline of its own, so
// that a step that does not read holds nothing up.
type writer struct {
	w        http.ResponseWriter
	rc       *http.ResponseController
	deadline func() time.Time // of a write that begins now
	quiet    func()           // takes the deadline off
	sent     int64
	// resumable is set once the step was told the ID of an event, with which it
	// can come back for what follows.
	resumable bool
}

// open begins the stream.
func (w *writer) open() error {
	h := w.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-cache, no-transform")
	h.Set("X-Accel-Buffering", "no") // proxies in between
	w.w.WriteHeader(http.StatusOK)
	return w.flush()
}

func (w *writer) flush() error {
	_ = w.rc.SetWriteDeadline(w.deadline()) // a recorder in tests has none
	if err := w.rc.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	w.quiet()
	return nil
}

// send writes an event, or a comment.
func (w *writer) send(e *event) error {
	var b bytes.Buffer
	if e.comment() {
		b.WriteString(":\n")
	}
	if e.data != nil {
		b.WriteString("event: message\n")
	}
	if e.id != "" {
		b.WriteString("id: " + e.id + "\n")
	}
	if e.retry > 0 {
		b.WriteString("retry: " + strconv.FormatInt(e.retry.Milliseconds(), 10) + "\n")
	}
	if e.data != nil {
		b.WriteString("data: ")
		b.Write(e.data) // JSON as encode writes it has no line breaks
		b.WriteByte('\n')
	}
	b.WriteByte('\n')
	_ = w.rc.SetWriteDeadline(w.deadline())
	n, err := w.w.Write(b.Bytes())
	w.sent += int64(n)
	if err != nil {
		return err
	}
	return w.flush()
}
