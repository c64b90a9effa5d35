package netstack

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

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
