package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func sshKey(t testing.TB) string {
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	k, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

// csr names nothing: the catalogue does.
func csr(t testing.TB) string {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func TestABrokerTokenWithThePlannedPolicyMintsFromEveryEngineAndMayDoNothingElse(t *testing.T) {
	b := newBench(t, benchOptions{postgres: true})
	if missing, err := b.iss.CheckCapabilities(t.Context()); err != nil || len(missing) > 0 {
		t.Fatalf("missing %v, %v", missing, err)
	}
	if err := b.iss.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}

	t.Run("identity", func(t *testing.T) {
		m := b.mint(ask{scope: "identity:step"})
		c, err := b.iss.cfg.Identity.Verify(m.Credential.Token, "countersign-demo")
		if err != nil {
			t.Fatal(err)
		}
		if c.ID != m.Issued.Intent || m.Issued.Serial != c.ID || m.Issued.Revocable || c.Subject != "spiffe://countersign.test/orchestrator/demo/run/run-1/step/step-1" {
			t.Errorf("claims %+v, issued %+v", c, m.Issued)
		}
		if !m.Issued.Expires.Equal(c.ExpiresAt.Time) {
			t.Errorf("recorded end %s, the token's %s", m.Issued.Expires, c.ExpiresAt)
		}
	})

	t.Run("token", func(t *testing.T) {
		m := b.mint(ask{scope: "vault:demo-read"})
		if err := b.iss.Activate(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		step := b.vaultAs(m.Credential.Token)
		s, err := step.Logical().Read("secret/data/demo")
		if err != nil || s == nil {
			t.Fatalf("the step cannot read its path: %v", err)
		}
		for _, path := range []string{"secret/data/other", "secret/metadata/demo", "sys/mounts", "auth/token/lookup-self"} {
			if _, err := step.Logical().Read(path); err == nil || !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("%s: %v, want permission denied", path, err)
			}
		}
		if _, err := step.Logical().Write("secret/data/demo", map[string]any{"data": map[string]any{"a": "b"}}); err == nil {
			t.Error("the step wrote where it may read")
		}
		got, err := b.root.Auth().Token().LookupAccessor(m.Issued.Accessor)
		if err != nil {
			t.Fatal(err)
		}
		meta, _ := got.Data["meta"].(map[string]any)
		if meta["intent"] != m.Issued.Intent || meta["run"] != "run-1" || meta["step"] != "step-1" || meta["orchestrator"] != "demo" || meta["request"] == "" {
			t.Errorf("meta %v", meta)
		}
		if got.Data["orphan"] != true {
			t.Error("the child is not an orphan")
		}
		if m.Issued.Expires.After(time.Now().Add(time.Minute)) {
			t.Errorf("ends %s", m.Issued.Expires)
		}
	})

	t.Run("database", func(t *testing.T) {
		m := b.mint(ask{scope: "orders-db:read"})
		if err := b.iss.Activate(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		conn, err := b.database(m.Credential)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		var n int
		if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n); err != nil || n == 0 {
			t.Fatalf("%d rows, %v", n, err)
		}
		if m.Issued.LeaseID == "" || m.Issued.Accessor == "" || !m.Issued.Revocable {
			t.Errorf("issued %+v", m.Issued)
		}
		if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
			t.Error("the open session outlived its revocation")
		}
		if c, err := b.database(m.Credential); err == nil {
			c.Close(t.Context())
			t.Error("the role outlived its revocation")
		}
		if err := b.iss.Revoke(t.Context(), m.Issued); err != nil {
			t.Errorf("a second revocation: %v", err)
		}
	})

	t.Run("pki", func(t *testing.T) {
		m := b.mint(ask{scope: "pki:service", params: map[string]string{"service": "billing"}})
		if err := b.iss.Activate(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if _, err := tls.X509KeyPair([]byte(m.Credential.Certificate), []byte(m.Credential.PrivateKey)); err != nil {
			t.Fatal(err)
		}
		cert := parseCert(t, m.Credential.Certificate)
		if cert.DNSNames[0] != "billing.demo.internal" || !cert.NotAfter.Equal(m.Issued.Expires.Time) || m.Issued.Serial == "" || m.Issued.Revocable || m.Issued.Accessor != "" {
			t.Errorf("certificate for %v until %s, issued %+v", cert.DNSNames, cert.NotAfter, m.Issued)
		}
		if len(m.Credential.CAChain) == 0 {
			t.Error("no CA chain")
		}
	})

	t.Run("pki with the step's own key", func(t *testing.T) {
		m := b.mint(ask{scope: "pki:service", params: map[string]string{"service": "billing"}, publicKey: csr(t)})
		if m.Credential.PrivateKey != "" || parseCert(t, m.Credential.Certificate).DNSNames[0] != "billing.demo.internal" {
			t.Errorf("%+v", m.Issued)
		}
	})

	t.Run("ssh", func(t *testing.T) {
		m := b.mint(ask{scope: "ssh:deploy", publicKey: sshKey(t)})
		k, _, _, _, err := ssh.ParseAuthorizedKey([]byte(m.Credential.SignedKey))
		if err != nil {
			t.Fatal(err)
		}
		cert := k.(*ssh.Certificate)
		if cert.ValidPrincipals[0] != "deploy" || len(cert.ValidPrincipals) != 1 || int64(cert.ValidBefore) != m.Issued.Expires.Unix() || m.Issued.Revocable {
			t.Errorf("principals %v, issued %+v", cert.ValidPrincipals, m.Issued)
		}
	})

	t.Run("the broker's token may not", func(t *testing.T) {
		broker := b.vaultAs(b.brokerToken).Logical()
		for _, path := range []string{"secret/data/demo", "database/creds/orders-read", "sys/policies/acl/countersign-broker", "auth/token/roles/countersign-vault-demo-read"} {
			if _, err := broker.Read(path); err == nil || !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("reading %s: %v, want permission denied", path, err)
			}
		}
		for path, data := range map[string]map[string]any{
			"sys/policies/acl/countersign-broker":          {"policy": `path "*" { capabilities = ["sudo"] }`},
			"auth/token/roles/countersign-vault-demo-read": {"allowed_policies": "root"},
			"auth/token/create":                            {"policies": []string{"countersign-broker"}},
			"pki/issue/service":                            {"common_name": "a.demo.internal"},
			"ssh/sign/deploy":                              {"public_key": sshKey(t)},
			"secret/data/demo":                             {"data": map[string]any{"a": "b"}},
			"sys/leases/revoke-prefix/database":            {},
		} {
			if _, err := broker.Write(path, data); err == nil || !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("writing %s: %v, want permission denied", path, err)
			}
		}
		// Its roles give the scope's policy and no other.
		if _, err := broker.Write("auth/token/create/countersign-vault-demo-read", map[string]any{"policies": []string{"countersign-vault-demo-admin"}}); err == nil {
			t.Error("a role gave another scope's policy")
		}
	})
}

func parseCert(t testing.TB, s string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(s))
	if block == nil {
		t.Fatal("no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
