package http

import (
	"bufio"
	"bytes"
	"io"
	"strings"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
)

// lines reads lines that end in LF, CRLF or CR (WHATWG HTML, section 9.2.5),
// without their ends. A CR ends a line at once: a LF that follows belongs to it.
type lines struct {
	r    *bufio.Reader
	cr   bool // the last line ended in CR
	bare bool // CR alone ends a line, too
}

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReaderSize(r, 16<<10)} }

// next returns the next line. It is io.EOF only where nothing is left, and
// io.ErrUnexpectedEOF beside a line that was not ended.
func (l *lines) next(max int) ([]byte, error) {
	var out []byte
	for {
		if _, err := l.r.Peek(1); err == io.EOF && len(out) > 0 {
			return out, io.ErrUnexpectedEOF
		} else if err != nil {
			return nil, err
		}
		b, _ := l.r.Peek(l.r.Buffered()) // what is there is there
		if l.cr && b[0] == '\n' {
			l.cr = false
			_, _ = l.r.Discard(1)
			continue
		}
		l.cr = false
		end := bytes.IndexByte(b, '\n')
		if cr := bytes.IndexByte(b, '\r'); l.bare && cr >= 0 && (end < 0 || cr < end) {
			end, l.cr = cr, true
		}
		n := end
		if end < 0 {
			n = len(b)
		}
		if len(out)+n > max {
			return nil, withheld("a line is larger than what is masked as a whole")
		}
		out = append(out, b[:n]...)
		if end < 0 {
			_, _ = l.r.Discard(n)
			continue
		}
		_, _ = l.r.Discard(n + 1)
		if !l.bare {
			out = bytes.TrimSuffix(out, []byte("\r"))
		}
		return out, nil
	}
}

// records masks a stream record by record: JSON documents, one a line, or
// events (WHATWG HTML, section 9.2.6). What is cut short is not handed on.
type records struct {
	x      *exchange
	in     *lines
	events bool
	n      int64 // hidden in the record under way
}

// next returns the next record as the step may see it.
func (m *records) next() ([]byte, error) {
	m.n = 0
	out, rows, err := m.record()
	m.x.count(m.n, rows)
	return out, err
}

func (m *records) record() ([]byte, int64, error) {
	if m.events {
		m.in.bare = true
		return m.event()
	}
	line, err := m.in.next(MaxMasked)
	if err != nil && (err != io.ErrUnexpectedEOF || len(line) == 0) {
		return nil, 0, err
	}
	if len(bytes.TrimSpace(line)) == 0 {
		return []byte("\n"), 0, nil
	}
	// The last line may have no end; cut short, it is no JSON, or a number.
	out, n, bad := m.x.v.document(line)
	if bad != nil {
		return nil, 0, withheld("a line is no JSON")
	}
	m.n += n
	if err == io.ErrUnexpectedEOF {
		return out, 1, nil
	}
	return append(out, '\n'), 1, nil
}

// event reads up to the end of an event.
func (m *records) event() ([]byte, int64, error) {
	var out bytes.Buffer
	var data []string
	size := 0
	for first := true; ; first = false {
		line, err := m.in.next(MaxMasked)
		if err == io.ErrUnexpectedEOF { // an event without its end is none
			return nil, 0, io.EOF
		}
		if err != nil {
			return nil, 0, err
		}
		if first && !m.begun() {
			line = bytes.TrimPrefix(line, []byte("\xEF\xBB\xBF"))
		}
		if size += len(line); size > MaxMasked {
			return nil, 0, withheld("an event is larger than what is masked as a whole")
		}
		if len(line) == 0 {
			if data != nil {
				for s := range strings.SplitSeq(m.text(strings.Join(data, "\n"), true), "\n") {
					out.WriteString("data: " + s + "\n")
				}
			}
			out.WriteByte('\n')
			rows := int64(0)
			if data != nil {
				rows = 1
			}
			return out.Bytes(), rows, nil
		}
		name, value, _ := strings.Cut(string(line), ":")
		value = strings.TrimPrefix(value, " ")
		switch name {
		case "":
			// A comment is a sign of life; what it says is nothing to the step.
			if data == nil && out.Len() == 0 {
				return []byte(":\n"), 0, nil
			}
		case "data":
			data = append(data, value)
		case "event", "id", "retry":
			out.WriteString(name + ": " + m.text(value, false) + "\n")
		}
	}
}

// begun reports whether a line was read before, and notes that one was.
func (m *records) begun() bool {
	was := m.x.began
	m.x.began = true
	return was
}

// text masks one text of an event. Data that is no JSON has no names for a rule
// to go by.
func (m *records) text(s string, data bool) string {
	if s == "" {
		return s
	}
	v := m.x.v
	if data {
		if out, n, err := v.document([]byte(s)); err == nil {
			m.n += n
			return string(out)
		}
		if v.named && s != "[DONE]" { // how several APIs of language models end a stream
			m.n++
			return masking.Hidden
		}
	}
	out, n := v.masker.Text([]byte(s))
	m.n += n
	return string(out)
}

// recordBody reads records as a body.
type recordBody struct {
	io.Closer
	m   *records
	out []byte
	err error
}

func (b *recordBody) Read(p []byte) (int, error) {
	for len(b.out) == 0 {
		if b.err != nil {
			return 0, b.err
		}
		if b.out, b.err = b.m.next(); b.err != nil && b.err != io.EOF {
			b.m.x.note(b.err)
		}
	}
	n := copy(p, b.out)
	b.out = b.out[n:]
	return n, nil
}
