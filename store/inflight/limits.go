package inflight

import (
	"context"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
)

// Rate is how often something may happen: N times in Per on the whole, and up
// to Burst times at once.
type Rate struct {
	N, Burst int
	Per      time.Duration
}

// Charge is what became of one thing that happened.
type Charge struct {
	Allowed   bool
	Remaining int           // how often it may happen now
	Retry     time.Duration // until it may happen again; zero where it was allowed
	Reset     time.Duration // until all of Burst is there again
}

// prefixed has redis_rate keep its keys under our prefix, where the ACL user may
// reach them.
type prefixed struct {
	redis.UniversalClient
	prefix string
}

func (p prefixed) keys(keys []string) []string {
	out := make([]string, len(keys))
	for i, k := range keys {
		out[i] = p.prefix + k
	}
	return out
}

func (p prefixed) Eval(ctx context.Context, script string, keys []string, args ...any) *redis.Cmd {
	return p.UniversalClient.Eval(ctx, script, p.keys(keys), args...)
}

func (p prefixed) EvalSha(ctx context.Context, sha string, keys []string, args ...any) *redis.Cmd {
	return p.UniversalClient.EvalSha(ctx, sha, p.keys(keys), args...)
}

func (p prefixed) Del(ctx context.Context, keys ...string) *redis.IntCmd {
	return p.UniversalClient.Del(ctx, p.keys(keys)...)
}

// Charge counts one thing that happens against the rate of bucket (GCRA, by the
// server's clock). What is refused counts for nothing. since is what Since said:
// what was used before that is not known, so that a rate starts used up.
func (s *Store) Charge(ctx context.Context, bucket string, r Rate, since time.Time) (Charge, error) {
	var c Charge
	limit := redis_rate.Limit{Rate: r.N, Burst: r.Burst, Period: r.Per}
	err := s.call(ctx, "charge a rate", func(ctx context.Context) error {
		// For as long as a bucket that was used up then would take to fill: a full
		// one was lost with what Redis held, and is emptied.
		full := r.Per * time.Duration(r.Burst) / time.Duration(r.N)
		if time.Since(since) < full {
			if _, err := s.rates.AllowN(ctx, bucket, limit, r.Burst); err != nil {
				return err
			}
		}
		x, err := s.rates.Allow(ctx, bucket, limit)
		// More than all is used up where Redis's clock was set back, or the limit
		// made smaller. As much as there is, is.
		if err == nil && x.Allowed == 0 && x.ResetAfter > full+time.Second {
			if err = s.rates.Reset(ctx, bucket); err == nil {
				_, err = s.rates.AllowN(ctx, bucket, limit, r.Burst)
			}
			if err == nil {
				x, err = s.rates.Allow(ctx, bucket, limit)
			}
		}
		if err != nil {
			return err
		}
		c = Charge{Allowed: x.Allowed > 0, Remaining: x.Remaining, Retry: max(x.RetryAfter, 0), Reset: max(x.ResetAfter, 0)}
		return nil
	})
	return c, err
}

// Members of a set are leases: each ends by itself unless it is held again, so
// that none is leaked by a crash.
var (
	// take: KEYS the set; ARGV most, lease in ms, member. 1: it is held.
	take = redis.NewScript(`
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local has = redis.call('ZSCORE', KEYS[1], ARGV[3])
if not has and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
if not has or tonumber(has) < now + ARGV[2] then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[3])
end
redis.call('PEXPIRE', KEYS[1], 86400000)
return 1
`)
	// hold: KEYS the set; ARGV lease in ms, members.
	hold = redis.NewScript(`
local t = redis.call('TIME')
local to = string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], to, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], 86400000)
return 1
`)
)

// Take has member be one of set for as long as lease, unless it has most
// already. Who is one of them stays it.
func (s *Store) Take(ctx context.Context, set, member string, most int, lease time.Duration) (bool, error) {
	var ok bool
	err := s.call(ctx, "take a place", func(ctx context.Context) (err error) {
		ok, err = take.Run(ctx, s.c, []string{s.key("set", set)}, most, lease.Milliseconds(), member).Bool()
		return err
	})
	return ok, err
}

// Hold has members be of set for as long as lease from now, however many there
// are.
func (s *Store) Hold(ctx context.Context, set string, members []string, lease time.Duration) error {
	for len(members) > 0 {
		n := min(len(members), 500)
		args := []any{lease.Milliseconds()}
		for _, m := range members[:n] {
			args = append(args, m)
		}
		if err := s.call(ctx, "hold places", func(ctx context.Context) error {
			return hold.Run(ctx, s.c, []string{s.key("set", set)}, args...).Err()
		}); err != nil {
			return err
		}
		members = members[n:]
	}
	return nil
}

// Free takes members out of their sets, by set.
func (s *Store) Free(ctx context.Context, members map[string][]string) error {
	if len(members) == 0 {
		return nil
	}
	return s.call(ctx, "free places", func(ctx context.Context) error {
		p := s.c.Pipeline()
		for set, list := range members {
			of := make([]any, len(list))
			for i, m := range list {
				of[i] = m
			}
			p.ZRem(ctx, s.key("set", set), of...)
		}
		_, err := p.Exec(ctx)
		return err
	})
}
