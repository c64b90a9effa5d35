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

var _ proxy.PacketDialer = (*Direct)(nil)

// The limits on the names in the datagrams of one session.
const (
	nameTimeout = 5 * time.Second // to resolve one; the session's next datagrams wait meanwhile
	nameKept    = time.Minute     // what was found
	noNameKept  = 5 * time.Second // that nothing was found
	namesMax    = 64
)

// DialPackets implements proxy.PacketDialer. Datagrams leave from a socket of their own, which takes those of any
// place. Each name is resolved when a datagram is first for it, and that datagram and those behind it wait; dst is
// resolved now. What comes back is from addresses, never from names.
func (d *Direct) DialPackets(ctx context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	if dst.Network != "udp" {
		return nil, fmt.Errorf("outbound: direct: %v: %w", dst, errors.ErrUnsupported)
	}
	if d.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.Timeout)
		defer cancel()
	}
	const receiveBuffer = 1 << 20
	options := []sockopt.Control{sockopt.ReceiveBuffer(receiveBuffer)}
	if c := d.control(); c != nil {
		options = append(options, c)
	}
	lc := net.ListenConfig{Control: sockopt.All(options...)}
	host := ""
	if d.BindAddr.IsValid() {
		host = d.BindAddr.String()
	}
	conn, err := lc.ListenPacket(ctx, "udp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, d.explain(err)
	}
	c := &directPackets{UDPConn: relay.NewUDPConn(conn.(*net.UDPConn)), direct: d, names: make(map[string]foundName)}
	c.closing, c.close = context.WithCancel(context.Background())
	local := c.LocalAddr().Addr()
	c.only4, c.only6 = local.Is4(), local.Is6() && !local.IsUnspecified()
	if !dst.IP().IsValid() {
		if _, err := c.resolve(ctx, dst.Host); err != nil {
			c.Close()
			return nil, ofOrigin(fmt.Errorf("outbound: direct: %v: %w", dst, err))
		}
	}
	return c, nil
}

// directPackets is a UDPConn that resolves names.
type directPackets struct {
	*relay.UDPConn
	direct       *Direct
	only4, only6 bool // the addresses that the socket can send to
	names        map[string]foundName
	closing      context.Context // ends with Close
	close        context.CancelFunc
}

// foundName is what became of a name.
type foundName struct {
	ip    netip.Addr
	err   error
	until time.Time
}

// WritePacket implements relay.PacketConn.
func (c *directPackets) WritePacket(p *relay.Packet) error {
	if p.Endpoint.IP.IsValid() {
		return c.explain(c.UDPConn.WritePacket(p))
	}
	ctx, cancel := context.WithTimeout(c.closing, nameTimeout)
	defer cancel()
	ip, err := c.resolve(ctx, p.Endpoint.Name)
	if err != nil {
		return fmt.Errorf("outbound: direct: %v: %w", p.Endpoint, err)
	}
	q := relay.Packet{Endpoint: relay.Endpoint{IP: ip, Port: p.Endpoint.Port}, Data: p.Data}
	return c.explain(c.UDPConn.WritePacket(&q))
}

// WritePackets implements relay.BatchWriter.
func (c *directPackets) WritePackets(ps []relay.Packet) (n int, err error) {
	if ps[0].Endpoint.IP.IsValid() { // the way of all that are sent at once
		n, err = c.UDPConn.WritePackets(ps)
		return n, c.explain(err)
	}
	if err := c.WritePacket(&ps[0]); err != nil {
		return 0, err
	}
	return 1, nil
}

func (c *directPackets) explain(err error) error {
	if err == nil || errors.Is(err, net.ErrClosed) {
		return err
	}
	return c.direct.explain(err)
}

// Close implements relay.PacketConn.
func (c *directPackets) Close() error {
	c.close()
	return c.UDPConn.Close()
}

// resolve returns an address of name that the socket can send to.
func (c *directPackets) resolve(ctx context.Context, name string) (netip.Addr, error) {
	now := time.Now()
	found, ok := c.names[name]
	if ok && now.Before(found.until) {
		return found.ip, found.err
	}
	ip, err := c.lookup(ctx, name)
	if errors.Is(c.closing.Err(), context.Canceled) {
		return netip.Addr{}, net.ErrClosed
	}
	kept := nameKept
	if err != nil {
		kept = noNameKept
	}
	if len(c.names) >= namesMax {
		clear(c.names)
	}
	c.names[name] = foundName{ip, err, time.Now().Add(kept)}
	return ip, err
}

func (c *directPackets) lookup(ctx context.Context, name string) (netip.Addr, error) {
	if name == "" { // net would take it for this machine
		return netip.Addr{}, &net.DNSError{Err: "no name", IsNotFound: true}
	}
	ips, err := c.direct.lookup(ctx, name)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, ip := range ips { // in the order of RFC 6724
		if ip.Is4() && !c.only6 || ip.Is6() && !c.only4 {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%s has no address that can be reached from %v: %w", name, c.LocalAddr().Addr(), syscall.EAFNOSUPPORT)
}

// lookup returns the addresses of a host, which may be one.
func (d *Direct) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	resolver := d.resolver()
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	ips, err := resolver.LookupNetIP(ctx, "ip", host)
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	return ips, err
}
