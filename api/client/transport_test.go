package client_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
)

func inProcess(h http.HandlerFunc) *http.Client {
	return &http.Client{Transport: client.HandlerTransport(h)}
}

func TestInProcessAnAnswerIsReadWhileItIsWritten(t *testing.T) {
	proceed := make(chan struct{})
	c := inProcess(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "one")
		w.(http.Flusher).Flush()
		<-proceed
		fmt.Fprintln(w, "two")
	})
	resp, err := c.Get("http://x/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	if l, _ := lines.ReadString('\n'); l != "one\n" {
		t.Fatalf("%q", l)
	}
	close(proceed)
	if rest, err := io.ReadAll(lines); string(rest) != "two\n" || err != nil {
		t.Fatalf("%q %v", rest, err)
	}
}

func TestInProcessACallerWhoGoesEndsTheHandler(t *testing.T) {
	for name, leave := range map[string]func(context.CancelFunc, *http.Response){
		"cancel": func(c context.CancelFunc, _ *http.Response) { c() },
		"close":  func(_ context.CancelFunc, r *http.Response) { r.Body.Close() },
	} {
		ended, wrote := make(chan struct{}), make(chan error, 1)
		c := inProcess(func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			_, err := w.Write([]byte("x"))
			wrote <- err
			close(ended)
		})
		ctx, cancel := context.WithCancel(context.Background())
		q, _ := http.NewRequestWithContext(ctx, "GET", "http://x/", nil)
		resp, err := c.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		leave(cancel, resp)
		<-ended
		if _, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("%s: the broken answer looked whole", name)
		}
		<-wrote
		cancel()
	}
}

func TestInProcessAPanicAndADeadlineAreErrors(t *testing.T) {
	if _, err := inProcess(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }).Get("http://x/"); err == nil {
		t.Error("a panic was an answer")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	q, _ := http.NewRequestWithContext(ctx, "GET", "http://x/", nil)
	_, err := inProcess(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }).Do(q)
	if err == nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestInProcessTheHandlerSeesNothingOfItsCallersContextButItsEnd(t *testing.T) {
	type key struct{}
	inner := chi.NewRouter()
	inner.Get("/inner/{id}", func(w http.ResponseWriter, r *http.Request) {
		deadline, ok := r.Context().Deadline()
		fmt.Fprint(w, r.Context().Value(key{}), " ", chi.URLParam(r, "step"), " ", chi.URLParam(r, "id"), " ", ok && time.Until(deadline) > 30*time.Minute)
	})
	c := &http.Client{Transport: client.HandlerTransport(inner)}
	outer := chi.NewRouter()
	outer.Get("/outer/{step}", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), key{}, "the caller's"), time.Hour)
		defer cancel()
		q, _ := http.NewRequestWithContext(ctx, "GET", "http://x/inner/7", nil)
		resp, err := c.Do(q)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		io.Copy(w, resp.Body)
	})
	w := httptest.NewRecorder()
	outer.ServeHTTP(w, httptest.NewRequest("GET", "/outer/s1", nil))
	if w.Body.String() != "<nil>  7 true" {
		t.Errorf("the inner handler saw %q", w.Body)
	}
}

func TestTheBrokersClientSendsWhatTheContractSaysAndReadsProblems(t *testing.T) {
	var got *http.Request
	var body string
	b, err := client.NewBroker(client.Config{URL: "http://broker/base", Token: client.Token("t"), Transport: client.HandlerTransport(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x, _ := io.ReadAll(r.Body)
		got, body = r, string(x)
		if strings.Contains(body, "frozen") {
			problem.Write(w, r, problem.Frozen("by rev_1"))
			return
		}
		io.WriteString(w, `{"request":"req_1","credential":{"kind":"identity","token":"x"},"later":1}`)
	}))})
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Credential(ctx, "../s/1", client.Ask{Run: "r", Scope: "s"}, "key", 1500*time.Millisecond)
	if err != nil || c.Request != "req_1" || string(c.Credential) != `{"kind":"identity","token":"x"}` || !strings.Contains(string(c.Raw), `"later":1`) {
		t.Fatalf("%+v %v", c, err)
	}
	if got.URL.EscapedPath() != "/base/steps/%2E%2E%2Fs%2F1/credential" || got.Header.Get("Idempotency-Key") != "key" || got.Header.Get("Prefer") != "wait=2" ||
		got.Header.Get("Authorization") != "Bearer t" || body != `{"run":"r","scope":"s"}` {
		t.Errorf("%s %v %s", got.URL.EscapedPath(), got.Header, body)
	}
	if _, err := b.Credential(ctx, "s", client.Ask{Run: "frozen", Scope: "s"}, "", 0); !errors.Is(err, problem.Frozen("")) {
		t.Error(err)
	}
	if _, err := b.Revoke(ctx, "s", "r&x=1"); err != nil || got.Method != "DELETE" || got.URL.Query().Get("run") != "r&x=1" {
		t.Error(err, got.URL)
	}
	if _, err := b.Get(ctx, "req_1"); err != nil || got.URL.Path != "/base/requests/req_1" {
		t.Error(err, got.URL)
	}
}
