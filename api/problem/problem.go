// Package problem holds the documents (RFC 9457) in which every API of this
// program says that a call failed: one constructor for each kind, and Write,
// the one place that sends them. Nothing of an internal error reaches the
// caller; it is logged under the request's ID, which the document carries as
// its instance.
package problem

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store"
)

// ContentType is the media type of a problem document.
const ContentType = "application/problem+json"

// base is what a problem's type consists of beside its slug.
const base = "https://countersign.dev/problems/"

// Problem is one problem document. It is an error, so that what a server sent
// is what its Go client returns.
type Problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail,omitzero"`
	Instance string `json:"instance,omitzero"` // the request's ID, as the logs have it
	// Extensions are further members (RFC 9457, section 3.2), such as the
	// state of the request that stands in the way.
	Extensions map[string]jsontext.Value `json:",embed"`

	// RetryAfter becomes the header of that name, in whole seconds, rounded up.
	RetryAfter time.Duration `json:"-"`

	cause error // for the log alone
}

// Slug is the last part of p's type, or empty when the type is not ours.
func (p *Problem) Slug() string {
	s, ok := strings.CutPrefix(p.Type, base)
	if !ok {
		return ""
	}
	return s
}

// Error names the problem in one line.
func (p *Problem) Error() string {
	name := p.Slug()
	if name == "" {
		name = strconv.Itoa(p.Status)
	}
	text := p.Detail
	if text == "" {
		text = p.Title
	}
	if text == "" {
		return name
	}
	return name + ": " + text
}

// Unwrap returns the error behind p, when p was made in this process.
func (p *Problem) Unwrap() error { return p.cause }

// With returns p with a further member. v must marshal to JSON and hold no
// secret.
func (p *Problem) With(name string, v any) *Problem {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		panic(fmt.Sprintf("problem: extension %s: %v", name, err)) // our own types always marshal
	}
	if p.Extensions == nil {
		p.Extensions = map[string]jsontext.Value{}
	}
	p.Extensions[name] = b
	return p
}

// Because returns p with the error that led to it. It is logged, never sent.
func (p *Problem) Because(err error) *Problem {
	p.cause = err
	return p
}

// Retry returns p with a Retry-After header.
func (p *Problem) Retry(after time.Duration) *Problem {
	p.RetryAfter = after
	return p
}

// Extension decodes the extension member name into v and reports whether it
// was there and decoded.
func (p *Problem) Extension(name string, v any) bool {
	b, ok := p.Extensions[name]
	return ok && json.Unmarshal(b, v) == nil
}

// Is makes errors.Is(err, problem.Frozen("")) compare the kind alone.
func (p *Problem) Is(target error) bool {
	t, ok := target.(*Problem)
	return ok && t.Type == p.Type
}

// IsSlug reports whether err is a problem with one of slugs, and returns it.
func IsSlug(err error, slugs ...string) (*Problem, bool) {
	var p *Problem
	if !errors.As(err, &p) {
		return nil, false
	}
	for _, s := range slugs {
		if p.Slug() == s {
			return p, true
		}
	}
	return p, false
}

// From says which problem err is for a caller. A *Problem anywhere in err's
// chain is itself; what is not known is Internal.
func From(err error) *Problem {
	var (
		p     *Problem
		order *store.OrderError
		big   *http.MaxBytesError
	)
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &order):
		return refusal(order).Because(err)
	case errors.As(err, &big):
		return BodyTooLarge(big.Limit).Because(err)
	case errors.Is(err, store.ErrUnavailable):
		return LedgerUnavailable().Because(err)
	case errors.Is(err, store.ErrConflict):
		return IdempotencyConflict("an entry with this ID is on record with other bytes").Because(err)
	case errors.Is(err, store.ErrMalformed):
		return Malformed(err.Error()).Because(err)
	}
	return Internal(err)
}

// refusal carries the whole refusal to the writer, which turns it back
// into a *store.OrderError. Every rule of order is a request that is not in the
// state the entry needs; a type that is not the writer's to append is the
// writer's role.
func refusal(e *store.OrderError) *Problem {
	p := RequestClosed(e.Message)
	if e.Code == store.OrderForbidden {
		p = RoleForbidden(e.Message)
	}
	return p.With("order", e)
}

// Logged logs p, to which r came, where it is this side's failure, and returns
// what r is to be told. Whoever shows problems in another form than Write's
// calls it first.
func Logged(r *http.Request, p *Problem) *Problem {
	if p.Status < http.StatusInternalServerError {
		return p
	}
	log := Logger(r.Context())
	fields := []zap.Field{zap.String("problem", p.Slug()), zap.String("method", r.Method), zap.Error(p.cause)}
	if r.Context().Err() == nil {
		log.Error("request failed", fields...)
		return p
	}
	// The caller is gone; whatever broke off broke off for that. Who closed one
	// direction alone still reads the answer, and nothing failed here.
	log.Debug("request ended with its caller", fields...)
	if p.Slug() == SlugInternal {
		return Malformed("the connection was closed before the call was answered").Because(p.cause)
	}
	return p
}

// Write answers r with the problem that err is. It is the one place where
// problem documents are sent. After the header is out it does nothing but log.
func Write(w http.ResponseWriter, r *http.Request, err error) {
	p := *Logged(r, From(err)) // a copy: the caller's may be shared
	ctx := r.Context()
	p.Instance = RequestID(ctx)
	if c := called(ctx); c != nil {
		c.sent = p.Slug()
	}
	log := Logger(ctx)
	h := w.Header()
	h.Set("Content-Type", ContentType)
	h.Set("Cache-Control", "no-store")
	h.Del("Content-Length")
	h.Del("ETag")
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((p.RetryAfter+time.Second-1)/time.Second), 10))
	}
	if p.Status == http.StatusUnauthorized {
		// RFC 6750, section 3: no error code where no usable token was sent.
		h.Set("WWW-Authenticate", `Bearer realm="countersign"`)
	}
	b, err := json.Marshal(&p, json.Deterministic(true))
	if err != nil {
		// Only an extension that repeats a member's name can do this.
		log.Error("problem document does not marshal", zap.String("problem", p.Slug()), zap.Error(err))
		p.Extensions = nil
		b, _ = json.Marshal(&p)
	}
	w.WriteHeader(p.Status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(append(b, '\n'))
	}
}

// Read returns the problem in a response's status, content type and body. A
// body that is no problem document gives a Problem with the status alone: what
// a proxy in between wrote is not repeated.
func Read(status int, contentType string, body []byte) *Problem {
	p := &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status}
	if mt, _, _ := strings.Cut(contentType, ";"); strings.TrimSpace(mt) != ContentType {
		return p
	}
	var doc Problem
	if err := json.Unmarshal(body, &doc); err != nil {
		return p
	}
	if doc.Type == "" {
		doc.Type = "about:blank"
	}
	doc.Status = status // the status line decides (RFC 9457, section 3.1.2)
	return &doc
}

type callKey struct{}

// call is what is kept of one HTTP request.
type call struct {
	id   string
	log  *zap.Logger
	sent string // slug of the problem that it was answered with
}

func called(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// NewContext returns ctx with the request's ID and the logger that problems of
// this request are logged to.
func NewContext(ctx context.Context, id string, log *zap.Logger) context.Context {
	return context.WithValue(ctx, callKey{}, &call{id: id, log: log.With(zap.String("request_id", id))})
}

// RequestID returns the ID of the HTTP request that ctx belongs to, or "".
func RequestID(ctx context.Context) string {
	if c := called(ctx); c != nil {
		return c.id
	}
	return ""
}

// Sent returns the slug of the problem that the request of ctx was answered
// with, or "". Whoever answers is to have returned.
func Sent(ctx context.Context) string {
	if c := called(ctx); c != nil {
		return c.sent
	}
	return ""
}

// Logger returns the logger of the request that ctx belongs to; without one,
// a logger that writes nothing.
func Logger(ctx context.Context) *zap.Logger {
	if c := called(ctx); c != nil {
		return c.log
	}
	return zap.NewNop()
}
