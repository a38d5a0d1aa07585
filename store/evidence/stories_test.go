package evidence

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// house is a ledger with a clock of its own, for which stories are written. What
// it writes is the same each time, but for salts and signatures.
type house struct {
	t    testing.TB
	o    ledger.Options
	vkey string
	l    *ledger.Ledger
	now  time.Time
	ids  int
}

func newHouse(t testing.TB) *house {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "evidence.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, vkey: vkey, now: time.Date(2026, 7, 1, 8, 0, 0, 0, time.UTC)}
	h.o = ledger.Options{
		Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1,
		PublishEvery: 5 * time.Millisecond, Now: func() time.Time { return h.now },
	}
	h.open()
	return h
}

func (h *house) open() {
	h.t.Helper()
	l, err := ledger.Open(h.t.Context(), h.o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.l = l
	h.t.Cleanup(func() { l.Close() })
}

// append puts entries on record and returns the index of the first.
func (h *house) append(recorder bool, subs ...*store.Submission) int64 {
	h.t.Helper()
	lines := make([][]byte, len(subs))
	for i, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			h.t.Fatal(err)
		}
		lines[i] = b
	}
	a, err := h.l.Append(h.t.Context(), ledger.Author{Name: map[bool]string{true: "recorder", false: "broker-1"}[recorder], Recorder: recorder}, lines)
	if err != nil {
		h.t.Fatal(err)
	}
	return a.Entries[0].Index
}

// id is the next entry ID.
func (h *house) id() string {
	h.ids++
	return fmt.Sprintf("0190a000-0000-7000-8000-%012d", h.ids)
}

// tale makes the entries of one request.
type tale struct {
	h       *house
	n       string // its number, in all names
	run     string
	scope   string
	outcome store.Outcome
	grant   store.Grant
}

func (h *house) tale(n, run, scope string, outcome store.Outcome) *tale {
	return &tale{h, n, run, scope, outcome, store.Grant{
		Scope: scope, Target: "vault://" + scope, Engine: "token", Policies: []string{"p"}, Params: map[string]string{},
		TTL: store.Duration(2 * time.Hour), Delivery: "direct", Revocable: true,
	}}
}

func (s *tale) entry(t store.Type, details any) *store.Submission {
	sub := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: s.h.id(), Type: t, WriterTime: store.At(s.h.now),
		Agent: "spiffe://evidence.example/orchestrator/demo/run/" + s.run + "/step/s" + s.n, Orchestrator: "demo", Run: s.run, Step: "s" + s.n, Request: "req_" + s.n,
		Resource: s.grant.Target, Action: s.scope, Risk: &store.Risk{Sensitivity: "low"},
		Decision: &store.Decision{Outcome: s.outcome, Policy: "sha256:00", Reasons: []string{}},
	}}
	sub.SetDetails(details)
	return sub
}

func (s *tale) requested(reason string) *store.Submission {
	d := store.RequestedDetails{Grant: s.grant, Body: "b"}
	if s.outcome != store.Deny {
		d.Join = "join-" + s.n
	}
	e := s.entry(store.StepRequested, d)
	e.Seal(store.SealedReason, reason)
	return e
}

// asked is what people are asked: one of group dba.
func (s *tale) asked(reason string) *store.Submission {
	e := s.entry(store.ApprovalRequested, store.ApprovalRequestedDetails{Approval: "apr_" + s.n, Grant: s.grant, Excluded: []string{}, Rule: store.Rule{
		Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(3 * time.Hour)}})
	e.Seal(store.SealedReason, reason)
	return e
}

func (s *tale) decided(asked int64, decision, person, reason string) *store.Submission {
	s.h.t.Helper()
	requested := ""
	for e, err := range s.h.l.Entries(s.h.t.Context(), asked, asked+1) {
		if err != nil {
			s.h.t.Fatal(err)
		}
		requested = store.HashText(store.LeafHash(e.Leaf))
	}
	e := s.entry(store.ApprovalDecided, store.DecidedDetails{Approval: "apr_" + s.n, Requested: requested, Decision: decision, Groups: []string{"dba"}, Via: "page"})
	e.Person = store.Ptr(s.h.o.PrivacyKey.Pseudonym(person))
	e.Seal(store.SealedPerson, person)
	e.Seal(store.SealedReason, reason)
	return e
}

func (s *tale) issuing() *store.Submission {
	d := store.IssuingDetails{Attempt: 1, Grant: s.grant.Digest(), NotPast: store.At(s.h.now.Add(2 * time.Hour))}
	if s.outcome == store.NeedsApproval {
		d.Approval = "req_" + s.n
	}
	return s.entry(store.CredentialIssuing, d)
}

func (s *tale) issued(intent *store.Submission) *store.Submission {
	return s.entry(store.CredentialIssued, store.IssuedDetails{Intent: intent.ID, Attempt: 1, Kind: "vault_token", Revocable: true, Accessor: "acc-" + s.n, Expires: store.At(s.h.now.Add(2 * time.Hour))})
}

func (s *tale) used(intent *store.Submission, use string) *store.Submission {
	return s.entry(store.CredentialUsed, store.UsedDetails{Intent: intent.ID, Via: "introspection", By: "orders", Use: use})
}

// through has the secret of the request stay on the access path.
func (s *tale) through(m store.Masking) *tale {
	s.grant.Delivery, s.grant.Access = "gateway", &store.Access{Protocol: store.ProtocolHTTP, Upstream: "https://orders.internal", Masking: m}
	return s
}

// passed is a use on the access path.
func (s *tale) passed(intent *store.Submission, use, statement string) *store.Submission {
	e := s.entry(store.CredentialUsed, store.UsedDetails{Intent: intent.ID, Via: store.ViaGateway, By: "gateway", Use: use, Protocol: store.ProtocolHTTP, Conn: "c1",
		Access: s.grant.Access.Digest(), Masking: s.grant.Access.Masking.Digest()})
	e.Seal(store.SealedStatement, statement)
	return e
}

// result is what came of uses.
func (s *tale) result(status string, uses ...*store.Submission) *store.Submission {
	d := store.UseFinishedDetails{}
	for _, u := range uses {
		d.Outcomes = append(d.Outcomes, store.UseOutcome{Use: u.ID, Status: status, Received: 120, Took: store.Duration(time.Millisecond)})
	}
	return s.entry(store.UseFinished, d)
}

func (s *tale) revoked(intent *store.Submission) *store.Submission {
	e := s.entry(store.CredentialRevoked, store.ClosedDetails{Intent: intent.ID, Attempt: 1})
	e.Cause = store.Ptr("step-finished")
	return e
}

func (s *tale) finished(outcome string) *store.Submission {
	e := s.entry(store.StepFinished, store.FinishedDetails{Outcome: outcome})
	e.Request, e.Action, e.Resource, e.Decision, e.Risk = "", "", "", nil, nil
	e.Seal(store.SealedSummary, "all well")
	return e
}

// policy is what the recorder loaded.
func (h *house) policy(catalogue string) *store.Submission {
	e := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: h.id(), Type: store.PolicyLoaded, WriterTime: store.At(h.now), Agent: "spiffe://evidence.example/recorder/recorder", Action: "policy.loaded",
	}}
	e.SetDetails(store.PolicyDetails{Digest: inForceDigest(catalogue, "", false), Catalogue: "sha256:" + hexSum(catalogue)})
	e.Seal(store.SealedCatalogue, catalogue)
	return e
}

// hexSum is the SHA-256 of a text in hexadecimal.
func hexSum(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// exported puts export.created on record, as the recorder does before it reads.
func (h *house) exported(q ledger.Query, filters map[string]string) ExportOptions {
	h.t.Helper()
	from, to, err := Window(h.t.Context(), h.l, q)
	if err != nil {
		h.t.Fatal(err)
	}
	e := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: h.id(), Type: store.ExportCreated, WriterTime: store.At(h.now), Agent: "spiffe://evidence.example/reviewer/reviewer-a", Action: "export.created",
	}}
	if filters == nil {
		filters = map[string]string{}
	}
	e.SetDetails(store.ExportDetails{Format: "bundle", From: from, To: to, Filters: filters})
	return ExportOptions{Query: q, From: from, To: to, Index: h.append(true, e), Filters: filters, Wait: 10 * time.Second, Dir: h.t.TempDir()}
}
