package slack

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Slack's limits, in characters (Block Kit reference). Characters are counted
// as UTF-16 units of the escaped text, the longest of the ways to count.
const (
	maxField     = 2000   // a text in fields of a section
	maxFields    = 10     // texts in a section
	maxHeader    = 150    // a header
	maxDecisions = 10     // decisions in a message
	maxReason    = 1000   // our own, of a reason typed in Slack
	maxMessage   = 11_000 // all fields of a message together; Slack refuses a message somewhere above 13,000
	maxNotice    = 70     // what is kept free for cutNotice
)

// cutNotice stands where a text is cut.
const cutNotice = "… cut, %d more characters: read the whole on the page"

// escape returns the characters of s as they are sent, each by itself: &, < and
// > as entities (so that no mention or link begins), a line break as a sign (so
// that no line of ours can be imitated), and what would not be seen, such as
// characters that turn the direction of writing, by its number.
func escape(s string) []string {
	out := make([]string, 0, len(s))
	for i, r := range s {
		switch {
		case r == '&':
			out = append(out, "&amp;")
		case r == '<':
			out = append(out, "&lt;")
		case r == '>':
			out = append(out, "&gt;")
		case r == '\n':
			out = append(out, "⏎")
		case r == '\r' && strings.HasPrefix(s[i+1:], "\n"): // one line break
		case r == utf8.RuneError, unicode.In(r, unicode.C, unicode.Zl, unicode.Zp), unicode.Is(unicode.Variation_Selector, r):
			out = append(out, fmt.Sprintf("⟨U+%04X⟩", r))
		case unicode.IsSpace(r):
			out = append(out, " ")
		default:
			out = append(out, string(r))
		}
	}
	return out
}

// units is the length of s in UTF-16 units.
func units(s string) (n int) {
	for _, r := range s {
		n++
		if r > 0xFFFF {
			n++
		}
	}
	return n
}

// join puts chars together, at most limit long, and says how many are cut.
func join(chars []string, limit int) (text string, cut int) {
	total := 0
	for _, c := range chars {
		total += units(c)
	}
	if total <= limit {
		return strings.Join(chars, ""), 0
	}
	n := 0
	for i, c := range chars {
		if n+units(c) > limit-maxNotice {
			return strings.Join(chars[:i], "") + fmt.Sprintf(cutNotice, len(chars)-i), len(chars) - i
		}
		n += units(c)
	}
	return strings.Join(chars, ""), 0 // not reached: total is above limit
}

// field is one thing that is told: a label of ours and what others wrote, a
// line each.
type field struct {
	label string
	lines []string
}

// text is f as it is sent. What others wrote is escaped before it is cut.
func (f field) text(limit int) (text string, cut int) {
	chars := escape(f.label)
	if len(f.lines) == 0 {
		chars = append(chars, "\n", "none")
	}
	for _, l := range f.lines {
		if l == "" {
			l = "(empty)"
		}
		chars = append(append(chars, "\n"), escape(l)...)
	}
	return join(chars, limit)
}
