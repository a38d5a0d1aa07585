// Package trusttest makes certificates for tests.
package trusttest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/trust"
)

// CA is an authority whose key a test holds.
type CA struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes an authority that is valid for a day around now.
func NewCA(tb testing.TB) *CA {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	c := &CA{key: key}
	c.Cert = c.sign(tb, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key.Public())
	return c
}

func (c *CA) sign(tb testing.TB, leaf *x509.Certificate, public any) *x509.Certificate {
	tb.Helper()
	var err error
	leaf.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	must(tb, err)
	if leaf.NotAfter.IsZero() {
		leaf.NotBefore, leaf.NotAfter = time.Now().Add(-12*time.Hour), time.Now().Add(12*time.Hour)
	}
	parent := c.Cert
	if parent == nil {
		parent = leaf
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, parent, public, c.key)
	must(tb, err)
	cert, err := x509.ParseCertificate(der)
	must(tb, err)
	return cert
}

// Issue signs a certificate after template, valid for a day around now where it
// does not say, for 127.0.0.1 and localhost where it names nothing.
func (c *CA) Issue(tb testing.TB, template x509.Certificate) *tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	template.KeyUsage |= x509.KeyUsageDigitalSignature
	if len(template.DNSNames)+len(template.IPAddresses)+len(template.URIs) == 0 && template.Subject.CommonName == "" {
		template.DNSNames, template.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	leaf := c.sign(tb, &template, key.Public())
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// URIs parses URI SANs.
func URIs(tb testing.TB, uris ...string) (list []*url.URL) {
	tb.Helper()
	for _, s := range uris {
		u, err := url.Parse(s)
		must(tb, err)
		list = append(list, u)
	}
	return list
}

// Write puts a certificate and its key into files in the place of what is there,
// as who renews certificates does: each by rename.
func Write(tb testing.TB, cert *tls.Certificate, certFile, keyFile string) {
	tb.Helper()
	var chain []byte
	for _, der := range cert.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	must(tb, err)
	Replace(tb, certFile, chain)
	Replace(tb, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// WriteCAs puts authorities into a file in the place of what is there.
func WriteCAs(tb testing.TB, file string, certs ...*x509.Certificate) {
	tb.Helper()
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	Replace(tb, file, b)
}

// Replace puts a file in the place of another by rename.
func Replace(tb testing.TB, file string, content []byte) {
	tb.Helper()
	must(tb, os.WriteFile(file+".new", content, 0o600))
	must(tb, os.Rename(file+".new", file))
}

// Trust follows a file of authorities, certs.
func Trust(tb testing.TB, certs ...*x509.Certificate) *trust.Trust {
	tb.Helper()
	file := filepath.Join(tb.TempDir(), "ca.pem")
	WriteCAs(tb, file, certs...)
	t, err := trust.Open(trust.Files{CA: file}, zap.NewNop())
	must(tb, err)
	return t
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
