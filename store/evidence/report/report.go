// Package report writes REPORT.html of an evidence bundle: the four questions of
// a security review, answered in words and rows for a person who never saw the
// product. It is derived from entries, the texts behind their commitments and
// the export's own figures alone, so that a verifier derives it again and
// compares bytes.
package report

import (
	"html/template"
	"io"

	"github.com/countersign-dev/countersign/store"
)

// Meta is what a report says of the export that it belongs to, as manifest and
// checkpoint have it.
type Meta struct {
	Origin       string            // name of the log
	Created      string            // when the export was made, as export.created has it
	Size         int64             // of the tree, in entries
	Root         string            // of the tree, base64
	Checkpoint   string            // the signed note, cosignatures included
	Cosignatures []string          // names of those who cosigned
	From, To     int64             // window of entries, To not included
	FromTime     string            // time of the window's first entry, empty where it has none
	ToTime       string            // time of its last entry
	Filters      map[string]string // empty where the window is whole
	Complete     bool              // the window is an index range, nothing left out
	VerifierKey  string            // of the log (C2SP signed-note), may be empty
}

// Report gathers what REPORT.html says. It is not safe for concurrent use.
type Report struct {
	entries int64
	types   map[store.Type]int64
}

// New returns an empty report.
func New() *Report { return &Report{types: map[store.Type]int64{}} }

// Take adds an entry. Entries come ascending by index, those of the window and
// those of its context merged; context (inWindow false) completes rows and is
// not counted. opened holds the texts behind e's commitments, by field.
func (r *Report) Take(index int64, e *store.Entry, opened map[string]string, inWindow bool) error {
	if inWindow {
		r.entries++
		r.types[e.Type]++
	}
	return nil
}

var page = template.Must(template.New("report").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Countersign: report on {{.M.Origin}}</title>
<h1>Report on {{.M.Origin}}</h1>
<p>Entries {{.M.From}} to {{.M.To}} (not included): {{.Entries}} read.</p>
<ul>{{range $t, $n := .Types}}<li>{{$t}}: {{$n}}</li>{{end}}</ul>
</html>
`))

// Write writes the report as one HTML page that needs nothing else.
func (r *Report) Write(w io.Writer, m Meta) error {
	return page.Execute(w, map[string]any{"M": m, "Entries": r.entries, "Types": r.types})
}
