package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/scopes"
)

func scopesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "scopes",
		Short: "Check a catalogue, run policy cases, print what Vault needs",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(scopesLintCommand(), scopesTestCommand(), scopesVaultCommand())
	return cmd
}

func scopesLintCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "lint FILE...",
		Short: "Check catalogues (YAML) and policies (.rego)",
		Long: `Check catalogues and policies; a name that ends in .rego is a policy. Each
problem is printed as FILE:LINE:COLUMN, with what to write instead. Exit
status 1 when there is one.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			problems := scopes.Lint(args...)
			for _, p := range problems {
				fmt.Fprintln(cmd.OutOrStdout(), p)
			}
			if len(problems) > 0 {
				return fmt.Errorf("%d found; nothing would be loaded before they are mended", len(problems))
			}
			return nil
		},
	}
}

func scopesTestCommand() *cobra.Command {
	var catalogue, policy string
	cmd := &cobra.Command{
		Use:   "test FILE",
		Short: "Run policy cases",
		Long: `Run the policy cases of a file: what is asked, and what the decision must be.
The file names its own catalogue and policy unless --catalogue and --policy
do. docs/policy.md describes the format.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var set *scopes.Set
			if catalogue != "" {
				var err error
				if set, err = scopes.Load(catalogue, policy); err != nil {
					return err
				}
			}
			results, err := scopes.Test(cmd.Context(), args[0], set)
			if err != nil {
				return err
			}
			failed := 0
			for _, r := range results {
				verdict := "ok  "
				if len(r.Failures) > 0 {
					verdict, failed = "FAIL", failed+1
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", verdict, r.Name)
				for _, f := range r.Failures {
					fmt.Fprintf(cmd.OutOrStdout(), "     %s:%d: %s\n", args[0], r.Line, f)
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d of %d cases failed", failed, len(results))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&catalogue, "catalogue", "", "catalogue to judge by, instead of the one the file names")
	cmd.Flags().StringVar(&policy, "policy", "", "policy to judge by, with --catalogue")
	return cmd
}

func scopesVaultCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "vault FILE",
		Short: "Print the Vault policies, token roles and commands a catalogue needs",
		Long: `Print the Vault policies and token roles that a catalogue needs and no more,
the broker's own policy included, as commands for Vault's operator to run. The
broker itself never has the right to write a policy.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := scopes.Load(args[0], "")
			if err != nil {
				return err
			}
			return scopes.VaultSetup(set, scopes.VaultOptions{}).Format(cmd.OutOrStdout())
		},
	}
}
