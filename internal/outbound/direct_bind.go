package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

var _ proxy.Binder = (*Direct)(nil)

// Bind implements proxy.Binder. It listens at BindAddr, or at the address of this machine that packets to the host leave from; at
// all addresses where any host may come.
func (d *Direct) Bind(ctx context.Context, from proxy.Addr) (net.Listener, error) {
	if from.Network != "tcp" {
		return nil, fmt.Errorf("outbound: direct: bind for %v: %w", from, errors.ErrUnsupported)
	}
	var hosts []netip.Addr // nil: any
	if !from.IP().IsUnspecified() {
		var err error
		if hosts, err = d.lookup(ctx, from.Host); err != nil {
			return nil, fmt.Errorf("outbound: direct: bind for %v: %w", from, err)
		}
	}
	at := d.BindAddr
	if !at.IsValid() && len(hosts) > 0 {
		var err error
		if at, err = d.towards(ctx, hosts[0]); err != nil {
			return nil, d.explain(err)
		}
	}
	host := ""
	if at.IsValid() {
		host = at.String()
	}
	lc := net.ListenConfig{Control: d.control(), KeepAliveConfig: sockopt.KeepAlive()}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, d.explain(err)
	}
	return &directListener{ln, hosts, context.AfterFunc(ctx, func() { ln.Close() })}, nil
}

// towards returns the address of this machine that packets to ip leave from. Nothing is sent.
func (d *Direct) towards(ctx context.Context, ip netip.Addr) (netip.Addr, error) {
	dialer := net.Dialer{Control: d.control()}
	const anyPort = 9
	c, err := dialer.DialContext(ctx, "udp", netip.AddrPortFrom(ip, anyPort).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// directListener waits for one host.
type directListener struct {
	net.Listener
	hosts []netip.Addr // nil: any
	stop  func() bool
}

// Accept implements net.Listener: strangers are reset.
func (l *directListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, fmt.Errorf("outbound: direct: %w", err)
		}
		ip := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone("")
		if l.hosts == nil || slices.ContainsFunc(l.hosts, func(h netip.Addr) bool { return h.WithZone("") == ip }) {
			return c, nil
		}
		relay.Abort(c)
	}
}

// Close implements net.Listener.
func (l *directListener) Close() error {
	l.stop()
	return l.Listener.Close()
}
