package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// domain is the DNS domain of the drill's machines; see network.hosts.
const domain = "drill.test"

// network is a house of machines, each a network namespace of its own behind a
// router, which is the drill's own namespace. What the router does not open is
// closed. The drill itself reaches every machine, as an operator's console does.
type network struct {
	dir   string
	nodes map[string]*node
	order []string
}

// node is one machine.
type node struct {
	name, ip string
	ns       *os.File
}

// host is the name under which others reach the node.
func (n *node) host() string { return n.name + "." + domain }

// newNetwork makes a machine for each name. It changes nothing outside the
// namespaces that the drill runs in (see enter).
func newNetwork(dir string, names ...string) (*network, error) {
	w := &network{dir: dir, nodes: map[string]*node{}, order: names}
	var links strings.Builder
	hosts := "127.0.0.1 localhost\n"
	if err := sh("ip link set lo up"); err != nil {
		return nil, err
	}
	for i, name := range names {
		n := &node{name: name, ip: fmt.Sprintf("10.77.%d.2", i+1)}
		w.nodes[name] = n
		hosts += n.ip + " " + n.host() + "\n"
		fmt.Fprintf(&links, `
ip netns add %[1]s
ip link add to%[2]d type veth peer name eth0 netns %[1]s
ip addr add 10.77.%[2]d.1/24 dev to%[2]d
ip link set to%[2]d up
ip -n %[1]s link set lo up
ip -n %[1]s addr add %[3]s/24 dev eth0
ip -n %[1]s link set eth0 up
ip -n %[1]s route add default via 10.77.%[2]d.1
`, name, i+1, n.ip)
	}
	if err := sh("set -e\n" + links.String()); err != nil {
		return nil, err
	}
	for _, n := range w.nodes {
		var err error
		if n.ns, err = os.Open("/run/netns/" + n.name); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
		return nil, err
	}
	// Names are looked up in a hosts file that the drill's processes alone see.
	file := filepath.Join(dir, "hosts")
	if err := os.WriteFile(file, []byte(hosts), 0o644); err != nil {
		return nil, err
	}
	if err := unix.Mount(file, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mounting the hosts file: %w", err)
	}
	// Pairs are (who opens a connection, to whom): back come only packets that
	// open none. cut goes before, in both directions.
	return w, nft(`
table inet walls {
	set open { type ipv4_addr . ipv4_addr; }
	set cut { type ipv4_addr . ipv4_addr; }
	chain forward {
		type filter hook forward priority 0; policy drop;
		ip saddr . ip daddr @cut drop
		ip saddr . ip daddr @open accept
		ip daddr . ip saddr @open tcp flags & (syn | ack) != syn accept
	}
}`)
}

// open lets from open connections to each of to.
func (w *network) open(from string, to ...string) error {
	var rules strings.Builder
	for _, t := range to {
		fmt.Fprintf(&rules, "add element inet walls open { %s . %s }\n", w.nodes[from].ip, w.nodes[t].ip)
	}
	return nft(rules.String())
}

// shut takes back what open opened.
func (w *network) shut(from string, to ...string) error {
	var rules strings.Builder
	for _, t := range to {
		fmt.Fprintf(&rules, "delete element inet walls open { %s . %s }\n", w.nodes[from].ip, w.nodes[t].ip)
	}
	return nft(rules.String())
}

// cut drops every packet between node and each of others, connections that are
// open among them.
func (w *network) cut(node string, others ...string) error {
	var rules strings.Builder
	for _, o := range others {
		a, b := w.nodes[node].ip, w.nodes[o].ip
		fmt.Fprintf(&rules, "add element inet walls cut { %s . %s, %s . %s }\n", a, b, b, a)
	}
	return nft(rules.String())
}

// mend ends every cut.
func (w *network) mend() error { return nft("flush set inet walls cut") }

// others are all machines but those named.
func (w *network) others(but ...string) (list []string) {
	for _, name := range w.order {
		skip := false
		for _, b := range but {
			skip = skip || b == name
		}
		if !skip {
			list = append(list, name)
		}
	}
	return list
}

// within runs f on a thread that is in n's network namespace: sockets that it
// makes, and processes that it starts, are n's.
func (n *node) within(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("entering the namespace of %s: %w", n.name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// dial connects from n. addr is a name of the network, or an address.
func (n *node) dial(ctx context.Context, _, addr string) (conn net.Conn, err error) {
	err = n.within(func() error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "tcp4", addr)
		return err
	})
	return conn, err
}

// listen listens on port of n.
func (n *node) listen(port string) (l net.Listener, err error) {
	err = n.within(func() error {
		l, err = net.Listen("tcp4", net.JoinHostPort(n.ip, port))
		return err
	})
	return l, err
}

// nft gives the router rules.
func nft(rules string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}

func sh(script string) error {
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		return fmt.Errorf("%.200s: %w: %s", strings.TrimSpace(script), err, out)
	}
	return nil
}

// until looks every 50 ms whether ok, for at most limit.
func until(ctx context.Context, limit time.Duration, what string, ok func() error) error {
	end := time.Now().Add(limit)
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("after %s still not: %s: %w", limit, what, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
