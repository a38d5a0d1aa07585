package witness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"
)

// Published is a ledger as its publisher needs it: *ledger.Ledger.
type Published interface {
	Prover
	Head() string // the latest checkpoint
	Publish(ctx context.Context, checkpoint string) error
}

// PublisherConfig says whom a log asks and what it waits for. Key, Witnesses
// and Record must be set.
type PublisherConfig struct {
	Key       string // the log's verifier key
	Witnesses []*Client
	// Policy is what a published checkpoint has to meet where Withhold is set;
	// see Quorum and ParsePolicy.
	Policy   torchwood.Policy
	Withhold bool
	// File keeps the checkpoint that was published last, so that a restart goes
	// on from it; due with Withhold. Without Withhold none is written.
	File  string
	Every time.Duration // between two checkpoints; 2 s where zero
	// Record appends one entry in the recorder's own name: alert.raised, with
	// AlertDetails.
	Record func(context.Context, *store.Submission) error
	Agent  string      // of those entries
	Log    *zap.Logger // none where nil

	patience time.Duration // the constant, but in tests
}

// AlertDetails are the details of the alert.raised that a Dispute leads to. The
// two checkpoints are evidence by themselves to whoever has the log's key.
type AlertDetails struct {
	Alert   string `json:"alert"` // Forked or RolledBack
	Witness string `json:"witness"`
	Size    int64  `json:"size"`            // of the checkpoint that the witness cosigned last
	Ours    string `json:"ours"`            // checkpoint
	Theirs  string `json:"theirs,omitzero"` // checkpoint; empty where the witness does not show it
	Proved  bool   `json:"proved"`          // theirs is signed by the log and is of no tree that it has
}

// Publisher publishes a log's checkpoints with cosignatures.
//
// Without Withhold a checkpoint is published once all witnesses that were asked
// have answered, or a second has passed, and again with each cosignature that
// comes later. With it, a checkpoint is published once its cosignatures meet the
// policy; while they do not, what was published before stays. In both, nothing
// new is published while a witness disputes the log: who is to be shown a log
// that a witness knows another version of?
//
// Appends, their receipts and brokers do not wait for any of this.
type Publisher struct {
	c   PublisherConfig
	log *store.LogVerifier

	// What follows belongs to the goroutine of Run.
	peers     []*peer
	candidate *candidate // the newest that witnesses are asked about
	published int64      // size; -1: nothing
	answers   chan answer
}

// WitnessStatus is how a witness stands.
type WitnessStatus struct {
	Name     string
	Size     int64 // of the last checkpoint that it cosigned since the start; 0: none
	Disputes bool  // it knows another version of this log
}

// Status says how each witness stands, in the order of the configuration. It is
// safe while Run runs.
func (p *Publisher) Status() []WitnessStatus {
	list := make([]WitnessStatus, len(p.peers))
	for i, w := range p.peers {
		list[i] = WitnessStatus{w.client.Name(), w.size.Load(), w.disputes.Load()}
	}
	return list
}

// peer is what is known of one witness.
type peer struct {
	client  *Client
	old     int64 // what it cosigned last, as far as known
	busy    bool
	signed  string    // the text it cosigned last
	after   time.Time // not asked again before
	fails   int
	dispute *Dispute        // nil: none
	alerted map[string]bool // disputes on record

	size     atomic.Int64 // what Status says
	disputes atomic.Bool
}

// candidate is one checkpoint with the cosignatures that came.
type candidate struct {
	size int64
	text string
	note string             // as the log signed it
	log  []note.Signature   // the log's own
	sigs [][]note.Signature // by peer
	asks int                // under way
	late time.Time          // without Withhold, published from then on, whoever has not answered
	seen int                // how many signatures it was published with
}

// patience is how long a checkpoint waits for its cosignatures without Withhold,
// so that who reads it finds them on it.
const patience = time.Second

type answer struct {
	peer int
	c    *candidate
	sigs []note.Signature
	old  int64
	err  error
}

// NewPublisher checks c: a policy that the configured witnesses cannot meet is
// an error.
func NewPublisher(c PublisherConfig) (*Publisher, error) {
	if len(c.Witnesses) == 0 || c.Record == nil {
		return nil, errors.New("a publisher needs witnesses and a record")
	}
	if c.Every == 0 {
		c.Every = 2 * time.Second
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.patience == 0 {
		c.patience = patience
	}
	log, err := store.NewLogVerifier(c.Key)
	if err != nil {
		return nil, err
	}
	p := &Publisher{c: c, log: log, published: -1, answers: make(chan answer)}
	all, err := ownSignature(c.Key)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, w := range c.Witnesses {
		if k := w.v.String(); seen[k] {
			return nil, fmt.Errorf("witness key %s is named twice: one witness is one voice", k)
		} else if seen[k] = true; w.log.Origin() != log.Origin() {
			return nil, fmt.Errorf("witness %s is asked about the log %q", w.Name(), w.log.Origin())
		}
		p.peers = append(p.peers, &peer{client: w, alerted: map[string]bool{}})
		all = append(all, note.Signature{Name: w.v.Name(), Hash: w.v.KeyHash()})
	}
	if c.Withhold {
		if c.Policy == nil || c.File == "" {
			return nil, errors.New("to withhold checkpoints takes a policy and a file")
		}
		if err := c.Policy.Check(log.Origin(), all); err != nil {
			return nil, fmt.Errorf("the policy cannot be met by the witnesses that are asked: %w", err)
		}
	}
	return p, nil
}

// ownSignature is the log's signature as a policy sees it: its key's name and hash.
func ownSignature(key string) ([]note.Signature, error) {
	v, err := note.NewVerifier(key)
	if err != nil {
		return nil, err
	}
	return []note.Signature{{Name: v.Name(), Hash: v.KeyHash()}}, nil
}

// Quorum is the policy that n of the witnesses cosigned.
func Quorum(n int, witnesses []*Client) (torchwood.Policy, error) {
	if n < 1 || n > len(witnesses) {
		return nil, fmt.Errorf("a quorum of %d of %d witnesses", n, len(witnesses))
	}
	var each []torchwood.Policy
	for _, w := range witnesses {
		each = append(each, torchwood.SingleVerifierPolicy(w.v))
	}
	return torchwood.ThresholdPolicy(n, each...), nil
}

// Run publishes l until ctx ends. It may be called again then, with the log as it
// was opened anew: what l publishes does not outlast l.
func (p *Publisher) Run(ctx context.Context, l Published) {
	p.candidate, p.published = nil, -1
	for _, w := range p.peers {
		w.busy, w.signed = false, "" // whoever was asked when the last run ended has answered nobody
	}
	ctx, cancel := context.WithCancel(ctx)
	under := 0 // asks under way
	defer func() {
		cancel()
		for ; under > 0; under-- {
			<-p.answers
		}
	}()
	p.restore(ctx, l)
	t := time.NewTicker(p.c.Every)
	defer t.Stop()
	late := time.NewTimer(p.c.patience)
	defer late.Stop()
	for {
		if p.next(l) {
			late.Reset(p.c.patience)
		}
		under += p.ask(ctx, l)
		p.publish(ctx, l, p.candidate) // nobody was asked, or what kept it from being published is over
		for tick := false; !tick; {
			select {
			case <-ctx.Done():
				return
			case a := <-p.answers:
				under--
				p.take(ctx, l, a)
			case <-late.C:
				p.publish(ctx, l, p.candidate)
			case <-t.C:
				tick = true
			}
		}
	}
}

// restore publishes again what was published before the last stop, where its
// cosignatures still meet the policy.
func (p *Publisher) restore(ctx context.Context, l Published) {
	if !p.c.Withhold {
		return
	}
	b, err := os.ReadFile(p.c.File)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var c *candidate
	if err == nil {
		c, err = p.read(string(b))
	}
	if err == nil && !p.meets(c) {
		err = errors.New("its cosignatures do not meet the policy any more")
	}
	if err == nil {
		err = l.Publish(ctx, string(b))
	}
	if err != nil {
		p.c.Log.Error("the checkpoint published last is not published again", zap.String("file", p.c.File), zap.Error(err))
		return
	}
	p.published = c.size
}

// read verifies a checkpoint and the cosignatures on it.
func (p *Publisher) read(signed string) (*candidate, error) {
	head, err := p.log.Checkpoint(signed)
	if err != nil {
		return nil, err
	}
	v, err := note.NewVerifier(p.c.Key)
	if err != nil {
		return nil, err
	}
	n, err := note.Open([]byte(signed), note.VerifierList(v))
	if err != nil {
		return nil, err
	}
	own, err := note.Sign(&note.Note{Text: n.Text, Sigs: n.Sigs})
	if err != nil {
		return nil, err
	}
	c := &candidate{size: head.N, text: n.Text, note: string(own), log: n.Sigs, sigs: make([][]note.Signature, len(p.peers))}
	for i, w := range p.peers {
		if n, err := note.Open([]byte(signed), note.VerifierList(w.client.v)); err == nil {
			c.sigs[i] = n.Sigs
		}
	}
	return c, nil
}

// meets reports whether c's signatures meet the policy.
func (p *Publisher) meets(c *candidate) bool {
	return p.c.Policy.Check(p.log.Origin(), c.all()) == nil
}

// due reports whether c may be published, as far as its own signatures go.
func (p *Publisher) due(c *candidate) bool {
	if p.c.Withhold {
		return p.meets(c)
	}
	// The first after a start waits for nobody: until then there is nothing to read.
	return c.asks == 0 || c.size == p.published || p.published < 0 || !time.Now().Before(c.late)
}

// all are c's signatures, the log's first, then those of witnesses in the order
// of the configuration.
func (c *candidate) all() []note.Signature {
	sigs := append([]note.Signature(nil), c.log...)
	for _, s := range c.sigs {
		sigs = append(sigs, s...)
	}
	return sigs
}

// signed is c as a C2SP signed note with all signatures.
func (c *candidate) signed() string {
	var b strings.Builder
	b.WriteString(c.text + "\n")
	for _, s := range c.all() {
		fmt.Fprintf(&b, "— %s %s\n", s.Name, s.Base64)
	}
	return b.String()
}

// next makes the head the candidate, where that is due, and reports whether it did.
func (p *Publisher) next(l Published) bool {
	head := l.Head()
	if c := p.candidate; c != nil {
		// A candidate is given up for a newer one only once it is published, or all
		// who were asked have answered; a slow witness would otherwise never sign
		// the one that is waited for.
		if c.note == head || c.seen == 0 && c.asks > 0 && (p.c.Withhold || time.Now().Before(c.late)) {
			return false
		}
	}
	c, err := p.read(head)
	if err != nil {
		p.c.Log.Error("the ledger's head does not verify", zap.Error(err))
		return false
	}
	c.late = time.Now().Add(p.c.patience)
	p.candidate = c
	return true
}

// publish publishes c, where it may be and has not been with these signatures.
func (p *Publisher) publish(ctx context.Context, l Published, c *candidate) {
	if c == nil || c.size < p.published || c.seen == len(c.all()) || !p.due(c) {
		return
	}
	for _, w := range p.peers {
		if w.dispute != nil {
			return
		}
	}
	signed := c.signed()
	if p.c.Withhold {
		// A crash after this leaves in the file what nobody was shown yet, and the
		// next start shows it.
		if err := durable.WriteFile(p.c.File, []byte(signed)); err != nil {
			p.c.Log.Error("a checkpoint is not published: its file cannot be written", zap.Error(err))
			return
		}
	}
	if err := l.Publish(ctx, signed); err != nil {
		if ctx.Err() == nil {
			p.c.Log.Error("a checkpoint is not published", zap.Int64("size", c.size), zap.Error(err))
		}
		return
	}
	p.published, c.seen = c.size, len(c.all())
}

// ask asks each witness that is due about the candidate, and returns how many.
func (p *Publisher) ask(ctx context.Context, l Published) (n int) {
	c := p.candidate
	if c == nil || c.size == 0 {
		return 0
	}
	for i, w := range p.peers {
		if w.busy || w.signed == c.text || time.Now().Before(w.after) {
			continue
		}
		w.busy = true
		c.asks++
		n++
		go func(old int64) {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			sigs, old, err := w.client.Ask(ctx, l, c.note, old)
			p.answers <- answer{i, c, sigs, old, err}
		}(w.old)
	}
	return n
}

// take takes one answer.
func (p *Publisher) take(ctx context.Context, l Published, a answer) {
	w := p.peers[a.peer]
	w.busy = false
	a.c.asks--
	w.old = a.old
	log := p.c.Log.With(zap.String("witness", w.client.Name()), zap.Int64("size", a.c.size))
	var d *Dispute
	switch {
	case a.err == nil:
		if w.fails > 0 || w.dispute != nil {
			log.Info("the witness cosigns again")
		}
		w.fails, w.after, w.signed, w.dispute = 0, time.Time{}, a.c.text, nil
		a.c.sigs[a.peer] = a.sigs
	case ctx.Err() != nil:
	case errors.Is(a.err, errBehind): // it is asked about the next
	case errors.As(a.err, &d):
		w.dispute = d
		w.after = time.Now().Add(backoff(&w.fails, p.c.Every))
		log.Error("a witness disputes this log: nothing is published until it cosigns again", zap.Error(d),
			zap.String("kind", d.Kind), zap.Bool("proved", d.Proved), zap.String("ours", d.Ours), zap.String("theirs", d.Theirs))
		p.alert(ctx, w, d)
	default:
		w.after = time.Now().Add(backoff(&w.fails, p.c.Every))
		log.Warn("no cosignature", zap.Error(a.err), zap.Time("again", w.after))
	}
	w.disputes.Store(w.dispute != nil)
	if a.err == nil {
		w.size.Store(a.c.size)
	}
	p.publish(ctx, l, a.c)
}

// alert puts a dispute on record, once while the process runs and the witness
// says the same.
func (p *Publisher) alert(ctx context.Context, w *peer, d *Dispute) {
	key := fmt.Sprintf("%s %t", d.Kind, d.Proved)
	if w.alerted[key] {
		return
	}
	s := &store.Submission{Entry: store.Entry{
		V: store.Version, ID: store.NewID(), Type: store.AlertRaised, WriterTime: store.At(time.Now()),
		Agent: p.c.Agent, Action: string(store.AlertRaised),
	}}
	s.SetDetails(AlertDetails{Alert: d.Kind, Witness: d.Witness, Size: d.Size, Ours: d.Ours, Theirs: d.Theirs, Proved: d.Proved})
	if err := p.c.Record(ctx, s); err != nil {
		p.c.Log.Error("the dispute is not on record yet", zap.Error(err))
		return
	}
	w.alerted[key] = true
}

// backoff is how long a witness is left alone after its n'th failure in a row:
// twice as long each time, up to a minute.
func backoff(n *int, base time.Duration) time.Duration {
	*n++
	return min(base<<min(*n-1, 10), time.Minute)
}
