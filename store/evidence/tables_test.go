package evidence

import (
	"bytes"
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// told is an entry for the tables, without a ledger.
type told struct {
	e      store.Entry
	opened map[string]string
	out    bool // it is context
}

// say makes an entry at minute m of nine o'clock.
func say(m int, t store.Type, n string, details any, change func(*told)) told {
	x := told{e: store.Entry{
		V: store.Version, Type: t, Time: store.At(time.Date(2026, 7, 1, 9, m, 0, 0, time.UTC)), Agent: "spiffe://x/step/s" + n,
		Orchestrator: "demo", Run: "r", Step: "s" + n, Request: "req_" + n, Resource: "db://orders", Action: "orders:write",
		Decision: &store.Decision{Outcome: store.NeedsApproval, Policy: "sha256:aa", Reasons: []string{"sensitive", "by rule"}}, Risk: &store.Risk{Sensitivity: "high"},
	}}
	x.e.SetDetails(details)
	if change != nil {
		change(&x)
	}
	return x
}

func sealed(fields ...string) func(*told) {
	return func(x *told) {
		x.e.Sealed, x.opened = map[string]string{}, map[string]string{}
		for i := 0; i < len(fields); i += 2 {
			x.e.Sealed[fields[i]] = "commitment"
			if fields[i+1] != Erased {
				x.opened[fields[i]] = fields[i+1]
			}
		}
	}
}

// tables derives the tables of entries from index 10 on.
func tables(t *testing.T, entries ...told) (steps, approvals, uses string) {
	t.Helper()
	var s, a, u bytes.Buffer
	x := NewTables(&s, &a, &u)
	for i := range entries {
		if err := x.Take(int64(10+i), &entries[i].e, entries[i].opened, !entries[i].out); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	return s.String(), a.String(), u.String()
}

// show writes the cells of a table's rows that are not empty, by their names.
func show(t *testing.T, table string, columns []string) string {
	t.Helper()
	rows, err := csv.NewReader(strings.NewReader(table)).ReadAll()
	if err != nil || !slices.Equal(rows[0], columns) {
		t.Fatalf("%v in\n%s", err, table)
	}
	var b strings.Builder
	for _, r := range rows[1:] {
		for i, c := range r {
			if c != "" {
				fmt.Fprintf(&b, "%s=%s\n", columns[i], c)
			}
		}
		b.WriteString("--\n")
	}
	return b.String()
}

func same(t *testing.T, got, want string) {
	t.Helper()
	if got != strings.TrimLeft(want, "\n") {
		t.Errorf("got\n%s\nwant%s", got, want)
	}
}

func TestARequestWithAllThatCameOfItIsOneRow(t *testing.T) {
	subject := func(x *told) {
		sealed("reason", "+1 to refunds", "subject", "user:u-1")(x)
		x.e.Subject = &store.Subject{ID: "p-subject", Proved: true}
	}
	person := func(x *told) {
		sealed("reason", "checked", "person", "user:alice")(x)
		x.e.Person = store.Ptr("p-alice")
	}
	cause := func(x *told) { x.e.Cause = store.Ptr("step-finished") }
	finished := func(x *told) { x.e.Request, x.e.Action = "", "" }
	steps, approvals, uses := tables(t,
		say(0, store.StepRequested, "1", store.RequestedDetails{}, subject),
		say(0, store.ApprovalRequested, "1", store.ApprovalRequestedDetails{Approval: "apr_1"}, sealed("reason", "+1 to refunds")),
		say(1, store.ApprovalStanding, "1", store.DecidedDetails{Approval: "apr_1", Decision: store.Approve, Groups: []string{"dba", "sre"}, Via: "page",
			Standing: &store.StandingTerms{Scopes: []string{"orders:write"}, Uses: 3, Until: store.At(time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC))}, Assertion: &store.Assertion{Enrolled: "key-1"}}, person),
		say(2, store.CredentialIssuing, "1", store.IssuingDetails{Attempt: 1}, nil),
		say(2, store.CredentialIssued, "1", store.IssuedDetails{Intent: "i-1", Attempt: 1, Kind: "database", Revocable: true, Expires: store.At(time.Date(2026, 7, 1, 9, 30, 0, 0, time.UTC))}, nil),
		say(3, store.CredentialUsed, "1", store.UsedDetails{Intent: "i-1", Via: "introspection", By: "orders", Use: "=HYPERLINK(1)"}, nil),
		say(4, store.CredentialRevoked, "1", store.ClosedDetails{Intent: "i-1", Attempt: 1}, cause),
		say(5, store.CredentialUsed, "1", store.UsedDetails{Intent: "i-1", Via: "introspection", By: "orders", Use: "GET /"}, nil),
		say(6, store.StepFinished, "1", store.FinishedDetails{Outcome: "succeeded"}, finished),
	)
	same(t, show(t, steps, StepsColumns), `
index=10
request=req_1
run=r
step=s1
orchestrator=demo
identity=spiffe://x/step/s1
subject=user:u-1
subject_proved=true
scope=orders:write
target=db://orders
sensitivity=high
outcome=needs-approval
policy=sha256:aa
policy_reasons=sensitive; by rule
requested_reason='+1 to refunds
requested_at=2026-07-01T09:00:00.000000Z
issued_at=2026-07-01T09:02:00.000000Z
kind=database
revocable=true
expires_at=2026-07-01T09:30:00.000000Z
credentials=1
ended_at=2026-07-01T09:04:00.000000Z
ended_by=credential.revoked
cause=step-finished
uses=2
uses_after_end=1
claimed_outcome=succeeded
status=revoked
claim_verdict=agree
claim_why=Claimed succeeded, and 2 uses were seen.
--
`)
	same(t, show(t, approvals, ApprovalsColumns), `
index=12
request=req_1
run=r
step=s1
scope=orders:write
target=db://orders
person=user:alice
decision=approve
reason=checked
requested_reason='+1 to refunds
decided_at=2026-07-01T09:01:00.000000Z
signed=true
via=page
groups=dba sre
standing=3 uses of orders:write until 2026-07-01T12:00:00.000000Z
approval=apr_1
requested_index=11
passkey=key-1
--
`)
	same(t, show(t, uses, UsesColumns), `
index=15
time=2026-07-01T09:03:00.000000Z
request=req_1
run=r
step=s1
orchestrator=demo
identity=spiffe://x/step/s1
scope=orders:write
target=db://orders
via=introspection
by=orders
use='=HYPERLINK(1)
outcome=needs-approval
intent=i-1
--
index=17
time=2026-07-01T09:05:00.000000Z
request=req_1
run=r
step=s1
orchestrator=demo
identity=spiffe://x/step/s1
scope=orders:write
target=db://orders
via=introspection
by=orders
use=GET /
outcome=needs-approval
intent=i-1
--
`)
}

// statuses are index, ended_by, status and credentials of the rows.
func statuses(t *testing.T, steps string) (out []string) {
	t.Helper()
	rows, err := csv.NewReader(strings.NewReader(steps)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows[1:] {
		out = append(out, fmt.Sprint(r[stepColumn["index"]], " ", r[stepColumn["ended_by"]], " ", r[stepColumn["status"]], " ", r[stepColumn["credentials"]]))
	}
	return out
}

func TestRowsStandInTheOrderInWhichRequestsEndedAndThoseThatHadNotEndedLast(t *testing.T) {
	allowed := func(x *told) { x.e.Decision.Outcome = store.Allow }
	denied := func(x *told) { x.e.Decision.Outcome = store.Deny }
	asked := store.ApprovalRequestedDetails{Approval: "apr"}
	var all []told
	for i, t := range []store.Type{store.RequestWithdrawn, store.RequestVoid, store.ApprovalExpired} {
		n := fmt.Sprint("w", i)
		all = append(all, say(i, store.StepRequested, n, store.RequestedDetails{}, nil), say(i, store.ApprovalRequested, n, asked, nil), say(i, t, n, store.ClosedDetails{}, nil))
	}
	all = append(all, // from index 19 on
		say(10, store.StepRequested, "open", store.RequestedDetails{}, nil), say(10, store.ApprovalRequested, "open", asked, nil),
		say(11, store.StepRequested, "denied", store.RequestedDetails{}, denied),
		say(12, store.StepRequested, "refused", store.RequestedDetails{}, nil), say(12, store.ApprovalRequested, "refused", asked, nil),
		say(13, store.ApprovalDecided, "refused", store.DecidedDetails{Decision: store.Refuse}, nil),
		say(14, store.StepRequested, "again", store.RequestedDetails{}, allowed), say(14, store.CredentialIssuing, "again", store.IssuingDetails{Attempt: 1}, nil),
		say(14, store.CredentialIssued, "again", store.IssuedDetails{Attempt: 1}, nil), say(15, store.CredentialRevoked, "again", store.ClosedDetails{Attempt: 1}, nil),
		say(15, store.StepRequested, "failed", store.RequestedDetails{}, allowed), say(15, store.CredentialIssuing, "failed", store.IssuingDetails{Attempt: 1}, nil),
		say(15, store.CredentialFailed, "failed", store.FailedDetails{}, nil),
		say(16, store.CredentialIssuing, "again", store.IssuingDetails{Attempt: 2}, nil), say(16, store.CredentialIssued, "again", store.IssuedDetails{Attempt: 2}, nil),
		say(17, store.StepRequested, "lost", store.RequestedDetails{}, allowed), say(17, store.CredentialIssuing, "lost", store.IssuingDetails{Attempt: 1}, nil),
		say(18, store.CredentialAbandoned, "lost", store.ClosedDetails{}, nil),
		say(19, store.CredentialExpired, "again", store.ClosedDetails{}, nil),
	)
	steps, _, _ := tables(t, all...)
	want := []string{
		"10 request.withdrawn withdrawn 0", "13 request.void void 0", "16 approval.expired expired 0",
		"21 step.requested denied 0", "22 approval.decided denied 0", "29 credential.failed failed 0",
		"34 credential.abandoned abandoned 0", "25 credential.expired closed 2", "19  pending_approval 0",
	}
	if got := statuses(t, steps); !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
}

func TestWhatIsErasedIsSaidAndPeopleStandByPseudonym(t *testing.T) {
	gone := func(x *told) {
		sealed("reason", Erased, "person", Erased, "subject", Erased)(x)
		x.e.Subject, x.e.Person = &store.Subject{ID: "p-subject"}, store.Ptr("p-alice")
	}
	steps, approvals, _ := tables(t, say(0, store.StepRequested, "1", store.RequestedDetails{}, gone),
		say(0, store.ApprovalRequested, "1", store.ApprovalRequestedDetails{}, gone),
		say(1, store.ApprovalDecided, "1", store.DecidedDetails{Decision: store.Approve}, gone))
	for _, want := range []string{"requested_reason=(erased)\n", "subject=p-subject\n"} {
		if got := show(t, steps, StepsColumns); !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, want := range []string{"requested_reason=(erased)\n", "\nreason=(erased)\n", "person=p-alice\n", "signed=false\n"} {
		if got := show(t, approvals, ApprovalsColumns); !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

func TestAnEntryOfTheContextCompletesRowsAndHasNone(t *testing.T) {
	out := func(x *told) { x.out = true }
	asked := func(x *told) { sealed("reason", "because")(x); x.out = true }
	steps, approvals, uses := tables(t,
		say(0, store.StepRequested, "1", store.RequestedDetails{}, out), say(0, store.ApprovalRequested, "1", store.ApprovalRequestedDetails{}, asked),
		say(1, store.ApprovalDecided, "1", store.DecidedDetails{Decision: store.Approve}, nil),
		say(2, store.StepRequested, "2", store.RequestedDetails{}, nil),
		say(3, store.CredentialUsed, "1", store.UsedDetails{}, out), say(4, store.RequestWithdrawn, "2", store.ClosedDetails{}, out))
	if got := statuses(t, steps); !slices.Equal(got, []string{"13 request.withdrawn withdrawn 0"}) {
		t.Errorf("steps %q", got)
	}
	if !strings.Contains(show(t, approvals, ApprovalsColumns), "requested_reason=because\n") || show(t, uses, UsesColumns) != "" {
		t.Errorf("approvals\n%suses\n%s", approvals, uses)
	}
}

// A retry after its row was written is too late for it, and gets another.
func TestRowsThatEndedLongAgoAreWrittenAndALateRetryHasItsOwn(t *testing.T) {
	var steps bytes.Buffer
	x := NewTables(&steps, io.Discard, io.Discard)
	i := int64(0)
	take := func(s told) {
		t.Helper()
		if err := x.Take(i, &s.e, s.opened, true); err != nil {
			t.Fatal(err)
		}
		i++
	}
	text := sealed("reason", strings.Repeat("x", 64<<10))
	const n = 3 * settledBytes >> 16
	for k := range n {
		take(say(0, store.StepRequested, fmt.Sprint(k), store.RequestedDetails{}, text))
		take(say(0, store.RequestWithdrawn, fmt.Sprint(k), store.ClosedDetails{}, nil))
		if x.kept > settledBytes || len(x.requests) > 2*settledBytes>>16 {
			t.Fatalf("%d bytes and %d requests are kept", x.kept, len(x.requests))
		}
	}
	take(say(1, store.CredentialIssuing, "0", store.IssuingDetails{Attempt: 2}, nil))
	take(say(1, store.CredentialIssued, "0", store.IssuedDetails{Attempt: 2}, nil))
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	rows := statuses(t, steps.String())
	if len(rows) != n+1 || rows[0] != "0 request.withdrawn withdrawn 0" || rows[n] != fmt.Sprintf("%d  issued 1", 2*n) {
		t.Fatalf("%d rows, the first %q, the last %q", len(rows), rows[0], rows[len(rows)-1])
	}
	if len(x.requests) != 0 || len(x.byStep) != 0 {
		t.Errorf("%d requests and %d steps are kept", len(x.requests), len(x.byStep))
	}
}

func TestEntriesOutOfOrderOrWithoutDetailsAreRefused(t *testing.T) {
	x := NewTables(io.Discard, io.Discard, io.Discard)
	e := say(0, store.StepRequested, "1", store.RequestedDetails{}, nil).e
	if err := x.Take(5, &e, nil, true); err != nil {
		t.Fatal(err)
	}
	if err := x.Take(5, &e, nil, true); err == nil {
		t.Error("an entry was taken twice")
	}
	e = say(0, store.CredentialUsed, "1", nil, nil).e
	e.Details = nil
	if err := x.Take(6, &e, nil, true); err == nil {
		t.Error("a use without details was taken")
	}
}

func TestNoCellIsAFormulaWhereverItIsCut(t *testing.T) {
	for s, want := range map[string]string{
		"": "", "a": "a", "a=b": "a=b", "=1": "'=1", "-1": "'-1", "\n=1": "'\n=1", "a; b;c": "a; b;c",
		"a;=HYPERLINK(1)": "a;'=HYPERLINK(1)", "a;;+1;@x": "a;;'+1;'@x", ";-": ";'-",
	} {
		if got := Cell(s); got != want {
			t.Errorf("%q becomes %q, want %q", s, got, want)
		}
	}
}

func FuzzCell(f *testing.F) {
	for _, s := range []string{"=1+1", "+1", "-1", "@x", "\tx", "\rx", "a,b", "\"", "a\nb", "", "a;=b;'-c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c := Cell(s)
		for cell := range strings.SplitSeq(c, ";") {
			if formula(cell) {
				t.Fatalf("%q becomes %q", s, c)
			}
		}
		if strings.ReplaceAll(c, "'", "") != strings.ReplaceAll(s, "'", "") {
			t.Fatalf("%q becomes %q: its text is another", s, c)
		}
	})
}

// passing is a use on the access path, named by its entry ID.
func passing(m int, n, id string, opened ...string) told {
	return say(m, store.CredentialUsed, n, store.UsedDetails{Intent: "i-" + n, Via: store.ViaGateway, By: "gateway", Use: "SELECT orders", Protocol: "postgres", Objects: []string{"orders", "customers"}, Masking: "sha256:mm"}, func(x *told) {
		sealed(opened...)(x)
		x.e.ID = id
	})
}

func ending(m int, n string, outcomes ...store.UseOutcome) told {
	return say(m, store.UseFinished, n, store.UseFinishedDetails{Outcomes: outcomes}, nil)
}

// cellsOf are the cells of a column.
func cellsOf(t *testing.T, table string, columns []string, name string) (cells []string) {
	t.Helper()
	rows, err := csv.NewReader(strings.NewReader(table)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows[1:] {
		cells = append(cells, r[slices.Index(columns, name)])
	}
	return cells
}

func TestAUseStandsWithWhatCameOfIt(t *testing.T) {
	steps, _, uses := tables(t,
		say(0, store.StepRequested, "1", store.RequestedDetails{Grant: store.Grant{Delivery: "gateway", Access: &store.Access{Protocol: "postgres"}}}, nil),
		say(1, store.CredentialIssued, "1", store.IssuedDetails{Intent: "i-1"}, nil),
		passing(2, "1", "u-1", store.SealedStatement, "-- all\nSELECT * FROM orders"),
		passing(2, "1", "u-2", store.SealedStatement, Erased),
		say(2, store.CredentialUsed, "1", store.UsedDetails{Intent: "i-1", Via: "introspection", By: "orders", Use: "GET /"}, nil),
		passing(3, "1", "u-3"),
		ending(4, "1", store.UseOutcome{Use: "u-2", Status: "SELECT 2", Rows: 2, Sent: 20, Received: 200, Masked: 4, Took: store.Duration(1500 * time.Microsecond)},
			store.UseOutcome{Use: "u-1", Error: "42P01", Took: store.Duration(time.Millisecond)}),
		ending(5, "1", store.UseOutcome{Use: "u-1", Status: "a second one"}),
		ending(5, "2", store.UseOutcome{Use: "u-3", Status: "of another request"}),
		say(6, store.StepFinished, "1", store.FinishedDetails{Outcome: "succeeded"}, func(x *told) { x.e.Request = "" }),
	)
	got := show(t, uses, UsesColumns)
	if !strings.Contains(got, "protocol=postgres\nobjects=orders customers\nstatement='-- all\nSELECT * FROM orders\nerror=42P01\nrows=0\nsent=0\nreceived=0\nmasked=0\ntook=1ms\nmasking=sha256:mm\n--") {
		t.Errorf("a failed use:\n%s", got)
	}
	if !strings.Contains(got, "statement=(erased)\nstatus=SELECT 2\nrows=2\nsent=20\nreceived=200\nmasked=4\ntook=1.5ms\n") {
		t.Errorf("a use whose statement is erased:\n%s", got)
	}
	if at := cellsOf(t, uses, UsesColumns, "index"); !slices.Equal(at, []string{"12", "13", "14", "15"}) {
		t.Errorf("the rows are of entries %v", at)
	}
	if status := cellsOf(t, uses, UsesColumns, "status"); !slices.Equal(status, []string{"", "SELECT 2", "", ""}) {
		t.Errorf("the results are %q", status)
	}
	if v := cellsOf(t, steps, StepsColumns, "claim_verdict"); !slices.Equal(v, []string{"agree"}) { // the second result was the last
		t.Errorf("the claims are %q", v)
	}
}

func TestUsesThatWaitForTheirResultAreBounded(t *testing.T) {
	defer func(old struct{ rows, bytes int }) { maxPending = old }(maxPending)
	for name, most := range map[string]struct{ rows, bytes int }{"rows": {10, 1 << 30}, "bytes": {1 << 30, 10_000}} {
		maxPending = most
		var u bytes.Buffer
		x := NewTables(io.Discard, io.Discard, &u)
		ended := []told{}
		for n := range 200 {
			e := passing(0, "1", fmt.Sprint("u-", n), store.SealedStatement, "SELECT 1")
			if err := x.Take(int64(n), &e.e, e.opened, true); err != nil {
				t.Fatal(err)
			}
			if len(x.pending) > 16 || len(x.awaited) > 16 {
				t.Fatalf("%s: %d uses are kept", name, len(x.pending))
			}
			ended = append(ended, ending(1, "1", store.UseOutcome{Use: e.e.ID, Status: "done"}))
		}
		for n := range ended {
			if err := x.Take(int64(200+n), &ended[n].e, nil, true); err != nil {
				t.Fatal(err)
			}
		}
		if err := x.Close(); err != nil || len(x.pending)+len(x.awaited)+x.pendingBytes != 0 {
			t.Errorf("%s: %v, %d rows and %d bytes are kept at the end", name, err, len(x.pending), x.pendingBytes)
		}
		at, status := cellsOf(t, u.String(), UsesColumns, "index"), cellsOf(t, u.String(), UsesColumns, "status")
		for n := range 200 {
			if at[n] != fmt.Sprint(n) {
				t.Fatalf("%s: row %d is of entry %s", name, n, at[n])
			}
		}
		if status[0] != "" || status[199] != "done" {
			t.Errorf("%s: the first result is %q, the last %q", name, status[0], status[199])
		}
	}
}

func TestAUseThatVaultToldOfStandsWithItsFailure(t *testing.T) {
	audit := func(id string) told {
		return say(1, store.CredentialUsed, "1", store.UsedDetails{Intent: "i-1", Via: store.ViaVaultAudit, By: "vault", Use: "read secret/data/demo"}, func(x *told) { x.e.ID = id })
	}
	_, _, uses := tables(t, audit("u-1"), ending(1, "1", store.UseOutcome{Use: "u-1", Error: "permission denied"}), audit("u-2"), passing(2, "1", "u-3"), audit("u-4"))
	if got := cellsOf(t, uses, UsesColumns, "error"); !slices.Equal(got, []string{"permission denied", "", "", ""}) {
		t.Errorf("the failures are %q", got)
	}
}
