package netstack

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// The addresses of a bed: those of the namespace, and those that stand for hosts beyond it.
const (
	client4, client6 = "10.77.0.1", "fd77::1"
	host4, host6     = "192.0.2.1", "2001:db8::1"
)

// bed is a network namespace whose only way out is a TUN device with a Stack on it.
type bed struct {
	t     testing.TB
	ns    netns.NsHandle
	link  netlink.Link
	stack *Stack
	log   *lockedLog

	ctx    context.Context
	cancel context.CancelFunc
	served chan error
	err    error
}

type lockedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newBed makes the namespace and serves h on it until the test's end.
func newBed(t testing.TB, h proxy.Handler, set func(*Stack), o tundev.Options) *bed {
	t.Helper()
	proxytest.NeedRoot(t)
	b := &bed{t: t, log: new(lockedLog), served: make(chan error, 1)}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.stack = &Stack{Name: "tun", Log: slog.New(slog.NewTextHandler(b.log, nil)), Open: func(context.Context) (*tundev.Device, error) { return b.open(o) }}
	if set != nil {
		set(b.stack)
	}
	if err := b.stack.Listen(b.ctx); err != nil {
		t.Fatal(err)
	}
	go func() { b.served <- b.stack.Serve(b.ctx, h) }()
	t.Cleanup(b.close)
	return b
}

// open makes the namespace and the device in it. The thread is given up with the namespace.
func (b *bed) open(o tundev.Options) (d *tundev.Device, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if b.ns, err = netns.New(); err == nil {
			d, err = b.setUp(o)
		}
	}()
	<-done
	return d, err
}

func (b *bed) setUp(o tundev.Options) (*tundev.Device, error) {
	d, err := tundev.Open(o)
	if err != nil {
		return nil, err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	if b.link, err = netlink.LinkByName(d.Name()); err != nil {
		return nil, err
	}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(b.link)); err != nil {
		return nil, err
	}
	for ip, bits := range map[string]int{client4: 24, client6: 64} {
		addr, err := netlink.ParseAddr(ip + "/" + strconv.Itoa(bits))
		if err != nil {
			return nil, err
		}
		if bits == 64 {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(b.link, addr); err != nil {
			return nil, err
		}
	}
	// The kernel takes what is for an address of IPv6 only a moment after it was added.
	proxytest.Until(b.t, "the address of IPv6", func() bool {
		r, err := netlink.RouteGet(net.ParseIP(client6))
		return err == nil && len(r) > 0 && r[0].Type == unix.RTN_LOCAL
	})
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		_, dst, _ := net.ParseCIDR(all)
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: b.link.Attrs().Index, Dst: dst}); err != nil {
			return nil, err
		}
	}
	return d, nil
}

func (b *bed) close() {
	b.cancel()
	b.wait()
	b.ns.Close()
	if b.t.Failed() {
		b.t.Log(b.log.String())
	}
}

// wait returns what Serve has returned.
func (b *bed) wait() error {
	select {
	case err, first := <-b.served:
		if first {
			b.err = err
			close(b.served)
		}
	case <-time.After(3 * proxytest.Patience):
		buf := make([]byte, 1<<20)
		b.t.Fatalf("Serve does not return:\n%s", buf[:runtime.Stack(buf, true)])
	}
	return b.err
}

// inside runs f on a thread in the namespace. Sockets that f makes itself are of it.
func (b *bed) inside(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if err := netns.Set(b.ns); err != nil {
			b.t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// tryDial connects from the namespace.
func (b *bed) tryDial(network, addr string, timeout time.Duration) (c net.Conn, err error) {
	b.inside(func() { c, err = net.DialTimeout(network, addr, timeout) })
	return c, err
}

func (b *bed) dial(addr string) *net.TCPConn {
	b.t.Helper()
	c, err := b.tryDial("tcp", addr, proxytest.Patience)
	if err != nil {
		b.t.Fatalf("dial %s: %v\n%s", addr, err, b.log)
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	b.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// listenPacket makes a UDP socket in the namespace.
func (b *bed) listenPacket(addr string) *net.UDPConn {
	b.t.Helper()
	var c *net.UDPConn
	var err error
	network := "udp4"
	if addr[0] == '[' {
		network = "udp6"
	}
	b.inside(func() { c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))) })
	if err != nil {
		b.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	b.t.Cleanup(func() { c.Close() })
	return c
}

// toLoopback dials the port of a destination on this machine's loopback, whatever the host.
type toLoopback struct{}

func (toLoopback) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	host := "127.0.0.1"
	return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(dst.Port))))
}

func engine(d proxy.Dialer) *proxy.Engine {
	return &proxy.Engine{Router: proxy.Static{Name: "test", Dialer: d}}
}

// failing is a dialer whose every dial fails.
type failing struct{ err error }

func (f failing) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) { return nil, f.err }

// silent is a dialer whose dials end with their context. It says when each begins and why it ended.
type silent struct {
	begun chan proxy.Addr
	ended chan error
}

func newSilent() *silent { return &silent{make(chan proxy.Addr, 100000), make(chan error, 100000)} }

func (s *silent) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	s.begun <- dst
	<-ctx.Done()
	s.ended <- context.Cause(ctx)
	return nil, ctx.Err()
}
