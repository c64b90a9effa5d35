package proxytest

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// EchoPackets starts an origin at a free UDP port of host, an IP address, that sends each datagram back. At the test's
// end it is gone.
func EchoPackets(t testing.TB, host string) proxy.Addr {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(host), 0)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go echoPackets(c, done)
	t.Cleanup(func() { c.Close(); <-done })
	return proxy.UDP(host, uint16(c.LocalAddr().(*net.UDPAddr).Port))
}

func echoPackets(c *net.UDPConn, done chan<- struct{}) {
	defer close(done)
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		c.WriteToUDPAddrPort(b[:n], from)
	}
}

// AskPackets sends data to e through c until something comes back within Patience, and returns that: a datagram may get
// lost.
func AskPackets(t testing.TB, c relay.PacketConn, e relay.Endpoint, data []byte) (from relay.Endpoint, answer []byte) {
	t.Helper()
	answered := make(chan struct{})
	var p relay.Packet
	var err error
	go func() {
		defer close(answered)
		err = c.ReadPacket(&p)
	}()
	for end := time.Now().Add(Patience); ; {
		if err := c.WritePacket(&relay.Packet{Endpoint: e, Data: data}); err != nil {
			t.Errorf("write to %v: %v", e, err)
		}
		select {
		case <-answered:
			if err != nil {
				t.Fatalf("no answer of %v: %v", e, err)
			}
			defer p.Free()
			return p.Endpoint, append([]byte(nil), p.Data...)
		case <-time.After(time.Second):
			if time.Now().After(end) {
				c.Close()
				<-answered
				t.Fatalf("no answer of %v", e)
			}
		}
	}
}
