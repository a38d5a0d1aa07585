package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-chi/chi/v5"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/approve"
	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/server"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// approvalConfig is the section of a recorder's file by which people decide.
type approvalConfig struct {
	BaseURL   string              `yaml:"base_url"`  // where people reach the pages
	Catalogue string              `yaml:"catalogue"` // file: the recorder's own copy
	Policy    string              `yaml:"policy"`    // file, optional
	Owners    map[string][]string `yaml:"owners"`    // orchestrator to the people who own it, as user:NAME
	OIDC      oidcConfig          `yaml:"oidc"`
	Passkeys  passkeysConfig      `yaml:"passkeys"`
}

type oidcConfig struct {
	Issuer       string        `yaml:"issuer"`
	ClientID     string        `yaml:"client_id"`
	ClientSecret string        `yaml:"client_secret_file"` // none: a public client, which PKCE alone protects
	NameClaim    string        `yaml:"name_claim"`         // preferred_username by default; one that nobody can choose
	GroupsClaim  string        `yaml:"groups_claim"`       // groups by default
	Scopes       []string      `yaml:"scopes"`             // beside openid and profile
	Reviewers    []string      `yaml:"reviewers"`          // groups
	Responders   []string      `yaml:"responders"`         // groups
	Session      time.Duration `yaml:"session"`            // the longest a login lasts; 8h by default
	Idle         time.Duration `yaml:"idle"`               // without a call; 30m by default
}

type passkeysConfig struct {
	ActivateAfter time.Duration `yaml:"activate_after"` // a key is active by itself; 0: a second person activates it
	Admins        []string      `yaml:"admins"`         // groups that may revoke others' keys, and alone activate them
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
	tokens   bool                            // API tokens speak for people: in dev alone
	provider func(http.Handler) http.Handler // dev's own OpenID provider before the other routes; nil: none
}

// options reads what the section names.
func (c *approvalConfig) options() (*approvalOptions, error) {
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
	return o, nil
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
	guard := &auth.Guard{People: d.login, Refusals: p.refusals}
	if a.tokens {
		guard.Tokens = o.tokens
	}
	pages, err := approve.NewHTML(approve.HTMLConfig{
		Judge: d.approvals, CSRF: d.login.CSRF, Scopes: a.scopes, Enrol: true, ActivateAfter: a.passkeys.ActivateAfter,
	})
	if err != nil {
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

func (d *decisions) close(log *zap.Logger) {
	if d == nil {
		return
	}
	if err := d.approvals.Close(); err != nil {
		log.Error("the approvals did not close cleanly", zap.Error(err))
	}
}
