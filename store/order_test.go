package store

import (
	"errors"
	"testing"
	"time"
)

// play is a record under test: entries are admitted one group at a time.
type play struct {
	t     *testing.T
	s     *State
	now   time.Time
	index int64
}

func newPlay(t *testing.T) *play {
	return &play{t: t, s: NewState(), now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
}

var testGrant = Grant{Scope: "orders-db:read", Target: "postgres://orders", Engine: "database", TTL: Duration(5 * time.Minute), Delivery: "direct", Revocable: true}

func entryOf(t Type, request string, details any) *Entry {
	e := &Entry{
		V: 1, ID: NewID(), Type: t, Agent: "spiffe://example.test/x", Orchestrator: "demo", Run: "run-" + request, Step: "step-" + request, Request: request,
		Resource: testGrant.Target, Action: testGrant.Scope, Risk: &Risk{Sensitivity: "low"},
		Decision: &Decision{Outcome: Allow, Policy: "sha256:00", Reasons: []string{}},
	}
	e.SetDetails(details)
	return e
}

func requestedBy(request, join string, keyed bool) *Entry {
	return entryOf(StepRequested, request, RequestedDetails{Grant: testGrant, Join: join, Body: "b", Keyed: keyed})
}

func (p *play) issuing(request string, attempt int) *Entry {
	return entryOf(CredentialIssuing, request, IssuingDetails{Attempt: attempt, Grant: testGrant.Digest(), NotPast: At(p.now.Add(5 * time.Minute))})
}

func issuedFor(intent *Entry, attempt int, expires Time) *Entry {
	return entryOf(CredentialIssued, intent.Request, IssuedDetails{Intent: intent.ID, Attempt: attempt, Kind: "database", Revocable: true, Accessor: "a", Expires: expires})
}

func closing(t Type, intent *Entry, attempt int) *Entry {
	return entryOf(t, intent.Request, ClosedDetails{Intent: intent.ID, Attempt: attempt})
}

// as appends a group by writer, and returns why it was refused.
func (p *play) as(writer string, es ...*Entry) error {
	p.t.Helper()
	b := p.s.Begin()
	for i, e := range es {
		e.Writer, e.Time = writer, At(p.now)
		leaf, err := e.Marshal()
		if err != nil {
			p.t.Fatal(err)
		}
		if err := b.Admit(e, leaf, p.index+int64(i), writer == "recorder"); err != nil {
			return err
		}
	}
	if err := b.Complete(); err != nil {
		return err
	}
	p.index += int64(len(es))
	b.Commit()
	return nil
}

func (p *play) ok(es ...*Entry) {
	p.t.Helper()
	if err := p.as("broker-1", es...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *play) refused(c OrderCode, es ...*Entry) {
	p.t.Helper()
	p.refusedTo("broker-1", c, es...)
}

func (p *play) refusedTo(writer string, c OrderCode, es ...*Entry) {
	p.t.Helper()
	if err := p.as(writer, es...); err == nil {
		p.t.Fatalf("admitted, want %s", c)
	} else if _, is := IsOrder(err, c); !is {
		p.t.Fatalf("%v, want %s", err, c)
	}
}

func TestARequestIsIssuedAndClosedInOrder(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "j", false), intent)
	p.refused(OrderIntent, p.issuing("req_1", 1))
	p.refused(OrderIntent, p.issuing("req_1", 2))
	p.refused(OrderNotLive, closing(CredentialRevoked, intent, 1))
	p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.refused(OrderOutcome, issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.refused(OrderOutcome, closing(CredentialAbandoned, intent, 1))
	p.refused(OrderOutcome, closing(CredentialFailed, intent, 1))
	p.refused(OrderAttempt, p.issuing("req_1", 2)) // has no key
	p.ok(closing(CredentialRevoked, intent, 1))
	p.refused(OrderNotOpen, closing(CredentialRevoked, intent, 1))
	p.refused(OrderNotOpen, closing(CredentialExpired, intent, 1))
	p.refused(OrderNotOpen, p.issuing("req_1", 2))
	if len(p.s.Requests()) != 0 {
		t.Fatal("a closed request without a key is still held")
	}
}

func TestARefusedGroupChangesNothing(t *testing.T) {
	p := newPlay(t)
	p.refused(OrderIntent, requestedBy("req_1", "j", false), p.issuing("req_1", 1), p.issuing("req_1", 2))
	if p.s.Request("req_1") != nil || p.s.Joined("j") != nil {
		t.Fatal("a refused group left a request")
	}
	p.ok(requestedBy("req_1", "j", false), p.issuing("req_1", 1))
}

func TestNoIntentFollowsADenialOrNothing(t *testing.T) {
	p := newPlay(t)
	denied := requestedBy("req_1", "j", false)
	denied.Decision.Outcome = Deny
	p.ok(denied)
	p.refused(OrderNotOpen, p.issuing("req_1", 1))
	p.refused(OrderNotOpen, p.issuing("req_none", 1))
	denied2 := requestedBy("req_2", "j", false)
	denied2.Decision.Outcome = NeedsApproval
	p.refused(OrderNotOpen, denied2, p.issuing("req_2", 1))
	for _, typ := range []Type{RequestWithdrawn, RequestVoid} {
		p.ok(requestedBy("req_3", "j", false))
		p.ok(entryOf(typ, "req_3", nil))
		p.refused(OrderNotOpen, p.issuing("req_3", 1))
	}
}

func TestOneOpenRequestHoldsAJoin(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "j", false))
	p.refused(OrderReused, requestedBy("req_1", "other", false))
	err := p.as("broker-2", requestedBy("req_2", "j", false))
	if oe, is := IsOrder(err, OrderJoined); !is || oe.Request == nil || oe.Request.ID != "req_1" {
		t.Fatalf("a second request with the join: %v", err)
	}
	p.ok(intent)
	p.refused(OrderNotOpen, entryOf(RequestWithdrawn, "req_1", nil)) // minting
	p.refused(OrderJoined, requestedBy("req_2", "j", false))
	p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.ok(requestedBy("req_2", "j", false)) // collected: the same POST opens a new one
}

func TestAKeyedRequestIsRememberedADayAfterItClosed(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "key", true), intent)
	p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.refused(OrderJoined, requestedBy("req_2", "key", true))
	p.ok(closing(CredentialExpired, intent, 1))
	p.now = p.now.Add(KeyLife - time.Second)
	p.refused(OrderJoined, requestedBy("req_2", "key", true))
	p.now = p.now.Add(2 * time.Second)
	p.ok(requestedBy("req_2", "key", true))
	if p.s.Request("req_1") != nil || p.s.Joined("key").ID != "req_2" {
		t.Fatal("the forgotten request is still held")
	}
}

func TestForgetDropsClosedKeyedRequestsInTimeAndNoOthers(t *testing.T) {
	p := newPlay(t)
	intent, live := p.issuing("req_1", 1), p.issuing("req_2", 1)
	p.ok(requestedBy("req_1", "k1", true), intent)
	p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))), closing(CredentialRevoked, intent, 1))
	p.ok(requestedBy("req_2", "k2", true), live)
	p.ok(issuedFor(live, 1, At(p.now.Add(time.Minute))))
	for _, after := range []struct {
		d    time.Duration
		held bool
	}{{KeyLife - time.Second, true}, {KeyLife + time.Second, false}} {
		b := p.s.Begin()
		b.Forget(At(p.now.Add(after.d)))
		b.Commit()
		if (p.s.Request("req_1") != nil) != after.held || p.s.Request("req_2") == nil {
			t.Fatalf("after %s", after.d)
		}
	}
}

func TestARetryReplacesARevokedCredentialOnce(t *testing.T) {
	open := func(keyed bool) (*play, *Entry) {
		p := newPlay(t)
		intent := p.issuing("req_1", 1)
		p.ok(requestedBy("req_1", "key", keyed), intent)
		p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))))
		return p, intent
	}
	t.Run("while the first lives there is none", func(t *testing.T) {
		p, _ := open(true)
		p.refused(OrderAttempt, p.issuing("req_1", 2))
	})
	t.Run("revoked and minted anew in one append, with the same end", func(t *testing.T) {
		p, intent := open(true)
		again := p.issuing("req_1", 2)
		p.ok(closing(CredentialRevoked, intent, 1), again)
		p.refused(OrderOutcome, issuedFor(intent, 1, At(p.now.Add(time.Minute))))
		p.ok(issuedFor(again, 2, At(p.now.Add(time.Minute))))
		p.refused(OrderAttempt, closing(CredentialRevoked, again, 2), p.issuing("req_1", 3))
		p.ok(closing(CredentialRevoked, again, 2))
		p.refused(OrderAttempt, p.issuing("req_1", 3))
	})
	t.Run("not after its window", func(t *testing.T) {
		p, intent := open(true)
		again := p.issuing("req_1", 2)
		p.now = p.now.Add(RetryWindow + time.Second)
		p.refused(OrderAttempt, closing(CredentialRevoked, intent, 1), again)
	})
	t.Run("not with a later end", func(t *testing.T) {
		p, intent := open(true)
		p.now = p.now.Add(time.Second)
		p.refused(OrderMismatch, closing(CredentialRevoked, intent, 1), p.issuing("req_1", 2))
	})
	t.Run("not out of turn", func(t *testing.T) {
		p, intent := open(true)
		p.refused(OrderAttempt, closing(CredentialRevoked, intent, 1), p.issuing("req_1", 3))
	})
	t.Run("not without a key", func(t *testing.T) {
		p, intent := open(false)
		p.refused(OrderNotOpen, closing(CredentialRevoked, intent, 1), p.issuing("req_1", 2))
	})
	t.Run("a failed retry stays closed under its key", func(t *testing.T) {
		p, intent := open(true)
		again := p.issuing("req_1", 2)
		p.ok(closing(CredentialRevoked, intent, 1), again)
		p.ok(closing(CredentialFailed, again, 2))
		p.refused(OrderAttempt, p.issuing("req_1", 3))
		p.refused(OrderJoined, requestedBy("req_2", "key", true))
	})
}

func TestAFailedFirstAttemptFreesTheJoin(t *testing.T) {
	for _, typ := range []Type{CredentialFailed, CredentialAbandoned} {
		p := newPlay(t)
		intent := p.issuing("req_1", 1)
		p.ok(requestedBy("req_1", "key", true), intent)
		p.ok(closing(typ, intent, 1))
		p.refused(OrderNotOpen, p.issuing("req_1", 1))
		p.ok(requestedBy("req_2", "key", true), p.issuing("req_2", 1))
	}
}

func TestAnotherWritersIntentIsLeftAloneWithinTheGrace(t *testing.T) {
	p := newPlay(t)
	p.s.Grace = 2 * time.Second
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "j", false), intent)
	p.refusedTo("broker-2", OrderOutcome, issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.refusedTo("broker-2", OrderOutcome, closing(CredentialFailed, intent, 1))
	p.now = p.now.Add(2*time.Second - time.Microsecond)
	p.refusedTo("broker-2", OrderOutcome, closing(CredentialAbandoned, intent, 1))
	p.now = p.now.Add(time.Microsecond)
	p.refusedTo("broker-2", OrderOutcome, issuedFor(intent, 1, At(p.now.Add(time.Minute)))) // never another's to issue
	if err := p.as("broker-2", closing(CredentialAbandoned, intent, 1)); err != nil {
		t.Fatal(err)
	}
	p.refused(OrderNotOpen, issuedFor(intent, 1, At(p.now.Add(time.Minute)))) // too late
}

func TestTheGraceIsAMinuteWhereNoneIsSet(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "j", false), intent)
	p.now = p.now.Add(time.Minute - time.Second)
	p.refusedTo("broker-2", OrderOutcome, closing(CredentialAbandoned, intent, 1))
	p.now = p.now.Add(time.Second)
	if err := p.as("broker-2", closing(CredentialAbandoned, intent, 1)); err != nil {
		t.Fatal(err)
	}
}

func TestAnIntentMustMatchItsRequest(t *testing.T) {
	for name, alter := range map[string]func(p *play, e *Entry){
		"another grant": func(p *play, e *Entry) {
			e.SetDetails(IssuingDetails{Attempt: 1, Grant: "sha256:00", NotPast: At(p.now.Add(time.Minute))})
		},
		"another run":          func(p *play, e *Entry) { e.Run = "other" },
		"another step":         func(p *play, e *Entry) { e.Step = "other" },
		"another orchestrator": func(p *play, e *Entry) { e.Orchestrator = "other" },
		"another scope":        func(p *play, e *Entry) { e.Action = "other" },
		"no end":               func(p *play, e *Entry) { e.SetDetails(IssuingDetails{Attempt: 1, Grant: testGrant.Digest()}) },
		"a later end": func(p *play, e *Entry) {
			e.SetDetails(IssuingDetails{Attempt: 1, Grant: testGrant.Digest(), NotPast: At(p.now.Add(7 * time.Minute))})
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlay(t)
			e := p.issuing("req_1", 1)
			alter(p, e)
			want := OrderMismatch
			if name == "a later end" {
				want = OrderClock // it may be no more than that
			}
			p.refused(want, requestedBy("req_1", "j", false), e)
		})
	}
	p := newPlay(t)
	p.refused(OrderAttempt, requestedBy("req_1", "j", false), p.issuing("req_1", 2))
	p.refused(OrderAttempt, requestedBy("req_1", "j", false), p.issuing("req_1", 0))
}

func TestACredentialEndsNoLaterThanItsIntentAllowed(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	p.ok(requestedBy("req_1", "j", false), intent)
	p.refused(OrderMismatch, issuedFor(intent, 1, At(p.now.Add(5*time.Minute+time.Microsecond))))
	p.refused(OrderMismatch, issuedFor(intent, 1, Time{}))
	p.refused(OrderOutcome, issuedFor(p.issuing("req_1", 1), 1, At(p.now.Add(time.Minute)))) // another intent
	p.refused(OrderOutcome, issuedFor(intent, 2, At(p.now.Add(time.Minute))))
	bare := entryOf(CredentialIssued, "req_1", IssuedDetails{Intent: intent.ID, Attempt: 1, Revocable: true, Expires: At(p.now.Add(time.Minute))})
	if err := p.as("broker-1", bare); !errors.Is(err, ErrMalformed) {
		t.Fatalf("revocable without accessor or lease: %v", err)
	}
	p.ok(issuedFor(intent, 1, At(p.now.Add(5*time.Minute))))
}

func TestOnTheAccessPathNothingIsUsedAfterItsCredentialHasEnded(t *testing.T) {
	p := newPlay(t)
	intent := p.issuing("req_1", 1)
	used := func(via, intent string) *Entry {
		return entryOf(CredentialUsed, "req_1", UsedDetails{Intent: intent, Via: via, By: "gateway", Use: "GET /"})
	}
	p.ok(requestedBy("req_1", "key", true), intent)
	p.refused(OrderNotLive, used(ViaGateway, intent.ID)) // it is not minted yet
	p.ok(issuedFor(intent, 1, At(p.now.Add(time.Minute))))
	p.ok(used(ViaGateway, intent.ID))
	p.refused(OrderNotLive, used(ViaGateway, "another"))
	p.ok(closing(CredentialRevoked, intent, 1))
	p.refused(OrderNotLive, used(ViaGateway, intent.ID))
	p.ok(used(ViaIntrospection, intent.ID)) // it has happened: it is to be on record
	// A retry mints anew; the first session is over.
	again := p.issuing("req_1", 2)
	p.ok(again)
	p.ok(issuedFor(again, 2, At(p.now.Add(time.Minute))))
	p.refused(OrderNotLive, used(ViaGateway, intent.ID))
	p.ok(used(ViaGateway, again.ID))
	p.now = p.now.Add(time.Minute)
	p.refused(OrderNotLive, used(ViaGateway, again.ID))
	p.refused(OrderNotLive, entryOf(CredentialUsed, "req_2", UsedDetails{Intent: again.ID, Via: ViaGateway}))
}

func TestAMalformedRequestIsRefused(t *testing.T) {
	for name, alter := range map[string]func(e *Entry){
		"no request":    func(e *Entry) { e.Request = "" },
		"no run":        func(e *Entry) { e.Run = "" },
		"no decision":   func(e *Entry) { e.Decision = nil },
		"no risk":       func(e *Entry) { e.Risk = nil },
		"another scope": func(e *Entry) { e.Action = "other" },
		"no details":    func(e *Entry) { e.Details = nil },
		"no join":       func(e *Entry) { e.SetDetails(RequestedDetails{Grant: testGrant}) },
	} {
		t.Run(name, func(t *testing.T) {
			e := requestedBy("req_1", "j", false)
			alter(e)
			if err := newPlay(t).as("broker-1", e); !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
		})
	}
}

func TestNoWriterAppendsWhatIsTheRecorders(t *testing.T) {
	for typ, may := range writable {
		if may {
			continue
		}
		p := newPlay(t)
		p.refused(OrderForbidden, entryOf(typ, "req_1", nil))
		if typ.IsDecision() || typ == ApprovalExpired || typ == FreezeSet || typ == FreezeLifted {
			continue // is of a request that waits for people, or of a freeze
		}
		if err := p.as("recorder", entryOf(typ, "req_1", nil)); err != nil {
			t.Errorf("the recorder's own %s: %v", typ, err)
		}
	}
	for _, typ := range []Type{ApprovalDecided, PasskeyEnrolled, SlackLinked, FreezeSet, FreezeLifted, HoldPlaced, HoldLifted, DetailsErased} {
		if typ.Writable() {
			t.Errorf("%s is a writer's to append", typ)
		}
	}
}
