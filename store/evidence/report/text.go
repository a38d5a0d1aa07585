package report

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/store"
)

// What is shown of one text: enough to judge by, and no more than keeps a page
// readable. The whole stands in sealed.jsonl or entries.jsonl.
const (
	maxText  = 2_000 // characters
	maxLines = 20
)

// said is a text as a report shows it.
type said struct {
	Text   string
	Chars  int  // of the whole text, where Text is its beginning alone
	Erased bool // there was a text, and it is not there any more
}

// String is s in one piece.
func (s said) String() string {
	switch {
	case s.Erased:
		return "(not in this export)"
	case s.Chars > 0:
		return fmt.Sprintf("%s… (cut: %s characters in all)", s.Text, number(int64(s.Chars)))
	}
	return s.Text
}

// keep cuts s to what is shown. The result shares no memory with a longer s.
func keep(s string) said {
	if len(s) <= maxText && strings.Count(s, "\n") < maxLines {
		return said{Text: s}
	}
	chars, lines := 0, 1
	for i, c := range s {
		if c == '\n' {
			lines++
		}
		if chars == maxText || lines > maxLines {
			return said{Text: strings.Clone(s[:i]), Chars: utf8.RuneCountInString(s)}
		}
		chars++
	}
	return said{Text: s}
}

// piece is a run of a text that is shown as it is, or a character that a reader
// would not see, by its code point.
type piece struct{ Text, Unseen string }

// pieces splits s. Characters that turn the direction of reading or are drawn as
// nothing are how a text says something else to a person than to a machine
// (CVE-2021-42574). The two joiners stay: Persian, Indic scripts and emoji need
// them.
func pieces(s string) (out []piece) {
	s = strings.ReplaceAll(s, "\r\n", "\n")
	plain := 0
	for i, c := range s {
		size, unseen := utf8.RuneLen(c), ""
		if c == utf8.RuneError && !strings.HasPrefix(s[i:], "\ufffd") {
			size, unseen = 1, fmt.Sprintf("byte %02X", s[i])
		} else if hidden(c) {
			unseen = fmt.Sprintf("U+%04X", c)
		}
		if unseen == "" {
			continue
		}
		if plain < i {
			out = append(out, piece{Text: s[plain:i]})
		}
		out = append(out, piece{Unseen: unseen})
		plain = i + size
	}
	if plain < len(s) {
		out = append(out, piece{Text: s[plain:]})
	}
	return out
}

// plain is s where no markup can stand.
func plain(s string) string {
	var b strings.Builder
	for _, p := range pieces(s) {
		b.WriteString(p.Text)
		if p.Unseen != "" {
			b.WriteString("[" + p.Unseen + "]")
		}
	}
	return b.String()
}

func hidden(c rune) bool {
	switch c {
	case '\n', '\t', '\u200c', '\u200d':
		return false
	case '\u115f', '\u1160', '\u3164', '\uffa0', '\u2800': // letters that are drawn as nothing
		return true
	}
	return c < ' ' || c > '~' && unicode.In(c, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co, unicode.Noncharacter_Code_Point)
}

func orNone(s string) string {
	if s == "" {
		return "not said"
	}
	return keep(s).String()
}

// cause is why something was undone, as its entry says.
func cause(e *store.Entry) string {
	if e.Cause == nil {
		return "no cause on record"
	}
	return keep(*e.Cause).String()
}

// detailText shows details of a form that the report does not know.
func detailText(e *store.Entry) string {
	if s := string(e.Details); s != "" && s != "null" && s != "{}" {
		return " " + s
	}
	return ""
}

// clock is t for people, in UTC.
func clock(t store.Time) string {
	if t.IsZero() {
		return "not said"
	}
	return t.UTC().Format("2 Jan 2006, 15:04:05 UTC")
}

// number writes n with a thin gap between thousands.
func number(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// count writes n things.
func count(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return number(n) + " " + many
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
			parts = append(parts, count(int64(n), u.name, u.name+"s"))
			left %= u.unit
		}
	}
	if left != 0 || len(parts) == 0 {
		parts = append(parts, left.String())
	}
	return strings.Join(parts, " ")
}

// ruleWords says who must approve under rule, and how.
func ruleWords(rule *store.Rule) string {
	var groups []string
	for _, g := range rule.Groups {
		groups = append(groups, count(int64(g.Count), "person", "people")+" of "+g.Group)
	}
	s := strings.Join(groups, " and ")
	if s == "" {
		s = "nobody"
	}
	switch r := rule.Reasons; {
	case r.Requester && r.Approver:
		s += "; both sides give a reason"
	case r.Requester:
		s += "; the requester gives a reason"
	case r.Approver:
		s += "; who approves gives a reason"
	}
	if rule.Passkey {
		s += "; signed with a passkey"
	}
	if rule.Hours != nil {
		s += "; " + rule.Hours.String()
	}
	if rule.Slack {
		s += "; also in Slack"
	}
	s += "; decided within " + span(rule.Expires) + ", collected within " + span(rule.Collect)
	if l := rule.Standing; l != nil {
		s += fmt.Sprintf("; may stand for a run, %s in %s at most", count(int64(l.Uses), "use", "uses"), span(l.For))
	}
	return keep(s).String()
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return keep(s).String()
}

func sortLabelled(l []labelled) {
	slices.SortFunc(l, func(a, b labelled) int { return cmp.Or(cmp.Compare(a.Label, b.Label), cmp.Compare(a.Text, b.Text)) })
}

func sortedMap(m map[string]string) []labelled {
	out := make([]labelled, 0, len(m))
	for k, v := range m {
		out = append(out, labelled{k, v})
	}
	sortLabelled(out)
	return out
}
