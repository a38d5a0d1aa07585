package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/go-webauthn/webauthn/protocol"
	"github.com/go-webauthn/webauthn/protocol/webauthncose"
)

// EnrolledDetails are the details of passkey.enrolled: a person's public key,
// anchored in the identity provider. The entry's Person owns it; the ID token,
// the person's name and the key's label are sealed.
type EnrolledDetails struct {
	Credential string `json:"credential"` // credential ID, base64url (W3C WebAuthn, section 4)
	Key        []byte `json:"key"`        // COSE_Key (RFC 9052)
	RPID       string `json:"rp_id"`      // relying party: the recorder's host
	Origin     string `json:"origin"`     // the recorder's web origin
	AAGUID     string `json:"aaguid"`     // model of the authenticator, all zeros where it says nothing
	Salt       []byte `json:"salt"`       // 32 random bytes in the nonce
	// Issuer, Client and ProviderKey check the sealed ID token. A verifier takes
	// the provider's keys from elsewhere, and this one only as a hint.
	Issuer      string         `json:"issuer"`
	Client      string         `json:"client"`
	ProviderKey jsontext.Value `json:"provider_key"` // JWK
}

// Nonce is what the login that anchors the key must carry as its OpenID
// nonce: whoever sees the provider's signature over it knows that the provider
// was asked to vouch for this key, in this log, for this person (the idea of
// OpenPubkey).
func (d *EnrolledDetails) Nonce(origin, person string) string {
	sum := lengthPrefixed("countersign/passkey/v1", origin, person, d.Credential, string(d.Key), d.RPID, d.Origin, string(d.Salt))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// ActivatedDetails are the details of passkey.activated. The entry's Person is
// the key's owner.
type ActivatedDetails struct {
	Enrolled string `json:"enrolled"`    // entry ID of passkey.enrolled
	By       string `json:"by,omitzero"` // pseudonym of the second person; empty: the delay was over
}

// PasskeyRevokedDetails are the details of passkey.revoked.
type PasskeyRevokedDetails struct {
	Enrolled string `json:"enrolled"`
	By       string `json:"by"` // pseudonym of who revoked it
}

// The names under which an enrolment's texts are sealed.
const (
	SealedPerson  = "person"   // the person's name, "user:…"
	SealedIDToken = "id_token" // the provider's signed token
	SealedLabel   = "label"    // what the person calls the key
)

// Assertion is a passkey's signature over a decision (W3C WebAuthn, section
// 7.2), as the browser gave it.
type Assertion struct {
	Enrolled          string `json:"enrolled"` // entry ID of passkey.enrolled
	AuthenticatorData []byte `json:"authenticator_data"`
	ClientData        []byte `json:"client_data"` // JSON, as signed
	Signature         []byte `json:"signature"`
}

// ErrAssertion is wrapped by every reason why a passkey's signature does not
// hold.
var ErrAssertion = errors.New("the passkey's signature does not hold")

// Verify checks a against the key that d enrols and the digest of the decision.
// User presence and user verification are due. Errors wrap ErrAssertion. That
// d was active, and is the person's, is the caller's to check.
func (a *Assertion) Verify(d *EnrolledDetails, digest [sha256.Size]byte) error {
	refuse := func(format string, x ...any) error {
		return fmt.Errorf("%w: %w", ErrAssertion, fmt.Errorf(format, x...))
	}
	if len(a.AuthenticatorData) > 4096 || len(a.ClientData) > 4096 || len(a.Signature) > 4096 {
		return refuse("it is too long")
	}
	var client struct {
		Type        string `json:"type"`
		Challenge   string `json:"challenge"`
		Origin      string `json:"origin"`
		CrossOrigin bool   `json:"crossOrigin"`
	}
	if err := json.Unmarshal(a.ClientData, &client); err != nil {
		return refuse("client data: %w", err)
	}
	var auth protocol.AuthenticatorData
	if err := auth.Unmarshal(a.AuthenticatorData); err != nil {
		return refuse("authenticator data: %w", err)
	}
	rp := sha256.Sum256([]byte(d.RPID))
	switch {
	case client.Type != "webauthn.get":
		return refuse("client data is of type %q", client.Type)
	case client.Challenge != base64.RawURLEncoding.EncodeToString(digest[:]):
		return refuse("it signs another decision")
	case client.Origin != d.Origin || client.CrossOrigin:
		return refuse("it was made at %q, the key is for %q", client.Origin, d.Origin)
	case !bytes.Equal(auth.RPIDHash, rp[:]):
		return refuse("it is for another relying party")
	case !auth.Flags.UserPresent() || !auth.Flags.UserVerified():
		return refuse("the user was not verified")
	}
	key, err := webauthncose.ParsePublicKey(d.Key)
	if err != nil {
		return refuse("public key: %w", err)
	}
	hash := sha256.Sum256(a.ClientData)
	if ok, err := webauthncose.VerifySignature(key, append(bytes.Clone(a.AuthenticatorData), hash[:]...), a.Signature); err != nil || !ok {
		return refuse("the signature is not the key's")
	}
	return nil
}
