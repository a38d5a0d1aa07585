package evidence

import (
	"archive/zip"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/klauspost/compress/flate"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence/report"
)

// scribe writes a log of its own, as a recorder would or as one that lies would:
// before each entry is stamped, edit may change it, and it may be left out or
// have others put after it. What comes later refers to what was written.
type scribe struct {
	t      testing.TB
	signer note.Signer
	vkey   string
	now    time.Time
	edit   map[string]func(*store.Submission)
	drop   map[string]bool
	after  map[string]func(*scribe)
	tear   map[string]func(leaf []byte) []byte // changes the stored bytes

	leaves   [][]byte
	entries  []*store.Entry
	openings []map[string]store.Opening
	index    map[string]int64
	ids      map[string]string // entry IDs by name
	lost     map[int64]bool    // entries whose texts are not at hand any more

	alice    *ecdsa.PrivateKey
	provider *ecdsa.PrivateKey
}

const origin = "evidence.example/log"

func newScribe(t testing.TB) *scribe {
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	signer, err2 := note.NewSigner(skey)
	alice, err3 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	provider, err4 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	return &scribe{
		t: t, signer: signer, vkey: vkey, alice: alice, provider: provider, now: time.Date(2026, 7, 1, 8, 0, 0, 0, time.UTC),
		edit: map[string]func(*store.Submission){}, drop: map[string]bool{}, after: map[string]func(*scribe){}, tear: map[string]func([]byte) []byte{},
		index: map[string]int64{}, ids: map[string]string{}, lost: map[int64]bool{},
	}
}

func (s *scribe) put(name, writer string, sub *store.Submission) {
	if s.drop[name] {
		return
	}
	s.now = s.now.Add(time.Second)
	sub.V, sub.WriterTime = store.Version, store.At(s.now)
	if sub.ID == "" {
		sub.ID = store.NewID()
	}
	if sub.Agent == "" {
		sub.Agent = "spiffe://evidence.example/" + writer
	}
	now := s.now
	if edit := s.edit[name]; edit != nil {
		edit(sub)
	}
	if !sub.Time.IsZero() {
		now = sub.Time.Time // an edit that moves it
	}
	leaf, err := sub.Stamp(writer, store.At(now))
	if err != nil {
		s.t.Fatal(err)
	}
	if tear := s.tear[name]; tear != nil {
		leaf = tear(leaf)
	}
	s.index[name], s.ids[name] = int64(len(s.leaves)), sub.ID
	s.leaves, s.entries, s.openings = append(s.leaves, leaf), append(s.entries, &sub.Entry), append(s.openings, sub.Openings)
	if after := s.after[name]; after != nil {
		after(s)
	}
}

// catalogue of the stories: a scope a line, its sensitivity, and how many of
// group dba must approve.
const catalogue = "orders:read low 0\norders:write sensitive 1\n"

func testRules(text []byte) (func(string) (*store.Rule, string, bool), error) {
	scopes := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, errors.New("no catalogue")
		}
		scopes[f[0]] = f[1:]
	}
	return func(scope string) (*store.Rule, string, bool) {
		f, ok := scopes[scope]
		if !ok || f[1] == "0" {
			return nil, slices.Concat(f, []string{""})[0], ok
		}
		rule := ruleFor()
		return &rule, f[0], true
	}, nil
}

func ruleFor() store.Rule {
	return store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(10 * time.Minute),
		Reasons: store.RuleReasons{Requester: true, Approver: true}, Passkey: true}
}

const day = 24 * time.Hour

func (s *scribe) policy(name, writer string, retention map[string]store.Duration) {
	e := &store.Submission{Entry: store.Entry{Type: store.PolicyLoaded, Action: "policy.loaded"}}
	e.SetDetails(store.PolicyDetails{Digest: inForceDigest(catalogue, "package x\n", true), Catalogue: textDigest(catalogue), Policy: textDigest("package x\n"), Retention: retention})
	e.Seal(store.SealedCatalogue, catalogue)
	e.Seal(store.SealedPolicy, "package x\n")
	s.put(name, writer, e)
}

// of makes an entry of a request's story.
func (s *scribe) of(t store.Type, n, run, scope string, outcome store.Outcome, details any) *store.Submission {
	level := map[string]string{"orders:read": "low", "orders:write": "sensitive"}[scope]
	e := &store.Submission{Entry: store.Entry{
		Type: t, Agent: "spiffe://evidence.example/orchestrator/demo/run/" + run + "/step/s" + n, Orchestrator: "demo", Run: run, Step: "s" + n, Request: "req_" + n,
		Resource: "vault://" + scope, Action: scope, Risk: &store.Risk{Sensitivity: level},
		Decision: &store.Decision{Outcome: outcome, Policy: inForceDigest(catalogue, "package x\n", true), Reasons: []string{}},
	}}
	e.SetDetails(details)
	return e
}

func grantOf(scope string) store.Grant {
	return store.Grant{Scope: scope, Target: "vault://" + scope, Engine: "token", Policies: []string{"p"}, Params: map[string]string{}, TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}
}

// low is the story of one request that nobody has to approve.
func (s *scribe) low(n, run string) {
	const scope = "orders:read"
	g := grantOf(scope)
	asked := s.of(store.StepRequested, n, run, scope, store.Allow, store.RequestedDetails{Grant: g, Join: "join-" + n, Body: "b"})
	asked.Seal(store.SealedReason, "Reconcile refunds, OPS-"+n)
	s.put(n+" requested", "broker-1", asked)
	s.issue(n, run, scope, "")
}

func (s *scribe) issue(n, run, scope, approval string) {
	g := grantOf(scope)
	s.put(n+" issuing", "broker-1", s.of(store.CredentialIssuing, n, run, scope, store.Allow, store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(s.now.Add(5 * time.Minute)), Approval: approval}))
	intent := s.ids[n+" issuing"]
	s.put(n+" issued", "broker-1", s.of(store.CredentialIssued, n, run, scope, store.Allow, store.IssuedDetails{Intent: intent, Attempt: 1, Kind: "vault_token", Revocable: true, Accessor: "acc-" + n, Expires: store.At(s.now.Add(4 * time.Minute))}))
	s.put(n+" used", "broker-1", s.of(store.CredentialUsed, n, run, scope, store.Allow, store.UsedDetails{Intent: intent, Via: "introspection", By: "orders", Use: "GET /orders/" + n}))
	end := s.of(store.CredentialRevoked, n, run, scope, store.Allow, store.ClosedDetails{Intent: intent, Attempt: 1})
	end.Cause = store.Ptr("step-finished")
	s.put(n+" revoked", "broker-1", end)
}

// high is the story of one request that alice approves with her passkey.
func (s *scribe) high(n, run string) {
	const scope = "orders:write"
	g := grantOf(scope)
	e := s.of(store.StepRequested, n, run, scope, store.NeedsApproval, store.RequestedDetails{Grant: g, Join: "join-" + n, Body: "b"})
	e.Seal(store.SealedReason, "Correct an order, OPS-"+n)
	s.put(n+" requested", "broker-1", e)
	e = s.of(store.ApprovalRequested, n, run, scope, store.NeedsApproval, store.ApprovalRequestedDetails{Approval: "apr_" + n, Grant: g, Rule: ruleFor(), Excluded: []string{"p-owner"}})
	e.Seal(store.SealedReason, "Correct an order, OPS-"+n)
	s.put(n+" asked", "broker-1", e)
	requested := store.HashText(store.LeafHash(s.leaves[s.index[n+" asked"]]))
	e = s.of(store.ApprovalDecided, n, run, scope, store.NeedsApproval, nil)
	e.Person = store.Ptr("p-alice")
	e.Seal(store.SealedPerson, "user:alice")
	e.Seal(store.SealedReason, "seen it")
	d := store.DecidedDetails{Approval: "apr_" + n, Requested: requested, Decision: store.Approve, Groups: []string{"dba"}, Via: "page"}
	d.Assertion = s.sign(store.DecisionDigest(origin, &e.Entry, &d))
	e.SetDetails(d)
	s.put(n+" decided", "recorder", e)
	s.issue(n, run, scope, "req_"+n)
	fin := s.of(store.StepFinished, n, run, scope, store.Allow, store.FinishedDetails{Outcome: "succeeded"})
	fin.Seal(store.SealedSummary, "corrected")
	s.put(n+" finished", "broker-1", fin)
}

// sign is alice's passkey (W3C WebAuthn, section 7.2).
func (s *scribe) sign(digest [sha256.Size]byte) *store.Assertion {
	rp := sha256.Sum256([]byte("localhost"))
	auth := append(append(rp[:], 5), 0, 0, 0, 1)
	client := fmt.Appendf(nil, `{"type":"webauthn.get","challenge":%q,"origin":"http://localhost:8788","crossOrigin":false}`, base64.RawURLEncoding.EncodeToString(digest[:]))
	hash := sha256.Sum256(client)
	sum := sha256.Sum256(slices.Concat(auth, hash[:]))
	sig, err := ecdsa.SignASN1(rand.Reader, s.alice, sum[:])
	if err != nil {
		s.t.Fatal(err)
	}
	return &store.Assertion{Enrolled: s.ids["enrolled"], AuthenticatorData: auth, ClientData: client, Signature: sig}
}

// enrol puts alice's passkey on record, anchored by a login at the provider.
func (s *scribe) enrol() {
	point, err := s.alice.PublicKey.Bytes()
	if err != nil {
		s.t.Fatal(err)
	}
	cose, err := cbor.Marshal(map[int]any{1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:]})
	if err != nil {
		s.t.Fatal(err)
	}
	d := store.EnrolledDetails{Credential: "Y3JlZA", Key: cose, RPID: "localhost", Origin: "http://localhost:8788", Salt: make([]byte, 32), Issuer: "https://id.example", Client: "countersign", Claim: "preferred_username", ProviderKey: []byte("{}")}
	e := &store.Submission{Entry: store.Entry{Type: store.PasskeyEnrolled, Person: store.Ptr("p-alice")}}
	e.SetDetails(d)
	e.Seal(store.SealedPerson, "user:alice")
	e.Seal(store.SealedIDToken, s.idToken(&d, s.provider, "alice"))
	s.put("enrolled", "recorder", e)
	e = &store.Submission{Entry: store.Entry{Type: store.PasskeyActivated, Person: store.Ptr("p-alice")}}
	e.SetDetails(store.ActivatedDetails{Enrolled: s.ids["enrolled"], By: "p-bob"})
	s.put("activated", "recorder", e)
}

func (s *scribe) idToken(d *store.EnrolledDetails, key *ecdsa.PrivateKey, name string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	claims, err := json.Marshal(map[string]any{"iss": d.Issuer, "aud": d.Client, "nonce": d.Nonce(origin, "p-alice"), "iat": s.now.Unix(), "exp": s.now.Add(time.Hour).Unix(), d.Claim: name})
	if err != nil {
		s.t.Fatal(err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return text
}

// jwks is the provider's key set.
func (s *scribe) jwks() []byte {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.provider.Public(), KeyID: "1", Algorithm: "ES256"}}})
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// hold places a hold.
func (s *scribe) hold(name string, d store.HoldDetails) {
	e := &store.Submission{Entry: store.Entry{Type: store.HoldPlaced}}
	e.SetDetails(d)
	e.Seal(store.SealedReason, "an investigation")
	s.put(name, "recorder", e)
}

func (s *scribe) lift(name, hold string) {
	e := &store.Submission{Entry: store.Entry{Type: store.HoldLifted}}
	e.SetDetails(store.HoldLiftedDetails{Hold: hold})
	s.put(name, "recorder", e)
}

// freeze sets a freeze.
func (s *scribe) freeze(name, who string, d store.FreezeDetails) {
	e := &store.Submission{Entry: store.Entry{Type: store.FreezeSet, Run: d.Run, Person: store.Ptr(store.PrivacyKey(make([]byte, 32)).Pseudonym(who))}}
	e.SetDetails(d)
	e.Seal(store.SealedPerson, who)
	e.Seal(store.SealedReason, "a token leaked")
	s.put(name, "recorder", e)
}

func (s *scribe) thaw(name, who, freeze string) {
	e := &store.Submission{Entry: store.Entry{Type: store.FreezeLifted, Run: "r-frozen", Person: store.Ptr(store.PrivacyKey(make([]byte, 32)).Pseudonym(who))}}
	e.SetDetails(store.FreezeLiftedDetails{Freeze: freeze})
	e.Seal(store.SealedPerson, who)
	s.put(name, "recorder", e)
}

// erase puts the erasure of the texts of named entries on record, and loses them.
func (s *scribe) erase(name string, kept time.Duration, sensitivity string, names ...string) {
	d := store.ErasedDetails{Sensitivity: sensitivity, Kept: store.Duration(kept)}
	for _, n := range names {
		d.Entries = append(d.Entries, s.index[n])
		s.lost[s.index[n]] = true
	}
	e := &store.Submission{Entry: store.Entry{Type: store.DetailsErased}}
	e.SetDetails(d)
	s.put(name, "recorder", e)
}

// pathGrant is a grant for the access path, where e-mail addresses are masked.
func pathGrant() store.Grant {
	g := grantOf("orders:read")
	g.Delivery, g.Access = "gateway", &store.Access{Protocol: store.ProtocolPostgres, Upstream: "db.internal:5432/orders", TLS: "verify",
		Postgres: &store.PostgresAccess{}, Masking: store.Masking{Rules: []store.MaskRule{{Column: "orders.email"}}}}
	return g
}

// path begins the story of one request whose secret stays on the access path.
func (s *scribe) path(n, run string) {
	g := pathGrant()
	asked := s.of(store.StepRequested, n, run, "orders:read", store.Allow, store.RequestedDetails{Grant: g, Join: "join-" + n, Body: "b"})
	asked.Seal(store.SealedReason, "Reconcile refunds, OPS-"+n)
	s.put(n+" requested", "broker-1", asked)
	s.put(n+" issuing", "broker-1", s.of(store.CredentialIssuing, n, run, "orders:read", store.Allow, store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(s.now.Add(5 * time.Minute))}))
	s.put(n+" issued", "broker-1", s.of(store.CredentialIssued, n, run, "orders:read", store.Allow, store.IssuedDetails{Intent: s.ids[n+" issuing"], Attempt: 1, Kind: "database", Revocable: true, Accessor: "acc-" + n, Expires: store.At(s.now.Add(4 * time.Minute))}))
}

// passes is a use on the access path.
func (s *scribe) passes(name, n, run string) {
	g := pathGrant()
	e := s.of(store.CredentialUsed, n, run, "orders:read", store.Allow, store.UsedDetails{Intent: s.ids[n+" issuing"], Via: store.ViaGateway, By: "gateway",
		Use: "SELECT orders", Protocol: store.ProtocolPostgres, Conn: "c1", Objects: []string{"orders"}, Access: g.Access.Digest(), Masking: g.Access.Masking.Digest()})
	e.Seal(store.SealedStatement, "SELECT email FROM orders -- "+name)
	s.put(name, "broker-1", e)
}

// results are what came of uses.
func (s *scribe) results(name, n, run, sample string, uses ...string) {
	d := store.UseFinishedDetails{}
	for _, u := range uses {
		d.Outcomes = append(d.Outcomes, store.UseOutcome{Use: s.ids[u], Status: "SELECT 3", Rows: 3, Received: 120, Masked: 3, Took: store.Duration(1500 * time.Microsecond)})
	}
	e := s.of(store.UseFinished, n, run, "orders:read", store.Allow, d)
	e.Seal(store.SealedSample, sample)
	s.put(name, "broker-1", e)
}

func (s *scribe) over(n, run string) {
	end := s.of(store.CredentialRevoked, n, run, "orders:read", store.Allow, store.ClosedDetails{Intent: s.ids[n+" issuing"], Attempt: 1})
	end.Cause = store.Ptr("step-finished")
	s.put(n+" revoked", "broker-1", end)
}

// paths is what happens on the access path: uses with results and without, and a
// refusal.
func (s *scribe) paths() {
	s.path("g", "r-g")
	s.passes("g used", "g", "r-g")
	s.passes("g used too", "g", "r-g")
	s.results("g done", "g", "r-g", "[masked]", "g used too", "g used")
	s.passes("g cut", "g", "r-g")
	s.path("h", "r-h")
	s.passes("h used", "h", "r-h")
	refused := s.of(store.AccessRefused, "g", "r-g", "orders:read", store.Allow, store.RefusedDetails{Method: store.ProtocolPostgres, Route: "DELETE orders", Problem: "scope-denied",
		Remote: "192.0.2.7", Intent: s.ids["g issuing"], Reason: "statements of this kind are not let through"})
	refused.Seal(store.SealedStatement, "DELETE FROM orders")
	s.put("g refused", "broker-1", refused)
	s.results("h done", "h", "r-h", "", "h used")
	s.over("g", "r-g")
	s.over("h", "r-h")
	alert := &store.Submission{Entry: store.Entry{Type: store.AlertRaised}}
	alert.SetDetails(store.AlertDetails{Alert: store.AlertMint, Source: "vault-audit", Ref: "v-1", What: "auth/token/create"})
	s.put("alert", "recorder", alert)
}

// write tells the whole story, in which every kind of thing happens that is
// judged: over two whole tiles of entries, most of which are of no story, since
// each row of tables and report takes its time to derive.
func (s *scribe) write() *scribe {
	s.policy("policy", "recorder", map[string]store.Duration{"low": store.Duration(day), "sensitive": store.Duration(30 * day)})
	s.policy("policy of the broker", "broker-1", nil)
	s.enrol()
	s.hold("hold", store.HoldDetails{Run: "r-held"})
	s.low("1", "r-1")
	s.high("2", "r-2")
	s.low("3", "r-held")
	denied := s.of(store.StepRequested, "4", "r-4", "orders:write", store.Deny, store.RequestedDetails{Grant: grantOf("orders:write"), Body: "b"})
	denied.Seal(store.SealedReason, "Because")
	s.put("4 requested", "broker-1", denied)
	for i := range 8 {
		s.low(fmt.Sprintf("a%d", i), "r-many")
	}
	for i := range 450 {
		s.put(fmt.Sprintf("filler %d", i), "recorder", &store.Submission{Entry: store.Entry{Type: "weather.changed"}})
	}
	s.now = s.now.Add(2 * day)
	s.erase("erased", day, "low", "1 requested", "a0 requested")
	s.freeze("freeze", "user:ana", store.FreezeDetails{Run: "r-frozen"})
	s.high("5", "r-5")
	s.lift("lifted", s.ids["hold"])
	s.paths()
	s.thaw("thaw", "user:ben", s.ids["freeze"])
	s.low("f", "r-frozen")
	for i := range 10 {
		s.low(fmt.Sprintf("b%d", i), "r-last")
	}
	return s
}

// view is which part of the log a bundle shows.
type view struct {
	from, to string // names of entries; empty: the log's own ends
	filters  map[string]string
	since    int64
}

// export puts an export on record and returns its bundle.
func (s *scribe) export(v view) *parcel {
	s.t.Helper()
	from, to := int64(0), int64(len(s.leaves))
	if v.from != "" {
		from = s.index[v.from]
	}
	if v.to != "" {
		to = s.index[v.to]
	}
	if v.filters == nil {
		v.filters = map[string]string{}
	}
	e := &store.Submission{Entry: store.Entry{Type: store.ExportCreated}}
	e.SetDetails(store.ExportDetails{Format: "bundle", From: from, To: to, Filters: v.filters})
	s.put("export", "recorder", e)
	return s.bundle(v, from, to)
}

func (s *scribe) bundle(v view, from, to int64) *parcel {
	m := &parcel{t: s.t, scribe: s, data: map[string][]byte{}}
	var window, context []int64
	requests, shown := map[string]bool{}, map[int64]bool{}
	for i := from; i < to; i++ {
		if matches(s.entries[i], v.filters) {
			window = append(window, i)
			shown[i] = true
			requests[s.entries[i].Request] = s.entries[i].Request != ""
		}
	}
	edge := func(i int64) bool { return len(v.filters) == 0 && (i == from-1 || i == to) }
	for i, e := range s.entries {
		if edge(int64(i)) && e.Request != "" {
			requests[e.Request] = true
		}
	}
	for i, e := range s.entries {
		switch e.Type {
		case store.PasskeyEnrolled, store.PasskeyActivated, store.PolicyLoaded, store.HoldPlaced, store.HoldLifted, store.FreezeSet, store.FreezeLifted, store.DetailsErased:
			if shown[int64(i)] {
				break
			}
			context = append(context, int64(i))
		default:
			if !shown[int64(i)] && (requests[e.Request] || edge(int64(i)) || int64(i) == s.index["export"]) {
				context = append(context, int64(i))
			}
		}
	}
	size := int64(len(s.leaves))
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(ix []int64) (hs []tlog.Hash, err error) {
		for _, x := range ix {
			hs = append(hs, stored[x])
		}
		return hs, nil
	})
	for i, leaf := range s.leaves {
		hs, err := tlog.StoredHashes(int64(i), leaf, read)
		if err != nil {
			s.t.Fatal(err)
		}
		stored = append(stored, hs...)
	}
	root, err := tlog.TreeHash(size, read)
	if err != nil {
		s.t.Fatal(err)
	}
	m.set(memberCheckpoint, []byte(checkpoint(s.t, s.signer, size, root)))
	m.root = func(n int64, signer note.Signer) string {
		h, err := tlog.TreeHash(n, read)
		if err != nil {
			s.t.Fatal(err)
		}
		return checkpoint(s.t, signer, n, h)
	}
	m.entries(memberEntries, memberEntriesIndex, window, len(v.filters) > 0)
	m.entries(memberContext, memberContextIndex, context, true)
	var sealed []byte
	for _, i := range slices.Sorted(slices.Values(slices.Concat(window, context))) {
		if !s.lost[i] {
			sealed = append(sealed, m.opening(i)...)
		}
	}
	m.set(memberSealed, sealed)
	groups := map[int64]int{}
	for _, i := range window {
		groups[i/bundleWidth]++
	}
	for _, i := range append(context, size-1) {
		groups[i/bundleWidth] += 0
	}
	if v.since > 0 {
		groups[v.since/bundleWidth] += 0
	}
	tile := func(l int, n int64) {
		t := tlog.Tile{H: 8, L: l, N: n, W: int(min(bundleWidth, size>>(8*l)-n*bundleWidth))}
		b, err := tlog.ReadTileData(t, read)
		if err != nil {
			s.t.Fatal(err)
		}
		m.set(tileName(t), b)
	}
	for _, g := range slices.Sorted(maps.Keys(groups)) {
		if int64(groups[g]) < min(bundleWidth, size-g*bundleWidth) {
			tile(0, g)
		}
	}
	for l := 1; size>>(8*l) > 0; l++ {
		for n := int64(0); n*bundleWidth < size>>(8*l); n++ {
			tile(l, n)
		}
	}
	for _, name := range []string{memberSteps, memberApprovals, memberUses} {
		m.set(name, nil)
	}
	m.set("policies/"+textDigest(catalogue)[7:]+".yaml", []byte(catalogue))
	m.set("policies/"+textDigest("package x\n")[7:]+".rego", []byte("package x\n"))
	var rules maskings
	for _, i := range slices.Sorted(slices.Values(slices.Concat(window, context))) {
		_ = rules.take(s.entries[i], shown[i], nil)
	}
	for _, name := range rules.files() {
		m.set("masking/"+name+".json", pathGrant().Access.Masking.Text())
	}
	m.set(memberMasking, nil)
	m.set(memberReport, nil)
	m.set(memberVerify, []byte(verifyText))
	mf := &m.m
	mf.Derivation = derivationNow
	mf.Format, mf.Origin, mf.Created = bundleFormat, origin, s.entries[s.index["export"]].Time.String()
	mf.Export.Index, mf.Export.ID = s.index["export"], s.ids["export"]
	mf.Window.From, mf.Window.To, mf.Filters, mf.Complete, mf.Since = from, to, v.filters, len(v.filters) == 0, v.since
	m.set(memberManifest, nil)
	m.fit()
	return m
}

func checkpoint(t testing.TB, signer note.Signer, size int64, root tlog.Hash) string {
	signed, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", signer.Name(), size, root)}, signer)
	if err != nil {
		t.Fatal(err)
	}
	return string(signed)
}

// parcel is the files of a bundle, to be changed.
type parcel struct {
	t      testing.TB
	scribe *scribe
	names  []string
	data   map[string][]byte
	m      manifest
	root   func(size int64, signer note.Signer) string // the log's checkpoint at any size
	keep   func(*manifest)                             // changes the manifest last of all

	pack func(z *zip.Writer, name string, data []byte) bool
}

func (m *parcel) set(name string, data []byte) {
	if _, ok := m.data[name]; !ok {
		m.names = append(m.names, name)
	}
	m.data[name] = data
}

func (m *parcel) remove(name string) {
	delete(m.data, name)
	m.names = slices.DeleteFunc(m.names, func(n string) bool { return n == name })
}

func (m *parcel) entries(name, index string, list []int64, indexed bool) {
	var lines, at []byte
	for _, i := range list {
		lines = append(append(lines, m.scribe.leaves[i]...), '\n')
		at = append(strconv.AppendInt(at, i, 10), '\n')
	}
	m.set(name, lines)
	if indexed {
		m.set(index, at)
	}
}

// opening is the lines of sealed.jsonl for entry i.
func (m *parcel) opening(i int64) (lines []byte) {
	o := m.scribe.openings[i]
	for _, field := range slices.Sorted(maps.Keys(o)) {
		b, err := json.Marshal(sealedLine{i, field, o[field].Salt, o[field].Text})
		if err != nil {
			m.t.Fatal(err)
		}
		lines = append(append(lines, b...), '\n')
	}
	return lines
}

func (m *parcel) lines(name string) [][]byte {
	return bytes.SplitAfter(bytes.TrimSuffix(m.data[name], []byte("\n")), []byte("\n"))
}

// change changes the lines of a member; each holds its newline.
func (m *parcel) change(name string, fn func([][]byte) [][]byte) {
	lines := m.lines(name)
	lines[len(lines)-1] = append(bytes.Clone(lines[len(lines)-1]), '\n')
	m.data[name] = slices.Concat(fn(lines)...)
}

// swap puts new for old in a member.
func (m *parcel) swap(name, old, new string) {
	b := bytes.Replace(m.data[name], []byte(old), []byte(new), 1)
	if bytes.Equal(b, m.data[name]) {
		m.t.Fatalf("%s holds no %q", name, old)
	}
	m.data[name] = b
}

// fit recomputes tables, report and manifest from the rest.
func (m *parcel) fit() {
	c := &m.m.Counts
	c.Entries, c.Context, c.Sealed, c.Types = 0, 0, 0, map[store.Type]int64{}
	m.m.Window.FromTime, m.m.Window.ToTime = "", ""
	type shown struct {
		e      *store.Entry
		window bool
	}
	all := map[int64]shown{}
	take := func(name, index string, window bool) {
		var at [][]byte
		if m.data[index] != nil && (!window || len(m.m.Filters) > 0) {
			at = m.lines(index)
		}
		for k, line := range m.lines(name) {
			e, err := store.ParseLeaf(bytes.TrimSuffix(line, []byte("\n")))
			if err != nil {
				continue
			}
			i := m.m.Window.From + int64(k)
			if at != nil {
				if k >= len(at) {
					break
				}
				i, _ = strconv.ParseInt(strings.TrimSpace(string(at[k])), 10, 64)
			}
			if window {
				c.Entries++
				c.Types[e.Type]++
				if m.m.Window.FromTime == "" {
					m.m.Window.FromTime = e.Time.String()
				}
				m.m.Window.ToTime = e.Time.String()
			} else {
				c.Context++
			}
			all[i] = shown{e, window}
		}
	}
	take(memberContext, memberContextIndex, false)
	take(memberEntries, memberEntriesIndex, true)
	opened := map[int64]map[string]string{}
	for _, line := range m.lines(memberSealed) {
		var s sealedLine
		if json.Unmarshal(line, &s) != nil || all[s.Index].e == nil {
			continue
		}
		c.Sealed++
		if opened[s.Index] == nil {
			opened[s.Index] = map[string]string{}
		}
		opened[s.Index][s.Field] = s.Text
	}
	var steps, approvals, uses, page bytes.Buffer
	tables, rep := NewTables(&steps, &approvals, &uses), report.New()
	var rules maskings
	for _, i := range slices.Sorted(maps.Keys(all)) {
		_ = rules.take(all[i].e, all[i].window, nil)
		if tables.Take(i, all[i].e, opened[i], all[i].window) != nil || rep.Take(i, all[i].e, opened[i], all[i].window) != nil {
			break // a lie that no table can tell
		}
	}
	tables.Close()
	c.Steps, c.Approvals, c.Uses = tables.Rows()
	if h, err := unverified(string(m.data[memberCheckpoint])); err == nil {
		m.m.Size, m.m.Root = h.N, h.Hash.String()
	}
	if err := rep.Write(&page, reportMeta(&m.m, string(m.data[memberCheckpoint]))); err != nil {
		m.t.Fatal(err)
	}
	for name, b := range map[string]*bytes.Buffer{memberSteps: &steps, memberApprovals: &approvals, memberUses: &uses, memberReport: &page, memberMasking: bytes.NewBuffer(rules.index())} {
		if m.data[name] != nil || slices.Contains(m.names, name) {
			m.data[name] = b.Bytes()
		}
	}
	m.fitManifest()
}

// fitManifest recomputes the digests of the manifest.
func (m *parcel) fitManifest() {
	m.m.Files = map[string]manifestFile{}
	for _, name := range m.names {
		if name != memberManifest {
			sum := sha256.Sum256(m.data[name])
			m.m.Files[name] = manifestFile{hex.EncodeToString(sum[:]), int64(len(m.data[name]))}
		}
	}
	if m.keep != nil {
		m.keep(&m.m)
	}
	m.writeManifest()
}

func (m *parcel) writeManifest() {
	b, err := json.Marshal(&m.m, json.Deterministic(true))
	if err != nil {
		m.t.Fatal(err)
	}
	if slices.Contains(m.names, memberManifest) {
		m.data[memberManifest] = b
	}
}

// zip packs the bundle.
func (m *parcel) zip() []byte {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	z.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, 1) })
	for _, name := range m.names {
		if m.pack != nil && m.pack(z, name, m.data[name]) {
			continue
		}
		pack(m.t, z, &zip.FileHeader{Name: name, Method: zip.Deflate}, m.data[name])
	}
	if err := z.Close(); err != nil {
		m.t.Fatal(err)
	}
	return b.Bytes()
}

func pack(t testing.TB, z *zip.Writer, h *zip.FileHeader, data []byte) {
	w, err := z.CreateHeader(h)
	if err == nil {
		_, err = w.Write(data)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// clone copies the bundle, so that it can be changed.
func (m *parcel) clone() *parcel {
	c := *m
	c.names, c.data = slices.Clone(m.names), maps.Clone(m.data)
	c.m.Filters, c.m.Counts.Types = maps.Clone(m.m.Filters), maps.Clone(m.m.Counts.Types)
	return &c
}

// save writes raw to a file of its own.
func save(t testing.TB, raw []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.zip")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// options verify bundles of s with everything that there is.
func (s *scribe) options() Options {
	key, err := store.NewLogVerifier(s.vkey)
	if err != nil {
		s.t.Fatal(err)
	}
	return Options{Log: key, Rules: testRules, Provider: map[string][]byte{"https://id.example": s.jwks()}}
}

// useAgain puts another use of n's credential on record.
func (s *scribe) useAgain(n, run, name string) {
	s.now = s.now.Add(time.Minute)
	s.put(name, "broker-1", s.of(store.CredentialUsed, n, run, "orders:write", store.Allow, store.UsedDetails{Intent: s.ids[n+" issuing"], Via: "introspection", By: "orders", Use: "GET /again"}))
}

// toWrite turns a request for orders:read into one for orders:write.
func toWrite(fn func(*store.RequestedDetails)) func(*store.Submission) {
	return func(e *store.Submission) {
		d, err := store.DetailsAs[store.RequestedDetails](&e.Entry)
		if err != nil {
			panic(err)
		}
		fn(&d)
		e.SetDetails(d)
		e.Action, e.Risk.Sensitivity = "orders:write", "sensitive"
	}
}

// tileAt is the tile of level 0 that holds an entry.
func tileAt(index, size int64) tlog.Tile {
	n := index / bundleWidth
	return tlog.Tile{H: 8, L: 0, N: n, W: int(min(bundleWidth, size-n*bundleWidth))}
}
