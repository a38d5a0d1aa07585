package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// lookEvery is between two looks at how far a revocation is.
const lookEvery = 250 * time.Millisecond

func revokeCommand() *cobra.Command {
	var recorder, reason, output string
	var by caller
	var stop client.Stop
	var wait bool
	cmd := &cobra.Command{
		Use:   "revoke --run R|--step S|--orchestrator O|--scope S|--all --reason R",
		Short: "Stop credentials, as a responder; end a step's, as its orchestrator",
		Long: `As a responder, stop all that a run, a step, an orchestrator or a scope asks
for, or everything: requests that wait are closed, new ones are refused, and live
credentials are revoked, at once and until another responder lifts it. Several
of the names hold together. The recorder is named by COUNTERSIGN_RECORDER; who
you are follows from ` + "`countersign login`" + `, or from the token in COUNTERSIGN_TOKEN.

As an orchestrator, with --run and --step and no --reason, end the credentials of
that step. The broker is named by COUNTERSIGN_ADDR, the token is in
COUNTERSIGN_TOKEN, or a certificate in the files of COUNTERSIGN_CERT and
COUNTERSIGN_KEY.

With --wait it ends once nothing is left that can be revoked, and with an error
where it is broken off before.`,
		Example: `  countersign revoke --run run-42 --reason "OPS-1234, leaked token"
  countersign revoke --all --reason "OPS-1234" --wait
  countersign revoke --run run-42 --step reconcile
  countersign revoke list
  countersign revoke lift ID --reason "explained, OPS-1234"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			step := stop.Run != "" && stop.Step != "" && !stop.All && stop.Orchestrator == "" && stop.Scope == ""
			responds := strings.HasPrefix(orEnv(by.token, "COUNTERSIGN_TOKEN"), "cs_responder_")
			if step && reason == "" && !responds {
				return revokeStep(cmd, &by, stop.Run, stop.Step, output)
			}
			if err := store.FreezeDetails(stop).Check(); err != nil {
				return fmt.Errorf("%w: add --run R, --step S, --orchestrator O, --scope S, or --all alone", err)
			}
			if strings.TrimSpace(reason) == "" {
				return errors.New("say why with --reason: it goes on record")
			}
			r, err := responder(recorder, by.token)
			if err != nil {
				return err
			}
			v, err := r.SetFreeze(cmd.Context(), stop, reason)
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			for _, doubt := range v.Doubts() {
				fmt.Fprintln(cmd.ErrOrStderr(), "countersign: freeze "+v.ID+": "+doubt)
			}
			if wait {
				v, err = untilGone(cmd, r, v)
			}
			if perr := printFreeze(cmd, output, v); perr != nil {
				return perr
			}
			return err
		},
	}
	cmd.PersistentFlags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.PersistentFlags().StringVar(&by.token, "token", "", "the caller's token ($COUNTERSIGN_TOKEN)")
	cmd.Flags().StringVar(&by.addr, "addr", "", "the broker's URL, for an orchestrator ($COUNTERSIGN_ADDR)")
	by.addCert(cmd)
	cmd.Flags().StringVar(&stop.Run, "run", "", "the run")
	cmd.Flags().StringVar(&stop.Step, "step", "", "the step")
	cmd.Flags().StringVar(&stop.Orchestrator, "orchestrator", "", "the orchestrator")
	cmd.Flags().StringVar(&stop.Scope, "scope", "", "the scope")
	cmd.Flags().BoolVar(&stop.All, "all", false, "everything")
	cmd.Flags().StringVar(&reason, "reason", "", "why; goes on record")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until nothing is left that can be revoked")
	outputFlag(cmd, &output, "text", "text", "json")

	var listOutput, liftOutput, why string
	list := &cobra.Command{
		Use:   "list [ID]",
		Short: "List the freezes, or one of them with the credentials still live under it",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := responder(recorder, by.token)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				v, err := r.Freeze(cmd.Context(), args[0])
				if err != nil {
					return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
				}
				return printFreeze(cmd, listOutput, v)
			}
			all, err := r.Freezes(cmd.Context())
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			if listOutput == "json" {
				return printJSON(cmd, all)
			}
			return listFreezes(cmd.OutOrStdout(), all)
		},
	}
	outputFlag(list, &listOutput, "table", "table", "json")
	lift := &cobra.Command{
		Use:   "lift ID --reason R",
		Short: "Lift a freeze that another person set",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.TrimSpace(why) == "" {
				return errors.New("say why with --reason: it goes on record")
			}
			r, err := responder(recorder, by.token)
			if err != nil {
				return err
			}
			v, err := r.LiftFreeze(cmd.Context(), args[0], why)
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			return printFreeze(cmd, liftOutput, v)
		},
	}
	lift.Flags().StringVar(&why, "reason", "", "why; goes on record")
	outputFlag(lift, &liftOutput, "text", "text", "json")
	cmd.AddCommand(list, lift)
	return cmd
}

func responder(recorder, token string) (*client.Responder, error) {
	url, token, err := person(recorder, token)
	if err != nil {
		return nil, err
	}
	return client.NewResponder(client.Config{URL: url, Token: client.Token(token)})
}

// revokeStep ends a step's credentials as its orchestrator.
func revokeStep(cmd *cobra.Command, by *caller, run, step, output string) error {
	for name, id := range map[string]string{"run": run, "step": step} {
		if !store.ValidID(id) {
			return fmt.Errorf("--%s: %q is not an ID of letters, digits, '.', '_' and '-'", name, id)
		}
	}
	b, err := by.broker()
	if err != nil {
		return err
	}
	r, err := b.Revoke(cmd.Context(), step, run)
	if err != nil {
		return hint(err, "the broker", "COUNTERSIGN_ADDR")
	}
	if output == "json" {
		if err := printJSON(cmd, r); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(cmd.OutOrStdout(), "revoked %d\n", r.Revoked)
		if r.Irrevocable > 0 {
			fmt.Fprintf(cmd.OutOrStdout(), "%d cannot be called back and end by their own time\n", r.Irrevocable)
		}
	}
	if r.Pending > 0 {
		return fmt.Errorf("Vault has not confirmed %d yet; the broker goes on trying, and so may you", r.Pending)
	}
	return nil
}

// untilGone waits until nothing that can be revoked is left under v, and returns
// what it is then. A look that fails is one too few: the recorder may be
// restarting.
func untilGone(cmd *cobra.Command, r *client.Responder, v *client.Revocation) (*client.Revocation, error) {
	ctx, show := cmd.Context(), isatty.IsTerminal(os.Stderr.Fd())
	left := func(err error) error {
		return fmt.Errorf("%d credentials are not revoked yet: the brokers go on; look again with `countersign revoke list %s`: %w", v.Left(), v.ID, err)
	}
	var failed error
	for {
		now, err := r.Freeze(ctx, v.ID)
		if err == nil {
			v, failed = now, nil
		} else if failed = err; ctx.Err() == nil && !passing(err) {
			return v, left(hint(err, "the recorder", "COUNTERSIGN_RECORDER"))
		}
		if show {
			fmt.Fprintf(os.Stderr, "\r\033[K%d revoked, %d left", v.Revoked, v.Left())
		}
		if failed == nil && (v.Left() == 0 || v.State == client.FreezeLifted) {
			if show {
				fmt.Fprint(os.Stderr, "\r\033[K")
			}
			if v.Left() > 0 {
				return v, left(errors.New("the freeze was lifted"))
			}
			return v, nil
		}
		select {
		case <-time.After(lookEvery):
		case <-ctx.Done():
			if show {
				fmt.Fprintln(os.Stderr)
			}
			return v, left(context.Cause(ctx))
		}
	}
}

// passing reports whether err may be over at the next try.
func passing(err error) bool {
	var p *problem.Problem
	var u *url.Error
	return errors.As(err, &p) && p.Status >= http.StatusInternalServerError || errors.As(err, &u)
}

func printFreeze(cmd *cobra.Command, output string, v *client.Revocation) error {
	if output == "json" {
		return printJSON(cmd, v)
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "freeze %s is %s: %s\n", v.ID, v.State, store.FreezeDetails(v.Stop))
	fmt.Fprintf(w, "requests closed %d, credentials revoked %d, still live %d, being made %d, cannot be called back %d\n", v.Closed, v.Revoked, v.Pending, v.Minting, v.Irrevocable)
	if v.State == client.FreezeLifted {
		fmt.Fprintf(w, "lifted by %s: %s\n", oneLine(v.LiftedBy), oneLine(v.LiftedReason))
	}
	if len(v.PendingCredentials)+len(v.IrrevocableCredentials) == 0 {
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "LIVE\tKIND\tSCOPE\tBY\tRUN/STEP\tREQUEST\tENDS\tWHY")
	row := func(live string, c *client.Covered, why string) {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s/%s\t%s\t%s\t%s\n", live, c.Kind, c.Scope, c.Orchestrator, c.Run, c.Step, c.Request, c.Expires.Local().Format(time.DateTime), why)
	}
	for i := range v.PendingCredentials {
		row("still", &v.PendingCredentials[i], oneLine(v.PendingCredentials[i].Why))
	}
	for i := range v.IrrevocableCredentials {
		row("to its end", &v.IrrevocableCredentials[i], "cannot be called back")
	}
	if v.More {
		fmt.Fprintln(tw, "and more")
	}
	return tw.Flush()
}

func listFreezes(w io.Writer, all *client.Revocations) error {
	if len(all.Revocations) == 0 {
		_, err := fmt.Fprintln(w, "nothing was ever stopped")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tSTATE\tCOVERS\tBY\tSINCE\tCLOSED\tREVOKED\tLIVE\tREASON")
	for i := range all.Revocations {
		v := &all.Revocations[i]
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", v.ID, v.State, store.FreezeDetails(v.Stop), oneLine(v.SetBy), v.SetAt.Local().Format(time.DateTime),
			v.Closed, v.Revoked, v.Left()+v.Irrevocable, oneLine(v.Reason))
	}
	if all.More {
		fmt.Fprintln(tw, "and older ones that were lifted")
	}
	return tw.Flush()
}
