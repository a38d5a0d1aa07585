package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
)

// closeWithin is how long run tries to report the result and so to end the
// credential. After it the credential ends by its own TTL.
const closeWithin = 30 * time.Second

func runCommand() *cobra.Command {
	var ask askFlags
	cmd := &cobra.Command{
		Use:   "run --scope S --step ID --run ID [flags] -- COMMAND...",
		Short: "Run a command with a credential of its own, ended with the command",
		Long: `Ask for a credential, run a command with it in its environment, report the
result, and so end the credential, also when this is stopped by a signal. The
exit status is the command's.

The environment holds COUNTERSIGN_CREDENTIAL_<MEMBER> for each member of the
credential, COUNTERSIGN_REQUEST, _RUN, _STEP, _SCOPE, _IDENTITY, _EXPIRES_AT,
and, by kind, VAULT_TOKEN and VAULT_ADDR, or PGHOST, PGPORT, PGDATABASE,
PGUSER and PGPASSWORD. COUNTERSIGN_TOKEN, COUNTERSIGN_CERT and COUNTERSIGN_KEY,
the orchestrator's own, are taken out.
` + exitCodesHelp + `
Stopped by a signal while it waits, it takes the request back.`,
		Example: `  countersign run --scope orders-db:read --run run-42 --step reconcile -- psql -c 'SELECT count(*) FROM orders'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("no command given: put it after --")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := exec.LookPath(args[0])
			if err != nil {
				return &exitError{127, err} // before anything is asked for
			}
			broker, err := ask.broker()
			if err != nil {
				return err
			}
			c, err := ask.request(cmd.Context(), broker)
			if err != nil {
				if left := ask.abandon(cmd.Context(), broker, err); left != nil {
					complain(left)
				}
				return err
			}
			env, err := credentialEnv(ask.step, c)
			code := 1
			if err == nil {
				code, err = runChild(cmd.Context(), path, args, env)
			}
			if err != nil {
				complain(err)
			}
			r := client.Result{Run: ask.ask.Run, Outcome: "succeeded", Summary: "exit status 0"}
			if code != 0 {
				r.Outcome, r.Summary = "failed", fmt.Sprintf("exit status %d", code)
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), closeWithin)
			defer cancel()
			switch done, err := broker.Result(ctx, ask.step, r); {
			case err != nil:
				complain(fmt.Errorf("the result could not be reported, so the credential ends by itself at %s: %w", c.ExpiresAt.Format(time.RFC3339), err))
			case done.Pending > 0:
				complain(fmt.Errorf("Vault has not confirmed the end of %d credentials yet; the broker goes on trying", done.Pending))
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
	ask.add(cmd)
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// abandon ends what a request may have come to whose answer never came: it was
// not waited for, or the connection broke. What people have not decided it takes
// back, where this was stopped by a signal; else the same command joins it.
func (f *askFlags) abandon(ctx context.Context, b *client.Broker, cause error) error {
	var answer *problem.Problem
	if f.pending != "" && ctx.Err() != nil {
		stopped, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWithin)
		defer cancel()
		if _, err := b.Withdraw(stopped, f.pending); err != nil && !errors.As(err, &answer) {
			return fmt.Errorf("request %s could not be taken back: %w", f.pending, err)
		}
	}
	if !f.unanswered || errors.As(cause, &answer) || errors.Is(cause, syscall.ECONNREFUSED) {
		return nil // nothing is out
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWithin)
	defer cancel()
	_, err := b.Revoke(ctx, f.step, f.ask.Run)
	return err
}

// runChild runs the command and returns its exit status, 128 plus the signal's
// number where one ended it, as shells have it.
func runChild(ctx context.Context, path string, args []string, env map[string]string) (int, error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	if ctx.Err() != nil { // stopped while the credential was on its way
		return 128 + int(syscall.SIGTERM), nil
	}
	child := exec.Command(path, args[1:]...)
	child.Args[0] = args[0]
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.Env = childEnv(os.Environ(), env)
	if err := child.Start(); err != nil {
		return 126, err
	}
	terminal := isatty.IsTerminal(os.Stdin.Fd())
	done := make(chan error, 1)
	go func() { done <- child.Wait() }()
	for {
		select {
		case s := <-signals:
			// A terminal sends its keys' signals to the child as well.
			if terminal && (s == syscall.SIGINT || s == syscall.SIGQUIT) {
				continue
			}
			_ = child.Process.Signal(s)
		case err := <-done:
			var exit *exec.ExitError
			switch {
			case err == nil:
				return 0, nil
			case !errors.As(err, &exit):
				return 1, err
			}
			if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				return 128 + int(ws.Signal()), nil
			}
			return exit.ExitCode(), nil
		}
	}
}

// ownEnv is who the orchestrator is.
var ownEnv = []string{"COUNTERSIGN_TOKEN", "COUNTERSIGN_TOKEN_FILE", "COUNTERSIGN_CERT", "COUNTERSIGN_KEY"}

// childEnv is the environment of the command: that of this process without the
// orchestrator's own and without credentials that the new one replaces.
func childEnv(env []string, set map[string]string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		_, replaced := set[name]
		return replaced || slices.Contains(ownEnv, name) || strings.HasPrefix(name, "COUNTERSIGN_CREDENTIAL_")
	})
	for name, value := range set {
		env = append(env, name+"="+value)
	}
	return env
}
