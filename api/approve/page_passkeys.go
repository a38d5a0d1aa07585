package approve

import (
	"net/http"
	"time"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// key is a passkey on its page.
type key struct {
	approvals.Passkey
	CanRevoke bool
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
	h.write(w, r, http.StatusOK, "passkeys", h.passkeys(r, person, keys))
}

func (h *HTML) passkeys(r *http.Request, person approvals.Person, keys []approvals.Passkey) *passkeysPage {
	p := &passkeysPage{frame: h.frame(r, person, "passkeys", "Passkeys"), Enrol: h.c.Enrol, Version: version(keys),
		Activation: "A second person then activates it; until then it signs nothing."}
	p.Narrow = true
	if h.c.ActivateAfter > 0 {
		p.Activation = "It signs once a second person has activated it, or " + span(store.Duration(h.c.ActivateAfter.Truncate(time.Second))) + " after it was enrolled."
	}
	for _, k := range keys {
		x := key{Passkey: k, CanRevoke: k.Revoked.IsZero()}
		switch {
		case k.Person == person.Name:
			p.Mine = append(p.Mine, x)
		case !k.Active && k.Revoked.IsZero():
			p.Waiting = append(p.Waiting, x)
		default:
			p.Others = append(p.Others, x)
		}
	}
	return p
}

// PasskeyChanged answers a form that activates or revokes a key: err is why it
// did not, nil where it did.
func (h *HTML) PasskeyChanged(w http.ResponseWriter, r *http.Request, person approvals.Person, err error) {
	if err == nil {
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, "/passkeys", http.StatusSeeOther)
		return
	}
	doc := problemOf(err)
	keys, kerr := h.c.Judge.Passkeys(r.Context(), nil)
	if doc.Status >= http.StatusInternalServerError || kerr != nil {
		if kerr != nil {
			doc = problem.From(kerr)
		}
		h.Problem(w, r, person, doc)
		return
	}
	p := h.passkeys(r, person, keys)
	p.Wrong = wrong(doc, err)
	h.write(w, r, doc.Status, "passkeys", p)
}
