package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/countersign-dev/countersign/api/problem"
)

// pipes is a listener whose connections are pipes in memory: nothing is
// buffered, so that whoever does not read holds the server up at once, and the
// clock of a test moves when all of them wait.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	select {
	case <-p.done:
	default:
		close(p.done)
	}
	return nil
}

func (*pipes) Addr() net.Addr { return &net.TCPAddr{} }

// kind is a listener as this program has them.
type kind struct {
	name string
	conf Config
}

func kinds(t *testing.T, api, streams http.Handler) []kind {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	of := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Now().AddDate(100, 0, 0), DNSNames: []string{"x"}}
	der, err := x509.CreateCertificate(rand.Reader, of, of, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secure := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	return []kind{
		{"API", Config{Handler: api, Log: zap.NewNop()}},
		{"API over TLS", Config{Handler: api, TLS: secure, Log: zap.NewNop()}},
		{"gateway", Config{Handler: streams, Log: zap.NewNop(), Streams: true, H2C: true}},
		{"gateway over TLS", Config{Handler: streams, TLS: secure, Log: zap.NewNop(), Streams: true, H2C: true}},
	}
}

// client connects to a server of k, by TLS where it has that, with alpn.
func (k kind) client(t *testing.T, alpn string) net.Conn {
	l := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	k.conf.Drain = time.Second
	go func() { ended <- Serve(ctx, l, k.conf) }()
	ours, theirs := net.Pipe()
	t.Cleanup(func() {
		ours.Close()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	l.conns <- theirs
	if k.conf.TLS == nil || alpn == "" {
		return ours
	}
	c := tls.Client(ours, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	return c
}

// cutWithin fails unless the server closes c within d, however much it says
// before.
func cutWithin(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	began := time.Now()
	_ = c.SetReadDeadline(began.Add(d + time.Minute))
	_, err := io.Copy(io.Discard, c)
	if took := time.Since(began); took > d {
		t.Errorf("cut after %s, want %s at most (%v)", took, d, err)
	}
}

// trickle writes first, and then text in a loop, a byte each second, until the
// other side is gone.
func trickle(t *testing.T, c net.Conn, first, text string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := io.WriteString(c, first)
		for i := 0; err == nil; i++ {
			_, err = io.WriteString(c, text[i%len(text):i%len(text)+1])
			time.Sleep(time.Second)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

func each(t *testing.T, test func(t *testing.T, k kind, h1 func() net.Conn)) {
	api := router()
	streams := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // refuses, as to who shows no token
		w.Header().Set("Connection", "close")
		problem.Write(w, r, problem.Unauthenticated())
	})
	for i := range kinds(t, api, streams) {
		k := kinds(t, api, streams)[i]
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test(t, k, func() net.Conn { return k.client(t, "http/1.1") })
			})
		})
	}
}

func TestWhoSendsNothingOrItsHeadersByteByByteIsCutOff(t *testing.T) {
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		cutWithin(t, h1(), headerTime+time.Second)
	})
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		c := h1()
		trickle(t, c, "", "GET / HTTP/1.1\r\nHost: x\r\n"+strings.Repeat("X-Slow: y\r\n", 100))
		cutWithin(t, c, headerTime+time.Second)
	})
}

func TestAHandshakeThatStopsIsCutOff(t *testing.T) {
	each(t, func(t *testing.T, k kind, _ func() net.Conn) {
		c := k.client(t, "")
		trickle(t, c, "", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
		cutWithin(t, c, headerTime+time.Second)
	})
}

func TestABodyThatArrivesByteByByteIsCutOff(t *testing.T) {
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		c := h1()
		trickle(t, c, "POST /things/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n{", " ")
		cutWithin(t, c, BodyTime+headerTime)
	})
}

func TestAnIdleConnectionIsClosed(t *testing.T) {
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		c := h1()
		if _, err := io.WriteString(c, "GET /both HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		cutWithin(t, c, idleTime+time.Second)
	})
	each(t, func(t *testing.T, k kind, _ func() net.Conn) {
		if k.name == "API" {
			return // without TLS it has no HTTP/2
		}
		c := k.client(t, "h2")
		f := http2.NewFramer(c, nil)
		go func() {
			_, _ = io.WriteString(c, http2.ClientPreface)
			_ = f.WriteSettings()
		}()
		cutWithin(t, c, idleTime+pingTime)
	})
}

func TestWhoNeverReadsIsCutOff(t *testing.T) {
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		c := h1()
		cut := make(chan time.Duration)
		began := time.Now()
		go func() { // one answer is too much already: a pipe holds nothing
			for {
				if _, err := io.WriteString(c, "GET /both HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					cut <- time.Since(began)
					return
				}
			}
		}()
		within := writeTime
		if k.conf.Streams {
			within = stallTime
		}
		if took := <-cut; took > within+10*time.Second { // TLS has a few seconds more to say that it ends
			t.Errorf("cut after %s", took)
		}
	})
	each(t, func(t *testing.T, k kind, _ func() net.Conn) {
		if k.name == "API" {
			return
		}
		c := k.client(t, "h2")
		began := time.Now()
		var head bytes.Buffer
		enc := hpack.NewEncoder(&head)
		for _, h := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":path", "/both"}, {":authority", "x"}} {
			_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
		}
		var out bytes.Buffer
		f := http2.NewFramer(&out, nil)
		out.WriteString(http2.ClientPreface)
		_ = f.WriteSettings()
		for stream := uint32(1); stream < 400; stream += 2 {
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: head.Bytes(), EndHeaders: true, EndStream: true})
		}
		written := make(chan struct{})
		go func() {
			defer close(written)
			_, _ = c.Write(out.Bytes())
		}()
		time.Sleep(stallTime + pingAfter + pingTime + 10*time.Second)
		if _, err := c.Write([]byte{0}); err == nil {
			t.Errorf("over HTTP/2: not cut after %s", time.Since(began))
		}
		<-written
	})
}

func TestHugeHeadersAndChunkExtensionsAreCutOff(t *testing.T) {
	each(t, func(t *testing.T, k kind, h1 func() net.Conn) {
		for _, text := range []string{
			"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("y", 8<<20),
			"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 1<<20),
			"GET /" + strings.Repeat("y", 8<<20),
			"POST /things/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + strings.Repeat("e", 8<<20),
			"POST /things/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1;eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee\r\n \r\n", 1<<18),
			"POST /things/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X-Trailer: y\r\n", 1<<19),
		} {
			c := h1()
			taken := make(chan int)
			go func() {
				n := 0
				for n < len(text) {
					m, err := io.WriteString(c, text[n:min(n+4096, len(text))])
					n += m
					if err != nil {
						break
					}
				}
				taken <- n
			}()
			go func() { _, _ = io.Copy(io.Discard, c) }()
			// net/http reads up to 256 KiB of a body on, so that its answer is seen.
			if n := <-taken; n > 1<<20 {
				t.Errorf("%d bytes were taken of %.60q…", n, text)
			}
			c.Close()
		}
	})
}

// A stream that is opened and reset at once (CVE-2023-44487) costs no more than
// one that is not, and floods of settings and pings end their connection.
func TestFloodsOverHTTP2AreBounded(t *testing.T) {
	for _, flood := range []string{"reset", "settings", "ping"} {
		var running, most, calls atomic.Int64
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			calls.Add(1)
			most.Store(max(most.Load(), running.Add(1)))
			defer running.Add(-1)
			<-r.Context().Done()
			time.Sleep(10 * time.Second) // as a call that cannot be broken off
		})
		k := kinds(t, h, h)[2]
		t.Run(flood, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := k.client(t, "")
				var head bytes.Buffer
				enc := hpack.NewEncoder(&head)
				for _, h := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":path", "/"}, {":authority", "x"}} {
					_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
				}
				if flood == "reset" {
					go func() { _, _ = io.Copy(io.Discard, c) }()
				}
				out := bufio.NewWriter(c)
				f := http2.NewFramer(out, nil)
				_, _ = out.WriteString(http2.ClientPreface)
				_ = f.WriteSettings()
				sent := 0
				for err := error(nil); err == nil && sent < 500_000; sent++ {
					if sent%1000 == 999 {
						time.Sleep(100 * time.Millisecond) // or no time would pass
					}
					stream := uint32(2*sent + 1)
					switch flood {
					case "reset":
						_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: head.Bytes(), EndHeaders: true, EndStream: true})
						err = f.WriteRSTStream(stream, http2.ErrCodeCancel)
					case "settings":
						err = f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
					case "ping":
						err = f.WritePing(false, [8]byte{})
					}
				}
				if sent >= 500_000 || most.Load() > 250 {
					t.Errorf("%d were taken, %d ran at once, of %d calls", sent, most.Load(), calls.Load())
				}
				time.Sleep(time.Minute)
				if n := running.Load(); n != 0 {
					t.Errorf("%d still run", n)
				}
			})
		})
	}
}

func TestAThousandIdleConnectionsAreLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, l, Config{Handler: router(), Log: zap.NewNop(), Drain: time.Second}) }()
		var open atomic.Int64
		for i := range 3000 {
			ours, theirs := net.Pipe()
			l.conns <- theirs
			open.Add(1)
			go func() {
				if i%2 == 0 { // of half of them a call was answered
					fmt.Fprint(ours, "GET /both HTTP/1.1\r\nHost: x\r\n\r\n")
				}
				_, _ = io.Copy(io.Discard, ours)
				open.Add(-1)
			}()
		}
		time.Sleep(headerTime + time.Second)
		if n := open.Load(); n != 1500 {
			t.Errorf("%d are open after %s", n, headerTime)
		}
		time.Sleep(idleTime)
		if n := open.Load(); n != 0 {
			t.Errorf("%d are open after %s", n, idleTime)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
