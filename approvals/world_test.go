package approvals

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/approvals/passkeytest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const catalogue = `
scopes:
  - {name: "app:read", target: "app://a", sensitivity: low, max_ttl: 15m, ask: ["*"], engine: token, vault: {policies: [{path: app/a, capabilities: [read]}]}}
  - name: app:write
    target: app://a
    sensitivity: sensitive
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/a, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], reasons: {approver: true}, expires: 10m, collect: 5m, standing: {uses: 2, for: 1h}}
  - name: app:admin
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/*, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 2}], expires: 10m, collect: 5m}
  - name: app:both
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/b, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}, {group: sre, count: 1}], expires: 10m, collect: 5m}
  - name: app:night
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/n, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], expires: 12h, hours: {from: "22:00", to: "06:00", zone: UTC, days: [mon]}}
  - name: app:signed
    target: app://a
    sensitivity: critical
    max_ttl: 15m
    ask: ["*"]
    engine: token
    vault: {policies: [{path: app/s, capabilities: [update]}]}
    approval: {groups: [{group: dba, count: 1}], expires: 1h, collect: 30m, passkey: true}
`

var (
	broker = ledger.Author{Name: "broker-1"}
	key    = store.PrivacyKey("a-privacy-key-of-at-least-32-bytes!!")
	alice  = Person{Name: "user:alice", Groups: []string{"dba"}}
	bob    = Person{Name: "user:bob", Groups: []string{"dba", "sre", "staff"}}
	carol  = Person{Name: "user:carol", Groups: []string{"sre"}}
	owner  = Person{Name: "user:owner", Groups: []string{"dba", "admin"}}
)

// world is a recorder: a real ledger with the gate, and a clock of its own.
type world struct {
	t      testing.TB
	set    *scopes.Set
	log    *store.LogVerifier
	ledger *ledger.Ledger
	a      *Approvals
	after  time.Duration // ActivateAfter
	admins []string
	o      ledger.Options

	mu  sync.Mutex
	now time.Time
	n   int
}

func newWorld(t testing.TB) *world {
	t.Helper()
	set, err := scopes.Parse("catalogue.yaml", []byte(catalogue), "", nil)
	ok(t, err)
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.example.test/ledger")
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	// A Monday.
	w := &world{t: t, set: set, now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	w.log, err = store.NewLogVerifier(vkey)
	ok(t, err)
	owners := map[string][]string{"demo": {owner.Name}}
	w.o = ledger.Options{Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: key, Now: w.clock, RecheckEvery: -1,
		Gate: Gate(scopes.Static(set), owners, key)}
	w.start()
	return w
}

// start opens the ledger and what follows it; again after stop, as after a
// restart.
func (w *world) start() {
	w.t.Helper()
	var err error
	w.ledger, err = ledger.Open(context.Background(), w.o)
	ok(w.t, err)
	w.people()
	w.t.Cleanup(w.stop)
}

func (w *world) people() {
	w.t.Helper()
	var err error
	w.a, err = New(context.Background(), Config{Ledger: w.ledger, Name: "recorder-1", TrustDomain: "example.test", Scopes: scopes.Static(w.set),
		Owners: map[string][]string{"demo": {owner.Name}}, PrivacyKey: key, Origin: w.log.Origin(), BaseURL: "http://localhost:8788",
		ActivateAfter: w.after, PasskeyAdmins: w.admins, Now: w.clock})
	ok(w.t, err)
}

func (w *world) stop() {
	w.a.Close()
	w.ledger.Close()
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wants fails unless err has the code.
func wants(t testing.TB, err error, code store.OrderCode) {
	t.Helper()
	if _, is := store.IsOrder(err, code); !is {
		t.Fatalf("got %v, want %s", err, code)
	}
}

// asking is a request on its way to the ledger, to be changed by a test.
type asking struct {
	requested, asked *store.Submission
	rd               store.RequestedDetails
	ad               store.ApprovalRequestedDetails
}

func (w *world) asking(scope string) *asking {
	w.t.Helper()
	w.n++
	grant, err := w.set.Resolve(scope, 5*time.Minute, map[string]string{}, "", "", "")
	ok(w.t, err)
	sc, _ := w.set.Scope(scope)
	id := fmt.Sprintf("req_%d", w.n)
	entry := func(t store.Type) *store.Submission {
		return &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: t, WriterTime: store.At(w.clock()),
			Agent: "spiffe://example.test/orchestrator/demo/run/run-1/step/step-" + id, Orchestrator: "demo", Run: "run-1", Step: "step-" + id,
			Request: id, Resource: grant.Target, Action: scope, Risk: &store.Risk{Sensitivity: sc.Sensitivity},
			Decision: &store.Decision{Outcome: store.NeedsApproval, Policy: w.set.Digest(), Reasons: []string{"needs approval"}}}}
	}
	x := &asking{requested: entry(store.StepRequested), asked: entry(store.ApprovalRequested),
		rd: store.RequestedDetails{Grant: grant, Join: "join-" + id, Body: "body"}}
	if sc.Approval != nil {
		x.ad = store.ApprovalRequestedDetails{Approval: "apr_" + id, Grant: grant, Rule: *sc.Approval, Excluded: []string{key.Pseudonym(owner.Name)}}
	}
	for _, s := range []*store.Submission{x.requested, x.asked} {
		s.Seal(store.SealedReason, "OPS-"+id)
	}
	return x
}

func (x *asking) subject(name string) *asking {
	for _, s := range []*store.Submission{x.requested, x.asked} {
		s.Subject = &store.Subject{ID: key.Pseudonym(name)}
		s.Seal(store.SealedSubject, name)
	}
	return x
}

// send appends the request and what people are asked, as a broker does.
func (w *world) send(x *asking) error {
	x.requested.SetDetails(x.rd)
	x.asked.SetDetails(x.ad)
	return w.append(broker, x.requested, x.asked)
}

func (w *world) append(by ledger.Author, subs ...*store.Submission) error {
	lines := make([][]byte, len(subs))
	for i, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			return err
		}
		lines[i] = b
	}
	_, err := w.ledger.Append(context.Background(), by, lines)
	return err
}

// ask has people asked, and returns the approval's ID.
func (w *world) ask(scope string) string {
	w.t.Helper()
	x := w.asking(scope)
	ok(w.t, w.send(x))
	return x.ad.Approval
}

// approve is an approval at the page.
func approve(reason string) Decision {
	return Decision{Decision: store.Approve, Reason: reason, Via: viaPage}
}

// issuing is a broker's intent to mint r.
func (w *world) issuing(r *Request) *store.Submission {
	s := w.a.about(store.CredentialIssuing, r.Scope, r)
	s.Decision = &store.Decision{Outcome: store.Allow, Policy: w.set.Digest(), Reasons: []string{}}
	s.SetDetails(store.IssuingDetails{Attempt: 1, Grant: r.Grant.Digest(), NotPast: store.At(w.clock().Add(time.Minute)), Approval: r.Request})
	return s
}

// refusals are the recorded attempts that did not count.
func (w *world) refusals() (out []string) {
	w.t.Helper()
	page, err := w.ledger.History(context.Background(), ledger.Query{Type: string(store.AccessRefused)})
	ok(w.t, err)
	for _, h := range page.Entries {
		e, err := store.ParseLeaf(h.Entry)
		ok(w.t, err)
		d, err := store.DetailsAs[store.RefusedDetails](e)
		ok(w.t, err)
		if e.Person == nil || key.Pseudonym(h.Opened[store.SealedPerson]) != *e.Person {
			w.t.Fatalf("entry %d names %v as %q", h.Index, e.Person, h.Opened[store.SealedPerson])
		}
		out = append(out, h.Opened[store.SealedPerson]+" "+d.Problem)
	}
	return out
}

func (w *world) refused(want ...string) {
	w.t.Helper()
	if got := w.refusals(); !slices.Equal(got, want) {
		w.t.Fatalf("on record as refused: %q\nwant %q", got, want)
	}
}

func (w *world) get(id string) *Request {
	w.t.Helper()
	r, err := w.a.Get(context.Background(), id)
	ok(w.t, err)
	return r
}

// next waits for the next event of kind.
func next(t testing.TB, events <-chan Event, kind string) Event {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case e := <-events:
			if e.Kind == kind {
				return e
			}
		case <-deadline:
			t.Fatalf("no event %s", kind)
		}
	}
}

// provider signs ID tokens.
type provider struct {
	key *ecdsa.PrivateKey
}

func newProvider(t testing.TB) *provider {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	return &provider{k}
}

func (p *provider) jwk(t testing.TB) []byte {
	b, err := (&jose.JSONWebKey{Key: p.key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}).MarshalJSON()
	ok(t, err)
	return b
}

func (p *provider) sign(t testing.TB, claims map[string]any) string {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.key}, (&jose.SignerOptions{}).WithHeader("kid", "k1"))
	ok(t, err)
	b, err := json.Marshal(claims)
	ok(t, err)
	o, err := s.Sign(b)
	ok(t, err)
	out, err := o.CompactSerialize()
	ok(t, err)
	return out
}

func (w *world) claims(p Person, nonce string) map[string]any {
	return map[string]any{"iss": "https://id.example.test", "aud": "countersign", "nonce": nonce, "iat": w.clock().Unix(),
		"exp": w.clock().Add(time.Hour).Unix(), "preferred_username": p.Name[len("user:"):], "sub": "s-1"}
}

// enrol enrols a passkey of p, not activated.
func (w *world) enrol(p Person) (*passkeytest.Key, *Passkey) {
	w.t.Helper()
	ctx := context.Background()
	e, err := w.a.BeginEnrolment(ctx, p, "laptop")
	ok(w.t, err)
	k := passkeytest.New("localhost", "http://localhost:8788")
	id, nonce, err := w.a.Register(ctx, p, k.Create(e.Challenge))
	ok(w.t, err)
	op := newProvider(w.t)
	out, err := w.a.FinishEnrolment(ctx, p, id, Anchor{IDToken: op.sign(w.t, w.claims(p, nonce)), JWK: op.jwk(w.t),
		Issuer: "https://id.example.test", ClientID: "countersign"})
	ok(w.t, err)
	return k, out
}

// signed is d with k's signature over what the recorder asks it to sign.
func (w *world) signed(p Person, id string, d Decision, k *passkeytest.Key) Decision {
	w.t.Helper()
	c, err := w.a.Challenge(context.Background(), p, id, d)
	ok(w.t, err)
	if !slices.Contains(c.Credentials, k.ID()) {
		w.t.Fatalf("the challenge is for %v, not %s", c.Credentials, k.ID())
	}
	d.Assertion = &Signed{Credential: k.ID()}
	d.Assertion.AuthenticatorData, d.Assertion.ClientData, d.Assertion.Signature = k.Sign(c.Challenge)
	return d
}

func isErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}
