package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/retention"
)

// retentionConfig says how long sealed texts are kept, by sensitivity: low,
// sensitive, critical, and default for what is about no scope. What is not named
// is kept for good.
type retentionConfig map[string]time.Duration

func (c retentionConfig) check() error {
	for class, kept := range c {
		if class != "default" && !slices.Contains(scopes.Sensitivities, class) {
			return fmt.Errorf("retention.%s: want low, sensitive, critical or default", class)
		}
		if kept < retention.Least {
			return fmt.Errorf("retention.%s: %s is too short: want at least %s, and mind that what is erased is gone", class, kept, retention.Least)
		}
	}
	return nil
}

// kept is c as it goes on record. Scopes of set that keep their texts longer
// than their sensitivity says are in it; set may be nil.
func (c retentionConfig) kept(set *scopes.Set) map[string]time.Duration {
	if len(c) == 0 {
		return nil
	}
	out := map[string]time.Duration{}
	for class, d := range c {
		if class == "default" {
			class = ""
		}
		out[class] = d
	}
	if set == nil {
		return out
	}
	for _, sc := range set.Scopes() {
		if least, named := out[sc.Sensitivity]; named && sc.Retention > least {
			out[ledger.OfScope+sc.Name] = sc.Retention
		}
	}
	return out
}

// announce puts on record what is in force at the recorder: its catalogue and
// policy, nil where it has none, and how long texts are kept.
func (c retentionConfig) announce(ctx context.Context, l *ledger.Ledger, trustDomain string, set *scopes.Set) error {
	x := retention.Loaded{Kept: c.kept(set)}
	if set != nil {
		x.Digest, x.CatalogueDigest, x.PolicyDigest = set.Digest(), set.CatalogueDigest(), set.PolicyDigest()
		x.Catalogue, x.Policy = set.Text().Catalogue, set.Text().Policy
	}
	return retention.Announce(ctx, l, eraser(trustDomain), time.Now(), x)
}

// open announces what is in force, finishes erasures that a crash left undone
// and begins to erase what is due. It is called before the listener is open.
func (c retentionConfig) open(ctx context.Context, l *ledger.Ledger, trustDomain, dir string, set *scopes.Set, log *zap.Logger) (*retention.Retention, error) {
	if err := c.announce(ctx, l, trustDomain, set); err != nil {
		return nil, err
	}
	return retention.Open(ctx, retention.Config{Ledger: l, By: eraser(trustDomain), File: filepath.Join(dir, "retention"), Log: log})
}

func eraser(trustDomain string) ledger.Eraser {
	return ledger.Eraser{Name: recorderName, Agent: "spiffe://" + trustDomain + "/recorder/" + recorderName}
}

func holdCommand() *cobra.Command {
	var recorder, token, output string
	cmd := &cobra.Command{
		Use:   "hold",
		Short: "Keep texts from being erased, as a responder",
		Long: `Keep the texts of a run, or of a window of time, from being erased. The recorder
is named by COUNTERSIGN_RECORDER; who holds follows from ` + "`countersign login`" + `, or
from the token in COUNTERSIGN_TOKEN. What is erased already is gone.`,
	}
	cmd.PersistentFlags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.PersistentFlags().StringVar(&token, "token", "", "the person's token ($COUNTERSIGN_TOKEN)")
	open := func() (*client.Responder, error) {
		url, token, err := person(recorder, token)
		if err != nil {
			return nil, err
		}
		return client.NewResponder(client.Config{URL: url, Token: client.Token(token)})
	}

	var run, from, to, reason string
	place := &cobra.Command{
		Use:     "place (--run R | --from T [--to T]) --reason R",
		Short:   "Hold the texts of a run, or of a window of time",
		Example: "  countersign hold place --run run-42 --reason \"OPS-1234, under investigation\"\n  countersign hold place --from 2026-01-01T00:00:00Z --to 2026-04-01T00:00:00Z --reason \"audit of Q1\"",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var window [2]time.Time
			for i, s := range []string{from, to} {
				if s == "" {
					continue
				}
				t, err := time.Parse(time.RFC3339Nano, s)
				if err != nil {
					return fmt.Errorf("%q is no time as in RFC 3339, such as 2026-01-31T08:00:00Z", s)
				}
				window[i] = t
			}
			if (run == "") == (from == "") || run != "" && to != "" {
				return errors.New("a hold covers a run or a window of time: add --run R, or --from T and --to T")
			}
			r, err := open()
			if err != nil {
				return err
			}
			h, err := r.PlaceHold(cmd.Context(), run, window[0], window[1], reason)
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			return printHold(cmd, output, h)
		},
	}
	place.Flags().StringVar(&run, "run", "", "the run whose texts are held")
	place.Flags().StringVar(&from, "from", "", "hold what is on record from this time on (RFC 3339)")
	place.Flags().StringVar(&to, "to", "", "and before this time; without end where it is missing")
	place.Flags().StringVar(&reason, "reason", "", "why; goes on record")
	outputFlag(place, &output, "table", "table", "json")

	list := &cobra.Command{
		Use:   "list",
		Short: "List all holds",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := open()
			if err != nil {
				return err
			}
			holds, err := r.Holds(cmd.Context())
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			if output == "json" {
				return printJSON(cmd, holds)
			}
			return listHolds(cmd.OutOrStdout(), holds)
		},
	}
	outputFlag(list, &output, "table", "table", "json")

	lift := &cobra.Command{
		Use:   "lift ID --reason R",
		Short: "Lift a hold: texts whose time is over are erased then",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := open()
			if err != nil {
				return err
			}
			h, err := r.LiftHold(cmd.Context(), args[0], reason)
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			return printHold(cmd, output, h)
		},
	}
	lift.Flags().StringVar(&reason, "reason", "", "why; goes on record")
	outputFlag(lift, &output, "table", "table", "json")
	cmd.AddCommand(place, list, lift)
	return cmd
}

func printHold(cmd *cobra.Command, output string, h *client.Hold) error {
	if output == "json" {
		return printJSON(cmd, h)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "hold %s is %s: %s\n", h.ID, h.State, covered(h))
	return err
}

// covered is what h holds, in words.
func covered(h *client.Hold) string {
	switch {
	case h.Run != "":
		return "run " + h.Run
	case h.To.IsZero():
		return "from " + h.From.Format(time.RFC3339) + " on"
	}
	return h.From.Format(time.RFC3339) + " to " + h.To.Format(time.RFC3339)
}

func listHolds(w io.Writer, holds []client.Hold) error {
	if len(holds) == 0 {
		_, err := fmt.Fprintln(w, "nothing is held")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tSTATE\tCOVERS\tBY\tSINCE\tREASON")
	for i := range holds {
		h := &holds[i]
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", h.ID, h.State, covered(h), oneLine(h.PlacedBy), h.PlacedAt.Local().Format(time.DateTime), oneLine(h.Reason))
	}
	return tw.Flush()
}
