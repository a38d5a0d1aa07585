// Package page is what the recorder's pages have in common: their style, the
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
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

//go:embed static
var static embed.FS

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

// Files are static files that pages load, by name.
type Files struct {
	body map[string][]byte
	etag map[string]string
}

// NewFiles returns the files of every page, page.css and icon.svg, and those of
// the directory static in each of more.
func NewFiles(more ...fs.FS) (*Files, error) {
	f := &Files{map[string][]byte{}, map[string]string{}}
	for _, from := range append([]fs.FS{static}, more...) {
		list, err := fs.ReadDir(from, "static")
		if err != nil {
			return nil, fmt.Errorf("files of the pages: %w", err)
		}
		for _, e := range list {
			b, err := fs.ReadFile(from, "static/"+e.Name())
			if err != nil {
				return nil, fmt.Errorf("files of the pages: %w", err)
			}
			sum := sha256.Sum256(b)
			f.body[e.Name()], f.etag[e.Name()] = b, `"`+base64.RawURLEncoding.EncodeToString(sum[:12])+`"`
		}
	}
	return f, nil
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
