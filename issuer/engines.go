package issuer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/hashicorp/vault/api"
	"golang.org/x/crypto/ssh"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// fetched is a secret on its way to becoming a Minted. After an error it
// holds what there is to revoke.
type fetched struct {
	store.IssuedDetails
	credential *Credential
}

func (f fetched) minted() (*Minted, error) { return &Minted{f.credential, f.IssuedDetails}, nil }

// fetch gets the secret of j with the child's token.
func (i *Issuer) fetch(ctx context.Context, j *job, c *child) (fetched, error) {
	kept := j.Grant.Delivery == scopes.Gateway
	f := fetched{IssuedDetails: j.issued(Kind(j.scope.Engine), j.Grant.Revocable)}
	body := map[string]any{}
	for k, v := range j.Grant.Data {
		body[k] = v
	}
	switch j.scope.Engine {
	case scopes.PKI:
		// An end, not a TTL: a slow Vault must not make it later. Vault refuses
		// to be given both.
		delete(body, "ttl")
		body["not_after"] = j.end.UTC().Truncate(time.Second).Format(time.RFC3339)
	case scopes.SSH:
		// ssh/sign takes a TTL and no end. One second less than is left, so that the
		// time the call takes does not carry the certificate past its end.
		left := j.left(i.cfg.Now()) - time.Second
		if left <= 0 {
			return f, &StageError{stageSecret, fmt.Errorf("%w: too little time is left for a certificate", ErrVaultRefused)}
		}
		body["ttl"] = seconds(left)
	}
	wrap := i.wrapTTL(j)
	v := i.as(c.token, wrap)
	var s *api.Secret
	var err error
	if j.Grant.Method == "write" {
		s, err = v.WriteWithContext(ctx, j.Grant.Path, body)
	} else {
		s, err = v.ReadWithContext(ctx, j.Grant.Path)
	}
	if err != nil {
		return f, vaultError(stageSecret, err)
	}
	if s == nil {
		return f, &StageError{stageSecret, fmt.Errorf("%w: nothing is at %s", ErrVaultRefused, j.Grant.Path)}
	}
	if wrap > 0 {
		return i.wrappedSecret(ctx, j, c, f, s)
	}
	f.LeaseID = s.LeaseID
	if err := i.read(j, &f, s); err != nil {
		return f, &StageError{stageReply, fmt.Errorf("%w: %w", ErrVaultRefused, err)}
	}
	if f.LeaseID != "" {
		f.Accessor = c.accessor
		// database/creds takes no TTL, so the lease may end before the child does.
		if end := j.now.Add(time.Duration(s.LeaseDuration) * time.Second); s.LeaseDuration > 0 && end.Before(f.Expires.Time) {
			f.Expires = store.At(end)
		}
	}
	switch {
	case kept:
		// The child is kept also where nothing hangs on it: its accessor is what is
		// revoked, and what Vault knows the session by.
		f.Kind, f.Revocable, f.Accessor = string(KindGateway), true, c.accessor
	case f.LeaseID == "":
		if err := i.dropChild(ctx, c); err != nil {
			return f, err
		}
	}
	f.credential.Kind, f.credential.Revocable = Kind(f.Kind), f.Revocable
	return f, nil
}

// dropChild revokes a child token on which nothing hangs: it has done its
// work. What it fetched cannot be called back.
func (i *Issuer) dropChild(ctx context.Context, c *child) error {
	return i.revokeAccessor(ctx, stageDrop, c.accessor)
}

// wrappedSecret is a secret that the issuer itself does not get to see. Its
// lease, where it has one, is known to the step alone: it is revoked through
// the child on which it hangs.
func (i *Issuer) wrappedSecret(ctx context.Context, j *job, c *child, f fetched, s *api.Secret) (fetched, error) {
	if s.WrapInfo == nil || s.WrapInfo.Token == "" {
		f.LeaseID = s.LeaseID
		return f, &StageError{stageReply, fmt.Errorf("%w: the answer was not wrapped", ErrVaultRefused)}
	}
	f.Kind, f.WrappingAccessor = string(KindWrapped), s.WrapInfo.Accessor
	if j.scope.Engine == scopes.PKI || j.scope.Engine == scopes.SSH {
		if err := i.dropChild(ctx, c); err != nil {
			return f, err
		}
	} else {
		f.Accessor = c.accessor
	}
	f.credential = &Credential{Kind: KindWrapped, Revocable: f.Revocable, WrappingToken: s.WrapInfo.Token, Addr: i.cfg.PublicAddr}
	return f, nil
}

// read takes the credential out of Vault's answer. Its errors quote nothing
// of the answer.
func (i *Issuer) read(j *job, f *fetched, s *api.Secret) error {
	get := func(k string) string { v, _ := s.Data[k].(string); return v }
	f.credential = &Credential{}
	switch j.scope.Engine {
	case scopes.Database:
		*f.credential = Credential{Username: get("username"), Password: get("password")}
		if c := j.scope.Connection; c != nil {
			f.credential.Host, f.credential.Port, f.credential.Database = c.Host, c.Port, c.Database
		}
		switch {
		case f.credential.Username == "" || f.credential.Password == "":
			return fmt.Errorf("%s gave no username and password", j.Grant.Path)
		case s.LeaseID == "":
			return fmt.Errorf("%s gave no lease: the role must be a dynamic one", j.Grant.Path)
		}
		f.Revocable = true
	case scopes.PKI:
		f.Revocable = false
		return readPKI(j, f, s, get)
	case scopes.SSH:
		f.Revocable = false
		return readSSH(j, f, s, get)
	case scopes.Path, scopes.KV:
		data, err := json.Marshal(s.Data)
		if err != nil || len(s.Data) == 0 {
			return fmt.Errorf("%s gave no data", j.Grant.Path)
		}
		f.credential.Data = data
		f.Revocable = j.Grant.Revocable && s.LeaseID != ""
	default:
		return fmt.Errorf("engine %s is not minted", j.scope.Engine)
	}
	return nil
}

func readPKI(j *job, f *fetched, s *api.Secret, get func(string) string) error {
	c := f.credential
	c.Certificate, c.PrivateKey, c.Serial = get("certificate"), get("private_key"), get("serial_number")
	chain, _ := s.Data["ca_chain"].([]any)
	for _, x := range chain {
		if pem, ok := x.(string); ok {
			c.CAChain = append(c.CAChain, pem)
		}
	}
	if len(c.CAChain) == 0 && get("issuing_ca") != "" {
		c.CAChain = []string{get("issuing_ca")}
	}
	f.Serial = c.Serial
	n, _ := s.Data["expiration"].(json.Number)
	unix, err := n.Int64()
	switch {
	case c.Certificate == "" || c.Serial == "" || err != nil:
		return fmt.Errorf("%s gave no certificate", j.Grant.Path)
	case j.Grant.PublicKey == "" && c.PrivateKey == "":
		return fmt.Errorf("%s gave no private key", j.Grant.Path)
	case s.LeaseID != "":
		return errors.New("the pki role has generate_lease=true: the certificate would be revoked with the token that asked for it")
	}
	return f.ends(time.Unix(unix, 0))
}

func readSSH(j *job, f *fetched, s *api.Secret, get func(string) string) error {
	c := f.credential
	c.SignedKey, c.Serial = get("signed_key"), get("serial_number")
	f.Serial = c.Serial
	signed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(c.SignedKey))
	if err != nil {
		return fmt.Errorf("%s gave no signed key", j.Grant.Path)
	}
	cert, ok := signed.(*ssh.Certificate)
	asked, _, _, _, err := ssh.ParseAuthorizedKey([]byte(j.Grant.PublicKey))
	switch {
	case !ok || err != nil || !bytes.Equal(cert.Key.Marshal(), asked.Marshal()):
		return fmt.Errorf("%s signed another key than the step's", j.Grant.Path)
	case c.Serial == "":
		c.Serial = strconv.FormatUint(cert.Serial, 16)
		f.Serial = c.Serial
	}
	if cert.ValidBefore > uint64(f.Expires.Unix()) {
		return errors.New("the certificate would outlive what was granted")
	}
	return f.ends(time.Unix(int64(cert.ValidBefore), 0))
}

// ends sets when the credential ends, by what Vault wrote into it.
func (f *fetched) ends(at time.Time) error {
	if at.After(f.Expires.Time) {
		return errors.New("the certificate would outlive what was granted")
	}
	f.Expires = store.At(at)
	return nil
}
