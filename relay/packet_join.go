package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The limits on the silence of datagrams.
const (
	// DefaultPacketIdle is what RFC 4787 section 4.3 recommends for a mapping.
	DefaultPacketIdle = 5 * time.Minute
	// DefaultDNSIdle is the same for datagrams that all went to port 53: a question and its answer.
	DefaultDNSIdle = 30 * time.Second
)

// PacketStats counts datagrams while they are relayed. The zero value is ready; it belongs to the caller, serves one
// relay, and may be read at any time from any goroutine.
type PacketStats struct {
	bytes, packets, dropped [2]atomic.Int64
	moved                   atomic.Int64 // when a datagram was last read, as clock tells it; 0 before the relay began
}

// Silence returns for how long no datagram has come from either side; 0 before the relay has begun.
func (s *PacketStats) Silence() time.Duration {
	moved := s.moved.Load()
	if moved == 0 {
		return 0
	}
	return time.Duration(clock() - moved)
}

// Bytes returns the bytes passed on so far from each side.
func (s *PacketStats) Bytes() (aToB, bToA int64) { return s.bytes[A].Load(), s.bytes[B].Load() }

// Packets returns the datagrams passed on so far from each side.
func (s *PacketStats) Packets() (aToB, bToA int64) { return s.packets[A].Load(), s.packets[B].Load() }

// Dropped returns the datagrams from each side that could not be passed on. Those that a [Dropper] has not even
// kept are added at the end.
func (s *PacketStats) Dropped() (aToB, bToA int64) { return s.dropped[A].Load(), s.dropped[B].Load() }

// PacketResult says what became of a relay of datagrams.
type PacketResult struct {
	Err      error         // why it ended: [ErrIdle], the context's cause, or what a side failed with
	End      End           // Idle, Canceled, Quota, or Read for a side that failed
	First    Side          // the side that failed; Neither for a limit or a cancelled context
	Duration time.Duration // from the call to the close of both conns
}

// JoinPackets relays datagrams between a client and origins, in both directions, until there have been none for
// [Relay.PacketIdle], ctx is cancelled, or a side fails; then it closes both conns. A datagram that cannot be passed on is dropped
// and counted; where a place is unreachable, a client that is a [Refuser] is told. An origin that is a [Switch] is as many conns as it has
// ways.
//
// Of the settings, PacketIdle, Rate, Shared and Quota apply; a rate holds datagrams back, and whoever queues them drops what comes meanwhile. st may be nil.
func (r *Relay) JoinPackets(ctx context.Context, client, origin PacketConn, st *PacketStats) PacketResult {
	if st == nil {
		st = new(PacketStats)
	}
	p := &packetPair{relay: r, stats: st, conns: [2]PacketConn{client, origin}, gov: newGovernor(r), start: time.Now(), over: make(chan struct{})}
	p.ways, _ = origin.(Switch)
	st.moved.Store(clock())
	p.onlyDNS.Store(true)
	p.first = Neither
	p.timer = time.AfterFunc(p.idle(), p.tick)
	stop := context.AfterFunc(ctx, func() { p.end(Neither, Canceled, context.Cause(ctx)) })
	p.pumps.Go(func() { p.pump(B, origin) })
	p.pump(A, client)
	p.pumps.Wait()
	stop()
	p.timer.Stop()
	countDropped(st, A, client)
	countDropped(st, B, origin)
	for _, c := range p.others {
		countDropped(st, B, c)
	}
	return PacketResult{Err: p.err, End: p.how, First: p.first, Duration: time.Since(p.start)}
}

func countDropped(st *PacketStats, s Side, c PacketConn) {
	if d, ok := c.(Dropper); ok {
		st.dropped[s].Add(d.Dropped())
	}
}

// packetPair is a pair of conns that datagrams are relayed between.
type packetPair struct {
	relay   *Relay
	stats   *PacketStats
	conns   [2]PacketConn
	gov     *governor // nil: no limits
	start   time.Time
	timer   *time.Timer
	onlyDNS atomic.Bool // all of the client's went to port 53
	pumps   sync.WaitGroup

	ways     Switch     // nil: one way
	toClient sync.Mutex // held to write to the client, where there are more
	mu       sync.Mutex
	others   []PacketConn // what the Switch has returned; those that came before over was closed are closed by end

	once  sync.Once
	over  chan struct{}
	first Side
	how   End
	err   error
}

// idle returns how long the silence may be.
func (p *packetPair) idle() time.Duration {
	switch d := p.relay.PacketIdle; {
	case d < 0:
		return lengthMax
	case d > 0:
		return min(d, lengthMax)
	case p.onlyDNS.Load():
		return DefaultDNSIdle
	}
	return DefaultPacketIdle
}

// tick looks whether the pair has been silent for too long.
func (p *packetPair) tick() {
	left := p.idle() - p.stats.Silence()
	if left > 0 {
		p.timer.Reset(left)
		return
	}
	p.end(Neither, Idle, ErrIdle)
}

// end ends the pair, for the first cause that there is.
func (p *packetPair) end(s Side, how End, err error) {
	p.once.Do(func() {
		p.first, p.how, p.err = s, how, err
		close(p.over)
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, c := range p.others {
			c.Close()
		}
	})
}

// way returns the conn by which datagrams to e go. It reads from one that is new.
func (p *packetPair) way(e Endpoint) (PacketConn, error) {
	c, err := p.ways.Way(e)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return p.conns[B], nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.others, c) {
		return c, nil
	}
	select {
	case <-p.over:
		c.Close()
		return nil, net.ErrClosed
	default:
	}
	p.others = append(p.others, c)
	p.pumps.Go(func() { p.pump(B, c) })
	return c, nil
}

// batchMax is how many datagrams are passed on at a time.
const batchMax = 64

// batches are those of pumps that have more than one datagram: who waits holds none.
var batches = sync.Pool{New: func() any { return new([batchMax]Packet) }}

// pump moves the datagrams from c, of side s, until the pair's end.
func (p *packetPair) pump(s Side, c PacketConn) {
	defer func() {
		if v := recover(); v != nil {
			p.end(s, Read, fmt.Errorf("%w: %v", ErrPanic, v))
		}
	}()
	more, _ := c.(BatchReader)
	if p.gov != nil {
		more = nil // each by itself is held back
	}
	one := make([]Packet, 1)
	defer one[0].Free()
	for {
		if err := c.ReadPacket(&one[0]); err != nil {
			unreachable, ok := errors.AsType[*UnreachableError](err)
			if !ok {
				p.end(s, Read, err)
				return
			}
			p.refuse(s, unreachable.To, unreachable.Err)
			continue
		}
		if !p.admit(s, len(one[0].Data)) {
			return
		}
		if more == nil {
			if !p.pass(s, one) {
				return
			}
			continue
		}
		batch := batches.Get().(*[batchMax]Packet)
		batch[0], one[0] = one[0], Packet{}
		n := 1 + more.ReadMore(batch[1:])
		ok := p.pass(s, batch[:n])
		batches.Put(batch)
		if !ok {
			return
		}
	}
}

// pass writes ps, which came from s, to the other side, and frees them. It returns false if that is closed.
func (p *packetPair) pass(s Side, ps []Packet) bool {
	defer freePackets(ps)
	p.stats.moved.Store(clock())
	for i := range ps {
		if s == A && ps[i].Endpoint.Port != 53 {
			p.onlyDNS.Store(false)
		}
	}
	for len(ps) > 0 {
		n, err := p.write(s, ps)
		for i := range ps[:n] {
			p.stats.packets[s].Add(1)
			p.stats.bytes[s].Add(int64(len(ps[i].Data)))
		}
		ps = ps[n:]
		if err == nil {
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			p.stats.dropped[s].Add(int64(len(ps)))
			p.end(s.other(), Read, err)
			return false
		}
		p.stats.dropped[s].Add(1)
		p.refuse(s.other(), ps[0].Endpoint, err)
		ps = ps[1:]
	}
	return true
}

// write writes the first of ps, which came from s, and as many more as go the same way at a time. It returns how many, and the error of
// the one behind them.
func (p *packetPair) write(s Side, ps []Packet) (n int, err error) {
	switch {
	case p.ways == nil:
	case s == B:
		p.toClient.Lock()
		defer p.toClient.Unlock()
	default:
		c, err := p.way(ps[0].Endpoint)
		if err != nil {
			return 0, err
		}
		n := 1
		for n < len(ps) {
			if next, err := p.way(ps[n].Endpoint); err != nil || next != c {
				break // its turn comes
			}
			n++
		}
		return writePackets(c, ps[:n])
	}
	return writePackets(p.conns[s.other()], ps)
}

// writePackets writes as many of ps as c takes at a time, and returns how many, and the error of the one behind them.
func writePackets(c PacketConn, ps []Packet) (n int, err error) {
	if w, ok := c.(BatchWriter); ok && len(ps) > 1 {
		return w.WritePackets(ps)
	}
	if err := c.WritePacket(&ps[0]); err != nil {
		return 0, err
	}
	return 1, nil
}

func freePackets(ps []Packet) {
	for i := range ps {
		ps[i].Free()
		ps[i].Endpoint = Endpoint{}
	}
}

// refuse tells the client, where it can be told, that the conn of side s cannot deliver to e.
func (p *packetPair) refuse(s Side, e Endpoint, err error) {
	if r, ok := p.conns[A].(Refuser); ok && s == B {
		r.Refuse(e, err)
	}
}

// admit waits until a datagram of n bytes from s is within the rate. It returns false once the pair is over.
func (p *packetPair) admit(s Side, n int) bool {
	if p.gov == nil {
		return true
	}
	for {
		left, spent := p.gov.allowed(s, max(n, 1), clock())
		if spent || left > 0 && p.gov.charge(s, n) < n {
			p.end(Neither, Quota, ErrQuota)
			return false
		}
		if left > 0 {
			return true
		}
		select {
		case <-p.over:
			return false
		case <-time.After(throttleTick):
		}
	}
}
