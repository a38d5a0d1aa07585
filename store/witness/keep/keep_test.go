package keep

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

const origin = "log.example.test/ledger"

// signed is a log's checkpoint of n entries.
func signed(t testing.TB, n int64) (string, *store.LogVerifier) {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	s, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	c := torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: n, Hash: tlog.Hash{1}}}
	b, err := note.Sign(&note.Note{Text: c.String()}, s)
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), v
}

// place is one that fails on demand.
type place struct {
	name string
	got  []Checkpoint
	err  error
}

func (p *place) Name() string { return p.name }
func (p *place) Keep(_ context.Context, c Checkpoint) error {
	if p.err == nil {
		p.got = append(p.got, c)
	}
	return p.err
}

type clock struct{ now time.Time }

func (c *clock) advance(d time.Duration) { c.now = c.now.Add(d) }

func newKeeper(t testing.TB, file string, clk *clock, published string, places ...Place) (*Keeper, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	k, err := New(Config{Places: places, Origin: origin, Published: func() string { return published }, File: file,
		Now: func() time.Time { return clk.now }, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	return k, logs
}

func TestACheckpointIsKeptOnStartAndOnceADay(t *testing.T) {
	c, _ := signed(t, 7)
	clk := &clock{time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	file := filepath.Join(t.TempDir(), "kept.json")
	p := &place{name: "p"}
	k, _ := newKeeper(t, file, clk, c, p)
	k.Send(t.Context())
	if len(p.got) != 1 || p.got[0].Size != 7 || p.got[0].Note != c || p.got[0].Origin != origin {
		t.Fatalf("%+v", p.got)
	}
	for range 23 {
		clk.advance(time.Hour)
		k.Send(t.Context())
	}
	if len(p.got) != 1 {
		t.Fatalf("%d in a day", len(p.got))
	}
	// Restarts send nothing before it is due.
	for range 5 {
		k, _ = newKeeper(t, file, clk, c, p)
		k.Send(t.Context())
	}
	if len(p.got) != 1 {
		t.Fatalf("%d after restarts", len(p.got))
	}
	clk.advance(time.Hour)
	k.Send(t.Context())
	if len(p.got) != 2 {
		t.Fatalf("%d after a day", len(p.got))
	}
}

func TestAClockThatIsPutBackKeepsNothingFromBeingKept(t *testing.T) {
	c, _ := signed(t, 7)
	clk := &clock{time.Date(2036, 11, 23, 12, 0, 0, 0, time.UTC)}
	file := filepath.Join(t.TempDir(), "kept.json")
	p, broken := &place{name: "p"}, &place{name: "broken", err: errors.New("away")}
	k, _ := newKeeper(t, file, clk, c, p, broken)
	k.Send(t.Context())
	clk.advance(-10 * 365 * 24 * time.Hour)
	broken.err = nil
	for range 2 {
		k.Send(t.Context())
		k.Send(t.Context())
		if len(p.got) != 2 || len(broken.got) != 1 {
			t.Fatalf("%d and %d", len(p.got), len(broken.got))
		}
		k, _ = newKeeper(t, file, clk, c, p, broken)
	}
}

func TestNothingIsKeptWhileNothingIsPublished(t *testing.T) {
	p := &place{name: "p"}
	k, _ := newKeeper(t, filepath.Join(t.TempDir(), "kept.json"), &clock{time.Unix(1_800_000_000, 0)}, "", p)
	k.Send(t.Context())
	if len(p.got) != 0 {
		t.Fatalf("%+v", p.got)
	}
}

func TestAPlaceThatFailsIsTriedAgainLaterEachTimeAndDelaysNoOther(t *testing.T) {
	c, _ := signed(t, 7)
	clk := &clock{time.Unix(1_800_000_000, 0)}
	bad, good := &place{name: "bad", err: errors.New("no route")}, &place{name: "good"}
	k, logs := newKeeper(t, filepath.Join(t.TempDir(), "kept.json"), clk, c, bad, good)
	tries := 0
	for range 3600 / 10 { // an hour, every ten seconds
		k.Send(t.Context())
		if n := logs.Len(); n > tries {
			tries = n
		}
		clk.advance(10 * time.Second)
	}
	if len(good.got) != 1 {
		t.Fatalf("the good one has %d", len(good.got))
	}
	if tries < 5 || tries > 9 { // after 0, 30, 90, 210, 450, 930, 1890 s
		t.Fatalf("%d tries in an hour", tries)
	}
	bad.err = nil
	for range 7 {
		clk.advance(10 * time.Minute)
		k.Send(t.Context())
	}
	if len(bad.got) != 1 {
		t.Fatalf("the bad one has %d once it works", len(bad.got))
	}
}

func TestAFileKeepsEveryCheckpointWithItsDate(t *testing.T) {
	c, v := signed(t, 7)
	f := &File{filepath.Join(t.TempDir(), "checkpoints")}
	day := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for i := range 2 {
		if err := f.Keep(t.Context(), Checkpoint{origin, 7, c, day.AddDate(0, 0, i)}); err != nil {
			t.Fatal(err)
		}
	}
	// What a crash left of a third does not spoil the fourth.
	w, err := os.OpenFile(f.Path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.WriteString("# 2026-11-25T12:00:00Z\nlog.exam")
	w.Close()
	if err := f.Keep(t.Context(), Checkpoint{origin, 7, c, day.AddDate(0, 0, 3)}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, date := range []string{"2026-11-23T12:00:00Z", "2026-11-24T12:00:00Z", "2026-11-26T12:00:00Z"} {
		_, rest, ok := strings.Cut("\n"+string(b), "\n# "+date+"\n")
		if !ok {
			t.Fatalf("no %s in %q", date, b)
		}
		i := strings.Index(rest, "\n\n— ")
		j := strings.Index(rest[i+2:], "\n")
		if got := rest[:i+2+j+1]; got != c {
			t.Fatalf("under %s: %q", date, got)
		} else if _, err := v.Checkpoint(got); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(f.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info.Mode(), err)
	}
	if err := (&File{filepath.Join(t.TempDir(), "none", "x")}).Keep(t.Context(), Checkpoint{Note: c}); err == nil {
		t.Fatal("kept in a directory that is not there")
	}
}

func TestSlackIsTold(t *testing.T) {
	c, v := signed(t, 7)
	s := slacktest.New()
	defer s.Close()
	p := NewSlack(slacktest.Token, slacktest.Channel, s.URL)
	s.Fail("chat.postMessage", slacktest.Failure{Error: "channel_not_found"})
	if err := p.Keep(t.Context(), Checkpoint{Origin: origin, Size: 7, Note: c}); err == nil || strings.Contains(err.Error(), slacktest.Token) {
		t.Fatalf("%v", err)
	}
	long := c + strings.Repeat("— witness.example/w "+strings.Repeat("A", 100)+"\n", 40)
	if err := p.Keep(t.Context(), Checkpoint{Origin: origin, Size: 7, Note: long}); err != nil {
		t.Fatal(err)
	}
	m := s.Messages()
	if len(m) != 1 || m[0].Channel != slacktest.Channel {
		t.Fatalf("%+v", m)
	}
	_, rest, _ := strings.Cut(m[0].Plain(), "```\n")
	kept, _, _ := strings.Cut(rest, "```")
	if _, err := v.Checkpoint(kept); err != nil || !strings.Contains(m[0].Text, "7 entries") {
		t.Fatalf("%q: %v", m[0].Plain(), err)
	}
	wrong := NewSlack("xoxb-wrong", slacktest.Channel, s.URL)
	if err := wrong.Keep(t.Context(), Checkpoint{Origin: origin, Size: 7, Note: c}); err == nil {
		t.Fatal("kept under a wrong token")
	}
}

// smtpServer speaks SMTP as far as a client of this package does.
type smtpServer struct {
	t        *testing.T
	addr     string
	tls      *tls.Config
	implicit bool
	noTLS    bool // offers no STARTTLS
	refuse   string

	mu     sync.Mutex
	mails  []mailed
	logins []string
	clear  []string // commands that came in the clear
}

type mailed struct {
	from, data string
	to         []string
	secure     bool
}

func newSMTP(t *testing.T, s *smtpServer) (*smtpServer, *trust.Trust) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	s.t, s.tls = t, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.addr = l.Addr().String()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
	return s, trusttest.Trust(t, parsed)
}

func (s *smtpServer) serve(conn net.Conn) {
	defer func() { conn.Close() }()
	secure := s.implicit
	if secure {
		conn = tls.Server(conn, s.tls)
	}
	r := bufio.NewReader(conn)
	say := func(line string) { fmt.Fprint(conn, line+"\r\n") }
	say("220 mail.example.test ESMTP")
	var m mailed
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		verb := strings.ToUpper(strings.Fields(line + " ")[0])
		s.mu.Lock()
		if !secure {
			s.clear = append(s.clear, line)
		}
		s.mu.Unlock()
		if s.refuse == verb {
			say("451 not now")
			continue
		}
		switch verb {
		case "EHLO":
			if secure || s.noTLS {
				say("250-mail.example.test\r\n250 AUTH PLAIN")
			} else {
				say("250-mail.example.test\r\n250 STARTTLS")
			}
		case "STARTTLS":
			say("220 go ahead")
			conn = tls.Server(conn, s.tls)
			r, secure = bufio.NewReader(conn), true
		case "AUTH":
			b, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(line, "AUTH PLAIN "))
			if string(b) != "\x00recorder\x00hunter2" {
				say("535 no")
				continue
			}
			s.mu.Lock()
			s.logins = append(s.logins, "recorder")
			s.mu.Unlock()
			say("235 welcome")
		case "MAIL":
			m = mailed{from: line, secure: secure}
			say("250 ok")
		case "RCPT":
			m.to = append(m.to, line)
			say("250 ok")
		case "DATA":
			say("354 go on")
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if line == ".\r\n" {
					break
				}
				m.data += strings.TrimPrefix(line, ".")
			}
			s.mu.Lock()
			s.mails = append(s.mails, m)
			s.mu.Unlock()
			say("250 taken")
		case "QUIT":
			say("221 bye")
			return
		default:
			say("500 what")
		}
	}
}

func TestAMailCarriesTheCheckpointAsItStands(t *testing.T) {
	c, v := signed(t, 7)
	for _, security := range []string{STARTTLS, ImplicitTLS} {
		t.Run(security, func(t *testing.T) {
			s, roots := newSMTP(t, &smtpServer{implicit: security == ImplicitTLS})
			m := &Mail{Addr: s.addr, Security: security, TLS: roots, Username: "recorder", Password: "hunter2",
				From: "Recorder <recorder@example.test>", To: []string{"audit@example.test", "Someone <else@example.test>"}}
			if err := m.Keep(t.Context(), Checkpoint{origin, 7, c, time.Now()}); err != nil {
				t.Fatal(err)
			}
			if len(s.mails) != 1 || !s.mails[0].secure || len(s.mails[0].to) != 2 || len(s.logins) != 1 {
				t.Fatalf("%+v %v", s.mails, s.logins)
			}
			msg, err := mail.ReadMessage(strings.NewReader(s.mails[0].data))
			if err != nil {
				t.Fatal(err)
			}
			if got := msg.Header.Get("Subject"); got != "Checkpoint of "+origin+": 7 entries" {
				t.Fatalf("subject %q", got)
			}
			if to, err := msg.Header.AddressList("To"); err != nil || len(to) != 2 {
				t.Fatalf("%v %v", to, err)
			}
			body, err := io.ReadAll(quotedprintable.NewReader(msg.Body))
			if err != nil {
				t.Fatal(err)
			}
			if kept := strings.ReplaceAll(string(body), "\r\n", "\n"); kept != c {
				t.Fatalf("%q", kept)
			} else if _, err := v.Checkpoint(kept); err != nil {
				t.Fatal(err)
			}
			for _, line := range s.clear {
				if strings.HasPrefix(line, "AUTH") || strings.HasPrefix(line, "MAIL") {
					t.Fatalf("in the clear: %q", line)
				}
			}
		})
	}
}

func TestNoMailGoesInTheClear(t *testing.T) {
	c, _ := signed(t, 7)
	base := func(s *smtpServer, roots *trust.Trust) *Mail {
		return &Mail{Addr: s.addr, Security: STARTTLS, TLS: roots, Username: "recorder", Password: "hunter2",
			From: "recorder@example.test", To: []string{"audit@example.test"}}
	}
	s, roots := newSMTP(t, &smtpServer{noTLS: true})
	err := base(s, roots).Keep(t.Context(), Checkpoint{origin, 7, c, time.Now()})
	if err == nil || !strings.Contains(err.Error(), "STARTTLS") || len(s.mails)+len(s.logins) != 0 {
		t.Fatalf("%v %v", err, s.mails)
	}
	// A certificate of nobody we trust ends it before the login.
	s, _ = newSMTP(t, &smtpServer{})
	_, roots = newSMTP(t, &smtpServer{})
	if err := base(s, roots).Keep(t.Context(), Checkpoint{origin, 7, c, time.Now()}); err == nil || len(s.mails)+len(s.logins) != 0 {
		t.Fatalf("%v %v", err, s.mails)
	}
	for _, m := range []Mail{
		{Addr: "mail.example.test:25", Security: NoTLS, From: "a@b.test", To: []string{"c@d.test"}},
		{Addr: "mail.example.test:25", From: "a@b.test", To: []string{"c@d.test"}},
		{Addr: "mail.example.test:25", Security: STARTTLS, From: "a@b.test\r\nBcc: x@y.test", To: []string{"c@d.test"}},
		{Addr: "mail.example.test:25", Security: STARTTLS, From: "a@b.test"},
		{Addr: "mail.example.test", Security: STARTTLS, From: "a@b.test", To: []string{"c@d.test"}},
		{Addr: "mail.example.test:25", Security: STARTTLS, Username: "u", From: "a@b.test", To: []string{"c@d.test"}},
	} {
		if err := m.Check(); err == nil {
			t.Errorf("%+v passes", m)
		}
	}
}

func TestAMailThatTheServerRefusesIsNotKept(t *testing.T) {
	c, _ := signed(t, 7)
	for _, verb := range []string{"AUTH", "MAIL", "RCPT", "DATA"} {
		s, roots := newSMTP(t, &smtpServer{refuse: verb})
		m := &Mail{Addr: s.addr, Security: STARTTLS, TLS: roots, Username: "recorder", Password: "hunter2",
			From: "recorder@example.test", To: []string{"audit@example.test"}}
		if err := m.Keep(t.Context(), Checkpoint{origin, 7, c, time.Now()}); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", verb, err)
		}
	}
}

func TestAMailServerThatHangsIsGivenUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	m := &Mail{Addr: l.Addr().String(), Security: STARTTLS, From: "a@b.test", To: []string{"c@d.test"}}
	start := time.Now()
	if err := m.Keep(ctx, Checkpoint{Note: "x"}); err == nil || time.Since(start) > 10*time.Second {
		t.Fatalf("%v after %v", err, time.Since(start))
	}
}
