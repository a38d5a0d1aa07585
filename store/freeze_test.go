package store

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func freezeBy(person string, d FreezeDetails) *Entry {
	e := &Entry{V: 1, ID: NewID(), Type: FreezeSet, Agent: "spiffe://example.test/recorder/r", Action: string(FreezeSet), Person: Ptr(person)}
	e.SetDetails(d)
	return e
}

func liftBy(person, freeze string) *Entry {
	e := &Entry{V: 1, ID: NewID(), Type: FreezeLifted, Agent: "spiffe://example.test/recorder/r", Action: string(FreezeLifted), Person: Ptr(person)}
	e.SetDetails(FreezeLiftedDetails{Freeze: freeze})
	return e
}

func (p *play) recorder(es ...*Entry) {
	p.t.Helper()
	if err := p.as("recorder", es...); err != nil {
		p.t.Fatal(err)
	}
}

func TestAFreezeCoversWhatAllItsNamesHoldFor(t *testing.T) {
	for _, c := range []struct {
		f    FreezeDetails
		o, r string
		s, a string
		want bool
	}{
		{FreezeDetails{All: true}, "o", "r", "s", "x:y", true},
		{FreezeDetails{}, "o", "r", "s", "x:y", false},
		{FreezeDetails{}, "", "", "", "", false},
		{FreezeDetails{Run: "r"}, "o", "r", "s", "x:y", true},
		{FreezeDetails{Run: "r"}, "o", "R", "s", "x:y", false},
		{FreezeDetails{Run: "r", Scope: "x:y"}, "o", "r", "s", "x:y", true},
		{FreezeDetails{Run: "r", Scope: "x:y"}, "o", "r", "s", "x:z", false},
		{FreezeDetails{Step: "s"}, "o", "r", "s", "x:y", true},
		{FreezeDetails{Orchestrator: "o", Step: "t"}, "o", "r", "s", "x:y", false},
	} {
		if got := c.f.Covers(c.o, c.r, c.s, c.a); got != c.want {
			t.Errorf("%+v covers %s %s %s %s: %v, want %v", c.f, c.o, c.r, c.s, c.a, got, c.want)
		}
	}
}

func TestAFreezeOfNothingOrOfWhatIsNoNameIsRefused(t *testing.T) {
	for _, f := range []FreezeDetails{
		{}, {All: true, Run: "r"}, {Run: "r\n"}, {Run: "*"}, {Step: "<script>"}, {Orchestrator: "a b"}, {Scope: "x y"}, {Scope: "x\x00"},
		{Scope: `x"`}, {Run: strings.Repeat("r", 129)}, {Scope: strings.Repeat("s", 129)}, {Scope: "\u202ex"},
	} {
		if f.Check() == nil {
			t.Errorf("%+v was taken", f)
		}
		p := newPlay(t)
		if err := p.as("recorder", freezeBy("p-ana", f)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%+v on record: %v", f, err)
		}
	}
	for _, f := range []FreezeDetails{{All: true}, {Run: "r"}, {Step: "s", Scope: "orders-db:read"}, {Orchestrator: "demo"}} {
		if err := f.Check(); err != nil {
			t.Errorf("%+v: %v", f, err)
		}
	}
}

func TestUnderAFreezeNothingIsRequestedOrMintedUntilItIsLifted(t *testing.T) {
	p := newPlay(t)
	approved := requestedBy("req_1", "j1", true)
	p.ok(approved)
	minting := p.issuing("req_2", 1)
	p.ok(requestedBy("req_2", "j2", false), minting)
	f := freezeBy("p-ana", FreezeDetails{Orchestrator: "demo"})
	p.recorder(f)

	p.refused(OrderFrozen, requestedBy("req_3", "j3", false), p.issuing("req_3", 1))
	p.refused(OrderFrozen, p.issuing("req_1", 1))
	denial := requestedBy("req_4", "", false)
	denial.Decision = &Decision{Outcome: Deny, Policy: "sha256:00", Reasons: []string{"frozen"}}
	p.ok(denial)
	// What was under way is put on record, so that it can be revoked.
	p.ok(issuedFor(minting, 1, At(p.now.Add(time.Minute))))
	p.ok(closing(CredentialRevoked, minting, 1))

	if got := p.s.Frozen("demo", "r", "s", "x:y"); got == nil || got.ID != f.ID || got.Person != "p-ana" {
		t.Fatalf("the freeze in force is %+v", got)
	}
	if got := p.s.Frozen("other", "r", "s", "x:y"); got != nil {
		t.Fatalf("another orchestrator is under %+v", got)
	}
	p.recorder(liftBy("p-ben", f.ID))
	if len(p.s.Freezes()) != 0 {
		t.Fatal("a lifted freeze is in force")
	}
	p.ok(p.issuing("req_1", 1))
	p.ok(requestedBy("req_3", "j3", false), p.issuing("req_3", 1))
}

func TestAFreezeIsLiftedOnceAndByAnotherPerson(t *testing.T) {
	p := newPlay(t)
	f, g := freezeBy("p-ana", FreezeDetails{All: true}), freezeBy("p-ben", FreezeDetails{Run: "r"})
	p.recorder(f, g)
	p.refusedTo("recorder", OrderLifter, liftBy("p-ana", f.ID))
	p.refusedTo("recorder", OrderNotFrozen, liftBy("p-ben", NewID()))
	p.refused(OrderForbidden, liftBy("p-ben", f.ID))
	for _, e := range []*Entry{liftBy("", f.ID), freezeBy("", FreezeDetails{All: true})} {
		if err := p.as("recorder", e); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s without a person: %v", e.Type, err)
		}
	}
	p.refusedTo("recorder", OrderNotFrozen, liftBy("p-ben", f.ID), liftBy("p-cem", f.ID))
	if got := p.s.Freezes(); len(got) != 2 || got[0].ID != f.ID || got[1].ID != g.ID {
		t.Fatalf("in force are %+v", got)
	}
	p.recorder(liftBy("p-ben", f.ID))
	p.refusedTo("recorder", OrderNotFrozen, liftBy("p-ben", f.ID))
	if got := p.s.Freezes(); len(got) != 1 || got[0].ID != g.ID {
		t.Fatalf("in force are %+v", got)
	}
}

func TestAFreezeNamesWhatItStopsInTheAppendThatSetsIt(t *testing.T) {
	p := newPlay(t)
	p.ok(requestedBy("req_1", "j1", false))
	minting := p.issuing("req_2", 1)
	p.ok(requestedBy("req_2", "j2", false), minting)
	p.ok(requestedBy("req_3", "j3", false))
	f := freezeBy("p-ana", FreezeDetails{Run: "run-req_1"})
	f.Writer, f.Time = "recorder", At(p.now)
	b := p.s.Begin()
	if err := b.Admit(f, nil, p.index, true); err != nil {
		t.Fatal(err)
	}
	if got := b.Stopped(); len(got) != 1 || got[0].ID != "req_1" {
		t.Fatalf("it stops %+v", got)
	}
	all := freezeBy("p-ana", FreezeDetails{All: true})
	if err := b.Admit(all, nil, p.index+1, true); err != nil {
		t.Fatal(err)
	}
	if got := b.Stopped(); len(got) != 2 || got[0].ID != "req_1" || got[1].ID != "req_3" {
		t.Fatalf("it stops %+v", got)
	}
	for _, r := range b.Stopped() {
		e := entryOf(RequestVoid, r.ID, nil)
		e.Details, e.Time = nil, At(p.now)
		if err := b.Admit(e, nil, p.index+2, true); err != nil {
			t.Fatal(err)
		}
	}
	if got := b.Stopped(); len(got) != 0 {
		t.Fatalf("still open: %+v", got)
	}
	b.Commit()
	for _, id := range []string{"req_1", "req_3"} {
		if r := p.s.Request(id); r == nil || r.Status != StatusVoid {
			t.Errorf("%s is %+v", id, r)
		}
	}
}

func TestFreezesAreReadBackFromTheirEntries(t *testing.T) {
	f, g := freezeBy("p-ana", FreezeDetails{Run: "r"}), freezeBy("p-ana", FreezeDetails{Scope: "x:y"})
	s := NewState()
	for i, e := range []*Entry{f, g, liftBy("p-ben", f.ID), requestedBy("req_1", "j", false)} {
		if err := s.LoadFreeze(e, int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Freezes(); len(got) != 1 || got[0].ID != g.ID || got[0].Index != 1 || got[0].Scope != "x:y" {
		t.Fatalf("in force are %+v", got)
	}
	if len(s.Requests()) != 0 {
		t.Fatal("a request was taken")
	}
	if err := s.LoadFreeze(liftBy("p-ana", g.ID), 4); err == nil {
		t.Fatal("the same person lifted it")
	}
}
