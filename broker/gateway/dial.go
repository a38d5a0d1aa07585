package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"
)

// dialWithin bounds one connection to a target.
const dialWithin = 10 * time.Second

// ErrAddress says that a target's name leads where no target is.
var ErrAddress = errors.New("an address that no target may have")

// Dial connects to a target, at the address that Config.Upstreams gives its host
// and port, or else its host. Any other name is resolved here, and the address
// that was judged is dialled, so that no second answer of a name server counts
// (SSRF, DNS rebinding): ErrAddress where one belongs to the gateway's own host,
// or to what its cloud tells it. network is that of net.Dial, and of TCP.
func (g *Gateway) Dial(ctx context.Context, network, hostport string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(network, "tcp") {
		return nil, net.UnknownNetworkError(network)
	}
	if to := g.mapped(hostport, host); to != "" {
		return g.dialer.DialContext(ctx, network, to)
	}
	within, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(within, "ip", host)
	if err != nil {
		return nil, errors.New("its name cannot be resolved")
	}
	for _, ip := range ips {
		if !reachable(ip, host) {
			return nil, ErrAddress
		}
	}
	var conn net.Conn
	err = errors.New("its name has no address")
	for _, ip := range ips {
		if conn, err = g.dialer.DialContext(within, network, net.JoinHostPort(ip.Unmap().String(), port)); err == nil {
			return conn, nil
		}
	}
	return nil, fmt.Errorf("connect: %w", err)
}

// Reachable says of a target's host, perhaps with a port, whether Dial would
// refuse it by its name alone: ErrAddress where it is an address that no target
// may have.
func (g *Gateway) Reachable(hostport string) error {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err != nil || g.mapped(hostport, host) != "" || reachable(ip, host) {
		return nil
	}
	return ErrAddress
}

// mapped is where Config.Upstreams says that a host is; empty where it does not.
func (g *Gateway) mapped(hostport, host string) string {
	return cmp.Or(g.Upstreams[strings.ToLower(hostport)], g.Upstreams[strings.ToLower(host)])
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
		_, err := netip.ParseAddr(strings.Trim(host, "[]"))
		return err == nil || strings.EqualFold(host, "localhost")
	}
	return !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && !ip.IsUnspecified() && !(ip.Is4() && ip.As4()[0] == 0)
}
