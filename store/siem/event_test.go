package siem

import (
	"bytes"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store"
)

var update = flag.Bool("update", false, "write testdata/events.jsonl anew")

var product1 = Product{Version: "v1.2.3", Log: "log.example.test/ledger"}

// samples are an entry of each type, as the product writes them.
func samples() (list []*store.Entry) {
	at := store.At(time.Date(2026, 11, 23, 12, 0, 0, 123456000, time.UTC))
	person, by := "p-alice", "p-bob"
	grant := store.Grant{Scope: "orders-db:read", Target: "postgres://orders", Engine: "database", Policies: []string{"orders-read"},
		Params: map[string]string{}, TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}
	details := map[store.Type]any{
		store.StepRequested:     store.RequestedDetails{Grant: grant, Join: "hmac-sha256:x", Body: "hmac-sha256:y"},
		store.StepFinished:      store.FinishedDetails{Outcome: "failed", Target: "orders"},
		store.ApprovalRequested: store.ApprovalRequestedDetails{Approval: "apr_1", Grant: grant, Rule: store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}}, Excluded: []string{}},
		store.ApprovalDecided:   store.DecidedDetails{Approval: "apr_1", Requested: "x", Decision: store.Refuse, Groups: []string{"dba"}, Via: "page"},
		store.ApprovalStanding: store.DecidedDetails{Approval: "apr_1", Requested: "x", Decision: store.Approve, Groups: []string{"dba"}, Via: "page",
			Standing: &store.StandingTerms{Scopes: []string{"orders-db:read"}, Uses: 3, Until: at}},
		store.ApprovalExpired:     store.ExpiredDetails{Approval: "apr_1"},
		store.CredentialIssuing:   store.IssuingDetails{Attempt: 1, Grant: grant.Digest(), NotPast: at},
		store.CredentialIssued:    store.IssuedDetails{Intent: "intent-1", Attempt: 1, Kind: "database", Revocable: true, Accessor: "acc", LeaseID: "database/creds/x/y", Expires: at},
		store.CredentialFailed:    store.FailedDetails{Intent: "intent-1", Attempt: 1, Problem: "vault-unavailable", Stage: "token"},
		store.CredentialAbandoned: store.ClosedDetails{Intent: "intent-1", Attempt: 1},
		store.CredentialUsed:      store.UsedDetails{Intent: "intent-1", Via: "introspection", By: "orders-api", Use: "GET /orders"},
		store.CredentialRevoked:   store.ClosedDetails{Intent: "intent-1", Attempt: 1},
		store.CredentialExpired:   store.ClosedDetails{Intent: "intent-1", Attempt: 1},
		store.AccessRefused:       store.RefusedDetails{Method: "GET", Route: "/history", Role: "writer", Problem: "role-forbidden", Remote: "192.0.2.7", Folded: 4},
		store.UseFinished:         store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: "use-1", Status: "SELECT 3", Rows: 3, Masked: 3, Took: store.Duration(time.Millisecond)}}},
		store.AlertRaised:         store.AlertDetails{Alert: store.AlertMint, Source: "vault-audit", Ref: "v-1", What: "auth/token/create"},
		store.FreezeSet:           map[string]string{"run": "run-1"},
		store.FreezeLifted:        map[string]string{"freeze": "f-1"},
		store.PasskeyEnrolled:     store.EnrolledDetails{Credential: "Y3JlZA", Key: []byte{1}, RPID: "approve.example.test", Issuer: "https://id.example.test", ProviderKey: []byte("{}")},
		store.PasskeyActivated:    store.ActivatedDetails{Enrolled: "e-1", By: by},
		store.PasskeyRevoked:      store.PasskeyRevokedDetails{Enrolled: "e-1", By: by},
		store.SlackLinked:         map[string]string{"team": "T1", "user": "U1"},
		store.PolicyLoaded:        store.PolicyDetails{Digest: "sha256:aa", Catalogue: "sha256:bb"},
		store.WriterAdded:         store.WriterDetails{Name: "broker-1", Method: "token"},
		store.ExportCreated:       store.ExportDetails{Format: "bundle", From: 0, To: 17, Filters: map[string]string{}},
		store.DetailsErased:       store.ErasedDetails{Entries: []int64{1, 2}, Sensitivity: "low", Kept: store.Duration(time.Hour)},
		store.HoldPlaced:          store.HoldDetails{Run: "run-1"},
		store.HoldLifted:          store.HoldLiftedDetails{Hold: "hold-1"},
	}
	types := slices.Clone(knownTypes)
	slices.Sort(types)
	add := func(t store.Type, change func(*store.Entry)) {
		e := &store.Entry{V: 1, ID: "0190a6e0-0000-7000-8000-000000000001", Type: t, Time: at, Writer: "broker-1", WriterTime: at,
			Agent: "spiffe://example.test/orchestrator/demo/run/run-1/step/s1", Subject: &store.Subject{ID: "p-carol", Proved: true},
			Orchestrator: "demo", Run: "run-1", Step: "s1", Request: "req_1", Resource: "postgres://orders", Action: "orders-db:read",
			Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:aa", Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"},
			Sealed: map[string]string{"reason": "commitment"}}
		if strings.HasPrefix(string(t), "approval.") || strings.HasPrefix(string(t), "passkey.") {
			e.Person = &person
		}
		if d := details[t]; d != nil {
			e.SetDetails(d)
		}
		if change != nil {
			change(e)
		}
		list = append(list, e)
	}
	for _, t := range types {
		add(t, nil)
	}
	add(store.StepRequested, func(e *store.Entry) { e.Decision.Outcome = store.Deny })
	add(store.AccessRefused, func(e *store.Entry) {
		e.SetDetails(store.RefusedDetails{Method: "POST", Route: "/append", Problem: "unauthenticated", Remote: "192.0.2.9"})
		e.Agent, e.Orchestrator = "spiffe://example.test/unauthenticated", ""
	})
	add(store.CredentialRevoked, func(e *store.Entry) { e.Cause = store.Ptr("step-finished") })
	for _, d := range []store.RefusedDetails{
		{Method: "http", Route: "POST /orders/*", Reason: "no route allows this"}, {Method: "http", Route: "PATCH /orders/*", Remote: "192.0.2.7"},
		{Method: "postgres", Route: "DELETE orders", Reason: "statements of this kind are not let through", Remote: "192.0.2.7"}, {Method: "postgres", Route: "DO"},
		{Method: "mcp", Route: "tools/call refund", Reason: "the tool is not allowed"},
	} {
		d.Problem, d.Intent = "scope-denied", "intent-1"
		add(store.AccessRefused, func(e *store.Entry) { e.SetDetails(d) })
	}
	add(store.UseFinished, func(e *store.Entry) {
		e.SetDetails(store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: "use-1", Status: "200"}, {Use: "use-2", Error: store.UseTimeout}}})
	})
	add("gateway.invented", func(e *store.Entry) { e.Details = []byte(`{"new":1}`) })
	return list
}

func TestEachTypeOfEntryHasItsEvent(t *testing.T) {
	var got bytes.Buffer
	for i, e := range samples() {
		leaf, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		b, err := Event(int64(i), leaf, e, map[string]string{"reason": "SECRET TEXT"}, product1)
		if err != nil {
			t.Fatal(err)
		}
		got.Write(append(b, '\n'))
	}
	const file = "testdata/events.jsonl"
	if *update {
		if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines, wanted := strings.Split(got.String(), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(lines), len(wanted)) {
		if i >= len(lines) || i >= len(wanted) || lines[i] != wanted[i] {
			t.Fatalf("line %d is another (run with -update and look at the difference):\n%s", i+1, lines[min(i, len(lines)-1)])
		}
	}
}

func TestEveryTypeOfTheRecordIsMapped(t *testing.T) {
	for _, typ := range []store.Type{
		store.StepRequested, store.StepFinished, store.RequestWithdrawn, store.RequestVoid, store.ApprovalRequested,
		store.ApprovalDecided, store.ApprovalExpired, store.ApprovalStanding, store.CredentialIssuing, store.CredentialIssued,
		store.CredentialFailed, store.CredentialAbandoned, store.CredentialUsed, store.UseFinished, store.CredentialRevoked, store.CredentialExpired,
		store.AccessRefused, store.AlertRaised, store.FreezeSet, store.FreezeLifted, store.PasskeyEnrolled, store.PasskeyActivated,
		store.PasskeyRevoked, store.SlackLinked, store.PolicyLoaded, store.WriterAdded, store.ExportCreated, store.DetailsErased,
		store.HoldPlaced, store.HoldLifted,
	} {
		if _, ok := mappings[typ]; !ok {
			t.Errorf("%s has no mapping", typ)
		}
	}
	for typ := range mappings {
		if !typ.Known() {
			t.Errorf("%s is mapped, and no type of the record", typ)
		}
	}
}

func TestTheDocumentedTableIsTheOneInForce(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for typ, m := range mappings {
		row := "| `" + string(typ) + "` | " + className(m.class)
		if !strings.Contains(string(b), row) {
			t.Errorf("docs/operations.md has no row %q", row)
		}
	}
}

func className(class int) string {
	return map[int]string{classDetection: "Detection Finding 2004", classAccount: "Account Change 3001", classAuthorize: "Authorize Session 3003",
		classEntity: "Entity Management 3004", classUserAccess: "User Access Management 3005", classAPI: "API Activity 6003"}[class]
}

// TestAGuardsRefusalHasWhatItsClassRequires follows the schema of HTTP Activity
// and Datastore Activity, https://schema.ocsf.io/1.5.0/classes.
func TestAGuardsRefusalHasWhatItsClassRequires(t *testing.T) {
	seen := map[int]int{}
	for _, e := range samples() {
		if e.Type != store.AccessRefused || !bytes.Contains(e.Details, []byte(`"intent"`)) {
			continue
		}
		leaf, _ := e.Marshal()
		b, err := Event(1, leaf, e, nil, product1)
		if err != nil {
			t.Fatal(err)
		}
		var ev struct {
			Class    int            `json:"class_uid"`
			Activity int            `json:"activity_id"`
			Name     string         `json:"activity_name"`
			Status   int            `json:"status_id"`
			Actor    map[string]any `json:"actor"`
			Source   map[string]any `json:"src_endpoint"`
			To       map[string]any `json:"dst_endpoint"`
			Request  map[string]any `json:"http_request"`
			Database map[string]any `json:"database"`
			API      map[string]any `json:"api"`
		}
		if err := json.Unmarshal(b, &ev); err != nil {
			t.Fatal(err)
		}
		seen[ev.Class]++
		ok := ev.Actor != nil && ev.Source != nil && ev.Status == failure && ev.Activity > 0 && ev.Name != ""
		switch ev.Class {
		case classHTTP:
			ok = ok && ev.To != nil && ev.Request["http_method"] != nil
		case classDatastore:
			ok = ok && ev.Database["name"] == "postgres://orders" && ev.Database["type_id"] == 1.0
		case classAPI:
			ok = ok && ev.API["operation"] != nil
		default:
			ok = false
		}
		if !ok {
			t.Errorf("%s", b)
		}
	}
	if seen[classHTTP] != 2 || seen[classDatastore] != 2 || seen[classAPI] != 1 {
		t.Errorf("the classes are %v", seen)
	}
}

func TestTextsLeaveOnlyWhenToldToAndNeverIDTokensOrPolicies(t *testing.T) {
	e := samples()[0]
	opened := map[string]string{}
	e.Sealed = map[string]string{}
	for _, f := range []string{store.SealedReason, store.SealedSubject, store.SealedSummary, store.SealedPerson, store.SealedLabel, store.SealedIDToken, store.SealedCatalogue, store.SealedPolicy, store.SealedStatement, store.SealedSample} {
		opened[f], e.Sealed[f] = "TEXT-"+f, "commitment"
	}
	leaf, _ := e.Marshal()
	without, err := Event(1, leaf, e, opened, product1)
	if err != nil || bytes.Contains(without, []byte("TEXT-")) {
		t.Fatalf("texts left without being told to: %v\n%s", err, without)
	}
	p := product1
	p.IncludeTexts = true
	with, err := Event(1, leaf, e, opened, p)
	if err != nil {
		t.Fatal(err)
	}
	for f, text := range opened {
		want := slices.Contains(texts, f)
		if bytes.Contains(with, []byte(text)) != want {
			t.Errorf("%s is in the event: %v, want %v", f, !want, want)
		}
	}
}

func TestALongEventGoesWithoutItsDetails(t *testing.T) {
	e := samples()[0]
	e.SetDetails(map[string]string{"long": strings.Repeat("x", 9000)})
	leaf, _ := e.Marshal()
	p := product1
	p.MaxBytes = 8192
	b, err := Event(5, leaf, e, nil, p)
	if err != nil || len(b) > 8192 || !bytes.Contains(b, []byte(`"cut":true`)) || !bytes.Contains(b, []byte(store.HashText(store.LeafHash(leaf)))) {
		t.Errorf("%d bytes: %s, %v", len(b), b, err)
	}
}

func FuzzEvent(f *testing.F) {
	for _, e := range samples() {
		leaf, _ := e.Marshal()
		f.Add(leaf)
	}
	f.Add([]byte(`{"type":"approval.decided","details":{"groups":[1]}}`))
	f.Add([]byte(`{"type":"step.requested","details":7}`))
	f.Fuzz(func(t *testing.T, leaf []byte) {
		e, err := store.ParseLeaf(leaf)
		if err != nil {
			return
		}
		b, err := Event(3, leaf, e, map[string]string{"reason": "TOP-SECRET-REASON"}, product1)
		if err != nil {
			t.Fatalf("no event of %s: %v", leaf, err)
		}
		if bytes.ContainsAny(b, "\n\r") {
			t.Errorf("the event has a line break: %q", b)
		}
		if bytes.Contains(b, []byte("TOP-SECRET-REASON")) && !bytes.Contains(leaf, []byte("TOP-SECRET-REASON")) {
			t.Error("a text left")
		}
		var ev struct {
			Class    int `json:"class_uid"`
			Activity int `json:"activity_id"`
			Category int `json:"category_uid"`
			Type     int `json:"type_uid"`
		}
		if err := json.Unmarshal(b, &ev); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		if ev.Type != ev.Class*100+ev.Activity || ev.Category != ev.Class/1000 {
			t.Errorf("class %d, activity %d, category %d, type %d do not agree", ev.Class, ev.Activity, ev.Category, ev.Type)
		}
	})
}
