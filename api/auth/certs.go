package auth

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// Cert names the caller that a client certificate belongs to. Exactly one of
// URI and CommonName is set.
type Cert struct {
	Name       string   `yaml:"name"`        // the caller's name on record
	URI        string   `yaml:"uri"`         // a URI SAN, such as a SPIFFE ID; compared as a whole
	CommonName string   `yaml:"common_name"` // the subject's CN; of writers alone
	Owners     []string `yaml:"-"`           // people who own an orchestrator, as "user:NAME"
}

// Certs maps client certificates to callers.
type Certs []Cert

// Check reports what is wrong with the configuration of callers of role.
func (cs Certs) Check(role Role) error {
	seen := map[string]bool{}
	var domain spiffeid.TrustDomain
	for i, c := range cs {
		key := "uri " + c.URI
		if c.URI == "" {
			key = "common_name " + c.CommonName
		}
		switch {
		case !store.ValidID(c.Name):
			return fmt.Errorf("certificates[%d]: name %q is not a valid ID", i, c.Name)
		case role == Orchestrator && c.CommonName != "":
			return fmt.Errorf("certificates[%d]: orchestrators are known by uri alone, a SPIFFE ID", i)
		case (c.URI == "") == (c.CommonName == ""):
			return fmt.Errorf("certificates[%d]: set either uri or common_name", i)
		case seen[key]:
			return fmt.Errorf("certificates[%d]: %s is mapped twice", i, key)
		case role != Orchestrator && len(c.Owners) > 0:
			return fmt.Errorf("certificates[%d]: owners are an orchestrator's", i)
		}
		seen[key] = true
		for _, o := range c.Owners {
			if err := ValidPerson(o); err != nil {
				return fmt.Errorf("certificates[%d].owners: %w", i, err)
			}
		}
		if c.URI == "" {
			continue
		}
		id, err := spiffeid.FromString(c.URI)
		switch {
		case err != nil && role != Orchestrator && !isSPIFFE(c.URI):
			continue // another kind of URI, which a writer's certificate may carry
		case err != nil:
			return fmt.Errorf("certificates[%d].uri: %w", i, err)
		case !domain.IsZero() && id.TrustDomain() != domain:
			return fmt.Errorf("certificates[%d].uri: %s is of another trust domain than %s: one bundle speaks for one (SPIFFE Trust Domain and Bundle, section 4)", i, c.URI, domain)
		}
		domain = id.TrustDomain()
	}
	return nil
}

func isSPIFFE(uri string) bool { return len(uri) >= 7 && uri[:7] == "spiffe:" }

// ClientCerts knows callers by their client certificates. TLS has checked that
// they hold the key (trust.Trust.Server); all else is checked here, with each
// request, so that the end of a certificate and the removal of an authority
// count on connections that are open. It is safe for concurrent use.
type ClientCerts struct {
	Trust *trust.Trust     // whose authorities certificates come from; nil: none counts
	Role  Role             // of every caller
	Certs Certs            // who they are
	Now   func() time.Time // nil: time.Now

	mu       sync.Mutex
	state    *trust.State                   // what known was verified by
	verified map[[sha256.Size]byte]validity // by the chain as it was sent
}

// validity is when a chain that was verified once is valid.
type validity struct{ from, to time.Time }

// maxVerified is how many chains are remembered. Forgetting one costs its
// verification, some 100 µs.
const maxVerified = 1024

// principal says whose the certificates of a TLS connection are, leaf first.
func (c *ClientCerts) principal(sent []*x509.Certificate) (*Principal, error) {
	if err := c.verify(sent); err != nil {
		return nil, unauthenticated("the client certificate: %w", err)
	}
	leaf := sent[0]
	for _, x := range c.Certs {
		switch {
		// A certificate with a URI SAN is known by that alone: a CA that issues
		// SPIFFE IDs does not vouch for the CN.
		case len(leaf.URIs) == 1 && x.URI != "" && x.URI == leaf.URIs[0].String(),
			len(leaf.URIs) == 0 && x.CommonName != "" && x.CommonName == leaf.Subject.CommonName:
			return &Principal{Name: x.Name, Role: c.Role, Method: "mtls", Owners: x.Owners}, nil
		}
	}
	return nil, unauthenticated("the client certificate is no %s's", c.Role)
}

func (c *ClientCerts) verify(sent []*x509.Certificate) error {
	s, now := c.Trust.Current(), clock(c.Now).now()
	if s.Roots == nil {
		return fmt.Errorf("none is taken here")
	}
	h := sha256.New()
	for _, x := range sent {
		h.Write(x.Raw) // DER says itself where it ends
	}
	key := [sha256.Size]byte(h.Sum(nil))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != s || len(c.verified) >= maxVerified {
		c.state, c.verified = s, map[[sha256.Size]byte]validity{}
	}
	if v, ok := c.verified[key]; ok && !now.Before(v.from) && !now.After(v.to) {
		return nil
	}
	v, err := verify(sent, s, now)
	if err == nil {
		c.verified[key] = v
	}
	return err
}

// verify checks a chain as RFC 5280 has it, and one of a SPIFFE ID as SPIFFE's
// X.509-SVID (section 5) does too.
func verify(sent []*x509.Certificate, s *trust.State, now time.Time) (validity, error) {
	leaf, between := sent[0], x509.NewCertPool()
	for _, x := range sent[1:] {
		between.AddCert(x)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: s.Roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return validity{}, err
	}
	if len(leaf.URIs) > 1 {
		return validity{}, fmt.Errorf("%d URI SANs, want one (SPIFFE X.509-SVID, section 2)", len(leaf.URIs))
	}
	if len(leaf.URIs) == 1 && leaf.URIs[0].Scheme == "spiffe" {
		id, err := x509svid.IDFromCert(leaf)
		if err != nil {
			return validity{}, err
		}
		bundle := x509bundle.FromX509Authorities(id.TrustDomain(), s.Authorities)
		if _, _, err := x509svid.Verify(sent, bundle, x509svid.WithTime(now)); err != nil {
			return validity{}, err
		}
	}
	v := validity{leaf.NotBefore, leaf.NotAfter}
	for _, x := range chains[0] {
		if x.NotBefore.After(v.from) {
			v.from = x.NotBefore
		}
		if x.NotAfter.Before(v.to) {
			v.to = x.NotAfter
		}
	}
	return v, nil
}
