package main

import (
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTheSwitchEndsWhatVaultAndPostgreSQLTake stops everything by the recorder's
// API, with a broker as a process of its own, and asks Vault and PostgreSQL.
func TestTheSwitchEndsWhatVaultAndPostgreSQLTake(t *testing.T) {
	h := newHouse(t)
	responder := func(name string) string {
		out, err := countersign(t, "token", "create", "--file", filepath.Join(h.dir, "recorder-tokens"), "--role", "responder", "--name", name).Output()
		must(t, err)
		return strings.TrimSpace(string(out))
	}
	a, b := responder("responder-a"), responder("responder-b")
	call := func(token, method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, h.recorder.url+path, strings.NewReader(body))
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+token)
		res, err := http.DefaultClient.Do(req)
		must(t, err)
		defer res.Body.Close()
		answer, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(answer)
	}
	for _, scope := range []string{"orders-db:read", "vault:demo-read", "identity:step", "pki:service"} {
		if r := h.post("s-"+strings.ReplaceAll(scope, ":", "-"), `{"run":"switch","scope":"`+scope+`"}`, ""); r.status != 201 {
			t.Fatalf("%s: %d %s", scope, r.status, r.body)
		}
	}
	if len(h.roles()) != 1 || len(h.stepTokens()) == 0 {
		t.Fatalf("%d roles, %d tokens before the switch", len(h.roles()), len(h.stepTokens()))
	}
	status, body := call(a, "POST", "/revocations", `{"all":true,"reason":"a leak"}`)
	var freeze struct {
		ID                            string
		Pending, Revoked, Irrevocable int
	}
	if err := json.Unmarshal([]byte(body), &freeze); err != nil || status != 202 || freeze.ID == "" {
		t.Fatalf("%d %s", status, body)
	}
	began := time.Now()
	eventually(t, "Vault and PostgreSQL take nothing of it", func() bool { return len(h.roles()) == 0 && len(h.stepTokens()) == 0 })
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	eventually(t, "it is on record, and the certificate and the identity token are listed", func() bool {
		_, body := call(a, "GET", "/revocations/"+freeze.ID, "")
		must(t, json.Unmarshal([]byte(body), &freeze))
		return freeze.Pending == 0 && freeze.Revoked == 2 && freeze.Irrevocable == 2
	})
	if r := h.post("new", `{"run":"switch","scope":"vault:demo-read"}`, ""); r.status != 403 || !strings.Contains(r.body, "problems/frozen") {
		t.Errorf("under the freeze: %d %s", r.status, r.body)
	}
	if status, body := call(a, "DELETE", "/revocations/"+freeze.ID+"?reason=over", ""); status != 403 {
		t.Errorf("lifted by who set it: %d %s", status, body)
	}
	if status, body := call(b, "DELETE", "/revocations/"+freeze.ID+"?reason=over", ""); status != 200 {
		t.Errorf("lifted by another: %d %s", status, body)
	}
	eventually(t, "it is issued again", func() bool {
		return h.post("after", `{"run":"switch","scope":"vault:demo-read"}`, "").status == 201
	})
}
