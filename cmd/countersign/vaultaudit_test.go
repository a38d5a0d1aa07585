package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/vaultaudit"
)

// auditedVault is a Vault whose audit devices the recorder follows, an issuer
// with the broker's login, and the ledger between them.
type auditedVault struct {
	t      *testing.T
	dir    string
	vault  *vaulttest.Server
	broker string // its Vault token
	ledger *ledger.Ledger
	set    *scopes.Set
	issuer *issuer.Issuer
	log    *zap.Logger
	seen   *observer.ObservedLogs
	n      int
}

const auditedLog = "audited.example/log"

func newAuditedVault(t *testing.T) *auditedVault {
	t.Helper()
	set, err := scopes.Parse("catalogue.yaml", scopes.Demo(nil), "", nil)
	must(t, err)
	vault, prepared := vaulttest.Prepared(t, set, "")
	v := &auditedVault{t: t, dir: t.TempDir(), vault: vault, broker: prepared.BrokerToken, set: set}
	core, seen := observer.New(zap.DebugLevel)
	v.log, v.seen = zap.New(core), seen
	skey, vkey, err := note.GenerateKey(rand.Reader, auditedLog)
	must(t, err)
	signer, err := note.NewSigner(skey)
	must(t, err)
	v.ledger, err = ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(v.dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1})
	must(t, err)
	t.Cleanup(func() { v.ledger.Close() })
	verifier, err := store.NewLogVerifier(vkey)
	must(t, err)
	identity, err := issuer.OpenIdentity(issuer.IdentityConfig{Issuer: "https://broker.example", TrustDomain: "audited.example", KeyFile: filepath.Join(v.dir, "identity.json")})
	must(t, err)
	v.issuer, err = issuer.New(t.Context(), issuer.Config{
		Addr: vault.Addr, Login: issuer.Login{Token: prepared.BrokerToken}, TrustDomain: "audited.example", Log: verifier,
		Scopes: func() *scopes.Set { return set }, Identity: identity,
	})
	must(t, err)
	t.Cleanup(func() { v.issuer.Close() })
	time.Sleep(time.Millisecond) // intents begin after the issuer
	return v
}

// config is the recorder's, with a login that may ask for audit hashes alone.
func (v *auditedVault) config(device string) *vaultAuditConfig {
	v.t.Helper()
	sys := v.vault.Root.Sys()
	must(v.t, sys.PutPolicy("recorder", fmt.Sprintf("path \"sys/audit-hash/%s\" {\n  capabilities = [\"update\"]\n}\n", device)))
	s, err := v.vault.Root.Auth().Token().CreateOrphan(&api.TokenCreateRequest{Policies: []string{"recorder"}, NoDefaultPolicy: true})
	must(v.t, err)
	file := filepath.Join(v.dir, "recorder.token")
	must(v.t, os.WriteFile(file, []byte(s.Auth.ClientToken+"\n"), 0o600))
	return &vaultAuditConfig{Addr: v.vault.Addr, Token: file, Device: device}
}

func (v *auditedVault) open(c *vaultAuditConfig) *vaultaudit.Follower {
	v.t.Helper()
	must(v.t, c.check())
	f, err := c.open(v.ledger, v.dir, auditedLog, "audited.example", v.log)
	must(v.t, err)
	v.t.Cleanup(func() { f.Close() })
	return f
}

func (v *auditedVault) append(subs ...*store.Submission) *store.Appended {
	v.t.Helper()
	var lines [][]byte
	for _, s := range subs {
		b, err := s.Marshal()
		must(v.t, err)
		lines = append(lines, b)
	}
	got, err := v.ledger.Append(v.t.Context(), ledger.Author{Name: "broker-1"}, lines)
	must(v.t, err)
	return got
}

// mint does what a broker does for a scope that nobody has to approve, up to
// the hand-over.
func (v *auditedVault) mint(scope, delivery string) *issuer.Minted {
	v.t.Helper()
	g, err := v.set.Resolve(scope, time.Minute, nil, delivery, "", "")
	must(v.t, err)
	v.n++
	entry := func(t store.Type, details any) *store.Submission {
		s := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(time.Now()), Agent: issuer.SPIFFEID("audited.example", "demo", "run-1", "step-1"),
			Orchestrator: "demo", Run: "run-1", Step: "step-1", Request: fmt.Sprintf("req_%d", v.n), Resource: g.Target, Action: g.Scope,
			Decision: &store.Decision{Outcome: store.Allow, Policy: v.set.Digest(), Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"},
		}}
		s.SetDetails(details)
		return s
	}
	got := v.append(entry(store.StepRequested, store.RequestedDetails{Grant: g, Join: store.NewID()}),
		entry(store.CredentialIssuing, store.IssuingDetails{Attempt: 1, Grant: g.Digest(), NotPast: store.At(time.Now().Add(time.Minute))}))
	m, err := v.issuer.Mint(v.t.Context(), store.Warrant{Request: got.Receipt(0), Intent: got.Receipt(1)})
	must(v.t, err)
	v.append(entry(store.CredentialIssued, m.Issued))
	must(v.t, v.issuer.Activate(v.t.Context(), m))
	return m
}

// revoke ends what was minted, and says so on record, as a broker does.
func (v *auditedVault) revoke(m *issuer.Minted, request int) {
	v.t.Helper()
	must(v.t, v.issuer.Revoke(v.t.Context(), m.Issued))
	page, err := v.ledger.History(v.t.Context(), ledger.Query{Request: fmt.Sprintf("req_%d", request), Type: string(store.CredentialIssued)})
	must(v.t, err)
	e, err := store.ParseLeaf(page.Entries[0].Entry)
	must(v.t, err)
	s := &store.Submission{Entry: *e}
	s.ID, s.Type, s.Time, s.Writer = store.NewID(), store.CredentialRevoked, store.Time{}, ""
	s.SetDetails(store.ClosedDetails{Intent: m.Issued.Intent, Attempt: 1})
	v.append(s)
}

func (v *auditedVault) as(token string) *api.Client {
	v.t.Helper()
	c, err := v.vault.Root.Clone()
	must(v.t, err)
	c.SetToken(token)
	c.SetMaxRetries(0)
	return c
}

// uses counts the uses on record by intent, and alerts by kind.
func (v *auditedVault) uses() (uses, alerts map[string]int) {
	v.t.Helper()
	uses, alerts = map[string]int{}, map[string]int{}
	for s, err := range v.ledger.Entries(context.Background(), 0, v.ledger.Size()) {
		must(v.t, err)
		e, err := store.ParseLeaf(s.Leaf)
		must(v.t, err)
		switch e.Type {
		case store.CredentialUsed:
			d, err := store.DetailsAs[store.UsedDetails](e)
			must(v.t, err)
			uses[d.Intent]++
		case store.AlertRaised:
			d, err := store.DetailsAs[store.AlertDetails](e)
			must(v.t, err)
			alerts[d.Alert]++
		}
	}
	return uses, alerts
}

func TestVaultsAuditLogGivesEachUseOfEachMintedTokenOnce(t *testing.T) {
	v := newAuditedVault(t)
	c := v.config("file")
	c.File = filepath.Join(v.dir, "audit.log")
	must(t, v.vault.Root.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": c.File}}))
	f := v.open(c)

	want, total := map[string]int{}, 0
	secrets := []string{v.broker}
	for i := range 12 {
		m := v.mint("vault:demo-read", "direct")
		secrets = append(secrets, m.Credential.Token)
		client := v.as(m.Credential.Token)
		for range i % 4 {
			_, err := client.Logical().Read("secret/data/demo")
			must(t, err)
			want[m.Issued.Intent]++
			total++
		}
		if i%5 == 0 { // refused by Vault, and a use all the same
			if _, err := client.Logical().Read("secret/data/other"); err == nil {
				t.Fatal("it may read everything")
			}
			want[m.Issued.Intent]++
			total++
		}
		if i%3 == 0 {
			v.revoke(m, i+1)
			if _, err := client.Logical().Read("secret/data/demo"); err == nil {
				t.Fatal("a revoked token is taken")
			}
		}
	}
	// What the mint itself does, with a child that is then dropped, or kept, is no use.
	v.mint("pki:service", "direct")
	v.mint("http:demo", "gateway")
	wrapped := v.mint("vault:demo-read", "wrapped")
	s, err := v.as(wrapped.Credential.WrappingToken).Logical().Unwrap(wrapped.Credential.WrappingToken)
	must(t, err)
	secrets = append(secrets, s.Auth.ClientToken)
	_, err = v.as(s.Auth.ClientToken).Logical().Read("secret/data/demo")
	must(t, err)
	want[wrapped.Issued.Intent]++
	total++

	check := func() {
		t.Helper()
		uses, alerts := v.uses()
		if len(alerts) > 0 || len(uses) != len(want) {
			t.Fatalf("alerts %v, uses of %d credentials, wanted %d", alerts, len(uses), len(want))
		}
		for intent, n := range want {
			if uses[intent] != n {
				t.Errorf("%d uses of %s on record, there were %d", uses[intent], intent, n)
			}
		}
	}
	settled := func(f *vaultaudit.Follower) func() bool {
		return func() bool {
			n := 0
			uses, _ := v.uses()
			for _, k := range uses {
				n += k
			}
			return n >= total && f.Counts().Waiting == 0
		}
	}
	eventually(t, "all uses are on record", settled(f))
	must(t, f.Close())
	check()
	if n := f.Counts(); n.Mints != 15 || n.Malformed+n.Gaps != 0 {
		t.Errorf("%+v", n)
	}

	// From the start, as if the cursor had never been written.
	size := v.ledger.Size()
	lines := f.Counts().Lines
	must(t, os.Remove(filepath.Join(v.dir, "vault-audit.cursor")))
	f = v.open(c)
	eventually(t, "the log is read again", func() bool { n := f.Counts(); return n.Lines == lines && n.Waiting == 0 })
	must(t, f.Close())
	check()
	if v.ledger.Size() != size {
		t.Errorf("reading it again made %d entries of %d", v.ledger.Size(), size)
	}

	for _, e := range v.seen.All() {
		text := e.Message + fmt.Sprint(e.ContextMap())
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				t.Errorf("a secret is logged: %s", e.Message)
			}
		}
	}
}

func TestATokenMintedBesideTheFlowRaisesAnAlert(t *testing.T) {
	v := newAuditedVault(t)
	c := v.config("socket")
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	must(t, err)
	c.Listen = l.Addr().String()
	must(t, l.Close())
	f := v.open(c)
	must(t, v.vault.Root.Sys().EnableAuditWithOptions("socket", &api.EnableAuditOptions{Type: "socket", Options: map[string]string{"address": c.Listen, "socket_type": "tcp"}}))

	honest := v.mint("vault:demo-read", "direct")
	_, err = v.as(honest.Credential.Token).Logical().Read("secret/data/demo")
	must(t, err)
	eventually(t, "the use is on record", func() bool { return f.Counts().Uses == 1 && f.Counts().Mints == 1 })

	// Who has the broker's login mints without asking the recorder: as itself, and
	// in the name of an intent that is on record.
	broker := v.as(v.broker)
	create := func(meta map[string]string) *api.Secret {
		t.Helper()
		s, err := broker.Logical().Write("auth/token/create/countersign-vault-demo-read", map[string]any{
			"policies": []string{"countersign-vault-demo-read"}, "no_default_policy": true, "ttl": "60s", "display_name": "countersign-step-1", "meta": meta})
		must(t, err)
		return s
	}
	create(nil)
	eventually(t, "the first alert", func() bool { return f.Counts().AlertMint == 1 })
	s := create(map[string]string{"request": "req_1", "intent": honest.Issued.Intent})
	eventually(t, "the second alert", func() bool { return f.Counts().AlertMint == 2 })
	_, err = v.as(s.Auth.ClientToken).Logical().Read("secret/data/demo")
	must(t, err)
	eventually(t, "the alert of its use", func() bool { return f.Counts().AlertUse == 1 })
	garbage, err := net.Dial("tcp", c.Listen)
	must(t, err)
	_, err = io.WriteString(garbage, "no line of Vault's\n")
	must(t, errors.Join(err, garbage.Close()))
	eventually(t, "a line that is none is counted", func() bool { return f.Counts().Malformed == 1 })
	addr := freeAddr(t)
	measured := newPeopleMetrics(newMetrics(prometheus.NewRegistry()))
	measured.people.Store(&people{o: &peopleOptions{}, exports: &review.Exports{}, audit: f, ledger: v.ledger})
	stop, err := measured.serve(addr, zap.NewNop())
	must(t, err)
	res, err := http.Get("http://" + addr + "/metrics")
	must(t, err)
	told, err := io.ReadAll(res.Body)
	must(t, errors.Join(err, res.Body.Close()))
	stop()
	for _, want := range []string{
		`countersign_alerts_total{alert="mint-without-intent"} 2`, `countersign_alerts_total{alert="use-unmatched"} 1`,
		"countersign_vault_audit_uses_total 1", "countersign_vault_audit_mints_total 1",
		fmt.Sprintf("countersign_vault_audit_lines_total %d", f.Counts().Lines), "countersign_vault_audit_malformed_total 1",
	} {
		if !strings.Contains(string(told), want) {
			t.Errorf("the metrics do not tell %s:\n%s", want, told)
		}
	}
	must(t, f.Close())
	uses, alerts := v.uses()
	if alerts[store.AlertMint] != 2 || alerts[store.AlertUse] != 1 || len(alerts) != 2 || uses[honest.Issued.Intent] != 1 || len(uses) != 1 {
		t.Errorf("%v %v", uses, alerts)
	}
}

func TestTheDocumentedVaultAuditSectionIsTaken(t *testing.T) {
	b, err := os.ReadFile("../../docs/vault-audit.md")
	must(t, err)
	_, section, _ := strings.Cut(string(b), "```yaml\n")
	section, _, ok := strings.Cut(section, "```\n")
	var c struct {
		VaultAudit *vaultAuditConfig `yaml:"vault_audit"`
	}
	if !ok {
		t.Fatal("docs/vault-audit.md has no YAML")
	}
	must(t, parseConfig("docs/vault-audit.md", []byte(section), &c))
	must(t, c.VaultAudit.check())
}

func TestAVaultAuditSectionThatWouldNotDoIsRefused(t *testing.T) {
	for _, text := range []string{
		"addr: https://v\ntoken_file: t\n",
		"file: a\nlisten: 127.0.0.1:1\naddr: https://v\ntoken_file: t\n",
		"file: a\naddr: http://vault.example\ntoken_file: t\n",
		"file: a\naddr: https://v\n",
		"file: a\ntoken_file: t\n",
		"listen: 0.0.0.0:1\naddr: https://v\ntoken_file: t\n",
		"file: a\naddr: https://v\ntoken_file: t\ndevice: ../policies\n",
		"file: a\naddr: https://v\ntoken_file: t\nmore: 1\n",
	} {
		var c vaultAuditConfig
		err := parseConfig("record.yaml", []byte(text), &c)
		if err == nil {
			err = c.check()
		}
		if err == nil {
			t.Errorf("taken:\n%s", text)
		}
	}
	for _, text := range []string{"file: /var/log/vault/audit.log\naddr: https://vault.example:8200\ntoken_file: t\n", "listen: unix:/run/countersign/audit.sock\ndevice: audit/socket\naddr: http://127.0.0.1:8200\ntoken_file: t\n"} {
		var c vaultAuditConfig
		must(t, parseConfig("record.yaml", []byte(text), &c))
		must(t, c.check())
	}
}
