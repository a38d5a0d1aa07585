package inflight

import (
	"context"
	"crypto/rand"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Health is what a Redis server is like, for who configures one.
type Health struct {
	Refused   []string // commands that the user may not use on a Store's keys
	Unknown   bool     // the user may not ask for what follows (INFO)
	Eviction  string   // maxmemory_policy
	MaxMemory int64    // bytes, 0: no ceiling
	Used      int64    // bytes
}

// Examine tries each command that a Store uses, on keys that are gone within a
// second, and asks for the server's memory. It fails where Redis does not
// answer.
func (s *Store) Examine(ctx context.Context) (*Health, error) {
	if err := s.Ping(ctx); err != nil {
		return nil, err
	}
	h := &Health{}
	key := s.key("doctor", rand.Text())
	set, sorted := key+":set", key+":sorted"
	soon := time.Now().Add(time.Second)
	for _, x := range []struct {
		command string
		try     func(context.Context) error
	}{
		{"SET", func(ctx context.Context) error { return s.c.Set(ctx, key, "1", time.Second).Err() }},
		{"GET", func(ctx context.Context) error { return s.c.Get(ctx, key).Err() }},
		{"SADD", func(ctx context.Context) error { return s.c.SAdd(ctx, set, "1").Err() }},
		{"EXPIREAT", func(ctx context.Context) error { return s.c.ExpireAt(ctx, set, soon).Err() }},
		{"SMEMBERS", func(ctx context.Context) error { return s.c.SMembers(ctx, set).Err() }},
		{"SREM", func(ctx context.Context) error { return s.c.SRem(ctx, set, "1").Err() }},
		{"ZADD", func(ctx context.Context) error {
			return s.c.ZAdd(ctx, sorted, redis.Z{Score: 1, Member: "1"}).Err()
		}},
		{"ZRANGE", func(ctx context.Context) error {
			return s.c.ZRangeArgs(ctx, redis.ZRangeArgs{Key: sorted, ByScore: true, Start: "-inf", Stop: "+inf"}).Err()
		}},
		{"ZCARD", func(ctx context.Context) error { return s.c.ZCard(ctx, sorted).Err() }},
		{"ZSCORE", func(ctx context.Context) error { return s.c.ZScore(ctx, sorted, "1").Err() }},
		{"ZREM", func(ctx context.Context) error { return s.c.ZRem(ctx, sorted, "1").Err() }},
		{"PEXPIRE", func(ctx context.Context) error { return s.c.PExpire(ctx, sorted, time.Second).Err() }},
		{"EVAL", func(ctx context.Context) error { return s.c.Eval(ctx, "return 1", []string{key}).Err() }},
		{"EVALSHA", func(ctx context.Context) error {
			return s.c.EvalSha(ctx, "0000000000000000000000000000000000000000", []string{key}).Err()
		}},
		{"TIME", func(ctx context.Context) error { return s.c.Time(ctx).Err() }},
		{"ZREMRANGEBYSCORE", func(ctx context.Context) error { return s.c.ZRemRangeByScore(ctx, sorted, "-inf", "+inf").Err() }},
		{"DEL", func(ctx context.Context) error { return s.c.Del(ctx, key).Err() }},
	} {
		ctx, cancel := context.WithTimeout(ctx, s.timeout)
		err := x.try(ctx)
		cancel()
		// ACL (redis.io, "ACL"): "NOPERM User ... has no permissions to ..."
		if err != nil && strings.HasPrefix(err.Error(), "NOPERM") {
			h.Refused = append(h.Refused, x.command)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	info, err := s.c.Info(ctx, "memory").Result()
	if err != nil {
		h.Unknown = true
		return h, nil
	}
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch name {
		case "maxmemory":
			h.MaxMemory, _ = strconv.ParseInt(value, 10, 64)
		case "used_memory":
			h.Used, _ = strconv.ParseInt(value, 10, 64)
		case "maxmemory_policy":
			h.Eviction = value
		}
	}
	return h, nil
}
