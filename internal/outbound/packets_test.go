//go:build linux

package outbound

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

func dialPackets(t *testing.T, d proxy.PacketDialer, dst proxy.Addr) relay.PacketConn {
	t.Helper()
	c, err := d.DialPackets(t.Context(), dst)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestDirectPackets(t *testing.T) {
	proxytest.NoLeaks(t)
	v4, v6 := proxytest.EchoPackets(t, "127.0.0.1"), proxytest.EchoPackets(t, "::1")
	largest := bytes.Repeat([]byte("x"), 65_507)
	c := dialPackets(t, new(Direct), v4)
	for _, dst := range []proxy.Addr{v4, v6, v4} { // one conn reaches all
		for _, data := range [][]byte{[]byte("hello"), {}, largest} {
			from, got := proxytest.AskPackets(t, c, dst.Endpoint(), data)
			if from != dst.Endpoint() || !bytes.Equal(got, data) {
				t.Errorf("asked %v, got %d bytes from %v", dst, len(got), from)
			}
		}
	}
	name := proxy.UDP("localhost", v4.Port)
	d := &Direct{BindAddr: netip.MustParseAddr("127.0.0.1")} // so that it takes localhost's IPv4
	if from, _ := proxytest.AskPackets(t, dialPackets(t, d, name), name.Endpoint(), []byte("x")); from != v4.Endpoint() {
		t.Errorf("asked %v, answer from %v", name, from)
	}
}

// Any place may send to the socket, not only those that were asked: full cone.
func TestDirectPacketsFullCone(t *testing.T) {
	proxytest.NoLeaks(t)
	v4 := proxytest.EchoPackets(t, "127.0.0.1")
	c := dialPackets(t, new(Direct), v4)
	proxytest.AskPackets(t, c, v4.Endpoint(), []byte("x"))
	stranger, err := net.DialUDP("udp", nil, &net.UDPAddr{
		IP: net.IPv4(127, 0, 0, 1), Port: int(c.(*directPackets).LocalAddr().Port())})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	stranger.Write([]byte("unasked"))
	var p relay.Packet
	defer p.Free()
	want := relay.EndpointOf(stranger.LocalAddr().(*net.UDPAddr).AddrPort())
	if err := c.ReadPacket(&p); err != nil || string(p.Data) != "unasked" || p.Endpoint != want {
		t.Errorf("%q from %v, %v", p.Data, p.Endpoint, err)
	}
}

func TestDirectPacketsOptions(t *testing.T) {
	proxytest.NeedRoot(t)
	proxytest.NoLeaks(t)
	v4 := proxytest.EchoPackets(t, "127.0.0.1")
	d := &Direct{BindAddr: netip.MustParseAddr("127.9.8.7"), Interface: "lo", Mark: 7}
	c := dialPackets(t, d, v4)
	proxytest.AskPackets(t, c, v4.Endpoint(), []byte("x"))
	if a := c.(*directPackets).LocalAddr(); a.Addr() != d.BindAddr {
		t.Errorf("sent from %v", a)
	}
	err := c.WritePacket(&relay.Packet{Endpoint: relay.Endpoint{IP: netip.IPv6Loopback(), Port: 9}})
	if !errors.Is(err, syscall.EAFNOSUPPORT) {
		t.Errorf("to IPv6: %v", err)
	}
	d.Interface = "nosuch0"
	if _, err := d.DialPackets(t.Context(), v4); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("interface that is not there: %v", err)
	}
}

func TestDirectPacketsNames(t *testing.T) {
	proxytest.NoLeaks(t)
	v4 := proxytest.EchoPackets(t, "127.0.0.1")
	d := &Direct{Resolver: proxytest.NoNames(t)}
	for _, name := range []string{"nosuch.example", ""} {
		if c, err := d.DialPackets(t.Context(), proxy.UDP(name, 53)); proxy.ReasonOf(err) != proxy.NoHost {
			t.Errorf("%q: %v, %v", name, c, err)
		}
	}
	// A name that does not exist is an error of its datagram, and of no other.
	c := dialPackets(t, d, v4)
	for range 2 {
		err := c.WritePacket(&relay.Packet{Endpoint: relay.Endpoint{Name: "nosuch.example", Port: 53}, Data: []byte("x")})
		if proxy.ReasonOf(err) != proxy.NoHost {
			t.Errorf("%v", err)
		}
	}
	proxytest.AskPackets(t, c, v4.Endpoint(), []byte("x"))
	for i := range namesMax + 1 {
		c.WritePacket(&relay.Packet{Endpoint: relay.Endpoint{Name: fmt.Sprintf("nosuch%d.example", i), Port: 53}})
	}
	if n := len(c.(*directPackets).names); n > namesMax {
		t.Errorf("remembers %d names", n)
	}
}

// Closing the conn ends the wait for a name.
func TestDirectPacketsCloseEndsResolving(t *testing.T) {
	proxytest.NoLeaks(t)
	asked := make(chan struct{}, 100)
	never := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		asked <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	c := dialPackets(t, &Direct{Resolver: never}, proxy.UDP("192.0.2.1", 1))
	wrote := make(chan error, 1)
	go func() {
		wrote <- c.WritePacket(&relay.Packet{Endpoint: relay.Endpoint{Name: "some.example", Port: 53}})
	}()
	<-asked
	c.Close()
	if err := <-wrote; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestPacketsThatCannotBe(t *testing.T) {
	proxytest.NoLeaks(t)
	if _, err := (Reject{}).Bind(t.Context(), proxy.TCP("192.0.2.1", 0)); proxy.ReasonOf(err) != proxy.Denied {
		t.Errorf("reject: bind: %v", err)
	}
	if _, err := (Reject{}).DialPackets(t.Context(), proxy.UDP("192.0.2.1", 53)); proxy.ReasonOf(err) != proxy.Denied {
		t.Errorf("reject: %v", err)
	}
	if _, err := new(Direct).DialPackets(t.Context(), proxy.TCP("192.0.2.1", 53)); proxy.ReasonOf(err) != proxy.Unsupported {
		t.Errorf("direct, TCP: %v", err)
	}
	through := &SOCKS5{Server: proxy.TCP("192.0.2.1", 1080), Via: &HTTP{Server: proxy.TCP("192.0.2.2", 8080)}}
	_, err := through.DialPackets(t.Context(), proxy.UDP("192.0.2.1", 53))
	if proxy.ReasonOf(err) != proxy.Unsupported || !strings.Contains(err.Error(), "which the way to it does not carry") {
		t.Errorf("SOCKS5 through HTTP: %v", err)
	}
	refuses := proxytest.Listen(t, "tcp", socks5Server(socks5.CommandUnsupported, "", nil))
	_, err = (&SOCKS5{Server: refuses.Addr}).DialPackets(t.Context(), proxy.UDP("192.0.2.1", 53))
	if proxy.ReasonOf(err) != proxy.Unsupported || !strings.Contains(err.Error(), "UDP ASSOCIATE: ") {
		t.Errorf("a proxy without: %v", err)
	}
}

func TestSOCKS5PacketsThroughDante(t *testing.T) {
	proxytest.Need(t, "danted")
	proxytest.NoLeaks(t)
	d := &SOCKS5{Server: startDanted(t)}
	v4 := proxytest.EchoPackets(t, "127.0.0.1")
	c := dialPackets(t, d, v4)
	for _, data := range [][]byte{[]byte("hello"), bytes.Repeat([]byte("x"), 1400)} {
		if from, got := proxytest.AskPackets(t, c, v4.Endpoint(), data); from != v4.Endpoint() || !bytes.Equal(got, data) {
			t.Errorf("%d bytes from %v", len(got), from)
		}
	}
	other := proxytest.EchoPackets(t, "127.0.0.1")
	if from, _ := proxytest.AskPackets(t, c, other.Endpoint(), []byte("x")); from != other.Endpoint() {
		t.Errorf("answer from %v", from)
	}
	name := relay.Endpoint{Name: "localhost", Port: v4.Port}
	if from, _ := proxytest.AskPackets(t, c, name, []byte("x")); from.Port != v4.Port {
		t.Errorf("answer from %v", from)
	}
}

// associationServer is a SOCKS5 proxy that has an association and does with it what serve says.
func associationServer(t *testing.T, bound string, serve func(control net.Conn, udp *net.UDPConn)) *SOCKS5 {
	t.Helper()
	up := proxytest.Listen(t, "tcp", func(c net.Conn) {
		if _, err := new(socks5.Server).Handshake(c); err != nil {
			return
		}
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return
		}
		defer udp.Close()
		at := netip.AddrPortFrom(netip.MustParseAddr(bound), udp.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		socks5.WriteReply(c, socks5.Succeeded, at)
		serve(c, udp)
	})
	return &SOCKS5{Server: up.Addr}
}

// An unspecified address in the reply is the proxy's own; what others send to the socket, and what is malformed, is dropped.
func TestSOCKS5PacketsTakesOnlyTheRelays(t *testing.T) {
	proxytest.NoLeaks(t)
	d := associationServer(t, "0.0.0.0", func(control net.Conn, udp *net.UDPConn) {
		stranger, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return
		}
		defer stranger.Close()
		b := make([]byte, 1500)
		n, from, _ := udp.ReadFromUDPAddrPort(b)
		stranger.WriteToUDPAddrPort(b[:n], from)
		for _, bad := range []string{"", "\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x35x", "\x00\x00\x00\x09xxxxxx"} {
			udp.WriteToUDPAddrPort([]byte(bad), from)
		}
		udp.WriteToUDPAddrPort(append(b[:n], "!"...), from)
		io.Copy(io.Discard, control)
	})
	to := relay.Endpoint{Name: "example.com", Port: 53}
	c := dialPackets(t, d, proxy.UDP("example.com", 53))
	if from, got := proxytest.AskPackets(t, c, to, []byte("hello")); string(got) != "hello!" || from != to {
		t.Errorf("%q from %v", got, from)
	}
	if err := c.WritePacket(&relay.Packet{Endpoint: to, Data: make([]byte, 65_507)}); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("too long with its header: %v", err)
	}
	c.Close() // also without its proxy's doing
}

// onePacket yields the packets it holds, and then the end.
type onePacket struct {
	relay.PacketConn
	left []relay.Packet
}

func (c *onePacket) ReadPacket(p *relay.Packet) error {
	if len(c.left) == 0 {
		return io.EOF
	}
	*p, c.left = c.left[0], c.left[1:]
	return nil
}

// TestSOCKS5RelayWithANameHasOnePort: what comes from another port than that of the relay is of somebody else.
func TestSOCKS5RelayWithANameHasOnePort(t *testing.T) {
	data := func(s string) []byte {
		b, _ := socks5.AppendDatagram(nil, socks5.Place{IP: netip.MustParseAddr("192.0.2.9"), Port: 53}, []byte(s))
		return b
	}
	from := func(port uint16) relay.Endpoint {
		return relay.Endpoint{IP: netip.MustParseAddr("192.0.2.1"), Port: port}
	}
	c := &socks5Packets{
		PacketConn: &onePacket{left: []relay.Packet{{Endpoint: from(1), Data: data("forged")}, {Endpoint: from(1080), Data: data("good")}}},
		relay:      relay.Endpoint{Name: "relay.example", Port: 1080},
	}
	var p relay.Packet
	if err := c.ReadPacket(&p); err != nil || string(p.Data) != "good" {
		t.Errorf("%q, %v", p.Data, err)
	}
}

func TestSOCKS5PacketsEndWithTheAssociation(t *testing.T) {
	proxytest.NoLeaks(t)
	for name, end := range map[string]func(net.Conn, *net.UDPConn){
		"FIN": func(control net.Conn, _ *net.UDPConn) { control.Close() },
		"RST": func(control net.Conn, _ *net.UDPConn) { relay.Abort(control) },
	} {
		c := dialPackets(t, associationServer(t, "127.0.0.1", end), proxy.UDP("192.0.2.1", 53))
		var p relay.Packet
		err := c.ReadPacket(&p)
		if proxy.ReasonOf(err) != proxy.Reset || !strings.Contains(err.Error(), "has ended the association") {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
	t.Run("relay gone", func(t *testing.T) {
		d := associationServer(t, "127.0.0.1", func(control net.Conn, udp *net.UDPConn) {
			udp.Close()
			io.Copy(io.Discard, control)
		})
		c := dialPackets(t, d, proxy.UDP("192.0.2.1", 53))
		failed := make(chan error, 1)
		go func() { failed <- c.ReadPacket(new(relay.Packet)) }()
		proxytest.Until(t, "the end", func() bool {
			c.WritePacket(&relay.Packet{Endpoint: relay.Endpoint{Name: "example.com", Port: 1}})
			return len(failed) > 0
		})
		if err := <-failed; proxy.ReasonOf(err) != proxy.Refused {
			t.Errorf("got %v", err)
		}
		c.Close()
	})
}

func TestDirectBind(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, from := range []string{"127.0.0.1", "::1", "0.0.0.0", "localhost"} {
		ln, err := new(Direct).Bind(t.Context(), proxy.TCP(from, 20))
		if err != nil {
			t.Fatal(err)
		}
		ip := ln.Addr().(*net.TCPAddr).AddrPort().Addr()
		if from == "0.0.0.0" != ip.IsUnspecified() || from == "::1" != (ip == netip.IPv6Loopback()) && from != "localhost" {
			t.Errorf("for %s it listens at %v", from, ln.Addr())
		}
		at := ln.Addr().String()
		if ip == netip.MustParseAddr("127.0.0.1") { // a stranger
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
			c, err := d.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			accepted := make(chan net.Conn, 1)
			go func() { c, _ := ln.Accept(); accepted <- c }()
			if !proxytest.Resets(c) {
				t.Error("a stranger is not reset")
			}
			proxytest.Dial(t, proxy.TCP("127.0.0.1", uint16(ln.Addr().(*net.TCPAddr).Port)))
			(<-accepted).Close()
		} else {
			c, err := net.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			got.Close()
		}
		ln.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := new(Direct).Bind(ctx, proxy.TCP("127.0.0.1", 20))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after its context: %v", err)
	}
	ln.Close()
	noNames := &Direct{Resolver: proxytest.NoNames(t)}
	if _, err := noNames.Bind(t.Context(), proxy.TCP("nosuch.example", 20)); proxy.ReasonOf(err) != proxy.NoHost {
		t.Errorf("unknown host: %v", err)
	}
}

func TestSOCKS5BindThroughDante(t *testing.T) {
	proxytest.Need(t, "danted")
	proxytest.NoLeaks(t)
	d := &SOCKS5{Server: startDanted(t)}
	ctx, cancel := context.WithTimeout(t.Context(), proxytest.Patience)
	defer cancel()
	ln, err := d.Bind(ctx, proxy.TCP("127.0.0.1", 20))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	origin, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if peer := ln.(*socks5Listener).Peer(); peer.String() != origin.LocalAddr().String() {
		t.Errorf("peer %v, want %v", peer, origin.LocalAddr())
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second stream: %v", err)
	}
	go proxytest.Echo(origin)
	ask(t, c)
}

func TestSOCKS5BindGivenUp(t *testing.T) {
	proxytest.NoLeaks(t)
	up := proxytest.Listen(t, "tcp", func(c net.Conn) {
		if _, err := new(socks5.Server).Handshake(c); err == nil {
			socks5.WriteReply(c, socks5.Succeeded, netip.MustParseAddrPort("0.0.0.0:77"))
			io.Copy(io.Discard, c)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := (&SOCKS5{Server: up.Addr}).Bind(ctx, proxy.TCP("192.0.2.1", 20))
	if err != nil {
		t.Fatal(err)
	}
	if ln.Addr().String() != "127.0.0.1:77" {
		t.Errorf("listens at %v", ln.Addr())
	}
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := ln.Accept(); err == nil {
		t.Error("accepted")
	}
	ln.Close()
}
