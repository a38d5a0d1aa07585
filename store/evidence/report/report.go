// Package report writes REPORT.html of an evidence bundle: the four questions of
// a security review, answered in words and rows for a person who never saw the
// product. It is derived from entries, the texts behind their commitments and
// the export's own figures alone, so that a verifier derives it again and
// compares bytes.
package report

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/go-json-experiment/json"
)

// What a report holds at most. Counts go on beyond; rows do not.
const (
	maxRows   = 200   // of each list
	maxGroups = 1_000 // kinds of things that are summed up one by one
	maxOpen   = 100_000
	maxCached = 1 << 18 // of each generation, see recent
	maxSteps  = 1 << 14 // likewise, of accounts of steps, which take more
	maxNamed  = 16      // objects of one use that are told apart
)

// Meta is what a report says of the export that it belongs to, as manifest and
// checkpoint have it.
type Meta struct {
	Origin       string            // name of the log
	Created      string            // when the export was made, as export.created has it
	Size         int64             // of the tree, in entries
	Root         string            // of the tree, base64
	Checkpoint   string            // the signed note, cosignatures included
	Cosignatures []string          // names that stand with cosignatures on the checkpoint, checked by nobody yet
	From, To     int64             // window of entries, To not included
	FromTime     string            // time of the window's first entry, empty where it has none
	ToTime       string            // time of its last entry
	Filters      map[string]string // empty where the window is whole
	Complete     bool              // the window is an index range, nothing left out
	VerifierKey  string            // of the log (C2SP signed-note), may be empty
}

// Report gathers what REPORT.html says. Its memory is bounded: rows and groups
// by the constants above, open approvals by maxOpen, and what is remembered of
// credentials by some tens of bytes for each of the latest maxCached to
// 2*maxCached, of steps by some 300 for the latest maxSteps to 2*maxSteps. It is
// not safe for concurrent use.
type Report struct {
	entries, context int64
	types            map[store.Type]int64
	last             store.Time // of the latest entry
	unread           int64      // entries of the window whose details could not be read

	orchestrators tally[string, struct{}]
	people        tally[string, person] // by pseudonym
	names         tally[string, string] // of people, by pseudonym
	scopes        tally[string, scopeSum]
	asks          tally[askKey, askSum]
	reached       tally[reachKey, reachSum]
	rules         tally[ruleKey, ruleSum]
	objects       tally[objectKey, objectSum]
	masks         tally[string, maskSum]  // by digest
	claims        map[string]int64        // outcome that orchestrators claim, to how often
	verdicts      map[store.Verdict]int64 // of steps of which something was claimed
	results       resultSum               // of uses on the access path
	guarded       int64                   // attempts that guards refused

	identities int64 // requests and credentials of the window that name the step's own identity

	steps       list[*stepRow]
	stepOf      map[string]*stepRow // by request, of those in steps
	credentials list[*credentialRow]
	issuedOf    map[string]*credentialRow     // by intent, of those in credentials
	issuedTo    map[[16]byte][]*credentialRow // by step, of those in credentials
	approvals   list[*approval]
	approvalOf  map[string]*approval // by request: open ones, and those in approvals
	notFollowed int64                // approvals beyond maxOpen
	policies    list[*policyRow]
	before      policyText      // of the policy.loaded before
	keys        list[*eventRow] // passkeys and Slack accounts
	upkeep      list[*eventRow] // exports, erasures, holds, writers

	exceptions [kinds]exception
	held       recent[credential]     // by intent
	accounts   recent[*account]       // by step
	handles    recent[struct{}]       // accessors, leases and serials seen
	under      map[[16]byte]*underWay // uses without a result yet, by entry ID
	sealed     missing

	chart chart
}

// New returns an empty report.
func New() *Report {
	return &Report{
		types: map[store.Type]int64{}, claims: map[string]int64{}, verdicts: map[store.Verdict]int64{},
		accounts: recent[*account]{most: maxSteps}, under: map[[16]byte]*underWay{},
		stepOf: map[string]*stepRow{}, issuedOf: map[string]*credentialRow{}, issuedTo: map[[16]byte][]*credentialRow{},
		approvalOf: map[string]*approval{},
	}
}

type askKey struct{ orchestrator, scope string }

type askSum struct {
	requests, allowed, asked, denied, issued, failed, uses int64
	first, last                                            int64 // entries
}

type reachKey struct{ target, scope string }

type reachSum struct{ issued, revoked, expired, uses, late, failed, refused, first, last int64 }

type objectKey struct{ target, protocol, object string }

// resultSum adds up what came of uses.
type resultSum struct{ uses, ended, failed, rows, masked, sent, received int64 }

type objectSum struct {
	resultSum
	first, last int64 // entries
}

// maskSum is what is known of masking rules by their digest.
type maskSum struct {
	words  []string // empty where no grant of the export has them
	window bool
	uses   int64
	scopes []string
}

// underWay is a use whose result is still to come.
type underWay struct {
	window  bool
	request [16]byte
	reach   *reachSum
	objects []*objectSum
	row     *credentialRow // nil where its credential is not listed
}

// account is what a step claimed and was seen to do.
type account struct {
	store.Account
	verdict store.Verdict // as it is counted
}

type scopeSum struct {
	asked, approved, refused, expired, void, withdrawn, standing int64
	signed, unsigned                                             int64 // approvals
}

type ruleKey struct{ scope, rule string }

type ruleSum struct{ asked, first, last int64 }

type person struct {
	approved, refused, signed, standing int64
	groups                              []string
}

// stepRow is a request, and what came of it.
type stepRow struct {
	index                           int64
	time                            store.Time
	orchestrator, run, step, agent  string
	scope, target, subject, request string
	proved, own                     bool
	outcome                         string
	at                              int64 // entry of the outcome
}

// credentialRow is a credential, and what was seen of it.
type credentialRow struct {
	index                   int64
	time, expires           store.Time
	orchestrator, run, step string
	scope, target, kind     string
	revocable               bool
	end                     string
	endAt                   int64
	endTime                 store.Time
	uses, late              int64
	via, use                said // of the latest use
	claim                   string
	claimAt                 int64
	summary                 said
	account                 *account
	results                 resultSum
	refused                 int64
	firstUse, lastUse       int64
}

// approval is a request that people decide.
type approval struct {
	kept                    bool
	closed                  bool
	index                   int64 // of approval.requested
	time                    store.Time
	orchestrator, run, step string
	scope, target, rule     string
	subject                 string
	proved                  bool
	reason                  said
	terms                   *store.Rule
	votes                   []store.Vote
	met                     bool
	decisions               []decision
	more                    int64 // decisions beyond maxDecisions
	outcome                 string
	outcomeAt               int64
}

const maxDecisions = 20

type decision struct {
	index            int64
	time             store.Time
	person, decision string
	reason           said
	signed           bool
	via, groups      string
	standing         string
}

type policyRow struct {
	index             int64
	time              store.Time
	window            bool
	writer, digest    string
	catalogue, policy string
	change            string
	diff              []diffLine
	cut               bool
	added, removed    int64
	retention         []labelled
}

type eventRow struct {
	index  int64
	time   store.Time
	window bool
	what   string
	who    string
	detail []labelled
}

type credential struct {
	ends   int64 // microseconds since 1970
	open   bool  // no end is on record yet
	window bool
}

// Take adds an entry. Entries come ascending by index, those of the window and
// those of its context merged; context (inWindow false) completes rows and is
// not counted. opened holds the texts behind e's commitments, by field. Details
// that cannot be read are counted and said in the report; Take returns no error
// for them.
func (r *Report) Take(index int64, e *store.Entry, opened map[string]string, inWindow bool) error {
	r.last = e.Time
	if inWindow {
		r.entries++
		if _, ok := r.types[e.Type]; ok || len(r.types) < maxGroups {
			r.types[e.Type]++
		}
		if e.Orchestrator != "" {
			r.orchestrators.at(e.Orchestrator)
		}
	} else {
		r.context++
	}
	if e.Person != nil && opened[store.SealedPerson] != "" {
		if name := r.names.at(*e.Person); *name == "" {
			*name = keep(opened[store.SealedPerson]).Text
		}
	}
	t := taken{index, e, opened, inWindow}
	if inWindow && len(e.Sealed) > 0 {
		for field := range e.Sealed {
			if _, ok := opened[field]; !ok {
				r.sealed.add(index)
				break
			}
		}
	}
	if err := r.take(t); err != nil && inWindow {
		r.unread++
		r.raise(unreadable, t, "its details could not be read")
	}
	return nil
}

// taken is an entry on its way into the report.
type taken struct {
	index  int64
	e      *store.Entry
	opened map[string]string
	window bool
}

// said is the text behind a commitment of the entry.
func (t taken) said(field string) said {
	if s, ok := t.opened[field]; ok {
		return keep(s)
	}
	return said{Erased: t.e.Sealed[field] != ""}
}

func (r *Report) take(t taken) error {
	e := t.e
	switch e.Type {
	case store.StepRequested:
		return r.requested(t)
	case store.StepFinished:
		return r.finished(t)
	case store.ApprovalRequested:
		return r.asked(t)
	case store.ApprovalDecided, store.ApprovalStanding:
		return r.decided(t)
	case store.CredentialIssued:
		return r.issued(t)
	case store.CredentialUsed:
		return r.used(t)
	case store.UseFinished:
		return r.useEnded(t)
	case store.CredentialRevoked, store.CredentialExpired:
		return r.ended(t)
	case store.CredentialFailed:
		r.outcome(t, "failed", false)
		if t.window {
			r.asks.at(askKey{e.Orchestrator, e.Action}).failed++
			d, err := read[store.FailedDetails](e)
			r.raise(failed, t, fmt.Sprintf("%s, while: %s", orNone(d.Problem), orNone(d.Stage)))
			return err
		}
	case store.CredentialAbandoned:
		r.outcome(t, "abandoned", false)
		r.raise(abandoned, t, "the intent to issue has no outcome: "+cause(e))
	case store.RequestVoid:
		r.outcome(t, "void", true)
		r.scopeCount(t, func(s *scopeSum) { s.void++ })
		r.raise(void, t, cause(e))
	case store.RequestWithdrawn:
		r.outcome(t, "withdrawn", true)
		r.scopeCount(t, func(s *scopeSum) { s.withdrawn++ })
	case store.ApprovalExpired:
		r.outcome(t, "expired", true)
		r.scopeCount(t, func(s *scopeSum) { s.expired++ })
		d, err := read[store.ExpiredDetails](e)
		why := "nobody decided in time"
		if d.Approved {
			why = "approved, and nobody collected it in time"
		}
		r.raise(expired, t, why)
		return err
	case store.AccessRefused:
		if t.window {
			d, err := read[store.RefusedDetails](e)
			if d.Intent != "" {
				r.guard(t, &d)
				return err
			}
			r.exceptions[refused].n += int64(max(d.Folded, 0))
			why := orNone(d.Problem)
			if d.Role != "" {
				why += ", role " + d.Role
			}
			if d.Remote != "" {
				why += ", from " + d.Remote
			}
			if d.Folded > 0 {
				why += fmt.Sprintf(", and %d more like it", d.Folded)
			}
			r.raise(refused, t, why)
			r.chart.count(e.Time, denials, 1+int64(max(d.Folded, 0)))
			return err
		}
	case store.AlertRaised:
		r.raise(alert, t, alertWords(e))
	case store.FreezeSet:
		d, err := read[store.FreezeDetails](e)
		r.raise(frozen, t, keep("stopped: "+d.String()).String(), t.said(store.SealedReason))
		return err
	case store.FreezeLifted:
		d, err := read[store.FreezeLiftedDetails](e)
		r.raise(frozen, t, keep("lifted the freeze "+orNone(d.Freeze)).String(), t.said(store.SealedReason))
		return err
	case store.PolicyLoaded:
		return r.policy(t)
	case store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked, store.SlackLinked:
		return r.key(t)
	case store.ExportCreated, store.DetailsErased, store.HoldPlaced, store.HoldLifted, store.WriterAdded:
		return r.keptUp(t)
	}
	return nil
}

// read decodes what a report needs of e's details.
func read[T any](e *store.Entry) (T, error) {
	var d T
	if len(e.Details) == 0 {
		return d, fmt.Errorf("%w: %s without details", store.ErrMalformed, e.Type)
	}
	err := json.Unmarshal(e.Details, &d)
	return d, err
}

// own reports whether e's agent is the identity of the step that e is about,
// and of no other: what the orchestrator itself runs as has another form.
func own(e *store.Entry) bool {
	domain, ok := strings.CutPrefix(e.Agent, "spiffe://")
	path := "/orchestrator/" + e.Orchestrator + "/run/" + e.Run + "/step/" + e.Step
	domain, found := strings.CutSuffix(domain, path)
	return ok && found && domain != "" && !strings.Contains(domain, "/") && e.Orchestrator != "" && e.Run != "" && e.Step != ""
}

func (r *Report) requested(t taken) error {
	e := t.e
	bad := r.granted(t)
	if !t.window {
		return bad
	}
	mine := own(e)
	if mine {
		r.identities++
	} else {
		r.raise(identity, t, "the identity on record is not the step's own")
	}
	sum := r.asks.at(askKey{e.Orchestrator, e.Action})
	sum.requests++
	sum.span(t.index)
	outcome := "allowed"
	switch {
	case e.Decision == nil:
		outcome = "no decision on record"
	case e.Decision.Outcome == store.Deny:
		outcome = "denied by policy"
		sum.denied++
		r.chart.count(e.Time, denials, 1)
		r.raise(denied, t, "policy: "+strings.Join(e.Decision.Reasons, "; "))
	case e.Decision.Outcome == store.NeedsApproval:
		outcome = "waits for people"
		sum.asked++
	default:
		sum.allowed++
	}
	if r.steps.room() {
		row := &stepRow{
			index: t.index, time: e.Time, orchestrator: e.Orchestrator, run: e.Run, step: e.Step, agent: keep(e.Agent).Text, own: mine,
			scope: keep(e.Action).Text, target: keep(e.Resource).Text, request: e.Request, outcome: outcome, at: t.index,
		}
		row.subject, row.proved = subject(t)
		r.stepOf[e.Request] = row
		r.steps.add(row)
	} else {
		r.steps.n++
	}
	if !bytes.Contains(e.Details, []byte(`"standing"`)) { // reading a grant takes longer than all else here
		return bad
	}
	d, err := read[struct {
		Standing *struct {
			Request string `json:"request"`
		} `json:"standing"`
	}](e)
	if d.Standing != nil {
		r.raise(drawn, t, "rests on the standing approval of "+d.Standing.Request)
	}
	return err
}

func subject(t taken) (string, bool) {
	if t.e.Subject == nil {
		return "", false
	}
	name := t.e.Subject.ID
	if s := t.opened[store.SealedSubject]; s != "" {
		return keep(s).Text, t.e.Subject.Proved
	}
	return keep(name).Text + " (name not in this export)", t.e.Subject.Proved
}

// outcome is how a request went on. final says that people's part is over.
func (r *Report) outcome(t taken, what string, final bool) {
	if row := r.stepOf[t.e.Request]; row != nil {
		row.outcome, row.at = what, t.index
	}
	a := r.approvalOf[t.e.Request]
	if a == nil {
		return
	}
	a.outcome, a.outcomeAt = what, t.index
	if final {
		r.close(t.e.Request, a)
	}
}

// close forgets what only an open approval is needed for.
func (r *Report) close(request string, a *approval) {
	a.closed, a.terms, a.votes = true, nil, nil
	if !a.kept {
		delete(r.approvalOf, request)
	}
}

func (r *Report) scopeCount(t taken, count func(*scopeSum)) {
	if t.window {
		count(r.scopes.at(t.e.Action))
	}
}

func (r *Report) asked(t taken) error {
	e := t.e
	d, err := read[store.ApprovalRequestedDetails](e)
	if err != nil {
		return err
	}
	words := ruleWords(&d.Rule)
	r.scopeCount(t, func(s *scopeSum) { s.asked++ })
	if t.window {
		sum := r.rules.at(ruleKey{e.Action, words})
		if sum.asked == 0 {
			sum.first = t.index
		}
		sum.asked++
		sum.last = t.index
	}
	if len(r.approvalOf) >= maxOpen {
		r.notFollowed++
		return nil
	}
	a := &approval{
		index: t.index, time: e.Time, orchestrator: e.Orchestrator, run: e.Run, step: e.Step, scope: keep(e.Action).Text, target: keep(e.Resource).Text,
		rule: words, outcome: "waits for people", outcomeAt: t.index, terms: &d.Rule,
	}
	a.subject, a.proved = subject(t)
	a.reason = t.said(store.SealedReason)
	r.approvalOf[e.Request] = a
	r.show(t, a)
	return nil
}

// show lists a, where the window holds a part of it.
func (r *Report) show(t taken, a *approval) {
	switch {
	case !t.window || a.kept:
	case r.approvals.room():
		a.kept = true
		r.approvals.add(a)
	}
}

func (r *Report) decided(t taken) error {
	e := t.e
	d, err := read[store.DecidedDetails](e)
	if err != nil {
		return err
	}
	who := r.person(e)
	signed := d.Assertion != nil
	if t.window && e.Person != nil {
		p := r.people.at(*e.Person)
		if d.Decision == store.Approve {
			p.approved++
		} else {
			p.refused++
		}
		if signed {
			p.signed++
		}
		if d.Standing != nil {
			p.standing++
		}
		for _, g := range d.Groups {
			if len(p.groups) < maxDecisions && !slices.Contains(p.groups, g) {
				p.groups = append(p.groups, g)
			}
		}
		r.chart.count(e.Time, decisions, 1)
	}
	standing := ""
	if s := d.Standing; s != nil {
		standing = fmt.Sprintf("%d uses of %s until %s", s.Uses, keep(strings.Join(s.Scopes, ", ")).Text, clock(s.Until))
		r.raise(standingGiven, t, "by "+who+" for the run: "+standing)
	}
	a := r.approvalOf[e.Request]
	if a != nil {
		r.show(t, a)
		if len(a.decisions) < maxDecisions && a.kept {
			a.decisions = append(a.decisions, decision{
				index: t.index, time: e.Time, person: who, decision: d.Decision, reason: t.said(store.SealedReason),
				signed: signed, via: keep(d.Via).Text, groups: keep(strings.Join(d.Groups, ", ")).Text, standing: standing,
			})
		} else {
			a.more++
		}
	}
	if d.Decision != store.Approve {
		r.scopeCount(t, func(s *scopeSum) { s.refused++ })
		if t.window {
			r.asks.at(askKey{e.Orchestrator, e.Action}).denied++
			r.chart.count(e.Time, denials, 1)
		}
		r.raise(denied, t, "a person: "+who, t.said(store.SealedReason))
		r.outcome(t, "denied by a person", true)
		return nil
	}
	r.scopeCount(t, func(s *scopeSum) {
		s.approved++
		if d.Standing != nil {
			s.standing++
		}
		if signed {
			s.signed++
		} else {
			s.unsigned++
		}
	})
	if !signed {
		r.raise(unsigned, t, "approved by "+who+", via "+orNone(d.Via))
	}
	if a == nil || a.met || a.terms == nil || e.Person == nil || a.terms.Valid() != nil {
		return nil
	}
	a.votes = append(a.votes, store.Vote{Person: *e.Person, Groups: d.Groups, Time: e.Time})
	if _, met := a.terms.Tally(a.votes); !met {
		return nil
	}
	a.met = true
	if distinct(a.votes) == 1 {
		r.raise(single, t, "approved by "+who+" alone; the rule asks for "+a.rule, t.said(store.SealedReason))
	}
	r.outcome(t, "approved", false)
	return nil
}

func distinct(votes []store.Vote) int {
	seen := map[string]bool{}
	for _, v := range votes {
		seen[v.Person] = true
	}
	return len(seen)
}

func (r *Report) issued(t taken) error {
	e := t.e
	d, err := read[struct { // of store.IssuedDetails
		Intent    string     `json:"intent"`
		Kind      string     `json:"kind"`
		Revocable bool       `json:"revocable"`
		Accessor  string     `json:"accessor"`
		LeaseID   string     `json:"lease_id"`
		Serial    string     `json:"serial"`
		Expires   store.Time `json:"expires"`
	}](e)
	if err != nil {
		return err
	}
	lost := r.held.put(key(d.Intent), credential{ends: d.Expires.UnixMicro(), open: true, window: t.window})
	r.forgotten(lost)
	for i, handle := range []string{d.Accessor, d.LeaseID, d.Serial} {
		if handle == "" {
			continue
		}
		k := key([]string{"accessor", "lease", "serial"}[i], handle)
		if _, twice := r.handles.get(k); twice {
			r.raise(shared, t, "its accessor, lease or serial stands in an earlier credential.issued")
		}
		r.handles.put(k, struct{}{})
		break
	}
	r.outcome(t, "issued", true)
	of := r.account(e)
	of.Issued(e)
	r.judge(t, of)
	if !t.window {
		return nil
	}
	if own(e) {
		r.identities++
	} else {
		r.raise(identity, t, "the identity on record is not the step's own")
	}
	r.chart.count(e.Time, issuances, 1)
	sum := r.asks.at(askKey{e.Orchestrator, e.Action})
	sum.issued++
	sum.span(t.index)
	at := r.reached.at(reachKey{e.Resource, e.Action})
	if at.issued+at.uses == 0 {
		at.first = t.index
	}
	at.issued++
	at.last = t.index
	if !r.credentials.room() {
		r.credentials.n++
		return nil
	}
	row := &credentialRow{
		index: t.index, time: e.Time, expires: d.Expires, orchestrator: e.Orchestrator, run: e.Run, step: e.Step,
		scope: keep(e.Action).Text, target: keep(e.Resource).Text, kind: keep(d.Kind).Text, revocable: d.Revocable, account: of,
	}
	r.issuedOf[d.Intent] = row
	step := key(e.Orchestrator, e.Run, e.Step)
	r.issuedTo[step] = append(r.issuedTo[step], row)
	r.credentials.add(row)
	return nil
}

func (s *askSum) span(index int64) {
	if s.first == 0 && s.last == 0 {
		s.first = index
	}
	s.last = index
}

// forgotten counts what is dropped from memory while nothing says that it ended.
func (r *Report) forgotten(lost []credential) {
	for _, c := range lost {
		if c.open && c.window && c.ends < r.last.UnixMicro() {
			r.exceptions[noEnd].n++
		}
	}
}

type intentOf struct {
	Intent string `json:"intent"`
}

func (r *Report) used(t taken) error {
	e := t.e
	d, err := read[store.UsedDetails](e)
	if err != nil {
		return err
	}
	of := r.account(e)
	of.Used(e, d.Via)
	r.judge(t, of)
	c, known := r.held.get(key(d.Intent))
	late := known && (!c.open && e.Time.UnixMicro() >= c.ends || e.Time.UnixMicro() > c.ends)
	row := r.issuedOf[d.Intent]
	if row != nil {
		row.uses++
		if row.firstUse == 0 {
			row.firstUse = t.index
		}
		row.lastUse, row.via, row.use = t.index, keep(d.Via), keep(d.Use)
		if late {
			row.late++
		}
	}
	on := r.begun(t, &d, row)
	if !t.window {
		return nil
	}
	r.asks.at(askKey{e.Orchestrator, e.Action}).uses++
	sum := r.reached.at(reachKey{e.Resource, e.Action})
	if sum.issued+sum.uses == 0 {
		sum.first = t.index
	}
	sum.uses++
	sum.last = t.index
	if on != nil {
		on.reach = sum
	}
	use := said{}
	if d.Use != "" {
		use = keep(d.Use)
	}
	switch {
	case late:
		sum.late++
		how := "it had run out at " + clock(store.At(time.UnixMicro(c.ends)))
		if !c.open {
			how = "it had ended at " + clock(store.At(time.UnixMicro(c.ends)))
		}
		r.raise(lateUse, t, how+"; seen by "+orNone(d.By)+", "+orNone(d.Via), use)
	case !known:
		r.raise(unknownUse, t, "seen by "+orNone(d.By)+", "+orNone(d.Via), use)
	}
	return nil
}

func (r *Report) ended(t taken) error {
	e := t.e
	d, err := read[intentOf](e)
	if err != nil {
		return err
	}
	how := "revoked"
	if e.Type == store.CredentialExpired {
		how = "expired"
	}
	if c, ok := r.held.get(key(d.Intent)); ok && c.open {
		c.open, c.ends = false, min(c.ends, e.Time.UnixMicro())
		r.forgotten(r.held.put(key(d.Intent), c))
	}
	if row := r.issuedOf[d.Intent]; row != nil {
		row.end, row.endAt, row.endTime = how, t.index, e.Time
		if e.Cause != nil {
			row.end += ": " + keep(*e.Cause).Text
		}
	}
	if t.window {
		sum := r.reached.at(reachKey{e.Resource, e.Action})
		if how == "revoked" {
			sum.revoked++
		} else {
			sum.expired++
		}
		sum.last = t.index
	}
	return nil
}

func (r *Report) finished(t taken) error {
	if !t.window {
		return nil
	}
	e := t.e
	d, err := read[store.FinishedDetails](e)
	if err != nil {
		return err
	}
	claim := keep(d.Outcome).Text
	if _, ok := r.claims[claim]; ok || len(r.claims) < maxRows {
		r.claims[claim]++
	}
	summary := t.said(store.SealedSummary)
	if d.Outcome == "failed" {
		r.raise(reported, t, "the orchestrator says: failed", summary)
	}
	step := key(e.Orchestrator, e.Run, e.Step)
	for _, row := range r.issuedTo[step] {
		row.claim, row.claimAt, row.summary = claim, t.index, summary
	}
	of := r.account(e)
	of.Claimed(d)
	r.judge(t, of, summary)
	return nil
}

// person is how e's person is called.
func (r *Report) person(e *store.Entry) string {
	if e.Person == nil {
		return "nobody named"
	}
	return r.name(*e.Person)
}

// name is what a pseudonym stands for, where that is not erased.
func (r *Report) name(pseudonym string) string {
	if name := r.names.find(pseudonym); name != nil && *name != "" {
		return *name
	}
	return keep(pseudonym).Text + " (name not in this export)"
}
