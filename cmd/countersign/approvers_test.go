package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

func TestFiftyApproversAtOneInstantMakeOneGrantThatIsMintedOnce(t *testing.T) {
	h := newHouse(t)
	ask := func(wait string) (int, string) {
		req, err := http.NewRequest("POST", h.broker.url+"/steps/crowd/credential", strings.NewReader(`{"run":"run-1","scope":"vault:demo-admin","reason":"in a test"}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+h.caller)
		req.Header.Set("Prefer", "wait="+wait)
		var body json.RawMessage
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		defer res.Body.Close()
		_ = json.NewDecoder(res.Body).Decode(&body)
		return res.StatusCode, string(body)
	}
	status, body := ask("0")
	var pending struct{ Approval struct{ ID string } }
	if status != http.StatusAccepted || json.Unmarshal([]byte(body), &pending) != nil {
		t.Fatalf("%d %s", status, body)
	}
	tokens := make([]string, manyApprovers)
	for i := range tokens {
		tokens[i] = logIn(t, h.people, fmt.Sprintf("dba-%d", i))
	}
	// Ten calls wait for the credential, and fifty people decide at once.
	var mu sync.Mutex
	got := map[int]int{}
	var waiting, deciding sync.WaitGroup
	for range 10 {
		waiting.Go(func() {
			status, _ := ask("30")
			mu.Lock()
			defer mu.Unlock()
			got[status]++
		})
	}
	said := map[int]int{}
	start := make(chan struct{})
	for _, token := range tokens {
		deciding.Go(func() {
			<-start
			status, _, _ := decide(t, h.people, token, pending.Approval.ID, "approve")
			mu.Lock()
			defer mu.Unlock()
			said[status]++
		})
	}
	close(start)
	deciding.Wait()
	waiting.Wait()
	if said[http.StatusOK] != 2 || said[http.StatusConflict] != manyApprovers-2 {
		t.Errorf("the approvers were answered %v", said)
	}
	if got[http.StatusCreated] != 1 || got[http.StatusCreated]+got[http.StatusConflict]+got[http.StatusAccepted] != 10 {
		t.Errorf("the callers were answered %v", got)
	}
	count := map[store.Type]int{}
	for _, e := range h.history() {
		count[e.Type]++
	}
	if count[store.ApprovalDecided] != 2 || count[store.CredentialIssuing] != 1 || count[store.CredentialIssued] != 1 {
		t.Errorf("on record: %v", count)
	}
	h.verify()
}
