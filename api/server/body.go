package server

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/api/problem"
)

// Limit limits a request's body in bytes and in time. The time is a deadline on
// the connection, taken away once the body is read to its end: net/http reads
// on in the background to learn that the caller is gone, and a deadline that
// passes there ends the request's context.
func Limit(limit int64) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0 {
				rc := http.NewResponseController(w)
				timed := rc.SetReadDeadline(time.Now().Add(BodyTime)) == nil
				r.Body = &limited{ReadCloser: http.MaxBytesReader(w, r.Body, limit), rc: rc, timed: timed}
			}
			next.ServeHTTP(w, r)
		})
	}
}

type limited struct {
	io.ReadCloser
	rc    *http.ResponseController
	timed bool
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if err == io.EOF && l.timed {
		l.timed = false
		_ = l.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}

// Body reads r's whole body. The error is a problem: body-too-large over the
// router's limit, malformed where the body broke off.
func Body(r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, nil
	}
	b, err := io.ReadAll(r.Body)
	if err == nil {
		return b, nil
	}
	var big *http.MaxBytesError
	if errors.As(err, &big) {
		return nil, problem.BodyTooLarge(big.Limit)
	}
	return nil, problem.Malformed("the body broke off before its end").Because(err)
}

// Decode reads r's body as exactly one JSON value into v. Unknown and duplicate
// members, invalid UTF-8, trailing data and a missing body are refused. The
// error is a problem that names the member and repeats nothing of its value.
func Decode(r *http.Request, v any) error {
	b, err := Body(r)
	if err != nil {
		return err
	}
	return Unmarshal(b, v)
}

// Unmarshal is Decode for bytes that were read already.
func Unmarshal(b []byte, v any) error {
	if err := json.Unmarshal(b, v, json.RejectUnknownMembers(true)); err != nil {
		return problem.Malformed(explain(b, err)).Because(err)
	}
	return nil
}

// explain says what is wrong in terms of the document. The library's own text
// names Go types and may quote values, which can be secrets (a subject_token).
func explain(b []byte, err error) string {
	var (
		semantic  *json.SemanticError
		syntactic *jsontext.SyntacticError
	)
	switch {
	case len(b) == 0:
		return "the body is empty, want a JSON object"
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &syntactic):
		return fmt.Sprintf("member %q stands twice", cut(string(syntactic.JSONPointer)))
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "the JSON ends too early"
	case errors.As(err, &syntactic):
		return fmt.Sprintf("no valid JSON at byte %d", syntactic.ByteOffset)
	case errors.Is(err, json.ErrUnknownName) && errors.As(err, &semantic):
		return fmt.Sprintf("member %q is unknown", cut(string(semantic.JSONPointer)))
	case errors.As(err, &semantic) && semantic.JSONPointer != "":
		return fmt.Sprintf("member %q has a value of the wrong kind or form", cut(string(semantic.JSONPointer)))
	}
	return "the body is not the JSON object that this call takes"
}

// cut shortens a name that the caller chose.
func cut(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
