package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// target is a connection to PostgreSQL, logged in as the step's user.
type target struct {
	net.Conn
	r          *reader
	pg         *pgconn.PgConn    // for cancel requests alone: Conn is no longer its own
	parameters map[string]string // as it reported them at log-in
}

// upstream is where access goes: host:port, and the database.
func upstream(a *store.Access) (hostport, database string, err error) {
	hostport, database, ok := strings.Cut(a.Upstream, "/")
	if _, _, err := net.SplitHostPort(hostport); err != nil || !ok || database == "" {
		return "", "", fmt.Errorf("upstream %q is not host:port/database", a.Upstream)
	}
	return hostport, database, nil
}

// dial logs in at the session's target, and reads its catalog where r has none
// yet. Errors hold no secret.
func dial(ctx context.Context, g *gateway.Gateway, s *gateway.Session, settings map[string]string, r *rules) (*target, error) {
	access := s.Grant.Access
	hostport, database, err := upstream(access)
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(hostport)
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port of %q: %w", access.Upstream, err)
	}
	// All that the environment may have set (libpq's variables) is set here.
	cfg, err := pgconn.ParseConfig("host=localhost port=1 user=none password=none dbname=none sslmode=disable target_session_attrs=any")
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.Database, cfg.User, cfg.Password = host, uint16(n), database, s.Secret.Username, s.Secret.Password
	cfg.Fallbacks, cfg.ConnectTimeout, cfg.TLSConfig = nil, 0, nil
	if access.TLS == "off" {
		cfg.RequireAuth = "!password" // which would pass the network in the clear
	} else {
		cfg.TLSConfig = g.Targets.Client()
		cfg.TLSConfig.ServerName = host
	}
	// What the guard reads is what the target reads: the same encoding, the same
	// strings, the same tables behind a name.
	cfg.RuntimeParams = map[string]string{"client_encoding": "UTF8", "standard_conforming_strings": "on", "search_path": "public"}
	for name, value := range settings {
		cfg.RuntimeParams[name] = value
	}
	cfg.LookupFunc = func(context.Context, string) ([]string, error) { return []string{host}, nil }
	cfg.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return g.Dial(ctx, "tcp", hostport) }
	cfg.MaxProtocolMessageBodyLen = 64 << 20
	pg, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := r.load(ctx, s, querier{pg}); err != nil {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = pg.Close(closing)
		return nil, fmt.Errorf("read the target's catalog: %w", err)
	}
	return takeOver(ctx, pg)
}

// takeOver takes the connection from pg, which has logged in and is idle, and
// closes it where it fails.
func takeOver(ctx context.Context, pg *pgconn.PgConn) (_ *target, err error) {
	defer func() {
		if err != nil {
			_ = pg.Conn().Close()
		}
	}()
	// A write that took long has pg read in the background, and what it had begun to
	// read it would take from us: the answer to the client's first statement.
	if err := pg.SyncConn(ctx); err != nil {
		return nil, err
	}
	hc, err := pg.Hijack()
	if err != nil {
		return nil, err
	}
	t := &target{Conn: hc.Conn, r: newReader(hc.Conn, 16<<10), pg: pg, parameters: hc.ParameterStatuses}
	for name, value := range t.parameters {
		if !trusted(name, value) {
			return nil, errors.New("the target does not keep to " + name)
		}
	}
	return t, nil
}

// trusted reports whether statements still mean to the target what they mean to
// the guard under this parameter.
func trusted(name, value string) bool {
	switch name {
	case "client_encoding":
		return utf8Name(value)
	case "standard_conforming_strings":
		return value == "on"
	}
	return true
}

func (t *target) close() { _ = t.Conn.Close() }

// cancel asks the target to end the statement under way.
func (t *target) cancel(ctx context.Context) {
	ctx, stop := context.WithTimeout(ctx, 5*time.Second)
	defer stop()
	_ = t.pg.CancelRequest(ctx) // nobody is told of its error, as with PostgreSQL
}

// haltWithin is how long halt tries.
const haltWithin = 2 * time.Second

// halt ends what runs at the target, to which nothing more is sent. A target
// notices that we hung up when it next writes or reads, and a request to cancel
// that comes before the statement has begun is lost: so it is asked until it has
// hung up, too, which it does as soon as it reads on.
func (t *target) halt() {
	ctx, stop := context.WithTimeout(context.Background(), haltWithin)
	defer stop()
	_ = t.SetDeadline(time.Now().Add(haltWithin))
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, t.Conn)
	}()
	defer func() {
		t.close()
		<-gone
	}()
	for pause := 20 * time.Millisecond; ; pause *= 2 {
		t.cancel(ctx)
		select {
		case <-gone:
			return
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// querier is guard.Querier over a connection before any client has it.
type querier struct{ pg *pgconn.PgConn }

// Query runs one query and returns its rows as text; NULL is "".
func (q querier) Query(ctx context.Context, sql string) ([][]string, error) {
	results, err := q.pg.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for _, r := range results {
		for _, row := range r.Rows {
			texts := make([]string, len(row))
			for i, v := range row {
				texts[i] = string(v)
			}
			rows = append(rows, texts)
		}
	}
	return rows, nil
}
