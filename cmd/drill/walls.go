package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/redis/go-redis/v9"

	countersign "github.com/countersign-dev/countersign/api"
	"github.com/countersign-dev/countersign/store"
)

// servers are where each machine listens.
var servers = map[string]string{
	"recorder": "8788", "recorder-1": "8788", "recorder-2": "8788", "witness": "8790", "redis": "6379", "vault": "8200",
	"ledger": "5432", "orders": "5432", "web": "80", "broker-1": "8787", "broker-2": "8787", "broker-3": "8787",
}

// reachable is which of servers a machine may reach; those that are not named here
// are to reach nothing but what h.net opens for them.
var reachable = map[string][]string{
	"orchestrator": {"broker-1", "broker-2", "broker-3"},
	"steps":        {"broker-1", "broker-2", "vault", "orders"},
	"broker-1":     {"recorder", "redis", "vault", "orders", "web"},
	"broker-3":     {"recorder", "redis", "vault"},
	"redis":        {},
	"vault":        {"orders"},
	"orders":       {},
	"web":          {},
}

// checkWalls shows what separates the trust domains, before there is any load: no
// orchestrator's token, no place in the orchestrators' network and no Redis user
// gets at the ledger.
func (d *drill) checkWalls(ctx context.Context) error {
	d.checkRoutes(ctx)
	before, err := d.h.readRecord(ctx)
	if err != nil {
		return err
	}
	if err := d.checkTokens(ctx); err != nil {
		return err
	}
	if err := d.checkRedis(ctx); err != nil {
		return err
	}
	after, err := d.h.readRecord(ctx)
	if err != nil {
		return err
	}
	refused := 0
	for i, e := range after.entries[len(before.entries):] {
		if refused++; e.Type != store.AccessRefused {
			d.finding("what was tried with tokens of orchestrators and of Redis left entry %d on record: %s", len(before.entries)+i, e.Type)
		}
	}
	d.fact("%d of the refusals are on record, and nothing else of it", refused)
	return nil
}

// checkRoutes tries to connect from everywhere to everything.
func (d *drill) checkRoutes(ctx context.Context) {
	try := func(dial func(context.Context, string, string) (net.Conn, error), to string) error {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		conn, err := dial(ctx, "tcp", d.h.net.nodes[to].ip+":"+servers[to])
		if err == nil {
			conn.Close()
		}
		return err
	}
	open, shut := 0, 0
	for to := range servers {
		// From the console all answer, so that silence elsewhere is the walls'.
		if err := until(ctx, 10*time.Second, to+" answers the console", func() error { return try((&net.Dialer{}).DialContext, to) }); err != nil {
			d.finding("%v", err)
		}
		for from, may := range reachable {
			if from == to {
				continue
			}
			allowed := false
			for _, m := range may {
				allowed = allowed || m == to
			}
			if !allowed {
				if err := try(d.h.net.nodes[from].dial, to); err == nil {
					d.finding("%s can connect to %s", from, to)
				}
				shut++
				continue
			}
			if err := until(ctx, 10*time.Second, from+" reaches "+to, func() error { return try(d.h.net.nodes[from].dial, to) }); err != nil {
				d.finding("%v", err)
			}
			open++
		}
	}
	d.fact("%d ways from one trust domain to another are open, as drawn, and %d are shut", open, shut)
}

// ledgerSide is what orchestrators have no way to.
var ledgerSide = []string{"recorder", "recorder-1", "recorder-2", "ledger", "redis", "vault"}

// checkTokens gives the orchestrators' machine a way to everything, which none has,
// and tries every token there at every call of the recorder that is not public, at
// the ledger's PostgreSQL, at Redis and at Vault.
func (d *drill) checkTokens(ctx context.Context) (err error) {
	if err := d.h.net.open("orchestrator", ledgerSide...); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.h.net.shut("orchestrator", ledgerSide...)) }()
	secrets := append([]named{{"the broker's password at Redis", d.h.redisPassword}}, d.h.orchestrators...)
	calls, err := guarded()
	if err != nil {
		return err
	}
	from := d.h.net.nodes["orchestrator"]
	c := &http.Client{Timeout: callTimeout, Transport: &http.Transport{DialContext: from.dial, ForceAttemptHTTP2: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer c.CloseIdleConnections()
	tries := 0
	for _, s := range secrets {
		for _, call := range calls {
			status, err := d.call(ctx, c, call[0], d.h.recorderURL()+call[1], "Authorization", "Bearer "+s.token)
			if err != nil {
				return fmt.Errorf("%s %s: %w", call[0], call[1], err)
			}
			if status != http.StatusUnauthorized && status != http.StatusForbidden {
				d.finding("%s %s of the recorder answers %d to %s", call[0], call[1], status, s.name)
			}
			tries++
		}
		for _, user := range []string{"recorder", "owner", "postgres"} {
			if conn, err := from.connect(ctx, d.h.net.nodes["ledger"].host()+":5432", user, s.token, "ledger"); sqlstate(err) != "28P01" { // invalid_password
				d.finding("PostgreSQL of the ledger answers %v to %s as %s", err, s.name, user)
				if err == nil {
					_ = conn.Close(ctx)
				}
			}
			tries++
		}
		status, err := d.call(ctx, c, http.MethodGet, "https://"+d.h.net.nodes["vault"].host()+":8200/v1/auth/token/lookup-self", "X-Vault-Token", s.token)
		if err != nil {
			return err
		}
		if status != http.StatusForbidden {
			d.finding("Vault answers %d to %s", status, s.name)
		}
		tries++
		if s.token == d.h.redisPassword {
			continue
		}
		for _, user := range []string{"broker", "default"} {
			r := d.h.redis(user, s.token, from.dial)
			err := r.Ping(ctx).Err()
			_ = r.Close()
			if err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
				d.finding("Redis answers %v to %s as %s", err, s.name, user)
			}
			tries++
		}
	}
	d.fact("%d tries with %d secrets, from the orchestrators' machine with a way granted to recorders, ledger, Redis and Vault: all refused", tries, len(secrets))
	return nil
}

func (d *drill) call(ctx context.Context, c *http.Client, method, url, header, value string) (int, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader("{}"))
	if err != nil {
		return 0, err
	}
	r.Header.Set(header, value)
	r.Header.Set("Accept", "application/json")
	res, err := c.Do(r)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// guarded are the recorder's calls that want somebody: method and path, by the
// description of the API that it serves.
func guarded() (calls [][2]string, err error) {
	var doc struct {
		Paths map[string]map[string]any `yaml:"paths"`
	}
	if err := yaml.Unmarshal(countersign.OpenAPI, &doc); err != nil {
		return nil, err
	}
	fill := strings.NewReplacer("{id}", "apr_0", "{index}", "0", "{run}", "run-0", "{step}", "step-0", "{person}", "p", "{intent}", store.NewID(), "{level}", "0", "{n}", "000")
	for path, methods := range doc.Paths {
		for method, x := range methods {
			op, ok := x.(map[string]any)
			if !ok { // parameters
				continue
			}
			tags, _ := op["tags"].([]any)
			security, said := op["security"].([]any)
			if len(tags) == 0 || tags[0] == "steps" || tags[0] == "public" || said && len(security) == 0 {
				continue
			}
			calls = append(calls, [2]string{strings.ToUpper(method), fill.Replace(path)})
		}
	}
	if len(calls) < 20 {
		return nil, fmt.Errorf("the API's description has %d guarded calls of the recorder: it is not understood", len(calls))
	}
	return calls, nil
}

// checkRedis tries, as the brokers' user, what would lead Redis elsewhere, or to
// keys that are not the brokers'.
func (d *drill) checkRedis(ctx context.Context) error {
	r := d.h.redis("broker", d.h.redisPassword, d.h.net.nodes["broker-1"].dial)
	defer r.Close()
	if err := r.Set(ctx, "countersign:drill", "1", time.Second).Err(); err != nil {
		return fmt.Errorf("the brokers' user at Redis: %w", err)
	}
	ledger := d.h.net.nodes["ledger"].ip
	tries := [][]any{
		{"SET", "ledger", "1"}, {"GET", "ledger"}, {"KEYS", "*"}, {"FLUSHALL"}, {"CONFIG", "GET", "*"}, {"CONFIG", "SET", "dir", "/"},
		{"REPLICAOF", ledger, "5432"}, {"SLAVEOF", ledger, "5432"}, {"MIGRATE", ledger, "5432", "countersign:drill", "0", "100"},
		{"MODULE", "LIST"}, {"ACL", "LIST"}, {"SAVE"}, {"BGREWRITEAOF"}, {"SHUTDOWN"}, {"MONITOR"}, {"CLIENT", "LIST"},
		{"EVAL", "return redis.call('SET', 'ledger', '1')", "0"},
	}
	for _, t := range tries {
		err := r.Do(ctx, t...).Err()
		if err == nil || errors.Is(err, redis.Nil) || !strings.Contains(err.Error(), "NOPERM") && !strings.Contains(err.Error(), "can't access at least one of the keys") {
			d.finding("Redis answers %v to the brokers' user for %v", err, t)
		}
	}
	d.fact("the brokers' user at Redis is refused %d commands that lead elsewhere, and Redis itself has no way to anything", len(tries))
	return nil
}
