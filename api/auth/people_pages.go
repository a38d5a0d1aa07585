package auth

import (
	"bytes"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api/problem"
)

// wantsPage reports whether a browser asks for a page: it says text/html, which
// scripts and programs do not.
func wantsPage(r *http.Request) bool {
	for _, v := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(v, ",") {
			media, _, _ := strings.Cut(part, ";")
			if strings.EqualFold(strings.TrimSpace(media), "text/html") {
				return true
			}
		}
	}
	return false
}

// page is one of the login's few pages.
type page struct {
	Title, Text string
	Link, Label string // where to go on, and what that is called
	Refresh     bool   // go there at once
	Action      string // a form's, instead of the link
	Fields      map[string]string
	Instance    string // the request's ID, as the logs have it
	form        string // a further origin that the form may lead to
}

var pages = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
{{if .Refresh}}<meta http-equiv="refresh" content="0;url={{.Link}}">
{{end}}<title>{{.Title}} · Countersign</title>
<link rel="stylesheet" href="/login/style.css">
</head>
<body>
<main>
<h1>{{.Title}}</h1>
{{if .Text}}<p>{{.Text}}</p>
{{end}}{{if .Action}}<form method="post" action="{{.Action}}">
{{range $name, $value := .Fields}}<input type="hidden" name="{{$name}}" value="{{$value}}">
{{end}}<button type="submit">{{.Label}}</button>
</form>
{{else if .Link}}<p><a href="{{.Link}}">{{.Label}}</a></p>
{{end}}{{if .Instance}}<p class="quiet">Request {{.Instance}}</p>
{{end}}</main>
</body>
</html>
`))

const css = `:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;margin:0;color:CanvasText;background:Canvas}
main{max-width:34rem;margin:12vh auto;padding:0 1.25rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}
button{font:inherit;padding:.6rem 1.2rem;min-height:2.75rem}
.quiet{opacity:.75;font-size:.875rem}
`

func style(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=3600") // seconds
	_, _ = w.Write([]byte(css))
}

// writePage answers with p. Nothing in it is fetched from elsewhere, nothing
// runs, and nobody frames it.
func writePage(w http.ResponseWriter, r *http.Request, status int, p page) {
	var b bytes.Buffer
	if err := pages.Execute(&b, p); err != nil {
		problem.Write(w, r, problem.Internal(err))
		return
	}
	form := "'none'"
	if p.Action != "" {
		form = "'self'"
		if p.form != "" {
			form += " " + p.form
		}
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action "+form)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = b.WriteTo(w)
}

// writeErrorPage is problem.Write for people.
func writeErrorPage(w http.ResponseWriter, r *http.Request, doc *problem.Problem) {
	doc = problem.Logged(r, doc)
	if doc.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt(int64((doc.RetryAfter+time.Second-1)/time.Second), 10))
	}
	p := page{Title: doc.Title, Text: doc.Detail, Instance: problem.RequestID(r.Context())}
	if doc.Status == http.StatusUnauthorized {
		p.Title, p.Link, p.Label = "You are not logged in", "/login", "Log in"
		if doc.Detail == problem.Unauthenticated().Detail { // about bearer tokens, which people have none of
			p.Text = ""
		}
	}
	writePage(w, r, doc.Status, p)
}

func writeJSON(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		panic(err) // our own types always marshal
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(append(b, '\n'))
}
