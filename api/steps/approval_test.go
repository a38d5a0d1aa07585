package steps_test

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

const demoWrite = `{"run":"run-1","scope":"vault:demo-write","reason":"OPS-1"}`

// pending asks and expects that people are to decide.
func (w *world) pending(body string) (request string, approval map[string]any) {
	w.t.Helper()
	a := w.call("demo", "POST", "/steps/s1/credential", body).want(w.t, 202, "")
	request, _ = a.body["request"].(string)
	approval, _ = a.body["approval"].(map[string]any)
	if a.body["status"] != "pending_approval" || approval == nil || a.header.Get("Location") != "/requests/"+request || a.header.Get("Retry-After") == "" {
		w.t.Fatalf("%v %s", a.header, a.raw)
	}
	return request, approval
}

func TestASensitiveStepIsToldWhomItWaitsForAndGetsItsCredentialOnceTheyApprove(t *testing.T) {
	w := newWorld(t)
	id, approval := w.pending(demoWrite)
	apr, _ := approval["id"].(string)
	if !strings.HasPrefix(apr, "apr_") || approval["url"] != "https://people.test/approvals/"+apr {
		t.Fatalf("%v", approval)
	}
	if again, _ := w.pending(demoWrite); again != id {
		t.Fatal("asked twice")
	}
	g := w.call("demo", "GET", "/requests/"+id, "").want(t, 200, "")
	if g.body["status"] != "pending_approval" || !bytes.Contains(g.raw, []byte(`"needs":[{"group":"dba","count":1,"approved":0}]`)) {
		t.Fatalf("%s", g.raw)
	}
	w.call("other", "GET", "/requests/"+id, "").want(t, 404, "not-found")
	waiting := make(chan *answer)
	go func() {
		a, err := w.try(context.Background(), "demo", "POST", "/steps/s1/credential", demoWrite, "Prefer", "wait=15")
		if err != nil {
			t.Error(err)
		}
		waiting <- a
	}()
	w.decide(id, "alice", store.Approve)
	a := <-waiting
	if a == nil {
		t.FailNow()
	}
	a.want(t, 201, "")
	used, _ := a.body["approval"].(map[string]any)
	if used == nil || used["id"] != apr || used["request"] != id || used["decided_by"] != 1.0 || a.body["request"] != id || bytes.Contains(a.raw, []byte("alice")) {
		t.Fatalf("%v", used)
	}
	if next, _ := w.pending(demoWrite); next == id {
		t.Fatal("an approval is used twice")
	}
}

func TestARequestThatPeopleEndHasItsProblem(t *testing.T) {
	for slug, end := range map[string]func(w *world, id string){
		"approval-denied": func(w *world, id string) { w.decide(id, "alice", store.Refuse) },
		"approval-expired": func(w *world, id string) {
			time.Sleep(time.Second) // what the catalogue below gives people
			w.recorded(store.ApprovalExpired, id, "", func(_ string, d store.ApprovalRequestedDetails) any {
				return store.ExpiredDetails{Approval: d.Approval}
			})
		},
		"request-changed": func(w *world, id string) {
			w.decide(id, "alice", store.Approve)
			w.inForce("default_ttl: 5m", "default_ttl: 6m")
		},
	} {
		t.Run(slug, func(t *testing.T) {
			w := newWorld(t)
			if slug == "approval-expired" {
				w.inForce("reasons: {requester: true, approver: true}", "expires: 1s")
			}
			id, _ := w.pending(demoWrite)
			end(w, id)
			a := w.call("demo", "POST", "/steps/s1/credential", demoWrite).want(t, 403, slug)
			if a.body["request"] != id {
				t.Fatalf("%s", a.raw)
			}
			g := w.call("demo", "GET", "/requests/"+id, "").want(t, 200, "")
			if s := g.body["status"]; s != map[string]string{"approval-denied": "denied", "approval-expired": "expired", "request-changed": "void"}[slug] || g.body["approval"] != nil {
				t.Fatalf("%s", g.raw)
			}
			if next, _ := w.pending(demoWrite); next == id {
				t.Fatal("a request that ended is joined")
			}
		})
	}
}

func TestAPendingRequestIsTakenBack(t *testing.T) {
	w := newWorld(t)
	id, _ := w.pending(demoWrite)
	w.call("other", "DELETE", "/requests/"+id, "").want(t, 404, "not-found")
	if a := w.call("demo", "DELETE", "/requests/"+id, "").want(t, 200, ""); a.body["status"] != "withdrawn" {
		t.Fatalf("%s", a.raw)
	}
	w.call("demo", "DELETE", "/requests/"+id, "").want(t, 409, "request-closed")
	if next, _ := w.pending(demoWrite); next == id {
		t.Fatal("a request that was taken back is joined")
	}
}

func TestTheOwnersOfAnOrchestratorAreNamedToTheRecorder(t *testing.T) {
	w := newWorld(t)
	id, _ := w.pending(demoWrite)
	var excluded []string
	w.recorded(store.ApprovalDecided, id, "alice", func(leaf string, d store.ApprovalRequestedDetails) any {
		excluded = d.Excluded
		return store.DecidedDetails{Approval: d.Approval, Requested: leaf, Decision: store.Approve, Groups: []string{"dba"}, Via: "page"}
	})
	if len(excluded) != 1 || excluded[0] != store.PrivacyKey(key).Pseudonym("user:owner") {
		t.Fatalf("excluded: %v", excluded)
	}
}
