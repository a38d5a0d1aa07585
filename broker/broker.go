// Package broker is the flow of one request: decide, put the intent on record,
// mint, put the issuance on record, hand over, revoke. The ledger decides what
// may happen; this package keeps the order in which things are written, and
// what a crash between two writes leaves behind stands beside each of them.
package broker

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight"
)

// Recorder is where the record is written and what is open is read. Every
// Appended must have been verified: proofs, the log's signature, consistency
// with what was seen before. Errors wrap store.ErrUnavailable when it is not
// known whether the append happened.
type Recorder interface {
	Append(ctx context.Context, subs ...*store.Submission) (*store.Appended, error)
	Open(ctx context.Context, request string) (*store.Appended, error)
	Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error
}

// Issuer turns a warrant into a credential and takes credentials back.
type Issuer interface {
	Mint(ctx context.Context, w store.Warrant) (*issuer.Minted, error)
	Activate(ctx context.Context, m *issuer.Minted) error
	Discard(ctx context.Context, m *issuer.Minted) error
	Revoke(ctx context.Context, d store.IssuedDetails) error
	Ping(ctx context.Context) error
}

// Catalogue is the catalogue and policy in force.
type Catalogue interface{ Current() *scopes.Set }

// Errors of the flow. Errors of scopes.Decide, issuer.ErrVaultUnavailable,
// store.ErrUnavailable and inflight.ErrUnavailable are returned as they are.
var (
	ErrMalformed    = errors.New("malformed request")             // an ID that is none
	ErrClosed       = errors.New("the request is closed")         // joined, and the credential went to another call
	ErrIdempotency  = errors.New("idempotency key used before")   // with another body
	ErrNotFound     = errors.New("not found")                     //
	ErrShuttingDown = errors.New("the broker is shutting down")   //
	ErrMint         = errors.New("the credential was not minted") // Vault refused; trying again does not help
)

// Denied says that policy denied a request, and why.
type Denied struct {
	Request string
	Reasons []string
}

func (d *Denied) Error() string { return "scope denied" }

// Config is what a Broker is made of.
type Config struct {
	Writer      string // this broker's name at the recorder, as it stamps it on entries
	TrustDomain string // of SPIFFE IDs
	Recorder    Recorder
	Issuer      Issuer
	Scopes      Catalogue
	Inflight    *inflight.Store
	Identity    Identity // checks step identity tokens; nil: none is introspected
	// Gateway is the access path in this process, nil where there is none. The
	// broker opens and ends its sessions; whoever made it closes it, after the
	// broker.
	Gateway    *gateway.Gateway
	PeopleURL  string // base of the recorder's pages, where requests are approved
	PrivacyKey store.PrivacyKey
	Limits     Limits // of all callers' use; none by default

	Grace       time.Duration    // when another writer's intent without an outcome is given up; 60 s by default
	MintTimeout time.Duration    // bounds one mint with its appends; 20 s by default
	JoinWait    time.Duration    // how long a joining call waits without Prefer; 5 s by default
	Tick        time.Duration    // how often due credentials are looked for; 250 ms by default
	Now         func() time.Time // time.Now by default
	Log         *zap.Logger      // none by default
}

// Broker issues credentials. It is safe for concurrent use.
type Broker struct {
	Config
	index  *index
	calls  *calls
	places places

	gate      sync.Mutex     // guards draining against work, and tries
	tries     map[string]try // by request
	announced atomic.Bool    // policy.loaded is on record
	closings  closings
	unrevoked *unrevoked

	ctx      context.Context // ends when the broker has drained
	cancel   context.CancelFunc
	draining chan struct{}
	work     sync.WaitGroup // calls under way and revocations
	loops    sync.WaitGroup
}

// Caller is an authenticated orchestrator.
type Caller struct {
	Orchestrator string
	Owners       []string // people who own it, as "user:NAME": none of them may approve what it asks for
}

// Ask is the body of POST /steps/{step}/credential, with what its headers said.
type Ask struct {
	Step      string
	Run       string
	Scope     string
	TTL       string
	Reason    string
	Subject   string
	Proved    bool // the subject was proved by a token
	Params    map[string]any
	Delivery  string
	PublicKey string
	Audience  string
	Receipt   bool          // the reply is to carry a tlog-proof
	Key       string        // Idempotency-Key; empty where none was sent
	Body      []byte        // canonical JSON of the body (RFC 8785): what "the same request" means
	Wait      time.Duration // Prefer: wait; zero where none was sent
	Arrived   time.Time     // when the call came in; now where it is zero

	oneCall bool // a gateway asks, as store.ApprovalRequestedDetails.OneCall
}

// Reply is what a call for a credential comes to: a credential (Credential
// set), or a request that is under way (Status set).
type Reply struct {
	Request    string
	Status     store.Status // empty where the credential is handed over
	Step       string
	Run        string
	Identity   string // SPIFFE ID
	Scope      string
	Target     string
	Credential *issuer.Credential
	IssuedAt   time.Time
	Expires    time.Time
	Index      int64  // of credential.issued
	LeafHash   string // base64
	Receipt    string // tlog-proof, where asked for
	Approved   *Approved
	Waiting    *Waiting // set where people are to decide
	// Answered must be called once the reply was written: a call that comes
	// later under the same key is a retry, one that came earlier joined.
	Answered func()
}

// Approved says which approval a credential rests on.
type Approved struct {
	ID      string // "apr_…"
	Request string // whose decisions they are: its own, or, for its whole run, an earlier one's
	People  int    // how many decisions it rests on
}

// Waiting says whom a request waits for.
type Waiting struct {
	ID      string // "apr_…"
	URL     string // where people decide; empty where the broker was not told
	Needs   []Need
	Expires time.Time
}

// Need is how many people of a group must approve, and how many have.
type Need struct {
	Group    string
	Count    int
	Approved int
}

// NotApproved says that people denied a request, or that it came to another end
// before its credential was minted.
type NotApproved struct {
	Request string
	Status  store.Status // denied, expired or void
}

func (e *NotApproved) Error() string { return "the request is " + string(e.Status) }

// View is what GET /requests/{id} shows.
type View struct {
	Request string
	Status  store.Status
	Run     string
	Step    string
	Scope   string
	Expires time.Time // of the live credential
	Waiting *Waiting  // set where people are to decide, or have and nothing was minted yet
}

// Revoked is what became of a step's live credentials.
type Revoked struct {
	Revoked int // Vault has called them back, and it is on record
	Pending int // Vault did not confirm yet, or it is being minted; it is tried again until it is done
	// Irrevocable counts what nothing can call back (a certificate): it ends by
	// its own time.
	Irrevocable int
}

// Result is what an orchestrator says came of a step.
type Result struct {
	Step, Run, Outcome, Summary, Target string
}
