package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	slackgo "github.com/slack-go/slack"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store/ledger"
)

// record looks at the configuration of a recorder.
func (d *doctor) record(ctx context.Context, c *recordConfig) {
	host := ""
	if c.Approval != nil {
		host = hostOf(c.Approval.BaseURL)
	}
	d.listener("listen", &c.Listen, host)
	d.secret("log_key", c.LogKey)
	d.secret("privacy_key", c.PrivacyKey)
	d.secret("tokens", c.Tokens)
	d.secret("postgres_file", c.Postgres)
	if _, _, err := readLogKey(c.LogKey); err != nil {
		d.fault("recorder-key", "log_key "+c.LogKey, "%v", err)
	}
	if _, err := readPrivacyKey(c.PrivacyKey); err != nil {
		d.fault("recorder-key", "privacy_key "+c.PrivacyKey, "%v", err)
	}
	d.directories(c)
	if tokens, err := auth.ListTokens(c.Tokens); err == nil && len(c.Certs) == 0 &&
		!slices.ContainsFunc(tokens, func(t auth.Token) bool { return t.Role == auth.Writer }) {
		d.fault("writers", "tokens "+c.Tokens, "no writer has a token or a certificate")
	} else if err == nil {
		d.ok("writers", "tokens "+c.Tokens, "")
	}
	if c.Postgres != "" {
		d.postgres(ctx, c)
	}
	d.approval(ctx, c)
	d.witnesses(ctx, c)
	d.vaultAudit(ctx, c.VaultAudit)
	d.seeing(c.Metrics, c.Tracing)
}

func (d *doctor) directories(c *recordConfig) {
	d.writable("dir", "dir", c.Dir, true)
	d.disk("dir", c.Dir)
	head, keys := c.HeadFile, c.KeysFile
	if head == "" {
		head = filepath.Join(c.Dir, "head")
	} else {
		d.writable("head-file", "head_file", filepath.Dir(head), true)
	}
	if c.Postgres == "" {
		if same, err := sameDisk(c.Dir, head); err != nil {
			d.unchecked("head-beside", "head_file "+head, err)
		} else if same {
			d.warn("head-beside", "head_file "+head, "is on the disk of %s", c.Dir)
		} else {
			d.ok("head-beside", "head_file "+head, "")
		}
	}
	if keys == "" {
		keys = filepath.Join(c.Dir, "details-keys.db")
	} else {
		d.disk("keys_file", filepath.Dir(keys))
	}
	// Where the ledger lies in PostgreSQL, its backup does not take dir along.
	if rel, err := filepath.Rel(c.Dir, keys); c.Postgres == "" && err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		d.warn("keys-beside", "keys_file "+keys, "is in %s", c.Dir)
	} else {
		d.ok("keys-beside", "keys_file "+keys, "")
	}
}

// sameDisk reports whether two paths are on one file system.
func sameDisk(a, b string) (bool, error) {
	var x, y syscall.Stat_t
	if err := errors.Join(syscall.Stat(existing(a), &x), syscall.Stat(existing(b), &y)); err != nil {
		return false, err
	}
	return x.Dev == y.Dev, nil
}

func (d *doctor) postgres(ctx context.Context, c *recordConfig) {
	dsn, err := readSecret(c.Postgres)
	if err != nil {
		return // said by secret
	}
	what := "postgres_file " + c.Postgres
	ctx, cancel := context.WithTimeout(ctx, 3*probeWithin)
	defer cancel()
	before := d.now()
	f, err := ledger.ExaminePostgres(ctx, dsn)
	if !d.look("postgres", what, err, "answers") {
		return
	}
	d.clock("postgres", before, f.Now, 0)
	if len(f.Volatile) > 0 {
		d.fault("postgres-durable", what, "%s", strings.Join(f.Volatile, ", "))
	} else {
		d.ok("postgres-durable", what, "")
	}
	if f.Encoding != "UTF8" {
		d.fault("postgres-encoding", what, "%s", f.Encoding)
	} else {
		d.ok("postgres-encoding", what, f.Encoding)
	}
	var may []string
	if f.Superuser {
		may = append(may, "is a superuser")
	}
	if f.Owner {
		may = append(may, "owns the tables, and could take their triggers away")
	}
	if len(f.May) > 0 && !f.Superuser && !f.Owner {
		may = append(may, "may "+strings.Join(f.May, " and "))
	}
	if len(may) > 0 {
		d.warn("postgres-role", what, "%s %s", f.Role, strings.Join(may, ", "))
	} else {
		d.ok("postgres-role", what, f.Role)
	}
	d.look("ledger", what, f.Schema, "")
}

// slackSecret is the form of an app's signing secret.
var slackSecret = regexp.MustCompile(`\A[0-9a-f]{32}\z`)

func (d *doctor) approval(ctx context.Context, c *recordConfig) {
	a := c.Approval
	if a == nil {
		d.warn("approval-off", "approval", "is not set")
		return
	}
	d.secret("approval.oidc.client_secret_file", a.OIDC.ClientSecret)
	set := d.catalogue("approval.catalogue", a.Catalogue, a.Policy)
	if p := d.provider(ctx, "people-login", a.OIDC.Issuer, ""); p != nil {
		d.people(ctx, a, p, set)
	}
	if s := a.Notices.Slack; s != nil {
		d.secret("approval.slack.token_file", s.Token)
		d.secret("approval.slack.signing_secret_file", s.SigningSecret)
		d.slack(ctx, s)
	}
	for _, w := range a.Notices.Webhooks {
		for _, f := range w.Secrets {
			d.secret("approval.webhooks."+w.Name, f)
		}
	}
}

// people looks at how approvers log in: it begins a login, as a browser would,
// and ends it there.
func (d *doctor) people(ctx context.Context, a *approvalConfig, p *openIDProvider, set *scopes.Set) {
	claim := a.OIDC.GroupsClaim
	if claim == "" {
		claim = "groups"
	}
	asked := set != nil && slices.ContainsFunc(set.Scopes(), func(s *scopes.Scope) bool { return s.Approval != nil })
	switch {
	case p.Claims == nil || !asked: // the list is optional (OpenID Connect Discovery, section 3)
		d.skip("groups-claim", a.OIDC.Issuer, "")
	case !slices.Contains(p.Claims, claim):
		d.warn("groups-claim", a.OIDC.Issuer, "it does not name %q among the claims that it gives", claim)
	default:
		d.ok("groups-claim", a.OIDC.Issuer, claim)
	}

	redirect := strings.TrimSuffix(a.BaseURL, "/") + "/login/callback"
	u, err := url.Parse(p.Authorization)
	if err != nil || u.Host == "" {
		d.fault("people-redirect", a.OIDC.Issuer, "it names no authorization_endpoint")
		return
	}
	q := u.Query()
	for k, v := range map[string]string{
		"client_id": a.OIDC.ClientID, "redirect_uri": redirect, "response_type": "code", "scope": "openid profile",
		"state": rand.Text(), "nonce": rand.Text(), "code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "code_challenge_method": "S256", // RFC 7636, appendix B
	} {
		q.Set(k, v)
	}
	u.RawQuery = q.Encode()
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		d.fault("people-redirect", a.OIDC.Issuer, "%v", err)
		return
	}
	browser := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := browser.Do(req)
	if err != nil {
		d.unchecked("people-redirect", a.OIDC.Issuer, err)
		return
	}
	res.Body.Close()
	to, _ := res.Location()
	switch {
	case res.StatusCode >= 400:
		d.fault("people-redirect", a.OIDC.Issuer, "a login of client %s that returns to %s is answered with %s", a.OIDC.ClientID, redirect, res.Status)
	case to != nil && to.Query().Has("error"):
		d.fault("people-redirect", a.OIDC.Issuer, "a login of client %s is refused: %s", a.OIDC.ClientID, to.Query().Get("error"))
	default:
		d.ok("people-redirect", a.OIDC.Issuer, redirect)
	}
}

func (d *doctor) slack(ctx context.Context, s *slackConfig) {
	if secret, err := readSecret(s.SigningSecret); err == nil && !slackSecret.MatchString(secret) {
		d.warn("slack-secret", "approval.slack.signing_secret_file", "is not 32 hexadecimal digits")
	} else if err == nil {
		d.ok("slack-secret", "approval.slack.signing_secret_file", "")
	}
	token, err := readSecret(s.Token)
	if err != nil {
		return // said by secret
	}
	at := s.APIURL
	if at == "" {
		at = slackgo.APIURL
	}
	if !strings.HasSuffix(at, "/") {
		at += "/"
	}
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	who, err := slackgo.New(token, slackgo.OptionAPIURL(at), slackgo.OptionHTTPClient(&http.Client{
		Timeout: probeWithin,
		// A redirect would carry the token elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	})).AuthTestContext(ctx)
	switch {
	case err != nil:
		d.fault("slack-token", "approval.slack.token_file", "%v", err)
	case who.TeamID != s.Team:
		d.fault("slack-token", "approval.slack.team "+s.Team, "the token is of %s", who.TeamID)
	default:
		d.ok("slack-token", "approval.slack.token_file", who.Team)
	}
}

func (d *doctor) witnesses(ctx context.Context, c *recordConfig) {
	if c.Witnesses == nil {
		if c.Keep == nil {
			d.warn("unwitnessed", "witnesses", "neither witnesses nor keep is set")
		} else {
			d.ok("unwitnessed", "keep", "")
		}
		return
	}
	d.ok("unwitnessed", "witnesses", "")
	for _, s := range c.Witnesses.Servers {
		u, err := url.Parse(s.URL)
		if err != nil {
			continue // said by check
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		// What else a witness answers than /add-checkpoint is its own affair.
		conn, err := (&net.Dialer{Timeout: probeWithin}).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
		if err != nil {
			d.warn("witness-away", s.URL, "%v", err)
			continue
		}
		conn.Close()
		d.ok("witness-away", s.URL, "answers")
	}
}

func (d *doctor) vaultAudit(ctx context.Context, c *vaultAuditConfig) {
	if c == nil {
		return
	}
	d.secret("vault_audit.token_file", c.Token)
	what := "vault_audit.device " + c.device()
	if c.File != "" {
		f, err := os.Open(c.File)
		if !d.look("vault-audit-log", "vault_audit.file "+c.File, err, "") {
			return
		}
		f.Close()
	}
	hash, err := c.hasher(zap.NewNop())
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, probeWithin)
		defer cancel()
		_, err = hash(ctx, "countersign")
	}
	d.look("vault-audit-log", what, quiet(err), "gives hashes")
}

// witness looks at the configuration of a witness.
func (d *doctor) witness(c *witnessConfig) {
	d.listener("listen", &c.Listen, "")
	d.secret("key", c.Key)
	if _, err := os.Stat(c.Key); err == nil {
		_, err := readWitnessKey(c.Key)
		d.look("secret-file", "key "+c.Key, err, "is a witness's")
	}
	d.writable("dir", "dir", c.Dir, true)
	d.disk("dir", c.Dir)
	for i, l := range c.Logs {
		_, err := note.NewVerifier(l.Key)
		d.look("witness-log", fmt.Sprintf("logs[%d]", i), err, l.Origin)
	}
}
