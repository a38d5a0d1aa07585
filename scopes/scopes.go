// Package scopes is the catalogue: what may be asked for, by whom, how
// sensitive it is, what Vault is asked for when it is granted, and which
// policy decides. It is pure of network and of Vault but for the setup plan,
// so that broker, issuer and recorder can each hold a copy of their own and
// judge alike.
package scopes

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// Why an ask cannot be decided. Each is the caller's mistake, and each has a
// problem document of its own; ErrPublicKey is reported as params-invalid.
var (
	ErrUnknownScope   = errors.New("unknown scope")
	ErrTTLInvalid     = errors.New("ttl is invalid")
	ErrTTLTooLong     = errors.New("ttl is too long")
	ErrParams         = errors.New("params are invalid")
	ErrDelivery       = errors.New("delivery is not supported")
	ErrPublicKey      = errors.New("public_key is invalid")
	ErrReasonRequired = errors.New("a reason is required")
)

// ErrPolicy is wrapped by Verdict.Err where the Rego policy failed.
var ErrPolicy = errors.New("the policy could not be evaluated")

// Engine names where a scope's credential comes from.
type Engine string

// The engines. KV is for the access path alone: a static secret is never
// handed out.
const (
	Identity Engine = "identity" // a step identity JWT, signed by Countersign itself
	Token    Engine = "token"    // a narrow Vault token
	Database Engine = "database" // Vault's database engine
	PKI      Engine = "pki"      // Vault's PKI engine
	SSH      Engine = "ssh"      // Vault's SSH engine, signing the step's key
	Path     Engine = "path"     // any other path of Vault
	KV       Engine = "kv"       // Vault's key/value engine, through the gateway only
)

// The ways a credential reaches the step.
const (
	Direct  = "direct"  // in the reply
	Wrapped = "wrapped" // as a Vault wrapping token
	Gateway = "gateway" // never: the access path uses it for the step
)

// Set is a catalogue with its policy, checked and compiled. It never changes.
type Set struct {
	scopes    []*Scope // in the order of the file
	byName    map[string]*Scope
	policy    *policy     // nil where none is set
	approval  *store.Rule // where the policy demands approval and the scope has no rule
	digest    string
	catalogue string
	rego      string
	text      Text
}

// Text is what a Set was read from.
type Text struct{ Catalogue, Policy string }

// Sensitivities are those that a scope can have, the least first.
var Sensitivities = []string{"low", "sensitive", "critical"}

// Scope is one thing that may be asked for.
type Scope struct {
	Name        string
	Description string
	Target      string // what is reached, for the record; may hold {{param}}
	Sensitivity string // one of Sensitivities
	MaxTTL      time.Duration
	DefaultTTL  time.Duration // MaxTTL where the catalogue names none
	Ask         []string      // globs over orchestrators, anchored; empty: nobody
	Engine      Engine
	Vault       Vault
	Delivery    []string // the first is the default
	Params      []Param
	Audience    []string // identity only; the first is the default
	Revocable   bool     // whether Vault can call the credential back
	Connection  *Connection
	Access      *store.Access // what the access path does, Masking included; nil where the gateway delivers nothing
	Masking     store.Masking // what the access path hides
	Retention   time.Duration // how long the sealed texts are kept; 0: by sensitivity
	Approval    *store.Rule   // who must approve; nil where nobody has to

	slug     string
	ask      []*regexp.Regexp
	byParam  map[string]int      // index into Params
	strict   map[string]bool     // params that must be safe whatever their pattern says
	path     template            // of the secret, mount and role included
	target   template            //
	data     map[string]template // of the write
	position position
	tools    []position // of Access.MCP.Tools
}

// Vault says what a scope takes from Vault.
type Vault struct {
	Mount    string            // of database, pki, ssh and kv
	Role     string            // of database, pki and ssh; may hold {{param}}
	Path     string            // of path and kv; may hold {{param}}
	Method   string            // of path: read or write
	Data     map[string]string // body of the write; values may hold {{param}}
	Policies []PolicyPath      // of token: what the token may do
}

// PolicyPath is one rule of a Vault policy.
type PolicyPath struct {
	Path         string
	Capabilities []string
}

// ParamType is the type of a parameter.
type ParamType string

// The types of parameters.
const (
	StringParam ParamType = "string"
	IntParam    ParamType = "int"
	EnumParam   ParamType = "enum"
	BoolParam   ParamType = "bool"
)

// Param is a value that the caller may choose, within bounds.
type Param struct {
	Name        string
	Type        ParamType
	Description string
	Required    bool
	Default     *string  // nil where there is none
	Pattern     string   // string: RE2, anchored at both ends
	MaxLength   int      // string: in bytes
	Min, Max    int64    // int
	Values      []string // enum

	pattern *regexp.Regexp
	flawed  bool // a problem of it has been told
}

// Connection is what a database reply tells the step to connect to.
type Connection struct {
	Host     string `json:"host"`
	Port     int    `json:"port"`
	Database string `json:"database"`
}

// Ask is one request for a credential.
type Ask struct {
	Agent         string // SPIFFE ID of the step
	Orchestrator  string
	Run           string
	Step          string
	Scope         string
	TTL           string         // as asked; empty: the scope's default
	Params        map[string]any // as decoded from JSON
	Delivery      string         // empty: the scope's first
	PublicKey     string
	Audience      string
	Subject       string
	SubjectProved bool
	Reason        string
	Time          time.Time
}

// Verdict is a decision and all that it would grant.
type Verdict struct {
	Scope   *Scope
	Outcome store.Outcome
	Reasons []string
	// Grant is whole where the outcome is allow or needs-approval, and on a
	// denial by policy. Where the orchestrator may not ask at all, the ask was
	// not looked at: Grant then has scope, engine and target alone.
	Grant store.Grant
	// Rule says who must approve, where the outcome is needs-approval.
	Rule *store.Rule
	// Err is why the policy could not be evaluated; the outcome is deny then.
	// It is for the operator's log, not for the caller.
	Err error
}

// Load reads a catalogue and its policy. policyPath may be empty: then the
// catalogue's own rules decide alone. The error is Problems where the files
// could be read.
func Load(cataloguePath, policyPath string) (*Set, error) {
	catalogue, err := readFile(cataloguePath)
	if err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	var rego []byte
	if policyPath != "" {
		if rego, err = readFile(policyPath); err != nil {
			return nil, fmt.Errorf("read the policy: %w", err)
		}
	}
	return Parse(cataloguePath, catalogue, policyPath, rego)
}

// readFile reads at most a byte more than may be read, so that a file too
// large, or one without end, is a problem and not a lack of memory.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// Parse checks and compiles a catalogue and its policy; the names are for
// messages. An empty policyName means no policy. The error is Problems.
func Parse(name string, catalogue []byte, policyName string, rego []byte) (*Set, error) {
	list, approval, problems := readCatalogue(name, catalogue)
	s := &Set{
		scopes:    list,
		approval:  approval,
		byName:    make(map[string]*Scope, len(list)),
		catalogue: digest(catalogue),
		text:      Text{Catalogue: string(catalogue), Policy: string(rego)},
	}
	if policyName != "" {
		p, more := readPolicy(policyName, rego)
		problems = append(problems, more...)
		s.policy, s.rego = p, digest(rego)
		s.digest = digest(prefixed(catalogue), prefixed(rego))
	} else {
		s.digest = digest(prefixed(catalogue))
	}
	if err := problems.sorted().err(); err != nil {
		return nil, err
	}
	for _, sc := range list {
		s.byName[sc.Name] = sc
	}
	return s, nil
}

// prefixed puts b's length before it, 8 bytes big-endian, so that no byte can
// move between catalogue and policy under one digest.
func prefixed(b []byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(len(b))), b...)
}

func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// Digest is "sha256:<hex>" over catalogue and policy, each with its length
// before it (8 bytes, big-endian): what every decision names as the policy in
// force.
func (s *Set) Digest() string { return s.digest }

// CatalogueDigest is "sha256:<hex>" of the catalogue's bytes.
func (s *Set) CatalogueDigest() string { return s.catalogue }

// PolicyDigest is "sha256:<hex>" of the policy's bytes, empty without one.
func (s *Set) PolicyDigest() string { return s.rego }

// Text is what s was read from: the bytes that its digests are over.
func (s *Set) Text() Text { return s.text }

// Scope returns the scope of that name.
func (s *Set) Scope(name string) (*Scope, bool) { sc, ok := s.byName[name]; return sc, ok }

// Scopes returns all scopes, in the order of the catalogue.
func (s *Set) Scopes() []*Scope { return s.scopes }

// For returns the scopes that an orchestrator may ask for.
func (s *Set) For(orchestrator string) []*Scope {
	var out []*Scope
	for _, sc := range s.scopes {
		if sc.MayAsk(orchestrator) {
			out = append(out, sc)
		}
	}
	return out
}

// MayAsk reports whether an orchestrator may ask for sc.
func (sc *Scope) MayAsk(orchestrator string) bool {
	for _, re := range sc.ask {
		if re.MatchString(orchestrator) {
			return true
		}
	}
	return false
}

// VaultName is the name of sc's policy and token role in Vault:
// "countersign-<slug>".
func (sc *Scope) VaultName() string { return "countersign-" + sc.slug }
