package slack

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/refusal"
)

var (
	ana = approvals.Person{Name: "user:ana", Groups: []string{"dba"}}
	bob = approvals.Person{Name: "user:bob", Groups: []string{"sre"}}
)

func TestOneMessageIsChangedInPlaceUntilTheRequestIsOver(t *testing.T) {
	w := newWorld(t)
	rule := rule()
	rule.Groups[0].Count = 2
	r := w.ask(rule, grant(), "because")
	first := w.message(r, "Approval asked")
	if first.Value(actionApprove) == "" || first.Value(actionDeny) == "" || first.Value(actionOpen) != r.URL {
		t.Fatalf("buttons: %s", first.Blocks)
	}
	if _, err := w.rooms.Decide(t.Context(), ana, r.ID, approvals.Decision{Decision: store.Approve, Reason: "fine by me", Via: "page"}); err != nil {
		t.Fatal(err)
	}
	m := w.message(r, "dba: 1 of 2")
	if !strings.Contains(m.Plain(), "Approved by user:ana") || !strings.Contains(m.Plain(), "fine by me") {
		t.Fatalf("the decision is not shown:\n%s", m.Plain())
	}
	if _, err := w.rooms.Decide(t.Context(), approvals.Person{Name: "user:cy", Groups: []string{"dba"}}, r.ID, approvals.Decision{Decision: store.Refuse, Reason: "no", Via: "page"}); err != nil {
		t.Fatal(err)
	}
	m = w.message(r, "Denied: vault:demo-write")
	if m.TS != first.TS || m.Value(actionApprove) != "" || m.Value(actionDeny) != "" || m.Value(actionOpen) != r.URL {
		t.Fatalf("%s is not %s, or still asks: %s", m.TS, first.TS, m.Blocks)
	}
}

func TestExpiryAndWithdrawalAreShown(t *testing.T) {
	w := newWorld(t)
	r, gone := w.ask(rule(), grant(), "x"), w.ask(rule(), grant(), "y")
	w.message(r, "Approval asked")
	w.message(gone, "Approval asked")
	s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.RequestWithdrawn, WriterTime: store.At(w.now()), Agent: gone.Agent,
		Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: gone.Request, Resource: gone.Target, Action: gone.Scope, Cause: store.Ptr("no longer needed")}}
	s.SetDetails(struct{}{})
	if _, err := w.ledger.Append(t.Context(), ledger.Author{Name: "broker-1"}, [][]byte{must(s.Marshal())}); err != nil {
		t.Fatal(err)
	}
	w.message(gone, "Withdrawn by the requester")
	w.advance(time.Hour + time.Minute)
	w.message(r, "Expired")
}

// Known failure: the message shows less than is granted.
func TestTheMessageShowsAllThatIsGranted(t *testing.T) {
	g := grant()
	var marks []string
	mark := func(name string) string { m := "mark-" + name; marks = append(marks, m); return m }
	numbers := 7000
	var fill func(name string, v reflect.Value)
	fill = func(name string, v reflect.Value) {
		switch v.Interface().(type) {
		case string:
			v.SetString(mark(name))
			return
		case map[string]string:
			v.Set(reflect.ValueOf(map[string]string{mark(name + "k"): mark(name + "v"), mark(name + "k2"): mark(name + "v2")}))
			return
		case store.Duration:
			numbers++
			v.SetInt(int64(time.Duration(numbers) * time.Second))
			marks = append(marks, (time.Duration(numbers) * time.Second).String())
			return
		case int:
			numbers++
			v.SetInt(int64(numbers))
			marks = append(marks, fmt.Sprint(numbers))
			return
		case bool:
			v.SetBool(!strings.HasPrefix(name, "Revocable"))
			said := map[string]string{"Revocable": "cannot be called back", "AccessHTTPUpgrade": "may be upgraded", "AccessPostgresEverywhere": "may go without one"}[name]
			if said == "" {
				t.Fatalf("Grant.%s: this test does not know how it is said", name)
			}
			marks = append(marks, said)
			return
		}
		switch v.Kind() {
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(name, v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				fill(name+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Slice:
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			for i := range 2 {
				fill(fmt.Sprint(name, i), v.Index(i))
			}
		default:
			t.Fatalf("Grant.%s is of a type that this test does not know", name)
		}
	}
	fill("", reflect.ValueOf(&g).Elem())
	r := &approvals.Request{ID: "apr_x", Status: store.StatusPending, Orchestrator: mark("orchestrator"), Run: mark("run"), Step: mark("step"), Scope: mark("scope"), Target: mark("target"),
		Agent: mark("agent"), Sensitivity: mark("sensitivity"), Grant: g, Rule: rule(), PolicyReasons: []string{mark("policy1"), mark("policy2")}, Policy: mark("digest"),
		Subject: mark("subject"), Reason: mark("reason"), Expires: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Needs: []approvals.Need{{Group: mark("group"), Count: 2, Approved: 1}},
		LeafHash: mark("leaf"), URL: "http://localhost/x"}
	marks = append(marks, "2026-01-02 03:04:05 UTC", "only claimed", "1 of 2")
	blocks, whole := message(r)
	if !whole {
		t.Fatal("it was cut")
	}
	text := slacktest.Message{Blocks: string(must(jsonOf(blocks)))}.Plain()
	view := slacktest.View{JSON: string(must(jsonOf(modal(r, store.Approve))))}.Plain()
	for _, m := range marks {
		if !strings.Contains(text, m) {
			t.Errorf("the message lacks %s", m)
		}
		if !strings.Contains(view, m) {
			t.Errorf("the modal lacks %s", m)
		}
	}
	r.SubjectProved = true
	if blocks, _ = message(r); strings.Contains(string(must(jsonOf(blocks))), "only claimed") {
		t.Error("a proved subject is said to be only claimed")
	}
}

// Known failure: a message that cuts the script where the danger begins.
func TestWhatDoesNotFitIsSaidAndCannotBeApprovedInSlack(t *testing.T) {
	w := newWorld(t)
	w.link("U0ANA", ana)
	g := grant()
	g.Params = map[string]string{"sql": strings.Repeat("SELECT 1; ", 400) + "DROP TABLE orders"}
	r := w.ask(rule(), g, "because")
	m := w.message(r, "more characters: read the whole on the page")
	if m.Value(actionApprove) != "" || m.Value(actionDeny) == "" || strings.Contains(m.Plain(), "DROP TABLE") {
		t.Fatalf("%s", m.Plain())
	}
	// Nor with a button of one's own making.
	w.post(slacktest.User{ID: "U0ANA"}.Click(actionApprove, value(r)), 200)
	w.whispered("Not all of this request fits into Slack")
	w.post(slacktest.User{ID: "U0ANA"}.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok"), 200)
	if got := w.get(r); got.Status != store.StatusPending {
		t.Fatalf("status %s", got.Status)
	}
	w.wantRefusal("not all of the request could be shown")
	w.post(slacktest.User{ID: "U0ANA"}.Submit(viewDecide, store.Refuse+" "+value(r), inputReason, "too long"), 200)
	w.message(r, "Denied")
}

// Known failure: text from the requester breaks out of its formatting.
func TestTextFromTheRequesterStaysText(t *testing.T) {
	w := newWorld(t)
	evil := "*bold* <!channel> <@U0ANA> <https://evil.example|Approve> & :tada: `x`\nApproved by user:root\ndba: 2 of 2 \u202edesrever\u2066 ``` > quote"
	g := grant()
	g.Params = map[string]string{"x": evil}
	r := w.ask(rule(), g, evil)
	m := w.message(r, "Approval asked")
	for _, bad := range []string{"<!channel>", "<@U0ANA>", "<https://", "mrkdwn", "\u202e", `\u202e`, `"emoji":true`} {
		if strings.Contains(m.Blocks, bad) || strings.Contains(m.Text, bad) {
			t.Errorf("%q is in the message: %s", bad, m.Blocks)
		}
	}
	for line := range strings.Lines(m.Plain()) {
		if strings.HasPrefix(line, "Approved by") || strings.HasPrefix(line, "dba: 2 of 2") {
			t.Errorf("a line of the requester's looks like ours: %q", line)
		}
	}
	if !strings.Contains(m.Plain(), "*bold* <!channel> <@U0ANA> <https://evil.example|Approve> & :tada: `x`⏎Approved by user:root⏎") {
		t.Errorf("a person does not read what was written:\n%s", m.Plain())
	}
}

// Known failure: a Slack account is claimed without proof.
func TestAnAccountIsLinkedOnlyByItsCodeAndAConfirmationAtThePage(t *testing.T) {
	w := newWorld(t)
	r := w.ask(rule(), grant(), "x")
	click := func(user string) { w.post(slacktest.User{ID: user}.Click(actionApprove, value(r)), 200) }
	click("U0ANA")
	w.whispered("not linked")

	// A wrong code links nothing, nor does one sent from Slack alone.
	if a := w.post(slacktest.User{ID: "U0ANA"}.Submit(viewLink, "", inputCode, "AAAA-AAAA-AAAA-AAAA"), 200); !strings.Contains(a, "No such code") {
		t.Fatal(a)
	}
	w.wantRefusal("a code to link a Slack account that is nobody's")
	code, _ := w.begin(ana)
	if a := w.post(slacktest.User{ID: "U0ANA"}.Submit(viewLink, "", inputCode, " "+strings.ToLower(code)+" "), 200); !strings.Contains(a, "user:ana") || !strings.Contains(a, "Almost") {
		t.Fatal(a)
	}
	if _, ok := w.slack.Linked(ana); ok {
		t.Fatal("linked without the page")
	}
	// The code counts once: nobody slips in between.
	if a := w.post(slacktest.User{ID: "U0EVIL"}.Submit(viewLink, "", inputCode, code), 200); !strings.Contains(a, "No such code") {
		t.Fatal(a)
	}
	if a, ok := w.slack.PendingLink(ana); !ok || a.User != "U0ANA" || a.Team != slacktest.Team || a.Name != "Real U0ANA @u0ana" {
		t.Fatalf("pending %+v %v", a, ok)
	}
	if _, ok := w.slack.PendingLink(bob); ok {
		t.Fatal("bob sees ana's link")
	}
	for _, bad := range []Account{{Team: slacktest.Team, User: "U0EVIL"}, {Team: "T0OTHER", User: "U0ANA"}} {
		if err := w.slack.ConfirmLink(t.Context(), ana, bad.Team, bad.User); !errors.Is(err, ErrNoLink) {
			t.Fatalf("%+v: %v", bad, err)
		}
	}
	if err := w.slack.ConfirmLink(t.Context(), bob, slacktest.Team, "U0ANA"); !errors.Is(err, ErrNoLink) {
		t.Fatal(err)
	}
	if err := w.slack.ConfirmLink(t.Context(), ana, slacktest.Team, "U0ANA"); err != nil {
		t.Fatal(err)
	}
	if err := w.slack.ConfirmLink(t.Context(), ana, slacktest.Team, "U0ANA"); !errors.Is(err, ErrNoLink) {
		t.Fatalf("confirmed twice: %v", err)
	}
	// The account is taken now.
	code, _ = w.begin(bob)
	w.post(slacktest.User{ID: "U0ANA"}.Submit(viewLink, "", inputCode, code), 200)
	if err := w.slack.ConfirmLink(t.Context(), bob, slacktest.Team, "U0ANA"); !errors.Is(err, ErrTaken) {
		t.Fatal(err)
	}
	// An old code is worth nothing.
	code, ends := w.begin(bob)
	w.advance(ends.Sub(w.now()) + time.Second)
	if a := w.post(slacktest.User{ID: "U0BOB"}.Submit(viewLink, "", inputCode, code), 200); !strings.Contains(a, "No such code") {
		t.Fatal(a)
	}

	// It is on record without a name, and survives a restart.
	page := must(w.ledger.History(t.Context(), ledger.Query{Type: string(store.SlackLinked)}))
	if len(page.Entries) != 1 || strings.Contains(string(page.Entries[0].Entry), "ana") || strings.Contains(string(page.Entries[0].Entry), "U0ANA") {
		t.Fatalf("on record: %v", page.Entries)
	}
	again := must(New(t.Context(), w.config()))
	defer again.Close()
	if a, ok := again.Linked(ana); !ok || a.User != "U0ANA" {
		t.Fatalf("after a restart: %+v %v", a, ok)
	}
	// And ends as it began.
	if err := w.slack.Unlink(t.Context(), ana); err != nil {
		t.Fatal(err)
	}
	last := must(New(t.Context(), w.config()))
	defer last.Close()
	if _, ok := last.Linked(ana); ok {
		t.Fatal("linked again after a restart")
	}
}

func TestCodesCannotBeTriedAtWill(t *testing.T) {
	w := newWorld(t)
	code, _ := w.begin(ana)
	for range codeTries {
		w.post(slacktest.User{ID: "U0EVIL"}.Submit(viewLink, "", inputCode, "AAAA-AAAA-AAAA-AAAA"), 200)
	}
	w.post(slacktest.User{ID: "U0EVIL"}.Submit(viewLink, "", inputCode, code), 200)
	if _, ok := w.slack.PendingLink(ana); ok {
		t.Fatal("a sixth code was looked at")
	}
}

func TestALinkedPersonDecidesThroughTheModal(t *testing.T) {
	w := newWorld(t)
	w.link("U0ANA", ana)
	rule := rule()
	rule.Reasons.Approver = true
	r := w.ask(rule, grant(), "x")
	m := w.message(r, "Approval asked")
	u := slacktest.User{ID: "U0ANA"}
	w.post(u.Click(actionApprove, m.Value(actionApprove)), 200)
	w.eventually("a modal opens", func() bool { return len(w.double.Views()) == 1 })
	v := w.double.Views()[0]
	if v.CallbackID != viewDecide || !strings.Contains(v.Plain(), "vault:demo-write") || strings.Contains(v.JSON, `"optional":true`) {
		t.Fatalf("modal %s", v.JSON)
	}
	if a := w.post(u.Submit(v.CallbackID, v.Metadata, inputReason, strings.Repeat("x", maxReason+1)), 200); !strings.Contains(a, "At most") {
		t.Fatal(a)
	}
	if a := w.post(u.Submit(v.CallbackID, v.Metadata, inputReason, "  "), 200); !strings.Contains(a, "A reason is due") {
		t.Fatal(a)
	}
	if a := w.post(u.Submit(v.CallbackID, v.Metadata, inputReason, "looks right"), 200); a != "" {
		t.Fatal(a)
	}
	got := w.get(r)
	if d := got.Decisions; got.Status != store.StatusApproved || len(d) != 1 || d[0].Person != "user:ana" || d[0].Via != "slack" || d[0].Reason != "looks right" || !slices.Equal(d[0].Groups, []string{"dba"}) {
		t.Fatalf("%+v", got)
	}
	w.message(r, "Approved, not collected yet")
	if a := w.post(u.Submit(v.CallbackID, v.Metadata, inputReason, "again"), 200); !strings.Contains(a, "does not count") {
		t.Fatal(a)
	}
}

func TestWhoMayNotDecideMayNotInSlackEither(t *testing.T) {
	w := newWorld(t)
	w.link("U0BOB", bob)
	w.link("U0SUB", approvals.Person{Name: "user:subject", Groups: []string{"dba"}})
	w.link("U0ANA", ana)
	r := w.ask(rule(), grant(), "x")
	submit := func(user string, r *approvals.Request) string {
		return w.post(slacktest.User{ID: user}.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok"), 200)
	}
	if a := submit("U0BOB", r); !strings.Contains(a, "no group") {
		t.Fatal(a)
	}
	if a := submit("U0SUB", r); !strings.Contains(a, "requester's side") {
		t.Fatal(a)
	}
	key := rule()
	key.Passkey = true
	withKey := w.ask(key, grant(), "x")
	if m := w.message(withKey, "with your passkey"); m.Value(actionApprove) != "" || m.Value(actionDeny) == "" {
		t.Fatal(m.Blocks)
	}
	if a := submit("U0ANA", withKey); !strings.Contains(a, "passkey") {
		t.Fatal(a)
	}
	for _, r := range []*approvals.Request{r, withKey} {
		if got := w.get(r); got.Status != store.StatusPending || len(got.Decisions) != 0 {
			t.Fatalf("%+v", got)
		}
	}
	w.wantRefusal("not-an-approver")
	w.wantRefusal("self-approval")
	w.wantRefusal("passkey-required")
}

func TestGroupsCountFromTheLastLoginAndForAWhile(t *testing.T) {
	w := newWorld(t)
	w.link("U0ANA", ana)
	r := w.ask(rule(), grant(), "x")
	submit := func() string {
		return w.post(slacktest.User{ID: "U0ANA"}.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok"), 200)
	}
	// She left the group; her next login says so, also after a restart.
	if err := w.slack.Login(t.Context(), approvals.Person{Name: ana.Name, Groups: []string{}}); err != nil {
		t.Fatal(err)
	}
	if a := submit(); !strings.Contains(a, "no group") {
		t.Fatal(a)
	}
	again := must(New(t.Context(), w.config()))
	defer again.Close()
	if l := again.of(ana.Name); l == nil || len(l.person.Groups) != 0 {
		t.Fatalf("%+v", l)
	}
	if err := w.slack.Login(t.Context(), ana); err != nil {
		t.Fatal(err)
	}
	// A login that says nothing new is no entry.
	before := w.ledger.Size()
	if err := errors.Join(w.slack.Login(t.Context(), ana), w.slack.Login(t.Context(), bob)); err != nil || w.ledger.Size() != before {
		t.Fatalf("%v, %d entries more", err, w.ledger.Size()-before)
	}
	w.advance(31 * 24 * time.Hour)
	r = w.ask(rule(), grant(), "x")
	if a := submit(); !strings.Contains(a, "too long ago") {
		t.Fatal(a)
	}
	w.wantRefusal("the last login at the page is too long ago")
	if err := w.slack.Login(t.Context(), ana); err != nil {
		t.Fatal(err)
	}
	if a := submit(); a != "" || w.get(r).Status != store.StatusApproved {
		t.Fatal(a)
	}
}

func TestEveryForgedCallbackIsRefusedAndOnRecord(t *testing.T) {
	w := newWorld(t)
	w.link("U0ANA", ana)
	r, page := w.ask(rule(), grant(), "x"), rule()
	page.Slack = false
	onPage := w.ask(page, grant(), "x")
	if m := w.message(onPage, "not decided in Slack"); m.Value(actionApprove) != "" || m.Value(actionDeny) != "" {
		t.Fatal(m.Blocks)
	}
	other := w.ask(rule(), grant(), "another")
	u := slacktest.User{ID: "U0ANA"}
	good := u.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok")
	soon := func() time.Time { return time.Now().Add(time.Second) }
	replayed := u.Click(actionOpen, "open")
	replay := slacktest.Sign(slacktest.SigningSecret, soon(), replayed)
	if status, _, err := slacktest.PostWith(w.url, replayed, replay); err != nil || status != 200 {
		t.Fatal(status, err)
	}
	upper := replay.Clone()
	upper.Set("X-Slack-Signature", "v0="+strings.ToUpper(strings.TrimPrefix(replay.Get("X-Slack-Signature"), "v0=")))
	for name, c := range map[string]struct {
		body   []byte
		header http.Header
		status int
		why    string
	}{
		"bad signature":              {good, slacktest.Sign("another secret", soon(), good), 401, "the signature is not Slack's"},
		"no signature":               {good, http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, 401, "the callback is not signed"},
		"signature of another body":  {good, slacktest.Sign(slacktest.SigningSecret, soon(), []byte("payload={}")), 401, "the signature is not Slack's"},
		"old timestamp":              {good, slacktest.Sign(slacktest.SigningSecret, time.Now().Add(-6*time.Minute), good), 401, "older than five minutes"},
		"from before the start":      {good, slacktest.Sign(slacktest.SigningSecret, w.slack.started.Add(-2*time.Second), good), 401, "older than this process"},
		"replay":                     {replayed, replay, 401, "the callback was taken before"},
		"replay, written otherwise":  {replayed, upper, 401, "the callback was taken before"},
		"too long":                   {slices.Concat(good, make([]byte, maxCallback)), http.Header{}, 413, "the callback is too long"},
		"not a payload":              {[]byte("x=y"), slacktest.Sign(slacktest.SigningSecret, soon(), []byte("x=y")), 400, "the form has no payload"},
		"unlinked user":              {slacktest.User{ID: "U0EVIL"}.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok"), nil, 200, "the Slack account is not linked"},
		"wrong team":                 {slacktest.User{ID: "U0ANA", Team: "T0OTHER"}.Submit(viewDecide, store.Approve+" "+value(r), inputReason, "ok"), nil, 403, "another Slack team"},
		"value of nothing":           {u.Click(actionApprove, "x"), nil, 200, "the action names no approval"},
		"value of another's words":   {u.Click(actionApprove, r.ID+" "+other.LeafHash), nil, 200, "other than what is on record"},
		"modal of another's words":   {u.Submit(viewDecide, store.Approve+" "+r.ID+" "+other.LeafHash, inputReason, "x"), nil, 200, "other than what is on record"},
		"modal without decision":     {u.Submit(viewDecide, "maybe "+value(r), inputReason, "x"), nil, 200, "the modal names no decision"},
		"approval that is none":      {u.Click(actionDeny, "apr_none "+r.LeafHash), nil, 200, "there is no such approval"},
		"scope not decided in Slack": {u.Submit(viewDecide, store.Refuse+" "+value(onPage), inputReason, "x"), nil, 200, "the scope is not decided in Slack"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.header == nil {
				c.header = slacktest.Sign(slacktest.SigningSecret, soon(), c.body)
			}
			before := len(w.refusals())
			status, answer, err := slacktest.PostWith(w.url, c.body, c.header)
			if err != nil || status != c.status {
				t.Fatalf("answered %d %s, %v; want %d", status, answer, err, c.status)
			}
			if got := w.refusals(); len(got) != before+1 || !strings.Contains(got[len(got)-1], c.why) {
				t.Fatalf("on record: %q", got[before:])
			}
		})
	}
	for _, what := range []string{"This button was altered", "There is no such request"} {
		w.whispered(what)
	}
	for _, r := range []*approvals.Request{r, onPage, other} {
		if got := w.get(r); got.Status != store.StatusPending || len(got.Decisions) != 0 {
			t.Fatalf("%+v", got)
		}
	}
	// Who it was is sealed where Slack is proved, and nobody is named where not.
	for _, h := range must(w.ledger.History(t.Context(), ledger.Query{Type: string(store.AccessRefused)})).Entries {
		if strings.Contains(string(h.Entry), "U0ANA") || strings.Contains(string(h.Entry), "U0EVIL") {
			t.Fatalf("a Slack user stands in a leaf: %s", h.Entry)
		}
	}
	if strings.Contains(fmt.Sprint(w.refusals()), slacktest.SigningSecret) {
		t.Fatal("the secret is on record")
	}
}

func TestAFloodOfForgedCallbacksIsFolded(t *testing.T) {
	w := newWorld(t)
	const n = 300
	for range n {
		if status, _, err := slacktest.PostWith(w.url, []byte("payload={}"), http.Header{}); err != nil || status != 401 {
			t.Fatal(status, err)
		}
	}
	w.slack.Close()
	total, entries := 0, 0
	for _, h := range must(w.ledger.History(t.Context(), ledger.Query{Type: string(store.AccessRefused)})).Entries {
		d := must(store.DetailsAs[store.RefusedDetails](must(store.ParseLeaf(h.Entry))))
		entries, total = entries+1, total+1+d.Folded
	}
	if total != n || entries > refusal.Burst+30 {
		t.Fatalf("%d entries stand for %d refusals", entries, total)
	}
}

func TestRateLimitsAreHonoured(t *testing.T) {
	w := newWorld(t)
	w.double.Fail("chat.postMessage", slacktest.Failure{Status: 429, RetryAfter: 1})
	began := time.Now()
	r := w.ask(rule(), grant(), "x")
	w.message(r, "Approval asked")
	if d := time.Since(began); d < time.Second || w.double.Calls("chat.postMessage") != 2 {
		t.Fatalf("%d calls within %v", w.double.Calls("chat.postMessage"), d)
	}
}

func TestAnAnswerThatIsLostLeavesOneMessage(t *testing.T) {
	for name, f := range map[string]slacktest.Failure{"cut": {Done: true}, "error after the work": {Error: "internal_error"}, "server error": {Status: 502}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			// Another app's message with our metadata is not ours.
			r := w.ask(rule(), grant(), "first")
			w.message(r, "Approval asked")
			w.double.Fail("chat.postMessage", f)
			r = w.ask(rule(), grant(), "x")
			w.double.Say(slacktest.Message{Channel: slacktest.Channel, Bot: "B0OTHER", Metadata: fmt.Sprintf(`{"event_type":%q,"event_payload":{"id":%q}}`, eventType, r.ID)})
			m := w.message(r, "Approval asked")
			if _, err := w.rooms.Decide(t.Context(), ana, r.ID, approvals.Decision{Decision: store.Refuse, Reason: "no", Via: "page"}); err != nil {
				t.Fatal(err)
			}
			if last := w.message(r, "Denied"); last.TS != m.TS {
				t.Fatalf("another message: %s, %s", m.TS, last.TS)
			}
			if w.double.Calls("conversations.history") == 0 {
				t.Fatal("nobody looked for the message")
			}
		})
	}
}

func TestAMessageThatSomebodyDeletedIsSentAnew(t *testing.T) {
	w := newWorld(t)
	r := w.ask(rule(), grant(), "x")
	m := w.message(r, "Approval asked")
	w.double.Remove(m.TS)
	if _, err := w.rooms.Decide(t.Context(), ana, r.ID, approvals.Decision{Decision: store.Refuse, Reason: "no", Via: "page"}); err != nil {
		t.Fatal(err)
	}
	w.message(r, "Denied")
}

func TestSlackBeingDownDelaysNobody(t *testing.T) {
	w := newWorld(t)
	w.double.Down(true)
	began := time.Now()
	r := w.ask(rule(), grant(), "x")
	if got, err := w.rooms.Decide(t.Context(), ana, r.ID, approvals.Decision{Decision: store.Approve, Reason: "ok", Via: "page"}); err != nil || got.Status != store.StatusApproved {
		t.Fatal(got, err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Fatalf("took %v", d)
	}
	w.double.Down(false)
	w.message(r, "Approved, not collected yet")
}

func TestTheLookForSentMessagesGoesThroughAllPages(t *testing.T) {
	w := newWorld(t)
	r := w.ask(rule(), grant(), "x")
	m := w.message(r, "Approval asked")
	for range 450 {
		w.double.Say(slacktest.Message{Channel: slacktest.Channel, Bot: "B0OTHER"})
	}
	w.outbox.Close()
	w.file += ".new" // the outbox is lost
	w.start()
	if _, err := w.rooms.Decide(t.Context(), ana, r.ID, approvals.Decision{Decision: store.Refuse, Reason: "no", Via: "page"}); err != nil {
		t.Fatal(err)
	}
	if last := w.message(r, "Denied"); last.TS != m.TS || w.double.Calls("conversations.history") < 3 {
		t.Fatalf("%s, %s, %d pages", m.TS, last.TS, w.double.Calls("conversations.history"))
	}
}

func TestAPersonIsToldOfAPasskeyInTheLinkedAccountAlone(t *testing.T) {
	w := newWorld(t)
	d := outbox.Delivery{Passkey: &approvals.Passkey{ID: "k1", Person: ana.Name, Label: "my <key>", Enrolled: time.Now()}, Version: "enrolled"}
	if _, err := w.slack.Send(t.Context(), d); err != nil || len(w.double.Messages()) != 0 {
		t.Fatalf("somebody was told of a key whose owner linked nothing: %v", err)
	}
	w.link("U0ANA", ana)
	if _, err := w.slack.Send(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if m := w.double.Messages(); len(m) != 1 || m[0].Channel != "U0ANA" || !strings.Contains(m[0].Text, `"my &lt;key&gt;"`) {
		t.Fatalf("%+v", m)
	}
}

func TestAnOwnerWhoCannotBeToldKeepsNoRequestFromTheChannel(t *testing.T) {
	w := newWorld(t)
	w.link("U0ANA", ana)
	w.double.Fail("chat.postMessage", slacktest.Failure{Error: "channel_not_found"})
	var f *outbox.Failure
	_, err := w.slack.Send(t.Context(), outbox.Delivery{Passkey: &approvals.Passkey{ID: "k1", Person: ana.Name}, Version: "revoked"})
	if !errors.As(err, &f) || f.Down {
		t.Fatalf("%v: Slack as a whole is taken to be down", err)
	}
}

func TestAConfigurationThatCannotBeMeantIsRefused(t *testing.T) {
	w := newWorld(t)
	for name, alter := range map[string]func(*Config){
		"no token": func(c *Config) { c.Token = "" }, "no secret": func(c *Config) { c.SigningSecret = "" }, "a channel's name": func(c *Config) { c.Channel = "#general" },
		"no team": func(c *Config) { c.Team = "" }, "in the clear": func(c *Config) { c.APIURL = "http://slack.com/api/" }, "no key": func(c *Config) { c.PrivacyKey = nil },
	} {
		c := w.config()
		alter(&c)
		if _, err := New(context.Background(), c); err == nil || strings.Contains(err.Error(), slacktest.SigningSecret) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := w.config()
	c.Token = "xoxb-wrong"
	s := must(New(t.Context(), c))
	defer s.Close()
	if err := s.Check(t.Context()); err == nil || strings.Contains(err.Error(), "xoxb-wrong") {
		t.Error(err)
	}
	if err := w.slack.Check(t.Context()); err != nil {
		t.Error(err)
	}
}
