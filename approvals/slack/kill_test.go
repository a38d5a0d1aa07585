package slack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// pendingRoom is a source in which as many requests are pending as it says, all
// announced by events.
type pendingRoom struct {
	n     int
	asked time.Time
}

func (p pendingRoom) request(i int) approvals.Request {
	return approvals.Request{ID: fmt.Sprintf("apr_%03d", i), Status: store.StatusPending, Scope: fmt.Sprint("s", i), Asked: p.asked, URL: "http://localhost/x", LeafHash: strings.Repeat("A", 44)}
}

func (p pendingRoom) Get(_ context.Context, id string) (*approvals.Request, error) {
	var i int
	if _, err := fmt.Sscanf(id, "apr_%d", &i); err != nil || i >= p.n {
		return nil, approvals.ErrNotFound
	}
	r := p.request(i)
	return &r, nil
}

func (p pendingRoom) List(context.Context, approvals.Filter) (out []approvals.Request, _ string, _ error) {
	for i := range p.n {
		out = append(out, p.request(i))
	}
	return out, "", nil
}

func (p pendingRoom) Passkeys(context.Context, *approvals.Person) ([]approvals.Passkey, error) {
	return nil, nil
}

func (p pendingRoom) Subscribe() (<-chan approvals.Event, func()) {
	return make(chan approvals.Event), func() {}
}

func (p pendingRoom) Decide(context.Context, approvals.Person, string, approvals.Decision) (*approvals.Request, error) {
	return nil, approvals.ErrNotFound
}

func (p pendingRoom) History(context.Context, ledger.Query) (*ledger.Page, error) {
	return &ledger.Page{}, nil
}

const killRequests = 12

// notifier is the process that is killed: it delivers until it dies.
func notifier(api, file, asked string) {
	p := pendingRoom{n: killRequests, asked: must(time.Parse(time.RFC3339Nano, asked))}
	s := must(New(context.Background(), Config{Token: slacktest.Token, SigningSecret: slacktest.SigningSecret, Team: slacktest.Team, Channel: slacktest.Channel, APIURL: api,
		Approvals: p, Ledger: p, Record: func(context.Context, *store.Submission) error { return nil }, PrivacyKey: make([]byte, 32), TrustDomain: "example.com", Name: "recorder"}))
	must(outbox.Open(context.Background(), outbox.Config{File: file, Source: p, Senders: []outbox.Sender{s}, MinWait: 5 * time.Millisecond, MaxWait: 20 * time.Millisecond, Settle: 20 * time.Millisecond}))
	select {}
}

// TestMain becomes, when asked by TestKill9BetweenPostAndCommit, the process
// that is killed.
func TestMain(m *testing.M) {
	if api := os.Getenv("COUNTERSIGN_TEST_NOTIFY"); api != "" {
		notifier(api, os.Getenv("COUNTERSIGN_TEST_FILE"), os.Getenv("COUNTERSIGN_TEST_ASKED"))
	}
	os.Exit(m.Run())
}

// Each process is killed by SIGKILL while Slack has posted, or has looked, and
// has not answered yet: between the message and the row that remembers it.
func TestKill9BetweenPostAndCommitLeavesOneMessage(t *testing.T) {
	double := slacktest.New()
	defer double.Close()
	file, asked := filepath.Join(t.TempDir(), "outbox.db"), time.Now().Format(time.RFC3339Nano)
	var mu sync.Mutex
	var child *exec.Cmd
	var left int // calls until the next kill
	double.OnDone(func(method string) {
		if method != "chat.postMessage" && method != "conversations.history" {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if left--; left == 0 && child != nil {
			child.Process.Kill()
			child.Process.Wait()
		}
	})
	kills := 0
	for round := range 8 {
		mu.Lock()
		left = 1 + round%4
		child = exec.Command(os.Args[0], "-test.run=^$")
		child.Env = append(os.Environ(), "COUNTERSIGN_TEST_NOTIFY="+double.URL, "COUNTERSIGN_TEST_FILE="+file, "COUNTERSIGN_TEST_ASKED="+asked)
		child.Stderr = os.Stderr
		if err := child.Start(); err != nil {
			mu.Unlock()
			t.Fatal(err)
		}
		mu.Unlock()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			mu.Lock()
			dead := child.ProcessState != nil || left <= 0
			mu.Unlock()
			if dead {
				kills++
				break
			}
			if time.Now().After(end) || len(double.Messages()) >= killRequests {
				break
			}
		}
		mu.Lock()
		child.Process.Kill()
		child.Wait()
		child = nil
		mu.Unlock()
	}
	double.OnDone(nil)
	// The last one is left to finish.
	p := pendingRoom{n: killRequests, asked: must(time.Parse(time.RFC3339Nano, asked))}
	s := must(New(t.Context(), Config{Token: slacktest.Token, SigningSecret: slacktest.SigningSecret, Team: slacktest.Team, Channel: slacktest.Channel, APIURL: double.URL,
		Approvals: p, Ledger: p, Record: func(context.Context, *store.Submission) error { return nil }, PrivacyKey: make([]byte, 32), TrustDomain: "example.com", Name: "recorder"}))
	defer s.Close()
	o := must(outbox.Open(t.Context(), outbox.Config{File: file, Source: p, Senders: []outbox.Sender{s}, MinWait: 5 * time.Millisecond, MaxWait: 20 * time.Millisecond, Settle: 20 * time.Millisecond}))
	defer o.Close()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if n, err := o.Waiting(t.Context(), "slack"); err == nil && n == 0 && len(double.Messages()) >= killRequests {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d messages", len(double.Messages()), killRequests)
		}
	}
	about := map[string]int{}
	for _, m := range double.Messages() {
		about[m.Metadata]++
	}
	if len(about) != killRequests || len(double.Messages()) != killRequests {
		t.Fatalf("%d messages about %d requests: %v", len(double.Messages()), len(about), about)
	}
	if kills < 4 {
		t.Fatalf("only %d processes were killed in the middle", kills)
	}
}

// A standby recorder has no file of its predecessor's, and a second message may
// stand already: one remains.
func TestAStandbyFindsWhatItsPredecessorSentAndRemovesDoubles(t *testing.T) {
	w := newWorld(t)
	r := w.ask(rule(), grant(), "x")
	m := w.message(r, "Approval asked")
	w.outbox.Close()
	w.double.Say(slacktest.Message{Channel: slacktest.Channel, Bot: slacktest.BotID, Blocks: m.Blocks, Metadata: m.Metadata})
	w.file += ".standby"
	w.start()
	w.eventually("one message stands", func() bool { return len(w.double.Messages()) == 1 && w.double.Messages()[0].Edits > m.Edits })
	if got := w.double.Messages()[0]; got.TS != m.TS {
		t.Fatalf("%s stands, not the first, %s", got.TS, m.TS)
	}
}
