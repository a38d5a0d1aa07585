package record

import (
	"context"
	"fmt"
	"time"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Self is the recorder as a writer of its own log: it records refusals at its
// listener and new writers.
type Self struct {
	Ledger      *ledger.Ledger
	Name        string // on record as the writer
	TrustDomain string
}

// Record appends one entry in the recorder's own name. It is what
// auth.NewRefusals takes.
func (s Self) Record(ctx context.Context, sub *store.Submission) error {
	line, err := sub.Marshal()
	if err != nil {
		return fmt.Errorf("recording %s: %w", sub.Type, err)
	}
	if _, err := s.Ledger.Append(ctx, ledger.Author{Name: s.Name, Recorder: true}, [][]byte{line}); err != nil {
		return fmt.Errorf("recording %s: %w", sub.Type, err)
	}
	return nil
}

// Announce appends writer.added for each of writers that is not on record with
// its method yet. A crash in the middle leaves some of them announced; the
// next start announces the rest. A writer of the recorder's own name is an error:
// what it appends would pass as the recorder's.
func (s Self) Announce(ctx context.Context, writers []auth.Principal) error {
	known := map[store.WriterDetails]bool{}
	q := ledger.Query{Type: string(store.WriterAdded), Limit: 1000}
	for {
		page, err := s.Ledger.History(ctx, q)
		if err != nil {
			return fmt.Errorf("looking for known writers: %w", err)
		}
		for _, h := range page.Entries {
			e, err := store.ParseLeaf(h.Entry)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			d, err := store.DetailsAs[store.WriterDetails](e)
			if err != nil {
				return fmt.Errorf("entry %d: %w", h.Index, err)
			}
			known[d] = true
		}
		if page.Next == "" {
			break
		}
		q.Cursor = page.Next
	}
	for _, w := range writers {
		if w.Role == auth.Writer && w.Name == s.Name {
			return fmt.Errorf("a writer is named %q, as the recorder itself is on record: give it another name", w.Name)
		}
		d := store.WriterDetails{Name: w.Name, Method: w.Method}
		if w.Role != auth.Writer || known[d] {
			continue
		}
		known[d] = true
		sub := &store.Submission{Entry: store.Entry{
			V: store.Version, ID: store.NewID(), Type: store.WriterAdded, WriterTime: store.At(time.Now()),
			Agent: "spiffe://" + s.TrustDomain + "/recorder/" + s.Name, Action: "writer.added",
		}}
		sub.SetDetails(d)
		if err := s.Record(ctx, sub); err != nil {
			return err
		}
	}
	return nil
}
