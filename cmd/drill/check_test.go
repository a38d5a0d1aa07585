package main

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
)

// recorded makes a record of entries, as the recorder would have stamped them.
func recorded(t *testing.T, entries ...*store.Entry) *record {
	t.Helper()
	r := &record{}
	for _, e := range entries {
		if e.ID == "" {
			e.ID = store.NewID()
		}
		leaf, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		r.entries, r.leaves = append(r.entries, e), append(r.leaves, leaf)
	}
	return r
}

func entry(typ store.Type, details any) *store.Entry {
	e := &store.Entry{Type: typ, Request: "req_1", Step: "step-1", Run: "run-1", Orchestrator: "ci", Action: "vault:demo-read"}
	e.SetDetails(details)
	return e
}

// told is what a caller was told of entry i of r.
func told(r *record, i int64) *issued {
	c := &issued{window: &window{}, orchestrator: "ci", run: "run-1", step: "step-1", Credential: &client.Credential{Request: "req_1", Scope: "vault:demo-read"}}
	hash := store.LeafHash(r.leaves[i])
	c.Ledger = client.Place{Index: i, LeafHash: base64.StdEncoding.EncodeToString(hash[:])}
	return c
}

func TestWhatWasLostOrDoubledIsFound(t *testing.T) {
	gave := func(intent, accessor string) *store.Entry {
		return entry(store.CredentialIssued, store.IssuedDetails{Intent: intent, Accessor: accessor, Revocable: true})
	}
	revoked := func(intent string) *store.Entry {
		return entry(store.CredentialRevoked, store.ClosedDetails{Intent: intent})
	}
	used := func() *store.Entry {
		return entry(store.CredentialUsed, store.UsedDetails{Intent: "a", Via: store.ViaGateway})
	}
	for name, x := range map[string]struct {
		entries       []*store.Entry
		change        func(*issued)
		twice         bool
		lost, doubled int
		finding       string
	}{
		"all well":                   {entries: []*store.Entry{gave("a", "1"), revoked("a"), gave("b", "2")}},
		"an entry that is not there": {entries: []*store.Entry{gave("a", "1")}, change: func(c *issued) { c.Ledger.Index = 9 }, lost: 1, finding: "is not on record"},
		"another's entry":            {entries: []*store.Entry{gave("a", "1")}, change: func(c *issued) { c.step = "step-2" }, lost: 1, finding: "is not what its answer says"},
		"another leaf":               {entries: []*store.Entry{gave("a", "1")}, change: func(c *issued) { c.Ledger.LeafHash = "" }, lost: 1, finding: "is not what its answer says"},
		"one entry for two answers":  {entries: []*store.Entry{gave("a", "1")}, twice: true, doubled: 1, finding: "both answered"},
		"one intent issued twice":    {entries: []*store.Entry{gave("a", "1"), revoked("a"), gave("a", "2")}, finding: "an intent is issued"},
		"two live at once":           {entries: []*store.Entry{gave("a", "1"), gave("b", "2")}, finding: "two live credentials"},
		"a use that is not there": {entries: []*store.Entry{gave("a", "1"), used()}, change: func(c *issued) { c.secret.Kind, c.sent, c.answered = "gateway", 2, 2 },
			lost: 1, finding: "2 uses were answered, and 1 are on record"},
		"a use too many": {entries: []*store.Entry{gave("a", "1"), used(), used()}, change: func(c *issued) { c.secret.Kind, c.sent, c.answered = "gateway", 1, 1 },
			doubled: 1, finding: "1 uses were made, and 2 are on record"},
		"an alert": {entries: []*store.Entry{gave("a", "1"), entry(store.AlertRaised, store.AlertDetails{Alert: store.AlertMint})}, finding: "is an alert"},
	} {
		t.Run(name, func(t *testing.T) {
			r := recorded(t, x.entries...)
			c := told(r, 0)
			if x.change != nil {
				x.change(c)
			}
			d := &drill{load: &load{issued: []*issued{c}}, record: r}
			if x.twice {
				d.load.issued = append(d.load.issued, c)
			}
			d.checkIssued()
			if c.window.lost != x.lost || c.window.doubled != x.doubled {
				t.Errorf("lost %d, doubled %d", c.window.lost, c.window.doubled)
			}
			if x.finding == "" && len(d.findings) > 0 || x.finding != "" && !slices.ContainsFunc(d.findings, func(f string) bool { return strings.Contains(f, x.finding) }) {
				t.Errorf("found %q", d.findings)
			}
		})
	}
}

func TestWhatLivesTooLongOrTwiceIsFound(t *testing.T) {
	now := time.Now()
	r := recorded(t, entry(store.CredentialIssued, store.IssuedDetails{Intent: "a", Accessor: "1"}), entry(store.CredentialIssued, store.IssuedDetails{Intent: "b", Accessor: "2"}))
	lived := func(d time.Duration) *life { return &life{request: "req_1", first: now, last: now.Add(d)} }
	for name, x := range map[string]struct {
		eye     *eye
		finding string
	}{
		"in time":           {&eye{tokens: map[string]*life{"1": lived(askTTL + late)}}, ""},
		"a token too long":  {&eye{tokens: map[string]*life{"1": lived(askTTL + late + time.Second)}}, "a token was alive for"},
		"a role too long":   {&eye{roles: map[string]*life{"v-1": lived(askTTL + late + time.Second)}}, "the database role v-1 was alive for"},
		"two at once":       {&eye{tokens: map[string]*life{"1": lived(0), "2": lived(0)}, together: [][]string{{"1", "2"}}}, "2 live credentials at once"},
		"one nobody holds":  {&eye{tokens: map[string]*life{"1": lived(0), "3": lived(0)}, together: [][]string{{"1", "3"}}}, ""},
		"an operator's own": {&eye{tokens: map[string]*life{"9": {first: now, last: now.Add(time.Hour)}}}, ""},
	} {
		d := &drill{record: r, eye: x.eye}
		d.checkLives()
		if got := strings.Join(d.findings, "; "); (x.finding == "") != (got == "") || !strings.Contains(got, x.finding) {
			t.Errorf("%s: found %q", name, got)
		}
	}
}
