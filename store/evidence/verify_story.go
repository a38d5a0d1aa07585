package evidence

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Rules reads a catalogue's text and returns what it says of a scope: the least
// rule under which people must approve (nil: nobody has to) and its
// sensitivity; false where it has no such scope.
type Rules func(catalogue []byte) (func(scope string) (rule *store.Rule, sensitivity string, ok bool), error)

// useLeeway is for how long a writer's own clock is believed about when a use
// was: it is on record a moment after it happened, and the credential may have
// ended in between.
const useLeeway = 30 * time.Second

// judge takes the entries of a log, or of a bundle, in the log's order and says
// what is wrong with the story they tell. It is not safe for concurrent use.
type judge struct {
	r      *Report
	o      *Options
	origin string
	whole  bool // every entry of the log comes by, so that what is not there is missing
	texts  bool // the texts behind commitments are at hand

	state *store.State
	keys  *store.Passkeys
	ids   map[id]int64
	last  store.Time

	records   []record          // entries with texts, ascending
	runs      map[string]uint32 // numbers of runs in records
	numbers   map[string]uint16 // of sensitivities in records
	scopes    map[string]uint16 // of scopes in records
	holds     map[string]*hold
	retention map[string]map[string]store.Duration // by writer, the last one on record

	lives  map[id]*life       // by intent
	access map[id]*access     // by request, of those whose secret stays on the access path
	rules  map[access]*access // each once
	open   map[id]id          // uses on the access path without a result, and the request of each
	levels map[id]uint16      // by request, the number of the sensitivity that it was asked with
	people map[string]named   // by pseudonym

	catalogues map[string]func(string) (*store.Rule, string, bool) // by digest of the catalogue
	policies   map[string]string                                   // digest of catalogue and policy, to that of the catalogue
	known      map[string]bool                                     // digests of which policy.loaded is on record, with its text or without
	undecided  map[string][]undecided                              // by digest, what waits for its catalogue
	standing   map[string]*store.Rule                              // by request that draws on a standing approval, the rule it falls under
	anchors    *anchors
	inForce    inForce

	from   int64                             // where the window begins: what was in force before it need not be at hand
	export func(index int64, e *store.Entry) // sees each export.created; may be nil
	tally  struct{ signed, unsigned, anchored, enrolled, ruled, nameless int64 }
}

// id is an entry ID in a form that a million of do not fill the memory.
type id [16]byte

func idOf(s string) id {
	if u, err := uuid.Parse(s); err == nil {
		return id(u)
	}
	sum := sha256.Sum256([]byte(s))
	return id(sum[:])
}

// record is what an erasure is judged by.
type record struct {
	index  int64
	micros int64 // time
	run    uint32
	level  uint16 // sensitivity
	scope  uint16
	flags  uint8
}

const (
	recordKept    = 1 << iota // its texts may never be erased
	recordMissing             // a text is not there
	recordOpened              // a text is there
	recordErased              // its erasure is on record
)

type hold struct {
	store.HoldDetails
	index  int64
	lifted bool
}

// undecided is an entry that names a policy which is not on record yet.
type undecided struct {
	index  int64
	decide func(func(scope string) (*store.Rule, string, bool))
}

// access are the digests of what the access path does for a grant.
type access struct{ access, masking string }

// life is a credential's.
type life struct {
	request id
	expires store.Time
	ended   store.Time
}

func newJudge(r *Report, o *Options, whole, texts bool) (*judge, error) {
	j := &judge{
		r: r, o: o, origin: r.Origin, whole: whole, texts: texts,
		state: store.NewReplay(), keys: store.NewPasskeys(r.Origin), ids: map[id]int64{},
		runs: map[string]uint32{}, numbers: map[string]uint16{}, scopes: map[string]uint16{}, holds: map[string]*hold{}, retention: map[string]map[string]store.Duration{},
		lives: map[id]*life{}, access: map[id]*access{}, rules: map[access]*access{}, open: map[id]id{}, levels: map[id]uint16{}, people: map[string]named{}, catalogues: map[string]func(string) (*store.Rule, string, bool){}, policies: map[string]string{},
		known: map[string]bool{}, undecided: map[string][]undecided{}, standing: map[string]*store.Rule{},
	}
	var err error
	j.anchors, err = newAnchors(o.Provider)
	return j, err
}

// take judges one entry against those before it. opened holds the texts behind
// its commitments, where they are at hand.
func (j *judge) take(index int64, leaf []byte, e *store.Entry, opened map[string]string) {
	r := j.r
	uid := idOf(e.ID)
	if first, ok := j.ids[uid]; ok {
		r.add(index, KindDuplicate, "its ID %s is that of entry %d", e.ID, first)
	} else {
		j.ids[uid] = index
	}
	if e.Time.Before(j.last.Time) {
		r.add(index, KindTime, "its time %s lies before %s, that of an entry before it", e.Time, j.last)
	} else {
		j.last = e.Time
	}
	j.record(index, e, opened)
	j.person(index, e, opened)
	if !e.Type.Known() || e.Type.Concerns() {
		b := j.state.Begin()
		// The recorder's own entries and its writers' are told apart by type: no
		// recorder admits a person's decision from a writer.
		if err := b.Admit(e, leaf, index, !e.Type.Writable()); err != nil {
			r.add(index, KindOrder, "%v", err)
			return
		}
		b.Commit()
		if err := j.keys.Take(e); err != nil {
			r.add(index, KindSignature, "%v", err)
		}
	}
	switch e.Type {
	case store.StepRequested, store.ApprovalRequested, store.CredentialIssuing:
		j.ruled(index, e)
		if e.Type == store.StepRequested {
			j.granted(index, e)
		}
		if e.Type == store.StepRequested && e.Decision != nil {
			j.inForce.decided(index, e)
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		j.voted(index, e)
		if d, err := store.DetailsAs[store.DecidedDetails](e); err == nil {
			if d.Assertion != nil {
				j.tally.signed++
			} else {
				j.tally.unsigned++
			}
			if q := j.state.Request(e.Request); d.Via == "slack" && q != nil && q.Pending != nil && !q.Pending.Rule.Slack {
				r.add(index, KindRule, "it was taken in Slack, and the rule takes none there")
			}
		}
	case store.CredentialIssued, store.CredentialRevoked, store.CredentialExpired:
		j.lived(e)
	case store.CredentialUsed:
		j.used(index, e)
	case store.UseFinished:
		j.finished(index, e)
	case store.AccessRefused:
		j.refused(index, e)
	case store.AlertRaised:
		if _, err := store.DetailsAs[store.AlertDetails](e); err != nil {
			r.add(index, KindMalformed, "%v", err)
		}
	case store.PolicyLoaded:
		j.policy(index, e, opened)
	case store.PasskeyEnrolled:
		j.enrolled(index, e, opened)
	case store.HoldPlaced, store.HoldLifted:
		j.held(index, e)
	case store.DetailsErased:
		j.erased(index, e)
	case store.ExportCreated:
		if j.export != nil {
			j.export(index, e)
		}
	}
}

// lived follows when credentials begin and end.
func (j *judge) lived(e *store.Entry) {
	if e.Type == store.CredentialIssued {
		if q := j.state.Request(e.Request); q != nil { // admitted, so it has them from e
			j.lives[idOf(q.Intent)] = &life{request: idOf(e.Request), expires: q.Expires}
		}
		return
	}
	if d, err := store.DetailsAs[store.ClosedDetails](e); err == nil {
		if l := j.lives[idOf(d.Intent)]; l != nil {
			l.ended = e.Time
		}
	}
}

// used judges whether a use lies in its credential's life.
func (j *judge) used(index int64, e *store.Entry) {
	d, err := store.DetailsAs[store.UsedDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	if d.Intent == "" && e.Request == "" {
		j.tally.nameless++ // it says nothing of a credential
		return
	}
	switch d.Via {
	case store.ViaGateway:
		j.passed(index, e, &d)
	case store.ViaVaultAudit: // a result follows where it failed
		j.open[idOf(e.ID)] = idOf(e.Request)
	}
	l := j.lives[idOf(d.Intent)]
	switch {
	case l == nil:
		j.r.add(index, KindUse, "a use of intent %.100q, of which no credential had been issued", d.Intent)
	case l.request != idOf(e.Request):
		j.r.add(index, KindUse, "a use in the name of request %.100q by the credential of another", e.Request)
	case !l.ended.IsZero() && !j.before(e, l.ended):
		j.r.add(index, KindUse, "a use at %s of a credential that ended at %s", e.Time, l.ended)
	case !j.before(e, l.expires):
		j.r.add(index, KindUse, "a use at %s of a credential that was good until %s", e.Time, l.expires)
	}
}

// granted keeps which rules of the access path stand in a request's grant.
func (j *judge) granted(index int64, e *store.Entry) {
	a, err := store.GrantedAccess(e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
	}
	if a == nil {
		return
	}
	x := access{a.Digest(), a.Masking.Digest()}
	if j.rules[x] == nil {
		j.rules[x] = &x
	}
	j.access[idOf(e.Request)] = j.rules[x]
}

// passed judges a use on the access path by what was granted: the same rules in
// force, the same masking. Its result is to come.
func (j *judge) passed(index int64, e *store.Entry, d *store.UsedDetails) {
	j.open[idOf(e.ID)] = idOf(e.Request)
	switch a := j.access[idOf(e.Request)]; {
	case a == nil:
		j.r.add(index, KindUse, "a use on the access path, and no grant of its request leads there")
	case d.Access != a.access:
		j.r.add(index, KindUse, "it names the rules %.100q, its grant has %s", d.Access, a.access)
	case d.Masking != a.masking && d.Masking == "":
		j.r.add(index, KindMasking, "it was not masked, and its grant has the masking %s", a.masking)
	case d.Masking != a.masking:
		j.r.add(index, KindMasking, "it names the masking %.100q, its grant has %q", d.Masking, a.masking)
	}
}

// finished judges results: each is of a use of the same request that is on
// record before it, and has no other.
func (j *judge) finished(index int64, e *store.Entry) {
	d, err := store.DetailsAs[store.UseFinishedDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	if len(d.Outcomes) == 0 || len(d.Outcomes) > store.MaxOutcomes {
		j.r.add(index, KindMalformed, "it tells of %d uses, 1 to %d are due", len(d.Outcomes), store.MaxOutcomes)
	}
	for i := range d.Outcomes {
		use := idOf(d.Outcomes[i].Use)
		request, open := j.open[use]
		at, known := j.ids[use]
		switch {
		case open && request == idOf(e.Request):
			delete(j.open, use)
		case open:
			j.r.add(index, KindUse, "a result of entry %d, which is a use of another request", at)
		case known && at < index:
			j.r.add(index, KindUse, "a result of entry %d, which has one already or is no use on the access path", at)
		default:
			j.r.add(index, KindUse, "a result of use %.100q, which is not on record before it", d.Outcomes[i].Use)
		}
	}
}

// refused judges what a guard refused: it names a credential of its request.
func (j *judge) refused(index int64, e *store.Entry) {
	d, err := store.DetailsAs[store.RefusedDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	if d.Intent == "" {
		return
	}
	if l := j.lives[idOf(d.Intent)]; l == nil || l.request != idOf(e.Request) {
		j.r.add(index, KindUse, "a refusal to intent %.100q, of which its request had no credential", d.Intent)
	}
}

// before reports whether what e records was before end: by the recorder's time,
// or by the writer's where that is not far off.
func (j *judge) before(e *store.Entry, end store.Time) bool {
	return e.Time.Before(end.Time) || e.WriterTime.Before(end.Time) && e.Time.Before(end.Add(useLeeway))
}

// policy takes what was in force, for the decisions that name it.
func (j *judge) policy(index int64, e *store.Entry, opened map[string]string) {
	d, err := store.DetailsAs[store.PolicyDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	if d.Retention != nil {
		j.retention[e.Writer] = d.Retention
	}
	j.known[d.Digest] = true
	j.inForce.load(e, d.Digest)
	catalogue, ok := opened[store.SealedCatalogue]
	if !ok {
		return // where it should be there, its absence is a finding of its own
	}
	if got := textDigest(catalogue); got != d.Catalogue {
		j.r.add(index, KindPolicy, "the text of its catalogue has the digest %s, it names %.100q", got, d.Catalogue)
		return
	}
	rego, ok := opened[store.SealedPolicy]
	if ok && textDigest(rego) != d.Policy {
		j.r.add(index, KindPolicy, "the text of its policy has the digest %s, it names %.100q", textDigest(rego), d.Policy)
		return
	}
	if got := inForceDigest(catalogue, rego, d.Policy != ""); got != d.Digest {
		j.r.add(index, KindPolicy, "catalogue and policy together have the digest %s, it names %.100q", got, d.Digest)
		return
	}
	if j.o.Rules == nil {
		return
	}
	j.policies[d.Digest] = d.Catalogue
	if j.catalogues[d.Catalogue] == nil {
		of, err := j.o.Rules([]byte(catalogue))
		if err != nil {
			j.r.add(index, KindPolicy, "its catalogue cannot be read: %.1000v", err)
			return
		}
		j.catalogues[d.Catalogue] = of
	}
	for _, u := range j.undecided[d.Digest] {
		u.decide(j.catalogues[d.Catalogue])
	}
	delete(j.undecided, d.Digest)
}

// textDigest is how policy.loaded names a text.
func textDigest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// inForceDigest is how decisions name what is in force: a SHA-256 over catalogue
// and policy, each with its length before it (8 bytes, big-endian). Without a
// policy it is over the catalogue alone.
func inForceDigest(catalogue, policy string, hasPolicy bool) string {
	texts := []string{catalogue}
	if hasPolicy {
		texts = append(texts, policy)
	}
	h := sha256.New()
	for _, text := range texts {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(text))))
		io.WriteString(h, text)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// ruled judges a decision, a question to people or an intent by the catalogue
// that the entry says was in force.
func (j *judge) ruled(index int64, e *store.Entry) {
	if e.Type == store.CredentialIssuing && (e.Decision == nil || e.Decision.Outcome == store.Deny) {
		j.r.add(index, KindRule, "an intent that no decision allows: it names none, or a denial")
		return
	}
	if j.o.Rules == nil || !j.texts || e.Decision == nil || e.Decision.Outcome == store.Deny {
		return
	}
	var rule *store.Rule // under which people were, or are to be, asked
	asked := true
	switch e.Type {
	case store.StepRequested:
		d, err := store.DetailsAs[store.RequestedDetails](e)
		if err != nil {
			return
		}
		asked = e.Decision.Outcome == store.Allow || d.Standing != nil // else approval.requested has the rule
		if d.Standing != nil {
			rule = &d.Standing.Rule
			j.standing[e.Request] = rule
		}
	case store.ApprovalRequested:
		d, err := store.DetailsAs[store.ApprovalRequestedDetails](e)
		if err != nil {
			return
		}
		rule = &d.Rule
	case store.CredentialIssuing:
		if q := j.state.Request(e.Request); q != nil && q.Pending != nil {
			rule = &q.Pending.Rule
		} else {
			rule = j.standing[e.Request]
		}
	}
	typ, scope, level := e.Type, e.Action, ""
	if e.Risk != nil {
		level = e.Risk.Sensitivity
	}
	decide := func(of func(string) (*store.Rule, string, bool)) {
		least, sensitivity, ok := of(scope)
		switch {
		case !ok:
			j.r.add(index, KindRule, "the catalogue in force has no scope %s", scope)
		case typ != store.CredentialIssuing && level != sensitivity:
			j.r.add(index, KindRule, "%s is %s in the catalogue in force, the entry says %q", scope, sensitivity, level)
		case asked && least != nil && rule == nil:
			j.r.add(index, KindRule, "the catalogue in force wants people to approve %s, and nobody was asked", scope)
		case asked && least != nil && !rule.Covers(least):
			j.r.add(index, KindRule, "the rule for %s asks for less than the catalogue in force does", scope)
		}
	}
	j.tally.ruled++
	if of := j.catalogues[j.policies[e.Decision.Policy]]; of != nil {
		decide(of)
	} else {
		// A broker puts its policy on record as it begins to follow the log, and may
		// take a request a moment earlier.
		j.undecided[e.Decision.Policy] = append(j.undecided[e.Decision.Policy], undecided{index, decide})
	}
}

func (j *judge) enrolled(index int64, e *store.Entry, opened map[string]string) {
	j.tally.enrolled++
	if !j.texts || j.anchors == nil {
		return
	}
	d, err := store.DetailsAs[store.EnrolledDetails](e)
	if err != nil {
		return // a finding already
	}
	if err := j.anchors.check(j.origin, &d, e, opened); err != nil {
		j.r.add(index, KindAnchor, "%v", err)
		return
	}
	j.tally.anchored++
}

func (j *judge) held(index int64, e *store.Entry) {
	if e.Type == store.HoldPlaced {
		d, err := store.DetailsAs[store.HoldDetails](e)
		switch {
		case err != nil:
			j.r.add(index, KindMalformed, "%v", err)
		case (d.Run == "") == d.From.IsZero() || d.Run != "" && !d.To.IsZero() || !d.To.IsZero() && !d.From.Before(d.To.Time):
			j.r.add(index, KindHold, "the hold covers neither a run nor a window of time")
		default:
			j.holds[e.ID] = &hold{HoldDetails: d, index: index}
		}
		return
	}
	d, err := store.DetailsAs[store.HoldLiftedDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	switch h := j.holds[d.Hold]; {
	case h != nil && !h.lifted:
		h.lifted = true
	case h != nil:
		j.r.add(index, KindHold, "hold %s had been lifted", d.Hold)
	case j.whole:
		j.r.add(index, KindHold, "it lifts %.100q, which no entry before it placed", d.Hold)
	}
}

// record keeps what an erasure of e's texts would be judged by.
func (j *judge) record(index int64, e *store.Entry, opened map[string]string) {
	if e.Type == store.StepRequested {
		j.levels[idOf(e.Request)] = number(j.numbers, sensitivity(e))
	}
	if len(e.Sealed) == 0 {
		return
	}
	x := record{index: index, micros: e.Time.UnixMicro(), run: number(j.runs, e.Run), level: number(j.numbers, sensitivity(e)), scope: number(j.scopes, e.Action)}
	if !e.Type.Erasable() {
		x.flags |= recordKept
	}
	if j.texts {
		if len(opened) > 0 {
			x.flags |= recordOpened
		}
		if len(opened) < len(e.Sealed) {
			x.flags |= recordMissing
		}
	}
	// By another sensitivity than its request's a text would be kept for another
	// time.
	if asked, ok := j.levels[idOf(e.Request)]; ok && e.Type.Concerns() && asked != x.level {
		j.r.add(index, KindRule, "its sensitivity is %.100q, and its request was asked with another", sensitivity(e))
	}
	j.records = append(j.records, x)
}

func sensitivity(e *store.Entry) string {
	if e.Risk == nil {
		return ""
	}
	return e.Risk.Sensitivity
}

func number[N uint16 | uint32](names map[string]N, name string) N {
	n, ok := names[name]
	if !ok {
		n = N(len(names))
		names[strings.Clone(name)] = n
	}
	return n
}

// erased judges details.erased: whether each text that it names might go.
func (j *judge) erased(index int64, e *store.Entry) {
	d, err := store.DetailsAs[store.ErasedDetails](e)
	if err != nil {
		j.r.add(index, KindMalformed, "%v", err)
		return
	}
	refuse := func(format string, a ...any) { j.r.add(index, KindErasure, format, a...) }
	due, ok := j.retention[e.Writer][d.Sensitivity]
	switch {
	case len(d.Entries) == 0 || len(d.Entries) > store.MaxErased || !slices.IsSorted(d.Entries):
		refuse("it names %d entries, 1 to %d in ascending order are due", len(d.Entries), store.MaxErased)
		return
	case !ok:
		refuse("no retention of texts of sensitivity %q was on record: they are kept for good", d.Sensitivity)
	case d.Kept < due:
		refuse("texts of sensitivity %q were kept for %s, the retention on record is %s", d.Sensitivity, time.Duration(d.Kept), time.Duration(due))
	}
	level := number(j.numbers, d.Sensitivity)
	own := map[uint16]store.Duration{} // of scopes that keep their texts longer
	for key, kept := range j.retention[e.Writer] {
		if scope, is := strings.CutPrefix(key, ledger.OfScope); is {
			own[number(j.scopes, scope)] = kept
		}
	}
	for _, i := range d.Entries {
		if i < 0 || i >= index {
			refuse("it names entry %d, which is not before it", i)
			continue
		}
		at := sort.Search(len(j.records), func(k int) bool { return j.records[k].index >= i })
		if at == len(j.records) || j.records[at].index != i {
			continue // outside the bundle, or without a text
		}
		x := &j.records[at]
		x.flags |= recordErased
		switch t := time.UnixMicro(x.micros); {
		case x.flags&recordKept != 0:
			refuse("entry %d is of a type whose texts are never erased", i)
		case x.level != level:
			refuse("entry %d is of another sensitivity than %q", i, d.Sensitivity)
		case e.Time.Sub(t) < time.Duration(max(d.Kept, own[x.scope])):
			refuse("entry %d was %s old, its texts had to be kept for %s", i, e.Time.Sub(t), time.Duration(max(d.Kept, own[x.scope])))
		}
		if h := j.holding(x); h != nil {
			refuse("entry %d was under the hold of entry %d", i, h.index)
		}
	}
}

// holding returns a hold that stands over x now.
func (j *judge) holding(x *record) *hold {
	for _, h := range j.holds {
		if h.lifted {
			continue
		}
		covers := false
		if h.Run != "" {
			n, ok := j.runs[h.Run]
			covers = ok && n == x.run
		} else {
			covers = h.Covers(&store.Entry{Time: store.At(time.UnixMicro(x.micros))})
		}
		if covers {
			return h
		}
	}
	return nil
}

// finish says what is wrong that no single entry shows, and what was judged.
func (j *judge) finish() {
	defer func() {
		t := &j.tally
		j.r.Signed, j.r.Unsigned, j.r.Enrolled, j.r.Anchored, j.r.Ruled = t.signed, t.unsigned, t.enrolled, t.anchored, t.ruled
	}()
	for policy, waiting := range j.undecided {
		j.tally.ruled -= int64(len(waiting))
		first := waiting[0].index
		if at := slices.IndexFunc(waiting, func(u undecided) bool { return u.index >= j.from }); at >= 0 {
			what := "which is not on record"
			if j.known[policy] {
				what = "which is on record without the catalogue that it is made of"
			}
			j.r.add(waiting[at].index, KindPolicy, "it names the policy %.80q, %s", policy, what)
			continue
		}
		j.r.note("%d entries from %d on name the policy %.80q, whose catalogue is not here: their rules were not compared with it", len(waiting), first, policy)
	}
	j.inForce.tell(j.r)
	if j.tally.nameless > 0 {
		j.r.note("%d uses name no credential, and were not judged", j.tally.nameless)
	}
	if !j.texts {
		return
	}
	for _, x := range j.records {
		switch {
		case x.flags&recordErased != 0 && x.flags&recordOpened != 0:
			j.r.add(x.index, KindErasedText, "its erasure is on record, and a text of it is here")
		case x.flags&recordErased == 0 && x.flags&recordMissing != 0:
			j.r.add(x.index, KindTextMissing, "it commits to a text that is not here, and no erasure of it is on record")
		}
	}
}

// matches reports whether e is among what filters select, as ledger.Query does.
// A filter that this program does not know matches nothing.
func matches(e *store.Entry, filters map[string]string) bool {
	for name, want := range filters {
		got := ""
		switch name {
		case "from", "to":
			continue // they made the window
		case "run":
			got = e.Run
		case "step":
			got = e.Step
		case "orchestrator":
			got = e.Orchestrator
		case "request":
			got = e.Request
		case "scope":
			got = e.Action
		case "target":
			got = e.Resource
		case "type":
			got = string(e.Type)
		case "person":
			if e.Person != nil {
				got = *e.Person
			}
		case "subject":
			if e.Subject != nil {
				got = e.Subject.ID
			}
		case "outcome":
			if e.Decision != nil {
				got = string(e.Decision.Outcome)
			}
		}
		if got == "" || got != want {
			return false
		}
	}
	return true
}
