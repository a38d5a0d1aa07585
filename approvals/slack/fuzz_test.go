package slack

import (
	stdjson "encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/approvals/slack/slacktest"
	"github.com/countersign-dev/countersign/store"
)

func jsonOf(v any) ([]byte, error) { return stdjson.Marshal(v) }

// FuzzText: whatever is written stays within the limit, begins no mention or
// link, makes no line of its own, and what is cut is said with its number.
func FuzzText(f *testing.F) {
	f.Add("plain", uint16(100))
	f.Add("<!channel> & <@U1|x>", uint16(80))
	f.Add(strings.Repeat("&", 3000), uint16(2000))
	f.Add(strings.Repeat("😀\n\u202e", 700), uint16(150))
	f.Add("\xff\xfe\r\n\x00", uint16(75))
	f.Fuzz(func(t *testing.T, s string, n uint16) {
		limit := maxNotice + int(n)
		chars := escape(s)
		text, cut := join(chars, limit)
		if got := len(utf16.Encode([]rune(text))); got > limit || got != units(text) {
			t.Fatalf("%d units, at most %d", got, limit)
		}
		if rest := strings.NewReplacer("&amp;", "", "&lt;", "", "&gt;", "").Replace(text); strings.ContainsAny(rest, "<>&\n\r") || !utf8.ValidString(text) {
			t.Fatalf("not escaped: %q", text)
		}
		if notice := fmt.Sprintf(cutNotice, cut); cut > 0 && (!strings.HasSuffix(text, notice) || strings.TrimSuffix(text, notice)+strings.Join(chars[len(chars)-cut:], "") != strings.Join(chars, "")) {
			t.Fatalf("%d are cut, it says %q", cut, text)
		}
		if cut == 0 && text != strings.Join(chars, "") {
			t.Fatal("cut without saying so")
		}
	})
}

// FuzzMessage: no request makes a message that Slack refuses.
func FuzzMessage(f *testing.F) {
	f.Add("reason", "k", "v", 1, 1)
	f.Add(strings.Repeat("<", 9000), strings.Repeat("k", 3000), strings.Repeat("😀", 4000), 150, 12)
	f.Fuzz(func(t *testing.T, reason, key, val string, decisions, groups int) {
		decisions, groups = min(max(decisions, 0), 250), min(max(groups, 0), 10)
		r := &approvals.Request{ID: "apr_x", Status: store.StatusPending, Scope: val, Target: key, Orchestrator: reason, Run: reason, Step: reason, Agent: reason, Reason: reason, Subject: val,
			PolicyReasons: []string{reason, val}, Rule: store.Rule{Slack: true}, URL: "http://localhost/x", LeafHash: strings.Repeat("A", 44),
			Grant: store.Grant{Path: val, Method: "read", Role: key, Policies: []string{key, val}, Params: map[string]string{key: val}, Data: map[string]string{val: key}, PublicKey: val, Audience: reason,
				Access: &store.Access{Protocol: "http", Upstream: val, Inject: &store.Inject{In: "header", Name: key, Value: val},
					HTTP:    &store.HTTPAccess{Routes: []store.HTTPRoute{{Methods: []string{key, val}, Paths: []string{val, reason}}}, RequestHeaders: []string{key}},
					MCP:     &store.MCPAccess{Tools: []store.MCPTool{{Name: val, Scope: key}}},
					Masking: store.Masking{Rules: []store.MaskRule{{Field: val}, {Path: key}}}}}}
		for range decisions {
			r.Decisions = append(r.Decisions, approvals.Decided{Person: val, Groups: []string{key}, Decision: store.Approve, Reason: reason})
		}
		for range groups {
			r.Needs = append(r.Needs, approvals.Need{Group: key, Count: 1})
		}
		blocks, whole := message(r)
		b := must(jsonOf(blocks))
		if code := slacktest.CheckBlocks(string(b), 50); code != "" {
			t.Fatalf("%s: %s", code, b)
		}
		if whole != !strings.Contains(string(b), "characters are cut here") {
			t.Fatal("what is cut is not said")
		}
		v := modal(r, store.Approve)
		if code := slacktest.CheckBlocks(string(must(jsonOf(v.Blocks))), 100); code != "" || len(v.PrivateMetadata) > 3000 {
			t.Fatal(code)
		}
	})
}

func FuzzCallback(f *testing.F) {
	const form = "application/x-www-form-urlencoded"
	f.Add(form, slacktest.User{ID: "U1A"}.Click(actionApprove, "apr_x "+strings.Repeat("A", 44)))
	f.Add(form, slacktest.User{ID: "U1A"}.Submit(viewDecide, "approve apr_x "+strings.Repeat("A", 44), inputReason, "x"))
	f.Add(form+"; charset=utf-8", []byte(`payload={"type":"block_actions","team":null,"user":{"id":"U1"},"actions":[]}`))
	f.Add("text/plain", []byte("payload=%7B%7D&payload=1"))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		c, err := parseCallback(contentType, body)
		if err != nil {
			if c != nil {
				t.Fatal("an error and a callback")
			}
			return
		}
		if !ids.MatchString(c.User.ID) || !ids.MatchString(c.Team.ID) || c.Type == "block_actions" && len(c.Actions) != 1 {
			t.Fatalf("%+v", c)
		}
		for _, a := range c.Actions {
			if id, leaf, err := parseValue(a.Value); err == nil && (id+" "+leaf != a.Value || !store.ValidID(id)) {
				t.Fatalf("%q", a.Value)
			}
		}
	})
}
