package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
)

// sampleEvery is how often Vault and the target are asked what is alive.
const sampleEvery = 3 * time.Second

// life is how long something was seen alive, by the drill's own clock.
type life struct {
	request, intent string // of a token, as its metadata in Vault say
	first, last     time.Time
}

// eye asks Vault and the target's PostgreSQL themselves what is alive.
type eye struct {
	h *house

	mu       sync.Mutex
	tokens   map[string]*life // by accessor
	roles    map[string]*life // by name: those that could log in, or had a session
	together [][]string       // accessors of one request that were alive at once
	conn     *pgx.Conn        // to the target; nil: none
}

func newEye(h *house) *eye {
	return &eye{h: h, tokens: map[string]*life{}, roles: map[string]*life{}}
}

// watch samples until ctx ends. What does not answer is asked again later.
func (e *eye) watch(ctx context.Context) {
	for {
		_, _, _ = e.look(ctx)
		select {
		case <-time.After(sampleEvery):
		case <-ctx.Done():
			return
		}
	}
}

// look samples once: how many tokens of steps and how many roles are alive.
func (e *eye) look(ctx context.Context) (tokens, roles int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tokens, err1 := e.lookAtVault(ctx)
	roles, err2 := e.lookAtTarget(ctx)
	return tokens, roles, errors.Join(err1, err2)
}

func (e *eye) lookAtVault(ctx context.Context) (int, error) {
	now := time.Now()
	s, err := e.h.vault.Logical().ListWithContext(ctx, "auth/token/accessors")
	if err != nil || s == nil {
		return 0, errors.Join(err, errors.New("Vault lists no tokens"))
	}
	keys, _ := s.Data["keys"].([]any)
	byRequest := map[string][]string{}
	n := 0
	for _, k := range keys {
		accessor, _ := k.(string)
		e.mu.Lock()
		known := e.tokens[accessor]
		e.mu.Unlock()
		// What should be over is asked about once more: a list may tell of what is
		// being removed.
		if known == nil || known.request != "" && now.Sub(known.first) > askTTL {
			t, err := e.h.vault.Auth().Token().LookupAccessorWithContext(ctx, accessor)
			if err != nil {
				if gone(err) {
					continue
				}
				return 0, err
			}
			if known == nil {
				known = &life{first: now}
				if meta, ok := t.Data["meta"].(map[string]any); ok {
					known.request, _ = meta["request"].(string)
					known.intent, _ = meta["intent"].(string)
				}
				e.mu.Lock()
				e.tokens[accessor] = known
				e.mu.Unlock()
			}
		}
		if known.request == "" { // an operator's
			continue
		}
		n++
		e.mu.Lock()
		known.last = now
		e.mu.Unlock()
		byRequest[known.request] = append(byRequest[known.request], accessor)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, accessors := range byRequest {
		if len(accessors) > 1 {
			e.together = append(e.together, accessors)
		}
	}
	return n, nil
}

// gone says whether Vault answered that it does not know a token.
func gone(err error) bool {
	var r *api.ResponseError
	return errors.As(err, &r) && (r.StatusCode == http.StatusForbidden || r.StatusCode == http.StatusNotFound || r.StatusCode == http.StatusBadRequest)
}

func (e *eye) lookAtTarget(ctx context.Context) (int, error) {
	names, err := e.rolesAlive(ctx)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, name := range names {
		if e.roles[name] == nil {
			e.roles[name] = &life{first: now}
		}
		e.roles[name].last = now
	}
	return len(names), nil
}

// rolesAlive are the roles that Vault made and that can log in, or are logged in.
func (e *eye) rolesAlive(ctx context.Context) (names []string, err error) {
	e.mu.Lock()
	conn := e.conn
	e.conn = nil
	e.mu.Unlock()
	if conn == nil {
		if conn, err = pgx.Connect(ctx, e.h.dsn("orders", "postgres", e.h.superuser, "postgres")); err != nil {
			return nil, err
		}
	}
	rows, err := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%' AND
		(rolcanlogin AND coalesce(rolvaliduntil > clock_timestamp(), true) OR EXISTS (SELECT FROM pg_stat_activity WHERE usename = rolname))`)
	if err == nil {
		names, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		_ = conn.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn != nil {
		_ = e.conn.Close(context.WithoutCancel(ctx))
	}
	e.conn = conn
	return names, nil
}

// dead wants c to be dead, now, because of why: asked of Vault, or of the target,
// themselves. Where they do not answer now, the end of the drill will tell.
func (l *load) dead(c *issued, why string) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	switch c.secret.Kind {
	case "vault_token":
		t, err := l.h.vault.Clone()
		if err != nil {
			return
		}
		t.SetToken(c.secret.Token)
		if _, err := t.Auth().Token().LookupSelfWithContext(ctx); err == nil {
			l.finding("%s: the token for %s at entry %d is alive, though %s", c.Request, c.Scope, c.Ledger.Index, why)
		}
	case "database":
		names, err := l.eye.rolesAlive(ctx)
		for _, name := range names {
			if err == nil && strings.EqualFold(name, c.secret.Username) {
				l.finding("%s: the role for %s at entry %d is alive, though %s", c.Request, c.Scope, c.Ledger.Index, why)
			}
		}
	}
}
