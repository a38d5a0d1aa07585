package approvals

import (
	"time"

	"github.com/countersign-dev/countersign/store"
)

// Request is a request that people were asked about, with all that they were
// shown and all that they said.
type Request struct {
	ID            string         `json:"id"`      // "apr_…"
	Request       string         `json:"request"` // "req_…"
	Status        store.Status   `json:"status"`
	Orchestrator  string         `json:"orchestrator"`
	Run           string         `json:"run"`
	Step          string         `json:"step"`
	Scope         string         `json:"scope"`
	Target        string         `json:"target"`
	Agent         string         `json:"agent"` // SPIFFE ID of the step
	Sensitivity   string         `json:"sensitivity"`
	Grant         store.Grant    `json:"grant"`
	Rule          store.Rule     `json:"rule"`
	PolicyReasons []string       `json:"policy_reasons"`
	Policy        string         `json:"policy"`            // digest of catalogue and policy
	Subject       string         `json:"subject,omitzero"`  // empty where nobody is named
	SubjectProved bool           `json:"subject_proved"`    // false: the orchestrator claims it
	Reason        string         `json:"reason,omitzero"`   // the requester's; the gateway's where OneCall is set
	OneCall       bool           `json:"one_call,omitzero"` // as store.ApprovalRequestedDetails
	Asked         time.Time      `json:"asked_at"`          //
	Expires       time.Time      `json:"expires_at"`        // when it stops waiting: for people, or, once approved, to be collected
	Needs         []Need         `json:"needs"`             //
	Decisions     []Decided      `json:"decisions"`         //
	Refused       []Refused      `json:"refused"`           // attempts that did not count
	Index         int64          `json:"index"`             // of approval.requested
	LeafHash      string         `json:"leaf_hash"`         // of approval.requested, base64
	URL           string         `json:"url"`               // of its page
	state         *store.Request // what the record says of it; nil where it is forgotten
}

// GoodFor says how often what would be granted may be used, where the gateway
// sees to it; else it is empty. An orchestrator may write as a reason whatever it
// likes, the words of the gateway among it: this tells the two apart.
func (r *Request) GoodFor() string {
	switch {
	case r.OneCall:
		return "one call: the gateway asks, for the call in the reason and no other"
	case r.Grant.Access != nil:
		return "any number of uses until it ends; the reason is in the orchestrator's own words"
	}
	return ""
}

// Need is how many people of a group must approve, and how many did.
type Need struct {
	Group    string `json:"group"`
	Count    int    `json:"count"`
	Approved int    `json:"approved"`
}

// Decided is one person's decision.
type Decided struct {
	Person   string               `json:"person"` // "user:NAME", or the pseudonym where the name is erased
	Groups   []string             `json:"groups"`
	Decision string               `json:"decision"`
	Reason   string               `json:"reason,omitzero"`
	Via      string               `json:"via"`
	At       time.Time            `json:"at"`
	Signed   bool                 `json:"signed"` // with a passkey
	Index    int64                `json:"index"`
	Standing *store.StandingTerms `json:"standing,omitzero"`
}

// Refused is an attempt to decide that did not count.
type Refused struct {
	Person  string    `json:"person"`
	Problem string    `json:"problem"`
	Detail  string    `json:"detail,omitzero"`
	At      time.Time `json:"at"`
	Folded  int       `json:"folded,omitzero"` // like attempts that have no entry of their own
	Index   int64     `json:"index"`
}

// The states that a Filter selects.
const (
	StatePending = "pending" // waits for people
	StateMine    = "mine"    // waits, and the person of the filter may decide
	StateDecided = "decided" // waits for nobody any more
	StateAll     = "all"
)

// Filter selects requests. The newest come first.
type Filter struct {
	State  string  // StatePending where empty
	Person *Person // due for StateMine
	Before string  // where the page before ended
	Limit  int     // 50 where zero, 200 at most
}

// Decision is what a person decides.
type Decision struct {
	Decision  string               `json:"decision"` // store.Approve or store.Refuse
	Reason    string               `json:"reason"`
	Via       string               `json:"via"` // page, token or slack
	Standing  *store.StandingTerms `json:"standing,omitzero"`
	Assertion *Signed              `json:"assertion,omitzero"`
}

// Signed is a passkey's assertion, as the browser gave it.
type Signed struct {
	Credential        string `json:"credential"` // credential ID, base64url without padding
	AuthenticatorData []byte `json:"authenticator_data"`
	ClientData        []byte `json:"client_data"`
	Signature         []byte `json:"signature"`
}

// Challenge is what a passkey is asked to sign.
type Challenge struct {
	Challenge   []byte    `json:"challenge"`   // store.ApprovalDigest of the decision
	RPID        string    `json:"rp_id"`       //
	Credentials []string  `json:"credentials"` // IDs of the person's active keys, base64url
	Expires     time.Time `json:"expires_at"`
}

// The kinds of events.
const (
	EventRequested = "requested"
	EventDecided   = "decided" // a decision counts, and more are due
	EventApproved  = "approved"
	EventDenied    = "denied"
	EventExpired   = "expired"
	EventWithdrawn = "withdrawn"
	EventVoid      = "void"
	EventIssued    = "issued"
	EventPasskey   = "passkey" // a passkey was enrolled, activated or revoked
	EventResync    = "resync"  // events were lost: read the state again
)

// Event is something that has happened, after it is on record.
type Event struct {
	Kind     string
	Approval string   // its ID, where the event is about one
	Request  *Request // as it was when the event was sent
	Passkey  *Passkey // of EventPasskey
}

// Context is what came before a request.
type Context struct {
	Run          Past `json:"run"`          // the same run, since it began
	Orchestrator Past `json:"orchestrator"` // approvals of the same orchestrator, of the last 30 days
}

// Past is a count of what happened, and the latest of it.
type Past struct {
	Requested int        `json:"requested"` // asked for a credential, or people for approval
	Approved  int        `json:"approved"`  // decisions for
	Denied    int        `json:"denied"`    // decisions against, of people or policy
	Issued    int        `json:"issued"`
	Refused   int        `json:"refused"` // attempts that were not allowed
	More      bool       `json:"more"`    // there is more than was counted
	Latest    []Happened `json:"latest"`  // at most 10, ascending
}

// Happened is one entry of what came before.
type Happened struct {
	At      time.Time  `json:"at"`
	Type    store.Type `json:"type"`
	Step    string     `json:"step"`
	Scope   string     `json:"scope"`
	Outcome string     `json:"outcome,omitzero"`
	Request string     `json:"request"`
	Index   int64      `json:"index"`
}

// Passkey is an enrolled passkey.
type Passkey struct {
	ID         string    `json:"id"`         // entry ID of its enrolment
	Credential string    `json:"credential"` // base64url
	Person     string    `json:"person"`     // "user:NAME", or the pseudonym where the name is erased
	Label      string    `json:"label,omitzero"`
	Enrolled   time.Time `json:"enrolled_at"`
	Active     bool      `json:"active"`
	Activated  time.Time `json:"activated_at,omitzero"`
	Revoked    time.Time `json:"revoked_at,omitzero"`
	// ActiveFrom is when it is active by itself; zero where a second person must
	// activate it, or it is active or revoked.
	ActiveFrom time.Time `json:"active_from,omitzero"`
	Index      int64     `json:"index"` // of passkey.enrolled

	owner   string // pseudonym
	details store.EnrolledDetails
}

// Enrolment is a passkey on its way.
type Enrolment struct {
	ID         string    `json:"id"`        // the challenge in base64url, as the browser's client data repeats it
	Challenge  []byte    `json:"challenge"` // for navigator.credentials.create
	RPID       string    `json:"rp_id"`
	UserID     []byte    `json:"user_id"`
	User       string    `json:"user"`
	Algorithms []int     `json:"algorithms"` // COSE algorithms, the preferred first
	Exclude    []string  `json:"exclude"`    // credential IDs that the person has
	Expires    time.Time `json:"expires_at"`
}

// Anchor is the identity provider's signature over a new key: the ID token of
// a fresh login whose nonce was what Register returned, and what checks it.
type Anchor struct {
	IDToken  string // compact
	JWK      []byte // the provider's key, JSON (RFC 7517)
	Issuer   string
	ClientID string
}
