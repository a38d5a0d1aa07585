package evidence

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/klauspost/compress/flate"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence/report"
	"github.com/countersign-dev/countersign/store/ledger"
)

// sealedLine is a line of sealed.jsonl: the opening of a commitment.
type sealedLine struct {
	Index int64  `json:"index"`
	Field string `json:"field"`
	Salt  []byte `json:"salt"`
	Text  string `json:"text"`
}

// reportMeta is what the report of a bundle says of it.
func reportMeta(m *manifest, checkpoint string) report.Meta {
	r := report.Meta{
		Origin: m.Origin, Created: m.Created, Size: m.Size, Root: m.Root, Checkpoint: checkpoint,
		From: m.Window.From, To: m.Window.To, FromTime: m.Window.FromTime, ToTime: m.Window.ToTime,
		Filters: m.Filters, Complete: m.Complete,
	}
	var unverified *note.UnverifiedNoteError
	if _, err := note.Open([]byte(checkpoint), note.VerifierList()); errors.As(err, &unverified) {
		for _, s := range unverified.Note.UnverifiedSigs {
			if s.Name != m.Origin {
				r.Cosignatures = append(r.Cosignatures, s.Name)
			}
		}
	}
	return r
}

// ExportOptions say what an export holds. From, To and Index must be set.
type ExportOptions struct {
	// Query has the filters. Its From, To, Limit and Cursor are not looked at:
	// Window made From and To of them.
	Query    ledger.Query
	From, To int64             // the window, as export.created has it
	Index    int64             // of export.created
	Filters  map[string]string // as export.created has them
	Since    int64             // the size of an earlier checkpoint whose consistency is to be checked; 0: of none
	// Wait is how long a published checkpoint that covers Index is waited for, so
	// that its cosignatures are in the bundle. After that it is the newest signed.
	Wait time.Duration
	Dir  string // holds what is put aside until its turn, sealed texts among it, in a directory of its own that is removed; the system's by default
	// Progress is called now and then with how many entries are done, of how many.
	// Nil: nobody is told.
	Progress func(done, of int64)
}

func (o *ExportOptions) progress(done, of int64) {
	if o.Progress != nil {
		o.Progress(done, of)
	}
}

//go:embed VERIFY.md
var verifyText string

// Format writes an export. It stops at the first error, ctx's and w's among
// them; what is written by then is no export.
type Format func(ctx context.Context, l *ledger.Ledger, w io.Writer, o ExportOptions) error

// pollCheckpoint is how often the published checkpoint is looked at.
const pollCheckpoint = 20 * time.Millisecond

// checkpointOver returns a signed checkpoint of l that covers index: the
// published one, where it does in time, or else the newest.
func checkpointOver(ctx context.Context, l *ledger.Ledger, index int64, wait time.Duration) (string, error) {
	late := time.NewTimer(wait)
	defer late.Stop()
	tick := time.NewTicker(pollCheckpoint)
	defer tick.Stop()
	for {
		if c := l.Published(); c != "" {
			size, err := store.CheckpointSize(c)
			if err != nil || size > index {
				return c, err
			}
		}
		select {
		case <-tick.C:
		case <-late.C:
			return l.Head(), nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// Export writes the bundle that o asks for (format countersign-bundle/1) to w.
// It streams: memory does not grow with the window, but for an index of what is
// filtered. The same log, checkpoint and options make the same bytes. It is safe
// for concurrent use. Errors in reading the log are those of ledger.Export.
func Export(ctx context.Context, l *ledger.Ledger, w io.Writer, o ExportOptions) (err error) {
	b := &bundleWriter{l: l, o: o, report: report.New(), policies: map[string]bool{}}
	// A text that is missing must have its erasure in the tree that the bundle is
	// of: nothing is erased from here on, and what was is covered.
	defer l.KeepTexts()()
	if b.checkpoint, err = checkpointOver(ctx, l, max(o.Index, l.Size()-1), o.Wait); err != nil {
		return err
	}
	if err := b.begin(ctx); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(o.Dir, "export-*"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	buffered := bufio.NewWriterSize(w, 128<<10)
	b.zip = zip.NewWriter(buffered)
	b.zip.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, flate.BestSpeed) })
	for _, write := range []func(context.Context) error{b.entries, b.context, b.tiles, b.derived, b.rest} {
		if err := write(ctx); err != nil {
			return err
		}
	}
	return errors.Join(b.zip.Close(), buffered.Flush())
}

// bundleWriter is a bundle in the making.
type bundleWriter struct {
	l          *ledger.Ledger
	o          ExportOptions
	m          manifest
	created    time.Time
	checkpoint string
	sel        *selection
	zip        *zip.Writer
	dir        string // what is put aside
	report     *report.Report
	policies   map[string]bool // names of files under policies/
	maskings   maskings
	leaves     tileLeaves
}

// begin reads the checkpoint and finds what the bundle holds.
func (b *bundleWriter) begin(ctx context.Context) error {
	text, _, _ := strings.Cut(b.checkpoint, "\n\n")
	c, err := torchwood.ParseCheckpoint(text + "\n")
	if err != nil {
		return fmt.Errorf("the checkpoint: %w", err)
	}
	if b.o.Index >= c.N {
		return fmt.Errorf("no checkpoint covers entry %d yet", b.o.Index)
	}
	if b.o.Since < 0 || b.o.Since > c.N {
		return fmt.Errorf("%w: since %d, the log has %d entries", ledger.ErrQuery, b.o.Since, c.N)
	}
	b.m = manifest{
		Format: bundleFormat, Derivation: derivationNow, Origin: c.Origin, Size: c.N, Root: c.Hash.String(), Since: b.o.Since, Filters: b.o.Filters,
		Complete: !filtered(b.o.Query), Files: map[string]manifestFile{},
	}
	b.m.Window.From, b.m.Window.To, b.m.Counts.Types = b.o.From, b.o.To, map[store.Type]int64{}
	if b.m.Filters == nil {
		b.m.Filters = map[string]string{}
	}
	if b.sel, err = newSelection(ctx, b.l, b.o.Query, b.o.From, b.o.To, c.N); err != nil {
		return err
	}
	from, to := b.o.From, b.o.To
	if b.sel.filtered { // the time is that of the entries which are there
		from, to = 0, 0
		if n := len(b.sel.picked); n > 0 {
			from, to = b.sel.picked[0], b.sel.picked[n-1]+1
		}
	}
	for _, i := range []int64{b.o.Index, from, to - 1} {
		if i != b.o.Index && from >= to {
			continue
		}
		for s, err := range b.l.Entries(ctx, i, i+1) {
			if err != nil {
				return err
			}
			e, err := store.ParseLeaf(s.Leaf)
			if err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
			if i == b.o.Index {
				b.created, b.m.Created = e.Time.Time, e.Time.String()
				b.m.Export.Index, b.m.Export.ID = i, e.ID
			}
			if i == from {
				b.m.Window.FromTime = e.Time.String()
			}
			if i == to-1 {
				b.m.Window.ToTime = e.Time.String()
			}
		}
	}
	b.leaves.size = c.N
	return b.sel.around(ctx, b.o.Index)
}

// memberWriter is a file of the bundle that is being written.
type memberWriter struct {
	b    *bundleWriter
	name string
	zip  io.Writer
	sum  hash.Hash
	n    int64
}

// create begins the next member.
func (b *bundleWriter) create(name string, method uint16) (*memberWriter, error) {
	w, err := b.zip.CreateHeader(&zip.FileHeader{Name: name, Method: method, Modified: b.created})
	return &memberWriter{b: b, name: name, zip: w, sum: sha256.New()}, err
}

func (m *memberWriter) Write(p []byte) (int, error) {
	m.sum.Write(p)
	m.n += int64(len(p))
	return m.zip.Write(p)
}

// close puts the member's digest in the manifest.
func (m *memberWriter) close() {
	m.b.m.Files[m.name] = manifestFile{hex.EncodeToString(m.sum.Sum(nil)), m.n}
}

// put writes a member that is in memory.
func (b *bundleWriter) put(name string, method uint16, content []byte) error {
	m, err := b.create(name, method)
	if err != nil {
		return err
	}
	_, err = m.Write(content)
	m.close()
	return err
}

// aside is a file that waits for its turn. It may hold texts that were sealed.
type aside struct {
	*bufio.Writer
	f *os.File
}

func (b *bundleWriter) aside(name string) (*aside, error) {
	f, err := os.OpenFile(filepath.Join(b.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	return &aside{bufio.NewWriterSize(f, 64<<10), f}, err
}

// putAside writes what was put aside as the next member.
func (b *bundleWriter) putAside(ctx context.Context, name string) error {
	m, err := b.create(name, zip.Deflate)
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(b.dir, filepath.Base(name)))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{m}, contextReader{ctx, f}, make([]byte, 256<<10)); err != nil {
		return err
	}
	m.close()
	return nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// entries writes checkpoint and entries.jsonl, in one pass over selection and
// context, and puts aside what follows from them.
func (b *bundleWriter) entries(ctx context.Context) (err error) {
	if err := b.put(memberCheckpoint, zip.Deflate, []byte(b.checkpoint)); err != nil {
		return err
	}
	lines, err := b.create(memberEntries, zip.Deflate)
	if err != nil {
		return err
	}
	files := map[string]*aside{}
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Flush(), f.f.Close())
		}
	}()
	for _, name := range []string{memberEntriesIndex, memberContext, memberContextIndex, memberSealed, memberSteps, memberApprovals, memberUses} {
		if files[name], err = b.aside(name); err != nil {
			return err
		}
	}
	tables := NewTables(files[memberSteps], files[memberApprovals], files[memberUses])
	enc := jsontext.NewEncoder(files[memberSealed])
	out := bufio.NewWriterSize(lines, 256<<10)
	counts := &b.m.Counts
	done, of := int64(0), b.sel.count()
	b.o.progress(0, of)
	for it, err := range b.sel.items(ctx) {
		if err != nil {
			return err
		}
		if bytes.IndexByte(it.Leaf, '\n') >= 0 {
			return fmt.Errorf("%w: entry %d: a leaf holds a line break", ledger.ErrMismatch, it.Index)
		}
		to, index := out, files[memberEntriesIndex]
		if it.window {
			counts.Entries++
			counts.Types[it.Entry.Type]++
		} else {
			counts.Context++
			to, index = files[memberContext].Writer, files[memberContextIndex]
		}
		if _, err := to.Write(it.Leaf); err != nil {
			return err
		}
		if err := to.WriteByte('\n'); err != nil {
			return err
		}
		if !it.window || b.sel.filtered {
			if _, err := index.WriteString(strconv.FormatInt(it.Index, 10) + "\n"); err != nil {
				return err
			}
		}
		for _, field := range slices.Sorted(maps.Keys(it.Sealed)) {
			o := it.Sealed[field]
			counts.Sealed++
			if err := json.MarshalEncode(enc, &sealedLine{it.Index, field, o.Salt, o.Text}); err != nil {
				return err
			}
		}
		b.leaves.add(it.Index, it.window)
		opened := it.opened()
		if it.Entry.Type == store.PolicyLoaded {
			if err := b.policy(opened); err != nil {
				return err
			}
		}
		if err := b.maskings.take(it.Entry, it.window, func(name string, text []byte) error {
			return os.WriteFile(filepath.Join(b.dir, name+".json"), text, 0o600)
		}); err != nil {
			return err
		}
		if err := tables.Take(it.Index, it.Entry, opened, it.window); err != nil {
			return err
		}
		if err := b.report.Take(it.Index, it.Entry, opened, it.window); err != nil {
			return fmt.Errorf("entry %d: %w", it.Index, err)
		}
		if it.window {
			if done++; done%pageSize == 0 {
				b.o.progress(done, of)
			}
		}
	}
	if err := errors.Join(out.Flush(), tables.Close()); err != nil {
		return err
	}
	lines.close()
	counts.Steps, counts.Approvals, counts.Uses = tables.Rows()
	b.o.progress(done, of)
	return nil
}

// policy puts aside the texts of a policy.loaded, each once.
func (b *bundleWriter) policy(opened map[string]string) error {
	for field, suffix := range map[string]string{store.SealedCatalogue: ".yaml", store.SealedPolicy: ".rego"} {
		text, ok := opened[field]
		if !ok {
			continue
		}
		sum := sha256.Sum256([]byte(text))
		name := hex.EncodeToString(sum[:]) + suffix
		if b.policies[name] {
			continue
		}
		b.policies[name] = true
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// context writes what was put aside about the entries themselves.
func (b *bundleWriter) context(ctx context.Context) error {
	names := []string{memberContext, memberContextIndex, memberSealed}
	if b.sel.filtered {
		names = append([]string{memberEntriesIndex}, names...)
	}
	for _, name := range names {
		if err := b.putAside(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// tileLeaves finds the tiles of level 0 that a bundle must hold: those that the
// window's leaves do not make up whole, of what the bundle speaks of.
type tileLeaves struct {
	size  int64 // of the tree
	tile  int64 // the one that counts now
	count int64 // the window's leaves in it
	any   bool  // an entry of it was seen
	need  []int64
	whole []int64
}

// add takes the index of an entry, ascending.
func (t *tileLeaves) add(index int64, window bool) {
	if n := index / torchwood.TileWidth; n != t.tile {
		t.flush()
		t.tile = n
	}
	t.any = true
	if window {
		t.count++
	}
}

func (t *tileLeaves) flush() {
	if t.any {
		if t.count == min(torchwood.TileWidth, t.size-t.tile*torchwood.TileWidth) {
			t.whole = append(t.whole, t.tile)
		} else {
			t.need = append(t.need, t.tile)
		}
	}
	t.count, t.any = 0, false
}

// list is the tiles that are needed, those of also among them where the leaves
// do not make them up.
func (t *tileLeaves) list(also ...int64) []int64 {
	t.flush()
	for _, n := range also {
		if _, whole := slices.BinarySearch(t.whole, n); !whole && n*torchwood.TileWidth < t.size {
			t.need = append(t.need, n)
		}
	}
	slices.Sort(t.need)
	return slices.Compact(t.need)
}

// tiles writes the tree: of level 0 what the leaves do not tell, and all tiles
// of the levels above it.
func (b *bundleWriter) tiles(ctx context.Context) error {
	also := []int64{(b.m.Size - 1) / torchwood.TileWidth}
	if b.o.Since > 0 {
		also = append(also, b.o.Since/torchwood.TileWidth)
	}
	hashes := b.l.Hashes(ctx)
	for _, n := range b.leaves.list(also...) {
		if err := b.tile(hashes, 0, n); err != nil {
			return err
		}
	}
	for level := 1; b.m.Size>>(torchwood.TileHeight*level) > 0; level++ {
		for n := int64(0); n*torchwood.TileWidth < b.m.Size>>(torchwood.TileHeight*level); n++ {
			if err := b.tile(hashes, level, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// tile writes one tile, as wide as the tree has it.
func (b *bundleWriter) tile(hashes tlog.HashReader, level int, n int64) error {
	have := b.m.Size >> (torchwood.TileHeight * level)
	t := tlog.Tile{H: torchwood.TileHeight, L: level, N: n, W: int(min(torchwood.TileWidth, have-n*torchwood.TileWidth))}
	indexes := make([]int64, t.W)
	for i := range indexes {
		indexes[i] = tlog.StoredHashIndex(torchwood.TileHeight*level, n*torchwood.TileWidth+int64(i))
	}
	hs, err := hashes.ReadHashes(indexes)
	if err != nil {
		return err
	}
	content := make([]byte, 0, len(hs)*tlog.HashSize)
	for _, h := range hs {
		content = append(content, h[:]...)
	}
	return b.put(tileName(t), zip.Store, content)
}

// derived writes the tables, the policies, and which masking was in force.
func (b *bundleWriter) derived(ctx context.Context) error {
	names := []string{memberSteps, memberApprovals, memberUses}
	for _, name := range slices.Sorted(maps.Keys(b.policies)) {
		names = append(names, "policies/"+name)
	}
	for _, name := range b.maskings.files() {
		names = append(names, "masking/"+name+".json")
	}
	for _, name := range names {
		if err := b.putAside(ctx, name); err != nil {
			return err
		}
	}
	return b.put(memberMasking, zip.Deflate, b.maskings.index())
}

// rest writes the report, how to verify, and the manifest.
func (b *bundleWriter) rest(context.Context) error {
	page, err := b.create(memberReport, zip.Deflate)
	if err != nil {
		return err
	}
	if err := b.report.Write(page, reportMeta(&b.m, b.checkpoint)); err != nil {
		return err
	}
	page.close()
	if err := b.put(memberVerify, zip.Deflate, []byte(verifyText)); err != nil {
		return err
	}
	manifest, err := json.Marshal(&b.m, json.Deterministic(true), jsontext.Multiline(true), jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	return b.put(memberManifest, zip.Deflate, append(manifest, '\n'))
}
