package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
)

// The longest life of a credential here, and how long one is asked for: short,
// so that many end while the drill goes on.
const (
	maxTTL = time.Minute
	askTTL = 30 * time.Second
)

const (
	brokers   = 3
	gateways  = 2 // of the brokers, the first
	recorders = 2
)

// house is everything that the drill runs.
type house struct {
	dir, binary string
	net         *network
	processes   []*process // in the order in which they were started
	byName      map[string]*process
	front       *front
	console     *http.Client // the drill's own, which reaches every machine

	ca      *x509.Certificate
	caKey   *ecdsa.PrivateKey
	caFile  string
	logKey  string // verifier key of the log
	witness string // verifier key of the witness

	orchestrators []named
	reviewer      string // token
	redisPassword string
	superuser     string // password of PostgreSQL's superuser, in both servers
	unseal        string
	vault         *api.Client // root

	close []func()
}

type named struct{ name, token string }

// newHouse makes the machines and starts everything on them.
func newHouse(ctx context.Context, dir, binary string) (_ *house, err error) {
	h := &house{dir: dir, binary: binary, byName: map[string]*process{}, redisPassword: rand.Text(), superuser: rand.Text()}
	defer func() {
		if err != nil {
			h.stop()
		}
	}()
	h.net, err = newNetwork(dir, "orchestrator", "steps", "people", "broker-1", "broker-2", "broker-3",
		"recorder", "recorder-1", "recorder-2", "witness", "redis", "vault", "ledger", "orders", "web")
	if err != nil {
		return nil, err
	}
	for from, to := range map[string][]string{
		"orchestrator": {"broker-1", "broker-2", "broker-3"},
		"steps":        {"broker-1", "broker-2", "vault", "orders"},
		"people":       {"recorder"},
		"broker-1":     {"recorder", "redis", "vault", "orders", "web"},
		"broker-2":     {"recorder", "redis", "vault", "orders", "web"},
		"broker-3":     {"recorder", "redis", "vault"},
		"recorder":     {"recorder-1", "recorder-2"},
		"recorder-1":   {"ledger", "witness", "people"},
		"recorder-2":   {"ledger", "witness", "people"},
		"vault":        {"orders"},
	} {
		if err := h.net.open(from, to...); err != nil {
			return nil, err
		}
	}
	if err := h.authority(); err != nil {
		return nil, err
	}
	h.console = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, start := range []func(context.Context) error{
		h.startPostgres, h.startVault, h.startRedis, h.startProvider, h.prepare, h.startWitness, h.startRecorders, h.startWeb, h.startBrokers,
	} {
		if err := start(ctx); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (h *house) stop() {
	for _, p := range slices.Backward(h.processes) {
		p.stop()
		_ = unix.Unmount(p.disk, unix.MNT_DETACH) // so that the directory can be removed
	}
	for _, f := range slices.Backward(h.close) {
		f()
	}
}

func (h *house) file(name string) string { return filepath.Join(h.dir, name) }

func (h *house) write(name, text string) error {
	return os.WriteFile(h.file(name), []byte(text), 0o600)
}

// start makes and supervises a process on the machine of its name.
func (h *house) start(ctx context.Context, p *process) error {
	h.processes = append(h.processes, p)
	h.byName[p.name] = p
	p.supervise()
	if err := p.serves(ctx, 2*time.Minute); err != nil {
		b, _ := os.ReadFile(p.log)
		return fmt.Errorf("%w; it said: %s", err, b[max(0, len(b)-2000):])
	}
	return nil
}

// cli runs the program itself, as an operator does, and returns what it prints.
func (h *house) cli(args ...string) (string, error) {
	cmd := exec.Command(h.binary, args...)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return string(out), fmt.Errorf("countersign %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// authority makes the certificate authority that everything here trusts, and a
// certificate for each machine: NAME.pem and NAME.key.
func (h *house) authority() error {
	var err error
	if h.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	sign := func(serial int64, c *x509.Certificate, key *ecdsa.PrivateKey, file string) error {
		c.SerialNumber = big.NewInt(serial)
		// Long before and after now: clocks are set wrong.
		c.NotBefore, c.NotAfter = time.Now().Add(-24*time.Hour), time.Now().Add(48*time.Hour)
		parent := c
		if h.ca != nil {
			parent = h.ca
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), h.caKey)
		if err != nil {
			return err
		}
		return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	h.caFile = h.file("ca.pem")
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "drill"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if err := sign(1, ca, h.caKey, h.caFile); err != nil {
		return err
	}
	h.ca = ca
	for i, name := range h.net.order {
		n := h.net.nodes[name]
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		names := []string{n.host()}
		if strings.HasPrefix(name, "recorder-") {
			names = append(names, h.net.nodes["recorder"].host()) // the address that both share
		}
		c := &x509.Certificate{
			Subject: pkix.Name{CommonName: n.host()}, DNSNames: names, IPAddresses: []net.IP{net.ParseIP(n.ip)},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		if err := sign(int64(i)+2, c, key, h.file(name+".pem")); err != nil {
			return err
		}
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return err
		}
		if err := h.write(name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))); err != nil {
			return err
		}
	}
	// The system's authorities, for every process that is started from here.
	return os.Setenv("SSL_CERT_FILE", h.caFile)
}

// startPostgres starts the ledger's server and the target's.
func (h *house) startPostgres(ctx context.Context) error {
	bin, err := postgresPrograms()
	if err != nil {
		return err
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return fmt.Errorf("PostgreSQL does not run as root, and there is no user postgres: %w", err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	for _, name := range []string{"ledger", "orders"} {
		n := h.net.nodes[name]
		p, err := newProcess(h.dir, name, n, "1g", filepath.Join(bin, "postgres"), "-D", "", "-p", "5432")
		if err != nil {
			return err
		}
		p.user = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		data := p.file("data")
		p.argv[2] = data
		if err := os.Mkdir(data, 0o700); err != nil {
			return err
		}
		for _, x := range []struct{ name, text string }{{"password", h.superuser}, {"key.pem", ""}} {
			if x.name == "key.pem" {
				b, err := os.ReadFile(h.file(name + ".key"))
				if err != nil {
					return err
				}
				x.text = string(b)
			}
			if err := os.WriteFile(p.file(x.name), []byte(x.text), 0o600); err != nil {
				return err
			}
			if err := os.Chown(p.file(x.name), uid, gid); err != nil {
				return err
			}
		}
		if err := errors.Join(os.Chown(data, uid, gid), os.Chown(p.disk, uid, gid)); err != nil {
			return err
		}
		initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "-A", "scram-sha-256",
			"--pwfile", p.file("password"), "--no-sync", "--no-instructions", "-E", "UTF8", "--locale=C")
		initdb.SysProcAttr, initdb.Dir = &syscall.SysProcAttr{Credential: p.user}, "/"
		if out, err := initdb.CombinedOutput(); err != nil {
			return fmt.Errorf("initdb: %w: %s", err, out)
		}
		for file, text := range map[string]string{
			"postgresql.conf": fmt.Sprintf("\nlisten_addresses='%s'\nunix_socket_directories=''\nssl=on\nssl_cert_file='%s'\nssl_key_file='%s'\nmax_connections=200\nmax_wal_size=256MB\n",
				n.ip, h.file(name+".pem"), p.file("key.pem")),
			"pg_hba.conf": "\nhostssl all all 0.0.0.0/0 scram-sha-256\n",
		} {
			f, err := os.OpenFile(filepath.Join(data, file), os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteString(text)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
		dsn := h.dsn(name, "postgres", h.superuser, "postgres")
		p.ready = func(ctx context.Context) error { return h.sql(ctx, dsn) }
		if err := h.start(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// dsn is how to reach a PostgreSQL here.
func (h *house) dsn(node, user, password, database string) string {
	return fmt.Sprintf("postgres://%s:%s@%s:5432/%s?sslmode=verify-full&sslrootcert=%s&connect_timeout=5", user, password, h.net.nodes[node].host(), database, h.caFile)
}

// sql runs statements at dsn; none: it only connects.
func (h *house) sql(ctx context.Context, dsn string, statements ...string) error {
	c, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx))
	for _, s := range statements {
		if _, err := c.Exec(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return nil
}

func postgresPrograms() (string, error) {
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(p), nil
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errors.New("PostgreSQL's server programs are not installed: apt-get install postgresql")
	}
	return filepath.Dir(slices.Max(found)), nil
}

// startVault starts a Vault that keeps its state on a disk, and unseals it after
// each start, as its operator would.
func (h *house) startVault(ctx context.Context) error {
	binary, err := vaultdev.Find()
	if err != nil {
		return err
	}
	n := h.net.nodes["vault"]
	p, err := newProcess(h.dir, "vault", n, "1g", binary, "server", "-config", h.file("vault.hcl"))
	if err != nil {
		return err
	}
	if err := h.write("vault.hcl", fmt.Sprintf(`
storage "file" { path = %q }
listener "tcp" {
  address = "%s:8200"
  tls_cert_file = %q
  tls_key_file = %q
}
api_addr = "https://%s:8200"
disable_mlock = true
log_level = "warn"
`, p.file("data"), n.ip, h.file("vault.pem"), h.file("vault.key"), n.host())); err != nil {
		return err
	}
	client, err := vaultdev.NewClient("https://"+n.host()+":8200", "")
	if err != nil {
		return err
	}
	client.SetClientTimeout(10 * time.Second)
	client.SetMaxRetries(0)
	h.vault = client
	p.ready = func(ctx context.Context) error {
		s, err := client.Sys().HealthWithContext(ctx)
		if err == nil && (s.Sealed || s.Standby || !s.Initialized) {
			err = errors.New("sealed")
		}
		return err
	}
	p.after = func(ctx context.Context) error {
		s, err := client.Sys().SealStatusWithContext(ctx)
		if err != nil {
			return err
		}
		if !s.Initialized {
			i, err := client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
			if err != nil {
				return err
			}
			h.unseal = i.Keys[0]
			client.SetToken(i.RootToken)
		} else if !s.Sealed {
			return nil
		}
		_, err = client.Sys().UnsealWithContext(ctx, h.unseal)
		return err
	}
	if err := h.start(ctx, p); err != nil {
		return err
	}
	return until(ctx, time.Minute, "Vault's audit log is on", func() error {
		return client.Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": p.file("audit.log")}})
	})
}

func (h *house) startRedis(ctx context.Context) error {
	n := h.net.nodes["redis"]
	p, err := newProcess(h.dir, "redis", n, "64m", "redis-server", h.file("redis.conf"))
	if err != nil {
		return err
	}
	if err := errors.Join(
		h.write("redis.acl", fmt.Sprintf("user default on >%s ~* &* +@all\nuser broker on >%s %s\n", h.superuser, h.redisPassword, redisRights)),
		h.write("redis.conf", fmt.Sprintf(`
bind %s
port 0
tls-port 6379
tls-cert-file %s
tls-key-file %s
tls-ca-cert-file %s
tls-auth-clients no
appendonly yes
save ""
dir %s
aclfile %s
`, n.ip, h.file("redis.pem"), h.file("redis.key"), h.caFile, p.disk, h.file("redis.acl")))); err != nil {
		return err
	}
	c := h.redis("default", h.superuser, n.dial)
	h.close = append(h.close, func() { _ = c.Close() })
	p.ready = func(ctx context.Context) error { return c.Ping(ctx).Err() }
	return h.start(ctx, p)
}

// redisRights are those of the broker's ACL user, as docs/operations.md has them.
const redisRights = "resetkeys ~countersign:* resetchannels -@all +ping +select +get +set +del +sadd +srem +smembers +pexpire +expireat +zadd +zrem +zcard +zscore +zremrangebyscore +zrange +eval +evalsha +time"

// go-redis prints what it also returns.
func init() { redis.SetLogger(silent{}) }

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// redis is a client of the drill's Redis.
func (h *house) redis(user, password string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *redis.Client {
	n := h.net.nodes["redis"]
	return redis.NewClient(&redis.Options{
		Addr: n.host() + ":6379", Username: user, Password: password, DialTimeout: 2 * time.Second, MaxRetries: -1, DialerRetries: 1,
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return tls.Client(conn, &tls.Config{ServerName: n.host()}), nil
		},
	})
}

// startProvider serves an OpenID provider on the people's machine.
func (h *house) startProvider(context.Context) error {
	n := h.net.nodes["people"]
	var users []oidcdev.User
	for _, name := range approvers {
		users = append(users, oidcdev.User{Name: name, Groups: []string{"dba", "sre"}})
	}
	p, err := oidcdev.New(oidcdev.Options{
		Issuer: "https://" + n.host(), ClientID: "countersign", RedirectURIs: []string{h.recorderURL() + "/login/callback"}, Users: users,
	})
	if err != nil {
		return err
	}
	l, err := n.listen("443")
	if err != nil {
		return err
	}
	s := &http.Server{Handler: p.Handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.ServeTLS(l, h.file("people.pem"), h.file("people.key")) }()
	h.close = append(h.close, func() { _ = s.Close() })
	return nil
}

// recorderURL is the one address of both recorders.
func (h *house) recorderURL() string { return "https://" + h.net.nodes["recorder"].host() + ":8788" }

func (h *house) brokerURL(i int) string {
	return fmt.Sprintf("https://%s:8787", h.net.nodes[fmt.Sprintf("broker-%d", i)].host())
}

var ttls = regexp.MustCompile(`(max|default)_ttl: \S+`)

// prepare does what operators do once: keys, tokens, the ledger's schema, the
// catalogue and what it needs in Vault.
func (h *house) prepare(ctx context.Context) error {
	if err := h.sql(ctx, h.dsn("ledger", "postgres", h.superuser, "postgres"),
		"CREATE ROLE recorder LOGIN PASSWORD '"+h.superuser+"'", "CREATE ROLE owner LOGIN PASSWORD '"+h.superuser+"'",
		"CREATE DATABASE ledger ENCODING 'UTF8' TEMPLATE template0 OWNER owner"); err != nil {
		return err
	}
	catalogue := ttls.ReplaceAllStringFunc(string(scopes.Demo(&scopes.Connection{Host: h.net.nodes["orders"].host(), Port: 5432, Database: "postgres"})), func(s string) string {
		if strings.HasPrefix(s, "max") {
			return "max_ttl: " + maxTTL.String()
		}
		return "default_ttl: " + askTTL.String()
	})
	if err := errors.Join(h.write("owner.dsn", h.dsn("ledger", "owner", h.superuser, "ledger")),
		h.write("recorder.dsn", h.dsn("ledger", "recorder", h.superuser, "ledger")), h.write("catalogue.yaml", catalogue)); err != nil {
		return err
	}
	var err error
	cli := func(args ...string) (out string) {
		if err == nil {
			out, err = h.cli(args...)
		}
		return out
	}
	cli("ledger", "init", "--postgres", h.file("owner.dsn"), "--role", "recorder")
	h.logKey = cli("key", "generate", "log", "--name", domain+"/log", "--out", h.file("log.key"))
	h.witness = cli("key", "generate", "witness", "--name", domain+"/witness", "--out", h.file("witness-note.key"))
	cli("key", "generate", "identity", "--out", h.file("identity.key"))
	cli("key", "generate", "privacy", "--out", h.file("privacy.key"))
	for i := range brokers {
		name := fmt.Sprintf("broker-%d", i+1)
		token := cli("token", "create", "--file", h.file("recorder-tokens"), "--role", "writer", "--name", name)
		err = errors.Join(err, h.write(name+".token", token))
	}
	h.reviewer = cli("token", "create", "--file", h.file("recorder-tokens"), "--role", "reviewer", "--name", "reviewer")
	for _, name := range []string{"ci", "nightly", "batch"} {
		h.orchestrators = append(h.orchestrators, named{name, cli("token", "create", "--file", h.file("orchestrators"), "--role", "orchestrator", "--name", name, "--owner", "user:owner")})
	}
	if err != nil {
		return err
	}
	set, err := scopes.Open(h.file("catalogue.yaml"), "")
	if err != nil {
		return err
	}
	prepared, err := vaultdev.Prepare(ctx, h.vault, vaultdev.Options{Scopes: set.Current(), Postgres: h.dsn("orders", "postgres", h.superuser, "postgres")})
	if err != nil {
		return err
	}
	return h.write("vault.token", prepared.BrokerToken)
}

// startWeb serves a target of the HTTP gateway, which wants the key that Vault
// keeps.
func (h *house) startWeb(ctx context.Context) error {
	s, err := h.vault.Logical().ReadWithContext(ctx, "secret/data/http-demo")
	if err != nil || s == nil {
		return fmt.Errorf("reading the web target's key: %w", err)
	}
	data, _ := s.Data["data"].(map[string]any)
	key, _ := data["key"].(string)
	l, err := h.net.nodes["web"].listen("80")
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if key == "" || r.Header.Get("Authorization") != "Bearer "+key {
			http.Error(w, "the key is missing or wrong", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"path":"`+r.URL.Path+`","email":"ada@example.com"}`)
	})}
	go func() { _ = server.Serve(l) }()
	h.close = append(h.close, func() { _ = server.Close() })
	return nil
}

// answers says whether url answers path with 200.
func (h *house) answers(ctx context.Context, url string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := h.console.Do(r)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(url + " answers " + res.Status)
	}
	return nil
}

func (h *house) startWitness(ctx context.Context) error {
	n := h.net.nodes["witness"]
	p, err := newProcess(h.dir, "witness", n, "16m", h.binary, "witness", "--config", h.file("witness.yaml"))
	if err != nil {
		return err
	}
	if err := h.write("witness.yaml", fmt.Sprintf(`
listen: {addr: "%s:8790", cert: %q, key: %q}
key: %q
dir: %q
logs: [{key: %q}]
`, n.ip, h.file("witness.pem"), h.file("witness.key"), h.file("witness-note.key"), p.file("state"), h.logKey)); err != nil {
		return err
	}
	p.ready = func(ctx context.Context) error { return h.answers(ctx, "https://"+n.host()+":8790/readyz") }
	return h.start(ctx, p)
}

// startRecorders starts two recorders on one ledger, and the one address by which
// they are reached.
func (h *house) startRecorders(ctx context.Context) error {
	shared := h.file("shared") // storage that both mount
	if err := os.Mkdir(shared, 0o700); err != nil {
		return err
	}
	h.front = newFront(h)
	h.close = append(h.close, h.front.close)
	if err := h.front.start(); err != nil {
		return err
	}
	for i := range recorders {
		name := fmt.Sprintf("recorder-%d", i+1)
		n := h.net.nodes[name]
		p, err := newProcess(h.dir, name, n, "64m", h.binary, "record", "--config", h.file(name+".yaml"))
		if err != nil {
			return err
		}
		if err := h.write(name+".yaml", fmt.Sprintf(`
listen: {addr: "%s:8788", cert: %q, key: %q}
dir: %q
postgres_file: %q
standby: true
keys_file: %q
log_key: %q
privacy_key: %q
tokens: %q
publish: 1s
witnesses: {servers: [{url: "https://%s:8790", key: %q}]}
approval:
  base_url: %q
  catalogue: %q
  oidc: {issuer: "https://%s", client_id: countersign}
`, n.ip, h.file(name+".pem"), h.file(name+".key"), p.file("state"), h.file("recorder.dsn"), filepath.Join(shared, "details-keys.db"),
			h.file("log.key"), h.file("privacy.key"), h.file("recorder-tokens"), h.net.nodes["witness"].host(), h.witness,
			h.recorderURL(), h.file("catalogue.yaml"), h.net.nodes["people"].host())); err != nil {
			return err
		}
		url := "https://" + n.host() + ":8788"
		if i == 0 {
			p.ready = func(ctx context.Context) error { return h.answers(ctx, url+"/readyz") }
		} else {
			// As docs/operations.md asks for before a standby's first start.
			head, err := os.ReadFile(h.byName["recorder-1"].file("state/head"))
			if err != nil {
				return err
			}
			if err := errors.Join(os.MkdirAll(p.file("state"), 0o700), os.WriteFile(p.file("state/head"), head, 0o600)); err != nil {
				return err
			}
		}
		if i > 0 {
			p.ready = func(ctx context.Context) error { return h.answers(ctx, url+"/healthz") }
		}
		if err := h.start(ctx, p); err != nil {
			return err
		}
		p.ready = func(ctx context.Context) error { return h.answers(ctx, url+"/healthz") }
	}
	return nil
}

func (h *house) startBrokers(ctx context.Context) error {
	if err := h.write("redis.url", fmt.Sprintf("rediss://broker:%s@%s:6379/0", h.redisPassword, h.net.nodes["redis"].host())); err != nil {
		return err
	}
	for i := 1; i <= brokers; i++ {
		name := fmt.Sprintf("broker-%d", i)
		n := h.net.nodes[name]
		p, err := newProcess(h.dir, name, n, "16m", h.binary, "serve", "--config", h.file(name+".yaml"))
		if err != nil {
			return err
		}
		listen := func(port string) string {
			return fmt.Sprintf("{addr: \"%s:%s\", cert: %q, key: %q}", n.ip, port, h.file(name+".pem"), h.file(name+".key"))
		}
		text := fmt.Sprintf(`
listen: %s
public_url: "https://countersign.%s"
trust_domain: %s
identity_key: %q
privacy_key: %q
catalogue: %q
recorder: {url: %q, writer: %s, token_file: %q, log_key: %q, head_file: %q}
vault: {addr: "https://%s:8200", token_file: %q}
redis: {url_file: %q}
orchestrators: {tokens: %q}
limits: {each: {rate: 500, live: 5000, pending: 500}}
`, listen("8787"), domain, domain, h.file("identity.key"), h.file("privacy.key"), h.file("catalogue.yaml"),
			h.recorderURL(), name, h.file(name+".token"), h.logKey, p.file("head"), h.net.nodes["vault"].host(), h.file("vault.token"),
			h.file("redis.url"), h.file("orchestrators"))
		if i <= gateways {
			text += fmt.Sprintf(`
gateway:
  http: {listen: %s, url: "https://%s:8789"}
  postgres: {listen: %s, address: "%s:8790"}
  upstreams: {demo.internal: "%s:80"}
  ca_file: %q
`, listen("8789"), n.host(), listen("8790"), n.host(), h.net.nodes["web"].host(), h.caFile)
		}
		if err := h.write(name+".yaml", text); err != nil {
			return err
		}
		url := h.brokerURL(i)
		p.ready = func(ctx context.Context) error { return h.answers(ctx, url+"/readyz") }
		if err := h.start(ctx, p); err != nil {
			return err
		}
	}
	return nil
}
