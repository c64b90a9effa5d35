package inbound

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// inNetwork calls f on a thread in a network of its own, with the addresses 10.1.1.1/24 and fd01::1/64 on an interface, a route to
// others, and one address that is local although no interface has it.
func inNetwork(t *testing.T, f func()) {
	t.Helper()
	proxytest.InNetwork(t, func() {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		lan := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}, PeerName: "lan1"}
		if err == nil {
			err = netlink.LinkAdd(lan)
		}
		if err == nil {
			err = netlink.LinkSetUp(lan)
		}
		if peer, e := netlink.LinkByName("lan1"); e == nil && err == nil {
			err = netlink.LinkSetUp(peer)
		}
		for _, a := range []string{"10.1.1.1/24", "fd01::1/64"} {
			addr, _ := netlink.ParseAddr(a)
			addr.Flags = unix.IFA_F_NODAD
			if err == nil {
				err = netlink.AddrAdd(lan, addr)
			}
		}
		for _, a := range []string{"192.0.2.0/24", "2001:db8:5::/64"} {
			_, dst, _ := net.ParseCIDR(a)
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
					Scope: netlink.SCOPE_HOST})
			}
		}
		for _, a := range []string{"0.0.0.0/0", "::/0"} {
			_, dst, _ := net.ParseCIDR(a)
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: lan.Index, Dst: dst, Scope: netlink.SCOPE_LINK})
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
		own, deadline := netip.MustParseAddr("fd01::1"), time.Now().Add(proxytest.Patience)
		for !isOfThisMachine(own) { // it takes the kernel a moment
			if time.Now().After(deadline) {
				t.Error("the address does not come up")
				return
			}
			time.Sleep(time.Millisecond)
		}
		f()
	})
}

// reply has a send a datagram as if it were from an origin.
func reply(a *replyAnswerer, origin string) error {
	return a.WritePacket(&relay.Packet{Endpoint: relay.EndpointOf(netip.MustParseAddrPort(origin)), Data: []byte("x")})
}

// TestRepliesAreNotFromThisMachine: a way out that names an address of this machine as the sender of a datagram does not get a socket
// bound there, which would take the datagrams of a service of this machine away.
func TestRepliesAreNotFromThisMachine(t *testing.T) {
	inNetwork(t, func() {
		r := newReplySockets([]sockopt.Control{sockopt.Transparent, sockopt.ReuseAddress})
		a4 := &replyAnswerer{sockets: r, client: netip.MustParseAddrPort("10.1.1.2:4000")}
		a6 := &replyAnswerer{sockets: r, client: netip.MustParseAddrPort("[fd01::2]:4000")}
		defer a4.Close()
		defer a6.Close()
		for _, origin := range []string{"127.0.0.1:53", "127.9.9.9:53", "10.1.1.1:53", "10.1.1.255:53", "192.0.2.7:53", "0.0.0.0:53", "224.0.0.251:5353",
			"255.255.255.255:67", "203.0.113.1:0"} {
			if err := reply(a4, origin); !errors.Is(err, errNotAnOrigin) {
				t.Errorf("from %s: %v", origin, err)
			}
		}
		for _, origin := range []string{"[::1]:53", "[fd01::1]:53", "[2001:db8:5::7]:53", "[::]:53", "[ff02::fb]:5353", "[2001:db8::1]:0"} {
			if err := reply(a6, origin); !errors.Is(err, errNotAnOrigin) {
				t.Errorf("from %s: %v", origin, err)
			}
		}
		if err := reply(a4, "203.0.113.1:53"); err != nil {
			t.Errorf("from another machine: %v", err)
		}
		if err := reply(a4, "10.1.1.3:53"); err != nil {
			t.Errorf("from a neighbour: %v", err)
		}
		if err := reply(a6, "[2001:db8::1]:53"); err != nil {
			t.Errorf("from another machine, IPv6: %v", err)
		}
		if len(r.open) != 3 {
			t.Errorf("%d sockets are open", len(r.open))
		}
	})
}

// TestReplySocketsAreBounded: sessions with many origins share a bounded number of sockets, and lose no datagram for it.
func TestReplySocketsAreBounded(t *testing.T) {
	inNetwork(t, func() {
		r := newReplySockets([]sockopt.Control{sockopt.Transparent, sockopt.ReuseAddress})
		r.most = 40
		var sessions []*replyAnswerer
		for i := range 4 {
			sessions = append(sessions, &replyAnswerer{sockets: r, client: netip.AddrPortFrom(netip.MustParseAddr("10.1.1.2"), uint16(4000+i))})
		}
		kept := "203.0.113.99:53" // is used again and again
		var first *replySocket
		for round := range 3 {
			for i := range 100 {
				origin := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 50)}), uint16(1000+i)).String()
				for _, a := range sessions {
					if err := reply(a, origin); err != nil {
						t.Fatalf("from %s: %v", origin, err)
					}
				}
				if err := reply(sessions[0], kept); err != nil {
					t.Fatal(err)
				}
				s := r.open[netip.MustParseAddrPort(kept)]
				if first == nil {
					first = s
				}
				if s != first {
					t.Fatalf("round %d, origin %d: what is used was closed", round, i)
				}
				if len(r.open) > r.most || r.all.Len() != len(r.open) {
					t.Fatalf("%d sockets are open, %d in the list", len(r.open), r.all.Len())
				}
			}
		}
		for _, a := range sessions {
			if len(a.taken) > takenMost {
				t.Errorf("a session keeps %d sockets", len(a.taken))
			}
			a.Close()
		}
		if len(r.open) != 0 || r.all.Len() != 0 {
			t.Errorf("%d sockets are left", len(r.open))
		}
	})
}
