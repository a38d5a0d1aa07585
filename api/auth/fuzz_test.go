package auth

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func FuzzTokenFile(f *testing.F) {
	_, rec := NewToken(Token{Name: "demo", Role: Orchestrator}, time.Unix(1, 0))
	f.Add([]byte(`{"version":1,"tokens":[{"name":"demo","role":"orchestrator","sha256":"` + rec.SHA256 + `","created":"2026-01-01T00:00:00Z"}]}`))
	f.Add([]byte(`{"version":1,"tokens":null}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseFile(b)
		if err != nil {
			return
		}
		for _, tok := range got.Tokens {
			if len(tok.ID()) != 12 || !tok.Role.Valid() || tok.Name == "" {
				t.Fatalf("%+v", tok)
			}
		}
	})
}

func FuzzBearer(f *testing.F) {
	f.Add("Bearer abc")
	f.Add("bearer a.b.c")
	f.Add("Bearer  x")
	f.Add("Basic x")
	f.Add("Bearer =")
	f.Fuzz(func(t *testing.T, header string) {
		token, err := bearer(http.Header{"Authorization": {header}})
		if err == nil && (token == "" || strings.ContainsAny(token, " \t\r\n\x00,\"")) {
			t.Fatalf("%q from %q", token, header)
		}
	})
}

func FuzzUnverifiedIssuer(f *testing.F) {
	f.Add("eyJhbGciOiJub25lIn0.eyJpc3MiOiJ4In0.")
	f.Add("a.b.c")
	f.Add("..")
	f.Fuzz(func(t *testing.T, raw string) { _, _ = unverifiedIssuer(raw) })
}
