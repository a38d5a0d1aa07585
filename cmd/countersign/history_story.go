package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
)

// maxStory bounds the entries of one story, which is read whole before it is
// told: what came of a use stands in a later entry.
const maxStory = 10_000

// story tells of one step what it asked for, what it was given, what it did with
// it, and whether that is what its orchestrator says.
func (h *history) story(ctx context.Context, w io.Writer) error {
	if h.query.Get("run") == "" || h.query.Get("step") == "" {
		return errors.New("a story is of one step: add --run R --step S")
	}
	if h.limit == 0 || h.limit > maxStory {
		h.limit = maxStory
	}
	type told struct {
		client.HistoryEntry
		*store.Entry
	}
	var entries []told
	outcomes := map[string]store.UseOutcome{}
	accounts := map[string]*store.Account{} // by orchestrator: two may name a step alike
	err := h.each(ctx, func(x client.HistoryEntry) error {
		e, err := store.ParseLeaf(x.Entry)
		if err != nil {
			return err
		}
		if e.Type == store.UseFinished {
			d, err := store.DetailsAs[store.UseFinishedDetails](e)
			if err != nil {
				return err
			}
			for _, o := range d.Outcomes {
				outcomes[o.Use] = o
			}
		}
		if accounts[e.Orchestrator] == nil {
			accounts[e.Orchestrator] = &store.Account{}
		}
		entries = append(entries, told{x, e})
		return accounts[e.Orchestrator].Take(e)
	})
	switch {
	case err != nil:
		return err
	case len(entries) == 0:
		return errors.New("nothing is on record of this step")
	}
	out := &storyWriter{w: w}
	of := ""
	for _, x := range entries {
		if x.Agent != of {
			of = x.Agent
			out.line("%s", of)
		}
		if err := out.entry(x.Index, x.Entry, x.Opened, outcomes); err != nil {
			return err
		}
	}
	if len(entries) == h.limit {
		out.line("more is on record: `countersign history` without -o story lists it")
	}
	for _, orchestrator := range slices.Sorted(maps.Keys(accounts)) {
		a := accounts[orchestrator]
		claim, claimed := a.Claim()
		if !claimed {
			out.line("%s has claimed nothing of it yet.", orchestrator)
			continue
		}
		verdict, why := a.Verdict()
		out.line("claimed %s by %s; claimed and observed: %s. %s", claim.Outcome, orchestrator, verdict, why)
	}
	return out.err
}

// storyWriter writes a story line by line. The first error stays.
type storyWriter struct {
	w   io.Writer
	err error
}

func (s *storyWriter) line(format string, a ...any) {
	if s.err == nil {
		_, s.err = fmt.Fprintln(s.w, strings.Map(visible, fmt.Sprintf(format, a...)))
	}
}

// quote adds a text of more than one line, each line by itself.
func (s *storyWriter) quote(text string) {
	for l := range strings.Lines(text) {
		s.line("                    | %s", strings.TrimRight(l, "\r\n"))
	}
}

func (s *storyWriter) entry(index int64, e *store.Entry, opened map[string]string, outcomes map[string]store.UseOutcome) error {
	say := func(format string, a ...any) {
		s.line("%6d  %s  %s", index, e.Time.UTC().Format("15:04:05.000"), fmt.Sprintf(format, a...))
	}
	switch e.Type {
	case store.StepRequested:
		outcome := ""
		if e.Decision != nil {
			outcome = string(e.Decision.Outcome)
		}
		say("asks for %s on %s: %s", e.Action, e.Resource, outcome)
		s.quote(opened[store.SealedReason])
	case store.ApprovalDecided, store.ApprovalStanding:
		d, err := store.DetailsAs[store.DecidedDetails](e)
		if err != nil {
			return err
		}
		say("%s by %s", d.Decision, cmp.Or(opened[store.SealedPerson], "a person"))
		s.quote(opened[store.SealedReason])
	case store.CredentialIssued:
		d, err := store.DetailsAs[store.IssuedDetails](e)
		if err != nil {
			return err
		}
		say("is given %s for %s, until %s", d.Kind, e.Action, d.Expires.UTC().Format("15:04:05"))
	case store.CredentialUsed:
		d, err := store.DetailsAs[store.UsedDetails](e)
		if err != nil {
			return err
		}
		came := "seen by " + d.By
		if o, ok := outcomes[e.ID]; ok {
			came = outcomeWords(o)
		} else if d.Via == store.ViaGateway {
			came = "what came of it is not on record"
		}
		say("used: %s -> %s", d.Use, came)
		s.quote(opened[store.SealedStatement])
	case store.AccessRefused:
		d, err := store.DetailsAs[store.RefusedDetails](e)
		if err != nil {
			return err
		}
		more := ""
		if d.Folded > 0 {
			more = fmt.Sprintf(", and %d more like it", d.Folded)
		}
		say("refused: %s (%s)%s", d.Route, cmp.Or(d.Reason, d.Problem), more)
		s.quote(opened[store.SealedStatement])
	case store.CredentialRevoked, store.CredentialExpired:
		cause := ""
		if e.Cause != nil {
			cause = ", " + *e.Cause
		}
		say("%s for %s%s", strings.Replace(string(e.Type), ".", " ", 1), e.Action, cause)
	case store.StepFinished:
		d, err := store.DetailsAs[store.FinishedDetails](e)
		if err != nil {
			return err
		}
		say("the orchestrator claims: %s %s", d.Outcome, d.Target)
		s.quote(opened[store.SealedSummary])
	case store.AlertRaised:
		d, err := store.DetailsAs[store.AlertDetails](e)
		if err != nil {
			return err
		}
		say("ALERT %s: %s", d.Alert, d.What)
	case store.FreezeSet:
		d, err := store.DetailsAs[store.FreezeDetails](e)
		if err != nil {
			return err
		}
		say("FROZEN by %s: %s", cmp.Or(opened[store.SealedPerson], "a responder"), d)
		s.quote(opened[store.SealedReason])
	case store.FreezeLifted:
		say("the freeze is lifted by %s", cmp.Or(opened[store.SealedPerson], "a responder"))
		s.quote(opened[store.SealedReason])
	case store.CredentialFailed, store.CredentialAbandoned, store.ApprovalRequested, store.ApprovalExpired, store.RequestVoid, store.RequestWithdrawn:
		say("%s for %s", strings.Replace(string(e.Type), ".", " ", 1), e.Action)
	}
	return nil
}

func outcomeWords(o store.UseOutcome) string {
	words := []string{cmp.Or(o.Status, "no answer")}
	if o.Error != "" {
		words = append(words, "error "+o.Error)
	}
	if o.Masked > 0 {
		words = append(words, fmt.Sprintf("%d masked", o.Masked))
	}
	return strings.Join(append(words, time.Duration(o.Took).Round(10*time.Microsecond).String()), ", ")
}
