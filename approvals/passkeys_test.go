package approvals

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/approvals/passkeytest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func TestAPasskeySignsOnceASecondPersonHasActivatedIt(t *testing.T) {
	w := newWorld(t)
	id := w.ask("app:signed")
	_, err := w.a.Decide(t.Context(), alice, id, approve("ok"))
	wants(t, err, store.OrderPasskey)
	events, end := w.a.Subscribe()
	defer end()
	k, enrolled := w.enrol(alice)
	if e := next(t, events, EventPasskey); e.Passkey.ID != enrolled.ID || e.Passkey.Person != alice.Name || e.Passkey.Active {
		t.Fatalf("%+v", e.Passkey)
	}
	_, err = w.a.Challenge(t.Context(), alice, id, approve("ok"))
	wants(t, err, store.OrderPasskey) // not active
	_, err = w.a.ActivatePasskey(t.Context(), alice, enrolled.ID)
	isErr(t, err, ErrPasskeyPerson)
	active, err := w.a.ActivatePasskey(t.Context(), bob, enrolled.ID)
	ok(t, err)
	if !active.Active || active.Label != "laptop" || active.Person != alice.Name {
		t.Fatalf("%+v", active)
	}
	_, err = w.a.ActivatePasskey(t.Context(), bob, enrolled.ID)
	isErr(t, err, ErrPasskeyClosed)
	r, err := w.a.Decide(t.Context(), alice, id, w.signed(alice, id, approve("ok"), k))
	ok(t, err)
	if r.Status != store.StatusApproved || !r.Decisions[0].Signed || r.Decisions[0].Reason != "ok" {
		t.Fatalf("%+v", r.Decisions)
	}
	w.refused("user:alice passkey-required", "user:alice role-forbidden")
	w.warranted(r)
}

// warranted mints on r, as far as the record decides it: the issuer's check of
// all proofs holds.
func (w *world) warranted(r *Request) {
	w.t.Helper()
	ctx := context.Background()
	intent := w.issuing(r)
	intent.Agent = r.Agent
	ok(w.t, w.append(broker, intent))
	open, err := w.ledger.OpenSet(ctx, r.Request)
	ok(w.t, err)
	warrant := store.Warrant{Approval: &store.Approval{}}
	for i, p := range open.Entries {
		e, err := store.ParseLeaf(p.Leaf)
		ok(w.t, err)
		switch receipt := open.Receipt(i); e.Type {
		case store.StepRequested:
			warrant.Request = receipt
		case store.ApprovalRequested:
			warrant.Approval.Requested = receipt
		case store.ApprovalDecided:
			warrant.Approval.Decisions = append(warrant.Approval.Decisions, receipt)
		case store.PasskeyEnrolled, store.PasskeyActivated:
			warrant.Approval.Passkeys = append(warrant.Approval.Passkeys, receipt)
		case store.CredentialIssuing:
			warrant.Intent = receipt
		}
	}
	out, err := warrant.Verify(w.log, w.clock())
	ok(w.t, err)
	if out.Rule == nil {
		w.t.Fatal("no rule was met")
	}
}

func TestASignatureCountsForTheDecisionThatWasShownAlone(t *testing.T) {
	w := newWorld(t)
	id, other := w.ask("app:signed"), w.ask("app:signed")
	k, enrolled := w.enrol(alice)
	_, err := w.a.ActivatePasskey(t.Context(), bob, enrolled.ID)
	ok(t, err)
	foreign, bobs := w.enrol(bob)
	_, err = w.a.ActivatePasskey(t.Context(), alice, bobs.ID)
	ok(t, err)
	idle, _ := w.enrol(alice) // not activated
	for name, forge := range map[string]func() (Person, string, Decision){
		"another request": func() (Person, string, Decision) { return alice, other, w.signed(alice, id, approve("ok"), k) },
		"another reason": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			d.Reason = "something else"
			return alice, id, d
		},
		"a denial turned into an approval": func() (Person, string, Decision) {
			d := w.signed(alice, id, Decision{Decision: store.Refuse, Reason: "no", Via: viaPage}, k)
			d.Decision = store.Approve
			return alice, id, d
		},
		"another person": func() (Person, string, Decision) { return bob, id, w.signed(alice, id, approve("ok"), k) },
		"another person's key": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			d.Assertion.Credential = foreign.ID()
			return alice, id, d
		},
		"a key that is not active": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			c, err := w.a.Challenge(t.Context(), alice, id, approve("ok"))
			ok(t, err)
			d.Assertion.Credential = idle.ID()
			d.Assertion.AuthenticatorData, d.Assertion.ClientData, d.Assertion.Signature = idle.Sign(c.Challenge)
			return alice, id, d
		},
		"another signature": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			d.Assertion.Signature[len(d.Assertion.Signature)-1] ^= 1
			return alice, id, d
		},
		"no challenge of ours": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			d.Assertion.AuthenticatorData, d.Assertion.ClientData, d.Assertion.Signature = k.Sign(make([]byte, 32))
			return alice, id, d
		},
		"no client data": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			d.Assertion.ClientData = []byte("{")
			return alice, id, d
		},
		"a user who was not verified": func() (Person, string, Decision) {
			unverified := *k
			unverified.Unverified = true
			return alice, id, w.signed(alice, id, approve("ok"), &unverified)
		},
		"another site": func() (Person, string, Decision) {
			phished := *k
			phished.Origin = "http://evil.example"
			return alice, id, w.signed(alice, id, approve("ok"), &phished)
		},
		"a challenge that is over": func() (Person, string, Decision) {
			d := w.signed(alice, id, approve("ok"), k)
			w.advance(ChallengeLife)
			return alice, id, d
		},
	} {
		before := len(w.refusals())
		p, id, d := forge()
		if _, err := w.a.Decide(t.Context(), p, id, d); err == nil {
			t.Fatalf("%s: it counts", name)
		} else {
			isErr(t, err, ErrSignature)
		}
		if n := len(w.refusals()); n != before+1 {
			t.Fatalf("%s: %d refusals on record", name, n-before)
		}
	}
	d := w.signed(alice, id, approve("ok"), k)
	_, err = w.a.Decide(t.Context(), alice, id, d)
	ok(t, err)
	_, err = w.a.Decide(t.Context(), alice, other, d)
	isErr(t, err, ErrSignature) // used once
}

func TestARevokedPasskeySignsNothing(t *testing.T) {
	w := newWorld(t)
	w.admins = []string{"admin"}
	w.a.Close()
	w.people()
	k, enrolled := w.enrol(alice)
	_, err := w.a.ActivatePasskey(t.Context(), bob, enrolled.ID)
	isErr(t, err, ErrPasskeyPerson) // not of the group that looks after keys
	_, err = w.a.ActivatePasskey(t.Context(), owner, enrolled.ID)
	ok(t, err)
	id := w.ask("app:signed")
	d := w.signed(alice, id, approve("ok"), k)
	_, err = w.a.RevokePasskey(t.Context(), bob, enrolled.ID)
	isErr(t, err, ErrPasskeyPerson)
	revoked, err := w.a.RevokePasskey(t.Context(), owner, enrolled.ID)
	ok(t, err)
	if revoked.Revoked.IsZero() {
		t.Fatalf("%+v", revoked)
	}
	_, err = w.a.Decide(t.Context(), alice, id, d)
	isErr(t, err, ErrSignature)
	_, err = w.a.RevokePasskey(t.Context(), alice, enrolled.ID)
	isErr(t, err, ErrPasskeyClosed)
	_, err = w.a.ActivatePasskey(t.Context(), owner, enrolled.ID)
	isErr(t, err, ErrPasskeyClosed)
	_, err = w.a.RevokePasskey(t.Context(), alice, "none")
	isErr(t, err, ErrNotFound)
	// Losing a key: another one is enrolled, and the owner revokes it too.
	_, again := w.enrol(alice)
	_, err = w.a.RevokePasskey(t.Context(), alice, again.ID)
	ok(t, err)
	w.refused("user:bob role-forbidden", "user:bob role-forbidden", "user:alice passkey-required")
}

func TestAPasskeyIsActiveByItselfAfterTheDelay(t *testing.T) {
	w := newWorld(t)
	w.after = 24 * time.Hour
	w.a.Close()
	w.people()
	events, end := w.a.Subscribe()
	defer end()
	_, enrolled := w.enrol(alice)
	_, stopped := w.enrol(bob)
	if !enrolled.ActiveFrom.Equal(w.clock().Add(w.after)) {
		t.Fatalf("%+v", enrolled)
	}
	_, err := w.a.RevokePasskey(t.Context(), bob, stopped.ID)
	ok(t, err)
	for range 3 {
		next(t, events, EventPasskey)
	}
	w.advance(w.after - time.Second)
	ok(t, w.a.activateDue(t.Context()))
	if k, err := w.a.keyByID(t.Context(), "", enrolled.ID); err != nil || k.Active {
		t.Fatalf("%+v, %v", k, err)
	}
	w.advance(time.Second)
	if e := next(t, events, EventPasskey); !e.Passkey.Active || e.Passkey.ID != enrolled.ID {
		t.Fatalf("%+v", e.Passkey)
	}
	if k, err := w.a.keyByID(t.Context(), "", stopped.ID); err != nil || k.Active {
		t.Fatalf("a revoked key is active: %+v, %v", k, err)
	}
}

func TestAnEnrolmentIsAnchoredInAFreshLoginForThisKey(t *testing.T) {
	w := newWorld(t)
	op, other := newProvider(t), newProvider(t)
	good := Anchor{JWK: op.jwk(t), Issuer: "https://id.example.test", ClientID: "countersign"}
	for name, change := range map[string]func(claims map[string]any, a *Anchor){
		"an ordinary login": func(c map[string]any, _ *Anchor) { c["nonce"] = "of-an-ordinary-login-elsewhere" },
		"another issuer":    func(c map[string]any, _ *Anchor) { c["iss"] = "https://evil.example" },
		"another client":    func(c map[string]any, _ *Anchor) { c["aud"] = "other" },
		"other clients":     func(c map[string]any, _ *Anchor) { c["aud"] = []string{"other", "another"} },
		"another person":    func(c map[string]any, _ *Anchor) { c["preferred_username"] = "bob" },
		"no person":         func(c map[string]any, _ *Anchor) { delete(c, "preferred_username") },
		"an old login": func(c map[string]any, _ *Anchor) {
			c["iat"] = w.clock().Add(-store.EnrolmentFresh - time.Second).Unix()
		},
		"a login to come": func(c map[string]any, _ *Anchor) {
			c["iat"] = w.clock().Add(store.EnrolmentLeeway + time.Second).Unix()
		},
		"no time":             func(c map[string]any, _ *Anchor) { delete(c, "iat") },
		"expired":             func(c map[string]any, _ *Anchor) { c["exp"] = w.clock().Add(-time.Hour).Unix() },
		"another's signature": func(_ map[string]any, a *Anchor) { a.JWK = other.jwk(t) },
		"no key":              func(_ map[string]any, a *Anchor) { a.JWK = []byte("{}") },
		"no issuer":           func(c map[string]any, a *Anchor) { a.Issuer = ""; c["iss"] = "" },
	} {
		e, err := w.a.BeginEnrolment(t.Context(), alice, "")
		ok(t, err)
		k := passkeytest.New("localhost", "http://localhost:8788")
		id, nonce, err := w.a.Register(t.Context(), alice, k.Create(e.Challenge))
		ok(t, err)
		claims, a := w.claims(alice, nonce), good
		change(claims, &a)
		a.IDToken = op.sign(t, claims)
		if _, err := w.a.FinishEnrolment(t.Context(), alice, id, a); err == nil {
			t.Fatalf("%s: enrolled", name)
		} else {
			isErr(t, err, ErrEnrolment)
		}
	}
	e, err := w.a.BeginEnrolment(t.Context(), alice, "")
	ok(t, err)
	k := passkeytest.New("localhost", "http://localhost:8788")
	_, _, err = w.a.Register(t.Context(), bob, k.Create(e.Challenge))
	isErr(t, err, ErrEnrolment) // another's challenge
	_, _, err = w.a.Register(t.Context(), alice, k.Create(e.Challenge))
	ok(t, err)
	_, _, err = w.a.Register(t.Context(), alice, k.Create(e.Challenge))
	isErr(t, err, ErrEnrolment) // taken
	if keys, err := w.a.Passkeys(t.Context(), &alice); err != nil || len(keys) != 0 {
		t.Fatalf("%v, %v", keys, err)
	}
}

func TestWhatABrowserMustNotSendEnrolsNothing(t *testing.T) {
	w := newWorld(t)
	for name, forge := range map[string]func(k *passkeytest.Key, challenge []byte) []byte{
		"not verified":        func(k *passkeytest.Key, c []byte) []byte { k.Unverified = true; return k.Create(c) },
		"another site":        func(k *passkeytest.Key, c []byte) []byte { k.Origin = "http://evil.example"; return k.Create(c) },
		"another party":       func(k *passkeytest.Key, c []byte) []byte { k.RPID = "evil.example"; return k.Create(c) },
		"in a frame":          func(k *passkeytest.Key, c []byte) []byte { k.CrossOrigin = true; return k.Create(c) },
		"another challenge":   func(k *passkeytest.Key, _ []byte) []byte { return k.Create(make([]byte, 32)) },
		"an assertion":        func(k *passkeytest.Key, c []byte) []byte { return k.Get(c) },
		"nothing":             func(*passkeytest.Key, []byte) []byte { return nil },
		"more than it may be": func(*passkeytest.Key, []byte) []byte { return make([]byte, maxResponse+1) },
	} {
		e, err := w.a.BeginEnrolment(t.Context(), alice, "")
		ok(t, err)
		if _, _, err := w.a.Register(t.Context(), alice, forge(passkeytest.New("localhost", "http://localhost:8788"), e.Challenge)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	_, err := w.a.BeginEnrolment(t.Context(), alice, "two\nlines")
	isErr(t, err, ErrMalformed)
}

func TestOnePasskeyIsEnrolledOnce(t *testing.T) {
	w := newWorld(t)
	op := newProvider(t)
	k := passkeytest.New("localhost", "http://localhost:8788")
	enrol := func(p Person) error {
		e, err := w.a.BeginEnrolment(t.Context(), p, "")
		ok(t, err)
		id, nonce, err := w.a.Register(t.Context(), p, k.Create(e.Challenge))
		ok(t, err)
		_, err = w.a.FinishEnrolment(t.Context(), p, id, Anchor{IDToken: op.sign(t, w.claims(p, nonce)), JWK: op.jwk(t),
			Issuer: "https://id.example.test", ClientID: "countersign"})
		return err
	}
	ok(t, enrol(alice))
	isErr(t, enrol(alice), ErrEnrolment)
	isErr(t, enrol(bob), ErrEnrolment)
}

func TestAnEnrolmentOnRecordShowsThatTheProviderVouchedForThisKey(t *testing.T) {
	w := newWorld(t)
	_, enrolled := w.enrol(alice)
	page, err := w.ledger.History(t.Context(), ledger.Query{Type: string(store.PasskeyEnrolled)})
	ok(t, err)
	h := page.Entries[0]
	e, err := store.ParseLeaf(h.Entry)
	ok(t, err)
	d, err := store.DetailsAs[store.EnrolledDetails](e)
	ok(t, err)
	// What a verifier does.
	ok(t, d.CheckAnchor(w.log.Origin(), e, alice.Name, h.Opened[store.SealedIDToken], d.ProviderKey))
	if enrolled.ID != e.ID || h.Opened[store.SealedPerson] != alice.Name || h.Opened[store.SealedLabel] != "laptop" {
		t.Fatalf("%v", h.Opened)
	}
	for _, change := range []func(d *store.EnrolledDetails, person *string){
		func(d *store.EnrolledDetails, _ *string) { d.Key[len(d.Key)-1] ^= 1 },
		func(d *store.EnrolledDetails, _ *string) { d.Credential += "A" },
		func(d *store.EnrolledDetails, _ *string) { d.Origin = "https://evil.example" },
		func(d *store.EnrolledDetails, p *string) { *p = key.Pseudonym(bob.Name) },
	} {
		d, err := store.DetailsAs[store.EnrolledDetails](e)
		ok(t, err)
		other, person := *e, *e.Person
		change(&d, &person)
		other.Person = &person
		isErr(t, d.CheckAnchor(w.log.Origin(), &other, alice.Name, h.Opened[store.SealedIDToken], d.ProviderKey), store.ErrAnchor)
	}
}

func TestWhatOnePersonBeginsDoesNotPushOutAnother(t *testing.T) {
	var p pending[int]
	p.life = time.Minute
	now := time.Now()
	p.put(now, "a", "first", 1)
	for i := range 1000 {
		p.put(now, "b", fmt.Sprint(i), i)
	}
	if len(p.of["b"]) != maxPending {
		t.Fatalf("%d under way", len(p.of["b"]))
	}
	if _, ok := p.take(now, "b", "first"); ok {
		t.Fatal("another's")
	}
	if v, ok := p.take(now, "a", "first"); !ok || v != 1 {
		t.Fatal("pushed out")
	}
	if _, ok := p.take(now, "a", "first"); ok {
		t.Fatal("taken twice")
	}
	p.put(now, "a", "second", 2)
	if _, ok := p.take(now.Add(time.Minute), "a", "second"); ok {
		t.Fatal("it is over")
	}
}

func FuzzRegisterTakesOnlyWhatABrowserMadeForIt(f *testing.F) {
	k := passkeytest.New("localhost", "http://localhost:8788")
	challenge := make([]byte, 32)
	f.Add(k.Create(challenge))
	f.Add([]byte("{}"))
	f.Add([]byte(nil))
	// Without a ledger, which Register does not ask: its goroutines would look to
	// the fuzzer like something new in every input.
	a := &Approvals{c: Config{Now: time.Now}, rpID: "localhost", web: "http://localhost:8788"}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := a.Register(context.Background(), alice, b); err == nil {
			t.Fatal("taken, with no enrolment under way")
		}
	})
}
