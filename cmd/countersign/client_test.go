package main

import (
	"encoding/csv"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/api/client"
)

// cli runs countersign against r as the holder of token, and returns exit
// status, stdout and stderr.
func (r *running) cli(token string, args ...string) (int, string, string) {
	r.t.Helper()
	cmd := exec.Command("countersign", args...)
	cmd.Env = append(os.Environ(), "COUNTERSIGN_ADDR="+r.API, "COUNTERSIGN_RECORDER="+r.Recorder, "COUNTERSIGN_TOKEN="+token)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		r.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

func TestTheClientCommandsSayWhatHappenedAndWhatToDo(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	caller, reviewer := r.Orchestrators[0].Token, r.Reviewers[0].Token

	code, out, stderr := r.cli(caller, "request", "--scope", "identity:step", "--run", "r1", "--step", "s1", "--reason", "it's due")
	var got client.Credential
	if err := json.Unmarshal([]byte(out), &got); code != 0 || err != nil || got.Request == "" || !strings.Contains(out, `"receipt":"c2sp.org/tlog-proof@v1`) {
		t.Fatalf("request: %d %v %s %s", code, err, out, stderr)
	}

	// What -o env prints, a shell takes back unchanged.
	env, err := exec.Command("sh", "-c", `eval "$0"; printf '%s %s' "$COUNTERSIGN_SCOPE" "$COUNTERSIGN_CREDENTIAL_KIND"`, func() string {
		code, out, stderr := r.cli(caller, "request", "--scope", "identity:step", "--run", "r1", "--step", "s2", "-o", "env")
		if code != 0 {
			t.Fatalf("request -o env: %d %s", code, stderr)
		}
		return out
	}()).Output()
	if err != nil || string(env) != "identity:step identity" {
		t.Errorf("request -o env: %q %v", env, err)
	}

	code, out, _ = r.cli(reviewer, "history", "--run", "r1", "-o", "json")
	var page client.HistoryPage
	if err := json.Unmarshal([]byte(out), &page); code != 0 || err != nil || len(page.Entries) != 6 {
		t.Errorf("history -o json: %d %v %d entries", code, err, len(page.Entries))
	}
	code, out, _ = r.cli(reviewer, "history", "--run", "r1", "--limit", "4", "-o", "csv")
	if rows, err := csv.NewReader(strings.NewReader(out)).ReadAll(); code != 0 || err != nil || len(rows) != 5 || rows[0][0] != "index" {
		t.Errorf("history -o csv: %d %v %d rows", code, err, len(rows))
	}
	if code, out, _ = r.cli(reviewer, "history", "--step", "s1"); code != 0 || !strings.Contains(out, `reason "it's due"`) {
		t.Errorf("history: %d %s", code, out)
	}

	for name, c := range map[string]struct {
		token string
		args  []string
		code  int
		want  string // in the one line on stderr
	}{
		"an unknown scope":               {caller, []string{"request", "--scope", "no:such", "--run", "r", "--step", "s"}, 1, "unknown-scope"},
		"a token of nobody":              {"cs_orchestrator_x", []string{"request", "--scope", "identity:step", "--run", "r", "--step", "s"}, 1, "COUNTERSIGN_TOKEN"},
		"a token of a reviewer":          {reviewer, []string{"revoke", "--run", "r", "--step", "s"}, 1, "role-forbidden"},
		"no token":                       {"", []string{"history"}, 1, "set COUNTERSIGN_TOKEN"},
		"a bad filter":                   {reviewer, []string{"history", "--type", "no.such"}, 1, "type"},
		"a broker that is away":          {caller, []string{"revoke", "--addr", "http://127.0.0.1:1", "--run", "r", "--step", "s"}, 1, "is the broker up, and COUNTERSIGN_ADDR right?"},
		"a flag that is missing":         {caller, []string{"request", "--scope", "identity:step"}, 1, `"run", "step" not set`},
		"a command that is missing":      {caller, []string{"run", "--scope", "identity:step", "--run", "r", "--step", "s"}, 1, "after --"},
		"a command that is none":         {caller, []string{"run", "--scope", "identity:step", "--run", "r", "--step", "s", "--", "no-such-command"}, 127, "no-such-command"},
		"verify without a key":           {reviewer, []string{"verify"}, exitUnchecked, "--key"},
		"verify of nothing":              {reviewer, []string{"verify", "http://127.0.0.1:1", "--key", r.LogKey}, exitUnchecked, "could not be checked"},
		"verify with a key that is none": {reviewer, []string{"verify", "--key", "a+b+c"}, exitUnchecked, "key"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := r.cli(c.token, c.args...)
			if code != c.code || !strings.Contains(stderr, c.want) || !strings.HasPrefix(stderr, "countersign: ") || strings.Count(stderr, "\n") != 1 {
				t.Errorf("exit status %d, want %d and one line with %q: %s", code, c.code, c.want, stderr)
			}
		})
	}
}

func TestVerifyTellsAGoodLogFromAnother(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	reviewer := r.Reviewers[0].Token
	if status, body := r.ask("identity:step", "s1"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	head := filepath.Join(t.TempDir(), "head")
	eventually(t, "the issuance is under a published head", func() bool {
		code, out, stderr := r.cli(reviewer, "verify", "--key", r.LogKey, "--save", head)
		if code != 0 {
			t.Fatalf("verify: %d %s %s", code, out, stderr)
		}
		return !strings.Contains(out, ", 0 entries") && !strings.Contains(out, ", 2 entries")
	})
	if code, out, stderr := r.cli(reviewer, "verify", "--key", r.LogKey, "--since", head); code != 0 || !strings.Contains(out, "continues the earlier checkpoint") {
		t.Errorf("verify --since: %d %s %s", code, out, stderr)
	}
	// Without a reviewer's token the tree is checked from its hashes.
	if code, out, stderr := r.cli("", "verify", "--key", r.LogKey); code != 0 || !strings.Contains(out, "(0 read)") {
		t.Errorf("verify without a token: %d %s %s", code, out, stderr)
	}
	other, err := generateLogKey(devOrigin)
	if err != nil {
		t.Fatal(err)
	}
	vkey, err := logVerifierKey(other)
	if err != nil {
		t.Fatal(err)
	}
	if code, out, stderr := r.cli(reviewer, "verify", "--key", vkey); code != exitProblem || !strings.Contains(out, "problem: checkpoint") {
		t.Errorf("verify with another key: %d %s %s", code, out, stderr)
	}
	var report struct {
		Findings []struct{ Kind string }
	}
	code, out, _ := r.cli(reviewer, "verify", "--key", vkey, "-o", "json")
	if err := json.Unmarshal([]byte(out), &report); code != exitProblem || err != nil || len(report.Findings) == 0 {
		t.Errorf("verify -o json: %d %v %s", code, err, out)
	}
}
