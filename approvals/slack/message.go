package slack

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	slackgo "github.com/slack-go/slack"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/outbox"
	"github.com/countersign-dev/countersign/store"
)

// What our buttons and modals are called in callbacks.
const (
	actionApprove = "countersign_approve"
	actionDeny    = "countersign_deny"
	actionLink    = "countersign_link"
	actionOpen    = "countersign_open"
	viewDecide    = "countersign_decide"
	viewLink      = "countersign_link"
	inputReason   = "reason"
	inputCode     = "code"
)

// eventType marks our messages (Slack message metadata), with the approval's ID
// as event_payload.id. By it a message is found again after a crash.
const eventType = "countersign_approval"

// fields is everything that matters of r, the most important first. Nothing
// that would be granted may be missing here: a person decides by it.
func fields(r *approvals.Request) []field {
	g := &r.Grant
	one := func(label, value string) field { return field{label, []string{value}} }
	pairs := func(label string, m map[string]string) field {
		f := field{label: label}
		for _, k := range slices.Sorted(maps.Keys(m)) {
			f.lines = append(f.lines, k+" = "+m[k])
		}
		return f
	}
	who := "nobody is named"
	if r.Subject != "" && r.SubjectProved {
		who = r.Subject + " (proved)"
	} else if r.Subject != "" {
		who = r.Subject + " (only claimed by the orchestrator)"
	}
	revocable := "yes"
	if !g.Revocable {
		revocable = "NO: it cannot be called back before it ends"
	}
	list := []field{
		one("Scope", r.Scope), one("Target", r.Target),
		one("Orchestrator that asks", r.Orchestrator), one("On behalf of", who),
		one("Run", r.Run), one("Step", r.Step),
		one("Lives for", time.Duration(g.TTL).String()), one("Can be revoked", revocable),
	}
	if g.Path != "" || g.Method != "" {
		list = append(list, one("Vault path", g.Method+" "+g.Path))
	}
	list = append(list, field{"Vault policies", g.Policies})
	if g.Role != "" {
		list = append(list, one("Vault token role", g.Role))
	}
	list = append(list, pairs("Parameters", g.Params))
	if len(g.Data) > 0 {
		list = append(list, pairs("Sent to Vault", g.Data))
	}
	list = append(list, one("Kind of credential", g.Engine), one("Handed over", g.Delivery))
	if good := r.GoodFor(); good != "" {
		list = append(list, one("Good for", good))
	}
	for _, t := range approvals.AccessInWords(g.Access) {
		list = append(list, field{t.Name, t.Lines})
	}
	if g.Audience != "" {
		list = append(list, one("Audience", g.Audience))
	}
	if g.PublicKey != "" {
		list = append(list, one("Public key of the step", g.PublicKey))
	}
	reason := field{label: "Reason given by the requester"}
	if r.Reason != "" {
		reason.lines = []string{r.Reason}
	}
	list = append(list, one("Agent", r.Agent), one("Sensitivity", r.Sensitivity), reason, field{"Reasons of the policy", r.PolicyReasons})
	if g.Scope != r.Scope || g.Target != r.Target { // never, or people must see it
		list = append(list, one("Scope of the grant", g.Scope), one("Target of the grant", g.Target))
	}
	needs := field{label: "Approvals"}
	for _, n := range r.Needs {
		needs.lines = append(needs.lines, fmt.Sprintf("%s: %d of %d", n.Group, n.Approved, n.Count))
	}
	if r.Rule.Passkey {
		needs.lines = append(needs.lines, "each signed with a passkey")
	}
	if r.Rule.Hours != nil {
		needs.lines = append(needs.lines, "taken "+r.Rule.Hours.String())
	}
	list = append(list, needs)
	shown := r.Decisions
	if more := len(shown) - maxDecisions; more > 0 {
		list = append(list, one("Earlier decisions", fmt.Sprintf("%d, on the page", more)))
		shown = shown[more:]
	}
	for _, d := range shown {
		f := field{"Approved by " + d.Person, nil}
		if d.Decision == store.Refuse {
			f.label = "Denied by " + d.Person
		}
		how := at(d.At) + ", via " + d.Via
		if d.Signed {
			how += ", signed with a passkey"
		}
		f.lines = []string{strings.Join(d.Groups, ", "), how}
		if d.Reason != "" {
			f.lines = append(f.lines, d.Reason)
		}
		if s := d.Standing; s != nil {
			f.lines = append(f.lines, fmt.Sprintf("for the whole run: %s; %d uses, until %s", strings.Join(s.Scopes, ", "), s.Uses, at(s.Until.Time)))
		}
		list = append(list, f)
	}
	list = append(list, one("Asked", at(r.Asked)), one(ends(r.Status), at(r.Expires)), one("Approval", r.ID), one("On record", fmt.Sprintf("entry %d, leaf %s", r.Index, r.LeafHash)), one("Policy in force", r.Policy))
	return list
}

func ends(s store.Status) string {
	switch s {
	case store.StatusPending:
		return "Waits for people until"
	case store.StatusApproved:
		return "Must be collected until"
	}
	return "Would have waited until"
}

func at(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// headline says where r stands. Scopes are named by the catalogue.
func headline(r *approvals.Request) string {
	says := map[store.Status]string{
		store.StatusPending: "Approval asked", store.StatusApproved: "Approved, not collected yet", store.StatusDenied: "Denied",
		store.StatusExpired: "Expired", store.StatusVoid: "Void: what would be granted has changed", store.StatusWithdrawn: "Withdrawn by the requester",
		store.StatusIssued: "Approved and issued", store.StatusFailed: "Approved, issuing failed", store.StatusClosed: "Approved, issued and ended",
	}[r.Status]
	if says == "" {
		says = string(r.Status)
	}
	if r.Status == store.StatusClosed && !slices.ContainsFunc(r.Decisions, func(d approvals.Decided) bool { return d.Decision == store.Approve }) {
		says = "Closed"
	}
	text, _ := join(escape(says+": "+r.Scope), maxHeader)
	return text
}

func plain(text string) *slackgo.TextBlockObject {
	return slackgo.NewTextBlockObject(slackgo.PlainTextType, text, false, false)
}

// sections renders fields, plain text all of it: no formatting, mention, link
// or emoji has a meaning there. cut is how many characters did not fit.
func sections(list []field) (blocks []slackgo.Block, cut int) {
	left := maxMessage
	var texts []*slackgo.TextBlockObject
	for i, f := range list {
		// Each later field keeps room for its label and for saying that it is cut.
		text, n := f.text(min(maxField, left-(len(list)-1-i)*2*maxNotice))
		left -= units(text)
		cut += n
		texts = append(texts, plain(text))
	}
	for part := range slices.Chunk(texts, maxFields) {
		blocks = append(blocks, slackgo.NewSectionBlock(nil, part, nil))
	}
	return blocks, cut
}

// value is what a button carries: which request, and by its leaf hash exactly
// which words on record the person has before them.
func value(r *approvals.Request) string { return r.ID + " " + r.LeafHash }

// message renders r. whole is false where something had to be cut: then nobody
// approves it in Slack, since they have not seen all of it.
func message(r *approvals.Request) (blocks []slackgo.Block, whole bool) {
	list := fields(r)
	details, cut := sections(list)
	blocks = append([]slackgo.Block{slackgo.NewHeaderBlock(plain(headline(r)))}, details...)
	page := slackgo.NewButtonBlockElement(actionOpen, "open", plain("Open the page"))
	page.URL = r.URL
	buttons := []slackgo.BlockElement{page}
	if r.Status == store.StatusPending {
		switch {
		case !r.Rule.Slack:
			blocks = append(blocks, note("Decide on the page: this scope is not decided in Slack."))
		case r.Rule.Passkey:
			blocks = append(blocks, note("Approve on the page, with your passkey. Here it can be denied."))
		case cut > 0:
			blocks = append(blocks, note(fmt.Sprintf("%d characters are cut here. Approve on the page, where you can read the whole. Here it can be denied.", cut)))
		default:
			b := slackgo.NewButtonBlockElement(actionApprove, value(r), plain("Approve"))
			b.Style = slackgo.StylePrimary
			buttons = append(buttons, b)
		}
		if r.Rule.Slack {
			b := slackgo.NewButtonBlockElement(actionDeny, value(r), plain("Deny"))
			b.Style = slackgo.StyleDanger
			buttons = append(buttons, b, slackgo.NewButtonBlockElement(actionLink, "link", plain("Link account")))
		}
	}
	if cut > 0 && (r.Status != store.StatusPending || !r.Rule.Slack || r.Rule.Passkey) {
		blocks = append(blocks, note(fmt.Sprintf("%d characters are cut here: read the whole on the page.", cut)))
	}
	return append(blocks, slackgo.NewActionBlock("countersign", buttons...)), cut == 0
}

// floodline says how many are told together. Scopes are named by the catalogue.
func floodline(f *outbox.Flood) string {
	text, _ := join(escape(fmt.Sprintf("%d more approvals asked: %s", f.Requests, f.Scope)), maxHeader)
	return text
}

// flood renders f: how many, from whom, and where each of them is looked at and
// decided. Nothing is decided by it.
func flood(f *outbox.Flood) []slackgo.Block {
	one := func(label, value string) field { return field{label, []string{value}} }
	runs := field{"Runs", slices.Clone(f.Runs)}
	if more := f.RunCount - len(f.Runs); more > 0 {
		runs.lines = append(runs.lines, fmt.Sprintf("and %d more", more))
	}
	blocks, _ := sections([]field{
		one("Scope", f.Scope), one("Orchestrator that asks", f.Orchestrator), runs,
		one("Waiting for people", fmt.Sprint(f.Waiting)), one("Approved", fmt.Sprint(f.Approved)), one("Denied", fmt.Sprint(f.Denied)), one("Ended otherwise", fmt.Sprint(f.Ended)),
		one("Asked", at(f.First)+" to "+at(f.Last)),
	})
	page := slackgo.NewButtonBlockElement(actionOpen, "open", plain("Open the page"))
	page.URL = f.URL
	blocks = append([]slackgo.Block{slackgo.NewHeaderBlock(plain(floodline(f)))}, blocks...)
	return append(blocks, note("So many came at once that they are told together. Each is looked at and decided on its own, on the page."),
		slackgo.NewActionBlock("countersign", page))
}

func note(text string) slackgo.Block { return slackgo.NewContextBlock("", plain(text)) }

// modal asks for the reason, and shows once more what is decided.
func modal(r *approvals.Request, decision string) slackgo.ModalViewRequest {
	title := "Approve"
	if decision == store.Refuse {
		title = "Deny"
	}
	blocks, _ := sections(fields(r))
	input := slackgo.NewPlainTextInputBlockElement(nil, inputReason)
	input.Multiline, input.MaxLength = true, maxReason
	reason := slackgo.NewInputBlock(inputReason, plain("Your reason, which goes on record"), nil, input)
	reason.Optional = !r.Rule.Reasons.Approver
	return slackgo.ModalViewRequest{
		Type: slackgo.VTModal, CallbackID: viewDecide, PrivateMetadata: decision + " " + value(r),
		Title: plain(title), Submit: plain(title), Close: plain("Cancel"),
		Blocks: slackgo.Blocks{BlockSet: append(blocks, reason)},
	}
}

// linkModal asks for the code that the page shows.
func linkModal() slackgo.ModalViewRequest {
	input := slackgo.NewPlainTextInputBlockElement(nil, inputCode)
	input.MaxLength = 40
	return slackgo.ModalViewRequest{
		Type: slackgo.VTModal, CallbackID: viewLink, Title: plain("Link account"), Submit: plain("Send"), Close: plain("Cancel"),
		Blocks: slackgo.Blocks{BlockSet: []slackgo.Block{
			slackgo.NewSectionBlock(plain("Log in at the approval page, begin to link your Slack account, and enter the code that it shows you. Enter no code that somebody else gave you."), nil, nil),
			slackgo.NewInputBlock(inputCode, plain("Code"), nil, input),
		}},
	}
}

// said is a modal that only says something.
func said(title, text string) slackgo.ModalViewRequest {
	text, _ = join(escape(text), maxField)
	return slackgo.ModalViewRequest{Type: slackgo.VTModal, Title: plain(title), Close: plain("Close"),
		Blocks: slackgo.Blocks{BlockSet: []slackgo.Block{slackgo.NewSectionBlock(plain(text), nil, nil)}}}
}
