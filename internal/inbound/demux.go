package inbound

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// DefaultMaxDatagramSessions is how many clients a UDP listener serves at a time where MaxConns does not say.
const DefaultMaxDatagramSessions = 16384

// How many ICMP errors a demux sends, as Linux does: whoever forges sources must not have them flooded (RFC 1812 section 4.3.2.8).
const (
	icmpRate  = 1000 // a second
	icmpBurst = 50
)

// The times of a demux.
const (
	// answerWait is how long a client that nobody has answered keeps its place where there are no more.
	answerWait = time.Second
	// quietTime is how long a session must have been silent to be over once its listener was closed. Datagrams have
	// no end that could be waited for.
	quietTime = time.Second
	sweepTime = quietTime / 4
	// lostWait is how long what the kernel has dropped is not asked again.
	lostWait = time.Second
)

// demux makes sessions of the datagrams that come in at one UDP socket: one for each client, which is an address and port. Its one loop
// reads, finds the session, and leaves the datagram in that session's queue; it never waits for a session. A session is
// run by HandlePackets in a goroutine of its own, and is over when that returns: after a silence that the relay
// measures, or at an error.
//
// The protocol sets the fields above mu, and calls serve once. A demux is a [net.Listener] that accepts nothing, so that it can be what a
// Listener listens at.
type demux struct {
	l    *Listener // for its name, log, and whom it lets in
	conn *net.UDPConn
	pool *slots // of sessions; may be another's

	// local says to which address a datagram with these control messages was sent.
	local func(oob []byte) netip.AddrPort
	// dst says where a datagram that was sent to local is to go. One that is to go to the zero Endpoint is dropped.
	dst func(local netip.AddrPort) relay.Endpoint
	// perLocal: a client that sends to several of our addresses has a session for each.
	perLocal bool
	// answer returns the way back to a client, which is closed when the session is over and nobody writes any more.
	answer func(client, local netip.AddrPort) answerer

	mu         sync.Mutex
	sessions   map[sessionKey]*datagramSession
	unanswered sessionList // those of sessions whose client has had no datagram yet, oldest first
	live       int         // handlers that run, each of which has a slot, also those of sessions that were closed
	serving    bool
	draining   bool

	all     sync.WaitGroup
	icmp    *rate.Limiter
	held    atomic.Int64 // memory of the datagrams in queues
	refused atomic.Int64 // datagrams of clients for whom there was no session

	// Of the loop alone: when there was last trouble, and who is to be woken.
	full, forbidden, failing, losing episode

	woken []*datagramSession
	lost  uint32 // what the kernel has dropped, when it was last asked
	asked time.Time
}

// An answerer sends to one client what comes from p.Endpoint. One goroutine at a time calls its methods.
type answerer interface {
	WritePacket(p *relay.Packet) error
	Close() error
}

type sessionKey struct{ client, local netip.AddrPort }

// newDemux returns a demux of what comes in at conn, which it closes.
func newDemux(l *Listener, conn *net.UDPConn) *demux {
	pool := newSlots(cmp.Or(l.MaxConns, DefaultMaxDatagramSessions))
	return &demux{l: l, conn: conn, pool: pool, sessions: make(map[sessionKey]*datagramSession), icmp: rate.NewLimiter(icmpRate, icmpBurst)}
}

// Accept implements net.Listener: there are no conns.
func (d *demux) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }

// Addr returns the address that is listened at.
func (d *demux) Addr() net.Addr { return d.conn.LocalAddr() }

// Close stops taking clients in. The sessions go on until they are silent.
func (d *demux) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.draining = true
	if !d.serving {
		return d.conn.Close()
	}
	return d.conn.SetReadDeadline(time.Now()) // has the loop look
}

// serve takes datagrams until Close or the end of ctx, which aborts the sessions, and returns after the last session.
func (d *demux) serve(ctx context.Context, h proxy.Handler) error {
	d.mu.Lock()
	d.serving = true
	d.mu.Unlock()
	defer d.conn.Close()
	stop := context.AfterFunc(ctx, func() { d.Close() })
	defer stop()
	r, err := newBatchReader(d.conn)
	if err != nil { // it is closed
		return nil
	}
	d.read(ctx, h, r)
	d.all.Wait()
	return nil
}

// read is the loop. It outlasts all errors.
func (d *demux) read(ctx context.Context, h proxy.Handler, r *batchReader) {
	var pause time.Duration
	for {
		n, err := r.read()
		if err == nil {
			pause = 0
			for i := range n {
				data, oob, client := r.datagram(i)
				d.take(ctx, h, client, d.local(oob), data)
			}
			d.wake()
			d.noteLost(r)
			continue
		}
		if d.over() {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if d.failing.begins() {
			d.log().Warn("reading datagrams failed", "err", err, "hint", acceptHint(err))
		}
		pause = min(max(2*pause, firstPause), maxPause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// noteLost logs what the kernel had no room for. It asks once a second while datagrams come.
func (d *demux) noteLost(r *batchReader) {
	now := time.Now()
	if now.Sub(d.asked) < lostWait {
		return
	}
	d.asked = now
	lost := r.lost()
	if n := lost - d.lost; n > 0 && d.losing.begins() {
		d.log().Warn("datagrams lost: they came faster than they were taken, and the kernel had no room for more", "datagrams", n,
			"hint", "where it goes on, set the sysctl net.core.rmem_max to 4 MiB or more")
	}
	d.lost = lost
}

// over says, while the demux drains, whether all its sessions are closed. It closes those that are silent, and sets
// the time to look again.
func (d *demux) over() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.draining {
		return false
	}
	d.conn.SetReadDeadline(time.Now().Add(sweepTime))
	for _, s := range d.sessions {
		if s.silence() >= quietTime {
			s.evict(proxy.ErrStopped)
		}
	}
	return len(d.sessions) == 0
}

func (d *demux) log() *slog.Logger { return d.l.s.log }

// take gives one datagram to its session. It does not block.
func (d *demux) take(ctx context.Context, h proxy.Handler, client, local netip.AddrPort, data []byte) {
	to := d.dst(local)
	if to == (relay.Endpoint{}) {
		d.refused.Add(1)
		return
	}
	key := sessionKey{client: client}
	if d.perLocal {
		key.local = local
	}
	d.mu.Lock()
	s := d.sessions[key]
	d.mu.Unlock()
	if s == nil {
		if s = d.admit(key, local); s == nil {
			d.refused.Add(1)
			return
		}
		f := proxy.Flow{Inbound: d.l.Name, Client: client, Local: local, Dst: proxy.UDP(to.Host(), to.Port)}
		s.push(to, data)
		go s.run(ctx, h, f)
		return
	}
	s.push(to, data)
	if n := len(d.woken); n == 0 || d.woken[n-1] != s {
		d.woken = append(d.woken, s)
	}
}

// wake wakes the sessions that were given datagrams: once for all that came together.
func (d *demux) wake() {
	for i, s := range d.woken {
		s.ready.Signal()
		d.woken[i] = nil
	}
	d.woken = d.woken[:0]
}

// admit makes a session for a new client; nil if it is not let in.
func (d *demux) admit(key sessionKey, local netip.AddrPort) *datagramSession {
	if !d.l.allows(key.client.Addr()) {
		if d.forbidden.begins() {
			d.log().Info("client refused by allow/deny", "client", key.client)
		}
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.draining {
		return nil
	}
	if !d.pool.take() {
		// Who was never answered may be nobody: give its place to the next that asks. The handler needs a moment to end.
		if s := d.unanswered.first; s != nil && d.live == len(d.sessions) && time.Since(s.start) >= answerWait {
			s.evict(errEvicted)
		}
		if d.full.begins() {
			d.log().Warn("new clients are not served: as many sessions as there may be", "max-conns", d.pool.max)
		}
		return nil
	}
	s := &datagramSession{demux: d, key: key, start: time.Now(), answerer: d.answer(key.client, local)}
	s.ready.L = &s.mu
	d.sessions[key] = s
	d.unanswered.add(s)
	d.live++
	d.all.Add(1)
	return s
}

// remove takes s out: the next datagram of its client begins another session.
func (d *demux) remove(s *datagramSession) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.removeLocked(s)
}

func (d *demux) removeLocked(s *datagramSession) {
	d.unanswered.remove(s)
	if d.sessions[s.key] == s {
		delete(d.sessions, s.key)
		if d.draining && len(d.sessions) == 0 {
			d.conn.SetReadDeadline(time.Now())
		}
	}
}

// datagramSession is the relay.PacketConn of one client of a demux.
type datagramSession struct {
	demux *demux
	key   sessionKey
	start time.Time
	answerer

	answered   atomic.Bool
	moved      atomic.Int64     // when a datagram last came or went, since start
	next, prev *datagramSession // among the unanswered; guarded by demux.mu

	mu      sync.Mutex
	ready   sync.Cond // something is in the queue, or closed
	queue   datagramQueue
	dropped int64
	closed  bool
	cancel  context.CancelCauseFunc // of the handler's context; nil before it runs
}

var (
	_ relay.PacketConn = (*datagramSession)(nil)
	_ relay.Refuser    = (*datagramSession)(nil)
	_ relay.Dropper    = (*datagramSession)(nil)

	_ relay.BatchReader = (*datagramSession)(nil)
	_ relay.BatchWriter = (*datagramSession)(nil)
)

// run is the session's goroutine. A panic there costs this session only.
func (s *datagramSession) run(ctx context.Context, h proxy.Handler, f proxy.Flow) {
	d := s.demux
	ctx, cancel := context.WithCancelCause(ctx)
	defer d.all.Done()
	defer s.ended()
	defer cancel(nil)
	defer s.recovered()
	s.mu.Lock()
	s.cancel = cancel
	if s.closed {
		cancel(net.ErrClosed)
	}
	s.mu.Unlock()
	h.HandlePackets(ctx, f, s)
}

func (s *datagramSession) recovered() {
	if p := recover(); p != nil {
		s.demux.log().Error("panic while serving a client", "client", s.key.client, "panic", p, "stack", string(debug.Stack()))
	}
}

// ended frees what the session had.
func (s *datagramSession) ended() {
	s.Close()
	s.answerer.Close()
	s.demux.mu.Lock()
	defer s.demux.mu.Unlock()
	s.demux.live--
	s.demux.pool.release()
}

// push leaves a datagram in the queue, or drops it where that is full. Who waits for it is still to be woken.
func (s *datagramSession) push(to relay.Endpoint, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.queue.push(to, data, &s.demux.held) {
		s.dropped++
		return
	}
	s.touch()
}

// ReadPacket implements relay.PacketConn: it returns what the client has sent.
func (s *datagramSession) ReadPacket(p *relay.Packet) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.queue.Len() == 0 && !s.closed {
		s.ready.Wait()
	}
	if s.closed {
		return net.ErrClosed
	}
	*p = s.queue.pop(&s.demux.held)
	return nil
}

// ReadMore implements relay.BatchReader.
func (s *datagramSession) ReadMore(ps []relay.Packet) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; n < len(ps) && s.queue.Len() > 0; n++ {
		ps[n] = s.queue.pop(&s.demux.held)
	}
	return n
}

// WritePacket implements relay.PacketConn: it sends to the client.
func (s *datagramSession) WritePacket(p *relay.Packet) error {
	if err := s.answerer.WritePacket(p); err != nil {
		return err
	}
	s.hasAnswer()
	return nil
}

// WritePackets implements relay.BatchWriter.
func (s *datagramSession) WritePackets(ps []relay.Packet) (n int, err error) {
	w, ok := s.answerer.(relay.BatchWriter)
	if !ok {
		if err := s.WritePacket(&ps[0]); err != nil {
			return 0, err
		}
		return 1, nil
	}
	if n, err = w.WritePackets(ps); n > 0 {
		s.hasAnswer()
	}
	return n, err
}

// hasAnswer is called when the client was sent something.
func (s *datagramSession) hasAnswer() {
	s.touch()
	if !s.answered.Load() {
		s.demux.mu.Lock()
		defer s.demux.mu.Unlock()
		s.answered.Store(true)
		s.demux.unanswered.remove(s)
	}
}

// Refuse implements relay.Refuser, where there is a way to tell this client.
func (s *datagramSession) Refuse(e relay.Endpoint, err error) {
	if r, ok := s.answerer.(relay.Refuser); ok && s.demux.icmp.Allow() {
		r.Refuse(e, err)
	}
}

// Dropped implements relay.Dropper.
func (s *datagramSession) Dropped() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// Close implements relay.PacketConn.
func (s *datagramSession) Close() error {
	s.close()
	s.demux.remove(s)
	return nil
}

func (s *datagramSession) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.dropped += s.queue.clear(&s.demux.held)
	s.ready.Broadcast()
}

// evict ends a session whatever it is at, and also where it still waits for its way out. The demux is locked.
func (s *datagramSession) evict(cause error) {
	s.mu.Lock()
	cancel := s.cancel
	s.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	}
	s.close()
	s.demux.removeLocked(s)
}

// errEvicted is why a session ended that nobody had answered.
var errEvicted = fmt.Errorf("inbound: never answered, and its place was needed: %w", net.ErrClosed)

func (s *datagramSession) touch() { s.moved.Store(int64(time.Since(s.start))) }

func (s *datagramSession) silence() time.Duration {
	return time.Since(s.start) - time.Duration(s.moved.Load())
}

// sessionList is the sessions that have not been answered.
type sessionList struct{ first, last *datagramSession }

func (l *sessionList) add(s *datagramSession) {
	s.prev = l.last
	if l.last != nil {
		l.last.next = s
	} else {
		l.first = s
	}
	l.last = s
}

// remove takes s out, if it is in.
func (l *sessionList) remove(s *datagramSession) {
	if s.prev == nil && l.first != s {
		return
	}
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		l.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		l.last = s.prev
	}
	s.next, s.prev = nil, nil
}
