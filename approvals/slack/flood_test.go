package slack

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
)

// flooded is the message about a flood, and how many messages there are.
func (w *world) flooded() (m slacktest.Message, all int) {
	w.t.Helper()
	floods := 0
	for _, x := range w.double.Messages() {
		if x.Bot != slacktest.BotID {
			continue
		}
		all++
		if strings.Contains(x.Metadata, "flood:") {
			m = x
			floods++
		}
	}
	if floods > 1 {
		w.t.Fatalf("%d messages about one flood", floods)
	}
	return m, all
}

func TestTwoHundredRequestsInAMinuteAreAHandfulOfMessagesWithACount(t *testing.T) {
	w := newWorld(t)
	var asked []*approvals.Request
	for i := range 200 {
		g := grant()
		if i == 150 {
			g.Scope = "vault:demo-admin"
		}
		asked = append(asked, w.ask(rule(), g, fmt.Sprint("reason ", i)))
		if i%4 == 3 {
			w.advance(time.Second) // 50 s in all
		}
	}
	says := func(what string) {
		t.Helper()
		w.eventually("the flood's message says "+what, func() bool {
			w.advance(20 * time.Millisecond) // so that it may be told again
			m, _ := w.flooded()
			return strings.Contains(m.Plain(), what)
		})
	}
	says("194 more approvals asked: vault:demo-write")
	says("194") // waiting
	m, all := w.flooded()
	if all != 7 { // five, the flood, and the other scope's own
		t.Errorf("%d messages", all)
	}
	if plain := m.Plain(); !strings.Contains(plain, "run-1") || !strings.Contains(plain, "demo") || m.Value(actionApprove) != "" || m.Value(actionDeny) != "" ||
		m.Value(actionOpen) != "http://localhost:8788/approvals?state=pending" {
		t.Errorf("%s\n%s", plain, m.Blocks)
	}
	if posts, updates := w.double.Calls("chat.postMessage"), w.double.Calls("chat.update"); posts != 7 || updates > 40 {
		t.Errorf("%d messages posted, %d changes", posts, updates)
	}
	// Not even a word of a hidden one is lost on the page: each has its own.
	w.message(asked[150], "Approval asked: vault:demo-admin")
	w.message(asked[0], "reason 0")
	// Each is decided on its own, and the message follows.
	for i, decision := range map[int]string{20: store.Approve, 30: store.Refuse, 31: store.Refuse} {
		if _, err := w.rooms.Decide(t.Context(), ana, asked[i].ID, approvals.Decision{Decision: decision, Reason: "looked at", Via: "page"}); err != nil {
			t.Fatal(err)
		}
	}
	says("Waiting for people\n191")
	says("Approved\n1")
	says("Denied\n2")
	// A restart tells nobody again, and what comes next joins.
	w.outbox.Close()
	w.slack.Close()
	w.start()
	w.ask(rule(), grant(), "one more")
	says("195 more approvals asked")
	if _, all := w.flooded(); all != 7 {
		t.Errorf("%d messages after a restart", all)
	}
	// After a quiet while one is told by itself again.
	w.advance(2 * time.Minute)
	w.message(w.ask(rule(), grant(), "later"), "later")
}
