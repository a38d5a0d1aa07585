package postgres

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// A machine under load can keep a write of the log-in from returning until its
// answer is here; pgx then reads in the background, one message further than it
// needs. What the target says next must still be ours.
func TestAWriteThatReturnsLateTakesNoAnswerFromTheClient(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg, err := pgconn.ParseConfig(server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	late := &lateConn{reads: make(chan struct{}, 100)}
	cfg.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) {
		late.Conn = c
		return late, nil
	}
	pg, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	late.hold = 2
	if _, err := pg.Exec(ctx, "select 1").ReadAll(); err != nil {
		t.Fatal(err)
	}
	if late.hold != 0 {
		t.Fatal("nothing was read while the write was under way: this test shows nothing")
	}
	target, err := takeOver(ctx, pg)
	if err != nil {
		t.Fatal(err)
	}
	defer target.close()
	_ = target.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := target.Write(appendMessage(nil, 'Q', []byte("select 2\x00"))); err != nil {
		t.Fatal(err)
	}
	for _, want := range "TDCZ" {
		typ, n, err := target.r.header()
		if err != nil || typ != byte(want) {
			t.Fatalf("%c where %c is due: %v", typ, want, err)
		}
		if err := target.r.skip(n); err != nil {
			t.Fatal(err)
		}
	}
}

// lateConn holds a write back until this many reads have begun since.
type lateConn struct {
	net.Conn
	reads chan struct{}
	hold  int // of the next write; of the goroutine that writes
}

func (c *lateConn) Read(b []byte) (int, error) {
	select {
	case c.reads <- struct{}{}:
	default:
	}
	return c.Conn.Read(b)
}

func (c *lateConn) Write(b []byte) (int, error) {
	for len(c.reads) > 0 {
		<-c.reads
	}
	n, err := c.Conn.Write(b)
	for ; c.hold > 0; c.hold-- {
		<-c.reads
	}
	return n, err
}
