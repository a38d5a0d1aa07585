package approve

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack"
)

// SlackAccounts links Slack accounts to people who are logged in; *slack.Slack
// is one. The person begins here, sends the code from Slack, and confirms here
// which account sent it: a link that somebody else makes them follow links
// nothing.
type SlackAccounts interface {
	BeginLink(p approvals.Person) (code string, ends time.Time, err error)
	PendingLink(p approvals.Person) (slack.Account, bool)
	ConfirmLink(ctx context.Context, p approvals.Person, team, user string) error
	Linked(p approvals.Person) (slack.Account, bool)
	Unlink(ctx context.Context, p approvals.Person) error
}

// slackPage is the page of a person's Slack account.
type slackPage struct {
	frame
	Code    string // to be sent from Slack
	Ends    time.Time
	Pending bool // Account has sent the code
	Account slack.Account
	Linked  bool // Mine speaks for the person
	Mine    slack.Account
	Wrong   string
}

// caller is who passed the guard.
func caller(r *http.Request) (approvals.Person, bool) {
	p := auth.From(r.Context())
	if p == nil || p.Person() == "" {
		return approvals.Person{}, false
	}
	return approvals.Person{Name: p.Person(), Groups: p.Groups}, true
}

func (h *HTML) slackPage(r *http.Request, person approvals.Person) *slackPage {
	p := &slackPage{frame: h.frame(r, person, "/slack/link", "Slack account")}
	p.Narrow, p.Exact = true, true
	p.Account, p.Pending = h.c.Slack.PendingLink(person)
	p.Mine, p.Linked = h.c.Slack.Linked(person)
	return p
}

func (h *HTML) slack(w http.ResponseWriter, r *http.Request) {
	person, ok := caller(r)
	if !ok {
		problem.Write(w, r, problem.Unauthenticated())
		return
	}
	h.write(w, r, http.StatusOK, "slack", h.slackPage(r, person))
}

// linkSlack takes the forms of the Slack page. The guard has compared their CSRF
// token.
func (h *HTML) linkSlack(w http.ResponseWriter, r *http.Request) {
	person, ok := caller(r)
	if !ok {
		problem.Write(w, r, problem.Unauthenticated())
		return
	}
	var err error
	switch do := r.PostFormValue("do"); do {
	case "begin":
		var code string
		var ends time.Time
		if code, ends, err = h.c.Slack.BeginLink(person); err == nil {
			p := h.slackPage(r, person)
			p.Code, p.Ends = code, ends
			h.write(w, r, http.StatusOK, "slack", p)
			return
		}
		err = problem.RateLimited("Too many people are linking an account. Try again in ten minutes.", 10*time.Minute).Because(err)
	case "confirm":
		err = h.c.Slack.ConfirmLink(r.Context(), person, r.PostFormValue("team"), r.PostFormValue("user"))
		switch {
		case errors.Is(err, slack.ErrNoLink):
			err = problem.RequestClosed("That account does not wait to be linked to you any more. Begin anew.").Because(err)
		case errors.Is(err, slack.ErrTaken):
			err = problem.RequestClosed("That account speaks for another person, who has to end that link first.").Because(err)
		}
	case "unlink":
		err = h.c.Slack.Unlink(r.Context(), person)
	default:
		err = problem.Malformed("This form is not known here.")
	}
	if err == nil {
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, "/slack/link", http.StatusSeeOther)
		return
	}
	doc := problemOf(err)
	if doc.Status >= http.StatusInternalServerError {
		h.Problem(w, r, person, doc)
		return
	}
	p := h.slackPage(r, person)
	p.Wrong = wrong(doc, err)
	h.write(w, r, doc.Status, "slack", p)
}
