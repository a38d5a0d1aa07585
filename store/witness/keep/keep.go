// Package keep carries a log's checkpoints to places out of the recorder's
// reach: a mailbox, a Slack channel, a file on another disk. A checkpoint that
// someone still has is what a log rewritten since then cannot explain
// (`countersign verify --since`).
package keep

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
)

// Place is where checkpoints are kept.
type Place interface {
	// Name tells the place from others, and is the same after a restart.
	Name() string
	// Keep returns nil once the place has the checkpoint. It must not return
	// secrets in its error.
	Keep(ctx context.Context, checkpoint Checkpoint) error
}

// Checkpoint is what is kept.
type Checkpoint struct {
	Origin string
	Size   int64
	Note   string // signed, with cosignatures
	At     time.Time
}

// Config says what is kept where. Places, Published and File must be set.
type Config struct {
	Places    []Place
	Origin    string           // the log's
	Published func() string    // the signed checkpoint published last; empty: none yet
	File      string           // what was sent last, by place
	Every     time.Duration    // 24 h where zero
	Now       func() time.Time // time.Now where nil
	Log       *zap.Logger      // none where nil
}

// Keeper sends the published checkpoint to each place when it starts, unless
// the place had one less than Every ago, and each Every. It goes on sending
// where nothing was appended: a day without one is a sign.
type Keeper struct {
	c     Config
	sent  map[string]sent
	fails map[string]fails
}

// sent is one line of the file.
type sent struct {
	At   time.Time `json:"at"`
	Size int64     `json:"size"`
}

type fails struct {
	n     int
	after time.Time
}

// New reads what was sent last.
func New(c Config) (*Keeper, error) {
	if len(c.Places) == 0 || c.Published == nil || c.File == "" {
		return nil, errors.New("to keep checkpoints takes a place, a log and a file")
	}
	if c.Every == 0 {
		c.Every = 24 * time.Hour
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	k := &Keeper{c: c, sent: map[string]sent{}, fails: map[string]fails{}}
	names := map[string]bool{}
	for _, p := range c.Places {
		if names[p.Name()] {
			return nil, fmt.Errorf("%s is named twice", p.Name())
		}
		names[p.Name()] = true
	}
	b, err := os.ReadFile(c.File)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &k.sent); err != nil {
		return nil, fmt.Errorf("%s: %w; remove it and each place gets one checkpoint more", c.File, err)
	}
	return k, nil
}

// Run keeps checkpoints until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	t := time.NewTicker(min(k.c.Every, 5*time.Second))
	defer t.Stop()
	for {
		k.Send(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Send sends to the places that are due, one after the other. It is what Run
// does again and again, and not safe for concurrent use.
func (k *Keeper) Send(ctx context.Context) {
	for _, p := range k.c.Places {
		now := k.c.Now()
		// A time ahead of now is of a clock that was put back since: it counts for
		// nothing, or nothing would be kept until then.
		last, fail := k.sent[p.Name()].At, k.fails[p.Name()].after
		if !now.Before(last) && now.Before(last.Add(k.c.Every)) || now.Before(fail) && !now.Before(fail.Add(-retryMost)) {
			continue
		}
		signed := k.c.Published()
		if signed == "" {
			return
		}
		log := k.c.Log.With(zap.String("place", p.Name()))
		size, err := store.CheckpointSize(signed)
		if err == nil {
			try, cancel := context.WithTimeout(ctx, sendTime)
			err = p.Keep(try, Checkpoint{Origin: k.c.Origin, Size: size, Note: signed, At: now.UTC()})
			cancel()
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			f := k.fails[p.Name()]
			f.n++
			f.after = now.Add(min(retryFirst<<min(f.n-1, 10), retryMost))
			k.fails[p.Name()] = f
			log.Error("the checkpoint is not kept", zap.Error(err), zap.Time("again", f.after))
			continue
		}
		delete(k.fails, p.Name())
		k.sent[p.Name()] = sent{now.UTC(), size}
		// A crash before this is on disk sends the same checkpoint once more.
		if err := k.save(); err != nil {
			log.Error("what was kept is not on disk: after a restart it is sent again", zap.Error(err))
		}
		log.Info("checkpoint kept", zap.Int64("size", size))
	}
}

const (
	sendTime   = time.Minute
	retryFirst = 30 * time.Second
	retryMost  = time.Hour
)

func (k *Keeper) save() error {
	b, err := json.Marshal(k.sent, json.Deterministic(true))
	if err != nil {
		return err
	}
	return durable.WriteFile(k.c.File, b)
}
