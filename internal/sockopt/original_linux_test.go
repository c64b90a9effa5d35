package sockopt

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestOriginalDstOfNone: a conn that nobody has redirected has none.
func TestOriginalDstOfNone(t *testing.T) {
	for _, network := range []string{"tcp", "tcp6"} {
		o := proxytest.Listen(t, network, proxytest.Sink)
		c := proxytest.Dial(t, o.Addr).(*net.TCPConn)
		local := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr()
		dst, err := OriginalDst(c, local)
		// A kernel that follows connections knows it, and that it goes where it was going.
		none := errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOPROTOOPT)
		if err == nil && dst.String() != o.Addr.HostPort() || err != nil && !none {
			t.Errorf("%v, %v", dst, err)
		}
	}
}

// TestOriginalDsts: the kernel tells where each datagram was sent to, of either family.
func TestOriginalDsts(t *testing.T) {
	proxytest.NeedRoot(t)
	for _, tt := range []struct{ listen, to string }{
		{"127.0.0.1:0", "127.0.0.1"}, {"[::1]:0", "::1"}, {"[::]:0", "127.0.0.5"}, {"[::]:0", "::1"},
	} {
		lc := net.ListenConfig{Control: All(Transparent, ReuseAddress, OriginalDsts)}
		p, err := lc.ListenPacket(context.Background(), "udp", tt.listen)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		port := p.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		to := netip.AddrPortFrom(netip.MustParseAddr(tt.to), port)
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte("x"))
		oob := make([]byte, 256)
		_, n, _, _, err := p.(*net.UDPConn).ReadMsgUDPAddrPort(make([]byte, 10), oob)
		if got := OriginalDstOf(oob[:n]); err != nil || got != to {
			t.Errorf("at %s, to %v: %v, %v", tt.listen, to, got, err)
		}
	}
}

// FuzzOriginalDstOf: no control messages are too strange.
func FuzzOriginalDstOf(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(AppendPacketInfo(nil, netip.MustParseAddr("::1"), true))
	f.Add([]byte{32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 2, 0, 0, 53, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, oob []byte) { OriginalDstOf(oob) })
}
