// Demo tells what Countersign does with real output: it starts a PostgreSQL of
// its own and `countersign dev` with a real Vault, asks for credentials, uses
// them, ends them, and verifies the ledger. It exits 1 as soon as anything is
// not as told.
//
//	go run ./cmd/demo PATH-OF-COUNTERSIGN
//
// With -postgres it tells nothing, and runs a command with that PostgreSQL
// instead, whose DSN is in the environment as POSTGRES_DSN:
//
//	go run ./cmd/demo -postgres COMMAND...
package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/mattn/go-isatty"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 1 && args[0] == "-postgres":
		err = inScratch(func(dir string) error { return withPostgres(ctx, dir, args[1:]) })
	case len(args) == 1:
		err = inScratch(func(dir string) error { return run(ctx, dir, args[0]) })
	default:
		fmt.Fprintln(os.Stderr, "usage: demo PATH-OF-COUNTERSIGN | demo -postgres COMMAND...")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// inScratch calls fn with a directory that is gone afterwards.
func inScratch(fn func(dir string) error) error {
	dir, err := os.MkdirTemp("", "countersign-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// The PostgreSQL below may run as another user, who must pass through.
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	return fn(dir)
}

// withPostgres runs a command with a PostgreSQL of its own.
func withPostgres(ctx context.Context, dir string, args []string) error {
	pg, err := startPostgres(ctx, filepath.Join(dir, "pg"))
	if err != nil {
		return err
	}
	defer pg.stop()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "POSTGRES_DSN="+pg.dsn)
	// The command is asked to end, and what it started ends with it.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	return cmd.Run()
}

func run(ctx context.Context, dir, binary string) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	chapter("A PostgreSQL, a Vault, and countersign dev")
	pg, err := startPostgres(ctx, filepath.Join(dir, "pg"))
	if err != nil {
		return err
	}
	defer pg.stop()
	say("PostgreSQL %s", pg.version)
	dev, err := startDev(ctx, binary, filepath.Join(dir, "dev"), pg.dsn)
	if err != nil {
		return err
	}
	defer dev.stop()
	say("broker    %s", dev.API)
	say("recorder  %s", dev.Recorder)
	say("Vault     %s", dev.Vault.Addr)

	d := &demo{dev: dev, binary: binary, dir: dir}
	for _, part := range []func(context.Context) error{d.database, d.access, d.vaultToken, d.identity, d.approval, d.denied, d.record} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	chapter("Done")
	say("All of this was real: the role, the token, the signatures, the log. Run it yourself with `countersign dev`.")
	return nil
}

// demo is the story under way.
type demo struct {
	dev    *dev
	binary string
	dir    string
	newest int64 // ledger index of the newest issuance
}

const runID = "run-42"

func (d *demo) database(ctx context.Context) error {
	chapter("A database role for one step")
	c, err := d.ask(ctx, "reconcile", `{"run":"`+runID+`","scope":"orders-db:read","ttl":"5m","reason":"Reconcile refunds, OPS-1234"}`)
	if err != nil {
		return err
	}
	if err := expect(c, "database", true); err != nil {
		return err
	}
	say("PostgreSQL role %s, for %s", c.Credential.Username, time.Duration(c.ExpiresIn)*time.Second)

	rows, err := d.psql(ctx, c, "SELECT id, customer, amount_cents, status FROM orders ORDER BY id")
	if err != nil {
		return fmt.Errorf("the role must be able to read orders: %w", err)
	}
	show("psql", rows)
	if out, err := d.psql(ctx, c, "DELETE FROM orders"); err == nil {
		return errors.New("the role of a read scope deleted from orders: " + out)
	} else if !strings.Contains(err.Error(), "permission denied") {
		return fmt.Errorf("DELETE must be refused for lack of permission: %w", err)
	} else {
		show("psql", "DELETE FROM orders  ->  "+err.Error())
	}

	var ended struct{ Revoked, Pending int }
	if err := d.dev.call(ctx, "DELETE", "/steps/reconcile/credential?run="+runID, "", &ended); err != nil {
		return err
	}
	if ended.Revoked != 1 || ended.Pending != 0 {
		return fmt.Errorf("revoked %d, pending %d; want 1 and 0", ended.Revoked, ended.Pending)
	}
	say("The step is over: DELETE /steps/reconcile/credential  ->  revoked %d", ended.Revoked)
	if out, err := d.psql(ctx, c, "SELECT 1"); err == nil {
		return errors.New("a revoked role still logs in: " + out)
	} else if !strings.Contains(err.Error(), "authentication failed") && !strings.Contains(err.Error(), "does not exist") {
		return fmt.Errorf("the revoked role must be refused at login: %w", err)
	} else {
		show("psql", "SELECT 1  ->  "+err.Error())
	}
	return nil
}

func (d *demo) vaultToken(ctx context.Context) error {
	chapter("A Vault token that reads one path")
	c, err := d.ask(ctx, "configure", `{"run":"`+runID+`","scope":"vault:demo-read","ttl":"2m","reason":"Read the greeting"}`)
	if err != nil {
		return err
	}
	if err := expect(c, "vault_token", true); err != nil {
		return err
	}
	status, body, err := vault(ctx, c, "GET", "secret/data/demo", "")
	if err != nil {
		return err
	}
	if status != 200 {
		return fmt.Errorf("its one path answers %d", status)
	}
	show("vault", fmt.Sprintf("%-4s %-28s %d %s", "GET", "secret/data/demo", status, body))
	for _, other := range [][3]string{
		{"GET", "secret/data/other", ""},
		{"POST", "secret/data/demo", `{"data":{"greeting":"changed"}}`},
		{"LIST", "secret/metadata", ""},
		{"GET", "database/creds/orders-read", ""},
		{"GET", "sys/policies/acl", ""},
		{"POST", "auth/token/create", "{}"},
	} {
		status, _, err := vault(ctx, c, other[0], other[1], other[2])
		if err != nil {
			return err
		}
		if status != 403 {
			return fmt.Errorf("%s %s answers %d to a token that may read secret/data/demo alone; want 403", other[0], other[1], status)
		}
		show("vault", fmt.Sprintf("%-4s %-28s %d permission denied", other[0], other[1], status))
	}

	if err := d.dev.call(ctx, "POST", "/steps/configure/result", `{"run":"`+runID+`","outcome":"succeeded","summary":"greeting read"}`, nil); err != nil {
		return err
	}
	status, _, err = vault(ctx, c, "GET", "secret/data/demo", "")
	if err != nil {
		return err
	}
	if status != 403 {
		return fmt.Errorf("the token of a finished step answers %d; want 403", status)
	}
	say("The step reports its result, and its token is gone: GET secret/data/demo  ->  %d", status)
	return nil
}

func (d *demo) identity(ctx context.Context) error {
	chapter("An identity of the step's own")
	c, err := d.ask(ctx, "deploy", `{"run":"`+runID+`","scope":"identity:step","ttl":"2m"}`)
	if err != nil {
		return err
	}
	if err := expect(c, "identity", false); err != nil {
		return err
	}
	// As any relying party does it: discovery, key set, signature, expiry.
	provider, err := oidc.NewProvider(ctx, d.dev.API)
	if err != nil {
		return fmt.Errorf("discovery: %w", err)
	}
	token, err := provider.Verifier(&oidc.Config{SkipClientIDCheck: true, SupportedSigningAlgs: []string{"ES256", "RS256", "EdDSA"}}).Verify(ctx, c.Credential.Token)
	if err != nil {
		return fmt.Errorf("the identity token does not verify against %s/.well-known/jwks.json: %w", d.dev.API, err)
	}
	if token.Subject != c.Step.Identity || len(token.Audience) == 0 {
		return fmt.Errorf("the token is for %s %v, the reply names %s", token.Subject, token.Audience, c.Step.Identity)
	}
	show("jwt", "sub "+token.Subject)
	show("jwt", "aud "+strings.Join(token.Audience, ", ")+"; exp "+token.Expiry.UTC().Format(time.RFC3339))
	say("Its signature holds against the published key set.")

	altered := []byte(c.Credential.Token)
	altered[len(altered)/2] ^= 1
	if _, err := provider.Verifier(&oidc.Config{SkipClientIDCheck: true, SupportedSigningAlgs: []string{"ES256", "RS256", "EdDSA"}}).Verify(ctx, string(altered)); err == nil {
		return errors.New("an altered token verified")
	}
	say("With one bit changed it does not.")
	return nil
}

func (d *demo) denied(ctx context.Context) error {
	chapter("What is refused")
	for _, try := range []struct{ what, method, url, body, slug string }{
		{"a scope that nobody has", "POST", d.dev.API + "/steps/s1/credential", `{"run":"run-42","scope":"orders-db:drop"}`, "unknown-scope"},
		{"a longer life than the scope gives", "POST", d.dev.API + "/steps/s1/credential", `{"run":"run-42","scope":"vault:demo-read","ttl":"24h"}`, "ttl-too-long"},
		{"a sensitive scope without a reason", "POST", d.dev.API + "/steps/s1/credential", `{"run":"run-42","scope":"vault:demo-admin"}`, "reason-required"},
		{"the ledger, with the orchestrator's token", "GET", d.dev.Recorder + "/history", "", ""},
	} {
		var p problem
		err := d.dev.do(ctx, try.method, try.url, try.body, nil)
		if !errors.As(err, &p) || (try.slug != "" && p.slug() != try.slug) || (p.Status != 401 && p.Status != 403 && p.Status != 422) {
			return fmt.Errorf("%s must be refused, but: %v", try.what, err)
		}
		show(fmt.Sprint(p.Status), fmt.Sprintf("%-42s %s", try.what, p.slug()))
	}
	return nil
}

func (d *demo) record(ctx context.Context) error {
	chapter("What the ledger says, and whether it can be believed")
	env := []string{"COUNTERSIGN_RECORDER=" + d.dev.Recorder, "COUNTERSIGN_TOKEN=" + d.dev.Reviewers[0].Token}
	out, err := command(ctx, env, d.binary, "history", "--run", runID)
	if err != nil {
		return err
	}
	show("$ countersign history --run "+runID, "")
	show("", out)
	if err := d.published(ctx); err != nil {
		return err
	}
	out, err = command(ctx, env, d.binary, "verify", d.dev.Recorder, "--key", d.dev.LogKey)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(out, "verified: ") {
		return errors.New("verify says: " + out)
	}
	show("$ countersign verify "+d.dev.Recorder+" --key "+d.dev.LogKey, "")
	show("", out)
	// A wrong key must not verify: the same name and another key.
	other, err := command(ctx, nil, d.binary, "key", "generate", "log", "--name", strings.SplitN(d.dev.LogKey, "+", 2)[0], "--out", filepath.Join(d.dir, "other.key"))
	if err != nil {
		return err
	}
	if out, err := command(ctx, env, d.binary, "verify", d.dev.Recorder, "--key", strings.TrimSpace(other)); err == nil {
		return errors.New("the log verified under a key that is not its own: " + out)
	}
	say("Under any other key it does not verify.")
	return d.evidence(ctx, env)
}

// evidence takes the record away as a bundle and verifies it with nothing but
// the file and the log's key.
func (d *demo) evidence(ctx context.Context, env []string) error {
	chapter("What a reviewer takes home, and checks without us")
	file := filepath.Join(d.dir, "review.zip")
	if _, err := command(ctx, env, d.binary, "export", "-o", file); err != nil {
		return err
	}
	show("$ countersign export -o review.zip", "")
	out, err := command(ctx, []string{"COUNTERSIGN_RECORDER=", "COUNTERSIGN_TOKEN="}, d.binary, "verify", file, "--key", d.dev.LogKey)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(out, "verified: ") || !strings.Contains(out, "complete: ") {
		return errors.New("verify says of the bundle: " + out)
	}
	show("$ countersign verify review.zip --key "+d.dev.LogKey, "")
	show("", out)
	r, err := zip.OpenReader(file)
	if err != nil {
		return err
	}
	defer r.Close()
	report, err := r.Open("REPORT.html")
	if err != nil {
		return err
	}
	defer report.Close()
	html, err := io.ReadAll(report)
	if err != nil {
		return err
	}
	if !strings.Contains(string(html), runID) {
		return errors.New("REPORT.html does not tell of " + runID)
	}
	say("REPORT.html in it answers the reviewer's four questions on one page, %d KiB.", len(html)>>10)
	return nil
}

// published waits until the published head covers the newest issuance: a
// recorder publishes every few moments, and the log is verified up to there.
func (d *demo) published(ctx context.Context) error {
	for range 100 {
		size, err := d.dev.published(ctx)
		if err != nil {
			return err
		}
		if size > d.newest {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("entry %d is not under a published head after 10 s", d.newest)
}

func chapter(title string) {
	if colour {
		fmt.Printf("\n\033[1m%s\033[0m\n", title)
		return
	}
	fmt.Printf("\n== %s\n", title)
}

func say(format string, a ...any) { fmt.Printf("  "+format+"\n", a...) }

// show prints what a program answered, line by line.
func show(who, text string) {
	if who != "" && colour {
		who = "\033[2m" + who + "\033[0m"
	}
	if text == "" {
		fmt.Printf("  %s\n", who)
		return
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if who == "" {
			fmt.Printf("    %s\n", line)
		} else {
			fmt.Printf("    %s  %s\n", who, line)
		}
	}
}

var colour = isatty.IsTerminal(os.Stdout.Fd()) && os.Getenv("NO_COLOR") == ""
