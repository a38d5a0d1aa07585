package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	devWriter      = "broker"
	devTrustDomain = "countersign.demo"
	devOrigin      = "countersign.demo/dev"
	devDrain       = 5 * time.Second
	devPublish     = 250 * time.Millisecond // somebody is watching
)

// devFlags are the flags of `countersign dev`.
type devFlags struct {
	dir, addr, vault, vaultToken, postgres, readyFile, notify, metrics string
	tables                                                             []string
	out                                                                io.Writer // the banner
}

func devCommand() *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run everything in one process, to try it out",
		Long: `Run broker, recorder and a development Vault in one process, with a catalogue
of demo scopes. DIR keeps the ledger, keys and tokens: started again, it goes
on with the same log. The ready file names every address and token.

--vault auto takes vault or bao on PATH, or the one that ` + "`make vault`" + ` built,
in memory and gone with this process; none does without; a URL uses that Vault,
and sets up the demo's engines, policies and roles there with --vault-token.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.out = cmd.OutOrStdout()
			return runDev(cmd.Context(), f)
		},
	}
	cmd.PersistentFlags().StringVar(&f.dir, "dir", ".countersign", "directory of ledger, keys and tokens; made where it is missing")
	cmd.Flags().StringVar(&f.addr, "addr", "127.0.0.1:8787", "address of the broker; the other listeners take the next ports, or free ones with port 0")
	cmd.Flags().StringVar(&f.vault, "vault", "auto", "auto, none, or a Vault's URL")
	cmd.Flags().StringVar(&f.vaultToken, "vault-token", "", "a token of the Vault named by its URL that may set up the demo there")
	cmd.Flags().StringVar(&f.postgres, "postgres", "", "DSN of a PostgreSQL role that may create roles: adds the scopes orders-db:*")
	cmd.Flags().StringSliceVar(&f.tables, "tables", nil, "more tables of --postgres that orders-db:* reach through the gateway, once you GRANT them to the roles orders_read and orders_write")
	cmd.Flags().StringVar(&f.notify, "notify", "", "YAML file with the sections slack and webhooks of a recorder's configuration, to try them out")
	cmd.Flags().StringVar(&f.metrics, "metrics", "", "address of a listener for Prometheus, such as 127.0.0.1:9090; none: no metrics")
	cmd.PersistentFlags().StringVar(&f.readyFile, "ready-file", "", "where to write addresses and tokens when everything answers (default DIR/dev.json)")
	cmd.AddCommand(devShowCommand(&f))
	return cmd
}

func devShowCommand(f *devFlags) *cobra.Command {
	return &cobra.Command{
		Use:     "show FIELD",
		Short:   "Print one value of the ready file in DIR",
		Example: "  countersign dev show api\n  countersign dev show reviewers.reviewer-a",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := os.ReadFile(f.ready())
			if err != nil {
				return fmt.Errorf("%w; is `countersign dev` running with this --dir or --ready-file?", err)
			}
			var r ready
			if err := json.Unmarshal(b, &r); err != nil {
				return err
			}
			v, err := r.lookup(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), v)
			return err
		},
	}
}

// ready is the ready file's path.
func (f *devFlags) ready() string {
	if f.readyFile == "" {
		return filepath.Join(f.dir, "dev.json")
	}
	return f.readyFile
}

// lock takes the directory for this process, until it ends or unlock is called.
func (f *devFlags) lock() (unlock func(), err error) {
	h, err := os.OpenFile(filepath.Join(f.dir, "dev.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(h.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		h.Close()
		return nil, fmt.Errorf("another `countersign dev` runs in %s: stop it, or choose another --dir", f.dir)
	}
	return func() { h.Close() }, nil
}

// runDev runs everything until ctx ends or one part fails.
func runDev(ctx context.Context, f devFlags) error {
	show := "--dir " + f.dir // what `dev show` needs to find the ready file
	if f.readyFile != "" {
		show = "--ready-file " + f.readyFile
	}
	f.readyFile = f.ready()
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	// Before anything is touched that belongs to a dev which runs here already.
	unlock, err := f.lock()
	if err != nil {
		return err
	}
	defer unlock()
	// A file of an earlier run would tell of addresses that nobody answers at.
	if err := os.Remove(f.readyFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log, err := newLogger(filepath.Join(f.dir, "dev.log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Sync() }()

	files, err := openDevFiles(f.dir)
	if err != nil {
		return err
	}
	r := files.ready

	listeners, err := listenDev(f.addr)
	if err != nil {
		return err
	}
	defer listeners.close()
	r.API = "http://" + listeners.api.Addr().String()
	// WebAuthn takes no IP address for a relying party, so the people's side is
	// localhost (W3C WebAuthn, section 5.1.2).
	r.Recorder = "http://localhost:" + port(listeners.recorder)
	r.Gateway.HTTP = "http://" + listeners.http.Addr().String()
	r.Gateway.Postgres = listeners.postgres.Addr().String()
	r.Gateway.MCP = "http://" + listeners.mcp.Addr().String()

	set, err := devScopes(f.dir, f.postgres, f.tables)
	if err != nil {
		return err
	}
	// The recorder comes first: on an altered ledger nothing else may start.
	o := files.people(log.Named("recorder"))
	if o.approval, err = devApproval(f.dir, r.Recorder, set); err != nil {
		return err
	}
	if f.notify != "" {
		var c noticesConfig
		if err := loadConfig(f.notify, &c); err != nil {
			return err
		}
		if err := c.read(o.approval); err != nil {
			return fmt.Errorf("%s: %w", f.notify, err)
		}
	}
	var machines *machineMetrics
	if f.metrics != "" {
		if !loopback(f.metrics) {
			return fmt.Errorf("--metrics: %s is not of this machine alone: use 127.0.0.1", f.metrics)
		}
		m := newMetrics(prometheus.NewRegistry())
		o.metrics, machines = newPeopleMetrics(m), newMachineMetrics(m)
		stop, err := m.serve(f.metrics, log)
		if err != nil {
			return fmt.Errorf("--metrics: %w", err)
		}
		defer stop()
	}
	people, err := openPeople(ctx, o)
	if err != nil {
		return err
	}
	defer people.close()

	vault, stopVault, err := openDevVault(ctx, f, set, r.LogKey, log)
	if err != nil {
		return err
	}
	defer stopVault()
	r.Vault.Addr, r.Vault.Token = vault.addr, vault.token

	services, err := openDevServices(ctx, vault.client)
	if err != nil {
		return err
	}
	defer services.close()

	m, err := openDevBroker(ctx, files, people, &r, vault, services.upstreams(), set, machines, log.Named("broker"))
	if err != nil {
		return err
	}
	defer m.close()

	var group *errgroup.Group
	group, ctx = errgroup.WithContext(ctx)
	group.Go(func() error { return people.serve(ctx, listeners.recorder, nil, devDrain) })
	group.Go(func() error { return m.serve(ctx, listeners.api, nil, devDrain) })
	services.serve(ctx, log.Named("services"), group.Go)
	err = m.serveAccess(ctx, map[string]accessListener{
		store.ProtocolHTTP: {l: listeners.http}, store.ProtocolPostgres: {l: listeners.postgres}, store.ProtocolMCP: {l: listeners.mcp},
	}, devDrain, group.Go)
	if err != nil {
		group.Go(func() error { return err })
	}
	group.Go(func() error {
		if err := untilReady(ctx, r.API, r.Recorder); err != nil {
			return err
		}
		if err := r.write(f.readyFile); err != nil {
			return err
		}
		return f.banner(&r, show, people.ledger.Size())
	})
	defer os.Remove(f.readyFile)
	return group.Wait()
}

func (f *devFlags) banner(r *ready, show string, entries int64) error {
	vault := r.Vault.Addr
	if vault == "" {
		vault = "none; scopes that need it answer vault-unavailable"
	}
	_, err := fmt.Fprintf(f.out, `countersign dev is ready. It is for trying things out: one process, no TLS.

  broker    %[1]s
  recorder  %[2]s, %[7]d entries
  Vault     %[3]s
  tokens    %[4]s
  log       %[5]s

Try, in another terminal:

  export COUNTERSIGN_ADDR=%[1]s COUNTERSIGN_TOKEN=$(countersign dev show %[6]s orchestrators.demo)
  countersign run --scope vault:demo-read --run run-1 --step s1 -- env
  countersign request --scope identity:step --run run-1 --step s2
  countersign request --scope vault:demo-write --run run-1 --step s3 --reason "rotate it" --wait 5m
  and approve that at %[2]s/approvals, as approver-a

  export COUNTERSIGN_RECORDER=%[2]s COUNTERSIGN_TOKEN=$(countersign dev show %[6]s reviewers.reviewer-a)
  countersign history
  countersign verify --key "$(countersign dev show %[6]s log_key)"

Ctrl-C stops it.
`, r.API, r.Recorder, vault, f.readyFile, filepath.Join(f.dir, "dev.log"), show, entries)
	return err
}

// devFiles are the keys and tokens that dev keeps in its directory.
type devFiles struct {
	dir        string
	signer     ledger.Options // Signer, Verifier and PrivacyKey alone
	tokens     *auth.Tokens
	logKey     *store.LogVerifier
	ready      ready // callers and log key
	identity   string
	privacyKey store.PrivacyKey
}

func openDevFiles(dir string) (*devFiles, error) {
	file := func(name string) string { return filepath.Join(dir, name) }
	f := &devFiles{dir: dir, identity: file("identity.key")}
	for name, generate := range map[string]func() (string, error){
		"log.key":     func() (string, error) { return generateLogKey(devOrigin) },
		"privacy.key": func() (string, error) { return generatePrivacyKey(), nil },
	} {
		if err := keep(file(name), generate); err != nil {
			return nil, err
		}
	}
	var err error
	if f.signer.Signer, f.signer.Verifier, err = readLogKey(file("log.key")); err != nil {
		return nil, err
	}
	if f.privacyKey, err = readPrivacyKey(file("privacy.key")); err != nil {
		return nil, err
	}
	if f.logKey, err = store.NewLogVerifier(f.signer.Verifier); err != nil {
		return nil, err
	}
	if f.ready, err = devCallers(dir); err != nil {
		return nil, err
	}
	f.ready.LogKey = f.signer.Verifier
	f.tokens, err = auth.OpenTokens(file("tokens"), nil)
	return f, err
}

func (f *devFiles) people(log *zap.Logger) *peopleOptions {
	return &peopleOptions{
		trustDomain: devTrustDomain, tokens: f.tokens, tokenFile: filepath.Join(f.dir, "tokens"), public: true, log: log,
		ledger: ledger.Options{
			Dir: filepath.Join(f.dir, "ledger"), HeadFile: filepath.Join(f.dir, "head"), KeysFile: filepath.Join(f.dir, "details-keys.db"),
			Signer: f.signer.Signer, Verifier: f.signer.Verifier, PrivacyKey: f.privacyKey, Log: log.Named("ledger"),
			PublishEvery: devPublish,
		},
	}
}

// devListeners are dev's listeners.
type devListeners struct{ api, recorder, http, postgres, mcp net.Listener }

// listenDev opens the broker's listener at addr and the others at the ports
// after it, or at free ones where addr's port is 0.
func listenDev(addr string) (*devListeners, error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("--addr: %w; write HOST:PORT, such as 127.0.0.1:8787", err)
	}
	first, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("--addr: port %q is no number", p)
	}
	if !loopback(addr) {
		return nil, fmt.Errorf("--addr: %s is not of this machine alone, and dev has no TLS and prints its tokens: use 127.0.0.1", addr)
	}
	var l devListeners
	for i, to := range []*net.Listener{&l.api, &l.recorder, &l.http, &l.postgres, &l.mcp} {
		n := uint64(0)
		if first != 0 {
			n = first + uint64(i)
		}
		at := net.JoinHostPort(host, strconv.FormatUint(n, 10))
		if *to, err = net.Listen("tcp", at); err != nil {
			l.close()
			return nil, fmt.Errorf("%w; choose other ports with --addr, or free ones with --addr 127.0.0.1:0", err)
		}
	}
	return &l, nil
}

func (l *devListeners) close() {
	for _, x := range []net.Listener{l.api, l.recorder, l.http, l.postgres, l.mcp} {
		if x != nil {
			x.Close()
		}
	}
}

func port(l net.Listener) string { return strconv.Itoa(l.Addr().(*net.TCPAddr).Port) }

// devScopes writes the demo catalogue into dir, to be read and copied, and
// loads it.
func devScopes(dir, postgres string, tables []string) (*scopes.InForce, error) {
	var orders *scopes.Connection
	if postgres != "" {
		c, err := pgx.ParseConfig(postgres)
		if err != nil {
			return nil, errors.New("--postgres is not a DSN such as postgres://user:password@127.0.0.1:5432/db") // the error would quote it
		}
		orders = &scopes.Connection{Host: c.Host, Port: int(c.Port), Database: c.Database}
		if strings.HasPrefix(c.Host, "/") { // the server's socket on this machine; steps connect over TCP
			orders.Host = "127.0.0.1"
		}
	}
	path := filepath.Join(dir, "catalogue.yaml")
	if err := durable.WriteFile(path, scopes.Demo(orders, tables...)); err != nil {
		return nil, err
	}
	return scopes.Open(path, "")
}

// devVault is the Vault that dev uses; without an address there is none.
type devVault struct {
	addr, token string      // token is the operator's, for the ready file
	broker      string      // the broker's own
	client      *api.Client // with token
}

// endRoles has Vault drop the PostgreSQL roles that are still live: this Vault
// forgets them when it ends, and nobody else knows them. What a crash leaves,
// the next start drops (vaultdev.Options.Owner).
func endRoles(ctx context.Context, s *vaultdev.Server, log *zap.Logger) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	c, err := s.Client()
	if err == nil {
		// PUT sys/leases/revoke-prefix/:prefix
		_, err = c.Logical().WriteWithContext(ctx, "sys/leases/revoke-prefix/database/creds", map[string]any{"sync": true})
	}
	if err != nil {
		log.Warn("roles of PostgreSQL may be left until the next start, or their TTL", zap.Error(err))
	}
}

// openDevVault finds or starts dev's Vault and sets it up. logKey is what tells
// this directory from another one's.
func openDevVault(ctx context.Context, f devFlags, set *scopes.InForce, logKey string, log *zap.Logger) (v devVault, stop func(), err error) {
	stop = func() {}
	o := vaultdev.Options{Scopes: set.Current(), Postgres: f.postgres}
	switch f.vault {
	case "none":
		return v, stop, nil
	case "auto":
		binary, err := vaultdev.Find()
		if err != nil {
			return v, stop, fmt.Errorf("%w; or start with --vault none", err)
		}
		s, err := vaultdev.Start(context.WithoutCancel(ctx), binary)
		if err != nil {
			return v, stop, err
		}
		stop = func() {
			if f.postgres != "" {
				endRoles(ctx, s, log)
			}
			s.Stop()
		}
		v.addr, v.token = s.Addr, s.RootToken
		sum := sha256.Sum256([]byte(logKey))
		o.Owner = hex.EncodeToString(sum[:6])
		go func() {
			<-s.Done()
			log.Info("Vault has ended")
		}()
	default:
		u, err := url.Parse(f.vault)
		if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
			return v, stop, fmt.Errorf("--vault is %q: write auto, none or a URL such as http://127.0.0.1:8200", f.vault)
		}
		if f.vaultToken == "" {
			return v, stop, errors.New("--vault URL needs --vault-token: a token that may set up the demo's engines, policies and roles there")
		}
		v.addr, v.token = f.vault, f.vaultToken
	}
	client, err := vaultdev.NewClient(v.addr, v.token)
	if err == nil {
		var p *vaultdev.Prepared
		if p, err = vaultdev.Prepare(ctx, client, o); err == nil {
			v.broker, v.client = p.BrokerToken, client
			return v, stop, nil
		}
	}
	stop()
	return v, func() {}, fmt.Errorf("setting up Vault for the demo: %w", err)
}

// openDevBroker opens the machines' side over the people's side of the same
// process. Between them are the same proofs and the same checks as between two
// hosts, and no network.
func openDevBroker(ctx context.Context, f *devFiles, p *people, r *ready, v devVault, upstreams map[string]string, set *scopes.InForce, metrics *machineMetrics, log *zap.Logger) (*machines, error) {
	recorder, err := client.NewRecorder(client.RecorderConfig{
		Local: record.Local{Ledger: p.ledger, Name: devWriter},
		Log:   f.logKey, HeadFile: filepath.Join(f.dir, "broker-head"), Writer: devWriter, Logger: log.Named("recorder-client"),
	})
	if err != nil {
		return nil, err
	}
	o := &machinesOptions{
		writer: devWriter, trustDomain: devTrustDomain, publicURL: r.API, peopleURL: r.Recorder, identityKey: f.identity,
		privacyKey: f.privacyKey, scopes: set, logKey: f.logKey, recorder: recorder, tokens: f.tokens, metrics: metrics, log: log,
		gateway: &gateway.Config{
			Addresses: map[string]string{store.ProtocolHTTP: r.Gateway.HTTP, store.ProtocolPostgres: r.Gateway.Postgres, store.ProtocolMCP: r.Gateway.MCP},
			Upstreams: upstreams,
		},
		proxyCA: filepath.Join(f.dir, "proxy-ca"),
	}
	if v.addr != "" {
		o.vault = issuer.Config{Addr: v.addr, Login: issuer.Login{Token: v.broker}}
	}
	return openMachines(ctx, o)
}

// untilReady returns when broker and recorder both answer.
func untilReady(ctx context.Context, urls ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for _, u := range urls {
		for {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, u+"/readyz", nil)
			if err != nil {
				return err
			}
			res, err := http.DefaultClient.Do(req)
			if err == nil {
				res.Body.Close()
				if res.StatusCode == http.StatusOK {
					break
				}
			}
			select {
			case <-ctx.Done():
				if errors.Is(ctx.Err(), context.DeadlineExceeded) {
					return fmt.Errorf("%s is not ready within 60 s; dev.log says why", u)
				}
				return nil // stopped before it was ready
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}
