// Countersign issues one short-lived credential per step and records every
// issuance in a ledger that the orchestrator cannot reach. This command wires
// its parts into processes; what it does lives in the packages beside it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	// The heap is small and its garbage plenty: collecting at four times what
	// is live costs tens of megabytes and saves a tenth of the processor's time.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	os.Exit(run())
}

// run is main without its exit, so that script tests can call it.
func run() int {
	// What this program says goes through zap. Libraries do not know what may be
	// said: net/http quotes what a target sends too much of (Transport, "Unsolicited
	// response"), a masked value or a secret among it.
	log.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process, whatever is under way
	err := root().ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var exit *exitError
	if errors.As(err, &exit) {
		if exit.err != nil {
			complain(exit.err)
		}
		return exit.code
	}
	complain(err)
	return 1
}

// complain writes err to stderr as one line.
func complain(err error) {
	text := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	fmt.Fprintln(os.Stderr, "countersign: "+text)
}

// exitError ends the process with code. A nil err says nothing more.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "countersign",
		Short: "A short-lived credential per agent step, and a record nobody can edit unnoticed",
		Long: `Countersign gives each step of an agent run one short-lived credential of its
own, minted through HashiCorp Vault, and records every issuance in a
tamper-evident ledger that the orchestrator cannot reach.

Start with: countersign dev`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       buildVersion(),
	}
	cmd.SetVersionTemplate("countersign {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())
	})
	cmd.AddCommand(
		devCommand(),
		serveCommand(),
		recordCommand(),
		witnessCommand(),
		requestCommand(),
		runCommand(),
		approvalsCommand(),
		loginCommand(),
		revokeCommand(),
		historyCommand(),
		exportCommand(),
		verifyCommand(),
		holdCommand(),
		ledgerCommand(),
		scopesCommand(),
		tokenCommand(),
		keyCommand(),
		doctorCommand(),
		healthCommand(),
		versionCommand(),
	)
	return cmd
}
