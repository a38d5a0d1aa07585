package slack

import (
	"context"
	"crypto/rand"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	sumdb "golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

type catalogue struct{ set *scopes.Set }

func (c catalogue) Current() *scopes.Set { return c.set }

// world is a recorder with a real ledger and real approvals, and a Slack.
type world struct {
	t      *testing.T
	double *slacktest.Slack
	ledger *ledger.Ledger
	rooms  *approvals.Approvals
	slack  *Slack
	outbox *outbox.Outbox
	url    string
	key    store.PrivacyKey
	file   string

	mu    sync.Mutex
	ahead time.Duration
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.ahead)
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ahead += d
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, double: slacktest.New(), key: make([]byte, 32), file: filepath.Join(t.TempDir(), "outbox.db")}
	t.Cleanup(w.double.Close)
	skey, vkey, err := sumdb.GenerateKey(rand.Reader, "example.com/log")
	if err != nil {
		t.Fatal(err)
	}
	w.ledger = must(ledger.Open(t.Context(), ledger.Options{Dir: t.TempDir(), Signer: must(sumdb.NewSigner(skey)), Verifier: vkey, PrivacyKey: w.key, RecheckEvery: -1, Now: w.now}))
	t.Cleanup(func() { w.ledger.Close() })
	set := must(scopes.Parse("demo", scopes.Demo(nil), "", nil))
	w.rooms = must(approvals.New(t.Context(), approvals.Config{Ledger: w.ledger, Name: "recorder", TrustDomain: "example.com", Scopes: catalogue{set},
		PrivacyKey: w.key, Origin: "example.com/log", BaseURL: "http://localhost:8788", Now: w.now}))
	t.Cleanup(func() { w.rooms.Close() })
	w.start()
	return w
}

func (w *world) config() Config {
	return Config{Token: slacktest.Token, SigningSecret: slacktest.SigningSecret, Team: slacktest.Team, Channel: slacktest.Channel, APIURL: w.double.URL,
		Approvals: w.rooms, Ledger: w.ledger, Record: w.record, PrivacyKey: w.key, TrustDomain: "example.com", Name: "recorder", Now: w.now}
}

func (w *world) record(ctx context.Context, s *store.Submission) error {
	_, err := w.ledger.Append(ctx, ledger.Author{Name: "recorder", Recorder: true}, [][]byte{must(s.Marshal())})
	return err
}

// start opens Slack and outbox; called again, it is a restart.
func (w *world) start() {
	w.t.Helper()
	w.slack = must(New(w.t.Context(), w.config()))
	w.outbox = must(outbox.Open(w.t.Context(), outbox.Config{File: w.file, Source: w.rooms, Senders: []outbox.Sender{w.slack}, Now: w.now,
		MinWait: 5 * time.Millisecond, MaxWait: 50 * time.Millisecond, Settle: 20 * time.Millisecond, FloodWait: 2 * time.Second}))
	server := httptest.NewServer(w.slack.Interactions())
	w.url = server.URL + route
	w.t.Cleanup(func() { server.Close(); w.outbox.Close(); w.slack.Close() })
}

// rule is one approver of group dba, in Slack.
func rule() store.Rule {
	return store.Rule{Groups: []store.RuleGroup{{Group: "dba", Count: 1}}, Expires: store.Duration(time.Hour), Collect: store.Duration(time.Hour), Slack: true}
}

func grant() store.Grant {
	return store.Grant{Scope: "vault:demo-write", Target: "vault://demo", Engine: "token", Role: "countersign", Policies: []string{"demo-write"}, Params: map[string]string{},
		TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}
}

// ask puts a request on record that waits for people.
func (w *world) ask(r store.Rule, g store.Grant, reason string) *approvals.Request {
	w.t.Helper()
	id := strings.ReplaceAll(store.NewID(), "-", "")
	entry := func(t store.Type) *store.Submission {
		return &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(w.now()), Agent: "spiffe://example.com/orchestrator/demo/run/run-1/step/step-1",
			Subject: &store.Subject{ID: w.key.Pseudonym("user:subject")}, Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: "req_" + id, Resource: g.Target, Action: g.Scope,
			Decision: &store.Decision{Outcome: store.NeedsApproval, Policy: "sha256:00", Reasons: []string{"sensitive scope"}}, Risk: &store.Risk{Sensitivity: "high"},
		}}
	}
	req, asked := entry(store.StepRequested), entry(store.ApprovalRequested)
	req.SetDetails(store.RequestedDetails{Grant: g, Join: "join-" + id, Body: "x"})
	asked.SetDetails(store.ApprovalRequestedDetails{Approval: "apr_" + id, Grant: g, Rule: r, Excluded: []string{}})
	asked.Seal(store.SealedReason, reason)
	asked.Seal(store.SealedSubject, "user:subject")
	if _, err := w.ledger.Append(w.t.Context(), ledger.Author{Name: "broker-1"}, [][]byte{must(req.Marshal()), must(asked.Marshal())}); err != nil {
		w.t.Fatal(err)
	}
	var out *approvals.Request
	w.eventually("the request is known", func() bool {
		var err error
		out, err = w.rooms.Get(w.t.Context(), "apr_"+id)
		return err == nil
	})
	return out
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(3 * time.Millisecond) {
		if ok() {
			return
		}
	}
	w.t.Fatal("never: " + what)
}

// message waits for the one message about r that says what.
func (w *world) message(r *approvals.Request, what string) slacktest.Message {
	w.t.Helper()
	var m slacktest.Message
	w.eventually("a message says "+what, func() bool {
		n := 0
		for _, x := range w.double.Messages() {
			if strings.Contains(x.Metadata, r.ID) && x.Bot == slacktest.BotID {
				m, n = x, n+1
			}
		}
		if n > 1 {
			w.t.Fatalf("%d messages about one request", n)
		}
		return n == 1 && strings.Contains(m.Plain(), what)
	})
	return m
}

// link links user to person the whole way.
func (w *world) link(user string, p approvals.Person) {
	w.t.Helper()
	code, _ := w.begin(p)
	w.post(slacktest.User{ID: user}.Submit(viewLink, "", inputCode, code), 200)
	a, ok := w.slack.PendingLink(p)
	if !ok || a.User != user {
		w.t.Fatalf("pending link %+v %v", a, ok)
	}
	if err := w.slack.ConfirmLink(w.t.Context(), p, a.Team, a.User); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) begin(p approvals.Person) (string, time.Time) {
	code, ends, err := w.slack.BeginLink(p)
	if err != nil {
		w.t.Fatal(err)
	}
	return code, ends
}

var stamps struct {
	sync.Mutex
	n int
}

// post sends body signed, and wants status. Each body is stamped differently, as
// two clicks are never one callback.
func (w *world) post(body []byte, status int) string {
	w.t.Helper()
	stamps.Lock()
	stamps.n++
	at := time.Now().Add(time.Duration(1+stamps.n%200) * time.Second)
	stamps.Unlock()
	got, answer, err := slacktest.PostWith(w.url, body, slacktest.Sign(slacktest.SigningSecret, at, body))
	if err != nil || got != status {
		w.t.Fatalf("callback answered %d %s, %v; want %d", got, answer, err, status)
	}
	return answer
}

// refusals are the reasons of access.refused on record.
func (w *world) refusals() (reasons []string) {
	for _, h := range must(w.ledger.History(w.t.Context(), ledger.Query{Type: string(store.AccessRefused)})).Entries {
		e := must(store.ParseLeaf(h.Entry))
		reasons = append(reasons, strings.Join(e.Decision.Reasons, ": "))
	}
	return reasons
}

func (w *world) wantRefusal(why string) {
	w.t.Helper()
	if got := w.refusals(); !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, why) }) {
		w.t.Fatalf("no refusal %q on record, but %q", why, got)
	}
}

func (w *world) get(r *approvals.Request) *approvals.Request {
	return must(w.rooms.Get(w.t.Context(), r.ID))
}

func (w *world) whispered(what string) {
	w.t.Helper()
	w.eventually("a person alone is told: "+what, func() bool {
		return slices.ContainsFunc(w.double.Ephemeral(), func(m slacktest.Message) bool { return strings.Contains(m.Plain(), what) })
	})
}
