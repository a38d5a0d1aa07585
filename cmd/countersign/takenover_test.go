package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// takenOver is whoever has all of a broker: its writer's identity at the
// recorder, its privacy key, its catalogue.
type takenOver struct {
	*house
	rec *client.Recorder
	key store.PrivacyKey
	set *scopes.Set
}

func newTakenOver(t *testing.T) *takenOver {
	h := newHouse(t)
	h.broker.kill() // the broker's own process is out of the way
	token, err := os.ReadFile(h.dir + "/writer-token")
	if err != nil {
		t.Fatal(err)
	}
	rec, err := client.NewRecorder(client.RecorderConfig{
		Config: client.Config{URL: h.recorder.url, Token: client.Token(strings.TrimSpace(string(token)))}, Log: h.logKey, Writer: "broker-1",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rec.Close() })
	key, err := readPrivacyKey(h.dir + "/privacy.key")
	if err != nil {
		t.Fatal(err)
	}
	set, err := scopes.Load(h.dir+"/catalogue.yaml", "")
	if err != nil {
		t.Fatal(err)
	}
	return &takenOver{h, rec, key, set}
}

// story is what a broker appends for scope, as it should be.
type story struct{ req, asked, intent *store.Submission }

func (b *takenOver) story(scope string) *story {
	b.t.Helper()
	v, err := b.set.Decide(b.t.Context(), scopes.Ask{Orchestrator: "demo", Run: "run-1", Step: "step-1", Scope: scope, Reason: "none of your business", Time: time.Now()})
	if err != nil {
		b.t.Fatal(err)
	}
	request := "req_" + strings.ReplaceAll(store.NewID(), "-", "")
	entry := func(t store.Type) *store.Submission {
		return &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(time.Now()), Agent: "spiffe://crash.example/orchestrator/demo/run/run-1/step/step-1",
			Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: request, Resource: v.Grant.Target, Action: scope,
			Decision: &store.Decision{Outcome: v.Outcome, Policy: b.set.Digest(), Reasons: v.Reasons}, Risk: &store.Risk{Sensitivity: v.Scope.Sensitivity},
		}}
	}
	s := &story{entry(store.StepRequested), entry(store.ApprovalRequested), entry(store.CredentialIssuing)}
	s.req.SetDetails(store.RequestedDetails{Grant: v.Grant, Join: b.key.Digest("join", store.NewID()), Body: "x"})
	if v.Rule != nil {
		s.asked.SetDetails(store.ApprovalRequestedDetails{Approval: "apr_" + request, Grant: v.Grant, Rule: *v.Rule, Excluded: []string{b.key.Pseudonym("user:ben")}})
		s.asked.Seal(store.SealedReason, "none of your business")
	}
	s.intent.SetDetails(store.IssuingDetails{Attempt: 1, Grant: v.Grant.Digest(), NotPast: store.At(time.Now().Add(time.Minute))})
	return s
}

// allowed makes s claim that nobody has to approve.
func (s *story) allowed() *story {
	for _, e := range []*store.Submission{s.req, s.intent} {
		e.Decision = &store.Decision{Outcome: store.Allow, Policy: e.Decision.Policy, Reasons: []string{}}
	}
	return s
}

func alterAsked(b *takenOver, s *story, fn func(*store.ApprovalRequestedDetails)) {
	d, err := store.DetailsAs[store.ApprovalRequestedDetails](&s.asked.Entry)
	if err != nil {
		b.t.Fatal(err)
	}
	fn(&d)
	s.asked.SetDetails(d)
}

func TestATakenOverBrokerCannotMakeADecisionThatTheRecorderTakes(t *testing.T) {
	b := newTakenOver(t)
	refused := func(what string, code store.OrderCode, subs ...*store.Submission) {
		t.Helper()
		_, err := b.rec.Append(t.Context(), subs...)
		if _, ok := store.IsOrder(err, code); !ok {
			t.Errorf("%s: want %s, got %v", what, code, err)
		}
	}
	// As it should be, so that what is refused below is refused for its one fault.
	good := b.story("vault:demo-write")
	app, err := b.rec.Append(t.Context(), good.req, good.asked)
	if err != nil {
		t.Fatal(err)
	}
	requested := store.HashText(store.LeafHash(app.Entries[1].Leaf))

	forge := func(typ store.Type, details any) *store.Submission {
		e := *good.req
		e.Time, e.Writer = store.Time{}, ""
		e.Type, e.ID, e.Person, e.Openings, e.Sealed = typ, store.NewID(), store.Ptr(b.key.Pseudonym("user:ann")), nil, nil
		e.SetDetails(details)
		e.Seal(store.SealedReason, "surely")
		return &e
	}
	decision := store.DecidedDetails{Approval: "apr_" + good.req.Request, Requested: requested, Decision: store.Approve, Groups: []string{"dba"}, Via: "page"}
	refused("a decision appended as a writer", store.OrderForbidden, forge(store.ApprovalDecided, decision))
	standing := decision
	standing.Standing = &store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 9, Until: store.At(time.Now().Add(time.Hour))}
	refused("a standing approval appended as a writer", store.OrderForbidden, forge(store.ApprovalStanding, standing))
	refused("a passkey enrolled by a writer", store.OrderForbidden, forge(store.PasskeyEnrolled, store.EnrolledDetails{}))
	refused("a passkey activated by a writer", store.OrderForbidden, forge(store.PasskeyActivated, store.ActivatedDetails{}))
	refused("a Slack account linked by a writer", store.OrderForbidden, forge(store.SlackLinked, struct{}{}))
	refused("an expiry by a writer", store.OrderForbidden, forge(store.ApprovalExpired, store.ExpiredDetails{}))
	refused("an intent before the decision", store.OrderNotOpen, func() *store.Submission {
		d, _ := store.DetailsAs[store.IssuingDetails](&good.intent.Entry)
		d.Approval = good.req.Request
		good.intent.SetDetails(d)
		good.intent.Decision = &store.Decision{Outcome: store.Allow, Policy: b.set.Digest(), Reasons: []string{}}
		return good.intent
	}())

	s := b.story("vault:demo-admin").allowed()
	refused("a sensitive scope that needs nobody, it says", store.OrderWeak, s.req, s.intent)
	s = b.story("vault:demo-admin")
	alterAsked(b, s, func(d *store.ApprovalRequestedDetails) { d.Rule.Groups[0].Count = 1 })
	refused("a weaker rule than the catalogue's", store.OrderWeak, s.req, s.asked)
	s = b.story("vault:demo-admin")
	alterAsked(b, s, func(d *store.ApprovalRequestedDetails) { d.Rule.Groups[0].Group = "everybody" })
	refused("another group", store.OrderWeak, s.req, s.asked)
	s = b.story("vault:demo-admin")
	alterAsked(b, s, func(d *store.ApprovalRequestedDetails) { d.Rule.Reasons.Approver = false })
	refused("no reasons due", store.OrderWeak, s.req, s.asked)
	s = b.story("vault:demo-write")
	alterAsked(b, s, func(d *store.ApprovalRequestedDetails) { d.Excluded = []string{} })
	refused("an owner who may approve", store.OrderWeak, s.req, s.asked)
	s = b.story("vault:demo-write")
	alterAsked(b, s, func(d *store.ApprovalRequestedDetails) { d.Grant.Policies = []string{"countersign-vault-demo-admin"} })
	if _, err := b.rec.Append(t.Context(), s.req, s.asked); err == nil {
		t.Error("people are shown one grant and another is requested")
	}
	s = b.story("vault:demo-write")
	d, _ := store.DetailsAs[store.RequestedDetails](&s.req.Entry)
	d.Grant.Policies = []string{"countersign-vault-demo-admin"}
	s.req.SetDetails(d)
	alterAsked(b, s, func(a *store.ApprovalRequestedDetails) { a.Grant = d.Grant })
	if _, err := b.rec.Append(t.Context(), s.req, s.asked); err == nil {
		t.Error("a grant that the recorder's catalogue does not give is put before people")
	}
	s = b.story("vault:demo-write")
	refused("a request that waits, and nobody is asked", store.OrderMismatch, s.req)

	// A denial is a denial, whatever the broker makes of it afterwards.
	ann := logIn(t, b.people, "ann")
	if status, r, body := decide(t, b.people, ann, decision.Approval, "deny"); status != 200 || r.Status != store.StatusDenied {
		t.Fatalf("%d %s", status, body)
	}
	refused("an intent after a denial", store.OrderNotOpen, good.intent)
	again := *good.asked
	again.Time, again.Writer, again.ID = store.Time{}, "", store.NewID()
	refused("asking again after a denial", store.OrderNotOpen, &again)
	b.verify()
}

func TestNobodyOfTheRequestersSideAndNobodyElsesGroupDecides(t *testing.T) {
	b := newTakenOver(t)
	s := b.story("vault:demo-write")
	s.req.Subject = &store.Subject{ID: b.key.Pseudonym("user:ann")}
	s.asked.Subject = s.req.Subject
	if _, err := b.rec.Append(t.Context(), s.req, s.asked); err != nil {
		t.Fatal(err)
	}
	id := "apr_" + s.req.Request
	for who, slug := range map[string]string{"ann": "self-approval", "ben": "self-approval", "cat": "not-an-approver"} {
		if status, _, body := decide(t, b.people, logIn(t, b.people, who), id, "approve"); status != 403 || !strings.Contains(body, slug) {
			t.Errorf("%s: %d %s", who, status, body)
		}
	}
	refused := map[string]bool{}
	for _, e := range b.history() {
		if e.Type == store.AccessRefused && e.Request == s.req.Request && e.Person != nil {
			refused[*e.Person] = true
		}
	}
	if len(refused) != 3 {
		t.Errorf("%d of 3 attempts are on record", len(refused))
	}
}
