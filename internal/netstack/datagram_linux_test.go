package netstack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

func ap(host string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(host), port)
}

func TestDatagramsOfAllSizes(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBed(t, new(proxytest.RecordingHandler), nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		any := "0.0.0.0:0"
		if host == host6 {
			any = "[::]:0"
		}
		c := b.listenPacket(any)
		for _, n := range []int{0, 1, 512, 1472, 1473, 9000, 65507} {
			want := bytes.Repeat([]byte{byte(n), 1, 2, 3, 4, 5, 6}, n/7+1)[:n]
			if _, err := c.WriteToUDPAddrPort(want, ap(host, 7)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 70000)
			m, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil || !bytes.Equal(buf[:m], want) || from != ap(host, 7) {
				t.Errorf("%d bytes to %s: %d bytes from %v, %v", n, host, m, from, err)
			}
		}
	}
}

// answerer answers each datagram from places of its own choice.
type answerer struct {
	proxytest.RecordingHandler
	from []netip.AddrPort
}

func (a *answerer) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	var p relay.Packet
	for c.ReadPacket(&p) == nil {
		for _, from := range a.from {
			p.Endpoint = relay.EndpointOf(from)
			c.WritePacket(&p)
		}
		p.Free()
	}
}

func TestFullCone(t *testing.T) {
	proxytest.NoLeaks(t)
	places := []netip.AddrPort{ap("198.51.100.7", 1234), ap("203.0.113.9", 53), ap(host4, 9)}
	b := newBed(t, &answerer{from: places}, nil, tundev.Options{})
	c := b.listenPacket("0.0.0.0:0")
	c.WriteToUDPAddrPort([]byte("x"), ap(host4, 7))
	buf := make([]byte, 100)
	for _, want := range places {
		if _, from, err := c.ReadFromUDPAddrPort(buf); from != want || err != nil {
			t.Errorf("from %v, %v, want %v", from, err, want)
		}
	}
}

func TestDatagramsOfOneSourceAreOneSession(t *testing.T) {
	proxytest.NoLeaks(t)
	h := new(proxytest.RecordingHandler)
	b := newBed(t, h, nil, tundev.Options{})
	c := b.listenPacket("0.0.0.0:0")
	buf := make([]byte, 100)
	for _, to := range []netip.AddrPort{ap("192.0.2.1", 1), ap("192.0.2.2", 2), ap("198.51.100.3", 3)} {
		c.WriteToUDPAddrPort([]byte("x"), to)
		if _, from, err := c.ReadFromUDPAddrPort(buf); from != to || err != nil {
			t.Errorf("from %v, %v, want %v", from, err, to)
		}
	}
	client := netip.AddrPortFrom(netip.MustParseAddr(client4), uint16(c.LocalAddr().(*net.UDPAddr).Port))
	if f := h.Flows(); len(f) != 1 || f[0].Dst != proxy.UDP("192.0.2.1", 1) || f[0].Client != client || f[0].Inbound != "tun" {
		t.Errorf("%+v", f)
	}
}

func TestDatagramsRefused(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, tt := range []struct {
		err    error
		v4, v6 syscall.Errno
	}{
		{errors.ErrUnsupported, syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{syscall.EHOSTUNREACH, syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{syscall.ENETUNREACH, syscall.ENETUNREACH, syscall.ENETUNREACH},
	} {
		b := newBed(t, &proxytest.RecordingHandler{Err: tt.err}, nil, tundev.Options{})
		for host, want := range map[string]syscall.Errno{host4: tt.v4, host6: tt.v6} {
			c, err := b.tryDial("udp", net.JoinHostPort(host, "9"), time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if host == host6 {
				recvErr6(t, c)
			} else {
				recvErr4(t, c)
			}
			c.SetDeadline(time.Now().Add(proxytest.Patience))
			c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 10)); !errors.Is(err, want) {
				t.Errorf("%v from %s: %v, want %v", tt.err, host, err, want)
			}
		}
	}
}

// recvErr4 has the kernel tell c also of hosts and nets that are unreachable.
func recvErr4(t *testing.T, c net.Conn) { setInt(t, c, syscall.IPPROTO_IP, syscall.IP_RECVERR, 1) }

func recvErr6(t *testing.T, c net.Conn) { setInt(t, c, syscall.IPPROTO_IPV6, syscall.IPV6_RECVERR, 1) }

func setInt(t *testing.T, c net.Conn, level, name, value int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), level, name, value) })
	if err != nil {
		t.Fatal(err)
	}
}
