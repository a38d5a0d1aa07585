package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
)

// postgres is a PostgreSQL of the demo's own.
type postgres struct {
	dsn, version string
	stop         func()
}

// startPostgres runs a fresh PostgreSQL in dir, on a free port of 127.0.0.1.
// PostgreSQL refuses to run as root, so that there it runs as postgres.
func startPostgres(ctx context.Context, dir string) (*postgres, error) {
	bin, err := postgresBin()
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	attr := &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo to handle
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, fmt.Errorf("PostgreSQL does not run as root, and there is no user postgres: %w", err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(dir, uid, gid); err != nil {
			return nil, err
		}
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	password := filepath.Join(dir, "password")
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(password, []byte("demo-superuser\n"), 0o644); err != nil {
		return nil, err
	}
	init := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "--pwfile", password, "--auth", "scram-sha-256", "--no-sync", "--locale", "C", "-E", "UTF8")
	init.SysProcAttr, init.Dir = attr, "/"
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, lastLine(string(out)))
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-h", "127.0.0.1", "-p", strconv.Itoa(port), "-k", dir, "-c", "fsync=off")
	server := *attr
	cmd.SysProcAttr, cmd.Dir = &server, "/"
	var logged bytes.Buffer
	cmd.Stderr = &logged
	exited, err := vaultdev.Run(cmd)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	pg := &postgres{
		dsn: fmt.Sprintf("postgres://postgres:demo-superuser@127.0.0.1:%d/postgres?sslmode=disable", port),
		stop: func() {
			_ = cmd.Process.Signal(syscall.SIGINT) // fast shutdown
			<-exited
		},
	}
	for range 200 {
		out, err := command(ctx, nil, "psql", "-XAt", pg.dsn, "-c", "SHOW server_version")
		if err == nil {
			pg.version = fmt.Sprintf("%s on 127.0.0.1:%d", strings.TrimSpace(out), port)
			return pg, nil
		}
		select {
		case <-exited:
			return nil, fmt.Errorf("postgres ended: %s", lastLine(logged.String()))
		case <-ctx.Done():
			pg.stop()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	pg.stop()
	return nil, errors.New("postgres did not answer within 10 s")
}

// postgresBin is where the server programs lie; Debian keeps them off PATH.
func postgresBin() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path), nil
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errors.New("PostgreSQL's server programs are not installed: run this with `make demo`, which installs them, or `apt-get install postgresql`")
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

// dev is a running `countersign dev`, as its ready file describes it.
type dev struct {
	API      string `json:"api"`
	Recorder string `json:"recorder"`
	Vault    struct {
		Addr  string `json:"addr"`
		Token string `json:"token"`
	} `json:"vault"`
	LogKey        string  `json:"log_key"`
	Orchestrators []named `json:"orchestrators"`
	Approvers     []named `json:"approvers"`
	Reviewers     []named `json:"reviewers"`

	stop func()
}

type named struct{ Name, Token string }

func startDev(ctx context.Context, binary, dir, dsn string) (*dev, error) {
	ready := filepath.Join(filepath.Dir(dir), "ready.json")
	cmd := exec.Command(binary, "dev", "--dir", dir, "--addr", "127.0.0.1:0", "--postgres", dsn, "--ready-file", ready)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var logged bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &logged
	exited, err := vaultdev.Run(cmd)
	if err != nil {
		return nil, err
	}
	d := &dev{stop: func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		<-exited
	}}
	deadline := time.After(90 * time.Second)
	for {
		b, err := os.ReadFile(ready)
		if err == nil {
			return d, json.Unmarshal(b, d)
		}
		select {
		case <-exited:
			return nil, fmt.Errorf("countersign dev ended: %s", lastLine(logged.String()))
		case <-ctx.Done():
			d.stop()
			return nil, ctx.Err()
		case <-deadline:
			d.stop()
			return nil, fmt.Errorf("countersign dev was not ready within 90 s: %s", lastLine(logged.String()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// problem is an RFC 9457 problem document.
type problem struct {
	Type   string `json:"type"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
}

func (p problem) Error() string { return fmt.Sprintf("%d %s: %s", p.Status, p.slug(), p.Detail) }

func (p problem) slug() string { return p.Type[strings.LastIndex(p.Type, "/")+1:] }

// call calls the broker as the orchestrator "demo".
func (d *dev) call(ctx context.Context, method, path, body string, into any) error {
	return d.do(ctx, method, d.API+path, body, into)
}

func (d *dev) do(ctx context.Context, method, url, body string, into any, headers ...http.Header) error {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+d.Orchestrators[0].Token)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		maps.Copy(req.Header, h)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		p := problem{Status: res.StatusCode}
		if err := json.Unmarshal(b, &p); err != nil {
			return fmt.Errorf("%s %s: %s without a problem document", method, url, res.Status)
		}
		return p
	}
	if into == nil || len(b) == 0 {
		return nil
	}
	return json.Unmarshal(b, into)
}

// published is the size that the recorder's published checkpoint signs: its
// second line (C2SP tlog-checkpoint).
func (d *dev) published(ctx context.Context) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", d.Recorder+"/checkpoint", nil)
	if err != nil {
		return 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	if err != nil {
		return 0, err
	}
	lines := strings.SplitN(string(b), "\n", 3)
	if len(lines) < 3 {
		return 0, fmt.Errorf("%s/checkpoint answers %s", d.Recorder, res.Status)
	}
	return strconv.ParseInt(lines[1], 10, 64)
}

// issued is a 201 of POST /steps/{step}/credential.
type issued struct {
	Request string `json:"request"`
	Step    struct {
		Identity string `json:"identity"`
	} `json:"step"`
	Scope      string `json:"scope"`
	Target     string `json:"target"`
	Credential struct {
		Kind      string `json:"kind"`
		Revocable bool   `json:"revocable"`
		Token     string `json:"token"`
		Addr      string `json:"addr"`
		Username  string `json:"username"`
		Password  string `json:"password"`
		Host      string `json:"host"`
		Port      int    `json:"port"`
		Database  string `json:"database"`
		Address   string `json:"address"`
	} `json:"credential"`
	ExpiresIn int `json:"expires_in"`
	Ledger    struct {
		Index int64 `json:"index"`
	} `json:"ledger"`
}

func (d *demo) ask(ctx context.Context, step, body string) (*issued, error) {
	say("POST /steps/%s/credential  %s", step, body)
	var c issued
	if err := d.dev.call(ctx, "POST", "/steps/"+step+"/credential", body, &c); err != nil {
		return nil, err
	}
	d.newest = max(d.newest, c.Ledger.Index)
	say("201 for %s", c.Step.Identity)
	say("on record before it was answered: ledger index %d", c.Ledger.Index)
	return &c, nil
}

func expect(c *issued, kind string, revocable bool) error {
	if c.Credential.Kind != kind || c.Credential.Revocable != revocable {
		return fmt.Errorf("%s gave a credential of kind %s, revocable %t; want %s, %t", c.Scope, c.Credential.Kind, c.Credential.Revocable, kind, revocable)
	}
	return nil
}

// psql runs one statement as the step's role.
func (d *demo) psql(ctx context.Context, c *issued, statement string) (string, error) {
	k := c.Credential
	return command(ctx, []string{
		"PGHOST=" + k.Host, "PGPORT=" + strconv.Itoa(k.Port), "PGDATABASE=" + k.Database,
		"PGUSER=" + k.Username, "PGPASSWORD=" + k.Password, "PGCONNECT_TIMEOUT=10",
	}, "psql", "-X", "-w", "-v", "ON_ERROR_STOP=1", "-P", "footer=off", "-c", statement)
}

// vault calls Vault's HTTP API with the step's token.
func vault(ctx context.Context, c *issued, method, path, body string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.Credential.Addr+"/v1/"+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("X-Vault-Token", c.Credential.Token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	var reply struct {
		Data struct {
			Data json.RawMessage `json:"data"`
		} `json:"data"`
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err == nil && res.StatusCode == 200 {
		err = json.Unmarshal(b, &reply)
	}
	return res.StatusCode, string(reply.Data.Data), err
}

// command runs a program and returns its standard output; its last line of
// stderr is the error.
func command(ctx context.Context, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if said := lastLine(stderr.String()); said != "" {
			return stdout.String(), errors.New(said)
		}
		return stdout.String(), fmt.Errorf("%s: %w", name, err)
	}
	return stdout.String(), nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
