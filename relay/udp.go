package relay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
)

// UDPConn is a [PacketConn] over a UDP socket. An unconnected socket exchanges datagrams with any place; a connected one
// only with its peer, whatever the packets' endpoints say.
//
// On Linux it holds no memory for a datagram while it waits for one, and an ICMP error about a datagram of its own comes
// back from ReadPacket, as an [*UnreachableError] that names the place.
type UDPConn struct {
	conn   *net.UDPConn
	peer   Endpoint // of a connected socket
	failed atomic.Bool
	reader udpReader

	segments Segmenter // of the writer alone
}

var (
	_ PacketConn  = (*UDPConn)(nil)
	_ BatchReader = (*UDPConn)(nil)
	_ BatchWriter = (*UDPConn)(nil)
)

// NewUDPConn returns a PacketConn over c, which it closes, and which nobody else may read any more.
func NewUDPConn(c *net.UDPConn) *UDPConn {
	u := &UDPConn{conn: c}
	if peer, ok := c.RemoteAddr().(*net.UDPAddr); ok && peer != nil {
		u.peer = EndpointOf(peer.AddrPort())
	}
	u.reader.init(u)
	return u
}

// LocalAddr returns the address that the socket is bound to.
func (c *UDPConn) LocalAddr() netip.AddrPort {
	a, _ := c.conn.LocalAddr().(*net.UDPAddr)
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Close implements PacketConn.
func (c *UDPConn) Close() error { return c.conn.Close() }

// WritePacket implements PacketConn. A name as the endpoint is [errors.ErrUnsupported]: it is for who knows how to resolve it.
func (c *UDPConn) WritePacket(p *Packet) error {
	if c.peer.Port == 0 && !p.Endpoint.IP.IsValid() {
		return fmt.Errorf("relay: datagram to %v: the name is not resolved: %w", p.Endpoint, errors.ErrUnsupported)
	}
	err := c.send(p)
	for tries := 0; err != nil && (tries == 0 || tries < heardMost && isUnreachable(err)); tries++ {
		if errors.Is(err, net.ErrClosed) {
			break
		}
		// It may be about a datagram before this one: the kernel tells the next call of what it hears, and of the next thing
		// that it has heard when the reader takes one out of its queue.
		c.failed.Store(true)
		err = c.send(p)
	}
	if _, ok := errors.AsType[*net.AddrError](err); ok {
		err = fmt.Errorf("relay: datagram to %v: no such address from here: %w", p.Endpoint, syscall.EAFNOSUPPORT)
	}
	return err
}

// heardMost is how many errors of others a write may be told of before one is taken for its own.
const heardMost = 16

// isUnreachable says whether err can be what an ICMP message has said.
func isUnreachable(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH)
}

func (c *UDPConn) send(p *Packet) (err error) {
	if c.peer.Port != 0 {
		_, err = c.conn.Write(p.Data)
	} else {
		_, err = c.conn.WriteToUDPAddrPort(p.Data, p.Endpoint.AddrPort())
	}
	return err
}

// WritePackets implements BatchWriter.
func (c *UDPConn) WritePackets(ps []Packet) (n int, err error) {
	if c.peer.Port == 0 {
		if n = c.sendBatch(ps); n > 0 {
			return n, nil
		}
	}
	if err := c.WritePacket(&ps[0]); err != nil {
		return 0, err
	}
	return 1, nil
}

// sendBatch sends the first of ps at once, where that can be; it returns how many.
func (c *UDPConn) sendBatch(ps []Packet) int {
	n := SameSegments(ps)
	if n < 2 || !ps[0].Endpoint.IP.IsValid() {
		return 0
	}
	if !c.segments.WriteSegments(c.conn, ps[:n], ps[0].Endpoint.AddrPort(), nil) {
		c.failed.Store(true) // it may have taken an error, as WritePacket may
		return 0
	}
	return n
}
