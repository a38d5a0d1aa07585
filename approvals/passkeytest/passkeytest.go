// Package passkeytest is a passkey in software, for tests: it makes what a
// browser with a real authenticator makes (W3C WebAuthn, sections 6.1, 6.5 and
// 8.7), and can be told to make it wrong.
package passkeytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"

	"github.com/fxamacker/cbor/v2"
	"github.com/go-json-experiment/json"
)

// Key is one passkey.
type Key struct {
	RPID   string // relying party
	Origin string // the page's
	// Unverified leaves out that the user was verified.
	Unverified bool
	// CrossOrigin says that another site's page framed this one.
	CrossOrigin bool

	id     []byte
	key    *ecdsa.PrivateKey
	public []byte // COSE_Key
	count  uint32
}

// New makes a passkey for a relying party.
func New(rpID, origin string) *Key {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // never: the curve is one of Go's own
	}
	point, err := key.PublicKey.Bytes() // 0x04, x, y
	if err != nil {
		panic(err)
	}
	k := &Key{RPID: rpID, Origin: origin, id: make([]byte, 32), key: key}
	rand.Read(k.id)
	// RFC 9053, section 7.1.1: EC2, ES256, P-256.
	k.public = encode(map[int]any{1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:65]})
	return k
}

func encode(v any) []byte {
	mode, err := cbor.CTAP2EncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	b, err := mode.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// ID is the credential ID in base64url.
func (k *Key) ID() string { return base64.RawURLEncoding.EncodeToString(k.id) }

func (k *Key) client(ceremony string, challenge []byte) []byte {
	b, err := json.Marshal(map[string]any{"type": ceremony, "challenge": base64.RawURLEncoding.EncodeToString(challenge),
		"origin": k.Origin, "crossOrigin": k.CrossOrigin}, json.Deterministic(true))
	if err != nil {
		panic(err)
	}
	return b
}

// Flags of authenticator data.
const (
	present, verified, attested = 1, 4, 64
)

func (k *Key) data(flags byte) []byte {
	if !k.Unverified {
		flags |= verified
	}
	k.count++
	rp := sha256.Sum256([]byte(k.RPID))
	return binary.BigEndian.AppendUint32(append(rp[:], flags|present), k.count)
}

func text(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// Create answers navigator.credentials.create: a PublicKeyCredential as JSON,
// without attestation.
func (k *Key) Create(challenge []byte) []byte {
	data := append(k.data(attested), make([]byte, 16)...) // no AAGUID
	data = binary.BigEndian.AppendUint16(data, uint16(len(k.id)))
	data = append(append(data, k.id...), k.public...)
	return k.credential(map[string]any{
		"clientDataJSON":    text(k.client("webauthn.create", challenge)),
		"attestationObject": text(encode(map[string]any{"fmt": "none", "attStmt": map[string]any{}, "authData": data})),
	})
}

func (k *Key) credential(response map[string]any) []byte {
	b, err := json.Marshal(map[string]any{"id": k.ID(), "rawId": k.ID(), "type": "public-key", "response": response}, json.Deterministic(true))
	if err != nil {
		panic(err)
	}
	return b
}

// Sign signs challenge, as navigator.credentials.get does.
func (k *Key) Sign(challenge []byte) (authenticatorData, clientData, signature []byte) {
	authenticatorData, clientData = k.data(0), k.client("webauthn.get", challenge)
	hash := sha256.Sum256(clientData)
	sum := sha256.Sum256(append(append([]byte{}, authenticatorData...), hash[:]...))
	signature, err := ecdsa.SignASN1(rand.Reader, k.key, sum[:])
	if err != nil {
		panic(err)
	}
	return authenticatorData, clientData, signature
}

// Get answers navigator.credentials.get: a PublicKeyCredential as JSON.
func (k *Key) Get(challenge []byte) []byte {
	data, client, signature := k.Sign(challenge)
	return k.credential(map[string]any{"authenticatorData": text(data), "clientDataJSON": text(client), "signature": text(signature)})
}
