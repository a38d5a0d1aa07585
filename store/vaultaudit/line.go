package vaultaudit

import (
	"bytes"
	"errors"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

// maxLine is the longest line that is looked at, in bytes. Vault writes a
// request's and an answer's whole structure into one, hashed: a long list makes
// a long line.
const maxLine = 8 << 20

// mark is in the metadata of every token that the issuer makes, and so in every
// line about one. Lines with neither it nor a role of ours are not decoded. By
// its name a token is not told: a broker's login may be called countersign too.
const mark = `"intent"`

// audited is what is read of a line of Vault's audit log (JSON format, as of
// Vault 1.21; audit/format in its sources). What is HMAC'd stays so.
type audited struct {
	Time  time.Time `json:"time"`
	Type  string    `json:"type"` // request or response
	Error string    `json:"error"`
	Auth  *struct {
		Accessor string            `json:"accessor"` // HMAC'd, unless the device was told not to
		Metadata map[string]string `json:"metadata"` // in the clear
	} `json:"auth"`
	Request struct {
		ID        string `json:"id"`
		Operation string `json:"operation"`
		Path      string `json:"path"`
		Namespace struct {
			Path string `json:"path"`
		} `json:"namespace"`
		Data jsontext.Value `json:"data"`
	} `json:"request"`
	Response struct {
		Auth *struct {
			Accessor string            `json:"accessor"`
			Metadata map[string]string `json:"metadata"`
		} `json:"auth"`
		WrapInfo *struct {
			WrappedAccessor string `json:"wrapped_accessor"`
		} `json:"wrap_info"`
	} `json:"response"`
}

// event is one answered request that is ours to judge.
type event struct {
	at      time.Time
	id      string // Vault's request ID
	what    string // operation and path, as people read it
	op      string
	path    string
	failed  string // why it failed; empty where it did not
	by      *token // who asked, where it is a token that says it is ours
	created *token // what it made under one of our roles
}

// token is what a line says of a token.
type token struct {
	accessor string // HMAC'd as a rule
	request  string // from its metadata, which is in the clear
	intent   string
	hashed   string // the intent, HMAC'd, of a wrapped token: its metadata is not in the answer
}

var errLine = errors.New("not a line of Vault's audit log")

// parse reads one line. It returns nil where the line is none of ours: a
// request that is not answered yet, or one that is about other tokens.
func parse(line []byte, rolePrefix string) (*event, error) {
	// A prefix may be configured in Vault, such as @cee:.
	from := bytes.IndexByte(line, '{')
	if from < 0 {
		if len(bytes.TrimSpace(line)) == 0 {
			return nil, nil
		}
		return nil, errLine
	}
	line = line[from:]
	if !bytes.Contains(line, []byte(mark)) && !bytes.Contains(line, []byte(rolePrefix)) {
		return nil, nil
	}
	var a audited
	if err := json.Unmarshal(line, &a); err != nil {
		return nil, errLine // the error itself may quote the line
	}
	if a.Type != "response" {
		return nil, nil
	}
	if a.Request.ID == "" || a.Time.IsZero() || a.Time.Before(time.Unix(0, 0)) || a.Time.Year() > 9000 {
		return nil, errLine
	}
	e := &event{at: a.Time, id: clean(a.Request.ID, 128), op: a.Request.Operation, path: a.Request.Path}
	e.what = clean(a.Request.Operation, 32) + " " + clean(a.Request.Namespace.Path+a.Request.Path, 512)
	switch {
	case strings.Contains(a.Error, "permission denied"):
		e.failed = "permission-denied"
	case a.Error != "":
		e.failed = "error" // Vault's words may hold values
	}
	if a.Auth != nil && a.Auth.Metadata["intent"] != "" && a.Auth.Metadata["request"] != "" {
		e.by = newToken(a.Auth.Accessor, a.Auth.Metadata)
	}
	if role, ok := strings.CutPrefix(a.Request.Path, createPath); ok && strings.HasPrefix(role, rolePrefix) {
		switch r := a.Response; {
		case r.Auth != nil && r.Auth.Accessor != "":
			e.created = newToken(r.Auth.Accessor, r.Auth.Metadata)
		case r.WrapInfo != nil && r.WrapInfo.WrappedAccessor != "":
			e.created = newToken(r.WrapInfo.WrappedAccessor, nil)
			var asked struct {
				Meta map[string]string `json:"meta"`
			}
			if json.Unmarshal(a.Request.Data, &asked) == nil { // else it has another form than the issuer's
				e.created.hashed = asked.Meta["intent"]
			}
		}
	}
	if e.by == nil && e.created == nil {
		return nil, nil
	}
	return e, nil
}

func newToken(accessor string, meta map[string]string) *token {
	t := &token{accessor: accessor, request: meta["request"], intent: meta["intent"]}
	if !store.ValidID(t.request) || len(t.intent) > 64 || t.intent == "" {
		t.request, t.intent = "", "" // not as the issuer writes it: matches nothing
	}
	return t
}

// clean makes a text fit for the record: UTF-8 without control characters, at
// most n bytes, and no token in it, as old paths may have.
func clean(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) {
			return '.'
		}
		return r
	}, s)
	parts := strings.Split(s, "/")
	for i, p := range parts {
		if len(p) > 20 && (strings.HasPrefix(p, "hvs.") || strings.HasPrefix(p, "hvb.") || strings.HasPrefix(p, "s.")) {
			parts[i] = "…"
		}
	}
	s = strings.Join(parts, "/")
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
