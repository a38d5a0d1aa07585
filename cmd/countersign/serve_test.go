package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
)

// pair is a recorder and a broker as two processes, which know each other by
// certificates.
type pair struct {
	t                *testing.T
	dir              string
	recorder, broker *exec.Cmd
	recorded, served <-chan struct{}
	url, recorderURL string
	caller, reviewer string // tokens
	http             *http.Client
	program          map[string]string // by command, where it is another than this one
}

func (p *pair) file(name string) string { return filepath.Join(p.dir, name) }

func (p *pair) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(p.file(name), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pair) cli(args ...string) string {
	p.t.Helper()
	out, err := countersign(p.t, args...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("countersign %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// start runs a process until the test ends, and waits until it answers.
func (p *pair) start(url string, args ...string) (*exec.Cmd, <-chan struct{}) {
	p.t.Helper()
	cmd := countersign(p.t, args...)
	if other := p.program[args[0]]; other != "" {
		cmd.Path = other
	}
	log, err := os.Create(p.file(args[0] + ".log"))
	if err != nil {
		p.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	done, err := vaultdev.Run(cmd)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		log.Close()
		if p.t.Failed() {
			b, _ := os.ReadFile(log.Name())
			p.t.Logf("%s said:\n%s", args[0], b)
		}
	})
	eventually(p.t, args[0]+" is ready", func() bool {
		res, err := p.http.Get(url + "/readyz")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return cmd, done
}

func newPair(t *testing.T) *pair {
	return newPairWith(t, func(*pair) (string, string) { return "", "" })
}

// newPairWith is newPair with more lines in each configuration.
func newPairWith(t *testing.T, more func(*pair) (serve, record string)) *pair {
	return newPairOf(t, nil, scopes.Demo(nil), more)
}

// newPairOf is a pair with a catalogue of its own, and of other programs, by
// command.
func newPairOf(t *testing.T, program map[string]string, catalogue []byte, more func(*pair) (serve, record string)) *pair {
	p := &pair{t: t, dir: t.TempDir(), program: program}
	set, err := scopes.Parse("catalogue.yaml", catalogue, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	vault, prepared := vaulttest.Prepared(t, set, "")
	p.write("catalogue.yaml", string(catalogue))
	p.write("vault-token", prepared.BrokerToken)
	p.certificates()

	vkey := p.cli("key", "generate", "log", "--name", "pair.example/log", "--out", p.file("log.key"))
	p.cli("key", "generate", "identity", "--out", p.file("identity.key"))
	p.cli("key", "generate", "privacy", "--out", p.file("privacy.key"))
	p.reviewer = p.cli("token", "create", "--file", p.file("recorder-tokens"), "--role", "reviewer", "--name", "reviewer-a")
	p.caller = p.cli("token", "create", "--file", p.file("broker-tokens"), "--role", "orchestrator", "--name", "ci")

	serveMore, recordMore := more(p)
	recordAddr, serveAddr := freeAddr(t), freeAddr(t)
	p.recorderURL, p.url = "https://"+recordAddr, "https://"+serveAddr
	p.write("record.yaml", fmt.Sprintf(`
listen: {addr: %q, cert: %q, key: %q, client_ca: %q}
certificates: [{name: broker-1, uri: "spiffe://pair.example/broker/1"}]
dir: %q
log_key: %q
privacy_key: %q
tokens: %q
publish: 100ms
%s`, recordAddr, p.file("server.pem"), p.file("server.key"), p.file("ca.pem"), p.file("ledger"), p.file("log.key"), p.file("privacy.key"), p.file("recorder-tokens"), recordMore))
	p.write("serve.yaml", fmt.Sprintf(`
listen: {addr: %q, cert: %q, key: %q}
public_url: %q
trust_domain: pair.example
identity_key: %q
privacy_key: %q
catalogue: %q
recorder: {url: %q, writer: broker-1, cert: %q, key: %q, ca: %q, log_key: %q, head_file: %q}
vault: {addr: %q, token_file: %q}
redis: {embedded: true}
orchestrators: {tokens: %q}
%s`, serveAddr, p.file("server.pem"), p.file("server.key"), p.url, p.file("identity.key"), p.file("privacy.key"), p.file("catalogue.yaml"),
		p.recorderURL, p.file("client.pem"), p.file("client.key"), p.file("ca.pem"), vkey, p.file("broker-head"), vault.Addr, p.file("vault-token"), p.file("broker-tokens"), serveMore))

	p.recorder, p.recorded = p.start(p.recorderURL, "record", "--config", p.file("record.yaml"))
	p.cli("doctor", "--config", p.file("serve.yaml")) // finds no fault, the recorder being up
	p.broker, p.served = p.start(p.url, "serve", "--config", p.file("serve.yaml"))
	return p
}

// certificates makes a CA, a server's certificate and a writer's.
func (p *pair) certificates() {
	p.t.Helper()
	must := func(err error) {
		if err != nil {
			p.t.Fatal(err)
		}
	}
	save := func(name, kind string, der []byte) {
		p.write(name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "pair CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	must(err)
	save("ca.pem", "CERTIFICATE", der)
	ca, err = x509.ParseCertificate(der)
	must(err)
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	p.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	for name, of := range map[string]*x509.Certificate{
		"server": {IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}},
		"client": {URIs: []*url.URL{{Scheme: "spiffe", Host: "pair.example", Path: "/broker/1"}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		of.SerialNumber, of.NotBefore, of.NotAfter = big.NewInt(2), ca.NotBefore, ca.NotAfter
		der, err := x509.CreateCertificate(rand.Reader, of, ca, &key.PublicKey, caKey)
		must(err)
		save(name+".pem", "CERTIFICATE", der)
		der, err = x509.MarshalPKCS8PrivateKey(key)
		must(err)
		save(name+".key", "PRIVATE KEY", der)
	}
}

func (p *pair) call(token, method, url, body string) (int, string) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if strings.HasPrefix(body, "token=") {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	res, err := p.http.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func (p *pair) ask(scope string) (int, string) {
	p.t.Helper()
	return p.call(p.caller, "POST", p.url+"/steps/s1/credential", `{"run":"r1","scope":"`+scope+`"}`)
}

// history counts the entries of a type.
func (p *pair) history(entry string) int {
	p.t.Helper()
	status, body := p.call(p.reviewer, "GET", p.recorderURL+"/history?type="+entry, "")
	if status != 200 {
		p.t.Fatalf("history: %d %s", status, body)
	}
	return strings.Count(body, `"index":`)
}

func TestTwoProcessesIssueReloadAndEnd(t *testing.T) {
	p := newPair(t)

	if status, body := p.ask("vault:demo-read"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	// The writer is known by its certificate alone, and on record by its name.
	if status, body := p.call(p.reviewer, "GET", p.recorderURL+"/history?type=credential.issued", ""); status != 200 || !strings.Contains(body, `"writer":"broker-1"`) {
		t.Errorf("the issuance is not on record as broker-1's: %d %s", status, body)
	}
	if n := p.history("writer.added"); n != 1 {
		t.Errorf("%d writers were announced, want 1", n)
	}

	// A resource server is told of a token that this broker's keys signed.
	status, body := p.ask("identity:step")
	var c held
	if err := json.Unmarshal([]byte(body), &c); err != nil || status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	server := p.cli("token", "create", "--file", p.file("broker-tokens"), "--role", "resource-server", "--name", "orders")
	if status, body := p.call(server, "POST", p.url+"/introspect", "token="+c.Credential.Token); status != 200 || !strings.Contains(body, `"active":true`) {
		t.Errorf("introspect: %d %s", status, body)
	}

	// A new catalogue takes force by SIGHUP and is on record; a bad one does not.
	if n := p.history("policy.loaded"); n != 1 {
		t.Errorf("%d policies on record at start, want 1", n)
	}
	hangup := func() {
		if err := p.broker.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	demo := string(scopes.Demo(nil))
	renamed := strings.Replace(demo, "name: identity:step", "name: identity:renamed", 1)
	if renamed == demo {
		t.Fatal("the catalogue has no identity:step")
	}
	p.write("catalogue.yaml", renamed)
	hangup()
	eventually(t, "the new catalogue is on record", func() bool { return p.history("policy.loaded") == 2 })
	eventually(t, "the new catalogue is in force", func() bool {
		status, _ := p.ask("identity:renamed")
		return status == 201
	})
	p.write("catalogue.yaml", "scopes: [")
	hangup()
	eventually(t, "the bad catalogue is complained about", func() bool {
		b, err := os.ReadFile(p.file("serve.log"))
		return err == nil && strings.Contains(string(b), "not reloaded, the old stays in force")
	})
	if status, body := p.ask("identity:renamed"); status != 201 {
		t.Errorf("after a bad catalogue: %d %s", status, body)
	}

	// Doctor says that a key is missing, and makes none.
	p.write("catalogue.yaml", demo)
	if err := os.Rename(p.file("identity.key"), p.file("elsewhere.key")); err != nil {
		t.Fatal(err)
	}
	out, err := countersign(t, "doctor", "--config", p.file("serve.yaml")).Output()
	if err == nil || !strings.Contains(string(out), " identity_key "+p.file("identity.key")+": is missing") || strings.Count("\n"+string(out), "\nfault ") != 1 {
		t.Errorf("doctor without an identity key: %v\n%s", err, out)
	}
	if _, err := os.Stat(p.file("identity.key")); !os.IsNotExist(err) {
		t.Errorf("doctor made the key: %v", err)
	}

	// The recorder ends while the broker follows it, and the broker after it.
	for _, x := range []struct {
		name string
		cmd  *exec.Cmd
		done <-chan struct{}
	}{{"record", p.recorder, p.recorded}, {"serve", p.broker, p.served}} {
		began := time.Now()
		if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case <-x.done:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s did not end within 30 s of SIGTERM", x.name)
		}
		if code := x.cmd.ProcessState.ExitCode(); code != 0 || time.Since(began) > 5*time.Second {
			t.Errorf("%s ended %s after SIGTERM with exit status %d", x.name, time.Since(began), code)
		}
		if x.cmd == p.recorder {
			eventually(t, "the broker says that it could not issue", func() bool {
				status, body := p.call("", "GET", p.url+"/readyz", "")
				return status == 503 && strings.Contains(body, "problems/ledger-unavailable")
			})
		}
	}
}

func TestAHangupDuringTheStartIsDealtWithOnceTheProcessServes(t *testing.T) {
	p := newPair(t)
	for _, x := range []struct {
		name, url, says string
		cmd             *exec.Cmd
		done            <-chan struct{}
	}{
		{"serve", p.url, `"msg":"reloaded","what":"identity keys"`, p.broker, p.served},
		{"record", p.recorderURL, `"msg":"nothing to reload`, p.recorder, p.recorded},
	} {
		must(t, x.cmd.Process.Signal(syscall.SIGTERM))
		<-x.done
		conf, err := os.ReadFile(p.file(x.name + ".yaml"))
		must(t, err)
		// It waits for its configuration, and so the signal comes before it is read.
		pipe := p.file(x.name + ".pipe")
		must(t, syscall.Mkfifo(pipe, 0o600))
		log, err := os.Create(p.file("hangup.log"))
		must(t, err)
		cmd := countersign(t, x.name, "--config", pipe)
		cmd.Stdout, cmd.Stderr = log, log
		done, err := vaultdev.Run(cmd)
		must(t, errors.Join(err, log.Close()))
		t.Cleanup(func() { _ = cmd.Process.Kill(); <-done })
		var in *os.File
		eventually(t, x.name+" reads its configuration", func() bool {
			in, err = os.OpenFile(pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0)
			return err == nil
		})
		must(t, cmd.Process.Signal(syscall.SIGHUP))
		_, err = in.Write(conf)
		must(t, errors.Join(err, in.Close()))
		eventually(t, x.name+" serves and has read its files again", func() bool {
			select {
			case <-done:
				said, _ := os.ReadFile(log.Name())
				t.Fatalf("%s ended: %v\n%s", x.name, cmd.ProcessState, said)
			default:
			}
			said, _ := os.ReadFile(log.Name())
			res, err := p.http.Get(x.url + "/healthz")
			if err == nil {
				res.Body.Close()
			}
			return err == nil && res.StatusCode == http.StatusOK && strings.Contains(string(said), x.says)
		})
	}
}

func TestABrokerRefusesARecorderWhoseLogWasPutBack(t *testing.T) {
	p := newPair(t)
	ask := func(step string) (int, string) {
		t.Helper()
		return p.call(p.caller, "POST", p.url+"/steps/"+step+"/credential", `{"run":"r1","scope":"identity:step"}`)
	}
	stop := func(cmd *exec.Cmd, done <-chan struct{}) {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-done
	}
	copyTo := func(from, to string) {
		t.Helper()
		if err := os.RemoveAll(p.file(to)); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(p.file(to), os.DirFS(p.file(from))); err != nil {
			t.Fatal(err)
		}
	}
	restart := func() {
		t.Helper()
		p.recorder, p.recorded = p.start(p.recorderURL, "record", "--config", p.file("record.yaml"))
	}
	if status, body := ask("s1"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	stop(p.recorder, p.recorded)
	copyTo("ledger", "older")
	restart()
	eventually(t, "the broker goes on with the same log", func() bool {
		status, _ := ask("s2")
		return status == 201
	})
	stop(p.recorder, p.recorded)
	// Database and head file: to itself, the recorder is in order.
	copyTo("older", "ledger")
	restart()
	refused := func(when string, times int) {
		t.Helper()
		for n := range times { // the log that was put back would grow past what was seen
			if status, body := ask(fmt.Sprintf("s-%s-%d", when, n)); status != 503 || !strings.Contains(body, "problems/ledger-unavailable") {
				t.Fatalf("%s: %d %s", when, status, body)
			}
		}
		if n := p.history("credential.issued"); n != 1 {
			t.Fatalf("%s: %d credentials on record, want the 1 of the older log", when, n)
		}
	}
	refused("running", 8)
	// A broker that is started again has not forgotten.
	stop(p.broker, p.served)
	cmd := countersign(t, "serve", "--config", p.file("serve.yaml"))
	cmd.Stderr = io.Discard
	done, err := vaultdev.Run(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-done })
	eventually(t, "the broker listens again", func() bool {
		res, err := p.http.Get(p.url + "/healthz")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == 200
	})
	refused("restarted", 2)
}

func TestServeSaysInOneLineThatVaultDoesNotAnswer(t *testing.T) {
	p := &pair{t: t, dir: t.TempDir()}
	vkey := p.cli("key", "generate", "log", "--name", "pair.example/log", "--out", p.file("log.key"))
	p.cli("key", "generate", "identity", "--out", p.file("identity.key"))
	p.cli("key", "generate", "privacy", "--out", p.file("privacy.key"))
	p.cli("token", "create", "--file", p.file("tokens"), "--role", "orchestrator", "--name", "ci")
	p.write("catalogue.yaml", string(scopes.Demo(nil)))
	p.write("secret", "x")
	p.write("serve.yaml", fmt.Sprintf(`
listen: {addr: "127.0.0.1:0"}
public_url: http://127.0.0.1:1
trust_domain: pair.example
identity_key: %q
privacy_key: %q
catalogue: %q
recorder: {url: "http://127.0.0.1:1", writer: broker-1, token_file: %q, log_key: %q, head_file: %q}
vault: {addr: "http://127.0.0.1:1", token_file: %q}
redis: {embedded: true}
orchestrators: {tokens: %q}
`, p.file("identity.key"), p.file("privacy.key"), p.file("catalogue.yaml"), p.file("secret"), vkey, p.file("head"), p.file("secret"), p.file("tokens")))
	out, err := countersign(t, "serve", "--config", p.file("serve.yaml")).CombinedOutput()
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != 1 || !strings.Contains(string(out), "vault unavailable") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("%v: %s", err, out)
	}
}
