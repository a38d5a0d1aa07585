package auth

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/problem"
)

// A terminal logs in with the browser of the person before it (RFC 8252): it
// listens on 127.0.0.1:PORT and opens /login/cli?port=PORT&challenge=C, C being
// the S256 challenge of a verifier that it keeps (RFC 7636). The person logs in
// and confirms; the browser takes a code to the terminal, which exchanges code
// and verifier for a session token of its own.

// terminalLife is the longest that a terminal's session lasts.
const terminalLife = 8 * time.Hour

// cliCode is what a code stands for, for a minute and once.
type cliCode struct {
	person    Person
	subject   string
	challenge string
	browser   hash      // the session that gave it
	end       time.Time // of that session: a terminal's does not outlast it
}

// verifiers is the form of a PKCE verifier (RFC 7636, section 4.1).
var verifiers = regexp.MustCompile(`\A[A-Za-z0-9._~-]{43,128}\z`)

// terminalOf reads where the terminal listens, and its challenge.
func terminalOf(v url.Values) (port int, challenge string, err error) {
	port, err = strconv.Atoi(v.Get("port"))
	if err != nil || port < 1024 || port > 65535 || strconv.Itoa(port) != v.Get("port") {
		return 0, "", errors.New("port: want a number from 1024 to 65535")
	}
	if challenge = v.Get("challenge"); !secretForm.MatchString(challenge) {
		return 0, "", errors.New("challenge: want a SHA-256 in base64url")
	}
	return port, challenge, nil
}

// cliPage asks the person whether the terminal may act as them.
func (p *People) cliPage(w http.ResponseWriter, r *http.Request) {
	if !p.home(w, r) {
		return
	}
	port, challenge, err := terminalOf(r.URL.Query())
	if err != nil {
		p.refuse(w, r, problem.Malformed(err.Error()))
		return
	}
	s, ok := p.session(r, true)
	if !ok {
		p.goLogin(w, r)
		return
	}
	writePage(w, r, http.StatusOK, page{
		Title: "Log in a terminal?",
		Text: fmt.Sprintf("A program on this computer, listening on port %d, asks to act as %s at %s: to see requests, and to approve or deny them. "+
			"Its access ends by %s. Go on only if you have just run “countersign login” yourself.",
			port, s.person.Name, p.base.Host, s.end.UTC().Format("15:04 MST")),
		Action: "/login/cli", Label: "Log in the terminal",
		Fields: map[string]string{"csrf": s.csrf, "port": strconv.Itoa(port), "challenge": challenge},
		form:   "http://127.0.0.1:" + strconv.Itoa(port),
	})
}

// cliConfirm gives the browser the code to take to the terminal.
func (p *People) cliConfirm(w http.ResponseWriter, r *http.Request) {
	s, ok := p.session(r, true)
	if !ok {
		p.refuse(w, r, problem.Unauthenticated())
		return
	}
	if err := p.genuine(r, s); err != nil {
		p.refuse(w, r, problem.RoleForbidden(ErrForgery.Error()).Because(err))
		return
	}
	port, challenge, err := terminalOf(r.PostForm)
	if err != nil {
		p.refuse(w, r, problem.Malformed(err.Error()))
		return
	}
	code := p.codes.put(&cliCode{person: s.person, subject: s.subject, challenge: challenge, browser: s.key, end: s.end})
	redirect(w, r, fmt.Sprintf("http://127.0.0.1:%d/callback?code=%s", port, code))
}

// TerminalToken is the answer of POST /login/cli/token.
type TerminalToken struct {
	Token   string    `json:"token"` // css_..., a bearer token
	Expires time.Time `json:"expires"`
	Person  string    `json:"person"` // "user:NAME"
}

// cliToken exchanges code and verifier for a session token. It is no browser's
// call, and sends no cookie.
func (p *People) cliToken(w http.ResponseWriter, r *http.Request) {
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		p.refuse(w, r, problem.Malformed("want Content-Type: application/json"))
		return
	}
	var in struct {
		Code     string `json:"code"`
		Verifier string `json:"verifier"`
	}
	if err := json.UnmarshalRead(http.MaxBytesReader(w, r.Body, 4<<10), &in, json.RejectUnknownMembers(true)); err != nil {
		p.refuse(w, r, problem.Malformed(`want {"code":"...","verifier":"..."}`).Because(err))
		return
	}
	c, ok := p.codes.take(in.Code) // used up, whatever comes of it
	sum := sha256.Sum256([]byte(in.Verifier))
	if !ok || !p.Sessions.alive(c.browser) || !verifiers.MatchString(in.Verifier) ||
		subtle.ConstantTimeCompare([]byte(base64.RawURLEncoding.EncodeToString(sum[:])), []byte(c.challenge)) != 1 {
		doc := problem.Unauthenticated()
		doc.Detail = "the code is not valid (any more): run the login again"
		p.refuse(w, r, doc.Because(errors.New("a terminal's code or verifier is wrong, used or late, or the browser is logged out")))
		return
	}
	end := p.now.now().Add(terminalLife)
	if c.end.Before(end) {
		end = c.end
	}
	token, end := p.Sessions.begin(sessionPrefix, session{person: c.person, subject: c.subject, terminal: true, parent: c.browser}, end)
	p.log.Info("logged in a terminal", zap.String("person", c.person.Name))
	writeJSON(w, TerminalToken{Token: token, Expires: end.UTC().Truncate(time.Second), Person: c.person.Name})
}
