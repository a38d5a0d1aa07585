package inflight_test

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store/inflight"
)

// long ago: nothing that was used before is forgotten.
var long = time.Unix(1, 0)

func TestARateLetsABurstThroughAndRefusesWhatIsBeyond(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		rate := inflight.Rate{N: 3, Burst: 5, Per: time.Hour}
		for i := range 5 {
			c, err := s.Charge(t.Context(), "ci", rate, long)
			check(t, err)
			if !c.Allowed || c.Remaining != 4-i || c.Retry != 0 || c.Reset <= 0 {
				t.Fatalf("call %d: %+v", i, c)
			}
		}
		c, err := s.Charge(t.Context(), "ci", rate, long)
		check(t, err)
		// 3 an hour: the next in 20 minutes, all 5 in 100.
		if c.Allowed || c.Remaining != 0 || c.Retry < 19*time.Minute || c.Retry > 20*time.Minute || c.Reset > 100*time.Minute {
			t.Errorf("beyond the burst: %+v", c)
		}
		if c, err := s.Charge(t.Context(), "other", rate, long); err != nil || !c.Allowed {
			t.Errorf("another bucket: %+v, %v", c, err)
		}
	})
}

func TestAfterRedisWasEmptiedARateStartsUsedUp(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		rate := inflight.Rate{N: 2, Burst: 4, Per: time.Second} // refilled whole in 2 s, by one in 0.5 s
		since := time.Now()
		c, err := s.Charge(t.Context(), "ci", rate, since)
		check(t, err)
		if c.Allowed || c.Retry <= 0 || c.Retry > 500*time.Millisecond {
			t.Fatalf("the first call: %+v", c)
		}
		time.Sleep(c.Retry)
		// One was refilled; that Redis was emptied counts once.
		if c, err = s.Charge(t.Context(), "ci", rate, since); err != nil || !c.Allowed {
			t.Errorf("after %v: %+v, %v", c.Retry, c, err)
		}
	})
}

func TestWhereRedissClockWasSetBackARateIsUsedUpAndNoMore(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		// A bucket that is used up for an hour, as one of a minute is by a clock
		// that is set back by an hour.
		hour := inflight.Rate{N: 1, Burst: 1, Per: time.Hour}
		if c, err := s.Charge(t.Context(), "ci", hour, long); err != nil || !c.Allowed {
			t.Fatalf("the first call: %+v, %v", c, err)
		}
		minute := inflight.Rate{N: 2, Burst: 2, Per: time.Minute}
		c, err := s.Charge(t.Context(), "ci", minute, long)
		check(t, err)
		if c.Allowed || c.Retry > 30*time.Second || c.Reset > time.Minute {
			t.Errorf("%+v", c)
		}
		if c, err = s.Charge(t.Context(), "ci", minute, long); err != nil || c.Allowed || c.Retry > 30*time.Second {
			t.Errorf("the next: %+v, %v", c, err)
		}
	})
}

func TestASetTakesAsManyAsItMayHowManyAskAtOnce(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		var taken atomic.Int64
		var all sync.WaitGroup
		for i := range 50 {
			all.Go(func() {
				ok, err := s.Take(t.Context(), "live", string(rune('A'+i)), 10, time.Minute)
				if err != nil {
					t.Error(err)
				}
				if ok {
					taken.Add(1)
				}
			})
		}
		all.Wait()
		if taken.Load() != 10 {
			t.Fatalf("%d took one of 10 places", taken.Load())
		}
	})
}

func TestAPlaceIsFreedHeldAndEndsByItself(t *testing.T) {
	both(t, func(t *testing.T, s *inflight.Store) {
		ctx := t.Context()
		taken := func(member string, lease time.Duration) bool {
			t.Helper()
			ok, err := s.Take(ctx, "live", member, 2, lease)
			check(t, err)
			return ok
		}
		if !taken("a", time.Minute) || !taken("b", 100*time.Millisecond) || taken("c", time.Minute) || !taken("a", time.Minute) {
			t.Fatal("two places are not two")
		}
		for end := time.Now().Add(5 * time.Second); !taken("c", time.Minute); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the lease never ended")
			}
		}
		check(t, s.Free(ctx, map[string][]string{"live": {"a", "none"}, "none": {"a"}}))
		if !taken("d", time.Minute) || taken("e", time.Minute) {
			t.Error("a freed place cannot be taken, or more than that")
		}
		// What is held is there whatever the limit says.
		many := make([]string, 1200)
		for i := range many {
			many[i] = "m" + string(rune('0'+i))
		}
		check(t, s.Hold(ctx, "live", append(slices.Clone(many), "d"), time.Minute))
		if !taken("m0", time.Minute) || taken("e", time.Minute) {
			t.Error("what is held is not there, or does not count")
		}
	})
}
