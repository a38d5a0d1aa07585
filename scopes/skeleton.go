package scopes

import (
	"context"
	"io"

	vaultapi "github.com/hashicorp/vault/api"
)

type policy struct{}
type template struct{}
type dataTemplate struct{}
type position struct{}

// Problem is one thing wrong with a file, and what to write instead.
type Problem struct {
	File    string
	Line    int
	Column  int
	Message string
	Fix     string // what to write instead; may be empty
}

func (p Problem) String() string { return p.Message }

// Problems is every problem of a catalogue and its policy, as an error.
type Problems []Problem

// Error implements error, one problem a line.
func (p Problems) Error() string { return "problems" }

// Lint checks files: a name ending in .rego is a policy, any other a
// catalogue.
func Lint(paths ...string) []Problem { return nil }

// CaseResult is what one policy case gave.
type CaseResult struct {
	Name     string
	Line     int
	Failures []string // empty: passed
}

// Test runs the policy cases of a file. Where set is nil, the file's own keys
// `catalogue` and `policy` name what to load, relative to the file.
func Test(ctx context.Context, casesFile string, set *Set) ([]CaseResult, error) { return nil, nil }

// InForce holds the catalogue in force.
type InForce struct{}

// Open loads catalogue and policy and puts them in force.
func Open(cataloguePath, policyPath string) (*InForce, error) { return nil, nil }

// Static puts a Set in force that is not of a file.
func Static(set *Set) *InForce { return nil }

// Current is the Set in force.
func (f *InForce) Current() *Set { return nil }

// OnChange sets what is called with the old and the new Set before the new
// one takes force. Where it fails, the old one stays.
func (f *InForce) OnChange(fn func(old, new *Set) error) {}

// Reload reads the files again. On any error the old Set stays in force.
func (f *InForce) Reload() error { return nil }

// VaultOptions are the operator's choices for a VaultPlan.
type VaultOptions struct {
	BrokerPolicy string // name of the broker's own policy; "countersign-broker" by default
}

// VaultPlan is what a catalogue needs in Vault.
type VaultPlan struct {
	Policies []VaultPolicy // one per scope, and the broker's last
	Roles    []TokenRole
	Broker   string // name of the broker's policy, one of Policies
}

// VaultPolicy is an ACL policy.
type VaultPolicy struct {
	Name string
	HCL  string
}

// TokenRole is a role of auth/token/roles.
type TokenRole struct {
	Name   string
	Fields map[string]any
}

// VaultSetup derives from a catalogue the policies and token roles that it
// needs, and no more.
func VaultSetup(set *Set, opts VaultOptions) *VaultPlan { return &VaultPlan{} }

// Format writes p as HCL and vault commands that can be pasted into a shell.
func (p *VaultPlan) Format(w io.Writer) error { return nil }

// Apply writes p to Vault, with the rights of client.
func (p *VaultPlan) Apply(ctx context.Context, client *vaultapi.Client) error { return nil }

// Demo is the catalogue of `countersign dev`.
func Demo(withPostgres bool) []byte { return nil }
