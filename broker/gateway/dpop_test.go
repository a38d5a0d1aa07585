package gateway_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// holder is a step that holds a key.
type holder struct {
	key   any
	alg   jose.SignatureAlgorithm
	token string
	now   time.Time
}

func newHolder(t testing.TB, alg jose.SignatureAlgorithm) *holder {
	t.Helper()
	h := &holder{alg: alg, now: time.Now()}
	var err error
	switch alg {
	case jose.EdDSA:
		_, h.key, err = ed25519.GenerateKey(rand.Reader)
	case jose.ES384:
		h.key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		h.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	ok(t, err)
	return h
}

func (h *holder) jwk(t testing.TB) string {
	t.Helper()
	k := jose.JSONWebKey{Key: h.key}
	b, err := k.Public().MarshalJSON()
	ok(t, err)
	return string(b)
}

// claims are those of a good proof for GET / at the gateway.
func (h *holder) claims() map[string]any {
	sum := sha256.Sum256([]byte(h.token))
	return map[string]any{"jti": rand.Text(), "htm": "GET", "htu": "http://gateway.test:8789/", "iat": h.now.Unix(),
		"ath": base64.RawURLEncoding.EncodeToString(sum[:])}
}

// proof signs claims; head changes the header.
func (h *holder) proof(t testing.TB, claims map[string]any, head ...func(*jose.SignerOptions)) string {
	t.Helper()
	o := (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt")
	for _, f := range head {
		f(o)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: h.alg, Key: h.key}, o)
	ok(t, err)
	b, err := json.Marshal(claims)
	ok(t, err)
	jws, err := signer.Sign(b)
	ok(t, err)
	compact, err := jws.CompactSerialize()
	ok(t, err)
	return compact
}

func request(method, target, auth string, proofs ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	if auth != "" {
		r.Header.Set("Authorization", auth)
	}
	for _, p := range proofs {
		r.Header.Add("DPoP", p)
	}
	return r
}

// bound opens a session that is bound to h's key.
func bound(t testing.TB, g *gateway.Gateway, h *holder) *gateway.Session {
	t.Helper()
	s, token := open(t, g, func(p *gateway.Params) { p.Grant.PublicKey = h.jwk(t) })
	h.token = token
	return s
}

func TestATokenAloneIsEnoughWhereNoKeyIsBound(t *testing.T) {
	g := newGateway(t, memory{})
	s, token := open(t, g)
	for auth, good := range map[string]bool{
		"Bearer " + token: true, "bearer  " + token: true,
		"": false, token: false, "Bearer": false, "Bearer ": false, "Basic " + token: false, "DPoP " + token: false,
		"Bearer " + token + " ": false, "Bearer " + token[1:]: false, "Bearer " + strings.Repeat("x", 1<<20): false,
	} {
		got, err := g.Authenticate(request("GET", "/", auth))
		if good != (err == nil) || good && got != s || !good && !errors.Is(err, gateway.ErrNoSession) {
			t.Errorf("%.60q: %v", auth, err)
		}
	}
	r := request("GET", "/", "Bearer "+token)
	r.Header.Add("Authorization", "Bearer "+token)
	if _, err := g.Authenticate(r); !errors.Is(err, gateway.ErrNoSession) {
		t.Errorf("two of them: %v", err)
	}
}

func TestABoundSessionIsOpenToTheHolderOfItsKeyAlone(t *testing.T) {
	for _, alg := range []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA} {
		t.Run(string(alg), func(t *testing.T) {
			g := newGateway(t, memory{})
			h := newHolder(t, alg)
			s := bound(t, g, h)
			p := h.proof(t, h.claims())
			got, err := g.Authenticate(request("GET", "/?q=1#f", "DPoP "+h.token, p))
			if err != nil || got != s {
				t.Fatalf("a good proof: %v", err)
			}
			if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, p)); !errors.Is(err, gateway.ErrProof) {
				t.Errorf("shown twice: %v", err)
			}
			if _, err := g.Session(h.token); !errors.Is(err, gateway.ErrNoSession) {
				t.Errorf("the token alone: %v", err)
			}
			with := func(name string, v any) string { c := h.claims(); c[name] = v; return h.proof(t, c) }
			without := func(name string) string { c := h.claims(); delete(c, name); return h.proof(t, c) }
			thief := newHolder(t, alg)
			thief.token = h.token
			good := h.proof(t, h.claims())
			parts := strings.Split(good, ".")
			none := base64.RawURLEncoding.EncodeToString([]byte(`{"typ":"dpop+jwt","alg":"none","jwk":` + h.jwk(t) + `}`))
			stolen := strings.Split(thief.proof(t, h.claims()), ".")
			for name, r := range map[string]*http.Request{
				"Bearer":                  request("GET", "/", "Bearer "+h.token, good),
				"no proof":                request("GET", "/", "DPoP "+h.token),
				"two proofs":              request("GET", "/", "DPoP "+h.token, good, h.proof(t, h.claims())),
				"no JWT":                  request("GET", "/", "DPoP "+h.token, "x"),
				"too long":                request("GET", "/", "DPoP "+h.token, strings.Repeat("x", 1<<20)),
				"not signed":              request("GET", "/", "DPoP "+h.token, parts[0]+"."+parts[1]+"."),
				"alg none":                request("GET", "/", "DPoP "+h.token, none+"."+parts[1]+"."),
				"another's signature":     request("GET", "/", "DPoP "+h.token, parts[0]+"."+parts[1]+"."+stolen[2]),
				"another's claims":        request("GET", "/", "DPoP "+h.token, parts[0]+"."+stolen[1]+"."+parts[2]),
				"another's key":           request("GET", "/", "DPoP "+h.token, thief.proof(t, h.claims())),
				"without jwk":             request("GET", "/", "DPoP "+h.token, h.proof(t, h.claims(), func(o *jose.SignerOptions) { o.EmbedJWK = false })),
				"typ of an access token":  request("GET", "/", "DPoP "+h.token, h.proof(t, h.claims(), func(o *jose.SignerOptions) { o.WithType("at+jwt") })),
				"another ath":             request("GET", "/", "DPoP "+h.token, with("ath", strings.Repeat("A", 43))),
				"no ath":                  request("GET", "/", "DPoP "+h.token, without("ath")),
				"another htm":             request("POST", "/", "DPoP "+h.token, good),
				"htm in another case":     request("GET", "/", "DPoP "+h.token, with("htm", "get")),
				"another path":            request("GET", "/other", "DPoP "+h.token, good),
				"another host":            request("GET", "/", "DPoP "+h.token, with("htu", "http://demo.internal/")),
				"another scheme":          request("GET", "/", "DPoP "+h.token, with("htu", "https://gateway.test:8789/")),
				"another port":            request("GET", "/", "DPoP "+h.token, with("htu", "http://gateway.test/")),
				"an htu with user":        request("GET", "/", "DPoP "+h.token, with("htu", "http://a@gateway.test:8789/")),
				"an htu with dots":        request("GET", "/", "DPoP "+h.token, with("htu", "http://gateway.test:8789/a/..")),
				"an htu that is a path":   request("GET", "/", "DPoP "+h.token, with("htu", "/")),
				"an htu that is none":     request("GET", "/", "DPoP "+h.token, with("htu", "http://%zz/")),
				"no htu":                  request("GET", "/", "DPoP "+h.token, without("htu")),
				"old":                     request("GET", "/", "DPoP "+h.token, with("iat", h.now.Add(-70*time.Second).Unix())),
				"from the future":         request("GET", "/", "DPoP "+h.token, with("iat", h.now.Add(20*time.Second).Unix())),
				"no iat":                  request("GET", "/", "DPoP "+h.token, without("iat")),
				"iat as text":             request("GET", "/", "DPoP "+h.token, with("iat", fmt.Sprint(h.now.Unix()))),
				"iat without end":         request("GET", "/", "DPoP "+h.token, with("iat", 1e300)),
				"no jti":                  request("GET", "/", "DPoP "+h.token, without("jti")),
				"a jti that is too long":  request("GET", "/", "DPoP "+h.token, with("jti", strings.Repeat("j", 257))),
				"a jti that is no string": request("GET", "/", "DPoP "+h.token, with("jti", 1)),
				"an absolute request":     request("GET", "http://demo.internal/", "DPoP "+h.token, good),
			} {
				if got, err := g.Authenticate(r); got != nil || !errors.Is(err, gateway.ErrNoSession) {
					t.Errorf("%s: %v", name, err)
				}
			}
			// None of them has spent the good one.
			if _, err := g.Authenticate(request("GET", "/", "dpop "+h.token, good)); err != nil {
				t.Error(err)
			}
			for name, htu := range map[string]string{
				"upper case": "HTTP://Gateway.TEST:8789/", "no path": "http://gateway.test:8789", "a query": "http://gateway.test:8789/?a=b#c",
			} {
				if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, with("htu", htu))); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if _, err := g.Authenticate(request("GET", "/%7Ea/%c3%BC", "DPoP "+h.token, with("htu", "http://gateway.test:8789/~%61/%C3%bc"))); err != nil {
				t.Errorf("escapes: %v", err)
			}
			if _, err := g.Authenticate(request("GET", "http://demo.internal:80/a", "DPoP "+h.token, with("htu", "http://demo.internal/a"))); err != nil {
				t.Errorf("an absolute request: %v", err)
			}
		})
	}
}

func TestAProofIsGoodOnceForAsLongAsItIsNew(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	g := newGateway(t, memory{}, func(c *gateway.Config) {
		c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	})
	h := newHolder(t, jose.EdDSA)
	bound(t, g, h)
	proofs := map[string]time.Time{}
	for range 20 {
		p := h.proof(t, h.claims())
		proofs[p] = now
		if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, p)); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		now = now.Add(13 * time.Second)
		h.now = now
		mu.Unlock()
		for p, at := range proofs {
			if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, p)); err == nil {
				t.Fatalf("taken a second time, %s later", now.Sub(at))
			}
		}
	}
}

func TestOfOneProofShownManyTimesAtOnceOneIsTaken(t *testing.T) {
	g := newGateway(t, memory{})
	h := newHolder(t, jose.ES256)
	bound(t, g, h)
	p := h.proof(t, h.claims())
	var all sync.WaitGroup
	taken := make(chan bool, 50)
	for range 50 {
		all.Go(func() {
			if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, p)); err == nil {
				taken <- true
			}
		})
	}
	all.Wait()
	if len(taken) != 1 {
		t.Errorf("taken %d times", len(taken))
	}
}

func TestASessionIsNotBoundToAKeyThatCannotBeProved(t *testing.T) {
	g := newGateway(t, memory{})
	for name, change := range map[string]func(*gateway.Params){
		"no JWK":    func(p *gateway.Params) { p.Grant.PublicKey = "ssh-ed25519 AAAA" },
		"symmetric": func(p *gateway.Params) { p.Grant.PublicKey = `{"kty":"oct","k":"AAAA"}` },
		"P-384":     func(p *gateway.Params) { p.Grant.PublicKey = newHolder(t, jose.ES384).jwk(t) },
		"off curve": func(p *gateway.Params) { p.Grant.PublicKey = `{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}` },
		"PostgreSQL": func(p *gateway.Params) {
			p.Grant.PublicKey = newHolder(t, jose.ES256).jwk(t)
			p.Grant.Access.Protocol = store.ProtocolPostgres
		},
	} {
		if _, _, err := g.Open(params(change)); err == nil {
			t.Errorf("%s: it was opened", name)
		}
	}
}

// FuzzProof finds a proof that is taken and was not made by the key's holder.
func FuzzProof(f *testing.F) {
	h := newHolder(f, jose.EdDSA)
	g := gateway.New(gateway.Config{Recorder: memory{}, Addresses: addresses, Now: func() time.Time { return h.now }})
	f.Cleanup(g.Close)
	bound(f, g, h)
	good := h.proof(f, h.claims())
	// It is spent, so that its claims in another spelling are no finding.
	if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, good)); err != nil {
		f.Fatal(err)
	}
	parts := strings.Split(good, ".")
	head, _ := base64.RawURLEncoding.DecodeString(parts[0])
	payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
	f.Add(good, "/", "GET")
	f.Add(string(head), "/%7e", "POST")
	f.Add(string(payload), "http://demo.internal/", "CONNECT")
	f.Fuzz(func(t *testing.T, proof, target, method string) {
		r := request("GET", "/", "DPoP "+h.token, proof)
		r.Method = method
		if u, err := r.URL.Parse(target); err == nil {
			r.URL = u
		}
		if _, err := g.Authenticate(r); err == nil {
			t.Errorf("%q is taken for %s %s", proof, method, r.URL)
		}
		// Its parts in all places of a JWT, under a signature of another.
		b := base64.RawURLEncoding.EncodeToString([]byte(proof))
		for _, p := range []string{b + "." + parts[1] + "." + parts[2], parts[0] + "." + b + "." + parts[2], parts[0] + "." + parts[1] + "." + b} {
			if _, err := g.Authenticate(request("GET", "/", "DPoP "+h.token, p)); err == nil {
				t.Errorf("%q is taken", p)
			}
		}
	})
}
