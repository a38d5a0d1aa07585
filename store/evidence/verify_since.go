package evidence

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
)

// EntryHash is the leaf hash of an entry that was seen earlier.
type EntryHash struct {
	Index int64
	Hash  tlog.Hash
}

// ReadSince reads what was kept of a log earlier: a signed checkpoint, or a
// bundle, of which it returns the checkpoint and the hashes of its entries.
// Neither is verified here: Verify checks the checkpoint's signature, and whether
// an old bundle is whole is for VerifyBundle. Errors wrap ErrUnchecked.
func ReadSince(path string) (checkpoint string, common []EntryHash, err error) {
	refuse := func(err error) (string, []EntryHash, error) {
		return "", nil, fmt.Errorf("%w: %s: %w", ErrUnchecked, path, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return refuse(err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return refuse(err)
	}
	if !bytes.HasPrefix(raw, []byte("PK")) {
		return string(raw), nil, nil
	}
	r := &Report{}
	b, err := openBundle(path, r)
	if err != nil {
		return refuse(err)
	}
	if b == nil {
		return refuse(fmt.Errorf("%s", r.Findings[0]))
	}
	defer b.f.Close()
	if !b.readManifest() {
		return refuse(fmt.Errorf("%s", r.Findings[0]))
	}
	checkpoint = string(b.small(memberCheckpoint, maxCheckpoint))
	window, around := b.window(), b.around()
	for _, s := range []*stream{window, around} {
		for s.next() {
			common = append(common, EntryHash{s.index, store.LeafHash(s.line)})
		}
		s.close()
	}
	if !r.OK() {
		return refuse(fmt.Errorf("the earlier bundle is not whole: %s", r.Findings[0]))
	}
	slices.SortFunc(common, func(x, y EntryHash) int { return int(x.Index - y.Index) })
	return checkpoint, common, nil
}

// follow compares entries with those of an earlier bundle.
type follow struct {
	r      *Report
	common []EntryHash
	n      int64 // compared
}

// compare takes the entries in ascending order.
func (f *follow) compare(index int64, h tlog.Hash) {
	for len(f.common) > 0 && f.common[0].Index < index {
		f.common = f.common[1:]
	}
	if len(f.common) == 0 || f.common[0].Index != index {
		return
	}
	f.n++
	if f.common[0].Hash != h {
		f.r.add(index, KindRewritten, "it is another entry than in the earlier bundle: one of the two was rewritten")
	}
}

// since checks the earlier checkpoint, and returns what the log must continue;
// of size zero where there is nothing.
func (r *Report) since(o *Options, head torchwood.Checkpoint) torchwood.Checkpoint {
	if o.Since == "" {
		return torchwood.Checkpoint{}
	}
	since, err := o.Log.Checkpoint(o.Since)
	switch {
	case err != nil:
		r.add(NoIndex, KindCheckpoint, "the earlier checkpoint is not signed by the key of %s: %v", o.Log.Origin(), err)
		return torchwood.Checkpoint{}
	case since.N > head.N:
		r.Heads = []string{o.Since, r.Checkpoint}
		r.add(NoIndex, KindRollback, "the log has %d entries, but an earlier checkpoint signed %d: the tail is cut off or an older copy was put back", head.N, since.N)
		return torchwood.Checkpoint{}
	}
	r.earlier = o.Since
	return since
}

// continues compares the root that the log gives at the size of an earlier
// checkpoint with the one signed there.
func (r *Report) continues(since torchwood.Checkpoint, root tlog.Hash) {
	if root == since.Hash {
		r.Since = since.N
		return
	}
	r.Heads = []string{r.earlier, r.Checkpoint}
	r.add(NoIndex, KindFork, "at size %d an earlier checkpoint signed root %s, this log gives %s: the record was rewritten", since.N, since.Hash, root)
}
