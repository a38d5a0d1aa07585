package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/store/siem"
	"github.com/countersign-dev/countersign/store/trust"
)

// serveConfig is the file of `countersign serve`. Every secret is named by
// the file that holds it.
//
// docs/configuration.md is made from these structs by `go generate`: the comment
// of a field is what it says of a key, and a part of it that ends in "by default"
// is the key's default.
type serveConfig struct {
	Listen        listenConfig   `yaml:"listen"`        // where orchestrators call
	PublicURL     string         `yaml:"public_url"`    // where orchestrators and relying parties reach the listener; the `iss` of step identity tokens, whose discovery is served there
	TrustDomain   string         `yaml:"trust_domain"`  // of SPIFFE IDs: `spiffe://<trust domain>/orchestrator/<o>/run/<r>/step/<s>`
	IdentityKey   string         `yaml:"identity_key"`  // file of the keys that sign step identity tokens, as `countersign key generate identity` makes it; several brokers share one
	IdentityLead  time.Duration  `yaml:"identity_lead"` // how long a new key is published before it signs; 10m by default
	PrivacyKey    string         `yaml:"privacy_key"`   // file of the key behind pseudonyms, the same as at the recorder
	Catalogue     string         `yaml:"catalogue"`     // file of the scopes, see policy.md
	Policy        string         `yaml:"policy"`        // file of a Rego policy; none: the catalogue's rules alone
	Recorder      recorderConfig `yaml:"recorder"`      // the recorder that this broker writes to
	Vault         vaultConfig    `yaml:"vault"`         // the Vault that credentials come from
	Redis         redisConfig    `yaml:"redis"`         // what is in flight; see operations.md
	Limits        broker.Limits  `yaml:"limits"`        // how much callers may use; see operations.md
	Orchestrators callersConfig  `yaml:"orchestrators"` // who may ask
	FirstTTL      time.Duration  `yaml:"first_ttl"`     // of a child token until its issuance is on record; also the grace for abandoned intents; 1s to 60s; 60s by default
	Drain         time.Duration  `yaml:"drain"`         // how long SIGTERM waits for calls under way, and what is open at the gateway; 10s by default

	Metrics string         `yaml:"metrics_addr"` // host:port of a listener for Prometheus alone, to anyone who reaches it; none: no metrics
	Tracing *tracingConfig `yaml:"tracing"`      // where OpenTelemetry traces are sent; none: nowhere

	Gateway *gatewayConfig `yaml:"gateway"` // the access path; none: scopes that it delivers are refused (`delivery-unsupported`)
}

// recordConfig is the file of `countersign record`.
type recordConfig struct {
	TrustDomain string        `yaml:"trust_domain"` // of the SPIFFE IDs in its own entries; the host of the log's name by default
	Private     bool          `yaml:"private"`      // checkpoint and hash tiles are for reviewers and writers alone
	Listen      listenConfig  `yaml:"listen"`       // where writers, people and reviewers call
	Dir         string        `yaml:"dir"`          // directory of `ledger.db`, or with postgres_file of what lies beside the database
	HeadFile    string        `yaml:"head_file"`    // file of the last head, best on another disk; `DIR/head` by default
	KeysFile    string        `yaml:"keys_file"`    // file of the keys of erasable texts: keep it out of the database's backups; `DIR/details-keys.db` by default
	LogKey      string        `yaml:"log_key"`      // file of the key that signs the log, as `countersign key generate log` makes it
	PrivacyKey  string        `yaml:"privacy_key"`  // file of the key behind pseudonyms, the same as at the brokers
	Tokens      string        `yaml:"tokens"`       // file of token hashes: writers, reviewers and responders
	Certs       auth.Certs    `yaml:"certificates"` // which client certificate is which writer
	Grace       time.Duration `yaml:"grace"`        // age at which another writer's intent without an outcome may be closed; 60s by default
	Publish     time.Duration `yaml:"publish"`      // between published checkpoints; 2s by default
	CheckNewest int64         `yaml:"check_newest"` // how many of the newest entries are hashed again before it starts; 10000 by default
	Recheck     time.Duration `yaml:"recheck"`      // pause between background passes over the whole log, of which the first begins at start; 1h by default
	Drain       time.Duration `yaml:"drain"`        // how long SIGTERM waits for calls under way; 10s by default

	Postgres string `yaml:"postgres_file"` // file that holds the DSN of a ledger in PostgreSQL; none: SQLite in dir
	Standby  bool   `yaml:"standby"`       // wait for the recorder that has the ledger open in PostgreSQL, and take over

	Approval  *approvalConfig  `yaml:"approval"`  // how people decide; none: nobody is asked for an approval
	Witnesses *witnessesConfig `yaml:"witnesses"` // who cosigns checkpoints; none: they are published at once
	Keep      *keepConfig      `yaml:"keep"`      // where checkpoints are kept for safety; none: nowhere else
	SIEM      siem.Config      `yaml:"siem"`      // where the record is pushed to as events; none: nothing is pushed
	Retention retentionConfig  `yaml:"retention"` // how long erasable texts are kept, by sensitivity (low, sensitive, critical, and default for what is about no scope), at least 1h each; what is not named is kept for good
	Export    exportConfig     `yaml:"export"`    // evidence bundles on their way to reviewers

	VaultAudit *vaultAuditConfig `yaml:"vault_audit"`  // which of Vault's audit devices is followed, see vault-audit.md; none: it is not
	Metrics    string            `yaml:"metrics_addr"` // host:port of a listener for Prometheus alone, to anyone who reaches it; none: no metrics
	Tracing    *tracingConfig    `yaml:"tracing"`      // where OpenTelemetry traces are sent; none: nowhere
}

type listenConfig struct {
	Addr     string `yaml:"addr"`            // HOST:PORT to listen on; without cert a loopback address alone
	Cert     string `yaml:"cert"`            // file, PEM: the certificate and what leads to its root
	Key      string `yaml:"key"`             // file, PEM
	ClientCA string `yaml:"client_ca"`       // file, PEM: whose client certificates name writers (record) or orchestrators (serve)
	Insecure bool   `yaml:"insecure_listen"` // true: something in front ends TLS
}

type recorderConfig struct {
	URL      string `yaml:"url"`        // of the recorder
	Page     string `yaml:"page"`       // where people approve, as their browsers reach it; url by default
	Writer   string `yaml:"writer"`     // this broker's name at the recorder, its own alone
	Token    string `yaml:"token_file"` // file of its token there; or cert and key
	Cert     string `yaml:"cert"`       // file, PEM: client certificate instead of a token
	Key      string `yaml:"key"`        // file, PEM
	CA       string `yaml:"ca"`         // file, PEM; the system's by default
	LogKey   string `yaml:"log_key"`    // the log's verifier key itself, which is no secret: what `countersign key show log.key` prints
	HeadFile string `yaml:"head_file"`  // file of the last head this broker saw; never restore it from a backup
}

type vaultConfig struct {
	Addr      string         `yaml:"addr"`       // URL of Vault
	Namespace string         `yaml:"namespace"`  // of Vault Enterprise; none by default
	CA        string         `yaml:"ca"`         // file, PEM; the system's by default
	Token     string         `yaml:"token_file"` // file of a token, read again at each login; or approle
	AppRole   *appRoleConfig `yaml:"approle"`    // login by role ID and secret ID
}

type appRoleConfig struct {
	Mount    string `yaml:"mount"`          // where the method is mounted below auth/; approle by default
	RoleID   string `yaml:"role_id"`        // as Vault has it
	SecretID string `yaml:"secret_id_file"` // file, read again at each login
}

// callersConfig says who may call as an orchestrator or a resource server.
type callersConfig struct {
	Tokens string              `yaml:"tokens"`       // file of token hashes, as `countersign token` keeps it
	OIDC   []auth.IssuerConfig `yaml:"oidc"`         // providers whose tokens are taken; they also prove subjects (`subject_token`)
	Certs  []orchestratorCert  `yaml:"certificates"` // SPIFFE IDs of orchestrators, which are known by client certificate; listen.client_ca says whose
}

// orchestratorCert is an orchestrator that comes with an X.509-SVID.
type orchestratorCert struct {
	Name   string   `yaml:"name"`   // its name on record
	URI    string   `yaml:"uri"`    // its SPIFFE ID; all are of one trust domain
	Owners []string `yaml:"owners"` // people who own it, as user:NAME, and so never approve what it asks for
}

// certs are the orchestrators that come with certificates.
func (c *callersConfig) certs() (list auth.Certs) {
	for _, x := range c.Certs {
		list = append(list, auth.Cert{Name: x.Name, URI: x.URI, Owners: x.Owners})
	}
	return list
}

// loadConfig reads a YAML file into c. Unknown and duplicate keys are refused
// with their place in the file.
func loadConfig(path string, c any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return parseConfig(path, b, c)
}

// parseConfig is loadConfig of bytes that were read from path.
func parseConfig(path string, b []byte, c any) error {
	if err := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict()).Decode(c); err != nil {
		var at yaml.Error
		if errors.As(err, &at) && at.GetToken() != nil {
			p := at.GetToken().Position
			return fmt.Errorf("%s:%d:%d: %s; docs/configuration.md lists every key", path, p.Line, p.Column, at.GetMessage())
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// check refuses what would start but should not run.
func (c *serveConfig) check() error {
	if err := c.Listen.check(); err != nil {
		return err
	}
	if err := due([][2]string{
		{"public_url", c.PublicURL}, {"trust_domain", c.TrustDomain}, {"identity_key", c.IdentityKey},
		{"privacy_key", c.PrivacyKey}, {"catalogue", c.Catalogue}, {"recorder.url", c.Recorder.URL},
		{"recorder.writer", c.Recorder.Writer}, {"recorder.log_key", c.Recorder.LogKey}, {"recorder.head_file", c.Recorder.HeadFile}, {"vault.addr", c.Vault.Addr},
	}); err != nil {
		return err
	}
	switch {
	case c.Recorder.Token == "" && c.Recorder.Cert == "":
		return errors.New("recorder: set token_file, or cert and key")
	case (c.Vault.Token == "") == (c.Vault.AppRole == nil):
		return errors.New("vault: set either token_file or approle")
	case c.Orchestrators.Tokens == "" && len(c.Orchestrators.OIDC) == 0 && len(c.Orchestrators.Certs) == 0:
		return errors.New("orchestrators: set tokens, oidc, certificates or several of them; otherwise nobody can ask")
	case (c.Listen.ClientCA == "") != (len(c.Orchestrators.Certs) == 0):
		return errors.New("listen.client_ca and orchestrators.certificates go together: the one says whose certificates count, the other whom they name")
	}
	if err := c.Redis.check(); err != nil {
		return err
	}
	if err := c.Limits.Check(); err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	if err := c.Orchestrators.certs().Check(auth.Orchestrator); err != nil {
		return fmt.Errorf("orchestrators.%w", err)
	}
	for _, kv := range [][2]string{{"recorder.url", c.Recorder.URL}, {"recorder.page", cmp.Or(c.Recorder.Page, c.Recorder.URL)}, {"vault.addr", c.Vault.Addr}} {
		if err := secureURL(kv[1]); err != nil {
			return fmt.Errorf("%s: %w", kv[0], err)
		}
	}
	if err := checkSeeing(c.Metrics, c.Tracing); err != nil {
		return err
	}
	if c.Gateway != nil {
		return c.Gateway.check()
	}
	return nil
}

// checkSeeing checks what lets an operator see what a process does.
func checkSeeing(metrics string, t *tracingConfig) error {
	if metrics != "" {
		if err := hostPort(metrics); err != nil {
			return fmt.Errorf("metrics_addr: %w", err)
		}
	}
	return t.check()
}

func (c *recordConfig) check() error {
	if err := errors.Join(c.Listen.check(), c.Certs.Check(auth.Writer)); err != nil {
		return err
	}
	if c.CheckNewest < 0 || c.Recheck < 0 {
		return errors.New("check_newest and recheck are not negative: no recorder runs without its checks")
	}
	if c.Approval != nil {
		if err := c.Approval.check(); err != nil {
			return err
		}
	}
	if c.Standby && c.Postgres == "" {
		return errors.New("standby: a recorder stands by where the ledger lies in PostgreSQL alone: set postgres_file")
	}
	if c.Witnesses != nil {
		if err := c.Witnesses.check(); err != nil {
			return err
		}
	}
	if c.Keep != nil {
		if err := c.Keep.check(); err != nil {
			return err
		}
	}
	if err := errors.Join(checkSeeing(c.Metrics, c.Tracing), c.SIEM.Check(), c.Retention.check(), c.Export.check(), c.VaultAudit.check()); err != nil {
		return err
	}
	return due([][2]string{{"dir", c.Dir}, {"log_key", c.LogKey}, {"privacy_key", c.PrivacyKey}, {"tokens", c.Tokens}})
}

// due names the first of the settings that has no value.
func due(settings [][2]string) error {
	for _, kv := range settings {
		if kv[1] == "" {
			return fmt.Errorf("%s is not set", kv[0])
		}
	}
	return nil
}

func (l *listenConfig) check() error {
	if l.Addr == "" {
		return errors.New("listen.addr is not set")
	}
	if (l.Cert == "") != (l.Key == "") {
		return errors.New("listen: cert and key go together")
	}
	if l.ClientCA != "" && l.Cert == "" {
		return errors.New("listen.client_ca needs cert and key: client certificates come with TLS")
	}
	if l.Cert == "" && !l.Insecure && !loopback(l.Addr) {
		return fmt.Errorf("listen.addr %s is reachable from elsewhere and has no TLS, so that credentials would cross the network in the clear: set cert and key, or insecure_listen: true where something in front ends TLS", l.Addr)
	}
	return nil
}

// open follows the listener's certificate, and the authorities of its clients'.
// Both are nil for a plain listener.
func (l *listenConfig) open(log *zap.Logger) (*trust.Trust, *tls.Config, error) {
	if l.Cert == "" {
		return nil, nil, nil
	}
	t, err := trust.Open(trust.Files{CA: l.ClientCA, Cert: l.Cert, Key: l.Key}, log.Named("tls"))
	if err != nil {
		return nil, nil, fmt.Errorf("listen: %w", err)
	}
	return t, t.Server(), nil
}

// loopback reports whether addr can be reached from this machine alone. A
// name other than localhost may resolve to anything, and an empty host is
// every interface.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// secureURL refuses a URL over which a token would travel in the clear.
func secureURL(raw string) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil || u.Host == "":
		return fmt.Errorf("%q is not a URL", raw)
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http":
		host := u.Host
		if u.Port() == "" {
			host = net.JoinHostPort(strings.Trim(u.Host, "[]"), "80")
		}
		if loopback(host) {
			return nil
		}
		return fmt.Errorf("%s would carry tokens in the clear: use https", raw)
	}
	return fmt.Errorf("%q is neither https nor http", raw)
}
