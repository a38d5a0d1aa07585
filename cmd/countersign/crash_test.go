package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
)

// graceInTests is the first TTL of child tokens and the grace for intents
// without an outcome.
const graceInTests = 2 * time.Second

// crash is a moment at which a process is killed: when a call matching path
// and body passes the proxy in front of the recorder or of Vault, before it
// is forwarded, while it is, or before its answer is passed on.
type crash struct {
	name   string
	victim string // broker or recorder
	proxy  string // recorder, vault, or empty for a random moment
	when   string // before, during, after
	path   string
	body   string
}

// crashes are the moments between the lines of the design's life of a request.
var crashes = []crash{
	{"broker before the intent is sent", "broker", "recorder", "before", "/append", `"credential.issuing"`},
	{"broker while the intent is recorded", "broker", "recorder", "during", "/append", `"credential.issuing"`},
	{"broker with the intent recorded, not acknowledged", "broker", "recorder", "after", "/append", `"credential.issuing"`},
	{"broker before the child token is made", "broker", "vault", "before", "/v1/auth/token/create", ""},
	{"broker with the child token made, not answered", "broker", "vault", "after", "/v1/auth/token/create", ""},
	{"broker with the secret read, not answered", "broker", "vault", "after", "/v1/database/creds", ""},
	{"broker before the issuance is sent", "broker", "recorder", "before", "/append", `"credential.issued"`},
	{"broker while the issuance is recorded", "broker", "recorder", "during", "/append", `"credential.issued"`},
	{"broker with the issuance recorded, not acknowledged", "broker", "recorder", "after", "/append", `"credential.issued"`},
	{"broker before the child is renewed", "broker", "vault", "before", "/v1/auth/token/renew-accessor", ""},
	{"broker with the child renewed, before the reply", "broker", "vault", "after", "/v1/auth/token/renew-accessor", ""},
	{"recorder before the intent", "recorder", "recorder", "before", "/append", `"credential.issuing"`},
	{"recorder while it writes the intent", "recorder", "recorder", "during", "/append", `"credential.issuing"`},
	{"recorder with the intent written, not acknowledged", "recorder", "recorder", "after", "/append", `"credential.issuing"`},
	{"recorder before the issuance", "recorder", "recorder", "before", "/append", `"credential.issued"`},
	{"recorder while it writes the issuance", "recorder", "recorder", "during", "/append", `"credential.issued"`},
	{"recorder with the issuance written, not acknowledged", "recorder", "recorder", "after", "/append", `"credential.issued"`},
	{"recorder while a lease is closed", "recorder", "recorder", "during", "/append", `"credential.revoked"`},
	{"broker at any moment", "broker", "", "", "", ""},
	{"recorder at any moment", "recorder", "", "", "", ""},
}

func TestNothingIsLostOrLeftBehindWhenAProcessIsKilledAtAnyPoint(t *testing.T) {
	h := newHouse(t)
	for i := range killsInTests {
		c := crashes[i%len(crashes)]
		h.crash(c)
		if t.Failed() {
			t.Fatalf("after kill %d, of the %s", i+1, c.name)
		}
	}
	h.settle()
	h.checkRecord()
	h.checkVault()
}

// house is one recorder and one broker as processes, with a proxy in front of
// the recorder and one in front of Vault, and callers that keep what they get.
type house struct {
	t        *testing.T
	dir      string
	vault    *vaulttest.Server
	dsn      string
	recorder *process
	broker   *process
	logKey   *store.LogVerifier
	people   string // the recorder's URL for people
	reviewer string // token
	caller   string // token
	armed    atomic.Pointer[arm]
	head     string // the newest checkpoint seen, for --since

	mu       sync.Mutex
	received []received
	serial   atomic.Int64
}

// arm is a crash waiting for its moment.
type arm struct {
	crash
	victim *process
	fired  chan struct{}
	once   sync.Once
}

func (a *arm) fire() {
	a.once.Do(func() {
		a.victim.kill()
		close(a.fired)
	})
}

// received is a credential that a caller holds.
type received struct {
	Request    string `json:"request"`
	Scope      string `json:"scope"`
	Credential struct {
		Kind     string `json:"kind"`
		Username string `json:"username"`
	} `json:"credential"`
	Ledger struct {
		Index    int64  `json:"index"`
		LeafHash string `json:"leaf_hash"`
	} `json:"ledger"`
	step, key string
}

func newHouse(t *testing.T) *house {
	h := &house{t: t, dir: t.TempDir()}
	h.dsn = vaulttest.Postgres(t)
	catalogue := scopes.Demo(connection(t, h.dsn))
	set, err := scopes.Parse("demo.yaml", catalogue, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	vault, prepared := vaulttest.Prepared(t, set, h.dsn)
	h.vault = vault

	cli := func(args ...string) string {
		t.Helper()
		out, err := countersign(t, args...).Output()
		if err != nil {
			t.Fatalf("countersign %s: %v", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(string(out))
	}
	write := func(name string, b []byte) string {
		path := filepath.Join(h.dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := func(name string) string { return filepath.Join(h.dir, name) }
	write("catalogue.yaml", catalogue)
	write("vault-token", []byte(prepared.BrokerToken))
	cli("key", "generate", "log", "--name", "crash.example/log", "--out", file("log.key"))
	cli("key", "generate", "identity", "--out", file("identity.key"))
	cli("key", "generate", "privacy", "--out", file("privacy.key"))
	vkey := cli("key", "show", file("log.key"))
	if h.logKey, err = store.NewLogVerifier(vkey); err != nil {
		t.Fatal(err)
	}
	token := func(tokens, role, name string) string {
		return cli("token", "create", "--file", file(tokens), "--role", role, "--name", name)
	}
	h.reviewer = token("recorder-tokens", "reviewer", "reviewer")
	write("writer-token", []byte(token("recorder-tokens", "writer", "broker-1")))
	h.caller = cli("token", "create", "--file", file("broker-tokens"), "--role", "orchestrator", "--name", "demo", "--owner", "user:ben")

	recordAddr, serveAddr := freeAddr(t), freeAddr(t)
	recorderProxy := h.proxy("recorder", "http://"+recordAddr)
	vaultProxy := h.proxy("vault", vault.Addr)
	write("record.yaml", fmt.Appendf(nil, `
listen: {addr: %q}
dir: %q
log_key: %q
privacy_key: %q
tokens: %q
grace: %s
publish: 200ms
`, recordAddr, file("ledger"), file("log.key"), file("privacy.key"), file("recorder-tokens"), graceInTests))
	write("serve.yaml", fmt.Appendf(nil, `
listen: {addr: %q}
public_url: %q
trust_domain: crash.example
identity_key: %q
privacy_key: %q
catalogue: %q
recorder: {url: %q, writer: broker-1, token_file: %q, log_key: %q, head_file: %q}
vault: {addr: %q, token_file: %q}
redis: {embedded: true}
orchestrators: {tokens: %q}
first_ttl: %s
`, serveAddr, "http://"+serveAddr, file("identity.key"), file("privacy.key"), file("catalogue.yaml"),
		recorderProxy, file("writer-token"), vkey, file("broker-head"), vaultProxy, file("vault-token"), file("broker-tokens"), graceInTests))
	h.people = "http://localhost:" + strings.TrimPrefix(recordAddr, "127.0.0.1:")
	record, err := os.ReadFile(file("record.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	write("record.yaml", append(record, peoplesProvider(t, h.people, file("catalogue.yaml"))...))
	h.recorder = h.process("recorder", "http://"+recordAddr, "record", "--config", file("record.yaml"))
	h.broker = h.process("broker", "http://"+serveAddr, "serve", "--config", file("serve.yaml"))
	h.recorder.start()
	h.broker.start()
	return h
}

// process is one of ours, killed and started again.
type process struct {
	h    *house
	name string
	url  string
	args []string
	log  *os.File

	mu   sync.Mutex
	cmd  *exec.Cmd
	done <-chan struct{}
}

func (h *house) process(name, url string, args ...string) *process {
	log, err := os.Create(filepath.Join(h.dir, name+".log"))
	if err != nil {
		h.t.Fatal(err)
	}
	p := &process{h: h, name: name, url: url, args: args, log: log}
	h.t.Cleanup(func() {
		p.kill()
		log.Close()
		if h.t.Failed() {
			b, _ := os.ReadFile(log.Name())
			h.t.Logf("%s said:\n%s", name, b[max(0, len(b)-8<<10):])
		}
	})
	return p
}

// start starts p and waits until it answers.
func (p *process) start() {
	p.h.t.Helper()
	p.run()
	eventually(p.h.t, p.name+" is ready", func() bool {
		res, err := http.Get(p.url + "/readyz")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
}

// run starts p.
func (p *process) run() {
	p.h.t.Helper()
	cmd := countersign(p.h.t, p.args...)
	cmd.Stdout, cmd.Stderr = p.log, p.log
	done, err := vaultdev.Run(cmd)
	if err != nil {
		p.h.t.Fatal(err)
	}
	p.mu.Lock()
	p.cmd, p.done = cmd, done
	p.mu.Unlock()
}

// kill sends SIGKILL and waits until p is gone.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.done
	p.cmd = nil
}

// proxy stands in front of target and fires an armed crash at its moment.
func (h *house) proxy(name, target string) string {
	u, err := url.Parse(target)
	if err != nil {
		h.t.Fatal(err)
	}
	rp := httputil.NewSingleHostReverseProxy(u)
	rp.FlushInterval = -1
	rp.ErrorLog = log.New(io.Discard, "", 0) // a peer that was killed is no news
	rp.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { panic(http.ErrAbortHandler) }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := h.armed.Load()
		hit := false
		if a != nil && a.proxy == name && strings.HasPrefix(r.URL.Path, a.path) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			hit = strings.Contains(string(body), a.body)
		}
		if !hit {
			rp.ServeHTTP(w, r)
			return
		}
		switch a.when {
		case "before":
			a.fire()
			panic(http.ErrAbortHandler)
		case "during":
			go func() {
				time.Sleep(random(2 * time.Millisecond)) // any moment will do
				a.fire()
			}()
			rp.ServeHTTP(w, r)
		case "after":
			answer := httptest.NewRecorder()
			rp.ServeHTTP(answer, r)
			a.fire()
			panic(http.ErrAbortHandler)
		}
	}))
	server.Config.ErrorLog = nil
	h.t.Cleanup(server.Close)
	return server.URL
}

func random(below time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(below)))
	if err != nil {
		panic(err)
	}
	return time.Duration(n.Int64())
}

// crash lets callers ask, kills the victim at its moment, starts it again and
// lets the callers try again under their keys.
func (h *house) crash(c crash) {
	h.t.Helper()
	victim := map[string]*process{"broker": h.broker, "recorder": h.recorder}[c.victim]
	a := &arm{crash: c, victim: victim, fired: make(chan struct{})}
	if c.proxy == "" {
		go func() {
			time.Sleep(random(50 * time.Millisecond)) // any moment will do
			a.fire()
		}()
	} else {
		h.armed.Store(a)
	}
	type call struct{ step, scope, key string }
	var calls []call
	for _, scope := range []string{"vault:demo-read", "orders-db:read", "identity:step", "vault:demo-read", "orders-db:read"} {
		n := h.serial.Add(1)
		calls = append(calls, call{fmt.Sprintf("step-%d", n), scope, fmt.Sprintf("key-%d", n)})
	}
	var first sync.WaitGroup
	for _, call := range calls {
		first.Go(func() {
			h.ask(call.step, call.scope, call.key)
			if c.body == `"credential.revoked"` {
				h.end(call.step)
			}
		})
	}
	select {
	case <-a.fired:
	case <-time.After(30 * time.Second):
		h.t.Errorf("the moment %q never came", c.name)
	}
	first.Wait()
	h.armed.Store(nil)
	victim.start()
	for _, call := range calls[:2] {
		eventually(h.t, "a retry of "+call.step+" is answered", func() bool {
			switch h.ask(call.step, call.scope, call.key) {
			case http.StatusCreated, http.StatusConflict:
				return true
			}
			return false
		})
	}
	h.verify()
}

// ask asks for one credential and keeps what it gets. It returns the status,
// 0 where nothing was answered.
func (h *house) ask(step, scope, key string) int {
	body, _ := json.Marshal(map[string]string{"run": "crash", "scope": scope, "ttl": "2m"})
	req, err := http.NewRequest("POST", h.broker.url+"/steps/"+step+"/credential", bytes.NewReader(body))
	if err != nil {
		h.t.Error(err)
		return 0
	}
	req.Header.Set("Authorization", "Bearer "+h.caller)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0
	}
	if res.StatusCode == http.StatusCreated {
		got := received{step: step, key: key}
		if err := json.Unmarshal(b, &got); err != nil {
			h.t.Errorf("%s: %v", b, err)
		}
		h.mu.Lock()
		h.received = append(h.received, got)
		h.mu.Unlock()
	}
	return res.StatusCode
}

// end revokes what a step holds.
func (h *house) end(step string) {
	req, _ := http.NewRequest("DELETE", h.broker.url+"/steps/"+step+"/credential?run=crash", nil)
	req.Header.Set("Authorization", "Bearer "+h.caller)
	if res, err := http.DefaultClient.Do(req); err == nil {
		res.Body.Close()
	}
}

// verify checks the served log from outside, as a continuation of the last
// one seen.
func (h *house) verify() {
	h.t.Helper()
	src, err := evidence.NewRecorder(h.recorder.url, h.reviewer)
	if err != nil {
		h.t.Fatal(err)
	}
	report, err := evidence.Verify(h.t.Context(), src, evidence.Options{Log: h.logKey, Since: h.head})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range report.Findings {
		h.t.Errorf("verify: %s", f)
	}
	h.head = report.Checkpoint
}

// settle waits until every intent has an outcome: the grace is over for those
// that a kill left behind.
func (h *house) settle() {
	h.t.Helper()
	eventually(h.t, "every intent has an outcome", func() bool {
		open := map[string]bool{}
		for _, e := range h.history() {
			switch e.Type {
			case store.CredentialIssuing:
				open[e.ID] = true
			case store.CredentialIssued, store.CredentialFailed, store.CredentialAbandoned:
				d, err := store.DetailsAs[store.ClosedDetails](e)
				if err != nil {
					h.t.Fatal(err)
				}
				delete(open, d.Intent)
			}
		}
		return len(open) == 0
	})
}

// history reads every entry as a reviewer does.
func (h *house) history() []*store.Entry {
	h.t.Helper()
	var all []*store.Entry
	for cursor := ""; ; {
		req, _ := http.NewRequest("GET", h.recorder.url+"/history?limit=1000&cursor="+url.QueryEscape(cursor), nil)
		req.Header.Set("Authorization", "Bearer "+h.reviewer)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			h.t.Fatal(err)
		}
		var page struct {
			Entries []struct {
				Index int64       `json:"index"`
				Entry store.Entry `json:"entry"`
			} `json:"entries"`
			Next string `json:"next"`
		}
		err = json.NewDecoder(res.Body).Decode(&page)
		res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK {
			h.t.Fatal(res.Status, err)
		}
		for i := range page.Entries {
			if int64(len(all)) != page.Entries[i].Index {
				h.t.Fatalf("history leaves out entry %d", len(all))
			}
			all = append(all, &page.Entries[i].Entry)
		}
		if cursor = page.Next; cursor == "" {
			return all
		}
	}
}

// checkRecord compares what callers hold with what is on record.
func (h *house) checkRecord() {
	h.t.Helper()
	all := h.history()
	live := map[string]map[string]bool{} // step to live intents
	for _, e := range all {
		switch e.Type {
		case store.CredentialIssued:
			d, _ := store.DetailsAs[store.IssuedDetails](e)
			if live[e.Step] == nil {
				live[e.Step] = map[string]bool{}
			}
			live[e.Step][d.Intent] = true
			if n := len(live[e.Step]); n > 1 {
				h.t.Errorf("step %s, which asked under one key, holds %d live credentials", e.Step, n)
			}
		case store.CredentialRevoked, store.CredentialExpired:
			d, _ := store.DetailsAs[store.ClosedDetails](e)
			delete(live[e.Step], d.Intent)
		}
	}
	if len(h.received) < killsInTests {
		h.t.Errorf("only %d credentials were received over %d kills", len(h.received), killsInTests)
	}
	for _, r := range h.received {
		if r.Ledger.Index >= int64(len(all)) {
			h.t.Errorf("%s: entry %d of its answer is not in the ledger", r.Request, r.Ledger.Index)
			continue
		}
		e := all[r.Ledger.Index]
		if e.Type != store.CredentialIssued || e.Request != r.Request || e.Step != r.step || e.Action != r.Scope {
			h.t.Errorf("%s: entry %d is %s of %s", r.Request, r.Ledger.Index, e.Type, e.Request)
		}
	}
	h.t.Logf("%d kills, %d entries, %d credentials received", killsInTests, len(all), len(h.received))
}

// checkVault asks Vault and PostgreSQL for what is alive, and looks each up in
// the record.
func (h *house) checkVault() {
	h.t.Helper()
	accessors, leases, intents := map[string]bool{}, map[string]bool{}, map[int64]string{}
	ended := map[string]bool{} // intents whose credential is closed on record
	for i, e := range h.history() {
		switch e.Type {
		case store.CredentialIssued:
			d, _ := store.DetailsAs[store.IssuedDetails](e)
			accessors[d.Accessor] = true
			leases[d.LeaseID] = true
			intents[int64(i)] = d.Intent
		case store.CredentialRevoked, store.CredentialExpired:
			d, _ := store.DetailsAs[store.ClosedDetails](e)
			ended[d.Intent] = true
		}
	}
	holders := map[string]string{} // database role to the intent it was handed out for
	for _, r := range h.received {
		holders[r.Credential.Username] = intents[r.Ledger.Index]
	}
	var unknown []string
	var unleased int
	eventually(h.t, "no secret lives without a record", func() bool {
		unknown = nil
		for _, a := range h.stepTokens() {
			if !accessors[a] {
				unknown = append(unknown, "token accessor "+a)
			}
		}
		alive := h.list("sys/leases/lookup/database/creds/orders-read")
		for _, id := range alive {
			if !leases["database/creds/orders-read/"+id] {
				unknown = append(unknown, "lease "+id)
			}
		}
		roles := h.roles()
		for name, until := range roles {
			if ended[holders[name]] {
				unknown = append(unknown, "database role "+name+" of a credential that has ended")
			}
			if until.IsZero() || time.Until(until) > time.Hour {
				unknown = append(unknown, "database role "+name+" without an end")
			}
		}
		// Vault whose caller goes while it makes a role can leave the role
		// without a lease. Its password never left Vault, and it has an end.
		unleased = len(roles) - len(alive)
		return len(unknown) == 0
	})
	h.t.Logf("%d database roles that Vault left without a lease", unleased)
	for _, u := range unknown {
		h.t.Error("alive, and not on record: " + u)
	}
}

func (h *house) list(path string) []string {
	s, err := h.vault.Root.Logical().ListWithContext(h.t.Context(), path)
	if err != nil {
		h.t.Fatal(err)
	}
	if s == nil {
		return nil
	}
	var keys []string
	for _, k := range s.Data["keys"].([]any) {
		keys = append(keys, k.(string))
	}
	return keys
}

// stepTokens lists the accessors of live tokens that were made for steps.
func (h *house) stepTokens() []string {
	var steps []string
	for _, a := range h.list("auth/token/accessors") {
		s, err := h.vault.Root.Auth().Token().LookupAccessorWithContext(h.t.Context(), a)
		if err != nil {
			continue // gone since it was listed
		}
		if meta, ok := s.Data["meta"].(map[string]any); ok && meta["request"] != nil {
			steps = append(steps, a)
		}
	}
	return steps
}

// roles lists the database roles that Vault made, and when each ends.
func (h *house) roles() map[string]time.Time {
	conn, err := pgx.Connect(h.t.Context(), h.dsn)
	if err != nil {
		h.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(h.t.Context(), `SELECT rolname, coalesce(rolvaliduntil, 'epoch') FROM pg_roles WHERE rolname LIKE 'v-%'`)
	if err != nil {
		h.t.Fatal(err)
	}
	roles := map[string]time.Time{}
	var name string
	var until time.Time
	_, err = pgx.ForEachRow(rows, []any{&name, &until}, func() error {
		if until.Unix() == 0 {
			until = time.Time{}
		}
		roles[name] = until
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return roles
}

// connection says how steps reach the database at dsn.
func connection(t *testing.T, dsn string) *scopes.Connection {
	c, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return &scopes.Connection{Host: c.Host, Port: int(c.Port), Database: c.Database}
}

// countersign is this test binary under the name by which it is the program
// itself (see TestMain), race detector included.
func countersign(t *testing.T, args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &exec.Cmd{Path: self, Args: append([]string{"countersign"}, args...)}
}

// freeAddr returns an address of 127.0.0.1 that nobody listens on.
func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// eventually waits up to a minute for ok, looking every 20 ms.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("after a minute still not: %s", what)
}
