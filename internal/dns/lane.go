package dns

import (
	"errors"
	"net"
	"net/netip"
	"sync"

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

	first bool // of the session
	alone bool // it reads the client's conn itself; for who reads the lane

	mu      sync.Mutex
	ports   map[uint16]bool // of the name, that the client has sent to
	ready   sync.Cond       // something is in the queue, or over
	queue   packetQueue     // what the session has handed out
	dropped int64           // by the queue
	over    bool
}

var (
	errLanes = errors.New("dns: clients send to too many names at a time")

	_ relay.PacketConn = (*lane)(nil)
	_ relay.Refuser    = (*lane)(nil)
	_ relay.Dropper    = (*lane)(nil)

	_ relay.BatchReader = (*lane)(nil)
	_ relay.BatchWriter = (*lane)(nil)
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
	case !s.takeLane():
		return nil, errLanes
	}
	l := &lane{s: s, flow: s.flow, fake: key}
	l.ready.L = &l.mu
	l.flow.Dst = proxy.UDP(e.Host(), e.Port)
	if s.flow.Local == s.flow.Dst.Endpoint().AddrPort() { // an inbound that takes what is for others
		l.flow.Local = e.AddrPort()
	}
	if key.IsValid() {
		var ok bool
		if l.name, ok = s.h.names.hold(key, s.flow.Client); !ok {
			s.freeLane()
			return nil, errUnknown
		}
		l.flow.Dst.Host = l.name.name
		l.ports = make(map[uint16]bool)
	}
	s.lanes[key] = l
	l.first, l.alone = !s.pumping, !s.pumping
	if s.pumping {
		s.all.Go(func() { defer s.h.recovered(); l.run() })
	}
	return l, nil
}

// takeLane returns whether there may be another lane. A session has its first in any case, as the inbound bounds how
// many sessions there are; of those beyond it may have no more than it leaves free of the Handler's. s is locked.
func (s *session) takeLane() bool {
	for s.taken > 0 {
		all := s.h.lanes.Load()
		if int64(s.taken) > min(lanesMax-1, lanesAll-all-1) {
			return false
		}
		if s.h.lanes.CompareAndSwap(all, all+1) {
			break
		}
	}
	s.taken++
	return true
}

// freeLane undoes takeLane. s is locked.
func (s *session) freeLane() {
	if s.taken--; s.taken > 0 {
		s.h.lanes.Add(-1)
	}
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
	s.freeLane()
	s.mu.Unlock()
	if l.name != nil {
		s.h.names.release(l.name)
	}
	s.closeIfDone()
}

// stop ends the lane. What waits in it is dropped.
func (l *lane) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	l.dropped += l.queue.clear(&l.s.memory)
	l.ready.Broadcast()
}

// put queues p, whose memory it takes, or drops it where there is no room.
func (l *lane) put(p *relay.Packet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || !l.queue.push(p, &l.s.memory) {
		l.dropped++
		return
	}
	l.ready.Signal()
}

// Dropped implements relay.Dropper. What the client's conn has dropped counts for the first lane.
func (l *lane) Dropped() int64 {
	l.mu.Lock()
	n := l.dropped
	l.mu.Unlock()
	if d, ok := l.s.conn.(relay.Dropper); ok && l.first {
		n += d.Dropped()
	}
	return n
}

// ReadPacket implements relay.PacketConn: the client's next datagram for the lane, as to the name.
func (l *lane) ReadPacket(p *relay.Packet) error {
	for l.alone {
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
		l.s.startPump()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.queue.Len() == 0 && !l.over {
		l.ready.Wait()
	}
	if l.over {
		return net.ErrClosed
	}
	p.Free()
	*p = l.queue.pop(&l.s.memory)
	l.toNameLocked(p)
	return nil
}

// ReadMore implements relay.BatchReader.
func (l *lane) ReadMore(ps []relay.Packet) (n int) {
	if l.alone {
		return l.readMoreAlone(ps)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for ; n < len(ps) && l.queue.Len() > 0; n++ {
		ps[n] = l.queue.pop(&l.s.memory)
		l.toNameLocked(&ps[n])
	}
	return n
}

// readMoreAlone is ReadMore of the client's conn. With the first datagram that is not the lane's, it is not alone any
// more; those behind it in ps are still its own.
func (l *lane) readMoreAlone(ps []relay.Packet) (kept int) {
	conn, ok := l.s.conn.(relay.BatchReader)
	if !ok {
		return 0
	}
	n := conn.ReadMore(ps)
	for i := range ps[:n] {
		p := &ps[i]
		if l.owns(p.Endpoint) {
			l.toName(p)
			ps[kept], *p = *p, ps[kept]
			kept++
			continue
		}
		if !l.alone || l.share() {
			l.s.dispatch(p)
		}
		p.Free()
	}
	if !l.alone {
		l.s.startPump()
	}
	return kept
}

// owns says whether datagrams to e are the lane's.
func (l *lane) owns(e relay.Endpoint) bool { return !isQuestion(e) && l.s.key(e) == l.fake }

// share prepares the session for more than this lane. It returns false where the lane is closed; then what was read
// is dropped.
func (l *lane) share() bool {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		l.dropped++
		return false
	}
	l.alone, l.s.pumping = false, true
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
	l.mu.Lock()
	defer l.mu.Unlock()
	l.toNameLocked(p)
}

func (l *lane) toNameLocked(p *relay.Packet) {
	if l.name != nil {
		if len(l.ports) >= portsMax {
			clear(l.ports)
		}
		l.ports[p.Endpoint.Port] = true
		p.Endpoint = relay.Endpoint{Name: l.name.name, Port: p.Endpoint.Port}
	}
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

// WritePackets implements relay.BatchWriter: at a time it takes those of ps that are from one place.
func (l *lane) WritePackets(ps []relay.Packet) (n int, err error) {
	conn, ok := l.s.conn.(relay.BatchWriter)
	if !ok {
		if err := l.WritePacket(&ps[0]); err != nil {
			return 0, err
		}
		return 1, nil
	}
	from := ps[0].Endpoint
	known := l.fromFake(from)
	same := 0
	for same < len(ps) && ps[same].Endpoint == from {
		ps[same].Endpoint = known
		same++
	}
	l.s.out.Lock()
	n, err = conn.WritePackets(ps[:same])
	l.s.out.Unlock()
	for i := range ps[:same] {
		ps[i].Endpoint = from
	}
	return n, err
}

// Refuse implements relay.Refuser.
func (l *lane) Refuse(e relay.Endpoint, err error) { refuse(l.s.conn, l.fromFake(e), err) }
