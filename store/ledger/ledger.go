// Package ledger keeps the record: an append-only Merkle log over SQLite or
// PostgreSQL.
//
// Tables entries, hashes and checkpoints are the log. One transaction holds a
// batch's entries, the tree nodes they complete, the checkpoint that signs the
// tree, and what changed beside the log: open_requests (what is open, a
// function of the entries; freezes in force are read from the entries) and sealed (encrypted texts behind commitments,
// whose keys lie in another file). One goroutine writes.
package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/countersign-dev/countersign/store"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"
)

var (
	// ErrMismatch is wrapped by every finding that the stored log does not hold:
	// it was altered, cut, or put back to an older state.
	ErrMismatch = errors.New("ledger mismatch")
	// ErrNotFound is wrapped where a tile lies outside the published tree.
	ErrNotFound = errors.New("not in the published tree")
	// ErrQuery is wrapped by errors about a query that makes no sense.
	ErrQuery = errors.New("malformed query")
	// ErrLocked refuses a ledger that another process has open.
	ErrLocked = errors.New("another recorder has this ledger open")
	// ErrLost is wrapped where the database server cannot be reached, or the
	// connection that writes was lost and with it the claim on the ledger. Nothing
	// is wrong with the log: open it again.
	ErrLost = errors.New("the connection to the ledger's database is lost")
	// errRefused is wrapped where the database does not take the content of an
	// entry that is otherwise in order.
	errRefused = errors.New("the ledger's database does not take it")
)

// Options say where a ledger lies and how it runs. Dir, Signer, Verifier and
// PrivacyKey must be set.
type Options struct {
	Dir string // holds ledger.db, lock, and what is not named below; made where it is missing
	// Postgres is where the database lies instead of Dir: a connection string of
	// PostgreSQL. Its user should be one whom InitPostgres made way for; one that
	// may make the schema does so where it is missing. search_path in it names the
	// schema, "countersign" by default. Each recorder has a Dir of its own, with a
	// head file of its own; KeysFile lies on storage that all of them mount, and
	// the active one alone has it open.
	Postgres string
	// Standby has Open wait, for as long as its context allows, while another
	// recorder has the PostgreSQL ledger open, or the server cannot be reached.
	// Waiting, it brings its head file up to date with each checkpoint that is
	// consistent with the one it holds; one that is not is ErrMismatch.
	Standby    bool
	HeadFile   string           // last signed checkpoint; Dir/head by default, better on another disk
	KeysFile   string           // keys of the sealed texts; Dir/details-keys.db by default, better outside the ledger's backups
	Signer     note.Signer      // Ed25519; its name is the log's origin
	Verifier   string           // the signer's verifier key (C2SP signed-note vkey)
	PrivacyKey store.PrivacyKey // at least 32 bytes
	Grace      time.Duration    // see store.State; 60 s by default
	// Gate is asked about each entry that a writer submits, before the order of
	// the record is: what the recorder's own catalogue says of it. Its errors are
	// *store.OrderError. Nil: nothing is compared.
	Gate         func(*store.Submission) error
	Now          func() time.Time // the recorder's clock; time.Now by default
	Log          *zap.Logger      // none by default
	PublishEvery time.Duration    // between published checkpoints; 2 s by default
	// Publish, where set, decides what is published in place of PublishEvery, by
	// Ledger.Publish: until its first call nothing is. It runs in a goroutine of
	// its own and returns once ctx ends, which Close waits for.
	Publish      func(ctx context.Context, l *Ledger)
	CheckNewest  int64         // how many of the newest entries are hashed again at start; 10,000 by default
	RecheckEvery time.Duration // pause between background passes over the whole log; 1 h by default, negative: no pass
	// Committed, where set, is told of each commit, by the goroutine that writes:
	// it is to be quick.
	Committed func(Commit)

	migrations []migration // in tests; nil: the program's
}

func (o *Options) defaults() error {
	if o.Dir == "" || o.Signer == nil || len(o.PrivacyKey) < 32 {
		return errors.New("a ledger needs a directory, a signer and a privacy key of at least 32 bytes")
	}
	if o.Standby && o.Postgres == "" {
		return errors.New("a recorder stands by where the ledger lies in PostgreSQL alone")
	}
	if o.HeadFile == "" {
		o.HeadFile = filepath.Join(o.Dir, "head")
	}
	if o.KeysFile == "" {
		o.KeysFile = filepath.Join(o.Dir, "details-keys.db")
	}
	if o.Grace == 0 {
		o.Grace = time.Minute
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.PublishEvery == 0 {
		o.PublishEvery = 2 * time.Second
	}
	if o.CheckNewest == 0 {
		o.CheckNewest = 10_000
	}
	if o.RecheckEvery == 0 {
		o.RecheckEvery = time.Hour
	}
	return nil
}

// Author is who appends.
type Author struct {
	Name     string // the authenticated writer, stamped on its entries
	Recorder bool   // the recorder itself writes: types that no writer may append are allowed
	erases   bool   // Erase writes, see guard
}

// Ledger is an open ledger. It is safe for concurrent use.
type Ledger struct {
	o        Options
	verifier *store.LogVerifier
	lock     *os.File
	e        engine
	w, r     *sql.DB // one connection that writes; several that read
	keys     *sql.DB // the keys file
	queue    chan *group
	written  chan struct{} // closed when the writing goroutine ended
	headFile headFile

	head      atomic.Pointer[head] // the newest
	published atomic.Pointer[head]
	nodes     recentNodes

	mu      sync.RWMutex              // guards what follows, and that head belongs to it
	open    map[string]*store.Request // store.State's requests as of head; values are never changed
	freezes []store.Freeze            // in force as of head, oldest first; replaced, never changed
	lifted  []store.Freeze            // as of head; likewise
	recent  []store.Proven            // newest entries that writers may follow, without proofs
	recentN int64                     // recent is complete from this index on
	grown   chan struct{}             // closed and replaced by each commit

	ctx    context.Context // ends when the ledger stops
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	once   sync.Once
	done   chan struct{}
	err    atomic.Pointer[error]

	wr    writer // used by the writing goroutine alone
	stock keyStock
	keyWr writer // used by keysLoop alone: conn and stmts of the keys file

	erasing erasing
}

// Open opens or creates the ledger in o.Dir. It recomputes the head from the
// stored hashes, hashes the newest entries again and compares all with the
// signed checkpoint and with the head file; errors about what it finds wrap
// ErrMismatch. The rest is checked in the background: a finding there stops the
// ledger, see Done.
func Open(ctx context.Context, o Options) (_ *Ledger, err error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	v, err := store.NewLogVerifier(o.Verifier)
	if err != nil {
		return nil, err
	}
	if v.Origin() != o.Signer.Name() {
		return nil, fmt.Errorf("the log key's verifier is named %q, its signer %q", v.Origin(), o.Signer.Name())
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	l := &Ledger{
		o: o, verifier: v,
		queue:    make(chan *group, maxBatch),
		headFile: headFile{path: o.HeadFile, due: make(chan struct{}, 1)},
		stock:    keyStock{want: make(chan struct{}, 1), filled: make(chan struct{})},
		grown:    make(chan struct{}), done: make(chan struct{}), written: make(chan struct{}),
		open: map[string]*store.Request{}, erasing: erasing{jobs: make(chan func())},
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			l.cancel()
			err = errors.Join(err, l.release())
		}
	}()
	if l.lock, err = lockDir(filepath.Join(o.Dir, "lock")); err != nil {
		return nil, err
	}
	if l.e, err = newEngine(&o); err != nil {
		return nil, err
	}
	if l.w, l.r, err = l.e.open(); err != nil {
		return nil, err
	}
	if err := l.claim(ctx); err != nil {
		return nil, l.e.class(err)
	}
	if err := touch(o.KeysFile); err != nil {
		return nil, err
	}
	// A WAL is shared memory, and so for one machine alone (SQLite, "Write-Ahead
	// Logging"). A recorder on another one may take over while this has not noticed
	// yet: there the file's locks keep both apart.
	journal := "WAL"
	if o.Postgres != "" {
		journal = "TRUNCATE"
	}
	// secure_delete overwrites what is deleted with zeros, so that an erased key
	// is not left on a free page.
	if l.keys, err = openDB(o.KeysFile, 3, "_journal_mode="+journal, "_synchronous=FULL", "_pragma=secure_delete(1)"); err != nil {
		return nil, err
	}
	l.keyWr.stmts = map[string]*sql.Stmt{}
	if l.keyWr.conn, err = l.keys.Conn(ctx); err != nil {
		return nil, fmt.Errorf("opening the keys file %s: %w", o.KeysFile, err)
	}
	if err := l.start(ctx); err != nil {
		return nil, l.e.class(err)
	}
	if o.Publish != nil {
		l.published.Store(&head{}) // nothing yet
	}
	l.tasks.Add(4)
	go l.writeLoop()
	go l.keysLoop()
	go l.publishLoop()
	go l.headLoop()
	if o.RecheckEvery > 0 {
		l.tasks.Add(1)
		go l.recheckLoop()
	}
	return l, nil
}

// touch makes the file at path readable by its owner alone, before SQLite
// would make it with the umask's mode.
func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// lockDir takes the lock that keeps two recorders from one ledger. The kernel
// frees it when the process dies.
func lockDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s is held", ErrLocked, path)
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}

// readErr is what a reader is told of err: a mismatch stops the ledger, all
// else but the caller's own context is ErrUnavailable.
func (l *Ledger) readErr(err error) error {
	err = l.e.class(err)
	switch {
	case err == nil, errors.Is(err, store.ErrUnavailable), errors.Is(err, ErrNotFound), errors.Is(err, ErrQuery):
		return err
	case errors.Is(err, ErrMismatch):
		l.stop(err)
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	case l.ctx.Err() == nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		return err
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// stop ends the ledger: nothing is appended any more.
func (l *Ledger) stop(err error) {
	l.once.Do(func() {
		if err != nil {
			l.err.Store(&err)
			l.o.Log.Error("the ledger stopped itself", zap.Error(err))
		}
		l.cancel()
		close(l.done)
	})
}

// Done is closed when the ledger stopped, by Close or by itself.
func (l *Ledger) Done() <-chan struct{} { return l.done }

// Err is why the ledger stopped itself: it wraps ErrMismatch, or ErrLost where
// it can be opened again. It is nil while the ledger runs and after Close.
func (l *Ledger) Err() error {
	if p := l.err.Load(); p != nil {
		return *p
	}
	return nil
}

// closedErr is what a caller is told once the ledger stopped.
func (l *Ledger) closedErr() error {
	if err := l.Err(); err != nil {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return fmt.Errorf("%w: closed", store.ErrUnavailable)
}

// Close stops the ledger, finishes the commit under way, and writes the head
// file. It returns what went wrong in closing, not Err.
func (l *Ledger) Close() error {
	l.stop(nil)
	l.tasks.Wait()
	return l.release()
}

func (l *Ledger) release() error {
	var errs []error
	if l.wr.conn != nil { // a database closes only the connections that were given back
		for _, s := range l.wr.stmts {
			errs = append(errs, s.Close())
		}
		if !errors.Is(l.Err(), ErrLost) {
			ctx, cancel := l.e.patience(context.Background())
			defer cancel()
			errs = append(errs, l.e.release(ctx, l.wr.conn))
		}
		errs = append(errs, l.wr.conn.Close())
	}
	if l.keyWr.conn != nil {
		ctx, cancel := l.e.patience(context.Background())
		defer cancel()
		errs = append(errs, l.dropKeys(ctx))
		for _, s := range l.keyWr.stmts {
			errs = append(errs, s.Close())
		}
		errs = append(errs, l.keyWr.conn.Close())
	}
	for _, db := range []*sql.DB{l.r, l.w, l.keys} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
		l.lock = nil
	}
	return errors.Join(errs...)
}

// Head is the latest signed checkpoint.
func (l *Ledger) Head() string { return l.head.Load().note }

// Size is the number of entries, as Head signs it.
func (l *Ledger) Size() int64 { return l.head.Load().size }

// headLoop keeps the head file up to date, see headFile.
func (l *Ledger) headLoop() {
	defer l.tasks.Done()
	var last int64 = -1
	write := func() {
		h := l.head.Load()
		if h.size == last || errors.Is(l.Err(), ErrMismatch) {
			return
		}
		if err := l.headFile.write(h); err != nil {
			if !l.headFile.failed.Swap(true) {
				l.o.Log.Error("the head file cannot be written, so nothing is appended", zap.Error(err))
			}
			return
		}
		last = h.size
		l.headFile.failed.Store(false)
	}
	for {
		select {
		case <-l.ctx.Done():
			write()
			return
		case <-l.headFile.due:
			write()
		}
		for {
			select {
			case <-l.ctx.Done():
				write()
				return
			case <-time.After(headGap):
			}
			if !l.headFile.failed.Load() {
				break
			}
			write()
		}
	}
}

// Standing returns what is open in the log of size entries: its requests, in the
// order of their step.requested, and the freezes in force, oldest first. None of
// it may be changed.
func (l *Ledger) Standing() (size int64, requests []*store.Request, freezes []store.Freeze) {
	h, rs, fs, _ := l.snapshot()
	return h.size, rs, fs
}

// snapshotOf is snapshot of one request, and of the one whose standing approval
// it draws on.
func (l *Ledger) snapshotOf(request string) (_ *head, _ []*store.Request, inForce, lifted []store.Freeze) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var rs []*store.Request
	if r := l.open[request]; r != nil {
		rs = append(rs, r)
		if from := l.open[r.Standing]; from != nil {
			rs = append(rs, from)
		}
	}
	return l.head.Load(), rs, l.freezes, l.lifted
}

// snapshot returns the head, and the requests and freezes that belong to it: those
// in force and those lifted.
func (l *Ledger) snapshot() (_ *head, _ []*store.Request, inForce, lifted []store.Freeze) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	rs := make([]*store.Request, 0, len(l.open))
	for _, r := range l.open {
		rs = append(rs, r)
	}
	slices.SortFunc(rs, func(a, b *store.Request) int { return int(a.Requested - b.Requested) })
	return l.head.Load(), rs, l.freezes, l.lifted
}
