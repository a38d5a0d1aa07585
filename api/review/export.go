package review

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// sendTime is how long one piece of an export may take to be sent.
const sendTime = time.Minute

// Routes adds the routes of exports to r, for reviewers whom g lets through.
func (x *Exports) Routes(r chi.Router, g *auth.Guard) {
	r.Group(func(r chi.Router) {
		if g.People != nil {
			r.Use(g.People.ToLogin)
		}
		r.Use(g.Require(auth.Reviewer))
		r.Get("/history/export", x.create)
		// HEAD would put an export on record that nobody gets.
		r.Head("/history/export", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", http.MethodGet)
			problem.Write(w, r, problem.MethodNotAllowed(r.Method))
		})
		r.Get("/history/export/{id}", x.progress)
		r.Get("/history/export/{id}/file", x.file)
	})
}

// exportQuery reads format, since and the filters of an export. filters are as
// export.created has them.
func (x *Exports) exportQuery(v map[string][]string) (format string, since int64, q *ledger.Query, filters map[string]string, err error) {
	format = "bundle"
	rest, filters := map[string][]string{}, map[string]string{}
	for name, values := range v {
		switch name {
		case "limit", "cursor", "before":
			return "", 0, nil, nil, problem.Malformed("an export has no " + name + ": it holds all that the filters select")
		case "format", "since":
			if len(values) != 1 {
				return "", 0, nil, nil, problem.Malformed(fmt.Sprintf("%s is given %d times", name, len(values)))
			}
			if name == "format" {
				format = values[0]
			} else if since, err = strconv.ParseInt(values[0], 10, 64); err != nil || since < 0 {
				return "", 0, nil, nil, problem.Malformed("since: want the size of an earlier checkpoint")
			}
		default:
			rest[name] = values
		}
	}
	if _, ok := x.c.Formats[format]; !ok {
		return "", 0, nil, nil, problem.Malformed(fmt.Sprintf("there is no format %.50q", format))
	}
	if q, err = query(rest); err != nil {
		return "", 0, nil, nil, err
	}
	for name, values := range rest {
		value := values[0]
		switch name {
		case "from", "to":
			continue
		case "person", "subject":
			if !strings.HasPrefix(value, "p-") || strings.Contains(value, ":") {
				value = x.c.PrivacyKey.Pseudonym(value)
			}
		}
		if value != "" {
			filters[name] = value
		}
	}
	return format, since, q, filters, nil
}

// ownerOf names a caller among those who may fetch an export.
func ownerOf(p *auth.Principal) string { return p.Method + " " + string(p.Role) + " " + p.Name }

// create puts an export on record, starts it and sends it as it is written.
func (x *Exports) create(w http.ResponseWriter, r *http.Request) {
	// A browser's session comes along with a link on anybody's page, and what it
	// leads to here is put on record as the person's own doing.
	if site := r.Header.Get("Sec-Fetch-Site"); site == "cross-site" || site == "same-site" {
		problem.Write(w, r, problem.RoleForbidden("an export is not to be asked for from another site's page"))
		return
	}
	format, since, q, filters, err := x.exportQuery(r.URL.Query())
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	e, err := x.start(r.Context(), auth.From(r.Context()), format, since, q, filters)
	switch {
	case errors.Is(err, errBusy):
		problem.Write(w, r, problem.RateLimited(errBusy.Error(), 10*time.Second))
		return
	case errors.Is(err, ledger.ErrQuery):
		problem.Write(w, r, problem.Malformed(err.Error()))
		return
	case err != nil:
		problem.Write(w, r, err)
		return
	}
	defer x.detach(e)
	// The answer begins with the first bytes, so that what fails before them is
	// a problem and not half a file.
	s, err := x.wait(r.Context(), e, func(s status) bool { return s.size > 0 || s.state != exportRuns })
	if err == nil {
		err = s.err
	}
	switch {
	case r.Context().Err() != nil:
		return
	case errors.Is(err, errSpace):
		problem.Write(w, r, problem.StateUnavailable().Because(err))
		return
	case err != nil:
		problem.Write(w, r, err)
		return
	}
	x.head(w, e)
	w.Header().Set("Content-Location", "/history/export/"+e.id+"/file")
	if err := x.copy(r.Context(), e, &extending{w}, http.NewResponseController(w).Flush); err != nil {
		// Half an answer is out; broken off, it does not look whole.
		panic(http.ErrAbortHandler)
	}
}

// head sets what says of which kind the file is.
func (x *Exports) head(w http.ResponseWriter, e *export) {
	h := w.Header()
	h.Set("Content-Type", x.c.Formats[e.format].ContentType)
	h.Set("Content-Disposition", `attachment; filename="`+e.name+`"`)
}

// start appends export.created and begins to write. A crash after the append
// leaves an export on record that nobody received.
func (x *Exports) start(ctx context.Context, p *auth.Principal, format string, since int64, q *ledger.Query, filters map[string]string) (*export, error) {
	x.mu.Lock()
	err := x.busy() // before anything is on record
	x.mu.Unlock()
	if err != nil {
		return nil, err
	}
	l := x.c.Ledger
	if size := l.Size(); since > size {
		return nil, fmt.Errorf("%w: since %d, the log has %d entries", ledger.ErrQuery, since, size)
	}
	from, to, err := evidence.Window(ctx, l, *q)
	if err != nil {
		return nil, err
	}
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.ExportCreated, WriterTime: store.At(time.Now()),
		Agent: p.Agent(x.c.TrustDomain), Action: string(store.ExportCreated),
	}}
	if p.Method == "session" {
		who := x.c.PrivacyKey.Pseudonym(p.Person())
		s.Agent, s.Person = "spiffe://"+x.c.TrustDomain+"/person/"+who, store.Ptr(who)
		s.Seal(store.SealedPerson, p.Person())
	}
	s.SetDetails(store.ExportDetails{Format: format, From: from, To: to, Filters: filters})
	line, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	a, err := l.Append(ctx, ledger.Author{Name: x.c.Name, Recorder: true}, [][]byte{line})
	if err != nil {
		return nil, err
	}
	e := &export{
		id: s.ID, format: format, owner: ownerOf(p), index: a.Entries[0].Index,
		name: fmt.Sprintf("countersign-%d-%d%s", from, to, x.c.Formats[format].Extension),
	}
	return e, x.begin(e, evidence.ExportOptions{Query: *q, From: from, To: to, Index: e.index, Filters: filters, Since: since})
}

// mine finds the export that r names, for who asked for it.
func (x *Exports) mine(w http.ResponseWriter, r *http.Request) *export {
	e := x.attach(chi.URLParam(r, "id"), ownerOf(auth.From(r.Context())))
	if e == nil {
		problem.Write(w, r, problem.NotFound("there is no such export of yours, or not any more: ask for it anew"))
	}
	return e
}

func (x *Exports) progress(w http.ResponseWriter, r *http.Request) {
	e := x.mine(w, r)
	if e == nil {
		return
	}
	defer x.detach(e)
	s := x.status(e)
	b, err := json.Marshal(&client.ExportProgress{
		ID: e.id, Index: e.index, Format: e.format, Name: e.name, State: s.state, Done: s.done, Of: s.of, Bytes: s.size, SHA256: s.sum,
	}, json.Deterministic(true))
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(b, '\n'))
}

// file sends an export once it is ready, or the part of it that is asked for.
func (x *Exports) file(w http.ResponseWriter, r *http.Request) {
	e := x.mine(w, r)
	if e == nil {
		return
	}
	defer x.detach(e)
	s, err := x.wait(r.Context(), e, func(s status) bool { return s.state != exportRuns })
	if err != nil {
		return // the caller is gone
	}
	if s.state == exportFailed {
		problem.Write(w, r, problem.NotFound("the export did not succeed: ask for it anew").Because(s.err))
		return
	}
	f, err := os.Open(e.path)
	if err != nil {
		problem.Write(w, r, err)
		return
	}
	defer f.Close()
	x.head(w, e)
	w.Header().Set("ETag", `"`+s.sum+`"`)
	http.ServeContent(&extending{w}, r, "", time.Time{}, f)
}

// extending moves the deadline of an answer before each piece of it.
type extending struct{ http.ResponseWriter }

func (e *extending) Write(p []byte) (int, error) {
	server.Extend(e.ResponseWriter, sendTime)
	return e.ResponseWriter.Write(p)
}
