package approve

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

//go:embed templates/*.html
var templates embed.FS

//go:embed static
var static embed.FS

// Judge is what the pages ask beside what they are handed; *approvals.Approvals
// is one.
type Judge interface {
	// May says whether p may decide r so; the error is a *store.OrderError.
	May(r *approvals.Request, p approvals.Person, d approvals.Decision) error
	// Before says what came before r.
	Before(ctx context.Context, r *approvals.Request) (*approvals.Context, error)
	// Passkeys lists the keys of of.
	Passkeys(ctx context.Context, of *approvals.Person) ([]approvals.Passkey, error)
}

// HTMLConfig is what the pages need.
type HTMLConfig struct {
	Judge  Judge
	CSRF   func(*http.Request) string // the token of the session's forms
	Scopes approvals.Catalogue        // describes scopes; nil: nothing does
	// Message returns the address of the Slack message about an approval, or
	// nothing; nil: there is no Slack.
	Message func(ctx context.Context, approval string) string
	// Enrol is whether people enrol passkeys here.
	Enrol bool
	// ActivateAfter is when a passkey is active by itself; zero: a second person
	// activates it.
	ActivateAfter time.Duration
	// PasskeyAdmins are the groups whose members revoke others' passkeys. Where
	// there are any, only they activate them.
	PasskeyAdmins []string
	// Slack links people's Slack accounts; nil: there is no Slack.
	Slack SlackAccounts
	Now   func() time.Time // time.Now where nil
}

// HTML is the pages of the approvals. They work without a script, but for
// passkeys.
type HTML struct {
	c     HTMLConfig
	t     *template.Template
	files *page.Files
}

// NewHTML returns the pages.
func NewHTML(c HTMLConfig) (*HTML, error) {
	if c.Judge == nil || c.CSRF == nil {
		return nil, errors.New("the approval pages need what says who may decide, and the sessions' CSRF tokens")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &HTML{c, page.Templates(templates, template.FuncMap{
		"remaining": remaining, "span": page.Span, "delivery": delivery, "access": approvals.AccessInWords, "happened": happened,
		"join":  func(list []string) string { return strings.Join(list, ", ") },
		"exact": func(d store.Duration) string { return time.Duration(d).String() },
	}), page.NewFiles(static)}, nil
}

// Routes adds style and scripts.
func (h *HTML) Routes(r chi.Router) {
	r.Get("/approvals/static/{file}", h.file)
	if h.c.Slack != nil {
		r.Get("/slack/link", h.slack)
		r.Post("/slack/link", h.linkSlack)
	}
}

func (h *HTML) file(w http.ResponseWriter, r *http.Request) {
	h.files.Serve(w, r, chi.URLParam(r, "file"))
}

// frame is what surrounds every page.
type frame struct {
	page.Frame
	Notice string // good news
}

func (h *HTML) frame(r *http.Request, person approvals.Person, section, title string) frame {
	name := strings.TrimPrefix(person.Name, "user:")
	f := page.Frame{Title: title, Home: "/approvals", Section: section, Script: "approve.js", Links: page.Links(r, name), Person: name, CSRF: h.c.CSRF(r), Now: h.c.Now()}
	if h.c.Slack != nil {
		f.Links = append(f.Links, page.Link{URL: "/slack/link", Name: "Slack"})
	}
	f.Data = map[string]string{"now": page.Stamp(f.Now), "csrf": f.CSRF}
	return frame{Frame: f}
}

// live has the page be fetched again from here when something happens.
func (f *frame) live(here string) {
	f.Here, f.Data["here"], f.Data["events"], f.Data["kinds"] = here, here, "/approvals/events", kinds
}

// kinds are the events that a page is fetched again for.
const kinds = approvals.EventRequested + " " + approvals.EventDecided + " " + approvals.EventApproved + " " + approvals.EventDenied + " " +
	approvals.EventExpired + " " + approvals.EventWithdrawn + " " + approvals.EventVoid + " " + approvals.EventIssued + " " +
	approvals.EventPasskey + " " + approvals.EventResync

// write answers with a page.
func (h *HTML) write(w http.ResponseWriter, r *http.Request, status int, name string, data any) {
	page.Write(w, r, status, h.t, name, data)
}

// version names what a region of a page shows, so that the script replaces it
// only where it shows something else.
func version(shown ...any) string {
	b, err := json.Marshal(shown, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		panic(err) // our own types always marshal
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// row is a request in the inbox.
type row struct {
	*approvals.Request
	Link    string
	State   state
	Tone    string
	Pending bool
	Said    string // the reason, or its beginning
	Cut     int    // how many characters of the reason are left out
	Now     time.Time
}

// kin are requests of one run for one scope that wait, as they stand in the
// inbox.
type kin struct {
	Orchestrator, Run, Scope string
	Rows                     []row
}

// many is from how many on requests of one run for one scope are folded up.
const many = 6

// Many reports whether k is folded up. Each is looked at and decided on its own
// all the same.
func (k *kin) Many() bool { return len(k.Rows) >= many }

// kinOf sorts the rows of a page: those that wait, of one run for one scope, go
// together where the first of them stands, if they are many.
func kinOf(rows []row) (list []*kin) {
	type key struct{ orchestrator, run, scope string }
	of := func(x *row) key { return key{x.Orchestrator, x.Run, x.Scope} }
	n := map[key]int{}
	for i := range rows {
		if rows[i].Pending {
			n[of(&rows[i])]++
		}
	}
	folded := map[key]*kin{}
	for i := range rows {
		x := &rows[i]
		if k := folded[of(x)]; k != nil && x.Pending {
			k.Rows = append(k.Rows, *x)
			continue
		}
		k := &kin{x.Orchestrator, x.Run, x.Scope, []row{*x}}
		if x.Pending && n[of(x)] >= many {
			folded[of(x)] = k
		}
		list = append(list, k)
	}
	return list
}

// tab is a link to a state of requests.
type tab struct {
	Name, URL string
	Current   bool
}

// maxSaid is how many characters of a reason the inbox shows.
const maxSaid = 280

var tabs = []struct{ state, name, what, empty, text string }{
	{approvals.StateMine, "For me", "Requests that wait for you", "Nothing waits for you", "When an orchestrator asks for something that you may approve, it stands here at once. There is nothing you need to do."},
	{approvals.StatePending, "Waiting", "Requests that wait for people", "Nothing waits for anybody", "No orchestrator waits for a person. What is asked for next stands here at once."},
	{approvals.StateDecided, "Decided", "Requests that are decided", "Nothing has been decided yet", "What people approve or deny, and what expires, stands here afterwards."},
	{approvals.StateAll, "All", "All requests", "Nobody has asked yet", "Requests for sensitive scopes stand here, from the first one on."},
}

// Inbox implements Pages.
func (h *HTML) Inbox(w http.ResponseWriter, r *http.Request, person approvals.Person, f approvals.Filter, list []approvals.Request, next string) {
	if f.State == "" {
		f.State = approvals.StatePending
	}
	inbox := struct {
		frame
		What, Empty, EmptyText string
		Tabs                   []tab
		Kin                    []*kin
		First, More, Version   string
	}{frame: h.frame(r, person, "/approvals", "Approvals")}
	inbox.Exact = true
	inbox.live(r.URL.RequestURI())
	for _, t := range tabs {
		inbox.Tabs = append(inbox.Tabs, tab{t.name, "/approvals?state=" + t.state, t.state == f.State})
		if t.state == f.State {
			inbox.What, inbox.Empty, inbox.EmptyText = t.what, t.empty, t.text
		}
	}
	if f.Before != "" {
		inbox.First = "/approvals?state=" + url.QueryEscape(f.State)
		if len(list) == 0 {
			inbox.Empty, inbox.EmptyText = "There is nothing older", "This is the end of the list."
		}
	}
	if next != "" {
		inbox.More = "/approvals?state=" + url.QueryEscape(f.State) + "&cursor=" + url.QueryEscape(next)
	}
	shown := []any{next}
	var rows []row
	for i := range list {
		q := &list[i]
		x := row{Request: q, Link: "/approvals/" + url.PathEscape(q.ID), State: stateOf(q.Status), Tone: q.Sensitivity, Pending: q.Status == store.StatusPending, Now: inbox.Now}
		x.Said, x.Cut = page.Begin(q.Reason, maxSaid)
		rows = append(rows, x)
		shown = append(shown, q.ID, q.Status, q.Needs, len(q.Decisions))
	}
	inbox.Kin, inbox.Version = kinOf(rows), version(shown...)
	h.write(w, r, http.StatusOK, "inbox", inbox)
}

// seat is how far a group has come.
type seat struct {
	approvals.Need
	Dots []bool // one per person due, true where somebody approved
}

// attempt is a decision that did not count.
type attempt struct {
	approvals.Refused
	Why string
}

// requestPage is the page of one request.
type requestPage struct {
	frame
	R           *approvals.Request
	Description string // of the scope, from the catalogue
	State       state
	Pending     bool // people are due
	Waits       bool // its time runs
	Rule        []page.Line
	Seats       []seat
	Refused     []attempt
	Past        *approvals.Context // nil: it cannot be read now
	SlackURL    string

	Version  string // of what is decided so far
	Deciding string // version of the form

	CanDecide, CanApprove bool
	WhyNot                string // why it cannot be decided, or not approved
	Wrong                 string // why the decision that was sent did not count
	Said                  string // the reason that was sent with it
	ReasonDue, Passkey    bool
	HasKey                bool // the person has an active passkey
	Standing              *store.StandingLimit
	Scopes                []string // that an approval for the whole run may cover
	Untils                []until  // when it may end
	Enrol                 bool     // a passkey can be enrolled here
}

// until is an end that an approval for the whole run may have. It is a time, not
// a duration: what is signed is what the page showed.
type until struct{ Value, Name string }

// Show implements Pages.
func (h *HTML) Show(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request) {
	p, err := h.request(r, person, req)
	if err != nil {
		h.Problem(w, r, person, problem.From(err))
		return
	}
	// After its decision the form leads here. What is said is read from the
	// record, since anybody can make a link.
	if r.URL.Query().Has("decided") {
		for _, d := range slices.Backward(req.Decisions) {
			if d.Person == person.Name {
				p.Notice = fmt.Sprintf("Your %s is on record, as entry %d.", map[string]string{store.Approve: "approval", store.Refuse: "denial"}[d.Decision], d.Index)
				break
			}
		}
	}
	h.write(w, r, http.StatusOK, "request", p)
}

// Decided implements Pages: what was decided is shown by the request's page, so
// that a reload decides nothing again (RFC 9110, section 15.4.4).
func (h *HTML) Decided(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request, d approvals.Decision, err error) {
	if err == nil && req != nil {
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, "/approvals/"+url.PathEscape(req.ID)+"?decided", http.StatusSeeOther)
		return
	}
	if err == nil {
		err = approvals.ErrNotFound
	}
	doc := problemOf(err)
	if req == nil || doc.Status >= http.StatusInternalServerError {
		h.Problem(w, r, person, doc)
		return
	}
	p, ferr := h.request(r, person, req)
	if ferr != nil {
		h.Problem(w, r, person, problem.From(ferr))
		return
	}
	p.Wrong, p.Said = wrong(doc, err), d.Reason
	p.Title = "Not decided: " + p.Title
	h.write(w, r, doc.Status, "request", p)
}

// problemOf says which problem an error of the approvals is, for its status.
func problemOf(err error) *problem.Problem { return problem.From(refusal(err)) }

// refusals says to a person why the record does not take the decision.
var refusals = map[store.OrderCode]string{
	store.OrderSelf:     "You are on the requester’s side: it is for you, or you own the orchestrator that asks. Somebody else has to decide.",
	store.OrderApprover: "You are in none of the groups that decide this.",
	store.OrderDecided:  "You have approved this already. Each person counts once.",
	store.OrderHours:    "Approvals are not taken at this hour.",
	store.OrderPasskey:  "An approval of this must be signed with your passkey.",
	store.OrderReason:   "Say why: a reason is due.",
	store.OrderNotOpen:  "It is not open any more.",
}

// wrong says why a decision did not count.
func wrong(doc *problem.Problem, err error) string {
	var order *store.OrderError
	if errors.As(err, &order) && refusals[order.Code] != "" {
		return refusals[order.Code]
	}
	if doc.Detail != "" {
		return page.Sentence(doc.Detail)
	}
	return page.Sentence(doc.Title)
}

// request makes the page of req as person sees it.
func (h *HTML) request(r *http.Request, person approvals.Person, req *approvals.Request) (*requestPage, error) {
	p := &requestPage{
		frame: h.frame(r, person, "/approvals", req.Scope), R: req,
		State: stateOf(req.Status), Pending: req.Status == store.StatusPending,
		Waits: req.Status == store.StatusPending || req.Status == store.StatusApproved,
		Rule:  page.RuleInWords(&req.Rule), ReasonDue: req.Rule.Reasons.Approver, Passkey: req.Rule.Passkey,
		Standing: req.Rule.Standing, Enrol: h.c.Enrol,
	}
	p.live("/approvals/" + url.PathEscape(req.ID))
	if h.c.Scopes != nil {
		if set := h.c.Scopes.Current(); set != nil {
			if s, ok := set.Scope(req.Scope); ok {
				p.Description = s.Description
			}
		}
	}
	if h.c.Message != nil {
		if u, err := url.Parse(h.c.Message(r.Context(), req.ID)); err == nil && u.Scheme == "https" && u.Host != "" {
			p.SlackURL = u.String()
		}
	}
	for _, n := range req.Needs {
		s := seat{Need: n}
		for i := range n.Count {
			s.Dots = append(s.Dots, i < n.Approved)
		}
		p.Seats = append(p.Seats, s)
	}
	for _, x := range req.Refused {
		p.Refused = append(p.Refused, attempt{x, why(x.Problem)})
	}
	past, err := h.c.Judge.Before(r.Context(), req)
	if err != nil { // said on the page; what is to be decided is there all the same
		problem.Logger(r.Context()).Warn("what came before a request cannot be read", zap.String("approval", req.ID), zap.Error(err))
	} else {
		p.Past = past
	}
	if err := h.mayDecide(r, person, p); err != nil {
		return nil, err
	}
	p.Version = version(req.Status, req.Needs, req.Decisions, req.Refused, req.Expires)
	p.Deciding = version(req.Status, p.CanDecide, p.CanApprove, p.WhyNot, p.HasKey)
	return p, nil
}

// mayDecide asks whether person may deny, and whether they may approve where
// they give a reason and a signature.
func (h *HTML) mayDecide(r *http.Request, person approvals.Person, p *requestPage) error {
	full := approvals.Decision{Decision: store.Refuse, Reason: "asked by the page", Via: "page", Assertion: &approvals.Signed{}}
	deny := h.c.Judge.May(p.R, person, full)
	full.Decision = store.Approve
	approve := h.c.Judge.May(p.R, person, full)
	p.CanDecide, p.CanApprove = deny == nil, deny == nil && approve == nil
	keys, err := h.c.Judge.Passkeys(r.Context(), &person)
	if err != nil {
		return fmt.Errorf("reading the passkeys: %w", err)
	}
	p.HasKey = slices.ContainsFunc(keys, func(k approvals.Passkey) bool { return k.Active && k.Revoked.IsZero() })
	switch {
	case !p.Pending:
		p.WhyNot = closed(p.R.Status)
	case deny != nil:
		p.WhyNot = cannot(deny)
	case approve != nil:
		p.WhyNot = cannot(approve)
		var order *store.OrderError
		if errors.As(approve, &order) && order.Code == store.OrderHours && p.R.Rule.Hours != nil {
			p.WhyNot = "Approvals are taken from " + p.R.Rule.Hours.From + " to " + p.R.Rule.Hours.To + ", " + p.R.Rule.Hours.Zone + page.Days(p.R.Rule.Hours.Days) + "."
		}
		p.WhyNot += " You may still deny it."
	case p.Passkey && !p.HasKey:
		p.WhyNot = "An approval must be signed with a passkey, and you have none that is active. You may still deny it."
	}
	if p.Standing != nil && p.CanApprove {
		h.standing(p)
	}
	return nil
}

// standing offers what an approval for the whole run may cover: this scope, and
// others of the catalogue that allow it.
func (h *HTML) standing(p *requestPage) {
	p.Scopes = []string{p.R.Scope}
	if h.c.Scopes != nil {
		if set := h.c.Scopes.Current(); set != nil {
			for _, s := range set.For(p.R.Orchestrator) {
				if s.Name != p.R.Scope && s.Approval != nil && s.Approval.Standing != nil {
					p.Scopes = append(p.Scopes, s.Name)
				}
			}
		}
	}
	for _, part := range []time.Duration{1, 2, 4} {
		d := time.Duration(p.Standing.For) / part
		if d < time.Minute && part > 1 {
			break
		}
		end := store.At(p.Now.Add(d))
		p.Untils = append(p.Untils, until{end.String(), end.UTC().Format("2 Jan, 15:04 UTC") + " (" + page.Span(store.Duration(d.Truncate(time.Second))) + ")"})
	}
}

// closed says why nobody decides a request of that status.
func closed(s store.Status) string {
	switch s {
	case store.StatusApproved, store.StatusIssued, store.StatusClosed, store.StatusFailed:
		return "It is decided: enough people have approved."
	case store.StatusDenied:
		return "It is decided: it was denied."
	case store.StatusExpired:
		return "Its time is over. The orchestrator may ask again."
	case store.StatusWithdrawn:
		return "The orchestrator has taken it back."
	case store.StatusVoid:
		return "What would be granted has changed since it was asked, so it is void."
	}
	return "It is not open any more."
}

func cannot(err error) string {
	var order *store.OrderError
	if errors.As(err, &order) && refusals[order.Code] != "" {
		return refusals[order.Code]
	}
	return "It cannot be decided now."
}

// Problem answers with doc as a page.
func (h *HTML) Problem(w http.ResponseWriter, r *http.Request, person approvals.Person, doc *problem.Problem) {
	advice := ""
	if doc.Status >= http.StatusInternalServerError {
		advice = "Nothing was decided unless its page says so. Look at the request again before you repeat anything."
	}
	page.WriteProblem(w, r, h.t, h.frame(r, person, "", "").Frame, doc, "All approvals", advice)
}
