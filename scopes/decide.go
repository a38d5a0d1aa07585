package scopes

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/crypto/ssh"

	"github.com/countersign-dev/countersign/store"
)

// minRSA is the smallest RSA modulus, in bits, that a step may have certified.
// Vault's PKI and SSH engines ask for the same.
const minRSA = 2048

// maxKey is the size in bytes of the largest public_key; an RSA-8192 request
// has some 3 KiB.
const maxKey = 16 << 10

// Reasons that the catalogue itself gives.
const (
	reasonMayNotAsk = "not allowed to ask for this scope"
	reasonApproval  = "needs approval"
	reasonPolicy    = "the policy could not be evaluated"
	reasonNobody    = "nobody is named who could approve it"
)

// Decide judges an ask: first who may ask, then the catalogue's bounds, then
// the policy. An error wraps one of the package's sentinels, or the context's,
// and means that nothing was decided; a refusal is a Verdict.
func (s *Set) Decide(ctx context.Context, ask Ask) (*Verdict, error) {
	sc, ok := s.byName[ask.Scope]
	if !ok {
		return nil, fmt.Errorf("%w %q", ErrUnknownScope, clip(ask.Scope))
	}
	if !sc.MayAsk(ask.Orchestrator) {
		return &Verdict{
			Scope:   sc,
			Outcome: store.Deny,
			Reasons: []string{reasonMayNotAsk},
			Grant:   store.Grant{Scope: sc.Name, Engine: string(sc.Engine), Target: sc.Target, Policies: []string{}, Params: map[string]string{}},
		}, nil
	}
	ttl, err := sc.ttl(ask.TTL)
	if err != nil {
		return nil, err
	}
	values, err := sc.values(ask.Params)
	if err != nil {
		return nil, err
	}
	reasonDue := func(r *store.Rule) error {
		if r != nil && r.Reasons.Requester && !says(ask.Reason) {
			return fmt.Errorf("%w: say what %s is needed for", ErrReasonRequired, sc.Name)
		}
		return nil
	}
	if err := reasonDue(sc.Approval); err != nil {
		return nil, err
	}
	grant, err := sc.grant(ttl, values, ask.Delivery, ask.PublicKey, ask.Audience)
	if err != nil {
		return nil, err
	}
	v := &Verdict{Scope: sc, Outcome: store.Allow, Reasons: []string{}, Grant: grant}
	if sc.Approval != nil {
		v.Outcome, v.Reasons, v.Rule = store.NeedsApproval, []string{reasonApproval}, sc.Approval
	}
	if s.policy == nil {
		return v, nil
	}
	said, err := s.policy.eval(ctx, sc, ask, grant)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		v.Outcome, v.Reasons, v.Err = store.Deny, []string{reasonPolicy}, fmt.Errorf("%w: %w", ErrPolicy, err)
		return v, nil
	case len(said.deny) > 0:
		v.Outcome, v.Reasons = store.Deny, said.deny
		return v, nil
	case len(said.approval) > 0:
		v.Outcome = store.NeedsApproval
		v.Reasons = append([]string{reasonApproval}, said.approval...)
		if v.Rule = sc.Approval; v.Rule == nil && len(said.groups) == 0 {
			v.Rule = s.approval
		}
		if len(said.groups) > 0 {
			v.Rule = v.Rule.And(&store.Rule{Groups: said.groups, Expires: store.Duration(defaultExpires), Collect: store.Duration(defaultCollect)})
		}
		if v.Rule == nil {
			v.Outcome, v.Reasons = store.Deny, append(v.Reasons, reasonNobody)
			return v, nil
		}
		if err := v.Rule.Valid(); err != nil {
			v.Outcome, v.Reasons, v.Err = store.Deny, []string{reasonPolicy}, fmt.Errorf("%w: the rule that it makes: %w", ErrPolicy, err)
			return v, nil
		}
		if err := reasonDue(v.Rule); err != nil {
			return nil, err
		}
	}
	shortest := ttl
	for _, x := range said.shorten {
		if x.ttl < ttl {
			v.Reasons = append(v.Reasons, x.reason)
			shortest = min(shortest, x.ttl)
		}
	}
	if shortest < ttl {
		if v.Grant, err = sc.grant(shortest, values, ask.Delivery, ask.PublicKey, ask.Audience); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// Resolve derives a grant from values already decided: what the issuer
// compares with the grant on record. Errors wrap the same sentinels as those
// of Decide.
func (s *Set) Resolve(scope string, ttl time.Duration, params map[string]string, delivery, publicKey, audience string) (store.Grant, error) {
	sc, ok := s.byName[scope]
	if !ok {
		return store.Grant{}, fmt.Errorf("%w %q", ErrUnknownScope, clip(scope))
	}
	if err := sc.bounds(ttl); err != nil {
		return store.Grant{}, err
	}
	values, err := sc.texts(params)
	if err != nil {
		return store.Grant{}, err
	}
	return sc.grant(ttl, values, delivery, publicKey, audience)
}

// ttl reads what was asked for.
func (sc *Scope) ttl(s string) (time.Duration, error) {
	if s == "" {
		return sc.DefaultTTL, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%w: write a duration like 90s or 15m", ErrTTLInvalid)
	}
	return d, sc.bounds(d)
}

func (sc *Scope) bounds(d time.Duration) error {
	switch {
	case d <= 0:
		return fmt.Errorf("%w: it must be longer than nothing", ErrTTLInvalid)
	case d%time.Second != 0:
		return fmt.Errorf("%w: it must be whole seconds", ErrTTLInvalid)
	case d > sc.MaxTTL:
		return fmt.Errorf("%w: %s allows at most %s", ErrTTLTooLong, sc.Name, short(sc.MaxTTL))
	}
	return nil
}

// grant fills sc's templates. Every value has been checked; what depends on
// all of them together is checked here.
func (sc *Scope) grant(ttl time.Duration, values map[string]string, delivery, publicKey, audience string) (store.Grant, error) {
	g := store.Grant{
		Scope:     sc.Name,
		Target:    sc.target.fill(values),
		Engine:    string(sc.Engine),
		Policies:  []string{},
		Params:    values,
		TTL:       store.Duration(ttl),
		Revocable: sc.Revocable,
	}
	var err error
	if g.Delivery, err = sc.deliver(delivery); err != nil {
		return store.Grant{}, err
	}
	if g.Delivery == Gateway {
		a := *sc.Access
		g.Access, g.Revocable = &a, true // the session is, whatever becomes of the secret that the gateway holds
	}
	if g.PublicKey, err = sc.publicKey(g.Delivery, publicKey); err != nil {
		return store.Grant{}, err
	}
	if g.Audience, err = sc.audience(audience); err != nil {
		return store.Grant{}, err
	}
	if sc.Engine == Identity {
		return g, nil
	}
	g.Role, g.Policies = sc.VaultName(), []string{sc.VaultName()}
	if sc.Engine == Token {
		return g, nil
	}
	g.Method, g.Path = sc.Vault.Method, sc.path.fill(values)
	if err := checkPath(g.Path); err != nil {
		return store.Grant{}, err
	}
	seconds := strconv.FormatInt(int64(ttl/time.Second), 10) + "s"
	if g.Method == "write" {
		g.Data = make(map[string]string, len(sc.data)+4)
		for key, t := range sc.data {
			g.Data[key] = t.fill(withTTL(values, seconds))
		}
	}
	switch sc.Engine {
	case PKI:
		g.Data["ttl"] = seconds
		if g.PublicKey != "" {
			// pki/sign certifies the step's own key; pki/issue would make
			// a private key and send it about.
			g.Path = sc.Vault.Mount + "/sign/" + strings.TrimPrefix(g.Path, sc.Vault.Mount+"/issue/")
			g.Data["csr"] = g.PublicKey
		}
	case SSH:
		g.Data["ttl"] = seconds
		g.Data["public_key"] = g.PublicKey
		g.Data["cert_type"] = "user"
	}
	return g, nil
}

func withTTL(values map[string]string, seconds string) map[string]string {
	out := make(map[string]string, len(values)+1)
	for k, v := range values {
		out[k] = v
	}
	out[ttlName] = seconds
	return out
}

func (sc *Scope) deliver(asked string) (string, error) {
	if asked == "" {
		asked = sc.Delivery[0]
	}
	if !slices.Contains(sc.Delivery, asked) {
		return "", fmt.Errorf("%w: %s is delivered %s", ErrDelivery, sc.Name, strings.Join(sc.Delivery, " or "))
	}
	return asked, nil
}

func (sc *Scope) audience(asked string) (string, error) {
	switch {
	case sc.Engine != Identity && asked != "":
		return "", fmt.Errorf("%w: %s takes no audience", ErrParams, sc.Name)
	case sc.Engine != Identity:
		return "", nil
	case asked == "":
		return sc.Audience[0], nil
	case !slices.Contains(sc.Audience, asked):
		return "", fmt.Errorf("%w: audience must be one of %s", ErrParams, strings.Join(sc.Audience, ", "))
	}
	return asked, nil
}

// publicKey reads the step's key and writes it again, so that nothing but the
// key goes on. What it returns it takes again unchanged.
func (sc *Scope) publicKey(delivery, s string) (string, error) {
	refuse := func(err error) (string, error) { return "", fmt.Errorf("%w: %w", ErrPublicKey, err) }
	switch {
	case len(s) > maxKey:
		return refuse(fmt.Errorf("it has %d bytes, at most %d are read", len(s), maxKey))
	case sc.Engine == SSH:
		key, err := sshKey(s)
		if err != nil {
			return refuse(err)
		}
		return key, nil
	case sc.Engine == PKI && s != "":
		csr, err := signingRequest(s)
		if err != nil {
			return refuse(err)
		}
		return csr, nil
	case s != "" && delivery == Gateway && sc.Access.Protocol != store.ProtocolPostgres:
		key, err := proofKey(s)
		if err != nil {
			return refuse(err)
		}
		return key, nil
	case s != "" && delivery == Gateway:
		return refuse(errors.New("a PostgreSQL session has no proof of possession; leave public_key out"))
	case s != "":
		return refuse(fmt.Errorf("%s certifies no key; leave public_key out", sc.Name))
	}
	return "", nil
}

// sshKey reads one line of OpenSSH's authorized_keys. Options and comment are
// refused and dropped: the one would look like a bound that holds, the other
// is nobody's business.
func sshKey(s string) (string, error) {
	want := errors.New(`send one OpenSSH public key, like "ssh-ed25519 AAAA..."`)
	if strings.TrimSpace(s) == "" {
		return "", want
	}
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(s))
	switch {
	case err != nil:
		return "", want
	case len(options) > 0:
		return "", errors.New("the key has options; send it without")
	case strings.TrimSpace(string(rest)) != "":
		return "", errors.New("there is more than one key; send one")
	}
	if _, isCert := key.(*ssh.Certificate); isCert {
		return "", errors.New("it is a certificate; send the key alone")
	}
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
	case ssh.KeyAlgoRSA:
		if k, ok := key.(ssh.CryptoPublicKey).CryptoPublicKey().(*rsa.PublicKey); !ok || k.N.BitLen() < minRSA {
			return "", fmt.Errorf("the RSA key has less than %d bits", minRSA)
		}
	default:
		return "", fmt.Errorf("keys of type %s are not signed; send ed25519, ecdsa or rsa", key.Type())
	}
	return strings.TrimSuffix(string(ssh.MarshalAuthorizedKey(key)), "\n"), nil
}

// signingRequest reads a PKCS #10 request (RFC 2986) in PEM. Its signature
// proves that the step holds the key. The catalogue's data names the subject,
// but a Vault role left at its defaults (use_csr_common_name, use_csr_sans)
// prefers the names in the request, so that a request that names anything is
// refused.
func signingRequest(s string) (string, error) {
	block, rest := pem.Decode([]byte(s))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(block.Headers) > 0 || strings.TrimSpace(string(rest)) != "" {
		return "", errors.New("send one certificate request in PEM (BEGIN CERTIFICATE REQUEST)")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return "", errors.New("the certificate request cannot be read")
	}
	if err := csr.CheckSignature(); err != nil {
		return "", errors.New("the certificate request is not signed by its own key")
	}
	switch k := csr.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if k.N.BitLen() < minRSA {
			return "", fmt.Errorf("the RSA key has less than %d bits", minRSA)
		}
	default:
		return "", errors.New("keys of this type are not certified; use ecdsa, ed25519 or rsa")
	}
	if len(csr.Subject.Names) > 0 || len(csr.Extensions) > 0 {
		return "", errors.New("the certificate request names a subject or extensions; the catalogue does, send it with an empty subject")
	}
	return strings.TrimSuffix(string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})), "\n"), nil
}

// privateMembers are those of a JWK that hold a secret (RFC 7518, sections 6.2.2,
// 6.3.2 and 6.4.1).
var privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"}

// proofKey reads the JWK that a session at the gateway is bound to: the key of
// the step's DPoP proofs (RFC 9449). It is written with the members of its
// thumbprint alone (RFC 7638, section 3.2), in their order.
func proofKey(s string) (string, error) {
	want := errors.New("send one public key as a JWK (RFC 7517): EC with P-256, or Ed25519")
	var members map[string]jsontext.Value // duplicate members are refused
	if json.Unmarshal([]byte(s), &members) != nil {
		return "", want
	}
	for _, m := range privateMembers {
		if _, ok := members[m]; ok {
			return "", errors.New("the key holds its private part: send the public one alone, and make a new key")
		}
	}
	var k jose.JSONWebKey
	if k.UnmarshalJSON([]byte(s)) != nil || k.Use != "" && k.Use != "sig" {
		return "", want
	}
	switch key := k.Key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return "", want
		}
	case ed25519.PublicKey:
	default:
		return "", want
	}
	b, err := json.Marshal(jose.JSONWebKey{Key: k.Key}, json.Deterministic(true))
	if err != nil {
		return "", want
	}
	v := jsontext.Value(b)
	if v.Canonicalize() != nil { // RFC 8785: members in the order of their names
		return "", want
	}
	return string(v), nil
}

// says reports whether a reason holds a character that can be read.
func says(reason string) bool {
	return strings.ContainsFunc(reason, func(c rune) bool { return !unicode.IsSpace(c) && !unicode.Is(unicode.C, c) })
}
