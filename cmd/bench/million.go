package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

// million is a ledger of a million entries, or of how many there are to be.
type million struct {
	options  ledger.Options
	engine   string
	key      string // the log's, in full
	verifier *store.LogVerifier
}

// newMillion fills a ledger below dir over SQLite.
func newMillion(ctx context.Context, dir string, entries int) (*million, error) {
	skey, vkey, err := note.GenerateKey(rand.Reader, "bench.example/million")
	if err != nil {
		return nil, err
	}
	m := &million{engine: "SQLite", key: skey, options: ledger.Options{Dir: filepath.Join(dir, "million"), Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32)}}
	if m.options.Signer, err = note.NewSigner(skey); err != nil {
		return nil, err
	}
	if m.verifier, err = store.NewLogVerifier(vkey); err != nil {
		return nil, err
	}
	o := m.options
	o.RecheckEvery = -1
	l, err := ledger.Open(ctx, o)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	// What `countersign dev` runs with; as decisions name it, its length before it.
	catalogue, err := os.ReadFile("scopes/demo.yaml")
	if err != nil {
		return nil, fmt.Errorf("run this in the repository: %w", err)
	}
	policy := digest(binary.BigEndian.AppendUint64(nil, uint64(len(catalogue))), catalogue)
	loaded := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.PolicyLoaded, WriterTime: store.At(time.Now()), Agent: "spiffe://bench.example/broker/bench", Action: string(store.PolicyLoaded)}}
	loaded.SetDetails(store.PolicyDetails{Digest: policy, Catalogue: digest(catalogue)})
	loaded.Seal(store.SealedCatalogue, string(catalogue))
	b, err := loaded.Marshal()
	if err != nil {
		return nil, err
	}
	if _, err := l.Append(ctx, ledger.Author{Name: "bench"}, [][]byte{b}); err != nil {
		return nil, err
	}
	const requests = 128 // of 8 entries each in one append
	for r := 0; r*8 < entries; r += requests {
		var lines [][]byte
		for i := r; i < r+requests; i++ {
			for _, s := range story(i, policy) {
				b, err := s.Marshal()
				if err != nil {
					return nil, err
				}
				lines = append(lines, b)
			}
		}
		if _, err := l.Append(ctx, ledger.Author{Name: "bench"}, lines); err != nil {
			return nil, err
		}
		if r%(100*requests) == 0 {
			fmt.Fprintf(os.Stderr, "\rfilling a ledger: %d of %d", r*8, entries)
		}
	}
	fmt.Fprintln(os.Stderr)
	return m, nil
}

// inPostgres is the same ledger copied into a PostgreSQL of its own below dir.
func (m *million) inPostgres(ctx context.Context, dir string) (*million, *postgrestest.Server, error) {
	s, err := postgresOn(dir)
	if err != nil {
		return nil, nil, err
	}
	c := &million{options: m.options, engine: "PostgreSQL", key: m.key, verifier: m.verifier}
	c.options.Postgres = s.DSN
	c.options.KeysFile = filepath.Join(m.options.Dir, "details-keys.db")
	c.options.Dir = filepath.Join(dir, "million-postgres")
	if err := os.MkdirAll(c.options.Dir, 0o700); err != nil {
		return nil, s, err
	}
	head, err := os.ReadFile(filepath.Join(m.options.Dir, "head"))
	if err != nil {
		return nil, s, err
	}
	if err := os.WriteFile(filepath.Join(c.options.Dir, "head"), head, 0o600); err != nil {
		return nil, s, err
	}
	_, err = ledger.Copy(ctx, m.options.Dir, s.DSN, m.verifier, func(done, total int64) {
		if done%102_400 == 0 {
			fmt.Fprintf(os.Stderr, "\rcopying it to PostgreSQL: %d of %d", done, total)
		}
	})
	fmt.Fprintln(os.Stderr)
	return c, s, err
}

// postgresOn starts a PostgreSQL whose data lies below dir; where its user cannot
// get there, in the directory for temporary files.
func postgresOn(dir string) (*postgrestest.Server, error) {
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	settings := []string{"shared_buffers=512MB", "max_wal_size=4GB"}
	s, err := postgrestest.StartIn(dir, settings...)
	if err != nil {
		fmt.Fprintf(os.Stderr, "PostgreSQL does not start below %s (%v): its data goes to %s\n", dir, err, os.TempDir())
		s, err = postgrestest.Start(settings...)
	}
	return s, err
}

func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// story is one request from asking to revocation, with four uses, decided by
// policy.
func story(i int, policy string) []*store.Submission {
	scopes := []string{"vault:demo-read", "pki:service", "http:demo", "identity:step"}
	scope := scopes[i/3%len(scopes)]
	id, now := fmt.Sprintf("req_%07d", i), time.Now()
	end := store.At(now.Add(5 * time.Minute))
	grant := store.Grant{Scope: scope, Target: "postgres://" + scope, Engine: "database", TTL: store.Duration(5 * time.Minute), Delivery: "direct", Revocable: true}
	entry := func(t store.Type, details any) *store.Submission {
		s := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: t, WriterTime: store.At(now),
			Orchestrator: fmt.Sprintf("orchestrator-%d", i%4), Run: fmt.Sprintf("run-%05d", i/40), Step: fmt.Sprintf("step-%07d", i), Request: id,
			Resource: grant.Target, Action: grant.Scope, Risk: &store.Risk{Sensitivity: "low"},
			Subject:  &store.Subject{ID: fmt.Sprintf("p-%026d", i%500)},
			Decision: &store.Decision{Outcome: store.Allow, Policy: policy, Reasons: []string{}},
		}}
		s.Agent = "spiffe://bench.example/orchestrator/" + s.Orchestrator + "/run/" + s.Run + "/step/" + s.Step
		s.SetDetails(details)
		return s
	}
	requested := entry(store.StepRequested, store.RequestedDetails{Grant: grant, Join: "join-" + id, Body: "body-" + id})
	if i%10 == 0 {
		requested.Seal(store.SealedReason, fmt.Sprintf("Reconcile refunds, OPS-%d", i))
	}
	issuing := entry(store.CredentialIssuing, store.IssuingDetails{Attempt: 1, Grant: grant.Digest(), NotPast: end})
	out := []*store.Submission{requested, issuing,
		entry(store.CredentialIssued, store.IssuedDetails{Intent: issuing.ID, Attempt: 1, Kind: "database", Revocable: true, Accessor: "accessor-" + id, Expires: end})}
	for n := range 4 {
		out = append(out, entry(store.CredentialUsed, store.UsedDetails{Intent: issuing.ID, Via: "introspection", By: "orders", Use: fmt.Sprintf("GET /orders/%d", n)}))
	}
	return append(out, entry(store.CredentialRevoked, store.ClosedDetails{Intent: issuing.ID, Attempt: 1}))
}

// millionRows measures what must not grow with the log.
func millionRows(ctx context.Context, t *table, binary string) error {
	dir, clean, err := scratch()
	if err != nil {
		return err
	}
	defer clean()
	m, err := newMillion(ctx, dir, 1_000_000)
	if err != nil {
		return err
	}
	if err := m.measure(ctx, t); err != nil {
		return err
	}
	if err := m.review(ctx, t, binary); err != nil {
		return err
	}
	p, s, err := m.inPostgres(ctx, dir)
	if s != nil {
		defer s.Remove()
	}
	if err != nil {
		return err
	}
	if err := p.measure(ctx, t); err != nil {
		return err
	}
	return p.review(ctx, t, binary)
}

// measure adds the rows of a cold start and of history.
func (m *million) measure(ctx context.Context, t *table) error {
	var took []time.Duration
	var l *ledger.Ledger
	for range 5 {
		if l != nil {
			if err := l.Close(); err != nil {
				return err
			}
		}
		start := time.Now()
		var err error
		if l, err = ledger.Open(ctx, m.options); err != nil {
			return err
		}
		took = append(took, time.Since(start))
	}
	defer l.Close()
	start := t.add("cold start, 1,000,000 entries", m.engine, 1, took, 0)
	t.floor("cold start, "+m.engine, "at most 2 s", ms(start.p50)+" ms", start.p50 <= 2*time.Second)
	var worst time.Duration
	for _, f := range []struct {
		name string
		q    ledger.Query
	}{
		{"no filter", ledger.Query{}},
		{"no filter, far in", ledger.Query{Cursor: "900000"}},
		{"run", ledger.Query{Run: "run-01500"}},
		{"step", ledger.Query{Step: "step-0060000"}},
		{"request", ledger.Query{Request: "req_0060000"}},
		{"orchestrator", ledger.Query{Orchestrator: "orchestrator-1"}},
		{"scope", ledger.Query{Scope: "pki:service", Cursor: "500000"}},
		{"target", ledger.Query{Target: "postgres://http:demo"}},
		{"subject", ledger.Query{Subject: fmt.Sprintf("p-%026d", 77)}},
		{"type", ledger.Query{Type: string(store.CredentialRevoked)}},
		{"outcome", ledger.Query{Outcome: string(store.Allow), Newest: true}},
		{"person, none", ledger.Query{Person: "user:nobody"}},
		{"outcome, none", ledger.Query{Outcome: string(store.Deny)}},
		{"time", ledger.Query{From: time.Now().Add(-time.Minute)}},
		{"orchestrator and scope", ledger.Query{Orchestrator: "orchestrator-1", Scope: "pki:service"}},
		{"orchestrator and type and outcome", ledger.Query{Orchestrator: "orchestrator-3", Type: string(store.StepRequested), Outcome: string(store.Allow)}},
	} {
		lat := make([]time.Duration, 21)
		for i := range lat {
			start := time.Now()
			if _, err := l.History(ctx, f.q); err != nil {
				return fmt.Errorf("%s: %w", f.name, err)
			}
			lat[i] = time.Since(start)
		}
		row := t.add("history page of 1,000,000: "+f.name, m.engine, 1, lat, 0)
		worst = max(worst, row.p50)
	}
	t.floor("history page, any filter, "+m.engine, "p50 at most 50 ms", ms(worst)+" ms", worst <= 50*time.Millisecond)
	return nil
}

// postgresLedgerRows measures the ledger over PostgreSQL, on the same disk.
func postgresLedgerRows(ctx context.Context, t *table) error {
	dir, clean, err := scratch()
	if err != nil {
		return err
	}
	defer clean()
	s, err := postgresOn(dir)
	if err != nil {
		return err
	}
	defer s.Remove()
	skey, vkey, err := note.GenerateKey(rand.Reader, "bench.example/log")
	if err != nil {
		return err
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		return err
	}
	l, err := ledger.Open(ctx, ledger.Options{Dir: filepath.Join(dir, "ledger"), Postgres: s.DSN, Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1})
	if err != nil {
		return err
	}
	defer l.Close()
	for _, c := range []int{1, 64, 256} {
		f, err := t.measure(ctx, "append 800 bytes, durable, signed", "countersign, PostgreSQL", c, func(ctx context.Context, _, _ int) error {
			b, err := line()
			if err != nil {
				return err
			}
			_, err = l.Append(ctx, ledger.Author{Name: "bench"}, [][]byte{b})
			return err
		})
		if err != nil {
			return err
		}
		if c == 256 {
			t.floor("append at 256, PostgreSQL", "at least 10,000/s", fmt.Sprintf("%.0f/s", f.rate), f.rate >= 10_000)
		}
	}
	return nil
}
