package issuer

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// decision is one person's, as the recorder would put it on record.
type decision struct {
	person  string
	groups  []string
	verdict string
	on      string // leaf hash of what was decided on; empty: of what was asked
	reason  bool
	at      store.Time
	late    bool // on record after the intent
	terms   *store.StandingTerms
	key     *passkey // that signs; nil: none
	forge   func(*store.DecidedDetails)
}

// passkey is a key in software, and what the warrant shows of it.
type passkey struct {
	key       *ecdsa.PrivateKey
	owner     string
	by        string // who activated it; "-": nobody
	revoked   bool
	unshown   bool
	enrolment string
}

// asking is a request that people decide, from its beginning to its intent.
type asking struct {
	scope     string
	ruleScope string // whose rule people are asked by; scope's by default
	rule      func(*store.Rule)
	subject   string
	owners    []string
	asked     func(*store.Entry, *store.ApprovalRequestedDetails)
	decisions []decision
	standing  *asking // the one whose decisions the request draws on
	use       func(*store.StandingUse)
	intent    func(*store.Entry, *store.IssuingDetails)
	at        store.Time // when it was asked; now by default
	run       string
}

func person(name string) string {
	if name == "" {
		return ""
	}
	return "p-" + name
}

func approve(name, group string) decision {
	return decision{person: name, groups: []string{group}, verdict: store.Approve, reason: true}
}

// put puts a on the test's log and returns the warrant.
func (b *bench) put(a asking) store.Warrant {
	b.t.Helper()
	request, intent := b.entries(ask{scope: a.scope})
	rd, err := store.DetailsAs[store.RequestedDetails](request)
	if err != nil {
		b.t.Fatal(err)
	}
	request.Decision = &store.Decision{Outcome: store.NeedsApproval, Policy: b.set.Digest(), Reasons: []string{"needs approval"}}
	if a.subject != "" {
		request.Subject = &store.Subject{ID: person(a.subject)}
	}
	if a.run != "" {
		request.Run, intent.Run = a.run, a.run
		request.Agent = SPIFFEID(trustDomain, "demo", a.run, "step-1")
		intent.Agent = request.Agent
	}
	w := store.Warrant{Approval: &store.Approval{}}
	id := store.IssuingDetails{Attempt: 1, Grant: rd.Grant.Digest(), NotPast: store.At(time.Now().Add(time.Minute))}
	var late []decision
	var askedHash string
	var asked *store.Entry
	var ad store.ApprovalRequestedDetails
	if a.standing != nil {
		from := b.put(*a.standing)
		w.Approval = from.Approval
		e, err := store.ParseLeaf(from.Request.Leaf)
		if err != nil {
			b.t.Fatal(err)
		}
		id.Approval = e.Request
		sc, _ := b.set.Scope(a.scope)
		use := &store.StandingUse{Request: e.Request, Rule: *sc.Approval, Excluded: []string{}}
		if a.use != nil {
			a.use(use)
		}
		rd.Standing = use
		request.SetDetails(rd)
		got := b.log.append(request)
		w.Request = got.Receipt(0)
	} else {
		if a.ruleScope == "" {
			a.ruleScope = a.scope
		}
		sc, _ := b.set.Scope(a.ruleScope)
		ad = store.ApprovalRequestedDetails{Approval: "apr_1", Grant: rd.Grant, Rule: *sc.Approval, Excluded: []string{}}
		for _, o := range a.owners {
			ad.Excluded = append(ad.Excluded, person(o))
		}
		if a.rule != nil {
			a.rule(&ad.Rule)
		}
		c := *request
		asked = &c
		asked.ID, asked.Type, asked.Time = store.NewID(), store.ApprovalRequested, a.at
		if a.asked != nil {
			a.asked(asked, &ad)
		}
		asked.SetDetails(ad)
		got := b.log.append(request, asked)
		w.Request, w.Approval.Requested = got.Receipt(0), got.Receipt(1)
		askedHash = store.HashText(store.LeafHash(got.Entries[1].Leaf))
		id.Approval = request.Request
	}
	keys := map[*passkey]bool{}
	decide := func(d decision) {
		if k := d.key; k != nil && !keys[k] {
			keys[k] = true
			w.Approval.Passkeys = append(w.Approval.Passkeys, b.enrol(k)...)
		}
		on := d.on
		if on == "" {
			on = askedHash
		}
		e := &store.Entry{ID: store.NewID(), Type: store.ApprovalDecided, Time: d.at, Agent: "spiffe://" + trustDomain + "/recorder", Orchestrator: asked.Orchestrator,
			Run: asked.Run, Step: asked.Step, Request: asked.Request, Resource: asked.Resource, Action: asked.Action, Person: store.Ptr(person(d.person))}
		if d.reason {
			e.Sealed = map[string]string{store.SealedReason: "commitment"}
		}
		details := store.DecidedDetails{Approval: ad.Approval, Requested: on, Decision: d.verdict, Groups: d.groups, Via: "page", Standing: d.terms}
		if d.terms != nil {
			e.Type = store.ApprovalStanding
		}
		if d.key != nil {
			details.Assertion = d.key.sign(b.t, store.DecisionDigest(b.log.verifier.Origin(), e, &details))
		}
		if d.forge != nil {
			d.forge(&details)
		}
		e.SetDetails(details)
		w.Approval.Decisions = append(w.Approval.Decisions, b.log.append(e).Receipt(0))
		if d.key != nil && d.key.revoked {
			r := &store.Entry{ID: store.NewID(), Type: store.PasskeyRevoked, Agent: "spiffe://" + trustDomain + "/recorder", Person: store.Ptr(person(d.key.owner))}
			r.SetDetails(store.PasskeyRevokedDetails{Enrolled: d.key.enrolment, By: person(d.key.owner)})
			w.Approval.Passkeys = append(w.Approval.Passkeys, b.log.append(r).Receipt(0))
		}
	}
	for _, d := range a.decisions {
		if d.late {
			late = append(late, d)
		} else {
			decide(d)
		}
	}
	if a.intent != nil {
		a.intent(intent, &id)
	}
	intent.SetDetails(id)
	w.Intent = b.log.append(intent).Receipt(0)
	for _, d := range late {
		decide(d)
	}
	return w
}

// enrol puts a passkey on record.
func (b *bench) enrol(k *passkey) []store.Receipt {
	b.t.Helper()
	point, err := k.key.PublicKey.Bytes()
	if err != nil {
		b.t.Fatal(err)
	}
	cose, err := cbor.Marshal(map[int]any{1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:]}) // EC2, ES256, P-256 (RFC 9053)
	if err != nil {
		b.t.Fatal(err)
	}
	e := &store.Entry{ID: store.NewID(), Type: store.PasskeyEnrolled, Agent: "spiffe://" + trustDomain + "/recorder", Person: store.Ptr(person(k.owner))}
	e.SetDetails(store.EnrolledDetails{Credential: "Y3JlZA", Key: cose, RPID: "localhost", Origin: "http://localhost:8788", Salt: make([]byte, 32),
		Issuer: "https://id.example", Client: "countersign", ProviderKey: []byte("{}")})
	k.enrolment = e.ID
	out := []store.Receipt{b.log.append(e).Receipt(0)}
	if k.by != "-" {
		act := &store.Entry{ID: store.NewID(), Type: store.PasskeyActivated, Agent: e.Agent, Person: e.Person}
		act.SetDetails(store.ActivatedDetails{Enrolled: e.ID, By: person(k.by)})
		out = append(out, b.log.append(act).Receipt(0))
	}
	if k.unshown {
		return nil
	}
	return out
}

func newPasskey(t testing.TB, owner, by string) *passkey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &passkey{key: key, owner: owner, by: by}
}

// sign signs as a browser does (W3C WebAuthn, section 7.2), the user verified.
func (k *passkey) sign(t testing.TB, digest [32]byte) *store.Assertion {
	t.Helper()
	rp := sha256.Sum256([]byte("localhost"))
	auth := append(rp[:], 0x05, 0, 0, 0, 1)
	client := fmt.Appendf(nil, `{"type":"webauthn.get","challenge":%q,"origin":"http://localhost:8788","crossOrigin":false}`, base64.RawURLEncoding.EncodeToString(digest[:]))
	hash := sha256.Sum256(client)
	sum := sha256.Sum256(append(bytes.Clone(auth), hash[:]...))
	sig, err := ecdsa.SignASN1(rand.Reader, k.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return &store.Assertion{Enrolled: k.enrolment, AuthenticatorData: auth, ClientData: client, Signature: sig}
}

// theCatalogue is the demo's, in which admin wants passkeys and write may be
// approved for a whole run.
func theCatalogue() string {
	s := string(scopes.Demo(nil))
	at := func(scope, from, to string) {
		i := strings.Index(s, "name: "+scope)
		s = s[:i] + strings.Replace(s[i:], from, to, 1)
	}
	both := "reasons: {requester: true, approver: true}"
	at("vault:demo-write", both, both+"\n      standing: {uses: 3, for: 1h}")
	at("vault:demo-admin", both, both+"\n      passkey: true")
	return s
}

func TestNothingIsMintedOnLessThanWhatPeopleApproved(t *testing.T) {
	var proxy *vaulttest.Proxy
	b := newBench(t, benchOptions{catalogue: theCatalogue(), change: func(c *Config) {
		proxy = vaulttest.NewProxy(t, c.Addr)
		c.Addr = proxy.Addr
	}})
	ago := func(d time.Duration) store.Time { return store.At(time.Now().Add(-d)) }
	hour := &store.StandingTerms{Scopes: []string{"vault:demo-write"}, Uses: 3, Until: store.At(time.Now().Add(50 * time.Minute))}
	whole := func(change func(*store.StandingTerms)) *asking {
		terms := *hour
		change(&terms)
		d := approve("alice", "dba")
		d.terms = &terms
		return &asking{scope: "vault:demo-write", decisions: []decision{d}}
	}
	same := func(*store.StandingTerms) {}
	with := func(d decision, change func(*decision)) []decision { change(&d); return []decision{d} }
	one := []decision{approve("alice", "dba")}
	signed := func(change func(ka, kb *passkey), more ...func(d []decision)) []decision {
		ka, kb := newPasskey(t, "alice", "carol"), newPasskey(t, "bob", "carol")
		change(ka, kb)
		ds := []decision{approve("alice", "dba"), approve("bob", "dba")}
		ds[0].key, ds[1].key = ka, kb
		for _, f := range more {
			f(ds)
		}
		return ds
	}
	unchanged := func(*passkey, *passkey) {}

	for name, c := range map[string]struct {
		a    asking
		drop bool // no approval is shown
		want string
	}{
		"no approval":                   {a: asking{scope: "vault:demo-write", decisions: one}, drop: true, want: "none is shown"},
		"no decision":                   {a: asking{scope: "vault:demo-write"}, want: "not met"},
		"a denial":                      {a: asking{scope: "vault:demo-write", decisions: with(one[0], func(d *decision) { d.verdict = store.Refuse })}, want: "is a denial"},
		"a decision on another leaf":    {a: asking{scope: "vault:demo-write", decisions: with(one[0], func(d *decision) { d.on = store.HashText(store.LeafHash([]byte("other"))) })}, want: "something else"},
		"too few":                       {a: asking{scope: "vault:demo-admin", decisions: signed(unchanged)[:1]}, want: "not met"},
		"one person twice":              {a: asking{scope: "vault:demo-admin", decisions: func() []decision { ds := signed(unchanged); return []decision{ds[0], ds[0]} }()}, want: "not met"},
		"a person of another group":     {a: asking{scope: "vault:demo-write", decisions: []decision{approve("alice", "sre")}}, want: "not met"},
		"the subject":                   {a: asking{scope: "vault:demo-write", subject: "alice", decisions: one}, want: "requester's side"},
		"an owner of the orchestrator":  {a: asking{scope: "vault:demo-write", owners: []string{"alice"}, decisions: one}, want: "requester's side"},
		"a decision without its reason": {a: asking{scope: "vault:demo-write", decisions: with(one[0], func(d *decision) { d.reason = false })}, want: "no reason"},
		"a decision after the end":      {a: asking{scope: "vault:demo-write", at: ago(2 * time.Hour), decisions: one}, want: "expired"},
		"a decision after the intent":   {a: asking{scope: "vault:demo-write", decisions: with(one[0], func(d *decision) { d.late = true })}, want: "does not lie between"},
		"an approval collected late":    {a: asking{scope: "vault:demo-write", at: ago(30 * time.Minute), decisions: with(one[0], func(d *decision) { d.at = ago(20 * time.Minute) })}, want: "not collected in time"},
		"another grant than was shown": {a: asking{scope: "vault:demo-write", decisions: one, asked: func(_ *store.Entry, d *store.ApprovalRequestedDetails) {
			d.Grant.TTL = store.Duration(time.Second)
		}}, want: "something other than what would be granted"},
		"the approval of another request": {a: asking{scope: "vault:demo-write", decisions: one, asked: func(e *store.Entry, _ *store.ApprovalRequestedDetails) {
			e.Request = "req_other"
		}}, want: "another request"},
		"the approval of another step": {a: asking{scope: "vault:demo-write", decisions: one, asked: func(e *store.Entry, _ *store.ApprovalRequestedDetails) {
			e.Step = "step-2"
		}}, want: "another request"},
		"an intent that points elsewhere": {a: asking{scope: "vault:demo-write", decisions: one, intent: func(_ *store.Entry, d *store.IssuingDetails) {
			d.Approval = "req_other"
		}}, want: "another approval"},
		"an intent that points nowhere": {a: asking{scope: "vault:demo-write", decisions: one, intent: func(_ *store.Entry, d *store.IssuingDetails) {
			d.Approval = ""
		}}, want: "another approval"},
		"an intent under another policy": {a: asking{scope: "vault:demo-write", decisions: one, intent: func(e *store.Entry, _ *store.IssuingDetails) {
			e.Decision = &store.Decision{Outcome: store.Allow, Policy: "sha256:00"}
		}}, want: "in force is"},
		"fewer people than the catalogue wants": {a: asking{scope: "vault:demo-admin", rule: func(r *store.Rule) { r.Groups = []store.RuleGroup{{Group: "dba", Count: 1}} },
			decisions: signed(unchanged)[:1]}, want: "needs more approval"},
		"other people than the catalogue wants": {a: asking{scope: "vault:demo-write", rule: func(r *store.Rule) { r.Groups = []store.RuleGroup{{Group: "sre", Count: 1}} },
			decisions: []decision{approve("alice", "sre")}}, want: "needs more approval"},
		"a rule without passkeys":  {a: asking{scope: "vault:demo-admin", rule: func(r *store.Rule) { r.Passkey = false }, decisions: []decision{approve("alice", "dba"), approve("bob", "dba")}}, want: "needs more approval"},
		"a rule without reasons":   {a: asking{scope: "vault:demo-write", rule: func(r *store.Rule) { r.Reasons.Approver = false }, decisions: with(one[0], func(d *decision) { d.reason = false })}, want: "needs more approval"},
		"a rule that waits longer": {a: asking{scope: "vault:demo-write", rule: func(r *store.Rule) { r.Expires *= 2 }, decisions: one}, want: "needs more approval"},
		"a rule of no groups":      {a: asking{scope: "vault:demo-write", rule: func(r *store.Rule) { r.Groups = nil }}, want: "groups"},

		"unsigned where a passkey is due": {a: asking{scope: "vault:demo-admin", decisions: []decision{approve("alice", "dba"), approve("bob", "dba")}}, want: "not signed"},
		"signed by another's key": {a: asking{scope: "vault:demo-admin", decisions: signed(unchanged, func(ds []decision) {
			ds[0].key = newPasskey(t, "mallory", "carol")
		})}, want: "passkey"},
		"signed with a key that nobody activated": {a: asking{scope: "vault:demo-admin", decisions: signed(func(a, _ *passkey) { a.by = "-" })}, want: "passkey"},
		"signed with a key that its owner activated": {a: asking{scope: "vault:demo-admin", decisions: signed(func(a, _ *passkey) { a.by = "alice" })},
			want: "passkey"},
		"signed with a key that is not shown":      {a: asking{scope: "vault:demo-admin", decisions: signed(func(a, _ *passkey) { a.unshown = true })}, want: "passkey"},
		"signed with a key that was revoked since": {a: asking{scope: "vault:demo-admin", decisions: signed(func(_, b *passkey) { b.revoked = true })}, want: "revoked"},
		"a denial's signature under an approval": {a: asking{scope: "vault:demo-admin", decisions: signed(unchanged, func(ds []decision) {
			ds[0].verdict, ds[0].forge = store.Refuse, func(d *store.DecidedDetails) { d.Decision = store.Approve }
		})}, want: "passkey"},
		"a signature with a byte changed": {a: asking{scope: "vault:demo-admin", decisions: signed(unchanged, func(ds []decision) { ds[0].forge = func(d *store.DecidedDetails) { d.Assertion.Signature[12] ^= 1 } })}, want: "passkey"},
		"a signature without the user being verified": {a: asking{scope: "vault:demo-admin", decisions: signed(unchanged, func(ds []decision) {
			ds[0].forge = func(d *store.DecidedDetails) { d.Assertion.AuthenticatorData[32] = 1 }
		})}, want: "passkey"},

		"a run's approval for another run": {a: asking{scope: "vault:demo-write", run: "run-2", standing: whole(same)}, want: "another run"},
		"a run's approval for another scope": {a: asking{scope: "vault:demo-write", standing: whole(func(s *store.StandingTerms) {
			s.Scopes = []string{"vault:demo-admin"}
		})}, want: "does not stand"},
		"a run's approval after its end":       {a: asking{scope: "vault:demo-write", standing: whole(func(s *store.StandingTerms) { s.Until = ago(time.Second) })}, want: "does not stand"},
		"a run's approval of an owner":         {a: asking{scope: "vault:demo-write", standing: whole(same), use: func(u *store.StandingUse) { u.Excluded = []string{person("alice")} }}, want: "requester's side"},
		"a run's approval of the subject":      {a: asking{scope: "vault:demo-write", subject: "alice", standing: whole(same)}, want: "requester's side"},
		"a single approval for a whole run":    {a: asking{scope: "vault:demo-write", standing: &asking{scope: "vault:demo-write", decisions: one}}, want: "does not stand"},
		"a run's approval under a weaker rule": {a: asking{scope: "vault:demo-write", standing: whole(same), use: func(u *store.StandingUse) { u.Rule.Reasons.Approver = false }}, want: "needs more approval"},
		"a run's approval for longer than the catalogue allows": {a: asking{scope: "vault:demo-write", standing: whole(func(s *store.StandingTerms) {
			s.Until = store.At(time.Now().Add(3 * time.Hour))
		})}, want: "for a whole run"},
		"a run's approval for more uses than the catalogue allows": {a: asking{scope: "vault:demo-write", standing: whole(func(s *store.StandingTerms) { s.Uses = 4 })}, want: "for a whole run"},
		"a run's approval for a scope that takes none": {a: asking{scope: "vault:demo-admin", standing: &asking{scope: "vault:demo-write",
			rule: func(r *store.Rule) { r.Passkey = true }, decisions: signed(unchanged, func(ds []decision) {
				terms := *hour
				terms.Scopes = []string{"vault:demo-admin"}
				ds[0].terms, ds[1].terms = &terms, &terms
			})}}, want: "for a whole run"},
		"a run's approval of too few for the scope": {a: asking{scope: "vault:demo-admin", use: func(u *store.StandingUse) {
			u.Rule.Passkey = false
			u.Rule.Standing = &store.StandingLimit{Uses: 100, For: store.Duration(24 * time.Hour)}
		},
			standing: whole(func(s *store.StandingTerms) { s.Scopes = []string{"vault:demo-admin"} })}, want: "not met"},
	} {
		t.Run(name, func(t *testing.T) {
			w := b.put(c.a)
			if c.drop {
				w.Approval = nil
			}
			m, err := b.iss.Mint(t.Context(), w)
			if m != nil || !errors.Is(err, store.ErrWarrant) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, %v; want an error that says %q", m, err, c.want)
			}
		})
	}
	for _, seen := range proxy.Seen() {
		if !strings.HasSuffix(seen, "auth/token/renew-self") && !strings.HasSuffix(seen, "auth/token/lookup-self") { // the login's own
			t.Fatalf("reached Vault: %q", seen)
		}
	}
	// And what is approved is minted, so that the refusals above mean something.
	for name, a := range map[string]asking{
		"one of dba":                    {scope: "vault:demo-write", subject: "carol", owners: []string{"dave"}, decisions: one},
		"two of dba, signed":            {scope: "vault:demo-admin", decisions: signed(unchanged)},
		"a key activated after a delay": {scope: "vault:demo-admin", decisions: signed(func(a, _ *passkey) { a.by = "" })},
		"more people than are due":      {scope: "vault:demo-write", decisions: []decision{approve("alice", "dba"), approve("bob", "sre")}},
		"for the whole run":             {scope: "vault:demo-write", standing: whole(same)},
	} {
		if m, err := b.iss.Mint(t.Context(), b.put(a)); err != nil || m == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
