// Package postgrestest runs a PostgreSQL server for tests, as one that keeps a
// ledger runs: with fsync on.
package postgrestest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// ErrNotInstalled is returned where PostgreSQL's server programs are not on this
// machine; `make test` installs them.
var ErrNotInstalled = errors.New("PostgreSQL's server programs are not installed: apt-get install postgresql")

// Server is one server with a data directory of its own, on a free port of
// 127.0.0.1. It is not for concurrent use.
type Server struct {
	// DSN logs its superuser in.
	DSN string

	dir, bin string
	port     int
	attr     syscall.SysProcAttr
	process  *os.Process
	done     chan struct{} // closed when process ended
}

// Start makes and starts a server; options are settings of postgresql.conf,
// such as "max_connections=20". It dies with this process.
func Start(options ...string) (*Server, error) { return StartIn("", options...) }

// StartIn is Start with the data below dir, for a disk that is to be measured;
// the user postgres must be able to get there.
func StartIn(dir string, options ...string) (_ *Server, err error) {
	s := &Server{attr: syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}}
	if s.bin, err = programs(); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp(dir, "postgrestest"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = s.Remove()
		}
	}()
	if os.Getuid() == 0 { // PostgreSQL refuses to run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, fmt.Errorf("%w: no user postgres", ErrNotInstalled)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(s.dir, uid, gid); err != nil {
			return nil, err
		}
		s.attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if out, err := s.Command("initdb", "-D", s.Data(), "-U", "postgres", "-A", "trust", "--no-sync", "--no-instructions", "-E", "UTF8", "--locale=C").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	conf, err := os.OpenFile(filepath.Join(s.Data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	for _, o := range append([]string{"listen_addresses='127.0.0.1'", "unix_socket_directories=''", "autovacuum_naptime=1s"}, options...) {
		fmt.Fprintln(conf, o)
	}
	if err := conf.Close(); err != nil {
		return nil, err
	}
	for range 3 { // a free port can be taken before the server binds it
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		s.DSN = fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", s.port)
		if err = s.restart(); err == nil {
			return s, nil
		}
	}
	return nil, err
}

// Data is the server's data directory.
func (s *Server) Data() string { return filepath.Join(s.dir, "data") }

// Dir is a directory that the server's user may write to.
func (s *Server) Dir() string { return s.dir }

// Command is one of PostgreSQL's programs, to be run as the server's user.
func (s *Server) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.attr.Credential}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
	return cmd
}

// Backup takes a base backup, WAL included, and starts a server of its own on it.
func (s *Server) Backup() (_ *Server, err error) {
	b := &Server{attr: s.attr, bin: s.bin, DSN: s.DSN}
	if b.dir, err = os.MkdirTemp(filepath.Dir(s.dir), "postgrestest"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = b.Remove()
		}
	}()
	if c := s.attr.Credential; c != nil {
		if err := os.Chown(b.dir, int(c.Uid), int(c.Gid)); err != nil {
			return nil, err
		}
	}
	if out, err := s.Command("pg_basebackup", "-d", s.DSN, "-D", b.Data(), "-X", "stream", "-c", "fast", "--no-sync").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pg_basebackup: %w: %s", err, out)
	}
	if b.port, err = freePort(); err != nil {
		return nil, err
	}
	b.DSN = strings.Replace(s.DSN, fmt.Sprintf(":%d/", s.port), fmt.Sprintf(":%d/", b.port), 1)
	return b, b.Restart()
}

// Restart starts a server that was stopped or killed, on the same port and data,
// and waits until it answers.
func (s *Server) Restart() (err error) {
	// It refuses to start while the shared memory of a killed one is in use.
	for range 50 {
		if err = s.restart(); !errors.Is(err, errEnded) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

var errEnded = errors.New("postgres ended at once")

func (s *Server) restart() error {
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := s.Command("postgres", "-D", s.Data(), "-p", strconv.Itoa(s.port))
	attr := s.attr
	cmd.SysProcAttr, cmd.Stdout, cmd.Stderr = &attr, log, log
	started, done := make(chan error, 1), make(chan struct{})
	go func() {
		// Pdeathsig goes by the thread that started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(done)
	}()
	if err := <-started; err != nil {
		return err
	}
	s.process, s.done = cmd.Process, done
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, s.DSN)
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-done:
			return errEnded
		case <-ctx.Done():
			return fmt.Errorf("postgres does not answer: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Kill kills the server and all its sessions as a crash of the machine would,
// without a chance to write anything.
func (s *Server) Kill() {
	sessions, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", s.process.Pid))
	_ = s.process.Kill()
	for _, pid := range strings.Fields(string(sessions)) {
		if n, err := strconv.Atoi(pid); err == nil {
			_ = syscall.Kill(n, syscall.SIGKILL)
		}
	}
	<-s.done
}

// Stop stops the server in order.
func (s *Server) Stop() {
	_ = s.process.Signal(syscall.SIGINT)
	<-s.done
}

// Remove stops the server and removes what it kept.
func (s *Server) Remove() error {
	if s.process != nil {
		_ = s.process.Signal(syscall.SIGQUIT)
		<-s.done
	}
	return os.RemoveAll(s.dir)
}

// programs finds the directory of initdb and postgres: beside the initdb on
// PATH, or where Debian keeps them.
func programs() (string, error) {
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(p), nil
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", ErrNotInstalled
	}
	return filepath.Dir(slices.Max(found)), nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
