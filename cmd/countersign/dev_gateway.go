package main

import (
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/server"
)

// The access path is not in this version. The ready file names its addresses
// all the same, so that what reads it need not change; what listens there says
// what is missing instead of leaving a caller to guess at a refused connection.
const noAccessPath = "the access path is not in this version: ask for delivery direct"

// refuseHTTP answers every call of the HTTP and MCP gateways.
func refuseHTTP(log *zap.Logger) http.Handler {
	r := server.NewRouter(log, server.MaxBody)
	refuse := func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, r, problem.DeliveryUnsupported(noAccessPath))
	}
	r.NotFound(refuse)
	r.MethodNotAllowed(refuse)
	return r
}

// refusePostgres answers every connection to the PostgreSQL gateway with an
// error that clients show (PostgreSQL protocol 3, section 55.2.1). It returns
// when l is closed.
func refusePostgres(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go refuseSession(conn)
	}
}

func refuseSession(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	b := pgproto3.NewBackend(conn, conn)
	for range 3 { // a client may ask for GSS and for TLS before it begins
		m, err := b.ReceiveStartupMessage()
		if err != nil {
			return
		}
		switch m.(type) {
		case *pgproto3.SSLRequest, *pgproto3.GSSEncRequest:
			if _, err := conn.Write([]byte{'N'}); err != nil {
				return
			}
			continue
		}
		b.Send(&pgproto3.ErrorResponse{
			Severity: "FATAL", SeverityUnlocalized: "FATAL",
			Code:    "0A000", // feature_not_supported
			Message: noAccessPath,
		})
		_ = b.Flush()
		return
	}
}
