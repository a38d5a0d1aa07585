package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func ledgerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ledger",
		Short: "Prepare a PostgreSQL ledger, and move a ledger between engines",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(ledgerInitCommand(), ledgerCopyCommand())
	return cmd
}

func ledgerInitCommand() *cobra.Command {
	var owner, role string
	cmd := &cobra.Command{
		Use:   "init --postgres OWNER-DSN --role NAME",
		Short: "Make a ledger's schema in PostgreSQL, for a role that can only append to it",
		Long: `Make a ledger's schema in PostgreSQL, owned by the user of the connection
string, and let the role NAME, which must exist, do there what a recorder does
and nothing else: read, append, and change what is open. The recorder then runs
as that role (postgres_file in its configuration), and cannot alter the log or
take its triggers away.

Where the schema is there already it is compared, and the role is let use it.
The connection string is a postgres:// URL or a file that holds one, so that no
password need stand in a process list.`,
		Example: `  createuser --pwprompt countersign_recorder
  countersign ledger init --postgres owner.dsn --role countersign_recorder`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if owner == "" || role == "" {
				return errors.New("name both the owner's connection string and the role: --postgres OWNER-DSN --role NAME")
			}
			dsn, err := readPlace(owner)
			if err != nil {
				return err
			}
			if !ledger.IsPostgres(dsn) {
				return fmt.Errorf("%s is no postgres:// URL, nor a file that holds one", owner)
			}
			if err := ledger.InitPostgres(cmd.Context(), dsn, role); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the ledger's schema is in place; put the connection string of %s in a file and name it as postgres_file in the recorder's configuration\n", role)
			return nil
		},
	}
	cmd.Flags().StringVar(&owner, "postgres", "", "connection string of the schema's owner, or a file that holds it")
	cmd.Flags().StringVar(&role, "role", "", "role that the recorder runs as")
	return cmd
}

func ledgerCopyCommand() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:   "copy FROM TO --key VERIFIER-KEY",
		Short: "Copy a ledger's database to another engine or place, and verify the copy",
		Long: `Copy a ledger's database from FROM to TO, exactly, and then verify the copy
whole: every entry hashed again, up to the signed checkpoint. FROM and TO are a
recorder's directory, a postgres:// URL, or a file that holds such a URL. No
recorder may have FROM open, and TO must hold no ledger.

The database alone is copied. The head file and the keys of the sealed texts
stay where they are: keep the recorder's directory, and add or remove
postgres_file in its configuration. To another directory, copy ` + "`head`" + ` and
` + "`details-keys.db`" + ` along.

A copy that was broken off is refused by the recorder and by another copy: drop
the schema in PostgreSQL, or remove ledger.db, and copy again.`,
		Example: `  countersign ledger copy /var/lib/countersign recorder.dsn --key log.pub
  countersign ledger copy recorder.dsn /var/lib/countersign --key log.pub`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" {
				return errors.New("no key given to verify the copy by: add --key with the log's verifier key")
			}
			vkey, err := readVerifierKey(key)
			if err != nil {
				return err
			}
			v, err := store.NewLogVerifier(vkey)
			if err != nil {
				return fmt.Errorf("key: %w", err)
			}
			from, err := readPlace(args[0])
			if err != nil {
				return err
			}
			to, err := readPlace(args[1])
			if err != nil {
				return err
			}
			var progress func(done, total int64)
			if isatty.IsTerminal(os.Stderr.Fd()) {
				progress = func(done, total int64) {
					what := "copied"
					if done > total/2 {
						what, done = "verified", done-total/2
					}
					fmt.Fprintf(os.Stderr, "\r\x1b[K%s %d of %d entries", what, done, total/2)
				}
				defer fmt.Fprint(os.Stderr, "\r\x1b[K")
			}
			head, err := ledger.Copy(cmd.Context(), from, to, v, progress)
			switch {
			case errors.Is(err, ledger.ErrLocked):
				return fmt.Errorf("%w: stop the recorder first", err)
			case errors.Is(err, ledger.ErrNotEmpty):
				return fmt.Errorf("%w: copy to an empty place; what a broken-off copy left is dropped first (DROP SCHEMA, or remove ledger.db)", err)
			case err != nil:
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), "copied and verified, up to this checkpoint:\n\n"+head)
			return nil
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "the log's verifier key, or a file that holds it")
	return cmd
}

// readPlace resolves where a ledger lies: a directory, a postgres:// URL, or a
// file that holds one.
func readPlace(s string) (string, error) {
	if info, err := os.Stat(s); ledger.IsPostgres(s) || err != nil || info.IsDir() {
		return s, nil // a directory may be about to be made
	}
	dsn, err := readSecret(s)
	if err != nil {
		return "", err
	}
	if !ledger.IsPostgres(dsn) {
		return "", fmt.Errorf("%s is a file, and holds no postgres:// URL: give a ledger's directory, or such a file", s)
	}
	return dsn, nil
}
