package client_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// published waits until the checkpoint of n entries is out.
func published(t *testing.T, r *recorder, v *client.Reviewer, n int64) torchwood.Checkpoint {
	t.Helper()
	for {
		cp, err := v.Checkpoint(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c, err := r.log.Checkpoint(cp)
		if err != nil {
			t.Fatal(err)
		}
		if c.N >= n {
			return c
		}
		time.Sleep(5 * time.Millisecond) // until the ledger's next publication
	}
}

func TestOtherPeoplesClientVerifiesTheServedLog(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{})
	const n = 600 // two full tiles and a partial one
	for i := 0; i < n; i += 100 {
		subs := make([]*store.Submission, 100)
		for j := range subs {
			subs[j] = alert(fmt.Sprint(i + j))
		}
		if _, err := w.Append(ctx, subs...); err != nil {
			t.Fatal(err)
		}
	}
	v := r.reviewer(t, r.serve(t))
	c := published(t, r, v, n)
	tiles, err := v.Tiles()
	if err != nil {
		t.Fatal(err)
	}
	tw, err := torchwood.NewClient(tiles)
	if err != nil {
		t.Fatal(err)
	}
	seen := int64(0)
	for i, leaf := range tw.AllEntries(ctx, c.Tree, 0) {
		e, err := store.ParseLeaf(leaf)
		if err != nil || i != seen || e.Type != store.AlertRaised || !bytes.Contains(leaf, []byte(fmt.Sprintf(`"%d"`, i))) {
			t.Fatalf("entry %d: %s %v", i, leaf, err)
		}
		seen++
	}
	if err := tw.Err(); err != nil || seen != n {
		t.Fatalf("%d entries, %v", seen, err)
	}
}

func TestHistoryIsFilteredAndPaged(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{})
	req, intent := request("req_1", "j")
	if _, err := w.Append(ctx, alert("a"), req, intent, alert("b"), alert("c")); err != nil {
		t.Fatal(err)
	}
	v := r.reviewer(t, r.serve(t))
	var got []int64
	filters := url.Values{"type": {"alert.raised"}, "limit": {"2"}}
	for {
		p, err := v.History(ctx, filters)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range p.Entries {
			got = append(got, e.Index)
			if e.Opened[store.SealedReason] == "" {
				t.Errorf("entry %d: its reason is not opened", e.Index)
			}
		}
		if p.Next == "" {
			break
		}
		filters.Set("cursor", p.Next)
	}
	if fmt.Sprint(got) != "[0 3 4]" {
		t.Errorf("alerts at %v", got)
	}
	for filter, want := range map[string]int{"run=run-1": 2, "step=step-1": 2, "request=req_1": 2, "orchestrator=demo": 2, "scope=demo:read": 2,
		"target=demo": 2, "outcome=allow": 2, "outcome=deny": 0, "run=other": 0, "from=2000-01-01T00:00:00Z": 5, "to=2000-01-01T00:00:00Z": 0, "": 5} {
		q, _ := url.ParseQuery(filter)
		if p, err := v.History(ctx, q); err != nil || len(p.Entries) != want {
			t.Errorf("%s: %+v %v", filter, p, err)
		}
	}
	for _, bad := range []string{"limit=0", "limit=-1", "limit=x", "from=yesterday", "rnu=x", "run=../x", "run=a&run=b", "type=nothing", "outcome=x", "cursor=zzz%00", "cursor=garbage"} {
		q, _ := url.ParseQuery(bad)
		if _, err := v.History(ctx, q); !errors.Is(err, problem.Malformed("")) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestTilesBeyondThePublishedLogAreNotServed(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{})
	subs := make([]*store.Submission, 300)
	for i := range subs {
		subs[i] = alert("x")
	}
	if _, err := w.Append(ctx, subs...); err != nil {
		t.Fatal(err)
	}
	base := r.serve(t)
	published(t, r, r.reviewer(t, base), 300)
	for path, want := range map[string]int{
		"/tile/0/000": 200, "/tile/0/001.p/44": 200, "/tile/1/000.p/1": 200, "/tile/entries/000": 200, "/tile/entries/001.p/44": 200, "/tile/0/000.p/7": 200,
		"/tile/0/001": 404, "/tile/0/001.p/45": 404, "/tile/0/002.p/1": 404, "/tile/1/000": 404, "/tile/2/000.p/1": 404, "/tile/63/000": 404, "/tile/7/000.p/1": 404,
		"/tile/0/000.p/256": 404, "/tile/0/000.p/0": 404, "/tile/0/-01": 404, "/tile/0/x001/000": 404, "/tile/data/000": 404, "/tile/8/0/000": 404,
		"/tile/entries/../0/000": 404, "/tile/0/%2e%2e/000": 404, "/tile/entries/x999/x999/x999/x999/x999/x999/x999/999": 404, "/tile/0/0": 404, "/tile/0": 404, "/tile/": 404,
	} {
		q, _ := http.NewRequest("GET", base+path, nil)
		q.Header.Set("Authorization", "Bearer "+r.tokens[auth.Reviewer])
		resp, err := http.DefaultTransport.RoundTrip(q)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
		cc := resp.Header.Get("Cache-Control")
		if immutable := strings.Contains(cc, "immutable"); immutable != (want == 200) || strings.Contains(cc, "public") && strings.Contains(path, "entries") {
			t.Errorf("%s: Cache-Control %q", path, cc)
		}
	}
}

func TestEveryRouteIsForItsRoleAloneAndRefusalsAreOnRecord(t *testing.T) {
	r := newRecorder(t)
	if _, err := r.writer(t, client.RecorderConfig{}).Append(ctx, alert("x")); err != nil {
		t.Fatal(err)
	}
	base := r.serve(t)
	published(t, r, r.reviewer(t, base), 1)
	anyone := map[string]bool{"/checkpoint": true, "/tile/{level:[0-9]+}/*": true}
	allowed := map[string]auth.Role{"/append": auth.Writer, "/open": auth.Writer, "/follow": auth.Writer, "/consistency": auth.Writer,
		"/history": auth.Reviewer, "/history/{index:[0-9]+}": auth.Reviewer, "/history/steps/{run}/{step}": auth.Reviewer, "/history/people/{person}": auth.Reviewer,
		"/history/credentials/{intent}": auth.Reviewer, "/history/static/{file}": auth.Reviewer, "/tile/entries/*": auth.Reviewer}
	before, refused := r.ledger.Size(), int64(0)
	err := chi.Walk(r.handler, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if anyone[route] {
			return nil
		}
		want, ok := allowed[route]
		if !ok {
			t.Errorf("route %s %s is in no table", method, route)
			return nil
		}
		path := strings.NewReplacer("*", "000.p/1", "{index:[0-9]+}", "0", "{run}", "r", "{step}", "s", "{person}", "p-a", "{intent}", store.NewID(), "{file}", "page.css").Replace(route)
		for role, token := range r.tokens {
			if role == want {
				continue
			}
			if code := get(t, method, base+path, token); code != http.StatusForbidden {
				t.Errorf("%s %s as %s: %d", method, path, role, code)
			}
			refused++
		}
		for _, token := range []string{"", "cs_writer_AAAA", r.tokens[want] + "A"} {
			if code := get(t, method, base+path, token); code != http.StatusUnauthorized {
				t.Errorf("%s %s with %q: %d", method, path, token, code)
			}
			refused++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path := range map[string]bool{"/checkpoint": true, "/tile/0/000.p/1": true} {
		if code := get(t, "GET", base+path, ""); code != 200 {
			t.Errorf("%s: %d", path, code)
		}
	}
	total := 0
	for deadline := time.Now().Add(5 * time.Second); int64(total) < refused && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		total = 0
		p, err := r.reviewer(t, base).History(ctx, url.Values{"type": {"access.refused"}})
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range p.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err != nil {
				t.Fatal(err)
			}
			d, err := store.DetailsAs[store.RefusedDetails](e)
			if err != nil || e.Writer != "recorder" {
				t.Fatalf("%s %v", h.Entry, err)
			}
			total += 1 + d.Folded
		}
	}
	if int64(total) != refused {
		t.Errorf("%d refusals on record, %d made (%d entries before)", total, refused, before)
	}
}

func get(t *testing.T, method, url, token string) int {
	t.Helper()
	q, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		q.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultTransport.RoundTrip(q)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestAnAppendThatIsNoNDJSONOfEntriesLeavesNothing(t *testing.T) {
	r := newRecorder(t)
	base := r.serve(t)
	line := func() string {
		b, err := alert("x").Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return string(b) + "\n"
	}
	one := line()
	for name, c := range map[string]struct {
		body string
		slug string
	}{
		"empty":             {"", problem.SlugMalformed},
		"newline":           {"\n", problem.SlugMalformed},
		"garbage":           {"garbage\n", problem.SlugMalformed},
		"a good one first":  {line() + "garbage\n", problem.SlugMalformed},
		"truncated":         {line() + one[:len(one)/2], problem.SlugMalformed},
		"two on one line":   {strings.TrimSuffix(one, "\n") + line(), problem.SlugMalformed},
		"an empty line":     {line() + "\n" + line(), problem.SlugMalformed},
		"an array":          {"[" + strings.TrimSuffix(one, "\n") + "]\n", problem.SlugMalformed},
		"unknown member":    {strings.Replace(one, `"v":1`, `"v":1,"x":1`, 1), problem.SlugMalformed},
		"duplicate member":  {strings.Replace(one, `"v":1`, `"v":1,"v":1`, 1), problem.SlugMalformed},
		"a NUL":             {strings.Replace(one, `because`, `\u0000`, 1), problem.SlugMalformed},
		"a stamp":           {strings.Replace(one, `"writer":""`, `"writer":"other"`, 1), problem.SlugMalformed},
		"a line too long":   {strings.Replace(one, `"text":"x"`, `"text":"`+strings.Repeat("x", 70000)+`"`, 1), problem.SlugMalformed},
		"a body too large":  {strings.Repeat(" ", 4<<20) + one, problem.SlugBodyTooLarge},
		"too many entries":  {strings.Repeat("{}\n", 1001), problem.SlugMalformed},
		"one id, two lines": {one + strings.Replace(one, `"action":"test"`, `"action":"tset"`, 1), problem.SlugIdempotencyConflict},
	} {
		q, _ := http.NewRequest("POST", base+"/append", strings.NewReader(c.body))
		q.Header.Set("Authorization", "Bearer "+r.tokens[auth.Writer])
		resp, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if p := problem.Read(resp.StatusCode, resp.Header.Get("Content-Type"), b); p.Slug() != c.slug {
			t.Errorf("%s: %s", name, b)
		}
	}
	if n := r.ledger.Size(); n != 0 {
		t.Errorf("%d entries were taken", n)
	}
}

func TestAWriterIsAnnouncedOnce(t *testing.T) {
	r := newRecorder(t)
	ws := []auth.Principal{{Name: "b1", Role: auth.Writer, Method: "token"}, {Name: "b2", Role: auth.Writer, Method: "mtls"}, {Name: "rev", Role: auth.Reviewer}}
	for range 2 {
		if err := announce(r, ws); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.ledger.Size(); n != 2 {
		t.Fatalf("%d entries", n)
	}
	if err := announce(r, []auth.Principal{{Name: "recorder", Role: auth.Reviewer}, {Name: "recorder", Role: auth.Writer, Method: "token"}}); err == nil || r.ledger.Size() != 2 {
		t.Fatalf("a writer by the recorder's name: %v", err)
	}
}
