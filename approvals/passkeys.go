package approvals

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-webauthn/webauthn/protocol"
	"github.com/go-webauthn/webauthn/protocol/webauthncose"
	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// EnrolmentLife is how long an enrolment may take, the fresh login included.
	EnrolmentLife = 10 * time.Minute
	// maxKeys is how many passkeys of a person are not revoked.
	maxKeys = 20
	// maxLabel is the longest label in bytes.
	maxLabel = 100
	// maxResponse is the longest answer of a browser in bytes.
	maxResponse = 32 << 10
)

// sealedBy seals the name of who activated or revoked a key: the entry's person
// is its owner.
const sealedBy = "by"

// algorithms are those that new keys may have, in the order in which they are
// preferred (W3C WebAuthn, section 5.4).
var algorithms = []protocol.CredentialParameter{
	{Type: protocol.PublicKeyCredentialType, Algorithm: webauthncose.AlgES256},
	{Type: protocol.PublicKeyCredentialType, Algorithm: webauthncose.AlgEdDSA},
	{Type: protocol.PublicKeyCredentialType, Algorithm: webauthncose.AlgRS256},
}

// signs reports whether the key's signatures count.
func (k *Passkey) signs() bool { return k.Active && k.Revoked.IsZero() }

// enrolment is a passkey on its way.
type enrolment struct {
	label     string
	challenge []byte
	details   *store.EnrolledDetails // once the browser has made the key
	nonce     string
}

// Passkeys returns the passkeys of a person, or of all where of is nil, in the
// order in which they were enrolled.
func (a *Approvals) Passkeys(ctx context.Context, of *Person) ([]Passkey, error) {
	if of == nil {
		return a.keysOf(ctx, "")
	}
	return a.keysOf(ctx, a.pseudonym(*of))
}

// keysOf reads the passkeys of the person with the given pseudonym from the
// record, all where it is empty.
func (a *Approvals) keysOf(ctx context.Context, person string) ([]Passkey, error) {
	keys := []Passkey{}
	at := map[string]int{} // by entry ID
	for _, t := range []store.Type{store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked} {
		q := ledger.Query{Type: string(t), Person: person}
		for {
			page, err := a.c.Ledger.History(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, h := range page.Entries {
				e, err := store.ParseLeaf(h.Entry)
				if err == nil && e.Person == nil {
					err = fmt.Errorf("%w: %s names no person", store.ErrMalformed, t)
				}
				if err == nil {
					keys, err = a.key(keys, at, e, h)
				}
				if err != nil {
					return nil, fmt.Errorf("entry %d: %w", h.Index, err)
				}
			}
			if q.Cursor = page.Next; q.Cursor == "" {
				break
			}
		}
	}
	for i := range keys {
		if k := &keys[i]; !k.Active && k.Revoked.IsZero() && a.c.ActivateAfter > 0 {
			k.ActiveFrom = k.Enrolled.Add(a.c.ActivateAfter)
		}
	}
	return keys, nil
}

// key takes one entry about passkeys.
func (a *Approvals) key(keys []Passkey, at map[string]int, e *store.Entry, h ledger.HistoryEntry) ([]Passkey, error) {
	switch e.Type {
	case store.PasskeyEnrolled:
		d, err := store.DetailsAs[store.EnrolledDetails](e)
		if err != nil {
			return nil, err
		}
		k := Passkey{ID: e.ID, Credential: d.Credential, Person: h.Opened[store.SealedPerson], Label: h.Opened[store.SealedLabel],
			Enrolled: e.Time.Time, Index: h.Index, owner: *e.Person, details: d}
		if k.Person == "" {
			k.Person = k.owner
		}
		at[e.ID] = len(keys)
		keys = append(keys, k)
	case store.PasskeyActivated:
		d, err := store.DetailsAs[store.ActivatedDetails](e)
		if err != nil {
			return nil, err
		}
		// As the issuer and the verifier judge: by the owner's own hand, or before
		// the enrolment, nothing is activated.
		if i, ok := at[d.Enrolled]; ok && keys[i].owner == *e.Person && d.By != *e.Person && h.Index > keys[i].Index && !keys[i].Active {
			keys[i].Active, keys[i].Activated = true, e.Time.Time
		}
	case store.PasskeyRevoked:
		d, err := store.DetailsAs[store.PasskeyRevokedDetails](e)
		if err != nil {
			return nil, err
		}
		if i, ok := at[d.Enrolled]; ok && keys[i].Revoked.IsZero() {
			keys[i].Revoked = e.Time.Time
		}
	}
	return keys, nil
}

// BeginEnrolment begins to enrol a passkey for p: the browser makes one under
// what is returned (W3C WebAuthn, section 5.1.3), with user verification
// required, and Register takes it.
func (a *Approvals) BeginEnrolment(ctx context.Context, p Person, label string) (*Enrolment, error) {
	label = strings.TrimSpace(label)
	if len(label) > maxLabel || !utf8.ValidString(label) || strings.ContainsFunc(label, unicode.IsControl) {
		return nil, fmt.Errorf("%w: label: want at most %d bytes in one line", ErrMalformed, maxLabel)
	}
	keys, err := a.keysOf(ctx, a.pseudonym(p))
	if err != nil {
		return nil, err
	}
	user := sha256.Sum256([]byte("countersign/passkey-user/v1\x00" + a.pseudonym(p)))
	out := &Enrolment{
		Challenge: make([]byte, 32), RPID: a.rpID, UserID: user[:], User: strings.TrimPrefix(p.Name, "user:"),
		Exclude: []string{}, Expires: a.c.Now().Add(EnrolmentLife),
	}
	rand.Read(out.Challenge) // never fails since Go 1.24
	out.ID = base64.RawURLEncoding.EncodeToString(out.Challenge)
	for _, x := range algorithms {
		out.Algorithms = append(out.Algorithms, int(x.Algorithm))
	}
	for _, k := range keys {
		if k.Revoked.IsZero() {
			out.Exclude = append(out.Exclude, k.Credential)
		}
	}
	if len(out.Exclude) >= maxKeys {
		return nil, fmt.Errorf("%w: %d passkeys are enrolled; revoke one first", ErrEnrolment, maxKeys)
	}
	a.enrolments.put(a.c.Now(), p.Name, out.ID, enrolment{label: label, challenge: out.Challenge})
	return out, nil
}

// Register takes the passkey that the browser made (PublicKeyCredential as
// JSON, W3C WebAuthn, section 5.1) and returns which enrolment it is and the nonce
// under which the person is to log in anew: the provider's ID token with this
// nonce is what FinishEnrolment takes. Errors about the key wrap ErrEnrolment.
func (a *Approvals) Register(_ context.Context, p Person, response []byte) (id, nonce string, err error) {
	if len(response) > maxResponse {
		return "", "", fmt.Errorf("%w: the answer has more than %d bytes", ErrMalformed, maxResponse)
	}
	made, err := protocol.ParseCredentialCreationResponseBytes(response)
	if err != nil {
		return "", "", fmt.Errorf("%w: the browser's answer: %w", ErrMalformed, err)
	}
	now := a.c.Now()
	id = made.Response.CollectedClientData.Challenge
	e, ok := a.enrolments.take(now, p.Name, id)
	if !ok || e.details != nil {
		return "", "", fmt.Errorf("%w: no such enrolment is under way, or it is over; begin again", ErrEnrolment)
	}
	if _, err := made.Verify(base64.RawURLEncoding.EncodeToString(e.challenge), a.rpID, []string{a.web}, nil, nil,
		protocol.TopOriginExplicitVerificationMode, false, true, true, nil, algorithms,
		protocol.AttestationPolicy{}, protocol.SignaturePolicy{}); err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrEnrolment, err)
	}
	data := made.Response.AttestationObject.AuthData.AttData
	// W3C WebAuthn, section 7.1, step 26: a longer ID is refused.
	if len(data.CredentialID) == 0 || len(data.CredentialID) > 1023 || len(data.CredentialPublicKey) > 4<<10 {
		return "", "", fmt.Errorf("%w: its ID or key is too long", ErrEnrolment)
	}
	model, err := uuid.FromBytes(data.AAGUID)
	if err != nil {
		return "", "", fmt.Errorf("%w: AAGUID: %w", ErrEnrolment, err)
	}
	d := &store.EnrolledDetails{
		Credential: base64.RawURLEncoding.EncodeToString(data.CredentialID), Key: data.CredentialPublicKey,
		RPID: a.rpID, Origin: a.web, AAGUID: model.String(), Salt: make([]byte, 32),
	}
	rand.Read(d.Salt) // never fails since Go 1.24
	e.details, e.nonce = d, d.Nonce(a.c.Origin, a.pseudonym(p))
	a.enrolments.put(now, p.Name, id, e)
	return id, e.nonce, nil
}

// FinishEnrolment puts a passkey on record, anchored in the provider's signature
// over it. It signs nothing before it is activated. The person is told by an
// EventPasskey. Errors about the token wrap ErrEnrolment.
func (a *Approvals) FinishEnrolment(ctx context.Context, p Person, id string, t Anchor) (*Passkey, error) {
	e, ok := a.enrolments.take(a.c.Now(), p.Name, id)
	if !ok || e.details == nil {
		return nil, fmt.Errorf("%w: no such enrolment is under way, or it is over; begin again", ErrEnrolment)
	}
	d := *e.details
	d.Issuer, d.Client, d.Claim, d.ProviderKey = t.Issuer, t.ClientID, a.c.NameClaim, t.JWK
	s := a.entry(store.PasskeyEnrolled, "passkey.enroll")
	s.Person = store.Ptr(a.pseudonym(p))
	// That the key is one of the provider's was seen at the login; a verifier sees
	// to it again, with keys from elsewhere.
	at := s.Entry
	at.Time = s.WriterTime
	if err := d.CheckAnchor(a.c.Origin, &at, p.Name, t.IDToken, t.JWK); err != nil {
		return nil, fmt.Errorf("%w: the fresh login: %w", ErrEnrolment, err)
	}
	a.keys.Lock()
	defer a.keys.Unlock()
	all, err := a.keysOf(ctx, "")
	if err != nil {
		return nil, err
	}
	mine := 0
	for _, k := range all {
		if k.Credential == e.details.Credential {
			return nil, fmt.Errorf("%w: it is enrolled already", ErrEnrolment)
		}
		if k.owner == a.pseudonym(p) && k.Revoked.IsZero() {
			mine++
		}
	}
	if mine >= maxKeys {
		return nil, fmt.Errorf("%w: %d passkeys are enrolled; revoke one first", ErrEnrolment, maxKeys)
	}
	s.SetDetails(d)
	s.Seal(store.SealedIDToken, t.IDToken)
	s.Seal(store.SealedPerson, p.Name)
	s.Seal(store.SealedLabel, e.label)
	// A crash before it leaves a passkey in the browser that nobody here knows,
	// and the person enrols another. A crash after it leaves an enrolled key that
	// is not active, which the person finds in their list.
	if _, err := a.append(ctx, s); err != nil {
		return nil, err
	}
	return a.keyByID(ctx, a.pseudonym(p), s.ID)
}

// keyByID returns one passkey of a person.
func (a *Approvals) keyByID(ctx context.Context, person, id string) (*Passkey, error) {
	keys, err := a.keysOf(ctx, person)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.ID == id {
			return &k, nil
		}
	}
	return nil, ErrNotFound
}

// admin reports whether p is in a group that looks after passkeys.
func (a *Approvals) admin(p Person) bool {
	return slices.ContainsFunc(a.c.PasskeyAdmins, func(g string) bool { return slices.Contains(p.Groups, g) })
}

// ActivatePasskey lets the key with the given enrolment sign. by is never its
// owner, and in one of the groups that look after passkeys where there are any.
// The errors are ErrNotFound, ErrPasskeyPerson (the attempt is on record) and
// ErrPasskeyClosed.
func (a *Approvals) ActivatePasskey(ctx context.Context, by Person, id string) (*Passkey, error) {
	a.keys.Lock()
	defer a.keys.Unlock()
	k, err := a.keyByID(ctx, "", id)
	switch {
	case err != nil:
		return nil, err
	case k.owner == a.pseudonym(by):
		return nil, a.refuse(ctx, by, nil, actionActivate, fmt.Errorf("%w: nobody activates their own", ErrPasskeyPerson))
	case len(a.c.PasskeyAdmins) > 0 && !a.admin(by):
		return nil, a.refuse(ctx, by, nil, actionActivate, fmt.Errorf("%w: it takes a member of %s", ErrPasskeyPerson, strings.Join(a.c.PasskeyAdmins, ", ")))
	case k.Active || !k.Revoked.IsZero():
		return nil, ErrPasskeyClosed
	}
	return a.activate(ctx, k, a.pseudonym(by), by.Name)
}

// activate appends passkey.activated. by is empty where the delay is over. A
// crash before it leaves the key as it was; after it, the key is active, and who
// asked finds it so. a.keys is locked.
func (a *Approvals) activate(ctx context.Context, k *Passkey, by, name string) (*Passkey, error) {
	s := a.entry(store.PasskeyActivated, actionActivate)
	s.Person = store.Ptr(k.owner)
	s.SetDetails(store.ActivatedDetails{Enrolled: k.ID, By: by})
	s.Seal(sealedBy, name)
	if _, err := a.append(ctx, s); err != nil {
		return nil, err
	}
	return a.keyByID(ctx, k.owner, k.ID)
}

// RevokePasskey ends a key: it signs nothing any more. What it signed before
// stands. by is its owner, or in a group that looks after passkeys. The errors
// are those of ActivatePasskey.
func (a *Approvals) RevokePasskey(ctx context.Context, by Person, id string) (*Passkey, error) {
	a.keys.Lock()
	defer a.keys.Unlock()
	k, err := a.keyByID(ctx, "", id)
	switch {
	case err != nil:
		return nil, err
	case k.owner != a.pseudonym(by) && !a.admin(by):
		return nil, a.refuse(ctx, by, nil, actionRevoke, fmt.Errorf("%w: it is another's", ErrPasskeyPerson))
	case !k.Revoked.IsZero():
		return nil, ErrPasskeyClosed
	}
	s := a.entry(store.PasskeyRevoked, actionRevoke)
	s.Person = store.Ptr(k.owner)
	s.SetDetails(store.PasskeyRevokedDetails{Enrolled: k.ID, By: a.pseudonym(by)})
	s.Seal(sealedBy, by.Name)
	// A crash before it leaves a key that still signs, and nobody was told that it
	// does not; after it, the key is revoked.
	if _, err := a.append(ctx, s); err != nil {
		return nil, err
	}
	return a.keyByID(ctx, k.owner, k.ID)
}

// activateDue activates the keys whose delay is over.
func (a *Approvals) activateDue(ctx context.Context) error {
	if a.c.ActivateAfter == 0 {
		return nil
	}
	now := a.c.Now()
	a.mu.Lock()
	due := a.keyDue
	a.keyDue = now.Add(time.Hour) // whatever changes a key from here on sets it back
	a.mu.Unlock()
	if now.Before(due) {
		a.lookAgain(due)
		return nil
	}
	a.keys.Lock()
	defer a.keys.Unlock()
	keys, err := a.keysOf(ctx, "")
	for i := 0; i < len(keys) && err == nil; i++ {
		switch k := &keys[i]; {
		case k.ActiveFrom.IsZero():
		case now.Before(k.ActiveFrom):
			a.lookAgain(k.ActiveFrom)
		default:
			if _, err = a.activate(ctx, k, "", ""); err == nil {
				a.c.Log.Info("a passkey is active after its delay", zap.String("enrolled", k.ID))
			}
		}
	}
	if err != nil {
		a.lookAgain(time.Time{})
	}
	return err
}

// lookAgain has activateDue look again at t, or when it meant to, whichever is
// the earlier.
func (a *Approvals) lookAgain(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.Before(a.keyDue) {
		a.keyDue = t
	}
}

// tellPasskey tells subscribers of an entry about a passkey.
func (a *Approvals) tellPasskey(e *store.Entry) error {
	a.lookAgain(time.Time{})
	a.mu.Lock()
	listened := len(a.subs) > 0
	a.mu.Unlock()
	if !listened || e.Person == nil {
		return nil
	}
	id := e.ID
	if e.Type != store.PasskeyEnrolled {
		d, err := store.DetailsAs[store.ActivatedDetails](e) // of revoked ones too: both say "enrolled"
		if err != nil {
			return fmt.Errorf("%s %s: %w", e.Type, e.ID, err)
		}
		id = d.Enrolled
	}
	k, err := a.keyByID(a.ctx, *e.Person, id)
	if err == ErrNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	a.tell(Event{Kind: EventPasskey, Passkey: k})
	return nil
}
