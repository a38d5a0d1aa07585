package review

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Limits of exports by default.
const (
	exportKeep    = time.Hour
	exportAbandon = time.Minute
	exportWait    = 10 * time.Second
	exportBytes   = 8 << 30
	exportFiles   = 16
	exportRunning = 2
	sweepEvery    = 5 * time.Second
)

// ExportFormat is one form that an export can have.
type ExportFormat struct {
	Write       evidence.Format
	ContentType string
	Extension   string // of the file's name, with its dot
}

// ExportsConfig says how exports are made. Ledger, Dir, Name, TrustDomain and
// PrivacyKey must be set.
type ExportsConfig struct {
	Ledger      *ledger.Ledger
	Dir         string // of the files, which hold opened texts; emptied when the process starts
	Name        string // of the recorder, as the writer of its own entries
	TrustDomain string
	PrivacyKey  store.PrivacyKey
	// Formats are those beside bundle, csv and jsonl.
	Formats map[string]ExportFormat
	Keep    time.Duration // how long a finished file can be fetched; 1 h by default
	Abandon time.Duration // how long work goes on that nobody waits for; 1 min by default
	Wait    time.Duration // for a published checkpoint that covers the export; 10 s by default
	Bytes   int64         // of all files together; 8 GiB by default
	Files   int           // kept; 16 by default
	Running int           // at once; 2 by default
	Now     func() time.Time
	Log     *zap.Logger
}

// Exports makes exports. Each is written to a file, from which it is sent while
// it grows, and again in part to who was cut off. A crash leaves an export on
// record that nobody may have received, and files that the next start removes.
// It is safe for concurrent use.
type Exports struct {
	c      ExportsConfig
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu      sync.Mutex
	exports map[string]*export
	bytes   int64 // of all files
}

// The states of an export.
const (
	exportRuns   = "running"
	exportReady  = "ready"
	exportFailed = "failed"
)

// export is one of them. Exports.mu guards what may change.
type export struct {
	id, format, owner, name string
	index                   int64
	created                 time.Time
	path                    string
	cancel                  context.CancelFunc

	state    string
	err      error
	done, of int64 // entries
	size     int64 // bytes in the file
	sum      string
	readers  int
	left     time.Time     // when the last reader went
	ended    time.Time     // when it was ready or failed
	changed  chan struct{} // closed and replaced whenever something of this changes
}

// NewExports empties the directory of exports and returns what makes them.
func NewExports(c ExportsConfig) (*Exports, error) {
	if c.Keep == 0 {
		c.Keep = exportKeep
	}
	if c.Abandon == 0 {
		c.Abandon = exportAbandon
	}
	if c.Wait == 0 {
		c.Wait = exportWait
	}
	if c.Bytes == 0 {
		c.Bytes = exportBytes
	}
	if c.Files == 0 {
		c.Files = exportFiles
	}
	if c.Running == 0 {
		c.Running = exportRunning
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	formats := map[string]ExportFormat{
		"bundle": {evidence.Export, "application/zip", ".zip"},
		"csv":    {evidence.ExportCSV, "text/csv; charset=utf-8", ".csv"},
		"jsonl":  {evidence.ExportLines(evidence.JSONLine), "application/x-ndjson", ".jsonl"},
	}
	for name, f := range c.Formats {
		formats[name] = f
	}
	c.Formats = formats
	if c.Dir == "" {
		return nil, errors.New("exports need a directory")
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("the directory of exports: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(c.Dir, "export-*"))
	if err != nil {
		return nil, err
	}
	for _, f := range old {
		if err := os.RemoveAll(f); err != nil {
			return nil, fmt.Errorf("removing what an earlier run left: %w", err)
		}
	}
	x := &Exports{c: c, exports: map[string]*export{}}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	x.tasks.Go(func() {
		t := time.NewTicker(sweepEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				x.sweep()
			case <-x.ctx.Done():
				return
			}
		}
	})
	return x, nil
}

// Close ends what is under way and removes all files. The ledger must still be
// open.
func (x *Exports) Close() {
	x.cancel()
	x.tasks.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range x.exports {
		x.remove(e)
	}
}

// remove forgets e, and its file. The caller holds mu. Who reads the file reads
// on.
func (x *Exports) remove(e *export) {
	e.cancel()
	if err := os.Remove(e.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		x.c.Log.Warn("the file of an export could not be removed", zap.String("export", e.id), zap.Error(err))
	}
	x.bytes -= e.size
	delete(x.exports, e.id)
}

// sweep removes what was kept long enough, and ends what nobody waits for.
func (x *Exports) sweep() {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.c.Now()
	for _, e := range x.exports {
		switch {
		case e.readers > 0:
		case e.state == exportRuns && now.Sub(e.left) >= x.c.Abandon:
			e.cancel()
		case e.state != exportRuns && now.Sub(e.ended) >= x.c.Keep:
			x.remove(e)
		}
	}
}

var (
	errBusy  = errors.New("as many exports are under way as may be at once")
	errSpace = errors.New("the space for exports is used up")
)

// begin starts writing an export, with its first reader attached.
func (x *Exports) begin(e *export, o evidence.ExportOptions) error {
	x.sweep()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ctx.Err() != nil {
		return x.ctx.Err()
	}
	if err := x.busy(); err != nil {
		return err
	}
	for len(x.exports) >= x.c.Files && x.evict() {
	}
	f, err := os.CreateTemp(x.c.Dir, "export-*") // 0600
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(x.ctx)
	e.path, e.cancel, e.state, e.readers, e.changed = f.Name(), cancel, exportRuns, 1, make(chan struct{})
	e.created, e.left = x.c.Now(), x.c.Now()
	o.Dir, o.Wait = x.c.Dir, x.c.Wait
	o.Progress = func(done, of int64) {
		x.mu.Lock()
		e.done, e.of = done, of
		x.mu.Unlock()
	}
	x.exports[e.id] = e
	x.tasks.Go(func() {
		defer cancel()
		defer collectOften()()
		w := &spoolFile{x: x, e: e, f: f, sum: sha256.New()}
		err := x.c.Formats[e.format].Write(ctx, x.c.Ledger, w, o)
		x.end(e, w, errors.Join(err, f.Close()))
	})
	return nil
}

// exportGC is how much garbage, in percent of what is live, is collected at the
// latest while an export is written. An export makes gigabytes of it, and holds
// tens of megabytes for minutes: at the process's usual percentage the garbage
// alone would be hundreds. At 100 an export takes no longer that could be
// measured; the process as a whole has half the memory.
const exportGC = 100

// collecting counts the exports of this process that are under way, since the
// percentage is the process's.
var collecting struct {
	sync.Mutex
	exports, usual int
}

// collectOften has garbage collected at exportGC until the function that it
// returns is called, by the last of those who asked. Where it is collected more
// often than that anyway, or never, it stays so.
func collectOften() (end func()) {
	c := &collecting
	c.Lock()
	defer c.Unlock()
	if c.exports++; c.exports == 1 {
		c.usual = debug.SetGCPercent(exportGC)
		if c.usual < exportGC {
			debug.SetGCPercent(c.usual)
		}
	}
	return func() {
		c.Lock()
		defer c.Unlock()
		if c.exports--; c.exports == 0 {
			debug.SetGCPercent(c.usual)
		}
	}
}

// busy says whether another export has to wait. The caller holds mu.
func (x *Exports) busy() error {
	running := 0
	for _, e := range x.exports {
		if e.state == exportRuns {
			running++
		}
	}
	if running >= x.c.Running {
		return errBusy
	}
	return nil
}

// evict removes the oldest file that nobody reads. The caller holds mu.
func (x *Exports) evict() bool {
	var oldest *export
	for _, e := range x.exports {
		if e.state != exportRuns && e.readers == 0 && (oldest == nil || e.created.Before(oldest.created)) {
			oldest = e
		}
	}
	if oldest == nil {
		return false
	}
	x.remove(oldest)
	return true
}

// end settles an export.
func (x *Exports) end(e *export, w *spoolFile, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	e.ended = x.c.Now()
	if err == nil {
		e.state, e.sum = exportReady, hex.EncodeToString(w.sum.Sum(nil))
	} else {
		e.state, e.err = exportFailed, err
		if !errors.Is(err, context.Canceled) {
			x.c.Log.Error("an export failed", zap.String("export", e.id), zap.Error(err))
		}
		_ = os.Remove(e.path)
		x.bytes -= e.size
		e.size = 0
	}
	e.wake()
}

// wake tells who waits that something has changed. The caller holds mu.
func (e *export) wake() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// spoolFile is the file of an export while it is written.
type spoolFile struct {
	x   *Exports
	e   *export
	f   *os.File
	sum hash.Hash
}

func (s *spoolFile) Write(p []byte) (int, error) {
	s.x.mu.Lock()
	for s.x.bytes+int64(len(p)) > s.x.c.Bytes && s.x.evict() {
	}
	full := s.x.bytes+int64(len(p)) > s.x.c.Bytes
	s.x.mu.Unlock()
	if full {
		return 0, errSpace
	}
	n, err := s.f.Write(p)
	s.sum.Write(p[:n])
	s.x.mu.Lock()
	defer s.x.mu.Unlock()
	s.x.bytes += int64(n)
	s.e.size += int64(n)
	s.e.wake()
	return n, err
}

// attach finds an export of owner's and keeps it while it is read; detach lets
// it go. Nil: there is none, or it is another's, since each export is on record
// as one taker's.
func (x *Exports) attach(id, owner string) *export {
	x.sweep()
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.exports[id]
	if e == nil || e.owner != owner {
		return nil
	}
	e.readers++
	return e
}

func (x *Exports) detach(e *export) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e.readers--; e.readers == 0 {
		e.left = x.c.Now()
	}
}

// status is what is known of an export at one instant.
type status struct {
	state    string
	err      error
	done, of int64
	size     int64
	sum      string
	changed  <-chan struct{}
}

func (x *Exports) status(e *export) status {
	x.mu.Lock()
	defer x.mu.Unlock()
	return status{e.state, e.err, e.done, e.of, e.size, e.sum, e.changed}
}

// wait returns once until holds of e, or ctx ends.
func (x *Exports) wait(ctx context.Context, e *export, until func(status) bool) (status, error) {
	for {
		s := x.status(e)
		if until(s) {
			return s, nil
		}
		select {
		case <-s.changed:
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}

// copy writes the export to w as it grows, and flushes where it has to wait for
// more.
func (x *Exports) copy(ctx context.Context, e *export, w io.Writer, flush func() error) error {
	f, err := os.Open(e.path)
	if err != nil {
		return err
	}
	defer f.Close()
	sent, buf := int64(0), make([]byte, 128<<10)
	for {
		s, err := x.wait(ctx, e, func(s status) bool { return s.size > sent || s.state != exportRuns })
		switch {
		case err != nil:
			return err
		case s.state == exportFailed:
			return s.err
		case s.size == sent:
			return nil
		}
		for sent < s.size {
			n, err := f.Read(buf[:min(int64(len(buf)), s.size-sent)])
			if err != nil {
				return err
			}
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			sent += int64(n)
		}
		if err := flush(); err != nil {
			return err
		}
	}
}

// Counts are how many exports there are: under way, ready to be read, and
// failed and not forgotten yet.
func (x *Exports) Counts() (running, ready, failed int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range x.exports {
		switch e.state {
		case exportRuns:
			running++
		case exportReady:
			ready++
		case exportFailed:
			failed++
		}
	}
	return running, ready, failed
}

// IDs lists the exports that there are, by their IDs.
func (x *Exports) IDs() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var ids []string
	for id := range x.exports {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}
