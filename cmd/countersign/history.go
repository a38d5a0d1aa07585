package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/store/evidence"
)

// historyFilters are the filters of GET /history, as flags of the same names.
var historyFilters = [][2]string{
	{"from", "entries from this time on (RFC 3339)"},
	{"to", "entries before this time (RFC 3339)"},
	{"run", "of this run"}, {"step", "of this step"}, {"orchestrator", "of this orchestrator"},
	{"request", "of this request"}, {"scope", "of this scope"}, {"target", "on this target"},
	{"person", "decided by this person (a pseudonym)"},
	{"type", "of this type, such as credential.issued"},
	{"outcome", "decided so: allow, deny or needs-approval"},
}

func historyCommand() *cobra.Command {
	var recorder, token, output string
	var limit int
	values := map[string]*string{}
	cmd := &cobra.Command{
		Use:   "history",
		Short: "Show what is on record, as a reviewer",
		Long: `Show what is on record, oldest first. The recorder is named by
COUNTERSIGN_RECORDER, the reviewer's token by COUNTERSIGN_TOKEN. What it shows
is what the recorder says; ` + "`countersign verify`" + ` says whether to believe it.
With -o story, of one step: what it asked for, was given and did with it, and
whether that is what its orchestrator says.`,
		Example: "  countersign history --run run-42\n  countersign history --type access.refused --from 2026-01-31T00:00:00Z -o json\n  countersign history --run run-42 --step investigate -o story",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q := url.Values{}
			for name, v := range values {
				if *v != "" {
					q.Set(name, *v)
				}
			}
			h, err := newHistory(orEnv(recorder, "COUNTERSIGN_RECORDER"), orEnv(token, "COUNTERSIGN_TOKEN"), q, limit)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				return h.json(cmd.Context(), cmd.OutOrStdout())
			case "csv":
				return h.csv(cmd.Context(), cmd.OutOrStdout())
			case "story":
				return h.story(cmd.Context(), cmd.OutOrStdout())
			}
			return h.table(cmd.Context(), cmd.OutOrStdout())
		},
	}
	for _, f := range historyFilters {
		values[f[0]] = cmd.Flags().String(f[0], "", f[1])
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "at most so many entries; 0 for all")
	cmd.Flags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.Flags().StringVar(&token, "token", "", "a reviewer's token ($COUNTERSIGN_TOKEN)")
	outputFlag(cmd, &output, "table", "table", "json", "csv", "story")
	return cmd
}

// history reads the pages of one query.
type history struct {
	reviewer *client.Reviewer
	query    url.Values
	limit    int
}

func newHistory(recorder, token string, query url.Values, limit int) (*history, error) {
	switch {
	case recorder == "":
		return nil, errors.New("no recorder named: set COUNTERSIGN_RECORDER, or add --recorder URL")
	case token == "":
		return nil, errors.New("no token given: set COUNTERSIGN_TOKEN to a reviewer's")
	case limit < 0:
		return nil, errors.New("--limit is negative")
	}
	r, err := client.NewReviewer(client.Config{URL: recorder, Token: client.Token(token)})
	return &history{r, query, limit}, err
}

// each calls fn for every entry, oldest first, page by page.
func (h *history) each(ctx context.Context, fn func(client.HistoryEntry) error) error {
	seen, q := 0, h.query
	for {
		if h.limit > 0 {
			q.Set("limit", strconv.Itoa(min(h.limit-seen, review.MaxLimit)))
		}
		page, err := h.page(ctx, q)
		if err != nil {
			return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
		}
		for _, e := range page.Entries {
			if err := fn(e); err != nil {
				return err
			}
			seen++
		}
		if page.Next == "" || (h.limit > 0 && seen >= h.limit) {
			return nil
		}
		q.Set("cursor", page.Next)
	}
}

func (h *history) page(ctx context.Context, q url.Values) (*client.HistoryPage, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return h.reviewer.History(ctx, q)
}

// json writes one document, entry by entry: a history may be long.
func (h *history) json(ctx context.Context, w io.Writer) error {
	enc := jsontext.NewEncoder(w)
	for _, t := range []jsontext.Token{jsontext.BeginObject, jsontext.String("entries"), jsontext.BeginArray} {
		if err := enc.WriteToken(t); err != nil {
			return err
		}
	}
	if err := h.each(ctx, func(e client.HistoryEntry) error { return json.MarshalEncode(enc, e, json.Deterministic(true)) }); err != nil {
		return err
	}
	for _, t := range []jsontext.Token{jsontext.EndArray, jsontext.EndObject} {
		if err := enc.WriteToken(t); err != nil {
			return err
		}
	}
	return nil
}

func (h *history) csv(ctx context.Context, w io.Writer) error {
	out := csv.NewWriter(w)
	if err := out.Write(evidence.HistoryColumns); err != nil {
		return err
	}
	err := h.each(ctx, func(e client.HistoryEntry) error {
		r, err := review.Row(e)
		if err != nil {
			return err
		}
		return out.Write(review.Cells(r))
	})
	out.Flush()
	return errors.Join(err, out.Error())
}

func (h *history) table(ctx context.Context, w io.Writer) error {
	out := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(out, "INDEX\tTIME\tTYPE\tRUN\tSTEP\tSCOPE\tOUTCOME\tDETAILS")
	rows := 0
	err := h.each(ctx, func(e client.HistoryEntry) error {
		rows++
		r, err := review.Row(e)
		if err != nil {
			return err
		}
		for i := range r {
			r[i] = strings.Map(visible, r[i])
		}
		_, err = fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r[0], r[1], r[2], r[4], r[5], r[6], r[7], r[9])
		return err
	})
	if err != nil && rows == 0 {
		return err // without the head of a table before it
	}
	return errors.Join(err, out.Flush())
}

// visible keeps out of the table what could rewrite a terminal: control
// characters, and those that turn the direction of writing.
func visible(c rune) rune {
	if unicode.IsControl(c) || unicode.Is(unicode.Bidi_Control, c) {
		return '\uFFFD'
	}
	return c
}
