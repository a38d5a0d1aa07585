package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// askFlags are the flags of a request for a credential, and of who asks whom.
type askFlags struct {
	caller
	step      string
	ask       client.Ask
	params    []string
	publicKey string // file
	key       string // Idempotency-Key
	wait      time.Duration

	unanswered bool   // a call was made, and no answer to it was read
	pending    string // the request that people are still to decide
}

// Exit codes of request and run where the broker gave no credential, as in
// sysexits(3), so that they are not taken for those of a command.
const (
	exitPending = 75 // EX_TEMPFAIL: not decided, or being minted for another call; the same call joins it
	exitRefused = 77 // EX_NOPERM: denied by policy or people, expired, or changed since it was asked
)

const exitCodesHelp = `
Where people must approve, it says on standard error who and where, and waits
for them for as long as --wait says. Exit status 75: not decided by then, and
the same command joins the request; 77: denied by policy or by a person,
expired, or no longer what was asked; 1: anything else.`

// longestWait is what the broker lets one call wait (Prefer: wait).
const longestWait = 5 * time.Minute

func (f *askFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.addr, "addr", "", "the broker's URL ($COUNTERSIGN_ADDR)")
	cmd.Flags().StringVar(&f.token, "token", "", "the orchestrator's token ($COUNTERSIGN_TOKEN)")
	f.addCert(cmd)
	cmd.Flags().StringVar(&f.ask.Scope, "scope", "", "what is asked for")
	cmd.Flags().StringVar(&f.step, "step", "", "the step it is for")
	cmd.Flags().StringVar(&f.ask.Run, "run", "", "the run the step belongs to")
	cmd.Flags().StringVar(&f.ask.TTL, "ttl", "", "how long it is to live, such as 5m; the scope's default without it")
	cmd.Flags().StringVar(&f.ask.Reason, "reason", "", "why it is needed")
	cmd.Flags().StringVar(&f.ask.Subject, "subject", "", "on whose behalf the step runs")
	cmd.Flags().StringVar(&f.ask.Delivery, "delivery", "", "direct, wrapped or gateway; the scope's default without it")
	cmd.Flags().StringVar(&f.ask.Audience, "audience", "", "audience of an identity token")
	cmd.Flags().StringVar(&f.publicKey, "public-key", "", "file with the step's own public key, where the scope certifies it")
	cmd.Flags().StringArrayVar(&f.params, "param", nil, "a param of the scope, as NAME=VALUE; may be repeated")
	cmd.Flags().StringVar(&f.key, "idempotency-key", "", "makes the request idempotent under this key")
	cmd.Flags().DurationVar(&f.wait, "wait", 0, "how long to wait for people, or for a request that is under way")
	for _, name := range []string{"scope", "step", "run"} {
		_ = cmd.MarkFlagRequired(name)
	}
}

// caller is an orchestrator, by token or client certificate, and its broker.
type caller struct {
	addr, token string
	cert, key   string // files
}

func (c *caller) addCert(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.cert, "cert", "", "file with the orchestrator's client certificate, PEM ($COUNTERSIGN_CERT)")
	cmd.Flags().StringVar(&c.key, "key", "", "file with its private key, PEM ($COUNTERSIGN_KEY)")
}

// broker is a client for the broker that the flags or the environment name.
func (c *caller) broker() (*client.Broker, error) {
	addr, token := orEnv(c.addr, "COUNTERSIGN_ADDR"), orEnv(c.token, "COUNTERSIGN_TOKEN")
	files := trust.Files{Cert: cmp.Or(c.cert, os.Getenv("COUNTERSIGN_CERT")), Key: cmp.Or(c.key, os.Getenv("COUNTERSIGN_KEY"))}
	switch {
	case addr == "":
		return nil, errors.New("no broker named: set COUNTERSIGN_ADDR, or add --addr URL")
	case (files.Cert == "") != (files.Key == ""):
		return nil, errors.New("a certificate and its key go together: --cert FILE and --key FILE, or COUNTERSIGN_CERT and COUNTERSIGN_KEY")
	case files.Cert != "" && !strings.HasPrefix(addr, "https://"):
		return nil, fmt.Errorf("a certificate is shown over TLS alone, and the broker's address is %q", addr)
	case token == "" && files.Cert == "":
		return nil, errors.New("no token given: set COUNTERSIGN_TOKEN to the orchestrator's, or show its certificate with --cert and --key")
	}
	// What it reloads, and what it does not, is for the broker's answer to say.
	certs, err := trust.Open(files, zap.NewNop())
	if err != nil {
		return nil, fmt.Errorf("--cert and --key: %w", err)
	}
	return client.NewBroker(client.Config{URL: addr, Token: client.Token(token), Transport: certs.Transport(http.DefaultTransport.(*http.Transport))})
}

// request asks, and waits while the request is under way for as long as the
// flags say.
func (f *askFlags) request(ctx context.Context, b *client.Broker) (*client.Credential, error) {
	ask := f.ask
	ask.Receipt = true
	if f.publicKey != "" {
		text, err := os.ReadFile(f.publicKey)
		if err != nil {
			return nil, fmt.Errorf("--public-key: %w", err)
		}
		ask.PublicKey = strings.TrimSpace(string(text))
	}
	for _, p := range f.params {
		name, value, ok := strings.Cut(p, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--param is %q: write NAME=VALUE", p)
		}
		if ask.Params == nil {
			ask.Params = map[string]any{}
		}
		ask.Params[name] = paramValue(value)
	}
	if f.wait < 0 {
		return nil, errors.New("--wait: a duration such as 10m")
	}
	until := time.Now().Add(f.wait)
	// The first call does not wait, so that its answer can say who is to approve.
	for wait := time.Duration(0); ; wait = min(time.Until(until), longestWait) {
		f.unanswered = true
		began := time.Now()
		c, err := b.Credential(ctx, f.step, ask, f.key, wait)
		if err != nil {
			var p *problem.Problem
			if errors.As(err, &p) && slices.Contains([]string{problem.SlugScopeDenied, problem.SlugApprovalDenied, problem.SlugApprovalExpired, problem.SlugRequestChanged}, p.Slug()) {
				f.pending = ""
				return nil, &exitError{exitRefused, err}
			}
			return nil, hint(err, "the broker", "COUNTERSIGN_ADDR")
		}
		f.unanswered = false
		if len(c.Credential) > 0 {
			f.pending = ""
			return c, nil
		}
		if c.Status == client.StatusPending && f.pending != c.Request {
			f.pending = c.Request
			fmt.Fprintln(os.Stderr, "countersign: "+waitsFor(c))
		}
		if time.Until(until) <= 0 {
			return nil, &exitError{exitPending, fmt.Errorf("request %s is %s: ask again with the same flags to join it, or add --wait", c.Request, c.Status)}
		}
		if wait == 0 || time.Since(began) >= time.Second {
			continue // to wait for it, or it was waited for
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(min(time.Second, time.Until(until))): // what Retry-After says
		}
	}
}

// waitsFor says who is to approve a request, and where.
func waitsFor(c *client.Credential) string {
	s := "request " + c.Request + " waits for approval"
	if c.Approval == nil {
		return s
	}
	var who []string
	for _, n := range c.Approval.Needs {
		if left := n.Count - n.Approved; left > 0 {
			who = append(who, fmt.Sprintf("%d of group %s", left, n.Group))
		}
	}
	s += " by " + strings.Join(who, " and ")
	if c.Approval.URL != "" {
		s += " at " + c.Approval.URL
	}
	return s + ", until " + c.Approval.ExpiresAt.UTC().Format(time.RFC3339)
}

// paramValue is a param as JSON has it: a whole number, a boolean, or else a
// string. The catalogue says which of them a param takes.
func paramValue(s string) any {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && strconv.FormatInt(n, 10) == s {
		return n
	}
	switch s {
	case "true":
		return true
	case "false":
		return false
	}
	return s
}

// hint says what to do about err where it is not the server's own answer.
func hint(err error, server, variable string) error {
	var p *problem.Problem
	var u *url.Error
	switch {
	case errors.As(err, &p) && p.Status == http.StatusUnauthorized && server == "the broker":
		return fmt.Errorf("%w; is COUNTERSIGN_TOKEN a token of %s, and not revoked, or COUNTERSIGN_CERT a certificate that it knows?", err, server)
	case errors.As(err, &p) && p.Status == http.StatusUnauthorized:
		return fmt.Errorf("%w; is COUNTERSIGN_TOKEN a token of %s, and not revoked?", err, server)
	case errors.As(err, &u) && !errors.Is(err, context.Canceled):
		return fmt.Errorf("%w; is %s up, and %s right?", err, server, variable)
	}
	return err
}

func requestCommand() *cobra.Command {
	var f askFlags
	var output string
	cmd := &cobra.Command{
		Use:   "request --scope S --step ID --run ID",
		Short: "Ask for a step's credential and print it",
		Long: `Ask for a step's credential and print it: as JSON, exactly as the broker
answered, or as shell assignments (-o env), for eval. It lives until it expires
or ` + "`countersign revoke --run R --step S`" + ` ends it; ` + "`countersign run`" + ` does
both around a command.
` + exitCodesHelp,
		Example: `  countersign request --scope orders-db:read --run run-42 --step reconcile --ttl 5m
  eval "$(countersign request --scope vault:demo-read --run run-42 --step s1 -o env)"
  countersign request --scope vault:demo-write --run run-42 --step s2 --reason OPS-1234 --wait 30m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := f.broker()
			if err != nil {
				return err
			}
			c, err := f.request(cmd.Context(), b)
			if err != nil {
				return err
			}
			if output == "json" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), string(c.Raw))
				return err
			}
			env, err := credentialEnv(f.step, c)
			if err != nil {
				return err
			}
			for _, name := range slices.Sorted(maps.Keys(env)) {
				// Inside single quotes a shell changes nothing.
				fmt.Fprintf(cmd.OutOrStdout(), "export %s='%s'\n", name, strings.ReplaceAll(env[name], "'", `'\''`))
			}
			return nil
		},
	}
	f.add(cmd)
	outputFlag(cmd, &output, "json", "json", "env")
	return cmd
}

// credentialEnv is a credential as environment variables: each member under
// its own name, and what the usual tools of its kind read.
func credentialEnv(step string, c *client.Credential) (map[string]string, error) {
	var members map[string]jsontext.Value
	if err := json.Unmarshal(c.Credential, &members); err != nil {
		return nil, errors.New("the broker's answer holds no credential that this version knows")
	}
	env := map[string]string{
		"COUNTERSIGN_REQUEST":    c.Request,
		"COUNTERSIGN_RUN":        c.Step.Run,
		"COUNTERSIGN_STEP":       step,
		"COUNTERSIGN_SCOPE":      c.Scope,
		"COUNTERSIGN_IDENTITY":   c.Step.Identity,
		"COUNTERSIGN_EXPIRES_AT": c.ExpiresAt.UTC().Format(time.RFC3339),
	}
	text := map[string]string{}
	for name, v := range members {
		s := string(v)
		if v.Kind() == '"' {
			if err := json.Unmarshal(v, &s); err != nil {
				return nil, errors.New("the broker's answer holds no credential that this version knows")
			}
		}
		text[name] = s
		env["COUNTERSIGN_CREDENTIAL_"+strings.ToUpper(name)] = s
	}
	if text["kind"] == "gateway" && text["protocol"] == store.ProtocolPostgres {
		host, port, err := net.SplitHostPort(text["address"])
		if err != nil {
			return nil, errors.New("the broker's answer names no address of its gateway")
		}
		env["PGHOST"], env["PGPORT"], env["PGUSER"], env["PGPASSWORD"] = host, port, text["username"], text["token"]
		if text["database"] != "" {
			env["PGDATABASE"] = text["database"]
		}
	}
	usual := map[string]map[string]string{
		"vault_token": {"VAULT_TOKEN": "token", "VAULT_ADDR": "addr"},
		"wrapped":     {"VAULT_ADDR": "addr"},
		"database":    {"PGHOST": "host", "PGPORT": "port", "PGDATABASE": "database", "PGUSER": "username", "PGPASSWORD": "password"},
	}
	for name, member := range usual[text["kind"]] {
		if text[member] != "" {
			env[name] = text[member]
		}
	}
	for name, v := range env {
		if strings.ContainsRune(v, 0) {
			return nil, fmt.Errorf("%s would hold a zero byte, which no environment can", name)
		}
	}
	return env, nil
}
