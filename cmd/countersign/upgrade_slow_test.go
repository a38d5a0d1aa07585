//go:build slow

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// earlier is the commit of this program that ours is to work beside: the last
// before there was an access path.
const earlier = "945637a"

// plainCatalogue has no key that the older one does not know.
const plainCatalogue = `scopes:
  - name: identity:step
    description: The step's own identity, as a signed JWT and nothing else.
    target: spiffe://countersign.demo
    sensitivity: low
    max_ttl: 15m
    default_ttl: 5m
    ask: ["*"]
    engine: identity
    audience: [countersign-demo, vault]
  - name: vault:demo-read
    description: A Vault token that reads the demo secret.
    target: vault://secret/data/demo
    sensitivity: low
    max_ttl: 15m
    default_ttl: 5m
    ask: ["*"]
    engine: token
    vault:
      policies:
        - {path: secret/data/demo, capabilities: [read]}
    delivery: [direct, wrapped]
  - name: pki:service
    description: A certificate for one service of demo.internal.
    target: pki://demo.internal/{{service}}
    sensitivity: low
    max_ttl: 1h
    default_ttl: 15m
    ask: ["*"]
    engine: pki
    params:
      - name: service
        type: string
        description: The service's name, one DNS label.
        pattern: "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
        max_length: 63
        default: step
    vault:
      mount: pki
      role: service
      data:
        common_name: "{{service}}.demo.internal"
    delivery: [direct, wrapped]
`

// buildEarlier builds the program as of that commit from the repository's own
// history, which a shallow clone does not have.
func buildEarlier(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	archive := exec.Command("git", "-C", "../..", "archive", earlier)
	source, err := archive.Output()
	if err != nil {
		t.Skipf("the git history does not go back to %s: %v", earlier, err)
	}
	unpack := exec.Command("tar", "-x", "-C", dir)
	unpack.Stdin = strings.NewReader(string(source))
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	program := filepath.Join(dir, "countersign")
	build := exec.Command("go", "build", "-o", program, "./cmd/countersign")
	build.Dir, build.Env = dir, append(os.Environ(), "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return program
}

func TestAnOlderBrokerOrRecorderWorksBesideThisOne(t *testing.T) {
	old := buildEarlier(t)
	for _, c := range []struct {
		name    string
		program map[string]string
	}{
		{"a broker of before with a recorder of now", map[string]string{"serve": old}},
		{"a broker of now with a recorder of before", map[string]string{"record": old}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPairOf(t, c.program, []byte(plainCatalogue), func(*pair) (string, string) { return "", "" })
			want := func(status int, method, path, body, contains string) {
				t.Helper()
				got, answer := p.call(p.caller, method, p.url+path, body)
				if got != status || !strings.Contains(answer, contains) {
					t.Fatalf("%s %s: %d %s", method, path, got, answer)
				}
			}
			for range 3 { // retries and repetitions go by what the record says
				want(201, "POST", "/steps/s1/credential", `{"run":"r1","scope":"vault:demo-read","reason":"a reason","subject":"user:eve"}`, `"kind":"vault_token"`)
			}
			want(201, "POST", "/steps/s1/credential", `{"run":"r1","scope":"pki:service","params":{"service":"api"}}`, `"kind":"pki"`)
			want(200, "DELETE", "/steps/s1/credential?run=r1", "", `"pending":0`)
			want(200, "POST", "/steps/s1/result", `{"run":"r1","outcome":"succeeded","summary":"done"}`, "{")
			want(422, "POST", "/steps/s2/credential", `{"run":"r1","scope":"identity:none"}`, "unknown-scope")
			if n := p.history("credential.issued"); n != 4 {
				t.Errorf("%d issuances are on record", n)
			}
			if n := p.history("credential.revoked"); n != 3 {
				t.Errorf("%d revocations are on record", n)
			}
			// The broker's next start, of this version, goes on with the same record.
			stop := func() {
				must(t, p.broker.Process.Signal(os.Interrupt))
				<-p.served
			}
			want(201, "POST", "/steps/s3/credential", `{"run":"r1","scope":"vault:demo-read"}`, "vault_token")
			stop()
			p.program = nil
			p.broker, p.served = p.start(p.url, "serve", "--config", p.file("serve.yaml"))
			want(200, "DELETE", "/steps/s3/credential?run=r1", "", `"revoked":1,"pending":0`)
			stop()
			must(t, p.recorder.Process.Signal(os.Interrupt))
			<-p.recorded
			if out := p.cli("verify", p.file("ledger"), "--key", p.cli("key", "show", p.file("log.key"))); !strings.Contains(out, "verified") {
				t.Error(out)
			}
		})
	}
}
