// Package store holds the record's vocabulary: the Entry and its types, the
// order in which entries may follow each other, receipts and how to check
// them. It is pure: nothing here does input or output, so that recorder,
// broker, issuer and the offline verifier judge one record alike.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxEntry is the largest leaf in bytes. A C2SP tlog-tiles entry bundle
// prefixes each entry with a 16-bit length, so that no leaf may be longer.
const MaxEntry = 65535

// MaxSubmission is the largest submission of a policy.loaded in bytes: an entry
// with the texts of catalogue and policy, which are no part of the leaf. Of any
// other type it is MaxEntry, texts included.
const MaxSubmission = 2 << 20

// Version is the entry format that this program writes.
const Version = 1

// Entry is one line of the record. Its exact stored bytes are the leaf of the
// Merkle tree, so an Entry read from a leaf is never marshalled again to be
// hashed: keep the leaf.
//
// Every entry answers the seven questions of the WIMSE AI identity draft: who
// acted (Agent), for whom (Subject), on what (Resource), what and with which
// decision (Action, Decision), when and in which story (Time, Request), at
// which risk (Risk), and what was undone and why (Cause).
type Entry struct {
	V            int               `json:"v"`
	ID           string            `json:"id"`           // UUIDv7, chosen by the writer; makes an append idempotent
	Type         Type              `json:"type"`         //
	Time         Time              `json:"time"`         // the recorder's, never decreasing
	Writer       string            `json:"writer"`       // the authenticated writer, stamped by the recorder
	WriterTime   Time              `json:"writer_time"`  // the writer's own clock
	Agent        string            `json:"agent"`        // SPIFFE ID of the acting workload
	Subject      *Subject          `json:"subject"`      // on whose behalf; nil where nobody is named
	Orchestrator string            `json:"orchestrator"` //
	Run          string            `json:"run"`
	Step         string            `json:"step"`
	Request      string            `json:"request"`
	Resource     string            `json:"resource"` // the scope's target
	Action       string            `json:"action"`   // the scope, or the route that was refused
	Decision     *Decision         `json:"decision"`
	Risk         *Risk             `json:"risk"`
	Person       *string           `json:"person"` // pseudonym of the person who decided
	Cause        *string           `json:"cause"`  // why something was undone
	Details      jsontext.Value    `json:"details"`
	Sealed       map[string]string `json:"sealed"` // field name to commitment (see Commit)
}

// Subject is the person or system on whose behalf a step runs.
type Subject struct {
	ID     string `json:"id"`     // a pseudonym (see Pseudonym)
	Proved bool   `json:"proved"` // true when a subject_token was verified
}

// Decision is what policy said.
type Decision struct {
	Outcome Outcome  `json:"outcome"`
	Policy  string   `json:"policy"` // digest of catalogue and policy in force, "sha256:<hex>"
	Reasons []string `json:"reasons"`
}

// Outcome of a policy decision.
type Outcome string

// The outcomes a decision can have.
const (
	Allow         Outcome = "allow"
	Deny          Outcome = "deny"
	NeedsApproval Outcome = "needs-approval"
)

// Risk is the sensitivity of what was asked for.
type Risk struct {
	Sensitivity string `json:"sensitivity"`
}

// Submission is what a writer hands to the recorder: an entry whose Time and
// Writer are empty, and the texts behind its commitments.
type Submission struct {
	Entry
	Openings map[string]Opening `json:"openings,omitzero"`
}

// timeLayout is RFC 3339 in UTC with a fixed width, so that text order is time
// order and an index over the text column serves ranges.
const timeLayout = "2006-01-02T15:04:05.000000Z"

// Time is an instant in microseconds, written with a fixed width. The zero
// Time is written as an empty string.
type Time struct{ time.Time }

// At returns t as the record writes it: UTC, cut to microseconds.
func At(t time.Time) Time { return Time{t.UTC().Truncate(time.Microsecond)} }

// String formats t with a fixed width.
func (t Time) String() string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(timeLayout)
}

// MarshalText implements encoding.TextMarshaler.
func (t Time) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. Any other width or zone
// than the record's own is refused.
func (t *Time) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*t = Time{}
		return nil
	}
	if len(b) != len(timeLayout) {
		return fmt.Errorf("time %q is not of the form %s", b, timeLayout)
	}
	// Read by hand: time.Parse takes other forms too, such as a comma before the
	// fraction, and a tenth of reading a leaf went into it.
	ok := true
	number := func(from, to int) (n int) {
		for _, c := range b[from:to] {
			ok = ok && c >= '0' && c <= '9'
			n = 10*n + int(c-'0')
		}
		return n
	}
	year, month, day := number(0, 4), number(5, 7), number(8, 10)
	hour, minute, second, micro := number(11, 13), number(14, 16), number(17, 19), number(20, 26)
	v := time.Date(year, time.Month(month), day, hour, minute, second, micro*1000, time.UTC)
	// time.Date carries over what is too much: 30 February becomes 2 March.
	y, m, d := v.Date()
	if !ok || b[4] != '-' || b[7] != '-' || b[10] != 'T' || b[13] != ':' || b[16] != ':' || b[19] != '.' || b[26] != 'Z' ||
		y != year || int(m) != month || d != day || hour > 23 || minute > 59 || second > 59 {
		return fmt.Errorf("time %q is not of the form %s", b, timeLayout)
	}
	t.Time = v
	return nil
}

// MarshalJSON writes t as a JSON string. It is defined because the embedded
// time.Time would otherwise decide the format.
func (t Time) MarshalJSON() ([]byte, error) { return []byte(`"` + t.String() + `"`), nil }

// UnmarshalJSON reads what MarshalJSON wrote.
func (t *Time) UnmarshalJSON(b []byte) error {
	if len(b) < 2 || b[0] != '"' || b[len(b)-1] != '"' {
		return errors.New("time is not a string")
	}
	return t.UnmarshalText(b[1 : len(b)-1])
}

// NewID returns a fresh UUIDv7 (RFC 9562) for an entry.
func NewID() string { return uuid.Must(uuid.NewV7()).String() }

// ids is the contract's rule for run, step and orchestrator names.
var ids = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z`)

// ValidID reports whether s may name a run, a step, an orchestrator or a
// request.
func ValidID(s string) bool { return ids.MatchString(s) }

// ErrMalformed is wrapped by every error about bytes that are not an entry.
var ErrMalformed = errors.New("malformed entry")

// ParseSubmission reads what a writer submitted. It is strict: unknown and
// duplicate members, invalid UTF-8, U+0000, stamps that are the recorder's to
// give, and commitments that do not match their openings are refused. Errors
// wrap ErrMalformed.
func ParseSubmission(b []byte) (*Submission, error) {
	if err := checkText(b, MaxSubmission); err != nil {
		return nil, err
	}
	if tooDeep(b) {
		return nil, fmt.Errorf("%w: nested deeper than %d", ErrMalformed, maxDepth)
	}
	var s Submission
	if err := json.Unmarshal(b, &s, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if s.Type != PolicyLoaded && len(b) > MaxEntry {
		return nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrMalformed, s.Type, len(b), MaxEntry)
	}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	return &s, nil
}

// maxDepth bounds how deep a submission nests. Databases read JSON by recursion,
// and take the longer for each level: a thousand slow a whole batch down.
const maxDepth = 64

// tooDeep reports whether JSON text b nests deeper than maxDepth. What is no JSON
// is for the decoder to refuse.
func tooDeep(b []byte) bool {
	depth, inString := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

func checkText(b []byte, most int) error {
	switch {
	case len(b) > most:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrMalformed, len(b), most)
	case !utf8.Valid(b):
		return fmt.Errorf("%w: not UTF-8", ErrMalformed)
	case hasNUL(b):
		return fmt.Errorf("%w: U+0000", ErrMalformed)
	}
	return nil
}

// hasNUL finds U+0000, raw or escaped. PostgreSQL's text cannot hold it and
// SQLite's JSON functions stop at it, so an index column could disagree with
// the leaf.
func hasNUL(b []byte) bool {
	if bytes.IndexByte(b, 0) >= 0 {
		return true
	}
	for rest := b; ; {
		i := bytes.Index(rest, []byte(`\u0000`))
		if i < 0 {
			return false
		}
		n := 0
		for j := i - 1; j >= 0 && rest[j] == '\\'; j-- {
			n++
		}
		if n%2 == 0 {
			return true
		}
		rest = rest[i+6:]
	}
}

func (s *Submission) check() error {
	id, err := uuid.Parse(s.ID)
	switch {
	case s.V != Version:
		return fmt.Errorf("v is %d, want %d", s.V, Version)
	case err != nil || id.Version() != 7 || id.String() != s.ID:
		return fmt.Errorf("id %q is not a UUIDv7", s.ID)
	case !s.Time.IsZero():
		return errors.New("time is the recorder's to set")
	case s.Writer != "":
		return errors.New("writer is the recorder's to set")
	case s.WriterTime.IsZero():
		return errors.New("writer_time is missing")
	case !s.Type.Known():
		return fmt.Errorf("type %q is unknown", s.Type)
	case s.Agent == "":
		return errors.New("agent is missing")
	}
	for name, v := range map[string]string{"orchestrator": s.Orchestrator, "run": s.Run, "step": s.Step, "request": s.Request} {
		if v != "" && !ValidID(v) {
			return fmt.Errorf("%s %q is not a valid ID", name, v)
		}
	}
	if len(s.Details) > 0 && s.Details.Kind() != '{' {
		return errors.New("details is not an object")
	}
	if len(s.Sealed) != len(s.Openings) {
		return errors.New("sealed and openings do not name the same fields")
	}
	for field, o := range s.Openings {
		if s.Sealed[field] == "" || !o.Opens(field, s.Sealed[field]) {
			return fmt.Errorf("the opening of %q does not match its commitment", field)
		}
	}
	return nil
}

// Stamp returns the leaf: the entry with the recorder's time and writer, and
// without the openings. It sets both on s. The error wraps ErrMalformed when
// the leaf would be too long.
func (s *Submission) Stamp(writer string, now Time) ([]byte, error) {
	s.Entry.Writer, s.Entry.Time = writer, now
	leaf, err := s.Entry.Marshal()
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if len(leaf) > MaxEntry {
		return nil, fmt.Errorf("%w: leaf of %d bytes, at most %d", ErrMalformed, len(leaf), MaxEntry)
	}
	return leaf, nil
}

// Accept takes the recorder's stamps from leaf, and reports whether leaf is
// otherwise line, the bytes that s was marshalled to and submitted as. Once
// accepted, s is the entry that is on record. Errors wrap ErrMalformed.
func (s *Submission) Accept(line, leaf []byte) error {
	other := fmt.Errorf("%w: what is on record is not what was submitted", ErrMalformed)
	// The stamps stand before everything that a writer chooses freely, so that
	// the first of these is the member itself.
	const first, after = `,"time":`, `,"writer_time":`
	from, to := bytes.Index(leaf, []byte(first)), bytes.Index(leaf, []byte(after))
	lineFrom, lineTo := bytes.Index(line, []byte(first)), bytes.Index(line, []byte(after))
	if from < 0 || to < from || lineFrom < 0 || lineTo < lineFrom || !bytes.Equal(leaf[:from], line[:lineFrom]) {
		return other
	}
	rest := line[lineTo:]
	if s.Openings != nil { // the last member of a submission, and none of a leaf
		openings, err := json.Marshal(s.Openings, json.Deterministic(true))
		if err != nil {
			return fmt.Errorf("%w: %v", ErrMalformed, err)
		}
		tail := `,"openings":` + string(openings) + "}"
		if !bytes.HasSuffix(rest, []byte(tail)) {
			return other
		}
		rest = append(slices.Clip(rest[:len(rest)-len(tail)]), '}')
	}
	if !bytes.Equal(leaf[to:], rest) {
		return other
	}
	var stamp struct {
		Time   Time   `json:"time"`
		Writer string `json:"writer"`
	}
	stamps := slices.Concat([]byte("{"), leaf[from+1:to], []byte("}"))
	if err := json.Unmarshal(stamps, &stamp, json.RejectUnknownMembers(true)); err != nil {
		return fmt.Errorf("%w: stamps: %v", ErrMalformed, err)
	}
	if same, err := json.Marshal(&stamp); err != nil || !bytes.Equal(same, stamps) {
		return other
	}
	if stamp.Time.IsZero() || stamp.Writer == "" {
		return fmt.Errorf("%w: stamped with writer %q and time %q", ErrMalformed, stamp.Writer, stamp.Time)
	}
	s.Entry.Time, s.Entry.Writer = stamp.Time, stamp.Writer
	return nil
}

// Marshal encodes e deterministically: members in the order of the struct,
// map keys sorted.
func (e *Entry) Marshal() ([]byte, error) { return json.Marshal(e, json.Deterministic(true)) }

// Marshal encodes s deterministically, as it is sent to the recorder.
func (s *Submission) Marshal() ([]byte, error) { return json.Marshal(s, json.Deterministic(true)) }

// ParseLeaf reads a stored leaf. Types and members that this program does not
// know are accepted, since a verifier outlives the writer's version. Errors
// wrap ErrMalformed.
func ParseLeaf(leaf []byte) (*Entry, error) {
	if err := checkText(leaf, MaxEntry); err != nil {
		return nil, err
	}
	var e Entry
	if err := json.Unmarshal(leaf, &e); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	return &e, nil
}

// LeafHash is the RFC 6962 leaf hash of an entry's stored bytes.
func LeafHash(leaf []byte) tlog.Hash { return tlog.RecordHash(leaf) }

// Ptr returns a pointer to s, or nil for an empty string: how Person and
// Cause are set.
func Ptr(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}
