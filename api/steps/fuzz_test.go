package steps

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

func FuzzCredentialBody(f *testing.F) {
	for _, s := range []string{`{"run":"r","scope":"vault:demo-read"}`, `{"run":"r","scope":"s","params":{"a":[1,{"b":null}]},"receipt":true}`,
		`{"run":"r","run":"q"}`, `null`, `{"run":"r","scope":"s","reason":"\u0000"}`, `{"run":"r","scope":"s","ttl":1e400}`, "\xff", ``, `{"run":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		body, canonical, err := decodeCredential(raw)
		if !bytes.Equal(before, raw) {
			t.Fatal("the body was changed")
		}
		if err != nil {
			if body != nil || canonical != nil {
				t.Fatal("half a body beside an error")
			}
			return
		}
		if !store.ValidID(body.Run) || body.Scope == "" {
			t.Fatalf("accepted %q", raw)
		}
		// The canonical form is one: taken again it stays what it is, and means
		// the same.
		again, twice, err := decodeCredential(canonical)
		if err != nil || !bytes.Equal(canonical, twice) || again.Run != body.Run || again.Scope != body.Scope || again.Reason != body.Reason {
			t.Fatalf("%q became %q, then %q: %v", raw, canonical, twice, err)
		}
		if !jsontext.Value(canonical).IsValid() {
			t.Fatalf("%q is no JSON", canonical)
		}
	})
}

func FuzzPathID(f *testing.F) {
	for _, s := range []string{"s1", "a%2Fb", "..", "%2e%2e", "", "%", "a b", "-x", "é", "a%00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c := chi.NewRouteContext()
		c.URLParams.Add("step", s)
		r := httptest.NewRequest("GET", "/", nil)
		r = r.WithContext(context.WithValue(r.Context(), chi.RouteCtxKey, c))
		if id, err := pathID(r, "step"); err == nil && !store.ValidID(id) {
			t.Fatalf("%q gave %q", s, id)
		}
	})
}

func FuzzPreferWait(f *testing.F) {
	for _, s := range []string{"wait=10", `respond-async, wait="10"`, "wait=-1", "WAIT = 5 ; x=y", "wait=99999999999999999999", "wait", "", ",;=,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d := preferWait([]string{s}); d < 0 || d > MaxWait {
			t.Fatalf("%q waits %s", s, d)
		}
	})
}

func FuzzIdempotencyKey(f *testing.F) {
	for _, s := range []string{"k", "", "a b", "\x7f", "é", "8e03978e-40d5-43dd-bc93-6894a57f9324"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := idempotencyKey([]string{s})
		if err == nil && (k != s || k == "" || len(k) > 255) {
			t.Fatalf("%q gave %q", s, k)
		}
	})
}

func TestPreferenceForWaiting(t *testing.T) {
	for in, want := range map[string]time.Duration{"wait=10": 10 * time.Second, "respond-async, wait=3": 3 * time.Second, `Wait="7"; foo`: 7 * time.Second,
		"wait=301": MaxWait, "wait=soon": 0, "wait=-1": 0, "await=3": 0, "": 0} {
		if got := preferWait(http.Header{"Prefer": {in}}.Values("Prefer")); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}
