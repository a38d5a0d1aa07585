package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store/ledger"
)

func recordCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "record --config FILE",
		Short: "Run the recorder: the people's side",
		Long: `Run the recorder, which keeps the ledger. docs/operations.md lists every key
of the configuration. It refuses to start on a ledger that was altered, and
stops itself when it finds that later. Token files are read again whenever
they change; SIGTERM finishes what is under way and ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var c recordConfig
			if err := loadConfig(config, &c); err != nil {
				return err
			}
			if err := c.check(); err != nil {
				return fmt.Errorf("%s: %w", config, err)
			}
			log, err := newLogger()
			if err != nil {
				return err
			}
			return runRecord(cmd.Context(), &c, log)
		},
	}
	configFlag(cmd, &config)
	return cmd
}

// runRecord runs the recorder of a configuration until ctx ends.
func runRecord(ctx context.Context, c *recordConfig, log *zap.Logger) error {
	o, err := c.options(log)
	if err != nil {
		return err
	}
	tls, err := c.Listen.tls()
	if err != nil {
		return err
	}
	p, err := openPeople(ctx, o)
	if err != nil {
		return err
	}
	defer p.close()
	l, err := net.Listen("tcp", c.Listen.Addr)
	if err != nil {
		return fmt.Errorf("listen.addr: %w", err)
	}
	log.Info("recording", zap.Stringer("addr", l.Addr()), zap.Bool("tls", tls != nil),
		zap.String("log", o.ledger.Signer.Name()), zap.Int64("entries", p.ledger.Size()), zap.String("version", buildVersion()))
	stop := onHangup(func() {
		if o.approval == nil {
			log.Info("nothing to reload: token files are read again whenever they change")
		} else if err := o.approval.scopes.Reload(); err != nil {
			log.Error("not reloaded, the old stays in force", zap.String("what", "catalogue and policy"), zap.Error(err))
		} else {
			log.Info("reloaded", zap.String("what", "catalogue and policy"))
		}
	})
	defer stop()
	return p.serve(ctx, l, tls, c.Drain)
}

// options resolves a configuration: it reads every file that it names.
func (c *recordConfig) options(log *zap.Logger) (*peopleOptions, error) {
	o := &peopleOptions{trustDomain: c.TrustDomain, certs: c.Certs, log: log, public: !c.Private}
	o.ledger = ledger.Options{
		Dir: c.Dir, HeadFile: c.HeadFile, KeysFile: c.KeysFile, Grace: c.Grace, PublishEvery: c.Publish,
		CheckNewest: c.CheckNewest, RecheckEvery: c.Recheck,
		Log: log.Named("ledger"),
	}
	var err error
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
	return o, nil
}

// peopleOptions are what one recorder process is made of.
type peopleOptions struct {
	trustDomain string
	ledger      ledger.Options
	tokens      *auth.Tokens
	tokenFile   string // the file of tokens, to say which writers there are
	certs       auth.Certs
	public      bool             // checkpoint and hash tiles are for anyone
	approval    *approvalOptions // nil: nobody is asked for an approval
	log         *zap.Logger
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
	handler   http.Handler
	log       *zap.Logger
}

func openPeople(ctx context.Context, o *peopleOptions) (*people, error) {
	o.ledger.Gate = o.approval.gate(o.ledger.PrivacyKey)
	l, err := ledger.Open(ctx, o.ledger)
	if err != nil {
		return nil, err
	}
	self := record.Self{Ledger: l, Name: recorderName, TrustDomain: o.trustDomain}
	p := &people{ledger: l, self: self, log: o.log, refusals: auth.NewRefusals(o.trustDomain, o.log.Named("auth"), self.Record)}
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
	p.writers = record.New(l, guard)
	p.writers.Routes(r)
	review.New(l, guard, o.public).Routes(r)
	r.Get("/healthz", ok)
	r.Get("/readyz", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-l.Done():
			problem.Write(w, r, problem.LedgerUnavailable().Because(l.Err()))
		default:
			ok(w, r)
		}
	})
	p.handler = r
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
	for _, c := range o.certs {
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
	stop := context.AfterFunc(ctx, func() {
		p.writers.Drain()
		p.decisions.drain()
	})
	defer stop()
	err := server.Serve(ctx, l, server.Config{Handler: p.handler, TLS: t, Log: p.log, Drain: drain})
	return errors.Join(p.ledger.Err(), err)
}

func (p *people) close() {
	p.decisions.close(p.log)
	p.refusals.Close()
	if err := p.ledger.Close(); err != nil {
		p.log.Error("the ledger did not close cleanly", zap.Error(err))
	}
}
