package report

import (
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"

	"github.com/countersign-dev/countersign/store"
)

//go:embed report.html
var pageText string

//go:embed report.css
var styleText string

// page escapes by context (html/template): whatever requesters and people wrote
// comes to it as plain strings, or by way of textHTML and partsHTML, which escape
// it themselves. These two write most of a report: as templates of their own they
// took nearly all of the time that deriving it takes.
var page = template.Must(template.Must(template.New("report").Funcs(template.FuncMap{
	"text": textHTML, "parts": partsHTML, "plain": plain, "moment": moment, "number": number, "count": count,
}).Parse(pageText)).New("style").Parse(styleText))

// Write writes the report as one HTML page that needs nothing else. It may be
// called again; no entries may be taken meanwhile.
func (r *Report) Write(w io.Writer, m Meta) error {
	return page.ExecuteTemplate(w, "report", r.view(m))
}

// textHTML is s as the text of an element.
func textHTML(s string) template.HTML {
	var b strings.Builder
	writeText(&b, s)
	return template.HTML(b.String()) // escaped piece by piece
}

func writeText(b *strings.Builder, s string) {
	for _, p := range pieces(s) {
		if p.Unseen != "" {
			b.WriteString(`<span class="unseen">` + p.Unseen + `</span>`) // a code point or a byte, in hexadecimal
			continue
		}
		template.HTMLEscape(b, []byte(p.Text))
	}
}

// partsHTML is what a cell holds.
func partsHTML(list []*part) template.HTML {
	var b strings.Builder
	element := func(begin, text, end string) {
		b.WriteString(begin)
		writeText(&b, text)
		b.WriteString(end)
	}
	quoted := template.HTMLEscapeString // for attributes in double quotes
	for _, p := range list {
		switch p.Kind {
		case "ref":
			if p.Href != "" {
				fmt.Fprintf(&b, `<a class="ref" href="%s">#%d</a>`, quoted(p.Href), p.N)
			} else {
				fmt.Fprintf(&b, `<span class="ref">#%d</span>`, p.N)
			}
		case "time":
			element(`<time datetime="`+quoted(p.Href)+`">`, p.Text, `</time>`)
		case "tag":
			element(`<span class="tag `+quoted(p.Tone)+`">`, p.Text, `</span>`)
		case "code":
			element(`<code>`, p.Text, `</code>`)
		case "quiet":
			element(`<span class="quiet">`, p.Text, `</span>`)
		case "said":
			b.WriteString(`<span class="said">`)
			if p.Said.Erased {
				b.WriteString(`<i>text not in this export</i>`)
			} else {
				if p.Text != "" {
					element(`<i>`, p.Text, `:</i> `)
				}
				writeText(&b, p.Said.Text)
				if p.Said.Chars > 0 {
					fmt.Fprintf(&b, `… <b>cut here: %d characters in all, the whole is in sealed.jsonl</b>`, p.Said.Chars)
				}
			}
			b.WriteString(`</span>`)
		default:
			element(`<span>`, p.Text, `</span>`)
		}
	}
	return template.HTML(b.String()) // escaped part by part
}

type view struct {
	M             Meta
	Filters       []labelled
	Entries       int64
	Context       int64
	Orchestrators string
	People        string
	Figures       []figure
	Asked         askTotals
	Steps, Groups *tableView
	Own, NotOwn   int64
	Reached       *tableView
	Issued        *tableView
	Uses          int64
	Objects       *tableView
	Masks         *tableView
	Results       resultsView
	Claims        []labelled
	Claimed       int64 // steps of which something was claimed
	Agree         int64
	Differ        int64
	NotObserved   int64
	Approvals     *tableView
	Rules         *tableView
	Scopes        *tableView
	Deciders      *tableView
	Keys          *tableView
	Policies      []policyView
	PolicyNote    string
	NewPolicies   int64
	Decided       decidedTotals
	Exceptions    []exceptionView
	Found         int // kinds of which there are any
	Drawing       *drawing
	Upkeep        *tableView
	Missing       int64
	Erased        int64
	Gone          int64 // of Missing, those that no erasure explains
	Cosigned      int64
	Wide          int64 // entries that the window spans
	Last          int64 // entry of the window
	NotFollowed   int64
	Types         []labelled
}

type askTotals struct{ Requests, Allowed, Asked, Denied, Issued int64 }

// resultsView adds up what came of uses on the access path.
type resultsView struct{ Uses, Good, Failed, Open, Refused, Rows, Masked int64 }

type decidedTotals struct{ Asked, Approved, Refused, Expired, Void, Withdrawn, Signed int64 }

type figure struct{ Label, N, Note, Href string }

type exceptionView struct {
	Slug, Title, Meaning string
	Class, Class2        string // how grave, in a word for styles and in words for people
	N                    int64
	Table                *tableView
}

type policyView struct {
	At                           int64
	Time, Writer, Digest, Change string
	Window                       bool
	Files, Retention             []labelled
	Diff                         []diffLine
	Cut                          bool
}

type tableView struct {
	ID, Caption string
	Head        []string
	Num         []bool // of the columns, set by add
	Rows        []rowView
	Note        string // what is not shown, and where it stands
	Narrow      bool   // numbers alone: no cards on a phone
}

type rowView struct {
	ID    string
	Cells []cell
}

// cell has parts, one under the other.
type cell struct {
	Label  string // the column, for narrow screens
	Num    bool
	Inline bool // its parts stand beside each other
	Parts  []*part
}

type part struct {
	Kind string // text, quiet, code, ref, tag, said
	Text string
	Said said
	Tone string
	N    int64
	Href string
}

func text(s string) *part  { return &part{Kind: "text", Text: s} }
func quiet(s string) *part { return &part{Kind: "quiet", Text: s} }
func code(s string) *part  { return &part{Kind: "code", Text: s} }
func ref(n int64) *part    { return &part{Kind: "ref", N: n} }

// when is t, its day above its hour.
func when(t store.Time) []*part {
	if t.IsZero() {
		return []*part{quiet("not said")}
	}
	return []*part{{Kind: "time", Text: t.UTC().Format("2 Jan 2006"), Href: t.String()}, quiet(t.UTC().Format("15:04:05 UTC"))}
}
func tag(s, tone string) *part         { return &part{Kind: "tag", Text: s, Tone: tone} }
func quote(label string, s said) *part { return &part{Kind: "said", Text: label, Said: s} }
func num(n int64) cell                 { return cell{Num: true, Parts: []*part{text(number(n))}} }
func cells(parts ...*part) cell        { return cell{Parts: parts} }
func entries(first, last int64) cell {
	if first == last {
		return cells(ref(first))
	}
	return cell{Inline: true, Parts: []*part{ref(first), quiet(" to "), ref(last)}}
}

func (t *tableView) add(id string, cells ...cell) {
	if t.Num == nil {
		t.Num = make([]bool, len(t.Head))
	}
	for i := range cells {
		cells[i].Label = t.Head[i]
		t.Num[i] = t.Num[i] || cells[i].Num
	}
	t.Rows = append(t.Rows, rowView{id, cells})
}

// first says how many of n rows are shown.
func (t *tableView) first(n int64, where string) *tableView {
	if shown := int64(len(t.Rows)); shown < n {
		t.Note = fmt.Sprintf("The first %s of %s are shown. All are in %s.", number(shown), number(n), where)
	}
	return t
}

// who is a step within its run and orchestrator.
func who(orchestrator, run, step string) []*part {
	p := []*part{text(step)}
	if step == "" {
		p = nil
	}
	at := orchestrator
	if run != "" {
		at += " / " + run
	}
	if at != "" {
		p = append(p, quiet(at))
	}
	return p
}

func scopeAt(scope, target string) []*part {
	p := []*part{text(scope)}
	if target != "" && target != scope {
		p = append(p, quiet(target))
	}
	return p
}

func tone(outcome string) string {
	switch {
	case outcome == "issued" || outcome == "approved":
		return "good"
	case strings.HasPrefix(outcome, "denied"), outcome == "failed":
		return "bad"
	case outcome == "expired", outcome == "void", outcome == "abandoned":
		return "warn"
	}
	return ""
}

// view is what the page shows, with m.
func (r *Report) view(m Meta) *view {
	v := &view{
		M: m, Filters: sortedMap(m.Filters), Entries: r.entries, Context: r.context, Own: r.identities,
		NotOwn: r.exceptions[identity].n, NotFollowed: r.notFollowed, Missing: int64(len(r.sealed.at)), Erased: r.sealed.covered,
		NewPolicies: r.policies.n, Cosigned: int64(len(m.Cosignatures)), Wide: max(m.To-m.From, 0), Last: m.To - 1,
	}
	v.Gone = v.Missing - v.Erased
	v.People = atLeast(int64(len(r.people.sums)), r.people.over)
	v.Orchestrators = atLeast(int64(len(r.orchestrators.sums)), r.orchestrators.over)
	r.summed(v)
	r.identitySection(v)
	r.reachedSection(v)
	r.approvedSection(v)
	r.recordSection(v)
	r.exceptionSection(v)
	first, last := parseTime(m.FromTime), parseTime(m.ToTime)
	v.Drawing = r.chart.draw(first, last)
	v.Figures = []figure{
		{"credential requests", number(v.Asked.Requests), "by " + v.Orchestrators + " " + plural(v.Orchestrators, "orchestrator", "orchestrators"), "#identity"},
		{"credentials issued", number(v.Asked.Issued), count(v.Uses, "use observed", "uses observed"), "#reached"},
		{"decisions by people", number(v.Decided.Approved + v.Decided.Refused), fmt.Sprintf("%s approved, %s denied", number(v.Decided.Approved), number(v.Decided.Refused)), "#approved"},
		{plural(v.People, "person", "people") + " who decided", v.People, count(v.Decided.Signed, "approval signed", "approvals signed") + " with a passkey", "#people"},
	}
	link(v)
	return v
}

func atLeast(n int64, over bool) string {
	if over {
		return "more than " + number(n)
	}
	return number(n)
}

func plural(n, one, many string) string {
	if n == "1" {
		return one
	}
	return many
}

// moment is a time of Meta for people, or s itself where it is none.
func moment(s string) string {
	if t := parseTime(s); !t.IsZero() {
		return clock(t)
	}
	return s
}

func parseTime(s string) store.Time {
	var t store.Time
	if t.UnmarshalText([]byte(s)) != nil {
		return store.Time{}
	}
	return t
}

// summed adds up what the figures at the top say.
func (r *Report) summed(v *view) {
	add := func(s *askSum) {
		v.Asked.Requests += s.requests
		v.Asked.Allowed += s.allowed
		v.Asked.Asked += s.asked
		v.Asked.Denied += s.denied
		v.Asked.Issued += s.issued
		v.Uses += s.uses
	}
	for _, s := range r.asks.sums {
		add(s)
	}
	add(&r.asks.rest)
	sum := func(s *scopeSum) {
		v.Decided.Asked += s.asked
		v.Decided.Approved += s.approved
		v.Decided.Refused += s.refused
		v.Decided.Expired += s.expired
		v.Decided.Void += s.void
		v.Decided.Withdrawn += s.withdrawn
		v.Decided.Signed += s.signed
	}
	for _, s := range r.scopes.sums {
		sum(s)
	}
	sum(&r.scopes.rest)
}

func (r *Report) identitySection(v *view) {
	t := &tableView{ID: "groups", Caption: "Requests, summed up by orchestrator and scope", Narrow: true,
		Head: []string{"Orchestrator", "Scope", "Requests", "Allowed by policy", "Sent to people", "Denied", "Failed", "Issued", "Entries"}}
	row := func(o, scope string, s *askSum) {
		t.add("", cells(text(orDefault(o, "none named"))), cells(text(scope)), num(s.requests), num(s.allowed), num(s.asked), num(s.denied), num(s.failed), num(s.issued), entries(s.first, s.last))
	}
	for i, k := range r.asks.sorted(func(s *askSum) int64 { return s.requests }, func(a, b askKey) int {
		return cmp.Or(cmp.Compare(a.orchestrator, b.orchestrator), cmp.Compare(a.scope, b.scope))
	}) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The %d with most requests are shown, of %s. Count the others in steps.csv, columns orchestrator and scope.", maxRows, atLeast(int64(len(r.asks.sums)), r.asks.over))
			break
		}
		row(keep(k.orchestrator).Text, keep(k.scope).Text, r.asks.sums[k])
	}
	v.Groups = t

	t = &tableView{ID: "steps", Caption: "Every request and the identity its step was given",
		Head: []string{"Entry", "Asked", "Step", "Identity given", "Scope and target", "For whom", "Outcome"}}
	for _, s := range r.steps.rows {
		id := cells(code(s.agent))
		if !s.own {
			id = cells(code(s.agent), tag("not the step's own", "bad"))
		}
		subject := cells(quiet("nobody named"))
		if s.subject != "" {
			how := "claimed by the orchestrator"
			if s.proved {
				how = "proved by a token"
			}
			subject = cells(text(s.subject), quiet(how))
		}
		out := cells(tag(s.outcome, tone(s.outcome)))
		if s.at != s.index {
			out.Parts = append(out.Parts, ref(s.at))
		}
		t.add(fmt.Sprintf("step-%d", s.index), cells(ref(s.index)), cells(when(s.time)...), cells(who(s.orchestrator, s.run, s.step)...), id, cells(scopeAt(s.scope, s.target)...), subject, out)
	}
	v.Steps = t.first(r.steps.n, "steps.csv, one row per request, identity in the column of that name")
}

func (r *Report) reachedSection(v *view) {
	t := &tableView{ID: "targets", Caption: "Targets, and what was issued and seen there", Narrow: true,
		Head: []string{"Target", "Scope", "Credentials issued", "Uses observed", "Failed", "Refused by guards", "After the end", "Revoked", "Expired", "Entries"}}
	for i, k := range r.reached.sorted(func(s *reachSum) int64 { return s.issued + s.uses }, func(a, b reachKey) int {
		return cmp.Or(cmp.Compare(a.target, b.target), cmp.Compare(a.scope, b.scope))
	}) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The %d most used are shown, of %s. The others: steps.csv and uses.csv, columns target and scope.", maxRows, atLeast(int64(len(r.reached.sums)), r.reached.over))
			break
		}
		s := r.reached.sums[k]
		t.add("", cells(text(orDefault(k.target, "none named"))), cells(text(keep(k.scope).Text)), num(s.issued), num(s.uses), num(s.failed), num(s.refused), num(s.late), num(s.revoked), num(s.expired), entries(s.first, s.last))
	}
	v.Reached = t
	r.resultsSection(v)
	claims := map[string]string{}
	for c, n := range r.claims {
		claims[c] = number(n)
	}
	v.Claims = sortedMap(claims)
	v.Agree, v.Differ, v.NotObserved = r.verdicts[store.Agree], r.verdicts[store.Differ], r.verdicts[store.NotObserved]
	v.Claimed = v.Agree + v.Differ + v.NotObserved

	t = &tableView{ID: "credentials", Caption: "Every credential, its life and its uses",
		Head: []string{"Entry", "Issued", "Step", "Scope, target, kind", "Life", "Observed", "Claimed, and whether it agrees"}}
	for _, c := range r.credentials.rows {
		kind := c.kind
		if !c.revocable {
			kind += ", cannot be called back"
		}
		life := cells(quiet("until "+clock(c.expires)), tag("no end on record", ""))
		if c.end != "" {
			life = cells(quiet("until "+clock(c.expires)), text(c.end+", "+clock(c.endTime)), ref(c.endAt))
		}
		seen := cells(quiet("no use seen"))
		if c.uses > 0 {
			seen = cells(text(count(int64(c.uses), "use", "uses")), quote("latest", c.use), quiet("via "+c.via.Text), ref(c.firstUse))
			if c.lastUse != c.firstUse {
				seen.Parts = append(seen.Parts, ref(c.lastUse))
			}
			if w := c.results.words(); w != "" {
				seen.Parts = append(seen.Parts, text(w))
			}
			if c.late > 0 {
				seen.Parts = append(seen.Parts, tag(number(int64(c.late))+" after the end", "bad"))
			}
		}
		if c.refused > 0 {
			seen.Parts = append(seen.Parts, tag(count(c.refused, "attempt", "attempts")+" refused", "warn"))
		}
		claim := cells(quiet("nothing reported"))
		if c.claim != "" {
			claim = cells(text(c.claim), ref(c.claimAt))
			if c.summary != (said{}) {
				claim.Parts = append(claim.Parts, quote("", c.summary))
			}
			if verdict, why := c.account.Verdict(); verdict != "" {
				claim.Parts = append(claim.Parts, tag(string(verdict), map[store.Verdict]string{store.Agree: "good", store.Differ: "bad"}[verdict]), quiet(why))
			}
		}
		t.add(fmt.Sprintf("credential-%d", c.index), cells(ref(c.index)), cells(when(c.time)...), cells(who(c.orchestrator, c.run, c.step)...),
			cells(append(scopeAt(c.scope, c.target), quiet(kind))...), life, seen, claim)
	}
	v.Issued = t.first(r.credentials.n, "steps.csv, every use in uses.csv")
}

// words is what came of uses, in a line; empty where nothing is known.
func (s *resultSum) words() string {
	if s.uses == 0 {
		return ""
	}
	parts := []string{number(s.ended-s.failed) + " succeeded"}
	for _, x := range []struct {
		n    int64
		what string
	}{{s.failed, "failed"}, {s.uses - s.ended, "without a result on record"}} {
		if x.n > 0 {
			parts = append(parts, number(x.n)+" "+x.what)
		}
	}
	if s.rows > 0 {
		parts = append(parts, count(s.rows, "row", "rows"))
	}
	if s.masked > 0 {
		parts = append(parts, count(s.masked, "value", "values")+" masked")
	}
	return strings.Join(parts, ", ")
}

// resultsSection says what was reached on the access path, with which result, and
// what was masked.
func (r *Report) resultsSection(v *view) {
	s := &r.results
	v.Results = resultsView{Uses: s.uses, Good: s.ended - s.failed, Failed: s.failed, Open: s.uses - s.ended, Refused: r.guarded, Rows: s.rows, Masked: s.masked}
	t := &tableView{ID: "objects", Caption: "What was reached within each target, on the access path", Narrow: true,
		Head: []string{"Target", "What", "Uses", "Succeeded", "Failed", "No result", "Rows", "Values masked", "Bytes out", "Entries"}}
	for i, k := range r.objects.sorted(func(s *objectSum) int64 { return s.uses }, func(a, b objectKey) int {
		return cmp.Or(cmp.Compare(a.target, b.target), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.object, b.object))
	}) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The %d most used are shown, of %s. The others: uses.csv, column objects.", maxRows, atLeast(int64(len(r.objects.sums)), r.objects.over))
			break
		}
		s := r.objects.sums[k]
		t.add("", cells(text(orDefault(k.target, "none named"))), cells(text(orDefault(k.object, "nothing named")), quiet(keep(k.protocol).Text)), num(s.uses), num(s.ended-s.failed), num(s.failed), num(s.uses-s.ended), num(s.rows), num(s.masked), num(s.received), entries(s.first, s.last))
	}
	v.Objects = t

	t = &tableView{ID: "masking", Caption: "Masking in force: what was hidden in what came back",
		Head: []string{"Hidden", "Under the scopes", "Uses", "Rules"}}
	for _, digest := range r.masks.sorted(func(m *maskSum) int64 { return m.uses }, strings.Compare) {
		m := r.masks.sums[digest]
		if !m.window {
			continue
		}
		if len(t.Rows) == maxRows {
			t.Note = fmt.Sprintf("The %d most used are shown. All are in masking/index.json.", maxRows)
			break
		}
		var hidden cell
		for _, w := range m.words {
			hidden.Parts = append(hidden.Parts, text(w))
		}
		file := quiet("masking/" + strings.TrimPrefix(keep(digest).Text, "sha256:") + ".json")
		if len(m.words) == 0 {
			hidden, file = cells(tag("named by uses, and in no grant of this export", "bad")), quiet("not in this export")
		}
		t.add("", hidden, cells(text(strings.Join(m.scopes, ", "))), num(m.uses), cells(code(keep(digest).Text), file))
	}
	v.Masks = t
}

func (r *Report) approvedSection(v *view) {
	t := &tableView{ID: "approvals", Caption: "Requests that people decided",
		Head: []string{"Entry", "Asked", "Scope and target", "Who asked, and why", "Who decided, and why", "Rule in force", "Outcome"}}
	for _, a := range r.approvals.rows {
		asker := cells(who(a.orchestrator, a.run, a.step)...)
		if a.subject != "" {
			how := " (claimed)"
			if a.proved {
				how = " (proved)"
			}
			asker.Parts = append(asker.Parts, quiet("for "+a.subject+how))
		}
		asker.Parts = append(asker.Parts, quote("", a.reason.or("no reason given")))
		var people cell
		for _, d := range a.decisions {
			word, mood := "denied", "bad"
			if d.decision == store.Approve {
				word, mood = "approved", "good"
			}
			how := "not signed"
			if d.signed {
				how = "signed with a passkey"
			}
			people.Parts = append(people.Parts, text(d.person), tag(word, mood), quote("", d.reason.or("no reason given")),
				quiet(clock(d.time)+", "+how+", via "+orNone(d.via)+", of "+orNone(d.groups)), ref(d.index))
			if d.standing != "" {
				people.Parts = append(people.Parts, tag("for the run: "+d.standing, "warn"))
			}
		}
		if a.more > 0 {
			people.Parts = append(people.Parts, quiet(count(a.more, "more decision", "more decisions")+" in approvals.csv"))
		}
		if len(people.Parts) == 0 {
			people = cells(quiet("nobody"))
		}
		out := cells(tag(a.outcome, tone(a.outcome)))
		if a.outcomeAt != a.index {
			out.Parts = append(out.Parts, ref(a.outcomeAt))
		}
		t.add(fmt.Sprintf("approval-%d", a.index), cells(ref(a.index)), cells(when(a.time)...), cells(scopeAt(a.scope, a.target)...), asker, people, cells(text(a.rule)), out)
	}
	v.Approvals = t
	if v.Decided.Asked > int64(len(t.Rows)) {
		t.first(v.Decided.Asked, "approvals.csv, one row per decision, and steps.csv, one per request")
	}

	t = &tableView{ID: "scopes", Caption: "Sensitive scopes, and how requests for them ended", Narrow: true,
		Head: []string{"Scope", "People asked", "Approvals", "Of these signed", "Denials", "Expired", "Void", "Withdrawn"}}
	for i, k := range r.scopes.sorted(func(s *scopeSum) int64 { return s.asked }, strings.Compare) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The %d asked for most are shown, of %s.", maxRows, atLeast(int64(len(r.scopes.sums)), r.scopes.over))
			break
		}
		s := r.scopes.sums[k]
		t.add("", cells(text(keep(k).Text)), num(s.asked), num(s.approved), num(s.signed), num(s.refused), num(s.expired), num(s.void), num(s.withdrawn))
	}
	v.Scopes = t

	t = &tableView{ID: "rules", Caption: "The rules, as they stood in each request",
		Head: []string{"Scope", "Rule", "Requests", "Entries"}}
	for i, k := range r.rules.sorted(func(*ruleSum) int64 { return 0 }, func(a, b ruleKey) int {
		return cmp.Or(cmp.Compare(a.scope, b.scope), cmp.Compare(r.rules.sums[a].first, r.rules.sums[b].first), cmp.Compare(a.rule, b.rule))
	}) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The first %d are shown, of %s. Each stands in its entry, type approval.requested.", maxRows, atLeast(int64(len(r.rules.sums)), r.rules.over))
			break
		}
		s := r.rules.sums[k]
		t.add("", cells(text(keep(k.scope).Text)), cells(text(k.rule)), num(s.asked), entries(s.first, s.last))
	}
	v.Rules = t

	t = &tableView{ID: "people", Caption: "People who decided",
		Head: []string{"Person", "Groups, as the login said", "Approved", "Denied", "Signed", "For a whole run"}}
	for i, k := range r.people.sorted(func(p *person) int64 { return p.approved + p.refused }, strings.Compare) {
		if i == maxRows {
			t.Note = fmt.Sprintf("The %d who decided most are shown, of %s. All: approvals.csv, column person.", maxRows, v.People)
			break
		}
		p := r.people.sums[k]
		slices.Sort(p.groups)
		t.add("", cells(text(r.name(k)), quiet(keep(k).Text)), cells(text(orDefault(strings.Join(p.groups, ", "), "none"))), num(p.approved), num(p.refused), num(p.signed), num(p.standing))
	}
	v.Deciders = t

	v.Keys = events("keys", "Passkeys and Slack accounts by which people could decide", r.keys, "entries.jsonl and context.jsonl, types passkey.* and slack.linked")
	for _, p := range r.policies.rows {
		pv := policyView{
			At: p.index, Time: clock(p.time), Writer: p.writer, Digest: p.digest, Change: p.change, Window: p.window,
			Retention: p.retention, Diff: p.diff, Cut: p.cut,
		}
		if digest, ok := strings.CutPrefix(p.catalogue, "sha256:"); ok {
			pv.Files = append(pv.Files, labelled{"catalogue", "policies/" + digest + ".yaml"})
		}
		if digest, ok := strings.CutPrefix(p.policy, "sha256:"); ok {
			pv.Files = append(pv.Files, labelled{"policy", "policies/" + digest + ".rego"})
		}
		v.Policies = append(v.Policies, pv)
	}
	if shown := int64(len(r.policies.rows)); r.policies.n > shown {
		v.PolicyNote = fmt.Sprintf("The first %d are shown, of %s in this window. All are in entries.jsonl, type policy.loaded.", shown, number(r.policies.n))
	}
}

// or is s, or words where there is no text.
func (s said) or(words string) said {
	if s == (said{}) {
		return said{Text: words}
	}
	return s
}

func events(id, caption string, l list[*eventRow], where string) *tableView {
	t := &tableView{ID: id, Caption: caption, Head: []string{"Entry", "When", "What", "Who", "More"}}
	inWindow := int64(0)
	for _, e := range l.rows {
		what := cells(text(e.what))
		if e.window {
			inWindow++
		} else {
			what.Parts = append(what.Parts, quiet("outside the window"))
		}
		var more cell
		for _, d := range e.detail {
			more.Parts = append(more.Parts, text(d.Label+": "+d.Text))
		}
		t.add(fmt.Sprintf("%s-%d", id, e.index), cells(ref(e.index)), cells(when(e.time)...), what, cells(text(e.who)), more)
	}
	if inWindow < l.n {
		t.Note = fmt.Sprintf("The first %s of %s in this window are shown. All are in %s.", number(inWindow), number(l.n), where)
	}
	return t
}

func (r *Report) recordSection(v *view) {
	v.Upkeep = events("upkeep", "What was done with the record itself", r.upkeep, "entries.jsonl, types export.created, details.erased, hold.* and writer.added")
	types := map[string]string{}
	for t, n := range r.types {
		types[keep(string(t)).Text] = number(n)
	}
	v.Types = sortedMap(types)
}

// grave sorts the kinds: what should not happen, what a reviewer judges, and
// what shows the controls at work.
func grave(k kind) (class, words string) {
	switch k {
	case identity, shared, lateUse, unknownUse, unreadable:
		return "bad", "should not happen"
	case denied, guarded, failed, expired, void, drawn, reported:
		return "calm", "controls at work"
	}
	return "warn", "to be judged"
}

func (r *Report) exceptionSection(v *view) {
	for k := range kinds {
		x := r.exceptions[k]
		switch k {
		case noEnd:
			x = r.withoutEnd()
		case unsigned:
			x = r.unsignedAmongSigned()
		}
		w := exceptionWords[k]
		class, words := grave(k)
		t := &tableView{ID: "x-" + w.slug, Caption: w.title, Head: []string{"Entry", "When", "Who", "What", "Why"}}
		for _, row := range x.rows {
			by := cells(who(row.orchestrator, row.run, row.step)...)
			if row.person != "" {
				by.Parts = append([]*part{text(row.person)}, by.Parts...)
			}
			why := cells(text(row.why))
			if row.said != (said{}) {
				why.Parts = append(why.Parts, quote("", row.said))
			}
			t.add(fmt.Sprintf("x-%s-%d", w.slug, row.index), cells(ref(row.index)), cells(when(row.time)...), by, cells(scopeAt(row.scope, row.target)...), why)
		}
		n := x.n
		if k == refused || k == guarded { // a row may stand for several
			n = int64(len(x.rows))
			if len(x.rows) == maxRows {
				n = x.n
			}
		}
		v.Exceptions = append(v.Exceptions, exceptionView{w.slug, w.title, w.meaning, class, words, x.n, t.first(n, w.rest)})
	}
	gone := exceptionView{Slug: "missing", Title: "Texts that are gone without an erasure on record", Class: "bad", Class2: "should not happen",
		Meaning: "The record commits to a text (a reason, a name, a summary), the text is not in this export, and no entry says that it was erased. Somebody removed it outside the rules, or left it out of the export.",
		N:       v.Missing - v.Erased, Table: &tableView{ID: "x-missing", Caption: "Texts that are gone without an erasure on record", Head: []string{"Entry"}}}
	for _, i := range r.sealed.unexplained(maxRows) {
		gone.Table.add(fmt.Sprintf("x-missing-%d", i), cells(ref(i)))
	}
	gone.Table.first(gone.N, "entries.jsonl: entries whose sealed fields have no line in sealed.jsonl")
	erased := exceptionView{Slug: "erased", Title: "Erased texts", Class: "calm", Class2: "controls at work", N: v.Erased,
		Meaning: "Entries of this window whose texts were erased when their time was over. The entry stays, and the erasure is on record: see what was done with the record, below.",
		Table:   &tableView{ID: "x-erased", Caption: "Erasures", Head: []string{"Entry", "When", "What"}}}
	for _, e := range r.upkeep.rows {
		if e.what != "texts erased" {
			continue
		}
		what := cell{}
		for _, d := range e.detail {
			what.Parts = append(what.Parts, text(d.Label+": "+d.Text))
		}
		erased.Table.add(fmt.Sprintf("x-erased-%d", e.index), cells(ref(e.index)), cells(when(e.time)...), what)
	}
	v.Exceptions = append(v.Exceptions, gone, erased)
	order := map[string]int{"bad": 0, "warn": 1, "calm": 2}
	slices.SortStableFunc(v.Exceptions, func(a, b exceptionView) int { return cmp.Compare(order[a.Class], order[b.Class]) })
	for _, x := range v.Exceptions {
		if x.N > 0 {
			v.Found++
		}
	}
}

// link lets each entry that is named lead to the row that says most of it.
func link(v *view) {
	rows := map[int64]string{}
	var tables []*tableView
	tables = append(tables, v.Approvals, v.Issued, v.Steps, v.Keys, v.Upkeep)
	for _, p := range v.Policies {
		rows[p.At] = fmt.Sprintf("policy-%d", p.At)
	}
	for i := range v.Exceptions {
		if v.Exceptions[i].N > 0 {
			tables = append(tables, v.Exceptions[i].Table)
		}
	}
	for _, t := range tables {
		for _, row := range t.Rows {
			if n := row.Cells[0].Parts[0].N; row.ID != "" && rows[n] == "" {
				rows[n] = row.ID
			}
		}
	}
	for _, t := range append(tables, v.Groups, v.Reached, v.Objects, v.Masks, v.Rules, v.Scopes, v.Deciders) {
		for _, row := range t.Rows {
			for _, c := range row.Cells {
				for _, p := range c.Parts {
					if p.Kind == "ref" && rows[p.N] != "" && rows[p.N] != row.ID {
						p.Href = "#" + rows[p.N]
					}
				}
			}
		}
	}
}
