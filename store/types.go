package store

import (
	"maps"
	"slices"
)

// Type says what an entry records.
type Type string

// The types of entries. Verifiers accept types they do not know.
const (
	StepRequested       Type = "step.requested"
	StepFinished        Type = "step.finished"
	RequestWithdrawn    Type = "request.withdrawn"
	RequestVoid         Type = "request.void"
	ApprovalRequested   Type = "approval.requested"
	ApprovalDecided     Type = "approval.decided"
	ApprovalExpired     Type = "approval.expired"
	ApprovalStanding    Type = "approval.standing"
	CredentialIssuing   Type = "credential.issuing"
	CredentialIssued    Type = "credential.issued"
	CredentialFailed    Type = "credential.failed"
	CredentialAbandoned Type = "credential.abandoned"
	CredentialUsed      Type = "credential.used"
	UseFinished         Type = "use.finished" // what came of uses on the access path
	CredentialRevoked   Type = "credential.revoked"
	CredentialExpired   Type = "credential.expired"
	AccessRefused       Type = "access.refused"
	AlertRaised         Type = "alert.raised"
	FreezeSet           Type = "freeze.set"
	FreezeLifted        Type = "freeze.lifted"
	PasskeyEnrolled     Type = "passkey.enrolled"
	PasskeyActivated    Type = "passkey.activated"
	PasskeyRevoked      Type = "passkey.revoked"
	SlackLinked         Type = "slack.linked"
	PolicyLoaded        Type = "policy.loaded"
	WriterAdded         Type = "writer.added"
	ExportCreated       Type = "export.created"
	DetailsErased       Type = "details.erased"
	HoldPlaced          Type = "hold.placed"
	HoldLifted          Type = "hold.lifted"
)

// writable says for each known type whether a writer's identity may append it.
// What a person decides, and what the recorder itself does, is the recorder's
// alone to write.
var writable = map[Type]bool{
	StepRequested: true, StepFinished: true, RequestWithdrawn: true, RequestVoid: true,
	CredentialIssuing: true, CredentialIssued: true, CredentialFailed: true, CredentialAbandoned: true,
	CredentialUsed: true, UseFinished: true, CredentialRevoked: true, CredentialExpired: true,
	AccessRefused: true, AlertRaised: true, PolicyLoaded: true,

	ApprovalRequested: true,
	ApprovalDecided:   false, ApprovalExpired: false, ApprovalStanding: false,
	FreezeSet: false, FreezeLifted: false,
	PasskeyEnrolled: false, PasskeyActivated: false, PasskeyRevoked: false, SlackLinked: false,
	WriterAdded: false, ExportCreated: false, DetailsErased: false, HoldPlaced: false, HoldLifted: false,
}

// Known reports whether this program knows t.
func (t Type) Known() bool { _, ok := writable[t]; return ok }

// Writable reports whether a writer (broker or gateway) may append t.
func (t Type) Writable() bool { return writable[t] }

// Concerns reports whether t belongs to what a writer may follow: what changes
// a request, a credential or a freeze, and nothing else of the record.
func (t Type) Concerns() bool {
	switch t {
	case StepRequested, RequestWithdrawn, RequestVoid, ApprovalRequested, ApprovalDecided, ApprovalExpired,
		ApprovalStanding, CredentialIssuing, CredentialIssued, CredentialFailed, CredentialAbandoned,
		CredentialRevoked, CredentialExpired, FreezeSet, FreezeLifted,
		PasskeyEnrolled, PasskeyActivated, PasskeyRevoked:
		return true
	}
	return false
}

// Types returns every known type, sorted.
func Types() []Type { return slices.Sorted(maps.Keys(writable)) }
