package auth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
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
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
)

func create(t *testing.T, path string, tok auth.Token) string {
	t.Helper()
	s, err := auth.CreateToken(path, tok, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestATokenIsKnownUntilItIsRevokedOrExpires(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	end := time.Now().Add(time.Hour)
	a := create(t, path, auth.Token{Name: "demo", Role: auth.Orchestrator, Owners: []string{"user:ann"}})
	b := create(t, path, auth.Token{Name: "rs", Role: auth.ResourceServer, Expires: &end})
	if !strings.HasPrefix(a, "cs_orchestrator_") || !strings.HasPrefix(b, "cs_resource-server_") {
		t.Fatalf("forms %.20s %.20s", a, b)
	}
	file, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(file), a) || strings.Contains(string(file), strings.TrimPrefix(a, "cs_orchestrator_")) {
		t.Fatal("the file holds the token")
	}
	now := time.Now()
	tokens, err := auth.OpenTokens(path, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	p, err := tokens.Authenticate(a)
	if err != nil || p.Name != "demo" || p.Role != auth.Orchestrator || len(p.Owners) != 1 {
		t.Fatalf("%+v %v", p, err)
	}
	if _, err := tokens.Authenticate(a + "x"); !errors.Is(err, auth.ErrUnauthenticated) {
		t.Fatalf("a longer token: %v", err)
	}
	now = end
	if _, err := tokens.Authenticate(b); !errors.Is(err, auth.ErrUnauthenticated) {
		t.Fatalf("an expired token: %v", err)
	}
	n, err := auth.RevokeToken(path, func(t *auth.Token) bool { return t.Name == "demo" })
	if n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if _, err := tokens.Authenticate(a); !errors.Is(err, auth.ErrUnauthenticated) {
		t.Fatalf("revoked, and at once: %v", err)
	}
}

func TestARotatedTokenWorksUntilTheOverlapEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	start := time.Now()
	old := create(t, path, auth.Token{Name: "b1", Role: auth.Writer})
	if _, err := auth.CreateToken(path, auth.Token{Name: "b1", Role: auth.Writer}, start); err == nil {
		t.Fatal("a second token was created beside the first")
	}
	fresh, err := auth.RotateToken(path, auth.Writer, "b1", time.Hour, start)
	if err != nil {
		t.Fatal(err)
	}
	now := start
	tokens, err := auth.OpenTokens(path, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{old, fresh} {
		if _, err := tokens.Authenticate(s); err != nil {
			t.Fatal(err)
		}
	}
	now = start.Add(time.Hour)
	if _, err := tokens.Authenticate(old); !errors.Is(err, auth.ErrUnauthenticated) {
		t.Fatalf("after the overlap: %v", err)
	}
	if _, err := tokens.Authenticate(fresh); err != nil {
		t.Fatal(err)
	}
}

func TestRevocationsInQuickSuccessionAreAllSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	tokens := map[string]string{}
	for _, n := range []string{"aa", "bb", "cc", "dd"} { // records of one length
		tokens[n] = create(t, path, auth.Token{Name: n, Role: auth.Writer})
	}
	ts, err := auth.OpenTokens(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for n, s := range tokens {
		if _, err := auth.RotateToken(path, auth.Writer, n, 0, time.Now()); err != nil {
			t.Fatal(err)
		}
		if _, err := ts.Authenticate(s); !errors.Is(err, auth.ErrUnauthenticated) {
			t.Fatalf("%s: %v", n, err)
		}
	}
}

func TestAFileThatOthersCanReadOrThatIsBrokenAuthenticatesNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	s := create(t, path, auth.Token{Name: "demo", Role: auth.Orchestrator})
	ts, err := auth.OpenTokens(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	good, _ := os.ReadFile(path)
	for name, breakIt := range map[string]func() error{
		"readable": func() error { return os.Chmod(path, 0o644) },
		"garbage":  func() error { return os.WriteFile(path, []byte("{"), 0o600) },
		"misspelt": func() error {
			return os.WriteFile(path, []byte(strings.Replace(string(good), `"created"`, `"creatd"`, 1)), 0o600)
		},
		"gone": func() error { return os.Remove(path) },
	} {
		os.Remove(path)
		if err := errors.Join(os.WriteFile(path, good, 0o600), breakIt()); err != nil {
			t.Fatal(err)
		}
		if p, err := ts.Authenticate(s); err == nil || p != nil {
			t.Errorf("%s: %v", name, p)
		}
	}
}

func TestTwoWritersOfTheFileLoseNoToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := auth.CreateToken(path, auth.Token{Name: "n" + string(rune('a'+i)), Role: auth.Writer}, time.Now()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if l, err := auth.ListTokens(path); err != nil || len(l) != 20 {
		t.Fatal(len(l), err)
	}
}

// provider is a real OpenID provider as far as keys go.
type provider struct {
	*httptest.Server
	key     *ecdsa.PrivateKey
	fetched int
}

func newProvider(t *testing.T) *provider {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &provider{key: key}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(map[string]any{"issuer": p.URL, "jwks_uri": p.URL + "/jwks", "authorization_endpoint": p.URL + "/a", "token_endpoint": p.URL + "/t",
			"id_token_signing_alg_values_supported": []string{"ES256", "HS256", "none"}})
	})
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, r *http.Request) {
		p.fetched++
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	})
	p.Server = httptest.NewServer(mux)
	t.Cleanup(p.Close)
	return p
}

func (p *provider) sign(t testing.TB, key any, alg jose.SignatureAlgorithm, kid string, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", kid))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := json.Marshal(claims)
	o, err := s.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := o.CompactSerialize()
	return raw
}

func (p *provider) claims(with map[string]any) map[string]any {
	now := time.Now()
	c := map[string]any{"iss": p.URL, "aud": "countersign", "sub": "repo:acme/deploy", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}
	for k, v := range with {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func TestOnlyAGoodOIDCTokenIsAnOrchestrator(t *testing.T) {
	p := newProvider(t)
	is, err := auth.NewIssuers([]auth.IssuerConfig{{Issuer: p.URL, Audience: "countersign", SubjectPrefix: "user:",
		Orchestrators: []auth.ClaimRule{{Match: map[string]string{"sub": "repo:acme/deploy|repo:acme/ci"}, Orchestrator: "acme"}}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	good := p.sign(t, p.key, jose.ES256, "k1", p.claims(nil))
	who, err := is.Authenticate(ctx, good)
	if err != nil || who.Name != "acme" || who.Role != auth.Orchestrator {
		t.Fatalf("%+v %v", who, err)
	}
	if s, err := is.Subject(ctx, good); err != nil || s != "user:repo:acme/deploy" {
		t.Fatalf("%q %v", s, err)
	}

	now := time.Now()
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, _ := x509.MarshalPKIXPublicKey(p.key.Public())
	pub := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	b64 := base64.RawURLEncoding
	payload, _ := json.Marshal(p.claims(nil))
	none := b64.EncodeToString([]byte(`{"alg":"none"}`)) + "." + b64.EncodeToString(payload) + "."
	hs := b64.EncodeToString([]byte(`{"alg":"HS256","kid":"k1"}`)) + "." + b64.EncodeToString(payload)
	mac := hmac.New(sha256.New, pub)
	mac.Write([]byte(hs))
	hs += "." + b64.EncodeToString(mac.Sum(nil))
	full, _ := jose.ParseSignedCompact(good, []jose.SignatureAlgorithm{jose.ES256})
	dup := strings.Replace(string(payload), `"sub":`, `"sub":"repo:acme/x","sub":`, 1)
	signer, _ := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.key}, (&jose.SignerOptions{}).WithHeader("kid", "k1"))
	dupJWS, _ := signer.Sign([]byte(dup))
	dupRaw, _ := dupJWS.CompactSerialize()

	for name, raw := range map[string]string{
		"alg none":                none,
		"HS256 over public key":   hs,
		"wrong audience":          p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"aud": "other"})),
		"wrong issuer":            p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"iss": "https://evil.example"})),
		"expired":                 p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"exp": now.Add(-time.Second).Unix()})),
		"no expiry":               p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"exp": nil})),
		"not yet valid":           p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"nbf": now.Add(2 * time.Minute).Unix()})),
		"issued in the future":    p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"iat": now.Add(2 * time.Minute).Unix()})),
		"unknown kid":             p.sign(t, other, jose.ES256, "k2", p.claims(nil)),
		"another's key":           p.sign(t, other, jose.ES256, "k1", p.claims(nil)),
		"claim that only begins":  p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"sub": "repo:acme/deploy-evil"})),
		"claim that only ends":    p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"sub": "x:repo:acme/ci"})),
		"claim with a newline":    p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"sub": "repo:acme/ci\n"})),
		"claim of another kind":   p.sign(t, p.key, jose.ES256, "k1", p.claims(map[string]any{"sub": nil})),
		"claim that stands twice": dupRaw,
		"JWS in JSON form":        full.FullSerialize(),
		"altered":                 good[:len(good)-4] + "AAAA",
		"empty":                   "",
		"dots":                    "..",
	} {
		if who, err := is.Authenticate(ctx, raw); !errors.Is(err, auth.ErrUnauthenticated) || who != nil {
			t.Errorf("%s: %+v, %v", name, who, err)
		}
	}
}

func TestAFloodOfUnknownKeysDoesNotFloodTheProvider(t *testing.T) {
	p := newProvider(t)
	is, err := auth.NewIssuers([]auth.IssuerConfig{{Issuer: p.URL, Audience: "countersign"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	raw := p.sign(t, other, jose.ES256, "k9", p.claims(nil))
	for range 100 {
		if _, err := is.Authenticate(context.Background(), raw); err == nil {
			t.Fatal("accepted")
		}
	}
	if p.fetched > 12 {
		t.Errorf("%d fetches of the keys", p.fetched)
	}
}

func TestARuleThatWouldMatchEverythingIsRefused(t *testing.T) {
	for name, r := range map[string]auth.ClaimRule{
		"no claim":       {Orchestrator: "a"},
		"way out":        {Orchestrator: "a", Match: map[string]string{"sub": `a)|(?:.*`}},
		"no valid name":  {Orchestrator: "../a", Match: map[string]string{"sub": "a"}},
		"no valid regex": {Orchestrator: "a", Match: map[string]string{"sub": "["}},
	} {
		if _, err := auth.NewIssuers([]auth.IssuerConfig{{Issuer: "https://i", Audience: "x", Orchestrators: []auth.ClaimRule{r}}}, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// refusals collects what would go on record.
type refusals struct {
	mu   sync.Mutex
	subs []*store.Submission
}

func (r *refusals) record(_ context.Context, s *store.Submission) error {
	b, err := s.Marshal()
	if err != nil {
		return err
	}
	if _, err := store.ParseSubmission(b); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.subs = append(r.subs, s)
	return nil
}

func guarded(g *auth.Guard) http.Handler {
	r := chi.NewRouter()
	r.With(g.Require(auth.Writer)).Get("/w/{id}", func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(auth.From(r.Context()).Name))
	})
	return r
}

func TestEveryRefusalIsOnRecordAndNamesNoToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	writer := create(t, path, auth.Token{Name: "b1", Role: auth.Writer})
	orch := create(t, path, auth.Token{Name: "demo", Role: auth.Orchestrator})
	ts, _ := auth.OpenTokens(path, nil)
	var rec refusals
	f := auth.NewRefusals("example.org", zap.NewNop(), rec.record)
	srv := httptest.NewServer(guarded(&auth.Guard{Tokens: ts, Refusals: f}))
	defer srv.Close()
	for i, c := range []struct {
		header string
		status int
	}{
		{"Bearer " + writer, 200}, {"bearer " + writer, 200},
		{"Bearer " + orch, 403},
		{"", 401}, {"Bearer cs_writer_s3cret", 401}, {"Bearer s3cret", 401}, {"Basic s3cret", 401}, {"Bearer", 401}, {"Bearer " + writer + " x", 401},
	} {
		r, _ := http.NewRequest("GET", srv.URL+"/w/7", nil)
		if c.header != "" {
			r.Header.Set("Authorization", c.header)
		}
		before := len(rec.subs)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.status || (c.status == 401) != (resp.Header.Get("WWW-Authenticate") != "") {
			t.Errorf("case %d: %d", i, resp.StatusCode)
		}
		if got := len(rec.subs) - before; (c.status != 200) != (got == 1) {
			t.Errorf("case %d: %d entries", i, got)
		}
	}
	b, _ := json.Marshal(rec.subs)
	if strings.Contains(string(b), "s3cret") || strings.Contains(string(b), orch) {
		t.Error("a refusal repeats the token")
	}
	d, err := store.DetailsAs[store.RefusedDetails](&rec.subs[0].Entry)
	if err != nil || d.Role != "orchestrator" || d.Route != "/w/{id}" || d.Problem != "role-forbidden" || d.Remote != "127.0.0.1" ||
		rec.subs[0].Orchestrator != "demo" || rec.subs[0].Agent != "spiffe://example.org/orchestrator/demo" {
		t.Errorf("%+v %+v", d, rec.subs[0].Entry)
	}
}

func TestAFloodOfRefusalsIsFoldedAndNoneIsLost(t *testing.T) {
	var rec refusals
	f := auth.NewRefusals("example.org", zap.NewNop(), rec.record)
	const n = 1000
	for range n {
		f.Add(context.Background(), nil, store.RefusedDetails{Method: "GET", Route: "/x", Problem: "unauthenticated"})
	}
	f.Close()
	total := 0
	for _, s := range rec.subs {
		d, err := store.DetailsAs[store.RefusedDetails](&s.Entry)
		if err != nil {
			t.Fatal(err)
		}
		total += 1 + d.Folded
	}
	if total != n || len(rec.subs) > 60 {
		t.Fatalf("%d entries stand for %d refusals, want %d", len(rec.subs), total, n)
	}
}

func TestAFloodOfRefusalsHidesNoOtherAttempt(t *testing.T) {
	var rec refusals
	f := auth.NewRefusals("example.org", zap.NewNop(), rec.record)
	flood := func() {
		for range 200 {
			f.Add(context.Background(), nil, store.RefusedDetails{Method: "GET", Route: "/x", Problem: "unauthenticated"})
		}
	}
	flood()
	f.Add(context.Background(), &auth.Principal{Name: "demo", Role: auth.Orchestrator}, store.RefusedDetails{Method: "GET", Route: "/history", Problem: "role-forbidden"})
	flood()
	f.Close()
	found := 0
	for _, s := range rec.subs {
		if s.Orchestrator == "demo" && s.Action == "GET /history" {
			found++
		}
	}
	if found != 1 || len(rec.subs) > 60 {
		t.Fatalf("%d of %d entries name the orchestrator's attempt, want 1", found, len(rec.subs))
	}
}

func TestWhileTheLedgerIsAwayRefusalsAreKept(t *testing.T) {
	var rec refusals
	down := true
	f := auth.NewRefusals("example.org", zap.NewNop(), func(ctx context.Context, s *store.Submission) error {
		if down {
			return store.ErrUnavailable
		}
		return rec.record(ctx, s)
	})
	for range 3 {
		f.Add(context.Background(), nil, store.RefusedDetails{Method: "GET", Route: "/x", Problem: "unauthenticated"})
	}
	down = false
	f.Close()
	if len(rec.subs) != 1 {
		t.Fatal(len(rec.subs))
	}
	if d, _ := store.DetailsAs[store.RefusedDetails](&rec.subs[0].Entry); d.Folded != 2 {
		t.Fatalf("%+v", d)
	}
}
