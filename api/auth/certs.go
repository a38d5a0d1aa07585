package auth

import (
	"crypto/x509"
	"fmt"

	"github.com/countersign-dev/countersign/store"
)

// Cert names the writer that a client certificate belongs to. Exactly one of
// URI and CommonName is set. That the certificate is issued by a trusted CA and
// in time is TLS's to check (tls.VerifyClientCertIfGiven).
type Cert struct {
	Name       string `yaml:"name"`        // the writer's name on record
	URI        string `yaml:"uri"`         // a URI SAN, such as a SPIFFE ID; compared as a whole
	CommonName string `yaml:"common_name"` // the subject's CN
}

// Certs maps client certificates to writers.
type Certs []Cert

// Check reports what is wrong with the configuration.
func (cs Certs) Check() error {
	seen := map[string]bool{}
	for i, c := range cs {
		key := "uri " + c.URI
		if c.URI == "" {
			key = "common_name " + c.CommonName
		}
		switch {
		case !store.ValidID(c.Name):
			return fmt.Errorf("certificates[%d]: name %q is not a valid ID", i, c.Name)
		case (c.URI == "") == (c.CommonName == ""):
			return fmt.Errorf("certificates[%d]: set either uri or common_name", i)
		case seen[key]:
			return fmt.Errorf("certificates[%d]: %s is mapped twice", i, key)
		}
		seen[key] = true
	}
	return nil
}

// principal maps a verified leaf certificate. A certificate with a URI SAN is
// known by that alone: a CA that issues SPIFFE IDs does not vouch for the CN.
func (cs Certs) principal(leaf *x509.Certificate) (*Principal, error) {
	if len(leaf.URIs) > 1 {
		return nil, unauthenticated("the client certificate has %d URI SANs, want one (SPIFFE X509-SVID, section 2)", len(leaf.URIs))
	}
	for _, c := range cs {
		if len(leaf.URIs) == 1 {
			if c.URI != "" && c.URI == leaf.URIs[0].String() {
				return &Principal{Name: c.Name, Role: Writer, Method: "mtls"}, nil
			}
		} else if c.CommonName != "" && c.CommonName == leaf.Subject.CommonName {
			return &Principal{Name: c.Name, Role: Writer, Method: "mtls"}, nil
		}
	}
	return nil, unauthenticated("the client certificate is no writer's")
}
