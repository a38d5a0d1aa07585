package trust_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/trust/trusttest"
)

// followed is a Trust over files in a directory, with a clock that stands.
type followed struct {
	*trust.Trust
	dir  string
	now  atomic.Int64
	logs *observer.ObservedLogs
	ca   *trusttest.CA
}

func (f *followed) file(name string) string { return filepath.Join(f.dir, name) }

func (f *followed) pass(d time.Duration) { f.now.Add(int64(d)) }

func follow(t *testing.T, ca string, first x509.Certificate) *followed {
	t.Helper()
	f := &followed{dir: t.TempDir(), ca: trusttest.NewCA(t)}
	f.now.Store(time.Now().UnixNano())
	trusttest.WriteCAs(t, f.file("ca.pem"), f.ca.Cert)
	trusttest.Write(t, f.ca.Issue(t, first), f.file("tls.pem"), f.file("tls.key"))
	core, logs := observer.New(zap.InfoLevel)
	f.logs = logs
	files := trust.Files{Cert: f.file("tls.pem"), Key: f.file("tls.key"), Now: func() time.Time { return time.Unix(0, f.now.Load()) }}
	if ca != "" {
		files.CA = f.file(ca)
	}
	var err error
	if f.Trust, err = trust.Open(files, zap.New(core)); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *followed) serial() string { return f.Current().Certificate.Leaf.SerialNumber.String() }

func TestAReplacedCertificateCountsWithinASecond(t *testing.T) {
	f := follow(t, "ca.pem", x509.Certificate{})
	first := f.serial()
	next := f.ca.Issue(t, x509.Certificate{})
	trusttest.Write(t, next, f.file("tls.pem"), f.file("tls.key"))
	f.pass(time.Second / 2)
	if f.serial() != first {
		t.Error("the files are looked at more often than once a second")
	}
	f.pass(time.Second / 2)
	if f.serial() != next.Leaf.SerialNumber.String() {
		t.Error("the old certificate is in force")
	}
	other := trusttest.NewCA(t)
	trusttest.WriteCAs(t, f.file("ca.pem"), other.Cert)
	f.pass(time.Second)
	if s := f.Current(); len(s.Authorities) != 1 || !s.Authorities[0].Equal(other.Cert) {
		t.Error("the old authority is in force")
	}
}

func TestWhatIsNotWholeLeavesTheOldInForceAndIsLoggedOnce(t *testing.T) {
	f := follow(t, "ca.pem", x509.Certificate{})
	old, next := f.serial(), f.ca.Issue(t, x509.Certificate{})
	trusttest.Write(t, next, f.file("next.pem"), f.file("next.key"))
	read := func(name string) []byte {
		b, err := os.ReadFile(f.file(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	cert, key, ca := read("next.pem"), read("next.key"), read("ca.pem")
	good := map[string][]byte{"tls.pem": read("tls.pem"), "tls.key": read("tls.key"), "ca.pem": ca}
	write := func(cert *tls.Certificate, certFile string) []byte {
		trusttest.Write(t, cert, f.file(certFile), f.file("unused.key"))
		return read(certFile)
	}
	at := time.Unix(0, f.now.Load())
	ended := f.ca.Issue(t, x509.Certificate{NotBefore: at.Add(-2 * time.Hour), NotAfter: at.Add(-time.Hour)})
	trusttest.Write(t, ended, f.file("ended.pem"), f.file("ended.key"))
	for _, x := range []struct {
		name  string
		files map[string][]byte
		says  string
	}{
		{"a certificate whose key is yet to come", map[string][]byte{"tls.pem": cert}, "private key does not match"},
		{"a key whose certificate is yet to come", map[string][]byte{"tls.key": key}, "private key does not match"},
		{"half a certificate", map[string][]byte{"tls.pem": cert[:len(cert)/2]}, "failed to find any PEM data"},
		{"an empty key", map[string][]byte{"tls.key": nil}, "failed to find any PEM data"},
		{"an ended certificate", map[string][]byte{"tls.pem": read("ended.pem"), "tls.key": read("ended.key")}, "ended at"},
		{"one that has not begun", map[string][]byte{"tls.pem": write(f.ca.Issue(t, x509.Certificate{NotBefore: at.Add(time.Hour), NotAfter: at.Add(2 * time.Hour)}), "early.pem"), "tls.key": read("unused.key")}, "begins at"},
		{"half a bundle", map[string][]byte{"ca.pem": append(ca[:len(ca):len(ca)], ca[:len(ca)/2]...)}, "broken off"},
		{"an empty bundle", map[string][]byte{"ca.pem": nil}, "no PEM certificate"},
		{"a key in a bundle", map[string][]byte{"ca.pem": key}, "PRIVATE KEY"},
		{"a file too large", map[string][]byte{"ca.pem": make([]byte, 5<<20)}, "more than"},
		{"no file", map[string][]byte{"tls.pem": {'-'}}, "no such file"},
	} {
		f.logs.TakeAll()
		for name, b := range x.files {
			if string(b) == "-" {
				if err := os.Remove(f.file(name)); err != nil {
					t.Fatal(err)
				}
				continue
			}
			trusttest.Replace(t, f.file(name), b)
		}
		for range 3 {
			f.pass(time.Second)
			if s := f.Current(); f.serial() != old || len(s.Authorities) != 1 || !s.Authorities[0].Equal(f.ca.Cert) {
				t.Errorf("%s is in force", x.name)
			}
		}
		if all := f.logs.FilterMessage("not reloaded, the old stays in force").All(); len(all) != 1 || !strings.Contains(all[0].ContextMap()["error"].(string), x.says) {
			t.Errorf("%s: logged %v, want %q once", x.name, all, x.says)
		}
		for name := range x.files {
			trusttest.Replace(t, f.file(name), good[name])
		}
		f.pass(time.Second)
		f.Current()
	}
	// What was broken is read again although no file has changed since.
	trusttest.Write(t, f.ca.Issue(t, x509.Certificate{NotBefore: at.Add(time.Hour), NotAfter: at.Add(48 * time.Hour)}), f.file("tls.pem"), f.file("tls.key"))
	f.pass(time.Second)
	if f.serial() != old {
		t.Error("a certificate is in force before its time")
	}
	f.pass(2 * time.Hour)
	if f.serial() == old {
		t.Error("a certificate is not in force although its time has come")
	}
}

func TestALogLineHoldsNoKey(t *testing.T) {
	f := follow(t, "", x509.Certificate{})
	b, err := os.ReadFile(f.file("tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	trusttest.Replace(t, f.file("tls.key"), b[:len(b)-40])
	f.pass(time.Second)
	f.Current()
	secret := strings.Split(string(b), "\n")[1]
	for _, e := range f.logs.All() {
		for _, v := range e.ContextMap() {
			if s, ok := v.(string); ok && strings.Contains(s, secret[:20]) {
				t.Errorf("%s holds the key", e.Message)
			}
		}
	}
}

// serve answers by f's certificate.
func (f *followed) serve(t *testing.T) *httptest.Server {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := "nobody"
		if p := r.TLS.PeerCertificates; len(p) > 0 {
			name = p[0].SerialNumber.String()
		}
		_, _ = io.WriteString(w, name)
	}))
	s.EnableHTTP2 = true
	s.TLS = f.Server()
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func TestCertificatesAreReplacedUnderLoadAndNoCallFails(t *testing.T) {
	server, client := follow(t, "ca.pem", x509.Certificate{}), follow(t, "ca.pem", x509.Certificate{})
	trusttest.WriteCAs(t, client.file("ca.pem"), server.ca.Cert)
	trusttest.WriteCAs(t, server.file("ca.pem"), client.ca.Cert)
	step := func() {
		for _, f := range []*followed{server, client} {
			f.pass(2 * time.Second)
			f.Current()
		}
	}
	step()
	s := server.serve(t)
	caller := &http.Client{Transport: client.Transport(&http.Transport{ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 4})}
	defer caller.CloseIdleConnections()
	ask := func(c *http.Client) (string, string, error) {
		res, err := c.Get(s.URL)
		if err != nil {
			return "", "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), res.TLS.PeerCertificates[0].SerialNumber.String(), err
	}
	var calls atomic.Int64
	var wg sync.WaitGroup
	end := make(chan struct{})
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-end:
					return
				default:
				}
				if _, _, err := ask(caller); err != nil {
					t.Error(err)
					return
				}
				calls.Add(1)
			}
		}()
	}
	for range 10 {
		before := calls.Load()
		next := server.ca.Issue(t, x509.Certificate{})
		trusttest.Write(t, next, server.file("tls.pem"), server.file("tls.key"))
		mine := client.ca.Issue(t, x509.Certificate{})
		trusttest.Write(t, mine, client.file("tls.pem"), client.file("tls.key"))
		step()
		who, whom, err := ask(caller)
		if err != nil || who != mine.Leaf.SerialNumber.String() || whom != next.Leaf.SerialNumber.String() {
			t.Fatalf("%s asked %s after the change: %v", who, whom, err)
		}
		for calls.Load() < before+20 && !t.Failed() {
			time.Sleep(time.Millisecond) // until the load has gone on; there is no other sign of it
		}
	}
	close(end)
	wg.Wait()

	// Another authority: each side takes both before the certificates change.
	next := trusttest.NewCA(t)
	trusttest.WriteCAs(t, client.file("ca.pem"), server.ca.Cert, next.Cert)
	step()
	trusttest.Write(t, next.Issue(t, x509.Certificate{}), server.file("tls.pem"), server.file("tls.key"))
	step()
	caller.CloseIdleConnections()
	if _, _, err := ask(caller); err != nil {
		t.Error(err)
	}
	trusttest.WriteCAs(t, client.file("ca.pem"), server.ca.Cert)
	step()
	var unknown x509.UnknownAuthorityError
	if _, _, err := ask(caller); !errors.As(err, &unknown) {
		t.Errorf("an authority that counts no more was taken: %v", err)
	}
}

func TestAnEndedCertificateIsReplacedWhileConnectionsAreOpen(t *testing.T) {
	at := time.Now()
	f := follow(t, "", x509.Certificate{NotBefore: at.Add(-2 * time.Hour), NotAfter: at.Add(-time.Hour), DNSNames: []string{"localhost"}})
	if f.logs.FilterMessage("the certificate is not valid now").Len() != 1 {
		t.Error("a process that starts with an ended certificate says nothing")
	}
	s := f.serve(t)
	dial := func(at time.Time) (*tls.Conn, error) {
		conf := trusttest.Trust(t, f.ca.Cert).Client()
		conf.ServerName, conf.Time = "localhost", func() time.Time { return at }
		return tls.Dial("tcp", s.Listener.Addr().String(), conf)
	}
	open, err := dial(at.Add(-90 * time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if c, err := dial(at); err == nil {
		c.Close()
		t.Fatal("an ended certificate is good")
	}
	trusttest.Write(t, f.ca.Issue(t, x509.Certificate{}), f.file("tls.pem"), f.file("tls.key"))
	f.pass(time.Second)
	c, err := dial(at)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := io.WriteString(open, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(open); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200") {
		t.Errorf("an open connection was cut: %q %v", b, err)
	}
}

func TestOneWithoutFilesGoesByTheMachinesRoots(t *testing.T) {
	for _, x := range []*trust.Trust{nil, must(trust.Open(trust.Files{}, zap.NewNop()))} {
		if c := x.Client(); c.RootCAs != nil || len(c.Certificates) != 0 || c.MinVersion != tls.VersionTLS12 || c.InsecureSkipVerify {
			t.Errorf("%+v", c)
		}
	}
	if _, err := trust.Open(trust.Files{Cert: "x"}, zap.NewNop()); err == nil {
		t.Error("a certificate without its key was taken")
	}
	if _, err := trust.Open(trust.Files{CA: filepath.Join(t.TempDir(), "none")}, zap.NewNop()); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A server's name is checked where it is an address, too.
func TestAnAddressThatACertificateDoesNotNameIsRefused(t *testing.T) {
	f := follow(t, "ca.pem", x509.Certificate{DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}})
	s := f.serve(t)
	c := &http.Client{Transport: trusttest.Trust(t, f.ca.Cert).Transport(&http.Transport{})}
	defer c.CloseIdleConnections()
	var name x509.HostnameError
	if _, err := c.Get(s.URL); !errors.As(err, &name) { // s.URL is 127.0.0.1
		t.Error(err)
	}
}

func must[T any](x T, err error) T {
	if err != nil {
		panic(err)
	}
	return x
}

func FuzzAuthorities(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----"))
	file := filepath.Join(f.TempDir(), "ca.pem")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		x, err := trust.Open(trust.Files{CA: file}, zap.NewNop())
		if err == nil && (len(x.Current().Authorities) == 0 || x.Client().RootCAs == nil) {
			t.Error("a bundle of nothing was taken: the machine's roots would count")
		}
	})
}
