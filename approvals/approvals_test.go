package approvals

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/refusal"
)

func TestOnePersonInTwoGroupsCountsAsOne(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:both")
	r, err := w.a.Decide(t.Context(), bob, id, approve("ok")) // of dba and of sre
	ok(t, err)
	if r.Status != store.StatusPending || r.Needs[0].Approved+r.Needs[1].Approved != 1 {
		t.Fatalf("%s, %v", r.Status, r.Needs)
	}
	_, err = w.a.Decide(t.Context(), bob, id, approve("ok"))
	wants(t, err, store.OrderDecided)
	// The seat that fills most is bob's: as alice is of dba alone, bob sits for sre.
	r, err = w.a.Decide(t.Context(), alice, id, approve("ok"))
	ok(t, err)
	if r.Status != store.StatusApproved || len(r.Decisions) != 2 {
		t.Fatalf("%s after %v", r.Status, r.Decisions)
	}
	w.refused("user:bob decided")
}

func TestAnAdminDoesNotApproveTheirOwnRequest(t *testing.T) {
	w := newWorld(t)
	x := w.asking("app:write").subject(alice.Name)
	ok(t, w.send(x))
	for _, p := range []Person{alice, owner} { // the subject, though only claimed, and the orchestrator's owner
		_, err := w.a.Decide(t.Context(), p, x.ad.Approval, approve("mine"))
		wants(t, err, store.OrderSelf)
		_, err = w.a.Decide(t.Context(), p, x.ad.Approval, Decision{Decision: store.Refuse, Reason: "mine", Via: viaPage})
		wants(t, err, store.OrderSelf)
	}
	r := w.get(x.ad.Approval)
	if r.Status != store.StatusPending || len(r.Decisions) != 0 || len(r.Refused) != 4 || r.Refused[0].Person != alice.Name {
		t.Fatalf("%s %v %v", r.Status, r.Decisions, r.Refused)
	}
	w.refused("user:alice self-approval", "user:alice self-approval", "user:owner self-approval", "user:owner self-approval")
}

func TestAnOwnerDecidesNothingAlsoWhereABrokerForgotToSaySo(t *testing.T) {
	w := newWorld(t)
	w.a.Close()
	w.a.c.Owners = map[string][]string{"demo": {alice.Name}} // since the request was made
	w.a, _ = New(t.Context(), w.a.c)
	id := w.ask("app:write")
	_, err := w.a.Decide(t.Context(), alice, id, approve("mine"))
	wants(t, err, store.OrderSelf)
	if list, _, err := w.a.List(t.Context(), Filter{State: StateMine, Person: &alice}); err != nil || len(list) != 0 {
		t.Fatalf("%v, %v", list, err)
	}
	_, err = w.a.Decide(t.Context(), bob, id, approve("theirs"))
	ok(t, err)
}

func TestAListHasWhatWasAskedAndDecidedBeforeIt(t *testing.T) {
	w := newWorld(t)
	for range 50 {
		id := w.ask("app:write")
		list, _, err := w.a.List(t.Context(), Filter{})
		ok(t, err)
		if len(list) != 1 || list[0].ID != id {
			t.Fatalf("%d pending", len(list))
		}
		_, err = w.a.Decide(t.Context(), alice, id, approve("ok"))
		ok(t, err)
		if list, _, err := w.a.List(t.Context(), Filter{}); err != nil || len(list) != 0 {
			t.Fatalf("%d pending, %v", len(list), err)
		}
	}
}

func TestApprovingForTwoGroupsAtOnceNeitherOvershootsNorHangs(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:both")
	var wg sync.WaitGroup
	errs := make([]error, 3)
	for i, p := range []Person{alice, bob, carol} {
		wg.Go(func() { _, errs[i] = w.a.Decide(context.Background(), p, id, approve("ok")) })
	}
	wg.Wait()
	r := w.get(id)
	if r.Status != store.StatusApproved || r.Needs[0].Approved != 1 || r.Needs[1].Approved != 1 || len(r.Decisions) != 2 {
		t.Fatalf("%s %v %v", r.Status, r.Needs, r.Decisions)
	}
	late := slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(late) != 1 {
		t.Fatalf("errors: %v", late)
	}
	wants(t, late[0], store.OrderNotOpen)
}

func TestOfFiftyApprovalsAtTheSameInstantExactlyTheQuorumCounts(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:admin")
	var wg sync.WaitGroup
	errs := make([]error, 50)
	start := make(chan struct{})
	for i := range errs {
		wg.Go(func() {
			<-start
			_, errs[i] = w.a.Decide(context.Background(), Person{Name: fmt.Sprintf("user:dba-%d", i), Groups: []string{"dba"}}, id, approve("ok"))
		})
	}
	close(start)
	wg.Wait()
	counted := 0
	for _, err := range errs {
		if err == nil {
			counted++
		} else {
			wants(t, err, store.OrderNotOpen)
		}
	}
	r := w.get(id)
	if counted != 2 || len(r.Decisions) != 2 || r.Status != store.StatusApproved || len(w.refusals()) != 48 {
		t.Fatalf("%d counted, %d on record, %s, %d refused", counted, len(r.Decisions), r.Status, len(w.refusals()))
	}
}

func TestTwoApprovalsAtTheSameInstantLoseNone(t *testing.T) {
	w := newWorld(t)
	for range 20 {
		id := w.ask("app:admin")
		var wg sync.WaitGroup
		for _, p := range []Person{alice, bob} {
			wg.Go(func() {
				if _, err := w.a.Decide(context.Background(), p, id, approve("ok")); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if r := w.get(id); r.Status != store.StatusApproved || len(r.Decisions) != 2 {
			t.Fatalf("%s %v", r.Status, r.Decisions)
		}
	}
}

func TestAPendingRequestExpiresByTheClock(t *testing.T) {
	w := newWorld(t)
	events, end := w.a.Subscribe()
	defer end()
	id := w.ask("app:write")
	next(t, events, EventRequested)
	w.advance(10*time.Minute - time.Microsecond)
	if _, err := w.a.Decide(t.Context(), carol, id, approve("ok")); err == nil {
		t.Fatal("carol counts")
	}
	w.advance(time.Microsecond)
	e := next(t, events, EventExpired)
	if e.Approval != id || e.Request.Status != store.StatusExpired {
		t.Fatalf("%+v", e)
	}
	_, err := w.a.Decide(t.Context(), alice, id, approve("late"))
	wants(t, err, store.OrderNotOpen)
}

func TestAnApprovalThatNobodyCollectsExpires(t *testing.T) {
	w := newWorld(t)
	events, end := w.a.Subscribe()
	defer end()
	id := w.ask("app:write")
	_, err := w.a.Decide(t.Context(), alice, id, approve("ok"))
	ok(t, err)
	next(t, events, EventApproved)
	w.advance(5 * time.Minute)
	next(t, events, EventExpired)
	r := w.get(id)
	if r.Status != store.StatusExpired {
		t.Fatal(r.Status)
	}
	if err := w.append(broker, w.issuing(r)); err == nil {
		t.Fatal("an expired approval is collected")
	}
}

func TestWhatExpiredWhileNothingRanIsSaidAtTheStart(t *testing.T) {
	w := newWorld(t)
	id, stays := w.ask("app:write"), w.ask("app:night")
	w.stop()
	w.advance(time.Hour)
	w.start()
	deadline := time.Now().Add(20 * time.Second)
	for w.get(id).Status != store.StatusExpired {
		if time.Now().After(deadline) {
			t.Fatal("it does not expire")
		}
		time.Sleep(10 * time.Millisecond) // until the first tick has run
	}
	if s := w.get(stays).Status; s != store.StatusPending {
		t.Fatal(s)
	}
}

func TestAWindowOverMidnightStaysOpenAtMidnight(t *testing.T) {
	w := newWorld(t)
	first := w.ask("app:night")
	_, err := w.a.Decide(t.Context(), alice, first, approve("noon"))
	wants(t, err, store.OrderHours)
	w.refused("user:alice not-an-approver")
	w.advance(12*time.Hour - time.Minute) // Monday 23:59
	second, third := w.ask("app:night"), w.ask("app:night")
	_, err = w.a.Decide(t.Context(), alice, second, approve("before midnight"))
	ok(t, err)
	w.advance(2 * time.Minute) // Tuesday 00:01, the window of Monday
	_, err = w.a.Decide(t.Context(), alice, third, approve("after midnight"))
	ok(t, err)
	w.advance(6 * time.Hour) // 06:01
	fourth := w.ask("app:night")
	_, err = w.a.Decide(t.Context(), alice, fourth, approve("morning"))
	wants(t, err, store.OrderHours)
	_, err = w.a.Decide(t.Context(), alice, fourth, Decision{Decision: store.Refuse, Via: viaPage})
	ok(t, err) // a denial is taken at any time
}

func TestAnApprovalIsUsedOnce(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	r, err := w.a.Decide(t.Context(), alice, id, approve("ok"))
	ok(t, err)
	intents := make([]error, 10)
	var wg sync.WaitGroup
	for i := range intents {
		wg.Go(func() { intents[i] = w.append(broker, w.issuing(r)) })
	}
	wg.Wait()
	if n := len(slices.DeleteFunc(intents, func(err error) bool { return err != nil })); n != 1 {
		t.Fatalf("%d intents rest on one approval", n)
	}
	other := w.asking("app:write")
	ok(t, w.send(other))
	s := w.issuing(w.get(other.ad.Approval))
	if err := w.append(broker, s); err == nil {
		t.Fatal("another request is minted on nothing")
	}
	s = w.issuing(w.get(other.ad.Approval))
	s.SetDetails(store.IssuingDetails{Attempt: 1, Grant: r.Grant.Digest(), NotPast: store.At(w.clock().Add(time.Minute)), Approval: r.Request})
	if err := w.append(broker, s); err == nil {
		t.Fatal("another request is minted on this one's approval")
	}
}

func TestADenialWinsAtOnceAndNeedsTheReasonThatIsDue(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	_, err := w.a.Decide(t.Context(), alice, id, Decision{Decision: store.Refuse, Reason: " \n", Via: viaPage})
	wants(t, err, store.OrderReason)
	r, err := w.a.Decide(t.Context(), alice, id, Decision{Decision: store.Refuse, Reason: "not today", Via: viaPage})
	ok(t, err)
	if r.Status != store.StatusDenied || r.Decisions[0].Reason != "not today" || r.Decisions[0].Person != alice.Name {
		t.Fatalf("%+v", r)
	}
	_, err = w.a.Decide(t.Context(), bob, id, approve("I disagree"))
	wants(t, err, store.OrderNotOpen)
	w.refused("user:alice reason-required", "user:bob request-closed")
}

func TestAttemptsOfThoseWhoMayNotAreOnRecordAndChangeNothing(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:admin")
	_, err := w.a.Decide(t.Context(), carol, id, approve("ok"))
	wants(t, err, store.OrderApprover)
	_, err = w.a.Decide(t.Context(), alice, id, approve("ok"))
	ok(t, err)
	_, err = w.a.Decide(t.Context(), alice, id, approve("again"))
	wants(t, err, store.OrderDecided)
	_, err = w.a.Decide(t.Context(), alice, id, Decision{Decision: store.Approve, Via: viaSlack})
	wants(t, err, store.OrderMismatch)
	r := w.get(id)
	if r.Status != store.StatusPending || r.Needs[0] != (Need{"dba", 2, 1}) || len(r.Refused) != 3 {
		t.Fatalf("%s %v %v", r.Status, r.Needs, r.Refused)
	}
	w.refused("user:carol not-an-approver", "user:alice decided", "user:alice mismatch")
}

func TestAnAttemptRepeatedWithoutEndDoesNotFillTheLedger(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:admin")
	const n = 300
	began := time.Now()
	for range n {
		_, err := w.a.Decide(t.Context(), carol, id, approve("ok"))
		wants(t, err, store.OrderApprover)
	}
	ok(t, w.a.Close()) // what is folded is not lost at a stop
	// In each interval one by itself and one that stands for the others.
	most := refusal.Burst + 2*int(time.Since(began)/refusal.Interval+1)
	page, err := w.ledger.History(t.Context(), ledger.Query{Type: string(store.AccessRefused)})
	ok(t, err)
	sum := 0
	for _, h := range page.Entries {
		e, err := store.ParseLeaf(h.Entry)
		ok(t, err)
		d, err := store.DetailsAs[store.RefusedDetails](e)
		ok(t, err)
		sum += 1 + d.Folded
	}
	if sum != n || len(page.Entries) > most {
		t.Fatalf("%d entries for %d attempts, want at most %d for %d", len(page.Entries), sum, most, n)
	}
}

func TestWhatMakesNoSenseIsRefusedBeforeAnythingIsRead(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	until := store.At(w.clock().Add(time.Minute))
	for name, d := range map[string]Decision{
		"no decision":      {Via: viaPage},
		"another decision": {Decision: "maybe", Via: viaPage},
		"no way":           {Decision: store.Approve},
		"long reason":      approve(strings.Repeat("x", maxReason+1)),
		"zero byte":        approve("a\x00b"),
		"no text":          approve("\xff"),
		"standing denial":  {Decision: store.Refuse, Via: viaPage, Standing: &store.StandingTerms{Scopes: []string{"app:write"}, Uses: 1, Until: until}},
		"standing scopes":  {Decision: store.Approve, Via: viaPage, Standing: &store.StandingTerms{Uses: 1, Until: until}},
		"unknown scope":    {Decision: store.Approve, Via: viaPage, Standing: &store.StandingTerms{Scopes: []string{"app:none"}, Uses: 1, Until: until}},
		"standing over":    {Decision: store.Approve, Via: viaPage, Standing: &store.StandingTerms{Scopes: []string{"app:write"}, Uses: 1, Until: store.At(w.clock())}},
	} {
		if _, err := w.a.Decide(t.Context(), alice, id, d); err == nil {
			t.Errorf("%s: taken", name)
		} else {
			isErr(t, err, ErrMalformed)
		}
	}
	for _, id := range []string{"apr_none", "", "../x", strings.Repeat("a", 200)} {
		_, err := w.a.Decide(t.Context(), alice, id, approve("ok"))
		isErr(t, err, ErrNotFound)
	}
	w.refused()
}

func TestAnApprovalForTheRunIsDrawnOnAsOftenAsItSays(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	d := approve("for the run")
	d.Standing = &store.StandingTerms{Scopes: []string{"app:write"}, Uses: 3, Until: store.At(w.clock().Add(time.Hour))}
	_, err := w.a.Decide(t.Context(), alice, id, d)
	wants(t, err, store.OrderMismatch) // more uses than the rule allows
	d.Standing.Uses = 2
	r, err := w.a.Decide(t.Context(), alice, id, d)
	ok(t, err)
	if r.Decisions[0].Standing == nil || r.Status != store.StatusApproved {
		t.Fatalf("%+v", r)
	}
	for i := range 3 {
		x := w.asking("app:write")
		x.rd.Standing = &store.StandingUse{Request: r.Request, Rule: x.ad.Rule, Excluded: x.ad.Excluded}
		x.requested.SetDetails(x.rd)
		err := w.append(broker, x.requested)
		if i < 2 {
			ok(t, err)
		} else {
			wants(t, err, store.OrderNotOpen)
		}
	}
	x := w.asking("app:write") // drawn on under a weaker rule than the recorder's
	x.ad.Rule.Reasons.Approver = false
	x.rd.Standing = &store.StandingUse{Request: r.Request, Rule: x.ad.Rule, Excluded: x.ad.Excluded}
	x.requested.SetDetails(x.rd)
	wants(t, w.append(broker, x.requested), store.OrderWeak)
	x = w.asking("app:write") // drawn on with the owner not excluded
	x.rd.Standing = &store.StandingUse{Request: r.Request, Rule: x.ad.Rule, Excluded: []string{}}
	x.requested.SetDetails(x.rd)
	wants(t, w.append(broker, x.requested), store.OrderWeak)
}

func TestTheGateRefusesWhatTheRecordersOwnCatalogueDoesNotSay(t *testing.T) {
	for name, c := range map[string]struct {
		change func(x *asking)
		want   store.OrderCode
	}{
		"allowed without asking": {func(x *asking) { x.requested.Decision.Outcome = store.Allow }, store.OrderWeak},
		"fewer people":           {func(x *asking) { x.ad.Rule.Groups = []store.RuleGroup{{Group: "dba", Count: 1}} }, store.OrderWeak},
		"another group":          {func(x *asking) { x.ad.Rule.Groups = []store.RuleGroup{{Group: "interns", Count: 2}} }, store.OrderWeak},
		"longer wait":            {func(x *asking) { x.ad.Rule.Expires *= 2 }, store.OrderWeak},
		"in Slack":               {func(x *asking) { x.ad.Rule.Slack = true }, store.OrderWeak},
		"standing":               {func(x *asking) { x.ad.Rule.Standing = &store.StandingLimit{Uses: 1, For: store.Duration(time.Hour)} }, store.OrderWeak},
		"owner not excluded":     {func(x *asking) { x.ad.Excluded = []string{} }, store.OrderWeak},
		"unknown scope": {func(x *asking) {
			for _, s := range []*store.Submission{x.requested, x.asked} {
				s.Action = "app:none"
			}
			x.rd.Grant.Scope, x.ad.Grant.Scope = "app:none", "app:none"
		}, store.OrderWeak},
		"another grant": {func(x *asking) {
			x.ad.Grant.Policies, x.rd.Grant.Policies = []string{"root"}, []string{"root"}
		}, store.OrderMismatch},
		"another scope's grant": {func(x *asking) { x.ad.Grant.Scope, x.rd.Grant.Scope = "app:write", "app:write" }, store.OrderMismatch},
		"longer TTL": {func(x *asking) {
			x.ad.Grant.TTL, x.rd.Grant.TTL = store.Duration(time.Hour), store.Duration(time.Hour)
		}, store.OrderMismatch},
		"not what is requested": {func(x *asking) { x.ad.Grant.TTL = store.Duration(time.Minute) }, store.OrderMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			x := w.asking("app:admin")
			c.change(x)
			wants(t, w.send(x), c.want)
			if n := w.ledger.Size(); n != 0 {
				t.Fatalf("%d entries", n)
			}
		})
	}
	w := newWorld(t)
	x := w.asking("app:admin")
	x.ad.Rule.Groups = []store.RuleGroup{{Group: "dba", Count: 3}, {Group: "sre", Count: 1}}
	x.ad.Rule.Passkey = true
	ok(t, w.send(x)) // stricter than the catalogue, as a policy may demand
	low := w.asking("app:read")
	low.requested.Decision.Outcome = store.Allow
	low.requested.SetDetails(low.rd)
	ok(t, w.append(broker, low.requested))
}

func TestNoWriterPutsADecisionOnRecord(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	d := approve("ok")
	for _, typ := range []store.Type{store.ApprovalDecided, store.ApprovalStanding, store.ApprovalExpired, store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked} {
		s := w.a.decision(alice, w.get(id), []string{"dba"}, &d)
		s.Type = typ
		wants(t, w.append(broker, s), store.OrderForbidden)
	}
	if r := w.get(id); len(r.Decisions) != 0 {
		t.Fatalf("%v", r.Decisions)
	}
}

func TestTheStateIsRebuiltFromTheLedger(t *testing.T) {
	w := newWorld(t)
	pending, half, approved, denied, withdrawn := w.ask("app:write"), w.ask("app:admin"), w.ask("app:write"), w.ask("app:write"), w.ask("app:write")
	for id, d := range map[string]Decision{half: approve("1"), approved: approve("2"), denied: {Decision: store.Refuse, Reason: "3", Via: viaToken}} {
		_, err := w.a.Decide(t.Context(), alice, id, d)
		ok(t, err)
	}
	r := w.get(withdrawn)
	s := w.a.about(store.RequestWithdrawn, r.Scope, r)
	s.SetDetails(struct{}{})
	ok(t, w.append(broker, s))
	show := func() (out []string) {
		for _, state := range []string{StatePending, StateMine, StateDecided, StateAll} {
			list, more, err := w.a.List(t.Context(), Filter{State: state, Person: &alice})
			ok(t, err)
			line := state + more
			for _, r := range list {
				line += fmt.Sprintf(" %s:%s:%d", r.ID, r.Status, len(r.Decisions))
			}
			out = append(out, line)
		}
		return out
	}
	want := []string{
		fmt.Sprintf("pending %s:pending_approval:1 %s:pending_approval:0", half, pending),
		fmt.Sprintf("mine %s:pending_approval:0", pending),
		fmt.Sprintf("decided %s:withdrawn:0 %s:denied:1 %s:approved:1", withdrawn, denied, approved),
		fmt.Sprintf("all %s:withdrawn:0 %s:denied:1 %s:approved:1 %s:pending_approval:1 %s:pending_approval:0", withdrawn, denied, approved, half, pending),
	}
	w.stop()
	w.start()
	if got := show(); !slices.Equal(got, want) {
		t.Fatalf("after a restart:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	_, err := w.a.Decide(t.Context(), bob, half, approve("second"))
	ok(t, err)
	if r := w.get(half); r.Status != store.StatusApproved {
		t.Fatal(r.Status)
	}
}

func TestARequestShowsAllThatIsOnRecord(t *testing.T) {
	w := newWorld(t)
	x := w.asking("app:write").subject("user:u-1")
	ok(t, w.send(x))
	r := w.get(x.ad.Approval)
	if r.Request != x.asked.Request || r.Orchestrator != "demo" || r.Run != "run-1" || r.Step != x.asked.Step || r.Scope != "app:write" ||
		r.Target != "app://a" || r.Agent != x.asked.Agent || r.Sensitivity != "sensitive" || r.Grant.Digest() != x.ad.Grant.Digest() ||
		r.Policy != w.set.Digest() || r.PolicyReasons[0] != "needs approval" || r.Subject != "user:u-1" || r.SubjectProved ||
		r.Reason != "OPS-"+r.Request || !r.Asked.Equal(w.clock()) || !r.Expires.Equal(w.clock().Add(10*time.Minute)) ||
		r.URL != "http://localhost:8788/approvals/"+r.ID || r.Index != 1 {
		t.Fatalf("%+v", r)
	}
	page, err := w.ledger.History(t.Context(), ledger.Query{Type: string(store.ApprovalRequested)})
	ok(t, err)
	if r.LeafHash != store.HashText(store.LeafHash(page.Entries[0].Entry)) {
		t.Fatal("another leaf hash")
	}
	before, err := w.a.Before(t.Context(), r)
	ok(t, err)
	if before.Run.Requested != 0 {
		t.Fatalf("%+v", before)
	}
	_, err = w.a.Decide(t.Context(), alice, r.ID, approve("ok"))
	ok(t, err)
	w.advance(time.Second)
	later := w.get(w.ask("app:write"))
	before, err = w.a.Before(t.Context(), later)
	ok(t, err)
	if before.Run.Requested != 1 || before.Run.Approved != 1 || before.Orchestrator.Approved != 1 || before.Orchestrator.Requested != 1 {
		t.Fatalf("%+v", before)
	}
}

func TestWhatHappensIsToldAndWhoFallsBehindIsToldSo(t *testing.T) {
	w := newWorld(t)
	events, end := w.a.Subscribe()
	slow, stop := w.a.Subscribe()
	defer stop()
	id := w.ask("app:admin")
	if e := next(t, events, EventRequested); e.Approval != id || e.Request.Status != store.StatusPending {
		t.Fatalf("%+v", e)
	}
	_, err := w.a.Decide(t.Context(), alice, id, approve("1"))
	ok(t, err)
	if e := next(t, events, EventDecided); e.Request.Needs[0].Approved != 1 {
		t.Fatalf("%+v", e.Request)
	}
	_, err = w.a.Decide(t.Context(), bob, id, approve("2"))
	ok(t, err)
	r := next(t, events, EventApproved).Request
	intent := w.issuing(r)
	ok(t, w.append(broker, intent))
	s := w.a.about(store.CredentialIssued, r.Scope, r)
	s.SetDetails(store.IssuedDetails{Intent: intent.ID, Attempt: 1, Kind: "vault_token", Revocable: true, Accessor: "acc", Expires: store.At(w.clock().Add(time.Minute))})
	ok(t, w.append(broker, s))
	if e := next(t, events, EventIssued); e.Request.Status != store.StatusIssued {
		t.Fatalf("%+v", e.Request)
	}
	end()
	for range 2 * subscriberBuffer {
		w.a.tell(Event{Kind: EventVoid})
	}
	var last Event
	n := len(slow)
	for range n {
		last = <-slow
	}
	if n != subscriberBuffer || last.Kind != EventResync {
		t.Fatalf("%d events, the last %s", n, last.Kind)
	}
	w.a.tell(Event{Kind: EventVoid})
	if e := <-slow; e.Kind != EventVoid {
		t.Fatal("nothing comes after a resync")
	}
}

func TestALedgerThatDoesNotAnswerIsSaidSo(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	w.ledger.Close()
	_, err := w.a.Decide(t.Context(), alice, id, approve("ok"))
	isErr(t, err, store.ErrUnavailable)
}

func TestExpiryWaitsForALedgerThatDoesNotAnswer(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:write")
	w.a.Close() // its clock is driven by hand here
	w.advance(time.Hour)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	isErr(t, w.a.expire(gone), store.ErrUnavailable)
	if s := w.get(id).Status; s != store.StatusPending {
		t.Fatal(s)
	}
	ok(t, w.a.expire(t.Context()))
	if s := w.get(id).Status; s != store.StatusExpired {
		t.Fatal(s)
	}
}

func TestPagesOfAListHaveEachRequestOnceAndAllExpireTogether(t *testing.T) {
	w := newWorld(t)
	const n = 2*expireAtOnce + 50
	var batch []*store.Submission
	for range n {
		x := w.asking("app:write")
		x.requested.SetDetails(x.rd)
		x.asked.SetDetails(x.ad)
		batch = append(batch, x.requested, x.asked)
	}
	ok(t, w.append(broker, batch...))
	w.a.Close()
	w.people()
	seen := map[string]bool{}
	f := Filter{State: StatePending, Limit: 60}
	for {
		list, more, err := w.a.List(t.Context(), f)
		ok(t, err)
		for _, r := range list {
			if seen[r.ID] {
				t.Fatalf("%s stands on two pages", r.ID)
			}
			seen[r.ID] = true
		}
		if f.Before = more; more == "" {
			break
		}
	}
	if len(seen) != n {
		t.Fatalf("the pages have %d of %d", len(seen), n)
	}
	w.a.Close() // what it holds of the state stands still
	denied := "apr_req_1"
	w2, err := New(t.Context(), w.a.c)
	ok(t, err)
	_, err = w2.Decide(t.Context(), alice, denied, Decision{Decision: store.Refuse, Reason: "no", Via: viaPage})
	ok(t, err)
	w2.Close()
	w.advance(time.Hour)
	ok(t, w.a.expire(t.Context())) // one of the first batch was denied meanwhile
	page, err := w.ledger.History(t.Context(), ledger.Query{Type: string(store.ApprovalExpired)})
	ok(t, err)
	if len(page.Entries) != n-1 || w.get(denied).Status != store.StatusDenied {
		t.Fatalf("%d of %d expired", len(page.Entries), n-1)
	}
	for _, f := range []Filter{{State: "none"}, {State: StateMine}, {Before: "x"}, {Limit: -1}} {
		_, _, err := w.a.List(t.Context(), f)
		isErr(t, err, ErrMalformed)
	}
}
