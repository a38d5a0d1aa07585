package report_test

import (
	"context"
	"flag"
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
)

var shots = flag.String("shots", "", "directory for pictures of the report")

// TestTheReportReadsWellInABrowser opens a report on three screens, in both
// colours and as print, and a hostile and an empty one where room is least.
func TestTheReportReadsWellInABrowser(t *testing.T) {
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on PATH: the report is not looked at in a browser")
	}
	opts := []chromedp.ExecAllocatorOption{chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir())}
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	var mu sync.Mutex
	var bad []string
	ctx, cancel := chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(opts...), chromedp.WithListener(func(ev any) {
		if e, ok := ev.(*browserlog.EventEntryAdded); ok {
			mu.Lock()
			defer mu.Unlock()
			bad = append(bad, e.Entry.Text)
		}
	}))
	defer cancel()
	do := func(ctx context.Context, steps ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		if err := chromedp.Do(ctx, steps...); err != nil {
			t.Fatal(err)
		}
	}
	// The browser lives as long as the context of its first action.
	do(ctx, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, browserlog.Enable, cdp.Empty{})
		return err
	}))
	ctx, stop := context.WithTimeout(ctx, 3*time.Minute)
	defer stop()

	dir := t.TempDir()
	for name, page := range map[string][]byte{"report": eventful(t).report(), "hostile": hostilePage(t), "empty": newBook(t).report()} {
		file := filepath.Join(dir, name+".html")
		if err := os.WriteFile(file, page, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, look := range []struct {
			name          string
			width         int64
			colours, kind string
		}{
			{"small", 320, "light", ""}, {"phone", 390, "light", ""}, {"phone-dark", 390, "dark", ""},
			{"desktop", 1280, "light", ""}, {"desktop-dark", 1280, "dark", ""}, {"print", 1000, "light", "print"},
		} {
			if name != "report" && look.name != "small" && look.name != "print" {
				continue
			}
			do(ctx, chromedp.EmulateViewport(look.width, 900), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
				_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
					Media: look.kind, Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: look.colours}}})
				return err
			}), chromedp.Navigate("file://"+file))
			at := name + " on " + look.name
			wide, err := chromedp.Run(ctx, chromedp.Evaluate[[]string](`document.documentElement.scrollWidth <= innerWidth ? [] :
				[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className).slice(0, 5)`))
			if err != nil {
				t.Fatal(err)
			}
			if len(wide) > 0 {
				t.Errorf("%s: wider than the screen: %v", at, wide)
			}
			// A table's cell that is narrower than its words cuts them one letter a line.
			thin, err := chromedp.Run(ctx, chromedp.Evaluate[[]string](`[...document.querySelectorAll("td:not(.num), th:not(.num)")].filter(e => e.offsetParent && e.clientWidth < 38 && getComputedStyle(e.closest("table").tHead).position !== "absolute").map(e => e.textContent.slice(0, 40)).slice(0, 5)`))
			if err != nil {
				t.Fatal(err)
			}
			if len(thin) > 0 {
				t.Errorf("%s: cells too thin to be read: %q", at, thin)
			}
			title, err := chromedp.Run(ctx, chromedp.Evaluate[string](`document.title`))
			if err != nil || !strings.HasPrefix(title, "Evidence report: ") {
				t.Errorf("%s: the title is %q, %v", at, title, err)
			}
			if *shots == "" || name != "report" {
				continue
			}
			for _, part := range []string{"body > header", "#summary", "#exceptions", "#identity", "#reached", "#approved", "#record"} {
				shot, err := chromedp.Run(ctx, chromedp.Screenshot(chromedp.CSS(part)))
				if err != nil {
					t.Fatal(err)
				}
				part = strings.Trim(strings.ReplaceAll(part, "body > ", ""), "#")
				if err := os.WriteFile(filepath.Join(*shots, name+"-"+look.name+"-"+part+".png"), shot, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(bad) > 0 {
		t.Errorf("the browser complains: %q", bad)
	}
}
