package review

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// judgedEntries is how many entries of a step are read to judge its claim.
	judgedEntries = 20_000
	// maxStatement is how many characters of one statement, or of an excerpt of
	// what came back, a story shows; the entry's own page has it whole.
	maxStatement = 1500
	// maxTold is how many results one entry's facts list.
	maxTold = 20
)

// claim is what a step was reported to be, against what was observed.
type claim struct {
	Claimed string        `json:"claimed"` // the outcome
	Target  string        `json:"target,omitzero"`
	Verdict store.Verdict `json:"verdict"` // agree, differ or "not observed"
	Why     string        `json:"why"`
}

// Tone is how the page marks it.
func (c *claim) Tone() string {
	return map[store.Verdict]string{store.Agree: "good", store.Differ: "danger", store.NotObserved: "warn"}[c.Verdict]
}

// judge compares what is claimed of a step with what was observed, over all of
// its entries; nil where nothing is claimed.
func (s *Server) judge(r *http.Request, run, step string) (*claim, error) {
	var a store.Account
	q := ledger.Query{Run: run, Step: step, Limit: MaxLimit}
	size := s.ledger.Size()
	for next, read := int64(0), 0; ; {
		f, err := s.index.Find(r.Context(), q, next, size)
		if err != nil {
			return nil, err
		}
		for i := range f.Entries {
			e, err := store.ParseLeaf(f.Entries[i].Entry)
			if err != nil {
				return nil, problem.Internal(fmt.Errorf("entry %d: %w", f.Entries[i].Index, err))
			}
			_ = a.Take(e) // what cannot be read says nothing, and the verifier names it
		}
		n := len(f.Entries)
		read += n
		if n == 0 || !f.Newer {
			break
		}
		if next = f.Entries[n-1].Index + 1; read >= judgedEntries {
			d, _ := a.Claim()
			return &claim{d.Outcome, d.Target, store.NotObserved, fmt.Sprintf("The step has more than %s entries, which this page does not read. An evidence bundle tells, in steps.csv.", thousands(judgedEntries))}, nil
		}
	}
	d, claimed := a.Claim()
	if !claimed {
		return nil, nil
	}
	verdict, why := a.Verdict()
	return &claim{d.Outcome, d.Target, verdict, why}, nil
}

// resultWords says what came of one use.
func resultWords(o *store.UseOutcome) string {
	var parts []string
	add := func(format string, a ...any) { parts = append(parts, fmt.Sprintf(format, a...)) }
	switch {
	case o.Error != "":
		words := map[string]string{
			store.UseCut: "cut: the session ended", store.UseUpstream: "failed at the target, which was not reached or hung up", store.UseTimeout: "it took too long",
			store.UseClient: "the step hung up", store.UseWithheld: "withheld: what came back could not be masked surely",
		}[o.Error]
		if words == "" {
			words = "failed: " + o.Error
		}
		add("%s", words)
		if o.Status != "" {
			add("%s", o.Status)
		}
	case o.Status == "":
		add("succeeded")
	default:
		add("%s", o.Status)
	}
	if o.Rows > 0 {
		add("%s", page.Count(int(o.Rows), "row"))
	}
	if o.Masked > 0 {
		add("%s masked", page.Count(int(o.Masked), "value"))
	}
	if o.Sent > 0 {
		add("%s bytes in", thousands(o.Sent))
	}
	if o.Received > 0 {
		add("%s bytes out", thousands(o.Received))
	}
	add("%s", time.Duration(o.Took).Round(time.Microsecond).String())
	return strings.Join(parts, ", ")
}

// results tells each use of items what came of it, and returns items without the
// entries that told nothing else. A use whose result is not among items says so.
func results(items []*item) []*item {
	uses := map[string]*item{}
	for _, it := range items {
		if it.Type == store.CredentialUsed {
			uses[it.ID] = it
		}
	}
	ended := map[string]bool{}
	items = slices.DeleteFunc(items, func(it *item) bool {
		if it.Type != store.UseFinished {
			return false
		}
		outcomes := details[store.UseFinishedDetails](it.Entry).Outcomes
		samples := store.SplitSamples(it.Opened[store.SealedSample], len(outcomes))
		told := len(outcomes) > 0
		for i := range outcomes {
			o := &outcomes[i]
			u := uses[o.Use]
			if u == nil || u.Request != it.Request || ended[o.Use] {
				told = false
				continue
			}
			ended[o.Use] = true
			u.fact("What came of it", resultWords(o))
			u.Outcome = o
			if o.Error != "" {
				u.Tone = "danger"
			}
			if i < len(samples) && samples[i] != "" {
				sample, more := page.Begin(samples[i], maxStatement)
				if more > 0 {
					sample += fmt.Sprintf(" … (%d more characters in entry %d)", more, it.Index)
				}
				u.fact("What came back, masked", sample)
			}
		}
		return told && len(it.Missing) == 0
	})
	for id, u := range uses {
		if !ended[id] && details[store.UsedDetails](u.Entry).Via == store.ViaGateway {
			u.fact("What came of it", "No result of it is told here.")
		}
	}
	return items
}

// masked says in words what rules hide.
func masked(m store.Masking) (lines []string) {
	for _, r := range m.Rules {
		switch {
		case r.Field != "":
			lines = append(lines, "the field or column "+r.Field)
		case r.Path != "":
			lines = append(lines, "what stands at "+r.Path)
		case r.Column != "":
			lines = append(lines, "the column "+r.Column)
		case r.Type != "":
			lines = append(lines, "values of the type "+r.Type)
		case r.Detector != "":
			lines = append(lines, "what looks like: "+r.Detector)
		}
	}
	return lines
}
