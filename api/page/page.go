// Package page is what the recorder's pages have in common: layout and style, the
// headers under which a browser takes them, and how they write texts, times and
// rules for people.
package page

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

//go:embed static
var static embed.FS

//go:embed layout.html
var layout string

// Templates parses templates/*.html of files, which are the program's own, over
// the layout of every page: "top", "bottom" and "problem". They define "foot",
// and take data that embeds a Frame.
func Templates(files fs.FS, funcs template.FuncMap) *template.Template {
	t := template.New("").Funcs(template.FuncMap{"text": Text, "clock": Clock}).Funcs(funcs)
	return template.Must(template.Must(t.Parse(layout)).ParseFS(files, "templates/*.html"))
}

// Link leads to a page.
type Link struct{ URL, Name string }

// Frame is what surrounds a page.
type Frame struct {
	Title   string
	Home    string            // the first page of its kind; their files are under Home/static
	Style   string            // a file beside page.css; empty: none
	Script  string            // a file; empty: none
	Data    map[string]string // for the script, as data attributes of the body
	Links   []Link            // to pages of other kinds
	Section string            // the URL of the link that the page stands under
	Exact   bool              // it is the page that this link leads to
	Person  string            // who is logged in; empty: a token
	CSRF    string
	Now     time.Time
	Narrow  bool
	Here    string // where the page is got again, since it may answer a form; empty: nowhere
}

// Links are to the recorder's pages that whoever r is from may see. person is
// who is logged in, empty for a token.
func Links(r *http.Request, person string) (list []Link) {
	if person != "" {
		list = append(list, Link{"/approvals", "Approvals"}, Link{"/passkeys", "Passkeys"})
	}
	p := auth.From(r.Context())
	if p != nil && p.Has(auth.Reviewer) {
		list = append(list, Link{"/history", "History"})
	}
	if p != nil && (p.Has(auth.Reviewer) || p.Has(auth.Responder)) {
		list = append(list, Link{"/revocations", "Freezes"})
	}
	return list
}

// Policy is the Content-Security-Policy of every page: all that a page loads,
// runs and posts to is this recorder's own, and nobody frames it.
const Policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// Wanted reports whether the answer to r is a page: a browser asks for one by
// naming text/html, which scripts and programs do not.
func Wanted(r *http.Request) bool {
	for part := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		media, _, _ := strings.Cut(part, ";")
		if strings.EqualFold(strings.TrimSpace(media), "text/html") {
			return true
		}
	}
	return false
}

// Write answers with the page that the template named name makes of data.
func Write(w http.ResponseWriter, r *http.Request, status int, t *template.Template, name string, data any) {
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, name, data); err != nil {
		problem.Write(w, r, problem.Internal(fmt.Errorf("page %s: %w", name, err)))
		return
	}
	header := w.Header()
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Security-Policy", Policy)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Frame-Options", "DENY") // for browsers that do not know frame-ancestors
	// Not no-referrer, under which browsers send "Origin: null" with a form, and
	// a form from elsewhere could not be told from ours.
	header.Set("Referrer-Policy", "same-origin")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=(), publickey-credentials-create=(self), publickey-credentials-get=(self)")
	header.Set("Cache-Control", "no-store")
	header.Add("Vary", "Accept")
	w.WriteHeader(status)
	_, _ = b.WriteTo(w)
}

// WriteProblem answers with doc in the frame f. back is what the link to its home
// says, and advice what to do, if anything.
func WriteProblem(w http.ResponseWriter, r *http.Request, t *template.Template, f Frame, doc *problem.Problem, back, advice string) {
	doc = problem.Logged(r, doc)
	if doc.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt(int64((doc.RetryAfter+time.Second-1)/time.Second), 10))
	}
	f.Title, f.Narrow = doc.Title, true
	Write(w, r, doc.Status, t, "problem", struct {
		Frame
		Detail, Advice, Back, Instance string
	}{f, Sentence(doc.Detail), advice, back, problem.RequestID(r.Context())})
}

// Files are static files that pages load, by name.
type Files struct {
	body map[string][]byte
	etag map[string]string
}

// NewFiles returns the files of every page, page.css and icon.svg, and those of
// the directory static in own, which are the program's too.
func NewFiles(own fs.FS) *Files {
	f := &Files{map[string][]byte{}, map[string]string{}}
	for _, from := range []fs.FS{static, own} {
		names, err := fs.Glob(from, "static/*")
		for _, name := range names {
			var b []byte
			if b, err = fs.ReadFile(from, name); err != nil {
				break
			}
			sum := sha256.Sum256(b)
			f.body[path.Base(name)], f.etag[path.Base(name)] = b, `"`+base64.RawURLEncoding.EncodeToString(sum[:12])+`"`
		}
		if err != nil {
			panic(err) // embedded: no test passes
		}
	}
	return f
}

// Serve answers with the file named name.
func (f *Files) Serve(w http.ResponseWriter, r *http.Request, name string) {
	b, ok := f.body[name]
	if !ok {
		problem.Write(w, r, problem.NotFound("no such path"))
		return
	}
	header := w.Header()
	header.Set("ETag", f.etag[name])
	header.Set("Cache-Control", "no-cache") // asked for again by its ETag: a new recorder brings a new style
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Content-Type", map[string]string{
		".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
	}[path.Ext(name)])
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

// Text is s for a page, whole. Characters that a reader would not see, or that
// turn the direction of reading, are written as their code points: they are how
// a text says something else to a person than to a machine (CVE-2021-42574).
// The two joiners stay, since Persian, Indic scripts and emoji need them.
func Text(s string) template.HTML {
	s = strings.ReplaceAll(s, "\r\n", "\n")
	var b strings.Builder
	plain := 0
	for i, r := range s {
		if !Unseen(r) && r != unicode.ReplacementChar {
			continue
		}
		if r == unicode.ReplacementChar && strings.HasPrefix(s[i:], "\ufffd") {
			continue // it is there itself, and stands for no broken byte
		}
		template.HTMLEscape(&b, []byte(s[plain:i]))
		size := len(string(r))
		if r == unicode.ReplacementChar { // a byte that is no UTF-8
			fmt.Fprintf(&b, `<span class="unseen">byte %02X</span>`, s[i])
			size = 1
		} else {
			fmt.Fprintf(&b, `<span class="unseen">U+%04X</span>`, r)
		}
		plain = i + size
	}
	template.HTMLEscape(&b, []byte(s[plain:]))
	return template.HTML(b.String()) // escaped above, piece by piece
}

// Begin returns at most n characters of s, and how many it left out.
func Begin(s string, n int) (string, int) {
	s = strings.TrimSpace(s)
	all := utf8.RuneCountInString(s)
	if all <= n {
		return s, 0
	}
	i := 0
	for range n {
		_, size := utf8.DecodeRuneInString(s[i:])
		i += size
	}
	return s[:i], all - n
}

// Unseen reports whether a reader would not see r.
func Unseen(r rune) bool {
	switch r {
	case '\n', '\t', '\u200c', '\u200d':
		return false
	case '\u115f', '\u1160', '\u3164', '\uffa0', '\u2800': // letters that are drawn as nothing
		return true
	}
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co, unicode.Noncharacter_Code_Point)
}

// Stamp is t for machines.
func Stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Clock is t for people, in UTC: a page is read by people in several places.
func Clock(t time.Time) template.HTML {
	t = t.UTC()
	return template.HTML(`<time datetime="` + Stamp(t) + `">` + t.Format("2 Jan 2006, 15:04:05 UTC") + `</time>`)
}

// Span is a duration in words.
func Span(d store.Duration) string {
	left := time.Duration(d)
	var parts []string
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}} {
		if n := left / u.unit; n > 0 {
			parts = append(parts, Count(int(n), u.name))
			left %= u.unit
		}
	}
	if left > 0 || len(parts) == 0 {
		parts = append(parts, left.String())
	}
	return strings.Join(parts, " ")
}

// Count is n things in words: what is the singular.
func Count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// People is how many people, in words.
func People(n int) string {
	if n == 1 {
		return "1 person"
	}
	return fmt.Sprintf("%d people", n)
}

// Line is one thing that a rule asks for.
type Line struct {
	Name  string
	Lines []string
}

// RuleInWords says all that rule asks for.
func RuleInWords(rule *store.Rule) []Line {
	var who []string
	for _, g := range rule.Groups {
		who = append(who, fmt.Sprintf("%s of group %s", People(g.Count), g.Group))
	}
	if len(rule.Groups) > 1 {
		who = append(who, "All of these. A person in several groups still counts once.")
	}
	lines := []Line{
		{"Must approve", who},
		{"May not", []string{"The person it is for, and the owners of the orchestrator."}},
		{"A denial", []string{"By any one of these people, at any hour: it ends the request at once."}},
	}
	hours := "At any hour."
	if h := rule.Hours; h != nil {
		hours = "Approvals are taken from " + h.From + " to " + h.To + ", " + h.Zone + Days(h.Days) + "."
	}
	reasons := "Due from nobody."
	switch {
	case rule.Reasons.Requester && rule.Reasons.Approver:
		reasons = "Due from the requester and from whoever decides."
	case rule.Reasons.Requester:
		reasons = "Due from the requester."
	case rule.Reasons.Approver:
		reasons = "Due from whoever decides."
	}
	passkey := "Not due. A decision may be signed with one all the same."
	if rule.Passkey {
		passkey = "Each approval must be signed with one."
	}
	slack := "It is decided here, not in Slack."
	if rule.Slack {
		slack = "It may be decided in Slack too, by people whose account is linked."
	}
	run := "An approval is for this one credential."
	if s := rule.Standing; s != nil {
		run = fmt.Sprintf("An approval may be given for the whole run: at most %s, for at most %s.", Count(s.Uses, "use"), Span(s.For))
	}
	return append(lines,
		Line{"Hours", []string{hours}},
		Line{"Reasons", []string{reasons}},
		Line{"Passkey", []string{passkey}},
		Line{"Time", []string{"It waits for people for " + Span(rule.Expires) + ".", "Once approved, it must be used within " + Span(rule.Collect) + "."}},
		Line{"Slack", []string{slack}},
		Line{"Whole run", []string{run}},
	)
}

// Days says on which days of the week.
func Days(list []time.Weekday) string {
	if len(list) == 0 {
		return ", every day"
	}
	names := make([]string, len(list))
	for i, d := range list {
		names[i] = d.String()
	}
	return ", on " + strings.Join(names, ", ")
}

// Sentence is what a problem says, for a page.
func Sentence(s string) string {
	r, size := utf8.DecodeRuneInString(s)
	if size == 0 {
		return ""
	}
	s = string(unicode.ToUpper(r)) + s[size:]
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}
