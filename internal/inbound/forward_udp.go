package inbound

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// listenPackets is Listen for datagrams.
func (f *Forward) listenPackets(ctx context.Context) error {
	switch {
	case f.s != nil:
		return errors.New("inbound: Listen was called twice")
	case f.AcceptProxy || f.SendProxy > 0:
		return errors.New("inbound: forward: datagrams carry no PROXY header")
	}
	conn, err := bindUDP(ctx, f.Addr, sockopt.PacketInfo)
	if err != nil {
		return err
	}
	bound := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	isIPv6 := !bound.Addr().Is4() && !bound.Addr().Is4In6()
	to := f.To.Endpoint()
	d := newDemux(&f.Listener, conn)
	d.dst = func(netip.AddrPort) relay.Endpoint { return to }
	d.local = func(oob []byte) netip.AddrPort {
		ip := sockopt.PacketInfoOf(oob)
		if !ip.IsValid() {
			ip = bound.Addr()
		}
		return netip.AddrPortFrom(ip.Unmap(), bound.Port())
	}
	d.perLocal = true
	d.answer = func(client, local netip.AddrPort) answerer {
		a := &forwardAnswerer{conn: conn, client: client, local: local, from: to}
		if ip := local.Addr(); bound.Addr().IsUnspecified() && !ip.IsUnspecified() && !ip.IsMulticast() {
			a.oob = sockopt.AppendPacketInfo(nil, ip, isIPv6)
		}
		return a
	}
	f.packets = d
	f.listenOn(d)
	return nil
}

// forwardAnswerer sends to one client of a forward, from the address that the client knows.
type forwardAnswerer struct {
	conn          *net.UDPConn
	client, local netip.AddrPort
	oob           []byte         // to send from that address; nil: the socket has no other
	from          relay.Endpoint // whose datagrams the client waits for
	segments      relay.Segmenter
}

// WritePacket implements answerer. The client cannot see where a datagram comes from, so those of strangers are dropped: by
// their address, or by their port alone where the destination is a name that somebody else resolves.
func (a *forwardAnswerer) WritePacket(p *relay.Packet) error {
	if !a.isAwaited(p.Endpoint) {
		return errStranger
	}
	_, _, err := a.conn.WriteMsgUDPAddrPort(p.Data, a.oob, a.client)
	return err
}

// WritePackets implements relay.BatchWriter.
func (a *forwardAnswerer) WritePackets(ps []relay.Packet) (n int, err error) {
	n = relay.SameSegments(ps)
	if n > 1 && a.isAwaited(ps[0].Endpoint) && a.segments.WriteSegments(a.conn, ps[:n], a.client, a.oob) {
		return n, nil
	}
	if err := a.WritePacket(&ps[0]); err != nil {
		return 0, err
	}
	return 1, nil
}

func (a *forwardAnswerer) isAwaited(e relay.Endpoint) bool {
	return e.Port == a.from.Port && (!a.from.IP.IsValid() || e.SamePlace(a.from))
}

// Refuse implements relay.Refuser.
func (a *forwardAnswerer) Refuse(_ relay.Endpoint, err error) { refuseDatagram(a.client, a.local, err) }

// Close implements answerer.
func (a *forwardAnswerer) Close() error { return nil }

var errStranger = errors.New("inbound: a datagram that nobody has asked for")
