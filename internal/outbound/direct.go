// Package outbound holds the ways out: each file has one [proxy.Dialer], which opens streams to
// destinations directly or through an upstream. Dialers compose: one that speaks to an upstream
// reaches it through another, so that a chain of proxies is a dialer like any other.
//
// A dialer's error keeps the cause in a form that [proxy.ReasonOf] knows, because the client is told
// exactly that.
package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// Direct connects to destinations itself. The zero value is ready to use. Names are resolved here, and where one
// has several addresses, IPv6 and IPv4 race (RFC 8305).
type Direct struct {
	BindAddr  netip.Addr    // the source address; only destinations of its family can be reached. Zero: the kernel chooses
	Interface string        // the network interface, as "eth0"; empty: as the routes say. Linux
	Mark      int           // the packets' mark for routing rules (SO_MARK); 0: none. Linux, with CAP_NET_ADMIN
	Timeout   time.Duration // for one dial, with all addresses of a name; 0: as the context says
	Resolver  *net.Resolver // nil: the system's
}

var (
	_ proxy.Dialer  = (*Direct)(nil)
	_ proxy.Starter = (*Direct)(nil)
)

// DialStream implements proxy.Dialer. It returns a *net.TCPConn or a *net.UnixConn.
func (d *Direct) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	dialer := net.Dialer{Timeout: d.Timeout, KeepAliveConfig: sockopt.KeepAlive(), Resolver: d.resolver()}
	switch {
	case dst.Network == "unix":
	case dst.Network != "tcp":
		return nil, fmt.Errorf("outbound: direct: %v: %w", dst, errors.ErrUnsupported)
	case dst.Host == "": // net would take it for this machine
		return nil, ofOrigin(fmt.Errorf("outbound: direct: %v: %w", dst, &net.DNSError{Err: "no name", IsNotFound: true}))
	default:
		// Sockets of multipath TCP differ in resets and options, and the relay counts on those of TCP.
		dialer.SetMultipathTCP(false)
		dialer.Control = d.control()
		if d.BindAddr.IsValid() {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.BindAddr, 0))
		}
	}
	c, err := dialer.DialContext(ctx, dst.Network, dst.HostPort())
	if err != nil {
		return nil, d.explain(err)
	}
	return c, nil
}

// StartDial implements proxy.Starter, for IP addresses, and the kernel's choice of our own.
func (d *Direct) StartDial(client net.Conn, dst proxy.Addr, timeout time.Duration, done func(net.Conn, error)) (cancel func(error), handled bool) {
	if dst.Network != "tcp" || !dst.IP().IsValid() || d.BindAddr.IsValid() {
		return nil, false
	}
	if d.Timeout > 0 && (timeout == 0 || d.Timeout < timeout) {
		timeout = d.Timeout
	}
	return relay.DialSocket(client, netip.AddrPortFrom(dst.IP(), dst.Port), timeout, d.control(), func(s *relay.Socket, err error) {
		if err != nil {
			done(nil, d.explain(err))
			return
		}
		done(s, nil)
	})
}

// resolver returns the one that resolves names; nil for the system's. With a mark, its questions bear that, too.
func (d *Direct) resolver() *net.Resolver {
	if d.Resolver != nil || d.Mark == 0 {
		return d.Resolver
	}
	return MarkedResolver(d.Mark)
}

func (d *Direct) control() sockopt.Control {
	var options []sockopt.Control
	if d.Mark != 0 {
		options = append(options, sockopt.Mark(d.Mark))
	}
	if d.Interface != "" {
		options = append(options, sockopt.Device(d.Interface))
	}
	return sockopt.All(options...)
}

// Try returns what is wrong now with BindAddr, Interface and Mark on this machine, which dials would fail with. It may become right
// later, as when the interface comes. It sends nothing.
func (d *Direct) Try() error {
	if !d.BindAddr.IsValid() && d.Interface == "" && d.Mark == 0 {
		return nil
	}
	lc := net.ListenConfig{Control: d.control()}
	addr := d.BindAddr
	if !addr.IsValid() {
		addr = netip.IPv4Unspecified()
	}
	ln, err := lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(addr, 0).String())
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // nobody asked to listen
	}
	if err != nil {
		return d.explain(err)
	}
	return ln.Close()
}

// explain adds to err what a person can do about settings that do not fit this machine.
func (d *Direct) explain(err error) error {
	const wrap = "outbound: direct: %w"
	_, noAddr := errors.AsType[*net.AddrError](err)
	switch {
	case d.BindAddr.IsValid() && noAddr:
		return fmt.Errorf(wrap+" (the destination has no address that can be reached from %v: %w)",
			err, d.BindAddr, syscall.EAFNOSUPPORT)
	case d.BindAddr.IsValid() && errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf(wrap+" (is %v an address of this machine?)", err, d.BindAddr)
	case d.Mark != 0 && errors.Is(err, syscall.EPERM):
		return fmt.Errorf(wrap+" (a mark needs the capability CAP_NET_ADMIN: run as root, or "+
			"`setcap cap_net_admin+ep` on the program)", err)
	case d.Interface != "" && errors.Is(err, syscall.ENODEV):
		return fmt.Errorf(wrap+" (this machine has no interface %s)", err, d.Interface)
	}
	return ofOrigin(fmt.Errorf(wrap, err))
}
