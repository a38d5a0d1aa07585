package evidence

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// The columns of the tables of a bundle.
var (
	// StepsColumns are those of steps.csv: a row per credential request, in the
	// order in which requests ended, those that had not ended last.
	StepsColumns = stepsColumns[:]
	// ApprovalsColumns are those of approvals.csv: a row per decision of a person.
	ApprovalsColumns = []string{
		"index", "request", "run", "step", "scope", "target", "person", "decision", "reason", "requested_reason", "decided_at", "signed",
		"via", "groups", "standing", "approval", "requested_index", "passkey",
	}
	// UsesColumns are those of uses.csv: a row per use of a credential that was
	// seen.
	UsesColumns = []string{
		"index", "time", "request", "run", "step", "orchestrator", "identity", "scope", "target", "via", "by", "use", "outcome", "intent",
		"protocol", "objects", "statement", "status", "error", "rows", "sent", "received", "masked", "took", "masking",
	}
)

// usesStatus is the column of UsesColumns from which on a use's result stands, as
// far as "took".
const usesStatus = 17

var stepsColumns = [...]string{
	"index", "request", "run", "step", "orchestrator", "identity", "subject", "subject_proved", "scope", "target", "sensitivity",
	"outcome", "policy", "policy_reasons", "requested_reason", "requested_at", "issued_at", "kind", "revocable", "expires_at", "credentials",
	"ended_at", "ended_by", "cause", "uses", "uses_after_end", "claimed_outcome", "status", "claim_verdict", "claim_why",
}

var stepColumn = func() map[string]int {
	at := map[string]int{}
	for i, name := range stepsColumns {
		at[name] = i
	}
	return at
}()

// Erased stands in a cell for a text that the leaf commits to and that is not
// there.
const Erased = "(erased)"

// settledBytes bounds the rows that are kept after their request ended, since a
// late use, a retry or the orchestrator's own account may still come: about
// 20,000 of them. It counts what the entries hold, so that whoever derives the
// tables again writes the same rows in the same order.
const settledBytes = 16 << 20

// What is kept of uses on the access path whose result is still to come, and of
// the uses after them, since rows stand in the order of the uses. Beyond, the
// oldest is written without its result, which entries.jsonl has. A variable only
// so that tests need not fill it.
var maxPending = struct{ rows, bytes int }{50_000, 32 << 20}

// Tables derives steps.csv, approvals.csv and uses.csv in one pass over entries
// and the texts behind their commitments. The rows depend on these alone. It is
// not safe for concurrent use.
//
// Memory: what has not ended, settledBytes and maxPending.
type Tables struct {
	steps, approvals, uses *csv.Writer
	err                    error
	last                   int64
	rows                   [3]int64 // of steps, approvals, uses

	requests map[string]*stepRow   // by request: open and settled
	byStep   map[stepKey]*stepRows // the same, by step
	settled  []settledRow          // in the order of their ends
	kept     int                   // bytes in settled

	pending      []*useRow          // in the order of the uses
	pendingBytes int                // in pending
	awaited      map[string]*useRow // of pending, by entry ID, those whose result is to come
}

// stepRows are the rows of a step that are not written yet, and its account.
type stepRows struct {
	rows    []*stepRow
	account store.Account
}

// useRow is a row of uses.csv in the making.
type useRow struct {
	id      string
	request string
	cells   []string
	size    int
	done    bool
}

// NewTables returns tables that write their header lines and rows as entries
// are taken. Errors in writing come from Take and Close.
func NewTables(steps, approvals, uses io.Writer) *Tables {
	t := &Tables{
		steps: csv.NewWriter(steps), approvals: csv.NewWriter(approvals), uses: csv.NewWriter(uses),
		last: -1, requests: map[string]*stepRow{}, byStep: map[stepKey]*stepRows{}, awaited: map[string]*useRow{},
	}
	t.err = errors.Join(t.steps.Write(StepsColumns), t.approvals.Write(ApprovalsColumns), t.uses.Write(UsesColumns))
	return t
}

// Rows is how many rows have been written to each table, without their headers.
func (t *Tables) Rows() (steps, approvals, uses int64) { return t.rows[0], t.rows[1], t.rows[2] }

type stepKey struct{ orchestrator, run, step string }

// stepRow is a row of steps.csv in the making.
type stepRow struct {
	key    stepKey
	index  int64
	window bool // the row is to be written
	ended  bool
	ends   int // how often it ended: a retry opens a request again
	asked  int64
	reason string // of the request, as a cell
	cells  [len(stepsColumns)]string
	uses   int
	late   int // uses after the end
	issued int
}

type settledRow struct {
	row  *stepRow
	ends int
	size int
}

// cell is the cell of the column name.
func (r *stepRow) cell(name string) *string { return &r.cells[stepColumn[name]] }

// size is what the row counts for in settledBytes.
func (r *stepRow) size() int {
	n := 512 + len(r.reason)
	for _, c := range r.cells {
		n += len(c)
	}
	return n
}

// Take adds an entry with the texts behind its commitments, by field. Entries
// come in ascending order, those of window and context merged. Errors wrap
// store.ErrMalformed where the details of an entry cannot be read.
func (t *Tables) Take(index int64, e *store.Entry, opened map[string]string, inWindow bool) error {
	if t.err != nil {
		return t.err
	}
	if index <= t.last {
		return fmt.Errorf("entry %d after entry %d", index, t.last)
	}
	t.last = index
	if err := t.take(index, e, opened, inWindow); err != nil {
		t.err = fmt.Errorf("entry %d: %w", index, err)
	}
	return t.err
}

func (t *Tables) take(index int64, e *store.Entry, opened map[string]string, window bool) error {
	r := t.requests[e.Request]
	if e.Type != store.UseFinished {
		if err := t.ready(); err != nil {
			return err
		}
	}
	switch e.Type {
	case store.StepRequested:
		if r == nil {
			r = t.open(index, e, opened, window)
			if of := t.byStep[r.key]; of != nil { // not denied, and written at once
				_ = of.account.Requested(e) // a grant that cannot be read is for the verifier to name
			}
		}
	case store.StepFinished:
		d, err := store.DetailsAs[store.FinishedDetails](e)
		if err != nil {
			return err
		}
		if of := t.byStep[stepKey{e.Orchestrator, e.Run, e.Step}]; of != nil {
			of.account.Claimed(d)
		}
	case store.ApprovalRequested:
		if r != nil {
			r.asked, r.reason = index, text(e, opened, store.SealedReason)
			*r.cell("status") = string(store.StatusPending)
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		return t.decided(index, e, opened, window, r)
	case store.CredentialIssuing:
		d, err := store.DetailsAs[store.IssuingDetails](e)
		if err != nil {
			return err
		}
		if r == nil && d.Attempt > 1 {
			// Its row is written already: the retry has one of its own.
			r = t.open(index, e, opened, window)
		}
		if r != nil {
			r.ended = false
			*r.cell("status") = string(store.StatusApproved)
		}
	case store.CredentialIssued:
		d, err := store.DetailsAs[store.IssuedDetails](e)
		if err != nil || r == nil {
			return err
		}
		t.byStep[r.key].account.Issued(e)
		r.issued++
		r.ended = false
		if *r.cell("issued_at") == "" {
			*r.cell("issued_at") = e.Time.String()
		}
		*r.cell("kind"), *r.cell("revocable"), *r.cell("expires_at") = d.Kind, strconv.FormatBool(d.Revocable), d.Expires.String()
		*r.cell("status") = string(store.StatusIssued)
		*r.cell("ended_at"), *r.cell("ended_by"), *r.cell("cause") = "", "", ""
	case store.CredentialUsed:
		return t.used(index, e, opened, window, r)
	case store.UseFinished:
		// A result that cannot be read leaves its row without one; the verifier names
		// the entry.
		d, err := store.DetailsAs[store.UseFinishedDetails](e)
		if err != nil {
			return nil
		}
		if r != nil {
			t.byStep[r.key].account.Ended(e, d.Outcomes)
		}
		return t.finished(e, d.Outcomes)
	case store.AccessRefused:
		if r != nil {
			_ = t.byStep[r.key].account.Take(e)
		}
	case store.RequestWithdrawn, store.RequestVoid, store.ApprovalExpired, store.CredentialFailed, store.CredentialAbandoned,
		store.CredentialRevoked, store.CredentialExpired:
		if r != nil {
			return t.end(r, e, statusAfter[e.Type])
		}
	}
	return nil
}

// statusAfter is the status of a request that an entry ended.
var statusAfter = map[store.Type]string{
	store.RequestWithdrawn: string(store.StatusWithdrawn), store.RequestVoid: string(store.StatusVoid),
	store.ApprovalExpired: string(store.StatusExpired), store.CredentialFailed: string(store.StatusFailed),
	store.CredentialAbandoned: "abandoned", store.CredentialRevoked: "revoked", store.CredentialExpired: string(store.StatusClosed),
}

// open begins the row of a request with the entry that asks for it.
func (t *Tables) open(index int64, e *store.Entry, opened map[string]string, window bool) *stepRow {
	r := &stepRow{key: stepKey{e.Orchestrator, e.Run, e.Step}, index: index, window: window, asked: -1, reason: text(e, opened, store.SealedReason)}
	for name, v := range map[string]string{
		"index": strconv.FormatInt(index, 10), "request": e.Request, "run": e.Run, "step": e.Step, "orchestrator": e.Orchestrator,
		"identity": e.Agent, "scope": e.Action, "target": e.Resource, "requested_reason": r.reason, "requested_at": e.Time.String(),
		"status": string(store.StatusApproved),
	} {
		*r.cell(name) = v
	}
	if e.Subject != nil {
		*r.cell("subject"), *r.cell("subject_proved") = e.Subject.ID, strconv.FormatBool(e.Subject.Proved)
		if name := opened[store.SealedSubject]; name != "" {
			*r.cell("subject") = name
		}
	}
	if e.Risk != nil {
		*r.cell("sensitivity") = e.Risk.Sensitivity
	}
	denied := false
	if d := e.Decision; d != nil {
		*r.cell("outcome"), *r.cell("policy"), *r.cell("policy_reasons") = string(d.Outcome), d.Policy, strings.Join(d.Reasons, "; ")
		denied = d.Outcome == store.Deny
	}
	t.requests[e.Request] = r
	of := t.byStep[r.key]
	if of == nil {
		of = &stepRows{}
		t.byStep[r.key] = of
	}
	of.rows = append(of.rows, r)
	if denied && e.Type == store.StepRequested {
		t.err = t.end(r, e, string(store.StatusDenied))
	}
	return r
}

// end closes r for now, and writes the rows that have been settled longest
// where too many are kept.
func (t *Tables) end(r *stepRow, e *store.Entry, status string) error {
	r.ended = true
	r.ends++
	*r.cell("ended_at"), *r.cell("ended_by"), *r.cell("status") = e.Time.String(), string(e.Type), status
	if e.Cause != nil {
		*r.cell("cause") = *e.Cause
	}
	s := settledRow{r, r.ends, r.size()}
	t.settled = append(t.settled, s)
	t.kept += s.size
	for t.kept > settledBytes {
		if err := t.settle(); err != nil {
			return err
		}
	}
	return nil
}

// settle writes the row that ended first, unless it was opened again since.
func (t *Tables) settle() error {
	s := t.settled[0]
	t.settled[0] = settledRow{} // the row is not to live as long as the array
	t.settled = t.settled[1:]
	t.kept -= s.size
	if r := s.row; r.ended && r.ends == s.ends {
		return t.write(r)
	}
	return nil
}

// write writes r's row, where it belongs to the table, and forgets r.
func (t *Tables) write(r *stepRow) error {
	delete(t.requests, *r.cell("request"))
	of := t.byStep[r.key]
	if of.rows = slices.DeleteFunc(of.rows, func(x *stepRow) bool { return x == r }); len(of.rows) == 0 {
		delete(t.byStep, r.key)
	}
	if !r.window {
		return nil
	}
	claim, _ := of.account.Claim()
	verdict, why := of.account.Verdict()
	*r.cell("credentials"), *r.cell("uses"), *r.cell("uses_after_end") = strconv.Itoa(r.issued), strconv.Itoa(r.uses), strconv.Itoa(r.late)
	*r.cell("claimed_outcome"), *r.cell("claim_verdict"), *r.cell("claim_why") = claim.Outcome, string(verdict), why
	return t.row(0, t.steps, r.cells[:])
}

// decided writes the row of a person's decision.
func (t *Tables) decided(index int64, e *store.Entry, opened map[string]string, window bool, r *stepRow) error {
	d, err := store.DetailsAs[store.DecidedDetails](e)
	if err != nil {
		return err
	}
	if window {
		c := []string{
			strconv.FormatInt(index, 10), e.Request, e.Run, e.Step, e.Action, e.Resource, PersonOf(e, opened), d.Decision,
			text(e, opened, store.SealedReason), "", e.Time.String(), strconv.FormatBool(d.Assertion != nil), d.Via, strings.Join(d.Groups, " "), "", d.Approval, "", "",
		}
		if r != nil {
			c[9] = r.reason
			if r.asked >= 0 {
				c[16] = strconv.FormatInt(r.asked, 10)
			}
		}
		if s := d.Standing; s != nil {
			c[14] = fmt.Sprintf("%d uses of %s until %s", s.Uses, strings.Join(s.Scopes, " "), s.Until)
		}
		if d.Assertion != nil {
			c[17] = d.Assertion.Enrolled
		}
		if err := t.row(1, t.approvals, c); err != nil {
			return err
		}
	}
	if r != nil && d.Decision == store.Refuse {
		return t.end(r, e, string(store.StatusDenied))
	}
	return nil
}

// used takes a use. Its row is written at once, or where it is on the access path
// with its result.
func (t *Tables) used(index int64, e *store.Entry, opened map[string]string, window bool, r *stepRow) error {
	if !window && r == nil {
		return nil
	}
	d, err := store.DetailsAs[store.UsedDetails](e)
	if err != nil {
		return err
	}
	if r != nil {
		r.uses++
		if r.ended {
			r.late++
		}
		t.byStep[r.key].account.Used(e, d.Via)
	}
	if !window {
		return nil
	}
	outcome := ""
	if e.Decision != nil {
		outcome = string(e.Decision.Outcome)
	}
	u := &useRow{id: e.ID, request: e.Request, size: 768, done: d.Via != store.ViaGateway, cells: []string{
		strconv.FormatInt(index, 10), e.Time.String(), e.Request, e.Run, e.Step, e.Orchestrator, e.Agent, e.Action, e.Resource, d.Via, d.By, d.Use, outcome, d.Intent,
		d.Protocol, strings.Join(d.Objects, " "), text(e, opened, store.SealedStatement), "", "", "", "", "", "", "", d.Masking,
	}}
	audited := d.Via == store.ViaVaultAudit // a result follows at once where it failed, and only there
	if u.done && !audited && len(t.pending) == 0 {
		return t.row(2, t.uses, u.cells)
	}
	for _, c := range u.cells {
		u.size += len(c)
	}
	t.pending = append(t.pending, u)
	t.pendingBytes += u.size
	if !u.done || audited {
		t.awaited[u.id] = u
	}
	for len(t.pending) > maxPending.rows || t.pendingBytes > maxPending.bytes {
		if err := t.oldest(); err != nil {
			return err
		}
	}
	return nil
}

// finished takes the results of uses, and writes the rows that waited for them.
func (t *Tables) finished(e *store.Entry, outcomes []store.UseOutcome) error {
	for i := range outcomes {
		o := &outcomes[i]
		u := t.awaited[o.Use]
		if u == nil || u.request != e.Request {
			continue // outside the window, or written already
		}
		number := func(n int64) string { return strconv.FormatInt(n, 10) }
		copy(u.cells[usesStatus:], []string{o.Status, o.Error, number(o.Rows), number(o.Sent), number(o.Received), number(o.Masked), time.Duration(o.Took).String()})
		u.done = true
		delete(t.awaited, o.Use)
	}
	return t.ready()
}

// ready writes the rows that wait for nothing.
func (t *Tables) ready() error {
	for len(t.pending) > 0 && t.pending[0].done {
		if err := t.oldest(); err != nil {
			return err
		}
	}
	return nil
}

// oldest writes the first row of a use that is kept, as it is.
func (t *Tables) oldest() error {
	u := t.pending[0]
	t.pending[0] = nil // the row is not to live as long as the array
	t.pending = t.pending[1:]
	t.pendingBytes -= u.size
	delete(t.awaited, u.id)
	return t.row(2, t.uses, u.cells)
}

// Close writes the rows that are still kept: those of uses, those settled, and then by index
// those of requests that had not ended.
func (t *Tables) Close() error {
	for t.err == nil && len(t.pending) > 0 {
		t.err = t.oldest()
	}
	for t.err == nil && len(t.settled) > 0 {
		t.err = t.settle()
	}
	if t.err == nil {
		open := slices.SortedFunc(maps.Values(t.requests), func(a, b *stepRow) int { return int(a.index - b.index) })
		for _, r := range open {
			if t.err = t.write(r); t.err != nil {
				break
			}
		}
	}
	for _, w := range []*csv.Writer{t.steps, t.approvals, t.uses} {
		w.Flush()
		t.err = errors.Join(t.err, w.Error())
	}
	return t.err
}

func (t *Tables) row(n int, w *csv.Writer, cells []string) error {
	for i, c := range cells {
		cells[i] = Cell(c)
	}
	t.rows[n]++
	return w.Write(cells)
}

// Cell makes s safe to open in a spreadsheet, which would run a cell that
// begins so as a formula. Where the decimal sign is a comma, spreadsheets begin a
// cell after each semicolon, quoted or not.
func Cell(s string) string {
	if formula(s) {
		s = "'" + s
	}
	if strings.IndexByte(s, ';') < 0 {
		return s
	}
	var b strings.Builder
	for {
		cell, rest, more := strings.Cut(s, ";")
		b.WriteString(cell)
		if !more {
			return b.String()
		}
		b.WriteByte(';')
		if formula(rest) {
			b.WriteByte('\'')
		}
		s = rest
	}
}

func formula(s string) bool { return s != "" && strings.IndexByte("=+-@\t\r\n", s[0]) >= 0 }

// PersonOf is the person of an entry: the name, or where that is not there the
// pseudonym.
func PersonOf(e *store.Entry, opened map[string]string) string {
	if name := opened[store.SealedPerson]; name != "" {
		return name
	}
	if e.Person != nil {
		return *e.Person
	}
	return ""
}

// text is what is sealed in field of e, as a cell.
func text(e *store.Entry, opened map[string]string, field string) string {
	if e.Sealed[field] == "" {
		return ""
	}
	if s, ok := opened[field]; ok {
		return s
	}
	return Erased
}
