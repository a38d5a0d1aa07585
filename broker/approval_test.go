package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
	"github.com/countersign-dev/countersign/store/ledger"
)

// inForce puts a changed demo catalogue in force.
func (w *world) inForce(change func(string) string) {
	w.t.Helper()
	before := string(scopes.Demo(nil))
	after := change(before)
	if before == after {
		w.t.Fatal("the catalogue was not changed")
	}
	set, err := scopes.Parse("demo.yaml", []byte(after), "", nil)
	ok(w.t, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.set = set
}

// rewrite changes the block of one scope.
func rewrite(scope, from, to string) func(string) string {
	return func(s string) string {
		at := strings.Index(s, "name: "+scope)
		return s[:at] + strings.Replace(s[at:], from, to, 1)
	}
}

// recorded appends an entry as the recorder itself does.
func (w *world) recorded(s *store.Submission) error {
	w.t.Helper()
	line, err := s.Marshal()
	ok(w.t, err)
	_, err = w.ledger.Append(context.Background(), ledger.Author{Name: "recorder", Recorder: true}, [][]byte{line})
	return err
}

// asked returns what people are asked for a request, with its leaf.
func (w *world) asked(request string) (*store.Entry, string, store.ApprovalRequestedDetails) {
	w.t.Helper()
	for s, err := range w.ledger.Entries(context.Background(), 0, w.ledger.Size()) {
		ok(w.t, err)
		e, err := store.ParseLeaf(s.Leaf)
		ok(w.t, err)
		if e.Type == store.ApprovalRequested && e.Request == request {
			d, err := store.DetailsAs[store.ApprovalRequestedDetails](e)
			ok(w.t, err)
			return e, store.HashText(store.LeafHash(s.Leaf)), d
		}
	}
	w.t.Fatalf("nobody was asked about %s: %v", request, w.types())
	return nil, "", store.ApprovalRequestedDetails{}
}

func (w *world) about(t store.Type, story *store.Entry) *store.Submission {
	return &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(w.clock.now()),
		Agent: "spiffe://countersign.test/recorder", Subject: story.Subject, Orchestrator: story.Orchestrator, Run: story.Run, Step: story.Step,
		Request: story.Request, Resource: story.Resource, Action: story.Action}}
}

// decide is a person's decision, as the recorder writes it.
func (w *world) decide(request, person, group, decision string, terms ...store.StandingTerms) error {
	w.t.Helper()
	story, leaf, d := w.asked(request)
	s := w.about(store.ApprovalDecided, story)
	details := store.DecidedDetails{Approval: d.Approval, Requested: leaf, Decision: decision, Groups: []string{group}, Via: "page"}
	if len(terms) > 0 {
		s.Type, details.Standing = store.ApprovalStanding, &terms[0]
	}
	s.Person = store.Ptr(store.PrivacyKey(key).Pseudonym("user:" + person))
	s.SetDetails(details)
	s.Seal(store.SealedReason, "looked at it")
	s.Seal(store.SealedPerson, "user:"+person)
	return w.recorded(s)
}

// expire closes a request whose time is over, as the recorder does.
func (w *world) expire(request string, approved bool) {
	w.t.Helper()
	story, _, d := w.asked(request)
	s := w.about(store.ApprovalExpired, story)
	s.SetDetails(store.ExpiredDetails{Approval: d.Approval, Approved: approved})
	ok(w.t, w.recorded(s))
}

// write is a call for the scope that one of dba approves.
func write(run string, change ...func(*broker.Ask)) broker.Ask {
	return ask(run, append([]func(*broker.Ask){func(a *broker.Ask) {
		a.Scope, a.Reason, a.Body = "vault:demo-write", "OPS-1", []byte(`{"run":"`+run+`","scope":"vault:demo-write"}`)
	}}, change...)...)
}

func admin(a *broker.Ask) {
	a.Scope, a.Body = "vault:demo-admin", []byte(strings.Replace(string(a.Body), "demo-write", "demo-admin", 1))
}

func waiting(d time.Duration) func(*broker.Ask) { return func(a *broker.Ask) { a.Wait = d } }

// now is a call that begins now by the world's clock.
func (w *world) now(a broker.Ask) broker.Ask {
	time.Sleep(2 * time.Millisecond) // entries are stamped to the millisecond
	a.Arrived = w.clock.now()
	return a
}

// pending asks, and expects that people are to decide.
func (w *world) pending(b *node, a broker.Ask) *broker.Reply {
	w.t.Helper()
	r, err := b.Request(context.Background(), demoCaller, w.now(a))
	ok(w.t, err)
	if r.Credential != nil || r.Status != store.StatusPending || r.Waiting == nil {
		w.t.Fatalf("reply %+v", r)
	}
	return r
}

// ended expects that a request is refused because it came to an end.
func ended(t testing.TB, err error, want store.Status) {
	t.Helper()
	var e *broker.NotApproved
	if !errors.As(err, &e) || e.Status != want {
		t.Fatalf("error %v, want one of a request that is %s", err, want)
	}
}

func TestASensitiveRequestWaitsForPeopleAndIsMintedOnceTheyApprove(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	caller := broker.Caller{Orchestrator: "demo", Owners: []string{"user:owner"}}
	a := write(run, func(a *broker.Ask) { a.Subject = "user:subject" })
	r, err := b.Request(t.Context(), caller, a)
	ok(t, err)
	w.wantTypes("step.requested", "approval.requested")
	if r.Status != store.StatusPending || r.Waiting == nil || r.Waiting.URL != "https://people.test/approvals/"+r.Waiting.ID ||
		!slices.Equal(r.Waiting.Needs, []broker.Need{{Group: "dba", Count: 1}}) || r.Waiting.Expires.Before(time.Now()) {
		t.Fatalf("reply %+v, %+v", r, r.Waiting)
	}
	e, _, d := w.asked(r.Request)
	if e.Decision.Outcome != store.NeedsApproval || e.Decision.Policy != demo.Digest() || !slices.Contains(e.Decision.Reasons, "needs approval") ||
		d.Approval != r.Waiting.ID || d.Grant.Path != "" || d.Grant.Scope != "vault:demo-write" || len(d.Grant.Policies) != 1 || d.Rule.Groups[0].Group != "dba" ||
		!slices.Equal(d.Excluded, []string{store.PrivacyKey(key).Pseudonym("user:owner")}) || e.Sealed[store.SealedReason] == "" || e.Sealed[store.SealedSubject] == "" {
		t.Fatalf("asked %+v %+v", e, d)
	}
	for _, who := range []string{"owner", "subject"} {
		if _, refused := store.IsOrder(w.decide(r.Request, who, "dba", store.Approve), store.OrderSelf); !refused {
			t.Errorf("%s may approve", who)
		}
	}
	v, err := b.Get(t.Context(), caller, r.Request)
	ok(t, err)
	if v.Status != store.StatusPending || v.Waiting == nil || v.Waiting.ID != d.Approval {
		t.Fatalf("view %+v", v)
	}
	// The waiting call is woken by the decision.
	var got *broker.Reply
	var wg sync.WaitGroup
	began := time.Now()
	wg.Go(func() {
		wait := a
		wait.Wait = time.Minute
		got, err = b.Request(context.Background(), caller, wait)
	})
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	wg.Wait()
	ok(t, err)
	if got.Credential == nil || got.Request != r.Request || got.Approved == nil || *got.Approved != (broker.Approved{ID: d.Approval, Request: r.Request, People: 1}) {
		t.Fatalf("reply %+v, %+v", got, got.Approved)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Fatalf("woken after %s", took)
	}
	w.wantTypes("step.requested", "approval.requested", "approval.decided", "credential.issuing", "credential.issued")
	if in := w.last(store.CredentialIssuing); in.Decision.Outcome != store.Allow {
		t.Fatalf("intent %+v", in.Decision)
	}
	// It is spent: the same call opens a new request.
	again := w.pending(b, a)
	if again.Request == r.Request {
		t.Fatal("an approval is used twice")
	}
}

func TestOnePersonOfTwoThatAreDueIsNotEnough(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1(), admin)
	r := w.pending(b, a)
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	if _, refused := store.IsOrder(w.decide(r.Request, "alice", "dba", store.Approve), store.OrderDecided); !refused {
		t.Fatal("one person counts twice")
	}
	if again := w.pending(b, a); again.Request != r.Request || again.Waiting.Needs[0] != (broker.Need{Group: "dba", Count: 2, Approved: 1}) {
		t.Fatalf("%+v", again.Waiting)
	}
	ok(t, w.decide(r.Request, "bob", "dba", store.Approve))
	got, err := b.Request(t.Context(), demoCaller, w.now(a))
	ok(t, err)
	if got.Credential == nil || got.Approved.People != 2 {
		t.Fatalf("%+v", got)
	}
}

func TestOfManyWhoWaitOneGetsTheCredential(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	one, two := w.start("broker-1"), w.start("broker-2")
	a := write(run1())
	r := w.pending(one, a)
	var wg sync.WaitGroup
	var replies []*broker.Reply
	var errs []error
	wg.Go(func() { replies, errs = manyAtOnce(t, []*node{one, two}, write(a.Run, waiting(30*time.Second)), 50) })
	w.until("some wait", func() bool { return one.Ready(t.Context()) == nil && two.Ready(t.Context()) == nil })
	time.Sleep(100 * time.Millisecond) // in which most of them begin to wait; whoever comes later collects or opens anew
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	w.until("minted", func() bool { return w.count(store.CredentialIssued) == 1 })
	// Whoever came after it was collected opened a new request, which is to end.
	w.until("nobody waits", func() bool {
		for _, e := range w.entries() {
			if e.Type == store.ApprovalRequested && e.Request != r.Request {
				_ = one.Withdraw(context.Background(), demoCaller, e.Request)
			}
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		select {
		case <-done:
			return true
		case <-time.After(time.Second):
			return false
		}
	})
	handed := 0
	for _, r := range replies {
		if r.Credential != nil {
			handed++
		}
	}
	for _, err := range errs {
		is(t, err, broker.ErrClosed)
	}
	if handed != 1 || one.iss.mints+two.iss.mints != 1 {
		t.Fatalf("%d handed over, %d minted", handed, one.iss.mints+two.iss.mints)
	}
}

func TestADenialIsToldToThoseWhoJoinedAndTheNextWhoAsks(t *testing.T) {
	for _, c := range []struct {
		status store.Status
		end    func(w *world, request string)
	}{
		{store.StatusDenied, func(w *world, id string) { ok(w.t, w.decide(id, "alice", "dba", store.Refuse)) }},
		{store.StatusExpired, func(w *world, id string) {
			_, _, d := w.asked(id)
			w.clock.pass(time.Duration(d.Rule.Expires) + time.Second)
			w.expire(id, false)
		}},
	} {
		t.Run(string(c.status), func(t *testing.T) {
			w := newWorld(t)
			w.redis = redistest.Start(t)
			one, two := w.start("broker-1"), w.start("broker-2")
			a := write(run1())
			r := w.pending(one, a)
			errs := make(chan error, 2)
			for _, b := range []*node{one, two} {
				a := w.now(write(a.Run, waiting(time.Minute)))
				go func() {
					_, err := b.Request(context.Background(), demoCaller, a)
					errs <- err
				}()
			}
			time.Sleep(50 * time.Millisecond) // either may come later: it arrived before the end
			c.end(w, r.Request)
			for range 2 {
				ended(t, <-errs, c.status)
			}
			v, err := two.Get(t.Context(), demoCaller, r.Request)
			ok(t, err)
			if v.Status != c.status {
				t.Fatalf("status %s", v.Status)
			}
			_, err = two.Request(t.Context(), demoCaller, w.now(a))
			ended(t, err, c.status)
			next := w.pending(one, a)
			if next.Request == r.Request {
				t.Fatal("the same request")
			}
			d, err := store.DetailsAs[store.RequestedDetails](w.last(store.StepRequested))
			ok(t, err)
			if d.After != r.Request {
				t.Fatalf("after %q", d.After)
			}
			v, err = two.Get(t.Context(), demoCaller, r.Request)
			ok(t, err)
			if v.Status != c.status {
				t.Fatalf("of the old one: status %s", v.Status)
			}
		})
	}
}

func TestWithoutRedisADenialIsToldAgainRatherThanNever(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	a := write(run1())
	r := w.pending(b, a)
	ok(t, w.decide(r.Request, "alice", "dba", store.Refuse))
	_, err := b.Request(t.Context(), demoCaller, w.now(a))
	ended(t, err, store.StatusDenied)
	w.redis.Flush()
	_, err = b.Request(t.Context(), demoCaller, w.now(a))
	ended(t, err, store.StatusDenied)
	w.pending(b, a)
}

func TestARequestThatIsTakenBackCannotBeApproved(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1())
	r := w.pending(b, a)
	waiter := make(chan error)
	go func() {
		_, err := b.Request(context.Background(), demoCaller, w.now(write(a.Run, waiting(time.Minute))))
		waiter <- err
	}()
	w.until("it waits", func() bool { return strings.Count(strings.Join(w.traced(), " "), "approval.requested") == 1 })
	time.Sleep(50 * time.Millisecond) // or it comes after, and opens a new request
	is(t, b.Withdraw(t.Context(), broker.Caller{Orchestrator: "other"}, r.Request), broker.ErrNotFound)
	ok(t, b.Withdraw(t.Context(), demoCaller, r.Request))
	is(t, <-waiter, broker.ErrClosed)
	if _, refused := store.IsOrder(w.decide(r.Request, "alice", "dba", store.Approve), store.OrderNotOpen); !refused {
		t.Fatal("it can still be approved")
	}
	v, err := b.Get(t.Context(), demoCaller, r.Request)
	ok(t, err)
	if v.Status != store.StatusWithdrawn {
		t.Fatalf("status %s", v.Status)
	}
	if next := w.pending(b, a); next.Request == r.Request {
		t.Fatal("it is joined")
	}
}

func TestApprovedAccessIsForWhatWasShownAndNothingElse(t *testing.T) {
	wider := rewrite("vault:demo-write", "capabilities: [create, update]", "capabilities: [create, update, delete]")
	other := rewrite("vault:demo-write", "default_ttl: 5m", "default_ttl: 6m")
	for name, c := range map[string]struct {
		change func(string) string
		void   bool
	}{
		"another ttl":          {other, true},
		"more people":          {rewrite("vault:demo-write", "group: dba, count: 1", "group: dba, count: 2"), true},
		"other people":         {rewrite("vault:demo-write", "group: dba", "group: sre"), true},
		"now denied":           {rewrite("vault:demo-write", `ask: ["*"]`, `ask: ["billing-*"]`), true},
		"gone":                 {func(s string) string { return strings.ReplaceAll(s, "vault:demo-write", "vault:demo-wrote") }, true},
		"nobody need approve":  {rewrite("vault:demo-write", "reasons: {requester: true, approver: true}", "reasons: {requester: true}"), false},
		"the policy in Vault":  {wider, false}, // the same policy name: what it says is Vault's, and part of the digest that the intent names
		"another scope's rule": {rewrite("vault:demo-admin", "count: 2", "count: 3"), false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, approved := range []bool{true, false} {
				w := newWorld(t)
				b := w.start("broker-1")
				a := write(run1())
				r := w.pending(b, a)
				if approved {
					ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
				}
				w.inForce(c.change)
				got, err := b.Request(t.Context(), demoCaller, w.now(a))
				if !c.void {
					ok(t, err)
					if approved != (got.Credential != nil) || got.Request != r.Request {
						t.Fatalf("%+v", got)
					}
					continue
				}
				ended(t, err, store.StatusVoid)
				if e := w.last(store.RequestVoid); *e.Cause != broker.CauseChanged || e.Request != r.Request {
					t.Fatalf("%+v", e)
				}
				if b.iss.mints != 0 {
					t.Fatal("minted")
				}
				if _, refused := store.IsOrder(w.decide(r.Request, "bob", "dba", store.Approve), store.OrderNotOpen); !refused {
					t.Fatal("it can still be approved")
				}
			}
		})
	}
}

func TestACatalogueThatChangesWhileACallWaitsVoidsWhatWasApproved(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1())
	r := w.pending(b, a)
	errs := make(chan error, 5)
	for range 5 {
		a := w.now(write(a.Run, waiting(time.Minute)))
		go func() {
			_, err := b.Request(context.Background(), demoCaller, a)
			errs <- err
		}()
	}
	time.Sleep(100 * time.Millisecond) // whoever comes later is refused as well, on arrival
	w.inForce(rewrite("vault:demo-write", "default_ttl: 5m", "default_ttl: 6m"))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	for range 5 {
		ended(t, <-errs, store.StatusVoid)
	}
	if w.count(store.RequestVoid) != 1 || b.iss.mints != 0 {
		t.Fatalf("%v, %d minted", w.types(), b.iss.mints)
	}
	// The next who asks is told as well, or it was one of those; then it opens anew.
	w.until("a new request", func() bool {
		got, err := b.Request(t.Context(), demoCaller, w.now(a))
		return err == nil && got.Status == store.StatusPending && got.Request != r.Request
	})
}

func TestAnApprovalIsCollectedInTimeOrNotAtAll(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1())
	r := w.pending(b, a)
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	_, _, d := w.asked(r.Request)
	w.clock.pass(time.Duration(d.Rule.Collect) + time.Second)
	_, err := b.Request(t.Context(), demoCaller, w.now(a))
	ended(t, err, store.StatusExpired)
	w.expire(r.Request, true)
	_, err = b.Request(t.Context(), demoCaller, w.now(a))
	ended(t, err, store.StatusExpired)
	if next := w.pending(b, a); next.Request == r.Request || b.iss.mints != 0 {
		t.Fatal("minted, or joined")
	}
}

func TestAMintThatFailsLeavesTheApprovalUsable(t *testing.T) {
	w := newWorld(t)
	b, other := w.start("broker-1"), w.start("broker-2")
	a := write(run1())
	r := w.pending(b, a)
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	b.iss.set(func(i *tracing) {
		i.mint = func() error { return &issuer.StageError{Stage: "create", Err: issuer.ErrVaultUnavailable} }
	})
	for range 3 {
		_, err := b.Request(t.Context(), demoCaller, w.now(a))
		is(t, err, issuer.ErrVaultUnavailable)
	}
	v, err := b.Get(t.Context(), demoCaller, r.Request)
	ok(t, err)
	if v.Status != store.StatusApproved {
		t.Fatalf("status %s", v.Status)
	}
	got, err := other.Request(t.Context(), demoCaller, w.now(a))
	ok(t, err)
	if got.Credential == nil || got.Request != r.Request || w.count(store.ApprovalRequested) != 1 || w.count(store.CredentialFailed) != 3 {
		t.Fatalf("%+v, %v", got, w.types())
	}
}

func TestARetryOfWhatWasApprovedAsksNobodyAgain(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1(), keyed("k-1"))
	r := w.pending(b, a)
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	first, err := b.Request(t.Context(), demoCaller, w.now(a))
	ok(t, err)
	first.Answered()
	second, err := b.Request(t.Context(), demoCaller, w.now(a))
	ok(t, err)
	if second.Credential == nil || second.Approved == nil || second.Approved.ID != r.Waiting.ID || second.Credential.Token == first.Credential.Token || children(t, a.Run) != 1 {
		t.Fatalf("%+v, %d alive", second, children(t, a.Run))
	}
	if w.count(store.ApprovalRequested) != 1 {
		t.Fatal("asked again")
	}
	changed := a
	changed.Body = []byte("{}")
	_, err = b.Request(t.Context(), demoCaller, w.now(changed))
	is(t, err, broker.ErrIdempotency)
}

// Where a broker is killed, what it had appended stands, and what it held in
// memory is gone. Each broker here is left for dead at one such point: nothing
// of its own is put on record any more, and another goes on.
func TestWhereverABrokerDiesNobodyIsAskedTwiceAndOneCredentialIsMinted(t *testing.T) {
	die := errors.New("killed")
	at := func(when string, typ store.Type) func(*node) {
		return func(dead *node) {
			dead.rec.set(func(r *recorder) {
				kill := func(subs []*store.Submission) error {
					if subs[0].Type == typ {
						r.set(func(r *recorder) { r.down = true })
						return fmt.Errorf("%w: %w", store.ErrUnavailable, die)
					}
					return nil
				}
				if when == "before" {
					r.before = kill
				} else {
					r.after = kill
				}
			})
		}
	}
	for name, kill := range map[string]func(dead *node){
		"after the request":   at("after", store.StepRequested),
		"before the intent":   at("before", store.CredentialIssuing),
		"after the intent":    at("after", store.CredentialIssuing),
		"before the issuance": at("before", store.CredentialIssued),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			run := run1()
			a := write(run)
			first := w.start("broker-1")
			w.until("ready", func() bool { return first.Ready(t.Context()) == nil })
			kill(first)
			var r *broker.Reply
			if name == "after the request" {
				_, err := first.Request(t.Context(), demoCaller, w.now(a))
				is(t, err, die)
				ok(t, first.Close())
				second := w.start("broker-1")
				r = w.pending(second, a)
				ok(t, second.Close()) // two of one name would give up each other's intents
				ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
			} else {
				r = w.pending(first, a)
				ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
				_, err := first.Request(t.Context(), demoCaller, w.now(a))
				is(t, err, die)
				ok(t, first.Close())
			}
			again := w.start("broker-1")
			var got *broker.Reply
			w.until("collected", func() bool {
				reply, err := again.Request(context.Background(), demoCaller, w.now(a))
				if err != nil || reply.Credential == nil {
					return false
				}
				got = reply
				return true
			})
			if got.Request != r.Request || w.count(store.ApprovalRequested) != 1 || w.count(store.CredentialIssued) != 1 {
				t.Fatalf("%+v: %v", got, w.types())
			}
			w.until("one is alive", func() bool { return children(t, run) == 1 })
		})
	}
}

func TestABrokerThatWasAwayLearnsWhatPeopleDecided(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	denied, approved, gone := write(run1()), write(run1()), write(run1())
	d, a, g := w.pending(b, denied), w.pending(b, approved), w.pending(b, gone)
	other := w.start("broker-2")
	b.rec.set(func(r *recorder) { r.down = true })
	// A decision that the broker does not hear of breaks its following off.
	ok(t, w.decide(d.Request, "alice", "dba", store.Refuse))
	ok(t, w.decide(a.Request, "alice", "dba", store.Approve))
	ok(t, other.Withdraw(t.Context(), demoCaller, g.Request))
	b.rec.set(func(r *recorder) { r.down = false })
	w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
	for id, want := range map[string]store.Status{d.Request: store.StatusDenied, a.Request: store.StatusApproved, g.Request: store.StatusWithdrawn} {
		v, err := b.Get(t.Context(), demoCaller, id)
		ok(t, err)
		if v.Status != want {
			t.Errorf("status %s, want %s", v.Status, want)
		}
	}
}

func TestAWaitingCallOutlivesARecorderThatIsAwayForAMoment(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := write(run1())
	r := w.pending(b, a)
	got := make(chan *broker.Reply, 1)
	go func() {
		reply, err := b.Request(context.Background(), demoCaller, w.now(write(a.Run, waiting(time.Minute))))
		if err != nil {
			t.Error(err)
		}
		got <- reply
	}()
	time.Sleep(50 * time.Millisecond) // so that it waits, as a rule
	b.rec.set(func(r *recorder) { r.down = true })
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve))
	time.Sleep(50 * time.Millisecond)
	b.rec.set(func(r *recorder) { r.down = false })
	if reply := <-got; reply == nil || reply.Credential == nil {
		t.Fatalf("%+v", reply)
	}
}

func TestAThousandPendingRequestsOutliveARedisThatWasEmptied(t *testing.T) {
	w := newWorld(t)
	w.redis = redistest.Start(t)
	b := w.start("broker-1")
	w.until("ready", func() bool { return b.Ready(t.Context()) == nil })
	const n = 1000
	ids := make([]string, n)
	runs := make([]string, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 50)
	for i := range n {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			runs[i] = run1()
			r, err := b.Request(context.Background(), demoCaller, write(runs[i]))
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = r.Request
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	all := func(b *node) {
		for first := range 8 {
			wg.Go(func() {
				for i := first; i < n; i += 8 {
					if v, err := b.Get(context.Background(), demoCaller, ids[i]); err != nil || v.Status != store.StatusPending || v.Waiting == nil {
						t.Errorf("%+v, %v", v, err)
					}
				}
			})
		}
		wg.Wait()
	}
	w.redis.Flush()
	began := time.Now()
	all(b)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("all there again after %s", took)
	}
	all(w.start("broker-2")) // one that was not there before
	if again := w.pending(b, write(runs[n/2])); again.Request != ids[n/2] {
		t.Fatal("asked twice")
	}
	if got := w.count(store.ApprovalRequested); got != n {
		t.Fatalf("%d asked", got)
	}
}

// standing makes vault:demo-write one that may be approved for a whole run.
func standing(s string) string {
	for _, scope := range []string{"vault:demo-write", "vault:demo-admin"} {
		s = rewrite(scope, "reasons: {requester: true, approver: true}", "reasons: {requester: true, approver: true}\n      standing: {uses: 3, for: 1h}")(s)
	}
	return s
}

func TestAnApprovalForAWholeRunIsDrawnOnWithinItsLimits(t *testing.T) {
	w := newWorld(t)
	w.inForce(standing)
	b := w.start("broker-1")
	run := run1()
	step := func(n int) func(*broker.Ask) { return func(a *broker.Ask) { a.Step = fmt.Sprintf("step-%d", n) } }
	r := w.pending(b, write(run))
	terms := store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 2, Until: store.At(w.clock.now().Add(30 * time.Minute))}
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve, terms))
	first, err := b.Request(t.Context(), demoCaller, w.now(write(run)))
	ok(t, err)
	if first.Credential == nil || first.Approved.Request != r.Request {
		t.Fatalf("%+v", first)
	}
	// Its own owner, subject, another run, orchestrator and scope do not draw on it.
	for name, c := range map[string]struct {
		caller broker.Caller
		ask    broker.Ask
	}{
		"the person who approved owns the caller": {broker.Caller{Orchestrator: "demo", Owners: []string{"user:alice"}}, write(run, step(10))},
		"the person who approved is the subject":  {demoCaller, write(run, step(11), func(a *broker.Ask) { a.Subject = "user:alice" })},
		"another run":                             {demoCaller, write(run1(), step(12))},
		"another orchestrator":                    {broker.Caller{Orchestrator: "other"}, write(run, step(13))},
		"another scope":                           {demoCaller, write(run, admin, step(14))},
	} {
		got, err := b.Request(t.Context(), c.caller, w.now(c.ask))
		ok(t, err)
		if got.Status != store.StatusPending {
			t.Fatalf("%s: %+v", name, got)
		}
	}
	for n := range 2 {
		got, err := b.Request(t.Context(), demoCaller, w.now(write(run, step(n+2))))
		ok(t, err)
		if got.Credential == nil || got.Approved == nil || got.Approved.Request != r.Request || got.Approved.ID != r.Waiting.ID || got.Request == r.Request {
			t.Fatalf("use %d: %+v", n+1, got)
		}
		d, err := store.DetailsAs[store.RequestedDetails](w.last(store.StepRequested))
		ok(t, err)
		if d.Standing == nil || d.Standing.Request != r.Request {
			t.Fatalf("the use does not point at the approval: %+v", d)
		}
	}
	// Used up, also for a broker that has not counted.
	for _, b := range []*node{b, w.start("broker-2")} {
		w.pending(b, write(run, step(4)))
	}
}

func TestAnApprovalForAWholeRunEndsByTheClock(t *testing.T) {
	w := newWorld(t)
	w.inForce(standing)
	b := w.start("broker-1")
	run := run1()
	r := w.pending(b, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve,
		store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 3, Until: store.At(w.clock.now().Add(5 * time.Minute))}))
	_, err := b.Request(t.Context(), demoCaller, w.now(write(run)))
	ok(t, err)
	w.clock.pass(6 * time.Minute)
	got, err := b.Request(t.Context(), demoCaller, w.now(write(run, func(a *broker.Ask) { a.Step = "step-2" })))
	ok(t, err)
	if got.Status != store.StatusPending {
		t.Fatalf("%+v", got)
	}
}

func TestAUseOfARunsApprovalThatFailsIsGivenBack(t *testing.T) {
	w := newWorld(t)
	w.inForce(standing)
	b := w.start("broker-1")
	run := run1()
	r := w.pending(b, write(run))
	ok(t, w.decide(r.Request, "alice", "dba", store.Approve,
		store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 1, Until: store.At(w.clock.now().Add(5 * time.Minute))}))
	_, err := b.Request(t.Context(), demoCaller, w.now(write(run)))
	ok(t, err)
	second := write(run, func(a *broker.Ask) { a.Step = "step-2" })
	b.iss.set(func(i *tracing) {
		i.mint = func() error { return &issuer.StageError{Stage: "create", Err: issuer.ErrVaultUnavailable} }
	})
	_, err = b.Request(t.Context(), demoCaller, w.now(second))
	is(t, err, issuer.ErrVaultUnavailable)
	b.iss.set(func(i *tracing) { i.mint = nil })
	got, err := b.Request(t.Context(), demoCaller, w.now(second))
	ok(t, err)
	if got.Credential == nil || w.count(store.ApprovalRequested) != 1 {
		t.Fatalf("%+v", got)
	}
}
