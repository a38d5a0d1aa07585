package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
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
	Claim       string         `json:"claim"`        // of the ID token, that names the person
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

// EnrolmentFresh is how long before passkey.enrolled the login that anchors the
// key may lie.
const EnrolmentFresh = 5 * time.Minute

// EnrolmentLeeway is by how much the provider's clock may be ahead.
const EnrolmentLeeway = time.Minute

// ErrAnchor is wrapped by every reason why an ID token does not anchor a key.
var ErrAnchor = errors.New("the ID token does not anchor the key")

// CheckAnchor checks the ID token that anchors e, which has the details d: that
// key, a JWK of the provider's (RFC 7517), signed it for this client, that its
// nonce commits to the passkey, that the login was fresh, and that it names
// person ("user:…"). Errors wrap ErrAnchor.
func (d *EnrolledDetails) CheckAnchor(origin string, e *Entry, person, idToken string, key []byte) error {
	refuse := func(format string, x ...any) error {
		return fmt.Errorf("%w: %w", ErrAnchor, fmt.Errorf(format, x...))
	}
	var jwk jose.JSONWebKey
	if len(idToken) > MaxEntry || len(key) > MaxEntry {
		return refuse("it is too long")
	}
	if err := jwk.UnmarshalJSON(key); err != nil || !jwk.Valid() || !jwk.IsPublic() {
		return refuse("the provider's key is no public JWK")
	}
	// Asymmetric algorithms alone: an HMAC proves nothing about who signed.
	sig, err := jose.ParseSignedCompact(idToken, []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA})
	if err != nil {
		return refuse("%w", err)
	}
	payload, err := sig.Verify(jwk)
	if err != nil {
		return refuse("it is not signed by the provider's key")
	}
	var claims struct {
		Issuer string         `json:"iss"`
		Aud    jsontext.Value `json:"aud"`
		Azp    string         `json:"azp"`
		Nonce  string         `json:"nonce"`
		Issued float64        `json:"iat"`
		Ends   float64        `json:"exp"`
	}
	var all map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		return refuse("claims: %w", err)
	}
	if err := json.Unmarshal(payload, &all); err != nil {
		return refuse("claims: %w", err)
	}
	var audience []string
	if claims.Aud.Kind() == '"' {
		audience = []string{""}
		err = json.Unmarshal(claims.Aud, &audience[0])
	} else {
		err = json.Unmarshal(claims.Aud, &audience)
	}
	owner := ""
	if e.Person != nil {
		owner = *e.Person
	}
	name, _ := all[d.Claim].(string)
	age := e.Time.Sub(time.Unix(int64(claims.Issued), 0))
	switch {
	case err != nil || d.Client == "" || !slices.Contains(audience, d.Client) || claims.Azp != "" && claims.Azp != d.Client || len(audience) > 1 && claims.Azp == "":
		return refuse("it is for another client")
	case d.Issuer == "" || claims.Issuer != d.Issuer:
		return refuse("it is by another provider")
	case claims.Nonce == "" || claims.Nonce != d.Nonce(origin, owner):
		return refuse("it vouches for another key")
	case age > EnrolmentFresh || age < -EnrolmentLeeway:
		return refuse("the login lies %s before the enrolment", age.Round(time.Second))
	case !time.Unix(int64(claims.Ends), 0).After(e.Time.Time):
		return refuse("it had expired")
	case name == "" || "user:"+name != person:
		return refuse("it names another person")
	}
	return nil
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

// Passkeys follows people's keys through a log, in its order, and says which
// decisions they signed.
type Passkeys struct {
	origin string
	keys   map[string]*passkey // by entry ID of the enrolment
}

type passkey struct {
	EnrolledDetails
	owner   string
	active  bool
	revoked bool
}

// NewPasskeys returns Passkeys of the log named origin, without any key.
func NewPasskeys(origin string) *Passkeys {
	return &Passkeys{origin: origin, keys: map[string]*passkey{}}
}

// Take follows e, and where it is a signed decision checks the signature: by a
// key of the person's own, that was active then. Errors wrap ErrAssertion or
// ErrMalformed. Entries of other types are nothing to it.
func (p *Passkeys) Take(e *Entry) error {
	person := ""
	if e.Person != nil {
		person = *e.Person
	}
	switch e.Type {
	case PasskeyEnrolled:
		d, err := DetailsAs[EnrolledDetails](e)
		if err != nil {
			return err
		}
		if person == "" {
			return fmt.Errorf("%w: passkey.enrolled names no person", ErrMalformed)
		}
		p.keys[e.ID] = &passkey{EnrolledDetails: d, owner: person}
	case PasskeyActivated:
		d, err := DetailsAs[ActivatedDetails](e)
		if err != nil {
			return err
		}
		k := p.keys[d.Enrolled]
		if k == nil || k.owner != person || d.By == person || k.revoked {
			return fmt.Errorf("%w: passkey.activated names no key of that person that another may activate", ErrAssertion)
		}
		k.active = true
	case PasskeyRevoked:
		d, err := DetailsAs[PasskeyRevokedDetails](e)
		if err != nil {
			return err
		}
		if k := p.keys[d.Enrolled]; k != nil {
			k.active, k.revoked = false, true
		}
	case ApprovalDecided, ApprovalStanding:
		d, err := DetailsAs[DecidedDetails](e)
		if err != nil || d.Assertion == nil {
			return err
		}
		k := p.keys[d.Assertion.Enrolled]
		if k == nil || k.owner != person || !k.active {
			return fmt.Errorf("%w: it is not by an active key of that person", ErrAssertion)
		}
		return d.Assertion.Verify(&k.EnrolledDetails, DecisionDigest(p.origin, e, &d))
	}
	return nil
}

func (p *Passkeys) active(enrolled string) bool { k := p.keys[enrolled]; return k != nil && k.active }
