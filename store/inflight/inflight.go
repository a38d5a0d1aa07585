// Package inflight shares between brokers what is under way: where a request
// stands, which credentials a step has, who is ending one, how much of its
// limits a caller has used. It makes the broker quick and never right: the
// ledger alone decides what may be minted and what is live, and what is live is
// written here again from it when Redis comes back empty. No secret, no reason
// and no subject is ever written to it.
//
// Each command is about one key, so that a Redis Cluster takes them all.
package inflight

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// ErrUnavailable is wrapped by every failure to reach Redis. Whoever meets it
// before an intent is written issues nothing.
var ErrUnavailable = errors.New("state unavailable")

// Options say where the state is kept: in the server of URL, in those of Addrs,
// or, where both are empty, in a Redis embedded in this process, for one broker
// alone.
type Options struct {
	// URL of one server (redis://user:password@host:port/db, rediss://).
	URL string
	// Addrs (host:port) are one server, some nodes of a Redis Cluster, or the
	// Sentinels that know where SentinelMaster is.
	Addrs          []string
	Cluster        bool
	SentinelMaster string
	// Credentials are asked, for each new connection to a server, who it is for.
	// Nil: the user in URL, or nobody.
	Credentials func() (username, password string)
	// SentinelUsername and SentinelPassword are for the Sentinels themselves.
	SentinelUsername, SentinelPassword string
	DB                                 int
	// TLS says, for each new connection, how servers and Sentinels are spoken to.
	// Nil: in the clear, but for a URL that begins with rediss.
	TLS func() *tls.Config
	// Prefix is put before every key, so that several deployments may share a
	// server under ACL users of their own. DefaultPrefix where it is empty.
	Prefix string
	// Timeout bounds each call; 1 s by default.
	Timeout time.Duration
	// StatusLife is how long the status of a request that is no longer open is
	// kept; by default 24 h, and 1 h in this process's own memory.
	StatusLife time.Duration
}

// DefaultPrefix is what every key begins with unless Options say otherwise.
const DefaultPrefix = "countersign:"

// ACLRules are the rules of the Redis ACL user that a broker needs: these
// commands, on keys that begin with prefix, and nothing else. For a server's
// ACL file or ACL SETUSER, after the user's name and password. A Cluster's nodes
// need ClusterACLRules beside them.
func ACLRules(prefix string) string {
	return "resetkeys ~" + prefix + "* resetchannels -@all" +
		" +ping +select +get +set +del +sadd +srem +smembers +pexpire +expireat" +
		" +zadd +zrem +zcard +zscore +zremrangebyscore +zrange +eval +evalsha +time"
}

// ClusterACLRules are what a client of a Redis Cluster asks of its nodes
// besides: where which keys are.
const ClusterACLRules = "+cluster|slots +cluster|shards +command"

// Store is a connection to Redis. It is safe for concurrent use.
type Store struct {
	c       redis.UniversalClient
	rates   *redis_rate.Limiter
	prefix  string
	timeout time.Duration
	life    time.Duration
	mini    *miniredis.Miniredis // nil: a real server
	built   atomic.Int64         // of the embedded server: since when it holds what was written, in ms; 0: it does not
	puts    chan *putting
	asks    chan chan generation
	stop    chan struct{}
	done    sync.WaitGroup
	failed  atomic.Int64 // calls
}

// Request is what is kept of a request: enough to answer where it stands and
// to find a step's credentials.
type Request struct {
	ID           string    `json:"id"`
	Orchestrator string    `json:"orchestrator"`
	Run          string    `json:"run"`
	Step         string    `json:"step"`
	Scope        string    `json:"scope"`
	Status       string    `json:"status"`
	Expires      time.Time `json:"expires,omitzero"` // of the live credential
}

// go-redis prints what it also returns; here it is returned alone.
func init() { redis.SetLogger(silent{}) }

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// Open connects to Redis, or starts the embedded one. It does not fail where
// the server cannot be reached: calls do, until it can.
func Open(o Options) (*Store, error) {
	s := &Store{prefix: o.Prefix, timeout: o.Timeout, life: o.StatusLife, stop: make(chan struct{}), puts: make(chan *putting, 256), asks: make(chan chan generation, 256)}
	if s.prefix == "" {
		s.prefix = DefaultPrefix
	}
	if s.timeout <= 0 {
		s.timeout = time.Second
	}
	if s.life <= 0 {
		s.life = 24 * time.Hour
		if o.URL == "" && len(o.Addrs) == 0 {
			s.life = time.Hour
		}
	}
	if o.URL == "" && len(o.Addrs) == 0 {
		s.mini = miniredis.NewMiniRedis()
		if err := s.mini.StartAddr("127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("start the embedded Redis: %w", err)
		}
		o.Addrs = []string{s.mini.Addr()}
		s.done.Go(s.driveClock)
	}
	var err error
	if s.c, err = s.connect(o); err != nil {
		return nil, err
	}
	s.rates = redis_rate.NewLimiter(prefixed{s.c, s.prefix})
	s.done.Go(s.putLoop)
	s.done.Go(s.askLoop)
	return s, nil
}

// connect returns the client for what o names. It does not turn to the server.
func (s *Store) connect(o Options) (redis.UniversalClient, error) {
	u := &redis.UniversalOptions{
		Addrs: o.Addrs, MasterName: o.SentinelMaster, IsClusterMode: o.Cluster, DB: o.DB,
		CredentialsProvider: o.Credentials, SentinelUsername: o.SentinelUsername, SentinelPassword: o.SentinelPassword,
		DialTimeout: s.timeout, ReadTimeout: s.timeout, WriteTimeout: s.timeout, ContextTimeoutEnabled: true, MaxRetries: 1,
		DialerRetries:            1, // a Redis that is down is to be known as down at once
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	if o.TLS != nil {
		// Servers, a Cluster's nodes and Sentinels are all dialled by this.
		u.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			return redis.NewDialer(&redis.Options{DialTimeout: s.timeout, TLSConfig: o.TLS()})(ctx, network, addr)
		}
	}
	switch {
	case o.URL == "" && len(o.Addrs) > 1 && !o.Cluster && o.SentinelMaster == "":
		return nil, errors.New("several Redis addresses are a Cluster's, or Sentinels': say which")
	case o.URL == "":
		return redis.NewUniversalClient(u), nil
	}
	opt, err := redis.ParseURL(o.URL)
	if err != nil {
		return nil, errors.New("the Redis URL is not of the form redis://[user:password@]host:port[/db]") // err would quote the password
	}
	if o.TLS != nil && opt.TLSConfig == nil {
		return nil, errors.New("the Redis URL begins with redis, not rediss, and keys for TLS are named")
	}
	opt.Dialer, opt.CredentialsProvider = u.Dialer, u.CredentialsProvider
	opt.DialTimeout, opt.ReadTimeout, opt.WriteTimeout = u.DialTimeout, u.ReadTimeout, u.WriteTimeout
	opt.ContextTimeoutEnabled, opt.MaxRetries, opt.DialerRetries = u.ContextTimeoutEnabled, u.MaxRetries, u.DialerRetries
	opt.DisableIdentity, opt.MaintNotificationsConfig = u.DisableIdentity, u.MaintNotificationsConfig
	return redis.NewClient(opt), nil
}

// driveClock moves the embedded Redis's clock: miniredis lets keys expire only
// when it is told that time has passed.
func (s *Store) driveClock() {
	// Each step costs a look at every key, and no key's life is that short.
	const step = time.Second
	t := time.NewTicker(step)
	defer t.Stop()
	last := time.Now()
	for {
		select {
		case <-s.stop:
			return
		case now := <-t.C:
			s.mini.FastForward(now.Sub(last))
			last = now
		}
	}
}

// Close ends the connection, and the embedded Redis with it.
func (s *Store) Close() error {
	close(s.stop)
	err := s.c.Close()
	s.done.Wait()
	if s.mini != nil {
		s.mini.Close()
	}
	return err
}

func (s *Store) key(parts ...string) string { return s.prefix + strings.Join(parts, ":") }

func (s *Store) call(ctx context.Context, doing string, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if err := fn(ctx); err != nil {
		s.failed.Add(1)
		return fmt.Errorf("%w: %s: %v", ErrUnavailable, doing, err)
	}
	return nil
}

// Failed is how many calls to Redis have failed.
func (s *Store) Failed() int64 { return s.failed.Load() }

// Ping reports whether Redis answers.
func (s *Store) Ping(ctx context.Context) error {
	return s.call(ctx, "ping", func(ctx context.Context) error { return s.c.Ping(ctx).Err() })
}

// Since returns when Redis was rebuilt last; the zero time where it was emptied
// since, or is new, and must be rebuilt. Those who ask while a round trip to Redis is under way share the next one, so that each
// answer is younger than its question.
//
// The embedded Redis is as much there as this process, and loses nothing while
// it lives: it is known without asking.
func (s *Store) Since(ctx context.Context) (time.Time, error) {
	if built := s.built.Load(); s.mini != nil && built != 0 {
		return time.UnixMilli(built), nil
	}
	answer := make(chan generation, 1)
	select {
	case s.asks <- answer:
	case <-s.stop:
		return time.Time{}, fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return time.Time{}, fmt.Errorf("%w: read since when it is: %v", ErrUnavailable, ctx.Err())
	}
	select {
	case g := <-answer:
		return g.since, g.err
	case <-s.stop:
		return time.Time{}, fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return time.Time{}, fmt.Errorf("%w: read since when it is: %v", ErrUnavailable, ctx.Err())
	}
}

type generation struct {
	since time.Time
	err   error
}

// askLoop answers Since.
func (s *Store) askLoop() {
	for {
		waiting, ok := drain(s.asks, s.stop)
		if !ok {
			return
		}
		var g generation
		g.err = s.call(context.Background(), "read since when it is", func(ctx context.Context) (err error) {
			g.since, err = s.since(ctx)
			return err
		})
		for _, w := range waiting {
			w <- g
		}
	}
}

func (s *Store) since(ctx context.Context) (time.Time, error) {
	marker, err := s.c.Get(ctx, s.key("generation")).Result()
	if errors.Is(err, redis.Nil) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	ms, err := strconv.ParseInt(marker, 10, 64)
	if err != nil {
		ms = 1 // an older version's, which was an ID
	}
	return time.UnixMilli(ms), nil
}

// drain waits for one item and takes with it all that have queued up. It is
// not ok once stop is closed.
func drain[T any](queue chan T, stop chan struct{}) (all []T, ok bool) {
	select {
	case x := <-queue:
		all = append(all, x)
	case <-stop:
		return nil, false
	}
	for len(all) < cap(queue) {
		select {
		case x := <-queue:
			all = append(all, x)
		default:
			return all, true
		}
	}
	return all, true
}

// Rebuild writes live, the requests with a live credential or an open intent,
// and then, where there is none, the marker of since when it holds them. A
// crash before the marker leaves Redis found empty, and it is rebuilt again.
func (s *Store) Rebuild(ctx context.Context, live []Request) error {
	for len(live) > 0 {
		n := min(len(live), 500)
		err := s.call(ctx, "rebuild", func(ctx context.Context) error {
			p := s.c.Pipeline()
			for _, r := range live[:n] {
				if err := s.put(ctx, p, r); err != nil {
					return err
				}
			}
			_, err := p.Exec(ctx)
			return err
		})
		if err != nil {
			return err
		}
		live = live[n:]
	}
	return s.call(ctx, "note since when it is", func(ctx context.Context) error {
		err := s.c.SetArgs(ctx, s.key("generation"), strconv.FormatInt(time.Now().UnixMilli(), 10), redis.SetArgs{Mode: "NX"}).Err()
		if err != nil && !errors.Is(err, redis.Nil) {
			return err
		}
		since, err := s.since(ctx)
		if err == nil && !since.IsZero() {
			s.built.Store(since.UnixMilli())
		}
		return err
	})
}

// Put notes where a request stands. A live credential (Expires set) joins its
// step's set; any other status takes it off. What is put while a round trip to
// Redis is under way shares the next one.
//
// A live credential in the embedded Redis is nobody's news: there is no other
// broker, and this one has it from its own append.
func (s *Store) Put(ctx context.Context, r Request) error {
	if s.mini != nil && !r.Expires.IsZero() {
		return nil
	}
	p := &putting{Request: r, done: make(chan error, 1)}
	select {
	case s.puts <- p:
	case <-s.stop:
		return fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("%w: note a request: %v", ErrUnavailable, ctx.Err())
	}
	select {
	case err := <-p.done:
		return err
	case <-s.stop:
		return fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("%w: note a request: %v", ErrUnavailable, ctx.Err())
	}
}

// putting is a Put on its way to Redis.
type putting struct {
	Request
	done chan error
}

// putLoop sends what was put, all that has come by then in one round trip.
func (s *Store) putLoop() {
	for {
		batch, ok := drain(s.puts, s.stop)
		if !ok {
			return
		}
		err := s.call(context.Background(), "note a request", func(ctx context.Context) error {
			pipe := s.c.Pipeline()
			for _, p := range batch {
				if err := s.put(ctx, pipe, p.Request); err != nil {
					return err
				}
			}
			_, err := pipe.Exec(ctx)
			return err
		})
		for _, p := range batch {
			p.done <- err
		}
	}
}

func (s *Store) put(ctx context.Context, p redis.Pipeliner, r Request) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	life, step := s.life, s.key("step", r.Orchestrator, r.Run, r.Step)
	if r.Expires.IsZero() {
		p.SRem(ctx, step, r.ID)
	} else {
		life += max(time.Until(r.Expires), 0)
		p.SAdd(ctx, step, r.ID)
		p.ExpireAt(ctx, step, time.Now().Add(life))
	}
	p.Set(ctx, s.key("request", r.ID), b, life)
	return nil
}

// Request returns what is kept of a request, or nil.
func (s *Store) Request(ctx context.Context, id string) (*Request, error) {
	var r *Request
	err := s.call(ctx, "read a request", func(ctx context.Context) error {
		b, err := s.c.Get(ctx, s.key("request", id)).Bytes()
		if errors.Is(err, redis.Nil) {
			return nil
		}
		if err != nil {
			return err
		}
		var v Request
		if err := json.Unmarshal(b, &v); err != nil || v.ID != id {
			return nil // not ours: as good as nothing
		}
		r = &v
		return nil
	})
	return r, err
}

// Step returns the requests of a step that were noted with a live credential.
func (s *Store) Step(ctx context.Context, orchestrator, run, step string) ([]string, error) {
	var ids []string
	err := s.call(ctx, "read a step", func(ctx context.Context) (err error) {
		ids, err = s.c.SMembers(ctx, s.key("step", orchestrator, run, step)).Result()
		return err
	})
	return ids, err
}

// Claim takes name for as long as life, and reports whether nobody else holds
// it. Two who both believe to hold a claim do the same work twice, no harm.
func (s *Store) Claim(ctx context.Context, name string, life time.Duration) (bool, error) {
	var ok bool
	err := s.call(ctx, "claim", func(ctx context.Context) error {
		err := s.c.SetArgs(ctx, s.key("claim", name), "1", redis.SetArgs{Mode: "NX", TTL: life}).Err()
		if errors.Is(err, redis.Nil) {
			return nil
		}
		ok = err == nil
		return err
	})
	return ok, err
}

// Claims is Claim for many names in one round trip: it reports of each whether
// nobody else holds it. There is nobody else beside an embedded Redis.
func (s *Store) Claims(ctx context.Context, names []string, life time.Duration) ([]bool, error) {
	mine := make([]bool, len(names))
	if s.mini != nil {
		for i := range mine {
			mine[i] = true
		}
		return mine, nil
	}
	err := s.call(ctx, "claim", func(ctx context.Context) error {
		p := s.c.Pipeline()
		answers := make([]*redis.StatusCmd, len(names))
		for i, name := range names {
			answers[i] = p.SetArgs(ctx, s.key("claim", name), "1", redis.SetArgs{Mode: "NX", TTL: life})
		}
		if _, err := p.Exec(ctx); err != nil && !errors.Is(err, redis.Nil) {
			return err
		}
		for i, a := range answers {
			err := a.Err()
			if mine[i] = err == nil; err != nil && !errors.Is(err, redis.Nil) {
				return err
			}
		}
		return nil
	})
	return mine, err
}

// Cut tells the other brokers which session is to end, until then. The
// embedded Redis has no other broker to tell.
func (s *Store) Cut(ctx context.Context, which string, until time.Time) error {
	if s.mini != nil {
		return nil
	}
	return s.call(ctx, "cut a session", func(ctx context.Context) error {
		p := s.c.Pipeline()
		p.ZRemRangeByScore(ctx, s.key("cut"), "-inf", strconv.FormatInt(time.Now().Unix(), 10))
		p.ZAdd(ctx, s.key("cut"), redis.Z{Score: float64(until.Unix() + 1), Member: which})
		_, err := p.Exec(ctx)
		return err
	})
}

// Cuts returns what Cut was told and is not over.
func (s *Store) Cuts(ctx context.Context) ([]string, error) {
	if s.mini != nil {
		return nil, nil
	}
	var told []string
	err := s.call(ctx, "read which sessions are cut", func(ctx context.Context) (err error) {
		told, err = s.c.ZRangeArgs(ctx, redis.ZRangeArgs{Key: s.key("cut"), ByScore: true, Start: strconv.FormatInt(time.Now().Unix(), 10), Stop: "+inf"}).Result()
		return err
	})
	return told, err
}

// Release gives a claim back before its time.
func (s *Store) Release(ctx context.Context, name string) error {
	return s.call(ctx, "release a claim", func(ctx context.Context) error {
		return s.c.Del(ctx, s.key("claim", name)).Err()
	})
}
