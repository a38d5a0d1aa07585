// Package ledger keeps the record: an append-only Merkle log over SQLite.
package ledger

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// ErrMismatch is wrapped by every finding that the stored log does not hold.
var ErrMismatch = errors.New("ledger mismatch")

// ErrNotFound says that a tile lies outside the published tree.
var ErrNotFound = errors.New("not in the published tree")

// ErrQuery is wrapped by every error about a History query that makes no sense.
var ErrQuery = errors.New("malformed query")

// Options say where a ledger lies and how it runs.
type Options struct {
	Dir          string // holds ledger.db, lock and, unless named below, head and details-keys.db
	HeadFile     string
	KeysFile     string
	Signer       note.Signer // Ed25519; its name is the log's origin
	Verifier     string      // vkey of Signer
	PrivacyKey   store.PrivacyKey
	Grace        time.Duration
	Now          func() time.Time
	Log          *zap.Logger
	PublishEvery time.Duration // 2 s by default
	CheckNewest  int64         // entries hashed again at start; 10,000 by default
	RecheckEvery time.Duration // pause between background passes; 1 h by default, negative: none at all
}

// Ledger is an open ledger.
type Ledger struct{}

// Author is who appends.
type Author struct {
	Name     string // stamped on the entries
	Recorder bool   // the recorder itself writes
}

// Open opens or creates the ledger in o.Dir and checks it.
func Open(ctx context.Context, o Options) (*Ledger, error) { panic("skeleton") }

// Append adds lines as one group, all or nothing, durable before return.
func (l *Ledger) Append(ctx context.Context, by Author, lines [][]byte) (*store.Appended, error) {
	panic("skeleton")
}

// OpenSet returns the entries of what is open.
func (l *Ledger) OpenSet(ctx context.Context, request string) (*store.Appended, error) {
	panic("skeleton")
}

// Follow calls fn with each commit's entries after index after that concern writers.
func (l *Ledger) Follow(ctx context.Context, after int64, fn func(*store.Appended) error) error {
	panic("skeleton")
}

// Query selects entries. Empty fields select all.
type Query struct {
	From, To                                                                         time.Time // From inclusive, To exclusive
	Run, Step, Orchestrator, Scope, Target, Person, Subject, Type, Outcome, Request string
	Limit                                                                            int // 1,000 by default and at most
	Cursor                                                                           string
}

// HistoryEntry is one entry of a Page.
type HistoryEntry struct {
	Index  int64             `json:"index"`
	Entry  jsontext.Value    `json:"entry"`           // the raw leaf
	Opened map[string]string `json:"opened,omitzero"` // sealed texts that are not erased
}

// Page is an answer to a Query, ascending by index.
type Page struct {
	Entries []HistoryEntry `json:"entries"`
	Next    string         `json:"next,omitzero"` // cursor of the next page; empty on the last
}

// History returns the entries that match q.
func (l *Ledger) History(ctx context.Context, q Query) (*Page, error) { panic("skeleton") }

// Published is the C2SP signed checkpoint published last.
func (l *Ledger) Published() string { panic("skeleton") }

// Head is the latest signed checkpoint.
func (l *Ledger) Head() string { panic("skeleton") }

// Size is the number of entries.
func (l *Ledger) Size() int64 { panic("skeleton") }

// Tile returns a C2SP tlog-tiles tile (L -1: entry bundle) of the published tree.
func (l *Ledger) Tile(ctx context.Context, t tlog.Tile) ([]byte, error) { panic("skeleton") }

// Consistency proves that the tree of size from is a prefix of that of size to.
func (l *Ledger) Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error) {
	panic("skeleton")
}

// Entries iterates over the leaves [from, to).
func (l *Ledger) Entries(ctx context.Context, from, to int64) iter.Seq2[Stored, error] {
	panic("skeleton")
}

// Done is closed when the ledger stopped itself or was closed.
func (l *Ledger) Done() <-chan struct{} { panic("skeleton") }

// Err is why the ledger stopped itself.
func (l *Ledger) Err() error { panic("skeleton") }

// Close stops the ledger.
func (l *Ledger) Close() error { panic("skeleton") }

// Stored is one row of the log.
type Stored struct {
	Index     int64
	Leaf      []byte
	Submitted []byte // SHA-256 of the submitted bytes
}

// Reader is a ledger's database, opened read-only and unchecked.
type Reader struct{}

// ReadOnly opens the database file at path for offline verification.
func ReadOnly(path string) (*Reader, error) { panic("skeleton") }

// Size is the number of entries.
func (r *Reader) Size(ctx context.Context) (int64, error) { panic("skeleton") }

// Entries iterates over all rows in order.
func (r *Reader) Entries(ctx context.Context) iter.Seq2[Stored, error] { panic("skeleton") }

// Hashes iterates over the stored tree hashes (tlog.StoredHashIndex order).
func (r *Reader) Hashes(ctx context.Context) iter.Seq2[int64, []byte] { panic("skeleton") }

// Checkpoint is the latest stored signed checkpoint, empty where there is none.
func (r *Reader) Checkpoint(ctx context.Context) (string, error) { panic("skeleton") }

// Close closes the database.
func (r *Reader) Close() error { panic("skeleton") }
