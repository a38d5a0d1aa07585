package postgres

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// Codes in the place of a protocol version
// (https://www.postgresql.org/docs/current/protocol-message-formats.html).
const (
	cancelRequest = 80877102
	sslRequest    = 80877103
	gssRequest    = 80877104
)

// maxStartup is the largest message from who is not let in yet, in bytes
// (MAX_STARTUP_PACKET_LENGTH of PostgreSQL).
const maxStartup = 10000

// startupParameters are those that reach the target. Whatever else a client
// asks for could change what its statements mean.
var startupParameters = map[string]bool{
	"application_name": true, "client_encoding": true, "datestyle": true, "timezone": true, "extra_float_digits": true, "intervalstyle": true,
}

// startup is how a client opens a connection.
type startup struct {
	minor    int               // asked for
	settings map[string]string // of startupParameters, by lower-case name
	unknown  []string          // protocol options (_pq_.) that we do not know
	database string
	refused  *pgproto3.ErrorResponse // where it asks for what is not to be had
}

// welcome takes a client through TLS, its token, and the target's log-in. It
// returns nil where there is nothing to serve.
func (g *Gateway) welcome(ctx context.Context, client net.Conn, full bool) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.Handshake)
	defer cancel()
	remote := address(client)
	body, err := readStartup(client)
	encrypted := false
	for asked := map[uint32]bool{}; err == nil; body, err = readStartup(client) {
		code := binary.BigEndian.Uint32(body)
		if code != sslRequest && code != gssRequest {
			break
		}
		if asked[code] || len(body) != 4 || encrypted {
			return nil, fmt.Errorf("%w: encryption asked for again", errProtocol)
		}
		asked[code] = true
		if code == gssRequest || g.TLS == nil {
			if _, err := client.Write([]byte{'N'}); err != nil {
				return nil, err
			}
			continue
		}
		if _, err := client.Write([]byte{'S'}); err != nil {
			return nil, err
		}
		// Nothing was read ahead: what came in the clear behind the request is part
		// of the handshake, and fails it.
		secure := tls.Server(client, g.TLS)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		client, encrypted = secure, true
	}
	if err != nil {
		return nil, err
	}
	if code := binary.BigEndian.Uint32(body); code == cancelRequest {
		if len(body) != 12 {
			return nil, fmt.Errorf("%w: a cancel request of %d bytes", errProtocol, len(body))
		}
		g.cancel(ctx, binary.BigEndian.Uint32(body[4:]), body[8:], remote)
		return nil, nil
	}
	fatal := func(code, format string, args ...any) (*conn, error) {
		e := refusal("FATAL", code, fmt.Sprintf(format, args...))
		_, _ = client.Write(encode(nil, e))
		return nil, errors.New(e.Message)
	}
	st, err := parseStartup(body)
	switch {
	case err != nil:
		return fatal("08P01", "%v", err)
	case full:
		return fatal("53300", "the gateway has too many connections")
	case st.refused != nil:
		return fatal(st.refused.Code, "%s", st.refused.Message)
	case !encrypted && !loopback(client):
		// The token would pass the network in the clear.
		return fatal("28000", "the session token is taken over TLS only: connect with sslmode=require")
	}
	var hello []byte
	if st.minor > 0 || len(st.unknown) > 0 {
		hello = encode(hello, &pgproto3.NegotiateProtocolVersion{NewestMinorProtocol: 0, UnrecognizedOptions: st.unknown})
	}
	if _, err := client.Write(encode(hello, &pgproto3.AuthenticationCleartextPassword{})); err != nil {
		return nil, err
	}
	token, err := readPassword(client)
	if err != nil {
		return nil, err
	}
	s, err := g.Gateway.Session(token)
	if err != nil || s.Grant.Access.Protocol != store.ProtocolPostgres || s.Grant.Access.Postgres == nil {
		g.Gateway.Refused(ctx, store.ProtocolPostgres, remote, "connect")
		return fatal("28P01", "the password is not the token of a live session")
	}
	_, granted, err := upstream(s.Grant.Access)
	if err != nil {
		return fatal("08001", "the target is not named as host:port/database")
	}
	if st.database != "" && st.database != granted {
		return fatal("3D000", "the session is for another database: connect to %q", granted)
	}
	r := g.rulesOf(s)
	if r == nil {
		return fatal("53300", "the session has too many connections")
	}
	c, err := g.connect(ctx, client, s, r, st)
	if err != nil {
		g.release(s)
		return fatal(connectCode(ctx, s, err))
	}
	return c, nil
}

// connect logs in at the target, and tells the client that it is let in.
func (g *Gateway) connect(ctx context.Context, client net.Conn, s *gateway.Session, r *rules, st *startup) (_ *conn, err error) {
	// A session that ends meanwhile ends the log-in too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.Context(), cancel)()
	t, err := dial(ctx, g.Gateway, s, st.settings, r)
	if err != nil {
		g.Log.Info("a target could not be logged in at", zap.String("request", s.Story.Request), zap.String("because", because(err)))
		return nil, err
	}
	c := newConn(g, s, r, client, t)
	g.register(c)
	hello := encode(nil, &pgproto3.AuthenticationOk{})
	for _, name := range slices.Sorted(maps.Keys(t.parameters)) {
		hello = encode(hello, &pgproto3.ParameterStatus{Name: name, Value: t.parameters[name]})
	}
	hello = encode(hello, &pgproto3.BackendKeyData{ProcessID: c.pid, SecretKey: c.secret})
	hello = encode(hello, &pgproto3.ReadyForQuery{TxStatus: 'I'})
	if _, err := client.Write(hello); err != nil {
		g.mu.Lock()
		delete(g.conns, c.pid)
		g.mu.Unlock()
		t.close()
		return nil, err
	}
	return c, nil
}

// connectCode is the SQLSTATE and the text for a client that could not be
// connected to the target. The target's own words stay with us: they may tell
// of it what the step is not to know.
func connectCode(ctx context.Context, s *gateway.Session, err error) (code, format string, arg any) {
	var pg *pgconn.PgError
	switch {
	case s.Context().Err() != nil:
		return "57P01", "%s", "the session has ended"
	case errors.As(err, &pg) && strings.HasPrefix(sqlstate(pg), "22"):
		return pg.Code, "%s", "the target refused a startup parameter"
	case errors.As(err, &pg):
		return "08001", "the target refused the connection (SQLSTATE %s)", sqlstate(pg)
	case ctx.Err() != nil:
		return "08001", "%s", "the target did not answer in time"
	default:
		return "08001", "%s", "the target could not be reached"
	}
}

// because is err as it is logged: in no words of the target's.
func because(err error) string {
	var (
		pg   *pgconn.PgError
		dial *net.OpError
		cert *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &pg):
		return "the target refused, SQLSTATE " + sqlstate(pg)
	case errors.As(err, &cert):
		return "the target's certificate does not verify"
	case errors.As(err, &dial):
		return dial.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return "the target did not answer in time"
	}
	return fmt.Sprintf("%T", errors.Unwrap(err))
}

// sqlstate is the code of an error of the target's, where it is one: five
// digits and capitals (PostgreSQL, appendix A).
func sqlstate(e *pgconn.PgError) string {
	if len(e.Code) != 5 || strings.ContainsFunc(e.Code, func(r rune) bool { return (r < '0' || r > '9') && (r < 'A' || r > 'Z') }) {
		return "unknown"
	}
	return e.Code
}

// readStartup reads a message without type, and not a byte more.
func readStartup(r io.Reader) ([]byte, error) {
	var h [4]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, err
	}
	n := int64(binary.BigEndian.Uint32(h[:])) - 4
	if n < 4 || n > maxStartup {
		return nil, fmt.Errorf("%w: a startup message of %d bytes", errProtocol, n+4)
	}
	body := make([]byte, n)
	_, err := io.ReadFull(r, body)
	return body, err
}

// parseStartup reads the body of a StartupMessage. The error wraps errProtocol,
// and holds nothing that was sent.
func parseStartup(b []byte) (*startup, error) {
	version := binary.BigEndian.Uint32(b)
	if version>>16 != 3 {
		return nil, fmt.Errorf("%w: protocol version 3 is spoken here", errProtocol)
	}
	st := &startup{minor: int(version & 0xffff), settings: map[string]string{}}
	seen := map[string]bool{}
	for b = b[4:]; ; {
		name, rest, ok := cstring(b)
		if ok && name == "" {
			if len(rest) > 0 {
				return nil, fmt.Errorf("%w: a startup message with more behind its end", errProtocol)
			}
			if st.refused == nil && !seen["user"] {
				st.refused = refusal("FATAL", "28000", "no user name")
			}
			return st, nil
		}
		value, rest, ok2 := cstring(rest)
		if !ok || !ok2 {
			return nil, fmt.Errorf("%w: a startup message without end", errProtocol)
		}
		b = rest
		if strings.HasPrefix(name, "_pq_.") {
			st.unknown = append(st.unknown, name)
			continue
		}
		lower := strings.ToLower(name)
		if seen[lower] && st.refused == nil {
			st.refused = refusal("FATAL", "08P01", "a startup parameter stands there twice")
		}
		seen[lower] = true
		switch {
		case lower == "user":
		case lower == "database":
			st.database = value
		case lower == "replication":
			if !slices.Contains([]string{"", "false", "off", "no", "0"}, strings.ToLower(value)) {
				st.refused = refusal("FATAL", "0A000", "replication is not supported here")
			}
		case lower == "options" && strings.TrimSpace(value) == "":
		case lower == "client_encoding":
			if !utf8Name(value) {
				st.refused = refusal("FATAL", "0A000", "client_encoding must be UTF8 here")
			}
			st.settings[lower] = "UTF8"
		case startupParameters[lower]:
			st.settings[lower] = value
		case st.refused == nil:
			st.refused = refusal("FATAL", "0A000", "a startup parameter is not supported here; these are: "+strings.Join(slices.Sorted(maps.Keys(startupParameters)), ", "))
		}
	}
}

// utf8Name reports whether an encoding's name is one of UTF-8's, as PostgreSQL
// compares names: letters and digits alone count.
func utf8Name(s string) bool {
	s = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(s))
	return s == "utf8" || s == "unicode"
}

// readPassword reads a PasswordMessage, and not a byte more.
func readPassword(r io.Reader) (string, error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return "", err
	}
	n := int64(binary.BigEndian.Uint32(h[1:])) - 4
	if h[0] != 'p' || n < 1 || n > maxStartup {
		return "", fmt.Errorf("%w: no password message", errProtocol)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return "", err
	}
	s, rest, ok := cstring(body)
	if !ok || len(rest) > 0 {
		return "", fmt.Errorf("%w: a password without end", errProtocol)
	}
	return s, nil
}

func loopback(c net.Conn) bool {
	ip := net.ParseIP(address(c))
	return ip != nil && ip.IsLoopback()
}
