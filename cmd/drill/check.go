package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// late is how long after its TTL a credential may still be alive: as long as Vault
// may be left alone with one whose broker died.
const late = time.Minute

// record is the whole history, as a reviewer reads it.
type record struct {
	entries []*store.Entry
	leaves  [][]byte
}

// readRecord reads every entry there is.
func (h *house) readRecord(ctx context.Context) (*record, error) {
	c, err := client.NewReviewer(client.Config{URL: h.recorderURL(), Token: client.Token(h.reviewer), Transport: h.console.Transport})
	if err != nil {
		return nil, err
	}
	var r record
	for cursor := ""; ; {
		page, err := c.History(ctx, url.Values{"limit": {"1000"}, "cursor": {cursor}})
		if err != nil {
			return nil, err
		}
		for _, e := range page.Entries {
			if e.Index != int64(len(r.entries)) {
				return nil, fmt.Errorf("the history leaves out entry %d", len(r.entries))
			}
			x, err := store.ParseLeaf(e.Entry)
			if err != nil {
				return nil, err
			}
			r.entries, r.leaves = append(r.entries, x), append(r.leaves, e.Entry)
		}
		if cursor = page.Next; cursor == "" {
			return &r, nil
		}
	}
}

// settled says which intents have no outcome yet, and which revocable credentials
// are open.
func (r *record) settled() error {
	minting, live := map[string]int{}, map[string]int{}
	for i, e := range r.entries {
		switch e.Type {
		case store.CredentialIssuing:
			minting[e.ID] = i
		case store.CredentialIssued:
			d, err := store.DetailsAs[store.IssuedDetails](e)
			if err != nil {
				return err
			}
			delete(minting, d.Intent)
			if d.Revocable {
				live[d.Intent] = i
			}
		case store.CredentialFailed, store.CredentialAbandoned, store.CredentialRevoked, store.CredentialExpired:
			d, err := store.DetailsAs[store.ClosedDetails](e)
			if err != nil {
				return err
			}
			delete(minting, d.Intent)
			delete(live, d.Intent)
		}
	}
	if len(minting)+len(live) > 0 {
		return fmt.Errorf("%d intents without an outcome, %d credentials not closed", len(minting), len(live))
	}
	return nil
}

// drill is what the checks look at.
type drill struct {
	h      *house
	load   *load
	people *people
	eye    *eye
	record *record

	findings []string
	facts    []string
}

func (d *drill) finding(format string, args ...any) {
	d.findings = append(d.findings, fmt.Sprintf(format, args...))
}

func (d *drill) fact(format string, args ...any) {
	d.facts = append(d.facts, fmt.Sprintf(format, args...))
}

// check waits until all has ended that has an end, and compares what callers hold,
// what is on record, and what Vault, its audit log and the target say.
func (d *drill) check(ctx context.Context) error {
	if err := until(ctx, askTTL+late+30*time.Second, "nothing is alive in Vault and in the target", func() error {
		tokens, roles, err := d.eye.look(ctx)
		if err == nil && tokens+roles > 0 {
			err = fmt.Errorf("%d tokens and %d roles", tokens, roles)
		}
		return err
	}); err != nil {
		d.finding("%v", err)
	}
	var err error
	if e := until(ctx, 2*time.Minute, "everything on record has its end on record", func() error {
		if d.record, err = d.h.readRecord(ctx); err != nil {
			return err
		}
		return d.record.settled()
	}); e != nil {
		d.finding("%v", e)
	}
	if d.record == nil {
		return errors.New("the record cannot be read")
	}
	d.checkIssued()
	d.checkDecisions()
	d.checkLives()
	if err := d.checkAudit(); err != nil {
		return err
	}
	return d.checkHeads(ctx)
}

// checkIssued wants every acknowledged issuance and use on record, once, and never
// two live credentials of one request.
func (d *drill) checkIssued() {
	r := d.record
	ids, byIntent, uses := map[string]int{}, map[string]int{}, map[string]int{}
	live := map[string]string{} // request to intent
	for i, e := range r.entries {
		if was, ok := ids[e.ID]; ok {
			d.finding("entry %s is on record at %d and at %d", e.ID, was, i)
		}
		ids[e.ID] = i
		switch e.Type {
		case store.CredentialIssued:
			x, err := store.DetailsAs[store.IssuedDetails](e)
			if err != nil {
				d.finding("entry %d: %v", i, err)
				continue
			}
			if was, ok := byIntent[x.Intent]; ok {
				d.finding("an intent is issued at %d and at %d", was, i)
			}
			byIntent[x.Intent] = i
			if was, ok := live[e.Request]; ok && x.Revocable {
				d.finding("%s has two live credentials by the record: of intent %s, and entry %d", e.Request, was, i)
			}
			live[e.Request] = x.Intent
		case store.CredentialRevoked, store.CredentialExpired:
			if x, err := store.DetailsAs[store.ClosedDetails](e); err == nil && live[e.Request] == x.Intent {
				delete(live, e.Request)
			}
		case store.CredentialUsed:
			if x, err := store.DetailsAs[store.UsedDetails](e); err == nil && x.Via == store.ViaGateway {
				uses[x.Intent]++
			}
		case store.AlertRaised:
			d.finding("entry %d is an alert: %s", i, e.Details)
		}
	}
	held := map[int64]*issued{}
	var answered, recorded int
	for _, c := range d.load.issued {
		c.window.credentials++
		i := c.Ledger.Index
		if held[i] != nil {
			c.window.doubled++
			d.finding("%s and %s were both answered with entry %d", held[i].Request, c.Request, i)
		}
		held[i] = c
		if i >= int64(len(r.entries)) {
			c.window.lost++
			d.finding("%s: entry %d of its answer is not on record", c.Request, i)
			continue
		}
		e, hash := r.entries[i], store.LeafHash(r.leaves[i])
		if e.Type != store.CredentialIssued || e.Request != c.Request || e.Step != c.step || e.Run != c.run || e.Action != c.Scope ||
			e.Orchestrator != c.orchestrator || base64.StdEncoding.EncodeToString(hash[:]) != c.Ledger.LeafHash {
			c.window.lost++
			d.finding("%s: entry %d is not what its answer says: %s of %s", c.Request, i, e.Type, e.Request)
			continue
		}
		if c.secret.Kind != "gateway" {
			continue
		}
		x, err := store.DetailsAs[store.IssuedDetails](e)
		if err != nil {
			d.finding("entry %d: %v", i, err)
			continue
		}
		n := uses[x.Intent]
		answered, recorded = answered+c.answered, recorded+n
		if n < c.answered {
			c.window.lost += c.answered - n
			d.finding("%s: %d uses were answered, and %d are on record", c.Request, c.answered, n)
		}
		if n > c.sent {
			c.window.doubled += n - c.sent
			d.finding("%s: %d uses were made, and %d are on record", c.Request, c.sent, n)
		}
	}
	d.fact("%d entries on record, %d credentials issued, %d of them received", len(r.entries), len(byIntent), len(held))
	d.fact("%d uses answered by the access path, %d on record for the same sessions", answered, recorded)
}

// checkDecisions wants every decision that a person was told to be on record
// there, once.
func (d *drill) checkDecisions() {
	on := map[string]int{} // request, decision
	for _, e := range d.record.entries {
		if e.Type == store.ApprovalDecided {
			if x, err := store.DetailsAs[store.DecidedDetails](e); err == nil {
				on[e.Request+" "+x.Decision]++
			}
		}
	}
	told := map[string]int{}
	for _, t := range d.people.took {
		told[t.request+" "+t.decision]++
	}
	for t, n := range told {
		if on[t] != n {
			d.finding("%s: told %d times, on record %d times", t, n, on[t])
		}
	}
	d.fact("%d decisions told to people, all on record once", len(d.people.took))
}

// checkLives wants nothing to have lived longer than its TTL and a minute, and no
// two credentials of a request at once.
func (d *drill) checkLives() {
	names := map[string]string{} // accessors that are on record
	for _, e := range d.record.entries {
		if e.Type == store.CredentialIssued {
			if x, err := store.DetailsAs[store.IssuedDetails](e); err == nil {
				names[x.Accessor] = e.Request
			}
		}
	}
	var longest time.Duration
	var unheld int
	for accessor, l := range d.eye.tokens {
		if l.request == "" {
			continue
		}
		if names[accessor] == "" {
			unheld++
		}
		longest = max(longest, l.last.Sub(l.first)-askTTL)
		if l.last.Sub(l.first) > askTTL+late {
			d.finding("%s: a token was alive for %s", l.request, l.last.Sub(l.first))
		}
	}
	for name, l := range d.eye.roles {
		longest = max(longest, l.last.Sub(l.first)-askTTL)
		if l.last.Sub(l.first) > askTTL+late {
			d.finding("the database role %s was alive for %s", name, l.last.Sub(l.first))
		}
	}
	for _, accessors := range d.eye.together {
		held := 0
		for _, a := range accessors {
			if names[a] != "" {
				held++
			}
		}
		if held > 1 {
			d.finding("%s had %d live credentials at once in Vault", d.eye.tokens[accessors[0]].request, held)
		}
	}
	d.fact("%d tokens and %d database roles seen alive; the longest outlived its TTL by %s", len(d.eye.tokens), len(d.eye.roles), max(0, longest).Round(time.Second))
	d.fact("%d tokens were made whose secret nobody was given, since a broker or Vault failed in between", unheld)
}

// audited is a line of Vault's audit log, as far as it matters here.
type audited struct {
	Type    string `json:"type"`
	Error   string `json:"error"`
	Request struct {
		Path string `json:"path"`
	} `json:"request"`
	Response struct {
		Auth struct {
			Metadata map[string]string `json:"metadata"` // in the clear, unlike what was asked
		} `json:"auth"`
	} `json:"response"`
}

// checkAudit goes through what Vault itself logged: every token that it made for a
// step has its intent on record, and, where the scope wants people, their approval
// before the intent.
func (d *drill) checkAudit() error {
	set, err := scopes.Open(d.h.file("catalogue.yaml"), "")
	if err != nil {
		return err
	}
	scopeOf := map[string]*scopes.Scope{}
	for _, s := range set.Current().Scopes() {
		scopeOf[s.VaultName()] = s
	}
	intents := map[string]int{}
	approved := map[string]int{} // request to its first approval
	for i, e := range d.record.entries {
		switch e.Type {
		case store.CredentialIssuing:
			intents[e.ID] = i
		case store.ApprovalDecided:
			if x, err := store.DetailsAs[store.DecidedDetails](e); err == nil && x.Decision == store.Approve {
				if _, ok := approved[e.Request]; !ok {
					approved[e.Request] = i
				}
			}
		}
	}
	f, err := os.Open(d.h.byName["vault"].file("audit.log"))
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewReader(f)
	var mints, due, broken int
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		var a audited
		if err := json.Unmarshal(line, &a); err != nil {
			broken++ // a full disk, or a kill, cut it short: Vault answered nobody then
			continue
		}
		role, ok := strings.CutPrefix(a.Request.Path, "auth/token/create/")
		if !ok || a.Type != "response" || a.Error != "" || scopeOf[role] == nil {
			continue
		}
		mints++
		meta := a.Response.Auth.Metadata
		i, ok := intents[meta["intent"]]
		if !ok {
			d.finding("Vault made a token under %s that no intent accounts for: %v", role, meta)
			continue
		}
		e := d.record.entries[i]
		if e.Action != scopeOf[role].Name {
			d.finding("Vault made a token under %s for an intent of %s", role, e.Action)
		}
		if scopeOf[role].Approval == nil {
			continue
		}
		due++
		if at, ok := approved[e.Request]; !ok || at > i {
			d.finding("%s: a token for %s was made without an approval before it", e.Request, e.Action)
		}
	}
	d.fact("%d tokens made by Vault's audit log, each with its intent on record; %d wanted an approval, and had it (%d lines cut short)", mints, due, broken)
	if mints == 0 || due == 0 {
		d.finding("Vault's audit log has no mint, or none that wanted an approval: the drill shows nothing of it")
	}
	return nil
}

// checkHeads has the program verify the log, from every head that somebody kept.
func (d *drill) checkHeads(ctx context.Context) error {
	h := d.h
	heads := map[string]string{
		"recorder-1": h.byName["recorder-1"].file("state/head"),
		"recorder-2": h.byName["recorder-2"].file("state/head"),
	}
	for i := range brokers {
		name := "broker-" + strconv.Itoa(i+1)
		heads[name] = h.byName[name].file("head")
	}
	res, err := h.console.Get("https://" + h.net.nodes["witness"].host() + ":8790/logs")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var logs []struct{ Checkpoint string }
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&logs); err != nil || len(logs) != 1 {
		return fmt.Errorf("the witness knows %d logs: %w", len(logs), err)
	}
	heads["witness"] = h.file("witness.head")
	if err := h.write("witness.head", logs[0].Checkpoint); err != nil {
		return err
	}
	forks, err := h.console.Get("https://" + h.net.nodes["witness"].host() + ":8790/forks")
	if err != nil {
		return err
	}
	defer forks.Body.Close()
	if b, err := io.ReadAll(io.LimitReader(forks.Body, 1<<20)); err != nil || forks.StatusCode != http.StatusOK || len(bytes.Trim(b, " \n[]")) > 0 && string(bytes.TrimSpace(b)) != "null" {
		d.finding("the witness has evidence of a fork: %s %v", b, err)
	}
	if err := os.Setenv("COUNTERSIGN_TOKEN", h.reviewer); err != nil {
		return err
	}
	for name, file := range heads {
		// The newest head is published and cosigned a moment after it was kept.
		if err := until(ctx, time.Minute, "the log verifies from the head of "+name, func() error {
			_, err := h.cli("verify", h.recorderURL(), "--key", h.logKey, "--witness", h.witness, "--since", file)
			return err
		}); err != nil {
			d.finding("%v", err)
		}
	}
	d.fact("the log verifies from the heads kept by %d recorders, %d brokers and the witness", recorders, brokers)
	return nil
}
