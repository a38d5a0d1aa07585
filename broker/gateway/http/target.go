package http

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
)

// view is what a session's rules mean here.
type view struct {
	sess    *gateway.Session
	access  *store.Access
	base    *url.URL // of the target
	masker  *masking.Masker
	named   bool // a rule goes by a value's name or place, which JSON alone has
	secrets *secrets
	shown   string // the header in which the target is shown the secret, in lower case; empty: none
	key     string // the query's key in which it is
}

// view returns what is known of sess, and learns it the first time.
func (g *Gateway) view(sess *gateway.Session) (*view, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v := g.views[sess]; v != nil {
		return v, nil
	}
	a := sess.Grant.Access
	if a.HTTP == nil {
		return nil, errors.New("the grant has no routes")
	}
	base, err := url.Parse(a.Upstream)
	if err != nil || base.Scheme != "http" && base.Scheme != "https" || base.Hostname() == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("the upstream is no base URL")
	}
	base.Path, base.RawPath = strings.TrimSuffix(base.Path, "/"), ""
	v := &view{sess: sess, access: a, base: base, secrets: newSecrets(inject.Values(a.Inject, sess.Secret))}
	if v.masker, err = masking.New(a.Masking); err != nil {
		return nil, err
	}
	for _, r := range a.Masking.Rules {
		v.named = v.named || r.Detector == ""
	}
	if in := a.Inject; in != nil {
		switch in.In {
		case inject.InHeader:
			v.shown = strings.ToLower(in.Name)
		case inject.InQuery:
			v.key = in.Name
		}
	}
	g.views[sess] = v
	context.AfterFunc(sess.Context(), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.views, sess)
	})
	return v, nil
}

// newTransport reaches targets: never through a proxy of the environment, and
// at no address that newTransport's dial refuses. Connections are shared by the
// sessions of a target; whom a request is from is said by each request itself.
func (g *Gateway) newTransport() *http.Transport {
	return &http.Transport{
		DialContext:            g.dial,
		TLSClientConfig:        &tls.Config{RootCAs: g.cfg.Gateway.RootCAs, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		TLSHandshakeTimeout:    10 * time.Second,
		WriteBufferSize:        16 << 10,
	}
}

// errAddress says that a target's name leads where no target is.
var errAddress = errors.New("an address that no target may have")

// dial connects to a target, unless its name leads to an address that belongs to
// the gateway's own host or to what its cloud tells it: a name is resolved here
// and the address that was judged is dialled, so that no second answer of a name
// server counts (SSRF, DNS rebinding). Hosts that the configuration maps are
// dialled as it says.
func (g *Gateway) dial(ctx context.Context, network, hostport string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	if g.mapped(host) {
		return g.cfg.Gateway.Dial(ctx, network, hostport)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, errors.New("its name cannot be resolved")
	}
	for _, ip := range ips {
		if !reachable(ip, host) {
			return nil, errAddress
		}
	}
	var conn net.Conn
	err = errors.New("its name has no address")
	for _, ip := range ips {
		if conn, err = g.cfg.Gateway.Dial(ctx, network, net.JoinHostPort(ip.Unmap().String(), port)); err == nil {
			return conn, nil
		}
	}
	return nil, fmt.Errorf("connect: %w", err)
}

func (g *Gateway) mapped(host string) bool {
	return g.cfg.Gateway.Upstreams[strings.ToLower(host)] != ""
}

// metadata are addresses outside the link-local ranges at which clouds tell a
// machine its own credentials: AWS over IPv6, Alibaba Cloud, Oracle Cloud.
var metadata = []netip.Addr{netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("192.0.0.192")}

// translated is where IPv4 addresses are reached over IPv6 (RFC 6052, section
// 2.1).
var translated = netip.MustParsePrefix("64:ff9b::/96")

// reachable reports whether a target named host may be at ip. A catalogue that
// means the gateway's own host says so by an address or by localhost: no other
// name may lead there.
func reachable(ip netip.Addr, host string) bool {
	ip = ip.Unmap().WithZone("")
	if translated.Contains(ip) {
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	for _, m := range metadata {
		if ip == m {
			return false
		}
	}
	if ip.IsLoopback() {
		_, err := netip.ParseAddr(host)
		return err == nil || strings.EqualFold(host, "localhost")
	}
	return !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && !ip.IsUnspecified() && !(ip.Is4() && ip.As4()[0] == 0)
}
