package store

import (
	"testing"
	"time"
)

func TestAStandingApprovalStandsByVotesThatStillStandAndWereGivenInTheHours(t *testing.T) {
	p := newPlay(t)
	p.now = time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC) // 03:00
	rule := Rule{Groups: []RuleGroup{{"a", 1}, {"b", 1}}, Expires: Duration(time.Hour), Collect: Duration(time.Hour), Standing: &StandingLimit{Uses: 5, For: Duration(3 * time.Hour)}}
	rq := entryOf(StepRequested, "r1", RequestedDetails{Grant: testGrant, Join: "j1", Body: "b"})
	rq.Decision = &Decision{Outcome: NeedsApproval, Reasons: []string{}}
	rq.Run = "run"
	as := entryOf(ApprovalRequested, "r1", ApprovalRequestedDetails{Approval: "apr_1", Grant: testGrant, Rule: rule, Excluded: []string{}})
	as.Run = "run"
	p.ok(rq, as)
	vote := func(who string, g string, uses int, d time.Duration) {
		e := entryOf(ApprovalStanding, "r1", DecidedDetails{Approval: "apr_1", Requested: p.s.Request("r1").Pending.Requested, Decision: Approve, Groups: []string{g}, Via: "page", Standing: &StandingTerms{Scopes: []string{testGrant.Scope}, Uses: uses, Until: At(p.now.Add(d))}})
		e.Run, e.Person = "run", &who
		if err := p.as("recorder", e); err != nil {
			t.Fatal(err)
		}
	}
	vote("ann", "a", 1, 10*time.Minute)
	vote("cyn", "a", 5, 2*time.Hour)
	vote("bob", "b", 5, 2*time.Hour)
	p.now = p.now.Add(30 * time.Minute) // ann's is over
	use := StandingUse{Request: "r1", Excluded: []string{}, Rule: Rule{Groups: []RuleGroup{{"a", 2}}, Hours: &Hours{From: "08:00", To: "18:00", Zone: "UTC"}, Expires: Duration(time.Hour), Collect: Duration(time.Hour), Standing: &StandingLimit{Uses: 5, For: Duration(3 * time.Hour)}}}
	dr := entryOf(StepRequested, "r2", RequestedDetails{Grant: testGrant, Join: "j2", Body: "b", Standing: &use})
	dr.Decision = rq.Decision
	dr.Run = "run"
	if err := p.as("broker-1", dr); err == nil {
		t.Error("2 of a, hours 08-18: drawn at 03:30 with one vote of a over")
	}
}
