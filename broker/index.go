package broker

import (
	"slices"
	"sync"
	"time"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// tracked is what this broker knows of one request, from entries that were
// verified. It is a copy of what the ledger says, a moment late: it serves to
// find credentials and to wake waiting calls, never to allow a mint.
type tracked struct {
	story    *store.Entry // step.requested without its details: what later entries repeat
	join     string
	keyed    bool
	body     string
	status   store.Status
	attempt  int
	intent   string
	place    int64 // index of the latest intent
	intentAt time.Time
	writer   string // of the latest intent
	minting  bool
	live     bool
	issued   store.IssuedDetails // of the latest credential.issued
	issuedAt time.Time           // of the latest credential.issued
	heard    time.Time           // when it came here, by this broker's clock
	cause    string              // why the latest credential was closed
	last     int64               // index of the latest entry applied
	gone     bool                // closed; kept until the follower has passed it
	forget   time.Time           // when a closed, keyed request is forgotten

	condemned   string    // why a live credential is to end before its time
	condemnedAt time.Time // since when, by this broker's clock
	frozen      bool      // a freeze condemned it
	stays       bool      // condemned by a freeze, and out until its end

	pending *store.Pending // what people were asked, nil where they were not; never changed in place
	drawn   string         // the request whose standing approval this one draws on
}

// waits reports whether the request is one that people decide and that nothing
// was minted for yet.
func (t *tracked) waits() bool {
	return t.status == store.StatusPending || t.pending != nil && t.status == store.StatusApproved
}

// stands returns until when requests of the run may draw on t's approval; zero
// where they may not.
func (t *tracked) stands() time.Time {
	var until time.Time
	if t.pending == nil {
		return until
	}
	for _, v := range t.pending.Votes {
		if v.Standing != nil && v.Standing.Until.After(until) {
			until = v.Standing.Until.Time
		}
	}
	return until
}

// index holds what is open.
type index struct {
	mu        sync.Mutex
	requests  map[string]*tracked
	steps     map[stepKey]map[string]bool // requests of a step
	serials   map[string]string           // of a live identity token to its request
	joins     map[string]string           // of a request that people decide to its ID
	standing  map[string]bool             // requests with an approval for their whole run
	waiting   map[string]map[*waiter]bool
	freezes   map[string]*store.Freeze // in force, by ID; nil: lifted
	frozen    map[string]bool          // requests whose credential a freeze condemned
	froze     chan struct{}            // receives when there is more in frozen
	closed    []string                 // gone, to be dropped once the follower has passed them
	own       map[int64]bool           // entries applied from acknowledgements, which the follower will bring again
	cursor    int64                    // all entries up to this index were applied
	synced    bool
	following bool
	places    bool          // freed is kept
	freed     []freed       // places that requests held until they were no longer live, or pending
	ready     chan struct{} // closed once synced

	// ended is told of each intent whose credential is no more, or is to end; it
	// is called with mu held, may be called again, and must not call the index.
	ended func(intent string)
	now   func() time.Time
}

// freed is a place (see places) that a request has no more.
type freed struct {
	kind  string
	story *store.Entry
}

// holds says which kind of place t holds: none where it is empty.
func (t *tracked) holds() string {
	switch {
	case t.live || t.minting:
		return inLive
	case t.status == store.StatusPending && !t.gone:
		return inPending
	}
	return ""
}

// over reports whether t should have ended by now, whatever the record says.
func (t *tracked) over(now time.Time) bool {
	return t.live && now.After(t.issued.Expires.Time) || t.pending != nil && t.status == store.StatusPending && now.After(t.pending.Expires.Time)
}

// frees notes that t may have lost the place of the kind that it held before.
func (x *index) frees(t *tracked, held string) {
	if x.places && held != "" && t.holds() != held {
		x.freed = append(x.freed, freed{held, t.story})
	}
}

// takeFreed returns which places were freed since, and are not held again.
func (x *index) takeFreed() []freed {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := slices.DeleteFunc(x.freed, func(f freed) bool {
		t := x.requests[f.story.Request]
		return t != nil && t.holds() == f.kind
	})
	x.freed = nil
	return out
}

// hasFreed reports whether there is something to take.
func (x *index) hasFreed() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.freed) > 0
}

// joining reports whether a call under this join would join a request instead
// of opening one, for all that is known here.
func (x *index) joining(join string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	t := x.requests[x.joins[join]]
	return t != nil && !t.gone && (t.keyed || t.minting || t.waits())
}

type stepKey struct{ orchestrator, run, step string }

func newIndex() *index {
	return &index{requests: map[string]*tracked{}, steps: map[stepKey]map[string]bool{},
		serials: map[string]string{}, joins: map[string]string{}, standing: map[string]bool{}, own: map[int64]bool{}, waiting: map[string]map[*waiter]bool{}, cursor: -1, ready: make(chan struct{}),
		freezes: map[string]*store.Freeze{}, frozen: map[string]bool{}, froze: make(chan struct{}, 1),
		ended: func(string) {}, now: time.Now}
}

// apply takes entries into the index, in the order of the log. Entries that
// are known already change nothing.
func (x *index) apply(entries ...placed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range entries {
		x.one(p.Entry, p.Index)
	}
}

// acknowledged is apply for entries that this broker appended itself.
func (x *index) acknowledged(entries ...placed) {
	x.apply(entries...)
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range entries {
		if p.Index > x.cursor && p.Type.Concerns() {
			x.own[p.Index] = true
		}
	}
}

// news returns what of a is not known from an acknowledgement: there is no
// need to read the rest a second time.
func (x *index) news(a *store.Appended) *store.Appended {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := &store.Appended{Checkpoint: a.Checkpoint}
	for _, p := range a.Entries {
		if !x.own[p.Index] {
			out.Entries = append(out.Entries, p)
		}
		delete(x.own, p.Index)
	}
	return out
}

// placed is an entry and where it stands in the log.
type placed struct {
	*store.Entry
	Index int64
}

// parse reads the leaves of a verified answer.
func parse(a *store.Appended) ([]placed, error) {
	out := make([]placed, len(a.Entries))
	for i, p := range a.Entries {
		e, err := store.ParseLeaf(p.Leaf)
		if err != nil {
			return nil, err
		}
		out[i] = placed{e, p.Index}
	}
	return out, nil
}

func (x *index) one(e *store.Entry, at int64) {
	switch e.Type {
	case store.FreezeSet:
		x.freeze(e, at)
		return
	case store.FreezeLifted:
		x.thaw(e)
		return
	}
	t := x.requests[e.Request]
	if t != nil && at <= t.last {
		return
	}
	if t == nil {
		x.requested(e, at)
		return
	}
	t.last = at
	held := t.holds()
	defer func() { x.frees(t, held) }()
	switch e.Type {
	case store.CredentialIssuing:
		if d, err := store.DetailsAs[store.IssuingDetails](e); err == nil {
			x.ended(t.intent)
			t.intent, t.attempt, t.minting, t.live, t.writer, t.intentAt, t.gone = e.ID, d.Attempt, true, false, e.Writer, e.Time.Time, false
			t.forget, t.condemned, t.frozen, t.stays, t.place = time.Time{}, "", false, false, at
			delete(x.frozen, e.Request)
			// What follows repeats the decision that let it be minted.
			story := *t.story
			story.Decision = e.Decision
			t.story = &story
			k := stepKey{e.Orchestrator, e.Run, e.Step}
			if x.steps[k] == nil {
				x.steps[k] = map[string]bool{}
			}
			x.steps[k][e.Request] = true
			t.status = store.StatusApproved
			for _, f := range x.freezes {
				// One that is lifted, and was when the intent came on record, is none.
				if f != nil && f.Index > at {
					x.stop(t, f)
				}
			}
		}
	case store.CredentialIssued:
		if d, err := store.DetailsAs[store.IssuedDetails](e); err == nil {
			t.minting, t.live, t.issued, t.issuedAt, t.heard, t.status, t.cause = false, true, d, e.Time.Time, x.now(), store.StatusIssued, ""
			if d.Serial != "" {
				x.serials[d.Serial] = e.Request
			}
			if t.frozen {
				x.stopped(e.Request)
			}
		}
	case store.CredentialFailed, store.CredentialAbandoned:
		x.failed(t, e.Time.Time)
	case store.CredentialRevoked, store.CredentialExpired:
		x.ended(t.intent)
		t.live, t.status, t.condemned, t.frozen = false, store.StatusClosed, "", false
		delete(x.frozen, e.Request)
		if e.Cause != nil {
			t.cause = *e.Cause
		}
		t.gone = !t.keyed && !t.stands().After(e.Time.Time)
		delete(x.serials, t.issued.Serial)
		x.close(t, e.Time.Time)
	case store.ApprovalRequested:
		if d, err := store.DetailsAs[store.ApprovalRequestedDetails](e); err == nil && t.pending == nil {
			t.pending = &store.Pending{Approval: d.Approval, Index: at, Rule: d.Rule, Excluded: d.Excluded,
				Expires: store.At(e.Time.Add(time.Duration(d.Rule.Expires)))}
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		x.decided(t, e, at)
	case store.ApprovalExpired:
		x.refused(t, store.StatusExpired, e.Time.Time)
	case store.RequestWithdrawn:
		t.status, t.gone = store.StatusWithdrawn, true
		x.close(t, e.Time.Time)
	case store.RequestVoid:
		t.cause = ""
		if e.Cause != nil {
			t.cause = *e.Cause
		}
		x.refused(t, store.StatusVoid, e.Time.Time)
	}
	x.wake(e.Request)
}

// requested takes step.requested, which opens a request.
func (x *index) requested(e *store.Entry, at int64) {
	if e.Type != store.StepRequested || e.Decision == nil || e.Decision.Outcome != store.Allow && e.Decision.Outcome != store.NeedsApproval {
		return
	}
	d, err := store.DetailsAs[store.RequestedDetails](e)
	if err != nil {
		return
	}
	story := *e
	story.Details, story.Sealed = nil, nil
	t := &tracked{story: &story, join: d.Join, keyed: d.Keyed, body: d.Body, status: store.StatusApproved, last: at}
	x.requests[e.Request] = t
	if d.Join != "" {
		x.joins[d.Join] = e.Request
	}
	switch {
	case d.Standing != nil:
		t.drawn = d.Standing.Request
		x.draw(t.drawn, 1)
	case e.Decision.Outcome == store.NeedsApproval:
		t.status = store.StatusPending
	}
	if old := x.requests[d.After]; old != nil && d.After != "" && !old.gone { // its caller was told, and the ledger has forgotten it
		old.gone = true
		x.closed = append(x.closed, d.After)
	}
	x.wake(e.Request)
}

// draw counts uses of a standing approval.
func (x *index) draw(id string, n int) {
	if from := x.requests[id]; from != nil && from.pending != nil {
		p := *from.pending
		p.Used = max(0, p.Used+n)
		from.pending = &p
	}
}

// decided takes a person's decision, as the order of the record does.
func (x *index) decided(t *tracked, e *store.Entry, at int64) {
	d, err := store.DetailsAs[store.DecidedDetails](e)
	if err != nil || t.pending == nil || e.Person == nil {
		return
	}
	if d.Decision == store.Refuse {
		x.refused(t, store.StatusDenied, e.Time.Time)
		return
	}
	p := *t.pending
	p.Votes = append(slices.Clone(p.Votes), store.Vote{Person: *e.Person, Groups: d.Groups, Index: at, Standing: d.Standing})
	if _, met := p.Rule.Tally(p.Votes); met && t.status == store.StatusPending {
		t.status, p.Expires = store.StatusApproved, store.At(e.Time.Add(time.Duration(p.Rule.Collect)))
	}
	t.pending = &p
	if d.Standing != nil {
		x.standing[e.Request] = true
	}
}

// refused ends a request that people were asked about. It is remembered for as
// long as the ledger does.
func (x *index) refused(t *tracked, as store.Status, at time.Time) {
	t.status, t.minting = as, false
	x.close(t, at)
}

// failed takes the end of an intent that came to nothing. What people approved
// may be tried again.
func (x *index) failed(t *tracked, at time.Time) {
	t.minting = false
	if t.pending != nil && t.attempt <= 1 {
		t.status, t.attempt, t.condemned, t.frozen = store.StatusApproved, 0, "", false
		x.left(t)
		return
	}
	if t.attempt <= 1 {
		x.draw(t.drawn, -1)
	}
	t.status = store.StatusFailed
	t.gone = t.attempt <= 1 || !t.keyed
	x.close(t, at)
}

// close marks a request that nothing hangs on any more.
func (x *index) close(t *tracked, at time.Time) {
	if t.gone {
		x.closed = append(x.closed, t.story.Request)
	} else {
		t.forget = at.Add(store.KeyLife)
		if until := t.stands(); until.After(t.forget) {
			t.forget = until
		}
	}
	x.left(t)
}

// left takes a request out of those of its step that have, or are about to
// have, a credential.
func (x *index) left(t *tracked) {
	k := stepKey{t.story.Orchestrator, t.story.Run, t.story.Step}
	delete(x.steps[k], t.story.Request)
	if len(x.steps[k]) == 0 {
		delete(x.steps, k)
	}
}

// passed notes that the follower has applied everything up to index, and
// drops what is closed: no earlier entry can come and open it again.
func (x *index) passed(at int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cursor = max(x.cursor, at)
	x.drop()
}

func (x *index) drop() {
	keep := x.closed[:0]
	for _, id := range x.closed {
		switch t := x.requests[id]; {
		case t == nil || !t.gone:
		case t.last <= x.cursor:
			x.delete(id, t)
		default:
			keep = append(keep, id)
		}
	}
	x.closed = keep
}

func (x *index) delete(id string, t *tracked) {
	delete(x.requests, id)
	delete(x.standing, id)
	delete(x.frozen, id)
	if x.joins[t.join] == id {
		delete(x.joins, t.join)
	}
}

// forget drops closed requests whose idempotency key is no longer remembered.
func (x *index) forget(now time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id, t := range x.requests {
		if !t.forget.IsZero() && now.After(t.forget) {
			x.delete(id, t)
		}
	}
}

// merge takes the whole of what is open in a log of size entries: what the
// index holds beyond it was closed while nobody looked. What became of a request
// that people decide is for the caller to look up: it returns those.
func (x *index) merge(open []placed, size int64, now time.Time) (ended []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	named := map[string]bool{}
	for _, p := range open {
		named[p.Request] = true
		x.one(p.Entry, p.Index)
	}
	x.settle(open, size)
	x.lifted(open, size)
	for id, t := range x.requests {
		if !named[id] && t.last < size && t.waits() {
			ended = append(ended, id)
			continue
		}
		if !named[id] && t.last < size && !t.gone && (t.minting || t.live || t.status == store.StatusApproved) {
			x.ended(t.intent)
			held := t.holds()
			t.minting, t.live, t.gone, t.status = false, false, true, store.StatusClosed
			x.frees(t, held)
			delete(x.serials, t.issued.Serial)
			delete(x.frozen, id)
			x.close(t, now)
			x.wake(id)
		}
	}
	x.cursor = max(x.cursor, size-1)
	for at := range x.own {
		if at <= x.cursor {
			delete(x.own, at)
		}
	}
	x.drop()
	x.following = true
	if !x.synced {
		x.synced = true
		close(x.ready)
	}
	return ended
}

// looked takes what the recorder says of one request in a log of size entries.
func (x *index) looked(entries []placed, size int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range entries {
		x.one(p.Entry, p.Index)
	}
	x.settle(entries, size)
}

// settle finds intents that came to nothing while nobody looked: of a request
// that people approved the recorder names no intent that has failed.
func (x *index) settle(open []placed, size int64) {
	intents, named := map[string]bool{}, map[string]bool{}
	for _, p := range open {
		named[p.Request] = true
		if p.Type == store.CredentialIssuing {
			intents[p.ID] = true
		}
	}
	for id := range named {
		if t := x.requests[id]; t != nil && t.pending != nil && t.minting && t.place < size && !intents[t.intent] {
			held := t.holds()
			x.failed(t, t.intentAt)
			x.frees(t, held)
			x.wake(id)
		}
	}
}

// vanish closes a request that the recorder no longer names as open.
func (x *index) vanish(id string, now time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if t := x.requests[id]; t != nil && !t.gone {
		status := store.StatusClosed
		if t.waits() && !t.minting {
			status = store.StatusWithdrawn // all else would be remembered
		}
		x.ended(t.intent)
		held := t.holds()
		t.minting, t.live, t.gone, t.status = false, false, true, status
		x.frees(t, held)
		delete(x.serials, t.issued.Serial)
		delete(x.frozen, id)
		x.close(t, now)
		x.wake(id)
	}
}

// joined returns the request that holds a join and waits for people or for
// being collected.
func (x *index) joined(join string) (tracked, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	t := x.requests[x.joins[join]]
	if t == nil || t.minting || !t.waits() {
		return tracked{}, false
	}
	return *t, true
}

// deciding returns the requests of a run that people may be deciding for all of
// it, for all that is known here.
func (x *index) deciding(orchestrator, run string) []string {
	return x.pick(func(_ string, t *tracked) bool {
		return t.pending != nil && t.pending.Rule.Standing != nil && t.story.Orchestrator == orchestrator && t.story.Run == run &&
			(t.status == store.StatusPending || t.status == store.StatusApproved)
	})
}

// standings returns the requests of a run whose approval may stand for scope
// at now.
func (x *index) standings(orchestrator, run, scope string, now store.Time) []tracked {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []tracked
	for id := range x.standing {
		if t := x.requests[id]; t != nil && t.pending != nil && t.story.Orchestrator == orchestrator && t.story.Run == run && standsFor(t.pending, scope, now) {
			out = append(out, *t)
		}
	}
	return out
}

// stale reports whether the follower is not up to date.
func (x *index) stale() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return !x.following
}

// lost notes that the recorder is not followed any more.
func (x *index) lost() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.following = false
}

// get returns a copy of what is known of a request.
func (x *index) get(id string) (tracked, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	t := x.requests[id]
	if t == nil {
		return tracked{}, false
	}
	return *t, true
}

// condemn marks a credential, live or being minted, that is to end before its
// time: it is not handed over any more, its session at the gateway is cut, and
// the keeper goes on trying.
func (x *index) condemn(id, cause string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if t := x.requests[id]; t != nil && (t.live || t.minting) && t.condemned == "" {
		t.condemned, t.condemnedAt = cause, x.now()
		x.ended(t.intent)
	}
}

// step returns the requests of a step that have a live credential or one
// being minted.
func (x *index) step(k stepKey) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var ids []string
	for id := range x.steps[k] {
		ids = append(ids, id)
	}
	return ids
}

// risk is that of the most sensitive of a step's credentials which are live or
// being minted: nil where there are none.
func (x *index) risk(k stepKey) *store.Risk {
	x.mu.Lock()
	defer x.mu.Unlock()
	var most *store.Risk
	rank := func(r *store.Risk) int { return slices.Index(scopes.Sensitivities, r.Sensitivity) }
	for id := range x.steps[k] {
		if t := x.requests[id]; t != nil && t.story.Risk != nil && (most == nil || rank(t.story.Risk) > rank(most)) {
			most = t.story.Risk
		}
	}
	return most
}

// pick returns the requests for which pick is true.
func (x *index) pick(pick func(id string, t *tracked) bool) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var ids []string
	for id, t := range x.requests {
		if pick(id, t) {
			ids = append(ids, id)
		}
	}
	return ids
}

// serial returns the request of a live identity token.
func (x *index) serial(jti string) (tracked, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	t := x.requests[x.serials[jti]]
	if t == nil || !t.live || t.issued.Serial != jti {
		return tracked{}, false
	}
	return *t, true
}

// waiter is told what is applied to one request.
type waiter struct {
	C chan struct{} // receives when something was applied

	x    *index
	id   string
	seen *tracked
}

// watch returns a waiter for a request; it must be stopped.
func (x *index) watch(id string) *waiter {
	w := &waiter{C: make(chan struct{}, 1), x: x, id: id}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.waiting[id] == nil {
		x.waiting[id] = map[*waiter]bool{}
	}
	x.waiting[id][w] = true
	if t := x.requests[id]; t != nil {
		c := *t
		w.seen = &c
	}
	return w
}

// latest returns the request as it was after the last entry applied, also
// where the index has dropped it since; false where none was ever seen.
func (w *waiter) latest() (tracked, bool) {
	w.x.mu.Lock()
	defer w.x.mu.Unlock()
	if w.seen == nil {
		return tracked{}, false
	}
	return *w.seen, true
}

func (w *waiter) stop() {
	w.x.mu.Lock()
	defer w.x.mu.Unlock()
	delete(w.x.waiting[w.id], w)
	if len(w.x.waiting[w.id]) == 0 {
		delete(w.x.waiting, w.id)
	}
}

func (x *index) wake(id string) {
	for w := range x.waiting[id] {
		if t := x.requests[id]; t != nil {
			c := *t
			w.seen = &c
		}
		select {
		case w.C <- struct{}{}:
		default:
		}
	}
}

func standsFor(p *store.Pending, scope string, now store.Time) bool {
	terms, _ := p.Terms(scope, now)
	return terms != nil
}
