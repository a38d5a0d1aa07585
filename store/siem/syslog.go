package siem

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"go.uber.org/zap"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// syslogSender sends RFC 5424 messages, framed by octet counting (RFC 6587,
// section 3.4.1; RFC 5425, section 4.3), and asks the connection itself whether
// they were read.
//
// Syslog has no acknowledgement: what was written to a connection may lie in a
// buffer when the receiver dies. So messages count as delivered when this side
// has ended its half of the connection and the receiver then ends the other in
// order, without a reset: a receiver that ends, or dies, with data unread makes
// its kernel answer with a reset. All that is not confirmed like this is sent
// again on the next connection. It says that the receiving process has read the
// messages, not that it has stored them; nothing in the protocol could.
type syslogSender struct {
	c     *SyslogConfig
	tls   *trust.Trust // nil: plain
	name  string       // whose certificate the receiver shows
	host  string       // HOSTNAME of messages
	sd    string       // SD-ID
	pri   int          // facility times 8
	pause time.Duration

	raw   *net.TCPConn // nil: no connection
	conn  net.Conn     // raw, or TLS over it
	ended chan error   // how the receiver ended its half; filled once
	early atomic.Bool  // the receiver ended it while this side was still sending
	ours  atomic.Bool  // this side has ended its half
}

func (c *SyslogConfig) maxBytes() int {
	if c.MaxBytes == 0 {
		return 8192 // what receivers SHOULD take (RFC 5425, section 4.3.1)
	}
	return c.MaxBytes
}

func newSyslog(c *SyslogConfig, log *zap.Logger) (*syslogSender, error) {
	s := &syslogSender{c: c, host: "-", pri: 13 * 8, sd: "countersign@32473", pause: 200 * time.Millisecond}
	if c.Facility != nil {
		s.pri = *c.Facility * 8
	}
	if c.Enterprise != 0 {
		s.sd = "countersign@" + strconv.Itoa(c.Enterprise)
	}
	if h, err := os.Hostname(); err == nil {
		s.host = headerField(h, 255)
	}
	if t := c.TLS; t != nil {
		var err error
		if s.tls, err = trust.Open(trust.Files{CA: t.CA, Cert: t.Cert, Key: t.Key}, log); err != nil {
			return nil, fmt.Errorf("syslog.tls: %w", err)
		}
		if s.name = t.ServerName; s.name == "" {
			s.name, _, _ = net.SplitHostPort(c.Addr)
		}
	}
	return s, nil
}

func (s *syslogSender) window() int64 { return syslogWindow }

func (s *syslogSender) dial(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", s.c.Addr)
	if err != nil {
		return err
	}
	s.raw = c.(*net.TCPConn)
	s.conn = c
	if s.tls != nil {
		conf := s.tls.Client()
		conf.ServerName = s.name
		t := tls.Client(c, conf)
		if err := t.HandshakeContext(ctx); err != nil {
			c.Close()
			s.raw, s.conn = nil, nil
			return err
		}
		s.conn = t
	}
	s.ended = make(chan error, 1)
	s.early.Store(false)
	s.ours.Store(false)
	go func(c net.Conn, ended chan<- error) {
		// Receivers say nothing; a read ends when they end. TLS without
		// close_notify is no orderly end: anyone on the way could have cut it.
		_, err := io.Copy(io.Discard, c)
		if !s.ours.Load() {
			s.early.Store(true)
		}
		ended <- err
	}(s.conn, s.ended)
	return nil
}

// send implements sender.
func (s *syslogSender) send(ctx context.Context, events []sent) error {
	if s.conn == nil {
		if err := s.dial(ctx); err != nil {
			return err
		}
	}
	if s.early.Load() {
		return errors.New("the receiver ended the connection")
	}
	var b bytes.Buffer
	for _, e := range events {
		m := s.message(&e)
		fmt.Fprintf(&b, "%d ", len(m))
		b.Write(m)
	}
	deadline, _ := ctx.Deadline()
	s.conn.SetWriteDeadline(deadline)
	// A receiver that reads nothing is left at the deadline, or when ctx ends.
	stop := context.AfterFunc(ctx, func() { s.raw.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := s.conn.Write(b.Bytes())
	return err
}

// confirm implements sender.
func (s *syslogSender) confirm(ctx context.Context) error {
	if s.conn == nil {
		return errors.New("there is no connection")
	}
	if s.early.Load() {
		return errors.New("the receiver ended the connection")
	}
	deadline, _ := ctx.Deadline()
	s.conn.SetDeadline(deadline)
	s.ours.Store(true)
	if t, ok := s.conn.(*tls.Conn); ok {
		if err := t.CloseWrite(); err != nil { // close_notify
			return err
		}
	}
	if err := s.raw.CloseWrite(); err != nil {
		return err
	}
	select {
	case err := <-s.ended:
		if err != nil {
			return fmt.Errorf("the receiver did not end the connection in order, and may not have read all: %w", err)
		}
	case <-ctx.Done():
		return errors.New("the receiver does not end the connection after this side has, so that nothing says whether it has read all")
	}
	// Where both ended it at once, the receiver's end was read although its
	// kernel then refuses what was under way: that comes as a reset within a
	// round trip.
	select {
	case <-time.After(s.pause):
	case <-ctx.Done():
	}
	if err := s.reset(); err != nil {
		return fmt.Errorf("the receiver ended the connection before it had read all: %w", err)
	}
	s.drop()
	return nil
}

// reset is the error that the kernel keeps for the connection.
func (s *syslogSender) reset() error {
	rc, err := s.raw.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var opt error
	if err := rc.Control(func(fd uintptr) { n, opt = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR) }); err != nil {
		return err
	}
	if opt == nil && n != 0 {
		opt = syscall.Errno(n)
	}
	return opt
}

func (s *syslogSender) drop() {
	if s.conn != nil {
		s.raw.Close()
		s.raw, s.conn = nil, nil
	}
}

// message is one RFC 5424 message, with the event as MSG.
func (s *syslogSender) message(e *sent) []byte {
	var b bytes.Buffer
	severity := map[int]int{informational: 6, low: 5, medium: 4, high: 3}[e.severity]
	fmt.Fprintf(&b, "<%d>1 %s %s countersign %d %s [%s index=\"%d\" id=\"%s\" type=\"%s\" leaf_hash=\"%s\"] ",
		s.pri+severity, e.entry.Time, s.host, os.Getpid(), headerField(string(e.entry.Type), 32),
		s.sd, e.index, sdValue(e.entry.ID), sdValue(string(e.entry.Type)), store.HashText(store.LeafHash(e.leaf)))
	// Without a byte order mark, as MSG-ANY: receivers that read JSON stumble
	// over one.
	b.Write(e.event)
	return b.Bytes()
}

// headerField is s as a field of the header may be: printable ASCII without a
// space, cut to n, "-" where nothing is left.
func headerField(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r < 33 || r > 126 {
			return -1
		}
		return r
	}, s)
	if s = s[:min(len(s), n)]; s == "" {
		return "-"
	}
	return s
}

// sdValue escapes s as a PARAM-VALUE (RFC 5424, section 6.3.3).
func sdValue(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`).Replace(strings.ToValidUTF8(s, "\uFFFD"))
}
