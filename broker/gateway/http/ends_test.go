package http

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

// answering is the way back to a step. net/http over HTTP/2 panics where a
// deadline is set once the handler has returned.
type answering struct {
	*httptest.ResponseRecorder
	returned, late bool
}

func (a *answering) SetReadDeadline(time.Time) error  { a.late = a.late || a.returned; return nil }
func (a *answering) SetWriteDeadline(time.Time) error { a.late = a.late || a.returned; return nil }

func TestAnExchangeThatIsCutAsItEndsTouchesNoAnswer(t *testing.T) {
	p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }), &store.Access{}, option{})
	v, err := p.g.view(p.sess)
	ok(t, err)
	w := &answering{ResponseRecorder: httptest.NewRecorder()}
	x := &exchange{g: p.g, v: v, w: w, r: httptest.NewRequest(http.MethodGet, "/orders", nil), rc: http.NewResponseController(w), by: reverse}
	x.serve()
	w.returned = true
	if w.Body.String() != "ok" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	x.cut(errTimeout)
	if w.late {
		t.Error("a deadline was set after the handler had returned")
	}
}
