package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/countersign-dev/countersign/store"
)

// A request that is sent is made of a valid one, of who shows which token, and
// of damage, all drawn from one generator: (seed, number) makes it again. Tokens
// stand in it as @name@ and the length of the body as @length@, until it is sent.

// request is a valid one of HTTP. @token@ is the place of a token.
func request(method, target, body string, headers ...string) string {
	b := method + " " + target + " HTTP/1.1\r\nHost: abuse.example\r\nAuthorization: Bearer @token@\r\n"
	for _, h := range headers {
		b += h + "\r\n"
	}
	if body != "" {
		if !strings.Contains(b, "Content-Type:") {
			b += "Content-Type: application/json\r\n"
		}
		b += "Content-Length: @length@\r\n"
	}
	return b + "\r\n" + body
}

// reach of each listener by valid requests. A new route belongs here too; what
// is not here is reached by damage alone.
var abuseValid = map[string][]string{
	"broker": {
		request("POST", "/steps/abuse-1/credential", `{"run":"abuse","scope":"identity:step","ttl":"30s","reason":"why","subject":"user:u@example.com","params":{"a":"b"},"receipt":true}`),
		request("POST", "/steps/abuse-2/credential", `{"run":"abuse","scope":"vault:demo-read","ttl":"30s","delivery":"wrapped"}`, "Idempotency-Key: abuse-key-1"),
		request("POST", "/steps/abuse-3/credential", `{"run":"abuse","scope":"vault:demo-write","reason":"for abuse","ttl":"1m"}`, "Prefer: wait=0"),
		request("POST", "/steps/abuse-4/credential", `{"run":"abuse","scope":"pki:service","ttl":"30s","params":{"service":"abuse"}}`),
		request("POST", "/steps/abuse-5/credential", `{"run":"abuse","scope":"ssh:deploy","public_key":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJ1c2U= a"}`),
		request("POST", "/steps/abuse-6/credential", `{"run":"abuse","scope":"http:demo","delivery":"gateway","ttl":"30s"}`),
		request("DELETE", "/steps/abuse-1/credential?run=abuse", ""),
		request("POST", "/steps/abuse-1/result", `{"run":"abuse","outcome":"succeeded","summary":"done","target":"t"}`),
		request("GET", "/requests/req_0190", ""), request("DELETE", "/requests/req_0190", ""), request("GET", "/scopes", ""),
		request("POST", "/introspect", "token=eyJhbGciOiJFUzI1NiJ9.e30.c2ln&use=u&token_type_hint=access_token", "Content-Type: application/x-www-form-urlencoded"),
		request("GET", "/.well-known/jwks.json", ""), request("GET", "/.well-known/openid-configuration", ""),
		request("GET", "/openapi.yaml", "", "Accept-Encoding: gzip, br"), request("GET", "/readyz", ""),
	},
	"recorder": {
		request("POST", "/append", `{"v":1,"id":"01900000-0000-7000-8000-000000000001","type":"access.refused","writer_time":"2026-01-02T15:04:05Z","agent":"spiffe://countersign.demo/unauthenticated","action":"GET /","decision":{"outcome":"deny","reasons":["unauthenticated"]},"details":{"method":"GET","route":"/","problem":"unauthenticated","remote":"127.0.0.1"}}`+"\n", "Content-Type: application/x-ndjson"),
		request("POST", "/append", `{"v":1,"id":"01900000-0000-7000-8000-000000000002","type":"credential.used","writer_time":"2026-01-02T15:04:05Z","agent":"a","request":"req_1","run":"abuse","step":"s","details":{"use":"GET /","intent":"01900000-0000-7000-8000-000000000003"},"open":{"statement":"x"}}`+"\n", "Content-Type: application/x-ndjson", "Countersign-Seen: 3"),
		request("GET", "/open?request=req_1", ""), request("GET", "/consistency?from=1&to=2", ""),
		request("GET", "/follow?after=1", ""),
		request("GET", "/approvals", "", "Accept: text/html"), request("GET", "/approvals", "", "Accept: application/json"), request("GET", "/approvals/apr_1", ""),
		request("POST", "/approvals/apr_1/decision", `{"decision":"approve","reason":"fine","assertion":{"id":"AA","rawId":"AA","type":"public-key","response":{"clientDataJSON":"e30","authenticatorData":"AA","signature":"AA","userHandle":"AA"}}}`),
		request("POST", "/approvals/apr_1/decision", `decision=deny&reason=no`, "Content-Type: application/x-www-form-urlencoded", "Origin: http://abuse.example"),
		request("POST", "/approvals/apr_1/challenge", `{"decision":"approve","reason":"fine"}`),
		request("GET", "/passkeys", ""), request("POST", "/passkeys/options", `{}`), request("DELETE", "/passkeys/pk_1", ""),
		request("POST", "/passkeys", `{"id":"AA","rawId":"AA","type":"public-key","response":{"clientDataJSON":"e30","attestationObject":"o2NmbXRkbm9uZWdhdHRTdG10oGhhdXRoRGF0YUA"}}`),
		request("POST", "/slack/interactions", "payload=%7B%22type%22%3A%22block_actions%22%7D", "Content-Type: application/x-www-form-urlencoded", "X-Slack-Signature: v0=00", "X-Slack-Request-Timestamp: 1"),
		request("POST", "/revocations", `{"step":"no-such-step","reason":"abuse"}`), request("GET", "/revocations", ""), request("DELETE", "/revocations/01900000-0000-7000-8000-000000000004?reason=x", ""),
		request("GET", "/history?from=2026-01-01T00:00:00Z&type=credential.issued&run=abuse&limit=10&cursor=AAAA", ""), request("GET", "/history?step=s&person=p&outcome=deny", "", "Accept: text/html"),
		request("GET", "/history/1", "", "Accept: text/html"), request("GET", "/history/steps/abuse/abuse-1", "", "Accept: text/html"), request("GET", "/history/credentials/01900000-0000-7000-8000-000000000003", ""),
		request("GET", "/history/export?format=csv&run=no-such-run", ""), request("GET", "/holds", ""), request("POST", "/holds", `{"run":"no-such-run","reason":"r"}`),
		request("GET", "/tile/0/000.p/2", ""), request("GET", "/tile/entries/000.p/2", ""), request("GET", "/checkpoint", "", "If-None-Match: x"),
		request("GET", "/login?next=/approvals", ""), request("GET", "/callback?code=x&state=y", "", "Cookie: countersign_login=AAAA"),
		request("POST", "/provider/token", "grant_type=authorization_code&code=x&redirect_uri=http://localhost/callback", "Content-Type: application/x-www-form-urlencoded"),
	},
	"http": {
		request("GET", "/customers?id=1&name=a", "", "Range: bytes=0-1"), request("GET", "/", "", "Accept-Encoding: gzip"), request("POST", "/customers", `{"name":"x"}`),
		request("GET", "/customers/../../admin", "", "X-Forwarded-For: 10.0.0.1"), request("GET", "/customers/1", "", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
		request("PUT", "/", "5\r\nhello\r\n0\r\nX-Trailer: y\r\n\r\n", "Transfer-Encoding: chunked", "Trailer: X-Trailer"),
		request("GET", "/.countersign/ca.pem", ""), request("GET", "/customers", "", "DPoP: eyJ0eXAiOiJkcG9wK2p3dCJ9.e30.c2ln"),
	},
	"proxy": {
		request("CONNECT", "demo.internal:443", "", "Proxy-Authorization: Bearer @token@"), request("CONNECT", "demo.internal:80", "", "Proxy-Authorization: Basic c3RlcDp4"),
		request("GET", "http://demo.internal/customers", "", "Proxy-Authorization: Bearer @token@"), request("GET", "http://elsewhere.example/", "", "Proxy-Connection: keep-alive"),
	},
	"mcp": {
		request("POST", "/", `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"abuse","version":"1"}}}`, "Accept: application/json, text/event-stream"),
		request("POST", "/mcp", `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"lookup_order","arguments":{"order":"17","deep":[{"a":[1,2,{"b":null}]}]},"_meta":{"progressToken":"p"}}}`, "Accept: application/json, text/event-stream", "Mcp-Session-Id: ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
		request("POST", "/", `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"lookup_order","arguments":{"id":17},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"io.modelcontextprotocol/clientInfo":{"name":"x","version":"1"}}}}`,
			"Accept: application/json, text/event-stream", "Mcp-Protocol-Version: 2026-07-28", "Mcp-Method: tools/call", "Mcp-Name: lookup_order", "Mcp-Param-Id: 17"),
		request("POST", "/", `{"jsonrpc":"2.0","id":"x","method":"tools/list","params":{"cursor":"AAAA"}}`, "Accept: application/json, text/event-stream"),
		request("POST", "/", `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1,"reason":"r"}}`, "Accept: application/json, text/event-stream"),
		request("POST", "/", `{"jsonrpc":"2.0","id":4,"result":{}}`, "Accept: application/json, text/event-stream"),
		request("GET", "/", "", "Accept: text/event-stream", "Mcp-Session-Id: ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Last-Event-ID: AAAA"), request("DELETE", "/", "", "Mcp-Session-Id: ABC"),
	},
	"record": {
		request("GET", "/checkpoint", ""), request("GET", "/tile/0/000.p/1", ""), request("GET", "/history?limit=1", ""), request("GET", "/open", ""),
		request("POST", "/append", `{"v":1,"id":"01900000-0000-7000-8000-000000000009","type":"alert.raised","writer_time":"2026-01-02T15:04:05Z","agent":"a","details":{"alert":"mint"}}`+"\n", "Content-Type: application/x-ndjson"),
		request("POST", "/revocations", `{"run":"no-such-run","reason":"abuse"}`), request("GET", "/readyz", ""),
	},
	"metrics": {request("GET", "/metrics", "", "Accept: text/plain;version=0.0.4", "Accept-Encoding: gzip")},
	"witness": {
		request("POST", "/add-checkpoint", "old 0\n\nabuse.example/log\n1\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\n\u2014 abuse.example/log AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n", "Content-Type: text/plain"),
		request("GET", "/forks", ""), request("GET", "/healthz", ""),
	},
}

// abuseTokens are whose tokens are shown, by listener: first those that belong
// there. An empty name shows none, and garbage one that nobody has.
var abuseTokens = map[string][]string{
	"broker":   {"orchestrator", "resource-server"},
	"recorder": {"writer", "approver", "reviewer", "responder"},
	"http":     {"session-http"},
	"proxy":    {"session-http"},
	"mcp":      {"session-mcp"},
	"record":   {"record-reviewer", "record-writer"},
}

var abuseEveryone = []string{"orchestrator", "resource-server", "writer", "approver", "reviewer", "responder", "session-http", "session-mcp", "session-postgres", "garbage", ""}

// draw is the generator of one request's damage.
type draw struct{ *rand.Rand }

func newDraw(seed, n uint64) draw { return draw{rand.New(rand.NewPCG(seed, n))} }

// one is any of list.
func one[T any](d draw, list []T) T { return list[d.IntN(len(list))] }

func (d draw) chance(percent int) bool { return d.IntN(100) < percent }

// spice is what breaks parsers.
var spice = []string{
	"\x00", "\r\n", "\n", "\r", "\r\n\r\n", " ", "\t", "%00", "%", "%2e%2e%2f", "../", "//", "\\", "\xff\xfe", "\xef\xbb\xbf", "\xc0\xaf", "\u202e", "\u0130", "{", "}", "[", "]", `"`, ",", ":",
	`\u0000`, `\ud800`, `\u0065`, "-1", "0", "1e999", "99999999999999999999999", "9223372036854775808", "-0", "null", "true", "NaN", "'", ";", "--", "/*", "$1", "@", "é", "<script>", "${jndi:x}", "${}", "*",
	"Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\n", "Content-Length: 99999999999\r\n", "Expect: 100-continue\r\n", "Connection: close\r\n", "Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
	"Host: other.example\r\n", "Authorization: Bearer x\r\n", "Content-Encoding: gzip\r\n", "Range: bytes=9-1,-0\r\n", "Prefer: wait=1\r\n", "Idempotency-Key: \x7f\r\n", "X-Request-Id: ../../x\r\n", "Cookie: a=b; a=c\r\n", "traceparent: 00-0-0-ff\r\n",
	strings.Repeat("[", 3000), strings.Repeat(`{"a":`, 1500), strings.Repeat("A", 40<<10), strings.Repeat("a=b&", 3000), strings.Repeat("X: y\r\n", 500), "5;" + strings.Repeat("e", 20<<10) + "\r\nhello\r\n",
}

// damage edits b between from and to, one to four times.
func (d draw) damage(b []byte, from, to int) []byte {
	for range 1 + d.IntN(4) {
		to = min(to, len(b))
		if from > to {
			from = to
		}
		i := from + d.IntN(to-from+1)
		j := min(to, i+d.IntN(16))
		before := len(b)
		switch d.IntN(7) {
		case 0: // a bit
			if i < len(b) {
				b[i] ^= 1 << d.IntN(8)
			}
		case 1: // gone
			b = slices.Delete(b, i, j)
		case 2: // twice
			b = slices.Insert(b, i, bytes.Clone(b[i:j])...)
		case 3: // noise
			b = slices.Insert(b, i, d.noise(1+d.IntN(12))...)
		case 4, 5:
			b = slices.Insert(b, i, []byte(one(d, spice))...)
		case 6: // cut off
			b = slices.Delete(b, i, to)
		}
		to += len(b) - before
	}
	return b
}

func (d draw) noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(d.Uint32())
	}
	return b
}

var oddlyLong = strings.Repeat("é", 3000)

// odd are values that stand where others are expected, its own for each caller,
// who may change them.
func odd() []any {
	return []any{nil, true, false, 0, -1, 1e300, json.Number("123456789012345678901234567890"), "", " ", "\x00", "a\u0000b", "../..", "*", oddlyLong, []any{}, map[string]any{}, []any{nil, []any{}}, map[string]any{"": ""}, "2026-13-45T99:99:99Z", "1h1h", "-1ns", "99999h", "spiffe://x/../y", "vault:demo-admin", "user:approver-a"}
}

// json damages a document without making it no JSON; what is none is returned
// as it is.
func (d draw) json(b []byte) []byte {
	var v any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if dec.Decode(&v) != nil {
		return b
	}
	for range 1 + d.IntN(2) {
		v = d.node(v)
	}
	out, err := json.Marshal(v)
	if err != nil {
		return b
	}
	if d.chance(10) && len(out) > 2 && out[0] == '{' && out[1] == '"' { // its first member twice
		if i := bytes.IndexAny(out, ",}"); i > 0 {
			out = append(append(bytes.Clone(out[:i]), ','), out[1:]...)
		}
	}
	return out
}

func (d draw) node(v any) any {
	if d.chance(25) {
		return one(d, odd())
	}
	switch v := v.(type) {
	case map[string]any:
		if len(v) == 0 {
			return one(d, odd())
		}
		k := one(d, slices.Sorted(maps.Keys(v)))
		switch d.IntN(6) {
		case 0:
			delete(v, k)
		case 1:
			v[strings.ToUpper(k)] = v[k]
		case 2:
			v[k+one(d, spice[:20])] = one(d, odd())
		default:
			v[k] = d.node(v[k])
		}
		return v
	case []any:
		if len(v) > 0 {
			i := d.IntN(len(v))
			v[i] = d.node(v[i])
		}
		return append(v, one(d, odd()))
	case string:
		return string(d.damage([]byte(v), 0, len(v)))
	}
	return one(d, odd())
}

// http draws a malformed request for a listener. framed says that its frame is
// whole, so that another may follow it on the same connection.
func (d draw) http(listener string) (text []byte, framed bool) {
	valid := abuseValid[listener]
	text = []byte(one(d, valid))
	own := abuseTokens[listener]
	token := one(d, abuseEveryone)
	if len(own) > 0 && d.chance(60) {
		token = one(d, own)
	}
	if token == "" {
		text = bytes.Replace(text, []byte("Authorization: Bearer @token@\r\n"), nil, 1)
	}
	text = bytes.ReplaceAll(text, []byte("@token@"), []byte("@"+token+"@"))
	line := bytes.IndexByte(text, '\r')
	body := bytes.Index(text, []byte("\r\n\r\n")) + 4
	switch how := d.IntN(100); {
	case how < 55:
		switch {
		case body == len(text): // none: what is asked for
			text = d.damage(text, bytes.IndexByte(text, ' ')+2, line-len(" HTTP/1.1"))
		case d.chance(60):
			return append(text[:body:body], d.json(text[body:])...), true
		default:
			text = d.damage(text, body, len(text))
			return text, true
		}
	case how < 65:
		text = d.damage(text, 0, line)
	case how < 80:
		text = d.damage(text, line, body)
	case how < 90:
		text = d.damage(text, 0, len(text))
	case how < 95: // half of one, and half of another
		other := []byte(one(d, valid))
		text = append(text[:d.IntN(len(text)):len(text)], other[d.IntN(len(other)):]...)
	default:
		text = d.noise(1 + d.IntN(300))
	}
	return text, false
}

// wire is a request as it is sent: with the length of its body, and the tokens.
func wire(text []byte, tokens map[string]string) []byte {
	if i := bytes.Index(text, []byte("\r\n\r\n")); i >= 0 {
		text = bytes.Replace(text, []byte("@length@"), strconv.AppendInt(nil, int64(len(text)-i-4), 10), 1)
	}
	if bytes.IndexByte(text, '@') < 0 {
		return text
	}
	text = bytes.ReplaceAll(text, []byte(pgPlace), []byte(tokens["session-postgres"]))
	for name, token := range tokens {
		text = bytes.ReplaceAll(text, []byte("@"+name+"@"), []byte(token))
	}
	return text
}

// pgStartup is a StartupMessage of the protocol 3.0.
func pgStartup(settings ...string) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 4), 3<<16)
	for _, s := range settings {
		b = append(append(b, s...), 0)
	}
	b = append(b, 0)
	binary.BigEndian.PutUint32(b, uint32(len(b)))
	return b
}

func pgMessage(typ byte, body string) []byte {
	b := append([]byte{typ, 0, 0, 0, 0}, body...)
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-1))
	return b
}

// pgPlace is the place of a session's token in a message, as long as one.
var pgPlace = "@session-postgres@" + strings.Repeat("-", 25)

// pgValid are messages of a client that is let in.
var pgValid = [][]byte{
	pgMessage('Q', "SELECT id, email FROM orders WHERE id = 1\x00"), pgMessage('Q', "BEGIN; SELECT count(*) FROM orders; COMMIT\x00"), pgMessage('Q', "DELETE FROM orders\x00"),
	pgMessage('Q', "COPY orders TO STDOUT\x00"), pgMessage('Q', "COPY orders FROM STDIN\x00"), pgMessage('d', "1\tx\n"), pgMessage('c', ""), pgMessage('f', "no\x00"),
	pgMessage('Q', "WITH x AS (SELECT * FROM orders) SELECT email || 'x' FROM x ORDER BY 1\x00"), pgMessage('Q', "SET client_encoding = 'SQL_ASCII'\x00"), pgMessage('Q', "\x00"),
	append(append(append(append(pgMessage('P', "s\x00SELECT id FROM orders WHERE id = $1\x00\x00\x01\x00\x00\x00\x17"), pgMessage('B', "p\x00s\x00\x00\x00\x00\x01\x00\x00\x00\x011\x00\x00")...),
		pgMessage('D', "Pp\x00")...), pgMessage('E', "p\x00\x00\x00\x00\x02")...), pgMessage('S', "")...),
	pgMessage('C', "Ss\x00"), pgMessage('H', ""), pgMessage('F', "\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"), pgMessage('p', "x\x00"), pgMessage('S', ""),
}

// postgres draws a malformed message: the first of a connection, or, within,
// one of a client that is let in.
func (d draw) postgres(within bool) []byte {
	if !within {
		b := pgStartup("user", "step", "database", "orders", "application_name", "abuse", "client_encoding", "UTF8")
		switch d.IntN(5) {
		case 0:
			b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 8), 80877103) // SSLRequest
		case 1:
			b = append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 16), 80877102), d.noise(8)...) // CancelRequest
		}
		if d.chance(70) {
			b = append(b, pgMessage('p', pgPlace+"\x00")...)
		}
		b = append(b, one(d, pgValid)...)
		if d.chance(10) {
			return d.noise(1 + d.IntN(200))
		}
		return d.damage(b, 0, len(b))
	}
	b := bytes.Clone(one(d, pgValid))
	if d.chance(60) && len(b) > 6 { // the text alone, and its length with it
		body := d.damage(bytes.Clone(b[5:]), 0, len(b)-5)
		return pgMessage(b[0], string(body))
	}
	return d.damage(b, 0, len(b))
}

// tls draws what is no handshake.
func (d draw) tls() []byte {
	hello := append([]byte{22, 3, 1, 0, 60, 1, 0, 0, 56, 3, 3}, make([]byte, 54)...)
	if d.chance(30) {
		return d.noise(1 + d.IntN(300))
	}
	return d.damage(hello, 0, len(hello))
}

// abuseRun names a step that nobody else has.
func abuseRun() string { return fmt.Sprintf("sessions-%s", store.NewID()) }
