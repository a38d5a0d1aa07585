package approve

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	browserlog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/go-webauthn/webauthn/protocol"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack"
	"github.com/countersign-dev/countersign/store"
)

// browser is a tab of a real Chromium.
type browser struct {
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
	b := &browser{}
	ctx, cancel := chromedp.NewContext(t.Context(), chromedp.WithAllocatorOptions(opts...), chromedp.WithListener(b.listen))
	t.Cleanup(cancel)
	// The browser lives as long as the context of its first action.
	if err := chromedp.Do(ctx, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, browserlog.Enable, cdp.Empty{})
		return err
	})); err != nil {
		t.Fatal(err)
	}
	b.ctx, cancel = context.WithTimeout(ctx, 4*time.Minute)
	t.Cleanup(cancel)
	return b
}

func (b *browser) listen(ev any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e := ev.(type) {
	case *browserlog.EventEntryAdded:
		if e.Entry.Level == "error" || e.Entry.Level == "warning" || e.Entry.Source == "security" {
			b.bad = append(b.bad, fmt.Sprintf("%s: %s (%s)", e.Entry.Source, e.Entry.Text, e.Entry.URL))
		}
	case *runtime.EventExceptionThrown:
		b.bad = append(b.bad, "exception: "+e.ExceptionDetails.Text)
	case *runtime.EventConsoleAPICalled:
		b.bad = append(b.bad, "console: "+string(e.Type))
	}
}

// complaints are what the browser complained of since they were asked for.
func (b *browser) complaints() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.bad
	b.bad = nil
	return list
}

func (b *browser) do(t *testing.T, steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		body, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body")))
		t.Fatalf("%v, on the page:\n%s", err, body)
	}
}

// wait polls until expression holds in the page.
func (b *browser) wait(t *testing.T, expression string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	_, err := chromedp.Run(ctx, chromedp.Poll[bool](expression))
	for err != nil && ctx.Err() == nil { // the page that was asked has gone: the next one is
		_, err = chromedp.Run(ctx, chromedp.Poll[bool](expression))
	}
	if err != nil {
		body, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body")))
		t.Fatalf("%s does not become true: %v; complaints %v; on the page:\n%s", expression, err, b.complaints(), body)
	}
}

func value[T any](t *testing.T, b *browser, expression string) T {
	t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// look sets how large the window is and which colours the person prefers.
func (b *browser) look(t *testing.T, width, height int64, colours string) {
	t.Helper()
	b.do(t, chromedp.EmulateViewport(width, height), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: colours}}})
		return err
	}))
}

// serve listens as localhost, which passkeys need (WebAuthn takes no address for
// a relying party).
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(func() {
		s.CloseClientConnections() // an open stream of events
		s.Close()
	})
	return strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
}

// crowd is a list of requests as an inbox has them.
func crowd() []approvals.Request {
	first, second, third := *full(), *full(), *full()
	first.Rule.Passkey = false
	second.ID, second.Scope, second.Target, second.Sensitivity = "apr_2", "vault:demo-write", "vault://secret/data/demo", "sensitive"
	second.Reason, second.Subject, second.SubjectProved = "Rotate the demo key.", "user:erin@example.com", true
	second.Needs, second.Expires = []approvals.Need{{Group: "dba", Count: 1}}, noon.Add(95*time.Second)
	third.ID, third.Scope, third.Target, third.Sensitivity, third.Subject = "apr_3", "ssh:deploy", "ssh://deploy@host-with-a-rather-long-name.internal.example.com", "sensitive", ""
	third.Reason = strings.Repeat("Unbreakable", 60)
	third.Needs = []approvals.Need{{Group: "sre", Count: 1}}
	third.Asked = noon.Add(-time.Hour)
	return []approvals.Request{first, second, third}
}

func TestInABrowserThePagesFitEveryScreenAndBreakNoPolicy(t *testing.T) {
	b := open(t)
	j := &judge{past: past(), keys: []approvals.Passkey{own(true)}}
	p := newPages(t, j, func(c *HTMLConfig) {
		c.Slack = &accounts{pending: &slack.Account{Team: "T0COUNTER", User: "U0ALICE", Name: "alice"}}
		c.Message = func(context.Context, string) string { return "https://example.slack.com/archives/C1/p2" }
	})
	p.list, p.next = crowd(), "90801"
	waiting := own(false)
	waiting.Person, waiting.ID, waiting.Label = "user:bob", "0192f1c2-bbbb-7000-8000-000000000002", "Bob’s phone"
	p.keys = []approvals.Passkey{own(true), waiting}
	decided := full()
	decided.Status = store.StatusIssued
	decided.Needs = []approvals.Need{{Group: "dba", Count: 2, Approved: 2}, {Group: "security-officers", Count: 3, Approved: 3}}
	hostile := full()
	hostile.Reason = "<script>document.title='broken out'</script> \u202e" + strings.Repeat("W", 4096)
	hostile.Grant.Params["x"] = strings.Repeat("p", 2000)
	at := serve(t, p.handler())
	dir := os.Getenv("COUNTERSIGN_SCREENSHOTS")
	if dir == "" {
		dir = t.TempDir()
	}
	t.Logf("screenshots are in %s", dir)

	for _, page := range []struct {
		name, path string
		req        *approvals.Request
	}{
		{"inbox", "/approvals?state=mine", full()},
		{"empty", "/approvals?state=decided", full()},
		{"request", "/approvals/" + full().ID, full()},
		{"decided", "/approvals/" + full().ID, decided},
		{"hostile", "/approvals/" + full().ID, hostile},
		{"passkeys", "/passkeys", full()},
		{"slack", "/slack/link", full()},
		{"problem", "/nowhere", full()},
	} {
		p.req = page.req
		j.approve, j.deny = nil, nil
		if page.req.Status != store.StatusPending {
			j.approve = &store.OrderError{Code: store.OrderNotOpen}
			j.deny = j.approve
		}
		list := p.list
		if page.name == "empty" {
			p.list, p.next = nil, ""
		}
		for _, size := range []struct {
			name          string
			width, height int64
		}{{"small", 360, 740}, {"phone", 390, 844}, {"desktop", 1280, 900}} {
			for _, colours := range []string{"light", "dark"} {
				whole := page.name == "inbox" || page.name == "request" || page.name == "decided"
				if !whole && (size.name == "desktop") != (colours == "dark") || size.name == "small" && colours == "dark" {
					continue // each page in both colours, and these three on every screen in both
				}
				b.look(t, size.width, size.height, colours)
				b.do(t, chromedp.Navigate(at+page.path))
				b.wait(t, `document.readyState === "complete" && getComputedStyle(document.body).margin === "0px"`)
				name := page.name + "-" + size.name + "-" + colours
				if w := value[int64](t, b, `document.documentElement.scrollWidth`); w > size.width {
					wide := value[[]string](t, b, `[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className).slice(0, 5)`)
					t.Errorf("%s: the page is %d px wide: %v", name, w, wide)
				}
				if small := value[[]string](t, b, `[...document.querySelectorAll("button, .button, .tabs a, .top nav a")].filter(e => e.offsetParent && e.getBoundingClientRect().height < 43).map(e => e.textContent)`); len(small) > 0 {
					t.Errorf("%s: too small to be touched: %q", name, small)
				}
				if title := value[string](t, b, `document.title`); strings.Contains(title, "broken out") {
					t.Errorf("%s: the requester's script ran", name)
				}
				bad := b.complaints()
				if page.name == "problem" { // it is a 404, of which the browser speaks
					bad = nil
				}
				if len(bad) > 0 {
					t.Errorf("%s: the browser complains: %q", name, bad)
				}
				if size.name == "small" {
					continue
				}
				shot, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name+".png"), shot, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		p.list = list
	}
}

func TestAPersonReachesEverythingWithTheKeyboardAndSeesWhere(t *testing.T) {
	b := open(t)
	p := newPages(t, &judge{past: past(), keys: []approvals.Passkey{own(true)}})
	p.req.Rule.Passkey = false
	b.look(t, 1280, 900, "light")
	b.do(t, chromedp.Navigate(serve(t, p.handler())+"/approvals/"+p.req.ID))
	reached := []string{}
	for range 40 {
		b.do(t, chromedp.KeyEvent("\t"))
		at := value[string](t, b, `(() => { const e = document.activeElement; const s = getComputedStyle(e);
			return (e.id || e.textContent.trim()) + (s.outlineStyle === "none" || parseFloat(s.outlineWidth) < 2 ? " (unseen)" : ""); })()`)
		if strings.HasSuffix(at, "(unseen)") && at != "(unseen)" {
			t.Errorf("the focus on %q cannot be seen", at)
		}
		reached = append(reached, at)
		if at == "deny" {
			break
		}
	}
	order := []string{"Skip to the content", "Countersign", "Approvals", "Passkeys", "Log out", "reason", "sign", "approve", "deny"}
	i := 0
	for _, at := range reached {
		if i < len(order) && at == order[i] {
			i++
		}
	}
	if i != len(order) {
		t.Errorf("reached %q, want among them in this order %q", reached, order)
	}
}

// stream is the events of a test.
type stream struct {
	*pages
	news chan string
	over atomic.Bool // the session is
}

func (s *stream) handler() http.Handler {
	inner := s.pages.handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case s.over.Load() && r.URL.Path == "/approvals/events":
			http.Error(w, "", http.StatusUnauthorized)
			return
		case s.over.Load():
			http.Redirect(w, r, "/login", http.StatusSeeOther)
			return
		case r.URL.Path != "/approvals/events":
			inner.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			_ = http.NewResponseController(w).Flush()
			select {
			case kind := <-s.news:
				if kind == "" { // the session is over
					return
				}
				_, _ = fmt.Fprintf(w, "event: %s\ndata: {}\n\n", kind)
			case <-r.Context().Done():
				return
			}
		}
	})
}

func TestALiveUpdateShowsWhatChangedAndKeepsWhatIsTyped(t *testing.T) {
	b := open(t)
	j := &judge{past: past()}
	s := &stream{pages: newPages(t, j), news: make(chan string)}
	s.req.Rule.Passkey = false
	at := serve(t, s.handler())
	b.do(t, chromedp.Navigate(at+"/approvals/"+s.req.ID), chromedp.SendKeys(chromedp.CSS("#reason"), "I looked at it"))
	value[bool](t, b, `window.same = true`)
	changed := *full()
	changed.Rule.Passkey = false
	changed.Needs = []approvals.Need{{Group: "dba", Count: 2, Approved: 2}, {Group: "security-officers", Count: 3}}
	changed.Decisions = append(changed.Decisions, approvals.Decided{Person: "user:carol", Groups: []string{"dba"}, Decision: store.Approve, At: noon, Via: "page", Index: 90950})
	s.req = &changed
	s.news <- approvals.EventDecided
	b.wait(t, `document.getElementById("decisions").textContent.includes("carol")`)
	b.wait(t, `document.getElementById("announce").textContent === "This page was updated."`)
	if got := value[string](t, b, `document.getElementById("reason").value`); got != "I looked at it" {
		t.Errorf("what was typed is now %q", got)
	}
	j.deny = &store.OrderError{Code: store.OrderNotOpen}
	j.approve = j.deny
	denied := changed
	denied.Status = store.StatusDenied
	s.req = &denied
	s.news <- approvals.EventDenied
	b.wait(t, `!document.getElementById("decision") && document.getElementById("state").textContent.includes("Denied")`)
	if !value[bool](t, b, `window.same === true`) {
		t.Error("the page was loaded anew")
	}
	if bad := b.complaints(); len(bad) > 0 {
		t.Errorf("the browser complains: %q", bad)
	}
}

func TestInABrowserAPasskeyIsMadeAndSignsWhatTheFormSays(t *testing.T) {
	b := open(t)
	j := &judge{past: past(), keys: []approvals.Passkey{own(true)}}
	p := newPages(t, j)
	p.req.Rule.Standing = nil
	digest := sha256.Sum256([]byte("what is decided"))
	var (
		mu       sync.Mutex
		asked    []string
		enrolled store.EnrolledDetails
		origin   string
		signed   error
	)
	inner := p.handler()
	b64 := base64.RawURLEncoding.EncodeToString
	at := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			inner.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("X-CSRF-Token") != csrfToken || r.Header.Get("Content-Type") != "application/json" {
			http.Error(w, `{"detail":"no token"}`, http.StatusForbidden)
			return
		}
		var in struct {
			Label      string         `json:"label"`
			Credential jsontext.Value `json:"credential"`
			Decision   string         `json:"decision"`
			Reason     string         `json:"reason"`
			Assertion  jsontext.Value `json:"assertion"`
		}
		if err := json.Unmarshal(body, &in); err != nil {
			http.Error(w, `{"detail":"bad body"}`, http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		switch _, action, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/"); {
		case r.URL.Path == "/passkeys/options":
			asked = append(asked, "options "+in.Label)
			_, _ = fmt.Fprintf(w, `{"publicKey":{"challenge":%q,"rp":{"id":"localhost","name":"Countersign"},"user":{"id":%q,"name":"alice","displayName":"alice"},"pubKeyCredParams":[{"type":"public-key","alg":-7}],"excludeCredentials":[],"authenticatorSelection":{"userVerification":"required"},"attestation":"none"}}`, b64(digest[:]), b64([]byte("alice")))
		case r.URL.Path == "/passkeys":
			c, err := protocol.ParseCredentialCreationResponseBytes(in.Credential)
			if err != nil {
				http.Error(w, `{"detail":"bad credential"}`, http.StatusBadRequest)
				return
			}
			enrolled = store.EnrolledDetails{Credential: b64(c.RawID), Key: c.Response.AttestationObject.AuthData.AttData.CredentialPublicKey, RPID: "localhost", Origin: origin}
			_, _ = io.WriteString(w, `{"location":"/passkeys?enrolled"}`)
		case strings.HasSuffix(action, "/challenge"):
			asked = append(asked, "challenge "+in.Decision+": "+in.Reason)
			_, _ = fmt.Fprintf(w, `{"publicKey":{"challenge":%q,"rpId":"localhost","allowCredentials":[{"type":"public-key","id":%q}],"userVerification":"required"}}`, b64(digest[:]), enrolled.Credential)
		case strings.HasSuffix(action, "/decision"):
			asked = append(asked, "decision "+in.Decision+": "+in.Reason)
			a, err := protocol.ParseCredentialRequestResponseBytes(in.Assertion)
			if err == nil {
				x := store.Assertion{AuthenticatorData: a.Raw.AssertionResponse.AuthenticatorData, ClientData: a.Raw.AssertionResponse.ClientDataJSON, Signature: a.Raw.AssertionResponse.Signature}
				err = x.Verify(&enrolled, digest)
			}
			if signed = err; err != nil {
				http.Error(w, `{"detail":"the signature does not hold"}`, http.StatusForbidden)
				return
			}
			_, _ = io.WriteString(w, `{}`)
		default:
			http.Error(w, `{"detail":"no such path"}`, http.StatusNotFound)
		}
	}))
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	origin = u.Scheme + "://" + u.Host
	var key webauthn.AuthenticatorID
	b.do(t, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		if _, err := cdp.Call(ctx, t, webauthn.Enable, webauthn.EnableParams{}); err != nil {
			return err
		}
		a, err := cdp.Call(ctx, t, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
			Protocol: "ctap2", Transport: "internal", HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true,
		}})
		key = a.AuthenticatorID
		return err
	}))
	b.do(t, chromedp.Navigate(at+"/passkeys"), chromedp.SendKeys(chromedp.CSS("#label"), "work laptop"), chromedp.Click(chromedp.CSS("#enrol button")))
	b.wait(t, `location.search === "?enrolled"`)

	page := at + "/approvals/" + p.req.ID
	reason, approve := chromedp.CSS("#reason"), chromedp.CSS("#approve")
	b.do(t, chromedp.Navigate(page), chromedp.SendKeys(reason, "Checked,\nand found right."), chromedp.Click(approve))
	b.wait(t, `location.search === "?decided"`)
	mu.Lock()
	if signed != nil {
		t.Errorf("the signature: %v", signed)
	}
	want := []string{"options work laptop", "challenge approve: Checked,\nand found right.", "decision approve: Checked,\nand found right."}
	if fmt.Sprint(asked) != fmt.Sprint(want) {
		t.Errorf("the page asked %q, want %q", asked, want)
	}
	mu.Unlock()

	// A person whom the device does not know signs nothing, and may try again.
	b.do(t, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, webauthn.SetUserVerified, webauthn.SetUserVerifiedParams{AuthenticatorID: key, IsUserVerified: false})
		return err
	}), chromedp.Navigate(page), chromedp.SendKeys(reason, "No."), chromedp.Click(approve))
	b.wait(t, `document.querySelector("#decision .message").classList.contains("bad") && !document.getElementById("approve").disabled`)
	mu.Lock()
	defer mu.Unlock()
	if len(asked) != 4 {
		t.Errorf("without the person the page sent %q", asked[3:])
	}
}

func TestWhenTheSessionIsOverThePageSaysSoAndKeepsWhatIsTyped(t *testing.T) {
	b := open(t)
	s := &stream{pages: newPages(t, &judge{past: past()}), news: make(chan string)}
	s.req.Rule.Passkey = false
	b.do(t, chromedp.Navigate(serve(t, s.handler())+"/approvals/"+s.req.ID), chromedp.SendKeys(chromedp.CSS("#reason"), "I looked at it"))
	s.over.Store(true)
	s.news <- ""
	b.wait(t, `!document.getElementById("over").hidden`)
	if got := value[string](t, b, `document.getElementById("reason").value`); got != "I looked at it" {
		t.Errorf("what was typed is now %q", got)
	}
}
