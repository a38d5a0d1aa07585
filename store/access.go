package store

import (
	"crypto/sha256"
	"encoding/hex"

	"github.com/go-json-experiment/json"
)

// The protocols of the access path.
const (
	ProtocolHTTP     = "http"
	ProtocolPostgres = "postgres"
	ProtocolMCP      = "mcp"
)

// Access is what the access path does for a grant: where it goes with the real
// secret, what it lets through and what it hides. It stands in the grant, so
// that an approver sees it whole and no later catalogue changes it.
type Access struct {
	Protocol string          `json:"protocol"`          // one of the Protocol constants
	Upstream string          `json:"upstream"`          // http and mcp: base URL; postgres: host:port/database
	TLS      string          `json:"tls,omitzero"`      // postgres: verify (the default of catalogues) or off
	Inject   *Inject         `json:"inject,omitzero"`   // http and mcp: how the secret is shown to the target
	HTTP     *HTTPAccess     `json:"http,omitzero"`     // protocol http
	Postgres *PostgresAccess `json:"postgres,omitzero"` // protocol postgres
	MCP      *MCPAccess      `json:"mcp,omitzero"`      // protocol mcp
	Masking  Masking         `json:"masking,omitzero"`
}

// Digest is "sha256:<hex>" of a's deterministic JSON: how a use names the rules
// in force.
func (a *Access) Digest() string { return digestOf(a) }

// Inject says how the gateway shows the secret to an HTTP target. Values are
// templates over the secret's fields: "Bearer {{token}}".
type Inject struct {
	In       string `json:"in"`                // header, query, basic or sigv4
	Name     string `json:"name,omitzero"`     // of the header or the query key
	Value    string `json:"value,omitzero"`    // template, of header and query
	Username string `json:"username,omitzero"` // template, of basic
	Password string `json:"password,omitzero"` // template, of basic
	Region   string `json:"region,omitzero"`   // of sigv4
	Service  string `json:"service,omitzero"`  // of sigv4; the secret has access_key, secret_key and, for STS, security_token
}

// HTTPAccess is what may be asked of an HTTP target. What no route allows is
// refused.
type HTTPAccess struct {
	Routes          []HTTPRoute `json:"routes"`
	RequestHeaders  []string    `json:"request_headers,omitzero"`  // recorded, sealed, with their values
	ResponseHeaders []string    `json:"response_headers,omitzero"` // recorded, sealed, with their values
	Sample          int         `json:"sample,omitzero"`           // bytes of each body that are recorded, sealed and masked
	Upgrade         bool        `json:"upgrade,omitzero"`          // WebSocket (RFC 6455) may be asked for; never where anything is masked
	Timeout         Duration    `json:"timeout,omitzero"`          // until the target's answer begins; 30 s where zero
}

// HTTPRoute allows methods on paths.
type HTTPRoute struct {
	Methods []string `json:"methods"` // GET allows HEAD too
	Paths   []string `json:"paths"`   // "/orders/*": * stands for one segment, and for any number as the last one
}

// PostgresAccess is what may be asked of a PostgreSQL target. What it does not
// name is refused.
type PostgresAccess struct {
	Statements []string `json:"statements"`          // select, insert, update, delete, copy
	Tables     []string `json:"tables"`              // "orders" (schema public), "sales.*", "*"
	Functions  []string `json:"functions,omitzero"`  // allowed beside PostgreSQL's own that have no effect and read nothing
	Everywhere bool     `json:"everywhere,omitzero"` // UPDATE and DELETE may have no WHERE
	Sample     int      `json:"sample,omitzero"`     // bytes of each result that are recorded, sealed and masked
}

// MCPAccess is which tools of an MCP server may be seen and called.
type MCPAccess struct {
	Tools     []MCPTool `json:"tools"`
	Resources []string  `json:"resources,omitzero"` // URIs that may be read; * stands for any characters
	Prompts   []string  `json:"prompts,omitzero"`   // names that may be got; likewise
	Sample    int       `json:"sample,omitzero"`    // bytes of each result that are recorded, sealed and masked
}

// MCPTool allows tools by name.
type MCPTool struct {
	Name string `json:"name"` // * stands for any characters
	// Scope is asked for at each call, in the name of the same step: where it
	// needs approval, people approve this one call. Empty: the session's own
	// scope is enough.
	Scope string `json:"scope,omitzero"`
}

// Masking is what the access path hides in what comes back.
type Masking struct {
	Rules []MaskRule `json:"rules"`
}

// IsZero reports whether m hides nothing.
func (m Masking) IsZero() bool { return len(m.Rules) == 0 }

// MaskRule hides what it matches. Exactly one member is set.
type MaskRule struct {
	Field    string `json:"field,omitzero"`    // a JSON member at any depth, or a column of any table
	Path     string `json:"path,omitzero"`     // JSON: "$.customers[*].email"
	Column   string `json:"column,omitzero"`   // "orders.email" (schema public) or "sales.orders.email"
	Type     string `json:"type,omitzero"`     // values of a PostgreSQL type, by name
	Detector string `json:"detector,omitzero"` // what looks like email, card, iban, phone, secret or entropy, wherever it stands
}

// Text is m's deterministic JSON: what masking/<hex>.json of a bundle holds.
func (m Masking) Text() []byte {
	b, err := json.Marshal(m, json.Deterministic(true))
	if err != nil {
		panic(err) // strings always marshal
	}
	return b
}

// Digest is "sha256:<hex>" of Text, and empty where m hides nothing.
func (m Masking) Digest() string {
	if m.IsZero() {
		return ""
	}
	return digestOf(m)
}

func digestOf(v any) string {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		panic(err) // strings and numbers always marshal
	}
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}
