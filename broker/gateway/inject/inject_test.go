package inject

import (
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

func kv(data string) *issuer.Credential {
	return &issuer.Credential{Kind: issuer.KindPath, Data: jsontext.Value(data)}
}

func TestASecretIsShownWhereTheGrantSaysAndNothingOfTheStepsStaysThere(t *testing.T) {
	for _, c := range []struct {
		name   string
		in     store.Inject
		secret *issuer.Credential
		header [2]string
		query  string
	}{
		{"header", store.Inject{In: InHeader, Name: "x-api-key", Value: "{{key}}"}, kv(`{"key":"real-key-1"}`), [2]string{"X-Api-Key", "real-key-1"}, "a=1&a=2&b=%2F"},
		{"header with text around", store.Inject{In: InHeader, Name: "Authorization", Value: "Bearer {{ token }}"}, kv(`{"data":{"token":"t-123456"},"metadata":{"version":3}}`), [2]string{"Authorization", "Bearer t-123456"}, "a=1&a=2&b=%2F"},
		{"number", store.Inject{In: InHeader, Name: "X-Api-Key", Value: "{{account}}.{{key}}"}, kv(`{"account":42,"key":"k"}`), [2]string{"X-Api-Key", "42.k"}, "a=1&a=2&b=%2F"},
		{"query", store.Inject{In: InQuery, Name: "a", Value: "{{key}}"}, kv(`{"key":"x&y=z"}`), [2]string{"X-Api-Key", "the step's own"}, "b=%2F&a=x%26y%3Dz"},
		{"basic", store.Inject{In: InBasic, Username: "svc", Password: "{{password}}"}, &issuer.Credential{Password: "p:w"}, [2]string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("svc:p:w"))}, "a=1&a=2&b=%2F"},
	} {
		t.Run(c.name, func(t *testing.T) {
			req, _ := http.NewRequest("GET", "http://target/x?a=1&a=2&b=%2F", nil)
			req.Header["X-Api-Key"] = []string{"the step's own", "and another"}
			req.Header["Authorization"] = []string{"Bearer session"}
			if err := Apply(req, &c.in, c.secret); err != nil {
				t.Fatal(err)
			}
			if got := req.Header[c.header[0]]; got[0] != c.header[1] || c.in.In != InQuery && len(got) != 1 {
				t.Errorf("%s: %q", c.header[0], got)
			}
			if req.URL.RawQuery != c.query {
				t.Errorf("query %q, not %q", req.URL.RawQuery, c.query)
			}
		})
	}
}

func TestWhatCannotBeShownIsAnErrorWithoutTheSecret(t *testing.T) {
	const canary = "canary-4711"
	for name, c := range map[string]struct {
		in   store.Inject
		data string
		want error
	}{
		"no such field":       {store.Inject{In: InHeader, Name: "K", Value: "{{other}}"}, `{"key":"` + canary + `"}`, ErrField},
		"empty field":         {store.Inject{In: InHeader, Name: "K", Value: "{{key}}"}, `{"key":""}`, ErrField},
		"object":              {store.Inject{In: InHeader, Name: "K", Value: "{{key}}"}, `{"key":{"x":"` + canary + `"}}`, ErrField},
		"not closed":          {store.Inject{In: InHeader, Name: "K", Value: "{{key"}, `{"key":"` + canary + `"}`, ErrTemplate},
		"closed first":        {store.Inject{In: InHeader, Name: "K", Value: "}}{{key}}"}, `{"key":"` + canary + `"}`, ErrTemplate},
		"line feed":           {store.Inject{In: InHeader, Name: "K", Value: "{{key}}"}, `{"key":"` + canary + `\nHost: evil"}`, ErrValue},
		"host":                {store.Inject{In: InHeader, Name: "host", Value: "{{key}}"}, `{"key":"` + canary + `"}`, ErrValue},
		"no header's name":    {store.Inject{In: InHeader, Name: "a b", Value: "{{key}}"}, `{"key":"` + canary + `"}`, ErrValue},
		"colon in the user":   {store.Inject{In: InBasic, Username: "{{key}}", Password: "x"}, `{"key":"a:` + canary + `"}`, ErrValue},
		"line feed in basic":  {store.Inject{In: InBasic, Username: "x", Password: "{{key}}"}, `{"key":"a\n` + canary + `"}`, ErrValue},
		"query without a key": {store.Inject{In: InQuery, Value: "{{key}}"}, `{"key":"` + canary + `"}`, ErrValue},
		"sigv4":               {store.Inject{In: InSigV4}, `{"key":"` + canary + `"}`, ErrUnsupported},
		"nowhere":             {store.Inject{}, `{"key":"` + canary + `"}`, ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			req, _ := http.NewRequest("GET", "http://target/", nil)
			err := Apply(req, &c.in, kv(c.data))
			if !errors.Is(err, c.want) || strings.Contains(err.Error(), canary) {
				t.Errorf("%v", err)
			}
		})
	}
	req, _ := http.NewRequest("GET", "http://target/?a;b=1", nil)
	if err := Apply(req, &store.Inject{In: InQuery, Name: "k", Value: "{{key}}"}, kv(`{"key":"x"}`)); !errors.Is(err, ErrValue) {
		t.Errorf("a query that targets read differently: %v", err)
	}
}

func TestWhatShowsTheSecretIsKnownInTheFormsThatRequestsHaveIt(t *testing.T) {
	got := Values(&store.Inject{In: InBasic, Username: "svc", Password: "{{password}}"}, kv(`{"password":"p/ss word","other":"not-injected"}`))
	for _, want := range []string{"p/ss word", url.QueryEscape("p/ss word"), url.PathEscape("p/ss word"), base64.StdEncoding.EncodeToString([]byte("svc:p/ss word"))} {
		if !slices.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
	if slices.Contains(got, "not-injected") {
		t.Error("what the target never gets is looked for")
	}
	if got := Values(&store.Inject{In: InHeader, Name: "K", Value: "Bearer {{key}} {{short}}"}, kv(`{"key":"real-key-1","short":"ab"}`)); !slices.Equal(got, []string{"real-key-1"}) {
		t.Errorf("%q", got)
	}
	if got := Values(&store.Inject{In: InSigV4}, kv(`{"access_key":"AKIAEXAMPLE","secret_key":"secretsecret"}`)); !slices.Equal(got, []string{"secretsecret"}) {
		t.Errorf("%q", got)
	}
	if Values(nil, kv(`{"key":"real-key-1"}`)) != nil {
		t.Error("a target that gets no secret")
	}
}

func FuzzTemplatesNeverShowAFieldThatTheyDoNotName(f *testing.F) {
	f.Add("Bearer {{key}}")
	f.Add("{{ke{{y}}}}")
	f.Add("}}{{")
	f.Fuzz(func(t *testing.T, template string) {
		const canary = "\x01canary\x01"
		v, err := expand(template, map[string]string{"key": "v", "hidden": canary})
		if err == nil && strings.Contains(v, canary) && !strings.Contains(template, "hidden") && !strings.Contains(template, canary) {
			t.Errorf("%q became %q", template, v)
		}
	})
}
