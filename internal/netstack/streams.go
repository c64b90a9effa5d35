package netstack

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// streams makes sessions of SYNs.
type streams struct {
	r         *running
	max       int
	forwarder *tcp.Forwarder

	workers workers

	mu      sync.Mutex
	pending map[stack.TransportEndpointID]*pending
	sites   map[netip.Prefix]int // how many of the pending are of whom
	full    episode
	swept   time.Time // when giveWay was last
}

func (t *streams) init(r *running, most int) {
	if most == 0 {
		most = DefaultMaxPending
	}
	t.r, t.max = r, most
	t.pending, t.sites = make(map[stack.TransportEndpointID]*pending), make(map[netip.Prefix]int)
	t.workers.requests = make(chan *tcp.ForwarderRequest)
}

func (t *streams) newForwarder() {
	// The budget is kept here, and not by the forwarder.
	t.forwarder = tcp.NewForwarder(t.r.stack, 0, math.MaxInt, t.serve)
}

// handle takes a packet that belongs to no endpoint. False has it answered by a RST.
func (t *streams) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	if !isWay(addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)) {
		return true
	}
	h := header.TCP(pkt.TransportHeader().Slice())
	switch flags := h.Flags(); {
	case flags.Contains(header.TCPFlagRst):
		t.reset(id, h)
		return true
	case !flags.Contains(header.TCPFlagSyn) || flags.Contains(header.TCPFlagAck):
		return false
	}
	p := &pending{t: t, id: id, since: time.Now(), seq: h.SequenceNumber(), probeSeq: rand.Uint32()}
	taken, fresh := t.enter(p)
	if !taken {
		return !fresh // a stack that stops resets
	}
	if !t.forwarder.HandlePacket(id, pkt) { // a wrong checksum
		t.leave(p)
		t.r.sessions.Done()
	}
	return true
}

// enter takes p among the pending. Where there is one of its id already, p is not fresh: it is a SYN once more.
func (t *streams) enter(p *pending) (taken, fresh bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if again := t.pending[p.id]; again != nil {
		again.repeated = again.repeated || again.seq == p.seq
		return false, false
	}
	// Nobody may have more than are left for others, so that one client that dials in vain does not stop the rest.
	site := p.site()
	if t.sites[site] >= t.max-len(t.pending) {
		t.giveWay()
		if t.full.begins() {
			t.r.warn("SYNs dropped: as many dials as max-pending allows go on", "max-pending", t.max, "dials", len(t.pending),
				"client", site.Addr(), "of-client", t.sites[site])
		}
		return false, false
	}
	if !t.r.begins() {
		return false, true
	}
	t.pending[p.id] = p
	t.sites[site]++
	p.probing = time.AfterFunc(firstProbe, p.probe)
	return true, true
}

func (t *streams) leave(p *pending) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.pending, p.id)
	site := p.site()
	if t.sites[site]--; t.sites[site] == 0 {
		delete(t.sites, site)
	}
	p.probing.Stop()
}

// repeatWait is how long a client that has had no answer may take to send its SYN again: they do after a second
// (RFC 6298 section 2).
const repeatWait = 2 * time.Second

// giveWay ends the dials of clients that are not there, so that the addresses that a flood of SYNs has made up do not
// keep all places for as long as dials and handshakes may take. One that is there repeats its SYN, or acknowledges the answer.
func (t *streams) giveWay() {
	now := time.Now()
	if now.Sub(t.swept) < repeatWait/20 {
		return
	}
	t.swept = now
	for _, p := range t.pending {
		if !p.repeated && now.Sub(p.since) >= repeatWait {
			p.end()
		}
	}
}

// end gives the dial or the handshake up, without an answer. The caller has t.mu.
func (p *pending) end() {
	if p.wasReset {
		return
	}
	p.wasReset = true
	if p.failed != nil {
		p.failed()
	}
}

// site returns whom p counts for.
func (p *pending) site() netip.Prefix {
	return proxy.ClientNetwork(addrPort(p.id.RemoteAddress, 0).Addr())
}

// reset gives up the dial of a client that has reset its stream, or answered a probe.
func (t *streams) reset(id stack.TransportEndpointID, h header.TCP) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.pending[id]
	if p == nil {
		return
	}
	seq := h.SequenceNumber()
	probed := h.Flags().Contains(header.TCPFlagAck) && h.AckNumber() == p.probeSeq
	if !probed && seq != p.seq && seq != p.seq+1 {
		return
	}
	p.end()
}

// reopens is shown each SYN before the stack. One for a stream that is in TIME_WAIT is for a new one (RFC 1122 section 4.2.2.13).
func (t *streams) reopens(proto tcpip.NetworkProtocolNumber, id stack.TransportEndpointID) {
	ep, ok := t.r.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
	if ok && ep.EndpointState() == tcp.StateTimeWait {
		ep.Abort()
	}
}

// workers are goroutines that wait for a next stream: gVisor starts a goroutine for each SYN, and what costs most of
// that is to grow its stack to the depth of a dial, again for each stream.
type workers struct {
	requests chan *tcp.ForwarderRequest
	idle     atomic.Int32
}

const (
	workersMax = 64          // that wait
	workerIdle = time.Second // how long one does
)

// serve carries one stream until its session can go on without it, or has a worker that waits do so, or becomes a worker.
func (t *streams) serve(req *tcp.ForwarderRequest) {
	select {
	case t.workers.requests <- req:
		return
	default:
	}
	t.r.sessions.Add(1) // a worker ends when the stack takes no new streams
	defer t.r.sessions.Done()
	idle := time.NewTimer(workerIdle)
	defer idle.Stop()
	for req != nil {
		t.carry(req)
		idle.Reset(workerIdle)
		req = t.next(idle.C)
	}
}

// next waits for another stream. It returns nil where that is to be left to others.
func (t *streams) next(idle <-chan time.Time) (req *tcp.ForwarderRequest) {
	defer t.workers.idle.Add(-1)
	if t.workers.idle.Add(1) > workersMax {
		return nil
	}
	select {
	case req = <-t.workers.requests:
	case <-idle:
	case <-t.r.closed:
	}
	return req
}

// carry carries one stream until its session can go on without it.
func (t *streams) carry(req *tcp.ForwarderRequest) {
	id := req.ID()
	t.mu.Lock()
	p := t.pending[id]
	t.mu.Unlock()
	p.req = req
	defer p.recovered()
	client, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	f := proxy.Flow{
		Inbound: t.r.settings.Name, Client: client, Local: dst, Dst: proxy.TCP(dst.Addr().String(), dst.Port()),
	}
	t.r.handler.HandleStream(t.r.ctx, f, p)
}

// pending is a SYN that waits for its answer.
type pending struct {
	t     *streams
	id    stack.TransportEndpointID
	since time.Time
	seq   uint32
	req   *tcp.ForwarderRequest // nil once it is answered
	done  atomic.Bool

	shaken atomic.Bool // the handshake has ended

	probeSeq uint32 // of the probes
	probing  *time.Timer

	// guarded by t.mu
	probes   uint   // how many were sent
	repeated bool   // the SYN came again
	wasReset bool   // or gave way
	failed   func() // to be called when it is reset
}

var (
	_ proxy.Pending = (*pending)(nil)
	_ proxy.Watched = (*pending)(nil)
	_ relay.Watcher = (*pendingConn)(nil)
)

// Conn implements proxy.Watched. There is no conn yet, but it can be watched.
func (p *pending) Conn() net.Conn { return &pendingConn{p: p} }

type pendingConn struct {
	net.Conn // nil
	p        *pending
}

// Watch implements relay.Watcher.
func (c *pendingConn) Watch(failed func()) (stop func()) {
	c.p.t.mu.Lock()
	defer c.p.t.mu.Unlock()
	if c.p.wasReset {
		failed()
		return func() {}
	}
	c.p.failed = failed
	return c.unwatch
}

func (c *pendingConn) unwatch() {
	c.p.t.mu.Lock()
	defer c.p.t.mu.Unlock()
	c.p.failed = nil
}

// Failure implements relay.Watcher.
func (c *pendingConn) Failure() error {
	c.p.t.mu.Lock()
	defer c.p.t.mu.Unlock()
	if c.p.wasReset {
		return syscall.ECONNRESET
	}
	return nil
}

// firstProbe is when a client that waits is first asked whether it still does; the times double from there.
const firstProbe = 250 * time.Millisecond

// probe asks the client whether it still waits. One that closes its socket says nothing of it before it has
// had an answer, so that its destination would be dialled in vain. A segment without any flag is ignored by
// who has sent a SYN, and answered by a RST by who knows of none (RFC 9293 sections 3.10.7.3 and 3.10.7.1).
func (p *pending) probe() {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if p.t.pending[p.id] != p || p.wasReset {
		return
	}
	p.t.r.sendProbe(p.id, p.probeSeq)
	p.probing.Reset(firstProbe << min(p.probes, 8))
	p.probes++
}

// Accept answers by a SYN-ACK and waits for the client's ACK.
func (p *pending) Accept() (net.Conn, []byte, error) {
	ctx, cancel := context.WithCancel(p.t.r.ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, p.giveUp)
	defer stop()
	stopWatching := (&pendingConn{p: p}).Watch(cancel)
	defer stopWatching()
	c := newConn(p.id)
	ep, err := p.req.CreateEndpoint(&c.queue)
	p.shaken.Store(true)
	p.answered(false)
	if err != nil {
		return nil, nil, fmt.Errorf("netstack: the client did not take its stream: %w", errnoOf(err))
	}
	c.begin(ep.(*tcp.Endpoint))
	return c, nil, nil
}

// giveUp ends a handshake, also one that begins only now.
func (p *pending) giveUp() {
	for ; !p.shaken.Load(); time.Sleep(5 * time.Millisecond) {
		p.abort()
	}
}

func (p *pending) abort() {
	proto := header.IPv4ProtocolNumber
	if p.id.LocalAddress.Len() == header.IPv6AddressSize {
		proto = header.IPv6ProtocolNumber
	}
	if ep := p.t.r.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, p.id, nicID); ep != nil {
		ep.Abort()
	}
}

// Reject answers as the dial ended.
func (p *pending) Reject(err error) {
	switch reason := proxy.ReasonOf(err); reason {
	case proxy.Timeout:
		p.answered(false)
	case proxy.NetUnreachable, proxy.HostUnreachable, proxy.NoHost, proxy.Denied:
		p.t.r.unreachable(p.id, p.seq, reason)
		p.answered(false)
	default:
		p.t.mu.Lock()
		silent := p.wasReset
		p.t.mu.Unlock()
		p.answered(!silent)
	}
}

// answered ends the waiting.
func (p *pending) answered(byReset bool) {
	p.req.Complete(byReset)
	p.req = nil
	p.t.leave(p)
}

// Done implements proxy.Pending.
func (p *pending) Done() {
	if !p.done.Swap(true) {
		p.t.r.sessions.Done()
	}
}

// recovered makes a panic of the handler's cost this stream only.
func (p *pending) recovered() {
	v := recover()
	if v == nil {
		return
	}
	client := addrPort(p.id.RemoteAddress, p.id.RemotePort)
	p.t.r.log.Error("panic while serving a client", "client", client, "panic", v, "stack", string(debug.Stack()))
	if p.req != nil {
		p.answered(true)
	}
	p.Done()
}

// isWay says whether packets can go from one place to another: both are at hosts, and not at the same one. A host that
// sends to itself does not do so by a device, and its answers would come back as what it has sent.
func isWay(from, to netip.AddrPort) bool {
	return from.Addr() != to.Addr() && isHost(from) && isHost(to)
}

// isHost says whether a can be a place at a host. IPv4 is not sent in IPv6's addresses.
func isHost(a netip.AddrPort) bool { return proxy.IsHost(a) && !a.Addr().Is4In6() }

// An episode is a time of trouble, which is logged once: when it begins.
type episode struct{ last time.Time }

// episodeGap is how long it must have been quiet for trouble to be a new episode.
const episodeGap = 10 * time.Second

// begins is called at each trouble and says whether a new episode begins with it.
func (e *episode) begins() bool {
	now := time.Now()
	defer func() { e.last = now }()
	return e.last.IsZero() || now.Sub(e.last) >= episodeGap
}
