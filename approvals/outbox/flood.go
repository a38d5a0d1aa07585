package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// When one orchestrator asks for approvals of one scope more often than
// floodAfter times in floodWithin, those beyond are told together: one message
// with a count. It is by scope, so that a flood hides no other; not by run, whose
// name the orchestrator chooses. Nothing is decided together: each has its page.
const (
	floodAfter  = 5
	floodWithin = time.Minute
)

// ofFlood begins the name of a row about a flood; the first approval told with
// it follows.
const ofFlood = "flood:"

// maxRuns is how many runs of a flood are named.
const maxRuns = 10

// Flood is many requests that are told together.
type Flood struct {
	ID           string    `json:"id"` // "flood:apr_…"
	Orchestrator string    `json:"orchestrator"`
	Scope        string    `json:"scope"`
	Runs         []string  `json:"runs"`      // ten at most
	RunCount     int       `json:"run_count"` // of all
	Requests     int       `json:"requests"`  // told with this message, and with no other
	Waiting      int       `json:"waiting"`   // of them, for people
	Approved     int       `json:"approved"`  //
	Denied       int       `json:"denied"`    //
	Ended        int       `json:"ended"`     // otherwise: expired, withdrawn, void
	First        time.Time `json:"first_asked_at"`
	Last         time.Time `json:"last_asked_at"`
	URL          string    `json:"url"` // the page on which those that wait are listed
}

// Version names a state of f.
func (f *Flood) Version() string {
	return fmt.Sprintf("%d/%d/%d/%d", f.Requests, f.Approved, f.Denied, f.Ended)
}

// fold keeps which requests came, and returns the flood that r is told with;
// none where it is told by itself. What it once said of a request it says again.
func (o *Outbox) fold(ctx context.Context, tx *sql.Tx, r *approvals.Request) (flood string, err error) {
	kin := r.Orchestrator + "\n" + r.Scope
	err = tx.QueryRowContext(ctx, "SELECT flood FROM members WHERE approval = ?", r.ID).Scan(&flood)
	if errors.Is(err, sql.ErrNoRows) {
		if flood, err = o.floodOf(ctx, tx, kin, r); err != nil {
			return "", err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO members (approval, kin, run, asked, flood, status, over) VALUES (?, ?, ?, ?, ?, ?, ?)",
			r.ID, kin, r.Run, r.Asked.UnixMilli(), flood, string(r.Status), Final(r.Status))
		return flood, err
	}
	if err != nil {
		return "", err
	}
	_, err = tx.ExecContext(ctx, "UPDATE members SET status = ?, over = ? WHERE approval = ?", string(r.Status), Final(r.Status), r.ID)
	return flood, err
}

// floodOf says with which flood r, of which nothing is known yet, is to be told.
func (o *Outbox) floodOf(ctx context.Context, tx *sql.Tx, kin string, r *approvals.Request) (flood string, err error) {
	if r.Status != store.StatusPending {
		return "", nil
	}
	since := r.Asked.Add(-floodWithin).UnixMilli()
	var told, before int
	if err := tx.QueryRowContext(ctx, "SELECT (SELECT count(*) FROM deliveries WHERE approval = ?), (SELECT count(*) FROM members WHERE kin = ? AND asked > ? AND asked <= ?)",
		r.ID, kin, since, r.Asked.UnixMilli()).Scan(&told, &before); err != nil {
		return "", err
	}
	if told > 0 || before < floodAfter {
		return "", nil
	}
	err = tx.QueryRowContext(ctx, "SELECT flood FROM members WHERE kin = ? AND flood <> '' AND asked > ? ORDER BY asked DESC, approval DESC LIMIT 1", kin, since).Scan(&flood)
	if errors.Is(err, sql.ErrNoRows) {
		return ofFlood + r.ID, nil
	}
	return flood, err
}

// querier is a transaction, or the file itself.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// flood reads how a flood stands. The error is approvals.ErrNotFound where
// nothing of it is kept.
func (o *Outbox) flood(ctx context.Context, q querier, id string) (*Flood, error) {
	f := &Flood{ID: id, Runs: []string{}}
	rows, err := q.QueryContext(ctx, "SELECT kin, run, asked, status FROM members WHERE flood = ? ORDER BY asked, approval", id)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	runs := map[string]bool{}
	for rows.Next() {
		var kin, run, status string
		var asked int64
		if err := rows.Scan(&kin, &run, &asked, &status); err != nil {
			return nil, err
		}
		f.Orchestrator, f.Scope, _ = strings.Cut(kin, "\n")
		if f.Last = time.UnixMilli(asked).UTC(); f.Requests == 0 {
			f.First = f.Last
		}
		if !runs[run] && len(f.Runs) < maxRuns {
			f.Runs = append(f.Runs, run)
		}
		runs[run] = true
		f.Requests++
		switch store.Status(status) {
		case store.StatusPending:
			f.Waiting++
		case store.StatusApproved, store.StatusIssued, store.StatusFailed, store.StatusClosed:
			f.Approved++
		case store.StatusDenied:
			f.Denied++
		default:
			f.Ended++
		}
	}
	f.RunCount = len(runs)
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if f.Requests == 0 {
		return nil, approvals.ErrNotFound
	}
	return f, nil
}

// noteFlood keeps what every destination should show of a flood, of which r is
// one.
func (o *Outbox) noteFlood(ctx context.Context, tx *sql.Tx, id string, r *approvals.Request, fresh bool) error {
	f, err := o.flood(ctx, tx, id)
	if err != nil {
		return err
	}
	var first, last, over int64
	if !fresh {
		first, last = f.First.UnixMilli(), o.c.Now().UnixMilli()
	}
	if f.Waiting == 0 && Final(r.Status) {
		over = o.c.Now().UnixMilli()
	}
	for _, s := range o.c.Senders {
		if _, err := tx.ExecContext(ctx, `INSERT INTO deliveries (approval, destination, want, doubt_first, doubt_last, over) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET want = excluded.want, over = excluded.over`, id, s.Name(), f.Version(), first, last, over); err != nil {
			return err
		}
	}
	return nil
}
