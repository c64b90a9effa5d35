package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

var _ proxy.PacketDialer = (*SOCKS5)(nil)

// DialPackets implements proxy.PacketDialer by UDP ASSOCIATE, RFC 1928 section 7. Datagrams go to the relay that the proxy names,
// through Via as well, which has to carry them; the conn to the proxy stays open beside them, and its end is theirs. Names are resolved
// by the proxy.
func (s *SOCKS5) DialPackets(ctx context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	if dst.Network != "udp" {
		return nil, fmt.Errorf("outbound: socks5 %v: cannot ask for %v: %w", s.Server, dst, errors.ErrUnsupported)
	}
	via, ok := s.via().(proxy.PacketDialer)
	if !ok || s.Server.Network != "tcp" {
		return nil, fmt.Errorf("outbound: socks5 %v: its relay of datagrams is reached by UDP, which the way to it does not carry: %w",
			s.Server, errors.ErrUnsupported)
	}
	// Where the datagrams will come from is not known before they are sent, so it is not announced.
	control, bound, err := s.request(ctx, socks5.UDPAssociate, proxy.UDP("0.0.0.0", 0))
	if err != nil {
		return nil, err
	}
	bound = s.reachable(bound, control)
	to := proxy.UDP(bound.Host, bound.Port)
	packets, err := via.DialPackets(ctx, to)
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("outbound: socks5 %v: its relay %v: %w", s.Server, to, err)
	}
	c := &socks5Packets{PacketConn: packets, proxy: s.Server, relay: to.Endpoint(), control: control, ended: make(chan struct{})}
	go c.watch()
	return c, nil
}

// socks5Packets puts datagrams into those that go to a proxy's relay, and takes them out.
type socks5Packets struct {
	relay.PacketConn // to the relay
	proxy            proxy.Addr
	relay            relay.Endpoint
	control          net.Conn
	lost             atomic.Bool   // the proxy has ended the association
	ended            chan struct{} // watch has
	out              relay.Packet  // of WritePacket alone
}

// watch ends the conn when the proxy ends the association.
func (c *socks5Packets) watch() {
	defer close(c.ended)
	io.Copy(io.Discard, c.control)
	c.lost.Store(true)
	c.PacketConn.Close()
}

// Close implements relay.PacketConn.
func (c *socks5Packets) Close() error {
	err := c.PacketConn.Close()
	c.control.Close()
	<-c.ended
	return err
}

// ReadPacket implements relay.PacketConn. What does not come from the relay, or is malformed, is dropped.
func (c *socks5Packets) ReadPacket(p *relay.Packet) error {
	for {
		if err := c.PacketConn.ReadPacket(p); err != nil {
			return c.readError(err)
		}
		from, data, err := socks5.ParseDatagram(p.Data)
		if err == nil && c.isRelay(p.Endpoint) {
			p.Endpoint, p.Data = relay.Endpoint(from), data
			return nil
		}
		p.Free()
	}
}

// isRelay says whether e is the relay. Where that has a name, which somebody else resolves, any address may be its, but no other port.
func (c *socks5Packets) isRelay(e relay.Endpoint) bool {
	return e.SamePlace(c.relay) || !c.relay.IP.IsValid() && e.Port == c.relay.Port
}

func (c *socks5Packets) readError(err error) error {
	unreachable, ok := errors.AsType[*relay.UnreachableError](err)
	switch {
	case c.lost.Load():
		return fmt.Errorf("outbound: socks5 %v: the proxy has ended the association: %w", c.proxy, io.ErrUnexpectedEOF)
	case ok && errors.Is(err, syscall.ECONNREFUSED): // it will not come back
		return fmt.Errorf("outbound: socks5 %v: its relay %v: %w", c.proxy, c.relay, unreachable.Err)
	case ok:
		return &relay.UnreachableError{Err: unreachable.Err} // to all that is behind it
	}
	return err
}

// WritePacket implements relay.PacketConn. A datagram that is too long with its header is the kernel's to refuse.
func (c *socks5Packets) WritePacket(p *relay.Packet) (err error) {
	defer c.out.Free()
	const longest = 1 << 16
	c.out.Grow(min(socks5.MaxDatagramHeader+len(p.Data), longest))
	c.out.Endpoint = c.relay
	if c.out.Data, err = socks5.AppendDatagram(c.out.Data[:0], socks5.Place(p.Endpoint), p.Data); err != nil {
		return fmt.Errorf("outbound: socks5 %v: %w", c.proxy, err)
	}
	return c.PacketConn.WritePacket(&c.out)
}
