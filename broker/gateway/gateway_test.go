package gateway_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/refusal"
)

// recorder is a ledger that a test may take down or slow.
type recorder struct {
	t      testing.TB
	ledger *ledger.Ledger
	n      atomic.Int64 // appends

	mu     sync.Mutex
	before func(subs []*store.Submission) error // nothing is recorded
	after  func(subs []*store.Submission) error // it is, and the answer is lost
}

func newRecorder(t testing.TB) *recorder {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.countersign.test")
	ok(t, err)
	signer, err := note.NewSigner(skey)
	ok(t, err)
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: t.TempDir(), Signer: signer, Verifier: vkey,
		PrivacyKey: store.PrivacyKey(strings.Repeat("k", 32)), RecheckEvery: -1})
	ok(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return &recorder{t: t, ledger: l}
}

func (r *recorder) set(before, after func(subs []*store.Submission) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before, r.after = before, after
}

func down([]*store.Submission) error {
	return fmt.Errorf("%w: connection refused", store.ErrUnavailable)
}

func (r *recorder) Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error) {
	r.n.Add(1)
	r.mu.Lock()
	before, after := r.before, r.after
	r.mu.Unlock()
	if before != nil {
		if err := before(subs); err != nil {
			return nil, err
		}
	}
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", store.ErrMalformed, err)
		}
		lines = append(lines, b)
	}
	// As the recorder's own: nothing was issued here, so that a writer's uses would
	// be of credentials that are not live.
	a, err := r.ledger.Append(ctx, ledger.Author{Name: "broker-1", Recorder: true}, lines)
	if err == nil && after != nil {
		err = after(subs)
	}
	return a, err
}

// entries are what is on record of a type.
func (r *recorder) entries(t store.Type) (out []*store.Entry) {
	r.t.Helper()
	for s, err := range r.ledger.Entries(context.Background(), 0, r.ledger.Size()) {
		ok(r.t, err)
		e, err := store.ParseLeaf(s.Leaf)
		ok(r.t, err)
		if e.Type == t {
			out = append(out, e)
		}
	}
	return out
}

// outcomes are all that are on record, by use.
func (r *recorder) outcomes() map[string]store.UseOutcome {
	r.t.Helper()
	out := map[string]store.UseOutcome{}
	for _, e := range r.entries(store.UseFinished) {
		d, err := store.DetailsAs[store.UseFinishedDetails](e)
		ok(r.t, err)
		for _, o := range d.Outcomes {
			if _, twice := out[o.Use]; twice {
				r.t.Errorf("two outcomes of %s", o.Use)
			}
			out[o.Use] = o
		}
	}
	return out
}

func (r *recorder) until(what string, fn func() bool) {
	r.t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("never: %s", what)
		}
	}
}

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

var addresses = map[string]string{
	store.ProtocolHTTP: "http://gateway.test:8789", store.ProtocolPostgres: "gateway.test:8790", store.ProtocolMCP: "https://gateway.test/mcp",
}

func newGateway(t testing.TB, r gateway.Recorder, change ...func(*gateway.Config)) *gateway.Gateway {
	c := gateway.Config{Recorder: r, TrustDomain: "countersign.test", Addresses: addresses}
	for _, f := range change {
		f(&c)
	}
	g := gateway.New(c)
	t.Cleanup(g.Close)
	return g
}

// params are those of a session at an HTTP target.
func params(change ...func(*gateway.Params)) gateway.Params {
	access := &store.Access{Protocol: store.ProtocolHTTP, Upstream: "http://demo.internal",
		HTTP:    &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{"GET"}, Paths: []string{"/*"}}}},
		Masking: store.Masking{Rules: []store.MaskRule{{Field: "email"}}}}
	p := gateway.Params{
		Story: &store.Entry{Agent: "spiffe://countersign.test/orchestrator/demo/run/run-1/step/step-1", Orchestrator: "demo", Run: "run-1", Step: "step-1",
			Request: "req_1", Resource: "http://demo.internal", Action: "http:demo",
			Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:" + strings.Repeat("0", 64), Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}},
		Intent: store.NewID(), Grant: store.Grant{Scope: "http:demo", Delivery: "gateway", Access: access},
		Secret: &issuer.Credential{Kind: issuer.KindGateway, Data: []byte(`{"key":"s3cret"}`)}, Expires: time.Now().Add(time.Hour),
	}
	for _, f := range change {
		f(&p)
	}
	return p
}

func open(t testing.TB, g *gateway.Gateway, change ...func(*gateway.Params)) (*gateway.Session, string) {
	t.Helper()
	s, token, err := g.Open(params(change...))
	ok(t, err)
	return s, token
}

func TestUsesAreOnRecordInTheOrderOfEachConnectionAndShareAppends(t *testing.T) {
	r := newRecorder(t)
	// Each append takes a while, so that uses wait for the next.
	r.set(func([]*store.Submission) error { time.Sleep(2 * time.Millisecond); return nil }, nil)
	g := newGateway(t, r)
	const sessions, conns, each = 5, 4, 12
	var all sync.WaitGroup
	for i := range sessions {
		s, _ := open(t, g)
		for c := range conns {
			all.Go(func() {
				random := mrand.New(mrand.NewPCG(uint64(i), uint64(c)))
				for n := 0; n < each; {
					var uses []gateway.Use
					for range 1 + random.IntN(3) {
						uses = append(uses, gateway.Use{Use: fmt.Sprint(n), Conn: fmt.Sprintf("%d/%d", i, c), Statement: "SELECT 1"})
						n++
					}
					got, err := s.Use(t.Context(), uses...)
					if err != nil || len(got) != len(uses) {
						t.Errorf("%d of %d: %v", len(got), len(uses), err)
						return
					}
					for _, p := range got {
						p.Finish(store.UseOutcome{Status: "200"}, "")
					}
				}
			})
		}
	}
	all.Wait()
	g.Close()
	next, total := map[string]int{}, 0
	for _, e := range r.entries(store.CredentialUsed) {
		d, err := store.DetailsAs[store.UsedDetails](e)
		ok(t, err)
		if d.Use != fmt.Sprint(next[d.Conn]) {
			t.Fatalf("connection %s: %s after %d", d.Conn, d.Use, next[d.Conn]-1)
		}
		next[d.Conn]++
		total++
	}
	if len(next) != sessions*conns || total < sessions*conns*each {
		t.Errorf("%d uses of %d connections", total, len(next))
	}
	if got := len(r.outcomes()); got != total {
		t.Errorf("%d outcomes of %d uses", got, total)
	}
	if n := r.n.Load(); n > int64(total)/4 {
		t.Errorf("%d uses took %d appends", total, n)
	}
}

func TestOfABatchThatTheRecorderRefusesOnlyTheBadUsesFail(t *testing.T) {
	r := newRecorder(t)
	var held sync.Once
	gate := make(chan struct{})
	refuse := []error{store.ErrMalformed, &store.OrderError{Code: store.OrderMismatch, Message: "no"}, store.ErrConflict}
	r.set(func(subs []*store.Submission) error {
		held.Do(func() { <-gate })
		for _, s := range subs {
			d, err := store.DetailsAs[store.UsedDetails](&s.Entry)
			ok(t, err)
			if strings.HasPrefix(d.Use, "bad") {
				return refuse[len(subs)%len(refuse)]
			}
		}
		return nil
	}, nil)
	g := newGateway(t, r)
	var all sync.WaitGroup
	var good, bad atomic.Int64
	for i := range 40 {
		s, _ := open(t, g)
		all.Go(func() {
			name := "good"
			if i%7 == 3 {
				name = "bad"
			}
			// One bad use takes those with it that were to be on record together.
			_, err := s.Use(t.Context(), gateway.Use{Use: "first", Conn: fmt.Sprint(i)}, gateway.Use{Use: name, Conn: fmt.Sprint(i)})
			switch {
			case err == nil && name == "good":
				good.Add(1)
			case err != nil && !errors.Is(err, store.ErrUnavailable) && name == "bad":
				bad.Add(1)
			default:
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	time.AfterFunc(50*time.Millisecond, func() { close(gate) })
	all.Wait()
	if good.Load() != 34 || bad.Load() != 6 || len(r.entries(store.CredentialUsed)) != 68 {
		t.Errorf("%d good and %d bad, %d on record", good.Load(), bad.Load(), len(r.entries(store.CredentialUsed)))
	}
}

func TestASessionWhoseCredentialHasEndedOnRecordIsCutAndTheOthersGoOn(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	over, token := open(t, g)
	under, err := over.Use(t.Context(), gateway.Use{Use: "first"})
	ok(t, err)
	var held sync.Once
	gate, waiting := make(chan struct{}), make(chan struct{})
	r.set(func(subs []*store.Submission) error {
		held.Do(func() { close(waiting); <-gate })
		for _, s := range subs {
			if d, err := store.DetailsAs[store.UsedDetails](&s.Entry); err == nil && s.Type == store.CredentialUsed && d.Intent == over.Intent {
				return &store.OrderError{Code: store.OrderNotLive, Message: "ended"}
			}
		}
		return nil
	}, nil)
	var all sync.WaitGroup
	all.Go(func() {
		s, _ := open(t, g)
		if _, err := s.Use(t.Context(), gateway.Use{Use: "alone"}); err != nil {
			t.Error(err)
		}
	})
	<-waiting
	for i := range 5 { // in one batch, most likely
		s, _ := open(t, g)
		all.Go(func() {
			if _, err := s.Use(t.Context(), gateway.Use{Use: fmt.Sprint("other-", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Go(func() {
		if _, err := over.Use(t.Context(), gateway.Use{Use: "too late"}); !errors.Is(err, gateway.ErrEnded) {
			t.Errorf("a use after the end: %v", err)
		}
	})
	close(gate)
	all.Wait()
	if _, err := g.Session(token); !errors.Is(err, gateway.ErrNoSession) || over.Context().Err() == nil {
		t.Errorf("its session goes on: %v", err)
	}
	under[0].Finish(store.UseOutcome{Status: "200"}, "") // what came of an earlier one is told all the same
	r.until("its outcome", func() bool { return len(r.outcomes()) == 1 })
	if n := len(r.entries(store.CredentialUsed)); n != 7 {
		t.Errorf("%d uses on record", n)
	}
}

func TestWithTheRecorderDownNothingIsUsedAndOutcomesAreKeptUntilItIsBack(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	s, _ := open(t, g)
	var under []*gateway.Pending
	for range 5 {
		p, err := s.Use(t.Context(), slices.Repeat([]gateway.Use{{Use: "GET /"}}, 50)...)
		ok(t, err)
		under = append(under, p...)
	}
	r.set(down, nil)
	if _, err := s.Use(t.Context(), gateway.Use{Use: "GET /"}); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("a use with the recorder down: %v", err)
	}
	for i, p := range under {
		p.Finish(store.UseOutcome{Status: "200", Rows: int64(i)}, "")
	}
	under[0].Finish(store.UseOutcome{}, "") // a second time, which is ignored
	time.Sleep(500 * time.Millisecond)      // some tries
	if n := len(r.outcomes()); n != 0 {
		t.Fatalf("%d outcomes are on record", n)
	}
	// It takes the next, and the answer is lost: the same bytes are sent again.
	var lost sync.Once
	r.set(nil, func([]*store.Submission) (err error) { lost.Do(func() { err = down(nil) }); return })
	r.until("all outcomes are on record", func() bool { return len(r.outcomes()) == len(under) })
	for _, e := range r.entries(store.UseFinished) {
		d, err := store.DetailsAs[store.UseFinishedDetails](e)
		ok(t, err)
		if len(d.Outcomes) > store.MaxOutcomes {
			t.Errorf("%d outcomes in an entry", len(d.Outcomes))
		}
		for i, o := range d.Outcomes[1:] {
			if o.Rows != d.Outcomes[i].Rows+1 {
				t.Errorf("%d after %d", o.Rows, d.Outcomes[i].Rows)
			}
		}
	}
	if _, err := s.Use(t.Context(), gateway.Use{Use: "GET /"}); err != nil || g.Lost() != 0 {
		t.Errorf("%v, %d lost", err, g.Lost())
	}
}

func TestWhatCannotBeRecordedUntilTheGatewayClosesIsCountedAndLogged(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	synctest.Test(t, func(t *testing.T) {
		g := gateway.New(gateway.Config{Recorder: memory{}, Addresses: addresses, Log: zap.New(core)})
		s, _ := open(t, g)
		p, err := s.Use(t.Context(), gateway.Use{Use: "GET /"})
		ok(t, err)
		p[0].Finish(store.UseOutcome{}, strings.Repeat("x", 100))
		began := time.Now()
		g.Close()
		if took := time.Since(began); took > 6*time.Second || g.Lost() != 1 {
			t.Errorf("%d lost after %s", g.Lost(), took)
		}
	})
	if logs.Len() == 0 {
		t.Error("nothing was logged")
	}
}

// memory takes uses and no outcomes.
type memory struct{}

func (memory) Append(_ context.Context, subs ...*store.Submission) (*store.Appended, error) {
	if subs[0].Type == store.UseFinished {
		return nil, down(nil)
	}
	return &store.Appended{}, nil
}

func TestAUseWhoseSessionOrCallEndsMeanwhileReachesNoTarget(t *testing.T) {
	for name, end := range map[string]struct {
		by   func(g *gateway.Gateway, s *gateway.Session, cancel func())
		want error
	}{
		"the session": {func(g *gateway.Gateway, s *gateway.Session, _ func()) { g.End(s.Intent) }, gateway.ErrEnded},
		"the call":    {func(_ *gateway.Gateway, _ *gateway.Session, cancel func()) { cancel() }, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecorder(t)
			g := newGateway(t, r)
			s, _ := open(t, g)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			var once sync.Once
			r.set(func([]*store.Submission) error {
				once.Do(func() { end.by(g, s, cancel); <-ended })
				return nil
			}, nil)
			_, err := s.Use(ctx, gateway.Use{Use: "GET /"})
			is(t, err, end.want)
			close(ended)
			// It went on record all the same, and the record says that it was cut.
			r.until("its outcome is on record", func() bool { return len(r.outcomes()) == 1 })
			for id, o := range r.outcomes() {
				if o.Error != store.UseCut || r.entries(store.CredentialUsed)[0].ID != id {
					t.Errorf("%+v", o)
				}
			}
		})
	}
}

func TestASessionEndsAtItsTimeAndWithTheGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateway.New(gateway.Config{Recorder: memory{}, Addresses: addresses})
		s, token := open(t, g, func(p *gateway.Params) { p.Expires = time.Now().Add(time.Minute) })
		other, _ := open(t, g)
		time.Sleep(time.Minute - time.Millisecond)
		if got, err := g.Session(token); got != s || err != nil || !g.Has(s.Intent) {
			t.Errorf("%v before its end", err)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if _, err := g.Session(token); !errors.Is(err, gateway.ErrNoSession) || s.Context().Err() == nil || g.Has(s.Intent) {
			t.Errorf("%v after its end", err)
		}
		g.Close()
		if other.Context().Err() == nil {
			t.Error("it outlives the gateway")
		}
		if _, err := other.Use(t.Context(), gateway.Use{}); !errors.Is(err, gateway.ErrEnded) {
			t.Errorf("%v", err)
		}
		if _, _, err := g.Open(params()); !errors.Is(err, gateway.ErrNoGateway) {
			t.Errorf("%v", err)
		}
	})
}

func TestASessionThatCannotBeServedIsNotOpened(t *testing.T) {
	g := newGateway(t, memory{}, func(c *gateway.Config) {
		c.MaxSessions = 2
		c.Addresses = map[string]string{store.ProtocolHTTP: "http://g"}
	})
	for name, c := range map[string]struct {
		change func(*gateway.Params)
		want   error
	}{
		"no rules":         {func(p *gateway.Params) { p.Grant.Access = nil }, gateway.ErrNoGateway},
		"another protocol": {func(p *gateway.Params) { p.Grant.Access.Protocol = store.ProtocolPostgres }, gateway.ErrNoGateway},
	} {
		if _, _, err := g.Open(params(c.change)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	open(t, g)
	s, _ := open(t, g)
	_, _, err := g.Open(params())
	is(t, err, gateway.ErrFull)
	is(t, g.Serves(params().Grant.Access), gateway.ErrFull)
	s.Close()
	s.Close()
	open(t, g)
}

func TestAUseThatDoesNotFitInAnEntryIsRefusedAndSpoilsNothing(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	s, _ := open(t, g)
	for name, c := range map[string]struct {
		use  gateway.Use
		want error
	}{
		"at the limit":   {gateway.Use{Use: "SELECT", Statement: strings.Repeat("x", gateway.MaxStatement)}, nil},
		"of 10 MB":       {gateway.Use{Use: "SELECT", Statement: strings.Repeat("x", 10<<20)}, gateway.ErrTooLarge},
		"lengthened":     {gateway.Use{Use: "SELECT", Statement: strings.Repeat("\x01", gateway.MaxStatement)}, gateway.ErrTooLarge},
		"of one line":    {gateway.Use{Use: strings.Repeat("x", 1<<20)}, gateway.ErrTooLarge},
		"many objects":   {gateway.Use{Use: "SELECT", Objects: slices.Repeat([]string{"t"}, 100_000)}, gateway.ErrTooLarge},
		"not UTF-8":      {gateway.Use{Use: "SELECT", Statement: "\xff"}, store.ErrMalformed},
		"with U+0000":    {gateway.Use{Use: "SELECT", Objects: []string{"a\x00"}}, store.ErrMalformed},
		"quotes, halved": {gateway.Use{Use: "SELECT", Statement: strings.Repeat(`"`, gateway.MaxStatement/2)}, nil},
	} {
		if _, err := s.Use(t.Context(), c.use); !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Use(t.Context(), make([]gateway.Use, gateway.MaxUses+1)...); !errors.Is(err, gateway.ErrTooLarge) {
		t.Errorf("too many: %v", err)
	}
	if _, err := s.Use(t.Context(), slices.Repeat([]gateway.Use{{Statement: strings.Repeat("x", gateway.MaxStatement)}}, gateway.MaxUses)...); !errors.Is(err, gateway.ErrTooLarge) {
		t.Errorf("too much together: %v", err)
	}
	if n := len(r.entries(store.CredentialUsed)); n != 2 {
		t.Errorf("%d are on record", n)
	}
}

func TestOutcomesFitInAnEntryWhateverATargetSays(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	s, _ := open(t, g)
	hostile := strings.Repeat("\x01\"\\\xff\n", 10_000)
	for range 5 {
		p, err := s.Use(t.Context(), slices.Repeat([]gateway.Use{{Use: "GET /"}}, 100)...)
		ok(t, err)
		for _, p := range p {
			p.Finish(store.UseOutcome{Status: hostile, Error: hostile, Digest: hostile, Rows: 1 << 62, Sent: 1 << 62, Received: 1 << 62, Masked: 1 << 62}, "")
		}
	}
	p, err := s.Use(t.Context(), gateway.Use{Use: "GET /"})
	ok(t, err)
	p[0].Finish(store.UseOutcome{Status: "200"}, strings.Repeat("ü\x00\"", 1<<20))
	g.Close()
	if n := len(r.outcomes()); n != 501 || g.Lost() != 0 {
		t.Errorf("%d outcomes, %d lost", n, g.Lost())
	}
	var sampled int
	for _, e := range r.entries(store.UseFinished) {
		if e.Sealed[store.SealedSample] != "" {
			sampled++
		}
	}
	if sampled != 1 {
		t.Errorf("%d samples", sampled)
	}
}

func TestExcerptsOfSeveralUsesShareAnEntry(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	s, _ := open(t, g)
	want := map[string]string{}
	for i, sample := range []string{"", "one", "", `say "two"`, strings.Repeat("\"\\\n\x01ü", 1500), "[\"no array\"]", strings.Repeat("x", 20<<10), "bad \xff\x00", "", strings.Repeat("\x02", 30<<10)} {
		p, err := s.Use(t.Context(), gateway.Use{Use: "GET /"})
		ok(t, err)
		p[0].Finish(store.UseOutcome{Status: fmt.Sprint(i)}, sample)
		want[fmt.Sprint(i)] = sample
	}
	many, err := s.Use(t.Context(), slices.Repeat([]gateway.Use{{Use: "GET /"}}, 250)...)
	ok(t, err)
	for i, p := range many {
		p.Finish(store.UseOutcome{Status: fmt.Sprint(100 + i)}, strings.Repeat(`"`, 100))
		want[fmt.Sprint(100+i)] = strings.Repeat(`"`, 100)
	}
	g.Close()
	if g.Lost() != 0 {
		t.Fatalf("%d lost", g.Lost())
	}
	page, err := r.ledger.History(t.Context(), ledger.Query{Type: string(store.UseFinished), Limit: 1000})
	ok(t, err)
	if n := len(page.Entries); n > 12 {
		t.Errorf("%d entries", n)
	}
	seen := 0
	for _, x := range page.Entries {
		e, err := store.ParseLeaf(x.Entry)
		ok(t, err)
		d, err := store.DetailsAs[store.UseFinishedDetails](e)
		ok(t, err)
		samples := store.SplitSamples(x.Opened[store.SealedSample], len(d.Outcomes))
		for i, o := range d.Outcomes {
			seen++
			got := ""
			if samples != nil {
				got = samples[i]
			}
			switch w := want[o.Status]; {
			case o.Status == "9": // longer than an entry
				if !strings.HasPrefix(got, "\x02\x02") || !strings.HasSuffix(got, "… (cut, of 30720 bytes)") {
					t.Errorf("use 9: %.40q", got)
				}
			case o.Status == "7":
				if got != "bad \ufffd\ufffd" {
					t.Errorf("use 7: %q", got)
				}
			case got != w:
				t.Errorf("use %s: %.40q, want %.40q", o.Status, got, w)
			}
		}
	}
	if seen != len(want) {
		t.Errorf("%d of %d outcomes", seen, len(want))
	}
}

func TestRefusalsAreOnRecordAndFloodsAreCountedBySession(t *testing.T) {
	r := newRecorder(t)
	g := newGateway(t, r)
	loud, _ := open(t, g)
	quiet, _ := open(t, g)
	for range 300 {
		ok(t, loud.Refuse(t.Context(), gateway.Refusal{Use: "DELETE /", Reason: "the method is not allowed", Statement: "DELETE / \x00\xff", Remote: "192.0.2.1"}))
	}
	ok(t, quiet.Refuse(t.Context(), gateway.Refusal{Use: "PUT /", Reason: "the method is not allowed", Statement: strings.Repeat("PUT /\x01", 1<<20)}))
	if got := r.entries(store.AccessRefused); len(got) < refusal.Burst+1 || len(got) > 2*refusal.Burst || got[len(got)-1].Run != "run-1" || got[0].Decision.Outcome != store.Deny || got[0].Decision.Reasons[0] != "the method is not allowed" || got[len(got)-1].Sealed[store.SealedStatement] == "" {
		t.Errorf("%d on record", len(got))
	}
	g.End(loud.Intent) // what is folded is not lost with the session
	ok(t, loud.Refuse(t.Context(), gateway.Refusal{Use: "DELETE /", Reason: "late"}))
	for range 300 {
		g.Refused(t.Context(), store.ProtocolHTTP, "192.0.2.7", "GET")
	}
	g.Close()
	sum := map[string]int{}
	for _, e := range r.entries(store.AccessRefused) {
		d, err := store.DetailsAs[store.RefusedDetails](e)
		ok(t, err)
		sum[d.Intent] += 1 + d.Folded
		if d.Intent == "" && (d.Remote != "192.0.2.7" || e.Agent != "spiffe://countersign.test/unauthenticated" || d.Problem != "unauthenticated") {
			t.Errorf("%+v", d)
		}
	}
	if sum[loud.Intent] != 301 || sum[quiet.Intent] != 1 || sum[""] != 300 {
		t.Errorf("%v", sum)
	}
	r.set(down, nil)
	if err := quiet.Refuse(t.Context(), gateway.Refusal{Use: "PUT /"}); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("with the recorder down: %v", err)
	}
}

func TestTargetsAreDialledWhereTheConfigurationSaysTheyAre(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("here"))
			_ = c.Close()
		}
	}()
	g := newGateway(t, memory{}, func(c *gateway.Config) {
		c.Upstreams = map[string]string{
			"Demo.internal": l.Addr().String(), "orders.internal": "127.0.0.1:1", "orders.internal:5432": l.Addr().String(),
		}
	})
	for _, to := range []string{"demo.internal:80", "DEMO.internal:443", "Orders.internal:5432", l.Addr().String()} {
		c, err := g.Dial(t.Context(), "tcp", to)
		ok(t, err)
		b := make([]byte, 4)
		if _, err := c.Read(b); err != nil || string(b) != "here" {
			t.Errorf("%s: %q, %v", to, b, err)
		}
		_ = c.Close()
	}
	for _, bad := range [][2]string{{"tcp", "demo.internal"}, {"unix", "demo.internal:80"}, {"udp", "demo.internal:80"}, {"tcp", "orders.internal:80"}} {
		if c, err := g.Dial(t.Context(), bad[0], bad[1]); err == nil {
			c.Close()
			t.Errorf("%v was dialled", bad)
		}
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	ok(t, err)
	for _, bad := range []string{"169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80", "100.100.100.200:80", "[64:ff9b::a9fe:a9fe]:80", "0.0.0.0:" + port} {
		if c, err := g.Dial(t.Context(), "tcp", bad); !errors.Is(err, gateway.ErrAddress) {
			if err == nil {
				c.Close()
			}
			t.Errorf("%s: %v", bad, err)
		}
		if err := g.Reachable(bad); !errors.Is(err, gateway.ErrAddress) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestTenThousandIdleSessions holds what an idle session costs: some kilobytes,
// and no goroutine.
func TestTenThousandIdleSessionsCostLittleMemoryAndNoGoroutine(t *testing.T) {
	const n = 10_000
	g := newGateway(t, memory{})
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, goroutines := heap(), runtime.NumGoroutine()
	tokens := make([]string, n)
	for i := range n {
		_, tokens[i] = open(t, g)
	}
	each := (heap() - before) / n
	t.Logf("%d bytes of heap a session, rules and story included", each)
	if each > 8<<10 {
		t.Errorf("%d bytes of heap a session", each)
	}
	if more := runtime.NumGoroutine() - goroutines; more > 5 {
		t.Errorf("%d goroutines more", more)
	}
	for _, token := range tokens {
		if _, err := g.Session(token); err != nil {
			t.Fatal(err)
		}
	}
	g.Close()
	for _, token := range tokens {
		if _, err := g.Session(token); err == nil {
			t.Fatal("a session outlives the gateway")
		}
	}
}

// FuzzUse finds a use that is taken for one that fits in an entry, and does not.
func FuzzUse(f *testing.F) {
	f.Add("SELECT orders", "c1", "orders", "SELECT * FROM orders WHERE a = '\"\\'", 1)
	f.Add("GET /", "", "", "\x01\u2028\x7f<&>", 10_000)
	f.Add("", "\xff", "\x00", "", 0)
	f.Fuzz(func(t *testing.T, use, conn, object, statement string, times int) {
		r := gatewaytest.New(t)
		g := gateway.New(gateway.Config{Recorder: r, Addresses: addresses})
		defer g.Close()
		s, _ := open(t, g)
		if n := len(statement); n > 0 {
			statement = strings.Repeat(statement, max(1, min(times, 100_000/n)))
		}
		_, err := s.Use(t.Context(), gateway.Use{Use: use, Conn: conn, Objects: []string{object}, Statement: statement})
		if err != nil && !errors.Is(err, gateway.ErrTooLarge) && !errors.Is(err, store.ErrMalformed) {
			t.Error(err)
		}
		if err != nil && len(r.Last(1)) > 0 {
			t.Errorf("it reached the recorder: %v", err)
		}
		ok(t, s.Refuse(t.Context(), gateway.Refusal{Use: use, Conn: conn, Statement: statement, Reason: object, Remote: conn}))
	})
}
