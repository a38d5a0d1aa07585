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
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"

	"github.com/countersign-dev/countersign/issuer/vaulttest"
)

func stepClaims(audience string, end time.Time) Claims {
	return Claims{
		RegisteredClaims: jwt.RegisteredClaims{ID: "intent-1", Audience: jwt.ClaimStrings{audience}, ExpiresAt: jwt.NewNumericDate(end)},
		Orchestrator:     "demo", Run: "run-1", Step: "step-1", Request: "req_1", Scope: "identity:step",
	}
}

func TestARealVaultAcceptsAStepIdentityByItsJWKSAndRefusesAnotherAudience(t *testing.T) {
	v := vaulttest.Vault(t).Root
	if err := v.Sys().EnableAuth("jwt", "jwt", ""); err != nil {
		t.Fatal(err)
	}
	for _, alg := range []Algorithm{ES256, RS256, EdDSA} {
		t.Run(string(alg), func(t *testing.T) {
			mux := http.NewServeMux()
			srv := httptest.NewServer(mux)
			defer srv.Close()
			id, err := OpenIdentity(IdentityConfig{Issuer: srv.URL, TrustDomain: trustDomain, Algorithm: alg, KeyFile: filepath.Join(t.TempDir(), "keys.json")})
			if err != nil {
				t.Fatal(err)
			}
			mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) { w.Write(id.Discovery()) })
			mux.HandleFunc("GET /.well-known/jwks.json", func(w http.ResponseWriter, _ *http.Request) { w.Write(id.JWKS()) })
			// By discovery, as the clouds' workload federation does it.
			if _, err := v.Logical().Write("auth/jwt/config", map[string]any{"oidc_discovery_url": srv.URL, "jwt_supported_algs": []string{string(alg)}}); err != nil {
				t.Fatal(err)
			}
			if _, err := v.Logical().Write("auth/jwt/role/step", map[string]any{
				"role_type": "jwt", "bound_audiences": "vault", "user_claim": "sub", "token_policies": "default",
				"bound_claims": map[string]any{"orchestrator": "demo"}, "claim_mappings": map[string]string{"run": "run"},
			}); err != nil {
				t.Fatal(err)
			}
			login := func(audience string) (string, error) {
				token, _, err := id.Sign(stepClaims(audience, time.Now().Add(time.Minute)))
				if err != nil {
					t.Fatal(err)
				}
				s, err := v.Logical().Write("auth/jwt/login", map[string]any{"role": "step", "jwt": token})
				if err != nil {
					return "", err
				}
				return s.Auth.Metadata["run"], nil
			}
			if run, err := login("vault"); err != nil || run != "run-1" {
				t.Errorf("run %q, %v", run, err)
			}
			if _, err := login("another"); err == nil || !strings.Contains(err.Error(), "aud") {
				t.Errorf("another audience: %v", err)
			}
		})
	}
}

func TestRotationPublishesAKeyBeforeItSignsAndUntilItsLastTokenEnds(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	cfg := IdentityConfig{
		Issuer: "https://countersign.test", TrustDomain: trustDomain, KeyFile: filepath.Join(t.TempDir(), "keys.json"),
		MaxTTL: time.Hour, Lead: 10 * time.Minute, Now: func() time.Time { return now },
	}
	id, err := OpenIdentity(cfg)
	if err != nil {
		t.Fatal(err)
	}
	kids := func() (out []string) {
		var set jose.JSONWebKeySet
		if err := json.Unmarshal(id.JWKS(), &set); err != nil {
			t.Fatal(err)
		}
		for _, k := range set.Keys {
			if !k.IsPublic() || !k.Valid() || k.Use != "sig" {
				t.Fatal("the JWKS holds something that is no public signing key")
			}
			sum, _ := k.Thumbprint(crypto.SHA256)
			if k.KeyID != base64.RawURLEncoding.EncodeToString(sum) {
				t.Errorf("kid %s is not the thumbprint", k.KeyID)
			}
			out = append(out, k.KeyID)
		}
		return out
	}
	sign := func() (token, kid string) {
		t.Helper()
		token, _, err := id.Sign(stepClaims("a", now.Add(time.Hour)))
		if err != nil {
			t.Fatal(err)
		}
		p, _, err := jwt.NewParser().ParseUnverified(token, jwt.MapClaims{})
		if err != nil {
			t.Fatal(err)
		}
		return token, p.Header["kid"].(string)
	}
	_, old := sign()
	cfg.Algorithm = EdDSA // the next key may be of another kind
	id.cfg.Algorithm = EdDSA
	fresh, err := id.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	if got := kids(); len(got) != 2 || got[1] != fresh {
		t.Fatalf("published %v, want %s too", got, fresh)
	}
	if _, err := id.Rotate(); !errors.Is(err, ErrRotating) {
		t.Errorf("a rotation within a rotation: %v", err)
	}
	now = now.Add(10*time.Minute - time.Second)
	last, kid := sign()
	if kid != old {
		t.Error("the new key signs before its time")
	}
	now = now.Add(time.Second)
	if _, kid = sign(); kid != fresh {
		t.Error("the new key does not sign in its time")
	}
	now = now.Add(time.Hour - 2*time.Second)
	if _, err := id.Verify(last, "a"); err != nil {
		t.Errorf("the old key's last token: %v", err)
	}
	// A restart knows as much.
	if id, err = OpenIdentity(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := id.Verify(last, "a"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	now = now.Add(5 * time.Minute)
	if got := kids(); len(got) != 1 || got[0] != fresh {
		t.Errorf("published %v, want %s alone", got, fresh)
	}
	if _, err := id.Rotate(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(cfg.KeyFile)
	if err != nil || strings.Contains(string(b), old) {
		t.Errorf("the dead key is still in the file: %v", err)
	}
	if info, _ := os.Stat(cfg.KeyFile); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := id.Reload(); err != nil || len(kids()) != 2 {
		t.Errorf("reloaded %v, %v", kids(), err)
	}
}

func TestATornKeyFileWriteLeavesTheOldKeys(t *testing.T) {
	cfg := IdentityConfig{Issuer: "https://countersign.test", TrustDomain: trustDomain, KeyFile: filepath.Join(t.TempDir(), "keys.json")}
	id, err := OpenIdentity(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := string(id.JWKS())
	// What a crash in the middle of the write leaves beside the file.
	if err := os.WriteFile(cfg.KeyFile+".new", []byte(`{"keys":[{"si`), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err = OpenIdentity(cfg); err != nil || string(id.JWKS()) != before {
		t.Fatalf("%v, %s", err, id.JWKS())
	}
	if _, err := id.Rotate(); err != nil {
		t.Fatal(err)
	}
	// A rotation that cannot be kept does not happen.
	os.RemoveAll(filepath.Dir(cfg.KeyFile))
	id.cfg.Now = func() time.Time { return time.Now().Add(time.Hour) }
	before = string(id.JWKS())
	if _, err := id.Rotate(); err == nil || string(id.JWKS()) != before {
		t.Errorf("rotated without a file: %v", err)
	}
}

func TestPrivateKeysComeInPEMOrJWKAndWeakOnesAreRefused(t *testing.T) {
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsa2048, _ := rsa.GenerateKey(rand.Reader, 2048)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	pkcs8 := func(k any) string {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	jwk := func(k any) string {
		b, err := jose.JSONWebKey{Key: k}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	sec1, _ := x509.MarshalECPrivateKey(p256)
	for name, tt := range map[string]struct {
		text string
		alg  Algorithm // empty: refused
	}{
		"P-256, PKCS #8":      {pkcs8(p256), ES256},
		"P-256, SEC 1":        {string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})), ES256},
		"RSA, PKCS #1":        {string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsa2048)})), RS256},
		"Ed25519":             {pkcs8(ed), EdDSA},
		"P-256, JWK":          {jwk(p256), ES256},
		"Ed25519, JWK":        {jwk(ed), EdDSA},
		"P-384":               {pkcs8(p384), ""},
		"a public JWK":        {jwk(p256.Public()), ""},
		"a symmetric JWK":     {`{"kty":"oct","k":"c2VjcmV0"}`, ""},
		"a public PEM":        {"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", ""},
		"nothing":             {"", ""},
		"no keys":             {`{"keys":[]}`, ""},
		"keys out of order":   {`{"keys":[{"signs_from":"2026-01-02T00:00:00.000000Z","jwk":` + jwk(p256) + `},{"signs_from":"","jwk":` + jwk(ed) + `}]}`, ""},
		"an unknown property": {`{"keys":[{"signs_form":"","jwk":` + jwk(p256) + `}]}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			id, err := OpenIdentity(IdentityConfig{Issuer: "https://countersign.test", TrustDomain: trustDomain, KeyFile: file})
			if tt.alg == "" {
				if err == nil {
					t.Fatal("accepted")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			token, _, err := id.Sign(stepClaims("a", time.Now().Add(time.Minute)))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := id.Verify(token, "a"); err != nil {
				t.Error(err)
			}
			if !strings.Contains(string(id.Discovery()), string(tt.alg)) {
				t.Errorf("discovery %s", id.Discovery())
			}
			if _, err := id.Rotate(); err != nil { // rewrites it as a set
				t.Fatal(err)
			}
			if err := id.Reload(); err != nil {
				t.Fatal(err)
			}
			if _, err := id.Verify(token, "a"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTokensThatAreNotOursOrNotForHereDoNotVerify(t *testing.T) {
	id := newIdentity(t, ES256)
	now := time.Now()
	good, expires, err := id.Sign(stepClaims("here", now.Add(time.Minute+300*time.Millisecond)))
	if err != nil {
		t.Fatal(err)
	}
	if expires.After(now.Add(time.Minute + 300*time.Millisecond)) {
		t.Error("the token outlives what was asked")
	}
	if c, err := id.Verify(good, "here"); err != nil || c.Step != "step-1" || !c.ExpiresAt.Equal(expires) {
		t.Fatal(err)
	}
	key := (*id.keys.Load())[0]
	public, _ := x509.MarshalPKIXPublicKey(key.private.Public())
	forge := func(m jwt.SigningMethod, k any, kid string, change func(*Claims)) string {
		c := stepClaims("here", now.Add(time.Minute))
		c.Issuer, c.Subject = id.Issuer(), SPIFFEID(trustDomain, "demo", "run-1", "step-1")
		c.IssuedAt, c.NotBefore = jwt.NewNumericDate(now), jwt.NewNumericDate(now)
		if change != nil {
			change(&c)
		}
		token := jwt.NewWithClaims(m, c)
		token.Header["kid"] = kid
		s, err := token.SignedString(k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	mine := func(change func(*Claims)) string { return forge(jwt.SigningMethodES256, key.private, key.kid, change) }
	stranger, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if _, err := id.Verify(mine(nil), "here"); err != nil {
		t.Fatal("the forger's own token does not verify, so nothing below means anything: ", err)
	}
	for name, token := range map[string]string{
		"alg none":                     forge(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, key.kid, nil),
		"HS256 over the public key":    forge(jwt.SigningMethodHS256, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), key.kid, nil),
		"another's key under our kid":  forge(jwt.SigningMethodES256, stranger, key.kid, nil),
		"an unknown kid":               forge(jwt.SigningMethodES256, key.private, "other", nil),
		"a kid with a path":            forge(jwt.SigningMethodES256, key.private, "../"+key.kid, nil),
		"another audience":             mine(func(c *Claims) { c.Audience = jwt.ClaimStrings{"there"} }),
		"no audience":                  mine(func(c *Claims) { c.Audience = nil }),
		"another issuer":               mine(func(c *Claims) { c.Issuer = "https://elsewhere.test" }),
		"expired":                      mine(func(c *Claims) { c.ExpiresAt = jwt.NewNumericDate(now.Add(-time.Second)) }),
		"without an end":               mine(func(c *Claims) { c.ExpiresAt = nil }),
		"not yet valid":                mine(func(c *Claims) { c.NotBefore = jwt.NewNumericDate(now.Add(time.Minute)) }),
		"issued in the future":         mine(func(c *Claims) { c.IssuedAt = jwt.NewNumericDate(now.Add(time.Minute)) }),
		"of another trust domain":      mine(func(c *Claims) { c.Subject = SPIFFEID("other.test", "demo", "run-1", "step-1") }),
		"whose subject is another":     mine(func(c *Claims) { c.Step = "step-2" }),
		"with a path for a step":       mine(func(c *Claims) { c.Step, c.Subject = "a/b", SPIFFEID(trustDomain, "demo", "run-1", "a/b") }),
		"with a changed payload":       tamper(good),
		"with a second signature":      good + ".x",
		"empty":                        "",
		"too long":                     strings.Repeat("a", maxToken+1),
		"with padding in its encoding": good + "=",
	} {
		c, err := id.Verify(token, "here")
		if c != nil || !errors.Is(err, ErrToken) {
			t.Errorf("%s: %v, %v", name, c, err)
		}
	}
	for name, c := range map[string]Claims{
		"without an audience": {RegisteredClaims: jwt.RegisteredClaims{ExpiresAt: jwt.NewNumericDate(now.Add(time.Minute))}},
		"without an end":      {RegisteredClaims: jwt.RegisteredClaims{Audience: jwt.ClaimStrings{"a"}}},
		"that has ended":      stepClaims("a", now.Add(-time.Second)),
		"too long":            stepClaims("a", now.Add(2*time.Hour)),
	} {
		if _, _, err := id.Sign(c); err == nil {
			t.Errorf("signed a token %s", name)
		}
	}
}

func tamper(token string) string {
	parts := strings.Split(token, ".")
	b, _ := base64.RawURLEncoding.DecodeString(parts[1])
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(b), "run-1", "run-2", 1)))
	return strings.Join(parts, ".")
}

func TestAnIdentityThatCouldNotBeTrustedIsNotOpened(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.json")
	for name, cfg := range map[string]IdentityConfig{
		"no issuer":               {TrustDomain: trustDomain, KeyFile: file},
		"an issuer with a query":  {Issuer: "https://a.test?x=1", TrustDomain: trustDomain, KeyFile: file},
		"no trust domain":         {Issuer: "https://a.test", KeyFile: file},
		"a trust domain's path":   {Issuer: "https://a.test", TrustDomain: "a/b", KeyFile: file},
		"a trust domain in upper": {Issuer: "https://a.test", TrustDomain: "A.test", KeyFile: file},
		"an unknown algorithm":    {Issuer: "https://a.test", TrustDomain: trustDomain, KeyFile: file, Algorithm: "HS256"},
	} {
		if _, err := OpenIdentity(cfg); err == nil {
			t.Errorf("opened with %s", name)
		}
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused configuration left a key file")
	}
}

func FuzzVerifyingATokenNeverPanicsAndAcceptsOursAlone(f *testing.F) {
	id := newIdentity(f, ES256)
	token, _, err := id.Sign(stepClaims("here", time.Now().Add(time.Hour)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("eyJhbGciOiJIUzI1NiIsImtpZCI6IiJ9.e30.AAAA")
	f.Add("a.b.c")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		c, err := id.Verify(s, "here")
		if (c == nil) == (err == nil) || (err != nil && !errors.Is(err, ErrToken)) {
			t.Fatalf("%v, %v", c, err)
		}
		if err == nil && strings.Split(s, ".")[1] != strings.Split(token, ".")[1] {
			t.Fatalf("accepted a payload that was never signed: %s", s)
		}
	})
}

func FuzzReadingAKeyFileNeverPanics(f *testing.F) {
	id := newIdentity(f, EdDSA)
	b, err := os.ReadFile(id.cfg.KeyFile)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"keys":[{"signs_from":"","jwk":{"kty":"EC","crv":"P-256","x":"","y":"","d":""}}]}`))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseKeys(b)
		if (len(keys) == 0) == (err == nil) {
			t.Fatalf("%d keys, %v", len(keys), err)
		}
	})
}
