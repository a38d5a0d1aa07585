package http

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// switched takes in the answer by which a target changes to WebSocket (RFC 6455,
// section 4.2.2).
func (x *exchange) switched(res *http.Response) error {
	body, ok := res.Body.(io.ReadWriteCloser)
	if !x.upgrade || !ok || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") || res.Header.Get("Sec-Websocket-Extensions") != "" {
		return errors.New("the target changed to a protocol that nobody asked for")
	}
	for _, name := range unsaid {
		res.Header.Del(name)
	}
	x.hideHeaders(res.Header)
	x.head = x.heading(res)
	res.Body = &frames{ReadWriteCloser: body, x: x, in: bufio.NewReader(body), r: redactor{s: x.v.secrets}}
	return nil
}

// upgraded is the step's connection once it is one of WebSocket.
type upgraded struct {
	net.Conn
	x *exchange
}

func (u *upgraded) Read(p []byte) (int, error) {
	n, err := u.Conn.Read(p)
	u.x.watch.touch()
	u.x.mu.Lock()
	u.x.out.Sent += int64(n)
	u.x.mu.Unlock()
	return n, err
}

func (u *upgraded) Write(p []byte) (int, error) {
	_ = u.Conn.SetWriteDeadline(time.Now().Add(u.x.g.cfg.Slow))
	n, err := u.Conn.Write(p)
	u.x.got(p[:n])
	return n, err
}

// frames reads a target's frames (RFC 6455, section 5.2) and hides the secret
// in their messages. Messages may be cut into other frames than the target's,
// as section 5.4 allows where there are no extensions: so a secret on the border
// of two is found.
type frames struct {
	io.ReadWriteCloser
	x   *exchange
	in  *bufio.Reader
	r   redactor
	out []byte

	going  bool   // a message is under way, of which more frames are to come
	opcode byte   // of the message under way, until its first frame is out
	fin    bool   // of the frame that is being read
	left   uint64 // bytes of it
	err    error
}

var errFrame = errors.New("the target broke the WebSocket protocol")

func (f *frames) Read(p []byte) (int, error) {
	for len(f.out) == 0 {
		if f.err == nil {
			if f.err = f.step(); f.err == errFrame {
				f.x.note(f.err)
			}
		}
		if len(f.out) == 0 && f.err != nil {
			return 0, f.err
		}
	}
	n := copy(p, f.out)
	f.out = f.out[n:]
	return n, nil
}

// maxPiece is how much of a frame is handed on at once, in bytes. Frames up to
// it stay whole: there are clients that know no others.
const maxPiece = 1 << 20

// step reads a piece of a frame, or the head of the next.
func (f *frames) step() error {
	defer f.x.watch.touch()
	if f.left == 0 {
		return f.head()
	}
	piece := make([]byte, min(f.left, maxPiece))
	if _, err := io.ReadFull(f.in, piece); err != nil {
		return err
	}
	f.left -= uint64(len(piece))
	f.message(piece)
	return nil
}

// message hands on a part of a message, and its end.
func (f *frames) message(p []byte) {
	before := f.r.n
	out := f.r.add(p)
	end := f.left == 0 && f.fin
	if end {
		out = append(out[:len(out):len(out)], f.r.end()...)
	}
	f.x.count(f.r.n-before, 0)
	if len(out) == 0 && !end {
		return
	}
	f.out = append(f.out, frame(f.opcode, end, out)...)
	f.opcode = 0 // a continuation, from now on
	if end {
		f.x.count(0, 1)
	}
}

// head reads the head of a frame, and a control frame whole.
func (f *frames) head() error {
	var h [2]byte
	if _, err := io.ReadFull(f.in, h[:]); err != nil {
		return err
	}
	fin, opcode, n := h[0]&0x80 != 0, h[0]&0x0f, uint64(h[1]&0x7f)
	if h[0]&0x70 != 0 || h[1]&0x80 != 0 { // an extension; masked, as a client's are
		return errFrame
	}
	var long [8]byte
	switch n {
	case 126:
		if _, err := io.ReadFull(f.in, long[6:]); err != nil {
			return err
		}
		n = binary.BigEndian.Uint64(long[:])
	case 127:
		if _, err := io.ReadFull(f.in, long[:]); err != nil {
			return err
		}
		if n = binary.BigEndian.Uint64(long[:]); n>>63 != 0 {
			return errFrame
		}
	}
	if opcode >= 8 { // between the frames of a message, perhaps
		if !fin || n > 125 || opcode > 10 {
			return errFrame
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(f.in, p); err != nil {
			return err
		}
		out, found := f.x.v.secrets.text(string(p))
		f.x.count(found, 0)
		f.out = append(f.out, frame(opcode, true, []byte(out))...)
		return nil
	}
	// A message that is under way goes on by continuations alone, and no other
	// does (section 5.4). Before its first frame is out its opcode is not 0.
	if opcode > 2 || (opcode == 0) != f.going {
		return errFrame
	}
	if opcode != 0 {
		f.opcode = opcode
	}
	f.fin, f.left = fin, n
	f.going = !fin
	if n == 0 {
		f.message(nil)
	}
	return nil
}

// frame is a frame of a server's.
func frame(opcode byte, fin bool, p []byte) []byte {
	b := make([]byte, 0, len(p)+10)
	if fin {
		opcode |= 0x80
	}
	b = append(b, opcode)
	switch n := len(p); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, p...)
}
