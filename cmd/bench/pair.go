package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// startPair starts recorder and broker as two processes over d's Vault and a
// catalogue, and returns what asks that broker, and the broker's process.
// catalogue is given the directory of the pair.
func (d *dev) startPair(ctx context.Context, catalogue func(dir string) (string, error)) (_ *dev, broker *os.Process, err error) {
	dir, _, err := scratch()
	if err != nil {
		return nil, nil, err
	}
	p := &dev{dir: dir, conns: map[string]*conn{}}
	var started []*exec.Cmd
	p.end = func() {
		for _, c := range started {
			c.Process.Signal(syscall.SIGTERM)
			c.Wait()
		}
		os.RemoveAll(dir)
	}
	defer func() {
		if err != nil {
			p.end()
		}
	}()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		err = errors.Join(err, os.WriteFile(file(name), []byte(text), 0o600))
	}
	cli := func(args ...string) string {
		out, fault := exec.CommandContext(ctx, d.cmd.Path, args...).Output()
		if fault != nil {
			err = errors.Join(err, fmt.Errorf("countersign %s: %w", args[0], fault))
		}
		return strings.TrimSpace(string(out))
	}
	logKey := cli("key", "generate", "log", "--name", "bench.example/log", "--out", file("log.key"))
	cli("key", "generate", "identity", "--out", file("identity.key"))
	cli("key", "generate", "privacy", "--out", file("privacy.key"))
	write("writer", cli("token", "create", "--file", file("writers"), "--role", "writer", "--name", "broker-1"))
	p.Orchestrators = append(p.Orchestrators, struct{ Name, Token string }{"demo", cli("token", "create", "--file", file("callers"), "--role", "orchestrator", "--name", "demo")})
	root := d.Vault.Token
	if err := d.login(); err != nil {
		return nil, nil, err
	}
	write("vault", d.Vault.Token)
	d.Vault.Token = root
	recorder, serve, gateway := freeAddr(), freeAddr(), freeAddr()
	p.Recorder, p.API = "http://"+recorder, "http://"+serve
	scopes, err := catalogue(dir)
	if err != nil {
		return nil, nil, err
	}
	write("record.yaml", fmt.Sprintf(`
listen: {addr: %q}
dir: %q
log_key: %q
privacy_key: %q
tokens: %q
approval:
  base_url: "http://localhost:1"
  catalogue: %q
  oidc: {issuer: "http://localhost:1", client_id: bench}
`, recorder, file("ledger"), file("log.key"), file("privacy.key"), file("writers"), scopes))
	write("serve.yaml", fmt.Sprintf(`
listen: {addr: %q}
public_url: %q
trust_domain: bench.example
identity_key: %q
privacy_key: %q
catalogue: %q
recorder: {url: %q, writer: broker-1, token_file: %q, log_key: %q, head_file: %q}
vault: {addr: %q, token_file: %q}
redis: {embedded: true}
orchestrators: {tokens: %q}
gateway: {postgres: {listen: {addr: %[13]q}, address: %[13]q}}
`, serve, p.API, file("identity.key"), file("privacy.key"), scopes, p.Recorder, file("writer"), logKey, file("head"), d.Vault.Addr, file("vault"), file("callers"), gateway))
	if err != nil {
		return nil, nil, err
	}
	for _, x := range [][2]string{{"record", p.Recorder}, {"serve", p.API}} {
		cmd := exec.Command(d.cmd.Path, x[0], "--config", file(x[0]+".yaml"))
		if err := cmd.Start(); err != nil {
			return nil, nil, err
		}
		started = append(started, cmd)
		if err := untilReady(ctx, x[1]); err != nil {
			return nil, nil, fmt.Errorf("countersign %s: %w", x[0], err)
		}
	}
	return p, started[1].Process, nil
}

// freeAddr is an address that nobody listened at a moment ago.
func freeAddr() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "127.0.0.1:0"
	}
	defer l.Close()
	return l.Addr().String()
}

// untilReady waits until the process at url is ready, to the nearest 5 ms.
func untilReady(ctx context.Context, url string) error {
	for range 12_000 {
		if res, err := http.Get(url + "/readyz"); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return errors.New("not ready after a minute")
}
