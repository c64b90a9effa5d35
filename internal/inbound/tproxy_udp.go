package inbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// listenPackets has p take datagrams at where its stream listeners are.
func (p *TProxy) listenPackets(ctx context.Context, at []netip.AddrPort) error {
	replies := &replySockets{options: append(p.options(), sockopt.ReuseAddress), open: make(map[netip.AddrPort]*replySocket)}
	for _, a := range at {
		l := p.Listener // with its settings, but another listener
		l.s, l.Addr = nil, proxy.UDP(a.Addr().String(), a.Port())
		conn, err := bindUDP(ctx, l.Addr, append(p.options(), sockopt.OriginalDsts)...)
		if err != nil {
			return err
		}
		d := newDemux(&l, conn)
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

// replySockets are sockets that have the addresses of origins, to answer as those. They are shared by all clients, and
// nothing is received by them: the packet filter hands what is for an origin to the inbound's own socket.
type replySockets struct {
	options []sockopt.Control

	mu   sync.Mutex
	open map[netip.AddrPort]*replySocket
}

type replySocket struct {
	*net.UDPConn
	origin netip.AddrPort
	users  int // guarded by replySockets.mu
}

// take returns the socket of an origin, for which release is to be called.
func (r *replySockets) take(origin netip.AddrPort) (*replySocket, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.open[origin]
	if s == nil {
		network := "udp4"
		if origin.Addr().Is6() {
			network = "udp6"
		}
		lc := net.ListenConfig{Control: sockopt.All(r.options...)}
		c, err := lc.ListenPacket(context.Background(), network, origin.String())
		if err != nil {
			return nil, fmt.Errorf("inbound: answer as %v: %w", origin, err)
		}
		s = &replySocket{UDPConn: c.(*net.UDPConn), origin: origin}
		r.open[origin] = s
	}
	s.users++
	return s, nil
}

func (r *replySockets) release(s *replySocket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(r.open, s.origin)
		s.Close()
	}
}

// replyAnswerer sends to one client as whoever a datagram comes from.
type replyAnswerer struct {
	sockets *replySockets
	client  netip.AddrPort
	taken   []*replySocket // what was used last stands last
}

// takenMost is how many origins a client hears from for whom no socket has to be made again.
const takenMost = 32

var errNoAddress = errors.New("inbound: a datagram from a name, and not from an address, cannot be passed on")

// WritePacket implements answerer.
func (a *replyAnswerer) WritePacket(p *relay.Packet) error {
	origin := p.Endpoint.AddrPort()
	if !origin.IsValid() {
		return errNoAddress
	}
	s, err := a.socket(origin)
	if err != nil {
		return err
	}
	_, err = s.WriteToUDPAddrPort(p.Data, a.client)
	return err
}

func (a *replyAnswerer) socket(origin netip.AddrPort) (*replySocket, error) {
	for i, s := range slices.Backward(a.taken) {
		if s.origin == origin {
			copy(a.taken[i:], a.taken[i+1:])
			a.taken[len(a.taken)-1] = s
			return s, nil
		}
	}
	s, err := a.sockets.take(origin)
	if err != nil {
		return nil, err
	}
	if len(a.taken) == takenMost {
		a.sockets.release(a.taken[0])
		a.taken = slices.Delete(a.taken, 0, 1)
	}
	a.taken = append(a.taken, s)
	return s, nil
}

// Refuse implements relay.Refuser.
func (a *replyAnswerer) Refuse(e relay.Endpoint, err error) {
	if to := e.AddrPort(); to.IsValid() {
		refuseDatagram(a.client, to, err)
	}
}

// Close implements answerer.
func (a *replyAnswerer) Close() error {
	for _, s := range a.taken {
		a.sockets.release(s)
	}
	a.taken = nil
	return nil
}
