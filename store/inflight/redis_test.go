package inflight_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// exercise calls all that a Store does, over many keys.
func exercise(t *testing.T, s *inflight.Store) {
	t.Helper()
	ctx := t.Context()
	var live []inflight.Request
	for i := range 100 {
		r := request(fmt.Sprintf("req_%d", i), time.Now().Add(time.Minute))
		r.Step = fmt.Sprintf("s%d", i)
		live = append(live, r)
	}
	check(t, s.Ping(ctx))
	check(t, s.Rebuild(ctx, live))
	since, err := s.Since(ctx)
	check(t, err)
	if since.IsZero() {
		t.Error("it was not rebuilt")
	}
	for i, r := range live {
		ids, err := s.Step(ctx, "demo", "r", r.Step)
		check(t, err)
		if len(ids) != 1 || ids[0] != r.ID {
			t.Fatalf("step %s: %v", r.Step, ids)
		}
		r.Expires, r.Status = time.Time{}, "closed"
		if i < 10 {
			check(t, s.Put(ctx, r))
			kept, err := s.Request(ctx, r.ID)
			check(t, err)
			if kept == nil || kept.Status != "closed" {
				t.Fatalf("%+v", kept)
			}
		}
	}
	if ok, err := s.Claim(ctx, "x", time.Minute); err != nil || !ok {
		t.Errorf("claim: %v, %v", ok, err)
	}
	check(t, s.Release(ctx, "x"))
	check(t, s.Cut(ctx, "req_1 intent requested", time.Now().Add(time.Minute)))
	if told, err := s.Cuts(ctx); err != nil || len(told) != 1 {
		t.Errorf("cuts: %v, %v", told, err)
	}
	if c, err := s.Charge(ctx, "ci", inflight.Rate{N: 1, Burst: 1, Per: time.Hour}, long); err != nil || !c.Allowed {
		t.Errorf("charge: %+v, %v", c, err)
	}
	if ok, err := s.Take(ctx, "live:all", "req_1", 1, time.Minute); err != nil || !ok {
		t.Errorf("take: %v, %v", ok, err)
	}
	check(t, s.Hold(ctx, "live:orchestrator:ci", []string{"req_1"}, time.Minute))
	check(t, s.Free(ctx, map[string][]string{"live:all": {"req_1"}, "live:orchestrator:ci": {"req_1"}}))
}

// Known failures: a command or key of the broker's is missing in the rules that
// the documentation prints, or the rules allow more than the broker needs.
func TestTheACLUserMayDoWhatTheBrokerDoesAndNothingElse(t *testing.T) {
	srv, o := start(t)
	o.URL += "/1"
	exercise(t, open(t, o))
	admin := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	defer func() { _ = admin.Close() }()
	log, err := admin.Do(t.Context(), "ACL", "LOG").Slice()
	check(t, err)
	if len(log) > 0 {
		t.Errorf("the server refused the broker: %v", log)
	}
	used := admin.Info(t.Context(), "commandstats").Val()
	for _, rule := range strings.Fields(inflight.ACLRules(inflight.DefaultPrefix)) {
		if command, ok := strings.CutPrefix(rule, "+"); ok && !strings.Contains(used, "cmdstat_"+command+":") {
			t.Errorf("the broker may do %s, and never does", command)
		}
	}
	check(t, admin.Set(t.Context(), "other:key", "planted", 0).Err())
	c := redis.NewClient(&redis.Options{Addr: srv.Addr(), Username: "broker", Password: "planted-password"})
	defer func() { _ = c.Close() }()
	for _, command := range []string{
		"KEYS *", "SCAN 0", "CONFIG GET *", "FLUSHALL", "FLUSHDB", "SAVE", "SHUTDOWN", "ACL LIST", "MONITOR", "CLIENT LIST", "INFO",
		"GET other:key", "SET other:key x", "DEL other:key", "ZADD other:key 1 x", "EVAL return(redis.call('GET','other:key')) 0",
		"EVAL return(redis.call('KEYS','*')) 0", "PUBLISH x y", "SUBSCRIBE x", "SCRIPT FLUSH", "FUNCTION LIST", "REPLICAOF a 1", "MIGRATE a 1 k 0 1",
		"RENAME countersign:generation other:key", "DUMP countersign:generation", "SORT countersign:cut", "OBJECT ENCODING countersign:cut", "HSET countersign:x a b",
	} {
		args := []any{}
		for _, word := range strings.Fields(command) {
			args = append(args, word)
		}
		err := c.Do(t.Context(), args...).Err()
		if err == nil || !strings.Contains(err.Error(), "NOPERM") && !strings.Contains(err.Error(), "ACL failure") && !strings.Contains(err.Error(), "can't run this command") && !strings.Contains(err.Error(), "access") {
			t.Errorf("%s: %v", command, err)
		}
	}
	if v := admin.Get(t.Context(), "other:key").Val(); v != "planted" {
		t.Errorf("another's key is %q now", v)
	}
}

func TestTheDocumentationPrintsTheACLRules(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operations.md")
	check(t, err)
	for _, rules := range []string{inflight.ACLRules(inflight.DefaultPrefix), inflight.ClusterACLRules} {
		if !strings.Contains(string(doc), rules) {
			t.Errorf("docs/operations.md does not have %q", rules)
		}
	}
}

func TestKeysBeginWithThePrefix(t *testing.T) {
	srv := redistest.StartACL(t, "broker", "pw", inflight.ACLRules("blue:"))
	o := inflight.Options{Addrs: []string{srv.Addr()}, Credentials: broker, Prefix: "blue:"}
	exercise(t, open(t, o))
	o.Prefix = "green:"
	if err := open(t, o).Rebuild(t.Context(), nil); err == nil {
		t.Error("the user reached keys of another deployment")
	}
}

func broker() (username, password string) { return "broker", "pw" }

// authority makes certificates for 127.0.0.1.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.key, a.cert = a.sign("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) sign(name string, c *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(a.t, err)
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	c.IPAddresses = []net.IP{net.ParseIP("127.0.0.1")}
	parent, by := c, key
	if a.cert != nil {
		parent, by = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	check(a.t, err)
	pk, err := x509.MarshalPKCS8PrivateKey(key)
	check(a.t, err)
	check(a.t, os.WriteFile(a.path(name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(a.t, os.WriteFile(a.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pk}), 0o600))
	parsed, err := x509.ParseCertificate(der)
	check(a.t, err)
	return key, parsed
}

func TestAServerIsSpokenToByTLSWithCertificatesOnBothSides(t *testing.T) {
	a := newAuthority(t)
	a.sign("server", &x509.Certificate{})
	a.sign("client", &x509.Certificate{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	addr := l.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	_ = l.Close()
	redistest.Start(t, "--tls-port", port, "--tls-cert-file", a.path("server.pem"), "--tls-key-file", a.path("server.key"), "--tls-ca-cert-file", a.path("ca.pem"))

	own, err := tls.LoadX509KeyPair(a.path("client.pem"), a.path("client.key"))
	check(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	by := func(c *tls.Config) func() *tls.Config { return func() *tls.Config { return c } }
	good := by(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{own}})
	exercise(t, open(t, inflight.Options{URL: "rediss://" + addr, TLS: good}))
	check(t, open(t, inflight.Options{Addrs: []string{addr}, TLS: good}).Ping(t.Context()))

	for name, o := range map[string]inflight.Options{
		"an authority that is not trusted": {URL: "rediss://" + addr, TLS: by(&tls.Config{Certificates: []tls.Certificate{own}})},
		"no certificate of its own":        {Addrs: []string{addr}, TLS: by(&tls.Config{RootCAs: roots})},
		"in the clear":                     {URL: "redis://" + addr},
	} {
		o.Timeout = 300 * time.Millisecond
		if err := open(t, o).Ping(t.Context()); err == nil {
			t.Errorf("%s: it answers", name)
		}
	}
	if _, err := inflight.Open(inflight.Options{URL: "redis://" + addr, TLS: good}); err == nil {
		t.Error("keys for TLS are named, and the URL speaks in the clear")
	}
	if _, err := inflight.Open(inflight.Options{Addrs: []string{addr, addr}}); err == nil {
		t.Error("several addresses of nothing in particular")
	}
}
