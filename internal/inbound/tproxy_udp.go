package inbound

import (
	"context"
	"net/netip"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// listenPackets has p take datagrams at where its stream listeners are.
func (p *TProxy) listenPackets(ctx context.Context, at []netip.AddrPort) error {
	replies := newReplySockets(append(p.options(), sockopt.ReuseAddress))
	for _, a := range at {
		l := p.Listener // with its settings, but another listener
		l.s, l.Addr = nil, proxy.UDP(a.Addr().String(), a.Port())
		conn, err := bindUDP(ctx, l.Addr, append(p.options(), sockopt.OriginalDsts)...)
		if err != nil {
			return err
		}
		d := newDemux(&l, conn)
		if len(p.t.packets) > 0 && p.MaxConns > 0 {
			d.pool = p.t.packets[0].pool
		}
		d.local = sockopt.OriginalDstOf
		d.dst = p.t.packetDst
		d.answer = func(client, _ netip.AddrPort) answerer { return &replyAnswerer{sockets: replies, client: client} }
		l.listenOn(d)
		p.t.packets = append(p.t.packets, d)
	}
	return nil
}

// packetDst returns where a datagram is to go that a rule has brought here; nowhere if it was for this inbound.
func (t *transparent) packetDst(local netip.AddrPort) relay.Endpoint {
	if !local.IsValid() || t.isOwn(local) {
		return relay.Endpoint{}
	}
	return relay.EndpointOf(local)
}
