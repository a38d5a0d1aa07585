package auth

import (
	"crypto/subtle"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"
)

// sessionPrefix begins the bearer token of a terminal's session.
const sessionPrefix = "css_"

// maxPerPerson is how many sessions one person has; one more ends the oldest.
const maxPerPerson = 20

// maxForm is the largest form in bytes whose CSRF token is looked for.
const maxForm = 64 << 10

// ErrForgery is wrapped by the error of Guard.Authenticate when a request came
// with a person's session and may not have come from that person: another
// site's page, or a form without this session's CSRF token.
var ErrForgery = errors.New("the request did not come from this recorder's pages")

// Sessions are the people logged in. They live in memory: whoever was logged in
// when the recorder stopped logs in again.
type Sessions struct {
	now        clock
	life, idle time.Duration

	mu sync.Mutex
	m  map[hash]*session // by hash of the cookie's value or of the bearer token, which are kept nowhere
}

// session is one login. Everything but seen stays as it was made.
type session struct {
	key      hash
	person   Person
	subject  string // the provider's "sub"
	csrf     string // empty for a terminal's: no browser sends that one by itself
	terminal bool
	parent   hash // of a terminal's session: the browser's, with which it ends
	begun    time.Time
	end      time.Time
	seen     time.Time
}

func newSessions(now clock, life, idle time.Duration) *Sessions {
	return &Sessions{now: now, life: life, idle: idle, m: map[hash]*session{}}
}

// begin keeps a new session and returns what opens it, which begins with
// prefix. end is when it ends for good, if that is before the usual.
func (s *Sessions) begin(prefix string, x session, end time.Time) (string, time.Time) {
	opener := prefix + secret()
	now := s.now.now()
	x.key, x.begun, x.seen, x.end = hashOf(opener), now, now, now.Add(s.life)
	if !end.IsZero() && end.Before(x.end) {
		x.end = end
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var own []*session
	for key, o := range s.m {
		if !s.live(o, now) {
			delete(s.m, key)
		} else if o.person.Name == x.person.Name {
			own = append(own, o)
		}
	}
	if len(own) >= maxPerPerson {
		delete(s.m, slices.MinFunc(own, func(a, b *session) int { return a.begun.Compare(b.begun) }).key)
	}
	s.m[x.key] = &x
	return opener, x.end
}

// live reports whether x has not ended. A terminal's session has no idle end:
// it is short as it is, and its holder waits for approvals.
func (s *Sessions) live(x *session, now time.Time) bool {
	return now.Before(x.end) && (x.terminal || now.Before(x.seen.Add(s.idle)))
}

// get returns a copy of the live session that opener opens. touch counts as
// use. The lookup is by hash: how long it takes says nothing about an opener.
func (s *Sessions) get(opener string, touch bool) (session, bool) {
	key := hashOf(opener)
	now := s.now.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.m[key]
	if x == nil {
		return session{}, false
	}
	if !s.live(x, now) {
		delete(s.m, key)
		return session{}, false
	}
	if touch {
		x.seen = now
	}
	return *x, true
}

// alive reports whether the session kept under key has not ended.
func (s *Sessions) alive(key hash) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.m[key]
	return x != nil && s.live(x, s.now.now())
}

func (s *Sessions) revoke(key hash) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, key)
	for k, x := range s.m {
		if x.parent == key {
			delete(s.m, k)
		}
	}
}

// RevokePerson ends every session of person ("user:NAME"), terminals' too, and
// returns how many there were.
func (s *Sessions) RevokePerson(person string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, now := 0, s.now.now()
	for key, x := range s.m {
		if x.person.Name == person {
			if s.live(x, now) {
				n++
			}
			delete(s.m, key)
		}
	}
	return n
}

// cookie is the name of one of the recorder's cookies. With https it carries
// the __Host- prefix (RFC 6265bis, section 4.1.3.2), so that no neighbouring
// host can plant it. http://localhost cannot; there the port keeps two
// recorders apart, since cookies know no ports.
func (p *People) cookie(name string) string {
	if p.secure {
		return "__Host-countersign-" + name
	}
	if port := p.base.Port(); port != "" {
		return "countersign-" + name + "-" + port
	}
	return "countersign-" + name
}

// setCookie sets a cookie that ends with the browser, or after maxAge seconds;
// a negative one removes it.
func (p *People) setCookie(w http.ResponseWriter, name, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{Name: p.cookie(name), Value: value, Path: "/", MaxAge: maxAge,
		Secure: p.secure, HttpOnly: true, SameSite: http.SameSiteLaxMode})
}

// cookieValue returns the cookie's value, when it is there once and has the
// form of what setCookie was given.
func (p *People) cookieValue(r *http.Request, name string) string {
	cs := r.CookiesNamed(p.cookie(name))
	if len(cs) != 1 || !secretForm.MatchString(cs[0].Value) {
		return ""
	}
	return cs[0].Value
}

// session returns the live session whose cookie r carries.
func (p *People) session(r *http.Request, touch bool) (session, bool) {
	v := p.cookieValue(r, "session")
	if v == "" || r.Header.Get("Authorization") != "" {
		return session{}, false
	}
	s, ok := p.Sessions.get(v, touch)
	return s, ok && !s.terminal
}

// Person returns who is logged in with r's session cookie.
func (p *People) Person(r *http.Request) (Person, bool) {
	s, ok := p.session(r, false)
	return s.person, ok
}

// Live reports whether the session that r came with, by cookie or bearer token,
// has not ended meanwhile, and does not count as use: for answers that go on
// for long.
func (p *People) Live(r *http.Request) bool {
	if token, err := bearer(r.Header); err == nil && token != "" {
		s, ok := p.Sessions.get(token, false)
		return ok && s.terminal
	}
	_, ok := p.session(r, false)
	return ok
}

// CSRF returns the token that a form of this session sends as "csrf", or a
// script as X-CSRF-Token; empty where nobody is logged in.
func (p *People) CSRF(r *http.Request) string {
	s, _ := p.session(r, false)
	return s.csrf
}

// genuine checks that a request with a session cookie, which browsers send by
// themselves, was made by a page of this recorder. It wraps ErrForgery.
func (p *People) genuine(r *http.Request, s session) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions: // safe: they change nothing
		return nil
	}
	if err := p.origins.Check(r); err != nil {
		return errors.Join(ErrForgery, err)
	}
	got := r.Header.Get("X-CSRF-Token")
	if got == "" {
		r.Body = http.MaxBytesReader(nil, r.Body, maxForm)
		if err := r.ParseForm(); err != nil {
			return errors.Join(ErrForgery, err)
		}
		got = r.PostForm.Get("csrf")
	}
	if subtle.ConstantTimeCompare([]byte(got), []byte(s.csrf)) != 1 || s.csrf == "" {
		return errors.Join(ErrForgery, errors.New("the CSRF token is missing or another's"))
	}
	return nil
}

// byCookie returns whose session cookie r carries, or nil. The error wraps
// ErrForgery.
func (p *People) byCookie(r *http.Request) (*Principal, error) {
	s, ok := p.session(r, true)
	if !ok {
		return nil, nil
	}
	if err := p.genuine(r, s); err != nil {
		return s.principal(), err
	}
	return s.principal(), nil
}

// byToken returns whose terminal's token it is. The error wraps
// ErrUnauthenticated.
func (p *People) byToken(token string) (*Principal, error) {
	s, ok := p.Sessions.get(token, true)
	if !ok || !s.terminal {
		return nil, unauthenticated("no such session, or it has ended")
	}
	return s.principal(), nil
}

func (s *session) principal() *Principal {
	return &Principal{Name: s.person.Name[len(personPrefix):], Role: Approver, Method: "session",
		Groups: slices.Clone(s.person.Groups), Roles: slices.Clone(s.person.Roles)}
}
