//go:build !linux

package relay

import (
	"errors"
	"syscall"
)

type udpReader struct{}

func (*udpReader) init(*UDPConn) {}

// ReadPacket implements PacketConn.
func (c *UDPConn) ReadPacket(p *Packet) error {
	b := p.Grow(packetLarge)
	n, from, err := c.conn.ReadFromUDPAddrPort(b)
	if err != nil {
		p.Free()
		if errors.Is(err, syscall.ECONNREFUSED) {
			err = &UnreachableError{To: c.peer, Err: err}
		}
		return err
	}
	p.Data, p.Endpoint = b[:n], EndpointOf(from)
	return nil
}

// ReadMore implements BatchReader: there is never more.
func (c *UDPConn) ReadMore([]Packet) int { return 0 }
