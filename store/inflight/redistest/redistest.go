// Package redistest runs a real redis-server for tests.
package redistest

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Server is a redis-server of a test's own. It can be stopped and started
// again on the same port, and dies with the test process.
type Server struct {
	t    testing.TB
	addr string
	dir  string
	cmd  *exec.Cmd
	out  bytes.Buffer
}

// Start runs a server, and skips nothing: where redis-server is missing, the
// test fails and says what to install.
func Start(t testing.TB) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	s := &Server{t: t, addr: addr, dir: t.TempDir()}
	s.Run()
	t.Cleanup(s.Stop)
	return s
}

// URL is where the server answers.
func (s *Server) URL() string { return "redis://" + s.addr }

// Run starts the server after a Stop. What it held is gone: it keeps nothing
// on disk.
func (s *Server) Run() {
	s.t.Helper()
	_, port, _ := net.SplitHostPort(s.addr)
	s.cmd = exec.Command("redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", s.dir)
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("start redis-server (apt-get install redis-server): %v", err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if s.do("PING") == nil {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("redis-server does not answer:\n%s", s.out.String())
		}
	}
}

// Stop kills the server.
func (s *Server) Stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// Flush empties the server.
func (s *Server) Flush() {
	s.t.Helper()
	if err := s.do("FLUSHALL"); err != nil {
		s.t.Fatal(err)
	}
}

// Dump returns every byte that the server holds, as it would save it.
func (s *Server) Dump() []byte {
	s.t.Helper()
	if err := s.do("CONFIG SET rdbcompression no"); err != nil {
		s.t.Fatal(err)
	}
	if err := s.do("SAVE"); err != nil {
		s.t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(s.dir, "dump.rdb"))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// do sends an inline command and waits for its answer.
func (s *Server) do(command string) error {
	c, err := net.DialTimeout("tcp", s.addr, time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintf(c, "%s\r\n", command); err != nil {
		return err
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil {
		return err
	}
	if b[0] != '+' {
		return fmt.Errorf("%s: %s", command, b[:n])
	}
	return nil
}
