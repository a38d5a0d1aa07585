package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// wholeServe is a configuration in which every key is set.
const wholeServe = `
listen: {addr: 0.0.0.0:8787, cert: tls.pem, key: tls.key, client_ca: bundle.pem}
public_url: https://countersign.example.com
trust_domain: example.com
identity_key: identity.key
identity_lead: 10m
privacy_key: privacy.key
catalogue: catalogue.yaml
policy: policy.rego
recorder: {url: https://recorder.example.com, writer: broker-1, token_file: t, ca: ca.pem, log_key: k, head_file: head}
vault: {addr: https://vault.example.com:8200, ca: ca.pem, namespace: n, approle: {mount: approle, role_id: r, secret_id_file: s}}
redis: {embedded: true}
orchestrators:
  tokens: orchestrators
  oidc:
    - issuer: https://token.actions.githubusercontent.com
      audience: countersign
      orchestrators: [{match: {repository: acme/deploy}, orchestrator: ci, owners: ["user:ada"]}]
  certificates: [{name: ci, uri: "spiffe://example.com/ci", owners: ["user:ada"]}]
first_ttl: 60s
drain: 20s
gateway:
  http: {listen: {addr: 0.0.0.0:8789, cert: tls.pem, key: tls.key}, url: "https://gateway.example.com:8789/"}
  postgres: {listen: {addr: 127.0.0.1:8790}, address: gateway.example.com:8790}
  mcp: {listen: {addr: 127.0.0.1:8791}, url: http://127.0.0.1:8791}
  upstreams: {orders.internal: "10.0.3.7:5432", "demo.internal:80": "127.0.0.1:8080"}
  ca_file: targets.pem
  max_sessions: 100
  proxy_ca_dir: proxy-ca
`

const wholeRecord = `
listen: {addr: 127.0.0.1:8788}
trust_domain: example.com
dir: ledger
head_file: head
keys_file: keys.db
log_key: log.key
privacy_key: privacy.key
tokens: tokens
certificates: [{name: broker-1, uri: spiffe://example.com/broker/1}]
grace: 60s
publish: 2s
check_newest: 10000
recheck: 1h
drain: 20s
private: true
vault_audit: {file: audit.log, addr: https://vault.example.com, token_file: vault.token}
metrics_addr: 127.0.0.1:9091
`

func write(t *testing.T, text string) string {
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func loadServe(t *testing.T, text string) error {
	var c serveConfig
	if err := loadConfig(write(t, text), &c); err != nil {
		return err
	}
	return c.check()
}

func loadRecord(t *testing.T, text string) error {
	var c recordConfig
	if err := loadConfig(write(t, text), &c); err != nil {
		return err
	}
	return c.check()
}

func TestAWholeConfigurationIsTaken(t *testing.T) {
	if err := loadServe(t, wholeServe); err != nil {
		t.Error(err)
	}
	if err := loadRecord(t, wholeRecord); err != nil {
		t.Error(err)
	}
}

func TestAConfigurationThatShouldNotRunIsRefusedWithItsPlace(t *testing.T) {
	for _, c := range []struct{ name, old, new, want string }{
		{"an unknown key", "policy: policy.rego", "polcy: policy.rego", ":8:1: unknown field \"polcy\""},
		{"an unknown key below another", "ca: ca.pem, log_key", "cacert: ca.pem, log_key", `unknown field "cacert"`},
		{"a key twice", "drain: 20s", "drain: 20s\ndrain: 30s", ":21:1: "},
		{"a duration without unit", "drain: 20s", "drain: 20x", "unknown unit"},
		{"an orchestrator by common name", `uri: "spiffe://example.com/ci"`, "common_name: ci", `unknown field "common_name"`},
		{"certificates of nobody's", ", client_ca: bundle.pem", "", "go together"},
		{"no writer", "writer: broker-1, ", "", "recorder.writer is not set"},
		{"plain HTTP to the network", ", cert: tls.pem, key: tls.key, client_ca: bundle.pem", "", "insecure_listen"},
		{"a certificate without its key", ", key: tls.key", "", "cert and key go together"},
		{"a recorder in the clear", "https://recorder.example.com", "http://recorder.example.com", "recorder.url: http://recorder.example.com would carry tokens in the clear"},
		{"a Vault in the clear", "https://vault.example.com", "http://vault.example.com", "vault.addr: "},
		{"two logins to Vault", "namespace: n", "namespace: n, token_file: t", "either token_file or approle"},
		{"two Redis", "embedded: true", "embedded: true, url_file: r", "either url_file"},
		{"no Redis", "redis: {embedded: true}", "", "either url_file"},
		{"an embedded Redis with a password", "embedded: true", "embedded: true, password_file: p", "stands alone"},
		{"a Redis URL and a user", "embedded: true", "url_file: r, username: u, password_file: p", "stand in the URL"},
		{"a Redis URL of a Cluster", "embedded: true", "url_file: r, cluster: true", "names one server"},
		{"a Cluster with Sentinels", "embedded: true", "addrs: [\"a:1\"], cluster: true, sentinel_master: m", "either cluster or sentinel_master"},
		{"a database in a Cluster", "embedded: true", "addrs: [\"a:1\"], cluster: true, db: 1", "no databases"},
		{"a Sentinel's password without Sentinels", "embedded: true", "addrs: [\"a:1\"], sentinel_password_file: p", "set sentinel_master"},
		{"several Redis of no kind", "embedded: true", "addrs: [\"a:1\", \"b:1\"]", "say which"},
		{"a Redis user without password", "embedded: true", "addrs: [\"a:1\"], username: u", "needs its password"},
		{"half a client certificate for Redis", "embedded: true", "addrs: [\"a:1\"], tls: {cert: c}", "cert and key go together"},
		{"a Redis address that is a URL", "embedded: true", "addrs: [\"redis://a\"]", "redis: addrs: "},
		{"a pattern as prefix", "embedded: true", "addrs: [\"a:1\"], prefix: \"*\"", "mean something to Redis"},
		{"a gateway in the clear", "0.0.0.0:8789, cert: tls.pem, key: tls.key", "0.0.0.0:8789", "gateway.http: listen.addr 0.0.0.0:8789"},
		{"tokens in the clear", `"https://gateway`, `"http://gateway`, "gateway.http: url: "},
		{"a gateway below a path", "com:8789/", "com:8789/api", "more than scheme, host and port"},
		{"a gateway without URL", ", url: http://127.0.0.1:8791", "", "gateway.mcp: url: "},
		{"a gateway at no address", "address: gateway.example.com:8790", "address: gateway.example.com", "gateway.postgres: address: "},
		{"an upstream without port", `"10.0.3.7:5432"`, "10.0.3.7", "gateway.upstreams.orders.internal: "},
		{"an upstream for a URL", "{orders.internal:", `{"http://orders.internal":`, "is not a host"},
		{"fewer sessions than none", "max_sessions: 100", "max_sessions: -1", "gateway.max_sessions"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(wholeServe, c.old, c.new, 1)
			if text == wholeServe {
				t.Fatalf("%q is not in the configuration", c.old)
			}
			err := loadServe(t, strings.TrimPrefix(text, "\n"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	for _, redis := range []string{"url_file: r", "url_file: r, tls: {ca: c}", "addrs: [\"a:1\"], username: u, password_file: p, db: 2, tls: {}, prefix: \"blue:\"",
		"addrs: [\"a:1\", \"b:1\"], sentinel_master: m, sentinel_username: u, sentinel_password_file: p", "addrs: [\"a:1\", \"b:1\"], cluster: true"} {
		if err := loadServe(t, strings.Replace(wholeServe, "embedded: true", redis, 1)); err != nil {
			t.Errorf("redis: {%s}: %v", redis, err)
		}
	}
	if err := loadServe(t, strings.NewReplacer("0.0.0.0:8787, cert: tls.pem, key: tls.key, client_ca: bundle.pem", "0.0.0.0:8787, insecure_listen: true", "  certificates:", "  #").Replace(wholeServe)); err != nil {
		t.Errorf("insecure_listen: %v", err)
	}
	for _, off := range []string{"check_newest: -1", "recheck: -1s"} {
		key, _, _ := strings.Cut(off, " ")
		if err := loadRecord(t, strings.Replace(wholeRecord, key, off+" #", 1)); err == nil || !strings.Contains(err.Error(), "without its checks") {
			t.Errorf("%s: %v", off, err)
		}
	}
	if err := loadRecord(t, strings.Replace(wholeRecord, "uri: ", "url: ", 1)); err == nil {
		t.Error("a misspelt key of a certificate was taken")
	}
}

func TestOnlyAddressesOfThisMachineAreLoopback(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true, "localhost:1": true,
		":1": false, "0.0.0.0:1": false, "[::]:1": false, "10.0.0.1:1": false, "localhost.example.com:1": false, "127.0.0.1": false, "": false,
	} {
		if got := loopback(addr); got != want {
			t.Errorf("loopback(%q) is %t", addr, got)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(wholeServe)
	f.Add(wholeRecord)
	f.Add("listen: {addr: [}")
	f.Add("drain: 1s\ndrain: 2s")
	f.Fuzz(func(t *testing.T, text string) {
		var s serveConfig
		if parseConfig("serve.yaml", []byte(text), &s) == nil {
			_ = s.check()
		}
		var r recordConfig
		if parseConfig("record.yaml", []byte(text), &r) == nil {
			_ = r.check()
		}
	})
}
