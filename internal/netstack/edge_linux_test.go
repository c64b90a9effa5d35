package netstack

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

// The kernel passes on datagrams of one size in one packet, which has to be cut.
func TestDatagramsThatTheKernelHasJoined(t *testing.T) {
	proxytest.NoLeaks(t)
	h := new(proxytest.RecordingHandler)
	b := newBed(t, h, nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		c, err := b.tryDial("udp", net.JoinHostPort(host, "9"), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		setInt(t, c, unix.SOL_UDP, unix.UDP_SEGMENT, 1000)
		want := bytes.Repeat([]byte("0123456789"), 1234)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		var got []byte
		buf := make([]byte, 70000)
		for len(got) < len(want) {
			n, err := c.Read(buf)
			if err != nil {
				t.Fatalf("%s: after %d bytes: %v", host, len(got), err)
			}
			if n != 1000 && len(got)+n != len(want) {
				t.Errorf("%s: a datagram of %d bytes", host, n)
			}
			got = append(got, buf[:n]...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the datagrams are others", host)
		}
	}
}

func TestWithoutOffload(t *testing.T) {
	proxytest.NoLeaks(t)
	const size = 4 << 20
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{NoOffload: true, MTU: 1400})
	for _, host := range []string{host4, host6} {
		c := b.dial(at(host, origin))
		go func() {
			io.Copy(c, io.LimitReader(proxytest.Pattern(), size))
			c.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, c); n != size || err != nil {
			t.Errorf("%s: %d bytes, %v", host, n, err)
		}
	}
}

// panicking is a handler that does.
type panicking struct{}

func (panicking) HandleStream(context.Context, proxy.Flow, proxy.Pending)     { panic("stream") }
func (panicking) HandlePackets(context.Context, proxy.Flow, relay.PacketConn) { panic("datagrams") }

func TestPanicCostsOneClient(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBed(t, panicking{}, nil, tundev.Options{})
	for range 2 {
		if _, err := b.tryDial("tcp", host4+":80", proxytest.Patience); err == nil {
			t.Error("connected")
		}
		b.listenPacket("0.0.0.0:0").WriteToUDPAddrPort([]byte("x"), ap(host4, 9))
	}
	proxytest.Until(t, "four lines", func() bool {
		return strings.Count(b.log.String(), "panic while serving a client") == 4
	})
}

// However a stream ends, the stack forgets it in the end.
func TestNothingIsLeftOfStreams(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	for i := range 30 {
		c := b.dial(at(host4, origin))
		io.WriteString(c, "x")
		switch i % 3 {
		case 0:
			c.CloseWrite()
			io.ReadAll(c)
		case 1:
			relay.Abort(c)
		}
		c.Close()
	}
	proxytest.Until(t, "no stream", func() bool { return len(b.stack.r.stack.RegisteredEndpoints()) == 0 })
}

func TestDatagramsDroppedWhenNobodyReads(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBed(t, stalled{}, nil, tundev.Options{})
	c := b.listenPacket("0.0.0.0:0")
	proxytest.Until(t, "drops", func() bool {
		for range 100 {
			c.WriteToUDPAddrPort(make([]byte, 100), ap(host4, 9))
		}
		return b.stack.r.udp.dropped.Load() > 0
	})
	proxytest.Until(t, "one line", func() bool { return strings.Count(b.log.String(), "do not keep up") == 1 })
}

// stalled is a handler that reads nothing.
type stalled struct{ panicking }

func (stalled) HandlePackets(ctx context.Context, _ proxy.Flow, c relay.PacketConn) {
	<-ctx.Done()
	c.Close()
}
