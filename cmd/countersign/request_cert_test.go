package main

import (
	"crypto/x509"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

func TestAnOrchestratorWithACertificateAloneAsksRunsAndRevokes(t *testing.T) {
	p := newPair(t)
	ca, next := trusttest.NewCA(t), trusttest.NewCA(t)
	issue := func(ca *trusttest.CA, name string) {
		trusttest.Write(t, ca.Issue(t, x509.Certificate{URIs: trusttest.URIs(t, "spiffe://pair.example/ci")}), p.file(name+".pem"), p.file(name+".key"))
	}
	trusttest.WriteCAs(t, p.file("orchestrators-ca.pem"), ca.Cert)
	trusttest.WriteCAs(t, p.file("next-ca.pem"), next.Cert)
	issue(ca, "ci")
	issue(next, "next")

	// The same broker again, which takes no token.
	must(t, p.broker.Process.Signal(syscall.SIGTERM))
	<-p.served
	conf, err := os.ReadFile(p.file("serve.yaml"))
	must(t, err)
	text := strings.Replace(string(conf), `server.key"}`, `server.key", client_ca: "`+p.file("orchestrators-ca.pem")+`"}`, 1)
	text = strings.Replace(text, `{tokens: "`+p.file("broker-tokens")+`"}`, `{certificates: [{name: ci, uri: "spiffe://pair.example/ci"}]}`, 1)
	p.write("serve.yaml", text)
	p.broker, p.served = p.start(p.url, "serve", "--config", p.file("serve.yaml"))

	cli := func(env []string, args ...string) (int, string) {
		t.Helper()
		cmd := countersign(t, args...)
		cmd.Env = append(os.Environ(), append([]string{"COUNTERSIGN_ADDR=" + p.url, "COUNTERSIGN_TOKEN=", "SSL_CERT_FILE=" + p.file("ca.pem")}, env...)...)
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	cert, key := p.file("ci.pem"), p.file("ci.key")
	byEnv := []string{"COUNTERSIGN_CERT=" + cert, "COUNTERSIGN_KEY=" + key}
	ask := []string{"--scope", "identity:step", "--run", "r1", "--step", "s1"}
	asked := append([]string{"request"}, ask...)

	if code, out := cli(nil, append(asked, "--cert", cert, "--key", key)...); code != 0 || !strings.Contains(out, `"identity":"spiffe://pair.example/orchestrator/ci/run/r1/step/s1"`) {
		t.Errorf("request: %d %s", code, out)
	}
	if code, out := cli(byEnv, "revoke", "--run", "r1", "--step", "s1"); code != 0 || !strings.Contains(out, "revoked") {
		t.Errorf("revoke: %d %s", code, out)
	}
	// The certificate and the broker's authorities are renewed while the command
	// runs, for longer than the second within which files are looked at again; the
	// result is reported by the new one. The command knows of neither.
	script := `mv next.pem ci.pem && mv next.key ci.key && mv next-ca.pem orchestrators-ca.pem && sleep 1.5; env | grep -E '^COUNTERSIGN_(CERT|KEY)='; exit 0`
	run := append(append([]string{"run"}, ask...), "--", "sh", "-c", "cd '"+p.dir+"' && "+script)
	if code, out := cli(byEnv, run...); code != 0 || out != "" {
		t.Errorf("run: %d %s", code, out)
	}

	for name, x := range map[string]struct {
		env, args []string
		want      string
	}{
		"nothing to show":       {nil, nil, "show its certificate with --cert and --key"},
		"no key":                {nil, []string{"--cert", cert}, "go together"},
		"a key that is missing": {nil, []string{"--cert", cert, "--key", p.file("none.key")}, "none.key"},
		"in the clear":          {byEnv, []string{"--addr", "http://127.0.0.1:1"}, "over TLS alone"},
		"another's":             {nil, []string{"--cert", p.file("client.pem"), "--key", p.file("client.key")}, "unauthenticated"},
	} {
		if code, out := cli(x.env, append(asked, x.args...)...); code != 1 || !strings.Contains(out, x.want) {
			t.Errorf("%s: %d %s", name, code, out)
		}
	}
}
