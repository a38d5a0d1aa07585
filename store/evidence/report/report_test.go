package report_test

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/net/html"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence/report"
)

var update = flag.Bool("update", false, "write the golden files")

// book is a record made by hand: what a recorder would hold, entry by entry.
type book struct {
	t       testing.TB
	now     time.Time
	entries []line
	context bool // what is added next lies outside the window
}

type line struct {
	e      *store.Entry
	opened map[string]string
	window bool
}

func newBook(t testing.TB) *book {
	return &book{t: t, now: time.Date(2026, 7, 1, 8, 0, 0, 0, time.UTC)}
}

// add puts an entry on record and returns its ID. texts are sealed.
func (b *book) add(e store.Entry, details any, texts map[string]string) string {
	e.V, e.Time, e.Writer, e.WriterTime = store.Version, store.At(b.now), "broker-1", store.At(b.now)
	e.ID = fmt.Sprintf("01981111-0000-7000-8000-%012d", len(b.entries))
	if e.Agent == "" && e.Step != "" {
		e.Agent = "spiffe://example.org/orchestrator/" + e.Orchestrator + "/run/" + e.Run + "/step/" + e.Step
	}
	if e.Agent == "" {
		e.Agent = "spiffe://example.org/recorder"
	}
	if details != nil {
		e.SetDetails(details)
	}
	for field, text := range texts {
		if e.Sealed == nil {
			e.Sealed = map[string]string{}
		}
		e.Sealed[field], _ = store.Commit(field, text)
	}
	b.entries = append(b.entries, line{&e, texts, !b.context})
	return e.ID
}

func (b *book) pass(d time.Duration) { b.now = b.now.Add(d) }

// story is one request.
type story struct {
	b       *book
	e       store.Entry
	rule    store.Rule
	intent  string
	expires time.Time
	handle  string
	mask    string
}

var dba = store.Rule{
	Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(10 * time.Minute),
	Reasons: store.RuleReasons{Requester: true, Approver: true}, Standing: &store.StandingLimit{Uses: 5, For: store.Duration(8 * time.Hour)},
}

func two(passkey bool) store.Rule {
	r := dba
	r.Groups, r.Passkey, r.Standing = []store.RuleGroup{{Group: "dba", Count: 2}}, passkey, nil
	return r
}

func (b *book) ask(n int, orchestrator, scope, target string, outcome store.Outcome, reason string, standing *store.StandingUse) *story {
	b.pass(7 * time.Minute)
	s := &story{b: b, e: store.Entry{
		Orchestrator: orchestrator, Run: fmt.Sprintf("run-%d", n/4), Step: fmt.Sprintf("step-%d", n), Request: fmt.Sprintf("req_%04d", n),
		Action: scope, Resource: target, Risk: &store.Risk{Sensitivity: "low"},
		Decision: &store.Decision{Outcome: outcome, Policy: "sha256:" + strings.Repeat("ab", 32), Reasons: []string{}},
		Subject:  &store.Subject{ID: "p-subject", Proved: n%2 == 0},
	}}
	if outcome == store.Deny {
		s.e.Decision.Reasons = []string{"the scope is not for this orchestrator"}
	}
	e := s.e
	e.Type = store.StepRequested
	b.add(e, store.RequestedDetails{Grant: store.Grant{Scope: scope, Target: target, TTL: store.Duration(5 * time.Minute)}, Standing: standing},
		map[string]string{store.SealedReason: reason, store.SealedSubject: "user:ines@example.com"})
	return s
}

// gateway is a request whose credential works on the access path.
func (b *book) gateway(n int, scope, target string, m store.Masking) *story {
	s := b.ask(n, "nightly", scope, target, store.Allow, "Reconcile refunds, OPS-1234", nil)
	last := b.entries[len(b.entries)-1].e
	last.SetDetails(store.RequestedDetails{Grant: store.Grant{Scope: scope, Target: target, TTL: store.Duration(5 * time.Minute), Delivery: "gateway",
		Access: &store.Access{Protocol: store.ProtocolPostgres, Upstream: "db.internal:5432/orders", Masking: m}}})
	s.mask = m.Digest()
	return s.issue()
}

// uses is a use on the access path, and its result: an error, empty where it
// succeeded, or "none" where it has none. It returns the use's entry ID.
func (s *story) uses(use, objects, statement, result string) string {
	id := s.add(store.CredentialUsed, store.UsedDetails{Intent: s.intent, Via: store.ViaGateway, By: "gateway", Use: use, Protocol: store.ProtocolPostgres, Conn: "c1", Objects: strings.Fields(objects), Masking: s.mask},
		map[string]string{store.SealedStatement: statement})
	if result != "none" {
		s.add(store.UseFinished, store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: id, Status: "SELECT 3", Error: result, Rows: 3, Received: 412, Masked: 6, Took: store.Duration(1200 * time.Microsecond)}}}, nil)
	}
	return id
}

func (s *story) people(rule store.Rule, reason string) *story {
	s.rule = rule
	s.add(store.ApprovalRequested, store.ApprovalRequestedDetails{Approval: "apr_" + s.e.Request, Rule: rule, Excluded: []string{}},
		map[string]string{store.SealedReason: reason, store.SealedSubject: "user:ines@example.com"})
	return s
}

func (s *story) add(t store.Type, details any, texts map[string]string) string {
	e := s.e
	e.Type, e.Decision = t, nil
	return s.b.add(e, details, texts)
}

func (s *story) decide(name, decision, reason string, signed bool, standing *store.StandingTerms) *story {
	s.b.pass(3 * time.Minute)
	d := store.DecidedDetails{Approval: "apr_" + s.e.Request, Decision: decision, Groups: []string{"dba", "sre"}, Via: "page", Standing: standing}
	if signed {
		d.Assertion = &store.Assertion{Enrolled: "01981111-0000-7000-8000-000000000001"}
	}
	e := s.e
	e.Type, e.Decision, e.Person = store.ApprovalDecided, nil, store.Ptr("p-"+name)
	if standing != nil {
		e.Type = store.ApprovalStanding
	}
	e.Agent = "spiffe://example.org/person/p-" + name
	s.b.add(e, d, map[string]string{store.SealedReason: reason, store.SealedPerson: "user:" + name})
	return s
}

func (s *story) issue() *story {
	s.b.pass(time.Second)
	s.expires = s.b.now.Add(5 * time.Minute)
	s.intent = s.add(store.CredentialIssuing, store.IssuingDetails{Attempt: 1, NotPast: store.At(s.expires)}, nil)
	if s.handle == "" {
		s.handle = "accessor-" + s.e.Request
	}
	s.add(store.CredentialIssued, store.IssuedDetails{Intent: s.intent, Attempt: 1, Kind: "vault_token", Revocable: true, Accessor: s.handle, Expires: store.At(s.expires)}, nil)
	return s
}

func (s *story) use(what string) *story {
	s.b.pass(30 * time.Second)
	s.add(store.CredentialUsed, store.UsedDetails{Intent: s.intent, Via: "introspection", By: "orders-api", Use: what}, nil)
	return s
}

func (s *story) end(t store.Type, cause string) *story {
	s.b.pass(time.Minute)
	e := s.e
	e.Type, e.Decision, e.Cause = t, nil, store.Ptr(cause)
	s.b.add(e, store.ClosedDetails{Intent: s.intent, Attempt: 1}, nil)
	return s
}

func (s *story) finish(outcome, summary string) *story {
	e := store.Entry{Type: store.StepFinished, Orchestrator: s.e.Orchestrator, Run: s.e.Run, Step: s.e.Step}
	s.b.add(e, store.FinishedDetails{Outcome: outcome}, map[string]string{store.SealedSummary: summary})
	return s
}

// forget removes the texts of the nth request of the window, as an erasure or a
// thief would, and returns its entry.
func (b *book) forget(nth int) int64 {
	for i, l := range b.entries {
		if l.window && l.e.Type == store.StepRequested {
			if nth--; nth == 0 {
				b.entries[i].opened = nil
				return int64(i)
			}
		}
	}
	b.t.Fatal("there are not so many requests")
	return 0
}

// eventful is a record that holds every kind of exception.
func eventful(t testing.TB) *book {
	b := newBook(t)
	catalogue := "version: 1\nscopes:\n  orders-db:read:\n    sensitivity: low\n    max_ttl: 15m\n  orders-db:write:\n    sensitivity: high\n    approve: 1 of dba\n"
	load := func(digest, text string) {
		b.add(store.Entry{Type: store.PolicyLoaded, Agent: "spiffe://example.org/broker/broker-1", Action: "policy.loaded"}, store.PolicyDetails{
			Digest: "sha256:" + strings.Repeat(digest, 32), Catalogue: "sha256:" + strings.Repeat(digest, 31) + "00",
			Retention: map[string]store.Duration{"high": store.Duration(7 * 8760 * time.Hour), "low": store.Duration(90 * 24 * time.Hour)},
		}, map[string]string{store.SealedCatalogue: text})
	}
	b.context = true
	load("ab", catalogue)
	ada := store.Entry{Type: store.PasskeyEnrolled, Person: store.Ptr("p-ada"), Agent: "spiffe://example.org/person/p-ada"}
	enrolled := b.add(ada, map[string]string{"credential": "k1"}, map[string]string{store.SealedPerson: "user:ada", store.SealedLabel: "blue key"})
	ada.Type = store.PasskeyActivated
	b.add(ada, store.ActivatedDetails{Enrolled: enrolled, By: "p-ben"}, nil)
	before := b.ask(0, "nightly", "orders-db:write", "postgres://orders", store.NeedsApproval, "Backfill of July, OPS-7", nil).people(dba, "Backfill of July, OPS-7")
	b.context = false

	// Begun before the window, decided in it.
	before.decide("ada", store.Approve, "Agreed in the morning's review", true, nil).issue().use("UPDATE orders").end(store.CredentialRevoked, "step finished").finish("succeeded", "31 rows")
	for n := 1; n < 9; n++ {
		s := b.ask(n, "nightly", "orders-db:read", "postgres://orders", store.Allow, "Reconcile refunds, OPS-1234", nil).issue().use("SELECT orders")
		s.end(store.CredentialRevoked, "step finished")
		b.pass(5 * time.Hour)
	}
	b.ask(10, "nightly", "vault:admin", "vault:secret", store.Deny, "I would like everything", nil)
	b.ask(11, "nightly", "orders-db:write", "postgres://orders", store.NeedsApproval, "Drop the table", nil).
		people(dba, "Drop the table").decide("ben", store.Refuse, "No. Nobody drops orders.", false, nil)
	load("cd", strings.Replace(catalogue, "approve: 1 of dba", "approve: 2 of dba\n    passkey: true", 1))
	b.ask(12, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "Correct the VAT of order 77, OPS-1301", nil).
		people(two(true), "Correct the VAT of order 77, OPS-1301").decide("ada", store.Approve, "Checked with finance", true, nil).
		decide("ben", store.Approve, "Seen by two", true, nil).issue().use("UPDATE orders").end(store.CredentialExpired, "")
	standing := &store.StandingTerms{Scopes: []string{"orders-db:write"}, Uses: 3, Until: store.At(b.now.Add(4 * time.Hour))}
	s := b.ask(13, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "Migration in three steps", nil).
		people(dba, "Migration in three steps").decide("ben", store.Approve, "For this migration", false, standing).issue().finish("succeeded", "step one is done")
	s.end(store.CredentialRevoked, "step finished").use("UPDATE orders")
	b.ask(14, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "Step two", &store.StandingUse{Request: s.e.Request, Rule: dba}).issue()
	lone := b.ask(15, "release", "vault:read", "vault:secret", store.Allow, "Read a setting", nil)
	lone.handle = s.handle
	lone.issue().finish("failed", "the setting is not there")
	lone.intent = "01981111-0000-7000-8000-00000000ffff"
	lone.use("GET secret/data/other")
	b.pass(24 * time.Hour)
	s = b.ask(16, "release", "vault:read", "vault:secret", store.Allow, "Try", nil)
	s.intent = s.add(store.CredentialIssuing, store.IssuingDetails{Attempt: 1}, nil)
	s.add(store.CredentialFailed, store.FailedDetails{Intent: s.intent, Attempt: 1, Problem: "vault-unavailable", Stage: "create the child token"}, nil)
	s = b.ask(17, "release", "vault:read", "vault:secret", store.Allow, "Try again", nil)
	s.intent = s.add(store.CredentialIssuing, store.IssuingDetails{Attempt: 1}, nil)
	s.end(store.CredentialAbandoned, "no outcome")
	s = b.ask(18, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "At night", nil).people(two(true), "At night")
	b.pass(time.Hour)
	s.add(store.ApprovalExpired, store.ExpiredDetails{Approval: "apr_" + s.e.Request}, nil)
	s = b.ask(19, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "Changed meanwhile", nil).people(dba, "Changed meanwhile")
	s.end(store.RequestVoid, "request-changed")
	s = b.ask(20, "release", "orders-db:write", "postgres://orders", store.NeedsApproval, "Not needed after all", nil).people(dba, "Not needed after all")
	s.end(store.RequestWithdrawn, "requested")
	b.ask(22, "release", "vault:read", "vault:secret", store.Allow, "Read a setting", nil).issue().finish("succeeded", "read, as I say myself").end(store.CredentialRevoked, "step finished")
	through := b.gateway(23, "orders-db:gateway", "postgres://orders", store.Masking{Rules: []store.MaskRule{{Column: "orders.email"}, {Detector: "card"}, {Path: "$.iban"}}})
	read := through.uses("SELECT orders", "orders", "SELECT * FROM orders <b>WHERE</b> id < 4", "")
	through.add(store.UseFinished, store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: read, Status: "SELECT 3", Rows: 1000}}}, nil) // a second one counts for nothing
	through.uses("SELECT orders, customers", "orders customers", "SELECT …", "42P01")
	through.uses("COPY orders", "orders", "COPY orders TO STDOUT", "none")
	through.add(store.AccessRefused, store.RefusedDetails{Method: "postgres", Route: "DELETE orders", Problem: "scope-denied", Remote: "192.0.2.9", Intent: through.intent, Reason: "statements of this kind are not let through", Folded: 3},
		map[string]string{store.SealedStatement: "DELETE FROM orders"})
	through.finish("succeeded", "all is reconciled").end(store.CredentialRevoked, "step finished")
	b.add(store.Entry{Type: store.AlertRaised, Agent: "spiffe://example.org/recorder"}, store.AlertDetails{Alert: store.AlertMint, Source: "vault-audit", Ref: "r-1", What: "auth/token/create by the broker's login"}, nil)
	e := s.e
	e.Type, e.Agent, e.Request, e.Decision = store.StepRequested, "spiffe://example.org/orchestrator/release", "req_0021", &store.Decision{Outcome: store.Allow}
	b.add(e, store.RequestedDetails{}, map[string]string{store.SealedReason: "With the orchestrator's own name"})
	b.add(store.Entry{Type: store.AccessRefused, Agent: "spiffe://example.org/unauthenticated", Action: "GET /history"},
		store.RefusedDetails{Method: "GET", Route: "/history", Problem: "unauthenticated", Remote: "192.0.2.7", Folded: 41}, nil)
	b.add(store.Entry{Type: store.AccessRefused, Person: store.Ptr("p-ines"), Action: "POST /approvals"},
		store.RefusedDetails{Role: "approver", Problem: "self-approval"}, map[string]string{store.SealedPerson: "user:ines"})
	b.add(store.Entry{Type: store.AlertRaised, Agent: "spiffe://example.org/recorder", Cause: store.Ptr("a token was made in Vault without an intent")}, map[string]string{"accessor": "a-unknown"}, nil)
	b.add(store.Entry{Type: store.FreezeSet, Person: store.Ptr("p-rosa")}, store.FreezeDetails{Orchestrator: "release"}, map[string]string{store.SealedPerson: "user:rosa", store.SealedReason: "suspicious run"})
	b.add(store.Entry{Type: store.FreezeLifted, Person: store.Ptr("p-ben")}, store.FreezeLiftedDetails{Freeze: "1"}, nil)
	bad := store.Entry{Type: store.CredentialUsed, Details: jsontext.Value(`{"intent":7}`)}
	b.add(bad, nil, nil)
	b.add(store.Entry{Type: store.HoldPlaced, Person: store.Ptr("p-rosa")}, store.HoldDetails{Run: "run-3"}, map[string]string{store.SealedReason: "Case 2026-11"})
	b.add(store.Entry{Type: store.DetailsErased}, store.ErasedDetails{Entries: []int64{b.forget(3)}, Sensitivity: "low", Kept: store.Duration(90 * 24 * time.Hour)}, nil)
	b.forget(4)
	b.add(store.Entry{Type: store.WriterAdded}, store.WriterDetails{Name: "broker-2", Method: "mtls"}, nil)
	b.add(store.Entry{Type: "weather.changed"}, map[string]string{"sky": "blue"}, nil)
	b.add(store.Entry{Type: store.ExportCreated, Person: store.Ptr("p-rita")}, store.ExportDetails{Format: "bundle", From: 5, To: int64(len(b.entries) + 1)}, map[string]string{store.SealedPerson: "user:rita"})
	return b
}

// meta is what an export of b would say.
func (b *book) meta() report.Meta {
	m := report.Meta{
		Origin: "log.example.org/countersign", Created: store.At(b.now).String(), Size: int64(len(b.entries)), Complete: true,
		Root: "h0bN4rS3wTHCoJc1nP8u2c1m8yN0bq9zQx0c0m9z1fE=", To: int64(len(b.entries)),
		Checkpoint:   "log.example.org/countersign\n" + strconv.Itoa(len(b.entries)) + "\nh0bN4rS3wTHCoJc1nP8u2c1m8yN0bq9zQx0c0m9z1fE=\n\n— log.example.org/countersign 5Qz1example\n— witness.example.net 9aQ1example\n",
		Cosignatures: []string{"witness.example.net"}, VerifierKey: "log.example.org/countersign+e58d4b52+AW1hZGUgdXAgZm9yIGEgdGVzdA==",
	}
	for i, l := range b.entries {
		if !l.window {
			m.From = int64(i) + 1
			continue
		}
		if m.FromTime == "" {
			m.FromTime = l.e.Time.String()
		}
		m.ToTime = l.e.Time.String()
	}
	return m
}

func (b *book) report() []byte {
	b.t.Helper()
	r := report.New()
	for i, l := range b.entries {
		if err := r.Take(int64(i), l.e, l.opened, l.window); err != nil {
			b.t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := r.Write(&out, b.meta()); err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}

func TestAReportOfEveryKindOfExceptionStaysAsItIs(t *testing.T) {
	got := eventful(t).report()
	golden := filepath.Join("testdata", "eventful.html")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		a, b := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				t.Fatalf("line %d is\n%s\nwant\n%s\n(go test -update writes it anew)", i+1, a[i], b[i])
			}
		}
		t.Fatalf("%d lines, want %d (go test -update writes it anew)", len(a), len(b))
	}
}

// shown parses the page and returns its text by element ID, hidden parts too.
func parse(t testing.TB, page []byte) *html.Node {
	t.Helper()
	root, err := html.Parse(bytes.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func words(n *html.Node) string {
	var b strings.Builder
	for x := range n.Descendants() {
		if x.Type == html.TextNode && x.Parent.Data != "style" {
			b.WriteString(x.Data + " ")
		}
	}
	return strings.Join(strings.Fields(b.String()), " ")
}

func attr(n *html.Node, name string) (string, bool) {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val, true
		}
	}
	return "", false
}

// found returns, by kind, how often the page says it found an exception.
func found(t testing.TB, root *html.Node) map[string]string {
	t.Helper()
	out := map[string]string{}
	for n := range root.Descendants() {
		if n.Data != "table" || n.Type != html.ElementNode {
			continue
		}
		if class, _ := attr(n, "class"); class != "index" || len(out) > 0 {
			continue
		}
		for row := range n.Descendants() {
			if row.Data != "tr" {
				continue
			}
			var cells []string
			for c := range row.ChildNodes() {
				cells = append(cells, words(c))
			}
			if len(cells) == 3 && cells[0] != "Kind" {
				out[cells[0]] = cells[1]
			}
		}
	}
	return out
}

func TestEveryKindOfExceptionIsFoundAndCounted(t *testing.T) {
	got := found(t, parse(t, eventful(t).report()))
	want := map[string]string{
		"Steps without an identity of their own":             "1",
		"One credential on record twice":                     "1",
		"Used after revocation or end":                       "1",
		"Uses of a credential whose issuance is not at hand": "1",
		"Claimed and observed differ":                        "1", // step 23's last use failed
		"Claimed but not observed":                           "2", // step 13's use came late; of step 15's the result is not known
		"Refused by a guard on the access path":              "4",
		"Denied":                                             "2",
		"Refused access":                                     "43",
		"Alerts":                                             "2",
		"Freezes set and lifted":                             "2",
		"Issuance failed":                                    "1",
		"Abandoned":                                          "1",
		"Steps reported as failed":                           "1",
		"Credentials without an end on record":               "2",
		"Approved by a single person":                        "2",
		"Approved without a passkey where others signed":     "1",
		"Standing approvals":                                 "1",
		"Requests that drew on a standing approval":          "1",
		"Expired requests":                                   "1",
		"Void requests":                                      "1",
		"Entries that this report could not read":            "1",
		"Texts that are gone without an erasure on record":   "1",
		"Erased texts":                                       "1",
	}
	for k, n := range want {
		if got[k] != n {
			t.Errorf("%s: %q, want %q", k, got[k], n)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d kinds are shown, want %d: %v", len(got), len(want), slices.Sorted(maps.Keys(got)))
	}
}

func TestWhatWasReachedIsAnsweredFromObservedUses(t *testing.T) {
	b := newBook(t)
	s := b.gateway(1, "orders-db:gateway", "postgres://orders", store.Masking{Rules: []store.MaskRule{{Field: "email"}}})
	s.uses("SELECT orders", "orders", "SELECT 1", "")
	s.uses("SELECT orders", "orders", "SELECT 2", "")
	s.uses("UPDATE orders", "orders customers", "UPDATE", "57014")
	s.uses("SELECT x", "", "SELECT x", "none")
	s.finish("failed", "a time-out")
	root := parse(t, b.report())
	for id, want := range map[string][]string{
		"objects": {"postgres://orders orders postgres 3 2 1 0 9 18", "postgres://orders customers postgres 1 0 1 0 3 6", "nothing named postgres 1 0 0 1 0 0"},
		"masking": {"the field or column email, wherever it stands orders-db:gateway 4 " + s.mask},
		"targets": {"postgres://orders orders-db:gateway 1 4 1 0"},
		"reached": {"4 of them on the access path: 2 succeeded, 1 failed, and what came of 1 is not on record. 9 rows came back, with 18 values masked",
			"claim and observation agree in 1, differ in none, and all could be compared"},
		"credentials": {"2 succeeded, 1 failed, 1 without a result on record, 9 rows, 18 values masked", "agree Claimed failed, and the last use failed (57014), 1 of 3"},
	} {
		text := words(byID(root, id))
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s lacks %q: %s", id, w, text)
			}
		}
	}
}

func TestAClaimIsObservedOnceAUseIsSeenBeforeOrAfterIt(t *testing.T) {
	b := newBook(t)
	b.ask(1, "nightly", "vault:read", "vault:secret", store.Allow, "", nil).issue().finish("succeeded", "nobody saw it")
	b.ask(2, "nightly", "vault:read", "vault:secret", store.Allow, "", nil).issue().use("GET").finish("succeeded", "seen before")
	b.ask(3, "nightly", "vault:read", "vault:secret", store.Allow, "", nil).issue().finish("succeeded", "seen after").use("GET")
	b.ask(4, "nightly", "vault:read", "vault:secret", store.Allow, "", nil).issue().finish("skipped", "nothing to do")
	root := parse(t, b.report())
	if n := found(t, root)["Claimed but not observed"]; n != "2" {
		t.Errorf("%s claims are said not to be observed, want 2", n)
	}
	text := words(byID(root, "x-unobserved"))
	if !strings.Contains(text, "nobody saw it") || strings.Contains(text, "seen") && strings.Contains(text, "after") {
		t.Errorf("the rows are %q", text)
	}
}

func byID(root *html.Node, id string) *html.Node {
	for n := range root.Descendants() {
		if v, ok := attr(n, "id"); ok && v == id {
			return n
		}
	}
	return &html.Node{}
}

func TestContextCompletesRowsAndIsNotCounted(t *testing.T) {
	b := newBook(t)
	b.context = true
	s := b.ask(1, "nightly", "orders-db:write", "postgres://orders", store.NeedsApproval, "Asked before the window", nil).people(dba, "Asked before the window")
	b.ask(2, "other", "vault:admin", "vault:secret", store.Deny, "Denied before the window", nil)
	b.context = false
	s.decide("ada", store.Approve, "Decided in it", true, nil).issue()
	b.context = true
	s.end(store.CredentialRevoked, "after the window")
	root := parse(t, b.report())
	row := words(byID(root, "approvals"))
	for _, want := range []string{"Asked before the window", "Decided in it", "user:ada"} {
		if !strings.Contains(row, want) {
			t.Errorf("the approval's row lacks %q: %s", want, row)
		}
	}
	if row := words(byID(root, "credentials")); !strings.Contains(row, "revoked: after the window") {
		t.Errorf("the credential's row does not say how it ended: %s", row)
	}
	f := found(t, root)
	if f["Denied"] != "none" || f["Credentials without an end on record"] != "none" || f["Approved by a single person"] != "1" {
		t.Errorf("the exceptions are %v", f)
	}
	if s := words(byID(root, "summary")); !strings.Contains(s, "asked for 0 credentials") {
		t.Errorf("a request from before the window is counted: %s", s)
	}
}

func TestTheSameEntriesGiveTheSameBytes(t *testing.T) {
	first := eventful(t).report()
	for range 5 {
		if !bytes.Equal(first, eventful(t).report()) {
			t.Fatal("two reports of the same entries differ")
		}
	}
}

func TestEveryLinkLeadsToARowAndNoTwoElementsShareAnID(t *testing.T) {
	root := parse(t, eventful(t).report())
	ids, links := map[string]bool{}, 0
	for n := range root.Descendants() {
		if id, ok := attr(n, "id"); ok {
			if ids[id] {
				t.Errorf("id %q twice", id)
			}
			ids[id] = true
		}
	}
	for n := range root.Descendants() {
		if href, ok := attr(n, "href"); ok && n.Data == "a" {
			links++
			if !strings.HasPrefix(href, "#") || !ids[href[1:]] {
				t.Errorf("link %q leads nowhere", href)
			}
		}
	}
	if links < 50 {
		t.Errorf("%d links", links)
	}
}

func TestAnEmptyWindowIsSaidInWords(t *testing.T) {
	b := newBook(t)
	root := parse(t, b.report())
	all := words(root)
	for _, want := range []string{
		"empty: it holds no entry", "There is no entry in this window", "No step asked for a credential in this window",
		"No request of this window needed a person's approval", "None of the 24 kinds of exceptions",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for kind, n := range found(t, root) {
		if n != "none" {
			t.Errorf("%s: %s", kind, n)
		}
	}
}

func TestAFilteredWindowSaysThatItProvesNothingOfWhatIsMissing(t *testing.T) {
	b := eventful(t)
	r := report.New()
	for i, l := range b.entries {
		if err := r.Take(int64(i), l.e, l.opened, l.window); err != nil {
			t.Fatal(err)
		}
	}
	m := b.meta()
	m.Complete, m.Filters, m.Cosignatures, m.VerifierKey = false, map[string]string{"scope": "orders-db:write"}, nil, ""
	var out bytes.Buffer
	if err := r.Write(&out, m); err != nil {
		t.Fatal(err)
	}
	all := words(parse(t, out.Bytes()))
	for _, want := range []string{"scope = orders-db:write", "nothing is proved about what is not shown", "ask for the same window without a filter", "No witness has cosigned it"} {
		if !strings.Contains(all, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(all, "nothing can be missing") {
		t.Error("a filtered window is called complete")
	}
}

// hostile is a text that tries to be markup, to turn the reading and to fill
// the page.
const hostile = "</style></title></svg>\"'><script>alert(1)</script><img src=x onerror=alert(1)>" +
	"javascript:alert(1) {{.}} \u202e\u2066\u200b\ufeff\x1b[31m\xff `${1}` <!-- \n\n\r\n &lt;b&gt; \U000e0041"

// poison puts hostile in every text of v that a writer can choose.
func poison(e *store.Entry, i int) {
	s := hostile + strconv.Itoa(i)
	e.Writer, e.Agent, e.Orchestrator, e.Run, e.Step, e.Resource, e.Action = s, s, s, s, s, s, s
	e.Cause = &s
	if e.Person != nil {
		e.Person = &s
	}
	if e.Subject != nil {
		e.Subject.ID = s
	}
	if e.Decision != nil {
		e.Decision.Policy, e.Decision.Reasons = s, []string{s, s}
	}
	// Details: every string in them, and request and type as well, so that rows
	// still find each other.
	d := string(e.Details)
	if d == "" {
		return
	}
	quoted, _ := jsontext.AppendQuote(nil, strings.ToValidUTF8(s, "?"))
	for _, word := range []string{"page", "introspection", "orders-api", "UPDATE orders", "SELECT orders", "vault_token", "dba", "sre", "succeeded", "bundle", "mtls",
		"broker-2", "create the child token", "vault-unavailable", "unauthenticated", "192.0.2.7", "run-3", "low", "a-unknown", "blue", "approver"} {
		d = strings.ReplaceAll(d, `"`+word+`"`, string(quoted))
	}
	e.Details = jsontext.Value(d)
}

// hostilePage is eventful with every text hostile.
func hostilePage(t *testing.T) []byte {
	b := eventful(t)
	for i, l := range b.entries {
		poison(l.e, i)
		for field := range l.opened {
			l.opened[field] = hostile
		}
	}
	m := b.meta()
	r := report.New()
	for i, l := range b.entries {
		if err := r.Take(int64(i), l.e, l.opened, l.window); err != nil {
			t.Fatal(err)
		}
	}
	m.Origin, m.Root, m.Checkpoint, m.Cosignatures, m.VerifierKey, m.Created = hostile, hostile, hostile, []string{hostile}, hostile, hostile
	m.FromTime, m.ToTime, m.Filters, m.Complete = hostile, hostile, map[string]string{hostile: hostile}, false
	var out bytes.Buffer
	if err := r.Write(&out, m); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestHostileTextsAreShownAndNeverTakenForMarkup(t *testing.T) {
	plain, page := eventful(t), hostilePage(t)
	known := map[string]bool{}
	for n := range parse(t, plain.report()).Descendants() {
		if n.Type == html.ElementNode {
			known[n.Data] = true
		}
	}
	shown := 0
	for n := range parse(t, page).Descendants() {
		switch n.Type {
		case html.ElementNode:
			if !known[n.Data] {
				t.Errorf("element <%s>", n.Data)
			}
			for _, a := range n.Attr {
				if strings.HasPrefix(a.Key, "on") || (a.Key == "href" || a.Key == "src") && !strings.HasPrefix(a.Val, "#") && a.Val != "data:," {
					t.Errorf("attribute %s=%q of <%s>", a.Key, a.Val, n.Data)
				}
			}
		case html.TextNode:
			if n.Parent.Data == "style" {
				continue
			}
			shown += strings.Count(n.Data, "<script>alert(1)</script>")
		}
	}
	if shown < 200 {
		t.Errorf("the hostile text is shown %d times", shown)
	}
	body := string(page)
	for i, c := range body {
		if c == unicode.ReplacementChar || unicode.In(c, unicode.Cf) || unicode.IsControl(c) && c != '\n' && c != '\t' {
			t.Fatalf("U+%04X stands in the page as it is: %q", c, body[max(0, i-60):i])
		}
	}
}

func TestLongTextsAreCutAndTheCutIsSaid(t *testing.T) {
	b := newBook(t)
	long, tall := strings.Repeat("é", 5_000)+"END", strings.Repeat("row\n", 300)+"END"
	b.ask(1, "nightly", "orders-db:write", "postgres://orders", store.NeedsApproval, long, nil).people(dba, long).decide("ada", store.Approve, tall, true, nil)
	page := b.report()
	row := words(byID(parse(t, page), "approvals"))
	for _, want := range []string{"cut here: 5003 characters in all", "cut here: 1203 characters in all"} {
		if !strings.Contains(row, want) {
			t.Errorf("the row does not say %q", want)
		}
	}
	if bytes.Contains(page, []byte("END")) {
		t.Error("a text is shown whole")
	}
	if strings.Count(row, "row") > 20 {
		t.Errorf("%d lines are shown of a tall text", strings.Count(row, "row"))
	}
}

func TestTheBeginningOfATextThatHidesNothingIsWhole(t *testing.T) {
	b := newBook(t)
	b.ask(1, "nightly", "orders-db:write", "postgres://orders", store.NeedsApproval, "", nil).people(dba, "Zażółć <gęślą> & 日本語 👩‍💻 \"quoted\"")
	if row := words(byID(parse(t, b.report()), "approvals")); !strings.Contains(row, "Zażółć <gęślą> & 日本語 👩‍💻 \"quoted\"") {
		t.Errorf("the row is %s", row)
	}
}

// TestManyEntriesAreSummedUpInBoundedMemory takes what a busy log holds, in
// which nothing repeats.
func TestManyEntriesAreSummedUpInBoundedMemory(t *testing.T) {
	const stories = 25_000 // 4 entries each
	r := report.New()
	now, index := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), int64(0)
	long := strings.Repeat("x", 10_000)
	take := func(e store.Entry, details any, opened map[string]string) {
		e.Time, e.ID = store.At(now), hex.EncodeToString(fmt.Appendf(nil, "%d", index))
		e.SetDetails(details)
		for field := range opened {
			e.Sealed = map[string]string{field: "c"}
		}
		if err := r.Take(index, &e, opened, true); err != nil {
			t.Fatal(err)
		}
		index++
	}
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range stories {
		now = now.Add(3 * time.Minute)
		e := store.Entry{
			Orchestrator: fmt.Sprintf("o-%d", n), Run: "run", Step: fmt.Sprintf("s-%d", n), Request: fmt.Sprintf("req-%d", n),
			Action: fmt.Sprintf("scope-%d", n), Resource: fmt.Sprintf("target-%d", n), Person: store.Ptr(fmt.Sprintf("p-%d", n)),
		}
		e.Agent = "spiffe://example.org/orchestrator/" + e.Orchestrator + "/run/run/step/" + e.Step
		e.Type, e.Decision = store.StepRequested, &store.Decision{Outcome: store.NeedsApproval, Reasons: []string{long}}
		take(e, store.RequestedDetails{}, map[string]string{store.SealedReason: long})
		e.Type = store.ApprovalRequested
		take(e, store.ApprovalRequestedDetails{Rule: dba}, map[string]string{store.SealedReason: long})
		e.Type = store.ApprovalDecided
		take(e, store.DecidedDetails{Decision: store.Refuse, Groups: []string{fmt.Sprintf("g-%d", n)}}, map[string]string{store.SealedPerson: long})
		e.Type = store.StepFinished
		take(e, store.FinishedDetails{Outcome: "succeeded", Target: long}, map[string]string{store.SealedSummary: long})
	}
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 24<<20 {
		t.Errorf("the report holds %d MiB after %d entries", grown>>20, index)
	}
	var out bytes.Buffer
	if err := r.Write(&out, report.Meta{To: index, Size: index, Complete: true}); err != nil {
		t.Fatal(err)
	}
	if out.Len() > 16<<20 {
		t.Errorf("the page has %d MiB", out.Len()>>20)
	}
	root := parse(t, out.Bytes())
	if got := found(t, root); got["Denied"] != "25,000" || got["Claimed and observed differ"] != "25,000" {
		t.Errorf("the counts are %v", got)
	}
	if text := words(byID(root, "summary")); !strings.Contains(text, "more than 1,000 orchestrators asked for 25,000 credentials") {
		t.Errorf("the summary is %s", text)
	}
	if !strings.Contains(words(root), "The first 200 of 25,000 are shown. All are in steps.csv") {
		t.Error("nothing says where the other rows are")
	}
}

// BenchmarkTake is what a report adds to reading a leaf.
func BenchmarkTake(b *testing.B) {
	book := newBook(b)
	for n := range 2_000 {
		book.ask(n, "nightly", "vault:read", "vault:secret", store.Allow, "Reconcile", nil).issue().use("GET").end(store.CredentialRevoked, "step finished")
	}
	r := report.New()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		l := book.entries[i%len(book.entries)]
		if err := r.Take(int64(i), l.e, l.opened, true); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	book := eventful(b)
	r := report.New()
	for i, l := range book.entries {
		if err := r.Take(int64(i), l.e, l.opened, true); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if err := r.Write(io.Discard, book.meta()); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzNoEntryBreaksTheReportOrGetsMarkupIntoIt(f *testing.F) {
	types := []store.Type{
		store.StepRequested, store.StepFinished, store.RequestWithdrawn, store.RequestVoid, store.ApprovalRequested, store.ApprovalDecided, store.ApprovalExpired,
		store.ApprovalStanding, store.CredentialIssuing, store.CredentialIssued, store.CredentialFailed, store.CredentialAbandoned, store.CredentialUsed,
		store.CredentialRevoked, store.CredentialExpired, store.AccessRefused, store.AlertRaised, store.FreezeSet, store.PasskeyEnrolled, store.PasskeyActivated,
		store.PasskeyRevoked, store.SlackLinked, store.PolicyLoaded, store.WriterAdded, store.ExportCreated, store.DetailsErased, store.HoldPlaced, store.HoldLifted,
	}
	for _, l := range eventful(f).entries {
		f.Add(uint8(max(slices.Index(types, l.e.Type), 0)), []byte(l.e.Details), hostile, l.e.Time.Unix())
	}
	f.Add(uint8(4), []byte(`{"rule":{"groups":[{"group":"a","count":20000000}],"hours":{"from":"x"}}}`), "<script>", int64(-62135596800))
	f.Add(uint8(22), []byte(`{"digest":"<script>","retention":{"":"-1ns","<img>":"9999h"}}`), "", int64(253402300799))
	f.Fuzz(func(t *testing.T, kind uint8, details []byte, text string, at int64) {
		r := report.New()
		for i, typ := range []store.Type{store.ApprovalRequested, types[int(kind)%len(types)], types[int(kind)%len(types)]} {
			e := &store.Entry{Type: typ, ID: text, Time: store.At(time.Unix(at, 0)), Agent: text, Orchestrator: text, Run: text, Step: text, Request: text,
				Action: text, Resource: text, Person: &text, Cause: &text, Details: details, Sealed: map[string]string{"reason": "c"}}
			if err := r.Take(int64(i), e, map[string]string{"reason": text, "catalogue": text}, i > 0); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		if err := r.Write(&out, report.Meta{To: 3, Complete: true}); err != nil {
			t.Fatal(err)
		}
		for n := range parse(t, out.Bytes()).Descendants() {
			if n.Data == "script" || n.Data == "img" {
				t.Fatalf("<%s> in the page", n.Data)
			}
		}
	})
}
