package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// The exit codes of verify, by the outer contract.
const (
	exitProblem   = 1 // the log is wrong
	exitUnchecked = 2 // no verdict was reached
)

func verifyCommand() *cobra.Command {
	var key, since, token, saveTo, output string
	cmd := &cobra.Command{
		Use:   "verify RECORDER-URL|LEDGER --key VERIFIER-KEY",
		Short: "Check a recorder's whole log from outside",
		Long: `Check a recorder's whole log from outside: the signature on its head, every
entry and every stored hash against the tree, and that it continues an
earlier checkpoint. With a reviewer's token the entries themselves are read
and checked for order too; without one the tree is checked from its hashes.

LEDGER is a ledger's directory or its database file, or a copy of either: for
when the recorder refuses to run, or is not to be asked. It is read and never
written, also while a recorder has it open.

The key is the log's verifier key or a file that holds it, from a place other
than the recorder itself: a log does not vouch for itself.

Exit status: 0 verified; 1 a problem, each named with its entry; 2 could not
be checked.`,
		Example: `  countersign verify https://recorder.example.com --key log.pub --save head.txt
  countersign verify https://recorder.example.com --key log.pub --since head.txt
  countersign verify /var/lib/countersign --key log.pub --since head.txt`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			unchecked := func(err error) error { return &exitError{exitUnchecked, err} }
			from := orEnv("", "COUNTERSIGN_RECORDER")
			if len(args) == 1 {
				from = args[0]
			}
			if from == "" {
				return unchecked(errors.New("no log named: give the recorder's URL or the ledger's directory, or set COUNTERSIGN_RECORDER"))
			}
			if key == "" {
				return unchecked(errors.New("no key given, and a log does not vouch for itself: add --key with the log's verifier key"))
			}
			vkey, err := readVerifierKey(key)
			if err != nil {
				return unchecked(err)
			}
			log, err := store.NewLogVerifier(vkey)
			if err != nil {
				return unchecked(err)
			}
			o := evidence.Options{Log: log}
			if since != "" {
				b, err := os.ReadFile(since)
				if err != nil {
					return unchecked(err)
				}
				o.Since = string(b)
			}
			if isatty.IsTerminal(os.Stderr.Fd()) {
				o.Progress = func(done, total int64) {
					fmt.Fprintf(os.Stderr, "\r\033[K%d of %d entries", done, total)
					if done >= total {
						fmt.Fprint(os.Stderr, "\r\033[K")
					}
				}
			}
			report, err := verifyLog(cmd.Context(), from, orEnv(token, "COUNTERSIGN_TOKEN"), o)
			if errors.Is(err, ledger.ErrMismatch) { // a database file that is none any more
				return &exitError{exitProblem, err}
			}
			if err != nil {
				return unchecked(err)
			}
			if output == "json" {
				err = printJSON(cmd, report)
			} else {
				err = printReport(cmd, report)
			}
			if err != nil {
				return err
			}
			if !report.OK() {
				return &exitError{exitProblem, fmt.Errorf("the log does not verify: %s", report.Findings[0])}
			}
			if saveTo != "" {
				return os.WriteFile(saveTo, []byte(report.Checkpoint), 0o644)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "the log's verifier key, or a file that holds it")
	cmd.Flags().StringVar(&since, "since", "", "file with an earlier checkpoint that the log must continue")
	cmd.Flags().StringVar(&saveTo, "save", "", "write the checkpoint here once it verified, for a later --since")
	cmd.Flags().StringVar(&token, "token", "", "a reviewer's token ($COUNTERSIGN_TOKEN)")
	outputFlag(cmd, &output, "text", "text", "json")
	return cmd
}

// verifyLog verifies the log at from: a recorder's URL, or the place of a
// ledger's database.
func verifyLog(ctx context.Context, from, token string, o evidence.Options) (*evidence.Report, error) {
	if !strings.Contains(from, "://") {
		db, err := evidence.OpenDatabase(from)
		if err != nil {
			return nil, err
		}
		defer db.Close()
		return evidence.Verify(ctx, db, o)
	}
	src, err := evidence.NewRecorder(from, token)
	if err != nil {
		return nil, err
	}
	return evidence.Verify(ctx, src, o)
}

// readVerifierKey takes the key itself or a file that holds it.
func readVerifierKey(s string) (string, error) {
	if strings.Count(s, "+") >= 2 {
		if _, err := os.Stat(s); err != nil {
			return s, nil
		}
	}
	text, err := readSecret(s)
	if err != nil {
		return "", fmt.Errorf("key: %w", err)
	}
	return text, nil
}

func printReport(cmd *cobra.Command, r *evidence.Report) error {
	out := cmd.OutOrStdout()
	for _, f := range r.Findings {
		fmt.Fprintln(out, "problem:", f)
	}
	if r.Cut {
		fmt.Fprintln(out, "problem: and more that are not listed")
	}
	verdict := "verified"
	if !r.OK() {
		verdict = "NOT verified"
	}
	_, err := fmt.Fprintf(out, "%s: %s, %d entries (%d read), root %s\n", verdict, r.Origin, r.Size, r.Leaves, r.Root)
	if err == nil && r.Since > 0 {
		_, err = fmt.Fprintf(out, "continues the earlier checkpoint of size %d\n", r.Since)
	}
	return err
}

// orEnv returns value, or that of the environment variable name.
func orEnv(value, name string) string {
	if value != "" {
		return value
	}
	return os.Getenv(name)
}
