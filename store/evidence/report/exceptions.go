package report

import (
	"slices"

	"github.com/countersign-dev/countersign/store"
)

// kind is a kind of exception, in the order in which they are shown.
type kind int

const (
	identity kind = iota
	shared
	lateUse
	unknownUse
	differs
	unobserved
	denied
	guarded
	refused
	alert
	frozen
	failed
	abandoned
	reported
	noEnd
	single
	unsigned
	standingGiven
	drawn
	expired
	void
	unreadable
	kinds
)

// exceptionWords are what a kind is called, what one means, and where all of
// them stand when they are too many to list.
var exceptionWords = [kinds]struct{ slug, title, meaning, rest string }{
	identity: {"identity", "Steps without an identity of their own",
		"Each step is given a SPIFFE identity that names its orchestrator, its run and itself. In these entries the identity says something else: it may be the orchestrator's own, or another step's. Ask who acted.",
		"steps.csv, column identity"},
	shared: {"shared", "One credential on record twice",
		"Each credential has a handle in Vault of its own (an accessor, a lease or a serial). These were recorded with a handle that an earlier one has: two steps may have held one secret.",
		"entries.jsonl, type credential.issued"},
	lateUse: {"late", "Used after revocation or end",
		"A credential was seen in use after it had ended. Either a target let it in that does not ask whether it still holds, or what saw the use was late.",
		"steps.csv, rows where uses_after_end is not 0"},
	unknownUse: {"unknown-use", "Uses of a credential whose issuance is not at hand",
		"A use was seen, and the credential's issuance is not among the entries of this export. It may lie before the window, have been left out by a filter, or lie some hundred thousand credentials back; otherwise it is to be explained.",
		"uses.csv, column intent"},
	differs: {"differs", "Claimed and observed differ",
		"What the orchestrator reported of the step, and what was seen on the access path, by introspection and in Vault's audit log, contradict each other: a step reported as succeeded whose last use failed, one reported as skipped that was seen at work, a target that none of its credentials reaches. The step's entries tell which of the two is right.",
		"steps.csv, rows where claim_verdict is differ"},
	unobserved: {"unobserved", "Claimed but not observed",
		"The orchestrator reported what came of the step, and nobody else could see it, or did. Uses are seen by introspection, on the access path and in Vault's audit log: a step that was handed its secret directly, to a target that does not ask back, is found here without anything being amiss. What such a step did is the orchestrator's word alone.",
		"steps.csv, rows where claim_verdict is not observed; entries.jsonl, type step.finished"},
	denied: {"denied", "Denied",
		"Asked for, and refused by policy or by a person. Nothing was issued for these requests.",
		"steps.csv, rows where status is denied"},
	guarded: {"guarded", "Refused by a guard on the access path",
		"A step asked its target for something that its grant does not let through, and the gateway refused it: the target was not reached. Like refusals within a short time are folded into one entry; the count has them all.",
		"entries.jsonl, type access.refused with details.intent"},
	refused: {"refused", "Refused access",
		"Calls of the product's own interfaces that were turned away: an unknown token, a role that may not do this, a person who may not decide. Like refusals within a short time are folded into one entry; the count has them all.",
		"entries.jsonl, type access.refused without details.intent"},
	alert: {"alert", "Alerts",
		"What the product itself raised as suspicious.",
		"entries.jsonl, type alert.raised"},
	frozen: {"freeze", "Freezes set and lifted",
		"Somebody pulled the brake: what a freeze covers gets no credential until another person lifts it.",
		"entries.jsonl, types freeze.set and freeze.lifted"},
	failed: {"failed", "Issuance failed",
		"A credential was to be issued and could not be. Nothing was handed out.",
		"steps.csv, rows where status is failed"},
	abandoned: {"abandoned", "Abandoned",
		"An intent to issue without a known outcome, mostly because a broker stopped in between. A secret that came to be was handed to nobody and ended by its own short life (60 seconds by default). What cannot be called back, such as a certificate, may have lived until it ran out.",
		"steps.csv, rows where status is abandoned"},
	reported: {"reported", "Steps reported as failed",
		"The orchestrator itself says that the step failed.",
		"steps.csv, rows where claimed_outcome is failed"},
	noEnd: {"no-end", "Credentials without an end on record",
		"The time of these credentials was over before the last entry of this export, and no entry says that they ended. By their own limit they have; that they did was not recorded.",
		"steps.csv, rows where ended_at is empty"},
	single: {"single", "Approved by a single person",
		"One person's approval was enough. The rule in force allowed that; whether it should is for the reviewer to judge.",
		"approvals.csv, by request"},
	unsigned: {"unsigned", "Approved without a passkey where others signed",
		"In these scopes at least one approval of the window was signed with a passkey, which proves offline who approved what. These were not: that the named person approved rests on the recorder's login.",
		"approvals.csv, rows where signed is false"},
	standingGiven: {"standing", "Standing approvals",
		"A person approved not one request but a whole run's, within limits. What follows was not looked at one by one.",
		"approvals.csv, rows where standing is set"},
	drawn: {"drawn", "Requests that drew on a standing approval",
		"These were let through by an approval given earlier in the same run; nobody was asked anew.",
		"entries.jsonl, type step.requested, details.standing"},
	expired: {"expired", "Expired requests",
		"People were asked and did not decide in time, or approved and nobody collected. Nothing was issued.",
		"steps.csv, rows where status is expired"},
	void: {"void", "Void requests",
		"What would have been granted changed between asking and collecting, so the approval did not count. Nothing was issued on it.",
		"steps.csv, rows where status is void"},
	unreadable: {"unreadable", "Entries that this report could not read",
		"Their details are not of the form that their type has. They are not in the figures below.",
		"entries.jsonl"},
}

// exception is all of one kind.
type exception struct {
	n    int64
	rows []exceptionRow
}

type exceptionRow struct {
	index                   int64
	time                    store.Time
	orchestrator, run, step string
	person                  string // who acted, where no step did
	scope, target           string
	why                     string
	said                    said
}

// raise adds t as an exception of kind k, where it belongs to the window. why
// is cut; text is quoted after it.
func (r *Report) raise(k kind, t taken, why string, text ...said) {
	if !t.window {
		return
	}
	x := &r.exceptions[k]
	x.n++
	if len(x.rows) == maxRows {
		return
	}
	e := t.e
	row := exceptionRow{
		index: t.index, time: e.Time, orchestrator: e.Orchestrator, run: e.Run, step: e.Step,
		scope: keep(e.Action).Text, target: keep(e.Resource).Text, why: keep(why).String(),
	}
	if e.Orchestrator == "" || e.Person != nil && !e.Type.IsDecision() {
		row.person = keep(e.Agent).Text
		if e.Person != nil {
			row.person = r.person(e)
		}
	}
	for _, s := range text {
		row.said = s
	}
	x.rows = append(x.rows, row)
}

// drop takes back the first row about a step.
func (x *exception) drop(orchestrator, run, step string) {
	x.n--
	if i := slices.IndexFunc(x.rows, func(row exceptionRow) bool {
		return row.orchestrator == orchestrator && row.run == run && row.step == step
	}); i >= 0 {
		x.rows = slices.Delete(x.rows, i, i+1)
	}
}

// withoutEnd adds to the exceptions the credentials that nothing ended although
// their time was over when the last entry was written.
func (r *Report) withoutEnd() exception {
	x := exception{n: r.exceptions[noEnd].n}
	now := r.last.UnixMicro()
	r.held.each(func(c credential) {
		if c.open && c.window && c.ends < now {
			x.n++
		}
	})
	for _, row := range r.credentials.rows {
		if row.end == "" && row.expires.Before(r.last.Time) {
			x.rows = append(x.rows, exceptionRow{
				index: row.index, time: row.time, orchestrator: row.orchestrator, run: row.run, step: row.step,
				scope: row.scope, target: row.target, why: row.kind + ", until " + clock(row.expires),
			})
		}
	}
	return x
}

// unsignedAmongSigned keeps of the approvals without a signature those in
// scopes where others signed.
func (r *Report) unsignedAmongSigned() exception {
	var x exception
	for _, s := range r.scopes.sums {
		if s.signed > 0 {
			x.n += s.unsigned
		}
	}
	if r.scopes.rest.signed > 0 {
		x.n += r.scopes.rest.unsigned
	}
	for _, row := range r.exceptions[unsigned].rows {
		if s := r.scopes.find(row.scope); s != nil && s.signed > 0 {
			x.rows = append(x.rows, row)
		}
	}
	return x
}
