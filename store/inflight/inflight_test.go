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

func open(t *testing.T, o inflight.Options) *inflight.Store {
	s, err := inflight.Open(o)
	check(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// start runs a redis-server in which all that the tests do is done by the ACL
// user that the documentation names.
func start(t *testing.T) (*redistest.Server, inflight.Options) {
	srv := redistest.StartACL(t, "broker", "planted-password", inflight.ACLRules(inflight.DefaultPrefix))
	return srv, inflight.Options{URL: "redis://broker:planted-password@" + srv.Addr()}
}

// both runs a test against a real redis-server and the embedded one.
func both(t *testing.T, fn func(t *testing.T, s *inflight.Store)) {
	t.Run("redis", func(t *testing.T) { _, o := start(t); fn(t, open(t, o)) })
	t.Run("embedded", func(t *testing.T) { fn(t, open(t, inflight.Options{})) })
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
	_, o := start(t)
	s := open(t, o)
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
		since, err := s.Since(t.Context())
		check(t, err)
		if !since.IsZero() {
			t.Fatalf("a new Redis holds what was written since %v", since)
		}
		var live []inflight.Request
		for _, id := range []string{"req_1", "req_2"} {
			live = append(live, request(id, time.Now()))
		}
		before := time.Now()
		check(t, s.Rebuild(t.Context(), live))
		since, err = s.Since(t.Context())
		check(t, err)
		ids, _ := s.Step(t.Context(), "demo", "r", "s")
		if since.Before(before.Truncate(time.Millisecond)) || len(ids) != 2 {
			t.Fatalf("since %v, live %v", since, ids)
		}
		// Another broker that starts changes nothing: it was not emptied.
		check(t, s.Rebuild(t.Context(), live))
		if again, err := s.Since(t.Context()); err != nil || !again.Equal(since) {
			t.Errorf("since %v, then %v, %v", since, again, err)
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
	srv, o := start(t)
	o.Timeout = 200 * time.Millisecond
	s := open(t, o)
	check(t, s.Rebuild(t.Context(), nil))
	srv.Stop()
	ctx := t.Context()
	_, e1 := s.Since(ctx)
	_, e2 := s.Request(ctx, "x")
	_, e3 := s.Claim(ctx, "x", time.Second)
	_, e4 := s.Step(ctx, "demo", "r", "s")
	_, e5 := s.Take(ctx, "x", "y", 1, time.Second)
	_, e6 := s.Charge(ctx, "x", inflight.Rate{N: 1, Burst: 1, Per: time.Second}, time.Time{})
	for i, err := range []error{e1, e2, e3, e4, e5, e6, s.Hold(ctx, "x", []string{"y"}, time.Second), s.Free(ctx, map[string][]string{"x": {"y"}}), s.Ping(ctx), s.Put(ctx, request("x", time.Now()))} {
		if !errors.Is(err, inflight.ErrUnavailable) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	srv.Run()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		since, err := s.Since(ctx)
		if err == nil {
			if !since.IsZero() {
				t.Fatalf("since %v", since)
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
	_, o := start(t)
	s := open(t, o)
	check(t, s.Cut(t.Context(), "req_1 intent-1 requested", time.Now().Add(time.Minute)))
	check(t, s.Cut(t.Context(), "req_2 intent-2 requested", time.Now().Add(-time.Minute)))
	told, err := s.Cuts(t.Context())
	check(t, err)
	if len(told) != 1 || told[0] != "req_1 intent-1 requested" {
		t.Errorf("%q", told)
	}
}
