package mcp

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// stepSide is the way back to a step. net/http over HTTP/2 panics where a
// deadline is set once the handler has returned.
type stepSide struct {
	*httptest.ResponseRecorder
	returned chan struct{}
	cut      chan bool // whether it had returned when it was cut
}

func (a *stepSide) SetReadDeadline(at time.Time) error {
	if at.IsZero() || at.After(time.Now()) {
		return nil
	}
	select {
	case <-a.returned:
		a.cut <- true
	case <-time.After(100 * time.Millisecond): // time for the handler to return
		a.cut <- false
	}
	return nil
}

func (a *stepSide) SetWriteDeadline(time.Time) error { return nil }

func TestTheEndOfASessionTouchesNoAnswerThatIsGiven(t *testing.T) {
	begun := make(chan struct{})
	p := newPath(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // until then net/http does not see who hangs up
		close(begun)
		<-r.Context().Done()
	}), access())
	g := New(Config{Gateway: p.core})
	r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"hang"}}`))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	r.Header.Set("Authorization", "Bearer "+p.token)
	w := &stepSide{ResponseRecorder: httptest.NewRecorder(), returned: make(chan struct{}), cut: make(chan bool, 1)}
	go func() {
		defer close(w.returned)
		g.ServeHTTP(w, r)
	}()
	<-begun
	p.sess.Close()
	<-w.returned
	if !strings.Contains(w.Body.String(), "the session has ended") {
		t.Errorf("the step is told %s", w.Body)
	}
	if <-w.cut {
		t.Error("a deadline was set after the handler had returned")
	}
}

func TestTheLogQuotesNothingOfAServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer func() { _ = l.Close() }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4<<10))
			_, _ = c.Write([]byte("Ada Byron, ada@example.com, " + apiKey + "\r\n\r\n"))
			_ = c.Close()
		}
	}()
	var logged bytes.Buffer
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&logged), zap.DebugLevel))
	p := newPath(t, nil, access(store.MaskRule{Detector: "email"}), func(c *Config) { c.Log = log })
	a := *p.params.Grant.Access
	a.Upstream = "http://" + l.Addr().String() + "/"
	other := p.params
	other.Intent, other.Grant.Access = store.NewID(), &a
	c := p.raw(t)
	_, c.token = p.open(other)
	if r := c.send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); !strings.Contains(r.body, "could not be reached") {
		t.Errorf("%s", r.body)
	}
	if said := logged.String(); !strings.Contains(said, "an MCP server failed") || strings.Contains(said, "Ada") || strings.Contains(said, "example.com") || strings.Contains(said, apiKey) {
		t.Errorf("the log says %s", said)
	}
}

func TestARequestToAnotherHostIsNotAnswered(t *testing.T) {
	p := newPath(t, nil, access())
	c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	ok(t, err)
	defer func() { _ = c.Close() }()
	body := `{"jsonrpc":"2.0","id":2,"method":"ping"}`
	_, err = fmt.Fprintf(c, "POST http://other.test/mcp HTTP/1.1\r\nHost: other.test\r\nContent-Type: application/json\r\nAccept: */*\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", p.token, len(body), body)
	ok(t, err)
	ok(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || !strings.Contains(line, " 404 ") {
		t.Errorf("%q %v", line, err)
	}
}

func TestPeopleAreNotAskedAboutArgumentsThatTheyCannotSee(t *testing.T) {
	p := newPath(t, nil, access())
	p.core.OnAsk(func(context.Context, *gateway.Session, string, string) (*gateway.Session, error) {
		t.Error("people were asked")
		return nil, gateway.ErrDenied
	})
	r := p.raw(t).send(t.Context(), `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"refund_order","arguments":{"note":"`+strings.Repeat("x", maxReason)+`","cents":100000}}}`)
	if !strings.Contains(r.body, "longer than people can be asked to approve") || !p.refused("tools/call refund_order") {
		t.Errorf("%d %s", r.status, r.body)
	}
}
