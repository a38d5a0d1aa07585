package evidence

import (
	"bufio"
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// HistoryColumns are the columns of history as a table.
var HistoryColumns = []string{"index", "time", "type", "orchestrator", "run", "step", "scope", "outcome", "request", "details"}

// maxRowText is the longest text in bytes that a row shows. A catalogue, or an
// ID token, would push everything else out of sight.
const maxRowText = 2000

// HistoryRow is one entry in HistoryColumns.
func HistoryRow(index int64, e *store.Entry, opened map[string]string) []string {
	outcome := ""
	if e.Decision != nil {
		outcome = string(e.Decision.Outcome)
	}
	var more []string
	if e.Cause != nil {
		more = append(more, "cause "+*e.Cause)
	}
	if e.Decision != nil && e.Decision.Outcome == store.Deny {
		more = append(more, e.Decision.Reasons...)
	}
	for _, field := range slices.Sorted(maps.Keys(opened)) {
		if n := len(opened[field]); n > maxRowText {
			more = append(more, fmt.Sprintf("%s of %d bytes, in the entry itself", field, n))
			continue
		}
		more = append(more, field+" "+strconv.Quote(opened[field]))
	}
	return []string{
		strconv.FormatInt(index, 10), e.Time.String(), string(e.Type), e.Orchestrator, e.Run, e.Step, e.Action, outcome, e.Request,
		strings.Join(more, "; "),
	}
}

// Line writes an entry as one line of an export, without its newline.
type Line func(index int64, leaf []byte, e *store.Entry, opened map[string]string) ([]byte, error)

// ExportCSV writes the entries that o selects as HistoryColumns.
func ExportCSV(ctx context.Context, l *ledger.Ledger, w io.Writer, o ExportOptions) error {
	out := csv.NewWriter(w)
	if err := out.Write(HistoryColumns); err != nil {
		return err
	}
	err := flat(ctx, l, o, func(it *exported) error {
		cells := HistoryRow(it.Index, it.Entry, it.opened())
		for i, c := range cells {
			cells[i] = Cell(c)
		}
		return out.Write(cells)
	})
	if err != nil {
		return err
	}
	out.Flush()
	return out.Error()
}

// ExportLines writes the entries that o selects as line has them.
func ExportLines(line Line) Format {
	return func(ctx context.Context, l *ledger.Ledger, w io.Writer, o ExportOptions) error {
		out := bufio.NewWriterSize(w, 64<<10)
		if err := flat(ctx, l, o, func(it *exported) error {
			b, err := line(it.Index, it.Leaf, it.Entry, it.opened())
			if err == nil {
				_, err = out.Write(append(b, '\n'))
			}
			return err
		}); err != nil {
			return err
		}
		return out.Flush()
	}
}

// JSONLine is an entry as GET /history has it: its leaf as it is, and the texts
// behind its commitments.
func JSONLine(index int64, leaf []byte, _ *store.Entry, opened map[string]string) ([]byte, error) {
	return json.Marshal(&struct {
		Index  int64             `json:"index"`
		Entry  jsontext.Value    `json:"entry"`
		Opened map[string]string `json:"opened,omitzero"`
	}{index, leaf, opened}, json.Deterministic(true))
}

// flat calls fn for every entry that o selects.
func flat(ctx context.Context, l *ledger.Ledger, o ExportOptions, fn func(*exported) error) error {
	s, err := newSelection(ctx, l, o.Query, o.From, o.To, l.Size())
	if err != nil {
		return err
	}
	done, of := int64(0), s.count()
	o.progress(done, of)
	for it, err := range s.items(ctx) {
		if err != nil {
			return err
		}
		if err := fn(it); err != nil {
			return err
		}
		if done++; done%pageSize == 0 {
			o.progress(done, of)
		}
	}
	o.progress(done, of)
	return nil
}
