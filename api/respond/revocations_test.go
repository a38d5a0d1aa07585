package respond_test

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

var grant = store.Grant{Scope: "orders-db:read", Target: "postgres://orders", Engine: "database", TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}

// entry is one of a request of run n and step n.
func (h *house) entry(t store.Type, n int, details any) *store.Submission {
	s := &store.Submission{Entry: store.Entry{
		V: 1, ID: store.NewID(), Type: t, WriterTime: store.At(h.now), Agent: "spiffe://respond.example/x",
		Orchestrator: fmt.Sprintf("orchestrator-%d", n%2), Run: fmt.Sprintf("run-%d", n), Step: fmt.Sprintf("step-%d", n), Request: fmt.Sprintf("req_%d", n),
		Resource: grant.Target, Action: grant.Scope, Risk: &store.Risk{Sensitivity: "low"},
		Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:00", Reasons: []string{}},
	}}
	s.SetDetails(details)
	return s
}

func (h *house) append(subs ...*store.Submission) error {
	h.t.Helper()
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			h.t.Fatal(err)
		}
		lines = append(lines, b)
	}
	_, err := h.ledger.Append(h.t.Context(), ledger.Author{Name: "broker-1"}, lines)
	return err
}

func (h *house) must(subs ...*store.Submission) {
	h.t.Helper()
	for part := range slices.Chunk(subs, 999) {
		if err := h.append(part...); err != nil {
			h.t.Fatal(err)
		}
	}
}

// asked is a request that waits to be minted.
func (h *house) asked(n int) *store.Submission {
	return h.entry(store.StepRequested, n, store.RequestedDetails{Grant: grant, Join: fmt.Sprintf("j%d", n), Body: "b", Keyed: true})
}

// live is a request with a live credential.
func (h *house) live(n int, revocable bool) (intent string, subs []*store.Submission) {
	issuing := h.entry(store.CredentialIssuing, n, store.IssuingDetails{Attempt: 1, Grant: grant.Digest(), NotPast: store.At(h.now.Add(5 * time.Minute))})
	d := store.IssuedDetails{Intent: issuing.ID, Attempt: 1, Kind: "pki", Serial: "aa", Expires: store.At(h.now.Add(4 * time.Minute))}
	if revocable {
		d.Kind, d.Revocable, d.Accessor, d.Serial = "database", true, "acc", ""
	}
	return issuing.ID, []*store.Submission{h.asked(n), issuing, h.entry(store.CredentialIssued, n, d)}
}

func (h *house) revoked(n int, intent string) *store.Submission {
	s := h.entry(store.CredentialRevoked, n, store.ClosedDetails{Intent: intent, Attempt: 1})
	s.Cause = store.Ptr(store.CauseFrozen)
	return s
}

func TestAResponderStopsARunAndSeesWhatIsStillLiveUntilItIsGone(t *testing.T) {
	h := newHouse(t)
	c := h.as(auth.Responder)
	h.must(h.asked(0))
	one, subs := h.live(1, true)
	h.must(subs...)
	_, subs = h.live(2, false)
	h.must(subs...)
	three, subs := h.live(3, true)
	h.must(subs...)
	minting := h.entry(store.CredentialIssuing, 4, store.IssuingDetails{Attempt: 1, Grant: grant.Digest(), NotPast: store.At(h.now.Add(5 * time.Minute))})
	h.must(h.asked(4), minting)

	all, err := c.SetFreeze(t.Context(), client.Stop{All: true}, "  a secret breach ")
	if err != nil {
		t.Fatal(err)
	}
	if all.State != client.FreezeInForce || !all.All || all.SetBy != "user:responder-a" || all.Reason != "a secret breach" || all.Closed != 1 ||
		all.Pending != 2 || all.Irrevocable != 1 || all.Minting != 1 || all.Revoked != 0 || all.Left() != 3 {
		t.Fatalf("%+v", all)
	}
	set := h.entries(store.FreezeSet)
	if len(set) != 1 || set[0].Opened[store.SealedReason] != "a secret breach" || strings.Contains(string(set[0].Entry), "breach") || strings.Contains(string(set[0].Entry), "responder-a") {
		t.Fatalf("%s", set[0].Entry)
	}
	if err := h.append(h.asked(9)); err == nil {
		t.Fatal("a request is taken under the freeze")
	}
	alert := h.entry(store.AlertRaised, 1, store.AlertDetails{Alert: store.AlertRevoke, Source: "broker-1", Intents: []string{one, three}, What: "Vault is sealed"})
	h.must(alert, h.revoked(3, three), h.entry(store.CredentialFailed, 4, store.FailedDetails{Intent: minting.ID, Attempt: 1, Problem: "frozen", Stage: "token"}))

	for _, role := range []auth.Role{auth.Responder, auth.Reviewer} {
		v, err := h.as(role).Freeze(t.Context(), all.ID)
		if err != nil {
			t.Fatal(err)
		}
		if v.Pending != 1 || v.Revoked != 1 || v.Minting != 0 || len(v.PendingCredentials) != 1 || len(v.IrrevocableCredentials) != 1 || v.More {
			t.Fatalf("%+v", v)
		}
		p, i := v.PendingCredentials[0], v.IrrevocableCredentials[0]
		if p.Intent != one || p.Why != "Vault is sealed" || p.Run != "run-1" || p.Step != "step-1" || p.Kind != "database" || p.Orchestrator != "orchestrator-1" || p.Request != "req_1" {
			t.Errorf("still live is %+v", p)
		}
		if i.Kind != "pki" || i.Run != "run-2" || !i.Expires.Equal(h.now.Add(4*time.Minute)) || i.Why != "" {
			t.Errorf("what cannot be called back is %+v", i)
		}
	}
	h.must(h.revoked(1, one))
	lifted, err := h.as(other).LiftFreeze(t.Context(), all.ID, "it was a drill")
	if err != nil || lifted.State != client.FreezeLifted || lifted.LiftedBy != "user:responder-b" || lifted.LiftedReason != "it was a drill" || lifted.Revoked != 2 || lifted.Pending != 0 || lifted.Irrevocable != 1 {
		t.Fatalf("%+v, %v", lifted, err)
	}
	// What is begun afterwards is no matter of it.
	_, subs = h.live(7, true)
	h.must(subs...)
	list, err := c.Freezes(t.Context())
	if err != nil || len(list.Revocations) != 1 || list.Revocations[0].Pending != 0 || list.Revocations[0].Closed != 1 || list.Revocations[0].LiftedBy != "user:responder-b" || list.Revocations[0].Reason != "a secret breach" {
		t.Fatalf("%+v, %v", list, err)
	}
	if _, err := h.as(other).LiftFreeze(t.Context(), all.ID, "again"); slug(err) != problem.SlugRequestClosed {
		t.Errorf("lifted twice: %v", err)
	}
	if _, err := c.LiftFreeze(t.Context(), store.NewID(), "what?"); slug(err) != problem.SlugNotFound {
		t.Errorf("one that there is not: %v", err)
	}
}

func TestAFreezeOfWhatIsNotKnownStandsAndSaysSo(t *testing.T) {
	h := newHouse(t)
	_, subs := h.live(1, true)
	h.must(subs...)
	for name, x := range map[string]struct {
		stop    client.Stop
		unknown []string
		doubts  int
	}{
		"a misspelt orchestrator":                     {client.Stop{Orchestrator: "orchestrator-l"}, []string{"orchestrator"}, 2},
		"a misspelt scope of one that asked":          {client.Stop{Orchestrator: "orchestrator-1", Scope: "orders-db:raed"}, []string{"scope"}, 2},
		"both misspelt":                               {client.Stop{Orchestrator: "orchestrator-l", Scope: "orders-db:raed"}, []string{"orchestrator", "scope"}, 3},
		"a scope that nobody asked for yet":           {client.Stop{Scope: "billing:read"}, nil, 1},
		"an orchestrator that never asked":            {client.Stop{Orchestrator: "ci"}, nil, 1},
		"an orchestrator that a pattern lets ask":     {client.Stop{Orchestrator: "worker-7"}, []string{"orchestrator"}, 2},
		"a run that is none":                          {client.Stop{Run: "run-l"}, nil, 1},
		"names that are known, and not of each other": {client.Stop{Orchestrator: "ci", Scope: "orders-db:read"}, nil, 1},
	} {
		// The freeze of one does not make the name known to the other.
		for _, who := range []auth.Role{auth.Responder, other} {
			v, err := h.as(who).SetFreeze(t.Context(), x.stop, "x")
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if v.State != client.FreezeInForce || v.Reached() != 0 || !slices.Equal(v.Unknown, x.unknown) || len(v.Doubts()) != x.doubts {
				t.Errorf("%s: %+v, %q", name, v, v.Doubts())
			}
			if who == other {
				lifted, err := h.as(auth.Responder).LiftFreeze(t.Context(), v.ID, "x")
				if err != nil || lifted.Unknown != nil || lifted.Doubts() != nil {
					t.Errorf("%s: lifted: %+v, %v", name, lifted, err)
				}
			}
		}
	}
	v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "x")
	if err != nil || v.Pending != 1 || v.Reached() != 1 || len(v.Doubts()) != 0 {
		t.Errorf("one that covers a credential: %+v, %v", v, err)
	}
}

func TestAFreezeCountsOnlyWhatItCovers(t *testing.T) {
	h := newHouse(t)
	c := h.as(auth.Responder)
	intents := map[int]string{}
	for n := range 6 {
		intent, subs := h.live(n, true)
		intents[n] = intent
		h.must(subs...)
	}
	h.must(h.asked(10), h.asked(11))
	for _, x := range []struct {
		stop            client.Stop
		closed, pending int64
	}{
		{client.Stop{Run: "run-1"}, 0, 1},
		{client.Stop{Step: "step-1", Run: "run-2"}, 0, 0},
		{client.Stop{Orchestrator: "orchestrator-0"}, 1, 3},
		{client.Stop{Scope: "orders-db:read", Orchestrator: "orchestrator-1"}, 1, 3},
		{client.Stop{Scope: "orders-db:write"}, 0, 0},
	} {
		v, err := c.SetFreeze(t.Context(), x.stop, "because")
		if err != nil || v.Closed != x.closed || v.Pending != x.pending {
			t.Errorf("%+v: %+v, %v", x.stop, v, err)
		}
	}
	h.must(h.revoked(1, intents[1]), h.revoked(2, intents[2]))
	list, err := c.Freezes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range list.Revocations {
		got = append(got, fmt.Sprintf("%d/%d", v.Revoked, v.Pending))
	}
	if fmt.Sprint(got) != "[0/0 1/2 1/2 0/0 1/0]" { // newest first
		t.Fatalf("revoked and pending are %v", got)
	}
}

func TestTheSamePersonStoppingTheSameAgainGetsTheFreezeThatHolds(t *testing.T) {
	h := newHouse(t)
	first, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "because")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "because"); err != nil || v.ID != first.ID {
				t.Errorf("%+v, %v", v, err)
			}
			if _, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-2"}, "because"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(h.entries(store.FreezeSet)); n != 2 {
		t.Fatalf("%d freezes are on record, want 2", n)
	}
	// Another person's is their own: each may lift the other's.
	second, err := h.as(other).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "because")
	if err != nil || second.ID == first.ID {
		t.Fatalf("%+v, %v", second, err)
	}
}

func TestNobodyLiftsTheirOwnFreezeUnderAnySpelling(t *testing.T) {
	h := newHouse(t)
	v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{All: true}, "because")
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []auth.Role{auth.Responder, shouting} {
		if _, err := h.as(role).LiftFreeze(t.Context(), v.ID, "because"); slug(err) != problem.SlugSelfApproval {
			t.Errorf("%s: %v", role, err)
		}
	}
	if status, body := h.call("DELETE", "/revocations/"+v.ID, ""); status != http.StatusForbidden {
		t.Errorf("without a reason: %d %s", status, body)
	}
	h.refusals.Close()
	if n := len(h.entries(store.AccessRefused)); n != 3 {
		t.Errorf("%d attempts on record, want 3", n)
	}
	if len(h.entries(store.FreezeLifted)) != 0 {
		t.Error("it was lifted")
	}
	r, err := http.NewRequest("DELETE", h.server.URL+"/revocations/"+v.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.tokens[other])
	resp, err := http.DefaultClient.Do(r)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("another person without a reason: %v %v", resp.StatusCode, err)
	}
	resp.Body.Close()
}

func TestNobodyButAResponderStopsAndTheAttemptIsOnRecord(t *testing.T) {
	h := newHouse(t)
	v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "because")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, role := range auth.Roles {
		if role == auth.Responder {
			continue
		}
		c := h.as(role)
		if _, err := c.SetFreeze(t.Context(), client.Stop{All: true}, "because"); slug(err) != problem.SlugRoleForbidden {
			t.Errorf("%s stops everything: %v", role, err)
		}
		if _, err := c.LiftFreeze(t.Context(), v.ID, "because"); slug(err) != problem.SlugRoleForbidden {
			t.Errorf("%s lifts a freeze: %v", role, err)
		}
		n += 2
		if role != auth.Reviewer {
			_, err1 := c.Freezes(t.Context())
			_, err2 := c.Freeze(t.Context(), v.ID)
			if slug(err1) != problem.SlugRoleForbidden || slug(err2) != problem.SlugRoleForbidden {
				t.Errorf("%s reads freezes: %v, %v", role, err1, err2)
			}
			n += 2
		}
	}
	h.refusals.Close()
	if got := len(h.entries(store.AccessRefused)); got != n {
		t.Errorf("%d attempts on record, want %d", got, n)
	}
	if len(h.entries(store.FreezeSet)) != 1 || len(h.entries(store.FreezeLifted)) != 0 {
		t.Error("a refused call is on record as a freeze")
	}
}

func TestWhatIsNoFreezeIsRefusedAndLeavesNothing(t *testing.T) {
	h := newHouse(t)
	for _, body := range []string{
		``, `{}`, `[]`, `{"reason":"x"}`, `{"run":"r"}`, `{"all":false,"reason":"x"}`, `{"all":true,"run":"r","reason":"x"}`, `{"run":"","reason":"x"}`,
		`{"run":"r","reason":"  \u200b "}`, `{"run":"a b","reason":"x"}`, `{"run":"<script>alert(1)</script>","reason":"x"}`, `{"scope":"x' OR 1=1 --","reason":"x"}`,
		`{"run":"r\u0000","reason":"x"}`, `{"scope":"` + strings.Repeat("s", 200) + `","reason":"x"}`, `{"run":"r","reason":"` + strings.Repeat("x", 8001) + `"}`,
		`{"run":"r","reason":"x\u0000y"}`, `{"run":"r","run":"s","reason":"x"}`, `{"run":"r","reason":"x","who":"me"}`, `{"run":["r"],"reason":"x"}`,
		`{"run":"r","reason":"` + strings.Repeat("x", 40_000) + `"}`,
	} {
		if status, answer := h.call("POST", "/revocations", body); status < 400 || status > 422 {
			t.Errorf("%.60s: %d %s", body, status, answer)
		}
	}
	for _, path := range []string{"/revocations/nothing", "/revocations/%2e%2e%2fholds", "/revocations/" + strings.Repeat("x", 5000), "/revocations?x=1", "/revocations/x?y=1"} {
		if status, answer := h.call("GET", path, ""); status < 400 || status > 422 {
			t.Errorf("%.60s: %d %s", path, status, answer)
		}
	}
	if h.ledger.Size() != 0 {
		t.Errorf("%d entries are on record", h.ledger.Size())
	}
	if status, answer := h.call("POST", "/revocations", `{"run":"r","reason":"`+strings.Repeat("ä", 4000)+`"}`); status != http.StatusAccepted {
		t.Errorf("the longest reason: %d %.200s", status, answer)
	}
}

func TestStoppingEverythingIsQuickAmongManyCredentialsAndFreezes(t *testing.T) {
	stopAmong(t, 2000, 60)
}

// stopAmong stops everything where so many credentials are live and so many
// freezes are in force.
func stopAmong(t *testing.T, credentials, freezes int) {
	h := newHouse(t)
	var subs []*store.Submission
	var intents []string
	for i := range credentials {
		intent, s := h.live(i, i%5 > 0)
		subs, intents = append(subs, s...), append(intents, intent)
	}
	h.must(subs...)
	var wg sync.WaitGroup
	began := time.Now()
	for w := range 20 {
		wg.Go(func() {
			for i := range freezes / 20 {
				if _, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: fmt.Sprintf("other-%d-%d", w, i)}, "because"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	many := time.Since(began)
	if freezes == 1000 {
		if _, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "one-too-many"}, "because"); slug(err) != problem.SlugRequestClosed {
			t.Errorf("one more than a thousand: %v", err)
		}
	}
	began = time.Now()
	v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{All: true}, "because")
	set := time.Since(began)
	revocable := int64(credentials - credentials/5)
	if err != nil || v.Pending != revocable || v.Irrevocable != int64(credentials/5) {
		t.Fatalf("%+v, %v", v, err)
	}
	subs = nil
	for i, intent := range intents {
		if i%5 > 0 && i%2 > 0 {
			subs = append(subs, h.revoked(i, intent))
		}
	}
	h.must(subs...)
	began = time.Now()
	v, err = h.as(auth.Responder).Freeze(t.Context(), v.ID)
	read := time.Since(began)
	if left := revocable - int64(len(subs)); err != nil || v.Pending != left || v.Revoked != int64(len(subs)) || int64(len(v.PendingCredentials)) != left || len(v.IrrevocableCredentials) != credentials/5 {
		t.Fatalf("%d pending, %d revoked, %d and %d listed, %v", v.Pending, v.Revoked, len(v.PendingCredentials), len(v.IrrevocableCredentials), err)
	}
	began = time.Now()
	list, err := h.as(auth.Responder).Freezes(t.Context())
	all := time.Since(began)
	if err != nil || len(list.Revocations) != freezes+1 || list.Revocations[0].ID != v.ID {
		t.Fatalf("%d listed, %v", len(list.Revocations), err)
	}
	t.Logf("%d freezes %s, stop everything %s, its progress %s, all freezes %s", freezes, many, set, read, all)
	// Far above what it takes, and far below what would hold up a person.
	if set > 3*time.Second || read > 5*time.Second {
		t.Errorf("stop everything took %s, its progress %s", set, read)
	}
}

func TestThePagesShowAFreezeAndItsTextsAsTexts(t *testing.T) {
	h := newHouse(t)
	_, subs := h.live(1, true)
	h.must(subs...)
	v, err := h.as(auth.Responder).SetFreeze(t.Context(), client.Stop{Run: "run-1"}, "<script>alert(1)</script> \u202e evil")
	if err != nil {
		t.Fatal(err)
	}
	get := func(role auth.Role, path string) string {
		t.Helper()
		r, err := http.NewRequest("GET", h.server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+h.tokens[role])
		r.Header.Set("Accept", "text/html")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := new(strings.Builder)
		if err := resp.Write(b); err != nil || resp.StatusCode != 200 || !strings.Contains(resp.Header.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Fatalf("%s: %d %v\n%s", path, resp.StatusCode, err, b)
		}
		return b.String()
	}
	list := get(auth.Reviewer, "/revocations")
	if !strings.Contains(list, "run run-1") || !strings.Contains(list, "1 still live") || strings.Contains(list, "Stop credentials") {
		t.Errorf("a reviewer's list:\n%s", list)
	}
	if !strings.Contains(get(auth.Responder, "/revocations"), "Stop credentials") {
		t.Error("a responder's list has nothing to stop with")
	}
	one := get(auth.Responder, "/revocations/"+v.ID)
	for _, want := range []string{"&lt;script&gt;alert(1)", "U+202E", "step-1", "orders-db:read", "another responder lifts it", "user:responder-a"} {
		if !strings.Contains(one, want) {
			t.Errorf("its page does not say %q:\n%s", want, one)
		}
	}
	if strings.Contains(one, "<script>alert") {
		t.Error("a reason is markup")
	}
	if !strings.Contains(get(other, "/revocations/"+v.ID), "countersign revoke lift") {
		t.Error("another responder is not told how to lift it")
	}
	if r, err := http.PostForm(h.server.URL+"/revocations", url.Values{"what": {"all"}, "reason": {"x"}}); err != nil || r.StatusCode != http.StatusUnauthorized {
		t.Errorf("a form of nobody: %v, %v", r.StatusCode, err)
	}
}
