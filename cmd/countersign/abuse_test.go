package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/issuer/vaulttest"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/refusal"
	"github.com/countersign-dev/countersign/store/trust"
)

var (
	abuseSeed  = flag.Uint64("abuse.seed", 0, "seed of the malformed requests; 0: a new one")
	abuseBatch = flag.Int("abuse.batch", -1, "the one batch of malformed requests to send")
)

const (
	batchSize = 16
	// batchWithin is how long an answer may take. What waits for longer, an
	// approval or a stream, is left.
	batchWithin = 3 * time.Second
)

// abused is everything that listens, as processes of their own: dev (broker,
// recorder, the three gateways), a recorder over TLS with its metrics, and a
// witness.
type abused struct {
	*running
	t     *testing.T
	dir   string
	files *pair
	vault *vaulttest.Server
	dsn   string
	pids  map[string]int           // of dev, record, witness
	quit  map[string]func() string // has one print its goroutines and die of it
	addr  map[string]string        // by listener
	tls   *tls.Config

	mu     sync.Mutex
	tokens map[string]string // by who shows them
	shown  []string          // all that ever were
	opened time.Time
}

// startAbused starts all of it. Its collections of garbage are on stderr.
func startAbused(t *testing.T, vault *vaulttest.Server, dsn string) *abused {
	a := &abused{t: t, dir: t.TempDir(), vault: vault, dsn: dsn, tokens: map[string]string{"garbage": "cs_0123456789abcdef0123456789abcdef"}}
	traced := func(start func()) { // the collections of garbage of what start starts
		t.Setenv("GODEBUG", "gctrace=1")
		t.Setenv("GOGC", "25") // so that there are some
		start()
		must(t, errors.Join(os.Unsetenv("GODEBUG"), os.Unsetenv("GOGC")))
	}
	traced(func() {
		a.running = startDev(t, a.dir, "--vault", vault.Addr, "--vault-token", vault.RootToken, "--postgres", dsn)
	})
	a.tokens["orchestrator"], a.tokens["approver"], a.tokens["reviewer"], a.tokens["responder"] =
		a.Orchestrators[0].Token, a.Approvers[0].Token, a.Reviewers[0].Token, a.Responders[0].Token
	p := &pair{t: t, dir: t.TempDir()}
	a.files = p
	for _, role := range []string{"writer", "resource-server"} {
		a.tokens[role] = p.cli("token", "create", "--file", filepath.Join(a.dir, "tokens"), "--role", role, "--name", "abuse-"+role)
	}
	a.sessions()

	p.certificates()
	roots, err := trust.Open(trust.Files{CA: p.file("ca.pem")}, zap.NewNop())
	must(t, err)
	a.tls = roots.Client()
	a.tls.ServerName = "127.0.0.1"
	p.cli("key", "generate", "log", "--name", "abuse.example/log", "--out", p.file("log.key"))
	p.cli("key", "generate", "witness", "--name", "abuse.example/w", "--out", p.file("witness.key"))
	p.cli("key", "generate", "privacy", "--out", p.file("privacy.key"))
	for _, role := range []string{"reviewer", "writer"} {
		a.tokens["record-"+role] = p.cli("token", "create", "--file", p.file("tokens"), "--role", role, "--name", "abuse-"+role)
	}
	record, metrics, witness := freeAddr(t), freeAddr(t), freeAddr(t)
	p.write("record.yaml", fmt.Sprintf("listen: {addr: %q, cert: %q, key: %q, client_ca: %q}\ndir: %q\nlog_key: %q\nprivacy_key: %q\ntokens: %q\nmetrics_addr: %q\n",
		record, p.file("server.pem"), p.file("server.key"), p.file("ca.pem"), p.file("ledger"), p.file("log.key"), p.file("privacy.key"), p.file("tokens"), metrics))
	p.write("witness.yaml", fmt.Sprintf("listen: {addr: %q}\nkey: %q\ndir: %q\nlogs: [{key: %q}]\n", witness, p.file("witness.key"), p.file("witness"), p.cli("key", "show", p.file("log.key"))))
	a.pids = map[string]int{"dev": a.cmd.Process.Pid}
	a.quit = map[string]func() string{"dev": func() string { return quit(a.cmd, a.done, a.stderr) }}
	for name, u := range map[string]string{"record": "https://" + record, "witness": "http://" + witness} {
		cmd, said := countersign(t, name, "--config", p.file(name+".yaml")), &bytes.Buffer{}
		cmd.Stderr = said
		var done <-chan struct{}
		traced(func() { done, err = vaultdev.Run(cmd) })
		must(t, err)
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			<-done
		})
		eventually(t, name+" is ready", func() bool {
			res, err := p.http.Get(u + "/readyz")
			if err == nil {
				res.Body.Close()
			}
			return err == nil && res.StatusCode == 200
		})
		a.pids[name] = cmd.Process.Pid
		a.quit[name] = func() string { return quit(cmd, done, said) }
	}
	plain := func(u string) string { return strings.TrimPrefix(u, "http://") }
	a.addr = map[string]string{
		"broker": plain(a.API), "recorder": plain(a.Recorder), "http": plain(a.Gateway.HTTP), "proxy": plain(a.Gateway.HTTP), "mcp": plain(a.Gateway.MCP),
		"postgres": a.Gateway.Postgres, "record": record, "tls": record, "metrics": metrics, "witness": witness,
	}
	return a
}

// sessions opens a session of each protocol, when those there are may end soon.
func (a *abused) sessions() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.opened) < 3*time.Minute {
		return
	}
	a.opened = time.Now()
	run := abuseRun()
	for protocol, scope := range map[string]string{"http": "http:demo", "mcp": "mcp:demo", "postgres": "orders-db:read"} {
		status, body := a.call(a.Orchestrators[1].Token, "POST", a.API+"/steps/"+protocol+"/credential", `{"run":"`+run+`","scope":"`+scope+`","delivery":"gateway"}`)
		var c held
		if err := json.Unmarshal([]byte(body), &c); err != nil || status != 201 {
			a.t.Errorf("no session of %s: %d %s", protocol, status, body)
			return
		}
		a.tokens["session-"+protocol] = c.Credential.Token
		a.shown = append(a.shown, c.Credential.Token)
	}
}

func (a *abused) shownNow() map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[string]string{}
	for k, v := range a.tokens {
		out[k] = v
	}
	return out
}

// quit has a process print its goroutines and die of it.
func quit(cmd *exec.Cmd, done <-chan struct{}, said *bytes.Buffer) string {
	_ = cmd.Process.Signal(syscall.SIGQUIT)
	<-done
	return said.String()
}

// fds is how many files and connections a process has open.
func fds(t *testing.T, pid int) int {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatalf("the process is gone: %v", err)
	}
	return len(list)
}

var goroutineHead = regexp.MustCompile(`(?m)^goroutine \d+ .*\[`)

var inHPACK = regexp.MustCompile(`(?s)={18}\n(gc [^\n]*\n)*WARNING: DATA RACE\n[^=]*hpack\.\(\*Encoder\)\.SetMaxDynamicTableSize[^=]*={18}\n`)

// goroutines counts those of a dump, but for connections that a client keeps for
// the next call, and what dev's own MCP service keeps of its sessions.
func goroutines(dump string) (n int) {
	for g := range strings.SplitSeq(dump, "\n\n") {
		if goroutineHead.MatchString(g) && !strings.Contains(g, "created by net/http.(*Transport).dialConn") && !strings.Contains(g, "/modelcontextprotocol/go-sdk/") {
			n++
		}
	}
	return n
}

var ourFrame = regexp.MustCompile(`(?m)^github\.com/countersign-dev/countersign/(\S+)\(`)

// where says which functions goroutines of a dump stand in, the most common first.
func where(dump string) string {
	count := map[string]int{}
	for _, g := range strings.Split(dump, "\n\n") {
		if goroutineHead.MatchString(g) {
			if i := strings.LastIndex(g, "created by "); i >= 0 {
				made, _, _ := strings.Cut(g[i:], "\n")
				made, _, _ = strings.Cut(made, " in goroutine")
				if at := ourFrame.FindStringSubmatch(g); at != nil {
					made += ", in " + at[1]
				}
				count[made]++
			}
		}
	}
	var list []string
	for f, n := range count {
		list = append(list, fmt.Sprintf("%5d %s", n, f))
	}
	slices.Sort(list)
	slices.Reverse(list)
	return strings.Join(list[:min(len(list), 25)], "\n")
}

var gcLine = regexp.MustCompile(`(?m)^gc \d+ @.*->(\d+) MB, `)

// live is the smallest live heap, in MB, of the collections of garbage in the
// second quarter of them, and in the last; -1: there were too few.
func live(log string) (early, late int) {
	var list []int
	for _, m := range gcLine.FindAllStringSubmatch(log, -1) {
		n, _ := strconv.Atoi(m[1])
		list = append(list, n)
	}
	if n := len(list); n >= 12 {
		return slices.Min(list[n/4 : n/2]), slices.Min(list[n*3/4:])
	}
	return -1, -1
}

// harm is a request that was answered as none may be.
type harm struct {
	listener, request, what string
}

// assault sends batches and keeps what came of them.
type assault struct {
	*abused
	seed uint64

	sent   atomic.Int64
	mu     sync.Mutex
	status map[string]map[string]int // by listener
	bad    []harm
	fives  map[string]harm // request IDs of answers with 500
	dead   bool
}

func (s *assault) answered(listener, status string, text []byte, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status[listener] == nil {
		s.status[listener] = map[string]int{}
	}
	s.status[listener][status]++
	if status == "500" {
		s.fives[id] = harm{listener, string(text), "500 with the request ID " + strconv.Quote(id)}
	}
}

// lost says that nobody listens any more.
func (s *assault) lost(listener string, text []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dead {
		s.dead = true
		s.bad = append(s.bad, harm{listener, string(text), fmt.Sprintf("nobody answers any more: %v", err)})
	}
}

func (s *assault) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// dial connects, and closes with a reset, so that the ports of a million
// connections do not run out.
func (s *assault) dial(listener string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", s.addr[listener], 10*time.Second)
	if err != nil {
		return nil, err
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.SetDeadline(time.Now().Add(batchWithin))
	return c, nil
}

// batch sends the nth batch: requests of one listener, over one protocol.
func (s *assault) batch(n int) {
	d := newDraw(s.seed, uint64(n)<<8)
	tokens := s.shownNow()
	switch kind := d.IntN(100); {
	case kind < 56:
		listener := one(d, []string{"broker", "broker", "broker", "recorder", "recorder", "recorder", "recorder", "http", "http", "proxy", "mcp", "mcp", "metrics", "witness"})
		s.http1(d, listener, n, tokens)
	case kind < 80:
		s.http2(d, one(d, []string{"http", "mcp", "record", "http", "mcp"}), n, tokens)
	case kind < 88:
		for i := range batchSize {
			s.raw("postgres", newDraw(s.seed, uint64(n)<<8+uint64(i)+1).postgres(false), tokens, func(r *bufio.Reader, text []byte) {
				first, err := r.ReadByte()
				if err == nil {
					s.answered("postgres", "answer "+string(rune(first)), text, "")
				} else {
					s.answered("postgres", "none", text, "")
				}
			})
		}
	case kind < 96:
		b := pgStartup("user", "step", "database", "orders")
		b = append(b, pgMessage('p', pgPlace+"\x00")...)
		for i := range batchSize {
			b = append(b, newDraw(s.seed, uint64(n)<<8+uint64(i)+1).postgres(true)...)
		}
		s.raw("postgres", b, tokens, func(r *bufio.Reader, text []byte) {
			got, _ := io.ReadAll(io.LimitReader(r, 1<<20))
			if bytes.Contains(got, []byte("BackendKeyData")) || len(got) > 300 { // parameters and key of who is let in
				s.answered("postgres", "let in", text, "")
			} else {
				s.answered("postgres", "turned away", text, "")
			}
		})
		s.sent.Add(batchSize - 1)
	default:
		for i := range batchSize {
			s.raw("tls", newDraw(s.seed, uint64(n)<<8+uint64(i)+1).tls(), tokens, func(r *bufio.Reader, text []byte) {
				_, err := r.ReadByte()
				s.answered("tls", map[bool]string{true: "alert", false: "none"}[err == nil], text, "")
			})
		}
	}
}

// raw sends text over a connection of its own, says that no more comes, and
// reads what is said to that.
func (s *assault) raw(listener string, text []byte, tokens map[string]string, read func(*bufio.Reader, []byte)) {
	defer s.sent.Add(1)
	c, err := s.dial(listener)
	if err != nil {
		s.lost(listener, text, err)
		return
	}
	defer c.Close()
	if _, err := c.Write(wire(text, tokens)); err == nil {
		_ = c.(*net.TCPConn).CloseWrite()
	}
	read(bufio.NewReader(c), text)
}

// http1 sends requests one by one, those whose frame is whole over one
// connection.
func (s *assault) http1(d draw, listener string, n int, tokens map[string]string) {
	var c net.Conn
	var r *bufio.Reader
	end := func() {
		if c != nil {
			c.Close()
			c = nil
		}
	}
	defer end()
	for i := range batchSize {
		text, framed := newDraw(s.seed, uint64(n)<<8+uint64(i)+1).http(listener)
		if !framed {
			s.raw(listener, text, tokens, func(r *bufio.Reader, text []byte) { s.response(listener, r, text) })
			continue
		}
		for again := 0; ; again++ {
			if c == nil {
				var err error
				if c, err = s.dial(listener); err != nil {
					s.lost(listener, text, err)
					return
				}
				r = bufio.NewReader(c)
				again = 1
			}
			_ = c.SetDeadline(time.Now().Add(batchWithin))
			_, err := c.Write(wire(text, tokens))
			goesOn := err == nil && s.response(listener, r, text)
			if !goesOn {
				end()
			}
			if goesOn || again > 0 { // else the connection was closed meanwhile
				break
			}
		}
		s.sent.Add(1)
	}
}

// response reads an answer, and reports whether another request can follow.
func (s *assault) response(listener string, r *bufio.Reader, text []byte) bool {
	method, _, _ := bytes.Cut(text, []byte(" "))
	res, err := http.ReadResponse(r, &http.Request{Method: string(method)})
	if err != nil {
		var late net.Error
		if errors.As(err, &late) && late.Timeout() {
			s.answered(listener, "waits", text, "")
		} else {
			s.answered(listener, "none", text, "")
		}
		return false
	}
	defer res.Body.Close()
	s.answered(listener, strconv.Itoa(res.StatusCode), text, res.Header.Get("X-Request-Id"))
	t := res.Header.Get("Content-Type")
	if res.StatusCode < 200 || strings.HasPrefix(t, "text/event-stream") || strings.HasPrefix(t, "application/x-ndjson") {
		return false
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, 4<<20)); err != nil {
		return false
	}
	return !res.Close
}

// http2 sends all of a batch over one connection, in half of the cases with
// damaged frames.
func (s *assault) http2(d draw, listener string, n int, tokens map[string]string) {
	defer s.sent.Add(batchSize)
	var out, header bytes.Buffer
	out.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&out, nil)
	f.AllowIllegalWrites = true
	enc := hpack.NewEncoder(&header)
	_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	frames := d.chance(50)
	var texts [][]byte
	for i := range batchSize {
		di := newDraw(s.seed, uint64(n)<<8+uint64(i)+1)
		text, _ := di.http(listener)
		texts = append(texts, text)
		head, body, _ := bytes.Cut(wire(text, tokens), []byte("\r\n\r\n"))
		lines := strings.Split(string(head), "\r\n")
		method, rest, _ := strings.Cut(lines[0], " ")
		path, _, _ := strings.Cut(rest, " HTTP/")
		header.Reset()
		write := func(name, value string) { _ = enc.WriteField(hpack.HeaderField{Name: name, Value: value}) }
		write(":method", method)
		write(":scheme", "https")
		write(":path", path)
		write(":authority", "abuse.example")
		for _, l := range lines[1:] {
			name, value, _ := strings.Cut(l, ":")
			if name = strings.ToLower(name); name != "host" && (name != "connection" && name != "upgrade" && name != "transfer-encoding" || di.chance(10)) {
				write(name, strings.TrimPrefix(value, " "))
			}
		}
		at := out.Len()
		stream := uint32(2*i + 1)
		block := header.Bytes()
		first := block[:min(len(block), 16<<10)]
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first, EndHeaders: len(first) == len(block), EndStream: len(body) == 0})
		for rest := block[len(first):]; len(rest) > 0; {
			part := rest[:min(len(rest), 16<<10)]
			rest = rest[len(part):]
			_ = f.WriteContinuation(stream, len(rest) == 0, part)
		}
		for len(body) > 0 {
			part := body[:min(len(body), 16<<10)]
			body = body[len(part):]
			_ = f.WriteData(stream, len(body) == 0, part)
		}
		if frames && di.chance(30) {
			switch di.IntN(6) {
			case 0:
				_ = f.WriteRSTStream(stream, http2.ErrCodeCancel)
			case 1:
				_ = f.WriteWindowUpdate(stream, 1<<31-1)
			case 2:
				_ = f.WritePriority(stream, http2.PriorityParam{StreamDep: stream})
			case 3:
				_ = f.WriteSettings(http2.Setting{ID: http2.SettingID(di.IntN(10)), Val: di.Uint32()})
			default:
				whole := bytes.Clone(out.Bytes()[:at])
				damaged := di.damage(bytes.Clone(out.Bytes()[at:]), 0, out.Len()-at)
				out.Reset()
				out.Write(append(whole, damaged...))
			}
		}
	}
	text := bytes.Join(texts, []byte("\n"))
	c, err := s.dial(listener)
	if err != nil {
		s.lost(listener, text, err)
		return
	}
	defer c.Close()
	if listener == "record" {
		conf := s.tls.Clone()
		conf.NextProtos = []string{"h2"}
		c = tls.Client(c, conf)
	}
	go func() { _, _ = c.Write(out.Bytes()) }() // the answers may be due before the end
	in := http2.NewFramer(io.Discard, c)
	in.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for open := batchSize; open > 0; {
		fr, err := in.ReadFrame()
		if err != nil {
			var late net.Error
			if errors.As(err, &late) && late.Timeout() && !frames {
				s.answered(listener+" over HTTP/2", "waits", text, "")
			}
			return
		}
		switch fr := fr.(type) {
		case *http2.MetaHeadersFrame:
			open--
			id := ""
			for _, h := range fr.RegularFields() {
				if h.Name == "x-request-id" {
					id = h.Value
				}
			}
			text := text
			if i := int(fr.StreamID-1) / 2; i < len(texts) {
				text = texts[i]
			}
			s.answered(listener+" over HTTP/2", fr.PseudoValue("status"), text, id)
		case *http2.RSTStreamFrame:
			open--
			s.answered(listener+" over HTTP/2", "reset", text, "")
		case *http2.GoAwayFrame:
			s.answered(listener+" over HTTP/2", "goaway", text, "")
			return
		}
	}
}

// TestAMillionMalformedRequestsDoNoHarm sends malformed requests to every
// listener, with the tokens of every role and with none: 20,000 of them, and a
// million with -tags slow. What is sent follows from the seed, which is printed;
// -abuse.seed and -abuse.batch send it again. Requests that once did harm stand
// in testdata/abuse, and are sent each time.
func TestAMillionMalformedRequestsDoNoHarm(t *testing.T) {
	dsn := vaulttest.Postgres(t)
	set, err := scopes.Parse("demo.yaml", scopes.Demo(nil), "", nil)
	must(t, err)
	vault, _ := vaulttest.Prepared(t, set, "")
	// What the same processes look like when little was asked of them.
	quiet := startAbused(t, vault, dsn)
	for _, u := range []string{quiet.API + "/readyz", quiet.Recorder + "/readyz", quiet.Gateway.HTTP, quiet.Gateway.MCP} {
		quiet.call(quiet.Orchestrators[0].Token, "GET", u, "")
	}
	http.DefaultClient.CloseIdleConnections()
	quiet.files.http.CloseIdleConnections()
	time.Sleep(200 * time.Millisecond) // a goroutine more is no reason to fail, see slack below
	rest := map[string]string{}
	for name, quit := range quiet.quit {
		rest[name] = quit()
	}

	a := startAbused(t, vault, dsn)
	began := time.Now()
	seed := *abuseSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	s := &assault{abused: a, seed: seed, status: map[string]map[string]int{}, fives: map[string]harm{}}
	open := map[string]int{}
	for name, pid := range a.pids {
		open[name] = fds(t, pid)
	}

	kept, err := filepath.Glob("testdata/abuse/*")
	must(t, err)
	for _, file := range kept {
		text, err := os.ReadFile(file)
		must(t, err)
		listener, _, _ := strings.Cut(filepath.Base(file), "-")
		s.raw(listener, text, s.shownNow(), func(r *bufio.Reader, text []byte) { s.response(listener, r, text) })
	}

	batches := abuseRequests / batchSize
	if *abuseBatch >= 0 {
		s.batch(*abuseBatch)
		batches = 0
	}
	var next atomic.Int64
	var group sync.WaitGroup
	for range 24 {
		group.Go(func() {
			for {
				n := int(next.Add(1)) - 1
				if n >= batches || s.over() {
					return
				}
				if n%1000 == 999 {
					a.sessions()
					t.Logf("%d sent after %s", s.sent.Load(), time.Since(began).Round(time.Second))
				}
				s.batch(n)
			}
		})
	}
	group.Wait()
	sending := time.Since(began)
	t.Logf("%d malformed requests in %s", s.sent.Load(), sending.Round(100*time.Millisecond))

	// It all still answers, and what was opened is closed again.
	for _, u := range []string{a.API, a.Recorder} {
		eventually(t, u+" is ready", func() bool {
			status, _ := a.call("", "GET", u+"/readyz", "")
			return status == 200
		})
	}
	a.ready.check(t, a)
	http.DefaultClient.CloseIdleConnections()
	a.files.http.CloseIdleConnections()
	for name, pid := range a.pids {
		eventually(t, "the connections of "+name+" are closed", func() bool { return fds(t, pid) <= open[name]+16 })
	}

	// The record is whole, and was not flooded.
	code, said, stderr := a.cli(a.Reviewers[0].Token, "verify", a.Recorder, "--key", a.LogKey)
	if code != 0 {
		t.Errorf("the record does not verify: %d %s %s", code, said, stderr)
	}
	s.refusals(sending)
	http.DefaultClient.CloseIdleConnections()

	// Once the last connection is gone nobody is left behind, but what the reads just
	// now began in the background, which is given the time that its twin had.
	time.Sleep(time.Second)
	var logs strings.Builder
	for name, quit := range a.quit {
		dump := quit()
		logs.WriteString(dump)
		before, after := goroutines(rest[name]), goroutines(dump)
		t.Logf("%s: %d goroutines, and %d without abuse", name, after, before)
		if before == 0 || after > before+20 {
			t.Errorf("%s: %d goroutines, and %d without abuse:\n%s", name, after, before, where(dump))
		}
		// The dump of SIGQUIT is no harm done; nor is what net/http of Go 1.26 races
		// for in HTTP/2, with the limit of a table that server.Serve keeps empty.
		text, _, _ := strings.Cut(dump, "SIGQUIT: quit")
		text = inHPACK.ReplaceAllString(text, "")
		for _, word := range []string{"DATA RACE", "fatal error", "panic"} {
			if i := strings.Index(text, word); i >= 0 {
				t.Errorf("%s says: %s", name, text[max(0, i-500):min(len(text), i+5000)])
			}
		}
		early, late := live(dump)
		t.Logf("%s: %d MB live early, %d MB late", name, early, late)
		if early >= 0 && late > early*3/2+48 {
			t.Errorf("%s: %d MB are live early, %d MB late", name, early, late)
		}
	}
	b, err := os.ReadFile(filepath.Join(a.dir, "dev.log"))
	must(t, err)
	logs.Write(b)
	if i := bytes.Index(b, []byte(`"msg":"panic"`)); i >= 0 {
		t.Errorf("something panicked: %s", b[i:min(len(b), i+3000)])
	}

	// No answer of 500 without a cause, no secret.
	for id, f := range s.fives {
		caused, about := false, ""
		for line := range strings.SplitSeq(logs.String(), "\n") {
			if id != "" && strings.Contains(line, id) {
				about = line
				caused = caused || strings.Contains(line, `"level":"error"`)
			}
		}
		if !caused {
			f.what += ", of which the log says " + strconv.Quote(about)
			s.bad = append(s.bad, f)
		} else {
			t.Logf("500: %s\n%q", about, f.request)
		}
	}
	for name, token := range a.tokens {
		a.shown = append(a.shown, token)
		if strings.Contains(logs.String(), token) {
			t.Errorf("the token of %s is in a log", name)
		}
	}
	for _, secret := range append(a.shown, vault.RootToken, devKey(t, vault, "http-demo"), devKey(t, vault, "mcp-demo")) {
		if i := strings.Index(logs.String(), secret); i >= 0 && secret != "" {
			t.Errorf("a secret is in a log: …%s…", logs.String()[max(0, i-300):i])
		}
	}
	for listener, by := range s.status {
		t.Logf("%-20s %v", listener, by)
	}
	t.Logf("%d answers of 500, %d without a cause", len(s.fives), len(s.bad))
	for i, f := range s.bad {
		if i == 5 {
			t.Errorf("and %d more", len(s.bad)-i)
			break
		}
		name := fmt.Sprintf("testdata/abuse/%s-%s", strings.Fields(f.listener)[0], store.NewID())
		must(t, os.MkdirAll("testdata/abuse", 0o755))
		must(t, os.WriteFile(name, []byte(f.request), 0o644))
		t.Errorf("seed %d, %s: %s; the request is kept as %s, which is to be committed:\n%q", seed, f.listener, f.what, name, f.request)
	}
}

// check has each gateway serve one valid call.
func (*ready) check(t *testing.T, a *abused) {
	t.Helper()
	a.opened = time.Time{}
	a.sessions()
	if status, body := a.call(a.tokens["session-http"], "GET", a.Gateway.HTTP+"/customers", ""); status != 200 {
		t.Errorf("the HTTP gateway: %d %s", status, body)
	}
}

// devKey is the key that a demo service wants.
func devKey(t *testing.T, vault *vaulttest.Server, name string) string {
	s, err := vault.Root.Logical().Read("secret/data/" + name)
	must(t, err)
	data, _ := s.Data["data"].(map[string]any)
	key, _ := data["key"].(string)
	if key == "" {
		t.Fatalf("%s has no key", name)
	}
	return key
}

// refusals reads what of the refusals is on record: of each kind at most one a
// second, beside the first 50 of each process's part.
func (s *assault) refusals(sending time.Duration) {
	kinds := map[string]int{}
	entries, attempts := 0, 0
	for cursor := ""; ; {
		status, body := s.call(s.Reviewers[0].Token, "GET", s.Recorder+"/history?type=access.refused&limit=1000&cursor="+url.QueryEscape(cursor), "")
		var page struct {
			Entries []struct {
				Entry store.Entry `json:"entry"`
			} `json:"entries"`
			Next string `json:"next"`
		}
		if err := json.Unmarshal([]byte(body), &page); err != nil || status != 200 {
			s.t.Errorf("history: %d %v", status, err)
			return
		}
		for _, x := range page.Entries {
			d, err := store.DetailsAs[store.RefusedDetails](&x.Entry)
			if err != nil || x.Entry.Writer == "abuse-writer" {
				continue
			}
			entries++
			attempts += 1 + d.Folded
			kinds[x.Entry.Agent+" "+x.Entry.Action+" "+fmt.Sprint(x.Entry.Decision.Reasons)]++
		}
		if cursor = page.Next; cursor == "" {
			break
		}
	}
	// One by one go a burst and then one in each interval, which may be of one kind;
	// what is folded of a kind is one in each interval too.
	most := refusal.Burst + 2*int(sending/refusal.Interval) + 20
	for kind, n := range kinds {
		if n > most {
			s.t.Errorf("%d entries of refusals of one kind in %s: %s", n, sending, kind)
		}
	}
	seen := 0
	for listener, by := range s.status {
		if listener == "broker" || listener == "recorder" || strings.HasPrefix(listener, "mcp") || strings.HasPrefix(listener, "http") {
			seen += by["401"]
		}
	}
	s.t.Logf("%d attempts refused are on record by %d entries of %d kinds; %d answers of 401", attempts, entries, len(kinds), seen)
	if attempts < seen {
		s.t.Errorf("%d attempts are on record, and %d were answered with 401", attempts, seen)
	}
}
