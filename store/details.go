package store

import (
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Duration is a length of time, written as Go writes it ("5m0s").
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// Grant is everything that a request would hand out, resolved: no template is
// left in it. It is what an approver is shown, what the intent commits to by
// digest, and what the issuer derives again from its own catalogue before it
// turns to Vault.
type Grant struct {
	Scope     string            `json:"scope"`
	Target    string            `json:"target"`
	Engine    string            `json:"engine"`          // identity, token, database, pki, ssh, path
	Role      string            `json:"role,omitzero"`   // Vault token role under which the child token is made
	Policies  []string          `json:"policies"`        // Vault policies the child token carries
	Method    string            `json:"method,omitzero"` // "read" or "write" at Path; empty where no secret is fetched
	Path      string            `json:"path,omitzero"`   // Vault path of the secret
	Data      map[string]string `json:"data,omitzero"`   // body of a write at Path
	Params    map[string]string `json:"params"`
	TTL       Duration          `json:"ttl"`
	Delivery  string            `json:"delivery"`            // direct, wrapped or gateway
	PublicKey string            `json:"public_key,omitzero"` // the step's own key, where the engine certifies it
	Audience  string            `json:"audience,omitzero"`   // of a step identity token
	Revocable bool              `json:"revocable"`
	Access    *Access           `json:"access,omitzero"` // what the access path lets through and hides; set where Delivery is gateway
}

// Digest is "sha256:<hex>" of g's deterministic JSON.
func (g *Grant) Digest() string { return digestOf(g) }

// RequestedDetails are the details of step.requested.
type RequestedDetails struct {
	Grant Grant `json:"grant"`
	// Join identifies "the same request": PrivacyKey.Digest("join", …) over
	// orchestrator, step and the idempotency key, or else the body digest.
	// Empty on a denial. At most one open request holds a join.
	Join  string `json:"join"`
	Body  string `json:"body"`  // PrivacyKey.Digest("body", …) of the canonical request body
	Keyed bool   `json:"keyed"` // the caller sent an Idempotency-Key
	// After is the request that held the join before, and came to an end that
	// its caller was told of: denied, expired or void.
	After string `json:"after,omitzero"`
	// Standing is set where the request draws on an approval for its whole run.
	Standing *StandingUse `json:"standing,omitzero"`
}

// IssuingDetails are the details of credential.issuing, the intent. The
// intent is named by its entry ID.
type IssuingDetails struct {
	Attempt int    `json:"attempt"`  // 1, or 2 for the one retry
	Grant   string `json:"grant"`    // Grant.Digest of the request's grant
	NotPast Time   `json:"not_past"` // the latest end that the credential may have
	// Approval is the request whose decisions this mint rests on; empty where
	// nobody had to approve.
	Approval string `json:"approval,omitzero"`
}

// IssuedDetails are the details of credential.issued. Accessor and lease
// authenticate nothing; with them any broker can revoke.
type IssuedDetails struct {
	Intent           string `json:"intent"`
	Attempt          int    `json:"attempt"`
	Kind             string `json:"kind"`
	Revocable        bool   `json:"revocable"`
	Accessor         string `json:"accessor,omitzero"`          // of the child token
	LeaseID          string `json:"lease_id,omitzero"`          //
	WrappingAccessor string `json:"wrapping_accessor,omitzero"` //
	Serial           string `json:"serial,omitzero"`            // of a certificate, or the jti of an identity token
	Expires          Time   `json:"expires"`
}

// FailedDetails are the details of credential.failed.
type FailedDetails struct {
	Intent  string `json:"intent"`
	Attempt int    `json:"attempt"`
	Problem string `json:"problem"` // problem slug the caller got
	Stage   string `json:"stage"`   // which call of the mint failed; never a secret
}

// ClosedDetails are the details of credential.abandoned, credential.revoked
// and credential.expired.
type ClosedDetails struct {
	Intent  string `json:"intent"`
	Attempt int    `json:"attempt"`
}

// How a use was seen, as UsedDetails.Via says it.
const (
	ViaIntrospection = "introspection" // a resource server asked, and said what for
	ViaGateway       = "gateway"       // it went through the access path
	ViaVaultAudit    = "vault-audit"   // Vault's audit log tells of it
)

// UsedDetails are the details of credential.used. On the access path the entry
// is on record before the target is reached, with what was asked in full under
// SealedStatement; what came of it is in a use.finished.
type UsedDetails struct {
	Intent string `json:"intent"` // of the credential
	Via    string `json:"via"`    // one of the Via constants
	By     string `json:"by"`     // who saw it, such as the resource server
	Use    string `json:"use"`    // what was done, in one line without values: "SELECT orders", "GET /orders/*", "tools/call refund"

	// The rest is the access path's.

	Protocol string   `json:"protocol,omitzero"` // http, postgres or mcp
	Conn     string   `json:"conn,omitzero"`     // names the connection, so that the uses of one are told apart
	Objects  []string `json:"objects,omitzero"`  // what is reached within the target: tables, the tool
	Access   string   `json:"access,omitzero"`   // Access.Digest of the rules in force
	Masking  string   `json:"masking,omitzero"`  // Masking.Digest of the rules in force; empty where there are none
}

// MaxOutcomes is how many uses one use.finished may tell of, so that it fits in
// MaxEntry.
const MaxOutcomes = 100

// UseFinishedDetails are the details of use.finished: what came of uses of one
// credential. A use without one was cut short, or its gateway crashed.
type UseFinishedDetails struct {
	Outcomes []UseOutcome `json:"outcomes"` // in the order in which they ended; at most MaxOutcomes
}

// JoinSamples is the text that is sealed as SealedSample of a use.finished with
// as many outcomes as there are samples, an excerpt of each or "": of one outcome
// the excerpt itself, of several a JSON array of them, in the order of the
// outcomes. It is empty where there are no excerpts. They must be UTF-8.
func JoinSamples(samples []string) string {
	if len(samples) == 1 {
		return samples[0]
	}
	if !slices.ContainsFunc(samples, func(s string) bool { return s != "" }) {
		return ""
	}
	b, err := json.Marshal(samples)
	if err != nil {
		panic(err) // strings of UTF-8 always marshal
	}
	return string(b)
}

// SplitSamples returns the n excerpts that JoinSamples joined, or nil where text
// is not such.
func SplitSamples(text string, n int) []string {
	if n == 1 {
		return []string{text}
	}
	var samples []string
	if json.Unmarshal([]byte(text), &samples) != nil || len(samples) != n {
		return nil
	}
	return samples
}

// UseOutcome says what came of one use.
type UseOutcome struct {
	Use      string   `json:"use"`               // entry ID of the credential.used
	Status   string   `json:"status"`            // what the target said: a command tag ("SELECT 3"), an HTTP status ("200"), "ok"; empty where it said nothing
	Error    string   `json:"error,omitzero"`    // SQLSTATE, or one of the Use… reasons; empty where it succeeded
	Rows     int64    `json:"rows,omitzero"`     // rows, or events of a stream, that the step got
	Sent     int64    `json:"sent,omitzero"`     // bytes of content towards the target
	Received int64    `json:"received,omitzero"` // bytes of content towards the step
	Masked   int64    `json:"masked,omitzero"`   // values that were hidden
	Took     Duration `json:"took"`              // from forwarding to the end
	Digest   string   `json:"digest,omitzero"`   // "sha256:<hex>" of content streamed in that the use itself does not hold (COPY, a request's body)
}

// Reasons of UseOutcome.Error that are no target's own.
const (
	UseCut      = "cut"      // the session ended while it was under way
	UseUpstream = "upstream" // the target could not be reached, hung up, or broke the protocol
	UseTimeout  = "timeout"  // it took longer than the rules allow
	UseClient   = "client"   // the step hung up
	UseWithheld = "withheld" // what came back could not be masked surely, and was not handed on
)

// FinishedDetails are the details of step.finished. The summary is sealed.
type FinishedDetails struct {
	Outcome string `json:"outcome"` // succeeded, failed, skipped: the orchestrator's claim
	Target  string `json:"target,omitzero"`
}

// PolicyDetails are the details of policy.loaded.
type PolicyDetails struct {
	Digest    string `json:"digest"` // of catalogue and policy together, as decisions carry it
	Catalogue string `json:"catalogue"`
	Policy    string `json:"policy,omitzero"`
	Previous  string `json:"previous,omitzero"`
	// Retention is how long erasable texts are kept, by the sensitivity of what
	// they are about; "" is for entries about no scope. The recorder's own
	// policy.loaded has it, and only where texts are erased at all: a sensitivity
	// that is not named is kept for good.
	Retention map[string]Duration `json:"retention,omitzero"`
}

// ExportDetails are the details of export.created. The entry's Person, or its
// Agent where a program asked, is who took it away.
type ExportDetails struct {
	Format  string            `json:"format"`  // bundle, csv, jsonl or ocsf
	From    int64             `json:"from"`    // index of the first entry
	To      int64             `json:"to"`      // one past the last
	Filters map[string]string `json:"filters"` // as GET /history names them; persons and subjects by pseudonym
}

// ErasedDetails are the details of details.erased, which the recorder alone
// writes, and before it erases: a crash after it leaves texts whose erasure is
// on record, and the next start erases them.
type ErasedDetails struct {
	Entries     []int64  `json:"entries"`     // whose sealed texts are erased, all fields; ascending, at most MaxErased
	Sensitivity string   `json:"sensitivity"` // of all of them; "" for entries about no scope
	Kept        Duration `json:"kept"`        // how long they had to be kept: each is older than that
}

// MaxErased is how many entries one details.erased may name, so that it fits
// in MaxEntry.
const MaxErased = 2000

// HoldDetails are the details of hold.placed, which the recorder alone writes:
// texts of what it covers are not erased until hold.lifted names it. The reason
// is sealed. It covers a run, or a window of the recorder's time.
type HoldDetails struct {
	Run  string `json:"run,omitzero"`
	From Time   `json:"from,omitzero"` // inclusive
	To   Time   `json:"to,omitzero"`   // exclusive; zero: without end
}

// Covers reports whether the hold covers e.
func (h *HoldDetails) Covers(e *Entry) bool {
	if h.Run != "" {
		return e.Run == h.Run
	}
	return !e.Time.Before(h.From.Time) && (h.To.IsZero() || e.Time.Before(h.To.Time))
}

// HoldLiftedDetails are the details of hold.lifted.
type HoldLiftedDetails struct {
	Hold string `json:"hold"` // entry ID of hold.placed
}

// Erasable reports whether the texts of entries of type t may be erased at all.
// What policy said, and whose passkeys and Slack accounts may decide, is needed
// as long as the record is.
func (t Type) Erasable() bool {
	switch t {
	case PolicyLoaded, PasskeyEnrolled, SlackLinked, HoldPlaced:
		return false
	}
	return true
}

// RefusedDetails are the details of access.refused.
type RefusedDetails struct {
	Method  string `json:"method"`
	Route   string `json:"route"`
	Role    string `json:"role,omitzero"`   // the role the token has, where known
	Problem string `json:"problem"`         //
	Remote  string `json:"remote"`          // IP address without port
	Folded  int    `json:"folded,omitzero"` // like refusals not recorded on their own since the last entry

	// On the access path, Method is the protocol, Route what was asked in one
	// line without values, as UsedDetails.Use, and SealedStatement the whole.

	Intent string `json:"intent,omitzero"` // of the credential, where the session is known
	Reason string `json:"reason,omitzero"` // which guard refused, in words that hold no value
}

// What an alert is about.
const (
	AlertMint    = "mint-without-intent" // the broker's Vault login made a token that no intent accounts for
	AlertUse     = "use-unmatched"       // a credential that we minted was used, and it is not known which
	AlertLateUse = "use-after-end"       // a credential was used after its end
	AlertRevoke  = "revocation-failed"   // credentials that a freeze covers could not be revoked yet
)

// MaxIntents is how many credentials one alert.raised may name, so that it fits
// in MaxEntry.
const MaxIntents = 1000

// AlertDetails are the details of alert.raised.
type AlertDetails struct {
	Alert  string `json:"alert"`           // one of the Alert constants
	Source string `json:"source"`          // what told of it, such as vault-audit
	Ref    string `json:"ref,omitzero"`    // its name there, such as the ID of a Vault request
	Intent string `json:"intent,omitzero"` // of the credential, where known
	What   string `json:"what"`            // what was seen, in one line without secrets

	// Intents are those of the credentials that an AlertRevoke is about, which
	// What befell alike; at most MaxIntents. It says why they are still live, and
	// holds until they end or the next one names them.
	Intents []string `json:"intents,omitzero"`
}

// WriterDetails are the details of writer.added.
type WriterDetails struct {
	Name   string `json:"name"`
	Method string `json:"method"` // token or mtls
}

// SetDetails marshals d deterministically into e.Details.
func (e *Entry) SetDetails(d any) {
	b, err := json.Marshal(d, json.Deterministic(true))
	if err != nil {
		panic(err) // the details types of this package always marshal
	}
	e.Details = jsontext.Value(b)
}

// DetailsAs decodes e's details as T. Unknown members are accepted.
func DetailsAs[T any](e *Entry) (T, error) {
	var d T
	if len(e.Details) == 0 {
		return d, fmt.Errorf("%w: %s without details", ErrMalformed, e.Type)
	}
	if err := json.Unmarshal(e.Details, &d); err != nil {
		return d, fmt.Errorf("%w: details of %s: %v", ErrMalformed, e.Type, err)
	}
	return d, nil
}
