package review

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/store"
)

// kinds are the types of entries in the order in which a page counts them, with
// what they are called there.
var kinds = []struct {
	Type store.Type
	Name string // plural
	Tone string
}{
	{store.StepRequested, "Asked for", "accent"},
	{store.ApprovalRequested, "People were asked", "accent"},
	{store.ApprovalDecided, "Decisions by people", "good"},
	{store.ApprovalStanding, "Decisions for a whole run", "warn"},
	{store.ApprovalExpired, "Approvals expired", "warn"},
	{store.RequestWithdrawn, "Requests taken back", ""},
	{store.RequestVoid, "Requests void", "warn"},
	{store.CredentialIssuing, "About to be minted", ""},
	{store.CredentialIssued, "Credentials handed out", "good"},
	{store.CredentialUsed, "Uses of credentials", "accent"},
	{store.UseFinished, "Results put on record", ""},
	{store.CredentialRevoked, "Credentials revoked", ""},
	{store.CredentialExpired, "Credentials expired", ""},
	{store.CredentialFailed, "Credentials failed", "danger"},
	{store.CredentialAbandoned, "Credentials abandoned", "danger"},
	{store.StepFinished, "Steps finished", ""},
	{store.AccessRefused, "Calls refused", "danger"},
	{store.AlertRaised, "Alerts", "danger"},
	{store.FreezeSet, "Freezes", "danger"},
	{store.FreezeLifted, "Freezes lifted", ""},
	{store.PolicyLoaded, "Policies loaded", "warn"},
	{store.PasskeyEnrolled, "Passkeys enrolled", ""},
	{store.PasskeyActivated, "Passkeys activated", ""},
	{store.PasskeyRevoked, "Passkeys revoked", ""},
	{store.SlackLinked, "Slack accounts linked", ""},
	{store.WriterAdded, "Writers", ""},
	{store.ExportCreated, "Exports", ""},
	{store.DetailsErased, "Erasures", ""},
	{store.HoldPlaced, "Holds placed", ""},
	{store.HoldLifted, "Holds lifted", ""},
}

// outcomes are what policy can say, with what that is called.
var outcomes = []struct {
	Outcome    store.Outcome
	Name, Tone string
}{
	{store.Allow, "allowed", "good"},
	{store.NeedsApproval, "people had to approve", "accent"},
	{store.Deny, "denied", "danger"},
}

// fact is one thing that an entry says, under a name.
type fact struct {
	Name  string
	Lines []string
}

// told is an entry in words.
type told struct {
	Title string
	Tone  string
	Facts []fact
}

func (t *told) fact(name string, lines ...string) {
	kept := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return l == "" })
	if len(kept) > 0 {
		t.Facts = append(t.Facts, fact{name, kept})
	}
}

// details are e's details as T, or what can be read of them: a leaf may be by a
// later version of the writer, and its page shows it verbatim besides.
func details[T any](e *store.Entry) T {
	d, _ := store.DetailsAs[T](e)
	return d
}

// tell says what e is about.
func tell(e *store.Entry) *told {
	t := &told{Title: string(e.Type)}
	switch e.Type {
	case store.StepRequested:
		d := details[store.RequestedDetails](e)
		t.Title, t.Tone = "The step asked for a credential", "accent"
		if e.Decision != nil {
			switch e.Decision.Outcome {
			case store.Allow:
				t.Title, t.Tone = "The step asked, and policy allowed it", "good"
			case store.NeedsApproval:
				t.Title = "The step asked, and people have to approve"
				if d.Standing != nil {
					t.Title = "The step asked, and drew on an approval for its whole run"
				}
			case store.Deny:
				t.Title, t.Tone = "The step asked, and policy denied it", "danger"
			}
			t.fact("The policy says", e.Decision.Reasons...)
		}
		grant(t, &d.Grant)
	case store.ApprovalRequested:
		d := details[store.ApprovalRequestedDetails](e)
		t.Title, t.Tone = "People were asked to approve", "accent"
		if d.OneCall {
			t.Title += " one call through the gateway"
		}
		for _, l := range page.RuleInWords(&d.Rule) {
			t.fact(l.Name, l.Lines...)
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		d := details[store.DecidedDetails](e)
		t.Title, t.Tone = "A person approved", "good"
		if d.Decision == store.Refuse {
			t.Title, t.Tone = "A person denied", "danger"
		}
		if d.Standing != nil {
			t.Title += ", for the whole run"
			t.fact("For the whole run", strings.Join(d.Standing.Scopes, ", ")+", at most "+page.Count(d.Standing.Uses, "use")+", until "+instant(d.Standing.Until.Time))
		}
		t.fact("In groups", strings.Join(d.Groups, ", "))
		t.fact("By", map[string]string{"page": "the approval page", "token": "a terminal or a token", "slack": "Slack"}[d.Via])
	case store.ApprovalExpired:
		t.Title, t.Tone = "Nobody decided in time: the request expired", "warn"
		if details[store.ExpiredDetails](e).Approved {
			t.Title = "The approval was not used in time, and expired"
		}
	case store.RequestWithdrawn:
		t.Title = "The orchestrator took the request back"
	case store.RequestVoid:
		t.Title, t.Tone = "Void: what would be granted had changed", "warn"
		if e.Cause != nil && *e.Cause == store.CauseFrozen {
			t.Title = "Void: a responder stopped it"
			t.fact("Freeze", details[store.FrozenDetails](e).Freeze)
		}
	case store.CredentialIssuing:
		d := details[store.IssuingDetails](e)
		t.Title = "The broker put on record that it was about to mint"
		if d.Attempt > 1 {
			t.Title += " again"
		}
		t.fact("Ends by", instant(d.NotPast.Time))
	case store.CredentialIssued:
		d := details[store.IssuedDetails](e)
		t.Title, t.Tone = "The credential was handed out", "good"
		revocable := "can be called back"
		if !d.Revocable {
			revocable = "cannot be called back"
		}
		t.fact("Kind", d.Kind+", "+revocable)
		t.fact("Ends", instant(d.Expires.Time))
		t.fact("Serial", d.Serial)
		t.fact("Vault accessor", d.Accessor)
		t.fact("Vault lease", d.LeaseID)
	case store.CredentialFailed:
		d := details[store.FailedDetails](e)
		t.Title, t.Tone = "No credential: minting failed", "danger"
		t.fact("Problem", d.Problem)
		t.fact("At", d.Stage)
	case store.CredentialAbandoned:
		t.Title, t.Tone = "Abandoned: whether it was minted is not known, and nobody holds it", "danger"
	case store.CredentialUsed:
		d := details[store.UsedDetails](e)
		t.Title, t.Tone = "The credential was used", "accent"
		t.fact("What was done", d.Use)
		t.fact("Reached", strings.Join(d.Objects, ", "))
		seen := strings.Trim(d.By+", "+d.Via, ", ")
		if d.By == d.Via {
			seen = d.By
		}
		t.fact("Seen by", seen)
		if d.Via == store.ViaGateway {
			t.Title = "The credential was used on the access path"
			t.fact("Connection", strings.Trim(d.Protocol+", "+d.Conn, ", "))
			t.fact("Masked by the rules", cmp.Or(d.Masking, "none: nothing is masked"))
		}
	case store.UseFinished:
		d := details[store.UseFinishedDetails](e)
		t.Title = "What came of " + page.Count(len(d.Outcomes), "use")
		failed := 0
		var lines []string
		for i := range d.Outcomes {
			if d.Outcomes[i].Error != "" {
				failed++
			}
			if i < maxTold {
				lines = append(lines, resultWords(&d.Outcomes[i]))
			}
		}
		if more := len(d.Outcomes) - maxTold; more > 0 {
			lines = append(lines, fmt.Sprintf("and of %d more, in the entry itself", more))
		}
		if failed > 0 {
			t.Title += fmt.Sprintf(", %d of which failed", failed)
			t.Tone = "danger"
		}
		t.fact("Results", lines...)
	case store.CredentialRevoked:
		t.Title = "The credential was revoked"
	case store.CredentialExpired:
		t.Title = "The credential’s time was over"
	case store.StepFinished:
		d := details[store.FinishedDetails](e)
		t.Title = "The orchestrator says that the step is finished"
		if d.Outcome != "" {
			t.Title = "The orchestrator says of the step: " + d.Outcome
		}
		t.fact("Claimed target", d.Target)
	case store.AccessRefused:
		d := details[store.RefusedDetails](e)
		t.Title, t.Tone = "A call was refused", "danger"
		if d.Intent != "" {
			t.Title = "A guard refused what the step asked of its target"
			t.fact("Asked", d.Route)
			t.fact("Guard", d.Reason)
			t.fact("Protocol", d.Method)
			t.fact("From", d.Remote)
			if d.Folded > 0 {
				t.fact("And", fmt.Sprintf("%d more like it since the entry before", d.Folded))
			}
			break
		}
		t.fact("Call", strings.TrimSpace(d.Method+" "+d.Route))
		t.fact("Why", d.Problem)
		t.fact("Caller’s role", d.Role)
		t.fact("From", d.Remote)
		if d.Folded > 0 {
			t.fact("And", fmt.Sprintf("%d more like it since the entry before", d.Folded))
		}
	case store.AlertRaised:
		d := details[store.AlertDetails](e)
		t.Title, t.Tone = "An alert was raised", "danger"
		if what := map[string]string{
			store.AlertMint: "the broker’s login made a token without an intent on record", store.AlertUse: "a credential was used, and it is not known which",
			store.AlertLateUse: "a credential was used after its end",
			store.AlertRevoke:  "credentials under a freeze could not be revoked yet",
		}[d.Alert]; what != "" {
			t.Title += ": " + what
		}
		t.fact("What was seen", d.What)
		t.fact("Told by", strings.TrimSpace(d.Source+" "+d.Ref))
	case store.FreezeSet:
		t.Title, t.Tone = "A responder stopped credentials", "danger"
		t.fact("Stopped", details[store.FreezeDetails](e).String())
		t.fact("Freeze", e.ID)
	case store.FreezeLifted:
		t.Title = "A responder lifted a freeze"
		t.fact("Freeze", details[store.FreezeLiftedDetails](e).Freeze)
	case store.PasskeyEnrolled:
		t.Title = "A person enrolled a passkey"
		t.fact("For", details[store.EnrolledDetails](e).Origin)
	case store.PasskeyActivated:
		t.Title = "A passkey became active after its delay"
		if by := details[store.ActivatedDetails](e).By; by != "" {
			t.Title = "A second person activated a passkey"
			t.fact("By", by)
		}
	case store.PasskeyRevoked:
		t.Title, t.Tone = "A passkey was revoked", "warn"
		t.fact("By", details[store.PasskeyRevokedDetails](e).By)
	case store.SlackLinked:
		t.Title = "A person linked their Slack account, or unlinked it"
	case store.PolicyLoaded:
		d := details[store.PolicyDetails](e)
		t.Title, t.Tone = "Catalogue and policy were loaded", "warn"
		t.fact("Digest", d.Digest)
		t.fact("Before", d.Previous)
	case store.WriterAdded:
		d := details[store.WriterDetails](e)
		t.Title = "A writer may append"
		t.fact("Writer", d.Name+", by "+d.Method)
	case store.ExportCreated:
		d := details[store.ExportDetails](e)
		t.Title = "The record was exported"
		t.fact("What", fmt.Sprintf("%s of entries %d to %d", d.Format, d.From, d.To-1))
	case store.DetailsErased:
		d := details[store.ErasedDetails](e)
		t.Title = "Texts were erased, as their time was over"
		t.fact("Entries", fmt.Sprint(len(d.Entries)))
		t.fact("Kept for", page.Span(d.Kept))
	case store.HoldPlaced:
		d := details[store.HoldDetails](e)
		t.Title = "A hold was placed: nothing it covers is erased"
		covers := "run " + d.Run
		if d.Run == "" {
			covers = "from " + instant(d.From.Time)
			if !d.To.IsZero() {
				covers += " to " + instant(d.To.Time)
			}
		}
		t.fact("Covers", covers)
	case store.HoldLifted:
		t.Title = "A hold was lifted"
	}
	if e.Cause != nil {
		t.fact("Because", *e.Cause)
	}
	return t
}

// grant says what would be handed out.
func grant(t *told, g *store.Grant) {
	if g.Scope == "" {
		return
	}
	revocable := "It can be revoked at any time."
	if !g.Revocable {
		revocable = "It cannot be called back: it works until its time is over."
	}
	t.fact("Asked for", g.Scope+" on "+g.Target+", for "+page.Span(g.TTL))
	t.fact("Can be called back", revocable)
	t.fact("Engine", strings.TrimSpace(g.Engine+" "+g.Role))
	t.fact("Vault path", strings.TrimSpace(g.Method+" "+g.Path))
	t.fact("Vault policies", g.Policies...)
	t.fact("Delivery", g.Delivery)
	if a := g.Access; a != nil {
		t.fact("On the access path", a.Protocol+" to "+a.Upstream)
		t.fact("Masked", masked(a.Masking)...)
	}
}

// instant is t in text, for people.
func instant(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2 Jan 2006, 15:04:05 UTC")
}
