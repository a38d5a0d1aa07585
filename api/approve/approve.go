// Package approve is the recorder's API for people who decide: what waits for
// them, their decisions and their passkeys. What a person decides is put on
// record by the recorder itself and never passes through a broker.
package approve

import (
	"net/http"

	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/approvals"
)

// Pages render for a browser what the API answers in JSON. The caller of each
// has passed the guard; person is who it is.
type Pages interface {
	// Inbox shows a list of requests. f is what was asked for, next leads on to
	// older ones where it is not empty.
	Inbox(w http.ResponseWriter, r *http.Request, person approvals.Person, f approvals.Filter, list []approvals.Request, next string)
	// Show shows one request.
	Show(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request)
	// Decided answers a form's decision: err is why it did not count, nil where
	// it did.
	Decided(w http.ResponseWriter, r *http.Request, person approvals.Person, req *approvals.Request, d approvals.Decision, err error)
	// Passkeys shows keys: the person's own, and all others that they may see.
	Passkeys(w http.ResponseWriter, r *http.Request, person approvals.Person, keys []approvals.Passkey)
	// Routes adds what is theirs alone: style, scripts, further forms.
	Routes(r chi.Router)
}

// Config is what a Server needs.
type Config struct {
	Approvals *approvals.Approvals
	Guard     *auth.Guard
	Pages     Pages        // nil: JSON alone
	People    *auth.People // for the fresh login of an enrolment; nil: nobody enrols here
}

// Server answers people who decide.
type Server struct{ c Config }

// New returns the API of c.Approvals.
func New(c Config) *Server { return &Server{c: c} }
