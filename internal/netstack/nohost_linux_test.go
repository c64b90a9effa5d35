package netstack

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// Packets from and to where no host can be are not answered, and are nobody's.
func TestNoHosts(t *testing.T) {
	proxytest.NoLeaks(t)
	h := new(proxytest.RecordingHandler)
	g := newRig(t, h, func(s *Stack) { s.Ping = func(context.Context, netip.Addr, []byte) error { return nil } })
	for _, way := range [][2]string{
		{"10.77.0.1", "255.255.255.255"}, {"10.77.0.1", "224.0.0.1"}, {"10.77.0.1", "239.1.2.3"}, {"10.77.0.1", "0.0.0.0"},
		{"10.77.0.1", "127.0.0.1"}, {"10.77.0.1", "10.77.0.1"},
		{"255.255.255.255", host4}, {"224.0.0.1", host4}, {"0.0.0.0", host4}, {"127.0.0.1", host4},
		{client6, "ff02::1"}, {client6, "::"}, {client6, "::1"}, {client6, client6},
		{"ff02::1", host6}, {"::", host6}, {"::1", host6},
		{"::ffff:10.77.0.1", host6}, {client6, "::ffff:192.0.2.1"},
	} {
		src, dst := netip.MustParseAddr(way[0]), netip.MustParseAddr(way[1])
		make := packet4
		echo := []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
		icmp := byte(1)
		if src.Is6() {
			make, icmp, echo[0] = packet6, 58, 128
			sum := header.PseudoHeaderChecksum(58, tcpip.AddrFrom16(src.As16()), tcpip.AddrFrom16(dst.As16()), 8)
			echo[2], echo[3] = 0, 0
			c := ^checksum.Checksum(echo, sum)
			echo[2], echo[3] = byte(c>>8), byte(c)
		}
		from, to := netip.AddrPortFrom(src, 4000), netip.AddrPortFrom(dst, 4000)
		for what, b := range map[string][]byte{
			"SYN":      make(src, dst, 6, transport(from, to, header.TCPFlagSyn, false, nil)),
			"ACK":      make(src, dst, 6, transport(from, to, header.TCPFlagAck, false, nil)),
			"datagram": make(src, dst, 17, transport(from, to, 0, true, []byte("x"))),
			"echo":     make(src, dst, icmp, echo),
		} {
			g.inject(b)
			time.Sleep(time.Millisecond)
			g.quiet(what + " from " + way[0] + " to " + way[1])
		}
	}
	if log.IsLogging(log.Info) {
		t.Error("gVisor writes of them to stderr")
	}
	if f := h.Flows(); len(f) != 0 {
		t.Errorf("%d sessions: %+v", len(f), f)
	}
}

// What was changed on its way is nobody's, and is not answered.
func TestWrongSums(t *testing.T) {
	proxytest.NoLeaks(t)
	h := new(proxytest.RecordingHandler)
	g := newRig(t, h, func(s *Stack) { s.Ping = waits })
	for _, v6 := range []bool{false, true} {
		src, dst, make, icmp := fuzzSrc, fuzzDst, packet4, byte(1)
		echo := []byte{8, 0, 1, 2, 0, 0, 0, 0, 'x'}
		if v6 {
			src, dst, make, icmp, echo[0] = ap(client6, 4000), ap(host6, 80), packet6, 58, 128
		}
		g.inject(make(src.Addr(), dst.Addr(), icmp, echo))
		for _, udp := range []bool{false, true} {
			for _, flags := range []header.TCPFlags{header.TCPFlagSyn, header.TCPFlagAck, header.TCPFlagFin} {
				b := transport(src, dst, flags, udp, []byte("x"))
				b[len(b)-1]++
				proto := byte(6)
				if udp {
					proto = 17
				}
				g.inject(make(src.Addr(), dst.Addr(), proto, b))
			}
		}
	}
	g.quiet("wrong sums")
	if f := h.Flows(); len(f) != 0 {
		t.Errorf("%+v", f)
	}
	if dials, pings := pendings(g.stack), len(g.stack.r.echo.slots); dials+pings != 0 {
		t.Errorf("%d dials, %d pings", dials, pings)
	}
}

// waits is a Ping that is never answered.
func waits(ctx context.Context, _ netip.Addr, _ []byte) error {
	<-ctx.Done()
	return ctx.Err()
}
