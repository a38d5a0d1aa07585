package vaultaudit

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// hmacOf is what the audit device of these tests makes of a value.
func hmacOf(s string) string {
	m := hmac.New(sha256.New, []byte("salt"))
	m.Write([]byte(s))
	return "hmac-sha256:" + hex.EncodeToString(m.Sum(nil))
}

// house is a ledger, and an audit log beside it.
type house struct {
	t      *testing.T
	ledger *ledger.Ledger
	dir    string
	log    string       // the audit log
	ahead  atomic.Int64 // by how much the follower's clock is ahead, in ns
	asked  atomic.Int64 // hashes asked for
	down   atomic.Bool  // Vault answers nothing
	n      int
}

func newHouse(t *testing.T) *house {
	t.Helper()
	dir := t.TempDir()
	skey, vkey, err := note.GenerateKey(rand.Reader, "vault-audit.example/log")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "keys"), []byte(skey+"\n"+vkey), 0o600))
	return houseAt(t, dir)
}

// houseAt opens the house that is in dir.
func houseAt(t *testing.T, dir string) *house {
	t.Helper()
	l, err := openLedger(dir)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return &house{t: t, ledger: l, dir: dir, log: filepath.Join(dir, "audit.log")}
}

func openLedger(dir string) (*ledger.Ledger, error) {
	keys, err := os.ReadFile(filepath.Join(dir, "keys"))
	if err != nil {
		return nil, err
	}
	skey, vkey, _ := strings.Cut(string(keys), "\n")
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, err
	}
	return ledger.Open(context.Background(), ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1})
}

func (h *house) options() Options {
	return Options{
		Ledger: h.ledger, Writer: "recorder", Agent: "spiffe://example/recorder/recorder", Log: "vault-audit.example/log",
		Hash: func(_ context.Context, in string) (string, error) {
			if h.down.Load() {
				return "", errors.New("connection refused")
			}
			h.asked.Add(1)
			return hmacOf(in), nil
		},
		Poll: 5 * time.Millisecond, Now: func() time.Time { return time.Now().Add(time.Duration(h.ahead.Load())) },
	}
}

func (h *house) file() Options {
	o := h.options()
	o.File, o.Cursor = h.log, filepath.Join(h.dir, "cursor")
	return o
}

func (h *house) open(o Options) *Follower {
	h.t.Helper()
	f, err := Open(o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { f.Close() })
	return f
}

func (h *house) write(lines ...string) {
	h.t.Helper()
	f, err := os.OpenFile(h.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Join(lines, "")); err != nil {
		h.t.Fatal(err)
	}
}

// cred is a credential of these tests: a token scope's.
type cred struct {
	request, intent, accessor string
	entry                     store.Entry
	path                      string
}

// request puts a request and its intent on record.
func (h *house) request(kind, path string) *cred {
	h.t.Helper()
	h.n++
	c := &cred{request: fmt.Sprintf("req_%d", h.n), intent: store.NewID(), accessor: fmt.Sprintf("accessor-%d", h.n), path: path}
	c.entry = store.Entry{V: store.Version, Agent: "spiffe://example/step", Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: c.request, Resource: "vault://secret", Action: "demo",
		Decision: &store.Decision{Outcome: store.Allow, Policy: "sha256:x", Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}}
	g := store.Grant{Scope: "demo", Engine: kind, Role: "countersign-demo", TTL: store.Duration(10 * time.Minute), Revocable: true, Path: path}
	if path != "" {
		g.Method = "read"
	}
	h.append(c, store.StepRequested, "", store.RequestedDetails{Grant: g, Join: store.NewID()})
	h.append(c, store.CredentialIssuing, c.intent, store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(time.Now().Add(10 * time.Minute))})
	return c
}

func (h *house) append(c *cred, t store.Type, id string, details any) {
	h.t.Helper()
	s := &store.Submission{Entry: c.entry}
	s.ID, s.Type, s.WriterTime = id, t, store.At(time.Now())
	if id == "" {
		s.ID = store.NewID()
	}
	s.SetDetails(details)
	b, err := s.Marshal()
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.ledger.Append(h.t.Context(), ledger.Author{Name: "broker-1"}, [][]byte{b}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) issue(c *cred) *cred {
	h.append(c, store.CredentialIssued, "", store.IssuedDetails{Intent: c.intent, Attempt: 1, Kind: "vault_token", Revocable: true, Accessor: c.accessor, Expires: store.At(time.Now().Add(9 * time.Minute))})
	return c
}

func (h *house) issued() *cred { return h.issue(h.request("token", "")) }

// lineOf is a line as Vault writes it, with members that nobody reads left out.
func lineOf(typ, id string, at time.Time, op, path, accessor string, meta map[string]string, more map[string]any) string {
	l := map[string]any{
		"time": at.UTC().Format(time.RFC3339Nano), "type": typ,
		"auth":    map[string]any{"accessor": hmacOf(accessor), "display_name": "token-countersign-step-1", "metadata": meta, "policies": []string{"demo"}, "token_type": "service"},
		"request": map[string]any{"id": id, "operation": op, "path": path, "namespace": map[string]any{"id": "root"}, "client_token_accessor": hmacOf(accessor), "mount_type": "kv"},
	}
	for k, v := range more {
		l[k] = v
	}
	b, err := json.Marshal(l, json.Deterministic(true))
	if err != nil {
		panic(err)
	}
	return string(b) + "\n"
}

func (c *cred) meta() map[string]string {
	return map[string]string{"request": c.request, "intent": c.intent, "run": "run-1", "step": "step-1", "orchestrator": "demo"}
}

// use is the two lines of one request of c.
func (c *cred) use(id string, at time.Time) string {
	return lineOf("request", id, at, "read", "secret/data/demo", c.accessor, c.meta(), nil) +
		lineOf("response", id, at.Add(time.Millisecond), "read", "secret/data/demo", c.accessor, c.meta(), map[string]any{"response": map[string]any{"data": map[string]any{"x": hmacOf("y")}}})
}

// made is the line of the making of a token.
func made(id string, at time.Time, accessor string, meta map[string]string) string {
	l := lineOf("response", id, at, "update", "auth/token/create/countersign-demo", "broker", nil, map[string]any{
		"auth":     map[string]any{"accessor": hmacOf("broker"), "display_name": "token"},
		"response": map[string]any{"auth": map[string]any{"accessor": hmacOf(accessor), "metadata": meta}},
	})
	return l
}

// entries are those on record of a type.
func (h *house) entries(t store.Type) (out []*store.Entry) {
	h.t.Helper()
	for q := (ledger.Query{Type: string(t)}); ; {
		page, err := h.ledger.History(h.t.Context(), q)
		must(h.t, err)
		for _, e := range page.Entries {
			p, err := store.ParseLeaf(e.Entry)
			must(h.t, err)
			out = append(out, p)
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			return out
		}
	}
}

// alerts counts those on record by what they are about.
func (h *house) alerts() map[string]int {
	h.t.Helper()
	out := map[string]int{}
	for _, e := range h.entries(store.AlertRaised) {
		d, err := store.DetailsAs[store.AlertDetails](e)
		if err != nil || d.Source != store.ViaVaultAudit || d.Ref == "" || e.Writer != "recorder" {
			h.t.Errorf("%s (%v)", e.Details, err)
		}
		out[d.Alert]++
	}
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within two minutes: %s", what)
}

// read waits until the follower has read n lines of ours and none waits.
func (h *house) read(f *Follower, n int64) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("%d lines are read", n), func() bool {
		c := f.Counts()
		if c.Malformed > 0 || c.Gaps > 0 {
			h.t.Fatalf("%+v", c)
		}
		return c.Lines >= n && c.Waiting == 0
	})
	// The cursor is written after the record.
	if err := f.Close(); err != nil {
		h.t.Fatal(err)
	}
	if c := f.Counts(); c.Lines != n {
		h.t.Fatalf("%+v, wanted %d lines", c, n)
	}
}

func TestEachUseIsOnRecordOnceHoweverOftenTheLogIsRead(t *testing.T) {
	h := newHouse(t)
	a, b := h.issued(), h.issued()
	now := time.Now()
	h.write(made("m-1", now, a.accessor, a.meta()), made("m-2", now, b.accessor, b.meta()))
	for i := range 20 {
		h.write(a.use(fmt.Sprintf("a-%d", i), now.Add(time.Duration(i)*time.Millisecond)))
		if i%2 == 0 {
			h.write(b.use(fmt.Sprintf("b-%d", i), now.Add(time.Duration(i)*time.Millisecond)))
		}
	}
	h.write(`{"time":"2026-01-01T00:00:00Z","type":"response","auth":{"accessor":"x"},"request":{"id":"other","operation":"read","path":"secret/data/other"}}` + "\n")
	f := h.open(h.file())
	h.read(f, 32)
	check := func() {
		t.Helper()
		uses := map[string]int{}
		for _, e := range h.entries(store.CredentialUsed) {
			d, err := store.DetailsAs[store.UsedDetails](e)
			if err != nil || d.Via != store.ViaVaultAudit || d.By != "vault" || d.Use != "read secret/data/demo" || e.Agent != a.entry.Agent || e.Writer != "recorder" || e.Run != "run-1" || e.Resource != a.entry.Resource {
				t.Fatalf("%+v %s (%v)", e, e.Details, err)
			}
			uses[d.Intent+" "+e.Request]++
		}
		if uses[a.intent+" "+a.request] != 20 || uses[b.intent+" "+b.request] != 10 || len(uses) != 2 {
			t.Fatal(uses)
		}
		if n := h.alerts(); len(n) > 0 {
			t.Fatal(n)
		}
	}
	check()
	if c := f.Counts(); c.Uses != 30 || c.Mints != 2 {
		t.Errorf("%+v", c)
	}
	size := h.ledger.Size()
	h.read(h.open(h.file()), 0) // goes on where it was
	if err := os.Remove(filepath.Join(h.dir, "cursor")); err != nil {
		t.Fatal(err)
	}
	h.read(h.open(h.file()), 32) // from the start
	if h.ledger.Size() != size {
		t.Errorf("reading the log again made %d entries of %d", h.ledger.Size(), size)
	}
	// A crash after the record and before the cursor: the older one is there.
	older, err := os.ReadFile(filepath.Join(h.dir, "cursor"))
	if err != nil {
		t.Fatal(err)
	}
	h.write(a.use("a-20", now.Add(time.Second)))
	h.read(h.open(h.file()), 1)
	if err := os.WriteFile(filepath.Join(h.dir, "cursor"), older, 0o600); err != nil {
		t.Fatal(err)
	}
	h.read(h.open(h.file()), 1)
	if n := len(h.entries(store.CredentialUsed)); n != 31 {
		t.Errorf("%d uses", n)
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("COUNTERSIGN_TEST_FOLLOW"); dir != "" {
		followForever(dir)
	}
	os.Exit(m.Run())
}

// followForever follows the audit log of the house in dir until it is killed.
func followForever(dir string) {
	l, err := openLedger(dir)
	if err == nil {
		h := &house{ledger: l, dir: dir, log: filepath.Join(dir, "audit.log")}
		if _, err = Open(h.file()); err == nil {
			time.Sleep(time.Minute)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestAFollowerThatIsKilledRecordsEachUseOnce(t *testing.T) {
	h := newHouse(t)
	creds := []*cred{h.issued(), h.issued(), h.issued()}
	must(t, h.ledger.Close())
	const uses = 400 * kills
	now := time.Now()
	for i := range uses {
		h.write(creds[i%len(creds)].use(fmt.Sprintf("r-%d", i), now.Add(time.Duration(i)*time.Microsecond)))
	}
	read := func() int64 {
		p, _ := (&cursor{filepath.Join(h.dir, "cursor"), "vault-audit.example/log"}).read()
		return p.Next
	}
	size, err := os.Stat(h.log)
	must(t, err)
	killed, midway := 0, 0
	for ; killed < kills && read() < size.Size(); killed++ {
		cmd := exec.Command(os.Args[0])
		cmd.Env, cmd.Stderr = append(os.Environ(), "COUNTERSIGN_TEST_FOLLOW="+h.dir), os.Stderr
		must(t, cmd.Start())
		// Killed some time after it has moved on, so that every run gets further.
		was := read()
		eventually(t, "the follower moves on", func() bool { return read() > was })
		time.Sleep(time.Duration(killed%7) * time.Millisecond)
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if read() < size.Size() {
			midway++
		}
	}
	if midway == 0 {
		t.Error("it was never killed on the way")
	}
	h = houseAt(t, h.dir)
	f := h.open(h.file())
	eventually(t, "the rest is read", func() bool { return read() == size.Size() })
	must(t, f.Close())
	seen := map[string]bool{}
	for _, e := range h.entries(store.CredentialUsed) {
		if seen[e.ID] {
			t.Fatal("twice: " + e.ID)
		}
		seen[e.ID] = true
	}
	if len(seen) != uses || len(h.alerts()) > 0 {
		t.Errorf("%d uses on record, there were %d; alerts %v", len(seen), uses, h.alerts())
	}
	t.Logf("killed %d times, %d of them on the way", killed, midway)
}

func TestAFailedRequestIsAUseWithItsOutcome(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	h.write(lineOf("response", "r-1", time.Now(), "read", "secret/data/other", c.accessor, c.meta(), map[string]any{"error": "1 error occurred:\n\t* permission denied\n\n"}),
		lineOf("response", "r-2", time.Now(), "update", "database/x", c.accessor, c.meta(), map[string]any{"error": "value 'secret' is not allowed"}))
	h.read(h.open(h.file()), 2)
	used, done := h.entries(store.CredentialUsed), h.entries(store.UseFinished)
	if len(used) != 2 || len(done) != 2 {
		t.Fatal(len(used), len(done))
	}
	for i, want := range []string{"permission-denied", "error"} {
		d, err := store.DetailsAs[store.UseFinishedDetails](done[i])
		if err != nil || len(d.Outcomes) != 1 || d.Outcomes[0].Use != used[i].ID || d.Outcomes[0].Error != want {
			t.Errorf("%s (%v)", done[i].Details, err)
		}
	}
}

func TestTheMintsOwnCallsAreNoUses(t *testing.T) {
	h := newHouse(t)
	c := h.request("database", "database/creds/orders")
	at := time.Now()
	h.write(made("m-1", at, c.accessor, c.meta()), lineOf("response", "r-1", at, "read", c.path, c.accessor, c.meta(), nil))
	f := h.open(h.file())
	eventually(t, "both wait", func() bool { return f.Counts().Waiting == 2 })
	h.issue(c)
	h.read(f, 2)
	if n := len(h.entries(store.CredentialUsed)); n != 0 {
		t.Errorf("%d uses", n)
	}
	// Later, and elsewhere, it is one.
	h.write(lineOf("response", "r-2", time.Now().Add(time.Minute), "read", c.path, c.accessor, c.meta(), nil), lineOf("response", "r-3", time.Now(), "read", "database/creds/other", c.accessor, c.meta(), nil))
	h.read(h.open(h.file()), 2)
	if n := len(h.entries(store.CredentialUsed)); n != 2 {
		t.Errorf("%d uses", n)
	}
	// One whose child was dropped: what is made for its intent afterwards is not its.
	e := h.request("pki", "pki/sign/service")
	h.write(made("m-3", time.Now(), e.accessor, e.meta()))
	h.append(e, store.CredentialIssued, "", store.IssuedDetails{Intent: e.intent, Attempt: 1, Kind: "pki", Expires: store.At(time.Now().Add(9 * time.Minute))})
	h.write(made("m-4", time.Now().Add(time.Minute), "accessor-x", e.meta()))
	h.read(h.open(h.file()), 2)
	if n := h.alerts(); n[store.AlertMint] != 1 || len(n) != 1 {
		t.Errorf("%v", n)
	}
	// A mint that failed: its calls are accounted for by the intent.
	d := h.request("database", "database/creds/orders")
	h.append(d, store.CredentialFailed, "", store.FailedDetails{Intent: d.intent, Attempt: 1, Problem: "vault-unavailable", Stage: "secret"})
	h.write(made("m-2", time.Now(), d.accessor, d.meta()), lineOf("response", "r-4", time.Now(), "read", d.path, d.accessor, d.meta(), map[string]any{"error": "x"}))
	h.read(h.open(h.file()), 2)
	if n := h.alerts(); n[store.AlertMint] != 1 || len(n) != 1 {
		t.Errorf("%v", n)
	}
}

func TestAMintThatNoIntentAccountsForRaisesAnAlert(t *testing.T) {
	h := newHouse(t)
	good := h.issued()
	at := time.Now()
	none := map[string]string{"request": "req_none", "intent": store.NewID()}
	h.write(
		made("ok", at, good.accessor, good.meta()),
		made("another", at, "accessor-x", good.meta()), // for an intent that gave another token
		strings.ReplaceAll(made("elsewhere", at, good.accessor, good.meta()), "countersign-demo", "countersign-other"), // under another role
		made("unnamed", at, "accessor-y", nil), // for none
		made("strange", at, "accessor-z", map[string]string{"request": "req 1", "intent": good.intent}),
		made("unknown", at, "accessor-0", none), // for one that is not on record, which may still come
	)
	f := h.open(h.file())
	eventually(t, "one waits", func() bool { c := f.Counts(); return c.Waiting == 1 && c.AlertMint == 4 && c.Mints == 1 })
	eventually(t, "the cursor stands before the one that waits", func() bool {
		p, err := (&cursor{filepath.Join(h.dir, "cursor"), "vault-audit.example/log"}).read()
		text, err2 := os.ReadFile(h.log)
		return err == nil && err2 == nil && p.Next > 0 && strings.Contains(string(text[p.Next:]), `"unknown"`) && strings.Count(string(text[p.Next:]), "\n") == 1
	})
	h.ahead.Store(int64(grace))
	h.read(f, 6)
	if n := h.alerts(); n[store.AlertMint] != 5 || len(n) != 1 {
		t.Error(n)
	}
	if err := os.Remove(filepath.Join(h.dir, "cursor")); err != nil {
		t.Fatal(err)
	}
	h.read(h.open(h.file()), 6)
	if n := h.alerts(); n[store.AlertMint] != 5 || len(n) != 1 {
		t.Error(n)
	}
}

func TestAWrappedMintIsAccountedForByTheHashOfItsIntent(t *testing.T) {
	h := newHouse(t)
	c := h.request("token", "")
	h.append(c, store.CredentialIssued, "", store.IssuedDetails{Intent: c.intent, Attempt: 1, Kind: "wrapped", Revocable: true, Accessor: c.accessor, WrappingAccessor: "w", Expires: store.At(time.Now().Add(9 * time.Minute))})
	failed := h.request("token", "")
	h.append(failed, store.CredentialFailed, "", store.FailedDetails{Intent: failed.intent, Attempt: 1, Problem: "vault-unavailable", Stage: "create"})
	wrapped := func(id, intent, accessor string) string {
		return lineOf("response", id, time.Now(), "update", "auth/token/create/countersign-demo", "broker", nil, map[string]any{
			"auth":     map[string]any{"accessor": hmacOf("broker")},
			"request":  map[string]any{"id": id, "operation": "update", "path": "auth/token/create/countersign-demo", "data": map[string]any{"meta": map[string]any{"intent": hmacOf(intent)}}},
			"response": map[string]any{"wrap_info": map[string]any{"accessor": hmacOf("w"), "wrapped_accessor": hmacOf(accessor)}},
		})
	}
	h.ahead.Store(int64(grace))
	h.write(wrapped("w-1", c.intent, c.accessor), wrapped("w-2", store.NewID(), "accessor-x"), wrapped("w-3", c.intent, "accessor-y"), wrapped("w-4", failed.intent, failed.accessor))
	f := h.open(h.file())
	h.read(f, 4)
	if n := h.alerts(); n[store.AlertMint] != 2 || f.Counts().Mints != 2 {
		t.Errorf("%v %+v", n, f.Counts())
	}
}

func TestUsesOfTokensThatAreNotOnRecordRaiseOneAlertEach(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	stranger := *c
	stranger.accessor = "accessor-x"
	hour := time.Now().Truncate(time.Hour)
	for i := range 5 {
		h.write(stranger.use(fmt.Sprintf("r-%d", i), hour.Add(time.Duration(i)*time.Second)))
	}
	h.write(stranger.use("later", hour.Add(-time.Hour))) // in another hour
	h.write(lineOf("response", "strange", hour, "read", "secret/data/demo", "accessor-y", map[string]string{"request": "not an ID", "intent": "x"}, nil))
	h.write(lineOf("response", "login", hour, "update", "auth/token/renew-accessor", "broker", nil, nil)) // a login may be named as ours are
	h.read(h.open(h.file()), 7)
	if n := h.alerts(); n[store.AlertUse] != 3 || len(n) != 1 {
		t.Error(n)
	}
	if n := len(h.entries(store.CredentialUsed)); n != 0 {
		t.Errorf("%d uses", n)
	}
}

func TestAUseAfterTheEndRaisesAnAlertAndIsAUseAllTheSame(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	h.write(c.use("in-time", time.Now()))
	h.append(c, store.CredentialRevoked, "", store.ClosedDetails{Intent: c.intent, Attempt: 1})
	h.write(c.use("at-once", time.Now().Add(time.Second))) // within what clocks may differ by
	h.read(h.open(h.file()), 2)
	if n := h.alerts(); len(n) != 0 {
		t.Error(n)
	}
	h.write(c.use("late", time.Now().Add(time.Minute)))
	h.read(h.open(h.file()), 1)
	if n := h.alerts(); n[store.AlertLateUse] != 1 || len(n) != 1 {
		t.Error(n)
	}
	over := h.issued() // past its end, though nobody has closed it
	h.write(over.use("past", time.Now().Add(10*time.Minute)))
	h.read(h.open(h.file()), 1)
	if n := h.alerts(); n[store.AlertLateUse] != 2 || len(n) != 1 {
		t.Error(n)
	}
	if n := len(h.entries(store.CredentialUsed)); n != 4 {
		t.Errorf("%d uses", n)
	}
}

func TestTheLogIsFollowedThroughRotation(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	n := 0
	use := func() string {
		n++
		return c.use(fmt.Sprintf("r-%d", n), time.Now().Add(time.Duration(n)*time.Microsecond))
	}
	uses := func() { // all of them are on record
		t.Helper()
		eventually(t, fmt.Sprintf("%d uses", n), func() bool { return len(h.entries(store.CredentialUsed)) == n })
	}
	h.write(use(), use())
	f := h.open(h.file())
	uses()
	// Renamed, and written to a little longer, before Vault opens another.
	must(t, os.Rename(h.log, h.log+".1"))
	one := use()
	appendTo(t, h.log+".1", one[:len(one)/2])
	h.write("") // logrotate's create
	time.Sleep(30 * time.Millisecond)
	appendTo(t, h.log+".1", one[len(one)/2:])
	uses()
	h.write(use())
	uses()
	// Copied and cut.
	must(t, os.Truncate(h.log, 0))
	h.write(use(), use(), use())
	uses()
	must(t, f.Close())
	if c := f.Counts(); c.Gaps != 0 || c.Malformed != 0 {
		t.Errorf("%+v", c)
	}
	// While it is down, twice.
	h.write(use())
	must(t, os.Rename(h.log, h.log+".2"))
	h.write(use())
	must(t, os.Chtimes(h.log+".2", time.Now(), time.Now().Add(-time.Minute)))
	must(t, os.Rename(h.log, h.log+"-3"))
	h.write(use())
	must(t, os.Chtimes(h.log+".1", time.Now(), time.Now().Add(-time.Hour)))
	f = h.open(h.file())
	uses()
	must(t, f.Close())
	if c := f.Counts(); c.Gaps != 0 || c.Uses != 3 {
		t.Errorf("%+v", c)
	}
	// The file is gone for good: what is there is read, and it is said.
	must(t, os.Remove(h.log))
	h.write(use())
	f = h.open(h.file())
	uses()
	must(t, f.Close())
	if c := f.Counts(); c.Gaps != 1 {
		t.Errorf("%+v", c)
	}
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(text)
	must(t, errors.Join(err, f.Close()))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLinesThatCannotBeReadAreCountedAndHoldNothingUp(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	h.write("garbage\n", "{\"intent\":\n", "\n", `{"type":"response","x":{"intent":""}}`+"\n", "@cee: "+c.use("r-1", time.Now())[:0])
	long := strings.Repeat("x", maxLine+readBytes+10) + "\"intent\"\n"
	h.write(long, c.use("r-1", time.Now()))
	f := h.open(h.file())
	eventually(t, "the use", func() bool { return f.Counts().Uses == 1 })
	must(t, f.Close())
	if c := f.Counts(); c.Malformed != 4 || c.Lines != 1 {
		t.Errorf("%+v", c)
	}
}

func TestWhileVaultIsAwayNothingIsLost(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	h.down.Store(true)
	h.write(c.use("r-1", time.Now()), c.use("r-2", time.Now().Add(time.Millisecond)))
	f := h.open(h.file())
	eventually(t, "lines are read", func() bool { return f.Counts().Lines == 2 })
	if n := len(h.entries(store.CredentialUsed)); n != 0 {
		t.Errorf("%d uses", n)
	}
	h.down.Store(false)
	h.read(f, 2)
	if n := len(h.entries(store.CredentialUsed)); n != 2 {
		t.Errorf("%d uses", n)
	}
	if n := h.asked.Load(); n != 1 {
		t.Errorf("one accessor was asked for %d times", n)
	}
}

func TestASocketDeviceIsListenedTo(t *testing.T) {
	h := newHouse(t)
	c := h.issued()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	o := h.options()
	o.Listener = l
	f := h.open(o)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for j := range 25 {
				fmt.Fprint(conn, c.use(fmt.Sprintf("r-%d-%d", i, j), time.Now()))
			}
		})
	}
	wg.Wait()
	eventually(t, "100 uses", func() bool { return f.Counts().Uses == 100 })
	conn, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer conn.Close()
	fmt.Fprint(conn, c.use("half", time.Now())[:50]) // cut off by Close
	must(t, f.Close())
	if n := len(h.entries(store.CredentialUsed)); n != 100 {
		t.Errorf("%d uses", n)
	}
}

func TestACursorThatIsNotOursIsRefused(t *testing.T) {
	h := newHouse(t)
	for _, text := range []string{"", "x", `{"log":"other","first":"","next":0}`, `{"log":"vault-audit.example/log","first":"","next":-1}`, `{"log":"vault-audit.example/log","first":"","next":0,"more":1}`} {
		must(t, os.WriteFile(filepath.Join(h.dir, "cursor"), []byte(text), 0o600))
		if f, err := Open(h.file()); err == nil {
			f.Close()
			t.Errorf("%q is taken", text)
		}
	}
}

func TestEntryIDsAreUUIDsOfTheirTimeAndNothingElse(t *testing.T) {
	at := time.Date(2026, 11, 23, 10, 0, 0, 123456789, time.UTC)
	a, b := entryID(at, "used", "r-1"), entryID(at, "used", "r-1")
	if a != b || a == entryID(at, "used", "r-2") || a == entryID(at, "finished", "r-1") || a == entryID(at.Add(1), "used", "r-1") {
		t.Error(a, b)
	}
	s := &store.Submission{Entry: store.Entry{V: store.Version, ID: a, Type: store.AlertRaised, Agent: "x", WriterTime: store.At(at)}}
	s.SetDetails(store.AlertDetails{})
	line, err := s.Marshal()
	must(t, err)
	if _, err := store.ParseSubmission(line); err != nil {
		t.Error(err)
	}
	if fmt.Sprintf("%012x", at.UnixMilli()) != strings.ReplaceAll(a, "-", "")[:12] {
		t.Error(a)
	}
}

func FuzzLine(f *testing.F) {
	c := &cred{request: "req_1", intent: "x", accessor: "a"}
	f.Add([]byte(c.use("r", time.Unix(1, 0))))
	f.Add([]byte(made("m", time.Unix(1, 0), "a", c.meta())))
	f.Add([]byte(`@cee: {"type":"response","time":"2026-01-01T00:00:00Z","request":{"id":"\u0000","path":"auth/token/create/countersign-x","operation":"hvs.aaaaaaaaaaaaaaaaaaaaaaaaaaa"},"response":{"wrap_info":{"wrapped_accessor":"x"}}}`))
	f.Add([]byte(`{"intent":1}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := parse(line, "countersign-")
		if err != nil || e == nil {
			return
		}
		// Whatever it says, the record takes what is made of it.
		fl := &Follower{o: Options{Agent: "spiffe://example/recorder"}}
		story := &store.Entry{Agent: "spiffe://example/step", Request: "req_1"}
		use := fl.submission(store.CredentialUsed, story, e, "used", e.id, e.at)
		use.SetDetails(store.UsedDetails{Intent: "x", Via: store.ViaVaultAudit, By: "vault", Use: e.what})
		for _, s := range []*store.Submission{use, fl.alert(store.AlertUse, e, nil, "", e.what, e.id).Submission} {
			b, err := s.Marshal()
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if _, err := store.ParseSubmission(b); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
		}
	})
}
