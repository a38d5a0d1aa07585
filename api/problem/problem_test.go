package problem

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/countersign-dev/countersign/store"
)

func write(t *testing.T, err error) (*http.Response, string, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	r := httptest.NewRequest(http.MethodPost, "/x", nil)
	r = r.WithContext(NewContext(r.Context(), "req-1", zap.New(core)))
	w := httptest.NewRecorder()
	Write(w, r, err)
	return w.Result(), w.Body.String(), logs
}

func TestEveryProblemIsSentWithItsTypeAndStatus(t *testing.T) {
	all := []*Problem{Malformed("x"), Unauthenticated(), RoleForbidden("x"), ScopeDenied("x", "why"), ApprovalDenied("x"),
		ApprovalExpired("x"), RequestChanged("x"), SelfApproval("x"), NotAnApprover("x"), Frozen("x"), PasskeyRequired("x"),
		NotFound("x"), MethodNotAllowed("PUT"), IdempotencyConflict("x"), RequestClosed("x"), BodyTooLarge(1), UnknownScope("x"),
		TTLTooLong("x"), TTLInvalid("x"), ReasonRequired("x"), ParamsInvalid("x"), DeliveryUnsupported("x"),
		RateLimited("x", time.Millisecond), Internal(errors.New("x")), VaultUnavailable(), LedgerUnavailable(), StateUnavailable(), ShuttingDown()}
	slugs := Slugs()
	for _, p := range all {
		want, ok := slugs[p.Slug()]
		if !ok {
			t.Errorf("slug %q is not in the table, or had two constructors", p.Slug())
		}
		delete(slugs, p.Slug())
		resp, body, _ := write(t, fmt.Errorf("wrapped: %w", p))
		if resp.StatusCode != want || resp.Header.Get("Content-Type") != ContentType {
			t.Errorf("%s: status %d, content type %q", p.Slug(), resp.StatusCode, resp.Header.Get("Content-Type"))
		}
		got := Read(resp.StatusCode, resp.Header.Get("Content-Type"), []byte(body))
		if got.Type != "https://countersign.dev/problems/"+p.Slug() || got.Title == "" || got.Instance != "req-1" || got.Status != want {
			t.Errorf("%s: read back %+v", p.Slug(), got)
		}
		if retry := resp.Header.Get("Retry-After"); (retry != "") != (want == 429 || want == 503) {
			t.Errorf("%s: Retry-After %q", p.Slug(), retry)
		}
	}
	for s := range slugs {
		t.Errorf("slug %q has no constructor in this test", s)
	}
}

func TestAnInternalErrorIsLoggedAndNotTold(t *testing.T) {
	resp, body, logs := write(t, errors.New("dial tcp 10.0.0.7: s3cret"))
	if resp.StatusCode != 500 || strings.Contains(body, "s3cret") || !strings.Contains(body, "req-1") {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	if n := logs.FilterField(zap.String("request_id", "req-1")).Len(); n != 1 {
		t.Fatalf("%d log lines, want 1", n)
	}
}

func TestSentinelsOfTheStoreHaveTheirProblems(t *testing.T) {
	order := &store.OrderError{Code: store.OrderJoined, Message: "m", Request: &store.Request{ID: "req_1"}}
	for _, c := range []struct {
		err  error
		slug string
	}{
		{fmt.Errorf("x: %w", store.ErrUnavailable), SlugLedgerUnavailable},
		{fmt.Errorf("x: %w", store.ErrConflict), SlugIdempotencyConflict},
		{fmt.Errorf("x: %w", store.ErrMalformed), SlugMalformed},
		{&http.MaxBytesError{Limit: 3}, SlugBodyTooLarge},
		{fmt.Errorf("x: %w", order), SlugRequestClosed},
		{&store.OrderError{Code: store.OrderForbidden}, SlugRoleForbidden},
		{errors.New("x"), SlugInternal},
	} {
		if got := From(c.err).Slug(); got != c.slug {
			t.Errorf("%v is %s, want %s", c.err, got, c.slug)
		}
	}
	var back store.OrderError
	if !From(order).Extension("order", &back) || back.Code != store.OrderJoined || back.Request.ID != "req_1" {
		t.Errorf("the refusal did not survive: %+v", back)
	}
}

func TestWhatAProxyWroteIsNotRepeated(t *testing.T) {
	p := Read(502, "text/html", []byte("<b>nginx</b>"))
	if p.Status != 502 || strings.Contains(p.Error(), "nginx") || p.Slug() != "" {
		t.Fatalf("%+v", p)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(400, ContentType, []byte(`{"type":"https://countersign.dev/problems/malformed","status":400,"order":{"code":"joined"}}`))
	f.Add(500, ContentType+"; charset=utf-8", []byte(`{"type":1}`))
	f.Add(502, "text/html", []byte(`<html>`))
	f.Add(403, ContentType, []byte(`{"status":200,"title":"x","":null,"a":{"a":[]}}`))
	f.Fuzz(func(t *testing.T, status int, contentType string, body []byte) {
		p := Read(status, contentType, body)
		if p.Status != status || p.Type == "" {
			t.Fatalf("%+v", p)
		}
		_ = p.Error()
		_ = p.Slug()
		if _, err := json.Marshal(p); err != nil {
			t.Fatalf("read and not written: %v", err)
		}
	})
}

func TestACallThatItsCallerBrokeOffIsNoFailureOfOurs(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	ctx, cancel := context.WithCancel(NewContext(context.Background(), "r1", zap.New(core)))
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	answer := func(err error) int {
		w := httptest.NewRecorder()
		Write(w, r, err)
		return w.Code
	}
	if status := answer(errors.New("interrupted")); status != 500 || logs.Len() != 1 {
		t.Errorf("a failure: %d, and %d lines", status, logs.Len())
	}
	cancel()
	if status := answer(errors.New("interrupted")); status != 400 || logs.Len() != 1 {
		t.Errorf("a caller who has gone: %d, and %d lines", status, logs.Len())
	}
	if status := answer(LedgerUnavailable()); status != 503 {
		t.Errorf("without the ledger: %d", status)
	}
}
