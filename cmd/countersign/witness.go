package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/witness"
	safe "github.com/countersign-dev/countersign/store/witness/keep"
)

func witnessCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "witness --config FILE",
		Short: "Run a witness, which cosigns logs' checkpoints",
		Long: `Run a witness of other people's logs (C2SP tlog-witness). It cosigns each
checkpoint of a log it knows that continues the one before, and no other: a log
that was forked or put back gets no cosignature, and both of its heads are kept
as evidence (GET /forks). It sees no entries. Run it where whoever runs the
recorder has no access.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var c witnessConfig
			return runConfigured(config, &c, func(log *zap.Logger) error { return runWitness(cmd.Context(), &c, log) })
		},
	}
	configFlag(cmd, &config)
	return cmd
}

// witnessConfig is the file of `countersign witness`.
type witnessConfig struct {
	Listen listenConfig       `yaml:"listen"` // where recorders call, and whoever asks for forks
	Key    string             `yaml:"key"`    // file of the key that cosigns, as `countersign key generate witness` makes it
	Dir    string             `yaml:"dir"`    // directory of its state: one checkpoint per log, and evidence of forks; never restore it from a backup
	Logs   []witnessLogConfig `yaml:"logs"`   // whose checkpoints it cosigns
	Drain  time.Duration      `yaml:"drain"`  // how long SIGTERM waits for calls under way; 10s by default
}

type witnessLogConfig struct {
	Key    string `yaml:"key"`    // the log's verifier key itself, which is no secret: what `countersign key show log.key` prints
	Origin string `yaml:"origin"` // of its checkpoints; the key's name by default
}

func (c *witnessConfig) check() error {
	if err := c.Listen.check(); err != nil {
		return err
	}
	if c.Listen.ClientCA != "" {
		return errors.New("listen.client_ca: a witness asks for no client certificates, a checkpoint's signature says whose it is")
	}
	if len(c.Logs) == 0 {
		return errors.New("logs: name at least one log to witness")
	}
	for i, l := range c.Logs {
		if l.Key == "" {
			return fmt.Errorf("logs[%d].key is not set: it is what `countersign key show log.key` prints", i)
		}
	}
	return due([][2]string{{"key", c.Key}, {"dir", c.Dir}})
}

// runWitness runs the witness of a configuration until ctx ends.
func runWitness(ctx context.Context, c *witnessConfig, log *zap.Logger) (err error) {
	signer, err := readWitnessKey(c.Key)
	if err != nil {
		return err
	}
	_, tls, err := c.Listen.open(log)
	if err != nil {
		return err
	}
	o := witness.ServerConfig{Signer: signer, Dir: c.Dir, Log: log.Named("witness")}
	for _, l := range c.Logs {
		o.Logs = append(o.Logs, witness.Log{Origin: l.Origin, Key: l.Key})
	}
	w, err := witness.NewServer(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	l, err := net.Listen("tcp", c.Listen.Addr)
	if err != nil {
		return fmt.Errorf("listen.addr: %w", err)
	}
	log.Info("witnessing", zap.Stringer("addr", l.Addr()), zap.Bool("tls", tls != nil), zap.String("key", signer.Verifier().String()), zap.Int("logs", len(c.Logs)), zap.String("version", buildVersion()))
	return server.Serve(ctx, l, server.Config{Handler: witnessRoutes(w, log), TLS: tls, Log: log, Drain: c.Drain})
}

func witnessRoutes(w *witness.Server, log *zap.Logger) http.Handler {
	var r chi.Router = server.NewRouter(log.Named("api"), witness.MaxBody)
	w.Routes(r)
	r.Get("/healthz", ok)
	r.Get("/readyz", ok)
	return r
}

// algCosignature is the byte that names Ed25519 for cosignatures in a key (C2SP
// tlog-cosignature). Keys of logs have another: the one cannot be used as the
// other.
const algCosignature = 4

func generateWitnessKey(name string) (skey string, err error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", err
	}
	s, err := torchwood.NewCosignatureSigner(name, key)
	if err != nil {
		return "", fmt.Errorf("a witness cannot be named %q: use letters, digits, dots and slashes, such as witness.example.com/w1", name)
	}
	return fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", name, s.KeyHash(), base64.StdEncoding.EncodeToString(append([]byte{algCosignature}, key.Seed()...))), nil
}

// parseWitnessKey reads what generateWitnessKey made: a note key (C2SP
// signed-note) whose algorithm is that of cosignatures.
func parseWitnessKey(skey string) (*torchwood.CosignatureSigner, error) {
	parts := strings.SplitN(skey, "+", 5)
	if len(parts) != 5 || parts[0] != "PRIVATE" || parts[1] != "KEY" {
		return nil, errors.New("not a private note key")
	}
	b, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(b) != 1+ed25519.SeedSize || b[0] != algCosignature {
		return nil, errors.New("not a witness's key")
	}
	s, err := torchwood.NewCosignatureSigner(parts[2], ed25519.NewKeyFromSeed(b[1:]))
	if err != nil {
		return nil, err
	}
	if fmt.Sprintf("%08x", s.KeyHash()) != parts[3] {
		return nil, errors.New("the key is damaged: its hash does not match")
	}
	return s, nil
}

func readWitnessKey(path string) (*torchwood.CosignatureSigner, error) {
	skey, err := readSecret(path)
	if err != nil {
		return nil, fmt.Errorf("witness key: %w", err)
	}
	s, err := parseWitnessKey(skey)
	if err != nil {
		return nil, fmt.Errorf("witness key %s: %w; make one with `countersign key generate witness`", path, err)
	}
	return s, nil
}

// witnessesConfig is the section of a recorder's file that names its witnesses.
type witnessesConfig struct {
	Servers  []witnessServerConfig `yaml:"servers"`  // any C2SP witness
	Withhold bool                  `yaml:"withhold"` // true: publish only what meets quorum or policy; false: publish after a second at most, and add the cosignatures that come later
	Quorum   int                   `yaml:"quorum"`   // how many of servers have to cosign
	Policy   string                `yaml:"policy"`   // file of a witness policy, instead of quorum (log, witness, group and quorum lines, as Tessera and Sigsum have it)
}

type witnessServerConfig struct {
	URL string `yaml:"url"` // what /add-checkpoint is appended to
	Key string `yaml:"key"` // the witness's verifier key itself, which is no secret
	CA  string `yaml:"ca"`  // file, PEM; the machine's roots by default
}

func (c *witnessesConfig) check() error {
	if len(c.Servers) == 0 {
		return errors.New("witnesses.servers: name at least one witness")
	}
	for i, s := range c.Servers {
		if s.Key == "" {
			return fmt.Errorf("witnesses.servers[%d].key is not set: it is what the witness's `countersign key show` prints", i)
		}
		if err := secureURL(s.URL); err != nil {
			return fmt.Errorf("witnesses.servers[%d].url: %w", i, err)
		}
	}
	switch {
	case c.Withhold && (c.Quorum == 0) == (c.Policy == ""):
		return errors.New("witnesses.withhold: set either quorum or policy, which say when a checkpoint may be published")
	case !c.Withhold && (c.Quorum != 0 || c.Policy != ""):
		return errors.New("witnesses: quorum and policy say when a checkpoint may be published, and need withhold: true")
	case c.Quorum < 0 || c.Quorum > len(c.Servers):
		return fmt.Errorf("witnesses.quorum is %d of %d servers", c.Quorum, len(c.Servers))
	}
	return nil
}

// publish returns what publishes the ledger of o, whose trust domain is settled;
// dir is the recorder's own.
func (c *witnessesConfig) publish(o *peopleOptions, dir string) (func(context.Context, *ledger.Ledger), error) {
	log, err := store.NewLogVerifier(o.ledger.Verifier)
	if err != nil {
		return nil, err
	}
	p := witness.PublisherConfig{
		Key: o.ledger.Verifier, Withhold: c.Withhold, File: filepath.Join(dir, "published"), Every: o.ledger.PublishEvery,
		Log: o.log.Named("witnesses"),
	}
	for i, s := range c.Servers {
		t, err := trust.Open(trust.Files{CA: s.CA}, p.Log)
		if err != nil {
			return nil, fmt.Errorf("witnesses.servers[%d].ca: %w", i, err)
		}
		w, err := witness.NewClient(s.URL, s.Key, log, t)
		if err != nil {
			return nil, fmt.Errorf("witnesses.servers[%d]: %w", i, err)
		}
		p.Witnesses = append(p.Witnesses, w)
	}
	switch {
	case c.Policy != "":
		b, err := os.ReadFile(c.Policy)
		if err == nil {
			p.Policy, err = torchwood.ParsePolicy(b)
		}
		if err != nil {
			return nil, fmt.Errorf("witnesses.policy: %w", err)
		}
	case c.Withhold:
		if p.Policy, err = witness.Quorum(c.Quorum, p.Witnesses); err != nil {
			return nil, fmt.Errorf("witnesses.quorum: %w", err)
		}
	}
	p.Agent = "spiffe://" + o.trustDomain + "/recorder/" + recorderName
	self := record.Self{Name: recorderName, TrustDomain: o.trustDomain} // its ledger is set before Run, which alone records
	p.Record = func(ctx context.Context, s *store.Submission) error { return self.Record(ctx, s) }
	publisher, err := witness.NewPublisher(p)
	if err != nil {
		return nil, fmt.Errorf("witnesses: %w", err)
	}
	o.witnesses = publisher.Status
	return func(ctx context.Context, l *ledger.Ledger) {
		self.Ledger = l
		publisher.Run(ctx, l)
	}, nil
}

// keepConfig is the section of a recorder's file that says where checkpoints are
// kept for safety.
type keepConfig struct {
	Every time.Duration    `yaml:"every"` // between checkpoints that are kept; 24h by default
	Files []string         `yaml:"files"` // to which each checkpoint is appended, with date, and synced
	Slack *keepSlackConfig `yaml:"slack"` // none: not kept there
	Mail  *keepMailConfig  `yaml:"mail"`  // none: not sent
}

type keepSlackConfig struct {
	Token   string `yaml:"token_file"` // file of the bot's token, with chat:write
	Channel string `yaml:"channel"`    // C…, of which the bot is a member
	APIURL  string `yaml:"api_url"`    // of Slack's API; https://slack.com/api/ by default
}

type keepMailConfig struct {
	Addr     string   `yaml:"addr"`          // HOST:PORT of the mail server
	Security string   `yaml:"security"`      // starttls, tls (from the first byte) or none (on this machine alone); starttls by default
	CA       string   `yaml:"ca"`            // file, PEM; the machine's roots by default
	Username string   `yaml:"username"`      // none: no login
	Password string   `yaml:"password_file"` // file; goes with username
	From     string   `yaml:"from"`          // sender's address
	To       []string `yaml:"to"`            // receivers' addresses
}

func (c *keepConfig) check() error {
	if len(c.Files) == 0 && c.Slack == nil && c.Mail == nil {
		return errors.New("keep: set files, slack or mail")
	}
	if c.Every < 0 {
		return errors.New("keep.every is negative")
	}
	if s := c.Slack; s != nil {
		if err := due([][2]string{{"keep.slack.token_file", s.Token}, {"keep.slack.channel", s.Channel}}); err != nil {
			return err
		}
		if s.APIURL != "" {
			if err := secureURL(s.APIURL); err != nil {
				return fmt.Errorf("keep.slack.api_url: %w", err)
			}
		}
	}
	if m := c.Mail; m != nil && (m.Username == "") != (m.Password == "") {
		return errors.New("keep.mail: username and password_file go together")
	}
	return nil
}

// places reads the secrets that the section names.
func (c *keepConfig) places(log *zap.Logger) (list []safe.Place, err error) {
	for _, f := range c.Files {
		list = append(list, &safe.File{Path: f})
	}
	if s := c.Slack; s != nil {
		token, err := readSecret(s.Token)
		if err != nil {
			return nil, fmt.Errorf("keep.slack.token_file: %w", err)
		}
		list = append(list, safe.NewSlack(token, s.Channel, s.APIURL))
	}
	if m := c.Mail; m != nil {
		p := &safe.Mail{Addr: m.Addr, Security: m.Security, Username: m.Username, From: m.From, To: m.To}
		if p.Security == "" {
			p.Security = safe.STARTTLS
		}
		if m.CA != "" {
			if p.TLS, err = trust.Open(trust.Files{CA: m.CA}, log); err != nil {
				return nil, fmt.Errorf("keep.mail.ca: %w", err)
			}
		}
		if m.Password != "" {
			if p.Password, err = readSecret(m.Password); err != nil {
				return nil, fmt.Errorf("keep.mail.password_file: %w", err)
			}
		}
		if err := p.Check(); err != nil {
			return nil, fmt.Errorf("keep.mail: %w", err)
		}
		list = append(list, p)
	}
	return list, nil
}

// keeping keeps the checkpoints of a ledger while it is open.
type keeping struct {
	every  time.Duration
	places []safe.Place
	file   string // what was sent last
}

// open reads what the section names; dir is the recorder's own.
func (c *keepConfig) open(dir string, log *zap.Logger) (*keeping, error) {
	places, err := c.places(log)
	if err != nil {
		return nil, err
	}
	return &keeping{every: c.Every, places: places, file: filepath.Join(dir, "kept.json")}, nil
}

// start begins to keep the checkpoints of l; stop waits until what is under way
// has ended. A nil keeping keeps none.
func (k *keeping) start(origin string, l *ledger.Ledger, log *zap.Logger) (stop func(), err error) {
	if k == nil {
		return func() {}, nil
	}
	keeper, err := safe.New(safe.Config{
		Places: k.places, Origin: origin, Published: l.Published, File: k.file, Every: k.every, Log: log.Named("keep"),
	})
	if err != nil {
		return nil, fmt.Errorf("keep: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { keeper.Run(ctx) })
	return func() { cancel(); running.Wait() }, nil
}
