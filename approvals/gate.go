package approvals

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// Gate returns what the recorder asks about each entry that a writer submits,
// for ledger.Options.Gate: a broker that was taken over, or has another
// catalogue, must not record that fewer people are due than the recorder's own
// catalogue says, nor show them something that this catalogue does not give.
// owners are those of each orchestrator, as "user:NAME". Its errors are
// *store.OrderError, or wrap store.ErrMalformed.
func Gate(catalogue Catalogue, owners map[string][]string, key store.PrivacyKey) func(*store.Submission) error {
	excluded := map[string][]string{}
	for orchestrator, people := range owners {
		for _, p := range people {
			excluded[orchestrator] = append(excluded[orchestrator], key.Pseudonym(p))
		}
	}
	return func(s *store.Submission) error {
		g := gate{set: catalogue.Current(), owners: excluded[s.Orchestrator], entry: &s.Entry}
		switch {
		case s.Type == store.ApprovalRequested:
			return g.asked()
		case s.Type == store.StepRequested && s.Decision != nil && s.Decision.Outcome != store.Deny:
			return g.requested()
		}
		return nil
	}
}

// gate judges one entry by the recorder's own catalogue.
type gate struct {
	set    *scopes.Set
	owners []string // pseudonyms of the orchestrator's owners
	entry  *store.Entry
}

func weak(format string, a ...any) error {
	return &store.OrderError{Code: store.OrderWeak, Message: fmt.Sprintf(format, a...)}
}

// scope is the entry's scope in the recorder's own catalogue.
func (g *gate) scope() (*scopes.Scope, error) {
	sc, ok := g.set.Scope(g.entry.Action)
	if !ok {
		return nil, weak("the recorder's catalogue has no scope %.128q; bring both catalogues to one state", g.entry.Action)
	}
	return sc, nil
}

// requested judges step.requested. What waits for people is judged by the
// approval.requested that must stand in the same append.
func (g *gate) requested() error {
	sc, err := g.scope()
	if err != nil {
		return err
	}
	d, err := store.DetailsAs[store.RequestedDetails](g.entry)
	if err != nil {
		return err
	}
	switch {
	case g.entry.Decision.Outcome != store.Deny && g.shown(sc, &d.Grant) != nil:
		return g.shown(sc, &d.Grant)
	case d.Standing != nil:
		if err := g.covers(sc, &d.Standing.Rule, d.Standing.Excluded); err != nil {
			return err
		}
		return g.grants(&d.Grant) // nobody is shown it, so it must be what the scope gives
	case g.entry.Decision.Outcome == store.Allow && sc.Approval != nil:
		return weak("the recorder's catalogue wants people to approve %s", sc.Name)
	}
	return nil
}

// asked judges approval.requested.
func (g *gate) asked() error {
	sc, err := g.scope()
	if err != nil {
		return err
	}
	d, err := store.DetailsAs[store.ApprovalRequestedDetails](g.entry)
	if err != nil {
		return err
	}
	if err := g.covers(sc, &d.Rule, d.Excluded); err != nil {
		return err
	}
	if err := g.shown(sc, &d.Grant); err != nil {
		return err
	}
	return g.grants(&d.Grant)
}

// shown compares what stands beside the grant, and is shown first, with the
// grant itself and with the catalogue.
func (g *gate) shown(sc *scopes.Scope, d *store.Grant) error {
	e := g.entry
	switch {
	case d.Scope != e.Action:
		return &store.OrderError{Code: store.OrderMismatch, Message: "the entry names another scope than its grant"}
	case e.Resource != d.Target:
		return &store.OrderError{Code: store.OrderMismatch, Message: "the entry names another target than its grant"}
	case e.Risk == nil || e.Risk.Sensitivity != sc.Sensitivity:
		return &store.OrderError{Code: store.OrderMismatch, Message: "the recorder's catalogue has another sensitivity for " + sc.Name}
	case !strings.HasSuffix(e.Agent, "/orchestrator/"+e.Orchestrator+"/run/"+e.Run+"/step/"+e.Step):
		return &store.OrderError{Code: store.OrderMismatch, Message: "the entry names another agent than its step's"}
	}
	return nil
}

// covers compares a rule with the scope's own. Where the scope has none, a
// policy demanded it, and there is nothing to fall short of but the owners.
func (g *gate) covers(sc *scopes.Scope, rule *store.Rule, excluded []string) error {
	if sc.Approval != nil && !rule.Covers(sc.Approval) {
		return weak("the rule for %s asks for less than the recorder's catalogue does", sc.Name)
	}
	for _, o := range g.owners {
		if !slices.Contains(excluded, o) {
			return weak("an owner of %s is not excluded from approving", g.entry.Orchestrator)
		}
	}
	return nil
}

// grants compares a grant with what the recorder's own catalogue makes of the
// same values.
func (g *gate) grants(d *store.Grant) error {
	own, err := g.set.Resolve(g.entry.Action, time.Duration(d.TTL), d.Params, d.Delivery, d.PublicKey, d.Audience)
	if err != nil {
		return &store.OrderError{Code: store.OrderMismatch, Message: "the recorder's catalogue does not give this grant: " + err.Error()}
	}
	if own.Digest() != d.Digest() {
		return &store.OrderError{Code: store.OrderMismatch, Message: "the recorder's catalogue gives another grant for " + g.entry.Action}
	}
	return nil
}
