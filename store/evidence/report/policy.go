package report

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/countersign-dev/countersign/store"
)

// Texts longer than maxPolicy are not compared, and of what changed maxChanged
// lines are shown.
const (
	maxPolicy  = 256 << 10
	maxChanged = 200
)

// policyText are the texts that a policy.loaded names.
type policyText struct {
	digest, catalogue, policy         string
	catalogueDigest, policyDigest     string
	hasCatalogue, hasPolicy, compared bool
}

// diffLine is a line of what changed; Sign is "+", "-", "@" or " ".
type diffLine struct{ Sign, Text string }

// policy takes policy.loaded: what was in force from then on.
func (r *Report) policy(t taken) error {
	e := t.e
	d, err := read[store.PolicyDetails](e)
	if err != nil {
		return err
	}
	now := policyText{digest: keep(d.Digest).Text, catalogueDigest: d.Catalogue, policyDigest: d.Policy, compared: true}
	now.catalogue, now.hasCatalogue = t.opened[store.SealedCatalogue]
	now.policy, now.hasPolicy = t.opened[store.SealedPolicy]
	if len(now.catalogue) > maxPolicy || len(now.policy) > maxPolicy {
		now.catalogue, now.policy, now.compared = "", "", false
	}
	old := r.before
	r.before = now
	if !r.policies.room() {
		if t.window {
			r.policies.n++
		}
		return nil
	}
	row := &policyRow{
		index: t.index, time: e.Time, window: t.window, writer: keep(e.Writer).Text, digest: now.digest,
		catalogue: keep(d.Catalogue).Text, policy: keep(d.Policy).Text,
	}
	for sensitivity, d := range d.Retention {
		row.retention = append(row.retention, labelled{orDefault(sensitivity, "about no scope"), span(d)})
	}
	sortLabelled(row.retention)
	switch {
	case old.digest == "":
		row.change = "the first of this export"
	case old.catalogueDigest == now.catalogueDigest && old.policyDigest == now.policyDigest:
		row.change = "same catalogue and policy as before"
	case !old.hasCatalogue || !now.hasCatalogue || !old.compared || !now.compared:
		row.change = "changed; the texts cannot be compared here, see policies/"
	default:
		row.compare("catalogue", old.catalogue, now.catalogue)
		row.compare("policy", old.policy, now.policy)
		row.change = fmt.Sprintf("changed: %s added, %s removed", count(row.added, "line", "lines"), count(row.removed, "line", "lines"))
	}
	if t.window {
		r.policies.add(row)
	} else {
		r.policies.rows = append(r.policies.rows, row)
	}
	return nil
}

// compare adds what changed between two texts.
func (row *policyRow) compare(name, old, now string) {
	for i, line := range bytes.Split(diff.Diff(name+" before", []byte(old), name+" now", []byte(now)), []byte("\n")) {
		s := string(line)
		if i == 0 || s == "" { // "diff old new", and the end
			continue
		}
		l := diffLine{Sign: s[:1], Text: s[1:]}
		if strings.HasPrefix(s, "--- ") || strings.HasPrefix(s, "+++ ") || s[0] == '@' {
			l = diffLine{Sign: "@", Text: s}
		}
		switch l.Sign {
		case "+":
			row.added++
		case "-":
			row.removed++
		}
		if len(row.diff) == maxChanged {
			row.cut = true
			continue
		}
		l.Text = keep(l.Text).String()
		row.diff = append(row.diff, l)
	}
}

// labelled is a text with what it is.
type labelled struct{ Label, Text string }

// key takes what changes by what people can decide.
func (r *Report) key(t taken) error {
	e := t.e
	row := &eventRow{index: t.index, time: e.Time, window: t.window, who: r.person(e)}
	var err error
	switch e.Type {
	case store.PasskeyEnrolled:
		row.what = "passkey enrolled"
		if s := t.said(store.SealedLabel); s.Text != "" {
			row.detail = append(row.detail, labelled{"called", s.String()})
		}
	case store.PasskeyActivated:
		row.what = "passkey activated"
		var d store.ActivatedDetails
		d, err = read[store.ActivatedDetails](e)
		by := "nobody: the delay was over"
		if d.By != "" {
			by = r.name(d.By)
		}
		row.detail = append(row.detail, labelled{"by", by})
	case store.PasskeyRevoked:
		row.what = "passkey revoked"
		var d store.PasskeyRevokedDetails
		d, err = read[store.PasskeyRevokedDetails](e)
		row.detail = append(row.detail, labelled{"by", r.name(d.By)})
	case store.SlackLinked:
		row.what = "Slack account linked"
	}
	listEvent(&r.keys, row)
	return err
}

// listEvent lists row; the window's alone are counted.
func listEvent(l *list[*eventRow], row *eventRow) {
	if row.window {
		l.add(row)
	} else if l.room() {
		l.rows = append(l.rows, row)
	}
}

// keptUp takes what was done with the record itself.
func (r *Report) keptUp(t taken) error {
	e := t.e
	row := &eventRow{index: t.index, time: e.Time, window: t.window, who: keep(e.Agent).Text}
	if e.Person != nil {
		row.who = r.person(e)
	}
	var err error
	say := func(label, text string) {
		if text != "" {
			row.detail = append(row.detail, labelled{label, keep(text).String()})
		}
	}
	switch e.Type {
	case store.ExportCreated:
		var d store.ExportDetails
		d, err = read[store.ExportDetails](e)
		row.what = "export taken away"
		say("format", d.Format)
		say("entries", fmt.Sprintf("%d to %d", d.From, d.To-1))
		for _, l := range sortedMap(d.Filters) {
			say("filter", l.Label+" = "+l.Text)
		}
	case store.DetailsErased:
		var d store.ErasedDetails
		d, err = read[store.ErasedDetails](e)
		row.what = "texts erased"
		here := int64(0)
		for _, i := range d.Entries {
			if r.sealed.explain(i) {
				here++
			}
		}
		say("entries", fmt.Sprintf("%s, of which %s in this window", number(int64(len(d.Entries))), number(here)))
		say("sensitivity", orDefault(d.Sensitivity, "about no scope"))
		say("had to be kept", span(d.Kept))
	case store.HoldPlaced:
		var d store.HoldDetails
		d, err = read[store.HoldDetails](e)
		row.what = "hold placed: no erasure"
		if d.Run != "" {
			say("run", d.Run)
		} else {
			until := "without end"
			if !d.To.IsZero() {
				until = clock(d.To)
			}
			say("from", clock(d.From))
			say("to", until)
		}
		if s := t.said(store.SealedReason); s != (said{}) {
			say("reason", s.String())
		}
	case store.HoldLifted:
		var d store.HoldLiftedDetails
		d, err = read[store.HoldLiftedDetails](e)
		row.what = "hold lifted"
		say("hold", d.Hold)
	case store.WriterAdded:
		var d store.WriterDetails
		d, err = read[store.WriterDetails](e)
		row.what = "writer added"
		say("writer", d.Name)
		say("method", d.Method)
	}
	listEvent(&r.upkeep, row)
	return err
}
