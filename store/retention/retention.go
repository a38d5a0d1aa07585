// Package retention erases sealed texts once they were kept as long as the
// recorder's policy says: by the sensitivity of what they are about, unless a
// hold covers them. Each erasure is on record before it happens.
package retention

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Least is the shortest time that texts may be kept: a step and its approval are
// long over by then.
const Least = time.Hour

// Config is what Open needs. Ledger, By and File must be set.
type Config struct {
	Ledger *ledger.Ledger
	By     ledger.Eraser // whose last policy.loaded says how long texts are kept, see Announce
	// File remembers how far the log is done, so that no tick goes over all of it.
	// It can be derived again: lost, the next tick begins at the beginning.
	File  string
	Every time.Duration // between two looks at what is due; 1 min by default
	Log   *zap.Logger   // none by default
}

// Retention erases what is due until it is closed.
type Retention struct {
	c      Config
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu   sync.Mutex // one sweep at a time
	done progress
}

// progress is how far the log is done, as File has it. Each member may be lower
// than it could be: work is then done again, to no effect.
type progress struct {
	Log      string           `json:"log"`      // the log's name: the file of another log says nothing
	Finished int64            `json:"finished"` // erasures on record below it are done
	Lifted   int64            `json:"lifted"`   // holds lifted below it are taken into account
	Scopes   []string         `json:"scopes"`   // that had a class of their own when Marks were set, sorted
	Marks    map[string]int64 `json:"marks"`    // by class: below it is nothing to erase but what is held
}

// Open finishes the erasures that a crash left undone, before anything is read,
// and begins to erase what is due.
func Open(ctx context.Context, c Config) (*Retention, error) {
	if c.Ledger == nil || c.By.Name == "" || c.By.Agent == "" || c.File == "" {
		return nil, errors.New("retention needs a ledger, in whose name it erases, and a file")
	}
	if c.Every <= 0 {
		c.Every = time.Minute
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	r := &Retention{c: c}
	r.read()
	if err := r.finish(ctx); err != nil {
		return nil, fmt.Errorf("finishing what was erased: %w", err)
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.cancel = cancel
	r.tasks.Go(func() { r.loop(run) })
	return r, nil
}

// Close ends what Open began. An erasure under way is broken off: the next Open
// finishes it.
func (r *Retention) Close() error {
	r.cancel()
	r.tasks.Wait()
	return nil
}

func (r *Retention) loop(ctx context.Context) {
	for {
		if n, err := r.Sweep(ctx); err != nil && ctx.Err() == nil {
			r.c.Log.Error("texts whose time is over could not be erased; trying again", zap.Error(err), zap.Duration("in", r.c.Every))
		} else if n > 0 {
			r.c.Log.Info("texts were erased whose time was over", zap.Int("entries", n))
		}
		select {
		case <-ctx.Done():
			return
		case <-r.c.Ledger.Done():
			return
		case <-time.After(r.c.Every):
		}
	}
}

// Sweep erases all that is due by what is now on record, and returns the texts of
// how many entries.
func (r *Retention) Sweep(ctx context.Context) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.finish(ctx); err != nil {
		return 0, err
	}
	first, size, err := r.c.Ledger.Lifted(ctx, r.done.Lifted)
	if err != nil {
		return 0, err
	}
	if first >= 0 {
		for class, mark := range r.done.Marks {
			r.done.Marks[class] = min(mark, first)
		}
	}
	r.done.Lifted = size
	last, err := r.c.Ledger.Loaded(ctx, r.c.By.Name)
	if err != nil {
		return 0, err
	}
	if last == nil {
		last = &store.PolicyDetails{}
	}
	classes, of := classes(last.Retention)
	if !slices.Equal(of, r.done.Scopes) {
		// What was in a class of its own may be in another's now, below its mark.
		r.done.Scopes, r.done.Marks = of, map[string]int64{}
	}
	total := 0
	for _, k := range classes {
		n, err := r.erase(ctx, k.Class, k.kept)
		total += n
		if err != nil {
			return total, errors.Join(err, r.write())
		}
	}
	// Each erasure above was done to its end.
	r.done.Finished = r.c.Ledger.Size()
	return total, r.write()
}

type class struct {
	ledger.Class
	kept time.Duration
}

// classes are what kept says, in a fixed order, and the scopes that have classes
// of their own, sorted.
func classes(kept map[string]store.Duration) (out []class, of []string) {
	for _, key := range slices.Sorted(maps.Keys(kept)) {
		least := time.Duration(kept[key])
		scope, own := strings.CutPrefix(key, ledger.OfScope)
		if !own {
			out = append(out, class{ledger.Class{Sensitivity: key}, least})
			continue
		}
		of = append(of, scope)
		for _, s := range slices.Sorted(maps.Keys(kept)) {
			if s != "" && !strings.HasPrefix(s, ledger.OfScope) {
				out = append(out, class{ledger.Class{Sensitivity: s, Scope: scope}, max(time.Duration(kept[s]), least)})
			}
		}
	}
	return out, of
}

// erase erases what is due of one class, batch by batch. In between it rests as
// long as it worked, up to a second: appends go first.
func (r *Retention) erase(ctx context.Context, k ledger.Class, kept time.Duration) (total int, err error) {
	key := k.Sensitivity
	if k.Scope != "" {
		key += " " + k.Scope
	}
	for {
		began := time.Now()
		due, next, err := r.c.Ledger.Due(ctx, r.c.By, k, kept, r.done.Marks[key], store.MaxErased)
		if err != nil {
			return total, err
		}
		if len(due) > 0 {
			err := r.c.Ledger.Erase(ctx, r.c.By, due, k.Sensitivity, kept)
			var refused *ledger.ErasureError
			if errors.As(err, &refused) {
				// A hold came in between. What it leaves is for the next look.
				r.c.Log.Info("an erasure was refused", zap.Error(err))
				return total, nil
			}
			if err != nil {
				return total, err
			}
			total += len(due)
		}
		r.done.Marks[key] = next
		if len(due) < store.MaxErased {
			return total, nil
		}
		select {
		case <-ctx.Done():
			return total, ctx.Err()
		case <-time.After(min(time.Since(began), time.Second)):
		}
	}
}

// finish erases what is on record as erased and was left by a crash.
func (r *Retention) finish(ctx context.Context) error {
	upTo, err := r.c.Ledger.FinishErasures(ctx, r.done.Finished)
	if err != nil {
		return err
	}
	if upTo == r.done.Finished {
		return nil
	}
	r.done.Finished = upTo
	return r.write()
}

// read reads File. One that is missing, damaged or of another log says nothing.
func (r *Retention) read() {
	r.done = progress{Log: r.log()}
	b, err := os.ReadFile(r.c.File)
	if errors.Is(err, fs.ErrNotExist) {
		r.done.Marks = map[string]int64{}
		return
	}
	var p progress
	if err == nil {
		err = json.Unmarshal(b, &p, json.RejectUnknownMembers(true))
	}
	size := r.c.Ledger.Size()
	ok := err == nil && p.Log == r.done.Log && p.Finished >= 0 && p.Finished <= size && p.Lifted >= 0 && p.Lifted <= size
	for _, m := range p.Marks {
		ok = ok && m >= 0 && m <= size
	}
	if !ok {
		r.c.Log.Warn("how far texts are erased is not known; going over the whole log", zap.String("file", r.c.File), zap.Error(err))
		p = progress{Log: r.done.Log}
	}
	if r.done = p; r.done.Marks == nil {
		r.done.Marks = map[string]int64{}
	}
}

// log is the log's name: the first line of its checkpoint.
func (r *Retention) log() string {
	origin, _, _ := strings.Cut(r.c.Ledger.Head(), "\n")
	return origin
}

// write keeps the progress. A crash before it leaves the old one, which is lower.
func (r *Retention) write() error {
	b, err := json.Marshal(&r.done, json.Deterministic(true))
	if err != nil {
		return err
	}
	return durable.WriteFile(r.c.File, b)
}

// Loaded is what is in force at the recorder: its own catalogue and policy,
// empty where it has none, and how long texts are kept.
type Loaded struct {
	Digest, CatalogueDigest, PolicyDigest string
	Catalogue, Policy                     string // their texts
	// Kept is how long texts are kept: by sensitivity, "" for what is about no
	// scope, and by ledger.OfScope and a scope's name. What is not named is kept
	// for good.
	Kept map[string]time.Duration
}

// Announce puts x on record as policy.loaded by the recorder, where it differs
// from the last one that has its name; where there is none and x is empty,
// nothing. Texts are erased by what is on record alone, so it comes before Open.
// now is the recorder's clock. Errors wrap store.ErrUnavailable.
func Announce(ctx context.Context, l *ledger.Ledger, by ledger.Eraser, now time.Time, x Loaded) error {
	d := store.PolicyDetails{Digest: x.Digest, Catalogue: x.CatalogueDigest, Policy: x.PolicyDigest}
	for class, kept := range x.Kept {
		if d.Retention == nil {
			d.Retention = map[string]store.Duration{}
		}
		d.Retention[class] = store.Duration(kept)
	}
	last, err := l.Loaded(ctx, by.Name)
	if err != nil {
		return err
	}
	if last == nil {
		last = &store.PolicyDetails{}
	}
	if last.Digest == d.Digest && last.Catalogue == d.Catalogue && last.Policy == d.Policy && maps.Equal(last.Retention, d.Retention) {
		return nil
	}
	d.Previous = last.Digest
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.PolicyLoaded, WriterTime: store.At(now),
		Agent: by.Agent, Action: string(store.PolicyLoaded),
	}}
	s.SetDetails(d)
	s.Seal(store.SealedCatalogue, x.Catalogue)
	s.Seal(store.SealedPolicy, x.Policy)
	line, err := s.Marshal()
	if err != nil {
		return err
	}
	if _, err := l.Append(ctx, ledger.Author{Name: by.Name, Recorder: true}, [][]byte{line}); err != nil {
		return fmt.Errorf("recording %s: %w", s.Type, err)
	}
	return nil
}
