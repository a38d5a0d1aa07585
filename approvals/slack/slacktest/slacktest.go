// Package slacktest is a Slack for tests: a server that speaks the part of
// Slack's Web API that countersign uses, holds to its limits, fails on demand,
// and signs callbacks as Slack does.
package slacktest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf16"
)

// What the double calls itself.
const (
	Token         = "xoxb-slacktest"
	SigningSecret = "slacktest-signing-secret"
	Team          = "T0TEST"
	Channel       = "C0TEST"
	BotID         = "B0TEST"
)

// Message is one message in a channel.
type Message struct {
	Channel  string
	TS       string
	Bot      string // who sent it
	Text     string
	Blocks   string // JSON
	Metadata string // JSON
	User     string // of an ephemeral message, who sees it
	Edits    int
}

// Plain is all text in m's blocks, as a person reads it, a text per line.
func (m Message) Plain() string { return strings.Join(texts(m.Blocks), "\n") }

// Value is the value of the button called action; empty where m has none.
func (m Message) Value(action string) string {
	var v any
	json.Unmarshal([]byte(m.Blocks), &v)
	found := ""
	walk(v, func(o map[string]any) {
		if o["action_id"] == action {
			found, _ = o["value"].(string)
			if u, ok := o["url"].(string); ok {
				found = u
			}
		}
	})
	return found
}

// View is a modal that was opened.
type View struct {
	Trigger    string
	CallbackID string
	Metadata   string
	JSON       string
}

// Plain is all text in v, a text per line.
func (v View) Plain() string { return strings.Join(texts(v.JSON), "\n") }

// Failure is how a call fails.
type Failure struct {
	Status     int           // HTTP status; 200 with Error where zero
	RetryAfter int           // seconds, with Status 429
	Error      string        // Slack's error code
	Done       bool          // the work is done all the same, and the connection is cut instead of an answer
	Hang       time.Duration // before anything else
}

// Slack is the double. Its methods are safe for concurrent use.
type Slack struct {
	URL string // of the Web API, with the slash that ends it

	server    *httptest.Server
	mu        sync.Mutex
	seq       int
	messages  []*Message
	ephemeral []Message
	views     []View
	failures  map[string][]Failure
	calls     map[string]int
	down      bool
	done      func(method string) // called after the work, before the answer
}

// New starts a double.
func New() *Slack {
	s := &Slack{failures: map[string][]Failure{}, calls: map[string]int{}}
	s.server = httptest.NewServer(s)
	s.URL = s.server.URL + "/api/"
	return s
}

// Close stops it.
func (s *Slack) Close() { s.server.CloseClientConnections(); s.server.Close() }

// Fail lets the next calls of method fail, each as one of f says, in order.
func (s *Slack) Fail(method string, f ...Failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[method] = append(s.failures[method], f...)
}

// Down lets every call end in a broken connection, until it is called with
// false.
func (s *Slack) Down(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
}

// OnDone calls f after a method's work is done and before it is answered.
func (s *Slack) OnDone(f func(method string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = f
}

// Calls is how often method was called.
func (s *Slack) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Messages are the messages that stand in channels, oldest first.
func (s *Slack) Messages() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Message
	for _, m := range s.messages {
		out = append(out, *m)
	}
	return out
}

// Ephemeral are the messages that one user alone sees, oldest first.
func (s *Slack) Ephemeral() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ephemeral)
}

// Views are the modals that were opened, oldest first.
func (s *Slack) Views() []View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.views)
}

// Say puts a message of another app, or a person, into a channel.
func (s *Slack) Say(m Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.TS = s.ts()
	s.messages = append(s.messages, &m)
}

// Remove deletes a message, as an administrator of the workspace can.
func (s *Slack) Remove(ts string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = slices.DeleteFunc(s.messages, func(m *Message) bool { return m.TS == ts })
}

func (s *Slack) ts() string {
	s.seq++
	return fmt.Sprintf("%d.%06d", time.Now().Unix(), s.seq)
}

// ServeHTTP implements http.Handler: POST /api/METHOD.
func (s *Slack) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method := strings.TrimPrefix(r.URL.Path, "/api/")
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	s.mu.Lock()
	s.calls[method]++
	var f *Failure
	if q := s.failures[method]; len(q) > 0 {
		f = &q[0]
		s.failures[method] = q[1:]
	}
	down, done := s.down, s.done
	s.mu.Unlock()
	if down {
		panic(http.ErrAbortHandler)
	}
	if f != nil {
		time.Sleep(f.Hang)
		if !f.Done {
			if f.RetryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(f.RetryAfter))
			}
			if f.Status != 0 {
				w.WriteHeader(f.Status)
				return
			}
			if f.Error != "" {
				reply(w, map[string]any{"ok": false, "error": f.Error})
				return
			}
		}
	}
	form := url.Values{}
	var doc map[string]any
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
		json.Unmarshal(body, &doc)
	} else {
		form, _ = url.ParseQuery(string(body))
	}
	if form.Get("token") != Token && r.Header.Get("Authorization") != "Bearer "+Token {
		reply(w, map[string]any{"ok": false, "error": "invalid_auth"})
		return
	}
	out := s.call(method, form, doc, body)
	if done != nil {
		done(method)
	}
	if f != nil && f.Done {
		panic(http.ErrAbortHandler)
	}
	reply(w, out)
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func (s *Slack) call(method string, form url.Values, doc map[string]any, body []byte) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(code string) map[string]any { return map[string]any{"ok": false, "error": code} }
	switch method {
	case "auth.test":
		return map[string]any{"ok": true, "team_id": Team, "team": "Test", "user_id": "U0BOT", "bot_id": BotID}
	case "users.info":
		return map[string]any{"ok": true, "user": map[string]any{"id": form.Get("user"), "team_id": Team, "name": strings.ToLower(form.Get("user")), "real_name": "Real " + form.Get("user")}}
	case "chat.postMessage", "chat.postEphemeral", "chat.update":
		if code := CheckBlocks(form.Get("blocks"), 50); code != "" {
			return fail(code)
		}
		if len(utf16.Encode([]rune(form.Get("text")))) > 4000 {
			return fail("msg_too_long")
		}
		m := &Message{Channel: form.Get("channel"), Bot: BotID, Text: form.Get("text"), Blocks: form.Get("blocks"), Metadata: form.Get("metadata"), User: form.Get("user")}
		switch method {
		case "chat.postEphemeral":
			m.TS = s.ts()
			s.ephemeral = append(s.ephemeral, *m)
			return map[string]any{"ok": true, "message_ts": m.TS}
		case "chat.update":
			for _, old := range s.messages {
				if old.TS == form.Get("ts") && old.Channel == m.Channel {
					if old.Bot != BotID {
						return fail("cant_update_message")
					}
					old.Text, old.Blocks, old.Metadata, old.Edits = m.Text, m.Blocks, m.Metadata, old.Edits+1
					return map[string]any{"ok": true, "channel": m.Channel, "ts": old.TS, "text": m.Text}
				}
			}
			return fail("message_not_found")
		}
		m.TS, m.User = s.ts(), ""
		s.messages = append(s.messages, m)
		return map[string]any{"ok": true, "channel": m.Channel, "ts": m.TS, "message": map[string]any{"ts": m.TS}}
	case "chat.delete":
		n := len(s.messages)
		s.messages = slices.DeleteFunc(s.messages, func(m *Message) bool { return m.TS == form.Get("ts") && m.Channel == form.Get("channel") })
		if len(s.messages) == n {
			return fail("message_not_found")
		}
		return map[string]any{"ok": true, "channel": form.Get("channel"), "ts": form.Get("ts")}
	case "conversations.history":
		return s.history(form)
	case "views.open":
		view, _ := doc["view"].(map[string]any)
		raw, _ := json.Marshal(view)
		blocks, _ := json.Marshal(view["blocks"])
		if code := CheckBlocks(string(blocks), 100); code != "" {
			return fail(code)
		}
		trigger, _ := doc["trigger_id"].(string)
		v := View{Trigger: trigger, JSON: string(raw)}
		v.CallbackID, _ = view["callback_id"].(string)
		v.Metadata, _ = view["private_metadata"].(string)
		if trigger == "" {
			return fail("invalid_trigger_id")
		}
		if len(v.Metadata) > 3000 {
			return fail("invalid_arguments")
		}
		s.views = append(s.views, v)
		return map[string]any{"ok": true, "view": map[string]any{"id": "V0TEST"}}
	}
	return fail("unknown_method")
}

// history is newest first, a page at a time, as Slack has it.
func (s *Slack) history(form url.Values) map[string]any {
	limit, _ := strconv.Atoi(form.Get("limit"))
	if limit <= 0 || limit > 999 {
		limit = 100
	}
	var all []map[string]any
	for _, m := range slices.Backward(s.messages) {
		if m.Channel != form.Get("channel") || m.TS <= form.Get("oldest") {
			continue
		}
		x := map[string]any{"type": "message", "ts": m.TS, "text": m.Text, "bot_id": m.Bot}
		if m.Metadata != "" && form.Get("include_all_metadata") == "1" {
			x["metadata"] = json.RawMessage(m.Metadata)
		}
		all = append(all, x)
	}
	from, _ := strconv.Atoi(form.Get("cursor"))
	from = min(from, len(all))
	to := min(from+limit, len(all))
	next := ""
	if to < len(all) {
		next = strconv.Itoa(to)
	}
	return map[string]any{"ok": true, "messages": append([]map[string]any{}, all[from:to]...), "has_more": next != "", "response_metadata": map[string]any{"next_cursor": next}}
}

// CheckBlocks returns the error code with which Slack refuses blocks, of which it
// takes most; empty where it takes them. It is what Slack refuses (Block Kit reference).
func CheckBlocks(raw string, most int) string {
	var blocks []any
	if err := json.Unmarshal([]byte(raw), &blocks); err != nil {
		return "invalid_blocks_format"
	}
	if len(blocks) > most {
		return "invalid_blocks"
	}
	total, bad := 0, false
	length := func(o map[string]any, key string) int {
		t, _ := o[key].(map[string]any)
		text, _ := t["text"].(string)
		return len(utf16.Encode([]rune(text)))
	}
	walk(blocks, func(o map[string]any) {
		text, _ := o["text"].(string)
		switch o["type"] {
		case "plain_text", "mrkdwn":
			n := len(utf16.Encode([]rune(text)))
			total += n
			bad = bad || n == 0 || n > 3000
		case "header":
			bad = bad || length(o, "text") > 150
		case "button":
			v, _ := o["value"].(string)
			bad = bad || len(v) > 2000 || length(o, "text") > 75
		case "section":
			fields, _ := o["fields"].([]any)
			bad = bad || len(fields) > 10 || len(fields) == 0 && o["text"] == nil
			for _, f := range fields {
				bad = bad || length(map[string]any{"text": f}, "text") > 2000
			}
		}
	})
	switch {
	case bad:
		return "invalid_blocks"
	case total > 13_000:
		return "msg_blocks_too_long"
	}
	return ""
}

func walk(v any, f func(map[string]any)) {
	switch x := v.(type) {
	case map[string]any:
		f(x)
		for _, y := range x {
			walk(y, f)
		}
	case []any:
		for _, y := range x {
			walk(y, f)
		}
	}
}

// texts are all text objects in raw. Slack shows entities as characters.
func texts(raw string) (out []string) {
	var v any
	json.Unmarshal([]byte(raw), &v)
	walk(v, func(o map[string]any) {
		if s, ok := o["text"].(string); ok {
			out = append(out, strings.NewReplacer("&lt;", "<", "&gt;", ">", "&amp;", "&").Replace(s))
		}
	})
	return out
}

// User is who clicks.
type User struct {
	ID   string
	Team string // Team where empty
}

func (u User) payload(kind string) map[string]any {
	team := u.Team
	if team == "" {
		team = Team
	}
	return map[string]any{
		"type": kind, "team": map[string]any{"id": team, "domain": "test"}, "api_app_id": "A0TEST", "trigger_id": "trigger." + u.ID,
		"user": map[string]any{"id": u.ID, "username": strings.ToLower(u.ID), "team_id": team},
	}
}

// Click is the body of a click on a button.
func (u User) Click(action, value string) []byte {
	p := u.payload("block_actions")
	p["channel"] = map[string]any{"id": Channel}
	p["actions"] = []any{map[string]any{"type": "button", "action_id": action, "block_id": "countersign", "value": value}}
	return form(p)
}

// Submit is the body of a filled modal, with its one input called name.
func (u User) Submit(callbackID, metadata, name, text string) []byte {
	p := u.payload("view_submission")
	p["view"] = map[string]any{"callback_id": callbackID, "private_metadata": metadata,
		"state": map[string]any{"values": map[string]any{name: map[string]any{name: map[string]any{"type": "plain_text_input", "value": text}}}}}
	return form(p)
}

func form(p map[string]any) []byte {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return []byte(url.Values{"payload": {string(b)}}.Encode())
}

// Sign signs body as Slack does, stamped at.
func Sign(secret string, at time.Time, body []byte) http.Header {
	stamp := strconv.FormatInt(at.Unix(), 10)
	m := hmac.New(sha256.New, []byte(secret))
	fmt.Fprintf(m, "v0:%s:%s", stamp, body)
	h := http.Header{}
	h.Set("X-Slack-Request-Timestamp", stamp)
	h.Set("X-Slack-Signature", "v0="+hex.EncodeToString(m.Sum(nil)))
	h.Set("Content-Type", "application/x-www-form-urlencoded")
	return h
}

// Post sends body to a recorder's address for callbacks, signed. It is stamped
// a second ahead: a recorder takes nothing stamped in the second it started in.
func Post(to string, body []byte) (status int, answer string, err error) {
	return PostWith(to, body, Sign(SigningSecret, time.Now().Add(time.Second), body))
}

// PostWith sends body with the headers h.
func PostWith(to string, body []byte, h http.Header) (status int, answer string, err error) {
	r, err := http.NewRequest(http.MethodPost, to, strings.NewReader(string(body)))
	if err != nil {
		return 0, "", err
	}
	r.Header = h
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}
