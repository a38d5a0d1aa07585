package siem

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/countersign-dev/countersign/store"
)

// Config is the section siem of a recorder's file: where events go.
type Config []Destination

// Destination is one receiver of events: either HTTP or Syslog is set.
type Destination struct {
	Name   string        `yaml:"name"`   // names the cursor; keep it when the address changes
	HTTP   *HTTPConfig   `yaml:"http"`   // batches of JSON lines
	Syslog *SyslogConfig `yaml:"syslog"` // RFC 5424 messages over TCP
	Types  []string      `yaml:"types"`  // of entries, such as access.refused or credential.*; none: all
	Since  string        `yaml:"since"`  // where a new destination begins: now or start; now by default
	Texts  bool          `yaml:"texts"`  // true: hand out erasable texts, which no erasure reaches any more
}

// HTTPConfig is a receiver of batches of JSON lines.
type HTTPConfig struct {
	URL     string            `yaml:"url"`        // https, or http to this machine
	Token   string            `yaml:"token_file"` // file of a bearer token, read again for each batch
	Headers map[string]string `yaml:"headers"`    // header name to the file of its value, read again for each batch
	CA      string            `yaml:"ca"`         // file, PEM; the system's by default
	Plain   bool              `yaml:"plain"`      // true: send bodies without gzip
}

// SyslogConfig is a receiver of RFC 5424 messages over TCP: with TLS (RFC
// 5425), or plain (RFC 6587, octet counting) to this machine alone.
type SyslogConfig struct {
	Addr       string     `yaml:"addr"`       // HOST:PORT of the receiver
	TLS        *TLSConfig `yaml:"tls"`        // none: plain
	Facility   *int       `yaml:"facility"`   // 0 to 23; 13 (log audit) by default
	Enterprise int        `yaml:"enterprise"` // private enterprise number of the SD-ID; 32473 by default
	MaxBytes   int        `yaml:"max_bytes"`  // longest event, at least 2048; 8192 by default
}

// TLSConfig says how a receiver is known, and how it knows the recorder.
type TLSConfig struct {
	CA         string `yaml:"ca"`          // file, PEM; the system's by default
	Cert       string `yaml:"cert"`        // file, PEM
	Key        string `yaml:"key"`         // file, PEM
	ServerName string `yaml:"server_name"` // that the receiver's certificate is for; addr's host by default
}

// Check says what is wrong with c, or nil. It reads no file.
func (c Config) Check() error {
	seen := map[string]bool{}
	for i, d := range c {
		// A file on a system that does not tell case apart is one cursor.
		if name := strings.ToLower(d.Name); !store.ValidID(d.Name) || seen[name] {
			return fmt.Errorf("siem[%d].name is %q: a name of letters, digits, '.', '_' and '-', that no other has", i, d.Name)
		} else {
			seen[name] = true
		}
		if err := d.check(); err != nil {
			return fmt.Errorf("siem.%s: %w", d.Name, err)
		}
	}
	return nil
}

func (d *Destination) check() error {
	if (d.HTTP == nil) == (d.Syslog == nil) {
		return errors.New("set either http or syslog")
	}
	if d.Since != "" && d.Since != "now" && d.Since != "start" {
		return fmt.Errorf("since is %q: now or start", d.Since)
	}
	for _, p := range d.Types {
		known := func(t store.Type) bool { return matches([]string{p}, t) }
		if !slices.ContainsFunc(knownTypes, known) {
			return fmt.Errorf("types: no entry is of type %q", p)
		}
	}
	if d.HTTP != nil {
		return d.HTTP.check()
	}
	return d.Syslog.check()
}

// knownTypes are the types that mappings has.
var knownTypes = func() (ts []store.Type) {
	for t := range mappings {
		ts = append(ts, t)
	}
	return ts
}()

func (c *HTTPConfig) check() error {
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return errors.New("http.url is not a URL") // err would repeat what may be a secret
	case u.Host == "" || u.User != nil || u.Fragment != "":
		return errors.New("http.url must be https://HOST/…, without user or fragment")
	case u.Scheme != "https" && (u.Scheme != "http" || !loopback(u.Hostname())):
		return errors.New("http.url must be https, or http to localhost: events say who reaches what")
	}
	for name := range c.Headers {
		if !httpguts.ValidHeaderFieldName(name) {
			return fmt.Errorf("http.headers: %q is no header name", name)
		}
		switch h := http.CanonicalHeaderKey(name); {
		case h == "Host" || h == "Connection" || h == "Transfer-Encoding" || strings.HasPrefix(h, "Content-"):
			return fmt.Errorf("http.headers: %s is not yours to set", h)
		case h == "Authorization" && c.Token != "":
			return errors.New("http: token_file and the header Authorization exclude each other")
		}
	}
	return nil
}

func (c *SyslogConfig) check() error {
	host, port, err := net.SplitHostPort(c.Addr)
	switch {
	case err != nil || host == "" || port == "":
		return fmt.Errorf("syslog.addr is %q: HOST:PORT is due", c.Addr)
	case c.TLS == nil && !loopback(host):
		return errors.New("syslog: set tls; without it only a receiver on this machine is sent to: events say who reaches what")
	case c.TLS != nil && (c.TLS.Cert == "") != (c.TLS.Key == ""):
		return errors.New("syslog.tls: cert and key go together")
	case c.Facility != nil && (*c.Facility < 0 || *c.Facility > 23):
		return fmt.Errorf("syslog.facility is %d: 0 to 23 (RFC 5424, section 6.2.1)", *c.Facility)
	case c.MaxBytes != 0 && c.MaxBytes < 2048:
		return errors.New("syslog.max_bytes is below 2048, which every receiver takes (RFC 5425, section 4.3.1)")
	case c.Enterprise < 0:
		return errors.New("syslog.enterprise is negative")
	}
	return nil
}

// loopback reports whether host is this machine for sure.
func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
