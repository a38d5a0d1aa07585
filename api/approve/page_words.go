package approve

import (
	"fmt"
	"html/template"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// soon is when little time is left.
const soon = 2 * time.Minute

// remaining is the time left until end. The script lets it go on.
func remaining(end, now time.Time) template.HTML {
	class := "left"
	if end.Sub(now) < soon {
		class += " soon"
	}
	return template.HTML(`<time class="` + class + `" data-left datetime="` + end.UTC().Format(time.RFC3339Nano) + `">` + left(end.Sub(now)) + `</time>`)
}

// left says how much time is left, as the script does.
func left(d time.Duration) string {
	s := int(d / time.Second)
	days, h, m := s/86400, s/3600%24, s/60%60
	switch s %= 60; {
	case d < time.Second:
		return "time is over"
	case days > 0:
		return fmt.Sprintf("%d d %d h left", days, h)
	case h > 0:
		return fmt.Sprintf("%d h %d min left", h, m)
	case m > 9:
		return fmt.Sprintf("%d min left", m)
	case m > 0:
		return fmt.Sprintf("%d min %d s left", m, s)
	}
	return fmt.Sprintf("%d s left", s)
}

// delivery says what a way of delivery means; empty for one that is not known.
func delivery(how string) string {
	switch how {
	case "direct":
		return "the step is handed the secret itself"
	case "wrapped":
		return "the step is handed a token that unwraps the secret, once"
	case "sealed":
		return "the secret is encrypted to the step’s public key"
	case "gateway":
		return "the step never sees the secret; each use goes through the gateway and is on record"
	}
	return ""
}

// state is a status for people.
type state struct {
	Word string // in a tag
	Long string // as a heading
	Tone string // its colour
}

func stateOf(s store.Status) state {
	switch s {
	case store.StatusPending:
		return state{"waiting", "Waiting for people", "accent"}
	case store.StatusApproved:
		return state{"approved", "Approved", "good"}
	case store.StatusDenied:
		return state{"denied", "Denied", "danger"}
	case store.StatusExpired:
		return state{"expired", "Expired: nothing was granted", "warn"}
	case store.StatusVoid:
		return state{"void", "Void: what would be granted has changed", "warn"}
	case store.StatusWithdrawn:
		return state{"withdrawn", "Taken back by the orchestrator", ""}
	case store.StatusIssued:
		return state{"issued", "Approved, and handed out", "good"}
	case store.StatusFailed:
		return state{"failed", "Approved, and failed to be handed out", "warn"}
	case store.StatusClosed:
		return state{"closed", "Closed", ""}
	}
	return state{string(s), string(s), ""}
}

// why says which rule stood in the way of a decision.
func why(code string) string {
	switch code {
	case "self-approval":
		return "is on the requester’s side"
	case "not-an-approver", string(store.OrderApprover):
		return "is in no group that may decide"
	case string(store.OrderDecided):
		return "had approved already"
	case string(store.OrderHours):
		return "tried outside the hours"
	case "passkey-required", string(store.OrderPasskey):
		return "did not sign with a passkey"
	case "reason-required", string(store.OrderReason):
		return "gave no reason"
	case "request-closed", string(store.OrderNotOpen):
		return "came when the request was closed"
	}
	return "was refused"
}

// happened says what an entry is about.
func happened(h approvals.Happened) string {
	switch h.Type {
	case store.StepRequested:
		switch h.Outcome {
		case string(store.Deny):
			return "asked, and policy denied"
		case string(store.NeedsApproval):
			return "asked, and people are due"
		}
		return "asked"
	case store.ApprovalRequested:
		return "people were asked"
	case store.ApprovalDecided, store.ApprovalStanding:
		word := "a person decided"
		switch h.Outcome {
		case store.Approve, string(store.Allow):
			word = "a person approved"
		case store.Refuse:
			word = "a person denied"
		}
		if h.Type == store.ApprovalStanding {
			word += ", for the whole run"
		}
		return word
	case store.ApprovalExpired:
		return "expired"
	case store.RequestWithdrawn:
		return "taken back"
	case store.RequestVoid:
		return "void"
	case store.CredentialIssuing:
		return "about to be handed out"
	case store.CredentialIssued:
		return "handed out"
	case store.CredentialFailed:
		return "failed"
	case store.CredentialAbandoned:
		return "abandoned"
	case store.CredentialUsed:
		return "used"
	case store.CredentialRevoked:
		return "revoked"
	case store.CredentialExpired:
		return "ended"
	case store.StepFinished:
		return "step finished" + outcome(h.Outcome)
	case store.AccessRefused:
		return "refused"
	}
	return string(h.Type) + outcome(h.Outcome)
}

func outcome(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}
