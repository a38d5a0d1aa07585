package review

import (
	"encoding/csv"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	xhtml "golang.org/x/net/html"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
)

var spaces = regexp.MustCompile(`\s+`)

// words are the text of a page.
func words(page string) string {
	n, err := xhtml.Parse(strings.NewReader(page))
	if err != nil {
		panic(err)
	}
	var b strings.Builder
	var walk func(*xhtml.Node)
	walk = func(n *xhtml.Node) {
		if n.Type == xhtml.TextNode {
			b.WriteString(n.Data)
		}
		if n.Type == xhtml.ElementNode && slices.Contains([]string{"dt", "dd", "div", "p", "li", "h1", "h2", "h3", "br"}, n.Data) {
			b.WriteString(" ")
		}
		for c := n.FirstChild; c != nil; c = c.NextSibling {
			walk(c)
		}
	}
	walk(n)
	return spaces.ReplaceAllString(b.String(), " ")
}

func has(t *testing.T, page string, want ...string) {
	t.Helper()
	text := words(page)
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("the page does not say %q:\n%s", w, text)
		}
	}
}

var hrefs = regexp.MustCompile(`href="([^"]*)"`)

func links(page string) (out []string) {
	for _, m := range hrefs.FindAllStringSubmatch(page, -1) {
		out = append(out, html.UnescapeString(m[1]))
	}
	return out
}

func (w *world) json(path string) *client.HistoryPage {
	w.t.Helper()
	resp, body := w.get(auth.Reviewer, "application/json", path)
	var p client.HistoryPage
	if err := json.Unmarshal([]byte(body), &p); err != nil || resp.StatusCode != http.StatusOK {
		w.t.Fatalf("%s: %s: %v\n%.300s", path, resp.Status, err, body)
	}
	return &p
}

func TestEveryFigureLeadsToExactlyTheEntriesBehindIt(t *testing.T) {
	w := newWorld(t)
	w.busy()
	for _, path := range []string{"/history", "/history?orchestrator=release-train", "/history?run=run-4711&from=2026-11-23&to=2026-11-25T00:00"} {
		page := w.page(path)
		figures := regexp.MustCompile(`<a href="([^"]*)">([^<]*)</a> <(?:span class="number"|strong)>([0-9,]+)<`).FindAllStringSubmatch(page, -1)
		bars := regexp.MustCompile(`<a href="([^"]*)" tabindex="-1"><title>[^<]*: ([0-9,]+)[^<]*</title>`).FindAllStringSubmatch(page, -1)
		if len(figures) < 5 || len(bars) < 5 {
			t.Fatalf("%s: %d figures, %d bars\n%s", path, len(figures), len(bars), words(page))
		}
		check := func(href, count string) {
			t.Helper()
			href = html.UnescapeString(href)
			want, _ := strconv.Atoi(strings.ReplaceAll(count, ",", ""))
			if got := len(w.json(href).Entries); got != want {
				t.Errorf("%s: %s says %d, and leads to %d", path, href, want, got)
			}
		}
		for _, f := range figures {
			check(f[1], f[3])
		}
		for i, b := range bars {
			if i%7 == 0 {
				check(b[1], b[2])
			}
		}
	}
}

func TestEveryLinkOfAPageLeadsSomewhere(t *testing.T) {
	w := newWorld(t)
	f := w.busy()
	seen := map[string]bool{}
	var visit func(path string, depth int)
	visit = func(path string, depth int) {
		if seen[path] || len(seen) > 250 || strings.HasPrefix(path, "#") || path == "/approvals" || path == "/passkeys" || path == "/revocations" {
			return
		}
		seen[path] = true
		resp, body := w.get(auth.Reviewer, "text/html", path)
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, resp.Status)
			return
		}
		if depth > 0 && strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
			for _, l := range links(body) {
				if !strings.HasPrefix(l, "/") {
					if !strings.HasPrefix(l, "#") {
						t.Errorf("%s leads away, to %s", path, l)
					}
					continue
				}
				visit(l, depth-1)
			}
		}
	}
	for _, path := range []string{storyURL(f.run, f.step), personURL("user:alice"), credentialURL(f.intent), "/history/17", "/history"} {
		visit(path, 2)
	}
}

func TestAStepsStoryIsToldFromRequestToLastUse(t *testing.T) {
	w := newWorld(t)
	f := w.busy()
	page := w.page(storyURL(f.run, f.step))
	has(t, page, "vault:demo-write", "nightly-billing asked to reach vault://secret/data/demo for user:u-1024@example.com only claimed",
		"2 people approved; 1 of 2 decisions are signed with a passkey, checked just now.", "1 use on record", "It ended at",
		"The policy says writes outside the change window", "Must approve 2 people of group dba", "Checked with finance. Looks right.",
		"signed with a passkey, checked just now", "not signed with a passkey", "user:alice", "user:bob", "Rotate the demo key, OPS-1234.",
		"write secret/data/demo", "orders-api, introspection", "The orchestrator says of the step: succeeded", "The key is rotated.", "Because step finished",
		"Uses seen: 1.", "Claimed, and observed agree", "Claimed succeeded at vault://secret/data/demo, and 1 use was seen.")
	text := words(page)
	last := -1
	for _, s := range []string{"The step asked, and people have to approve", "People were asked to approve", "Checked with finance", "The broker put on record that it was about to mint",
		"The credential was handed out", "The credential was used", "The credential was revoked"} {
		i := strings.Index(text, s)
		if i < last {
			t.Errorf("%q is told too early", s)
		}
		last = i
	}
	for _, path := range []string{"/history/steps/run-4711/none", "/history/steps/a%2Fb/c", "/history/credentials/none", "/history/people/user:nobody", "/history/99999", "/history/000"} {
		if resp, body := w.get(auth.Reviewer, "text/html", path); resp.StatusCode != http.StatusNotFound || !strings.Contains(body, "<h1>") {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	has(t, w.page(personURL("user:alice")), key.Pseudonym("user:alice"), "A person approved", "Decisions by people: 1", "signed with a passkey, checked just now")
	has(t, w.page(personURL(key.Pseudonym("user:bob"))), "user:bob", "not signed with a passkey")
	has(t, w.page(credentialURL(f.intent)), "Uses of credentials: 1", "The credential was used", "Vault accessor acc-"+f.request)
}

func TestAStoryTellsEachUseWithWhatCameOfIt(t *testing.T) {
	w := newWorld(t)
	f := w.path("run-1", "read-orders")
	uses := f.pass("SELECT id FROM orders WHERE note = '<script>'", "SELECT broken", "COPY orders TO STDOUT", "SELECT "+strings.Repeat("x", 5000))
	sampled := f.entry(store.UseFinished, store.Allow, store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: uses[0].ID, Status: "SELECT 3", Rows: 3, Received: 2048, Masked: 6, Took: store.Duration(1234 * time.Microsecond)}}})
	sampled.Seal(store.SealedSample, "1 | [masked]")
	refused := f.entry(store.AccessRefused, store.Allow, store.RefusedDetails{Method: "postgres", Route: "DELETE orders", Problem: "scope-denied", Remote: "192.0.2.7", Intent: f.intent, Reason: "statements of this kind are not let through", Folded: 2})
	refused.Seal(store.SealedStatement, "DELETE FROM orders")
	both := f.entry(store.UseFinished, store.Allow, store.UseFinishedDetails{Outcomes: []store.UseOutcome{
		{Use: uses[3].ID, Status: "SELECT 1", Took: store.Duration(time.Millisecond)}, {Use: uses[1].ID, Error: "42P01", Took: store.Duration(time.Millisecond)}}})
	both.Seal(store.SealedSample, store.JoinSamples([]string{`the "x" column`, ""}))
	w.append(broker, sampled, both, refused)
	f.revoke("step finished")
	f.finish("succeeded", "all is read")
	page := w.page(storyURL(f.run, f.step))
	has(t, page, "4 uses on record", "1 use failed.", "6 values masked in what came back.", "Guards refused 3 attempts before the target was reached.",
		"SELECT id FROM orders WHERE note = '<script>'", "What came of it SELECT 3, 3 rows, 6 values masked, 2,048 bytes out, 1.234ms", "What came back, masked 1 | [masked]", `What came back, masked the "x" column`,
		"What came of it failed: 42P01, 1ms", "What came of it No result of it is told here.", "Masked by the rules "+f.grant.Access.Masking.Digest(), "(goes on: 3507 more characters in the entry)",
		"A guard refused what the step asked of its target", "DELETE FROM orders", "Guard statements of this kind are not let through", "Masked the column orders.email",
		"Claimed, and observed differ", "Claimed succeeded at postgres://orders, and the last use failed (42P01), 1 of 3; 3 attempts were refused; what came of 1 use is not on record.")
	if strings.Contains(words(page), "What came of 2 uses") {
		t.Error("results that stand with their uses are told again")
	}
	has(t, w.page(credentialURL(f.intent)), "Uses of credentials: 4", "Results put on record: 2", "What came of it SELECT 3, 3 rows", "A guard refused what the step asked of its target")
	has(t, w.page("/history?type=use.finished"), "What came of 2 uses, 1 of which failed", ` the "x" column `)
	has(t, w.page("/history?type=credential.used"), "The credential was used on the access path", "COPY orders TO STDOUT")

	_, body := w.get(auth.Reviewer, "application/json", storyURL(f.run, f.step))
	var got struct {
		client.HistoryPage
		Claim *claim `json:"claim"`
	}
	ok(t, json.Unmarshal([]byte(body), &got))
	if c := got.Claim; c == nil || c.Verdict != store.Differ || c.Claimed != "succeeded" || !strings.Contains(c.Why, "42P01") || len(got.Entries) != 12 {
		t.Errorf("%+v of %d entries", c, len(got.Entries))
	}
	if _, body := w.get(auth.Reviewer, "application/json", "/history?step=read-orders"); strings.Contains(body, `"claim":`) {
		t.Error("the history itself claims something")
	}
}

func TestAStoryOfVeryManyUsesSaysHowManyAndIsJudgedWhole(t *testing.T) {
	w := newWorld(t)
	f := w.path("run-1", "flood")
	f.finish("succeeded", "done before it began")
	for range 8 {
		var statements []string
		for n := range 100 {
			statements = append(statements, fmt.Sprintf("SELECT %d", n))
		}
		uses := f.pass(statements...)
		d := store.UseFinishedDetails{}
		for _, u := range uses {
			d.Outcomes = append(d.Outcomes, store.UseOutcome{Use: u.ID, Status: "SELECT 1"})
		}
		w.append(broker, f.entry(store.UseFinished, store.Allow, d))
	}
	last := f.pass("SELECT broken")
	w.append(broker, f.entry(store.UseFinished, store.Allow, store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: last[0].ID, Error: "57014"}}}))
	page := w.page(storyURL(f.run, f.step))
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(page, "All 801 uses") && time.Now().Before(deadline); page = w.page(storyURL(f.run, f.step)) {
		time.Sleep(20 * time.Millisecond) // counted in the background
	}
	has(t, page, "More uses were seen than this page tells", "All 801 uses, as a list", "Claimed succeeded at postgres://orders, and the last use failed (57014), 1 of 801.")
	if len(page) > 2<<20 {
		t.Errorf("the page has %d bytes", len(page))
	}
}

func TestASignatureThatDoesNotHoldIsSaidSo(t *testing.T) {
	w := newWorld(t)
	k, enrolled := w.passkey("user:alice")
	other, _ := w.passkey("user:bob")
	for i, c := range []struct {
		spoil func(*store.DecidedDetails)
		by    string
		want  string
	}{
		{nil, "user:alice", "signed with a passkey, checked just now"},
		{func(d *store.DecidedDetails) { d.Assertion.Signature[9] ^= 1 }, "user:alice", "the passkey’s signature does not hold"},
		{func(d *store.DecidedDetails) { d.Groups = []string{"dba", "sre"} }, "user:alice", "signed with a passkey, checked just now"}, // groups are not signed
		{func(d *store.DecidedDetails) {
			a, c, s := other.Sign([]byte("another challenge"))
			d.Assertion = &store.Assertion{Enrolled: enrolled, AuthenticatorData: a, ClientData: c, Signature: s}
		}, "user:alice", "the passkey’s signature does not hold"},
		{nil, "user:bob", "the passkey’s signature does not hold"}, // by alice's key
	} {
		f := w.flow(fmt.Sprint("run-", i), "s", "vault:demo-write", "vault://x")
		f.reason = "because"
		f.decide(f.ask(store.RuleGroup{Group: "dba", Count: 1}), c.by, store.Approve, "fine", k, enrolled, c.spoil)
		has(t, w.page(storyURL(f.run, f.step)), c.want)
	}
}

func TestAnEntryIsShownVerbatimWithAProofThatOthersCheck(t *testing.T) {
	w := newWorld(t)
	f := w.busy()
	p := w.json("/history?request=" + f.request)
	for _, e := range p.Entries {
		path := entryURL(e.Index)
		resp, body := w.get(auth.Reviewer, "application/json", path)
		var x one
		if err := json.Unmarshal([]byte(body), &x); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(err, resp.Status)
		}
		if string(x.Entry) != string(e.Entry) || x.LeafHash != store.HashText(store.LeafHash(e.Entry)) || !strings.HasPrefix(x.Receipt, "c2sp.org/tlog-proof@v1\n") {
			t.Fatalf("entry %d is another: %s", e.Index, body)
		}
		r, err := w.ledger.Receipt(t.Context(), e.Index)
		ok(t, err)
		if _, err := w.verify.Check(*r); err != nil || r.TlogProof() != x.Receipt {
			t.Fatalf("the proof of entry %d: %v", e.Index, err)
		}
		page := html.UnescapeString(w.page(path))
		if !strings.Contains(page, "<code>"+string(e.Entry)+"</code>") || !strings.Contains(page, x.Receipt) || !strings.Contains(page, x.LeafHash) {
			t.Errorf("the page of entry %d does not have it verbatim", e.Index)
		}
		for _, text := range e.Opened {
			if !strings.Contains(page, text) {
				t.Errorf("the page of entry %d does not say %q", e.Index, text)
			}
		}
	}
	if resp, _ := w.get(auth.Reviewer, "application/json", "/history/3?run=x"); resp.StatusCode != http.StatusBadRequest {
		t.Error(resp.Status)
	}
}

func TestPagesGoBothWaysAndMeetEveryEntryOnce(t *testing.T) {
	w := newWorld(t)
	w.busy()
	all := w.json("/history?orchestrator=nightly-billing").Entries
	rows := regexp.MustCompile(`<li class="[a-z]*" id="e(\d+)">`)
	indexes := func(page string) (out []int64) {
		for _, m := range rows.FindAllStringSubmatch(page, -1) {
			n, _ := strconv.ParseInt(m[1], 10, 64)
			out = append(out, n)
		}
		return out
	}
	rel := func(page, what string) string {
		m := regexp.MustCompile(`href="([^"]*)" rel="` + what + `"`).FindStringSubmatch(page)
		if m == nil {
			return ""
		}
		return html.UnescapeString(m[1])
	}
	var got []int64
	at, last := "/history?orchestrator=nightly-billing&limit=37", ""
	for at != "" {
		page := w.page(at)
		got = append(got, indexes(page)...)
		last, at = at, rel(page, "next")
	}
	slices.Reverse(got)
	var want []int64
	for _, e := range all {
		want = append(want, e.Index)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got  %v\nwant %v", got, want)
	}
	var up []int64
	for at = last; at != ""; {
		page := w.page(at)
		shown := indexes(page)
		slices.Reverse(shown)
		up = append(up, shown...)
		at = rel(page, "prev")
	}
	if !slices.Equal(up, want) {
		t.Fatalf("upwards: got  %v\nwant %v", up, want)
	}
}

func TestJSONAndCSVArePagedByCursorAndHoldTheSame(t *testing.T) {
	w := newWorld(t)
	w.busy()
	size := int(w.ledger.Size())
	var got []int64
	at := "/history?limit=100"
	for cursor := ""; ; {
		p := w.json(at + "&cursor=" + cursor)
		for _, e := range p.Entries {
			got = append(got, e.Index)
		}
		if cursor = p.Next; cursor == "" {
			break
		}
	}
	if len(got) != size || got[0] != 0 || got[size-1] != int64(size-1) {
		t.Fatalf("%d entries of %d", len(got), size)
	}
	rows := 0
	for next := "/history?limit=100"; next != ""; {
		resp, body := w.get(auth.Reviewer, "text/csv", next)
		list, err := csv.NewReader(strings.NewReader(body)).ReadAll()
		if err != nil || resp.StatusCode != http.StatusOK || !slices.Equal(list[0], evidence.HistoryColumns) {
			t.Fatal(err, resp.Status, body)
		}
		for i, row := range list[1:] {
			if row[0] != fmt.Sprint(rows+i) {
				t.Fatalf("row %q, want entry %d", row, rows+i)
			}
		}
		rows += len(list) - 1
		next = ""
		if link, _, found := strings.Cut(resp.Header.Get("Link"), `>; rel="next"`); found {
			next = strings.TrimPrefix(link, "<")
		}
	}
	if rows != size {
		t.Errorf("%d rows of %d", rows, size)
	}
	if p := w.json("/history?before=50&limit=10"); len(p.Entries) != 10 || p.Entries[0].Index != 40 || p.Next != "40" {
		t.Errorf("%d entries from %d, next %s", len(p.Entries), p.Entries[0].Index, p.Next)
	}
	for _, bad := range []string{"limit=0", "limit=x", "cursor=-1", "cursor=01", "before=x", "before=1&cursor=2", "from=yesterday", "type=x", "outcome=x", "nonsense=1", "run=a&run=b", "run=a%20b", "format=xml", "person=%00", "target=%ff"} {
		if resp, _ := w.get(auth.Reviewer, "application/json", "/history?"+bad); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", bad, resp.Status)
		}
	}
}

func TestOthersAreRefusedEverywhereAndOnRecord(t *testing.T) {
	w := newWorld(t)
	f := w.busy()
	paths := []string{"/history", "/history/3", storyURL(f.run, f.step), personURL("user:alice"), credentialURL(f.intent), "/history/static/page.css", "/history?format=csv"}
	for _, path := range paths {
		for _, role := range append(slices.Clone(auth.Roles), "") {
			want := map[auth.Role]int{auth.Reviewer: http.StatusOK, "": http.StatusUnauthorized}[role]
			if want == 0 {
				want = http.StatusForbidden
			}
			resp, body := w.get(role, "application/json", path)
			if resp.StatusCode != want || want != http.StatusOK && strings.Contains(body, "run-47") {
				t.Errorf("%s as %q: %s", path, role, resp.Status)
			}
		}
	}
	routes := map[string]bool{}
	for _, e := range w.json("/history?type=access.refused&limit=10000").Entries {
		x, err := store.ParseLeaf(e.Entry)
		ok(t, err)
		routes[details[store.RefusedDetails](x).Route] = true
	}
	for _, r := range []string{"/history", "/history/{index:[0-9]+}", "/history/steps/{run}/{step}", "/history/people/{person}", "/history/credentials/{intent}"} {
		if !routes[r] {
			t.Errorf("no refusal at %s is on record: %v", r, routes)
		}
	}
}

func TestAPersonLogsInToTheHistoryByTheirGroupAlone(t *testing.T) {
	w := newWorld(t)
	w.busy()
	resp, _ := w.get("", "text/html", "/history?run=run-4711")
	if at := resp.Header.Get("Location"); resp.StatusCode != http.StatusSeeOther || at != w.url+"/login?next="+url.QueryEscape("/history?run=run-4711") {
		t.Fatal(resp.Status, at)
	}
	for name, want := range map[string]int{"rita": http.StatusOK, "alice": http.StatusForbidden} {
		c := w.login(name)
		req, _ := http.NewRequest(http.MethodGet, w.url+"/history", nil)
		req.Header.Set("Accept", "text/html")
		resp, err := c.Do(req)
		ok(t, err)
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want || (want == http.StatusOK) != strings.Contains(string(body), `name="csrf"`) {
			t.Errorf("%s: %s\n%.500s", name, resp.Status, body)
		}
	}
}

func TestPagesLoadNothingFromElsewhereAndRunNothing(t *testing.T) {
	w := newWorld(t)
	f := w.busy()
	for _, path := range []string{"/history", "/history/3", storyURL(f.run, f.step), personURL("user:alice"), credentialURL(f.intent), "/history?run=none", "/history?run=a%20b"} {
		resp, body := w.get(auth.Reviewer, "text/html", path)
		csp := resp.Header.Get("Content-Security-Policy")
		if !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %v", path, resp.Header)
		}
		for _, bad := range []string{"<script", "style=", "http://", "https://", " on"} {
			if bad == " on" {
				if regexp.MustCompile(`<[^>]* on[a-z]+=`).MatchString(body) {
					t.Errorf("%s has a handler", path)
				}
				continue
			}
			if strings.Contains(strings.ReplaceAll(body, "http://localhost:8788", ""), bad) {
				t.Errorf("%s has %q", path, bad)
			}
		}
	}
}

// hostile are texts that would break out of a page, or turn its reading.
var hostile = []string{
	`"><script>alert(1)</script>`, `'><img src=x onerror=alert(1)>`, `</code></pre><script>alert(1)</script>`, "\u202etxt.exe\u2066", `javascript:alert(1)`,
	`{{.Now}}`, "=HYPERLINK(\"x\")", "a\u200b\u2028", `%2e%2e/%00`, "\x1b[31m", "line\nline\r\n\ttab", "</title><svg onload=alert(1)>", strings.Repeat("W", 3000),
}

func TestHostileTextsInEveryFieldAreTextOnEveryPage(t *testing.T) {
	w := newWorld(t)
	for _, bad := range hostile {
		f := w.flow("run-1", "step-1", bad, bad)
		f.reason, f.subject = bad, bad
		f.grant.Role, f.grant.Path, f.grant.Policies = bad, bad, []string{bad}
		s := f.asked(store.Allow, bad)
		s.Agent, s.Cause = bad, store.Ptr(bad)
		w.append(broker, s)
		for _, typ := range []store.Type{store.CredentialUsed, store.AlertRaised, store.AccessRefused, store.StepFinished, store.PolicyLoaded} {
			e := f.entry(typ, store.Deny, map[string]any{"intent": bad, "via": bad, "by": bad, "use": bad, "outcome": bad, "target": bad, "method": bad, "route": bad, "problem": bad, "remote": bad, "digest": bad})
			e.Agent, e.Person, e.Cause = bad, store.Ptr(bad), store.Ptr(bad)
			e.Seal(store.SealedPerson, bad)
			e.Seal(store.SealedSummary, bad)
			e.Seal(`x"><b>`, bad)
			w.append(broker, e)
		}
	}
	paths := []string{"/history", "/history?limit=500", storyURL("run-1", "step-1")}
	for i := range w.ledger.Size() {
		paths = append(paths, entryURL(i))
	}
	for _, bad := range hostile {
		v := url.Values{"scope": {bad}, "target": {bad}}
		paths = append(paths, "/history?"+v.Encode())
		if len(bad) < 1000 {
			paths = append(paths, personURL(bad))
		}
	}
	tags := regexp.MustCompile(`(?i)<(script|img|b)\b|<svg[^>]*onload|[\x{202a}-\x{202e}\x{2066}-\x{2069}\x{200b}\x{1b}]`)
	for _, path := range paths {
		resp, body := w.get(auth.Reviewer, "text/html", path)
		if resp.StatusCode >= http.StatusInternalServerError {
			t.Errorf("%.80s: %s", path, resp.Status)
		}
		body = regexp.MustCompile(` value="[^"]*"`).ReplaceAllString(body, "") // what a form sends again, as it is
		if m := tags.FindString(body); m != "" {
			t.Errorf("%.80s has %q unescaped", path, m)
		}
		for _, l := range links(body) {
			if !strings.HasPrefix(l, "/history") && l != "/revocations" && l != "#main" {
				t.Errorf("%.80s links to %q", path, l)
			}
		}
	}
	resp, body := w.get(auth.Reviewer, "text/csv", "/history?limit=500")
	list, err := csv.NewReader(strings.NewReader(body)).ReadAll()
	if err != nil || resp.StatusCode != http.StatusOK || int64(len(list)) != w.ledger.Size()+1 {
		t.Fatal(err, resp.Status)
	}
	for _, row := range list {
		for _, cell := range row {
			if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
				t.Errorf("a spreadsheet runs %q", cell)
			}
		}
	}
}

func FuzzHistoryPage(f *testing.F) {
	w := newWorld(f)
	w.busy()
	for _, s := range []string{"", "from=2026-11-23&to=2026-11-24", "from=0001-01-01T00:00:01Z&to=9999-12-31T23:59:59Z", "before=40&limit=7", "cursor=9223372036854775807",
		"type=credential.used&outcome=deny&person=user:alice", "from=2026-11-24&to=2026-11-23", "scope=%22%3E%3Cscript%3E", "from=9999-12-31T23:59:59Z", "to=0001-01-01T00:00:00.000001Z"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if _, err := url.ParseQuery(raw); err != nil || strings.ContainsAny(raw, "\x00\r\n# ") || strings.Contains(raw, "format") {
			return
		}
		u := &url.URL{Path: "/history", RawQuery: raw}
		if _, err := url.Parse(u.String()); err != nil {
			return // no client can ask for it
		}
		w.t = t
		resp, body := w.get(auth.Reviewer, "text/html", u.String())
		if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusBadRequest {
			t.Fatalf("%s: %s", u, resp.Status)
		}
		if strings.Contains(strings.ToLower(body), "<script") {
			t.Fatalf("%s breaks out", u)
		}
	})
}

func TestBarsCoverAnyWindowWithoutGaps(t *testing.T) {
	for _, c := range []struct {
		length time.Duration
		unit   string
	}{
		{time.Second, "second"}, {50 * time.Second, "second"}, {59 * time.Minute, "minute"}, {2 * time.Hour, "5 minutes"}, {24 * time.Hour, "hour"}, {7 * 24 * time.Hour, "3 hours"},
		{30 * 24 * time.Hour, "day"}, {90 * 24 * time.Hour, "week"}, {3 * 365 * 24 * time.Hour, "month"}, {20 * 365 * 24 * time.Hour, "year"}, {200 * 365 * 24 * time.Hour, "4 years"},
	} {
		for _, from := range []time.Time{noon, noon.Add(123456789 * time.Microsecond), time.Date(2024, 2, 29, 23, 59, 59, 0, time.UTC)} {
			at, unit := bars(from, from.Add(c.length))
			if unit != c.unit {
				t.Errorf("%s: a bar for each %s, want %s", c.length, unit, c.unit)
			}
			if !at[0].Equal(from) || !at[len(at)-1].Equal(from.Add(c.length)) || len(at) < 2 || len(at) > maxBars+3 {
				t.Fatalf("%s: %d bars from %s to %s", c.length, len(at)-1, at[0], at[len(at)-1])
			}
			for i := 1; i < len(at); i++ {
				if !at[i].After(at[i-1]) {
					t.Fatalf("%s: bar %d ends at %s, begins at %s", c.length, i, at[i], at[i-1])
				}
			}
		}
	}
}

func TestAPageOfAStoppedLedgerSaysSo(t *testing.T) {
	w := newWorld(t)
	w.busy()
	w.ledger.Close()
	resp, body := w.get(auth.Reviewer, "text/html", "/history")
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "<h1>") {
		t.Fatal(resp.Status, body)
	}
}
