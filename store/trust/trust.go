// Package trust holds what TLS goes by, a certificate with its key and the
// authorities that others are checked against, in step with the files that they
// come from: a file that is replaced counts from the next handshake on, without
// a restart.
package trust

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// lookEvery is how long a replaced file may go unseen.
const lookEvery = time.Second

// maxFile is the largest file that is read, in bytes: thousands of authorities.
const maxFile = 4 << 20

// settled is how old a file's mtime must be at the reading for an unchanged
// mtime to mean an unchanged file: kernels stamp files in ticks of some
// milliseconds.
const settled = 100 * time.Millisecond

// Files are the PEM files that are followed. Each may be empty; Cert and Key go
// together.
type Files struct {
	CA   string // authorities
	Cert string // leaf first, then what leads to an authority
	Key  string
	Now  func() time.Time // nil: time.Now
}

// State is what the files held when each was last whole. It is never changed.
type State struct {
	Certificate *tls.Certificate    // nil: none is named
	Authorities []*x509.Certificate // of CA
	Roots       *x509.CertPool      // the same as a pool; nil, the machine's, where no CA is named

	server *tls.Config
}

// none is the state of a nil Trust.
var none State

// Trust follows files; a nil one has none. They are looked at when they are needed, at most once a
// second; one that is missing, half-written, out of time or not of its key
// leaves what was before in force, and is logged once. It is safe for
// concurrent use.
type Trust struct {
	files Files
	log   *zap.Logger
	state atomic.Pointer[State]
	next  atomic.Int64 // when the files are looked at again, in ns since 1970

	mu       sync.Mutex
	ca, pair part
}

// part is what is read, and replaced, together.
type part struct {
	what    string
	names   []string
	seen    []fs.FileInfo // of what is in force; nil: to be read at the next look
	trouble string        // logged last
}

// Open reads f, each file of which must be whole.
func Open(f Files, log *zap.Logger) (*Trust, error) {
	if (f.Cert == "") != (f.Key == "") {
		return nil, errors.New("a certificate and its key go together")
	}
	if f.Now == nil {
		f.Now = time.Now
	}
	t := &Trust{files: f, log: log, ca: part{what: "authorities"}, pair: part{what: "certificate"}}
	if f.CA != "" {
		t.ca.names = []string{f.CA}
	}
	if f.Cert != "" {
		t.pair.names = []string{f.Cert, f.Key}
	}
	var s State
	for _, p := range []*part{&t.ca, &t.pair} {
		// A pair that is out of time is taken at the start alone: a process that is
		// up and says so is mended sooner than one that is not.
		if err := t.read(p, &s, false); err != nil {
			return nil, err
		}
	}
	if s.Certificate != nil {
		if err := t.inTime(s.Certificate.Leaf); err != nil {
			log.Error("the certificate is not valid now", zap.String("file", f.Cert), zap.Error(err))
		}
	}
	t.put(&s)
	t.next.Store(f.Now().Add(lookEvery).UnixNano())
	return t, nil
}

// Current is what is in force, after a look at the files where one is due.
func (t *Trust) Current() *State {
	if t == nil {
		return &none
	}
	now, next := t.files.Now(), t.next.Load()
	// Whoever moves the time looks; the others go on with what there is.
	if now.UnixNano() >= next && t.next.CompareAndSwap(next, now.Add(lookEvery).UnixNano()) {
		t.look()
	}
	return t.state.Load()
}

func (t *Trust) look() {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, changed := *t.state.Load(), false
	for _, p := range []*part{&t.ca, &t.pair} {
		if p.unchanged() {
			continue
		}
		quiet := p.seen == nil && p.trouble == "" // read again because it was just written
		if err := t.read(p, &s, true); err != nil {
			if p.seen = nil; err.Error() != p.trouble {
				t.log.Error("not reloaded, the old stays in force", zap.String("what", p.what), zap.Strings("files", p.names), zap.Error(err))
			}
			p.trouble = err.Error()
			continue
		}
		p.trouble, changed = "", true
		if !quiet {
			t.log.Info("reloaded", zap.String("what", p.what), zap.Strings("files", p.names))
		}
	}
	if changed {
		t.put(&s)
	}
}

// unchanged reports whether p's files are those that were read.
func (p *part) unchanged() bool {
	if len(p.names) == 0 {
		return true
	}
	if p.seen == nil {
		return false
	}
	for i, name := range p.names {
		info, err := os.Stat(name)
		if err != nil || !os.SameFile(info, p.seen[i]) || info.Size() != p.seen[i].Size() || !info.ModTime().Equal(p.seen[i].ModTime()) {
			return false
		}
	}
	return true
}

// read reads p's files into s, which is left alone where they are not whole.
func (t *Trust) read(p *part, s *State, inTime bool) error {
	if len(p.names) == 0 {
		return nil
	}
	at := time.Now() // the file system's clock, not the injected one
	var texts [][]byte
	var seen []fs.FileInfo
	fresh := false
	for _, name := range p.names {
		b, info, err := readFile(name)
		if err != nil {
			return err
		}
		texts, seen = append(texts, b), append(seen, info)
		fresh = fresh || at.Sub(info.ModTime()) < settled
	}
	if p == &t.ca {
		list, err := parseAuthorities(texts[0])
		if err != nil {
			return fmt.Errorf("%s: %w", p.names[0], err)
		}
		s.Authorities, s.Roots = list, x509.NewCertPool()
		for _, c := range list {
			s.Roots.AddCert(c)
		}
	} else {
		pair, err := tls.X509KeyPair(texts[0], texts[1])
		if err != nil {
			return fmt.Errorf("%s and %s: %w", p.names[0], p.names[1], err)
		}
		if inTime {
			if err := t.inTime(pair.Leaf); err != nil {
				return fmt.Errorf("%s: %w", p.names[0], err)
			}
		}
		s.Certificate = &pair
	}
	if p.seen = seen; fresh {
		p.seen = nil
	}
	return nil
}

func (t *Trust) inTime(leaf *x509.Certificate) error {
	now := t.files.Now()
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate ended at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the certificate begins at %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

func readFile(name string) ([]byte, fs.FileInfo, error) {
	h, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	info, err := h.Stat()
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(h, maxFile+1))
	if err != nil {
		return nil, nil, err
	}
	if len(b) > maxFile {
		return nil, nil, fmt.Errorf("%s has more than %d bytes", name, maxFile)
	}
	return b, info, nil
}

// parseAuthorities reads a bundle of PEM certificates. Unlike
// x509.CertPool.AppendCertsFromPEM it passes over nothing: half a bundle is none.
func parseAuthorities(b []byte) (list []*x509.Certificate, err error) {
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %.32q among the certificates", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	if bytes.Contains(b, []byte("-----BEGIN")) {
		return nil, errors.New("the last PEM block is broken off")
	}
	if len(list) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	return list, nil
}

// put brings s into force.
func (t *Trust) put(s *State) {
	s.server = nil
	if s.Roots != nil && s.Certificate != nil {
		s.server = &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: t.certificate,
			ClientAuth: tls.RequestClientCert, ClientCAs: s.Roots, // the CAs are named to clients as a hint
		}
	}
	t.state.Store(s)
}

func (t *Trust) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return t.Current().Certificate, nil
}

// Server is a listener's configuration, which needs Cert. With a CA it is one of
// HTTP whose clients are asked for a certificate: that they have the key is
// checked in the handshake, what the certificate is worth by who reads the
// request, so that a bad one is answered, and its end and that of its authority
// count on open connections too.
func (t *Trust) Server() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: t.certificate}
	if t.files.CA != "" {
		c.ClientAuth = tls.RequestClientCert
		c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return t.Current().server, nil }
	}
	return c
}

// Client is what a client goes by now.
func (t *Trust) Client() *tls.Config {
	return t.Current().client()
}

func (s *State) client() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: s.Roots}
	if s.Certificate != nil {
		c.Certificates = []tls.Certificate{*s.Certificate}
	}
	return c
}

// Transport carries requests by a copy of base, whose TLSClientConfig is t's.
// Once t has changed, requests go over new connections; those that are under way
// end where they are. base is not used itself.
func (t *Trust) Transport(base *http.Transport) *Transport {
	return &Transport{trust: t, base: base}
}

// Transport is an http.RoundTripper over the files of a Trust.
type Transport struct {
	trust *Trust
	base  *http.Transport
	mu    sync.Mutex
	now   atomic.Pointer[epoch]
}

// epoch is a transport, and what it goes by.
type epoch struct {
	state *State
	*http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	return t.current().RoundTrip(r)
}

func (t *Transport) current() *epoch {
	s := t.trust.Current()
	if e := t.now.Load(); e != nil && e.state == s {
		return e
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.now.Load()
	if s = t.trust.Current(); old != nil && old.state == s {
		return old
	}
	e := &epoch{s, t.base.Clone()}
	e.TLSClientConfig = s.client()
	t.now.Store(e)
	if old != nil {
		old.CloseIdleConnections()
	}
	return e
}

// CloseIdleConnections is called by http.Client.
func (t *Transport) CloseIdleConnections() {
	if e := t.now.Load(); e != nil {
		e.CloseIdleConnections()
	}
}
