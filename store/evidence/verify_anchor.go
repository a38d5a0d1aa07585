package evidence

import (
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

// maxJWKS is the largest key set read, in bytes.
const maxJWKS = 1 << 20

// anchors checks enrolments of passkeys against identity providers' keys, which
// come from the verifier and never from the record.
type anchors struct {
	keys map[string][][]byte // JWKs by issuer
}

// newAnchors reads JWK sets (RFC 7517, section 5) by issuer. Without any it
// returns nil.
func newAnchors(sets map[string][]byte) (*anchors, error) {
	if len(sets) == 0 {
		return nil, nil
	}
	a := &anchors{keys: map[string][][]byte{}}
	for issuer, raw := range sets {
		var set struct {
			Keys []jsontext.Value `json:"keys"`
		}
		if len(raw) > maxJWKS {
			return nil, fmt.Errorf("%w: the keys of %s are %d bytes long", ErrUnchecked, issuer, len(raw))
		}
		if err := json.Unmarshal(raw, &set); err != nil || len(set.Keys) == 0 {
			return nil, fmt.Errorf("%w: the keys of %s are no JWK set (RFC 7517): save its jwks_uri to a file", ErrUnchecked, issuer)
		}
		for _, k := range set.Keys {
			a.keys[issuer] = append(a.keys[issuer], k)
		}
	}
	return a, nil
}

// check says why the login in e does not anchor the passkey d, or nil.
func (a *anchors) check(origin string, d *store.EnrolledDetails, e *store.Entry, opened map[string]string) error {
	keys, ok := a.keys[d.Issuer]
	if !ok {
		return fmt.Errorf("the key is anchored by %.200q, and the keys of that provider were not given", d.Issuer)
	}
	err := errors.New("no key")
	for _, k := range keys {
		if err = d.CheckAnchor(origin, e, opened[store.SealedPerson], opened[store.SealedIDToken], k); err == nil {
			return nil
		}
	}
	return err
}
