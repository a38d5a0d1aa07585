package ledger

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/go-json-experiment/json/jsontext"
)

// Query selects entries. Empty fields select all.
type Query struct {
	From, To     time.Time // recorder's time; From inclusive, To exclusive
	Run          string
	Step         string
	Orchestrator string
	Scope        string
	Target       string
	Person       string // who decided: a pseudonym, or a name such as "user:NAME"
	Subject      string // on whose behalf: likewise
	Type         string
	Outcome      string
	Request      string
	Limit        int    // entries a page; 1,000 by default, 10,000 at most
	Cursor       string // Page.Next of the page before
	// Newest selects the newest Limit entries that match, still ascending, as one
	// page: it has no Next.
	Newest bool
}

// HistoryEntry is one entry of a Page.
type HistoryEntry struct {
	Index  int64             `json:"index"`
	Entry  jsontext.Value    `json:"entry"`           // the leaf as it is stored
	Opened map[string]string `json:"opened,omitzero"` // the texts behind its commitments, where not erased
}

// Page is the answer to a Query, ascending by index.
type Page struct {
	Entries []HistoryEntry `json:"entries"`
	Next    string         `json:"next,omitzero"` // cursor of the next page; empty on the last
}

const (
	defaultLimit = 1_000
	maxLimit     = 10_000
	// pageBytes is how much a page holds, leaves and texts: one that reaches it
	// ends before its Limit, unless it is of the Newest.
	pageBytes = 16 << 20
)

// filter is one equality of a query.
type filter struct{ column, value string }

// filters orders by what is likely to select least.
func (q *Query) filters(k store.PrivacyKey) []filter {
	all := []filter{
		{"request", q.Request}, {"step", q.Step}, {"person", pseudonym(k, q.Person)}, {"subject", pseudonym(k, q.Subject)}, {"run", q.Run},
		{"scope", q.Scope}, {"target", q.Target}, {"type", q.Type}, {"orchestrator", q.Orchestrator}, {"outcome", q.Outcome},
	}
	return slices.DeleteFunc(all, func(f filter) bool { return f.value == "" })
}

// pseudonym is what stands in a leaf for a person or subject. Pseudonyms have no
// colon, names of people and subjects do ("user:NAME").
func pseudonym(k store.PrivacyKey, s string) string {
	if s == "" || (strings.HasPrefix(s, "p-") && !strings.Contains(s, ":")) {
		return s
	}
	return k.Pseudonym(s)
}

// parseCursor reads an index that a page ended with.
func parseCursor(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, fmt.Errorf("%w: cursor %q is not one of a page's \"next\"", ErrQuery, s)
	}
	return n, nil
}

// History returns the entries that match q, ascending, a page at a time. A page
// goes on from an index, not from a count of rows, so that the last page costs
// what the first does.
func (l *Ledger) History(ctx context.Context, q Query) (*Page, error) {
	from, err := parseCursor(q.Cursor)
	if err != nil {
		return nil, err
	}
	switch {
	case q.Limit == 0:
		q.Limit = defaultLimit
	case q.Limit < 0 || q.Limit > maxLimit:
		return nil, fmt.Errorf("%w: limit %d, want 1 to %d", ErrQuery, q.Limit, maxLimit)
	}
	if ctx, err = l.readContext(ctx); err != nil {
		return nil, err
	}
	to := l.Size()
	if !q.From.IsZero() {
		n, err := l.firstAt(ctx, q.From, to)
		if err != nil {
			return nil, l.readErr(err)
		}
		from = max(from, n)
	}
	if !q.To.IsZero() {
		if to, err = l.firstAt(ctx, q.To, to); err != nil {
			return nil, l.readErr(err)
		}
	}
	page := &Page{Entries: []HistoryEntry{}}
	if from >= to {
		return page, nil
	}
	order, rows := "", q.Limit+1
	if q.Newest {
		order, rows = " DESC", q.Limit
	}
	query, args, err := l.plan(ctx, q.filters(l.o.PrivacyKey), from, to, order, rows)
	if err != nil {
		return nil, l.readErr(err)
	}
	parsed, size := map[int64]*store.Entry{}, 0
	if err := each(ctx, l.r, func(rows *sql.Rows) error {
		var e HistoryEntry
		if err := rows.Scan(&e.Index, (*[]byte)(&e.Entry)); err != nil {
			return err
		}
		if len(page.Entries) == q.Limit || size > pageBytes && !q.Newest {
			page.Next = strconv.FormatInt(e.Index, 10)
			return errStop
		}
		size += len(e.Entry)
		if !strings.HasSuffix(string(e.Entry), `"sealed":{}}`) {
			p, err := store.ParseLeaf(e.Entry)
			if err != nil {
				return fmt.Errorf("%w: entry %d: %w", ErrMismatch, e.Index, err)
			}
			parsed[e.Index] = p
		}
		page.Entries = append(page.Entries, e)
		return nil
	}, query, args...); err != nil && err != errStop {
		return nil, l.readErr(err)
	}
	for done := 0; done < len(page.Entries); {
		rest := page.Entries[done:]
		if size > pageBytes && done > 0 && !q.Newest {
			page.Next, page.Entries = strconv.FormatInt(rest[0].Index, 10), page.Entries[:done]
			break
		}
		n := together(len(rest), func(i int) *store.Entry { return parsed[rest[i].Index] })
		part := map[int64]*store.Entry{}
		for _, e := range rest[:n] {
			if p := parsed[e.Index]; p != nil {
				part[e.Index] = p
			}
		}
		opened, err := l.openings(ctx, l.r, part)
		if err != nil {
			return nil, l.readErr(err)
		}
		for i := range rest[:n] {
			e := &rest[i]
			for field, o := range opened[e.Index] {
				if e.Opened == nil {
					e.Opened = map[string]string{}
				}
				e.Opened[field] = o.Text
				size += len(o.Text)
			}
		}
		done += n
	}
	return page, nil
}

// readContext refuses to read once the ledger stopped.
func (l *Ledger) readContext(ctx context.Context) (context.Context, error) {
	if l.ctx.Err() != nil {
		return nil, l.closedErr()
	}
	return ctx, nil
}

// selective is how many rows make an index not worth walking while a better one
// may be at hand.
const selective = 2_000

// plan writes the statement. The index that matches fewest rows is walked in the
// order of idx; no body is read, and no JSON parsed, for an entry that does not
// match the others.
// SQLite's planner has no statistics to choose by, since they would have to be
// kept up to date, and PostgreSQL's know nothing of [from, to): counting up to a
// bound is cheaper.
func (l *Ledger) plan(ctx context.Context, fs []filter, from, to int64, order string, limit int) (string, []any, error) {
	if len(fs) == 0 {
		return "SELECT idx, body FROM (SELECT idx, body FROM entries WHERE idx >= $1 AND idx < $2 ORDER BY idx" + order + " LIMIT $3) m ORDER BY idx", []any{from, to, limit}, nil
	}
	best, err := l.narrowest(ctx, fs, from, to)
	if err != nil {
		return "", nil, err
	}
	var also strings.Builder
	args := []any{fs[best].value, from, to, limit}
	for i, f := range fs {
		if i != best {
			args = append(args, f.value)
			also.WriteString(l.e.also(f.column, len(args)))
		}
	}
	return "SELECT e.idx, e.body FROM (SELECT a.idx " + l.e.walk(fs[best].column, also.String(), order) + " LIMIT $4) m CROSS JOIN entries e WHERE e.idx = m.idx ORDER BY e.idx", args, nil
}

// narrowest is which of fs matches fewest entries of [from, to), as far as that is
// worth finding out.
func (l *Ledger) narrowest(ctx context.Context, fs []filter, from, to int64) (int, error) {
	best, least := 0, int64(selective)
	for i := 0; i < len(fs) && len(fs) > 1; i++ {
		var n int64
		q := "SELECT count(*) FROM (SELECT a.idx " + l.e.walk(fs[i].column, "", "") + " LIMIT $4) m"
		if err := l.r.QueryRowContext(ctx, q, fs[i].value, from, to, selective).Scan(&n); err != nil {
			return 0, err
		}
		if n < least {
			best, least = i, n
		}
	}
	return best, nil
}

// Count is how many entries of [from, to) match q, of which filters alone are
// read; there must be one. No body is read.
func (l *Ledger) Count(ctx context.Context, q Query, from, to int64) (n int64, err error) {
	fs := q.filters(l.o.PrivacyKey)
	if len(fs) == 0 {
		return 0, fmt.Errorf("%w: nothing to count by", ErrQuery)
	}
	if ctx, err = l.readContext(ctx); err != nil {
		return 0, err
	}
	best, err := l.narrowest(ctx, fs, from, to)
	if err != nil {
		return 0, l.readErr(err)
	}
	var also strings.Builder
	args := []any{fs[best].value, from, to}
	for i, f := range fs {
		if i != best {
			args = append(args, f.value)
			also.WriteString(l.e.also(f.column, len(args)))
		}
	}
	err = l.r.QueryRowContext(ctx, "SELECT count(*) FROM (SELECT a.idx "+l.e.walk(fs[best].column, also.String(), "")+") m", args...).Scan(&n)
	return n, l.readErr(err)
}

// firstAt is the index of the first entry of [0, size) at or after t, by
// bisection: time never decreases with the index.
func (l *Ledger) firstAt(ctx context.Context, t time.Time, size int64) (int64, error) {
	at := store.At(t)
	if at.Before(t.UTC()) {
		at = store.At(t.Add(time.Microsecond))
	}
	lo, hi := int64(0), size
	for lo < hi {
		mid := lo + (hi-lo)/2
		var s sql.NullString
		if err := l.r.QueryRowContext(ctx, "SELECT time FROM entries WHERE idx = $1", mid).Scan(&s); err != nil {
			return 0, fmt.Errorf("reading the time of entry %d: %w", mid, err)
		}
		if s.String < at.String() {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, nil
}

// jsonList is a list for engine.list.
func jsonList[T any](s []T) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // numbers and strings always marshal
	}
	return string(b)
}
