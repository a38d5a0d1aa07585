package auth_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// TestPeopleLogInWithARealBrowserThatRunsNoScripts: what a browser refuses by
// Content-Security-Policy, cookie rules or form-action, no HTTP client shows.
func TestPeopleLogInWithARealBrowserThatRunsNoScripts(t *testing.T) {
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on PATH")
	}
	o, up := apart(t)
	up()
	opts := []chromedp.ExecAllocatorOption{chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir())}
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	ctx, cancel := chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(opts...))
	defer cancel()
	// The browser lives as long as the context of its first action.
	if err := chromedp.Do(ctx, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
		return err
	})); err != nil {
		t.Fatal(err)
	}
	tab := ctx
	ctx, cancel = context.WithTimeout(tab, 60*time.Second)
	defer cancel()

	l, err := net.Listen("tcp", "127.0.0.1:0") // a terminal's
	if err != nil {
		t.Fatal(err)
	}
	codes := make(chan string, 1)
	terminal := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/callback" {
			codes <- r.URL.Query().Get("code")
		}
		w.Write([]byte("done"))
	})}
	go terminal.Serve(l)
	t.Cleanup(func() { terminal.Close() })
	port := l.Addr().String()[strings.LastIndex(l.Addr().String(), ":")+1:]

	var body, at string
	run := func(what string, steps ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		err := chromedp.Do(ctx, steps...)
		at, _ = chromedp.Run(tab, chromedp.Location())
		body, _ = chromedp.Run(tab, chromedp.OuterHTML(chromedp.CSS("html")))
		if err != nil {
			t.Fatalf("%s: %v, at %s: %s", what, err, at, body)
		}
	}
	ann, pre, button := chromedp.CSS(`button[value="ann"]`), chromedp.CSS("pre"), chromedp.CSS("button")
	run("login", chromedp.Navigate(o.url+"/who?x=1"), chromedp.WaitVisible(ann), chromedp.Click(ann), chromedp.WaitVisible(pre))
	if at != o.url+"/who?x=1" || !strings.Contains(body, `user:ann`) {
		t.Fatal(at, body)
	}
	verifier := strings.Repeat("v", 43)
	run("terminal", chromedp.Navigate(o.url+"/login/cli?port="+port+"&challenge="+nonceFor(verifier)), chromedp.WaitVisible(button), chromedp.Click(button), chromedp.WaitVisible(pre))
	select {
	case code := <-codes:
		if tok, status := o.exchange(t, code, verifier); status != 200 || tok.Person != "user:ann" {
			t.Fatalf("HTTP %d %+v", status, tok)
		}
	case <-ctx.Done():
		t.Fatal("the terminal got no code", at, body)
	}
	// A fresh login, from a form whose page allows forms to 'self' alone.
	nonce := nonceFor("key")
	run("fresh", chromedp.Navigate(o.url+"/form?nonce="+nonce), chromedp.WaitVisible(button), chromedp.Click(button), chromedp.WaitVisible(ann), chromedp.Click(ann), chromedp.WaitVisible(pre))
	if f := o.fresh.Load(); f == nil || f.Name != "user:ann" || f.Nonce != nonce || at != o.url+"/who" {
		t.Fatal(f, at, body)
	}
}
