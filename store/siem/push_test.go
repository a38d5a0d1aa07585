package siem

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// TestMain becomes, when asked, the process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("COUNTERSIGN_TEST_PUSH"); dir != "" {
		pushAndDie(dir)
	}
	os.Exit(m.Run())
}

const origin = "log.example.test/ledger"

// world is a ledger and what is pushed from it.
type world struct {
	testing.TB
	dir string
	l   *ledger.Ledger
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{TB: t, dir: t.TempDir()}
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "key"), []byte(skey+"\n"+vkey), 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	return w
}

func openLedger(dir string) (*ledger.Ledger, error) {
	key, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil {
		return nil, err
	}
	skey, vkey, _ := strings.Cut(string(key), "\n")
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, err
	}
	return ledger.Open(context.Background(), ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: make([]byte, 32), RecheckEvery: -1})
}

func (w *world) open() {
	w.Helper()
	l, err := openLedger(w.dir)
	if err != nil {
		w.Fatal(err)
	}
	w.l = l
	w.Cleanup(func() { l.Close() })
}

// append adds n uses, each with a sealed text.
func (w *world) append(n int) {
	w.Helper()
	for n > 0 {
		var lines [][]byte
		for range min(n, 100) {
			s := &store.Submission{Entry: store.Entry{V: 1, ID: store.NewID(), Type: store.CredentialUsed, WriterTime: store.At(time.Now()),
				Agent: "spiffe://example.test/orchestrator/demo", Orchestrator: "demo", Run: "run-1", Request: "req_1", Action: "orders-db:read"}}
			s.SetDetails(store.UsedDetails{Intent: "i", Via: "introspection", By: "orders", Use: "GET /"})
			s.Seal(store.SealedReason, "ERASABLE TEXT")
			b, err := s.Marshal()
			if err != nil {
				w.Fatal(err)
			}
			lines = append(lines, b)
		}
		if _, err := w.l.Append(context.Background(), ledger.Author{Name: "broker-1"}, lines); err != nil {
			w.Fatal(err)
		}
		n -= len(lines)
	}
}

func quick(dir string) Options {
	return Options{Dir: filepath.Join(dir, "siem"), Product: Product{Log: origin, Version: "v1"}, Log: zap.NewNop(),
		Poll: 5 * time.Millisecond, MinWait: 5 * time.Millisecond, MaxWait: 20 * time.Millisecond, Timeout: 2 * time.Second, Confirm: 30 * time.Millisecond}
}

func (w *world) push(c Config, o Options) *Pusher {
	w.Helper()
	p, err := Open(context.Background(), c, w.l, o)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { p.Close() })
	return p
}

// until waits for ok.
func (w *world) until(what string, ok func() bool) {
	w.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("not within a minute: %s", what)
		}
	}
}

// got is what a receiver took: by index, how often.
type got struct {
	mu     sync.Mutex
	events map[int64]int
	order  []int64
	bodies bytes.Buffer
}

func (g *got) take(line []byte) error {
	var ev struct {
		Metadata struct {
			UID      string `json:"uid"`
			Log      string `json:"log_name"`
			Sequence int64  `json:"sequence"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(line, &ev); err != nil {
		return err
	}
	if ev.Metadata.UID == "" || ev.Metadata.Log != origin {
		return fmt.Errorf("the event names no entry: %s", line)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.events == nil {
		g.events = map[int64]int{}
	}
	if g.events[ev.Metadata.Sequence]++; g.events[ev.Metadata.Sequence] == 1 {
		g.order = append(g.order, ev.Metadata.Sequence)
	}
	g.bodies.Write(line)
	return nil
}

func (g *got) all(from, to int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := from; i < to; i++ {
		if g.events[i] == 0 {
			return false
		}
	}
	return true
}

func (g *got) inOrder() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.IsSorted(g.order)
}

// body reads a batch.
func body(r *http.Request) (lines [][]byte, err error) {
	var in io.Reader = r.Body
	if r.Header.Get("Content-Encoding") == "gzip" {
		if in, err = gzip.NewReader(in); err != nil {
			return nil, err
		}
	}
	b, err := io.ReadAll(in)
	if err != nil {
		return nil, err
	}
	return bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n")), nil
}

func TestEveryEntryReachesAnHTTPReceiverThatFailsInEachWay(t *testing.T) {
	w := newWorld(t)
	token := filepath.Join(w.dir, "token")
	os.WriteFile(token, []byte("t0ken\n"), 0o600)
	var g got
	var calls, unauthorized atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer t0ken" || r.Header.Get("X-Extra") != "t0ken" {
			unauthorized.Add(1)
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		lines, err := body(r)
		if err != nil {
			t.Error(err)
		}
		switch calls.Add(1) {
		case 1:
			rw.WriteHeader(http.StatusInternalServerError)
			return
		case 2:
			rw.Header().Set("Retry-After", "0")
			rw.WriteHeader(http.StatusTooManyRequests)
			return
		case 3: // stalls
			<-r.Context().Done()
			return
		case 4: // dies before it answers
			panic(http.ErrAbortHandler)
		case 5: // sends elsewhere, which is not followed
			http.Redirect(rw, r, "/elsewhere", http.StatusTemporaryRedirect)
			return
		case 6: // took it, and dies while it says so
			for _, line := range lines {
				g.take(line)
			}
			c, buf, _ := http.NewResponseController(rw).Hijack()
			buf.WriteString("HTTP/1.1 2")
			buf.Flush()
			c.Close()
			return
		}
		for _, line := range lines {
			if err := g.take(line); err != nil {
				t.Error(err)
			}
		}
	}))
	defer srv.Close()
	w.append(1200)
	o := quick(w.dir)
	o.Timeout = 300 * time.Millisecond
	p := w.push(Config{{Name: "lake", HTTP: &HTTPConfig{URL: srv.URL + "/in", Token: token, Headers: map[string]string{"X-Extra": token}}, Since: "start"}}, o)
	w.until("1,200 entries", func() bool { return g.all(0, 1200) })
	w.append(10)
	w.until("10 more", func() bool { return g.all(1200, 1210) && p.Status()[0].Next == 1210 })
	if n := unauthorized.Load(); n != 0 {
		t.Errorf("%d calls came without the token", n)
	}
	if !g.inOrder() {
		t.Error("events came out of order")
	}
	if bytes.Contains(g.bodies.Bytes(), []byte("ERASABLE")) {
		t.Error("an erasable text left without being asked for")
	}
	if s := p.Status()[0]; s.Error != "" || !s.Since.IsZero() {
		t.Errorf("the status still names an error: %+v", s)
	}
}

func TestASecretThatIsReplacedCountsWithTheNextBatch(t *testing.T) {
	w := newWorld(t)
	token := filepath.Join(w.dir, "token")
	os.WriteFile(token, []byte("old"), 0o600)
	var g got
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer new" {
			rw.WriteHeader(http.StatusForbidden)
			return
		}
		lines, _ := body(r)
		for _, l := range lines {
			g.take(l)
		}
	}))
	defer srv.Close()
	w.append(3)
	p := w.push(Config{{Name: "lake", HTTP: &HTTPConfig{URL: srv.URL, Token: token, Plain: true}, Since: "start"}}, quick(w.dir))
	w.until("the refusal", func() bool { return strings.Contains(p.Status()[0].Error, "403") })
	os.WriteFile(token, []byte("new"), 0o600)
	w.until("the entries", func() bool { return g.all(0, 3) })
}

func TestARefusedBatchIsHalvedAndARefusedEventGoesWithoutDetails(t *testing.T) {
	w := newWorld(t)
	var g got
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		lines, _ := body(r)
		for _, l := range lines {
			if len(lines) > 3 || bytes.Contains(l, []byte(`"sequence":5,`)) && bytes.Contains(l, []byte(`"details"`)) {
				rw.WriteHeader(http.StatusRequestEntityTooLarge)
				return
			}
		}
		for _, l := range lines {
			g.take(l)
		}
	}))
	defer srv.Close()
	w.append(10)
	p := w.push(Config{{Name: "lake", HTTP: &HTTPConfig{URL: srv.URL}, Since: "start"}}, quick(w.dir))
	w.until("10 entries", func() bool { return g.all(0, 10) && p.Status()[0].Next == 10 })
	if n := bytes.Count(g.bodies.Bytes(), []byte(`"cut":true`)); n != 1 {
		t.Errorf("%d events were cut, want 1", n)
	}
}

func TestADestinationThatTakesNothingHoldsUpNoOther(t *testing.T) {
	w := newWorld(t)
	var g got
	good := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		lines, _ := body(r)
		for _, l := range lines {
			g.take(l)
		}
	}))
	defer good.Close()
	dead, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and reads nothing
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	o := quick(w.dir)
	o.Timeout = time.Minute
	p := w.push(Config{
		{Name: "dead-http", HTTP: &HTTPConfig{URL: "http://" + dead.Addr().String()}},
		{Name: "dead-syslog", Syslog: &SyslogConfig{Addr: dead.Addr().String()}},
		{Name: "good", HTTP: &HTTPConfig{URL: good.URL}, Types: []string{"credential.*"}},
	}, o)
	w.append(500)
	w.until("the entries at the one that is well", func() bool { return g.all(0, 500) })
	began := time.Now()
	p.Close()
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("closing took %s with destinations that are dead", d)
	}
	if n := p.Status()[0].Next; n != 0 {
		t.Errorf("the dead destination stands at %d", n)
	}
}

func TestADestinationBeginsNowOrAtTheStartAndGoesOnAfterARestart(t *testing.T) {
	w := newWorld(t)
	var g got
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		lines, _ := body(r)
		for _, l := range lines {
			g.take(l)
		}
	}))
	defer srv.Close()
	w.append(5)
	c := Config{{Name: "now", HTTP: &HTTPConfig{URL: srv.URL}}, {Name: "other", HTTP: &HTTPConfig{URL: srv.URL}, Types: []string{"alert.raised"}}}
	p := w.push(c, quick(w.dir))
	p.Close()
	w.append(5) // while nothing runs
	p = w.push(c, quick(w.dir))
	w.until("what came meanwhile", func() bool { return g.all(5, 10) && p.Status()[0].Next == 10 })
	p.Close()
	if g.all(4, 5) || len(g.order) != 5 {
		t.Errorf("got the entries %v, want 5 to 9", g.order)
	}
	b, _ := os.ReadFile(filepath.Join(w.dir, "siem", "other.cursor"))
	if at, err := parseCursor(b); err != nil || at.Next != 10 {
		t.Errorf("the destination that nothing was for stands at %s, %v", b, err)
	}
	// A cursor that cannot be of this log is refused, not begun anew.
	for _, bad := range []string{`{"log":"another.example/log","next":1}`, `{"log":"` + origin + `","next":11}`, `{`, ``, `{"log":"` + origin + `","next":-1}`} {
		os.WriteFile(filepath.Join(w.dir, "siem", "now.cursor"), []byte(bad), 0o600)
		if _, err := Open(context.Background(), c, w.l, quick(w.dir)); err == nil {
			t.Errorf("the cursor %q is taken", bad)
		}
	}
}

func TestTextsArePushedWhereTheConfigurationSaysSo(t *testing.T) {
	w := newWorld(t)
	var g got
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		lines, _ := body(r)
		for _, l := range lines {
			g.take(l)
		}
	}))
	defer srv.Close()
	w.append(1)
	w.push(Config{{Name: "lake", HTTP: &HTTPConfig{URL: srv.URL}, Since: "start", Texts: true}}, quick(w.dir))
	w.until("the entry", func() bool { return g.all(0, 1) })
	if !bytes.Contains(g.bodies.Bytes(), []byte("ERASABLE TEXT")) {
		t.Error("the text is missing")
	}
}

// readFrames reads octet-counted messages until r ends.
func readFrames(r *bufio.Reader, fn func(msg []byte)) error {
	for {
		n, err := r.ReadString(' ')
		if err == io.EOF && n == "" {
			return nil
		}
		size, convErr := strconv.Atoi(strings.TrimSuffix(n, " "))
		if err != nil || convErr != nil {
			return fmt.Errorf("no frame: %q: %w", n, errors.Join(err, convErr))
		}
		b := make([]byte, size)
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		fn(b)
	}
}

// take5424 checks a message and takes its event.
func (g *got) take5424(msg []byte) error {
	head, event, ok := bytes.Cut(msg, []byte("] {"))
	f := strings.SplitN(string(head), " ", 7)
	if !ok || len(f) != 7 || !strings.HasPrefix(f[0], "<110>1") || f[3] != "countersign" || f[5] != "credential.used" || !strings.HasPrefix(f[6], "[countersign@32473 index=\"") {
		return fmt.Errorf("no such message of RFC 5424: %s", msg)
	}
	if _, err := time.Parse(time.RFC3339Nano, f[1]); err != nil {
		return err
	}
	return g.take(append([]byte("{"), event...))
}

// certificate is a certificate for 127.0.0.1, and its PEM.
func certificate(t testing.TB) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "receiver"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestEveryEntryReachesASyslogReceiverThatDropsConnections(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "TCP", true: "TLS"}[secure], func(t *testing.T) {
			w := newWorld(t)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			c := &SyslogConfig{Addr: l.Addr().String()}
			var pair tls.Certificate
			if secure {
				var ca []byte
				pair, ca = certificate(t)
				file := filepath.Join(w.dir, "ca.pem")
				os.WriteFile(file, ca, 0o600)
				c.TLS = &TLSConfig{CA: file}
			}
			var g got
			go func() {
				for n := 1; ; n++ {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					raw := conn.(*net.TCPConn)
					if secure {
						conn = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{pair}})
					}
					r := bufio.NewReader(conn)
					switch n {
					case 1: // drops it at once
						raw.Close()
						continue
					case 2: // reads a part, loses it, and resets
						io.ReadFull(r, make([]byte, 5000))
						raw.SetLinger(0)
						raw.Close()
						continue
					case 3: // reads a part, loses it, and ends with data unread
						io.ReadFull(r, make([]byte, 5000))
						raw.Close()
						continue
					case 4: // says that it ends, and reads nothing
						if secure {
							conn.(*tls.Conn).Handshake()
						}
						raw.CloseWrite()
						time.Sleep(50 * time.Millisecond)
						raw.Close()
						continue
					}
					if err := readFrames(r, func(m []byte) {
						if err := g.take5424(m); err != nil {
							t.Error(err)
						}
					}); err != nil {
						t.Error(err)
					}
					conn.Close()
				}
			}()
			w.append(3000)
			p := w.push(Config{{Name: "soc", Syslog: c, Since: "start"}}, quick(w.dir))
			w.until("3,000 entries, confirmed", func() bool { return p.Status()[0].Next == 3000 })
			if !g.all(0, 3000) {
				t.Error("entries count as delivered that the receiver never had")
			}
			w.append(2)
			w.until("2 more", func() bool { return p.Status()[0].Next == 3002 })
			if !g.all(3000, 3002) || !g.inOrder() {
				t.Error("entries are missing or out of order")
			}
		})
	}
}

func TestASyslogReceiverWithAnotherCertificateGetsNothing(t *testing.T) {
	w := newWorld(t)
	pair, _ := certificate(t)
	_, ca := certificate(t)
	file := filepath.Join(w.dir, "ca.pem")
	os.WriteFile(file, ca, 0o600)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var read atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n, _ := io.Copy(io.Discard, c)
			read.Add(n)
			c.Close()
		}
	}()
	w.append(1)
	p := w.push(Config{{Name: "soc", Syslog: &SyslogConfig{Addr: l.Addr().String(), TLS: &TLSConfig{CA: file}}, Since: "start"}}, quick(w.dir))
	w.until("the error", func() bool { return strings.Contains(p.Status()[0].Error, "certificate") })
	if read.Load() != 0 || p.Status()[0].Next != 0 {
		t.Error("events went to a receiver that is not the one")
	}
}

// pushAndDie pushes to the address in dir/url, and kills itself at the second
// time that something is delivered and its cursor not written.
func pushAndDie(dir string) {
	url, _ := os.ReadFile(filepath.Join(dir, "url"))
	l, err := openLedger(dir)
	if err != nil {
		panic(err)
	}
	o := quick(dir)
	n := 0
	o.confirmed = func(int64) {
		if n++; n == 2 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if _, err := Open(context.Background(), config(string(url)), l, o); err != nil {
		panic(err)
	}
	select {}
}

func config(addr string) Config {
	if strings.HasPrefix(addr, "http") {
		return Config{{Name: "lake", HTTP: &HTTPConfig{URL: addr}, Since: "start"}}
	}
	return Config{{Name: "lake", Syslog: &SyslogConfig{Addr: addr}, Since: "start"}}
}

func TestNothingIsMissingAfterKill9BetweenDeliveryAndCursor(t *testing.T) {
	for _, kind := range []string{"http", "syslog"} {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t)
			w.append(4500)
			w.l.Close()
			var g got
			var addr string
			if kind == "http" {
				srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
					lines, err := body(r)
					if err != nil {
						return // the process died
					}
					for _, l := range lines {
						g.take(l)
					}
				}))
				defer srv.Close()
				addr = srv.URL
			} else {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						readFrames(bufio.NewReader(c), func(m []byte) { g.take5424(m) })
						c.Close()
					}
				}()
				addr = l.Addr().String()
			}
			os.WriteFile(filepath.Join(w.dir, "url"), []byte(addr), 0o600)
			for range 2 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				cmd := exec.CommandContext(ctx, os.Args[0])
				cmd.Env = append(os.Environ(), "COUNTERSIGN_TEST_PUSH="+w.dir)
				out, err := cmd.CombinedOutput()
				cancel()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || ctx.Err() == context.DeadlineExceeded {
					t.Fatalf("the child was not killed where it should be: %v\n%s", err, out)
				}
			}
			w.open()
			p := w.push(config(addr), quick(w.dir))
			w.until("all entries", func() bool { return p.Status()[0].Next == 4500 })
			if !g.all(0, 4500) || !g.inOrder() {
				t.Error("entries are missing, or out of order")
			}
			again := 0
			g.mu.Lock()
			for _, n := range g.events {
				if n > 1 {
					again++
				}
			}
			g.mu.Unlock()
			if again == 0 {
				t.Error("nothing came twice: the children were not killed between delivery and cursor")
			}
		})
	}
}

func TestAConfigurationThatWouldSendInTheClearOrNowhereIsRefused(t *testing.T) {
	facility := 24
	web := func(url string) Destination { return Destination{Name: "a", HTTP: &HTTPConfig{URL: url}} }
	for name, c := range map[string]Config{
		"http elsewhere":        {web("http://siem.example.com")},
		"a name that resolves":  {web("http://localhost.example.com")},
		"a password in the URL": {web("https://u:p@siem.example.com")},
		"no URL":                {web("")},
		"another scheme":        {web("ftp://localhost")},
		"plain syslog":          {{Name: "a", Syslog: &SyslogConfig{Addr: "192.0.2.1:514"}}},
		"no port":               {{Name: "a", Syslog: &SyslogConfig{Addr: "localhost"}}},
		"facility":              {{Name: "a", Syslog: &SyslogConfig{Addr: "localhost:1", Facility: &facility}}},
		"max_bytes":             {{Name: "a", Syslog: &SyslogConfig{Addr: "localhost:1", MaxBytes: 100}}},
		"neither":               {{Name: "a"}},
		"both":                  {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example"}, Syslog: &SyslogConfig{Addr: "localhost:1"}}},
		"no name":               {{HTTP: &HTTPConfig{URL: "https://x.example"}}},
		"a path as name":        {{Name: "../x", HTTP: &HTTPConfig{URL: "https://x.example"}}},
		"a name twice":          {web("https://x.example"), {Name: "A", HTTP: &HTTPConfig{URL: "https://x.example"}}},
		"an unknown type":       {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example"}, Types: []string{"credential.lost"}}},
		"since":                 {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example"}, Since: "yesterday"}},
		"a header of ours":      {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example", Headers: map[string]string{"content-type": "f"}}}},
		"a header split":        {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example", Headers: map[string]string{"X\r\nY": "f"}}}},
		"two authorizations":    {{Name: "a", HTTP: &HTTPConfig{URL: "https://x.example", Token: "f", Headers: map[string]string{"authorization": "f"}}}},
	} {
		if err := c.Check(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	good := Config{web("https://siem.example.com/in?x=1"), {Name: "b", HTTP: &HTTPConfig{URL: "http://[::1]:80"}, Types: []string{"credential.*", "alert.raised"}, Since: "now"},
		{Name: "c", Syslog: &SyslogConfig{Addr: "siem.example.com:6514", TLS: &TLSConfig{}}}, {Name: "d", Syslog: &SyslogConfig{Addr: "127.0.0.1:514"}}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
}

func TestRetryAfterIsReadAsSecondsOrDate(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for h, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "86400": time.Hour, "-3": 0, "soon": 0,
		now.Add(90 * time.Second).Format(http.TimeFormat): 90 * time.Second, now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		if d := retryAfter(h, now); d != want {
			t.Errorf("Retry-After %q: %s, want %s", h, d, want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("120")
	f.Add("Mon, 23 Nov 2026 12:00:00 GMT")
	f.Add("99999999999999999999")
	f.Fuzz(func(t *testing.T, h string) {
		if d := retryAfter(h, time.Unix(1_800_000_000, 0)); d < 0 || d > time.Hour {
			t.Errorf("%q: %s", h, d)
		}
	})
}

func FuzzCursor(f *testing.F) {
	f.Add([]byte(`{"log":"l","next":1}`))
	f.Add([]byte(`{"log":"l","next":1e99}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseCursor(b); err == nil && (c.Next < 0 || c.Log == "") {
			t.Errorf("%q is taken as %+v", b, c)
		}
	})
}

func FuzzStructuredData(f *testing.F) {
	f.Add(`a"]b\`)
	f.Add("\xff\x00")
	f.Fuzz(func(t *testing.T, s string) {
		v := sdValue(s)
		for i := 0; i < len(v); i++ {
			switch v[i] {
			case '\\':
				if i++; i == len(v) || !strings.ContainsRune(`\"]`, rune(v[i])) {
					t.Fatalf("%q has a backslash that escapes nothing", v)
				}
			case '"', ']':
				t.Fatalf("%q ends the value early", v)
			}
		}
		if h := headerField(s, 32); h == "" || len(h) > 32 || strings.ContainsAny(h, " \n") {
			t.Errorf("%q is no field", h)
		}
	})
}
