package issuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/golang-jwt/jwt/v5"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
)

// Algorithm is a JWS algorithm (RFC 7518, RFC 8037) that identity tokens are
// signed with.
type Algorithm string

// The algorithms.
const (
	ES256 Algorithm = "ES256" // P-256
	RS256 Algorithm = "RS256" // 2048 bits at least
	EdDSA Algorithm = "EdDSA" // Ed25519
)

func (a Algorithm) valid() bool { return a == ES256 || a == RS256 || a == EdDSA }

func (a Algorithm) method() jwt.SigningMethod {
	switch a {
	case RS256:
		return jwt.SigningMethodRS256
	case EdDSA:
		return jwt.SigningMethodEdDSA
	}
	return jwt.SigningMethodES256
}

// NewKey makes a private key for a.
func (a Algorithm) NewKey() (crypto.Signer, error) {
	switch a {
	case ES256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case RS256:
		return rsa.GenerateKey(rand.Reader, 3072)
	case EdDSA:
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return k, err
	}
	return nil, fmt.Errorf("algorithm %q is not one of ES256, RS256 and EdDSA", a)
}

// keyFile is the private key file, mode 0600: private JWKs (RFC 7517) in the
// order in which they sign, each with the time from which it does; without
// one, it signs at once. Instead, the file may hold one private key in PEM
// (PKCS #8, SEC 1 or PKCS #1) or one JWK; the first rotation rewrites it.
type keyFile struct {
	Keys []keyEntry `json:"keys"`
}

type keyEntry struct {
	SignsFrom store.Time      `json:"signs_from"`
	JWK       jose.JSONWebKey `json:"jwk"`
}

// fileLock keeps two rotations in one process apart. Two processes must not
// rotate at once; `countersign key` and one broker do not.
type fileLock struct{ sync.Mutex }

// open reads the key file, or makes it.
func (i *Identity) open() error {
	i.file.Lock()
	defer i.file.Unlock()
	keys, err := readKeys(i.cfg.KeyFile)
	if errors.Is(err, os.ErrNotExist) {
		k, err := newKey(i.cfg.Algorithm, time.Time{})
		if err != nil {
			return err
		}
		keys = []signingKey{*k}
		if err := writeKeys(i.cfg.KeyFile, keys); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	i.keys.Store(&keys)
	return nil
}

// Reload reads the key file again, as another process left it. On an error
// the keys stay as they were.
func (i *Identity) Reload() error {
	i.file.Lock()
	defer i.file.Unlock()
	keys, err := readKeys(i.cfg.KeyFile)
	if err != nil {
		return err
	}
	i.keys.Store(&keys)
	return nil
}

// ErrRotating says that the last rotation's key does not sign yet.
var ErrRotating = errors.New("a rotation is under way")

// Rotate adds a key. It is published at once and signs after Lead, so that
// whoever caches the JWKS for less than that knows it by then. The key before
// it stays published until its last token has ended; those that nothing hangs
// on any more are dropped from the file.
//
// A crash in here leaves the old file as it was (and a temporary file beside
// it, which the next rotation overwrites), or the new one whole.
func (i *Identity) Rotate() (kid string, err error) {
	i.file.Lock()
	defer i.file.Unlock()
	now := i.cfg.Now()
	keys := *i.keys.Load()
	if last := keys[len(keys)-1]; last.from.After(now) {
		return "", fmt.Errorf("%w: key %s signs from %s", ErrRotating, last.kid, last.from.UTC().Format(time.RFC3339))
	}
	k, err := newKey(i.cfg.Algorithm, now.Add(i.cfg.Lead))
	if err != nil {
		return "", err
	}
	next := append(slices.Clone(i.published(now)), *k)
	if err := writeKeys(i.cfg.KeyFile, next); err != nil {
		return "", err
	}
	i.keys.Store(&next)
	return k.kid, nil
}

func newKey(a Algorithm, from time.Time) (*signingKey, error) {
	private, err := a.NewKey()
	if err != nil {
		return nil, fmt.Errorf("making an identity key: %w", err)
	}
	return checkKey(private, from)
}

// checkKey takes a private key for signing, when it is of a kind and size
// that may sign.
func checkKey(private any, from time.Time) (*signingKey, error) {
	k := &signingKey{from: store.At(from).Time}
	if from.IsZero() {
		k.from = from
	}
	switch p := private.(type) {
	case *ecdsa.PrivateKey:
		if p.Curve != elliptic.P256() {
			return nil, errors.New("an EC identity key must be on P-256")
		}
		k.alg, k.private = ES256, p
	case *rsa.PrivateKey:
		if p.N.BitLen() < 2048 {
			return nil, fmt.Errorf("an RSA identity key must have 2048 bits at least, this one has %d", p.N.BitLen())
		}
		k.alg, k.private = RS256, p
	case ed25519.PrivateKey:
		k.alg, k.private = EdDSA, p
	default:
		return nil, errors.New("an identity key must be a private one, on P-256, RSA or Ed25519")
	}
	jwk := jose.JSONWebKey{Key: k.private.Public()}
	sum, err := jwk.Thumbprint(crypto.SHA256) // RFC 7638
	if err != nil {
		return nil, fmt.Errorf("identity key: %w", err)
	}
	k.kid = base64.RawURLEncoding.EncodeToString(sum)
	return k, nil
}

func readKeys(name string) ([]signingKey, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the identity keys: %w", err)
	}
	keys, err := parseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("identity keys in %s: %w", name, err)
	}
	return keys, nil
}

// parseKeys reads a key file. Its errors quote nothing of the file.
func parseKeys(b []byte) ([]signingKey, error) {
	if block, _ := pem.Decode(b); block != nil {
		private, err := parsePEM(block)
		if err != nil {
			return nil, err
		}
		k, err := checkKey(private, time.Time{})
		if err != nil {
			return nil, err
		}
		return []signingKey{*k}, nil
	}
	var f keyFile
	if err := json.Unmarshal(b, &f, json.RejectUnknownMembers(true)); err != nil {
		var single jose.JSONWebKey
		if err := json.Unmarshal(b, &single); err != nil {
			return nil, errors.New("neither a key file, nor a private JWK, nor PEM")
		}
		f.Keys = []keyEntry{{JWK: single}}
	}
	var keys []signingKey
	for n, entry := range f.Keys {
		k, err := checkKey(entry.JWK.Key, entry.SignsFrom.Time)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", n+1, err)
		}
		if n > 0 && !k.from.After(keys[n-1].from) {
			return nil, fmt.Errorf("key %d does not sign after the one ahead of it", n+1)
		}
		keys = append(keys, *k)
	}
	if len(keys) == 0 {
		return nil, errors.New("no key")
	}
	return keys, nil
}

func parsePEM(block *pem.Block) (any, error) {
	if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	if k, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	return nil, fmt.Errorf("PEM block %q is not an unencrypted private key", block.Type)
}

// writeKeys puts the key file in place: whole and durable, or not at all.
func writeKeys(name string, keys []signingKey) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing the identity keys: %w", err)
		}
	}()
	var f keyFile
	for _, k := range keys {
		e := keyEntry{SignsFrom: store.Time{Time: k.from}, JWK: jose.JSONWebKey{Key: k.private, KeyID: k.kid, Algorithm: string(k.alg), Use: "sig"}}
		f.Keys = append(f.Keys, e)
	}
	b, err := json.Marshal(f)
	if err != nil {
		return errors.New("the keys do not marshal")
	}
	// A crash before this leaves the old keys; the new one is not used before it
	// returns.
	return durable.WriteFile(name, append(b, '\n'))
}
