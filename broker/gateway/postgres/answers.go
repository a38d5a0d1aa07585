package postgres

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgproto3"
)

// maxRow is the largest row that is masked, and the largest message that is
// held whole, in bytes. Rows that are not looked into have no bound: they are
// passed on as they arrive.
const maxRow = 64 << 20

// answers is what the goroutine that reads the target keeps.
type answers struct {
	w        *bufio.Writer // to the client; nobody else writes to it
	partial  bool          // a message to the client is cut in the middle
	told     bool          // the client was told why it ends
	skipping bool          // an error is answered, and all is skipped up to a ReadyForQuery
	problem  string        // its SQLSTATE
	blamed   *statement    // whose Parse, Bind or Describe it was
	row      []byte        // a masked row
}

// answer passes on what the target answers until it hangs up.
func (c *conn) answer() error {
	for {
		if c.target.r.Buffered() == 0 && c.w.Buffered() > 0 {
			if c.w.Flush() != nil {
				return errClient
			}
		}
		typ, n, err := c.target.r.header()
		if err != nil {
			return fmt.Errorf("%w: %w", errTarget, err)
		}
		if typ == 'D' || typ == 'd' {
			err = c.data(typ, n)
		} else {
			err = c.control(typ, n)
		}
		if err != nil {
			return err
		}
	}
}

// due is the item that the target answers now. After an error these are all
// skipped up to the end of the segment.
func (c *conn) due() *item {
	it := c.next()
	for ; c.skipping && it != nil && it.kind != syncing; it = c.next() {
		c.pop(it, false)
		status := "skipped"
		if it.kind == executing && it.st == c.blamed { // it was this one that failed, before it ran
			status, c.blamed = "", nil
		}
		c.finish(it, status, c.problem)
	}
	return it
}

// data serves a row, or COPY's data.
func (c *conn) data(typ byte, n int) error {
	it := c.due()
	if it == nil || it.kind != executing && it.kind != running {
		return c.broken(typ)
	}
	it.rows++
	it.received += int64(n)
	if typ == 'd' {
		if !it.copiesTo || hidesAny(it.columns) {
			return c.broken(typ)
		}
		body, err := c.whole(n)
		if err != nil {
			return err
		}
		c.copied(it, body)
		return c.write('d', body)
	}
	if it.plan == nil {
		if err := c.planned(it); err != nil {
			return err
		}
	}
	if it.plan.plain && len(it.sample) >= c.session.Grant.Access.Postgres.Sample {
		if err := c.target.r.relay(c.w, typ, n); err != nil {
			c.partial = true
			if err == errClient {
				return err
			}
			return fmt.Errorf("%w: %w", errTarget, err)
		}
		return nil
	}
	body, err := c.whole(n)
	if err != nil {
		return err
	}
	out, ok := body, true
	if !it.plan.plain {
		var masked int64
		if out, masked, ok = it.plan.row(c.rules.masker, c.row[:0], body); !ok {
			return errWithheld
		}
		c.row, it.masked = out, it.masked+masked
		if cap(c.row) > 1<<20 {
			c.row = nil
		}
	}
	if most := c.session.Grant.Access.Postgres.Sample; len(it.sample) < most {
		it.sample = appendSample(it.sample, out, most)
	}
	return c.write('D', out)
}

// planned decides how the rows of it are masked.
func (c *conn) planned(it *item) error {
	if c.rules.masker == nil && !hidesAny(it.columns) {
		it.plan = &plan{plain: true}
		return nil
	}
	if it.kind == running {
		it.plan = c.planOf(it.fields, it.columns)
	} else if last := &it.st.last; last.plan != nil && slices.Equal(last.formats, it.formats) &&
		(last.columns == nil) == (it.columns == nil) && slices.Equal(last.columns, it.columns) {
		it.plan = last.plan
	} else {
		it.plan = c.planOf(inFormats(it.st.fields, it.formats), it.columns)
		last.plan, last.formats, last.columns = it.plan, it.formats, it.columns
	}
	if it.plan == nil {
		// The target's tables are not what they were when its catalog was read.
		c.g.stale(c.session, c.rules)
		return errWithheld
	}
	return nil
}

// control serves all other messages.
func (c *conn) control(typ byte, n int) error {
	body, err := c.whole(n)
	if err != nil {
		return err
	}
	switch typ {
	case 'N':
		return c.notice(body)
	case 'A':
		if c.rules.masker != nil {
			return nil // its payload is whatever some trigger chose
		}
		return c.write(typ, body)
	case 'S':
		return c.parameter(body)
	case 'E':
		return c.failure(body)
	}
	it := c.due()
	if it == nil {
		return c.broken(typ)
	}
	switch {
	case typ == 'Z' && it.kind == syncing && n == 1:
		c.mu.Lock()
		c.tx = body[0]
		c.mu.Unlock()
		c.skipping = false
		// Before the next segment begins, since its client waits for this.
		if err := c.write(typ, body); err != nil {
			return err
		}
		c.pop(it, true)
		return nil
	case typ == '1' && it.kind == parsing:
		c.pop(it, true)
		c.finish(it, "PARSE", "")
		return c.write(typ, body)
	case typ == '2' && it.kind == binding, typ == '3' && it.kind == closing:
	case typ == 't' && it.kind == describing:
		types, err := parameterTypes(body)
		if err != nil {
			return err
		}
		c.mu.Lock()
		it.st.types = types
		c.mu.Unlock()
		return c.pass(it, typ, body)
	case (typ == 'T' || typ == 'n') && it.kind == describing:
		it.st.fields, it.st.last.plan = []field{}, nil
		if typ == 'T' {
			if it.st.fields, err = rowFields(body); err != nil {
				return err
			}
		}
	case typ == 'T' && it.kind == running && it.fields == nil:
		if it.fields, err = rowFields(body); err != nil {
			return err
		}
		// Before the client is told of rows that it will not get.
		if err := c.planned(it); err != nil {
			return err
		}
		return c.write(typ, body)
	case typ == 'G' && it.copies && (it.kind == executing || it.kind == running):
		c.copyIn(it)
		return c.write(typ, body)
	case typ == 'H' && it.copiesTo && (it.kind == executing || it.kind == running):
		return c.write(typ, body)
	case typ == 'c' && it.copiesTo && (it.kind == executing || it.kind == running):
		return c.write(typ, body)
	case typ == 'C' && (it.kind == executing || it.kind == running):
		tag, _, _ := cstring(body)
		c.pop(it, true)
		if it.copies {
			_, _ = fmt.Sscanf(tag, "COPY %d", &it.rows)
		}
		c.finish(it, tag, "")
		return c.write(typ, body)
	case typ == 'I' && (it.kind == executing || it.kind == running):
		c.pop(it, true)
		c.finish(it, "empty", "")
		return c.write(typ, body)
	case typ == 's' && it.kind == executing:
		c.pop(it, true)
		c.finish(it, "suspended", "")
		return c.write(typ, body)
	default:
		return c.broken(typ)
	}
	c.pop(it, true)
	return c.pass(it, typ, body)
}

// pass tells the client what it asked for.
func (c *conn) pass(it *item, typ byte, body []byte) error {
	if it.silent {
		return nil
	}
	return c.write(typ, body)
}

// copyIn lets the client's data through. The target ignores a Sync that was
// sent behind the COPY: it answers the one behind the data.
func (c *conn) copyIn(it *item) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.copying = it
	if it.extended {
		rest := slices.DeleteFunc(c.queue[c.first:], func(q *item) bool { return q.kind == syncing })
		c.queue = c.queue[:c.first+len(rest)]
	}
	c.changed.Broadcast()
}

// failure serves an ErrorResponse.
func (c *conn) failure(body []byte) error {
	var e pgproto3.ErrorResponse
	if err := e.Decode(body); err != nil {
		return fmt.Errorf("%w: %w: an error without end", errTarget, errProtocol)
	}
	severity := e.SeverityUnlocalized
	if severity == "" {
		severity = e.Severity
	}
	it := c.due()
	if severity == "FATAL" || severity == "PANIC" || it == nil {
		if it != nil {
			c.pop(it, false)
			c.finish(it, "", e.Code)
		}
		c.told = true
		_ = c.writeError(it, &e, body)
		return fmt.Errorf("%w: SQLSTATE %s", errTarget, e.Code)
	}
	if it.kind == syncing && c.skipping {
		return c.broken('E')
	}
	// An error at Sync is that of a commit: it belongs to no statement.
	c.skipping, c.problem, c.blamed = true, e.Code, it.st
	if it.kind != syncing {
		c.pop(it, false)
		c.finish(it, "", e.Code)
	}
	if it.kind == failing {
		return c.writeEncoded(it.fail)
	}
	return c.writeError(it, &e, body)
}

// writeError passes the target's error on, without what may quote a value where
// values are masked.
func (c *conn) writeError(it *item, e *pgproto3.ErrorResponse, body []byte) error {
	if c.rules.masker == nil && (it == nil || !it.tainted) {
		return c.write('E', body)
	}
	return c.writeEncoded(scrubbed(e, it == nil || it.tainted))
}

// quiet are the SQLSTATEs whose messages quote the statement alone.
var quiet = map[string]bool{
	"42601": true, // syntax_error
	"42P01": true, // undefined_table
	"42703": true, // undefined_column
	"42883": true, // undefined_function
	"42501": true, // insufficient_privilege
}

// scrubbed is e without any text that may hold a value from the target.
func scrubbed(e *pgproto3.ErrorResponse, tainted bool) *pgproto3.ErrorResponse {
	code := "XX000"
	if len(e.Code) == 5 && strings.Trim(e.Code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == "" {
		code = e.Code
	}
	severity := "ERROR"
	for _, s := range []string{e.SeverityUnlocalized, e.Severity} {
		if slices.Contains([]string{"FATAL", "PANIC", "WARNING", "NOTICE", "DEBUG", "INFO", "LOG"}, s) {
			severity = s
			break
		}
	}
	out := refusal(severity, code, "the target's message is withheld, since values are masked here")
	if quiet[code] && !tainted {
		out.Message, out.Position = e.Message, e.Position
	}
	return out
}

// notice serves a NoticeResponse, which may come at any time.
func (c *conn) notice(body []byte) error {
	it := c.due()
	if c.rules.masker == nil && (it == nil || !it.tainted) {
		return c.write('N', body)
	}
	var e pgproto3.NoticeResponse
	if err := e.Decode(body); err != nil {
		return fmt.Errorf("%w: %w: a notice without end", errTarget, errProtocol)
	}
	return c.writeEncoded((*pgproto3.NoticeResponse)(scrubbed((*pgproto3.ErrorResponse)(&e), it == nil || it.tainted)))
}

// parameter serves a ParameterStatus, which may come at any time.
func (c *conn) parameter(body []byte) error {
	name, rest, ok := cstring(body)
	value, rest, ok2 := cstring(rest)
	if !ok || !ok2 || len(rest) > 0 {
		return c.broken('S')
	}
	if !trusted(name, value) {
		return fmt.Errorf("%w: %s is not what the guard reads by", errTarget, name)
	}
	if it := c.due(); it != nil && it.tainted {
		return nil // it may be a value
	}
	return c.write('S', body)
}

// broken ends the connection of a target whose answer is to nothing that was
// asked: what was checked is not what it did.
func (c *conn) broken(typ byte) error {
	return fmt.Errorf("%w: %w: message %q out of turn", errTarget, errProtocol, typ)
}

// whole reads a message that is looked into.
func (c *conn) whole(n int) ([]byte, error) {
	if n > maxRow {
		if c.rules.masker != nil {
			return nil, errWithheld
		}
		return nil, fmt.Errorf("%w: %w: a message of %d bytes", errTarget, errProtocol, n)
	}
	b, err := c.target.r.body(n)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTarget, err)
	}
	return b, nil
}

func (c *conn) write(typ byte, body []byte) error {
	if writeMessage(c.w, typ, body) != nil {
		c.partial = true
		return errClient
	}
	return nil
}

func (c *conn) writeEncoded(m pgproto3.BackendMessage) error {
	b, err := m.Encode(nil)
	if err != nil {
		return errors.Join(errTarget, err)
	}
	if _, err := c.w.Write(b); err != nil {
		c.partial = true
		return errClient
	}
	return nil
}

// parameterTypes reads a ParameterDescription.
func parameterTypes(b []byte) ([]uint32, error) {
	if len(b) < 2 || len(b) != 2+4*int(binary.BigEndian.Uint16(b)) {
		return nil, fmt.Errorf("%w: %w: ParameterDescription", errTarget, errProtocol)
	}
	types := make([]uint32, 0, len(b)/4)
	for b = b[2:]; len(b) > 0; b = b[4:] {
		types = append(types, binary.BigEndian.Uint32(b))
	}
	return types, nil
}
