package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

func approvalsCommand() *cobra.Command {
	var recorder, token, output string
	cmd := &cobra.Command{
		Use:   "approvals",
		Short: "See what waits for approval, and decide it",
		Long: `See what waits for approval, and decide it, as a person. The recorder is named
by COUNTERSIGN_RECORDER; who decides follows from ` + "`countersign login`" + `, or from the
token in COUNTERSIGN_TOKEN. What a scope wants signed with a passkey is decided
on the page: ` + "`approvals show`" + ` prints its address.`,
	}
	cmd.PersistentFlags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.PersistentFlags().StringVar(&token, "token", "", "the person's token ($COUNTERSIGN_TOKEN)")
	open := func() (*client.Approver, error) {
		url, token, err := person(recorder, token)
		if err != nil {
			return nil, err
		}
		return client.NewApprover(client.Config{URL: url, Token: client.Token(token)})
	}

	var state string
	list := &cobra.Command{
		Use:   "list",
		Short: "List approvals",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := open()
			if err != nil {
				return err
			}
			all := []approvals.Request{}
			for cursor := ""; ; {
				p, err := a.List(cmd.Context(), state, cursor)
				if err != nil {
					return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
				}
				all = append(all, p.Approvals...)
				if cursor = p.Next; cursor == "" {
					break
				}
			}
			if output == "json" {
				return printJSON(cmd, all)
			}
			return listApprovals(cmd.OutOrStdout(), all)
		},
	}
	list.Flags().StringVar(&state, "state", "pending", "pending, mine, decided or all")
	outputFlag(list, &output, "table", "table", "json")

	show := &cobra.Command{
		Use:   "show ID",
		Short: "Show everything that one approval would grant",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := open()
			if err != nil {
				return err
			}
			r, err := a.Show(cmd.Context(), args[0])
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			if output == "json" {
				return printJSON(cmd, r)
			}
			return printApproval(cmd.OutOrStdout(), r)
		},
	}
	outputFlag(show, &output, "table", "table", "json")

	cmd.AddCommand(list, show)
	for _, d := range []struct{ verb, decision, short string }{
		{"approve", store.Approve, "Approve what `approvals show` shows"},
		{"deny", store.Refuse, "Deny a request; one denial is enough"},
	} {
		var reason string
		c := &cobra.Command{
			Use:   d.verb + " ID --reason R",
			Short: d.short,
			Args:  cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				a, err := open()
				if err != nil {
					return err
				}
				r, err := a.Decide(cmd.Context(), args[0], d.decision, reason)
				if err != nil {
					return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
				}
				if output == "json" {
					return printJSON(cmd, r)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %s: %s\n", r.ID, r.Status, needs(r))
				return err
			},
		}
		c.Flags().StringVar(&reason, "reason", "", "why; goes on record")
		outputFlag(c, &output, "table", "table", "json")
		cmd.AddCommand(c)
	}
	return cmd
}

// person returns the recorder's URL and a person's token: those given, those of
// the environment, or those that `countersign login` kept.
func person(url, token string) (string, string, error) {
	url, token = orEnv(url, "COUNTERSIGN_RECORDER"), orEnv(token, "COUNTERSIGN_TOKEN")
	if url == "" {
		return "", "", errors.New("no recorder named: set COUNTERSIGN_RECORDER, or add --recorder URL")
	}
	if token == "" {
		var err error
		if token, err = keptLogin(url, time.Now()); err != nil {
			return "", "", err
		}
	}
	return url, token, nil
}

// needs says who has approved and who is due, in words.
func needs(r *approvals.Request) string {
	var parts []string
	for _, n := range r.Needs {
		parts = append(parts, fmt.Sprintf("%d of %d of %s", n.Approved, n.Count, n.Group))
	}
	return strings.Join(parts, ", ")
}

func listApprovals(w io.Writer, all []approvals.Request) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "nothing is there")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tSTATUS\tSCOPE\tBY\tRUN/STEP\tNEEDS\tENDS\tREASON")
	for i := range all {
		r := &all[i]
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s/%s\t%s\t%s\t%s\n", r.ID, r.Status, r.Scope, r.Orchestrator, r.Run, r.Step, needs(r),
			r.Expires.Local().Format(time.DateTime), oneLine(r.Reason))
	}
	return tw.Flush()
}

// oneLine shows text that somebody else wrote on one line of a terminal: what
// would move the cursor or change how it reads is shown as a question mark, and
// what is cut is said.
func oneLine(s string) string {
	const most = 60
	runes := []rune(strings.Join(strings.Fields(s), " "))
	for i, c := range runes {
		if !unicode.IsPrint(c) {
			runes[i] = '?'
		}
	}
	if len(runes) > most {
		return string(runes[:most]) + fmt.Sprintf("… (%d more)", len(runes)-most)
	}
	return string(runes)
}

// printApproval shows all of r: nothing is cut, since it is what is approved.
func printApproval(w io.Writer, r *approvals.Request) error {
	subject := "nobody named"
	switch {
	case r.SubjectProved:
		subject = r.Subject + " (proved)"
	case r.Subject != "":
		subject = r.Subject + " (only claimed)"
	}
	g := &r.Grant
	rows := [][2]string{
		{"approval", r.ID}, {"status", string(r.Status)}, {"page", r.URL}, {"needs", needs(r)}, {"ends", r.Expires.Local().Format(time.DateTime)},
		{"scope", r.Scope}, {"target", r.Target}, {"sensitivity", r.Sensitivity},
		{"asked by", r.Orchestrator}, {"run", r.Run}, {"step", r.Step}, {"agent", r.Agent}, {"for", subject}, {"reason", r.Reason},
		{"engine", g.Engine}, {"vault role", g.Role}, {"vault policies", strings.Join(g.Policies, ", ")}, {"vault path", strings.TrimSpace(g.Method + " " + g.Path)},
		{"ttl", time.Duration(g.TTL).String()}, {"delivery", g.Delivery}, {"good for", r.GoodFor()}, {"public key", g.PublicKey}, {"audience", g.Audience},
		{"revocable", fmt.Sprint(g.Revocable)},
	}
	for _, t := range approvals.AccessInWords(g.Access) {
		rows = append(rows, [2]string{strings.ToLower(t.Name), strings.Join(t.Lines, "\n")})
	}
	if g.Access != nil {
		rows = append(rows, [2]string{"rules' digest", g.Access.Digest()})
	}
	for _, k := range slices.Sorted(maps.Keys(g.Params)) {
		rows = append(rows, [2]string{"param " + k, g.Params[k]})
	}
	for _, k := range slices.Sorted(maps.Keys(g.Data)) {
		rows = append(rows, [2]string{"sent to vault, " + k, g.Data[k]})
	}
	for _, p := range r.PolicyReasons {
		rows = append(rows, [2]string{"policy says", p})
	}
	rows = append(rows, [2]string{"policy", r.Policy}, [2]string{"ledger", fmt.Sprintf("entry %d, leaf %s", r.Index, r.LeafHash)})
	for _, d := range r.Decisions {
		signed := ""
		if d.Signed {
			signed = ", signed with a passkey"
		}
		rows = append(rows, [2]string{"decided", fmt.Sprintf("%s: %s by %s via %s%s: %s", d.At.Local().Format(time.DateTime), d.Decision, d.Person, d.Via, signed, d.Reason)})
	}
	for _, x := range r.Refused {
		rows = append(rows, [2]string{"did not count", fmt.Sprintf("%s: %s: %s", x.At.Local().Format(time.DateTime), x.Person, x.Problem)})
	}
	for _, row := range rows {
		if row[1] == "" {
			continue
		}
		// Further lines of a text stand under its first, so that none passes for
		// a row of its own.
		text := strings.Map(func(c rune) rune {
			if c == '\n' || unicode.IsPrint(c) {
				return c
			}
			return '?'
		}, strings.ReplaceAll(row[1], "\t", " "))
		if _, err := fmt.Fprintf(w, "%-16s %s\n", row[0], strings.ReplaceAll(text, "\n", "\n"+strings.Repeat(" ", 17))); err != nil {
			return err
		}
	}
	return nil
}
