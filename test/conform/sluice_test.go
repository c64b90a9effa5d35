package conform

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// protocol is what a client speaks to reach its destination. The bytes are written out here, so that no half
// of sluice's own can agree with the other on an error.
type protocol struct {
	name    string
	inbound func(l inbound.Listener, to proxy.Addr) boundInbound
	request func(dst proxy.Addr) string // what a client sends at first
	yes     string                      // what it hears when its destination was reached
}

type boundInbound interface {
	proxy.Inbound
	BoundAddr() net.Addr
}

const (
	forward = iota
	socks5
	connect
	mixedSOCKS5
	mixedConnect
)

const (
	socksYes   = "\x05\x00" + "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	connectYes = "HTTP/1.1 200 Connection established\r\n\r\n"
)

var protocols = [...]protocol{
	forward:      {"forward", newForward, func(proxy.Addr) string { return "" }, ""},
	socks5:       {"socks5", newSOCKS5, socksRequest, socksYes},
	connect:      {"connect", newHTTP, connectRequest, connectYes},
	mixedSOCKS5:  {"mixed-socks5", newMixed, socksRequest, socksYes},
	mixedConnect: {"mixed-connect", newMixed, connectRequest, connectYes},
}

func newForward(l inbound.Listener, to proxy.Addr) boundInbound {
	return &inbound.Forward{Listener: l, To: to}
}
func newSOCKS5(l inbound.Listener, _ proxy.Addr) boundInbound { return &inbound.SOCKS5{Listener: l} }
func newHTTP(l inbound.Listener, _ proxy.Addr) boundInbound   { return &inbound.HTTP{Listener: l} }
func newMixed(l inbound.Listener, _ proxy.Addr) boundInbound  { return &inbound.Mixed{Listener: l} }

func socksRequest(dst proxy.Addr) string {
	const head = "\x05\x01\x00" + "\x05\x01\x00"
	port := string([]byte{byte(dst.Port >> 8), byte(dst.Port)})
	if ip, err := netip.ParseAddr(dst.Host); err == nil {
		return head + "\x01" + string(ip.AsSlice()) + port
	}
	return head + "\x03" + string([]byte{byte(len(dst.Host))}) + dst.Host + port
}

func connectRequest(dst proxy.Addr) string {
	return fmt.Sprintf("CONNECT %[1]v HTTP/1.1\r\nHost: %[1]v\r\n\r\n", dst)
}

// ask is the client's half of the handshake on c. It reads nothing behind the answer.
func (p protocol) ask(c net.Conn, dst proxy.Addr) error {
	if _, err := io.WriteString(c, p.request(dst)); err != nil {
		return err
	}
	return p.hearYes(c)
}

func (p protocol) hearYes(c net.Conn) error {
	answer := make([]byte, len(p.yes))
	if n, err := io.ReadFull(c, answer); err != nil || string(answer) != p.yes {
		return fmt.Errorf("%s: the answer is %q, %v", p.name, answer[:n], err)
	}
	return nil
}

// sluice is an inbound with an engine.
type sluice struct {
	protocol protocol
	addr     proxy.Addr // where clients connect to
	engine   *proxy.Engine
}

// setup says which sluice a test wants.
type setup struct {
	protocol    protocol
	network     string     // of its clients: tcp or unix; empty: tcp
	to          proxy.Addr // where forward goes
	dialer      proxy.Dialer
	dialTimeout time.Duration
}

// start starts a sluice that ends with the test. Then it must have no session any more.
func start(t *testing.T, s setup) *sluice {
	t.Helper()
	addr := proxy.TCP("127.0.0.1", 0)
	if s.network == "unix" {
		addr = proxy.Addr{Network: "unix", Host: socketPath(t)}
	}
	in := s.protocol.inbound(inbound.Listener{Name: s.protocol.name, Addr: addr}, s.to)
	if err := in.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := &proxy.Engine{Router: proxy.Static{Name: "test", Dialer: s.dialer}, DialTimeout: s.dialTimeout}
	end := make(chan error, 1)
	go func() { end <- in.Serve(context.Background(), e) }()
	t.Cleanup(func() {
		in.Close()
		select {
		case err := <-end:
			if err != nil {
				t.Errorf("%s: Serve: %v", s.protocol.name, err)
			}
		case <-time.After(proxytest.Patience):
			t.Errorf("%s: %d sessions go on although nobody is there any more", s.protocol.name, e.Abort())
			<-end
		}
	})
	return &sluice{protocol: s.protocol, addr: addrOf(in.BoundAddr()), engine: e}
}

// socketPath returns a path short enough for a Unix socket, whatever the test's name.
func socketPath(t *testing.T) string {
	dir, err := os.MkdirTemp("", "sluice")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func addrOf(a net.Addr) proxy.Addr {
	switch a := a.(type) {
	case *net.TCPAddr:
		return proxy.TCP(a.IP.String(), uint16(a.Port))
	case *net.UnixAddr:
		return proxy.Addr{Network: "unix", Host: a.Name}
	}
	panic(fmt.Sprintf("no address of a sluice: %v", a))
}

// dial connects to dst through s, and does what it must within Patience.
func (s *sluice) dial(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, s.addr.Network, s.addr.HostPort())
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	if err := s.protocol.ask(c, dst); err != nil {
		c.Close()
		return nil, err
	}
	return c, c.SetDeadline(time.Time{})
}

// upstreams are the proxies that a sluice can reach the origin through, each a second sluice; but for direct.
// Each returns the dialer of the first, whose way out the second's dialer is.
var upstreams = []struct {
	name  string
	start func(t *testing.T, s setup) (proxy.Dialer, *sluice)
}{
	{"direct", func(_ *testing.T, s setup) (proxy.Dialer, *sluice) { return s.dialer, nil }},
	{"socks5", viaSOCKS5},
	{"http", viaHTTP},
	{"https", viaHTTPS},
}

func viaSOCKS5(t *testing.T, s setup) (proxy.Dialer, *sluice) {
	s.protocol, s.network = protocols[socks5], "tcp"
	up := start(t, s)
	return &outbound.SOCKS5{Server: up.addr}, up
}

func viaHTTP(t *testing.T, s setup) (proxy.Dialer, *sluice) {
	s.protocol, s.network = protocols[connect], "tcp"
	up := start(t, s)
	return &outbound.HTTP{Server: up.addr}, up
}

// viaHTTPS puts TLS between the two sluices: the first is its client, and its server is a relay of its own,
// as a load balancer before a proxy is. So TLS is joined to TCP from either side.
func viaHTTPS(t *testing.T, s setup) (proxy.Dialer, *sluice) {
	s.protocol, s.network = protocols[connect], "tcp"
	up := start(t, s)
	balancer := proxytest.Listen(t, "tls", func(c net.Conn) {
		if c.(*tls.Conn).Handshake() != nil {
			return // the client has left
		}
		next, err := net.Dial("tcp", up.addr.HostPort())
		if err != nil {
			t.Error(err)
			return
		}
		relay.Join(context.Background(), c, next)
	})
	return &outbound.HTTP{Server: balancer.Addr, TLS: &tls.Config{RootCAs: balancer.Roots}}, up
}

// gate is a Dialer that lets nobody through before it is opened, and says who waits.
type gate struct {
	proxy.Dialer
	waiting chan struct{} // has a value for each dial that has begun
	open    chan struct{}
	gone    chan error // why dials were given up before
}

func newGate(d proxy.Dialer) *gate {
	const most = 16
	return &gate{Dialer: d, waiting: make(chan struct{}, most), open: make(chan struct{}), gone: make(chan error, most)}
}

func (g *gate) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	g.waiting <- struct{}{}
	select {
	case <-g.open:
		return g.Dialer.DialStream(ctx, dst)
	case <-ctx.Done():
		g.gone <- context.Cause(ctx)
		return nil, ctx.Err()
	}
}

// within waits for what c is to say.
func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(proxytest.Patience):
		t.Fatalf("waited in vain: %s", what)
	}
	return v
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(relay.HalfCloser); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}
