package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// approval tells of a scope that a person decides: asked, seen, decided,
// minted, on record.
func (d *demo) approval(ctx context.Context) error {
	chapter("A scope that a person decides")
	const step = "rotate"
	body := `{"run":"` + runID + `","scope":"vault:demo-write","ttl":"2m","reason":"Rotate the greeting, OPS-4711"}`
	say("POST /steps/%s/credential  %s", step, body)
	var pending struct {
		Request, Status string
		Approval        struct {
			ID, URL string
			Needs   []struct {
				Group           string
				Count, Approved int
			}
		}
	}
	if err := d.dev.call(ctx, "POST", "/steps/"+step+"/credential", body, &pending); err != nil {
		return err
	}
	if pending.Status != "pending_approval" || pending.Approval.ID == "" || len(pending.Approval.Needs) != 1 {
		return fmt.Errorf("a sensitive scope must wait for a person, but: %+v", pending)
	}
	need := pending.Approval.Needs[0]
	say("202, waiting for %d of group %s at %s", need.Count, need.Group, pending.Approval.URL)

	// The orchestrator asks again, and this time waits for the decision.
	type answer struct {
		c   issued
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		var a answer
		a.err = d.dev.do(ctx, "POST", d.dev.API+"/steps/"+step+"/credential", body, &a.c, http.Header{"Prefer": {"wait=60"}})
		answered <- a
	}()

	as := func(name string, args ...string) (string, error) {
		for _, p := range d.dev.Approvers {
			if p.Name == name {
				return command(ctx, []string{"COUNTERSIGN_RECORDER=" + d.dev.Recorder, "COUNTERSIGN_TOKEN=" + p.Token}, d.binary, append([]string{"approvals"}, args...)...)
			}
		}
		return "", errors.New("dev has no approver " + name)
	}
	out, err := as("approver-a", "show", pending.Approval.ID)
	if err != nil {
		return err
	}
	for _, seen := range []string{"vault:demo-write", "OPS-4711", "countersign-vault-demo-write", "2m0s"} {
		if !strings.Contains(out, seen) {
			return fmt.Errorf("the approver is not shown %q:\n%s", seen, out)
		}
	}
	show("$ countersign approvals show "+pending.Approval.ID, "")
	show("", out)

	if out, err := as("approver-c", "approve", pending.Approval.ID, "--reason", "looks fine"); err == nil {
		return errors.New("a person of another group approved: " + out)
	} else {
		show("approver-c", "approve  ->  "+err.Error())
	}
	out, err = as("approver-a", "approve", pending.Approval.ID, "--reason", "agreed with OPS")
	if err != nil {
		return err
	}
	show("approver-a", "approve  ->  "+strings.TrimSpace(out))
	a := <-answered
	if a.err != nil {
		return fmt.Errorf("the waiting call must get its credential: %w", a.err)
	}
	if err := expect(&a.c, "vault_token", true); err != nil {
		return err
	}
	d.newest = max(d.newest, a.c.Ledger.Index)
	say("The waiting call is answered: 201, ledger index %d", a.c.Ledger.Index)

	status, _, err := vault(ctx, &a.c, "POST", "secret/data/demo", `{"data":{"greeting":"rotated"}}`)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("the approved token answers %d to what was approved", status)
	}
	show("vault", fmt.Sprintf("%-4s %-28s %d", "POST", "secret/data/demo", status))
	return d.dev.call(ctx, "POST", "/steps/"+step+"/result", `{"run":"`+runID+`","outcome":"succeeded"}`, nil)
}
