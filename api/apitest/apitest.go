// Package apitest checks every HTTP exchange of a test against openapi.yaml,
// and counts which operations and problems were seen.
package apitest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api"
)

// Seen counts, for one test binary, what was exercised.
type Seen struct {
	doc    *openapi3.T
	router routers.Router

	mu         sync.Mutex
	operations map[string]bool // by operationId, where the caller was let in
	problems   map[string]bool // by slug
}

// Load reads openapi.yaml.
func Load() (*Seen, error) {
	doc, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		return nil, err
	}
	if err := doc.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	router, err := legacy.NewRouter(doc)
	if err != nil {
		return nil, err
	}
	return &Seen{doc: doc, router: router, operations: map[string]bool{}, problems: map[string]bool{}}, nil
}

// only names the tag under which a problem comes, of those that not every part
// of the API sends.
var only = map[string]string{"self-approval": "people", "not-an-approver": "people", "passkey-required": "people", "rate-limited": "people"}

// Missing lists the operations under tags that no test got into, and the
// problems that no test saw.
func (s *Seen) Missing(tags ...string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for path, item := range s.doc.Paths.Map() {
		for method, op := range item.Operations() {
			if slices.ContainsFunc(tags, func(t string) bool { return slices.Contains(op.Tags, t) }) && !s.operations[op.OperationID] {
				out = append(out, "operation "+op.OperationID+" ("+method+" "+path+")")
			}
		}
	}
	for _, slug := range s.slugs() {
		if tag := only[slug]; !s.problems[slug] && (tag == "" || slices.Contains(tags, tag)) {
			out = append(out, "problem "+slug)
		}
	}
	slices.Sort(out)
	return out
}

// slugs are the problems that openapi.yaml names.
func (s *Seen) slugs() []string {
	var out []string
	for _, v := range s.doc.Components.Schemas["Problem"].Value.Properties["type"].Value.Enum {
		t, _ := v.(string)
		out = append(out, t[strings.LastIndex(t, "/")+1:])
	}
	return out
}

// Operations lists all operations, by method and path template.
func (s *Seen) Operations() []string {
	var out []string
	for path, item := range s.doc.Paths.Map() {
		for _, method := range slices.Sorted(maps.Keys(item.Operations())) {
			out = append(out, method+" "+path)
		}
	}
	slices.Sort(out)
	return out
}

// Transport returns a RoundTripper that sends through base and checks what
// went and what came. A request has to be as described only where it was
// accepted: tests send bad ones on purpose.
func (s *Seen) Transport(t testing.TB, base http.RoundTripper) http.RoundTripper {
	return &checking{s: s, t: t, base: base}
}

type checking struct {
	s    *Seen
	t    testing.TB
	base http.RoundTripper
}

func (c *checking) RoundTrip(r *http.Request) (*http.Response, error) {
	var sent []byte
	if r.Body != nil {
		var err error
		if sent, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
		_ = r.Body.Close()
		r = r.Clone(r.Context())
		r.Body = io.NopCloser(bytes.NewReader(sent))
	}
	resp, err := c.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(r.URL.Path, "/follow") && resp.StatusCode == http.StatusOK {
		c.s.saw("follow", "") // a stream without an end
		return resp, nil
	}
	got, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(got))
	if err != nil {
		return resp, nil //nolint:nilerr // what broke off is the test's to judge
	}
	if err := c.s.check(r, sent, resp, got); err != nil {
		c.t.Errorf("%s %s -> %d is not as openapi.yaml says: %v", r.Method, r.URL.Path, resp.StatusCode, err)
	}
	return resp, nil
}

func (s *Seen) saw(operation, slug string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if operation != "" {
		s.operations[operation] = true
	}
	if slug != "" {
		s.problems[slug] = true
	}
}

func (s *Seen) check(r *http.Request, sent []byte, resp *http.Response, got []byte) error {
	if resp.StatusCode >= 400 {
		if err := s.problem(resp, got); err != nil {
			return err
		}
	}
	// n of a tile is several path elements, which no path template can say.
	if op, rest := "tile", strings.TrimPrefix(r.URL.Path, "/tile/"); rest != r.URL.Path {
		if strings.HasPrefix(rest, "entries/") {
			op = "entries"
		}
		if resp.StatusCode < 300 {
			s.saw(op, "")
		}
		return nil
	}
	find := r.Clone(r.Context())
	u := *r.URL
	u.Scheme, u.Host = "", ""
	find.URL, find.Host = &u, ""
	route, params, err := s.router.FindRoute(find)
	if err != nil {
		if resp.StatusCode < 400 {
			return fmt.Errorf("no operation: %w", err)
		}
		return nil // a path or method that is none, refused
	}
	find.Body = io.NopCloser(bytes.NewReader(sent))
	in := &openapi3filter.RequestValidationInput{Request: find, PathParams: params, Route: route, QueryParams: r.URL.Query(),
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true}}
	if resp.StatusCode < 400 {
		if err := openapi3filter.ValidateRequest(r.Context(), in); err != nil {
			return fmt.Errorf("the request was accepted: %w", err)
		}
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
	default:
		s.saw(route.Operation.OperationID, "")
	}
	return openapi3filter.ValidateResponse(r.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(got)), Options: in.Options})
}

// problem checks a problem document, whatever the path.
func (s *Seen) problem(resp *http.Response, got []byte) error {
	if ct := resp.Header.Get("Content-Type"); ct != "application/problem+json" {
		return fmt.Errorf("content type %q", ct)
	}
	if len(got) == 0 && resp.Request != nil && resp.Request.Method == http.MethodHead {
		return nil
	}
	var v any
	if err := json.Unmarshal(got, &v); err != nil {
		return err
	}
	if err := s.doc.Components.Schemas["Problem"].Value.VisitJSON(v); err != nil {
		return err
	}
	doc, _ := v.(map[string]any)
	t, _ := doc["type"].(string)
	if status, _ := doc["status"].(float64); int(status) != resp.StatusCode {
		return fmt.Errorf("status %v in a document sent with %d", doc["status"], resp.StatusCode)
	}
	s.saw("", t[strings.LastIndex(t, "/")+1:])
	return nil
}

func init() {
	raw := func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(body)
		return string(b), err
	}
	openapi3filter.RegisterBodyDecoder("application/x-ndjson", raw)
	openapi3filter.RegisterBodyDecoder("application/yaml", raw)
	openapi3filter.RegisterBodyDecoder("application/octet-stream", raw)
	openapi3filter.RegisterBodyDecoder("text/plain", raw)
}
