package respond

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

//go:embed templates/*.html
var templateFiles embed.FS

//go:embed static
var staticFiles embed.FS

var (
	templates = page.Templates(templateFiles, template.FuncMap{"covers": covers, "count": plural})
	files     = page.NewFiles(staticFiles)
)

// covers is what a freeze covers, in words.
func covers(s client.Stop) string { return store.FreezeDetails(s).String() }

func plural(n int64, what string) string { return page.Count(int(n), what) }

// frame is what surrounds every page.
type frame struct {
	page.Frame
	Acts    bool   // may set and lift
	Reviews bool   // may read the history
	Version string // of what changes
}

func (s *Server) frame(r *http.Request, title string) frame {
	f := frame{Frame: page.Frame{Title: title, Home: "/revocations", Section: "/revocations", Here: "/revocations", Script: "respond.js", Now: s.c.Now(), Narrow: true}}
	if p := auth.From(r.Context()); p != nil {
		f.Acts, f.Reviews = p.Has(auth.Responder), p.Has(auth.Reviewer)
		if s.c.Guard.People != nil && p.Method == "session" {
			f.Person, f.CSRF = p.Name, s.c.Guard.People.CSRF(r)
		}
	}
	f.Links = page.Links(r, f.Person)
	return f
}

// live has the page show what changes, and be fetched again after a while: soon
// where credentials are to go.
func (f *frame) live(shown any, busy bool) {
	f.Version, f.Data = version(shown), map[string]string{"every": "10"} // seconds
	if busy {
		f.Data["every"] = "1"
	}
}

// version names what a region of a page shows, so that the script replaces it
// only where it shows something else.
func version(shown any) string {
	b, err := json.Marshal(shown, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		panic(err) // our own types always marshal
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// listPage shows the freezes. What a person typed, and why it was not taken, is
// shown again.
func (s *Server) listPage(w http.ResponseWriter, r *http.Request, status int, typed stopping, why error) {
	list, err := s.all(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	data := struct {
		frame
		List  *client.Revocations
		Typed stopping
		Wrong string
	}{s.frame(r, "Freezes"), list, typed, ""}
	if why != nil {
		data.Wrong = page.Sentence(problem.From(why).Detail)
	}
	data.live(list, slices.ContainsFunc(list.Revocations, func(v client.Revocation) bool { return v.Left() > 0 }))
	page.Write(w, r, status, templates, "list", data)
}

// onePage shows one freeze.
func (s *Server) onePage(w http.ResponseWriter, r *http.Request, v *client.Revocation) {
	data := struct {
		frame
		It  *client.Revocation
		Own bool // the reader set it
	}{s.frame(r, "Freeze of "+covers(v.Stop)), v, false}
	if p := auth.From(r.Context()); p != nil {
		data.Own = strings.EqualFold(v.SetBy, p.Person())
	}
	data.live(v, v.Left() > 0)
	page.Write(w, r, http.StatusOK, templates, "one", data)
}

// fail answers with the problem that err is, to a browser as a page.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if !page.Wanted(r) {
		problem.Write(w, r, err)
		return
	}
	page.WriteProblem(w, r, templates, s.frame(r, "").Frame, problem.From(err), "To the freezes", "")
}

func (s *Server) file(w http.ResponseWriter, r *http.Request) {
	files.Serve(w, r, chi.URLParam(r, "file"))
}

// isForm reports whether r carries a form of a page.
func isForm(r *http.Request) bool {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(media), "application/x-www-form-urlencoded")
}

// fromForm is what the page's form stops. Everything is stopped only where that
// was chosen and nothing is named.
func fromForm(r *http.Request) (in stopping, err error) {
	f := r.PostForm
	in.Reason = f.Get("reason")
	name := strings.TrimSpace(f.Get("name"))
	at := map[string]*string{"run": &in.Run, "step": &in.Step, "orchestrator": &in.Orchestrator, "scope": &in.Scope}[f.Get("what")]
	switch {
	case at != nil && name != "":
		*at = name
	case at != nil:
		err = problem.Malformed(fmt.Sprintf("name the %s to stop", f.Get("what")))
	case f.Get("what") == "all" && name != "":
		err = problem.Malformed("everything is stopped without a name: leave it empty, or choose what it names")
	case f.Get("what") == "all":
		in.All = true
	default:
		err = problem.Malformed("choose what to stop")
	}
	return in, err
}
