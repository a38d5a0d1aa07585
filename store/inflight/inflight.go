// Package inflight shares between brokers what is under way: where a request
// stands, which credentials a step has, who is ending one. It makes the broker
// quick and never right: the ledger alone decides what may be minted and what is
// live, and what is live is written here again from it when Redis comes back
// empty. No secret, no reason and no subject is ever written to it.
package inflight

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-json-experiment/json"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// ErrUnavailable is wrapped by every failure to reach Redis. Whoever meets it
// before an intent is written issues nothing.
var ErrUnavailable = errors.New("state unavailable")

// Options say where the state is kept.
type Options struct {
	// URL of the Redis server (redis://user:password@host:port/db, rediss://).
	// Empty: a Redis embedded in this process, for one broker alone.
	URL string
	// Prefix is put before every key, so that brokers and recorder may share a
	// server under ACL users of their own. "countersign:" by default.
	Prefix string
	// Timeout bounds each call; 1 s by default.
	Timeout time.Duration
	// StatusLife is how long the status of a request that is no longer open is
	// kept; by default 24 h, and 1 h in this process's own memory.
	StatusLife time.Duration
}

// Store is a connection to Redis. It is safe for concurrent use.
type Store struct {
	c       *redis.Client
	prefix  string
	timeout time.Duration
	life    time.Duration
	mini    *miniredis.Miniredis   // nil: a real server
	built   atomic.Pointer[string] // the generation that Rebuild set last
	puts    chan *putting
	asks    chan chan generation
	stop    chan struct{}
	done    sync.WaitGroup
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
		s.prefix = "countersign:"
	}
	if s.timeout <= 0 {
		s.timeout = time.Second
	}
	if s.life <= 0 {
		s.life = 24 * time.Hour
		if o.URL == "" {
			s.life = time.Hour
		}
	}
	opt := &redis.Options{}
	if o.URL == "" {
		s.mini = miniredis.NewMiniRedis()
		if err := s.mini.StartAddr("127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("start the embedded Redis: %w", err)
		}
		opt.Addr = s.mini.Addr()
		s.done.Go(s.driveClock)
	} else {
		var err error
		if opt, err = redis.ParseURL(o.URL); err != nil {
			return nil, errors.New("the Redis URL is not of the form redis://[user:password@]host:port[/db]") // err would quote the password
		}
	}
	opt.DialTimeout, opt.ReadTimeout, opt.WriteTimeout = s.timeout, s.timeout, s.timeout
	opt.ContextTimeoutEnabled = true
	opt.MaxRetries = 1
	opt.DialerRetries = 1 // a Redis that is down is to be known as down at once
	opt.DisableIdentity = true
	opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	s.c = redis.NewClient(opt)
	s.done.Go(s.putLoop)
	s.done.Go(s.askLoop)
	return s, nil
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
		return fmt.Errorf("%w: %s: %v", ErrUnavailable, doing, err)
	}
	return nil
}

// Ping reports whether Redis answers.
func (s *Store) Ping(ctx context.Context) error {
	return s.call(ctx, "ping", func(ctx context.Context) error { return s.c.Ping(ctx).Err() })
}

// Generation returns the marker that Rebuild set, or an empty string where
// Redis holds none: it was emptied, or is new, and must be rebuilt. Those who
// ask while a round trip to Redis is under way share the next one, so that each
// answer is younger than its question.
//
// The embedded Redis is as much there as this process, and loses nothing while
// it lives: its marker is known without asking.
func (s *Store) Generation(ctx context.Context) (string, error) {
	if built := s.built.Load(); s.mini != nil && built != nil {
		return *built, nil
	}
	answer := make(chan generation, 1)
	select {
	case s.asks <- answer:
	case <-s.stop:
		return "", fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return "", fmt.Errorf("%w: read the generation: %v", ErrUnavailable, ctx.Err())
	}
	select {
	case g := <-answer:
		return g.marker, g.err
	case <-s.stop:
		return "", fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return "", fmt.Errorf("%w: read the generation: %v", ErrUnavailable, ctx.Err())
	}
}

type generation struct {
	marker string
	err    error
}

// askLoop answers Generation.
func (s *Store) askLoop() {
	for {
		waiting, ok := drain(s.asks, s.stop)
		if !ok {
			return
		}
		var g generation
		g.err = s.call(context.Background(), "read the generation", func(ctx context.Context) (err error) {
			if g.marker, err = s.c.Get(ctx, s.key("generation")).Result(); errors.Is(err, redis.Nil) {
				g.marker, err = "", nil
			}
			return err
		})
		for _, w := range waiting {
			w <- g
		}
	}
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
// and then the marker generation. A crash before the marker leaves Redis
// found empty, and it is rebuilt again.
func (s *Store) Rebuild(ctx context.Context, generation string, live []Request) error {
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
	err := s.call(ctx, "set the generation", func(ctx context.Context) error {
		return s.c.Set(ctx, s.key("generation"), generation, 0).Err()
	})
	if err == nil {
		s.built.Store(&generation)
	}
	return err
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
