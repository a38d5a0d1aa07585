// Package vaultaudit follows Vault's own audit log, on the recorder's side: what
// each token that we minted was used for comes on record, and what no entry of
// the record accounts for raises an alert. So a broker that was taken over and
// mints beside the record is seen.
//
// It reads the log of a file audit device, or takes that of a socket device.
// Tokens are told by their accessors, which Vault writes as HMACs under a key of
// the device's own; Vault is asked for the HMACs of those on record
// (sys/audit-hash), and for nothing else.
package vaultaudit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Ledger is the record: *ledger.Ledger.
type Ledger interface {
	History(ctx context.Context, q ledger.Query) (*ledger.Page, error)
	Append(ctx context.Context, by ledger.Author, lines [][]byte) (*store.Appended, error)
	Done() <-chan struct{}
}

// Options say what is followed. Ledger, Writer, Agent, Hash and either File and
// Cursor or Listener must be set.
type Options struct {
	Ledger Ledger
	Writer string // the recorder's own name on record
	Agent  string // its SPIFFE ID, for entries that belong to no step
	Log    string // the ledger's name, by which the cursor is bound to it

	// Hash returns what Vault's audit device makes of input (sys/audit-hash).
	Hash func(ctx context.Context, input string) (string, error)

	File   string // what the file audit device writes
	Cursor string // file that keeps how far File was read

	// Listener is where Vault's socket device comes to. Lines that come while the
	// ledger takes nothing wait there; those that come while this program is down
	// are lost, so that a file is to be preferred.
	Listener net.Listener

	RolePrefix string           // of the token roles under which the broker mints; "countersign-" by default
	Poll       time.Duration    // how often File is looked at; 250 ms by default
	Now        func() time.Time // time.Now by default
	Zap        *zap.Logger      // none by default
}

// Counts is what was seen since the start.
type Counts struct {
	Lines     int64 // lines that are about tokens of ours
	Uses      int64 // credential.used that came on record
	Mints     int64 // tokens that were made, and that an intent accounts for
	Waiting   int64 // of Lines, those not dealt with yet: the record may still come to account for them
	Malformed int64 // lines that could not be read
	Gaps      int64 // times when lines may have been missed

	AlertMint, AlertUse, AlertLateUse int64 // alert.raised that came on record, by kind
}

// Follower follows one audit device until it is closed.
type Follower struct {
	o      Options
	cursor cursor
	known  map[string]*credential // by intent
	hashes map[string]string      // by what was hashed
	folded map[string]bool        // IDs of folded alerts that are on record

	mu     sync.Mutex
	counts Counts
	conns  map[net.Conn]bool

	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

// Open begins to follow. The error is one of the configuration, or of a cursor
// that cannot be used; what cannot be reached is tried again.
func Open(o Options) (*Follower, error) {
	if o.Ledger == nil || o.Writer == "" || o.Agent == "" || o.Hash == nil || (o.File == "") == (o.Listener == nil) || (o.File == "") != (o.Cursor == "") {
		return nil, errors.New("vaultaudit: a ledger, a writer, what hashes, and either a file with its cursor or a listener are due")
	}
	if o.RolePrefix == "" {
		o.RolePrefix = "countersign-"
	}
	if o.Poll <= 0 {
		o.Poll = 250 * time.Millisecond
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Zap == nil {
		o.Zap = zap.NewNop()
	}
	f := &Follower{o: o, cursor: cursor{o.Cursor, o.Log}, known: map[string]*credential{}, hashes: map[string]string{}, folded: map[string]bool{}, conns: map[net.Conn]bool{}}
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	if o.Listener != nil {
		lines := make(chan []byte, takeLines)
		f.tasks.Go(func() { f.accept(ctx, lines) })
		f.tasks.Go(func() { f.followSocket(ctx, lines) })
		return f, nil
	}
	at, err := f.cursor.read()
	if err != nil {
		cancel()
		return nil, err
	}
	t := &tail{path: o.File, poll: o.Poll,
		lost: func(why string) {
			f.count(func(c *Counts) { c.Gaps++ })
			o.Zap.Error("lines of Vault's audit log may have been missed", zap.String("why", why))
		},
		skipped: func() { f.malformed() },
	}
	if err := t.open(at); err != nil {
		cancel()
		return nil, err
	}
	f.tasks.Go(func() {
		defer t.close()
		f.followFile(ctx, t)
	})
	return f, nil
}

// Close ends it. Lines that wait for the record are read again by the next Open.
func (f *Follower) Close() error {
	f.cancel()
	var err error
	if f.o.Listener != nil {
		err = f.o.Listener.Close()
		f.mu.Lock()
		for c := range f.conns {
			c.Close()
		}
		f.mu.Unlock()
	}
	f.tasks.Wait()
	return err
}

// Counts returns what was seen so far.
func (f *Follower) Counts() Counts {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts
}

func (f *Follower) count(fn func(*Counts)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(&f.counts)
}

func (f *Follower) malformed() {
	f.count(func(c *Counts) { c.Malformed++ })
	f.o.Zap.Warn("a line of Vault's audit log could not be read")
}

// waiting is an event that is not dealt with, where its line begins, and when it
// is looked at again.
type waiting struct {
	*event
	from place
	next time.Time
}

// again is how long a line waits before the record is asked again.
const again = time.Second

// maxWaiting is how many lines may wait for the record; then no more are read.
const maxWaiting = 10_000

// followFile reads lines, deals with them, and then moves the cursor.
//
// A crash after entries are on record and before the cursor is written leaves
// lines to be read again: they give the same entries, which the ledger knows.
func (f *Follower) followFile(ctx context.Context, t *tail) {
	var (
		queue []waiting
		at    place // after the last line read
		saved place
	)
	for ctx.Err() == nil {
		var lines []lineAt
		if len(queue) < maxWaiting {
			var err error
			if lines, err = t.lines(ctx); err != nil {
				if !f.pause(ctx, "Vault's audit log could not be read", err) {
					return
				}
				continue
			}
		} else if !sleep(ctx, f.o.Poll) {
			return
		}
		for _, l := range lines {
			at = place{First: l.first, Next: l.next}
			if e := f.parse(l.text); e != nil {
				queue = append(queue, waiting{event: e, from: place{First: l.first, Next: l.from}})
			}
		}
		var ok bool
		if queue, ok = f.settle(ctx, queue); !ok {
			return
		}
		done := at
		if len(queue) > 0 {
			done = queue[0].from
		}
		if done != saved && done.First != "" {
			if err := f.cursor.write(done); err != nil {
				if !f.pause(ctx, "how far Vault's audit log was read could not be kept", err) {
					return
				}
				continue
			}
			saved = done
		}
	}
}

func (f *Follower) parse(line []byte) *event {
	e, err := parse(line, f.o.RolePrefix)
	if err != nil {
		f.malformed()
	} else if e != nil {
		f.count(func(c *Counts) { c.Lines++; c.Waiting++ })
	}
	return e
}

// settle deals with what it can, in order, and returns what has to wait. It
// tries until it succeeds; ok is false where ctx or the ledger ended first.
func (f *Follower) settle(ctx context.Context, queue []waiting) (rest []waiting, ok bool) {
	for {
		rest = nil
		err := func() error {
			var batch []entry
			now := time.Now()
			for _, w := range queue {
				if now.Before(w.next) {
					rest = append(rest, w)
					continue
				}
				out, wait, err := f.judge(ctx, w.event)
				if err != nil {
					return err
				}
				if wait {
					w.next = now.Add(min(again, 4*f.o.Poll))
					rest = append(rest, w)
				}
				batch = append(batch, out...)
			}
			return f.append(ctx, batch)
		}()
		if err == nil {
			f.count(func(c *Counts) { c.Waiting = int64(len(rest)) })
			return rest, true
		}
		if !f.pause(ctx, "Vault's audit log could not be followed", err) {
			return queue, false
		}
	}
}

// appendAtMost is how many entries go into one append.
const appendAtMost = 500

// append puts entries on record. Those that are there already stay as they are.
func (f *Follower) append(ctx context.Context, batch []entry) error {
	fresh := batch[:0]
	for _, e := range batch {
		if e.folded {
			if f.folded[e.ID] {
				continue
			}
			if len(f.folded) >= maxCached {
				clear(f.folded)
			}
			f.folded[e.ID] = true
		}
		fresh = append(fresh, e)
	}
	for len(fresh) > 0 {
		part := fresh[:min(len(fresh), appendAtMost)]
		fresh = fresh[len(part):]
		err := f.put(ctx, part)
		if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrMalformed) {
			for i := range part {
				err = f.put(ctx, part[i:i+1])
				switch {
				case errors.Is(err, store.ErrConflict): // on record already, as another line gave it
					err = nil
				case errors.Is(err, store.ErrMalformed): // what cannot be recorded must not hold up the rest
					f.malformed()
					f.o.Zap.Error("a line of Vault's audit log could not be recorded", zap.Error(err))
					err = nil
				}
				if err != nil {
					break
				}
			}
		}
		if err != nil {
			for _, e := range append(part, fresh...) {
				delete(f.folded, e.ID)
			}
			return err
		}
	}
	return nil
}

func (f *Follower) put(ctx context.Context, part []entry) error {
	lines := make([][]byte, len(part))
	for i, e := range part {
		var err error
		if lines[i], err = e.Marshal(); err != nil {
			return fmt.Errorf("recording %s: %w", e.Type, err)
		}
	}
	if _, err := f.o.Ledger.Append(ctx, ledger.Author{Name: f.o.Writer, Recorder: true}, lines); err != nil {
		return fmt.Errorf("recording what Vault's audit log tells: %w", err)
	}
	for _, e := range part {
		if e.count != nil {
			f.count(e.count)
		}
		if e.Type == store.AlertRaised {
			f.o.Zap.Error("an alert was raised from Vault's audit log", zap.String("entry", e.ID), zap.String("request", e.Request))
		}
	}
	return nil
}

// hash returns Vault's HMAC of input, asked for once.
func (f *Follower) hash(ctx context.Context, input string) (string, error) {
	if sum, ok := f.hashes[input]; ok {
		return sum, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	sum, err := f.o.Hash(ctx, input)
	if err != nil {
		return "", fmt.Errorf("asking Vault for an audit hash: %w", err)
	}
	if !strings.HasPrefix(sum, "hmac-") {
		return "", errors.New("asking Vault for an audit hash: the answer is none")
	}
	if len(f.hashes) >= maxCached {
		clear(f.hashes)
	}
	f.hashes[input] = sum
	return sum, nil
}

// retry is the pause after a failure.
const retry = time.Second

// pause waits after err, and reports whether to go on.
func (f *Follower) pause(ctx context.Context, what string, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	select {
	case <-f.o.Ledger.Done():
		return false
	default:
	}
	f.o.Zap.Warn(what+"; trying again", zap.Error(err))
	return sleep(ctx, retry)
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// maxConns is how many connections Vault may have open: each node of a cluster
// has one.
const maxConns = 32

// accept takes connections, and hands on their lines.
func (f *Follower) accept(ctx context.Context, lines chan<- []byte) {
	for {
		c, err := f.o.Listener.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if !f.pause(ctx, "no connection of Vault's could be taken", err) {
				return
			}
			continue
		}
		f.mu.Lock()
		full := len(f.conns) >= maxConns || ctx.Err() != nil
		if !full {
			f.conns[c] = true
		}
		f.mu.Unlock()
		if full {
			c.Close()
			continue
		}
		f.tasks.Go(func() {
			defer func() {
				f.mu.Lock()
				delete(f.conns, c)
				f.mu.Unlock()
				c.Close()
			}()
			f.readConn(ctx, c, lines)
		})
	}
}

// readConn reads a connection to its end. One whose line is too long ends: Vault
// opens another.
func (f *Follower) readConn(ctx context.Context, c net.Conn, lines chan<- []byte) {
	s := bufio.NewScanner(c)
	s.Buffer(make([]byte, 64<<10), maxLine)
	for s.Scan() {
		select {
		case lines <- append([]byte(nil), s.Bytes()...):
		case <-ctx.Done():
			return
		}
	}
	if err := s.Err(); errors.Is(err, bufio.ErrTooLong) {
		f.malformed()
	} else if err != nil && ctx.Err() == nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
		f.o.Zap.Warn("a connection of Vault's audit device broke", zap.Error(err))
	}
}

// followSocket deals with what comes. What waits for the record waits in memory.
func (f *Follower) followSocket(ctx context.Context, lines <-chan []byte) {
	var queue []waiting
	tick := time.NewTicker(f.o.Poll)
	defer tick.Stop()
	for {
		in := lines
		if len(queue) >= maxWaiting {
			in = nil
		}
		select {
		case l := <-in:
			if e := f.parse(l); e != nil {
				queue = append(queue, waiting{event: e})
			}
			if len(lines) > 0 && len(queue)%takeLines != 0 {
				continue // deal with what came together
			}
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var ok bool
		if queue, ok = f.settle(ctx, queue); !ok {
			return
		}
	}
}
