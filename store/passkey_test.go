package store

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
	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
)

// authenticator is a passkey in software: an ES256 key of one relying party.
type authenticator struct {
	key    *ecdsa.PrivateKey
	rp     string
	origin string
	flags  byte // user present 0x01, user verified 0x04
}

func newAuthenticator(t testing.TB) *authenticator {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &authenticator{key: key, rp: "localhost", origin: "http://localhost:8788", flags: 0x05}
}

// cose is the public key as COSE_Key: EC2, ES256, P-256 (RFC 9053).
func (a *authenticator) cose(t testing.TB) []byte {
	point, err := a.key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b, err := cbor.Marshal(map[int]any{1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:]})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *authenticator) enrolled(t testing.TB) EnrolledDetails {
	return EnrolledDetails{Credential: "Y3JlZA", Key: a.cose(t), RPID: a.rp, Origin: a.origin, Salt: make([]byte, 32), Issuer: "https://id.example", Client: "countersign", ProviderKey: []byte("{}")}
}

func (a *authenticator) sign(t testing.TB, typ string, digest [32]byte) *Assertion {
	rp := sha256.Sum256([]byte(a.rp))
	auth := append(append(rp[:], a.flags), 0, 0, 0, 1)
	client := fmt.Appendf(nil, `{"type":%q,"challenge":%q,"origin":%q,"crossOrigin":false}`, typ, base64.RawURLEncoding.EncodeToString(digest[:]), a.origin)
	hash := sha256.Sum256(client)
	sum := sha256.Sum256(append(bytes.Clone(auth), hash[:]...))
	sig, err := ecdsa.SignASN1(rand.Reader, a.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return &Assertion{AuthenticatorData: auth, ClientData: client, Signature: sig}
}

func TestAPasskeyProvesItsOwnDecisionAndNothingElse(t *testing.T) {
	a := newAuthenticator(t)
	d := a.enrolled(t)
	digest := ApprovalDigest("log.example", "leaf", Approve, "p-alice", "commitment", nil)
	if err := a.sign(t, "webauthn.get", digest).Verify(&d, digest); err != nil {
		t.Fatal(err)
	}
	refused := func(name string, x *Assertion, d EnrolledDetails, digest [32]byte) {
		t.Helper()
		if err := x.Verify(&d, digest); !errors.Is(err, ErrAssertion) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, other := range map[string][32]byte{
		"another log":      ApprovalDigest("log.other", "leaf", Approve, "p-alice", "commitment", nil),
		"another request":  ApprovalDigest("log.example", "leaf2", Approve, "p-alice", "commitment", nil),
		"a denial":         ApprovalDigest("log.example", "leaf", Refuse, "p-alice", "commitment", nil),
		"another person":   ApprovalDigest("log.example", "leaf", Approve, "p-bob", "commitment", nil),
		"another reason":   ApprovalDigest("log.example", "leaf", Approve, "p-alice", "", nil),
		"a standing one":   ApprovalDigest("log.example", "leaf", Approve, "p-alice", "commitment", &StandingTerms{Scopes: []string{"x"}, Uses: 1}),
		"parts that slide": ApprovalDigest("log.example", "lea", "fapprove", "p-alice", "commitment", nil),
	} {
		refused(name, a.sign(t, "webauthn.get", digest), d, other)
	}
	good := a.sign(t, "webauthn.get", digest)
	for _, part := range []struct {
		name string
		of   func(*Assertion) *[]byte
	}{
		{"authenticator data", func(x *Assertion) *[]byte { return &x.AuthenticatorData }},
		{"client data", func(x *Assertion) *[]byte { return &x.ClientData }},
		{"signature", func(x *Assertion) *[]byte { return &x.Signature }},
	} {
		for i := range *part.of(good) {
			x := *good
			b := bytes.Clone(*part.of(good))
			b[i] ^= 1
			*part.of(&x) = b
			refused(fmt.Sprintf("%s, byte %d", part.name, i), &x, d, digest)
		}
	}
	for i := range d.Key {
		k := d
		k.Key = bytes.Clone(d.Key)
		k.Key[i] ^= 1
		refused(fmt.Sprintf("key, byte %d", i), good, k, digest)
	}
	refused("a creation", a.sign(t, "webauthn.create", digest), d, digest)
	elsewhere := *a
	elsewhere.origin = "https://evil.example"
	refused("another origin", elsewhere.sign(t, "webauthn.get", digest), d, digest)
	elsewhere = *a
	elsewhere.rp = "evil.example"
	refused("another relying party", elsewhere.sign(t, "webauthn.get", digest), d, digest)
	for _, flags := range []byte{0x00, 0x01, 0x04} {
		unverified := *a
		unverified.flags = flags
		refused(fmt.Sprintf("flags %#x", flags), unverified.sign(t, "webauthn.get", digest), d, digest)
	}
	refused("somebody else's key", newAuthenticator(t).sign(t, "webauthn.get", digest), d, digest)
	refused("nothing", &Assertion{}, d, digest)
}

// approvalStory is a log in which one person approved, with a passkey where
// there is an authenticator.
type approvalStory struct {
	t                  *testing.T
	now                time.Time
	rule               Rule
	req, asked, intent *Entry
	auth               *authenticator
	requested          string
	signing            func(*approvalStory, *Entry, *DecidedDetails)
}

func entryAt(t Type, at time.Time, details any) *Entry {
	e := entryOf(t, "req_1", details)
	e.Time, e.Writer = At(at), "broker-1"
	return e
}

func newApprovalStory(t *testing.T, passkey bool) *approvalStory {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := &approvalStory{t: t, now: now, rule: Rule{Groups: []RuleGroup{{"dba", 1}}, Expires: Duration(time.Hour), Collect: Duration(10 * time.Minute), Passkey: passkey}}
	s.req = requestedBy("req_1", "j", false)
	s.req.Decision.Outcome = NeedsApproval
	s.req.Time, s.req.Writer = At(now), "broker-1"
	s.req.Subject = &Subject{ID: "p-subject"}
	s.asked = entryAt(ApprovalRequested, now, nil)
	s.asked.Subject = s.req.Subject
	s.intent = entryAt(CredentialIssuing, now.Add(time.Minute), IssuingDetails{Attempt: 1, Grant: testGrant.Digest(), NotPast: At(now.Add(6 * time.Minute)), Approval: "req_1"})
	if passkey {
		s.auth = newAuthenticator(t)
	}
	return s
}

// warrant writes the story into a log and proves it.
func (s *approvalStory) warrant(people ...string) (*testLog, *Warrant) {
	l := newTestLog(s.t)
	s.asked.SetDetails(ApprovalRequestedDetails{Approval: "apr_1", Grant: testGrant, Rule: s.rule, Excluded: []string{"p-owner"}})
	var keys []int64
	enrolled := map[string]string{}
	if s.auth != nil {
		for _, p := range people {
			e := entryAt(PasskeyEnrolled, s.now, s.auth.enrolled(s.t))
			e.Person = Ptr(p)
			active := entryAt(PasskeyActivated, s.now, ActivatedDetails{Enrolled: e.ID, By: "p-second"})
			active.Person = Ptr(p)
			enrolled[p] = e.ID
			keys = append(keys, l.add(e), l.add(active))
		}
	}
	req, asked := l.add(s.req), l.add(s.asked)
	leaf, err := s.asked.Marshal()
	if err != nil {
		s.t.Fatal(err)
	}
	s.requested = HashText(LeafHash(leaf))
	var decisions []int64
	for _, p := range people {
		e := entryAt(ApprovalDecided, s.now.Add(time.Minute), nil)
		e.Person = Ptr(p)
		d := DecidedDetails{Approval: "apr_1", Requested: s.requested, Decision: Approve, Groups: []string{"dba"}, Via: "page"}
		if s.auth != nil {
			d.Assertion = s.auth.sign(s.t, "webauthn.get", DecisionDigest(l.v.Origin(), e, &d))
			d.Assertion.Enrolled = enrolled[p]
		}
		if s.signing != nil {
			s.signing(s, e, &d)
		}
		e.SetDetails(d)
		decisions = append(decisions, l.add(e))
	}
	intent := l.add(s.intent)
	w := &Warrant{Request: l.receipt(req), Intent: l.receipt(intent), Approval: &Approval{Requested: l.receipt(asked)}}
	for _, i := range keys {
		w.Approval.Passkeys = append(w.Approval.Passkeys, l.receipt(i))
	}
	for _, i := range decisions {
		w.Approval.Decisions = append(w.Approval.Decisions, l.receipt(i))
	}
	return l, w
}

func TestAWarrantRestsOnPeopleWhereTheRequestDoes(t *testing.T) {
	alice := []string{"p-alice"}
	for name, c := range map[string]struct {
		passkey bool
		people  []string
		alter   func(*approvalStory)
		shown   func(*Warrant)
		ok      bool
	}{
		"approved":                {people: alice, ok: true},
		"approved with a passkey": {passkey: true, people: alice, ok: true},
		"two where one is due":    {people: []string{"p-alice", "p-bob"}, ok: true},
		"nobody":                  {},
		"the subject":             {people: []string{"p-subject"}},
		"an owner":                {people: []string{"p-owner"}},
		"too few":                 {people: alice, alter: func(s *approvalStory) { s.rule.Groups[0].Count = 2 }},
		"one person shown twice":  {people: alice, alter: func(s *approvalStory) { s.rule.Groups[0].Count = 2 }, shown: func(w *Warrant) { w.Approval.Decisions = append(w.Approval.Decisions, w.Approval.Decisions[0]) }},
		"another group":           {people: alice, alter: func(s *approvalStory) { s.rule.Groups[0].Group = "sre" }},
		"a denial": {people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, _ *Entry, d *DecidedDetails) { d.Decision = Refuse }
		}},
		"another leaf": {people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, _ *Entry, d *DecidedDetails) { d.Requested = "x" }
		}},
		"another approval": {people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, _ *Entry, d *DecidedDetails) { d.Approval = "apr_2" }
		}},
		"what a writer can write": {people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, e *Entry, _ *DecidedDetails) { e.Type = CredentialUsed }
		}},
		"no reason":         {people: alice, alter: func(s *approvalStory) { s.rule.Reasons.Approver = true }},
		"outside the hours": {people: alice, alter: func(s *approvalStory) { s.rule.Hours = &Hours{From: "13:00", To: "14:00", Zone: "UTC"} }},
		"not collected in time": {people: alice, alter: func(s *approvalStory) {
			s.rule.Collect = Duration(time.Second)
			s.intent.Time = At(s.now.Add(2 * time.Minute))
		}},
		"decided after the expiry": {people: alice, alter: func(s *approvalStory) { s.rule.Expires = Duration(time.Second) }},
		"an intent without a basis": {people: alice, alter: func(s *approvalStory) {
			s.intent.SetDetails(IssuingDetails{Attempt: 1, Grant: testGrant.Digest(), NotPast: At(s.now.Add(6 * time.Minute))})
		}},
		"another step was shown":  {people: alice, alter: func(s *approvalStory) { s.asked.Step = "step-2" }},
		"a rule without groups":   {people: alice, alter: func(s *approvalStory) { s.rule.Groups = nil }},
		"no passkey where due":    {people: alice, alter: func(s *approvalStory) { s.rule.Passkey = true }},
		"a key that is not shown": {passkey: true, people: alice, shown: func(w *Warrant) { w.Approval.Passkeys = nil }},
		"a key never activated":   {passkey: true, people: alice, shown: func(w *Warrant) { w.Approval.Passkeys = w.Approval.Passkeys[:1] }},
		"a signature for another person": {passkey: true, people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, e *Entry, _ *DecidedDetails) { e.Person = Ptr("p-bob") }
		}},
		"an altered reason": {passkey: true, people: alice, alter: func(s *approvalStory) {
			s.signing = func(_ *approvalStory, e *Entry, _ *DecidedDetails) {
				e.Sealed = map[string]string{SealedReason: "other"}
			}
		}},
		"a passkey for a run where one request was signed": {passkey: true, people: alice, alter: func(s *approvalStory) {
			s.signing = func(s *approvalStory, e *Entry, d *DecidedDetails) {
				e.Type, d.Standing = ApprovalStanding, &StandingTerms{Scopes: []string{"x"}, Uses: 3, Until: At(s.now.Add(time.Hour))}
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newApprovalStory(t, c.passkey)
			if c.alter != nil {
				c.alter(s)
			}
			l, w := s.warrant(c.people...)
			if c.shown != nil {
				c.shown(w)
			}
			_, err := w.Verify(l.v, s.intent.Time.Time)
			if c.ok != (err == nil) || err != nil && !errors.Is(err, ErrWarrant) {
				t.Fatalf("err %v", err)
			}
		})
	}
}

func TestAKeyThatWasRevokedApprovesNothingAnyMore(t *testing.T) {
	s := newApprovalStory(t, true)
	l, w := s.warrant("p-alice")
	enrolled, err := l.v.Check(w.Approval.Passkeys[0])
	if err != nil {
		t.Fatal(err)
	}
	revoked := entryAt(PasskeyRevoked, s.now, PasskeyRevokedDetails{Enrolled: enrolled.ID, By: "p-alice"})
	revoked.Person = Ptr("p-alice")
	i := l.add(revoked)
	w.Approval.Passkeys = append(w.Approval.Passkeys, l.receipt(i))
	if _, err := w.Verify(l.v, s.intent.Time.Time); !errors.Is(err, ErrWarrant) {
		t.Fatal(err)
	}
}

func TestAnIDTokenAnchorsItsOwnKeyAlone(t *testing.T) {
	provider, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := jose.JSONWebKey{Key: provider.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	d := newAuthenticator(t).enrolled(t)
	d.Claim = "preferred_username"
	e := entryAt(PasskeyEnrolled, now, d)
	e.Person = Ptr("p-alice")
	base := func() map[string]any {
		return map[string]any{"iss": d.Issuer, "aud": d.Client, "sub": "1", "preferred_username": "alice", "iat": now.Add(-time.Minute).Unix(), "exp": now.Add(time.Minute).Unix(), "nonce": d.Nonce("log.example", "p-alice")}
	}
	sign := func(alg jose.SignatureAlgorithm, key any, claims map[string]any) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		j, err := s.Sign(b)
		if err != nil {
			t.Fatal(err)
		}
		c, err := j.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	good := sign(jose.ES256, provider, base())
	if err := d.CheckAnchor("log.example", e, "user:alice", good, jwk); err != nil {
		t.Fatal(err)
	}
	with := func(k string, v any) string { c := base(); c[k] = v; return sign(jose.ES256, provider, c) }
	otherKey := d
	otherKey.Credential = "b3RoZXI"
	point, err := provider.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		d      EnrolledDetails
		token  string
		person string
		origin string
	}{
		"another key":                        {otherKey, good, "user:alice", "log.example"},
		"another log":                        {d, good, "user:alice", "log.other"},
		"another person":                     {d, good, "user:bob", "log.example"},
		"an ordinary login":                  {d, with("nonce", "random"), "user:alice", "log.example"},
		"a login elsewhere":                  {d, with("aud", "other-app"), "user:alice", "log.example"},
		"a login for two":                    {d, with("aud", []string{"other-app", d.Client}), "user:alice", "log.example"},
		"a login authorized for another app": {d, with("azp", "other-app"), "user:alice", "log.example"},
		"another provider":                   {d, with("iss", "https://evil.example"), "user:alice", "log.example"},
		"an old login":                       {d, with("iat", now.Add(-6*time.Minute).Unix()), "user:alice", "log.example"},
		"an expired token":                   {d, with("exp", now.Add(-time.Second).Unix()), "user:alice", "log.example"},
		"an HMAC over the public key":        {d, sign(jose.HS256, point, base()), "user:alice", "log.example"},
		"no token":                           {d, "", "user:alice", "log.example"},
		"no signature":                       {d, good[:strings.LastIndex(good, ".")+1], "user:alice", "log.example"},
	} {
		if err := c.d.CheckAnchor(c.origin, e, c.person, c.token, jwk); !errors.Is(err, ErrAnchor) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
