package keep

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/quotedprintable"
	"net"
	"net/http"
	"net/mail"
	"net/smtp"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	slackgo "github.com/slack-go/slack"

	"github.com/countersign-dev/countersign/store/durable"
	"github.com/countersign-dev/countersign/store/trust"
)

// File appends checkpoints to a file, each after a line with its date.
type File struct{ Path string }

// Name implements Place.
func (f *File) Name() string { return "file " + f.Path }

// Keep implements Place: it returns once the disk has the checkpoint. A crash
// before that may leave a part of it, which the next one begins behind.
func (f *File) Keep(_ context.Context, c Checkpoint) error {
	w, err := os.OpenFile(f.Path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("# %s\n%s\n", c.At.UTC().Format(time.RFC3339), c.Note)
	info, err := w.Stat()
	if err == nil && info.Size() > 0 {
		last := make([]byte, 1)
		if _, err = w.ReadAt(last, info.Size()-1); err == nil && last[0] != '\n' {
			text = "\n" + text
		}
	}
	if err == nil {
		_, err = w.WriteString(text)
	}
	if err = errors.Join(err, w.Sync(), w.Close()); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(f.Path))
}

// Slack posts checkpoints to a channel (chat.postMessage).
type Slack struct {
	channel string
	api     *slackgo.Client
}

// NewSlack takes the bot's token, with the scope chat:write, and the ID of the
// channel. apiURL is Slack's own where empty.
func NewSlack(token, channel, apiURL string) *Slack {
	if apiURL == "" {
		apiURL = slackgo.APIURL
	}
	if !strings.HasSuffix(apiURL, "/") {
		apiURL += "/"
	}
	return &Slack{channel, slackgo.New(token, slackgo.OptionAPIURL(apiURL), slackgo.OptionHTTPClient(&http.Client{
		Timeout: sendTime,
		// The token goes to the API and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}))}
}

// Name implements Place.
func (s *Slack) Name() string { return "slack " + s.channel }

// slackText is how much text a section of a message holds, in characters, less
// what stands around the checkpoint.
const slackText = 3000 - 8

// Keep implements Place. Of a note too long for Slack, the last cosignatures are
// left out: the log's own signature comes first.
func (s *Slack) Keep(ctx context.Context, c Checkpoint) error {
	text := c.Note
	for len(text) > slackText {
		i := strings.LastIndexByte(text[:len(text)-1], '\n')
		if i < 0 {
			return errors.New("the checkpoint is too long for Slack")
		}
		text = text[:i+1]
	}
	section := func(kind, text string) slackgo.Block {
		return slackgo.NewSectionBlock(slackgo.NewTextBlockObject(kind, text, false, false), nil, nil)
	}
	_, _, err := s.api.PostMessageContext(ctx, s.channel, slackgo.MsgOptionText(subject(c), true), slackgo.MsgOptionDisableLinkUnfurl(),
		slackgo.MsgOptionBlocks(section(slackgo.PlainTextType, subject(c)), section(slackgo.MarkdownType, "```\n"+text+"```")))
	return err
}

func subject(c Checkpoint) string {
	return fmt.Sprintf("Checkpoint of %s: %d entries", c.Origin, c.Size)
}

// How a mail server is spoken to.
const (
	STARTTLS    = "starttls" // RFC 3207, and no mail without it
	ImplicitTLS = "tls"      // RFC 8314, section 3
	NoTLS       = "none"     // on this machine alone
)

// Mail sends checkpoints by SMTP (RFC 5321). All fields without a remark must
// be set.
type Mail struct {
	Addr     string       // HOST:PORT of the server
	Security string       // STARTTLS, ImplicitTLS or NoTLS
	TLS      *trust.Trust // nil: the machine's roots
	Username string       // empty: no login
	Password string
	From     string // addresses (RFC 5322)
	To       []string
}

// Check refuses what cannot be sent, or would be sent in the clear.
func (m *Mail) Check() error {
	host, _, err := net.SplitHostPort(m.Addr)
	if err != nil || host == "" {
		return fmt.Errorf("%q is not HOST:PORT of a mail server", m.Addr)
	}
	switch m.Security {
	case STARTTLS, ImplicitTLS:
	case NoTLS:
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("mail to %s would cross the network in the clear", m.Addr)
		}
	default:
		return fmt.Errorf("security is %q, want %s, %s or %s", m.Security, STARTTLS, ImplicitTLS, NoTLS)
	}
	if (m.Username == "") != (m.Password == "") {
		return errors.New("a user name and a password go together")
	}
	if len(m.To) == 0 {
		return errors.New("nobody is named to send to")
	}
	for _, a := range append([]string{m.From}, m.To...) {
		if _, err := mail.ParseAddress(a); err != nil {
			return fmt.Errorf("%q is not an address: %w", a, err)
		}
	}
	return nil
}

// Name implements Place.
func (m *Mail) Name() string { return "mail " + strings.Join(m.To, ",") }

// Keep implements Place: it returns once the server took the mail.
func (m *Mail) Keep(ctx context.Context, c Checkpoint) error {
	if err := m.Check(); err != nil {
		return err
	}
	from, _ := mail.ParseAddress(m.From)
	host, _, _ := net.SplitHostPort(m.Addr)
	t := m.TLS.Client()
	t.ServerName = host
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", m.Addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) // every read and write ends at once
	defer stop()
	if m.Security == ImplicitTLS {
		conn = tls.Client(conn, t)
	}
	s, err := smtp.NewClient(conn, host)
	if err != nil {
		return err
	}
	if m.Security == STARTTLS {
		if ok, _ := s.Extension("STARTTLS"); !ok {
			return fmt.Errorf("the mail server %s offers no STARTTLS: nothing is sent in the clear", m.Addr)
		}
		if err := s.StartTLS(t); err != nil {
			return fmt.Errorf("STARTTLS at %s: %w", m.Addr, err)
		}
	}
	if m.Username != "" {
		if err := s.Auth(smtp.PlainAuth("", m.Username, m.Password, host)); err != nil {
			return fmt.Errorf("login at %s: %w", m.Addr, err)
		}
	}
	if err := s.Mail(from.Address); err != nil {
		return err
	}
	var to []string
	for _, a := range m.To {
		p, _ := mail.ParseAddress(a)
		if err := s.Rcpt(p.Address); err != nil {
			return fmt.Errorf("recipient %s: %w", p.Address, err)
		}
		to = append(to, p.String())
	}
	w, err := s.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write(message(from.String(), to, c)); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	// The mail is taken; a server that hangs up instead of saying goodbye is no failure.
	_ = s.Quit()
	return nil
}

// message is a mail (RFC 5322) whose body is the checkpoint as it stands:
// quoted-printable, since signature lines begin with a dash that is no ASCII.
func message(from string, to []string, c Checkpoint) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "From: %s\r\nTo: %s\r\nSubject: %s\r\nDate: %s\r\nMessage-ID: <%s@countersign.invalid>\r\n",
		from, strings.Join(to, ",\r\n "), mime.QEncoding.Encode("utf-8", subject(c)), c.At.Format(time.RFC1123Z), uuid.NewString())
	b.WriteString("Auto-Submitted: auto-generated\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n")
	q := quotedprintable.NewWriter(&b)
	_, _ = io.WriteString(q, c.Note) // a bytes.Buffer takes all
	_ = q.Close()
	return b.Bytes()
}
