package gateway

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
)

const (
	proofPast   = 60 * time.Second // how old a proof may be
	proofFuture = 5 * time.Second  // how far its holder's clock may be ahead
	maxProof    = 8 << 10          // bytes of a proof that is looked at
	maxJTI      = 256              // bytes of its name
	// maxProofs is how many proofs of one session are remembered for each
	// proofPast+proofFuture. More are refused, since a repetition could not be told
	// from a new one: about 500 a second.
	maxProofs = 32 << 10
)

// Authenticate returns the session that a request shows: by its token alone
// (Authorization: Bearer, RFC 6750, section 2.1), or, where the session is bound
// to a key, by token and proof (Authorization: DPoP and DPoP, RFC 9449, section
// 7.1). A request with a URL of its own (RFC 9112, section 3.2.2) is proved
// under that URL, any other under the address that steps are told. Errors wrap
// ErrNoSession; ErrProof too where the token is good and the proof is not.
func (g *Gateway) Authenticate(r *http.Request) (*Session, error) {
	auth := r.Header.Values("Authorization")
	if len(auth) != 1 {
		return nil, ErrNoSession
	}
	scheme, token, _ := strings.Cut(auth[0], " ")
	s := g.holder(strings.TrimLeft(token, " "))
	switch {
	case s == nil:
		return nil, ErrNoSession
	case s.proof == nil && strings.EqualFold(scheme, "Bearer"):
		return s, nil
	case s.proof != nil && strings.EqualFold(scheme, "DPoP"):
		if err := s.proved(r); err != nil {
			return nil, fmt.Errorf("%w: %w: %w", ErrNoSession, ErrProof, err)
		}
		return s, nil
	}
	return nil, ErrNoSession
}

// proof is the key that a session is bound to, and which proofs it was shown.
type proof struct {
	key    *jose.JSONWebKey
	thumb  [32]byte // RFC 7638
	ath    string   // RFC 9449, section 4.2: base64url of the SHA-256 of the token
	mu     sync.Mutex
	since  time.Time
	now    map[[16]byte]struct{} // digests of the jti that were shown since then
	before map[[16]byte]struct{} // in the time before
}

// newProof binds a token to the key of a JWK.
func newProof(jwk, token string) (*proof, error) {
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON([]byte(jwk)); err != nil {
		return nil, errors.New("not a JWK (RFC 7517)")
	}
	if _, err := algorithm(&key); err != nil {
		return nil, err
	}
	p := &proof{key: &key, now: map[[16]byte]struct{}{}}
	var err error
	if p.thumb, err = thumbprint(&key); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(token))
	p.ath = base64.RawURLEncoding.EncodeToString(sum[:])
	return p, nil
}

// algorithm is the one that goes with a key. Others are not taken.
func algorithm(k *jose.JSONWebKey) (jose.SignatureAlgorithm, error) {
	switch key := k.Key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() && k.Valid() {
			return jose.ES256, nil
		}
	case ed25519.PublicKey:
		if k.Valid() {
			return jose.EdDSA, nil
		}
	}
	return "", errors.New("not a public key of P-256 or Ed25519")
}

func thumbprint(k *jose.JSONWebKey) (sum [32]byte, err error) {
	b, err := k.Thumbprint(crypto.SHA256)
	if err != nil || len(b) != len(sum) {
		return sum, errors.New("a key without thumbprint")
	}
	copy(sum[:], b)
	return sum, nil
}

// proved checks the proof of a request (RFC 9449, section 4.3).
func (s *Session) proved(r *http.Request) error {
	proofs := r.Header.Values("DPoP")
	if len(proofs) != 1 {
		return errors.New("not exactly one proof")
	}
	u := *r.URL
	if u.Host == "" {
		at, err := url.Parse(s.g.Addresses[s.Grant.Access.Protocol])
		if err != nil || at.Host == "" {
			return errors.New("the gateway has no address to be proved for")
		}
		u.Scheme, u.Host = at.Scheme, at.Host
	}
	want, err := normal(&u)
	if err != nil {
		return err
	}
	return s.proof.check(proofs[0], r.Method, want, s.g.Now())
}

// claims of a proof (RFC 9449, section 4.2). Others mean nothing here.
type claims struct {
	JTI string  `json:"jti"`
	HTM string  `json:"htm"`
	HTU string  `json:"htu"`
	IAT float64 `json:"iat"` // NumericDate: seconds
	ATH string  `json:"ath"`
}

// check checks a proof for a method and a URL in its normal form, at now. Its
// errors quote nothing of the proof.
func (p *proof) check(raw, method, want string, now time.Time) error {
	if len(raw) > maxProof {
		return errors.New("too long")
	}
	// Which algorithms there are is not the proof's to say: none, and none with a
	// shared secret, is among them.
	jws, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA})
	if err != nil || len(jws.Signatures) != 1 {
		return errors.New("not a JWT signed with ES256 or EdDSA")
	}
	head := jws.Signatures[0].Protected
	if typ, _ := head.ExtraHeaders[jose.HeaderType].(string); !strings.EqualFold(typ, "dpop+jwt") {
		return errors.New("its typ is not dpop+jwt")
	}
	if head.JSONWebKey == nil {
		return errors.New("without jwk")
	}
	alg, err := algorithm(head.JSONWebKey)
	if err != nil || head.Algorithm != string(alg) {
		return errors.New("its alg does not go with its jwk")
	}
	thumb, err := thumbprint(head.JSONWebKey)
	if err != nil || subtle.ConstantTimeCompare(thumb[:], p.thumb[:]) != 1 {
		return errors.New("of another key than the session's")
	}
	payload, err := jws.Verify(p.key)
	if err != nil {
		return errors.New("its signature does not verify")
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return errors.New("its claims are not what RFC 9449 says")
	}
	htu, err := url.Parse(c.HTU)
	if err != nil {
		return errors.New("its htu is not a URL")
	}
	got, err := normal(htu)
	past, future := float64(now.Add(-proofPast).UnixNano())/1e9, float64(now.Add(proofFuture).UnixNano())/1e9
	switch {
	case err != nil || got != want:
		return errors.New("of another htu")
	case c.HTM != method:
		return errors.New("of another htm")
	case c.IAT < past || c.IAT > future:
		return errors.New("too old, or from the future")
	case subtle.ConstantTimeCompare([]byte(c.ATH), []byte(p.ath)) != 1:
		return errors.New("of another ath")
	case c.JTI == "" || len(c.JTI) > maxJTI:
		return errors.New("without jti, or with one too long")
	}
	return p.spend(c.JTI, now)
}

// spend takes a proof's name, once while the proof could be good.
func (p *proof) spend(jti string, now time.Time) error {
	sum := sha256.Sum256([]byte(jti))
	id := [16]byte(sum[:16])
	p.mu.Lock()
	defer p.mu.Unlock()
	switch age := now.Sub(p.since); {
	case age >= 2*(proofPast+proofFuture):
		p.since, p.now, p.before = now, map[[16]byte]struct{}{}, nil
	case age >= proofPast+proofFuture:
		p.since, p.now, p.before = now, map[[16]byte]struct{}{}, p.now
	}
	_, again := p.now[id]
	_, earlier := p.before[id]
	switch {
	case again || earlier:
		return errors.New("shown before")
	case len(p.now) >= maxProofs:
		return errors.New("one of too many at once")
	}
	p.now[id] = struct{}{}
	return nil
}

// normal is u without query and fragment, in the normal form of RFC 3986,
// sections 6.2.2 and 6.2.3, but for dot segments: those make another URL.
func normal(u *url.URL) (string, error) {
	scheme, host := strings.ToLower(u.Scheme), strings.ToLower(u.Host)
	switch {
	case scheme != "http" && scheme != "https" || host == "" || u.User != nil || u.Opaque != "":
		return "", errors.New("not a URL of HTTP")
	case scheme == "http":
		host = strings.TrimSuffix(host, ":80")
	case scheme == "https":
		host = strings.TrimSuffix(host, ":443")
	}
	host = strings.TrimSuffix(host, ":")
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] != '%' || i+2 >= len(path) {
			b.WriteByte(path[i])
			continue
		}
		c := unhex(path[i+1])<<4 | unhex(path[i+2])
		if unreserved(c) {
			b.WriteByte(c)
		} else {
			b.WriteString(strings.ToUpper(path[i : i+3]))
		}
		i += 2
	}
	return scheme + "://" + host + b.String(), nil
}

// unhex is the value of a hexadecimal digit, which net/url has checked it is.
func unhex(c byte) byte {
	switch {
	case c >= 'a':
		return c - 'a' + 10
	case c >= 'A':
		return c - 'A' + 10
	}
	return c - '0'
}

// unreserved are the characters of RFC 3986, section 2.3.
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0
}
