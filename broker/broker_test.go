package broker_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	trustDomain = "countersign.test"
	key         = "a-privacy-key-of-at-least-32-bytes!!"
)

// One Vault serves all tests of the package: each makes credentials of its own.
var (
	vault    *vaultdev.Server
	root     *api.Client
	login    string
	demo     *scopes.Set
	identity *issuer.Identity
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	fail := func(err error) int { fmt.Fprintln(os.Stderr, err); return 1 }
	binary, err := vaultdev.Find()
	if err != nil {
		return fail(err)
	}
	if vault, err = vaultdev.Start(context.Background(), binary); err != nil {
		return fail(err)
	}
	defer vault.Stop()
	if root, err = vault.Client(); err != nil {
		return fail(err)
	}
	if demo, err = scopes.Parse("demo.yaml", scopes.Demo(nil), "", nil); err != nil {
		return fail(err)
	}
	prepared, err := vaultdev.Prepare(context.Background(), root, vaultdev.Options{Scopes: demo})
	if err != nil {
		return fail(err)
	}
	login = prepared.BrokerToken
	dir, err := os.MkdirTemp("", "broker")
	if err != nil {
		return fail(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if identity, err = issuer.OpenIdentity(issuer.IdentityConfig{Issuer: "https://countersign.test", TrustDomain: trustDomain, KeyFile: filepath.Join(dir, "keys.json")}); err != nil {
		return fail(err)
	}
	return m.Run()
}

// world is one recorder and the brokers over it.
type world struct {
	t      testing.TB
	dir    string
	ledger *ledger.Ledger
	log    *store.LogVerifier
	clock  *clock
	redis  *redistest.Server
	logs   *syncBuffer

	mu    sync.Mutex
	trace []string
	set   *scopes.Set // in force at every broker; nil: demo
}

// Current is the catalogue in force.
func (w *world) Current() *scopes.Set {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.set == nil {
		return demo
	}
	return w.set
}

// clock is the time plus what a test has let pass.
type clock struct {
	mu  sync.Mutex
	off time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off += d
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) Sync() error { return nil }

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newWorld(t testing.TB) *world {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.countersign.test")
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	w := &world{t: t, dir: t.TempDir(), clock: &clock{}, logs: &syncBuffer{}}
	w.log, err = store.NewLogVerifier(vkey)
	ok(t, err)
	w.ledger, err = ledger.Open(t.Context(), ledger.Options{Dir: w.dir, Signer: signer, Verifier: vkey, PrivacyKey: store.PrivacyKey(key),
		Grace: 2 * time.Second, Now: w.clock.now, RecheckEvery: -1})
	ok(t, err)
	t.Cleanup(func() { _ = w.ledger.Close() })
	return w
}

func (w *world) note(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, fmt.Sprintf(format, a...))
}

func (w *world) traced() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.trace)
}

// node is a broker with what stands between it and the recorder, and Vault.
type node struct {
	*broker.Broker
	rec   *recorder
	iss   *tracing
	redis *inflight.Store
	looks atomic.Int64 // at the clock
}

// ticks waits until each of ns has looked some times for what is due: two of its
// loops look at the clock once a tick.
func (w *world) ticks(ns ...*node) {
	w.t.Helper()
	for _, n := range ns {
		until := n.looks.Load() + 10
		w.until("it has looked", func() bool { return n.looks.Load() >= until })
	}
}

// start adds a broker to w.
func (w *world) start(name string, change ...func(*broker.Config)) *node {
	w.t.Helper()
	iss, err := issuer.New(w.t.Context(), issuer.Config{Addr: vault.Addr, Login: issuer.Login{Token: login}, TrustDomain: trustDomain, Log: w.log,
		Scopes: w.Current, Identity: identity, FirstTTL: 2 * time.Second, Now: w.clock.now})
	ok(w.t, err)
	url := ""
	if w.redis != nil {
		url = w.redis.URL()
	}
	state, err := inflight.Open(inflight.Options{URL: url, Timeout: 500 * time.Millisecond})
	ok(w.t, err)
	n := &node{rec: &recorder{w: w, name: name}, iss: &tracing{Issuer: iss, w: w}, redis: state}
	enc := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig())
	cfg := broker.Config{Writer: name, TrustDomain: trustDomain, Recorder: n.rec, Issuer: n.iss, Scopes: w, Inflight: state, PeopleURL: "https://people.test/",
		Identity: identity, PrivacyKey: store.PrivacyKey(key), Grace: 2 * time.Second, Tick: 20 * time.Millisecond,
		Now: func() time.Time { n.looks.Add(1); return w.clock.now() },
		Log: zap.New(zapcore.NewCore(enc, w.logs, zap.DebugLevel))}
	for _, c := range change {
		c(&cfg)
	}
	n.Broker, err = broker.New(cfg)
	ok(w.t, err)
	w.t.Cleanup(func() {
		_ = n.Close()
		_ = state.Close()
		_ = iss.Close()
	})
	return n
}

// recorder hands a broker's entries to the ledger in this process, and fails
// where a test wants it to.
type recorder struct {
	w    *world
	name string

	mu     sync.Mutex
	before func([]*store.Submission) error // nothing is recorded
	after  func([]*store.Submission) error // it is recorded, and the answer is lost
	down   bool
	deaf   bool // what is on record does not come to the broker
}

func (r *recorder) set(fn func(r *recorder)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn(r)
}

func (r *recorder) Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	r.mu.Lock()
	before, after, down := r.before, r.after, r.down
	r.mu.Unlock()
	if down {
		return nil, fmt.Errorf("%w: connection refused", store.ErrUnavailable)
	}
	var lines [][]byte
	var types []string
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			return nil, err
		}
		lines = append(lines, b)
		types = append(types, string(s.Type))
	}
	if before != nil {
		if err := before(subs); err != nil {
			return nil, err
		}
	}
	a, err := r.w.ledger.Append(ctx, ledger.Author{Name: r.name}, lines)
	if err == nil {
		r.w.note("append %s", strings.Join(types, " "))
		if after != nil {
			err = after(subs)
		}
	}
	if err != nil {
		return nil, err
	}
	return a, nil
}

func (r *recorder) isDown() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		return fmt.Errorf("%w: connection refused", store.ErrUnavailable)
	}
	return nil
}

func (r *recorder) isDeaf() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deaf
}

func (r *recorder) Open(ctx context.Context, request string) (*store.Appended, error) {
	if err := r.isDown(); err != nil {
		return nil, err
	}
	return r.w.ledger.OpenSet(ctx, request)
}

func (r *recorder) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	if err := r.isDown(); err != nil {
		return err
	}
	return r.w.ledger.Follow(ctx, after, func(a *store.Appended) error {
		if err := r.isDown(); err != nil {
			return err
		}
		for r.isDeaf() {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return fn(a)
	})
}

// tracing notes each call to the real issuer, and fails or holds where a test
// wants it to.
type tracing struct {
	*issuer.Issuer
	w *world

	mu       sync.Mutex
	mint     func() error // before Mint
	activate func() error
	revoke   func() error
	mints    int
}

func (i *tracing) set(fn func(i *tracing)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	fn(i)
}

func (i *tracing) hook(pick func() func() error) error {
	i.mu.Lock()
	fn := pick()
	i.mu.Unlock()
	if fn != nil {
		return fn()
	}
	return nil
}

func (i *tracing) Mint(ctx context.Context, w store.Warrant) (*issuer.Minted, error) {
	if err := i.hook(func() func() error { return i.mint }); err != nil {
		return nil, err
	}
	m, err := i.Issuer.Mint(ctx, w)
	if err == nil {
		i.mu.Lock()
		i.mints++
		i.mu.Unlock()
		i.w.note("mint")
	}
	return m, err
}

func (i *tracing) Activate(ctx context.Context, m *issuer.Minted) error {
	if err := i.hook(func() func() error { return i.activate }); err != nil {
		return err
	}
	i.w.note("activate")
	return i.Issuer.Activate(ctx, m)
}

func (i *tracing) Discard(ctx context.Context, m *issuer.Minted) error {
	i.w.note("discard")
	return i.Issuer.Discard(ctx, m)
}

func (i *tracing) Revoke(ctx context.Context, d store.IssuedDetails) error {
	if err := i.hook(func() func() error { return i.revoke }); err != nil {
		return err
	}
	i.w.note("revoke")
	return i.Issuer.Revoke(ctx, d)
}

// entries returns what is on record, but for policy.loaded.
func (w *world) entries() []*store.Entry {
	w.t.Helper()
	var out []*store.Entry
	for s, err := range w.ledger.Entries(context.Background(), 0, w.ledger.Size()) {
		ok(w.t, err)
		e, err := store.ParseLeaf(s.Leaf)
		ok(w.t, err)
		if e.Type != store.PolicyLoaded {
			out = append(out, e)
		}
	}
	return out
}

func (w *world) types() []string {
	w.t.Helper()
	var out []string
	for _, e := range w.entries() {
		out = append(out, string(e.Type))
	}
	return out
}

func (w *world) count(t store.Type) int {
	n := 0
	for _, e := range w.entries() {
		if e.Type == t {
			n++
		}
	}
	return n
}

// last returns the newest entry of a type.
func (w *world) last(t store.Type) *store.Entry {
	w.t.Helper()
	for _, e := range slices.Backward(w.entries()) {
		if e.Type == t {
			return e
		}
	}
	w.t.Fatalf("no %s on record: %v", t, w.types())
	return nil
}

// until waits for something that happens in the background.
func (w *world) until(what string, fn func() bool) {
	w.t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("never: %s; on record: %v; calls: %v\n%s", what, w.types(), w.traced(), w.logs)
		}
	}
}

func (w *world) wantTypes(want ...string) {
	w.t.Helper()
	if got := w.types(); !slices.Equal(got, want) {
		w.t.Fatalf("on record:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// alive reports whether Vault still takes a token.
func alive(t testing.TB, token string) bool {
	t.Helper()
	c, err := vaultdev.NewClient(vault.Addr, token)
	ok(t, err)
	_, err = c.Auth().Token().LookupSelf()
	if err == nil {
		return true
	}
	var re *api.ResponseError
	if errors.As(err, &re) && re.StatusCode == 403 {
		// No right to look itself up, or no token: reading the demo secret tells.
		s, err := c.Logical().Read("secret/data/demo")
		return err == nil && s != nil
	}
	t.Fatal(err)
	return false
}

// children counts the live tokens that were made for steps of run.
func children(t testing.TB, run string) int {
	t.Helper()
	l, err := root.Logical().List("auth/token/accessors")
	ok(t, err)
	n := 0
	for _, a := range l.Data["keys"].([]any) {
		s, err := root.Auth().Token().LookupAccessor(a.(string))
		if err != nil {
			continue // ended since
		}
		if meta, _ := s.Data["meta"].(map[string]any); meta != nil && meta["run"] == run {
			n++
		}
	}
	return n
}

var demoCaller = broker.Caller{Orchestrator: "demo"}

// ask is a call for the demo secret's token in a run of the test's own.
func ask(run string, change ...func(*broker.Ask)) broker.Ask {
	a := broker.Ask{Step: "step-1", Run: run, Scope: "vault:demo-read", Body: []byte(`{"run":"` + run + `","scope":"vault:demo-read"}`)}
	for _, c := range change {
		c(&a)
	}
	return a
}

func keyed(k string) func(*broker.Ask) { return func(a *broker.Ask) { a.Key = k } }

func run1() string { return "run-" + strings.ToLower(rand.Text()[:12]) }

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}
