package steps_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store"
)

// under starts a world whose callers are under l, in a Redis that was rebuilt
// long ago.
func under(t *testing.T, l broker.Limits) *world {
	w := newWorld(t, func(c *broker.Config) { c.Limits = l })
	c := redis.NewClient(&redis.Options{Addr: w.redis.Addr()})
	defer func() { _ = c.Close() }()
	ok(t, c.Set(t.Context(), "countersign:generation", "1", 0).Err())
	return w
}

func TestEveryAnswerSaysWhatIsLeftOfTheRatesAndAFloodIsFolded(t *testing.T) {
	w := under(t, broker.Limits{Each: broker.Limit{Rate: 6, Burst: 3, Per: time.Hour}, EachScope: broker.Limit{Rate: 2, Per: 30 * time.Minute}})
	body := `{"run":"run-1","scope":"identity:step"}`
	for _, c := range []struct {
		body, policy, left string
		status             int
	}{
		{`{`, `"orchestrator";q=3;w=1800`, `"orchestrator";r=2;t=600`, 400},
		{body, `"scope";q=2;w=1800, "orchestrator";q=3;w=1800`, `"scope";r=1;t=900, "orchestrator";r=1;t=1200`, 201},
		{`{"run":"run-1","scope":"none:such"}`, `"orchestrator";q=3;w=1800`, `"orchestrator";r=0;t=1800`, 422},
	} {
		a := w.call("demo", "POST", "/steps/step-1/credential", c.body)
		if a.status != c.status || a.header.Get("RateLimit-Policy") != c.policy || a.header.Get("RateLimit") != c.left {
			t.Fatalf("%s: %d, RateLimit-Policy: %s, RateLimit: %s", c.body, a.status, a.header.Get("RateLimit-Policy"), a.header.Get("RateLimit"))
		}
	}
	before := len(w.types())
	for range 120 {
		a := w.call("demo", "POST", "/steps/step-1/credential", `{`)
		a.want(t, http.StatusTooManyRequests, "rate-limited")
		if a.header.Get("Retry-After") == "" || !strings.HasPrefix(a.header.Get("RateLimit"), `"orchestrator";r=0;t=`) || a.body["limit"] != "orchestrator.rate" {
			t.Fatalf("%v %s", a.header, a.raw)
		}
	}
	a := w.call("other", "POST", "/steps/step-1/credential", body)
	if a.status != 201 || a.header.Get("RateLimit") != `"scope";r=1;t=900, "orchestrator";r=2;t=600` {
		t.Errorf("another caller: %d, RateLimit: %s", a.status, a.header.Get("RateLimit"))
	}
	// All 120 are on record, in far fewer entries.
	folded := func() (refused, entries int) {
		for s, err := range w.ledger.Entries(t.Context(), int64(before), w.ledger.Size()) {
			ok(t, err)
			e, err := store.ParseLeaf(s.Leaf)
			ok(t, err)
			if e.Type != store.AccessRefused {
				continue
			}
			d, err := store.DetailsAs[store.RefusedDetails](e)
			ok(t, err)
			if d.Problem != "rate-limited" || e.Orchestrator != "demo" || d.Route != "/steps/{step}/credential" {
				t.Fatalf("%+v %+v", e, d)
			}
			refused, entries = refused+1+d.Folded, entries+1
		}
		return
	}
	w.until("all are on record", func() bool { n, _ := folded(); return n == 120 })
	if _, entries := folded(); entries > 60 {
		t.Errorf("120 refused calls made %d entries", entries)
	}
}

func TestNoPlaceIsAnAnswerOfItsOwn(t *testing.T) {
	w := under(t, broker.Limits{Each: broker.Limit{Live: 1, Pending: 1}})
	for scope, what := range map[string]string{"vault:demo-read": "live", "vault:demo-write": "pending"} {
		for i := range 3 {
			a := w.call("demo", "POST", fmt.Sprintf("/steps/step-%d/credential", i), `{"run":"run-1","reason":"because","scope":"`+scope+`"}`)
			if i == 0 {
				if a.status != 201 && a.status != 202 {
					t.Fatalf("%s: %d %s", scope, a.status, a.raw)
				}
				continue
			}
			a.want(t, http.StatusTooManyRequests, "rate-limited")
			detail, _ := a.body["detail"].(string)
			if a.body["limit"] != "orchestrator."+what || !strings.Contains(detail, "may have 1 ") || a.header.Get("Retry-After") == "" || a.header.Get("RateLimit") != "" {
				t.Errorf("%s: %s %v", scope, a.raw, a.header)
			}
		}
	}
}
