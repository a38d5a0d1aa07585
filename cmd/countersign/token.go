package main

import (
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/auth"
)

func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Manage the API tokens of a token file",
		Long: `Manage the API tokens of orchestrators, writers, reviewers and resource
servers. A token file holds their hashes alone: a token is printed once, when
it is made. A running serve or record sees a change at once.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(tokenCreateCommand(), tokenRotateCommand(), tokenRevokeCommand(), tokenListCommand())
	return cmd
}

// tokenFlags name a token file, and whose token is meant.
type tokenFlags struct{ file, role, name string }

func (f *tokenFlags) add(cmd *cobra.Command, who bool) {
	cmd.Flags().StringVar(&f.file, "file", "", "token file")
	_ = cmd.MarkFlagRequired("file")
	roles := make([]string, len(auth.Roles))
	for i, r := range auth.Roles {
		roles[i] = string(r)
	}
	cmd.Flags().Var(&choice{&f.role, roles}, "role", "what its holder is")
	cmd.Flags().StringVar(&f.name, "name", "", "who its holder is")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(roles, cobra.ShellCompDirectiveNoFileComp))
	if who {
		_ = cmd.MarkFlagRequired("role")
		_ = cmd.MarkFlagRequired("name")
	}
}

func tokenCreateCommand() *cobra.Command {
	var f tokenFlags
	var expires time.Duration
	var owners, groups []string
	cmd := &cobra.Command{
		Use:     "create --file FILE --role ROLE --name NAME",
		Short:   "Make a token and print it, this once",
		Example: "  countersign token create --file orchestrators --role orchestrator --name ci --owner user:ada --expires 2160h",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			now := time.Now()
			for _, o := range owners {
				if err := auth.ValidPerson(o); err != nil {
					return fmt.Errorf("--owner: %w", err)
				}
			}
			t := auth.Token{Name: f.name, Role: auth.Role(f.role), Owners: owners, Groups: groups}
			switch {
			case expires < 0:
				return errors.New("--expires is negative")
			case expires > 0:
				end := now.Add(expires).UTC().Truncate(time.Second)
				t.Expires = &end
			}
			token, err := auth.CreateToken(f.file, t, now)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), token)
			return err
		},
	}
	f.add(cmd, true)
	cmd.Flags().DurationVar(&expires, "expires", 0, "how long it is valid; without it, until it is revoked")
	cmd.Flags().StringArrayVar(&owners, "owner", nil, "a person who owns the orchestrator, as user:NAME; may be repeated")
	cmd.Flags().StringArrayVar(&groups, "group", nil, "a group of an approver or responder; may be repeated")
	return cmd
}

func tokenRotateCommand() *cobra.Command {
	var f tokenFlags
	var overlap time.Duration
	cmd := &cobra.Command{
		Use:   "rotate --file FILE --role ROLE --name NAME",
		Short: "Make a new token and let the old one end after an overlap",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := auth.RotateToken(f.file, auth.Role(f.role), f.name, overlap, time.Now())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), token)
			return err
		},
	}
	f.add(cmd, true)
	cmd.Flags().DurationVar(&overlap, "overlap", time.Hour, "how long the old token stays valid")
	return cmd
}

func tokenRevokeCommand() *cobra.Command {
	var f tokenFlags
	var id string
	cmd := &cobra.Command{
		Use:   "revoke --file FILE (--id ID | --role ROLE --name NAME)",
		Short: "Remove a token, or all of a holder's",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (id == "") == (f.role == "" || f.name == "") {
				return errors.New("say which: --id as `countersign token list` shows it, or both --role and --name")
			}
			n, err := auth.RevokeToken(f.file, func(t *auth.Token) bool {
				if id != "" {
					return t.ID() == id
				}
				return string(t.Role) == f.role && t.Name == f.name
			})
			if err != nil {
				return err
			}
			if n == 0 {
				return fmt.Errorf("no such token in %s; `countersign token list --file %s` shows them", f.file, f.file)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "revoked %d\n", n)
			return err
		},
	}
	f.add(cmd, false)
	cmd.Flags().StringVar(&id, "id", "", "the token's ID")
	return cmd
}

// tokenRow is what token list shows.
type tokenRow struct {
	ID      string     `json:"id"`
	Role    auth.Role  `json:"role"`
	Name    string     `json:"name"`
	Created time.Time  `json:"created"`
	Expires *time.Time `json:"expires"` // null: until revoked
	Groups  []string   `json:"groups,omitzero"`
	Owners  []string   `json:"owners,omitzero"`
}

func tokenListCommand() *cobra.Command {
	var f tokenFlags
	var output string
	cmd := &cobra.Command{
		Use:   "list --file FILE",
		Short: "List the tokens of a file",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tokens, err := auth.ListTokens(f.file)
			if err != nil {
				return err
			}
			rows := []tokenRow{}
			for _, t := range tokens {
				if (f.role == "" || f.role == string(t.Role)) && (f.name == "" || f.name == t.Name) {
					rows = append(rows, tokenRow{t.ID(), t.Role, t.Name, t.Created, t.Expires, slices.Clone(t.Groups), slices.Clone(t.Owners)})
				}
			}
			if output == "json" {
				return printJSON(cmd, struct {
					Tokens []tokenRow `json:"tokens"`
				}{rows})
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tROLE\tNAME\tCREATED\tEXPIRES")
			for _, r := range rows {
				expires := "never"
				if r.Expires != nil {
					expires = r.Expires.Format(time.RFC3339)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.ID, r.Role, r.Name, r.Created.Format(time.RFC3339), expires)
			}
			return w.Flush()
		},
	}
	f.add(cmd, false)
	outputFlag(cmd, &output, "table", "table", "json")
	return cmd
}
