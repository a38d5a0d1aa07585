package witness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Prover is the log that asks: *ledger.Ledger.
type Prover interface {
	Size() int64
	Root(ctx context.Context, size int64) (tlog.Hash, error)
	Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error)
}

// Client asks one witness. It is safe for concurrent use.
type Client struct {
	url  string // the submission prefix, without the slash that may end it
	v    *torchwood.CosignatureVerifier
	log  *store.LogVerifier
	http *http.Client
}

// NewClient takes the witness's submission prefix and verifier key, the key of
// the log that it is asked about, and how to trust the witness's certificate:
// nil is the machine's roots.
func NewClient(url, key string, log *store.LogVerifier, t *trust.Trust) (*Client, error) {
	v, err := torchwood.NewCosignatureVerifier(key)
	if err != nil {
		return nil, fmt.Errorf("witness key %q: %w", key, err)
	}
	return &Client{url: strings.TrimSuffix(url, "/"), v: v, log: log, http: &http.Client{
		Transport: t.Transport(http.DefaultTransport.(*http.Transport).Clone()),
		// The witness that was named is asked, and no other.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Name is the witness's name, of its key.
func (c *Client) Name() string { return c.v.Name() }

// Dispute is the error where a witness says that the log it is asked about is
// not the one that it cosigned: forked, or put back to an older state.
type Dispute struct {
	Witness string
	Kind    string // Forked or RolledBack
	Size    int64  // of the checkpoint that the witness cosigned last
	Theirs  string // that checkpoint, signed by the log; empty where the witness does not show it
	Ours    string // the checkpoint that the witness refused
	// Proved: Theirs is signed with the log's own key and is of no tree that the
	// log has. Otherwise it is the witness's word.
	Proved bool
}

// Kinds of dispute.
const (
	Forked     = "log-forked"
	RolledBack = "log-rolled-back"
)

func (d *Dispute) Error() string {
	what := "has cosigned another tree of this log"
	if d.Kind == RolledBack {
		what = "has cosigned more of this log than there is"
	}
	word := "which it does not show"
	if d.Proved {
		word = "signed with the log's own key"
	}
	return fmt.Sprintf("witness %s %s: %d entries, %s", d.Witness, what, d.Size, word)
}

// errBehind is returned where the witness cosigned a newer checkpoint of this
// log than the one it is asked about.
var errBehind = errors.New("the witness has cosigned a newer checkpoint of this log")

// answerLimit caps what is read of a witness's answer, in bytes.
const answerLimit = 64 << 10

// Ask asks for cosignatures of checkpoint, which p signed, and returns those of
// the witness's key, verified, and the size that the witness is at. old is the
// size that the witness cosigned last, as far as known; 0 where it is not.
// Errors are a *Dispute, or say that there is no cosignature this time.
func (c *Client) Ask(ctx context.Context, p Prover, checkpoint string, old int64) ([]note.Signature, int64, error) {
	ours, err := c.log.Checkpoint(checkpoint)
	if err != nil {
		return nil, old, err
	}
	old = min(old, ours.N)
	// Once with what is known, once with what the answer says; a third time
	// where another of this log's processes asked in between.
	for range 3 {
		r := &request{old: old, note: checkpoint}
		if old > 0 && old < ours.N {
			if r.proof, err = p.Consistency(ctx, old, ours.N); err != nil {
				return nil, old, fmt.Errorf("proving %d entries from %d: %w", ours.N, old, err)
			}
		}
		status, body, err := c.post(ctx, r)
		if err != nil {
			return nil, old, err
		}
		switch status {
		case http.StatusOK:
			sigs, err := c.cosignatures(checkpoint, body)
			if err != nil {
				return nil, old, err
			}
			return sigs, ours.N, nil
		case http.StatusConflict:
			size, ok := parseSize(strings.TrimSuffix(string(body), "\n"))
			switch {
			case old == ours.N && (!ok || size == old):
				// C2SP asks for no body where the sizes agree and the roots do not.
				return nil, old, c.dispute(ctx, p, Forked, old, checkpoint)
			case !ok || size == old:
				return nil, old, fmt.Errorf("witness %s answers a conflict that is none", c.Name())
			case size > p.Size():
				return nil, old, c.dispute(ctx, p, RolledBack, size, checkpoint)
			case size > ours.N:
				return nil, size, errBehind
			}
			old = size
		case http.StatusUnprocessableEntity:
			if old == 0 {
				return nil, 0, fmt.Errorf("witness %s refuses the first checkpoint", c.Name())
			}
			return nil, old, c.dispute(ctx, p, Forked, old, checkpoint)
		case http.StatusNotFound:
			return nil, old, fmt.Errorf("witness %s does not know the log %q, or its URL is not %s", c.Name(), ours.Origin, c.url)
		case http.StatusForbidden:
			return nil, old, fmt.Errorf("witness %s does not accept the log's signature: it has another key for %q", c.Name(), ours.Origin)
		default:
			return nil, old, fmt.Errorf("witness %s answers %d", c.Name(), status)
		}
	}
	return nil, old, fmt.Errorf("witness %s changes its size faster than it is asked", c.Name())
}

func (c *Client) post(ctx context.Context, r *request) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"/add-checkpoint", bytes.NewReader(r.marshal()))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "text/plain; charset=utf-8")
	return c.do(req)
}

func (c *Client) do(req *http.Request) (int, []byte, error) {
	res, err := c.http.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("witness %s: %w", c.Name(), err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, answerLimit+1))
	switch {
	case err != nil:
		return 0, nil, fmt.Errorf("witness %s: %w", c.Name(), err)
	case len(body) > answerLimit:
		return 0, nil, fmt.Errorf("witness %s answers more than %d bytes", c.Name(), answerLimit)
	}
	return res.StatusCode, body, nil
}

// cosignatures verifies what a witness answered. Lines of keys other than its
// own are ignored (C2SP tlog-witness).
func (c *Client) cosignatures(checkpoint string, lines []byte) ([]note.Signature, error) {
	text, _, ok := cutNote(checkpoint)
	if !ok {
		return nil, errors.New("the checkpoint is no signed note")
	}
	n, err := note.Open(append([]byte(text+"\n"), lines...), note.VerifierList(c.v))
	if err != nil {
		return nil, fmt.Errorf("witness %s answers no cosignature of its key: %w", c.Name(), err)
	}
	return n.Sigs, nil
}

// dispute asks the witness for the checkpoint that it cosigned, which a witness
// of this program shows, and judges it. Where it proves to be of this log's own
// tree after all, the error says so and is no Dispute.
func (c *Client) dispute(ctx context.Context, p Prover, kind string, size int64, ours string) error {
	d := &Dispute{Witness: c.Name(), Kind: kind, Size: size, Ours: ours}
	theirs, signed := c.shown(ctx)
	if signed == "" || theirs.N < size {
		return d
	}
	d.Size = theirs.N
	if theirs.N > p.Size() {
		d.Kind, d.Theirs, d.Proved = RolledBack, signed, true
		return d
	}
	root, err := p.Root(ctx, theirs.N)
	if err != nil {
		return fmt.Errorf("comparing with the checkpoint of witness %s: %w", c.Name(), err)
	}
	if root == theirs.Hash {
		return fmt.Errorf("witness %s refuses this log, and shows a checkpoint that is its own", c.Name())
	}
	d.Kind, d.Theirs, d.Proved = Forked, signed, true
	return d
}

// shown is what GET /logs of the witness says of the log, where the log signed it.
func (c *Client) shown(ctx context.Context) (torchwood.Checkpoint, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/logs", nil)
	if err != nil {
		return torchwood.Checkpoint{}, ""
	}
	status, body, err := c.do(req)
	if err != nil || status != http.StatusOK {
		return torchwood.Checkpoint{}, ""
	}
	var list []Head
	if err := json.Unmarshal(body, &list); err != nil {
		return torchwood.Checkpoint{}, ""
	}
	for _, h := range list {
		if h.Origin != c.log.Origin() || len(h.Checkpoint) > MaxBody {
			continue
		}
		if theirs, err := c.log.Checkpoint(h.Checkpoint); err == nil {
			return theirs, h.Checkpoint
		}
	}
	return torchwood.Checkpoint{}, ""
}

// cutNote splits a signed note into its text and its signature lines.
func cutNote(signed string) (text, lines string, ok bool) {
	i := strings.LastIndex(signed, "\n\n")
	if i < 0 {
		return "", "", false
	}
	return signed[:i+1], signed[i+2:], true
}

// timeout bounds one Ask.
const timeout = 10 * time.Second
