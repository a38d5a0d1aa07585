//go:build slow

package review

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// million is how many entries TestAMillionEntriesAreShownAtOnce fills in.
const million = 1_000_000

// fillMillion appends the runs of several orchestrators, five steps each, of
// which some are denied.
func (w *world) fillMillion() {
	people := []string{"user:alice", "user:bob", "user:carol"}
	started := time.Now()
	var batch []*store.Submission
	flush := func() {
		if len(batch) > 0 {
			w.append(recorder, batch...)
			batch = batch[:0]
		}
	}
	for i := 0; w.ledger.Size() < million; i++ {
		f := w.flow(fmt.Sprintf("run-%d", i/5), []string{"load", "reconcile", "write", "report", "notify"}[i%5], fmt.Sprintf("scope-%d:read", i%23), fmt.Sprintf("postgres://orders-%d", i%7))
		f.orchestrator = fmt.Sprintf("orchestrator-%d", i%6)
		end := store.At(w.clock().Add(5 * time.Minute))
		switch {
		case i%50 == 7:
			batch = append(batch, f.asked(store.Deny, "the change window is closed"))
		default:
			intent := f.entry(store.CredentialIssuing, store.Allow, store.IssuingDetails{Attempt: 1, Grant: f.grant.Digest(), NotPast: end})
			batch = append(batch, f.asked(store.Allow), intent,
				f.entry(store.CredentialIssued, store.Allow, store.IssuedDetails{Intent: intent.ID, Attempt: 1, Kind: "database", Revocable: true, Accessor: "acc", Expires: end}))
			for range 2 {
				batch = append(batch, f.entry(store.CredentialUsed, store.Allow, store.UsedDetails{Intent: intent.ID, Via: "introspection", By: "orders-api", Use: "SELECT"}))
			}
			batch = append(batch, f.entry(store.CredentialRevoked, store.Allow, store.ClosedDetails{Intent: intent.ID, Attempt: 1}))
		}
		if i%40 == 11 {
			a := f.entry(store.AlertRaised, store.Deny, map[string]string{})
			a.Person, a.Decision = store.Ptr(key.Pseudonym(people[i%3])), nil
			batch = append(batch, a)
		}
		if len(batch) > 1000 {
			flush()
			w.advance(time.Hour / 2)
			if w.ledger.Size()%100_000 < 1000 {
				w.t.Logf("%d entries after %s", w.ledger.Size(), time.Since(started).Round(time.Second))
			}
		}
	}
	flush()
}

func TestAMillionEntriesAreShownAtOnce(t *testing.T) {
	w := newWorld(t)
	w.fillMillion()
	size := w.ledger.Size()
	mid := noon.Add(w.clock().Sub(noon) / 2).Format(time.RFC3339)
	filters := []string{"", "run=run-20000", "step=write", "orchestrator=orchestrator-3", "scope=scope-11%3Aread", "target=postgres%3A%2F%2Forders-2", "person=user%3Aalice",
		"type=credential.used", "type=credential.issued", "outcome=allow", "outcome=deny", "outcome=needs-approval", "request=req_000777", "from=" + mid, "to=" + mid,
		"orchestrator=orchestrator-3&type=credential.used", "step=write&scope=scope-11%3Aread&outcome=allow", "orchestrator=orchestrator-1&outcome=deny&from=" + mid,
		"run=none", "scope=scope-1%3Aread&target=postgres%3A%2F%2Forders-1&step=load&type=step.requested", "type=freeze.set&outcome=allow", fmt.Sprintf("before=%d&type=alert.raised", size/2)}
	measure := func(accept, path string) (time.Duration, string) {
		started := time.Now()
		resp, body := w.get(auth.Reviewer, accept, path)
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", path, resp.Status)
		}
		return time.Since(started), body
	}
	w.server.index = ledger.NewIndex(w.ledger) // one that has read nothing yet
	started := time.Now()
	for _, f := range filters {
		took, body := measure("text/html", "/history?"+f)
		t.Logf("first %-90s %8s counting %t", f, took.Round(100*time.Microsecond), strings.Contains(body, "Counting…"))
	}
	for _, f := range filters {
		for waits := 0; ; waits++ {
			if _, body := measure("text/html", "/history?"+f); !strings.Contains(body, "Counting…") {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	t.Logf("all of them counted %s after the start", time.Since(started).Round(10*time.Millisecond))
	for _, f := range filters {
		for _, accept := range []string{"text/html", "application/json"} {
			q := "/history?" + f
			if accept == "application/json" {
				q += "&limit=50"
			}
			var took []time.Duration
			for range 21 {
				d, _ := measure(accept, q)
				took = append(took, d)
			}
			slices.Sort(took)
			t.Logf("p50 %-90s %-17s %8s, worst %8s", f, accept, took[10].Round(100*time.Microsecond), took[20].Round(100*time.Microsecond))
			if limit := 50 * time.Millisecond; took[10] > limit {
				t.Errorf("%s as %s: p50 %s, at most %s", f, accept, took[10], limit)
			}
		}
	}
	f := w.flow("run-20000", "write", "", "")
	for _, path := range []string{storyURL(f.run, f.step), personURL("user:alice"), entryURL(size / 2)} {
		took, _ := measure("text/html", path)
		t.Logf("once %-90s %8s", path, took.Round(100*time.Microsecond))
	}
}
