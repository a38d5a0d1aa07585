package store

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestTallySeatsAsManyAsCanBeSeatedAndEachPersonOnce(t *testing.T) {
	names := []string{"a", "b", "c", "d"}
	rapid.Check(t, func(t *rapid.T) {
		var rule Rule
		for _, g := range names[:rapid.IntRange(1, 3).Draw(t, "groups")] {
			rule.Groups = append(rule.Groups, RuleGroup{g, rapid.IntRange(1, 3).Draw(t, "count of "+g)})
		}
		votes := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Vote {
			var groups []string
			for _, g := range names {
				if rapid.Bool().Draw(t, "in "+g) {
					groups = append(groups, g)
				}
			}
			return Vote{Person: rapid.SampledFrom([]string{"p", "q", "r", "s", "t"}).Draw(t, "person"), Groups: groups}
		}), 0, 6).Draw(t, "votes")
		filled, met := rule.Tally(votes)
		if len(filled) != len(rule.Groups) {
			t.Fatalf("%d groups filled of %d", len(filled), len(rule.Groups))
		}
		sum, seats := 0, 0
		for i, g := range rule.Groups {
			if filled[i] < 0 || filled[i] > g.Count {
				t.Fatalf("group %s: %d of %d", g.Group, filled[i], g.Count)
			}
			sum, seats = sum+filled[i], seats+g.Count
		}
		if want := most(&rule, votes, map[string]bool{}, make([]int, len(rule.Groups))); sum != want {
			t.Fatalf("%d are seated, %d can be", sum, want)
		}
		if met != (sum == seats) {
			t.Fatalf("met is %v with %d of %d", met, sum, seats)
		}
	})
}

// most tries all ways to seat votes and returns the most that sit.
func most(rule *Rule, votes []Vote, sitting map[string]bool, filled []int) int {
	if len(votes) == 0 {
		sum := 0
		for _, n := range filled {
			sum += n
		}
		return sum
	}
	v, rest := votes[0], votes[1:]
	best := most(rule, rest, sitting, filled) // v stands
	if sitting[v.Person] {
		return best
	}
	sitting[v.Person] = true
	for i, g := range rule.Groups {
		if filled[i] < g.Count && slices.Contains(v.Groups, g.Group) {
			filled[i]++
			best = max(best, most(rule, rest, sitting, filled))
			filled[i]--
		}
	}
	delete(sitting, v.Person)
	return best
}

func aRule() Rule {
	return Rule{Groups: []RuleGroup{{"dba", 2}}, Expires: Duration(time.Hour), Collect: Duration(10 * time.Minute),
		Hours: &Hours{From: "08:00", To: "18:00", Zone: "UTC"}, Reasons: RuleReasons{true, true}, Passkey: true,
		Standing: &StandingLimit{Uses: 5, For: Duration(time.Hour)}}
}

func TestARuleCoversWhatItIsAtLeastAsStrictAs(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *Rule)
		covers bool
	}{
		"the same":               {func(*Rule) {}, true},
		"more people":            {func(r *Rule) { r.Groups[0].Count = 3 }, true},
		"one more group":         {func(r *Rule) { r.Groups = append(r.Groups, RuleGroup{"sre", 1}) }, true},
		"shorter":                {func(r *Rule) { r.Expires, r.Collect = 1, 1 }, true},
		"nothing for the run":    {func(r *Rule) { r.Standing = nil }, true},
		"fewer uses":             {func(r *Rule) { r.Standing = &StandingLimit{4, Duration(time.Minute)} }, true},
		"fewer people":           {func(r *Rule) { r.Groups[0].Count = 1 }, false},
		"another group":          {func(r *Rule) { r.Groups[0].Group = "interns" }, false},
		"no group":               {func(r *Rule) { r.Groups = nil }, false},
		"waits longer":           {func(r *Rule) { r.Expires++ }, false},
		"collected later":        {func(r *Rule) { r.Collect++ }, false},
		"at any hour":            {func(r *Rule) { r.Hours = nil }, false},
		"at other hours":         {func(r *Rule) { r.Hours = &Hours{From: "00:00", To: "23:59", Zone: "UTC"} }, false},
		"on other days":          {func(r *Rule) { r.Hours = &Hours{From: "08:00", To: "18:00", Zone: "UTC", Days: []time.Weekday{0}} }, false},
		"no requester's reason":  {func(r *Rule) { r.Reasons.Requester = false }, false},
		"no approver's reason":   {func(r *Rule) { r.Reasons.Approver = false }, false},
		"no passkey":             {func(r *Rule) { r.Passkey = false }, false},
		"in Slack":               {func(r *Rule) { r.Slack = true }, false},
		"more uses for the run":  {func(r *Rule) { r.Standing = &StandingLimit{6, Duration(time.Hour)} }, false},
		"longer for the run":     {func(r *Rule) { r.Standing = &StandingLimit{5, Duration(2 * time.Hour)} }, false},
		"fewer, in more groups":  {func(r *Rule) { r.Groups = []RuleGroup{{"dba", 1}, {"sre", 5}} }, false},
		"the group, twice split": {func(r *Rule) { r.Groups = []RuleGroup{{"dba", 1}, {"dba", 1}} }, false},
	} {
		least, r := aRule(), aRule()
		c.change(&r)
		if got := r.Covers(&least); got != c.covers {
			t.Errorf("%s: covers is %v", name, got)
		}
	}
	least, r := aRule(), aRule()
	least.Standing = nil
	if r.Covers(&least) {
		t.Error("an approval for the run that the catalogue does not give is covered")
	}
}

func TestTheSumOfTwoRulesAsksForAllThatBothAskFor(t *testing.T) {
	r := aRule()
	o := &Rule{Groups: []RuleGroup{{"dba", 1}, {"sre", 2}}, Expires: Duration(time.Minute), Collect: Duration(time.Hour), Slack: true}
	for _, sum := range []*Rule{r.And(o), o.And(&r)} {
		slices.SortFunc(sum.Groups, func(a, b RuleGroup) int { return strings.Compare(a.Group, b.Group) })
		if !slices.Equal(sum.Groups, []RuleGroup{{"dba", 2}, {"sre", 2}}) || sum.Expires != Duration(time.Minute) ||
			sum.Collect != Duration(10*time.Minute) || sum.Hours == nil || sum.Reasons != (RuleReasons{true, true}) || !sum.Passkey || sum.Slack || sum.Standing != nil {
			t.Errorf("%+v", sum)
		}
	}
	if len(r.Groups) != 1 || len(o.Groups) != 2 || o.Groups[0].Count != 1 {
		t.Error("the rules themselves have changed")
	}
	var none *Rule
	if none.And(o) != o || o.And(none) != o || none.And(nil) != nil {
		t.Error("the sum with nothing is another rule")
	}
}

func TestHoursOverMidnightBelongToTheDayOnWhichTheyBegin(t *testing.T) {
	night := &Hours{From: "22:00", To: "06:00", Zone: "UTC"}
	mondays := &Hours{From: "22:00", To: "06:00", Zone: "UTC", Days: []time.Weekday{time.Monday}}
	day := &Hours{From: "08:00", To: "18:00", Zone: "Europe/Berlin", Days: []time.Weekday{time.Monday, time.Friday}}
	for _, c := range []struct {
		h    *Hours
		at   string
		want bool
	}{
		{night, "2026-11-23T21:59:59Z", false},
		{night, "2026-11-23T22:00:00Z", true},
		{night, "2026-11-23T23:59:59Z", true},
		{night, "2026-11-24T00:00:00Z", true},
		{night, "2026-11-24T05:59:59Z", true},
		{night, "2026-11-24T06:00:00Z", false},
		{mondays, "2026-11-23T23:00:00Z", true},
		{mondays, "2026-11-24T05:00:00Z", true},  // Tuesday, in Monday's window
		{mondays, "2026-11-23T05:00:00Z", false}, // Monday, in Sunday's window
		{mondays, "2026-11-24T23:00:00Z", false},
		{day, "2026-11-23T07:00:00Z", true}, // winter: UTC+1
		{day, "2026-11-23T17:00:00Z", false},
		{day, "2026-07-20T06:00:00Z", true}, // summer: UTC+2
		{day, "2026-07-20T16:00:00Z", false},
		{day, "2026-11-24T10:00:00Z", false}, // a Tuesday
		{day, "2026-11-27T10:00:00Z", true},
		{&Hours{From: "08:00", To: "08:00", Zone: "UTC"}, "2026-11-23T08:00:00Z", false},
		{&Hours{From: "08:00", To: "18:00", Zone: "Mars/Olympus"}, "2026-11-23T10:00:00Z", false},
		{&Hours{From: "08:00", To: "18:00", Zone: "Local"}, "2026-11-23T10:00:00Z", false},
		{&Hours{From: "8", To: "18:00", Zone: "UTC"}, "2026-11-23T10:00:00Z", false},
	} {
		at, err := time.Parse(time.RFC3339, c.at)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.h.Contains(at); got != c.want {
			t.Errorf("%s at %s: %v", c.h, c.at, got)
		}
	}
}

func TestWhoMayDecideIsJudgedInOneOrder(t *testing.T) {
	now := At(time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC))
	for name, c := range map[string]struct {
		change           func(r *Request)
		decision, person string
		groups           []string
		reason, passkey  bool
		want             OrderCode // empty: may
	}{
		"a member":                         {nil, Approve, "p-a", []string{"dba"}, true, true, ""},
		"a denial, unsigned":               {nil, Refuse, "p-a", []string{"dba"}, true, false, ""},
		"the subject":                      {nil, Approve, "p-subject", []string{"dba"}, true, true, OrderSelf},
		"the subject, denying":             {nil, Refuse, "p-subject", []string{"dba"}, true, true, OrderSelf},
		"a stranger":                       {nil, Approve, "p-a", []string{"sre"}, true, true, OrderApprover},
		"a stranger, denying":              {nil, Refuse, "p-a", nil, true, true, OrderApprover},
		"no reason":                        {nil, Approve, "p-a", []string{"dba"}, false, true, OrderReason},
		"no reason, denying":               {nil, Refuse, "p-a", []string{"dba"}, false, true, OrderReason},
		"not signed":                       {nil, Approve, "p-a", []string{"dba"}, true, false, OrderPasskey},
		"twice":                            {nil, Approve, "p-done", []string{"dba"}, true, true, OrderDecided},
		"approved, then denying":           {nil, Refuse, "p-done", []string{"dba"}, true, true, ""},
		"after the hours":                  {func(r *Request) { r.Pending.Rule.Hours.To = "12:00" }, Approve, "p-a", []string{"dba"}, true, true, OrderHours},
		"after the hours, denying":         {func(r *Request) { r.Pending.Rule.Hours.To = "12:00" }, Refuse, "p-a", []string{"dba"}, true, true, ""},
		"expired, not on record as such":   {func(r *Request) { r.Pending.Expires = now }, Approve, "p-a", []string{"dba"}, true, true, OrderNotOpen},
		"expired, denying":                 {func(r *Request) { r.Pending.Expires = now }, Refuse, "p-a", []string{"dba"}, true, true, OrderNotOpen},
		"approved":                         {func(r *Request) { r.Status = StatusApproved }, Approve, "p-a", []string{"dba"}, true, true, OrderNotOpen},
		"denied":                           {func(r *Request) { r.Status = StatusDenied }, Refuse, "p-a", []string{"dba"}, true, true, OrderNotOpen},
		"nobody was asked":                 {func(r *Request) { r.Pending = nil }, Approve, "p-a", []string{"dba"}, true, true, OrderNotOpen},
		"the subject, when all is over":    {func(r *Request) { r.Status = StatusDenied }, Approve, "p-subject", nil, false, false, OrderNotOpen},
		"the subject, of no group as well": {nil, Approve, "p-subject", nil, false, false, OrderSelf},
	} {
		r := &Request{ID: "req_1", Status: StatusPending, Pending: &Pending{Rule: aRule(), Excluded: []string{"p-owner", "p-subject"},
			Expires: At(now.Add(time.Hour)), Votes: []Vote{{Person: "p-done", Groups: []string{"dba"}}}}}
		if c.change != nil {
			c.change(r)
		}
		err := r.May(c.decision, c.person, c.groups, c.reason, c.passkey, now)
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if _, ok := IsOrder(err, c.want); !ok {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

func TestNoRequestTakesMoreApprovalsThanAWarrantHolds(t *testing.T) {
	rule := Rule{Groups: []RuleGroup{{Group: "dba", Count: 1}, {Group: "risk", Count: 1}}, Expires: Duration(time.Hour), Collect: Duration(time.Minute)}
	now := At(time.Date(2026, 7, 1, 8, 0, 0, 0, time.UTC))
	r := &Request{ID: "req_1", Status: StatusPending, Pending: &Pending{Rule: rule, Expires: At(now.Add(time.Hour))}}
	for i := range maxVotes {
		person := fmt.Sprint("p-", i)
		if err := r.May(Approve, person, []string{"dba"}, false, false, now); err != nil {
			t.Fatalf("approval %d: %v", i+1, err)
		}
		r.Pending.Votes = append(r.Pending.Votes, Vote{Person: person, Groups: []string{"dba"}, Time: now})
	}
	if _, refused := IsOrder(r.May(Approve, "p-more", []string{"dba"}, false, false, now), OrderDecided); !refused {
		t.Error("one more was taken")
	}
	if err := r.May(Refuse, "p-more", []string{"dba"}, false, false, now); err != nil {
		t.Errorf("nobody may deny any more: %v", err)
	}
}
