package postgres

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

var (
	server      *postgrestest.Server
	targetRoots *x509.Certificate // who vouches for it, as orders.internal
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if server, err = postgrestest.Start("fsync=off", "max_connections=200", "log_statement=none"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = server.Remove() }()
		if err := schema(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// schema makes what the tests read: the step's user is a superuser, so that the
// gateway alone is what refuses.
func schema() error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, server.DSN)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	cert, roots, err := authority("orders.internal")
	if err != nil {
		return err
	}
	targetRoots = roots
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return err
	}
	owner, err := os.Stat(server.Data())
	if err != nil {
		return err
	}
	uid := owner.Sys().(*syscall.Stat_t)
	for name, text := range map[string]string{
		"server.crt":  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})),
		"server.key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		"pg_hba.conf": "host all step all scram-sha-256\nhost all all all trust\n",
	} {
		file := filepath.Join(server.Data(), name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return err
		}
		if err := os.Chown(file, int(uid.Uid), int(uid.Gid)); err != nil {
			return err
		}
	}
	if _, err := conn.Exec(ctx, "alter system set ssl = on"); err != nil {
		return err
	}
	_, err = conn.Exec(ctx, `
		select pg_reload_conf();
		create role step superuser login password 'the real secret';
		create table orders (id int primary key, customer text, email text, amount numeric(10,2), paid boolean, doc jsonb, raw bytea, card bigint, at timestamptz);
		insert into orders select i, 'customer ' || i, 'canary' || i || '@example.com', i * 1.5, i % 2 = 0,
			jsonb_build_object('email', 'canary' || i || '@example.com', 'n', i), ('canary' || i)::bytea, 4111111111111111, '2026-01-02 03:04:05Z' from generate_series(1, 20) i;
		create table notes (id serial primary key, body text);
		create table mine (id int, t text);
		create table lines (t text);`)
	return err
}

// authority makes a certificate for host, and the pool that trusts it.
func authority(host string) (tls.Certificate, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, cert, nil
}

// record is a recorder that keeps what it is given.
type record struct {
	mu   sync.Mutex
	subs []*store.Submission
	down atomic.Bool
	wait chan struct{} // while it stands still; nil: it does not
	then error         // what Append returns that stood still
}

func (r *record) Append(_ context.Context, subs ...*store.Submission) (*store.Appended, error) {
	if r.down.Load() {
		return nil, store.ErrUnavailable
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait := r.wait; wait != nil {
		r.mu.Unlock()
		<-wait
		r.mu.Lock()
		if r.then != nil {
			return nil, r.then
		}
	}
	r.subs = append(r.subs, subs...)
	return &store.Appended{Entries: make([]store.Proven, len(subs))}, nil
}

// stand has the recorder stand still until the function is called that it
// returns; what waits for it then is answered with its argument.
func (r *record) stand() func(error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait := make(chan struct{})
	r.wait = wait
	return func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.wait, r.then = nil, err
		close(wait)
	}
}

// use is what the record has of one.
type use struct {
	store.UsedDetails
	id, statement string
}

// uses are those on record, in order, without what was only prepared.
func (r *record) uses() []use {
	return slices.DeleteFunc(r.all(), func(u use) bool { return strings.HasPrefix(u.Use, "prepare ") })
}

func (r *record) all() (out []use) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.subs {
		if s.Type == store.CredentialUsed {
			d, _ := store.DetailsAs[store.UsedDetails](&s.Entry)
			out = append(out, use{d, s.ID, s.Openings[store.SealedStatement].Text})
		}
	}
	return out
}

func (r *record) refusals() (out []store.RefusedDetails) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.subs {
		if s.Type == store.AccessRefused {
			d, _ := store.DetailsAs[store.RefusedDetails](&s.Entry)
			out = append(out, d)
		}
	}
	return out
}

// has reports whether a use with this in its statement is on record.
func (r *record) has(part string) bool {
	return slices.ContainsFunc(r.all(), func(u use) bool { return strings.Contains(u.statement, part) })
}

// newest reports whether one of the newest n entries is of this statement.
func (r *record) newest(n int, statement string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.subs[max(0, len(r.subs)-n):], func(s *store.Submission) bool {
		return s.Openings[store.SealedStatement].Text == statement
	})
}

// used is how many uses are on record.
func (r *record) used() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.subs {
		if s.Type == store.CredentialUsed {
			n++
		}
	}
	return n
}

// outcomes are what came of the uses, by their entry IDs.
func (r *record) outcomes() map[string]store.UseOutcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]store.UseOutcome{}
	for _, s := range r.subs {
		if s.Type == store.UseFinished {
			d, _ := store.DetailsAs[store.UseFinishedDetails](&s.Entry)
			for _, o := range d.Outcomes {
				out[o.Use] = o
			}
		}
	}
	return out
}

// tap stands between the gateway and the target, and sees every byte.
type tap struct {
	l  net.Listener
	to string

	mu       sync.Mutex
	sent     bytes.Buffer // to the target
	answered bytes.Buffer // by it
	forward  func(b []byte)
}

func newTap(t testing.TB, to string) *tap {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &tap{l: l, to: to}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	return p
}

func (p *tap) serve(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = io.Copy(seen{c, p, &p.answered, false}, up)
		_ = c.Close()
	}()
	_, _ = io.Copy(seen{up, p, &p.sent, true}, c)
	_ = up.(*net.TCPConn).CloseWrite()
	<-answered
}

type seen struct {
	net.Conn
	p       *tap
	to      *bytes.Buffer
	forward bool
}

func (s seen) Write(b []byte) (int, error) {
	s.p.mu.Lock()
	s.to.Write(b)
	forward := s.p.forward
	s.p.mu.Unlock()
	if s.forward && forward != nil {
		forward(b)
	}
	return s.Conn.Write(b)
}

func (p *tap) reached(part string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Contains(p.sent.Bytes(), []byte(part))
}

// path is a gateway with one session, from the step to the target.
type path struct {
	t       testing.TB
	addr    string
	token   string
	session *gateway.Session
	record  *record
	tap     *tap
	sess    *gateway.Gateway
	gw      *Gateway
}

// everything is all that may be granted, over all tables.
func everything() store.Access {
	return store.Access{TLS: "off", Postgres: &store.PostgresAccess{Statements: []string{"select", "insert", "update", "delete", "copy"}, Tables: []string{"*"}, Functions: []string{"pg_catalog.pg_sleep"}}}
}

func masked(rules ...store.MaskRule) store.Access {
	a := everything()
	a.Masking = store.Masking{Rules: rules}
	return a
}

func serve(t testing.TB, access store.Access, change ...func(*Config)) *path {
	t.Helper()
	u, _ := url.Parse(server.DSN)
	return serveTo(t, access, u.Host, change...)
}

// serveTo is serve for a target at addr.
func serveTo(t testing.TB, access store.Access, addr string, change ...func(*Config)) *path {
	t.Helper()
	p := &path{t: t, record: &record{}, tap: newTap(t, addr)}
	p.sess = gateway.New(gateway.Config{Recorder: p.record, TrustDomain: "example.test",
		Addresses: map[string]string{store.ProtocolPostgres: "gateway.test:5432"},
		Upstreams: map[string]string{"orders.internal": p.tap.l.Addr().String()}})
	t.Cleanup(p.sess.Close)
	access.Protocol, access.Upstream = store.ProtocolPostgres, "orders.internal:5432/postgres"
	p.session, p.token = p.begin(access)
	cfg := Config{Gateway: p.sess}
	for _, f := range change {
		f(&cfg)
	}
	p.gw = New(cfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- p.gw.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve does not end")
		}
	})
	return p
}

func (p *path) begin(access store.Access) (*gateway.Session, string) {
	p.t.Helper()
	s, token, err := p.sess.Open(gateway.Params{
		Story:  &store.Entry{V: store.Version, ID: store.NewID(), Type: store.StepRequested, WriterTime: store.At(time.Now()), Agent: "spiffe://example.test/step", Request: "req_1", Run: "run-1", Step: "step-1"},
		Intent: store.NewID(), Grant: store.Grant{Access: &access}, Expires: time.Now().Add(time.Hour),
		Secret: &issuer.Credential{Username: "step", Password: "the real secret"}})
	if err != nil {
		p.t.Fatal(err)
	}
	return s, token
}

// dsn is what the step is told, with more settings.
func (p *path) dsn(more string) string {
	return fmt.Sprintf("postgres://agent:%s@%s/postgres?sslmode=disable%s", p.token, p.addr, more)
}

// connect logs a pgx client in.
func (p *path) connect(mode string) *pgx.Conn {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	more := ""
	if mode != "" {
		more = "&default_query_exec_mode=" + mode
	}
	conn, err := pgx.Connect(ctx, p.dsn(more))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// psql runs commands in the real client, and returns all that it prints.
func (p *path) psql(commands string, args ...string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "psql", append([]string{"-X", "-A", "-t", "-q", p.dsn("")}, args...)...)
	cmd.Stdin = strings.NewReader(commands)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("psql: %v: %s", err, out)
	}
	return string(out)
}

// eventually waits for what another goroutine does, and fails where it does not.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}
