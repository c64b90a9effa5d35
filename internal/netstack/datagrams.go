package netstack

import (
	"container/list"
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// datagrams makes sessions of the sources of datagrams.
type datagrams struct {
	r   *running
	max int

	mu         sync.Mutex
	sessions   map[netip.AddrPort]*session
	unanswered list.List // those of sessions that got no datagram yet, oldest first
	live       int       // handlers that run, also those of sessions that were closed
	full       episode
	dropped    atomic.Int64
	dropping   episode
}

func (d *datagrams) init(r *running, most int) {
	if most == 0 {
		most = DefaultMaxSessions
	}
	d.r, d.max, d.sessions = r, most, make(map[netip.AddrPort]*session)
}

// The bounds of what waits for a session to read it: datagrams, and the memory that holds them.
const (
	queueMax      = 2048
	queueBytesMax = 4 << 20
)

// handle takes a datagram, whole and reassembled.
func (d *datagrams) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	client, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	if !isWay(client, dst) {
		return true
	}
	size, segment := pkt.Data().Size(), int(pkt.GSOOptions.MSS)
	if segment == 0 {
		if !isValidUDP(id, pkt) {
			return true
		}
		size = int(header.UDP(pkt.TransportHeader().Slice()).Length()) - header.UDPMinimumSize
		segment = max(size, 1)
	}
	s := d.session(client, dst)
	if s == nil {
		return true
	}
	for first := true; first || size > 0; first = false {
		n := min(segment, size)
		s.put(dst, pkt, n)
		size -= n
	}
	return true
}

// isValidUDP checks a datagram's length and sum.
func isValidUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	length, sum := header.UDPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()),
		pkt.NetworkProtocolNumber, id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
	return length && sum
}

// session returns the session of a client, which begins with its first datagram; nil if there can be none.
func (d *datagrams) session(client, dst netip.AddrPort) *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.sessions[client]; s != nil {
		return s
	}
	if d.live >= d.max {
		d.evict()
		if d.full.begins() {
			d.r.warn("datagrams dropped: as many sources as max-sessions allows", "max-sessions", d.max)
		}
		return nil
	}
	if !d.r.begins() {
		return nil
	}
	s := &session{d: d, client: client, ready: make(chan struct{}, 1), start: time.Now()}
	s.ctx, s.cancel = context.WithCancelCause(d.r.ctx)
	s.place = d.unanswered.PushBack(s)
	d.sessions[client] = s
	d.live++
	go s.serve(dst)
	return s
}

// answerWait is how long a source that nobody has answered keeps its place where there are no more.
const answerWait = time.Second

// errEvicted is why a session ended that nobody had answered.
var errEvicted = fmt.Errorf("netstack: never answered, and its place was needed: %w", net.ErrClosed)

// evict ends the oldest session that was never answered, and whose source may be nobody, for the next that asks: the
// handler needs a moment to end. The caller has d.mu.
func (d *datagrams) evict() {
	first := d.unanswered.Front()
	if first == nil || d.live > len(d.sessions) {
		return
	}
	if s := first.Value.(*session); time.Since(s.start) >= answerWait {
		s.cancel(errEvicted)
		d.remove(s)
		s.close()
	}
}

// remove takes s out: the next datagram of its client begins another session. The caller has d.mu.
func (d *datagrams) remove(s *session) {
	if d.sessions[s.client] == s {
		delete(d.sessions, s.client)
	}
	d.unanswered.Remove(s.place)
}

// session is the datagrams of one client, which it sends from one port. It is the client's end of a relay.
type session struct {
	d      *datagrams
	client netip.AddrPort
	ready  chan struct{} // has a value when there may be a datagram

	ctx      context.Context // of the handler
	cancel   context.CancelCauseFunc
	start    time.Time
	place    *list.Element // among the unanswered; not there any more once answered or closed
	answered atomic.Bool

	mu     sync.Mutex
	queue  proxy.PacketQueue
	closed bool
}

var (
	_ relay.PacketConn = (*session)(nil)
	_ relay.Refuser    = (*session)(nil)
)

func (s *session) serve(dst netip.AddrPort) {
	defer s.d.r.sessions.Done()
	defer s.ended()
	defer s.recovered()
	s.d.r.handler.HandlePackets(s.ctx, proxy.Flow{
		Inbound: s.d.r.settings.Name, Client: s.client, Local: dst, Dst: proxy.UDP(dst.Addr().String(), dst.Port()),
	}, s)
}

// recovered makes a panic of the handler's cost this session only.
func (s *session) recovered() {
	if v := recover(); v != nil {
		s.d.r.log.Error("panic while serving a client", "client", s.client, "panic", v, "stack", string(debug.Stack()))
	}
	s.Close()
}

// ended gives the session's place free.
func (s *session) ended() {
	s.cancel(nil)
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.d.live--
}

// take takes a datagram that did not come by the stack.
func (d *datagrams) take(client, dst netip.AddrPort, data []byte) {
	s := d.session(client, dst)
	if s == nil {
		return
	}
	p := relay.Packet{Endpoint: relay.EndpointOf(dst)}
	copy(p.Grow(len(data)), data)
	s.queueOrDrop(p)
}

// put queues a datagram to dst, which is the next n bytes of pkt, or drops it.
func (s *session) put(dst netip.AddrPort, pkt *stack.PacketBuffer, n int) {
	p := relay.Packet{Endpoint: relay.EndpointOf(dst)}
	w := tcpip.SliceWriter(p.Grow(n))
	pkt.Data().ReadTo(&w, false)
	s.queueOrDrop(p)
}

func (s *session) queueOrDrop(p relay.Packet) {
	waiting, ok := s.enqueue(p)
	if !ok {
		p.Free()
		s.d.drop()
	}
	if waiting%yieldAt == yieldAt-1 {
		runtime.Gosched() // a burst must not fill the queue before its session had a chance
	}
}

// yieldAt is after how many datagrams that wait the reader lets others run.
const yieldAt = 128

// enqueue returns how many datagrams wait, and whether p is one of them.
func (s *session) enqueue(p relay.Packet) (waiting int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.queue.Len() >= queueMax || s.queue.Memory()+relay.PacketMemory(len(p.Data)) > queueBytesMax {
		return s.queue.Len(), false
	}
	s.queue.Push(p)
	select {
	case s.ready <- struct{}{}:
	default:
	}
	return s.queue.Len(), true
}

// drop counts a datagram that its session had no room for.
func (d *datagrams) drop() {
	d.dropped.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dropping.begins() {
		d.r.warn("datagrams dropped: their sessions do not keep up", "dropped", d.dropped.Load())
	}
}

// ReadPacket implements relay.PacketConn.
func (s *session) ReadPacket(p *relay.Packet) error {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return net.ErrClosed
		}
		if s.queue.Len() > 0 {
			p.Free()
			*p = s.queue.Pop()
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		<-s.ready
	}
}

// WritePacket implements relay.PacketConn: the client gets the datagram as one from p.Endpoint.
func (s *session) WritePacket(p *relay.Packet) error {
	from := p.Endpoint.AddrPort()
	if from.Addr().Is4() != s.client.Addr().Is4() || !from.IsValid() {
		return &net.OpError{Op: "write", Net: "udp", Err: syscall.EAFNOSUPPORT}
	}
	if len(p.Data) > datagramMax(from) {
		return &net.OpError{Op: "write", Net: "udp", Err: syscall.EMSGSIZE}
	}
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	if !s.answered.Load() {
		s.hasAnswer()
	}
	return s.d.r.sendUDP(from, s.client, p.Data)
}

// hasAnswer is called when the client is sent something.
func (s *session) hasAnswer() {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.answered.Store(true)
	s.d.unanswered.Remove(s.place)
}

// Refuse implements relay.Refuser.
func (s *session) Refuse(e relay.Endpoint, err error) {
	from := e.AddrPort()
	if !from.IsValid() || from.Addr().Is4() != s.client.Addr().Is4() {
		return
	}
	s.d.r.refuseUDP(from, s.client, proxy.ReasonOf(err))
}

// Close implements relay.PacketConn.
func (s *session) Close() error {
	s.d.mu.Lock()
	s.d.remove(s)
	s.d.mu.Unlock()
	s.close()
	return nil
}

func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.queue.Clear()
	select {
	case s.ready <- struct{}{}:
	default:
	}
}
