package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
)

// tab is a person's tab in a real Chromium, with a passkey of the device's own.
type tab struct {
	t   *testing.T
	ctx context.Context
}

func openTab(t *testing.T) *tab {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("no chromium on PATH: nobody logs in, looks and decides in a browser")
	}
	opts := []chromedp.ExecAllocatorOption{chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir())}
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	ctx, cancel := chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(opts...))
	t.Cleanup(cancel)
	b := &tab{t: t, ctx: ctx}
	b.do(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		if _, err := cdp.Call(ctx, t, webauthn.Enable, webauthn.EnableParams{}); err != nil {
			return err
		}
		_, err := cdp.Call(ctx, t, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
			Protocol: "ctap2", Transport: "internal", HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true,
		}})
		return err
	}))
	b.ctx, cancel = context.WithTimeout(ctx, 4*time.Minute)
	t.Cleanup(cancel)
	return b
}

func (b *tab) text() string {
	text, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body")))
	return text
}

func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatalf("%v, on the page:\n%s", err, b.text())
	}
}

// until polls until expression holds in the page, also while it changes.
func (b *tab) until(expression string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	for {
		_, err := chromedp.Run(ctx, chromedp.Poll[bool](expression))
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			b.t.Fatalf("%s does not become true, on the page:\n%s", expression, b.text())
		}
	}
}

// clickAs says at dev's provider who one is.
func (b *tab) clickAs(user string) {
	b.t.Helper()
	b.until(`location.pathname.endsWith("/dev/oidc/login")`)
	b.do(chromedp.Click(chromedp.CSS(`button[value="` + user + `"]`)))
}

// shoot takes the page as it is on a phone and on a desk, in light and dark.
func (b *tab) shoot(dir, name string) {
	b.t.Helper()
	for _, size := range []struct {
		name          string
		width, height int64
	}{{"phone", 390, 844}, {"desktop", 1280, 900}} {
		for _, colours := range []string{"light", "dark"} {
			b.do(chromedp.EmulateViewport(size.width, size.height), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
				_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: colours}, {Name: "prefers-reduced-motion", Value: "reduce"}}})
				return err
			}))
			shot, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
			if err != nil {
				b.t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%s-%s.png", name, size.name, colours)), shot, 0o600); err != nil {
				b.t.Fatal(err)
			}
		}
	}
}

func TestAPersonLogsInReadsEnrolsAPasskeyAndApprovesInABrowser(t *testing.T) {
	b := openTab(t)
	shots := os.Getenv("COUNTERSIGN_SCREENSHOTS")
	if shots == "" {
		shots = t.TempDir()
	}
	t.Logf("screenshots are in %s", shots)
	double := slacktest.New()
	t.Cleanup(double.Close)
	dir := t.TempDir()
	notify := filepath.Join(dir, "notify.yaml")
	for name, text := range map[string]string{
		"slack-token": slacktest.Token, "slack-secret": slacktest.SigningSecret,
		"notify.yaml": fmt.Sprintf("slack: {token_file: %q, signing_secret_file: %q, team: %s, channel: %s, api_url: %q}\n",
			filepath.Join(dir, "slack-token"), filepath.Join(dir, "slack-secret"), slacktest.Team, slacktest.Channel, double.URL),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dev := startDev(t, filepath.Join(dir, "dev"), "--notify", notify)

	// Another process asks, and waits for the person.
	type answer struct {
		out []byte
		err error
	}
	waiting := make(chan answer, 1)
	cmd := exec.Command("countersign", "request", "--scope", "vault:demo-write", "--run", "run-1", "--step", "rotate", "--ttl", "3m",
		"--reason", "Rotate the greeting, OPS-4711", "--subject", "user:u-1024@example.com", "--wait", "4m", "-o", "json")
	cmd.Env = append(os.Environ(), "COUNTERSIGN_ADDR="+dev.API, "COUNTERSIGN_TOKEN="+dev.Orchestrators[0].Token)
	go func() {
		out, err := cmd.Output()
		waiting <- answer{out, err}
	}()
	var list struct{ Approvals []approvals.Request }
	eventually(t, "the request waits", func() bool {
		_, body := dev.call(dev.Approvers[0].Token, "GET", dev.Recorder+"/approvals", "")
		return json.Unmarshal([]byte(body), &list) == nil && len(list.Approvals) == 1
	})
	asked := list.Approvals[0]

	// From its link to the login, and back to all of it.
	b.do(chromedp.Navigate(asked.URL))
	b.clickAs("approver-a")
	b.until(`location.pathname === "/approvals/` + asked.ID + `" && document.readyState === "complete"`)
	page := b.text()
	for _, seen := range []string{"vault:demo-write", "vault://secret/data/demo", "countersign-vault-demo-write", "3 minutes", "run-1", "rotate",
		"Rotate the greeting, OPS-4711", "user:u-1024@example.com", "only claimed", asked.Agent, asked.LeafHash, asked.Policy} {
		if !strings.Contains(strings.ToLower(page), strings.ToLower(seen)) {
			t.Errorf("the page does not show %q:\n%s", seen, page)
		}
	}
	b.shoot(shots, "request")
	b.do(chromedp.Navigate(dev.Recorder + "/approvals?state=mine"))
	b.until(`document.body.textContent.includes("vault:demo-write")`)
	b.shoot(shots, "inbox")

	// A passkey, anchored in a fresh login, and activated by a second person.
	b.do(chromedp.Navigate(dev.Recorder+"/passkeys"), chromedp.SendKeys(chromedp.CSS("#label"), "work laptop"), chromedp.Click(chromedp.CSS("#enrol button")))
	b.clickAs("approver-a")
	b.until(`location.pathname === "/passkeys" && document.body.textContent.includes("work laptop")`)
	var keys struct{ Passkeys []approvals.Passkey }
	if status, body := dev.call(dev.Approvers[1].Token, "GET", dev.Recorder+"/passkeys", ""); status != 200 || json.Unmarshal([]byte(body), &keys) != nil || len(keys.Passkeys) != 1 {
		t.Fatalf("%d %s", status, body)
	}
	activate := dev.Recorder + "/passkeys/" + keys.Passkeys[0].ID + "/activate"
	if status, body := dev.call(dev.Approvers[0].Token, "POST", activate, ""); status == 200 {
		t.Errorf("a person activates their own key: %s", body)
	}
	if status, body := dev.call(dev.Approvers[1].Token, "POST", activate, ""); status != 200 {
		t.Fatalf("%d %s", status, body)
	}

	// The decision, signed.
	b.do(chromedp.Navigate(asked.URL), chromedp.SendKeys(chromedp.CSS("#reason"), "Agreed with OPS."), chromedp.Click(chromedp.CSS("#approve")))
	b.until(`location.search === "?decided"`)
	var got answer
	select {
	case got = <-waiting:
	case <-time.After(time.Minute):
		t.Fatal("the waiting call is not answered")
	}
	var credential struct {
		Credential struct{ Kind, Token string }
		Approval   struct{ ID string }
	}
	if got.err != nil || json.Unmarshal(got.out, &credential) != nil || credential.Credential.Kind != "vault_token" || credential.Approval.ID != asked.ID {
		t.Fatalf("%v: %s", got.err, got.out)
	}
	b.until(`document.body.textContent.toLowerCase().includes("signed with a passkey")`)
	b.shoot(shots, "decided")

	status, body := dev.call(dev.Reviewers[0].Token, "GET", dev.Recorder+"/history?type=approval.decided", "")
	var history struct{ Entries []struct{ Entry store.Entry } }
	if status != 200 || json.Unmarshal([]byte(body), &history) != nil || len(history.Entries) != 1 {
		t.Fatalf("%d %s", status, body)
	}
	decided, err := store.DetailsAs[store.DecidedDetails](&history.Entries[0].Entry)
	if err != nil || decided.Assertion == nil || decided.Requested != asked.LeafHash {
		t.Fatalf("%v: %s", err, body)
	}
	out, err := exec.Command("countersign", "verify", filepath.Join(dir, "dev", "ledger"), "--key", dev.LogKey).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "verified") {
		t.Errorf("verify: %v: %s", err, out)
	}
	eventually(t, "the one message in Slack says how it went", func() bool {
		m := double.Messages()
		return len(m) == 1 && m[0].Edits > 0 && strings.Contains(m[0].Plain(), "approver-a")
	})
}
