package postgres

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/jackc/pgx/v5/pgproto3"
)

// The largest body that PostgreSQL itself reads (PQ_LARGE_MESSAGE_LIMIT).
const maxBody = 1<<30 - 2

// errProtocol is wrapped where a side broke the protocol.
var errProtocol = errors.New("the protocol was broken")

// reader reads messages: a type byte, a length that counts itself, a body
// (https://www.postgresql.org/docs/current/protocol-message-formats.html).
// It holds as much of a message as has arrived, whatever length it claims.
type reader struct {
	*bufio.Reader
	big []byte // body of a message that does not fit the buffer
}

func newReader(r io.Reader, size int) *reader { return &reader{Reader: bufio.NewReaderSize(r, size)} }

// header reads the type of the next message and the length of its body.
func (r *reader) header() (byte, int, error) {
	if cap(r.big) > 64<<10 {
		r.big = nil
	}
	h, err := r.Peek(5)
	if err != nil {
		if err == io.EOF && len(h) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return 0, 0, err
	}
	typ, n := h[0], int64(binary.BigEndian.Uint32(h[1:]))-4
	if n < 0 || n > maxBody {
		return 0, 0, fmt.Errorf("%w: a message claims %d bytes", errProtocol, n+4)
	}
	_, _ = r.Discard(5)
	return typ, int(n), nil
}

// body reads a body of n bytes. It is valid until the next call of any method.
func (r *reader) body(n int) ([]byte, error) {
	if n <= r.Size() {
		b, err := r.Peek(n)
		if err != nil {
			return nil, unexpected(err)
		}
		_, _ = r.Discard(n)
		return b, nil
	}
	r.big = r.big[:0]
	for len(r.big) < n {
		step := min(n-len(r.big), max(len(r.big), 64<<10))
		at := len(r.big)
		if cap(r.big) < at+step {
			grown := make([]byte, at, at+step)
			copy(grown, r.big)
			r.big = grown
		}
		r.big = r.big[:at+step]
		if _, err := io.ReadFull(r.Reader, r.big[at:]); err != nil {
			return nil, unexpected(err)
		}
	}
	return r.big, nil
}

// skip drops a body of n bytes.
func (r *reader) skip(n int) error {
	_, err := r.Discard(n)
	return unexpected(err)
}

// relay writes the message to w as it arrives. The error is errClient where it is
// w's.
func (r *reader) relay(w *bufio.Writer, typ byte, n int) error {
	if n <= r.Buffered() { // the common case, in one copy
		b, _ := r.Peek(n)
		err := writeMessage(w, typ, b)
		_, _ = r.Discard(n)
		if err != nil {
			return errClient
		}
		return nil
	}
	h := head(typ, n)
	if _, err := w.Write(h[:]); err != nil {
		return errClient
	}
	for n > 0 {
		if r.Buffered() == 0 {
			if _, err := r.Peek(1); err != nil {
				return unexpected(err)
			}
		}
		b, _ := r.Peek(min(n, r.Buffered()))
		if _, err := w.Write(b); err != nil {
			return errClient
		}
		n -= len(b)
		_, _ = r.Discard(len(b))
	}
	return nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func head(typ byte, n int) (h [5]byte) {
	h[0] = typ
	binary.BigEndian.PutUint32(h[1:], uint32(n+4))
	return h
}

func writeMessage(w *bufio.Writer, typ byte, body []byte) error {
	h := head(typ, len(body))
	_, _ = w.Write(h[:]) // its error is sticky
	_, err := w.Write(body)
	return err
}

func appendMessage(b []byte, typ byte, body []byte) []byte {
	h := head(typ, len(body))
	return append(append(b, h[:]...), body...)
}

// encode appends a message that has no text of unbounded length or with NUL in
// it, which are all that Encode refuses.
func encode(b []byte, m pgproto3.Message) []byte {
	out, err := m.Encode(b)
	if err != nil {
		panic(err)
	}
	return out
}

// refusal is an error of ours, as the client is told it.
func refusal(severity, code, message string) *pgproto3.ErrorResponse {
	return &pgproto3.ErrorResponse{Severity: severity, SeverityUnlocalized: severity, Code: code, Message: message}
}

// cstring cuts a NUL-terminated string off b.
func cstring(b []byte) (s string, rest []byte, ok bool) {
	for i, c := range b {
		if c == 0 {
			return string(b[:i]), b[i+1:], true
		}
	}
	return "", nil, false
}
