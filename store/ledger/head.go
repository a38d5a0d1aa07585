package ledger

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// head is one state of the tree.
type head struct {
	size int64
	root tlog.Hash
	note string // signed checkpoint
}

// sign makes the C2SP checkpoint of f.
func sign(s note.Signer, f *frontier) (*head, error) {
	h := &head{size: f.size, root: f.root()}
	c := torchwood.Checkpoint{Origin: s.Name(), Tree: tlog.Tree{N: h.size, Hash: h.root}}
	b, err := note.Sign(&note.Note{Text: c.String()}, s)
	if err != nil {
		return nil, fmt.Errorf("signing the checkpoint: %w", err)
	}
	h.note = string(b)
	return h, nil
}

// headFile keeps the last signed checkpoint outside the database, so that an
// older database put back, validly signed as it is, is noticed at start.
//
// It is written after the commit and beside the next ones, the newest head
// only, and no append waits for it. So the file may trail the database (by
// headGap and one write of it while appends go on), never lead it: a crash
// before it is written leaves an older head, which is a prefix of what the
// database holds. What that leaves open is a database put back to a state from
// within that gap; each broker's own last head and the witnesses cover it.
type headFile struct {
	path   string
	due    chan struct{}
	failed atomic.Bool // the last write failed: appends are refused until one succeeds
}

// headGap is the least time between two writes of the file, so that its
// journal commits do not queue up before those of the database.
const headGap = 200 * time.Millisecond

// read returns the stored head, nil where there is no file.
func (f *headFile) read(v *store.LogVerifier) (*torchwood.Checkpoint, error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the head file: %w", err)
	}
	c, err := v.Checkpoint(string(b))
	if err != nil {
		return nil, fmt.Errorf("%w: the head file %s does not hold a checkpoint of this log: %v", ErrMismatch, f.path, err)
	}
	return &c, nil
}

// write keeps the head. A crash before it leaves an older one.
func (f *headFile) write(h *head) error { return durable.WriteFile(f.path, []byte(h.note)) }
