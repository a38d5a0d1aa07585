package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// dev is a running `countersign dev`, as its ready file describes it.
type dev struct {
	API           string `json:"api"`
	Recorder      string `json:"recorder"`
	Vault         struct{ Addr, Token string }
	Orchestrators []struct{ Name, Token string }
	Approvers     []struct{ Name, Token string }
	Responders    []struct{ Name, Token string }

	postgres bool
	cmd      *exec.Cmd
	dir      string
	end      func() // of a pair

	mu    sync.Mutex
	conns map[string]*conn
}

func startDev(ctx context.Context, binary, postgres string) (*dev, error) {
	dir, _, err := scratch()
	if err != nil {
		return nil, err
	}
	ready := filepath.Join(dir, "ready.json")
	args := []string{"dev", "--dir", filepath.Join(dir, "dev"), "--addr", "127.0.0.1:0", "--ready-file", ready}
	if postgres != "" {
		args = append(args, "--postgres", postgres, "--tables", "pgbench_accounts,pgbench_branches")
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &dev{postgres: postgres != "", cmd: cmd, dir: dir, conns: map[string]*conn{}}
	for range 600 {
		b, err := os.ReadFile(ready)
		if err == nil {
			return d, json.Unmarshal(b, d)
		}
		select {
		case <-ctx.Done():
			d.stop()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	b, _ := os.ReadFile(log.Name())
	d.stop()
	return nil, fmt.Errorf("countersign dev is not ready after a minute: %s", b)
}

func (d *dev) stop() {
	d.cmd.Process.Signal(syscall.SIGINT)
	d.cmd.Wait()
	os.RemoveAll(d.dir)
}

// conn is one worker's connection to one server. Client and server share two
// cores here, so the client is kept to writing a request and reading its
// answer; net/http's own transport takes about twice the time.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func (d *dev) conn(worker int, host string) (*conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := fmt.Sprint(worker, " ", host)
	if c := d.conns[k]; c != nil {
		return c, nil
	}
	n, err := net.Dial("tcp", host)
	if err != nil {
		return nil, err
	}
	c := &conn{n, bufio.NewReader(n)}
	d.conns[k] = c
	return c, nil
}

// call makes one call on the worker's own connection and returns the body.
func (d *dev) call(worker int, method, url, header, token string, body any) ([]byte, error) {
	host, path, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	c, err := d.conn(worker, host)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "%s /%s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, path, host, header, token, len(b), b); err != nil {
		return nil, err
	}
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %.300s", method, url, res.Status, answer)
	}
	return answer, err
}

// ask asks the broker for one credential of scope.
func (d *dev) ask(scope string) func(context.Context, int, int) error {
	return func(_ context.Context, worker, i int) error {
		_, err := d.call(worker, "POST", fmt.Sprintf("%s/steps/step-%d/credential", d.API, i), "Authorization", "Bearer "+d.Orchestrators[0].Token,
			map[string]string{"run": "bench", "scope": scope})
		return err
	}
}

func (d *dev) vault(worker int, method, path string, body any) ([]byte, error) {
	return d.call(worker, method, d.Vault.Addr+"/v1/"+path, "X-Vault-Token", d.Vault.Token, body)
}

func (d *dev) identity(ctx context.Context, t *table) error {
	const what = "issue identity:step over HTTP"
	one, err := t.measure(ctx, what, "countersign", 1, d.ask("identity:step"))
	if err != nil {
		return err
	}
	many, err := t.measure(ctx, what, "countersign", 64, d.ask("identity:step"))
	if err != nil {
		return err
	}
	t.floor("identity p50 at 1", "at most 2 ms", ms(one.p50)+" ms", one.p50 <= 2*time.Millisecond)
	t.floor("identity rate at 64", "at least 3,000/s", fmt.Sprintf("%.0f/s", many.rate), many.rate >= 3000)
	return nil
}

// login replaces Vault's root token, whom no policy is looked up for, by one like
// the broker's own.
func (d *dev) login() error {
	answer, err := d.vault(0, "POST", "auth/token/create-orphan", map[string]any{
		"policies": []string{"countersign-broker"}, "no_default_policy": true, "period": "24h"})
	if err != nil {
		return err
	}
	var created struct {
		Auth struct {
			Token string `json:"client_token"`
		}
	}
	err = json.Unmarshal(answer, &created)
	d.Vault.Token = created.Auth.Token
	return err
}

// mintToken makes Vault's own calls of a token scope, with the broker's
// parameters: create under the scope's role, then renew to the full time.
func (d *dev) mintToken(_ context.Context, worker, i int) error {
	answer, err := d.vault(worker, "POST", "auth/token/create/countersign-vault-demo-read", map[string]any{
		"policies": []string{"countersign-vault-demo-read"}, "no_default_policy": true, "display_name": fmt.Sprint("countersign-step-", i),
		"ttl": "60s", "explicit_max_ttl": "300s", "renewable": true, "num_uses": 0,
		"meta": map[string]string{"request": fmt.Sprintf("req_%032d", i), "step": fmt.Sprint("step-", i), "run": "bench",
			"orchestrator": "demo", "intent": fmt.Sprintf("%036d", i)},
	})
	if err != nil {
		return err
	}
	var created struct {
		Auth struct{ Accessor string }
	}
	if err := json.Unmarshal(answer, &created); err != nil {
		return err
	}
	_, err = d.vault(worker, "POST", "auth/token/renew-accessor", map[string]any{"accessor": created.Auth.Accessor, "increment": "300s"})
	return err
}

// side is one of two that are compared.
type side struct {
	who string
	fn  func(ctx context.Context, worker, i int) error
}

func (d *dev) token(ctx context.Context, t *table) error {
	const what = "issue a Vault token scope"
	defer func(root string) { d.Vault.Token = root }(d.Vault.Token)
	if err := d.login(); err != nil {
		return err
	}
	figures := map[string]figure{}
	for _, c := range []int{1, 16} {
		for _, side := range []side{{"Vault, the same calls", d.mintToken}, {"countersign", d.ask("vault:demo-read")}} {
			f, err := t.measure(ctx, what, side.who, c, side.fn)
			if err != nil {
				return err
			}
			figures[fmt.Sprint(side.who[:5], c)] = f
		}
	}
	over := figures["count1"].p50 - figures["Vault1"].p50
	t.floor("token p50 at 1, over Vault's", "at most 2.5 ms", ms(over)+" ms", over <= 2500*time.Microsecond)
	share := figures["count16"].rate / figures["Vault16"].rate
	t.floor("token rate at 16, of Vault's", "at least 50%", fmt.Sprintf("%.0f%%", 100*share), share >= 0.5)
	return nil
}

func (d *dev) database(ctx context.Context, t *table) error {
	if !d.postgres {
		return nil
	}
	const what = "issue a database scope"
	direct := func(_ context.Context, worker, _ int) error {
		_, err := d.vault(worker, "GET", "database/creds/orders-read", nil)
		return err
	}
	figures := map[string]figure{}
	for _, c := range []int{1, 16} {
		for _, side := range []side{{"Vault's database/creds", direct}, {"countersign", d.ask("orders-db:read")}} {
			// Every role is in the table's access list, which PostgreSQL writes
			// anew for the next one: each row begins with an empty list.
			if _, err := d.vault(0, "POST", "sys/leases/revoke-prefix/database/creds", map[string]any{"sync": true}); err != nil {
				return err
			}
			f, err := t.measure(ctx, what, side.who, c, side.fn)
			if err != nil {
				return err
			}
			figures[fmt.Sprint(side.who[:5], c)] = f
		}
	}
	over := figures["count1"].p50 - figures["Vault1"].p50
	t.floor("database p50 at 1, over Vault's", "at most 4 ms", ms(over)+" ms", over <= 4*time.Millisecond)
	for _, c := range []int{1, 16} {
		share := figures[fmt.Sprint("count", c)].rate / figures[fmt.Sprint("Vault", c)].rate
		t.floor(fmt.Sprintf("database rate at %d, of Vault's", c), "at least 90%", fmt.Sprintf("%.0f%%", 100*share), share >= 0.9)
	}
	return nil
}
