package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/respond"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/retention"
	"github.com/countersign-dev/countersign/store/siem"
	"github.com/countersign-dev/countersign/store/vaultaudit"
	"github.com/countersign-dev/countersign/store/witness"
)

func recordCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "record --config FILE",
		Short: "Run the recorder: the people's side",
		Long: `Run the recorder, which keeps the ledger. docs/configuration.md lists every key
of the configuration. It refuses to start on a ledger that was altered, and
stops itself when it finds that later. Token files are read again whenever
they change; SIGTERM finishes what is under way and ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			hangups := catchHangups()
			defer hangups.release()
			var c recordConfig
			return runConfigured(config, &c, func(log *zap.Logger) error { return runRecord(cmd.Context(), &c, hangups, log) })
		},
	}
	configFlag(cmd, &config)
	return cmd
}

// runRecord runs the recorder of a configuration until ctx ends.
func runRecord(ctx context.Context, c *recordConfig, hangups hangups, log *zap.Logger) error {
	o, err := c.options(log)
	if err != nil {
		return err
	}
	certs, tls, err := c.Listen.open(log)
	if err != nil {
		return err
	}
	o.certs = &auth.ClientCerts{Trust: certs, Role: auth.Writer, Certs: c.Certs}
	l, err := net.Listen("tcp", c.Listen.Addr)
	if err != nil {
		return fmt.Errorf("listen.addr: %w", err)
	}
	log.Info("recorder", zap.Stringer("addr", l.Addr()), zap.Bool("tls", tls != nil),
		zap.String("log", o.ledger.Signer.Name()), zap.String("version", buildVersion()))
	defer o.tracing.close()
	if c.Metrics != "" {
		o.metrics = newPeopleMetrics(newMetrics(prometheus.NewRegistry()))
		// It answers while this recorder stands by, too.
		stop, err := o.metrics.serve(c.Metrics, log)
		if err != nil {
			return err
		}
		defer stop()
	}
	stop := hangups.each(func() {
		if o.approval == nil {
			log.Info("nothing to reload: token files are read again whenever they change")
		} else if err := o.approval.scopes.Reload(); err != nil {
			log.Error("not reloaded, the old stays in force", zap.String("what", "catalogue and policy"), zap.Error(err))
		} else {
			log.Info("reloaded", zap.String("what", "catalogue and policy"))
		}
	})
	defer stop()
	return recordOn(ctx, l, tls, o, c.Drain)
}

// recordOn answers on l until ctx ends: as the recorder while the ledger is
// open, and else with 503, as one that stands by for another or waits for its
// database. Once the ledger is lost with its connection, it is opened again from
// the start, with every check: another recorder may have written since.
func recordOn(ctx context.Context, l net.Listener, t *tls.Config, o *peopleOptions, drain time.Duration) error {
	group, ctx := errgroup.WithContext(ctx)
	h := &standby{log: o.log, served: make(chan struct{})}
	h.set(nil)
	group.Go(func() error {
		defer close(h.served)
		return server.Serve(ctx, l, server.Config{Handler: h, TLS: t, Log: o.log, Drain: drain})
	})
	group.Go(func() error {
		for {
			err := h.record(ctx, o)
			if ctx.Err() != nil {
				return nil
			}
			if !o.ledger.Standby || !errors.Is(err, ledger.ErrLost) {
				if err == nil {
					err = errors.New("the recorder stopped")
				}
				return err
			}
			o.log.Error("the ledger is lost, and opened again", zap.Error(err))
			select { // an answer of the database at once may be the same again
			case <-time.After(time.Second):
			case <-ctx.Done():
				return nil
			}
		}
	})
	return group.Wait()
}

// standby is the handler of a recorder's listener: the recorder that is open,
// or, while none is, one that says so.
type standby struct {
	log     *zap.Logger
	served  chan struct{} // closed when the listener's last call was answered
	current atomic.Pointer[http.Handler]
	waiting http.Handler
}

// set has h answer from now on, or, with nil, that nobody is recording here.
func (s *standby) set(h http.Handler) {
	if h == nil {
		if s.waiting == nil {
			// Nothing is logged: a load balancer asks all the time.
			r := server.NewRouter(zap.NewNop(), server.MaxBody)
			away := func(w http.ResponseWriter, r *http.Request) {
				// Behind one address with the active one, a connection that stayed
				// open would keep its caller here.
				w.Header().Set("Connection", "close")
				problem.Write(w, r, problem.LedgerUnavailable())
			}
			r.Get("/healthz", ok)
			r.NotFound(away)
			r.MethodNotAllowed(away)
			s.waiting = r
		}
		h = s.waiting
	}
	s.current.Store(&h)
}

func (s *standby) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*s.current.Load()).ServeHTTP(w, r)
}

// record opens the recorder and has it answer until ctx ends or its ledger
// stops. The error is why it stopped by itself.
func (s *standby) record(ctx context.Context, o *peopleOptions) error {
	p, err := openPeople(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		p.close()
		if o.approval != nil {
			o.approval.scopes.OnChange(nil) // what is read from now on is announced by the next
		}
	}()
	o.log.Info("recording", zap.Int64("entries", p.ledger.Size()))
	s.set(p.handler)
	select {
	case <-ctx.Done():
		p.drain()
		<-s.served // p answers what is under way
		return nil
	case <-p.ledger.Done():
		s.set(nil)
		p.drain()
		return p.ledger.Err()
	}
}

// options resolves a configuration: it reads every file that it names.
func (c *recordConfig) options(log *zap.Logger) (*peopleOptions, error) {
	o := &peopleOptions{trustDomain: c.TrustDomain, log: log, public: !c.Private}
	o.ledger = ledger.Options{
		Dir: c.Dir, HeadFile: c.HeadFile, KeysFile: c.KeysFile, Grace: c.Grace, PublishEvery: c.Publish,
		CheckNewest: c.CheckNewest, RecheckEvery: c.Recheck,
		Standby: c.Standby, Log: log.Named("ledger"),
	}
	var err error
	if c.Postgres != "" {
		if o.ledger.Postgres, err = readSecret(c.Postgres); err != nil {
			return nil, fmt.Errorf("postgres_file: %w", err)
		}
	}
	if o.ledger.Signer, o.ledger.Verifier, err = readLogKey(c.LogKey); err != nil {
		return nil, err
	}
	if o.ledger.PrivacyKey, err = readPrivacyKey(c.PrivacyKey); err != nil {
		return nil, err
	}
	if o.tokens, err = auth.OpenTokens(c.Tokens, nil); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	o.tokenFile = c.Tokens
	if c.Approval != nil {
		if o.approval, err = c.Approval.options(c.Dir); err != nil {
			return nil, err
		}
	}
	if o.trustDomain == "" {
		// A log is named by a URL without scheme: its host is the house's own.
		o.trustDomain, _, _ = strings.Cut(strings.ToLower(o.ledger.Signer.Name()), "/")
	}
	if c.Witnesses != nil {
		if o.ledger.Publish, err = c.Witnesses.publish(o, c.Dir); err != nil {
			return nil, err
		}
	}
	if c.Keep != nil {
		if o.keeping, err = c.Keep.open(c.Dir, log.Named("keep")); err != nil {
			return nil, err
		}
	}
	o.siem, o.retention, o.export, o.vaultAudit = c.SIEM, c.Retention, c.Export, c.VaultAudit
	if o.tracing, err = c.Tracing.open(context.Background(), "record", o.ledger.Signer.Name(), log); err != nil {
		return nil, err
	}
	return o, nil
}

// peopleOptions are what one recorder process is made of.
type peopleOptions struct {
	trustDomain string
	ledger      ledger.Options
	tokens      *auth.Tokens
	tokenFile   string            // the file of tokens, to say which writers there are
	certs       *auth.ClientCerts // nil: none
	public      bool              // checkpoint and hash tiles are for anyone
	approval    *approvalOptions  // nil: nobody is asked for an approval
	keeping     *keeping          // nil: checkpoints are kept nowhere else
	siem        siem.Config       // where events are pushed
	retention   retentionConfig   // how long erasable texts are kept
	export      exportConfig
	vaultAudit  *vaultAuditConfig              // nil: Vault's audit log is not followed
	metrics     *peopleMetrics                 // nil: nothing is measured
	tracing     *tracing                       // nil: nothing is traced
	witnesses   func() []witness.WitnessStatus // nil: there are none
	log         *zap.Logger
}

// catalogue is the recorder's own, nil where it has none.
func (o *peopleOptions) catalogue() *scopes.Set {
	if o.approval == nil {
		return nil
	}
	return o.approval.scopes.Current()
}

// recorderName is by what the recorder's own entries are on record.
const recorderName = "recorder"

// people is the people's side: the ledger and the APIs over it.
type people struct {
	ledger    *ledger.Ledger
	self      record.Self // appends in the recorder's own name
	refusals  *auth.Refusals
	writers   *record.Server
	decisions *decisions // nil: nobody is asked for an approval
	retention *retention.Retention
	exports   *review.Exports
	pusher    *siem.Pusher         // nil: nothing is pushed
	audit     *vaultaudit.Follower // nil: Vault's audit log is not followed
	unkeep    func()               // ends the keeping of checkpoints
	o         *peopleOptions
	handler   http.Handler
	log       *zap.Logger
}

func openPeople(ctx context.Context, o *peopleOptions) (*people, error) {
	o.ledger.Gate = o.approval.gate(o.ledger.PrivacyKey)
	if o.metrics != nil {
		o.ledger.Committed = o.metrics.committed
	}
	l, err := ledger.Open(ctx, o.ledger)
	if err != nil {
		return nil, err
	}
	self := record.Self{Ledger: l, Name: recorderName, TrustDomain: o.trustDomain}
	p := &people{o: o, ledger: l, self: self, log: o.log, refusals: auth.NewRefusals(o.trustDomain, o.log.Named("auth"), self.Record)}
	p.refusals.PrivacyKey = o.ledger.PrivacyKey
	if err := self.Announce(ctx, writers(o)); err != nil {
		p.close()
		return nil, err
	}
	guard := &auth.Guard{Tokens: o.tokens, Certs: o.certs, Refusals: p.refusals}
	r := server.NewRouter(o.log.Named("api"), record.MaxBody)
	if o.approval != nil {
		if p.decisions, err = openDecisions(ctx, o, p); err != nil {
			p.close()
			return nil, err
		}
		if o.approval.provider != nil {
			r.Use(o.approval.provider)
		}
		p.decisions.routes(r)
		guard.People = p.decisions.login
	}
	// What a crash left to be erased is erased before anybody reads.
	if p.retention, err = o.retention.open(ctx, l, o.trustDomain, o.ledger.Dir, o.catalogue(), o.log.Named("retention")); err != nil {
		p.close()
		return nil, err
	}
	if o.approval != nil {
		o.approval.scopes.OnChange(func(_, set *scopes.Set) error {
			return o.retention.announce(context.Background(), l, o.trustDomain, set)
		})
	}
	if p.exports, err = openExports(o.export, o, l); err != nil {
		p.close()
		return nil, err
	}
	p.writers = record.New(l, guard)
	p.writers.Routes(r)
	r.Group(func(r chi.Router) {
		r.Use(server.Limit(server.MaxBody)) // writers' bodies alone are larger
		review.New(l, guard, o.public).Routes(r)
		p.exports.Routes(r, guard)
		respond.New(respond.Config{
			Ledger: l, Guard: guard, Name: recorderName, TrustDomain: o.trustDomain, PrivacyKey: o.ledger.PrivacyKey, Now: o.ledger.Now, Catalogue: o.catalogue,
		}).Routes(r)
	})
	r.Get("/healthz", ok)
	r.Get("/readyz", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-l.Done():
			problem.Write(w, r, problem.LedgerUnavailable().Because(l.Err()))
		default:
			ok(w, r)
		}
	})
	p.handler = o.watched(r)
	if p.unkeep, err = o.keeping.start(o.ledger.Signer.Name(), l, o.log); err == nil {
		p.pusher, err = openSIEM(ctx, o.siem, o.ledger.Dir, o.ledger.Signer.Name(), l, o.log.Named("siem"))
	}
	if err == nil {
		p.audit, err = o.vaultAudit.open(l, o.ledger.Dir, o.ledger.Signer.Name(), o.trustDomain, o.log.Named("vault-audit"))
	}
	if err != nil {
		p.close()
		return nil, err
	}
	if o.metrics != nil {
		o.metrics.people.Store(p)
	}
	return p, nil
}

func ok(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write([]byte("{\"status\":\"ok\"}\n"))
}

// writers are the writers that may come.
func writers(o *peopleOptions) (list []auth.Principal) {
	tokens, err := auth.ListTokens(o.tokenFile)
	if err != nil {
		o.log.Warn("the writers' tokens could not be read", zap.Error(err))
	}
	for _, t := range tokens {
		if t.Role == auth.Writer {
			list = append(list, auth.Principal{Name: t.Name, Role: t.Role, Method: "token"})
		}
	}
	if o.certs == nil {
		return list
	}
	for _, c := range o.certs.Certs {
		list = append(list, auth.Principal{Name: c.Name, Role: auth.Writer, Method: "mtls"})
	}
	return list
}

// serve answers on l until ctx ends, or the ledger stops itself.
func (p *people) serve(ctx context.Context, l net.Listener, t *tls.Config, drain time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-p.ledger.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	stop := context.AfterFunc(ctx, p.drain)
	defer stop()
	err := server.Serve(ctx, l, server.Config{Handler: p.handler, TLS: t, Log: p.log, Drain: drain})
	return errors.Join(p.ledger.Err(), err)
}

// drain ends what streams, so that a listener can shut down.
func (p *people) drain() {
	p.writers.Drain()
	p.decisions.drain()
}

func (p *people) close() {
	if p.o.metrics != nil {
		p.o.metrics.people.Store(nil)
	}
	if p.unkeep != nil {
		p.unkeep()
	}
	if p.pusher != nil {
		if err := p.pusher.Close(); err != nil {
			p.log.Error("the push to a SIEM did not close cleanly", zap.Error(err))
		}
	}
	if p.audit != nil {
		if err := p.audit.Close(); err != nil {
			p.log.Error("Vault's audit log was not left cleanly; it is read again from where it was last noted", zap.Error(err))
		}
	}
	if p.exports != nil {
		p.exports.Close()
	}
	if p.retention != nil {
		if err := p.retention.Close(); err != nil {
			p.log.Error("the erasure of texts did not close cleanly", zap.Error(err))
		}
	}
	p.decisions.close(p.log)
	p.refusals.Close()
	if err := p.ledger.Close(); err != nil {
		p.log.Error("the ledger did not close cleanly", zap.Error(err))
	}
}
