// Package vaultdev runs a Vault for development: in memory, on a free port of
// 127.0.0.1, gone when the process that started it is gone. `countersign dev`
// and the tests start and prepare it the same way.
package vaultdev

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

// Version is the Vault that `make vault` builds.
const Version = "1.21.0"

// ErrNoVault says that no Vault binary was found.
var ErrNoVault = errors.New("no Vault found: run `make vault`, which builds one, or put vault or bao on PATH")

// startWithin is how long a development Vault may take to answer. It needs
// under a second on an idle machine.
const startWithin = 60 * time.Second

// Server is a running development Vault.
type Server struct {
	Addr      string // http://127.0.0.1:PORT
	RootToken string

	stop func()
	done <-chan struct{}
}

// Find returns the path of a Vault binary: vault or bao on PATH, else the one
// that `make vault` left in the user's cache.
func Find() (string, error) {
	for _, name := range []string{"vault", "bao"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	if cache, err := os.UserCacheDir(); err == nil {
		p := filepath.Join(cache, "countersign", "vault-v"+Version)
		if _, err := exec.LookPath(p); err == nil {
			return p, nil
		}
	}
	return "", ErrNoVault
}

// Start runs binary as a development server until ctx ends, Stop is called or
// this process dies. It returns when Vault answers.
func Start(ctx context.Context, binary string) (*Server, error) {
	var err error
	for range 3 { // a free port can be taken before Vault binds it
		var s *Server
		if s, err = start(ctx, binary); err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

func start(ctx context.Context, binary string) (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("looking for a free port: %w", err)
	}
	listen := l.Addr().String()
	l.Close()
	token := "dev-" + rand.Text()

	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, binary, "server", "-dev", "-dev-no-store-token", "-dev-listen-address="+listen, "-log-level=error")
	// The token goes by the environment: command lines are public on a machine.
	cmd.Env = []string{
		// Parts of Vault make caches in the home directory, and go on where they
		// cannot: so nothing is left behind, whichever way Vault ends.
		"HOME=/dev/null", "PATH=" + os.Getenv("PATH"),
		"VAULT_DEV_ROOT_TOKEN_ID=" + token, "BAO_DEV_ROOT_TOKEN_ID=" + token,
	}
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	done, err := Run(cmd)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("starting %s: %w", binary, err)
	}
	s := &Server{Addr: "http://" + listen, RootToken: token, stop: cancel, done: done}

	deadline := time.After(startWithin)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	probe := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		if s.ready(ctx, &probe) {
			return s, nil
		}
		select {
		case <-tick.C:
			continue
		case <-done:
			cancel()
			return nil, fmt.Errorf("%s ended at once: %s", binary, said.String())
		case <-deadline:
			s.Stop()
			return nil, fmt.Errorf("%s did not answer within %s: %s", binary, startWithin, said.String())
		case <-ctx.Done():
			s.Stop()
			return nil, ctx.Err()
		}
	}
}

// ready reports whether the server is unsealed and has finished its set-up:
// a dev server mounts secret/ last, a moment after it answers health checks.
func (s *Server) ready(ctx context.Context, c *http.Client) bool {
	req, err := http.NewRequestWithContext(ctx, "GET", s.Addr+"/v1/secret/config", nil)
	if err != nil {
		return false
	}
	req.Header.Set("X-Vault-Token", s.RootToken)
	resp, err := c.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Stop ends the server and waits until it is gone.
func (s *Server) Stop() {
	s.stop()
	<-s.done
}

// Done is closed when the server is gone.
func (s *Server) Done() <-chan struct{} { return s.done }

// Client returns a client with the root token.
func (s *Server) Client() (*api.Client, error) { return NewClient(s.Addr, s.RootToken) }

// NewClient returns a client for addr with token, and nothing of the
// environment: the Vault library would otherwise take address, token,
// namespace and headers from VAULT_* variables.
func NewClient(addr, token string) (*api.Client, error) {
	cfg := &api.Config{
		Address:    addr,
		Timeout:    30 * time.Second,
		HttpClient: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute}},
	}
	c, err := api.NewClient(cfg)
	if err != nil {
		return nil, fmt.Errorf("making a Vault client for %s: %w", addr, err)
	}
	c.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	c.SetWrappingLookupFunc(func(string, string) string { return "" })
	c.SetToken(token)
	return c, nil
}

// Run starts cmd such that it is killed when this process dies, however that
// happens, and returns a channel that is closed when cmd has ended.
//
// The kernel sends the signal when the thread that forked ends (prctl(2),
// PR_SET_PDEATHSIG), not the process, so that thread is kept until then.
func Run(cmd *exec.Cmd) (<-chan struct{}, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if cmd.SysProcAttr.Pdeathsig == 0 {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	started, done := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed, as a rule
			close(done)
		}
	}()
	return done, <-started
}

// tail keeps the last lines a process wrote, for the message when it fails.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - 2048; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(t.b)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}
