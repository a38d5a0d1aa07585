package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

func TestAFloodOfLoginsTakesNoMoreRoomAndTheOldestGo(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	e := expiring[int]{now: func() time.Time { return now }, life: time.Minute, most: 100}
	first := e.put(0)
	var last string
	for i := range 100 {
		last = e.put(i + 1)
	}
	if len(e.m) != 100 || len(e.order) != 100 {
		t.Fatalf("%d kept, %d in order", len(e.m), len(e.order))
	}
	if _, ok := e.take(first); ok {
		t.Fatal("the oldest is still there")
	}
	if v, ok := e.take(last); !ok || v != 100 {
		t.Fatal(v, ok)
	}
	if _, ok := e.take(last); ok {
		t.Fatal("taken twice")
	}
	now = now.Add(time.Minute)
	e.put(7)
	if len(e.m) != 1 || len(e.order) != 1 {
		t.Fatalf("%d kept of what is over", len(e.m)-1)
	}
}

func TestTheKeyThatVerifiedATokenIsFoundAmongOthers(t *testing.T) {
	keys := make([]*ecdsa.PrivateKey, 3)
	for i := range keys {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	jwk := func(i int, kid string) string {
		b, err := (&jose.JSONWebKey{Key: keys[i].Public(), KeyID: kid}).MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	token := func(i int, kid string) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: keys[i], KeyID: kid}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		jws, err := s.Sign([]byte("{}"))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jws.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	odd := `{"kty":"new","kid":"x"},{"kty":"oct","k":"c2VjcmV0","kid":"b"},`
	set := `{"keys":[` + odd + jwk(0, "a") + "," + jwk(1, "b") + `]}`
	for name, c := range map[string]struct {
		set, raw, want string
	}{
		"by name":               {set, token(1, "b"), jwk(1, "b")},
		"without a name":        {set, token(1, ""), jwk(1, "b")},
		"by another's name":     {set, token(1, "a"), ""},
		"one that is not there": {set, token(2, "b"), ""},
		"no set":                {`[]`, token(1, "b"), ""},
		"an empty set":          {`{}`, token(1, "b"), ""},
	} {
		got, err := keyOf([]byte(c.set), c.raw, []string{"ES256"})
		if string(got) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %s %v", name, got, err)
		}
	}
	if _, err := keyOf([]byte(set), token(1, "b"), []string{"RS256"}); err == nil {
		t.Error("an algorithm that is not allowed")
	}
}

// FuzzLocalPath holds localPath against what net/url makes of a path relative
// to this recorder, after the rewriting that browsers do (WHATWG URL, basic
// parser: tabs and newlines dropped, backslashes taken for slashes).
func FuzzLocalPath(f *testing.F) {
	for _, s := range []string{"/", "/a?b=//c", "//evil", `/\evil`, "/\t/evil", "/.//evil", "/..//evil", "/%2f/evil", "/a#//b", "/@evil", "/:80", "https://evil", "/a\x00"} {
		f.Add(s)
	}
	base, _ := url.Parse("http://localhost:8788/login")
	f.Fuzz(func(t *testing.T, s string) {
		if !localPath(s) {
			return
		}
		seen := strings.NewReplacer("\t", "", "\n", "", "\r", "", `\`, "/").Replace(s)
		u, err := base.Parse(seen)
		if err != nil || u.Host != base.Host || u.Scheme != "http" || strings.HasPrefix(u.Path, "//") || seen != s {
			t.Fatalf("%q leads to %v, %v", s, u, err)
		}
		w := httptest.NewRecorder()
		redirect(w, httptest.NewRequest(http.MethodGet, "http://localhost:8788/login", nil), s)
		to, err := base.Parse(w.Header().Get("Location"))
		if err != nil || to.Host != base.Host || strings.HasPrefix(w.Header().Get("Location"), "//") {
			t.Fatalf("%q is sent as %q", s, w.Header().Get("Location"))
		}
	})
}

func FuzzPersonClaims(f *testing.F) {
	f.Add([]byte(`{"preferred_username":"ann","groups":["dba","/x/y"],"auth_time":1}`))
	f.Add([]byte(`{"preferred_username":"ann@example.com","groups":"dba"}`))
	f.Add([]byte(`{"preferred_username":"` + "\u0000" + `"}`))
	f.Add([]byte(`{"preferred_username":["a"],"groups":{}}`))
	p, err := NewPeople(PeopleConfig{Issuer: "https://id.example.org", ClientID: "c", BaseURL: "https://record.example.org", Roles: map[Role][]string{Responder: {"dba"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var claims map[string]jsontext.Value
		if json.Unmarshal(b, &claims) != nil {
			return
		}
		who, err := p.person(claims)
		if err != nil {
			return
		}
		if !strings.HasPrefix(who.Name, "user:") || strings.ContainsAny(who.Name[5:], " \t\r\n\x00:/<>\"'&") || len(who.Name) > 5+128 || len(who.Groups) > maxGroups || who.Roles[0] != Approver {
			t.Fatalf("%+v", who)
		}
		for _, g := range who.Groups {
			if g == "" || len(g) > 128 || strings.ContainsAny(g, " \t\r\n\x00<>\"'&") {
				t.Fatalf("%q", g)
			}
		}
	})
}

func FuzzTerminal(f *testing.F) {
	f.Add("port=43210&challenge=" + strings.Repeat("A", 43))
	f.Add("port=+43210&challenge=")
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		port, challenge, err := terminalOf(v)
		if err == nil && (port < 1024 || port > 65535 || len(challenge) != 43 || strings.ContainsAny(challenge, "&?#/ ")) {
			t.Fatal(port, challenge)
		}
	})
}
