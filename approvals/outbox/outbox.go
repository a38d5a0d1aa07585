// Package outbox tells the world outside about approvals and passkeys: Slack,
// webhooks. It is durable, and nobody waits for it: whoever asks or decides goes
// on while a destination is slow or down.
//
// It keeps one row per approval, or passkey, and destination: which version of it
// the destination should show, and which it shows. No text is in the file: what
// is told is read from the record when it is sent, so that a text that was
// erased meanwhile is not. Every delivery sends the
// newest state, so that a destination which was away is told once where things
// stand. What is to be told follows from the ledger alone: rows are made from
// the approvals' events and again from their list at each start, so that the
// file may be lost without anything remaining untold. One process owns it, the
// recorder that holds the ledger; a standby recorder opens an outbox of its own
// only once it has taken over, and finds by looking what its predecessor sent
// (see Doubt).
package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	_ "modernc.org/sqlite" // the engine, pure Go

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// Source is where the requests come from: *approvals.Approvals.
type Source interface {
	Get(ctx context.Context, id string) (*approvals.Request, error)
	Passkeys(ctx context.Context, of *approvals.Person) ([]approvals.Passkey, error)
	List(ctx context.Context, f approvals.Filter) ([]approvals.Request, string, error)
	Subscribe() (<-chan approvals.Event, func())
}

// Sender is one destination.
type Sender interface {
	// Name tells destinations apart in the file. It must not change, or all
	// that is pending is told again.
	Name() string
	// Send makes the destination show d. It returns where the message lies, in
	// a form of its own, for the next Send of the same request. Send must
	// return when ctx ends. An error that is not a *Failure leaves open whether
	// something was delivered.
	Send(ctx context.Context, d Delivery) (place string, err error)
}

// Delivery is one state of a request, of many told together, or of a passkey, to
// be shown at a destination. One of the three is set.
type Delivery struct {
	Request *approvals.Request
	Flood   *Flood
	Passkey *approvals.Passkey
	Version string // see Version, Flood.Version and PasskeyVersion
	Place   string // what Send returned before; empty: nothing is known to be there
	// Doubt is set where Place is empty and an earlier attempt may have left a
	// message all the same.
	Doubt *Doubt
}

// Doubt is when a message may have been left.
type Doubt struct {
	First   time.Time // not before
	Settled time.Time // whoever looks after this sees it, if there is one
}

// ErrGone is wrapped by Send where the message at Place is no longer there or
// cannot be changed any more. The request is then told anew.
var ErrGone = errors.New("the message is gone")

// Failure is a delivery that certainly left nothing behind.
type Failure struct {
	Err   error
	After time.Duration // the destination's own wish (Retry-After); 0: none
	Down  bool          // the destination as a whole takes nothing now, not this one message
}

func (f *Failure) Error() string { return f.Err.Error() }

// Unwrap returns the cause.
func (f *Failure) Unwrap() error { return f.Err }

// Version names a state of r as a destination shows it.
func Version(r *approvals.Request) string {
	return string(r.Status) + "/" + strconv.Itoa(len(r.Decisions))
}

// PasskeyVersion names a state of k: enrolled, activated or revoked.
func PasskeyVersion(k *approvals.Passkey) string {
	v, _ := passkeyState(k)
	return v
}

// passkeyState is the newest that happened to k, and when.
func passkeyState(k *approvals.Passkey) (version string, at time.Time) {
	switch {
	case !k.Revoked.IsZero():
		return "revoked", k.Revoked
	case k.Active:
		return "activated", k.Activated
	}
	return "enrolled", k.Enrolled
}

// ofPasskey begins the name of a row about a passkey; its enrolment's ID follows.
// No approval is named so.
const ofPasskey = "passkey:"

// Final reports whether nothing more will happen to a request in state s that
// a person waits to be told.
func Final(s store.Status) bool { return s != store.StatusPending && s != store.StatusApproved }

// CheckURL refuses an address to which nothing may be sent: only https is, and
// http to this machine itself.
func CheckURL(raw string) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return errors.New("the address is not a URL") // err would repeat what may be a secret
	case u.Host == "" || u.User != nil || u.Fragment != "":
		return errors.New("the address must be https://HOST/…, without user or fragment")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && (u.Hostname() == "localhost" || net.ParseIP(u.Hostname()).IsLoopback()):
		return nil
	}
	return errors.New("the address must be https, or http to localhost")
}

// Config says where an outbox lies and how it runs. File and Source must be
// set.
type Config struct {
	File    string // SQLite database, DIR/outbox.db; made where it is missing
	Source  Source
	Senders []Sender

	MinWait time.Duration // before the second attempt, doubled from then on; 1 s by default
	MaxWait time.Duration // the longest pause between attempts; 1 min by default
	// Settle is how long after an attempt without an answer the next one waits,
	// so that what is still under way has arrived where it is looked for; 3 s by
	// default.
	Settle time.Duration
	// GiveUp is how long a request is over, or the last change of a passkey lies
	// back, before it is no longer told to a destination that is still down; 7 days
	// by default. Of a request that is not over, telling is never given up.
	GiveUp time.Duration
	// FloodWait is the least time between two states of a flood that a
	// destination is told; 5 s by default.
	FloodWait time.Duration
	Timeout   time.Duration    // of one attempt; 15 s by default
	Now       func() time.Time // time.Now by default
	Log       *zap.Logger      // none by default
}

// Outbox delivers until it is closed.
type Outbox struct {
	c      Config
	db     *sql.DB
	wake   map[string]chan struct{} // by Sender.Name
	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

// schema. approval is the approval's ID, or ofFlood and one, or ofPasskey and the
// enrolment's. want and have are Versions. doubt_first and doubt_last are set while
// place is empty and an attempt has begun: both are Unix milliseconds, as are
// next (not before) and over (when the request was first seen to be over, or the
// passkey last changed). members are the requests that came, by orchestrator and
// scope (kin), asked in Unix milliseconds, each with the flood that it is told
// with.
const schema = `CREATE TABLE IF NOT EXISTS deliveries (
	approval    TEXT NOT NULL,
	destination TEXT NOT NULL,
	want        TEXT NOT NULL,
	have        TEXT NOT NULL DEFAULT '',
	place       TEXT NOT NULL DEFAULT '',
	doubt_first INTEGER NOT NULL DEFAULT 0,
	doubt_last  INTEGER NOT NULL DEFAULT 0,
	tries       INTEGER NOT NULL DEFAULT 0,
	next        INTEGER NOT NULL DEFAULT 0,
	over        INTEGER NOT NULL DEFAULT 0,
	PRIMARY KEY (approval, destination)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (destination, next) WHERE want <> have;
CREATE TABLE IF NOT EXISTS members (
	approval TEXT NOT NULL PRIMARY KEY,
	kin      TEXT NOT NULL,
	run      TEXT NOT NULL,
	asked    INTEGER NOT NULL,
	flood    TEXT NOT NULL,
	status   TEXT NOT NULL,
	over     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS members_kin ON members (kin, asked);
CREATE INDEX IF NOT EXISTS members_flood ON members (flood, asked) WHERE flood <> ''`

// Open opens or creates the outbox and starts to deliver.
func Open(ctx context.Context, c Config) (*Outbox, error) {
	if c.File == "" || c.Source == nil {
		return nil, errors.New("an outbox needs a file and a source")
	}
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{{&c.MinWait, time.Second}, {&c.MaxWait, time.Minute}, {&c.Settle, 3 * time.Second}, {&c.GiveUp, 7 * 24 * time.Hour}, {&c.Timeout, 15 * time.Second}, {&c.FloodWait, 5 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.d
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	// synchronous=FULL: a committed attempt is on disk before it is made.
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: c.File}).EscapedPath()+"?_busy_timeout=10000&_journal_mode=WAL&_synchronous=FULL&_pragma=temp_store(memory)")
	if err != nil {
		return nil, fmt.Errorf("opening the outbox: %w", err)
	}
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, schema); err != nil {
		db.Close()
		return nil, fmt.Errorf("opening the outbox %s: %w", c.File, err)
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	o := &Outbox{c: c, db: db, wake: map[string]chan struct{}{}, cancel: cancel}
	for _, s := range c.Senders {
		if o.wake[s.Name()] != nil {
			cancel()
			db.Close()
			return nil, fmt.Errorf("two destinations are named %q", s.Name())
		}
		o.wake[s.Name()] = make(chan struct{}, 1)
	}
	// Subscribed before the list is read: what happens in between is seen twice
	// rather than never.
	events, stop := c.Source.Subscribe()
	o.tasks.Go(func() { defer stop(); o.follow(run, events) })
	for _, s := range c.Senders {
		o.tasks.Go(func() { o.deliver(run, s) })
	}
	return o, nil
}

// Close stops delivering and closes the file. What is not delivered yet is at
// the next start.
func (o *Outbox) Close() error {
	o.cancel()
	o.tasks.Wait()
	return o.db.Close()
}

// Waiting is how many deliveries to the destination named are not made yet.
func (o *Outbox) Waiting(ctx context.Context, destination string) (n int, err error) {
	err = o.db.QueryRowContext(ctx, "SELECT count(*) FROM deliveries WHERE destination = ? AND want <> have", destination).Scan(&n)
	return n, err
}

// Place is where a destination keeps what it was told about an approval, as its
// Sender said; empty where nothing is there.
func (o *Outbox) Place(ctx context.Context, destination, approval string) (place string, err error) {
	err = o.db.QueryRowContext(ctx, "SELECT place FROM deliveries WHERE destination = ? AND approval = ?", destination, approval).Scan(&place)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return place, err
}

// follow turns events into rows. A crash between an event and its row loses
// nothing: reconcile makes the row at the next start.
func (o *Outbox) follow(ctx context.Context, events <-chan approvals.Event) {
	sweep := time.NewTicker(time.Hour)
	defer sweep.Stop()
	var again <-chan time.Time
	reconcile := func() {
		again = nil
		if err := o.reconcile(ctx); err != nil && ctx.Err() == nil {
			o.c.Log.Warn("notifications could not be compared with the record; trying again", zap.Error(err))
			again = time.After(o.c.MinWait)
		}
	}
	reconcile()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again:
			reconcile()
		case <-sweep.C:
			if err := o.forget(ctx); err != nil && ctx.Err() == nil {
				o.c.Log.Warn("old notifications could not be removed", zap.Error(err))
			}
		case e, ok := <-events:
			switch {
			case !ok:
				return
			case e.Kind == approvals.EventResync || e.Request == nil && e.Approval != "":
				reconcile()
			case e.Passkey != nil:
				if err := o.notePasskey(ctx, e.Passkey); err != nil && ctx.Err() == nil {
					o.c.Log.Warn("a notification could not be kept; comparing with the record again", zap.Error(err))
					again = time.After(o.c.MinWait)
				}
			case e.Request == nil:
			default:
				// Only with the event that asks is it certain that nobody was
				// told before.
				if err := o.note(ctx, e.Request, e.Kind == approvals.EventRequested); err != nil && ctx.Err() == nil {
					o.c.Log.Warn("a notification could not be kept; comparing with the record again", zap.Error(err))
					again = time.After(o.c.MinWait)
				}
			}
		}
	}
}

// reconcile makes the rows that events did not: of what is pending, of what
// changed while nobody followed, and of passkeys that changed of late.
func (o *Outbox) reconcile(ctx context.Context) error {
	f := approvals.Filter{State: approvals.StatePending, Limit: 200}
	var pending []approvals.Request
	for {
		page, next, err := o.c.Source.List(ctx, f)
		if err != nil {
			return err
		}
		pending = append(pending, page...)
		if next == "" {
			break
		}
		f.Before = next
	}
	// As they came: which of them are told together hangs on it.
	slices.SortStableFunc(pending, func(a, b approvals.Request) int { return a.Asked.Compare(b.Asked) })
	for i := range pending {
		if err := o.note(ctx, &pending[i], false); err != nil {
			return err
		}
	}
	ids, err := o.texts(ctx, "SELECT DISTINCT approval FROM deliveries WHERE over = 0 AND approval NOT LIKE 'flood:%' UNION SELECT approval FROM members WHERE over = 0")
	if err != nil {
		return err
	}
	for _, id := range ids {
		r, err := o.c.Source.Get(ctx, id)
		switch {
		case errors.Is(err, approvals.ErrNotFound):
			// Of another ledger, or no longer kept: there is nothing to tell.
			for _, table := range []string{"deliveries", "members"} {
				if _, err := o.db.ExecContext(ctx, "DELETE FROM "+table+" WHERE approval = ?", id); err != nil {
					return err
				}
			}
		case err != nil:
			return err
		default:
			if err := o.note(ctx, r, false); err != nil {
				return err
			}
		}
	}
	keys, err := o.c.Source.Passkeys(ctx, nil)
	if err != nil {
		return err
	}
	for i := range keys {
		if err := o.notePasskey(ctx, &keys[i]); err != nil {
			return err
		}
	}
	return o.forget(ctx)
}

// notePasskey keeps what every destination should be told of k, unless it lies
// back too far. A crash before the commit leaves the old row, which reconcile
// corrects.
func (o *Outbox) notePasskey(ctx context.Context, k *approvals.Passkey) error {
	version, at := passkeyState(k)
	if o.c.Now().Sub(at) >= o.c.GiveUp {
		return nil
	}
	tx, err := o.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for _, s := range o.c.Senders {
		if _, err := tx.ExecContext(ctx, `INSERT INTO deliveries (approval, destination, want, over) VALUES (?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET want = excluded.want, over = excluded.over`, ofPasskey+k.ID, s.Name(), version, at.UnixMilli()); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	o.wakeAll()
	return nil
}

// about reads what the row named id tells of, as it is now. The error is
// approvals.ErrNotFound where there is no such thing.
func (o *Outbox) about(ctx context.Context, id string) (*Delivery, error) {
	if first, ok := strings.CutPrefix(id, ofFlood); ok {
		f, err := o.flood(ctx, o.db, id)
		if err != nil {
			return nil, err
		}
		r, err := o.c.Source.Get(ctx, first)
		if err != nil {
			return nil, err
		}
		f.URL = strings.TrimSuffix(r.URL, "/"+first) + "?state=pending"
		return &Delivery{Flood: f, Version: f.Version()}, nil
	}
	enrolled, ok := strings.CutPrefix(id, ofPasskey)
	if !ok {
		r, err := o.c.Source.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		return &Delivery{Request: r, Version: Version(r)}, nil
	}
	keys, err := o.c.Source.Passkeys(ctx, nil)
	if err != nil {
		return nil, err
	}
	for i := range keys {
		if keys[i].ID == enrolled {
			return &Delivery{Passkey: &keys[i], Version: PasskeyVersion(&keys[i])}, nil
		}
	}
	return nil, approvals.ErrNotFound
}

func (o *Outbox) texts(ctx context.Context, query string) (list []string, err error) {
	rows, err := o.db.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, rows.Err()
}

// note keeps what every destination should show of r. fresh says that nobody
// can have been told of r yet. A crash before the commit leaves the old row,
// which reconcile corrects.
func (o *Outbox) note(ctx context.Context, r *approvals.Request, fresh bool) error {
	var first, last, over int64
	if !fresh {
		// A message may stand there already, sent by whoever ran before.
		first, last = r.Asked.UnixMilli(), o.c.Now().UnixMilli()
	}
	if Final(r.Status) {
		over = o.c.Now().UnixMilli()
	}
	tx, err := o.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	flood, err := o.fold(ctx, tx, r)
	if err != nil {
		return err
	}
	if flood != "" {
		if err := o.noteFlood(ctx, tx, flood, r, fresh); err != nil {
			return err
		}
		if err := tx.Commit(); err != nil {
			return err
		}
		o.wakeAll()
		return nil
	}
	for _, s := range o.c.Senders {
		if _, err := tx.ExecContext(ctx, `INSERT INTO deliveries (approval, destination, want, doubt_first, doubt_last, over) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET want = excluded.want, over = CASE WHEN over = 0 THEN excluded.over ELSE over END`,
			r.ID, s.Name(), Version(r), first, last, over); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	o.wakeAll()
	return nil
}

func (o *Outbox) wakeAll() {
	for _, c := range o.wake {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// forget removes rows of requests that are over for longer than GiveUp, and of
// passkeys that did not change for so long.
func (o *Outbox) forget(ctx context.Context) error {
	old := o.c.Now().Add(-o.c.GiveUp).UnixMilli()
	var untold int
	if err := o.db.QueryRowContext(ctx, "SELECT count(*) FROM deliveries WHERE over > 0 AND over < ? AND want <> have", old).Scan(&untold); err != nil {
		return err
	}
	if untold > 0 {
		o.c.Log.Error("notifications of what is over for long were never delivered", zap.Int("count", untold))
	}
	if _, err := o.db.ExecContext(ctx, "DELETE FROM deliveries WHERE over > 0 AND over < ?", old); err != nil {
		return err
	}
	// Of a flood that is still told all are kept, so that its count is right.
	_, err := o.db.ExecContext(ctx, "DELETE FROM members WHERE over = 1 AND asked < ? AND (flood = '' OR flood NOT IN (SELECT approval FROM deliveries))", old)
	return err
}

// row is a delivery that is due.
type row struct {
	approval, want, place string
	first, last           int64
	tries                 int
}

// deliver sends what is due to s, one after the other. Each destination has a
// goroutine of its own: one that is down delays no other.
func (o *Outbox) deliver(ctx context.Context, s Sender) {
	var failed int // attempts in a row that met a destination that is down
	for ctx.Err() == nil {
		r, wait, err := o.due(ctx, s.Name())
		if err != nil {
			if ctx.Err() == nil {
				o.c.Log.Error("the outbox cannot be read", zap.Error(err))
			}
			wait = o.c.MinWait
		}
		if r != nil {
			down, after, err := o.attempt(ctx, s, r)
			switch {
			case err != nil && ctx.Err() == nil:
				o.c.Log.Error("the outbox cannot be written", zap.String("destination", s.Name()), zap.Error(err))
				after = max(after, o.c.MinWait)
			case down:
				failed++
				after = max(after, o.backoff(failed))
			default:
				failed = 0
			}
			if after <= 0 {
				continue
			}
			// Nothing wakes a destination that is down before its time.
			pause(ctx, after, nil)
			continue
		}
		pause(ctx, wait, o.wake[s.Name()])
	}
}

func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-wake:
	}
}

func (o *Outbox) backoff(tries int) time.Duration {
	return min(o.c.MaxWait, o.c.MinWait<<min(tries-1, 20))
}

// due returns the next delivery to make, or how long none is due.
func (o *Outbox) due(ctx context.Context, destination string) (*row, time.Duration, error) {
	now := o.c.Now().UnixMilli()
	var r row
	var at int64
	err := o.db.QueryRowContext(ctx, `SELECT approval, want, place, doubt_first, doubt_last, tries, max(next, CASE WHEN doubt_last = 0 THEN 0 ELSE doubt_last + ? END) AS at
		FROM deliveries WHERE destination = ? AND want <> have ORDER BY at > ?, CASE WHEN at > ? THEN at ELSE doubt_first END, approval LIMIT 1`,
		o.c.Settle.Milliseconds(), destination, now, now).Scan(&r.approval, &r.want, &r.place, &r.first, &r.last, &r.tries, &at)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return nil, time.Hour, nil
	case err != nil:
		return nil, 0, err
	case at > now:
		return nil, time.Duration(at-now) * time.Millisecond, nil
	}
	return &r, 0, nil
}

// attempt makes one delivery. after is how long the destination as a whole is
// to be left alone.
//
// What a crash leaves: before the first statement, the row as it was. After it
// and before Send, a doubt without a message: the next start looks, finds none
// and sends. After Send and before the last statement, a doubt and a message:
// the next start looks, finds it, and sends no second.
func (o *Outbox) attempt(ctx context.Context, s Sender, r *row) (down bool, after time.Duration, err error) {
	d, err := o.about(ctx, r.approval)
	if errors.Is(err, approvals.ErrNotFound) {
		_, err = o.db.ExecContext(ctx, "DELETE FROM deliveries WHERE approval = ? AND destination = ?", r.approval, s.Name())
		return false, 0, err
	}
	if err != nil {
		return false, o.c.MinWait, fmt.Errorf("reading %s: %w", r.approval, err)
	}
	d.Place = r.place
	now := o.c.Now().UnixMilli()
	if r.place == "" {
		first := r.first
		if first == 0 {
			first = now
		} else {
			d.Doubt = &Doubt{First: time.UnixMilli(r.first), Settled: time.UnixMilli(r.last).Add(o.c.Settle)}
		}
		if _, err := o.db.ExecContext(ctx, "UPDATE deliveries SET doubt_first = ?, doubt_last = ? WHERE approval = ? AND destination = ?", first, now, r.approval, s.Name()); err != nil {
			return false, 0, err
		}
		r.first, now = first, r.last // what a certain failure restores
		if d.Doubt == nil {
			r.first, now = 0, 0
		}
	}
	sendCtx, cancel := context.WithTimeout(ctx, o.c.Timeout)
	place, sendErr := s.Send(sendCtx, *d)
	cancel()
	// Also when Close was called meanwhile: what is known is kept.
	ctx = context.WithoutCancel(ctx)
	if sendErr == nil {
		over := int64(0)
		if d.Request != nil && Final(d.Request.Status) {
			over = o.c.Now().UnixMilli()
		}
		if d.Passkey != nil {
			place = "" // each state of a passkey is a message of its own
		}
		var next int64
		if d.Flood != nil {
			next = o.c.Now().Add(o.c.FloodWait).UnixMilli()
		}
		// Where an event changed want meanwhile, it stays and is due at once.
		_, err := o.db.ExecContext(ctx, `UPDATE deliveries SET have = ?1, place = ?2, want = CASE WHEN want = ?3 THEN ?1 ELSE want END, doubt_first = 0, doubt_last = 0,
			tries = 0, next = ?7, over = CASE WHEN over = 0 THEN ?4 ELSE over END WHERE approval = ?5 AND destination = ?6`,
			d.Version, place, r.want, over, r.approval, s.Name(), next)
		return false, 0, err
	}
	r.tries++
	wait := o.backoff(r.tries)
	var certain *Failure
	switch {
	case errors.Is(sendErr, ErrGone) && d.Passkey == nil:
		asked := o.c.Now()
		if d.Request != nil {
			asked = d.Request.Asked
		} else if d.Flood != nil {
			asked = d.Flood.First
		}
		_, err = o.db.ExecContext(ctx, "UPDATE deliveries SET place = '', have = '', tries = ?, next = ?, doubt_first = ?, doubt_last = ? WHERE approval = ? AND destination = ?",
			r.tries, o.c.Now().Add(wait).UnixMilli(), asked.UnixMilli(), o.c.Now().UnixMilli(), r.approval, s.Name())
	case errors.As(sendErr, &certain):
		wait = max(wait, certain.After)
		down, after = certain.Down, certain.After
		if !certain.Down {
			after = 0
		}
		_, err = o.db.ExecContext(ctx, "UPDATE deliveries SET tries = ?, next = ?, doubt_first = ?, doubt_last = ? WHERE approval = ? AND destination = ?",
			r.tries, o.c.Now().Add(wait).UnixMilli(), r.first, now, r.approval, s.Name())
	default:
		down = true // no answer
		_, err = o.db.ExecContext(ctx, "UPDATE deliveries SET tries = ?, next = ? WHERE approval = ? AND destination = ?",
			r.tries, o.c.Now().Add(wait).UnixMilli(), r.approval, s.Name())
	}
	o.c.Log.Warn("a notification was not delivered; trying again", zap.String("destination", s.Name()), zap.String("approval", r.approval),
		zap.Int("tries", r.tries), zap.Duration("in", wait), zap.Error(sendErr))
	return down, after, err
}
