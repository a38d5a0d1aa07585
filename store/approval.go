package store

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
	_ "time/tzdata" // zones of approval hours, on machines without a zone database

	"golang.org/x/mod/sumdb/tlog"
)

// Rule says which people must approve a request, and how. It stands in
// approval.requested, so that whoever reads the record judges by the rule that
// was in force then.
type Rule struct {
	Groups   []RuleGroup    `json:"groups"`
	Expires  Duration       `json:"expires"`           // how long the request waits for people
	Collect  Duration       `json:"collect"`           // how long an approval waits to be used
	Hours    *Hours         `json:"hours,omitzero"`    // nil: at any time
	Reasons  RuleReasons    `json:"reasons"`           //
	Passkey  bool           `json:"passkey"`           // an approval must be signed with a passkey
	Slack    bool           `json:"slack"`             // it may be decided in Slack
	Standing *StandingLimit `json:"standing,omitzero"` // nil: no approval covers a whole run
}

// RuleGroup is how many people of a group must approve.
type RuleGroup struct {
	Group string `json:"group"`
	Count int    `json:"count"`
}

// RuleReasons says who owes a reason.
type RuleReasons struct {
	Requester bool `json:"requester"`
	Approver  bool `json:"approver"`
}

// StandingLimit bounds an approval for a whole run.
type StandingLimit struct {
	Uses int      `json:"uses"`
	For  Duration `json:"for"`
}

// Hours are when a scope may be approved. A window that ends before it begins
// runs over midnight, and belongs to the day on which it begins.
type Hours struct {
	From string         `json:"from"`          // "08:00"
	To   string         `json:"to"`            // "18:00"
	Days []time.Weekday `json:"days,omitzero"` // empty: every day
	Zone string         `json:"zone"`          // IANA name
}

// Contains reports whether t lies within h. An unknown zone or clock contains
// nothing.
func (h *Hours) Contains(t time.Time) bool {
	zone, err := time.LoadLocation(h.Zone)
	if err != nil || h.Zone == "Local" {
		return false
	}
	from, err1 := time.Parse("15:04", h.From)
	to, err2 := time.Parse("15:04", h.To)
	if err1 != nil || err2 != nil {
		return false
	}
	t = t.In(zone)
	minute := func(t time.Time) int { return 60*t.Hour() + t.Minute() }
	now, begin, end, day := minute(t), minute(from), minute(to), t.Weekday()
	switch {
	case begin < end && (now < begin || now >= end), begin > end && now >= end && now < begin, begin == end:
		return false
	case begin > end && now < end:
		day = (day + 6) % 7 // after midnight: the window began yesterday
	}
	return len(h.Days) == 0 || slices.Contains(h.Days, day)
}

func (h *Hours) String() string {
	s := h.From + "-" + h.To + " " + h.Zone
	for i, d := range h.Days {
		sep := ", "
		if i == 0 {
			sep = " on "
		}
		s += sep + d.String()[:3]
	}
	return s
}

// Limits of a rule, for whoever reads one that it did not write.
const (
	maxRuleGroups = 10
	maxRuleCount  = 20
	maxRuleLife   = Duration(7 * 24 * time.Hour)
	maxVotes      = maxRuleGroups * maxRuleCount // on one request: each costs a look at all
)

// Valid says what is wrong with r, or nil.
func (r *Rule) Valid() error {
	switch {
	case len(r.Groups) == 0 || len(r.Groups) > maxRuleGroups:
		return fmt.Errorf("a rule has 1 to %d groups", maxRuleGroups)
	case r.Expires <= 0 || r.Expires > maxRuleLife || r.Collect <= 0 || r.Collect > maxRuleLife:
		return errors.New("a rule without expiry")
	case r.Standing != nil && (r.Standing.Uses < 1 || r.Standing.For <= 0 || r.Standing.For > maxRuleLife):
		return errors.New("a standing approval without limits")
	}
	seen := map[string]bool{}
	for _, g := range r.Groups {
		if !ValidID(g.Group) || g.Count < 1 || g.Count > maxRuleCount || seen[g.Group] {
			return fmt.Errorf("group %q: a name once, and 1 to %d people", g.Group, maxRuleCount)
		}
		seen[g.Group] = true
	}
	return nil
}

// Covers reports whether r asks for at least all that least asks for: what a
// writer demands may be stricter than the catalogue, never weaker.
func (r *Rule) Covers(least *Rule) bool {
	for _, g := range least.Groups {
		if !slices.ContainsFunc(r.Groups, func(x RuleGroup) bool { return x.Group == g.Group && x.Count >= g.Count }) {
			return false
		}
	}
	sameHours := r.Hours != nil && least.Hours != nil && r.Hours.String() == least.Hours.String()
	switch {
	case r.Expires > least.Expires, r.Collect > least.Collect,
		least.Hours != nil && !sameHours,
		least.Reasons.Requester && !r.Reasons.Requester, least.Reasons.Approver && !r.Reasons.Approver,
		least.Passkey && !r.Passkey, r.Slack && !least.Slack:
		return false
	case r.Standing != nil:
		return least.Standing != nil && r.Standing.Uses <= least.Standing.Uses && r.Standing.For <= least.Standing.For
	}
	return true
}

// And returns the rule that asks for all that r and o ask for.
func (r *Rule) And(o *Rule) *Rule {
	if r == nil || o == nil {
		if r == nil {
			return o
		}
		return r
	}
	sum := *r
	sum.Groups = slices.Clone(r.Groups)
	for _, g := range o.Groups {
		if i := slices.IndexFunc(sum.Groups, func(x RuleGroup) bool { return x.Group == g.Group }); i >= 0 {
			sum.Groups[i].Count = max(sum.Groups[i].Count, g.Count)
		} else {
			sum.Groups = append(sum.Groups, g)
		}
	}
	sum.Expires, sum.Collect = min(r.Expires, o.Expires), min(r.Collect, o.Collect)
	if sum.Hours == nil {
		sum.Hours = o.Hours
	} else if o.Hours != nil && o.Hours.String() != r.Hours.String() {
		sum.Hours = &Hours{} // no instant lies in both for sure: none is taken
	}
	sum.Reasons.Requester = r.Reasons.Requester || o.Reasons.Requester
	sum.Reasons.Approver = r.Reasons.Approver || o.Reasons.Approver
	sum.Passkey, sum.Slack = r.Passkey || o.Passkey, r.Slack && o.Slack
	if r.Standing != nil && o.Standing != nil {
		sum.Standing = &StandingLimit{min(r.Standing.Uses, o.Standing.Uses), min(r.Standing.For, o.Standing.For)}
	} else {
		sum.Standing = nil
	}
	return &sum
}

// Has reports whether one of groups is in the rule.
func (r *Rule) Has(groups []string) bool {
	return slices.ContainsFunc(r.Groups, func(g RuleGroup) bool { return slices.Contains(groups, g.Group) })
}

// Vote is one person's approval.
type Vote struct {
	Person   string         `json:"person"` // pseudonym
	Groups   []string       `json:"groups"` // as the login said when the person decided
	Time     Time           `json:"time"`   // of the decision's entry
	Index    int64          `json:"index"`  // of the decision's entry
	Standing *StandingTerms `json:"standing,omitzero"`
}

// Tally seats people: each person fills one seat of one group, however many
// groups the person is in, and in the way that fills most. filled has an item
// per group of the rule; met says that no seat is empty.
func (r *Rule) Tally(votes []Vote) (filled []int, met bool) {
	filled = make([]int, len(r.Groups))
	var people []Vote // each person once, in all groups of their votes
	at := map[string]int{}
	for _, v := range votes {
		if i, ok := at[v.Person]; ok {
			people[i].Groups = slices.Concat(people[i].Groups, v.Groups)
			continue
		}
		at[v.Person] = len(people)
		people = append(people, v)
	}
	var seats []int // by seat, the index of its group
	for g, x := range r.Groups {
		for range x.Count {
			seats = append(seats, g)
		}
	}
	sitting := make([]int, len(seats)) // by seat, the index of its vote plus one
	var seat func(vote int, tried []bool) bool
	seat = func(vote int, tried []bool) bool {
		for s, g := range seats {
			if tried[s] || !slices.Contains(people[vote].Groups, r.Groups[g].Group) {
				continue
			}
			tried[s] = true
			if sitting[s] == 0 || seat(sitting[s]-1, tried) {
				sitting[s] = vote + 1
				return true
			}
		}
		return false
	}
	for v := range people {
		seat(v, make([]bool, len(seats)))
	}
	met = true
	for s, v := range sitting {
		if v == 0 {
			met = false
		} else {
			filled[seats[s]]++
		}
	}
	return filled, met
}

// StandingTerms are the limits of an approval for a whole run.
type StandingTerms struct {
	Scopes []string `json:"scopes"`
	Uses   int      `json:"uses"`
	Until  Time     `json:"until"`
}

// The decisions that a person can take.
const (
	Approve = "approve"
	Refuse  = "deny"
)

// ApprovalRequestedDetails are the details of approval.requested: all that
// people are shown and sign, beside the entry's own members. Reason and
// subject are sealed, and signed through their commitments.
type ApprovalRequestedDetails struct {
	Approval string `json:"approval"` // "apr_…"
	Grant    Grant  `json:"grant"`
	Rule     Rule   `json:"rule"`
	// Excluded are pseudonyms of the requester's own side: the orchestrator's
	// owners. The subject is excluded by the entry's own Subject.
	Excluded []string `json:"excluded"`
	// OneCall says that the gateway asked, for one call of a step's that the reason
	// tells: what is minted ends with that call. No orchestrator can ask so.
	OneCall bool `json:"one_call,omitzero"`
}

// DecidedDetails are the details of approval.decided and of approval.standing,
// which the recorder alone writes. The entry's Person decided; the reason is
// sealed.
type DecidedDetails struct {
	Approval  string         `json:"approval"`
	Requested string         `json:"requested"` // leaf hash of approval.requested, base64
	Decision  string         `json:"decision"`  // Approve or Refuse
	Groups    []string       `json:"groups"`    // of the person, as the login said
	Via       string         `json:"via"`       // page, token or slack
	Standing  *StandingTerms `json:"standing,omitzero"`
	Assertion *Assertion     `json:"assertion,omitzero"` // the passkey's signature
}

// ExpiredDetails are the details of approval.expired.
type ExpiredDetails struct {
	Approval string `json:"approval"`
	Approved bool   `json:"approved"` // people had approved, and nobody collected
}

// StandingUse is how a request draws on an approval for its whole run.
type StandingUse struct {
	Request  string   `json:"request"` // whose decisions carry the terms
	Rule     Rule     `json:"rule"`    // that this request falls under
	Excluded []string `json:"excluded"`
}

// HashText is how a leaf hash is written in entries: base64.
func HashText(h tlog.Hash) string { return base64.StdEncoding.EncodeToString(h[:]) }

// ApprovalDigest is what a person signs by deciding: a SHA-256 over what the
// decision is, who takes it, in which log, and the leaf hash of
// approval.requested, which holds all that will be granted. reason is the
// commitment under which the reason is sealed, empty where none is given, so
// that the signature can be checked when the reason itself is erased. Parts are
// length-prefixed, so that no two lists of parts give one digest.
func ApprovalDigest(origin, requested, decision, person, reason string, terms *StandingTerms) [sha256.Size]byte {
	parts := []string{"countersign/approval/v1", origin, requested, decision, person, reason}
	if terms != nil {
		parts = append(parts, "standing", fmt.Sprint(terms.Uses), terms.Until.String())
		parts = append(parts, terms.Scopes...)
	}
	return lengthPrefixed(parts...)
}

func lengthPrefixed(parts ...string) [sha256.Size]byte {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// DecisionDigest is ApprovalDigest of a decision on record.
func DecisionDigest(origin string, e *Entry, d *DecidedDetails) [sha256.Size]byte {
	person := ""
	if e.Person != nil {
		person = *e.Person
	}
	return ApprovalDigest(origin, d.Requested, d.Decision, person, e.Sealed[SealedReason], d.Standing)
}

// IsDecision reports whether t is a person's decision.
func (t Type) IsDecision() bool { return t == ApprovalDecided || t == ApprovalStanding }
