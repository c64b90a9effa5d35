package dns

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// lane is the datagrams between a client and one name, or between it and all the addresses that are none's. It is
// the PacketConn of the client that Next gets, and translates: there the name has no address.
type lane struct {
	s    *session
	flow proxy.Flow
	fake netip.Addr // the zero Addr for the lane of true addresses
	name *entry     // held

	queue chan relay.Packet // what the session hands out
	over  chan struct{}
	once  sync.Once

	first   bool         // of the session
	dropped atomic.Int64 // by the queue

	mu    sync.Mutex
	ports map[uint16]bool // of the name, that the client has sent to
}

var (
	errLanes = errors.New("dns: the client sends to too many names at a time")

	_ relay.PacketConn = (*lane)(nil)
	_ relay.Refuser    = (*lane)(nil)
)

// lane returns the lane of datagrams to e. A new one, but for a session's first, gets its goroutine.
func (s *session) lane(e relay.Endpoint) (*lane, error) {
	key := s.key(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch l := s.lanes[key]; {
	case l != nil:
		return l, nil
	case s.over:
		return nil, net.ErrClosed
	case len(s.lanes) >= lanesMax:
		return nil, errLanes
	}
	l := &lane{s: s, flow: s.flow, fake: key, over: make(chan struct{})}
	l.flow.Dst = proxy.UDP(e.Host(), e.Port)
	if s.flow.Local == s.flow.Dst.Endpoint().AddrPort() { // an inbound that takes what is for others
		l.flow.Local = e.AddrPort()
	}
	if key.IsValid() {
		var ok bool
		if l.name, ok = s.h.names.hold(key); !ok {
			return nil, errUnknown
		}
		l.flow.Dst.Host = l.name.name
		l.ports = make(map[uint16]bool)
	}
	s.lanes[key] = l
	l.first = !s.pumping
	if s.pumping {
		l.queue = make(chan relay.Packet, laneQueue)
		s.all.Go(func() { defer s.h.recovered(); l.run() })
	}
	return l, nil
}

// key returns what the lane of e is known by.
func (s *session) key(e relay.Endpoint) netip.Addr {
	if s.h.Mode == Fake && isFake(e.IP) {
		return e.IP
	}
	return netip.Addr{}
}

// run has Next carry the lane, and returns when that is over.
func (l *lane) run() {
	defer l.leave()
	l.s.h.Next.HandlePackets(l.s.ctx, l.flow, l)
}

// leave takes the lane out of its session, which ends with the last.
func (l *lane) leave() {
	s := l.s
	l.stop()
	s.mu.Lock()
	if s.lanes[l.fake] == l {
		delete(s.lanes, l.fake)
	}
	s.mu.Unlock()
	for l.queue != nil {
		select {
		case p := <-l.queue:
			p.Free()
			continue
		default:
		}
		break
	}
	if l.name != nil {
		s.h.names.release(l.name)
	}
	s.closeIfDone()
}

func (l *lane) stop() { l.once.Do(func() { close(l.over) }) }

// put queues p, which is dropped where the queue is full, and takes its memory.
func (l *lane) put(p *relay.Packet) {
	select {
	case l.queue <- *p:
		*p = relay.Packet{}
	default:
		l.dropped.Add(1)
	}
}

// Dropped returns how many datagrams there was no room for. What the client's conn has dropped counts for the first
// lane.
func (l *lane) Dropped() int64 {
	n := l.dropped.Load()
	if d, ok := l.s.conn.(interface{ Dropped() int64 }); ok && l.first {
		n += d.Dropped()
	}
	return n
}

// ReadPacket implements relay.PacketConn: the client's next datagram for the lane, as to the name.
func (l *lane) ReadPacket(p *relay.Packet) error {
	for l.queue == nil { // the lane is alone
		if err := l.s.conn.ReadPacket(p); err != nil {
			return err
		}
		if l.owns(p.Endpoint) {
			l.toName(p)
			return nil
		}
		if !l.share() {
			return net.ErrClosed
		}
		l.s.dispatch(p)
		l.s.all.Go(func() { defer l.s.h.recovered(); l.s.pump() })
	}
	select {
	case <-l.over:
		return net.ErrClosed
	case next := <-l.queue:
		p.Free()
		*p = next
		l.toName(p)
		return nil
	}
}

// owns says whether datagrams to e are the lane's.
func (l *lane) owns(e relay.Endpoint) bool { return !isQuestion(e) && l.s.key(e) == l.fake }

// share prepares the session for more than this lane. It returns false where the lane is closed.
func (l *lane) share() bool {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	select {
	case <-l.over:
		return false
	default:
	}
	l.queue = make(chan relay.Packet, laneQueue)
	l.s.pumping = true
	return true
}

// Close implements relay.PacketConn. A lane that is alone closes the client's conn, since it may wait for a datagram.
func (l *lane) Close() error {
	l.stop()
	l.s.mu.Lock()
	alone := !l.s.pumping
	l.s.mu.Unlock()
	if alone {
		l.s.close()
	}
	return nil
}

// toName makes p one that is for the name.
func (l *lane) toName(p *relay.Packet) {
	if l.name == nil {
		return
	}
	l.mu.Lock()
	l.ports[p.Endpoint.Port] = true
	l.mu.Unlock()
	p.Endpoint = relay.Endpoint{Name: l.name.name, Port: p.Endpoint.Port}
}

// fromFake returns where a datagram from e, or a refusal of e, is to come from for the client. The name's own address
// is whatever has a port that the client has sent to: the way out says an address, which may differ each time.
func (l *lane) fromFake(e relay.Endpoint) relay.Endpoint {
	if l.name == nil {
		return e
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Name != "" || l.ports[e.Port] {
		return relay.Endpoint{IP: l.fake, Port: e.Port}
	}
	return e
}

// WritePacket implements relay.PacketConn: p goes to the client, as from the address that the client knows.
func (l *lane) WritePacket(p *relay.Packet) error {
	from := p.Endpoint
	p.Endpoint = l.fromFake(from)
	err := l.s.write(p)
	p.Endpoint = from
	return err
}

// Refuse implements relay.Refuser.
func (l *lane) Refuse(e relay.Endpoint, err error) { refuse(l.s.conn, l.fromFake(e), err) }
