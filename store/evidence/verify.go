// Package evidence checks the record from outside: it trusts the log's key
// and nothing else, neither the recorder that serves the log nor the database
// that holds it.
package evidence

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
)

// Source is a log as somebody holds it: served by a recorder (HTTP) or lying
// in a ledger's database (Database). Nothing that it returns is believed.
type Source interface {
	// Checkpoint returns the newest signed checkpoint.
	Checkpoint(ctx context.Context) (string, error)
	// Tile returns the data of a hash tile (C2SP tlog-tiles, height 8).
	Tile(ctx context.Context, t tlog.Tile) ([]byte, error)
	// Entries returns the leaves of an entry bundle (t.L is -1), or
	// ErrNoEntries where this reader may not see entries.
	Entries(ctx context.Context, t tlog.Tile) ([][]byte, error)
}

// ErrNoEntries says that a source keeps its entries from this reader. The
// tree can still be verified from its hashes.
var ErrNoEntries = errors.New("entries are not shown to this reader")

// ErrUnchecked is wrapped where something could not be checked at all: the
// source did not answer, or a key was missing. It is no verdict on the log.
var ErrUnchecked = errors.New("could not be checked")

// NoIndex is the Index of a finding that belongs to no single entry.
const NoIndex int64 = -1

// Finding is one thing that is wrong with a log.
type Finding struct {
	Index   int64  `json:"index"` // of the entry, or NoIndex
	Kind    string `json:"kind"`  // short and stable, such as "leaf-mismatch"
	Message string `json:"message"`
}

func (f Finding) String() string {
	if f.Index == NoIndex {
		return f.Kind + ": " + f.Message
	}
	return fmt.Sprintf("%s: entry %d: %s", f.Kind, f.Index, f.Message)
}

// The kinds of findings.
const (
	KindCheckpoint  = "checkpoint"    // missing, malformed or not signed by the log's key
	KindWitness     = "witness"       // a witness that was asked for did not cosign the checkpoint
	KindLeaf        = "leaf-mismatch" // an entry's bytes do not give the hash that the tree holds
	KindMissing     = "missing"       // an entry or a tile of the signed tree is not there
	KindTile        = "tile-mismatch" // a stored hash is not the hash of what lies below it
	KindRoot        = "root-mismatch" // the tree does not give the signed root
	KindFork        = "fork"          // the log does not continue an earlier checkpoint
	KindRewritten   = "rewritten"     // an entry is another than in an earlier bundle
	KindRollback    = "rollback"      // the log is shorter than an earlier checkpoint
	KindMalformed   = "malformed"     // an entry does not parse
	KindTime        = "time"          // an entry's time lies before its predecessor's
	KindDuplicate   = "duplicate"     // two entries bear one ID
	KindOrder       = "order"         // an entry breaks the order of the record
	KindSignature   = "signature"     // a decision's passkey signature does not hold, or an enrolment's story
	KindPerson      = "person"        // one pseudonym with two names, or one person in two seats
	KindUse         = "use-outside"   // a use outside its credential's life, or by another's, or a result of none
	KindHold        = "hold"          // a hold that holds nothing, or is lifted without having been placed
	KindErasure     = "erasure"       // texts erased before their time, under a hold, or without retention
	KindRule        = "rule"          // fewer people asked than the catalogue in force wants
	KindPolicy      = "policy"        // a catalogue or policy is not the one that its entry names
	KindMasking     = "masking"       // masking rules are not those that grants and uses name
	KindAnchor      = "anchor"        // the login behind a passkey was not signed by the provider given
	KindMember      = "member"        // a bundle's member is missing, doubled, unexpected or unreadable
	KindDigest      = "digest"        // a member is not the file that the manifest names
	KindManifest    = "manifest"      // the manifest says something that the record does not
	KindWindow      = "window"        // an entry lies outside the window or its filters, or one of the window is missing
	KindOpening     = "opening"       // a text does not open the commitment of its entry
	KindTextMissing = "text-missing"  // a text is missing, and its erasure is not on record
	KindErasedText  = "erased-text"   // a text is there, though its erasure is on record
	KindExport      = "export"        // the export is not on record as the manifest tells it
	KindTable       = "table"         // a table is not what the entries give
	KindReport      = "report"        // REPORT.html is not what the entries give

	maxFindings = 50 // of a kind: a log that is wrong everywhere need not be listed whole
	bundleWidth = torchwood.TileWidth
)

// Report is what a verification saw. Findings are sorted by entry and kind.
type Report struct {
	Origin     string    `json:"origin"`
	Size       int64     `json:"size"`
	Root       string    `json:"root"`
	Checkpoint string    `json:"checkpoint"`
	Leaves     int64     `json:"leaves"`             // entries whose bytes were read and hashed
	Since      int64     `json:"since"`              // size of the earlier checkpoint that this log continues, 0 for none
	From       string    `json:"from,omitzero"`      // time of the first entry
	To         string    `json:"to,omitzero"`        // time of the last entry
	Witnesses  []string  `json:"witnesses,omitzero"` // those asked for that cosigned the checkpoint, with the time
	Bundle     *Contents `json:"bundle,omitzero"`    // of a bundle; nil for a log
	Signed     int64     `json:"signed"`             // decisions whose passkey signature was checked
	Unsigned   int64     `json:"unsigned"`           // decisions without one: who took them is the recorder's word
	Enrolled   int64     `json:"enrolled"`           // passkeys whose enrolment was read
	Anchored   int64     `json:"anchored"`           // those whose login was checked against a provider's keys
	Ruled      int64     `json:"ruled"`              // decisions and intents that were compared with the catalogue they name
	Findings   []Finding `json:"findings"`
	Cut        bool      `json:"cut,omitzero"`       // there were more findings than are listed
	Unchecked  []string  `json:"unchecked,omitzero"` // what was asked for and could not be checked
	Notes      []string  `json:"notes,omitzero"`     // what to know, and no finding
	Heads      []string  `json:"heads,omitzero"`     // of a fork or rollback: both signed checkpoints, the evidence for it

	mu      sync.Mutex
	kinds   map[string]int
	earlier string // the checkpoint that the log must continue
}

// Contents is what a bundle holds.
type Contents struct {
	From     int64             `json:"from"`            // window, as indexes
	To       int64             `json:"to"`              // exclusive
	After    string            `json:"after,omitzero"`  // time of the last entry before the window, where it is complete
	Before   string            `json:"before,omitzero"` // time of the first entry behind it
	Complete bool              `json:"complete"`
	Filters  map[string]string `json:"filters,omitzero"`
	Entries  int64             `json:"entries"` // of the window
	Context  int64             `json:"context"` // entries outside it that it is judged by
	Sealed   int64             `json:"sealed"`  // texts that open their commitments
	Files    int               `json:"files"`   // members whose digests were compared
	Derived  bool              `json:"derived"` // tables and report were derived from the entries again, and compared
}

// OK reports whether nothing was found.
func (r *Report) OK() bool { return len(r.Findings) == 0 }

func (r *Report) add(index int64, kind, format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kinds == nil {
		r.kinds = map[string]int{}
	}
	if r.kinds[kind]++; r.kinds[kind] > maxFindings {
		r.Cut = true
		return
	}
	r.Findings = append(r.Findings, Finding{index, kind, Plain(fmt.Sprintf(format, a...))})
}

// Plain returns s with everything escaped that does not print. What a finding
// tells of may be anybody's, and a terminal obeys control characters: it could be
// made to show another verdict.
func Plain(s string) string {
	if !strings.ContainsFunc(s, func(c rune) bool { return !strconv.IsPrint(c) }) && utf8.ValidString(s) {
		return s
	}
	quoted := strconv.Quote(s)
	return strings.ReplaceAll(strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`), `\\`, `\`)
}

func (r *Report) note(format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Notes = append(r.Notes, Plain(fmt.Sprintf(format, a...)))
}

// done sorts what goroutines found side by side.
func (r *Report) done() *Report {
	slices.SortStableFunc(r.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Index, b.Index), cmp.Compare(a.Kind, b.Kind))
	})
	slices.Sort(r.Notes)
	return r
}

// Options of Verify and VerifyBundle.
type Options struct {
	Log      *store.LogVerifier      // the log's key, from a trusted place
	Since    string                  // an earlier signed checkpoint, or empty
	Common   []EntryHash             // entries of an earlier bundle, ascending (see ReadSince)
	Witness  []string                // verifier keys of witnesses (C2SP tlog-cosignature) that must have cosigned
	Provider map[string][]byte       // JWK sets of identity providers by issuer, from a trusted place
	Rules    Rules                   // reads catalogues; nil: no rule is compared with one
	Progress func(done, total int64) // called now and then; may be nil
}

// Verify reads the whole log and checks: the checkpoint's signature and
// cosignatures, every entry against its leaf hash, every stored hash against
// those below it, the root, continuity with what was seen earlier, and the sense
// of the story (each entry admissible after those before it, times that never go
// back, no ID twice, no use outside a credential's life, no erasure before its
// time or under a hold). The texts behind commitments are not in a Source, so
// what needs them (rules against the catalogue, logins behind passkeys) is for
// VerifyBundle. A log that is wrong is a report with findings; an error (wrapping
// ErrUnchecked) says that no verdict was reached.
func Verify(ctx context.Context, src Source, o Options) (*Report, error) {
	if o.Log == nil {
		return nil, fmt.Errorf("%w: no log key given", ErrUnchecked)
	}
	r := &Report{Origin: o.Log.Origin(), Findings: []Finding{}}
	witnesses, err := newWitnesses(o.Witness)
	if err != nil {
		return nil, err
	}
	j, err := newJudge(r, &o, true, false)
	if err != nil {
		return nil, err
	}
	signed, err := src.Checkpoint(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: checkpoint: %w", ErrUnchecked, err)
	}
	head, ok := r.head(signed, &o, witnesses)
	if !ok {
		return r.done(), nil
	}
	since := r.since(&o, head)
	w := &walk{src: src, r: r, head: head.Tree, since: since, judge: j, earlier: &follow{r: r, common: o.Common}, progress: o.Progress}
	if err := w.leaves(ctx); err != nil {
		return nil, err
	}
	if w.blind {
		r.note("entries were not shown to this reader: the tree was checked from its hashes alone, and no entry was read")
	} else {
		j.finish()
	}
	return r.done(), nil
}

// head reads the checkpoint and checks who signed it. One that is not signed by
// the log's key is still returned, so that what is wrong inside is named too;
// false says that there is nothing to go on.
func (r *Report) head(signed string, o *Options, witnesses []*torchwood.CosignatureVerifier) (torchwood.Checkpoint, bool) {
	r.Checkpoint = signed
	head, err := o.Log.Checkpoint(signed)
	if err != nil {
		r.add(NoIndex, KindCheckpoint, "not signed by the key of %s: %v", o.Log.Origin(), err)
		if head, err = unverified(signed); err != nil {
			return head, false
		}
	}
	r.Size, r.Root = head.N, base64.StdEncoding.EncodeToString(head.Hash[:])
	for _, w := range witnesses {
		n, err := note.Open([]byte(signed), note.VerifierList(w))
		if err != nil || len(n.Sigs) == 0 {
			r.add(NoIndex, KindWitness, "%s did not cosign the checkpoint of size %d", w.Name(), head.N)
			continue
		}
		name := w.Name()
		if t, err := torchwood.CosignatureTimestamp(n.Sigs[0]); err == nil {
			name += " at " + time.Unix(t, 0).UTC().Format(time.RFC3339)
		}
		r.Witnesses = append(r.Witnesses, name)
	}
	return head, true
}

// newWitnesses reads verifier keys of witnesses (C2SP tlog-cosignature).
func newWitnesses(keys []string) ([]*torchwood.CosignatureVerifier, error) {
	var list []*torchwood.CosignatureVerifier
	for _, k := range keys {
		v, err := torchwood.NewCosignatureVerifier(strings.TrimSpace(k))
		if err != nil {
			return nil, fmt.Errorf("%w: witness key %.200q: %v", ErrUnchecked, k, err)
		}
		list = append(list, v)
	}
	return list, nil
}

// unverified parses the body of a signed note whose signature does not hold.
func unverified(signed string) (torchwood.Checkpoint, error) {
	body, _, ok := strings.Cut(signed, "\n\n")
	if !ok {
		return torchwood.Checkpoint{}, errors.New("not a signed note")
	}
	return torchwood.ParseCheckpoint(body + "\n")
}

// walk goes through the log once, from the first leaf to the last.
type walk struct {
	src      Source
	r        *Report
	head     tlog.Tree
	since    torchwood.Checkpoint
	judge    *judge
	earlier  *follow
	progress func(done, total int64)
	blind    bool // entries are not shown: leaf hashes come from level 0

	// hashes[l] are the hashes of level l of the tree that are not yet part of
	// a complete tile of level l/8; edge is the right edge of the tree.
	edge  []edgeHash
	tiles [][]tlog.Hash // per tile level, the hashes of the tile being filled
}

type edgeHash struct {
	level int
	hash  tlog.Hash
}

func (w *walk) leaves(ctx context.Context) error {
	for n := int64(0); n*bundleWidth < w.head.N; n++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: %v", ErrUnchecked, err)
		}
		width := int(min(bundleWidth, w.head.N-n*bundleWidth))
		stored, err := w.tile(ctx, tlog.Tile{H: torchwood.TileHeight, L: 0, N: n, W: width})
		if err != nil {
			return err
		}
		var leaves [][]byte
		if !w.blind {
			leaves, err = w.src.Entries(ctx, tlog.Tile{H: torchwood.TileHeight, L: -1, N: n, W: width})
			switch {
			case errors.Is(err, ErrNoEntries):
				w.blind = true
			case errors.Is(err, ErrUnchecked):
				return err
			case err != nil:
				w.r.add(n*bundleWidth, KindMissing, "entries %d to %d cannot be read: %v", n*bundleWidth, n*bundleWidth+int64(width)-1, err)
			}
		}
		if err := w.bundle(ctx, n, width, stored, leaves); err != nil {
			return err
		}
		if w.progress != nil {
			w.progress(n*bundleWidth+int64(width), w.head.N)
		}
	}
	// The partial tiles at the right edge of the upper levels.
	for l := 1; l < len(w.tiles); l++ {
		if len(w.tiles[l]) > 0 {
			n := w.head.N >> (8 * l) / bundleWidth
			if err := w.compare(ctx, l, n, w.tiles[l]); err != nil {
				return err
			}
		}
	}
	if root := w.root(); w.head.N > 0 && root != w.head.Hash {
		w.r.add(NoIndex, KindRoot, "the entries give root %s, but %s is signed for size %d", root, w.head.Hash, w.head.N)
	}
	return nil
}

// tile reads a hash tile. Hashes that are missing come back as zero, with a
// finding.
func (w *walk) tile(ctx context.Context, t tlog.Tile) ([]tlog.Hash, error) {
	hashes := make([]tlog.Hash, t.W)
	data, err := w.src.Tile(ctx, t)
	if errors.Is(err, ErrUnchecked) {
		return nil, err
	}
	if err != nil || len(data) != t.W*tlog.HashSize {
		if err == nil {
			err = fmt.Errorf("%d bytes, want %d", len(data), t.W*tlog.HashSize)
		}
		w.r.add(NoIndex, KindMissing, "tile %s: %v", torchwood.TilePath(t), err)
		return hashes, nil
	}
	for i := range hashes {
		hashes[i] = tlog.Hash(data[i*tlog.HashSize:])
	}
	return hashes, nil
}

func (w *walk) bundle(ctx context.Context, n int64, width int, stored []tlog.Hash, leaves [][]byte) error {
	if leaves != nil && len(leaves) != width {
		w.r.add(n*bundleWidth, KindMissing, "a bundle of %d entries has %d", width, len(leaves))
	}
	for i := range width {
		index := n*bundleWidth + int64(i)
		h := stored[i]
		if i < len(leaves) && leaves[i] != nil {
			h = store.LeafHash(leaves[i])
			if h != stored[i] {
				w.r.add(index, KindLeaf, "its bytes hash to %s, the tree holds %s", h, stored[i])
			}
			w.story(index, leaves[i])
		} else if leaves != nil && i < len(leaves) {
			w.r.add(index, KindMissing, "the entry is not there")
		}
		if err := w.push(ctx, index, h); err != nil {
			return err
		}
		w.earlier.compare(index, h)
		if index+1 == w.since.N {
			w.r.continues(w.since, w.root())
		}
	}
	return nil
}

// push adds a leaf hash to the tree, and compares each tile that it
// completes with the stored one.
func (w *walk) push(ctx context.Context, index int64, h tlog.Hash) error {
	w.edge = append(w.edge, edgeHash{0, h})
	for level := 1; len(w.edge) > 1 && w.edge[len(w.edge)-1].level == w.edge[len(w.edge)-2].level; level++ {
		k := len(w.edge)
		sum := tlog.NodeHash(w.edge[k-2].hash, w.edge[k-1].hash)
		w.edge = append(w.edge[:k-2], edgeHash{level, sum})
		if level%8 != 0 {
			continue
		}
		l := level / 8
		for len(w.tiles) <= l {
			w.tiles = append(w.tiles, nil)
		}
		w.tiles[l] = append(w.tiles[l], sum)
		if len(w.tiles[l]) == bundleWidth {
			if err := w.compare(ctx, l, index>>(8*l)/bundleWidth, w.tiles[l]); err != nil {
				return err
			}
			w.tiles[l] = w.tiles[l][:0]
		}
	}
	return nil
}

func (w *walk) compare(ctx context.Context, l int, n int64, want []tlog.Hash) error {
	t := tlog.Tile{H: torchwood.TileHeight, L: l, N: n, W: len(want)}
	got, err := w.tile(ctx, t)
	if err != nil {
		return err
	}
	for i := range want {
		if got[i] != want[i] {
			first := (n*bundleWidth + int64(i)) << (8 * l)
			w.r.add(NoIndex, KindTile, "tile %s, hash %d, over entries %d to %d is not the hash of what lies below it", torchwood.TilePath(t), i, first, first+1<<(8*l)-1)
			break
		}
	}
	return nil
}

// root is the RFC 6962 root over the leaves pushed so far.
func (w *walk) root() tlog.Hash {
	if len(w.edge) == 0 {
		return tlog.Hash{}
	}
	h := w.edge[len(w.edge)-1].hash
	for i := len(w.edge) - 2; i >= 0; i-- {
		h = tlog.NodeHash(w.edge[i].hash, h)
	}
	return h
}

// story judges one entry.
func (w *walk) story(index int64, leaf []byte) {
	w.r.Leaves++
	e, err := store.ParseLeaf(leaf)
	if err != nil {
		w.r.add(index, KindMalformed, "%v", err)
		return
	}
	w.r.span(e)
	w.judge.take(index, leaf, e, nil)
}

// span notes the times between which entries lie.
func (r *Report) span(e *store.Entry) {
	if r.From == "" {
		r.From = e.Time.String()
	}
	r.To = e.Time.String()
}
