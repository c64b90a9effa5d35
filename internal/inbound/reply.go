package inbound

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// The bounds on reply sockets. Beyond them, that which was used longest ago is closed; it is made again when it is needed.
const (
	replySocketsMost = 4096 // of an inbound
	takenMost        = 32   // that one session keeps
)

// replySockets are sockets that have the addresses of origins, to answer as those. They are shared by all clients, and
// nothing is received by them: the packet filter hands what is for an origin to the inbound's own socket.
//
// An origin is whoever the way out says that a datagram comes from. So it may not be an address of this machine, whose own datagrams
// such a socket would take away.
type replySockets struct {
	options []sockopt.Control
	most    int                   // 0: replySocketsMost
	isOwn   func(netip.Addr) bool // says whether an address is this machine's

	mu   sync.Mutex
	open map[netip.AddrPort]*replySocket
	all  list.List // of *replySocket: those in open, as they are to be looked at when one has to go
}

type replySocket struct {
	*net.UDPConn
	origin netip.AddrPort
	place  *list.Element
	used   atomic.Bool // since it was last looked at
	users  int         // guarded by replySockets.mu
}

func newReplySockets(options []sockopt.Control) *replySockets {
	return &replySockets{options: options, isOwn: isOfThisMachine, open: make(map[netip.AddrPort]*replySocket)}
}

// errNotAnOrigin is of a datagram that no other machine can have sent.
var errNotAnOrigin = errors.New("not the address of another machine")

// take returns the socket of an origin, for which release is to be called.
func (r *replySockets) take(origin netip.AddrPort) (*replySocket, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.open[origin]
	if s == nil {
		var err error
		if s, err = r.bind(origin); err != nil {
			return nil, fmt.Errorf("inbound: answer as %v: %w", origin, err)
		}
		r.makeRoom()
		r.open[origin], s.place = s, r.all.PushBack(s)
	}
	s.users++
	return s, nil
}

func (r *replySockets) bind(origin netip.AddrPort) (*replySocket, error) {
	ip := origin.Addr()
	if !proxy.IsHost(origin) || r.isOwn(ip) {
		return nil, errNotAnOrigin
	}
	network := "udp4"
	if ip.Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: sockopt.All(r.options...)}
	c, err := lc.ListenPacket(context.Background(), network, origin.String())
	if err != nil {
		return nil, err
	}
	return &replySocket{UDPConn: c.(*net.UDPConn), origin: origin}, nil
}

// makeRoom closes a socket if there are as many as there may be: one that was not used since it was last looked at.
func (r *replySockets) makeRoom() {
	most := r.most
	if most == 0 {
		most = replySocketsMost
	}
	if len(r.open) < most {
		return
	}
	for range len(r.open) {
		s := r.all.Front().Value.(*replySocket)
		if !s.used.Swap(false) {
			break
		}
		r.all.MoveToBack(s.place)
	}
	r.drop(r.all.Front().Value.(*replySocket))
}

// drop closes s. Those who have it see net.ErrClosed, and take another.
func (r *replySockets) drop(s *replySocket) {
	delete(r.open, s.origin)
	r.all.Remove(s.place)
	s.place = nil
	s.Close()
}

func (r *replySockets) release(s *replySocket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.users--; s.users == 0 && s.place != nil {
		r.drop(s)
	}
}

// replyAnswerer sends to one client as whoever a datagram comes from.
type replyAnswerer struct {
	sockets *replySockets
	client  netip.AddrPort
	taken   []*replySocket // what was used last stands last
}

var errNoAddress = errors.New("inbound: a datagram from a name, and not from an address, cannot be passed on")

// WritePacket implements answerer. What does not come from another machine is refused.
func (a *replyAnswerer) WritePacket(p *relay.Packet) error {
	origin := p.Endpoint.AddrPort()
	if !origin.IsValid() {
		return errNoAddress
	}
	const tries = 3 // a socket may be closed for another before it is used
	var err error
	for range tries {
		s, takeErr := a.socket(origin)
		if takeErr != nil {
			return takeErr
		}
		s.used.Store(true)
		if _, err = s.WriteToUDPAddrPort(p.Data, a.client); !errors.Is(err, net.ErrClosed) {
			return err
		}
		a.forget(s)
	}
	return fmt.Errorf("inbound: answer as %v: too many origins at a time (%v)", origin, err) // and the session is not closed
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
		a.forget(a.taken[0])
	}
	a.taken = append(a.taken, s)
	return s, nil
}

// forget gives back one of those taken.
func (a *replyAnswerer) forget(s *replySocket) {
	a.sockets.release(s)
	i := slices.Index(a.taken, s)
	a.taken = slices.Delete(a.taken, i, i+1)
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
