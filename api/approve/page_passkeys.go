package approve

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// key is a passkey on its page.
type key struct {
	approvals.Passkey
	CanRevoke, CanActivate bool
	CSRF                   string
}

// passkeysPage is the page of passkeys.
type passkeysPage struct {
	frame
	Mine    []key
	Waiting []key // others', for this person to activate
	Others  []key // others', of which nothing is due
	Enrol   bool
	Wrong   string
	// Activation says what happens to a key after it is enrolled.
	Activation string
	Version    string
}

// Passkeys implements Pages.
func (h *HTML) Passkeys(w http.ResponseWriter, r *http.Request, person approvals.Person, keys []approvals.Passkey) {
	p, err := h.passkeys(r, person, keys)
	if err != nil {
		h.Problem(w, r, person, problem.From(err))
		return
	}
	h.write(w, r, http.StatusOK, "passkeys", p)
}

func (h *HTML) passkeys(r *http.Request, person approvals.Person, keys []approvals.Passkey) (*passkeysPage, error) {
	p := &passkeysPage{frame: h.frame(r, person, "/passkeys", "Passkeys"), Enrol: h.c.Enrol, Version: version(keys),
		Activation: "A second person then activates it; until then it signs nothing."}
	p.Narrow, p.Exact = true, true
	p.live("/passkeys")
	if h.c.ActivateAfter > 0 {
		p.Activation = "It signs once a second person has activated it, or " + page.Span(store.Duration(h.c.ActivateAfter.Truncate(time.Second))) + " after it was enrolled."
	}
	own, err := h.c.Judge.Passkeys(r.Context(), &person) // by pseudonym: a name may have been erased
	if err != nil {
		return nil, fmt.Errorf("reading the passkeys: %w", err)
	}
	mine := map[string]bool{}
	for _, k := range own {
		mine[k.ID] = true
	}
	admin := slices.ContainsFunc(h.c.PasskeyAdmins, func(g string) bool { return slices.Contains(person.Groups, g) })
	for _, k := range keys {
		live, waits := k.Revoked.IsZero(), k.Revoked.IsZero() && !k.Active
		x := key{Passkey: k, CSRF: p.CSRF, CanRevoke: live && (mine[k.ID] || admin), CanActivate: waits && !mine[k.ID] && (admin || len(h.c.PasskeyAdmins) == 0)}
		switch {
		case mine[k.ID]:
			p.Mine = append(p.Mine, x)
		case waits:
			p.Waiting = append(p.Waiting, x)
		default:
			p.Others = append(p.Others, x)
		}
	}
	return p, nil
}

// PasskeyChanged implements Pages.
func (h *HTML) PasskeyChanged(w http.ResponseWriter, r *http.Request, person approvals.Person, err error) {
	if err == nil {
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, "/passkeys", http.StatusSeeOther)
		return
	}
	doc := problemOf(err)
	if doc.Status >= http.StatusInternalServerError {
		h.Problem(w, r, person, doc)
		return
	}
	keys, kerr := h.c.Judge.Passkeys(r.Context(), nil)
	if kerr != nil {
		h.Problem(w, r, person, problem.From(kerr))
		return
	}
	p, kerr := h.passkeys(r, person, keys)
	if kerr != nil {
		h.Problem(w, r, person, problem.From(kerr))
		return
	}
	p.Wrong = wrong(doc, err)
	h.write(w, r, doc.Status, "passkeys", p)
}
