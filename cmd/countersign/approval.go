package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/approve"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/approvals/slack"
	"github.com/countersign-dev/countersign/approvals/webhook"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// approvalConfig is the section of a recorder's file by which people decide.
type approvalConfig struct {
	BaseURL   string              `yaml:"base_url"`  // where people reach the pages: https, or http://localhost:PORT
	Catalogue string              `yaml:"catalogue"` // file: the recorder's own copy, which is carried there by you and not by a broker
	Policy    string              `yaml:"policy"`    // file of a Rego policy; none: the catalogue's rules alone
	Owners    map[string][]string `yaml:"owners"`    // orchestrator to the people who own it, as user:NAME: nobody approves what their own orchestrator asks for
	OIDC      oidcConfig          `yaml:"oidc"`      // how people log in
	Passkeys  passkeysConfig      `yaml:"passkeys"`  // how passkeys come into force
	Outbox    string              `yaml:"outbox"`    // file of what Slack and webhooks are to be told; `DIR/outbox.db` by default

	Notices noticesConfig `yaml:",inline"`
}

// noticesConfig says who is told of approvals.
type noticesConfig struct {
	Slack    *slackConfig    `yaml:"slack"`    // none: Slack is told nothing
	Webhooks []webhookConfig `yaml:"webhooks"` // Standard Webhooks, told every state of a request and of people's passkeys
}

type oidcConfig struct {
	Issuer       string        `yaml:"issuer"`             // of the OpenID provider
	ClientID     string        `yaml:"client_id"`          // the recorder's there, with base_url + /login/callback as redirect URI
	ClientSecret string        `yaml:"client_secret_file"` // file; none: a public client, which PKCE alone protects
	NameClaim    string        `yaml:"name_claim"`         // claim that names the person, one that nobody can choose or hand on; preferred_username by default
	GroupsClaim  string        `yaml:"groups_claim"`       // claim that lists the person's groups; groups by default
	Scopes       []string      `yaml:"scopes"`             // asked for beside openid, profile and groups
	Reviewers    []string      `yaml:"reviewers"`          // groups that may read the record
	Responders   []string      `yaml:"responders"`         // groups that may stop everything
	Session      time.Duration `yaml:"session"`            // the longest a login lasts; 8h by default
	Idle         time.Duration `yaml:"idle"`               // the longest a login lasts without a call; 30m by default
}

type passkeysConfig struct {
	ActivateAfter time.Duration `yaml:"activate_after"` // a new key is active by itself after this; a second person activates it by default
	Admins        []string      `yaml:"admins"`         // groups that may revoke others' keys, and alone activate them
}

type slackConfig struct {
	Token         string        `yaml:"token_file"`          // file of the bot's token: chat:write, users:read, channels:history (or groups:history)
	SigningSecret string        `yaml:"signing_secret_file"` // file of the app's signing secret; its interactivity URL is base_url + /slack/interactions
	Team          string        `yaml:"team"`                // T…, the workspace
	Channel       string        `yaml:"channel"`             // C…, of which the bot is a member
	APIURL        string        `yaml:"api_url"`             // of Slack's API; https://slack.com/api/ by default
	LinkFor       time.Duration `yaml:"link_for"`            // a linked account decides so long after its person's last login; 720h by default
}

type webhookConfig struct {
	Name    string   `yaml:"name"`         // names it in the outbox
	URL     string   `yaml:"url"`          // that is posted to
	Secrets []string `yaml:"secret_files"` // files, each of whsec_…; several while one is replaced
}

func (c *approvalConfig) check() error {
	if err := due([][2]string{
		{"approval.base_url", c.BaseURL}, {"approval.catalogue", c.Catalogue},
		{"approval.oidc.issuer", c.OIDC.Issuer}, {"approval.oidc.client_id", c.OIDC.ClientID},
	}); err != nil {
		return err
	}
	if u, err := url.Parse(c.BaseURL); err != nil || u.Host == "" || u.Scheme != "https" && !loopback(u.Host) && u.Hostname() != "localhost" {
		return fmt.Errorf("approval.base_url is %q: people's sessions and passkeys need https://HOST, or http://localhost:PORT", c.BaseURL)
	}
	for orchestrator, people := range c.Owners {
		for _, p := range people {
			if err := auth.ValidPerson(p); err != nil {
				return fmt.Errorf("approval.owners.%s: %w", orchestrator, err)
			}
		}
	}
	if c.Passkeys.ActivateAfter < 0 {
		return errors.New("approval.passkeys.activate_after is negative")
	}
	return nil
}

// approvalOptions are what people's decisions are made of; see approvalConfig.
type approvalOptions struct {
	baseURL  string
	scopes   *scopes.InForce
	owners   map[string][]string
	login    auth.PeopleConfig
	passkeys passkeysConfig
	outbox   string                          // file
	slack    *slack.Config                   // token, secret, team, channel, URL and LinkFor alone; nil: no Slack
	webhooks []webhook.Config                //
	tokens   bool                            // API tokens speak for people: in dev alone
	provider func(http.Handler) http.Handler // dev's own OpenID provider before the other routes; nil: none
}

// options reads what the section names; dir is the recorder's own.
func (c *approvalConfig) options(dir string) (*approvalOptions, error) {
	set, err := scopes.Open(c.Catalogue, c.Policy)
	if err != nil {
		return nil, fmt.Errorf("approval: %w", err)
	}
	o := &approvalOptions{
		baseURL: c.BaseURL, scopes: set, owners: c.Owners, passkeys: c.Passkeys,
		login: auth.PeopleConfig{
			Issuer: c.OIDC.Issuer, ClientID: c.OIDC.ClientID, BaseURL: c.BaseURL,
			NameClaim: c.OIDC.NameClaim, GroupsClaim: c.OIDC.GroupsClaim, Scopes: c.OIDC.Scopes,
			Roles:       map[auth.Role][]string{auth.Reviewer: c.OIDC.Reviewers, auth.Responder: c.OIDC.Responders},
			SessionLife: c.OIDC.Session, IdleLife: c.OIDC.Idle,
		},
	}
	if c.OIDC.ClientSecret != "" {
		if o.login.ClientSecret, err = readSecret(c.OIDC.ClientSecret); err != nil {
			return nil, fmt.Errorf("approval.oidc.client_secret_file: %w", err)
		}
	}
	if o.outbox = c.Outbox; o.outbox == "" {
		o.outbox = filepath.Join(dir, "outbox.db")
	}
	return o, c.Notices.read(o)
}

// read reads the secrets that c names into o.
func (c *noticesConfig) read(o *approvalOptions) (err error) {
	if s := c.Slack; s != nil {
		o.slack = &slack.Config{Team: s.Team, Channel: s.Channel, APIURL: s.APIURL, LinkFor: s.LinkFor}
		if o.slack.Token, err = readSecret(s.Token); err != nil {
			return fmt.Errorf("slack.token_file: %w", err)
		}
		if o.slack.SigningSecret, err = readSecret(s.SigningSecret); err != nil {
			return fmt.Errorf("slack.signing_secret_file: %w", err)
		}
	}
	for i, w := range c.Webhooks {
		one := webhook.Config{Name: w.Name, URL: w.URL}
		for _, file := range w.Secrets {
			secret, err := readSecret(file)
			if err != nil {
				return fmt.Errorf("webhooks[%d].secret_files: %w", i, err)
			}
			one.Secrets = append(one.Secrets, secret)
		}
		o.webhooks = append(o.webhooks, one)
	}
	return nil
}

// gate is what the recorder's own catalogue says of entries that writers bring.
// Without one, nobody can be asked for an approval.
func (o *approvalOptions) gate(key store.PrivacyKey) func(*store.Submission) error {
	if o != nil {
		return approvals.Gate(o.scopes, o.owners, key)
	}
	return func(s *store.Submission) error {
		if s.Type == store.ApprovalRequested {
			return &store.OrderError{Code: store.OrderWeak, Message: "this recorder has no catalogue to compare the rule with, and asks nobody: set approval in its configuration"}
		}
		return nil
	}
}

// decisions are people's side of approvals while a recorder runs.
type decisions struct {
	approvals *approvals.Approvals
	login     *auth.People
	server    *approve.Server
	slack     *slack.Slack   // nil: no Slack
	outbox    *outbox.Outbox // nil: nobody is told
	told      []string       // the outbox's destinations
}

// openDecisions opens the pages and calls of people who decide.
func openDecisions(ctx context.Context, o *peopleOptions, p *people) (*decisions, error) {
	a := o.approval
	d := &decisions{}
	login := a.login
	login.Refusals, login.Log = p.refusals, o.log.Named("login")
	var err error
	if d.login, err = auth.NewPeople(login); err != nil {
		return nil, err
	}
	if d.approvals, err = approvals.New(ctx, approvals.Config{
		Ledger: p.ledger, Name: recorderName, TrustDomain: o.trustDomain, Scopes: a.scopes, Owners: a.owners,
		PrivacyKey: o.ledger.PrivacyKey, Origin: o.ledger.Signer.Name(), BaseURL: a.baseURL,
		ActivateAfter: a.passkeys.ActivateAfter, PasskeyAdmins: a.passkeys.Admins, NameClaim: login.NameClaim,
		Log: o.log.Named("approvals"),
	}); err != nil {
		return nil, err
	}
	if err := d.openNotices(ctx, o, p); err != nil {
		d.close(o.log)
		return nil, err
	}
	guard := &auth.Guard{People: d.login, Refusals: p.refusals}
	if a.tokens {
		guard.Tokens = o.tokens
	}
	html := approve.HTMLConfig{
		Judge: d.approvals, CSRF: d.login.CSRF, Scopes: a.scopes, Enrol: true,
		ActivateAfter: a.passkeys.ActivateAfter, PasskeyAdmins: a.passkeys.Admins,
	}
	if d.slack != nil {
		html.Slack, html.Message = d.slack, d.message
	}
	pages, err := approve.NewHTML(html)
	if err != nil {
		d.close(o.log)
		return nil, err
	}
	d.server = approve.New(approve.Config{Approvals: d.approvals, Guard: guard, Pages: pages, People: d.login})
	return d, nil
}

// routes adds the login and the approvals.
func (d *decisions) routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(server.Limit(server.MaxBody)) // writers' bodies alone are larger
		d.login.Routes(r)
		if d.slack != nil {
			r.Method(http.MethodPost, "/slack/interactions", d.slack.Interactions())
		}
		r.Group(func(r chi.Router) {
			r.Use(d.login.ToLogin)
			d.server.Routes(r)
		})
	})
}

// drain ends what streams to people, so that the listener can shut down.
func (d *decisions) drain() {
	if d != nil {
		d.server.Drain()
	}
}

// openNotices opens what tells Slack and webhooks. The ledger's lock is held by
// then, so that one recorder alone tells.
func (d *decisions) openNotices(ctx context.Context, o *peopleOptions, p *people) error {
	a := o.approval
	var senders []outbox.Sender
	if a.slack != nil {
		c := *a.slack
		c.Approvals, c.Ledger, c.Record = d.approvals, p.ledger, p.self.Record
		c.PrivacyKey, c.TrustDomain, c.Name, c.Log = o.ledger.PrivacyKey, o.trustDomain, recorderName, o.log.Named("slack")
		var err error
		if d.slack, err = slack.New(ctx, c); err != nil {
			return err
		}
		senders = append(senders, d.slack)
		d.login.OnLogin = func(ctx context.Context, who auth.Person) {
			if err := d.slack.Login(ctx, approvals.Person{Name: who.Name, Groups: who.Groups}); err != nil {
				o.log.Warn("the groups of a linked Slack account were not renewed", zap.Error(err))
			}
		}
	}
	for _, c := range a.webhooks {
		e, err := webhook.New(c)
		if err != nil {
			return err
		}
		senders = append(senders, e)
	}
	if len(senders) == 0 {
		return nil
	}
	for _, s := range senders {
		d.told = append(d.told, s.Name())
	}
	var err error
	if d.outbox, err = outbox.Open(ctx, outbox.Config{File: a.outbox, Source: d.approvals, Senders: senders, Log: o.log.Named("outbox")}); err != nil {
		return err
	}
	if d.slack != nil {
		go func() { // Slack may be down; nobody waits for it
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			if err := d.slack.Check(ctx); err != nil {
				o.log.Warn("Slack does not take this configuration", zap.Error(err))
			}
		}()
	}
	return nil
}

// message is the address of the Slack message about an approval.
func (d *decisions) message(ctx context.Context, approval string) string {
	place, err := d.outbox.Place(ctx, d.slack.Name(), approval)
	if err != nil || place == "" {
		return ""
	}
	return d.slack.Permalink(place)
}

func (d *decisions) close(log *zap.Logger) {
	if d == nil {
		return
	}
	if d.outbox != nil {
		if err := d.outbox.Close(); err != nil {
			log.Error("the outbox did not close cleanly", zap.Error(err))
		}
	}
	if d.slack != nil {
		if err := d.slack.Close(); err != nil {
			log.Error("Slack did not close cleanly", zap.Error(err))
		}
	}
	if err := d.approvals.Close(); err != nil {
		log.Error("the approvals did not close cleanly", zap.Error(err))
	}
}
