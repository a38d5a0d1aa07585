package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/api/review"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/siem"
)

// exportConfig is the section export of the recorder's configuration.
type exportConfig struct {
	Dir   string        `yaml:"dir"`   // directory of files until they are fetched, which hold opened texts; `DIR/exports` by default
	Keep  time.Duration `yaml:"keep"`  // how long a download can be resumed; 1h by default
	Bytes int64         `yaml:"bytes"` // of all of them together; 8589934592 (8 GiB) by default
}

func (c *exportConfig) check() error {
	if c.Keep < 0 || c.Bytes < 0 {
		return errors.New("export: keep and bytes are not negative")
	}
	return nil
}

// openExports returns what makes the recorder's exports. It is closed before l.
func openExports(c exportConfig, o *peopleOptions, l *ledger.Ledger) (*review.Exports, error) {
	if c.Dir == "" {
		c.Dir = filepath.Join(o.ledger.Dir, "exports")
	}
	event := func(index int64, leaf []byte, e *store.Entry, opened map[string]string) ([]byte, error) {
		return siem.Event(index, leaf, e, opened, siem.Product{Version: buildVersion(), Log: o.ledger.Signer.Name()})
	}
	return review.NewExports(review.ExportsConfig{
		Ledger: l, Dir: c.Dir, Name: recorderName, TrustDomain: o.trustDomain, PrivacyKey: o.ledger.PrivacyKey, Keep: c.Keep, Bytes: c.Bytes,
		Formats: map[string]review.ExportFormat{"ocsf": {Write: evidence.ExportLines(event), ContentType: "application/x-ndjson", Extension: ".ocsf.jsonl"}},
		Now:     o.ledger.Now, Log: o.log.Named("export").With(zap.String("dir", c.Dir)),
	})
}

func exportCommand() *cobra.Command {
	var recorder, token, output, since string
	values := map[string]*string{}
	cmd := &cobra.Command{
		Use:   "export --from T --to T [filters] -o FILE.zip",
		Short: "Take the record away as evidence",
		Long: `Take the record away, or a part of it, as evidence that is checked offline with
` + "`countersign verify FILE.zip --key VERIFIER-KEY`" + `. The recorder is named by
COUNTERSIGN_RECORDER; who asks follows from ` + "`countersign login`" + `, or from the token in
COUNTERSIGN_TOKEN. Each export is itself on record.

A bundle that nothing but --from and --to selects proves that nothing in that
time is missing. Run again after a break, with the same flags, it goes on where
it stopped (FILE.part), as long as the recorder keeps the file: an hour.`,
		Example: "  countersign export --from 2026-07-01T00:00:00Z --to 2026-10-01T00:00:00Z -o q3.zip\n  countersign export --run run-42 --format csv -o - | less -S",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "" {
				return errors.New("no file named: add -o FILE.zip, or -o - for standard output")
			}
			q := url.Values{}
			for name, v := range values {
				if *v != "" {
					q.Set(name, *v)
				}
			}
			if since != "" {
				b, err := os.ReadFile(since)
				if err != nil {
					return fmt.Errorf("since: %w", err)
				}
				size, err := store.CheckpointSize(string(b))
				if err != nil {
					return fmt.Errorf("since: %s holds no checkpoint: %w", since, err)
				}
				q.Set("since", strconv.FormatInt(size, 10))
			}
			url, token, err := person(recorder, token)
			if err != nil {
				return err
			}
			r, err := client.NewReviewer(client.Config{URL: url, Token: client.Token(token)})
			if err != nil {
				return err
			}
			d := &download{reviewer: r, query: q, file: output, log: io.Discard}
			if isatty.IsTerminal(os.Stderr.Fd()) {
				d.log = cmd.ErrOrStderr()
			}
			if output == "-" {
				err = d.stream(cmd.Context(), cmd.OutOrStdout())
			} else {
				err = d.save(cmd.Context())
			}
			if err != nil {
				return hint(err, "the recorder", "COUNTERSIGN_RECORDER")
			}
			return nil
		},
	}
	for _, f := range historyFilters {
		values[f[0]] = cmd.Flags().String(f[0], "", f[1])
	}
	values["format"] = cmd.Flags().String("format", "bundle", "bundle, csv, jsonl or ocsf")
	cmd.Flags().StringVar(&since, "since", "", "file with an earlier checkpoint, whose consistency the bundle is to prove")
	cmd.Flags().StringVarP(&output, "output", "o", "", "the file to write; - is standard output")
	cmd.Flags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.Flags().StringVar(&token, "token", "", "a reviewer's token ($COUNTERSIGN_TOKEN)")
	return cmd
}

// resumeTries is how often in a row a download that made no headway is taken up
// again.
const resumeTries = 3

// download fetches one export.
type download struct {
	reviewer *client.Reviewer
	query    url.Values
	file     string
	log      io.Writer // where progress is shown
	shown    time.Time
}

// part is what is kept beside an unfinished file, so that the next run knows
// which export it is of.
type part struct {
	ID    string              `json:"id"`
	Query map[string][]string `json:"query"`
}

func (d *download) partFile() string { return d.file + ".part" }
func (d *download) noteFile() string { return d.file + ".part.json" }

// resumable is the export whose part is there, empty where there is none for
// the same question.
func (d *download) resumable() string {
	b, err := os.ReadFile(d.noteFile())
	var p part
	if err != nil || json.Unmarshal(b, &p) != nil || len(p.Query) != len(d.query) {
		return ""
	}
	for name, v := range d.query {
		if !slices.Equal(p.Query[name], v) {
			return ""
		}
	}
	return p.ID
}

// save fetches the export into d.file by way of FILE.part. A crash leaves the
// part and its note, from which the next run goes on; the file is put in place
// whole or not at all.
func (d *download) save(ctx context.Context) error {
	id := d.resumable()
	if id != "" {
		p, err := d.reviewer.ExportProgress(ctx, id)
		if _, gone := problem.IsSlug(err, problem.SlugNotFound); gone || err == nil && p.State == "failed" {
			fmt.Fprintln(d.log, "The recorder does not keep that export any more: beginning anew.")
			id = ""
		} else if err != nil {
			return err
		}
	}
	flags := os.O_RDWR | os.O_CREATE
	if id == "" {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(d.partFile(), flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	have, err := io.Copy(sum, f)
	if err != nil {
		return err
	}
	var body io.ReadCloser
	if id == "" {
		e, err := d.reviewer.Export(ctx, d.query)
		if err != nil {
			return err
		}
		id, body = e.ID, e.Body
		note, err := json.Marshal(&part{id, d.query}, json.Deterministic(true))
		if err == nil {
			err = os.WriteFile(d.noteFile(), note, 0o600)
		}
		if err != nil {
			body.Close()
			return err
		}
	}
	if have, err = d.fetch(ctx, id, body, f, sum, have); errors.Is(err, errDigest) {
		return errors.Join(err, os.Remove(d.partFile()), os.Remove(d.noteFile()))
	} else if err != nil {
		return fmt.Errorf("%d bytes are kept in %s; run it again to go on: %w", have, d.partFile(), err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(d.partFile(), d.file); err != nil {
		return err
	}
	return os.Remove(d.noteFile())
}

// stream fetches the export to standard output.
func (d *download) stream(ctx context.Context, w io.Writer) error {
	e, err := d.reviewer.Export(ctx, d.query)
	if err != nil {
		return err
	}
	_, err = d.fetch(ctx, e.ID, e.Body, w, sha256.New(), 0)
	return err
}

// fetch writes the export from byte have on to w, whose bytes before that sum
// has taken, and checks the whole against the recorder's digest. body is the
// answer under way; nil: none. It returns how many bytes are there in all.
func (d *download) fetch(ctx context.Context, id string, body io.ReadCloser, w io.Writer, sum hash.Hash, have int64) (int64, error) {
	for tries := resumeTries; ; tries-- {
		n, done, err := d.more(ctx, id, body, io.MultiWriter(w, sum), have)
		have, body = have+n, nil
		if n > 0 {
			tries = resumeTries
		}
		var refused *problem.Problem
		var failed *writeError
		switch {
		case done != nil:
			fmt.Fprint(d.log, "\r\033[K")
			if hex.EncodeToString(sum.Sum(nil)) != done.SHA256 {
				return have, errDigest
			}
			return have, nil
		case errors.As(err, &failed):
			return have, failed.error
		case err == nil && tries > 0: // an answer is over: is it all?
		case err == nil:
			return have, errors.New("the recorder sends no more, and that is not the whole file")
		case tries <= 0 || ctx.Err() != nil || errors.As(err, &refused) || errors.Is(err, errFailed):
			return have, err
		default:
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				return have, ctx.Err()
			}
		}
	}
}

var (
	errDigest = errors.New("what came is not the recorder's file: its SHA-256 is another; run it again to begin anew")
	errFailed = errors.New("the export failed at the recorder, whose log says why; ask again")
)

// more copies body, or where there is none the rest of the export, to w. done is
// set where the file is whole already.
func (d *download) more(ctx context.Context, id string, body io.ReadCloser, w io.Writer, have int64) (n int64, done *client.ExportProgress, err error) {
	if body == nil {
		p, err := d.reviewer.ExportProgress(ctx, id)
		switch {
		case err != nil:
			return 0, nil, err
		case p.State == "failed":
			return 0, nil, errFailed
		case p.State == "ready" && p.Bytes == have:
			return 0, p, nil
		}
		if body, err = d.reviewer.ExportFrom(ctx, id, have); err != nil {
			return 0, nil, err
		}
	}
	defer body.Close()
	n, err = d.copy(w, body, have)
	return n, nil, err
}

// writeError is an error of who takes the export, not of who sends it.
type writeError struct{ error }

func (d *download) copy(w io.Writer, r io.Reader, have int64) (n int64, err error) {
	buf := make([]byte, 128<<10)
	for {
		k, err := r.Read(buf)
		if k > 0 {
			if _, err := w.Write(buf[:k]); err != nil {
				return n, &writeError{err}
			}
			n += int64(k)
			if now := time.Now(); now.Sub(d.shown) > 200*time.Millisecond {
				d.shown = now
				fmt.Fprintf(d.log, "\r\033[K%.1f MB", float64(have+n)/1e6)
			}
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
