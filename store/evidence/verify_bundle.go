package evidence

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence/report"
)

// maxCheckpoint is the largest checkpoint read, in bytes.
const maxCheckpoint = 64 << 10

// VerifyBundle checks the bundle at path: that its members are those of its
// manifest; that the checkpoint is signed by the log's key and cosigned by the
// witnesses asked for; that tiles and entries give the signed root; that the
// window has no gap, or that each entry matches the filters; that every text
// opens its commitment, and that those missing were lawfully erased; the sense of
// the story, as Verify does; and that tables and report are what the entries
// give. A bundle that is wrong is a report with findings; an error (wrapping
// ErrUnchecked) says that no verdict was reached. It needs no network and writes
// nothing.
//
// Memory: the state of open requests, and some 100 bytes for each entry.
func VerifyBundle(ctx context.Context, path string, o Options) (*Report, error) {
	if o.Log == nil {
		return nil, fmt.Errorf("%w: no log key given", ErrUnchecked)
	}
	r := &Report{Origin: o.Log.Origin(), Findings: []Finding{}}
	b, err := openBundle(path, r)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return r.done(), nil
	}
	defer b.f.Close()
	return verifyBundle(ctx, b, r, &o)
}

func verifyBundle(ctx context.Context, b *bundle, r *Report, o *Options) (*Report, error) {
	witnesses, err := newWitnesses(o.Witness)
	if err != nil {
		return nil, err
	}
	if !b.readManifest() {
		return r.done(), nil
	}
	m := &b.m
	r.Bundle = &Contents{From: m.Window.From, To: m.Window.To, Complete: m.Complete, Filters: m.Filters, Files: len(m.Files)}
	head, ok := r.head(string(b.small(memberCheckpoint, maxCheckpoint)), o, witnesses)
	if !ok {
		return r.done(), nil
	}
	b.compareManifest(head.N)
	since := r.since(o, head)
	whole := m.Complete && m.Window.From == 0 // what follows the window is judged by all that lies in it
	j, err := newJudge(r, o, whole, true)
	if err != nil {
		return nil, err
	}
	j.from = m.Window.From
	exported := false
	j.export = func(index int64, e *store.Entry) {
		if index == m.Export.Index {
			exported = true
			b.compareExport(index, e)
		}
	}
	p := &pipeline{b: b, o: o, size: head.N, judge: j, tree: newTree(b, head.N, head.Hash), earlier: &follow{r: r, common: o.Common}}
	p.tree.since = since.N
	d := newDerivation(b)
	if err := p.run(ctx, d); err != nil {
		return nil, err
	}
	j.finish()
	if !exported {
		r.add(m.Export.Index, KindExport, "it is to be the export of this bundle, and no such export.created is here")
	}
	if p.tree.finish() && since.N > 0 {
		if root, err := p.tree.at(since.N); err != nil {
			r.Unchecked = append(r.Unchecked, fmt.Sprintf("that the log continues the earlier checkpoint of size %d: the bundle does not hold the hashes for it; export again with --since and that checkpoint", since.N))
		} else {
			r.continues(since, root)
		}
	}
	d.finish()
	p.counts(d)
	p.edges()
	b.policies(d.policies)
	b.masking(&d.maskings)
	b.rest()
	return r.done(), nil
}

// compareManifest compares what the manifest says of the log and the window with
// the checkpoint and with itself.
func (b *bundle) compareManifest(size int64) {
	r, m := b.r, &b.m
	wrong := func(format string, a ...any) { r.add(NoIndex, KindManifest, "manifest.json: "+format, a...) }
	if m.Origin != r.Origin {
		wrong("it is of log %.200q, the key is of %s", m.Origin, r.Origin)
	}
	if m.Size != r.Size || m.Root != r.Root {
		wrong("the tree has size %d and root %.100s, the checkpoint says %d and %s", m.Size, m.Root, r.Size, r.Root)
	}
	if m.Complete != (len(m.Filters) == 0) {
		wrong("complete is %t, and there are %d filters: only what is not filtered is complete", m.Complete, len(m.Filters))
	}
	if w := m.Window; w.From < 0 || w.To < w.From || w.To > size {
		wrong("the window from %d to %d lies outside a log of %d entries", w.From, w.To, size)
	}
	if m.Since < 0 || m.Since > size {
		wrong("since is %d in a log of %d entries", m.Since, size)
	}
}

// compareExport compares the manifest with the entry that put the export on
// record.
func (b *bundle) compareExport(index int64, e *store.Entry) {
	m := &b.m
	d, err := store.DetailsAs[store.ExportDetails](e)
	wrong := func(format string, a ...any) { b.r.add(index, KindExport, format, a...) }
	switch {
	case err != nil:
		wrong("%v", err)
	case e.ID != m.Export.ID:
		wrong("its ID is %s, the manifest names %.100s", e.ID, m.Export.ID)
	case d.Format != "bundle":
		wrong("it is on record as an export of format %.100s", d.Format)
	case d.From != m.Window.From || d.To != m.Window.To:
		wrong("it is on record as entries %d to %d, the manifest has %d to %d", d.From, d.To, m.Window.From, m.Window.To)
	case !maps.Equal(d.Filters, m.Filters) && len(d.Filters)+len(m.Filters) > 0:
		wrong("it is on record with other filters than the manifest's")
	case m.Created != e.Time.String():
		wrong("it is on record at %s, the manifest says %.100s", e.Time, m.Created)
	}
}

// stream reads entries with their indexes.
type stream struct {
	*lines
	at    *indexes // nil: they follow each other
	index int64    // of line
	line  []byte
}

func (b *bundle) window() *stream {
	s := &stream{lines: b.lines(memberEntries, store.MaxEntry), index: b.m.Window.From - 1}
	if len(b.m.Filters) > 0 {
		s.at = b.indexes(memberEntriesIndex)
	}
	return s
}

func (b *bundle) around() *stream {
	return &stream{lines: b.lines(memberContext, store.MaxEntry), at: b.indexes(memberContextIndex), index: -1}
}

// next moves to the next entry, false at the end.
func (s *stream) next() bool {
	s.line = s.lines.next()
	if s.at == nil {
		s.index++
		return s.line != nil
	}
	n := s.at.next()
	if n >= 0 {
		s.index = n
	}
	if (s.line == nil) != (n < 0) && s.bad == "" && s.at.bad == "" {
		s.bad = fmt.Sprintf("it has %d lines, and its index %d", s.n, s.at.n)
	}
	return s.line != nil && n >= 0
}

func (s *stream) close() {
	s.lines.close()
	if s.at != nil {
		s.at.close()
	}
}

// piece is one entry on its way through the pipeline.
type piece struct {
	index  int64
	leaf   []byte
	window bool
	sealed [][]byte // its lines of sealed.jsonl

	hash   tlog.Hash
	entry  *store.Entry // nil: it does not parse
	opened map[string]string
}

// batch is what one goroutine parses at a time.
type batch struct {
	pieces []piece
	bytes  int
	parsed chan struct{}
}

const (
	batchPieces = 256
	batchBytes  = 4 << 20
)

// pipeline reads a bundle's entries once: one goroutine reads and merges, as many
// as there are processors parse and hash, one judges in order, one derives the
// tables.
type pipeline struct {
	b       *bundle
	o       *Options
	size    int64
	judge   *judge
	tree    *tree
	earlier *follow

	entries, context, sealed int64
	types                    map[store.Type]int64
}

func (p *pipeline) run(ctx context.Context, d *derivation) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	work, order, derive := make(chan *batch, 8), make(chan *batch, 16), make(chan *batch, 16)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(work)
		defer close(order)
		p.read(ctx, func(b *batch) bool {
			b.parsed = make(chan struct{})
			for _, c := range []chan *batch{work, order} {
				select {
				case c <- b:
				case <-ctx.Done():
					return false
				}
			}
			return true
		})
	})
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for b := range work {
				for i := range b.pieces {
					p.parse(&b.pieces[i])
				}
				close(b.parsed)
			}
		})
	}
	wg.Go(func() {
		for b := range derive {
			for i := range b.pieces {
				d.take(&b.pieces[i])
			}
		}
	})
	p.types = map[store.Type]int64{}
	done := int64(0)
	for b := range order {
		select {
		case <-b.parsed:
		case <-ctx.Done():
			continue // its parts are not read any more
		}
		for i := range b.pieces {
			p.take(&b.pieces[i])
		}
		done += int64(len(b.pieces))
		if p.o.Progress != nil {
			p.o.Progress(min(done, p.b.m.Counts.Entries), p.b.m.Counts.Entries)
		}
		derive <- b
	}
	close(derive)
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %v", ErrUnchecked, err)
	}
	return nil
}

// read merges window, context and texts by index.
func (p *pipeline) read(ctx context.Context, send func(*batch) bool) {
	b := p.b
	window, around, texts := b.window(), b.around(), &texts{lines: b.lines(memberSealed, maxTexts)}
	defer texts.close()
	defer around.close()
	defer window.close()
	m := &b.m
	inWindow, inContext := window.next(), around.next()
	texts.next()
	next := &batch{}
	for inWindow || inContext {
		var it piece
		if inWindow && (!inContext || window.index <= around.index) {
			it = piece{index: window.index, leaf: window.line, window: true}
			if inContext && around.index == window.index {
				b.r.add(it.index, KindWindow, "it is in the window and in its context")
				inContext = around.next()
			}
			p.entries++
			if it.index < m.Window.From || it.index >= m.Window.To {
				b.r.add(it.index, KindWindow, "it lies outside the window from %d to %d", m.Window.From, m.Window.To)
			}
			inWindow = window.next()
		} else {
			it = piece{index: around.index, leaf: around.line}
			p.context++
			if len(m.Filters) == 0 && it.index >= m.Window.From && it.index < m.Window.To {
				b.r.add(it.index, KindWindow, "it is given as context, and belongs to the window")
			}
			inContext = around.next()
		}
		if it.index >= p.size {
			b.r.add(it.index, KindMissing, "the tree has %d entries", p.size)
			continue
		}
		it.sealed = texts.of(it.index)
		next.pieces = append(next.pieces, it)
		next.bytes += len(it.leaf)
		for _, s := range it.sealed {
			next.bytes += len(s)
		}
		if len(next.pieces) == batchPieces || next.bytes > batchBytes {
			if !send(next) {
				return
			}
			next = &batch{pieces: make([]piece, 0, batchPieces)}
		}
	}
	texts.of(1<<63 - 1)
	if len(next.pieces) > 0 {
		send(next)
	}
	if len(m.Filters) == 0 && p.entries != m.Window.To-m.Window.From {
		b.r.add(m.Window.From+p.entries, KindWindow, "the window has %d entries, %d were due: it is not whole", p.entries, m.Window.To-m.Window.From)
	}
}

// texts reads sealed.jsonl beside the entries.
type texts struct {
	*lines
	index int64 // of line, -1 at the end
	line  []byte
}

// next moves to the next line. Its index is read without parsing the line, which
// is for those who parse side by side; they compare it.
func (t *texts) next() {
	for {
		t.line = t.lines.next()
		if t.line == nil {
			t.index = -1
			return
		}
		rest, ok := bytes.CutPrefix(t.line, []byte(`{"index":`))
		digits, _, found := bytes.Cut(rest, []byte(","))
		n, err := strconv.ParseInt(string(digits), 10, 64)
		if ok && found && err == nil && n >= 0 {
			t.index = n
			return
		}
		t.m.b.r.add(NoIndex, KindOpening, "sealed.jsonl: line %d does not begin with its index", t.n)
	}
}

// of returns the lines of the entry index. Lines passed over belong to no entry
// of the bundle, or are out of order.
func (t *texts) of(index int64) (list [][]byte) {
	bytes := 0
	for t.index >= 0 && t.index <= index {
		switch bytes += len(t.line); {
		case t.index < index:
			t.m.b.r.add(t.index, KindOpening, "sealed.jsonl: line %d opens an entry that is not here, or is out of order", t.n)
		case bytes > maxTexts:
			t.m.b.r.add(index, KindOpening, "sealed.jsonl: its texts are longer than any entry's")
		default:
			list = append(list, t.line)
		}
		t.next()
	}
	return list
}

// parse does what needs no other entry.
func (p *pipeline) parse(it *piece) {
	r := p.b.r
	it.hash = store.LeafHash(it.leaf)
	e, err := store.ParseLeaf(it.leaf)
	if err != nil {
		r.add(it.index, KindMalformed, "%v", err)
		return
	}
	it.entry = e
	if it.window && len(p.b.m.Filters) > 0 && !matches(e, p.b.m.Filters) {
		r.add(it.index, KindWindow, "it does not match the filters of the bundle")
	}
	last := ""
	for _, line := range it.sealed {
		var s struct {
			Index int64  `json:"index"`
			Field string `json:"field"`
			Salt  string `json:"salt"`
			Text  string `json:"text"`
		}
		err := json.Unmarshal(line, &s, json.RejectUnknownMembers(true))
		salt, err2 := base64.StdEncoding.Strict().DecodeString(s.Salt) // one salt has one form
		if err = cmp.Or(err, err2); err != nil {
			r.add(it.index, KindOpening, "sealed.jsonl: %v", err)
			continue
		}
		switch commitment, ok := e.Sealed[s.Field]; {
		case s.Field <= last:
			r.add(it.index, KindOpening, "the texts of its fields are out of order, or one is there twice")
		case !ok:
			r.add(it.index, KindOpening, "a text of %.100q, to which it does not commit", s.Field)
		case !store.Opening{Salt: salt, Text: s.Text}.Opens(s.Field, commitment):
			r.add(it.index, KindOpening, "the text of %q does not open the commitment: text or salt is another", s.Field)
		default:
			if it.opened == nil {
				it.opened = make(map[string]string, len(it.sealed))
			}
			it.opened[s.Field] = s.Text
		}
		last = s.Field
	}
}

// take judges one entry in the order of the log.
func (p *pipeline) take(it *piece) {
	p.b.r.Leaves++
	p.tree.take(it.index, it.hash)
	p.earlier.compare(it.index, it.hash)
	p.sealed += int64(len(it.opened))
	if it.entry == nil {
		return
	}
	switch m := &p.b.m; {
	case it.window:
		p.types[it.entry.Type]++
		p.b.r.span(it.entry)
	case len(m.Filters) > 0:
	case it.index == m.Window.From-1:
		p.b.r.Bundle.After = it.entry.Time.String()
	case it.index == m.Window.To:
		p.b.r.Bundle.Before = it.entry.Time.String()
	}
	p.judge.take(it.index, it.leaf, it.entry, it.opened)
}

// edges checks that the entries on both sides of a whole window are here. By
// their times a reader sees which time the window is whole for.
func (p *pipeline) edges() {
	r, w := p.b.r, &p.b.m.Window
	if len(p.b.m.Filters) > 0 {
		return
	}
	if w.From > 0 && r.Bundle.After == "" {
		r.add(w.From-1, KindWindow, "the entry before the window is not here: entries at the window's beginning could be missing")
	}
	if w.To < p.size && r.Bundle.Before == "" {
		r.add(w.To, KindWindow, "the entry behind the window is not here: entries at the window's end could be missing")
	}
}

// counts compares the manifest's figures with what was read.
func (p *pipeline) counts(d *derivation) {
	c, w := &p.b.m.Counts, &p.b.m.Window
	steps, approvals, uses := d.tables.Rows()
	for _, x := range []struct {
		what      string
		said, are int64
	}{
		{"entries", c.Entries, p.entries}, {"entries of context", c.Context, p.context}, {"texts", c.Sealed, p.sealed},
		{"steps", c.Steps, steps}, {"approvals", c.Approvals, approvals}, {"uses", c.Uses, uses},
	} {
		if x.said != x.are && !(d.broken && x.what != "entries") {
			p.b.r.add(NoIndex, KindManifest, "manifest.json: it counts %d %s, there are %d", x.said, x.what, x.are)
		}
	}
	if !maps.Equal(c.Types, p.types) && len(c.Types)+len(p.types) > 0 {
		p.b.r.add(NoIndex, KindManifest, "manifest.json: it counts the types of entries otherwise than they are")
	}
	if w.FromTime != p.b.r.From || w.ToTime != p.b.r.To {
		p.b.r.add(NoIndex, KindManifest, "manifest.json: the window is from %.100s to %.100s, its entries are from %s to %s", w.FromTime, w.ToTime, p.b.r.From, p.b.r.To)
	}
	p.b.r.Bundle.Entries, p.b.r.Bundle.Context, p.b.r.Bundle.Sealed = p.entries, p.context, p.sealed
}

// derivationNow numbers what tables and report are made of entries as: raised
// by every change that makes either other bytes of the same entries, so that a
// bundle made before it is not taken for a tampered one.
const derivationNow = 3

// derivation derives tables, report and policies from the entries again.
type derivation struct {
	b        *bundle
	tables   *Tables
	report   *report.Report
	files    [3]*comparison
	policies map[string]bool // members that the record names
	maskings maskings
	broken   bool // an entry cannot be told in a table
}

func newDerivation(b *bundle) *derivation {
	d := &derivation{b: b, report: report.New(), policies: map[string]bool{}}
	for i, name := range []string{memberSteps, memberApprovals, memberUses} {
		d.files[i] = &comparison{m: b.open(name), line: 1}
	}
	d.tables = NewTables(d.files[0], d.files[1], d.files[2])
	return d
}

func (d *derivation) take(it *piece) {
	if it.entry == nil || d.broken {
		return
	}
	_ = d.maskings.take(it.entry, it.window, nil)
	err := d.tables.Take(it.index, it.entry, it.opened, it.window)
	if err == nil {
		err = d.report.Take(it.index, it.entry, it.opened, it.window)
	}
	if err != nil {
		d.b.r.add(it.index, KindMalformed, "no row can be made of it: %v", err)
		d.broken = true
		return
	}
	if it.entry.Type == store.PolicyLoaded {
		for field, ext := range map[string]string{store.SealedCatalogue: ".yaml", store.SealedPolicy: ".rego"} {
			if text, ok := it.opened[field]; ok {
				d.policies["policies/"+strings.TrimPrefix(textDigest(text), "sha256:")+ext] = true
			}
		}
	}
}

// finish compares what is left of the tables, and the report.
func (d *derivation) finish() {
	r, m := d.b.r, &d.b.m
	if m.Derivation != derivationNow {
		r.Unchecked = append(r.Unchecked, fmt.Sprintf("that tables and report say what the entries say: they are of derivation %d, this program knows %d; verify with the version that made them", m.Derivation, derivationNow))
		_ = d.tables.Close() // of which nothing is compared
		for _, c := range d.files {
			c.m.close()
		}
		return
	}
	if err := d.tables.Close(); err != nil && !d.broken {
		r.add(NoIndex, KindTable, "the tables cannot be derived: %v", err)
		d.broken = true
	}
	for _, c := range d.files {
		if !d.broken {
			c.finish(KindTable)
		}
		c.m.close()
	}
	c := &comparison{m: d.b.open(memberReport), line: 1}
	if !d.broken {
		if err := d.report.Write(c, reportMeta(m, r.Checkpoint)); err != nil {
			r.add(NoIndex, KindReport, "the report cannot be derived: %v", err)
		} else {
			c.finish(KindReport)
			r.Bundle.Derived = true
		}
	}
	c.m.close()
}

// comparison is written what a member should be, and compares it with what it
// is.
type comparison struct {
	m      *member
	buf    []byte
	line   int64
	start  []byte // of the line that is due, as much as may hold its index
	differ bool
	text   [2]string // the line that is there, and the one that is due, from where they differ
}

// Write implements io.Writer. It never fails.
func (c *comparison) Write(due []byte) (int, error) {
	for rest := due; len(rest) > 0 && !c.differ; {
		if c.buf == nil {
			c.buf = make([]byte, 64<<10)
		}
		got := c.buf[:min(len(rest), len(c.buf))]
		n := 0
		for n < len(got) {
			k, err := c.m.Read(got[n:])
			n += k
			if err != nil {
				break
			}
		}
		got = got[:n]
		same := 0
		if bytes.Equal(got, rest[:n]) {
			same = n
		} else {
			for same < n && got[same] == rest[same] {
				same++
			}
		}
		c.pass(rest[:same])
		if same < n || n == 0 || n < len(rest) && n < len(c.buf) {
			c.differ = true
			c.text = [2]string{clip(got[same:]), clip(rest[same:])}
			line, _, _ := bytes.Cut(rest[same:], []byte("\n"))
			c.begin(line)
		}
		rest = rest[same:]
	}
	return len(due), nil
}

// pass counts the lines of what is as it should be.
func (c *comparison) pass(b []byte) {
	if i := bytes.LastIndexByte(b, '\n'); i >= 0 {
		c.line += int64(bytes.Count(b, []byte("\n")))
		c.start, b = c.start[:0], b[i+1:]
	}
	c.begin(b)
}

// begin keeps the first bytes of a line.
func (c *comparison) begin(b []byte) {
	c.start = append(c.start, b[:min(len(b), lineStart-len(c.start))]...)
}

// lineStart is how much of a line is kept: it holds an index and a comma.
const lineStart = 24

// clip cuts the rest of a line for a message.
func clip(b []byte) string {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	return string(line[:min(len(line), 80)])
}

// finish says where the member is something else than it should be.
func (c *comparison) finish(kind string) {
	if c.m.rc == nil {
		return // missing, which is a finding
	}
	if !c.differ {
		var one [80]byte
		if n, _ := c.m.Read(one[:]); n > 0 {
			c.differ, c.text = true, [2]string{clip(one[:n]), ""}
			c.start = nil
		}
	}
	if !c.differ {
		return
	}
	index := NoIndex
	if cell, _, ok := strings.Cut(string(c.start), ","); ok && kind == KindTable {
		if n, err := strconv.ParseInt(cell, 10, 64); err == nil {
			index = n
		}
	}
	c.m.b.r.add(index, kind, "%s: line %d is not what the entries give: there is %q where %q is due", c.m.name, c.line, c.text[0], c.text[1])
}

// policies compares the texts of catalogues and policies with those on record.
func (b *bundle) policies(due map[string]bool) {
	for _, name := range b.names {
		if !policyName.MatchString(name) {
			continue
		}
		m := b.open(name)
		m.close()
		if sum := hex.EncodeToString(m.sum.Sum(nil)); !strings.Contains(name, sum) {
			b.r.add(NoIndex, KindPolicy, "%s is another text: its SHA-256 is %s", name, sum)
		}
		if !due[name] {
			b.r.add(NoIndex, KindPolicy, "%s is named by no policy.loaded of the bundle", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(due)) {
		if b.members[name] == nil {
			b.r.add(NoIndex, KindPolicy, "%s, which was in force, is missing", name)
		}
	}
}

// masking compares the masking rules with those of the grants on record.
func (b *bundle) masking(due *maskings) {
	files := due.files()
	for _, name := range b.names {
		digest, ok := strings.CutPrefix(name, "masking/")
		if !ok || name == memberMasking {
			continue
		}
		digest = strings.TrimSuffix(digest, ".json")
		m := b.open(name)
		m.close()
		if sum := hex.EncodeToString(m.sum.Sum(nil)); sum != digest {
			b.r.add(NoIndex, KindMasking, "%s holds other rules: its SHA-256 is %s", name, sum)
		}
		if !slices.Contains(files, digest) {
			b.r.add(NoIndex, KindMasking, "%s is in no grant of the bundle", name)
		}
	}
	for _, digest := range files {
		if b.members["masking/"+digest+".json"] == nil {
			b.r.add(NoIndex, KindMasking, "masking/%s.json, which a grant of the window has, is missing", digest)
		}
	}
	if b.members[memberMasking] != nil {
		c := &comparison{m: b.open(memberMasking), line: 1}
		_, _ = c.Write(due.index())
		c.finish(KindMasking)
		c.m.close()
	}
}

// rest checks the members that nothing else has read.
func (b *bundle) rest() {
	if b.members[memberVerify] != nil && string(b.small(memberVerify, maxSmall)) != verifyText {
		b.r.note("VERIFY.md is another text than this program's: it may be of another version, or have been changed. Follow this program's own, not the bundle's")
	}
}
