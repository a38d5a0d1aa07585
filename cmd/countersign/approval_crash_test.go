package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// approvalCrashes are the moments between a request that people decide and its
// minting. Where no call is named, the process dies while people decide.
var approvalCrashes = []crash{
	{"broker before people are asked", "broker", "recorder", "before", "/append", `"approval.requested"`},
	{"broker while it is recorded what they are asked", "broker", "recorder", "during", "/append", `"approval.requested"`},
	{"broker with it recorded, not acknowledged", "broker", "recorder", "after", "/append", `"approval.requested"`},
	{"recorder while it writes what they are asked", "recorder", "recorder", "during", "/append", `"approval.requested"`},
	{"recorder with it written, not acknowledged", "recorder", "recorder", "after", "/append", `"approval.requested"`},
	{"broker while people decide", "broker", "", "", "", ""},
	{"recorder while people decide", "recorder", "", "", "", ""},
	{"broker before the intent is sent", "broker", "recorder", "before", "/append", `"credential.issuing"`},
	{"broker with the intent recorded, not acknowledged", "broker", "recorder", "after", "/append", `"credential.issuing"`},
	{"broker with the child token made, not answered", "broker", "vault", "after", "/v1/auth/token/create", ""},
	{"recorder while it writes the issuance", "recorder", "recorder", "during", "/append", `"credential.issued"`},
}

func TestAnApprovalOutlivesAKillBetweenRequestAndMintAndNobodyIsAskedTwice(t *testing.T) {
	h := newHouse(t)
	for i, c := range approvalCrashes {
		h.approvalCrash(c, fmt.Sprintf("approved-%d", i))
		if t.Failed() {
			t.Fatalf("after the kill of the %s", c.name)
		}
	}
	h.settle()
	asked, decided, issued := map[string]int{}, map[string]int{}, map[string]int{}
	for _, e := range h.history() {
		switch e.Type {
		case store.ApprovalRequested:
			asked[e.Step]++
		case store.ApprovalDecided:
			decided[e.Step]++
		case store.CredentialIssued:
			issued[e.Step]++
		}
	}
	received := map[string]int{}
	for _, r := range h.received {
		received[r.step]++
	}
	for i, c := range approvalCrashes {
		step := fmt.Sprintf("approved-%d", i)
		// What was issued and never received is revoked, and minted anew for the
		// retry of the same key; its approval is the same one.
		if asked[step] != 1 || decided[step] != 1 || received[step] != 1 || issued[step] < 1 || issued[step] > 2 {
			t.Errorf("%s: asked %d times, decided %d, issued %d, received %d", c.name, asked[step], decided[step], issued[step], received[step])
		}
	}
	h.verify()
}

// approvalCrash has one request asked, decided and collected, with the victim
// killed at its moment on the way.
func (h *house) approvalCrash(c crash, step string) {
	h.t.Helper()
	victim := map[string]*process{"broker": h.broker, "recorder": h.recorder}[c.victim]
	a := &arm{crash: c, victim: victim, fired: make(chan struct{})}
	restart := func() {
		h.t.Helper()
		select {
		case <-a.fired:
		case <-time.After(30 * time.Second):
			h.t.Errorf("the moment %q never came", c.name)
		}
		h.armed.Store(nil)
		victim.start()
	}
	// The callers go on asking under one key until they have what they ask for.
	until := func(what string, done func(int, string) bool) string {
		h.t.Helper()
		var approval, last string
		defer func() {
			if h.t.Failed() {
				h.t.Fatalf("the last answer: %s", last)
			}
		}()
		eventually(h.t, what+" ("+c.name+")", func() bool {
			status, body := h.askPeople(step)
			last = fmt.Sprint(status, " ", body)
			var pending struct{ Approval struct{ ID string } }
			_ = json.Unmarshal([]byte(body), &pending)
			approval = pending.Approval.ID
			return done(status, body)
		})
		return approval
	}
	early := c.body == `"approval.requested"`
	if early {
		h.armed.Store(a)
		h.askPeople(step)
		restart()
	}
	id := until("the request waits", func(status int, _ string) bool { return status == http.StatusAccepted })
	if c.proxy == "" {
		a.fire()
	}
	decided := func() bool {
		status, _, body := decide(h.t, h.people, logIn(h.t, h.people, "ann"), id, "approve")
		if status != http.StatusOK && status != http.StatusConflict && status != 0 && status != http.StatusServiceUnavailable {
			h.t.Fatalf("%s: deciding: %d %s", c.name, status, body)
		}
		return status == http.StatusOK || status == http.StatusConflict
	}
	if c.proxy == "" && c.victim == "recorder" {
		restart()
	}
	eventually(h.t, "a person decides", decided)
	if c.proxy == "" && c.victim == "broker" {
		restart()
	}
	if c.proxy != "" && !early {
		h.armed.Store(a)
		h.askPeople(step)
		restart()
	}
	until("the approved credential is handed over", func(status int, body string) bool {
		if status == http.StatusConflict || status == http.StatusForbidden {
			h.t.Fatalf("%s: %d %s", c.name, status, body)
		}
		return status == http.StatusCreated
	})
}

// askPeople asks for what people decide, under the step's own key, and keeps
// what it gets.
func (h *house) askPeople(step string) (int, string) {
	body, _ := json.Marshal(map[string]string{"run": "crash", "scope": "vault:demo-write", "ttl": "2m", "reason": "in a test"})
	req, err := http.NewRequest("POST", h.broker.url+"/steps/"+step+"/credential", bytes.NewReader(body))
	if err != nil {
		h.t.Error(err)
		return 0, ""
	}
	req.Header.Set("Authorization", "Bearer "+h.caller)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", "key-"+step)
	req.Header.Set("Prefer", "wait=1")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	if res.StatusCode == http.StatusCreated {
		got := received{step: step, key: "key-" + step}
		if err := json.Unmarshal(b, &got); err != nil {
			h.t.Errorf("%s: %v", b, err)
		}
		h.mu.Lock()
		h.received = append(h.received, got)
		h.mu.Unlock()
	}
	return res.StatusCode, string(b)
}
