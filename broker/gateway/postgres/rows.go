package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/broker/gateway/postgres/guard"
)

// field is a column of a RowDescription.
type field struct {
	table  uint32 // OID that it comes from, where it is a table's column
	column uint16 // its attribute number there
	typ    uint32 // OID
	format int16  // 0 text, 1 binary
}

// rowFields reads a RowDescription.
func rowFields(b []byte) ([]field, error) {
	bad := fmt.Errorf("%w: %w: RowDescription", errTarget, errProtocol)
	if len(b) < 2 {
		return nil, bad
	}
	n := int(binary.BigEndian.Uint16(b))
	fields := make([]field, 0, min(n, len(b)/19))
	for b = b[2:]; n > 0; n-- {
		end := bytes.IndexByte(b, 0)
		if end < 0 || len(b) < end+19 {
			return nil, bad
		}
		f := b[end+1 : end+19]
		fields = append(fields, field{table: binary.BigEndian.Uint32(f), column: binary.BigEndian.Uint16(f[4:]),
			typ: binary.BigEndian.Uint32(f[6:]), format: int16(binary.BigEndian.Uint16(f[16:]))})
		b = b[end+19:]
	}
	if len(b) > 0 {
		return nil, bad
	}
	return fields, nil
}

// treatment is what becomes of a column's values.
type treatment byte

const (
	keep     treatment = iota
	hide               // masking.Hidden, or NULL where its type cannot hold that
	document           // JSON, masked within
	look               // shown to the detectors
)

// plan is how rows are masked.
type plan struct {
	plain   bool // nothing is, and rows pass as they are
	columns []column
}

type column struct {
	treatment treatment
	typ       uint32
	binary    bool
	text      bool // its values are any text, in both formats
}

// inFormats are fields in the formats that Bind asked for, whatever they were
// described in. It returns nil where they do not fit each other.
func inFormats(fields []field, formats []int16) []field {
	if fields == nil || len(formats) > 1 && len(formats) != len(fields) {
		return nil
	}
	out := make([]field, len(fields))
	for i, f := range fields {
		switch len(formats) {
		case 0:
			f.format = 0
		case 1:
			f.format = formats[0]
		default:
			f.format = formats[i]
		}
		out[i] = f
	}
	return out
}

// planOf makes a plan for rows of fields of which columns are hidden. It
// returns nil where they do not fit each other, so that rows must be withheld.
func (c *conn) planOf(fields []field, columns []bool) *plan {
	if fields == nil || columns != nil && len(columns) != len(fields) {
		return nil
	}
	p := &plan{plain: true, columns: make([]column, len(fields))}
	for i, f := range fields {
		if f.format != 0 && f.format != 1 {
			return nil
		}
		col := column{typ: f.typ, binary: f.format == 1, text: textual(f.typ) || c.rules.texts[f.typ]}
		switch {
		// What the guard derived from the statement, and what the target says of the
		// column's origin: either is enough.
		case columns != nil && columns[i], c.rules.hides(f):
			col.treatment = hide
		case !c.rules.rows:
		case f.typ == pgtype.JSONOID || f.typ == pgtype.JSONBOID:
			col.treatment = document
		case f.typ == pgtype.JSONArrayOID || f.typ == pgtype.JSONBArrayOID:
			col.treatment = hide // documents within another syntax
		default:
			col.treatment = look
		}
		p.plain = p.plain && col.treatment == keep
		p.columns[i] = col
	}
	return p
}

// row appends a DataRow's body, masked. It is not ok where the row is not one
// of the plan's.
func (p *plan) row(m *masking.Masker, out, body []byte) (_ []byte, masked int64, ok bool) {
	if len(body) < 2 || int(binary.BigEndian.Uint16(body)) != len(p.columns) {
		return nil, 0, false
	}
	out = append(out, body[:2]...)
	body = body[2:]
	for _, col := range p.columns {
		if len(body) < 4 {
			return nil, 0, false
		}
		n := int64(int32(binary.BigEndian.Uint32(body)))
		body = body[4:]
		if n == -1 {
			out = append(out, null...)
			continue
		}
		if n < 0 || n > int64(len(body)) {
			return nil, 0, false
		}
		value, hits := col.mask(m, body[:n])
		body = body[n:]
		masked += hits
		if value == nil {
			out = append(out, null...)
			continue
		}
		out = binary.BigEndian.AppendUint32(out, uint32(len(value)))
		out = append(out, value...)
	}
	return out, masked, len(body) == 0
}

var null = []byte{0xff, 0xff, 0xff, 0xff}

// mask returns what the client gets for v, nil for NULL, and how much of it was
// hidden.
func (col column) mask(m *masking.Masker, v []byte) ([]byte, int64) {
	switch col.treatment {
	case hide:
		return col.hidden(), 1
	case document:
		version := []byte(nil)
		if col.typ == pgtype.JSONBOID && col.binary { // jsonb_recv: a version, then text
			if len(v) == 0 || v[0] != 1 {
				return col.hidden(), 1
			}
			version, v = v[:1], v[1:]
		}
		out, hits, err := m.JSON(v)
		if err != nil {
			return col.hidden(), 1
		}
		return slices.Concat(version, out), hits
	case look:
		if !col.text {
			if col.detected(m, v) {
				return nil, 1
			}
			return v, 0
		}
		// JSON cast to text is still JSON.
		if t := bytes.TrimLeft(v, " \t\r\n"); len(t) > 0 && (t[0] == '{' || t[0] == '[') {
			if out, hits, err := m.JSON(v); err == nil {
				return present(out), hits
			} else if err == masking.ErrTooLarge {
				return col.hidden(), 1
			}
		}
		out, hits := m.Text(v)
		return present(out), hits
	}
	return v, 0
}

// present is b as a value that is there.
func present(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// detected reports whether a value that is no text looks like what is hidden:
// as it is sent, or as it reads.
func (col column) detected(m *masking.Masker, v []byte) bool {
	if !m.Detects() {
		return false
	}
	if _, hits := m.Text(v); hits > 0 {
		return true
	}
	read := []byte(nil)
	if col.binary {
		if s, ok := readable(col.typ, v); ok {
			read = []byte(s)
		}
	} else if col.typ == pgtype.ByteaOID && bytes.HasPrefix(v, []byte(`\x`)) {
		read, _ = hex.DecodeString(string(v[2:]))
	}
	if _, hits := m.Text(read); hits > 0 {
		return true
	}
	switch col.typ {
	case pgtype.Float4OID, pgtype.Float8OID, pgtype.NumericOID: // 4.111111111111111e+15
		if !col.binary {
			read = v
		}
		return m.Number(read)
	}
	return false
}

// hidden is what stands for a value of the column's type.
func (col column) hidden() []byte {
	switch {
	case col.text:
		return []byte(masking.Hidden)
	case col.typ == pgtype.JSONOID, col.typ == pgtype.JSONBOID && !col.binary:
		return []byte(`"` + masking.Hidden + `"`)
	case col.typ == pgtype.JSONBOID:
		return []byte("\x01\"" + masking.Hidden + `"`)
	}
	return nil
}

// textual reports whether values of a type are any text, in both formats.
func textual(typ uint32) bool {
	switch typ {
	case pgtype.TextOID, pgtype.VarcharOID, pgtype.BPCharOID, pgtype.NameOID, pgtype.UnknownOID:
		return true
	}
	return false
}

// appendSample appends a row to an excerpt of at most most bytes: values
// between tabs, what is not UTF-8 in hex.
func appendSample(sample, row []byte, most int) []byte {
	if len(row) < 2 {
		return sample
	}
	if len(sample) > 0 {
		sample = append(sample, '\n')
	}
	row = row[2:]
	for first := true; len(row) >= 4; first = false {
		n := int64(int32(binary.BigEndian.Uint32(row)))
		row = row[4:]
		if !first {
			sample = append(sample, '\t')
		}
		if n >= 0 && n <= int64(len(row)) {
			v := row[:n]
			row = row[n:]
			sample = append(sample, printable(v[:min(len(v), most)])...)
		} else {
			sample = append(sample, `\N`...)
		}
		if len(sample) > most {
			return sample[:most]
		}
	}
	return sample
}

// origin is a table's column, as a RowDescription names it.
type origin struct {
	table  uint32
	column uint16
}

// hides reports whether the target's own word on where a column comes from
// makes it a hidden one.
func (r *rules) hides(f field) bool {
	return f.table != 0 && r.hidden[origin{f.table, f.column}] || r.masker != nil && r.guard.TypeHidden(f.typ)
}

// originsOf reads which columns are hidden, and which types beside PostgreSQL's
// own are text.
func originsOf(ctx context.Context, m *masking.Masker, q guard.Querier) (hidden map[origin]bool, texts map[uint32]bool, err error) {
	rows, err := q.Query(ctx, `SELECT a.attrelid, a.attnum, n.nspname, c.relname, a.attname, pg_catalog.format_type(a.atttypid, NULL)
		FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
		AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'`)
	if err != nil {
		return nil, nil, err
	}
	hidden, texts = map[origin]bool{}, map[uint32]bool{}
	for _, v := range rows {
		if len(v) != 6 {
			return nil, nil, fmt.Errorf("%w: a catalog of another shape", errProtocol)
		}
		table, err := strconv.ParseUint(v[0], 10, 32)
		if err != nil {
			return nil, nil, err
		}
		column, err := strconv.ParseUint(v[1], 10, 16)
		if err != nil {
			return nil, nil, err
		}
		if m.Column(v[2], v[3], v[4], v[5]) {
			hidden[origin{uint32(table), uint16(column)}] = true
		}
	}
	rows, err = q.Query(ctx, `SELECT oid FROM pg_catalog.pg_type WHERE typname = 'citext'`)
	if err != nil {
		return nil, nil, err
	}
	for _, v := range rows {
		oid, err := strconv.ParseUint(v[0], 10, 32)
		if err != nil {
			return nil, nil, err
		}
		texts[uint32(oid)] = true
	}
	return hidden, texts, nil
}
