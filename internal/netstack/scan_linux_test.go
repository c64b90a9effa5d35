package netstack

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// A client that has many dials going on leaves room for others.
func TestScanLeavesRoomForOthers(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, v6 := range []bool{false, true} {
		const most = 64
		d := newSilent()
		g := newRig(t, engine(d), func(s *Stack) { s.MaxPending = most })
		syn := func(src, dst string, port uint16) {
			from, to := ap(src, port), ap(dst, 80)
			make := packet4
			if v6 {
				make = packet6
			}
			g.inject(make(from.Addr(), to.Addr(), 6, transport(from, to, header.TCPFlagSyn, false, nil)))
		}
		scanner, other, host := "10.77.0.1", "10.77.0.2", host4
		if v6 {
			scanner, other, host = "fd77::1", "fd77:0:0:1::1", host6
		}
		for port := range uint16(500) {
			syn(scanner, host, 1000+port)
			if v6 {
				syn("fd77::2", host, 1000+port) // the same host, or one beside it
			}
		}
		if n := pendings(g.stack); n != most/2 {
			t.Errorf("IPv6 %v: a client has %d of %d dials", v6, n, most)
		}
		syn(other, host, 1000)
		if n := pendings(g.stack); n != most/2+1 {
			t.Errorf("IPv6 %v: the other's SYN was dropped", v6)
		}
	}
}

func pendings(s *Stack) int {
	s.r.tcp.mu.Lock()
	defer s.r.tcp.mu.Unlock()
	return len(s.r.tcp.pending)
}

// piped is a dialer whose origins are silent.
type piped struct{}

func (piped) DialStream(context.Context, proxy.Addr) (net.Conn, error) {
	c, _ := net.Pipe()
	return c, nil
}

// SYNs from addresses that do not exist take all places, and keep them from nobody for longer than a moment: neither
// those whose dials go on nor those that have been answered. A client that repeats its SYN stays.
func TestSYNsOfNobodyGiveWay(t *testing.T) {
	for _, tt := range []struct {
		name   string
		dialer proxy.Dialer
	}{{"dialing", newSilent()}, {"answered", piped{}}} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			const most = 64
			g := newRig(t, engine(tt.dialer), func(s *Stack) { s.MaxPending = most })
			host := ap(host4, 80)
			syn := func(src netip.AddrPort) {
				g.inject(packet4(src.Addr(), host.Addr(), 6, transport(src, host, header.TCPFlagSyn, false, nil)))
			}
			waits := func(src netip.AddrPort) (p *pending) {
				g.stack.r.tcp.mu.Lock()
				defer g.stack.r.tcp.mu.Unlock()
				for id, p := range g.stack.r.tcp.pending {
					if addrPort(id.RemoteAddress, id.RemotePort) == src {
						return p
					}
				}
				return nil
			}
			start, first, newcomer := time.Now(), ap("10.77.0.1", 4000), ap("10.77.0.2", 4000)
			syn(first)
			syn(first)
			staying := waits(first)
			for i := range byte(200) {
				syn(netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, i}), 4000))
			}
			if n := pendings(g.stack); n != most {
				t.Errorf("%d of %d", n, most)
			}
			proxytest.Until(t, "a place for a newcomer", func() bool {
				syn(newcomer)
				return waits(newcomer) != nil
			})
			if d := time.Since(start); d < repeatWait {
				t.Errorf("somebody had to give way after %v", d)
			}
			proxytest.Until(t, "nobody but who is there", func() bool { return pendings(g.stack) <= 2 })
			if _, dials := tt.dialer.(*silent); dials && (staying == nil || waits(first) != staying) {
				t.Error("a client that repeats its SYN had to give way")
			}
		})
	}
}
