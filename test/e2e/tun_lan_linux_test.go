package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// lan adds a namespace that has host for its router.
func (n *network) lan() string {
	n.t.Helper()
	lan := n.host + "-lan"
	n.add(lan)
	n.ip("-n", lan, "link", "set", "lo", "up")
	n.sh(lan, "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad")
	n.ip("-n", n.host, "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", lan)
	n.sh(n.host, "cd /proc/sys/net && echo 1 >ipv4/ip_forward && echo 1 >ipv6/conf/all/forwarding && echo 1 >ipv4/conf/eth1/rp_filter")
	for ns, dev := range map[string]string{n.host: "eth1", lan: "eth0"} {
		n.ip("-n", ns, "link", "set", dev, "up")
		last := map[string]int{n.host: 1, lan: 2}[ns]
		n.ip("-n", ns, "addr", "add", fmt.Sprintf("10.88.0.%d/24", last), "dev", dev)
		n.ip("-n", ns, "addr", "add", fmt.Sprintf("fd88::%d/64", last), "dev", dev, "nodad")
	}
	n.ip("-n", lan, "route", "add", "default", "via", "10.88.0.1")
	n.ip("-n", lan, "route", "add", "default", "via", "fd88::1")
	return lan
}

// The origin's addresses in world, and some that nobody has.
var (
	origins     = []string{"203.0.113.1", "2001:db8::1"}
	unreachable = []string{"198.51.100.1", "2001:db8:51::1"}
)

// capture starts a tshark that writes a line for each packet that ends or refuses something: the sender, the
// sending port of a RST, and type and code of an ICMP message.
func (n *network) capture(ns, dev string) *process {
	n.t.Helper()
	args := []string{"-l", "-n", "-i", dev, "-Y", "tcp.flags.reset==1 || icmp.type==3 || icmpv6.type<=2",
		"-T", "fields", "-E", "separator= ", "-E", "occurrence=f"}
	for _, field := range []string{"ip.src", "ipv6.src", "tcp.srcport", "icmp.type", "icmp.code", "icmpv6.type", "icmpv6.code"} {
		args = append(args, "-e", field)
	}
	p := n.start(ns, "tshark", args...)
	proxytest.Until(n.t, "tshark captures", func() bool { return strings.Contains(p.log.String(), "Capture started") })
	return p
}

// sees waits for a line of tshark that begins with one of these and ends with the other.
func (n *network) sees(p *process, begins, ends string) {
	n.t.Helper()
	proxytest.Until(n.t, "a packet: "+begins+" "+ends, func() bool {
		for l := range strings.Lines(p.log.String()) {
			l = strings.Join(strings.Fields(l), " ")
			if strings.HasPrefix(l, begins+" ") && strings.HasSuffix(l, " "+ends) {
				return true
			}
		}
		return false
	})
}

// TestTUNRouterRefuses: what a client on the LAN is refused by, it is told by the packets that it is told by without a proxy.
func TestTUNRouterRefuses(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "tshark")
	n := newNetwork(t)
	lan := n.lan()
	n.sh(n.world, "echo 1 >/proc/sys/net/ipv4/ip_forward && echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	n.ip("-n", n.world, "route", "add", "unreachable", unreachable[0])
	n.ip("-n", n.world, "route", "add", "unreachable", unreachable[1])
	p := n.tun()
	shark := n.capture(lan, "eth0")
	for i, origin := range origins {
		message := []string{"3 ", "1 "}[i] // destination unreachable
		for _, tt := range []struct {
			network, addr string
			want          syscall.Errno
			packet        string
		}{
			{"tcp", origin, syscall.ECONNREFUSED, "1"}, // the port of a RST
			{"udp", origin, syscall.ECONNREFUSED, message + []string{"3", "4"}[i]},
			// An unreachable route of the kernel's is one without a host in IPv4, and no route in IPv6.
			{"tcp", unreachable[i], []syscall.Errno{syscall.EHOSTUNREACH, syscall.ENETUNREACH}[i], message + []string{"1", "0"}[i]},
		} {
			if err := n.ask(lan, tt.network, net.JoinHostPort(tt.addr, "1")); !errors.Is(err, tt.want) {
				t.Errorf("%s to %s: %v, want %v", tt.network, tt.addr, err, tt.want)
			}
			n.sees(shark, tt.addr, tt.packet)
		}
	}
	n.end(p, syscall.SIGTERM, 0)
}

// ask sends a byte, where it can connect, and returns why there is no answer.
func (n *network) ask(ns, network, addr string) error {
	var c net.Conn
	var err error
	n.inside(ns, func() error { c, err = net.DialTimeout(network, addr, patience); return nil })
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// TestTUNRouterCarries: streams and datagrams of any size come and go between a LAN, where packets are of 1500 bytes, and the
// origin, whatever the MTU of the device; with marks of ECN and without.
func TestTUNRouterCarries(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "nft")
	n := newNetwork(t)
	lan := n.lan()
	n.sh(lan, "echo 1 >/proc/sys/net/ipv4/tcp_ecn") // ask for ECN
	stream := n.listen(n.world, ":9000")
	var serving sync.WaitGroup
	serving.Go(func() { serveStreams(stream) })
	var sockets []*net.UDPConn
	for _, origin := range origins {
		c := n.listenUDP(n.world, netip.AddrPortFrom(netip.MustParseAddr(origin), 9000))
		sockets = append(sockets, c)
		serving.Go(func() { echoDatagrams(c) })
	}
	t.Cleanup(func() {
		stream.Close()
		for _, c := range sockets {
			c.Close()
		}
		serving.Wait()
	})
	for _, flags := range [][]string{{}, {"--mtu", "1280"}, {"--via", "socks5://10.77.0.1:1080"}} {
		p := n.tun(flags...)
		for _, mark := range []string{"", "ect0", "ce"} {
			if mark != "" {
				n.sh(lan, fmt.Sprintf("nft 'table inet marks { chain out { type filter hook output priority mangle; "+
					"ip ecn set %s; ip6 ecn set %[1]s; }; }'", mark))
			}
			for _, origin := range origins {
				what := fmt.Sprintf("tun %v, ECN %q, %s", flags, mark, origin)
				n.both(what, n.dial(lan, "", net.JoinHostPort(origin, "9000")))
				n.datagrams(what, lan, netip.AddrPortFrom(netip.MustParseAddr(origin), 9000), len(flags) > 1 && flags[0] == "--via")
			}
			if mark != "" {
				n.sh(lan, "nft delete table inet marks")
			}
		}
		n.end(p, syscall.SIGTERM, 0)
	}
}

// both sends and receives much at a time on c, which echoes.
func (n *network) both(what string, c net.Conn) {
	n.t.Helper()
	defer c.Close()
	const size = 3 << 20
	sent := make([]byte, size)
	io.ReadFull(proxytest.Pattern(), sent)
	var writing sync.WaitGroup
	defer writing.Wait()
	writing.Go(func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	})
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		n.t.Errorf("%s: %d bytes of %d come back, %v", what, len(got), size, err)
	}
}

// datagrams sends datagrams of many sizes, which come back.
func (n *network) datagrams(what, ns string, to netip.AddrPort, socks bool) {
	n.t.Helper()
	local := netip.IPv4Unspecified()
	largest := 65507
	if to.Addr().Is6() {
		local, largest = netip.IPv6Unspecified(), 65527
	}
	if socks { // whose datagrams have a header more, and go by IPv4
		largest = 65507 - 22
	}
	c := n.listenUDP(ns, netip.AddrPortFrom(local, 0))
	defer c.Close()
	buf := make([]byte, 70000)
	for _, size := range []int{0, 1, 1200, 1452, 1472, 1473, 9000, largest} {
		sent := bytes.Repeat([]byte{byte(size), 1, 2, 3, 4, 5, 6}, size/7+1)[:size]
		came := false
		for try := 0; try < 5 && !came; try++ { // datagrams may get lost
			if _, err := c.WriteToUDPAddrPort(sent, to); err != nil && !errors.Is(err, syscall.EMSGSIZE) {
				n.t.Errorf("%s: %d bytes: %v", what, size, err)
				return
			}
			c.SetReadDeadline(time.Now().Add(2 * time.Second))
			for !came {
				m, from, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					break
				}
				came = bytes.Equal(buf[:m], sent) && from == to
			}
		}
		if !came {
			n.t.Errorf("%s: %d bytes do not come back", what, size)
		}
	}
}

// TestTUNRouterTooLarge: a packet that must not be cut and does not fit the device is refused by ICMP, which says what fits.
func TestTUNRouterTooLarge(t *testing.T) {
	t.Parallel()
	proxytest.Need(t, "tshark")
	n := newNetwork(t)
	lan := n.lan()
	p := n.tun("--mtu", "1280")
	shark := n.capture(lan, "eth0")
	for i, origin := range origins {
		to := netip.AddrPortFrom(netip.MustParseAddr(origin), 9)
		from := []string{"10.88.0.1", "fd88::1"}[i]
		kind := []string{"3 4", "2 0"}[i] // fragmentation needed, and packet too big
		any := netip.AddrPortFrom([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[i], 0)
		c := n.listenUDP(lan, any)
		defer c.Close()
		mustNotBeCut(t, c, i == 1)
		proxytest.Until(t, "its sender knows", func() bool {
			_, err := c.WriteToUDPAddrPort(make([]byte, 1400), to)
			return errors.Is(err, syscall.EMSGSIZE)
		})
		n.sees(shark, from, kind)
	}
	n.end(p, syscall.SIGTERM, 0)
}

// mustNotBeCut has c's datagrams not be cut, here or on the way.
func mustNotBeCut(t *testing.T, c *net.UDPConn, v6 bool) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if v6 {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// listenUDP makes a socket in a namespace.
func (n *network) listenUDP(ns string, addr netip.AddrPort) (c *net.UDPConn) {
	n.t.Helper()
	network := "udp4"
	if addr.Addr().Is6() {
		network = "udp6"
	}
	n.inside(ns, func() (err error) { c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(addr)); return err })
	c.SetReadBuffer(1 << 20)
	return c
}

// serveStreams sends back what comes in each stream, until ln is closed and they have ended.
func serveStreams(ln net.Listener) {
	var streams sync.WaitGroup
	defer streams.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		streams.Go(func() { defer c.Close(); proxytest.Echo(c) })
	}
}
