package inbound

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

// associate serves UDP ASSOCIATE, RFC 1928 section 7: it opens a socket for the client's datagrams, tells the client where, and
// hands the association over with its first datagram, which says where to. The association ends with the client's
// conn, and the conn with the association. One socket has one client here, so the socket's own queue is the session's.
func associate(ctx context.Context, h proxy.Handler, p *socks5Pending, req socks5.Request) {
	a, err := newAssociation(ctx, p.client, req)
	if err == nil {
		err = p.reply(socks5.Succeeded, net.UDPAddrFromAddrPort(a.udp.LocalAddr()))
	} else {
		p.reply(socks5Reply(proxy.ReasonOf(err)), nil)
	}
	if err != nil {
		if a != nil {
			a.udp.Close()
		}
		p.fail(err)
		return
	}
	defer p.Done()
	p.SetDeadline(time.Now().Add(relay.DefaultPacketIdle)) // for the first datagram
	watching := make(chan struct{})
	go a.watch(p.bare, watching)
	defer func() { <-watching }()
	defer a.Close()
	defer context.AfterFunc(ctx, func() { a.Close() })()
	a.serve(ctx, h, req.User)
}

// association is the relay.PacketConn of a client that has asked for UDP ASSOCIATE.
type association struct {
	client *client
	udp    *relay.UDPConn
	ip     netip.Addr     // whose datagrams are taken
	peer   relay.Endpoint // the same with its port, once that is known
	first  relay.Packet   // the one that came before the handler, with Data until it is read
	out    relay.Packet   // of WritePacket alone

	dropped atomic.Int64 // fragments and what is malformed, of the client
}

var (
	_ relay.PacketConn = (*association)(nil)
	_ relay.Dropper    = (*association)(nil)
)

// newAssociation opens a socket at the address that the client has connected to, which it can reach.
func newAssociation(ctx context.Context, c *client, req socks5.Request) (*association, error) {
	ours, theirs := addrPort(c.bare.LocalAddr()).Addr(), c.peer.Addr()
	if !ours.IsValid() { // a Unix socket: the client is on this machine
		ours = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if !theirs.IsValid() {
		theirs = ours
	}
	conn, err := bindUDP(ctx, proxy.UDP(ours.String(), 0))
	if err != nil {
		return nil, fmt.Errorf("inbound: socks5: a socket for datagrams: %w", err)
	}
	a := &association{client: c, udp: relay.NewUDPConn(conn), ip: theirs.WithZone("")}
	if req.Addr.Port != 0 { // announced
		a.peer = relay.Endpoint{IP: theirs, Port: req.Addr.Port}
	}
	return a, nil
}

// watch ends the association with the client's conn, which nothing is to come by any more. It ends when the conn is closed.
func (a *association) watch(conn net.Conn, done chan<- struct{}) {
	defer close(done)
	io.Copy(io.Discard, conn)
	a.Close()
}

// serve waits for the first datagram and hands over.
func (a *association) serve(ctx context.Context, h proxy.Handler, user string) {
	defer func() { a.first.Free() }()
	var p relay.Packet
	if a.ReadPacket(&p) != nil || a.client.handshook() != nil {
		p.Free()
		return // gone without a datagram; or we stop
	}
	a.first = p
	f := a.client.flow(proxy.UDP(p.Endpoint.Host(), p.Endpoint.Port), user)
	h.HandlePackets(ctx, f, a)
}

// ReadPacket implements relay.PacketConn. Datagrams of others than the client are dropped, and so are fragments.
func (a *association) ReadPacket(p *relay.Packet) error {
	if a.first.Data != nil {
		*p, a.first = a.first, relay.Packet{}
		return nil
	}
	for {
		err := a.udp.ReadPacket(p)
		if err != nil {
			return err
		}
		if from := p.Endpoint; a.isClient(from) {
			to, data, err := socks5.ParseDatagram(p.Data)
			if err == nil {
				if a.peer != from { // only the first: there is no writer yet
					a.peer = from
				}
				p.Endpoint, p.Data = relay.Endpoint(to), data
				return nil
			}
			a.dropped.Add(1)
		}
		p.Free()
	}
}

// Dropped implements relay.Dropper.
func (a *association) Dropped() int64 { return a.dropped.Load() }

// isClient says whether a datagram from e is the client's.
func (a *association) isClient(e relay.Endpoint) bool {
	return e.IP.WithZone("") == a.ip && (a.peer.Port == 0 || a.peer.Port == e.Port)
}

// WritePacket implements relay.PacketConn. It is not called before the first datagram was read.
func (a *association) WritePacket(p *relay.Packet) (err error) {
	defer a.out.Free()
	const longest = 1 << 16 // with its header it may be longer than a datagram can be: that is the kernel's to refuse
	a.out.Grow(min(socks5.MaxDatagramHeader+len(p.Data), longest))
	a.out.Endpoint = a.peer
	if a.out.Data, err = socks5.AppendDatagram(a.out.Data[:0], socks5.Place(p.Endpoint), p.Data); err != nil {
		return fmt.Errorf("inbound: %w", err)
	}
	return a.udp.WritePacket(&a.out)
}

// Close implements relay.PacketConn. It closes the client's conn, too.
func (a *association) Close() error {
	a.client.Close()
	return a.udp.Close()
}
