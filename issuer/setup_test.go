package issuer

import (
	"context"
	"crypto/rand"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

const trustDomain = "countersign.test"

// testLog is a log in memory that admits anything: the issuer must not rest
// on the recorder's order.
type testLog struct {
	t        testing.TB
	signer   note.Signer
	verifier *store.LogVerifier

	mu     sync.Mutex
	n      int64
	hashes hashes
}

type hashes []tlog.Hash

func (h hashes) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = h[x]
	}
	return out, nil
}

func newTestLog(t testing.TB) *testLog {
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.countersign.test")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return &testLog{t: t, signer: signer, verifier: v}
}

// append logs entries as they are; a zero Time is now.
func (l *testLog) append(entries ...*store.Entry) *store.Appended {
	l.mu.Lock()
	defer l.mu.Unlock()
	var a store.Appended
	for _, e := range entries {
		if e.Time.IsZero() {
			e.Time = store.At(time.Now())
		}
		e.V, e.Writer, e.WriterTime = store.Version, "broker-1", e.Time
		leaf, err := e.Marshal()
		if err != nil {
			l.t.Fatal(err)
		}
		more, err := tlog.StoredHashes(l.n, leaf, l.hashes)
		if err != nil {
			l.t.Fatal(err)
		}
		l.hashes = append(l.hashes, more...)
		a.Entries = append(a.Entries, store.Proven{Index: l.n, Leaf: leaf})
		l.n++
	}
	root, err := tlog.TreeHash(l.n, l.hashes)
	if err != nil {
		l.t.Fatal(err)
	}
	for i := range a.Entries {
		if a.Entries[i].Proof, err = tlog.ProveRecord(l.n, a.Entries[i].Index, l.hashes); err != nil {
			l.t.Fatal(err)
		}
	}
	signed, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: l.signer.Name(), Tree: tlog.Tree{N: l.n, Hash: root}}.String()}, l.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	a.Checkpoint = string(signed)
	return &a
}

// bench is everything a mint needs.
type bench struct {
	t    testing.TB
	log  *testLog
	set  *scopes.Set
	vlt  *vaulttest.Server
	root *api.Client
	dsn  string
	iss  *Issuer

	brokerToken string
	cfg         Config
	requests    int
}

type benchOptions struct {
	postgres  bool
	catalogue string // instead of the demo's
	change    func(*Config)

	catalogueOf func(*scopes.Connection) string // likewise
}

func newBench(t testing.TB, o benchOptions) *bench {
	t.Helper()
	b := &bench{t: t, log: newTestLog(t)}
	var conn *scopes.Connection
	if o.postgres {
		b.dsn = vaulttest.Postgres(t)
		c, err := pgx.ParseConfig(b.dsn)
		if err != nil {
			t.Fatal(err)
		}
		conn = &scopes.Connection{Host: c.Host, Port: int(c.Port), Database: c.Database}
	}
	text := o.catalogue
	if o.catalogueOf != nil {
		text = o.catalogueOf(conn)
	}
	if text == "" {
		text = withoutApprovals(string(scopes.Demo(conn)))
	}
	set, err := scopes.Parse("catalogue.yaml", []byte(text), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	b.set = set
	vlt, prepared := vaulttest.Prepared(t, set, b.dsn)
	b.vlt, b.root, b.brokerToken = vlt, vlt.Root, prepared.BrokerToken
	b.cfg = Config{
		Addr: vlt.Addr, Login: Login{Token: b.brokerToken}, TrustDomain: trustDomain, Log: b.log.verifier,
		Scopes: func() *scopes.Set { return b.set }, Identity: newIdentity(t, ES256),
	}
	if o.change != nil {
		o.change(&b.cfg)
	}
	b.iss = b.issuer(b.cfg)
	return b
}

func (b *bench) issuer(cfg Config) *Issuer {
	b.t.Helper()
	i, err := New(b.t.Context(), cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { i.Close() })
	// Entries carry microseconds; those of a test begin after the issuer.
	time.Sleep(time.Millisecond)
	return i
}

// withoutApprovals cuts the approval rules out of a catalogue, so that every
// engine can be minted from.
func withoutApprovals(catalogue string) string {
	var out []string
	skip := false
	for line := range strings.Lines(catalogue) {
		if strings.HasPrefix(line, "    approval:") {
			skip = true
			continue
		}
		if skip && strings.HasPrefix(line, "      ") {
			continue
		}
		skip = false
		out = append(out, line)
	}
	return strings.Join(out, "")
}

func newIdentity(t testing.TB, a Algorithm) *Identity {
	t.Helper()
	i, err := OpenIdentity(IdentityConfig{
		Issuer: "https://countersign.test", TrustDomain: trustDomain, Algorithm: a, KeyFile: filepath.Join(t.TempDir(), "identity-keys.json"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// ask is one request of a test.
type ask struct {
	scope     string
	ttl       time.Duration // 1 min by default
	params    map[string]string
	delivery  string
	publicKey string
	change    func(request, intent *store.Entry, d *store.RequestedDetails, i *store.IssuingDetails)
}

// entries makes the request and the intent of a, as a broker appends them.
func (b *bench) entries(a ask) (request, intent *store.Entry) {
	b.t.Helper()
	if a.ttl == 0 {
		a.ttl = time.Minute
	}
	g, err := b.set.Resolve(a.scope, a.ttl, a.params, a.delivery, a.publicKey, "")
	if err != nil {
		b.t.Fatal(err)
	}
	b.requests++
	id := "req_" + strconv.Itoa(b.requests) + "x" + strings.ToLower(rand.Text()[:6])
	request = &store.Entry{
		ID: store.NewID(), Type: store.StepRequested, Agent: SPIFFEID(trustDomain, "demo", "run-1", "step-1"),
		Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: id, Resource: g.Target, Action: g.Scope,
		Decision: &store.Decision{Outcome: store.Allow, Policy: b.set.Digest(), Reasons: []string{}},
		Risk:     &store.Risk{Sensitivity: "low"},
	}
	c := *request
	intent = &c
	intent.ID, intent.Type = store.NewID(), store.CredentialIssuing
	d := store.RequestedDetails{Grant: g, Join: "hmac-sha256:x"}
	i := store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(time.Now().Add(a.ttl))}
	if a.change != nil {
		a.change(request, intent, &d, &i)
	}
	request.SetDetails(d)
	intent.SetDetails(i)
	return request, intent
}

func (b *bench) warrant(a ask) store.Warrant {
	b.t.Helper()
	request, intent := b.entries(a)
	got := b.log.append(request, intent)
	return store.Warrant{Request: got.Receipt(0), Intent: got.Receipt(1)}
}

func (b *bench) mint(a ask) *Minted {
	b.t.Helper()
	m, err := b.iss.Mint(b.t.Context(), b.warrant(a))
	if err != nil {
		b.t.Fatalf("minting %s: %v", a.scope, err)
	}
	return m
}

// live returns the accessors of all live tokens that were made for a step,
// wrapping tokens included.
func (b *bench) live() []string {
	b.t.Helper()
	s, err := b.root.Logical().ListWithContext(context.Background(), "auth/token/accessors")
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	keys, _ := s.Data["keys"].([]any)
	for _, k := range keys {
		t, err := b.root.Auth().Token().LookupAccessor(k.(string))
		if err != nil {
			continue // gone since
		}
		name, _ := t.Data["display_name"].(string)
		path, _ := t.Data["path"].(string)
		policies, _ := t.TokenPolicies()
		wrapping := len(policies) == 1 && policies[0] == "response-wrapping"
		if strings.HasPrefix(path, "auth/token/create/") || wrapping {
			out = append(out, name+" "+path+" "+k.(string))
		}
	}
	return out
}

// until polls f for at most d.
func until(t testing.TB, d time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("not within %s: %s", d, what)
}

// vaultAs returns a client for the bench's Vault with token.
func (b *bench) vaultAs(token string) *api.Client {
	b.t.Helper()
	c, err := b.root.Clone()
	if err != nil {
		b.t.Fatal(err)
	}
	c.SetToken(token)
	c.SetMaxRetries(0)
	return c
}

// database connects with a database credential.
func (b *bench) database(c *Credential) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(b.dsn)
	if err != nil {
		b.t.Fatal(err)
	}
	cfg.Host, cfg.Port, cfg.Database, cfg.User, cfg.Password = c.Host, uint16(c.Port), c.Database, c.Username, c.Password
	return pgx.ConnectConfig(b.t.Context(), cfg)
}
