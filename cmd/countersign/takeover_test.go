package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

// replicated is a house with two recorders over one PostgreSQL behind one
// address, each with a directory of its own, and one broker.
type replicated struct {
	*house
	server *postgrestest.Server
	dsn    string // the recorders', in the file ledger.dsn
	owner  string // of the schema's owner, in the file owner.dsn
	a, b   *process
}

// newReplicated makes what the house consists of, with the ledger's schema as
// the owner makes it, and starts nothing but Vault and PostgreSQL.
func newReplicated(t *testing.T) *replicated {
	h := &house{t: t, dir: t.TempDir()}
	r := &replicated{house: h}
	var err error
	r.server, err = postgrestest.Start()
	if errors.Is(err, postgrestest.ErrNotInstalled) {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() { _ = r.server.Remove() })
	r.sql(r.server.DSN, "CREATE ROLE recorder LOGIN", "CREATE ROLE owner LOGIN", "CREATE DATABASE ledger ENCODING 'UTF8' TEMPLATE template0 OWNER owner")
	as := func(user string) string {
		u, err := url.Parse(r.server.DSN)
		must(t, err)
		u.User, u.Path = url.User(user), "/ledger"
		return u.String()
	}
	r.owner, r.dsn = as("owner"), as("recorder")
	r.write("owner.dsn", r.owner+"\n")
	r.write("ledger.dsn", r.dsn+"\n")

	set, err := scopes.Parse("demo.yaml", scopes.Demo(nil), "", nil)
	must(t, err)
	vault, prepared := vaulttest.Prepared(t, set, "")
	h.vault = vault
	r.write("catalogue.yaml", string(scopes.Demo(nil)))
	r.write("vault-token", prepared.BrokerToken)
	r.cli("key", "generate", "log", "--name", "crash.example/log", "--out", r.file("log.key"))
	r.cli("key", "generate", "identity", "--out", r.file("identity.key"))
	r.cli("key", "generate", "privacy", "--out", r.file("privacy.key"))
	vkey := r.cli("key", "show", r.file("log.key"))
	r.write("log.pub", vkey+"\n")
	h.logKey, err = store.NewLogVerifier(vkey)
	must(t, err)
	token := func(tokens, role, name string, more ...string) string {
		return r.cli(append([]string{"token", "create", "--file", r.file(tokens), "--role", role, "--name", name}, more...)...)
	}
	h.reviewer = token("recorder-tokens", "reviewer", "reviewer")
	r.write("writer-token", token("recorder-tokens", "writer", "broker-1"))
	h.caller = token("broker-tokens", "orchestrator", "demo", "--owner", "user:ben")

	aAddr, bAddr, serveAddr := freeAddr(t), freeAddr(t), freeAddr(t)
	r.a = h.process("recorder-a", "http://"+aAddr, "record", "--config", r.file("a.yaml"))
	r.b = h.process("recorder-b", "http://"+bAddr, "record", "--config", r.file("b.yaml"))
	front := frontOf(t, aAddr, bAddr)
	h.recorder = &process{h: h, name: "recorder", url: "http://" + front}
	h.people = "http://localhost:" + strings.TrimPrefix(front, "127.0.0.1:")
	provider := peoplesProvider(t, h.people, r.file("catalogue.yaml"))
	for name, addr := range map[string]string{"a": aAddr, "b": bAddr} {
		r.write(name+".yaml", fmt.Sprintf(`
listen: {addr: %q}
dir: %q
postgres_file: %q
standby: true
keys_file: %q
log_key: %q
privacy_key: %q
tokens: %q
grace: %s
publish: 200ms
`, addr, r.file(name), r.file("ledger.dsn"), r.file("details-keys.db"), r.file("log.key"), r.file("privacy.key"), r.file("recorder-tokens"), graceInTests)+provider)
	}
	r.write("serve.yaml", fmt.Sprintf(`
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
`, serveAddr, "http://"+serveAddr, r.file("identity.key"), r.file("privacy.key"), r.file("catalogue.yaml"),
		h.recorder.url, r.file("writer-token"), vkey, r.file("broker-head"), vault.Addr, r.file("vault-token"), r.file("broker-tokens"), graceInTests))
	h.broker = h.process("broker", "http://"+serveAddr, "serve", "--config", r.file("serve.yaml"))
	return r
}

func (r *replicated) file(name string) string { return filepath.Join(r.dir, name) }

func (r *replicated) write(name, text string) {
	r.t.Helper()
	must(r.t, os.WriteFile(r.file(name), []byte(text), 0o600))
}

func (r *replicated) cli(args ...string) string {
	r.t.Helper()
	out, err := countersign(r.t, args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("countersign %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (r *replicated) sql(dsn string, statements ...string) {
	r.t.Helper()
	c, err := pgx.Connect(r.t.Context(), dsn)
	must(r.t, err)
	defer c.Close(context.Background())
	for _, s := range statements {
		if _, err := c.Exec(r.t.Context(), s); err != nil {
			r.t.Fatalf("%s: %v", s, err)
		}
	}
}

// init makes the schema as docs/operations.md has it.
func (r *replicated) init() {
	r.t.Helper()
	r.cli("ledger", "init", "--postgres", r.file("owner.dsn"), "--role", "recorder")
}

// follow gives the second recorder the head file of the first before its first
// start, as docs/operations.md asks for.
func (r *replicated) follow() {
	r.t.Helper()
	head, err := os.ReadFile(r.file("a/head"))
	must(r.t, err)
	must(r.t, os.MkdirAll(r.file("b"), 0o700))
	r.write("b/head", string(head))
}

// term ends p by SIGTERM and wants it to end in order.
func (p *process) term() {
	p.h.t.Helper()
	if code := p.ends(func(cmd *os.Process) { _ = cmd.Signal(syscall.SIGTERM) }); code != 0 {
		p.h.t.Fatalf("%s ended after SIGTERM with exit status %d", p.name, code)
	}
}

// ends waits until p has ended, which by may have it do, and returns its exit
// status.
func (p *process) ends(by func(*os.Process)) int {
	p.h.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if by != nil {
		by(p.cmd.Process)
	}
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.h.t.Fatalf("%s has not ended after a minute", p.name)
	}
	code := p.cmd.ProcessState.ExitCode()
	p.cmd = nil
	return code
}

// said counts how often p has logged msg.
func (p *process) said(msg string) int {
	b, err := os.ReadFile(p.log.Name())
	must(p.h.t, err)
	return strings.Count(string(b), `"msg":"`+msg+`"`)
}

func (p *process) ready() bool {
	res, err := http.Get(p.url + "/readyz")
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// stands starts p beside an active recorder, and wants it to say so to whoever
// asks it.
func (p *process) stands() {
	p.h.t.Helper()
	said, recording := p.said("standing by"), p.said("recording")
	p.run()
	eventually(p.h.t, p.name+" stands by", func() bool { return p.said("standing by") == said+1 })
	for _, call := range [][2]string{{"GET", "/healthz"}, {"GET", "/readyz"}, {"GET", "/history"}, {"GET", "/checkpoint"}, {"GET", "/"}, {"POST", "/append"}} {
		req, err := http.NewRequest(call[0], p.url+call[1], strings.NewReader("{}"))
		must(p.h.t, err)
		req.Header.Set("Authorization", "Bearer "+p.h.reviewer)
		res, err := http.DefaultClient.Do(req)
		must(p.h.t, err)
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		must(p.h.t, err)
		if call[1] == "/healthz" {
			if res.StatusCode != 200 {
				p.h.t.Errorf("%s stands by, and %s is answered %d %s", p.name, call[1], res.StatusCode, body)
			}
		} else if res.StatusCode != 503 || !strings.Contains(string(body), "problems/ledger-unavailable") || !res.Close {
			p.h.t.Errorf("%s stands by, and %s is answered %d %s, connection closed %t", p.name, call[1], res.StatusCode, body, res.Close)
		}
	}
	if n := p.said("recording"); n != recording {
		p.h.t.Errorf("%s took over from an active recorder", p.name)
	}
}

// frontOf is the one address of several servers: each connection goes to the
// one that is ready when it is made, and is closed where none is. A connection
// stays where it is, as those through a load balancer do.
func frontOf(t *testing.T, servers ...string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ask := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	ctx, cancel := context.WithCancel(context.Background())
	var pipes sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		cancel()
		pipes.Wait()
	})
	through := func(conn net.Conn) {
		defer conn.Close()
		for _, addr := range servers {
			res, err := ask.Get("http://" + addr + "/readyz")
			if err != nil {
				continue
			}
			res.Body.Close()
			if res.StatusCode != http.StatusOK {
				continue
			}
			to, err := net.Dial("tcp", addr)
			if err != nil {
				return
			}
			defer to.Close()
			stop := context.AfterFunc(ctx, func() { conn.Close(); to.Close() })
			defer stop()
			pipes.Go(func() {
				_, _ = io.Copy(to, conn)
				to.Close()
			})
			_, _ = io.Copy(conn, to)
			return
		}
	}
	pipes.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			pipes.Go(func() { through(conn) })
		}
	})
	return l.Addr().String()
}

// load is callers that ask for one credential after the other, each again under
// its key until it is answered.
type load struct {
	h    *house
	stop atomic.Bool
	wg   sync.WaitGroup
	lost atomic.Int64 // answered with a conflict: granted, and never received
}

func (h *house) load(callers int) *load {
	l := &load{h: h}
	for range callers {
		l.wg.Go(func() {
			for !l.stop.Load() && !h.t.Failed() {
				n := h.serial.Add(1)
				step, key := fmt.Sprintf("step-%d", n), fmt.Sprintf("key-%d", n)
				eventually(h.t, step+" is answered", func() bool {
					switch status := h.ask(step, "identity:step", key); status {
					case http.StatusCreated:
						return true
					case http.StatusConflict:
						l.lost.Add(1)
						return true
					case 0, http.StatusServiceUnavailable:
					default:
						h.t.Errorf("%s is answered with %d", step, status)
						return true
					}
					return h.t.Failed()
				})
			}
		})
	}
	h.t.Cleanup(l.end)
	return l
}

// end waits until everybody is answered.
func (l *load) end() {
	l.stop.Store(true)
	l.wg.Wait()
}

func (h *house) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.received)
}

// more waits until n further credentials are received.
func (h *house) more(n int) {
	h.t.Helper()
	was := h.count()
	eventually(h.t, fmt.Sprintf("%d more credentials are received", n), func() bool { return h.count() >= was+n || h.t.Failed() })
	if h.t.Failed() {
		h.t.FailNow()
	}
}

// takesOver waits until p records after what was done to the other at since,
// and callers are answered again.
func (r *replicated) takesOver(what string, p *process, since time.Time) {
	r.t.Helper()
	eventually(r.t, p.name+" takes over", p.ready)
	ready := time.Since(since)
	r.more(1)
	answered := time.Since(since)
	r.more(20)
	r.t.Logf("%s: %s was ready after %s, the first credential was there after %s", what, p.name, ready.Round(time.Millisecond), answered.Round(time.Millisecond))
}

// whole checks the record against what callers hold, as it is served and as it
// lies at each place.
func (r *replicated) whole(l *load, places ...string) {
	r.t.Helper()
	l.end()
	http.DefaultClient.CloseIdleConnections() // some lead to who was active before
	r.settle()
	all := r.history()
	ids, issued, live := map[string]int{}, map[string]int{}, map[string]map[string]bool{}
	for i, e := range all {
		if was, ok := ids[e.ID]; ok {
			r.t.Errorf("entry %s is on record at %d and at %d", e.ID, was, i)
		}
		ids[e.ID] = i
		switch e.Type {
		case store.CredentialIssued:
			d, err := store.DetailsAs[store.IssuedDetails](e)
			must(r.t, err)
			if was, ok := issued[d.Intent]; ok {
				r.t.Errorf("the intent %s is issued at %d and at %d", d.Intent, was, i)
			}
			issued[d.Intent] = i
			if live[e.Step] == nil {
				live[e.Step] = map[string]bool{}
			}
			if live[e.Step][d.Intent] = true; len(live[e.Step]) > 1 {
				r.t.Errorf("step %s, which asked under one key, holds %d live credentials", e.Step, len(live[e.Step]))
			}
		case store.CredentialRevoked, store.CredentialExpired:
			d, err := store.DetailsAs[store.ClosedDetails](e)
			must(r.t, err)
			delete(live[e.Step], d.Intent)
		}
	}
	held := map[int64]string{}
	for _, c := range r.received {
		if was, ok := held[c.Ledger.Index]; ok {
			r.t.Errorf("%s and %s were both answered with entry %d", was, c.Request, c.Ledger.Index)
		}
		held[c.Ledger.Index] = c.Request
		if c.Ledger.Index >= int64(len(all)) {
			r.t.Errorf("%s: entry %d of its answer is not in the ledger", c.Request, c.Ledger.Index)
			continue
		}
		if e := all[c.Ledger.Index]; e.Type != store.CredentialIssued || e.Request != c.Request || e.Step != c.step || e.Action != c.Scope {
			r.t.Errorf("%s: entry %d is %s of %s", c.Request, c.Ledger.Index, e.Type, e.Request)
		}
	}
	r.verify()
	for _, place := range places {
		db, err := evidence.OpenDatabase(place)
		must(r.t, err)
		report, err := evidence.Verify(r.t.Context(), db, evidence.Options{Log: r.logKey, Since: r.head})
		must(r.t, err)
		must(r.t, db.Close())
		if !report.OK() || report.Leaves < int64(len(all)) {
			r.t.Errorf("verify %s: %d of %d entries hashed: %v", place, report.Leaves, len(all), report.Findings)
		}
	}
	r.t.Logf("%d entries, %d issued, %d received, %d granted and never received", len(all), len(issued), len(r.received), l.lost.Load())
}

// policies counts what was on record to be in force.
func (r *replicated) policies() (n int) {
	r.t.Helper()
	http.DefaultClient.CloseIdleConnections()
	for _, e := range r.history() {
		if e.Type == store.PolicyLoaded {
			n++
		}
	}
	return n
}

// askedOfPeople has a request wait for people, and returns its approval.
func (r *replicated) askedOfPeople(step string) string {
	r.t.Helper()
	var pending struct{ Approval struct{ ID string } }
	eventually(r.t, "people are asked", func() bool {
		status, body := r.askPeople(step)
		return status == http.StatusAccepted && json.Unmarshal([]byte(body), &pending) == nil
	})
	return pending.Approval.ID
}

func TestAStandbyTakesOverAndNoAcknowledgedIssuanceIsLostOrDoubled(t *testing.T) {
	r := newReplicated(t)
	r.init()
	r.a.start()
	r.follow()
	r.b.stands()
	r.broker.start()
	w := r.load(4)
	r.more(20)
	r.verify() // the head that all that follows has to continue
	approval := r.askedOfPeople("waits")

	at := time.Now()
	r.a.kill()
	r.takesOver("kill -9 of the active recorder", r.b, at)

	// What people were asked before is decided, and minted, after.
	if status, _, body := decide(t, r.people, logIn(t, r.people, "ann"), approval, "approve"); status != http.StatusOK {
		t.Fatalf("deciding after the takeover: %d %s", status, body)
	}
	eventually(t, "the approved credential is handed over", func() bool {
		status, _ := r.askPeople("waits")
		return status == http.StatusCreated
	})

	r.a.stands()
	at = time.Now()
	r.b.term()
	r.takesOver("SIGTERM of the active recorder", r.a, at)

	// Cut off from its server, the active one hands over and stands by itself. The
	// connections that it has already lead its callers away.
	r.b.stands()
	said := r.a.said("standing by")
	at = time.Now()
	r.sql(r.server.DSN, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'recorder' AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)")
	r.takesOver("the active recorder's session was ended", r.b, at)
	eventually(t, "the one that was cut off stands by", func() bool { return r.a.said("standing by") == said+1 })

	// Standing by, it takes a new catalogue all the same: announced when it records.
	r.write("catalogue.yaml", string(scopes.Demo(nil))+"# read again\n")
	must(t, r.a.cmd.Process.Signal(syscall.SIGHUP))
	eventually(t, "the catalogue is read again", func() bool { return r.a.said("reloaded") == 1 })
	policies := r.policies()

	at = time.Now()
	r.b.kill()
	r.takesOver("kill -9 of the second recorder", r.a, at)
	if n := r.policies(); n != policies+1 {
		t.Errorf("%d policies on record, want %d with the one that was read meanwhile", n, policies+1)
	}
	r.whole(w, r.dsn, r.file("ledger.dsn"))
	r.a.term()
	r.broker.term()
}

func TestRecordersOutliveAKilledPostgreSQLAndLoseNothing(t *testing.T) {
	r := newReplicated(t)
	r.init()
	r.a.start()
	r.broker.start()
	w := r.load(4)
	r.more(20)
	r.verify()
	revive := func() time.Time {
		t.Helper()
		r.server.Kill()
		eventually(t, "nobody says that it could record", func() bool { return !r.a.ready() && !r.b.ready() })
		at := time.Now()
		must(t, r.server.Restart())
		return at
	}
	r.takesOver("kill -9 of PostgreSQL, since it is started again", r.a, revive())
	// Killed again while the recorder opens its ledger.
	for range 3 {
		revive()
		time.Sleep(random(1500 * time.Millisecond)) // any moment will do
	}
	r.takesOver("kill -9 of PostgreSQL, since it is started again", r.a, revive())

	// And sessions that end one by one, those that read too.
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(random(300 * time.Millisecond)) {
		r.sql(r.server.DSN, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'recorder' AND random() < 0.5")
	}
	r.takesOver("sessions ended", r.a, time.Now())

	r.follow()
	r.b.stands()
	at := revive()
	eventually(t, "one of two takes over", func() bool { return r.a.ready() || r.b.ready() })
	active, other := r.a, r.b
	if r.b.ready() {
		active, other = r.b, r.a
	}
	r.takesOver("kill -9 of PostgreSQL under two recorders", active, at)
	if other.ready() {
		t.Error("both recorders are active")
	}
	r.whole(w, r.dsn)
	// They ran all the time, and end in order without their server, too.
	r.a.term()
	r.server.Kill()
	r.b.term()
}

func TestAMovedLedgerGoesOnInTheOtherEngineAndBack(t *testing.T) {
	r := newReplicated(t)
	config, err := os.ReadFile(r.file("a.yaml"))
	must(t, err)
	kept := strings.NewReplacer(fmt.Sprintf("postgres_file: %q\n", r.file("ledger.dsn")), "", "standby: true\n", "")
	r.write("sqlite.yaml", kept.Replace(string(config)))
	sqlite := r.process("recorder-sqlite", r.a.url, "record", "--config", r.file("sqlite.yaml"))
	sqlite.start()
	r.broker.start()
	w := r.load(4)
	r.more(20)
	r.verify()
	approval := r.askedOfPeople("waits")

	// The load goes on all the time, so each copy is of what its recorder left.
	moved := func(from *process, source, target string) string {
		t.Helper()
		if out, err := countersign(t, "ledger", "copy", source, target, "--key", r.file("log.pub")).CombinedOutput(); err == nil || !strings.Contains(string(out), "stop the recorder first") {
			t.Fatalf("a ledger is copied under its recorder: %v: %s", err, out)
		}
		from.term()
		out := r.cli("ledger", "copy", source, target, "--key", r.file("log.pub"))
		_, note, ok := strings.Cut(out, "\n\n")
		if !ok || !strings.HasPrefix(out, "copied and verified") {
			t.Fatal(out)
		}
		return note
	}
	continues := func(p *process, note string) {
		t.Helper()
		head, err := os.ReadFile(r.file("a/head"))
		must(t, err)
		// The recorder's own head file is of the copy, to the last entry.
		if !strings.HasPrefix(string(head), strings.Join(strings.SplitAfter(note, "\n")[:3], "")) {
			t.Errorf("copied up to\n%s\nand the head file says\n%s", note, head)
		}
		at := time.Now()
		p.start()
		r.takesOver("moved", p, at)
		r.verify()
	}
	r.init()
	note := moved(sqlite, r.file("a"), r.file("ledger.dsn"))
	continues(r.a, note)
	if status, _, body := decide(t, r.people, logIn(t, r.people, "ann"), approval, "approve"); status != http.StatusOK {
		t.Fatalf("deciding in the copy: %d %s", status, body)
	}
	must(t, os.Remove(r.file("a/ledger.db"))) // or the way back is refused
	note = moved(r.a, r.file("ledger.dsn"), r.file("a"))
	continues(sqlite, note)
	eventually(t, "what was decided in the copy is handed over", func() bool {
		status, _ := r.askPeople("waits")
		return status == http.StatusCreated
	})
	r.whole(w, r.file("a"))

	// What was left in PostgreSQL is older than what its recorder has signed.
	sqlite.term()
	r.a.run()
	if code := r.a.ends(nil); code != 1 {
		t.Errorf("a recorder runs on what it has moved away from: exit status %d", code)
	}
	r.broker.term()
}

func TestAnAlteredLedgerInPostgreSQLStopsTheActiveRecorderAndTheOneThatStandsBy(t *testing.T) {
	r := newReplicated(t)
	r.init()
	for _, name := range []string{"a.yaml", "b.yaml"} {
		config, err := os.ReadFile(r.file(name))
		must(t, err)
		r.write(name, strings.Replace(string(config), "\npublish: ", "\nrecheck: 200ms\npublish: ", 1))
	}
	r.a.start()
	r.follow()
	r.a.term()
	const unlock, lock = "ALTER TABLE countersign.entries DISABLE TRIGGER entries_keep", "ALTER TABLE countersign.entries ENABLE ALWAYS TRIGGER entries_keep"
	for name, x := range map[string]struct {
		alter, repair []string
		want          string
	}{
		"an entry, under its triggers": {
			[]string{unlock, "UPDATE countersign.entries SET body = replace(body, 'broker-1', 'broker-2') WHERE idx = 0", lock},
			[]string{unlock, "UPDATE countersign.entries SET body = replace(body, 'broker-2', 'broker-1') WHERE idx = 0", lock},
			"ledger mismatch: entry 0 ",
		},
		"a trigger that does not fire": {[]string{unlock}, []string{lock}, "ledger mismatch: "},
	} {
		t.Run(name, func(t *testing.T) {
			r.a.start()
			r.b.stands()
			said := r.b.said("recording")
			r.sql(r.owner, x.alter...)
			for _, p := range []*process{r.a, r.b} { // the second when it is about to take over
				code := p.ends(nil)
				b, err := os.ReadFile(p.log.Name())
				must(t, err)
				last := strings.TrimSpace(string(b))
				last = last[strings.LastIndexByte(last, '\n')+1:]
				if code != 1 || !strings.HasPrefix(last, "countersign: ") || !strings.Contains(last, x.want) {
					t.Errorf("%s: exit status %d, last said: %s", p.name, code, last)
				}
			}
			r.b.run() // nor does it start again
			if code := r.b.ends(nil); code != 1 || r.b.said("recording") != said {
				t.Errorf("it recorded in the altered ledger: exit status %d", code)
			}
			r.sql(r.owner, x.repair...)
			r.a.start()
			r.a.term()
		})
	}
}
