package review

import (
	"fmt"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
)

// Row is an entry in evidence.HistoryColumns. The error wraps
// store.ErrMalformed.
func Row(e client.HistoryEntry) ([]string, error) {
	x, err := store.ParseLeaf(e.Entry)
	if err != nil {
		return nil, fmt.Errorf("entry %d: %w", e.Index, err)
	}
	return evidence.HistoryRow(e.Index, x, e.Opened), nil
}

// Cells makes the cells of a row safe to open in a spreadsheet.
func Cells(row []string) []string {
	for i, cell := range row {
		row[i] = evidence.Cell(cell)
	}
	return row
}
