package approve

import (
	"fmt"
	"html/template"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// text is s for a page, whole. Characters that a reader would not see, or that
// turn the direction of reading, are written as their code points: they are how
// a text says something else to a person than to a machine (CVE-2021-42574).
// The two joiners stay, since Persian, Indic scripts and emoji need them.
func text(s string) template.HTML {
	s = strings.ReplaceAll(s, "\r\n", "\n")
	var b strings.Builder
	plain := 0
	for i, r := range s {
		if !unseen(r) && r != unicode.ReplacementChar {
			continue
		}
		if r == unicode.ReplacementChar && strings.HasPrefix(s[i:], "\ufffd") {
			continue // it is there itself, and stands for no broken byte
		}
		template.HTMLEscape(&b, []byte(s[plain:i]))
		size := len(string(r))
		if r == unicode.ReplacementChar { // a byte that is no UTF-8
			fmt.Fprintf(&b, `<span class="unseen">byte %02X</span>`, s[i])
			size = 1
		} else {
			fmt.Fprintf(&b, `<span class="unseen">U+%04X</span>`, r)
		}
		plain = i + size
	}
	template.HTMLEscape(&b, []byte(s[plain:]))
	return template.HTML(b.String()) // escaped above, piece by piece
}

func unseen(r rune) bool {
	switch r {
	case '\n', '\t', '\u200c', '\u200d':
		return false
	case '\u115f', '\u1160', '\u3164', '\uffa0', '\u2800': // letters that are drawn as nothing
		return true
	}
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co, unicode.Noncharacter_Code_Point)
}

// stamp is t for machines.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// clock is t for people, in UTC: a page is read by people in several places.
func clock(t time.Time) template.HTML {
	t = t.UTC()
	return template.HTML(`<time datetime="` + stamp(t) + `">` + t.Format("2 Jan 2006, 15:04:05 UTC") + `</time>`)
}

// soon is when little time is left.
const soon = 2 * time.Minute

// remaining is the time left until end. The script lets it go on.
func remaining(end, now time.Time) template.HTML {
	class := "left"
	if end.Sub(now) < soon {
		class += " soon"
	}
	return template.HTML(`<time class="` + class + `" data-left datetime="` + end.UTC().Format(time.RFC3339Nano) + `">` + left(end.Sub(now)) + `</time>`)
}

// left says how much time is left, as the script does.
func left(d time.Duration) string {
	s := int(d / time.Second)
	days, h, m := s/86400, s/3600%24, s/60%60
	switch s %= 60; {
	case d < time.Second:
		return "time is over"
	case days > 0:
		return fmt.Sprintf("%d d %d h left", days, h)
	case h > 0:
		return fmt.Sprintf("%d h %d min left", h, m)
	case m > 9:
		return fmt.Sprintf("%d min left", m)
	case m > 0:
		return fmt.Sprintf("%d min %d s left", m, s)
	}
	return fmt.Sprintf("%d s left", s)
}

// span is a duration in words.
func span(d store.Duration) string {
	left := time.Duration(d)
	var parts []string
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}} {
		if n := left / u.unit; n > 0 {
			parts = append(parts, count(int(n), u.name))
			left %= u.unit
		}
	}
	if left > 0 || len(parts) == 0 {
		parts = append(parts, left.String())
	}
	return strings.Join(parts, " ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func people(n int) string {
	if n == 1 {
		return "1 person"
	}
	return fmt.Sprintf("%d people", n)
}

// delivery says what a way of delivery means; empty for one that is not known.
func delivery(how string) string {
	switch how {
	case "direct":
		return "the step is handed the secret itself"
	case "wrapped":
		return "the step is handed a token that unwraps the secret, once"
	case "sealed":
		return "the secret is encrypted to the step’s public key"
	case "gateway":
		return "the step never sees the secret; each use goes through the gateway and is on record"
	}
	return ""
}

// state is a status for people.
type state struct {
	Word string // in a tag
	Long string // as a heading
	Tone string // its colour
}

func stateOf(s store.Status) state {
	switch s {
	case store.StatusPending:
		return state{"waiting", "Waiting for people", "accent"}
	case store.StatusApproved:
		return state{"approved", "Approved", "good"}
	case store.StatusDenied:
		return state{"denied", "Denied", "danger"}
	case store.StatusExpired:
		return state{"expired", "Expired: nothing was granted", "warn"}
	case store.StatusVoid:
		return state{"void", "Void: what would be granted has changed", "warn"}
	case store.StatusWithdrawn:
		return state{"withdrawn", "Taken back by the orchestrator", ""}
	case store.StatusIssued:
		return state{"issued", "Approved, and handed out", "good"}
	case store.StatusFailed:
		return state{"failed", "Approved, and failed to be handed out", "warn"}
	case store.StatusClosed:
		return state{"closed", "Closed", ""}
	}
	return state{string(s), string(s), ""}
}

// ruleLine is one thing that a rule asks for.
type ruleLine struct {
	Name  string
	Lines []string
}

// inWords says all that rule asks for. asked is when the request began to wait.
func inWords(rule *store.Rule) []ruleLine {
	var who []string
	for _, g := range rule.Groups {
		who = append(who, fmt.Sprintf("%s of group %s", people(g.Count), g.Group))
	}
	if len(rule.Groups) > 1 {
		who = append(who, "All of these. A person in several groups still counts once.")
	}
	lines := []ruleLine{
		{"Must approve", who},
		{"May not", []string{"The person it is for, and the owners of the orchestrator."}},
		{"A denial", []string{"By any one of these people, at any hour: it ends the request at once."}},
	}
	hours := "At any hour."
	if h := rule.Hours; h != nil {
		hours = "Approvals are taken from " + h.From + " to " + h.To + ", " + h.Zone + days(h.Days) + "."
	}
	reasons := "Due from nobody."
	switch {
	case rule.Reasons.Requester && rule.Reasons.Approver:
		reasons = "Due from the requester and from whoever decides."
	case rule.Reasons.Requester:
		reasons = "Due from the requester."
	case rule.Reasons.Approver:
		reasons = "Due from whoever decides."
	}
	passkey := "Not due. A decision may be signed with one all the same."
	if rule.Passkey {
		passkey = "Each approval must be signed with one."
	}
	slack := "It is decided here, not in Slack."
	if rule.Slack {
		slack = "It may be decided in Slack too, by people whose account is linked."
	}
	run := "An approval is for this one credential."
	if s := rule.Standing; s != nil {
		run = fmt.Sprintf("An approval may be given for the whole run: at most %s, for at most %s.", count(s.Uses, "use"), span(s.For))
	}
	return append(lines,
		ruleLine{"Hours", []string{hours}},
		ruleLine{"Reasons", []string{reasons}},
		ruleLine{"Passkey", []string{passkey}},
		ruleLine{"Time", []string{"It waits for people for " + span(rule.Expires) + ".", "Once approved, it must be used within " + span(rule.Collect) + "."}},
		ruleLine{"Slack", []string{slack}},
		ruleLine{"Whole run", []string{run}},
	)
}

func days(list []time.Weekday) string {
	if len(list) == 0 {
		return ", every day"
	}
	names := make([]string, len(list))
	for i, d := range list {
		names[i] = d.String()
	}
	return ", on " + strings.Join(names, ", ")
}

// why says which rule stood in the way of a decision.
func why(code string) string {
	switch code {
	case "self-approval":
		return "is on the requester’s side"
	case "not-an-approver", string(store.OrderApprover):
		return "is in no group that may decide"
	case string(store.OrderDecided):
		return "had approved already"
	case string(store.OrderHours):
		return "tried outside the hours"
	case "passkey-required", string(store.OrderPasskey):
		return "did not sign with a passkey"
	case "reason-required", string(store.OrderReason):
		return "gave no reason"
	case "request-closed", string(store.OrderNotOpen):
		return "came when the request was closed"
	}
	return "was refused"
}

// happened says what an entry is about.
func happened(h approvals.Happened) string {
	switch h.Type {
	case store.StepRequested:
		switch h.Outcome {
		case string(store.Deny):
			return "asked, and policy denied"
		case string(store.NeedsApproval):
			return "asked, and people are due"
		}
		return "asked"
	case store.ApprovalRequested:
		return "people were asked"
	case store.ApprovalDecided, store.ApprovalStanding:
		word := "a person decided"
		switch h.Outcome {
		case store.Approve, string(store.Allow):
			word = "a person approved"
		case store.Refuse:
			word = "a person denied"
		}
		if h.Type == store.ApprovalStanding {
			word += ", for the whole run"
		}
		return word
	case store.ApprovalExpired:
		return "expired"
	case store.RequestWithdrawn:
		return "taken back"
	case store.RequestVoid:
		return "void"
	case store.CredentialIssuing:
		return "about to be handed out"
	case store.CredentialIssued:
		return "handed out"
	case store.CredentialFailed:
		return "failed"
	case store.CredentialAbandoned:
		return "abandoned"
	case store.CredentialUsed:
		return "used"
	case store.CredentialRevoked:
		return "revoked"
	case store.CredentialExpired:
		return "ended"
	case store.StepFinished:
		return "step finished" + outcome(h.Outcome)
	case store.AccessRefused:
		return "refused"
	}
	return string(h.Type) + outcome(h.Outcome)
}

func outcome(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}

// sentence is what a problem says, for a page.
func sentence(s string) string {
	r, size := utf8.DecodeRuneInString(s)
	if size == 0 {
		return ""
	}
	s = string(unicode.ToUpper(r)) + s[size:]
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}
