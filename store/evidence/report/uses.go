package report

import (
	"fmt"
	"slices"
	"strings"

	"github.com/countersign-dev/countersign/store"
)

// account is that of e's step.
func (r *Report) account(e *store.Entry) *account {
	step := key(e.Orchestrator, e.Run, e.Step)
	a, ok := r.accounts.young[step]
	if !ok {
		if a, ok = r.accounts.get(step); !ok {
			a = &account{}
		}
		r.accounts.put(step, a) // as it is in use, it is not to be forgotten
	}
	return a
}

// judge counts what is claimed of a step against what was observed, by what t
// changed about either.
func (r *Report) judge(t taken, a *account, summary ...said) {
	verdict, why := a.Verdict()
	if verdict == a.verdict {
		return
	}
	kinds := map[store.Verdict]kind{store.Differ: differs, store.NotObserved: unobserved}
	if a.verdict != "" {
		r.verdicts[a.verdict]--
		if k, ok := kinds[a.verdict]; ok {
			r.exceptions[k].drop(t.e.Orchestrator, t.e.Run, t.e.Step)
		}
	}
	a.verdict = verdict
	r.verdicts[verdict]++
	if k, ok := kinds[verdict]; ok {
		t.window = true // the claim was
		r.raise(k, t, why, summary...)
	}
}

// granted takes the masking rules of a grant.
func (r *Report) granted(t taken) error {
	a, err := store.GrantedAccess(t.e)
	if err != nil || a == nil {
		return err
	}
	if err := r.account(t.e).Requested(t.e); err != nil || a.Masking.IsZero() {
		return err
	}
	m := r.masks.at(a.Masking.Digest())
	if len(m.words) == 0 {
		m.words = maskWords(a.Masking)
	}
	if t.window {
		m.in(t.e.Action)
	}
	return nil
}

// in notes that the window has the rules, under a scope.
func (m *maskSum) in(scope string) {
	m.window = true
	if i, found := slices.BinarySearch(m.scopes, scope); !found && len(m.scopes) < maxRows {
		m.scopes = slices.Insert(m.scopes, i, keep(scope).Text)
	}
}

// begun follows a use on the access path until its result comes: nil where it is
// none, or too many are under way.
func (r *Report) begun(t taken, d *store.UsedDetails, row *credentialRow) *underWay {
	if d.Via != store.ViaGateway {
		return nil
	}
	u := &underWay{window: t.window, request: key(t.e.Request), row: row}
	if t.window {
		r.results.uses++
		if d.Masking != "" {
			m := r.masks.at(d.Masking)
			m.in(t.e.Action)
			m.uses++
		}
		objects := d.Objects
		if len(objects) == 0 {
			objects = []string{""}
		}
		for _, o := range objects[:min(len(objects), maxNamed)] {
			sum := r.objects.at(objectKey{t.e.Resource, d.Protocol, o})
			if slices.Contains(u.objects, sum) {
				continue
			}
			if sum.uses == 0 {
				sum.first = t.index
			}
			sum.uses++
			sum.last = t.index
			u.objects = append(u.objects, sum)
		}
	}
	if row != nil {
		row.results.uses++
	}
	if len(r.under) < maxOpen {
		r.under[key(t.e.ID)] = u
	}
	return u
}

// useEnded takes what came of uses.
func (r *Report) useEnded(t taken) error {
	d, err := read[store.UseFinishedDetails](t.e)
	if err != nil {
		return err
	}
	a := r.account(t.e)
	a.Ended(t.e, d.Outcomes)
	r.judge(t, a)
	for i := range d.Outcomes {
		o := &d.Outcomes[i]
		id := key(o.Use)
		u := r.under[id]
		if u == nil || u.request != key(t.e.Request) {
			continue
		}
		delete(r.under, id)
		if u.row != nil {
			u.row.results.add(o)
		}
		if !u.window {
			continue
		}
		r.results.add(o)
		for _, sum := range u.objects {
			sum.add(o)
		}
		if o.Error != "" && u.reach != nil {
			u.reach.failed++
		}
	}
	return nil
}

func (s *resultSum) add(o *store.UseOutcome) {
	s.ended++
	if o.Error != "" {
		s.failed++
	}
	s.rows += o.Rows
	s.masked += o.Masked
	s.sent += o.Sent
	s.received += o.Received
}

// guard takes what a guard refused before it reached its target.
func (r *Report) guard(t taken, d *store.RefusedDetails) {
	e := t.e
	n := 1 + int64(max(d.Folded, 0))
	r.guarded += n
	r.exceptions[guarded].n += n - 1
	a := r.account(e)
	a.Refused(e, d.Folded)
	r.judge(t, a)
	sum := r.reached.at(reachKey{e.Resource, e.Action})
	if sum.issued+sum.uses+sum.refused == 0 {
		sum.first = t.index
	}
	sum.refused += n
	sum.last = t.index
	if row := r.issuedOf[d.Intent]; row != nil {
		row.refused += n
	}
	why := d.Route
	if d.Reason != "" {
		why += ": " + d.Reason
	}
	if d.Folded > 0 {
		why += fmt.Sprintf(", and %d more like it", d.Folded)
	}
	r.raise(guarded, t, orNone(strings.TrimPrefix(why, ": ")), t.said(store.SealedStatement))
	r.chart.count(e.Time, denials, n)
}

// alertWords is what an alert says.
func alertWords(e *store.Entry) string {
	d, err := read[store.AlertDetails](e)
	if err != nil || d.Alert == "" {
		return cause(e) + detailText(e)
	}
	what := map[string]string{
		store.AlertMint:    "a token was made by the broker's login without an intent on record",
		store.AlertUse:     "a credential was used, and it is not known which",
		store.AlertLateUse: "a credential was used after its end",
		store.AlertRevoke:  "credentials under a freeze could not be revoked yet",
	}[d.Alert]
	if what == "" {
		what = d.Alert
	}
	return keep(what + ": " + orNone(d.What) + ", told by " + orNone(d.Source)).String()
}

// maskWords says what rules hide, a line each.
func maskWords(m store.Masking) []string {
	var out []string
	for i, rule := range m.Rules {
		if i == maxLines {
			return append(out, "and "+count(int64(len(m.Rules)-maxLines), "more rule", "more rules"))
		}
		words := "a rule of a form that this report does not know"
		switch {
		case rule.Field != "":
			words = "the field or column " + rule.Field + ", wherever it stands"
		case rule.Path != "":
			words = "what stands at " + rule.Path
		case rule.Column != "":
			words = "the column " + rule.Column
		case rule.Type != "":
			words = "values of the type " + rule.Type
		case rule.Detector != "":
			words = "what looks like " + map[string]string{
				"email": "an e-mail address", "card": "a card number", "iban": "an IBAN", "phone": "a telephone number", "secret": "a secret", "entropy": "random text",
			}[rule.Detector]
			if strings.HasSuffix(words, "like ") {
				words += rule.Detector
			}
		}
		out = append(out, keep(words).String())
	}
	return out
}
