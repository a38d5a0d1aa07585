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
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/gatewaytest"
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
	record  *gatewaytest.Recorder
	tap     *tap
	sess    *gateway.Gateway
	gw      *Gateway
}

// uses are those on record, in order, without what was only prepared.
func (p *path) uses() []gatewaytest.Use {
	return slices.DeleteFunc(p.record.Uses(), func(u gatewaytest.Use) bool { return strings.HasPrefix(u.Use, "prepare ") })
}

// recorded reports whether a use with this in its statement is on record.
func (p *path) recorded(part string) bool {
	return slices.ContainsFunc(p.record.Uses(), func(u gatewaytest.Use) bool { return strings.Contains(u.Statement, part) })
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
	p := &path{t: t, record: gatewaytest.New(t), tap: newTap(t, addr)}
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
