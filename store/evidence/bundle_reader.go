package evidence

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"filippo.io/torchwood"
	"github.com/go-json-experiment/json"
	"github.com/klauspost/compress/flate"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
)

// The members of a bundle that are no tiles, policies or masking rules, in the
// order in which they stand in the zip; see rank.
const (
	memberCheckpoint   = "checkpoint"
	memberEntries      = "entries.jsonl"
	memberEntriesIndex = "entries.index"
	memberContext      = "context.jsonl"
	memberContextIndex = "context.index"
	memberSealed       = "sealed.jsonl"
	memberSteps        = "steps.csv"
	memberApprovals    = "approvals.csv"
	memberUses         = "uses.csv"
	memberReport       = "REPORT.html"
	memberVerify       = "VERIFY.md"
	memberManifest     = "manifest.json"
	memberMasking      = "masking/index.json"
)

// bundleFormat is the format that this program reads.
const bundleFormat = "countersign-bundle/1"

// Limits on a bundle, which may be anybody's.
const (
	maxDirectory = 64 << 20 // bytes read to find the zip's members
	maxManifest  = 64 << 20 // some 400,000 members
	maxSmall     = 4 << 20  // a member that is read whole: catalogue, policy, VERIFY.md
	maxTexts     = 16 << 20 // the openings of one entry
	maxRatio     = 500      // of a member's size to what it takes in the zip, past 1 MiB; the record itself is under 50
)

// manifest is manifest.json.
type manifest struct {
	Format string `json:"format"`
	// Derivation is which tables and report were derived; see derivationNow.
	Derivation int `json:"derivation"`

	Origin  string `json:"origin"`
	Created string `json:"created"`
	Export  struct {
		Index int64  `json:"index"`
		ID    string `json:"id"`
	} `json:"export"`
	Window struct {
		From     int64  `json:"from"`
		To       int64  `json:"to"`
		FromTime string `json:"from_time"`
		ToTime   string `json:"to_time"`
	} `json:"window"`
	Filters  map[string]string `json:"filters"`
	Complete bool              `json:"complete"`
	Since    int64             `json:"since,omitzero"`
	Size     int64             `json:"size"`
	Root     string            `json:"root"`
	Counts   struct {
		Entries   int64                `json:"entries"`
		Context   int64                `json:"context"`
		Sealed    int64                `json:"sealed"`
		Types     map[store.Type]int64 `json:"types"`
		Steps     int64                `json:"steps"`
		Approvals int64                `json:"approvals"`
		Uses      int64                `json:"uses"`
	} `json:"counts"`
	Files map[string]manifestFile `json:"files"`
}

type manifestFile struct {
	SHA256 string `json:"sha256"` // hex
	Bytes  int64  `json:"bytes"`
}

// bundle is a zip that somebody handed over. What it says of itself is
// believed nowhere.
type bundle struct {
	r       *Report
	f       io.Closer
	members map[string]*zip.File // those that can be read at all
	names   []string             // the same, in the zip's order
	m       manifest
}

// budget lets only so many bytes be read, so that a directory of members without
// end is an error and not a lack of memory.
type budget struct {
	io.ReaderAt
	left atomic.Int64 // members are read side by side
}

func (b *budget) ReadAt(p []byte, off int64) (int, error) {
	if b.left.Add(-int64(len(p))) < 0 {
		return 0, errors.New("its directory is too long")
	}
	return b.ReaderAt.ReadAt(p, off)
}

// openBundle opens the zip at path and finds its members. What is wrong with it
// is a finding in r; nil and no error say that it is no zip at all.
func openBundle(path string, r *Report) (*bundle, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnchecked, err)
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%w: %s is not a file", ErrUnchecked, path)
	}
	b := newBundle(f, info.Size(), r)
	if b == nil {
		f.Close()
		return nil, nil
	}
	b.f = f
	return b, nil
}

func newBundle(at io.ReaderAt, size int64, r *Report) *bundle {
	limit := &budget{ReaderAt: at}
	limit.left.Store(maxDirectory)
	z, err := zip.NewReader(limit, size)
	if err != nil {
		r.add(NoIndex, KindMember, "it is not a whole zip: %v", err)
		return nil
	}
	limit.left.Store(1<<63 - 1) // the directory is read
	z.RegisterDecompressor(zip.Deflate, flate.NewReader)
	b := &bundle{r: r, members: map[string]*zip.File{}}
	if z.Comment != "" {
		r.add(NoIndex, KindMember, "the zip has a comment, and a bundle has none")
	}
	b.packed(at, z.File)
	last, end, unordered := -1, int64(0), false
	for _, f := range z.File {
		n := rank(f.Name)
		start, err := f.DataOffset()
		switch {
		case n < 0:
			r.add(NoIndex, KindMember, "%.200q is no member of a bundle", f.Name)
			continue
		case b.members[f.Name] != nil:
			r.add(NoIndex, KindMember, "%s is there twice", f.Name)
			continue
		case !f.Mode().IsRegular() || f.Flags&1 != 0:
			r.add(NoIndex, KindMember, "%s is no plain file", f.Name)
			continue
		case f.Method != zip.Deflate && f.Method != zip.Store:
			r.add(NoIndex, KindMember, "%s is compressed by method %d, and a bundle's members are deflated or stored", f.Name, f.Method)
			continue
		case f.UncompressedSize64 >= 1<<62 || f.UncompressedSize64 > 1<<20 && f.UncompressedSize64/maxRatio > f.CompressedSize64:
			r.add(NoIndex, KindMember, "%s would grow from %d bytes to %d: no record does", f.Name, f.CompressedSize64, f.UncompressedSize64)
			continue
		case err != nil || start < end || f.CompressedSize64 > uint64(size):
			r.add(NoIndex, KindMember, "%s does not lie where the zip's directory says, or over another member", f.Name)
			continue
		}
		end = start + int64(f.CompressedSize64)
		if n < last && !unordered {
			unordered = true
			r.add(NoIndex, KindMember, "%s is out of order", f.Name)
		}
		last = max(last, n)
		b.members[f.Name] = f
		b.names = append(b.names, f.Name)
	}
	return b
}

// Of the zip format (PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.3.9, 4.3.12, 4.6.9).
const (
	localHeader  = 30
	localMagic   = "PK\x03\x04"
	entryMagic   = "PK\x01\x02" // of the directory
	descriptor   = "PK\x07\x08"
	unicodeName  = 0x7075 // an extra field that renames a member
	hasDescriber = 1 << 3 // a flag: sizes follow the data
)

// packed checks that the members lie one behind the other, from the first byte to
// the directory, each under a header that says what the directory says. Between
// them a file could lie that this program does not see, and that a program which
// reads a zip from its beginning shows as the bundle's.
func (b *bundle) packed(at io.ReaderAt, files []*zip.File) {
	next := int64(0)
	bytesAt := func(off int64, n int) string {
		raw := make([]byte, n)
		if _, err := at.ReadAt(raw, off); err != nil {
			return ""
		}
		return string(raw)
	}
	for _, f := range files {
		start, err := f.DataOffset()
		h := bytesAt(next, localHeader)
		word := func(i int) int { return int(h[i]) | int(h[i+1])<<8 }
		ok := err == nil && strings.HasPrefix(h, localMagic) && f.CompressedSize64 < 1<<62 &&
			word(6) == int(f.Flags) && word(8) == int(f.Method) && word(26) == len(f.Name) && start == next+localHeader+int64(word(26)+word(28))
		if ok {
			rest := bytesAt(next+localHeader, word(26)+word(28))
			ok = strings.HasPrefix(rest, f.Name) && !renames(rest[min(word(26), len(rest)):]) && !renames(string(f.Extra))
		}
		if !ok {
			b.r.add(NoIndex, KindMember, "%.200q does not lie where it must, behind the member before it, or its header is of another file than the zip's directory says", f.Name)
			return
		}
		next = start + int64(f.CompressedSize64)
		if f.Flags&hasDescriber == 0 {
			continue
		}
		if bytesAt(next, len(descriptor)) != descriptor {
			b.r.add(NoIndex, KindMember, "%.200q does not end where the zip's directory says", f.Name)
			return
		}
		if next += 16; f.CompressedSize64 >= 1<<32-1 || f.UncompressedSize64 >= 1<<32-1 {
			next += 8 // zip64
		}
	}
	if bytesAt(next, len(entryMagic)) != entryMagic {
		b.r.add(NoIndex, KindMember, "something lies between the last member and the zip's directory")
	}
}

// renames reports whether extra fields give a member another name, or are none.
func renames(extra string) bool {
	for len(extra) > 0 {
		if len(extra) < 4 {
			return true
		}
		id, n := int(extra[0])|int(extra[1])<<8, int(extra[2])|int(extra[3])<<8
		if id == unicodeName || 4+n > len(extra) {
			return true
		}
		extra = extra[4+n:]
	}
	return false
}

var (
	policyName  = regexp.MustCompile(`\Apolicies/[0-9a-f]{64}\.(yaml|rego)\z`)
	maskingName = regexp.MustCompile(`\Amasking/([0-9a-f]{64}\.json|index\.json)\z`)
)

// rank says where in the zip a member of that name stands; -1 for a name that no
// member has. Only names that are known pass, so that none leads out of the
// directory into which somebody unpacks the bundle.
func rank(name string) int {
	switch name {
	case memberCheckpoint:
		return 0
	case memberEntries:
		return 1
	case memberEntriesIndex:
		return 2
	case memberContext:
		return 3
	case memberContextIndex:
		return 4
	case memberSealed:
		return 5
	case memberSteps:
		return 7
	case memberApprovals:
		return 8
	case memberUses:
		return 9
	case memberReport:
		return 12
	case memberVerify:
		return 13
	case memberManifest:
		return 14
	}
	switch _, tile := tileOf(name); {
	case tile:
		return 6
	case policyName.MatchString(name):
		return 10
	case maskingName.MatchString(name):
		return 11
	}
	return -1
}

// tileOf reads the name of a hash tile.
func tileOf(name string) (tlog.Tile, bool) {
	rest, ok := strings.CutPrefix(name, "tiles/")
	if !ok {
		return tlog.Tile{}, false
	}
	t, err := torchwood.ParseTilePath("tile/" + rest)
	return t, err == nil && t.L >= 0 && t.L <= 6 && t.N >= 0
}

// tileName is the member that holds t.
func tileName(t tlog.Tile) string {
	return "tiles/" + strings.TrimPrefix(torchwood.TilePath(t), "tile/")
}

// readManifest reads manifest.json and compares the names and sizes in it with
// the members. Without a manifest that can be read it returns false.
func (b *bundle) readManifest() bool {
	f := b.members[memberManifest]
	if f == nil {
		b.r.add(NoIndex, KindMember, "manifest.json is missing")
		return false
	}
	raw, err := readAll(f, maxManifest)
	if err == nil {
		err = json.Unmarshal(raw, &b.m, json.RejectUnknownMembers(true))
	}
	switch {
	case err != nil:
		b.r.add(NoIndex, KindManifest, "manifest.json: %v", err)
		return false
	case b.m.Format != bundleFormat:
		b.r.add(NoIndex, KindManifest, "the bundle is of format %.100q, this program reads %s", b.m.Format, bundleFormat)
		return false
	}
	for _, name := range b.names {
		if _, ok := b.m.Files[name]; !ok && name != memberManifest {
			b.r.add(NoIndex, KindMember, "%s is not in the manifest", name)
		}
	}
	names := make([]string, 0, len(b.m.Files))
	for name := range b.m.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if b.members[name] == nil {
			b.r.add(NoIndex, KindMember, "%.200q is in the manifest, and missing", name)
		}
	}
	due := []string{memberCheckpoint, memberEntries, memberContext, memberContextIndex, memberSealed, memberSteps, memberApprovals, memberUses, memberMasking, memberReport, memberVerify}
	if len(b.m.Filters) > 0 {
		due = append(due, memberEntriesIndex)
	} else if b.members[memberEntriesIndex] != nil {
		b.r.add(NoIndex, KindMember, "entries.index is there, and the bundle names no filter")
	}
	for _, name := range due {
		if _, ok := b.m.Files[name]; !ok && b.members[name] == nil {
			b.r.add(NoIndex, KindMember, "%s is missing", name)
		}
	}
	return true
}

func readAll(f *zip.File, limit int64) ([]byte, error) {
	rc, err := f.Open()
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("longer than %d bytes", limit)
	}
	return raw, err
}

// member is one member of a bundle while it is read: its digest and size are
// those that close compares with the manifest.
type member struct {
	b     *bundle
	name  string
	rc    io.ReadCloser // nil where there is none
	sum   hash.Hash
	n     int64
	limit int64
	err   error
}

// open opens a member. One that is missing, which is a finding already, reads as
// empty.
func (b *bundle) open(name string) *member {
	m := &member{b: b, name: name, sum: sha256.New()}
	f := b.members[name]
	if f == nil {
		return m
	}
	m.limit = int64(f.UncompressedSize64) // which maxRatio bounds
	m.rc, m.err = f.Open()
	return m
}

var errLonger = errors.New("it is longer than the zip's directory says")

// Read implements io.Reader. It reads no more than the zip's directory says there
// is.
func (m *member) Read(p []byte) (int, error) {
	if m.err != nil {
		return 0, m.err
	}
	if m.rc == nil {
		return 0, io.EOF
	}
	n, err := m.rc.Read(p)
	m.n += int64(n)
	if m.n > m.limit {
		m.err = errLonger
		return 0, m.err
	}
	m.sum.Write(p[:n])
	if err != nil {
		m.err = err
	}
	return n, err
}

// close reads what is left, and compares digest and size with the manifest.
func (m *member) close() {
	if m.rc == nil {
		if m.err != nil {
			m.b.r.add(NoIndex, KindDigest, "%s cannot be read: %v", m.name, m.err)
		}
		return
	}
	defer m.rc.Close()
	if m.err == nil {
		io.Copy(io.Discard, onlyReader{m}) // its error is m.err
	}
	want, listed := m.b.m.Files[m.name]
	switch {
	case !listed: // a finding already
	case m.err != nil && m.err != io.EOF:
		m.b.r.add(NoIndex, KindDigest, "%s cannot be read: %v", m.name, m.err)
	case m.n != want.Bytes:
		m.b.r.add(NoIndex, KindDigest, "%s has %d bytes, the manifest says %d", m.name, m.n, want.Bytes)
	case hex.EncodeToString(m.sum.Sum(nil)) != want.SHA256:
		m.b.r.add(NoIndex, KindDigest, "%s is not the file of the manifest: its SHA-256 is another", m.name)
	}
}

// onlyReader hides everything but Read from io.Copy.
type onlyReader struct{ io.Reader }

// small reads a whole member of at most limit bytes, and checks its digest.
func (b *bundle) small(name string, limit int64) []byte {
	m := b.open(name)
	defer m.close()
	raw, err := io.ReadAll(io.LimitReader(m, limit))
	if err == nil && int64(len(raw)) == limit {
		b.r.add(NoIndex, KindMember, "%s is longer than %d bytes", name, limit)
	}
	return raw
}

// lines reads a member line by line.
type lines struct {
	m    *member
	most int    // bytes of a line
	buf  []byte // read and not returned
	end  bool
	n    int64 // lines returned
	bad  string
}

const lineBlock = 256 << 10

func (b *bundle) lines(name string, most int) *lines {
	return &lines{m: b.open(name), most: most}
}

// next returns the next line without its newline; nil at the end, or where what
// follows is no line.
func (l *lines) next() []byte {
	for {
		if i := bytes.IndexByte(l.buf, '\n'); i >= 0 && i <= l.most && l.bad == "" {
			line := l.buf[:i:i]
			l.buf = l.buf[i+1:]
			l.n++
			return line
		}
		switch {
		case l.bad != "" || l.end && len(l.buf) == 0:
			return nil
		case l.end:
			l.bad = "its last line has no end"
			return nil
		case len(l.buf) > l.most:
			l.bad = fmt.Sprintf("line %d is longer than %d bytes", l.n+1, l.most)
			return nil
		}
		l.fill()
	}
}

// fill reads another block behind what is left of the last one.
func (l *lines) fill() {
	block := make([]byte, len(l.buf), max(lineBlock, 2*len(l.buf)))
	copy(block, l.buf)
	for len(block) < cap(block) {
		n, err := l.m.Read(block[len(block):cap(block)])
		block = block[:len(block)+n]
		if err != nil {
			l.end = true
			break
		}
	}
	l.buf = block
}

// close ends the reading, and says where a line was none.
func (l *lines) close() {
	if l.bad != "" {
		l.m.b.r.add(NoIndex, KindMember, "%s: %s", l.m.name, l.bad)
	}
	l.m.close()
}

// indexes reads a member of indexes, one a line, ascending.
type indexes struct {
	*lines
	last int64
}

func (b *bundle) indexes(name string) *indexes { return &indexes{b.lines(name, 20), -1} }

// next returns the next index, -1 at the end.
func (x *indexes) next() int64 {
	line := x.lines.next()
	if line == nil {
		return -1
	}
	n, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil || n <= x.last || strconv.FormatInt(n, 10) != string(line) {
		x.bad, x.buf, x.end = fmt.Sprintf("line %d is no index after %d", x.n, x.last), nil, true
		return -1
	}
	x.last = n
	return n
}
