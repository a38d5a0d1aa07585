package store

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Proven is one entry with its place in the log, as the recorder returns it.
type Proven struct {
	Index int64            `json:"index"`
	Leaf  []byte           `json:"leaf"`  // the exact stored bytes
	Proof tlog.RecordProof `json:"proof"` // inclusion under the checkpoint beside it
}

// Appended is the answer to an append, and one item of /open and /follow:
// entries with their proofs, under one signed checkpoint.
type Appended struct {
	Entries    []Proven `json:"entries"`
	Checkpoint string   `json:"checkpoint"` // a C2SP signed checkpoint
}

// Receipt returns the proof of the i'th entry as one self-contained piece.
func (a *Appended) Receipt(i int) Receipt {
	return Receipt{Proven: a.Entries[i], Checkpoint: a.Checkpoint}
}

// Receipt proves that an entry is in the log.
type Receipt struct {
	Proven
	Checkpoint string `json:"checkpoint"`
}

// TlogProof formats r as a C2SP tlog-proof, which other people's tools verify
// against the leaf hash and the log's key.
func (r *Receipt) TlogProof() string {
	return string(torchwood.FormatProof(r.Index, r.Proof, []byte(r.Checkpoint)))
}

// ErrReceipt is wrapped by every error about a receipt that does not hold.
var ErrReceipt = errors.New("receipt does not verify")

// LogVerifier checks checkpoints and receipts against one log's key. It is
// safe for concurrent use.
type LogVerifier struct {
	origin string
	policy torchwood.Policy

	mu   sync.Mutex
	last map[string]torchwood.Checkpoint // verified checkpoints by their exact bytes
}

// NewLogVerifier takes the log's note verifier key (C2SP signed-note vkey).
// The key's name is the log's origin.
func NewLogVerifier(vkey string) (*LogVerifier, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, fmt.Errorf("log key %q: %w", vkey, err)
	}
	return &LogVerifier{
		origin: v.Name(),
		policy: torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v)),
		last:   map[string]torchwood.Checkpoint{},
	}, nil
}

// Origin is the log's name, the first line of its checkpoints.
func (v *LogVerifier) Origin() string { return v.origin }

// Checkpoint verifies the log's signature and returns the head it signs.
// Errors wrap ErrReceipt. The few latest results are kept, since all receipts
// of a batch share one checkpoint.
func (v *LogVerifier) Checkpoint(signed string) (torchwood.Checkpoint, error) {
	if len(signed) > 16<<10 {
		return torchwood.Checkpoint{}, fmt.Errorf("%w: checkpoint of %d bytes", ErrReceipt, len(signed))
	}
	// Held while verifying: those who come with the same checkpoint at the same
	// moment had better wait for the result than work it out too.
	v.mu.Lock()
	defer v.mu.Unlock()
	if c, ok := v.last[signed]; ok {
		return c, nil
	}
	c, _, err := torchwood.VerifyCheckpoint([]byte(signed), v.policy)
	if err != nil {
		return c, fmt.Errorf("%w: checkpoint: %v", ErrReceipt, err)
	}
	if len(v.last) >= 64 {
		clear(v.last)
	}
	v.last[signed] = c
	return c, nil
}

// CheckpointSize reads the tree size of a checkpoint that was verified before, or
// comes from a ledger of one's own.
func CheckpointSize(signed string) (int64, error) {
	i := strings.LastIndex(signed, "\n\n")
	if i < 0 {
		return 0, fmt.Errorf("%w: the checkpoint is no signed note", ErrReceipt)
	}
	c, err := torchwood.ParseCheckpoint(signed[:i+1])
	return c.N, err
}

// Check verifies r and returns the entry it proves. Errors wrap ErrReceipt.
func (v *LogVerifier) Check(r Receipt) (*Entry, error) {
	c, err := v.Checkpoint(r.Checkpoint)
	if err != nil {
		return nil, err
	}
	if r.Index < 0 || r.Index >= c.N {
		return nil, fmt.Errorf("%w: index %d outside a tree of %d", ErrReceipt, r.Index, c.N)
	}
	if err := tlog.CheckRecord(r.Proof, c.N, c.Hash, r.Index, LeafHash(r.Leaf)); err != nil {
		return nil, fmt.Errorf("%w: entry %d: %v", ErrReceipt, r.Index, err)
	}
	e, err := ParseLeaf(r.Leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: entry %d: %v", ErrReceipt, r.Index, err)
	}
	return e, nil
}
