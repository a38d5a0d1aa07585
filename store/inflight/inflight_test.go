package inflight_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func open(t *testing.T, url string) *inflight.Store {
	s, err := inflight.Open(inflight.Options{URL: url})
	check(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// both runs a test against a real redis-server and the embedded one.
func both(t *testing.T, fn func(t *testing.T, s *inflight.Store)) {
	t.Run("redis", func(t *testing.T) { fn(t, open(t, redistest.Start(t).URL())) })
	t.Run("embedded", func(t *testing.T) { fn(t, open(t, "")) })
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func request(id string, expires time.Time) inflight.Request {
	return inflight.Request{ID: id, Orchestrator: "demo", Run: "r", Step: "s", Scope: "vault:demo-read", Status: "issued", Expires: expires}
}

func TestAStepHoldsItsLiveCredentialsAndNotWhatWasClosed(t *testing.T) {
	s := open(t, redistest.Start(t).URL())
	ctx, now := t.Context(), time.Now()
	check(t, s.Put(ctx, request("req_b", now.Add(time.Second))))
	check(t, s.Put(ctx, request("req_a", now.Add(time.Hour))))
	closed := request("req_a", time.Time{})
	closed.Status = "closed"
	check(t, s.Put(ctx, closed))
	ids, err := s.Step(ctx, "demo", "r", "s")
	check(t, err)
	if !slices.Equal(ids, []string{"req_b"}) {
		t.Fatalf("step: %v", ids)
	}
}

func TestWhereARequestStandsIsKept(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		ctx := t.Context()
		closed := request("req_a", time.Time{})
		closed.Status = "closed"
		check(t, s.Put(ctx, closed))
		r, err := s.Request(ctx, "req_a")
		check(t, err)
		if r == nil || r.Status != "closed" || r.Orchestrator != "demo" {
			t.Fatalf("status: %+v", r)
		}
		if r, err := s.Request(ctx, "req_unknown"); r != nil || err != nil {
			t.Fatalf("an unknown request: %v, %v", r, err)
		}
	})
}

func TestAnEmptyRedisIsNoticedAndARebuiltOneIsNot(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		gen, err := s.Generation(t.Context())
		check(t, err)
		if gen != "" {
			t.Fatalf("a new Redis has generation %q", gen)
		}
		var live []inflight.Request
		for _, id := range []string{"req_1", "req_2"} {
			live = append(live, request(id, time.Now()))
		}
		check(t, s.Rebuild(t.Context(), "g1", live))
		gen, err = s.Generation(t.Context())
		check(t, err)
		ids, _ := s.Step(t.Context(), "demo", "r", "s")
		if gen != "g1" || len(ids) != 2 {
			t.Fatalf("generation %q, live %v", gen, ids)
		}
	})
}

func TestAClaimIsTakenOnceUntilItEnds(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		ctx := t.Context()
		first, err := s.Claim(ctx, "x", 300*time.Millisecond)
		check(t, err)
		second, err := s.Claim(ctx, "x", time.Minute)
		check(t, err)
		if !first || second {
			t.Fatalf("claims: %v, %v", first, second)
		}
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if ok, err := s.Claim(ctx, "x", time.Minute); err == nil && ok {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the claim never ended")
			}
		}
		check(t, s.Release(ctx, "x"))
		if ok, _ := s.Claim(ctx, "x", time.Minute); !ok {
			t.Fatal("a claim that was given back cannot be taken")
		}
	})
}

func TestAGoneRedisIsUnavailableAndComesBackEmpty(t *testing.T) {
	srv := redistest.Start(t)
	s, err := inflight.Open(inflight.Options{URL: srv.URL(), Timeout: 200 * time.Millisecond})
	check(t, err)
	defer func() { _ = s.Close() }()
	check(t, s.Rebuild(t.Context(), "g1", nil))
	srv.Stop()
	ctx := t.Context()
	_, e1 := s.Generation(ctx)
	_, e2 := s.Request(ctx, "x")
	_, e3 := s.Claim(ctx, "x", time.Second)
	_, e4 := s.Step(ctx, "demo", "r", "s")
	for i, err := range []error{e1, e2, e3, e4, s.Ping(ctx), s.Put(ctx, request("x", time.Now()))} {
		if !errors.Is(err, inflight.ErrUnavailable) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	srv.Run()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		gen, err := s.Generation(ctx)
		if err == nil {
			if gen != "" {
				t.Fatalf("generation %q", gen)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestAnErrorNeverNamesThePasswordOfTheURL(t *testing.T) {
	_, err := inflight.Open(inflight.Options{URL: "redis://u:planted-password@%zz"})
	if err == nil || strings.Contains(err.Error(), "planted-password") {
		t.Fatalf("error: %v", err)
	}
	s, err := inflight.Open(inflight.Options{URL: "redis://u:planted-password@127.0.0.1:1", Timeout: 100 * time.Millisecond})
	check(t, err)
	defer func() { _ = s.Close() }()
	if err := s.Ping(context.Background()); err == nil || strings.Contains(err.Error(), "planted-password") {
		t.Fatalf("error: %v", err)
	}
}

func TestWhichSessionIsCutIsToldForAWhile(t *testing.T) {
	s := open(t, redistest.Start(t).URL())
	check(t, s.Cut(t.Context(), "req_1 intent-1 requested", time.Now().Add(time.Minute)))
	check(t, s.Cut(t.Context(), "req_2 intent-2 requested", time.Now().Add(-time.Minute)))
	told, err := s.Cuts(t.Context())
	check(t, err)
	if len(told) != 1 || told[0] != "req_1 intent-1 requested" {
		t.Errorf("%q", told)
	}
}
