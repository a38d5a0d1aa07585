package client_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
)

func TestTheBrokersClientSendsWhatTheContractSaysAndReadsProblems(t *testing.T) {
	var got *http.Request
	var body string
	b, err := client.NewBroker(client.Config{URL: "http://broker/base", Token: client.Token("t"), Transport: inProcess(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
