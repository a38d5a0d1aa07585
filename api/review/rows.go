package review

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
)

// Columns are the columns of an entry where it is one flat row: in CSV and in a
// terminal's table.
var Columns = []string{"index", "time", "type", "orchestrator", "run", "step", "scope", "outcome", "request", "details"}

// Row is an entry in Columns. The error wraps store.ErrMalformed.
func Row(e client.HistoryEntry) ([]string, error) {
	x, err := store.ParseLeaf(e.Entry)
	if err != nil {
		return nil, fmt.Errorf("entry %d: %w", e.Index, err)
	}
	outcome := ""
	if x.Decision != nil {
		outcome = string(x.Decision.Outcome)
	}
	var more []string
	if x.Cause != nil {
		more = append(more, "cause "+*x.Cause)
	}
	if x.Decision != nil && x.Decision.Outcome == store.Deny {
		more = append(more, x.Decision.Reasons...)
	}
	for _, field := range slices.Sorted(maps.Keys(e.Opened)) {
		more = append(more, field+" "+strconv.Quote(e.Opened[field]))
	}
	return []string{
		strconv.FormatInt(e.Index, 10), x.Time.String(), string(x.Type), x.Orchestrator, x.Run, x.Step, x.Action, outcome, x.Request,
		strings.Join(more, "; "),
	}, nil
}

// Cells makes the cells of a row fit for CSV: a spreadsheet would run a cell
// that begins with one of these as a formula.
func Cells(row []string) []string {
	for i, cell := range row {
		if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
			row[i] = "'" + cell
		}
	}
	return row
}
