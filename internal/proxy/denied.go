package proxy

import "github.com/sluice-proxy/sluice/relay"

// A Denier is a Dialer that reaches nothing: it is where rules send what must not get out.
type Denier interface {
	Dialer
	// Denied returns why dst cannot be reached.
	Denied(dst Addr) error
}

// permitted is the origins' end of a session of datagrams whose router has rules. The way out was chosen by the first datagram;
// those for places that the rules send to a [Denier] do not take it.
type permitted struct {
	relay.PacketConn
	router Router
	flow   Flow
	known  map[relay.Endpoint]error // of WritePacket and WritePackets alone
}

// placesKnown bounds what is kept of one session.
const placesKnown = 256

var (
	_ relay.BatchReader = (*permitted)(nil)
	_ relay.BatchWriter = (*permitted)(nil)
	_ relay.Dropper     = (*permitted)(nil)
)

// permit returns c, or c with the rules in front. The first datagram is permitted.
func permit(c relay.PacketConn, router Router, f Flow) relay.PacketConn {
	if _, fixed := router.(Static); fixed {
		return c
	}
	return &permitted{c, router, f, map[relay.Endpoint]error{f.Dst.Endpoint(): nil}}
}

func (c *permitted) denied(e relay.Endpoint) error {
	if err, ok := c.known[e]; ok {
		return err
	}
	f := c.flow
	f.Dst = UDP(e.Host(), e.Port)
	var err error
	if _, d := c.router.Route(f); d != nil {
		if d, ok := d.(Denier); ok {
			err = d.Denied(f.Dst)
		}
	}
	if len(c.known) >= placesKnown {
		clear(c.known)
	}
	c.known[e] = err
	return err
}

// WritePacket implements relay.PacketConn.
func (c *permitted) WritePacket(p *relay.Packet) error {
	if err := c.denied(p.Endpoint); err != nil {
		return err
	}
	return c.PacketConn.WritePacket(p)
}

// WritePackets implements relay.BatchWriter.
func (c *permitted) WritePackets(ps []relay.Packet) (n int, err error) {
	for n < len(ps) && err == nil {
		if err = c.denied(ps[n].Endpoint); err == nil {
			n++
		}
	}
	if n == 0 {
		return 0, err
	}
	if w, ok := c.PacketConn.(relay.BatchWriter); ok {
		return w.WritePackets(ps[:n])
	}
	if err := c.PacketConn.WritePacket(&ps[0]); err != nil {
		return 0, err
	}
	return 1, nil
}

// ReadMore implements relay.BatchReader.
func (c *permitted) ReadMore(ps []relay.Packet) int {
	if r, ok := c.PacketConn.(relay.BatchReader); ok {
		return r.ReadMore(ps)
	}
	return 0
}

// Dropped implements relay.Dropper.
func (c *permitted) Dropped() int64 {
	if d, ok := c.PacketConn.(relay.Dropper); ok {
		return d.Dropped()
	}
	return 0
}
