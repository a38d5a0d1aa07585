package issuer

import (
	"fmt"
	"log/slog"

	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap/zapcore"

	"github.com/countersign-dev/countersign/store"
)

// Kind says which members a Credential has.
type Kind string

// The kinds of credentials.
const (
	KindIdentity   Kind = "identity"    // token
	KindVaultToken Kind = "vault_token" // token, addr
	KindDatabase   Kind = "database"    // username, password, host, port, database
	KindPKI        Kind = "pki"         // certificate, private_key unless the step sent a CSR, ca_chain, serial
	KindSSH        Kind = "ssh"         // signed_key, serial
	KindPath       Kind = "path"        // data
	KindWrapped    Kind = "wrapped"     // wrapping_token, addr
	KindGateway    Kind = "gateway"     // protocol, address, token, and for PostgreSQL username and database; the secret is kept from the step
)

// Credential is what a step is given, as the member "credential" of the
// reply. It holds the secret: it is marshalled once, into the reply, and
// prints and logs as its kind alone.
type Credential struct {
	Kind      Kind `json:"kind"`
	Revocable bool `json:"revocable"`

	Token string `json:"token,omitzero"`
	Addr  string `json:"addr,omitzero"`

	Protocol string `json:"protocol,omitzero"` // of the access path: http, postgres or mcp
	Address  string `json:"address,omitzero"`  // of the access path: host:port for postgres, else a URL

	Username string `json:"username,omitzero"`
	Password string `json:"password,omitzero"`
	Host     string `json:"host,omitzero"`
	Port     int    `json:"port,omitzero"`
	Database string `json:"database,omitzero"`

	Certificate string   `json:"certificate,omitzero"`
	PrivateKey  string   `json:"private_key,omitzero"`
	CAChain     []string `json:"ca_chain,omitzero"`
	SignedKey   string   `json:"signed_key,omitzero"`
	Serial      string   `json:"serial,omitzero"`

	Data jsontext.Value `json:"data,omitzero"` // what Vault answered at the path, a JSON object

	WrappingToken string `json:"wrapping_token,omitzero"`
}

// String names the kind and nothing else.
func (c *Credential) String() string {
	if c == nil {
		return "credential(none)"
	}
	return "credential(" + string(c.Kind) + ", redacted)"
}

// GoString is String, for %#v.
func (c *Credential) GoString() string { return c.String() }

// Format is String under every verb, since %d or %x would print the members.
func (c *Credential) Format(f fmt.State, _ rune) { fmt.Fprint(f, c.String()) }

// MarshalLogObject logs the kind and nothing else.
func (c *Credential) MarshalLogObject(e zapcore.ObjectEncoder) error {
	e.AddString("kind", string(c.Kind))
	return nil
}

// LogValue logs the kind and nothing else.
func (c *Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Minted is a credential that nobody was given yet, and what the record is to
// say of it.
type Minted struct {
	Credential *Credential
	Issued     store.IssuedDetails
}

// String names the kind and nothing else.
func (m *Minted) String() string { return "minted " + m.Credential.String() }

// Format is String under every verb.
func (m *Minted) Format(f fmt.State, _ rune) { fmt.Fprint(f, m.String()) }

// MarshalLogObject logs what the record may say.
func (m *Minted) MarshalLogObject(e zapcore.ObjectEncoder) error {
	e.AddString("kind", m.Issued.Kind)
	e.AddString("intent", m.Issued.Intent)
	return nil
}
