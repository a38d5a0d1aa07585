package review

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	browserlog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/chromedp"

	"github.com/countersign-dev/countersign/store"
)

// browser is a tab of a real Chromium.
type browser struct {
	t   *testing.T
	ctx context.Context
	mu  sync.Mutex
	bad []string // what the browser complained of
}

func open(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on PATH: the pages are not looked at in a browser")
	}
	opts := []chromedp.ExecAllocatorOption{chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir())}
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	b := &browser{t: t}
	ctx, cancel := chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(opts...), chromedp.WithListener(func(ev any) {
		if e, ok := ev.(*browserlog.EventEntryAdded); ok {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.bad = append(b.bad, fmt.Sprintf("%s: %s (%s)", e.Entry.Source, e.Entry.Text, e.Entry.URL))
		}
	}))
	t.Cleanup(cancel)
	ok(t, chromedp.Do(ctx, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, browserlog.Enable, cdp.Empty{})
		return err
	})))
	b.ctx, cancel = context.WithTimeout(ctx, 4*time.Minute)
	t.Cleanup(cancel)
	return b
}

func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ok(b.t, chromedp.Do(b.ctx, steps...))
}

// wait polls until expression holds in the page, whichever page that is by then.
func (b *browser) wait(expression string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	_, err := chromedp.Run(ctx, chromedp.Poll[bool](expression))
	for err != nil && ctx.Err() == nil {
		_, err = chromedp.Run(ctx, chromedp.Poll[bool](expression))
	}
	if err != nil {
		body, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body")))
		b.t.Fatalf("%s does not become true: %v; on the page:\n%s", expression, err, body)
	}
}

func value[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// run does something in the page that may lead to another one.
func (b *browser) run(script string) {
	b.t.Helper()
	value[bool](b, "(() => { setTimeout(() => { "+script+" }, 0); return true; })()")
}

func TestInABrowserAChartLeadsToItsEntriesAndTheyToTheirStory(t *testing.T) {
	b := open(t)
	w := newWorld(t)
	f := w.busy()
	path := w.path("run-4712", "read-orders")
	uses := path.pass("SELECT id, email FROM orders WHERE total > 100", "SELECT "+strings.Repeat("a_column_without_a_break_", 40), "COPY orders TO STDOUT")
	w.append(broker, path.entry(store.UseFinished, store.Allow, store.UseFinishedDetails{Outcomes: []store.UseOutcome{
		{Use: uses[0].ID, Status: "SELECT 3", Rows: 3, Received: 2048, Masked: 3, Took: store.Duration(time.Millisecond)}, {Use: uses[1].ID, Error: "42703", Took: store.Duration(time.Millisecond)}}}))
	refused := path.entry(store.AccessRefused, store.Allow, store.RefusedDetails{Method: "postgres", Route: "DELETE orders", Problem: "scope-denied", Remote: "192.0.2.7", Intent: path.intent, Reason: "statements of this kind are not let through"})
	refused.Seal(store.SealedStatement, "DELETE FROM orders")
	w.append(broker, refused)
	path.revoke("step finished")
	path.finish("succeeded", "All orders are read.")
	w.page("/history") // counted by now
	dir := os.Getenv("COUNTERSIGN_SCREENSHOTS")

	b.do(chromedp.Navigate(w.url + "/history"))
	b.wait(`[...document.querySelectorAll("button")].some(b => (b.value + b.textContent).includes("rita"))`)
	b.run(`[...document.querySelectorAll("button")].find(b => (b.value + b.textContent).includes("rita")).click()`)
	b.wait(`location.pathname === "/history" && document.readyState === "complete"`)

	// The bar of the approved step, by a click where it is drawn.
	bar := `[...document.querySelectorAll(".main svg a")].find(a => a.querySelector("rect").classList.contains("accent"))`
	says := value[string](b, bar+`.querySelector("title").textContent`)
	if !strings.HasSuffix(says, "1 people had to approve") {
		t.Fatalf("the bar says %q", says)
	}
	b.run(`const rect = ` + bar + `.querySelector("rect"); rect.scrollIntoView({block: "center"}); const r = rect.getBoundingClientRect(); document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2).closest("a").dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true, view: window}))`)
	b.wait(`location.search.includes("outcome=needs-approval") && document.querySelectorAll(".timeline > li").length === 1`)
	b.run(`document.querySelector(".timeline > li a[href^='/history/steps/']").click()`)
	b.wait(`location.pathname === ` + fmt.Sprintf("%q", storyURL(f.run, f.step)) + ` && document.body.textContent.includes("signed with a passkey, checked just now")`)

	// By the keyboard alone: the first stop is the link past the head of the page.
	b.do(chromedp.Navigate(w.url + "/history"))
	b.wait(`document.readyState === "complete"`)
	if n := value[int64](b, `[...document.querySelectorAll("svg a")].filter(a => a.tabIndex >= 0).length`); n > 0 {
		t.Errorf("%d bars are stops of the Tab key", n)
	}

	for _, page := range []struct{ name, path string }{
		{"timeline", "/history"}, {"filtered", "/history?orchestrator=release-train&type=credential.used"}, {"empty", "/history?run=none"},
		{"story", storyURL(f.run, f.step)}, {"uses", storyURL(path.run, path.step)}, {"person", personURL("user:alice")}, {"credential", credentialURL(f.intent)}, {"entry", entryURL(w.ledger.Size() - 5)}, {"problem", "/history/999999"},
	} {
		for _, size := range []struct {
			name          string
			width, height int64
		}{{"small", 360, 740}, {"phone", 390, 844}, {"desktop", 1280, 900}} {
			for _, colours := range []string{"light", "dark"} {
				if size.name == "small" && colours == "dark" {
					continue
				}
				b.do(chromedp.EmulateViewport(size.width, size.height), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
					_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: colours}}})
					return err
				}), chromedp.Navigate(w.url+page.path))
				b.wait(`document.readyState === "complete" && getComputedStyle(document.body).margin === "0px"`)
				name := "history-" + page.name + "-" + size.name + "-" + colours
				if got := value[int64](b, `document.documentElement.scrollWidth`); got > size.width {
					wide := value[[]string](b, `[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className).slice(0, 5)`)
					t.Errorf("%s is %d wide: %v", name, got, wide)
				}
				if small := value[[]string](b, `[...document.querySelectorAll("button, input, select, summary")].filter(e => e.offsetParent && e.getBoundingClientRect().height < 24).map(e => e.outerHTML.slice(0, 80))`); len(small) > 0 {
					t.Errorf("%s: too small to hit: %v", name, small)
				}
				if dir == "" {
					continue
				}
				shot, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
				ok(t, err)
				ok(t, os.WriteFile(filepath.Join(dir, name+".png"), shot, 0o600))
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, x := range b.bad {
		if !strings.Contains(x, "404") { // the page that is not there
			t.Error(x)
		}
	}
}
