package inbound

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

// associated is a client with an association.
type associated struct {
	t       *testing.T
	control net.Conn
	udp     *net.UDPConn
	relay   netip.AddrPort
}

// newAssociated asks the proxy at a for an association, and announces port.
func newAssociated(t *testing.T, a proxy.Addr, c socks5.Client, port uint16) *associated {
	t.Helper()
	control := proxytest.Dial(t, a)
	bound, err := c.Handshake(control, socks5.UDPAssociate, socks5.Addr{Host: "0.0.0.0", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	relay := netip.AddrPortFrom(netip.MustParseAddr(bound.Host), bound.Port)
	return &associated{t, control, udpSocket(t), relay}
}

func udpSocket(t *testing.T) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	t.Cleanup(func() { c.Close() })
	return c
}

func datagram(to socks5.Place, data string) []byte {
	b, _ := socks5.AppendDatagram(nil, to, []byte(data))
	return b
}

func (a *associated) send(c *net.UDPConn, b []byte) {
	a.t.Helper()
	if _, err := c.WriteToUDPAddrPort(b, a.relay); err != nil {
		a.t.Fatal(err)
	}
}

// receive returns the next datagram.
func (a *associated) receive() (from socks5.Place, data string) {
	a.t.Helper()
	b := make([]byte, 1<<16)
	n, err := a.udp.Read(b)
	if err != nil {
		a.t.Fatal(err)
	}
	from, payload, err := socks5.ParseDatagram(b[:n])
	if err != nil {
		a.t.Fatal(err)
	}
	return from, string(payload)
}

// ended waits until the proxy has closed the control conn.
func (a *associated) ended() {
	a.t.Helper()
	a.control.SetDeadline(time.Now().Add(proxytest.Patience))
	if n, err := io.Copy(io.Discard, a.control); n > 0 || err != nil {
		a.t.Errorf("control conn: %d bytes, %v", n, err)
	}
}

func TestAssociate(t *testing.T) {
	proxytest.NoLeaks(t)
	h := &proxytest.RecordingHandler{}
	at := serveSOCKS5(t, &SOCKS5{Users: Users{"ann": "secret"}}, h)
	a := newAssociated(t, at, socks5.Client{User: "ann", Password: "secret"}, 0)
	if a.relay.Addr() != at.IP() || a.relay.Port() == 0 {
		t.Errorf("relay at %v", a.relay)
	}
	long := strings.Repeat("x", 60_000)
	for _, to := range []socks5.Place{
		{Name: "example.com", Port: 53},
		{IP: netip.MustParseAddr("192.0.2.1"), Port: 1000},
		{IP: netip.MustParseAddr("2001:db8::1"), Port: 443},
	} {
		for _, data := range []string{"hello", "", long} {
			a.send(a.udp, datagram(to, data))
			if from, got := a.receive(); from != to || got != data {
				t.Errorf("sent %d bytes to %+v, got %d from %+v", len(data), to, len(got), from)
			}
		}
	}
	want := proxy.Flow{Inbound: "in", Client: addrPort(a.control.LocalAddr()), Local: addrPort(a.control.RemoteAddr()),
		User: "ann", Dst: proxy.UDP("example.com", 53)}
	if f := h.Flows(); len(f) != 1 || f[0] != want {
		t.Errorf("flows %+v, want %+v", f, want)
	}
}

// Only the client's datagrams are taken, and of those only sound ones.
func TestAssociateDrops(t *testing.T) {
	proxytest.NoLeaks(t)
	h := &proxytest.RecordingHandler{}
	at := serveSOCKS5(t, &SOCKS5{}, h)
	to := socks5.Place{IP: netip.MustParseAddr("192.0.2.1"), Port: 1000}
	elsewhere, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)})
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	t.Run("first sender is the client", func(t *testing.T) {
		a := newAssociated(t, at, socks5.Client{}, 0)
		other := udpSocket(t)
		a.send(elsewhere, datagram(to, "of another host"))
		a.send(a.udp, []byte("\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x35fragment"))
		a.send(a.udp, []byte("\x00\x00\x00\x07garbage"))
		a.send(a.udp, datagram(to, "first"))
		if _, got := a.receive(); got != "first" {
			t.Errorf("got %q", got)
		}
		a.send(other, datagram(to, "of another port"))
		a.send(elsewhere, datagram(to, "of another host"))
		a.send(a.udp, datagram(to, "second"))
		if _, got := a.receive(); got != "second" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("announced port", func(t *testing.T) {
		socket := udpSocket(t)
		a := newAssociated(t, at, socks5.Client{}, uint16(socket.LocalAddr().(*net.UDPAddr).Port))
		a.send(a.udp, datagram(to, "of another port"))
		a.udp = socket
		a.send(socket, datagram(to, "announced"))
		if _, got := a.receive(); got != "announced" {
			t.Errorf("got %q", got)
		}
	})
}

// TestFragmentsCountAsDropped: the log tells of datagrams of the client that go nowhere.
func TestFragmentsCountAsDropped(t *testing.T) {
	proxytest.NoLeaks(t)
	dropped := make(chan int64, 1)
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		echoPackets(c)
		dropped <- c.(relay.Dropper).Dropped()
	})
	a := newAssociated(t, serveSOCKS5(t, &SOCKS5{}, h), socks5.Client{}, 0)
	to := socks5.Place{IP: netip.MustParseAddr("192.0.2.1"), Port: 1000}
	a.send(a.udp, datagram(to, "first"))
	a.send(a.udp, []byte("\x00\x00\x01\x01\x7f\x00\x00\x01\x00\x35fragment"))
	a.send(a.udp, datagram(to, "second"))
	a.receive()
	a.receive()
	a.control.Close()
	if n := <-dropped; n != 1 {
		t.Errorf("%d dropped, want 1", n)
	}
}

// Any place may answer, not only those that were asked: full cone.
func TestAssociateFullCone(t *testing.T) {
	proxytest.NoLeaks(t)
	stranger := relay.Endpoint{IP: netip.MustParseAddr("198.51.100.7"), Port: 7}
	h := packetHandler(func(_ context.Context, c relay.PacketConn) {
		var p relay.Packet
		defer p.Free()
		for c.ReadPacket(&p) == nil {
			p.Endpoint = stranger
			c.WritePacket(&p)
		}
	})
	a := newAssociated(t, serveSOCKS5(t, &SOCKS5{}, h), socks5.Client{}, 0)
	a.send(a.udp, datagram(socks5.Place{Name: "example.com", Port: 1}, "hello"))
	if from, got := a.receive(); relay.Endpoint(from) != stranger || got != "hello" {
		t.Errorf("got %q from %+v", got, from)
	}
}

// An association and its conn end together, whichever ends first and however.
func TestAssociationEndsWithItsConn(t *testing.T) {
	to := socks5.Place{IP: netip.MustParseAddr("192.0.2.1"), Port: 1000}
	for _, begun := range []bool{false, true} {
		for name, end := range map[string]func(a *associated){
			"FIN": func(a *associated) { a.control.(*net.TCPConn).CloseWrite(); a.ended() },
			"RST": func(a *associated) { relay.Abort(a.control) },
		} {
			over := make(chan struct{}, 1)
			h := packetHandler(func(_ context.Context, c relay.PacketConn) { echoPackets(c); over <- struct{}{} })
			s := &SOCKS5{Listener: Listener{MaxConns: 1}}
			at := serveSOCKS5(t, s, h)
			a := newAssociated(t, at, socks5.Client{}, 0)
			if begun {
				a.send(a.udp, datagram(to, "hello"))
				a.receive()
			}
			end(a)
			if begun {
				<-over
			}
			newAssociated(t, at, socks5.Client{}, 0).control.Close() // there is a place again
			t.Log(name, begun)
		}
	}
	t.Run("session over", func(t *testing.T) {
		proxytest.NoLeaks(t)
		h := packetHandler(func(_ context.Context, c relay.PacketConn) {
			var p relay.Packet
			c.ReadPacket(&p)
			p.Free()
		})
		a := newAssociated(t, serveSOCKS5(t, &SOCKS5{}, h), socks5.Client{}, 0)
		a.send(a.udp, datagram(to, "hello"))
		a.ended()
	})
	t.Run("listener closed before a datagram", func(t *testing.T) {
		proxytest.NoLeaks(t)
		s := &SOCKS5{}
		a := newAssociated(t, serveSOCKS5(t, s, &proxytest.RecordingHandler{}), socks5.Client{}, 0)
		s.Close()
		a.ended()
	})
	t.Run("refused", func(t *testing.T) {
		proxytest.NoLeaks(t)
		a := newAssociated(t, serveSOCKS5(t, &SOCKS5{}, &proxytest.RecordingHandler{Err: proxy.ErrDenied}), socks5.Client{}, 0)
		a.send(a.udp, datagram(to, "hello"))
		a.ended()
	})
}

func TestAssociateThroughMixedAndUnixSocket(t *testing.T) {
	to := socks5.Place{Name: "example.com", Port: 1000}
	for name, addr := range map[string]proxy.Addr{
		"TCP": loopback, "IPv6": proxy.TCP("::1", 0), "Unix": {Network: "unix", Host: shortPath(t)},
	} {
		t.Run(name, func(t *testing.T) {
			m := &Mixed{Listener: Listener{Addr: addr}}
			b := startInbound(t, m, &proxytest.RecordingHandler{})
			at := proxy.Addr{Network: "unix", Host: b.String()}
			if tcp, ok := b.(*net.TCPAddr); ok {
				at = proxy.TCP(tcp.IP.String(), uint16(tcp.Port))
			}
			a := newAssociated(t, at, socks5.Client{}, 0)
			if a.relay.Addr().Is6() {
				a.udp = dialUDP(t, net.UDPAddrFromAddrPort(a.relay))
				a.udp.Write(datagram(to, "hello"))
			} else {
				a.send(a.udp, datagram(to, "hello"))
			}
			if from, got := a.receive(); from != to || got != "hello" {
				t.Errorf("got %q from %+v", got, from)
			}
			a.control.Close()
		})
	}
}

func shortPath(t *testing.T) string { return "@sluice-test-" + strings.ReplaceAll(t.Name(), "/", "-") }

// binder waits for streams at loopback.
type binder struct {
	direct
	err error
	at  chan net.Addr
}

func (b *binder) Bind(ctx context.Context, from proxy.Addr) (net.Listener, error) {
	if b.err != nil {
		return nil, b.err
	}
	ln, err := net.Listen("tcp", ":0")
	context.AfterFunc(ctx, func() { ln.Close() })
	b.at <- ln.Addr()
	return ln, err
}

func TestBind(t *testing.T) {
	proxytest.NoLeaks(t)
	b := &binder{at: make(chan net.Addr, 1)}
	engine := &proxy.Engine{Router: proxy.Static{Name: "binder", Dialer: b}}
	c := proxytest.Dial(t, serveSOCKS5(t, &SOCKS5{}, engine))
	bound, err := new(socks5.Client).Handshake(c, socks5.Bind, socks5.Addr{Host: "192.0.2.1", Port: 20})
	if err != nil {
		t.Fatal(err)
	}
	// The listener has all addresses, and the client is told the one that it knows.
	if want := (socks5.Addr{Host: "127.0.0.1", Port: uint16((<-b.at).(*net.TCPAddr).Port)}); bound != want {
		t.Fatalf("bound at %v, want %v", bound, want)
	}
	origin, err := net.Dial("tcp", bound.String())
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	io.WriteString(origin, "banner")
	peer, err := socks5.ReadReply(c)
	if err != nil || peer.String() != origin.LocalAddr().String() {
		t.Errorf("peer %v, %v", peer, err)
	}
	got := make([]byte, 6)
	io.ReadFull(c, got)
	io.WriteString(c, "answer")
	c.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(origin)
	if string(got) != "banner" || string(answer) != "answer" || err != nil {
		t.Errorf("%q, %q, %v", got, answer, err)
	}
}

func TestBindRefused(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, tt := range []struct {
		dialer proxy.Dialer
		want   socks5.Reply
	}{
		{direct{}, socks5.CommandUnsupported},
		{&binder{err: proxy.ErrDenied}, socks5.NotAllowed},
	} {
		engine := &proxy.Engine{Router: proxy.Static{Name: "x", Dialer: tt.dialer}}
		c := proxytest.Dial(t, serveSOCKS5(t, &SOCKS5{}, engine))
		_, err := new(socks5.Client).Handshake(c, socks5.Bind, socks5.Addr{Host: "192.0.2.1", Port: 20})
		if !errors.Is(err, tt.want) {
			t.Errorf("heard %v, want %v", err, tt.want)
		}
		c.Close()
	}
}

// A client that goes away while it waits takes the listener with it.
func TestBindGivenUp(t *testing.T) {
	proxytest.NoLeaks(t)
	b := &binder{at: make(chan net.Addr, 1)}
	engine := &proxy.Engine{Router: proxy.Static{Name: "binder", Dialer: b}}
	c := proxytest.Dial(t, serveSOCKS5(t, &SOCKS5{}, engine))
	if _, err := new(socks5.Client).Handshake(c, socks5.Bind, socks5.Addr{Host: "0.0.0.0"}); err != nil {
		t.Fatal(err)
	}
	at := <-b.at
	relay.Abort(c)
	proxytest.Until(t, "nobody listens", func() bool {
		c, err := net.Dial("tcp", at.String())
		if err == nil {
			c.Close()
		}
		return err != nil
	})
}
