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
	args []string
	// start is the whole of what it is started with, in place of args.
	start []string
	cmd   *exec.Cmd
	out   bytes.Buffer
}

// Start runs a server with args after those that it needs, and skips nothing:
// where redis-server is missing, the test fails and says what to install.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	s := &Server{t: t, addr: freeAddr(t), dir: t.TempDir(), args: args}
	t.Cleanup(s.Stop)
	s.Run()
	return s
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// StartACL runs a server with an ACL file: the user name, with password and
// rules, beside the default one.
func StartACL(t testing.TB, name, password, rules string) *Server {
	t.Helper()
	file := filepath.Join(t.TempDir(), "users.acl")
	text := "user default on nopass ~* &* +@all\nuser " + name + " on >" + password + " " + rules + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Start(t, "--aclfile", file)
}

// URL is where the server answers.
func (s *Server) URL() string { return "redis://" + s.addr }

// Addr is its host:port.
func (s *Server) Addr() string { return s.addr }

// Run starts the server after a Stop. What it held is gone: it keeps nothing
// on disk.
func (s *Server) Run() {
	s.t.Helper()
	_, port, _ := net.SplitHostPort(s.addr)
	s.cmd = exec.Command("redis-server", append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", s.dir}, s.args...)...)
	if s.start != nil {
		s.cmd = exec.Command("redis-server", s.start...)
	}
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

// Cluster is a Redis Cluster of masters alone.
type Cluster struct {
	Nodes []*Server
}

// StartCluster runs three masters, with args after what each needs.
func StartCluster(t testing.TB, args ...string) *Cluster {
	t.Helper()
	c := &Cluster{}
	join := []string{"--cluster", "create"}
	for range 3 {
		// The bus has a port of its own: the default is 10000 above, which may be none.
		_, bus, _ := net.SplitHostPort(freeAddr(t))
		s := Start(t, append([]string{"--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "2000"}, args...)...)
		c.Nodes = append(c.Nodes, s)
		join = append(join, s.addr)
	}
	if out, err := exec.Command("redis-cli", append(join, "--cluster-replicas", "0", "--cluster-yes")...).CombinedOutput(); err != nil {
		t.Fatalf("redis-cli %v: %v\n%s", join, err, out)
	}
	// A node takes commands only when it knows that all slots are served.
	for _, s := range c.Nodes {
		_, own, _ := net.SplitHostPort(s.addr)
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			out, _ := exec.Command("redis-cli", "-p", own, "CLUSTER", "INFO").Output()
			if bytes.Contains(out, []byte("cluster_state:ok")) {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("a node of the Cluster does not take commands:\n%s", out)
			}
		}
	}
	return c
}

// Addrs are its nodes.
func (c *Cluster) Addrs() (addrs []string) {
	for _, s := range c.Nodes {
		addrs = append(addrs, s.addr)
	}
	return addrs
}

// Sentinel is a master named "state" with a replica, and three Sentinels.
type Sentinel struct {
	Master, Replica *Server
	addrs           []string
}

// StartSentinel runs them, the servers with args after what each needs. The
// Sentinels' own user "watcher" has that password.
func StartSentinel(t testing.TB, password string, args ...string) *Sentinel {
	t.Helper()
	s := &Sentinel{Master: Start(t, args...)}
	host, port, _ := net.SplitHostPort(s.Master.addr)
	s.Replica = Start(t, append([]string{"--replicaof", host + " " + port, "--repl-diskless-sync-delay", "0"}, args...)...)
	for range 3 {
		addr, dir := freeAddr(t), t.TempDir()
		_, own, _ := net.SplitHostPort(addr)
		conf := fmt.Sprintf("bind 127.0.0.1\nport %s\ndir %s\nsentinel monitor state %s %s 2\nsentinel down-after-milliseconds state 500\nsentinel failover-timeout state 3000\n"+
			"user default on nopass &* +@all\nuser watcher on >%s resetchannels &* -@all +ping +subscribe +psubscribe +sentinel|get-master-addr-by-name +sentinel|sentinels +sentinel|replicas\n", own, dir, host, port, password)
		file := filepath.Join(dir, "sentinel.conf")
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		node := &Server{t: t, addr: addr, dir: dir, start: []string{file, "--sentinel"}}
		t.Cleanup(node.Stop)
		node.Run()
		s.addrs = append(s.addrs, addr)
	}
	// Each must know the replica and the others before one can fail over.
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		known := 0
		for _, addr := range s.addrs {
			_, own, _ := net.SplitHostPort(addr)
			out, _ := exec.Command("redis-cli", "-p", own, "SENTINEL", "MASTER", "state").Output()
			fields := bytes.Fields(out)
			for i := 0; i+1 < len(fields); i++ {
				if string(fields[i]) == "num-slaves" && string(fields[i+1]) == "1" || string(fields[i]) == "num-other-sentinels" && string(fields[i+1]) == "2" {
					known++
				}
			}
		}
		if known == 6 {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("the Sentinels do not know each other and the replica: %d of 6", known)
		}
	}
}

// Addrs are the Sentinels.
func (s *Sentinel) Addrs() []string { return s.addrs }

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
