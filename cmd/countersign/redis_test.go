package main

import (
	"context"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

func TestANewConnectionToRedisGoesByThePasswordAndTheCertificatesOfNow(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := l.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	must(t, l.Close())
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	ca := trusttest.NewCA(t)
	certs := func(prefix string, authority *trusttest.CA) {
		trusttest.WriteCAs(t, file(prefix+"ca.pem"), authority.Cert)
		trusttest.Write(t, authority.Issue(t, x509.Certificate{}), file(prefix+"tls.pem"), file(prefix+"tls.key"))
	}
	certs("redis-", ca)
	certs("", ca)
	trusttest.Replace(t, file("users.acl"), []byte("user default on nopass ~* &* +@all\nuser broker on >first-password "+inflight.ACLRules(inflight.DefaultPrefix)+"\n"))
	srv := redistest.Start(t, "--aclfile", file("users.acl"), "--tls-port", port,
		"--tls-cert-file", file("redis-tls.pem"), "--tls-key-file", file("redis-tls.key"), "--tls-ca-cert-file", file("redis-ca.pem"))
	admin := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	t.Cleanup(func() { _ = admin.Close() })
	do := func(args ...any) {
		t.Helper()
		must(t, admin.Do(t.Context(), args...).Err())
	}
	url := func(host, password string) []byte { return []byte("rediss://broker:" + password + "@" + host + "\n") }
	trusttest.Replace(t, file("password"), []byte("first-password\n"))
	trusttest.Replace(t, file("url"), url(addr, "first-password"))

	keys := &redisKeys{CA: file("ca.pem"), Cert: file("tls.pem"), Key: file("tls.key")}
	core, logs := observer.New(zap.WarnLevel)
	stores := map[string]*inflight.Store{}
	for name, c := range map[string]*redisConfig{
		"addrs": {Addrs: []string{addr}, Username: "broker", Password: file("password"), TLS: keys},
		"url":   {URL: file("url"), TLS: keys},
	} {
		must(t, c.check())
		o, err := c.options(zap.New(core))
		must(t, err)
		s, err := inflight.Open(o)
		must(t, err)
		t.Cleanup(func() { _ = s.Close() })
		must(t, s.Ping(t.Context()))
		stores[name] = s
	}
	cut := func() { do("CLIENT", "KILL", "USER", "broker") }
	answers := func(when string, want bool) {
		t.Helper()
		for name, s := range stores {
			eventually(t, name+" "+when, func() bool { return (s.Ping(context.Background()) == nil) == want })
		}
	}

	do("ACL", "SETUSER", "broker", "resetpass", ">second-password")
	cut()
	answers("is refused with the old password", false)
	trusttest.Replace(t, file("password"), []byte("second-password\n"))
	trusttest.Replace(t, file("url"), url(addr, "second-password"))
	answers("goes on with the new password", true)

	next := trusttest.NewCA(t)
	certs("redis-", next)
	do("CONFIG", "SET", "tls-cert-file", file("redis-tls.pem"), "tls-key-file", file("redis-tls.key"), "tls-ca-cert-file", file("redis-ca.pem"))
	cut()
	answers("is refused with the old certificate, and refuses", false)
	certs("", next)
	answers("goes on with the new certificate and authority", true)
	if all := logs.All(); len(all) > 0 {
		t.Errorf("logged: %v", all)
	}

	// What cannot be read, or leads elsewhere, leaves the old in force.
	must(t, os.Remove(file("password")))
	trusttest.Replace(t, file("url"), url("redis.invalid:6379", "another-password"))
	for range 2 {
		cut()
		answers("goes on with what it had", true)
	}
	all := logs.FilterMessage("not reloaded, the old stays in force").All()
	if len(all) != 2 {
		t.Errorf("logged %v, want one line of each file", logs.All())
	}
	for _, e := range all {
		if said := e.ContextMap()["error"].(string); strings.Contains(said, "another-password") || !strings.Contains(said, "no such file") && !strings.Contains(said, "another server") {
			t.Errorf("logged %q", said)
		}
	}
}
