package main

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
)

func TestRespondersStopARunFromTheCommandLineAndOnlyTheOtherLiftsIt(t *testing.T) {
	h := newPlainHouse(t)
	recorder := httptest.NewServer(h.people.handler)
	t.Cleanup(recorder.Close)
	broker := httptest.NewServer(h.machines.handler)
	t.Cleanup(broker.Close)
	t.Setenv("COUNTERSIGN_RECORDER", recorder.URL)
	t.Setenv("COUNTERSIGN_ADDR", broker.URL)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(t.TempDir(), "config"))
	var said bytes.Buffer // on standard error
	revoke := func(who string, args ...string) (string, error) {
		t.Helper()
		t.Setenv("COUNTERSIGN_TOKEN", h.tokens[who])
		var out bytes.Buffer
		c := revokeCommand()
		c.SetArgs(args)
		c.SetOut(&out)
		said.Reset()
		c.SetErr(&said)
		c.SilenceErrors, c.SilenceUsage = true, true
		err := c.ExecuteContext(t.Context())
		return out.String(), err
	}
	ask := func(run string) (int, string) {
		return h.call("serve", "demo", "POST", "/steps/s1/credential", `{"run":"`+run+`","scope":"identity:step"}`)
	}
	if status, body := ask("run-1"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	if out, err := revoke("responder-a", "list"); err != nil || out != "nothing was ever stopped\n" {
		t.Fatalf("%q %v", out, err)
	}
	out, err := revoke("responder-a", "--run", "run-1", "--reason", "OPS-1", "--wait", "-o", "json")
	var v client.Revocation
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || v.State != client.FreezeInForce || v.Run != "run-1" || v.SetBy != "user:responder-a" || v.Irrevocable != 1 || v.Left() != 0 || said.Len() > 0 {
		t.Fatalf("%q %v %q", out, err, &said)
	}
	if status, body := ask("run-1"); status == 201 || len(h.leaves()) == 0 {
		t.Fatalf("under the freeze: %d %s", status, body)
	}
	if status, body := ask("run-2"); status != 201 {
		t.Fatalf("another run: %d %s", status, body)
	}
	if out, err := revoke("responder-b", "list", v.ID); err != nil || !strings.Contains(out, "cannot be called back") || !strings.Contains(out, "run-1/s1") || !strings.Contains(out, "identity") {
		t.Fatalf("%q %v", out, err)
	}
	if out, err := revoke("responder-a", "lift", v.ID, "--reason", "never mind"); err == nil || !strings.Contains(err.Error(), "another responder") {
		t.Fatalf("lifted by who set it: %q %v", out, err)
	}
	for _, who := range []string{"demo", "orders", "approver-a", "reviewer-a", "broker"} {
		if h.tokens[who] == "" {
			t.Fatalf("no token of %s", who)
		}
		if out, err := revoke(who, "--all", "--reason", "mischief"); err == nil {
			t.Errorf("%s stops everything: %s", who, out)
		}
		if out, err := revoke(who, "lift", v.ID, "--reason", "mischief"); err == nil {
			t.Errorf("%s lifts a freeze: %s", who, out)
		}
	}
	if out, err := revoke("responder-b", "lift", v.ID, "--reason", "explained"); err != nil || !strings.Contains(out, "is lifted: run run-1") || !strings.Contains(out, "lifted by user:responder-b: explained") {
		t.Fatalf("%q %v", out, err)
	}
	if status, body := ask("run-1"); status != 201 {
		t.Fatalf("after it was lifted: %d %s", status, body)
	}
	if out, err := revoke("responder-a", "list"); err != nil || strings.Count(out, "\n") != 2 || !strings.Contains(out, "lifted") || !strings.Contains(out, "OPS-1") {
		t.Fatalf("%q %v", out, err)
	}
	// As the orchestrator, the same command ends a step's credentials.
	if out, err := revoke("demo", "--run", "run-2", "--step", "s1"); err != nil || !strings.HasPrefix(out, "revoked 1\n") {
		t.Fatalf("%q %v", out, err)
	}
	for _, args := range [][]string{
		{}, {"--reason", "x"}, {"--run", "r"}, {"--run", "r", "--step", "s"}, {"--all", "--run", "r", "--reason", "x"}, {"--run", "a b", "--reason", "x"},
		{"lift"}, {"lift", v.ID}, {"lift", v.ID, "--reason", "again"}, {"lift", store.NewID(), "--reason", "x"}, {"list", store.NewID()}, {"list", "a", "b"},
	} {
		if out, err := revoke("responder-a", args...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	out, err = revoke("responder-a", "--scope", "identity:setp", "--orchestrator", "demo", "--reason", "OPS-2", "--wait")
	if err != nil || !strings.Contains(out, " is in force: ") || strings.Count(said.String(), "\n") != 2 || !strings.Contains(said.String(), "covers nothing yet") || !strings.Contains(said.String(), "The scope identity:setp is not known") {
		t.Errorf("of a misspelt scope: %q %v %q", out, err, &said)
	}
	set := 0
	for _, leaf := range h.leaves() {
		if e, err := store.ParseLeaf(leaf); err == nil && e.Type == store.FreezeSet {
			set++
		}
	}
	if set != 2 {
		t.Errorf("%d freezes are on record, want 2", set)
	}
}
