package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/api/steps"
	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/trust"
)

func serveCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run the broker: the machines' side",
		Long: `Run the broker, which orchestrators ask for credentials. docs/configuration.md
lists every key of the configuration. SIGHUP reads catalogue, policy and
identity keys again; SIGTERM finishes what is under way and ends, a second one
ends at once.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			hangups := catchHangups()
			defer hangups.release()
			var c serveConfig
			return runConfigured(config, &c, func(log *zap.Logger) error { return serve(cmd.Context(), &c, hangups, log) })
		},
	}
	configFlag(cmd, &config)
	return cmd
}

// serve runs the broker of a configuration until ctx ends.
func serve(ctx context.Context, c *serveConfig, hangups hangups, log *zap.Logger) error {
	o, err := c.options(log)
	if err != nil {
		return err
	}
	certs, tls, err := c.Listen.open(log)
	if err != nil {
		return err
	}
	o.certs = &auth.ClientCerts{Trust: certs, Role: auth.Orchestrator, Certs: c.Orchestrators.certs()}
	defer o.tracing.close()
	if c.Metrics != "" {
		o.metrics = newMachineMetrics(newMetrics(prometheus.NewRegistry()))
		stop, err := o.metrics.serve(c.Metrics, log)
		if err != nil {
			return err
		}
		defer stop()
	}
	m, err := openMachines(ctx, o)
	if err != nil {
		return err
	}
	defer m.close()
	l, err := net.Listen("tcp", c.Listen.Addr)
	if err != nil {
		return fmt.Errorf("listen.addr: %w", err)
	}
	access := map[string]accessListener{}
	if c.Gateway != nil {
		if access, err = c.Gateway.listen(log); err != nil {
			l.Close()
			return err
		}
	}
	log.Info("serving", zap.Stringer("addr", l.Addr()), zap.Bool("tls", tls != nil), zap.String("version", buildVersion()))
	stop := hangups.each(m.reload)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.serve(ctx, l, tls, c.Drain) })
	if err := m.serveAccess(ctx, access, c.Drain, group.Go); err != nil {
		group.Go(func() error { return err })
	}
	return group.Wait()
}

// options resolves a configuration: it reads every file that it names.
func (c *serveConfig) options(log *zap.Logger) (*machinesOptions, error) {
	o := &machinesOptions{
		writer: c.Recorder.Writer, trustDomain: c.TrustDomain, publicURL: strings.TrimSuffix(c.PublicURL, "/"),
		identityKey: c.IdentityKey, identityLead: c.IdentityLead, peopleURL: cmp.Or(c.Recorder.Page, c.Recorder.URL),
		vault:    issuer.Config{Addr: c.Vault.Addr, Namespace: c.Vault.Namespace, CA: c.Vault.CA, Login: issuer.Login{TokenFile: c.Vault.Token}},
		firstTTL: c.FirstTTL, limits: c.Limits, log: log,
	}
	if a := c.Vault.AppRole; a != nil {
		o.vault.Login.AppRole = &issuer.AppRole{Mount: a.Mount, RoleID: a.RoleID, SecretIDFile: a.SecretID}
	}
	var err error
	if o.privacyKey, err = readPrivacyKey(c.PrivacyKey); err != nil {
		return nil, err
	}
	if o.scopes, err = scopes.Open(c.Catalogue, c.Policy); err != nil {
		return nil, err
	}
	if o.logKey, err = store.NewLogVerifier(c.Recorder.LogKey); err != nil {
		return nil, fmt.Errorf("recorder.log_key: %w", err)
	}
	if o.tracing, err = c.Tracing.open(context.Background(), "serve", c.Recorder.Writer, log); err != nil {
		return nil, err
	}
	if o.recorder, err = c.Recorder.client(o.logKey, log, o.tracing); err != nil {
		return nil, err
	}
	if c.Orchestrators.Tokens != "" {
		if o.tokens, err = auth.OpenTokens(c.Orchestrators.Tokens, nil); err != nil {
			return nil, fmt.Errorf("orchestrators.tokens: %w", err)
		}
	}
	if len(c.Orchestrators.OIDC) > 0 {
		if o.oidc, err = auth.NewIssuers(c.Orchestrators.OIDC, nil); err != nil {
			return nil, fmt.Errorf("orchestrators.oidc: %w", err)
		}
	}
	if o.redis, err = c.Redis.options(log.Named("redis")); err != nil {
		return nil, err
	}
	if c.Gateway != nil {
		if o.gateway, err = c.Gateway.options(log); err != nil {
			return nil, err
		}
		o.proxyCA = c.Gateway.ProxyCA
	}
	return o, nil
}

// client is a client of the recorder that c names, whose calls t traces.
func (c *recorderConfig) client(logKey *store.LogVerifier, log *zap.Logger, t *tracing) (*client.Recorder, error) {
	transport, err := c.transport(log)
	if err != nil {
		return nil, err
	}
	conf := client.RecorderConfig{
		Config: client.Config{URL: c.URL, Transport: t.transport(transport, recorderCall)},
		Log:    logKey, HeadFile: c.HeadFile, Writer: c.Writer, Logger: log.Named("recorder-client"),
	}
	if c.Token != "" {
		if _, err := readSecret(c.Token); err != nil {
			return nil, fmt.Errorf("recorder.token_file: %w", err)
		}
		conf.Token = func() (string, error) { return readSecret(c.Token) }
	}
	return client.NewRecorder(conf)
}

// transport is how c's recorder is reached: by its authority, with this broker's
// certificate where it has one.
func (c *recorderConfig) transport(log *zap.Logger) (*trust.Transport, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	// Appends of a busy broker keep their connections.
	transport.MaxIdleConnsPerHost = 64
	certs, err := trust.Open(trust.Files{CA: c.CA, Cert: c.Cert, Key: c.Key}, log.Named("tls"))
	if err != nil {
		return nil, fmt.Errorf("recorder: ca, cert and key: %w", err)
	}
	return certs.Transport(transport), nil
}

// machinesOptions are what one broker process is made of.
type machinesOptions struct {
	writer, trustDomain, publicURL string
	peopleURL                      string // where people approve: base of the recorder's pages
	identityKey                    string // file
	identityLead                   time.Duration
	privacyKey                     store.PrivacyKey
	scopes                         *scopes.InForce
	logKey                         *store.LogVerifier
	recorder                       *client.Recorder
	tokens                         *auth.Tokens      // nil: none
	oidc                           *auth.Issuers     // nil: none
	certs                          *auth.ClientCerts // nil: none
	vault                          issuer.Config     // address and login; an empty address: none
	redis                          inflight.Options
	limits                         broker.Limits
	firstTTL                       time.Duration
	gateway                        *gateway.Config // the access path, but for what it shares with the broker; nil: none
	proxyCA                        string          // directory of the forward proxy's authority; empty: no forward proxy
	metrics                        *machineMetrics // nil: nothing is measured
	tracing                        *tracing        // nil: nothing is traced
	log                            *zap.Logger
}

// machines is the machines' side: one broker and its API.
type machines struct {
	o        *machinesOptions
	identity *issuer.Identity
	issuer   *issuer.Issuer
	inflight *inflight.Store
	gateway  *gateway.Gateway // nil: no access path
	broker   *broker.Broker
	refusals *auth.Refusals
	handler  http.Handler
	gates    sync.WaitGroup // listeners of the access path
}

func openMachines(ctx context.Context, o *machinesOptions) (_ *machines, err error) {
	m := &machines{o: o}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	m.identity, err = issuer.OpenIdentity(issuer.IdentityConfig{
		Issuer: o.publicURL, TrustDomain: o.trustDomain, KeyFile: o.identityKey, Lead: o.identityLead,
	})
	if err != nil {
		return nil, err
	}
	vault := o.vault
	vault.TrustDomain, vault.Log, vault.Scopes, vault.Identity = o.trustDomain, o.logKey, o.scopes.Current, m.identity
	vault.FirstTTL, vault.Logger = o.firstTTL, o.log.Named("issuer")
	o.watch(&vault)
	recorder := watchedRecorder{o.recorder, o.metrics, o.tracing}
	if m.issuer, err = issuer.New(ctx, vault); err != nil {
		return nil, err
	}
	m.warnMissing(ctx)
	if m.inflight, err = inflight.Open(o.redis); err != nil {
		return nil, err
	}
	if o.gateway != nil {
		c := *o.gateway
		c.Recorder, c.Observer, c.TrustDomain, c.Log = recorder, o.observer(), o.trustDomain, o.log.Named("gateway")
		m.gateway = gateway.New(c)
	}
	m.broker, err = broker.New(broker.Config{
		Writer: o.writer, TrustDomain: o.trustDomain, Recorder: recorder, Issuer: watchedIssuer{m.issuer, o.metrics, o.tracing}, Scopes: o.scopes,
		Inflight: m.inflight, Identity: m.identity, Gateway: m.gateway, PeopleURL: o.peopleURL, PrivacyKey: o.privacyKey, Limits: o.limits, Grace: o.firstTTL, Log: o.log.Named("broker"),
	})
	if err != nil {
		return nil, err
	}
	o.scopes.OnChange(func(old, set *scopes.Set) error {
		return m.broker.PolicyLoaded(ctx, old, set)
	})
	m.refusals = auth.NewRefusals(o.trustDomain, o.log.Named("auth"), func(ctx context.Context, s *store.Submission) error {
		_, err := recorder.Append(ctx, s)
		return err
	})
	m.refusals.PrivacyKey = o.privacyKey
	m.handler = o.watched(steps.New(steps.Config{
		Broker: m.broker, Identity: m.identity, Log: o.log.Named("api"),
		Guard: &auth.Guard{Tokens: o.tokens, OIDC: o.oidc, Certs: o.certs, Refusals: m.refusals},
		Asked: o.askedFor,
	}))
	if o.metrics != nil {
		o.metrics.machines.Store(m)
	}
	return m, nil
}

// warnMissing says at start what Vault would refuse later.
func (m *machines) warnMissing(ctx context.Context) {
	missing, err := m.issuer.CheckCapabilities(ctx)
	if err != nil {
		m.o.log.Warn("the login's capabilities in Vault could not be checked", zap.Error(err))
	}
	for _, x := range missing {
		m.o.log.Warn("a capability is missing in Vault", zap.String("scope", x.Scope), zap.String("path", x.Path),
			zap.String("capability", x.Capability), zap.String("do", x.Note))
	}
}

const (
	drainDefault = 10 * time.Second
	lastAnswers  = 2 * time.Second // for answers that are being written when all else is done
)

// serve answers on l until ctx ends and what was under way then is done, or
// drain is over. Until then whoever asks, load balancers among them, is told
// that this broker shuts down.
func (m *machines) serve(ctx context.Context, l net.Listener, t *tls.Config, drain time.Duration) error {
	answering, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	stop := context.AfterFunc(ctx, func() {
		defer end()
		// Calls that wait are let go at once, so that only mints are waited for, and
		// what is open at the gateway.
		m.broker.Drain()
		late, cancel := context.WithTimeout(answering, cmp.Or(drain, drainDefault))
		defer cancel()
		done := make(chan struct{})
		go func() { m.gates.Wait(); close(done) }()
		m.broker.Settle(late)
		select {
		case <-done:
		case <-late.Done():
		}
	})
	defer stop()
	return server.Serve(answering, l, server.Config{Handler: m.handler, TLS: t, Log: m.o.log, Drain: lastAnswers})
}

// close ends what openMachines began, in the order in which the one needs the
// other. Credentials that are out stay out.
func (m *machines) close() {
	if m.o.metrics != nil {
		m.o.metrics.machines.Store(nil)
	}
	if m.refusals != nil {
		m.refusals.Close()
	}
	if m.broker != nil {
		_ = m.broker.Close()
	}
	if m.gateway != nil {
		m.gateway.Close() // what came of uses is on record before it returns
	}
	if m.inflight != nil {
		_ = m.inflight.Close()
	}
	if m.issuer != nil {
		_ = m.issuer.Close()
	}
	_ = m.o.recorder.Close()
}

// reload reads again what may change in a running broker. What cannot be read
// stays as it was.
func (m *machines) reload() {
	for _, x := range []struct {
		what string
		read func() error
	}{{"catalogue and policy", m.o.scopes.Reload}, {"identity keys", m.identity.Reload}} {
		if err := x.read(); err != nil {
			m.o.log.Error("not reloaded, the old stays in force", zap.String("what", x.what), zap.Error(err))
			continue
		}
		m.o.log.Info("reloaded", zap.String("what", x.what))
	}
}

// hangups are the SIGHUPs that a process was sent and that are not dealt with:
// one stands for several. None ends the process while they are caught, in its
// start and in its end either.
type hangups chan os.Signal

func catchHangups() hangups {
	h := make(hangups, 1)
	signal.Notify(h, syscall.SIGHUP)
	return h
}

func (h hangups) release() { signal.Stop(h) }

// each calls fn for each until the returned function is called.
func (h hangups) each(fn func()) (stop func()) {
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-h:
				fn()
			case <-done:
				return
			}
		}
	}()
	return func() { close(done) }
}

func configFlag(cmd *cobra.Command, config *string) {
	cmd.Flags().StringVar(config, "config", "", "configuration file (YAML)")
	_ = cmd.MarkFlagRequired("config")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
}

// runConfigured reads the file config into c, checks it, and runs a process of
// it that logs to stderr.
func runConfigured(config string, c interface{ check() error }, run func(*zap.Logger) error) error {
	if err := loadConfig(config, c); err != nil {
		return err
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("%s: %w", config, err)
	}
	log, err := newLogger()
	if err != nil {
		return err
	}
	return run(log)
}

// newLogger logs JSON lines to stderr, or to a file where one is named.
func newLogger(file ...string) (*zap.Logger, error) {
	c := zap.NewProductionConfig()
	for _, path := range file {
		// Before zap would make it with the umask's mode: a log names people.
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(f.Chmod(0o600), f.Close()); err != nil {
			return nil, err
		}
		c.OutputPaths = file
	}
	c.DisableStacktrace = true
	c.Sampling = nil
	c.EncoderConfig.TimeKey = "time"
	c.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	return c.Build()
}
